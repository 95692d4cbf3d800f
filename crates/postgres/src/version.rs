//! PostgreSQL's versions: which majors are read, and the numbers each one writes into its files.
//!
//! Every table here is checked by `tests/real_cluster.rs` against the servers that are installed; the
//! numbers come from PostgreSQL's `catversion.h`, `pg_control.h` and `xlog_internal.h` of each release.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A major version of PostgreSQL that is read: [`Major::OLDEST`] to [`Major::NEWEST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Major(u32);

/// A version that is not read, or a text that names no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// A version outside of the range whose file formats are known.
    #[error("PostgreSQL {0} is not supported; versions {oldest} to {newest} are", oldest = Major::OLDEST, newest = Major::NEWEST)]
    NotSupported(String),
    /// A `PG_VERSION` file without a version in it.
    #[error("PG_VERSION holds {0:?}, which is no version of PostgreSQL")]
    NotAVersionFile(String),
    /// A program's `--version` that does not look like PostgreSQL's.
    #[error("{0:?} is not how a PostgreSQL program tells its version")]
    NotAProgramVersion(String),
}

impl VersionError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotSupported(_) => "restore this backup with its own tool",
            Self::NotAVersionFile(_) => "the backup's PG_VERSION is damaged; choose another backup",
            Self::NotAProgramVersion(_) => {
                "name the directory of PostgreSQL's own programs with --pg-bin"
            }
        }
    }
}

/// The numbers a major version's released servers write.
struct Numbers {
    major: u32,
    catalog_version: u32,
    control_version: u32,
    wal_magic: u16,
}

#[rustfmt::skip]
const NUMBERS: [Numbers; 7] = [
    Numbers { major: 12, catalog_version: 201909212, control_version: 1201, wal_magic: 0xD101 },
    Numbers { major: 13, catalog_version: 202007201, control_version: 1300, wal_magic: 0xD106 },
    Numbers { major: 14, catalog_version: 202107181, control_version: 1300, wal_magic: 0xD10D },
    Numbers { major: 15, catalog_version: 202209061, control_version: 1300, wal_magic: 0xD110 },
    Numbers { major: 16, catalog_version: 202307071, control_version: 1300, wal_magic: 0xD113 },
    Numbers { major: 17, catalog_version: 202406281, control_version: 1700, wal_magic: 0xD116 },
    Numbers { major: 18, catalog_version: 202506291, control_version: 1800, wal_magic: 0xD118 },
];

impl Major {
    /// The oldest version whose formats are known.
    pub const OLDEST: Self = Self(12);
    /// The newest version whose formats are known.
    pub const NEWEST: Self = Self(18);

    /// Returns every supported version, oldest first.
    pub fn all() -> impl Iterator<Item = Self> {
        NUMBERS.iter().map(|numbers| Self(numbers.major))
    }

    /// Returns the plain number, such as 15.
    pub fn number(self) -> u32 {
        self.0
    }

    /// Reads a cluster's or a database's `PG_VERSION` file.
    ///
    /// # Errors
    /// [`VersionError`] if it holds no version, or one that is not supported (`9.6`).
    pub fn from_version_file(text: &str) -> Result<Self, VersionError> {
        let line = text.trim_end();
        let shape = line.starts_with(|c: char| c.is_ascii_digit())
            && line.chars().all(|c| c.is_ascii_digit() || c == '.');
        if !shape || line.len() > 16 {
            return Err(VersionError::NotAVersionFile(line.chars().take(40).collect()));
        }
        let number: u32 = line.parse().map_err(|_| VersionError::NotSupported(line.into()))?;
        Self::try_from(number)
    }

    /// Returns the version whose released servers write this catalog version; `None` for others, betas too.
    pub fn from_catalog_version(catalog_version: u32) -> Option<Self> {
        NUMBERS
            .iter()
            .find(|numbers| numbers.catalog_version == catalog_version)
            .map(|numbers| Self(numbers.major))
    }

    /// Returns the catalog version of this version's releases (`catversion.h`).
    pub fn catalog_version(self) -> u32 {
        self.numbers().catalog_version
    }

