//! From options to requests: relative paths become absolute, pg_dump's filters become its arguments.

use std::io;
use std::num::NonZero;
use std::path::{Path, PathBuf};

use pgthaw_link::Carry;
use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::request::{CallerMachine, DEFAULT_LEASE, DEFAULT_RETRIES, DEFAULT_RETRY_FOR};
use pgthaw_session::{ExportRequest, RecoveryChoice, RepositoryChoice};
use sha2::{Digest, Sha256};

use super::arguments::{DumpOptions, ExportOptions, RepositoryOptions, WorkOptions};
use super::values::{ReadFrom, RepositoryName};
use crate::configuration::{Configuration, NamedRepository, ServerName, resolve_name};
use crate::wire::ApiError;

/// Names the server that is asked.
const SERVER_VARIABLE: &str = "PGTHAW_SERVER";
/// pg_dump's `--jobs` without `-j`, at most.
const DEFAULT_JOBS_MAX: u32 = 4;

/// What a request depends on besides the options.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// The directory that relative paths begin at, or why there is none.
    pub directory: Result<PathBuf, String>,
    /// Number of processors.
    pub processors: u32,
    /// pgthaw's configuration.
    pub configuration: Configuration,
    /// `$PGTHAW_SERVER`.
    pub server: Option<ServerName>,
    /// Whether there is an ssh-agent.
    pub has_ssh_agent: bool,
    /// This machine and account, as another machine's server calls them.
    pub own_name: CallerMachine,
}

impl Surroundings {
    /// Looks at this process, and reads the configuration: `file` alone, or the usual ones.
    ///
    /// # Errors
    /// When the configuration or `$PGTHAW_SERVER` means nothing.
    pub fn look(file: Option<&Path>) -> Result<Self, ApiError> {
        let directory = std::env::current_dir().and_then(|directory| match directory.to_str() {
            Some(_) => Ok(directory),
            None => Err(io::Error::other("its name is no UTF-8")),
        });
        let directory = directory.map_err(|err| err.to_string());
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let server = match std::env::var(SERVER_VARIABLE) {
            Ok(text) if !text.is_empty() => Some(text.parse().map_err(|err| ApiError {
                message: format!("${SERVER_VARIABLE}: {err}"),
                hint: None,
                usage: true,
            })?),
            _ => None,
        };
        Ok(Self {
            directory,
            processors: u32::try_from(processors).unwrap_or(u32::MAX),
            configuration: Configuration::read(file)?,
            server,
            has_ssh_agent: std::env::var_os("SSH_AUTH_SOCK")
                .is_some_and(|socket| !socket.is_empty()),
            own_name: own_name(),
        })
    }

    /// The server to ask: what the environment says, else the mount server of the repository, else what the configuration says. None is
    /// this account's own.
    pub fn server(&self, repository: Option<&RepositoryName>) -> Option<&ServerName> {
        let named = repository.and_then(|name| self.named(name)).and_then(|r| r.server.as_ref());
        self.server.as_ref().or(named).or(self.configuration.server.as_ref())
    }

    /// The servers that may know a session: each once, the one that is asked without a repository first.
    pub fn servers(&self) -> Vec<Option<&ServerName>> {
        let mut servers = vec![self.server(None)];
        if self.server.is_none() {
            let more = self.configuration.repositories.values();
            servers.extend(more.filter_map(|r| r.server.as_ref()).map(Some));
        }
        let mut unique = Vec::new();
        for server in servers {
            if !unique.contains(&server) {
                unique.push(server);
            }
        }
        unique
    }

    /// Whether the program may be carried over to other machines.
    pub fn carry(&self) -> Carry {
        self.configuration.carry()
    }

