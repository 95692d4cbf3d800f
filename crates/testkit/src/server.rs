//! A running PostgreSQL server that ends with its guard.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::scratch::Scratch;
use crate::user::{User, run};

/// What every connection of the testkit sets: nothing that roles and databases have set may reach it, and
/// every value has one text form.
pub const PGOPTIONS: &str = "-c role=none -c search_path= -c row_security=off -c statement_timeout=0 -c lock_timeout=0 \
    -c default_transaction_read_only=off -c session_preload_libraries= -c local_preload_libraries= \
    -c zero_damaged_pages=off -c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres \
    -c extra_float_digits=1 -c bytea_output=hex -c client_min_messages=warning";

/// Longest time that a server gets to start or to end its recovery.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// Returns the directory of PostgreSQL's programs: `PGTHAW_TEST_PG_BIN`, else the newest that Debian has.
pub fn postgres_programs() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = std::env::var_os("PGTHAW_TEST_PG_BIN") {
            return dir.into();
        }
        let entries = fs::read_dir("/usr/lib/postgresql")
            .expect("PostgreSQL of Debian, or PGTHAW_TEST_PG_BIN");
        let major = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u32>().ok();
        let servers = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.join("bin/initdb").exists());
        servers.max_by_key(major).expect("a PostgreSQL server is installed").join("bin")
    })
}

/// A server on a data directory; it is stopped when this is dropped.
#[derive(Debug)]
pub struct Server {
    data: PathBuf,
    sockets: Scratch,
    port: u16,
    owner: User,
    superuser: String,
    options: String,
}

impl Server {
    /// Makes a data directory `data` with the superuser `superuser`, text in UTF-8 and checksums.
    pub fn init(owner: &User, data: &Path, superuser: &str) {
        let mut command = owner.command(postgres_programs().join("initdb"));
        command.args([
            "--no-sync",
            "--data-checksums",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--auth=trust",
        ]);
        run(command.arg("--username").arg(superuser).arg("--pgdata").arg(data));
    }

    /// Starts a server that is reached by a Unix socket of its own and by a free port of the loopback;
    /// returns once it takes writes. `options` go onto its command line.
    pub fn start(owner: &User, data: &Path, superuser: &str, options: &str) -> Self {
        let sockets = Scratch::in_dir(Path::new("/tmp"));
        owner.take(sockets.path());
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|free| free.local_addr())
            .expect("free port")
            .port();
        let options = format!("-c fsync=off {options}");
        let (data, superuser) = (data.to_owned(), superuser.to_owned());
        let server = Self { data, sockets, port, owner: owner.clone(), superuser, options };
        server.pg_ctl_start();
        server
    }

    /// Stops the server and starts it anew with what its configuration says by now.
    pub fn restart(&self) {
        self.stop("fast");
        self.pg_ctl_start();
    }

    fn pg_ctl_start(&self) {
        let log = self.data.join("server.log");
        let mut command = self.pg_ctl();
        // Without waiting: pg_ctl would give up after a minute, and be satisfied with a standby.
        command.arg("start").arg("--no-wait").arg("--silent").arg("--log").arg(&log);
        command.arg("--options").arg(format!(
            "-c port={} -c listen_addresses=127.0.0.1 -c unix_socket_directories={} {}",
            self.port,
            self.sockets.path().display(),
            self.options
        ));
        run(&mut command);
        let end = Instant::now() + READY_LIMIT;
        loop {
            let answer =
                self.psql("postgres").args(["--command", "SELECT pg_is_in_recovery()"]).output();
            if answer
                .as_ref()
                .is_ok_and(|output| output.status.success() && output.stdout == b"f\n")
            {
                return;
            }
            let lines = || fs::read_to_string(&log).unwrap_or_default();
            assert!(
                Instant::now() < end && self.pid().is_some(),
                "server does not start: {answer:?}\n{}",
                lines()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the postmaster's pid; `None` if it does not run. Just after a start it may not be known yet,
    /// and then counts as running if its log was written.
    pub fn pid(&self) -> Option<i32> {
        let read = || {
            fs::read_to_string(self.data.join("postmaster.pid")).ok()?.lines().next()?.parse().ok()
        };
        let alive = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| !arguments.is_empty())
        };
        for _ in 0..40 {
            if let Some(pid) = read().filter(alive) {
                return Some(pid);
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        None
    }

    /// Stops the server; `mode` as `pg_ctl` knows it.
    pub fn stop(&self, mode: &str) {
        run(self.pg_ctl().args(["stop", "--silent", "--wait", "--mode", mode]));
    }

    fn pg_ctl(&self) -> Command {
        let mut command = self.owner.command(postgres_programs().join("pg_ctl"));
        command.arg("--pgdata").arg(&self.data);
        command
    }

    /// Archives WAL by `command` from now on (`%p` and `%f` as PostgreSQL replaces them); restarts the server.
    pub fn archive_with(&self, command: &str) {
        let command = command.replace('\'', "''");
        self.sql("postgres", "ALTER SYSTEM SET archive_mode = on");
        self.sql("postgres", &format!("ALTER SYSTEM SET archive_command = '{command}'"));
        self.restart();
    }

    /// Switches to a new WAL segment and waits until all finished ones are archived.
    pub fn archive_all(&self) {
        let last = self.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())");
        let done = format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver");
        let end = Instant::now() + Duration::from_secs(60);
        while self.sql("postgres", &done) != "t" {
            assert!(Instant::now() < end, "{last} is not archived\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Returns the data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Returns the directory of the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.sockets.path()
    }

    /// Returns the port, of the socket as well as of the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the account that runs it.
    pub fn owner(&self) -> &User {
        &self.owner
    }

    /// Returns all that the server has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.data.join("server.log")).unwrap_or_default()
    }

    /// Returns a command for one of PostgreSQL's client programs, which connects as the superuser.
    pub fn client(&self, program: &str) -> Command {
        let mut command = User::current().command(postgres_programs().join(program));
        command.env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string());
        command.env("PGUSER", &self.superuser).env("PGOPTIONS", PGOPTIONS);
        for name in ["PGDATABASE", "PGSERVICE", "PGPASSWORD", "PGSSLMODE", "PGHOSTADDR"] {
            command.env_remove(name);
        }
        command
    }

    /// Returns a `psql` that prints bare values, one row a line, and stops at the first error.
    pub fn psql(&self, database: &str) -> Command {
        let mut command = self.client("psql");
        command.args([
            "--no-psqlrc",
            "--quiet",
            "--no-align",
            "--tuples-only",
            "--set=ON_ERROR_STOP=1",
        ]);
        // A name with `=` or `:` would be taken for a connection string.
        let quoted = database.replace('\\', "\\\\").replace('\'', "\\'");
        command.arg("--dbname").arg(format!("dbname='{quoted}'"));
        command
    }

    /// Runs SQL and returns what it yields, without the last line's end.
    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let output = run(self.psql(database).arg("--command").arg(sql));
        String::from_utf8(output.stdout).expect("UTF-8").trim_end_matches('\n').into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let _ =
                self.pg_ctl().args(["stop", "--silent", "--wait", "--mode", "immediate"]).output();
        }
    }
}
