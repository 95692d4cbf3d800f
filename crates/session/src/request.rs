//! What a user asked for: the request of an export, as the command line sends it and the journal keeps it.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Which repository, and how to read it. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryChoice {
    /// Its name in the server's configuration, which then says where it lies.
    #[serde(default)]
    pub name: Option<String>,
    /// Absolute path of the repository; empty where only the server knows it.
    pub path: PathBuf,
    /// The format's name (`pgbackrest`, `basebackup`); without it the format is detected.
    #[serde(default)]
    pub kind: Option<String>,
    /// pgBackRest's stanza; needed only where a repository has several.
    #[serde(default)]
    pub stanza: Option<String>,
    /// More directories with archived WAL, for backups that do not bring their own archive.
    #[serde(default)]
    pub wal_archives: Vec<PathBuf>,
    /// A `backup_label` for a backup that was kept without its own.
    #[serde(default)]
    pub backup_label: Option<PathBuf>,
    /// The data directory, `pg_wal` and all tablespaces were captured at one instant.
    #[serde(default)]
    pub atomic_snapshot: bool,
    /// Which directories are a base backup's copies of its tablespaces, by OID; none where it holds nothing of it.
    #[serde(default)]
    pub tablespaces: Vec<(u32, Option<PathBuf>)>,
}

impl std::fmt::Display for RepositoryChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

/// How far to recover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryChoice {
    /// To the end of the backup.
    #[default]
    EndOfBackup,
    /// To the end of the archived WAL of the backup's timeline.
    Latest,
}

/// The machine and account of whoever asks, as he names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerMachine {
    /// `user@host`, for people.
    pub name: String,
    /// Tells machines of the same name apart.
    pub id: String,
}

/// An account that asked a team's server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requester {
    /// Its name on the server's machine.
    pub user: String,
    /// Its number there.
    pub uid: u32,
}

/// How a dump travels to another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverChoice {
    /// The ports, first and last, that a data mover may listen on so that the two halves connect directly; none: never directly.
    pub ports: Option<(u16, u16)>,
    /// Most bytes per second on the network.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Default for MoverChoice {
    /// Ports 47000 to 47099, no limit.
    fn default() -> Self {
        Self { ports: Some((47000, 47099)), bytes_per_second: None }
    }
}

