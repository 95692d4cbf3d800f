//! pgthaw's own configuration: names for repositories and hosts, which server is asked, and who may ask a team's server for what.
//!
//! `/etc/pgthaw/config.toml`, then `~/.config/pgthaw/config.toml`, which adds to it and overrules it; or one file alone, with
//! `--config`. All of it is optional. It holds no secret. A commented sample is `docs/config.toml`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pgthaw_link::{Carry, Host};
use pgthaw_session::RepositoryChoice;
use serde::Deserialize;

use crate::rules::Rule;
use crate::wire::ApiError;

/// The configuration of the machine.
const SYSTEM_FILE: &str = "/etc/pgthaw/config.toml";

/// Which server commands ask.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub enum ServerName {
    /// One on another machine.
    Ssh(Host),
    /// One that listens on this socket.
    Socket(PathBuf),
}

impl FromStr for ServerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("ssh://") {
            return text
                .parse()
                .map(Self::Ssh)
                .map_err(|err: pgthaw_link::BadHost| err.to_string());
        }
        let path = Path::new(text);
        match path.is_absolute() {
            true => Ok(Self::Socket(path.into())),
            false => Err(format!(
                "`{text}` is no server: write ssh://[USER@]HOST[:PORT], or the whole path of its socket"
            )),
        }
    }
}

impl TryFrom<String> for ServerName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ssh(host) if host.port().is_some() => write!(f, "{host}"),
            Self::Ssh(host) => write!(f, "ssh://{host}"),
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A repository that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NamedRepository {
    /// Its directory; only where another server knows it there is none.
    pub path: Option<PathBuf>,
    /// The format, where it is not to be detected.
    pub kind: Option<String>,
    /// pgBackRest's stanza.
    pub stanza: Option<String>,
    /// More directories with archived WAL.
    #[serde(default)]
    pub wal_archives: Vec<PathBuf>,
    /// The mount server beside it, which is asked then.
    pub server: Option<ServerName>,
}

/// A host that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NamedHost {
    /// What `ssh` gets.
    pub ssh: Host,
    /// Where relative target directories begin.
    pub directory: Option<PathBuf>,
}

/// How `pgthaw serve` runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ServiceSettings {
    /// The socket for everybody whom a rule allows something.
    pub socket: Option<PathBuf>,
    /// The Unix group whose members may do everything.
    pub group: Option<String>,
}

/// How the program gets to another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentSetting {
    /// It is carried over where the same build is not installed.
    Carried,
    /// It must be installed.
    Installed,
}

/// Everything that is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// Which server is asked; without it the account's own.
    pub server: Option<ServerName>,
    /// How the program gets to another machine.
    pub agent: Option<AgentSetting>,
    /// Repositories by name.
    #[serde(default)]
    pub repositories: BTreeMap<String, NamedRepository>,
    /// Staging servers and targets by name.
    #[serde(default)]
    pub hosts: BTreeMap<String, NamedHost>,
    /// How `pgthaw serve` runs.
    #[serde(default)]
    pub service: ServiceSettings,
    /// Who may ask `pgthaw serve` for what, besides root and the service's group.
    #[serde(default)]
    pub allow: Vec<Rule>,
}

impl Configuration {
    /// Reads what is configured: `file` alone, or the machine's file and the account's.
    ///
    /// # Errors
    /// When a file cannot be read or says something that means nothing.
    pub fn read(file: Option<&Path>) -> Result<Self, ApiError> {
        if let Some(file) = file {
            return Ok(read_file(file, true)?.unwrap_or_default());
        }
        let mut all = read_file(Path::new(SYSTEM_FILE), false)?.unwrap_or_default();
        if let Some(file) = file_of_account()
            && let Some(own) = read_file(&file, false)?
        {
            all.add(own);
        }
        Ok(all)
    }

    /// Adds what `own` says; where both say something, it counts.
    fn add(&mut self, own: Self) {
        self.server = own.server.or(self.server.take());
        self.agent = own.agent.or(self.agent);
        self.repositories.extend(own.repositories);
        self.hosts.extend(own.hosts);
        let ServiceSettings { socket, group } = own.service;
        self.service.socket = socket.or(self.service.socket.take());
        self.service.group = group.or(self.service.group.take());
        self.allow.extend(own.allow);
    }

    /// Whether the program may be carried over to other machines.
    pub fn carry(&self) -> Carry {
        match self.agent {
            Some(AgentSetting::Installed) => Carry::Never,
            Some(AgentSetting::Carried) | None => Carry::IfMissing,
        }
    }
}

