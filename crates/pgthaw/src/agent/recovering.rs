//! The verb `instance`: PostgreSQL on the mount, recovered, with everything found out that the dump needs.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use pgthaw_postgres::binaries::{self, Binaries};
use pgthaw_postgres::connection::Endpoint;
use pgthaw_postgres::globals::{self, GlobalsPlan};
use pgthaw_postgres::inspect;
use pgthaw_postgres::instance::{
    Instance, InstancePlan, Preload, Progress as StartProgress, Recovery, StopMode,
    locks_per_transaction,
};
use pgthaw_postgres::lsn::{Lsn, SegmentSize};
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::superuser::{Candidates, ensure_superuser};
use pgthaw_postgres::version::Major;
use pgthaw_session::RecoveryChoice;
use pgthaw_session::observed::{Failure, InstanceReady, RecoveryEnd, SelectedDatabase};
use tokio::task::JoinHandle;

use super::{Agent, begin_once, tablespaces};
use crate::internal::source::with_causes;
use crate::internal::wal::WalTablespace;

/// Connections beside pg_dump's workers and its leader: ours, and some in reserve.
const OWN_CONNECTIONS: u32 = 6;

/// The most that the server may write into its log while it is dumped, in bytes: the log lies on a disk of this machine.
const LOG_LIMIT: u64 = 256 << 20;
/// What stays of such a log, in bytes: enough to see what filled it.
const LOG_KEPT: u64 = 1 << 20;
/// How often that is looked at.
const LOG_LOOK: Duration = Duration::from_secs(1);

/// An instance that is ready.
pub struct Running {
    /// Its programs.
    pub binaries: Binaries,
    /// Where it answers, as the superuser.
    pub endpoint: Endpoint,
    /// The selected databases that can be dumped, by name.
    pub databases: BTreeMap<String, inspect::Database>,
    /// A role that was made for this session and that `globals.sql` leaves out.
    temporary_role: Option<String>,
    /// Tablespaces that replay has made.
    tablespaces: Vec<WalTablespace>,
    watcher: JoinHandle<()>,
}

impl Running {
    /// Waits until the instance has ended; call it once the agent is [`Agent::gone`].
    pub async fn ended(self) {
        let _ = self.watcher.await; // a watcher that panicked has dropped the instance, which ends it
    }

    /// Returns the text of `globals.sql`.
    ///
    /// # Errors
    /// When pg_dumpall fails, or the text would hold something of ours.
    pub async fn globals(&self, agent: &Agent) -> Result<String, Failure> {
        let place = &agent.assignment.place;
        let restrict_key: String =
            place.marker.chars().filter(char::is_ascii_alphanumeric).collect();
        let os_user = os_user_of(agent);
        let plan = GlobalsPlan {
            binaries: &self.binaries,
            endpoint: &self.endpoint,
            database: "template1",
            os_user: os_user.as_ref(),
            no_role_passwords: !agent.assignment.request.role_passwords,
            restrict_key: &restrict_key[..restrict_key.len().min(16)],
            marker: &place.marker,
            confinement: &agent.confinement,
        };
        let text = globals::dump(&plan).await.map_err(failed)?;
        let client = self.endpoint.connect("template1").await.map_err(failed)?;
        let names = inspect::tablespaces(&client).await.map_err(failed)?;
        let backup = &agent.assignment.facts.tablespaces;
        let locations = tablespaces::original_locations(names, backup, &self.tablespaces);
        globals::rewrite(&text, &locations, &place.mountpoint, self.temporary_role.as_deref())
            .map_err(failed)
    }
}

/// Who runs PostgreSQL, where that is not ourselves.
pub fn os_user_of(agent: &Agent) -> Option<OsUser> {
    rustix::process::geteuid().is_root().then(|| agent.os_user.clone())
}

/// Begins to start the instance.
pub fn begin(agent: Arc<Agent>) -> Json<()> {
    let work = agent.clone();
    begin_once(&agent, |view| &mut view.instance, async move { recover(work).await })
}

