//! The recovery service: owns the sessions, from request to clean end.
//!
//! One task per active session does the same dull loop: observe, journal the facts, decide, act. All decisions are made in
//! [`pgthaw_session::decide()`]; here is only how each action is carried out.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use jiff::Timestamp;
use pgthaw_session::decide::{facts, step_of};
use pgthaw_session::journal::{self, Journal};
use pgthaw_session::observed::{Failure, Observed, Progress};
use pgthaw_session::session::{Entry, Intent, Place, Record, ResolvedBackup};
use pgthaw_session::{
    Action, AgentView, ExportRequest, RecoveryChoice, Session, SessionState, Status, decide,
};
use tokio::sync::{mpsc, watch};

use super::agent_link::AgentLink;
use super::mount_service;
use super::sessions::{SessionsDirectory, new_marker};
use crate::agent::space::human_size;
use crate::agent::undo::{self, Undone};
use crate::agent::{place, sealing};
use crate::internal::{self, Child};
use crate::recovery_line::recovery_line;
use crate::unix_http::ClientError;
use crate::wire::{
    ApiError, Assignment, BackupFacts, CheckAnswer, CheckReport, CheckTask, CleanAnswer,
    CleanedObject, Finding, LogLine,
};

/// What a user can say to a session at work.
#[derive(Debug)]
enum Command {
    /// Ctrl-C: stop, and keep what a retry re-uses.
    Stop,
    /// Undo everything.
    Cancel,
}

/// What everybody may see of a session.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its status.
    pub status: Status,
    /// Its log, oldest first.
    pub log: Arc<Vec<LogLine>>,
}

struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    seen: watch::Receiver<Seen>,
}

/// The sessions of one account.
pub struct RecoveryService {
    sessions: SessionsDirectory,
    active: Mutex<BTreeMap<String, Handle>>,
}

