//! Lists and single objects as tables for people and as JSON for programs.
//!
//! The JSON keys are part of the command line's contract: most are the wire's own; those of a backup are defined here.

use std::collections::BTreeMap;
use std::path::Path;

use comfy_table::{CellAlignment, ContentLineStyle, LineStyle, Table, TableStyle};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use pgthaw_session::{DatabaseState, SessionState, Status};
use pgthaw_source::repository::BackupInfo;
use serde::Serialize;

use super::progress::activity;
use super::text;
use crate::wire::{
    BackupDatabase, BackupsAnswer, CheckAnswer, CleanAnswer, DatabasesAnswer, LogLine,
};

/// As psql prints tables: no frame, a line below the header, columns apart by `|`.
const STYLE: TableStyle = TableStyle::new()
    .header_lines(ContentLineStyle::none().junction('|'))
    .header_separator(LineStyle::none().fill('-').junction('+'))
    .content_lines(ContentLineStyle::none().junction('|'));

/// A backup for programs.
#[derive(Debug, Serialize)]
pub struct BackupJson {
    /// The repository's directory.
    pub repository: String,
    /// The repository's format: `pgbackrest` or `basebackup`.
    pub kind: String,
    /// pgBackRest's stanza.
    pub stanza: Option<String>,
    /// What its own tool calls the backup.
    pub id: String,
    /// `full`, `differential`, `incremental` or `base`.
    #[serde(rename = "type")]
    pub backup_type: String,
    /// When it began, UTC.
    pub started_at: Option<Timestamp>,
    /// When it ended, UTC.
    pub stopped_at: Option<Timestamp>,
    /// Bytes of the cluster.
    pub size: u64,
    /// Bytes in the repository.
    pub stored_size: Option<u64>,
    /// PostgreSQL's major version; null where it cannot be told.
    pub postgres_major: Option<u32>,
    /// The backup it builds upon.
    pub prior: Option<String>,
    /// Whether the backup tool found damaged pages.
    pub damaged: bool,
    /// When the last WAL segment was archived that follows it without a gap, UTC.
    pub archived_until: Option<Timestamp>,
    /// That segment's name.
    pub archived_segment: Option<String>,
    /// The segment that is missing behind that one, where later ones are there.
    pub archive_gap: Option<String>,
    /// What the user noted down with the backup tool.
    pub annotations: BTreeMap<String, String>,
    /// Why it cannot be exported from.
    pub unusable: Option<String>,
}

impl BackupJson {
    fn new(repository: &Path, answer: &BackupsAnswer, backup: &BackupInfo) -> Self {
        let time = |seconds| Timestamp::from_second(seconds).ok();
        Self {
            repository: repository.to_string_lossy().into_owned(),
            kind: answer.kind.clone(),
            stanza: answer.stanza.clone(),
            id: backup.id.clone(),
            backup_type: backup.backup_type.to_string(),
            started_at: time(backup.started_at),
            stopped_at: backup.stopped_at.and_then(time),
            size: backup.size,
            stored_size: backup.stored_size,
            postgres_major: Some(backup.postgres_major).filter(|major| *major != 0),
            prior: backup.prior.clone(),
            damaged: backup.damaged,
            archived_until: backup.archived_until.as_ref().and_then(|reach| time(reach.modified)),
            archived_segment: backup.archived_until.as_ref().map(|reach| reach.segment.clone()),
            archive_gap: backup.archived_until.as_ref().and_then(|reach| reach.gap.clone()),
            annotations: backup.annotations.clone(),
            unusable: backup.unusable.clone(),
        }
    }
}

/// Returns the backups of one repository for programs, oldest first.
pub fn backups_json(repository: &Path, answer: &BackupsAnswer) -> Vec<BackupJson> {
    answer.backups.iter().map(|backup| BackupJson::new(repository, answer, backup)).collect()
}

