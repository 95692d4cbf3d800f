//! What an instance's own log says: where recovery ended, and why a start failed.
//!
//! The log is written with `lc_messages=C` and `log_line_prefix='%m [%p] '` ([`crate::settings`]); wording
//! is that of 12 to 18. Text inside a message cannot forge a line: PostgreSQL indents what follows a line
//! break in a message by a tab.

use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;
use crate::settings::Recovery;

/// Where recovery ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryEnd {
    /// Where the last replayed record begins. As an inclusive target it gives the same end again.
    pub redo_done: Option<Lsn>,
    /// The time of the last replayed commit, as the server prints it, in UTC.
    pub last_commit_time: Option<String>,
    /// The timeline that was opened after archive recovery.
    pub new_timeline: Option<u32>,
    /// There was nothing to replay.
    pub not_required: bool,
}

/// Why a log does not tell where recovery ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// Archive recovery or redo began, but no line says where it ended.
    #[error("the server's log does not say where recovery ended")]
    NoEnd,
    /// Recovery ended before the position it was to reach. PostgreSQL 12 opens then without an error.
    #[error("recovery was to reach {wanted}, but it ended at {}", reached.map_or("its start".into(), |lsn| lsn.to_string()))]
    EndedBefore {
        /// The position.
        wanted: Lsn,
        /// Where it ended.
        reached: Option<Lsn>,
    },
    /// A position or a timeline that cannot be read.
    #[error("the server's log line {0:?} cannot be understood")]
    Unreadable(String),
}

impl LogError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::EndedBefore { .. } => {
                "the WAL that is there ends before that point: name the archive that reaches it with --wal-archive"
            }
            Self::NoEnd | Self::Unreadable(_) => {
                "this is an error of pgthaw or an unknown version of PostgreSQL: report it with the server's log"
            }
        }
    }
}

impl RecoveryEnd {
    /// Checks that recovery ended where the plan wanted it to, as far as the log can tell.
    ///
    /// # Errors
    /// [`LogError::NoEnd`] if archive recovery was wanted and did not happen (then somebody else has removed
    /// `recovery.signal`), [`LogError::EndedBefore`] if it ended before the wanted position.
    pub fn check(&self, wanted: &Recovery) -> Result<(), LogError> {
        match wanted {
            Recovery::None => Ok(()),
            _ if self.new_timeline.is_none() => Err(LogError::NoEnd),
            Recovery::Lsn { lsn, .. } if self.redo_done.is_none_or(|done| done < *lsn) => {
                Err(LogError::EndedBefore { wanted: *lsn, reached: self.redo_done })
            }
            _ => Ok(()),
        }
    }
}

/// One line of the log.
struct Line<'a> {
    severity: &'a str,
    message: &'a str,
}

/// Splits a line into severity and message; `None` for continuation lines and other text.
fn parse_line(line: &str) -> Option<Line<'_>> {
    const SEVERITIES: [&str; 12] = [
        "LOG",
        "FATAL",
        "PANIC",
        "ERROR",
        "WARNING",
        "DETAIL",
        "HINT",
        "CONTEXT",
        "STATEMENT",
        "NOTICE",
        "INFO",
        "LOCATION",
    ];
    if line.starts_with(['\t', ' ']) {
        return None;
    }
    let rest = match line.split_once("] ") {
        Some((prefix, rest)) if is_prefix(prefix) => rest,
        _ => line,
    };
    let (severity, message) = rest.split_once(":  ")?;
    SEVERITIES.contains(&severity).then_some(Line { severity, message })
}

/// Returns whether this is what `%m [%p] ` gives, up to its last bracket.
fn is_prefix(text: &str) -> bool {
    let Some((time, pid)) = text.rsplit_once(" [") else { return false };
    time.starts_with(|c: char| c.is_ascii_digit())
        && !pid.is_empty()
        && pid.bytes().all(|byte| byte.is_ascii_digit())
}

