//! How much of its file system the write layer may fill: pure decisions, no I/O.
//!
//! The last part stays free for others, so that what a backup writes fills up nobody else's disk. Free space is looked at
//! rarely: each look grants a chunk, which may be used up before the next.

use std::fmt;

/// The largest part that stays free.
const LARGEST: u64 = 1 << 30;
/// Of a small file system a part in so many stays free: 5 %.
const PART: u64 = 20;
/// At most so many bytes are granted at a time, and a sixteenth of what is left.
const CHUNK: u64 = 16 << 20;

/// Returns how many bytes the write layer leaves free on a file system of `total` bytes: 5 % of it, at most 1 GiB.
pub fn kept_free(total: u64) -> u64 {
    (total / PART).min(LARGEST)
}

/// A file system's size and what ordinary users can still write, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) total: u64,
    pub(crate) free: u64,
}

impl Disk {
    /// Returns how much the write layer may take before the disk is looked at again: `wanted` or more.
    pub(crate) fn grant(self, wanted: u64) -> Result<u64, ReserveReached> {
        if self.total == 0 {
            return Ok(wanted.max(CHUNK)); // a file system that tells no size
        }
        let left = self.free.saturating_sub(kept_free(self.total));
        if wanted > left { Err(ReserveReached(self)) } else { Ok(wanted.max(CHUNK.min(left / 16))) }
    }
}

/// The write layer stops: what is free stays free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReserveReached(Disk);

impl fmt::Display for ReserveReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (free, kept) = (megabytes(self.0.free), megabytes(kept_free(self.0.total)));
        write!(
            f,
            "No space left for pgthaw: {free:.1} MB are free on this file system, and pgthaw leaves the last \
             {kept:.1} MB (5 % of it, at most 1 GB) to others"
        )
    }
}

impl std::error::Error for ReserveReached {}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;
    const GB: u64 = 1 << 30;

    #[test]
    fn a_twentieth_stays_free_but_no_more_than_a_gigabyte() {
        let cases = [(0, 0), (20 * MB, MB), (20 * GB, GB), (8000 * GB, GB)];
        for (total, want) in cases {
            assert_eq!(kept_free(total), want, "{total}");
        }
    }

    #[test]
    fn grants_chunks_until_the_rest_is_reached() {
        let refused = |total, free| Err(ReserveReached(Disk { total, free }));
        let cases = [
            ("a large disk", 100 * GB, 50 * GB, 4096, Ok(16 * MB)),
            ("a large write", 100 * GB, 50 * GB, 40 * MB, Ok(40 * MB)),
            ("a sixteenth of what is left", 100 * GB, GB + 32 * MB, 4096, Ok(2 * MB)),
            ("nearly nothing is left", 100 * GB, GB + 8192, 4096, Ok(4096)),
            ("the last page", 100 * GB, GB + 4096, 4096, Ok(4096)),
            ("one page too much", 100 * GB, GB + 4095, 4096, refused(100 * GB, GB + 4095)),
            ("others have taken more", 100 * GB, 5 * MB, 1, refused(100 * GB, 5 * MB)),
            ("nothing wanted", 100 * GB, 0, 0, Ok(0)),
            ("a small disk", 20 * MB, 2 * MB, 4096, Ok(MB / 16)),
            ("a small disk, nearly full", 20 * MB, MB, 4096, refused(20 * MB, MB)),
            ("no size told", 0, 0, 4096, Ok(16 * MB)),
        ];
        for (name, total, free, wanted, want) in cases {
            assert_eq!(Disk { total, free }.grant(wanted), want, "{name}");
        }
    }

    #[test]
    fn says_whose_limit_it_is_and_what_is_left() {
        let said = ReserveReached(Disk { total: 40 * GB, free: 900 * MB }).to_string();
        for part in ["No space left for pgthaw", "900.0 MB are free", "the last 1024.0 MB"] {
            assert!(said.contains(part), "{said}");
        }
    }
}
