//! What to do next: two functions without I/O.
//!
//! ```text
//!          check ─→ start agent ─→ mount ─→ instance ─→ globals, dump + transfer per database ─→ seal ─→ gone ─→ succeeded
//!  a failure, Ctrl-C ──────────────────────────────────────────────────────────→ gone, but what a retry re-uses ─→ failed
//!  a failure that may pass by itself ──────────────────────────────────────────→ gone, but what a retry re-uses ─→ check, after a rest
//!  cancel ─────────────────────────────────────────────────────────────────────→ gone, everything ─→ canceled
//! ```
//!
//! [`facts`] says what of the observed must go into the journal, [`decide`] what to do then.

use crate::observed::{AgentView, Failure, Observed, Progress};
use crate::session::{Entry, Intent, Session};
use crate::status::{DatabaseState, SessionState, Step};

/// What to do next. Every action is safe to repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing, for good: the session has ended, or needs a retry.
    Nothing,
    /// Wait until something changes.
    Wait,
    /// Check everything before anything is touched.
    Check,
    /// Write down what is about to be created, and start the agent there.
    StartAgent,
    /// Mount the backup.
    EnsureMount,
    /// Start the instance and recover.
    EnsureInstance,
    /// Save `globals.sql`.
    EnsureGlobals,
    /// Dump this database, and deliver its files as they are finished.
    EnsureDump {
        /// The database's name.
        database: String,
    },
    /// Verify what is left to verify; write `SHA256SUMS` and `export.json`.
    Seal,
    /// End the attempt for this reason.
    GiveUp(Failure),
    /// Remove what the session made; with `everything`, also what a retry would re-use.
    EnsureGone {
        /// Also the files in the target.
        everything: bool,
    },
    /// Begin the next attempt after a rest: what ended this one may have passed by then.
    BeginAgain,
    /// Write down that the session has reached this state.
    Finish(SessionState),
}

/// Returns what `seen` tells that the journal does not hold yet.
pub fn facts(session: &Session, seen: &Observed) -> Vec<Entry> {
    let mut entries = Vec::new();
    if seen.check == Progress::Done(()) && !session.checked {
        entries.push(Entry::Checked);
    }
    let Some(agent) = agent_of_this_attempt(session, seen) else { return entries };
    entries
        .extend(agent.messages.iter().skip(session.messages_of_agent).cloned().map(Entry::Message));
    if let Progress::Done(ready) = &agent.instance {
        if session.recovery_end.is_none() {
            entries.push(Entry::Recovered(ready.recovery_end.clone()));
        }
        let known = session.databases.as_ref().map(|known| known.iter().map(|d| &d.selected));
        if !known.is_some_and(|known| known.eq(&ready.databases)) {
            entries.push(Entry::Selected(ready.databases.clone()));
        }
    }
    for database in session.databases.iter().flatten().filter(|d| d.state == DatabaseState::Waiting)
    {
        let name = &database.selected.name;
        let Some(view) = agent.databases.get(name) else { continue };
        let (state, bytes, error) = match (&view.dump, &view.transfer) {
            (Progress::Failed(failure), _) | (_, Progress::Failed(failure)) => {
                (DatabaseState::Failed, 0, Some(failure))
            }
            (Progress::Done(()), Progress::Done(bytes)) => (DatabaseState::Delivered, *bytes, None),
            _ => continue,
        };
        entries.push(Entry::Database { name: name.clone(), state, bytes, error: error.cloned() });
    }
    if let (Progress::Done(bytes), None) = (&agent.seal, session.sealed) {
        entries.push(Entry::Sealed { bytes: *bytes });
    }
    entries
}

