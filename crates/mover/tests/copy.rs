//! Copying into a target: what arrives, what is kept, and what is removed when it fails.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use pgthaw_mover::{
    CopyFile, Delivered, Directory, MoveError, Reuse, copy_all_verified, copy_verified, sha256_of,
};
use proptest::prelude::*;
use tempfile::TempDir;

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
        fs::create_dir(&target).unwrap();
        Self { _dir: dir, dump, target }
    }

    fn copy(&self, name: &str, reuse: Reuse) -> Result<Delivered, MoveError> {
        copy_into(&self.dump, &self.target, name, reuse)
    }
}

fn copy_into(dump: &Path, target: &Path, name: &str, reuse: Reuse) -> Result<Delivered, MoveError> {
    let (dump, target) = (Directory::open_source(dump)?, Directory::open(target)?);
    copy_verified(CopyFile { name, reuse }, &dump, &target, &mut |_| ControlFlow::Continue(()))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn delivers_and_verifies() {
    let lab = Lab::new();
    for (name, length) in
        [("empty", 0), ("small", 10), ("exactly one buffer", 256 << 10), ("large", (3 << 20) + 7)]
    {
        let content: Vec<u8> = (0..length).map(|at: u32| (at % 251) as u8).collect();
        fs::write(lab.dump.join(name), &content).unwrap();
        let delivered = lab.copy(name, Reuse::Never).unwrap();
        let (bytes, sha256) = sha256_of(&mut content.as_slice()).unwrap();
        assert_eq!(delivered, Delivered { bytes, sha256, reused: false }, "{name}");
        assert_eq!(fs::read(lab.target.join(name)).unwrap(), content, "{name}");
        assert_eq!(
            fs::metadata(lab.target.join(name)).unwrap().permissions().mode() & 0o7777,
            0o600,
            "{name}"
        );
    }
}

#[test]
fn keeps_equal_files_of_an_earlier_attempt_and_no_others() {
    let cases = [
        ("equal", "content", "content", Reuse::IfEqual, true),
        ("same length, other content", "content", "c0ntent", Reuse::IfEqual, false),
        ("shorter", "content", "conten", Reuse::IfEqual, false),
        ("longer", "content", "content+", Reuse::IfEqual, false),
        ("equal, but of one attempt only", "content", "content", Reuse::Never, false),
    ];
    for (what, source, there, reuse, reused) in cases {
        let lab = Lab::new();
        fs::write(lab.dump.join("f"), source).unwrap();
        fs::write(lab.target.join("f"), there).unwrap();
        fs::set_permissions(lab.target.join("f"), fs::Permissions::from_mode(0o644)).unwrap();
        let before = fs::metadata(lab.target.join("f")).unwrap().ino();
        // A second name shows whether the old file was written into or left alone.
        fs::hard_link(lab.target.join("f"), lab.target.join("old")).unwrap();

        assert_eq!(lab.copy("f", reuse).unwrap().reused, reused, "{what}");
        let after = fs::metadata(lab.target.join("f")).unwrap();
        assert_eq!(fs::read_to_string(lab.target.join("f")).unwrap(), source, "{what}");
        assert_eq!(
            (after.ino() == before, after.permissions().mode() & 0o777),
            (reused, 0o600),
            "{what}"
        );
        assert_eq!(fs::read_to_string(lab.target.join("old")).unwrap(), there, "{what}");
    }
}

#[test]
fn follows_no_links() {
    let lab = Lab::new();
    let secret = lab.dump.with_file_name("secret");
    fs::write(&secret, "secret").unwrap();
    symlink(&secret, lab.dump.join("link")).unwrap();
    assert!(matches!(lab.copy("link", Reuse::Never), Err(MoveError::Source { .. })));

    fs::write(lab.dump.join("f"), "content").unwrap();
    symlink(&secret, lab.target.join("f")).unwrap();
    assert!(lab.copy("f", Reuse::IfEqual).unwrap_err().is_target());
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");

    let linked = lab.dump.with_file_name("linked");
    symlink(&lab.dump, &linked).unwrap();
    assert!(matches!(
        copy_into(&linked, &lab.target, "f", Reuse::Never),
        Err(MoveError::Source { .. })
    ));

    for name in ["../secret", "..", ".", "", "a/b"] {
        assert!(lab.copy(name, Reuse::Never).is_err(), "{name:?}");
    }
    assert!(Command::new("mkfifo").arg(lab.dump.join("fifo")).status().unwrap().success());
    assert!(matches!(lab.copy("fifo", Reuse::Never), Err(MoveError::Source { .. })));
    assert_eq!(names(&lab.target), ["f"]);
}

#[test]
fn a_stopped_or_failed_copy_leaves_no_partial_file() {
    let lab = Lab::new();
    fs::write(lab.dump.join("done"), "done").unwrap();
    fs::write(lab.dump.join("large"), vec![1; 2 << 20]).unwrap();
    let (dump, target) =
        (Directory::open_source(&lab.dump).unwrap(), Directory::open(&lab.target).unwrap());

    let mut seen = 0;
    let mut stop = |bytes| {
        seen += bytes;
        if seen > 1 << 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let file = CopyFile { name: "large", reuse: Reuse::Never };
    let error = copy_verified(file, &dump, &target, &mut stop).unwrap_err();
    assert!(matches!(error, MoveError::Stopped { .. }) && !error.is_target(), "{error}");
    assert!(names(&lab.target).is_empty());

    let mut grow = |_| {
        OpenOptions::new()
            .append(true)
            .open(lab.dump.join("large"))
            .unwrap()
            .write_all(b"x")
            .unwrap();
        ControlFlow::Continue(())
    };
    let error = copy_verified(file, &dump, &target, &mut grow);
    assert!(matches!(error, Err(MoveError::SourceChanged { .. })), "{error:?}");

    let files = ["done", "absent"].map(|name| CopyFile { name, reuse: Reuse::Never });
    let error = copy_all_verified(
        &files,
        &dump,
        &target,
        &mut |_| ControlFlow::Continue(()),
        &mut |_, _| {},
    );
    assert!(matches!(error, Err(MoveError::Source { .. })), "{error:?}");
    assert!(
        names(&lab.target).is_empty(),
        "a file is kept only once it is verified: {:?}",
        names(&lab.target)
    );
}

#[test]
fn delivers_many_files_in_order() {
    let lab = Lab::new();
    let all: Vec<String> = (0..300).map(|at| format!("{at}.dat")).collect();
    for name in &all {
        fs::write(lab.dump.join(name), name).unwrap();
    }
    fs::write(lab.target.join("7.dat"), "7.dat").unwrap();
    let (dump, target) =
        (Directory::open_source(&lab.dump).unwrap(), Directory::open(&lab.target).unwrap());
    let files: Vec<_> = all.iter().map(|name| CopyFile { name, reuse: Reuse::IfEqual }).collect();
    let (mut bytes, mut done) = (0, Vec::new());
    let mut progress = |more| {
        bytes += more;
        ControlFlow::Continue(())
    };
    copy_all_verified(&files, &dump, &target, &mut progress, &mut |at, delivered| {
        done.push((at, delivered))
    })
    .unwrap();
    assert_eq!(done.iter().map(|(at, _)| *at).collect::<Vec<_>>(), (0..300).collect::<Vec<_>>());
    assert_eq!(bytes, all.iter().map(|name| name.len() as u64).sum::<u64>());
    for (at, delivered) in done {
        let (bytes, sha256) = sha256_of(&mut all[at].as_bytes()).unwrap();
        assert_eq!(delivered, Delivered { bytes, sha256, reused: at == 7 });
        assert_eq!(fs::read_to_string(lab.target.join(&all[at])).unwrap(), all[at]);
    }
}

/// A tmpfs of a few pages, unmounted when dropped.
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
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_target_is_named_and_left_clean() {
    let Some(disk) = SmallDisk::new("size=1m,mode=0700") else { return };
    let lab = Lab::new();
    fs::write(lab.dump.join("large"), vec![1; 2 << 20]).unwrap();
    let error = copy_into(&lab.dump, disk.0.path(), "large", Reuse::Never).unwrap_err();
    let MoveError::NoSpace { dir, free, quota: false, .. } = &error else { panic!("{error:?}") };
    assert_eq!((dir.as_path(), *free), (disk.0.path(), 0));
    assert!(error.hint().unwrap().contains("make room") && error.is_target());
    assert!(names(disk.0.path()).is_empty());

    fs::write(lab.dump.join("fits"), vec![1; 500 << 10]).unwrap();
    copy_into(&lab.dump, disk.0.path(), "fits", Reuse::Never).unwrap();
}

#[test]
fn a_read_only_target_is_named() {
    let Some(disk) = SmallDisk::new("size=1m,ro") else { return };
    let lab = Lab::new();
    fs::write(lab.dump.join("f"), "content").unwrap();
    let error = copy_into(&lab.dump, disk.0.path(), "f", Reuse::Never).unwrap_err();
    assert!(matches!(error, MoveError::ReadOnly { .. }), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_was_there_the_target_equals_the_source(
        source in prop::collection::vec(any::<u8>(), 0..400_000),
        there in prop::option::of((any::<bool>(), prop::collection::vec(any::<u8>(), 0..100))),
    ) {
        let lab = Lab::new();
        fs::write(lab.dump.join("f"), &source).unwrap();
        if let Some((same_length, content)) = &there {
            let mut content = content.clone();
            if *same_length {
                content.resize(source.len(), 0);
            }
            fs::write(lab.target.join("f"), content).unwrap();
        }
        let delivered = lab.copy("f", Reuse::IfEqual).unwrap();
        prop_assert_eq!((delivered.bytes, delivered.sha256), sha256_of(&mut source.as_slice()).unwrap());
        prop_assert_eq!(fs::read(lab.target.join("f")).unwrap(), source);
    }
}

#[test]
fn a_failure_keeps_what_an_earlier_attempt_delivered() {
    let lab = Lab::new();
    fs::write(lab.dump.join("done"), "done").unwrap();
    lab.copy("done", Reuse::Never).unwrap();
    let (dump, target) =
        (Directory::open_source(&lab.dump).unwrap(), Directory::open(&lab.target).unwrap());
    let files = ["done", "absent"].map(|name| CopyFile { name, reuse: Reuse::IfEqual });
    let mut progress = |_| ControlFlow::Continue(());
    copy_all_verified(&files, &dump, &target, &mut progress, &mut |_, _| {}).unwrap_err();
    assert_eq!(names(&lab.target), ["done"]);
}

#[test]
fn what_is_no_file_is_neither_replaced_nor_removed() {
    let lab = Lab::new();
    fs::write(lab.dump.join("f"), "content").unwrap();
    fs::create_dir(lab.target.join("f")).unwrap();
    for reuse in [Reuse::Never, Reuse::IfEqual] {
        assert!(matches!(lab.copy("f", reuse), Err(MoveError::Exists { .. })));
        assert!(lab.target.join("f").is_dir());
    }
}
