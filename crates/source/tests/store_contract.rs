//! What every object store promises, and that a [`Root`] is never left.

use std::fs;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pgthaw_source::map::{ObjectId, ObjectTable, StoredObject};
use pgthaw_source::store::{
    Kind, LocalStore, MemoryStore, ObjectStore, RemoteOptions, RemoteStore, Root, serve,
};

const CONTENT: &[u8] = b"0123456789";

/// The contract: object 0 holds [`CONTENT`], object 1 is empty, object 2 is in no table.
fn holds_the_contract(name: &str, store: &dyn ObjectStore) {
    let mut buf = [0xAA; 4];
    store.read_exact_at(ObjectId(0), 3, &mut buf).unwrap_or_else(|err| panic!("{name}: {err}"));
    assert_eq!(&buf, b"3456", "{name}");
    store.read_exact_at(ObjectId(0), 6, &mut buf).unwrap_or_else(|err| panic!("{name}: {err}"));
    assert_eq!(&buf, b"6789", "{name}: up to the last byte");
    assert_eq!(store.length(ObjectId(0)).unwrap(), 10, "{name}");
    assert_eq!(store.length(ObjectId(1)).unwrap(), 0, "{name}");
    store.read_exact_at(ObjectId(1), 0, &mut []).unwrap();

    let cases = [
        ("one byte too many", ObjectId(0), 7, ErrorKind::UnexpectedEof),
        ("behind the end", ObjectId(0), 4000, ErrorKind::UnexpectedEof),
        ("an empty object", ObjectId(1), 0, ErrorKind::UnexpectedEof),
        ("an unknown object", ObjectId(2), 0, ErrorKind::NotFound),
    ];
    for (case, object, offset, kind) in cases {
        let err = store.read_exact_at(object, offset, &mut [0; 4]).expect_err(case);
        assert_eq!(err.kind(), kind, "{name}: {case}: {err}");
    }
    assert_eq!(store.length(ObjectId(2)).unwrap_err().kind(), ErrorKind::NotFound, "{name}");
}

fn table(root: PathBuf, paths: &[&str]) -> ObjectTable {
    let objects = paths.iter().map(|path| StoredObject { root: 0, path: (*path).into() }).collect();
    ObjectTable { roots: vec![root], objects }
}

#[test]
fn memory_holds_the_contract() {
    let store = MemoryStore::new([(ObjectId(0), CONTENT.to_vec()), (ObjectId(1), Vec::new())]);
    holds_the_contract("memory", &store);
    assert_eq!(store.bytes_read(), 8);
}

#[test]
fn local_holds_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("full"), CONTENT).unwrap();
    fs::write(dir.path().join("empty"), []).unwrap();
    let store = LocalStore::open(table(dir.path().into(), &["full", "empty"])).unwrap();
    holds_the_contract("local", &store);
}

#[test]
fn remote_holds_the_contract_over_any_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("full"), CONTENT).unwrap();
    fs::write(dir.path().join("empty"), []).unwrap();
    let local = LocalStore::open(table(dir.path().into(), &["full", "empty"])).unwrap();
    let memory = MemoryStore::new([(ObjectId(0), CONTENT.to_vec()), (ObjectId(1), Vec::new())]);
    let stores: [(_, Arc<dyn ObjectStore>); 2] =
        [("remote local", Arc::new(local)), ("remote memory", Arc::new(memory))];
    for (name, store) in stores {
        let (here, there) = UnixStream::pair().unwrap();
        let served = Arc::clone(&store);
        let serving =
            thread::spawn(move || serve(served, there.try_clone().unwrap(), there, 3).unwrap());
        let remote = RemoteStore::new(RemoteOptions::new(Duration::from_secs(60)), |_| {});
        let closing = here.try_clone().unwrap();
        remote
            .connect(here.try_clone().unwrap(), here, move || {
                closing.shutdown(Shutdown::Both).unwrap();
            })
            .unwrap();
        holds_the_contract(name, &remote);
        let error = |store: &dyn ObjectStore| {
            store.read_exact_at(ObjectId(0), 9, &mut [0; 4]).unwrap_err().to_string()
        };
        assert_eq!(error(&remote), error(&*store), "{name}: errors keep their text");
        drop(remote);
        serving.join().expect("serving ends without an error when the other side hangs up");
    }
}

#[test]
fn local_errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("full"), CONTENT).unwrap();
    let store = LocalStore::open(table(dir.path().into(), &["full", "gone"])).unwrap();
    for (object, path) in [(0, "full"), (1, "gone")] {
        let err = store.read_exact_at(ObjectId(object), 9, &mut [0; 4]).unwrap_err().to_string();
        assert!(err.contains(dir.path().join(path).to_str().unwrap()), "{err}");
    }
    let bad = ObjectTable { roots: Vec::new(), ..table(dir.path().into(), &["full"]) };
    assert_eq!(LocalStore::open(bad).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn more_objects_than_descriptors_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..600).map(|number| format!("object-{number}")).collect();
    for name in &names {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let store = LocalStore::open(table(
        dir.path().into(),
        &names.iter().map(String::as_str).collect::<Vec<_>>(),
    ))
    .unwrap();
    let open_before = fs::read_dir("/proc/self/fd").unwrap().count();
    for round in 0..2 {
        for (number, name) in names.iter().enumerate() {
            let mut buf = vec![0; name.len()];
            store.read_exact_at(ObjectId(number as u32), 0, &mut buf).unwrap();
            assert_eq!(buf, name.as_bytes(), "round {round}");
        }
    }
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < open_before + 300, "{open} descriptors are open, {open_before} were before");
}

