//! Reads files of a backup map: decodes as little as possible, keeps what was decoded, and never serves bytes that
//! nothing vouches for.
//!
//! Owns the decode cache, the cursors (decoders kept in the middle of a file) and each file's verification. Leaves
//! decoding to [`crate::codec`], stored bytes to [`crate::store`], and threads to whoever calls (many may call at
//! once), but for one that hashes. Start at [`Reader::read_at`].
//!
//! A file is decoded in chunks of [`CHUNK`] bytes, always by one thread at a time (its lock); other files go on
//! meanwhile. Locks are taken in the order file, cursor pool or cache; the latter two for moments only.
//!
//! What vouches for a byte: pages that carry PostgreSQL's checksums are served as they are decoded; all other files
//! are decoded and verified whole before their first byte is served. A chunk that is decoded again (the cache was too
//! small) must be what it was the first time. A file found damaged stays damaged.

mod cache;
mod cursor;
mod digesting;
mod error;
mod progress;
mod statistics;
mod stream;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use error::{Place, ReadError};
pub use statistics::Statistics;

use crate::buffers::Buffers;
use crate::map::{Codec, Content, MapFile};
use crate::store::ObjectStore;
use cache::Cache;
use cursor::Pool;
use digesting::Helper;
use progress::Progress;
use statistics::Counters;
use stream::Purpose;

/// Decoded bytes of one chunk: as many as the kernel asks for at once for PostgreSQL (its usual read-ahead). Of several blocks of
/// 64 KiB, as pgBackRest's LZ4 frames have them, the library copies only the first and the last.
pub const CHUNK: u64 = 128 * 1024;
/// Chunks decoded under one hold of a file's lock when a file is verified whole.
const STRIDE: u64 = 256;
/// Longest read-ahead, bytes.
const AHEAD_LIMIT: u64 = 2 * 1024 * 1024;
/// Bytes read in sequence after which the kernel keeps what was read, and this cache need not.
const KEPT_BY_KERNEL: u64 = 1024 * 1024;
/// Reads as far apart as this still count as sequential: the kernel may send some at once, in any order.
const SEQUENTIAL_GAP: u64 = 256 * 1024;
/// Memory that idle cursors may hold however small the cache is.
const CURSOR_MEMORY: u64 = 16 * 1024 * 1024;
/// Longest file that is returned whole: the largest WAL segment.
const WHOLE_LIMIT: u64 = 1024 * 1024 * 1024;

/// Serves ranges of the decoded files of one backup map.
pub struct Reader {
    store: Arc<dyn ObjectStore>,
    files: Vec<MapFile>,
    states: Vec<OnceLock<Box<State>>>,
    cache: Mutex<Cache>,
    cache_bytes: u64,
    buffers: Arc<Buffers>,
    cursors: Mutex<Pool>,
    digests: Helper,
    counters: Arc<Counters>,
}

/// What vouches for what was served of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Coverage {
    /// Nothing was served or verified.
    Untouched,
    /// A part was read; that part rests on page checksums.
    Partly,
    /// The whole file was read, and it matches the repository's digest.
    WholeVerified,
    /// The whole file was read and decoded well; the repository has no digest of it.
    WholeWithoutDigest,
    /// The file was found damaged.
    Damaged,
}

/// What is known of one file while the reader lives.
struct State {
    /// Why the file cannot be read any more.
    failed: OnceLock<ReadError>,
    /// It was read to its end once, and nothing was wrong.
    whole: AtomicBool,
    /// Bytes of it were served.
    touched: AtomicBool,
    /// Where the last read ended, and how many bytes were read in sequence up to there.
    last_end: AtomicU64,
    sequence: AtomicU64,
    /// How far it was decoded ahead.
    ahead: AtomicU64,
    /// The file's lock.
    progress: Mutex<Progress>,
}

/// How a file's bytes are reached.
enum Way<'a> {
    Inline(&'a [u8]),
    /// Stored uncompressed, and pages vouch for themselves or nothing does: read where they lie.
    Direct,
    /// Through chunks; `verify_first`: the whole file is verified before its first byte is served.
    Chunks {
        verify_first: bool,
    },
}

