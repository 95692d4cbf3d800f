//! Directories made by `pg_basebackup -Fp`, or copied as PostgreSQL's manual says ("Making a Base Backup Using the Low
//! Level API").
//!
//! A repository is one such directory, or a directory that holds several; then each one's name is its id. Tar backups
//! and incremental ones are refused by name.

mod directory;
mod in_use;
mod manifest;
mod opening;
mod segments;
mod tree;

use std::path::PathBuf;

use self::directory::Directory;
use super::objects::is_absent;
use crate::error::SourceError;
use crate::location::Location;
use crate::repository::{Backup, BackupInfo, BackupType, WalWanted};
use crate::store::{Entry, Kind, Root};

/// Names of a tar backup's main part.
const TAR_NAMES: [&str; 6] =
    ["base.tar", "base.tar.gz", "base.tar.lz4", "base.tar.zst", "base.tar.bz2", "base.tar.xz"];

/// One or several base backups.
#[derive(Debug)]
pub(crate) struct BaseBackups {
    root: Root,
    members: Vec<Member>,
    location: Location,
}

/// One backup's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    id: String,
    path: PathBuf,
    form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Tar,
}

impl BaseBackups {
    /// Whether `root` is or holds a base backup.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn detect(root: &Root, entries: &[Entry]) -> Result<bool, SourceError> {
        Ok(!members(root, entries)?.is_empty())
    }

    /// Opens the directory.
    ///
    /// # Errors
    /// It holds no base backup, or cannot be read.
    pub(crate) fn open(root: Root, location: &Location) -> Result<Self, SourceError> {
        let members = members(&root, &root.list("")?)?;
        if members.is_empty() {
            let found =
                "neither `PG_VERSION` and `global/pg_control` nor directories that have them"
                    .into();
            return Err(SourceError::NotARepository { path: root.path().to_path_buf(), found });
        }
        Ok(Self { root, members, location: location.clone() })
    }

    /// Lists the backups, oldest first.
    ///
    /// # Errors
    /// None of its own: what is wrong with a backup is said in its entry.
    pub(crate) fn backups(&self) -> Result<Vec<BackupInfo>, SourceError> {
        let mut backups: Vec<BackupInfo> =
            self.members.iter().map(|member| self.info(member)).collect();
        backups.sort_by(|left, right| key(left).cmp(&key(right)));
        Ok(backups)
    }

    /// Opens one backup.
    ///
    /// # Errors
    /// See [`crate::Repository::open_backup`].
    pub(crate) fn open_backup(
        &self,
        id: Option<&str>,
        wal: WalWanted,
    ) -> Result<Backup, SourceError> {
        let (member, info) = self.choose(id)?;
        if member.form == Form::Tar {
            return Err(SourceError::Unsupported {
                object: format!("`{}`", member.path.display()),
                what: "a tar backup (pg_basebackup -Ft)".into(),
            });
        }
        let directory = Directory::read(&member.path, &self.location)?;
        opening::open(directory, &self.location, info, wal)
    }

    /// See [`crate::Repository::identifying_files`].
    pub(crate) fn identifying_files(&self, id: &str) -> Vec<String> {
        let Some(member) = self.members.iter().find(|member| member.id == id) else {
            return Vec::new();
        };
        let directory = member.path.strip_prefix(self.root.path()).unwrap_or(&member.path);
        let files = ["backup_manifest", "backup_label", "global/pg_control"];
        files.map(|name| directory.join(name).display().to_string()).into()
    }

    /// Finds the backup `id`, or the newest. To describe a backup is to read much of it, so no other is unless needed.
    fn choose(&self, id: Option<&str>) -> Result<(&Member, BackupInfo), SourceError> {
        let id = match (id, &self.members[..]) {
            (Some(id), _) => id.to_owned(),
            (None, [only]) => only.id.clone(),
            (None, _) => self.backups()?.pop().map(|info| info.id).unwrap_or_default(),
        };
        let member = self.members.iter().find(|member| member.id == id);
        let member = member.ok_or_else(|| SourceError::UnknownBackup {
            path: self.root.path().to_path_buf(),
            id,
            known: self.members.iter().map(|member| member.id.clone()).collect(),
        })?;
        Ok((member, self.info(member)))
    }

    fn info(&self, member: &Member) -> BackupInfo {
        let mut info = BackupInfo {
            id: member.id.clone(),
            backup_type: BackupType::Base,
            started_at: 0,
            stopped_at: None,
            size: 0,
            stored_size: None,
            postgres_major: 0,
            prior: None,
            damaged: false,
            annotations: Default::default(),
            archived_until: None,
            start_lsn: None,
            stop_lsn: None,
            unusable: None,
        };
        let result = match member.form {
            Form::Tar => {
                info.started_at = Root::open(&member.path)
                    .and_then(|root| root.metadata("."))
                    .map_or(0, |entry| entry.modified);
                info.unusable = Some("a tar backup (pg_basebackup -Ft) is not read yet".into());
                return info;
            }
            Form::Plain => Directory::read(&member.path, &self.location)
                .and_then(|directory| directory.describe(&mut info, &self.location)),
        };
        if let Err(err) = result {
            info.unusable = Some(err.to_string());
        }
        info
    }
}

fn key(info: &BackupInfo) -> (i64, &str) {
    (info.stopped_at.unwrap_or(info.started_at), &info.id)
}

/// The backups in `root`: itself, or those in its directories. A directory that may not be entered is passed over,
/// unless nothing else is there.
fn members(root: &Root, entries: &[Entry]) -> Result<Vec<Member>, SourceError> {
    if let Some(form) = form(root, "")? {
        let path = root.path().canonicalize().unwrap_or_else(|_| root.path().to_path_buf());
        let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Ok(vec![Member { id, path: root.path().to_path_buf(), form }]);
    }
    let mut members = Vec::new();
    let mut refused = None;
    for entry in entries.iter().filter(|entry| entry.kind == Kind::Directory) {
        let Some(name) = entry.name.to_str() else { continue };
        match form(root, &format!("{name}/")) {
            Ok(Some(form)) => {
                members.push(Member { id: name.to_owned(), path: root.path().join(name), form })
            }
            Ok(None) => {}
            Err(err) => refused = Some(err),
        }
    }
    match refused {
        Some(err) if members.is_empty() => Err(err),
        _ => Ok(members),
    }
}

/// What kind of backup lies at `prefix` (empty, or a directory with `/`).
fn form(root: &Root, prefix: &str) -> Result<Option<Form>, SourceError> {
    let is_file = |name: &str| match root.metadata(format!("{prefix}{name}")) {
        Ok(entry) => Ok(entry.kind == Kind::File),
        Err(err) if is_absent(&err) => Ok(false),
        Err(err) => Err(err),
    };
    if is_file("PG_VERSION")? && is_file("global/pg_control")? {
        return Ok(Some(Form::Plain));
    }
    for name in TAR_NAMES {
        if is_file(name)? {
            return Ok(Some(Form::Tar));
        }
    }
    Ok(None)
}
