//! Production beside an export: what no export may read, write, connect to or end.
//!
//! Owns a stopped and a running cluster, each with a tablespace outside its data directory, a Unix socket, and files of the
//! account that runs PostgreSQL; and the check that all of it is as it was. Leaves to tests what they do beside it.
//!
//! Start at [`Canaries`] for this machine, at [`crate::Lab::place_canaries`] for hosts.

mod cluster;
mod listener;
mod snapshot;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use snapshot::{Look, Snapshot};

use crate::fixture::Fixture;
use crate::scratch::Scratch;
use crate::tree::chown_tree;
use crate::user::User;
use cluster::{CLUSTER_NAME, CanaryCluster};
use listener::Listener;

/// The machine that canaries are on: this one, or a host of a lab.
pub(crate) trait Ground {
    /// Returns the path by which the test reaches a file.
    fn path(&self, inside: &Path) -> PathBuf;
    /// Returns a command that will run as the owner.
    fn command(&self, program: &Path) -> Command;
    /// Returns whom the canaries belong to.
    fn owner(&self) -> &User;
    /// Returns what the test calls a process of that pid, if it runs.
    fn pid_here(&self, inside: i32) -> Option<i32>;
}

/// Where canaries are put.
#[derive(Debug)]
pub(crate) struct Places<'a> {
    /// A directory that everybody can enter, for them alone.
    pub dir: &'a Path,
    /// The stopped cluster's tablespace.
    pub tablespace: &'a Path,
    /// The directory of the running cluster's socket, which is there; and its port, a free one if it does not matter.
    pub sockets: &'a Path,
    pub port: Option<u16>,
}

/// Canaries on any machine.
#[derive(Debug)]
pub(crate) struct Flock {
    stopped: CanaryCluster,
    running: CanaryCluster,
    listener: Listener,
    /// Directories of files, as their machine has them.
    files: Vec<(PathBuf, Snapshot)>,
}

impl Flock {
    pub fn start(ground: &dyn Ground, places: &Places<'_>) -> Self {
        let dir = places.dir;
        let stopped = CanaryCluster::stopped(ground, &dir.join("stopped"), places.tablespace);
        let running = CanaryCluster::running(
            ground,
            &dir.join("running"),
            &dir.join("running_tablespace"),
            places.sockets,
            places.port,
        );
        let (private, public) = (dir.join("private"), dir.join("public"));
        let listener = write_files(ground, &private, &public);
        let files = [private, public].map(|path| {
            let before = Snapshot::of(&ground.path(&path), Look::Whole);
            (path, before)
        });
        Self { stopped, running, listener, files: files.into() }
    }

    /// Ends what runs, and returns a line for each thing that is not as it was.
    pub fn check(&mut self, ground: &dyn Ground, crashed: bool) -> Vec<String> {
        let mut found = Vec::new();
        let connected = self.listener.end();
        if connected != 0 {
            found.push(format!("{connected} connections to {}", self.listener.path().display()));
        }
        found.extend(self.running.check(ground, crashed));
        found.extend(self.stopped.check(ground, crashed));
        for (path, before) in &self.files {
            found.extend(before.differences_at(&ground.path(path), &[]));
        }
        found
    }

    /// Ends what runs.
    pub fn stop(&mut self, ground: &dyn Ground) {
        self.listener.end();
        self.running.stop(ground);
    }
}

/// Writes what an account has lying about, and a socket that listens.
fn write_files(ground: &dyn Ground, private: &Path, public: &Path) -> Listener {
    let (inside, private, public) = (private, ground.path(private), ground.path(public));
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod of a file of ours");
    };
    for (dir, name, dir_mode, file_mode) in
        [(&private, ".pgpass", 0o700, 0o600), (&public, "writable", 0o755, 0o666)]
    {
        fs::create_dir(dir).expect("directory in one of ours");
        fs::write(dir.join(name), "*:*:*:postgres:secret\n").expect("file in a directory of ours");
        mode(&dir.join(name), file_mode);
        mode(dir, dir_mode);
    }
    symlink(inside.join(".pgpass"), public.join("link")).expect("link in a directory of ours");
    let listener = Listener::bind(&public.join(".s.PGSQL.5432"));
    mode(listener.path(), 0o777);
    chown_tree(ground.owner(), &private);
    chown_tree(ground.owner(), &public);
    listener
}

