//! The recovery service: owns the sessions, from request to clean end.
//!
//! One task per active session does the same dull loop: observe, journal the facts, decide, act. All decisions are made in
//! [`pgthaw_session::decide()`]; here is only how each action is carried out.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgthaw_link::Purpose;
use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::decide::{facts, step_of};
use pgthaw_session::journal::{self, Journal};
use pgthaw_session::observed::{Failure, Observed, Progress};
use pgthaw_session::request::Requester;
use pgthaw_session::session::{Entry, Intent, Place, Record, ResolvedBackup};
use pgthaw_session::{
    Action, ExportRequest, RecoveryChoice, Session, SessionState, Status, decide,
};
use tokio::sync::{mpsc, watch};

use super::agent_link::{AgentLink, Watch};
use super::audit::Audit;
use super::kept::Kept;
use super::mover::{self, Mover};
use super::sessions::SessionsDirectory;
use super::site::{Site, Sites};
use super::{bundle, mount_service, reads};
use crate::agent::space::human_size;
use crate::agent::{delivering, mounting};
use crate::delivered::Delivered;
use crate::http::ClientError;
use crate::machine::Machines;
use crate::recovery_line::recovery_line;
use crate::wire::{
    ApiError, Assignment, BackupFacts, CheckAnswer, CheckReport, CleanAnswer, CleanedObject,
    Finding, LogLine, TargetUndone,
};

/// Between two attempts or two tries to reach a machine, at first and at most.
const FIRST_REST: Duration = Duration::from_secs(2);
const LONGEST_REST: Duration = Duration::from_secs(60);

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
    machines: Machines,
    /// A team's trail of requests.
    audit: Option<Audit>,
    active: Mutex<BTreeMap<String, Handle>>,
}

