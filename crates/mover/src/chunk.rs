//! Chunks: the unit in which files travel and are kept track of, and the running SHA-256 that goes on from any of them.
//!
//! A chunk's own checksum guards against accidents (network, memory, disk) and tells whether an earlier attempt's chunk is
//! the same; XXH3 with 128 bits does that at six times the speed of BLAKE3
//! (40 against 6 GB/s on one core with AVX2, chunks of 1 MiB). What proves a whole file is its SHA-256.

use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_128;

/// Bytes of every chunk of a file but the last, which may be shorter (never empty).
pub(crate) const CHUNK: usize = 1 << 20;

/// Bytes of a chunk that are worked on at a time: they are still in the processor's cache when they are looked at again.
pub(crate) const PIECE: usize = 128 << 10;

/// Checksum of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkSum([u8; 16]);

impl ChunkSum {
    /// The checksum of `bytes`, which are taken into `sha`, too.
    pub(crate) fn with_sha(bytes: &[u8], sha: &mut Sha256) -> Self {
        let mut summing = Summing::new();
        for piece in bytes.chunks(PIECE) {
            sha.update(piece);
            summing.update(piece);
        }
        summing.sum()
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_128::oneshot(bytes).to_le_bytes())
    }
}

/// A chunk's checksum, piece by piece.
pub(crate) struct Summing(XxHash3_128);

impl Summing {
    pub(crate) fn new() -> Self {
        Self(XxHash3_128::new())
    }

    pub(crate) fn update(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    pub(crate) fn sum(&self) -> ChunkSum {
        ChunkSum(self.0.finish_128().to_le_bytes())
    }
}

/// Returns how many chunks a file of `bytes` has.
pub(crate) fn chunks_of(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK as u64)
}

/// Writes down how far a SHA-256 has come.
pub(crate) fn save_sha(sha: &Sha256) -> Vec<u8> {
    sha.serialize().to_vec()
}

/// Goes on with a SHA-256 that was written down; `None` for bytes that are none.
pub(crate) fn load_sha(saved: &[u8]) -> Option<Sha256> {
    let saved = SerializedState::<Sha256>::try_from(saved).ok()?;
    Sha256::deserialize(&saved).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sha_goes_on_where_it_was_written_down() {
        for cut in [0, 1, 63, 64, 65, 1000] {
            let bytes: Vec<u8> = (0..1000).map(|at: u32| (at % 251) as u8).collect();
            let mut sha = Sha256::new();
            sha.update(&bytes[..cut]);
            let mut sha = load_sha(&save_sha(&sha)).unwrap();
            sha.update(&bytes[cut..]);
            assert_eq!(sha.finalize(), Sha256::digest(&bytes), "{cut}");
        }
        assert!(load_sha(b"short").is_none());
        assert!(load_sha(&[255; 104]).is_none(), "a position outside of the block");
    }

    #[test]
    fn pieces_add_up() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, CHUNK] {
            let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let mut sha = Sha256::new();
            sha.update(b"before");
            let sum = ChunkSum::with_sha(&bytes, &mut sha);
            assert_eq!(sum, ChunkSum::of(&bytes), "{length}");
            assert_eq!(sha.finalize(), Sha256::digest([&b"before"[..], &bytes].concat()));
        }
    }

    #[test]
    fn counts_chunks() {
        let chunk = CHUNK as u64;
        for (bytes, chunks) in [(0, 0), (1, 1), (chunk, 1), (chunk + 1, 2)] {
            assert_eq!(chunks_of(bytes), chunks, "{bytes}");
        }
    }
}
