//! Runs pg_dump: its start, what it says while it works, its end.
//!
//! [`Dump::start`], then [`Dump::wait`] or [`Dump::stop`]. Nothing of a database is final before its pg_dump
//! has exited with 0. The command line is made in `dump_arguments.rs`.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;

use crate::binaries::Binaries;
use crate::connection::{Endpoint, program_options};
pub use crate::dump_arguments::{
    ArgumentError, Given, arguments, given_options, validate_user_arguments,
};
use crate::launch::{Launch, client_view};
use crate::os_user::OsUser;
use crate::process::{Child, ProcessId};
use crate::root::{Confinement, Streams};

/// How long pg_dump may take to end after SIGTERM, and again after SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// As many of pg_dump's last own messages are kept.
const KEPT: usize = 20;
/// Longer lines of pg_dump are cut; a query in an error message may be long.
const LINE_LIMIT: usize = 64 << 10;

/// What to dump, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DumpPlan {
    /// The programs of the cluster's major version.
    pub binaries: Binaries,
    /// The instance, as a superuser.
    pub endpoint: Endpoint,
    /// The database.
    pub database: String,
    /// The directory pg_dump makes; nothing may be there yet.
    pub output: PathBuf,
    /// How many workers (`-j`).
    pub jobs: u32,
    /// The value of `-Z`; `None` for pg_dump's default.
    pub compress: Option<String>,
    /// The database's own encoding ([`crate::inspect::Database::encoding`]): a role's or database's
    /// `client_encoding` then has no say. The user's `--encoding` wins.
    pub encoding: Option<String>,
    /// The user's own arguments.
    pub arguments: Vec<String>,
    /// Who runs pg_dump; `None` for ourselves.
    pub os_user: Option<OsUser>,
    /// How long to wait for a table's lock.
    pub lock_wait_timeout: Duration,
    /// The session's marker, for the environment.
    pub marker: String,
    /// What walls pg_dump in: what it is told by the instance is hostile input.
    pub confinement: Confinement,
}

/// Why a dump was not begun or cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The plan's arguments.
    #[error(transparent)]
    Arguments(#[from] ArgumentError),
    /// Something is where the dump should go.
    #[error("`{0}` exists already")]
    OutputExists(PathBuf),
    /// pg_dump could not be run.
    #[error("start `{program}`")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The kernel does not tell about the process.
    #[error("wait for pg_dump, process {pid}")]
    Wait {
        /// Its number.
        pid: u32,
        /// What failed.
        source: io::Error,
    },
    /// Not even SIGKILL ended it.
    #[error("pg_dump, process {pid}, does not end; it waits inside the kernel")]
    DoesNotEnd {
        /// Its number.
        pid: u32,
    },
}

/// Something pg_dump said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DumpEvent {
    /// It begins with the rows of a table, named as pg_dump names it.
    TableBegun {
        /// `schema.table`
        table: String,
    },
    /// A worker has finished an item (only with two jobs or more).
    ItemFinished {
        /// pg_dump's word for it: `TABLE DATA`, `BLOBS`, …
        what: String,
        /// Its name, without the schema.
        name: String,
    },
    /// A warning or an error, to be shown as it is.
    Message {
        /// The line.
        text: String,
    },
    /// What else it tells because of `--verbose`.
    Note {
        /// The line, without the program's name.
        text: String,
    },
}

/// Descriptions of archive entries that a "finished item" line may name (`pg_backup_archiver.c`).
const ITEMS: [&str; 8] = [
    "TABLE DATA",
    "BLOBS",
    "LARGE OBJECTS",
    "BLOB METADATA",
    "SEQUENCE SET",
    "MATERIALIZED VIEW DATA",
    "STATISTICS DATA",
    "LARGE OBJECT",
];

/// Reads a line of pg_dump's standard error; wording of 12 to 18.
///
/// Workers and leader write the program's name and the text apart, so names may pile up on one line and be
/// missing on the next (`pg_dump:pg_dump: finished item …`). What is read here serves progress, nothing else.
pub fn parse_line(line: &str) -> DumpEvent {
    let mut text = line;
    while let Some(rest) = text.trim_start().strip_prefix("pg_dump:") {
        text = rest;
    }
    // a text whose name stands on the line before begins with the space between them, or with nothing
    let own = text.len() != line.len() || text.starts_with(' ') || text.starts_with("executing ");
    let text = text.trim_start();
    if let Some(rest) = text.strip_prefix("dumping contents of table ") {
        let name = rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(rest);
        return DumpEvent::TableBegun { table: name.into() };
    }
    if let Some((number, rest)) =
        text.strip_prefix("finished item ").and_then(|rest| rest.split_once(' '))
        && number.bytes().all(|byte| byte.is_ascii_digit())
        && let Some(what) = ITEMS.iter().find(|what| rest.starts_with(**what))
    {
        let name = rest[what.len()..].trim_start();
        return DumpEvent::ItemFinished { what: (*what).into(), name: name.into() };
    }
    let loud = ["error: ", "warning: ", "detail: ", "hint: ", "fatal: "];
    if !own || loud.iter().any(|word| text.starts_with(word)) {
        return DumpEvent::Message { text: line.into() };
    }
    DumpEvent::Note { text: text.into() }
}

