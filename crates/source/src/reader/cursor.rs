//! Cursors: decoders in the middle of a file, kept so that the next chunk needs no decoding from the start.

use std::io::{self, BufRead, Read};
use std::ops::Range;
use std::sync::Arc;

use super::CHUNK;
use super::statistics::Counters;
use crate::codec::Decoder;
use crate::map::{Codec, ObjectId};
use crate::store::ObjectStore;

/// Idle cursors that are kept.
const COUNT: usize = 256;
/// Of them, cursors of one file: for several sequential readers at different places.
const COUNT_PER_FILE: usize = 4;
/// Stored bytes fetched at first: a catalog's first page should not cost more.
const FIRST_FETCH: u64 = 16 * 1024;
/// Stored bytes fetched at once by a stream that goes on.
const LARGEST_FETCH: u64 = 256 * 1024;

/// A decoder and the next chunk it will decode.
pub(super) struct Cursor {
    pub(super) file: usize,
    pub(super) next: u64,
    pub(super) decoder: Decoder<StoredRange>,
    used: u64,
}

impl Cursor {
    pub(super) fn new(file: usize, next: u64, decoder: Decoder<StoredRange>) -> Self {
        Self { file, next, decoder, used: 0 }
    }

    fn memory(&self) -> u64 {
        self.decoder.memory() + LARGEST_FETCH
    }
}

/// Idle cursors, bounded in number and memory; the least recently used go first.
pub(super) struct Pool {
    idle: Vec<Cursor>,
    memory: u64,
    memory_limit: u64,
    now: u64,
}

impl Pool {
    pub(super) fn new(memory_limit: u64) -> Self {
        Self { idle: Vec::new(), memory: 0, memory_limit, now: 0 }
    }

    /// Takes out the cursor of `file` that is nearest before (or at) `chunk`.
    pub(super) fn take(&mut self, file: usize, chunk: u64) -> Option<Cursor> {
        let usable = self
            .idle
            .iter()
            .enumerate()
            .filter(|(_, cursor)| cursor.file == file && cursor.next <= chunk);
        let (place, _) = usable.max_by_key(|(_, cursor)| cursor.next)?;
        Some(self.remove(place))
    }

    /// Returns where the nearest cursor of `file` before (or at) `chunk` stands.
    pub(super) fn nearest(&self, file: usize, chunk: u64) -> Option<u64> {
        let own = self.idle.iter().filter(|cursor| cursor.file == file && cursor.next <= chunk);
        own.map(|cursor| cursor.next).max()
    }

    /// Keeps a cursor; returns those that have to go, to be dropped without the pool's lock.
    pub(super) fn put(&mut self, mut cursor: Cursor) -> Vec<Cursor> {
        self.now += 1;
        cursor.used = self.now;
        self.memory += cursor.memory();
        let file = cursor.file;
        self.idle.push(cursor);
        let mut gone = Vec::new();
        if self.idle.iter().filter(|cursor| cursor.file == file).count() > COUNT_PER_FILE {
            gone.extend(self.remove_oldest(|cursor| cursor.file == file));
        }
        while self.idle.len() > COUNT || (self.memory > self.memory_limit && self.idle.len() > 1) {
            gone.extend(self.remove_oldest(|_| true));
        }
        gone
    }

    /// Takes out all cursors of `file`.
    pub(super) fn take_all(&mut self, file: usize) -> Vec<Cursor> {
        let mut gone = Vec::new();
        while let Some(cursor) = self.remove_oldest(|cursor| cursor.file == file) {
            gone.push(cursor);
        }
        gone
    }

    fn remove_oldest(&mut self, which: impl Fn(&Cursor) -> bool) -> Option<Cursor> {
        let candidates = self.idle.iter().enumerate().filter(|(_, cursor)| which(cursor));
        let (place, _) = candidates.min_by_key(|(_, cursor)| cursor.used)?;
        Some(self.remove(place))
    }

    fn remove(&mut self, place: usize) -> Cursor {
        let cursor = self.idle.swap_remove(place);
        self.memory -= cursor.memory(); // an idle decoder does not grow
        cursor
    }
}

/// The stored range of a file as a stream. Fetches little at first and more when the stream goes on.
pub(super) struct StoredRange {
    store: Arc<dyn ObjectStore>,
    counters: Arc<Counters>,
    object: ObjectId,
    next: u64,
    end: u64,
    fetch: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl StoredRange {
    pub(super) fn new(
        store: Arc<dyn ObjectStore>,
        counters: Arc<Counters>,
        object: ObjectId,
        stored: Range<u64>,
        codec: Codec,
    ) -> Self {
        let fetch = if codec == Codec::None { CHUNK } else { FIRST_FETCH };
        Self {
            store,
            counters,
            object,
            next: stored.start,
            end: stored.end,
            fetch,
            buffer: Vec::new(),
            used: 0,
        }
    }
}

impl BufRead for StoredRange {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.buffer.len() && self.next < self.end {
            let left = self.end - self.next;
            let length = if left <= self.fetch + self.fetch / 2 { left } else { self.fetch };
            self.used = 0;
            self.buffer.resize(length as usize, 0);
            if let Err(err) = self.store.read_exact_at(self.object, self.next, &mut self.buffer) {
                self.buffer.clear();
                return Err(err);
            }
            self.counters.stored_bytes_read.add(length);
            self.next += length;
            self.fetch = (self.fetch * 2).min(LARGEST_FETCH);
        }
        Ok(&self.buffer[self.used..])
    }

    fn consume(&mut self, count: usize) {
        self.used = (self.used + count).min(self.buffer.len());
    }
}

impl Read for StoredRange {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buf)?;
        self.consume(count);
        Ok(count)
    }
}