/// Returns what to do for a session, given its journal (with all [`facts`] in it) and what is seen of it.
pub fn decide(session: &Session, seen: &Observed) -> Action {
    if session.state.is_final() || session.state == SessionState::Failed {
        return Action::Nothing;
    }
    let clean = session.place.is_none() && seen.agent.is_none();
    match (&session.intent, session.sealed) {
        (Intent::Cancel, _) if !clean || session.target_touched => {
            Action::EnsureGone { everything: true }
        }
        (Intent::Cancel, _) => Action::Finish(SessionState::Canceled),
        (_, Some(_)) if !clean => Action::EnsureGone { everything: false },
        (_, Some(_)) => Action::Finish(SessionState::Succeeded),
        (Intent::GiveUp(_), None) if !clean => Action::EnsureGone { everything: false },
        (Intent::GiveUp(failure), None)
            if failure.passes
                && seen.may_begin_again
                && session.again < session.request.retries =>
        {
            Action::BeginAgain
        }
        (Intent::GiveUp(_), None) => Action::Finish(SessionState::Failed),
        (Intent::Run, None) => forward(session, seen),
    }
}

/// The agent that works for this attempt. One that outlived the end of an earlier attempt on a machine that was away tells of failures
/// that are over: it is only to be removed.
fn agent_of_this_attempt<'a>(session: &Session, seen: &'a Observed) -> Option<&'a AgentView> {
    seen.agent.as_ref().filter(|_| session.placed_in_this_attempt)
}

/// Says that the agent on `staging` has died; without it, on the server's own machine.
fn died(staging: Option<&str>) -> String {
    let what = "the session's agent process has died";
    staging.map_or_else(|| what.to_owned(), |machine| format!("{machine}: {what}"))
}

/// The way to a complete export.
fn forward(session: &Session, seen: &Observed) -> Action {
    let Some(agent) = agent_of_this_attempt(session, seen) else {
        return match &seen.check {
            // Nothing is known of it before its machine can be reached.
            _ if session.placed_in_this_attempt && seen.waiting.is_some() => Action::Wait,
            _ if session.placed_in_this_attempt => Action::GiveUp(
                Failure::new(died(session.request.staging.as_deref()))
                    .hint("`pgthaw retry` goes on from what was delivered")
                    .passing(),
            ),
            _ if session.place.is_some() => Action::EnsureGone { everything: false }, // an earlier attempt's
            Progress::Absent => Action::Check,
            Progress::Running => Action::Wait,
            Progress::Failed(failure) => Action::GiveUp(failure.clone()),
            Progress::Done(()) => Action::StartAgent,
        };
    };
    if let Some(failure) = first_failure(agent) {
        return Action::GiveUp(failure.clone());
    }
    match (&agent.mount, &agent.instance, &agent.globals) {
        (Progress::Absent, _, _) => Action::EnsureMount,
        (Progress::Done(()), Progress::Absent, _) => Action::EnsureInstance,
        (Progress::Done(()), Progress::Done(_), Progress::Absent) if session.request.globals => {
            Action::EnsureGlobals
        }
        (Progress::Done(()), Progress::Done(_), globals) => {
            dumps(session, agent, *globals == Progress::Running)
        }
        _ => Action::Wait,
    }
}

/// Dumps run one after the other; a database's last files may still travel while the next is dumped.
fn dumps(session: &Session, agent: &AgentView, globals_run: bool) -> Action {
    let Some(databases) = &session.databases else { return Action::Wait };
    let dumping = agent.databases.values().any(|view| view.dump == Progress::Running);
    let begun = |name: &str| agent.databases.contains_key(name);
    let next =
        databases.iter().find(|d| d.state == DatabaseState::Waiting && !begun(&d.selected.name));
    if let Some(next) = next.filter(|_| !dumping && !globals_run) {
        return Action::EnsureDump { database: next.selected.name.clone() };
    }
    if globals_run || databases.iter().any(|d| d.state == DatabaseState::Waiting) {
        return Action::Wait;
    }
    let failed: Vec<_> = databases.iter().filter(|d| d.state == DatabaseState::Failed).collect();
    match (failed.first(), &agent.seal) {
        (Some(first), _) => Action::GiveUp(partly(
            &failed.iter().map(|d| d.selected.name.as_str()).collect::<Vec<_>>(),
            databases.len(),
            first.error.as_ref(),
            failed.iter().all(|d| d.error.as_ref().is_some_and(|error| error.passes)),
        )),
        (None, Progress::Absent) => Action::Seal,
        (None, _) => Action::Wait,
    }
}

