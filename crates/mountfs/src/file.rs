//! One regular file: its content, its layer file and its times under one lock.
//!
//! Each operation comes twice: `try_…` answers at once or returns `None`, and `…_waiting` reads the
//! lower without holding the lock and then looks again (see `content` for why that is right).

use std::io;
use std::ops::Range;
use std::sync::{Arc, LockResult, OnceLock, RwLock};
use std::time::SystemTime;

use rustix::io::Errno;

use crate::content::{Content, MAX_FILE_SIZE, Source};
use crate::faults::{Failure, FaultKind};
use crate::layer::{Layer, LayerFile};
use crate::{Ino, Lower};

/// Returns what a lock holds, also after a panic elsewhere: all state here is changed last, after
/// what can fail.
pub(crate) fn locked<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What every file reads from and writes to.
pub(crate) struct Storage {
    pub(crate) lower: Arc<dyn Lower>,
    pub(crate) layer: Arc<Layer>,
    /// Set by the first write that could not be kept: its cause.
    pub(crate) poison: OnceLock<String>,
}

impl Storage {
    fn check_poison(&self, offset: u64) -> Result<(), Failed> {
        match self.poison.get() {
            None => Ok(()),
            Some(cause) => {
                let error = format!("refused after a lost write: {cause}");
                Err(Failed::Fault(Failure { kind: FaultKind::Poisoned, offset, error }))
            }
        }
    }

    /// Poisons the mount: a write that the kernel takes for done cannot be kept.
    pub(crate) fn lost_write(&self, offset: u64, error: &io::Error) -> Failed {
        let error = self.layer.named(error);
        let _ = self.poison.set(error.clone()); // the first cause stays
        Failed::Fault(Failure { kind: FaultKind::Write, offset, error })
    }

    fn unread(&self, offset: u64, error: &io::Error) -> Failed {
        let error = self.layer.named(error);
        Failed::Fault(Failure { kind: FaultKind::Read, offset, error })
    }
}

/// Why an operation on a file gives an error.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The caller asked for something impossible.
    Refused(Errno),
    /// The mount failed; the caller gets EIO.
    Fault(Failure),
    /// The mount had no room for a reservation; the caller gets this error.
    NoSpace(Errno, Failure),
}

impl Failed {
    /// Makes a failure to store bytes a lost write: with the kernel's writeback cache whoever wrote
    /// them was told that all is well. Zeros are stored while their caller waits, so he learns of
    /// the failure.
    fn of_put(self, storage: &Storage, offset: u64, data: Data<'_>) -> Self {
        match (data, self) {
            (Data::Bytes(_), Self::Refused(errno)) => storage.lost_write(offset, &errno.into()),
            (Data::Bytes(_), Self::Fault(failure)) if failure.kind == FaultKind::Read => {
                let text = format!("the rest of a written page is missing: {}", failure.error);
                storage.lost_write(offset, &io::Error::other(text))
            }
            (_, other) => other,
        }
    }
}

/// What is to be stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Data<'a> {
    Bytes(&'a [u8]),
    /// So many zeros; `grow` lets the file grow to their end, else they stop at the end of the
    /// file.
    Zeros {
        length: u64,
        grow: bool,
    },
}

impl Data<'_> {
    fn range(self, offset: u64) -> Result<Range<u64>, Failed> {
        match self {
            Self::Bytes(bytes) => range_of(offset, bytes.len() as u64),
            Self::Zeros { length, .. } => range_of(offset, length),
        }
    }
}

/// A regular file.
pub(crate) struct File {
    ino: Ino,
    lower: Option<usize>,
    state: RwLock<State>,
}

struct State {
    content: Content,
    layer: Option<LayerFile>,
    facts: Facts,
}

/// What `stat` shows besides the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) mode: u16,
    pub(crate) mtime: SystemTime,
    pub(crate) ctime: SystemTime,
}