    /// This machine, if its ssh-agent is to be used by a server `elsewhere`.
    fn forwarded_agent(
        &self,
        asked: bool,
        elsewhere: bool,
    ) -> Result<Option<CallerMachine>, ApiError> {
        let refused = |message: &str, hint: &str| {
            Err(ApiError { message: message.into(), hint: Some(hint.into()), usage: true })
        };
        match (asked, elsewhere, self.has_ssh_agent) {
            (false, _, _) => Ok(None),
            (true, false, _) => refused(
                "--forward-ssh-agent is for a server elsewhere",
                "without one, other machines are reached with your own keys anyway",
            ),
            (true, true, false) => refused(
                "there is no ssh-agent to forward: $SSH_AUTH_SOCK is not set",
                "start one: `eval $(ssh-agent)`, then `ssh-add`",
            ),
            (true, true, true) => Ok(Some(self.own_name.clone())),
        }
    }

    /// The configured repository of this name.
    fn named(&self, name: &RepositoryName) -> Option<&NamedRepository> {
        match name.kind {
            Some(_) => None, // `KIND:DIR` is a directory
            None => self.configuration.repositories.get(name.path.to_str()?),
        }
    }

    /// Returns `path` from the root on, without `.` and doubled or trailing `/`.
    fn absolute(&self, path: &Path) -> Result<PathBuf, ApiError> {
        if path.is_absolute() {
            return Ok(path.components().collect());
        }
        match &self.directory {
            Ok(directory) => Ok(directory.join(path).components().collect()),
            Err(why) => Err(ApiError {
                message: format!(
                    "`{}` is relative to the current directory, and that cannot be used: {why}",
                    path.display()
                ),
                hint: Some("name it by its whole path, or go to another directory".into()),
                usage: false,
            }),
        }
    }

    /// Returns the repository that `name` and `options` mean.
    ///
    /// # Errors
    /// When a path is relative and the current directory is gone or has a name that is no UTF-8.
    pub fn repository(
        &self,
        name: &RepositoryName,
        options: &RepositoryOptions,
    ) -> Result<RepositoryChoice, ApiError> {
        let server = self.server(Some(name));
        let there = |path: &PathBuf| match server {
            Some(server) => whole(path, &server.to_string()),
            None => self.absolute(path),
        };
        let wal_archives = options.wal_archive.iter().map(there).collect::<Result<_, _>>()?;
        let backup_label = options.backup_label.as_ref().map(there).transpose()?;
        let choice = RepositoryChoice {
            name: None,
            path: PathBuf::new(),
            kind: name.kind.clone(),
            stanza: options.stanza.clone(),
            wal_archives,
            backup_label,
            atomic_snapshot: options.atomic_snapshot,
            tablespaces: options
                .tablespace
                .iter()
                .map(|(oid, path)| Ok((*oid, path.as_ref().map(there).transpose()?)))
                .collect::<Result<_, ApiError>>()?,
        };
        let text = name.path.to_string_lossy();
        if server.is_some() && name.kind.is_none() && !text.contains('/') {
            return Ok(RepositoryChoice { name: Some(text.into()), ..choice }); // that server's configuration knows it
        }
        match self.named(name) {
            Some(_) => resolve_name(
                RepositoryChoice { name: Some(text.into()), ..choice },
                &self.configuration,
            ),
            None => Ok(RepositoryChoice { path: there(&name.path)?, ..choice }),
        }
    }

