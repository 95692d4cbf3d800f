//! Backups by `pg_basebackup -Fp`.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::cluster::Cluster;
use crate::user::{User, run};

/// How a base backup gets the WAL it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalMethod {
    /// Over a second connection while it runs.
    Stream,
    /// At its end.
    Fetch,
    /// Not at all: it needs an archive.
    None,
}

/// What differs between base backups.
#[derive(Debug, Clone, Copy)]
pub struct BaseBackupOptions<'a> {
    /// Where its WAL comes from.
    pub wal: WalMethod,
    /// Whether it has a `backup_manifest`.
    pub manifest: bool,
    /// The manifest's checksums as `--manifest-checksums` names them; `None` for pg_basebackup's default.
    pub checksums: Option<&'a str>,
    /// Where the tablespace goes; `None` for `DIR.ts_sales` beside the backup.
    pub tablespace: Option<&'a Path>,
}

impl Default for BaseBackupOptions<'_> {
    fn default() -> Self {
        Self { wal: WalMethod::Stream, manifest: true, checksums: None, tablespace: None }
    }
}

/// A base backup in plain format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackup {
    /// Its data directory.
    pub dir: PathBuf,
    /// Where its tablespace lies.
    pub tablespace: PathBuf,
}

impl Cluster {
    /// Takes a base backup into `dir`, which must not exist and whose parent the cluster's owner need not write.
    pub fn base_backup(&self, dir: &Path, options: &BaseBackupOptions) -> BaseBackup {
        let mut beside = dir.as_os_str().to_owned();
        beside.push(".ts_sales");
        let tablespace = options.tablespace.map_or_else(|| PathBuf::from(beside), PathBuf::from);
        // As pg_basebackup makes them, had it the right to.
        let make = |made: &Path| {
            DirBuilder::new()
                .mode(0o700)
                .create(made)
                .unwrap_or_else(|err| panic!("create {}: {err}", made.display()));
            self.owner().take(made);
        };
        make(dir);
        // One inside of the backup is made by pg_basebackup, which wants its own directory empty.
        if !tablespace.starts_with(dir) {
            make(&tablespace);
        }
        let mut command = self.client_as(self.owner(), "pg_basebackup");
        command.args(["--format=plain", "--checkpoint=fast", "--no-sync", "--pgdata"]).arg(dir);
        command.arg(match options.wal {
            WalMethod::Stream => "--wal-method=stream",
            WalMethod::Fetch => "--wal-method=fetch",
            WalMethod::None => "--wal-method=none",
        });
        command.arg("--tablespace-mapping");
        command.arg(format!("{}={}", self.tablespace().display(), tablespace.display()));
        if !options.manifest {
            command.arg("--no-manifest");
        }
        command.args(options.checksums.map(|name| format!("--manifest-checksums={name}")));
        run(&mut command);
        BaseBackup { dir: dir.into(), tablespace }
    }

    fn client_as(&self, user: &User, program: &str) -> std::process::Command {
        let client = self.client(program);
        let mut command = user.command(client.get_program());
        for (name, value) in client.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}
