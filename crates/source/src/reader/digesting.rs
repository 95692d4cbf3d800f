//! A file's digest, which runs along while the file is decoded.
//!
//! SHA-1 takes as long as decoding; so where several chunks are decoded in a row, a thread of the reader hashes them
//! while the next ones are decoded. That thread is an offer: whoever finds it too slow, or needs the result, hashes what
//! waits himself. Start at [`Digesting::take_beside`].

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use super::lock;
use crate::buffers::Buffer;
use crate::digest::Hasher;
use crate::map::Digest;

/// Chunks of one file that may wait for being hashed.
const LONGEST_BACKLOG: usize = 32;

/// A digest over bytes that come in order.
#[derive(Clone)]
pub(super) struct Digesting(Arc<Shared>);

struct Shared {
    /// Locked by whoever hashes; taken before `waiting`.
    hasher: Mutex<Hasher>,
    /// Chunks whose turn has not come.
    waiting: Mutex<VecDeque<Arc<Buffer>>>,
}

impl Digesting {
    pub(super) fn new(hasher: Hasher) -> Self {
        Self(Arc::new(Shared { hasher: Mutex::new(hasher), waiting: Mutex::default() }))
    }

    /// Adds bytes; they are hashed on return.
    pub(super) fn take(&self, bytes: &[u8]) {
        let mut hasher = lock(&self.0.hasher);
        self.take_waiting(&mut hasher);
        hasher.update(bytes);
    }

    /// Adds a chunk, to be hashed by the helper if it is in time for it.
    pub(super) fn take_beside(&self, chunk: &Arc<Buffer>, helper: &Helper) {
        let backlog = {
            let mut waiting = lock(&self.0.waiting);
            waiting.push_back(Arc::clone(chunk));
            waiting.len()
        };
        let left_to_us = if backlog == 1 { !helper.call(self) } else { backlog > LONGEST_BACKLOG };
        if left_to_us {
            self.take_waiting(&mut lock(&self.0.hasher));
        }
    }

    /// Returns the digest over all that was added.
    pub(super) fn finish(self) -> Digest {
        let mut hasher = lock(&self.0.hasher);
        self.take_waiting(&mut hasher);
        hasher.clone().finish()
    }

    fn take_waiting(&self, hasher: &mut Hasher) {
        while let Some(chunk) = { lock(&self.0.waiting).pop_front() } {
            hasher.update(&chunk);
        }
    }
}

/// A thread that hashes for all files of a reader; several files at once keep the processors busy without it.
#[derive(Default)]
pub(super) struct Helper(OnceLock<Sender<Digesting>>);

impl Helper {
    /// Asks for help; the thread is started by the first who does. `false`: there is none.
    fn call(&self, digesting: &Digesting) -> bool {
        let start = || {
            let (sender, receiver) = channel();
            // If it cannot be started, the receiver is gone and every call says so.
            let _ = thread::Builder::new().name("digest".into()).spawn(|| help(receiver));
            sender
        };
        self.0.get_or_init(start).send(digesting.clone()).is_ok()
    }
}

fn help(files: Receiver<Digesting>) {
    for file in files {
        file.take_waiting(&mut lock(&file.0.hasher));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    #[test]
    fn the_digest_is_that_of_the_bytes_in_order() {
        let buffers = Buffers::of(1 << 10);
        let expected = Digest::Crc32c(0);
        let mut plain = Hasher::like(&expected).unwrap();
        let digesting = Digesting::new(plain.clone());
        let helper = Helper::default();
        for number in 0..20 * LONGEST_BACKLOG {
            let mut chunk = buffers.take(1 << 10);
            chunk.fill(number as u8);
            plain.update(&chunk);
            match number % 7 {
                0 => digesting.take(&chunk),
                _ => digesting.take_beside(&Arc::new(chunk), &helper),
            }
            assert!(lock(&digesting.0.waiting).len() <= LONGEST_BACKLOG);
        }
        assert_eq!(digesting.finish(), plain.finish());
    }

    #[test]
    fn a_helper_that_does_not_come_is_not_missed() {
        let buffers = Buffers::of(1 << 10);
        let (sender, receiver) = channel();
        drop(receiver);
        let helper = Helper(OnceLock::from(sender));
        let mut plain = Hasher::like(&Digest::Sha1([0; 20])).unwrap();
        let digesting = Digesting::new(plain.clone());
        for number in 0..8_u8 {
            let mut chunk = buffers.take(1 << 10);
            chunk.fill(number);
            plain.update(&chunk);
            digesting.take_beside(&Arc::new(chunk), &helper);
            assert!(lock(&digesting.0.waiting).is_empty(), "memory is not held for nobody");
        }
        assert_eq!(digesting.finish(), plain.finish());
    }
}
