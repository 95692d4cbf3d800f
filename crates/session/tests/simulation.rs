//! The shipped journal folding and [`decide`] against a simulated agent, with faults at every step.
//!
//! The world below carries out actions the way the recovery service does, but in memory. A fault is drawn from a seed at each
//! turn: the agent dies, the server dies (the session is folded again from its records), a verb fails, the user stops or cancels.
//! Afterwards the session is retried without faults and must succeed, with each database delivered exactly once and nothing left.

use std::collections::BTreeSet;
use std::path::PathBuf;

use jiff::Timestamp;
use pgthaw_session::decide::{facts, step_of};
use pgthaw_session::observed::{DatabaseView, InstanceReady, RecoveryEnd, SelectedDatabase};
use pgthaw_session::session::{Entry, Intent, Place, Record, Session};
use pgthaw_session::{
    Action, AgentView, DatabaseState, ExportRequest, Failure, Observed, Progress, RecoveryChoice,
    RepositoryChoice, SessionState, Step, decide,
};

const DATABASES: [&str; 3] = ["crm", "sales", "warehouse"];

/// A small, seeded generator (SplitMix64), so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

struct World {
    random: Random,
    /// One in this many turns meets a fault; none when 0.
    fault_rate: u64,
    records: Vec<Record>,
    session: Session,
    check: Progress<()>,
    agent: Option<AgentView>,
    /// What lies on disk outside the target.
    place_exists: bool,
    /// Databases under their names in the target; how often each was renamed there.
    published: Vec<String>,
    recovered_to: BTreeSet<String>,
    sealed: u32,
    steps: BTreeSet<Step>,
}

fn request() -> ExportRequest {
    serde_json::from_value(serde_json::json!({
        "repository": RepositoryChoice {
            name: None, path: "/backups".into(), kind: None, stanza: None, wal_archives: vec![], backup_label: None, atomic_snapshot: false,
        },
        "databases": DATABASES, "target": "/srv/exports/monday", "recovery": RecoveryChoice::EndOfBackup,
        "jobs": 1, "globals": true, "role_passwords": true,
    }))
    .unwrap()
}

impl World {
    fn new(seed: u64, fault_rate: u64) -> Self {
        let created = Entry::Created { id: "s".into(), request: Box::new(request()) };
        let records: Vec<Record> = [created, Entry::Attempt { number: 1 }]
            .map(|entry| Record { at: Timestamp::UNIX_EPOCH, entry })
            .into();
        let session = Session::from_records(&records).unwrap();
        Self {
            random: Random(seed),
            fault_rate,
            records,
            session,
            check: Progress::Absent,
            agent: None,
            place_exists: false,
            published: Vec::new(),
            recovered_to: BTreeSet::new(),
            sealed: 0,
            steps: BTreeSet::new(),
        }
    }

    fn note(&mut self, entry: Entry) {
        self.session.apply(&entry);
        self.records.push(Record { at: Timestamp::UNIX_EPOCH, entry });
    }

    /// Works until the session rests; panics when it does not come to rest.
    fn run(&mut self) {
        for _turn in 0..10_000 {
            self.meet_a_fault();
            let seen = Observed {
                check: self.check.clone(),
                agent: self.agent.clone(),
                remains: false,
                waiting: None,
                may_begin_again: false,
            };
            for entry in facts(&self.session, &seen) {
                self.note(entry);
            }
            assert_eq!(
                Some(&self.session),
                Session::from_records(&self.records).as_ref(),
                "folding again gives the same"
            );
            let action = decide(&self.session, &seen);
            if let Some(step) = step_of(&action) {
                self.steps.insert(step);
                self.note(Entry::Step(step));
            }
            if !self.act(action) {
                return;
            }
        }
        panic!("the session does not come to rest: {:?}", self.session);
    }

