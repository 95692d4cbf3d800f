//! A lab of three hosts with a repository on the first, and exports in it.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{
    Fixture, Host, HostLeftovers, HostPlan, HostProcess, Lab, Scratch, User, copy_tree,
};
use serde_json::Value;

use crate::support::{assert_equal, text};

/// Options of an export over three machines.
pub const THREE: [&str; 4] = ["--staging", "dba@staging", "--to", "ops@target:out"];

/// Where its server keeps its sessions.
const SESSIONS: &str = "/home/ann/.local/state/pgthaw/sessions";

/// The account that asks, on the mount server.
pub const EXPLORER: &str = "ann";

/// Whether labs can be made here.
pub fn possible() -> bool {
    User::current().uid == 0
}

/// Hosts `mount`, `staging` and `target`; the fixture's lz4 repository lies on `mount`.
pub struct Machines {
    pub lab: Lab,
    pub fixture: Fixture,
    /// The newest session before the last export was started.
    before: RefCell<Option<String>>,
}

impl Machines {
    pub fn new() -> Self {
        Self::planned(HostPlan::new("mount"), HostPlan::new("staging"), HostPlan::new("target"))
    }

    /// With hosts as they are planned.
    pub fn planned(mount: HostPlan, staging: HostPlan, target: HostPlan) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_pgthaw"));
        // Elsewhere than on the mount server pgthaw is not installed.
        let mount = mount.program(program);
        let lab = Lab::with([mount, staging, target]);
        let fixture = Fixture::get();
        fixture
            .lz4
            .copy_for(&lab.host("mount").user(EXPLORER), &lab.host("mount").path("/home/ann/repo"));
        // Those of the accounts that an instance may run as.
        let owners = [("mount", EXPLORER), ("staging", "dba")];
        lab.place_canaries(&owners, &fixture.cluster.join("ts_sales"));
        Self { lab, fixture, before: RefCell::default() }
    }

    pub fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }

    /// The repository's path on `mount`.
    pub fn repository(&self) -> &'static str {
        "/home/ann/repo"
    }

    /// `pgthaw` on the mount server, as it is typed.
    pub fn pgthaw(&self, arguments: &[&str]) -> Command {
        let mut command = self.host("mount").command(EXPLORER, "pgthaw");
        command.args(arguments);
        command
    }

    /// Runs it, and wants it to end with `code`; returns what it said on stdout and stderr.
    #[track_caller]
    pub fn expect(&self, code: i32, arguments: &[&str]) -> (String, String) {
        let output = self.pgthaw(arguments).output().unwrap();
        self.wants(code, arguments, &output)
    }

    #[track_caller]
    fn wants(&self, code: i32, arguments: &[&str], output: &Output) -> (String, String) {
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(
            output.status.code(),
            Some(code),
            "pgthaw {arguments:?}\n{out}\n{err}\n{}",
            self.logs()
        );
        (out, err)
    }

    /// Starts an export of `crm` and `sales` over three machines into `/home/ops/out` on the target; what it says goes to a file.
    pub fn start(&self, more: &[&str]) -> Child {
        // What was broken is to be seen, not to be made good in silence.
        let once: &[&str] = if more.contains(&"--retries") { &[] } else { &["--retries", "0"] };
        self.start_export(&[&THREE[..], once, more].concat())
    }

    /// Starts an export of `crm` and `sales` with these options; what it says goes to a file.
    pub fn start_export(&self, options: &[&str]) -> Child {
        self.before.replace(self.newest());
        self.start_command(
            &[&["export", self.repository(), "-d", "crm", "-d", "sales"], options].concat(),
        )
    }

    /// Starts `pgthaw`; what it says goes to a file.
    pub fn start_command(&self, arguments: &[&str]) -> Child {
        let said = std::fs::File::create(self.host("mount").path("/home/ann/said")).unwrap();
        self.pgthaw(arguments).stdout(Stdio::null()).stderr(said).spawn().unwrap()
    }

    /// What the started command has said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.host("mount").path("/home/ann/said")).unwrap_or_default()
    }

    /// The newest session's status.
    pub fn session(&self) -> Value {
        let output = self.pgthaw(&["sessions", "--output", "json"]).output().unwrap();
        let sessions: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        sessions.as_array().and_then(|all| all.last().cloned()).unwrap_or(Value::Null)
    }

    /// The newest session's id.
    fn newest(&self) -> Option<String> {
        let sessions = std::fs::read_dir(self.host("mount").path(SESSIONS)).ok()?;
        sessions.flatten().filter_map(|session| session.file_name().into_string().ok()).max()
    }

    /// The journal of the session that the last started export has made; empty until then.
    pub fn journal(&self) -> String {
        let Some(newest) =
            self.newest().filter(|newest| Some(newest) != self.before.borrow().as_ref())
        else {
            return String::new();
        };
        let path = self.host("mount").path(SESSIONS).join(newest).join("journal");
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// Waits until the started export's present attempt has begun `step`.
    #[track_caller]
    pub fn wait_for_step(&self, step: &str) {
        let begun = format!("{{\"step\":\"{step}\"}}");
        self.wait_until(step, || {
            let journal = self.journal();
            journal.rsplit("\"attempt\"").next().is_some_and(|attempt| attempt.contains(&begun))
        });
    }

    #[track_caller]
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(120);
        while !holds() {
            assert!(Instant::now() < end, "waited in vain for {what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The processes on `host` whose arguments begin with `start`, wherever their program lies; not the canaries'.
    pub fn processes(&self, host: &str, start: &str) -> Vec<HostProcess> {
        let begins = |process: &HostProcess| {
            let (program, rest) =
                process.arguments.split_once(' ').unwrap_or((&process.arguments, ""));
            let name = program.rsplit('/').next().unwrap_or(program);
            let found =
                process.arguments.starts_with(start) || format!("{name} {rest}").starts_with(start);
            found && !process.is_canary()
        };
        self.host(host).processes().into_iter().filter(begins).collect()
    }

    /// Ends a started export; it must have ended with `code`.
    #[track_caller]
    pub fn ended(&self, mut export: Child, code: i32) {
        let status = export.wait().unwrap();
        assert_eq!(status.code(), Some(code), "{}\n{}", self.said(), self.logs());
    }

    /// Wants the export in `/home/ops/out` on the target equal to the source, and removes it.
    #[track_caller]
    pub fn assert_delivered(&self) {
        let scratch = Scratch::new();
        let fetched = self.fetch("target", "/home/ops/out", scratch.path());
        assert_equal(&fetched, &self.fixture.expected, &["crm", "sales"]);
        std::fs::remove_dir_all(self.host("target").path("/home/ops/out")).unwrap();
    }

    /// What the server on the mount server wrote, for a failed test.
    pub fn logs(&self) -> String {
        let state = self.host("mount").path("/home/ann/.local/state/pgthaw");
        let mut logs = std::fs::read_to_string(state.join("server.log")).unwrap_or_default();
        for session in std::fs::read_dir(state.join("sessions")).into_iter().flatten().flatten() {
            logs += &std::fs::read_to_string(session.path().join("journal")).unwrap_or_default();
        }
        logs
    }

    /// Detectors for what an export leaves on any host.
    pub fn leftovers(&self) -> Vec<HostLeftovers<'_>> {
        self.lab.hosts().iter().map(HostLeftovers::before).collect()
    }

    /// A copy of a directory of a host, for those who compare it.
    pub fn fetch(&self, host: &str, directory: &str, to: &Path) -> PathBuf {
        let copy = to.join("fetched");
        copy_tree(&self.host(host).path(directory), &copy);
        copy
    }
}

/// How long an sshd whose client vanished during a cut may take to be told so by the network.
const RETRANSMISSION: Duration = Duration::from_secs(150);

/// Nothing is left on any host.
#[track_caller]
pub fn assert_nothing_left(leftovers: &[HostLeftovers<'_>], case: &str) {
    for host in leftovers {
        assert_eq!(host.check_within(RETRANSMISSION), [""; 0], "{case}");
    }
}
