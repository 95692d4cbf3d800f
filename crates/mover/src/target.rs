//! The target directory of one session: looking at it, staging in it, publishing, and undoing.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::directory::{Directory, free_bytes};
use crate::error::MoveError;
use crate::kept::kept_names_in;
use crate::names::{EXPORT_JSON, GLOBALS_SQL, SHA256SUMS, file_name_for_database, is_plain};
use crate::replace::EarlierExport;
use crate::sums::{SumEntry, format_sha256sums};
use crate::trust::{Trust, open_trusted};

/// Begins the name of every staging directory; what follows is the session's id.
const STAGING_PREFIX: &str = ".pgthaw-";
/// What `mkfs` puts into a new file system; such a directory still counts as empty.
const LOST_AND_FOUND: &str = "lost+found";

/// What lies at a target directory, before anything is touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetReport {
    /// What is there, this session's own files left out.
    pub state: TargetState,
    /// Whether this account may write there (in the nearest parent that exists).
    pub access: Access,
    /// Bytes that an unprivileged user can still write there.
    pub free: u64,
    /// Whether an earlier attempt of this session has staged files there.
    pub ours: bool,
    /// Sessions other than this one that have staged files there.
    pub other_sessions: Vec<String>,
    /// Whether somebody else could exchange what is delivered there.
    pub trust: Trust,
}

/// What is at the path of a target directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing; these directories would be made, the outermost first.
    Absent {
        /// The directories, the target itself last.
        missing: Vec<PathBuf>,
    },
    /// Something that is no directory, at this path.
    NotADirectory(PathBuf),
    /// A directory with nothing in it (or only `lost+found`).
    Empty,
    /// A complete export of ours.
    HoldsExport(EarlierExport),
    /// Other things; the first of their names, sorted.
    HoldsOther(Vec<String>),
}

/// Whether this account may write somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may.
    Writable,
    /// The file system is mounted read-only.
    ReadOnly,
    /// Permissions forbid it.
    NotPermitted,
}

/// How many levels below a target are looked at for other sessions' targets: dumps have one.
const NESTED: u32 = 8;

/// A target directory in which one session works; holds its lock.
#[derive(Debug)]
pub struct TargetDirectory {
    dir: Directory,
    staging: Directory,
    staging_name: String,
    _lock: Option<File>,
}

impl TargetDirectory {
    /// Looks at `path` for `session`, whose journal says that it published the entries `published`.
    /// Changes nothing.
    ///
    /// # Errors
    /// What keeps it from looking, and [`MoveError::BadListing`] for a damaged earlier export.
    pub fn inspect(
        path: &Path,
        session: &str,
        published: &[&str],
    ) -> Result<TargetReport, MoveError> {
        let missing = Self::missing(path);
        let nearest = missing.first().map_or(path, |first| parent_of(first));
        let mut report = TargetReport {
            state: TargetState::Absent { missing: missing.clone() },
            access: Access::NotPermitted,
            free: 0,
            ours: false,
            other_sessions: Vec::new(),
            trust: Trust::default(),
        };
        if !nearest.is_dir() {
            report.state = TargetState::NotADirectory(nearest.into());
            return Ok(report);
        }
        report.access = access(nearest)?;
        report.trust = Trust::look(nearest)?;
        report.free =
            free_bytes(nearest).map_err(|err| MoveError::target("stat", nearest, nearest, err))?;
        let above =
            sessions_above(&std::path::absolute(path).unwrap_or_else(|_| path.into()), session);
        report.other_sessions.extend(above.into_iter().map(|(_, other)| other));
        if missing.is_empty() {
            let dir = open_target(path)?;
            let mut names = dir.names()?;
            names.retain(|name| match name.strip_prefix(STAGING_PREFIX) {
                Some(found) if found == session => {
                    report.ours = true;
                    false
                }
                Some(other) => {
                    report.other_sessions.push(other.into());
                    false
                }
                None => name != LOST_AND_FOUND && !published.contains(&name.as_str()),
            });
            report.state = match EarlierExport::find(&dir)? {
                _ if names.is_empty() => TargetState::Empty,
                Some(export) if !published.contains(&EXPORT_JSON) => {
                    TargetState::HoldsExport(export)
                }
                _ => {
                    names.truncate(5);
                    TargetState::HoldsOther(names)
                }
            };
        }
        Ok(report)
    }

    /// Returns the directories that [`TargetDirectory::create`] will make, the outermost first, so that the
    /// journal knows them before they exist.
    pub fn missing(path: &Path) -> Vec<PathBuf> {
        let absent =
            |path: &&Path| !path.as_os_str().is_empty() && path.symlink_metadata().is_err();
        let mut missing: Vec<_> = path.ancestors().take_while(absent).map(PathBuf::from).collect();
        missing.reverse();
        missing
    }