#[test]
fn nothing_outside_a_root_is_reached() {
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("root");
    fs::create_dir_all(inner.join("sub")).unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    fs::write(inner.join("plain"), "plain").unwrap();
    symlink("../secret", inner.join("up")).unwrap();
    symlink("..", inner.join("parent")).unwrap();
    symlink(outer.path().join("secret"), inner.join("absolute")).unwrap();
    symlink("/proc/self/exe", inner.join("magic")).unwrap();
    symlink("../plain", inner.join("sub/inside")).unwrap();
    let root = Root::open(&inner).unwrap();

    assert_eq!(
        root.read("sub/inside", 10).unwrap(),
        b"plain",
        "a link that stays inside is followed"
    );
    assert_eq!(root.read("sub/../plain", 10).unwrap(), b"plain");
    for path in
        ["up", "absolute", "parent/secret", "../secret", "sub/../../secret", "magic", "/etc/passwd"]
    {
        let err = root.read(path, 10).expect_err(path);
        assert_eq!(err.kind(), ErrorKind::PermissionDenied, "{path}: {err}");
        assert!(err.to_string().contains("leads out"), "{path}: {err}");
    }
    assert_eq!(root.list("parent").unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(
        root.read_link("up").unwrap(),
        PathBuf::from("../secret"),
        "a link itself can be looked at"
    );
    assert_eq!(root.metadata("up").unwrap().kind, Kind::Symlink);
}

#[test]
fn a_root_may_itself_be_a_link_and_stays_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("first")).unwrap();
    fs::create_dir_all(dir.path().join("second")).unwrap();
    fs::write(dir.path().join("first/file"), "first").unwrap();
    fs::write(dir.path().join("second/file"), "second").unwrap();
    let link = dir.path().join("current");
    symlink("first", &link).unwrap();
    let root = Root::open(&link).unwrap();
    fs::remove_file(&link).unwrap();
    symlink("second", &link).unwrap();
    assert_eq!(root.read("file", 100).unwrap(), b"first");
    assert_eq!(root.path(), link);
}

#[test]
fn only_regular_files_are_opened_and_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let path = dir.path().to_path_buf();
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let root = Root::open(&path).unwrap();
        for name in ["fifo", "directory", "socket"] {
            done.send((name, root.open_file(name).map(drop))).unwrap();
        }
    });
    for _ in 0..3 {
        let (name, opened) = result.recv_timeout(Duration::from_secs(20)).expect("opening waits");
        let err = opened.expect_err(name).to_string();
        assert!(err.contains(name), "{err}");
    }
}

#[test]
fn lists_sorted_and_complete() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    assert_eq!(root.list("").unwrap(), []);
    for number in 0..3000 {
        fs::write(dir.path().join(format!("{number:05}")), vec![b'x'; number % 7]).unwrap();
    }
    fs::create_dir(dir.path().join("zz")).unwrap();
    symlink("nowhere", dir.path().join("zy")).unwrap();
    let entries = root.list("").unwrap();
    assert_eq!(entries.len(), 3002);
    assert!(entries.is_sorted_by(|left, right| left.name < right.name));
    assert_eq!((entries[13].kind, entries[13].size), (Kind::File, 6));
    assert!(entries[13].modified > 1_600_000_000);
    assert_eq!((entries[3000].kind, entries[3001].kind), (Kind::Symlink, Kind::Directory));
    assert_eq!(root.metadata("00013").unwrap(), entries[13]);
    let err = root.list("missing").unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    assert!(err.to_string().contains(dir.path().join("missing").to_str().unwrap()), "{err}");
}

#[test]
fn reads_up_to_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), CONTENT).unwrap();
    let root = Root::open(dir.path()).unwrap();
    assert_eq!(root.read("file", 10).unwrap(), CONTENT);
    let err = root.read("file", 9).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::FileTooLarge);
    assert!(err.to_string().contains("9 bytes"), "{err}");
}

#[test]
fn access_times_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, CONTENT).unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let times = fs::FileTimes::new().set_accessed(old).set_modified(old);
    fs::File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
    let store = LocalStore::open(table(dir.path().into(), &["file"])).unwrap();
    store.read_exact_at(ObjectId(0), 0, &mut [0; 10]).unwrap();
    Root::open(dir.path()).unwrap().read("file", 100).unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.accessed().unwrap(), after.modified().unwrap()), (old, old));
}

/// Run by an ordinary user, this is a file whose access time he may not keep.
#[test]
fn files_of_others_are_read() {
    let etc = Root::open(std::path::Path::new("/etc")).unwrap();
    assert!(!etc.read("passwd", 1 << 20).unwrap().is_empty());
    assert!(etc.list("").unwrap().iter().any(|entry| entry.name == "passwd"));
}
