//! What a [`RemoteStore`](super::RemoteStore) asked for, what it has, and what is still to be sent.
//!
//! Owns the requests without an answer and the ranges that are here; has no I/O and no threads, everything happens under
//! the store's one lock. Leaves sending and receiving to [`super::connection`]. Start at [`State::cover`].
//!
//! A request lives from [`State::cover`] or [`State::ask_length`] to its answer, over any number of connections: what a
//! broken connection left without an answer is sent again on the next one. Read-ahead is not: it is withdrawn, and who
//! waits for a part of it asks for that part.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::super::wire::{self, Ask, AskedRange, MAX_OPEN, MAX_RANGE, Request};
use super::ahead::Streams;
use super::extents::{Extent, Extents};
use super::promise::{Failure, Outcome, Promise};
use crate::buffers::Buffer;
use crate::map::ObjectId;

/// Requests without an answer, and ranges that are here.
#[derive(Debug)]
pub(super) struct State {
    open: BTreeMap<u64, Open>,
    /// Numbers of requests to send: first those that somebody waits for.
    urgent: VecDeque<u64>,
    later: VecDeque<u64>,
    /// Requests that were sent on this connection and have no answer.
    sent: usize,
    next_number: u64,
    extents: Extents,
    streams: Streams,
    /// Lengths of objects, as far as they were met: nothing is read ahead behind them.
    lengths: HashMap<ObjectId, u64>,
}

/// A request without an answer.
#[derive(Debug)]
struct Open {
    target: Target,
    sent: bool,
}

/// What an answer is for.
#[derive(Debug, Clone)]
enum Target {
    Range(Arc<Extent>),
    Length(ObjectId, Arc<Promise<u64>>),
}

/// Ranges that were forgotten, to be dropped without the lock.
pub(super) type Forgotten = Vec<Arc<Extent>>;

impl State {
    /// Keeps about `cache_bytes` of stored bytes, half of it for read-ahead.
    pub(super) fn new(cache_bytes: u64) -> Self {
        Self {
            open: BTreeMap::new(),
            urgent: VecDeque::new(),
            later: VecDeque::new(),
            sent: 0,
            next_number: 1,
            extents: Extents::new(cache_bytes),
            streams: Streams::new(cache_bytes / 2),
            lengths: HashMap::new(),
        }
    }

    /// Returns the ranges, in order, that together hold `range` of `object`; asks for those that are not here, and for
    /// what will probably be read next.
    pub(super) fn cover(&mut self, object: ObjectId, range: Range<u64>) -> Vec<Arc<Extent>> {
        let mut found = Vec::new();
        let mut at = range.start;
        let mut missed = false;
        while at < range.end {
            if let Some(extent) = self.extents.at(object, at) {
                at = extent.end();
                found.push(extent);
                continue;
            }
            missed = true;
            let gap = self.extents.gaps(object, at..range.end).into_iter().next();
            let gap_end = gap.map_or(range.end, |gap| gap.end);
            while at < gap_end {
                let extent = self.ask_range(object, at..gap_end, false);
                at = extent.end();
                found.push(extent);
            }
        }
        if let Some(ahead) = self.streams.note(object, &range, missed) {
            self.read_ahead(object, ahead);
        }
        found
    }

    fn read_ahead(&mut self, object: ObjectId, mut range: Range<u64>) {
        if let Some(length) = self.lengths.get(&object) {
            range.end = range.end.min(*length);
        }
        for mut gap in self.extents.gaps(object, range) {
            while !gap.is_empty() {
                gap.start = self.ask_range(object, gap.clone(), true).end();
            }
        }
    }

    /// Asks for as much of `range` as one request can.
    fn ask_range(&mut self, object: ObjectId, range: Range<u64>, ahead: bool) -> Arc<Extent> {
        let length = (range.end - range.start).min(u64::from(MAX_RANGE)) as u32;
        let number = self.next_number;
        let bytes = Promise::new();
        let extent = Arc::new(Extent { object, start: range.start, length, ahead, number, bytes });
        self.extents.insert(Arc::clone(&extent));
        self.ask(Target::Range(Arc::clone(&extent)));
        extent
    }

    /// Asks for an object's length; returns the request's number, too.
    pub(super) fn ask_length(&mut self, object: ObjectId) -> (u64, Arc<Promise<u64>>) {
        let promise = Arc::new(Promise::new());
        let number = self.ask(Target::Length(object, Arc::clone(&promise)));
        (number, promise)
    }

