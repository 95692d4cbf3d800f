//! What somebody needs who looks for the cause of a failure elsewhere: one JSON value with a session's journal, its logs, versions and
//! settings. It holds no secret and no rows; the markers by which a session knows its own are left out.

use std::fs;
use std::path::Path;

use jiff::Timestamp;
use pgthaw_session::journal;
use serde_json::{Value, json};

use crate::cli::client::SERVER_LOG;

/// Bytes of a log that are kept: its end.
const LOG_MAX: usize = 256 << 10;

/// Puts the bundle of the session in `session` together, of a server whose state is in `state`. A file that cannot be read is told in its
/// place.
pub fn put_together(state: &Path, session: &Path) -> Value {
    let journal = read(&session.join(journal::FILE_NAME));
    let bundle = json!({
        "written_at": Timestamp::now(),
        "versions": {
            "pgthaw": env!("CARGO_PKG_VERSION"),
            "kernel": first_line("/proc/version"),
            "system": value_of(&read(Path::new("/etc/os-release")), "PRETTY_NAME="),
        },
        "memory": first_line("/proc/meminfo"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "journal": journal.lines().map(record).collect::<Vec<_>>(),
        "agent_log": lines(&read(&session.join("agent.log"))),
        "server_log": lines(&read(&state.join(SERVER_LOG))),
    });
    without_markers(bundle, &markers(&journal))
}

/// A file's end as text, or why it cannot be read.
fn read(path: &Path) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_MAX)..]).into(),
        Err(err) => format!("{}: {err}", path.display()),
    }
}

fn first_line(path: &str) -> String {
    read(Path::new(path)).lines().next().unwrap_or_default().to_owned()
}

fn value_of(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim_matches('"').to_owned())
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

/// A record of the journal; one that cannot be read stays as it is, for it may be what is looked for.
fn record(line: &str) -> Value {
    let record = line.split_at_checked(9).and_then(|(_sum, json)| serde_json::from_str(json).ok());
    record.unwrap_or_else(|| line.into())
}

fn markers(journal: &str) -> Vec<String> {
    let records = journal.lines().map(record);
    let places = records.filter_map(|record| record["entry"].get("placed").cloned());
    places.filter_map(|place| place["marker"].as_str().map(str::to_owned)).collect()
}

/// Processes and directories carry a marker in their names, and so do messages about them.
fn without_markers(value: Value, markers: &[String]) -> Value {
    let clean = |value| without_markers(value, markers);
    match value {
        Value::String(text) => Value::String(
            markers.iter().fold(text, |text, marker| text.replace(marker, "(marker)")),
        ),
        Value::Array(values) => values.into_iter().map(clean).collect(),
        Value::Object(members) => {
            members.into_iter().map(|(name, value)| (name, clean(value))).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_holds_what_there_is() {
        let state = tempfile::tempdir().unwrap();
        let session = state.path().join("sessions/s");
        fs::create_dir_all(&session).unwrap();
        let placed = r#"{"at":"1970-01-01T00:00:00Z","entry":{"placed":{"marker":"0123abcd"}}}"#;
        fs::write(session.join("journal"), format!("00000000 {placed}\n00000000 tor")).unwrap();
        fs::write(session.join("agent.log"), "one\npostgres: 0123abcd: died\n").unwrap();
        let bundle = put_together(state.path(), &session);
        assert_eq!(bundle["journal"][0]["entry"]["placed"]["marker"], "(marker)");
        assert_eq!(bundle["journal"][1], "00000000 tor");
        assert_eq!(bundle["agent_log"], json!(["one", "postgres: (marker): died"]));
        assert_eq!(bundle["versions"]["pgthaw"], env!("CARGO_PKG_VERSION"));
        let missing = bundle["server_log"][0].as_str().unwrap();
        assert!(missing.ends_with("No such file or directory (os error 2)"), "{missing}");
    }
}