    /// Returns the export that `options` ask for.
    ///
    /// # Errors
    /// When an argument after `--` is not for pg_dump, or not for a user; as [`Surroundings::repository`].
    pub fn export(&self, options: &ExportOptions) -> Result<ExportRequest, ApiError> {
        let ExportOptions { dump, work, .. } = options;
        let server = self.server(Some(&options.repository)).map(ToString::to_string);
        let staging = work.staging.as_ref().map(ToString::to_string);
        let elsewhere = staging.as_ref().or(server.as_ref());
        let absolute = |path: &Option<PathBuf>| -> Result<Option<PathBuf>, ApiError> {
            let absolute = path.as_ref().map(|path| match elsewhere {
                Some(machine) => whole(path, machine),
                None => self.absolute(path),
            });
            absolute.transpose()
        };
        let here = options.target.host.is_none();
        let repository = self.repository(&options.repository, &options.reading)?;
        Ok(ExportRequest {
            backup: options.backup.clone(),
            databases: without_repetitions(&options.databases),
            all: options.all,
            exclude_databases: options.exclude_databases.clone(),
            staging: staging.clone(),
            read_from_staging: read_from_staging(work, &repository.path)?,
            target_host: options.target.host.as_ref().map(ToString::to_string),
            target_caller: (here && server.is_some()).then(|| self.own_name.clone()),
            ssh_agent_of: self.forwarded_agent(work.forward_ssh_agent, server.is_some())?,
            requester: None,
            as_asked: None,
            target: match &options.target.host {
                None => resolved(&self.absolute(&options.target.path)?),
                Some(_) => options.target.path.clone(),
            },
            replace: options.replace,
            replaces_only: None,
            recovery: if options.target_latest {
                RecoveryChoice::Latest
            } else {
                RecoveryChoice::EndOfBackup
            },
            jobs: dump.jobs.unwrap_or(self.processors.clamp(1, DEFAULT_JOBS_MAX)),
            compress: dump.compress.clone(),
            pg_dump_arguments: pg_dump_arguments(dump)?,
            globals: !dump.no_globals,
            role_passwords: !dump.no_role_passwords,
            dump_dir: absolute(&work.dump_dir)?,
            work_dir: absolute(&work.work_dir)?,
            stall_timeout: work.stall_timeout,
            cache_size: work.cache_size,
            pg_bin: absolute(&work.pg_bin)?,
            os_user: work.os_user.clone(),
            superuser: work.superuser.clone(),
            preload: work.preload.clone(),
            allow_damaged: work.allow_damaged,
            allow_unisolated: work.allow_unisolated,
            verify_source: work.verify_source,
            retries: work.retries.unwrap_or(DEFAULT_RETRIES),
            retry_for: work.retry_for.unwrap_or(DEFAULT_RETRY_FOR),
            lease: work.lease.unwrap_or(DEFAULT_LEASE),
            mover: options.mover.choice(),
            keep_dump: work.keep_dump,
            repository,
        })
    }
}

/// Returns `path`, which is one of `machine`.
fn whole(path: &Path, machine: &str) -> Result<PathBuf, ApiError> {
    match path.is_absolute() {
        true => Ok(path.components().collect()),
        false => Err(ApiError {
            message: format!(
                "`{}` is a directory of {machine}: relative paths mean nothing there",
                path.display()
            ),
            hint: Some("write it from `/` on".into()),
            usage: true,
        }),
    }
}

/// Returns where the staging server reads the repository that lies at `path` here, if it is to read it itself.
fn read_from_staging(work: &WorkOptions, path: &Path) -> Result<Option<PathBuf>, ApiError> {
    match (&work.read_from, &work.staging) {
        (None | Some(ReadFrom::MountServer), _) => Ok(None),
        (Some(ReadFrom::Staging(other)), Some(_)) => {
            Ok(Some(other.clone().unwrap_or_else(|| path.into())))
        }
        (Some(ReadFrom::Staging(_)), None) => Err(ApiError {
            message: "--read-from staging needs a staging server".into(),
            hint: Some("name it with --staging, or leave --read-from out: without one the repository is read here".into()),
            usage: true,
        }),
    }
}

/// Returns what this machine and account are called: `user@host`, and what tells machines of one name apart (machine-id(5) is not to
/// be shown to others as it is).
fn own_name() -> CallerMachine {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let user = OsUser::look_up(&uid).map_or(uid, |user| user.name);
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
    let hash = Sha256::new().chain_update("pgthaw").chain_update(machine).finalize();
    let id = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    CallerMachine { name: format!("{user}@{host}"), id }
}

