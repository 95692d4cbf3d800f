//! WAL as the real server writes it: heads, ends of records, recycled segments.

mod cluster;

use std::io;
use std::os::unix::fs::FileExt;

use cluster::{Cluster, full_server, servers};
use pgthaw_postgres::control::ControlFile;
use pgthaw_postgres::lsn::{Lsn, Segment};
use pgthaw_postgres::wal::{self, WalIdentity};
use rustix::process::Signal;

fn identity(cluster: &Cluster) -> WalIdentity {
    WalIdentity::of(&ControlFile::parse(&cluster.read("global/pg_control").unwrap()).unwrap())
        .unwrap()
}

/// Reads the WAL of timeline 1 from the cluster's `pg_wal`.
fn reader<'a>(
    cluster: &'a Cluster,
    identity: &'a WalIdentity,
) -> impl FnMut(Lsn, &mut [u8]) -> io::Result<bool> + 'a {
    move |at, buffer| {
        let segment = Segment::at(1, at, identity.segment_size);
        let start = segment.start(identity.segment_size).unwrap();
        match std::fs::File::open(
            cluster.data().join("pg_wal").join(segment.name(identity.segment_size)),
        ) {
            Ok(file) => file.read_exact_at(buffer, at.0 - start.0).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Returns the names of the segments in `pg_wal`, in order.
fn segments(cluster: &Cluster) -> Vec<String> {
    let names = std::fs::read_dir(cluster.data().join("pg_wal"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.len() == 24).collect();
    names.sort();
    names
}

#[test]
fn every_versions_segments_are_what_their_names_say() {
    for bin in servers() {
        let cluster = Cluster::new(&bin, &["--wal-segsize=1"]);
        let identity = identity(&cluster);
        let control = ControlFile::parse(&cluster.read("global/pg_control").unwrap()).unwrap();
        let name =
            Segment::at(1, control.checkpoint, identity.segment_size).name(identity.segment_size);
        let bytes = cluster.read(&format!("pg_wal/{name}")).unwrap();
        assert_eq!(wal::check_segment_head(&bytes, &name, &identity), Ok(()), "{}", bin.display());
        let end = wal::record_end(&mut reader(&cluster, &identity), &identity, control.checkpoint)
            .unwrap()
            .unwrap();
        let until = Lsn(end.0 + (64 << 20));
        let later =
            wal::later_valid_page(&mut reader(&cluster, &identity), &identity, 1, end, until)
                .unwrap();
        assert_eq!(later, None, "{}: nothing behind the shutdown checkpoint", bin.display());
    }
}

#[test]
fn ends_of_records_and_of_the_wal_are_found() {
    let mut cluster = Cluster::new(&full_server(), &["--wal-segsize=1"]);
    cluster.start(&[
        "max_wal_size=200MB",
        "min_wal_size=32MB",
        "autovacuum=off",
        "full_page_writes=off",
    ]);
    cluster.sql(
        "CREATE TABLE t AS SELECT n, repeat('x', 500) AS filler FROM generate_series(1, 20000) n",
    );
    cluster.sql("CHECKPOINT"); // renames the old segments for later use
    let redo: Lsn = cluster.sql("SELECT pg_current_wal_flush_lsn()")[0].parse().unwrap();
    cluster.sql("UPDATE t SET n = n + 1 WHERE n % 31 = 0");
    let flushed: Lsn = cluster.sql("SELECT pg_current_wal_flush_lsn()")[0].parse().unwrap();
    cluster.stop(Signal::QUIT);
    let identity = identity(&cluster);

    let names = segments(&cluster);
    let last = Segment::before(1, flushed, identity.segment_size).name(identity.segment_size);
    let recycled: Vec<&String> = names.iter().filter(|name| **name > last).collect();
    assert!(!recycled.is_empty(), "the test needs recycled segments: {names:?}");
    for name in &names {
        let good = wal::check_segment_head(
            &cluster.read(&format!("pg_wal/{name}")).unwrap(),
            name,
            &identity,
        )
        .is_ok();
        assert_eq!(good, *name <= last, "{name}");
    }

    let dump = cluster
        .command("pg_waldump")
        .args(["-p", "pg_wal", "-s", &redo.to_string()])
        .current_dir(cluster.data())
        .output()
        .unwrap();
    let text = String::from_utf8(dump.stdout).unwrap();
    let starts: Vec<Lsn> = text
        .lines()
        .map(|line| line.split("lsn: ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap())
        .collect();
    assert!(
        starts.len() > 500,
        "{} records; {}",
        starts.len(),
        String::from_utf8_lossy(&dump.stderr)
    );
    let mut read = reader(&cluster, &identity);
    for pair in starts.windows(2) {
        let end = wal::record_end(&mut read, &identity, pair[0]).unwrap().unwrap();
        let header = match (end.0 % (1 << 20), end.0 % 8192) {
            (0, _) => 40,
            (_, 0) => 24,
            _ => 0,
        };
        assert_eq!(end.0 + header, pair[1].0, "after {}", pair[0]);
    }
    let end = wal::record_end(&mut read, &identity, *starts.last().unwrap()).unwrap().unwrap();
    let until = Segment::parse(names.last().unwrap(), identity.segment_size)
        .unwrap()
        .next()
        .start(identity.segment_size)
        .unwrap();
    assert_eq!(
        wal::later_valid_page(&mut read, &identity, 1, end, until).unwrap(),
        None,
        "recycled segments are no WAL behind the end"
    );
    let valid = wal::valid_pages_end(&mut read, &identity, 1, redo, until).unwrap();
    assert_eq!(valid.0, end.0.next_multiple_of(8192));

    // a damaged page in the middle: replay would end there, with WAL behind it
    let damaged = Lsn(redo.0.next_multiple_of(8192) + 5 * 8192);
    drop(read);
    let segment = Segment::at(1, damaged, identity.segment_size);
    let path = cluster.data().join("pg_wal").join(segment.name(identity.segment_size));
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0; 8192], damaged.0 - segment.start(identity.segment_size).unwrap().0)
        .unwrap();
    let mut read = reader(&cluster, &identity);
    assert_eq!(wal::valid_pages_end(&mut read, &identity, 1, redo, until).unwrap(), damaged);
    let later = wal::later_valid_page(&mut read, &identity, 1, damaged, until).unwrap();
    assert_eq!(later, Some(Lsn(damaged.0 + 8192)));
}
