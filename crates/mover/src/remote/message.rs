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
    KeepSums { name: String, sums: Vec<SumEntry> },
    KeptSums { name: String },
    KeepNote { name: String, note: String },
    KeptNote { name: String },
    PublishDatabase { database: String, files: Vec<String> },
    PublishedBefore { database: String },
    PublishFile { name: String },
    RemoveReplaced,
    WriteSha256sums { sums: Vec<SumEntry> },
    WriteExportJson { json: Vec<u8> },
    ExportBytes { sums: Vec<SumEntry> },
    RemoveStaging,
}

/// What a [`Call`] returns.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Sums(Option<Vec<SumEntry>>),
    Note(Option<String>),
    Name(String),
    Bytes(Option<u64>),
}
