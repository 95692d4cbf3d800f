//! Libraries that must be preloaded, or the data cannot be read or the WAL not be replayed.
//!
//! A thawed instance preloads nothing: other people's libraries start workers, contact other machines and
//! delete data by schedule. The exceptions are in [`LIBRARIES`], each with the settings that keep it still;
//! `--preload` adds others by name ([`LibraryName`]). The backup's configuration is never read, so what is
//! needed is decided by what can be seen: a library's directory in the data directory
//! ([`needed_for_directory`]), an extension in a database's catalog ([`needed_for_extension`]), or a
//! resource manager the server asks for when it replays WAL ([`needed_for_resource_manager`]).
//!
//! Not in the table on purpose: Citus. Preloaded, it would contact the worker nodes of the original cluster
//! for the contents of distributed tables.
//!
//! Sources: the extensions' own manuals; resource managers by
//! <https://wiki.postgresql.org/wiki/CustomWALResourceManagers>.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A library that cannot be left out for data that uses it.
#[derive(Debug, PartialEq, Eq)]
pub struct Library {
    /// Its name in `shared_preload_libraries`.
    pub name: &'static str,
    /// What does not work without it, for messages.
    pub why: &'static str,
    /// Its extension in `pg_extension`.
    pub extension: &'static str,
    /// A directory in the data directory that shows it is used.
    pub directory: Option<&'static str>,
    /// The resource manager it registers for its own WAL records (15 and later).
    pub resource_manager: Option<u8>,
    /// Server settings that keep it from doing anything by itself.
    pub settings: &'static [(&'static str, &'static str)],
}

/// The libraries known to be needed. With `max_worker_processes=0` none of them gets a worker.
pub const LIBRARIES: &[Library] = &[
    Library {
        name: "timescaledb",
        why: "its functions and types refuse to load without it, and with them compressed chunks cannot be read",
        extension: "timescaledb",
        directory: None,
        resource_manager: None,
        settings: &[
            ("timescaledb.max_background_workers", "0"),
            ("timescaledb.telemetry_level", "off"),
        ],
    },
    Library {
        name: "orioledb",
        why: "its tables are stored and logged by the library itself (it needs its own build of PostgreSQL: --pg-bin)",
        extension: "orioledb",
        directory: Some("orioledb_data"),
        resource_manager: Some(129),
        settings: &[],
    },
    Library {
        name: "pg_tde",
        why: "its tables are encrypted (it needs Percona's build of PostgreSQL, --pg-bin, and its keys)",
        extension: "pg_tde",
        directory: Some("pg_tde"),
        resource_manager: Some(140),
        settings: &[],
    },
];

/// Returns the library that a directory of this name in the data directory asks for.
pub fn needed_for_directory(directory: &str) -> Option<&'static Library> {
    LIBRARIES.iter().find(|library| library.directory == Some(directory))
}

/// Returns the library that an extension of this name asks for.
pub fn needed_for_extension(extension: &str) -> Option<&'static Library> {
    LIBRARIES.iter().find(|library| library.extension == extension)
}

/// Returns the library that registers this resource manager ("resource manager with ID 129 not registered").
pub fn needed_for_resource_manager(number: u8) -> Option<&'static Library> {
    LIBRARIES.iter().find(|library| library.resource_manager == Some(number))
}

/// Returns the settings to start a server with that preloads these libraries, each library once, in their order.
pub fn settings(libraries: &[LibraryName]) -> Vec<(String, String)> {
    let mut names: Vec<&str> = Vec::new();
    for library in libraries {
        if !names.contains(&library.as_str()) {
            names.push(library.as_str());
        }
    }
    let known =
        names.iter().filter_map(|name| LIBRARIES.iter().find(|library| library.name == *name));
    let harmless = known
        .flat_map(|library| library.settings)
        .map(|(name, value)| (name.to_string(), value.to_string()));
    std::iter::once(("shared_preload_libraries".to_string(), names.join(",")))
        .chain(harmless)
        .collect()
}

/// The plain name of a library in PostgreSQL's own library directory: no path, no list, nothing to quote.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LibraryName(String);

/// A text that is no [`LibraryName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no plain library name: letters, digits, _ and - only, as in --preload timescaledb"
)]
pub struct BadLibraryName(String);

impl LibraryName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LibraryName {
    type Err = BadLibraryName;

    fn from_str(text: &str) -> Result<Self, BadLibraryName> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        let good = text.len() <= 63
            && text.bytes().all(plain)
            && !text.starts_with('-')
            && !text.is_empty();
        if good {
            Ok(Self(text.into()))
        } else {
            Err(BadLibraryName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for LibraryName {
    type Error = BadLibraryName;

    fn try_from(text: String) -> Result<Self, BadLibraryName> {
        text.parse()
    }
}

impl From<LibraryName> for String {
    fn from(name: LibraryName) -> Self {
        name.0
    }
}

impl fmt::Display for LibraryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> LibraryName {
        text.parse().unwrap()
    }

    #[test]
    fn takes_plain_names_only() {
        for good in ["timescaledb", "pg_stat_statements", "timescaledb-tsl-2", "a"] {
            assert!(good.parse::<LibraryName>().is_ok(), "{good}");
        }
        let long = "x".repeat(64);
        for bad in [
            "",
            "/tmp/evil",
            "../evil",
            "$libdir/x",
            "a,b",
            "a b",
            "a'b",
            "a\"b",
            "-c",
            "a\0",
            "ä",
            "a.so",
            &long,
        ] {
            assert!(bad.parse::<LibraryName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_library_of_the_table_is_found_by_what_shows_it() {
        for library in LIBRARIES {
            assert_eq!(needed_for_extension(library.extension), Some(library));
            assert!(
                library
                    .directory
                    .is_none_or(|directory| needed_for_directory(directory) == Some(library))
            );
            assert!(
                library
                    .resource_manager
                    .is_none_or(|number| needed_for_resource_manager(number) == Some(library))
            );
            assert!(library.name.parse::<LibraryName>().is_ok());
        }
        assert_eq!(needed_for_extension("citus"), None);
        assert_eq!(needed_for_directory("base"), None);
        assert_eq!(needed_for_resource_manager(128), None);
    }

    #[test]
    fn makes_settings() {
        let settings =
            |names: &[&str]| settings(&names.iter().map(|text| name(text)).collect::<Vec<_>>());
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(settings(&[]), [pair("shared_preload_libraries", "")]);
        let want = [
            pair("shared_preload_libraries", "own,timescaledb"),
            pair("timescaledb.max_background_workers", "0"),
            pair("timescaledb.telemetry_level", "off"),
        ];
        assert_eq!(settings(&["own", "timescaledb", "own"]), want);
    }
}
