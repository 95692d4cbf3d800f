//! What `pgthaw log` shows of a session's journal.

use pgthaw_session::session::{Entry, Place, Record};

use crate::agent::space::human_size;
use crate::wire::LogLine;

/// The line that `pgthaw log` shows for a record, if any.
pub fn log_line(record: &Record) -> Option<LogLine> {
    let text = match &record.entry {
        Entry::Resolved(backup) => backup.recovery_line.clone(),
        Entry::Attempt { number: 1 }
        | Entry::AgainByItself
        | Entry::Cleaned
        | Entry::Created { .. } => return None,
        Entry::Attempt { number } => format!("attempt {number}"),
        Entry::Checked => "checked: nothing refuses the export".into(),
        Entry::Placed(Place { work_directory, dump_directory, .. }) => {
            format!(
                "working in {}, dumping to {}",
                work_directory.display(),
                dump_directory.display()
            )
        }
        Entry::Step(step) => step_text(*step).into(),
        Entry::Recovered(end) => match &end.last_transaction {
            Some(time) => format!(
                "recovered to {} on timeline {}, last transaction at {time}",
                end.lsn, end.timeline
            ),
            None => format!("recovered to {} on timeline {}", end.lsn, end.timeline),
        },
        Entry::Selected(databases) => {
            let names: Vec<&str> =
                databases.iter().map(|database| database.name.as_str()).collect();
            format!("exporting {}", names.join(", "))
        }
        Entry::Database { name, error: Some(error), .. } => {
            format!("database {name} failed: {error}")
        }
        Entry::Database { name, bytes, .. } => {
            format!("database {name} delivered, {}", human_size(*bytes))
        }
        Entry::Sealed { bytes } => format!("export complete, {}", human_size(*bytes)),
        Entry::GaveUp(failure) => format!("gave up: {failure}"),
        Entry::CancelAsked => "cancel".into(),
        Entry::State(state) => format!("{state:?}").to_lowercase(),
        Entry::DumpWay(way) => format!("the dump goes {}", way.text),
        Entry::ReadsWay(way) => format!("the repository is read {}", way.text),
        Entry::Message(text) => text.clone(),
    };
    Some(LogLine { at: record.at, text })
}

fn step_text(step: pgthaw_session::Step) -> &'static str {
    use pgthaw_session::Step;
    match step {
        Step::Request => "accepted",
        Step::Check => "checking",
        Step::Mount => "mounting the backup",
        Step::Recover => "starting PostgreSQL on the mount",
        Step::Dump => "dumping",
        Step::Deliver => "verifying and completing the export",
        Step::Clean => "removing what is temporary",
    }
}