    fn ask(&mut self, target: Target) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let queue = if target.is_ahead() { &mut self.later } else { &mut self.urgent };
        queue.push_back(number);
        self.open.insert(number, Open { target, sent: false });
        number
    }

    /// Withdraws a request whose waiter waited too long: others that wait for it ask again, and wait on.
    pub(super) fn give_up(&mut self, number: u64) {
        let Some(open) = self.open.get(&number) else { return };
        let (target, sent) = (open.target.clone(), open.sent);
        self.withdraw(&target);
        if !sent {
            self.open.remove(&number); // an answer to one that was sent may still come
        }
    }

    fn withdraw(&mut self, target: &Target) {
        match target {
            Target::Range(extent) => {
                self.extents.remove(extent);
                extent.bytes.settle(Outcome::Withdrawn);
            }
            Target::Length(_, promise) => promise.settle(Outcome::Withdrawn),
        }
    }

    /// There is a request that may be sent now.
    pub(super) fn has_unsent(&self) -> bool {
        self.sent < MAX_OPEN && !(self.urgent.is_empty() && self.later.is_empty())
    }

    /// Appends the requests that may be sent now to `batch`; returns how many.
    pub(super) fn take_unsent(&mut self, batch: &mut Vec<u8>) -> u64 {
        let mut count = 0;
        while self.sent < MAX_OPEN {
            let next = self.urgent.pop_front().or_else(|| self.later.pop_front());
            let Some(number) = next else { break };
            let Some(open) = self.open.get_mut(&number) else { continue }; // given up
            open.sent = true;
            self.sent += 1;
            batch.extend_from_slice(&Request { number, ask: open.target.ask() }.encode());
            count += 1;
        }
        count
    }

    /// Checks that an answer of `length` bytes may come for a request.
    ///
    /// # Errors
    /// `InvalidData` if no such request was sent, or its answer has another length.
    pub(super) fn expect_bytes(&self, number: u64, length: u32) -> io::Result<()> {
        let fits = match &self.sent(number)?.target {
            Target::Range(extent) if extent.ahead => length <= extent.length,
            Target::Range(extent) => length == extent.length,
            Target::Length(..) => false,
        };
        if fits { Ok(()) } else { Err(wire::broken("an answer that was not asked for")) }
    }

    fn sent(&self, number: u64) -> io::Result<&Open> {
        let unknown = || wire::broken(format!("an answer to request {number}, which is not open"));
        self.open.get(&number).filter(|open| open.sent).ok_or_else(unknown)
    }

    fn answered(&mut self, number: u64) -> io::Result<Target> {
        let target = self.sent(number)?.target.clone();
        self.open.remove(&number);
        self.sent -= 1;
        Ok(target)
    }

    /// Takes the answer to a request for a range.
    ///
    /// # Errors
    /// As [`State::expect_bytes`].
    pub(super) fn bytes_arrived(&mut self, number: u64, bytes: Buffer) -> io::Result<Forgotten> {
        self.expect_bytes(number, bytes.len() as u32)?;
        let Target::Range(extent) = self.answered(number)? else { return Ok(Vec::new()) };
        let (length, memory) = (bytes.len() as u64, bytes.memory());
        if length < u64::from(extent.length) {
            self.note_length(extent.object, extent.start + length);
        }
        extent.bytes.settle(Outcome::Done(bytes));
        if length == 0 {
            self.extents.remove(&extent); // holds nothing
        }
        Ok(self.extents.arrived(&extent, memory))
    }

    /// Takes the answer to a request for a length.
    ///
    /// # Errors
    /// `InvalidData` if no such request was sent.
    pub(super) fn length_arrived(&mut self, number: u64, length: u64) -> io::Result<()> {
        match self.answered(number)? {
            Target::Length(object, promise) => {
                self.note_length(object, length);
                promise.settle(Outcome::Done(length));
                Ok(())
            }
            Target::Range(extent) => {
                self.withdraw(&Target::Range(extent));
                Err(wire::broken("a length instead of a range"))
            }
        }
    }

    /// Takes an error as answer. One met by read-ahead is left to the read that wants those bytes.
    ///
    /// # Errors
    /// `InvalidData` if no such request was sent.
    pub(super) fn error_arrived(&mut self, number: u64, failure: Failure) -> io::Result<()> {
        let target = self.answered(number)?;
        match &target {
            Target::Range(extent) if extent.ahead => {
                self.streams.forget(extent.object);
                self.withdraw(&target);
            }
            Target::Range(extent) => {
                self.extents.remove(extent);
                extent.bytes.settle(Outcome::Failed(failure));
            }
            Target::Length(_, promise) => promise.settle(Outcome::Failed(failure)),
        }
        Ok(())
    }

    fn note_length(&mut self, object: ObjectId, length: u64) {
        self.lengths.insert(object, length);
    }

    /// The connection broke: what was sent has to be sent again, oldest first; read-ahead is withdrawn.
    pub(super) fn connection_lost(&mut self) {
        self.sent = 0;
        self.urgent.clear();
        self.later.clear();
        for (number, mut open) in std::mem::take(&mut self.open) {
            if open.target.is_ahead() {
                self.withdraw(&open.target);
            } else if !open.target.is_settled() {
                open.sent = false;
                self.urgent.push_back(number);
                self.open.insert(number, open);
            }
        }
    }

    /// Lets everybody who waits look around.
    pub(super) fn wake_all(&self) {
        for open in self.open.values() {
            match &open.target {
                Target::Range(extent) => extent.bytes.wake(),
                Target::Length(_, promise) => promise.wake(),
            }
        }
    }
}

impl Target {
    fn is_ahead(&self) -> bool {
        matches!(self, Self::Range(extent) if extent.ahead)
    }

    /// Nobody waits for it any more.
    fn is_settled(&self) -> bool {
        match self {
            Self::Range(extent) => extent.bytes.outcome().is_some(),
            Self::Length(_, promise) => promise.outcome().is_some(),
        }
    }

    fn ask(&self) -> Ask {
        match self {
            Self::Length(object, _) => Ask::Length(*object),
            Self::Range(extent) => {
                let (object, offset, length) = (extent.object, extent.start, extent.length);
                let range = AskedRange { object, offset, length };
                if extent.ahead { Ask::UpTo(range) } else { Ask::Exact(range) }
            }
        }
    }
}
