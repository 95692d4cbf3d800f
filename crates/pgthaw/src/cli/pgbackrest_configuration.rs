//! Where pgBackRest keeps its repositories, from its own configuration: for `pgthaw backups` without REPO.
//!
//! Only the options that say where a repository lies are looked at; secrets in the file are passed over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::wire::ApiError;

/// pgBackRest's own places for its configuration, the one it prefers first (its manual, option `config`).
const FILES: [&str; 2] = ["/etc/pgbackrest/pgbackrest.conf", "/etc/pgbackrest.conf"];
/// `repo1-path` where the configuration says nothing (pgBackRest's manual, option `repo-path`).
const DEFAULT_PATH: &str = "/var/lib/pgbackrest";

/// A repository that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfiguredRepository {
    /// Its directory.
    pub path: PathBuf,
    /// The stanza, where the configuration has any.
    pub stanza: Option<String>,
}

/// What a configuration says about repositories.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Configured {
    /// Those on this machine.
    pub here: Vec<ConfiguredRepository>,
    /// Those that are elsewhere, with why, such as `repo2 is on host backup1`.
    pub elsewhere: Vec<String>,
}

/// Reads pgBackRest's configuration on this machine; returns the file with what it says.
///
/// # Errors
/// When there is none, or it cannot be read.
pub fn read() -> Result<(PathBuf, Configured), ApiError> {
    for file in FILES {
        match std::fs::read(file) {
            Ok(bytes) => return Ok((file.into(), repositories(&String::from_utf8_lossy(&bytes)))),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
            Err(err) => {
                return Err(ApiError {
                    message: format!("pgBackRest's configuration `{file}`: {err}"),
                    hint: Some("run this as an account that may read it, or name a repository: `pgthaw backups REPO`".into()),
                    usage: false,
                });
            }
        }
    }
    Err(ApiError {
        message: format!("no repository is named, and this machine has no configuration of pgBackRest ({})", FILES.join(", ")),
        hint: Some("name a pgBackRest repository or a directory made by pg_basebackup: `pgthaw backups REPO`".into()),
        usage: true,
    })
}

/// Returns the repositories of a configuration, by path and stanza.
fn repositories(text: &str) -> Configured {
    let sections = sections(text);
    let empty = BTreeMap::new();
    let global = sections.get("global").unwrap_or(&empty);
    let stanzas: Vec<(Option<&str>, &BTreeMap<String, String>)> = sections
        .iter()
        .filter(|(name, _)| !name.is_empty() && *name != "global" && !name.contains(':'))
        .map(|(name, options)| (Some(name.as_str()), options))
        .collect();
    let stanzas = if stanzas.is_empty() { vec![(None, &empty)] } else { stanzas };
    let mut configured = Configured::default();
    for (stanza, options) in stanzas {
        let option =
            |name: &str| options.get(name).or_else(|| global.get(name)).map(String::as_str);
        for number in repository_numbers(&[global, options]) {
            let key = |name: &str| option(&format!("repo{number}-{name}"));
            let elsewhere = match (key("host"), key("type").unwrap_or("posix")) {
                (Some(host), _) => Some(format!("repo{number} is on host {host}")),
                (None, "posix" | "cifs") => None,
                (None, kind) => Some(format!("repo{number} is of type {kind}")),
            };
            if let Some(elsewhere) = elsewhere {
                configured.elsewhere.push(elsewhere);
                continue;
            }
            let path = key("path").unwrap_or(DEFAULT_PATH).into();
            configured.here.push(ConfiguredRepository { path, stanza: stanza.map(str::to_owned) });
        }
    }
    configured.here.sort();
    configured.here.dedup();
    configured.elsewhere.sort();
    configured.elsewhere.dedup();
    configured
}

/// Returns the numbers of the repositories that are configured; repo1 always is.
fn repository_numbers(sections: &[&BTreeMap<String, String>]) -> Vec<u32> {
    let number = |key: &String| key.strip_prefix("repo")?.split_once('-')?.0.parse().ok();
    let mut numbers: Vec<u32> =
        sections.iter().flat_map(|options| options.keys().filter_map(number)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    if numbers.is_empty() { vec![1] } else { numbers }
}

/// Cuts `[section]` and `key=value` lines apart; `#` begins a comment line.
fn sections(text: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut sections: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            current = name.trim().to_owned();
            sections.entry(current.clone()).or_default();
        } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            let options = sections.entry(current.clone()).or_default();
            options.insert(key.trim().to_owned(), value.trim().to_owned());
        }
    }
    sections
}

/// Says which repositories of a configuration are out of reach.
pub fn elsewhere_line(file: &Path, elsewhere: &[String]) -> Option<String> {
    (!elsewhere.is_empty()).then(|| {
        format!(
            "pgthaw: `{}` also names repositories that are not on this machine's disks: {}",
            file.display(),
            elsewhere.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(text: &str) -> Vec<(String, Option<String>)> {
        let found = repositories(text).here;
        found.into_iter().map(|r| (r.path.display().to_string(), r.stanza)).collect()
    }

    #[test]
    fn repositories_come_from_global_and_stanzas() {
        let text = "\
# a comment with repo9-path=/nowhere
[global]
repo1-path=/backups/one
repo1-cipher-pass=secret=with=signs
repo2-path = /backups/two

[global:archive-push]
compress-level=3

[main]
pg1-path=/var/lib/postgresql/15/main

[other]
repo1-path=/backups/other
";
        let want = [
            ("/backups/one", "main"),
            ("/backups/other", "other"),
            ("/backups/two", "main"),
            ("/backups/two", "other"),
        ];
        assert_eq!(
            here(text),
            want.map(|(path, stanza)| (path.to_owned(), Some(stanza.to_owned())))
        );
    }

    #[test]
    fn pgbackrests_defaults_are_used() {
        assert_eq!(here(""), [(DEFAULT_PATH.to_owned(), None)]);
        assert_eq!(
            here("[main]\npg1-path=/x\n"),
            [(DEFAULT_PATH.to_owned(), Some("main".to_owned()))]
        );
    }

    #[test]
    fn repositories_out_of_reach_are_named() {
        let text =
            "[global]\nrepo1-host=backup1\nrepo2-type=s3\nrepo3-path=/b\n[main]\npg1-path=/x\n";
        let configured = repositories(text);
        assert_eq!(configured.elsewhere, ["repo1 is on host backup1", "repo2 is of type s3"]);
        assert_eq!(
            configured.here,
            [ConfiguredRepository { path: "/b".into(), stanza: Some("main".into()) }]
        );
        let line =
            elsewhere_line(Path::new("/etc/pgbackrest.conf"), &configured.elsewhere).unwrap();
        assert!(line.ends_with("repo1 is on host backup1, repo2 is of type s3"));
    }
}
