//! Making sure of what has arrived: sync, read back, compare, write down, and only then say so.
//!
//! A thread of its own takes whatever has piled up while it was busy with the last batch: large files are synced every few
//! chunks, many small files together.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::Advice;

use super::journal::{Journal, NewChunk};
use super::message::ToSource;
use super::queue::{Popped, Queue};
use crate::chunk::{CHUNK, PIECE, Summing};
use crate::directory::Directory;
use crate::error::MoveError;

/// Most tasks of one batch; each may keep a descriptor open.
const BATCH: usize = 128;
/// Most tasks that wait for the next batch.
const WAITING: usize = 256;
/// Most threads that sync and read back the files of a batch: they wait for the disk nearly all the time.
const THREADS: usize = 16;
/// Where the first file of a batch takes no longer, there is nothing to wait for, and threads would only cost.
const NO_WAIT: Duration = Duration::from_micros(300);

/// Where the files of one round go.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) round: u32,
    pub(super) directory: Directory,
    journal: Mutex<Journal>,
    /// Nothing more of this round is wanted.
    failed: AtomicBool,
}

impl Site {
    pub(super) fn new(round: u32, directory: Directory, journal: Journal) -> Self {
        Self { round, directory, journal: Mutex::new(journal), failed: AtomicBool::new(false) }
    }

    /// Locks the journal; may wait for a sync.
    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

/// A file that has arrived in part.
#[derive(Debug, Clone)]
pub(super) struct FileAt {
    pub(super) site: Arc<Site>,
    pub(super) number: u32,
    pub(super) name: Arc<str>,
    pub(super) handle: Arc<File>,
}

/// Something to make sure of.
pub(super) enum Task {
    /// A chunk was written; `begins` is the inode of a file that is new with it.
    Chunk { file: FileAt, chunk: NewChunk, begins: Option<u64> },
    /// All chunks of a file were written.
    Finish { file: FileAt },
    /// Tells when everything before it is done.
    Barrier(mpsc::SyncSender<()>),
}

/// The tasks that wait.
pub(super) struct Tasks(Queue<Task>);

impl Tasks {
    pub(super) fn new() -> Self {
        Self(Queue::new(WAITING))
    }

    pub(super) fn add(&self, task: Task) {
        let _ = self.0.push(task, Duration::MAX); // closed only when nobody adds any more
    }

    /// Waits until all tasks added before are done.
    pub(super) fn drain(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        self.add(Task::Barrier(done));
        let _ = wait.recv(); // an error means that nobody is left to do them
    }

    /// Lets [`settle`] return when no task is left.
    pub(super) fn close(&self) {
        self.0.close();
    }
}

/// Does tasks until they are closed; `tell` sends what is to be said about them.
pub(super) fn settle(tasks: &Tasks, tell: &(dyn Fn(ToSource) + Sync)) {
    let mut barrier = None;
    loop {
        let mut batch = Batch::default();
        let mut limit = Duration::MAX;
        while batch.tasks < BATCH && barrier.is_none() {
            match tasks.0.pop(limit) {
                Popped::Item(Task::Barrier(done)) => barrier = Some(done),
                Popped::Item(task) => batch.add(task),
                Popped::Nothing => break,
                Popped::Closed if batch.tasks == 0 => return,
                Popped::Closed => break,
            }
            limit = Duration::ZERO;
        }
        batch.settle(tell);
        if let Some(done) = barrier.take() {
            let _ = done.send(()); // whoever waited may have gone
        }
    }
}

#[derive(Default)]
struct Batch {
    tasks: usize,
    units: Vec<Unit>,
}

/// What there is to do for one file.
struct Unit {
    file: FileAt,
    begins: Option<u64>,
    chunks: Vec<NewChunk>,
    finish: bool,
}

impl Batch {
    fn add(&mut self, task: Task) {
        self.tasks += 1;
        let (file, chunk, begins, finish) = match task {
            Task::Chunk { file, chunk, begins } => (file, Some(chunk), begins, false),
            Task::Finish { file } => (file, None, None, true),
            Task::Barrier(_) => return,
        };
        let same = |unit: &&mut Unit| {
            unit.file.number == file.number && Arc::ptr_eq(&unit.file.site, &file.site)
        };
        match self.units.last_mut().filter(same) {
            Some(unit) => {
                unit.chunks.extend(chunk);
                unit.finish |= finish;
            }
            None => {
                let chunks = chunk.into_iter().collect();
                self.units.push(Unit { file, begins, chunks, finish });
            }
        }
    }