    /// Opens the target directory and locks it for `session`, an id that is a plain file name; makes it, its
    /// parents and the session's staging directory (0700) where they are missing. Safe to repeat.
    ///
    /// Where the file system has no locks (some NFS), this is logged and the session goes on without.
    ///
    /// # Errors
    /// [`MoveError::InUse`] while another session works there, [`MoveError::Distrusted`] where somebody else could exchange what is
    /// delivered, otherwise as the file system says.
    pub fn create(path: &Path, session: &str) -> Result<Self, MoveError> {
        for missing in Self::missing(path) {
            let parent = open_trusted(parent_of(&missing))?;
            let Some(name) = missing.file_name().and_then(|name| name.to_str()) else {
                let why = io::Error::new(io::ErrorKind::InvalidInput, "not a plain UTF-8 name");
                return Err(MoveError::target("create", &missing, &missing, why));
            };
            parent.ensure_directory(name)?;
            parent.sync()?;
        }
        let dir = open_trusted(path)?; // it may have been made, or changed, by somebody else since it was looked at
        let lock = lock(&dir)?;
        let staging_name = staging_name(session);
        let (staging, new) = dir.ensure_directory(&staging_name)?;
        // Every session looks after its own directory is there: of two that make nested targets at once, one sees the other.
        let real = dir.path().to_path_buf();
        let above =
            sessions_above(&real, session).into_iter().map(|(directory, _)| directory).next();
        if let Some(taken) = above.or_else(|| session_below(&real, NESTED)) {
            if new {
                dir.remove_tree(&staging_name)?;
            }
            return Err(MoveError::InUse { dir: taken });
        }
        Ok(Self { dir, staging, staging_name, _lock: lock })
    }

    /// Returns the target directory's path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the staging directory: files to be published beside the databases (`globals.sql`) go there.
    pub fn staging(&self) -> &Directory {
        &self.staging
    }

    /// Returns the staging directory of one database, made where it is missing.
    ///
    /// # Errors
    /// As the file system says.
    pub fn database(&self, database: &str) -> Result<Directory, MoveError> {
        Ok(self.staging.ensure_directory(&file_name_for_database(database))?.0)
    }

    /// Returns whether the database has been published, by this session or another.
    ///
    /// # Errors
    /// As the file system says.
    pub fn is_published(&self, database: &str) -> Result<bool, MoveError> {
        Ok(self.dir.kind(&file_name_for_database(database))?.is_some())
    }

    /// Publishes a database by one rename and returns its directory's name: staged files other than `files`
    /// (an earlier attempt's) are removed, the rest is made durable. Safe to repeat after a success.
    ///
    /// # Errors
    /// [`MoveError::Missing`] if one of `files` is not there, [`MoveError::Exists`] if something else has
    /// the name; nothing is published then.
    pub fn publish_database(&self, database: &str, files: &[&str]) -> Result<String, MoveError> {
        let name = file_name_for_database(database);
        let Some(staged) = self.staging.find_directory(&name)? else {
            return match self.dir.find_directory(&name)? {
                Some(_) => Ok(name), // the rename of an earlier call
                None => Err(MoveError::Missing { path: self.staging.join(&name) }),
            };
        };
        let wanted: std::collections::BTreeSet<_> = files.iter().copied().collect();
        let mut found = 0;
        for name in staged.names()? {
            if wanted.contains(name.as_str()) {
                found += 1;
            } else {
                staged.remove_tree(&name)?;
            }
        }
        if found != wanted.len() {
            let names = staged.names()?;
            let absent = wanted
                .into_iter()
                .find(|name| names.binary_search_by(|n| n.as_str().cmp(name)).is_err());
            return Err(MoveError::Missing { path: staged.join(absent.unwrap_or_default()) });
        }
        staged.sync()?;
        if self.dir.kind(&name)?.is_some() {
            return Err(MoveError::Exists { path: self.dir.join(&name) });
        }
        self.staging.rename_new(&name, &self.dir, &name)?;
        self.dir.sync()?;
        Ok(name)
    }

    /// Publishes a file of the staging directory by one rename; one of that name is replaced. Safe to repeat.
    ///
    /// # Errors
    /// [`MoveError::Missing`] if it is neither staged nor published, otherwise as the file system says.
    pub fn publish_file(&self, name: &str) -> Result<(), MoveError> {
        if self.staging.kind(name)?.is_none() {
            return match self.dir.kind(name)? {
                Some(_) => Ok(()), // the rename of an earlier call
                None => Err(MoveError::Missing { path: self.staging.join(name) }),
            };
        }
        self.staging.rename(name, &self.dir, name)?;
        self.dir.sync()
    }

