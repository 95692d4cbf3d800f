//! The way to the target: a directory of this machine, or the sending half of a data mover for another machine's.
//!
//! The server makes the lines to the other machine and has them handed over on a socket of the session; the two halves of the mover
//! meet over them. When a connection breaks, delivery waits for the next.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgthaw_mover::{
    Connection, EXPORT_JSON, MoveError, RemoteOptions, RemoteStatus, RemoteTarget, SHA256SUMS,
    Target, TargetDirectory, TargetState, meet,
};
use pgthaw_session::AgentView;
use pgthaw_session::observed::Failure;
use pgthaw_session::session::Place;
use tokio::sync::watch;

use super::dumping::moving;
use super::{Agent, lock};
use crate::attach::handing::{Handed, take_over};
use crate::wire::Assignment;

/// The socket on which connections to the target arrive.
pub fn mover_socket(place: &Place) -> PathBuf {
    place.work_directory.join("agent").join("mover.sock")
}

/// The target on another machine, if it is on one: listens for connections to it.
///
/// # Errors
/// When the socket cannot be made.
pub fn remote_target(
    assignment: &Assignment,
    view: watch::Sender<AgentView>,
) -> io::Result<Option<Arc<RemoteTarget>>> {
    if !assignment.request.delivers_elsewhere() {
        return Ok(None);
    }
    let socket = mover_socket(&assignment.place);
    let listener = UnixListener::bind(&socket)?;
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o600))?;
    let on_change = move |status: &RemoteStatus| {
        let waiting = (!status.connected).then(|| {
            let why = status.reason.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
            format!(
                "the target cannot be reached since {}{why}",
                status.since.strftime("%H:%M:%S UTC")
            )
        });
        view.send_modify(|view| {
            view.waiting_for_target = waiting;
            view.version += 1;
        });
    };
    let options = RemoteOptions {
        stall_limit: Duration::from_secs(assignment.request.stall_timeout),
        bytes_per_second: assignment.request.mover.bytes_per_second,
        compress: is_uncompressed(assignment.request.compress.as_deref()),
        ..RemoteOptions::default()
    };
    let target = Arc::new(RemoteTarget::new(options, on_change));
    let connected = target.clone();
    std::thread::spawn(move || {
        for holder in listener.incoming().flatten() {
            let connected = connected.clone();
            // Meeting the other half takes a while: a newer line must not wait for it.
            std::thread::spawn(move || match connect(holder) {
                Ok(connection) => connected.connect(connection),
                Err(err) => eprintln!("no connection to the target: {err}"), // the server makes another
            });
        }
    });
    Ok(Some(target))
}

/// Whether pg_dump was asked not to compress: without `-Z` it compresses a directory with gzip.
fn is_uncompressed(compress: Option<&str>) -> bool {
    matches!(compress, Some("none" | "0"))
}

/// Takes a line over that was handed to us, and meets the other half of the data mover as the server asks over it.
fn connect(holder: UnixStream) -> io::Result<Connection> {
    let Handed { input, output, holder, .. } = take_over(holder)?;
    let close = move || {
        let _ = holder.shutdown(Shutdown::Both); // its process ends, and with it the line
    };
    // A direct connection goes on when the line is lost; the next line's takes its place.
    Ok(meet(File::from(input), File::from(output), close)?.connection)
}

/// The target, locked for this session as long as the agent lives.
///
/// # Errors
/// When it cannot be worked in, or is no longer empty.
pub fn target(agent: &Agent) -> Result<Arc<dyn Target>, Failure> {
    if let Some(target) = &agent.remote_target {
        return Ok(target.clone());
    }
    let mut opened = lock(&agent.target);
    if let Some(target) = &*opened {
        return Ok(target.clone());
    }
    let assignment = &agent.assignment;
    let request = &assignment.request;
    let target = open(&request.target, &assignment.session, request.replace);
    let target = target.map_err(NotOpened::failure)?;
    Ok(opened.insert(Arc::new(target)).clone())
}

/// Why a target directory cannot be worked in.
#[derive(Debug)]
pub enum NotOpened {
    /// The file system says so, or whoever holds its lock.
    Moving(MoveError),
    /// It holds what is not this session's.
    Taken(Failure),
}

impl From<MoveError> for NotOpened {
    fn from(err: MoveError) -> Self {
        Self::Moving(err)
    }
}

impl NotOpened {
    /// What a session is told.
    pub fn failure(self) -> Failure {
        match self {
            Self::Moving(err) => moving(err),
            Self::Taken(failure) => failure,
        }
    }
}

/// Opens the target directory of this machine for `session`, locks it, and looks at it again: what the check has seen may have changed
/// until then.
///
/// # Errors
/// When it cannot be worked in, or is no longer empty.
pub fn open(
    path: &std::path::Path,
    session: &str,
    replace: bool,
) -> Result<TargetDirectory, NotOpened> {
    let target = TargetDirectory::create(path, session)?;
    let mut own = match replace {
        true => Vec::new(),
        false => TargetDirectory::published(path, session)?,
    };
    if !replace {
        own.extend([SHA256SUMS, EXPORT_JSON].map(str::to_owned));
    }
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let report = TargetDirectory::inspect(path, session, &own)?;
    let found = match (report.state, report.other_sessions.first()) {
        (_, Some(other)) => format!("it belongs to session {other}"),
        (TargetState::Empty, None) => return Ok(target),
        (TargetState::HoldsExport(_), None) if replace => return Ok(target),
        (TargetState::HoldsOther(names), None) => format!("it holds `{}`", names.join("`, `")),
        (_, None) => "it holds another export".into(),
    };
    let failure = Failure::new(format!("target `{}` is no longer empty: {found}", path.display()));
    let hint = "move that away and retry, or cancel and export to another directory";
    Err(NotOpened::Taken(failure.hint(hint)))
}

#[cfg(test)]
mod tests {
    use super::is_uncompressed;

    #[test]
    fn what_pg_dump_compresses_is_not_compressed_again() {
        let cases = [
            (None, false),
            (Some("none"), true),
            (Some("0"), true),
            (Some("6"), false),
            (Some("zstd:3"), false),
        ];
        for (compress, want) in cases {
            assert_eq!(is_uncompressed(compress), want, "{compress:?}");
        }
    }
}
