//! Decoded chunks that are kept.
//!
//! Those used last stay, with one exception: of a large file that is read in order, what the reads have gone past is kept
//! by the kernel, which was given every page of it. Here it would drive out what nobody else keeps, and its memory is
//! warm for the chunks that follow. PostgreSQL treats a sequential scan of a large table in its buffers the same way.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{CHUNK, chunks_of};
use crate::buffers::Buffer;
use crate::lru::Lru;

/// What a chunk costs besides its bytes, about.
const OVERHEAD: u64 = 256;
/// Bytes that the kernel's cache holds or lacks as a whole.
const PAGE: u64 = 4096;
/// Bytes of passed chunks that are kept all the same: the kernel may want a page again before it was used.
const PASSED_LIMIT: u64 = 16 << 20;

/// A chunk's file and number.
type Key = (usize, u64);

/// Decoded chunks, of not many more bytes than a limit.
pub(super) struct Cache {
    chunks: Lru<Key, Kept>,
    /// Chunks that were served whole to reads in order; the oldest is first.
    passed: VecDeque<Key>,
    passed_limit: usize,
}

#[derive(Clone)]
struct Kept {
    chunk: Arc<Buffer>,
    /// The pages of it that were served to reads in order, a bit each.
    served: u32,
}

const _: () = assert!(CHUNK / PAGE <= u32::BITS as u64);

impl Cache {
    pub(super) fn new(limit: u64) -> Self {
        let passed_limit = (PASSED_LIMIT.min(limit / 8) / CHUNK) as usize;
        Self { chunks: Lru::new(limit), passed: VecDeque::new(), passed_limit }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<Arc<Buffer>> {
        self.chunks.get(&key).map(|kept| kept.chunk)
    }

    pub(super) fn insert(&mut self, key: Key, chunk: Arc<Buffer>) {
        let weight = chunk.len() as u64 + OVERHEAD;
        self.chunks.insert(key, Kept { chunk, served: 0 }, weight);
    }

    pub(super) fn remove(&mut self, key: Key) {
        self.chunks.remove(&key);
    }

    /// Notes that a range was served to reads of a large file in order.
    pub(super) fn pass(&mut self, file: usize, offset: u64, length: usize) {
        for index in chunks_of(offset, length) {
            let Some(kept) = self.chunks.get_mut(&(file, index)) else { continue };
            let size = kept.chunk.len() as u64;
            let all = pages(0, size, size);
            let before = kept.served;
            let (start, end) = (index * CHUNK, offset + length as u64);
            kept.served |= pages(offset.saturating_sub(start), end - start, size);
            if kept.served == all && before != all {
                self.passed.push_back((file, index));
            }
        }
        while self.passed.len() > self.passed_limit {
            let Some(oldest) = self.passed.pop_front() else { break };
            let still = self.chunks.get_mut(&oldest);
            // It may be gone, and even have come again, since it was passed.
            if still.is_some_and(|kept| kept.served == pages(0, CHUNK, kept.chunk.len() as u64)) {
                self.chunks.remove(&oldest);
            }
        }
    }
}

/// Returns the pages of a chunk of `size` bytes that lie within `from..to`, a bit each.
fn pages(from: u64, to: u64, size: u64) -> u32 {
    let end = if to >= size { size.div_ceil(PAGE) } else { to / PAGE };
    (from.div_ceil(PAGE)..end).fold(0, |bits, page| bits | 1 << page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    /// A cache with room for `room` chunks, which holds the chunks 0 to `count` of file 0.
    fn filled(room: u64, count: u64) -> Cache {
        let buffers = Buffers::of(CHUNK as usize);
        let mut cache = Cache::new(room * (CHUNK + OVERHEAD));
        for index in 0..count {
            cache.insert((0, index), Arc::new(buffers.take(CHUNK as usize)));
        }
        cache
    }

    fn held(cache: &mut Cache, count: u64) -> Vec<u64> {
        (0..count).filter(|index| cache.get((0, *index)).is_some()).collect()
    }

    #[test]
    fn passed_chunks_make_room_before_the_others() {
        let mut cache = filled(16, 8);
        assert_eq!(cache.passed_limit, 2);
        cache.pass(0, CHUNK, 4 * CHUNK as usize);
        assert_eq!(held(&mut cache, 8), [0, 3, 4, 5, 6, 7], "the last two of what was passed stay");
        cache.pass(0, CHUNK, 4 * CHUNK as usize);
        assert_eq!(held(&mut cache, 8), [0, 3, 4, 5, 6, 7], "to be served again changes nothing");
    }

    #[test]
    fn a_chunk_with_a_page_that_was_not_served_stays() {
        let mut cache = filled(16, 8);
        let page = PAGE as usize;
        let last = CHUNK - PAGE;
        for index in 0..8 {
            cache.pass(0, index * CHUNK, last as usize); // the last page is left out
            cache.pass(0, index * CHUNK + last, page - 1); // and this is not all of it
        }
        assert_eq!(held(&mut cache, 8).len(), 8);
        for index in 0..8 {
            cache.pass(0, index * CHUNK + last, page);
        }
        assert_eq!(held(&mut cache, 8), [6, 7]);
    }

    #[test]
    fn a_chunk_that_came_again_is_not_a_passed_one() {
        let mut cache = filled(16, 2);
        cache.pass(0, 0, 2 * CHUNK as usize);
        let chunk = cache.get((0, 0)).unwrap();
        cache.insert((0, 0), chunk);
        cache.insert((0, 2), cache_chunk());
        cache.pass(0, 2 * CHUNK, CHUNK as usize);
        assert_eq!(held(&mut cache, 3), [0, 1, 2]);
        cache.insert((0, 3), cache_chunk());
        cache.pass(0, 3 * CHUNK, CHUNK as usize);
        assert_eq!(held(&mut cache, 4), [0, 2, 3]);
    }

    fn cache_chunk() -> Arc<Buffer> {
        Arc::new(Buffers::of(CHUNK as usize).take(CHUNK as usize))
    }

    #[test]
    fn pages_that_lie_within_a_range() {
        assert_eq!(pages(0, CHUNK, CHUNK), u32::MAX);
        assert_eq!(pages(1, CHUNK - 1, CHUNK), u32::MAX >> 2 << 1);
        assert_eq!(pages(0, 100, 100), 1, "the end of a file is a whole page");
        assert_eq!(pages(0, 99, 100), 0);
        assert_eq!(pages(PAGE, 5000, 5000), 0b10);
    }
}
