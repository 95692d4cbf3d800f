//! Delivery to another machine: what arrives, what is sent again after every interruption, and what a hostile peer gets.

use std::fs;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pgthaw_mover::{
    Connection, CopyFile, Delivered, Directory, GLOBALS_SQL, Heartbeat, MoveError, Place,
    ReceiveError, RemoteOptions, RemoteTarget, Reuse, SumEntry, Target, TargetDirectory, receive,
    sha256_of,
};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
/// Most bytes that are on their way, as `sending.rs` says.
const WINDOW: u64 = 32 << 20;
const SESSION: &str = "s1";
const LIMIT: Duration = Duration::from_secs(30);

struct Lab {
    _dir: TempDir,
    dump: PathBuf,
    target: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (dump, target) = (dir.path().join("dump"), dir.path().join("target"));
        fs::create_dir(&dump).unwrap();
        Self { _dir: dir, dump, target }
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.dump.join(name), content).unwrap();
    }

    /// Where the database `crm` is staged.
    fn staged(&self) -> PathBuf {
        self.target.join(format!(".pgthaw-{SESSION}/crm"))
    }

    fn journal(&self) -> PathBuf {
        self.target.join(format!(".pgthaw-{SESSION}/.chunks/crm"))
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.dump)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Starts a receiver on one end of a pair of sockets and returns the other.
    fn serve(&self) -> (UnixStream, JoinHandle<Result<(), ReceiveError>>) {
        let (near, far) = UnixStream::pair().unwrap();
        (near, self.serve_on(Connection::of_unix(far).unwrap()))
    }

    fn serve_on(&self, connection: Connection) -> JoinHandle<Result<(), ReceiveError>> {
        let path = self.target.clone();
        thread::spawn(move || {
            let target = open_target(&path);
            receive(target.as_ref().map_err(|_| unreachable!()), connection, heartbeat())
        })
    }

    fn deliver(&self, target: &RemoteTarget, reuse: Reuse) -> Result<Vec<Delivered>, MoveError> {
        deliver(target, &self.dump, &self.names(), reuse)
    }

    fn assert_arrived(&self) {
        for name in self.names() {
            let staged = self.staged().join(&name);
            assert!(
                fs::read(&staged).unwrap() == fs::read(self.dump.join(&name)).unwrap(),
                "{name}"
            );
            assert_eq!(
                fs::metadata(&staged).unwrap().permissions().mode() & 0o7777,
                0o600,
                "{name}"
            );
        }
    }
}

/// A receiver that is being ended may still hold the lock.
fn open_target(path: &Path) -> Result<TargetDirectory, MoveError> {
    let begun = Instant::now();
    loop {
        match TargetDirectory::create(path, SESSION) {
            Err(MoveError::InUse { .. }) if begun.elapsed() < LIMIT => {
                thread::sleep(Duration::from_millis(2));
            }
            opened => return opened,
        }
    }
}

fn heartbeat() -> Heartbeat {
    Heartbeat { every: Duration::from_millis(500), silent: Duration::from_secs(20) }
}

fn options() -> RemoteOptions {
    RemoteOptions { stall_limit: LIMIT, heartbeat: heartbeat(), ..RemoteOptions::default() }
}

fn remote() -> RemoteTarget {
    RemoteTarget::new(options(), |_| {})
}

fn connected(lab: &Lab) -> RemoteTarget {
    let target = remote();
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    target
}

fn deliver(
    target: &dyn Target,
    dump: &Path,
    names: &[String],
    reuse: Reuse,
) -> Result<Vec<Delivered>, MoveError> {
    let files: Vec<_> = names.iter().map(|name| CopyFile { name, reuse }).collect();
    let mut delivered = vec![None; files.len()];
    let mut bytes = 0;
    target.deliver(
        Place::Database("crm"),
        &files,
        &Directory::open_source(dump).unwrap(),
        &mut |more| {
            bytes += more;
            ControlFlow::Continue(())
        },
        &mut |at, file| assert_eq!(delivered[at].replace(file), None, "told once"),
    )?;
    let delivered: Vec<Delivered> = delivered.into_iter().map(Option::unwrap).collect();
    assert_eq!(bytes, delivered.iter().map(|file| file.bytes).sum::<u64>());
    Ok(delivered)
}

