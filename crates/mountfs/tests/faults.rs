//! What happens when bytes cannot be read or kept, or when the lower does not answer.

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pgthaw_mountfs::{FaultKind, FileSystem, Owner, ROOT, Tree};
use rustix::fs::Advice;
use rustix::io::Errno;
use support::{Mounted, Pattern, SmallDisk, Trouble, until};

const MEGABYTE: u64 = 1 << 20;

fn plant(tree: &mut Tree) {
    for file in 0..20 {
        tree.file(format!("base/{file}"), file, 4 * MEGABYTE, 0).unwrap();
    }
}

fn code(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|err| err.raw_os_error())
}

const EIO: Option<i32> = Some(libc::EIO);

fn open(mounted: &Mounted, name: &str) -> File {
    File::options().read(true).write(true).open(mounted.path().join(name)).unwrap()
}

/// Makes the kernel drop what it holds of a file, so that reads come to the mount.
fn forget_cache(file: &File) {
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

#[test]
fn a_full_layer_poisons_the_mount() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("small");
    let _disk = SmallDisk::new(&disk, MEGABYTE as usize);
    let layer = disk.join("layer");
    let mounted =
        Mounted::with_layer(tempfile::tempdir().unwrap(), &layer, Pattern::default(), plant);
    let (full, other) = (open(&mounted, "base/1"), open(&mounted, "base/2"));
    other.write_all_at(&[7; 8192], 0).unwrap();
    other.sync_all().unwrap();
    assert!(!mounted.fs.poisoned());
    // The kernel takes it all; that it is lost shows only later, and not to whoever wrote.
    full.write_all_at(&vec![9; 2 * MEGABYTE as usize], 0).unwrap();
    assert!(full.sync_all().is_err());
    assert!(mounted.fs.poisoned());
    let lost: Vec<_> = mounted.told.lock().unwrap().clone();
    let lost =
        lost.iter().find(|fault| fault.kind == FaultKind::Write).expect("told of the lost write");
    assert_eq!(lost.path, "base/1");
    assert!(
        lost.error.contains(layer.to_str().unwrap()) && lost.error.contains("No space"),
        "{}",
        lost.error
    );
    for (name, file) in
        [("written", &full), ("kept", &other), ("untouched", &open(&mounted, "base/3"))]
    {
        forget_cache(file);
        let before = mounted.fs.fault_count();
        assert_eq!(code(file.read_exact_at(&mut [0; 100], 4096)), EIO, "read of the {name} file");
        assert!(mounted.fs.fault_count() > before, "each EIO is counted");
        assert_eq!(code(file.set_len(5)), EIO, "truncation of the {name} file");
    }
    assert_eq!(code(other.sync_all()), EIO);
    // What lies in the kernel's cache may be read again, but nothing written is kept.
    fs::write(mounted.path().join("new"), b"x").ok();
    assert_eq!(code(open(&mounted, "new").sync_all()), EIO);
    assert!(mounted.fs.faults().iter().all(|fault| fault.error.contains(layer.to_str().unwrap())));
}

/// What PostgreSQL writes never takes the last 5 % of a small disk, whoever else fills it.
#[test]
fn the_last_part_of_the_disk_stays_free_for_others() {
    for taken_by_others in [0, 20 * MEGABYTE, 37 * MEGABYTE] {
        fills_the_disk_beside_others(taken_by_others);
    }
}

