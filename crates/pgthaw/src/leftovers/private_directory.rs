//! A session's private directories: made safely in places where everybody may write, marked, and removed only when
//! the mark is there.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Stat, Uid,
    chmodat, fchmod, fchown, flock, fstat, mkdirat, openat, openat2, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

/// The file that marks a private directory; its content is the session's marker.
pub const MARKER_FILE: &CStr = c".pgthaw-session";

/// Directories nested deeper than this are not removed: nothing of a session comes near it.
const DEEPEST: usize = 200;

/// The account that owns a directory: user id and group id.
pub type Owner = (u32, u32);

/// Makes the private directory `path` with the access bits `mode`, marks it with `marker` and returns it opened and
/// locked.
///
/// Keep the descriptor while the directory is in use: `systemd-tmpfiles` leaves a locked one alone. The directory
/// belongs to `owner`, or to the calling process without one; the marker file always belongs to the calling process.
/// Whatever exists at `path` is never used again. A directory that could not be finished is removed.
///
/// # Errors
/// `path` exists, or one of the directories above it belongs to somebody who is neither root, the caller nor
/// `owner`, or is writable by others and not sticky: it could be exchanged under our feet.
pub fn create_private_directory(
    path: &Path,
    marker: &str,
    owner: Option<Owner>,
    mode: u32,
) -> io::Result<OwnedFd> {
    let create = || {
        let (parent, name) = open_trusted_parent(path, owner)?;
        mkdirat(&parent, &name, Mode::RWXU)?;
        let made = finish(&parent, &name, marker, owner, mode);
        if made.is_err() {
            discard(&parent, &name);
        }
        made
    };
    create().map_err(|error| named("make the private directory", path, error))
}

/// Tells whether [`create_private_directory`] would trust the directories above `path`; nothing is made.
///
/// # Errors
/// As there, also when a directory above `path` is missing.
pub fn check_parent(path: &Path, owner: Option<Owner>) -> io::Result<()> {
    open_trusted_parent(path, owner).map(|_| ())
}

/// Turns the fresh directory `name` into a private one.
fn finish(
    parent: &OwnedFd,
    name: &CStr,
    marker: &str,
    owner: Option<Owner>,
    mode: u32,
) -> io::Result<OwnedFd> {
    let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
    if fstat(&directory)?.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("it was exchanged while it was made"));
    }
    flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&directory, MARKER_FILE, flags, Mode::RUSR | Mode::WUSR)?;
    fs::File::from(file).write_all(marker.as_bytes())?;
    if let Some((user, group)) = owner {
        fchown(&directory, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
    }
    fchmod(&directory, Mode::from_raw_mode(mode & 0o7777))?; // after the change of owner, which may drop bits
    Ok(directory)
}

/// Removes a directory that could not be finished; what does not work is left to [`remove`].
fn discard(parent: &OwnedFd, name: &CStr) {
    if let Ok(directory) = openat(parent, name, DIRECTORY, Mode::empty()) {
        let _ = unlinkat(&directory, MARKER_FILE, AtFlags::empty());
        let _ = unlinkat(parent, name, AtFlags::REMOVEDIR);
    }
}

