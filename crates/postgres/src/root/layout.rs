//! What a root holds: an ordered list of steps, put together without touching anything.
//!
//! Everything is at the path it has outside, so that no setting and no message means two places. Locations of
//! tablespaces that replay makes are the exception: they are paths of the original server, and become directories
//! of the root that lead into the session's mount. Start at [`layout`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::path_bytes;
use crate::os_user::OsUser;

/// The most that a temporary file system of the root may hold, in bytes; PostgreSQL keeps its own temporary files
/// in the cluster, so little is written here.
const TEMPORARY_BYTES: u64 = 64 << 20;
/// Files and directories of such a file system.
const TEMPORARY_FILES: u64 = 4096;
/// A directory with more entries is not taken apart to make a place in it.
const MOST_CHILDREN: usize = 500;

/// What may be done in a part of this machine that the root shows. None of them honours set-user-id bits or devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Programs and libraries: read and run.
    Run,
    /// Files: read.
    Read,
    /// Read and write; nothing is run from there.
    Write,
    /// A device that holds nothing of this machine: `/dev/null` and its like.
    Device,
}

/// One step of building a root. Paths are those inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// A directory, 0755; one that is there is fine.
    Directory(#[serde(with = "path_bytes")] PathBuf),
    /// A file or directory tree of this machine.
    Bind {
        /// Where it is outside.
        #[serde(with = "path_bytes")]
        source: PathBuf,
        /// Where it appears inside.
        #[serde(with = "path_bytes")]
        path: PathBuf,
        /// What may be done there.
        access: Access,
        /// It is a directory.
        directory: bool,
        /// There is an entry of that name already: it is covered, not made.
        exists: bool,
    },
    /// An empty file system in memory.
    Temporary {
        /// Where.
        #[serde(with = "path_bytes")]
        path: PathBuf,
        /// The most it holds, in bytes.
        bytes: u64,
        /// The most files.
        files: u64,
        /// The mode of its root.
        mode: u32,
        /// It covers a directory that is there.
        exists: bool,
        /// It stays writable once everything is in its place.
        writable: bool,
    },
    /// A symbolic link.
    Link {
        /// Where.
        #[serde(with = "path_bytes")]
        path: PathBuf,
        /// Its destination.
        #[serde(with = "path_bytes")]
        to: PathBuf,
    },
    /// A small file, 0644.
    File {
        /// Where.
        #[serde(with = "path_bytes")]
        path: PathBuf,
        /// What it holds.
        content: Vec<u8>,
    },
    /// The processes of the new namespace, where the kernel allows such a mount.
    Processes(#[serde(with = "path_bytes")] PathBuf),
}

impl Step {
    /// Returns where the step makes something.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path)
            | Self::Bind { path, .. }
            | Self::Temporary { path, .. }
            | Self::Link { path, .. }
            | Self::File { path, .. }
            | Self::Processes(path) => path,
        }
    }
}

/// A location that replay of `CREATE TABLESPACE` uses, and the directory that is to be found there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Location {
    /// The tablespace, for messages.
    pub oid: u32,
    /// The path of the original server, absolute and without `.` or `..`.
    #[serde(with = "path_bytes")]
    pub location: PathBuf,
    /// The directory in the session's mount.
    #[serde(with = "path_bytes")]
    pub directory: PathBuf,
}

/// What a root shows beside programs, libraries and the system's few files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Files and directories, each at its own path.
    pub shown: Vec<(PathBuf, Access)>,
    /// Locations of tablespaces.
    pub locations: Vec<Location>,
}

/// Who runs the program, for `/etc/passwd` inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Its name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
}

impl Account {
    /// Returns `user`'s account, or ours. Where ours has no name that can be looked up it is called `postgres`.
    pub fn of(user: Option<&OsUser>) -> Self {
        let (uid, gid, _) = super::ids_of(user);
        let name = user.map(|user| user.name.clone());
        let name = name.or_else(|| OsUser::current().ok().map(|user| user.name));
        Self { name: name.unwrap_or_else(|| "postgres".into()), uid, gid }
    }
}

