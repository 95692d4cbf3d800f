//! PostgreSQL's programs of one major version: where they lie on this machine.
//!
//! [`find`] looks into `--pg-bin` alone if given, else into the places of Debian, PGDG, RHEL and Arch
//! packages, of a build from source, and `PATH`. A program counts if the account that is to run it can run
//! it and its `--version` says the wanted major.

use std::ffi::OsStr;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::control::BuildSizes;
use crate::os_user::OsUser;
use crate::version::{Major, ProgramVersion};

/// The programs of one major version, all run once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binaries {
    /// The directory they lie in.
    pub directory: PathBuf,
    /// The server.
    pub postgres: PathBuf,
    /// `pg_dump`.
    pub pg_dump: PathBuf,
    /// `pg_dumpall`.
    pub pg_dumpall: PathBuf,
    /// `psql`, if it is there.
    pub psql: Option<PathBuf>,
    /// The server's version as it prints it, such as `15.18`.
    pub version: String,
    /// The major version of all of them.
    pub major: Major,
}

/// Why there are no programs to use.
#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    /// `--pg-bin` names a directory without a program, or one whose program cannot be run.
    #[error("`{program}` in the directory of --pg-bin cannot be used")]
    Given {
        /// The program's path.
        program: PathBuf,
        /// Why it cannot be run.
        source: io::Error,
    },
    /// `--pg-bin` names a directory with another major.
    #[error("`{program}` is version {found}, the backup needs {wanted}")]
    GivenOther {
        /// The program's path.
        program: PathBuf,
        /// Its version.
        found: String,
        /// The backup's major.
        wanted: Major,
    },
    /// Nowhere found.
    #[error("PostgreSQL {wanted} is not installed here (looked in {}){}", places(.looked), others(.found))]
    NotFound {
        /// The backup's major.
        wanted: Major,
        /// Every directory looked at, in order.
        looked: Vec<PathBuf>,
        /// What was found instead.
        found: Vec<Other>,
    },
}

/// An installation that was found but cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// Where it lies.
    pub directory: PathBuf,
    /// Its version, or why it cannot be used.
    pub what: String,
}

impl BinariesError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Given { .. } => "--pg-bin takes the directory that holds postgres, pg_dump and pg_dumpall; the account that runs PostgreSQL must be able to run them".into(),
            Self::GivenOther { wanted, .. } => format!("name the directory of PostgreSQL {wanted}'s programs, or leave --pg-bin out"),
            Self::NotFound { wanted, .. } => format!("{}; elsewhere: --pg-bin DIR", wanted.package_hint()),
        }
    }
}

