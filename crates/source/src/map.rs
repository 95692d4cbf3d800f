//! The backup map: every file of one backup with its attributes and where its bytes are stored.
//!
//! A map names objects by number only; which file an object is stays in the [`ObjectTable`], with whoever
//! opened the repository. Formats build maps, [`crate::reader`] reads through them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Number of a stored object: an index into [`ObjectTable::objects`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectId(pub u32);

/// A relative path inside the mounted cluster: `data/…` for the data directory, `tablespaces/<oid>/…` for a
/// tablespace. No empty, `.` or `..` part, no NUL byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterPath(String);

/// A path that leads out of the cluster, or is no path.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no path inside a cluster")]
pub struct BadClusterPath(pub String);

impl ClusterPath {
    /// Checks `text` and takes it over.
    ///
    /// # Errors
    /// [`BadClusterPath`] for an absolute path, an empty, `.` or `..` part, or a NUL byte.
    pub fn new(text: impl Into<String>) -> Result<Self, BadClusterPath> {
        let text = text.into();
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if text.split('/').all(plain) { Ok(Self(text)) } else { Err(BadClusterPath(text)) }
    }

    /// The path as text, with `/` between its parts.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ClusterPath {
    type Error = BadClusterPath;

    fn try_from(text: String) -> Result<Self, BadClusterPath> {
        Self::new(text)
    }
}

impl From<ClusterPath> for String {
    fn from(path: ClusterPath) -> Self {
        path.0
    }
}

/// How stored bytes become a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Codec {
    /// Stored as they are.
    None,
    /// A gzip frame (RFC 1952).
    Gzip,
    /// A zlib frame (RFC 1950): pgBackRest's "raw" gzip inside bundles.
    Zlib,
    /// An LZ4 frame.
    Lz4,
    /// One or more Zstandard frames.
    Zstd,
}

/// Where a file's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Bytes the map itself carries: small files that were made, not stored (also the empty file).
    Inline(Vec<u8>),
    /// Bytes `[offset, offset + length)` of an object, decoded by `codec`.
    Stored {
        /// The object that holds them.
        object: ObjectId,
        /// First stored byte.
        offset: u64,
        /// Number of stored bytes.
        length: u64,
        /// How to decode them.
        codec: Codec,
    },
}

/// A checksum over all of a file's decoded bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Digest {
    /// pgBackRest's manifest and WAL archive.
    Sha1([u8; 20]),
    /// `backup_manifest`'s default.
    Crc32c(u32),
    /// `backup_manifest` with `--manifest-checksums=SHA224`, `SHA256`, `SHA384` or `SHA512`; told apart by length (28, 32, 48, 64 bytes).
    Sha2(Vec<u8>),
}

/// One file of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapFile {
    /// Where it lies in the mounted cluster.
    pub path: ClusterPath,
    /// Decoded bytes.
    pub size: u64,
    /// Last modification, seconds since 1970-01-01 UTC.
    pub modified: i64,
    /// Where its bytes come from.
    pub content: Content,
    /// What its whole content must match, where the repository knows it.
    pub digest: Option<Digest>,
    /// PostgreSQL's page checksums cover this file, so parts of it may be served before the whole was verified
    /// (pitfall: without page checksums a file is decoded and verified whole before its first byte is served).
    pub page_checksums: bool,
}

/// Everything a mount needs to know of one backup; streamed once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupMap {
    /// Directories, parents before children, `data` first; empty ones too.
    pub directories: Vec<ClusterPath>,
    /// Files, sorted by path, each path once.
    pub files: Vec<MapFile>,
}

/// Which stored file each object number stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectTable {
    /// Directories that objects lie beneath, opened once; nothing outside them is ever opened.
    pub roots: Vec<PathBuf>,
    /// The objects, by number.
    pub objects: Vec<StoredObject>,
}

/// One stored file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredObject {
    /// Index into [`ObjectTable::roots`].
    pub root: u32,
    /// Path beneath that root.
    pub path: String,
}
