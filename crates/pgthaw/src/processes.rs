//! The processes of a session: found by its marker, ended through pidfds.
//!
//! Owns the search through `/proc` and the signals. Leaves it to others to decide when a session's processes
//! have to end ([`crate::leftovers`], the server, the agent).
//!
//! A process belongs to a session when it runs as one of the session's accounts, and its environment holds
//! `PGTHAW_SESSION=<marker>` or it is a PostgreSQL process whose `cluster_name` is the marker's short form: PostgreSQL's
//! children write their title over their environment. Anybody can show a title and an environment, nobody another account.
//! No other process is ever touched, and a process id alone proves nothing: it is compared with the start time while a
//! pidfd holds on to it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use pgthaw_postgres::instance::process_title;
use rustix::io::Errno;
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

/// The environment variable that marks the processes of a session; its value is the session's marker.
pub const MARKER_VARIABLE: &str = "PGTHAW_SESSION";

/// How long [`end_all`] rests between two looks, at most.
const REST: Duration = Duration::from_millis(50);

/// How long a process may take to replace its program before it is taken for one that hides its arguments.
const REPLACING_LIMIT: Duration = Duration::from_millis(200);

/// A process, told apart from a later one with the same id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it started, in clock ticks since the machine's start (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
    /// Name of its program, as the kernel keeps it: 15 bytes at most.
    pub name: String,
    /// Its state when it was looked at, as `ps` shows it; `D` cannot be ended.
    pub state: char,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

impl Process {
    /// Returns the process that has the id `pid` now; none if there is none or only its zombie.
    pub fn with_pid(pid: u32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        parse_stat(&stat)
            .filter(|process| process.pid == pid && !matches!(process.state, 'Z' | 'X'))
    }

    /// Returns whether this very process still runs; a zombie does not.
    pub fn is_running(&self) -> bool {
        Self::with_pid(self.pid).is_some_and(|now| now.start_time == self.start_time)
    }

    /// Returns whether the process serves a FUSE mount: it holds `/dev/fuse` open.
    ///
    /// Such a process has to end first, because what waits for an answer of its mount cannot end before.
    pub fn serves_a_mount(&self) -> bool {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return false };
        let mut links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        links.any(|link| link.as_os_str().as_bytes() == b"/dev/fuse")
    }
}

/// How a session's processes are recognized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The session's marker ([`is_marker`]).
    pub marker: String,
    /// The accounts that its processes run as, by user id.
    pub accounts: Vec<u32>,
}

/// What [`end_all`] achieved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// The processes that were there and are gone.
    pub ended: Vec<Process>,
    /// The processes that did not end within the limit, with their last state.
    pub left: Vec<Process>,
}

/// Returns whether `marker` can mark a session: 16 to 63 letters, digits, `-` or `_`.
///
/// A short one could be met by chance, an empty one everywhere; PostgreSQL keeps 63 bytes of a `cluster_name`.
pub fn is_marker(marker: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (16..=63).contains(&marker.len()) && marker.bytes().all(plain)
}

/// Returns the running processes of `owner`'s session, without the calling process.
///
/// A process that was just started can be missed; whoever needs to know that there is none looks twice.
///
/// # Errors
/// `/proc` cannot be read, or the marker is none ([`is_marker`]).
pub fn find(owner: &Owner) -> io::Result<Vec<Process>> {
    let marker = &owner.marker;
    if !is_marker(marker) {
        let text = format!("`{marker}` is no marker of a session");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if pid != std::process::id()
            && is_marked(pid, owner)
            && let Some(process) = Process::with_pid(pid)
        {
            found.push(process);
        }
    }
    Ok(found)
}

/// Sends `signal` to `process` if it still is the one that was found and belongs to `owner`'s session.
///
/// Returns whether the signal was sent; a process that is gone is no error.
///
/// # Errors
/// The process may not be signalled, or the kernel has no pidfds (before Linux 5.3).
pub fn kill(process: &Process, owner: &Owner, signal: Signal) -> io::Result<bool> {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
        return Ok(false);
    };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    // The pidfd stays with one process; if the process with this id is the right one now, the pidfd is of it.
    if !is_marked(process.pid, owner) || !process.is_running() {
        return Ok(false);
    }
    match pidfd_send_signal(&pidfd, signal) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Ends all processes of `owner`'s session but the calling one and `except`, with SIGKILL, and waits until