fn places(looked: &[PathBuf]) -> String {
    looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn others(found: &[Other]) -> String {
    let mut text = String::new();
    for other in found {
        let separator = if text.is_empty() { "; found " } else { ", " };
        let _ = write!(text, "{separator}{} in {}", other.what, other.directory.display()); // writing to a String cannot fail
    }
    text
}

/// Finds the programs of `major` for `user`, in the directory given by `--pg-bin` or in the usual places.
///
/// # Errors
/// [`BinariesError`], which names the places looked at and the versions found there.
pub fn find(major: Major, pg_bin: Option<&Path>, user: &OsUser) -> Result<Binaries, BinariesError> {
    match pg_bin {
        Some(directory) => given(major, directory, user),
        None => search(major, &Places::of_this_machine(), user),
    }
}

impl Binaries {
    /// Asks the server for the sizes it was built with.
    ///
    /// Only presets are asked for: no data directory and no configuration is read.
    ///
    /// # Errors
    /// If the server cannot be run or gives another answer than a number.
    pub fn build_sizes(&self, user: &OsUser) -> io::Result<BuildSizes> {
        let ask = |name: &str| {
            let mut command = Command::new(&self.postgres);
            command.args(["-C", name]);
            let files = [
                "config_file=/dev/null",
                "hba_file=/dev/null",
                "ident_file=/dev/null",
                "data_directory=/nonexistent",
            ];
            command.args(files.iter().flat_map(|file| ["-c", file]));
            let answer = run(command, user)?;
            answer
                .trim()
                .parse::<u32>()
                .map_err(|_| io::Error::other(format!("`postgres -C {name}` answered {answer:?}")))
        };
        Ok(BuildSizes {
            block_size: ask("block_size")?,
            segment_blocks: ask("segment_size")?,
            wal_block_size: ask("wal_block_size")?,
        })
    }
}

impl Binaries {
    /// Returns where `library`, named as for `shared_preload_libraries`, was looked for and is not. `None` if it is there, or if
    /// the installation does not tell where its libraries are.
    pub fn missing_library(&self, library: &str, user: &OsUser) -> Option<PathBuf> {
        let path = match library.strip_prefix("$libdir/").unwrap_or(library) {
            path if path.starts_with('/') => PathBuf::from(path),
            name => {
                let mut config = Command::new(self.directory.join("pg_config"));
                config.arg("--pkglibdir");
                let directory = PathBuf::from(run(config, user).ok()?.trim_end());
                directory.is_dir().then(|| directory.join(name))?
            }
        };
        // PostgreSQL tries a name as it is and with the suffix of libraries (dfmgr.c)
        let mut with_suffix = path.clone().into_os_string();
        with_suffix.push(".so");
        (!path.is_file() && !Path::new(&with_suffix).is_file()).then_some(path)
    }
}

/// Takes the programs in one directory, or says which of them is wrong.
fn given(major: Major, directory: &Path, user: &OsUser) -> Result<Binaries, BinariesError> {
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.into());
    let check = |name: &str| {
        let program = directory.join(name);
        match version_of(&program, user) {
            Ok(found) if found.major == major.number() => Ok((program, found.version)),
            Ok(found) => {
                Err(BinariesError::GivenOther { program, found: found.version, wanted: major })
            }
            Err(source) => Err(BinariesError::Given { program, source }),
        }
    };
    let (postgres, version) = check("postgres")?;
    let (pg_dump, _) = check("pg_dump")?;
    let (pg_dumpall, _) = check("pg_dumpall")?;
    let psql = check("psql").ok().map(|(program, _)| program);
    Ok(Binaries { postgres, pg_dump, pg_dumpall, psql, version, major, directory })
}

/// Where to look.
struct Places {
    /// The root of the file system; tests have another.
    root: PathBuf,
    /// The directories of `PATH`.
    path: Vec<PathBuf>,
}

impl Places {
    fn of_this_machine() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self { root: "/".into(), path: split_path(&path) }
    }

    /// Returns the directories to look at, in order, each once.
    fn directories(&self, major: Major) -> Vec<PathBuf> {
        let usual = [
            format!("usr/lib/postgresql/{major}/bin"), // Debian, Ubuntu and PGDG for them
            format!("usr/pgsql-{major}/bin"),          // PGDG for RHEL and SUSE
            format!("opt/pgsql-{major}/bin"),
            format!("opt/postgresql-{major}/bin"), // Arch: postgresql-old-upgrade
            format!("usr/lib/postgresql{major}/bin"), // openSUSE
            format!("usr/libexec/postgresql{major}"), // Alpine
            "usr/local/pgsql/bin".into(),          // built from source
            "usr/bin".into(),                      // Arch and RHEL's own
        ];
        let mut directories: Vec<PathBuf> =
            usual.iter().map(|place| self.root.join(place)).collect();
        directories.extend(self.path.iter().cloned());
        let mut seen = std::collections::HashSet::new();
        directories.retain(|directory| seen.insert(directory.clone()));
        directories
    }
}

/// Splits `PATH`; relative directories are left out, as for any program that runs as root.
fn split_path(path: &OsStr) -> Vec<PathBuf> {
    std::env::split_paths(path).filter(|directory| directory.is_absolute()).collect()
}

