//! What systemd-logind does to an ordinary user's processes after the last logout, and the remedy.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::wire::CheckReport;

/// What is known of logind and this user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logind {
    /// Where this process was started.
    pub started: Started,
    /// `KillUserProcesses`: the processes of a login end with it.
    pub kills: bool,
    /// `RemoveIPC`: System V shared memory goes with the last logout.
    pub removes_shared_memory: bool,
    /// The user's services go on without a login.
    pub lingers: bool,
}

/// Whose processes systemd takes us for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// Those of a login (`session-N.scope`).
    InLogin,
    /// Those of the user's own services (`user@UID.service`).
    InUserService,
    /// Nobody's that a logout would end.
    Elsewhere,
}

impl Logind {
    /// Looks at logind for the user `name`; none where systemd does not run.
    pub fn look(name: &str) -> Option<Self> {
        if !Path::new("/run/systemd/system").exists() {
            return None;
        }
        let settings = settings()?;
        let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Some(Self {
            started: started(&cgroup),
            kills: setting(&settings, "KillUserProcesses")?,
            removes_shared_memory: setting(&settings, "RemoveIPC")?,
            lingers: Path::new("/var/lib/systemd/linger").join(name).exists(),
        })
    }
}

/// Asks logind; it knows its defaults, which differ between distributions.
fn settings() -> Option<String> {
    let mut command = Command::new("timeout");
    command.args([
        "5",
        "busctl",
        "get-property",
        "--system",
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
    ]);
    command.args(["org.freedesktop.login1.Manager", "KillUserProcesses", "RemoveIPC"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Reads the answers of [`settings`]: one line each, `b true` or `b false`, in the order asked for.
fn setting(answers: &str, name: &str) -> Option<bool> {
    let line = answers.lines().nth(if name == "KillUserProcesses" { 0 } else { 1 })?;
    match line.trim() {
        "b true" => Some(true),
        "b false" => Some(false),
        _ => None,
    }
}

/// Reads `/proc/self/cgroup`.
fn started(cgroup: &str) -> Started {
    let mut parts = cgroup
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .flat_map(|path| path.split('/'));
    let found = parts.find_map(|part| match part {
        _ if part.starts_with("user@") && part.ends_with(".service") => {
            Some(Started::InUserService)
        }
        _ if part.starts_with("session-") && part.ends_with(".scope") => Some(Started::InLogin),
        _ => None,
    });
    found.unwrap_or(Started::Elsewhere)
}

/// Warns of what a logout would do.
pub fn judge(report: &mut CheckReport, logind: &Logind, has_own_memory: bool) {
    match logind.started {
        Started::InLogin if logind.kills => {
            let text = "the export ends when you log out (logind's KillUserProcesses is on)";
            let remedy = "`loginctl enable-linger`, then begin the command with `systemd-run --user --scope`";
            report.warning(text, Some(remedy.into()));
        }
        Started::InUserService if !logind.lingers => {
            let text =
                "the export ends when you log out for the last time (your account does not linger)";
            report.warning(text, Some("`loginctl enable-linger`".into()));
        }
        _ => {}
    }
    if !has_own_memory
        && logind.removes_shared_memory
        && !logind.lingers
        && logind.started != Started::Elsewhere
    {
        let text = "the instance loses its shared memory when you log out for the last time (logind's RemoveIPC is on)";
        report.warning(text, Some("`loginctl enable-linger`".into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_answers_and_groups() {
        assert_eq!(setting("b true\nb false\n", "KillUserProcesses"), Some(true));
        assert_eq!(setting("b true\nb false\n", "RemoveIPC"), Some(false));
        assert_eq!(setting("", "RemoveIPC"), None);
        let cases = [
            ("0::/user.slice/user-1000.slice/session-3.scope\n", Started::InLogin),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u1.scope\n",
                Started::InUserService,
            ),
            (
                "2:cpu:/\n1:name=systemd:/user.slice/user-1000.slice/session-c2.scope\n",
                Started::InLogin,
            ),
            ("0::/system.slice/cron.service\n", Started::Elsewhere),
            ("0::/\n", Started::Elsewhere),
            ("", Started::Elsewhere),
        ];
        for (cgroup, want) in cases {
            assert_eq!(started(cgroup), want, "{cgroup}");
        }
    }

    #[test]
    fn warns_of_what_a_logout_does() {
        use Started::*;
        let cases: [(_, _, _, _, _, bool, &[&str]); 8] = [
            ("login, killed", InLogin, true, true, false, true, &["KillUserProcesses"]),
            (
                "login, killed although it lingers",
                InLogin,
                true,
                true,
                true,
                false,
                &["KillUserProcesses"],
            ),
            ("login, not killed", InLogin, false, true, false, true, &[]),
            ("login, shared memory outside", InLogin, false, true, false, false, &["RemoveIPC"]),
            ("login, shared memory stays", InLogin, false, false, false, false, &[]),
            ("service", InUserService, false, false, false, false, &["does not linger"]),
            ("service that lingers", InUserService, true, true, true, false, &[]),
            ("elsewhere", Elsewhere, true, true, false, false, &[]),
        ];
        for (name, started, kills, removes_shared_memory, lingers, has_own_memory, want) in cases {
            let mut report = CheckReport::default();
            judge(
                &mut report,
                &Logind { started, kills, removes_shared_memory, lingers },
                has_own_memory,
            );
            assert_eq!(report.findings.len(), want.len(), "{name}: {:?}", report.findings);
            for (finding, want) in report.findings.iter().zip(want) {
                assert!(!finding.error && finding.message.contains(want), "{name}: {finding:?}");
                assert!(finding.remedy.is_some());
            }
        }
    }
}
