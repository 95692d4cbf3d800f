//! Backups by pgBackRest, and restores by it to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::Server;
use crate::user::{User, run};

/// What a backup builds upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupType {
    /// Nothing.
    Full,
    /// The last full backup.
    Diff,
    /// The last backup.
    Incr,
}

/// What differs between backups.
#[derive(Debug, Clone, Copy)]
pub struct BackupOptions<'a> {
    /// What it builds upon.
    pub kind: BackupType,
    /// `none`, `gz`, `lz4` or `zst`.
    pub compress: &'a str,
    /// Whether small files are stored together.
    pub bundle: bool,
}

/// Where a restore's recovery ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreTarget<'a> {
    /// At the end of the backup.
    EndOfBackup,
    /// At the end of the archive.
    Latest,
    /// At an LSN, inclusively.
    Lsn(&'a str),
}

/// A pgBackRest repository on a local path, with one stanza.
#[derive(Debug)]
pub struct PgBackRest {
    dir: PathBuf,
    stanza: String,
    owner: User,
}

impl PgBackRest {
    /// Makes a repository in `dir/repo` and archives the server's WAL into it, compressed by `compress`.
    /// A server archives into one repository at a time.
    pub fn create(cluster: &Server, dir: &Path, stanza: &str, compress: &str) -> Self {
        let owner = cluster.owner().clone();
        for made in [dir.to_owned(), dir.join("repo"), dir.join("log"), dir.join("lock")] {
            fs::create_dir_all(&made)
                .unwrap_or_else(|err| panic!("create {}: {err}", made.display()));
            owner.take(&made);
        }
        let config = format!(
            "[global]\nrepo1-path={dir}/repo\nlog-path={dir}/log\nlock-path={dir}/lock\nrepo1-retention-full=9\n\
             log-level-console=warn\nprocess-max=2\nstart-fast=y\ncompress-type={compress}\ncompress-level=1\n\
             [{stanza}]\npg1-path={data}\npg1-port={port}\npg1-socket-path={socket}\npg1-user=postgres\n",
            dir = dir.display(),
            data = cluster.data().display(),
            port = cluster.port(),
            socket = cluster.socket_dir().display(),
        );
        fs::write(dir.join("pgbackrest.conf"), config).expect("write into a directory of ours");
        let repository = Self { dir: dir.into(), stanza: stanza.into(), owner };
        run(repository.command().arg("stanza-create"));
        let push = format!(
            "pgbackrest --config={}/pgbackrest.conf --stanza={stanza} archive-push %p",
            dir.display()
        );
        cluster.archive_with(&push);
        repository
    }

    /// The repository that [`PgBackRest::create`] has made in `dir`, for its owner.
    pub fn existing(dir: &Path, stanza: &str) -> Self {
        Self { dir: dir.into(), stanza: stanza.into(), owner: User::cluster_owner() }
    }

    /// Returns the repository's path.
    pub fn path(&self) -> PathBuf {
        self.dir.join("repo")
    }

    /// Returns a `pgbackrest` for this stanza, run by the repository's owner.
    pub fn command(&self) -> Command {
        let mut command = self.owner.command("pgbackrest");
        command.arg(format!("--config={}", self.dir.join("pgbackrest.conf").display()));
        command.arg(format!("--stanza={}", self.stanza)).env("PGOPTIONS", crate::PGOPTIONS);
        command
    }

    /// Takes a backup and returns its label.
    pub fn backup(&self, options: &BackupOptions) -> String {
        let mut command = self.command();
        command.arg(match options.kind {
            BackupType::Full => "--type=full",
            BackupType::Diff => "--type=diff",
            BackupType::Incr => "--type=incr",
        });
        command.arg(format!("--compress-type={}", options.compress));
        command.arg(if options.bundle { "--repo1-bundle" } else { "--no-repo1-bundle" });
        run(command.arg("backup"));
        self.labels().pop().expect("the backup that was just taken")
    }

    /// Returns the labels of all backups, oldest first.
    pub fn labels(&self) -> Vec<String> {
        let output = run(self.command().args(["--output=json", "info"]));
        let info: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let backups = info[0]["backup"].as_array().expect("a list of backups");
        backups.iter().map(|backup| backup["label"].as_str().expect("a label").to_owned()).collect()
    }

    /// Restores the backup `set` into `dir/pgdata` and `dir/ts_sales` and returns the data directory.
    pub fn restore_to(&self, dir: &Path, set: &str, target: RestoreTarget) -> PathBuf {
        let (data, tablespaces) = (dir.join("pgdata"), dir.join("tablespaces"));
        for made in [&data, &tablespaces] {
            fs::create_dir_all(made)
                .unwrap_or_else(|err| panic!("create {}: {err}", made.display()));
            self.owner.take(made);
        }
        let mut command = self.command();
        command.arg(format!("--pg1-path={}", data.display())).arg(format!("--set={set}"));
        command
            .arg(format!("--tablespace-map-all={}", tablespaces.display()))
            .arg("--archive-mode=off");
        match target {
            RestoreTarget::EndOfBackup => {
                command.args(["--type=immediate", "--target-action=promote"])
            }
            RestoreTarget::Latest => command.arg("--type=default"),
            RestoreTarget::Lsn(lsn) => {
                command.args(["--type=lsn", &format!("--target={lsn}"), "--target-action=promote"])
            }
        };
        run(command.arg("restore"));
        data
    }

    /// Restores as [`PgBackRest::restore_to`] and starts the server; returns once recovery is over.
    pub fn restore_and_start(&self, dir: &Path, set: &str, target: RestoreTarget) -> Server {
        let data = self.restore_to(dir, set, target);
        Server::start(&self.owner, &data, "postgres", "-c archive_mode=off -c hot_standby=off")
    }
}
