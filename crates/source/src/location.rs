//! Where a repository lies and what the user said about it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The tools whose repositories are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A pgBackRest repository (the directory that its `repo1-path` names).
    PgBackRest,
    /// A directory made by `pg_basebackup -Fp`, or a directory that holds several of them.
    BaseBackup,
}

impl Kind {
    /// Every kind, with the word that stands before the path in `KIND:PATH`.
    pub const ALL: [(Self, &'static str); 2] =
        [(Self::PgBackRest, "pgbackrest"), (Self::BaseBackup, "basebackup")];
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::PgBackRest => "pgbackrest",
            Self::BaseBackup => "basebackup",
        })
    }
}

/// A repository as the user named it, with the options that belong to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// The repository's directory.
    pub path: PathBuf,
    /// Its kind; `None`: look and see.
    pub kind: Option<Kind>,
    /// `--stanza`, for pgBackRest; needed when there are several.
    pub stanza: Option<String>,
    /// `--wal-archive`, for a base backup: directories with archived segments.
    pub wal_archives: Vec<PathBuf>,
    /// `--backup-label`, for a base backup: a file that stands in for the missing `backup_label`.
    pub backup_label: Option<PathBuf>,
    /// `--atomic-snapshot`, for a base backup: data directory, WAL and tablespaces were captured at one instant.
    pub atomic_snapshot: bool,
    /// `--tablespace`, for a base backup: which directory is its copy of a tablespace, by the tablespace's OID; none where it holds
    /// nothing of it, because the tablespace was made while the backup ran and its WAL makes it again.
    #[serde(default)]
    pub tablespaces: BTreeMap<u32, Option<PathBuf>>,
}

/// The text names no path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` names no directory")]
pub struct BadLocation(pub String);

impl FromStr for Location {
    type Err = BadLocation;

    /// Reads `KIND:PATH` or a plain path. A word that is no kind belongs to the path: `./backup:monday` and
    /// `/srv/a:b` are paths, and so is `backup:monday`.
    fn from_str(text: &str) -> Result<Self, BadLocation> {
        let named = Kind::ALL.into_iter().find_map(|(kind, word)| {
            let path = text.strip_prefix(word)?.strip_prefix(':')?;
            Some((Some(kind), path))
        });
        let (kind, path) = named.unwrap_or((None, text));
        if path.is_empty() || path.contains('\0') {
            return Err(BadLocation(text.into()));
        }
        Ok(Self { path: path.into(), kind, ..Self::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_kind_and_path() {
        let cases = [
            (
                "a kind",
                "pgbackrest:/var/lib/pgbackrest",
                Some((Some(Kind::PgBackRest), "/var/lib/pgbackrest")),
            ),
            ("the other kind", "basebackup:rel/dir", Some((Some(Kind::BaseBackup), "rel/dir"))),
            ("a plain path", "/backups/prod", Some((None, "/backups/prod"))),
            ("a colon later belongs to the path", "/srv/a:b", Some((None, "/srv/a:b"))),
            ("an unknown word belongs to the path", "monday:x", Some((None, "monday:x"))),
            ("a kind's name alone is a path", "pgbackrest", Some((None, "pgbackrest"))),
            ("a kind without a path", "pgbackrest:", None),
            ("nothing", "", None),
        ];
        for (name, text, want) in cases {
            let got = text.parse::<Location>().ok().map(|location| (location.kind, location.path));
            assert_eq!(got, want.map(|(kind, path)| (kind, path.into())), "{name}");
        }
    }
}
