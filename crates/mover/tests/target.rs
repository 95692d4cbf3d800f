//! The target directory: what is seen, what appears, what is removed, and what is never touched.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use pgthaw_mover::{
    Access, CopyFile, Directory, MoveError, Reuse, SumEntry, TargetDirectory, TargetState,
    copy_verified,
};
use tempfile::TempDir;

/// All paths below `dir`, relative and sorted, directories with a slash.
fn tree(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let name = format!("{prefix}{}", entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                found.push(format!("{name}/"));
                walk(&entry.path(), &format!("{name}/"), found);
            } else {
                found.push(name);
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, "", &mut found);
    found.sort();
    found
}

/// Delivers one database of two files as a session would, and returns the entries for `SHA256SUMS`.
fn deliver(target: &TargetDirectory, database: &str, content: &str) -> Vec<SumEntry> {
    let dump = tempfile::tempdir().unwrap();
    fs::write(dump.path().join("toc.dat"), content).unwrap();
    fs::write(dump.path().join("1.dat"), content).unwrap();
    let (from, to) =
        (Directory::open_source(dump.path()).unwrap(), target.database(database).unwrap());
    let copy = |name| {
        let file = CopyFile { name, reuse: Reuse::Never };
        copy_verified(file, &from, &to, &mut |_| ControlFlow::Continue(())).unwrap().sha256
    };
    let sums = ["1.dat", "toc.dat"].map(|name| (name, copy(name)));
    let name = pgthaw_mover::file_name_for_database(database);
    sums.map(|(file, sha256)| SumEntry { path: format!("{name}/{file}"), sha256 }).into()
}

fn export(path: &Path, session: &str, databases: &[&str]) {
    let target = TargetDirectory::create(path, session).unwrap();
    let mut sums = Vec::new();
    for database in databases {
        sums.extend(deliver(&target, database, session));
    }
    target.remove_replaced().unwrap();
    for database in databases {
        target.publish_database(database, &["1.dat", "toc.dat"]).unwrap();
    }
    target.write_sha256sums(&sums).unwrap();
    target.write_export_json(b"{}").unwrap();
    target.remove_staging().unwrap();
}

fn scratch() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("exports/monday");
    (dir, target)
}

#[test]
fn an_export_appears_piece_by_piece_and_is_complete_at_the_end() {
    let (_dir, path) = scratch();
    assert_eq!(TargetDirectory::missing(&path), [path.parent().unwrap().to_owned(), path.clone()]);
    let target = TargetDirectory::create(&path, "s1").unwrap();
    let sums = deliver(&target, "a/b", "content");
    assert_eq!(
        tree(&path),
        [".pgthaw-s1/", ".pgthaw-s1/a%2Fb/", ".pgthaw-s1/a%2Fb/1.dat", ".pgthaw-s1/a%2Fb/toc.dat"]
    );

    let staged = path.join(".pgthaw-s1/a%2Fb");
    let missing = target.publish_database("a/b", &["1.dat", "2.dat", "toc.dat"]);
    assert!(
        matches!(&missing, Err(MoveError::Missing { path }) if path.ends_with("2.dat")),
        "{missing:?}"
    );
    fs::write(staged.join("9.dat"), "of an earlier attempt").unwrap();
    assert!(!target.is_published("a/b").unwrap());
    for attempt in ["publish", "repeat"] {
        assert_eq!(
            target.publish_database("a/b", &["toc.dat", "1.dat"]).unwrap(),
            "a%2Fb",
            "{attempt}"
        );
    }
    assert!(target.is_published("a/b").unwrap());
    target.write_sha256sums(&sums).unwrap();
    target.write_sha256sums(&sums).unwrap();
    target.write_export_json(b"{}").unwrap();
    target.remove_staging().unwrap();
    assert_eq!(
        tree(&path),
        ["SHA256SUMS", "a%2Fb/", "a%2Fb/1.dat", "a%2Fb/toc.dat", "export.json"]
    );

    for (name, mode) in [
        (".", 0o700),
        ("..", 0o700),
        ("a%2Fb", 0o700),
        ("a%2Fb/1.dat", 0o600),
        ("SHA256SUMS", 0o600),
        ("export.json", 0o600),
    ] {
        assert_eq!(
            fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o7777,
            mode,
            "{name}"
        );
    }
    let check = Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(&path)
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
}

