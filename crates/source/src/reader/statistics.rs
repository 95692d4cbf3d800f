//! What a reader did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What a [`super::Reader`] did since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes read from the store.
    pub stored_bytes_read: u64,
    /// Bytes decoded (and stored uncompressed bytes read for verification), those decoded again included.
    pub decoded_bytes: u64,
    /// Bytes decoded that had been decoded before: the cache was too small to keep them.
    pub decoded_again_bytes: u64,
    /// Decoded chunks that a read found in the cache.
    pub cache_hits: u64,
    /// Decoded chunks that a read did not find there.
    pub cache_misses: u64,
    /// Streams begun at their start.
    pub streams_opened: u64,
    /// Files whose whole content matched the repository's digest.
    pub files_verified: u64,
    /// Files found damaged.
    pub files_damaged: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) stored_bytes_read: Counter,
    pub(super) decoded_bytes: Counter,
    pub(super) decoded_again_bytes: Counter,
    pub(super) cache_hits: Counter,
    pub(super) cache_misses: Counter,
    pub(super) streams_opened: Counter,
    pub(super) files_verified: Counter,
    pub(super) files_damaged: Counter,
}

impl Counters {
    pub(super) fn now(&self) -> Statistics {
        Statistics {
            stored_bytes_read: self.stored_bytes_read.now(),
            decoded_bytes: self.decoded_bytes.now(),
            decoded_again_bytes: self.decoded_again_bytes.now(),
            cache_hits: self.cache_hits.now(),
            cache_misses: self.cache_misses.now(),
            streams_opened: self.streams_opened.now(),
            files_verified: self.files_verified.now(),
            files_damaged: self.files_damaged.now(),
        }
    }
}
