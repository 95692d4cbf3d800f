//! Measures delivery to another process of this machine against `rsync -e ssh`, alternated, each with throughput and the
//! CPU seconds of both sides per GB; then what it costs that either half is killed in the middle of the large file, and, with
//! `DISK`, delivery to a disk against writing and syncing the same bytes there, and against delivery to memory: as the disk is,
//! and (as root) held to half of what goes to memory, so that it is the disk that limits and not the processors.
//!
//! ```text
//! cargo run --release -p pgthaw-mover --example bench_mover -- DIR [GB [ROUNDS [DISK]]]
//! ```
//! `DIR` gets everything and is emptied again; on a tmpfs (below `/dev/shm`) the disk plays no part. It needs room for twice
//! the data, `DISK` for the data. rsync and sshd are left out where they are not installed; the sshd is our own, on a free port of 127.0.0.1.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgthaw_mover::{
    Connection, CopyFile, Directory, Heartbeat, Identity, Listener, Offer, Place, RemoteOptions,
    RemoteTarget, Reuse, Target, TargetDirectory, dial, receive,
};
use pgthaw_testkit::{HeldDisk, claim_memory};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MANY_FILES: usize = 2000;
const SMALL: usize = 100_000;
/// At least this part of a disk's speed.
const OF_A_DISK: f64 = 0.9;
/// What a disk takes beyond its limit while it is measured counts as held all the same.
const HELD: f64 = 1.05;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["receive", way, target] => receiving(way, Path::new(target)),
        [dir] => bench(Path::new(dir), 2, 3, None),
        [dir, gigabytes] => bench(Path::new(dir), gigabytes.parse()?, 3, None),
        [dir, gigabytes, rounds, disk @ ..] if disk.len() < 2 => {
            let disk = disk.first().map(Path::new);
            bench(Path::new(dir), gigabytes.parse()?, rounds.parse()?, disk)
        }
        _ => Err("usage: bench_mover DIR [GB [ROUNDS [DISK]]]".into()),
    }
}

fn bench(dir: &Path, gigabytes: u64, rounds: usize, disk: Option<&Path>) -> Result<()> {
    let name = format!("bench-mover-{}", std::process::id());
    let work = dir.join(&name);
    fs::create_dir_all(&work)?;
    let mut done = compare(&work, gigabytes, rounds)
        .and_then(|()| interrupt(&work, Killed::Receiver))
        .and_then(|()| interrupt(&work, Killed::Sender));
    if let Some(disk) = disk {
        let disk = disk.join(name);
        fs::create_dir_all(&disk)?;
        done = done.and_then(|()| to_disks(&work, &disk, rounds));
        fs::remove_dir_all(&disk)?;
    }
    fs::remove_dir_all(&work)?;
    done
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    Sender,
    Receiver,
}

/// Delivers the large file, kills one half when the target has half of it, and goes on.
fn interrupt(work: &Path, killed: Killed) -> Result<()> {
    let (dump, path) = (work.join("large"), work.join("target"));
    let bytes = size_of(&dump)?;
    let mut first = Receiver::start("direct", &path)?;
    let target = RemoteTarget::new(RemoteOptions::default(), |_| {});
    first.connect(&target)?;
    let mut second = None;
    let mut secured = 0;
    let mut progress = |more| {
        secured += more;
        if secured < bytes / 2 || second.is_some() {
            return ControlFlow::Continue(());
        }
        let _ = first.process.kill(); // of a sender that dies its receiver hears
        let _ = first.process.wait();
        second = Receiver::start("direct", &path).ok();
        match (killed, &mut second) {
            (Killed::Receiver, Some(second)) => match second.connect(&target) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            },
            _ => ControlFlow::Break(()), // and what it knows is lost
        }
    };
    let delivered = deliver(&target, &dump, &mut progress);
    let mut second = second.ok_or("the second receiver does not start")?;
    let mut sent = target.status().bytes_sent;
    let target = match killed {
        Killed::Receiver => delivered.map(|()| target)?,
        Killed::Sender => {
            drop(target);
            let target = RemoteTarget::new(RemoteOptions::default(), |_| {});
            second.connect(&target)?;
            deliver(&target, &dump, &mut |_| ControlFlow::Continue(()))?;
            sent += target.status().bytes_sent;
            target
        }
    };
    // While it still runs: what it has read of its connection and of files, as proc_pid_io(5) counts it.
    let read = rchar(second.process.id())?;
    drop(target);
    second.end()?;
    let resent = sent - bytes;
    // What comes to the second one is read from the network, and back from the disk.
    let reread = read.saturating_sub(2 * (bytes - bytes / 2 + resent));
    println!(
        "{killed:?} killed at half of {:.1} GB: {:.1} MB sent again ({:.2} %), {:.1} MB read again by the receiver",
        bytes as f64 / 1e9,
        resent as f64 / 1e6,
        resent as f64 / bytes as f64 * 100.0,
        reread as f64 / 1e6
    );
    fs::remove_dir_all(&path)?;
    Ok(())
}

