//! One session's world: machines, servers that come and go, a user, and faults drawn from a seed, under virtual time.

use std::collections::BTreeMap;

use pgthaw_session::session::{Entry, Session};
use pgthaw_session::{
    ExportRequest, Failure, JournalError, Progress, RecoveryChoice, RepositoryChoice, SessionState,
};

use crate::disk::Disk;
use crate::machines::{DATABASES, LeftOut, Machines, Target, Troubles};
use crate::random::Random;
use crate::server::{Ended, Server, Word};

/// Faults begin within so many seconds.
const TROUBLED: u64 = 1500;
/// The longest a fault lasts, in seconds: longer than an agent waits.
const LONGEST: u64 = 2400;
/// Nothing takes longer than this once the world has healed.
const PATIENCE: u64 = 100_000;

/// Something that happens at a given time.
#[derive(Debug, Clone)]
enum Event {
    /// Something of the agent at this place comes to its end.
    Work(String),
    Fault(Fault),
    /// A server is started, by a command of the user or at boot.
    ServerStarts,
    /// A stopped agent goes on.
    AgentGoesOn,
    UserRetries,
    UserCancels,
    /// Nothing more goes wrong, and what was away is back.
    Healed,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// After so many more things that it does.
    ServerDies(u32),
    /// In so many syncs of its journal; the machine's power fails with it.
    PowerFails(u32),
    /// In so many syncs of its journal.
    ServerDiesWriting(u32),
    AgentDies,
    AgentStops,
    StagingReboots,
    StagingAway,
    TargetAway,
    RepositoryAway,
    WriteLayerFull,
    DumpFull,
    TargetFull,
    PostgresDies,
    PgDumpDies,
    UserStops,
    UserCancels,
    SecondServer,
}

impl Fault {
    fn draw(random: &mut Random) -> Self {
        match random.below(34) {
            0..4 => Self::ServerDies(random.below(9) as u32),
            4..8 => Self::PowerFails(random.below(6) as u32),
            8..11 => Self::ServerDiesWriting(random.below(6) as u32),
            11..14 => Self::AgentDies,
            14 | 15 => Self::AgentStops,
            16..19 => Self::StagingReboots,
            19..22 => Self::StagingAway,
            22 | 23 => Self::TargetAway,
            24 => Self::RepositoryAway,
            25 => Self::WriteLayerFull,
            26 => Self::DumpFull,
            27 => Self::TargetFull,
            28 => Self::PostgresDies,
            29 => Self::PgDumpDies,
            30 => Self::UserStops,
            31 => Self::UserCancels,
            _ => Self::SecondServer,
        }
    }
}

/// How the session ended.
#[derive(Debug)]
pub struct End {
    pub session: Session,
    pub target: Target,
    /// Retries that were needed once the world had healed.
    pub retries: u32,
    /// How often each database's dump came to an end.
    pub dumps: BTreeMap<String, u32>,
}

pub struct World {
    machines: Machines,
    disk: Disk,
    server: Option<Server>,
    servers: u32,
    events: BTreeMap<(u64, u64), Event>,
    /// Numbers events of one second.
    number: u64,
    /// The machine's power fails when its server dies next.
    power_ends: bool,
    canceled: bool,
    retries: u32,
    /// What happened, if somebody wants to know.
    pub trace: Option<Vec<String>>,
}

impl World {
    /// A world in which nothing goes wrong. `leave_out` is left out of what carries the session out.
    pub fn new(seed: u64, leave_out: LeftOut) -> Self {
        let mut random = Random(seed);
        let disk = match leave_out {
            LeftOut::Sync(of) => Disk::default().without_sync_of(of),
            LeftOut::Lock => Disk::default().without_lock(),
            _ => Disk::default(),
        };
        let machines = Machines {
            together: random.one_in(3),
            random,
            now: 0,
            left_out: leave_out,
            troubles: Troubles::default(),
            troubled: false,
            standing: BTreeMap::new(),
            target: Target::default(),
            fails_once: None,
            dumps: BTreeMap::new(),
            begun: Vec::new(),
            served: false,
            server_dies_in: None,
            places: 0,
        };
        let mut world = Self {
            machines,
            disk,
            server: None,
            servers: 0,
            events: BTreeMap::new(),
            number: 0,
            power_ends: false,
            canceled: false,
            retries: 0,
            trace: None,
        };
        world.at(0, Event::ServerStarts);
        world.at(0, Event::Healed);
        world
    }

