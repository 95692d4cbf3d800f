//! Child processes that end when we end, and what `/proc` says about them.
//!
//! [`spawn`] starts every server and `pg_dump` from one thread that lives as long as this process: the
//! kernel sends a parent-death signal when the *thread* that forked ends, and tokio's threads come and go.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe::Receiver;

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`, see `proc(5)`).
    pub start_time: u64,
}

impl ProcessId {
    /// Returns the process that has this number now; `None` if there is none.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start_time: stat(pid)?.start_time })
    }

    /// Returns whether it still runs (a zombie does not).
    pub fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|stat| stat.start_time == self.start_time && stat.state != b'Z')
    }

    /// Sends `signal` to this process and no other; one that has ended is left alone.
    ///
    /// # Errors
    /// If it may not be signalled.
    pub fn signal(self, signal: Signal) -> io::Result<()> {
        let Some(pid) = raw(self.pid) else { return Ok(()) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        if !self.is_alive() {
            return Ok(()); // the number was given away before the pidfd was opened
        }
        match rustix::process::pidfd_send_signal(&pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// What is needed of `/proc/PID/stat`.
struct Stat {
    state: u8,
    parent: u32,
    start_time: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads a line of `/proc/PID/stat`; the program's name in it may hold spaces and parentheses.
fn parse_stat(line: &[u8]) -> Option<Stat> {
    let after_name = line.iter().rposition(|byte| *byte == b')')? + 1;
    let rest = std::str::from_utf8(line.get(after_name..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// Returns the children of `parent` that run now.
pub fn children(parent: u32) -> Vec<ProcessId> {
    if let Ok(list) = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")) {
        return list
            .split_ascii_whitespace()
            .filter_map(|pid| ProcessId::of(pid.parse().ok()?))
            .collect();
    }
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() }; // a kernel without `children`
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = stat(pid)?;
        (stat.parent == parent).then_some(ProcessId { pid, start_time: stat.start_time })
    })
    .collect()
}

/// Returns the number that a process has in the innermost of its process namespaces (`NSpid` in `/proc/PID/status`).
fn innermost_number(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_ascii_whitespace().last()?.parse().ok()
}

/// Returns the command line of a process, its parts separated by spaces; empty if it cannot be read.
pub fn title(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&line).replace('\0', " ");
    text.trim().to_owned()
}

/// Returns the bytes a process has read and written so far (`/proc/PID/io`); `None` if we may not look.
pub(crate) fn transferred(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let count =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    let (read, written): (u64, u64) = (count("rchar:")?, count("wchar:")?);
    read.checked_add(written)
}

fn raw(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs `work` on the thread that never ends.
fn on_spawner<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        sender
    });
    let (sender, result) = mpsc::sync_channel(1);
    let ended = |_| io::Error::other("the thread that starts processes has ended");
    spawner
        .send(Box::new(move || {
            let _ = sender.send(work()); // the receiver waits below
        }))
        .map_err(|error| ended(error.to_string()))?;
    result.recv().map_err(|error| ended(error.to_string()))
}

/// How long a killed process may take; longer waits are inside the kernel.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A child process in a process group of its own. Dropping it neither ends nor reaps it: its owner does.
///
/// One that runs in a root of its own ([`crate::root`]) is three processes; this is their helper, which ends when all is
/// over inside, and as the program ended. Numbers and signals are the program's, but SIGKILL goes to process 1 inside,
/// which ends everything there.
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    pidfd: OwnedFd,
    id: ProcessId,
    inside: Option<Inside>,
}

/// Who runs in a root of its own, by the numbers they have outside.
#[derive(Clone, Copy, Debug)]
struct Inside {
    init: ProcessId,
    program: ProcessId,
}

/// Starts `command` in a process group of its own, with umask 077; when our process ends, however it
/// ends, it gets `death_signal`.
///
/// Whatever changes the user or the namespaces must have been added to `command` before: the kernel
/// forgets a parent-death signal at such a change.
///
/// # Errors
/// If it cannot be started.
pub fn spawn(mut command: Command, death_signal: Signal) -> io::Result<Child> {
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    command.process_group(0);
    let prepare = move || {
        // SAFETY: three system calls without memory; async-signal-safe.
        unsafe {
            libc::umask(0o077);
            let signal = death_signal.as_raw() as libc::c_ulong;
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() != parent {
                libc::_exit(1); // our process ended between fork and prctl
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls.
    unsafe { command.pre_exec(prepare) };
    let child = on_spawner(move || command.spawn())??;
    let pid = child.id();
    let id = ProcessId::of(pid).ok_or_else(|| io::Error::other("no /proc entry of a new process"));
    let pidfd = raw(pid).map_or(Err(rustix::io::Errno::SRCH), |pid| {
        rustix::process::pidfd_open(pid, PidfdFlags::empty())
    });
    match (id, pidfd) {
        (Ok(id), Ok(pidfd)) => Ok(Child { child, pidfd, id, inside: None }),
        (id, pidfd) => {
            let mut child = child;
            let _ = child.kill(); // an error only means that it ended by itself
            let _ = child.wait();
            Err(id
                .err()
                .unwrap_or_else(|| pidfd.err().map_or(io::ErrorKind::Other.into(), Into::into)))
        }
    }
}

fn pipe(end: Option<OwnedFd>) -> io::Result<Receiver> {
    let end = end.ok_or_else(|| io::Error::other("not a pipe"))?;
    Receiver::from_owned_fd(end)
}

impl Child {
    /// Returns the number and start time of the program.
    pub fn id(&self) -> ProcessId {
        self.inside.map_or(self.id, |inside| inside.program)
    }

    /// Notes that the child is the helper of a program that has the number `inside` in a root of its own. Does nothing if
    /// the program has ended already: then so does the helper.
    pub(crate) fn enter_root(&mut self, inside: u32) {
        let init = children(self.id.pid).into_iter().next();
        let program = init.and_then(|init| {
            let there = children(init.pid).into_iter();
            there.into_iter().find(|child| innermost_number(child.pid) == Some(inside))
        });
        self.inside = init.zip(program).map(|(init, program)| Inside { init, program });
    }

    /// Takes its standard input, if that was asked to be a pipe.
    pub(crate) fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Takes its standard output, which must have been asked to be a pipe.
    ///
    /// # Errors
    /// If it was not, or was taken before.
    pub(crate) fn take_stdout(&mut self) -> io::Result<Receiver> {
        pipe(self.child.stdout.take().map(OwnedFd::from))
    }

    /// Takes its standard error, which must have been asked to be a pipe.
    ///
    /// # Errors
    /// If it was not, or was taken before.
    pub(crate) fn take_stderr(&mut self) -> io::Result<Receiver> {
        pipe(self.child.stderr.take().map(OwnedFd::from))
    }

    /// Returns how it ended, if it has.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits until it ends. May be dropped and called again.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.ended().await?;
        self.child.wait()
    }

    /// Waits until it ends or `limit` has passed; `None` then.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub async fn wait_up_to(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        match tokio::time::timeout(limit, self.ended()).await {
            Ok(ended) => ended.and_then(|()| self.child.wait().map(Some)),
            Err(_) => Ok(None),
        }
    }

    /// Waits until it ends, without reaping it: its number and its group's stay taken.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: an `OwnedFd` is one open descriptor, always the same, until it is dropped with the `AsyncFd`.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        pidfd.readable().await.map(drop)
    }

    /// Waits, blocking, until it ends or `limit` has passed; `None` then.
    pub(crate) fn wait_blocking(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = std::time::Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if std::time::Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return None,
            }
        }
    }

    /// Sends `signal` to it; a process that has ended is left alone.
    pub fn signal(&self, signal: Signal) {
        let sent = match self.inside {
            None => rustix::process::pidfd_send_signal(&self.pidfd, signal).map_err(Into::into),
            Some(inside) if signal == Signal::KILL => inside.init.signal(signal),
            Some(inside) => inside.program.signal(signal),
        };
        if let Err(error) = sent {
            tracing::debug!("signal process {}: {error}", self.id().pid);
        }
    }

    /// Sends `signal` to all of its process group. Only before it was reaped: later the number may be
    /// another group's.
    pub(crate) fn signal_group(&self, signal: Signal) {
        if self.inside.is_some() && (signal == Signal::KILL || !self.id().is_alive()) {
            return self.signal(signal);
        }
        let pid = self.id().pid;
        if let Some(group) = raw(pid)
            && let Err(errno) = rustix::process::kill_process_group(group, signal)
        {
            tracing::debug!("signal process group {pid}: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_lines() {
        let line = b"42 (a) b (c) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 6 7";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.state, stat.parent, stat.start_time), (b'S', 7, 12345));
        for bad in [&b""[..], b"42", b"42 (a)", b"42 (a) S", b"42 (a) S x 1 2", b")"] {
            assert!(parse_stat(bad).is_none());
        }
    }

    #[tokio::test]
    async fn a_child_is_found_signalled_and_waited_for() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut child = spawn(command, Signal::KILL).unwrap();
        let id = child.id();
        assert!(id.is_alive());
        assert!(
            children(std::process::id()).contains(&id) || children_of_any_thread().contains(&id)
        );
        assert_eq!(child.wait_up_to(Duration::from_millis(20)).await.unwrap(), None);
        let other = ProcessId { start_time: id.start_time + 1, ..id };
        other.signal(Signal::KILL).unwrap();
        assert!(id.is_alive(), "a process with another start time is left alone");
        id.signal(Signal::TERM).unwrap();
        let status = child.wait().await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
        assert!(!id.is_alive());
        id.signal(Signal::TERM).unwrap();
    }

    /// `/proc/PID/task/TID/children` lists by thread; a server has one thread, this test has several.
    fn children_of_any_thread() -> Vec<ProcessId> {
        let own = std::process::id();
        let threads = fs::read_dir(format!("/proc/{own}/task")).unwrap();
        let lists =
            threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("children")));
        let text: Vec<String> = lists.map(Result::unwrap_or_default).collect();
        let pids = text.join(" ");
        pids.split_ascii_whitespace().filter_map(|pid| ProcessId::of(pid.parse().ok()?)).collect()
    }
}