/// they are gone, for `limit` at most.
///
/// Processes that serve a mount are killed first. What the dying ones start is ended too: the search is repeated
/// until two in a row find nothing.
///
/// # Errors
/// As [`find`]; a process that cannot be signalled is no error here but is `left`.
pub fn end_all(owner: &Owner, except: &[u32], limit: Duration) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    let (mut seen, mut looks_without) = (Vec::<Process>::new(), 0);
    let mut rest = Duration::from_millis(2);
    loop {
        let mut left = find(owner)?;
        left.retain(|process| !except.contains(&process.pid));
        left.sort_by_key(|process| !process.serves_a_mount());
        for process in &left {
            if let Err(error) = kill(process, owner, Signal::KILL) {
                tracing::warn!("cannot end {process}: {error}");
            }
            let same = |other: &Process| {
                (other.pid, other.start_time) == (process.pid, process.start_time)
            };
            if !seen.iter().any(same) {
                seen.push(process.clone());
            }
        }
        looks_without = if left.is_empty() { looks_without + 1 } else { 0 };
        if looks_without == 2 || Instant::now() >= deadline {
            seen.retain(|process| !left.iter().any(|other| other.pid == process.pid));
            return Ok(Ended { ended: seen, left });
        }
        std::thread::sleep(rest);
        rest = (rest * 2).min(REST);
    }
}

/// Returns whether the process `pid` belongs to `owner`'s session; an unreadable one does not.
///
/// While a process replaces its program it shows neither environment nor arguments: it is waited for, a little.
fn is_marked(pid: u32, owner: &Owner) -> bool {
    let Owner { marker, accounts } = owner;
    let deadline = Instant::now() + REPLACING_LIMIT;
    loop {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}"));
        let (environment, command_line) = (read("environ"), read("cmdline"));
        let empty = |bytes: &io::Result<Vec<u8>>| bytes.as_ref().is_ok_and(Vec::is_empty);
        if empty(&environment)
            && empty(&command_line)
            && has_memory(pid)
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let marked = environment_is_marked(&environment.unwrap_or_default(), marker)
            || title_is_marked(&command_line.unwrap_or_default(), marker);
        let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
        return marked && runs_as(&status, accounts);
    }
}

/// Returns whether the process has memory of its own, which the kernel's own threads and zombies have not.
fn has_memory(pid: u32) -> bool {
    let memory = fs::read(format!("/proc/{pid}/statm")).unwrap_or_default();
    !memory.is_empty() && !memory.starts_with(b"0 ")
}

/// Looks in `/proc/PID/status` whether the real or the effective user is one of `accounts`: a program with the set-user-id bit
/// (`fusermount3`) has only the first.
fn runs_as(status: &[u8], accounts: &[u32]) -> bool {
    let status = String::from_utf8_lossy(status);
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    let mut users = users.split_ascii_whitespace().take(2).filter_map(|user| user.parse().ok());
    users.any(|user| accounts.contains(&user))
}

/// Looks for the marker among the variables in `environment`, each ended by a zero byte.
fn environment_is_marked(environment: &[u8], marker: &str) -> bool {
    let wanted = format!("{MARKER_VARIABLE}={marker}");
    environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
}

/// Looks for the marker where PostgreSQL shows its `cluster_name`: in the title of a child, `postgres: NAME: …`, and
/// in the arguments of the postmaster.
fn title_is_marked(command_line: &[u8], marker: &str) -> bool {
    let name = process_title(marker);
    let title = format!("postgres: {name}: ");
    let setting = format!("cluster_name={name}");
    let mut arguments = command_line.split(|&byte| byte == 0);
    command_line.starts_with(title.as_bytes())
        || arguments
            .any(|argument| argument.strip_prefix(b"--").unwrap_or(argument) == setting.as_bytes())
}

