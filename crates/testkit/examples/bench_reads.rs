//! `bench_reads PGTHAW [SEGMENTS]`: reads of a relation through the mount on a staging server, from a repository on another host, against
//! `ssh cat` of the same stored bytes over the same link.
//!
//! A lab of three hosts on this machine, which shares its processors among both ends of the link. The relation has segments of 1 GB
//! in an lz4 pgBackRest repository, which lies in the page cache; each is read once, from one end to the other, by `cat` through the
//! real mount of a real session. To hold the session where nothing else happens, its target has a link that carries next to nothing.
//! Afterwards the same with 5 ms more of a round trip. Needs root. Ends with 1 where a limit of the project is missed.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{
    Host, HostPlan, HostProcess, Lab, LargeBackup, Proxy, ProxyOptions, Scratch, User,
    claim_memory, measure, run,
};

/// The kernel counts processor time in ticks of 10 ms.
const TICKS: f64 = 100.0;
/// At least this part of the speed of `ssh cat` over the same link, and with the delay.
const LIMITS: [f64; 2] = [0.8, 0.5];
/// Added to each round trip the second time.
const ROUND_TRIP: Duration = Duration::from_millis(5);
/// Where the mount server's `ssh` meets the delay.
const SLOW_PORT: u16 = 2222;
/// Bytes per second that the target's link carries while a session is held.
const HELD: u64 = 20_000;
/// Where the repository lies on the mount server.
const REPOSITORY: &str = "/srv/repository";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (program, segments) = match &arguments[..] {
        [program] => (program, Some(3)),
        [program, segments] => (program, segments.parse().ok()),
        _ => (&String::new(), None),
    };
    let Some(segments) = segments else {
        eprintln!("usage: bench_reads PGTHAW [SEGMENTS]");
        return ExitCode::from(2);
    };
    if User::current().uid != 0 {
        eprintln!("bench_reads: hosts of a lab need root");
        return ExitCode::from(2);
    }
    if bench(Path::new(program), segments) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bench(program: &Path, segments: u32) -> bool {
    let dir = Scratch::new();
    println!("building a relation of {segments} GB and its backup");
    let stored = LargeBackup::build(&dir, segments);
    let mount = HostPlan::new("mount").program(program).share(&stored.repository, REPOSITORY);
    let other = |name| HostPlan::new(name).program(program);
    let lab = Lab::with([mount, other("staging"), other("target")]);
    let options = ProxyOptions { delay: ROUND_TRIP / 2, ..ProxyOptions::default() };
    let sshd = ([127, 0, 0, 1], 22).into();
    let _slow = Proxy::start(lab.host("staging"), SLOW_PORT, sshd, options);

    let mut good = true;
    let mut plain = Vec::new();
    for (delayed, limit) in LIMITS.into_iter().enumerate() {
        let port = if delayed == 0 { 22 } else { SLOW_PORT };
        println!("{}", if delayed == 0 { "as it is" } else { "with 5 ms more of a round trip" });
        let session = Session::hold(&lab, port, stored.database);
        let (mut ratios, mut without, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        for segment in 0..segments {
            let suffix = if segment == 0 { String::new() } else { format!(".{segment}") };
            let file = format!("{REPOSITORY}/{}{suffix}.lz4", stored.relation);
            run(&mut cat(&lab, "mount", "ann", &file)); // into the page cache
            let login = measure(&ssh(&lab, port, "/dev/null")).1.seconds;
            let mut ssh = cost(&lab, &ssh(&lab, port, &file), &[]);
            ssh.seconds -= login;
            let path = format!("{}/{}{suffix}", session.mount, stored.path);
            claim_memory(2 << 30); // for the page cache
            let read = cost(&lab, &cat(&lab, "staging", "dba", &path), &session.processes());
            for (what, cost) in [("ssh cat", ssh), ("the mount", read)] {
                println!(
                    "{:>10.1} MB over the link in {:.2} s and {:.2} s of processor time by {what}",
                    cost.bytes as f64 / 1e6,
                    cost.seconds,
                    cost.processor,
                );
            }
            if delayed == 0 {
                plain.push(ssh.seconds);
            }
            ratios.push(ssh.seconds / read.seconds);
            without.push(plain[segment as usize] / read.seconds);
            rates.push(1073.7 / read.seconds);
        }
        let ratio = middle(&mut ratios);
        good &= ratio >= limit;
        let judged = if ratio >= limit { "kept" } else { "MISSED" };
        println!(
            "{ratio:>10.2} of the speed of ssh cat, at least {limit}: {judged} ({ratios:.2?}); {:.0} MB/s of the relation",
            middle(&mut rates)
        );
        if delayed > 0 {
            // The delay is a process that takes processor time from whatever goes through it.
            println!("{:>10.2} of the speed of ssh cat without the delay", middle(&mut without));
        }
    }
    good
}

/// The one in the middle.
fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// An export that has dumped, and waits for its target.
struct Session<'a> {
    lab: &'a Lab,
    export: Child,
    id: String,
    /// The mounted data directory.
    mount: String,
}

