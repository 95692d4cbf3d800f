//! Undoing a session: what it made on this machine is listed in its journal, and removed whether or not its agent is alive.

use std::path::PathBuf;

use pgthaw_mover::{EXPORT_JSON, SHA256SUMS, TargetDirectory};
use pgthaw_session::Session;

use super::dumping::moving;
use crate::leftovers;

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

/// Removes what `session` made; with `everything` also what it put into the target. Returns what could not be removed.
pub fn undo(session: &Session, everything: bool) -> Vec<String> {
    let mut failed = Vec::new();
    if let Some(place) = &session.place {
        failed.extend(leftovers::remove(place).failed);
    }
    if everything {
        let published = published(session);
        let names: Vec<&str> = published.iter().map(String::as_str).collect();
        let discarded = TargetDirectory::discard(
            &session.request.target,
            &session.id,
            &names,
            &session.target_directories,
        );
        failed.extend(discarded.err().map(|err| moving(err).message));
    }
    failed
}

/// Names in the target that the session gave to what it delivered: those whose checksums it kept just before. Where an
/// earlier export is replaced, nothing has its name before the export is complete.
fn published(session: &Session) -> Vec<String> {
    if session.request.replace || staging(session).symlink_metadata().is_err() {
        return Vec::new();
    }
    let kept =
        TargetDirectory::kept_names(&session.request.target, &session.id).unwrap_or_default();
    // The last two are written with the staging directory still there, and only into a directory that was empty before.
    kept.into_iter().chain([SHA256SUMS, EXPORT_JSON].map(str::to_owned)).collect()
}

fn staging(session: &Session) -> PathBuf {
    session.request.target.join(format!(".pgthaw-{}", session.id))
}
