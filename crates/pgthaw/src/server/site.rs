//! One machine of a session: everything that is done there, on this machine by itself, on another through its line.
//!
//! The other machine's half of each call is in [`crate::attach`], which calls the same functions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgthaw_link::{Host, OpenLine, Purpose};
use pgthaw_session::observed::Failure;
use pgthaw_session::session::Place;
use pgthaw_session::{ExportRequest, Session};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::agent_link::AgentLink;
use super::mount_service;
use super::sessions::new_marker;
use crate::agent::undo;
use crate::agent::{self, place, sealing};
use crate::delivered::Delivered;
use crate::http::{self, Address, ClientError};
use crate::internal::{self, Child};
use crate::machine::{Machine, Machines};
use crate::ssh_agent::SshAgent;
use crate::wire::{
    ApiError, Assignment, BackupFacts, CheckPart, CheckReport, CheckTask, Finding, PlaceTask,
    TargetTask, TargetUndone,
};

/// Another machine's clock may be this far off without a word, seconds.
const CLOCK_LIMIT: i64 = 30;

/// A machine.
#[derive(Debug, Clone)]
pub enum Site {
    /// This one.
    Here,
    /// Another one.
    Far(Arc<Machine>),
}

impl Site {
    /// The machine called `host`, as a request or a journal names it; reached with the keys of `agent`, where there is one.
    ///
    /// # Errors
    /// When that is no host's name.
    pub fn named(
        host: Option<&str>,
        machines: &Machines,
        agent: Option<&Arc<SshAgent>>,
    ) -> Result<Self, ApiError> {
        let Some(host) = host else { return Ok(Self::Here) };
        let host: Host = host.parse().map_err(|err: pgthaw_link::BadHost| ApiError {
            message: err.to_string(),
            hint: None,
            usage: true,
        })?;
        Ok(Self::Far(machines.get(&host, agent)))
    }

    /// Checks what `task` says can be done there.
    ///
    /// # Errors
    /// When nothing can be checked.
    pub async fn check(&self, task: &CheckTask) -> Result<CheckReport, ApiError> {
        let begun = Timestamp::now();
        let mut report: CheckReport = match self {
            Self::Here => check_here(task).await?,
            Self::Far(machine) => call(machine, "check", task).await?,
        };
        if let Some(there) = report.clock.take()
            && let Some(warning) = clock_warning(begun, Timestamp::now(), there)
        {
            report.findings.push(warning);
        }
        Ok(report)
    }

    /// Chooses where a session works there; makes nothing.
    ///
    /// # Errors
    /// When there is no place for it.
    pub async fn choose_place(&self, task: PlaceTask) -> Result<Place, ApiError> {
        match self {
            Self::Here => Ok(place::choose_place(&task.session, &task.request, task.marker)?),
            Self::Far(machine) => call(machine, "place", &task).await,
        }
    }

