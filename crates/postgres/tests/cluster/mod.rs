//! Small real clusters for tests: made by `initdb`, run as PostgreSQL's account, ended by pid.
//!
//! Used are the installed versions in Debian's place, and those whose directories the variable
//! `PGTHAW_TEST_POSTGRES` lists (as `PATH` does): with it one machine can test every version.
#![allow(dead_code)] // each test file uses its own part

use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use pgthaw_postgres::os_user::OsUser;

/// Returns the directories of all servers to test with.
pub fn servers() -> Vec<PathBuf> {
    let given = std::env::var_os("PGTHAW_TEST_POSTGRES").unwrap_or_default();
    let debian = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"));
    let mut found: Vec<PathBuf> = std::env::split_paths(&given)
        .chain(debian)
        .filter(|bin| bin.join("initdb").exists())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no PostgreSQL server is installed");
    found
}

/// Returns a server that comes with `psql` and the other client programs.
pub fn full_server() -> PathBuf {
    servers().into_iter().find(|bin| bin.join("psql").exists()).expect("psql is installed")
}

/// A cluster; stopped and removed at the end.
pub struct Cluster {
    pub bin: PathBuf,
    pub user: OsUser,
    directory: tempfile::TempDir,
    server: Option<Child>,
}

impl Cluster {
    /// Makes a cluster with these further arguments for `initdb`.
    pub fn new(bin: &Path, arguments: &[&str]) -> Self {
        let user = OsUser::for_postgres(None).expect("an account for PostgreSQL");
        let directory = tempfile::Builder::new().prefix("pgt").tempdir_in("/tmp").unwrap();
        chown(directory.path(), Some(user.uid), Some(user.gid)).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let cluster = Self { bin: bin.into(), user, directory, server: None };
        let data = cluster.data();
        let mut initdb = cluster.command("initdb");
        initdb
            .args([
                "-D",
                data.to_str().unwrap(),
                "-A",
                "trust",
                "-U",
                "postgres",
                "-E",
                "UTF8",
                "--locale=C",
                "-N",
            ])
            .args(arguments);
        let output = initdb.output().unwrap();
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        cluster
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("d")
    }

    /// Reads a file of the data directory as it lies there.
    pub fn read(&self, file: &str) -> std::io::Result<Vec<u8>> {
        fs::read(self.data().join(file))
    }

    /// Returns a command of this version that runs as PostgreSQL's account.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .current_dir(self.directory.path())
            .env("LC_ALL", "C")
            .env("PGHOST", self.directory.path())
            .env("PGUSER", "postgres");
        command.env("PGDATABASE", "postgres");
        self.user.run_as(&mut command);
        command
    }

    /// Runs statements, one a line, in single-user mode: nothing but the server is needed.
    pub fn single(&self, statements: &str) -> String {
        let mut command = self.command("postgres");
        command.args(["--single", "-F", "-D", self.data().to_str().unwrap(), "postgres"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(statements.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !errors.contains("ERROR:"), "{errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts the server on a Unix socket.
    pub fn start(&mut self, settings: &[&str]) {
        let socket = self.directory.path().to_str().unwrap();
        let log = fs::File::create(self.directory.path().join("log")).unwrap();
        let mut command = self.command("postgres");
        command.args([
            "-D",
            self.data().to_str().unwrap(),
            "-c",
            "listen_addresses=",
            "-c",
            &format!("unix_socket_directories={socket}"),
        ]);
        command.args(["-F"]).args(settings.iter().flat_map(|setting| ["-c", setting]));
        self.server = Some(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.try_sql("SELECT 1").is_err() {
            assert!(
                Instant::now() < deadline,
                "{}",
                fs::read_to_string(self.directory.path().join("log")).unwrap()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs SQL by psql and returns the rows' columns, separated by `|`.
    pub fn sql(&self, sql: &str) -> Vec<String> {
        self.try_sql(sql).unwrap_or_else(|errors| panic!("{sql}: {errors}"))
    }

    fn try_sql(&self, sql: &str) -> Result<Vec<String>, String> {
        let output = self
            .command("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql])
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).lines().map(String::from).collect()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Ends the server: SIGINT for a fast shutdown, SIGQUIT for an immediate one.
    pub fn stop(&mut self, signal: rustix::process::Signal) {
        let Some(mut server) = self.server.take() else { return };
        let pid = rustix::process::Pid::from_child(&server);
        let _ = rustix::process::kill_process(pid, signal); // an error only means that it has ended
        server.wait().unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop(rustix::process::Signal::QUIT);
    }
}