/// How a directory is opened here: itself, never what a link in its place points to.
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens the directory that holds `path` and returns it with the last part of `path`.
///
/// Links on the way are followed first; then every directory of the result has to be trustworthy.
fn open_trusted_parent(path: &Path, owner: Option<Owner>) -> io::Result<(OwnedFd, CString)> {
    let (parent, name) = split(path)?;
    let parent = parent.canonicalize()?;
    let flags = OFlags::PATH | DIRECTORY;
    let mut directory = openat(CWD, c"/", flags, Mode::empty())?;
    let mut so_far = PathBuf::from("/");
    for part in parent.components() {
        if let Component::Normal(part) = part {
            so_far.push(part);
            directory = openat(&directory, part, flags, Mode::empty())?;
        }
        let stat = fstat(&directory)?;
        if let Some(why) = distrust(&stat, owner, geteuid().as_raw(), getegid().as_raw()) {
            let text = format!("the directory `{}` above it {why}", so_far.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
    }
    Ok((directory, name))
}

/// Returns why a directory above a private one cannot be trusted: somebody else could exchange what lies in it.
///
/// Writable by the caller's own group is fine: many systems give every account a group of its own.
fn distrust(stat: &Stat, owner: Option<Owner>, user: u32, group: u32) -> Option<String> {
    let trusted = [Some(0), Some(user), owner.map(|(owner, _)| owner)];
    if !trusted.contains(&Some(stat.st_uid)) {
        return Some(format!("belongs to another account (user id {})", stat.st_uid));
    }
    let by_group = stat.st_mode & 0o020 != 0 && stat.st_gid != 0 && stat.st_gid != group;
    let by_all = stat.st_mode & 0o002 != 0;
    let sticky = stat.st_mode & 0o1000 != 0;
    (!sticky && (by_group || by_all)).then(|| "is writable by others and not sticky".into())
}

/// Splits an absolute path into the directory and the last part.
fn split(path: &Path) -> io::Result<(&Path, CString)> {
    let invalid =
        || io::Error::new(io::ErrorKind::InvalidInput, "it is no absolute path of a directory");
    let (Some(parent), Some(name), true) = (path.parent(), path.file_name(), path.is_absolute())
    else {
        return Err(invalid());
    };
    Ok((parent, CString::new(name.as_bytes()).map_err(|_| invalid())?))
}

/// What lies at the path of a private directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// The session's directory, or the beginning of one: empty but for an unfinished marker.
    Ours,
    /// Something else, with what is missing for being ours.
    Foreign(String),
}

/// Looks what lies at `path`, without following a link there.
///
/// # Errors
/// It cannot be read.
pub fn look(path: &Path, marker: &str) -> io::Result<Found> {
    Ok(match open(path, marker)? {
        Opened::Nothing => Found::Nothing,
        Opened::Ours { .. } => Found::Ours,
        Opened::Foreign(why) => Found::Foreign(why),
    })
}

/// Removes the private directory `path` of the session with `marker`, with all that is in it. Returns whether it was
/// there.
///
/// Never follows a link, never leaves the file system, and takes the marker last, so that an interrupted removal can
/// be repeated.
///
/// # Errors
/// What lies there is not the session's directory, a file system is mounted in it, or a file cannot be removed.
pub fn remove(path: &Path, marker: &str) -> io::Result<bool> {
    match open(path, marker)? {
        Opened::Nothing => Ok(false),
        Opened::Foreign(why) => {
            Err(io::Error::other(format!("leave `{}` alone: {why}", path.display())))
        }
        Opened::Ours { parent, name, directory } => {
            let removed = empty(directory.as_fd(), path, 0).and_then(|()| {
                accept_absence(unlinkat(&directory, MARKER_FILE, AtFlags::empty()))?;
                accept_absence(unlinkat(&parent, &name, AtFlags::REMOVEDIR))
            });
            removed.map(|()| true).map_err(|error| named("remove", path, error))
        }
    }
}

/// As [`Found`], opened.
enum Opened {
    Nothing,
    Ours { parent: OwnedFd, name: CString, directory: OwnedFd },
    Foreign(String),
}

fn open(path: &Path, marker: &str) -> io::Result<Opened> {
    let look = || -> io::Result<Opened> {
        let (parent, name) = split(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = match openat(CWD, parent, flags, Mode::empty()) {
            Ok(parent) => parent,
            Err(Errno::NOENT) => return Ok(Opened::Nothing),
            Err(errno) => return Err(errno.into()),
        };
        let directory = match openat(&parent, &name, DIRECTORY, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(Opened::Nothing),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Ok(Opened::Foreign("it is no directory".into()));
            }
            Err(errno) => return Err(errno.into()),
        };
        Ok(match why_foreign(&directory, marker)? {
            Some(why) => Opened::Foreign(why),
            None => Opened::Ours { parent, name, directory },
        })
    };
    look().map_err(|error| named("look at", path, error))
}

/// Returns why `directory` is not a private directory of the session with `marker`.
fn why_foreign(directory: &OwnedFd, marker: &str) -> io::Result<Option<String>> {
    let trusted = |stat: &Stat| stat.st_uid == 0 || stat.st_uid == geteuid().as_raw();
    let name = MARKER_FILE.to_string_lossy();
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let content = match openat(directory, MARKER_FILE, flags, Mode::empty()) {
        Ok(file) => {
            let stat = fstat(&file)?;
            let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if !regular || !trusted(&stat) || stat.st_nlink != 1 {
                return Ok(Some(format!("its `{name}` was not made by pgthaw")));
            }
            let mut content = Vec::new();
            fs::File::from(file).take(1024).read_to_end(&mut content)?;
            content
        }
        Err(Errno::NOENT) => Vec::new(),
        Err(Errno::LOOP) => return Ok(Some(format!("its `{name}` is a link"))),
        Err(errno) => return Err(errno.into()),
    };
    if content == marker.as_bytes() {
        return Ok(None);
    }
    let begun = marker.as_bytes().starts_with(&content) // also when there is no marker file
        && trusted(&fstat(directory)?)
        && names(directory.as_fd())?.iter().all(|(name, _)| name.as_c_str() == MARKER_FILE);
    Ok((!begun).then(|| {
        if content.is_empty() {
            format!("it has no `{name}` and is not empty")
        } else {
            format!("its `{name}` is of another session")
        }
    }))
}

/// Removes everything in `directory` but, at the top, the marker file.
fn empty(directory: BorrowedFd<'_>, path: &Path, depth: usize) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(io::Error::other(format!("`{}` is nested too deep", path.display())));
    }
    for (name, kind) in names(directory)? {
        if depth == 0 && name.as_c_str() == MARKER_FILE {
            continue;
        }
        let child = path.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let removed = if kind == FileType::Directory {
            remove_tree(directory, &name, &child, depth)
        } else {
            match unlinkat(directory, &name, AtFlags::empty()) {
                Err(Errno::ISDIR) => remove_tree(directory, &name, &child, depth), // its kind was not known
                other => accept_absence(other),
            }
        };
        removed.map_err(|error| if depth == 0 { named("remove", &child, error) } else { error })?;
    }
    Ok(())
}

