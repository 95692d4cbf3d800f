//! A file of the dump, and whether it stays what it was.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use crate::directory::Directory;
use crate::error::MoveError;

/// A file of the dump, opened without following a link, with what was known about it at that time.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    before: Metadata,
}

impl Source {
    pub(crate) fn open(directory: &Directory, name: &str) -> Result<Self, MoveError> {
        let path = directory.join(name);
        let fail = |action, err| MoveError::source(action, &path, err);
        let file = directory.open_file(name).map_err(|err| fail("open", err))?;
        let before = file.metadata().map_err(|err| fail("stat", err))?;
        if !before.is_file() {
            return Err(fail("read", io::Error::other("not a regular file")));
        }
        Ok(Self { path, file, before })
    }

    /// Returns its length when it was opened.
    pub(crate) fn length(&self) -> u64 {
        self.before.len()
    }

    /// Returns what tells whether it has changed.
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::of(&self.before)
    }

    /// Fills as much of `buffer` as there is from `offset` on, and returns how much.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, MoveError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(MoveError::source("read", &self.path, err)),
            }
        }
        Ok(filled)
    }

    /// Fails if it is no longer what it was when it was opened, or if the `bytes` that were read are not all of it.
    pub(crate) fn unchanged(&self, bytes: u64) -> Result<(), MoveError> {
        let after =
            self.file.metadata().map_err(|err| MoveError::source("stat", &self.path, err))?;
        if bytes == after.len() && self.stamp() == Stamp::of(&after) {
            Ok(())
        } else {
            Err(self.changed())
        }
    }

    pub(crate) fn changed(&self) -> MoveError {
        MoveError::SourceChanged { path: self.path.clone() }
    }
}

/// Length and modification time of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) length: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(file: &Metadata) -> Self {
        Self { length: file.len(), modified: (file.mtime(), file.mtime_nsec()) }
    }
}
