//! Which files of a running dump count as finished.

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use pgthaw_mover::FinishedFiles;

/// Events arrive at once; this only bounds how long a broken test takes.
const LIMIT: Duration = Duration::from_secs(5);
/// Long enough for an event that must not come.
const MOMENT: Duration = Duration::from_millis(50);

#[test]
fn yields_data_files_when_they_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dir.path().join("crm");
    let mut watch = FinishedFiles::watch(&dump).unwrap();
    assert!(watch.next(MOMENT).unwrap().is_empty(), "the directory is not there yet");

    fs::create_dir(&dump).unwrap();
    let mut open = File::create(dump.join("3001.dat.gz")).unwrap();
    open.write_all(b"half").unwrap();
    open.sync_all().unwrap();
    fs::write(dump.join("3002.dat"), "rows").unwrap();
    assert_eq!(watch.next(LIMIT).unwrap(), ["3002.dat"]);
    assert!(watch.next(MOMENT).unwrap().is_empty(), "3001 is still being written");
    drop(open);
    assert_eq!(watch.next(LIMIT).unwrap(), ["3001.dat.gz"]);

    for name in ["blob_16400.dat", "blobs.toc", "blobs_3005.toc", "toc.dat", "notes"] {
        fs::write(dump.join(name), "x").unwrap();
    }
    assert_eq!(watch.next(LIMIT).unwrap(), ["blob_16400.dat"]);
    File::options().append(true).open(dump.join("3002.dat")).unwrap();
    assert!(watch.next(MOMENT).unwrap().is_empty(), "each file is yielded once");

    fs::write(dump.join("3003.dat"), "rows").unwrap();
    assert_eq!(
        watch.rest().unwrap(),
        ["3003.dat", "blobs.toc", "blobs_3005.toc", "notes", "toc.dat"]
    );
}

#[test]
fn files_from_before_the_watch_are_told_from_open_ones() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dir.path().join("crm");
    fs::create_dir(&dump).unwrap();
    fs::write(dump.join("1.dat"), "rows").unwrap();
    fs::write(dump.join("2.dat"), "").unwrap();
    fs::write(dump.join("toc.dat"), "toc").unwrap();
    let mut open = File::create(dump.join("3.dat")).unwrap();
    open.write_all(b"half").unwrap();

    let mut watch = FinishedFiles::watch(&dump).unwrap();
    assert_eq!(
        watch.next(LIMIT).unwrap(),
        ["1.dat"],
        "an empty one may just be about to be written"
    );
    drop(open);
    assert_eq!(watch.next(LIMIT).unwrap(), ["3.dat"]);
    assert_eq!(watch.rest().unwrap(), ["2.dat", "toc.dat"]);
}

#[test]
fn a_lost_event_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dir.path().join("crm");
    let limit: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    fs::create_dir(&dump).unwrap();
    let mut watch = FinishedFiles::watch(&dump).unwrap();
    assert!(watch.next(MOMENT).unwrap().is_empty());
    // Two files closed in turn are told one by one (equal neighbours would be merged), until the queue is full.
    let files = ["1.dat", "2.dat"].map(|name| dump.join(name));
    for file in &files {
        fs::write(file, "rows").unwrap();
    }
    for at in 0..limit + 10 {
        File::options().append(true).open(&files[at % 2]).unwrap();
    }
    let mut open = File::create(dump.join("4.dat")).unwrap();
    open.write_all(b"half").unwrap();
    fs::write(dump.join("3.dat"), "rows").unwrap();
    assert_eq!(watch.next(LIMIT).unwrap(), ["1.dat", "2.dat", "3.dat"]);
    drop(open);
    assert_eq!(watch.next(LIMIT).unwrap(), ["4.dat"]);
}