/// Bytes that a process has read, from files and sockets (proc_pid_io(5)).
fn rchar(pid: u32) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).ok_or("no rchar")?;
    Ok(line.parse()?)
}

/// Delivers the large file to a disk as it is, and to the same held back.
fn to_disks(work: &Path, disk: &Path, rounds: usize) -> Result<()> {
    let free = to_disk(work, disk, rounds)?;
    println!(
        "to a disk: {:.0} MB/s; {:.0} MB/s written and synced: {:.2} of its speed; {:.0} MB/s to memory: {:.2} of that",
        free.direct,
        free.plain,
        free.direct / free.plain,
        free.memory,
        free.direct / free.memory,
    );
    let limit = (free.memory / 2.0).round();
    let held = match HeldDisk::hold(disk, limit as u64 * 1_000_000) {
        Ok(held) => held,
        Err(err) => {
            println!("to a disk held to {limit} MB/s: not measured, it cannot be held: {err}");
            return Ok(());
        }
    };
    let slow = to_disk(work, disk, rounds.min(3))?;
    drop(held);
    if slow.plain > limit * HELD {
        println!(
            "to a disk held to {limit} MB/s: not measured, it takes {:.0} MB/s all the same",
            slow.plain
        );
        return Ok(());
    }
    let part = slow.direct / limit;
    println!(
        "to a disk held to {limit} MB/s: {:.0} MB/s, {part:.2} of it, at least {OF_A_DISK}: {}; {:.0} MB/s written and synced",
        slow.direct,
        if part >= OF_A_DISK { "kept" } else { "MISSED" },
        slow.plain,
    );
    Ok(())
}

/// Rates in MB/s.
struct DiskRates {
    direct: f64,
    /// Written and synced.
    plain: f64,
    /// Delivered to memory: what the processors can do.
    memory: f64,
}

/// Delivers the large file to a disk, in turns with writing and syncing the same bytes there, and with delivering it to memory.
fn to_disk(work: &Path, disk: &Path, rounds: usize) -> Result<DiskRates> {
    let dump = work.join("large");
    let bytes = size_of(&dump)? as f64;
    let (mut plain, mut direct, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        claim_memory(bytes as usize);
        let begun = Instant::now();
        let mut from = fs::File::open(dump.join("3001.dat"))?;
        let mut to = fs::File::create(disk.join("plain"))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            to.write_all(&buffer[..count])?;
        }
        to.sync_all()?;
        plain.push(begun.elapsed().as_secs_f64());
        fs::remove_file(disk.join("plain"))?;
        claim_memory(bytes as usize);
        let begun = Instant::now();
        moving("direct", &dump, &disk.join("target"))?;
        direct.push(begun.elapsed().as_secs_f64());
        fs::remove_dir_all(disk.join("target"))?;
        claim_memory(bytes as usize);
        let begun = Instant::now();
        moving("direct", &dump, &work.join("target"))?;
        memory.push(begun.elapsed().as_secs_f64());
        fs::remove_dir_all(work.join("target"))?;
    }
    let rate = |seconds: &[f64]| bytes / median(seconds.iter().copied()) / 1e6;
    Ok(DiskRates { direct: rate(&direct), plain: rate(&plain), memory: rate(&memory) })
}

