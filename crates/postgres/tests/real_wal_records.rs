//! Records of the WAL as the real server writes it, compared with `pg_waldump`.

mod cluster;

use std::os::unix::fs::{FileExt, chown};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use cluster::{Cluster, servers};
use pgthaw_postgres::control::ControlFile;
use pgthaw_postgres::lsn::{Lsn, Segment};
use pgthaw_postgres::wal::{self, EndReason, Record, ReplayedTablespaces, WalIdentity};
use rustix::process::Signal;

/// Reads the WAL of timeline 1 from the cluster's `pg_wal`.
fn reader<'a>(
    cluster: &'a Cluster,
    identity: &'a WalIdentity,
) -> impl FnMut(Lsn, &mut [u8]) -> io::Result<bool> + 'a {
    move |at, buffer| {
        let segment = Segment::at(1, at, identity.segment_size);
        let start = segment.start(identity.segment_size).unwrap();
        let name = segment.name(identity.segment_size);
        match fs::File::open(cluster.data().join("pg_wal").join(name)) {
            Ok(file) => file.read_exact_at(buffer, at.0 - start.0).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A record as `pg_waldump` prints it: position and description.
fn as_printed(record: &Record) -> (Lsn, String) {
    let text = match record {
        Record::TablespaceCreate { oid, location, .. } => {
            format!("CREATE {oid} \"{}\"", String::from_utf8_lossy(location))
        }
        Record::TablespaceDrop { oid, .. } => format!("DROP {oid}"),
        Record::DatabaseCreate { database, tablespace, .. } => {
            format!("CREATE {tablespace}/{database}")
        }
        Record::DatabaseDrop { database, tablespaces, .. } => {
            let each = tablespaces.iter().map(|tablespace| format!(" {tablespace}/{database}"));
            format!("DROP dir{}", each.collect::<String>())
        }
    };
    (record.lsn(), text)
}

/// What `pg_waldump` says from `start` on: the tablespace and database records, and where the last record begins.
fn waldump(cluster: &Cluster, start: Lsn) -> (Vec<(Lsn, String)>, Lsn) {
    let dump = cluster
        .command("pg_waldump")
        .args(["-p", "pg_wal", "-s", &start.to_string()])
        .current_dir(cluster.data())
        .output()
        .unwrap();
    let text = String::from_utf8(dump.stdout).unwrap();
    let lsn = |line: &str| -> Lsn {
        line.split("lsn: ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap()
    };
    let described = |line: &str| {
        let text = line.split_once("desc: ").unwrap().1.trim();
        // "CREATE_FILE_COPY copy dir 1663/1 to 16384/16390", "CREATE_WAL_LOG create dir 16384/16390"
        match text.strip_prefix("CREATE").filter(|rest| rest.contains(" dir ")) {
            Some(rest) => format!("CREATE {}", rest.rsplit(' ').next().unwrap()),
            None => text.to_string(),
        }
    };
    let ours = text
        .lines()
        .filter(|line| line.starts_with("rmgr: Tablespace") || line.starts_with("rmgr: Database"));
    let last = text.lines().last().map(lsn).unwrap_or_else(|| {
        panic!("pg_waldump: {}", String::from_utf8_lossy(&dump.stderr));
    });
    (ours.map(|line| (lsn(line), described(line))).collect(), last)
}

/// Makes an empty directory next to the data directory, the server's.
fn location(cluster: &Cluster, name: &str) -> String {
    let path = cluster.data().parent().unwrap().join(name);
    fs::create_dir(&path).unwrap();
    chown(&path, Some(cluster.user.uid), Some(cluster.user.gid)).unwrap();
    path.to_str().unwrap().into()
}

fn load(cluster: &Cluster, table: &str) {
    cluster.sql(&format!("CREATE TABLE {table} AS SELECT n, repeat('x', 700) AS filler FROM generate_series(1, 3000) n"));
    cluster.sql(&format!("CREATE INDEX ON {table} (n)"));
    cluster.sql(&format!("UPDATE {table} SET n = n + 1 WHERE n % 3 = 0"));
    cluster.sql(&format!("VACUUM {table}"));
    for number in 0..20 {
        cluster.sql(&format!("INSERT INTO {table} VALUES ({number}, '{number}')"));
    }
}

/// Stops the server at once while another session writes: WAL then ends wherever it was written to last.
fn stop_amid_writes(cluster: &mut Cluster) {
    cluster.sql("CREATE TABLE t3 (n int, filler text)");
    let written = |cluster: &Cluster| -> Lsn {
        cluster.sql("SELECT pg_current_wal_lsn()")[0].parse().unwrap()
    };
    let before = written(cluster);
    let mut writer = cluster
        .command("psql")
        .args(["-Xqc", "INSERT INTO t3 SELECT generate_series(1, 100000000), repeat('y', 300)"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while written(cluster).0 < before.0 + (3 << 20) {
        assert!(Instant::now() < deadline, "the other session writes nothing");
        thread::sleep(Duration::from_millis(20));
    }
    cluster.stop(Signal::QUIT);
    assert!(!writer.wait().unwrap().success(), "the writer was interrupted");
}

fn oid(cluster: &Cluster, tablespace: &str) -> u32 {
    let sql = format!("SELECT oid FROM pg_tablespace WHERE spcname = '{tablespace}'");
    cluster.sql(&sql)[0].parse().unwrap()
}

#[test]
fn the_walk_finds_what_pg_waldump_finds_and_ends_where_replay_ends() {
    let full = |bin: &PathBuf| ["psql", "pg_waldump"].iter().all(|name| bin.join(name).exists());
    let servers: Vec<PathBuf> = servers().into_iter().filter(full).collect();
    assert!(!servers.is_empty(), "no installed server has psql and pg_waldump");
    for bin in servers {
        let mut cluster = Cluster::new(&bin, &["--wal-segsize=1"]);
        let start_of_wal = ControlFile::parse(&cluster.read("global/pg_control").unwrap()).unwrap();
        let identity = WalIdentity::of(&start_of_wal).unwrap();
        let major = identity.major.number();
        let settings = [
            "allow_in_place_tablespaces=on",
            // nothing is removed or written again
            if major < 13 { "wal_keep_segments=1000" } else { "wal_keep_size=1GB" },
            "max_wal_size=2GB",
            "checkpoint_timeout=1h",
            "wal_compression=on",
            "autovacuum=off",
            "lc_messages=C",
        ];
        cluster.start(&settings);
        let [first, second] = ["first", "second"].map(|name| location(&cluster, name));

        cluster.sql(&format!("CREATE TABLESPACE a LOCATION '{first}'"));
        let a = oid(&cluster, "a");
        load(&cluster, "t1");
        cluster.sql("DROP TABLESPACE a");
        cluster.sql(&format!("CREATE TABLESPACE a LOCATION '{first}'"));
        let again = oid(&cluster, "a");
        cluster.sql("SELECT pg_switch_wal()");
        cluster.sql(&format!("CREATE TABLESPACE b LOCATION '{second}'"));
        let b = oid(&cluster, "b");
        cluster.sql("CREATE TABLESPACE c LOCATION ''");
        let c = oid(&cluster, "c");
        cluster.sql("CREATE DATABASE one TABLESPACE a");
        load(&cluster, "t2");
        cluster.sql("ALTER DATABASE one SET TABLESPACE b");
        cluster.sql("SELECT pg_switch_wal()");
        cluster.sql("CREATE DATABASE two TABLESPACE a");
        if major >= 15 {
            cluster.sql("CREATE DATABASE three TABLESPACE c STRATEGY file_copy");
        }
        cluster.sql("DROP DATABASE two");
        stop_amid_writes(&mut cluster);

        let start = start_of_wal.redo;
        let mut records = Vec::new();
        let mut replayed = ReplayedTablespaces::default();
        let end =
            wal::walk(&mut reader(&cluster, &identity), &identity, start, None, &mut |record| {
                records.push(as_printed(&record));
                replayed.add(record);
            })
            .unwrap();
        let (want, last) = waldump(&cluster, start);
        assert_eq!(records, want, "{}", bin.display());
        assert_eq!(records.len(), if major >= 15 { 11 } else { 10 }, "{records:?}");
        assert_eq!(end.last, Some(last), "{}: {}", bin.display(), end.reason);
        let after = wal::record_end(&mut reader(&cluster, &identity), &identity, last).unwrap();
        assert_eq!(Some(end.lsn), after, "{}", end.reason);
        assert_ne!(end.reason, EndReason::Asked);

        let links: Vec<_> = replayed
            .finish()
            .unwrap()
            .into_iter()
            .map(|link| {
                let location = String::from_utf8(link.location).unwrap();
                (link.oid, location, link.dropped.is_some())
            })
            .collect();
        let want = [
            (a, first.clone(), true),
            (again, first, false),
            (b, second, false),
            (c, String::new(), false),
        ];
        assert_eq!(links, want, "{}", bin.display());

        // the server's own replay ends at the same record
        cluster.start(&settings);
        let log = fs::read_to_string(cluster.data().parent().unwrap().join("log")).unwrap();
        let redo_done = log.split("redo done at ").nth(1).unwrap_or_else(|| panic!("{log}"));
        let redo_done = redo_done.split_whitespace().next().unwrap();
        assert_eq!(redo_done.parse(), Ok(last), "{log}");
        cluster.stop(Signal::INT);

        // what follows a crash: the walk goes on through the end of recovery, as pg_waldump does
        let mut count = 0;
        let end = wal::walk(&mut reader(&cluster, &identity), &identity, start, None, &mut |_| {
            count += 1;
        })
        .unwrap();
        let (want, last) = waldump(&cluster, start);
        assert_eq!((count, end.last), (want.len(), Some(last)), "{}", bin.display());

        // from the middle, and up to a target
        let middle = records[3].0;
        let mut from_middle = Vec::new();
        let end = wal::walk(
            &mut reader(&cluster, &identity),
            &identity,
            middle,
            Some(records[6].0),
            &mut |record| from_middle.push(as_printed(&record)),
        )
        .unwrap();
        assert_eq!(from_middle, records[3..=6]);
        assert_eq!((end.last, end.reason), (Some(records[6].0), EndReason::Asked));
    }
}
