//! The file system as the kernel asks for it: operations by number and name, answered with values
//! or error numbers.

use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::SystemTime;

use rustix::io::Errno;

pub use crate::names::RenameMode;

use crate::content::MAX_FILE_SIZE;
use crate::faults::{Failure, Fault, FaultKind, Faults, OnFault};
use crate::file::{Data, Facts, Failed, File, Storage, locked};
use crate::layer::Layer;
use crate::links::{Changed, Refusal, RefusedLink, shown};
use crate::names::{Attributes, Body, Listed, Names};
use crate::reserve::kept_free;
use crate::tree::{self, Tree, TreeError};
use crate::waiting::{Reply, Target, Waiting, Work};
use crate::{Ino, Lower, Owner, Result};

/// What `setattr` changes; `None` leaves as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Permission bits; setuid and setgid are dropped.
    pub mode: Option<u16>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// When the content changed.
    pub mtime: Option<SystemTime>,
    /// When content or attributes changed.
    pub ctime: Option<SystemTime>,
}

/// Space on the file system that holds the write layer, without what the write layer leaves free ([`kept_free`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes per unit of the block counts.
    pub block_size: u64,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks for other users than root.
    pub available: u64,
    /// All inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

/// A tree, a lower and a write layer, as one file system that can be written.
///
/// All operations may be called from any thread. Whatever gives a number to the kernel takes a
/// reference to it, to be given back by [`FileSystem::forget`]: a file without names lives as long
/// as its references.
pub struct FileSystem {
    names: RwLock<Names>,
    storage: Storage,
    owner: Owner,
    faults: Faults,
    aborted: AtomicBool,
    waiting: Waiting,
    /// Held while names are made from inside, until the kernel knows them.
    on_new_name: Mutex<Option<OnNewName>>,
}

/// Called with a directory and a name in it that was made from inside: the kernel may remember that there is none.
pub(crate) type OnNewName = Box<dyn Fn(Ino, &[u8]) + Send + Sync>;

/// Permission bits that a file can have: never setuid or setgid.
const PERMISSIONS: u16 = 0o1777;

impl FileSystem {
    /// Puts `tree` over `lower`, with writes going to `layer_directory`.
    ///
    /// The directory is made (0700) if absent, must be for this file system alone (a lock file in
    /// it sees to that), and must not be touched while this lives. Layer files of a killed process
    /// are removed from it. Raises the limit of open files of the process. `on_fault` is called
    /// with each fault that is kept, from any thread, and must not wait.
    ///
    /// # Errors
    /// If the directory cannot be opened or is in use.
    pub fn new(
        tree: Tree,
        lower: Arc<dyn Lower>,
        layer_directory: &Path,
        owner: Owner,
        on_fault: OnFault,
    ) -> io::Result<Self> {
        let layer = Arc::new(Layer::open(layer_directory)?);
        Ok(Self {
            names: RwLock::new(tree.into_names()),
            storage: Storage { lower, layer, poison: OnceLock::new() },
            owner,
            faults: Faults::new(on_fault),
            aborted: AtomicBool::new(false),
            waiting: Waiting::default(),
            on_new_name: Mutex::default(),
        })
    }

    /// Allows a symbolic link at `path` (relative, below the root) to `destination`, beside those that the tree has or that
    /// were provided for `path` before. Every other link is refused, and is a fault ([`FaultKind::Link`]).
    ///
    /// # Errors
    /// [`TreeError::BadPath`] if the path is not plain.
    pub fn provide_link(
        &self,
        path: &str,
        destination: &[u8],
    ) -> std::result::Result<(), TreeError> {
        if !tree::is_plain(path.as_bytes()) {
            return Err(TreeError::BadPath { path: path.into() });
        }
        locked(self.names.write()).links.provide(path.as_bytes(), destination);
        Ok(())
    }

    /// Makes the directory `path` (relative, below the root) and those above it, as far as they are absent, as if the tree
    /// had held them. The file system may be mounted and in use: the kernel is told.
    ///
    /// # Errors
    /// [`TreeError`] if the path is not plain, or if it or a part of it is there and not a directory.
    pub fn provide_directory(&self, path: &str) -> std::result::Result<(), TreeError> {
        let tell = locked(self.on_new_name.lock());
        let made = locked(self.names.write())
            .make_directories(path.as_bytes(), fresh(tree::DIRECTORY_MODE))
            .map_err(|errno| match errno {
                Errno::NOTDIR => TreeError::BelowFile { path: path.into() },
                _ => TreeError::BadPath { path: path.into() },
            })?;
        if let Some(tell) = &*tell {
            // Without the names' lock: the kernel may wait for an answer that needs it.
            made.iter().for_each(|(parent, name)| tell(*parent, name));
        }
        Ok(())
    }

