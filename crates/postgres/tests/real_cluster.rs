//! What is read from a cluster's files against what the real server says, for every server installed.

mod cluster;

use std::collections::HashMap;

use cluster::{Cluster, full_server, servers};
use pgthaw_postgres::catalogs::{self, DatabaseRow};
use pgthaw_postgres::control::{self, ClusterState, ControlFile, StartFacts, StartKind};
use pgthaw_postgres::label::{self, BackupLabel};
use pgthaw_postgres::lsn::{Lsn, segment_name};
use pgthaw_postgres::version::Major;
use pgthaw_postgres::{binaries, os_user::OsUser};
use rustix::process::Signal;

fn control_file(cluster: &Cluster) -> ControlFile {
    ControlFile::parse(&cluster.read("global/pg_control").unwrap()).unwrap()
}

fn databases(cluster: &Cluster) -> Vec<DatabaseRow> {
    let major = control_file(cluster).major().unwrap();
    catalogs::databases(&mut |file| cluster.read(file), major).unwrap()
}

fn names(rows: &[DatabaseRow]) -> Vec<&str> {
    let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// Returns what `pg_controldata` prints, by its labels.
fn control_data(cluster: &Cluster) -> Option<HashMap<String, String>> {
    let output = cluster.command("pg_controldata").arg(cluster.data()).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    Some(lines.map(|(label, value)| (label.trim().into(), value.trim().into())).collect())
}

#[test]
fn every_version_is_read_as_its_own_server_sees_it() {
    for bin in servers() {
        let cluster = Cluster::new(&bin, &["-k", "--wal-segsize=32"]);
        let where_ = bin.display();
        let major = Major::from_version_file(
            &String::from_utf8(cluster.read("PG_VERSION").unwrap()).unwrap(),
        )
        .unwrap();
        cluster.single(
            "CREATE DATABASE crm\nCREATE DATABASE old_name CONNECTION LIMIT 7 ENCODING 'LATIN1' TEMPLATE template0\nCREATE DATABASE gone\n\
             DROP DATABASE gone\nALTER DATABASE old_name RENAME TO sales\nALTER DATABASE sales ALLOW_CONNECTIONS false\nUPDATE pg_authid SET rolname = 'chief', rolcanlogin = false WHERE oid = 10\n",
        );

        let control = control_file(&cluster);
        assert_eq!(control.major(), Ok(major), "{where_}");
        assert_eq!(
            (control.state, control.data_checksum_version),
            (ClusterState::ShutDown, 1),
            "{where_}"
        );
        assert_eq!(control.wal_segment_size.bytes(), 32 << 20, "{where_}");
        assert_eq!(
            control::what_start(&control, StartFacts::default()),
            Ok(StartKind::CleanShutdown)
        );
        if let Some(data) = control_data(&cluster) {
            compare_with_control_data(&control, &data);
        }

        let rows = databases(&cluster);
        assert_eq!(
            names(&rows),
            ["crm", "postgres", "sales", "template0", "template1"],
            "{where_}"
        );
        let row = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
        let sales = row("sales");
        assert_eq!(
            (sales.connection_limit, sales.allow_connections, sales.encoding),
            (7, false, 8),
            "{where_}"
        );
        assert_eq!((row("crm").encoding, row("crm").tablespace_oid), (6, 1663), "{where_}");
        assert!(
            row("template0").is_template
                && !row("template0").allow_connections
                && row("crm").allow_connections
        );
        for row in &rows {
            assert_eq!(
                (row.provider, row.collate.as_deref(), row.ctype.as_deref()),
                ('c', Some("C"), Some("C")),
                "{where_}"
            );
        }
        let chief = catalogs::superuser(&mut |file| cluster.read(file)).unwrap().unwrap();
        assert_eq!(
            (chief.name.as_str(), chief.is_superuser, chief.can_login),
            ("chief", true, false),
            "{where_}"
        );
        let tablespaces = catalogs::tablespaces(&mut |file| cluster.read(file)).unwrap();
        let tablespaces: Vec<_> =
            tablespaces.iter().map(|row| (row.oid, row.name.as_str())).collect();
        assert_eq!(tablespaces, [(1663, "pg_default"), (1664, "pg_global")], "{where_}");
    }
}

fn compare_with_control_data(control: &ControlFile, data: &HashMap<String, String>) {
    let lsn = |position: Option<Lsn>| position.unwrap_or_default().to_string();
    let onoff = |on: bool| if on { "on" } else { "off" }.to_string();
    let xid = format!("{}:{}", control.next_xid >> 32, control.next_xid & 0xFFFF_FFFF);
    let wanted = [
        ("pg_control version number", control.control_version.to_string()),
        ("Catalog version number", control.catalog_version.to_string()),
        ("Database system identifier", control.system_identifier.to_string()),
        ("Database cluster state", control.state.to_string()),
        ("Latest checkpoint location", control.checkpoint.to_string()),
        ("Latest checkpoint's REDO location", control.redo.to_string()),
        ("Latest checkpoint's TimeLineID", control.timeline.to_string()),
        ("Latest checkpoint's PrevTimeLineID", control.previous_timeline.to_string()),
        ("Latest checkpoint's full_page_writes", onoff(control.full_page_writes)),
        ("Latest checkpoint's NextXID", xid),
        ("Minimum recovery ending location", lsn(control.min_recovery_point)),
        ("Min recovery ending loc's timeline", control.min_recovery_point_timeline.to_string()),
        ("Backup start location", lsn(control.backup_start_point)),
        ("Backup end location", lsn(control.backup_end_point)),
        (
            "End-of-backup record required",
            if control.backup_end_required { "yes" } else { "no" }.into(),
        ),
        ("wal_level setting", ["minimal", "replica", "logical"][control.wal_level as usize].into()),
        ("wal_log_hints setting", onoff(control.wal_log_hints)),
        ("max_connections setting", control.max_connections.to_string()),
        ("max_worker_processes setting", control.max_worker_processes.to_string()),
        ("max_wal_senders setting", control.max_wal_senders.to_string()),
        ("max_prepared_xacts setting", control.max_prepared_transactions.to_string()),
        ("max_locks_per_xact setting", control.max_locks_per_transaction.to_string()),
        ("Maximum data alignment", control.max_align.to_string()),
        ("Database block size", control.block_size.to_string()),
        ("Blocks per segment of large relation", control.segment_blocks.to_string()),
        ("WAL block size", control.wal_block_size.to_string()),
        ("Bytes per WAL segment", control.wal_segment_size.bytes().to_string()),
        ("Data page checksum version", control.data_checksum_version.to_string()),
    ];
    // `%X/%08X` of newer versions is the same position as `%X/%X`
    let plain =
        |text: &str| text.parse::<Lsn>().map_or_else(|_| text.to_string(), |lsn| lsn.to_string());
    for (label, want) in wanted {
        assert_eq!(data.get(label).map(|text| plain(text)), Some(want), "{label}");
    }
    assert!(control.ieee_floats);
}

#[test]
fn a_running_cluster_is_read_as_it_answers() {
    let mut cluster = Cluster::new(&full_server(), &[]);
    cluster.start(&["max_connections=33", "max_prepared_transactions=4", "wal_level=logical"]);
    // rows alone make pg_database long; the server never opens these databases
    cluster.sql(
        "CREATE TABLE copy AS SELECT * FROM pg_database WHERE datname = 'template1';
         INSERT INTO pg_database SELECT (jsonb_populate_record(copy, jsonb_build_object('oid', 100000 + n, 'datname', 'database number ' || n,
             'datconnlimit', n, 'datcollate', repeat('x', n)))).* FROM copy, generate_series(1, 300) n;
         DELETE FROM pg_database WHERE oid BETWEEN 100100 AND 100120",
    );
    cluster.sql("CREATE DATABASE one");
    cluster.sql("CREATE DATABASE two");
    let columns = "oid, datname, datistemplate, datallowconn, datconnlimit, encoding, datlocprovider, datcollate, datctype, datcollversion, dattablespace";
    let compare = |cluster: &Cluster, when: &str| {
        cluster.sql("CHECKPOINT");
        let server = cluster.sql(&format!("SELECT {columns} FROM pg_database ORDER BY oid"));
        let onoff = |flag| if flag { "t" } else { "f" };
        let read = databases(cluster).into_iter().map(|row| {
            let texts = [row.collate, row.ctype, row.collation_version].map(Option::unwrap_or_default);
            let [collate, ctype, version] = texts;
            let (template, connect) = (onoff(row.is_template), onoff(row.allow_connections));
            let DatabaseRow { oid, name, connection_limit, encoding, provider, tablespace_oid, .. } = row;
            format!("{oid}|{name}|{template}|{connect}|{connection_limit}|{encoding}|{provider}|{collate}|{ctype}|{version}|{tablespace_oid}")
        });
        assert_eq!(read.collect::<Vec<_>>(), server, "{when}");
    };
    compare(&cluster, "many databases");
    cluster.sql("ALTER DATABASE one RENAME TO renamed");
    cluster.sql("DROP DATABASE two");
    compare(&cluster, "renamed and dropped");
    cluster.sql("VACUUM FULL pg_database");
    cluster.sql("VACUUM FULL pg_authid");
    cluster.sql("CREATE DATABASE \"after the rewrite\"");
    compare(&cluster, "rewritten");
    cluster.sql("CREATE ROLE other SUPERUSER LOGIN");
    cluster.sql("CHECKPOINT");
    let roles = catalogs::roles(&mut |file| cluster.read(file)).unwrap();
    assert!(roles.iter().any(|role| role.name == "other" && role.is_superuser && role.can_login));

    let control = control_file(&cluster);
    assert_eq!(
        (control.max_connections, control.max_prepared_transactions, control.wal_level),
        (33, 4, 2)
    );
    compare_with_control_data(&control, &control_data(&cluster).unwrap());
    assert_eq!(control.state, ClusterState::InProduction);
    assert!(control::what_start(&control, StartFacts::default()).is_err());
    cluster.stop(Signal::QUIT);
    let crashed = control_file(&cluster);
    let atomic = StartFacts { atomic_snapshot: true, ..StartFacts::default() };
    assert_eq!(control::what_start(&crashed, atomic), Ok(StartKind::AtomicSnapshot));
}

#[test]
fn a_rolled_back_rename_is_not_seen() {
    let mut cluster = Cluster::new(&full_server(), &[]);
    cluster.start(&["autovacuum=off"]);
    cluster.sql("CREATE DATABASE before");
    cluster.sql("BEGIN; ALTER DATABASE before RENAME TO after; ROLLBACK");
    cluster.stop(Signal::INT);
    assert_eq!(names(&databases(&cluster)), ["before", "postgres", "template0", "template1"]);
}

#[test]
fn the_installed_servers_are_found_and_tell_their_sizes() {
    let user = OsUser::for_postgres(None).unwrap();
    for bin in servers().iter().filter(|bin| bin.join("pg_dumpall").exists()) {
        let cluster = Cluster::new(bin, &[]);
        let control = control_file(&cluster);
        let found = binaries::find(control.major().unwrap(), Some(bin), &user).unwrap();
        assert_eq!(
            control::mismatches(&control, found.build_sizes(&user).unwrap()),
            Vec::<String>::new(),
            "{}",
            bin.display()
        );
    }
}

#[test]
fn a_real_backup_label_and_tablespace_map_are_read() {
    let mut cluster = Cluster::new(&full_server(), &[]);
    let base = cluster.data().parent().unwrap().to_path_buf();
    let place = base.join("odd name\\with a\nline");
    std::fs::create_dir(&place).unwrap();
    std::os::unix::fs::chown(&place, Some(cluster.user.uid), Some(cluster.user.gid)).unwrap();
    cluster.start(&["wal_level=replica", "max_wal_senders=3"]);
    cluster.sql(&format!(
        "CREATE TABLESPACE odd LOCATION E'{}'",
        place.display().to_string().replace('\\', "\\\\").replace('\n', "\\n")
    ));
    let oid: u32 =
        cluster.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'odd'")[0].parse().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = cluster.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("pg_basebackup", &["-Ft", "-D", "backup", "-c", "fast", "-l", "monday's"]);
    std::fs::create_dir(base.join("out")).unwrap();
    let tar = std::process::Command::new("tar")
        .args(["-xf", "backup/base.tar", "-C", "out"])
        .current_dir(&base)
        .status();
    assert!(tar.unwrap().success());
    let read = |file: &str| std::fs::read(base.join("out").join(file)).unwrap();
    let control = ControlFile::parse(&read("global/pg_control")).unwrap();
    let label = BackupLabel::parse(&read("backup_label")).unwrap();
    assert_eq!((label.timeline, label.label.as_deref()), (1, Some("monday's")));
    assert_eq!((label.start, label.checkpoint), (control.redo, control.checkpoint));
    assert_eq!(label.start_segment, segment_name(1, label.start, control.wal_segment_size));
    assert_eq!(label::tablespace_map(&read("tablespace_map")).unwrap(), [(oid, place)]);
    let facts = StartFacts { backup_label: true, ..StartFacts::default() };
    assert_eq!(control::what_start(&control, facts), Ok(StartKind::ArchiveRecovery));
    let rows =
        catalogs::tablespaces(&mut |file| std::fs::read(base.join("out").join(file))).unwrap();
    assert!(rows.iter().any(|row| row.oid == oid && row.name == "odd"), "{rows:?}");
}

#[test]
fn a_standby_that_was_shut_down_needs_archive_recovery() {
    let mut cluster = Cluster::new(&full_server(), &[]);
    std::fs::write(cluster.data().join("standby.signal"), "").unwrap();
    cluster.start(&["hot_standby=on", "restore_command=false"]);
    let running = control_file(&cluster);
    assert_eq!(running.state, ClusterState::InArchiveRecovery);
    assert!(
        control::what_start(&running, StartFacts::default()).is_err(),
        "a copy of it may be broken"
    );
    cluster.stop(Signal::INT);
    let control = control_file(&cluster);
    assert_eq!(control.state, ClusterState::ShutDownInRecovery);
    assert_eq!(
        control::what_start(&control, StartFacts::default()),
        Ok(StartKind::StandbyDirectory)
    );
    compare_with_control_data(&control, &control_data(&cluster).unwrap());
}