/// How a dump ended.
#[derive(Clone, Debug)]
pub struct DumpEnd {
    /// Its exit status; the dump is whole only with 0.
    pub status: ExitStatus,
    /// Its last warnings and errors.
    pub messages: Vec<String>,
}

impl DumpEnd {
    /// Returns in one line why pg_dump failed: its first error, with the server's own words where it only says that there are some.
    pub fn reason(&self) -> String {
        let after = |message: &String, word: &str| {
            message.split_once(word).map(|(_, rest)| rest.trim().to_owned())
        };
        let Some(error) = self.messages.iter().find_map(|message| after(message, "error: ")) else {
            return format!("pg_dump ended with {}", self.status);
        };
        let server = self
            .messages
            .iter()
            .find_map(|message| after(message, "detail: Error message from server: "));
        match (error.strip_suffix("PQgetResult() failed."), server) {
            (Some(what), Some(server)) => {
                let server = server.strip_prefix("ERROR:").unwrap_or(&server).trim_start();
                format!("pg_dump: {what}{server}")
            }
            _ => format!("pg_dump: {error}"),
        }
    }
}

/// A running pg_dump with its workers, which share its process group. Dropping it ends them.
#[derive(Debug)]
pub struct Dump {
    child: Child,
    reader: Option<JoinHandle<VecDeque<String>>>,
    /// What it said, once that is complete: [`Dump::wait`] may be dropped after it was read.
    messages: VecDeque<String>,
    ended: Option<DumpEnd>,
}

impl Dump {
    /// Starts pg_dump; `on_event` is called with everything it says. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`DumpError`] if the arguments are wrong, the output exists or the program cannot be run.
    pub fn start(
        plan: &DumpPlan,
        on_event: impl FnMut(DumpEvent) + Send + 'static,
    ) -> Result<Self, DumpError> {
        let arguments = arguments(plan)?;
        if plan.output.symlink_metadata().is_ok() {
            return Err(DumpError::OutputExists(plan.output.clone()));
        }
        let program = plan.binaries.pg_dump.clone();
        let failed = |source| DumpError::Spawn { program: program.clone(), source };
        let parent = plan.output.parent().unwrap_or(Path::new("/"));
        let launch = Launch {
            binaries: &plan.binaries,
            program: &plan.binaries.pg_dump,
            arguments,
            environment: vec![("PGOPTIONS".into(), program_options(plan.endpoint.major).into())],
            directory: Path::new("/"),
            os_user: plan.os_user.as_ref(),
            marker: &plan.marker,
            confinement: &plan.confinement,
            view: client_view(&plan.endpoint, Some(parent)),
            libraries: Vec::new(),
            isolation: None,
            death_signal: Signal::KILL,
        };
        let streams = Streams { stderr: Stdio::piped(), ..Streams::null() };
        let mut child = launch.start(streams).map_err(failed)?;
        let errors = match child.take_stderr() {
            Ok(errors) => errors,
            Err(source) => {
                child.signal_group(Signal::KILL);
                return Err(failed(source));
            }
        };
        let reader = Some(tokio::spawn(read_lines(errors, on_event)));
        Ok(Self { child, reader, messages: VecDeque::new(), ended: None })
    }

    /// Returns pg_dump's leader.
    pub fn id(&self) -> ProcessId {
        self.child.id()
    }

    /// Waits until pg_dump ends and all it said was told. May be dropped and called again.
    ///
    /// # Errors
    /// [`DumpError::Wait`] if the kernel does not tell.
    pub async fn wait(&mut self) -> Result<DumpEnd, DumpError> {
        if let Some(end) = &self.ended {
            return Ok(end.clone());
        }
        let pid = self.child.id().pid;
        let waiting = |source| DumpError::Wait { pid, source };
        self.child.ended().await.map_err(waiting)?;
        // the leader is gone: workers that outlived it would keep the pipe open
        self.child.signal_group(Signal::KILL);
        if let Some(reader) = &mut self.reader {
            self.messages = reader.await.unwrap_or_default();
            self.reader = None;
        }
        let status = self.child.wait().await.map_err(waiting)?;
        let end = DumpEnd { status, messages: std::mem::take(&mut self.messages).into() };
        self.ended = Some(end.clone());
        Ok(end)
    }

