//! How far a session has come: bars on a terminal, a plain line now and then without one.

use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use pgthaw_session::status::DatabaseStatus;
use pgthaw_session::{DatabaseState, SessionState, Status, Step};

use super::{terminal, text};

/// Plain lines are at least this far apart.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Databases with a line of their own below the bar.
const DATABASE_LINES: usize = 5;

/// Shows log lines and progress on standard error.
pub enum Progress {
    /// A terminal: a bar for all, a line for each database at work.
    Bars(Bars),
    /// Anything else.
    Plain(Plain),
}

impl Progress {
    /// Shows progress in the form that standard error can take.
    pub fn new() -> Self {
        if terminal::shows_progress() {
            Self::Bars(Bars::new())
        } else {
            Self::Plain(Plain::default())
        }
    }

    /// Says a line that stays.
    pub fn tell(&self, line: &str) {
        match self {
            Self::Bars(bars) => bars.all.suspend(|| terminal::tell(line)),
            Self::Plain(_) => terminal::tell(line),
        }
    }

    /// Shows `status`.
    pub fn show(&mut self, status: &Status) {
        match self {
            Self::Bars(bars) => bars.show(status),
            Self::Plain(plain) => plain.wanted = progress_line(status),
        }
        self.tick();
    }

    /// Says what has become due.
    pub fn tick(&mut self) {
        if let Self::Plain(plain) = self
            && let Some(line) = plain.due(Instant::now())
        {
            terminal::tell(&line);
        }
    }

    /// Removes what does not stay.
    pub fn finish(self) {
        if let Self::Bars(bars) = self {
            let _ = bars.all.clear(); // a lost terminal
        }
    }
}

/// Progress on a terminal.
pub struct Bars {
    all: MultiProgress,
    overall: ProgressBar,
    databases: Vec<ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let overall = all.add(ProgressBar::no_length());
        Self { all, overall, databases: Vec::new() }
    }

    fn show(&mut self, status: &Status) {
        let (done, total) = tables(status).unwrap_or_default();
        let template = if total > 0 && status.step == Step::Dump {
            "{prefix} [{bar:16}] {wide_msg}"
        } else {
            "{prefix} {wide_msg}"
        };
        let style = ProgressStyle::with_template(template).expect("the template is well-formed");
        self.overall.set_style(style.progress_chars("=> "));
        self.overall.set_length(total);
        self.overall.set_position(done);
        self.overall.set_prefix(activity(status));
        self.overall.set_message(overall_text(status));
        self.overall.tick();
        // Below the bar there is a whole line for it.
        let lines = [detail(status), database_lines(status)].concat();
        while self.databases.len() > lines.len() {
            if let Some(bar) = self.databases.pop() {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
        }
        for (at, line) in lines.into_iter().enumerate() {
            if at == self.databases.len() {
                let bar = self.all.add(ProgressBar::no_length());
                bar.set_style(
                    ProgressStyle::with_template("  {wide_msg}")
                        .expect("the template is well-formed"),
                );
                self.databases.push(bar);
            }
            self.databases[at].set_message(line);
            self.databases[at].tick();
        }
    }
}

/// Progress without a terminal: decides which lines are worth saying.
#[derive(Debug, Default)]
pub struct Plain {
    wanted: Option<String>,
    said: Option<(String, Instant)>,
}

impl Plain {
    /// Returns the latest line when it is new and the last one is long enough ago.
    fn due(&mut self, now: Instant) -> Option<String> {
        let line = self.wanted.as_ref()?;
        match &self.said {
            Some((said, at)) if said == line || now.duration_since(*at) < PLAIN_INTERVAL => None,
            _ => {
                let line = self.wanted.take()?;
                self.said = Some((line.clone(), now));
                Some(line)
            }
        }
    }
}

/// Returns what a session is doing, in a word or a few.
pub fn activity(status: &Status) -> String {
    let step = match status.step {
        Step::Request => "accepted",
        Step::Check => "checking",
        Step::Mount => "mounting",
        Step::Recover => "recovering",
        Step::Dump => "dumping",
        Step::Deliver => "delivering",
        Step::Clean => "cleaning up",
    };
    match status.state {
        SessionState::Canceling => "canceling".into(),
        SessionState::Waiting => format!("{step}, waiting"),
        _ => step.into(),
    }
}

/// Returns how many tables are dumped and how many there are, when the databases tell. The size of a dump is not known before
/// it is made: the databases' own sizes, which hold indexes and are not compressed, are no measure of it.
fn tables(status: &Status) -> Option<(u64, u64)> {
    let known = |database: &&DatabaseStatus| {
        database.tables_total > 0 || database.state != DatabaseState::Waiting
    };
    let mut databases = status.databases.iter();
    if status.databases.is_empty() || !databases.all(|database| known(&database)) {
        return None;
    }
    let sum = |of: fn(&DatabaseStatus) -> u64| {
        status.databases.iter().fold(0_u64, |sum, database| sum.saturating_add(of(database)))
    };
    Some((sum(|database| database.tables_done), sum(|database| database.tables_total)))
}