impl Reader {
    /// Returns a reader of `files`, which keeps at most `cache_bytes` of decoded bytes.
    pub fn new(store: Arc<dyn ObjectStore>, files: Vec<MapFile>, cache_bytes: u64) -> Self {
        let states = files.iter().map(|_| OnceLock::new()).collect();
        let cursors = Mutex::new(Pool::new(CURSOR_MEMORY.max(cache_bytes / 4)));
        let cache = Mutex::new(Cache::new(cache_bytes));
        let buffers = Buffers::of(CHUNK as usize);
        Self {
            store,
            files,
            states,
            cache,
            cache_bytes,
            buffers,
            cursors,
            digests: Helper::default(),
            counters: Arc::default(),
        }
    }

    /// The files, as they were given; all methods name a file by its place here, and panic for a place that is not.
    pub fn files(&self) -> &[MapFile] {
        &self.files
    }

    /// Reads what needs neither decoding nor waiting for storage or another thread: files that the map carries, and
    /// decoded bytes in the cache. `None`: call [`Reader::read_at`] where waiting is allowed.
    pub fn try_read_at(
        &self,
        file: usize,
        offset: u64,
        buf: &mut [u8],
    ) -> Option<Result<(), ReadError>> {
        let state = self.state(file);
        if let Err(err) = self.check(file, state, offset, buf.len()) {
            return Some(Err(err));
        }
        match self.way(file) {
            Way::Inline(bytes) => copy_inline(bytes, offset, buf),
            Way::Direct => return None,
            Way::Chunks { verify_first } => {
                if verify_first && !state.is_whole() {
                    return None;
                }
                let found: Vec<_> = {
                    let mut cache = lock(&self.cache);
                    chunks_of(offset, buf.len())
                        .map(|index| cache.get((file, index)))
                        .collect::<Option<_>>()?
                };
                for (index, chunk) in chunks_of(offset, buf.len()).zip(&found) {
                    copy_part(index, chunk, offset, buf);
                }
                self.counters.cache_hits.add(found.len() as u64);
            }
        }
        self.note(file, state, offset, buf.len());
        Some(Ok(()))
    }