#[test]
fn sees_what_is_there() {
    let (_dir, path) = scratch();
    let look = |published: &[&str]| TargetDirectory::inspect(&path, "s1", published).unwrap();

    let missing = vec![path.parent().unwrap().to_owned(), path.clone()];
    let report = look(&[]);
    assert_eq!((report.state, report.access), (TargetState::Absent { missing }, Access::Writable));
    assert!(report.free > 0 && !path.exists());

    fs::create_dir_all(path.join("lost+found")).unwrap();
    assert_eq!(look(&[]).state, TargetState::Empty);

    let target = TargetDirectory::create(&path, "s1").unwrap();
    fs::create_dir(path.join(".pgthaw-s2")).unwrap();
    let report = look(&[]);
    assert_eq!(
        (report.state, report.ours, report.other_sessions),
        (TargetState::Empty, true, vec!["s2".into()])
    );

    deliver(&target, "crm", "x");
    target.publish_database("crm", &["1.dat", "toc.dat"]).unwrap();
    assert_eq!(look(&["crm"]).state, TargetState::Empty, "our own database");
    assert_eq!(look(&[]).state, TargetState::HoldsOther(vec!["crm".into()]));
    drop(target);
    fs::remove_dir_all(&path).unwrap();

    export(&path, "s0", &["crm"]);
    let TargetState::HoldsExport(earlier) = look(&[]).state else { panic!("{:?}", look(&[])) };
    assert_eq!(
        (earlier.files, earlier.foreign),
        (vec!["crm/1.dat".to_owned(), "crm/toc.dat".into()], vec![])
    );

    fs::write(path.join("SHA256SUMS"), format!("{}  ../victim\n", "0".repeat(64))).unwrap();
    assert!(matches!(
        TargetDirectory::inspect(&path, "s1", &[]),
        Err(MoveError::BadListing { line: 1, .. })
    ));

    let file = path.with_file_name("file");
    fs::write(&file, "").unwrap();
    for below in [file.clone(), file.join("a/b")] {
        let report = TargetDirectory::inspect(&below, "s1", &[]).unwrap();
        assert_eq!(report.state, TargetState::NotADirectory(file.clone()), "{}", below.display());
    }
}

#[test]
fn one_session_per_directory() {
    let (_dir, path) = scratch();
    let first = TargetDirectory::create(&path, "s1").unwrap();
    let second = TargetDirectory::create(&path, "s2");
    assert!(matches!(&second, Err(MoveError::InUse { dir }) if *dir == path), "{second:?}");
    assert!(matches!(
        TargetDirectory::discard(&path, "s2", false, &[]),
        Err(MoveError::InUse { .. })
    ));
    assert_eq!(tree(&path), [".pgthaw-s1/"]);
    drop(first);
    TargetDirectory::create(&path, "s2").unwrap();
}

#[test]
fn a_published_name_is_never_overwritten() {
    let (_dir, path) = scratch();
    fs::create_dir_all(path.join("empty")).unwrap();
    fs::write(path.join("file"), "mine").unwrap();
    let target = TargetDirectory::create(&path, "s1").unwrap();
    for database in ["empty", "file"] {
        deliver(&target, database, "x");
        let refused = target.publish_database(database, &["1.dat", "toc.dat"]);
        assert!(
            matches!(&refused, Err(MoveError::Exists { path }) if path.ends_with(database)),
            "{refused:?}"
        );
    }
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "mine");
}

#[test]
fn discard_removes_ours_and_nothing_else() {
    let (dir, path) = scratch();
    let made = TargetDirectory::missing(&path);
    let target = TargetDirectory::create(&path, "s1").unwrap();
    deliver(&target, "crm", "x");
    deliver(&target, "sales", "x");
    let sum = |name: &str| SumEntry { path: format!("crm/{name}"), sha256: [0; 32] };
    target.keep_sums("crm", &[sum("1.dat"), sum("toc.dat")]).unwrap();
    target.keep_sums("sales", &[]).unwrap(); // about to be published
    target.publish_database("crm", &["1.dat", "toc.dat"]).unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("keep"), "").unwrap();
    symlink(&outside, path.join(".pgthaw-s1/link")).unwrap();
    fs::write(path.join("crm/notes"), "mine").unwrap();
    fs::create_dir(path.join("sales")).unwrap();
    drop(target);

    assert_eq!(TargetDirectory::published(&path, "s1").unwrap(), ["crm"]);
    let kept = TargetDirectory::discard(&path, "s1", true, &made).unwrap();
    assert_eq!(kept, [path.join("crm")], "it holds something of the user's");
    let left = [
        "exports/",
        "exports/monday/",
        "exports/monday/crm/",
        "exports/monday/crm/notes",
        "exports/monday/sales/",
        "outside/",
        "outside/keep",
    ];
    assert_eq!(tree(dir.path()), left);
    assert_eq!(
        TargetDirectory::discard(&path, "s1", true, &made).unwrap(),
        [""; 0].map(std::path::PathBuf::from)
    );
    assert_eq!(tree(dir.path()), left, "repeated");
    fs::remove_dir_all(path.join("crm")).unwrap();
    fs::remove_dir(path.join("sales")).unwrap();
    TargetDirectory::discard(&path, "s1", true, &made).unwrap();
    assert_eq!(tree(dir.path()), ["outside/", "outside/keep"]);
}