    /// Writes `SHA256SUMS`, durably and at once.
    ///
    /// # Errors
    /// As the file system says.
    pub fn write_sha256sums(&self, entries: &[SumEntry]) -> Result<(), MoveError> {
        self.write_file(SHA256SUMS, format_sha256sums(entries).as_bytes())
    }

    /// Writes `export.json`, durably and at once: from now on the export is complete.
    ///
    /// # Errors
    /// As the file system says.
    pub fn write_export_json(&self, json: &[u8]) -> Result<(), MoveError> {
        self.write_file(EXPORT_JSON, json)
    }

    fn write_file(&self, name: &str, content: &[u8]) -> Result<(), MoveError> {
        self.staging.remove_file(name)?;
        let mut file = self.staging.create_file(name)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(|err| self.staging.error("write", name, err))?;
        self.publish_file(name)
    }

    /// Removes what the export that was here before lists (for `--replace`), once the new one is verified in
    /// the staging directory; see [`EarlierExport`]. Safe to repeat, also after a crash in the middle.
    ///
    /// # Errors
    /// [`MoveError::Foreign`], before anything is removed, if its directories hold other things.
    pub fn remove_replaced(&self) -> Result<(), MoveError> {
        crate::replace::remove_replaced(&self.dir, &self.staging)
    }

    /// Returns the bytes of the export whose listing is `sums`, with [`SHA256SUMS`] and [`EXPORT_JSON`].
    ///
    /// # Errors
    /// As the file system says.
    pub fn export_bytes(&self, sums: &[SumEntry]) -> Result<u64, MoveError> {
        let mut bytes = 0;
        for path in sums.iter().map(|sum| sum.path.as_str()).chain([SHA256SUMS, EXPORT_JSON]) {
            if !path.split('/').all(is_plain) {
                return Err(MoveError::Missing { path: self.dir.join(path) });
            }
            let path = self.dir.join(path);
            let found = path.symlink_metadata();
            bytes += found.map_err(|err| MoveError::target("stat", self.path(), &path, err))?.len();
        }
        Ok(bytes)
    }

    /// Removes the staging directory: the session is done here.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_staging(&self) -> Result<(), MoveError> {
        self.dir.remove_tree(&self.staging_name)?;
        self.dir.sync()
    }

    /// Undoes a session at `path`: with `published` what it has given a name (not where an earlier export is replaced: nothing has
    /// its name before the new one is complete), then its staging directory, then those directories of `made` that are empty.
    /// Only files whose checksums it has kept are removed. Returns the directories of its databases that stay, because they hold
    /// something else. Safe to repeat.
    ///
    /// # Errors
    /// [`MoveError::InUse`] while another session works there, otherwise as the file system says.
    pub fn discard(
        path: &Path,
        session: &str,
        published: bool,
        made: &[PathBuf],
    ) -> Result<Vec<PathBuf>, MoveError> {
        if !Self::missing(path).is_empty() {
            return remove_empty(made).map(|()| Vec::new());
        }
        let dir = open_target(path)?;
        let lock = lock(&dir)?; // held until the directory itself is gone
        let staging_name = staging_name(session);
        let mut kept = Vec::new();
        if published && let Some(staging) = dir.find_directory(&staging_name)? {
            let target = Self { dir, staging, staging_name, _lock: lock };
            kept = target.remove_published()?;
            target.dir.remove_tree(&target.staging_name)?;
            target.dir.sync()?;
            remove_empty(made)?;
        } else {
            dir.remove_tree(&staging_name)?;
            dir.sync()?;
            remove_empty(made)?;
        }
        Ok(kept)
    }

    /// Removes what this session has given a name; returns the directories that stay.
    fn remove_published(&self) -> Result<Vec<PathBuf>, MoveError> {
        let mut kept = Vec::new();
        for name in self.published_names()? {
            if name == GLOBALS_SQL {
                self.dir.remove_file(&name)?;
                continue;
            }
            let Some(directory) = self.dir.find_directory(&name)? else { continue };
            for sum in self.kept_sums(&name)?.unwrap_or_default() {
                if let Some(file) = sum.path.strip_prefix(&format!("{name}/")) {
                    directory.remove_file(file)?;
                }
            }
            if !self.dir.remove_if_empty(&name)? {
                kept.push(self.dir.join(&name));
            }
        }
        // Written last, with the staging directory still there, and only into a directory that was empty before.
        for name in [EXPORT_JSON, SHA256SUMS] {
            self.dir.remove_file(name)?;
        }
        Ok(kept)
    }

    /// The names that this session has given to what it delivered: those whose checksums it kept just before. A database that is
    /// still staged has not got its name: what is called so is somebody else's. (`globals.sql` may be staged anew by a retry.)
    fn published_names(&self) -> Result<Vec<String>, MoveError> {
        let mut names = Vec::new();
        for name in kept_names_in(&self.staging)? {
            if name == GLOBALS_SQL || self.staging.kind(&name)?.is_none() {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The names that `session` has given to what it delivered into the target at `path`, as in [`TargetDirectory::discard`].
    ///
    /// # Errors
    /// As the file system says.
    pub fn published(path: &Path, session: &str) -> Result<Vec<String>, MoveError> {
        if !Self::missing(path).is_empty() {
            return Ok(Vec::new());
        }
        let dir = open_target(path)?;
        let staging_name = staging_name(session);
        let Some(staging) = dir.find_directory(&staging_name)? else { return Ok(Vec::new()) };
        Self { dir, staging, staging_name, _lock: None }.published_names()
    }
}

/// Returns the directories above `path` that are another session's target than `session`'s, each with that session.
fn sessions_above(path: &Path, session: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for directory in path.ancestors().skip(1) {
        let entries = directory.read_dir().into_iter().flatten().flatten();
        let others = entries.filter_map(|entry| staged_by(&entry)).filter(|other| other != session);
        found.extend(others.map(|other| (directory.into(), other)));
    }
    found
}

/// Returns the session that made `entry` as its staging directory. What other accounts made is none: anybody may write into `/tmp`.
fn staged_by(entry: &std::fs::DirEntry) -> Option<String> {
    let name = entry.file_name().into_string().ok()?;
    let session = name.strip_prefix(STAGING_PREFIX)?;
    let owner = entry.metadata().ok()?.uid();
    [0, rustix::process::geteuid().as_raw()].contains(&owner).then(|| session.to_owned())
}

/// Returns the first directory below `path`, at most `depth` levels down, that is a session's target.
fn session_below(path: &Path, depth: u32) -> Option<PathBuf> {
    let depth = depth.checked_sub(1)?;
    let directory = |entry: &std::fs::DirEntry| {
        entry.file_type().is_ok_and(|kind| kind.is_dir()) && staged_by(entry).is_none()
    };
    let below = path.read_dir().ok()?.flatten().filter(directory).map(|entry| entry.path());
    let staged = |path: &Path| {
        path.read_dir().is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| staged_by(&entry).is_some()))
        })
    };
    below
        .into_iter()
        .find_map(|path| if staged(&path) { Some(path) } else { session_below(&path, depth) })
}

