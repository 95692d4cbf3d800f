//! What the end-to-end tests share: pgthaw as a user runs it, with a state and a work directory of the test's own.
#![allow(dead_code)] // each test binary uses its part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pgthaw_testkit::{
    Canaries, Fingerprint, Leftovers, Scratch, User, fingerprint, is_moved_by_traffic,
    pgbench_sums, postgres_programs, restore_dump_into_fresh_server,
};
use serde_json::Value;

/// pgthaw for one account, everything of it below one directory.
pub struct Pgthaw {
    pub scratch: Scratch,
    pub user: User,
    /// Production of the account that runs PostgreSQL, from the first command on that could touch it. The test fails when
    /// this is dropped and something was touched.
    canaries: OnceLock<Canaries>,
}

/// Commands that read a backup or start PostgreSQL, or a server that does.
const WORKS: [&str; 4] = ["export", "check", "retry", "serve"];

impl Pgthaw {
    /// For the account that runs the tests.
    pub fn new() -> Self {
        Self::of(User::current())
    }

    /// For `user`, who owns the directory.
    pub fn of(user: User) -> Self {
        let scratch = Scratch::new();
        let this = Self { scratch, user, canaries: OnceLock::new() };
        this.user.take(this.scratch.path());
        for name in ["state", "work", "dump", "out"] {
            std::fs::create_dir(this.scratch.join(name)).unwrap();
            this.user.take(&this.scratch.join(name));
        }
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pgthaw"), this.scratch.join("pgthaw"))
            .unwrap();
        this.open_to_others();
        this
    }

    /// The directories that other accounts of a session have to pass.
    fn open_to_others(&self) {
        use std::os::unix::fs::PermissionsExt;
        for path in
            [self.scratch.path().to_owned(), self.scratch.join("work"), self.scratch.join("dump")]
        {
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        }
    }

    pub fn work(&self) -> PathBuf {
        self.scratch.join("work")
    }

    pub fn dump(&self) -> PathBuf {
        self.scratch.join("dump")
    }

    /// A target directory that does not exist yet.
    pub fn target(&self, name: &str) -> PathBuf {
        self.scratch.join("out").join(name)
    }

    /// The command line with these arguments, ready to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        if arguments.first().is_some_and(|first| WORKS.contains(first)) {
            self.canaries();
        }
        let mut command = self.user.command(env!("CARGO_BIN_EXE_pgthaw"));
        command
            .args(arguments)
            .env("XDG_STATE_HOME", self.scratch.join("state"))
            .env("TZ", "UTC")
            .current_dir("/");
        command.stdin(Stdio::null());
        command
    }

    /// What no export may touch.
    pub fn canaries(&self) -> &Canaries {
        self.canaries.get_or_init(|| {
            let is_root = self.user.uid == 0;
            Canaries::start(&if is_root { User::cluster_owner() } else { self.user.clone() })
        })
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("pgthaw runs")
    }

    /// Runs it, and wants it to end with `code`; returns what it printed on stdout and stderr.
    pub fn expect(&self, code: i32, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(
            output.status.code(),
            Some(code),
            "pgthaw {arguments:?}\nstdout: {out}\nstderr: {err}\n{}",
            self.logs()
        );
        (out, err)
    }

    /// The arguments of an export into `target`, with this test's own directories.
    pub fn export_arguments(
        &self,
        repository: &Path,
        databases: &[&str],
        target: &Path,
    ) -> Vec<String> {
        let mut arguments = vec!["export".to_owned(), repository.display().to_string()];
        for database in databases {
            arguments.extend(["-d".to_owned(), (*database).to_owned()]);
        }
        arguments.extend(["--to".into(), target.display().to_string()]);
        arguments.extend(["--work-dir".into(), self.work().display().to_string()]);
        arguments.extend(["--dump-dir".into(), self.dump().display().to_string()]);
        arguments
    }

    /// Exports, and wants success.
    pub fn export(
        &self,
        repository: &Path,
        databases: &[&str],
        target: &Path,
        more: &[&str],
    ) -> (String, String) {
        let mut arguments = self.export_arguments(repository, databases, target);
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        self.expect(0, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts an export and does not wait for it; what it prints is thrown away.
    pub fn start_export(
        &self,
        repository: &Path,
        databases: &[&str],
        target: &Path,
        more: &[&str],
    ) -> Child {
        let mut arguments = self.export_arguments(repository, databases, target);
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let mut command = self.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pgthaw starts")
    }

    /// What `pgthaw … --output json` prints.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--output", "json"]).collect();
        let (out, err) = self.expect(0, &arguments);
        serde_json::from_str(&out)
            .unwrap_or_else(|why| panic!("pgthaw {arguments:?}: {why}\n{out}{err}"))
    }

    /// The newest session's status.
    pub fn session(&self) -> Value {
        self.json(&["sessions"])
            .as_array()
            .and_then(|all| all.last().cloned())
            .unwrap_or(Value::Null)
    }

    pub fn session_id(&self) -> String {
        self.session()["id"].as_str().expect("a session").to_owned()
    }

    /// What to look for after a test: nothing of this test's sessions must be left.
    pub fn leftovers(&self) -> Leftovers {
        Leftovers::before(&[&self.work(), &self.dump()])
    }

    /// Everything that the server and the agents wrote, for a failed test.
    pub fn logs(&self) -> String {
        let state = self.scratch.join("state").join("pgthaw");
        let mut logs = std::fs::read_to_string(state.join("server.log")).unwrap_or_default();
        for session in std::fs::read_dir(state.join("sessions")).into_iter().flatten().flatten() {
            for name in ["agent.log", "journal"] {
                let log = std::fs::read_to_string(session.path().join(name)).unwrap_or_default();
                logs.push_str(&format!("--- {name} of {}\n{log}", session.path().display()));
            }
        }
        logs
    }
}