fn search(major: Major, places: &Places, user: &OsUser) -> Result<Binaries, BinariesError> {
    let looked = places.directories(major);
    let mut found = Vec::new();
    for directory in &looked {
        if !directory.join("postgres").exists() {
            continue;
        }
        match given(major, directory, user)
            .or_else(|error| behind_link(major, directory, user).unwrap_or(Err(error)))
        {
            Ok(binaries) => return Ok(binaries),
            Err(error) => {
                found.push(Other { directory: directory.clone(), what: unusable(&error) })
            }
        }
    }
    let others =
        Major::all().filter(|other| *other != major).flat_map(|other| places.directories(other));
    for directory in others {
        let postgres = directory.join("postgres");
        let known =
            looked.contains(&directory) || found.iter().any(|other| other.directory == directory);
        if let (false, Ok(version)) = (known || !postgres.exists(), version_of(&postgres, user)) {
            found.push(Other { directory, what: version.version });
        }
    }
    Err(BinariesError::NotFound { wanted: major, looked, found })
}

/// Looks beside the real file of a linked `postgres` (`/usr/local/bin/postgres -> …`).
fn behind_link(
    major: Major,
    directory: &Path,
    user: &OsUser,
) -> Option<Result<Binaries, BinariesError>> {
    let real = directory.join("postgres").canonicalize().ok()?;
    let real = real.parent().filter(|real| *real != directory)?;
    Some(given(major, real, user))
}

/// Says in a few words why an installation was passed over.
fn unusable(error: &BinariesError) -> String {
    match error {
        BinariesError::GivenOther { program, found, .. } if program.ends_with("postgres") => {
            found.clone()
        }
        BinariesError::GivenOther { program, found, .. } => {
            format!("{} {found}", program.display())
        }
        BinariesError::Given { program, source } => {
            format!("an unusable {} ({source})", program.display())
        }
        BinariesError::NotFound { .. } => error.to_string(),
    }
}

fn version_of(program: &Path, user: &OsUser) -> io::Result<ProgramVersion> {
    let mut command = Command::new(program);
    command.arg("--version");
    let answer = run(command, user)?;
    ProgramVersion::parse(&answer).map_err(io::Error::other)
}