/// One export, as asked for. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// Where the backup lies.
    pub repository: RepositoryChoice,
    /// The backup's id; without it the newest.
    #[serde(default)]
    pub backup: Option<String>,
    /// The databases to export, by name; empty with `all`.
    #[serde(default)]
    pub databases: Vec<String>,
    /// Every database that accepts connections, but templates.
    #[serde(default)]
    pub all: bool,
    /// Names that `all` leaves out.
    #[serde(default)]
    pub exclude_databases: Vec<String>,
    /// The machine where the backup is mounted, started and dumped, as `ssh` takes it; without it this one.
    #[serde(default)]
    pub staging: Option<String>,
    /// Where the staging server sees the repository itself and reads it there; without it the mount server reads for it.
    #[serde(default)]
    pub read_from_staging: Option<PathBuf>,
    /// The machine that gets the dump, as `ssh` takes it; without it this one.
    #[serde(default)]
    pub target_host: Option<String>,
    /// The machine of whoever asks gets the dump, over connections that he makes; `target_host` is none then.
    #[serde(default)]
    pub target_caller: Option<CallerMachine>,
    /// Other machines are reached with the keys in the ssh-agent of whoever asks, over connections that he makes, instead of the server's own.
    #[serde(default)]
    pub ssh_agent_of: Option<CallerMachine>,
    /// Who asked, where it was the server of a team.
    #[serde(default)]
    pub requester: Option<Requester>,
    /// The request as it was asked of the server of a team, before names became paths and hosts: what rules are about.
    #[serde(default)]
    pub as_asked: Option<Box<ExportRequest>>,
    /// The directory that gets the dump.
    pub target: PathBuf,
    /// Whether an earlier export in `target` is replaced.
    #[serde(default)]
    pub replace: bool,
    /// The sessions whose exports may be replaced, where not everybody's may: those that the same caller of a team's server asked for.
    #[serde(default)]
    pub replaces_only: Option<Vec<String>>,
    /// How far to recover.
    #[serde(default)]
    pub recovery: RecoveryChoice,
    /// `pg_dump --jobs`.
    pub jobs: u32,
    /// `pg_dump --compress`, as the user wrote it.
    #[serde(default)]
    pub compress: Option<String>,
    /// `pg_dump`'s filters and further arguments, already checked.
    #[serde(default)]
    pub pg_dump_arguments: Vec<String>,
    /// Whether `globals.sql` is written.
    pub globals: bool,
    /// Whether `globals.sql` holds the roles' password hashes.
    pub role_passwords: bool,
    /// Where the dump is kept until it is delivered; without it the roomier of `/var/tmp` and `/tmp`.
    #[serde(default)]
    pub dump_dir: Option<PathBuf>,
    /// Whether the dump also stays where it was kept until it was delivered.
    #[serde(default)]
    pub keep_dump: bool,
    /// Where the session's private directory is made; without it `/var/tmp`.
    #[serde(default)]
    pub work_dir: Option<PathBuf>,
    /// Seconds that a read or a delivery waits for a machine that cannot be reached, before the attempt fails.
    #[serde(default = "default_stall_timeout")]
    pub stall_timeout: u64,
    /// Bytes of decoded pages kept in memory.
    #[serde(default)]
    pub cache_size: Option<u64>,
    /// Where PostgreSQL's programs are.
    #[serde(default)]
    pub pg_bin: Option<PathBuf>,
    /// The account that runs PostgreSQL when pgthaw was started as root.
    #[serde(default)]
    pub os_user: Option<String>,
    /// The cluster's superuser, where it is neither `postgres` nor to be found.
    #[serde(default)]
    pub superuser: Option<String>,
    /// Libraries to preload although the backup's own list is ignored.
    #[serde(default)]
    pub preload: Vec<String>,
    /// Export databases in which the backup tool found damaged pages.
    #[serde(default)]
    pub allow_damaged: bool,
    /// Run PostgreSQL and pg_dump without a root of their own where the kernel refuses one.
    #[serde(default)]
    pub allow_unisolated: bool,
    /// Read and verify every file of the selected databases whole.
    #[serde(default)]
    pub verify_source: bool,
    /// How bytes travel between machines.
    #[serde(default)]
    pub mover: MoverChoice,
    /// How many attempts in a row are begun without anybody's doing, where what ended the last one may pass by itself.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// For how long, in seconds: also how long a machine is waited for that cannot be reached.
    #[serde(default = "default_retry_for")]
    pub retry_for: u64,
    /// How long, in seconds, the session's processes on its machines go on without a word from the server; then they end and leave nothing.
    #[serde(default = "default_lease")]
    pub lease: u64,
}

/// `--retries` of one who says nothing.
pub const DEFAULT_RETRIES: u32 = 3;
/// `--retry-for` of one who says nothing, seconds.
pub const DEFAULT_RETRY_FOR: u64 = 60 * 60;

/// `--lease` of one who says nothing, seconds.
pub const DEFAULT_LEASE: u64 = 24 * 60 * 60;

fn default_lease() -> u64 {
    DEFAULT_LEASE
}

fn default_retries() -> u32 {
    DEFAULT_RETRIES
}

fn default_retry_for() -> u64 {
    DEFAULT_RETRY_FOR
}

/// Half an hour; for requests of a server that knew no other.
fn default_stall_timeout() -> u64 {
    30 * 60
}

impl ExportRequest {
    /// Returns whether the target lies on another machine than the instance.
    pub fn delivers_elsewhere(&self) -> bool {
        self.target_caller.is_some() || self.staging != self.target_host
    }

