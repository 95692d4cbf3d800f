//! `bench PGTHAW [tiny|small|medium]`: what it costs to get `crm` out of an lz4 pgBackRest repository, against
//! `pgbackrest restore --type=immediate` and a start, in the same run with cold caches.
//!
//! The repository lies on a loop device of its own, so that the bytes read from it are the kernel's figure for that
//! device. So does the work directory with the state, in a second export: while it runs, that file system is synced all the
//! time, so that everything written reaches the device, even what is removed a moment later. (The processes' own figures
//! count what PostgreSQL writes three times: twice in the mount's page cache, once where the mount keeps it.)
//! In a third export the instance runs on another host of a lab, and what goes over the link is counted.
//! Needs root. Ends with 1 where a limit of the project is missed (they are for `medium`).

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgthaw_testkit::{
    BackupOptions, BackupType, Cluster, ClusterOptions, HostPlan, Lab, PgBackRest, RestoreTarget,
    Scale, Scratch, User, fingerprint, is_moved_by_traffic, measure,
    restore_dump_into_fresh_server, run,
};

/// Most bytes that may be read from the repository.
const READ_LIMIT: u64 = 100_000_000;
/// Most bytes that may be written besides the dump.
const WRITE_LIMIT: u64 = 150_000_000;
/// Most bytes that may go over the link from the mount server to the staging server.
const LINK_LIMIT: u64 = 100_000_000;
/// The first query is answered in at most this part of the time that restore and start take.
const TIME_PART: f64 = 0.2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (program, scale) = match texts[..] {
        [program] | [program, "medium"] => (program, Scale::Medium),
        [program, "small"] => (program, Scale::Small),
        [program, "tiny"] => (program, Scale::Tiny),
        _ => {
            eprintln!("usage: bench PGTHAW [tiny|small|medium]");
            return ExitCode::from(2);
        }
    };
    if User::current().uid != 0 {
        eprintln!("bench: dropping caches and mounting the repository's own device need root");
        return ExitCode::from(2);
    }
    if bench(Path::new(program), scale) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bench(program: &Path, scale: Scale) -> bool {
    let dir = Scratch::new();
    let device = Device::new(&dir, "repository", 12);
    println!("building the cluster and its backup");
    let source = dir.join("cluster");
    let cluster = Cluster::build(&source, scale, &ClusterOptions::default());
    let repository = PgBackRest::create(&cluster, &device.mount.join("pgbackrest"), "demo", "lz4");
    let traffic = cluster.traffic();
    let label = repository.backup(&BackupOptions {
        kind: BackupType::Full,
        compress: "lz4",
        bundle: false,
    });
    drop(traffic);
    cluster.archive_all();
    let expected = fingerprint(&cluster, "crm").without(is_moved_by_traffic);
    drop(cluster);
    std::fs::remove_dir_all(source).expect("the cluster is stopped");

    let state = dir.join("state");
    std::fs::create_dir(&state).expect("a directory of ours");
    let export = dir.join("export");
    let pgthaw = |arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env("XDG_STATE_HOME", &state);
        command
    };
    let mut command = pgthaw(&["export"]);
    command.arg(repository.path()).args(["-d", "crm", "--to"]).arg(&export);
    drop_caches();
    let read_before = device.bytes_read();
    let (output, usage) = measure(&command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = device.bytes_read() - read_before;
    let delivered = bytes_below(&export);
    let ready = first_query(&run(&mut pgthaw(&["sessions", "--output", "json"])).stdout, &pgthaw)
        - usage.started;

    let written = written_besides_the_dump(program, &dir, &repository.path());
    let over_link = bytes_over_link(program, &repository.path());

    let fresh = restore_dump_into_fresh_server(&export);
    let differences =
        expected.differences(&fingerprint(&fresh, "crm").without(is_moved_by_traffic));
    drop(fresh);
    drop_caches();
    let (begin, read_before) = (Instant::now(), device.bytes_read());
    let restored =
        repository.restore_and_start(&dir.join("restored"), &label, RestoreTarget::EndOfBackup);
    let restore = begin.elapsed().as_secs_f64();
    let restore_read = device.bytes_read() - read_before;
    drop(restored);

    let mega = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{:>10.1} MB delivered, in {:.1} s and {:.1} s of processor time",
        mega(delivered),
        usage.seconds,
        usage.user + usage.system
    );
    println!("{:>10.1} MB read by all processes from all devices", mega(usage.read_bytes));
    println!("{:>10.1} MB read from the repository by pgbackrest restore", mega(restore_read));
    let mut good = differences.is_empty() && read > 0 && written > 0;
    differences.iter().for_each(|line| println!("DIFFERS: {line}"));
    let mut judge = |what: &str, found: f64, limit: f64| {
        good &= found <= limit;
        println!(
            "{found:>10.1} {what}, limit {limit:.1}: {}",
            if found <= limit { "kept" } else { "MISSED" }
        );
    };
    judge("MB read from the repository", mega(read), mega(READ_LIMIT));
    judge("MB written besides the dump", mega(written), mega(WRITE_LIMIT));
    judge("MB sent by the mount server to a staging server", mega(over_link), mega(LINK_LIMIT));
    judge(
        &format!("s to the first query ({restore:.1} s by pgbackrest restore and start)"),
        ready,
        TIME_PART * restore,
    );
    good
}

