//! The WAL that a recovery will replay: whether it is there, how far it goes, and what it does to tablespaces.
//!
//! PostgreSQL takes unreadable WAL for the end of WAL and then opens with fewer rows. [`pages`] finds that
//! before the start ([`check_segment_head`]) and after replay ([`record_end`], [`later_valid_page`]).
//!
//! Replay also makes, links and removes directories outside the data directory. [`walk()`] reads the records
//! beforehand and ends where replay will end; [`ReplayedTablespaces`] says which links replay will make.
//!
//! Leaves finding and decoding segments to the caller ([`ReadWal`]). All WAL is hostile input.

pub mod pages;
pub mod records;
pub mod tablespaces;
pub mod walk;
#[cfg(test)]
mod writer;

use std::io;

use serde::{Deserialize, Serialize};

use crate::control::{ControlError, ControlFile};
use crate::lsn::{Lsn, SegmentSize};
use crate::version::Major;

pub use pages::{
    SEGMENT_HEAD, WalError, check_segment_head, later_valid_page, record_end, valid_pages_end,
};
pub use records::{BadRecord, Record};
pub use tablespaces::{
    LocationObjection, ReplayedTablespace, ReplayedTablespaces, TooManyTablespaces,
    location_objection,
};
pub use walk::{EndReason, WalkEnd, WalkError, walk};

/// What all WAL of one cluster has in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalIdentity {
    /// The major version that wrote it.
    pub major: Major,
    /// The cluster's identity.
    pub system_identifier: u64,
    /// The size of its segments.
    pub segment_size: SegmentSize,
    /// Bytes per page: a power of two, 1 to 64 KiB.
    pub page_size: u32,
}

impl WalIdentity {
    /// Takes the facts from `pg_control`.
    ///
    /// # Errors
    /// [`ControlError::UnknownCatalog`] if no supported version wrote it.
    pub fn of(control: &ControlFile) -> Result<Self, ControlError> {
        Ok(Self {
            major: control.major()?,
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            page_size: control.wal_block_size,
        })
    }
}

/// Reads the WAL of one timeline: fills the buffer with the bytes from this position on.
///
/// `Ok(false)` if the segment is certainly not there; a range never leaves its segment.
pub type ReadWal<'a> = &'a mut dyn FnMut(Lsn, &mut [u8]) -> io::Result<bool>;
