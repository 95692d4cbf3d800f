//! A [`MoveError`] on its way to the other machine: its class, paths and the system's error number stay what they are.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::MoveError;

/// A [`MoveError`] that can be sent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum WireError {
    Source {
        action: String,
        path: WirePath,
        source: WireIo,
    },
    SourceChanged {
        path: WirePath,
    },
    Target {
        action: String,
        path: WirePath,
        source: WireIo,
    },
    NoSpace {
        dir: WirePath,
        path: WirePath,
        free: u64,
        quota: bool,
    },
    NotPermitted {
        action: String,
        path: WirePath,
        source: WireIo,
    },
    ReadOnly {
        action: String,
        path: WirePath,
    },
    Differs {
        path: WirePath,
    },
    ArrivedChanged {
        path: WirePath,
    },
    Exists {
        path: WirePath,
    },
    Missing {
        path: WirePath,
    },
    InUse {
        dir: WirePath,
    },
    BadListing {
        path: WirePath,
        line: u64,
        reason: String,
    },
    Foreign {
        path: WirePath,
    },
    Distrusted {
        path: WirePath,
        why: String,
    },
    Stopped {
        path: WirePath,
    },
    /// In words only.
    Other(String),
}

/// A path, which need not be UTF-8.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WirePath(Vec<u8>);

/// A system error: its number where it has one, and its words.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireIo {
    number: Option<i32>,
    text: String,
}

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        Self(path.as_os_str().as_bytes().to_vec())
    }
}

impl From<WirePath> for PathBuf {
    fn from(path: WirePath) -> Self {
        OsString::from_vec(path.0).into()
    }
}

impl From<&io::Error> for WireIo {
    fn from(err: &io::Error) -> Self {
        Self { number: err.raw_os_error(), text: err.to_string() }
    }
}

impl From<WireIo> for io::Error {
    fn from(err: WireIo) -> Self {
        match err.number {
            Some(number) => Self::from_raw_os_error(number),
            None => Self::other(err.text),
        }
    }
}

impl From<&MoveError> for WireError {
    fn from(err: &MoveError) -> Self {
        let path = |path: &PathBuf| WirePath::from(path.as_path());
        let verb = |action: &Cow<'static, str>| action.clone().into_owned();
        match err {
            MoveError::Source { action, path: at, source } => {
                Self::Source { action: verb(action), path: path(at), source: source.into() }
            }
            MoveError::SourceChanged { path: at } => Self::SourceChanged { path: path(at) },
            MoveError::Target { action, path: at, source } => {
                Self::Target { action: verb(action), path: path(at), source: source.into() }
            }
            MoveError::NoSpace { dir, path: at, free, quota } => {
                Self::NoSpace { dir: path(dir), path: path(at), free: *free, quota: *quota }
            }
            MoveError::NotPermitted { action, path: at, source } => {
                Self::NotPermitted { action: verb(action), path: path(at), source: source.into() }
            }
            MoveError::ReadOnly { action, path: at } => {
                Self::ReadOnly { action: verb(action), path: path(at) }
            }
            MoveError::Differs { path: at } => Self::Differs { path: path(at) },
            MoveError::ArrivedChanged { path: at } => Self::ArrivedChanged { path: path(at) },
            MoveError::Exists { path: at } => Self::Exists { path: path(at) },
            MoveError::Missing { path: at } => Self::Missing { path: path(at) },
            MoveError::InUse { dir } => Self::InUse { dir: path(dir) },
            MoveError::BadListing { path: at, line, reason } => Self::BadListing {
                path: path(at),
                line: u64::try_from(*line).unwrap_or(u64::MAX),
                reason: reason.clone().into_owned(),
            },
            MoveError::Foreign { path: at } => Self::Foreign { path: path(at) },
            MoveError::Distrusted { path: at, why } => {
                Self::Distrusted { path: path(at), why: why.clone() }
            }
            MoveError::Stopped { path: at } => Self::Stopped { path: path(at) },
            MoveError::Refused { reason } => Self::Other(reason.clone()),
            MoveError::Unreachable { .. } | MoveError::Aborted => Self::Other(err.to_string()),
        }
    }
}

