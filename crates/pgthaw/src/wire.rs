//! What pgthaw's processes say to each other: explorer and server, server and agent, and the children that read a repository.
//!
//! All of it is JSON over a Unix socket or a pipe. None of it holds a secret.

use std::path::PathBuf;

use jiff::Timestamp;
use pgthaw_link::LineError;
use pgthaw_session::observed::{Failure, RecoveryEnd};
use pgthaw_session::session::Place;
use pgthaw_session::{ExportRequest, RepositoryChoice};
use pgthaw_source::repository::BackupInfo;
use serde::{Deserialize, Serialize};

/// An error on its way to a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What failed, on which object, why.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// The request itself is wrong (exit code 2), not the work (exit code 1).
    pub usage: bool,
}

impl ApiError {
    /// Something that should not happen: no request can mend it.
    pub fn broken(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, usage: false }
    }
}

impl From<LineError> for ApiError {
    fn from(error: LineError) -> Self {
        Self { message: error.to_string(), hint: error.hint, usage: false }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self { hint: error.hint, ..Self::new(error.message) }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self { message: failure.message, hint: failure.hint, usage: false }
    }
}

/// `POST /v1/backups` answers with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackupsAnswer {
    /// The format that was found: `pgbackrest` or `basebackup`.
    pub kind: String,
    /// pgBackRest's stanza.
    pub stanza: Option<String>,
    /// Oldest first.
    pub backups: Vec<BackupInfo>,
}

/// `POST /v1/databases` asks with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabasesRequest {
    /// Where the backup lies.
    pub repository: RepositoryChoice,
    /// Its id; without it the newest.
    pub backup: Option<String>,
}

/// `POST /v1/databases` answers with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabasesAnswer {
    /// The backup.
    pub backup: BackupInfo,
    /// Its databases, as they were when the backup was made.
    pub databases: Vec<BackupDatabase>,
}

/// A database of a backup, seen without starting PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDatabase {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Number of its files' relations: an upper bound of what pg_dump locks.
    pub relations: u64,
    /// Bytes of its largest relation: about the longest file of a dump that is not compressed.
    #[serde(default)]
    pub largest_relation: u64,
    /// Whether it is a template.
    pub template: bool,
    /// Whether it accepts connections.
    pub allows_connections: bool,
    /// Whether the backup tool found damaged pages in it.
    pub damaged: bool,
    /// `datcollate`, where its row could be read.
    pub collate: Option<String>,
    /// `datctype`, where its row could be read.
    pub ctype: Option<String>,
}

impl BackupDatabase {
    /// Its name and its locales of the C library.
    pub fn locales(&self) -> (&str, [Option<&str>; 2]) {
        (&self.name, [self.collate.as_deref(), self.ctype.as_deref()])
    }

    /// Whether `request` asks for it, as far as the backup's own names tell.
    pub fn is_selected_by(&self, request: &ExportRequest) -> bool {
        match request.all {
            true => self.allows_connections && !self.template && request.all_includes(&self.name),
            false => request.databases.contains(&self.name),
        }
    }
}

/// One thing that a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A certainty refuses the export; an estimate or a remark does not.
    pub error: bool,
    /// An error of the request itself (exit code 2), not of this machine or the backup (exit code 1).
    #[serde(default)]
    pub usage: bool,
    /// What was found, on which object.
    pub message: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// What a check found, all at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// What speaks for the export: one line per thing checked, such as `PostgreSQL 15.18 in /usr/lib/postgresql/15/bin`.
    pub passed: Vec<String>,
    /// Errors and warnings.
    pub findings: Vec<Finding>,
    /// The time on the machine that was checked, for whoever asked it from another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Timestamp>,
}

impl CheckReport {
    /// Adds a certainty that refuses the export.
    pub fn error(&mut self, message: impl Into<String>, remedy: Option<String>) {
        self.findings.push(Finding { error: true, usage: false, message: message.into(), remedy });
    }

    /// Adds an error of the request itself.
    pub fn usage_error(&mut self, message: impl Into<String>, remedy: Option<String>) {
        self.findings.push(Finding { error: true, usage: true, message: message.into(), remedy });
    }

    /// Adds an estimate or a remark.
    pub fn warning(&mut self, message: impl Into<String>, remedy: Option<String>) {
        self.findings.push(Finding { error: false, usage: false, message: message.into(), remedy });
    }

    /// Whether anything refuses the export.
    pub fn refused(&self) -> bool {
        self.findings.iter().any(|finding| finding.error)
    }
}

/// `POST /v1/check` answers with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckAnswer {
    /// Where an export would recover to against what there is.
    pub recovery_line: String,
    /// What was found.
    pub report: CheckReport,
}

/// `POST /v1/sessions` answers with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionCreated {
    /// The new session's id.
    pub id: String,
}

/// `GET /v1/sessions/ID/log` answers with an array of these, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    /// When.
    pub at: Timestamp,
    /// What.
    pub text: String,
}

/// `POST /v1/clean` asks with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CleanRequest {
    /// Only say what would be removed.
    pub dry_run: bool,
    /// Only of sessions with a part on this machine, as they name it.
    #[serde(default)]
    pub host: Option<String>,
}