/// Why a root cannot be put together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A location that the root needs for something else.
    #[error(
        "the backup's WAL makes the tablespace {oid} at `{}`, and {reason}",
        location.display()
    )]
    Location {
        /// The tablespace.
        oid: u32,
        /// Where it lay.
        location: PathBuf,
        /// What stands in the way.
        reason: String,
    },
    /// Something of the session's own lies where programs or the system's files are.
    #[error("`{}` cannot be shown to PostgreSQL: {reason}", path.display())]
    Shown {
        /// The path.
        path: PathBuf,
        /// What stands in the way.
        reason: String,
    },
}

impl LayoutError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Location { .. } => {
                "choose another --work-dir or --pg-bin if one of them is in the way; otherwise recover to a point before the tablespace was made, or restore this backup with its own tool"
            }
            Self::Shown { .. } => "choose another directory",
        }
    }
}

/// Returns the steps that build a root with `view` on `host`, in order, and the directories that must be there in the
/// session's mount before (paths outside).
///
/// # Errors
/// [`LayoutError`] if two things would have to be at one path.
pub fn layout(
    host: &Host,
    view: &View,
    account: &Account,
) -> Result<(Vec<Step>, Vec<PathBuf>), LayoutError> {
    let mut tree = Tree { nodes: system(host, account), host, in_mount: Vec::new() };
    for (path, access) in &view.shown {
        tree.show(path, *access)?;
    }
    let mut locations = view.locations.clone();
    // Parents first; of two tablespaces that had one location after each other the later one.
    locations.sort_by(|a, b| (&a.location, a.oid).cmp(&(&b.location, b.oid)));
    locations.dedup_by(|later, earlier| {
        let same = later.location == earlier.location;
        if same {
            *earlier = later.clone();
        }
        same
    });
    for location in &locations {
        tree.locate(location)?;
    }
    Ok((tree.nodes.into_values().collect(), tree.in_mount))
}

/// What every root has.
fn system(host: &Host, account: &Account) -> BTreeMap<PathBuf, Step> {
    let mut nodes = BTreeMap::new();
    let mut add = |step: Step| _ = nodes.insert(step.path().to_owned(), step);
    for directory in ["/dev", "/etc"] {
        add(Step::Directory(directory.into()));
    }
    add(Step::Processes("/proc".into()));
    for (path, bytes) in [("/tmp", TEMPORARY_BYTES), ("/dev/shm", TEMPORARY_BYTES / 4)] {
        let (path, files, mode) = (path.into(), TEMPORARY_FILES, 0o1777);
        add(Step::Temporary { path, bytes, files, mode, exists: false, writable: true });
    }
    for device in ["null", "zero", "full", "random", "urandom"] {
        add(bind(&Path::new("/dev").join(device), Access::Device, false, false));
    }
    for (name, to) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let path = Path::new("/dev").join(name);
        add(Step::Link { path, to: Path::new("/proc/self").join(to) });
    }
    let Account { name, uid, gid } = account;
    let plain = |c: char| c.is_control() || c == ':';
    let name = if name.contains(plain) { "postgres" } else { name };
    let files = [
        ("passwd", format!("{name}:x:{uid}:{gid}::/:/usr/sbin/nologin\n")),
        ("group", format!("{name}:x:{gid}:\n")),
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n".into()),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n".into()),
    ];
    for (name, content) in files {
        add(Step::File { path: Path::new("/etc").join(name), content: content.into() });
    }
    for (path, to) in &host.links {
        add(Step::Link { path: path.clone(), to: to.clone() });
    }
    for (path, directory) in &host.programs {
        add(bind(path, Access::Run, *directory, false));
    }
    for (path, directory) in &host.files {
        add(bind(path, Access::Read, *directory, false));
    }
    nodes
}

fn bind(path: &Path, access: Access, directory: bool, exists: bool) -> Step {
    let (source, path) = (path.to_owned(), path.to_owned());
    Step::Bind { source, path, access, directory, exists }
}

/// The root while it is put together, by path: a parent comes before what lies in it.
struct Tree<'a> {
    nodes: BTreeMap<PathBuf, Step>,
    host: &'a Host,
    in_mount: Vec<PathBuf>,
}

/// What is at a path of this machine, in a tree of programs, libraries or files that the root shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupied {
    /// Nothing.
    Free,
    /// A directory of an account other than root, as a tablespace's directory always is: PostgreSQL never runs as root, and has to
    /// change the mode of a tablespace's directory. Nothing of the system is below it.
    OwnedDirectory,
    /// A directory of root, or no directory: something there may be needed, by PostgreSQL or by what it loads.
    System,
}