    /// Fills `buf` with the file's bytes from `offset`; may decode, and wait for storage and for other threads that
    /// decode the same file.
    ///
    /// # Errors
    /// [`ReadError`]. Once data was found wrong, every later read of the file fails with the same error.
    pub fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let state = self.state(file);
        self.check(file, state, offset, buf.len())?;
        match self.way(file) {
            Way::Inline(bytes) => copy_inline(bytes, offset, buf),
            Way::Direct => self.read_direct(file, state, offset, buf)?,
            Way::Chunks { verify_first } => {
                if verify_first {
                    self.verify_chunks(file, state, self.keeps(file))?;
                }
                self.read_chunks(file, state, offset, buf)?;
            }
        }
        self.note(file, state, offset, buf.len());
        Ok(())
    }

    /// Returns whether [`Reader::read_ahead`] is worth a thread's waking: half of what it would decode is not there yet.
    pub fn wants_ahead(&self, file: usize) -> bool {
        let state = self.state(file);
        let (window, last) = (self.window(state), state.last_end.load(Ordering::Relaxed));
        let ahead = state.ahead.load(Ordering::Relaxed);
        // What is farther ahead was decoded for reads elsewhere.
        let enough = last + window / 2..=last + window + CHUNK;
        window >= CHUNK && ahead < self.files[file].size && !enough.contains(&ahead)
    }

    /// How far ahead of its reads a file is decoded, in bytes.
    fn window(&self, state: &State) -> u64 {
        (state.sequence.load(Ordering::Relaxed) / 2).min(AHEAD_LIMIT).min(self.cache_bytes / 8)
    }

    /// Decodes ahead of sequential reads of a file, the further the longer they go on, so that
    /// [`Reader::try_read_at`] answers the next ones. Call it after a read was answered. Never decodes from the start
    /// again, never waits for another thread, and leaves errors to the read that meets them.
    pub fn read_ahead(&self, file: usize) {
        let state = self.state(file);
        let Way::Chunks { verify_first } = self.way(file) else { return };
        if state.failed.get().is_some() || (verify_first && !state.is_whole()) {
            return;
        }
        let window = self.window(state);
        let from = state.last_end.load(Ordering::Relaxed) / CHUNK;
        let (end, count) = (from.saturating_add(window / CHUNK), self.chunk_count(file));
        let end = if end < count.saturating_sub(1) { end } else { count }; // the last chunk goes with the one before it
        let Ok(mut progress) = state.progress.try_lock() else { return };
        let stands = lock(&self.cursors).nearest(file, end.saturating_sub(1));
        if let Some(stands) = stands.filter(|stands| from.saturating_sub(*stands) <= window / CHUNK)
        {
            // A file found damaged is marked as such; anything else the next read will meet again.
            let _ = self.decode(
                file,
                state,
                &mut progress,
                from.max(stands)..end,
                Purpose::Ahead,
                &mut |_, _| {},
            );
            state.ahead.store(end * CHUNK, Ordering::Relaxed);
        }
    }

    /// Returns a file's whole content, verified against its digest and size.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::TooLarge`] beyond 1 GiB.
    pub fn read_whole(&self, file: usize) -> Result<Vec<u8>, ReadError> {
        let size = self.files[file].size;
        let length = usize::try_from(size).ok().filter(|_| size <= WHOLE_LIMIT);
        let length = length.ok_or_else(|| ReadError::TooLarge { place: self.place(file), size })?;
        match self.way(file) {
            Way::Chunks { .. } => self.verify_chunks(file, self.state(file), self.keeps(file))?,
            Way::Inline(_) | Way::Direct => self.verify_whole(file)?,
        }
        let mut bytes = vec![0; length];
        self.read_at(file, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the rest of a file that was not read yet and verifies the whole; keeps nothing in the cache.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn verify_whole(&self, file: usize) -> Result<(), ReadError> {
        let state = self.state(file);
        match self.way(file) {
            Way::Inline(_) => state.fine(),
            Way::Chunks { .. } => self.verify_chunks(file, state, false),
            Way::Direct => {
                let mut buf = vec![0; (CHUNK * 4) as usize];
                while !state.is_whole() {
                    state.fine()?;
                    let position = lock(&state.progress).position();
                    let length = (self.files[file].size - position).min(buf.len() as u64) as usize;
                    self.read_direct(file, state, position, &mut buf[..length])?;
                }
                state.fine()
            }
        }
    }

    /// Returns what vouches for what was served of a file so far.
    pub fn coverage(&self, file: usize) -> Coverage {
        let Some(state) = self.states[file].get() else { return Coverage::Untouched };
        let touched = state.touched.load(Ordering::Relaxed);
        if state.failed.get().is_some() {
            Coverage::Damaged
        } else if state.is_whole() && (touched || !matches!(self.way(file), Way::Inline(_))) {
            match self.files[file].digest {
                Some(_) => Coverage::WholeVerified,
                None => Coverage::WholeWithoutDigest,
            }
        } else if touched {
            Coverage::Partly
        } else {
            Coverage::Untouched
        }
    }

    /// Returns which files were found damaged so far and why, in the order of [`Reader::files`]; also those whose damage no
    /// read has met yet.
    pub fn damaged(&self) -> Vec<(usize, ReadError)> {
        let failed = |state: &OnceLock<Box<State>>| state.get()?.failed.get().cloned();
        let files = self.states.iter().enumerate();
        files.filter_map(|(file, state)| Some((file, failed(state)?))).collect()
    }

    /// Returns what this reader did so far.
    pub fn statistics(&self) -> Statistics {
        self.counters.now()
    }

    fn place(&self, file: usize) -> Place {
        Place::of(&self.files[file])
    }

    /// Notes that a read was served.
    fn note(&self, file: usize, state: &State, offset: u64, length: usize) {
        state.note(offset, length);
        // Of files that are not in chunks, the cache has none.
        if !self.keeps(file) && state.sequence.load(Ordering::Relaxed) > KEPT_BY_KERNEL {
            lock(&self.cache).pass(file, offset, length);
        }
    }

    /// The file fits so well into the cache that reading it whole may leave it there.
    fn keeps(&self, file: usize) -> bool {
        self.files[file].size <= self.cache_bytes / 4
    }

    fn chunk_count(&self, file: usize) -> u64 {
        self.files[file].size.div_ceil(CHUNK)
    }

    fn way(&self, file: usize) -> Way<'_> {
        let file = &self.files[file];
        match &file.content {
            Content::Inline(bytes) => Way::Inline(bytes),
            Content::Stored { codec: Codec::None, .. }
                if file.page_checksums || file.digest.is_none() =>
            {
                Way::Direct
            }
            Content::Stored { .. } => Way::Chunks { verify_first: !file.page_checksums },
        }
    }

    /// The file's state, made when it is first asked for.
    fn state(&self, file: usize) -> &State {
        self.states[file].get_or_init(|| {
            let state = State::new(&self.files[file]);
            self.counters.files_damaged.add(u64::from(state.failed.get().is_some()));
            Box::new(state)
        })
    }

    fn check(
        &self,
        file: usize,
        state: &State,
        offset: u64,
        length: usize,
    ) -> Result<(), ReadError> {
        state.fine()?;
        let (length, size) = (length as u64, self.files[file].size);
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(ReadError::OutOfRange { place: self.place(file), offset, length, size })
    }
}