fn remove_tree(parent: BorrowedFd<'_>, name: &CStr, path: &Path, depth: usize) -> io::Result<()> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let open = || openat2(parent, name, DIRECTORY, Mode::empty(), resolve);
    let opened = match open() {
        Err(Errno::ACCESS) => {
            chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            open()
        }
        other => other,
    };
    match opened {
        Ok(child) => empty(child.as_fd(), path, depth + 1)?,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::XDEV) => {
            return Err(io::Error::other(format!(
                "a file system is mounted at `{}`",
                path.display()
            )));
        }
        Err(errno) => return Err(errno.into()),
    }
    accept_absence(unlinkat(parent, name, AtFlags::REMOVEDIR))
}

/// Names and kinds of all entries but `.` and `..`.
fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<(CString, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

/// Takes "it is not there" for a success of its removal.
fn accept_absence(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The same error with what was tried on which path.
fn named(what: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} `{}`: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const MARKER: &str = "0123456789abcdef";
    const OTHER: &str = "fedcba9876543210";

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn make(path: &Path) -> OwnedFd {
        create_private_directory(path, MARKER, None, 0o700).unwrap()
    }

    #[test]
    fn makes_marked_and_locked_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("private");
        let held = create_private_directory(&path, MARKER, None, 0o711).unwrap();
        let marker_file = path.join(".pgthaw-session");
        assert_eq!((mode_of(&path), mode_of(&marker_file)), (0o711, 0o600));
        assert_eq!(fs::read_to_string(&marker_file).unwrap(), MARKER);
        let again = fs::File::open(&path).unwrap();
        assert_eq!(flock(&again, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        drop(held);
        assert_eq!(flock(&again, FlockOperation::NonBlockingLockExclusive), Ok(()));
    }

    #[test]
    fn gives_the_directory_to_its_owner() {
        if !geteuid().is_root() {
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("private");
        create_private_directory(&path, MARKER, Some((65_534, 65_533)), 0o700).unwrap();
        let (directory, file) =
            (fs::metadata(&path).unwrap(), fs::metadata(path.join(".pgthaw-session")).unwrap());
        assert_eq!((directory.uid(), directory.gid(), mode_of(&path)), (65_534, 65_533, 0o700));
        assert_eq!(file.uid(), 0);
        assert!(remove(&path, MARKER).unwrap());
    }

    #[test]
    fn never_uses_what_exists() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (scratch.path().join("private"), scratch.path().join("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        let plant: [(&str, &dyn Fn()); 4] = [
            ("directory", &|| fs::create_dir(&path).unwrap()),
            ("file", &|| fs::write(&path, "").unwrap()),
            ("link to a directory", &|| symlink(&elsewhere, &path).unwrap()),
            ("dangling link", &|| symlink(scratch.path().join("nothing"), &path).unwrap()),
        ];
        for (name, plant) in plant {
            plant();
            let error = create_private_directory(&path, MARKER, None, 0o700).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{name}: {error}");
            fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
        }
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn judges_the_directories_above() {
        let mut stat = fstat(fs::File::open("/").unwrap()).unwrap();
        let cases = [
            ("root's", 0, 0, 0o755, None, true),
            ("own", 1000, 1000, 0o700, None, true),
            ("own, own group may write", 1000, 1000, 0o775, None, true),
            ("own, another group may write", 1000, 50, 0o775, None, false),
            ("root's, sticky, all may write", 0, 0, 0o1777, None, true),
            ("root's, all may write", 0, 0, 0o777, None, false),
            ("somebody's", 1001, 1001, 0o755, None, false),
            ("the new owner's", 1001, 1001, 0o755, Some((1001, 1001)), true),
        ];
        for (name, user, group, mode, owner, trusted) in cases {
            (stat.st_uid, stat.st_gid, stat.st_mode) = (user, group, 0o040_000 | mode);
            assert_eq!(distrust(&stat, owner, 1000, 1000).is_none(), trusted, "{name}");
        }
        let scratch = tempfile::tempdir().unwrap();
        let open = scratch.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let error =
            create_private_directory(&open.join("private"), MARKER, None, 0o700).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("not sticky"), "{error}");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();
        make(&open.join("private"));
    }

    #[test]
    fn removes_whole_trees_without_following_links() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, outside) = (scratch.path().join("private"), scratch.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();
        make(&path);
        fs::create_dir_all(path.join("a/b/c")).unwrap();
        fs::write(path.join("a/b/file"), "x").unwrap();
        symlink(&outside, path.join("a/link")).unwrap();
        symlink(&outside, path.join("link")).unwrap();
        fs::set_permissions(path.join("a/b/c"), fs::Permissions::from_mode(0o000)).unwrap();
        assert_eq!(look(&path, MARKER).unwrap(), Found::Ours);
        assert!(remove(&path, MARKER).unwrap());
        assert!(!path.exists());
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "kept");
        assert!(!remove(&path, MARKER).unwrap(), "it can be repeated");
        assert!(!remove(&scratch.path().join("no/such"), MARKER).unwrap());
    }

    #[test]
    fn leaves_lookalikes_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pgthaw-x");
        let marker_file = path.join(".pgthaw-session");
        let target = scratch.path().join("target");
        fs::write(&target, MARKER).unwrap();
        let plant: [(&str, &dyn Fn()); 5] = [
            ("without a marker", &|| fs::write(path.join("data"), "").unwrap()),
            ("of another session", &|| fs::write(&marker_file, OTHER).unwrap()),
            ("marker is a link", &|| symlink(&target, &marker_file).unwrap()),
            ("marker has a second name", &|| fs::hard_link(&target, &marker_file).unwrap()),
            ("marker is a directory", &|| fs::create_dir(&marker_file).unwrap()),
        ];
        for (name, plant) in plant {
            fs::create_dir(&path).unwrap();
            plant();
            assert!(matches!(look(&path, MARKER).unwrap(), Found::Foreign(_)), "{name}");
            let error = remove(&path, MARKER).unwrap_err();
            assert!(error.to_string().contains("alone"), "{name}: {error}");
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "{name}");
            fs::remove_dir_all(&path).unwrap();
        }
        symlink(scratch.path(), &path).unwrap();
        assert_eq!(look(&path, MARKER).unwrap(), Found::Foreign("it is no directory".into()));
        assert!(remove(&path, MARKER).is_err() && target.exists());
    }

    #[test]
    fn removes_what_a_crash_left_half_made() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("private");
        for content in [None, Some(""), Some(&MARKER[..5])] {
            fs::create_dir(&path).unwrap();
            if let Some(content) = content {
                fs::write(path.join(".pgthaw-session"), content).unwrap();
            }
            assert_eq!(look(&path, MARKER).unwrap(), Found::Ours, "{content:?}");
            assert!(remove(&path, MARKER).unwrap(), "{content:?}");
            assert!(!path.exists());
        }
    }
}
