//! Stores: where stored bytes lie, and how they are reached without ever leaving or changing a repository.
//!
//! Owns [`Root`] (a directory opened once, everything else beneath it) and [`ObjectStore`] (ranges of numbered
//! objects) with a local and an in-memory implementation, and a pair that reads over a link: [`RemoteStore`] where the
//! mount runs, [`serve`] where the repository lies. Leaves what the bytes mean to formats and codecs.
//!
//! Nothing here opens a file for writing, and access times are left alone where the kernel allows it.

mod local;
mod memory;
mod remote;
mod root;
mod service;
mod wire;

use std::io;

pub use local::LocalStore;
pub use memory::MemoryStore;
pub use remote::{LinkStatus, RemoteOptions, RemoteStore};
pub use root::{Entry, Kind, Root};
pub use service::serve;

use crate::map::ObjectId;

/// Stored bytes of one backup, by number; names stay with whoever opened it. Every implementation passes
/// `tests/store_contract.rs`.
pub trait ObjectStore: Send + Sync {
    /// Fills `buf` from byte `offset` of `object`.
    ///
    /// # Errors
    /// Fewer stored bytes than asked for is `UnexpectedEof`, never zeros; an unknown object is `NotFound`.
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns the number of stored bytes of `object`.
    ///
    /// # Errors
    /// An unknown object is `NotFound`.
    fn length(&self, object: ObjectId) -> io::Result<u64>;
}

/// The error for a read beyond the end of `what`.
fn too_short(what: &str, offset: u64, wanted: usize) -> io::Error {
    let text = format!(
        "{what} ends before byte {} that was asked for",
        offset.saturating_add(wanted as u64)
    );
    io::Error::new(io::ErrorKind::UnexpectedEof, text)
}