impl<'a> Session<'a> {
    fn hold(lab: &'a Lab, port: u16, database: &str) -> Self {
        let mut export = lab.host("mount").command("ann", "pgthaw");
        export.args(["export", REPOSITORY, "-d", database, "-t", "small", "-Z", "none"]);
        export.args(["--staging", &format!("ssh://dba@staging:{port}"), "--to", "ops@target:out"]);
        let export = export.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        let status = || {
            let mut sessions = lab.host("mount").command("ann", "pgthaw");
            let output = run(sessions.args(["sessions", "--output", "json"]));
            let all: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
            all.as_array().and_then(|all| all.last().cloned()).unwrap_or_default()
        };
        wait_for("the session to recover", || status()["step"] == "recover");
        for machine in ["mount", "staging"] {
            lab.throttle(machine, "target", Some(HELD)); // whichever way the dump goes
        }
        wait_for("the session to dump", || status()["step"] == "dump");
        let dumps = |host: &Host| {
            host.processes().iter().any(|process| process.arguments.contains("pg_dump "))
        };
        wait_for("pg_dump", || dumps(lab.host("staging")));
        wait_for("pg_dump's end", || !dumps(lab.host("staging")));
        let id = status()["id"].as_str().expect("a session").to_owned();
        let mount = format!("/var/tmp/pgthaw-{id}/mount/data");
        Self { lab, export, id, mount }
    }
}

impl Session<'_> {
    /// Everything of it that runs on the two hosts.
    fn processes(&self) -> Vec<HostProcess> {
        let hosts = ["mount", "staging"].map(|name| self.lab.host(name).processes());
        hosts.into_iter().flatten().collect()
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        for machine in ["mount", "staging"] {
            self.lab.throttle(machine, "target", None);
        }
        let mut cancel = self.lab.host("mount").command("ann", "pgthaw");
        run(cancel.args(["cancel", &self.id]));
        let _ = self.export.wait(); // it was canceled
    }
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What something cost.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    /// Processor time on both hosts, in seconds.
    processor: f64,
    /// Bytes from the mount server to the staging server.
    bytes: u64,
}

/// Runs a command, which prints the ticks that its other end has used, and returns what it and the given processes cost.
fn cost(lab: &Lab, command: &Command, with: &[HostProcess]) -> Cost {
    let (bytes, before) = (lab.bytes("mount", "staging"), ticks(with));
    let (output, usage) = measure(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8_lossy(&output.stdout);
    let told = told.split_whitespace().map(|ticks| ticks.parse::<f64>().expect("ticks"));
    let ticks = ticks(with) - before + told.sum::<f64>();
    let processor = usage.user + usage.system + ticks / TICKS;
    Cost { seconds: usage.seconds, processor, bytes: lab.bytes("mount", "staging") - bytes }
}

/// Processor time of running processes (proc_pid_stat(5), fields 14 and 15).
fn ticks(processes: &[HostProcess]) -> f64 {
    let ticks = |process: &HostProcess| -> f64 {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum()
    };
    processes.iter().map(ticks).sum()
}

/// Reads a file of a host, and throws it away.
fn cat(lab: &Lab, host: &str, user: &str, file: &str) -> Command {
    let mut command = lab.host(host).command(user, "sh");
    command.arg("-c").arg(format!("exec cat {file} > /dev/null"));
    command
}

/// `cat` of a file of the mount server on the staging server, through the system's `ssh` with its defaults.
fn ssh(lab: &Lab, port: u16, file: &str) -> Command {
    // What sshd has used, which decrypts in the parent of the shell.
    let far = "cat > /dev/null; cut -d \" \" -f 14,15 /proc/$PPID/stat";
    let near = format!("exec ssh -o BatchMode=yes -p {port} dba@staging '{far}' < {file}");
    let mut command = lab.host("mount").command("ann", "sh");
    command.args(["-c", &near]);
    command
}
