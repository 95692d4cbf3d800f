//! Buffers for bytes that come and go; those of a usual length are used again instead of being made, zeroed and given back.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of idle buffers that are kept.
const KEPT: usize = 4 << 20;

/// Idle buffers.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// Bytes of each.
    usual: usize,
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Bytes of a length chosen when it was taken; what they are at first is not defined.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    home: Arc<Buffers>,
}

impl Buffers {
    /// Returns a place for buffers that have `usual` bytes as a rule.
    pub(crate) fn of(usual: usize) -> Arc<Self> {
        Arc::new(Self { usual, idle: Mutex::default() })
    }

    /// Returns a buffer of `length` bytes; lengths that the usual one does not suit get a buffer of their own.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let usual = length > self.usual / 2 && length <= self.usual;
        let idle = if usual { self.idle().pop() } else { None };
        let bytes = idle.unwrap_or_else(|| vec![0; if usual { self.usual } else { length }]);
        Buffer { bytes, length, home: Arc::clone(self) }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Bytes of memory that it holds.
    pub(crate) fn memory(&self) -> u64 {
        self.bytes.capacity() as u64
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.len() == self.home.usual {
            let mut idle = self.home.idle();
            if idle.len() < KEPT / self.home.usual {
                idle.push(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_a_usual_length_are_used_again() {
        const USUAL: usize = 256 << 10;
        let home = Buffers::of(USUAL);
        let mut first = home.take(USUAL);
        first.fill(7);
        let place = first.as_ptr();
        drop(first);
        let again = home.take(USUAL - 100);
        assert_eq!((again.as_ptr(), again.len()), (place, USUAL - 100));
        let many: Vec<_> = (0..3 * KEPT / USUAL).map(|_| home.take(USUAL)).collect();
        drop((many, home.take(10), home.take(2 * USUAL)));
        assert_eq!(home.idle().len(), KEPT / USUAL);
    }
}
