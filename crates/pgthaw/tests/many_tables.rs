//! A database of 20,000 tables: every worker of pg_dump locks each of them, and each is a file on the way to the target.

mod support;

use pgthaw_testkit::{
    BaseBackupOptions, Cluster, ClusterOptions, Scale, Scratch, fingerprint,
    restore_dump_into_fresh_server,
};
use support::Pgthaw;

const TABLES: u32 = 20_000;

#[test]
fn twenty_thousand_tables_are_exported() {
    let (scratch, pgthaw) = (Scratch::new(), Pgthaw::new());
    let cluster = Cluster::build(&scratch.join("source"), Scale::Tiny, &ClusterOptions::default());
    cluster.sql("postgres", "CREATE DATABASE many");
    // As many statements as the default number of locks bears, each a transaction of its own.
    for begin in (0..TABLES).step_by(2_000) {
        let end = begin + 2_000 - 1;
        cluster.sql("many", &format!(
            "DO $$ BEGIN FOR i IN {begin}..{end} LOOP EXECUTE format('CREATE TABLE public.t%s AS SELECT %s AS id', i, i); END LOOP; END $$"
        ));
    }
    let expected = fingerprint(&cluster, "many");
    let backup = cluster.base_backup(&scratch.join("backup"), &BaseBackupOptions::default());
    drop(cluster);
    let (leftovers, target) = (pgthaw.leftovers(), pgthaw.target("export"));
    pgthaw.export(&backup.dir, &["many"], &target, &["-j", "4"]);
    assert_eq!(leftovers.check(), [""; 0]);
    let files = std::fs::read_dir(target.join("many")).unwrap().count();
    assert_eq!(files, TABLES as usize + 1, "a file per table, and toc.dat");
    let fresh = restore_dump_into_fresh_server(&target);
    assert_eq!(expected.differences(&fingerprint(&fresh, "many")), [""; 0]);
}
