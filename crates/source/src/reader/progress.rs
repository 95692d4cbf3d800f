//! How far a file was checked: a digest that runs along, and a checksum of every chunk to compare with when the
//! chunk is decoded again.

use std::sync::Arc;

use super::digesting::{Digesting, Helper};
use super::error::{Place, ReadError};
use crate::buffers::Buffer;
use crate::digest::{Hasher, shown};
use crate::map::{Codec, Content, MapFile};

/// What is known of a file's content so far.
pub(super) struct Progress {
    /// Bytes from the file's start that were seen in order.
    position: u64,
    /// Over those bytes; none if the repository has no digest, or when it was compared.
    digest: Option<Digesting>,
    /// CRC-32C of each chunk decoded so far.
    chunks: Vec<u32>,
}

/// What a chunk was found to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    New,
    SeenBefore,
}

impl Progress {
    pub(super) fn new(file: &MapFile) -> Self {
        Self {
            position: 0,
            digest: file.digest.as_ref().and_then(Hasher::like).map(Digesting::new),
            chunks: Vec::new(),
        }
    }

    /// Bytes from the file's start that were seen in order.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Chunks decoded so far.
    pub(super) fn chunks(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Takes a decoded chunk, compares it if it was decoded before; a helper may hash it later. `None`: it is not what it
    /// was.
    pub(super) fn take_chunk(
        &mut self,
        index: u64,
        chunk: &Arc<Buffer>,
        helper: Option<&Helper>,
    ) -> Option<Chunk> {
        let sum = crc32c::crc32c(chunk);
        match usize::try_from(index).ok().and_then(|index| self.chunks.get(index)) {
            Some(known) => (*known == sum).then_some(Chunk::SeenBefore),
            None => {
                self.chunks.push(sum);
                match (&self.digest, helper) {
                    (Some(digest), Some(helper)) => {
                        self.position += chunk.len() as u64;
                        digest.take_beside(chunk, helper);
                    }
                    _ => self.take_in_order(chunk),
                }
                Some(Chunk::New)
            }
        }
    }

    /// Takes bytes read at `offset`; those that go on where the digest stands are added to it.
    pub(super) fn take_at(&mut self, offset: u64, bytes: &[u8]) {
        let known = self.position.checked_sub(offset).and_then(|known| usize::try_from(known).ok());
        if let Some(fresh) = known.and_then(|known| bytes.get(known..)) {
            self.take_in_order(fresh);
        }
    }

    fn take_in_order(&mut self, bytes: &[u8]) {
        self.position += bytes.len() as u64;
        if let Some(digest) = &self.digest {
            digest.take(bytes);
        }
    }

    /// Compares the digest after the last byte. `true`: there was one, and it matches.
    pub(super) fn compare(&mut self, file: &MapFile) -> Result<bool, ReadError> {
        let (Some(expected), Some(digest)) = (&file.digest, self.digest.take()) else {
            return Ok(false);
        };
        let found = digest.finish();
        if found == *expected {
            return Ok(true);
        }
        Err(ReadError::WrongDigest {
            place: Place::of(file),
            expected: shown(expected),
            found: shown(&found),
        })
    }
}

/// Returns what can be seen to be wrong with a file before any of it is read; a file that the map carries is
/// verified at once.
pub(super) fn check_map(file: &MapFile) -> Result<(), ReadError> {
    let damaged = |reason| Err(ReadError::Damaged { place: Place::of(file), reason });
    if let Some(digest) = &file.digest
        && Hasher::like(digest).is_none()
    {
        return damaged(format!("its digest {} is of no known kind", shown(digest)));
    }
    match &file.content {
        Content::Inline(bytes) if bytes.len() as u64 != file.size => damaged(format!(
            "the map carries {} bytes of it, but its size is {}",
            bytes.len(),
            file.size
        )),
        Content::Inline(bytes) => {
            let mut progress = Progress::new(file);
            progress.take_in_order(bytes);
            progress.compare(file).map(drop)
        }
        Content::Stored { offset, length, .. } if offset.checked_add(*length).is_none() => {
            damaged(format!("its stored range, {length} bytes at {offset}, is impossible"))
        }
        Content::Stored { length, codec: Codec::None, .. } if *length != file.size => {
            damaged(format!("its size is {}, but {length} bytes of it are stored", file.size))
        }
        Content::Stored { .. } => Ok(()),
    }
}
