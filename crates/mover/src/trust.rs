//! Whether somebody else could exchange what is delivered: who owns the directories from `/` to the target, and who may write there.
//!
//! A superuser loads `globals.sql` and the dump: an account that can replace these files becomes superuser. `check` judges the
//! directories before a session creates anything, and the mover judges them again, opened, when it creates the target.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use crate::directory::Directory;
use crate::error::MoveError;

/// File systems that keep neither our owner nor our mode, or another machine's idea of them (`statfs(2)`, `linux/magic.h`):
/// NFS, SMB (three generations), FAT, exFAT, NTFS, FUSE, 9p.
const WITHOUT_OWNERS: [u64; 9] = [
    0x6969,
    0x517B,
    0xFF53_4D42,
    0xFE53_4D42,
    0x4D44,
    0x2011_BAB0,
    0x5346_544E,
    0x6573_5546,
    0x0102_1997,
];

/// How a directory or link on the way is opened: itself, without reading it.
const PLACE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// Most links on the way, as for the kernel (`path_resolution(7)`).
const LINKS_MAX: u32 = 40;

/// What helps against an objection.
pub(crate) const REMEDY: &str = "name a directory that belongs to the exporting account or root, and that others may not write; or export as the account that it belongs to";

/// What is found out about the directories above a target, and about itself where it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Why nothing should be delivered there: the directory, and what somebody else can do.
    pub objection: Option<(PathBuf, String)>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

impl Trust {
    /// Returns what helps against an objection.
    pub fn remedy() -> &'static str {
        REMEDY
    }
}

/// What one directory allows to others.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing.
    Fine,
    /// Something that is usual and wanted by some.
    Note(String),
    /// To exchange what lies in it.
    Objection(String),
}

impl Trust {
    /// Looks at every directory from `/` to `directory`, which has to be there, and at every link on the way.
    ///
    /// # Errors
    /// What cannot be opened.
    pub fn look(directory: &Path) -> Result<Self, MoveError> {
        Ok(open(directory)?.1)
    }

    fn add(&mut self, path: &Path, verdict: Verdict, keeps_owners: bool) {
        match verdict {
            Verdict::Fine => {}
            Verdict::Note(note) => self.warnings.push(format!("`{}` {note}", path.display())),
            Verdict::Objection(why) if keeps_owners => {
                self.objection.get_or_insert((path.into(), why));
            }
            Verdict::Objection(why) => self.warnings.push(format!(
                "`{}` {why}, as far as its file system tells: see who may write there",
                path.display()
            )),
        }
    }
}

/// Opens `path` if nobody else can exchange what lies there, or where links on the way lead.
///
/// # Errors
/// [`MoveError::Distrusted`], or what cannot be opened.
pub(crate) fn open_trusted(path: &Path) -> Result<Directory, MoveError> {
    let (directory, trust) = open(path)?;
    match trust.objection {
        Some((path, why)) => Err(MoveError::Distrusted { path, why }),
        None => Ok(directory),
    }
}

/// Opens every directory on the way, one in the other, and follows links itself, so that what is judged is what is opened: a link that
/// somebody else has put on the way leads nowhere.
fn open(path: &Path) -> Result<(Directory, Trust), MoveError> {
    let (ours, group) = (geteuid().as_raw(), getegid().as_raw());
    let mut trust = Trust::default();
    let failed = |action, at: &Path, err: Errno| MoveError::target(action, path, at, err);
    let absolute =
        std::path::absolute(path).map_err(|err| MoveError::target("open", path, path, err))?;
    let mut ahead: VecDeque<OsString> = parts(&absolute);
    let mut way = vec![root().map_err(|err| failed("open", Path::new("/"), err))?];
    let mut links = 0;
    way.last()
        .map_or(Ok(()), |last| look(last, &mut trust, (ours, group)))
        .map_err(|err| failed("stat", Path::new("/"), err))?;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            way.truncate((way.len() - 1).max(1));
            continue;
        }
        let (above, directory) = way.last().expect("the root stays");
        let at = above.join(&part);
        let opened = fs::openat(directory, &part, PLACE, Mode::empty());
        let opened = opened.map_err(|err| failed("open", &at, err))?;
        let stat = fs::fstat(&opened).map_err(|err| failed("stat", &at, err))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            way.push((at.clone(), opened));
            let last = way.last().expect("it was just put there");
            look(last, &mut trust, (ours, group)).map_err(|err| failed("stat", &at, err))?;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(failed("open", &at, Errno::LOOP));
        }
        if ![0, ours].contains(&stat.st_uid) {
            let why = format!("is a link of another account (user id {})", stat.st_uid);
            trust.add(&at, Verdict::Objection(why), true);
        }
        let to = fs::readlinkat(&opened, "", Vec::new()).map_err(|err| failed("read", &at, err))?;
        let to = PathBuf::from(OsString::from_vec(to.into_bytes()));
        if to.is_absolute() {
            way.truncate(1);
        }
        for part in parts(&to).into_iter().rev() {
            ahead.push_front(part);
        }
    }
    let (real, last) = way.pop().expect("the root stays");
    let read = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let last = fs::openat(&last, ".", read, Mode::empty());
    Ok((Directory::opened(real.clone(), last.map_err(|err| failed("open", &real, err))?), trust))
}