    /// The directories that have to be made for `path` to exist there, the outermost first.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub async fn missing_directories(&self, path: &Path) -> Result<Vec<PathBuf>, ApiError> {
        match self {
            Self::Here => Ok(agent::check::missing_directories(path)),
            Self::Far(machine) => call(machine, "missing", &path).await,
        }
    }

    /// Starts a session's agent there, detached; its errors go to `log` if that is here.
    ///
    /// # Errors
    /// When it cannot be started or ends before it answers.
    pub async fn start_agent(
        &self,
        assignment: &Assignment,
        log: &Path,
    ) -> Result<AgentLink, Failure> {
        match self {
            Self::Here => AgentLink::start(assignment, log).await,
            Self::Far(machine) => {
                call::<()>(machine, AGENT, assignment).await?;
                Ok(self.agent(&assignment.place))
            }
        }
    }

    /// The line to the agent at `place` there, whether or not one listens.
    pub fn agent(&self, place: &Place) -> AgentLink {
        let socket = agent::socket_of(place);
        AgentLink::to(match self {
            Self::Here => Address::Socket(socket),
            Self::Far(machine) => Address::Far(machine.clone(), Some(socket)),
        })
    }

    /// Lists what a session left at `place` there: kind and name.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub async fn find_at(&self, place: &Place) -> Result<Vec<(String, String)>, ApiError> {
        match self {
            Self::Here => Ok(undo::find_at(place)),
            Self::Far(machine) => call(machine, "find", place).await,
        }
    }

    /// Lists what a session has in its target there: kind and name.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub async fn find_in_target(
        &self,
        task: &TargetTask,
    ) -> Result<Vec<(String, String)>, ApiError> {
        match self {
            Self::Here => Ok(undo::find_in_target(task)),
            Self::Far(machine) => call(machine, "find-in-target", task).await,
        }
    }

    /// Removes what a session left at `place` there; returns what could not be removed.
    pub async fn undo_at(&self, place: &Place) -> Vec<String> {
        let undone = match self {
            Self::Here => {
                let place = place.clone();
                tokio::task::spawn_blocking(move || undo::undo_at(&place))
                    .await
                    .map_err(ended_early)
            }
            Self::Far(machine) => call(machine, "undo", place).await,
        };
        undone.unwrap_or_else(|err| vec![err.message])
    }

    /// Removes what a session put into its target there.
    pub async fn undo_target(&self, task: &TargetTask) -> TargetUndone {
        let undone = match self {
            Self::Here => {
                let task = task.clone();
                tokio::task::spawn_blocking(move || undo::undo_target(&task))
                    .await
                    .map_err(ended_early)
            }
            Self::Far(machine) => call(machine, "undo-target", task).await,
        };
        undone.unwrap_or_else(|err| TargetUndone {
            failed: vec![err.message],
            ..TargetUndone::default()
        })
    }

    /// Bytes of the export in `directory` there, if it is complete and `session` made it.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub async fn sealed_before(
        &self,
        directory: &Path,
        session: &str,
    ) -> Result<Option<u64>, ApiError> {
        match self {
            Self::Here => Ok(sealing::sealed_before(directory, session)),
            Self::Far(machine) => call(machine, "sealed", &(directory, session)).await,
        }
    }

    /// Looks into the export of `databases` in `directory` there.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub async fn delivered(
        &self,
        directory: &Path,
        databases: Vec<String>,
    ) -> Result<Delivered, ApiError> {
        match self {
            Self::Here => Ok(Delivered::look(directory, &databases)),
            Self::Far(machine) => call(machine, "delivered", &(directory, databases)).await,
        }
    }

    /// Opens a connection there for raw bytes; on this machine to a `pgthaw attach` of its own.
    ///
    /// # Errors
    /// When there is no way to the machine.
    pub async fn open(&self, purpose: &Purpose) -> Result<OpenLine, ApiError> {
        match self {
            Self::Here => OpenLine::here(purpose)
                .await
                .map_err(|err| ApiError::broken(format!("start pgthaw attach: {err}"))),
            Self::Far(machine) => Ok(machine.open(purpose).await?),
        }
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        match self {
            Self::Here => "this machine".into(),
            Self::Far(machine) => machine.name().to_owned(),
        }
    }

    /// The machine, if it is another one.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        match self {
            Self::Here => None,
            Self::Far(machine) => Some(machine),
        }
    }

    /// Checks that the machine sees `backup` of the request's repository in `directory`.
    async fn recognize(
        &self,
        report: &mut CheckReport,
        request: &ExportRequest,
        directory: &Path,
        backup: &str,
    ) {
        let Some(machine) = self.machine() else { return };
        let seen = async {
            let identity =
                mount_service::identity(request.repository.clone(), backup.into()).await?;
            let files: Vec<&String> = identity.iter().map(|(file, _)| file).collect();
            let sums: Vec<_> = call(machine, "checksums", &(directory, files)).await?;
            Ok::<_, ApiError>((identity, sums))
        };
        let (host, path) = (machine.name(), directory.display());
        let remedy = Some(
            "name its path there with --read-from staging:DIR, or leave --read-from out: then the mount server reads for it"
                .to_owned(),
        );
        match seen.await {
            Ok((identity, sums)) => match unlike(&identity, &sums) {
                None => report
                    .passed
                    .push(format!("{host}: backup {backup} is read from `{path}` there")),
                Some(what) => report.error(
                    format!("{host}: `{path}` there is not the same repository: {what}"),
                    remedy,
                ),
            },
            Err(err) => report.error(err.message, remedy),
        }
    }

    /// Names the machine in what a check found there, if it is another one.
    fn named_in(&self, mut report: CheckReport) -> CheckReport {
        if let Some(machine) = self.machine() {
            let host = machine.name();
            let texts = report.passed.iter_mut();
            let texts = texts.chain(report.findings.iter_mut().map(|finding| &mut finding.message));
            texts.for_each(|text| *text = format!("{host}: {text}"));
        }
        report
    }
}

/// Returns what differs between a backup's identifying files and what another machine has seen of them.
fn unlike(identity: &[(String, [u8; 32])], seen: &[Option<[u8; 32]>]) -> Option<String> {
    if identity.is_empty() {
        return Some("nothing identifies the backup".into());
    }
    let mut pairs = identity.iter().zip(seen.iter().chain(std::iter::repeat(&None)));
    pairs.find_map(|((file, own), seen)| match seen {
        Some(seen) if seen == own => None,
        Some(_) => Some(format!("`{file}` is another")),
        None => Some(format!("`{file}` is missing")),
    })
}

