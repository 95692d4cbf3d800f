//! What the mount shows before anything is written: built once, from the backup's map.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use crate::content::MAX_FILE_SIZE;
use crate::file::{Facts, File};
use crate::names::{self, Body, Kind, Names};
use crate::{Ino, ROOT};

pub(crate) const DIRECTORY_MODE: u16 = 0o700;
pub(crate) const FILE_MODE: u16 = 0o600;

/// The names, sizes and times of everything below the mount.
///
/// Paths are relative, with `/` between their parts; directories on the way are made.
pub struct Tree {
    names: Names,
    /// The directories, with what is to be shown of those that were added by name.
    directories: HashMap<Ino, Option<Facts>>,
    made: SystemTime,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// Returns a tree with nothing in it.
    pub fn new() -> Self {
        let made = SystemTime::now();
        let facts = Facts { mode: DIRECTORY_MODE, mtime: made, ctime: made };
        Self { names: Names::new(facts), directories: HashMap::new(), made }
    }

    /// Adds a directory; `mtime` in seconds since 1970.
    ///
    /// # Errors
    /// [`TreeError`] if the path is not plain, lies below a file, or was added before (but not only
    /// implied).
    pub fn directory(&mut self, path: impl AsRef<Path>, mtime: i64) -> Result<(), TreeError> {
        let path = path.as_ref();
        let facts = facts(DIRECTORY_MODE, mtime);
        let (parent, name) = self.parent(path)?;
        let ino = match self.names.child(parent, name) {
            Ok(ino) if self.directories.get(&ino) == Some(&None) => ino,
            _ => {
                self.names.make_directory(parent, name, facts).map_err(|err| refused(path, err))?
            }
        };
        self.directories.insert(ino, Some(facts));
        Ok(())
    }

    /// Returns the names, with the directories' times as they were given.
    pub(crate) fn into_names(mut self) -> Names {
        for (ino, facts) in self.directories {
            let node = self.names.node_mut(ino).map(|node| &mut node.body);
            if let (Some(facts), Ok(Body::Directory(directory))) = (facts, node) {
                directory.facts = facts;
            }
        }
        self.names
    }

    /// Adds a file of exactly `size` bytes that are the lower's file `lower`; `mtime` in seconds
    /// since 1970.
    ///
    /// # Errors
    /// [`TreeError`] if the path is not plain, lies below a file or was added before, or if the
    /// size is beyond [`MAX_FILE_SIZE`].
    pub fn file(
        &mut self,
        path: impl AsRef<Path>,
        lower: usize,
        size: u64,
        mtime: i64,
    ) -> Result<(), TreeError> {
        let path = path.as_ref();
        if size > MAX_FILE_SIZE {
            return Err(TreeError::TooLarge { path: path.into(), size });
        }
        let facts = facts(FILE_MODE, mtime);
        self.add(path, |ino| Body::File(Arc::new(File::of_lower(ino, lower, size, facts))))
    }

    /// Adds a symbolic link. Whoever writes to the mount may remove it and make it again.
    ///
    /// # Errors
    /// [`TreeError`] if the path is not plain, lies below a file or was added before.
    pub fn symlink(
        &mut self,
        path: impl AsRef<Path>,
        target: impl AsRef<Path>,
    ) -> Result<(), TreeError> {
        let facts = Facts { mode: 0o777, mtime: self.made, ctime: self.made };
        let (path, target) = (path.as_ref(), target.as_ref().as_os_str().as_bytes());
        self.add(path, |_| Body::Symlink { target: Arc::from(target), facts })?;
        self.names.links.provide(path.as_os_str().as_bytes(), target);
        Ok(())
    }

    fn add(&mut self, path: &Path, body: impl FnOnce(Ino) -> Body) -> Result<(), TreeError> {
        let (parent, name) = self.parent(path)?;
        self.names.make(parent, name, body).map(drop).map_err(|err| refused(path, err))
    }