async fn recover(agent: Arc<Agent>) -> Result<InstanceReady, Failure> {
    let (plan, tablespaces) = tablespaces::prepare(&agent, plan(&agent)?).await?;
    let binaries = plan.binaries.clone();
    let facts = &agent.assignment.facts;
    let mut instance = Instance::start(plan)
        .map_err(|err| Failure { hint: err.hint(), ..Failure::new(with_causes(&err)) })?;
    let postmaster = crate::processes::Process::with_pid(instance.id().pid);
    if let Some(postmaster) = postmaster
        && let Err(err) =
            crate::leftovers::record_creator(&agent.assignment.place.work_directory, &postmaster)
    {
        agent.tell(format!("warning: could not note the server process: {err}"));
    }
    let guessed = facts.superuser.clone().unwrap_or_else(|| "postgres".into());
    let mut gone = agent.gone.subscribe();
    let shown = agent.clone();
    let ready = tokio::select! {
        ready = instance.wait_ready(&guessed, move |progress| show(&shown, progress)) => Some(ready),
        () = async { drop(gone.wait_for(|gone| *gone).await) } => None,
    };
    match ready {
        Some(Ok(())) => {}
        Some(Err(err)) => return Err(start_failure(&agent, err)),
        None => {
            let _ = instance.stop(StopMode::Immediate).await; // dropping it would, too
            return Err(Failure::new("stopped"));
        }
    }
    agent.show(|view| view.recovering = None);
    let end = recovery_end(&agent, &instance)?;
    let latest = agent.assignment.request.recovery == RecoveryChoice::Latest;
    if facts.start.crash_recovery || (latest && end.replayed) {
        refuse_later_wal(&agent, &end).await?;
    }
    let request = &agent.assignment.request;
    let names: Vec<String> =
        facts.databases.iter().filter(|d| d.allows_connections).map(|d| d.name.clone()).collect();
    let candidates = Candidates {
        named: request.superuser.as_deref(),
        guessed: facts.superuser.as_deref(),
        databases: &names,
    };
    let superuser = ensure_superuser(&mut instance, &candidates)
        .await
        .map_err(|err| Failure { hint: err.hint(), ..Failure::new(with_causes(&err)) })?;
    let endpoint = instance.endpoint(&superuser.name);
    let isolation = instance.isolation().describe();
    agent.tell(format!("PostgreSQL is {isolation}"));
    let inspected = inspect_all(&agent, &endpoint).await?;
    let server_version = binaries.version.clone();
    let watcher = tokio::spawn(watch(agent.clone(), instance));
    *agent.running.lock().await = Some(Running {
        binaries,
        endpoint,
        databases: inspected.usable,
        temporary_role: superuser.temporary.then_some(superuser.name),
        tablespaces,
        watcher,
    });
    Ok(InstanceReady {
        recovery_end: end,
        server_version,
        isolation,
        databases: inspected.databases,
        rolled_back: inspected.rolled_back,
        warnings: inspected.warnings,
    })
}

/// Owns the instance while it is used: tells when it ends by itself, ends it with the session.
async fn watch(agent: Arc<Agent>, mut instance: Instance) {
    let mut gone = agent.gone.subscribe();
    let ended = loop {
        tokio::select! {
            ended = instance.wait_end() => break Some(ended),
            () = async { drop(gone.wait_for(|gone| *gone).await) } => break None,
            () = tokio::time::sleep(LOG_LOOK) => {}
        }
        if instance.log_bytes().is_ok_and(|bytes| bytes > LOG_LIMIT) {
            let text = format!(
                "PostgreSQL wrote more than {} MiB of messages; code in the backup may have done so",
                LOG_LIMIT >> 20
            );
            agent.broken(
                Failure::new(text)
                    .hint("see the functions and triggers that pg_dump runs in this database"),
            );
            break None;
        }
    };
    match ended {
        Some(ended) => {
            // Killed by somebody else, most likely for its memory; a crash of its own would come again.
            let killed = |status: &std::process::ExitStatus| status.signal() == Some(libc::SIGKILL);
            let passes = ended.as_ref().is_ok_and(killed);
            let how = ended.map_or_else(|err| with_causes(&err), |status| status.to_string());
            let said = instance.failure();
            let message = format!("PostgreSQL ended ({how}): {said}");
            agent.broken(Failure { hint: said.hint, passes, ..Failure::new(message) });
        }
        None => {
            if let Err(err) = instance.stop(StopMode::Immediate).await {
                eprintln!("{}", with_causes(&err));
            }
            if instance.log_bytes().is_ok_and(|bytes| bytes > LOG_LIMIT)
                && let Err(err) = instance.cut_log(LOG_KEPT)
            {
                eprintln!("cut the server's log: {err}");
            }
        }
    }
}

