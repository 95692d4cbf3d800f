//! What a session left on this machine outside its target: found and removed, and nothing else.
//!
//! Owns the safe making of what a session may create ([`create_private_directory`], [`record_creator`]) and its removal. Leaves the target directory to the mover, and when to remove to the server.
//!
//! Everything is known from a [`Place`], which was journalled before anything was created, and must prove that it is
//! the session's: a process by its marker, a private directory by its marker file, shared memory by its creator. A
//! directory made for the mount goes only when it is empty. What cannot prove it is left alone and reported. A mount may live on
//! in the mount namespace of a process: such processes are looked for too. Start at [`remove`].

mod mounts;
mod private_directory;
mod shared_memory;

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, Instant};

use pgthaw_session::session::Place;

pub use private_directory::{MARKER_FILE, check_parent, create_private_directory};
pub use shared_memory::record_creator;

use crate::processes::{self, Owner, Process, Signal};
use mounts::MountElsewhere;
use private_directory::Found;
use shared_memory::{Creator, Segment};

/// How long killed processes may take to be gone.
const LIMIT: Duration = Duration::from_secs(20);

/// How long mounts in other namespaces may take to be gone: their processes are dying.
const ELSEWHERE_LIMIT: Duration = Duration::from_secs(5);

/// At most so many processes of a mount namespace are named.
const NAMED: usize = 3;

/// What kind of thing was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A process; its name is what `Display` of [`processes::Process`] says.
    Process,
    /// A mounted file system; its name is the mountpoint, and whose mount namespace it is in if it is another one.
    Mount,
    /// A System V shared memory segment; its name is its id.
    SharedMemory,
    /// A directory with all that is in it; its name is its path.
    Directory,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Process => "process",
            Self::Mount => "mount",
            Self::SharedMemory => "shared memory",
            Self::Directory => "directory",
        })
    }
}

/// One thing that a session left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// What it is.
    pub kind: Kind,
    /// Its path, pid or id.
    pub name: String,
}

/// What was found, or removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleaning {
    /// The things that are there ([`find`]), or were there and are removed ([`remove`]).
    pub found: Vec<Leftover>,
    /// What could not be looked at or removed, with the reason; empty when nothing of the session is left.
    pub failed: Vec<String>,
}

impl Cleaning {
    fn add(&mut self, kind: Kind, name: impl fmt::Display) {
        self.found.push(Leftover { kind, name: name.to_string() });
    }

    fn add_if(&mut self, kind: Kind, path: &Path, outcome: io::Result<bool>) {
        match outcome {
            Ok(true) => self.add(kind, path.display()),
            Ok(false) => {}
            Err(error) => self.failed.push(error.to_string()),
        }
    }
}

/// Lists what is left of the session at `place`, without touching it.
pub fn find(place: &Place) -> Cleaning {
    let mut found = Cleaning::default();
    let running = running(place, &mut found);
    for process in &running {
        found.add(Kind::Process, process);
    }
    match mounts::at_or_below(&place.mountpoint) {
        Ok(mounts) => {
            mounts.iter().for_each(|mount| found.add(Kind::Mount, mount.mountpoint.display()));
        }
        Err(error) => found.failed.push(error.to_string()),
    }
    match mounts::elsewhere(&place.mountpoint) {
        Ok(mounts) => mounts.iter().for_each(|mount| found.add(Kind::Mount, described(mount))),
        Err(error) => found.failed.push(format!("look for mounts: {error}")),
    }
    for segment in segments(&creators(place, &running), &mut found) {
        found.add(Kind::SharedMemory, segment.id);
    }
    for directory in mount_directories(place) {
        found.add_if(Kind::Directory, directory, mounts::is_empty_directory(directory));
    }
    for directory in private_directories(place) {
        match private_directory::look(directory, &place.marker) {
            Ok(Found::Nothing) => {}
            Ok(Found::Ours) => found.add(Kind::Directory, directory.display()),
            Ok(Found::Foreign(why)) => {
                found.failed.push(format!("leave `{}` alone: {why}", directory.display()));
            }
            Err(error) => found.failed.push(error.to_string()),
        }
    }
    found
}

