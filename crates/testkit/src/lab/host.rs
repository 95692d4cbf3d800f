//! One host of a lab: its namespaces, its boots, its users, and how a test looks into it from outside.
//!
//! Its disks and cables are the floor's and outlive it; its PID, mount, UTS, IPC and network namespaces begin
//! with each boot and end with its first process.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::CWD;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};
use rustix::process::{Pid, Signal, kill_process};

use super::accounts::{self, Accounts};
use super::floor::{Floor, feed, outside};
use super::init::Init;
use super::links::{self, Links};
use super::plan::HostPlan;
use crate::canary::is_canary;
use crate::user::User;

/// A host; its methods panic while it is down.
#[derive(Debug)]
pub struct Host {
    pub(super) plan: HostPlan,
    pub(super) number: usize,
    floor: Arc<Floor>,
    links: Arc<Links>,
    /// The arguments of `boot.sh`.
    boot: Vec<String>,
    init: Mutex<Option<Init>>,
}

/// A process of a host, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostProcess {
    /// Its pid as the test sees it.
    pub pid: i32,
    /// Its pid as the host sees it.
    pub inner_pid: i32,
    /// Its user's id.
    pub uid: u32,
    /// Its arguments, separated by spaces.
    pub arguments: String,
}

impl HostProcess {
    /// Returns whether it belongs to the running cluster of [`crate::Lab::place_canaries`].
    pub fn is_canary(&self) -> bool {
        is_canary(&self.arguments)
    }

    /// Sends it a signal; one that has ended by now is no error.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid) {
            let _ = kill_process(pid, signal);
        }
    }
}

impl Host {
    /// Boots a host for the first time and makes its accounts. `first_share` is the number of its first share on
    /// the floor; its lasting disks must be there.
    pub(super) fn new(
        plan: HostPlan,
        number: usize,
        first_share: usize,
        floor: &Arc<Floor>,
        links: &Arc<Links>,
    ) -> Self {
        let mut boot = vec![plan.name.clone()];
        for (share, (_, at)) in plan.shares().iter().enumerate() {
            boot.extend([Floor::share(first_share + share).display().to_string(), at.clone()]);
        }
        let fstab = floor.path(format!("{}/fstab", plan.place()));
        fs::write(fstab, plan.fstab()).expect("a file of the floor");
        let (floor, links) = (floor.clone(), links.clone());
        let host = Self { plan, number, floor, links, boot, init: Mutex::default() };
        host.power_on();
        host.make_accounts();
        host
    }

    fn make_accounts(&self) {
        let read =
            |path: &str| fs::read_to_string(path).unwrap_or_else(|err| panic!("{path}: {err}"));
        let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
        let made = Accounts::new(&passwd, &group, self.number, &self.plan.users);
        self.write("/etc/passwd", &made.passwd, 0o644);
        self.write("/etc/group", &made.group, 0o644);
        self.write("/etc/shadow", &made.shadow, 0o600);
        self.write("/etc/hostname", &format!("{}\n", self.name()), 0o644);
        for name in &self.plan.users {
            let (user, home) = self.account(name);
            self.make_dir(&home, 0o700, &user);
        }
    }

    /// Returns its name, which is also its host name.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// Returns its address, which it has on all its interfaces. An interface is called like the host behind it.
    pub fn address(&self) -> Ipv4Addr {
        links::address(self.number)
    }

    /// Returns the pid of its first process as the test sees it. `/proc/PID/ns` has the host's namespaces.
    pub fn init(&self) -> i32 {
        self.state().as_ref().unwrap_or_else(|| panic!("{} is down", self.name())).pid()
    }

