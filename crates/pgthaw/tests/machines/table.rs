//! Every fault at every step of an export over three machines: it goes on by itself, or one `retry` completes it; what is delivered equals
//! an undisturbed export byte for byte, and nothing is left on any host.
//!
//! A step is held by stopping (SIGSTOP) the process that does it as soon as it is seen; then the fault begins, and the process goes on.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pgthaw_testkit::{Host, HostPlan, HostProcess, postgres_programs, run};
use rustix::process::Signal;
use serde_json::Value;

use crate::lab::{EXPLORER, Machines, assert_nothing_left, possible};
use crate::support::text;

/// A cut or an unreadable repository lasts so long.
const CUT: Duration = Duration::from_secs(30);
/// A stopped agent stays so for so long.
const STOPPED: Duration = Duration::from_secs(60);
/// How long a session may take to come to rest, or to a step.
const LIMIT: Duration = Duration::from_secs(240);
/// Size of each disk that can be full, in bytes.
const ROOM: u64 = 400 << 20;

/// Options of the exports here: each directory on a disk of its own.
const OPTIONS: [&str; 10] = [
    "--staging",
    "dba@staging",
    "--to",
    "ops@target:/srv/out/export",
    "--work-dir",
    "/srv/work",
    "--dump-dir",
    "/srv/dump",
    "--retries",
    "0",
];
/// The target's directory on its host.
const EXPORT: &str = "/srv/out/export";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Check,
    Mount,
    Recover,
    Globals,
    Dump,
    Transfer,
    Seal,
    Clean,
}

const STEPS: [(Step, &str); 8] = [
    (Step::Check, "check (of a retry)"),
    (Step::Mount, "mount"),
    (Step::Recover, "recover"),
    (Step::Globals, "globals"),
    (Step::Dump, "dump"),
    (Step::Transfer, "transfer"),
    (Step::Seal, "seal"),
    (Step::Clean, "clean"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    ExplorerKilled,
    ServerKilled,
    MountRebooted,
    AgentKilled,
    AgentStopped,
    StagingRebooted,
    ReceiverKilled,
    TargetRebooted,
    StagingCut,
    TargetCut,
    WriteLayerFull,
    DumpFull,
    TargetFull,
    RepositoryUnreadable,
    BackupExpired,
}

const FAULTS: [(Fault, &str); 15] = [
    (Fault::ExplorerKilled, "explorer killed"),
    (Fault::ServerKilled, "server killed"),
    (Fault::MountRebooted, "mount server rebooted"),
    (Fault::AgentKilled, "agent killed"),
    (Fault::AgentStopped, "agent stopped 60 s"),
    (Fault::StagingRebooted, "staging rebooted"),
    (Fault::ReceiverKilled, "target's half killed"),
    (Fault::TargetRebooted, "target rebooted"),
    (Fault::StagingCut, "mount–staging cut 30 s"),
    (Fault::TargetCut, "mount–target cut 30 s"),
    (Fault::WriteLayerFull, "write layer full"),
    (Fault::DumpFull, "dump directory full"),
    (Fault::TargetFull, "target full"),
    (Fault::RepositoryUnreadable, "repository unreadable 30 s"),
    (Fault::BackupExpired, "backup expired"),
];

/// What a fault led to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    ByItself,
    Retry,
    /// There was nothing to break.
    NotApplicable,
    Wrong(String),
}

/// The host and the beginning of the arguments of the process that does a step.
fn worker(step: Step) -> (&'static str, &'static str) {
    match step {
        Step::Check => ("staging", "pgthaw internal check"),
        Step::Mount => ("staging", "pgthaw internal mount"),
        Step::Recover => ("staging", "postgres: "),
        Step::Globals => ("staging", "pg_dumpall "),
        Step::Dump => ("staging", "pg_dump "),
        Step::Transfer | Step::Seal => ("target", "pgthaw attach"),
        Step::Clean => ("staging", "pgthaw internal agent"),
    }
}

/// Three hosts, with a disk for each directory that can be full, and what an undisturbed export looks like.
struct Lab {
    machines: Machines,
}

impl Lab {
    fn new() -> Self {
        let staging = HostPlan::new("staging").disk("/srv/work", ROOM).disk("/srv/dump", ROOM);
        let target = HostPlan::new("target").disk("/srv/out", ROOM);
        let machines = Machines::planned(HostPlan::new("mount"), staging, target);
        machines.host("staging").script("chown dba: /srv/work /srv/dump");
        machines.host("target").script("chown ops: /srv/out");
        machines.host("mount").script("cp -a /home/ann/repo /home/ann/kept");
        Self { machines }
    }