/// Removes what is left of the session at `place`, and can be repeated after any interruption.
///
/// The mount goes first: what waits for an answer from it cannot be ended before. The calling process is not ended
/// even if it carries the marker.
pub fn remove(place: &Place) -> Cleaning {
    let mut cleaning = Cleaning::default();
    let first = mounts::unmount_all(&place.mountpoint);

    let running = running(place, &mut cleaning);
    let creators = creators(place, &running);
    match processes::end_all(&owner(place), &[], LIMIT) {
        Ok(ended) => {
            ended.ended.iter().for_each(|process| cleaning.add(Kind::Process, process));
            for process in ended.left {
                let state = process.state;
                cleaning.failed.push(format!("{process} does not end (state {state})"));
            }
        }
        Err(error) => cleaning.failed.push(format!("look for processes: {error}")),
    }

    // A daemon that was just starting may have mounted meanwhile; and what failed at first may work now.
    let again = mounts::unmount_all(&place.mountpoint);
    let unmounted = again.map(|again| again || first.unwrap_or(true));
    cleaning.add_if(Kind::Mount, &place.mountpoint, unmounted);

    for segment in segments(&creators, &mut cleaning) {
        match shared_memory::remove(&segment) {
            Ok(true) => cleaning.add(Kind::SharedMemory, segment.id),
            Ok(false) => {}
            Err(error) => cleaning.failed.push(error.to_string()),
        }
    }
    for directory in mount_directories(place) {
        match mounts::remove_empty_directory(directory) {
            // still of use, to another session or to whoever put something there
            Err(error)
                if error.kind() == ErrorKind::DirectoryNotEmpty
                    && directory != place.mountpoint => {}
            removed => cleaning.add_if(Kind::Directory, directory, removed),
        }
    }
    for directory in private_directories(place) {
        cleaning.add_if(Kind::Directory, directory, remove_directory(directory, &place.marker));
    }
    end_mounts_elsewhere(place, &mut cleaning); // last: the kernel takes down what lies on a directory that is removed
    cleaning
}

