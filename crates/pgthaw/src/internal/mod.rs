//! The children that pgthaw starts of itself. Nobody types these; they talk over pipes.
//!
//! | child    | what it does                                    | identity when pgthaw was started as root |
//! |----------|-------------------------------------------------|------------------------------------------|
//! | `source` | reads a repository: backups, facts, the map     | the repository's owner                   |
//! | `check`  | checks everything before anything is touched    | root                                     |
//! | `agent`  | one session on this machine, see [`crate::agent`] | root                                   |
//! | `mount`  | serves one mount                                | the repository's owner; `--os-user` where the repository is elsewhere |
//! | `root`   | builds a root of its own for PostgreSQL or pg_dump, and starts it there | root outside; `--os-user` inside |
//! | `reads`  | reads stored objects for another machine's mount | the repository's owner                  |

pub mod mount;
pub mod reads;
pub mod source;
pub mod wal;

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use clap::ValueEnum;
use pgthaw_postgres::root::Helper;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncWriteExt;

use crate::wire::ApiError;

/// Which child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Child {
    /// Reads a repository.
    Source,
    /// Checks everything before anything is touched.
    Check,
    /// One session on this machine.
    Agent,
    /// Serves one mount.
    Mount,
    /// Reads stored objects for another machine's mount.
    Reads,
    /// Builds a root of its own for a program, and starts it there.
    Root,
}

/// Runs as the child `which`; its task comes on standard input, or as `task` where that is taken by something else.
pub fn run(which: Child, task: &[String]) -> ExitCode {
    let _ = rustix::thread::set_name(c"pgthaw"); // started through /proc/self/exe, which would show as `exe`
    match which {
        Child::Source => source::run(),
        Child::Check => check(),
        Child::Agent => crate::agent::run(),
        Child::Mount => mount::run(),
        Child::Reads => reads::run(task.first().map(String::as_str).unwrap_or_default()),
        Child::Root => pgthaw_postgres::root::init::run(task),
    }
}

/// Prepares the start of the child `which`: this very program, whatever has become of its file.
pub fn command(which: Child) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let name = which.to_possible_value().expect("no child is hidden");
    command.arg0("pgthaw").args(["internal", name.get_name()]).current_dir("/");
    command
}

/// How the child [`Child::Root`] is started, by whoever starts a program of PostgreSQL's.
pub fn root_helper() -> Helper {
    let name = Child::Root.to_possible_value().expect("no child is hidden");
    Helper {
        program: "/proc/self/exe".into(),
        arguments: vec!["internal".into(), name.get_name().into()],
    }
}

/// Makes `command` run with this user and group, and no other group, when we are root; otherwise it stays ours.
pub fn run_as_ids(command: &mut Command, uid: u32, gid: u32) {
    if !rustix::process::geteuid().is_root() || uid == 0 {
        return;
    }
    let set = move || {
        // SAFETY: plain system calls on values; they are async-signal-safe.
        let done = unsafe {
            libc::setgroups(1, &gid) == 0 && libc::setgid(gid) == 0 && libc::setuid(uid) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure only makes system calls.
    unsafe { command.pre_exec(set) };
}

/// Runs the child `which` on `task`, as `ids` when we are root, and returns what it printed. A child that fails prints an
/// [`ApiError`]. It ends with the caller's interest: when this future is dropped.
///
/// # Errors
/// What the child says, or that it cannot be run.
pub async fn ask(
    which: Child,
    ids: Option<(u32, u32)>,
    task: &(impl Serialize + Sync),
) -> Result<Vec<u8>, ApiError> {
    let name =
        which.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let failed = |what: &str, err: io::Error| {
        ApiError::broken(format!("{what} pgthaw's child `{name}`: {err}"))
    };
    let mut command = command(which);
    if let Some((uid, gid)) = ids {
        run_as_ids(&mut command, uid, gid);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = tokio::process::Command::from(command).kill_on_drop(true).spawn();
    let mut child = child.map_err(|err| failed("start", err))?;
    let task = serde_json::to_vec(task).expect("a task is plain data");
    let input = child.stdin.take();
    let feed = async move {
        if let Some(mut input) = input {
            let _ = input.write_all(&task).await; // a child that ended early says why itself
        }
    };
    let ((), output) = tokio::join!(feed, child.wait_with_output());
    let output = output.map_err(|err| failed("read the answer of", err))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        ApiError::broken(format!(
            "pgthaw's child `{name}` ended with {}: {}",
            output.status,
            said.trim()
        ))
    }))
}

/// Reads a task from standard input, to its end.
fn task<T: DeserializeOwned>() -> io::Result<T> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::other)
}

/// The check before anything is touched: a task in, a report out.
fn check() -> ExitCode {
    let report = task().map(|task| crate::agent::check::run(&task));
    match report.and_then(|report| {
        serde_json::to_writer(io::stdout().lock(), &report).map_err(io::Error::other)
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}
