//! States, steps and the status of a session: the words that `pgthaw sessions` prints and its JSON keys.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Where a session stands as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// Asked for, nothing done yet.
    Created,
    /// At work.
    Running,
    /// Waits for a machine or the network and goes on by itself.
    Waiting,
    /// Is being undone because the user asked so.
    Canceling,
    /// Undone; nothing is left.
    Canceled,
    /// Ended before its end; `retry` goes on from what is there.
    Failed,
    /// Everything was delivered; nothing is left but the export.
    Succeeded,
}

impl SessionState {
    /// Returns whether a server works on a session in this state.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Created | Self::Running | Self::Waiting | Self::Canceling)
    }

    /// Returns whether nothing can follow any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Canceled | Self::Succeeded)
    }
}

/// What a session is doing; the parts of an export, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Accepted.
    Request,
    /// Everything is checked before anything is touched.
    Check,
    /// The backup is mounted.
    Mount,
    /// The instance recovers.
    Recover,
    /// Databases are dumped, finished files delivered.
    Dump,
    /// The last files are delivered and verified.
    Deliver,
    /// Everything temporary is removed.
    Clean,
}

/// Where one database stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseState {
    /// Not begun.
    Waiting,
    /// pg_dump runs.
    Dumping,
    /// pg_dump has ended; files are still on their way.
    Delivering,
    /// Complete in the target under its name.
    Delivered,
    /// Given up; the others go on.
    Failed,
}

/// One database of a session, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseStatus {
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub state: DatabaseState,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes of its dump so far.
    pub bytes: u64,
    /// Tables whose data is dumped.
    pub tables_done: u64,
    /// Tables to dump; 0 while unknown.
    pub tables_total: u64,
}

/// How bytes get from one machine to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenWay {
    /// Over a connection of their own, not over ssh.
    pub direct: bool,
    /// From where to where, or why not directly.
    pub text: String,
}

/// A session, for people and programs. Its keys are part of the command line's contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its id.
    pub id: String,
    /// What it makes: `export`.
    pub kind: String,
    /// Where it stands.
    pub state: SessionState,
    /// What it is doing.
    pub step: Step,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// How often it was begun.
    pub attempts: u32,
    /// What `step` is busy with, where there is something to tell.
    pub detail: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// The repository as it was named.
    pub repository: String,
    /// The backup's id, once it is chosen.
    pub backup: Option<String>,
    /// The machine where the backup is mounted, started and dumped; none for this one.
    #[serde(default)]
    pub staging: Option<String>,
    /// Whose SSH keys reach other machines, `user@host`; none for those of the server's account.
    #[serde(default)]
    pub ssh_keys_of: Option<String>,
    /// The account that asked a team's server for it.
    #[serde(default)]
    pub user: Option<String>,
    /// The machine that gets the dump; none for this one.
    #[serde(default)]
    pub target_host: Option<String>,
    /// The directory that gets the dump, `HOST:DIR` on another machine.
    pub target: String,
    /// How the dump gets there, where neither end is this machine and the movers have met.
    #[serde(default)]
    pub dump_way: Option<TakenWay>,
    /// How the staging server reads the repository, where that lies on another machine.
    #[serde(default)]
    pub reads_way: Option<TakenWay>,
    /// Where recovery ended, once it did.
    pub recovery_lsn: Option<String>,
    /// Bytes delivered and verified.
    pub bytes_done: u64,
    /// Bytes expected; an estimate until the dumps are complete, 0 while unknown.
    pub bytes_total: u64,
    /// The databases.
    pub databases: Vec<DatabaseStatus>,
}

impl Status {
    /// The directory that gets the dump, on its machine.
    pub fn target_directory(&self) -> &std::path::Path {
        let directory = self
            .target_host
            .as_ref()
            .and_then(|host| self.target.strip_prefix(host.as_str())?.strip_prefix(':'));
        std::path::Path::new(directory.unwrap_or(&self.target))
    }

    /// A session whose journal cannot be read, and why.
    pub fn unreadable(id: &str, error: String, hint: Option<String>) -> Self {
        // An id begins with the local date and time of its session; without it any time will do.
        let begun =
            jiff::civil::DateTime::strptime("%Y%m%d-%H%M%S", id.get(..15).unwrap_or_default());
        let begun = begun.ok().and_then(|begun| begun.to_zoned(jiff::tz::TimeZone::system()).ok());
        Self {
            id: id.into(),
            kind: "export".into(),
            state: SessionState::Failed,
            step: Step::Request,
            created_at: begun.map_or(Timestamp::UNIX_EPOCH, |begun| begun.timestamp()),
            attempts: 0,
            detail: None,
            error: Some(error),
            hint,
            repository: String::new(),
            backup: None,
            staging: None,
            target_host: None,
            user: None,
            ssh_keys_of: None,
            target: String::new(),
            dump_way: None,
            reads_way: None,
            recovery_lsn: None,
            bytes_done: 0,
            bytes_total: 0,
            databases: Vec::new(),
        }
    }
}
