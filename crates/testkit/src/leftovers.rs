//! What a session left on this machine.
//!
//! Tests run side by side, so a find must belong to the test that reports it, or to nobody alive: processes,
//! mounts, sockets and files are looked for below the test's own directories; what lies in common places (shared
//! memory, `/dev/shm`, `/tmp`, `/var/tmp`, `/run/media/pgthaw`) counts if it is new and no live process uses it.
//! A mount counts in whatever mount namespace it lives on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where sessions put things when they are not told otherwise.
const COMMON_DIRS: [&str; 3] = ["/var/tmp", "/tmp", "/run/media/pgthaw"];
/// The type of our mounts.
const OWN_TYPE: &str = "fuse.pgthaw";
/// Ends of processes and of mounts arrive a little late.
const GRACE: Duration = Duration::from_secs(10);

/// A detector of leftovers: made before a session, asked after it.
#[derive(Debug)]
pub struct Leftovers {
    dirs: Vec<PathBuf>,
    before: Seen,
}

/// Things in common places, by a name that identifies each.
#[derive(Debug, Default)]
struct Seen {
    shared_memory: BTreeSet<String>,
    dev_shm: BTreeSet<String>,
    files: BTreeSet<String>,
    mounts: BTreeSet<String>,
    mounts_elsewhere: BTreeSet<String>,
}

/// A mount of ours that only another mount namespace has.
struct MountElsewhere {
    /// Where it was mounted at first.
    place: String,
    /// Where that namespace has it, and a process of it.
    point: String,
    pid: String,
}

impl Leftovers {
    /// Looks around before a session begins. `dirs` are the test's own directories: each process of the session
    /// has one of them in its arguments or its environment (its `HOME`, say), and what is found there is its.
    pub fn before(dirs: &[&Path]) -> Self {
        let dirs = dirs.iter().map(|dir| std::path::absolute(dir).expect("a path")).collect();
        Self { dirs, before: Seen::now() }
    }

    /// Returns one line for each thing that is left, after waiting a little for it to go.
    pub fn check(&self) -> Vec<String> {
        self.check_within(GRACE)
    }

    /// As [`Leftovers::check`], waiting at most `grace`.
    pub fn check_within(&self, grace: Duration) -> Vec<String> {
        let end = Instant::now() + grace;
        loop {
            let found = self.look();
            if found.is_empty() || Instant::now() >= end {
                return found;
            }
            sleep(Duration::from_millis(100));
        }
    }

    /// Returns the processes that belong to the test's directories, as pid and arguments; the test itself is
    /// none of them.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let ours = std::process::id().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().into_string().unwrap_or_default();
            let dir = entry.path();
            let Ok(number) = pid.parse() else { continue };
            let read = |name: &str| fs::read(dir.join(name)).unwrap_or_default();
            let (arguments, environment) = (read("cmdline"), read("environ"));
            // A zombie has neither; the rest of its process tells of it.
            let mentioned =
                |dir: &PathBuf| mentions(&arguments, dir) || mentions(&environment, dir);
            if pid != ours && self.dirs.iter().any(mentioned) {
                found.push((
                    number,
                    String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end().to_owned(),
                ));
            }
        }
        found
    }

    fn look(&self) -> Vec<String> {
        let now = Seen::now();
        let new = |now: &BTreeSet<String>, before: &BTreeSet<String>| -> Vec<String> {
            now.difference(before).cloned().collect()
        };
        let mut found: Vec<_> = self
            .processes()
            .into_iter()
            .map(|(pid, arguments)| format!("process {pid}: {arguments}"))
            .collect();
        for point in mount_points(|_| true) {
            if self
                .dirs
                .iter()
                .any(|dir| Path::new(&point).starts_with(dir) && Path::new(&point) != dir)
            {
                found.push(format!("mount {point}"));
            }
        }
        let alive = live_text();
        let orphaned = |path: &String| !mentions(&alive, Path::new(path));
        found.extend(
            new(&now.mounts, &self.before.mounts)
                .iter()
                .filter(|path| orphaned(path))
                .map(|path| format!("mount {path}")),
        );
        let own = |place: &Path| self.dirs.iter().any(|dir| place.starts_with(dir) && place != dir);
        for MountElsewhere { place, point, pid } in mounts_elsewhere() {
            let new = !self.before.mounts_elsewhere.contains(&place) && orphaned(&place);
            if own(Path::new(&place)) || new {
                found.push(format!("mount {place}, at {point} in the namespace of process {pid}"));
            }
        }
        found.extend(
            new(&now.shared_memory, &self.before.shared_memory)
                .iter()
                .map(|id| format!("shared memory segment {id}")),
        );
        let unmapped = |path: &&String| is_unused(path);
        found.extend(
            new(&now.dev_shm, &self.before.dev_shm)
                .iter()
                .filter(unmapped)
                .map(|path| format!("file {path}")),
        );
        found.extend(
            new(&now.files, &self.before.files)
                .iter()
                .filter(|path| orphaned(path))
                .map(|path| format!("file {path}")),
        );
        let mounts = mount_points(|_| true).into_iter().collect();
        for dir in &self.dirs {
            below(dir, &mounts, &mut |path| found.push(format!("file {}", path.display())));
        }
        found.extend(self.sockets().into_iter().map(|path| format!("socket {path}")));
        found.sort();
        found.dedup();
        found
    }

    /// Returns the paths of bound Unix sockets below the test's directories.
    fn sockets(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let paths = table
            .lines()
            .filter_map(|line| line.split_once(" /").map(|(_, path)| format!("/{path}")));
        paths.filter(|path| self.dirs.iter().any(|dir| Path::new(path).starts_with(dir))).collect()
    }
}

