//! Which files of a dump are finished while pg_dump still runs.
//!
//! A data file is finished when it is closed after writing: a worker of `pg_dump -Fd` opens each once. The
//! kernel tells of that through inotify. Where it lost events, or where files were there before the watch,
//! the directory is listed and each file is asked for open writers by a read lease, which the kernel grants
//! only without any (fcntl(2), "Leases"). What cannot be told that way is simply left to the end.
//!
//! Finished does not mean final: that is decided by pg_dump's exit code.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::directory::Directory;
use crate::error::MoveError;

/// Watches the directory of one pg_dump and yields each finished data file once.
#[derive(Debug)]
pub struct FinishedFiles {
    dump_dir: PathBuf,
    inotify: OwnedFd,
    /// The dump directory's own watch, once pg_dump has made it.
    watch: Option<i32>,
    yielded: HashSet<String>,
}

impl FinishedFiles {
    /// Starts watching `dump_dir`, which need not exist yet; its parent must.
    ///
    /// # Errors
    /// [`MoveError::Source`], such as when the user's inotify instances are used up.
    pub fn watch(dump_dir: &Path) -> Result<Self, MoveError> {
        let fail = |err: Errno| MoveError::source("watch", dump_dir, err);
        let parent = dump_dir.parent().ok_or_else(|| fail(Errno::INVAL))?;
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(fail)?;
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, parent, flags).map_err(fail)?;
        Ok(Self { dump_dir: dump_dir.into(), inotify, watch: None, yielded: HashSet::new() })
    }

    /// Returns data files that have been finished since the last call, sorted; waits for the first one at
    /// most `limit`. Never `toc.dat` nor a list of large objects: these come with [`FinishedFiles::rest`].
    ///
    /// # Errors
    /// [`MoveError::Source`].
    pub fn next(&mut self, limit: Duration) -> Result<Vec<String>, MoveError> {
        let dump_dir = self.dump_dir.clone();
        let end = Instant::now() + limit;
        loop {
            let mut found = BTreeSet::new();
            self.drain(&mut found).map_err(|err| MoveError::source("watch", &dump_dir, err))?;
            found.retain(|name| is_data_file(name) && !self.yielded.contains(name));
            let left = end.saturating_duration_since(Instant::now());
            if !found.is_empty() || left.is_zero() {
                self.yielded.extend(found.iter().cloned());
                return Ok(found.into_iter().collect());
            }
            let left = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(MoveError::source("watch", &dump_dir, err)),
            }
        }
    }

    /// Returns all files that [`FinishedFiles::next`] has not yielded, in the order to deliver them: data,
    /// then what lists large objects, then `toc.dat`. To be called after pg_dump has succeeded.
    ///
    /// # Errors
    /// [`MoveError::Source`].
    pub fn rest(self) -> Result<Vec<String>, MoveError> {
        let list = Directory::open_source(&self.dump_dir)?.names();
        let mut names =
            list.map_err(|err| MoveError::source("list", &self.dump_dir, io::Error::other(err)))?;
        names.retain(|name| !self.yielded.contains(name));
        names.sort_by_key(|name| (name == "toc.dat", !is_data_file(name)));
        Ok(names)
    }

    /// Reads all events there are; names of finished files go to `found`.
    fn drain(&mut self, found: &mut BTreeSet<String>) -> Result<(), Errno> {
        let mut rescan = self.attach()?;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(Errno::WOULDBLOCK) => break,
                Err(Errno::INTR) => continue,
                Err(err) => return Err(err),
            };
            let flags = event.events();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                rescan = true;
            } else if self.watch == Some(event.wd())
                && flags.intersects(ReadFlags::CLOSE_WRITE | ReadFlags::MOVED_TO)
            {
                found.extend(
                    event.file_name().and_then(|name| name.to_str().ok()).map(str::to_owned),
                );
            }
        }
        if self.watch.is_none() {
            rescan |= self.attach()?; // an event of the parent may have told that it is there now
        }
        if rescan { self.rescan(found) } else { Ok(()) }
    }

    /// Watches the dump directory if it is there and not yet watched; returns whether it began to.
    fn attach(&mut self) -> Result<bool, Errno> {
        if self.watch.is_some() {
            return Ok(false);
        }
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::ONLYDIR
            | WatchFlags::DONT_FOLLOW;
        match inotify::add_watch(&self.inotify, &self.dump_dir, flags) {
            Ok(watch) => self.watch = Some(watch),
            Err(Errno::NOENT) => return Ok(false),
            Err(err) => return Err(err),
        }
        Ok(true)
    }

    /// Adds all files that nobody holds open for writing.
    fn rescan(&self, found: &mut BTreeSet<String>) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.dump_dir, flags, Mode::empty())?;
        for entry in rustix::fs::Dir::read_from(&dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if is_data_file(name)
                && !self.yielded.contains(name)
                && has_no_writer(dir.as_fd(), name)
            {
                found.insert(name.into());
            }
        }
        Ok(())
    }
}

/// Returns whether pg_dump writes `name` once and has finished it when it closes it: a table's data
/// (`3001.dat`, `3001.dat.gz` …) or a large object (`blob_16400.dat`).
fn is_data_file(name: &str) -> bool {
    let base = name.strip_prefix("blob_").unwrap_or(name);
    base.starts_with(|char: char| char.is_ascii_digit()) && base.contains(".dat")
}

/// `fcntl` command that chooses the signal of a broken lease (linux/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Returns whether it is certain that the file has been written and is open for writing nowhere.
fn has_no_writer(dir: BorrowedFd, name: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::openat(dir, OsStr::from_bytes(name.as_bytes()), flags, Mode::empty())
    else {
        return false;
    };
    let file = File::from(fd);
    // Between being created and being counted as written to, a file is empty; finished ones never are.
    if !file.metadata().is_ok_and(|found| found.is_file() && found.len() > 0) {
        return false;
    }
    let fcntl = |command, argument: libc::c_int| {
        // SAFETY: fcntl with an open descriptor and an integer argument touches no memory of ours.
        unsafe { libc::fcntl(file.as_raw_fd(), command, argument) == 0 }
    };
    // A writer that comes while the lease lasts makes the kernel signal us: with one that is ignored by default.
    let granted = fcntl(F_SETSIG, libc::SIGURG) && fcntl(libc::F_SETLEASE, libc::F_RDLCK);
    granted && fcntl(libc::F_SETLEASE, libc::F_UNLCK)
}