impl State {
    fn new(file: &MapFile) -> Self {
        let wrong = progress::check_map(file).err();
        Self {
            whole: AtomicBool::new(matches!(file.content, Content::Inline(_)) && wrong.is_none()),
            failed: wrong.map_or_else(OnceLock::new, OnceLock::from),
            touched: AtomicBool::new(false),
            last_end: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            progress: Mutex::new(Progress::new(file)),
        }
    }

    fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    fn fine(&self) -> Result<(), ReadError> {
        self.failed.get().cloned().map_or(Ok(()), Err)
    }

    /// Notes that a read was served; told apart: sequential and scattered reads.
    fn note(&self, offset: u64, length: usize) {
        self.touched.store(true, Ordering::Relaxed);
        let end = offset + length as u64;
        let last = self.last_end.load(Ordering::Relaxed);
        let apart = offset.saturating_sub(last).max(last.saturating_sub(end));
        if apart <= SEQUENTIAL_GAP {
            self.sequence.fetch_add(length as u64, Ordering::Relaxed);
            self.last_end.fetch_max(end, Ordering::Relaxed);
        } else {
            self.sequence.store(0, Ordering::Relaxed);
            self.last_end.store(end, Ordering::Relaxed);
        }
    }
}

/// Locks; a thread that panicked left nothing half done behind that matters (a decoder in use is dropped).
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chunks that a range touches; none for an empty range.
fn chunks_of(offset: u64, length: usize) -> std::ops::Range<u64> {
    if length == 0 { 0..0 } else { offset / CHUNK..(offset + length as u64).div_ceil(CHUNK) }
}

/// Copies the part of a chunk that a read at `offset` asks for.
fn copy_part(index: u64, chunk: &[u8], offset: u64, buf: &mut [u8]) {
    let start = index * CHUNK;
    let from = offset.max(start);
    let to = (offset + buf.len() as u64).min(start + chunk.len() as u64);
    if from < to {
        let part = &chunk[(from - start) as usize..(to - start) as usize];
        buf[(from - offset) as usize..][..part.len()].copy_from_slice(part);
    }
}

/// Copies from a file that the map carries; the range was checked.
fn copy_inline(bytes: &[u8], offset: u64, buf: &mut [u8]) {
    buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_in_order_may_change_places_with_their_neighbors() {
        const READ: u64 = 256 * 1024; // as long as the kernel's
        let state = State::new(&MapFile {
            path: crate::map::ClusterPath::new("data/base/1/1").unwrap(),
            size: 64 * READ,
            modified: 0,
            content: Content::Inline(Vec::new()),
            digest: None,
            page_checksums: true,
        });
        for place in [0, 1, 3, 2, 5, 4, 6] {
            state.note(place * READ, READ as usize);
        }
        assert_eq!(state.sequence.load(Ordering::Relaxed), 7 * READ);
        assert_eq!(state.last_end.load(Ordering::Relaxed), 7 * READ);
        state.note(9 * READ, READ as usize);
        assert_eq!(state.sequence.load(Ordering::Relaxed), 0, "two reads are left out");
        state.note(7 * READ, READ as usize);
        assert_eq!(state.sequence.load(Ordering::Relaxed), 0, "and it goes back by as much");
    }
}
