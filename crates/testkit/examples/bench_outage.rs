//! `bench_outage PGTHAW [GB]`: what a cut of 60 s and a dead server cost in the middle of a dump.
//!
//! A lab of three hosts on this machine. A database of some GB in an lz4 pgBackRest repository on the first is exported twice. The
//! second time, when half of it is dumped, the link between mount server and staging server is dropped for 60 s; the server is
//! killed at once, and started after 20 s, still without the link. The same `pg_dump` must finish, the exports must be equal, nothing may
//! be left, and no more than 5 % more bytes may come over the link. Needs root. Ends with 1 where that does not hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pgthaw_testkit::{HostLeftovers, HostPlan, HostProcess, Lab, LargeBackup, Scratch, User, run};
use rustix::process::Signal;
use serde_json::Value;

/// How long the link is dropped.
const OUTAGE: Duration = Duration::from_secs(60);
/// How long no server runs.
const WITHOUT_SERVER: Duration = Duration::from_secs(20);
/// At most so many times the bytes of the undisturbed export.
const MOST: f64 = 1.05;
/// Where the repository lies on the mount server.
const REPOSITORY: &str = "/srv/repository";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (program, gigabytes) = match &arguments[..] {
        [program] => (program, Some(4)),
        [program, gigabytes] => (program, gigabytes.parse().ok()),
        _ => (&String::new(), None),
    };
    let Some(gigabytes) = gigabytes else {
        eprintln!("usage: bench_outage PGTHAW [GB]");
        return ExitCode::from(2);
    };
    if User::current().uid != 0 {
        eprintln!("bench_outage: hosts of a lab need root");
        return ExitCode::from(2);
    }
    if bench(Path::new(program), gigabytes) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bench(program: &Path, gigabytes: u32) -> bool {
    let dir = Scratch::new();
    println!("building a database of {gigabytes} GB and its backup");
    let backup = LargeBackup::build(&dir, gigabytes);
    let mount = HostPlan::new("mount").program(program).share(&backup.repository, REPOSITORY);
    let lab = Lab::with([mount, HostPlan::new("staging"), HostPlan::new("target")]);
    let leftovers: Vec<_> = lab.hosts().iter().map(HostLeftovers::before).collect();

    let undisturbed = Export::start(&lab, backup.database, "undisturbed");
    let (processes, size) = undisturbed.follow(u64::MAX, || {});
    let before = undisturbed.end();
    tell("undisturbed", &before, &processes);

    let disturbed = Export::start(&lab, backup.database, "disturbed");
    let (processes, _) = disturbed.follow(size / 2, || {
        println!("half of {size} bytes is dumped: the link is dropped, the server killed");
        lab.cut("mount", "staging");
        for server in disturbed.processes("mount", "pgthaw serve") {
            server.signal(Signal::KILL);
        }
        std::thread::sleep(WITHOUT_SERVER);
        println!("the server is started: {}", disturbed.session()["state"]);
        std::thread::sleep(OUTAGE - WITHOUT_SERVER);
        println!("the link is back; the session was {}", disturbed.session()["state"]);
        lab.mend("mount", "staging");
    });
    let after = disturbed.end();
    tell("disturbed", &after, &processes);

    let more = after.bytes as f64 / before.bytes as f64;
    // sshd hears of a connection that was cut when TCP tries again.
    let left = leftovers.iter().flat_map(|host| host.check_within(OUTAGE * 2));
    let left: Vec<String> = left.collect();
    let judge = |what: &str, good: bool| {
        println!("{what}: {}", if good { "kept" } else { "MISSED" });
        good
    };
    let held = [
        judge(&format!("{more:.3} of the bytes over the link, limit {MOST}"), more <= MOST),
        judge("one and the same pg_dump", processes.len() == 1),
        judge("the same files with the same checksums", before.sums == after.sums),
        judge(&format!("nothing left on any machine {left:?}"), left.is_empty()),
    ];
    held.iter().all(|held| *held)
}

fn tell(what: &str, result: &Result, processes: &[i32]) {
    println!(
        "{what}: {:.1} MB over the link in {:.1} s, {} files, pg_dump {processes:?}",
        result.bytes as f64 / 1e6,
        result.seconds,
        result.sums.len(),
    );
}

/// What came of an export.
struct Result {
    /// From the mount server to the staging server.
    bytes: u64,
    seconds: f64,
    /// SHA-256 of each data file, by its name.
    sums: BTreeMap<String, String>,
}

/// A detached export.
struct Export<'a> {
    lab: &'a Lab,
    target: String,
    id: String,
    begun: Instant,
    /// Bytes of the link before.
    bytes: u64,
}

impl<'a> Export<'a> {
    fn start(lab: &'a Lab, database: &str, name: &str) -> Self {
        let (begun, bytes) = (Instant::now(), lab.bytes("mount", "staging"));
        let mut export = lab.host("mount").command("ann", "pgthaw");
        export.args(["export", REPOSITORY, "-d", database, "-Z", "1", "--no-globals", "--detach"]);
        export.args(["--staging", "dba@staging", "--to", &format!("ops@target:{name}")]);
        let id = run(&mut export).stdout;
        let id = String::from_utf8_lossy(&id).trim().to_owned();
        Self { lab, target: format!("/home/ops/{name}"), id, begun, bytes }
    }

    fn session(&self) -> Value {
        let mut session = self.lab.host("mount").command("ann", "pgthaw");
        let output = run(session.args(["session", &self.id, "--output", "json"]));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn processes(&self, host: &str, name: &str) -> Vec<HostProcess> {
        let mut processes = self.lab.host(host).processes();
        processes.retain(|process| process.arguments.contains(name));
        processes
    }

    /// Looks on until the dump is complete; calls `disturb` once when it has `half` bytes. Returns the pids of all `pg_dump` of the
    /// database that were seen, and the dump's largest size.
    fn follow(&self, half: u64, disturb: impl FnOnce()) -> (Vec<i32>, u64) {
        let (mut pids, mut size, mut disturb) = (Vec::new(), 0, Some(disturb));
        let end = Instant::now() + Duration::from_secs(1800);
        let dump = self.lab.host("staging").path(format!("/var/tmp/pgthaw-{}-dump", self.id));
        loop {
            let dumps = self.processes("staging", "pg_dump --format");
            if dumps.is_empty() && !pids.is_empty() {
                return (pids, size);
            }
            // Its workers are its children, with the same arguments.
            let first = dumps.iter().map(|process| process.pid).min();
            pids.extend(first.filter(|first| !pids.contains(first)));
            size = size.max(bytes_below(&dump));
            if size >= half
                && let Some(disturb) = disturb.take()
            {
                disturb();
            }
            assert!(Instant::now() < end, "no end of the dump: {}", self.session());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for its end, which must be a success.
    fn end(&self) -> Result {
        let mut attach = self.lab.host("mount").command("ann", "pgthaw");
        run(attach.args(["attach", &self.id]));
        let sums =
            std::fs::read_to_string(self.lab.host("target").path(&self.target).join("SHA256SUMS"));
        let sums = sums.expect("the export is complete");
        let sums = sums.lines().filter_map(|line| line.split_once("  "));
        let sums = sums.filter(|(_, name)| !name.ends_with("toc.dat")); // it holds the time of the dump
        Result {
            bytes: self.lab.bytes("mount", "staging") - self.bytes,
            seconds: self.begun.elapsed().as_secs_f64(),
            sums: sums.map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect(),
        }
    }
}

/// Bytes of all files below a directory; 0 without it.
fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        _ => entry.metadata().map_or(0, |found| found.len()),
    });
    bytes.sum()
}
