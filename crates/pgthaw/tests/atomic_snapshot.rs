//! A data directory without `backup_label`: a snapshot of one instant is recovered as after a crash, but only when the user says
//! that it is one, and only when recovery met all the WAL there is.

mod support;

use std::fs;
use std::io::{Seek, SeekFrom, Write};

use pgthaw_testkit::{
    Cluster, ClusterOptions, Scale, Scratch, copy_tree, fingerprint, restore_dump_into_fresh_server,
};
use support::Pgthaw;

#[test]
fn an_atomic_snapshot_is_recovered_as_after_a_crash() {
    let (scratch, pgthaw) = (Scratch::new(), Pgthaw::new());
    let cluster = Cluster::build(&scratch.join("source"), Scale::Tiny, &ClusterOptions::default());
    cluster.sql("crm", "CHECKPOINT");
    for rows in [1, 3000, 3000, 3000] {
        cluster.sql("crm", &format!("SET synchronous_commit = on; INSERT INTO public.activity(what) SELECT repeat(md5(i::text), 60) FROM generate_series(1, {rows}) i"));
    }
    let expected = fingerprint(&cluster, "crm");
    cluster.stop("immediate");
    let (snapshot, tablespace) = (scratch.join("snapshot"), scratch.join("tablespace"));
    copy_tree(cluster.data(), &snapshot);
    copy_tree(cluster.tablespace(), &tablespace);

    let leftovers = pgthaw.leftovers();
    // The copied link still leads to the original's tablespace.
    let link = fs::read_dir(snapshot.join("pg_tblspc")).unwrap().next().unwrap().unwrap();
    let oid = link.file_name().into_string().unwrap();
    let named = format!("--tablespace={oid}={}", tablespace.display());
    let arguments = |target: &str| {
        let arguments = pgthaw.export_arguments(&snapshot, &["crm"], &pgthaw.target(target));
        [arguments, vec![named.clone()]].concat()
    };
    let linked = pgthaw.export_arguments(&snapshot, &["crm"], &pgthaw.target("linked"));
    let linked = [&linked[..], &["--atomic-snapshot".into()]].concat();
    let (_, err) = pgthaw.expect(1, &linked.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(err.contains(&format!("--tablespace {oid}=DIR")), "{err}");
    let plain = arguments("refused");
    let (_, err) = pgthaw.expect(1, &plain.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(err.contains("no backup_label") && err.contains("--atomic-snapshot"), "{err}");
    assert!(!err.contains("removing"), "never the server's own advice: {err}");

    let target = pgthaw.target("snapshot");
    pgthaw.export(&snapshot, &["crm"], &target, &["--atomic-snapshot", &named]);
    let fresh = restore_dump_into_fresh_server(&target);
    let differences = expected.differences(&fingerprint(&fresh, "crm"));
    let unexpected: Vec<_> =
        differences.iter().filter(|line| !line.starts_with("sequence ")).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");

    // One page in the middle of what was inserted last: to PostgreSQL this looks like the end of WAL.
    let mut segments: Vec<_> = fs::read_dir(snapshot.join("pg_wal"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    segments.retain(|path| path.is_file());
    segments.sort_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
    let newest = segments.last().unwrap();
    let bytes = fs::read(newest).unwrap();
    let used = bytes.chunks(8192).take_while(|page| page[..2] == bytes[..2]).count() as u64;
    assert!(used > 20, "too little WAL to damage: {used} pages");
    let mut file = fs::OpenOptions::new().write(true).open(newest).unwrap();
    file.seek(SeekFrom::Start(used / 2 * 8192)).unwrap();
    file.write_all(&[0; 8192]).unwrap();
    let damaged = [arguments("damaged"), vec!["--atomic-snapshot".into()]].concat();
    let (_, err) = pgthaw.expect(1, &damaged.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(err.contains("the WAL between is damaged"), "{err}");
    assert!(!pgthaw.target("damaged").join("crm").exists());
    pgthaw.expect(0, &["cancel", &pgthaw.session_id()]);
    assert_eq!(leftovers.check(), [""; 0]);
}
