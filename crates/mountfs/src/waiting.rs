//! The queue of reads and writes that need the lower and cannot be answered at once.
//!
//! A worker takes a job but leaves its reply in the queue's care: so [`Waiting::close`] can answer
//! everybody, also those whose worker is stuck in the lower.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};

use crate::file::{File, locked};
use crate::{Ino, Result};

/// Called once with the bytes read.
pub(crate) type ReadReply = Box<dyn for<'a> FnOnce(Result<&'a [u8]>) + Send>;
/// Called once when the work is done.
pub(crate) type DoneReply = Box<dyn FnOnce(Result<()>) + Send>;

pub(crate) enum Reply {
    Read(ReadReply),
    Done(DoneReply),
}

/// What is to be done.
pub(crate) enum Work {
    Read { length: usize },
    Write { bytes: Vec<u8> },
    Zero { length: u64, grow: bool },
}

/// Where it is to be done.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) ino: Ino,
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
}

/// A job that a worker has taken; `ticket` brings back its reply.
pub(crate) struct Taken {
    pub(crate) ticket: u64,
    pub(crate) target: Target,
    pub(crate) work: Work,
}

#[derive(Default)]
pub(crate) struct Waiting {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    closed: bool,
    next_ticket: u64,
    jobs: VecDeque<(u64, Target, Work)>,
    /// Of all jobs, queued or taken, that have no answer yet.
    replies: HashMap<u64, (Target, Reply)>,
}

impl Waiting {
    /// Queues a job, or gives its reply back if the queue is closed.
    pub(crate) fn push(
        &self,
        target: Target,
        work: Work,
        reply: Reply,
    ) -> std::result::Result<(), Reply> {
        let mut queue = locked(self.queue.lock());
        if queue.closed {
            return Err(reply);
        }
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.replies.insert(ticket, (target.clone(), reply));
        queue.jobs.push_back((ticket, target, work));
        self.arrived.notify_one();
        Ok(())
    }

    /// Waits for a job; `None` when the queue is closed.
    pub(crate) fn take(&self) -> Option<Taken> {
        let mut queue = locked(self.queue.lock());
        loop {
            if queue.closed {
                return None;
            }
            if let Some((ticket, target, work)) = queue.jobs.pop_front() {
                return Some(Taken { ticket, target, work });
            }
            queue = locked(self.arrived.wait(queue));
        }
    }

    /// Returns the reply of a taken job, unless it was answered by [`Waiting::close`].
    pub(crate) fn reply_of(&self, ticket: u64) -> Option<Reply> {
        locked(self.queue.lock()).replies.remove(&ticket).map(|(_, reply)| reply)
    }

    /// Closes the queue for good and returns everything that has no answer yet.
    pub(crate) fn close(&self) -> Vec<(Target, Reply)> {
        let mut queue = locked(self.queue.lock());
        queue.closed = true;
        queue.jobs.clear();
        self.arrived.notify_all();
        queue.replies.drain().map(|(_, unanswered)| unanswered).collect()
    }
}