    fn meet_a_fault(&mut self) {
        if self.fault_rate == 0 || !self.random.one_in(self.fault_rate) {
            return;
        }
        match self.random.next() % 6 {
            0 => self.agent = None,
            1 => {
                self.check = Progress::Absent; // the server died: what it held in memory is gone
                self.session = Session::from_records(&self.records).unwrap();
            }
            2 if self.session.intent == Intent::Run && self.session.sealed.is_none() => {
                self.note(Entry::GaveUp(Failure::new("stopped by the user")));
            }
            3 => {
                if let Some(agent) = &mut self.agent {
                    agent.broken = Some(Failure::new("the write layer is full"));
                }
            }
            4 => {
                let views = self.agent.iter_mut().flat_map(|agent| agent.databases.values_mut());
                for view in views.filter(|view| view.dump == Progress::Running) {
                    view.dump = Progress::Failed(Failure::new("pg_dump was killed"));
                }
            }
            _ => {
                if let Some(agent) = &mut self.agent
                    && agent.instance == Progress::Running
                {
                    agent.instance = Progress::Failed(Failure::new("postgres was killed"));
                }
            }
        }
    }

    /// Carries out one action; returns whether there is more to do.
    fn act(&mut self, action: Action) -> bool {
        match action {
            Action::Nothing => return false,
            Action::Wait => self.agent_works(),
            Action::Check => self.check = Progress::Done(()),
            Action::StartAgent => {
                let path = PathBuf::from("/var/tmp/pgthaw-s");
                self.note(Entry::Placed(Place {
                    host: None,
                    marker: "m".into(),
                    work_directory: path.clone(),
                    mountpoint: path.join("mount"),
                    mount_directories: vec![],
                    dump_directory: path.join("dump"),
                    target_directories: vec!["/srv/exports/monday".into()],
                }));
                assert!(!self.place_exists, "what an earlier attempt left was removed first");
                self.place_exists = true;
                self.agent = Some(AgentView::default());
            }
            Action::EnsureMount => self.agent().mount = Progress::Running,
            Action::EnsureInstance => self.agent().instance = Progress::Running,
            Action::EnsureGlobals => self.agent().globals = Progress::Running,
            Action::EnsureDump { database } => {
                let view = DatabaseView {
                    dump: Progress::Running,
                    transfer: Progress::Running,
                    ..DatabaseView::default()
                };
                assert!(
                    self.agent().databases.insert(database, view).is_none(),
                    "each is begun once per attempt"
                );
            }
            Action::Seal => {
                assert!(
                    DATABASES.iter().all(|name| self.published.iter().any(|p| p == name)),
                    "sealed with a database missing"
                );
                self.agent().seal = Progress::Running;
            }
            Action::GiveUp(failure) => self.note(Entry::GaveUp(failure)),
            Action::EnsureGone { everything } => {
                (self.agent, self.place_exists) = (None, false);
                if everything {
                    self.published.clear();
                }
                self.note(Entry::Cleaned);
            }
            Action::BeginAgain => unreachable!("only where there is time left"),
            Action::Finish(state) => self.note(Entry::State(state)),
        }
        true
    }

    fn agent(&mut self) -> &mut AgentView {
        self.agent.as_mut().expect("only an agent that is seen is asked")
    }

    /// Something in the agent comes to its end.
    fn agent_works(&mut self) {
        let end = self.session.recovery_end.clone();
        let Some(agent) = &mut self.agent else { return };
        if agent.mount == Progress::Running {
            agent.mount = Progress::Done(());
        } else if agent.instance == Progress::Running {
            let end = end.unwrap_or_else(|| RecoveryEnd {
                lsn: format!("0/{:X}", self.random.next() % 4096),
                timeline: 1,
                last_transaction: None,
                replayed: true,
            });
            self.recovered_to.insert(end.lsn.clone());
            agent.instance = Progress::Done(InstanceReady {
                recovery_end: end,
                server_version: "15.18".into(),
                isolation: String::new(),
                databases: DATABASES
                    .map(|name| SelectedDatabase {
                        name: name.into(),
                        bytes: 1,
                        tables: 1,
                        unlogged_tables: vec![],
                        error: None,
                    })
                    .into(),
                rolled_back: vec![],
                warnings: vec![],
            });
        } else if agent.globals == Progress::Running {
            agent.globals = Progress::Done(());
        } else if let Some((name, view)) =
            agent.databases.iter_mut().find(|(_, view)| view.transfer == Progress::Running)
        {
            match &view.dump {
                Progress::Running => view.dump = Progress::Done(()),
                Progress::Done(()) => {
                    if !self.published.contains(name) {
                        self.published.push(name.clone());
                    }
                    view.transfer = Progress::Done(1);
                }
                Progress::Failed(failure) => view.transfer = Progress::Failed(failure.clone()),
                Progress::Absent => unreachable!("both begin together"),
            }
        } else if agent.seal == Progress::Running {
            agent.seal = Progress::Done(3);
            self.sealed += 1;
        }
    }
}