impl RecoveryService {
    /// Opens the sessions below `state_directory`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(state_directory: &Path) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            sessions: SessionsDirectory::open(state_directory)?,
            active: Mutex::default(),
        }))
    }

    /// Takes up every session that was at work when its server ended.
    pub fn take_up_sessions(self: Arc<Self>) {
        for id in self.sessions.ids().unwrap_or_default() {
            let active = self.stored(&id).is_ok_and(|(session, _)| session.state.is_active());
            if active && let Err(err) = self.clone().resume(&id, []) {
                eprintln!("session {id}: {}", err.message);
            }
        }
    }

    /// Whether any session is at work.
    pub fn has_active_sessions(&self) -> bool {
        self.lock().values().any(|handle| handle.seen.borrow().status.state.is_active())
    }

    /// All sessions, oldest first.
    pub fn list(&self) -> Vec<Status> {
        self.sessions
            .ids()
            .unwrap_or_default()
            .iter()
            .map(|id| match self.look(id) {
                Ok(seen) => seen.status,
                Err(err) => Status::unreadable(id, err.message, err.hint),
            })
            .collect()
    }

    /// One session.
    ///
    /// # Errors
    /// When there is none of this id, or its journal cannot be read.
    pub fn look(&self, id: &str) -> Result<Seen, ApiError> {
        if let Some(handle) = self.lock().get(id) {
            return Ok(handle.seen.borrow().clone());
        }
        let (session, records) = self.stored(id)?;
        Ok(Seen {
            status: session.status(None),
            log: Arc::new(records.iter().flat_map(log_line).collect()),
        })
    }

    /// One session, with every change of it while it is at work.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub fn watch(&self, id: &str) -> Result<watch::Receiver<Seen>, ApiError> {
        if let Some(handle) = self.lock().get(id) {
            return Ok(handle.seen.clone());
        }
        Ok(watch::channel(self.look(id)?).1)
    }

    /// Begins a session.
    ///
    /// # Errors
    /// When the backup cannot be read, a name is unknown, or the target belongs to another session.
    pub async fn create(self: Arc<Self>, request: ExportRequest) -> Result<String, ApiError> {
        self.refuse_second_session(&request)?;
        let facts = mount_service::facts(
            request.repository.clone(),
            request.backup.clone(),
            request.recovery,
        )
        .await?;
        refuse_unknown(&request, &facts)?;
        let task = CheckTask {
            session: None,
            request: request.clone(),
            facts: facts.clone(),
            delivered: Vec::new(),
        };
        let report = run_check(&task).await?;
        refusal(&report)?;
        let (id, mut journal) = self.sessions.create().map_err(|err| failed(&err))?;
        let created = Entry::Created { id: id.clone(), request: Box::new(request.clone()) };
        let resolved = ResolvedBackup {
            id: facts.backup.id.clone(),
            postgres_major: facts.start.major,
            recovery_line: recovery_line(&facts, request.recovery),
        };
        let begun = [created, Entry::Resolved(resolved), Entry::Attempt { number: 1 }];
        for entry in begun.into_iter().chain(warnings(&report)).chain([Entry::Checked]) {
            journal.append(Timestamp::now(), entry).map_err(|err| failed(&err))?;
        }
        drop(journal);
        self.resume(&id, [])?;
        Ok(id)
    }

    /// Does step 3 of an export alone.
    ///
    /// # Errors
    /// When the backup cannot be read or a name is unknown.
    pub async fn check(&self, request: ExportRequest) -> Result<CheckAnswer, ApiError> {
        let facts = mount_service::facts(
            request.repository.clone(),
            request.backup.clone(),
            request.recovery,
        )
        .await?;
        refuse_unknown(&request, &facts)?;
        let recovery_line = recovery_line(&facts, request.recovery);
        let report =
            run_check(&CheckTask { session: None, request, facts, delivered: Vec::new() }).await?;
        Ok(CheckAnswer { recovery_line, report })
    }

    /// Goes on with a session that failed; a session at work or succeeded is left as it is.
    ///
    /// # Errors
    /// When there is none of this id, or it was canceled.
    pub fn retry(self: Arc<Self>, id: &str) -> Result<Status, ApiError> {
        let status = self.look(id)?.status;
        match status.state {
            SessionState::Failed => {
                self.clone().resume(id, [Entry::Attempt { number: status.attempts + 1 }])?;
                Ok(self.look(id)?.status)
            }
            SessionState::Canceled => Err(ApiError {
                message: format!("session {id} was canceled and everything of it removed"),
                hint: Some("export again".into()),
                usage: true,
            }),
            _ => Ok(status),
        }
    }

    /// Stops a session and keeps what a retry re-uses.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn stop(&self, id: &str) -> Result<Status, ApiError> {
        if let Some(handle) = self.lock().get(id) {
            let _ = handle.commands.send(Command::Stop); // one that has just ended needs no stop
        }
        Ok(self.look(id)?.status)
    }

    /// Undoes a session.
    ///
    /// # Errors
    /// When there is none of this id, or it succeeded.
    pub fn cancel(self: Arc<Self>, id: &str) -> Result<Status, ApiError> {
        let status = self.look(id)?.status;
        match status.state {
            SessionState::Canceled => {}
            SessionState::Succeeded => {
                return Err(ApiError {
                    message: format!("session {id} has succeeded; there is nothing to cancel"),
                    hint: Some(format!("its export in `{}` is yours", status.target)),
                    usage: true,
                });
            }
            SessionState::Failed => self.clone().resume(id, [Entry::CancelAsked])?,
            _ => {
                if let Some(handle) = self.lock().get(id) {
                    let _ = handle.commands.send(Command::Cancel); // one that has just failed is told below
                }
            }
        }
        Ok(self.look(id)?.status)
    }

    /// Removes what sessions that are not at work have left, or says what that would be.
    pub async fn clean(self: Arc<Self>, dry_run: bool) -> CleanAnswer {
        let mut answer = CleanAnswer::default();
        for id in self.sessions.ids().unwrap_or_default() {
            let session = match self.stored(&id) {
                Ok((session, _)) => session,
                Err(err) => {
                    let hint = err.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
                    answer.failed.push(format!("session {id}: {}{hint}", err.message));
                    continue;
                }
            };
            if session.state != SessionState::Failed {
                continue;
            }
            let left = undo::find(&session);
            let objects = left.into_iter().map(|(kind, name)| CleanedObject {
                session: id.clone(),
                kind,
                name,
            });
            answer.removed.extend(objects);
            if dry_run {
                continue;
            }
            let canceled = self.clone().cancel(&id);
            if let Err(err) = canceled {
                answer.failed.push(format!("session {id}: {}", err.message));
                continue;
            }
            let end = self.wait_for_end(&id).await;
            if end.state != SessionState::Canceled {
                answer.failed.push(format!(
                    "session {id}: {}",
                    end.error.unwrap_or_else(|| "not removed".into())
                ));
            }
        }
        answer
    }

    async fn wait_for_end(&self, id: &str) -> Status {
        let Ok(mut seen) = self.watch(id) else { unreachable!("the session was just found") };
        let ended = seen
            .wait_for(|seen| !seen.status.state.is_active())
            .await
            .map(|seen| seen.status.clone());
        ended.unwrap_or_else(|_| seen.borrow().status.clone())
    }

    /// Starts the task that works on session `id`, after writing `entries` to its journal.
    fn resume(
        self: Arc<Self>,
        id: &str,
        entries: impl IntoIterator<Item = Entry>,
    ) -> Result<(), ApiError> {
        let mut active = self.lock();
        if active.get(id).is_some_and(|handle| handle.seen.borrow().status.state.is_active()) {
            return Ok(());
        }
        active.remove(id); // its task has ended and lets go of the journal
        let (mut journal, contents) = self.sessions.own(id).map_err(|err| failed(&err))?;
        let mut records = contents.records;
        for entry in entries {
            records.push(journal.append(Timestamp::now(), entry).map_err(|err| failed(&err))?);
        }
        let session = Session::from_records(&records).ok_or_else(|| no_such(id))?;
        let log: Vec<LogLine> = records.iter().flat_map(log_line).collect();
        let check = if session.checked { Progress::Done(()) } else { Progress::Absent };
        let (commands, receiver) = mpsc::unbounded_channel();
        let (publish, seen) =
            watch::channel(Seen { status: session.status(None), log: Arc::new(log) });
        active.insert(id.to_owned(), Handle { commands, seen });
        drop(active);
        let worker = Worker {
            directory: self.sessions.of(id),
            journal,
            session,
            observed: Observed { check, ..Observed::default() },
            facts: None,
            link: None,
            agent: None,
            commands: receiver,
            publish,
        };
        let id = id.to_owned();
        tokio::spawn(async move {
            worker.work().await;
            self.lock().remove(&id);
        });
        Ok(())
    }

    fn stored(&self, id: &str) -> Result<(Session, Vec<Record>), ApiError> {
        let known = !id.contains('/') && self.sessions.of(id).join(journal::FILE_NAME).is_file();
        if !known {
            return Err(no_such(id));
        }
        let directory = self.sessions.of(id);
        let unreadable = |message: String| ApiError {
            message,
            hint: Some(format!(
                "what it made cannot be told any more: look for names with {id} in the work, dump and target directories, \
                 then remove `{}`",
                directory.display()
            )),
            usage: false,
        };
        let read = journal::read(&directory);
        let records = read.map_err(|err| unreadable(failed(&err).message))?.records;
        let session = Session::from_records(&records)
            .ok_or_else(|| unreadable(format!("the journal of session {id} is empty")))?;
        Ok((session, records))
    }

    /// One session per target directory, and none in another's.
    fn refuse_second_session(&self, request: &ExportRequest) -> Result<(), ApiError> {
        let nested = |status: &Status| {
            let other = Path::new(&status.target);
            !status.state.is_final()
                && !status.target.is_empty() // of a session whose journal cannot be read
                && (request.target.starts_with(other) || other.starts_with(&request.target))
        };
        match self.list().into_iter().find(nested) {
            None => Ok(()),
            Some(other) => Err(ApiError {
                message: format!("target `{}` belongs to session {}", other.target, other.id),
                hint: Some(format!(
                    "`pgthaw retry {0}` or `pgthaw cancel {0}` first, or name another directory",
                    other.id
                )),
                usage: true,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Handle>> {
        self.active.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The task that works on one session.
struct Worker {
    directory: PathBuf,
    journal: Journal,
    session: Session,
    observed: Observed,
    facts: Option<BackupFacts>,
    link: Option<AgentLink>,
    agent: Option<watch::Receiver<Option<AgentView>>>,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Seen>,
}

impl Worker {
    async fn work(mut self) {
        if let Err(err) = self.until_the_end().await {
            // Without its journal a session cannot go on; what it holds is found again by the next server.
            eprintln!("session {}: {err}", self.session.id);
            let mut seen = self.publish.borrow().clone();
            seen.status.state = SessionState::Failed;
            seen.status.error = Some(err.to_string());
            let _ = self.publish.send(seen);
        }
    }

    async fn until_the_end(&mut self) -> Result<(), journal::JournalError> {
        if let Some(place) = &self.session.place {
            self.meet(AgentLink::to(place)).await;
        }
        loop {
            self.take_commands()?;
            self.look_at_agent();
            for entry in facts(&self.session, &self.observed) {
                self.note(entry)?;
            }
            let action = decide(&self.session, &self.observed);
            if let Some(step) = step_of(&action).filter(|step| *step != self.session.step) {
                self.note(Entry::Step(step))?;
            }
            self.show();
            match self.act(action).await? {
                Next::Again => {}
                Next::Wait => self.wait().await?,
                Next::End => return Ok(()),
            }
        }
    }

    /// Carries out one action.
    async fn act(&mut self, action: Action) -> Result<Next, journal::JournalError> {
        match action {
            Action::Nothing => return Ok(Next::End),
            Action::Wait => return Ok(Next::Wait),
            Action::Check => self.check().await?,
            Action::StartAgent => self.start_agent().await?,
            Action::EnsureMount => {
                if let Some(map) = self.map().await? {
                    let link = self.link().clone();
                    let asked = match link.put_map(map).await {
                        Ok(()) => link.ask("mount", &()).await,
                        Err(err) => Err(err),
                    };
                    return self.asked(asked);
                }
            }
            Action::EnsureInstance => return self.ask("instance").await,
            Action::EnsureGlobals => return self.ask("globals").await,
            Action::EnsureDump { database } => {
                let asked = self.link().ask("dump", &database).await;
                return self.asked(asked);
            }
            Action::Seal => return self.ask("seal").await,
            Action::GiveUp(failure) => self.give_up(failure)?,
            Action::EnsureGone { everything } => self.remove(everything).await?,
            Action::Finish(state) => {
                self.note(Entry::State(state))?;
                self.show();
                return Ok(Next::End);
            }
        }
        Ok(Next::Again)
    }

    async fn check(&mut self) -> Result<(), journal::JournalError> {
        if sealing::sealed_before(&self.session.request.target, &self.session.id).is_some() {
            return self.remove(false).await; // which finds that it is complete
        }
        let facts = match self.backup_facts().await {
            Ok(facts) => facts,
            Err(err) => return self.give_up(err.into()),
        };
        let task = CheckTask {
            session: Some(self.session.id.clone()),
            request: self.session.request.clone(),
            facts,
            delivered: self.session.delivered(),
        };
        let checked = match run_check(&task).await {
            Ok(report) => {
                for warning in warnings(&report) {
                    self.note(warning)?;
                }
                refusal(&report)
            }
            Err(err) => Err(err),
        };
        self.observed.check = match checked {
            Ok(()) => Progress::Done(()),
            Err(err) => Progress::Failed(err.into()),
        };
        Ok(())
    }

    async fn start_agent(&mut self) -> Result<(), journal::JournalError> {
        let facts = match self.backup_facts().await {
            Ok(facts) => facts,
            Err(err) => return self.give_up(err.into()),
        };
        let place = match place::choose_place(&self.session.id, &self.session.request, new_marker())
        {
            Ok(place) => place,
            Err(failure) => return self.give_up(failure),
        };
        self.note(Entry::Placed(place.clone()))?;
        let assignment = Assignment {
            session: self.session.id.clone(),
            request: self.session.request.clone(),
            facts,
            place,
            recovery_end: self.session.recovery_end.clone(),
            delivered: self.session.delivered(),
        };
        match AgentLink::start(&assignment, &self.directory.join("agent.log")).await {
            Ok(link) => self.meet(link).await,
            Err(failure) => self.give_up(failure)?,
        }
        Ok(())
    }

    async fn map(&mut self) -> Result<Option<Vec<u8>>, journal::JournalError> {
        let Some(resolved) = &self.session.resolved else { return Ok(None) };
        let (request, backup) = (&self.session.request, resolved.id.clone());
        match mount_service::map(request.repository.clone(), backup, request.recovery).await {
            Ok(map) => Ok(Some(map)),
            Err(err) => {
                self.give_up(err.into())?;
                Ok(None)
            }
        }
    }

    async fn ask(&mut self, verb: &str) -> Result<Next, journal::JournalError> {
        let asked = self.link().ask(verb, &()).await;
        self.asked(asked)
    }

    /// After the agent was asked: it shows what follows. One that does not answer is found out by its watcher.
    fn asked(&mut self, asked: Result<(), ClientError>) -> Result<Next, journal::JournalError> {
        match asked {
            Ok(()) => Ok(Next::Wait),
            Err(ClientError::Api(err)) => {
                self.give_up(err.into())?;
                Ok(Next::Again)
            }
            Err(_) => Ok(Next::Wait),
        }
    }

    /// Asks the agent to remove what it made and to end; then removes what is still there, if only because the agent is dead.
    async fn remove(&mut self, everything: bool) -> Result<(), journal::JournalError> {
        if let Some(link) = self.link.take() {
            link.end().await;
        }
        (self.agent, self.observed.agent) = (None, None);
        let session = self.session.clone();
        let undone = tokio::task::spawn_blocking(move || undo::undo(&session, everything)).await;
        let Undone { failed: failures, sealed, kept } = undone.unwrap_or_else(|err| Undone {
            failed: vec![format!("removing ended early: {err}")],
            sealed: None,
            kept: Vec::new(),
        });
        for directory in kept {
            let directory = directory.display();
            self.note(Entry::Message(format!(
                "`{directory}` stays: it holds something that this session did not put there"
            )))?;
        }
        if let (Some(bytes), None) = (sealed, self.session.sealed) {
            self.note(Entry::Sealed { bytes })?;
        }
        for failure in &failures {
            self.note(Entry::Message(format!("could not remove: {failure}")))?;
        }
        if !failures.is_empty() {
            // Nothing more can be done by itself: the session ends as failed, its place stays in the journal for the next try.
            self.give_up(
                Failure::new(format!("could not remove {}", failures.join("; ")))
                    .hint(format!("mend that, then `pgthaw cancel {}`", self.session.id)),
            )?;
            self.note(Entry::State(SessionState::Failed))?;
            return Ok(());
        }
        self.note(Entry::Cleaned)
    }

    fn take_commands(&mut self) -> Result<(), journal::JournalError> {
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command)?;
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), journal::JournalError> {
        match command {
            Command::Stop
                if self.session.intent == Intent::Run && self.session.sealed.is_none() =>
            {
                self.give_up(Failure::new("stopped by the user"))
            }
            Command::Stop => Ok(()),
            Command::Cancel if self.session.sealed.is_none() => self.note(Entry::CancelAsked),
            Command::Cancel => Ok(()),
        }
    }

    fn give_up(&mut self, failure: Failure) -> Result<(), journal::JournalError> {
        self.note(Entry::GaveUp(failure))
    }

    /// Waits until the agent shows something new or the user says something.
    async fn wait(&mut self) -> Result<(), journal::JournalError> {
        let agent_changes = async {
            match &mut self.agent {
                Some(agent) => agent.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = agent_changes => {
                if changed.is_err() {
                    self.agent = None;
                    self.observed.agent = None;
                }
                Ok(())
            }
            command = self.commands.recv() => match command {
                Some(command) => self.obey(command),
                None => Ok(()),
            },
        }
    }

    async fn meet(&mut self, link: AgentLink) {
        let agent = link.watch().await;
        self.observed.agent = agent.borrow().clone();
        (self.link, self.agent) = (Some(link), Some(agent));
    }

    fn look_at_agent(&mut self) {
        if let Some(agent) = &mut self.agent {
            self.observed.agent = agent.borrow_and_update().clone();
        }
    }

    fn link(&self) -> &AgentLink {
        self.link.as_ref().expect("an agent that is seen has a line to it")
    }

    async fn backup_facts(&mut self) -> Result<BackupFacts, ApiError> {
        if let Some(facts) = &self.facts {
            return Ok(facts.clone());
        }
        let request = &self.session.request;
        let backup = self.session.resolved.as_ref().map(|resolved| resolved.id.clone());
        let facts =
            mount_service::facts(request.repository.clone(), backup, request.recovery).await?;
        Ok(self.facts.insert(facts).clone())
    }

    /// Writes `entry` into the journal and takes it in.
    fn note(&mut self, entry: Entry) -> Result<(), journal::JournalError> {
        let record = self.journal.append(Timestamp::now(), entry)?;
        self.session.apply(&record.entry);
        let lines: Vec<LogLine> = log_line(&record).into_iter().collect();
        if !lines.is_empty() {
            self.publish.send_modify(|seen| Arc::make_mut(&mut seen.log).extend(lines));
        }
        Ok(())
    }

    fn show(&self) {
        let status = self.session.status(self.observed.agent.as_ref());
        self.publish.send_if_modified(|seen| {
            let changed = seen.status != status;
            seen.status = status;
            changed
        });
    }
}

/// What follows an action.
enum Next {
    Again,
    Wait,
    End,
}

/// Runs the check in a child, so that whatever it meets cannot hold the server up.
async fn run_check(task: &CheckTask) -> Result<CheckReport, ApiError> {
    let report = internal::ask(Child::Check, None, task).await?;
    serde_json::from_slice(&report)
        .map_err(|err| ApiError::broken(format!("the check answered something else: {err}")))
}

/// A report's warnings, for the journal.
fn warnings(report: &CheckReport) -> Vec<Entry> {
    let warnings = report.findings.iter().filter(|finding| !finding.error);
    warnings.map(|warning| Entry::Message(format!("warning: {}", with_remedy(warning)))).collect()
}

/// All errors of a report as one.
///
/// # Errors
/// That one, unless there is none.
fn refusal(report: &CheckReport) -> Result<(), ApiError> {
    let errors: Vec<_> = report.findings.iter().filter(|finding| finding.error).collect();
    let usage = errors.iter().any(|finding| finding.usage);
    match errors[..] {
        [] => Ok(()),
        [only] => Err(ApiError { message: only.message.clone(), hint: only.remedy.clone(), usage }),
        _ => {
            let lines = errors.iter().map(|finding| format!("\n  {}", with_remedy(finding)));
            let message =
                format!("{} things refuse the export:{}", errors.len(), lines.collect::<String>());
            Err(ApiError { message, hint: None, usage })
        }
    }
}

fn with_remedy(finding: &Finding) -> String {
    let remedy = finding.remedy.as_ref().map(|remedy| format!(" ({remedy})"));
    format!("{}{}", finding.message, remedy.unwrap_or_default())
}

/// Refuses names that the backup does not hold, where it is not recovered beyond its end.
fn refuse_unknown(request: &ExportRequest, facts: &BackupFacts) -> Result<(), ApiError> {
    let held = |name: &String| facts.databases.iter().any(|database| database.name == *name);
    let unknown: Vec<&str> =
        request.databases.iter().filter(|name| !held(name)).map(String::as_str).collect();
    if unknown.is_empty()
        || facts.databases.is_empty()
        || request.recovery == RecoveryChoice::Latest
    {
        return Ok(());
    }
    let there: Vec<&str> =
        facts.databases.iter().filter(|d| d.allows_connections).map(|d| d.name.as_str()).collect();
    Err(ApiError {
        message: format!("backup {} holds no database {}", facts.backup.id, quoted(&unknown)),
        hint: Some(format!("it holds {}", quoted(&there))),
        usage: true,
    })
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The line that `pgthaw log` shows for a record, if any.
fn log_line(record: &Record) -> Option<LogLine> {
    let text = match &record.entry {
        Entry::Resolved(backup) => backup.recovery_line.clone(),
        Entry::Attempt { number: 1 } | Entry::Cleaned | Entry::Created { .. } => return None,
        Entry::Attempt { number } => format!("attempt {number}"),
        Entry::Checked => "checked: nothing refuses the export".into(),
        Entry::Placed(Place { work_directory, dump_directory, .. }) => {
            format!(
                "working in {}, dumping to {}",
                work_directory.display(),
                dump_directory.display()
            )
        }
        Entry::Step(step) => step_text(*step).into(),
        Entry::Recovered(end) => match &end.last_transaction {
            Some(time) => format!(
                "recovered to {} on timeline {}, last transaction at {time}",
                end.lsn, end.timeline
            ),
            None => format!("recovered to {} on timeline {}", end.lsn, end.timeline),
        },
        Entry::Selected(databases) => {
            let names: Vec<&str> =
                databases.iter().map(|database| database.name.as_str()).collect();
            format!("exporting {}", names.join(", "))
        }
        Entry::Database { name, error: Some(error), .. } => {
            format!("database {name} failed: {error}")
        }
        Entry::Database { name, bytes, .. } => {
            format!("database {name} delivered, {}", human_size(*bytes))
        }
        Entry::Sealed { bytes } => format!("export complete, {}", human_size(*bytes)),
        Entry::GaveUp(failure) => format!("gave up: {failure}"),
        Entry::CancelAsked => "cancel".into(),
        Entry::State(state) => format!("{state:?}").to_lowercase(),
        Entry::Message(text) => text.clone(),
    };
    Some(LogLine { at: record.at, text })
}

fn step_text(step: pgthaw_session::Step) -> &'static str {
    use pgthaw_session::Step;
    match step {
        Step::Request => "accepted",
        Step::Check => "checking",
        Step::Mount => "mounting the backup",
        Step::Recover => "starting PostgreSQL on the mount",
        Step::Dump => "dumping",
        Step::Deliver => "verifying and completing the export",
        Step::Clean => "removing what is temporary",
    }
}

fn no_such(id: &str) -> ApiError {
    ApiError {
        message: format!("there is no session `{id}`"),
        hint: Some("`pgthaw sessions` lists them".into()),
        usage: true,
    }
}

fn failed(err: &dyn std::error::Error) -> ApiError {
    ApiError { message: crate::internal::source::with_causes(err), hint: None, usage: false }
}