/// `POST /v1/clean` answers with this.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CleanAnswer {
    /// What was, or would be, removed: one entry per process, mount, file or directory.
    pub removed: Vec<CleanedObject>,
    /// What could not be removed, with the reason.
    pub failed: Vec<String>,
}

/// One thing a session left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanedObject {
    /// The session that made it.
    pub session: String,
    /// `process`, `mount`, `directory`, `shared memory`; `session` for the failed session itself, which is canceled.
    pub kind: String,
    /// Its path, pid or id.
    pub name: String,
}

/// What is known of the chosen backup without mounting it; read by a child that runs as the repository's owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackupFacts {
    /// The format: `pgbackrest` or `basebackup`.
    pub kind: String,
    /// pgBackRest's stanza.
    #[serde(default)]
    pub stanza: Option<String>,
    /// The backup.
    pub backup: BackupInfo,
    /// Its databases at the time of the backup.
    pub databases: Vec<BackupDatabase>,
    /// Its tablespaces: OID, name where known, original location.
    pub tablespaces: Vec<BackupTablespace>,
    /// How the instance has to start.
    pub start: StartFacts,
    /// The cluster's data checksums are on.
    pub page_checksums: bool,
    /// Directories beside the repository that are read too (tablespaces, `pg_wal`), with what for.
    pub further_roots: Vec<(String, PathBuf)>,
    /// Bytes of WAL to replay, at most.
    pub wal_bytes: u64,
    /// Name of the superuser with OID 10, read from the backup's pages: a guess.
    pub superuser: Option<String>,
    /// What people should know, such as a manifest that had to be read from its copy.
    pub notes: Vec<String>,
    /// Number of files and bytes of the whole cluster.
    pub files: u64,
    /// Bytes of the whole cluster.
    pub bytes: u64,
}

/// A tablespace of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupTablespace {
    /// Its OID.
    pub oid: u32,
    /// Its name, where the repository tells it.
    pub name: Option<String>,
    /// The location `CREATE TABLESPACE` was given.
    pub location: String,
}

/// How an instance has to start on the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFacts {
    /// PostgreSQL's major version.
    pub major: u32,
    /// Archive recovery with a target; otherwise a clean shutdown's or an atomic snapshot's plain start.
    pub archive_recovery: bool,
    /// Crash recovery, of an atomic snapshot: whether it met all the WAL there is must be looked at afterwards.
    #[serde(default)]
    pub crash_recovery: bool,
    /// The timeline to recover on.
    pub timeline: u32,
    /// `max_prepared_transactions` of the cluster.
    pub max_prepared_transactions: u32,
    /// Block size in bytes.
    pub block_size: u32,
    /// Last segment presented, for the same comparison.
    pub last_segment: Option<String>,
    /// WAL segment size in bytes.
    pub segment_size: u64,
    /// The last checkpoint, as `X/X`: where a start without anything to replay stands.
    pub checkpoint: String,
}

/// What an agent is told when it starts, on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Assignment {
    /// The session.
    pub session: String,
    /// What was asked for.
    pub request: ExportRequest,
    /// The backup.
    pub facts: BackupFacts,
    /// What the agent may create, and where.
    pub place: Place,
    /// The end that an earlier attempt recovered to.
    pub recovery_end: Option<RecoveryEnd>,
    /// Databases that are complete in the target.
    pub delivered: Vec<String>,
}

impl Assignment {
    /// Whether `database` is one of those to export, as far as the backup's own names tell.
    pub fn selects(&self, database: &BackupDatabase) -> bool {
        database.is_selected_by(&self.request)
    }
}

/// Which of a session's machines is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckPart {
    /// The one where everything happens.
    #[default]
    Everything,
    /// The staging server alone.
    Staging,
    /// The target alone.
    Target,
}

/// What `pgthaw internal check` is told on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckTask {
    /// Which machine this is.
    #[serde(default)]
    pub part: CheckPart,
    /// The session that asks, whose own files in the target are no obstacle.
    pub session: Option<String>,
    /// What was asked for.
    pub request: ExportRequest,
    /// The backup.
    pub facts: BackupFacts,
    /// Databases that are complete in the target already.
    pub delivered: Vec<String>,
}

/// What the staging server's `pgthaw attach` is asked before anything is made there: where would the session work?
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlaceTask {
    /// The session.
    pub session: String,
    /// What was asked for.
    pub request: ExportRequest,
    /// The session's marker.
    pub marker: String,
}

/// What a session put into its target, to be undone there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetTask {
    /// The session.
    pub session: String,
    /// The target directory.
    pub directory: PathBuf,
    /// Whether an earlier export is replaced.
    pub replace: bool,
    /// Directories that the session made for it.
    pub made: Vec<PathBuf>,
    /// Also what was delivered.
    pub everything: bool,
}

/// What was found in a target while it was undone.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TargetUndone {
    /// What could not be removed.
    pub failed: Vec<String>,
    /// Bytes of the export, if it was complete before anything could stop it: it stays.
    pub sealed: Option<u64>,
    /// Directories that stay, because they hold something that is not the session's.
    #[serde(default)]
    pub kept: Vec<PathBuf>,
}
