//! The audit trail of a team's server: one JSON line per request that reads a repository or steers a session, and per session's end,
//! in `audit.log` (0600).
//!
//! Who (account), what (databases), from which backup, where to, and the result.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use pgthaw_session::request::Requester;
use pgthaw_session::{ExportRequest, Status};
use serde::Serialize;

use crate::rules::Asked;

/// Name of the file in the state directory.
pub const FILE: &str = "audit.log";

/// One line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    at: Timestamp,
    user: &'a str,
    uid: u32,
    /// What was asked: `backups`, `databases`, `check`, `export`, `stop`, `retry`, `cancel`; `end` when a session has ended.
    action: &'a str,
    session: Option<&'a str>,
    repository: &'a str,
    backup: Option<&'a str>,
    /// `["*"]` for all.
    databases: Vec<&'a str>,
    staging: Option<&'a str>,
    target: Option<&'a str>,
    /// `accepted`, `refused`, or the state that the session ended in.
    result: &'a str,
    reason: Option<&'a str>,
}

/// The trail.
#[derive(Debug)]
pub struct Audit {
    file: Mutex<File>,
}

impl Audit {
    /// Opens it in the state directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(state: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let path = state.join(FILE);
        let file = options.open(&path).map_err(|err| {
            io::Error::new(err.kind(), format!("audit trail `{}`: {err}", path.display()))
        })?;
        Ok(Self { file: Mutex::new(file) })
    }

    /// Writes down that somebody has looked at a repository (`backups`) or at one of its backups (`databases`), or why not.
    pub fn looked(
        &self,
        who: &Requester,
        action: &str,
        (repository, backup): (&str, Option<&str>),
        result: Result<(), &str>,
    ) {
        self.write(&Line {
            at: Timestamp::now(),
            user: &who.user,
            uid: who.uid,
            action,
            session: None,
            repository,
            backup,
            databases: Vec::new(),
            staging: None,
            target: None,
            result: if result.is_ok() { "accepted" } else { "refused" },
            reason: result.err(),
        });
    }

    /// Writes down that an export was asked for (`export`), or whether it could be had (`check`), and the session that it became or
    /// why it was refused.
    pub fn asked(
        &self,
        who: &Requester,
        action: &str,
        asked: &Asked,
        session: Result<Option<&str>, &str>,
    ) {
        let ExportRequest { databases, all, staging, backup, .. } = asked.request;
        self.write(&Line {
            at: Timestamp::now(),
            user: &who.user,
            uid: who.uid,
            action,
            session: session.ok().flatten(),
            repository: asked.repository,
            backup: backup.as_deref(),
            databases: match all {
                true => vec!["*"],
                false => databases.iter().map(String::as_str).collect(),
            },
            staging: staging.as_deref(),
            target: Some(&asked.target()),
            result: if session.is_ok() { "accepted" } else { "refused" },
            reason: session.err(),
        });
    }

    /// Writes down what became of a session (`end`), or what was asked of it and why that was refused.
    pub fn session(&self, who: &Requester, action: &str, status: &Status, refused: Option<&str>) {
        let state = format!("{:?}", status.state).to_lowercase();
        self.write(&Line {
            at: Timestamp::now(),
            user: &who.user,
            uid: who.uid,
            action,
            session: Some(&status.id),
            repository: &status.repository,
            backup: status.backup.as_deref(),
            databases: status.databases.iter().map(|database| database.name.as_str()).collect(),
            staging: status.staging.as_deref(),
            target: Some(&status.target),
            result: match (action, refused) {
                ("end", _) => &state,
                (_, None) => "accepted",
                (_, Some(_)) => "refused",
            },
            reason: refused.or(status.error.as_deref().filter(|_| action == "end")),
        });
    }

    fn write(&self, line: &Line) {
        let Ok(mut text) = serde_json::to_vec(line) else { return };
        text.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(err) = file.write_all(&text) {
            eprintln!("audit trail: {err}: {}", String::from_utf8_lossy(&text).trim_end());
        }
    }
}