/// Returns tables, bytes and databases, in one line.
fn overall_text(status: &Status) -> String {
    let mut parts = Vec::new();
    if let Some((done, total)) = tables(status).filter(|(_, total)| *total > 0)
        && status.step == Step::Dump
    {
        parts.push(format!(
            "{done} of {}",
            text::count(usize::try_from(total).unwrap_or(usize::MAX), "table")
        ));
    }
    if status.bytes_done > 0 {
        parts.push(text::size(status.bytes_done));
    }
    let delivered = status
        .databases
        .iter()
        .filter(|database| database.state == DatabaseState::Delivered)
        .count();
    if status.databases.len() > 1 && status.step >= Step::Dump {
        parts.push(format!(
            "{delivered} of {} delivered",
            text::count(status.databases.len(), "database")
        ));
    }
    parts.join(", ")
}

/// Returns what else is known.
fn detail(status: &Status) -> Vec<String> {
    status.detail.as_deref().map(text::one_line).into_iter().collect()
}

/// Returns a line for each database at work; for the first few when there are many. A single one is told by the whole.
fn database_lines(status: &Status) -> Vec<String> {
    if status.databases.len() == 1 {
        return Vec::new();
    }
    let lines: Vec<String> = status.databases.iter().filter_map(database_text).collect();
    let more = lines.len().saturating_sub(DATABASE_LINES);
    let mut shown: Vec<String> = lines.into_iter().take(DATABASE_LINES).collect();
    if more > 0 {
        shown.push(format!("and {}", text::count(more, "more database")));
    }
    shown
}

fn database_text(database: &DatabaseStatus) -> Option<String> {
    let name = text::one_line(&database.name);
    let bytes = text::size(database.bytes);
    match database.state {
        DatabaseState::Dumping if database.tables_total > 0 => Some(format!(
            "{name}: {} of {} tables, {bytes}",
            database.tables_done, database.tables_total
        )),
        DatabaseState::Dumping => Some(format!("{name}: {bytes}")),
        DatabaseState::Delivering => Some(format!("{name}: dumped, {bytes}, delivering")),
        DatabaseState::Waiting | DatabaseState::Delivered | DatabaseState::Failed => None,
    }
}

/// Returns all of it in one line: `dumping: 57 of 90 tables, 47.7 MB, 1 of 2 databases delivered; crm: 12 of 45 tables, 9.5 MB`.
/// Nothing where there is no more to tell than the step, which the log does.
pub fn progress_line(status: &Status) -> Option<String> {
    let overall = [vec![overall_text(status)], detail(status)].concat();
    let overall: Vec<String> = overall.into_iter().filter(|part| !part.is_empty()).collect();
    let parts = [vec![overall.join(", ")], database_lines(status)].concat();
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    (!parts.is_empty()).then(|| format!("{}: {}", activity(status), parts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::samples;

    #[test]
    fn a_plain_line_holds_everything() {
        let mut status = samples::status();
        let want = "dumping: 57 of 90 tables, 47.7 MB, 1 of 2 databases delivered; my sales: 12 of 45 tables, 9.5 MB";
        assert_eq!(progress_line(&status).as_deref(), Some(want));

        status.databases[0].state = DatabaseState::Waiting;
        status.databases[0].tables_total = 0;
        let line = progress_line(&status).unwrap();
        assert!(
            line.starts_with("dumping: 47.7 MB, 0 of 2"),
            "no total before it is known: {line}"
        );
        status = samples::status();

        status.databases[1].state = DatabaseState::Delivering;
        (status.step, status.bytes_total) = (Step::Deliver, 0);
        let want =
            "delivering: 47.7 MB, 1 of 2 databases delivered; my sales: dumped, 9.5 MB, delivering";
        assert_eq!(progress_line(&status).as_deref(), Some(want));

        status.databases.remove(0);
        assert_eq!(progress_line(&status).as_deref(), Some("delivering: 47.7 MB"));
        (status.step, status.state, status.bytes_done) = (Step::Recover, SessionState::Waiting, 0);
        status.detail = Some("replayed up to 0/5000100".into());
        assert_eq!(
            progress_line(&status).as_deref(),
            Some("recovering, waiting: replayed up to 0/5000100")
        );

        status.state = SessionState::Canceling;
        status.detail = None;
        assert_eq!(progress_line(&status), None, "the log tells the step");
    }

    #[test]
    fn many_databases_are_summed_up() {
        let mut status = samples::status();
        status.databases = vec![status.databases[1].clone(); 8];
        let lines = database_lines(&status);
        assert_eq!(lines.len(), 6);
        assert_eq!(lines[5], "and 3 more databases");
    }

    #[test]
    fn plain_lines_come_on_change_and_not_too_often() {
        let mut plain = Plain::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(plain.due(start), None);
        plain.wanted = Some("a".into());
        assert_eq!(plain.due(start).as_deref(), Some("a"));
        plain.wanted = Some("a".into());
        assert_eq!(plain.due(after(60)), None, "nothing new");
        plain.wanted = Some("b".into());
        plain.wanted = Some("c".into());
        assert_eq!(plain.due(after(1)), None, "too early");
        assert_eq!(plain.due(after(6)).as_deref(), Some("c"), "the latest");
        assert_eq!(plain.due(after(60)), None);
    }
}
