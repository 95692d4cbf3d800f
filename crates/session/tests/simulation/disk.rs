//! A journal's file on a disk that forgets, in a power failure, what was not synced.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use pgthaw_session::journal::JournalFile;

use crate::random::Random;

/// The file of one session; it outlives the processes that open it.
#[derive(Debug, Clone, Default)]
pub struct Disk(Rc<RefCell<Content>>);

#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    /// Bytes that a power failure leaves.
    durable: usize,
    owner: Option<u32>,
    /// The process dies in this many syncs, before one is done.
    dies_in: Option<u32>,
    /// Left out on purpose: syncs of a record that contains this.
    unsynced: Option<&'static str>,
    /// Left out on purpose: the lock.
    unlocked: bool,
}

impl Disk {
    /// Leaves out the sync of every record that contains `text`.
    pub fn without_sync_of(self, text: &'static str) -> Self {
        self.0.borrow_mut().unsynced = Some(text);
        self
    }

    /// Lets anybody have the lock.
    pub fn without_lock(self) -> Self {
        self.0.borrow_mut().unlocked = true;
        self
    }

    /// The file as the process `number` opens it.
    pub fn open(&self, number: u32) -> Opened {
        Opened { disk: self.clone(), number }
    }

    /// Lets a process die in `syncs` syncs from now: what it has just written is there, but not for sure.
    pub fn die_in(&self, syncs: u32) {
        self.0.borrow_mut().dies_in = Some(syncs);
    }

    /// The power fails: of what was not synced any part may be left.
    pub fn lose_power(&self, random: &mut Random) {
        let mut content = self.0.borrow_mut();
        let unsynced = content.bytes.len() - content.durable;
        let left = content.durable + random.below(unsynced as u64 + 1) as usize;
        content.bytes.truncate(left);
        content.durable = left;
    }

    /// What a reader sees.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.borrow().bytes.clone()
    }
}

/// The file, as one process has it open. The lock ends with it.
#[derive(Debug)]
pub struct Opened {
    disk: Disk,
    number: u32,
}

impl JournalFile for Opened {
    fn lock(&self) -> io::Result<bool> {
        let mut content = self.disk.0.borrow_mut();
        let free = content.owner.is_none() || content.unlocked;
        if free {
            content.owner = Some(self.number);
        }
        Ok(free)
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.disk.bytes())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.0.borrow_mut().bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        let mut content = self.disk.0.borrow_mut();
        content.bytes.truncate(length as usize);
        content.durable = content.durable.min(length as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut content = self.disk.0.borrow_mut();
        match &mut content.dies_in {
            Some(0) => {
                content.dies_in = None;
                return Err(io::Error::other("the process dies"));
            }
            Some(syncs) => *syncs -= 1,
            None => {}
        }
        let last =
            content.bytes[content.durable..].split_inclusive(|&byte| byte == b'\n').next_back();
        let last = String::from_utf8_lossy(last.unwrap_or_default());
        if !content.unsynced.is_some_and(|left_out| last.contains(left_out)) {
            content.durable = content.bytes.len();
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut content = self.disk.0.borrow_mut();
        if content.owner == Some(self.number) {
            content.owner = None;
        }
    }
}