    /// One cell of the table.
    fn meet(&self, step: Step, fault: Fault) -> Outcome {
        let case = format!("{fault:?} at {step:?}");
        let leftovers = self.machines.leftovers();
        let (mut child, held) = self.start_and_hold(step);
        let met = self.begin_fault(fault, &held);
        if met {
            self.last(fault);
        }
        held.iter().for_each(|process| process.signal(Signal::CONT));
        child.wait().expect("our child");
        let mut session = self.rested(&case);
        self.end_fault(fault);
        let outcome = match session["state"].as_str() {
            _ if !met => Outcome::NotApplicable,
            Some("succeeded") => Outcome::ByItself,
            _ => Outcome::Retry,
        };
        if session["state"] == "failed" {
            assert!(met, "{case}: undisturbed it failed: {session}\n{}", self.machines.logs());
            let error = session["error"].as_str().unwrap_or_default();
            eprintln!("{case}: failed: {error}");
            let of_databases = session["databases"].as_array().into_iter().flatten();
            let told: Vec<&str> =
                of_databases.filter_map(|it| it["error"].as_str()).chain([error]).collect();
            let place = place(fault);
            assert!(told.iter().any(|told| told.contains(place)), "{case}: no {place}: {told:?}");
            self.machines.expect(0, &["retry", session["id"].as_str().unwrap()]);
            session = self.machines.session();
        }
        assert_eq!(session["state"], "succeeded", "{case}: {session}");
        self.assert_equals_undisturbed(&case);
        assert_nothing_left(&leftovers, &case);
        outcome
    }

    /// Begins an export that is held at `step`; should that have been over too soon, another one.
    fn start_and_hold(&self, step: Step) -> (Child, Vec<HostProcess>) {
        for _ in 0..10 {
            let child = match step {
                Step::Check => self.start_retry(),
                _ => self.machines.start_export(&OPTIONS),
            };
            if let Some(held) = self.hold(step) {
                return (child, held);
            }
            self.machines.ended(child, 0);
            std::fs::remove_dir_all(self.machines.host("target").path(EXPORT)).unwrap();
        }
        panic!("{step:?} is always over too soon");
    }

    /// A session whose first attempt has failed is begun again.
    fn start_retry(&self) -> Child {
        let mut first = self.machines.start_export(&OPTIONS);
        self.hold(Step::Mount).expect("the first step");
        for agent in self.machines.processes("staging", "pgthaw internal agent") {
            agent.signal(Signal::KILL);
        }
        first.wait().expect("our child");
        let id = self.rested("the first attempt")["id"].as_str().expect("a session").to_owned();
        self.machines.start_command(&["retry", &id])
    }

    /// Waits until the export is at `step`, and stops the process that does it; nothing if the step was over before.
    fn hold(&self, step: Step) -> Option<Vec<HostProcess>> {
        // The check runs some of these programs, too.
        match step {
            Step::Check => {}
            Step::Mount => self.machines.wait_for_step("mount"),
            Step::Recover => self.machines.wait_for_step("recover"),
            _ => self.machines.wait_for_step("dump"),
        }
        let (host, start) = worker(step);
        let mut held = Vec::new();
        let mut find = || {
            held = self.machines.processes(host, start);
            held.retain(|process| step != Step::Recover || process.arguments.contains(": startup"));
            !held.is_empty()
        };
        let what = format!("{step:?}");
        // Whatever is waited for, the export may come to its end first.
        let mut wait = |begun: &dyn Fn() -> bool| {
            self.machines.wait_until(&what, || begun() && find() || self.delivered("export.json"));
        };
        // The last two steps are short: who does them is known before they come.
        let over = match step {
            Step::Seal => {
                wait(&|| self.delivered("crm"));
                spin(&what, || self.delivered("sales"));
                "export.json"
            }
            Step::Clean => {
                wait(&|| self.delivered("sales"));
                spin(&what, || self.delivered("export.json"));
                "never"
            }
            Step::Transfer => {
                wait(&|| self.has_staged_files());
                "export.json"
            }
            _ => {
                wait(&|| true);
                "export.json"
            }
        };
        held.iter().for_each(|process| process.signal(Signal::STOP));
        let is_over = held.is_empty() || self.delivered(over);
        if is_over {
            held.iter().for_each(|process| process.signal(Signal::CONT));
        }
        (!is_over).then_some(held)
    }

