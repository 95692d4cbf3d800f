//! The operating system's account that PostgreSQL runs as.
//!
//! Accounts are looked up by `getent` and `id`, not in-process: the release binary is static, and glibc's
//! name services do not work in one. [`OsUser::run_as`] prepares a command to run as that account.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// An account of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OsUser {
    /// Its name; its number in digits if it has no entry in the user database.
    pub name: String,
    /// Its user id.
    pub uid: u32,
    /// Its primary group's id.
    pub gid: u32,
    /// All its groups' ids, the primary one too.
    pub groups: Vec<u32>,
    /// Its home directory.
    pub home: PathBuf,
}

/// Why an account cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OsUserError {
    /// `getent` or `id` could not be run.
    #[error("run `{program}` to look up the account \"{user}\"")]
    Lookup {
        /// The program.
        program: &'static str,
        /// Who was looked up.
        user: String,
        /// Why it could not be run.
        source: io::Error,
    },
    /// There is no such account.
    #[error("there is no account \"{0}\" on this machine")]
    Unknown(String),
    /// The answer was not understood.
    #[error("`{program}` gave an unexpected answer for the account \"{user}\": {answer:?}")]
    Unexpected {
        /// The program.
        program: &'static str,
        /// Who was looked up.
        user: String,
        /// Its answer.
        answer: String,
    },
    /// Only root may run programs as somebody else.
    #[error("\"{current}\" may not run programs as \"{wanted}\"")]
    NotAllowed {
        /// Who we are.
        current: String,
        /// Who was asked for.
        wanted: String,
    },
    /// PostgreSQL refuses to run as root.
    #[error("PostgreSQL does not run as root")]
    Root,
}

impl OsUserError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Lookup { .. } => {
                "getent and id are part of every usual Linux (libc-bin, coreutils); install them"
            }
            Self::Unknown(_) => {
                "name an account that may run PostgreSQL with --os-user (PostgreSQL's packages make one called postgres)"
            }
            Self::Unexpected { .. } => "check the account with `getent passwd` and `id -G`",
            Self::NotAllowed { .. } => "leave out --os-user, or start pgthaw as root",
            Self::Root => "name another account with --os-user",
        }
    }
}

impl OsUser {
    /// Looks an account up by its name, or by its number in digits.
    ///
    /// # Errors
    /// [`OsUserError`] if there is no such account, or the look-up does not work.
    pub fn look_up(user: &str) -> Result<Self, OsUserError> {
        if user.is_empty() || user.starts_with('-') || user.contains(['\0', ':', '\n']) {
            return Err(OsUserError::Unknown(user.into()));
        }
        let entry = ask("getent", &["passwd", user], user)?;
        let mut found = parse_passwd(&entry).ok_or_else(|| unexpected("getent", user, &entry))?;
        let groups = ask("id", &["-G", &found.name], user)?;
        found.groups = parse_groups(&groups).ok_or_else(|| unexpected("id", user, &groups))?;
        Ok(found)
    }