    /// Sets who is told of names that are made from inside.
    pub(crate) fn on_new_name(&self, tell: Option<OnNewName>) {
        *locked(self.on_new_name.lock()) = tell;
    }

    /// Starts `threads` threads that wait for the lower; they end with [`FileSystem::abort`].
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start_workers(self: &Arc<Self>, threads: usize) -> io::Result<()> {
        for number in 0..threads.max(1) {
            let this = self.clone();
            std::thread::Builder::new()
                .name(format!("lower-{number}"))
                .spawn(move || this.work())?;
        }
        Ok(())
    }

    /// Returns who owns everything.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns the directory of the write layer.
    pub fn layer_directory(&self) -> &Path {
        self.storage.layer.path()
    }

    /// Returns the bytes the write layer holds, whole pages; what was only reserved is not counted.
    pub fn layer_bytes(&self) -> u64 {
        self.storage.layer.bytes()
    }

    /// Returns the faults so far, the oldest first; only the first few hundred are kept.
    pub fn faults(&self) -> Vec<Fault> {
        self.faults.kept()
    }

    /// Returns how many faults there were.
    pub fn fault_count(&self) -> u64 {
        self.faults.count()
    }

    /// Returns whether a write was lost: from then on every read and write answers EIO.
    pub fn poisoned(&self) -> bool {
        self.storage.poison.get().is_some()
    }

