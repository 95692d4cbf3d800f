//! Undoing a session: what it made on this machine is listed in its journal, and removed whether or not its agent is alive.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgthaw_mover::{MoveError, TargetDirectory};
use pgthaw_session::Session;

use super::dumping::moving;
use super::sealing::sealed_before;
use crate::leftovers;

/// How long a killed agent may take to let go of the target.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Lists what of `session` is on this machine: kind and name.
pub fn find(session: &Session) -> Vec<(String, String)> {
    let mut found = Vec::new();
    if let Some(place) = &session.place {
        let left = leftovers::find(place);
        found.extend(left.found.into_iter().map(|left| (left.kind.to_string(), left.name)));
    }
    let target = &session.request.target;
    let published = match session.request.replace {
        true => Vec::new(), // nothing has its name before the export is complete
        false => TargetDirectory::published(target, &session.id).unwrap_or_default(),
    };
    let staging = target.join(format!(".pgthaw-{}", session.id));
    let in_target = [staging].into_iter().chain(published.iter().map(|name| target.join(name)));
    for path in in_target.filter(|path| path.symlink_metadata().is_ok()) {
        found.push(("directory".into(), path.display().to_string()));
    }
    found
}

/// What [`undo`] found out.
#[derive(Debug)]
pub struct Undone {
    /// What could not be removed.
    pub failed: Vec<String>,
    /// Bytes of the export, if it was complete before anything could stop it: it stays.
    pub sealed: Option<u64>,
    /// Directories in the target that stay, because they hold something that is not the session's.
    pub kept: Vec<PathBuf>,
}

/// Removes what `session` made; with `everything` also what it put into the target. A complete export is never undone,
/// whatever ended the attempt meanwhile: only its staging directory goes.
pub fn undo(session: &Session, everything: bool) -> Undone {
    let mut failed = Vec::new();
    if let Some(place) = &session.place {
        failed.extend(leftovers::remove(place).failed);
    }
    // Looked at only now: nobody is left who could complete it.
    let sealed = sealed_before(&session.request.target, &session.id);
    let made = if everything { &session.target_directories[..] } else { &[] };
    let discarded = match sealed {
        Some(_) => discard(session, false, &[]),
        None if everything => discard(session, !session.request.replace, made),
        None => Ok(Vec::new()),
    };
    let kept = discarded.unwrap_or_else(|err| {
        failed.push(moving(err).message);
        Vec::new()
    });
    Undone { failed, sealed, kept }
}

/// As [`TargetDirectory::discard`]. A dying agent no longer shows that it is the session's, but may still hold its lock:
/// that is waited for.
fn discard(
    session: &Session,
    published: bool,
    made: &[PathBuf],
) -> Result<Vec<PathBuf>, MoveError> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match TargetDirectory::discard(&session.request.target, &session.id, published, made) {
            Err(MoveError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            discarded => return discarded,
        }
    }
}
