//! Reads backup repositories: which backups there are, and the bytes of any file of one of them.
//!
//! Owns stores (where stored bytes lie), formats (what the bytes mean), codecs and the backup map.
//! Leaves the mount to `mountfs` and everything about PostgreSQL's own files to `pgthaw-postgres`.
//!
//! Start at [`Repository::open`]; a backup's [`map`] is read through a [`reader::Reader`].

mod buffers;
pub mod codec;
mod digest;
pub mod error;
mod formats;
pub mod location;
mod lru;
pub mod map;
pub mod reader;
pub mod repository;
pub mod store;

pub use error::SourceError;
pub use location::Location;
pub use repository::Repository;