/// Runs a program as `user` and returns what it printed.
fn run(mut command: Command, user: &OsUser) -> io::Result<String> {
    command.stdin(Stdio::null()).current_dir("/").env("LC_ALL", "C").env_remove("PGDATA");
    user.run_as(&mut command);
    let output = command.output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let text = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!(
                "{}: {}",
                output.status,
                text.lines().next().unwrap_or("no message")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const PROGRAMS: [&str; 4] = ["postgres", "pg_dump", "pg_dumpall", "psql"];

    /// Puts programs that tell `version` into `directory`.
    fn install(directory: &Path, version: &str, programs: &[&str]) {
        fs::create_dir_all(directory).unwrap();
        for program in programs {
            let path = directory.join(program);
            // written by a process of its own: a child that another test forks right now would keep our
            // descriptor open for writing, and the program could not be run ("text file busy")
            let text = format!("#!/bin/sh\necho '{program} (PostgreSQL) {version}'\n");
            let status = Command::new("sh")
                .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
                .arg(&path)
                .stdin(Stdio::piped())
                .spawn();
            let mut shell = status.unwrap();
            io::Write::write_all(&mut shell.stdin.take().unwrap(), text.as_bytes()).unwrap();
            assert!(shell.wait().unwrap().success());
        }
    }

    struct Lab {
        places: Places,
        user: OsUser,
        _directory: tempfile::TempDir,
    }

    impl Lab {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let root = directory.path().to_path_buf();
            let places = Places { path: vec![root.join("path")], root };
            Self { places, user: OsUser::current().unwrap(), _directory: directory }
        }

        fn dir(&self, place: &str) -> PathBuf {
            self.places.root.join(place)
        }

        fn search(&self, major: u32) -> Result<Binaries, BinariesError> {
            search(Major::try_from(major).unwrap(), &self.places, &self.user)
        }
    }

    #[test]
    fn finds_each_distributions_place() {
        for place in [
            "usr/lib/postgresql/15/bin",
            "usr/pgsql-15/bin",
            "opt/pgsql-15/bin",
            "usr/local/pgsql/bin",
            "usr/bin",
            "path",
        ] {
            let lab = Lab::new();
            install(&lab.dir("usr/lib/postgresql/17/bin"), "17.2", &PROGRAMS);
            install(&lab.dir(place), "15.18 (Debian 15.18-0+deb12u1)", &PROGRAMS);
            let found = lab.search(15).unwrap();
            assert_eq!(
                (found.directory, found.version.as_str()),
                (lab.dir(place), "15.18"),
                "{place}"
            );
            assert_eq!(found.psql, Some(lab.dir(place).join("psql")));
        }
    }

    #[test]
    fn passes_over_what_cannot_be_used_and_says_so() {
        let lab = Lab::new();
        install(&lab.dir("usr/lib/postgresql/15/bin"), "15.3", &["postgres"]);
        install(&lab.dir("usr/lib/postgresql/17/bin"), "17.2", &PROGRAMS);
        install(&lab.dir("usr/bin"), "16.1", &PROGRAMS);
        let error = lab.search(15).unwrap_err();
        let text = error.to_string();
        for wanted in [
            "PostgreSQL 15 is not installed",
            "usr/pgsql-15/bin",
            "path",
            "17.2 in",
            "16.1 in",
            "pg_dump",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(error.hint().contains("postgresql-15"), "{}", error.hint());
        install(&lab.dir("path"), "15.4", &PROGRAMS);
        assert_eq!(lab.search(15).unwrap().version, "15.4");
    }

    #[test]
    fn follows_a_linked_server() {
        let lab = Lab::new();
        install(&lab.dir("srv/pg/bin"), "15.3", &PROGRAMS);
        fs::create_dir_all(lab.dir("path")).unwrap();
        symlink(lab.dir("srv/pg/bin/postgres"), lab.dir("path/postgres")).unwrap();
        assert_eq!(
            lab.search(15).unwrap().directory,
            lab.dir("srv/pg/bin").canonicalize().unwrap()
        );
    }

    #[test]
    fn a_given_directory_must_be_right() {
        let lab = Lab::new();
        let fifteen = Major::try_from(15).unwrap();
        let find = |place: &str| find(fifteen, Some(&lab.dir(place)), &lab.user);
        install(&lab.dir("good"), "15.3", &PROGRAMS);
        install(&lab.dir("other"), "16.3", &PROGRAMS);
        install(&lab.dir("mixed"), "15.3", &["postgres", "pg_dumpall"]);
        install(&lab.dir("mixed"), "14.3", &["pg_dump"]);
        install(&lab.dir("bare"), "15.3", &["postgres", "pg_dump", "pg_dumpall"]);
        install(&lab.dir("locked"), "15.3", &PROGRAMS);
        fs::set_permissions(lab.dir("locked/pg_dump"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(find("good").unwrap().postgres, lab.dir("good/postgres"));
        assert_eq!(find("bare").unwrap().psql, None);
        for (place, want) in [
            ("missing", "missing/postgres"),
            ("other", "is version 16.3, the backup needs 15"),
            ("mixed", "is version 14.3"),
            ("locked", "locked/pg_dump"),
        ] {
            let error = find(place).unwrap_err();
            assert!(error.to_string().contains(want), "{place}: {error}");
            assert!(!error.hint().is_empty());
        }
    }

    #[test]
    fn a_relative_path_is_left_out() {
        assert_eq!(split_path(OsStr::new("/a:b::/c")), [PathBuf::from("/a"), PathBuf::from("/c")]);
    }
}
