//! The write layer's directory: one sparse file per written file of the mount, named by its number.
//!
//! Descriptors are kept open up to a limit and opened again by name when needed. A layer file is
//! removed as soon as its [`LayerFile`] is dropped. Nothing here survives the process: which pages
//! count is known in memory only, so nothing is ever synced.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, StatVfs};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Ino;
use crate::file::locked;
use crate::reserve::Disk;

const SUFFIX: &str = ".pages";
const LOCK: &str = "lock";
/// Descriptors left to the rest of the process.
const DESCRIPTORS_LEFT: u64 = 256;
const MOST_DESCRIPTORS: u64 = 16384;

/// The directory and its open descriptors.
pub(crate) struct Layer {
    path: PathBuf,
    directory: OwnedFd,
    /// Held locked: two mounts on one directory would write into each other's files.
    _lock: OwnedFd,
    descriptors: Mutex<Descriptors>,
    bytes: AtomicU64,
    /// Bytes that may still be taken before the file system's free space is looked at again.
    granted: AtomicU64,
}

impl Layer {
    /// Opens the directory `path` (made with mode 0700 if absent) for this process alone, removes
    /// layer files that a killed process left in it, and raises the process's limit of open files.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::with_descriptors(path, descriptor_limit())
    }

    fn with_descriptors(path: &Path, limit: usize) -> io::Result<Self> {
        let named = |err: Errno| {
            io::Error::new(
                io::Error::from(err).kind(),
                format!("write layer `{}`: {err}", path.display()),
            )
        };
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(err) => return Err(named(err)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(named)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock =
            rustix::fs::openat(&directory, LOCK, flags, Mode::RUSR | Mode::WUSR).map_err(named)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(
            |err| match err {
                Errno::WOULDBLOCK => {
                    let text =
                        format!("write layer `{}` is in use by another mount", path.display());
                    io::Error::new(io::ErrorKind::ResourceBusy, text)
                }
                err => named(err),
            },
        )?;
        for entry in rustix::fs::Dir::read_from(&directory).map_err(named)? {
            let entry = entry.map_err(named)?;
            if entry.file_name().to_bytes().ends_with(SUFFIX.as_bytes()) {
                rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty())
                    .map_err(named)?;
            }
        }
        let descriptors = Mutex::new(Descriptors::new(limit));
        Ok(Self {
            path: path.to_path_buf(),
            directory,
            _lock: lock,
            descriptors,
            bytes: AtomicU64::new(0),
            granted: AtomicU64::new(0),
        })
    }

    /// Takes `bytes` of free space, before they are written.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] if they are among those that stay free (see `reserve`).
    pub(crate) fn take(&self, bytes: u64) -> io::Result<()> {
        let less = |granted: u64| granted.checked_sub(bytes);
        if self.granted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Ok(());
        }
        let space = self.space()?;
        let disk = Disk {
            total: space.f_blocks.saturating_mul(space.f_frsize),
            free: space.f_bavail.saturating_mul(space.f_frsize),
        };
        let granted =
            disk.grant(bytes).map_err(|err| io::Error::new(io::ErrorKind::StorageFull, err))?;
        self.granted.store(granted - bytes, Ordering::Relaxed); // of several who look at once the last one's counts
        Ok(())
    }

    /// Returns the directory as it was given.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns free space and size of the file system the directory lies on.
    pub(crate) fn space(&self) -> rustix::io::Result<StatVfs> {
        rustix::fs::fstatvfs(&self.directory)
    }

    /// Returns the bytes held for all files, whole pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns `error` with the directory's name.
    pub(crate) fn named(&self, error: &io::Error) -> String {
        format!("write layer `{}`: {error}", self.path.display())
    }

    fn descriptor(&self, id: Ino, create: bool) -> io::Result<Arc<File>> {
        let mut descriptors = locked(self.descriptors.lock());
        if let Some(file) = descriptors.get(id) {
            return Ok(file);
        }
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if create {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        let open = || rustix::fs::openat(&self.directory, name(id), flags, Mode::RUSR | Mode::WUSR);
        let opened = match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                descriptors.evict();
                open()
            }
            other => other,
        };
        let file = Arc::new(File::from(opened?));
        descriptors.put(id, file.clone());
        Ok(file)
    }
}

fn name(id: Ino) -> String {
    format!("{id:x}{SUFFIX}")
}

fn descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let soft = if raised.is_ok() { limit.maximum } else { limit.current };
    let available = soft.unwrap_or(u64::MAX).saturating_sub(DESCRIPTORS_LEFT) / 2;
    available.clamp(16, MOST_DESCRIPTORS) as usize
}

/// Open descriptors, the least recently used of which are closed when there are too many.
struct Descriptors {
    limit: usize,
    clock: u64,
    open: HashMap<Ino, (Arc<File>, u64)>,
}

impl Descriptors {
    fn new(limit: usize) -> Self {
        Self { limit, clock: 0, open: HashMap::new() }
    }

    fn get(&mut self, id: Ino) -> Option<Arc<File>> {
        self.clock += 1;
        let (file, used) = self.open.get_mut(&id)?;
        *used = self.clock;
        Some(file.clone())
    }

    fn put(&mut self, id: Ino, file: Arc<File>) {
        if self.open.len() >= self.limit {
            self.evict();
        }
        self.open.insert(id, (file, self.clock));
    }