    /// A world in which things go wrong for a while.
    pub fn troubled(seed: u64, leave_out: LeftOut) -> Self {
        let mut world = Self::new(seed, leave_out);
        world.machines.troubled = true;
        world.events.retain(|_, event| !matches!(event, Event::Healed));
        for _ in 0..1 + world.machines.random.below(8) {
            let fault = Fault::draw(&mut world.machines.random);
            let at = world.machines.random.below(TROUBLED);
            world.at(at, Event::Fault(fault));
        }
        world.at(TROUBLED + LONGEST, Event::Healed);
        world
    }

    /// The user cancels after so many seconds.
    pub fn cancel_after(mut self, seconds: u64) -> Self {
        self.at(seconds, Event::UserCancels);
        self
    }

    /// One dump of this database fails.
    pub fn failing_once(mut self, database: &'static str) -> Self {
        self.machines.fails_once = Some(database);
        self
    }

    /// Lets the session come to its end.
    ///
    /// # Errors
    /// What must never happen, but did.
    pub fn run(mut self) -> Result<End, (String, Vec<String>)> {
        let ended = self.until_the_end();
        let Self { machines, trace, retries, .. } = self;
        match ended {
            Ok(session) => {
                Ok(End { session, target: machines.target, retries, dumps: machines.dumps })
            }
            Err(wrong) => {
                Err((format!("after {} s: {wrong}", machines.now), trace.unwrap_or_default()))
            }
        }
    }

