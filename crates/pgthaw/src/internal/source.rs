//! The child that reads a repository: one task in, one answer out.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use pgthaw_postgres::catalogs;
use pgthaw_postgres::control::{self, ControlFile, StartKind, what_start};
use pgthaw_postgres::version::Major;
use pgthaw_session::{RecoveryChoice, RepositoryChoice};
use pgthaw_source::error::SourceError;
use pgthaw_source::location::{Kind, Location};
use pgthaw_source::map::{BackupMap, ObjectTable};
use pgthaw_source::reader::Reader;
use pgthaw_source::repository::{Backup, Repository, WalWanted};
use pgthaw_source::store::{LocalStore, Root};
use serde::{Deserialize, Serialize};

use crate::wire::{
    ApiError, BackupDatabase, BackupFacts, BackupTablespace, BackupsAnswer, StartFacts,
};

/// What the child is asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum SourceTask {
    /// List the backups.
    Backups {
        /// Where they lie.
        repository: RepositoryChoice,
    },
    /// Tell what is known of one backup without mounting it.
    Facts {
        /// Where it lies.
        repository: RepositoryChoice,
        /// Its id; without it the newest.
        backup: Option<String>,
        /// How far it will be recovered.
        recovery: RecoveryChoice,
    },
    /// Tell by what another machine recognizes a backup.
    Identity {
        /// Where it lies.
        repository: RepositoryChoice,
        /// Its id.
        backup: String,
    },
    /// Tell the checksums of files.
    Checksums {
        /// The directory that holds them.
        directory: PathBuf,
        /// Their paths in it.
        files: Vec<String>,
    },
    /// Build the map of one backup.
    Map {
        /// Where it lies.
        repository: RepositoryChoice,
        /// Its id.
        backup: String,
        /// How far it will be recovered.
        recovery: RecoveryChoice,
    },
}

/// What a mount serves: the map, and which stored files its objects are.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountSource {
    /// The files.
    pub map: BackupMap,
    /// Where their bytes lie on this machine.
    pub objects: ObjectTable,
}

/// Bytes of decoded pages that the small reads of this child may keep.
const CACHE: u64 = 16 << 20;

/// Answers the task on standard input.
pub fn run() -> ExitCode {
    let answer = super::task::<SourceTask>()
        .map_err(|err| ApiError {
            message: format!("the task of the repository's reader: {err}"),
            hint: None,
            usage: false,
        })
        .and_then(answer);
    let (bytes, code) = match answer {
        Ok(bytes) => (bytes, ExitCode::SUCCESS),
        Err(error) => (json(&error), ExitCode::FAILURE),
    };
    match io::stdout().lock().write_all(&bytes) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn answer(task: SourceTask) -> Result<Vec<u8>, ApiError> {
    match task {
        SourceTask::Backups { repository } => {
            let repository = open(&repository)?;
            let backups = repository.backups().map_err(api_error)?;
            let stanza = repository.stanza().map(str::to_owned);
            Ok(json(&BackupsAnswer { kind: repository.kind().to_string(), stanza, backups }))
        }
        SourceTask::Facts { repository, backup, recovery } => {
            let opened = open(&repository)?;
            let backup =
                opened.open_backup(backup.as_deref(), wanted(recovery)).map_err(api_error)?;
            Ok(json(&facts(&opened, &backup, &repository)?))
        }
        SourceTask::Identity { repository, backup } => {
            let files = open(&repository)?.identifying_files(&backup);
            let sums = checksums(&repository.path, &files)?.into_iter();
            let there = files.iter().zip(sums).filter_map(|(file, sum)| Some((file, sum?)));
            Ok(json(&there.collect::<Vec<_>>()))
        }
        SourceTask::Checksums { directory, files } => Ok(json(&checksums(&directory, &files)?)),
        SourceTask::Map { repository, backup, recovery } => {
            let backup = open(&repository)?
                .open_backup(Some(&backup), wanted(recovery))
                .map_err(api_error)?;
            let source = MountSource { map: backup.map, objects: backup.objects };
            Ok(postcard::to_stdvec(&source).expect("a map is plain data"))
        }
    }
}

/// The SHA-256 of `files` below `directory`; nothing for one that is not there.
fn checksums(directory: &Path, files: &[String]) -> Result<Vec<Option<[u8; 32]>>, ApiError> {
    let root = Root::open(directory).map_err(|err| ApiError::broken(err.to_string()))?;
    let sum = |file: &String| match root.open_file(file) {
        Ok(mut opened) => pgthaw_mover::sha256_of(&mut opened).map(|(_, sum)| Some(sum)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    };
    let failed = |file: &String, err: io::Error| {
        ApiError::broken(format!("read `{}`: {err}", directory.join(file).display()))
    };
    files.iter().map(|file| sum(file).map_err(|err| failed(file, err))).collect()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("an answer is plain data")
}

fn open(choice: &RepositoryChoice) -> Result<Repository, ApiError> {
    let kind = choice.kind.as_deref().map(|word| {
        let known = Kind::ALL.into_iter().find(|(_, known)| *known == word);
        let unknown = || ApiError {
            message: format!("`{word}` is no kind of repository"),
            hint: None,
            usage: true,
        };
        known.map(|(kind, _)| kind).ok_or_else(unknown)
    });
    let kind = kind.transpose()?;
    let location = Location {
        path: choice.path.clone(),
        kind,
        stanza: choice.stanza.clone(),
        wal_archives: choice.wal_archives.clone(),
        backup_label: choice.backup_label.clone(),
        atomic_snapshot: choice.atomic_snapshot,
        tablespaces: choice.tablespaces.iter().cloned().collect(),
    };
    Repository::open(&location).map_err(api_error)
}

fn wanted(recovery: RecoveryChoice) -> WalWanted {
    match recovery {
        RecoveryChoice::EndOfBackup => WalWanted::EndOfBackup,
        RecoveryChoice::Latest => WalWanted::Latest,
    }
}

/// An error of the repository's reader, with all its causes, for people.
fn api_error(err: SourceError) -> ApiError {
    ApiError { message: with_causes(&err), hint: err.hint(), usage: err.is_usage() }
}

/// An error's text followed by those of its causes.
pub fn with_causes(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}

/// Reads single files of a backup by their path in the data directory.
struct Files {
    reader: Reader,
    numbers: BTreeMap<String, usize>,
}

impl Files {
    fn open(backup: &Backup) -> Result<Self, ApiError> {
        let store = LocalStore::open(backup.objects.clone()).map_err(|err| ApiError {
            message: format!("open the repository: {err}"),
            hint: None,
            usage: false,
        })?;
        let wanted = |path: &str| path.starts_with("data/global/");
        let files: Vec<_> =
            backup.map.files.iter().filter(|file| wanted(file.path.as_str())).cloned().collect();
        let numbers = files
            .iter()
            .enumerate()
            .map(|(number, file)| (file.path.as_str().to_owned(), number))
            .collect();
        Ok(Self { reader: Reader::new(Arc::new(store), files, CACHE), numbers })
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let number = self.numbers.get(&format!("data/{path}"));
        let number = number.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("`{path}` is not in the backup"))
        })?;
        self.reader.read_whole(*number).map_err(|err| io::Error::other(with_causes(&err)))
    }
}