/// Returns the backups of one repository for people, oldest first.
pub fn backups(repository: &Path, answer: &BackupsAnswer, zone: &TimeZone) -> String {
    let stanza = answer
        .stanza
        .as_ref()
        .map(|stanza| format!(", stanza {}", text::one_line(stanza)))
        .unwrap_or_default();
    let repository = text::one_line(&repository.to_string_lossy());
    let title = match answer.kind.as_str() {
        "pgbackrest" => format!("pgBackRest repository {repository}{stanza}"),
        "basebackup" => format!("pg_basebackup directory {repository}"),
        kind => format!("{kind} repository {repository}"),
    };
    if answer.backups.is_empty() {
        return format!("{title}: no backups\n");
    }
    let remarks = answer.backups.iter().any(|backup| !remark(backup).is_empty());
    let mut header = vec![
        "id",
        "type",
        "started",
        "ended",
        "size",
        "stored",
        "PostgreSQL",
        "WAL archived up to",
    ];
    header.extend(remarks.then_some("remark"));
    let rows = answer.backups.iter().map(|backup| {
        let mut row = vec![
            text::one_line(&backup.id),
            backup.backup_type.to_string(),
            text::epoch(backup.started_at, zone),
            backup.stopped_at.map(|at| text::epoch(at, zone)).unwrap_or_default(),
            text::size(backup.size),
            backup.stored_size.map(text::size).unwrap_or_default(),
            if backup.postgres_major == 0 {
                String::new()
            } else {
                backup.postgres_major.to_string()
            },
            backup
                .archived_until
                .as_ref()
                .map(|reach| text::epoch(reach.modified, zone))
                .unwrap_or_default(),
        ];
        row.extend(remarks.then(|| remark(backup)));
        row
    });
    format!("{title}\n{}", table(&header, &[4, 5], rows))
}

fn remark(backup: &BackupInfo) -> String {
    if let Some(why) = &backup.unusable {
        return format!("unusable: {}", text::one_line(why));
    }
    let damaged = backup.damaged.then(|| "the backup tool found damaged pages".to_owned());
    let gap = backup.archived_until.as_ref().and_then(|reach| reach.gap.as_ref());
    let gap = gap.map(|segment| format!("WAL segment {segment} is missing, later ones are there"));
    damaged.into_iter().chain(gap).collect::<Vec<_>>().join("; ")
}

/// Returns the databases of a backup for people.
pub fn databases(answer: &DatabasesAnswer, zone: &TimeZone) -> String {
    let backup = &answer.backup;
    let ended = backup
        .stopped_at
        .map(|at| format!(", ended {}", text::epoch(at, zone)))
        .unwrap_or_default();
    let title = format!(
        "backup {} ({}){ended}, PostgreSQL {}",
        text::one_line(&backup.id),
        backup.backup_type,
        backup.postgres_major
    );
    let databases = by_oid(&answer.databases);
    let remarks = databases.iter().any(|database| !database_remark(database).is_empty());
    let mut header = vec!["name", "size", "relations", "collate", "ctype"];
    header.extend(remarks.then_some("remark"));
    let rows = databases.into_iter().map(|database| {
        let mut row = vec![
            text::one_line(&database.name),
            text::size(database.bytes),
            database.relations.to_string(),
            database.collate.as_deref().map(text::one_line).unwrap_or_default(),
            database.ctype.as_deref().map(text::one_line).unwrap_or_default(),
        ];
        row.extend(remarks.then(|| database_remark(database)));
        row
    });
    format!("{title}\n{}", table(&header, &[1, 2], rows))
}

/// Returns the databases for programs, oldest first.
pub fn by_oid(databases: &[BackupDatabase]) -> Vec<&BackupDatabase> {
    let mut databases: Vec<_> = databases.iter().collect();
    databases.sort_by_key(|database| database.oid);
    databases
}

fn database_remark(database: &BackupDatabase) -> String {
    let remarks = [
        (database.damaged, "damaged pages"),
        (database.template, "template"),
        (!database.allows_connections, "accepts no connections"),
    ];
    remarks
        .iter()
        .filter(|(holds, _)| *holds)
        .map(|(_, remark)| *remark)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Returns the findings of a check for people: what speaks for the export, then warnings, then errors.
pub fn check(answer: &CheckAnswer) -> String {
    let mut lines = vec![answer.recovery_line.clone()];
    lines.extend(answer.report.passed.iter().map(|passed| format!("ok: {passed}")));
    for (error, label) in [(false, "warning"), (true, "error")] {
        for finding in answer.report.findings.iter().filter(|finding| finding.error == error) {
            lines.push(format!("{label}: {}", finding.message));
            lines.extend(finding.remedy.as_ref().map(|remedy| format!("  remedy: {remedy}")));
        }
    }
    let errors = answer.report.findings.iter().filter(|finding| finding.error).count();
    lines.push(match errors {
        0 => "Nothing refuses the export.".into(),
        errors => format!("{} would refuse the export.", text::count(errors, "error")),
    });
    lines.join("\n") + "\n"
}

/// Returns sessions for people, oldest first.
pub fn sessions(sessions: &[Status], zone: &TimeZone) -> String {
    if sessions.is_empty() {
        return "no sessions\n".into();
    }
    let rows = sessions.iter().map(|status| {
        vec![
            status.id.clone(),
            state_word(status.state).into(),
            if status.state.is_active() { activity(status) } else { String::new() },
            text::time(status.created_at, zone),
            names(status),
            text::size(status.bytes_done),
            text::one_line(&status.target),
        ]
    });
    table(&["id", "state", "doing", "created", "databases", "delivered", "target"], &[5], rows)
}

/// Names of the first few databases.
fn names(status: &Status) -> String {
    const SHOWN: usize = 3;
    let mut names: Vec<_> = status
        .databases
        .iter()
        .take(SHOWN)
        .map(|database| text::one_line(&database.name))
        .collect();
    if status.databases.len() > SHOWN {
        names.push(format!("and {} more", status.databases.len() - SHOWN));
    }
    names.join(", ")
}

fn state_word(state: SessionState) -> &'static str {
    match state {
        SessionState::Created => "created",
        SessionState::Running => "running",
        SessionState::Waiting => "waiting",
        SessionState::Canceling => "canceling",
        SessionState::Canceled => "canceled",
        SessionState::Failed => "failed",
        SessionState::Succeeded => "succeeded",
    }
}

