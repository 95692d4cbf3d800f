//! Running programs as one account or another.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// An account of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its user id.
    pub uid: u32,
    /// Its main group's id.
    pub gid: u32,
}

impl User {
    /// The account that runs the test.
    pub fn current() -> Self {
        Self::find(&rustix::process::geteuid().as_raw().to_string())
            .expect("our own account has an entry")
    }

    /// The account that owns clusters: `postgres` for a test that runs as root, otherwise the test's own.
    pub fn cluster_owner() -> Self {
        if Self::current().uid == 0 {
            Self::find("postgres").expect("account postgres")
        } else {
            Self::current()
        }
    }

    /// An ordinary account without rights to anything: made as `pgthaw-test` where root runs the test and it
    /// is missing, otherwise the test's own.
    pub fn ordinary() -> Self {
        const NAME: &str = "pgthaw-test";
        let current = Self::current();
        if current.uid != 0 {
            return current;
        }
        if Self::find(NAME).is_none() {
            // Another test may be quicker: only the result counts.
            let _ = Command::new("useradd")
                .args(["--create-home", "--shell", "/bin/bash", NAME])
                .output();
        }
        Self::find(NAME).expect("useradd made the account")
    }

    /// Looks an account up by its name or number.
    pub fn find(name: &str) -> Option<Self> {
        let output = Command::new("getent").args(["passwd", name]).output().expect("getent runs");
        let line = String::from_utf8(output.stdout).expect("passwd entries are UTF-8");
        let mut fields = line.trim_end().split(':');
        let (name, _) = (fields.next().filter(|name| !name.is_empty())?, fields.next());
        Some(Self {
            name: name.into(),
            uid: fields.next()?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
        })
    }

    /// Returns a command that will run as this account, in a directory it can enter; its pid is the program's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = if self.uid == Self::current().uid {
            Command::new(program)
        } else {
            let mut command = Command::new("setpriv");
            command.args([
                "--reuid",
                &self.uid.to_string(),
                "--regid",
                &self.gid.to_string(),
                "--init-groups",
                "--",
            ]);
            command.arg(program);
            command
                .env("HOME", if self.name == "pgthaw-test" { "/home/pgthaw-test" } else { "/tmp" });
            for name in ["USER", "LOGNAME"] {
                command.env(name, &self.name);
            }
            command.env_remove("XDG_RUNTIME_DIR");
            command
        };
        command.current_dir("/").stdin(Stdio::null());
        command
    }

    /// Gives one file or directory to this account.
    pub fn take(&self, path: &Path) {
        std::os::unix::fs::chown(path, Some(self.uid), Some(self.gid))
            .unwrap_or_else(|err| panic!("chown {}: {err}", path.display()));
    }
}

/// Runs a command to its end.
///
/// # Panics
/// With all it said, unless it succeeds.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|err| panic!("{command:?}: {err}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
