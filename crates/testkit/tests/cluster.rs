//! The kit's own proof: clusters, backups and comparisons do what other tests rely on.

use std::time::Instant;

use pgthaw_testkit::{
    Cluster, ClusterOptions, Fixture, FreshServer, RestoreTarget, Scale, Scratch, Server, User,
    fingerprint, is_moved_by_traffic, measure, pgbench_sums, restore_dump_into_fresh_server, run,
    tree_hash,
};

#[test]
fn a_dump_of_the_cluster_loads_equal_into_a_fresh_server() {
    let dir = Scratch::new();
    let begin = Instant::now();
    let cluster = Cluster::build(dir.path(), Scale::Tiny, &ClusterOptions::default());
    eprintln!("built in {:?}", begin.elapsed());
    let export = Scratch::new();
    run(cluster
        .client("pg_dumpall")
        .args(["--globals-only", "--file"])
        .arg(export.join("globals.sql")));
    for database in ["crm", "sales"] {
        let mut dump = cluster.client("pg_dump");
        dump.args(["--format=directory", "--jobs=2", "--file"]).arg(export.join(database));
        run(dump.arg(database));
    }
    let fresh = restore_dump_into_fresh_server(export.path());
    for database in ["crm", "sales"] {
        let (expected, found) = (fingerprint(&cluster, database), fingerprint(&fresh, database));
        assert!(expected.0.len() >= 8, "{expected:?}");
        assert_eq!(expected.differences(&found), Vec::<String>::new(), "{database}");
    }
    let before = fingerprint(&fresh, "crm");
    fresh.sql("crm", "UPDATE public.account SET name = name || '!' WHERE id = 7");
    let differences = before.differences(&fingerprint(&fresh, "crm"));
    assert!(
        differences.len() == 1 && differences[0].starts_with("public.account:"),
        "{differences:?}"
    );
}

#[test]
fn the_fixture_restores_to_what_it_promises() {
    let begin = Instant::now();
    let fixture = Fixture::get();
    eprintln!("fixture after {:?}", begin.elapsed());
    assert_eq!(
        (fixture.lz4.labels.len(), fixture.zst.labels.len(), fixture.gz.labels.len()),
        (3, 2, 2)
    );
    assert_eq!(fixture.expected.len(), Fixture::DATABASES.len());
    for database in Fixture::DATABASES {
        let latest = fixture.lz4.latest[database].clone().without(is_moved_by_traffic);
        assert_eq!(
            fixture.expected[database].differences(&latest),
            Vec::<String>::new(),
            "{database}"
        );
    }
    let hash = tree_hash(&fixture.lz4.path);
    assert_eq!(hash, tree_hash(&fixture.lz4.path));
    let dir = Scratch::new();
    for (name, backup) in [("stream", &fixture.stream), ("fetch", &fixture.fetch)] {
        let copy = backup.copy_for(&User::cluster_owner(), &dir.join(name));
        let server = Server::start(
            &User::cluster_owner(),
            &copy.dir,
            "postgres",
            "-c archive_mode=off -c hot_standby=off",
        );
        for database in Fixture::DATABASES {
            let found = fingerprint(&server, database).without(is_moved_by_traffic);
            assert_eq!(
                fixture.expected[database].differences(&found),
                Vec::<String>::new(),
                "{name}: {database}"
            );
        }
        assert!(pgbench_sums(&server, "sales").agree(), "{name}");
    }
    let mine = fixture.stream.copy_for(&User::ordinary(), &dir.join("copy"));
    assert!(mine.dir.join("backup_label").exists());
    let copy = fixture.lz4.copy_for(&User::ordinary(), &dir.join("repo"));
    assert_ne!(hash, tree_hash(&copy.path), "another owner");
}

#[test]
fn traffic_keeps_pgbenchs_sums_equal_through_a_backup_and_a_restore() {
    let (dir, restored) = (Scratch::new(), Scratch::new());
    let cluster = Cluster::build(dir.path(), Scale::Tiny, &ClusterOptions::default());
    let made = pgthaw_testkit::PgBackRest::create(&cluster, &dir.join("repo"), "demo", "lz4");
    let traffic = cluster.traffic();
    let options = pgthaw_testkit::BackupOptions {
        kind: pgthaw_testkit::BackupType::Full,
        compress: "lz4",
        bundle: false,
    };
    let label = made.backup(&options);
    drop(traffic);
    cluster.archive_all();
    let sums = pgbench_sums(&cluster, "sales");
    assert!(sums.agree() && sums.transactions > 0, "{sums:?}");

    let at_end = made.restore_and_start(&restored.join("end"), &label, RestoreTarget::EndOfBackup);
    let early = pgbench_sums(&at_end, "sales");
    assert!(early.agree() && early.transactions <= sums.transactions, "{early:?}");
    let expected = fingerprint(&cluster, "crm").without(is_moved_by_traffic);
    let found = fingerprint(&at_end, "crm").without(is_moved_by_traffic);
    assert_eq!(expected.differences(&found), Vec::<String>::new());

    let latest = made.restore_and_start(&restored.join("latest"), &label, RestoreTarget::Latest);
    assert_eq!(pgbench_sums(&latest, "sales"), sums);
}

#[test]
fn measures_what_children_and_daemons_read_and_write() {
    let dir = Scratch::new();
    let script = "head -c 3000000 /dev/zero > one; (setsid sh -c 'sleep 0.3; head -c 2000000 /dev/zero > two' &) ; exit 3";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).current_dir(dir.path());
    let (output, usage) = measure(&command);
    assert_eq!(output.status.code(), Some(3));
    assert!((5_000_000..5_200_000).contains(&usage.wchar), "{usage:?}");
    assert!(
        usage.rchar >= 5_000_000 && usage.seconds < 0.3 && usage.seconds_of_all >= 0.3,
        "{usage:?}"
    );
}

#[test]
fn an_ended_guard_leaves_no_server() {
    let server = FreshServer::new();
    let (pid, sockets) = (server.pid().expect("it runs"), server.socket_dir().to_owned());
    drop(server);
    // One that its parent has not waited for yet has no arguments left.
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(arguments.is_empty() && !sockets.exists(), "{}", String::from_utf8_lossy(&arguments));
}
