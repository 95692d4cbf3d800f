//! What a lab stands on: a PID namespace around all hosts, a network namespace that holds the cables, and a mount
//! namespace with the hosts' disks. Nothing of it can be seen from the machine.
//!
//! The lab's first process ends when the test does, however the test ends, because its standard input does; with
//! it end all hosts, and with the last process the namespaces.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::init::Init;

/// The namespaces that all hosts of a lab have in common.
#[derive(Debug)]
pub(super) struct Floor(Init);

impl Floor {
    /// Makes the namespaces. `shares` are files and directories of the machine; hosts find them, read-only, where
    /// [`Floor::share`] says.
    pub fn lay(shares: &[&Path]) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--pid", "--fork", "--"]);
        command.args(["sh", "-c", include_str!("floor.sh"), "floor"]).args(shares);
        Self(Init::start(command.stdin(Stdio::piped())))
    }

    /// Returns where the floor has the share of that number.
    pub fn share(number: usize) -> PathBuf {
        format!("/run/shares/{number}").into()
    }

    /// Returns the path by which the test reaches a file of the floor.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        outside(self.0.pid(), inside.as_ref())
    }

    /// Returns an unfinished `nsenter` into the floor's mounts and network.
    pub fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.0.pid().to_string(), "--mount", "--net"]);
        command
    }

    /// Runs a shell script in the floor's mounts and network.
    ///
    /// # Panics
    /// With all it said, at the first command that fails.
    #[track_caller]
    pub fn script(&self, text: &str) {
        feed(self.enter().args(["--", "sh", "-eu"]), text);
    }

    /// Returns the number of the lab's first process.
    pub fn pid(&self) -> i32 {
        self.0.pid()
    }
}

/// Returns the path by which the test reaches `inside` of the mount namespace of the process `pid`.
pub(super) fn outside(pid: i32, inside: &Path) -> PathBuf {
    let relative = inside.strip_prefix("/").expect("an absolute path");
    Path::new(&format!("/proc/{pid}/root")).join(relative)
}

/// Runs a command to its end with `text` as its standard input.
///
/// # Panics
/// With all it said and got, unless it succeeds.
#[track_caller]
pub(super) fn feed(command: &mut Command, text: &str) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|err| panic!("{command:?}: {err}"));
    // One that ended early tells why below.
    let _ = child.stdin.take().expect("piped").write_all(text.as_bytes());
    let output = child.wait_with_output().expect("our child");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}\n{text}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
