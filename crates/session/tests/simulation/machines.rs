//! The machines outside of the server: a staging server with agents, and a target.

use std::collections::BTreeMap;

use pgthaw_session::observed::{DatabaseView, InstanceReady, RecoveryEnd, SelectedDatabase};
use pgthaw_session::session::{Place, Session};
use pgthaw_session::{AgentView, Failure, Progress};

use crate::random::Random;

/// What is exported.
pub const DATABASES: [&str; 3] = ["crm", "sales", "warehouse"];

/// Seconds for which an agent waits for a machine before it gives up.
const STALL_LIMIT: u64 = 1800;

/// What is left out on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftOut {
    Nothing,
    /// The sync of one kind of record.
    Sync(&'static str),
    /// The lock of the journal.
    Lock,
    /// The journal's word of a place before anything is made there.
    WordOfPlace,
    /// The marker of PostgreSQL's processes.
    Marker,
    /// The rename: databases grow under their names.
    Rename,
}

/// What a session has at one place of the staging server.
#[derive(Debug, Default)]
pub struct Standing {
    pub agent: Option<Agent>,
    /// A process of PostgreSQL runs; it may outlive its agent for a while.
    pub postgres: bool,
}

/// An agent that lives.
#[derive(Debug)]
pub struct Agent {
    pub view: AgentView,
    /// Where it was told to recover to.
    end: Option<RecoveryEnd>,
    /// It is stopped, and answers nothing.
    pub hung: bool,
    stalled_since: Option<u64>,
    /// The end of something is under way.
    pub at_work: bool,
}

/// One database under its name in the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    /// Where the instance had recovered to.
    pub end: String,
    pub whole: bool,
}

/// What is in the target's directory.
#[derive(Debug, Default)]
pub struct Target {
    pub staged: bool,
    pub published: BTreeMap<String, Delivered>,
    /// `export.json`.
    pub sealed: bool,
}

/// What cannot be reached, and what is full, until when.
#[derive(Debug, Default, Clone, Copy)]
pub struct Troubles {
    pub staging_away: u64,
    pub target_away: u64,
    pub repository_away: u64,
    pub write_layer_full: u64,
    pub dump_full: u64,
    pub target_full: u64,
}

/// Everything outside of the server.
#[derive(Debug)]
pub struct Machines {
    pub random: Random,
    /// Seconds since the beginning.
    pub now: u64,
    pub left_out: LeftOut,
    /// The staging server is the mount server itself.
    pub together: bool,
    pub troubles: Troubles,
    /// Things go wrong.
    pub troubled: bool,
    /// By the marker of each place.
    pub standing: BTreeMap<String, Standing>,
    pub target: Target,
    /// The next dump of this database fails.
    pub fails_once: Option<&'static str>,
    /// How often each database's dump came to an end.
    pub dumps: BTreeMap<String, u32>,
    /// Places whose agent has just begun something: its end has to come.
    pub begun: Vec<String>,
    /// A server lives, which keeps the connections up.
    pub served: bool,
    /// The server dies after so many more things that it does.
    pub server_dies_in: Option<u32>,
    pub places: u32,
}

/// The server has died in the middle of something.
#[derive(Debug)]
pub struct Died;

