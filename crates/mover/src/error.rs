//! What can go wrong when files are delivered, told apart by whose fault it is and what helps.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::io::Errno;

/// Why a file, a database or a whole export could not be delivered.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The dump's side failed.
    #[error("{action} `{}`", path.display())]
    Source {
        /// What was tried, as a verb: `read`, `open` …
        action: Cow<'static, str>,
        /// The file of the dump.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the dump grew, shrank or changed while it was copied.
    #[error("`{}` changed while it was copied", path.display())]
    SourceChanged {
        /// The file of the dump.
        path: PathBuf,
    },
    /// The target's side failed in a way without a kind of its own.
    #[error("{action} `{}`", path.display())]
    Target {
        /// What was tried, as a verb: `write`, `rename` …
        action: Cow<'static, str>,
        /// The object in the target directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The target's file system is full, or a quota is used up.
    #[error("{} at `{}`: {free} bytes free while `{}` was written", if *quota { "quota used up" } else { "no room" }, dir.display(), path.display())]
    NoSpace {
        /// The directory that was written to.
        dir: PathBuf,
        /// The file that did not fit.
        path: PathBuf,
        /// Bytes free there for unprivileged users, when it happened.
        free: u64,
        /// Whether a quota and not the file system was the limit.
        quota: bool,
    },
    /// The account that runs us may not do this at the target.
    #[error("not permitted to {action} `{}`", path.display())]
    NotPermitted {
        /// What was tried, as a verb.
        action: Cow<'static, str>,
        /// The object in the target directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The target lies on a file system that is mounted read-only.
    #[error("cannot {action} `{}`: its file system is mounted read-only", path.display())]
    ReadOnly {
        /// What was tried, as a verb.
        action: Cow<'static, str>,
        /// The object in the target directory.
        path: PathBuf,
    },
    /// What the target's disk gave back is not what was written.
    #[error("`{}` reads back differently from what was written", path.display())]
    Differs {
        /// The delivered file.
        path: PathBuf,
    },
    /// What arrived at the target is not what left the source, although every chunk's checksum fits.
    #[error("`{}` has another SHA-256 at the target than at its source", path.display())]
    ArrivedChanged {
        /// The file in the target's staging directory.
        path: PathBuf,
    },
    /// Something that is not ours stands where a delivered object belongs.
    #[error("`{}` exists", path.display())]
    Exists {
        /// The object in the way.
        path: PathBuf,
    },
    /// A delivered database lacks a file that belongs to it.
    #[error("`{}` is missing in the delivered database", path.display())]
    Missing {
        /// The missing file.
        path: PathBuf,
    },
    /// Another session holds this target directory.
    #[error("`{}` is in use by another session", dir.display())]
    InUse {
        /// The target directory.
        dir: PathBuf,
    },
    /// A `SHA256SUMS` is not what we write.
    #[error("`{}`, line {line}: {reason}", path.display())]
    BadListing {
        /// The listing.
        path: PathBuf,
        /// Its line, from 1; 0 for the listing as a whole.
        line: usize,
        /// What is wrong with it.
        reason: Cow<'static, str>,
    },
    /// An earlier export cannot be replaced because something else lies in its directories.
    #[error("`{}` does not belong to the earlier export", path.display())]
    Foreign {
        /// The first such object.
        path: PathBuf,
    },
    /// Somebody else could exchange what is delivered.
    #[error("`{}` {why}, who could exchange what is delivered below it", path.display())]
    Distrusted {
        /// The directory, at or above the target.
        path: PathBuf,
        /// Whose it is, or who may write there.
        why: String,
    },
    /// The caller asked to stop; the partial file is gone.
    #[error("stopped while `{}` was copied", path.display())]
    Stopped {
        /// The file that was being written.
        path: PathBuf,
    },
    /// There was no connection to the target's machine for longer than the stall limit.
    #[error("the target could not be reached since {since}: {reason}")]
    Unreachable {
        /// When the last connection ended, or was first waited for.
        since: Timestamp,
        /// Why the last connection ended.
        reason: String,
    },
    /// The caller ended everything at once.
    #[error("delivery to the target was ended")]
    Aborted,
    /// The other mover could not do what was asked, or asked for what makes no sense.
    #[error("the mover at the target refused: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
}

impl MoveError {
    /// Returns what the operator can do about it, where there is something; printed as `hint: …`.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoSpace { quota: false, .. } => "make room there and retry",
            Self::NoSpace { quota: true, .. } => {
                "raise the quota or remove files of this account, then retry"
            }
            Self::NotPermitted { .. } => "name a directory that this account may write, with --to",
            Self::Distrusted { .. } => crate::trust::REMEDY,
            Self::ReadOnly { .. } => "remount it read-write, or name another directory with --to",
            Self::Differs { .. } => {
                "the target's disk or memory is faulty: check the kernel's log before a retry"
            }
            Self::ArrivedChanged { .. } => {
                "the memory of one of the two machines is faulty, or the file changed: check the kernel's log before a retry"
            }
            Self::Unreachable { .. } => {
                "see whether the target's machine is up and reachable, then retry"
            }
            Self::Exists { .. } => {
                "name a new or empty directory with --to, or move the object away"
            }
            Self::InUse { .. } => {
                "wait for the other session or cancel it: pgthaw sessions shows it"
            }
            Self::Foreign { .. } => {
                "move it away; --replace removes only files that the earlier export lists"
            }
            Self::BadListing { .. } => {
                "remove the damaged export by hand, or name another directory with --to"
            }
            Self::SourceChanged { .. } | Self::Missing { .. } => {
                "retry: the database is dumped again"
            }
            Self::Source { .. }
            | Self::Target { .. }
            | Self::Stopped { .. }
            | Self::Aborted
            | Self::Refused { .. } => return None,
        })
    }

    /// Returns whether the failure is the target's, so that another try with the same dump can succeed.
    pub fn is_target(&self) -> bool {
        !matches!(
            self,
            Self::Source { .. } | Self::SourceChanged { .. } | Self::Stopped { .. } | Self::Aborted
        )
    }

    pub(crate) fn source(action: &'static str, path: &Path, err: impl Into<io::Error>) -> Self {
        Self::Source { action: action.into(), path: path.into(), source: err.into() }
    }

    /// Sorts a system error of the target's side; `dir` is what `statvfs` is asked about.
    pub(crate) fn target(
        action: &'static str,
        dir: &Path,
        path: &Path,
        err: impl Into<io::Error>,
    ) -> Self {
        let source = err.into();
        match Errno::from_io_error(&source) {
            Some(errno @ (Errno::NOSPC | Errno::DQUOT)) => Self::NoSpace {
                dir: dir.into(),
                path: path.into(),
                free: crate::directory::free_bytes(dir).unwrap_or(0),
                quota: errno == Errno::DQUOT,
            },
            Some(Errno::ROFS) => Self::ReadOnly { action: action.into(), path: path.into() },
            Some(Errno::ACCESS | Errno::PERM) => {
                Self::NotPermitted { action: action.into(), path: path.into(), source }
            }
            _ => Self::Target { action: action.into(), path: path.into(), source },
        }
    }
}