    /// Returns the path by which the test reaches a file of the host. Absolute symlinks on the way lead into the
    /// machine.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        outside(self.init(), inside.as_ref())
    }

    /// Returns one of its accounts, to own files of the host.
    pub fn user(&self, name: &str) -> User {
        self.account(name).0
    }

    pub(super) fn account(&self, name: &str) -> (User, PathBuf) {
        let passwd = fs::read_to_string(self.path("/etc/passwd")).expect("made by us");
        accounts::find(&passwd, name)
            .unwrap_or_else(|| panic!("{} has no user {name}", self.name()))
    }

    /// Returns a command that will run as one of its users in his home directory, with the environment of a new
    /// login and without a terminal.
    ///
    /// The child is `nsenter`, which hands on the exit status but no signals: to signal the program itself, find
    /// it by [`Host::processes`].
    pub fn command(&self, user: &str, program: impl AsRef<OsStr>) -> Command {
        let (account, home) = self.account(user);
        let mut command = self.enter();
        command.arg(format!("--wdns={}", home.display())).args(["--", "setpriv"]);
        command.args(["--reuid", &account.uid.to_string(), "--regid", &account.gid.to_string()]);
        command.args(["--init-groups", "--"]).arg(program);
        let system = if account.uid == 0 { ":/usr/local/sbin:/usr/sbin:/sbin" } else { "" };
        command.env_clear().env("PATH", format!("/usr/local/bin:/usr/bin:/bin{system}"));
        command.env("HOME", home).env("USER", user).env("LOGNAME", user);
        command.env("SHELL", "/bin/bash").env("LANG", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// Runs a shell script in it as root.
    ///
    /// # Panics
    /// With all it said, at the first command that fails.
    #[track_caller]
    pub fn script(&self, text: &str) {
        feed(self.enter().args(["--", "sh", "-eu"]), text);
    }

    /// Returns an unfinished `nsenter` into all its namespaces.
    pub(super) fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init().to_string()]);
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid"]);
        command
    }

    /// Returns its processes, zombies aside, also those in process namespaces that were made on it.
    pub fn processes(&self) -> Vec<HostProcess> {
        let parent = |pid: i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<i32>().ok()
        };
        let entries = fs::read_dir("/proc").expect("a mounted /proc").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let parents: HashMap<i32, i32> = pids.filter_map(|pid| Some((pid, parent(pid)?))).collect();
        let init = self.init();
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(init).expect("a process that runs");
        let here = |pid: &i32| namespace(*pid).is_some_and(|found| found == own);
        let entered: HashSet<i32> = parents.keys().copied().filter(here).collect();
        let is_inside = |pid: &i32| {
            std::iter::successors(Some(*pid), |pid| parents.get(pid).copied())
                .any(|pid| entered.contains(&pid))
        };
        let depth = numbers(init).len();
        let inside = parents.keys().filter(|pid| is_inside(pid));
        inside.filter_map(|pid| describe(*pid, depth)).collect()
    }

    /// Gives a disk another size in bytes: larger, or as small as what it holds, and it is full.
    pub fn resize(&self, disk: &str, bytes: u64) {
        assert!(self.plan.disks().any(|at| at == disk), "{} has no disk {disk}", self.name());
        let resize = || {
            let context = fspick(CWD, self.path(disk), FsPickFlags::FSPICK_CLOEXEC)?;
            fsconfig_set_string(&context, "size", bytes.to_string())?;
            fsconfig_reconfigure(&context)
        };
        resize().unwrap_or_else(|err| panic!("{disk} of {}, {bytes} bytes: {err}", self.name()));
    }

    /// Returns the bytes that are free where `path` is.
    pub fn free(&self, path: &str) -> u64 {
        let found = rustix::fs::statvfs(self.path(path));
        let found = found.unwrap_or_else(|err| panic!("{path} of {}: {err}", self.name()));
        found.f_bavail * found.f_frsize
    }

    /// Ends the host as a power failure does: nobody hears of it, and all its processes are gone when this returns.
    pub fn crash(&self) {
        let init = self.state().take().unwrap_or_else(|| panic!("{} is down", self.name()));
        self.links.detach(self.number);
        drop(init);
    }

    /// Starts a crashed host again: its disks have what they had, but `/tmp`, `/run` and `/dev/shm` are empty. Its
    /// sshd runs.
    pub fn boot(&self) {
        self.power_on();
        self.start_sshd();
    }

    /// [`Host::crash`] and [`Host::boot`].
    pub fn reboot(&self) {
        self.crash();
        self.boot();
    }

    /// Makes the host's namespaces and plugs its cables in.
    pub(super) fn power_on(&self) {
        let mut state = self.state();
        assert!(state.is_none(), "{} runs already", self.name());
        let mut command = self.floor.enter();
        // In the floor's PID namespace, so that the host ends with it.
        command.args(["--pid", "--", "unshare"]);
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--"]);
        command.args(["sh", "-c", include_str!("boot.sh"), "boot"]).args(&self.boot);
        let init = Init::start(command.stdin(Stdio::null()));
        self.links.attach(self.number, init.pid());
        *state = Some(init);
    }

    /// Returns whether it runs.
    pub(super) fn is_up(&self) -> bool {
        self.state().is_some()
    }

    fn state(&self) -> MutexGuard<'_, Option<Init>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a file of the host's root.
    pub(super) fn write(&self, path: &str, text: &str, mode: u32) {
        let outside = self.path(path);
        fs::write(&outside, text)
            .and_then(|()| fs::set_permissions(&outside, Permissions::from_mode(mode)))
            .unwrap_or_else(|err| panic!("{path} of {}: {err}", self.name()));
    }

    /// Makes a directory of a user.
    pub(super) fn make_dir(&self, path: &Path, mode: u32, owner: &User) {
        let outside = self.path(path);
        fs::create_dir(&outside)
            .and_then(|()| fs::set_permissions(&outside, Permissions::from_mode(mode)))
            .and_then(|()| chown(&outside, Some(owner.uid), Some(owner.gid)))
            .unwrap_or_else(|err| panic!("{} of {}: {err}", path.display(), self.name()));
    }
}

/// Returns the numbers that a process has, from our namespace inwards.
fn numbers(pid: i32) -> Vec<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

/// Returns what `/proc` says of a process of a host that has `depth` numbers for its own; `None` if it has ended by now.
fn describe(pid: i32, depth: usize) -> Option<HostProcess> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end().to_owned();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let inner_pid = *numbers(pid).get(depth.checked_sub(1)?)?;
    let uid = field("Uid:")?.split_whitespace().next()?.parse().ok()?;
    (!arguments.is_empty()).then_some(HostProcess { pid, inner_pid, uid, arguments })
}