/// Bytes that no two chunks share.
fn content(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend((state >> 16).to_le_bytes().into_iter().take(6));
    }
    bytes.truncate(length);
    bytes
}

fn many_kinds(lab: &Lab) {
    for (name, length) in [
        ("empty", 0),
        ("small", 10),
        ("exactly one chunk", MIB),
        ("chunk and a byte", MIB + 1),
        ("large", 9 * MIB + 7),
        ("we ird\\\n\"näme\"", 100),
        (".hidden", 5),
        ("toc.dat", 3000),
    ] {
        lab.write(name, &content(length, length as u64));
    }
    for at in 0..300 {
        lab.write(&format!("{at}.dat"), format!("file {at}").as_bytes());
    }
}

#[test]
fn everything_arrives_and_is_verified() {
    for compress in [false, true] {
        let lab = Lab::new();
        many_kinds(&lab);
        lab.write("text", &b"1\tsome text\t2026-01-01\n".repeat(200_000));
        let target = RemoteTarget::new(RemoteOptions { compress, ..options() }, |_| {});
        target.connect(Connection::of_unix(lab.serve().0).unwrap());
        let delivered = lab.deliver(&target, Reuse::IfEqual).unwrap();
        for (name, delivered) in lab.names().iter().zip(delivered) {
            let (bytes, sha256) =
                sha256_of(&mut fs::File::open(lab.dump.join(name)).unwrap()).unwrap();
            assert_eq!(delivered, Delivered { bytes, sha256, reused: false }, "{name}");
        }
        lab.assert_arrived();
        let status = target.status();
        assert!(status.connected && status.bytes_resent == 0, "{status:?}");
    }
}

#[test]
fn a_whole_export_equals_a_local_one() {
    let lab = Lab::new();
    lab.write("toc.dat", b"toc");
    lab.write("1.dat", b"data");
    let target = connected(&lab);
    assert_eq!(target.published_before("crm").unwrap(), None);
    assert_eq!((target.kept_sums("crm").unwrap(), target.kept_note("crm").unwrap()), (None, None));
    let delivered = lab.deliver(&target, Reuse::Never).unwrap();
    let globals = tempfile::tempdir().unwrap();
    fs::write(globals.path().join(GLOBALS_SQL), "CREATE ROLE x;").unwrap();
    let mut sums: Vec<SumEntry> = ["1.dat", "toc.dat"]
        .iter()
        .zip(&delivered)
        .map(|(name, file)| SumEntry { path: format!("crm/{name}"), sha256: file.sha256 })
        .collect();
    target
        .deliver(
            Place::TopLevel,
            &[CopyFile { name: GLOBALS_SQL, reuse: Reuse::Never }],
            &Directory::open_source(globals.path()).unwrap(),
            &mut |_| ControlFlow::Continue(()),
            &mut |_, file| sums.push(SumEntry { path: GLOBALS_SQL.into(), sha256: file.sha256 }),
        )
        .unwrap();
    target.keep_note("crm", "a note").unwrap();
    target.keep_sums("crm", &sums[..2]).unwrap();
    assert_eq!(target.kept_note("crm").unwrap().as_deref(), Some("a note"));
    assert_eq!(target.kept_sums("crm").unwrap().as_deref(), Some(&sums[..2]));
    let missing = target.publish_database("crm", &["toc.dat", "2.dat"]);
    assert!(
        matches!(&missing, Err(MoveError::Missing { path }) if path.ends_with("2.dat")),
        "{missing:?}"
    );
    // It has removed the file that it was not told of.
    lab.deliver(&target, Reuse::Never).unwrap();
    target.remove_replaced().unwrap();
    for _ in ["publish", "repeat"] {
        assert_eq!(target.publish_database("crm", &["toc.dat", "1.dat"]).unwrap(), "crm");
        target.publish_file(GLOBALS_SQL).unwrap();
    }
    assert_eq!(target.published_before("crm").unwrap(), Some(7));
    target.write_sha256sums(&sums).unwrap();
    target.write_export_json(b"{}").unwrap();
    let bytes = target.export_bytes(&sums).unwrap();
    target.remove_staging().unwrap();

    let mut names: Vec<_> =
        fs::read_dir(&lab.target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["SHA256SUMS", "crm", "export.json", "globals.sql"]);
    let listing = fs::metadata(lab.target.join("SHA256SUMS")).unwrap().len();
    assert_eq!(bytes, 7 + 14 + 2 + listing);
    let mut check = Command::new("sha256sum");
    check.args(["--check", "--strict", "--quiet", "SHA256SUMS"]).current_dir(&lab.target);
    assert!(check.status().unwrap().success());
}

