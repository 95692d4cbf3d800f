//! The mount service: opens repositories and turns a backup into the map that a mount needs.
//!
//! Everything that reads a repository runs in a child (`pgthaw internal source`) with the identity of the repository's
//! owner, so that a server started as root never parses or decodes anything with root's rights.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;

use pgthaw_session::{RecoveryChoice, RepositoryChoice};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::internal::source::SourceTask;
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
    serde_json::from_slice(&bytes)
        .map_err(|err| broken(format!("the repository's reader answered something else: {err}")))
}

/// Runs one task in a child and returns what it printed.
async fn run(path: &Path, task: &(impl Serialize + Sync)) -> Result<Vec<u8>, ApiError> {
    let owner =
        std::fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).map_err(|err| ApiError {
            message: format!("repository `{}`: {err}", path.display()),
            hint: Some(
                "name the directory of a pgBackRest repository or of a pg_basebackup".into(),
            ),
            usage: err.kind() == std::io::ErrorKind::NotFound,
        })?;
    let mut command = internal::command(Child::Source);
    internal::run_as_ids(&mut command, owner.0, owner.1);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    let mut child = command
        .kill_on_drop(true)
        .spawn()
        .map_err(|err| broken(format!("start the repository's reader: {err}")))?;
    let mut input = child.stdin.take().expect("piped");
    let task = serde_json::to_vec(task).expect("a task is plain data");
    let feed = async move {
        let _ = input.write_all(&task).await; // a child that ended early says why itself
    };
    let mut output = child.stdout.take().expect("piped");
    let mut errors = child.stderr.take().expect("piped");
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (_, read, _) =
        tokio::join!(feed, output.read_to_end(&mut out), errors.read_to_end(&mut err));
    read.map_err(|err| broken(format!("read the repository reader's answer: {err}")))?;
    let status =
        child.wait().await.map_err(|err| broken(format!("the repository's reader: {err}")))?;
    if status.success() {
        return Ok(out);
    }
    Err(serde_json::from_slice(&out).unwrap_or_else(|_| {
        let said = String::from_utf8_lossy(&err);
        broken(format!("the repository's reader ended with {status}: {}", said.trim()))
    }))
}

fn broken(message: String) -> ApiError {
    ApiError { message, hint: None, usage: false }
}