fn compare(work: &Path, gigabytes: u64, rounds: usize) -> Result<()> {
    let (large, small) = (work.join("large"), work.join("small"));
    fs::create_dir(&large)?;
    fs::create_dir(&small)?;
    let mut rows = Rows::default();
    let mut file = io::BufWriter::with_capacity(1 << 20, fs::File::create(large.join("3001.dat"))?);
    let mut written = 0;
    while written < gigabytes * 1_000_000_000 {
        written += rows.write(&mut file)? as u64;
    }
    file.into_inner()?;
    for number in 0..MANY_FILES {
        let mut content = Vec::with_capacity(SMALL + 256);
        while content.len() < SMALL {
            rows.write(&mut content)?;
        }
        fs::write(small.join(format!("{number}.dat")), content)?;
    }
    let sshd = Sshd::start(work).inspect_err(|err| eprintln!("without rsync: {err}")).ok();
    for (what, dump) in [("one large file", &large), ("2,000 files of 100 KB", &small)] {
        println!("{what}");
        let mut ways = vec!["direct", "socketpair", "copy"];
        ways.extend(sshd.as_ref().map(|_| "rsync"));
        let mut taken: Vec<Vec<Taken>> = vec![Vec::new(); ways.len()];
        for _ in 0..rounds {
            for (way, taken) in ways.iter().zip(&mut taken) {
                let target = work.join("target");
                claim_memory(size_of(dump)? as usize);
                let begun = Instant::now();
                let before = cpu_seconds();
                match (*way, &sshd) {
                    ("rsync", Some(sshd)) => sshd.rsync(dump, &target)?,
                    ("copy", _) => {
                        let target = TargetDirectory::create(&target, "bench")?;
                        deliver(&target, dump, &mut |_| ControlFlow::Continue(()))?;
                    }
                    (way, _) => moving(way, dump, &target)?,
                }
                let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - before);
                let cpu = cpu + sshd.as_ref().filter(|_| *way == "rsync").map_or(0.0, Sshd::cpu);
                taken.push(Taken { seconds, cpu });
                fs::remove_dir_all(&target)?;
            }
        }
        let bytes = size_of(dump)? as f64;
        for (way, taken) in ways.iter().zip(&taken) {
            let seconds = median(taken.iter().map(|taken| taken.seconds));
            let cpu = median(taken.iter().map(|taken| taken.cpu));
            let (rate, cpu) = (bytes / seconds / 1e6, cpu / bytes * 1e9);
            println!("  {way:10} {rate:6.0} MB/s  {cpu:5.2} CPU s/GB");
        }
        if let (Some(rsync), Some(direct)) = (taken.get(3), taken.first()) {
            // Of runs that followed each other: what else the machine does changes meanwhile.
            let pairs = || rsync.iter().zip(direct);
            println!(
                "  direct against rsync: {:.2} times the throughput, {:.2} times the CPU",
                median(pairs().map(|(rsync, direct)| rsync.seconds / direct.seconds)),
                median(pairs().map(|(rsync, direct)| direct.cpu / rsync.cpu))
            );
        }
    }
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What one run took.
#[derive(Clone, Copy)]
struct Taken {
    seconds: f64,
    cpu: f64,
}

/// Rows as COPY writes them; they shrink by a factor of about three.
#[derive(Default)]
struct Rows {
    number: u64,
    state: u64,
}

impl Rows {
    fn write(&mut self, output: &mut impl Write) -> io::Result<usize> {
        self.number += 1;
        let mut next = || {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            self.state >> 20
        };
        let row = format!(
            "{}\t{:011x}-{:011x}\tcustomer{}@example.com\t2026-{:02}-{:02} {:02}:{:02}:{:02}.{:06}+00\t{}.{:02}\t{{\"source\": \"web\", \"cart\": {}}}\n",
            self.number,
            next(),
            next(),
            next() % 500_000,
            next() % 12 + 1,
            next() % 28 + 1,
            next() % 24,
            next() % 60,
            next() % 60,
            next() % 1_000_000,
            next() % 10_000,
            next() % 100,
            next() % 100_000
        );
        output.write_all(row.as_bytes())?;
        Ok(row.len())
    }
}

fn size_of(dump: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dump)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

fn deliver(
    target: &dyn Target,
    dump: &Path,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dump)? {
        names.push(entry?.file_name().into_string().map_err(|_| "not UTF-8")?);
    }
    let files: Vec<_> = names.iter().map(|name| CopyFile { name, reuse: Reuse::IfEqual }).collect();
    let source = Directory::open_source(dump)?;
    target.deliver(Place::Database("crm"), &files, &source, progress, &mut |_, _| {})?;
    Ok(())
}

/// Sends to a receiver in a process of its own.
fn moving(way: &str, dump: &Path, path: &Path) -> Result<()> {
    let target = RemoteTarget::new(RemoteOptions::default(), |_| {});
    let mut receiver = Receiver::start(way, path)?;
    receiver.connect(&target)?;
    deliver(&target, dump, &mut |_| ControlFlow::Continue(()))?;
    drop(target);
    receiver.end()
}

/// A receiver in a process of its own.
struct Receiver {
    process: Child,
    /// This end of a socket pair; none where it is reached directly.
    near: Option<UnixStream>,
}

