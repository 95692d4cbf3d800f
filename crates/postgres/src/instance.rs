//! A running PostgreSQL server on a mounted cluster: its files, its start, its end.
//!
//! Owns the server process and what it may leave behind; `launch.rs` prepares it. The cluster's own
//! directory lies on a mount: no code here looks into it, only the server does.
//! [`Instance::start`], [`Instance::wait_ready`], [`Instance::stop`].

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::connection::{Endpoint, SqlError};
use crate::isolation::Isolation;
use crate::launch::{
    close_socket_directory, log_path, open_log, read_log, start_server, write_configuration,
};
use crate::log::{Failure, LogError, RecoveryEnd, explain_failure, recovery_end};
use crate::process::{self, Child, KILL_LIMIT, ProcessId};
use crate::root::Streams;
pub use crate::settings::{
    InstancePlan, PORT, Preload, Recovery, locks_per_transaction, process_title, settings,
};
use crate::shared_memory;

/// How long a fast shutdown may take: it writes a checkpoint into the write layer.
const FAST_LIMIT: Duration = Duration::from_secs(60);
/// How long an immediate shutdown may take; the server itself kills its children after 5 s.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(10);
/// How often a start is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Why an instance does not run.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The plan cannot be carried out.
    #[error("this instance cannot be started: {0}")]
    Plan(String),
    /// A file of the instance's directory.
    #[error("write `{path}`")]
    File {
        /// The file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The server could not be run at all.
    #[error("start `{program}`")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The server ended.
    #[error("PostgreSQL ended ({status}): {failure}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        failure: Box<Failure>,
    },
    /// The kernel does not tell about the process.
    #[error("wait for the server process {pid}")]
    Wait {
        /// Its number.
        pid: u32,
        /// What failed.
        source: io::Error,
    },
    /// Not even SIGKILL ended it.
    #[error(
        "the server process {pid} does not end; it waits inside the kernel, perhaps for its mount"
    )]
    DoesNotEnd {
        /// Its number.
        pid: u32,
    },
    /// The log does not tell where recovery ended.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The role of `--superuser`.
    #[error("--superuser \"{name}\" cannot be used: {reason}{}", superusers(known))]
    NotSuperuser {
        /// The role.
        name: String,
        /// Why not.
        reason: String,
        /// Superusers that may log in, where they could be asked for.
        known: Vec<String>,
    },
    /// A query at the start.
    #[error(transparent)]
    Sql(#[from] SqlError),
}

fn superusers(known: &[String]) -> String {
    let known: Vec<String> = known.iter().map(|name| format!("\"{name}\"")).collect();
    if known.is_empty() {
        String::new()
    } else {
        format!("; superusers that may log in: {}", known.join(", "))
    }
}

impl InstanceError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Ended { failure, .. } => failure.hint.clone(),
            Self::Spawn { .. } => {
                Some("see whether --os-user may run the programs of --pg-bin".into())
            }
            Self::File { .. } => Some("see whether --work-dir is writable and has room".into()),
            Self::DoesNotEnd { .. } => Some("end the mount first; the process ends then".into()),
            Self::NotSuperuser { known, .. } if known.is_empty() => Some(
                "leave --superuser out: a superuser is made in the write layer if need be".into(),
            ),
            Self::NotSuperuser { .. } => Some("name one of those, or leave --superuser out".into()),
            Self::Log(error) => Some(error.hint().into()),
            Self::Plan(_) | Self::Wait { .. } | Self::Sql(_) => None,
        }
    }
}

/// How far a start has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The server has begun; replay has not.
    Starting,
    /// WAL is replayed.
    Recovering {
        /// The segment that is replayed, from the startup process' title; none before the first.
        segment: Option<String>,
        /// When replay last showed a sign of life: another segment, or bytes read or written.
        since: Instant,
    },
    /// It answers and is not in recovery.
    Ready,
}

/// How to end an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends connections, writes a checkpoint: the cluster can be started again without recovery.
    Fast,
    /// Ends at once, as a crash would.
    Immediate,
}

/// A server process and what belongs to it. Dropping it ends the server at once.
#[derive(Debug)]
pub struct Instance {
    plan: InstancePlan,
    child: Child,
    isolation: Isolation,
    log: File,
    log_start: u64,
    replay: Option<Replay>,
    ended: Option<ExitStatus>,
}

/// What was last seen of the startup process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Replay {
    segment: Option<String>,
    transferred: Option<u64>,
    since: Instant,
}

