//! Copying files so that what lies on the target's disk is known to equal the dump.
//!
//! A file is read once and hashed on the way, written, synced, dropped from the page cache and read back.
//! Many files go in groups: all of a group are written before the first is synced, so that the file system
//! commits them together (20,000 small tables would otherwise cost 20,000 commits).

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::fs::{Advice, Mode};
use sha2::{Digest, Sha256};

use crate::directory::Directory;
use crate::error::MoveError;
use crate::source::Source;

/// Bytes per read and write: large enough that calls cost nothing, small enough to stay in a core's cache.
const BUFFER: usize = 256 << 10;
/// Most files of one group; each keeps a descriptor open until the group is synced.
const GROUP_FILES: usize = 128;
/// A group ends when it holds this many bytes, so that they are still being written back when it is synced.
const GROUP_BYTES: u64 = 64 << 20;
/// Most threads that sync and read back the files of a group: they wait for the disk nearly all the time.
const SYNC_THREADS: usize = 16;

/// What to do with a file that an earlier attempt left at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// Replace it. For `toc.dat` and `globals.sql`, which belong to one attempt only.
    Never,
    /// Keep it if its length and SHA-256 equal the source's.
    IfEqual,
}

/// One file to deliver.
#[derive(Debug, Clone, Copy)]
pub struct CopyFile<'a> {
    /// Its plain name, in the dump's directory and in the target's.
    pub name: &'a str,
    /// What to do with one that is there.
    pub reuse: Reuse,
}

/// A file that lies on the target's disk, read back and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    /// Its length.
    pub bytes: u64,
    /// Its checksum.
    pub sha256: [u8; 32],
    /// Whether an earlier attempt's file was kept.
    pub reused: bool,
}

/// Told the bytes that were copied since the last call; `Break` stops the copy.
pub type Progress<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

/// Delivers one file; see [`copy_all_verified`].
///
/// # Errors
/// As [`copy_all_verified`].
pub fn copy_verified(
    file: CopyFile,
    source: &Directory,
    target: &Directory,
    progress: &mut Progress,
) -> Result<Delivered, MoveError> {
    let mut delivered = None;
    copy_all_verified(&[file], source, target, progress, &mut |_, done| delivered = Some(done))?;
    Ok(delivered.expect("success reports every file"))
}

/// Delivers `files` from `source` into `target`, mode 0600, each verified by reading it back; `done` gets each file's index
/// once it is. The names become durable with the directory's own sync ([`crate::TargetDirectory::publish_database`]).
///
/// # Errors
/// The first failure ends it. Files already reported stay, all others that this call made are removed.
pub fn copy_all_verified(
    files: &[CopyFile],
    source: &Directory,
    target: &Directory,
    progress: &mut Progress,
    done: &mut dyn FnMut(usize, Delivered),
) -> Result<(), MoveError> {
    let mut buffer = vec![0; BUFFER];
    let mut from = 0;
    while from < files.len() {
        let mut group = Group { source, target, written: Vec::new() };
        let mut bytes = 0;
        while from + group.written.len() < files.len()
            && group.written.len() < GROUP_FILES
            && bytes < GROUP_BYTES
        {
            let written = group.write(files[from + group.written.len()], &mut buffer, progress)?;
            bytes += written;
        }
        let count = group.written.len();
        for (at, on_disk) in group.read_back().into_iter().enumerate() {
            done(from + at, group.verify(at, on_disk, &mut buffer, progress)?);
        }
        from += count;
    }
    Ok(())
}

/// Returns length and SHA-256 of what can be read from `file`, from its current position on.
///
/// # Errors
/// The read's.
pub fn sha256_of(file: &mut impl Read) -> io::Result<(u64, [u8; 32])> {
    hash_rest(file, &mut vec![0; BUFFER])
}

/// Length and SHA-256.
type Content = (u64, [u8; 32]);

/// Files at the target that are not yet verified. What we wrote and did not verify is removed when this is dropped.
struct Group<'a> {
    source: &'a Directory,
    target: &'a Directory,
    written: Vec<Written<'a>>,
}

struct Written<'a> {
    name: &'a str,
    /// `None` before it is created, and once it is verified.
    file: Option<File>,
    /// What the source holds.
    content: Content,
    /// Whether it was there before and is only believed to be equal.
    reused: bool,
}

impl<'a> Group<'a> {
    /// Writes one file, or takes the one that is there, and returns the bytes that are to be synced.
    fn write(
        &mut self,
        file: CopyFile<'a>,
        buffer: &mut [u8],
        progress: &mut Progress,
    ) -> Result<u64, MoveError> {
        let CopyFile { name, reuse } = file;
        let source = Source::open(self.source, name)?;
        if reuse == Reuse::IfEqual
            && let Some(there) = self.target.find_file(name)?
        {
            let found = there.metadata().map_err(|err| self.target.error("stat", name, err))?;
            if found.len() == source.length() {
                let content = source.hash(buffer)?;
                let (file, reused) = (Some(there), true);
                self.written.push(Written { name, file, content, reused });
                return Ok(0);
            }
        }
        let at = self.written.len();
        let content = (0, [0; 32]);
        self.written.push(Written { name, file: None, content, reused: false });
        self.write_new(at, &source, buffer, progress)
    }