impl RecoveryService {
    /// Opens the sessions below `state_directory`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(
        state_directory: &Path,
        machines: Machines,
        audit: Option<Audit>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            sessions: SessionsDirectory::open(state_directory)?,
            machines,
            audit,
            active: Mutex::default(),
        }))
    }

    /// The machines in use.
    pub fn machines(&self) -> &Machines {
        &self.machines
    }

    /// The trail of requests, where a team is served.
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// Who asked a team's server for session `id`.
    ///
    /// # Errors
    /// When there is none of this id, or its journal cannot be read.
    pub fn requester(&self, id: &str) -> Result<Option<Requester>, ApiError> {
        Ok(self.stored(id)?.0.request.requester)
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
            status: session.status(None, None),
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
    pub async fn create(self: Arc<Self>, mut request: ExportRequest) -> Result<String, ApiError> {
        let sites = self.sites(&request)?;
        sites.make_absolute(&mut request).await?;
        self.refuse_second_session(&request)?;
        let (facts, report) = look_at_machines(&sites, &request).await?;
        refusal(&report)?;
        let (id, mut journal) = self.sessions.create().map_err(|err| failed(&err))?;
        let created = Entry::Created { id: id.clone(), request: Box::new(request.clone()) };
        let resolved = ResolvedBackup {
            id: facts.backup.id.clone(),
            postgres_major: facts.start.major,
            recovery_line: recovery_line(&facts, request.recovery),
        };
        let begun = [created, Entry::Resolved(resolved), Entry::Attempt { number: 1 }];
        let keys = whose_keys(&request).map(Entry::Message);
        let begun = begun.into_iter().chain(keys).chain(warnings(&report)).chain([Entry::Checked]);
        for entry in begun {
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
    pub async fn check(&self, mut request: ExportRequest) -> Result<CheckAnswer, ApiError> {
        let sites = self.sites(&request)?;
        sites.make_absolute(&mut request).await?;
        let (facts, mut report) = look_at_machines(&sites, &request).await?;
        if !report.refused() {
            mover::try_out(&sites.staging, &sites.target, request.mover, &mut report).await;
        }
        Ok(CheckAnswer { recovery_line: recovery_line(&facts, request.recovery), report })
    }

    /// Goes on with a session that failed; a session at work or succeeded is left as it is.
    ///
    /// # Errors
    /// When there is none of this id, or it was canceled.
    pub fn retry(self: Arc<Self>, id: &str) -> Result<Status, ApiError> {
        let status = self.look(id)?.status;
        match status.state {
            SessionState::Failed => {
                // One that failed because its journal could not be written is still at work by its journal, and is only taken up again.
                let interrupted = self.stored(id)?.0.state.is_active();
                let again =
                    (!interrupted).then_some(Entry::Attempt { number: status.attempts + 1 });
                self.clone().resume(id, again)?;
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

    /// The machines of a request.
    fn sites(&self, request: &ExportRequest) -> Result<Sites, ApiError> {
        let own = rustix::process::geteuid().as_raw();
        let uid = request.requester.as_ref().map_or(own, |requester| requester.uid);
        let agent = match &request.ssh_agent_of {
            Some(caller) => Some(self.machines.ssh_agent(caller, uid).map_err(|err| failed(&err))?),
            None => None,
        };
        let site = |host: Option<&str>| Site::named(host, &self.machines, agent.as_ref());
        let target = match &request.target_caller {
            Some(caller) => Site::Far(self.machines.caller(caller, uid)),
            None => site(request.target_host.as_deref())?,
        };
        Ok(Sites { staging: site(request.staging.as_deref())?, target })
    }

    /// Looks into the export of a session: what there is to know for loading it.
    ///
    /// # Errors
    /// When there is no session of this id, or the target's machine cannot be reached.
    pub async fn delivered(&self, id: &str) -> Result<Delivered, ApiError> {
        let status = self.look(id)?.status;
        let databases = status.databases.iter().map(|database| database.name.clone()).collect();
        let request = self.stored(id)?.0.request;
        self.sites(&request)?.target.delivered(&request.target, databases).await
    }

    /// Puts together what helps to find the cause of a failure, also of a session whose journal is damaged.
    ///
    /// # Errors
    /// When there is no session of this id.
    pub fn bundle(&self, id: &str) -> Result<serde_json::Value, ApiError> {
        let known = self.sessions.ids().is_ok_and(|ids| ids.iter().any(|known| known == id));
        match known {
            true => Ok(bundle::put_together(self.sessions.state(), &self.sessions.of(id))),
            false => Err(no_such(id)),
        }
    }

    /// Removes what sessions that are not at work have left, or says what that would be.
    /// Only those whose request `is_asked_for`.
    pub async fn clean(
        self: Arc<Self>,
        dry_run: bool,
        is_asked_for: impl Fn(&ExportRequest) -> bool,
    ) -> CleanAnswer {
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
            if session.state != SessionState::Failed || !is_asked_for(&session.request) {
                continue;
            }
            let left = match self.sites(&session.request) {
                Ok(sites) => sites.find(&session).await,
                Err(err) => Err(err),
            };
            let left = match left {
                Ok(left) => left,
                Err(err) => {
                    answer.failed.push(format!("session {id}: {}", err.message));
                    continue;
                }
            };
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
        let sites = self.sites(&session.request)?;
        let (commands, receiver) = mpsc::unbounded_channel();
        let (publish, seen) =
            watch::channel(Seen { status: session.status(None, None), log: Arc::new(log) });
        active.insert(id.to_owned(), Handle { commands, seen });
        drop(active);
        let worker = Worker {
            directory: self.sessions.of(id),
            journal,
            session,
            observed: Observed { check, ..Observed::default() },
            facts: None,
            sites,
            link: None,
            agent: None,
            reads: None,
            mover: None,
            trying_since: None,
            commands: receiver,
            publish,
        };
        let id = id.to_owned();
        tokio::spawn(async move {
            if worker.work().await {
                self.lock().remove(&id); // from now on its journal tells
            }
            if let (Some(audit), Ok((session, _))) = (&self.audit, self.stored(&id))
                && let Some(requester) = &session.request.requester
            {
                audit.session(requester, "end", &session.status(None, None));
            }
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
            let other = status.target_directory();
            !status.state.is_final()
                && status.target_host.as_ref() == request.target_machine()
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
    sites: Sites,
    link: Option<AgentLink>,
    agent: Option<Watch>,
    /// The connection for reads of the repository by another machine's mount.
    reads: Option<Kept>,
    /// The connection between the two halves of the data mover, where the target is on another machine than the instance.
    mover: Option<Mover>,
    /// Since when something is tried again and again.
    trying_since: Option<Instant>,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Seen>,
}

impl Worker {
    /// Works until the session rests; returns whether its journal holds how.
    async fn work(mut self) -> bool {
        let Err(err) = self.until_the_end().await else { return true };
        // Without its journal a session cannot go on; a retry or the next server finds what it holds.
        let ApiError { message, .. } = failed(&err);
        // The server's log may lie on the same full disk.
        let _ = writeln!(io::stderr(), "session {}: {message}", self.session.id);
        self.publish.send_modify(|seen| {
            seen.status.state = SessionState::Failed;
            seen.status.error = Some(message);
            seen.status.hint = Some(format!("mend that, then `pgthaw retry {}`", seen.status.id));
        });
        false
    }

    async fn until_the_end(&mut self) -> Result<(), journal::JournalError> {
        if let Some(place) = &self.session.place {
            self.meet(self.sites.staging.agent(place)).await;
        }
        loop {
            self.take_commands()?;
            self.look_at_agent();
            self.keep_connections();
            self.note_dump_way()?;
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
            Action::BeginAgain => self.begin_again().await?,
            Action::Finish(state) => {
                self.note(Entry::State(state))?;
                self.show();
                return Ok(Next::End);
            }
        }
        Ok(Next::Again)
    }

    async fn check(&mut self) -> Result<(), journal::JournalError> {
        if let Some(failure) = self.reach().await? {
            return if self.goes_on() { self.give_up(failure) } else { Ok(()) };
        }
        let request = &self.session.request;
        match self.sites.target.sealed_before(&request.target, &self.session.id).await {
            Ok(None) => {}
            Ok(Some(_)) => return self.remove(false).await, // which finds that it is complete
            Err(err) => return self.give_up(err.into()),
        }
        let facts = match self.backup_facts().await {
            Ok(facts) => facts,
            Err(err) => return self.give_up(err.into()),
        };
        let (id, delivered) = (self.session.id.clone(), self.session.delivered());
        let report = self.sites.check(Some(id), &self.session.request, &facts, delivered).await;
        let checked = match report {
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
        let place = match self.sites.choose_place(&self.session).await {
            Ok(place) => place,
            Err(err) => return self.give_up(err.into()),
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
        let log = self.directory.join("agent.log");
        match self.sites.staging.start_agent(&assignment, &log).await {
            Ok(link) => self.meet(link).await,
            Err(failure) => self.give_up(failure)?,
        }
        Ok(())
    }

    async fn map(&mut self) -> Result<Option<Vec<u8>>, journal::JournalError> {
        let Some(resolved) = &self.session.resolved else { return Ok(None) };
        let (request, backup) = (&self.session.request, resolved.id.clone());
        match mount_service::map(request.repository.clone(), backup, request.recovery).await {
            Ok(map) => match (request.repository_beside_instance(), &request.read_from_staging) {
                (None, _) => self.without_objects(&map),
                (Some(_), None) => Ok(Some(map)),
                (Some(_), Some(there)) => {
                    let rebased = mount_service::rebased(&map, &request.repository.path, there);
                    self.or_give_up(rebased.map_err(Failure::from))
                }
            },
            Err(err) => {
                self.give_up(err.into())?;
                Ok(None)
            }
        }
    }

    /// Keeps the table of objects here, for whoever reads them for the other machine's mount.
    fn without_objects(&mut self, map: &[u8]) -> Result<Option<Vec<u8>>, journal::JournalError> {
        let path = self.objects();
        let split = mount_service::without_objects(map).map_err(Failure::from).and_then(
            |(map, objects)| {
                let written = std::fs::write(&path, objects);
                written
                    .map_err(|err| Failure::new(format!("write `{}`: {err}", path.display())))?;
                Ok(map)
            },
        );
        self.or_give_up(split)
    }

    /// The result, or the end of the attempt.
    fn or_give_up<T>(
        &mut self,
        result: Result<T, Failure>,
    ) -> Result<Option<T>, journal::JournalError> {
        match result {
            Ok(result) => Ok(Some(result)),
            Err(failure) => {
                self.give_up(failure)?;
                Ok(None)
            }
        }
    }

    /// The file that lists the objects which the other machine's mount may read.
    fn objects(&self) -> PathBuf {
        self.directory.join("objects")
    }

    /// Keeps up what an agent on another machine needs besides calls.
    fn keep_connections(&mut self) {
        let (Some(place), Some(agent)) = (&self.session.place, &self.observed.agent) else {
            (self.reads, self.mover) = (None, None);
            return;
        };
        let request = &self.session.request;
        if self.reads.is_none()
            && request.repository_beside_instance().is_none()
            && agent.mount == Progress::Done(())
            && let Some(machine) = self.sites.staging.machine()
            && let Ok(owner) = mount_service::owner(&request.repository.path)
        {
            let socket = mounting::reads_socket(place);
            self.reads = Some(reads::keep(machine.clone(), socket, self.objects(), owner));
        }
        if self.mover.is_none() && request.delivers_elsewhere() {
            let receive = Purpose::Receive {
                session: self.session.id.clone(),
                directory: request.target.clone(),
                replace: request.replace,
            };
            let (staging, target) = (self.sites.staging.clone(), self.sites.target.clone());
            let socket = delivering::mover_socket(place);
            self.mover = Some(Mover::keep(staging, socket, target, receive, request.mover));
        }
    }

    /// Says which way the dump goes, whenever that changes.
    fn note_dump_way(&mut self) -> Result<(), journal::JournalError> {
        match self.mover.as_ref().and_then(Mover::way) {
            Some(way) if self.session.dump_way.as_ref() != Some(&way) => {
                self.note(Entry::DumpWay(way))
            }
            _ => Ok(()),
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
        (self.agent, self.observed.agent, self.observed.waiting) = (None, None, None);
        (self.reads, self.mover) = (None, None);
        let TargetUndone { failed: failures, sealed, kept } = loop {
            let away = if self.goes_on() { self.reach().await? } else { None }; // told below
            let undone = self.sites.undo(&self.session, everything).await;
            let may_pass = away.is_none() && self.goes_on() && self.sites.is_cut().await;
            if undone.failed.is_empty() || !may_pass {
                break undone;
            }
        };
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
            let what = format!("could not remove {}", failures.join("; "));
            let what = match &self.session.failure {
                Some(first) if !first.message.contains(&what) => format!("{first}; then: {what}"),
                _ => what,
            };
            let id = &self.session.id;
            let hint = format!("mend that, then `pgthaw retry {id}` or `pgthaw cancel {id}`");
            self.give_up(Failure::new(what).hint(hint))?;
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
            Command::Stop if self.goes_on() && self.session.sealed.is_none() => {
                self.give_up(Failure::new("stopped by the user"))
            }
            Command::Stop => Ok(()),
            Command::Cancel if self.session.sealed.is_none() => self.note(Entry::CancelAsked),
            Command::Cancel => Ok(()),
        }
    }

    /// Whether the session is to be completed without anybody's doing, in this attempt or the next.
    fn goes_on(&self) -> bool {
        match &self.session.intent {
            Intent::Run => true,
            Intent::GiveUp(failure) => failure.passes,
            Intent::Cancel => false,
        }
    }

    /// Whether there is time left to wait for a machine, or to begin again.
    fn has_time(&self) -> bool {
        let limit = Duration::from_secs(self.session.request.retry_for);
        self.trying_since.is_none_or(|since| since.elapsed() < limit)
    }

    /// Rests for a while; the session shows `why` it waits. Ends early when the user says something.
    async fn rest(&mut self, length: Duration, why: String) -> Result<(), journal::JournalError> {
        self.trying_since.get_or_insert_with(Instant::now);
        self.observed.waiting = Some(why);
        self.show();
        tokio::select! {
            () = tokio::time::sleep(length) => {}
            Some(command) = self.commands.recv() => self.obey(command)?,
        }
        self.observed.waiting = None;
        Ok(())
    }

    /// Begins the next attempt after a rest.
    async fn begin_again(&mut self) -> Result<(), journal::JournalError> {
        let number = self.session.attempts + 1;
        let rest = FIRST_REST.saturating_mul(1 << self.session.again.min(10)).min(LONGEST_REST);
        let why = self.session.failure.as_ref().map_or_else(String::new, ToString::to_string);
        let why = format!("attempt {number} begins in {} s: {why}", rest.as_secs());
        self.rest(rest, why).await?;
        if self.goes_on() {
            self.note(Entry::AgainByItself)?;
            self.note(Entry::Attempt { number })?;
            (self.observed, self.facts) = (Observed::default(), None);
        }
        Ok(())
    }

    /// Waits until the session's machines can be reached, as long as there is time; returns why they cannot.
    async fn reach(&mut self) -> Result<Option<Failure>, journal::JournalError> {
        let mut rest = FIRST_REST;
        loop {
            match self.sites.reach().await {
                Ok(()) => return Ok(None),
                Err(failure) if failure.passes && self.goes_on() && self.has_time() => {
                    self.rest(rest, failure.message).await?;
                    rest = (rest * 2).min(LONGEST_REST);
                }
                Err(failure) => return Ok(Some(failure)),
            }
        }
    }

    fn give_up(&mut self, failure: Failure) -> Result<(), journal::JournalError> {
        self.note(Entry::GaveUp(failure))
    }

    /// Waits until the agent shows something new or the user says something.
    async fn wait(&mut self) -> Result<(), journal::JournalError> {
        let agent_changes = async {
            match &mut self.agent {
                Some(Watch { view, trouble }) => tokio::select! {
                    changed = view.changed() => changed,
                    Ok(()) = trouble.changed() => Ok(()),
                },
                None => std::future::pending().await,
            }
        };
        let kept_changes = async {
            let mover = self.mover.as_mut().map(|mover| &mut mover.kept);
            let [reads, mover] = [self.reads.as_mut(), mover].map(|kept| async {
                match kept {
                    Some(kept) => kept.changed().await,
                    None => std::future::pending().await,
                }
            });
            tokio::select! { () = reads => {}, () = mover => {} }
        };
        tokio::select! {
            changed = agent_changes => {
                if changed.is_err() {
                    self.agent = None;
                    self.observed.agent = None;
                }
                Ok(())
            }
            () = kept_changes => Ok(()),
            command = self.commands.recv() => match command {
                Some(command) => self.obey(command),
                None => Ok(()),
            },
        }
    }

    async fn meet(&mut self, link: AgentLink) {
        let agent = link.watch().await;
        self.observed.agent = agent.view.borrow().clone();
        self.observed.waiting = agent.trouble.borrow().clone();
        (self.link, self.agent) = (Some(link), Some(agent));
    }

    fn look_at_agent(&mut self) {
        self.observed.may_begin_again = self.has_time();
        let Some(Watch { view, trouble }) = &mut self.agent else { return };
        self.observed.agent = view.borrow_and_update().clone();
        let seen = self.observed.agent.as_ref();
        let trouble = trouble.borrow_and_update().clone();
        // Why the connection cannot be made tells more than that there is none.
        let reads = self.reads.as_ref().and_then(Kept::trouble);
        let mover = self.mover.as_ref().and_then(|mover| mover.kept.trouble());
        let because = |waiting: &String, why: Option<String>| match why {
            Some(why) => format!("{waiting}: {why}"),
            None => waiting.clone(),
        };
        self.observed.waiting = trouble.or_else(|| {
            let repository = seen?.waiting_for_repository.as_ref();
            repository.map(|waiting| because(waiting, reads))
        });
        if self.observed.waiting.is_none()
            && let Some(waiting) = seen.and_then(|seen| seen.waiting_for_target.as_ref())
        {
            self.observed.waiting = Some(because(waiting, mover));
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
        let waiting = self.observed.waiting.as_deref();
        let status = self.session.status(self.observed.agent.as_ref(), waiting);
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

/// Reads the backup's facts and checks everything, for a session that does not exist yet.
async fn look_at_machines(
    sites: &Sites,
    request: &ExportRequest,
) -> Result<(BackupFacts, CheckReport), ApiError> {
    let (repository, backup) = (request.repository.clone(), request.backup.clone());
    let facts = mount_service::facts(repository, backup, request.recovery).await?;
    refuse_unknown(request, &facts)?;
    let report = sites.check(None, request, &facts, Vec::new()).await?;
    Ok((facts, report))
}

/// Says whose keys reach other machines, where that is not plain: a team's server uses its own.
fn whose_keys(request: &ExportRequest) -> Option<String> {
    request.requester.as_ref()?;
    request.staging.as_ref().or(request.target_host.as_ref())?;
    if let Some(caller) = &request.ssh_agent_of {
        return Some(format!(
            "other machines are reached with the SSH keys of {}, by the forwarded ssh-agent",
            caller.name
        ));
    }
    let uid = rustix::process::geteuid().as_raw().to_string();
    let user = OsUser::look_up(&uid).map_or(uid, |user| user.name);
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Some(format!(
        "other machines are reached with the SSH keys of {user}@{host}, the account of the server"
    ))
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
        Entry::Attempt { number: 1 }
        | Entry::AgainByItself
        | Entry::Cleaned
        | Entry::Created { .. } => return None,
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
        Entry::DumpWay(way) => format!("the dump goes {}", way.text),
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

/// What is said of a session that is not there.
pub fn no_such(id: &str) -> ApiError {
    ApiError {
        message: format!("there is no session `{id}`"),
        hint: Some("`pgthaw sessions` lists them".into()),
        usage: true,
    }
}

fn failed(err: &dyn std::error::Error) -> ApiError {
    ApiError { message: crate::internal::source::with_causes(err), hint: None, usage: false }
}