/// Finds in the log of one start where recovery ended.
///
/// A clean start without any recovery gives an empty answer.
///
/// # Errors
/// [`LogError`] if recovery began and its end is missing or unreadable.
pub fn recovery_end(log: &str) -> Result<RecoveryEnd, LogError> {
    let mut end = RecoveryEnd::default();
    let mut began = false;
    let messages = log.lines().filter_map(parse_line).filter(|line| line.severity == "LOG");
    for Line { message, .. } in messages {
        let unreadable = || LogError::Unreadable(message.chars().take(200).collect());
        if let Some(rest) = message.strip_prefix("redo done at ") {
            let lsn = rest.split_ascii_whitespace().next().unwrap_or_default();
            end.redo_done = Some(lsn.parse().map_err(|_| unreadable())?);
        } else if let Some(time) =
            message.strip_prefix("last completed transaction was at log time ")
        {
            end.last_commit_time = Some(time.trim().into());
        } else if let Some(timeline) = message.strip_prefix("selected new timeline ID: ") {
            end.new_timeline = Some(timeline.trim().parse().map_err(|_| unreadable())?);
        } else if message == "redo is not required" {
            end.not_required = true;
        }
        began |= BEGINNINGS.iter().any(|beginning| message.starts_with(beginning));
    }
    match began && end.redo_done.is_none() && !end.not_required {
        true => Err(LogError::NoEnd),
        false => Ok(end),
    }
}

/// Lines after which the end of recovery must be told.
const BEGINNINGS: [&str; 6] = [
    "starting archive recovery",
    "starting point-in-time recovery",
    "starting backup recovery",
    "entering standby mode",
    "redo starts at ",
    "database system was not properly shut down",
];

/// Why a server did not start or did not stay, from its own log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The server's own lines, without its hints (they are for the owner of the original cluster).
    pub lines: Vec<String>,
    /// What that means, if it is known.
    pub cause: Option<String>,
    /// What can be done about it.
    pub hint: Option<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.cause, self.lines.is_empty()) {
            (Some(cause), true) => f.write_str(cause),
            (Some(cause), false) => write!(f, "{cause}\n{}", self.lines.join("\n")),
            (None, false) => f.write_str(&self.lines.join("\n")),
            (None, true) => f.write_str("the server said nothing"),
        }
    }
}

/// As many of the server's lines are shown at most: the last ones.
const SHOWN: usize = 20;

/// Collects the server's own error lines and explains them where the cause is known.
pub fn explain_failure(log: &str) -> Failure {
    let mut lines = Vec::new();
    let mut detail_belongs = false;
    for text in log.lines() {
        match parse_line(text) {
            Some(Line { severity: severity @ ("FATAL" | "PANIC" | "ERROR"), message }) => {
                detail_belongs = !message.starts_with("the database system is ")
                    && !message.starts_with("terminating connection due to administrator command");
                if detail_belongs {
                    lines.push(format!("{severity}:  {message}"));
                }
            }
            Some(Line { severity: "DETAIL", message }) if detail_belongs => {
                lines.push(format!("DETAIL:  {message}"));
            }
            Some(Line { severity: "LOG", message }) => {
                detail_belongs = [" was terminated by signal ", "could not ", "invalid checkpoint"]
                    .iter()
                    .any(|words| message.contains(words));
                if detail_belongs {
                    lines.push(format!("LOG:  {message}"));
                }
            }
            Some(_) => detail_belongs = false, // hints of the server are for the original cluster's owner
            None if text.starts_with('\t') && detail_belongs => {
                lines.push(text.trim_start().to_owned());
            }
            None if is_a_programs_own(text) => lines.push(text.to_owned()),
            None => {}
        }
    }
    lines.dedup();
    let known = known_cause(&lines.join("\n"));
    lines.drain(..lines.len().saturating_sub(SHOWN));
    let (cause, hint) = known.map_or((None, None), |(cause, hint)| (Some(cause), Some(hint)));
    Failure { lines, cause, hint }
}

/// Lines without a severity: of the dynamic linker, or of `postgres` before it can log.
fn is_a_programs_own(text: &str) -> bool {
    text.starts_with("postgres: ")
        || text.contains("error while loading shared libraries")
        || text.starts_with("\"root\" execution of the PostgreSQL server is not permitted")
}