    fn has_staged_files(&self) -> bool {
        let entries = std::fs::read_dir(self.machines.host("target").path(EXPORT));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(".pgthaw-"))
            .any(|entry| has_file(&entry.path()))
    }

    fn delivered(&self, name: &str) -> bool {
        self.machines.host("target").path(EXPORT).join(name).exists()
    }

    /// Begins a fault; returns whether there was something to break. What is held goes on with it.
    fn begin_fault(&self, fault: Fault, held: &[HostProcess]) -> bool {
        let machines = &self.machines;
        let (staging, target) = (machines.host("staging"), machines.host("target"));
        let signal = |host: &str, starts: &[&str], signal: Signal| {
            let victims: Vec<_> =
                starts.iter().flat_map(|start| machines.processes(host, start)).collect();
            victims.iter().for_each(|process| process.signal(signal));
            !victims.is_empty()
        };
        match fault {
            Fault::ExplorerKilled => {
                return signal("mount", &["pgthaw export", "pgthaw retry"], Signal::KILL);
            }
            Fault::ServerKilled => return signal("mount", &["pgthaw serve"], Signal::KILL),
            Fault::AgentKilled => {
                return signal("staging", &["pgthaw internal agent"], Signal::KILL);
            }
            Fault::AgentStopped => {
                held.iter().for_each(|process| process.signal(Signal::CONT));
                return signal("staging", &["pgthaw internal agent"], Signal::STOP);
            }
            Fault::ReceiverKilled => return signal("target", &["pgthaw attach"], Signal::KILL),
            Fault::MountRebooted => machines.host("mount").reboot(),
            Fault::StagingRebooted => staging.reboot(),
            Fault::TargetRebooted => target.reboot(),
            Fault::StagingCut => machines.lab.cut("mount", "staging"),
            Fault::TargetCut => machines.lab.cut("mount", "target"),
            Fault::WriteLayerFull => fill(staging, "/srv/work"),
            Fault::DumpFull => fill(staging, "/srv/dump"),
            Fault::TargetFull => fill(target, "/srv/out"),
            Fault::RepositoryUnreadable => machines.host("mount").script("chmod 0 /home/ann/repo"),
            Fault::BackupExpired => self.expire(),
        }
        held.iter().for_each(|process| process.signal(Signal::CONT));
        true
    }

    /// Waits while a fault lasts that ends by itself, and ends it.
    fn last(&self, fault: Fault) {
        let machines = &self.machines;
        match fault {
            Fault::StagingCut => {
                std::thread::sleep(CUT);
                machines.lab.mend("mount", "staging");
            }
            Fault::TargetCut => {
                std::thread::sleep(CUT);
                machines.lab.mend("mount", "target");
            }
            Fault::RepositoryUnreadable => {
                std::thread::sleep(CUT);
                machines.host("mount").script("chmod 755 /home/ann/repo");
            }
            Fault::AgentStopped => {
                std::thread::sleep(STOPPED);
                for agent in machines.processes("staging", "pgthaw internal agent") {
                    agent.signal(Signal::CONT);
                }
            }
            _ => {}
        }
    }

    /// What has to be mended before a retry.
    fn end_fault(&self, fault: Fault) {
        let machines = &self.machines;
        match fault {
            Fault::WriteLayerFull => machines.host("staging").resize("/srv/work", ROOM),
            Fault::DumpFull => machines.host("staging").resize("/srv/dump", ROOM),
            Fault::TargetFull => machines.host("target").resize("/srv/out", ROOM),
            Fault::BackupExpired => machines
                .host("mount")
                .script("rm -rf /home/ann/repo; cp -a /home/ann/kept /home/ann/repo"),
            _ => {}
        }
    }

    /// The backup's own tool removes the newest backup, the one that is exported.
    fn expire(&self) {
        let newest = self.machines.fixture.lz4.labels.last().expect("it has backups");
        let mut expire = self.machines.host("mount").command(EXPLORER, "pgbackrest");
        expire.args(["--stanza=demo", "--repo1-path=/home/ann/repo", "--lock-path=/tmp/lock"]);
        expire.args(["--no-config", "--log-level-file=off", &format!("--set={newest}"), "expire"]);
        run(&mut expire);
        self.machines.host("mount").script("rm -rf /tmp/lock");
    }

    /// Waits until no server works on the newest session; returns its status.
    fn rested(&self, case: &str) -> Value {
        let end = Instant::now() + LIMIT;
        loop {
            let session = self.machines.session();
            if matches!(session["state"].as_str(), Some("succeeded" | "failed" | "canceled")) {
                return session;
            }
            assert!(
                Instant::now() < end,
                "{case}: it does not end: {session}\n{}",
                self.machines.logs()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Wants the export to hold what an undisturbed one holds, and removes it.
    fn assert_equals_undisturbed(&self, case: &str) {
        let found = contents(&self.machines.host("target").path(EXPORT));
        let expected = self.undisturbed();
        for (name, lines) in expected {
            let found = found.get(name).map(Vec::as_slice).unwrap_or_default();
            let differs = lines.iter().zip(found).find(|(line, found)| line != found);
            assert!(
                differs.is_none() && found.len() == lines.len(),
                "{case}: {name} is not what it was undisturbed: {differs:?}"
            );
        }
        assert_eq!(found.len(), expected.len(), "{case}: {:?}", found.keys());
        std::fs::remove_dir_all(self.machines.host("target").path(EXPORT)).unwrap();
    }

    /// What an undisturbed export holds; equal to the source.
    fn undisturbed(&self) -> &'static BTreeMap<String, Vec<String>> {
        static UNDISTURBED: OnceLock<BTreeMap<String, Vec<String>>> = OnceLock::new();
        UNDISTURBED.get_or_init(|| {
            let spare = Self::new();
            let export = spare.machines.start_export(&OPTIONS);
            spare.machines.ended(export, 0);
            let export = spare.machines.host("target").path(EXPORT);
            crate::support::assert_equal(
                &export,
                &spare.machines.fixture.expected,
                &["crm", "sales"],
            );
            contents(&export)
        })
    }
}

/// Where a fault strikes, as the error that it leads to says it; on the mount server by a path of the repository.
fn place(fault: Fault) -> &'static str {
    match fault {
        Fault::TargetCut | Fault::TargetFull | Fault::ReceiverKilled | Fault::TargetRebooted => {
            "ops@target: "
        }
        Fault::BackupExpired | Fault::RepositoryUnreadable => "/home/ann/repo",
        _ => "dba@staging: ",
    }
}