    /// Writes the file `at`, which replaces any that is there, and returns its length.
    fn write_new(
        &mut self,
        at: usize,
        source: &Source,
        buffer: &mut [u8],
        progress: &mut Progress,
    ) -> Result<u64, MoveError> {
        let written = &mut self.written[at];
        (written.file, written.reused) = (None, false);
        // Refuses what is no file, such as a directory or a link.
        if self.target.find_file(written.name)?.is_some() {
            self.target.remove_file(written.name)?;
        }
        let new = written.file.insert(self.target.create_file(written.name)?);
        written.content = source.copy(new, self.target, written.name, buffer, progress)?;
        // Starts writing back what is dirty, without waiting.
        let _ = rustix::fs::fadvise(new.as_fd(), 0, None, Advice::DontNeed);
        Ok(written.content.0)
    }

    /// Syncs all files and reads them back, several at a time: a disk flushes once for all that wait for it.
    fn read_back(&self) -> Vec<Result<Content, MoveError>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let (mut buffer, mut found) = (vec![0; BUFFER], Vec::new());
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(Written { name, file, .. }) = self.written.get(at) else { return found };
                let file = file.as_ref().expect("written before it is read back");
                found.push((at, read_back(file, self.target, name, &mut buffer)));
            }
        };
        let mut found = thread::scope(|threads| {
            let others = self.written.len().min(SYNC_THREADS).saturating_sub(1);
            let others: Vec<_> = (0..others).map(|_| threads.spawn(work)).collect();
            let mut found = work();
            for thread in others {
                found.extend(thread.join().expect("reading a file back does not panic"));
            }
            found
        });
        found.sort_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, result)| result).collect()
    }

    /// Judges what was read back; a file that was there before and differs, or cannot be read, is written anew.
    fn verify(
        &mut self,
        at: usize,
        on_disk: Result<Content, MoveError>,
        buffer: &mut [u8],
        progress: &mut Progress,
    ) -> Result<Delivered, MoveError> {
        let Written { name, content, reused, .. } = self.written[at];
        let on_disk = match on_disk {
            Ok(found) if reused && found == content => {
                let file = self.written[at].file.as_ref().expect("it was read back");
                rustix::fs::fchmod(file, Mode::from_raw_mode(0o600))
                    .map_err(|err| self.target.error("change mode of", name, err))?;
                report(progress, content.0, || self.target.join(name))?;
                found
            }
            _ if reused => {
                self.write_new(at, &Source::open(self.source, name)?, buffer, progress)?;
                let file = self.written[at].file.as_ref().expect("just written");
                read_back(file, self.target, name, buffer)?
            }
            found => found?,
        };
        let Written { file, content, reused, .. } = &mut self.written[at];
        if on_disk != *content {
            return Err(MoveError::Differs { path: self.target.join(name) });
        }
        *file = None;
        Ok(Delivered { bytes: content.0, sha256: content.1, reused: *reused })
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        for written in
            self.written.iter().filter(|written| written.file.is_some() && !written.reused)
        {
            if let Err(err) = self.target.remove_file(written.name) {
                tracing::warn!("partial file stays behind: {err}");
            }
        }
    }
}

impl Source {
    fn hash(&self, buffer: &mut [u8]) -> Result<Content, MoveError> {
        let mut file = &self.file;
        let found = hash_rest(&mut file, buffer).and_then(|found| file.rewind().map(|()| found));
        let found = found.map_err(|err| MoveError::source("read", &self.path, err))?;
        self.unchanged(found.0)?;
        Ok(found)
    }

    fn copy(
        &self,
        mut to: &File,
        target: &Directory,
        name: &str,
        buffer: &mut [u8],
        progress: &mut Progress,
    ) -> Result<Content, MoveError> {
        let mut from = &self.file;
        let mut hash = Sha256::new();
        let mut bytes = 0;
        loop {
            let count = read_some(&mut from, buffer)
                .map_err(|err| MoveError::source("read", &self.path, err))?;
            if count == 0 || bytes > self.length() {
                break; // one that grows would never end
            }
            hash.update(&buffer[..count]);
            to.write_all(&buffer[..count]).map_err(|err| target.error("write", name, err))?;
            bytes += count as u64;
            report(progress, count as u64, || target.join(name))?;
        }
        self.unchanged(bytes)?;
        Ok((bytes, hash.finalize().into()))
    }
}

/// Syncs `file`, drops it from the page cache and returns length and SHA-256 of what the disk holds.
fn read_back(
    file: &File,
    target: &Directory,
    name: &str,
    buffer: &mut [u8],
) -> Result<Content, MoveError> {
    file.sync_all().map_err(|err| target.error("sync", name, err))?;
    // Where the file system keeps the pages (tmpfs has no other place), reading back still proves the write.
    let _ = rustix::fs::fadvise(file.as_fd(), 0, None, Advice::DontNeed);
    let mut file = file;
    file.rewind()
        .and_then(|()| hash_rest(&mut file, buffer))
        .map_err(|err| target.error("read back", name, err))
}

fn hash_rest(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<Content> {
    let mut hash = Sha256::new();
    let mut bytes = 0;
    loop {
        match read_some(file, buffer)? {
            0 => return Ok((bytes, hash.finalize().into())),
            count => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
}

fn read_some(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(buffer) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn report(
    progress: &mut Progress,
    bytes: u64,
    path: impl FnOnce() -> PathBuf,
) -> Result<(), MoveError> {
    match progress(bytes) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(MoveError::Stopped { path: path() }),
    }
}