    /// Answers all waiting and all later reads and writes with EIO, at once and for good.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        self.answer_waiting();
    }

    fn answer_waiting(&self) {
        for (target, reply) in self.waiting.close() {
            let refused = self.refused(target.offset);
            let errno = self.given_out(&target, refused);
            match reply {
                Reply::Read(reply) => reply(Err(errno)),
                Reply::Done(reply) => reply(Err(errno)),
            }
        }
    }

    /// Says why nothing is answered any more.
    fn refused(&self, offset: u64) -> Failed {
        let (kind, error) = match self.storage.poison.get() {
            Some(cause) => (FaultKind::Poisoned, format!("refused after a lost write: {cause}")),
            None => (FaultKind::Aborted, "refused because the mount was told to end".to_owned()),
        };
        Failed::Fault(Failure { kind, offset, error })
    }

    /// Records a fault before it is given out, and returns the error number for the caller.
    fn given_out(&self, target: &Target, failed: Failed) -> Errno {
        let (errno, failure) = match failed {
            Failed::Refused(errno) => return errno,
            Failed::Fault(failure) => (Errno::IO, failure),
            Failed::NoSpace(errno, failure) => (errno, failure),
        };
        let path = locked(self.names.read()).path(target.ino);
        let Failure { kind, offset, error } = failure;
        match kind {
            FaultKind::Aborted => tracing::debug!(path, offset, "{error}"),
            _ => tracing::error!(path, offset, ?kind, "{error}"),
        }
        self.faults.record(Fault { path, offset, kind, error });
        if kind == FaultKind::Write {
            self.answer_waiting();
        }
        errno
    }

    // Names.

    /// Finds `name` in `parent`; takes a reference.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attributes> {
        let names = locked(self.names.read());
        let found = names.find(names.child(parent, name)?, 1)?;
        drop(names);
        Ok(found.attributes())
    }

    /// Gives back references.
    pub fn forget(&self, ino: Ino, references: u64) {
        let unused = locked(self.names.read()).forget(ino, references);
        if unused {
            self.remove_unused(ino);
        }
    }

    fn remove_unused(&self, ino: Ino) {
        let gone = locked(self.names.write()).remove_unused(ino);
        drop(gone); // removes the layer file: not under the lock
    }

    /// Returns the attributes of `ino`.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes> {
        let found = locked(self.names.read()).find(ino, 0)?;
        Ok(found.attributes())
    }

    /// Changes attributes and returns them.
    pub fn setattr(&self, ino: Ino, change: Change) -> Result<Attributes> {
        let now = SystemTime::now();
        let apply = |facts: &mut Facts| {
            facts.mode = change.mode.map_or(facts.mode, |mode| mode & PERMISSIONS);
            facts.mtime = change.mtime.unwrap_or(facts.mtime);
            facts.ctime = change.ctime.unwrap_or(now);
        };
        match self.target(ino, 0) {
            Ok(target) => {
                if let Some(size) = change.size {
                    let done = self
                        .open_for_work(size)
                        .and_then(|()| target.file.truncate(&self.storage, size));
                    done.map_err(|failed| self.given_out(&target, failed))?;
                }
                target.file.change(apply);
            }
            Err(errno) if change.size.is_some() => return Err(errno),
            Err(_) => match &mut locked(self.names.write()).node_mut(ino)?.body {
                Body::Directory(directory) => apply(&mut directory.facts),
                Body::Symlink { facts, .. } => apply(facts),
                Body::File(_) => {}
            },
        }
        self.getattr(ino)
    }

    /// Makes an empty regular file; takes a reference.
    pub fn create(&self, parent: Ino, name: &[u8], mode: u16) -> Result<Attributes> {
        let facts = fresh(mode);
        self.make(|names| {
            names.make(parent, name, |ino| Body::File(Arc::new(File::new(ino, facts))))
        })
    }

    /// Makes a directory; takes a reference.
    pub fn mkdir(&self, parent: Ino, name: &[u8], mode: u16) -> Result<Attributes> {
        self.make(|names| names.make_directory(parent, name, fresh(mode)))
    }

    /// Makes a symbolic link; takes a reference.
    ///
    /// # Errors
    /// EPERM, and a fault, unless the link was provided ([`FileSystem::provide_link`]).
    pub fn symlink(&self, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attributes> {
        self.make(|names| names.make_symlink(parent, name, target, fresh(0o777)))
    }

    /// Gives `ino` one more name; takes a reference.
    ///
    /// # Errors
    /// EPERM, and a fault, for a symbolic link.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attributes> {
        self.make(|names| names.link(ino, parent, name).map(|()| ino))
    }

    fn make<E: Into<Refusal>>(
        &self,
        make: impl FnOnce(&mut Names) -> std::result::Result<Ino, E>,
    ) -> Result<Attributes> {
        let made: Changed<_> = {
            let mut names = locked(self.names.write());
            make(&mut names).map_err(Into::into).and_then(|ino| Ok(names.find(ino, 1)?))
        };
        match made {
            Ok(found) => Ok(found.attributes()),
            Err(refusal) => Err(self.told(refusal)),
        }
    }

    /// Records a link that was refused, and returns the error number for the caller.
    fn told(&self, refusal: Refusal) -> Errno {
        let errno = refusal.errno();
        if let Refusal::Link(RefusedLink { path, destination }) = refusal {
            let (path, destination) = (shown(&path), shown(&destination));
            let error = format!(
                "it would lead to `{destination}`, which this mount does not provide there"
            );
            let fault = Fault { path: path.clone(), offset: 0, kind: FaultKind::Link, error };
            if self.faults.record(fault) {
                tracing::error!(path, destination, "a symbolic link was refused");
            }
        }
        errno
    }

    /// Returns where a symbolic link points.
    pub fn readlink(&self, ino: Ino) -> Result<Arc<[u8]>> {
        match &locked(self.names.read()).node(ino)?.body {
            Body::Symlink { target, .. } => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Removes a name that is no directory.
    pub fn unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let ino = locked(self.names.write()).unlink(parent, name)?;
        self.remove_unused(ino);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let ino = locked(self.names.write()).remove_directory(parent, name)?;
        self.remove_unused(ino);
        Ok(())
    }

    /// Renames `from` (directory and name) to `to`.
    ///
    /// # Errors
    /// Among others EPERM, and a fault, if a symbolic link would get a path for which it was not provided.
    pub fn rename(&self, from: (Ino, &[u8]), to: (Ino, &[u8]), mode: RenameMode) -> Result<()> {
        let renamed = locked(self.names.write()).rename(from, to, mode);
        if let Some(ino) = renamed.map_err(|refusal| self.told(refusal))? {
            self.remove_unused(ino);
        }
        Ok(())
    }

    /// Returns up to `limit` entries of a directory after `cookie` (0 at first), `.` and `..` among
    /// them.
    ///
    /// Entries that are there from the first call to the last come exactly once.
    pub fn list(&self, ino: Ino, cookie: u64, limit: usize) -> Result<Vec<Listed>> {
        locked(self.names.read()).list(ino, cookie, limit)
    }

    /// Takes a reference to `ino` and returns its attributes.
    pub fn refer(&self, ino: Ino) -> Result<Attributes> {
        let found = locked(self.names.read()).find(ino, 1)?;
        Ok(found.attributes())
    }

    /// Returns the space for writes.
    pub fn statfs(&self) -> Result<Space> {
        let stat = self.storage.layer.space()?;
        let kept = kept_free(stat.f_blocks.saturating_mul(stat.f_frsize)) / stat.f_frsize.max(1);
        Ok(Space {
            block_size: stat.f_frsize,
            blocks: stat.f_blocks,
            free: stat.f_bfree.saturating_sub(kept),
            available: stat.f_bavail.saturating_sub(kept),
            files: stat.f_files,
            files_free: stat.f_ffree,
        })
    }

    // Content.

    /// Reads up to `length` bytes from `offset`; fewer only at the end of the file.
    ///
    /// `reply` is called once: here if the answer is at hand, else by a worker
    /// ([`FileSystem::start_workers`]).
    pub fn read(
        &self,
        ino: Ino,
        offset: u64,
        length: usize,
        reply: impl for<'a> FnOnce(Result<&'a [u8]>) + Send + 'static,
    ) {
        let target = match self.target(ino, offset) {
            Ok(target) => target,
            Err(errno) => return reply(Err(errno)),
        };
        with_buffer(length, |buf| {
            let tried = self
                .open_for_work(offset)
                .and_then(|()| target.file.try_read(&self.storage, offset, buf));
            match tried {
                Ok(Some(filled)) => reply(Ok(&buf[..filled])),
                Ok(None) => self.wait(target, Work::Read { length }, Reply::Read(Box::new(reply))),
                Err(failed) => reply(Err(self.given_out(&target, failed))),
            }
        });
    }

    /// Writes `bytes` at `offset`; the file grows as needed. `reply` as in [`FileSystem::read`].
    pub fn write(
        &self,
        ino: Ino,
        offset: u64,
        bytes: &[u8],
        reply: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        self.put(ino, offset, Data::Bytes(bytes), || Work::Write { bytes: bytes.to_vec() }, reply);
    }

    /// Makes `length` bytes from `offset` on zeros; if `grow`, the file grows to their end. `reply`
    /// as in [`FileSystem::read`].
    pub fn zero(
        &self,
        ino: Ino,
        offset: u64,
        length: u64,
        grow: bool,
        reply: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        self.put(ino, offset, Data::Zeros { length, grow }, || Work::Zero { length, grow }, reply);
    }

    fn put(
        &self,
        ino: Ino,
        offset: u64,
        data: Data<'_>,
        work: impl FnOnce() -> Work,
        reply: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let target = match self.target(ino, offset) {
            Ok(target) => target,
            Err(errno) => return reply(Err(errno)),
        };
        match self
            .open_for_work(offset)
            .and_then(|()| target.file.try_put(&self.storage, offset, data))
        {
            Ok(Some(())) => reply(Ok(())),
            Ok(None) => self.wait(target, work(), Reply::Done(Box::new(reply))),
            Err(failed) => reply(Err(self.given_out(&target, failed))),
        }
    }

    /// Reserves room for `length` bytes from `offset` on, as far as they are not the lower's; if
    /// `grow`, the file grows to their end.
    ///
    /// # Errors
    /// ENOSPC and EDQUOT are given as they are, and recorded: the caller knows, nothing is lost.
    pub fn allocate(&self, ino: Ino, offset: u64, length: u64, grow: bool) -> Result<()> {
        let target = self.target(ino, offset)?;
        let done = self
            .open_for_work(offset)
            .and_then(|()| target.file.allocate(&self.storage, offset, length, grow));
        done.map_err(|failed| self.given_out(&target, failed))
    }

    /// Answers an fsync: flushes nothing (the layer does not outlive the process), tells of a lost
    /// write.
    pub fn fsync(&self, ino: Ino) -> Result<()> {
        let target = match self.target(ino, 0) {
            Err(Errno::ISDIR) => return Ok(()),
            other => other?,
        };
        let done = self.open_for_work(0).and_then(|()| target.file.sync(&self.storage));
        done.map_err(|failed| self.given_out(&target, failed))
    }

    fn target(&self, ino: Ino, offset: u64) -> Result<Target> {
        let file = locked(self.names.read()).file(ino)?;
        Ok(Target { ino, file, offset })
    }

    fn open_for_work(&self, offset: u64) -> std::result::Result<(), Failed> {
        if self.aborted.load(Ordering::SeqCst) { Err(self.refused(offset)) } else { Ok(()) }
    }

    fn wait(&self, target: Target, work: Work, reply: Reply) {
        if let Err(reply) = self.waiting.push(target.clone(), work, reply) {
            let errno = self.given_out(&target, self.refused(target.offset));
            match reply {
                Reply::Read(reply) => reply(Err(errno)),
                Reply::Done(reply) => reply(Err(errno)),
            }
        }
    }

    /// What a worker does until the queue is closed.
    fn work(&self) {
        let mut buf = Vec::new();
        while let Some(taken) = self.waiting.take() {
            let Target { file, offset, .. } = &taken.target;
            let writes = matches!(taken.work, Work::Write { .. });
            let done = catch_unwind(AssertUnwindSafe(|| match taken.work {
                Work::Read { length } => {
                    buf.resize(length, 0);
                    file.read_waiting(&self.storage, *offset, &mut buf)
                }
                Work::Write { bytes } => {
                    file.put_waiting(&self.storage, *offset, Data::Bytes(&bytes)).map(|()| 0)
                }
                Work::Zero { length, grow } => file
                    .put_waiting(&self.storage, *offset, Data::Zeros { length, grow })
                    .map(|()| 0),
            }));
            let done = done.unwrap_or_else(|_| {
                let error = "the reader of the backup panicked";
                Err(if writes {
                    self.storage.lost_write(*offset, &io::Error::other(error))
                } else {
                    Failed::Fault(Failure {
                        kind: FaultKind::Read,
                        offset: *offset,
                        error: error.to_owned(),
                    })
                })
            });
            let reply = self.waiting.reply_of(taken.ticket);
            let lost =
                matches!(&done, Err(Failed::Fault(failure)) if failure.kind == FaultKind::Write);
            let done = match done {
                Err(failed) if reply.is_some() || lost => {
                    Err(self.given_out(&taken.target, failed))
                }
                Err(_) => Err(Errno::IO), // answered before
                Ok(filled) => Ok(filled),
            };
            drop(taken.target); // whoever gets the reply may remove the file, and expects its space back
            match reply {
                Some(Reply::Read(reply)) => reply(done.map(|filled| &buf[..filled])),
                Some(Reply::Done(reply)) => reply(done.map(drop)),
                None => {}
            }
        }
    }
}

