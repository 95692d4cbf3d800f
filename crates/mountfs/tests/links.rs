//! What writes to the mount may be code of a backup: links that lead elsewhere, devices and set-user-id files are refused.

mod support;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use pgthaw_mountfs::{FaultKind, Tree, TreeError};
use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use support::{Mounted, Pattern};

const SPACE: &str = "data/pg_tblspc/16385";

fn plant(tree: &mut Tree) {
    tree.directory("data/pg_tblspc", 0).unwrap();
    tree.directory("data/base", 0).unwrap();
    tree.symlink(SPACE, "/session/tablespaces/16385").unwrap();
    tree.file("data/PG_VERSION", 0, 3, 0).unwrap();
}

/// Checks that `done` was refused, and that exactly this link was reported.
fn refused(mounted: &Mounted, done: io::Result<()>, path: &str, destination: &str) {
    assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::EPERM), "{path} to {destination}");
    let told = std::mem::take(&mut *mounted.told.lock().unwrap());
    let [fault] = &told[..] else { panic!("{path}: {told:?}") };
    assert_eq!((fault.kind, &fault.path[..]), (FaultKind::Link, path));
    assert!(fault.error.contains(&format!("`{destination}`")), "{}", fault.error);
}

#[test]
fn a_link_is_made_only_where_it_was_provided() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let at = |path: &str| mounted.path().join(path);
    // The map's own may be removed and made again, as replay does.
    for _ in 0..2 {
        fs::remove_file(at(SPACE)).unwrap();
        symlink("/session/tablespaces/16385", at(SPACE)).unwrap();
    }
    fs::remove_file(at(SPACE)).unwrap();
    let refuse = |path: &str, destination: &str| {
        refused(&mounted, symlink(destination, at(path)), path, destination);
        assert!(at(path).symlink_metadata().is_err());
    };
    refuse(SPACE, "/srv/live");
    refuse("data/pg_tblspc/16386", "/session/tablespaces/16385");
    refuse("data/base/16385", "/session/tablespaces/16385");
    refuse("data/pg_wal", "/var/lib/postgresql/15/main/pg_wal");
    refuse("data/relative", "../../etc/passwd");
    refuse("link", "/");

    // Created, dropped, created again elsewhere.
    for destination in ["/srv/live", "/srv/second"] {
        mounted.fs.provide_link(SPACE, destination.as_bytes()).unwrap();
        symlink(destination, at(SPACE)).unwrap();
        assert_eq!(fs::read_link(at(SPACE)).unwrap(), Path::new(destination));
        fs::remove_file(at(SPACE)).unwrap();
    }
    symlink("/srv/live", at(SPACE)).unwrap();
    refuse("data/pg_tblspc/16387", "/srv/live");
    assert_eq!(mounted.fs.fault_count(), 7);
    assert!(!mounted.fs.poisoned());
}

#[test]
fn a_link_cannot_be_moved_to_another_name() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let at = |path: &str| mounted.path().join(path);
    let destination = "/session/tablespaces/16385";
    fs::create_dir(at("data/pg_tblspc/other")).unwrap();
    let rename = |from: &str, to: &str, flags| {
        Ok(rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags)?)
    };
    let (plain, exchange) = (RenameFlags::empty(), RenameFlags::EXCHANGE);
    let cases = [
        ("to a new name", SPACE, "data/pg_wal", plain, "data/pg_wal"),
        ("over a file", SPACE, "data/PG_VERSION", plain, "data/PG_VERSION"),
        ("exchanged", SPACE, "data/PG_VERSION", exchange, "data/PG_VERSION"),
        ("exchanged, other way", "data/PG_VERSION", SPACE, exchange, "data/PG_VERSION"),
        ("exchanged with a directory", "data/base", SPACE, exchange, "data/base"),
        ("with its directory", "data/pg_tblspc", "data/x", plain, "data/x/16385"),
        ("with all above", "data", "x", plain, "x/pg_tblspc/16385"),
        ("directories exchanged", "data/base", "data/pg_tblspc", exchange, "data/base/16385"),
        ("over an empty one", "data/pg_tblspc", "data/base", plain, "data/base/16385"),
    ];
    for (name, from, to, flags, path) in cases {
        println!("{name}");
        refused(&mounted, rename(from, to, flags), path, destination);
    }
    let linked =
        rustix::fs::linkat(CWD, at(SPACE), CWD, at("data/x"), rustix::fs::AtFlags::empty());
    refused(&mounted, linked.map_err(io::Error::from), "data/x", destination);
    let names: Vec<_> =
        fs::read_dir(at("data")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(fs::read_link(at(SPACE)).unwrap(), Path::new(destination));

    // What holds no link moves as ever, and a link may go where it was provided.
    rename("data/base", "data/pg_tblspc/other", plain).unwrap();
    mounted.fs.provide_link("data/pg_tblspc/16386", destination.as_bytes()).unwrap();
    rename(SPACE, "data/pg_tblspc/16386", plain).unwrap();
    fs::hard_link(at("data/PG_VERSION"), at("data/second")).unwrap();
    assert!(mounted.told.lock().unwrap().is_empty());
    fs::remove_file(at("data/pg_tblspc/16386")).unwrap();
    rename("data/pg_tblspc", "data/empty", plain).unwrap();
}