    fn settle(self, tell: &(dyn Fn(ToSource) + Sync)) {
        let Some(site) = self.units.first().map(|unit| unit.file.site.clone()) else { return };
        if site.has_failed() {
            return;
        }
        let mut failed = None;
        let mut secured = Vec::new();
        for (unit, secure) in self.units.iter().zip(self.secure()) {
            match secure {
                Ok(()) => secured.push(unit),
                Err(err) => failed = failed.or(Some(err)),
            }
        }
        match write_down(&site, &secured) {
            Ok(()) => secured.iter().for_each(|unit| tell(unit.news())),
            Err(err) => failed = failed.or(Some(err)),
        }
        if let Some(err) = failed {
            site.failed.store(true, Ordering::Release);
            tell(ToSource::Failed { round: site.round, error: (&err).into() });
        }
    }

    /// Syncs all files and reads back what is new, several at a time: a disk flushes once for all that wait for it.
    fn secure(&self) -> Vec<Result<(), MoveError>> {
        let begun = Instant::now();
        let first = self.units.first().map(|unit| unit.secure(&mut Vec::new()));
        let threads = if begun.elapsed() > NO_WAIT { THREADS } else { 1 };
        let next = AtomicUsize::new(1);
        let work = || {
            let (mut buffer, mut found) = (Vec::new(), Vec::new());
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(unit) = self.units.get(at) else { return found };
                found.push((at, unit.secure(&mut buffer)));
            }
        };
        let mut found = thread::scope(|scope| {
            let others = self.units.len().min(threads).saturating_sub(1);
            let others: Vec<_> = (0..others).map(|_| scope.spawn(work)).collect();
            let mut found = work();
            for thread in others {
                found.extend(thread.join().expect("reading a file back does not panic"));
            }
            found
        });
        found.sort_by_key(|(at, _)| *at);
        first.into_iter().chain(found.into_iter().map(|(_, result)| result)).collect()
    }
}

impl Unit {
    fn secure(&self, buffer: &mut Vec<u8>) -> Result<(), MoveError> {
        let FileAt { site, name, handle, .. } = &self.file;
        let fail = |action, err| site.directory.error(action, name, err);
        handle.sync_data().map_err(|err| fail("sync", err))?;
        for chunk in &self.chunks {
            let offset = chunk.number * CHUNK as u64;
            // Where the file system keeps the pages (tmpfs has no other place), reading back still proves the write.
            let length = std::num::NonZeroU64::new(u64::from(chunk.length));
            let _ = rustix::fs::fadvise(handle, offset, length, Advice::DontNeed);
            let mut summing = Summing::new();
            for from in (0..chunk.length as usize).step_by(PIECE) {
                buffer.resize((chunk.length as usize - from).min(PIECE), 0);
                let read = handle.read_exact_at(buffer, offset + from as u64);
                read.map_err(|err| fail("read back", err))?;
                summing.update(buffer);
            }
            if summing.sum() != chunk.sum {
                return Err(MoveError::Differs { path: site.directory.join(name) });
            }
        }
        Ok(())
    }

    /// What the source is told once all of it is secured and written down.
    fn news(&self) -> ToSource {
        let (round, file) = (self.file.site.round, self.file.number);
        match self.chunks.last() {
            Some(last) if !self.finish => {
                ToSource::Confirmed { round, file, chunks: last.number + 1 }
            }
            _ => ToSource::Delivered { round, file },
        }
    }
}

fn write_down(site: &Site, secured: &[&Unit]) -> Result<(), MoveError> {
    if secured.iter().all(|unit| unit.chunks.is_empty()) {
        return Ok(());
    }
    let mut journal = site.journal();
    for unit in secured {
        if let Some(inode) = unit.begins {
            journal.file(&unit.file.name, inode)?;
        }
        for chunk in &unit.chunks {
            journal.chunk(&unit.file.name, chunk)?;
        }
    }
    journal.write()
}