/// The rest of a write's first and last page, from the lower.
#[derive(Default)]
struct CopiedUp {
    parts: [Vec<u8>; 2],
}

impl File {
    /// Makes an empty file.
    pub(crate) fn new(ino: Ino, facts: Facts) -> Self {
        let state = State { content: Content::default(), layer: None, facts };
        Self { ino, lower: None, state: RwLock::new(state) }
    }

    /// Makes a file whose first `size` bytes are those of the lower's file `lower`.
    pub(crate) fn of_lower(ino: Ino, lower: usize, size: u64, facts: Facts) -> Self {
        let state = State { content: Content::of_lower(size), layer: None, facts };
        Self { ino, lower: Some(lower), state: RwLock::new(state) }
    }

    /// Returns size and facts.
    pub(crate) fn stat(&self) -> (u64, Facts) {
        let state = locked(self.state.read());
        (state.content.size(), state.facts)
    }

    /// Changes what `stat` shows.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut locked(self.state.write()).facts);
    }

    /// Reads from `offset` on into `buf` and returns how many bytes there were before the end of
    /// the file.
    pub(crate) fn try_read(
        &self,
        storage: &Storage,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<usize>, Failed> {
        let state = locked(self.state.read());
        storage.check_poison(offset)?;
        state.read(storage, offset, buf, |range, part| self.try_lower(storage, &range, part))
    }

    /// Like [`File::try_read`], but waits for the lower.
    pub(crate) fn read_waiting(
        &self,
        storage: &Storage,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, Failed> {
        let wanted = offset..offset.saturating_add(buf.len() as u64);
        let missing: Vec<Range<u64>> = {
            let state = locked(self.state.read());
            let sources = state.content.sources(wanted);
            sources.filter(|(_, source)| *source == Source::Lower).map(|(range, _)| range).collect()
        };
        for range in missing {
            let part = &mut buf[(range.start - offset) as usize..(range.end - offset) as usize];
            self.wait_for_lower(storage, &range, part)?;
        }
        let state = locked(self.state.read());
        storage.check_poison(offset)?;
        let filled = state.read(storage, offset, buf, |_, _| Ok(Some(())))?; // what still comes from the lower is there
        Ok(filled.unwrap_or(0))
    }

    /// Stores `data` at `offset`. A failure to store bytes, for whatever reason, is a lost write.
    pub(crate) fn try_put(
        &self,
        storage: &Storage,
        offset: u64,
        data: Data<'_>,
    ) -> Result<Option<()>, Failed> {
        self.try_to_store(storage, offset, data)
            .map_err(|failed| failed.of_put(storage, offset, data))
    }

    fn try_to_store(
        &self,
        storage: &Storage,
        offset: u64,
        data: Data<'_>,
    ) -> Result<Option<()>, Failed> {
        let range = data.range(offset)?;
        let mut state = locked(self.state.write());
        storage.check_poison(offset)?;
        let mut above = CopiedUp::default();
        for (part, needed) in
            above.parts.iter_mut().zip(state.content.copy_up(&state.hiding(&range, data)))
        {
            part.resize((needed.end - needed.start) as usize, 0);
            if !part.is_empty() && self.try_lower(storage, &needed, part)?.is_none() {
                return Ok(None);
            }
        }
        self.store(storage, &mut state, &range, data, &above).map(Some)
    }

    /// Like [`File::try_put`], but waits for the lower.
    pub(crate) fn put_waiting(
        &self,
        storage: &Storage,
        offset: u64,
        data: Data<'_>,
    ) -> Result<(), Failed> {
        self.store_waiting(storage, offset, data)
            .map_err(|failed| failed.of_put(storage, offset, data))
    }

    fn store_waiting(&self, storage: &Storage, offset: u64, data: Data<'_>) -> Result<(), Failed> {
        let range = data.range(offset)?;
        let needed = {
            let state = locked(self.state.read());
            state.content.copy_up(&state.hiding(&range, data))
        };
        let mut above = CopiedUp::default();
        for (part, needed) in above.parts.iter_mut().zip(needed) {
            part.resize((needed.end - needed.start) as usize, 0);
            if !part.is_empty() {
                self.wait_for_lower(storage, &needed, part)?;
            }
        }
        let mut state = locked(self.state.write());
        storage.check_poison(offset)?;
        self.store(storage, &mut state, &range, data, &above)
    }

    /// Stores `data`, and the rest of its first and last page as far as it is still needed.
    ///
    /// What is needed now is at most what was needed when `above` was read: pages only come to the
    /// layer, and the lower's end only sinks.
    fn store(
        &self,
        storage: &Storage,
        state: &mut State,
        range: &Range<u64>,
        data: Data<'_>,
        above: &CopiedUp,
    ) -> Result<(), Failed> {
        let hiding = state.hiding(range, data);
        let needed = state.content.copy_up(&hiding);
        let stored = (|| {
            storage.layer.take(match data {
                Data::Bytes(_) => state.content.new_bytes(&hiding),
                Data::Zeros { .. } => above.parts.iter().map(|part| part.len() as u64).sum(),
            })?;
            if !hiding.is_empty() {
                let layer = self.layer_file(storage, &mut state.layer)?;
                for (part, needed) in above.parts.iter().zip(needed) {
                    let part = part
                        .get(..(needed.end - needed.start) as usize)
                        .ok_or(io::ErrorKind::InvalidInput)?;
                    layer.write_at(needed.start, part)?;
                }
            }
            match (data, &mut state.layer) {
                (Data::Bytes(bytes), Some(layer)) => layer.write_at(range.start, bytes),
                (Data::Zeros { .. }, Some(layer)) => layer.zero(range),
                (_, None) => Ok(()),
            }
        })();
        stored.map_err(|err| storage.lost_write(range.start, &err))?;
        state.content.stored(&hiding);
        if let Data::Zeros { grow: true, .. } = data {
            state.content.grown_to(range.end);
        }
        state.changed();
        Ok(())
    }

    /// Reserves room in the layer for `length` bytes from `offset` on; `grow` lets the file grow to
    /// their end.
    pub(crate) fn allocate(
        &self,
        storage: &Storage,
        offset: u64,
        length: u64,
        grow: bool,
    ) -> Result<(), Failed> {
        let range = range_of(offset, length)?;
        let mut state = locked(self.state.write());
        storage.check_poison(offset)?;
        let wanted = range.start.max(state.content.lower_limit())..range.end;
        if !wanted.is_empty() {
            let reserved = storage
                .layer
                .take(state.content.new_bytes(&wanted))
                .and_then(|()| self.layer_file(storage, &mut state.layer))
                .and_then(|layer| layer.reserve(&wanted));
            let no_space = |errno, err| {
                let error = storage.layer.named(&err);
                Failed::NoSpace(errno, Failure { kind: FaultKind::NoSpace, offset, error })
            };
            reserved.map_err(|err| match err.kind() {
                io::ErrorKind::StorageFull => no_space(Errno::NOSPC, err),
                io::ErrorKind::QuotaExceeded => no_space(Errno::DQUOT, err),
                _ => storage.lost_write(offset, &err),
            })?;
            state.content.reserved(&wanted);
        }
        if grow {
            state.content.grown_to(range.end);
            state.changed();
        }
        Ok(())
    }

    /// Sets the file's size; what is cut off is gone, what is added is zeros. Never needs the
    /// lower.
    pub(crate) fn truncate(&self, storage: &Storage, size: u64) -> Result<(), Failed> {
        range_of(size, 0)?;
        let mut state = locked(self.state.write());
        storage.check_poison(size)?;
        if size < state.content.size()
            && let Some(layer) = &mut state.layer
        {
            layer.truncate(size).map_err(|err| storage.lost_write(size, &err))?;
        }
        state.content.truncated(size);
        state.changed();
        Ok(())
    }

    /// Answers an fsync: nothing is to be flushed, but a lost write must be told.
    pub(crate) fn sync(&self, storage: &Storage) -> Result<(), Failed> {
        storage.check_poison(0)
    }

    fn layer_file<'a>(
        &self,
        storage: &Storage,
        layer: &'a mut Option<LayerFile>,
    ) -> io::Result<&'a mut LayerFile> {
        if layer.is_none() {
            *layer = Some(LayerFile::create(&storage.layer, self.ino)?);
        }
        layer.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn try_lower(
        &self,
        storage: &Storage,
        range: &Range<u64>,
        buf: &mut [u8],
    ) -> Result<Option<()>, Failed> {
        let number = self.lower_number(range)?;
        let answer = storage.lower.try_read_at(number, range.start, buf);
        answer.transpose().map_err(|err| lower_failed(range, &err))
    }

    fn wait_for_lower(
        &self,
        storage: &Storage,
        range: &Range<u64>,
        buf: &mut [u8],
    ) -> Result<(), Failed> {
        let number = self.lower_number(range)?;
        storage.lower.read_at(number, range.start, buf).map_err(|err| lower_failed(range, &err))
    }

    fn lower_number(&self, range: &Range<u64>) -> Result<usize, Failed> {
        self.lower.ok_or_else(|| lower_failed(range, &io::ErrorKind::NotFound.into()))
    }
}