/// Waits until no other mount namespace holds the session's mount any more. Of the processes in them those are ended that carry
/// the marker; others are reported.
fn end_mounts_elsewhere(place: &Place, cleaning: &mut Cleaning) {
    let deadline = Instant::now() + ELSEWHERE_LIMIT;
    let mut ended = Vec::new();
    loop {
        let left = match mounts::elsewhere(&place.mountpoint) {
            Ok(left) => left,
            Err(error) => return cleaning.failed.push(format!("look for mounts: {error}")),
        };
        for MountElsewhere { mount, holders } in &left {
            mounts::abort(mount); // else who waits for an answer of it does not end
            for process in holders.iter().filter_map(|pid| Process::with_pid(*pid)) {
                if let Ok(true) = processes::kill(&process, &owner(place), Signal::KILL)
                    && !ended.contains(&process.pid)
                {
                    ended.push(process.pid);
                    cleaning.add(Kind::Process, process);
                }
            }
        }
        if left.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            let failed = left.iter().map(|mount| {
                let mount = described(mount);
                format!(
                    "still mounted: {mount}, which is not pgthaw's to end; end it and clean again"
                )
            });
            return cleaning.failed.extend(failed);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Names a mount, and who has it.
fn described(found: &MountElsewhere) -> String {
    let named = found.holders.iter().take(NAMED).map(|pid| match Process::with_pid(*pid) {
        Some(process) => process.to_string(),
        None => format!("process {pid}"),
    });
    let mut holders = named.collect::<Vec<_>>().join(", ");
    if let more @ 1.. = found.holders.len().saturating_sub(NAMED) {
        holders += &format!(" and {more} more");
    }
    format!("{} in the mount namespace of {holders}", found.mount.mountpoint.display())
}

/// Removes a private directory in which nothing is mounted.
fn remove_directory(directory: &Path, marker: &str) -> io::Result<bool> {
    match mounts::at_or_below(directory)?.first() {
        Some(mount) => {
            let (directory, mountpoint) = (directory.display(), mount.mountpoint.display());
            let text =
                format!("leave `{directory}` alone: a file system is mounted at `{mountpoint}`");
            Err(io::Error::other(text))
        }
        None => private_directory::remove(directory, marker),
    }
}

/// The work directory goes last: it holds the record of the shared memory's creators.
fn private_directories(place: &Place) -> [&Path; 2] {
    [&place.dump_directory, &place.work_directory]
}

/// The directories made for the mount that do not go with a private one, innermost first.
///
/// The one above the mountpoint is ours alone if it is called so: it goes with the last session that needs it, whoever
/// made it.
fn mount_directories(place: &Place) -> Vec<&Path> {
    let mut directories: Vec<&Path> =
        place.mount_directories.iter().map(|path| path.as_path()).collect();
    if let Some(parent) = place.mountpoint.parent()
        && parent.ends_with("pgthaw")
        && !directories.contains(&parent)
    {
        directories.push(parent);
    }
    directories
        .retain(|path| !private_directories(place).iter().any(|private| path.starts_with(private)));
    directories.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    directories
}

/// How the session's processes are recognized.
fn owner(place: &Place) -> Owner {
    Owner { marker: place.marker.clone(), accounts: place.accounts.clone() }
}

fn running(place: &Place, cleaning: &mut Cleaning) -> Vec<processes::Process> {
    processes::find(&owner(place)).unwrap_or_else(|error| {
        cleaning.failed.push(format!("look for processes: {error}"));
        Vec::new()
    })
}

/// The processes that may have made shared memory: those that run, and those that were recorded.
fn creators(place: &Place, running: &[processes::Process]) -> Vec<Creator> {
    let recorded = match private_directory::look(&place.work_directory, &place.marker) {
        Ok(Found::Ours) => shared_memory::recorded_creators(&place.work_directory),
        _ => Vec::new(),
    };
    running.iter().filter_map(Creator::from_running).chain(recorded).collect()
}

fn segments(creators: &[Creator], cleaning: &mut Cleaning) -> Vec<Segment> {
    shared_memory::segments_of(creators).unwrap_or_else(|error| {
        cleaning.failed.push(format!("look for shared memory: {error}"));
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::process::CommandExt;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

    use super::*;
    use crate::processes::MARKER_VARIABLE;

    /// A session's place in a scratch directory; whatever was planted goes with it.
    struct Scene {
        scratch: tempfile::TempDir,
        place: Place,
        children: Vec<Child>,
        mounts: Vec<PathBuf>,
        devices: Vec<OwnedFd>,
    }

    impl Scene {
        fn new(name: &str) -> Self {
            let scratch = tempfile::tempdir().unwrap();
            let in_scratch = |name: &str| scratch.path().join(name);
            let place = Place {
                host: None,
                marker: format!("leftovers-{name}-{}-0123456789", std::process::id()),
                accounts: vec![rustix::process::geteuid().as_raw()],
                work_directory: in_scratch("pgthaw-work"),
                mountpoint: in_scratch("media/pgthaw/session"),
                mount_directories: vec![in_scratch("media"), in_scratch("media/pgthaw/session")],
                dump_directory: in_scratch("pgthaw-dump"),
                target_directories: Vec::new(),
            };
            Self { scratch, place, children: Vec::new(), mounts: Vec::new(), devices: Vec::new() }
        }

        fn make_directories(&self) {
            for directory in private_directories(&self.place) {
                create_private_directory(directory, &self.place.marker, None, 0o700).unwrap();
                fs::create_dir(directory.join("inner")).unwrap();
                fs::write(directory.join("inner/file"), "x").unwrap();
            }
        }

        fn spawn(&mut self, marker: &str) {
            let mut command = Command::new("sleep");
            self.children.push(command.arg("300").env(MARKER_VARIABLE, marker).spawn().unwrap());
        }

        /// Mounts a FUSE file system that nobody serves: who looks into it waits until it is aborted.
        fn mount(&mut self, path: &Path) {
            fs::create_dir_all(path).unwrap();
            self.devices.push(pgthaw_mountfs::mount_as_root(path).unwrap());
            self.mounts.push(path.into());
        }

        /// Starts a process, with the session's marker or not, in whose mount namespace alone the mount is: in another place.
        fn hold_elsewhere(&mut self, marked: bool) -> u32 {
            let elsewhere = self.scratch.path().join("elsewhere");
            fs::create_dir_all(&elsewhere).unwrap();
            let [from, to] = [&self.place.mountpoint, &elsewhere]
                .map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
            let mut command = Command::new("sleep");
            command.arg("300");
            if marked {
                command.env(MARKER_VARIABLE, &self.place.marker);
            }
            // SAFETY: system calls on strings that live in the closure.
            unsafe {
                command.pre_exec(move || {
                    if libc::unshare(libc::CLONE_NEWNS) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                    rustix::mount::mount_change(c"/", private)?;
                    rustix::mount::mount_bind(&*from, &*to)?;
                    Ok(rustix::mount::unmount(&*from, UnmountFlags::DETACH)?)
                });
            }
            self.children.push(command.spawn().unwrap());
            self.children.last().unwrap().id()
        }

        fn mount_foreign(&mut self, path: &Path) {
            fs::create_dir_all(path).unwrap();
            rustix::mount::mount("test", path, "tmpfs", MountFlags::empty(), None).unwrap();
            self.mounts.push(path.into());
            fs::write(path.join("file"), "x").unwrap();
        }

        /// Begins to read below `path`, in a process of the session.
        fn read_below(&mut self, path: &Path) {
            let mut command = Command::new("stat");
            command.arg(path.join("file")).env(MARKER_VARIABLE, &self.place.marker);
            self.children.push(command.stderr(Stdio::null()).spawn().unwrap());
        }

        fn kinds(cleaning: &Cleaning) -> Vec<Kind> {
            cleaning.found.iter().map(|leftover| leftover.kind).collect()
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
            for mountpoint in &self.mounts {
                while rustix::mount::unmount(mountpoint, UnmountFlags::DETACH).is_ok() {}
            }
        }
    }

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[test]
    fn an_unused_place_is_clean() {
        let scene = Scene::new("unused");
        assert_eq!(find(&scene.place), Cleaning::default());
        assert_eq!(remove(&scene.place), Cleaning::default());
    }

    #[test]
    fn finds_and_removes_everything() {
        if !is_root() {
            return; // mounting needs root
        }
        let mut scene = Scene::new("all");
        let (marker, mountpoint) = (scene.place.marker.clone(), scene.place.mountpoint.clone());
        scene.make_directories();
        scene.spawn(&marker);
        scene.mount(&mountpoint);
        scene.read_below(&mountpoint);

        let found = find(&scene.place);
        use Kind::*;
        assert_eq!(Scene::kinds(&found), [Process, Process, Mount, Directory, Directory]);
        assert_eq!(found.failed, [""; 0]);

        let removed = remove(&scene.place);
        assert_eq!(removed.failed, [""; 0]);
        let directories = [Directory; 5]; // session, pgthaw, media, dump, work
        let kinds = Scene::kinds(&removed);
        assert!(kinds.ends_with(&[[Mount].as_slice(), &directories].concat()), "{kinds:?}");
        assert!(matches!(kinds.len(), 7 | 8), "the reader may end by itself: {kinds:?}");
        assert_eq!(find(&scene.place), Cleaning::default());
        assert_eq!(fs::read_dir(scene.scratch.path()).unwrap().count(), 0);
        assert_eq!(remove(&scene.place), Cleaning::default(), "it can be repeated");
    }

    #[test]
    fn a_mount_in_another_namespace_ends_with_the_session_s_processes_there() {
        if !is_root() {
            return;
        }
        let mut scene = Scene::new("elsewhere");
        scene.make_directories();
        let mountpoint = scene.place.mountpoint.clone();
        scene.mount(&mountpoint);
        let pid = scene.hold_elsewhere(true);
        rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH).unwrap();
        let found = find(&scene.place);
        use Kind::*;
        assert_eq!(Scene::kinds(&found), [Process, Mount, Directory, Directory, Directory]);
        let elsewhere = scene.scratch.path().join("elsewhere");
        let want =
            format!("{} in the mount namespace of sleep (process {pid})", elsewhere.display());
        assert_eq!(found.found[1].name, want);

        let removed = remove(&scene.place);
        assert_eq!(removed.failed, [""; 0]);
        assert_eq!(removed.found.iter().filter(|left| left.kind == Process).count(), 1);
        assert_eq!(find(&scene.place), Cleaning::default());
    }

    #[test]
    fn a_mount_that_a_stranger_holds_is_reported_with_the_stranger() {
        if !is_root() {
            return;
        }
        let mut scene = Scene::new("stranger");
        let mountpoint = scene.place.mountpoint.clone();
        scene.mount(&mountpoint);
        let pid = scene.hold_elsewhere(false);
        assert_eq!(Scene::kinds(&find(&scene.place)), [Kind::Mount, Kind::Mount]);

        let removed = remove(&scene.place);
        assert_eq!(removed.failed.len(), 1, "{removed:?}");
        let said = &removed.failed[0];
        assert!(said.contains(&format!("sleep (process {pid})")), "{said}");
        assert_eq!(scene.children[0].try_wait().unwrap(), None, "a stranger was ended");
        assert_eq!(Scene::kinds(&find(&scene.place)), [Kind::Mount]);

        scene.children[0].kill().unwrap();
        scene.children[0].wait().unwrap();
        assert_eq!(remove(&scene.place), Cleaning::default());
    }

    #[test]
    fn a_mountpoint_in_the_work_directory_goes_with_it() {
        if !is_root() {
            return;
        }
        let mut scene = Scene::new("inside");
        scene.make_directories();
        scene.place.mountpoint = scene.place.work_directory.join("mount/cluster");
        let mountpoint = scene.place.mountpoint.clone();
        scene.mount(&mountpoint);
        let removed = remove(&scene.place);
        assert_eq!((removed.failed.len(), removed.found.len()), (0, 3), "{removed:?}");
        assert!(!scene.place.work_directory.exists());
    }

    #[test]
    fn foreign_things_stay() {
        let mut scene = Scene::new("foreign");
        let marker = scene.place.marker.clone();
        scene.spawn(&format!("{marker}-other"));
        for directory in private_directories(&scene.place) {
            create_private_directory(directory, "another-session-0123", None, 0o700).unwrap();
            fs::write(directory.join("precious"), "x").unwrap();
        }
        fs::create_dir_all(&scene.place.mountpoint).unwrap();
        fs::write(scene.place.mountpoint.join("precious"), "x").unwrap();

        assert_eq!(find(&scene.place).failed.len(), 2);
        let removed = remove(&scene.place);
        assert_eq!(removed.found, []);
        assert_eq!(removed.failed.len(), 3, "{removed:?}");
        for directory in
            [&scene.place.mountpoint, &scene.place.work_directory, &scene.place.dump_directory]
        {
            assert!(directory.join("precious").exists());
        }
        assert_eq!(scene.children[0].try_wait().unwrap(), None);
    }

    #[test]
    fn another_session_s_mountpoint_keeps_the_directories_above() {
        let scene = Scene::new("neighbour");
        let neighbour = scene.place.mountpoint.with_file_name("neighbour");
        fs::create_dir_all(&scene.place.mountpoint).unwrap();
        fs::create_dir(&neighbour).unwrap();
        let removed = remove(&scene.place);
        assert_eq!((removed.failed.len(), removed.found.len()), (0, 1), "{removed:?}");
        assert!(!scene.place.mountpoint.exists() && neighbour.exists());
    }

    #[test]
    fn foreign_mounts_stay() {
        if !is_root() {
            return;
        }
        let mut scene = Scene::new("mounted");
        scene.make_directories();
        let inner = scene.place.work_directory.join("inner/foreign");
        let mountpoint = scene.place.mountpoint.clone();
        scene.mount_foreign(&inner);
        scene.mount_foreign(&mountpoint);
        let removed = remove(&scene.place);
        assert_eq!(removed.failed.len(), 3, "{removed:?}");
        assert!(removed.failed[0].contains("is not pgthaw's"), "{removed:?}");
        assert!(removed.failed[2].contains("is mounted at"), "{removed:?}");
        assert!(inner.join("file").exists() && mountpoint.join("file").exists());
        assert!(!scene.place.dump_directory.exists(), "the other one is removed");
    }
}
