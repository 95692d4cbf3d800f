//! A private place for the tests, an original cluster in it, and its base backup.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgthaw_postgres::binaries::{self, Binaries};
use pgthaw_postgres::instance::{InstancePlan, Recovery, locks_per_transaction};
use pgthaw_postgres::lsn::SegmentSize;
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::process::ProcessId;
use pgthaw_postgres::root::{Confinement, Helper};
use pgthaw_postgres::version::Major;

/// The marker of every instance of the tests.
pub const MARKER: &str = "test-marker-0123456789";

/// The program that builds roots; beside a copy of the tests that another account runs lies a copy of it.
pub fn helper() -> PathBuf {
    let beside = std::env::current_exe().unwrap().with_file_name("pgthaw-root");
    if beside.exists() { beside } else { env!("CARGO_BIN_EXE_pgthaw-root").into() }
}

/// A root of its own, built by this crate's helper.
pub fn confinement() -> Confinement {
    let program = helper();
    Confinement::Root(Helper { program, arguments: Vec::new() })
}

/// A private directory with a short path, for sockets, and the programs and account of the tests.
pub struct Lab {
    /// Removed when dropped.
    pub directory: tempfile::TempDir,
    /// The programs.
    pub binaries: Binaries,
    /// Who runs them.
    pub user: OsUser,
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("pgt").tempdir_in("/tmp").unwrap();
        let user = OsUser::for_postgres(None).unwrap();
        std::os::unix::fs::chown(directory.path(), Some(user.uid), Some(user.gid)).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let given = std::env::var_os("PGTHAW_TEST_PG_BIN").map(PathBuf::from);
        let installed = || {
            let mut majors: Vec<Major> = Major::all().collect();
            majors.reverse();
            majors.into_iter().find_map(|major| binaries::find(major, None, &user).ok())
        };
        let binaries = match &given {
            Some(given) => Major::all().find_map(|m| binaries::find(m, Some(given), &user).ok()),
            None => installed(),
        };
        Self { binaries: binaries.expect("PostgreSQL is installed"), user, directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a program as the account of the tests; its output.
    pub fn run(&self, program: impl AsRef<Path>, arguments: &[&str]) -> String {
        let mut command = Command::new(program.as_ref());
        command.args(arguments).current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C");
        if arguments.contains(&"postgres") {
            // a superuser may; the cluster's own settings would not let him in
            let options = "-c session_preload_libraries= -c local_preload_libraries= -c role=none \
                           -c statement_timeout=0 -c default_transaction_read_only=off";
            command.env("PGOPTIONS", options);
        }
        self.user.run_as(&mut command);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{:?} {arguments:?}: {said}", program.as_ref());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn tool(&self, name: &str) -> PathBuf {
        self.binaries.directory.join(name)
    }

    pub fn make_directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        self.run("mkdir", &["-m", "700", path.to_str().unwrap()]);
        path
    }

    pub fn plan(&self, data: PathBuf, name: &str, recovery: Recovery) -> InstancePlan {
        InstancePlan {
            binaries: self.binaries.clone(),
            cluster_directories: vec![data.clone(), self.space_of(&data)],
            data_directory: data,
            locations: Vec::new(),
            instance_directory: self.make_directory(name),
            os_user: OsUser::current().is_ok_and(|user| user.uid == 0).then(|| self.user.clone()),
            recovery,
            max_prepared_transactions: 10,
            max_locks_per_transaction: locks_per_transaction(100, 20),
            connections: 10,
            wal_segment_size: SegmentSize::try_from(1 << 20).unwrap(),
            preload: Vec::new(),
            locale_path: None,
            marker: MARKER.into(),
            confinement: confinement(),
        }
    }

    /// The directory of a thawed cluster's tablespace.
    pub fn space_of(&self, data: &Path) -> PathBuf {
        let mut name = data.file_name().unwrap().to_owned();
        name.push("-space");
        let space = data.with_file_name(name);
        if !space.exists() {
            self.run("mkdir", &["-m", "700", space.to_str().unwrap()]);
        }
        space
    }