/// Fills in what the configuration says of a repository that was asked for by name; what was asked for besides counts more.
///
/// # Errors
/// When the name is unknown here.
pub fn resolve_name(
    choice: RepositoryChoice,
    configuration: &Configuration,
) -> Result<RepositoryChoice, ApiError> {
    let Some(name) = choice.name.as_ref().filter(|_| choice.path.as_os_str().is_empty()) else {
        return Ok(choice);
    };
    let known = configuration.repositories.get(name);
    let Some((known, path)) = known.and_then(|known| Some((known, known.path.clone()?))) else {
        let names = configuration.repositories.keys();
        let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
        return Err(ApiError {
            message: format!("there is no repository called `{name}`"),
            hint: Some(match names[..] {
                [] => "the server's configuration names no repositories".into(),
                _ => format!("there is {}", names.join(", ")),
            }),
            usage: true,
        });
    };
    let archives = known.wal_archives.iter().cloned().chain(choice.wal_archives).collect();
    Ok(RepositoryChoice {
        path,
        kind: choice.kind.or_else(|| known.kind.clone()),
        stanza: choice.stanza.or_else(|| known.stanza.clone()),
        wal_archives: archives,
        ..choice
    })
}

/// The configuration of this account: `$XDG_CONFIG_HOME/pgthaw/config.toml` or `~/.config/pgthaw/config.toml`.
fn file_of_account() -> Option<PathBuf> {
    let directory = |name| {
        std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute())
    };
    let home = directory("XDG_CONFIG_HOME").or_else(|| Some(directory("HOME")?.join(".config")))?;
    Some(home.join("pgthaw/config.toml"))
}

fn read_file(file: &Path, needed: bool) -> Result<Option<Configuration>, ApiError> {
    let failed = |why: String| ApiError {
        message: format!("configuration `{}`: {why}", file.display()),
        hint: None,
        usage: true,
    };
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound && !needed => return Ok(None),
        Err(err) => return Err(failed(err.to_string())),
    };
    let read: Configuration =
        toml::from_str(&text).map_err(|err| failed(format!("\n{}", err.to_string().trim_end())))?;
    for (name, repository) in &read.repositories {
        match (&repository.path, &repository.server) {
            (None, None) => {
                return Err(failed(format!("repository `{name}` has neither path nor server")));
            }
            (Some(path), _) if path.is_relative() => {
                return Err(failed(format!("repository `{name}`: path is not a whole path")));
            }
            _ => {}
        }
    }
    for rule in &read.allow {
        rule.refuse_nonsense().map_err(failed)?;
    }
    Ok(Some(read))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Configuration, ApiError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        Configuration::read(Some(&file))
    }

    #[test]
    fn the_sample_can_be_read() {
        let sample = include_str!("../../../docs/config.toml");
        let read = read(sample).unwrap();
        assert_eq!(read, Configuration::default(), "all of it is commented out");
        let uncommented: String = sample
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' '))
            .map(|line| format!("{line}\n"))
            .collect();
        let read = self::read(&uncommented).unwrap();
        assert!(read.server.is_some() && read.agent.is_some());
        assert!(!read.repositories.is_empty() && !read.hosts.is_empty() && !read.allow.is_empty());
    }

    #[test]
    fn the_accounts_file_counts_more() {
        let mut all = read(
            "server = '/run/a.sock'\n[repositories.prod]\npath = '/a'\n[repositories.old]\npath = '/old'\n",
        )
        .unwrap();
        all.add(
            read("server = 'ssh://b'\nagent = 'installed'\n[repositories.prod]\npath = '/b'\n")
                .unwrap(),
        );
        assert_eq!(all.server.as_ref().unwrap().to_string(), "ssh://b");
        assert_eq!(all.carry(), Carry::Never);
        assert_eq!(all.repositories["prod"].path.as_deref(), Some(Path::new("/b")));
        assert_eq!(all.repositories["old"].path.as_deref(), Some(Path::new("/old")));
    }

    #[test]
    fn what_means_nothing_is_refused_with_its_place() {
        let cases = [
            ("servr = 'ssh://b'\n", "servr"),
            ("server = 'backup1'\n", "ssh://"),
            ("[repositories.prod]\nstanza = 'main'\n", "neither path nor server"),
            ("[repositories.prod]\npath = 'here'\n", "not a whole path"),
            ("[hosts.db]\nssh = '-oProxyCommand=x'\n", "no host"),
            ("agent = 'maybe'\n", "agent"),
            ("[[allow]]\nrepositories = ['*']\n", "group"),
        ];
        for (text, want) in cases {
            let error = read(text).unwrap_err();
            assert!(error.usage && error.message.contains(want), "{text}: {error:?}");
            assert!(error.message.contains("config.toml"), "{error:?}");
        }
        let missing = Configuration::read(Some(Path::new("/no/such/file"))).unwrap_err();
        assert!(missing.message.contains("/no/such/file"));
    }

    #[test]
    fn servers_are_written_as_they_are_read() {
        for text in ["ssh://backup1", "ssh://me@backup1:2222", "/run/pgthaw/server.sock"] {
            assert_eq!(text.parse::<ServerName>().unwrap().to_string(), text);
        }
    }
}
