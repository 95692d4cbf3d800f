//! A copy-on-write file system over a read-only tree, and its FUSE adapter.
//!
//! Owns names, sizes, the write layer (where writes go), faults and the queue of reads that must
//! wait; knows nothing of backups: what lies below is a [`Tree`] of names and sizes and a [`Lower`]
//! that gives bytes by file number. Mounting, serving and unmounting are in `mount` and `fuse`;
//! everything else runs without a kernel.
//!
//! Four rules bind all of it. Nobody who answers the kernel waits for the lower
//! ([`Lower::try_read_at`] or the queue). A byte that cannot be read is EIO and a [`Fault`], never
//! a zero. From the first write that cannot be kept every read and write answers EIO, because the
//! kernel's cache hides a lost write from whoever made it. What writes to the mount is not trusted: a symbolic link
//! exists only where it was provided ([`FileSystem::provide_link`]), and there are no devices.
//!
//! Locks, in the order they may be taken: that of names made from inside, held while the kernel is told of them, but by
//! nobody who answers it; names ([`std::sync::RwLock`], held for memory work only,
//! never while waiting for a file), then nothing; a file's state (one lock per file, held over
//! reads and writes of the layer, never over [`Lower::read_at`]), then the descriptor pool; the
//! fault list and the queue are leaves.
//!
//! Start at [`FileSystem`].

mod content;
mod faults;
mod file;
mod filesystem;
mod fuse;
mod layer;
mod links;
mod mount;
mod names;
mod pages;
mod reserve;
mod tree;
mod waiting;

use std::io;

pub use content::MAX_FILE_SIZE;
pub use faults::{Fault, FaultKind, OnFault};
pub use filesystem::{Change, FileSystem, RenameMode, Space};
pub use fuse::{ServeOptions, serve};
pub use mount::{MountError, mount_as_root, mount_as_user, mount_source, mounted_at, unmount};
pub use names::{Attributes, Kind, Listed};
pub use pages::PAGE;
pub use reserve::kept_free;
pub use tree::{Tree, TreeError};

/// Number of a file, directory or link in the mount; never used twice. The root is [`ROOT`].
pub type Ino = u64;

/// Number of the mount's root directory (FUSE fixes it).
pub const ROOT: Ino = 1;

/// What an operation gives, or the error number the kernel gets.
pub type Result<T> = std::result::Result<T, rustix::io::Errno>;

/// What lies below the mount: files by number, as given to [`Tree::file`].
///
/// Bytes never change, and every byte below the size given to the tree can be asked for, at any
/// offset and length. Fewer bytes than asked for is an error, never zeros.
pub trait Lower: Send + Sync {
    /// Fills `buf` from byte `offset` of `file` if that needs no waiting, or returns `None`.
    fn try_read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>>;

    /// Fills `buf` from byte `offset` of `file`; may wait for disks, networks and decoders.
    ///
    /// Called by the workers of [`FileSystem::start_workers`] only, never by a thread that answers
    /// the kernel.
    fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// Who owns everything in the mount: directories are 0700, files 0600.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id shown by `stat`.
    pub uid: u32,
    /// Group id shown by `stat`.
    pub gid: u32,
}