/// Exports once more with the work directory and the state on a device of their own; returns the bytes written to that device.
fn written_besides_the_dump(program: &Path, dir: &Scratch, repository: &Path) -> u64 {
    let device = Device::new(dir, "work", 4);
    let (state, work) = (device.mount.join("state"), device.mount.join("work"));
    std::fs::create_dir(&state).expect("a directory of ours");
    std::fs::create_dir(&work).expect("a directory of ours");
    let mut command = Command::new(program);
    command.env("XDG_STATE_HOME", &state).arg("export").arg(repository).args(["-d", "crm"]);
    command.arg("--to").arg(dir.join("second")).arg("--work-dir").arg(&work);
    let file_system = std::fs::File::open(&device.mount).expect("a directory of ours");
    let sync = || rustix::fs::syncfs(&file_system).expect("a file system can be synced");
    sync();
    let before = device.bytes_written();
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                sync();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let (output, _) = measure(&command);
        done.store(true, Ordering::Relaxed);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
    sync();
    device.bytes_written() - before
}

/// Exports with the instance on another host of a lab; returns the bytes that the mount server sent to it, by the kernel's figures
/// of the network device. The program is installed there, so it is not among them.
fn bytes_over_link(program: &Path, repository: &Path) -> u64 {
    // An ordinary account of the lab reads it.
    run(Command::new("chmod").args(["--recursive", "o+rX"]).arg(repository));
    let mount = HostPlan::new("mount").program(program).share(repository, "/srv/repository");
    let lab = Lab::with([mount, HostPlan::new("staging").program(program)]);
    let before = lab.bytes("mount", "staging");
    let mut export = lab.host("mount").command("ann", "pgthaw");
    export.args(["export", "/srv/repository", "-d", "crm", "--staging", "dba@staging"]);
    run(export.args(["--to", "/home/ann/export"]));
    lab.bytes("mount", "staging") - before
}

/// Returns when the newest session's instance first answered, in seconds since 1970.
fn first_query(sessions: &[u8], pgthaw: &dyn Fn(&[&str]) -> Command) -> f64 {
    let sessions: serde_json::Value = serde_json::from_slice(sessions).expect("JSON");
    let id = sessions
        .as_array()
        .and_then(|all| all.last())
        .and_then(|last| last["id"].as_str())
        .expect("a session");
    let output = run(&mut pgthaw(&["log", id, "--output", "json"]));
    let log: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let lines = log.as_array().expect("an array");
    let line = lines
        .iter()
        .find(|line| line["text"].as_str().is_some_and(|text| text.starts_with("recovered to")));
    let at = line.and_then(|line| line["at"].as_str()).expect("the log tells when recovery ended");
    let output = run(Command::new("date").args(["+%s.%N", "--date", at]));
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number")
}

fn drop_caches() {
    run(&mut Command::new("sync"));
    std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root may drop caches");
}

fn bytes_below(dir: &Path) -> u64 {
    let size = |entry: std::fs::DirEntry| match entry.metadata().expect("an entry of ours") {
        found if found.is_dir() => bytes_below(&entry.path()),
        found => found.len(),
    };
    std::fs::read_dir(dir)
        .expect("a directory of ours")
        .map(|entry| size(entry.expect("an entry")))
        .sum()
}

/// A file system on a loop device.
struct Device {
    name: String,
    mount: PathBuf,
}

impl Device {
    fn new(dir: &Scratch, name: &str, gigabytes: u32) -> Self {
        let (image, mount) = (dir.join(format!("{name}.img")), dir.join(name));
        std::fs::create_dir(&mount).expect("a directory of ours");
        run(Command::new("truncate").arg(format!("--size={gigabytes}G")).arg(&image));
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        let output = run(Command::new("losetup").args(["--find", "--show"]).arg(&image));
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        run(Command::new("mount").args(["-o", "noatime", &path]).arg(&mount));
        Self { name: path.trim_start_matches("/dev/").into(), mount }
    }

    /// Returns the bytes read from the device so far.
    fn bytes_read(&self) -> u64 {
        self.sectors(2)
    }

    /// Returns the bytes written to the device so far, its file system's own included.
    fn bytes_written(&self) -> u64 {
        self.sectors(6)
    }

    /// Returns a field of the device's statistics in bytes (Documentation/block/stat.rst: sectors of 512 bytes).
    fn sectors(&self, field: usize) -> u64 {
        let stat = std::fs::read_to_string(format!("/sys/block/{}/stat", self.name))
            .expect("every device has one");
        stat.split_whitespace()
            .nth(field)
            .and_then(|sectors| sectors.parse::<u64>().ok())
            .expect("sectors")
            * 512
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mount).status();
        let _ = Command::new("losetup").args(["--detach", &format!("/dev/{}", self.name)]).status();
    }
}
