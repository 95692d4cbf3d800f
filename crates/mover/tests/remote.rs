//! Delivery to another machine: what arrives, what is sent again after every interruption, and what a hostile peer gets.

use std::fs;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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