    /// Returns the account this process runs as; it need not have an entry in the user database.
    ///
    /// # Errors
    /// [`OsUserError`] if the look-up itself does not work.
    pub fn current() -> Result<Self, OsUserError> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let groups = || {
            rustix::process::getgroups()
                .unwrap_or_default()
                .iter()
                .map(|group| group.as_raw())
                .collect()
        };
        let home = std::env::var_os("HOME").map(PathBuf::from);
        match ask("getent", &["passwd", &uid.to_string()], &uid.to_string()) {
            Ok(entry) => {
                let found = parse_passwd(&entry)
                    .ok_or_else(|| unexpected("getent", &uid.to_string(), &entry))?;
                Ok(Self { gid, groups: groups(), ..found })
            }
            Err(OsUserError::Unknown(_)) => Ok(Self {
                name: uid.to_string(),
                uid,
                gid,
                groups: groups(),
                home: home.unwrap_or_else(|| "/".into()),
            }),
            Err(error) => Err(error),
        }
    }

    /// Returns the account PostgreSQL is to run as: the one asked for, else `postgres` for root, else ourselves.
    ///
    /// # Errors
    /// [`OsUserError`] if there is no such account, we may not become it, or it is root.
    pub fn for_postgres(asked: Option<&str>) -> Result<Self, OsUserError> {
        let current = Self::current()?;
        let wanted = match asked {
            Some(user) => Self::look_up(user)?,
            None if current.uid == 0 => Self::look_up("postgres")?,
            None => current.clone(),
        };
        match (current.uid, wanted.uid) {
            (_, 0) => Err(OsUserError::Root),
            (0, _) => Ok(wanted),
            (own, other) if own == other => Ok(wanted),
            _ => Err(OsUserError::NotAllowed { current: current.name, wanted: wanted.name }),
        }
    }

    /// Makes `command` run as this account: groups, group, user and `HOME`, `USER`, `LOGNAME`.
    ///
    /// If we are this account already only the environment is set. If we may not become it, starting the
    /// command fails with `EPERM`. The kernel forgets a parent-death signal when the user changes: a caller
    /// that wants one adds its own `pre_exec` after this.
    pub fn run_as(&self, command: &mut Command) {
        command.env("HOME", &self.home).env("USER", &self.name).env("LOGNAME", &self.name);
        if rustix::process::geteuid().as_raw() == self.uid
            && rustix::process::getuid().as_raw() == self.uid
        {
            return;
        }
        let (uid, gid, groups) = (self.uid, self.gid, self.groups.clone());
        let change = move || {
            // SAFETY: plain system calls on memory that lives in this closure; none of them allocates, and
            // the child has one thread only.
            unsafe {
                if libc::setgroups(groups.len(), groups.as_ptr()) != 0
                    || libc::setgid(gid) != 0
                    || libc::setuid(uid) != 0
                {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls.
        unsafe { command.pre_exec(change) };
    }

    /// Returns whether this account may search all of `directory`'s parents, as seen by itself.
    ///
    /// Asks a child process of that account, so ACLs, groups and mounts count.
    ///
    /// # Errors
    /// If the child cannot be run.
    pub fn can_enter(&self, directory: &std::path::Path) -> io::Result<bool> {
        let path = CString::new(std::os::unix::ffi::OsStrExt::as_bytes(directory.as_os_str()))?;
        let mut command = Command::new("true");
        self.run_as(&mut command);
        let enter = move || {
            // SAFETY: one system call on a string that lives in this closure.
            match unsafe { libc::chdir(path.as_ptr()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: as in `run_as`.
        unsafe { command.pre_exec(enter) };
        match command.status() {
            Ok(_) => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied
                        | io::ErrorKind::NotFound
                        | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Runs a look-up and returns the first line of its answer.
fn ask(program: &'static str, arguments: &[&str], user: &str) -> Result<String, OsUserError> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| OsUserError::Lookup { program, user: user.into(), source })?;
    let answer = String::from_utf8_lossy(&output.stdout);
    match (output.status.success(), answer.lines().next()) {
        (true, Some(line)) => Ok(line.into()),
        // getent answers 2 for "not found", id answers 1
        _ if matches!(output.status.code(), Some(1 | 2)) => Err(OsUserError::Unknown(user.into())),
        _ => Err(unexpected(program, user, &String::from_utf8_lossy(&output.stderr))),
    }
}

fn unexpected(program: &'static str, user: &str, answer: &str) -> OsUserError {
    OsUserError::Unexpected {
        program,
        user: user.into(),
        answer: answer.trim().chars().take(200).collect(),
    }
}

/// Reads a line of `passwd(5)`; the groups are only the primary one.
fn parse_passwd(line: &str) -> Option<OsUser> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, _] = fields[..] else { return None };
    let gid = gid.parse().ok()?;
    (!name.is_empty()).then_some(())?;
    Some(OsUser {
        name: name.into(),
        uid: uid.parse().ok()?,
        gid,
        groups: vec![gid],
        home: home.into(),
    })
}

/// Reads the answer of `id -G`.
fn parse_groups(line: &str) -> Option<Vec<u32>> {
    let groups: Option<Vec<u32>> =
        line.split_whitespace().map(|group| group.parse().ok()).collect();
    groups.filter(|groups| !groups.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_passwd_lines() {
        let user = parse_passwd(
            "postgres:x:101:104:PostgreSQL administrator,,,:/var/lib/postgresql:/bin/bash",
        )
        .unwrap();
        assert_eq!((user.uid, user.gid, user.groups), (101, 104, vec![104]));
        for bad in ["", "postgres", "a:x:b:1::/:/bin/sh", ":x:1:1::/:/bin/sh", "a:x:1:1::/"] {
            assert_eq!(parse_passwd(bad), None, "{bad:?}");
        }
        assert_eq!(parse_groups("104 103"), Some(vec![104, 103]));
        assert_eq!(parse_groups("104 staff"), None);
        assert_eq!(parse_groups(""), None);
    }

    #[test]
    fn an_unknown_account_is_named() {
        for name in ["no-such-account", "", "-x", "a:b", "4294967294"] {
            let error = OsUser::look_up(name).unwrap_err();
            assert!(matches!(error, OsUserError::Unknown(_)), "{name}: {error}");
        }
    }

    #[test]
    fn a_command_of_the_current_account_keeps_its_ids() {
        let current = OsUser::current().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "id -u; echo $HOME"]);
        current.run_as(&mut command);
        let output = command.output().unwrap();
        let want = format!("{}\n{}\n", current.uid, current.home.display());
        assert_eq!(String::from_utf8_lossy(&output.stdout), want);
    }

    #[test]
    fn root_runs_a_command_as_another_account() {
        let Ok(postgres) = OsUser::look_up("postgres") else { return };
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut command = Command::new("sh");
        command.args(["-c", "id -u; id -g; id -G; echo $HOME"]).current_dir("/");
        postgres.run_as(&mut command);
        let output = command.output().unwrap();
        let mut lines = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(String::from)
            .collect::<Vec<_>>()
            .into_iter();
        assert_eq!(lines.next(), Some(postgres.uid.to_string()));
        assert_eq!(lines.next(), Some(postgres.gid.to_string()));
        assert_eq!(parse_groups(&lines.next().unwrap()), Some(postgres.groups.clone()));
        assert_eq!(lines.next(), Some(postgres.home.display().to_string()));
        assert_eq!(OsUser::for_postgres(None).unwrap(), postgres);
        assert!(matches!(OsUser::for_postgres(Some("root")), Err(OsUserError::Root)));
    }

    #[test]
    fn tells_which_directories_an_account_can_enter() {
        use std::os::unix::fs::PermissionsExt;
        let current = OsUser::current().unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(current.can_enter(dir.path()).unwrap());
        assert!(!current.can_enter(&dir.path().join("missing")).unwrap());
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        if let (true, Ok(postgres)) = (current.uid == 0, OsUser::look_up("postgres")) {
            assert!(!postgres.can_enter(dir.path()).unwrap());
        }
    }
}