/// Returns one session for people.
pub fn session(status: &Status, zone: &TimeZone) -> String {
    let mut facts: Vec<(&str, String)> = vec![
        ("session", status.id.clone()),
        ("kind", status.kind.clone()),
        ("state", state_word(status.state).into()),
    ];
    if status.state.is_active() {
        facts.push(("doing", activity(status)));
    }
    let mut optional = |name, value: &Option<String>| {
        if let Some(value) = value {
            facts.extend(value.lines().map(|line| (name, text::one_line(line))));
        }
    };
    optional("detail", &status.detail);
    optional("error", &status.error);
    optional("hint", &status.hint);
    facts.extend([
        ("created", text::time(status.created_at, zone)),
        ("attempts", status.attempts.to_string()),
        ("repository", text::one_line(&status.repository)),
    ]);
    let named =
        |name, value: &Option<String>| value.as_ref().map(|value| (name, text::one_line(value)));
    facts.extend(named("backup", &status.backup));
    facts.extend(named("recovered to", &status.recovery_lsn));
    facts.push(("target", text::one_line(&status.target)));
    facts.extend(status.reads_way.iter().map(|way| ("read", text::one_line(&way.text))));
    facts.extend(status.dump_way.iter().map(|way| ("dump goes", text::one_line(&way.text))));
    facts.extend([("delivered", text::size(status.bytes_done))]);
    let mut lines: Vec<String> =
        facts.into_iter().map(|(name, value)| format!("{name:<13} {value}")).collect();
    if !status.databases.is_empty() {
        let rows = status.databases.iter().map(|database| {
            vec![
                text::one_line(&database.name),
                database_state_word(database.state).into(),
                text::size(database.bytes),
                match database.tables_total {
                    0 => String::new(),
                    total => format!("{} of {total}", database.tables_done),
                },
                database.error.as_deref().map(text::one_line).unwrap_or_default(),
            ]
        });
        lines.push(String::new());
        lines.push(table(&["database", "state", "dumped", "tables", "error"], &[2], rows));
    } else {
        lines.push(String::new());
    }
    lines.join("\n")
}

fn database_state_word(state: DatabaseState) -> &'static str {
    match state {
        DatabaseState::Waiting => "waiting",
        DatabaseState::Dumping => "dumping",
        DatabaseState::Delivering => "delivering",
        DatabaseState::Delivered => "delivered",
        DatabaseState::Failed => "failed",
    }
}

/// Returns a line of a session's log for people; further lines of its text are indented.
pub fn log_line(line: &LogLine, zone: &TimeZone) -> String {
    format!(
        "{}  {}\n",
        text::time(line.at, zone),
        text::lines(line.text.trim_end()).replace('\n', "\n    ")
    )
}

/// Returns what `clean` removed, or would remove, for people.
pub fn cleaned(answer: &CleanAnswer, dry_run: bool) -> String {
    if answer.removed.is_empty() && answer.failed.is_empty() {
        return "nothing is left to remove\n".into();
    }
    let (verb, canceled) =
        if dry_run { ("would remove", "would cancel") } else { ("removed", "canceled") };
    let mut lines: Vec<String> = answer
        .removed
        .iter()
        .map(|object| {
            if object.kind == "session" {
                return format!("{canceled} session {}", object.session);
            }
            format!(
                "{verb} {} {} of session {}",
                object.kind,
                text::one_line(&object.name),
                object.session
            )
        })
        .collect();
    lines.extend(answer.failed.iter().map(|failed| format!("not removed: {failed}")));
    lines.join("\n") + "\n"
}

/// Renders a table as psql does; the columns numbered in `right` hold figures.
fn table(header: &[&str], right: &[usize], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_header(header.iter().copied()).add_rows(rows);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n") + "\n"
}

#[cfg(test)]
#[path = "lists_tests.rs"]
mod tests;