#[test]
fn an_undisturbed_export_goes_through_every_step() {
    let mut world = World::new(1, 0);
    world.run();
    assert_eq!(world.session.state, SessionState::Succeeded);
    assert_eq!(world.published, DATABASES);
    assert!(!world.place_exists);
    let steps = [Step::Check, Step::Mount, Step::Recover, Step::Dump, Step::Deliver, Step::Clean];
    assert_eq!(world.steps.into_iter().collect::<Vec<_>>(), steps);
}

#[test]
fn whatever_is_killed_a_retry_delivers_everything_once_and_leaves_nothing() {
    for seed in 0..3000 {
        let mut world = World::new(seed, 4 + seed % 9);
        for attempt in 2.. {
            world.run();
            assert!(!world.place_exists, "seed {seed}: something is left");
            assert!(world.agent.is_none(), "seed {seed}: an agent is left");
            if world.session.state == SessionState::Succeeded {
                break;
            }
            assert_eq!(world.session.state, SessionState::Failed, "seed {seed}");
            world.fault_rate = if attempt > 4 { 0 } else { world.fault_rate };
            world.check = Progress::Absent;
            world.note(Entry::Attempt { number: attempt });
        }
        let mut published = world.published.clone();
        published.sort();
        assert_eq!(published, DATABASES, "seed {seed}");
        assert_eq!(world.session.delivered(), DATABASES, "seed {seed}");
    }
}

#[test]
fn a_cancel_at_any_turn_leaves_nothing() {
    for turns in 0..40 {
        let mut world = World::new(turns, 0);
        for _ in 0..turns {
            let seen = Observed {
                check: world.check.clone(),
                agent: world.agent.clone(),
                remains: false,
                waiting: None,
                may_begin_again: false,
            };
            facts(&world.session, &seen).into_iter().for_each(|entry| world.note(entry));
            let action = decide(&world.session, &seen);
            world.act(action);
        }
        world.note(Entry::CancelAsked);
        world.run();
        if world.sealed > 0 {
            // A complete export is no longer canceled, whether or not the journal knew of it.
            assert_eq!(world.session.state, SessionState::Succeeded, "after {turns} turns");
            assert_eq!(world.published.len(), DATABASES.len(), "after {turns} turns");
            assert!(!world.place_exists && world.agent.is_none(), "after {turns} turns");
            continue;
        }
        assert_eq!(world.session.state, SessionState::Canceled, "after {turns} turns");
        assert!(
            world.published.is_empty() && !world.place_exists && world.agent.is_none(),
            "after {turns} turns"
        );
    }
}

#[test]
fn one_failed_database_does_not_hold_back_the_others() {
    let mut world = World::new(1, 0);
    let mut failed = false;
    for _ in 0..200 {
        if let Some(view) = world.agent.as_mut().and_then(|agent| agent.databases.get_mut("crm"))
            && !failed
        {
            view.dump = Progress::Failed(Failure::new("permission denied"));
            view.transfer = Progress::Failed(Failure::new("permission denied"));
            failed = true;
        }
        let seen = Observed {
            check: world.check.clone(),
            agent: world.agent.clone(),
            remains: false,
            waiting: None,
            may_begin_again: false,
        };
        facts(&world.session, &seen).into_iter().for_each(|entry| world.note(entry));
        let action = decide(&world.session, &seen);
        if !world.act(action) {
            break;
        }
    }
    assert_eq!(world.session.state, SessionState::Failed);
    assert_eq!(world.published, ["sales", "warehouse"]);
    assert_eq!(world.sealed, 0, "no export.json while a database is missing");
    let failure = world.session.failure.clone().unwrap().message;
    assert_eq!(failure, "1 of 3 databases failed: `crm`");
    world.note(Entry::Attempt { number: 2 });
    world.check = Progress::Absent;
    world.run();
    assert_eq!(world.session.state, SessionState::Succeeded);
    assert!(world.session.databases.iter().flatten().all(|d| d.state == DatabaseState::Delivered));
}
