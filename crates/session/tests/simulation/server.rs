//! A server that works on the session as the recovery service does: observe, journal the facts, decide, act.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgthaw_session::decide::{facts, step_of};
use pgthaw_session::session::{Entry, Intent, Place, Session};
use pgthaw_session::{
    Action, AgentView, Failure, Journal, JournalError, Observed, Progress, SessionState, decide,
};

use crate::disk::{Disk, Opened};
use crate::machines::{Died, LeftOut, Machines, begun};

/// What a user says to a session at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    Stop,
    Cancel,
}

/// Why a server stops working.
pub enum Ended {
    /// Nothing is to be done before something changes.
    Waits,
    /// The session has ended, or needs a retry.
    Rests,
    Died,
    /// Something that must never happen.
    Wrong(String),
}

impl From<Died> for Ended {
    fn from(Died: Died) -> Self {
        Self::Died
    }
}

/// One server process, with the session that it owns.
pub struct Server {
    journal: Journal<Opened>,
    pub session: Session,
    check: Progress<()>,
    /// The marker of the place whose agent it knows.
    agent: Option<String>,
    seen: Option<AgentView>,
    pub words: VecDeque<Word>,
}

impl Server {
    /// Takes the session up from its journal; nothing if there is none yet.
    pub fn start(disk: &Disk, number: u32) -> Result<Option<Self>, JournalError> {
        let (journal, contents) = Journal::take(Path::new("journal"), disk.open(number))?;
        let Some(session) = Session::from_records(&contents.records) else { return Ok(None) };
        Ok(Some(Self {
            journal,
            check: if session.checked { Progress::Done(()) } else { Progress::Absent },
            agent: session.place.as_ref().map(|place| place.marker.clone()),
            session,
            seen: None,
            words: VecDeque::new(),
        }))
    }

    /// Begins a new session, as a request does.
    pub fn create(
        disk: &Disk,
        entries: impl IntoIterator<Item = Entry>,
    ) -> Result<(), JournalError> {
        let (mut journal, _) = Journal::take(Path::new("journal"), disk.open(0))?;
        entries
            .into_iter()
            .try_for_each(|entry| journal.append(Timestamp::UNIX_EPOCH, entry).map(drop))
    }

    /// Begins the session again.
    pub fn retry(&mut self, machines: &mut Machines) -> Result<(), Died> {
        let number = self.session.attempts + 1;
        self.note(machines, Entry::Attempt { number })?;
        self.check = Progress::Absent;
        self.agent = self.session.place.as_ref().map(|place| place.marker.clone());
        Ok(())
    }

    /// Asks for the end of a session that has failed.
    pub fn cancel(&mut self, machines: &mut Machines) -> Result<(), Died> {
        self.note(machines, Entry::CancelAsked)
    }

    /// Works until there is nothing to do.
    pub fn work(&mut self, machines: &mut Machines) -> Ended {
        for _turn in 0..1000 {
            match self.turn(machines) {
                Ok(true) => {}
                Ok(false) => return Ended::Waits,
                Err(ended) => return ended,
            }
        }
        Ended::Wrong(format!("the session does not come to rest: {:?}", self.session))
    }

    /// Does one thing; returns whether there may be more.
    fn turn(&mut self, machines: &mut Machines) -> Result<bool, Ended> {
        while let Some(word) = self.words.pop_front() {
            self.obey(machines, word)?;
        }
        let seen = self.observe(machines);
        for entry in facts(&self.session, &seen) {
            self.note(machines, entry)?;
        }
        let action = decide(&self.session, &seen);
        if let Some(step) = step_of(&action).filter(|step| *step != self.session.step) {
            self.note(machines, Entry::Step(step))?;
        }
        self.act(machines, action)
    }

    fn obey(&mut self, machines: &mut Machines, word: Word) -> Result<(), Died> {
        match word {
            Word::Stop if self.session.intent == Intent::Run && self.session.sealed.is_none() => {
                self.give_up(machines, "stopped by the user")
            }
            Word::Cancel if self.session.sealed.is_none() => {
                self.note(machines, Entry::CancelAsked)
            }
            Word::Stop | Word::Cancel => Ok(()),
        }
    }

    /// What is seen of the agent; while its machine is away, what was seen last.
    fn observe(&mut self, machines: &Machines) -> Observed {
        let standing = self.agent.as_ref().and_then(|marker| machines.standing.get(marker));
        let agent = standing.and_then(|standing| standing.agent.as_ref());
        let hung = agent.is_some_and(|agent| agent.hung);
        let waiting = if self.agent.is_some() && machines.staging_is_away() {
            Some("the staging server cannot be reached".to_owned())
        } else if hung && !machines.together {
            Some("no answer in time".to_owned())
        } else {
            // One of this machine that does not answer counts as dead.
            self.seen = agent.filter(|_| !hung).map(|agent| agent.view.clone());
            None
        };
        Observed {
            check: self.check.clone(),
            agent: self.seen.clone(),
            remains: false,
            waiting,
            may_begin_again: true,
        }
    }

