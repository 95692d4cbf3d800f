//! An export under attack: where it stands by its journal, which processes are its own, and what must be true after its end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{
    Fingerprint, Fixture, FreshServer, Leftovers, fingerprint, is_moved_by_traffic, pgbench_sums,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Pgthaw, text};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(90);

/// The steps of a session from its first process on, as its journal calls them.
pub const STEPS: [&str; 5] = ["mount", "recover", "dump", "deliver", "clean"];

/// A process that takes part in an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    CommandLine,
    Server,
    /// The server's child that reads the repository.
    Source,
    /// The server's child that checks.
    Check,
    Agent,
    Mount,
    Postmaster,
    /// The process that replays, before the server is ready.
    Startup,
    /// A process of PostgreSQL that answers pg_dump or us.
    Backend,
    PgDump,
    /// A worker of pg_dump.
    DumpWorker,
}

/// One export with a state, a work and a dump directory of its own.
pub struct Attack {
    pub pgthaw: Pgthaw,
    pub target: PathBuf,
    leftovers: Leftovers,
    pub cli: Child,
}

impl Attack {
    /// Starts exporting `databases` of the lz4 repository's newest backup.
    pub fn begin(databases: &[&str], more: &[&str]) -> Self {
        Self::begin_in(Pgthaw::new(), &Fixture::get().lz4.path, databases, more)
    }

    /// As [`Attack::begin`], with what the caller has prepared.
    pub fn begin_in(pgthaw: Pgthaw, repository: &Path, databases: &[&str], more: &[&str]) -> Self {
        let (leftovers, target) = (pgthaw.leftovers(), pgthaw.target("export"));
        let mut arguments = pgthaw.export_arguments(repository, databases, &target);
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        if !more.contains(&"--retries") {
            // What was broken is to be seen, not to be made good in silence.
            arguments.extend(["--retries".into(), "0".into()]);
        }
        let errors = std::fs::File::create(pgthaw.scratch.join("cli.log")).unwrap();
        let cli = pgthaw
            .command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("pgthaw starts");
        Self { pgthaw, target, leftovers, cli }
    }

    /// The entries of the journal, oldest first; none while there is no session.
    pub fn journal(&self) -> Vec<Value> {
        let sessions = self.pgthaw.scratch.join("state/pgthaw/sessions");
        let session = std::fs::read_dir(sessions).ok().and_then(|mut all| all.next()?.ok());
        let Some(session) = session else { return Vec::new() };
        let journal = std::fs::read_to_string(session.path().join("journal")).unwrap_or_default();
        let entry = |line: &str| {
            let record: Value = serde_json::from_str(line.split_once(' ')?.1).ok()?;
            record.get("entry").cloned()
        };
        journal.lines().filter_map(entry).collect()
    }

    /// The entries of the present attempt, newest first.
    fn attempt(&self) -> Vec<Value> {
        let newest_first = self.journal().into_iter().rev();
        newest_first.take_while(|entry| entry.get("attempt").is_none()).collect()
    }

    /// How often the journal tells of `key`.
    pub fn count(&self, key: &str) -> usize {
        self.journal().iter().filter(|entry| entry.get(key).is_some()).count()
    }

    /// Waits until the present attempt is at `step` or past it.
    pub fn wait_for_step(&self, step: &str) {
        let steps = ["request", "check", "mount", "recover", "dump", "deliver", "clean"];
        let place = |name: &str| steps.iter().position(|step| *step == name);
        self.wait_until(&format!("step {step}"), || {
            let entries = self.attempt();
            let mut names = entries.iter().filter_map(|entry| entry.get("step")?.as_str());
            names.any(|name| place(name) >= place(step))
        });
    }

