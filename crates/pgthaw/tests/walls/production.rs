//! A cluster that stands for production: small, with tablespaces where a test wants them, and compared file by file.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgthaw_testkit::{Scratch, Server, User, postgres_programs, run};
use sha1::{Digest, Sha1};

use crate::support::text;

/// What a start and a stop of PostgreSQL change by themselves, below the data directory.
const CHANGED_BY_A_START: [&str; 7] = [
    "global/pg_control",
    "pg_wal",
    "postmaster.opts",
    "postmaster.pid",
    "server.log",
    "pg_stat",
    "pg_stat_tmp",
];
/// Where a start and a stop write what was there before, or make files and remove them again.
const TOUCHED_BY_A_START: [&str; 8] =
    ["", "global", "base", "pg_xact", "pg_subtrans", "pg_multixact", "pg_notify", "pg_logical"];
/// A cache that each connection may write.
const CACHE: &str = "pg_internal.init";

/// A cluster of its own below one directory.
pub struct Production {
    pub scratch: Scratch,
    pub owner: User,
    server: Option<Server>,
    /// Directories outside of the scratch one that belong to it.
    pub elsewhere: Vec<PathBuf>,
}

impl Production {
    /// Makes one and starts it, with `settings` in its `postgresql.conf`.
    pub fn new(settings: &str) -> Self {
        let (scratch, owner) = (Scratch::new(), User::cluster_owner());
        let data = scratch.join("pgdata");
        fs::create_dir(&data).unwrap();
        owner.take(&data);
        Server::init(&owner, &data, "postgres");
        let conf = data.join("postgresql.conf");
        let written = fs::read_to_string(&conf).unwrap();
        fs::write(
            &conf,
            format!("{written}\nautovacuum = off\nlog_connections = on\n{settings}\n"),
        )
        .unwrap();
        let mut this = Self { scratch, owner, server: None, elsewhere: Vec::new() };
        this.start();
        this
    }

    pub fn data(&self) -> PathBuf {
        self.scratch.join("pgdata")
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("it runs")
    }

    pub fn start(&mut self) {
        let options = "-c max_wal_size=256MB";
        self.server = Some(Server::start(&self.owner, &self.data(), "postgres", options));
    }

    /// Stops it, so that all it knows is in its files.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop("fast");
        }
    }

    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let mut psql = self.server().psql(database);
        psql.env("PGOPTIONS", "-c client_min_messages=error").args(["--command", sql]);
        text(&run(&mut psql).stdout).trim_end().to_owned()
    }

    /// Makes a directory of its owner, below the scratch directory or anywhere.
    pub fn directory(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.scratch.join(name);
        let missing: Vec<&Path> = path.ancestors().take_while(|above| !above.exists()).collect();
        for directory in missing.into_iter().rev() {
            fs::create_dir(directory).unwrap();
            self.owner.take(directory);
        }
        path
    }

    /// A `pg_basebackup` into `name`, ready to be run; `mapped` are the tablespaces that exist by now, each beside the backup.
    pub fn base_backup(&self, name: &str, mapped: &[&Path], more: &[&str]) -> (PathBuf, Command) {
        let directory = self.directory("backups").join(name);
        let mut command = self.owner.command(postgres_programs().join("pg_basebackup"));
        let server = self.server();
        command.env("PGHOST", server.socket_dir()).env("PGPORT", server.port().to_string());
        command.args(["--username=postgres", "--format=plain", "--wal-method=stream", "--no-sync"]);
        command.arg("--pgdata").arg(&directory).args(more);
        for (number, location) in mapped.iter().enumerate() {
            let to = format!("{}.ts{number}", directory.display());
            command.arg("--tablespace-mapping").arg(format!("{}={to}", location.display()));
        }
        (directory, command)
    }

    /// The same, run to its end with a fast checkpoint.
    pub fn take_base_backup(&self, name: &str, mapped: &[&Path], more: &[&str]) -> PathBuf {
        let more = [&["--checkpoint=fast"], more].concat();
        let (directory, mut command) = self.base_backup(name, mapped, &more);
        run(&mut command);
        directory
    }

    /// Everything of it: path, then kind, mode, owner, times, where a link leads, contents. `whole` for a cluster that was
    /// stopped all the time; otherwise without what a start and a stop change.
    pub fn state(&self, whole: bool) -> BTreeMap<PathBuf, String> {
        let mut state = BTreeMap::new();
        let outside = self.scratch.join("ts");
        let parts = [self.data(), outside].into_iter().chain(self.elsewhere.clone());
        for part in parts.filter(|part| part.exists()) {
            self.look(&part, whole, &mut state);
        }
        state
    }

    fn look(&self, path: &Path, whole: bool, state: &mut BTreeMap<PathBuf, String>) {
        let data = self.data();
        let below = path.strip_prefix(&data).ok();
        let started =
            |names: &[&str]| below.is_some_and(|at| names.iter().any(|name| at == Path::new(name)));
        if !whole && (started(&CHANGED_BY_A_START) || path.ends_with(CACHE)) {
            return;
        }
        let found = fs::symlink_metadata(path).unwrap();
        let touched = TOUCHED_BY_A_START.iter().any(|name| match below {
            Some(at) if name.is_empty() => at == Path::new(""),
            Some(at) => at.starts_with(name) && (found.is_dir() || *name != "base"),
            // the cache of a database in a tablespace
            None => found.is_dir(),
        });
        let mut facts = format!("{:o} {}:{}", found.mode(), found.uid(), found.gid());
        if whole || !touched {
            facts += &format!(" {}.{:09}", found.mtime(), found.mtime_nsec());
        }
        if found.is_symlink() {
            facts += &format!(" -> {}", fs::read_link(path).unwrap().display());
        } else if found.is_file() {
            let sum = Sha1::digest(fs::read(path).unwrap());
            facts += &format!(" {} {sum:x?}", found.len());
        } else if found.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                self.look(&entry.unwrap().path(), whole, state);
            }
        }
        state.insert(path.to_owned(), facts);
    }
}

/// What differs between two states, a line each.
pub fn differences(
    before: &BTreeMap<PathBuf, String>,
    after: &BTreeMap<PathBuf, String>,
) -> Vec<String> {
    let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let changed = paths.filter(|path| before.get(*path) != after.get(*path));
    let none = "is not there".to_owned();
    let line = |path: &PathBuf| {
        let (was, is) = (before.get(path).unwrap_or(&none), after.get(path).unwrap_or(&none));
        format!("{}: {was}; now: {is}", path.display())
    };
    changed.map(line).collect()
}
