//! Ready-made backups of a [`Scale::Tiny`] cluster, built once and kept between test runs.
//!
//! The cluster they were made of stays where it was, stopped: an export that takes a path of the backup for one of this
//! machine meets it there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, ClusterOptions, ODD_NAME, Scale};
use crate::fingerprint::{Fingerprint, fingerprint};
use crate::kept::Kept;
use crate::pg_basebackup::{BaseBackup, BaseBackupOptions, WalMethod};
use crate::pgbackrest::{BackupOptions, BackupType, PgBackRest};
use crate::tree::{chown_tree, copy_tree};
use crate::user::User;

/// The fixture, with all that decides what the backups look like.
const KEPT: Kept = Kept {
    name: "tk-fixture",
    made_from: &[
        include_str!("../sql/globals.sql"),
        include_str!("../sql/sales.sql"),
        include_str!("../sql/crm.sql"),
        include_str!("../sql/warehouse.sql"),
        include_str!("../sql/odd_names.sql"),
        include_str!("../sql/hostile.sql"),
        include_str!("cluster.rs"),
        include_str!("fixture.rs"),
        include_str!("pg_basebackup.rs"),
        include_str!("pgbackrest.rs"),
        include_str!("traffic.rs"),
    ],
};

/// Backups of one cluster with everything in [`ClusterOptions`], taken under traffic by the real tools.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fixture {
    /// Where the cluster was that the backups were made of: it is still there, stopped, as `pgdata` and `ts_sales`.
    pub cluster: PathBuf,
    /// What every backup holds of each database, without what the traffic moved.
    pub expected: BTreeMap<String, Fingerprint>,
    /// A pgBackRest repository: full, diff and incr, all lz4, WAL too.
    pub lz4: Repository,
    /// Full and incr, zst and bundled; WAL in zst.
    pub zst: Repository,
    /// Full in gz and an incr uncompressed; WAL in gz.
    pub gz: Repository,
    /// A base backup with streamed WAL; its tablespace lies beside it.
    pub stream: Plain,
    /// A base backup with fetched WAL; its tablespace lies beside it.
    pub fetch: Plain,
    /// A base backup without WAL and without manifest, which needs [`Fixture::wal_archive`].
    pub bare: Plain,
    /// Plain WAL segments and history files, from before `bare` on.
    pub wal_archive: PathBuf,
}

/// A pgBackRest repository of the fixture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Repository {
    /// What `pgthaw` gets as REPO.
    pub path: PathBuf,
    /// The backups' labels, oldest first.
    pub labels: Vec<String>,
    /// What each database holds at the end of the archived WAL (unlogged tables are empty then).
    pub latest: BTreeMap<String, Fingerprint>,
}

/// A base backup of the fixture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plain {
    /// Its data directory.
    pub dir: PathBuf,
    /// Its tablespace's directory.
    pub tablespace: PathBuf,
}

impl Fixture {
    /// The databases of the cluster, those of PostgreSQL itself left out.
    pub const DATABASES: [&'static str; 5] = ["crm", "empty", "sales", "warehouse", ODD_NAME];

    /// Returns the fixture, building it first (about a minute) where there is none yet.
    pub fn get() -> Self {
        KEPT.get(Self::build)
    }

    /// Returns the fixture if it has been built.
    pub fn there() -> Option<Self> {
        KEPT.there()
    }

    fn build(dir: &Path) -> Self {
        let options =
            ClusterOptions { odd_names: true, hostile: true, ..ClusterOptions::default() };
        let source = dir.join("cluster");
        let cluster = Cluster::build(&source, Scale::Tiny, &options);
        let of_all =
            || Self::DATABASES.map(|name| (name.to_owned(), fingerprint(&cluster, name))).into();

        let repository = |name: &str, backups: &[(BackupType, &str, bool)]| {
            let made = PgBackRest::create(&cluster, &dir.join(name), "demo", name);
            for (kind, compress, bundle) in backups {
                let traffic = cluster.traffic();
                made.backup(&BackupOptions { kind: *kind, compress, bundle: *bundle });
                drop(traffic);
            }
            cluster.archive_all();
            Repository { path: made.path(), labels: made.labels(), latest: of_all() }
        };
        use BackupType::{Diff, Full, Incr};
        let lz4 =
            repository("lz4", &[(Full, "lz4", false), (Diff, "lz4", false), (Incr, "lz4", false)]);
        let zst = repository("zst", &[(Full, "zst", true), (Incr, "zst", true)]);
        let gz = repository("gz", &[(Full, "gz", false), (Incr, "none", false)]);

        let wal_archive = dir.join("wal_archive");
        fs::create_dir(&wal_archive).expect("directory of the fixture");
        cluster.owner().take(&wal_archive);
        cluster.archive_with(&format!("cp %p {}/%f", wal_archive.display()));
        let traffic = cluster.traffic();
        let plain = |name: &str, wal, manifest| {
            let BaseBackup { dir, tablespace } = cluster.base_backup(
                &dir.join(name),
                &BaseBackupOptions { wal, manifest, ..Default::default() },
            );
            Plain { dir, tablespace }
        };
        let bare = plain("bare", WalMethod::None, false);
        let (stream, fetch) =
            (plain("stream", WalMethod::Stream, true), plain("fetch", WalMethod::Fetch, true));
        drop(traffic);
        cluster.archive_all();

        let expected: BTreeMap<String, Fingerprint> = of_all();
        let expected = expected
            .into_iter()
            .map(|(name, whole)| (name, whole.without(crate::is_moved_by_traffic)))
            .collect();
        // What a server archives while it stops is in no backup.
        cluster.sql("postgres", "ALTER SYSTEM SET archive_command = 'true'");
        cluster.sql("postgres", "SELECT pg_reload_conf()");
        cluster.stop("fast");
        Self { cluster: source, expected, lz4, zst, gz, stream, fetch, bare, wal_archive }
    }
}

impl Repository {
    /// Copies the repository to `to` for an account that may not read the original.
    pub fn copy_for(&self, user: &User, to: &Path) -> Self {
        copy_tree(&self.path, to);
        chown_tree(user, to);
        Self { path: to.into(), ..self.clone() }
    }
}

impl Plain {
    /// What says that the tablespace beside the backup is its own, for a backup without a manifest.
    pub fn tablespace_option(&self) -> String {
        let mut links =
            fs::read_dir(self.dir.join("pg_tblspc")).expect("every data directory has one");
        let link = links.next().expect("a tablespace").expect("its link").file_name();
        format!("--tablespace={}={}", link.to_string_lossy(), self.tablespace.display())
    }

    /// Copies the backup into the directory `to` (as `to/pgdata` and `to/ts_sales`) for an account that may not
    /// read the original.
    pub fn copy_for(&self, user: &User, to: &Path) -> Self {
        fs::create_dir(to).unwrap_or_else(|err| panic!("create {}: {err}", to.display()));
        let copy = Self { dir: to.join("pgdata"), tablespace: to.join("ts_sales") };
        copy_tree(&self.dir, &copy.dir);
        copy_tree(&self.tablespace, &copy.tablespace);
        for entry in fs::read_dir(copy.dir.join("pg_tblspc"))
            .expect("every data directory has one")
            .flatten()
        {
            fs::remove_file(entry.path()).expect("a link of the copy");
            std::os::unix::fs::symlink(&copy.tablespace, entry.path()).expect("a link of the copy");
        }
        chown_tree(user, to);
        copy
    }
}