/// Reads `/proc/PID/stat`: `pid (name) state …`, where the name may hold anything, spaces and brackets too.
fn parse_stat(stat: &[u8]) -> Option<Process> {
    let stat = String::from_utf8_lossy(stat);
    let (before, after) = stat.rsplit_once(')')?;
    let (pid, name) = before.split_once(" (")?;
    let fields: Vec<&str> = after.split_ascii_whitespace().collect(); // begins with field 3, the state
    Some(Process {
        pid: pid.parse().ok()?,
        start_time: fields.get(22 - 3)?.parse().ok()?,
        name: name.into(),
        state: fields.first()?.chars().next()?,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    /// A child that is ended with the test.
    struct Planted(Child);

    impl Planted {
        fn sleep(change: impl FnOnce(&mut Command)) -> Self {
            let mut command = Command::new("sleep");
            command.arg("300");
            change(&mut command);
            Self(command.spawn().expect("start `sleep`"))
        }

        /// Waits until the child runs its own program, with its own environment.
        fn started(self) -> Self {
            let deadline = Instant::now() + Duration::from_secs(10);
            while Process::with_pid(self.0.id()).is_none_or(|process| process.name != "sleep") {
                assert!(Instant::now() < deadline, "`sleep` did not start");
                std::thread::sleep(Duration::from_millis(2));
            }
            self
        }
    }

    impl Drop for Planted {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn new_marker(name: &str) -> String {
        format!("{name}-test-{}-0123456789abcdef", std::process::id())
    }

    fn owned_by_us(marker: &str) -> Owner {
        let accounts = vec![rustix::process::geteuid().as_raw()];
        Owner { marker: marker.into(), accounts }
    }

    #[test]
    fn markers_are_long_and_plain() {
        let cases = [
            ("", false),
            ("short", false),
            ("0123456789abcdef", true),
            ("0123456789abcde", false),
            ("0123456789abcdef ", false),
            ("0123456789abcdef\0", false),
        ];
        for (marker, want) in cases {
            assert_eq!(is_marker(marker), want, "{marker:?}");
        }
        assert!(is_marker(&"a".repeat(63)) && !is_marker(&"a".repeat(64)));
        assert_eq!(find(&owned_by_us("")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn recognizes_environments_and_titles() {
        let marker = "0123456789abcdef";
        let environments: [(&[u8], bool); 5] = [
            (b"PATH=/bin\0PGTHAW_SESSION=0123456789abcdef\0HOME=/\0", true),
            (b"PGTHAW_SESSION=0123456789abcdefg\0", false),
            (b"XPGTHAW_SESSION=0123456789abcdef\0", false),
            (b"NOTE=see PGTHAW_SESSION=0123456789abcdef\0", false),
            (b"", false),
        ];
        for (environment, want) in environments {
            assert_eq!(
                environment_is_marked(environment, marker),
                want,
                "{}",
                environment.escape_ascii()
            );
        }
        let titles: [(&[u8], bool); 7] = [
            (b"postgres: pgthaw-01234567: checkpointer \0\0\0", true),
            (b"postgres: pgthaw-01234567: postgres crm [local] COPY", true),
            (b"/usr/lib/postgresql/15/bin/postgres\0-c\0cluster_name=pgthaw-01234567\0", true),
            (b"postgres\0--cluster_name=pgthaw-01234567\0-D\0/data\0", true),
            (b"postgres: 01234567: checkpointer", false),
            (b"grep\x000123456789abcdef\0", false),
            (b"vi\0/var/tmp/0123456789abcdef/log\0", false),
        ];
        for (title, want) in titles {
            assert_eq!(title_is_marked(title, marker), want, "{}", title.escape_ascii());
        }
    }

    #[test]
    fn reads_stat_lines() {
        let rest = "1 1 1 0 -1 4194304 1 0 0 0 5 6 0 0 20 0 1 0 4711 1000 10";
        let process = parse_stat(format!("42 (a) b (c) D {rest}\n").as_bytes()).unwrap();
        let want = Process { pid: 42, start_time: 4711, name: "a) b (c".into(), state: 'D' };
        assert_eq!(process, want);
        for bad in [
            "",
            "42",
            "42 (x",
            "42 (x) S 1 2",
            "x (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
        ] {
            assert_eq!(parse_stat(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn ends_marked_processes_and_no_others() {
        let (marker, other) = (new_marker("ends"), new_marker("other"));
        let by_environment = Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &marker)).started();
        let by_title = Planted::sleep(|c| {
            _ = c.arg0(format!("postgres: {}: walwriter ", process_title(&marker)))
        })
        .started();
        let kept = Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &marker)).started();
        let mut strangers = [
            Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &other)).started(),
            Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, format!("{marker}x"))).started(),
            Planted::sleep(|c| _ = c.arg0(format!("less {marker}"))).started(),
        ];
        let mut pids: Vec<u32> =
            find(&owned_by_us(&marker)).unwrap().iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        let mut want = vec![by_environment.0.id(), by_title.0.id(), kept.0.id()];
        want.sort_unstable();
        assert_eq!(pids, want);

        let ended =
            end_all(&owned_by_us(&marker), &[kept.0.id()], Duration::from_secs(10)).unwrap();
        assert_eq!(ended.left, []);
        assert_eq!(ended.ended.len(), 2);
        assert!(ended.ended.iter().all(|process| !process.is_running()), "zombies count as gone");
        assert_eq!(find(&owned_by_us(&marker)).unwrap().len(), 1);
        for stranger in &mut strangers {
            assert_eq!(stranger.0.try_wait().unwrap(), None, "a stranger was ended");
        }
    }

    #[test]
    fn what_another_account_shows_proves_nothing() {
        let marker = new_marker("account");
        let title = format!("postgres: {}: checkpointer ", process_title(&marker));
        let planted = Planted::sleep(|c| _ = c.arg0(title).env(MARKER_VARIABLE, &marker)).started();
        let process = Process::with_pid(planted.0.id()).unwrap();
        let ours = rustix::process::geteuid().as_raw();
        for (accounts, want) in [(vec![], 0), (vec![ours + 1], 0), (vec![ours + 1, ours], 1)] {
            let owner = Owner { marker: marker.clone(), accounts };
            assert_eq!(find(&owner).unwrap().len(), want, "{owner:?}");
            assert!(want == 1 || !kill(&process, &owner, Signal::KILL).unwrap(), "{owner:?}");
        }
        assert!(process.is_running());
        let status = b"Name:\tx\nUid:\t1000\t0\t7\t8\nGid:\t9\t9\t9\t9\n";
        for (account, want) in [(1000, true), (0, true), (7, false), (9, false)] {
            assert_eq!(runs_as(status, &[account]), want, "{account}");
        }
    }

    #[test]
    fn kills_only_the_process_that_was_found() {
        let marker = new_marker("found");
        let mut planted = Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &marker)).started();
        let process = Process::with_pid(planted.0.id()).unwrap();
        let earlier = Process { start_time: process.start_time - 1, ..process.clone() };
        assert!(
            !kill(&earlier, &owned_by_us(&marker), Signal::KILL).unwrap(),
            "another start time"
        );
        assert!(
            !kill(&process, &owned_by_us(&new_marker("wrong")), Signal::KILL).unwrap(),
            "another marker"
        );
        assert_eq!(planted.0.try_wait().unwrap(), None);
        assert!(kill(&process, &owned_by_us(&marker), Signal::KILL).unwrap());
        planted.0.wait().unwrap();
        assert!(!kill(&process, &owned_by_us(&marker), Signal::KILL).unwrap(), "gone");
    }

    #[test]
    fn tells_who_serves_a_mount() {
        let Ok(device) = fs::File::open("/dev/fuse") else { return }; // no FUSE on this machine
        let marker = new_marker("mount");
        let serving =
            Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &marker).stdin(device)).started();
        let other = Planted::sleep(|c| _ = c.env(MARKER_VARIABLE, &marker)).started();
        assert!(Process::with_pid(serving.0.id()).unwrap().serves_a_mount());
        assert!(!Process::with_pid(other.0.id()).unwrap().serves_a_mount());
    }
}
