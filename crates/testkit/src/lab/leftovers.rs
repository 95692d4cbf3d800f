//! What a session left on a host of a lab.
//!
//! A host is the test's alone, so everything that was not there before counts: processes, mounts, shared memory,
//! sockets, and files in its temporary directories. Elsewhere files come and go that nobody asked to be removed
//! (an export, a server's state), so there only names like ours count, and what lies in `.ssh`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::host::Host;
use super::ssh::is_listener;
use crate::leftovers::mount_points_of;
use crate::user::run;

/// Directories in which nothing may be left.
const TEMPORARY: [&str; 4] = ["/tmp", "/var/tmp", "/run", "/dev/shm"];
/// Where a server keeps journals and logs until they are pruned.
const STATE: &str = ".local/state/pgthaw";
/// Ends of processes, of mounts and of connections arrive a little late.
const GRACE: Duration = Duration::from_secs(10);

/// A detector of leftovers on one host: made before a session, asked after it. A reboot between is fine.
#[derive(Debug)]
pub struct HostLeftovers<'a> {
    host: &'a Host,
    before: BTreeSet<String>,
}

impl<'a> HostLeftovers<'a> {
    /// Looks around on a host before a session begins.
    pub fn before(host: &'a Host) -> Self {
        Self { host, before: look(host) }
    }

    /// Returns one line for each thing that is left, after waiting a little for it to go.
    pub fn check(&self) -> Vec<String> {
        self.check_within(GRACE)
    }

    /// As [`HostLeftovers::check`], waiting at most `grace`.
    pub fn check_within(&self, grace: Duration) -> Vec<String> {
        let end = Instant::now() + grace;
        loop {
            let mut found: Vec<_> = look(self.host).difference(&self.before).cloned().collect();
            // Of a directory with all that is in it, the directory is enough.
            let all = found.clone();
            found.retain(|line| !all.iter().any(|above| line.starts_with(&format!("{above}/"))));
            if found.is_empty() || Instant::now() >= end {
                return found;
            }
            sleep(Duration::from_millis(100));
        }
    }
}

/// Returns a line for each thing that a session could leave.
fn look(host: &Host) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for process in host.processes() {
        if process.pid != host.init() && !is_listener(&process.arguments) {
            found.insert(format!("process {}: {}", process.pid, process.arguments));
        }
    }
    let mounts = mount_points_of(&host.init().to_string(), |_| true);
    found.extend(mounts.iter().map(|point| format!("mount {point}")));
    found.extend(host.listening().iter().map(|address| format!("listening on {address}")));
    found.extend(host.unix_sockets().iter().map(|path| format!("socket {path}")));
    for (what, table) in
        [("shared memory segment", "shm"), ("semaphore set", "sem"), ("message queue", "msg")]
    {
        // The kernel shows the table of whoever reads it.
        let read = run(host.enter().args(["--", "cat"]).arg(format!("/proc/sysvipc/{table}")));
        let text = String::from_utf8_lossy(&read.stdout);
        let ids = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1));
        found.extend(ids.map(|id| format!("{what} {id}")));
    }
    let mounts: BTreeSet<_> = mounts.into_iter().map(PathBuf::from).collect();
    for disk in host.plan.disks() {
        let everything = TEMPORARY.contains(&disk);
        walk(host, Path::new(disk), everything, &mounts, &mut found);
    }
    found
}

/// Finds what lies below `dir`: everything, or what is called like ours. Mounts are not even looked at: one that
/// nobody serves any more would never answer.
fn walk(
    host: &Host,
    dir: &Path,
    everything: bool,
    mounts: &BTreeSet<PathBuf>,
    found: &mut BTreeSet<String>,
) {
    for entry in fs::read_dir(host.path(dir)).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), dir.join(entry.file_name()));
        if mounts.contains(&path) || path.ends_with(STATE) {
            continue;
        }
        let name = name.to_string_lossy();
        if everything || name.trim_start_matches('.').starts_with("pgthaw") {
            found.insert(format!("file {}", path.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(host, &path, everything || name == ".ssh", mounts, found);
        }
    }
}