    /// Closes the quarter that was not used for longest.
    fn evict(&mut self) {
        let mut used: Vec<u64> = self.open.values().map(|(_, used)| *used).collect();
        if !used.is_empty() {
            let middle = used.len() / 4;
            let (_, &mut oldest, _) = used.select_nth_unstable(middle);
            self.open.retain(|_, (_, used)| *used > oldest);
        }
    }
}

/// The layer file of one file of the mount; removed when dropped.
///
/// Bytes that were never written, or were truncated or zeroed, read as zeros.
pub(crate) struct LayerFile {
    layer: Arc<Layer>,
    id: Ino,
    /// Where the stored bytes end: a read that comes short below it is an error.
    length: u64,
    /// What this file adds to the layer's total.
    counted: u64,
}

impl LayerFile {
    /// Makes the layer file of `id`.
    pub(crate) fn create(layer: &Arc<Layer>, id: Ino) -> io::Result<Self> {
        layer.descriptor(id, true)?;
        Ok(Self { layer: layer.clone(), id, length: 0, counted: 0 })
    }

    fn descriptor(&self) -> io::Result<Arc<File>> {
        self.layer.descriptor(self.id, false)
    }

    /// Fills `buf` from byte `offset`.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let stored = self.length.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (stored, zeros) = buf.split_at_mut(stored);
        zeros.fill(0);
        if stored.is_empty() { Ok(()) } else { self.descriptor()?.read_exact_at(stored, offset) }
    }

    /// Stores `bytes` at `offset`; what they need was taken ([`Layer::take`]).
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !bytes.is_empty() {
            self.descriptor()?.write_all_at(bytes, offset)?;
            self.length = self.length.max(offset + bytes.len() as u64);
        }
        Ok(())
    }

    /// Makes the bytes of `range` zeros and gives their space back where the file system can.
    pub(crate) fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.length);
        if range.start >= end {
            return Ok(());
        }
        let file = self.descriptor()?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&file, punch, range.start, end - range.start) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = [0; 65536];
                let mut at = range.start;
                while at < end {
                    let part = (end - at).min(zeros.len() as u64);
                    file.write_all_at(&zeros[..part as usize], at)?;
                    at += part;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Drops all bytes from `length` on.
    pub(crate) fn truncate(&mut self, length: u64) -> io::Result<()> {
        let length = length.min(self.length);
        rustix::fs::ftruncate(self.descriptor()?, length)?; // also at the same length: frees what was reserved
        self.length = length;
        Ok(())
    }

    /// Reserves space for `range`, which was taken ([`Layer::take`]); a file system that cannot is no error.
    pub(crate) fn reserve(&self, range: &Range<u64>) -> io::Result<()> {
        let length = range.end.saturating_sub(range.start);
        if length == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(
            self.descriptor()?,
            FallocateFlags::KEEP_SIZE,
            range.start,
            length,
        ) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Tells how many bytes this file now holds, for [`Layer::bytes`].
    pub(crate) fn count(&mut self, bytes: u64) {
        self.layer.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.layer.bytes.fetch_sub(self.counted, Ordering::Relaxed);
        self.counted = bytes;
    }
}

impl Drop for LayerFile {
    fn drop(&mut self) {
        self.count(0);
        locked(self.layer.descriptors.lock()).open.remove(&self.id);
        if let Err(err) =
            rustix::fs::unlinkat(&self.layer.directory, name(self.id), AtFlags::empty())
        {
            tracing::warn!("remove `{}` in {}: {err}", name(self.id), self.layer.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(path: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn more_files_than_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let layer = Arc::new(Layer::with_descriptors(directory.path(), 16).unwrap());
        let mut files: Vec<LayerFile> =
            (0..100).map(|id| LayerFile::create(&layer, id).unwrap()).collect();
        for round in 0..3 {
            for (id, file) in files.iter_mut().enumerate() {
                file.write_at(round * 5, format!("{id:05}").as_bytes()).unwrap();
            }
        }
        for (id, file) in files.iter().enumerate() {
            let mut buf = [1; 20];
            file.read_at(0, &mut buf).unwrap();
            assert_eq!(buf[..15], *format!("{id:05}").repeat(3).as_bytes());
            assert_eq!(buf[15..], [0; 5], "zeros after the stored bytes");
        }
        assert!(locked(layer.descriptors.lock()).open.len() <= 16);
        drop(files);
        assert_eq!(names_in(directory.path()), [LOCK]);
        assert!(locked(layer.descriptors.lock()).open.is_empty());
    }

    #[test]
    fn a_layer_file_that_got_shorter_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let layer = Arc::new(Layer::open(directory.path()).unwrap());
        let mut file = LayerFile::create(&layer, 5).unwrap();
        file.write_at(0, &[7; 9000]).unwrap();
        std::fs::File::options()
            .write(true)
            .open(directory.path().join("5.pages"))
            .unwrap()
            .set_len(100)
            .unwrap();
        assert_eq!(
            file.read_at(0, &mut [0; 200]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn one_mount_per_directory_and_no_leftovers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        let layer = Layer::open(&path).unwrap();
        let refused = Layer::open(&path).err().unwrap();
        assert!(refused.to_string().contains("in use"), "{refused}");
        std::fs::write(path.join("ff.pages"), b"left by a killed process").unwrap();
        drop(layer);
        let _layer = Layer::open(&path).unwrap();
        assert_eq!(names_in(&path), [LOCK]);
    }
}
