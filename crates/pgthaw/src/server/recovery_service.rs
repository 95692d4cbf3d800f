//! The recovery service: owns the sessions, from request to clean end.
//!
//! Begins them, finds them again, and hands each that is active to a task of its own ([`super::session_worker`]), which does the same dull
//! loop: observe, journal the facts, decide, act.

use std::collections::BTreeMap;
use std::io::{self};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use jiff::Timestamp;
use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::journal::{self};
use pgthaw_session::request::Requester;
use pgthaw_session::session::{Entry, Record, ResolvedBackup};
use pgthaw_session::{ExportRequest, Session, SessionState, Status};
use tokio::sync::{mpsc, watch};

use super::audit::Audit;
use super::log_lines::log_line;
use super::refusals::{refusal, refuse_unknown, warnings};
use super::session_worker::{Command, Worker};
use super::sessions::SessionsDirectory;
use super::site::{Site, Sites};
use super::{bundle, mount_service, mover, reads};
use crate::delivered::Delivered;
use crate::machine::Machines;
use crate::recovery_line::recovery_line;
use crate::wire::{
    ApiError, BackupFacts, CheckAnswer, CheckReport, CleanAnswer, CleanedObject, LogLine,
};

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
        Ok(self.request(id)?.requester)
    }

    /// Returns what a session was asked for.
    ///
    /// # Errors
    /// When there is no such session.
    pub fn request(&self, id: &str) -> Result<ExportRequest, ApiError> {
        Ok(self.stored(id)?.0.request)
    }

    /// Takes up every session that was at work when its server ended.
    pub fn take_up_sessions(self: Arc<Self>) {
        for id in self.sessions.ids().unwrap_or_default() {
            let active = self.stored(&id).is_ok_and(|(session, _)| session.state.is_active());
            if active && let Err(err) = self.clone().resume(&id, []) {
                eprintln!("session {id}: {}", crate::escapes::one_line(&err.message));
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
            if request.repository_beside_instance().is_none() {
                reads::try_out(&sites.staging, request.mover.ports, &mut report).await;
            }
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
        tells_all: bool,
        is_asked_for: impl Fn(&ExportRequest) -> bool,
    ) -> CleanAnswer {
        let mut answer = CleanAnswer::default();
        for id in self.sessions.ids().unwrap_or_default() {
            let session = match self.stored(&id) {
                Ok((session, _)) => session,
                Err(_) if !tells_all => continue, // whose it is cannot be told
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
            // A session may have left nothing and still wait for a retry.
            let (session, kind) = (id.clone(), "session".to_owned());
            answer.removed.push(CleanedObject { session, kind, name: id.clone() });
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
        let sites = self.sites(&session.request)?;
        let (commands, receiver) = mpsc::unbounded_channel();
        let (publish, seen) =
            watch::channel(Seen { status: session.status(None, None), log: Arc::new(log) });
        active.insert(id.to_owned(), Handle { commands, seen });
        drop(active);
        let directory = self.sessions.of(id);
        let worker = Worker::new(directory, journal, session, sites, receiver, publish);
        let id = id.to_owned();
        tokio::spawn(async move {
            if worker.work().await {
                self.lock().remove(&id); // from now on its journal tells
            }
            if let (Some(audit), Ok((session, _))) = (&self.audit, self.stored(&id))
                && let Some(requester) = &session.request.requester
            {
                audit.session(requester, "end", &session.status(None, None), None);
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
            if status.state.is_final() {
                return None;
            }
            let other = self.request(&status.id).ok()?; // none of a session whose journal cannot be read
            let (own, taken) = (&request.target, &other.target);
            let nested = own.starts_with(taken) || taken.starts_with(own);
            (nested && other.delivers_to_machine_of(request)).then_some(other)
        };
        let found = self.list().into_iter().find_map(|status| Some((nested(&status)?, status)));
        let Some((other, status)) = found else { return Ok(()) };
        if other.requester != request.requester && request.requester.is_some() {
            return Err(ApiError {
                message: format!(
                    "target `{}` is in use by another session",
                    request.target.display()
                ),
                hint: Some("name another directory with --to".into()),
                usage: true,
            });
        }
        Err(ApiError {
            message: format!("target `{}` belongs to session {}", status.target, status.id),
            hint: Some(format!(
                "`pgthaw retry {0}` or `pgthaw cancel {0}` first, or name another directory",
                status.id
            )),
            usage: true,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Handle>> {
        self.active.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
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

/// What is said of a session that is not there.
pub fn no_such(id: &str) -> ApiError {
    ApiError {
        message: format!("there is no session `{id}`"),
        hint: Some("`pgthaw sessions` lists them".into()),
        usage: true,
    }
}

/// Anything that failed, with its causes.
pub fn failed(err: &dyn std::error::Error) -> ApiError {
    ApiError { message: crate::internal::source::with_causes(err), hint: None, usage: false }
}