/// Words of the server, what they mean, and what can be done; the first that occurs is taken.
#[rustfmt::skip]
const CAUSES: &[(&str, &str, &str)] = &[
    ("database locale is incompatible with operating system",
     "a database uses a locale that this machine does not have",
     "generate the locale that the DETAIL line names (Debian: dpkg-reconfigure locales; RHEL: dnf install glibc-langpack-…)"),
    ("is not recognized by setlocale()",
     "a database uses a locale that this machine does not have",
     "generate the locale that the DETAIL line names (Debian: dpkg-reconfigure locales; RHEL: dnf install glibc-langpack-…)"),
    ("database files are incompatible with server",
     "the backup was made by another version or build of PostgreSQL",
     "use programs of the backup's own major version and build options (--pg-bin)"),
    ("is not compatible with this version",
     "the backup was made by another version or build of PostgreSQL",
     "use programs of the backup's own major version (--pg-bin)"),
    ("recovery aborted because of insufficient parameter settings",
     "the original cluster ran with larger settings than this start",
     "this is an error of pgthaw: report it with the server's log"),
    ("maximum number of prepared transactions reached",
     "the backup holds more prepared transactions than this start has room for",
     "this is an error of pgthaw: report it with the server's log"),
    ("could not find free replication state slot",
     "the original cluster tracks more replication origins than this start has room for",
     "this is an error of pgthaw: report it with the server's log"),
    ("WAL ends before end of online backup",
     "the WAL that the backup needs to become consistent is not complete",
     "the backup's own WAL is missing or ends too early: see the archive, or name it with --wal-archive"),
    ("WAL ends before consistent recovery point",
     "the WAL ends before the cluster is consistent",
     "the backup's own WAL is missing or ends too early: see the archive, or name it with --wal-archive"),
    ("recovery ended before configured recovery target was reached",
     "the WAL that is there ends before the chosen point",
     "choose an earlier point, or name the archive that reaches it with --wal-archive"),
    ("requested recovery stop point is before consistent recovery point",
     "the chosen point lies before the end of the backup",
     "choose a later point or an earlier backup"),
    ("requested timeline ",
     "the chosen timeline does not come out of this backup's history",
     "choose another timeline with --target-timeline, or another backup"),
    ("recovery target timeline ",
     "the history of the chosen timeline is not in the archive",
     "choose another timeline with --target-timeline"),
    ("could not locate required checkpoint record",
     "the WAL that recovery begins with is missing",
     "see whether the backup's first WAL segment is in the archive, or name it with --wal-archive"),
    ("could not locate a valid checkpoint record",
     "the WAL that recovery begins with is missing or damaged",
     "see whether the backup's WAL is in the archive, or name it with --wal-archive"),
    ("WAL was generated with wal_level=minimal",
     "the original cluster wrote too little WAL to recover across it",
     "choose a point before wal_level was set to minimal, or a later backup"),
    ("resource manager with ID ",
     "the WAL holds records of an extension that is not loaded",
     "name the extension's library with --preload"),
    ("could not access file \"$libdir",
     "a library that is to be preloaded is not installed here",
     "install the extension's package for this major version of PostgreSQL, or leave the library out"),
    ("could not load library",
     "a library cannot be loaded here",
     "install the extension's package for this major version of PostgreSQL with all it depends on"),
    ("error while loading shared libraries",
     "the PostgreSQL programs lack a system library",
     "install the package that brings it, or use other programs (--pg-bin)"),
    ("could not create shared memory segment",
     "the kernel refuses shared memory",
     "raise kernel.shmmax and kernel.shmall, or free shared memory (ipcs -m)"),
    ("could not map anonymous shared memory",
     "there is not enough memory for the server's shared memory",
     "free memory, or lower the number of jobs (-j)"),
    ("out of shared memory",
     "the server has no room for more locks",
     "this is an error of pgthaw: report it with the number of the database's tables"),
    ("pre-existing shared memory block",
     "another server runs on this data directory",
     "end it first; `pgthaw sessions` shows the sessions"),
    ("lock file \"",
     "another server seems to use this data directory or socket directory",
     "end it first; `pgthaw sessions` shows the sessions"),
    ("has invalid permissions",
     "the mounted data directory has wrong permissions",
     "this is an error of pgthaw: report it with the server's log"),
    ("has wrong ownership",
     "the mounted data directory belongs to somebody else",
     "this is an error of pgthaw: report it with the server's log"),
    ("execution of the PostgreSQL server is not permitted",
     "PostgreSQL refuses to run as root",
     "name an ordinary account with --os-user"),
    ("Input/output error",
     "the mount could not deliver a file",
     "see the session's log: it names the stored file and why it could not be read"),
    ("No space left on device",
     "the write layer's file system is full",
     "free space there, or name another directory with --work-dir"),
    ("invalid page in block",
     "a page of the backup is damaged",
     "check the repository with its own tool, and choose another backup"),
    ("page verification failed",
     "a page of the backup is damaged",
     "check the repository with its own tool, and choose another backup"),
    ("WAL contains references to invalid pages",
     "the WAL changes pages that are not in the backup: the backup is incomplete",
     "check the repository with its own tool, and choose another backup"),
    ("Permission denied",
     "the account that runs PostgreSQL may not use a file or directory",
     "see the file in the server's line; --os-user chooses the account"),
    ("was terminated by signal 9",
     "a process of the server was killed",
     "see the kernel's log (out of memory?); `pgthaw retry` goes on"),
    ("was terminated by signal ",
     "a process of the server crashed",
     "see the server's lines; an extension's library of another version than the backup's may be the reason"),
];