fn root() -> Result<(PathBuf, OwnedFd), Errno> {
    Ok((PathBuf::from("/"), fs::openat(CWD, "/", PLACE, Mode::empty())?))
}

/// The names on a path, and `..`.
fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |part: Component| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(part).collect()
}

/// Judges one directory of the way.
fn look(
    (path, directory): &(PathBuf, OwnedFd),
    trust: &mut Trust,
    (ours, group): (u32, u32),
) -> Result<(), Errno> {
    let stat = fs::fstat(directory)?;
    let kind = u64::from(u32::try_from(fs::fstatfs(directory)?.f_type & 0xFFFF_FFFF).unwrap_or(0));
    trust.add(path, judge(&stat, ours, group), !WITHOUT_OWNERS.contains(&kind));
    Ok(())
}

/// Judges one directory for the account `ours` with the primary group `group`.
fn judge(stat: &Stat, ours: u32, group: u32) -> Verdict {
    let (by_group, by_all) = (stat.st_mode & 0o020 != 0, stat.st_mode & 0o002 != 0);
    let sticky = stat.st_mode & 0o1000 != 0;
    if ![0, ours].contains(&stat.st_uid) {
        return Verdict::Objection(format!("belongs to another account (user id {})", stat.st_uid));
    }
    match () {
        () if sticky => Verdict::Fine, // only owners can rename or remove what lies there
        () if by_all => Verdict::Objection("may be written by every account".into()),
        // many systems give every account a group of its own
        () if by_group && ![0, group].contains(&stat.st_gid) => Verdict::Note(format!(
            "may be written by the group {}: its members could exchange what is delivered",
            stat.st_gid
        )),
        () => Verdict::Fine,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn judges_who_could_exchange_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut stat = fs::stat(dir.path()).unwrap();
        for (user, group, mode, want) in [
            (0, 0, 0o755, "fine"),
            (7, 0, 0o700, "fine"),
            (0, 0, 0o1777, "fine"),
            (0, 9, 0o1770, "fine"),
            (0, 0, 0o775, "fine"),
            (7, 8, 0o770, "fine"),
            (7, 9, 0o770, "note"),
            (7, 8, 0o777, "objection"),
            (6, 8, 0o700, "objection"),
            (6, 8, 0o1777, "objection"),
        ] {
            (stat.st_uid, stat.st_gid, stat.st_mode) = (user, group, 0o040_000 | mode);
            let found = match judge(&stat, 7, 8) {
                Verdict::Fine => "fine",
                Verdict::Note(_) => "note",
                Verdict::Objection(_) => "objection",
            };
            assert_eq!(found, want, "{user} {group} {mode:o}");
        }
    }

    #[test]
    fn every_directory_and_link_on_the_way_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (top, inner) = (dir.path().canonicalize().unwrap(), "open/inner");
        let (shared, real) = (top.join("open"), top.join(inner));
        std::fs::create_dir_all(&real).unwrap();
        std::fs::create_dir(top.join("links")).unwrap();
        symlink(&real, top.join("absolute")).unwrap();
        symlink("../open/./inner", top.join("links/relative")).unwrap();
        symlink("loop", top.join("loop")).unwrap();
        let paths = [inner, "absolute", "links/relative", "links/../open/inner"];
        for path in paths.map(|path| top.join(path)) {
            assert_eq!(Trust::look(&path).unwrap().objection, None, "{path:?}");
            assert_eq!(open_trusted(&path).unwrap().path(), real, "{path:?}");
        }
        for missing in ["none", "open/none", "loop", "loop/x"] {
            assert!(Trust::look(&top.join(missing)).is_err(), "{missing}");
        }
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777)).unwrap();
        for path in paths.map(|path| top.join(path)) {
            let (found, why) = Trust::look(&path).unwrap().objection.unwrap();
            assert_eq!((found, why.as_str()), (shared.clone(), "may be written by every account"));
            assert!(matches!(open_trusted(&path), Err(MoveError::Distrusted { .. })));
        }
        if geteuid().is_root() {
            std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
            std::os::unix::fs::lchown(top.join("absolute"), Some(1234), None).unwrap();
            let (found, why) = Trust::look(&top.join("absolute")).unwrap().objection.unwrap();
            assert_eq!(
                (found, &*why),
                (top.join("absolute"), "is a link of another account (user id 1234)")
            );
        }
    }
}