/// What is nearest above a path.
enum Above {
    /// Nothing, or a directory or file system that the root makes: entries can be made there.
    Made,
    /// A tree of this machine, by the path outside that the entry has there.
    Shown(PathBuf),
    /// A tablespace's directory in the session's mount, by the path outside that the entry has there.
    Mount(PathBuf),
    /// What holds nothing: a file, a link, a device.
    Nothing(PathBuf),
}

impl Tree<'_> {
    /// Shows a path of this machine where it is.
    fn show(&mut self, path: &Path, access: Access) -> Result<(), LayoutError> {
        let directory = (self.host.is_directory)(path);
        let refused =
            |reason: &str| LayoutError::Shown { path: path.into(), reason: reason.into() };
        let exists = match self.above(path) {
            Above::Made => false,
            Above::Shown(_) => true, // it is part of that tree
            Above::Mount(_) => return Err(refused("a tablespace lies above it")),
            Above::Nothing(_) => return Err(refused("it lies below a file or a link")),
        };
        self.nodes.insert(path.into(), bind(path, access, directory, exists));
        Ok(())
    }

    /// Makes the directory of a tablespace appear at its location.
    fn locate(&mut self, location: &Location) -> Result<(), LayoutError> {
        let path = &location.location;
        let refused = |reason: String| LayoutError::Location {
            oid: location.oid,
            location: path.clone(),
            reason,
        };
        if let Some(taken) = self.first_needed_below(path) {
            let reason = if taken == *path {
                "PostgreSQL needs that very path for something else here".into()
            } else {
                format!("what PostgreSQL needs here lies below that: `{}`", taken.display())
            };
            return Err(refused(reason));
        }
        if let Some(needed) = self.host.needed.iter().find(|needed| needed.starts_with(path)) {
            return Err(refused(format!("PostgreSQL's programs need `{}` here", needed.display())));
        }
        let exists = match self.above(path) {
            Above::Made => false,
            Above::Shown(outside) => match (self.host.occupied)(&outside) {
                Occupied::Free => {
                    self.cover(&outside).map_err(refused)?;
                    false
                }
                Occupied::OwnedDirectory => true,
                Occupied::System => {
                    return Err(refused("that belongs to this system here".into()));
                }
            },
            Above::Mount(directory) => {
                self.in_mount.push(directory);
                true
            }
            Above::Nothing(what) => {
                return Err(refused(format!("`{}` is no directory here", what.display())));
            }
        };
        let step = Step::Bind {
            source: location.directory.clone(),
            path: path.clone(),
            access: Access::Write,
            directory: true,
            exists,
        };
        self.nodes.insert(path.clone(), step);
        Ok(())
    }

    /// Returns the first path at or below `path` that the root needs for something else than a tablespace.
    fn first_needed_below(&self, path: &Path) -> Option<PathBuf> {
        let below = self.nodes.range(path.to_owned()..).take_while(|(at, _)| at.starts_with(path));
        below.map(|(at, _)| at.clone()).next()
    }

    fn above(&self, path: &Path) -> Above {
        let nearest = path.ancestors().skip(1).find_map(|at| self.nodes.get(at));
        let inside = |source: &Path, at: &Path| {
            source.join(path.strip_prefix(at).unwrap_or_else(|_| Path::new("")))
        };
        match nearest {
            None | Some(Step::Directory(_) | Step::Temporary { .. }) => Above::Made,
            Some(Step::Bind { source, path: at, access, directory: true, .. }) => {
                match (access, source == at) {
                    (Access::Write, false) => Above::Mount(inside(source, at)),
                    // the session's own directories: nothing is made there on behalf of a backup
                    (Access::Write, true) => Above::Nothing(at.clone()),
                    _ => Above::Shown(inside(source, at)),
                }
            }
            Some(other) => Above::Nothing(other.path().to_owned()),
        }
    }

    /// Makes a place for `wanted`, which is not there, in a tree of this machine that is shown: an empty file system
    /// over the deepest directory that is there, and in it all that directory holds.
    fn cover(&mut self, wanted: &Path) -> Result<(), String> {
        let parent = wanted.ancestors().skip(1).find(|at| (self.host.is_directory)(at));
        let parent = parent.unwrap_or(Path::new("/"));
        let unreadable =
            |error: io::Error| format!("`{}` cannot be read: {error}", parent.display());
        let children = (self.host.children)(parent).map_err(unreadable)?;
        if children.len() > MOST_CHILDREN {
            return Err(format!(
                "`{}` has {} entries here, too many to make a place among them",
                parent.display(),
                children.len()
            ));
        }
        for (name, kind) in children {
            let path = parent.join(name);
            if self.nodes.contains_key(&path) {
                continue; // shown by itself
            }
            let step = match kind {
                Child::Directory => bind(&path, Access::Run, true, false),
                Child::File => bind(&path, Access::Run, false, false),
                Child::Link(to) => Step::Link { path: path.clone(), to },
                Child::Other => continue,
            };
            self.nodes.insert(path, step);
        }
        let cover = Step::Temporary {
            path: parent.into(),
            bytes: 1 << 20,
            files: TEMPORARY_FILES,
            mode: 0o755,
            exists: !matches!(self.nodes.get(parent), Some(Step::Bind { .. })),
            writable: false,
        };
        self.nodes.insert(parent.into(), cover);
        Ok(())
    }
}