#[test]
fn replaces_only_what_the_earlier_export_lists() {
    let (_dir, path) = scratch();
    export(&path, "s1", &["crm", "old"]);
    fs::write(path.join("notes"), "mine").unwrap();
    export(&path, "s2", &["crm", "new"]);
    let want = [
        "SHA256SUMS",
        "crm/",
        "crm/1.dat",
        "crm/toc.dat",
        "export.json",
        "new/",
        "new/1.dat",
        "new/toc.dat",
        "notes",
    ];
    assert_eq!(tree(&path), want);
    assert_eq!(fs::read_to_string(path.join("crm/toc.dat")).unwrap(), "s2");

    fs::write(path.join("crm/mine.txt"), "mine").unwrap();
    let before = tree(&path);
    let target = TargetDirectory::create(&path, "s3").unwrap();
    let refused = target.remove_replaced();
    assert!(
        matches!(&refused, Err(MoveError::Foreign { path }) if path.ends_with("crm/mine.txt")),
        "{refused:?}"
    );
    target.remove_staging().unwrap();
    assert_eq!(tree(&path), before);
}

#[test]
fn replacing_goes_on_after_a_crash_and_happens_once() {
    let (_dir, path) = scratch();
    export(&path, "s1", &["crm", "old"]);
    let listing = fs::read(path.join("SHA256SUMS")).unwrap();
    {
        let target = TargetDirectory::create(&path, "s2").unwrap();
        deliver(&target, "crm", "s2");
    }
    // As after a kill in the middle: the listing is put aside, one file is gone, `export.json` not yet moved.
    fs::rename(path.join("SHA256SUMS"), path.join(".pgthaw-s2/.replacing-SHA256SUMS")).unwrap();
    fs::remove_file(path.join("crm/1.dat")).unwrap();
    let target = TargetDirectory::create(&path, "s2").unwrap();
    target.remove_replaced().unwrap();
    target.publish_database("crm", &["1.dat", "toc.dat"]).unwrap();
    target.remove_replaced().unwrap();
    target.write_sha256sums(&[]).unwrap();
    target.write_export_json(b"{}").unwrap();
    fs::write(path.join("SHA256SUMS"), listing).unwrap();
    target.remove_replaced().unwrap();
    target.remove_staging().unwrap();
    assert_eq!(tree(&path), ["SHA256SUMS", "crm/", "crm/1.dat", "crm/toc.dat", "export.json"]);
    assert_eq!(fs::read_to_string(path.join("crm/toc.dat")).unwrap(), "s2");
}

#[test]
fn replacing_follows_no_link_out_of_the_directory() {
    let (dir, path) = scratch();
    export(&path, "s1", &["crm"]);
    let outside = dir.path().join("outside");
    fs::rename(path.join("crm"), &outside).unwrap();
    symlink(&outside, path.join("crm")).unwrap();
    let target = TargetDirectory::create(&path, "s2").unwrap();
    assert!(matches!(target.remove_replaced(), Err(MoveError::Foreign { .. })));
    assert_eq!(tree(&outside), ["1.dat", "toc.dat"]);
}

/// Both may have found nothing when they looked: who makes its directories sees the other's.
#[test]
fn of_two_nested_targets_only_one_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (outer, inner) = (dir.path().join("o"), dir.path().join("o/sub/deep"));
    let first = TargetDirectory::create(&outer, "one").unwrap();
    let refused = TargetDirectory::create(&inner, "two").unwrap_err();
    assert!(matches!(&refused, MoveError::InUse { dir } if *dir == outer), "{refused:?}");
    assert_eq!(TargetDirectory::inspect(&inner, "two", &[]).unwrap().other_sessions, ["one"]);
    assert!(!inner.join(".pgthaw-two").exists());
    drop(first);
    TargetDirectory::discard(&outer, "one", false, &[]).unwrap();

    let _first = TargetDirectory::create(&inner, "two").unwrap();
    let refused = TargetDirectory::create(&outer, "one").unwrap_err();
    assert!(matches!(&refused, MoveError::InUse { dir } if *dir == inner), "{refused:?}");
    assert!(!outer.join(".pgthaw-one").exists());
    TargetDirectory::create(&dir.path().join("beside"), "three").unwrap();
}

/// Another account that makes the directory between the look and the delivery could exchange `globals.sql`.
#[test]
fn a_directory_that_others_can_write_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("o");
    assert_eq!(TargetDirectory::inspect(&target, "s", &[]).unwrap().trust.objection, None);
    fs::create_dir(&target).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o777)).unwrap();
    let report = TargetDirectory::inspect(&target, "s", &[]).unwrap();
    assert_eq!(report.trust.objection.unwrap().0, target);
    for path in [&target, &target.join("below")] {
        let refused = TargetDirectory::create(path, "s").unwrap_err();
        assert!(matches!(&refused, MoveError::Distrusted { path, .. } if *path == target));
    }
    assert_eq!(tree(dir.path()), ["o/"]);
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(&target, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(&target, Some(1234), None).unwrap();
        let refused = TargetDirectory::create(&target, "s").unwrap_err();
        assert!(refused.to_string().contains("another account (user id 1234)"), "{refused}");
    }
}
