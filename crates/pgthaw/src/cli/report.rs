//! The last words of an export: what was delivered and how to load it, or what failed and how to go on.
//!
//! Pure: everything to say comes in.

use std::time::Duration;

use pgthaw_mover::{GLOBALS_SQL, file_name_for_database};
use pgthaw_postgres::dump::{Given, given_options};
use pgthaw_session::{DatabaseState, SessionState, Status};

use super::text;
use crate::delivered::Delivered;
use crate::wire::ApiError;

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
    lines.extend(filter_notes(&given_options(&delivered.pg_dump_arguments)));
    if !delivered.tablespaces.is_empty() {
        let directories: Vec<_> =
            delivered.tablespaces.iter().map(|path| text::one_line(path)).collect();
        lines.push(format!(
            "Note: globals.sql creates tablespaces; their directories have to be there, empty and owned by the server's account: {}",
            directories.join(", ")
        ));
    }
    if status.databases.iter().any(|database| !delivered.pgoptions(&database.name).is_empty()) {
        lines.push("Note: databases or roles have settings of their own that would make the load fail; PGOPTIONS overrides them".into());
    }
    lines.push(match &status.target_host {
        None => "Load it with".into(),
        Some(host) => format!("Load it on {} with", text::one_line(host)),
    });
    lines
        .extend(load_commands(status, delivered).into_iter().map(|command| format!("  {command}")));
    lines.join("\n") + "\n"
}

/// Returns the commands that load an export into a server, in their order.
fn load_commands(status: &Status, delivered: &Delivered) -> Vec<String> {
    let target = status.target_directory();
    let file = |name: &str| text::shell_word(&target.join(name).to_string_lossy());
    let globals = delivered.globals.then(|| format!("psql -X -f {} postgres", file(GLOBALS_SQL)));
    let whole = missing_definitions(&given_options(&delivered.pg_dump_arguments)).is_none();
    let restores = status.databases.iter().map(|database| {
        let name = &database.name;
        // These are there in every new server.
        let create = if whole && !["postgres", "template1"].contains(&name.as_str()) {
            "--create -d postgres".into()
        } else {
            format!("-d {}", text::shell_word(&connection_word(name)))
        };
        let options = delivered.pgoptions(name);
        format!("{options}pg_restore {create} {}", file(&file_name_for_database(name)))
    });
    globals.into_iter().chain(restores).collect()
}

/// Returns a database's name as `-d` takes it, which reads some words as a whole connection string.
fn connection_word(name: &str) -> String {
    if name.contains('=') || name.starts_with("postgresql://") || name.starts_with("postgres://") {
        format!("dbname='{}'", name.replace('\\', r"\\").replace('\'', r"\'"))
    } else {
        name.into()
    }
}

/// Returns the option that leaves definitions out, if one does: such a dump cannot create its database.
fn missing_definitions(given: &[Given]) -> Option<String> {
    let sections = || given.iter().filter(|option| option.name == "section");
    let without = |option: &&Given| {
        ["data-only", "no-schema", "statistics-only"].contains(&option.name)
            || (option.name == "section"
                && sections().all(|section| section.value.as_deref() != Some("pre-data")))
    };
    given.iter().find(without).map(shown)
}

/// An option as it is typed.
fn shown(option: &Given) -> String {
    match &option.value {
        Some(value) => text::shell_word(&text::one_line(&format!("--{}={value}", option.name))),
        None => format!("--{}", option.name),
    }
}