/// An entry of a directory of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Child {
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A symbolic link, and where it leads.
    Link(PathBuf),
    /// Anything else, which no root shows.
    Other,
}

/// The name and kind of each entry of a directory.
pub type Children = Vec<(OsString, Child)>;

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with merged `/usr` that has `/usr/share/bin` and programs in `/opt/pg/bin`.
    fn host() -> Host {
        let directories = [
            "/",
            "/usr",
            "/usr/lib",
            "/usr/share",
            "/usr/share/bin",
            "/opt/pg/bin",
            "/run/media/s",
            "/w/i",
            "/w/i/s",
        ];
        Host {
            links: vec![("/lib".into(), "usr/lib".into())],
            programs: vec![
                ("/usr/lib".into(), true),
                ("/usr/share".into(), true),
                ("/opt/pg/bin".into(), true),
            ],
            files: vec![("/etc/ld.so.cache".into(), false)],
            needed: vec!["/usr/share/pg/bin".into()],
            is_directory: Box::new(move |path| directories.iter().any(|at| Path::new(at) == path)),
            occupied: Box::new(|path| match path.to_str() {
                Some("/usr/share/ts") => Occupied::OwnedDirectory,
                Some("/usr/share/bin" | "/usr/share/file") => Occupied::System,
                _ => Occupied::Free,
            }),
            children: Box::new(|path| match path.to_str() {
                Some("/usr/share") => Ok(vec![
                    ("bin".into(), Child::Directory),
                    ("man".into(), Child::Link("share/man".into())),
                    ("pipe".into(), Child::Other),
                ]),
                _ => Ok(vec![("x".into(), Child::File); MOST_CHILDREN + 1]),
            }),
        }
    }

    fn view(locations: &[(u32, &str)]) -> View {
        let location = |(oid, path): &(u32, &str)| Location {
            oid: *oid,
            location: path.into(),
            directory: format!("/run/media/s/tablespaces/{oid}").into(),
        };
        View {
            shown: vec![
                ("/run/media/s".into(), Access::Write),
                ("/w/i".into(), Access::Read),
                ("/w/i/s".into(), Access::Write),
            ],
            locations: locations.iter().map(location).collect(),
        }
    }

    fn account() -> Account {
        Account { name: "postgres".into(), uid: 101, gid: 104 }
    }

    fn laid_out(locations: &[(u32, &str)]) -> Result<(Vec<Step>, Vec<PathBuf>), LayoutError> {
        layout(&host(), &view(locations), &account())
    }

    fn at<'a>(steps: &'a [Step], path: &str) -> Option<&'a Step> {
        steps.iter().find(|step| step.path() == Path::new(path))
    }

    #[test]
    fn a_root_holds_what_was_asked_for_and_little_else() {
        let (steps, in_mount) = laid_out(&[]).unwrap();
        let writable = |step: &&Step| matches!(step, Step::Bind { access: Access::Write, .. });
        let writable: Vec<_> = steps.iter().filter(writable).map(Step::path).collect();
        assert_eq!(writable, [Path::new("/run/media/s"), Path::new("/w/i/s")]);
        assert!(in_mount.is_empty());
        let top = |step: &Step| step.path().components().nth(1).map(|c| c.as_os_str().to_owned());
        let mut tops: Vec<_> = steps.iter().filter_map(top).collect();
        tops.dedup();
        assert_eq!(tops, ["dev", "etc", "lib", "opt", "proc", "run", "tmp", "usr", "w"]);
        let Some(Step::File { content, .. }) = at(&steps, "/etc/passwd") else { panic!("passwd") };
        assert_eq!(content, b"postgres:x:101:104::/:/usr/sbin/nologin\n");
    }

    #[test]
    fn a_parent_comes_before_what_lies_in_it() {
        let (steps, _) =
            laid_out(&[(1, "/srv/a"), (2, "/srv/a/b"), (3, "/usr/share/pg/ts")]).unwrap();
        for (number, step) in steps.iter().enumerate() {
            let earlier = steps[..number].iter().any(|other| other.path().starts_with(step.path()));
            assert!(!earlier, "{step:?}");
        }
    }

    #[test]
    fn a_location_becomes_a_directory_that_leads_into_the_mount() {
        // a plain one, two below one parent, in the original's data directory, below our synthetic /etc, on /tmp's own
        let plain =
            ["/srv/ts/a", "/srv/ts/b", "/var/lib/postgresql/15/main/ts", "/etc/pg/ts", "/tmp/ts"];
        for path in plain {
            let (steps, in_mount) = laid_out(&[(7, path)]).unwrap();
            let Some(Step::Bind { source, access, exists, .. }) = at(&steps, path) else {
                panic!("{path}")
            };
            assert_eq!(source, Path::new("/run/media/s/tablespaces/7"));
            assert_eq!((*access, *exists), (Access::Write, false), "{path}");
            assert!(in_mount.is_empty());
        }
    }

    #[test]
    fn a_location_in_another_one_needs_a_directory_in_the_mount() {
        let (steps, in_mount) = laid_out(&[(2, "/srv/a/b/c"), (1, "/srv/a")]).unwrap();
        assert_eq!(in_mount, [Path::new("/run/media/s/tablespaces/1/b/c")]);
        assert!(matches!(at(&steps, "/srv/a/b/c"), Some(Step::Bind { exists: true, .. })));
    }

    #[test]
    fn a_location_used_again_belongs_to_the_later_tablespace() {
        let (steps, _) = laid_out(&[(9, "/srv/a"), (5, "/srv/a")]).unwrap();
        let Some(Step::Bind { source, .. }) = at(&steps, "/srv/a") else { panic!("no bind") };
        assert_eq!(source, Path::new("/run/media/s/tablespaces/9"));
    }

    #[test]
    fn a_place_is_made_among_programs() {
        let (steps, _) = laid_out(&[(7, "/usr/share/pg/ts")]).unwrap();
        assert!(matches!(at(&steps, "/usr/share"), Some(Step::Temporary { writable: false, .. })));
        assert!(matches!(at(&steps, "/usr/share/bin"), Some(Step::Bind { directory: true, .. })));
        assert!(matches!(at(&steps, "/usr/share/man"), Some(Step::Link { .. })));
        assert_eq!(at(&steps, "/usr/share/pipe"), None);
        assert!(matches!(at(&steps, "/usr/share/pg/ts"), Some(Step::Bind { exists: false, .. })));
        // a directory that is there is only covered
        let (steps, _) = laid_out(&[(7, "/usr/share/ts")]).unwrap();
        assert!(matches!(at(&steps, "/usr/share/ts"), Some(Step::Bind { exists: true, .. })));
    }

    #[test]
    fn a_location_in_the_way_is_refused_by_name() {
        for (path, want) in [
            ("/", "lies below that"),
            ("/usr", "lies below that"),
            ("/usr/lib", "that very path"),
            ("/run", "`/run/media/s`"),
            ("/w", "`/w/i`"),
            ("/opt", "`/opt/pg/bin`"),
            ("/etc", "that very path"),
            ("/dev/null/ts", "`/dev/null` is no directory"),
            ("/proc/ts", "`/proc` is no directory"),
            ("/lib/ts", "`/lib` is no directory"),
            ("/run/media/s/data/ts", "`/run/media/s` is no directory"),
            ("/usr/share/pg", "need `/usr/share/pg/bin`"),
            ("/usr/share/bin", "belongs to this system"),
            ("/usr/share/file", "belongs to this system"),
            ("/usr/lib/new", "too many"),
        ] {
            let error = laid_out(&[(7, path)]).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(want) && text.contains(path) && text.contains('7'), "{text}");
        }
    }
}
