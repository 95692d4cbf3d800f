//! A directory opened once; everything else is opened beneath it by the kernel (`openat2`), so neither `..` nor a
//! symlink in a repository leads anywhere else.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// How often an `openat2` is repeated that a rename elsewhere disturbed (`EAGAIN`, openat2(2)).
const DISTURBED_LIMIT: u32 = 64;

/// A directory that was opened once; the only way to what lies beneath it.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

/// What a directory entry is; symlinks are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, socket or device.
    Other,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Last part of its path; not always UTF-8.
    pub name: OsString,
    /// What it is.
    pub kind: Kind,
    /// Bytes, of a regular file.
    pub size: u64,
    /// Last modification, seconds since 1970-01-01 UTC.
    pub modified: i64,
}

impl Root {
    /// Opens the directory `path`; symlinks in `path` itself are followed, once.
    ///
    /// # Errors
    /// `Unsupported` if the kernel lacks `openat2` (Linux 5.6); else as the kernel says. All name `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|err| named(path, err.into()))?;
        let root = Self { directory, path: path.to_path_buf() };
        root.open_beneath(Path::new("."), flags)?; // tells at once if the kernel cannot do it
        Ok(root)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a regular file for reading. Symlinks are followed as long as they stay beneath the root.
    ///
    /// # Errors
    /// `InvalidInput` for anything but a regular file (a FIFO or device is never waited for), `PermissionDenied`
    /// if the path leads out of the root; else as the kernel says.
    pub fn open_file(&self, relative: impl AsRef<Path>) -> io::Result<File> {
        let relative = relative.as_ref();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // Only a file's owner may ask that its access time stays.
        let opened = match self.open_beneath(relative, flags | OFlags::NOATIME) {
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                self.open_beneath(relative, flags)
            }
            other => other,
        };
        let file = File::from(opened?);
        if file.metadata().map_err(|err| self.named(relative, err))?.is_file() {
            return Ok(file);
        }
        let text = io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file");
        Err(self.named(relative, text))
    }

    /// Returns the content of a regular file of at most `limit` bytes.
    ///
    /// # Errors
    /// `FileTooLarge` for a longer one; else as [`Root::open_file`].
    pub fn read(&self, relative: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
        let relative = relative.as_ref();
        let mut bytes = Vec::new();
        let file = self.open_file(relative)?;
        file.take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|err| self.named(relative, err))?;
        if bytes.len() as u64 > limit {
            let text = format!("is longer than the {limit} bytes that may be read of it");
            return Err(self.named(relative, io::Error::new(io::ErrorKind::FileTooLarge, text)));
        }
        Ok(bytes)
    }

    /// Returns all entries of a directory (`""` is the root itself), sorted by name; complete or an error. An entry
    /// that somebody removes meanwhile is left out.
    ///
    /// # Errors
    /// As the kernel says, with the path.
    pub fn list(&self, relative: impl AsRef<Path>) -> io::Result<Vec<Entry>> {
        let relative = relative.as_ref();
        let (directory, names) = self.read_directory(relative)?;
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => entries.push(Entry::new(name, &stat)),
                Err(Errno::NOENT) => {}
                Err(err) => return Err(self.named(&relative.join(name), err.into())),
            }
        }
        entries.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(entries)
    }

    /// Returns the names of all entries of a directory, sorted: the cheap part of [`Root::list`].
    ///
    /// # Errors
    /// As the kernel says, with the path.
    pub fn names(&self, relative: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
        let (_, mut names) = self.read_directory(relative.as_ref())?;
        names.sort_unstable();
        Ok(names)
    }

    fn read_directory(&self, relative: &Path) -> io::Result<(OwnedFd, Vec<OsString>)> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match self.open_beneath(relative, flags | OFlags::NOATIME) {
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                self.open_beneath(relative, flags)?
            }
            other => other?,
        };
        let failed = |err: Errno| self.named(relative, err.into());
        let mut names = Vec::new();
        for found in Dir::read_from(&directory).map_err(failed)? {
            let found = found.map_err(failed)?;
            let name = OsString::from_vec(found.file_name().to_bytes().to_vec());
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok((directory, names))
    }

    /// Returns what lies at a path; a symlink in its last part is not followed.
    ///
    /// # Errors
    /// As the kernel says, with the path.
    pub fn metadata(&self, relative: impl AsRef<Path>) -> io::Result<Entry> {
        let relative = relative.as_ref();
        let opened =
            self.open_beneath(relative, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?;
        let stat = rustix::fs::fstat(&opened).map_err(|err| self.named(relative, err.into()))?;
        Ok(Entry::new(relative.file_name().unwrap_or_default().to_owned(), &stat))
    }

    /// Returns where a symlink points to, as it is written there.
    ///
    /// # Errors
    /// As the kernel says, with the path.
    pub fn read_link(&self, relative: impl AsRef<Path>) -> io::Result<PathBuf> {
        let relative = relative.as_ref();
        let opened =
            self.open_beneath(relative, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)?;
        let target = rustix::fs::readlinkat(&opened, "", Vec::new()).map_err(|err| match err {
            Errno::NOENT => self
                .named(relative, io::Error::new(io::ErrorKind::InvalidInput, "is not a symlink")),
            other => self.named(relative, other.into()),
        })?;
        Ok(OsString::from_vec(target.into_bytes()).into())
    }

    fn open_beneath(&self, relative: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let asked = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut disturbed = 0;
        loop {
            match rustix::fs::openat2(&self.directory, asked, flags, Mode::empty(), resolve) {
                Ok(opened) => return Ok(opened),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if disturbed < DISTURBED_LIMIT => disturbed += 1,
                Err(err) => return Err(self.named(relative, explained(err))),
            }
        }
    }

    fn named(&self, relative: &Path, source: io::Error) -> io::Error {
        if relative.as_os_str().is_empty() {
            named(&self.path, source)
        } else {
            named(&self.path.join(relative), source)
        }
    }
}

impl Entry {
    fn new(name: OsString, stat: &Stat) -> Self {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            _ => Kind::Other,
        };
        let size = if kind == Kind::File { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 };
        Self { name, kind, size, modified: stat.st_mtime }
    }
}

/// Says what the errors of `openat2` mean that need saying.
fn explained(err: Errno) -> io::Error {
    match err {
        Errno::NOSYS => io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel lacks openat2: Linux 5.6 or newer is needed",
        ),
        Errno::XDEV => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "leads out of the directory that was opened",
        ),
        other => other.into(),
    }
}

/// An I/O error with the path it happened on.
#[derive(Debug)]
struct Named {
    path: PathBuf,
    source: io::Error,
}

impl fmt::Display for Named {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "`{}`: {}", self.path.display(), self.source)
    }
}

impl std::error::Error for Named {}

pub(super) fn named(path: &Path, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), Named { path: path.to_path_buf(), source })
}
