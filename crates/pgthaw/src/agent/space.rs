//! Room on file systems: how much there is, how much an export may need, and where a dump is kept.
//!
//! The figures are estimates for warnings ([`super::check`]); nothing is reserved.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statfs, statvfs};

use pgthaw_mountfs::kept_free;

pub use crate::sizes::human_size;

/// Returns the directory with the most free bytes; of equal ones the first. None without directories.
pub fn choose_dump_dir(directories: &[(PathBuf, u64)]) -> Option<&Path> {
    let roomiest = directories.iter().rev().max_by_key(|(_, free)| *free);
    roomiest.map(|(path, _)| path.as_path())
}

/// Returns the bytes that an ordinary user can still write where `path` lies.
///
/// # Errors
/// `path` cannot be looked at.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    Room::at(path).map(|room| room.bytes)
}

/// What a file system has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Number of its device: equal for directories that share the room.
    pub device: u64,
    /// Free bytes for ordinary users.
    pub bytes: u64,
    /// Of these the bytes that a write layer leaves free.
    pub kept_free: u64,
    /// Free inodes for ordinary users; none where the file system does not count them.
    pub inodes: Option<u64>,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// What lies beneath it, as far as it matters here.
    pub medium: Medium,
}

/// What lies beneath a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// A disk, or something else that needs no remark.
    Disk,
    /// Memory (tmpfs).
    Memory,
    /// Another machine (NFS, SMB).
    Network,
    /// A program of some user (FUSE).
    Fuse,
}

impl Room {
    /// Looks at the file system of `path`.
    ///
    /// # Errors
    /// `path` cannot be looked at.
    pub fn at(path: &Path) -> io::Result<Self> {
        let room = statvfs(path)?;
        Ok(Self {
            device: std::fs::metadata(path)?.dev(),
            bytes: room.f_bavail.saturating_mul(room.f_frsize),
            kept_free: kept_free(room.f_blocks.saturating_mul(room.f_frsize)),
            inodes: (room.f_files > 0).then_some(room.f_favail),
            read_only: room.f_flag.contains(StatVfsMountFlags::RDONLY),
            medium: medium(statfs(path)?.f_type as u64),
        })
    }
}

/// Tells a file system's type by its number (statfs(2)).
fn medium(kind: u64) -> Medium {
    match kind & 0xffff_ffff {
        0x0102_1994 | 0x8584_58f6 => Medium::Memory, // tmpfs, ramfs
        0x6969 | 0xff53_4d42 | 0xfe53_4d42 | 0x517b => Medium::Network, // NFS, CIFS, SMB2, SMB
        0x6573_5546 => Medium::Fuse,
        _ => Medium::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_the_dump_directory() {
        let cases: [(_, &[_], _); 4] = [
            ("most free space wins", &[("/var/tmp", 10), ("/tmp", 20)], Some("/tmp")),
            ("a tie goes to the first", &[("/var/tmp", 20), ("/tmp", 20)], Some("/var/tmp")),
            ("the roomier one even if small", &[("/var/tmp", 7), ("/tmp", 3)], Some("/var/tmp")),
            ("none without directories", &[], None),
        ];
        for (name, directories, want) in cases {
            let directories: Vec<_> =
                directories.iter().map(|(path, free)| (path.into(), *free)).collect();
            assert_eq!(choose_dump_dir(&directories), want.map(Path::new), "{name}");
        }
    }

    #[test]
    fn looks_at_file_systems() {
        let room = Room::at(Path::new("/")).unwrap();
        assert_eq!(room.device, std::fs::metadata("/").unwrap().dev());
        assert!(room.bytes > 0);
        assert!(room.kept_free > 0 && room.kept_free <= 1 << 30);
        assert_eq!(Room::at(Path::new("/proc")).unwrap().bytes, 0);
        assert!(Room::at(Path::new("/no/such/directory")).is_err());
        assert_eq!(medium(0x0102_1994), Medium::Memory);
        assert_eq!(medium(0xffff_ffff_ff53_4d42), Medium::Network, "sign-extended");
        assert_eq!(medium(0xef53), Medium::Disk);
    }
}
