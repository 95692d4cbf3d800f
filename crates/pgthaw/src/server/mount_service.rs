//! The mount service: opens repositories and turns a backup into the map that a mount needs.
//!
//! Everything that reads a repository runs in a child (`pgthaw internal source`) with the identity of the repository's
//! owner, so that a server started as root never parses or decodes anything with root's rights.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pgthaw_session::{RecoveryChoice, RepositoryChoice};
use serde::de::DeserializeOwned;

use crate::internal::source::{MountSource, SourceTask};
use crate::internal::{self, Child};
use crate::wire::{ApiError, BackupFacts, BackupsAnswer};

/// Lists the backups of a repository.
///
/// # Errors
/// What the repository's reader says.
pub async fn backups(repository: RepositoryChoice) -> Result<BackupsAnswer, ApiError> {
    ask(&repository.path.clone(), &SourceTask::Backups { repository }).await
}

/// Reads what is known of one backup without mounting it.
///
/// # Errors
/// What the repository's reader says.
pub async fn facts(
    repository: RepositoryChoice,
    backup: Option<String>,
    recovery: RecoveryChoice,
) -> Result<BackupFacts, ApiError> {
    ask(&repository.path.clone(), &SourceTask::Facts { repository, backup, recovery }).await
}

/// Takes the table of stored objects out of a map: another machine's mount asks for objects by number, and needs no names.
///
/// # Errors
/// When `map` is none.
pub fn without_objects(map: &[u8]) -> Result<(Vec<u8>, Vec<u8>), ApiError> {
    let broken = |err: postcard::Error| ApiError::broken(format!("the map of the backup: {err}"));
    let mut source: MountSource = postcard::from_bytes(map).map_err(broken)?;
    let objects = std::mem::take(&mut source.objects);
    Ok((
        postcard::to_stdvec(&source).map_err(broken)?,
        postcard::to_stdvec(&objects).map_err(broken)?,
    ))
}

/// Lets a map's objects be read by a machine that sees the repository not at `from`, but at `to`. What lies beside it has the same path.
///
/// # Errors
/// When `map` is none.
pub fn rebased(map: &[u8], from: &Path, to: &Path) -> Result<Vec<u8>, ApiError> {
    let broken = |err: postcard::Error| ApiError::broken(format!("the map of the backup: {err}"));
    let mut source: MountSource = postcard::from_bytes(map).map_err(broken)?;
    for root in &mut source.objects.roots {
        if let Ok(rest) = root.strip_prefix(from) {
            *root = to.join(rest).components().collect();
        }
    }
    postcard::to_stdvec(&source).map_err(broken)
}

/// Tells by what another machine recognizes the backup: names of files in the repository, with their SHA-256.
///
/// # Errors
/// What the repository's reader says.
pub async fn identity(
    repository: RepositoryChoice,
    backup: String,
) -> Result<Vec<(String, [u8; 32])>, ApiError> {
    ask(&repository.path.clone(), &SourceTask::Identity { repository, backup }).await
}

/// The SHA-256 of `files` below `directory`, of those that are there.
///
/// # Errors
/// What the repository's reader says.
pub async fn checksums(
    directory: PathBuf,
    files: Vec<String>,
) -> Result<Vec<Option<[u8; 32]>>, ApiError> {
    ask(&directory.clone(), &SourceTask::Checksums { directory, files }).await
}

/// Builds the map of one backup, ready to be handed to a mount (see [`crate::internal::source::MountSource`]).
///
/// # Errors
/// What the repository's reader says.
pub async fn map(
    repository: RepositoryChoice,
    backup: String,
    recovery: RecoveryChoice,
) -> Result<Vec<u8>, ApiError> {
    let path = repository.path.clone();
    run(&path, &SourceTask::Map { repository, backup, recovery }).await
}

async fn ask<T: DeserializeOwned>(path: &Path, task: &SourceTask) -> Result<T, ApiError> {
    let bytes = run(path, task).await?;
    serde_json::from_slice(&bytes).map_err(|err| {
        ApiError::broken(format!("the repository's reader answered something else: {err}"))
    })
}

/// Runs one task in a child with the identity of the repository's owner, and returns what it printed.
async fn run(path: &Path, task: &SourceTask) -> Result<Vec<u8>, ApiError> {
    internal::ask(Child::Source, Some(owner(path)?), task).await
}

/// User and group of the repository's owner.
///
/// # Errors
/// When the repository cannot be looked at.
pub fn owner(path: &Path) -> Result<(u32, u32), ApiError> {
    let meta = std::fs::metadata(path).map_err(|err| ApiError {
        message: format!("repository `{}`: {err}", path.display()),
        hint: Some("name the directory of a pgBackRest repository or of a pg_basebackup".into()),
        usage: err.kind() == std::io::ErrorKind::NotFound,
    })?;
    Ok((meta.uid(), meta.gid()))
}
