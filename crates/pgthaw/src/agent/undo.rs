//! Undoing a session's part on this machine: what it made is listed in its journal, and removed whether or not its agent is alive.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgthaw_mover::{MoveError, TargetDirectory};
use pgthaw_session::session::Place;

use super::dumping::moving;
use super::sealing::sealed_before;
use crate::leftovers;
use crate::wire::{TargetTask, TargetUndone};

/// How long a killed agent may take to let go of the target.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Lists what a session left at `place`, on this machine: kind and name.
pub fn find_at(place: &Place) -> Vec<(String, String)> {
    let left = leftovers::find(place);
    left.found.into_iter().map(|left| (left.kind.to_string(), left.name)).collect()
}

/// Lists what a session has in its target on this machine: kind and name.
pub fn find_in_target(task: &TargetTask) -> Vec<(String, String)> {
    let published = match task.replace {
        true => Vec::new(), // nothing has its name before the export is complete
        false => TargetDirectory::published(&task.directory, &task.session).unwrap_or_default(),
    };
    let staging = task.directory.join(format!(".pgthaw-{}", task.session));
    let named = published.iter().map(|name| task.directory.join(name));
    let there = [staging].into_iter().chain(named).filter(|path| path.symlink_metadata().is_ok());
    there.map(|path| ("directory".into(), path.display().to_string())).collect()
}

/// Removes what a session left at `place`, on this machine; returns what could not be removed.
pub fn undo_at(place: &Place) -> Vec<String> {
    leftovers::remove(place).failed
}

/// Removes what a session put into its target on this machine, once nobody of it works any more: what a retry would re-use only with
/// `everything`. A complete export is never undone, whatever ended the attempt meanwhile: only its staging directory goes.
pub fn undo_target(task: &TargetTask) -> TargetUndone {
    let sealed = sealed_before(&task.directory, &task.session);
    let discarded = match sealed {
        Some(_) => discard(task, false, &[]),
        None if task.everything => discard(task, !task.replace, &task.made),
        None => Ok(Vec::new()),
    };
    match discarded {
        Ok(kept) => TargetUndone { failed: Vec::new(), sealed, kept },
        Err(err) => TargetUndone { failed: vec![moving(err).message], sealed, kept: Vec::new() },
    }
}

/// As [`TargetDirectory::discard`]. A dying agent no longer shows that it is the session's, but may still hold its lock:
/// that is waited for.
fn discard(
    task: &TargetTask,
    published: bool,
    made: &[PathBuf],
) -> Result<Vec<PathBuf>, MoveError> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match TargetDirectory::discard(&task.directory, &task.session, published, made) {
            Err(MoveError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            discarded => return discarded,
        }
    }
}