/// Returns `path` with its existing part free of links, so that one directory has one name; what is not there yet, or not to be
/// entered, stays as it is.
fn resolved(path: &Path) -> PathBuf {
    for existing in path.ancestors() {
        if let Ok(real) = existing.canonicalize()
            && real.to_str().is_some()
            && let Ok(rest) = path.strip_prefix(existing)
        {
            return real.join(rest).components().collect();
        }
    }
    path.into()
}

fn without_repetitions(names: &[String]) -> Vec<String> {
    let mut unique: Vec<String> = Vec::with_capacity(names.len());
    for name in names {
        if !unique.contains(name) {
            unique.push(name.clone());
        }
    }
    unique
}

/// Returns the filters as pg_dump spells them, then what stood behind `--`.
fn pg_dump_arguments(dump: &DumpOptions) -> Result<Vec<String>, ApiError> {
    pgthaw_postgres::dump::validate_user_arguments(&dump.pg_dump_arguments).map_err(|err| {
        ApiError { message: err.to_string(), hint: err.hint().map(str::to_owned), usage: true }
    })?;
    let filters = [
        ("--table", &dump.table),
        ("--schema", &dump.schema),
        ("--exclude-table", &dump.exclude_table),
        ("--exclude-schema", &dump.exclude_schema),
        ("--exclude-table-data", &dump.exclude_table_data),
    ];
    let filters = filters.iter().flat_map(|(option, patterns)| {
        patterns.iter().map(move |pattern| format!("{option}={pattern}"))
    });
    let schema_only = dump.schema_only.then(|| "--schema-only".to_owned());
    Ok(filters.chain(schema_only).chain(dump.pg_dump_arguments.iter().cloned()).collect())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use pgthaw_session::MoverChoice;

    use super::*;
    use crate::cli::arguments::{Arguments, Command};

    fn surroundings() -> Surroundings {
        Surroundings {
            directory: Ok("/no/such/place".into()),
            processors: 16,
            configuration: Configuration::default(),
            server: None,
            has_ssh_agent: true,
            own_name: CallerMachine { name: "ann@laptop".into(), id: "1".into() },
        }
    }

    fn request(words: &[&str]) -> Result<ExportRequest, ApiError> {
        asked(&surroundings(), words)
    }

    fn asked(surroundings: &Surroundings, words: &[&str]) -> Result<ExportRequest, ApiError> {
        let words = ["pgthaw", "export"].iter().chain(words).copied();
        let Command::Export(arguments) = Arguments::try_parse_from(words).unwrap().command else {
            unreachable!()
        };
        surroundings.export(&arguments.export)
    }

    #[test]
    fn a_short_command_line_means_the_defaults() {
        let got = request(&["repo", "-d", "crm", "--to", "out/"]).unwrap();
        let want = ExportRequest {
            repository: RepositoryChoice {
                name: None,
                path: "/no/such/place/repo".into(),
                kind: None,
                stanza: None,
                wal_archives: vec![],
                backup_label: None,
                atomic_snapshot: false,
                tablespaces: Vec::new(),
            },
            backup: None,
            databases: vec!["crm".into()],
            all: false,
            exclude_databases: vec![],
            staging: None,
            read_from_staging: None,
            target_host: None,
            target_caller: None,
            ssh_agent_of: None,
            requester: None,
            as_asked: None,
            target: "/no/such/place/out".into(),
            replace: false,
            replaces_only: None,
            recovery: RecoveryChoice::EndOfBackup,
            jobs: 4,
            compress: None,
            pg_dump_arguments: vec![],
            globals: true,
            role_passwords: true,
            dump_dir: None,
            work_dir: None,
            stall_timeout: 1800,
            cache_size: None,
            pg_bin: None,
            os_user: None,
            superuser: None,
            preload: vec![],
            allow_damaged: false,
            allow_unisolated: false,
            verify_source: false,
            retries: 3,
            retry_for: 3600,
            lease: 86400,
            mover: MoverChoice::default(),
            keep_dump: false,
        };
        assert_eq!(got, want);
    }

    #[test]
    fn every_option_finds_its_place() {
        let got = request(&[
            "pgbackrest:/repo",
            "--all",
            "--exclude-database",
            "test*",
            "--exclude-database=old",
            "--to",
            "ssh://ops@files:2222/no/such/out",
            "--staging",
            "dba@db-stage",
            "--read-from",
            "staging:/mnt/repo",
            "--replace",
            "--backup",
            "20261122-101112F",
            "--target-latest",
            "-j",
            "7",
            "-Z",
            "gzip:6",
            "-t",
            "a.*",
            "-t",
            "b",
            "-n",
            "s",
            "-T",
            "x",
            "-N",
            "y",
            "--exclude-table-data",
            "log",
            "--schema-only",
            "--no-role-passwords",
            "--dump-dir",
            "/d",
            "--keep-dump",
            "--work-dir",
            "/w",
            "--stall-timeout",
            "2h",
            "--cache-size",
            "64MB",
            "--pg-bin",
            "/usr/pgsql/bin",
            "--os-user",
            "pg",
            "--superuser",
            "root",
            "--preload",
            "timescaledb",
            "--preload",
            "other",
            "--allow-damaged",
            "--allow-unisolated",
            "--verify-source",
            "--mover-ports",
            "5000-5009",
            "--bwlimit",
            "10MB",
            "--stanza",
            "main",
            "--wal-archive",
            "/wal",
            "--wal-archive",
            "wal2",
            "--backup-label",
            "label",
            "--",
            "--no-owner",
            "-x",
        ])
        .unwrap();
        let want = ExportRequest {
            repository: RepositoryChoice {
                name: None,
                path: "/repo".into(),
                kind: Some("pgbackrest".into()),
                stanza: Some("main".into()),
                wal_archives: vec!["/wal".into(), "/no/such/place/wal2".into()],
                backup_label: Some("/no/such/place/label".into()),
                atomic_snapshot: false,
                tablespaces: Vec::new(),
            },
            backup: Some("20261122-101112F".into()),
            databases: vec![],
            all: true,
            exclude_databases: vec!["test*".into(), "old".into()],
            staging: Some("dba@db-stage".into()),
            read_from_staging: Some("/mnt/repo".into()),
            target_host: Some("ssh://ops@files:2222".into()),
            target_caller: None,
            ssh_agent_of: None,
            requester: None,
            as_asked: None,
            target: "/no/such/out".into(),
            replace: true,
            replaces_only: None,
            recovery: RecoveryChoice::Latest,
            jobs: 7,
            compress: Some("gzip:6".into()),
            pg_dump_arguments: [
                "--table=a.*",
                "--table=b",
                "--schema=s",
                "--exclude-table=x",
                "--exclude-schema=y",
                "--exclude-table-data=log",
                "--schema-only",
                "--no-owner",
                "-x",
            ]
            .map(String::from)
            .to_vec(),
            globals: true,
            role_passwords: false,
            dump_dir: Some("/d".into()),
            work_dir: Some("/w".into()),
            stall_timeout: 7200,
            cache_size: Some(64 << 20),
            pg_bin: Some("/usr/pgsql/bin".into()),
            os_user: Some("pg".into()),
            superuser: Some("root".into()),
            preload: vec!["timescaledb".into(), "other".into()],
            allow_damaged: true,
            allow_unisolated: true,
            verify_source: true,
            retries: 3,
            retry_for: 3600,
            lease: 86400,
            mover: MoverChoice {
                ports: Some((5000, 5009)),
                bytes_per_second: NonZero::new(10 << 20),
            },
            keep_dump: true,
        };
        assert_eq!(got, want);
    }

    #[test]
    fn only_relative_paths_need_the_current_directory() {
        let gone = Surroundings { directory: Err("it is gone".into()), ..surroundings() };
        let name = |path: &str| RepositoryName { kind: None, path: path.into() };
        let mut options = RepositoryOptions::default();
        options.wal_archive.push("/wal".into());
        assert_eq!(gone.repository(&name("/r/"), &options).unwrap().path, Path::new("/r"));
        options.wal_archive.push("wal".into());
        let error = gone.repository(&name("/r"), &options).unwrap_err();
        assert!(error.message.contains("`wal`") && error.message.contains("it is gone"));
    }

    #[test]
    fn directories_of_the_staging_server_are_written_whole() {
        for option in ["--work-dir", "--dump-dir", "--pg-bin"] {
            let line = ["r", "-d", "crm", "--to", "/no/such/o", option, "here"];
            assert!(request(&line).is_ok(), "{option}");
            let error = request(&[&line[..], &["--staging", "db1"]].concat()).unwrap_err();
            assert!(
                error.usage && error.message.contains("`here` is a directory of db1"),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_server_elsewhere_gets_names_and_delivers_here() {
        let elsewhere =
            Surroundings { server: Some("ssh://backup1".parse().unwrap()), ..surroundings() };
        let line = ["prod", "-d", "crm", "--to", "monday"];
        let got = asked(&elsewhere, &line).unwrap();
        assert_eq!(
            (got.repository.name.as_deref(), got.repository.path.as_os_str()),
            (Some("prod"), "".as_ref())
        );
        assert_eq!(got.target_caller.as_ref(), Some(&elsewhere.own_name));
        assert_eq!(got.target, Path::new("/no/such/place/monday"));
        let path = asked(&elsewhere, &["./repo", "-d", "crm", "--to", "monday"]).unwrap_err();
        assert!(path.message.contains("a directory of ssh://backup1"), "{path:?}");

        let forward = [&line[..], &["--forward-ssh-agent"]].concat();
        assert_eq!(
            asked(&elsewhere, &forward).unwrap().ssh_agent_of,
            Some(elsewhere.own_name.clone())
        );
        let without = Surroundings { has_ssh_agent: false, ..elsewhere };
        assert!(asked(&without, &forward).unwrap_err().message.contains("SSH_AUTH_SOCK"));
        assert!(asked(&surroundings(), &forward).unwrap_err().usage);
    }

    #[test]
    fn the_staging_server_may_read_the_repository_itself() {
        let line = ["/r", "-d", "crm", "--to", "/no/such/o", "--read-from"];
        let read_from = |more: &[&str]| {
            request(&[&line[..], more].concat()).map(|request| request.read_from_staging)
        };
        let staging = ["--staging", "db1"];
        let with = |words: &str| read_from(&[&[words], &staging[..]].concat()).unwrap();
        assert_eq!(with("mount-server"), None);
        assert_eq!(with("staging"), Some("/r".into()), "at the same path");
        assert_eq!(with("staging:/mnt/r"), Some("/mnt/r".into()));
        assert_eq!(read_from(&["mount-server"]).unwrap(), None);
        assert!(read_from(&["staging"]).unwrap_err().usage);
    }

    #[test]
    fn a_name_given_twice_counts_once() {
        let got = request(&["r", "-d", "b", "-d", "a", "-d", "b", "--to", "/no/such/o"]).unwrap();
        assert_eq!(got.databases, ["b", "a"]);
    }

    #[test]
    fn arguments_that_are_not_for_pg_dump_are_refused() {
        for bad in [&["--format=c"][..], &["-f", "x"], &["crm"], &["--no-such-option"], &["-j4"]] {
            let words = ["r", "-d", "crm", "--to", "/no/such/o", "--"];
            let error = request(&words.iter().chain(bad).copied().collect::<Vec<_>>()).unwrap_err();
            assert!(error.usage, "{bad:?}");
        }
    }

    #[test]
    fn a_target_has_one_name_whatever_links_lead_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("real")).unwrap();
        std::os::unix::fs::symlink("real", real.join("link")).unwrap();
        assert_eq!(resolved(&real.join("link/new/dir")), real.join("real/new/dir"));
        assert_eq!(resolved(&real.join("link")), real.join("real"));
        assert_eq!(resolved(Path::new("/no/such/place")), Path::new("/no/such/place"));
    }
}