    /// Returns the directory that `path` lies in, made if absent, and the last part of the path.
    fn parent<'a>(&mut self, path: &'a Path) -> Result<(Ino, &'a [u8]), TreeError> {
        let mut parts = path.as_os_str().as_bytes().split(|byte| *byte == b'/');
        let last = parts.next_back().unwrap_or_default();
        let mut at = ROOT;
        for part in parts {
            at = match self.names.child(at, part) {
                Ok(ino)
                    if self
                        .names
                        .node(ino)
                        .is_ok_and(|node| node.body.kind() == Kind::Directory) =>
                {
                    ino
                }
                Ok(_) => return Err(TreeError::BelowFile { path: path.into() }),
                Err(_) => {
                    let facts = Facts { mode: DIRECTORY_MODE, mtime: self.made, ctime: self.made };
                    let ino = self
                        .names
                        .make_directory(at, part, facts)
                        .map_err(|err| refused(path, err))?;
                    self.directories.insert(ino, None);
                    ino
                }
            };
        }
        Ok((at, last))
    }
}

/// Returns whether `path` is relative, and each part of it is a name.
pub(crate) fn is_plain(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').all(|part| names::checked(part).is_ok())
}

fn facts(mode: u16, mtime: i64) -> Facts {
    let seconds = Duration::from_secs(mtime.unsigned_abs());
    let time =
        if mtime < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    let time = time.unwrap_or(UNIX_EPOCH);
    Facts { mode, mtime: time, ctime: time }
}

fn refused(path: &Path, errno: Errno) -> TreeError {
    let path = path.into();
    if errno == Errno::EXIST { TreeError::Duplicate { path } } else { TreeError::BadPath { path } }
}

/// Why a path was not added to a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// It was added before.
    #[error("`{}` is there twice", path.display())]
    Duplicate {
        /// The path.
        path: PathBuf,
    },
    /// It is empty or absolute, or has an empty, `.` or `..` part or one of more than 255 bytes.
    #[error("`{}` is not a plain relative path", path.display())]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// A part before the last is not a directory.
    #[error("`{}` lies below something that is not a directory", path.display())]
    BelowFile {
        /// The path.
        path: PathBuf,
    },
    /// The size cannot be right.
    #[error("`{}` has {size} bytes; {MAX_FILE_SIZE} are possible", path.display())]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_each_plain_path_once() {
        let mut tree = Tree::new();
        tree.file("data/base/1/2619", 0, 8192, 5).unwrap();
        tree.directory("data/base", -7).unwrap();
        tree.symlink("data/pg_tblspc/16400", "/somewhere").unwrap();
        let bad = |path: &str| Err(TreeError::BadPath { path: path.into() });
        let duplicate = |path: &str| Err(TreeError::Duplicate { path: path.into() });
        let below = |path: &str| Err(TreeError::BelowFile { path: path.into() });
        let long = "x".repeat(256);
        let cases = [
            ("data/base", duplicate("data/base")),
            ("data/base/1/2619", duplicate("data/base/1/2619")),
            ("data/base/1/2619/x", below("data/base/1/2619/x")),
            ("data/pg_tblspc/16400/x", below("data/pg_tblspc/16400/x")),
            ("", bad("")),
            ("/etc", bad("/etc")),
            ("data//x", bad("data//x")),
            ("data/", bad("data/")),
            ("../x", bad("../x")),
            ("data/../x", bad("data/../x")),
            ("data/.", bad("data/.")),
            (&long, bad(&long)),
            ("data/base/1", Ok(())),
        ];
        for (path, want) in cases {
            assert_eq!(tree.directory(path, 0), want, "{path}");
        }
        let size = MAX_FILE_SIZE + 1;
        let too_large = Err(TreeError::TooLarge { path: "large".into(), size });
        assert_eq!(tree.file("large", 0, size, 0), too_large);
        tree.file("large", 0, MAX_FILE_SIZE, i64::MIN).unwrap();
    }
}
