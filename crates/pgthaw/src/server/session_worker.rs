//! The work on one session: observe, journal the facts, decide, act, until it rests.
//!
//! All decisions are made in [`pgthaw_session::decide()`]; here is how each action is carried out.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgthaw_link::Purpose;
use pgthaw_session::decide::{facts, step_of};
use pgthaw_session::journal::{self, Journal};
use pgthaw_session::observed::{AgentView, Failure, Observed, Progress};
use pgthaw_session::session::{Entry, Intent};
use pgthaw_session::{Action, Session, SessionState, decide};
use tokio::sync::{mpsc, watch};

use super::agent_link::{AgentLink, Watch};
use super::log_lines::log_line;
use super::mount_service;
use super::mover::Mover;
use super::reads::{ReadObjects, Reads};
use super::recovery_service::{Seen, failed};
use super::refusals::{refusal, warnings};
use super::site::{Site, Sites};
use crate::agent::{delivering, mounting};
use crate::http::ClientError;
use crate::wire::{ApiError, Assignment, BackupFacts, LogLine, TargetUndone};

/// Between two attempts or two tries to reach a machine, at first and at most.
const FIRST_REST: Duration = Duration::from_secs(2);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// What a user can say to a session at work.
#[derive(Debug)]
pub enum Command {
    /// Ctrl-C: stop, and keep what a retry re-uses.
    Stop,
    /// Undo everything.
    Cancel,
}

/// The task that works on one session.
pub struct Worker {
    directory: PathBuf,
    journal: Journal,
    session: Session,
    observed: Observed,
    facts: Option<BackupFacts>,
    sites: Sites,
    link: Option<AgentLink>,
    agent: Option<Watch>,
    /// The connection for reads of the repository by another machine's mount.
    reads: Option<Reads>,
    /// The connection between the two halves of the data mover, where the target is on another machine than the instance.
    mover: Option<Mover>,
    /// Since when something is tried again and again.
    trying_since: Option<Instant>,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Seen>,
}

impl Worker {
    /// Takes the session in `directory` over, whose `journal` is ours; obeys `commands` and shows what it does.
    pub fn new(
        directory: PathBuf,
        journal: Journal,
        session: Session,
        sites: Sites,
        commands: mpsc::UnboundedReceiver<Command>,
        publish: watch::Sender<Seen>,
    ) -> Self {
        let check = if session.checked { Progress::Done(()) } else { Progress::Absent };
        Self {
            directory,
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
            commands,
            publish,
        }
    }

    /// Works until the session rests; returns whether its journal holds how.
    pub async fn work(mut self) -> bool {
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
            self.note_ways()?;
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
            self.reads = Some(Reads::keep(ReadObjects {
                machine: machine.clone(),
                socket: mounting::reads_socket(place),
                objects: self.objects(),
                owner,
                ports: request.mover.ports,
            }));
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

    /// Says which way the repository is read and the dump goes, whenever that changes.
    fn note_ways(&mut self) -> Result<(), journal::JournalError> {
        match self.reads.as_ref().and_then(Reads::way) {
            Some(way) if self.session.reads_way.as_ref() != Some(&way) => {
                self.note(Entry::ReadsWay(way))?;
            }
            _ => {}
        }
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
            let reads = self.reads.as_mut().map(|reads| &mut reads.kept);
            let mover = self.mover.as_mut().map(|mover| &mut mover.kept);
            let [reads, mover] = [reads, mover].map(|kept| async {
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
        self.observed.agent = self.named(agent.view.borrow().clone());
        self.observed.waiting = agent.trouble.borrow().clone();
        (self.link, self.agent) = (Some(link), Some(agent));
    }

    /// What the agent shows, with the machines named in what failed.
    fn named(&self, view: Option<AgentView>) -> Option<AgentView> {
        let [own, target] = [&self.sites.staging, &self.sites.target].map(Site::machine);
        view.map(|view| view.named(own.map(|own| own.name()), target.map(|target| target.name())))
    }

    fn look_at_agent(&mut self) {
        self.observed.may_begin_again = self.has_time();
        let Some(Watch { view, trouble }) = &mut self.agent else { return };
        let view = view.borrow_and_update().clone();
        let trouble = trouble.borrow_and_update().clone();
        self.observed.agent = self.named(view);
        let seen = self.observed.agent.as_ref();
        // Why the connection cannot be made tells more than that there is none.
        let reads = self.reads.as_ref().and_then(|reads| reads.kept.trouble());
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