/// Passes bytes between two sockets until it has passed so many in one direction.
struct Wire {
    ends: Vec<UnixStream>,
}

/// What a wire does to the bytes from the sender to the receiver, or the other way.
#[derive(Clone, Copy, Default)]
struct Fault {
    /// It breaks after so many bytes from the sender.
    cut_forward: Option<u64>,
    /// It breaks after so many bytes from the receiver.
    cut_back: Option<u64>,
    /// It flips a bit of this byte from the sender.
    flip: Option<u64>,
}

impl Wire {
    /// Puts a wire between a sender, who gets the connection, and a receiver.
    fn to(receiver: UnixStream, fault: Fault) -> (Self, Connection) {
        let (near, far) = UnixStream::pair().unwrap();
        let ends = vec![far.try_clone().unwrap(), receiver.try_clone().unwrap()];
        let wire = Self { ends };
        wire.pass(
            far.try_clone().unwrap(),
            receiver.try_clone().unwrap(),
            fault.cut_forward,
            fault.flip,
        );
        wire.pass(receiver, far, fault.cut_back, None);
        (wire, Connection::of_unix(near).unwrap())
    }

    fn pass(&self, mut from: UnixStream, mut to: UnixStream, cut: Option<u64>, flip: Option<u64>) {
        let ends: Vec<_> = self.ends.iter().map(|end| end.try_clone().unwrap()).collect();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            let mut passed = 0;
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let left = cut.map_or(count as u64, |cut| (cut - passed).min(count as u64));
                if let Some(at) = flip.and_then(|at| at.checked_sub(passed)).filter(|at| *at < left)
                {
                    buffer[at as usize] ^= 4;
                }
                if to.write_all(&buffer[..left as usize]).is_err() {
                    break;
                }
                passed += left;
                if cut == Some(passed) {
                    break;
                }
            }
            shut(&ends);
        });
    }
}

fn shut(ends: &[UnixStream]) {
    for end in ends {
        let _ = end.shutdown(std::net::Shutdown::Both); // the other end may be gone
    }
}

