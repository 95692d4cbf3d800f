//! One open directory of the target: everything in it is reached by plain name and never through a link.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::error::MoveError;
use crate::names::is_plain;

const OPEN_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const PRIVATE_FILE: Mode = Mode::from_raw_mode(0o600);
const PRIVATE_DIRECTORY: Mode = Mode::from_raw_mode(0o700);

/// A directory that stays the one it was when it was opened, whatever is renamed around it.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    /// Opens `path`, whose parents may be links but which itself may not be one.
    ///
    /// # Errors
    /// [`MoveError::Target`] and its kin if it is no directory or cannot be read.
    pub fn open(path: &Path) -> Result<Self, MoveError> {
        Self::open_any(path).map_err(|err| MoveError::target("open", path, path, err))
    }

    /// Opens a directory of a dump; as [`Directory::open`].
    ///
    /// # Errors
    /// [`MoveError::Source`].
    pub fn open_source(path: &Path) -> Result<Self, MoveError> {
        Self::open_any(path).map_err(|err| MoveError::source("open", path, err))
    }

    /// Takes the directory that `path` was when `fd` was opened.
    pub(crate) fn opened(path: PathBuf, fd: OwnedFd) -> Self {
        Self { path, fd }
    }

    fn open_any(path: &Path) -> Result<Self, Errno> {
        Ok(Self { path: path.into(), fd: fs::open(path, OPEN_DIRECTORY, Mode::empty())? })
    }

    /// Removes the file `name` of a dump; an absent one is fine.
    ///
    /// # Errors
    /// [`MoveError::Source`].
    pub fn remove_source_file(&self, name: &str) -> Result<(), MoveError> {
        match fs::unlinkat(&self.fd, plain(name), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(err) => Err(MoveError::source("remove", &self.join(name), err)),
        }
    }

    pub(crate) fn try_clone(&self) -> Result<Self, MoveError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|err| MoveError::target("open", &self.path, &self.path, err))?;
        Ok(Self { path: self.path.clone(), fd })
    }

    /// Returns the path it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of an entry, for messages.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Turns a system error about the entry `name` into one of ours.
    pub(crate) fn error(
        &self,
        action: &'static str,
        name: &str,
        err: impl Into<io::Error>,
    ) -> MoveError {
        MoveError::target(action, &self.path, &self.join(name), err)
    }

    pub(crate) fn open_directory(&self, name: &str) -> Result<Self, MoveError> {
        self.find_directory(name)?.ok_or_else(|| self.error("open", name, Errno::NOENT))
    }

    /// Opens the directory `name`, if there is one.
    pub(crate) fn find_directory(&self, name: &str) -> Result<Option<Self>, MoveError> {
        match fs::openat(&self.fd, plain(name), OPEN_DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { path: self.join(name), fd })),
            Err(Errno::NOENT) => Ok(None),
            Err(err) => Err(self.error("open", name, err)),
        }
    }

    /// Makes the directory `name` (0700) unless it is there; returns it and whether it was made.
    pub(crate) fn ensure_directory(&self, name: &str) -> Result<(Self, bool), MoveError> {
        let made = match fs::mkdirat(&self.fd, plain(name), PRIVATE_DIRECTORY) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(err) => return Err(self.error("create", name, err)),
        };
        Ok((self.open_directory(name)?, made))
    }

    /// Creates the file `name` (0600), which must not exist.
    pub(crate) fn create_file(&self, name: &str) -> Result<File, MoveError> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(&self.fd, plain(name), flags, PRIVATE_FILE) {
            Ok(fd) => Ok(fd.into()),
            Err(Errno::EXIST) => Err(MoveError::Exists { path: self.join(name) }),
            Err(err) => Err(self.error("create", name, err)),
        }
    }

    /// Opens `name` for reading, without waiting for a writer where it is a FIFO.
    pub(crate) fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(fs::openat(&self.fd, plain(name), flags, Mode::empty())?.into())
    }

    /// Opens the regular file `name` for reading; `None` if there is none.
    pub(crate) fn find_file(&self, name: &str) -> Result<Option<File>, MoveError> {
        let file = match self.open_file(name) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(self.error("open", name, err)),
        };
        let regular = file.metadata().map_err(|err| self.error("stat", name, err))?.is_file();
        if regular { Ok(Some(file)) } else { Err(MoveError::Exists { path: self.join(name) }) }
    }

    /// Opens the regular file `name` for reading and writing; `None` if there is none.
    pub(crate) fn open_for_update(&self, name: &str) -> Result<Option<File>, MoveError> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = match fs::openat(&self.fd, plain(name), flags, Mode::empty()) {
            Ok(file) => file.into(),
            Err(Errno::NOENT) => return Ok(None),
            Err(err) => return Err(self.error("open", name, err)),
        };
        let regular = file.metadata().map_err(|err| self.error("stat", name, err))?.is_file();
        if regular { Ok(Some(file)) } else { Err(MoveError::Exists { path: self.join(name) }) }
    }

    /// Returns inode and length of the regular file `name`; `None` if there is none.
    pub(crate) fn find_inode(&self, name: &str) -> Result<Option<(u64, u64)>, MoveError> {
        match fs::statat(&self.fd, plain(name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                Ok(Some((stat.st_ino, u64::try_from(stat.st_size).unwrap_or(0))))
            }
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(err) => Err(self.error("stat", name, err)),
        }
    }

    /// Returns the kind of the entry `name` without following it; `None` if there is none.
    pub(crate) fn kind(&self, name: &str) -> Result<Option<FileType>, MoveError> {
        match fs::statat(&self.fd, plain(name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(err) => Err(self.error("stat", name, err)),
        }
    }

    /// Returns the names in it, sorted; a name that is no UTF-8 is shown with replacement characters.
    pub(crate) fn names(&self) -> Result<Vec<String>, MoveError> {
        let list = || {
            let mut names = Vec::new();
            for entry in fs::Dir::read_from(&self.fd)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if name != "." && name != ".." {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        list().map_err(|err: Errno| MoveError::target("list", &self.path, &self.path, err))
    }

    /// Removes the file or link `name`; an absent one is fine.
    pub(crate) fn remove_file(&self, name: &str) -> Result<(), MoveError> {
        self.unlink(name, AtFlags::empty())
    }

    /// Removes the directory `name` if it is empty and returns whether it is gone.
    pub(crate) fn remove_if_empty(&self, name: &str) -> Result<bool, MoveError> {
        match fs::unlinkat(&self.fd, plain(name), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(err) => Err(self.error("remove", name, err)),
        }
    }

    /// Removes `name` with all that lies below it; links are removed, never followed. An absent one is fine.
    pub(crate) fn remove_tree(&self, name: &str) -> Result<(), MoveError> {
        match self.kind(name)? {
            None => Ok(()),
            Some(FileType::Directory) => {
                let below = self.open_directory(name)?;
                for name in below.names()? {
                    below.remove_tree(&name)?;
                }
                self.unlink(name, AtFlags::REMOVEDIR)
            }
            Some(_) => self.remove_file(name),
        }
    }

    /// Renames `name` to `new_name` in `new_parent`, where nothing may be replaced.
    pub(crate) fn rename_new(
        &self,
        name: &str,
        new_parent: &Self,
        new_name: &str,
    ) -> Result<(), MoveError> {
        let (from, to) = (plain(name), plain(new_name));
        match fs::renameat_with(&self.fd, from, &new_parent.fd, to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(MoveError::Exists { path: new_parent.join(new_name) }),
            // Some network file systems do not know the flag; the caller has looked just before.
            Err(Errno::INVAL | Errno::NOSYS) => self.rename(name, new_parent, new_name),
            Err(err) => Err(new_parent.error("rename to", new_name, err)),
        }
    }

    /// Renames `name` to `new_name` in `new_parent`, where a file may be replaced and nothing else.
    pub(crate) fn rename(
        &self,
        name: &str,
        new_parent: &Self,
        new_name: &str,
    ) -> Result<(), MoveError> {
        match fs::renameat(&self.fd, plain(name), &new_parent.fd, plain(new_name)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR | Errno::ISDIR) => {
                Err(MoveError::Exists { path: new_parent.join(new_name) })
            }
            Err(err) => Err(new_parent.error("rename to", new_name, err)),
        }
    }

    /// Makes the names in it durable.
    pub(crate) fn sync(&self) -> Result<(), MoveError> {
        fs::fsync(&self.fd).map_err(|err| MoveError::target("sync", &self.path, &self.path, err))
    }

    fn unlink(&self, name: &str, flags: AtFlags) -> Result<(), MoveError> {
        match fs::unlinkat(&self.fd, plain(name), flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(err) => Err(self.error("remove", name, err)),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns `name`, or an empty name (`ENOENT` for every call) where it would lead out of its directory.
fn plain(name: &str) -> &str {
    if is_plain(name) { name } else { "" }
}

/// Returns the bytes that an unprivileged user can still write at `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