/// Everything that decides how the instance is started.
fn plan(agent: &Agent) -> Result<InstancePlan, Failure> {
    let assignment = &agent.assignment;
    let (request, facts) = (&assignment.request, &assignment.facts);
    let major: Major = facts.start.major.try_into().map_err(failed)?;
    let binaries = binaries::find(major, request.pg_bin.as_deref(), &agent.os_user)
        .map_err(|err| Failure { hint: Some(err.hint()), ..Failure::new(with_causes(&err)) })?;
    let timeline = facts.start.timeline;
    let recovery = match (&assignment.recovery_end, request.recovery) {
        _ if !facts.start.archive_recovery => Recovery::None,
        (Some(end), _) if end.replayed => {
            let lsn: Lsn = end.lsn.parse().map_err(failed)?;
            Recovery::Lsn { lsn, timeline: end.timeline }
        }
        (_, RecoveryChoice::EndOfBackup) => Recovery::EndOfBackup { timeline },
        (_, RecoveryChoice::Latest) => Recovery::EndOfWal { timeline },
    };
    let connections = request.jobs + 1 + OWN_CONNECTIONS;
    let relations = facts.databases.iter().map(|database| database.relations).max().unwrap_or(0);
    let segment_size = u32::try_from(facts.start.segment_size).map_err(failed)?;
    Ok(InstancePlan {
        binaries,
        data_directory: assignment.place.mountpoint.join("data"),
        cluster_directories: vec![assignment.place.mountpoint.clone()],
        locations: Vec::new(),
        instance_directory: agent.instance_directory(),
        os_user: os_user_of(agent),
        recovery,
        max_prepared_transactions: facts.start.max_prepared_transactions,
        max_locks_per_transaction: locks_per_transaction(relations * 2, connections),
        connections,
        wal_segment_size: SegmentSize::try_from(segment_size).map_err(failed)?,
        preload: request.preload.iter().map(|library| Preload::named(library)).collect(),
        locale_path: super::locales::build_missing(agent)?,
        marker: assignment.place.marker.clone(),
        confinement: agent.confinement.clone(),
    })
}

fn show(agent: &Agent, progress: &StartProgress) {
    let text = match progress {
        StartProgress::Starting | StartProgress::Ready => None,
        StartProgress::Recovering { segment: Some(segment), .. } => {
            Some(format!("replaying {segment}"))
        }
        StartProgress::Recovering { segment: None, .. } => Some("replaying WAL".to_owned()),
    };
    if agent.view.borrow().recovering != text {
        agent.show(|view| view.recovering = text);
    }
}

/// A failed start is often the consequence of what the mount could not do: that is then the reason.
fn start_failure(agent: &Agent, err: pgthaw_postgres::instance::InstanceError) -> Failure {
    let broken = agent.view.borrow().broken.clone();
    broken.unwrap_or_else(|| Failure { hint: err.hint(), ..Failure::new(with_causes(&err)) })
}

