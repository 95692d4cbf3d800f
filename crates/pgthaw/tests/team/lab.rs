//! Four hosts: `backup1` with the repository and `pgthaw serve` as `dba`, `db-stage`, `files`, and the `laptop` of `ann` and `ops`.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{Fixture, Host, HostLeftovers, HostPlan, Lab, User, copy_tree};
use serde_json::Value;

use crate::support::{assert_equal, text};

/// The server's configuration: `ann` may have `crm` and `sales`, nobody else anything.
const CONFIGURATION: &str = "
[repositories.prod]
path = '/home/dba/repo'

[hosts.stage]
ssh = 'dba@db-stage'

[hosts.archive]
ssh = 'ops@files'
directory = '/home/ops/exports'

[[allow]]
group = 'ann'
repositories = ['prod']
databases = ['crm', 'sales']
staging = ['stage']
targets = ['caller', 'archive:*']
";

/// Whether labs can be made here.
pub fn possible() -> bool {
    User::current().uid == 0
}

pub struct Team {
    pub lab: Lab,
    pub fixture: Fixture,
    server: Option<Child>,
}

impl Team {
    pub fn new() -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_pgthaw"));
        let with = |name| HostPlan::new(name).program(program);
        let lab = Lab::with([
            with("backup1"),
            HostPlan::new("db-stage"),
            HostPlan::new("files"),
            with("laptop"),
        ]);
        let fixture = Fixture::get();
        let backup1 = lab.host("backup1");
        fixture.lz4.copy_for(&backup1.user("dba"), &backup1.path("/home/dba/repo"));
        let owners = [("backup1", "dba"), ("db-stage", "dba")];
        lab.place_canaries(&owners, &fixture.cluster.join("ts_sales"));
        // As systemd's RuntimeDirectory= does it.
        backup1.script("mkdir -p /etc/pgthaw && install -d -o dba -m 755 /run/pgthaw");
        std::fs::write(backup1.path("/etc/pgthaw/config.toml"), CONFIGURATION).unwrap();
        let mut team = Self { lab, fixture, server: None };
        team.serve();
        team
    }

    /// Starts the server and waits until it listens.
    pub fn serve(&mut self) {
        let backup1 = self.lab.host("backup1");
        let mut options = std::fs::File::options();
        let log =
            options.create(true).append(true).open(backup1.path("/home/dba/serve.log")).unwrap();
        let mut command = backup1.command("dba", "env");
        command.args(["RUNTIME_DIRECTORY=/run/pgthaw", "pgthaw", "serve"]);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let socket = backup1.path("/run/pgthaw/server.sock");
        let _ = std::fs::remove_file(&socket);
        self.server = Some(command.spawn().unwrap());
        self.wait_until("the server", || socket.exists());
    }

    /// Kills the server with SIGKILL.
    pub fn kill_server(&mut self) {
        let backup1 = self.lab.host("backup1");
        let serving = backup1.processes().into_iter();
        let serving: Vec<_> = serving.filter(|p| p.arguments.starts_with("pgthaw serve")).collect();
        assert_eq!(serving.len(), 1, "{serving:?}");
        serving[0].signal(rustix::process::Signal::KILL);
        self.server.take().unwrap().wait().unwrap();
    }

    /// Changes the server's configuration, and starts it anew.
    pub fn change_configuration(&mut self, from: &str, to: &str) {
        let path = self.host("backup1").path("/etc/pgthaw/config.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
        self.kill_server();
        self.serve();
    }

    /// Kills all processes of a host whose arguments hold `name`.
    pub fn kill_all(&self, host: &str, name: &str) {
        let processes = self.host(host).processes().into_iter();
        let named: Vec<_> = processes.filter(|p| p.arguments.contains(name)).collect();
        assert!(!named.is_empty(), "{name} does not run on {host}");
        named.iter().for_each(|process| process.signal(rustix::process::Signal::KILL));
    }

    pub fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }

    /// `pgthaw` on the laptop, asking the server of `backup1` as the same account there.
    pub fn pgthaw(&self, user: &str, arguments: &[&str]) -> Command {
        let mut command = self.host("laptop").command(user, "env");
        command.args(["PGTHAW_SERVER=ssh://backup1", "pgthaw"]).args(arguments);
        command
    }

    /// Runs it, and wants it to end with `code`; returns what it said on stdout and stderr.
    #[track_caller]
    pub fn expect(&self, code: i32, user: &str, arguments: &[&str]) -> (String, String) {
        let output = self.pgthaw(user, arguments).output().unwrap();
        self.wants(code, arguments, &output)
    }

    #[track_caller]
    pub fn wants(&self, code: i32, arguments: &[&str], output: &Output) -> (String, String) {
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        let context = format!("pgthaw {arguments:?}\n{out}\n{err}\n{}", self.logs());
        assert_eq!(output.status.code(), Some(code), "{context}");
        (out, err)
    }

    /// Starts an export of ann's.
    pub fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self
            .pgthaw("ann", &[&["export", "prod", "-d", "crm", "-d", "sales"], arguments].concat());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Ann's sessions, oldest first.
    pub fn sessions(&self) -> Vec<Value> {
        let output = self.pgthaw("ann", &["sessions", "--output", "json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Wants the export in `directory` equal to the source, and removes it.
    #[track_caller]
    pub fn assert_delivered(&self, host: &str, directory: &str) {
        let scratch = pgthaw_testkit::Scratch::new();
        let fetched = scratch.path().join("fetched");
        copy_tree(&self.host(host).path(directory), &fetched);
        assert_equal(&fetched, &self.fixture.expected, &["crm", "sales"]);
        std::fs::remove_dir_all(self.host(host).path(directory)).unwrap();
    }

    /// The audit trail's lines.
    pub fn audit(&self) -> Vec<Value> {
        let path = self.host("backup1").path("/home/dba/.local/state/pgthaw/audit.log");
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(120);
        while !holds() {
            assert!(Instant::now() < end, "waited in vain for {what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Detectors for what an export leaves on any host.
    pub fn leftovers(&self) -> Vec<HostLeftovers<'_>> {
        self.lab.hosts().iter().map(HostLeftovers::before).collect()
    }

    /// What the server wrote, for a failed test.
    pub fn logs(&self) -> String {
        let home = self.host("backup1").path("/home/dba");
        let mut logs = std::fs::read_to_string(home.join("serve.log")).unwrap_or_default();
        let sessions = std::fs::read_dir(home.join(".local/state/pgthaw/sessions"));
        for session in sessions.into_iter().flatten().flatten() {
            logs += &std::fs::read_to_string(session.path().join("journal")).unwrap_or_default();
        }
        logs
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill(); // the lab's end takes what it started
            let _ = server.wait();
        }
    }
}

/// Nothing is left on any host.
#[track_caller]
pub fn assert_nothing_left(leftovers: &[HostLeftovers<'_>], case: &str) {
    for host in leftovers {
        assert_eq!(host.check_within(Duration::from_secs(60)), [""; 0], "{case}");
    }
}