/// Each failed database tells its own reason; what to do about the first is said for all.
fn partly(failed: &[&str], all: usize, first: Option<&Failure>, passes: bool) -> Failure {
    let names = failed.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let databases = if all == 1 { "database" } else { "databases" };
    let hint = first.and_then(|failure| failure.hint.clone());
    let message = format!("{} of {all} {databases} failed: {names}", failed.len());
    Failure { hint, passes, ..Failure::new(message) }
}

/// The first failure that ends the attempt: anything but a single database's.
fn first_failure(agent: &AgentView) -> Option<&Failure> {
    agent
        .broken
        .as_ref()
        .or(agent.mount.failure())
        .or(agent.instance.failure())
        .or(agent.globals.failure())
        .or(agent.seal.failure())
}

/// Returns the step that `action` belongs to, where it begins one.
pub fn step_of(action: &Action) -> Option<Step> {
    match action {
        Action::Check => Some(Step::Check),
        Action::EnsureMount => Some(Step::Mount),
        Action::EnsureInstance => Some(Step::Recover),
        Action::EnsureGlobals | Action::EnsureDump { .. } => Some(Step::Dump),
        Action::Seal => Some(Step::Deliver),
        Action::EnsureGone { .. } => Some(Step::Clean),
        Action::Nothing
        | Action::Wait
        | Action::StartAgent
        | Action::GiveUp(_)
        | Action::BeginAgain
        | Action::Finish(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::session::Record;

    fn session(entries: impl IntoIterator<Item = Entry>) -> Session {
        let request = serde_json::json!({
            "repository": { "path": "/backups" }, "databases": ["crm"], "target": "/srv/monday",
            "jobs": 1, "globals": true, "role_passwords": true, "retries": 2,
        });
        let request = Box::new(serde_json::from_value(request).unwrap());
        let begun = [Entry::Created { id: "s".into(), request }, Entry::Attempt { number: 1 }];
        let records: Vec<Record> = begun
            .into_iter()
            .chain(entries)
            .map(|entry| Record { at: Timestamp::UNIX_EPOCH, entry })
            .collect();
        Session::from_records(&records).unwrap()
    }

    #[test]
    fn what_passes_by_itself_is_begun_again_so_many_times() {
        let died = || Entry::GaveUp(Failure::new("the agent has died").passing());
        let again = |number| [Entry::AgainByItself, Entry::Attempt { number }, died()];
        let seen = Observed { may_begin_again: true, ..Observed::default() };
        let once = session([died()]);
        assert_eq!(decide(&once, &seen), Action::BeginAgain);
        assert_eq!(decide(&once, &Observed::default()), Action::Finish(SessionState::Failed));
        assert_eq!(
            decide(&session([died()].into_iter().chain(again(2))), &seen),
            Action::BeginAgain
        );
        let twice = || [died()].into_iter().chain(again(2)).chain(again(3));
        assert_eq!(decide(&session(twice()), &seen), Action::Finish(SessionState::Failed));
        // Somebody has looked at it meanwhile.
        let retried = twice().chain([Entry::Attempt { number: 4 }, died()]);
        assert_eq!(decide(&session(retried), &seen), Action::BeginAgain);
    }

    #[test]
    fn what_needs_somebody_is_not() {
        let seen = Observed { may_begin_again: true, ..Observed::default() };
        let full = Entry::GaveUp(Failure::new("the target is full"));
        assert_eq!(decide(&session([full.clone()]), &seen), Action::Finish(SessionState::Failed));
        let died = Entry::GaveUp(Failure::new("the agent has died").passing());
        let stopped = session([died.clone(), Entry::GaveUp(Failure::new("stopped by the user"))]);
        assert_eq!(decide(&stopped, &seen), Action::Finish(SessionState::Failed));
        let later = session([full, died]);
        assert_eq!(decide(&later, &seen), Action::Finish(SessionState::Failed), "the first counts");
    }
}
