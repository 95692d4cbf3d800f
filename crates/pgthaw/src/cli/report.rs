//! The last words of an export: what was delivered and how to load it, or what failed and how to go on.
//!
//! Pure: everything to say comes in.

use std::path::Path;
use std::time::Duration;

use pgthaw_mover::{GLOBALS_SQL, file_name_for_database};
use pgthaw_session::{DatabaseState, SessionState, Status};

use super::text;
use crate::wire::ApiError;

/// What the last words need besides the status; read from the export itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delivered {
    /// `globals.sql` is there.
    pub globals: bool,
    /// What pg_dump was told besides.
    pub pg_dump_arguments: Vec<String>,
}

impl Delivered {
    /// Looks into the directory of an export; what cannot be read counts as not there.
    pub fn look(target: &Path) -> Self {
        #[derive(serde::Deserialize)]
        struct ExportJson {
            #[serde(default)]
            pg_dump_arguments: Vec<String>,
        }
        let export = std::fs::read(target.join(pgthaw_mover::EXPORT_JSON)).ok();
        let export: Option<ExportJson> = export.and_then(|json| serde_json::from_slice(&json).ok());
        Self {
            globals: target.join(GLOBALS_SQL).is_file(),
            pg_dump_arguments: export.map(|export| export.pg_dump_arguments).unwrap_or_default(),
        }
    }
}

/// Returns what is said of an export that succeeded.
pub fn success(status: &Status, delivered: &Delivered, took: Option<Duration>) -> String {
    let took = took.map(|took| format!(" in {}", text::duration(took))).unwrap_or_default();
    let databases = text::count(status.databases.len(), "database");
    let mut lines = vec![format!(
        "{databases} exported to {}: {}{took}",
        text::one_line(&status.target),
        text::size(status.bytes_done)
    )];
    lines.extend(status.databases.iter().map(|database| {
        format!("  {}  {}", text::one_line(&database.name), text::size(database.bytes))
    }));
    lines.extend(filter_notes(&delivered.pg_dump_arguments));
    lines.push("Load it with".into());
    lines.extend(
        load_commands(status, delivered.globals).into_iter().map(|command| format!("  {command}")),
    );
    lines.join("\n") + "\n"
}

/// Returns the commands that load an export into a server, in their order.
fn load_commands(status: &Status, globals: bool) -> Vec<String> {
    let target = Path::new(&status.target);
    let file = |name: &str| text::shell_word(&target.join(name).to_string_lossy());
    let globals = globals.then(|| format!("psql -X -f {} postgres", file(GLOBALS_SQL)));
    let restores = status.databases.iter().map(|database| {
        // These are there in every new server.
        let create = if ["postgres", "template1"].contains(&database.name.as_str()) {
            format!("-d {}", database.name)
        } else {
            "--create -d postgres".into()
        };
        format!("pg_restore {create} {}", file(&file_name_for_database(&database.name)))
    });
    globals.into_iter().chain(restores).collect()
}

/// Returns what pg_dump's filters left out (pg_dump's manual, `--table`, `--schema` and `--large-objects`).
fn filter_notes(arguments: &[String]) -> Vec<String> {
    let given = |prefixes: &[&str]| {
        arguments.iter().any(|argument| {
            prefixes.iter().any(|prefix| argument.starts_with(prefix))
                && argument != "--schema-only"
        })
    };
    let tables = given(&["--table", "-t"]);
    let schemas = given(&["--schema", "-n"]);
    let large_objects = arguments
        .iter()
        .any(|argument| ["-b", "--blobs", "--large-objects"].contains(&argument.as_str()));
    let mut notes = Vec::new();
    if tables || schemas {
        let large_objects = if large_objects { "" } else { ", large objects" };
        let (filter, left_out) = if tables {
            ("-t", "functions, types, schemas, ")
        } else {
            ("-n", "what lies in other schemas, ")
        };
        notes.push(format!(
            "Note: {filter} exports only what matches. It left out {left_out}extensions{large_objects}, event triggers and publications; \
             what the tables need of these has to be there before they are loaded"
        ));
    }
    let without: Vec<_> = arguments
        .iter()
        .filter(|argument| {
            argument.starts_with("--exclude-")
                || argument.starts_with("-T")
                || argument.starts_with("-N")
        })
        .map(|argument| text::shell_word(&text::one_line(argument)))
        .collect();
    if !without.is_empty() {
        notes.push(format!("Note: left out as asked: {}", without.join(" ")));
    }
    if arguments.iter().any(|argument| argument == "--schema-only" || argument == "-s") {
        notes.push("Note: definitions only, no rows (--schema-only)".into());
    }
    notes
}