/// Hands `target` a new connection whenever it has none, with the next of `faults` while there are some.
fn keep_connected(lab: &Lab, target: &Arc<RemoteTarget>, faults: Vec<Fault>) -> Keeper {
    let (path, target, ended) =
        (lab.target.clone(), target.clone(), Arc::new(AtomicBool::new(false)));
    let stop = ended.clone();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let thread = thread::spawn(move || {
        let mut faults = faults.into_iter();
        let mut wires = Vec::new();
        while !stop.load(Ordering::SeqCst) {
            let (near, far) = UnixStream::pair().unwrap();
            let opening = path.clone();
            let receiver = thread::spawn(move || {
                let target = open_target(&opening).unwrap();
                receive(Ok(&target), Connection::of_unix(far).unwrap(), heartbeat())
            });
            let (wire, connection) = Wire::to(near, faults.next().unwrap_or_default());
            wires.push(wire);
            target.connect(connection);
            count.fetch_add(1, Ordering::SeqCst);
            while !receiver.is_finished() && !stop.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
    Keeper { ended, thread: Some(thread), connections }
}

struct Keeper {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    connections: Arc<AtomicUsize>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

#[test]
fn a_connection_may_break_at_any_byte_in_either_direction() {
    let lab = Lab::new();
    many_kinds(&lab);
    // As many bytes as go over a connection that does not break, in each direction, roughly.
    let forward = (14 * MIB) as u64;
    let faults = (0..40_u64).map(|at| match at % 4 {
        0 => Fault { cut_forward: Some(at * at), ..Fault::default() },
        1 => Fault { cut_back: Some(at * 7), ..Fault::default() },
        2 => Fault { cut_forward: Some(forward * at / 40), ..Fault::default() },
        _ => Fault { cut_back: Some(at * 200), ..Fault::default() },
    });
    let target = Arc::new(remote());
    let keeper = keep_connected(&lab, &target, faults.collect());
    let delivered = lab.deliver(&target, Reuse::Never).unwrap();
    assert!(delivered.iter().all(|file| file.bytes > 0 || !file.reused));
    lab.assert_arrived();
    assert!(keeper.connections.load(Ordering::SeqCst) > 10);
    target.keep_note("crm", "note").unwrap();
    assert_eq!(target.kept_note("crm").unwrap().as_deref(), Some("note"));
}

#[test]
fn only_what_was_on_its_way_is_sent_again() {
    let lab = Lab::new();
    let length = 200 * MIB as u64;
    lab.write("1.dat", &content(length as usize, 1));
    let target = Arc::new(remote());
    let cuts =
        [70, 60].map(|mib| Fault { cut_forward: Some(mib * MIB as u64), ..Fault::default() });
    let _keeper = keep_connected(&lab, &target, cuts.into());
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
    let status = target.status();
    assert!(status.bytes_resent <= 2 * WINDOW, "{status:?}");
    assert_eq!(status.bytes_sent, length + status.bytes_resent);
}

#[test]
fn a_damaged_frame_ends_the_connection_and_nothing_else() {
    let lab = Lab::new();
    lab.write("1.dat", &content(3 * MIB, 1));
    let target = Arc::new(remote());
    // In the greeting, in a chunk's data, in its head.
    let flips = [5, MIB as u64, 2 * MIB as u64 + 300];
    let faults = flips.map(|at| Fault { flip: Some(at), ..Fault::default() });
    let keeper = keep_connected(&lab, &target, faults.into());
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
    assert!(keeper.connections.load(Ordering::SeqCst) >= 3);
}

/// Delivers until the connection breaks after so many bytes; the receiver ends then.
fn deliver_part(lab: &Lab, bytes: u64) -> MoveError {
    let (near, receiver) = lab.serve();
    let target = remote();
    target.connect(Wire::to(near, Fault { cut_forward: Some(bytes), ..Fault::default() }).1);
    let names = lab.names();
    let files: Vec<_> = names.iter().map(|name| CopyFile { name, reuse: Reuse::IfEqual }).collect();
    let mut stop = |_| match target.status().reason {
        Some(reason) if reason != "not yet connected" => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let source = Directory::open_source(&lab.dump).unwrap();
    let delivered =
        target.deliver(Place::Database("crm"), &files, &source, &mut stop, &mut |_, _| {});
    let _ = receiver.join().unwrap(); // it makes sure of what has come
    delivered.unwrap_err()
}

#[test]
fn another_sender_goes_on_with_what_is_there() {
    let lab = Lab::new();
    let length = 80 * MIB;
    lab.write("1.dat", &content(length, 1));
    lab.write("2.dat", &content(MIB + 5, 2));
    assert!(matches!(deliver_part(&lab, 50 * MIB as u64), MoveError::Stopped { .. }));
    let there = fs::metadata(lab.staged().join("1.dat")).unwrap().len();
    assert!(there > 49 * MIB as u64 - WINDOW, "{there}");

    let target = connected(&lab);
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    let sent = target.status().bytes_sent;
    assert!(sent <= (length + MIB + 5 - 49 * MIB) as u64 + WINDOW, "{sent}");
    lab.assert_arrived();

    drop(target);
    // Now all of it is there: nothing is sent, but for a file that has changed, from where it has.
    let target = connected(&lab);
    let delivered = lab.deliver(&target, Reuse::IfEqual).unwrap();
    assert!(delivered.iter().all(|file| file.reused) && target.status().bytes_sent == 0);
    let mut changed = content(length, 1);
    changed[70 * MIB] ^= 1;
    lab.write("1.dat", &changed);
    let delivered = lab.deliver(&target, Reuse::IfEqual).unwrap();
    assert_eq!(delivered.iter().map(|file| file.reused).collect::<Vec<_>>(), [false, true]);
    assert_eq!(target.status().bytes_sent, 10 * MIB as u64);
    lab.assert_arrived();

    // Shorter, longer, and of one attempt only.
    lab.write("1.dat", &changed[..3 * MIB + 1]);
    lab.write("2.dat", &content(MIB + 6, 3));
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
    let before = target.status().bytes_sent;
    let inode = fs::metadata(lab.staged().join("2.dat")).unwrap().ino();
    fs::hard_link(lab.staged().join("2.dat"), lab.target.join("kept")).unwrap();
    let delivered = lab.deliver(&target, Reuse::Never).unwrap();
    assert!(delivered.iter().all(|file| !file.reused));
    assert_eq!(target.status().bytes_sent - before, (3 * MIB + 1 + MIB + 6) as u64);
    assert_ne!(fs::metadata(lab.staged().join("2.dat")).unwrap().ino(), inode);
}

#[test]
fn another_receiver_goes_on_whatever_the_journal_has_lost() {
    let lab = Lab::new();
    lab.write("1.dat", &content(12 * MIB + 9, 1));
    lab.write("2.dat", b"small");
    lab.deliver(&connected(&lab), Reuse::IfEqual).unwrap();
    let whole = fs::metadata(lab.journal()).unwrap().len() as usize;
    let mut sent = Vec::new();
    for length in (0..whole).step_by(97).chain([whole - 1]) {
        let journal = fs::read(lab.journal()).unwrap();
        // As after a kill: a torn record, and more data than was written down.
        fs::write(lab.journal(), &journal[..length]).unwrap();
        let target = connected(&lab);
        lab.deliver(&target, Reuse::IfEqual).unwrap();
        lab.assert_arrived();
        sent.push(target.status().bytes_sent);
        drop(target);
        fs::remove_dir_all(&lab.target).unwrap();
        lab.deliver(&connected(&lab), Reuse::IfEqual).unwrap();
    }
    assert_eq!((sent[0], *sent.last().unwrap()), (12 * MIB as u64 + 9 + 5, 5));
    assert!(sent.is_sorted_by(|a, b| a >= b), "{sent:?}");
}

/// Bytes that this process has read from files (proc_pid_io(5)); what it receives from sockets is not counted.
fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn another_receiver_reads_nothing_again() {
    // In a process of its own: others read meanwhile.
    if std::env::var_os("PGTHAW_TEST_ALONE").is_none() {
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.args(["--exact", "another_receiver_reads_nothing_again", "--nocapture"]);
        assert!(alone.env("PGTHAW_TEST_ALONE", "1").status().unwrap().success());
        return;
    }
    let lab = Lab::new();
    let length = 64 * MIB as u64;
    lab.write("1.dat", &content(length as usize, 1));
    deliver_part(&lab, 60 * MIB as u64);
    let before = bytes_read();
    let target = connected(&lab);
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    let sent = target.status().bytes_sent;
    // The sender reads its file, and the receiver reads back what has arrived now.
    let read = bytes_read() - before - length - sent;
    assert!(sent > 0 && sent < 5 * MIB as u64 + WINDOW, "{sent}");
    assert!(read < MIB as u64, "{read} bytes were read again");
}

#[test]
fn a_source_that_changes_is_noticed() {
    let lab = Lab::new();
    lab.write("1.dat", &content(40 * MIB, 1));
    let target = connected(&lab);
    let path = lab.dump.join("1.dat");
    let mut touch = |bytes| {
        if bytes > 0 {
            fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        }
        ControlFlow::Continue(())
    };
    let file = CopyFile { name: "1.dat", reuse: Reuse::IfEqual };
    let source = Directory::open_source(&lab.dump).unwrap();
    let changed =
        target.deliver(Place::Database("crm"), &[file], &source, &mut touch, &mut |_, _| {});
    assert!(matches!(changed, Err(MoveError::SourceChanged { .. })), "{changed:?}");
    for name in ["..", "a/b", "", "absent"] {
        let absent = deliver(&target, &lab.dump, &[name.into()], Reuse::IfEqual);
        assert!(matches!(absent, Err(MoveError::Source { .. })), "{name:?}: {absent:?}");
    }
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
}

#[test]
fn what_stands_in_the_way_is_named() {
    let lab = Lab::new();
    lab.write("f", b"content");
    let target = connected(&lab);
    target.keep_note("crm", "makes the staging directory").unwrap();
    fs::create_dir_all(lab.staged().join("f")).unwrap();
    let error = lab.deliver(&target, Reuse::IfEqual).unwrap_err();
    assert!(matches!(&error, MoveError::Exists { path } if path.ends_with("crm/f")), "{error:?}");
    fs::remove_dir(lab.staged().join("f")).unwrap();
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
}

/// A tmpfs of a few megabytes, unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir.path())
            .output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("skipped: this account cannot mount a tmpfs");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_named_and_the_rest_is_sent_once_there_is_room() {
    let Some(disk) = SmallDisk::new("size=24m,mode=0700") else { return };
    let mut lab = Lab::new();
    lab.target = disk.0.path().join("export");
    let length = 40 * MIB as u64;
    lab.write("1.dat", &content(length as usize, 1));
    let target = connected(&lab);
    let error = lab.deliver(&target, Reuse::IfEqual).unwrap_err();
    let MoveError::NoSpace { dir, free, quota: false, .. } = &error else { panic!("{error:?}") };
    assert_eq!((dir.as_path(), *free), (lab.staged().as_path(), 0));
    assert!(error.hint().unwrap().contains("make room") && error.is_target());
    assert!(target.status().connected, "the connection is still good");

    let grown = Command::new("mount").args(["-o", "remount,size=100m"]).arg(disk.0.path()).status();
    assert!(grown.unwrap().success());
    drop(target);
    let target = connected(&lab);
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    lab.assert_arrived();
    let sent = target.status().bytes_sent;
    assert!(sent < length - 20 * MIB as u64, "{sent}");
}

#[test]
fn a_call_waits_for_a_connection_and_not_for_ever() {
    let lab = Lab::new();
    lab.write("1.dat", b"content");
    let changes = Arc::new(AtomicUsize::new(0));
    let count = changes.clone();
    let limit = Duration::from_millis(300);
    let target = RemoteTarget::new(RemoteOptions { stall_limit: limit, ..options() }, move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let since = target.status().since;
    let begun = Instant::now();
    let error = lab.deliver(&target, Reuse::IfEqual).unwrap_err();
    assert!(begun.elapsed() >= limit);
    let MoveError::Unreachable { since: told, reason } = &error else { panic!("{error:?}") };
    assert_eq!((*told, reason.as_str()), (since, "not yet connected"));
    assert!(error.to_string().contains(&since.to_string()), "{error}");
    assert!(error.is_target() && error.hint().is_some());

    // One that comes in time is used.
    thread::scope(|threads| {
        let waiting = threads.spawn(|| lab.deliver(&target, Reuse::IfEqual));
        thread::sleep(limit / 3);
        target.connect(Connection::of_unix(lab.serve().0).unwrap());
        waiting.join().unwrap().unwrap();
    });
    assert!(target.status().connected);
    lab.assert_arrived();
    assert!(changes.load(Ordering::SeqCst) <= 1, "waits shorter than a heartbeat are not told");

    // Another one takes its place.
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    target.keep_note("crm", "over the second").unwrap();
    assert!(changes.load(Ordering::SeqCst) >= 2);
}

#[test]
fn who_waits_for_the_first_connection_is_told() {
    let lab = Lab::new();
    lab.write("1.dat", b"content");
    let (tell, told) = mpsc::channel();
    let target = RemoteTarget::new(options(), move |status| tell.send(status.clone()).unwrap());
    thread::scope(|threads| {
        let waiting = threads.spawn(|| lab.deliver(&target, Reuse::IfEqual));
        let status = told.recv_timeout(LIMIT).unwrap();
        assert!(!status.connected && status.reason.as_deref() == Some("not yet connected"));
        target.connect(Connection::of_unix(lab.serve().0).unwrap());
        assert!(told.recv_timeout(LIMIT).unwrap().connected);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn what_waits_can_be_stopped_and_aborted() {
    let lab = Lab::new();
    lab.write("1.dat", b"content");
    let target = remote();
    let source = Directory::open_source(&lab.dump).unwrap();
    let file = CopyFile { name: "1.dat", reuse: Reuse::IfEqual };
    let stopped = target.deliver(
        Place::Database("crm"),
        &[file],
        &source,
        &mut |_| ControlFlow::Break(()),
        &mut |_, _| {},
    );
    assert!(matches!(stopped, Err(MoveError::Stopped { .. })), "{stopped:?}");

    let (silent, connection) = UnixStream::pair().unwrap();
    target.connect(Connection::of_unix(connection).unwrap());
    thread::scope(|threads| {
        let waiting = threads.spawn(|| target.kept_note("crm"));
        let second = threads.spawn(|| lab.deliver(&target, Reuse::IfEqual));
        thread::sleep(Duration::from_millis(50));
        target.abort();
        assert!(matches!(waiting.join().unwrap(), Err(MoveError::Aborted)));
        assert!(matches!(second.join().unwrap(), Err(MoveError::Aborted)));
    });
    drop(silent);
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    assert!(matches!(target.kept_note("crm"), Err(MoveError::Aborted)));
}

#[test]
fn a_silent_peer_is_noticed_on_both_sides() {
    let quick = Heartbeat { every: Duration::from_millis(20), silent: Duration::from_millis(200) };
    let lab = Lab::new();
    lab.write("1.dat", &content(MIB, 1));
    let target = RemoteTarget::new(RemoteOptions { heartbeat: quick, ..options() }, |_| {});

    // A wire on which nothing arrives any more, and nothing is reset either.
    let (near, far) = UnixStream::pair().unwrap();
    let path = lab.target.clone();
    let receiver = thread::spawn(move || {
        let target = open_target(&path).unwrap();
        receive(Ok(&target), Connection::of_unix(far).unwrap(), quick)
    });
    let (input, output) = (near.try_clone().unwrap(), near.try_clone().unwrap());
    let stuck = Arc::new(AtomicBool::new(false));
    let connection = Connection::new(
        Stuck { stream: input, stuck: stuck.clone() },
        Stuck { stream: output, stuck: stuck.clone() },
    );
    target.connect(connection);
    target.keep_note("crm", "over a good connection").unwrap();
    thread::sleep(quick.silent * 3);
    assert!(target.status().connected, "signs of life keep it: {:?}", target.status());
    stuck.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    while target.status().connected {
        assert!(begun.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(target.status().reason.unwrap().contains("nothing came for 0.2 s"));
    let lost = receiver.join().unwrap();
    assert!(
        matches!(&lost, Err(ReceiveError::Lost { reason }) if reason.contains("nothing came")),
        "{lost:?}"
    );
    drop(near);
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    lab.deliver(&target, Reuse::IfEqual).unwrap();
}

/// A stream that can fall silent without an error.
struct Stuck {
    stream: UnixStream,
    stuck: Arc<AtomicBool>,
}

impl Stuck {
    fn wait(&self) {
        while self.stuck.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_secs(3600));
        }
    }
}

impl Read for Stuck {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.wait();
        Ok(count)
    }
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait();
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_target_that_cannot_be_opened_is_told_with_its_class() {
    let lab = Lab::new();
    lab.write("1.dat", b"content");
    let file = lab.dump.join("1.dat");
    let refused = TargetDirectory::create(&file.join("below"), SESSION).unwrap_err();
    let text = refused.to_string();
    let (near, far) = UnixStream::pair().unwrap();
    let receiver = thread::spawn(move || {
        receive(Err(refused), Connection::of_unix(far).unwrap(), heartbeat())
    });
    let target = remote();
    target.connect(Connection::of_unix(near).unwrap());
    let error = target.kept_note("crm").unwrap_err();
    assert!(matches!(error, MoveError::Target { .. }), "{error:?}");
    assert_eq!(error.to_string(), text);
    assert!(matches!(receiver.join().unwrap(), Err(ReceiveError::Refused(_))));
    // The next one may have more luck.
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    lab.deliver(&target, Reuse::IfEqual).unwrap();
}

#[test]
fn the_limit_in_bytes_per_second_is_kept() {
    let lab = Lab::new();
    lab.write("1.dat", &content(MIB, 1));
    let limit = std::num::NonZeroU64::new(4 * MIB as u64);
    let target = RemoteTarget::new(RemoteOptions { bytes_per_second: limit, ..options() }, |_| {});
    target.connect(Connection::of_unix(lab.serve().0).unwrap());
    let begun = Instant::now();
    lab.deliver(&target, Reuse::IfEqual).unwrap();
    assert!(begun.elapsed() > Duration::from_millis(200), "{:?}", begun.elapsed());
}

/// What is sent over a slow network is compressed where that pays; what arrives, and its checksum, is the same.
#[test]
fn what_waits_to_be_sent_is_compressed_where_it_pays() {
    struct Counted(UnixStream, Arc<AtomicU64>);
    impl Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = self.0.write(bytes)?;
            self.1.fetch_add(count as u64, Ordering::Relaxed);
            thread::sleep(Duration::from_micros(count as u64 / 20)); // 20 MB/s
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let rows: Vec<u8> = (0..)
        .flat_map(|row: u64| format!("{row}\t{}\tsome text\t2026-01-01\n", row * row).into_bytes())
        .take(24 * MIB)
        .collect();
    let wire = |content: &[u8], compress, limit| {
        let lab = Lab::new();
        lab.write("1.dat", content);
        let bytes_per_second = std::num::NonZeroU64::new(limit);
        let options = RemoteOptions { compress, bytes_per_second, ..options() };
        let target = RemoteTarget::new(options, |_| {});
        let (socket, counter) = (lab.serve().0, Arc::new(AtomicU64::new(0)));
        let output = Counted(socket.try_clone().unwrap(), counter.clone());
        target.connect(Connection::new(socket, output));
        let delivered = lab.deliver(&target, Reuse::IfEqual).unwrap();
        let (bytes, sha256) = sha256_of(&mut &content[..]).unwrap();
        assert_eq!(delivered, [Delivered { bytes, sha256, reused: false }]);
        lab.assert_arrived();
        counter.load(Ordering::Relaxed) as f64 / content.len() as f64
    };
    let (packed, plain) = (wire(&rows, true, 0), wire(&rows, false, 0));
    assert!(packed < 0.6 && plain > 1.0, "{packed} and {plain} of the bytes were sent");
    let random = wire(&content(12 * MIB, 1), true, 0);
    assert!((1.0..1.01).contains(&random), "{random} of what cannot be compressed");
    // Below a limit nothing has to wait first.
    let limited = wire(&rows[..MIB], true, u64::MAX);
    assert!(limited < 0.6, "{limited} of a single chunk were sent");
}

/// Not a test: the receiver of the next one, in a process that can be killed. Its standard input is the connection.
#[test]
fn receiver_process() {
    let Some(path) = std::env::var_os("PGTHAW_TEST_RECEIVE") else { return };
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let target = open_target(Path::new(&path)).unwrap();
    let _ = receive(Ok(&target), Connection::of_unix(socket.into()).unwrap(), heartbeat());
    println!("read {}", bytes_read());
}

fn start_receiver(lab: &Lab, target: &RemoteTarget) -> Child {
    let (near, far) = UnixStream::pair().unwrap();
    let mut receiver = Command::new(std::env::current_exe().unwrap());
    receiver.args(["--exact", "receiver_process", "--nocapture"]);
    receiver.env("PGTHAW_TEST_RECEIVE", &lab.target);
    let receiver = receiver.stdin(OwnedFd::from(far)).stdout(Stdio::piped()).spawn().unwrap();
    target.connect(Connection::of_unix(near).unwrap());
    receiver
}

#[test]
fn a_killed_receiver_costs_what_was_on_its_way() {
    let lab = Lab::new();
    let length = 300 * MIB as u64;
    lab.write("1.dat", &content(length as usize, 1));
    for at in 0..200 {
        lab.write(&format!("s{at}.dat"), &content(1000, at));
    }
    let target = remote();
    let mut receiver = start_receiver(&lab, &target);
    let mut kills = [50, 120, 250].map(|mib| mib * MIB as u64).into_iter().peekable();
    let (mut bytes, mut at_last_kill) = (0, 0);
    let names = lab.names();
    let files: Vec<_> = names.iter().map(|name| CopyFile { name, reuse: Reuse::IfEqual }).collect();
    let mut progress = |more| {
        bytes += more;
        if kills.next_if(|kill| bytes > *kill).is_some() {
            receiver.kill().unwrap();
            receiver.wait().unwrap();
            at_last_kill = bytes;
            receiver = start_receiver(&lab, &target);
        }
        ControlFlow::Continue(())
    };
    let source = Directory::open_source(&lab.dump).unwrap();
    target.deliver(Place::Database("crm"), &files, &source, &mut progress, &mut |_, _| {}).unwrap();
    lab.assert_arrived();
    let status = target.status();
    assert!(status.bytes_resent <= 3 * WINDOW, "{status:?}");
    drop(target);
    // What it has read: back, what came to it; and the journal.
    let said = receiver.wait_with_output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let read = said.lines().find_map(|line| line.strip_prefix("read ")).unwrap();
    let read: u64 = read.parse().unwrap();
    let came = length + 200_000 - at_last_kill;
    assert!(read < came + 4 * MIB as u64, "{read} bytes read, {came} came");
}
