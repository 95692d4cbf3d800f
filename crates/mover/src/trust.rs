//! Whether somebody else could exchange what is delivered: who owns the directories from `/` to the target, and who may write there.
//!
//! `globals.sql` and a dump are loaded by a superuser: whoever can put another file in their place becomes one. The answer is
//! asked for before anything is made, and again of the opened directories when the target is made.

use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, CWD, Mode, OFlags, Stat};
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
    /// Looks at every directory from `/` to `directory`, which has to be there. Links on the way are followed first.
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

/// Opens `path` if nobody else can exchange what lies there; links on the way are followed first.
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

/// Opens every directory on the way, one in the other, so that what was looked at is what is opened.
fn open(path: &Path) -> Result<(Directory, Trust), MoveError> {
    const FLAGS: OFlags =
        OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    let real = path.canonicalize().map_err(|err| MoveError::target("open", path, path, err))?;
    let (ours, group) = (geteuid().as_raw(), getegid().as_raw());
    let mut trust = Trust::default();
    let mut so_far = PathBuf::from("/");
    let mut last = fs::openat(CWD, "/", FLAGS | OFlags::PATH, Mode::empty())
        .map_err(|err| MoveError::target("open", path, &so_far, err))?;
    let parts: Vec<_> = real.components().collect();
    for (number, part) in parts.iter().enumerate() {
        if let Component::Normal(part) = part {
            so_far.push(part);
            // Only the target itself is read; who may pass the others need not be able to list them.
            let flags = if number + 1 == parts.len() { FLAGS } else { FLAGS | OFlags::PATH };
            last = fs::openat(&last, *part, flags, Mode::empty())
                .map_err(|err| MoveError::target("open", path, &so_far, err))?;
        }
        let failed = |err| MoveError::target("stat", path, &so_far, err);
        let stat = fs::fstat(last.as_fd()).map_err(failed)?;
        let kind = fs::fstatfs(last.as_fd()).map_err(failed)?.f_type;
        let keeps_owners = !WITHOUT_OWNERS
            .contains(&u64::from(u32::try_from(kind & 0xFFFF_FFFF).unwrap_or_default()));
        trust.add(&so_far, judge(&stat, ours, group), keeps_owners);
    }
    Ok((Directory::opened(real, last), trust))
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
    fn every_directory_on_the_way_counts_and_links_are_followed_first() {
        let dir = tempfile::tempdir().unwrap();
        let (open, inner) = (dir.path().join("open"), dir.path().join("open/inner"));
        std::fs::create_dir_all(&inner).unwrap();
        symlink(&inner, dir.path().join("link")).unwrap();
        assert_eq!(Trust::look(&inner).unwrap().objection, None);
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        for path in [&inner, &dir.path().join("link")] {
            let (found, why) = Trust::look(path).unwrap().objection.unwrap();
            assert_eq!((found, why.as_str()), (open.clone(), "may be written by every account"));
            assert!(matches!(open_trusted(path), Err(MoveError::Distrusted { .. })));
        }
    }
}
