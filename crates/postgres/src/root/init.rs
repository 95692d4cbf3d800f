//! The helper process: it makes the namespaces, becomes the right account, and is process 1 inside.
//!
//! ```text
//! agent ── helper                      outside; waits, and ends as the program ended
//!            └─ init (process 1)       inside; starts the program, reaps, passes signals on
//!                 └─ postgres or pg_dump (process 2) …
//! ```
//!
//! PostgreSQL must not be process 1: it would take a killed orphan for a crashed backend and shut down. When init
//! ends, the kernel ends everything inside, whatever a backup's code has done to get away from it. Init ends when the
//! helper does (parent-death signal, and the end of a pipe for the moment before that is set: `getppid` says 0 inside),
//! and the helper ends with the process that started it. Nothing inside runs as root. Start at [`run`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};

use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::build::{BuildError, build};
use super::{Program, Report, RootPlan, handed_over, surface};

/// How readily the kernel ends what runs inside when memory runs out, before anything of this machine (0 is usual, 1000
/// the most; `proc(5)`, `oom_score_adj`).
const FIRST_OUT_OF_MEMORY: &str = "500";

/// Descriptors that are closed one by one where the kernel cannot close a range of them.
const MOST_DESCRIPTORS: i32 = 1 << 16;

/// Runs as the helper; `numbers` are the descriptors of the plan and of the report.
pub fn run(numbers: &[String]) -> ExitCode {
    let taken = match numbers {
        [plan, report] => handed_over(plan).and_then(|plan| Ok((plan, handed_over(report)?))),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    let Ok((plan, mut report)) = taken else {
        eprintln!("pgthaw: this command is not for people");
        return ExitCode::from(2);
    };
    let outcome = read(plan).and_then(|plan| outside(&plan, &mut report));
    match outcome {
        Ok(status) => end_as(status),
        Err(error) => {
            tell(&mut report, &refused(&error));
            ExitCode::FAILURE
        }
    }
}

fn refused(error: &BuildError) -> Report {
    Report::Failed(error.to_string(), error.source.raw_os_error())
}

fn tell(report: &mut File, what: &Report) {
    let bytes = postcard::to_stdvec(what).unwrap_or_default();
    let _ = report.write_all(&bytes); // nobody is left who would listen
}

fn read(mut plan: File) -> Result<RootPlan, BuildError> {
    let mut bytes = Vec::new();
    let read = io::Seek::rewind(&mut plan).and_then(|()| plan.read_to_end(&mut bytes));
    let plan = read.and_then(|_| postcard::from_bytes(&bytes).map_err(io::Error::other));
    plan.map_err(failed("read what to build"))
}

fn failed<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> BuildError {
    move |source| BuildError { what: what.into(), source: source.into() }
}

/// Ends as the program did, so that our parent sees what it would see of the program itself.
fn end_as(status: ExitStatus) -> ExitCode {
    let Some(signal) = status.signal() else {
        return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
    };
    // SAFETY: system calls on numbers; the signal ends this process, which has nothing to lose.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::kill(libc::getpid(), signal);
    }
    ExitCode::FAILURE
}

