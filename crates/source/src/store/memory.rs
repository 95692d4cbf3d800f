//! Objects in memory, for tests; counts what is read.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ObjectStore, too_short};
use crate::map::ObjectId;

/// Objects in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    objects: BTreeMap<ObjectId, Vec<u8>>,
    read: AtomicU64,
}

impl MemoryStore {
    /// Returns a store that holds `objects`.
    pub fn new(objects: impl IntoIterator<Item = (ObjectId, Vec<u8>)>) -> Self {
        Self { objects: objects.into_iter().collect(), read: AtomicU64::new(0) }
    }

    /// Bytes read from it so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn bytes(&self, object: ObjectId) -> io::Result<&[u8]> {
        let unknown =
            || io::Error::new(io::ErrorKind::NotFound, format!("object {} is not known", object.0));
        self.objects.get(&object).map(Vec::as_slice).ok_or_else(unknown)
    }
}

impl ObjectStore for MemoryStore {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes(object)?;
        if buf.is_empty() {
            return Ok(()); // as a file does, wherever the offset
        }
        let rest = usize::try_from(offset).ok().and_then(|start| bytes.get(start..));
        let found = rest.and_then(|rest| rest.get(..buf.len()));
        let found =
            found.ok_or_else(|| too_short(&format!("object {}", object.0), offset, buf.len()))?;
        buf.copy_from_slice(found);
        self.read.fetch_add(found.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        Ok(self.bytes(object)?.len() as u64)
    }
}
