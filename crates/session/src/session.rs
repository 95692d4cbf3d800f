//! A session as its journal tells it: the entries, and the state that follows from reading them in order.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::observed::{AgentView, Failure, InstanceReady, Progress, RecoveryEnd, SelectedDatabase};
use crate::request::ExportRequest;
use crate::status::{DatabaseState, DatabaseStatus, SessionState, Status, Step, TakenWay};

/// One record of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When it was written.
    pub at: Timestamp,
    /// What happened, or is about to.
    pub entry: Entry,
}

/// What a journal holds: that which cannot be observed later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The session was asked for.
    Created {
        /// Its id.
        id: String,
        /// What was asked for.
        request: Box<ExportRequest>,
    },
    /// It is begun, for the first time or again.
    Attempt {
        /// 1 for the first.
        number: u32,
    },
    /// The backup was chosen; every attempt uses this one.
    Resolved(ResolvedBackup),
    /// The checks found nothing that refuses the export.
    Checked,
    /// What is about to be created.
    Placed(Place),
    /// A part of the work begins.
    Step(Step),
    /// Recovery ended here; every later attempt recovers to the same end.
    Recovered(RecoveryEnd),
    /// The databases that are exported, as the instance shows them.
    Selected(Vec<SelectedDatabase>),
    /// A database was delivered or given up.
    Database {
        /// Its name.
        name: String,
        /// [`DatabaseState::Delivered`] or [`DatabaseState::Failed`].
        state: DatabaseState,
        /// Bytes delivered.
        bytes: u64,
        /// Why it was given up.
        error: Option<Failure>,
    },
    /// The export is complete in the target: `SHA256SUMS` and `export.json` are written.
    Sealed {
        /// Bytes of the whole export.
        bytes: u64,
    },
    /// The attempt ends here because of this; what runs is stopped.
    GaveUp(Failure),
    /// The next attempt is begun without anybody's doing.
    AgainByItself,
    /// The user wants everything undone.
    CancelAsked,
    /// Nothing of the session's last [`Place`] is left, but what a retry re-uses.
    Cleaned,
    /// The session reached this state.
    State(SessionState),
    /// The way of the dump to the target's machine.
    DumpWay(TakenWay),
    /// The way of the reads of a repository on another machine.
    ReadsWay(TakenWay),
    /// Something for `pgthaw log`.
    Message(String),
}

/// The chosen backup, as the explorer shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedBackup {
    /// The id its own tool shows.
    pub id: String,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// One line: from where to where the session recovers against what there is.
    pub recovery_line: String,
}

/// Everything a session creates outside its target, written down before it is created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The machine, as `ssh` takes it; none for this one.
    #[serde(default)]
    pub host: Option<String>,
    /// Unguessable; every process of the session carries it in its environment, or a short form of it in its title.
    pub marker: String,
    /// The user ids of the accounts that the session's processes run as; those of others are never taken for the session's, whatever
    /// they show.
    #[serde(default)]
    pub accounts: Vec<u32>,
    /// The session's private directory: sockets, logs, the write layer.
    pub work_directory: PathBuf,
    /// Where the backup is mounted.
    pub mountpoint: PathBuf,
    /// Directories on the way to the mountpoint, itself included, that the session makes outside its private directory;
    /// outermost first.
    pub mount_directories: Vec<PathBuf>,
    /// The private directory that gets the dump.
    pub dump_directory: PathBuf,
    /// Directories on the way to the target, the target included, that the session makes; outermost first.
    pub target_directories: Vec<PathBuf>,
}

/// What the session is after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// Deliver.
    Run,
    /// Stop and keep what a retry re-uses.
    GiveUp(Failure),
    /// Undo everything.
    Cancel,
}

/// One database, as the journal knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionDatabase {
    /// What the instance showed of it.
    pub selected: SelectedDatabase,
    /// Where it stands.
    pub state: DatabaseState,
    /// Bytes delivered.
    pub bytes: u64,
    /// Why it failed.
    pub error: Option<Failure>,
}

/// A session: all entries of its journal, folded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its id.
    pub id: String,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// What was asked for.
    pub request: ExportRequest,
    /// How often it was begun.
    pub attempts: u32,
    /// How many of them in a row were begun without anybody's doing.
    pub again: u32,
    /// Whether the next one will be.
    again_next: bool,
    /// The chosen backup.
    pub resolved: Option<ResolvedBackup>,
    /// Whether this attempt passed its checks.
    pub checked: bool,
    /// What this or an earlier attempt created and has not been removed, outermost first.
    pub place: Option<Place>,
    /// Directories that this session made for its target, over all attempts.
    pub target_directories: Vec<PathBuf>,
    /// Whether an agent was started in any attempt: the target may hold files of the session, in a directory of the user's own, too.
    pub target_touched: bool,
    /// Whether an agent was started in this attempt.
    pub placed_in_this_attempt: bool,
    /// Where recovery ended, first.
    pub recovery_end: Option<RecoveryEnd>,
    /// The databases, once the instance has shown them.
    pub databases: Option<Vec<SessionDatabase>>,
    /// Bytes of the sealed export.
    pub sealed: Option<u64>,
    /// What the session is after.
    pub intent: Intent,
    /// Why it gave up last.
    pub failure: Option<Failure>,
    /// Where it stands.
    pub state: SessionState,
    /// What it was doing last.
    pub step: Step,
    /// The way of the dump, as it was said last in this attempt.
    pub dump_way: Option<TakenWay>,
    /// The way of the reads, as it was said last in this attempt.
    pub reads_way: Option<TakenWay>,
    /// How many of the present agent's messages are in the journal.
    pub messages_of_agent: usize,
}

