//! What the two movers say to each other.
//!
//! ```text
//! source                                             target
//! Hello ───────────────────────────────────────────▶
//!       ◀─────────────────────────────────────────── Hello, or Refused and the end
//! Begin (round, names) ────────────────────────────▶
//!       ◀─────────────────────────────────────────── Has … HasAll: chunks that are there
//! Chunk, Chunk … Finish, Chunk … ──────────────────▶
//!       ◀─────────────────────────────────────────── Confirmed …, Delivered …: on disk and read back
//! Call (round) ────────────────────────────────────▶
//!       ◀─────────────────────────────────────────── Answer
//! ```
//! Each delivery and each call is a round; what comes late from an earlier round is ignored. Everything may be repeated
//! on another connection.

use serde::{Deserialize, Serialize};

use super::bounded;
use super::link::Message;
use super::wire_error::WireError;
use crate::chunk::{ChunkSum, FileSum};
use crate::delivery::Place;
use crate::sums::SumEntry;

/// Begins every connection, with the version: another program, or another version of ours, is told at once.
pub(super) const MAGIC: [u8; 8] = *b"pgthaw-m";
/// Raised with every change of these messages.
pub(super) const VERSION: u32 = 1;
/// Most checksums in one [`ToSource::Has`].
pub(super) const SUMS_AT_ONCE: usize = 1 << 14;

/// From the source to the target.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToTarget {
    Hello {
        magic: [u8; 8],
        version: u32,
    },
    Ping,
    /// Files are going to be delivered into a place; their index is their number from now on.
    Begin {
        round: u32,
        place: OwnedPlace,
        #[serde(deserialize_with = "bounded::list")]
        files: Vec<Wanted>,
    },
    /// A chunk of a file; its data is the body, compressed if it is `packed`.
    Chunk {
        round: u32,
        file: u32,
        number: u64,
        length: u32,
        sum: ChunkSum,
        packed: bool,
    },
    /// All chunks of a file were sent, or are there.
    Finish {
        round: u32,
        file: u32,
        bytes: u64,
        sum: FileSum,
    },
    Call {
        round: u32,
        call: Call,
    },
}

/// From the target to the source.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToSource {
    Hello {
        magic: [u8; 8],
        version: u32,
    },
    /// This target cannot be worked in.
    Refused(WireError),
    Ping,
    /// The target has chunks of a file: those from `first` on have these checksums.
    Has {
        round: u32,
        file: u32,
        first: u64,
        #[serde(deserialize_with = "bounded::list")]
        sums: Vec<ChunkSum>,
    },
    /// Nothing else is there.
    HasAll {
        round: u32,
    },
    /// The first `chunks` chunks of a file are on the target's disk, read back and written down.
    Confirmed {
        round: u32,
        file: u32,
        chunks: u64,
    },
    /// A file is on the target's disk and has the source's SHA-256.
    Delivered {
        round: u32,
        file: u32,
    },
    /// The round failed.
    Failed {
        round: u32,
        error: WireError,
    },
    Answer {
        round: u32,
        answer: Result<Answer, WireError>,
    },
}

impl Message for ToTarget {
    const PING: Self = Self::Ping;

    fn is_ping(&self) -> bool {
        matches!(self, Self::Ping)
    }
}

impl Message for ToSource {
    const PING: Self = Self::Ping;

    fn is_ping(&self) -> bool {
        matches!(self, Self::Ping)
    }
}

/// A [`Place`] that owns its name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum OwnedPlace {
    Database(String),
    TopLevel,
}

impl From<Place<'_>> for OwnedPlace {
    fn from(place: Place<'_>) -> Self {
        match place {
            Place::Database(name) => Self::Database(name.into()),
            Place::TopLevel => Self::TopLevel,
        }
    }
}

/// A file that is going to be delivered.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Wanted {
    pub(super) name: String,
    /// Whether what is there must not be used.
    pub(super) fresh: bool,
}

/// A method of [`crate::Target`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Call {
    KeepSums {
        name: String,
        #[serde(deserialize_with = "bounded::list")]
        sums: Vec<SumEntry>,
    },
    KeptSums {
        name: String,
    },
    KeepNote {
        name: String,
        note: String,
    },
    KeptNote {
        name: String,
    },
    PublishDatabase {
        database: String,
        #[serde(deserialize_with = "bounded::list")]
        files: Vec<String>,
    },
    PublishedBefore {
        database: String,
    },
    PublishFile {
        name: String,
    },
    RemoveReplaced,
    WriteSha256sums {
        #[serde(deserialize_with = "bounded::list")]
        sums: Vec<SumEntry>,
    },
    WriteExportJson {
        json: Vec<u8>,
    },
    ExportBytes {
        #[serde(deserialize_with = "bounded::list")]
        sums: Vec<SumEntry>,
    },
    RemoveStaging,
}

/// What a [`Call`] returns.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Sums(#[serde(deserialize_with = "bounded::optional_list")] Option<Vec<SumEntry>>),
    Note(Option<String>),
    Name(String),
    Bytes(Option<u64>),
}

#[cfg(test)]
mod tests {
    use super::super::bounded::LIST_MAX;
    use super::*;

    /// A byte each on the connection, fifty in memory.
    #[test]
    fn lists_of_nothing_take_no_memory() {
        let call = |files| ToTarget::Call {
            round: 1,
            call: Call::PublishDatabase { database: "crm".into(), files },
        };
        let bytes = postcard::to_stdvec(&call(vec!["f".into(); 3])).unwrap();
        assert!(postcard::from_bytes::<ToTarget>(&bytes).is_ok());
        // The same with a list that announces more, and brings them.
        let at = bytes.len() - 7; // the length, then three names of two bytes
        assert_eq!(bytes[at], 3);
        for (count, want) in [(LIST_MAX, true), (LIST_MAX + 1, false), (60 << 20, false)] {
            let mut many = bytes[..at].to_vec();
            many.extend(postcard::to_stdvec(&count).unwrap());
            many.resize(many.len() + count, 0);
            assert_eq!(postcard::from_bytes::<ToTarget>(&many).is_ok(), want, "{count}");
        }
        let sums = Answer::Sums(Some(Vec::new()));
        let bytes = postcard::to_stdvec(&sums).unwrap();
        assert!(matches!(postcard::from_bytes(&bytes), Ok(Answer::Sums(Some(_)))));
    }
}