    fn until_the_end(&mut self) -> Result<Session, String> {
        let entries = [
            Entry::Created { id: "s".into(), request: Box::new(request()) },
            Entry::Attempt { number: 1 },
        ];
        Server::create(&self.disk, entries).map_err(|err| err.to_string())?;
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.machines.now = self.machines.now.max(at);
            if self.machines.now > PATIENCE {
                return Err("the session does not end".into());
            }
            if let Some(trace) = &mut self.trace {
                trace.push(format!("{at} s: {event:?}"));
            }
            self.happen(event)?;
            self.let_the_server_work()?;
            self.look_for_wrong()?;
            if self.events.is_empty()
                && let Some(session) = self.rest()?
            {
                return Ok(session);
            }
        }
        Err("nothing happens any more, and the session has not ended".into())
    }

    fn at(&mut self, time: u64, event: Event) {
        self.number += 1;
        self.events.insert((time, self.number), event);
    }

    fn soon(&mut self, event: Event) {
        let in_a_while = 1 + self.machines.random.below(60);
        self.at(self.machines.now + in_a_while, event);
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Work(marker) => {
                if self.machines.work(&marker) {
                    self.soon(Event::Work(marker));
                }
            }
            Event::Fault(fault) => self.fault(fault)?,
            Event::ServerStarts => self.start_server()?,
            Event::AgentGoesOn => {
                let agents = self.machines.standing.values_mut();
                agents
                    .filter_map(|found| found.agent.as_mut())
                    .for_each(|agent| agent.hung = false);
            }
            Event::UserCancels => self.cancel(),
            Event::UserRetries => self.retry(),
            Event::Healed => {
                self.machines.troubled = false;
                self.power_ends = false;
                self.machines.troubles = Troubles::default();
                self.machines.server_dies_in = None;
                self.disk.die_in(u32::MAX);
                self.happen(Event::AgentGoesOn)?;
                self.start_server()?;
            }
        }
        Ok(())
    }

    fn start_server(&mut self) -> Result<(), String> {
        self.servers += 1;
        match (Server::start(&self.disk, self.servers), &self.server) {
            (Ok(_), Some(_)) => return Err("two servers own the session".into()),
            (Ok(started), None) => self.server = started,
            (Err(JournalError::Owned { .. }), Some(_)) => return Ok(()),
            (Err(JournalError::Io { .. }), None) => {
                self.server_died();
                return Ok(());
            }
            (Err(err), _) => return Err(err.to_string()),
        }
        match self.server {
            Some(_) => Ok(()),
            None => Err("a session that was begun is gone".into()),
        }
    }

    fn fault(&mut self, fault: Fault) -> Result<(), String> {
        let until = self.machines.now + 1 + self.machines.random.below(LONGEST);
        let troubles = &mut self.machines.troubles;
        match fault {
            Fault::ServerDies(after) => match self.machines.random.one_in(2) {
                true => self.server_dies(),
                false => self.machines.server_dies_in = Some(after),
            },
            Fault::PowerFails(0) => self.power_fails(),
            // What was appended last is there in part at most.
            Fault::PowerFails(syncs) => {
                self.power_ends = true;
                self.disk.die_in(syncs - 1);
            }
            Fault::ServerDiesWriting(syncs) => self.disk.die_in(syncs),
            Fault::AgentDies => self.all_agents_die(),
            Fault::AgentStops => {
                let agents = self.machines.standing.values_mut();
                agents.filter_map(|found| found.agent.as_mut()).for_each(|agent| agent.hung = true);
                self.at(until, Event::AgentGoesOn);
            }
            Fault::StagingReboots => {
                if self.machines.together {
                    self.power_fails();
                }
                self.all_agents_die();
                self.machines.standing.values_mut().for_each(|standing| standing.postgres = false);
            }
            Fault::StagingAway => troubles.staging_away = until,
            Fault::TargetAway => troubles.target_away = until,
            Fault::RepositoryAway => troubles.repository_away = until,
            Fault::WriteLayerFull => troubles.write_layer_full = until,
            Fault::DumpFull => troubles.dump_full = until,
            Fault::TargetFull => troubles.target_full = until,
            Fault::PostgresDies => {
                for standing in self.machines.standing.values_mut() {
                    standing.postgres = false;
                    if let Some(agent) = &mut standing.agent
                        && agent.view.instance != Progress::Absent
                    {
                        agent.view.broken = Some(Failure::new("PostgreSQL has ended"));
                    }
                }
            }
            Fault::PgDumpDies => {
                let agents = self.machines.standing.values_mut().filter_map(|s| s.agent.as_mut());
                for view in agents.flat_map(|agent| agent.view.databases.values_mut()) {
                    if view.dump == Progress::Running {
                        view.dump = Progress::Failed(Failure::new("pg_dump was killed"));
                    }
                }
            }
            Fault::UserStops => {
                if let Some(server) = &mut self.server {
                    server.words.push_back(Word::Stop);
                }
            }
            Fault::UserCancels => self.cancel(),
            Fault::SecondServer => self.start_server()?,
        }
        Ok(())
    }

    fn all_agents_die(&mut self) {
        let markers: Vec<String> = self.machines.standing.keys().cloned().collect();
        markers.iter().for_each(|marker| self.machines.kill_agent(marker));
    }

    fn power_fails(&mut self) {
        self.power_ends = false;
        self.server_dies();
        self.disk.lose_power(&mut self.machines.random);
        if self.machines.together {
            self.all_agents_die();
            self.machines.standing.values_mut().for_each(|standing| standing.postgres = false);
        }
    }

    /// A server has met the death that was prepared for it.
    fn server_died(&mut self) {
        match self.power_ends {
            true => self.power_fails(),
            false => self.server_dies(),
        }
    }

    fn server_dies(&mut self) {
        self.server = None;
        self.machines.server_dies_in = None;
        self.soon(Event::ServerStarts);
    }

    fn cancel(&mut self) {
        if let Some(server) = &mut self.server {
            self.canceled = true;
            match server.session.state {
                SessionState::Failed => {
                    if server.cancel(&mut self.machines).is_err() {
                        self.server_died();
                    }
                }
                _ => server.words.push_back(Word::Cancel),
            }
        }
    }

    fn retry(&mut self) {
        if let Some(server) = &mut self.server
            && server.session.state == SessionState::Failed
            && server.retry(&mut self.machines).is_err()
        {
            self.server_died();
        }
    }

    fn let_the_server_work(&mut self) -> Result<(), String> {
        self.machines.served = self.server.is_some();
        let Some(mut server) = self.server.take() else { return Ok(()) };
        let ended = server.work(&mut self.machines);
        let rests = matches!(ended, Ended::Rests);
        match ended {
            Ended::Waits | Ended::Rests => self.server = Some(server),
            Ended::Died => {
                drop(server);
                self.server_died();
            }
            Ended::Wrong(wrong) => return Err(wrong),
        }
        for marker in std::mem::take(&mut self.machines.begun) {
            self.soon(Event::Work(marker));
        }
        // A user who sees that it has failed tries again, sooner or later.
        if rests && self.machines.troubled && self.machines.random.one_in(8) {
            self.soon(Event::UserRetries);
        }
        Ok(())
    }

    /// What must never be seen, whatever else is wrong.
    fn look_for_wrong(&self) -> Result<(), String> {
        let target = &self.machines.target;
        if let Some((name, _)) = target.published.iter().find(|(_, database)| !database.whole) {
            return Err(format!("{name} can be seen, and is not whole"));
        }
        let mut ends: Vec<&str> =
            target.published.values().map(|database| database.end.as_str()).collect();
        ends.sort_unstable();
        ends.dedup();
        if ends.len() > 1 {
            return Err(format!("databases of different recoveries can be seen: {ends:?}"));
        }
        if target.sealed && target.published.len() != DATABASES.len() {
            return Err("an export looks complete, and is not".into());
        }
        let agents = self.machines.standing.values().filter(|found| found.agent.is_some());
        if agents.count() > 1 {
            return Err("two agents work on the session".into());
        }
        Ok(())
    }

    /// Nothing is to come any more: what a user does then; the session once it is at its end.
    fn rest(&mut self) -> Result<Option<Session>, String> {
        let Some(server) = &self.server else { return Err("no server is left".into()) };
        match server.session.state {
            SessionState::Failed if self.retries == 0 => {
                self.retries += 1;
                match self.canceled && self.machines.random.one_in(2) {
                    true => self.soon(Event::UserCancels),
                    false => self.soon(Event::UserRetries),
                }
                Ok(None)
            }
            SessionState::Succeeded | SessionState::Canceled => {
                let session = server.session.clone();
                self.look_for_leftovers(&session)?;
                self.read_again(&session)?;
                Ok(Some(session))
            }
            state => Err(format!(
                "in a healed world the session rests as {state:?}: {:?}",
                server.session.failure
            )),
        }
    }

    fn look_for_leftovers(&self, session: &Session) -> Result<(), String> {
        if !self.machines.standing.is_empty() {
            return Err(format!("left on the staging server: {:?}", self.machines.standing));
        }
        let target = &self.machines.target;
        if target.staged {
            return Err("the session's own directory is left in the target".into());
        }
        if session.state == SessionState::Succeeded && !target.sealed {
            return Err("it has succeeded, but the export is not complete".into());
        }
        if session.state == SessionState::Canceled && !target.published.is_empty() {
            return Err("it was canceled, but databases are left in the target".into());
        }
        Ok(())
    }

    /// What the journal tells is what the server knew.
    fn read_again(&mut self, session: &Session) -> Result<(), String> {
        self.server = None;
        self.start_server()?;
        let read = self.server.as_ref().map(|server| &server.session);
        match read == Some(session) {
            true => Ok(()),
            false => Err(format!("the journal tells {read:?}, the server knew {session:?}")),
        }
    }
}

fn request() -> ExportRequest {
    serde_json::from_value(serde_json::json!({
        "repository": RepositoryChoice {
            name: None,
            path: "/backups".into(), kind: None, stanza: None, wal_archives: vec![], backup_label: None, tablespaces: Vec::new(),
            atomic_snapshot: false,
        },
        "databases": DATABASES, "target": "/srv/exports/monday", "recovery": RecoveryChoice::Latest,
        "jobs": 1, "globals": true, "role_passwords": true,
    }))
    .unwrap()
}