fn fills_the_disk_beside_others(taken_by_others: u64) {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("small");
    let _disk = SmallDisk::new(&disk, 40 * MEGABYTE as usize);
    let layer = disk.join("layer");
    let free = || {
        let stat = rustix::fs::statvfs(&disk).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let mounted =
        Mounted::with_layer(tempfile::tempdir().unwrap(), &layer, Pattern::default(), plant);
    let file = open(&mounted, "base/1");
    file.write_all_at(&[1; 8192], 0).unwrap();
    file.sync_all().unwrap();
    fs::write(disk.join("other"), vec![7; taken_by_others as usize]).unwrap();
    let inside = rustix::fs::statvfs(mounted.path()).unwrap();
    assert_eq!(inside.f_bavail * inside.f_frsize, free().saturating_sub(2 * MEGABYTE));

    // Half of it with space reserved before, as PostgreSQL does from 16 on: that can be written.
    let mut size = 4 * MEGABYTE;
    let none = rustix::fs::FallocateFlags::empty();
    while !mounted.fs.poisoned() && size < 60 * MEGABYTE {
        let reserved = size.is_multiple_of(2 * MEGABYTE).then(|| {
            let done = rustix::fs::fallocate(&file, none, size, MEGABYTE);
            assert!(matches!(done, Ok(()) | Err(Errno::NOSPC)), "{done:?}");
            done
        });
        file.write_all_at(&vec![9; MEGABYTE as usize], size).ok();
        let kept = file.sync_all().is_ok(); // tells of a lost write
        assert!(kept || reserved != Some(Ok(())), "reserved space cannot be used");
        size += MEGABYTE;
    }
    assert!(mounted.fs.poisoned(), "{taken_by_others}: {size} bytes fit");
    // What was granted before others came may be used up.
    let least = if taken_by_others > 20 * MEGABYTE { 0 } else { 2 * MEGABYTE };
    assert!((least..4 * MEGABYTE).contains(&free()), "{taken_by_others}: {} are free", free());
    let told = mounted.told.lock().unwrap();
    let lost = told.iter().find(|fault| fault.kind == FaultKind::Write).unwrap();
    for part in [layer.to_str().unwrap(), "No space left for pgthaw", "the last 2.0 MB"] {
        assert!(lost.error.contains(part), "{}", lost.error);
    }
}

#[test]
fn a_reservation_without_room_is_refused_and_harms_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("small");
    let _disk = SmallDisk::new(&disk, MEGABYTE as usize);
    let mounted =
        Mounted::with_layer(tempfile::tempdir().unwrap(), &disk, Pattern::default(), plant);
    let file = open(&mounted, "base/1");
    let reserve = |length| {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 4 * MEGABYTE, length)
    };
    assert_eq!(reserve(2 * MEGABYTE), Err(Errno::NOSPC));
    assert!(!mounted.fs.poisoned());
    let faults = mounted.fs.faults();
    assert_eq!(
        (faults.len(), faults[0].kind, &faults[0].path[..]),
        (1, FaultKind::NoSpace, "base/1")
    );
    assert!(faults[0].error.contains(disk.to_str().unwrap()), "{}", faults[0].error);
    assert_eq!(file.metadata().unwrap().len(), 4 * MEGABYTE);
    reserve(8192).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4 * MEGABYTE + 8192);
    // The lower's own bytes need no room.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4 * MEGABYTE).unwrap();
}

#[test]
fn an_unreadable_byte_is_an_error_never_a_zero() {
    let bad = 3 * MEGABYTE;
    let mounted =
        Mounted::new(Pattern { trouble: Trouble::Fails(1, bad), ..Pattern::default() }, plant);
    let file = open(&mounted, "base/1");
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap(); // no read-ahead
    let mut bytes = vec![0; 8192];
    file.read_exact_at(&mut bytes, bad - 8192).unwrap();
    assert!(bytes == Pattern::default().bytes(1, bad - 8192, 8192));
    assert_eq!(code(file.read_exact_at(&mut bytes, bad)), EIO);
    let told = mounted.told.lock().unwrap().clone();
    let first = told.first().expect("told at once");
    assert_eq!((first.kind, &first.path[..], first.offset), (FaultKind::Read, "base/1", bad));
    assert!(first.error.contains("checksum differs"), "{}", first.error);
    // Whole blocks may be written over it; then they can be read.
    file.write_all_at(&[5; 8192], bad).unwrap();
    file.sync_all().unwrap();
    forget_cache(&file);
    file.read_exact_at(&mut bytes, bad).unwrap();
    assert!(bytes == [5; 8192]);
    assert!(!mounted.fs.poisoned());
}

#[test]
fn a_write_whose_page_cannot_be_completed_is_lost() {
    let mounted =
        Mounted::new(Pattern { trouble: Trouble::Fails(1, 0), ..Pattern::default() }, plant);
    let ino = mounted.fs.lookup(mounted.fs.lookup(1, b"base").unwrap().ino, b"1").unwrap().ino;
    let (sender, receiver) = mpsc::channel();
    mounted.fs.write(ino, 100, b"inside a page", move |result| sender.send(result).unwrap());
    assert_eq!(receiver.recv().unwrap(), Err(Errno::IO));
    assert!(mounted.fs.poisoned());
    assert_eq!(mounted.fs.faults()[0].kind, FaultKind::Write);
}

#[test]
fn a_lower_that_panics_costs_one_read() {
    let mounted =
        Mounted::new(Pattern { trouble: Trouble::Panics(1), ..Pattern::default() }, plant);
    for _ in 0..20 {
        // More often than there are workers.
        assert_eq!(code(open(&mounted, "base/1").read_exact_at(&mut [0; 8192], 0)), EIO);
    }
    open(&mounted, "base/2").read_exact_at(&mut [0; 8192], 0).unwrap();
}