    /// Copies the backup with its tablespace, as each attempt has a mount of its own.
    pub fn thaw(&self, name: &str, signal: bool) -> PathBuf {
        let (data, space) = (self.path(name), self.path(&format!("{name}-space")));
        self.run("cp", &["-a", self.path("backup").to_str().unwrap(), data.to_str().unwrap()]);
        if self.path("backup-space").exists() {
            let from = self.path("backup-space");
            self.run("cp", &["-a", from.to_str().unwrap(), space.to_str().unwrap()]);
            let links = fs::read_dir(data.join("pg_tblspc")).unwrap();
            for link in links.map(|link| link.unwrap().path()) {
                fs::remove_file(&link).unwrap();
                symlink(&space, &link).unwrap();
            }
        }
        if signal {
            self.run("touch", &[data.join("recovery.signal").to_str().unwrap()]);
        }
        data
    }
}

/// The original cluster's server; ended by its number when dropped.
pub struct Source<'a> {
    /// Where it lies.
    pub lab: &'a Lab,
    server: std::process::Child,
}

impl<'a> Source<'a> {
    pub fn start(lab: &'a Lab) -> Self {
        let data = lab.path("source");
        let tool = lab.tool("initdb");
        let arguments =
            ["-D", data.to_str().unwrap(), "-U", "postgres", "-A", "trust", "--no-sync"];
        lab.run(tool, &[&arguments[..], &["--wal-segsize=1", "-E", "UTF8", "--locale=C"]].concat());
        let mut command = Command::new(lab.tool("postgres"));
        command.arg("-D").arg(&data).current_dir("/").stdin(Stdio::null());
        let settings = [
            "listen_addresses=".to_string(),
            format!("unix_socket_directories={}", lab.directory.path().display()),
            "fsync=off".into(),
            "max_prepared_transactions=10".into(),
            "wal_level=logical".into(),
            "max_connections=150".into(),
        ];
        for setting in &settings {
            command.args(["-c", setting]);
        }
        let log = fs::File::create(lab.path("source.log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        lab.user.run_as(&mut command);
        let source = Self { lab, server: command.spawn().unwrap() };
        let end = Instant::now() + Duration::from_secs(30);
        while !lab.path(".s.PGSQL.5432").exists() || !source.answers() {
            assert!(Instant::now() < end, "the original cluster does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        source
    }

    pub fn answers(&self) -> bool {
        let mut command = Command::new(self.psql());
        command.args(["-h", self.lab.directory.path().to_str().unwrap(), "-U", "postgres"]);
        command
            .args(["-d", "postgres", "-c", "SELECT 1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().unwrap().success()
    }

    pub fn psql(&self) -> PathBuf {
        self.lab.binaries.psql.clone().unwrap_or_else(|| "psql".into())
    }

    pub fn sql(&self, database: &str, sql: &str) -> String {
        let host = self.lab.directory.path().to_str().unwrap();
        let arguments = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", host, "-U", "postgres"];
        let connection = format!("dbname='{}'", database.replace('\'', "\\'")); // any name
        self.lab.run(self.psql(), &[&arguments[..], &["-d", &connection, "-c", sql]].concat())
    }

    /// Takes a base backup with its WAL.
    pub fn back_up(&self, user: &str) {
        let (lab, host) = (self.lab, self.lab.directory.path().to_str().unwrap());
        let (target, old, new) = (lab.path("backup"), lab.path("space"), lab.path("backup-space"));
        let mapping = format!("{}={}", old.display(), new.display());
        let tool = lab.tool("pg_basebackup");
        let tool = if tool.exists() { tool } else { "pg_basebackup".into() };
        let mut arguments =
            vec!["-D", target.to_str().unwrap(), "-h", host, "-U", user, "-c", "fast"];
        if old.exists() {
            arguments.extend(["-T", &mapping]);
        }
        arguments.extend(["-X", "stream", "--no-sync"]);
        lab.run(tool, &arguments);
    }
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        let _ = ProcessId::of(self.server.id()).map(|id| id.signal(rustix::process::Signal::QUIT));
        let _ = self.server.wait();
    }
}