impl Machines {
    /// Between any two things that the server does it may die.
    pub fn may_die(&mut self) -> Result<(), Died> {
        match &mut self.server_dies_in {
            Some(0) => {
                self.server_dies_in = None;
                Err(Died)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub fn staging_is_away(&self) -> bool {
        !self.together && self.now < self.troubles.staging_away
    }

    pub fn target_is_away(&self) -> bool {
        self.now < self.troubles.target_away
    }

    /// Starts an agent at `place`, which makes its directories.
    pub fn start_agent(&mut self, place: &Place, session: &Session) -> bool {
        if self.staging_is_away() {
            return false;
        }
        let agent = Agent {
            view: AgentView::default(),
            end: session.recovery_end.clone(),
            hung: false,
            stalled_since: None,
            at_work: false,
        };
        self.standing
            .insert(place.marker.clone(), Standing { agent: Some(agent), postgres: false });
        true
    }

    /// Asks the agent at `marker` for something; it may not hear it.
    pub fn ask(&mut self, marker: &str, verb: impl FnOnce(&mut AgentView)) {
        let away = self.staging_is_away();
        let agent = self.standing.get_mut(marker).and_then(|standing| standing.agent.as_mut());
        if let Some(agent) = agent.filter(|agent| !away && !agent.hung) {
            verb(&mut agent.view);
            if !agent.at_work {
                agent.at_work = true;
                self.begun.push(marker.to_owned());
            }
        }
    }

    /// The agent at `marker`, with what it has for PostgreSQL, dies.
    pub fn kill_agent(&mut self, marker: &str) {
        let outlived = self.random.one_in(2);
        if let Some(standing) = self.standing.get_mut(marker)
            && standing.agent.take().is_some()
        {
            standing.postgres &= outlived;
        }
    }

    /// Removes what is at the journal's place, and what the session has in the target; returns what could not be removed, and whether the
    /// export turned out to be complete.
    pub fn undo(
        &mut self,
        session: &Session,
        everything: bool,
    ) -> Result<(Vec<String>, bool), Died> {
        let mut failed = Vec::new();
        if let Some(place) = &session.place {
            if self.staging_is_away() {
                failed.push("the staging server cannot be reached".to_owned());
            } else if let Some(standing) = self.standing.get_mut(&place.marker) {
                // Its processes by their marker, then its directories.
                standing.agent = None;
                standing.postgres &= self.left_out == LeftOut::Marker;
                self.may_die()?;
                if !self.standing[&place.marker].postgres {
                    self.standing.remove(&place.marker);
                }
            }
        }
        self.may_die()?;
        let sealed = self.target.sealed;
        if self.target_is_away() {
            failed.push("the target cannot be reached".to_owned());
            return Ok((failed, false));
        }
        if sealed || everything {
            self.target.staged = false;
        }
        if everything && !sealed {
            while let Some(name) = self.target.published.keys().next().cloned() {
                self.target.published.remove(&name);
                self.may_die()?;
            }
        }
        Ok((failed, sealed))
    }

    /// Something of the agent at `marker` comes to its end, unless it has to wait. Returns whether there is more to come.
    pub fn work(&mut self, marker: &str) -> bool {
        let now = self.now;
        let repository = self.now < self.troubles.repository_away || self.staging_cut_off();
        let target = self.target_is_away() || self.staging_cut_off();
        let choice = self.random.below(1 << 32) as usize;
        let lsn = format!("0/{:X}", 0x100_0000 + now); // the archive grows while nobody recovers
        let dump_full = now < self.troubles.dump_full;
        let target_full = now < self.troubles.target_full;
        let layer_full = now < self.troubles.write_layer_full;
        let Some(agent) = self.standing.get_mut(marker).and_then(|found| found.agent.as_mut())
        else {
            return false;
        };
        if agent.hung {
            return true;
        }
        agent.view.version += 1;
        let running = agent.running();
        let Some(what) = running.get(choice % running.len().max(1)) else {
            agent.at_work = false;
            return false;
        };
        if layer_full && matches!(what, Work::Instance | Work::Dump(_)) {
            agent.view.broken = Some(Failure::new("the write layer is full"));
            return true;
        }
        // Reads wait for the repository, delivery for the target.
        let away = match what {
            Work::Mount | Work::Instance | Work::Globals | Work::Dump(_) => repository,
            Work::Transfer(_) | Work::Seal => target,
        };
        if away {
            let since = *agent.stalled_since.get_or_insert(now);
            agent.view.waiting_for_repository = Some("the repository cannot be reached".into());
            if now - since > STALL_LIMIT {
                agent.view.broken = Some(Failure::new("the repository could not be read"));
            }
            return true;
        }
        agent.stalled_since = None;
        agent.view.waiting_for_repository = None;
        let mut postgres = false;
        match what.clone() {
            Work::Mount => agent.view.mount = Progress::Done(()),
            Work::Instance => {
                let end = agent.end.clone().unwrap_or_else(|| recovered_to(lsn));
                agent.view.instance = Progress::Done(ready(end));
                postgres = true;
            }
            Work::Globals => agent.view.globals = Progress::Done(()),
            Work::Dump(name) => {
                let fails = self.fails_once.take_if(|fails| *fails == name).is_some();
                *self.dumps.entry(name.clone()).or_default() += 1;
                let view = agent.view.databases.get_mut(&name).expect("it runs");
                view.dump = match dump_full || fails {
                    true => Progress::Failed(Failure::new("pg_dump failed")),
                    false => Progress::Done(()),
                };
            }
            Work::Transfer(name) => {
                let end = agent.end_of_recovery();
                let view = agent.view.databases.get_mut(&name).expect("it runs");
                self.target.staged = true;
                if let Progress::Failed(failure) = &view.dump {
                    view.transfer = Progress::Failed(failure.clone());
                } else if target_full {
                    view.transfer = Progress::Failed(Failure::new("no room in the target"));
                } else if view.dump == Progress::Done(()) {
                    let whole = self.left_out != LeftOut::Rename;
                    let before = self.target.published.insert(name, Delivered { end, whole });
                    if whole || before.is_some() {
                        view.transfer = Progress::Done(1);
                    }
                }
            }
            Work::Seal => {
                let all = DATABASES.iter().all(|name| self.target.published.contains_key(*name));
                if all {
                    (self.target.sealed, self.target.staged) = (true, false);
                    agent.view.seal = Progress::Done(3);
                } else {
                    agent.view.seal = Progress::Failed(Failure::new("a database is missing"));
                }
            }
        }
        self.standing.get_mut(marker).expect("it was found").postgres |= postgres;
        // What it did may stay its secret.
        if self.troubled && choice.is_multiple_of(29) {
            self.kill_agent(marker);
            return false;
        }
        true
    }

    /// The staging server has no connection that the server would keep up.
    fn staging_cut_off(&self) -> bool {
        !self.together && (!self.served || self.staging_is_away())
    }
}

/// Something that an agent is at.
#[derive(Debug, Clone)]
enum Work {
    Mount,
    Instance,
    Globals,
    Dump(String),
    Transfer(String),
    Seal,
}

impl Agent {
    fn running(&self) -> Vec<Work> {
        let view = &self.view;
        let mut running = Vec::new();
        let verbs = [
            (view.mount == Progress::Running, Work::Mount),
            (view.instance == Progress::Running, Work::Instance),
            (view.globals == Progress::Running, Work::Globals),
            (view.seal == Progress::Running, Work::Seal),
        ];
        running.extend(verbs.into_iter().filter(|(runs, _)| *runs).map(|(_, what)| what));
        for (name, database) in &view.databases {
            if database.dump == Progress::Running {
                running.push(Work::Dump(name.clone()));
            } else if database.transfer == Progress::Running {
                running.push(Work::Transfer(name.clone()));
            }
        }
        running
    }

    /// The end of the instance that its dumps come from.
    fn end_of_recovery(&self) -> String {
        match &self.view.instance {
            Progress::Done(ready) => ready.recovery_end.lsn.clone(),
            _ => "none".into(),
        }
    }
}

fn recovered_to(lsn: String) -> RecoveryEnd {
    RecoveryEnd { lsn, timeline: 1, last_transaction: None, replayed: true }
}

fn ready(recovery_end: RecoveryEnd) -> InstanceReady {
    let selected = |name: &str| SelectedDatabase {
        name: name.into(),
        bytes: 1,
        tables: 1,
        unlogged_tables: vec![],
        error: None,
    };
    InstanceReady {
        recovery_end,
        server_version: "15.18".into(),
        isolation: String::new(),
        databases: DATABASES.map(selected).into(),
        rolled_back: vec![],
        warnings: vec![],
    }
}

/// A database's dump and delivery begin together.
pub fn begun() -> DatabaseView {
    DatabaseView { dump: Progress::Running, transfer: Progress::Running, ..DatabaseView::default() }
}