impl Session {
    /// Folds `records`, oldest first. Returns nothing unless they begin with [`Entry::Created`].
    pub fn from_records(records: &[Record]) -> Option<Self> {
        let (first, rest) = records.split_first()?;
        let Entry::Created { id, request } = &first.entry else { return None };
        let mut session = Self {
            id: id.clone(),
            created_at: first.at,
            request: (**request).clone(),
            attempts: 0,
            again: 0,
            again_next: false,
            resolved: None,
            checked: false,
            place: None,
            target_directories: Vec::new(),
            target_touched: false,
            placed_in_this_attempt: false,
            recovery_end: None,
            databases: None,
            sealed: None,
            intent: Intent::Run,
            failure: None,
            state: SessionState::Created,
            step: Step::Request,
            dump_way: None,
            reads_way: None,
            messages_of_agent: 0,
        };
        for record in rest {
            session.apply(&record.entry);
        }
        Some(session)
    }

    /// Takes one more entry in.
    pub fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Created { .. } => {}
            Entry::Attempt { number } => {
                // After a cancel that could not be carried through nobody knows what is still there.
                let undone = self.intent == Intent::Cancel;
                self.attempts = *number;
                self.again = if std::mem::take(&mut self.again_next) { self.again + 1 } else { 0 };
                self.checked = false;
                self.placed_in_this_attempt = false;
                self.intent = Intent::Run;
                self.failure = None;
                self.state = SessionState::Running;
                self.step = Step::Check;
                (self.dump_way, self.reads_way) = (None, None);
                self.messages_of_agent = 0;
                for database in self.databases.iter_mut().flatten() {
                    if database.state == DatabaseState::Failed || undone {
                        database.state = DatabaseState::Waiting;
                        (database.bytes, database.error) = (0, None);
                    }
                }
            }
            Entry::Resolved(backup) => self.resolved = Some(backup.clone()),
            Entry::Checked => self.checked = true,
            Entry::Placed(place) => {
                for directory in &place.target_directories {
                    if !self.target_directories.contains(directory) {
                        self.target_directories.push(directory.clone());
                    }
                }
                self.place = Some(place.clone());
                (self.target_touched, self.placed_in_this_attempt) = (true, true);
                self.messages_of_agent = 0;
            }
            Entry::Step(step) => self.step = *step,
            Entry::Recovered(end) => self.recovery_end = Some(end.clone()),
            Entry::Selected(selected) => self.select(selected),
            Entry::Database { name, state, bytes, error } => {
                for database in
                    self.databases.iter_mut().flatten().filter(|d| d.selected.name == *name)
                {
                    (database.state, database.bytes, database.error) =
                        (*state, *bytes, error.clone());
                }
            }
            Entry::Sealed { bytes } => {
                // Complete is complete, whatever ended the attempt meanwhile.
                self.sealed = Some(*bytes);
                (self.intent, self.failure) = (Intent::Run, None);
            }
            Entry::GaveUp(failure) => {
                self.failure = Some(failure.clone());
                // Whoever says stop while the next attempt is waited for gets it.
                let open = match &self.intent {
                    Intent::Run => true,
                    Intent::GiveUp(earlier) => earlier.passes,
                    Intent::Cancel => false,
                };
                if open {
                    self.intent = Intent::GiveUp(failure.clone());
                }
            }
            Entry::AgainByItself => self.again_next = true,
            Entry::CancelAsked if self.sealed.is_some() => self.state = SessionState::Running,
            Entry::CancelAsked => {
                (self.intent, self.state) = (Intent::Cancel, SessionState::Canceling)
            }
            Entry::Cleaned => {
                self.place = None;
                if self.intent == Intent::Cancel {
                    self.target_directories.clear();
                    self.target_touched = false;
                    self.databases = None;
                }
            }
            Entry::State(state) => self.state = *state,
            Entry::DumpWay(way) => self.dump_way = Some(way.clone()),
            Entry::ReadsWay(way) => self.reads_way = Some(way.clone()),
            Entry::Message(_) => self.messages_of_agent += 1,
        }
    }

    /// Takes over what the instance shows, but keeps what was delivered by an earlier attempt.
    fn select(&mut self, selected: &[SelectedDatabase]) {
        let earlier = self.databases.take().unwrap_or_default();
        let merged = selected.iter().map(|selected| {
            let before = earlier.iter().find(|d| d.selected.name == selected.name);
            match before.filter(|d| d.state == DatabaseState::Delivered) {
                Some(delivered) => {
                    SessionDatabase { selected: selected.clone(), ..delivered.clone() }
                }
                None => SessionDatabase {
                    selected: selected.clone(),
                    state: if selected.error.is_some() {
                        DatabaseState::Failed
                    } else {
                        DatabaseState::Waiting
                    },
                    bytes: 0,
                    error: selected.error.clone(),
                },
            }
        });
        self.databases = Some(merged.collect());
    }

    /// Names of the databases that are complete in the target.
    pub fn delivered(&self) -> Vec<String> {
        let databases = self.databases.iter().flatten();
        databases
            .filter(|d| d.state == DatabaseState::Delivered)
            .map(|d| d.selected.name.clone())
            .collect()
    }

    /// What people and programs see, with what the agent shows where one is there, and why the session waits for a machine.
    pub fn status(&self, agent: Option<&AgentView>, waiting: Option<&str>) -> Status {
        let views = agent.map(|agent| &agent.databases);
        let databases: Vec<DatabaseStatus> = match &self.databases {
            Some(databases) => databases
                .iter()
                .map(|d| d.status(views.and_then(|v| v.get(&d.selected.name))))
                .collect(),
            None => self.request.databases.iter().map(|name| not_begun(name)).collect(),
        };
        let ready = agent.and_then(|agent| match &agent.instance {
            Progress::Done(ready) => Some(ready),
            _ => None,
        });
        let selected_bytes =
            ready.map(|ready: &InstanceReady| ready.databases.iter().map(|d| d.bytes).sum());
        let delivered_by_agent =
            agent.map_or(0, |agent| agent.databases.values().map(|v| v.bytes_delivered).sum());
        let delivered_before: u64 = self.databases.iter().flatten().map(|d| d.bytes).sum();
        Status {
            id: self.id.clone(),
            kind: "export".into(),
            state: match (self.state, waiting) {
                (SessionState::Running, Some(_)) => SessionState::Waiting,
                (state, _) => state,
            },
            step: self.step,
            created_at: self.created_at,
            attempts: self.attempts,
            detail: waiting.map(str::to_owned).or_else(|| {
                agent
                    .and_then(|agent| agent.recovering.clone())
                    .filter(|_| self.step == Step::Recover)
            }),
            error: self.failure.as_ref().map(|failure| failure.message.clone()),
            hint: self.failure.as_ref().and_then(|failure| failure.hint.clone()),
            repository: self.request.repository.to_string(),
            backup: self.resolved.as_ref().map(|backup| backup.id.clone()),
            staging: self.request.staging.clone(),
            target_host: self.request.target_machine().cloned(),
            ssh_keys_of: self.request.ssh_agent_of.as_ref().map(|caller| caller.name.clone()),
            user: self.request.requester.as_ref().map(|requester| requester.user.clone()),
            target: match self.request.target_machine() {
                Some(host) => format!("{host}:{}", self.request.target.display()),
                None => self.request.target.display().to_string(),
            },
            dump_way: self.dump_way.clone(),
            reads_way: self.reads_way.clone(),
            recovery_lsn: self.recovery_end.as_ref().map(|end| end.lsn.clone()),
            bytes_done: self.sealed.unwrap_or_else(|| delivered_before.max(delivered_by_agent)),
            bytes_total: self.sealed.or(selected_bytes).unwrap_or(0),
            databases,
        }
    }
}

impl SessionDatabase {
    fn status(&self, view: Option<&crate::observed::DatabaseView>) -> DatabaseStatus {
        let mut status = DatabaseStatus {
            name: self.selected.name.clone(),
            state: self.state,
            error: self.error.as_ref().map(|failure| failure.message.clone()),
            bytes: self.bytes,
            tables_done: if self.state == DatabaseState::Delivered {
                self.selected.tables
            } else {
                0
            },
            tables_total: self.selected.tables,
        };
        if let (Some(view), DatabaseState::Waiting) = (view, self.state) {
            status.state = match view.dump {
                Progress::Running => DatabaseState::Dumping,
                Progress::Done(()) => DatabaseState::Delivering,
                Progress::Absent | Progress::Failed(_) => self.state,
            };
            status.bytes = view.bytes_dumped;
            status.tables_done = view.tables_done;
        }
        status
    }
}

fn not_begun(name: &str) -> DatabaseStatus {
    DatabaseStatus {
        name: name.into(),
        state: DatabaseState::Waiting,
        error: None,
        bytes: 0,
        tables_done: 0,
        tables_total: 0,
    }
}
