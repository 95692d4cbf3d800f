//! Verified delivery of dump files, within one machine or to another.
//!
//! Owns the bytes between the dump directory and the target: copying with a checksum that is compared
//! with what the target's disk gives back, the staging directory in the target, the one rename that
//! publishes a database, `SHA256SUMS`, and removing exactly what an earlier attempt or export left. [`Target`] is what a
//! session sees of it; [`RemoteTarget`] and [`receive`] are its two halves on two machines, and [`meet`] connects
//! them directly. Leaves the order of things, retries, the session's journal and SSH to others.
//!
//! The target directory while a session works in it, and after it:
//! ```text
//! DIR/.pgthaw-<session>/<database>/toc.dat …    being delivered; removed at the end
//! DIR/.pgthaw-<session>/.chunks/<database>      from another machine: which chunks have arrived
//! DIR/<database>/                               appears by one rename, complete and verified
//! DIR/globals.sql, DIR/SHA256SUMS, DIR/export.json
//! ```
//! Everything below `DIR` is reached through open directory descriptors and without following symbolic
//! links, so nobody who can write a part of the path can lead a write astray. Start at [`TargetDirectory`],
//! [`copy_verified`] and [`FinishedFiles`].

mod chunk;
mod copy;
mod delivery;
mod direct;
mod directory;
mod error;
mod kept;
mod names;
mod remote;
mod replace;
mod source;
mod sums;
mod target;
mod trust;
mod watch;

pub use copy::{CopyFile, Delivered, Progress, Reuse, copy_all_verified, copy_verified, sha256_of};
pub use delivery::{Place, Target};
pub use direct::{
    ACCEPT_LIMIT, Answer, DirectError, Fingerprint, Identity, ListenAt, Listener, Met, Offer,
    Order, Refusal, dial, lead, meet,
};
pub use directory::Directory;
pub use error::MoveError;
pub use names::{EXPORT_JSON, GLOBALS_SQL, SHA256SUMS, file_name_for_database};
pub use remote::{
    Connection, Heartbeat, Parts, ReceiveError, RemoteOptions, RemoteStatus, RemoteTarget, receive,
};
pub use replace::EarlierExport;
pub use sums::{SumEntry, format_sha256sums, parse_sha256sums};
pub use target::{Access, TargetDirectory, TargetReport, TargetState};
pub use trust::Trust;
pub use watch::FinishedFiles;