fn facts(
    repository: &Repository,
    backup: &Backup,
    choice: &RepositoryChoice,
) -> Result<BackupFacts, ApiError> {
    let plain = |message: String| ApiError { message, hint: None, usage: false };
    let files = Files::open(backup)?;
    let mut notes = backup.notes.clone();
    let control = files
        .read("global/pg_control")
        .map_err(|err| plain(format!("`global/pg_control`: {err}")))?;
    let major = Major::try_from(backup.info.postgres_major).map_err(|err| ApiError {
        message: format!("backup {}: {err}", backup.info.id),
        hint: Some(err.hint().into()),
        usage: false,
    })?;
    let control =
        ControlFile::parse(&control).map_err(|err| plain(format!("`global/pg_control`: {err}")))?;
    let beside = control::StartFacts {
        backup_label: backup.label.is_some(),
        recovery_signal: false, // hidden from the mount, and no ground for starting a directory without a label
        atomic_snapshot: choice.atomic_snapshot,
    };
    let start = what_start(&control, beside).map_err(|err| ApiError {
        message: err.to_string(),
        hint: Some(err.hint().into()),
        usage: false,
    })?;
    let archive_recovery =
        matches!(start, StartKind::ArchiveRecovery | StartKind::StandbyDirectory);
    let mut read = |path: &str| files.read(path);
    let rows = match catalogs::databases(&mut read, major) {
        Ok(rows) => rows,
        Err(err) => {
            notes.push(format!(
                "the databases' rows cannot be read before the start: {}",
                with_causes(&err)
            ));
            Vec::new()
        }
    };
    let superuser = catalogs::superuser(&mut read).ok().flatten().map(|role| role.name);
    let names = catalogs::tablespaces(&mut read).unwrap_or_default();
    let sizes = pgthaw_source::repository::database_sizes(&backup.map);
    let relations = relation_counts(&backup.map);
    let largest = largest_relations(&backup.map);
    let damaged =
        |oid: u32| backup.damaged_files.iter().any(|path| database_of(path.as_str()) == Some(oid));
    let databases = match (&backup.databases, rows.is_empty()) {
        (Some(listed), true) => {
            listed.iter().map(|entry| BackupDatabase::bare(entry.oid, &entry.name)).collect()
        }
        _ => rows.iter().map(BackupDatabase::from_row).collect::<Vec<_>>(),
    };
    let databases = databases
        .into_iter()
        .map(|database| BackupDatabase {
            bytes: sizes.get(&database.oid).copied().unwrap_or(0),
            relations: relations.get(&database.oid).copied().unwrap_or(0),
            largest_relation: largest.get(&database.oid).copied().unwrap_or(0),
            damaged: damaged(database.oid),
            ..database
        })
        .collect();
    let tablespaces = backup.tablespaces.iter().map(|tablespace| BackupTablespace {
        oid: tablespace.oid,
        name: tablespace.name.clone().or_else(|| {
            names.iter().find(|row| row.oid == tablespace.oid).map(|row| row.name.clone())
        }),
        location: tablespace.location.clone(),
    });
    Ok(BackupFacts {
        kind: repository.kind().to_string(),
        stanza: repository.stanza().map(str::to_owned),
        backup: backup.info.clone(),
        databases,
        tablespaces: tablespaces.collect(),
        start: StartFacts {
            major: backup.info.postgres_major,
            archive_recovery,
            crash_recovery: start == StartKind::AtomicSnapshot,
            timeline: backup.timeline,
            max_prepared_transactions: control.max_prepared_transactions,
            block_size: control.block_size,
            last_segment: backup.wal.last.clone(),
            segment_size: backup.wal.segment_size,
            checkpoint: control.checkpoint.to_string(),
        },
        page_checksums: backup.page_checksums,
        further_roots: backup.roots_shown.clone(),
        wal_bytes: wal_bytes(&backup.map),
        superuser,
        notes,
        files: backup.map.files.len() as u64,
        bytes: backup.map.files.iter().map(|file| file.size).sum(),
    })
}