    /// Returns the version of `pg_control` (`pg_control.h`); 13 to 16 share one.
    pub fn control_version(self) -> u32 {
        self.numbers().control_version
    }

    /// Returns the magic number of this version's WAL pages (`xlog_internal.h`).
    pub fn wal_magic(self) -> u16 {
        self.numbers().wal_magic
    }

    /// Returns the packages that bring the server and `pg_dump` of this version, for an error's hint.
    pub fn package_hint(self) -> String {
        format!(
            "Debian and Ubuntu: apt install postgresql-{0} (another major than the distribution's own: from apt.postgresql.org); \
             RHEL, Rocky, Alma: dnf install postgresql{0}-server postgresql{0} (from yum.postgresql.org); \
             Arch: postgresql or postgresql-old-upgrade, if that is {0}",
            self.0
        )
    }

    fn numbers(self) -> &'static Numbers {
        NUMBERS.iter().find(|numbers| numbers.major == self.0).expect("a Major is one of NUMBERS")
    }
}

impl TryFrom<u32> for Major {
    type Error = VersionError;

    fn try_from(number: u32) -> Result<Self, VersionError> {
        match NUMBERS.iter().any(|numbers| numbers.major == number) {
            true => Ok(Self(number)),
            false => Err(VersionError::NotSupported(number.to_string())),
        }
    }
}

impl From<Major> for u32 {
    fn from(major: Major) -> Self {
        major.0
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a program of PostgreSQL says about itself with `--version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramVersion {
    /// The major version as a plain number: it may be one that is not supported.
    pub major: u32,
    /// The version as printed: `15.18`, `19beta1`.
    pub version: String,
}

impl ProgramVersion {
    /// Reads a line such as `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
    ///
    /// # Errors
    /// [`VersionError::NotAProgramVersion`] for anything else.
    pub fn parse(line: &str) -> Result<Self, VersionError> {
        let parse = || {
            let (_, rest) = line.split_once("(PostgreSQL) ")?;
            let version = rest.split_whitespace().next()?;
            let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
            Some(Self { major: version[..digits].parse().ok()?, version: version.into() })
        };
        parse()
            .ok_or_else(|| VersionError::NotAProgramVersion(line.trim().chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_version_files() {
        let cases: [(_, _, Result<u32, VersionError>); 6] = [
            ("a usual one", "15\n", Ok(15)),
            ("without a line end", "18", Ok(18)),
            ("too old, with a dot", "9.6\n", Err(VersionError::NotSupported("9.6".into()))),
            ("too new", "99\n", Err(VersionError::NotSupported("99".into()))),
            ("empty", "", Err(VersionError::NotAVersionFile("".into()))),
            ("text", "not a version", Err(VersionError::NotAVersionFile("not a version".into()))),
        ];
        for (name, text, want) in cases {
            assert_eq!(Major::from_version_file(text).map(Major::number), want, "{name}");
        }
    }

    #[test]
    fn reads_program_versions() {
        let cases = [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some((15, "15.18"))),
            ("pg_dump (PostgreSQL) 17.2", Some((17, "17.2"))),
            ("postgres (PostgreSQL) 19beta1", Some((19, "19beta1"))),
            ("postgres (PostgreSQL) ", None),
            ("postgres (PostgreSQL) devel", None),
            ("GNU bash, version 5.2", None),
        ];
        for (line, want) in cases {
            let got = ProgramVersion::parse(line).ok();
            assert_eq!(
                got.as_ref().map(|found| (found.major, found.version.as_str())),
                want,
                "{line}"
            );
        }
    }

    #[test]
    fn every_major_is_found_by_its_catalog_version() {
        for major in Major::all() {
            assert_eq!(Major::from_catalog_version(major.catalog_version()), Some(major));
            assert!(major.package_hint().contains(&format!("postgresql-{major}")));
        }
        assert_eq!(Major::from_catalog_version(1), None);
        assert_eq!(
            (Major::all().next(), Major::all().last()),
            (Some(Major::OLDEST), Some(Major::NEWEST))
        );
    }
}
