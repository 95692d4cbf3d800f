//! A real mount, compared with what a plain directory does.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use pgthaw_mountfs::{Tree, mounted_at};
use support::fsx::{compare_trees, run_mix, seed};
use support::{Mounted, Pattern, until};

/// What both sides of a comparison begin with.
const LOWER: [(&str, u64); 4] =
    [("lower-0", 0), ("lower-1", 100_000), ("lower-2", 81_920), ("d/e/lower-3", 5)];

fn plant(tree: &mut Tree) {
    for (number, (path, size)) in LOWER.into_iter().enumerate() {
        tree.file(path, number, size, 1_000_000_000).unwrap();
    }
}

fn plant_plain(directory: &Path) {
    for (number, (path, size)) in LOWER.into_iter().enumerate() {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, Pattern::default().bytes(number, 0, size as usize)).unwrap();
    }
}

/// A program that uses the mount.
#[test]
#[ignore = "run by the other tests, in a child process"]
fn mix_program() {
    support::fsx::mix_program();
}

#[test]
fn does_what_a_plain_directory_does() {
    // Every third try of the lower is answered at once.
    let mounted = Mounted::new(Pattern { answer_every: 3, ..Pattern::default() }, plant);
    let plain = tempfile::tempdir().unwrap();
    plant_plain(plain.path());
    compare_trees(mounted.path(), plain.path());
    run_mix(mounted.path(), plain.path(), seed(), 20_000);
    assert_eq!(mounted.fs.faults(), []);
}

#[test]
fn does_so_for_several_programs_at_once() {
    let programs = 3;
    let mounted = Mounted::new(Pattern { answer_every: 2, ..Pattern::default() }, |tree| {
        for program in 0..programs {
            for (number, (path, size)) in LOWER.into_iter().enumerate() {
                tree.file(format!("{program}/{path}"), number, size, 0).unwrap();
            }
        }
    });
    let plain = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for program in 0..programs {
            let mount = mounted.path().join(program.to_string());
            let plain = plain.path().join(program.to_string());
            plant_plain(&plain);
            scope.spawn(move || run_mix(&mount, &plain, seed() + program, 8000));
        }
    });
    assert_eq!(mounted.fs.faults(), []);
}

#[test]
fn shows_the_tree() {
    let mounted = Mounted::new(Pattern::default(), |tree| {
        tree.directory("data", 1_000_000_000).unwrap();
        tree.file("data/base/1/2619", 7, 20_000, 1_000_000_001).unwrap();
        tree.symlink("data/pg_tblspc/16400", "/elsewhere").unwrap();
    });
    let data = mounted.path().join("data");
    let file = data.join("base/1/2619");
    let stat = fs::metadata(&file).unwrap();
    assert_eq!((stat.mtime(), stat.len(), stat.mode() & 0o7777), (1_000_000_001, 20_000, 0o600));
    let stat = fs::metadata(&data).unwrap();
    assert_eq!((stat.mtime(), stat.mode() & 0o7777), (1_000_000_000, 0o700));
    assert_eq!(fs::read(&file).unwrap(), Pattern::default().bytes(7, 0, 20_000));
    assert_eq!(fs::read_link(data.join("pg_tblspc/16400")).unwrap(), Path::new("/elsewhere"));
    assert!(!data.join("absent").exists());
    fs::write(data.join("absent"), b"now it is there").unwrap();
    assert_eq!(fs::read(data.join("absent")).unwrap(), b"now it is there");
    let space = rustix::fs::statvfs(mounted.path()).unwrap();
    let layer = rustix::fs::statvfs(mounted.fs.layer_directory()).unwrap();
    assert_eq!(space.f_blocks * space.f_frsize, layer.f_blocks * layer.f_frsize);
    assert_eq!(mounted.fs.faults(), []);
}

