//! Repositories and what is in them: the list of backups, and one backup opened.
//!
//! All results are plain data: they are made in a process that runs as the repository's owner and used in others.
//! Start at [`Repository::open`], then [`Repository::backups`] and [`Repository::open_backup`].

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::SourceError;
use crate::formats::basebackup::BaseBackups;
use crate::formats::pgbackrest::PgBackRest;
use crate::location::{Kind, Location};
use crate::map::{BackupMap, ClusterPath, ObjectTable};
use crate::store::{self, Root};

pub use crate::formats::relation::database_sizes;

/// An opened repository. Nothing in it is ever written.
#[derive(Debug)]
pub struct Repository(Format);

#[derive(Debug)]
enum Format {
    PgBackRest(PgBackRest),
    BaseBackup(BaseBackups),
}

/// What a backup holds of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupType {
    /// pgBackRest: all files.
    Full,
    /// pgBackRest: what changed since a full backup.
    Differential,
    /// pgBackRest: what changed since any backup.
    Incremental,
    /// A directory made by `pg_basebackup`.
    Base,
}

impl std::fmt::Display for BackupType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Full => "full",
            Self::Differential => "differential",
            Self::Incremental => "incremental",
            Self::Base => "base",
        })
    }
}

/// How far the WAL reaches that goes with a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalReach {
    /// Name of the last segment on the backup's timeline that follows the backup without a gap.
    pub segment: String,
    /// When it was archived: the last modification of its file, seconds since 1970-01-01 UTC.
    pub modified: i64,
    /// The segment that is missing behind it, where later ones are there: recovery gets no further.
    pub gap: Option<String>,
}

/// One backup of a list. Times are seconds since 1970-01-01 UTC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// What its own tool calls it: pgBackRest's label, or the directory's name.
    pub id: String,
    /// What it holds.
    pub backup_type: BackupType,
    /// When it began; of a base backup whose label gives a time in another zone than UTC, the label's file time.
    pub started_at: i64,
    /// When it ended, where that is known; of a base backup, the time of its last file.
    pub stopped_at: Option<i64>,
    /// Bytes of the cluster's files.
    pub size: u64,
    /// Bytes they take in the repository, where the tool says so.
    pub stored_size: Option<u64>,
    /// Major version of PostgreSQL (9 for 9.x; 0 where it cannot be told).
    pub postgres_major: u32,
    /// The backup that this one builds upon.
    pub prior: Option<String>,
    /// The tool found page checksum errors when it took the backup.
    pub damaged: bool,
    /// What the user noted down with the tool's `--annotation`.
    pub annotations: BTreeMap<String, String>,
    /// How far the WAL reaches on the backup's timeline.
    pub archived_until: Option<WalReach>,
    /// Where recovery begins.
    pub start_lsn: Option<u64>,
    /// Where the backup is consistent.
    pub stop_lsn: Option<u64>,
    /// Why it cannot be opened: damage, or a feature that is not read yet.
    pub unusable: Option<String>,
}

/// Which WAL a backup is opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalWanted {
    /// What is needed to reach the end of the backup.
    EndOfBackup,
    /// All there is on the timeline on which the backup ended.
    Latest,
}

/// A database by its name at backup time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseEntry {
    /// `pg_database.oid`.
    pub oid: u32,
    /// `pg_database.datname`.
    pub name: String,
}

/// A tablespace of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// `pg_tablespace.oid`.
    pub oid: u32,
    /// `pg_tablespace.spcname`, where the repository knows it.
    pub name: Option<String>,
    /// Its location in the original cluster; of a base backup without a `tablespace_map`, where its link leads.
    pub location: String,
    /// The directory that a base backup's link leads to.
    pub mapped: Option<PathBuf>,
}

/// What `backup_label` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupLabel {
    /// Where recovery begins.
    pub start_lsn: u64,
    /// The WAL segment that holds it.
    pub start_segment: String,
    /// The checkpoint to begin with.
    pub checkpoint_lsn: u64,
    /// The timeline it begins on.
    pub timeline: u32,
    /// `BACKUP METHOD`.
    pub method: Option<String>,
    /// `BACKUP FROM`: `primary` or `standby`.
    pub from: Option<String>,
    /// `START TIME`, in the server's own words: its zone is an abbreviation.
    pub start_time: Option<String>,
    /// `LABEL`.
    pub label: Option<String>,
}

/// The WAL that the map holds in `data/pg_wal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalPresented {
    /// First segment; none when there is no WAL at all.
    pub first: Option<String>,
    /// Last segment.
    pub last: Option<String>,
    /// Bytes of a segment.
    pub segment_size: u64,
    /// The segment in which the backup ends, where that is known.
    pub stop_segment: Option<String>,
    /// With [`WalWanted::Latest`]: the segment that recovery must reach.
    pub expected_last: Option<String>,
}