/// Returns what pg_dump's filters left out (pg_dump's manual, `--table`, `--schema` and `--large-objects`).
fn filter_notes(options: &[Given]) -> Vec<String> {
    let given = |names: &[&str]| options.iter().any(|option| names.contains(&option.name));
    let tables = given(&["table", "table-and-children"]);
    let schemas = given(&["schema"]);
    let no_large_objects = given(&["no-large-objects", "no-blobs"]);
    let mut notes = Vec::new();
    if tables || schemas {
        let large_objects = if given(&["large-objects", "blobs"]) { "" } else { ", large objects" };
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
    let without: Vec<_> =
        options.iter().filter(|option| option.name.starts_with("exclude-")).map(shown).collect();
    if !without.is_empty() {
        notes.push(format!("Note: left out as asked: {}", without.join(" ")));
    }
    if no_large_objects {
        notes.push("Note: large objects were left out as asked (--no-large-objects)".into());
    }
    if given(&["schema-only"]) {
        notes.push("Note: definitions only, no rows (--schema-only)".into());
    }
    if given(&["no-data"]) {
        notes.push("Note: no rows (--no-data)".into());
    }
    if let Some(option) = missing_definitions(options) {
        notes.push(format!(
            "Note: definitions were left out ({option}): load it into a database that has them"
        ));
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
        let delivered = Delivered { globals: true, ..Delivered::default() };
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
        assert_eq!(load_commands(&status, &Delivered::default()), want);

        // Without definitions no database can be created, and -d would take some names for more than a name.
        for word in ["-a", "--data-only", "--section=data", "--no-schema", "--section=post-data"] {
            let delivered =
                Delivered { pg_dump_arguments: vec![word.into()], ..Delivered::default() };
            status.databases[1].name = "my sales".into();
            let command = load_commands(&status, &delivered).pop().unwrap();
            assert_eq!(command, r"pg_restore -d 'my sales' '/srv/it'\''s/my sales'", "{word}");
        }
        assert_eq!(connection_word("a='b"), r"dbname='a=\'b'");
    }

    /// Looks into the export of a status on this machine.
    fn look(status: &Status) -> Delivered {
        let databases: Vec<_> = status.databases.iter().map(|d| d.name.clone()).collect();
        Delivered::look(status.target_directory(), &databases)
    }

    #[test]
    fn settings_that_disturb_a_load_are_overridden() {
        let mut status = samples::status();
        let directory = tempfile::tempdir().unwrap();
        status.target = directory.path().to_str().unwrap().into();
        let globals = "CREATE ROLE a;\nALTER ROLE a SET role TO 'b';\nALTER ROLE a SET role_of TO 'b';\n\
            CREATE TABLESPACE ts OWNER postgres LOCATION '/srv/it''s';\nALTER ROLE a SET work_mem TO '1MB';\n";
        std::fs::write(directory.path().join("globals.sql"), globals).unwrap();
        let toc = b"PGDMP\0\x01..ALTER DATABASE crm SET default_transaction_read_only TO 'on';\n\
            ALTER ROLE a IN DATABASE crm SET session_preload_libraries TO 'x';\n\0\xff";
        std::fs::create_dir(directory.path().join("crm")).unwrap();
        std::fs::write(directory.path().join("crm/toc.dat"), toc).unwrap();
        let delivered = look(&status);
        assert_eq!(delivered.tablespaces, ["/srv/it's"]);
        assert_eq!(delivered.pgoptions("my sales"), "PGOPTIONS='-c role=none' ");
        let want = "PGOPTIONS='-c default_transaction_read_only=off -c session_preload_libraries= -c role=none' pg_restore --create";
        assert!(load_commands(&status, &delivered)[1].starts_with(want));
        let said = success(&status, &delivered, None);
        assert!(said.contains("PGOPTIONS overrides them\n"), "{said}");
        assert!(said.contains("owned by the server's account: /srv/it's\n"), "{said}");
    }

    #[test]
    fn on_another_machine_it_is_loaded_there() {
        let mut status = samples::status();
        status.target_host = Some("ops@files".into());
        status.target = "ops@files:/srv/exports".into();
        let delivered = Delivered { globals: true, ..Delivered::default() };
        let said = success(&status, &delivered, None);
        assert!(said.contains(" exported to ops@files:/srv/exports: "), "{said}");
        assert!(said.contains("Load it on ops@files with\n"), "{said}");
        assert!(said.contains("psql -X -f /srv/exports/globals.sql postgres\n"), "{said}");
    }

    #[test]
    fn filters_say_what_they_leave_out() {
        let notes = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(|a| (*a).to_owned()).collect();
            filter_notes(&given_options(&arguments))
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
        assert_eq!(notes(&["-Os"]), ["Note: definitions only, no rows (--schema-only)"]);
        for word in ["-B", "--no-blobs", "--no-large-objects"] {
            let [note] = notes(&[word]).try_into().unwrap();
            assert!(note.contains("large objects were left out"), "{word}: {note}");
        }
        let [note] = notes(&["--section", "data"]).try_into().unwrap();
        assert!(note.contains("definitions were left out (--section=data)"), "{note}");
        assert_eq!(notes(&["--section=data", "--section=pre-data"]), [""; 0]);
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
        let mut status = samples::status();
        status.target = directory.path().to_str().unwrap().into();
        assert_eq!(look(&status), Delivered::default());
        std::fs::write(directory.path().join("globals.sql"), "").unwrap();
        std::fs::write(
            directory.path().join("export.json"),
            r#"{"pg_dump_arguments":["--table=a"],"x":1}"#,
        )
        .unwrap();
        let want = Delivered {
            globals: true,
            pg_dump_arguments: vec!["--table=a".into()],
            ..Delivered::default()
        };
        assert_eq!(look(&status), want);
    }
}