/// The part outside: namespaces that only children enter, then waiting.
fn outside(plan: &RootPlan, report: &mut File) -> Result<ExitStatus, BuildError> {
    // Higher is always allowed, so this only fails without /proc.
    let _ = std::fs::write("/proc/self/oom_score_adj", FIRST_OUT_OF_MEMORY);
    let root = rustix::process::geteuid().is_root();
    if root {
        enter(UnshareFlags::NEWPID).map_err(failed("make a namespace of processes"))?;
    } else {
        enter_user_namespace(UnshareFlags::NEWPID)?;
    }
    let (alive, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe"))?;
    let (ended, told) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe"))?;
    // SAFETY: this process has one thread, so its child may do whatever this process may.
    match unsafe { libc::fork() } {
        -1 => Err(failed("start process 1 of a namespace")(io::Error::last_os_error())),
        0 => {
            drop((ours, ended));
            let inside = Inside { plan, root, alive, told: File::from(told) };
            if let Err(error) = inside.be_init(report) {
                tell(report, &refused(&error));
            }
            // SAFETY: ends the child without running the exit handlers of its parent.
            unsafe { libc::_exit(1) }
        }
        init => {
            drop((alive, told));
            close_report(report)?;
            let status = wait_for(init).map_err(failed("wait for process 1 of a namespace"))?;
            drop(ours);
            let mut bytes = [0; 4];
            let told = File::from(ended).read_exact(&mut bytes);
            Ok(told.map_or(status, |()| ExitStatus::from_raw(i32::from_ne_bytes(bytes))))
        }
    }
}

/// Only process 1 speaks from now on; our parent listens until everybody has closed this.
fn close_report(report: &mut File) -> Result<(), BuildError> {
    let nowhere = File::options().write(true).open("/dev/null");
    let nowhere = nowhere.map_err(failed("open `/dev/null`"))?;
    *report = nowhere;
    Ok(())
}

fn wait_for(child: libc::pid_t) -> io::Result<ExitStatus> {
    let mut status = 0;
    // SAFETY: waits for our own child; `status` is ours.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(ExitStatus::from_raw(status))
}

fn enter(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: none of the flags unshares descriptors, so no descriptor that others hold is changed.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Enters a user namespace that knows only our own user and group, and `further` ones.
fn enter_user_namespace(further: UnshareFlags) -> Result<(), BuildError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    enter(UnshareFlags::NEWUSER | further).map_err(failed("make a user namespace"))?;
    for (file, content) in [
        ("/proc/self/setgroups", "deny".into()),
        ("/proc/self/uid_map", format!("{uid} {uid} 1")),
        ("/proc/self/gid_map", format!("{gid} {gid} 1")),
    ] {
        std::fs::write(file, content).map_err(failed(&format!("write `{file}`")))?;
    }
    Ok(())
}

/// The child that becomes process 1.
struct Inside<'a> {
    plan: &'a RootPlan,
    root: bool,
    /// Ends when the helper does.
    alive: OwnedFd,
    /// Takes the program's wait status.
    told: File,
}

impl Inside<'_> {
    /// Builds the root, gives all rights away, starts the program, and ends when it has ended.
    fn be_init(mut self, report: &mut File) -> Result<(), BuildError> {
        rustix::process::setsid().map_err(failed("start a session of processes"))?;
        let others = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        enter(others).map_err(failed("make namespaces for mounts, network and memory"))?;
        rustix::system::sethostname(b"pgthaw").map_err(failed("name the machine inside"))?;
        let running = processes_of(self.plan.ids.0);
        let own = [self.alive.as_raw_fd(), self.told.as_raw_fd(), report.as_raw_fd()];
        close_all_but(&[&[0, 1, 2], &own[..]].concat());
        build(&self.plan.steps)?;
        self.give_rights_away(running)?;
        let Some(program) = &self.plan.program else {
            tell(report, &Report::Built);
            self.ended(ExitStatus::from_raw(0));
        };
        let signals = watched_signals().map_err(failed("watch for signals"))?;
        surface::refuse_calls().map_err(failed("refuse system calls (seccomp)"))?;
        let child = start(program)
            .map_err(failed(&format!("start `{}` in its root", program.path.display())))?;
        tell(report, &Report::Started(child));
        close_all_but(&[self.alive.as_raw_fd(), self.told.as_raw_fd(), signals.as_raw_fd()]);
        let status = self.look_after(child, signals);
        self.ended(status)
    }

    /// Becomes the account that runs the program, without any right beyond its own, now or later.
    fn give_rights_away(&self, running: u64) -> Result<(), BuildError> {
        let (uid, gid, groups) = &self.plan.ids;
        for capability in CapabilitySet::all().iter() {
            // One that this kernel does not know cannot be there either.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
        if self.root {
            // SAFETY: system calls on values and an array that lives until they return; this process has one thread.
            let done = unsafe {
                libc::setgroups(groups.len(), groups.as_ptr()) == 0
                    && libc::setgid(*gid) == 0
                    && libc::setuid(*uid) == 0
            };
            if !done {
                return Err(failed("become the account that runs PostgreSQL")(
                    io::Error::last_os_error(),
                ));
            }
        }
        let none = CapabilitySet::empty();
        let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, none).map_err(failed("give capabilities away"))?;
        rustix::thread::set_no_new_privs(true).map_err(failed("refuse new rights"))?;
        surface::limit(running).map_err(failed("limit the number of processes"))?;
        // The kernel forgets this at each change of identity, so it comes last.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(failed("end with the process outside"))?;
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(failed("hide from the other processes inside"))?;
        if self.is_alone() {
            return Err(failed("look after the process outside")(io::Error::from(
                io::ErrorKind::BrokenPipe,
            )));
        }
        Ok(())
    }

    /// Whether the helper has ended.
    fn is_alone(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.alive, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
    }

    /// Reaps whatever ends, passes signals on, until the program has ended.
    fn look_after(&self, child: u32, mut signals: File) -> ExitStatus {
        loop {
            let mut fds = [
                PollFd::new(&self.alive, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            ];
            if rustix::event::poll(&mut fds, None).is_err() {
                continue; // interrupted
            }
            if !fds[0].revents().is_empty() {
                // SAFETY: ends this process, and with it everything inside.
                unsafe { libc::_exit(1) }
            }
            // `struct signalfd_siginfo` (signalfd(2)): 128 bytes, the signal's number first
            let mut info = [0_u8; 128];
            if signals.read_exact(&mut info).is_err() {
                continue;
            }
            match i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) {
                libc::SIGCHLD => {
                    if let Some(status) = reap(child) {
                        return status;
                    }
                }
                // SAFETY: a system call on numbers; the child is not reaped yet, so its number is its own.
                signal => _ = unsafe { libc::kill(child.cast_signed(), signal) },
            }
        }
    }

    /// Ends, and with it everything that is left inside.
    fn ended(&mut self, status: ExitStatus) -> ! {
        let _ = self.told.write_all(&status.into_raw().to_ne_bytes()); // the helper is gone then
        // SAFETY: ends this process.
        unsafe { libc::_exit(0) }
    }
}

