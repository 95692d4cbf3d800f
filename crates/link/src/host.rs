//! Names of machines and of directories on them, as `ssh` and `scp` take them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Another machine, as `ssh` takes it: `host`, `user@host`, `ssh://user@host:port`, or an alias of `~/.ssh/config`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Host {
    /// What `ssh` gets as destination: `host` or `user@host`.
    destination: String,
    /// The port, where one was given.
    port: Option<u16>,
}

/// A text that names no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no host; it is written as host, user@host or ssh://user@host:port")]
pub struct BadHost(pub String);

impl Host {
    /// The destination for `ssh`'s command line; never begins with `-`.
    pub fn destination(&self) -> &str {
        &self.destination
    }

    /// The port for `ssh -p`, where one was given.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    fn new(destination: &str, port: Option<u16>) -> Option<Self> {
        let (user, host) = destination.rsplit_once('@').map_or(("", destination), |(u, h)| (u, h));
        let plain = |text: &str| {
            !text.starts_with('-')
                && text.chars().all(|c| c.is_alphanumeric() || "._-:%[]\\".contains(c))
        };
        let fine = !host.is_empty() && plain(host) && plain(user) && !destination.starts_with('@');
        fine.then(|| Self { destination: destination.into(), port })
    }
}

impl FromStr for Host {
    type Err = BadHost;

    fn from_str(text: &str) -> Result<Self, BadHost> {
        let bad = || BadHost(text.into());
        let Some(url) = text.strip_prefix("ssh://") else {
            return Self::new(text, None).filter(|_| !text.contains(':')).ok_or_else(bad);
        };
        let url = url.strip_suffix('/').unwrap_or(url);
        // An IPv6 address stands in brackets, so its colons are no port.
        let (destination, port) = match url.rsplit_once(':') {
            Some((before, port)) if !port.ends_with(']') => {
                (before, Some(port.parse().map_err(|_| bad())?))
            }
            _ => (url, None),
        };
        let destination = destination.replace(['[', ']'], "");
        Self::new(&destination, port).ok_or_else(bad)
    }
}

impl TryFrom<String> for Host {
    type Error = BadHost;

    fn try_from(text: String) -> Result<Self, BadHost> {
        text.parse()
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.to_string()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            None => f.write_str(&self.destination),
            Some(port) => {
                let (user, host) = match self.destination.rsplit_once('@') {
                    Some((user, host)) => (format!("{user}@"), host),
                    None => (String::new(), self.destination.as_str()),
                };
                let host = if host.contains(':') { format!("[{host}]") } else { host.into() };
                write!(f, "ssh://{user}{host}:{port}")
            }
        }
    }
}

/// A directory on this or another machine, as `--to` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The machine; none for this one.
    pub host: Option<Host>,
    /// The directory, as it was written; on another machine a relative one begins at the account's home directory.
    pub path: PathBuf,
}

impl FromStr for Place {
    type Err = BadHost;

    /// `DIR`, `host:DIR`, `user@host:DIR` or `ssh://user@host:port/DIR`; a colon after the first `/` belongs to a local path.
    fn from_str(text: &str) -> Result<Self, BadHost> {
        if let Some(url) = text.strip_prefix("ssh://") {
            let (authority, path) = url.split_once('/').ok_or_else(|| BadHost(text.into()))?;
            let host = format!("ssh://{authority}").parse()?;
            return Ok(Self { host: Some(host), path: format!("/{path}").into() });
        }
        let slash = text.find('/').unwrap_or(text.len());
        match text.find(':').filter(|colon| *colon < slash) {
            Some(colon) if colon > 0 => {
                let host = text[..colon].parse()?;
                let path = Some(&text[colon + 1..]).filter(|path| !path.is_empty());
                Ok(Self { host: Some(host), path: path.unwrap_or(".").into() })
            }
            _ => Ok(Self { host: None, path: text.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_written_as_for_ssh() {
        let cases = [
            ("backup1", Some(("backup1", None))),
            ("dba@db-stage.example.org", Some(("dba@db-stage.example.org", None))),
            ("ssh://db1:2222", Some(("db1", Some(2222)))),
            ("ssh://ops@files", Some(("ops@files", None))),
            ("ssh://ops@[fd00::1]:22", Some(("ops@fd00::1", Some(22)))),
            ("-oProxyCommand=x", None),
            ("a@-oProxyCommand=x", None),
            ("-x@a", None),
            ("", None),
            ("@a", None),
            ("a b", None),
            ("a;b", None),
            ("a:b", None),
            ("ssh://a:b", None),
        ];
        for (text, want) in cases {
            let got = text.parse::<Host>().ok();
            let got = got.as_ref().map(|host| (host.destination(), host.port()));
            assert_eq!(got, want, "{text}");
        }
        for text in ["a", "u@a", "ssh://u@a:5", "ssh://u@[fd00::1]:22"] {
            assert_eq!(text.parse::<Host>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn places_are_written_as_for_scp() {
        let cases = [
            ("/srv/x", None, "/srv/x"),
            ("out", None, "out"),
            ("./a:b", None, "./a:b"),
            ("/a:b", None, "/a:b"),
            (":x", None, ":x"),
            ("files:/srv/x", Some("files"), "/srv/x"),
            ("ops@files:exports", Some("ops@files"), "exports"),
            ("files:", Some("files"), "."),
            ("ssh://ops@files:2222/srv/x", Some("ssh://ops@files:2222"), "/srv/x"),
        ];
        for (text, host, path) in cases {
            let got: Place = text.parse().unwrap();
            let host = host.map(|host| host.parse().unwrap());
            assert_eq!(got, Place { host, path: path.into() }, "{text}");
        }
        assert!("ssh://files".parse::<Place>().is_err());
        assert!("-oX:/srv".parse::<Place>().is_err());
    }
}