/// The machines of one session.
#[derive(Debug, Clone)]
pub struct Sites {
    /// Where the backup is mounted, started and dumped.
    pub staging: Site,
    /// What gets the dump.
    pub target: Site,
}

impl Sites {
    /// Makes the lines to both machines, where they are others.
    ///
    /// # Errors
    /// When one of them cannot be reached.
    pub async fn reach(&self) -> Result<(), Failure> {
        for machine in [&self.staging, &self.target].into_iter().filter_map(Site::machine) {
            if let Err(err) = machine.line().await {
                let message = err.to_string();
                return Err(Failure {
                    hint: err.hint,
                    passes: err.passes,
                    ..Failure::new(message)
                });
            }
        }
        Ok(())
    }

    /// Whether the line to one of them has broken.
    pub async fn is_cut(&self) -> bool {
        for machine in [&self.staging, &self.target].into_iter().filter_map(Site::machine) {
            if machine.is_cut().await {
                return true;
            }
        }
        false
    }

    /// Checks both machines side by side; everything that is found is reported, with the machine where it is another one.
    ///
    /// # Errors
    /// When one of them cannot be checked.
    pub async fn check(
        &self,
        session: Option<String>,
        request: &ExportRequest,
        facts: &BackupFacts,
        delivered: Vec<String>,
    ) -> Result<CheckReport, ApiError> {
        let part = |part| CheckTask {
            part,
            session: session.clone(),
            request: request.clone(),
            facts: facts.clone(),
            delivered: delivered.clone(),
        };
        let mut report = match request.delivers_elsewhere() {
            false => {
                let report = self.staging.check(&part(CheckPart::Everything)).await?;
                self.staging.named_in(report)
            }
            true => self.check_both(part).await,
        };
        if let Some(directory) = &request.read_from_staging {
            self.staging.recognize(&mut report, request, directory, &facts.backup.id).await;
        }
        Ok(report)
    }

    /// Checks the staging server and the target, which are two machines.
    async fn check_both(&self, part: impl Fn(CheckPart) -> CheckTask) -> CheckReport {
        let (staging, target) = (part(CheckPart::Staging), part(CheckPart::Target));
        let (staging, target) =
            tokio::join!(self.staging.check(&staging), self.target.check(&target));
        let mut both = CheckReport::default();
        for (site, report) in [(&self.staging, staging), (&self.target, target)] {
            match report {
                Ok(report) => {
                    let report = site.named_in(report);
                    both.passed.extend(report.passed);
                    both.findings.extend(report.findings);
                }
                // One that cannot be reached does not hide what is wrong with the other.
                Err(err) => both.findings.push(Finding {
                    error: true,
                    usage: err.usage,
                    message: err.message,
                    remedy: err.hint,
                }),
            }
        }
        both
    }

    /// Lets a relative target on another machine begin at the home directory there, as scp does.
    ///
    /// # Errors
    /// When that machine cannot be reached.
    pub async fn make_absolute(&self, request: &mut ExportRequest) -> Result<(), ApiError> {
        if let Some(machine) = self.target.machine()
            && request.target.is_relative()
        {
            let home = machine.line().await?.welcome().home.clone();
            request.target = home.join(&request.target).components().collect();
        }
        Ok(())
    }

    /// Chooses where a session works; makes nothing.
    ///
    /// # Errors
    /// When there is no place for it, or a machine cannot be reached.
    pub async fn choose_place(&self, session: &Session) -> Result<Place, ApiError> {
        let (request, marker) = (session.request.clone(), new_marker());
        let elsewhere = request.delivers_elsewhere().then(|| request.target.clone());
        let task = PlaceTask { session: session.id.clone(), request, marker };
        let mut place = self.staging.choose_place(task).await?;
        if let Some(target) = elsewhere {
            place.target_directories = self.target.missing_directories(&target).await?;
        }
        Ok(place)
    }

    /// Lists what is left of a session: kind and name, with the machine where it is another one.
    ///
    /// # Errors
    /// When a machine cannot be reached.
    pub async fn find(&self, session: &Session) -> Result<Vec<(String, String)>, ApiError> {
        let on = |site: &Site, found: Vec<(String, String)>| -> Vec<(String, String)> {
            match site.machine() {
                None => found,
                Some(machine) => found
                    .into_iter()
                    .map(|(kind, name)| (kind, format!("{}:{name}", machine.name())))
                    .collect(),
            }
        };
        let mut found = Vec::new();
        if let Some(place) = &session.place {
            found.extend(on(&self.staging, self.staging.find_at(place).await?));
        }
        if session.target_touched {
            found.extend(on(
                &self.target,
                self.target.find_in_target(&target_task(session, true)).await?,
            ));
        }
        Ok(found)
    }

