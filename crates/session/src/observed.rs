//! What can be seen of a session on its machine: the agent's answer to `observe`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why something failed, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What failed, on which object, why.
    pub message: String,
    /// What the operator can do.
    #[serde(default)]
    pub hint: Option<String>,
    /// Whether it may pass by itself, so that another attempt is worth it without anybody's doing: a process or a machine died, a machine is
    /// away. Anything else (no room, no rights, a damaged backup) needs somebody.
    #[serde(default)]
    pub passes: bool,
    /// Whether an agent tells it of the target, which may be on another machine than the agent.
    #[serde(default)]
    pub at_target: bool,
}

impl Failure {
    /// A failure without a hint, that needs somebody.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, passes: false, at_target: false }
    }

    /// The same failure, but it may pass by itself.
    pub fn passing(self) -> Self {
        Self { passes: true, ..self }
    }

    /// The same failure with what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// How far one of the agent's verbs has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress<T> {
    /// Not asked for in this agent's life.
    #[default]
    Absent,
    /// At work.
    Running,
    /// Done, with its result.
    Done(T),
    /// Given up.
    Failed(Failure),
}

impl<T> Progress<T> {
    /// Returns the failure, if there is one.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed(failure) => Some(failure),
            _ => None,
        }
    }
}

/// Where recovery ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryEnd {
    /// The last record that was replayed (`redo done at`), as `X/X`; the checkpoint where nothing had to be replayed.
    pub lsn: String,
    /// The timeline it lies on.
    pub timeline: u32,
    /// Time of the last transaction that was replayed, as the server writes it.
    pub last_transaction: Option<String>,
    /// Whether anything was replayed: only then the end can be asked for again as a recovery target.
    pub replayed: bool,
}

/// What is known once the instance is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReady {
    /// Where recovery ended.
    pub recovery_end: RecoveryEnd,
    /// The server's version, such as `15.18`.
    pub server_version: String,
    /// How the instance is kept alone, in words: `isolated in a root of its own`.
    pub isolation: String,
    /// The selected databases, in the order of the request.
    pub databases: Vec<SelectedDatabase>,
    /// Prepared transactions that were rolled back before the dump.
    pub rolled_back: Vec<String>,
    /// What people should know, such as a library that is missing.
    pub warnings: Vec<String>,
}

/// One selected database, as the instance shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectedDatabase {
    /// Its name.
    pub name: String,
    /// `pg_database_size()`, in bytes.
    pub bytes: u64,
    /// Tables with data to dump.
    pub tables: u64,
    /// Unlogged tables, which recovery leaves empty.
    pub unlogged_tables: Vec<String>,
    /// Why it cannot be dumped, if it cannot.
    pub error: Option<Failure>,
}

/// One database in the agent's hands.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DatabaseView {
    /// pg_dump.
    pub dump: Progress<()>,
    /// Delivery, up to the rename that makes the database appear; its result is the bytes delivered.
    pub transfer: Progress<u64>,
    /// Tables whose data is dumped.
    pub tables_done: u64,
    /// Bytes that pg_dump has written.
    pub bytes_dumped: u64,
    /// Bytes delivered and verified.
    pub bytes_delivered: u64,
}

/// The agent's answer to `observe`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AgentView {
    /// Grows with every change, so that an observer can wait for the next one.
    pub version: u64,
    /// The mount.
    pub mount: Progress<()>,
    /// The instance.
    pub instance: Progress<InstanceReady>,
    /// What the instance is doing while it starts.
    pub recovering: Option<String>,
    /// `globals.sql`.
    pub globals: Progress<()>,
    /// The databases that were begun.
    pub databases: BTreeMap<String, DatabaseView>,
    /// The last step: checksums verified, `SHA256SUMS` and `export.json` written. Its result: the bytes of the whole export.
    pub seal: Progress<u64>,
    /// Something that ends the attempt: a read the mount could not serve, a full write layer, a process that died.
    pub broken: Option<Failure>,
    /// Why reads wait for the repository on another machine, while they do.
    #[serde(default)]
    pub waiting_for_repository: Option<String>,
    /// Why delivery waits for the target on another machine, while it does.
    #[serde(default)]
    pub waiting_for_target: Option<String>,
    /// Messages for the log, numbered from 0; `pg_dump`'s own words among them.
    pub messages: Vec<String>,
}

impl AgentView {
    /// Says in each failure on which machine it happened: `own`, the agent's, or `target`; none is the server's own, which is not named.
    pub fn named(mut self, own: Option<&str>, target: Option<&str>) -> Self {
        fn failed<T>(progress: &mut Progress<T>) -> Option<&mut Failure> {
            match progress {
                Progress::Failed(failure) => Some(failure),
                _ => None,
            }
        }
        let of_all = [
            self.broken.as_mut(),
            failed(&mut self.mount),
            failed(&mut self.instance),
            failed(&mut self.globals),
            failed(&mut self.seal),
        ];
        let of_databases = self
            .databases
            .values_mut()
            .flat_map(|view| [failed(&mut view.dump), failed(&mut view.transfer)]);
        for failure in of_all.into_iter().chain(of_databases).flatten() {
            if let Some(machine) = if failure.at_target { target } else { own } {
                failure.message = format!("{machine}: {}", failure.message);
            }
        }
        self
    }
}

/// What the recovery service sees of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// The check before anything is touched.
    pub check: Progress<()>,
    /// The agent, when it answers.
    pub agent: Option<AgentView>,
    /// Something of an earlier life of the session is still there: a process, a mount, a directory.
    pub remains: bool,
    /// Why the session waits for a machine, while it does; it goes on by itself.
    pub waiting: Option<String>,
    /// Whether there is time left for another attempt without anybody's doing.
    pub may_begin_again: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_machine() {
        let at_target = Failure { at_target: true, ..Failure::new("no room") };
        let crm = DatabaseView {
            transfer: Progress::Failed(at_target.clone()),
            ..DatabaseView::default()
        };
        let view = AgentView {
            broken: Some(Failure::new("full")),
            globals: Progress::Failed(at_target),
            databases: BTreeMap::from([("crm".to_owned(), crm)]),
            ..AgentView::default()
        };
        let messages = |own, target| {
            let view = view.clone().named(own, target);
            [
                view.broken.unwrap().message,
                view.globals.failure().unwrap().message.clone(),
                view.databases["crm"].transfer.failure().unwrap().message.clone(),
            ]
        };
        assert_eq!(
            messages(Some("dba@stage"), Some("ops@files")),
            ["dba@stage: full", "ops@files: no room", "ops@files: no room"]
        );
        assert_eq!(messages(None, None), ["full", "no room", "no room"]);
        assert_eq!(messages(Some("dba@stage"), None), ["dba@stage: full", "no room", "no room"]);
    }
}
