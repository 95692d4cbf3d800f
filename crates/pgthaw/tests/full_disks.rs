//! Full disks: never a success, never a wrong or partial database; after making room a retry succeeds.
//!
//! Each directory lies on a small tmpfs of its own, which needs root: an ordinary account passes these tests by.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use pgthaw_testkit::{Fixture, User};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use support::{Pgthaw, assert_equal, wait_for};

/// A disk that can be full, and be made larger.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf, kilobytes: u64) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let data = std::ffi::CString::new(format!("size={kilobytes}k,mode=0755")).unwrap();
        mount("small-disk", &path, "tmpfs", MountFlags::empty(), &*data).unwrap();
        Self(path)
    }

    fn grow(&self, kilobytes: u64) {
        let data = std::ffi::CString::new(format!("size={kilobytes}k")).unwrap();
        mount_remount(&self.0, MountFlags::empty(), &*data).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH); // nothing else can be done about an error
    }
}

/// Where the small disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    WriteLayer,
    Dump,
    Target,
}

const DATABASES: [&str; 2] = ["sales", "crm"];

/// Exports with one directory on a disk of `kilobytes`; it must fail by naming that directory. Then there is room, and `retry` succeeds.
fn fails_until_there_is_room(full: Full, kilobytes: u64) {
    if User::current().uid != 0 {
        return;
    }
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let case = format!("{full:?} with {kilobytes} kB");
    let directory = match full {
        Full::WriteLayer => pgthaw.work(),
        Full::Dump => pgthaw.dump(),
        Full::Target => pgthaw.scratch.join("out"),
    };
    let disk = SmallDisk::mount(directory.clone(), kilobytes);
    let leftovers = pgthaw.leftovers();
    let target = pgthaw.target("export");
    let arguments = pgthaw.export_arguments(&fixture.lz4.path, &DATABASES, &target);
    let (out, err) = pgthaw.expect(1, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    eprintln!("{case}: {err}");

    let session = pgthaw.session();
    assert_eq!(session["state"], "failed", "{case}: {session}");
    let directory = directory.display().to_string();
    // A database that failed tells why; what befell the session as a whole, the session.
    let failed = session["databases"].as_array().into_iter().flatten();
    let own = failed.filter_map(|database| database["error"].as_str()).next();
    let error = own.or(session["error"].as_str()).unwrap();
    let hint = session["hint"].as_str().unwrap_or("");
    assert!(error.contains(&directory), "{case}: the directory is not named: {error}");
    assert!(
        error.contains("full") || error.contains("no room") || error.contains("No space"),
        "{case}: {error}"
    );
    assert!(hint.contains("room") || hint.contains("space"), "{case}: what to do? {hint}");
    assert!(!out.contains("pg_restore") && err.contains("pgthaw retry"), "{case}: {out}{err}");
    assert!(!target.join("export.json").exists() && !target.join("SHA256SUMS").exists(), "{case}");
    for name in DATABASES.iter().filter(|name| target.join(name).exists()) {
        // Whole, or not there at all: it was delivered before the disk was full.
        assert!(
            session["databases"]
                .as_array()
                .unwrap()
                .iter()
                .any(|database| { database["name"] == **name && database["state"] == "delivered" }),
            "{case}: {name} is there, but was not delivered: {session}"
        );
        assert_is_whole(&target.join(name));
    }
    if full == Full::Dump && kilobytes >= 1_000 {
        let crm = &session["databases"][1];
        assert_eq!(
            crm["state"], "delivered",
            "{case}: the failed database took its room: {session}"
        );
    }
    assert_eq!(leftovers.check(), [""; 0], "{case}: left by the failure\n{}", pgthaw.logs());

    disk.grow(400_000);
    let id = pgthaw.session_id();
    pgthaw.expect(0, &["retry", &id]);
    assert_equal(&target, &fixture.expected, &DATABASES);
    assert_eq!(leftovers.check(), [""; 0], "{case}: left by the retry");
    assert!(!target.join(format!(".pgthaw-{id}")).exists(), "{case}");
}

/// Finished tables leave the dump's directory, so that only the largest has to fit: 9.5 MB of 17.5 without compression.
#[test]
fn a_dump_may_be_larger_than_its_directory_but_no_table() {
    if User::current().uid != 0 {
        return;
    }
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let disk = SmallDisk::mount(pgthaw.dump(), 8_000);
    let leftovers = pgthaw.leftovers();
    let target = pgthaw.target("export");
    let mut arguments = pgthaw.export_arguments(&fixture.lz4.path, &DATABASES, &target);
    arguments.extend(["-Z", "none", "-j", "1"].map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (_, err) = pgthaw.expect(1, &arguments);
    let full = format!("the dump's directory `{}", pgthaw.dump().display());
    assert!(err.contains(&full) && err.contains("is full") && err.contains("make room"), "{err}");
    assert!(target.join("crm").exists() && !target.join("sales").exists(), "{err}");

    disk.grow(12_000);
    pgthaw.expect(0, &["retry", &pgthaw.session_id()]);
    assert_equal(&target, &fixture.expected, &DATABASES);
    assert_eq!(leftovers.check(), [""; 0]);
}

/// pg_restore reads a dump to its end only when nothing is missing.
fn assert_is_whole(dump: &Path) {
    let script = std::process::Command::new(pgthaw_testkit::postgres_programs().join("pg_restore"))
        .args(["--file=/dev/null"])
        .arg(dump)
        .output()
        .unwrap();
    assert!(script.status.success(), "{}: {}", dump.display(), support::text(&script.stderr));
}

/// From hardly room for the agent's own files to nearly enough.
#[test]
fn the_write_layer_is_full() {
    for kilobytes in [200, 1_000, 4_000] {
        fails_until_there_is_room(Full::WriteLayer, kilobytes);
    }
}

#[test]
fn the_dump_directory_is_full() {
    for kilobytes in [16, 300, 2_000] {
        fails_until_there_is_room(Full::Dump, kilobytes);
    }
}

#[test]
fn the_target_is_full() {
    for kilobytes in [16, 300, 2_000, 4_700] {
        fails_until_there_is_room(Full::Target, kilobytes);
    }
}

/// A server that cannot write its journal stops working on the session; once there is room, `retry` takes it up where it is.
#[test]
fn the_state_directory_is_full() {
    if User::current().uid != 0 {
        return;
    }
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let state = pgthaw.scratch.join("state");
    let disk = SmallDisk::mount(state.clone(), 1_000);
    let leftovers = pgthaw.leftovers();
    let target = pgthaw.target("export");
    let mut arguments = pgthaw.export_arguments(&fixture.lz4.path, &DATABASES, &target);
    // A long request, so that the journal needs another page of the disk before the export is complete.
    arguments.extend(["--exclude-table".into(), "x".repeat(1_500)]);
    let mut export = pgthaw.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let export = export.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("the mount", || pgthaw.logs().contains("{\"step\":\"mount\"}").then_some(()));
    let filler = state.join("filler");
    let full = std::fs::write(&filler, vec![0; 2 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let ended = export.wait_with_output().unwrap();
    let said = support::text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left on device") && said.contains("journal"), "{said}");
    assert!(!target.join("export.json").exists());

    std::fs::remove_file(filler).unwrap();
    disk.grow(100_000);
    let id = pgthaw.session_id();
    pgthaw.expect(0, &["retry", &id]);
    assert_equal(&target, &fixture.expected, &DATABASES);
    assert_eq!(leftovers.check(), [""; 0], "left by the retry");
}