fn known_cause(lines: &str) -> Option<(String, String)> {
    let found = CAUSES.iter().find(|(words, _, _)| lines.contains(words));
    found.map(|(_, cause, hint)| (cause.to_string(), hint.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IMMEDIATE_12: &str = "\
2026-11-22 23:59:59.631 GMT [4806] LOG:  database system was interrupted; last known up at 2026-11-22 23:59:56 GMT
2026-11-22 23:59:59.637 GMT [4806] LOG:  starting point-in-time recovery to earliest consistent point
2026-11-22 23:59:59.645 GMT [4806] LOG:  redo starts at 0/2000028
2026-11-22 23:59:59.645 GMT [4806] LOG:  consistent recovery state reached at 0/2000100
2026-11-22 23:59:59.645 GMT [4806] LOG:  recovery stopping after reaching consistency
2026-11-22 23:59:59.645 GMT [4806] LOG:  redo done at 0/2000100
2026-11-22 23:59:59.647 GMT [4806] LOG:  selected new timeline ID: 2
2026-11-22 23:59:59.659 GMT [4806] LOG:  archive recovery complete
2026-11-22 23:59:59.671 GMT [4805] LOG:  database system is ready to accept connections
";
    const IMMEDIATE_18: &str = "\
2026-11-23 00:00:38.847 GMT [5924] LOG:  starting backup recovery with redo LSN 0/2000028, checkpoint LSN 0/2000080, on timeline ID 1
2026-11-23 00:00:38.854 GMT [5924] LOG:  starting point-in-time recovery to earliest consistent point
2026-11-23 00:00:38.854 GMT [5924] LOG:  redo starts at 0/2000028
2026-11-23 00:00:38.856 GMT [5924] LOG:  completed backup recovery with redo LSN 0/2000028 and end LSN 0/2000120
2026-11-23 00:00:38.856 GMT [5924] LOG:  consistent recovery state reached at 0/2000120
2026-11-23 00:00:38.856 GMT [5924] LOG:  redo done at 0/2000120 system usage: CPU: user: 0.00 s, system: 0.00 s, elapsed: 0.00 s
2026-11-23 00:00:38.857 GMT [5924] LOG:  last completed transaction was at log time 2026-11-22 23:58:01.25417+00
2026-11-23 00:00:38.858 GMT [5924] LOG:  selected new timeline ID: 2
";
    const CRASH_13: &str = "\
2026-11-23 00:00:09.190 GMT [4969] LOG:  database system was not properly shut down; automatic recovery in progress
2026-11-23 00:00:09.191 GMT [4969] LOG:  redo starts at 0/2000028
2026-11-23 00:00:09.191 GMT [4969] LOG:  invalid record length at 0/3000E48: wanted 24, got 0
2026-11-23 00:00:09.191 GMT [4969] LOG:  redo done at 0/3000E20
";
    const CRASH_WITHOUT_REDO: &str = "\
2026-11-23 00:00:09.190 GMT [4969] LOG:  database system was not properly shut down; automatic recovery in progress
2026-11-23 00:00:09.191 GMT [4969] LOG:  invalid record length at 0/3000E48: expected at least 24, got 0
2026-11-23 00:00:09.191 GMT [4969] LOG:  redo is not required
";
    const CLEAN: &str = "\
2026-11-23 00:00:09.190 GMT [4969] LOG:  database system was shut down at 2026-11-22 23:58:46 GMT
2026-11-23 00:00:09.205 GMT [4968] LOG:  database system is ready to accept connections
";

    #[test]
    fn finds_where_recovery_ended() {
        let end = |lsn, timeline| RecoveryEnd {
            redo_done: Some(Lsn(lsn)),
            new_timeline: timeline,
            ..RecoveryEnd::default()
        };
        let time = Some("2026-11-22 23:58:01.25417+00".to_string());
        let not_required = RecoveryEnd { not_required: true, ..RecoveryEnd::default() };
        let cases = [
            ("12", IMMEDIATE_12, end(0x200_0100, Some(2))),
            (
                "18",
                IMMEDIATE_18,
                RecoveryEnd { last_commit_time: time, ..end(0x200_0120, Some(2)) },
            ),
            ("crash", CRASH_13, end(0x300_0E20, None)),
            ("crash without redo", CRASH_WITHOUT_REDO, not_required),
            ("clean", CLEAN, RecoveryEnd::default()),
            ("empty", "", RecoveryEnd::default()),
            ("more digits", "LOG:  redo done at 0/02000028\n", end(0x200_0028, None)),
        ];
        for (name, log, want) in cases {
            assert_eq!(recovery_end(log), Ok(want), "{name}");
        }
    }

    #[test]
    fn a_missing_or_forged_end_is_no_end() {
        for log in [IMMEDIATE_12, IMMEDIATE_18, CRASH_13] {
            let cut: String = log
                .lines()
                .filter(|line| !line.contains("redo done"))
                .map(|l| format!("{l}\n"))
                .collect();
            assert_eq!(recovery_end(&cut), Err(LogError::NoEnd));
            let forged = format!(
                "{cut}2026-11-23 00:00:09.191 GMT [9] LOG:  x\n\tLOG:  redo done at 0/1\n\t2026-11-23 00:00:09.191 GMT [9] LOG:  redo done at 0/1\n2026-11-23 00:00:09.191 GMT [9] WARNING:  redo done at 0/1\n"
            );
            assert_eq!(recovery_end(&forged), Err(LogError::NoEnd));
        }
        let bad = "LOG:  redo done at nowhere\n";
        assert!(matches!(recovery_end(bad), Err(LogError::Unreadable(_))));
    }

    #[test]
    fn the_end_must_be_the_wanted_one() {
        let end = recovery_end(IMMEDIATE_12).unwrap();
        let at = |lsn| Recovery::Lsn { lsn: Lsn(lsn), timeline: 1 };
        let before = LogError::EndedBefore { wanted: Lsn(0x200_0101), reached: end.redo_done };
        let cases = [
            (Recovery::EndOfBackup { timeline: 1 }, Ok(())),
            (Recovery::EndOfWal { timeline: 1 }, Ok(())),
            (at(0x200_0100), Ok(())),
            (at(0x200_0000), Ok(())),
            (at(0x200_0101), Err(before)),
        ];
        for (wanted, result) in cases {
            assert_eq!(end.check(&wanted), result, "{wanted:?}");
        }
        let crash = recovery_end(CRASH_13).unwrap();
        assert_eq!(crash.check(&Recovery::None), Ok(()));
        assert_eq!(crash.check(&Recovery::EndOfBackup { timeline: 1 }), Err(LogError::NoEnd));
    }

    #[test]
    fn explains_failed_starts() {
        let cases = [
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  recovery ended before configured recovery target was reached",
                Some("ends before the chosen point"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  WAL ends before end of online backup\n2026-11-23 00:00:13.445 GMT [5182] HINT:  All WAL generated while online backup was taken must be available at recovery.",
                Some("not complete"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  could not locate required checkpoint record\n2026-11-23 00:00:13.445 GMT [5182] HINT:  If you are restoring from a backup, touch \"/d/recovery.signal\" and add required recovery options.\n\tIf you are not restoring from a backup, try removing the file \"/d/backup_label\".",
                Some("WAL that recovery begins with is missing"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  could not access file \"$libdir/timescaledb\": No such file or directory",
                Some("to be preloaded"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  database files are incompatible with server\n2026-11-23 00:00:13.445 GMT [5182] DETAIL:  The data directory was initialized by PostgreSQL version 14, which is not compatible with this version 15.20.",
                Some("another version"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  database locale is incompatible with operating system\n2026-11-23 00:00:13.445 GMT [5182] DETAIL:  The database was initialized with LC_COLLATE \"de_AT.utf8\",  which is not recognized by setlocale().",
                Some("does not have"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  recovery aborted because of insufficient parameter settings\n2026-11-23 00:00:13.445 GMT [5182] DETAIL:  max_connections = 10 is a lower setting than on the primary server, where its value was 100.",
                Some("larger settings"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  could not read file \"pg_wal/000000010000000000000002\": Input/output error",
                Some("mount could not deliver"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  requested timeline 3 is not a child of this server's history",
                Some("history"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  data directory \"/d\" has invalid permissions\n2026-11-23 00:00:13.445 GMT [5182] DETAIL:  Permissions should be u=rwx (0700) or u=rwx,g=rx (0750).",
                Some("permissions"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] FATAL:  could not create shared memory segment: No space left on device",
                Some("shared memory"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] PANIC:  could not write to file \"pg_wal/xlogtemp.1\": No space left on device",
                Some("write layer"),
            ),
            (
                "2026-11-23 00:00:13.445 GMT [5182] LOG:  startup process (PID 3) was terminated by signal 9: Killed",
                Some("was killed"),
            ),
            (
                "/usr/lib/postgresql/15/bin/postgres: error while loading shared libraries: libldap-2.5.so.0: cannot open shared object file: No such file or directory",
                Some("system library"),
            ),
            ("2026-11-23 00:00:13.445 GMT [5182] FATAL:  something new", None),
        ];
        for (log, want) in cases {
            let failure = explain_failure(log);
            assert!(
                !failure.lines.is_empty() && failure.hint.is_some() == want.is_some(),
                "{log}: {failure:?}"
            );
            assert!(
                failure.cause.as_deref().unwrap_or_default().contains(want.unwrap_or_default()),
                "{log}: {failure:?}"
            );
            assert!(!failure.to_string().contains("removing the file"), "{failure}");
        }
    }

    #[test]
    fn harmless_lines_are_no_failure() {
        let log = "\
2026-11-23 00:00:13.445 GMT [5182] FATAL:  the database system is starting up
2026-11-23 00:00:13.445 GMT [5182] LOG:  database system is ready to accept connections
2026-11-23 00:00:13.445 GMT [5182] WARNING:  something
2026-11-23 00:00:13.445 GMT [5182] FATAL:  terminating connection due to administrator command
";
        assert_eq!(explain_failure(log), Failure::default());
        assert_eq!(Failure::default().to_string(), "the server said nothing");
        let many: String = (0..50).map(|n| format!("FATAL:  error {n}\n")).collect();
        let failure = explain_failure(&many);
        assert_eq!((failure.lines.len(), failure.lines[19].as_str()), (SHOWN, "FATAL:  error 49"));
    }

    proptest! {
        #[test]
        fn no_log_panics(log in "([ -~\t\n]|LOG:  |FATAL:  |redo done at |0/1| GMT \\[1\\] ){0,60}") {
            let _ = (recovery_end(&log), explain_failure(&log));
        }
    }
}