impl Drop for Pgthaw {
    /// Whatever a failed test left: its sessions are canceled, so that nothing stays mounted.
    fn drop(&mut self) {
        let sessions = self.run(&["sessions", "--output", "json"]);
        let sessions: Value = serde_json::from_slice(&sessions.stdout).unwrap_or_default();
        for session in sessions.as_array().into_iter().flatten() {
            let ended = matches!(session["state"].as_str(), Some("succeeded" | "canceled"));
            if let Some(id) = session["id"].as_str().filter(|_| !ended) {
                self.run(&["cancel", id]);
            }
        }
    }
}

/// PostgreSQL's programs, of which `pg_dump` does not begin its work before it is let go: a session that takes as long as a test has to look at it.
pub struct HeldDump {
    /// For `--pg-bin`.
    pub programs: PathBuf,
    /// `pg_dump` waits while this file is there.
    hold: PathBuf,
}

impl HeldDump {
    pub fn of(pgthaw: &Pgthaw) -> Self {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let programs = pgthaw.scratch.join("programs");
        // in the directory of the programs, which is all that pg_dump sees of this one
        let this = Self { hold: programs.join("hold"), programs };
        std::fs::create_dir(&this.programs).unwrap();
        let real = postgres_programs();
        for name in ["postgres", "pg_dumpall", "psql"] {
            symlink(real.join(name), this.programs.join(name)).unwrap();
        }
        let script = format!(
            "#!/bin/sh\n\
             case $* in *'{}'*) while [ -e '{}' ]; do sleep 0.02; done ;; esac\n\
             exec '{}' \"$@\"\n",
            pgthaw.dump().display(), // not where its version and its options are asked for
            this.hold.display(),
            real.join("pg_dump").display()
        );
        let pg_dump = this.programs.join("pg_dump");
        std::fs::write(&pg_dump, script).unwrap();
        std::fs::set_permissions(&pg_dump, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::write(&this.hold, "").unwrap();
        this
    }

    pub fn let_go(&self) {
        std::fs::remove_file(&self.hold).unwrap();
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits for a condition, and fails after a minute.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(90);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Loads an export into a fresh server and wants every table of `databases` to equal `expected`, and pgbench's sums to agree.
pub fn assert_equal(export: &Path, expected: &BTreeMap<String, Fingerprint>, databases: &[&str]) {
    let sums = Command::new("sha256sum")
        .args(["--check", "--quiet", "SHA256SUMS"])
        .current_dir(export)
        .output()
        .unwrap();
    assert!(sums.status.success(), "{}", text(&sums.stderr));
    let fresh = restore_dump_into_fresh_server(export);
    for database in databases {
        let found = fingerprint(&fresh, database).without(is_moved_by_traffic);
        let differences = expected[*database].differences(&found);
        assert!(differences.is_empty(), "{database} of {}: {differences:#?}", export.display());
    }
    if databases.contains(&"sales") {
        let sums = pgbench_sums(&fresh, "sales");
        assert!(sums.agree() && sums.history != 0, "{sums:?}");
    }
}