/// Where recovery ended, refused unless it is where it had to end.
fn recovery_end(agent: &Agent, instance: &Instance) -> Result<RecoveryEnd, Failure> {
    let facts = &agent.assignment.facts;
    let found = instance
        .recovery_end()
        .map_err(|err| Failure { hint: err.hint(), ..Failure::new(with_causes(&err)) })?;
    let end = RecoveryEnd {
        lsn: found.redo_done.map_or_else(|| facts.start.checkpoint.clone(), |lsn| lsn.to_string()),
        timeline: facts.start.timeline,
        last_transaction: found.last_commit_time.clone(),
        replayed: found.redo_done.is_some(),
    };
    if let Some(before) =
        agent.assignment.recovery_end.as_ref().filter(|before| before.lsn != end.lsn)
    {
        return Err(Failure::new(format!(
            "recovery ended at {}, the first attempt's at {}",
            end.lsn, before.lsn
        ))
        .hint("the repository has changed in between: cancel this session and export again"));
    }
    let latest = agent.assignment.request.recovery == RecoveryChoice::Latest;
    if let (true, Some(last), Some(done)) = (latest, &facts.start.last_segment, found.redo_done) {
        refuse_early_end(last, done, &facts.start)?;
    }
    Ok(end)
}

/// Unreadable WAL looks like the end of WAL to PostgreSQL: recovery to the newest point must reach the last segment there is.
fn refuse_early_end(last: &str, done: Lsn, start: &crate::wire::StartFacts) -> Result<(), Failure> {
    let segment =
        u32::try_from(start.segment_size).ok().and_then(|bytes| SegmentSize::try_from(bytes).ok());
    let segment = segment.ok_or_else(|| Failure::new("the WAL segment size is unknown"))?;
    let reached = pgthaw_postgres::lsn::segment_name(start.timeline, done, segment);
    // A record may begin in the segment before and fill the last one.
    if reached.get(8..) == last.get(8..) || done.0 + segment.bytes() >= segment_start(last, segment)
    {
        return Ok(());
    }
    Err(Failure::new(format!("recovery ended in WAL segment {reached}, but {last} is archived: the WAL between is damaged"))
        .hint("recover to the end of the backup, or have the archive checked"))
}

/// PostgreSQL takes unreadable WAL for the end of WAL: no later page of it may lie in `pg_wal`.
async fn refuse_later_wal(agent: &Agent, end: &RecoveryEnd) -> Result<(), Failure> {
    let (mount, after) = (agent.mount()?, end.lsn.clone());
    let later = tokio::task::spawn_blocking(move || mount.later_wal(&after)).await;
    let Some(page) = later.map_err(|err| Failure::new(format!("looking for WAL: {err}")))?? else {
        return Ok(());
    };
    let facts = &agent.assignment.facts.start;
    let hint = match facts.crash_recovery {
        true => {
            "the snapshot was not taken at one instant, or its WAL is damaged: use another backup"
        }
        false => "recover to the end of the backup, or have the archive checked",
    };
    let done = &end.lsn;
    let segment = segment_of(done, facts).unwrap_or_else(|| done.clone());
    let message = format!(
        "recovery ended at {done}, but the WAL goes on at {page}: the WAL between is damaged (segment {segment} or the next)"
    );
    Err(Failure::new(message).hint(hint))
}

/// The name of the WAL segment that holds `lsn`.
fn segment_of(lsn: &str, start: &crate::wire::StartFacts) -> Option<String> {
    let size = SegmentSize::try_from(u32::try_from(start.segment_size).ok()?).ok()?;
    Some(pgthaw_postgres::lsn::segment_name(start.timeline, lsn.parse().ok()?, size))
}

/// The LSN at which the segment called `name` begins; 0 for a name that is none.
fn segment_start(name: &str, segment: SegmentSize) -> u64 {
    let part = |range| name.get(range).and_then(|hex| u64::from_str_radix(hex, 16).ok());
    match (part(8..16), part(16..24)) {
        (Some(log), Some(number)) => (log << 32) + number * segment.bytes(),
        _ => 0,
    }
}

