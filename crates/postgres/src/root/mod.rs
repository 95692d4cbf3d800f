//! A root of its own for what runs on a backup: the server, single-user mode, pg_dump, pg_dumpall.
//!
//! Nothing found inside a backup is a path, a host or a command of this machine. Settings cannot promise that
//! (replay of `CREATE TABLESPACE` works at the original's absolute location; code in a backup opens what its account
//! may open), so the kernel does: such a program sees a file system that holds its cluster, its socket, programs and
//! libraries, and nothing else, and a process, network and IPC namespace of its own.
//!
//! | file | what it owns |
//! |------|--------------|
//! | [`host`] | what this machine offers: programs' directories, libraries, `/etc` files; reads, changes nothing |
//! | [`layout`] | what the root holds, as an ordered list of [`layout::Step`]s: pure |
//! | [`build`] | carries the steps out, in the new namespaces |
//! | [`init`] | the helper process: namespaces, identity, process 1 inside |
//! | [`surface`] | what of the kernel can be reached from inside: system calls, limits |
//!
//! The helper is a process of our own program ([`Helper`]): building a root allocates and reads files, which a child
//! of a process with threads must not do between fork and exec. Start at [`start`].

pub mod build;
pub mod host;
pub mod init;
pub mod layout;
mod path_bytes;
pub mod surface;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::MemfdFlags;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::os_user::OsUser;
use crate::process::{self, Child};
use layout::Step;

/// How this very program is started as the process that builds a root: `PROGRAM ARGUMENT… PLAN REPORT`, where the
/// last two are numbers of descriptors; it calls [`init::run`] with them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Helper {
    /// The program.
    pub program: PathBuf,
    /// Its first arguments.
    pub arguments: Vec<String>,
}

/// What walls in an instance and its clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confinement {
    /// A root of its own, built by this helper.
    Root(Helper),
    /// The user has accepted that there is none (`--allow-unisolated`).
    Unisolated,
}

/// A program that is to run inside, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its path, inside as outside.
    #[serde(with = "path_bytes")]
    pub path: PathBuf,
    /// Its arguments.
    #[serde(with = "path_bytes::list")]
    pub arguments: Vec<OsString>,
    /// All of its environment: name, then value.
    #[serde(with = "path_bytes::pairs")]
    pub environment: Vec<(OsString, OsString)>,
    /// Where it starts.
    #[serde(with = "path_bytes")]
    pub directory: PathBuf,
}

/// Everything the helper has to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootPlan {
    /// What the root holds, in the order in which it is made.
    pub steps: Vec<Step>,
    /// The program; without one the root is only built and left, to see whether that can be done.
    pub program: Option<Program>,
    /// Who runs it: user, group, and all groups. Only root can run it as somebody else.
    pub ids: (u32, u32, Vec<u32>),
}

/// What the helper says once, about its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Report {
    /// The program runs, under this number inside.
    Started(u32),
    /// The root was built, and no program was asked for.
    Built,
    /// What could not be done, on which object, and the system's error number, if it is one.
    Failed(String, Option<i32>),
}

/// Why a program does not run in a root of its own.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The helper could not be run, or said nothing.
    #[error("start the process that builds a root of its own for `{program}`")]
    Helper {
        /// What was to run inside.
        program: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The kernel refused something, or something is missing.
    #[error("{0}")]
    Refused(String),
    /// What the root would have to hold cannot be put together.
    #[error(transparent)]
    Layout(#[from] layout::LayoutError),
}

/// Where a program's input comes from and its output goes.
#[derive(Debug)]
pub struct Streams {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
}

impl Streams {
    /// Nothing in, nothing out.
    pub fn null() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }
}

/// Starts the helper with `plan` and waits until the program runs inside; that takes some milliseconds. The child ends
/// with our process, and everything that was started inside ends with the child. `marker` goes into the helper's
/// environment (`PGTHAW_SESSION`).
///
/// # Errors
/// [`RootError`] naming what could not be built or run; nothing of it runs then.
pub fn start(
    helper: &Helper,
    plan: &RootPlan,
    marker: &str,
    streams: Streams,
) -> Result<Child, RootError> {
    let wanted = plan.program.as_ref().map_or("/".into(), |program| program.path.clone());
    let failed = |source| RootError::Helper { program: wanted.clone(), source };
    let (plan_file, mut report, theirs) = channels(plan).map_err(failed)?;
    let numbers = [plan_file.as_raw_fd(), theirs.as_raw_fd()];
    let mut command = Command::new(&helper.program);
    command.arg0("pgthaw").args(&helper.arguments).args(numbers.map(|number| number.to_string()));
    command.env_clear().env("PGTHAW_SESSION", marker).current_dir("/");
    command.stdin(streams.stdin).stdout(streams.stdout).stderr(streams.stderr);
    let inherit = move || {
        for number in numbers {
            // SAFETY: a system call on a number that stays open in our process until the child has started.
            if unsafe { libc::fcntl(number, libc::F_SETFD, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls.
    unsafe { command.pre_exec(inherit) };
    let mut child = process::spawn(command, Signal::KILL).map_err(failed)?;
    drop((plan_file, theirs));
    let mut said = Vec::new();
    let read = report.read_to_end(&mut said);
    match read.map(|_| postcard::from_bytes(&said)) {
        Ok(Ok(Report::Started(pid))) => {
            child.enter_root(pid);
            Ok(child)
        }
        Ok(Ok(Report::Built)) => Ok(child),
        Ok(Ok(Report::Failed(what, _))) => {
            let _ = child.wait_blocking(process::KILL_LIMIT); // it has said its last word
            Err(RootError::Refused(what))
        }
        Ok(Err(_)) => {
            child.signal(Signal::KILL);
            let status = child.wait_blocking(process::KILL_LIMIT);
            let how = status.map_or_else(|| "does not end".into(), |status| status.to_string());
            Err(failed(io::Error::other(format!("it ended without a word: {how}"))))
        }
        Err(error) => {
            child.signal(Signal::KILL);
            let _ = child.wait_blocking(process::KILL_LIMIT);
            Err(failed(error))
        }
    }
}

/// Makes what carries the plan to the helper and the report back: the plan's file, our end, the helper's end.
fn channels(plan: &RootPlan) -> io::Result<(File, File, OwnedFd)> {
    let bytes = postcard::to_stdvec(plan).map_err(io::Error::other)?;
    let memory = rustix::fs::memfd_create("pgthaw-root", MemfdFlags::CLOEXEC)?;
    let mut plan_file = File::from(memory);
    plan_file.write_all(&bytes)?;
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((plan_file, File::from(ours), theirs))
}

/// Takes over a descriptor that our parent handed to us under its number.
///
/// # Errors
/// If the number is none.
fn handed_over(number: &str) -> io::Result<File> {
    let number: i32 = number.parse().map_err(io::Error::other)?;
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `fcntl` looks whether it is open; nothing else in this process knows the number.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and ours from now on.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Returns the ids of `user`, or ours: user, group, all groups.
pub fn ids_of(user: Option<&OsUser>) -> (u32, u32, Vec<u32>) {
    match user {
        Some(user) => (user.uid, user.gid, user.groups.clone()),
        None => {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            (uid.as_raw(), gid.as_raw(), Vec::new())
        }
    }
}