    /// Looks every millisecond.
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds() {
            assert!(Instant::now() < end, "waited in vain for {what}\n{}", self.words());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The marker of the present attempt's processes.
    fn marker(&self) -> Option<String> {
        let journal = self.journal();
        let placed = journal.iter().rev().find_map(|entry| entry.get("placed"))?;
        Some(placed["marker"].as_str()?.to_owned())
    }

    /// The process ids of `victim` now.
    pub fn pids(&self, victim: Victim) -> Vec<Pid> {
        if victim == Victim::CommandLine {
            return Pid::from_raw(self.cli.id().cast_signed()).into_iter().collect();
        }
        if victim == Victim::DumpWorker {
            let mut pids = self.pids(Victim::PgDump);
            pids.sort_by_key(|pid| pid.as_raw_nonzero());
            return pids.split_off(pids.len().min(1)); // workers are forked by the first
        }
        let state = format!("XDG_STATE_HOME={}", self.pgthaw.scratch.join("state").display());
        let marker = self.marker();
        let has =
            |bytes: &[u8], wanted: &str| bytes.split(|b| *b == 0).any(|v| v == wanted.as_bytes());
        let is_victim = |process: &Path| {
            let read = |file: &str| std::fs::read(process.join(file)).unwrap_or_default();
            let line = read("cmdline");
            let ours = |name: &str| {
                line.starts_with(format!("pgthaw\0{name}").as_bytes())
                    && has(&read("environ"), &state)
            };
            let title = |title: &str| {
                marker.as_ref().is_some_and(|marker| {
                    line.starts_with(
                        format!("postgres: pgthaw-{}: {title}", &marker[..8]).as_bytes(),
                    )
                })
            };
            match victim {
                Victim::CommandLine | Victim::DumpWorker => false,
                Victim::Server => ours("serve"),
                Victim::Source => ours("internal\0source"),
                Victim::Check => ours("internal\0check"),
                Victim::Agent => ours("internal\0agent"),
                Victim::Mount => ours("internal\0mount"),
                Victim::Postmaster => {
                    let Some(marker) = &marker else { return false };
                    let name = format!("cluster_name=pgthaw-{}", &marker[..8]);
                    read("comm") == b"postgres\n"
                        && (has(&line, &name) || has(&line, &format!("--{name}")))
                }
                Victim::Startup => title("startup"),
                Victim::Backend => title("") && text(&line).contains("[local]"),
                Victim::PgDump => {
                    let Some(marker) = &marker else { return false };
                    read("comm") == b"pg_dump\n"
                        && !has(&line, "-V") // pg_dumpall asks for its version
                        && has(&read("environ"), &format!("PGTHAW_SESSION={marker}"))
                }
            }
        };
        let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pid = |entry: &std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
        processes
            .filter_map(|entry| Some((Pid::from_raw(pid(&entry)?)?, entry.path())))
            .filter(|(_, path)| is_victim(path))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Waits until `victim` is there and kills it; returns whether it was caught before the session had ended.
    pub fn kill(&self, victim: Victim) -> bool {
        let end = Instant::now() + LIMIT;
        loop {
            let pids = self.pids(victim);
            if let Some(pid) = pids.first()
                && kill_process(*pid, Signal::KILL).is_ok()
            {
                return true;
            }
            let ended = self.attempt().iter().any(|entry| {
                matches!(entry["state"].as_str(), Some("succeeded" | "failed" | "canceled"))
            });
            if ended {
                return false;
            }
            assert!(Instant::now() < end, "no {victim:?} appears\n{}", self.words());
        }
    }

    /// Waits until the command line has ended.
    pub fn cli_ends(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.cli.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the command line does not end\n{}", self.words());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the command line said on stderr.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.pgthaw.scratch.join("cli.log")).unwrap_or_default()
    }

    /// Waits until the session is no longer at work, asking as a user would; returns its status.
    pub fn ended_session(&self) -> Value {
        let end = Instant::now() + LIMIT;
        loop {
            let session = self.pgthaw.session();
            if matches!(session["state"].as_str(), Some("succeeded" | "failed" | "canceled")) {
                return session;
            }
            assert!(Instant::now() < end, "the session does not end\n{}", self.words());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn id(&self) -> String {
        self.pgthaw.session_id()
    }

    /// The session has failed: nothing of it runs or lies about, and the target shows nothing that is not whole.
    pub fn assert_failed_cleanly(&self, case: &str) {
        assert_eq!(
            self.leftovers.check(),
            [""; 0],
            "{case}: left by the failure\n{}",
            self.words()
        );
        assert!(
            !self.target.join("export.json").exists(),
            "{case}: a failed export looks complete"
        );
        for entry in std::fs::read_dir(&self.target).into_iter().flatten().flatten() {
            let path = entry.path();
            let whole = !path.is_dir() || path.join("toc.dat").exists();
            let staged = entry.file_name().to_string_lossy().starts_with(".pgthaw-");
            assert!(whole || staged, "{case}: {} is not whole", path.display());
        }
    }

    /// Nothing is left, the target's staging directory included.
    pub fn assert_nothing_left(&self, case: &str) {
        assert_eq!(self.leftovers.check(), [""; 0], "{case}: left\n{}", self.words());
        for entry in std::fs::read_dir(&self.target).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(
                !name.starts_with(".pgthaw"),
                "{case}: {name} is left in the target\n{}",
                self.words()
            );
        }
    }

    /// Retries as a user would, and wants success.
    pub fn retry(&self) {
        let id = self.id();
        self.pgthaw.expect(0, &["retry", &id]);
    }

    /// Everything said, for a failed test.
    pub fn words(&self) -> String {
        format!("command line: {}\n{}", self.said(), self.pgthaw.logs())
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        let _ = self.cli.kill(); // an error only means that it has ended
        let _ = self.cli.wait();
        for victim in [Victim::Server, Victim::Agent] {
            for pid in self.pids(victim) {
                let _ = kill_process(pid, Signal::CONT); // a failed test may have stopped it
            }
        }
    }
}

/// Loads one export after the other into the same fresh server and compares them with the source.
pub struct Judge {
    server: FreshServer,
    expected: BTreeMap<String, Fingerprint>,
    has_globals: bool,
}

impl Judge {
    pub fn new() -> Self {
        Self { server: FreshServer::new(), expected: Fixture::get().expected, has_globals: false }
    }

    /// Wants `databases` of the export in `target` complete, listed, and equal to the source.
    pub fn assert_equal(&mut self, case: &str, target: &Path, databases: &[&str]) {
        assert!(target.join("export.json").exists(), "{case}: no export.json");
        let sums = Command::new("sha256sum")
            .args(["--check", "--quiet", "--strict", "SHA256SUMS"])
            .current_dir(target)
            .output()
            .unwrap();
        assert!(sums.status.success(), "{case}: {}", text(&sums.stderr));
        if !self.has_globals {
            self.server.load_globals(&target.join("globals.sql"));
            self.has_globals = true;
        }
        for database in databases {
            self.server.load_database(&target.join(database));
            let found = fingerprint(&self.server, database).without(is_moved_by_traffic);
            let differences = self.expected[*database].differences(&found);
            assert!(differences.is_empty(), "{case}: {database}: {differences:#?}");
            if *database == "sales" {
                let sums = pgbench_sums(&self.server, "sales");
                assert!(sums.agree() && sums.history != 0, "{case}: {sums:?}");
            }
            self.server.sql("postgres", &format!("DROP DATABASE {database}"));
        }
    }
}