struct Inspected {
    databases: Vec<SelectedDatabase>,
    usable: BTreeMap<String, inspect::Database>,
    rolled_back: Vec<String>,
    warnings: Vec<String>,
}

/// Finds out what the dump needs of every selected database, and rolls back what would block it for ever.
async fn inspect_all(agent: &Agent, endpoint: &Endpoint) -> Result<Inspected, Failure> {
    let request = &agent.assignment.request;
    let client = endpoint.connect("template1").await.map_err(failed)?;
    let there = inspect::databases(&client).await.map_err(failed)?;
    let names: Vec<String> = match request.all {
        false => request.databases.clone(),
        true => {
            let usable = there
                .iter()
                .filter(|d| d.allows_connections && !d.is_template && d.connection_limit != -2);
            usable.map(|d| d.name.clone()).filter(|name| request.all_includes(name)).collect()
        }
    };
    let prepared = inspect::prepared_transactions(&client).await.map_err(failed)?;
    let blocking: Vec<_> =
        prepared.into_iter().filter(|prepared| names.contains(&prepared.database)).collect();
    inspect::roll_back_prepared(endpoint, &blocking).await.map_err(failed)?;
    let rolled_back: Vec<String> = blocking
        .iter()
        .map(|prepared| format!("{} in {}", prepared.gid, prepared.database))
        .collect();
    for transaction in &rolled_back {
        agent.tell(format!(
            "rolled back the prepared transaction {transaction}, which would block the dump"
        ));
    }
    let mut inspected = Inspected {
        databases: Vec::new(),
        usable: BTreeMap::new(),
        rolled_back,
        warnings: Vec::new(),
    };
    for name in names {
        let database = match there.iter().find(|database| database.name == name) {
            Some(database) if database.connection_limit == -2 => {
                unusable(&name, "was being dropped when the server stopped: it is invalid")
            }
            Some(database) if !database.allows_connections => {
                unusable(&name, "does not accept connections")
            }
            None => unusable(&name, "does not exist at the point that was recovered to"),
            Some(database) => {
                inspected.usable.insert(name.clone(), database.clone());
                inspect_one(agent, endpoint, database, &mut inspected.warnings).await?
            }
        };
        inspected.databases.push(database);
    }
    for warning in &inspected.warnings {
        agent.tell(format!("warning: {warning}"));
    }
    Ok(inspected)
}

async fn inspect_one(
    agent: &Agent,
    endpoint: &Endpoint,
    database: &inspect::Database,
    warnings: &mut Vec<String>,
) -> Result<SelectedDatabase, Failure> {
    let name = &database.name;
    let client = endpoint.connect(name).await.map_err(failed)?;
    let relations = inspect::relations(&client).await.map_err(failed)?;
    let unlogged_tables = inspect::unlogged_tables(&client).await.map_err(failed)?;
    if !unlogged_tables.is_empty() {
        let tables = unlogged_tables.join(", ");
        agent.tell(format!("unlogged tables of {name} are empty after recovery: {tables}"));
    }
    for library in inspect::missing_libraries(endpoint, name).await.map_err(failed)? {
        let packages =
            library.packages.map(|packages| format!("; packages: {packages}")).unwrap_or_default();
        warnings.push(format!(
            "{} functions of {name} need the library {}, which is not installed here{packages}",
            library.functions, library.library
        ));
    }
    Ok(SelectedDatabase {
        name: name.clone(),
        bytes: inspect::database_size(&client, database.oid).await.map_err(failed)?,
        tables: relations.tables + relations.materialized_views,
        unlogged_tables,
        error: None,
    })
}

fn unusable(name: &str, why: &str) -> SelectedDatabase {
    let error = Some(Failure::new(format!("database `{name}` {why}")));
    SelectedDatabase { name: name.into(), bytes: 0, tables: 0, unlogged_tables: Vec::new(), error }
}

fn failed(err: impl std::error::Error) -> Failure {
    Failure::new(with_causes(&err))
}