/// Looks without a rest.
fn spin(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain for {what}");
    }
}

/// Whether a file lies anywhere below `directory`.
fn has_file(directory: &Path) -> bool {
    std::fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => has_file(&entry.path()),
            Ok(_) => true,
            Err(_) => false,
        }
    })
}

/// Leaves no room on a disk. Those who write meanwhile may be faster, once or twice.
fn fill(host: &Host, disk: &str) {
    let used = || {
        let found = rustix::fs::statvfs(host.path(disk)).expect("a disk of ours");
        (found.f_blocks - found.f_bfree) * found.f_frsize
    };
    let filled = (0..10).any(|_| {
        let used = used().max(4096);
        catch_unwind(AssertUnwindSafe(|| host.resize(disk, used))).is_ok()
    });
    assert!(filled, "{disk} cannot be filled");
}

/// An export's files: each database as a script, whose checksums agree, and `globals.sql`.
fn contents(export: &Path) -> BTreeMap<String, Vec<String>> {
    let sums = Command::new("sha256sum")
        .args(["--check", "--quiet", "--strict", "SHA256SUMS"])
        .current_dir(export)
        .output()
        .unwrap();
    assert!(sums.status.success(), "{}", text(&sums.stderr));
    let mut contents = BTreeMap::new();
    for entry in std::fs::read_dir(export).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let script = match name.as_str() {
            "SHA256SUMS" | "export.json" => String::new(), // sizes and times of this very export
            "globals.sql" => std::fs::read_to_string(entry.path()).unwrap(),
            _ => {
                let mut script = Command::new(postgres_programs().join("pg_restore"));
                script.args(["--file=-"]).arg(entry.path()).stderr(Stdio::piped());
                text(&run(&mut script).stdout)
            }
        };
        // A random key of this very run of the tool.
        let is_key =
            |line: &&str| line.starts_with("\\restrict ") || line.starts_with("\\unrestrict ");
        contents
            .insert(name, script.lines().filter(|line| !is_key(line)).map(str::to_owned).collect());
    }
    contents
}

