//! How a [`Reader`] gets bytes it does not have: by cursors, chunk after chunk, or straight from the store.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cursor::{Cursor, StoredRange};
use super::error::{Place, ReadError};
use super::progress::{Chunk, Progress};
use super::{CHUNK, Reader, SEQUENTIAL_GAP, STRIDE, State, chunks_of, copy_part, lock};
use crate::buffers::Buffer;
use crate::codec::Decoder;
use crate::map::{Codec, Content};

/// What chunks are decoded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Somebody waits for them.
    Read,
    /// Somebody will.
    Ahead,
    /// To see whether they are good; kept if the file fits well into the cache.
    Verify { keep: bool },
}

/// Takes chunks as they come: a chunk's number and its bytes.
type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]);

impl Reader {
    /// Reads a range that is in chunks; the file's lock is taken only if something of it is not in the cache.
    pub(super) fn read_chunks(
        &self,
        file: usize,
        state: &State,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut wanted = chunks_of(offset, buf.len());
        while !wanted.is_empty() {
            let found = lock(&self.cache).get((file, wanted.start));
            let Some(chunk) = found else { break };
            self.counters.cache_hits.add(1);
            copy_part(wanted.start, &chunk, offset, buf);
            wanted.start += 1;
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let mut progress = lock(&state.progress);
        state.fine()?;
        let mut copy = |index, chunk: &[u8]| copy_part(index, chunk, offset, buf);
        self.decode(file, state, &mut progress, wanted, Purpose::Read, &mut copy)
    }

    /// Reads a range of an uncompressed file where it lies; the digest runs along while reads are in order.
    pub(super) fn read_direct(
        &self,
        file: usize,
        state: &State,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), ReadError> {
        let map = &self.files[file];
        let Content::Stored { object, offset: start, .. } = map.content else { return Ok(()) };
        let fetch = |offset: u64, buf: &mut [u8]| {
            let read = self.store.read_exact_at(object, start + offset, buf);
            read.map_err(|err| ReadError::stored(Place::of(map), err))?;
            self.counters.stored_bytes_read.add(buf.len() as u64);
            Ok(())
        };
        fetch(offset, buf)?;
        if state.is_whole() {
            return Ok(());
        }
        let mut progress = lock(&state.progress);
        state.fine()?; // another thread may have found the digest wrong meanwhile
        let gap = offset.saturating_sub(progress.position());
        if gap > 0 && gap <= state.sequence.load(Ordering::Relaxed).min(SEQUENTIAL_GAP) {
            // Sequential reads that came in another order: the digest needs what another thread reads just now.
            let mut skipped = vec![0; gap as usize];
            fetch(offset - gap, &mut skipped)?;
            progress.take_at(offset - gap, &skipped);
        }
        progress.take_at(offset, buf);
        let result = self.compare_at_end(file, state, &mut progress);
        result.inspect_err(|err| self.fail(file, state, &progress, err))
    }

    /// Reads a file that is in chunks from where it was read in order to its end, and verifies it. Other threads can
    /// read it meanwhile.
    pub(super) fn verify_chunks(
        &self,
        file: usize,
        state: &State,
        keep: bool,
    ) -> Result<(), ReadError> {
        let count = self.chunk_count(file);
        while !state.is_whole() {
            let mut progress = lock(&state.progress);
            state.fine()?;
            // The last chunk comes again if the end of the stream could not be read behind it.
            let from = progress.chunks().min(count.saturating_sub(1));
            let wanted = from..count.min(from.saturating_add(STRIDE));
            self.decode(
                file,
                state,
                &mut progress,
                wanted,
                Purpose::Verify { keep },
                &mut |_, _| {},
            )?;
        }
        state.fine()
    }

    /// Hands chunks to `sink`, from the cache or decoded. The caller holds the file's lock.
    pub(super) fn decode(
        &self,
        file: usize,
        state: &State,
        progress: &mut Progress,
        wanted: Range<u64>,
        purpose: Purpose,
        sink: Sink,
    ) -> Result<(), ReadError> {
        let result = self.decode_range(file, state, progress, wanted, purpose, sink);
        result.inspect_err(|err| {
            if !err.may_pass() {
                self.fail(file, state, progress, err);
            }
        })
    }

    fn decode_range(
        &self,
        file: usize,
        state: &State,
        progress: &mut Progress,
        wanted: Range<u64>,
        purpose: Purpose,
        sink: Sink,
    ) -> Result<(), ReadError> {
        let count = self.chunk_count(file);
        if count == 0 {
            let mut cursor = self.open(file, 0)?; // an empty file: its stream has an end, too
            return self.finish(file, state, progress, &mut cursor);
        }
        let keep = !matches!(purpose, Purpose::Verify { keep: false });
        let mut cursor: Option<Cursor> = None;
        for index in wanted {
            let found = lock(&self.cache).get((file, index));
            if purpose == Purpose::Read {
                let counter = if found.is_some() {
                    &self.counters.cache_hits
                } else {
                    &self.counters.cache_misses
                };
                counter.add(1);
            }
            if let Some(chunk) = found {
                sink(index, &chunk);
                continue;
            }
            let current = match cursor.take() {
                Some(own) => cursor.insert(self.moved(file, index, own)?),
                None => cursor.insert(self.cursor_before(file, index)?),
            };
            while current.next < index {
                // What was only decoded on the way must not drive out what was asked for.
                let near = index - current.next <= self.cache_bytes / 8 / CHUNK;
                self.step(file, state, progress, current, keep && near)?;
            }
            sink(index, &self.step(file, state, progress, current, keep)?);
        }
        let Some(mut cursor) = cursor else { return Ok(()) };
        if cursor.next + 1 == count && !state.is_whole() {
            // So near the end, the digest is worth the rest. What cannot be read now need not be.
            match self.step(file, state, progress, &mut cursor, keep) {
                Err(err) if err.may_pass() => return Ok(()),
                other => other?,
            };
        }
        if cursor.next < count && self.is_stream(file) {
            let gone = lock(&self.cursors).put(cursor);
            drop(gone); // without the lock
        }
        Ok(())
    }

    /// Decodes a cursor's next chunk.
    fn step(
        &self,
        file: usize,
        state: &State,
        progress: &mut Progress,
        cursor: &mut Cursor,
        keep: bool,
    ) -> Result<Arc<Buffer>, ReadError> {
        let map = &self.files[file];
        let index = cursor.next;
        let start = index * CHUNK;
        let length = CHUNK.min(map.size - start);
        let mut bytes = self.buffers.take(length as usize);
        cursor.decoder.fill(&mut bytes).map_err(|err| ReadError::decode(Place::of(map), err))?;
        let chunk = Arc::new(bytes);
        cursor.next += 1;
        self.counters.decoded_bytes.add(length);
        // The digest of a file's last chunk is wanted at once.
        let helper = (cursor.next < self.chunk_count(file)).then_some(&self.digests);
        match progress.take_chunk(index, &chunk, helper) {
            Some(Chunk::New) => {}
            Some(Chunk::SeenBefore) => self.counters.decoded_again_bytes.add(length),
            None => return Err(ReadError::Changed { place: Place::of(map), offset: start }),
        }
        if cursor.next == self.chunk_count(file) {
            self.finish(file, state, progress, cursor)?;
        }
        if keep {
            lock(&self.cache).insert((file, index), Arc::clone(&chunk));
        }
        Ok(chunk)
    }

    /// After the last byte: the stream must end, and the digest must match.
    fn finish(
        &self,
        file: usize,
        state: &State,
        progress: &mut Progress,
        cursor: &mut Cursor,
    ) -> Result<(), ReadError> {
        cursor.decoder.finish().map_err(|err| ReadError::decode(self.place(file), err))?;
        self.compare_at_end(file, state, progress)
    }

    fn compare_at_end(
        &self,
        file: usize,
        state: &State,
        progress: &mut Progress,
    ) -> Result<(), ReadError> {
        let map = &self.files[file];
        if progress.position() == map.size && !state.is_whole() {
            if progress.compare(map)? {
                self.counters.files_verified.add(1);
            }
            state.whole.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Marks a file as damaged for good.
    fn fail(&self, file: usize, state: &State, progress: &Progress, err: &ReadError) {
        if state.failed.set(err.clone()).is_ok() {
            tracing::error!("{err}");
            self.counters.files_damaged.add(1);
            let gone = lock(&self.cursors).take_all(file);
            drop(gone); // without the lock
            let mut cache = lock(&self.cache);
            (0..progress.chunks()).for_each(|index| cache.remove((file, index)));
        }
    }

    fn is_stream(&self, file: usize) -> bool {
        !matches!(self.files[file].content, Content::Stored { codec: Codec::None, .. })
    }

    /// Returns the cursor that reaches a chunk with the least decoding.
    fn cursor_before(&self, file: usize, index: u64) -> Result<Cursor, ReadError> {
        let idle = lock(&self.cursors).take(file, index);
        idle.map_or_else(|| self.open(file, index), Ok)
    }

    /// Returns `own`, or a new cursor at `index` where that costs nothing.
    fn moved(&self, file: usize, index: u64, own: Cursor) -> Result<Cursor, ReadError> {
        if own.next == index || self.is_stream(file) { Ok(own) } else { self.open(file, index) }
    }

    /// Opens a file: a stream at its start, an uncompressed file at chunk `index`.
    fn open(&self, file: usize, index: u64) -> Result<Cursor, ReadError> {
        let map = &self.files[file];
        let Content::Stored { object, offset, length, codec } = map.content else {
            let reason = "it is not stored".to_owned();
            return Err(ReadError::Damaged { place: Place::of(map), reason });
        };
        let next = if codec == Codec::None { index } else { 0 };
        if codec != Codec::None {
            self.counters.streams_opened.add(1);
        }
        let stored = offset + next * CHUNK..offset + length;
        let range = StoredRange::new(
            Arc::clone(&self.store),
            Arc::clone(&self.counters),
            object,
            stored,
            codec,
        );
        let decoder = Decoder::new(codec, range, map.size - next * CHUNK);
        let mut decoder = decoder.map_err(|err| ReadError::decode(Place::of(map), err))?;
        if map.digest.is_some() {
            decoder = decoder.without_content_checksum();
        }
        Ok(Cursor::new(file, next, decoder))
    }
}