fn fresh(mode: u16) -> Facts {
    let now = SystemTime::now();
    Facts { mode: mode & PERMISSIONS, mtime: now, ctime: now }
}

/// Calls `work` with `length` bytes that hold anything; kept by the thread for the next time. They begin with a page of
/// memory: else the kernel copies an answer in twice as many pieces, taking a lock for each (`fuse_copy_fill`).
fn with_buffer(length: usize, work: impl FnOnce(&mut [u8])) {
    const PAGE: usize = 4096;
    thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    BUFFER.with(|buffer| match buffer.try_borrow_mut() {
        Ok(mut buffer) => {
            if buffer.len() < length + PAGE {
                buffer.resize(length + PAGE, 0);
            }
            let start = buffer.as_ptr().align_offset(PAGE).min(PAGE);
            work(&mut buffer[start..start + length]);
        }
        Err(_) => work(&mut vec![0; length]), // a reply that reads again
    });
}

const _: () = assert!(MAX_FILE_SIZE < i64::MAX as u64);

#[cfg(test)]
mod tests {
    use super::with_buffer;

    #[test]
    fn buffers_begin_with_a_page() {
        for length in [1, 8192, 131_072, 100, 1 << 20] {
            with_buffer(length, |buffer| {
                assert_eq!((buffer.len(), buffer.as_ptr() as usize % 4096), (length, 0));
                with_buffer(length, |another| assert_eq!(another.len(), length));
            });
        }
    }
}