impl Seen {
    fn now() -> Self {
        let entries = |dir: &str, prefix: &str| -> Vec<String> {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            names
                .filter(|name| name.starts_with(prefix))
                .map(|name| format!("{dir}/{name}"))
                .collect()
        };
        let files = COMMON_DIRS
            .iter()
            .flat_map(|dir| entries(dir, if *dir == COMMON_DIRS[2] { "" } else { "pgthaw" }));
        Self {
            shared_memory: detached_segments(),
            dev_shm: entries("/dev/shm", "").into_iter().collect(),
            files: files.collect(),
            mounts: mount_points(|kind| kind == OWN_TYPE).into_iter().collect(),
            mounts_elsewhere: mounts_elsewhere().into_iter().map(|mount| mount.place).collect(),
        }
    }
}

/// Returns the System V segments that nobody has attached: a server that lives keeps its own attached.
fn detached_segments() -> BTreeSet<String> {
    let read = || {
        let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
        let lines = table
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        lines
            .filter(|fields| fields.get(6).is_some_and(|count| count == "0"))
            .map(|fields| fields[1].clone())
            .collect()
    };
    let first: BTreeSet<String> = read();
    if first.is_empty() {
        return first;
    }
    // One that is just being made is attached a moment later.
    sleep(Duration::from_millis(200));
    first.intersection(&read()).cloned().collect()
}

/// Returns the mount points of file systems whose type `wanted` accepts.
fn mount_points(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    mount_points_of("self", wanted)
}

/// Returns the same of the mount namespace of a process, by its number in `/proc`.
pub(crate) fn mount_points_of(process: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    let mounts = table.lines().filter_map(parse_mount);
    mounts.filter(|(_, kind, _)| wanted(kind)).map(|(point, ..)| point).collect()
}

/// Returns our mounts that this process's mount namespace has not, each with one process that has it.
fn mounts_elsewhere() -> Vec<MountElsewhere> {
    let id = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let read = |process: &str| {
        fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default()
    };
    let mut seen: BTreeSet<String> = read("self").lines().map(id).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().into_string().unwrap_or_default();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        for line in read(&pid).lines() {
            if let Some((point, OWN_TYPE, source)) = parse_mount(line)
                && seen.insert(id(line))
            {
                let place = source.strip_prefix("pgthaw:").unwrap_or(&point).to_owned();
                found.push(MountElsewhere { place, point, pid: pid.clone() });
            }
        }
    }
    found
}

/// Returns mount point, type and source of a line of `/proc/PID/mountinfo`.
fn parse_mount(line: &str) -> Option<(String, &str, &str)> {
    let (mount, kind) = line.split_once(" - ")?;
    let point = mount.split(' ').nth(4)?.replace("\\040", " ").replace("\\134", "\\");
    let mut fields = kind.split(' ');
    Some((point, fields.next()?, fields.next()?))
}

/// Returns arguments and environments of all processes, and the paths of all locked files.
fn live_text() -> Vec<u8> {
    let mut text = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if entry.file_name().as_bytes()[0].is_ascii_digit() {
            for name in ["cmdline", "environ"] {
                text.extend(fs::read(entry.path().join(name)).unwrap_or_default());
                text.push(0);
            }
        }
    }
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let locked: BTreeSet<&str> = locks
        .lines()
        .filter_map(|line| line.split_whitespace().find(|field| field.matches(':').count() == 2))
        .collect();
    let mounts = mount_points(|_| true);
    for dir in COMMON_DIRS {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if mounts.contains(&entry.path().display().to_string()) {
                continue; // its root must not be touched, and has no locks of ours
            }
            let Ok(found) = entry.metadata() else { continue };
            let device = found.dev();
            let id = format!(
                "{:02x}:{:02x}:{}",
                rustix::fs::major(device),
                rustix::fs::minor(device),
                found.ino()
            );
            if locked.contains(id.as_str()) {
                text.extend(entry.path().as_os_str().as_bytes());
                text.push(0);
            }
        }
    }
    text
}

/// Returns whether `text` holds `path`, not merely as the beginning of a longer name.
fn mentions(text: &[u8], path: &Path) -> bool {
    let path = path.as_os_str().as_bytes();
    let ends = |rest: &[u8]| {
        rest.first().is_none_or(|byte| !byte.is_ascii_alphanumeric() && !b"-_.".contains(byte))
    };
    text.windows(path.len())
        .enumerate()
        .any(|(at, part)| part == path && ends(&text[at + path.len()..]))
}

/// Returns whether a file of `/dev/shm` is there and stays unused by any live process for a moment: one that
/// is just being made or removed is not.
fn is_unused(path: &str) -> bool {
    let used = || {
        fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
            let mapped =
                fs::read_to_string(entry.path().join("maps")).is_ok_and(|maps| maps.contains(path));
            let mut open = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
            mapped
                || open.any(|fd| {
                    fs::read_link(fd.path()).is_ok_and(|target| target == Path::new(path))
                })
        })
    };
    if used() {
        return false;
    }
    sleep(Duration::from_millis(200));
    Path::new(path).exists() && !used()
}

/// Tells `found` of everything below `dir` whose name begins like ours. Mounts are not even looked at: one that
/// nobody serves any more would never answer.
fn below(dir: &Path, mounts: &BTreeSet<String>, found: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        if mounts.contains(&*path.to_string_lossy()) {
            continue;
        }
        if name.as_bytes().starts_with(b"pgthaw-") || name.as_bytes().starts_with(b".pgthaw-") {
            found(&path);
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&path, mounts, found);
        }
    }
}