#[test]
fn names_in_a_refusal_are_escaped() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let name = std::ffi::OsStr::from_bytes(b"data/\xff\n`");
    let done = symlink("\x1b[2J/srv", mounted.path().join(name));
    refused(&mounted, done, "data/\\xff\\n\\`", "\\u{1b}[2J/srv");
}

#[test]
fn devices_pipes_and_sockets_are_refused() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let path = mounted.path().join("data/node");
    let make = |kind| rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR | Mode::WUSR, 0x0103);
    for kind in [FileType::CharacterDevice, FileType::BlockDevice, FileType::Fifo, FileType::Socket]
    {
        assert_eq!(make(kind), Err(Errno::PERM), "{kind:?}");
    }
    assert!(path.symlink_metadata().is_err());
    make(FileType::RegularFile).unwrap();
    let bound = std::os::unix::net::UnixListener::bind(mounted.path().join("data/socket"));
    assert_eq!(bound.unwrap_err().raw_os_error(), Some(libc::EPERM));
}

#[test]
fn nothing_is_set_user_id() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let at = |path: &str| mounted.path().join(path);
    let mode = |path: &str| fs::metadata(at(path)).unwrap().mode() & 0o7777;
    let set = |path: &str, mode| fs::set_permissions(at(path), fs::Permissions::from_mode(mode));
    set("data/PG_VERSION", 0o6755).unwrap();
    set("data/base", 0o7750).unwrap();
    assert_eq!((mode("data/PG_VERSION"), mode("data/base")), (0o755, 0o1750));
    let file = CString::new(at("data/new").as_os_str().as_bytes()).unwrap();
    let create = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    rustix::fs::open(&*file, create, Mode::from_raw_mode(0o6711)).unwrap();
    rustix::fs::mkdir(at("data/made"), Mode::from_raw_mode(0o2700)).unwrap();
    assert_eq!((mode("data/new"), mode("data/made")), (0o711, 0o700));
    assert_eq!(mounted.fs.faults(), []);
}

#[test]
fn a_provided_directory_appears_although_it_was_missed_before() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let at = |path: &str| mounted.path().join(path);
    for path in ["tablespaces", "data/pg_tblspc/16400"] {
        assert!(!at(path).exists(), "the kernel remembers that");
    }
    let links = fs::metadata(mounted.path()).unwrap().nlink();
    mounted.fs.provide_directory("tablespaces/16385/sub/x").unwrap();
    mounted.fs.provide_directory("tablespaces/16385/sub").unwrap();
    mounted.fs.provide_directory("data").unwrap();
    assert_eq!(fs::metadata(mounted.path()).unwrap().nlink(), links + 1);
    let made = fs::metadata(at("tablespaces/16385/sub")).unwrap();
    let owner = mounted.fs.owner();
    assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o700, owner.uid, owner.gid));
    assert!(!at("tablespaces/16386").exists());
    mounted.fs.provide_directory("tablespaces/16386").unwrap();
    assert!(at("tablespaces/16386").is_dir());
    fs::write(at("tablespaces/16386/PG_15"), b"x").unwrap();
    fs::remove_dir_all(at("tablespaces/16385")).unwrap();

    let below = |path: &str| Err(TreeError::BelowFile { path: path.into() });
    let bad = |path: &str| Err(TreeError::BadPath { path: path.into() });
    let cases = [
        ("data/PG_VERSION", below("data/PG_VERSION")),
        ("data/PG_VERSION/x", below("data/PG_VERSION/x")),
        (SPACE, below(SPACE)),
        ("/x", bad("/x")),
        ("x/../y", bad("x/../y")),
        ("", bad("")),
    ];
    for (path, want) in cases {
        assert_eq!(mounted.fs.provide_directory(path), want, "{path}");
    }
    assert_eq!(mounted.fs.provide_link("data//x", b"/srv"), bad("data//x"));
    assert!(!at("x").exists(), "nothing is made of a path that is refused");
}

/// Many providers and many who look for what is not there yet: nobody waits for ever, nobody is told an old absence.
#[test]
fn directories_are_provided_while_the_mount_is_in_use() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (mounted, provided) = (&mounted, move |number| format!("spaces/{thread}-{number}"));
            scope.spawn(move || {
                for number in 0..200 {
                    let path = provided(number);
                    assert!(!mounted.path().join(&path).exists());
                    mounted.fs.provide_directory(&path).unwrap();
                    assert!(mounted.path().join(&path).is_dir(), "{path}");
                    fs::write(mounted.path().join(&path).join("file"), b"x").unwrap();
                }
            });
        }
    });
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}
