//! A target as the session sees it, wherever it lies.

use crate::copy::{CopyFile, Delivered, Progress, copy_all_verified};
use crate::directory::Directory;
use crate::error::MoveError;
use crate::sums::SumEntry;
use crate::target::TargetDirectory;

/// Where in the staging directory files are delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// The directory of the database of this name.
    Database(&'a str),
    /// Beside the databases; for [`crate::GLOBALS_SQL`].
    TopLevel,
}

/// The target of one session: [`TargetDirectory`] on this machine, [`crate::RemoteTarget`] on another.
///
/// Every method may be called again after a failure. A failure keeps its class wherever the target lies.
pub trait Target: Send + Sync {
    /// Delivers `files` from `source`, mode 0600, each verified by reading it back from the target's disk; `done` gets
    /// each file's index once it is. `progress` is told bytes as they are secured, and also 0 while nothing moves, so that
    /// it can stop a delivery that waits.
    ///
    /// # Errors
    /// The first failure ends it. Files already reported stay.
    fn deliver(
        &self,
        place: Place<'_>,
        files: &[CopyFile<'_>],
        source: &Directory,
        progress: &mut Progress<'_>,
        done: &mut dyn FnMut(usize, Delivered),
    ) -> Result<(), MoveError>;

    /// As [`TargetDirectory::keep_sums`].
    ///
    /// # Errors
    /// As there.
    fn keep_sums(&self, name: &str, sums: &[SumEntry]) -> Result<(), MoveError>;

    /// As [`TargetDirectory::kept_sums`].
    ///
    /// # Errors
    /// As there.
    fn kept_sums(&self, name: &str) -> Result<Option<Vec<SumEntry>>, MoveError>;

    /// As [`TargetDirectory::keep_note`].
    ///
    /// # Errors
    /// As there.
    fn keep_note(&self, name: &str, note: &str) -> Result<(), MoveError>;

    /// As [`TargetDirectory::kept_note`].
    ///
    /// # Errors
    /// As there.
    fn kept_note(&self, name: &str) -> Result<Option<String>, MoveError>;

    /// As [`TargetDirectory::publish_database`].
    ///
    /// # Errors
    /// As there.
    fn publish_database(&self, database: &str, files: &[&str]) -> Result<String, MoveError>;

    /// As [`TargetDirectory::published_before`].
    ///
    /// # Errors
    /// As there.
    fn published_before(&self, database: &str) -> Result<Option<u64>, MoveError>;

    /// As [`TargetDirectory::publish_file`].
    ///
    /// # Errors
    /// As there.
    fn publish_file(&self, name: &str) -> Result<(), MoveError>;

    /// As [`TargetDirectory::remove_replaced`].
    ///
    /// # Errors
    /// As there.
    fn remove_replaced(&self) -> Result<(), MoveError>;

    /// As [`TargetDirectory::write_sha256sums`].
    ///
    /// # Errors
    /// As there.
    fn write_sha256sums(&self, entries: &[SumEntry]) -> Result<(), MoveError>;

    /// As [`TargetDirectory::write_export_json`].
    ///
    /// # Errors
    /// As there.
    fn write_export_json(&self, json: &[u8]) -> Result<(), MoveError>;

    /// As [`TargetDirectory::export_bytes`].
    ///
    /// # Errors
    /// As there.
    fn export_bytes(&self, sums: &[SumEntry]) -> Result<u64, MoveError>;

    /// As [`TargetDirectory::remove_staging`]. It is the last call: a connection that begins later makes the directory anew.
    ///
    /// # Errors
    /// As there.
    fn remove_staging(&self) -> Result<(), MoveError>;
}

impl Target for TargetDirectory {
    fn deliver(
        &self,
        place: Place<'_>,
        files: &[CopyFile<'_>],
        source: &Directory,
        progress: &mut Progress<'_>,
        done: &mut dyn FnMut(usize, Delivered),
    ) -> Result<(), MoveError> {
        match place {
            Place::Database(name) => {
                copy_all_verified(files, source, &self.database(name)?, progress, done)
            }
            Place::TopLevel => copy_all_verified(files, source, self.staging(), progress, done),
        }
    }

    fn keep_sums(&self, name: &str, sums: &[SumEntry]) -> Result<(), MoveError> {
        Self::keep_sums(self, name, sums)
    }

    fn kept_sums(&self, name: &str) -> Result<Option<Vec<SumEntry>>, MoveError> {
        Self::kept_sums(self, name)
    }

    fn keep_note(&self, name: &str, note: &str) -> Result<(), MoveError> {
        Self::keep_note(self, name, note)
    }

    fn kept_note(&self, name: &str) -> Result<Option<String>, MoveError> {
        Self::kept_note(self, name)
    }

    fn publish_database(&self, database: &str, files: &[&str]) -> Result<String, MoveError> {
        Self::publish_database(self, database, files)
    }

    fn published_before(&self, database: &str) -> Result<Option<u64>, MoveError> {
        Self::published_before(self, database)
    }

    fn publish_file(&self, name: &str) -> Result<(), MoveError> {
        Self::publish_file(self, name)
    }

    fn remove_replaced(&self) -> Result<(), MoveError> {
        Self::remove_replaced(self)
    }

    fn write_sha256sums(&self, entries: &[SumEntry]) -> Result<(), MoveError> {
        Self::write_sha256sums(self, entries)
    }

    fn write_export_json(&self, json: &[u8]) -> Result<(), MoveError> {
        Self::write_export_json(self, json)
    }

    fn export_bytes(&self, sums: &[SumEntry]) -> Result<u64, MoveError> {
        Self::export_bytes(self, sums)
    }

    fn remove_staging(&self) -> Result<(), MoveError> {
        Self::remove_staging(self)
    }
}
