//! Buffers for stored bytes on their way; large ones are used again instead of being made, zeroed and given back.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::wire::{Header, MAX_RANGE};

/// Bytes of a large buffer: the longest answer with its header.
const LARGE: usize = MAX_RANGE as usize + Header::SIZE;
/// Idle large buffers that are kept, about 4 MiB.
const KEPT: usize = 16;

/// Idle large buffers.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Bytes of a length chosen when it was taken; what they are at first is not defined.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    home: Arc<Buffers>,
}

impl Buffers {
    /// Returns a buffer of `length` bytes; lengths that large buffers do not suit get a buffer of their own.
    pub(super) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let large = length > LARGE / 2 && length <= LARGE;
        let idle = if large { self.idle().pop() } else { None };
        let bytes = idle.unwrap_or_else(|| vec![0; if large { LARGE } else { length }]);
        Buffer { bytes, length, home: Arc::clone(self) }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Bytes of memory that it holds.
    pub(super) fn memory(&self) -> u64 {
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
        if bytes.len() == LARGE {
            let mut idle = self.home.idle();
            if idle.len() < KEPT {
                idle.push(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_used_again() {
        let home = Arc::new(Buffers::default());
        let mut first = home.take(LARGE);
        first.fill(7);
        let place = first.as_ptr();
        drop(first);
        let again = home.take(LARGE - 100);
        assert_eq!((again.as_ptr(), again.len()), (place, LARGE - 100));
        let many: Vec<_> = (0..3 * KEPT).map(|_| home.take(LARGE)).collect();
        drop((many, home.take(10), home.take(2 * LARGE)));
        assert_eq!(home.idle().len(), KEPT);
    }
}