/// Reaps all that have ended; returns the status of `child` if it is among them.
fn reap(child: u32) -> Option<ExitStatus> {
    let mut found = None;
    loop {
        let mut status = 0;
        // SAFETY: waits for any child of ours without waiting; `status` is ours.
        match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
            ended if ended > 0 => {
                if ended.cast_unsigned() == child {
                    found = Some(ExitStatus::from_raw(status));
                }
            }
            _ => return found,
        }
    }
}

/// Counts the processes and threads of an account: where the account has no user namespace of its own, or before Linux
/// 5.14, the kernel's limit counts those of the whole machine.
fn processes_of(uid: u32) -> u64 {
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    let owned = |entry: io::Result<std::fs::DirEntry>| {
        use std::os::unix::fs::MetadataExt;
        let entry = entry.ok()?;
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let threads = std::fs::read_dir(entry.path().join("task")).map_or(1, Iterator::count);
        (entry.metadata().ok()?.uid() == uid).then_some(threads as u64)
    };
    entries.filter_map(owned).sum()
}

/// Blocks the signals that process 1 looks at, and returns where they arrive.
fn watched_signals() -> io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: `set` is ours and made empty before it is used; the descriptor is new.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            number => Ok(File::from_raw_fd(number)),
        }
    }
}

/// Starts the program in a process group of its own, with no signal blocked; returns its number inside.
fn start(program: &Program) -> io::Result<u32> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).env_clear();
    command.envs(program.environment.iter().map(|(name, value)| (name, value)));
    command.current_dir(&program.directory).process_group(0);
    let unblock = || {
        // SAFETY: system calls on a set that is ours; async-signal-safe.
        unsafe {
            let mut none = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut none);
            match libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    };
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls.
    unsafe { command.pre_exec(unblock) };
    Ok(command.spawn()?.id()) // reaped by `reap`, as everything is
}

/// Closes everything but `kept`: the program's streams stay with the program.
fn close_all_but(kept: &[i32]) {
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let mut from = 0;
    for number in kept.into_iter().chain([i32::MAX]) {
        if number > from {
            // SAFETY: whatever in this process owns one of these descriptors is not used and not dropped any more: the process
            // ends without coming back to it.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, from, number - 1, 0) };
            // before Linux 5.9, one by one; nobody has more than this
            let last = if closed == 0 { from } else { number.min(MOST_DESCRIPTORS) };
            for number in from..last {
                // SAFETY: as above.
                unsafe { libc::close(number) };
            }
        }
        from = number.saturating_add(1);
    }
}