impl Receiver {
    fn start(way: &str, path: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["receive", way]).arg(path);
        if way == "direct" {
            let process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            return Ok(Self { process, near: None });
        }
        let (near, far) = UnixStream::pair()?;
        let process = command.stdin(Stdio::from(OwnedFd::from(far))).spawn()?;
        Ok(Self { process, near: Some(near) })
    }

    fn connect(&mut self, target: &RemoteTarget) -> Result<()> {
        if let Some(near) = self.near.take() {
            target.connect(Connection::of_unix(near)?);
            return Ok(());
        }
        let identity = Identity::new()?;
        let mut stdin = self.process.stdin.take().ok_or("no input")?;
        writeln!(stdin, "{}", serde_json::to_string(&identity.fingerprint())?)?;
        let mut offer = String::new();
        let stdout = self.process.stdout.take().ok_or("no output")?;
        BufReader::new(stdout).read_line(&mut offer)?;
        let offer: Offer = serde_json::from_str(&offer)?;
        let here = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
        target.connect(dial(&here, &identity, &offer, Duration::from_secs(10))?);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if self.process.wait()?.success() { Ok(()) } else { Err("the receiver failed".into()) }
    }
}

fn receiving(way: &str, path: &Path) -> Result<()> {
    let target = TargetDirectory::create(path, "bench")?;
    let connection = if way == "direct" {
        let mut peer = String::new();
        io::stdin().read_line(&mut peer)?;
        let identity = Identity::new()?;
        let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let listener = Listener::bind(here, 0..=0, &identity, serde_json::from_str(&peer)?)?;
        println!("{}", serde_json::to_string(listener.offer())?);
        listener.accept(Duration::from_secs(10))?
    } else {
        use std::os::fd::AsFd;
        Connection::of_unix(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))?
    };
    Ok(receive(Ok(&target), connection, Heartbeat::default())?)
}

/// CPU seconds of this process and of its children that have ended.
fn cpu_seconds() -> f64 {
    cpu_of("self", true).unwrap_or(0.0)
}

/// CPU seconds of a process, as `/proc/PID/stat` counts them (proc_pid_stat(5)).
fn cpu_of(process: &str, children: bool) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    let own = ticks(11)? + ticks(12)?;
    let all = if children { own + ticks(13)? + ticks(14)? } else { own };
    Some(all / rustix::param::clock_ticks_per_second() as f64)
}

/// An sshd of our own, for rsync.
struct Sshd {
    daemon: Child,
    home: PathBuf,
    port: u16,
    /// What the children of the daemon had used before the last run.
    used: std::cell::Cell<f64>,
}

impl Sshd {
    fn start(work: &Path) -> Result<Self> {
        let home = work.join("sshd");
        fs::create_dir(&home)?;
        Command::new("rsync").arg("--version").stdout(Stdio::null()).status()?;
        for key in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(home.join(key)).status()?;
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {0}/host\nAuthorizedKeysFile {0}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n",
            home.display()
        );
        fs::write(home.join("config"), config)?;
        fs::create_dir_all("/run/sshd")?;
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(home.join("config"));
        let daemon = command.stderr(fs::File::create(home.join("log"))?).spawn()?;
        let sshd = Self { daemon, home, port, used: std::cell::Cell::new(0.0) };
        for _ in 0..100 {
            if sshd.ssh().args(["127.0.0.1", "true"]).output()?.status.success() {
                return Ok(sshd);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(fs::read_to_string(sshd.home.join("log"))?.into())
    }

    fn options(&self) -> Vec<String> {
        let options = format!(
            "-p {} -i {}/user -F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            self.port,
            self.home.display()
        );
        options.split(' ').map(str::to_owned).collect()
    }

    fn ssh(&self) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.options());
        command
    }

    fn rsync(&self, dump: &Path, target: &Path) -> Result<()> {
        self.cpu(); // what was used before does not count
        let mut command = Command::new("rsync");
        command.args(["-a", "--whole-file", "-e"]).arg(format!("ssh {}", self.options().join(" ")));
        command.arg(dump).arg(format!("127.0.0.1:{}/", target.display()));
        let status = command.status()?;
        // The far side may end a moment later; only then the daemon knows what it used.
        std::thread::sleep(Duration::from_millis(200));
        if status.success() { Ok(()) } else { Err("rsync failed".into()) }
    }

    /// CPU seconds that the daemon's children have used since the last call.
    fn cpu(&self) -> f64 {
        let all = cpu_of(&self.daemon.id().to_string(), true).unwrap_or(0.0);
        all - self.used.replace(all)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.daemon.kill(); // it may have ended by itself
        let _ = self.daemon.wait();
    }
}
