//! A backup with one large table, for measuring.

use std::path::PathBuf;
use std::process::Command;

use crate::{BackupOptions, BackupType, Cluster, ClusterOptions, PgBackRest, Scale, Scratch, run};

/// A pgBackRest repository (lz4, not bundled) that everybody may read, with one full backup.
pub struct LargeBackup {
    /// The repository.
    pub repository: PathBuf,
    /// The database, with the tables `orders` and `small`.
    pub database: &'static str,
    /// The first segment of `orders` in the repository, without the codec's suffix.
    pub relation: String,
    /// The same in the data directory.
    pub path: String,
}

impl LargeBackup {
    /// Builds a cluster below `dir` whose table `orders` has `gigabytes` segments of 1 GB, backs it up, and removes it. `small` has
    /// 2 MB of random digits.
    pub fn build(dir: &Scratch, gigabytes: u32) -> Self {
        let database = "large";
        let source = dir.join("cluster");
        let cluster = Cluster::build(&source, Scale::Tiny, &ClusterOptions::default());
        cluster.sql("postgres", &format!("CREATE DATABASE {database}"));
        cluster.sql(
            database,
            "CREATE TABLE public.small AS SELECT md5(random()::text) AS text FROM generate_series(1, 60000)",
        );
        cluster.sql(
            database,
            "CREATE TABLE public.orders (id bigint, customer int, token uuid, placed timestamptz, mail text, note text)",
        );
        let rows = "INSERT INTO public.orders SELECT n, n % 100003, gen_random_uuid(), timestamptz '2026-01-01' + n * interval '7 seconds', \
                    'customer' || n % 100003 || '@example.org', 'order ' || n || ' of ' || md5(n::text) || ', to be delivered by noon' \
                    FROM generate_series($1::bigint + 1, $1::bigint + 250000) AS n";
        let size = || cluster.sql(database, "SELECT pg_relation_size('public.orders') >> 30");
        let mut from = 0_u64;
        while size().trim().parse::<u32>().expect("a number") < gigabytes {
            cluster.sql(database, &rows.replace("$1", &from.to_string()));
            from += 250_000;
        }
        cluster.sql(database, "CHECKPOINT");
        let path = cluster.sql(database, "SELECT pg_relation_filepath('public.orders')");
        let path = path.trim().to_owned();
        let repository = PgBackRest::create(&cluster, &dir.join("pgbackrest"), "demo", "lz4");
        let options = BackupOptions { kind: BackupType::Full, compress: "lz4", bundle: false };
        let label = repository.backup(&options);
        cluster.archive_all();
        drop(cluster);
        std::fs::remove_dir_all(source).expect("the cluster is stopped");
        let repository = repository.path();
        run(Command::new("chmod").args(["--recursive", "o+rX"]).arg(&repository));
        let relation = format!("backup/demo/{label}/pg_data/{path}");
        Self { repository, database, relation, path }
    }
}
