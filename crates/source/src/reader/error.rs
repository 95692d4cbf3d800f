//! What can go wrong when a file of a backup is read.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::codec::DecodeError;
use crate::map::{Content, MapFile};

/// Why bytes of a file cannot be served. Cheap to clone: a damaged file answers with the same error for ever.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// Stored bytes could not be read; a later read may succeed.
    #[error("{place}: read stored bytes")]
    Stored {
        /// The file.
        place: Place,
        /// What the store says; it names the stored file.
        source: Arc<io::Error>,
    },
    /// The stored bytes do not decode to the file.
    #[error("{place}: {reason}")]
    Damaged {
        /// The file.
        place: Place,
        /// What is wrong.
        reason: String,
    },
    /// The whole file was decoded, and its digest is not the one the repository noted.
    #[error("{place}: content has {found}, but the repository says {expected}")]
    WrongDigest {
        /// The file.
        place: Place,
        /// The repository's digest.
        expected: String,
        /// The content's digest.
        found: String,
    },
    /// A part of the file decoded to other bytes than the first time: the stored bytes changed meanwhile.
    #[error("{place}: the bytes at {offset} are not what they were when they were read before")]
    Changed {
        /// The file.
        place: Place,
        /// First byte of the part that changed.
        offset: u64,
    },
    /// The range asked for is not inside the file.
    #[error("{place}: {length} bytes at {offset} are not inside its {size} bytes")]
    OutOfRange {
        /// The file.
        place: Place,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Bytes there are.
        size: u64,
    },
    /// A file to be read whole is too large for memory.
    #[error("{place}: its {size} bytes are too many to be read at once")]
    TooLarge {
        /// The file.
        place: Place,
        /// Bytes there are.
        size: u64,
    },
}

impl ReadError {
    /// Returns what the operator can do about it; printed under the error as `hint: …`.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Stored { .. } => "make the repository readable again, then `pgthaw retry`",
            Self::Damaged { .. } | Self::WrongDigest { .. } => {
                "the backup is damaged here: let its own tool verify it, or export from another backup"
            }
            Self::Changed { .. } => {
                "nobody may change or expire the backup while it is read; then `pgthaw retry`"
            }
            Self::OutOfRange { .. } | Self::TooLarge { .. } => {
                "the backup's manifest may be damaged: verify the backup with its own tool"
            }
        }
    }

    pub(super) fn decode(place: Place, err: DecodeError) -> Self {
        match err {
            DecodeError::Stored(source) => Self::stored(place, source),
            other => Self::Damaged { place, reason: other.to_string() },
        }
    }

    /// Fewer stored bytes than the map says is damage; other errors may pass.
    pub(super) fn stored(place: Place, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged { place, reason: source.to_string() },
            _ => Self::Stored { place, source: Arc::new(source) },
        }
    }

    /// The same read can succeed later: the data was not found to be wrong.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::Stored { .. })
    }
}

/// A file of the map and the object that holds it, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Path in the cluster.
    pub path: String,
    /// Number of the object; none for a file that the map itself carries.
    pub object: Option<u32>,
}

impl Place {
    pub(super) fn of(file: &MapFile) -> Self {
        let object = match file.content {
            Content::Inline(_) => None,
            Content::Stored { object, .. } => Some(object.0),
        };
        Self { path: file.path.as_str().to_owned(), object }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "`{}`", self.path)?;
        match self.object {
            Some(object) => write!(formatter, " (object {object})"),
            None => Ok(()),
        }
    }
}