impl Instance {
    /// Writes the configuration and starts the server, in a root of its own unless the plan says otherwise; does not wait
    /// until it answers.
    ///
    /// The server ends with our process, however that ends (see [`process::spawn`]).
    ///
    /// # Errors
    /// [`InstanceError`] if the plan is impossible, a file cannot be written or the server not be run.
    pub fn start(plan: InstancePlan) -> Result<Self, InstanceError> {
        let isolation = Isolation::of(&plan.confinement);
        Self::start_isolated(plan, isolation)
    }

    /// Starts the server; where it has no root of its own, cut off just so.
    ///
    /// # Errors
    /// As [`Instance::start`].
    pub fn start_isolated(plan: InstancePlan, isolation: Isolation) -> Result<Self, InstanceError> {
        if let Some(objection) = crate::settings::objection(&plan) {
            return Err(InstanceError::Plan(objection));
        }
        write_configuration(&plan)?;
        let log_path = log_path(&plan);
        let in_log = |source| InstanceError::File { path: log_path.clone(), source };
        let log = open_log(&plan).map_err(in_log)?;
        let log_start = log.metadata().map_err(in_log)?.len();
        let stream = || log.try_clone().map(Stdio::from).map_err(in_log);
        let streams = Streams { stdin: Stdio::null(), stdout: stream()?, stderr: stream()? };
        let started = start_server(&plan, &isolation, (&[], &[]), streams, Signal::QUIT);
        let child = started.map_err(|source| InstanceError::Spawn {
            program: plan.binaries.postgres.clone(),
            source,
        })?;
        tracing::info!(
            "started PostgreSQL {}, process {}, {}",
            plan.binaries.version,
            child.id().pid,
            isolation.describe()
        );
        Ok(Self { plan, child, isolation, log, log_start, replay: None, ended: None })
    }

    /// Returns the plan it was started by.
    pub fn plan(&self) -> &InstancePlan {
        &self.plan
    }

    /// Returns the server process.
    pub fn id(&self) -> ProcessId {
        self.child.id()
    }

    /// Returns how far it is cut off.
    pub fn isolation(&self) -> &Isolation {
        &self.isolation
    }

    /// Returns where it answers, for connections as `user`.
    pub fn endpoint(&self, user: &str) -> Endpoint {
        Endpoint {
            socket_directory: self.plan.socket_directory(),
            port: PORT,
            user: user.into(),
            major: self.plan.binaries.major,
            server: Some((self.id(), self.owner())),
        }
    }

    /// Returns the number of the account that runs the server.
    fn owner(&self) -> u32 {
        let user = self.plan.os_user.as_ref().map(|user| user.uid);
        user.unwrap_or_else(|| rustix::process::geteuid().as_raw())
    }