    /// Lets pg_dump and its workers stand still; what they were doing waits for [`Dump::go_on`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets pg_dump and its workers go on.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            self.child.signal_group(signal);
        }
    }

    /// Ends pg_dump and its workers, even if they stand still: SIGTERM, then SIGKILL. Safe to repeat.
    ///
    /// # Errors
    /// [`DumpError::DoesNotEnd`] if it waits inside the kernel.
    pub async fn stop(&mut self) -> Result<DumpEnd, DumpError> {
        for signal in [Signal::TERM, Signal::KILL] {
            self.signal(signal);
            self.go_on(); // what stands still takes no SIGTERM
            if let Ok(end) = tokio::time::timeout(STOP_LIMIT, self.wait()).await {
                return end;
            }
        }
        Err(DumpError::DoesNotEnd { pid: self.child.id().pid })
    }
}

impl Drop for Dump {
    /// Ends pg_dump and its workers at once, never with a wait without end.
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        self.child.signal_group(Signal::KILL);
        if self.child.wait_blocking(STOP_LIMIT).is_none() {
            tracing::error!("pg_dump, process group {}, does not end", self.child.id().pid);
        }
    }
}

/// Tells every line; returns the last messages.
async fn read_lines(
    errors: Receiver,
    mut on_event: impl FnMut(DumpEvent) + Send,
) -> VecDeque<String> {
    let mut messages = VecDeque::new();
    let mut lines = BufReader::new(errors);
    let mut bytes = Vec::new();
    while matches!(lines.read_until(b'\n', &mut bytes).await, Ok(count) if count > 0) {
        bytes.truncate(LINE_LIMIT);
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        bytes.clear();
        if line.trim().is_empty() {
            continue;
        }
        let event = parse_line(&line);
        if let DumpEvent::Message { text } = &event {
            messages.push_back(text.clone());
            if messages.len() > KEPT {
                messages.pop_front();
            }
        }
        on_event(event);
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_one_line() {
        use std::os::unix::process::ExitStatusExt;
        let cases: [(&[&str], &str); 4] = [
            (&[], "pg_dump ended with exit status: 1"),
            (
                &[
                    "pg_dump: error: Dumping the contents of table \"message\" failed: PQgetResult() failed.",
                    "pg_dump: detail: Error message from server: ERROR:  invalid page in block 1 of relation base/1/2",
                    "pg_dump: detail: Command was: COPY public.message (id) TO stdout;",
                    "pg_dump: error: a worker process died unexpectedly",
                ],
                "pg_dump: Dumping the contents of table \"message\" failed: invalid page in block 1 of relation base/1/2",
            ),
            (
                &[
                    "pg_dump: warning: there are circular foreign-key constraints",
                    "pg_dump: error: query failed: ERROR:  x",
                ],
                "pg_dump: query failed: ERROR:  x",
            ),
            (
                &["pg_dump: error: could not write to file: No space left on device"],
                "pg_dump: could not write to file: No space left on device",
            ),
        ];
        for (messages, want) in cases {
            let messages = messages.iter().map(|message| (*message).to_owned()).collect();
            let end = DumpEnd { status: ExitStatus::from_raw(1 << 8), messages };
            assert_eq!(end.reason(), want);
        }
    }

    #[test]
    fn reads_what_pg_dump_says() {
        let begun = |table: &str| DumpEvent::TableBegun { table: table.into() };
        let finished = |what: &str, name: &str| DumpEvent::ItemFinished {
            what: what.into(),
            name: name.into(),
        };
        let message = |text: &str| DumpEvent::Message { text: text.into() };
        let note = |text: &str| DumpEvent::Note { text: text.into() };
        let cases = [
            ("pg_dump: dumping contents of table \"public.Far Away\"", begun("public.Far Away")),
            ("pg_dump: dumping contents of table public.old", begun("public.old")),
            ("pg_dump: finished item 3366 TABLE DATA Far Away", finished("TABLE DATA", "Far Away")),
            ("pg_dump: finished item 33 BLOBS BLOBS", finished("BLOBS", "BLOBS")),
            ("pg_dump: finished item x TABLE DATA a", note("finished item x TABLE DATA a")),
            ("pg_dump: reading schemas", note("reading schemas")),
            (
                "pg_dump: warning: there are circular foreign-key constraints",
                message("pg_dump: warning: there are circular foreign-key constraints"),
            ),
            (
                "pg_dump: error: query failed: ERROR:  x",
                message("pg_dump: error: query failed: ERROR:  x"),
            ),
            ("pg_dump: detail: Query was: LOCK", message("pg_dump: detail: Query was: LOCK")),
            (
                "pg_dump:pg_dump: finished item 2572 TABLE DATA orders",
                finished("TABLE DATA", "orders"),
            ),
            (" dumping contents of table \"public.orders\"", begun("public.orders")),
            (" executing SELECT 1", note("executing SELECT 1")),
            (" error: x", message(" error: x")),
            ("pg_dump: pg_dump: error: x", message("pg_dump: pg_dump: error: x")),
            ("LINE 1: SELECT", message("LINE 1: SELECT")),
        ];
        for (line, want) in cases {
            assert_eq!(parse_line(line), want, "{line}");
        }
    }
}