/// One backup, opened: everything a mount and an instance on it need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Its entry in the list.
    pub info: BackupInfo,
    /// Its files, WAL included.
    pub map: BackupMap,
    /// The stored objects that the map numbers.
    pub objects: ObjectTable,
    /// The cluster's system identifier.
    pub system_identifier: Option<u64>,
    /// The catalog version, which names tablespace directories.
    pub catalog_version: Option<u32>,
    /// The databases at backup time, where the repository lists them (pgBackRest).
    pub databases: Option<Vec<DatabaseEntry>>,
    /// The tablespaces, by OID.
    pub tablespaces: Vec<Tablespace>,
    /// Its label; none for an offline backup, a clean shutdown, a standby's directory or a snapshot.
    pub label: Option<BackupLabel>,
    /// The timeline to recover on: that of the backup's last WAL.
    pub timeline: u32,
    /// The WAL in the map.
    pub wal: WalPresented,
    /// The cluster has page checksums.
    pub page_checksums: bool,
    /// Files in which the tool found page checksum errors when it took the backup.
    pub damaged_files: Vec<ClusterPath>,
    /// The links that are followed, by name, and where they lead.
    pub roots_shown: Vec<(String, PathBuf)>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Repository {
    /// Opens the repository at `location`, and finds out its kind if none is given.
    ///
    /// # Errors
    /// [`SourceError`]: not there, not readable, empty, no repository, or an option that does not fit.
    pub fn open(location: &Location) -> Result<Self, SourceError> {
        let path = &location.path;
        let root = open_root(path)?;
        let entries = root.list("")?;
        if entries.is_empty() {
            return Err(SourceError::Empty { path: path.clone() });
        }
        let kind = match location.kind {
            Some(kind) => kind,
            None => detect(&root, &entries)?,
        };
        refuse_foreign_options(location, kind)?;
        Ok(Self(match kind {
            Kind::PgBackRest => {
                Format::PgBackRest(PgBackRest::open(root, location.stanza.as_deref())?)
            }
            Kind::BaseBackup => Format::BaseBackup(BaseBackups::open(root, location)?),
        }))
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match &self.0 {
            Format::PgBackRest(_) => Kind::PgBackRest,
            Format::BaseBackup(_) => Kind::BaseBackup,
        }
    }

    /// pgBackRest's stanza.
    pub fn stanza(&self) -> Option<&str> {
        match &self.0 {
            Format::PgBackRest(repository) => Some(repository.stanza()),
            Format::BaseBackup(_) => None,
        }
    }

    /// Lists the finished backups, oldest first; also those that cannot be opened, with the reason.
    ///
    /// # Errors
    /// [`SourceError`] when the list itself cannot be read.
    pub fn backups(&self) -> Result<Vec<BackupInfo>, SourceError> {
        match &self.0 {
            Format::PgBackRest(repository) => repository.backups(),
            Format::BaseBackup(repository) => repository.backups(),
        }
    }

    /// Names files that tell the backup `id` from any other, by their paths in the repository; not all of them are always there.
    pub fn identifying_files(&self, id: &str) -> Vec<String> {
        match &self.0 {
            Format::PgBackRest(repository) => repository.identifying_files(id),
            Format::BaseBackup(repository) => repository.identifying_files(id),
        }
    }

    /// Opens the backup `id`, or the newest, with the WAL that is wanted. Every file's object is known to be there
    /// with the size it must have; contents are verified when they are read.
    ///
    /// # Errors
    /// [`SourceError`]: an unknown or unfinished backup, a feature that is not read, damage, missing WAL.
    pub fn open_backup(&self, id: Option<&str>, wal: WalWanted) -> Result<Backup, SourceError> {
        match &self.0 {
            Format::PgBackRest(repository) => repository.open_backup(id, wal),
            Format::BaseBackup(repository) => repository.open_backup(id, wal),
        }
    }
}

fn open_root(path: &Path) -> Result<Root, SourceError> {
    Root::open(path).map_err(|err| match err.kind() {
        io::ErrorKind::NotFound => SourceError::NoSuchRepository { path: path.to_path_buf() },
        io::ErrorKind::NotADirectory => SourceError::NotARepository {
            path: path.to_path_buf(),
            found: "it is no directory".into(),
        },
        _ => err.into(),
    })
}

fn detect(root: &Root, entries: &[store::Entry]) -> Result<Kind, SourceError> {
    let has = |name: &str| entries.iter().any(|entry| entry.name == name);
    if PgBackRest::detect(root)? {
        return Ok(Kind::PgBackRest);
    }
    if BaseBackups::detect(root, entries)? {
        return Ok(Kind::BaseBackup);
    }
    let found = if has("backup.info") || has("archive.info") || has("backup.manifest") {
        "it lies inside a pgBackRest repository; name the directory that holds `backup` and `archive`"
    } else if has("backup") && has("archive") {
        "it looks like a pgBackRest repository, but `backup/<stanza>/backup.info` is missing: no backup was \
         finished yet, or the file was lost"
    } else {
        "neither `backup/<stanza>/backup.info` (pgBackRest) nor `PG_VERSION` and `global/pg_control` \
         (pg_basebackup), here or one directory below"
    };
    Err(SourceError::NotARepository { path: root.path().to_path_buf(), found: found.into() })
}

fn refuse_foreign_options(location: &Location, kind: Kind) -> Result<(), SourceError> {
    let given = [
        ("--stanza", location.stanza.is_some(), Kind::PgBackRest),
        ("--wal-archive", !location.wal_archives.is_empty(), Kind::BaseBackup),
        ("--backup-label", location.backup_label.is_some(), Kind::BaseBackup),
        ("--atomic-snapshot", location.atomic_snapshot, Kind::BaseBackup),
        ("--tablespace", !location.tablespaces.is_empty(), Kind::BaseBackup),
    ];
    match given.into_iter().find(|(_, given, owner)| *given && *owner != kind) {
        Some((option, ..)) => Err(SourceError::OptionOfOtherKind { option, kind }),
        None => Ok(()),
    }
}