    /// Returns whether the server process still runs.
    ///
    /// # Errors
    /// [`InstanceError::Wait`] if the kernel does not tell.
    pub fn is_running(&mut self) -> Result<bool, InstanceError> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(|source| self.waiting(source))?;
        }
        Ok(self.ended.is_none())
    }

    /// Returns what the server has logged since this start.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log(&self) -> io::Result<String> {
        read_log(&self.log, self.log_start)
    }

    /// Returns how many bytes the server has logged since this start, or takes of the disk for it. Code in a backup can make them
    /// as many as it likes.
    ///
    /// # Errors
    /// If the log cannot be looked at.
    pub fn log_bytes(&self) -> io::Result<u64> {
        let meta = self.log.metadata()?;
        let taken = std::os::unix::fs::MetadataExt::blocks(&meta).saturating_mul(512); // stat(2): always of 512 bytes
        Ok(meta.len().max(taken).saturating_sub(self.log_start))
    }

    /// Gives the disk back what this start has logged beyond the first `bytes`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn cut_log(&self, bytes: u64) -> io::Result<()> {
        let length = self.log.metadata()?.len();
        self.log.set_len(length.min(self.log_start.saturating_add(bytes)))
    }

    /// Returns where the recovery of this start ended; ask after [`Instance::wait_ready`].
    ///
    /// # Errors
    /// [`InstanceError`] if the log cannot be read or does not tell, or tells of another end than the planned
    /// one ([`RecoveryEnd::check`]).
    pub fn recovery_end(&self) -> Result<RecoveryEnd, InstanceError> {
        let path = log_path(&self.plan);
        let log = self.log().map_err(|source| InstanceError::File { path, source })?;
        let end = recovery_end(&log)?;
        end.check(&self.plan.recovery)?;
        Ok(end)
    }

    /// Returns why the server ended, from its log.
    pub fn failure(&self) -> Failure {
        explain_failure(&self.log().unwrap_or_default())
    }

    /// Looks how far the start has come. `user` is a role to ask as; it need not exist.
    ///
    /// # Errors
    /// [`InstanceError::Ended`] with the server's own lines if it has ended.
    pub async fn progress(&mut self, user: &str) -> Result<Progress, InstanceError> {
        if !self.is_running()? {
            return Err(self.ended_error());
        }
        if let Some(startup) = startup_process(self.id().pid).await {
            return Ok(self.replaying(startup));
        }
        // no startup process: not begun yet, or recovery is over
        match self.answers(user).await {
            true => Ok(Progress::Ready),
            false => Ok(Progress::Starting),
        }
    }

    /// Compares the startup process with what was last seen of it.
    fn replaying(&mut self, startup: Startup) -> Progress {
        let unchanged = self.replay.as_ref().filter(|last| {
            last.segment == startup.segment && last.transferred == startup.transferred
        });
        let since = unchanged.map_or_else(Instant::now, |last| last.since);
        let Startup { segment, transferred, began } = startup;
        self.replay = Some(Replay { segment: segment.clone(), transferred, since });
        match began {
            true => Progress::Recovering { segment, since },
            false => Progress::Starting,
        }
    }

    /// Returns whether the server accepts connections, which with `hot_standby=off` it does not do before
    /// recovery is over.
    async fn answers(&self, user: &str) -> bool {
        let client = match self.endpoint(user).connect("template1").await {
            Ok(client) => client,
            // 57P01 to 57P03: it starts up or shuts down. Other codes tell of a role or database that is not
            // there or not allowed: the server has looked into its catalogs, so it is open
            Err(error) => return error.code().is_some_and(|code| !code.starts_with("57P")),
        };
        let answer = client.query_one("SELECT NOT pg_catalog.pg_is_in_recovery()", &[]).await;
        answer.is_ok_and(|row| row.get(0))
    }

    /// Waits until the server answers and is not in recovery, without any limit while it runs.
    ///
    /// `on_progress` is told every look; whoever wants a limit compares [`Progress::Recovering`]'s `since`
    /// and drops the future, which is safe at any moment. `user` is a role to ask as; it need not exist.
    ///
    /// # Errors
    /// [`InstanceError::Ended`] with the server's own lines if it ends.
    pub async fn wait_ready(
        &mut self,
        user: &str,
        mut on_progress: impl FnMut(&Progress),
    ) -> Result<(), InstanceError> {
        loop {
            let progress = self.progress(user).await?;
            on_progress(&progress);
            if progress == Progress::Ready {
                let path = self.plan.socket_directory();
                return close_socket_directory(&self.plan)
                    .map_err(|source| InstanceError::File { path, source });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the server ends by itself. May be dropped and called again.
    ///
    /// # Errors
    /// [`InstanceError::Wait`] if the kernel does not tell.
    pub async fn wait_end(&mut self) -> Result<ExitStatus, InstanceError> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let status = self.child.wait().await.map_err(|source| self.waiting(source))?;
        self.ended = Some(status);
        Ok(status)
    }

    /// Ends the server, more and more firmly, and removes shared memory it left. Safe to repeat.
    ///
    /// # Errors
    /// [`InstanceError::DoesNotEnd`] if a process waits inside the kernel: answer its reads first.
    pub async fn stop(&mut self, mode: StopMode) -> Result<(), InstanceError> {
        let steps = [
            (Signal::INT, FAST_LIMIT),
            (Signal::QUIT, IMMEDIATE_LIMIT),
            (Signal::KILL, KILL_LIMIT),
        ];
        let skip = if mode == StopMode::Fast { 0 } else { 1 };
        let children = process::children(self.child.id().pid);
        for (signal, limit) in steps.into_iter().skip(skip) {
            if !self.is_running()? {
                break;
            }
            self.child.signal(signal);
            let waited = self.child.wait_up_to(limit).await;
            self.ended = waited.map_err(|source| self.waiting(source))?;
        }
        if self.is_running()? {
            return Err(InstanceError::DoesNotEnd { pid: self.child.id().pid });
        }
        // each backend has a session and process group of its own, so the group's signal does not reach it
        let end = Instant::now() + KILL_LIMIT;
        while let Some(left) = children.iter().find(|child| child.is_alive()) {
            if Instant::now() > end {
                return Err(InstanceError::DoesNotEnd { pid: left.pid });
            }
            for child in &children {
                let _ = child.signal(Signal::KILL); // told by the look at the loop's head
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // children of a server that others have killed end by themselves, a moment after it
        while !self.remove_shared_memory() {
            if Instant::now() > end {
                tracing::warn!("shared memory of the server {} is still used", self.child.id().pid);
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Removes the segment that a killed server leaves; one in a namespace of its own ends with it. Returns
    /// whether nothing is left that its children may still use.
    fn remove_shared_memory(&self) -> bool {
        if self.isolation.has_own_ipc() {
            return true;
        }
        match shared_memory::remove_of(self.child.id().pid, self.owner()) {
            Ok(removal) => removal.in_use == 0,
            Err(error) => {
                tracing::warn!("look for shared memory of a server that has ended: {error}");
                true
            }
        }
    }

    fn waiting(&self, source: io::Error) -> InstanceError {
        InstanceError::Wait { pid: self.child.id().pid, source }
    }

    fn ended_error(&self) -> InstanceError {
        let status = self.ended.unwrap_or_default();
        InstanceError::Ended { status, failure: Box::new(self.failure()) }
    }
}

impl Drop for Instance {
    /// Ends a server that [`Instance::stop`] has not ended: SIGQUIT, then SIGKILL, never a wait without end.
    fn drop(&mut self) {
        let children = process::children(self.child.id().pid);
        for signal in [Signal::QUIT, Signal::KILL] {
            if self.ended.is_none() {
                self.child.signal(signal);
                self.ended = self.child.wait_blocking(KILL_LIMIT);
            }
        }
        if self.ended.is_none() {
            tracing::error!("the server process {} does not end", self.child.id().pid);
            return;
        }
        for child in children {
            let _ = child.signal(Signal::KILL); // nobody is left to tell
        }
        self.remove_shared_memory();
    }
}

/// What `/proc` tells about the startup process.
struct Startup {
    began: bool,
    segment: Option<String>,
    transferred: Option<u64>,
}

/// Finds the startup process among the server's children, away from the async threads: `/proc` may wait
/// for a process that waits for its mount.
async fn startup_process(server: u32) -> Option<Startup> {
    let look = move || {
        process::children(server).into_iter().find_map(|child| {
            let (began, segment) = parse_title(&process::title(child.pid))?;
            Some(Startup { began, segment, transferred: process::transferred(child.pid) })
        })
    };
    tokio::task::spawn_blocking(look).await.ok().flatten()
}

/// Reads the title of a child: whether it is the startup process and has begun to replay, and its segment.
///
/// `postgres: NAME: startup recovering 000000010000000000000002` (12 has more spaces), `waiting for …`.
fn parse_title(title: &str) -> Option<(bool, Option<String>)> {
    let words = title.strip_prefix("postgres: ")?;
    let (_, after) = words.split_once(": ")?; // our cluster_name
    let mut words = after.split_ascii_whitespace();
    if words.next()? != "startup" || title.contains("[local]") {
        return None; // another process, or the connection of a role that is called startup
    }
    let began = words.next().is_some();
    let segment =
        words.find(|word| word.len() == 24 && word.bytes().all(|b| b.is_ascii_hexdigit()));
    Some((began, segment.map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_titles() {
        let wal = "0000000100000000000000AB";
        let cases = [
            ("postgres: m-1: startup", Some((false, None))),
            ("postgres: m-1: startup recovering 0000000100000000000000AB", Some((true, Some(wal)))),
            (
                "postgres: m-1: startup   recovering 0000000100000000000000AB",
                Some((true, Some(wal))),
            ),
            (
                "postgres: m-1: startup waiting for 0000000100000000000000AB",
                Some((true, Some(wal))),
            ),
            ("postgres: m-1: startup end-of-recovery checkpoint", Some((true, None))),
            ("postgres: m-1: checkpointer", None),
            ("postgres: m-1: u startup: [local] idle", None),
            ("postgres: m-1: startup template1 [local] idle", None),
            ("/usr/lib/postgresql/15/bin/postgres -D /x -c cluster_name=m-1", None),
            ("", None),
        ];
        for (title, want) in cases {
            let want = want.map(|(began, segment)| (began, segment.map(str::to_owned)));
            assert_eq!(parse_title(title), want, "{title}");
        }
    }
}