#[test]
fn times_and_modes_are_kept() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let path = mounted.path().join("lower-1");
    let file = File::options().write(true).open(&path).unwrap();
    let written = SystemTime::now() - Duration::from_secs(1);
    file.write_all_at(b"x", 0).unwrap();
    assert!(file.metadata().unwrap().modified().unwrap() >= written);
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_234_567_890);
    file.set_modified(old).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    drop(file);
    let stat = fs::metadata(&path).unwrap();
    assert_eq!((stat.modified().unwrap(), stat.mode() & 0o7777), (old, 0o640));
    let refused = std::os::unix::fs::chown(&path, Some(12345), None).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    std::os::unix::fs::chown(&path, Some(0), Some(0)).unwrap();
}

#[test]
fn lists_large_directories_completely() {
    let mounted = Mounted::new(Pattern::default(), |tree| {
        for number in 0..6000 {
            tree.file(format!("base/{number}"), 0, 8192, 0).unwrap();
        }
    });
    let base = mounted.path().join("base");
    for round in 0..3 {
        let entries = fs::read_dir(&base).unwrap();
        let mut numbers: Vec<u32> = Vec::new();
        for (at, entry) in entries.enumerate() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            // Others come and go while we list; those that stay must all be seen, once.
            if at % 500 == 0 {
                let other = base.join(format!("other-{round}-{at}"));
                fs::write(&other, b"").unwrap();
                if at % 1000 == 0 {
                    fs::remove_file(&other).unwrap();
                }
            }
            if at % 100 == 0 {
                assert!(entry.metadata().unwrap().is_file());
            }
            numbers.extend(name.parse::<u32>().ok());
        }
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..6000), "{} seen in round {round}", numbers.len());
    }
}

#[test]
fn unlinked_open_files_live_on_and_leave_nothing() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let layer_files = || {
        let entries = fs::read_dir(mounted.fs.layer_directory()).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name() != "lock").count()
    };
    let path = mounted.path().join("lower-1");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[9; 8192], 8192).unwrap();
    file.sync_all().unwrap();
    assert_eq!((layer_files(), mounted.fs.layer_bytes()), (1, 8192));
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"another of that name").unwrap();
    file.write_all_at(&[8; 8192], 16384).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut bytes = vec![0; 100_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..8192] == Pattern::default().bytes(1, 0, 8192));
    assert!(bytes[8192..16384] == [9; 8192] && bytes[16384..24576] == [8; 8192]);
    drop(file);
    fs::remove_file(&path).unwrap();
    until("the layer is empty", || layer_files() == 0 && mounted.fs.layer_bytes() == 0);
}

#[test]
fn whole_blocks_are_written_without_reading_below() {
    let lower = Pattern::default();
    lower.gate.set_shut(true); // whatever needs the lower would wait
    let mounted = Mounted::new(lower.clone(), plant);
    let file = File::options().write(true).open(mounted.path().join("lower-1")).unwrap();
    for block in [0, 3, 7] {
        file.write_all_at(&[block as u8; 8192], block * 8192).unwrap();
    }
    file.set_len(50_000).unwrap();
    file.set_len(90_000).unwrap();
    file.sync_all().unwrap();
    assert_eq!(lower.gate.tries(), 0);
    lower.gate.set_shut(false);
}

#[test]
fn locks_are_the_kernels() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let path = mounted.path().join("lower-1");
    let [first, second] = [(); 2].map(|()| File::options().write(true).open(&path).unwrap());
    first.lock().unwrap();
    assert!(second.try_lock().is_err());
    drop(first);
    second.try_lock().unwrap();
}

#[test]
fn an_unmounted_file_system_is_gone_and_unmounting_twice_is_fine() {
    let mounted = Mounted::new(Pattern::default(), plant);
    let path = mounted.path().to_owned();
    assert!(mounted_at(&path).unwrap());
    let file = File::open(path.join("lower-1")).unwrap();
    let busy = pgthaw_mountfs::unmount(&path, false).unwrap_err();
    assert_eq!(busy.kind(), std::io::ErrorKind::ResourceBusy, "{busy}");
    drop(file);
    until("it is not busy any more", || pgthaw_mountfs::unmount(&path, false).is_ok());
    pgthaw_mountfs::unmount(&path, false).unwrap();
    assert!(!mounted_at(&path).unwrap());
    assert!(!mounted_at(&path.join("absent/directory")).unwrap());
    drop(mounted);
}
