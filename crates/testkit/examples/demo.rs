//! The parts of `scripts/demo` that are not pgthaw: making backups, and comparing what came out of them.
//!
//! `demo make DIR` builds a cluster under write traffic and backs it up; only `DIR/basebackup`, `DIR/pgbackrest` and
//! `DIR/expected.json` are left. `demo compare DIR EXPORT DATABASE…` loads an export into a fresh server and ends with
//! 1 if anything differs from what was backed up.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use pgthaw_testkit::{
    BackupOptions, BackupType, BaseBackupOptions, Cluster, ClusterOptions, Fingerprint, PgBackRest,
    Scale, fingerprint, is_moved_by_traffic, pgbench_sums, restore_dump_into_fresh_server,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match texts[..] {
        ["make", dir] => make(Path::new(dir)),
        ["compare", dir, export, ref databases @ ..] if !databases.is_empty() => {
            return compare(Path::new(dir), Path::new(export), databases);
        }
        _ => {
            eprintln!("usage: demo make DIR | demo compare DIR EXPORT DATABASE…");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// Tells how long a step took.
fn step<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let result = act();
    println!("  {what}: {:.1} s", begin.elapsed().as_secs_f64());
    result
}

fn make(dir: &Path) {
    let source = dir.join("cluster");
    let cluster = step("cluster with the databases sales, crm, warehouse and empty", || {
        Cluster::build(&source, Scale::Tiny, &ClusterOptions::default())
    });
    let repository = PgBackRest::create(&cluster, &dir.join("pgbackrest"), "demo", "lz4");
    let traffic = step("write traffic started in sales, crm and warehouse", || cluster.traffic());
    fs::create_dir(dir.join("basebackup")).expect("a directory of the demo");
    step("pg_basebackup, plain format, tablespace mapped", || {
        cluster.base_backup(&dir.join("basebackup/pgdata"), &BaseBackupOptions::default())
    });
    for (what, kind) in [("full", BackupType::Full), ("incr", BackupType::Incr)] {
        step(&format!("pgbackrest --type={what} --compress-type=lz4 backup"), || {
            repository.backup(&BackupOptions { kind, compress: "lz4", bundle: false })
        });
    }
    drop(traffic);
    cluster.archive_all();
    let expected: BTreeMap<_, _> = ["crm", "empty", "sales", "warehouse"]
        .map(|name| (name, fingerprint(&cluster, name)))
        .into();
    fs::write(dir.join("expected.json"), serde_json::to_vec(&expected).expect("plain data"))
        .expect("a file of the demo");
    drop(cluster);
    fs::remove_dir_all(&source).expect("the cluster is stopped");
    println!("  traffic ended, cluster stopped and removed: only its backups are left");
}

fn compare(dir: &Path, export: &Path, databases: &[&str]) -> ExitCode {
    let expected: PathBuf = dir.join("expected.json");
    let expected: BTreeMap<String, Fingerprint> =
        serde_json::from_slice(&fs::read(expected).expect("written by `demo make`"))
            .expect("written by `demo make`");
    let server =
        step("psql -f globals.sql and pg_restore --create --jobs=2 into a fresh server", || {
            restore_dump_into_fresh_server(export)
        });
    let mut differences = Vec::new();
    for database in databases {
        let (wanted, found) = (&expected[*database], fingerprint(&server, database));
        let (at_rest, moved): (Vec<_>, Vec<_>) =
            wanted.0.iter().partition(|(name, _)| !is_moved_by_traffic(name));
        let rows: u64 = at_rest
            .iter()
            .filter(|(name, _)| !name.starts_with("sequence "))
            .map(|(_, (rows, _))| rows)
            .sum();
        let lines = wanted
            .clone()
            .without(is_moved_by_traffic)
            .differences(&found.clone().without(is_moved_by_traffic));
        println!(
            "  {database}: {} tables, views and sequences with {rows} rows compared by row count and hash: {}",
            at_rest.len(),
            if lines.is_empty() { "equal".into() } else { format!("{} DIFFER", lines.len()) }
        );
        differences.extend(lines.into_iter().map(|line| format!("{database}: {line}")));
        for (name, _) in moved {
            if !found.0.contains_key(name) {
                differences.push(format!("{database}: {name} is missing"));
            }
        }
        if wanted.0.contains_key("public.pgbench_accounts") {
            let sums = pgbench_sums(&server, database);
            println!(
                "  {database}: after {} transactions accounts, tellers, branches and history sum up to {}, {}, {}, {}: {}",
                sums.transactions,
                sums.accounts,
                sums.tellers,
                sums.branches,
                sums.history,
                if sums.agree() { "they agree" } else { "they DIFFER" }
            );
            if !sums.agree() || sums.transactions == 0 {
                differences.push(format!("{database}: {sums:?}"));
            }
        }
    }
    for line in &differences {
        eprintln!("demo: {line}");
    }
    if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