    /// Removes what a session made; with `everything` also what it put into the target.
    pub async fn undo(&self, session: &Session, everything: bool) -> TargetUndone {
        let failed = match &session.place {
            Some(place) => self.staging.undo_at(place).await,
            None => Vec::new(),
        };
        // Looked at only now: nobody is left who could complete it.
        let mut undone = self.target.undo_target(&target_task(session, everything)).await;
        undone.failed.splice(0..0, failed);
        undone
    }
}

/// Warns of a clock that said `there` when it was asked between `begun` and `ended`, and is far off. Nothing depends on it but the times
/// in logs, which are hard to compare then.
fn clock_warning(begun: Timestamp, ended: Timestamp, there: Timestamp) -> Option<Finding> {
    let off = if there < begun { begun.duration_since(there) } else { there.duration_since(ended) };
    let seconds = off.as_secs();
    (seconds >= CLOCK_LIMIT).then(|| Finding {
        error: false,
        usage: false,
        message: format!(
            "the clock is {seconds} s {}",
            if there < begun { "behind" } else { "ahead" }
        ),
        remedy: Some("let its time be synchronized, so that times in logs can be compared".into()),
    })
}

fn target_task(session: &Session, everything: bool) -> TargetTask {
    TargetTask {
        session: session.id.clone(),
        directory: session.request.target.clone(),
        replace: session.request.replace,
        made: session.target_directories.clone(),
        everything,
    }
}

fn ended_early(err: tokio::task::JoinError) -> ApiError {
    ApiError::broken(format!("removing ended early: {err}"))
}

/// Runs the check in a child, so that whatever it meets cannot hold the caller up.
pub async fn check_here(task: &CheckTask) -> Result<CheckReport, ApiError> {
    let report = internal::ask(Child::Check, None, task).await?;
    serde_json::from_slice(&report)
        .map_err(|err| ApiError::broken(format!("the check answered something else: {err}")))
}

/// Starting an agent: the one call that must not be made twice.
const AGENT: &str = "agent";
/// How long after its calls have failed a line is known to be broken, at the latest.
const PAUSE: Duration = Duration::from_millis(200);

/// Calls another machine's `pgthaw attach` itself. A line that turns out to be broken may have been so for long, and says nothing about
/// the machine as it is now: whatever may be asked twice is asked once more over a new one.
async fn call<T: DeserializeOwned>(
    machine: &Arc<Machine>,
    verb: &str,
    task: &(impl Serialize + Sync),
) -> Result<T, ApiError> {
    let address = Address::Far(machine.clone(), None);
    let path = format!("/v1/host/{verb}");
    let mut answer = http::request(&address, "POST", &path, Some(task)).await;
    if matches!(answer, Err(ClientError::Broken { .. })) && verb != AGENT {
        tokio::time::sleep(PAUSE).await;
        answer = http::request(&address, "POST", &path, Some(task)).await;
    }
    answer.map_err(|err| match err {
        ClientError::Api(error) => {
            ApiError { message: format!("{}: {}", machine.name(), error.message), ..error }
        }
        ClientError::NoLine(error) => error.into(),
        err @ (ClientError::NotListening(_) | ClientError::Broken { .. }) => {
            ApiError::broken(err.to_string())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_far_off_is_told() {
        let at = |second: i64| Timestamp::from_second(1_000_000 + second).unwrap();
        let warning = |there| clock_warning(at(0), at(5), at(there)).map(|found| found.message);
        for fine in [-29, 0, 3, 5, 34] {
            assert_eq!(warning(fine), None, "{fine}");
        }
        assert_eq!(warning(-30).as_deref(), Some("the clock is 30 s behind"));
        assert_eq!(warning(65).as_deref(), Some("the clock is 60 s ahead"));
    }

    #[test]
    fn a_repository_is_recognized_by_its_files() {
        let own = vec![("a".to_owned(), [1; 32]), ("b".to_owned(), [2; 32])];
        let cases = [
            ("the same", vec![Some([1; 32]), Some([2; 32])], None),
            ("one differs", vec![Some([1; 32]), Some([3; 32])], Some("`b` is another")),
            ("one is missing", vec![None, Some([2; 32])], Some("`a` is missing")),
            ("too few answers", vec![Some([1; 32])], Some("`b` is missing")),
        ];
        for (name, seen, want) in cases {
            assert_eq!(unlike(&own, &seen).as_deref(), want, "{name}");
        }
        assert!(unlike(&[], &[]).is_some(), "nothing proves nothing");
    }
}