/// Returns why a session failed.
pub fn failure(status: &Status) -> ApiError {
    let message = status.error.clone();
    ApiError {
        message: message.unwrap_or_else(|| format!("session {} failed", status.id)),
        hint: status.hint.clone(),
        usage: false,
    }
}

/// Returns what is said of a session that was asked to stop and has failed, which is how a stop ends.
pub fn stopped_line(status: &Status) -> String {
    let why = status.error.as_deref().unwrap_or("stopped by the user");
    format!("pgthaw: session {} has ended: {}", status.id, text::one_line(why))
}

/// Returns what is said to a user who leaves a session.
pub fn left_line(id: &str, stopped: bool) -> String {
    if stopped {
        format!(
            "pgthaw: session {id} was asked to stop and does so by itself; then `pgthaw retry {id}` goes on with it"
        )
    } else {
        format!(
            "pgthaw: session {id} goes on; `pgthaw attach {id}` follows it, `pgthaw cancel {id}` undoes it"
        )
    }
}

/// Returns what follows the error of a session that failed: how far each database came, and how to go on.
pub fn after_failure(status: &Status) -> Vec<String> {
    let width =
        status.databases.iter().map(|database| database.name.chars().count()).max().unwrap_or(0);
    let mut lines: Vec<String> = Vec::new();
    for database in &status.databases {
        let name = text::one_line(&database.name);
        let outcome = match (database.state, &database.error) {
            (DatabaseState::Delivered, _) => format!("delivered, {}", text::size(database.bytes)),
            (DatabaseState::Failed, Some(error)) => format!("failed: {}", text::one_line(error)),
            (DatabaseState::Failed, None) => "failed".into(),
            (DatabaseState::Waiting | DatabaseState::Dumping | DatabaseState::Delivering, _) => {
                "not delivered".into()
            }
        };
        lines.push(format!("  {name:width$}  {outcome}"));
    }
    lines.extend(how_to_go_on(&status.id));
    lines
}

/// Returns the two ways out of a session that was interrupted.
pub fn how_to_go_on(id: &str) -> [String; 2] {
    [
        format!("go on from what is there:   pgthaw retry {id}"),
        format!("remove everything it made:  pgthaw cancel {id}"),
    ]
}

/// Returns the line that every other command shows when sessions were interrupted.
pub fn interrupted_line(sessions: &[Status]) -> Option<String> {
    match sessions {
        [] => None,
        [one] => Some(format!(
            "pgthaw: session {0} was interrupted: `pgthaw retry {0}` goes on, `pgthaw cancel {0}` removes what it left",
            one.id
        )),
        several => {
            let mut ids: Vec<&str> =
                several.iter().rev().take(3).map(|status| status.id.as_str()).collect();
            if several.len() > ids.len() {
                ids.push("…");
            }
            Some(format!(
                "pgthaw: {} sessions were interrupted ({}): `pgthaw retry ID` goes on with one, `pgthaw cancel ID` removes what it left, \
                 `pgthaw clean` does it for all",
                several.len(),
                ids.join(", ")
            ))
        }
    }
}

