//! An export is alone: it opens no network connection, and the original cluster hears nothing of it.

mod support;

use std::process::Command;

use pgthaw_testkit::{
    BaseBackupOptions, Cluster, ClusterOptions, Scale, Scratch, User, fingerprint,
    is_moved_by_traffic, restore_dump_into_fresh_server, tree_hash,
};
use support::{Pgthaw, text};

/// Everything in a cluster that would make a restored copy reach out: to its primary, to a publisher, into the archive.
fn reach_out(cluster: &Cluster, archived: &str) {
    let connection = format!("host=127.0.0.1 port={} user=postgres dbname=crm", cluster.port());
    for setting in [
        format!("primary_conninfo = '{connection}'"),
        format!("archive_command = 'touch {archived}'"),
        format!("restore_command = 'touch {archived}; false'"),
        format!("archive_cleanup_command = 'touch {archived}'"),
        format!("recovery_end_command = 'touch {archived}'"),
        "listen_addresses = '*'".into(),
        "max_logical_replication_workers = 4".into(),
    ] {
        cluster.sql("postgres", &format!("ALTER SYSTEM SET {setting}"));
    }
    let subscription = format!(
        "CREATE SUBSCRIPTION reaches_out CONNECTION '{connection}' PUBLICATION everything \
         WITH (connect = false, slot_name = 'reaches_out')"
    );
    cluster.sql("crm", &subscription);
    cluster.sql("crm", "ALTER SUBSCRIPTION reaches_out ENABLE");
    cluster.sql("crm", "CREATE EXTENSION dblink SCHEMA public");
    // An event trigger that fires on what a careless tool would do to the cluster, but no load does.
    cluster.sql(
        "crm",
        &format!(
            "CREATE FUNCTION public.call_home() RETURNS event_trigger LANGUAGE plpgsql AS \
         $$ BEGIN PERFORM public.dblink('{connection}', 'SELECT 1'); END $$"
        ),
    );
    cluster.sql(
        "crm",
        "CREATE EVENT TRIGGER call_home ON sql_drop EXECUTE FUNCTION public.call_home()",
    );
}

#[test]
fn an_export_opens_no_network_connection_and_the_source_hears_nothing() {
    if User::current().uid != 0 {
        return; // only root can trace what a set-user-id program (fusermount3) starts
    }
    let (scratch, pgthaw) = (Scratch::new(), Pgthaw::new());
    let settings = "max_logical_replication_workers = 0".to_owned();
    let options = ClusterOptions { log_connections: true, settings, ..ClusterOptions::default() };
    let cluster = Cluster::build(&scratch.join("source"), Scale::Tiny, &options);
    let archived = scratch.join("archived");
    std::fs::create_dir(&archived).unwrap();
    cluster.owner().take(&archived);
    let touched = archived.join("touched");
    reach_out(&cluster, &touched.display().to_string());
    let backup = cluster.base_backup(&scratch.join("backup"), &BaseBackupOptions::default());
    let expected = fingerprint(&cluster, "crm").without(is_moved_by_traffic);
    let connections = || cluster.log().matches("connection received").count();
    let (heard, before, leftovers) = (connections(), tree_hash(&backup.dir), pgthaw.leftovers());
    assert!(heard > 0, "the source does not log connections");
    let _ = std::fs::remove_file(&touched);

    let (target, trace) = (pgthaw.target("export"), pgthaw.scratch.join("trace"));
    let arguments = pgthaw.export_arguments(&backup.dir, &["crm"], &target);
    let command = pgthaw.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut traced = Command::new("strace");
    traced
        .args(["--follow-forks", "--trace=socket,connect,execve", "--quiet=all", "--output"])
        .arg(&trace);
    traced.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    let output = traced.current_dir("/").output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output.stderr), pgthaw.logs());

    let trace = text(&std::fs::read(&trace).unwrap());
    for program in ["postgres\", [\"", "pg_dump\", [\"", "pg_dumpall\", [\""] {
        assert!(trace.contains(program), "the trace does not follow as far as {program}");
    }
    assert!(trace.matches("AF_UNIX").count() > 5, "pg_dump's own connections are not in the trace");
    let network: Vec<&str> =
        trace.lines().filter(|line| line.contains("AF_") && !line.contains("AF_UNIX")).collect();
    assert_eq!(network, [""; 0]);
    assert_eq!(connections(), heard, "the source was contacted");
    assert!(!touched.exists(), "a command of the backup's configuration was run");
    assert_eq!(tree_hash(&backup.dir), before, "the backup was touched");
    assert_eq!(leftovers.check(), [""; 0]);
    let fresh = restore_dump_into_fresh_server(&target);
    let found = fingerprint(&fresh, "crm").without(is_moved_by_traffic);
    assert_eq!(expected.differences(&found), [""; 0]);
}