impl From<WireError> for MoveError {
    fn from(err: WireError) -> Self {
        match err {
            WireError::Source { action, path, source } => {
                Self::Source { action: action.into(), path: path.into(), source: source.into() }
            }
            WireError::SourceChanged { path } => Self::SourceChanged { path: path.into() },
            WireError::Target { action, path, source } => {
                Self::Target { action: action.into(), path: path.into(), source: source.into() }
            }
            WireError::NoSpace { dir, path, free, quota } => {
                Self::NoSpace { dir: dir.into(), path: path.into(), free, quota }
            }
            WireError::NotPermitted { action, path, source } => Self::NotPermitted {
                action: action.into(),
                path: path.into(),
                source: source.into(),
            },
            WireError::ReadOnly { action, path } => {
                Self::ReadOnly { action: action.into(), path: path.into() }
            }
            WireError::Differs { path } => Self::Differs { path: path.into() },
            WireError::ArrivedChanged { path } => Self::ArrivedChanged { path: path.into() },
            WireError::Exists { path } => Self::Exists { path: path.into() },
            WireError::Missing { path } => Self::Missing { path: path.into() },
            WireError::InUse { dir } => Self::InUse { dir: dir.into() },
            WireError::BadListing { path, line, reason } => Self::BadListing {
                path: path.into(),
                line: usize::try_from(line).unwrap_or(usize::MAX),
                reason: reason.into(),
            },
            WireError::Foreign { path } => Self::Foreign { path: path.into() },
            WireError::Distrusted { path, why } => Self::Distrusted { path: path.into(), why },
            WireError::Stopped { path } => Self::Stopped { path: path.into() },
            WireError::Other(reason) => Self::Refused { reason },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_arrive_as_they_were() {
        let no_room = io::Error::from_raw_os_error(libc::ENOSPC);
        let dir = tempfile::tempdir().unwrap();
        let other = || io::Error::other("no number");
        let name = PathBuf::from(OsString::from_vec(b"not \xff UTF-8".to_vec()));
        let errors = [
            MoveError::target("write", dir.path(), &dir.path().join("f"), no_room),
            MoveError::target("write", dir.path(), &name, io::Error::from_raw_os_error(libc::EIO)),
            MoveError::target("open", dir.path(), &name, io::Error::from_raw_os_error(libc::EPERM)),
            MoveError::target("open", dir.path(), &name, io::Error::from_raw_os_error(libc::EROFS)),
            MoveError::source("read", &name, other()),
            MoveError::SourceChanged { path: name.clone() },
            MoveError::Differs { path: name.clone() },
            MoveError::ArrivedChanged { path: name.clone() },
            MoveError::Exists { path: name.clone() },
            MoveError::Missing { path: name.clone() },
            MoveError::InUse { dir: name.clone() },
            MoveError::BadListing { path: name.clone(), line: 3, reason: "bad".into() },
            MoveError::Foreign { path: name.clone() },
            MoveError::Distrusted { path: name.clone(), why: "is not ours".into() },
            MoveError::Stopped { path: name.clone() },
            MoveError::Refused { reason: "so".into() },
        ];
        for error in errors {
            let sent = postcard::to_stdvec(&WireError::from(&error)).unwrap();
            let arrived = MoveError::from(postcard::from_bytes::<WireError>(&sent).unwrap());
            let (mut arrived, mut error) =
                (format!("{arrived:?} {arrived}"), format!("{error:?} {error}"));
            arrived.retain(|char| !char.is_ascii_digit() || char == '3'); // bytes free may have changed
            error.retain(|char| !char.is_ascii_digit() || char == '3');
            assert_eq!(arrived, error);
        }
    }
}
