//! Canaries on hosts: production where each backup of the fixture says that its tablespace is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Lab;
use super::host::Host;
use crate::canary::{Flock, Ground, Places};
use crate::user::User;

/// A directory of each host, for its canaries alone.
const DIR: &str = "/var/lib/production";
/// Where Debian's clusters have their sockets, and all programs look by default.
const SOCKETS: &str = "/run/postgresql";

/// What is on one host.
#[derive(Debug)]
pub(super) struct HostCanaries {
    host: String,
    account: String,
    flock: Flock,
    /// The pid of the host's first process when they were put there.
    init: i32,
}

/// A host, seen by one of its accounts.
struct OnHost<'a> {
    host: &'a Host,
    account: &'a str,
    owner: User,
}

impl<'a> OnHost<'a> {
    fn new(host: &'a Host, account: &'a str) -> Self {
        Self { host, account, owner: host.user(account) }
    }

    /// Makes a directory of the owner, and those above it.
    fn make(&self, dir: &Path) {
        fs::create_dir_all(self.path(dir)).expect("directory of a host");
        self.owner.take(&self.path(dir));
    }
}

impl Ground for OnHost<'_> {
    fn path(&self, inside: &Path) -> PathBuf {
        self.host.path(inside)
    }

    fn command(&self, program: &Path) -> Command {
        self.host.command(self.account, program)
    }

    fn owner(&self) -> &User {
        &self.owner
    }

    fn pid_here(&self, inside: i32) -> Option<i32> {
        let processes = self.host.processes().into_iter();
        let mut servers = processes.filter(|process| process.is_canary());
        servers.find(|process| process.inner_pid == inside).map(|process| process.pid)
    }
}

impl HostCanaries {
    pub fn place(host: &Host, account: &str, original: &Path) -> Self {
        let ground = OnHost::new(host, account);
        let above = original.parent().expect("a directory below another one");
        for dir in [Path::new(DIR), Path::new(SOCKETS), above] {
            ground.make(dir);
        }
        let places = Places {
            dir: Path::new(DIR),
            tablespace: original,
            sockets: Path::new(SOCKETS),
            port: Some(5432),
        };
        let flock = Flock::start(&ground, &places);
        Self { host: host.name().into(), account: account.into(), flock, init: host.init() }
    }

    /// Returns a line for each thing that is not as it was. A host that is down is booted for that.
    fn check(&mut self, lab: &Lab) -> Vec<String> {
        let host = lab.host(&self.host);
        if !host.is_up() {
            host.power_on();
        }
        let crashed = host.init() != self.init;
        let found = self.flock.check(&OnHost::new(host, &self.account), crashed);
        found.into_iter().map(|line| format!("{}: {line}", self.host)).collect()
    }
}

impl Lab {
    /// Puts canaries on hosts, each owned by an account there; like [`crate::Canaries`] they fail the test when the lab is
    /// dropped, unless they are as they were. The running cluster listens where every client looks by default. The stopped
    /// one has its tablespace at `original`: the location that a backup remembers.
    ///
    /// A crash of a host ends its running cluster, and nobody counts connections to the socket any more.
    pub fn place_canaries(&self, accounts: &[(&str, &str)], original: &Path) {
        for (host, account) in accounts {
            let placed = HostCanaries::place(self.host(host), account, original);
            self.canaries().push(placed);
        }
    }

    /// Ends the canaries, and returns a line for each thing that is not as it was.
    pub fn check_canaries(&self) -> Vec<String> {
        let mut canaries = std::mem::take(&mut *self.canaries());
        canaries.iter_mut().flat_map(|host| host.check(self)).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let found = self.check_canaries();
            assert!(found.is_empty(), "production was touched:\n{}", found.join("\n"));
        }
    }
}