#[test]
fn nothing_else_waits_for_a_stalled_lower_and_abort_ends_the_waiting() {
    let lower = Pattern::default();
    let mounted = Mounted::new(lower.clone(), plant);
    // Everything here is in the layer: it can be read while the lower is stalled.
    let written = open(&mounted, "base/0");
    rustix::fs::fadvise(&written, 0, None, Advice::Random).unwrap();
    written.write_all_at(&vec![3; MEGABYTE as usize], MEGABYTE).unwrap();
    written.sync_all().unwrap();
    forget_cache(&written);

    lower.gate.set_shut(true);
    let (sender, receiver) = mpsc::channel();
    for file in 0..20 {
        let (file, sender) = (open(&mounted, &format!("base/{file}")), sender.clone());
        std::thread::spawn(move || {
            sender.send(code(file.read_exact_at(&mut [0; 8192], 0))).unwrap()
        });
    }
    lower.gate.wait_until_waiting(8); // all workers; twelve more wait in the queue

    let started = Instant::now();
    let mut bytes = vec![0; 8192];
    for block in 0..50 {
        written.read_exact_at(&mut bytes, MEGABYTE + block * 8192).unwrap();
        assert!(bytes == [3; 8192]);
        written.write_all_at(&[4; 8192], 2 * MEGABYTE + block * 8192).unwrap();
    }
    written.sync_all().unwrap();
    let new = mounted.path().join("base/new");
    fs::write(&new, vec![1; 100_000]).unwrap();
    File::open(&new).unwrap().sync_all().unwrap();
    fs::rename(&new, mounted.path().join("base/5.new")).unwrap();
    assert_eq!(fs::read_dir(mounted.path().join("base")).unwrap().count(), 21);
    fs::metadata(mounted.path().join("base/19")).unwrap();
    // A file with a waiting read can be written elsewhere (truncating it would wait, in the
    // kernel).
    open(&mounted, "base/1").write_all_at(&[6; 8192], 2 * MEGABYTE).unwrap();
    fs::remove_file(mounted.path().join("base/2")).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(receiver.try_recv().is_err(), "the reads still wait");
    assert_eq!(mounted.fs.fault_count(), 0);

    mounted.fs.abort();
    for _ in 0..20 {
        assert_eq!(receiver.recv_timeout(Duration::from_secs(5)).unwrap(), EIO);
    }
    assert_eq!(code(written.read_exact_at(&mut bytes, 0)), EIO, "later reads too");
    assert!(mounted.fs.fault_count() >= 21);
    assert!(mounted.fs.faults().iter().all(|fault| fault.kind == FaultKind::Aborted));
    assert!(mounted.told.lock().unwrap().is_empty(), "an abort is no fault to be told of");
    lower.gate.set_shut(false);
}

#[test]
fn abort_answers_and_counts_each_waiting_operation() {
    let directory = tempfile::tempdir().unwrap();
    let mut tree = Tree::new();
    plant(&mut tree);
    let lower = Pattern::default();
    lower.gate.set_shut(true);
    let owner = Owner { uid: 0, gid: 0 };
    let layer = directory.path().join("layer");
    let fs = FileSystem::new(tree, Arc::new(lower.clone()), &layer, owner, Box::new(|_| {}));
    let fs = Arc::new(fs.unwrap());
    fs.start_workers(2).unwrap();
    let base = fs.lookup(ROOT, b"base").unwrap().ino;
    let (sender, receiver) = mpsc::channel();
    for file in 0..10 {
        let ino = fs.lookup(base, format!("{file}").as_bytes()).unwrap().ino;
        let (reads, writes) = (sender.clone(), sender.clone());
        fs.read(ino, 5, 100, move |result| reads.send(result.map(drop)).unwrap());
        fs.write(ino, 5, b"inside a page", move |result| writes.send(result).unwrap());
    }
    lower.gate.wait_until_waiting(2);
    assert!(receiver.try_recv().is_err());
    fs.abort();
    let answers: Vec<_> = receiver.try_iter().collect();
    assert_eq!(answers, vec![Err(Errno::IO); 20]);
    assert_eq!((fs.fault_count(), fs.poisoned()), (20, false));
    lower.gate.set_shut(false); // two workers come back and find their replies given
    drop(sender);
    assert!(receiver.recv_timeout(Duration::from_secs(5)).is_err(), "nobody is answered twice");
}

#[test]
fn a_stalled_lower_that_answers_again_loses_nothing() {
    let lower = Pattern::default();
    let mounted = Mounted::new(lower.clone(), plant);
    lower.gate.set_shut(true);
    let file = open(&mounted, "base/1");
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
    let (reader, writer) = (file.try_clone().unwrap(), file.try_clone().unwrap());
    let read = std::thread::spawn(move || {
        let mut bytes = vec![0; 16384];
        reader.read_exact_at(&mut bytes, 0).map(|()| bytes)
    });
    lower.gate.wait_until_waiting(1);
    // Inside a page that must be read first: this one has to wait.
    let write = std::thread::spawn(move || writer.write_all_at(b"inside", 100_000));
    lower.gate.wait_until_waiting(2);
    lower.gate.set_shut(false);
    assert!(read.join().unwrap().unwrap() == Pattern::default().bytes(1, 0, 16384));
    write.join().unwrap().unwrap();
    file.set_len(200_000).unwrap();
    file.sync_all().unwrap();
    forget_cache(&file);
    let mut want = Pattern::default().bytes(1, 0, 200_000);
    want[100_000..100_006].copy_from_slice(b"inside");
    assert!(fs::read(mounted.path().join("base/1")).unwrap() == want);
    until("all workers idle", || mounted.fs.fault_count() == 0);
}