/// Canaries on this machine. When they are dropped and were not [checked](Canaries::check), the test fails if they are not
/// as they were.
///
/// The cluster of the [`Fixture`] is watched too, where it lies, if it has been built.
#[derive(Debug)]
pub struct Canaries {
    flock: Flock,
    ground: Here,
    watched: Vec<Snapshot>,
    is_checked: bool,
    dir: Scratch,
}

/// This machine.
#[derive(Debug)]
struct Here(User);

impl Ground for Here {
    fn path(&self, inside: &Path) -> PathBuf {
        inside.into()
    }

    fn command(&self, program: &Path) -> Command {
        self.0.command(program)
    }

    fn owner(&self) -> &User {
        &self.0
    }

    fn pid_here(&self, inside: i32) -> Option<i32> {
        let arguments = fs::read(format!("/proc/{inside}/cmdline"));
        arguments.is_ok_and(|arguments| !arguments.is_empty()).then_some(inside)
    }
}

impl Canaries {
    /// Puts canaries that belong to `owner` into a directory of their own.
    pub fn start(owner: &User) -> Self {
        let (dir, ground) = (Scratch::new(), Here(owner.clone()));
        owner.take(dir.path());
        let sockets = dir.join("sockets");
        fs::create_dir(&sockets).expect("directory in one of ours");
        owner.take(&sockets);
        let places = Places {
            dir: dir.path(),
            tablespace: &dir.join("stopped_tablespace"),
            sockets: &sockets,
            port: None,
        };
        let flock = Flock::start(&ground, &places);
        let mut canaries = Self { flock, ground, watched: Vec::new(), is_checked: false, dir };
        if let Some(fixture) = Fixture::there() {
            canaries.watch(&fixture.cluster);
        }
        canaries
    }

    /// Watches one more tree: nothing of it may be written, not even its times.
    pub fn watch(&mut self, tree: &Path) {
        self.watched.push(Snapshot::of(tree, Look::Facts));
    }

    /// Ends what runs, and returns a line for each thing that is not as it was.
    pub fn check(&mut self) -> Vec<String> {
        self.is_checked = true;
        let mut found = self.flock.check(&self.ground, false);
        found.extend(self.watched.iter().flat_map(Snapshot::differences));
        found
    }

    /// Returns the data directory and the tablespace of the cluster that does not run.
    pub fn stopped(&self) -> (&Path, &Path) {
        (self.flock.stopped.data(), self.flock.stopped.tablespace())
    }

    /// Returns the data directory and the tablespace of the cluster that runs.
    pub fn running(&self) -> (&Path, &Path) {
        (self.flock.running.data(), self.flock.running.tablespace())
    }

    /// Returns the directory of the running cluster's socket, and its port, also of the loopback; its superuser is
    /// `postgres`, whom everybody may be.
    pub fn address(&self) -> (&Path, u16) {
        self.flock.running.address().expect("it was started with one")
    }

    /// Returns the socket that counts who connects.
    pub fn socket(&self) -> &Path {
        self.flock.listener.path()
    }

    /// Returns a file that only the owner may read, and one that everybody may write.
    pub fn files(&self) -> [PathBuf; 2] {
        [self.dir.join("private/.pgpass"), self.dir.join("public/writable")]
    }
}

impl Drop for Canaries {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.flock.stop(&self.ground);
        } else if !self.is_checked {
            let found = self.check();
            assert!(found.is_empty(), "production was touched:\n{}", found.join("\n"));
        }
    }
}

/// Returns whether arguments of a process are those of a canary's server.
pub(crate) fn is_canary(arguments: &str) -> bool {
    arguments.starts_with(&format!("postgres: {CLUSTER_NAME}: "))
        || (arguments.contains("/postgres -D ") && arguments.ends_with("/running"))
}