    /// Returns what the machine that gets the dump is called; nothing for the server's own.
    pub fn target_machine(&self) -> Option<&String> {
        self.target_caller.as_ref().map(|caller| &caller.name).or(self.target_host.as_ref())
    }

    /// Returns whether the targets of both are on one machine. A caller's machine is that of the account that asked: what a caller calls
    /// his machine proves nothing about another's.
    pub fn delivers_to_machine_of(&self, other: &Self) -> bool {
        let uid = |request: &Self| request.requester.as_ref().map(|requester| requester.uid);
        match (&self.target_caller, &other.target_caller) {
            (Some(own), Some(others)) => own == others && uid(self) == uid(other),
            (None, None) => self.target_host == other.target_host,
            _ => false,
        }
    }

    /// Returns where the machine of the instance reads the repository; nothing if the mount server reads for it.
    pub fn repository_beside_instance(&self) -> Option<&Path> {
        match self.staging {
            None => Some(&self.repository.path),
            Some(_) => self.read_from_staging.as_deref(),
        }
    }

    /// Returns whether the database `name` is asked for by `all` (which the caller has found to be set).
    pub fn all_includes(&self, name: &str) -> bool {
        !self.exclude_databases.iter().any(|pattern| matches_pattern(pattern, name))
    }
}

/// Returns whether `name` matches `pattern`, where `*` stands for any characters and `?` for one, as in psql's patterns.
pub fn matches_pattern(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let mut reachable = vec![false; name.len() + 1]; // reachable[i]: the pattern so far matches the first i characters
    reachable[0] = true;
    for &wanted in &pattern {
        let mut next = vec![false; name.len() + 1];
        for i in 0..=name.len() {
            next[i] = match wanted {
                '*' => reachable[i] || (i > 0 && next[i - 1]),
                '?' => i > 0 && reachable[i - 1],
                plain => i > 0 && reachable[i - 1] && name[i - 1] == plain,
            };
        }
        reachable = next;
    }
    reachable[name.len()]
}

#[cfg(test)]
mod tests {
    use super::{ExportRequest, matches_pattern};

    #[test]
    fn a_name_that_a_caller_chose_is_his_own() {
        let request = |uid: u32, host: Option<&str>, caller: Option<&str>| -> ExportRequest {
            serde_json::from_value(serde_json::json!({
                "repository": { "path": "/b" }, "databases": ["crm"], "target": "/o", "jobs": 1,
                "globals": true, "role_passwords": true, "target_host": host,
                "target_caller": caller.map(|name| serde_json::json!({ "name": name, "id": "1" })),
                "requester": { "user": "x", "uid": uid },
            }))
            .unwrap()
        };
        let ann = request(1, None, Some("ann@laptop"));
        assert!(ann.delivers_to_machine_of(&request(1, None, Some("ann@laptop"))));
        assert!(!ann.delivers_to_machine_of(&request(2, None, Some("ann@laptop"))));
        assert!(!ann.delivers_to_machine_of(&request(1, Some("ann@laptop"), None)));
        assert!(request(1, Some("files"), None).delivers_to_machine_of(&request(
            2,
            Some("files"),
            None
        )));
        assert!(!request(1, Some("files"), None).delivers_to_machine_of(&request(1, None, None)));
    }

    #[test]
    fn patterns_select_names() {
        let cases = [
            ("crm", "crm", true),
            ("crm", "crm2", false),
            ("crm*", "crm2", true),
            ("*", "", true),
            ("c?m", "crm", true),
            ("c?m", "cm", false),
            ("*_old", "sales_old", true),
            ("*_old", "sales_older", false),
            ("a*b*c", "aXXbYYc", true),
        ];
        for (pattern, name, want) in cases {
            assert_eq!(matches_pattern(pattern, name), want, "{pattern} on {name}");
        }
    }
}