    fn act(&mut self, machines: &mut Machines, action: Action) -> Result<bool, Ended> {
        machines.may_die()?;
        match action {
            Action::Nothing => return Err(Ended::Rests),
            Action::Wait => return Ok(false),
            Action::Check => self.check(machines)?,
            Action::StartAgent => self.start_agent(machines)?,
            Action::EnsureMount => return self.ask(machines, |view| begin(&mut view.mount)),
            Action::EnsureInstance => return self.ask(machines, |view| begin(&mut view.instance)),
            Action::EnsureGlobals => return self.ask(machines, |view| begin(&mut view.globals)),
            Action::EnsureDump { database } => {
                return self.ask(machines, |view| {
                    view.databases.entry(database).or_insert_with(begun);
                });
            }
            Action::Seal => return self.ask(machines, |view| begin(&mut view.seal)),
            Action::GiveUp(failure) => self.note(machines, Entry::GaveUp(failure))?,
            Action::EnsureGone { everything } => self.remove(machines, everything)?,
            Action::BeginAgain => {
                self.note(machines, Entry::AgainByItself)?;
                self.retry(machines)?;
            }
            Action::Finish(state) => {
                self.note(machines, Entry::State(state))?;
                return Err(Ended::Rests);
            }
        }
        Ok(true)
    }

    fn ask(
        &mut self,
        machines: &mut Machines,
        verb: impl FnOnce(&mut AgentView),
    ) -> Result<bool, Ended> {
        let marker = self.agent.clone();
        let marker = marker.ok_or_else(|| Ended::Wrong("an agent that is seen is known".into()))?;
        machines.ask(&marker, verb);
        machines.may_die()?;
        Ok(false)
    }

    fn check(&mut self, machines: &mut Machines) -> Result<(), Died> {
        if machines.target_is_away() {
            return self.give_up(machines, "the target cannot be reached");
        }
        if machines.target.sealed {
            return self.remove(machines, false); // which finds that it is complete
        }
        self.check = match machines.staging_is_away() {
            true => Progress::Failed(Failure::new("the staging server cannot be reached")),
            false => Progress::Done(()),
        };
        Ok(())
    }

    fn start_agent(&mut self, machines: &mut Machines) -> Result<(), Died> {
        if machines.staging_is_away() {
            return self.give_up(machines, "the staging server cannot be reached");
        }
        machines.places += 1;
        let path = PathBuf::from("/var/tmp/pgthaw-s");
        let place = Place {
            host: None,
            marker: format!("m{}", machines.places),
            accounts: Vec::new(),
            work_directory: path.clone(),
            mountpoint: path.join("mount"),
            mount_directories: vec![],
            dump_directory: path.join("dump"),
            target_directories: vec!["/srv/exports/monday".into()],
        };
        let started = if machines.left_out == LeftOut::WordOfPlace {
            let started = machines.start_agent(&place, &self.session);
            self.note(machines, Entry::Placed(place.clone()))?;
            started
        } else {
            self.note(machines, Entry::Placed(place.clone()))?;
            machines.start_agent(&place, &self.session)
        };
        machines.may_die()?;
        self.agent = Some(place.marker);
        match started {
            true => Ok(()),
            false => self.give_up(machines, "the session's agent did not start"),
        }
    }

    fn remove(&mut self, machines: &mut Machines, everything: bool) -> Result<(), Died> {
        (self.agent, self.seen) = (None, None);
        let (failed, sealed) = machines.undo(&self.session, everything)?;
        if sealed && self.session.sealed.is_none() {
            self.note(machines, Entry::Sealed { bytes: 3 })?;
        }
        if failed.is_empty() {
            return self.note(machines, Entry::Cleaned);
        }
        self.give_up(machines, &format!("could not remove: {}", failed.join("; ")))?;
        self.note(machines, Entry::State(SessionState::Failed))
    }

    fn give_up(&mut self, machines: &mut Machines, why: &str) -> Result<(), Died> {
        self.note(machines, Entry::GaveUp(Failure::new(why)))
    }

    /// Writes `entry` into the journal and takes it in.
    fn note(&mut self, machines: &mut Machines, entry: Entry) -> Result<(), Died> {
        let at = Timestamp::from_second(machines.now.cast_signed()).expect("not so long");
        let record = self.journal.append(at, entry).map_err(|_| Died)?;
        machines.may_die()?;
        self.session.apply(&record.entry);
        Ok(())
    }
}

fn begin<T: PartialEq>(progress: &mut Progress<T>) {
    if *progress == Progress::Absent {
        *progress = Progress::Running;
    }
}
