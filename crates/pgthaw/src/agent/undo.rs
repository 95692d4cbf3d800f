//! Undoing a session: what it made on this machine is listed in its journal, and removed whether or not its agent is alive.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pgthaw_mover::{EXPORT_JSON, GLOBALS_SQL, MoveError, SHA256SUMS, TargetDirectory};
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
    let published = published(session);
    let in_target =
        [staging(session)].into_iter().chain(published.iter().map(|name| target.join(name)));
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
    let discarded = match sealed {
        Some(_) => discard(session, &[], &[]),
        None if everything => {
            let published = published(session);
            let names: Vec<&str> = published.iter().map(String::as_str).collect();
            discard(session, &names, &session.target_directories)
        }
        None => Ok(()),
    };
    failed.extend(discarded.err().map(|err| moving(err).message));
    Undone { failed, sealed }
}

/// As [`TargetDirectory::discard`]. A dying agent no longer shows that it is the session's, but may still hold its lock:
/// that is waited for.
fn discard(session: &Session, published: &[&str], made: &[PathBuf]) -> Result<(), MoveError> {
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

/// Names in the target that the session gave to what it delivered: those whose checksums it kept just before. Where an
/// earlier export is replaced, nothing has its name before the export is complete.
fn published(session: &Session) -> Vec<String> {
    if session.request.replace || staging(session).symlink_metadata().is_err() {
        return Vec::new();
    }
    let kept =
        TargetDirectory::kept_names(&session.request.target, &session.id).unwrap_or_default();
    // A database that is still staged has not got its name: what is called so is somebody else's.
    let staging = staging(session);
    let is_staged =
        |name: &String| name != GLOBALS_SQL && staging.join(name).symlink_metadata().is_ok();
    let kept = kept.into_iter().filter(|name| !is_staged(name));
    // The last two are written with the staging directory still there, and only into a directory that was empty before.
    kept.chain([SHA256SUMS, EXPORT_JSON].map(str::to_owned)).collect()
}

fn staging(session: &Session) -> PathBuf {
    session.request.target.join(format!(".pgthaw-{}", session.id))
}