impl State {
    /// Returns the part of `range` that `data` must cover in the layer: all of it, but zeros only
    /// as far as the lower could show through.
    fn hiding(&self, range: &Range<u64>, data: Data<'_>) -> Range<u64> {
        match data {
            Data::Bytes(_) => range.clone(),
            Data::Zeros { .. } => {
                let end = range.end.min(self.content.size()).min(self.content.zeros_from());
                range.start..end.max(range.start)
            }
        }
    }

    /// Fills `buf` from `offset` on; bytes of the lower come from `lower`, which may say that they
    /// must be waited for.
    fn read(
        &self,
        storage: &Storage,
        offset: u64,
        buf: &mut [u8],
        lower: impl Fn(Range<u64>, &mut [u8]) -> Result<Option<()>, Failed>,
    ) -> Result<Option<usize>, Failed> {
        let mut filled = 0;
        for (range, source) in self.content.sources(offset..offset.saturating_add(buf.len() as u64))
        {
            let end = (range.end - offset) as usize;
            let part = &mut buf[filled..end];
            match source {
                Source::Zeros => part.fill(0),
                Source::Layer => {
                    let Some(layer) = &self.layer else {
                        return Err(storage.unread(range.start, &io::ErrorKind::NotFound.into()));
                    };
                    layer
                        .read_at(range.start, part)
                        .map_err(|err| storage.unread(range.start, &err))?;
                }
                Source::Lower => {
                    if lower(range, part)?.is_none() {
                        return Ok(None);
                    }
                }
            }
            filled = end;
        }
        Ok(Some(filled))
    }

    fn changed(&mut self) {
        let now = SystemTime::now();
        (self.facts.mtime, self.facts.ctime) = (now, now);
        if let Some(layer) = &mut self.layer {
            layer.count(self.content.layer_bytes());
        }
    }
}

fn range_of(offset: u64, length: u64) -> Result<Range<u64>, Failed> {
    let end = offset.checked_add(length).filter(|end| *end <= MAX_FILE_SIZE);
    end.map(|end| offset..end).ok_or(Failed::Refused(Errno::FBIG))
}

fn lower_failed(range: &Range<u64>, error: &io::Error) -> Failed {
    let error = format!("read {} bytes of the backup: {error}", range.end - range.start);
    Failed::Fault(Failure { kind: FaultKind::Read, offset: range.start, error })
}