/// Works on all cells, in so many labs side by side; tells each outcome as soon as it is known.
fn work(cells: &[(Step, Fault)], labs: usize) -> BTreeMap<(Step, Fault), Outcome> {
    let queue = Mutex::new(cells.iter());
    let outcomes = Mutex::new(BTreeMap::new());
    fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
    std::thread::scope(|scope| {
        for _ in 0..labs {
            scope.spawn(|| {
                let mut lab = None;
                loop {
                    let Some(&(step, fault)) = lock(&queue).next() else { return };
                    let begun = Instant::now();
                    let met = catch_unwind(AssertUnwindSafe(|| {
                        lab.get_or_insert_with(Lab::new).meet(step, fault)
                    }));
                    let outcome = met.unwrap_or_else(|why| {
                        lab = None; // it may hold anything
                        Outcome::Wrong(words(&*why))
                    });
                    eprintln!("{step:?}, {fault:?}: {outcome:?} after {:.0?}", begun.elapsed());
                    lock(&outcomes).insert((step, fault), outcome);
                }
            });
        }
    });
    outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// The table as Markdown.
fn table(outcomes: &BTreeMap<(Step, Fault), Outcome>) -> String {
    let heads = STEPS.map(|(_, name)| name).join(" | ");
    let mut lines =
        vec![format!("| fault | {heads} |"), format!("|---{}|", "|---".repeat(STEPS.len()))];
    for (fault, name) in FAULTS {
        let cells = STEPS.map(|(step, _)| match outcomes.get(&(step, fault)) {
            Some(Outcome::ByItself) => "by itself",
            Some(Outcome::Retry) => "retry",
            Some(Outcome::NotApplicable) => "–",
            Some(Outcome::Wrong(_)) => "WRONG",
            None => "",
        });
        lines.push(format!("| {name} | {} |", cells.join(" | ")));
    }
    lines.join("\n")
}

#[track_caller]
fn assert_right(outcomes: &BTreeMap<(Step, Fault), Outcome>) {
    let wrong = outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Wrong(_)));
    let wrong: Vec<_> = wrong.collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `make test-faults`. `PGTHAW_LABS` says how many labs work side by side, `PGTHAW_CELLS` names a part: `Dump-TargetFull,Seal-StagingCut`.
#[test]
#[ignore = "takes half an hour: make test-faults"]
fn every_fault_at_every_step() {
    if !possible() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    let labs = number("PGTHAW_LABS").unwrap_or(3);
    let chosen = std::env::var("PGTHAW_CELLS").unwrap_or_default();
    let chosen: Vec<&str> = chosen.split(',').filter(|name| !name.is_empty()).collect();
    // Faults that last come first, so that none of them is left to the end.
    let mut cells: Vec<(Step, Fault)> =
        FAULTS.iter().flat_map(|(fault, _)| STEPS.map(|(step, _)| (step, *fault))).collect();
    cells.retain(|(step, fault)| {
        chosen.is_empty() || chosen.contains(&&*format!("{step:?}-{fault:?}"))
    });
    cells.sort_by_key(|(_, fault)| match fault {
        Fault::AgentStopped => 0,
        Fault::StagingCut | Fault::TargetCut | Fault::RepositoryUnreadable => 1,
        _ => 2,
    });
    let outcomes = work(&cells, labs);
    println!("{}", table(&outcomes));
    assert_right(&outcomes);
}

/// A part that stands for the rest: each kind of fault that the other tests here do not cover.
#[test]
fn faults_are_survived() {
    if !possible() {
        return;
    }
    let cells = [
        (Step::Dump, Fault::ExplorerKilled),
        (Step::Seal, Fault::ServerKilled),
        (Step::Dump, Fault::MountRebooted),
        (Step::Recover, Fault::StagingRebooted),
        (Step::Transfer, Fault::ReceiverKilled),
        (Step::Recover, Fault::WriteLayerFull),
        (Step::Dump, Fault::DumpFull),
        (Step::Transfer, Fault::TargetFull),
        (Step::Mount, Fault::BackupExpired),
        (Step::Clean, Fault::TargetRebooted),
    ];
    let outcomes = work(&cells, 2);
    assert_eq!(outcomes.len(), cells.len());
    assert!(!outcomes.values().any(|outcome| *outcome == Outcome::NotApplicable), "{outcomes:?}");
    // A line that broke while nobody spoke is made anew.
    assert_eq!(outcomes[&(Step::Clean, Fault::TargetRebooted)], Outcome::ByItself);
    assert_right(&outcomes);
}
