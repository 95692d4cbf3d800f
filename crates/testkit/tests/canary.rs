//! Canaries: left alone they say nothing, and each thing that an export could do to them is told.

use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pgthaw_testkit::{Canaries, Look, PGOPTIONS, Scratch, Snapshot, User, postgres_programs, run};
use rustix::process::{Pid, Signal, kill_process};

fn canaries() -> Canaries {
    Canaries::start(&User::cluster_owner())
}

/// Returns the first file in a directory whose name is a number: one of a relation.
fn relation(dir: &Path) -> PathBuf {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().parse::<u32>().is_ok())
        .collect();
    files.sort();
    files.swap_remove(0)
}

/// Returns the directory of the only database below `dir`.
fn database(dir: &Path) -> PathBuf {
    fs::read_dir(dir).unwrap().next().unwrap().unwrap().path()
}

/// Returns the directory of the only database in a tablespace.
fn database_in(tablespace: &Path) -> PathBuf {
    database(&database(tablespace))
}

/// Changes one byte and keeps the time of modification.
fn flip(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[100] ^= 1;
    fs::write(path, bytes).unwrap();
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_times(FileTimes::new().set_modified(modified))
        .unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Wants all `planted` told, and nothing else.
#[track_caller]
fn assert_told(lines: &[String], planted: &[(PathBuf, &str)]) {
    for (path, what) in planted {
        let is_it = |line: &&String| {
            line.strip_prefix(&format!("{}: ", path.display()))
                .is_some_and(|rest| rest.contains(what))
        };
        assert!(lines.iter().any(|line| is_it(&line)), "{path:?} {what:?} is not in {lines:#?}");
    }
    let others = lines.iter().filter(|line| !planted.iter().any(|(path, _)| is_about(line, path)));
    assert_eq!(others.collect::<Vec<_>>(), [""; 0]);
}

/// Returns whether a line is about a path or its directory, whose time changes with what is in it.
fn is_about(line: &str, path: &Path) -> bool {
    let about = |path: &Path| line.starts_with(&format!("{}: ", path.display()));
    about(path) || path.parent().is_some_and(about)
}

#[test]
fn canaries_that_are_left_alone_say_nothing() {
    canaries().check(); // the template is there
    let begin = Instant::now();
    let mut canaries = canaries();
    let started = begin.elapsed();
    let (sockets, port) = canaries.address();
    assert!(sockets.join(format!(".s.PGSQL.{port}")).exists(), "it does not run");
    let begin = Instant::now();
    assert_eq!(canaries.check(), [""; 0]);
    eprintln!("started in {started:?}, checked in {:?}", begin.elapsed());
    assert!(!canaries.running().0.join("postmaster.pid").exists(), "it runs still");
}

#[test]
fn what_is_done_to_files_of_a_cluster_is_told() {
    let mut canaries = canaries();
    let mut planted = Vec::new();
    for (data, tablespace) in [canaries.stopped(), canaries.running()] {
        let (base, outside) = (database(&data.join("base")), database_in(tablespace));
        flip(&relation(&base));
        planted.push((relation(&base), "other contents"));
        File::options().write(true).open(relation(&outside)).unwrap().set_len(0).unwrap();
        planted.push((relation(&outside), "bytes, then 0"));
        fs::write(outside.join("99999"), "new").unwrap();
        planted.push((outside.join("99999"), "is new"));
        fs::remove_file(base.join("PG_VERSION")).unwrap();
        planted.push((base.join("PG_VERSION"), "is gone"));
        set_mode(tablespace, 0o755);
        planted.push((tablespace.into(), "mode 40700, then 40755"));
        let link = database(&data.join("pg_tblspc"));
        fs::remove_file(&link).unwrap();
        symlink("/elsewhere", &link).unwrap();
        planted.push((link, "link to "));
        // A write that is taken back.
        let config = data.join("pg_hba.conf");
        flip(&config);
        flip(&config);
        planted.push((config, "changed and changed back"));
    }
    assert_told(&canaries.check(), &planted);
}

#[test]
fn what_is_done_to_files_of_the_account_is_told() {
    let mut canaries = canaries();
    let [private, public] = canaries.files();
    fs::write(&public, "mine").unwrap();
    set_mode(&private, 0o644);
    set_mode(&private, 0o600);
    let planted = [(private, "changed and changed back"), (public, "bytes, then 4")];
    assert_told(&canaries.check(), &planted);
}

#[test]
fn connections_are_counted() {
    let mut canaries = canaries();
    let ((sockets, port), socket) = (canaries.address(), canaries.socket());
    let sql = |host: &str| {
        let mut psql = Command::new(postgres_programs().join("psql"));
        psql.args([
            "--no-psqlrc",
            "--username=postgres",
            "--dbname=postgres",
            "--command=SELECT 1",
        ]);
        run(psql.env("PGOPTIONS", PGOPTIONS).env("PGHOST", host).env("PGPORT", port.to_string()));
    };
    sql(&sockets.display().to_string());
    sql("127.0.0.1");
    for _ in 0..3 {
        UnixStream::connect(socket).unwrap();
    }
    let lines = canaries.check();
    assert!(lines[0].starts_with("3 connections to "), "{lines:#?}");
    assert!(lines[1].starts_with("2 connections: "), "{lines:#?}");
}

#[test]
fn a_server_that_was_ended_is_told() {
    let mut canaries = canaries();
    let file = canaries.running().0.join("postmaster.pid");
    let pid = fs::read_to_string(&file).unwrap();
    let pid = Pid::from_raw(pid.lines().next().unwrap().parse().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    while file.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let lines = canaries.check();
    assert!(lines[0].starts_with("the running cluster's server was "), "{lines:#?}");
}

#[test]
fn a_touched_canary_fails_the_test_when_it_is_dropped() {
    let untouched = catch_unwind(|| drop(canaries()));
    assert!(untouched.is_ok());
    let canaries = canaries();
    fs::write(&canaries.files()[1], "mine").unwrap();
    let said = catch_unwind(AssertUnwindSafe(|| drop(canaries))).unwrap_err();
    let said = said.downcast_ref::<String>().unwrap();
    assert!(said.starts_with("production was touched:\n"), "{said}");
}

#[test]
fn a_watched_tree_may_not_even_be_touched() {
    let (tree, file) = (Scratch::new(), "file");
    fs::write(tree.join(file), "text").unwrap();
    let before = Snapshot::of(tree.path(), Look::Facts);
    assert_eq!(before.differences(), [""; 0]);
    fs::read(tree.join(file)).unwrap();
    assert_eq!(before.differences(), [""; 0]);
    flip_in_place(&tree.join(file));
    let told = before.differences();
    assert_told(&told, &[(tree.join(file), "changed and changed back")]);
    let before = Snapshot::of(tree.path(), Look::Facts);
    if User::current().uid == 0 {
        chown(tree.join(file), Some(1), Some(1)).unwrap();
        assert_told(&before.differences(), &[(tree.join(file), "owner (0, 0), then (1, 1)")]);
    }
    fs::remove_file(tree.join(file)).unwrap();
    assert_told(&before.differences(), &[(tree.join(file), "is gone")]);
}

/// Writes another byte and sets the time of modification back.
fn flip_in_place(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, "Text").unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();
}