/// The name of a session's staging directory.
pub(crate) fn staging_name(session: &str) -> String {
    format!("{STAGING_PREFIX}{session}")
}

/// Removes those of `made` that are empty, the innermost first.
fn remove_empty(made: &[PathBuf]) -> Result<(), MoveError> {
    for path in made.iter().rev() {
        match rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(()),
            Err(err) => return Err(MoveError::target("remove", path, path, err)),
        }
    }
    Ok(())
}

/// Opens a directory that the user named: unlike all below it, it may be a link.
fn open_target(path: &Path) -> Result<Directory, MoveError> {
    let real = path.canonicalize().map_err(|err| MoveError::target("open", path, path, err))?;
    Directory::open(&real)
}

fn lock(dir: &Directory) -> Result<Option<File>, MoveError> {
    let fail = |err: Errno| MoveError::target("lock", dir.path(), dir.path(), err);
    // A description of its own: the lock lasts as long as this descriptor and no longer.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file: File = rustix::fs::openat(dir, ".", flags, Mode::empty()).map_err(fail)?.into();
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(MoveError::InUse { dir: dir.path().into() }),
        Err(
            err @ (Errno::BADF | Errno::NOLCK | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS),
        ) => {
            tracing::warn!(
                "`{}` cannot be locked ({err}): keep other exports away from it",
                dir.path().display()
            );
            return Ok(None);
        }
        Err(err) => return Err(fail(err)),
    }
    if rustix::fs::fstat(&file).map_err(fail)?.st_nlink == 0 {
        return Err(fail(Errno::NOENT)); // its maker removed it between our open and the lock
    }
    Ok(Some(file))
}

fn access(path: &Path) -> Result<Access, MoveError> {
    let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match rustix::fs::accessat(CWD, path, wanted, AtFlags::EACCESS) {
        Ok(()) => Ok(Access::Writable),
        Err(Errno::ROFS) => Ok(Access::ReadOnly),
        Err(Errno::ACCESS | Errno::PERM) => Ok(Access::NotPermitted),
        Err(err) => Err(MoveError::target("stat", path, path, err)),
    }
}

/// Returns the parent of a path; a relative one of a single part lies in the current directory.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}