/// Returns one line for a session that has ended as it should, or that ended otherwise than its follower expected.
pub fn ended_line(status: &Status) -> String {
    let state = match status.state {
        SessionState::Succeeded => {
            format!("has succeeded; its export is in {}", text::one_line(&status.target))
        }
        SessionState::Canceled => "is canceled; nothing of it is left".into(),
        SessionState::Failed => "has failed".into(),
        _ => "is at work".into(),
    };
    format!("session {} {state}", status.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::samples;

    #[test]
    fn a_success_ends_with_the_commands_that_load_it() {
        let mut status = samples::status();
        status.state = SessionState::Succeeded;
        let delivered = Delivered { globals: true, pg_dump_arguments: vec![] };
        let got = success(&status, &delivered, Some(Duration::from_secs(77)));
        let want = "\
2 databases exported to /srv/exports/monday: 47.7 MB in 1 min 17 s
  crm  38.1 MB
  my sales  9.5 MB
Load it with
  psql -X -f /srv/exports/monday/globals.sql postgres
  pg_restore --create -d postgres /srv/exports/monday/crm
  pg_restore --create -d postgres '/srv/exports/monday/my sales'
";
        assert_eq!(got, want);
    }

    #[test]
    fn odd_names_load_too() {
        let mut status = samples::status();
        status.target = "/srv/it's".into();
        status.databases[0].name = "postgres".into();
        status.databases[1].name = "a/b".into();
        let want = [
            r"pg_restore -d postgres '/srv/it'\''s/postgres'",
            r"pg_restore --create -d postgres '/srv/it'\''s/a%2Fb'",
        ];
        assert_eq!(load_commands(&status, false), want);
    }

    #[test]
    fn filters_say_what_they_leave_out() {
        let notes = |arguments: &[&str]| {
            filter_notes(&arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(notes(&[]), Vec::<String>::new());
        assert_eq!(notes(&["--no-owner"]), Vec::<String>::new());
        let [tables] = notes(&["--table=a.*"]).try_into().unwrap();
        assert!(tables.contains("-t exports only") && tables.contains("large objects"), "{tables}");
        let [schemas] = notes(&["-n", "s", "-b"]).try_into().unwrap();
        assert!(
            schemas.contains("other schemas") && !schemas.contains("large objects"),
            "{schemas}"
        );
        assert_eq!(
            notes(&["--exclude-table=x y", "--exclude-table-data=log"]),
            ["Note: left out as asked: '--exclude-table=x y' --exclude-table-data=log"]
        );
        assert_eq!(notes(&["--schema-only"]), ["Note: definitions only, no rows (--schema-only)"]);
    }

    #[test]
    fn a_failure_tells_how_far_it_came_and_how_to_go_on() {
        let mut status = samples::status();
        status.state = SessionState::Failed;
        status.error = Some("pg_dump of `my sales` failed".into());
        status.databases[1].state = DatabaseState::Failed;
        status.databases[1].error = Some("permission\ndenied".into());
        assert_eq!(failure(&status).message, "pg_dump of `my sales` failed");
        let want = [
            "  crm       delivered, 38.1 MB",
            r"  my sales  failed: permission\ndenied",
            "go on from what is there:   pgthaw retry 20261122-101112-kqvd",
            "remove everything it made:  pgthaw cancel 20261122-101112-kqvd",
        ];
        assert_eq!(after_failure(&status), want);
        status.error = None;
        assert_eq!(failure(&status).message, "session 20261122-101112-kqvd failed");
    }

    #[test]
    fn interrupted_sessions_fill_one_line() {
        assert_eq!(interrupted_line(&[]), None);
        let one = samples::status();
        let line = interrupted_line(std::slice::from_ref(&one)).unwrap();
        assert_eq!(
            line,
            "pgthaw: session 20261122-101112-kqvd was interrupted: `pgthaw retry 20261122-101112-kqvd` goes on, \
             `pgthaw cancel 20261122-101112-kqvd` removes what it left"
        );
        let line = interrupted_line(&vec![one; 5]).unwrap();
        assert!(
            line.starts_with("pgthaw: 5 sessions were interrupted (") && line.contains(", …)"),
            "{line}"
        );
        assert!(!line.contains('\n'));
    }

    #[test]
    fn the_export_itself_tells_what_was_delivered() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Delivered::look(directory.path()), Delivered::default());
        std::fs::write(directory.path().join("globals.sql"), "").unwrap();
        std::fs::write(
            directory.path().join("export.json"),
            r#"{"pg_dump_arguments":["--table=a"],"x":1}"#,
        )
        .unwrap();
        let want = Delivered { globals: true, pg_dump_arguments: vec!["--table=a".into()] };
        assert_eq!(Delivered::look(directory.path()), want);
    }
}