impl BackupDatabase {
    fn bare(oid: u32, name: &str) -> Self {
        Self {
            oid,
            name: name.into(),
            bytes: 0,
            relations: 0,
            largest_relation: 0,
            template: name == "template0" || name == "template1",
            allows_connections: name != "template0",
            damaged: false,
            collate: None,
            ctype: None,
        }
    }

    fn from_row(row: &catalogs::DatabaseRow) -> Self {
        Self {
            template: row.is_template,
            allows_connections: row.allow_connections && row.connection_limit != -2,
            collate: row.collate.clone(),
            ctype: row.ctype.clone(),
            ..Self::bare(row.oid, &row.name)
        }
    }
}

/// The OID of the database that the file at `path` belongs to.
pub fn database_of(path: &str) -> Option<u32> {
    let mut parts = path.split('/');
    match (parts.next(), parts.next()) {
        (Some("data"), Some("base")) => parts.next()?.parse().ok(),
        (Some("tablespaces"), Some(_)) => parts.nth(1)?.parse().ok(), // tablespaces/<oid>/PG_<version>/<database>
        _ => None,
    }
}

/// Number of main forks per database, segments counted once.
fn relation_counts(map: &BackupMap) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for path in map.files.iter().map(|file| file.path.as_str()) {
        let name = path.rsplit('/').next().unwrap_or(path);
        if let Some(oid) = database_of(path)
            && name.bytes().all(|byte| byte.is_ascii_digit())
        {
            *counts.entry(oid).or_insert(0) += 1;
        }
    }
    counts
}

/// Bytes of the largest relation per database: the main fork's segments together.
fn largest_relations(map: &BackupMap) -> BTreeMap<u32, u64> {
    let mut relations = BTreeMap::<&str, u64>::new();
    for file in &map.files {
        let path = file.path.as_str();
        *relations.entry(relation_of(path).unwrap_or(path)).or_default() += file.size;
    }
    let mut largest = BTreeMap::new();
    for (path, bytes) in relations {
        if let Some(oid) = database_of(path) {
            let most: &mut u64 = largest.entry(oid).or_default();
            *most = bytes.max(*most);
        }
    }
    largest
}

/// The path of the first segment of the relation that the file at `path` belongs to; nothing if it is another fork, or no relation's.
fn relation_of(path: &str) -> Option<&str> {
    let begin = path.rfind('/')? + 1;
    let digits = path[begin..].bytes().take_while(u8::is_ascii_digit).count();
    let (first, rest) = path.split_at(begin + digits);
    (digits > 0 && (rest.is_empty() || rest.starts_with('.'))).then_some(first)
}

fn wal_bytes(map: &BackupMap) -> u64 {
    map.files
        .iter()
        .filter(|file| file.path.as_str().starts_with("data/pg_wal/"))
        .map(|file| file.size)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{database_of, relation_of};

    #[test]
    fn a_path_tells_its_database() {
        let cases = [
            ("data/base/16384/1259", Some(16384)),
            ("data/base/16384/1259_fsm", Some(16384)),
            ("tablespaces/16390/PG_15_202209061/16391/2619.1", Some(16391)),
            ("data/global/1262", None),
            ("data/PG_VERSION", None),
            ("tablespaces/16390/PG_15_202209061", None),
        ];
        for (path, want) in cases {
            assert_eq!(database_of(path), want, "{path}");
        }
    }

    #[test]
    fn segments_belong_to_one_relation() {
        let cases = [
            ("data/base/1/2619", Some("data/base/1/2619")),
            ("data/base/1/2619.12", Some("data/base/1/2619")),
            ("data/base/1/2619_fsm", None),
            ("data/base/1/PG_VERSION", None),
        ];
        for (path, want) in cases {
            assert_eq!(relation_of(path), want, "{path}");
        }
    }
}
