//! The serving half of reads over a link: answers requests for ranges of one store's objects.
//!
//! Owns the order of work and the memory that answers may hold. Leaves the layout of frames to [`super::wire`], and who
//! may connect to whoever calls [`serve`].
//!
//! The calling thread reads requests, workers read from the store, one more thread writes answers. What somebody waits
//! for goes before what somebody may want later, at the store and on the wire; and one worker is always left for it.

use std::collections::VecDeque;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::ObjectStore;
use super::wire::{self, Ask, AskedRange, Carries, GREETING, Header, MAX_OPEN, MAX_TEXT, Request};
use crate::buffers::{Buffer, Buffers};

/// Bytes of answers that may wait for the link before no more are read for later use.
const LATER_BACKLOG: usize = 1024 * 1024;
/// The same for answers that somebody waits for.
const URGENT_BACKLOG: usize = 2 * LATER_BACKLOG;
/// Answers up to this length are written together.
const SMALL: usize = 16 * 1024;
/// Bytes of small answers that are written at once.
const BATCH: usize = 64 * 1024;

/// Answers requests for ranges of `store`'s objects that come from `input` until that ends, with `threads` (at least
/// one) threads that read from the store. Memory stays below about 3 MiB and 256 KiB per thread, whatever is asked.
///
/// Returns when `input` ends; requests without an answer then get none. It may take until the reads just going on, and
/// the write of an answer, are through. An `output` that breaks is noticed with the next request: a
/// [`RemoteStore`](super::RemoteStore) sends one every few seconds.
///
/// # Errors
/// As `input` and `output` say; `InvalidData` if the other side breaks the protocol. An error of the store fails only
/// the read that met it: the other side gets its kind and text.
pub fn serve(
    store: Arc<dyn ObjectStore>,
    input: impl Read + Send,
    output: impl Write + Send,
    threads: usize,
) -> io::Result<()> {
    let threads = threads.max(1);
    let desk = Desk::new(store, threads);
    let (read, written) = thread::scope(|scope| {
        let writer = scope.spawn(|| desk.write_answers(output));
        for _ in 0..threads {
            scope.spawn(|| desk.work());
        }
        let read = desk.take_requests(input);
        desk.end();
        (read, writer.join())
    });
    let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // A broken output is the cause; that no more requests were read is only what follows.
    written.and(read)
}

/// Where requests wait for a worker, and answers for the writer.
struct Desk {
    store: Arc<dyn ObjectStore>,
    buffers: Arc<Buffers>,
    later_workers: usize,
    tray: Mutex<Tray>,
    /// There is a request that may be worked on, or the end.
    work: Condvar,
    /// There is something to write, or the end.
    answers: Condvar,
}

#[derive(Default)]
struct Tray {
    urgent: VecDeque<Request>,
    later: VecDeque<Request>,
    /// Workers that now read for later use.
    busy_for_later: usize,
    /// Requests that were taken, and whose answer was not yet taken by the writer.
    open: usize,
    answers: Answers,
    ended: bool,
}

/// Finished answers, each a whole frame.
#[derive(Default)]
struct Answers {
    urgent: VecDeque<Buffer>,
    later: VecDeque<Buffer>,
    bytes: usize,
    /// The newest ping without an answer; older ones need none.
    ping: Option<u64>,
}

impl Desk {
    fn new(store: Arc<dyn ObjectStore>, threads: usize) -> Self {
        Self {
            store,
            buffers: Buffers::of(wire::MAX_ANSWER),
            later_workers: (threads - 1).max(1),
            tray: Mutex::default(),
            work: Condvar::new(),
            answers: Condvar::new(),
        }
    }

    fn tray(&self) -> MutexGuard<'_, Tray> {
        self.tray.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.tray().ended = true;
        self.work.notify_all();
        self.answers.notify_all();
    }

    /// Reads requests until the input or the connection ends.
    fn take_requests(&self, input: impl Read) -> io::Result<()> {
        let mut input = BufReader::new(input);
        let mut greeting = [0; GREETING.len()];
        input.read_exact(&mut greeting)?;
        wire::check_greeting(greeting)?;
        let mut frame = [0; Request::SIZE];
        while read_frame(&mut input, &mut frame)? {
            let request = Request::decode(&frame)?;
            let mut tray = self.tray();
            if tray.ended {
                break;
            }
            match request.ask {
                Ask::Ping => {
                    tray.answers.ping = Some(request.number);
                    self.answers.notify_one();
                    continue;
                }
                Ask::UpTo(_) => tray.later.push_back(request),
                Ask::Exact(_) | Ask::Length(_) => tray.urgent.push_back(request),
            }
            tray.open += 1;
            if tray.open > MAX_OPEN {
                return Err(wire::broken(format!("more than {MAX_OPEN} requests at a time")));
            }
            drop(tray);
            self.work.notify_one();
        }
        Ok(())
    }

    /// Answers request after request until the end.
    fn work(&self) {
        while let Some(request) = self.next_request() {
            let answer = self.answer(&request);
            let mut tray = self.tray();
            tray.answers.bytes += answer.len();
            if matches!(request.ask, Ask::UpTo(_)) {
                tray.busy_for_later -= 1;
                tray.answers.later.push_back(answer);
            } else {
                tray.answers.urgent.push_back(answer);
            }
            drop(tray);
            self.answers.notify_one();
        }
    }

    /// Waits for a request for whose answer there is room.
    fn next_request(&self) -> Option<Request> {
        let mut tray = self.tray();
        loop {
            if tray.ended {
                return None;
            }
            let waiting = tray.answers.bytes;
            if waiting < URGENT_BACKLOG && !tray.urgent.is_empty() {
                return tray.urgent.pop_front();
            }
            if waiting < LATER_BACKLOG
                && tray.busy_for_later < self.later_workers
                && !tray.later.is_empty()
            {
                tray.busy_for_later += 1;
                return tray.later.pop_front();
            }
            tray = self.work.wait(tray).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn answer(&self, request: &Request) -> Buffer {
        let answer = match request.ask {
            Ask::Exact(range) => self.read(request.number, range),
            Ask::UpTo(range) => {
                let length = self.store.length(range.object);
                length.and_then(|length| self.read(request.number, clipped(range, length)))
            }
            Ask::Length(object) => {
                let length = self.store.length(object);
                length.map(|length| {
                    self.frame(request.number, Carries::Length, &length.to_le_bytes())
                })
            }
            Ask::Ping => Ok(self.frame(request.number, Carries::Pong, &[])),
        };
        answer.unwrap_or_else(|err| {
            let text = err.to_string();
            let text = &text.as_bytes()[..text.len().min(MAX_TEXT)];
            self.frame(request.number, Carries::Error(err.kind()), text)
        })
    }

    /// Reads a range into an answer; the bytes are not copied again before they are written.
    fn read(&self, number: u64, range: AskedRange) -> io::Result<Buffer> {
        let mut frame = self.buffers.take(Header::SIZE + range.length as usize);
        self.store.read_exact_at(range.object, range.offset, &mut frame[Header::SIZE..])?;
        let header = Header { number, carries: Carries::Bytes, length: range.length };
        frame[..Header::SIZE].copy_from_slice(&header.encode());
        Ok(frame)
    }

    /// Makes an answer of a few bytes.
    fn frame(&self, number: u64, carries: Carries, bytes: &[u8]) -> Buffer {
        let mut frame = self.buffers.take(Header::SIZE + bytes.len());
        let header = Header { number, carries, length: bytes.len() as u32 };
        frame[..Header::SIZE].copy_from_slice(&header.encode());
        frame[Header::SIZE..].copy_from_slice(bytes);
        frame
    }

    /// Writes answers until the end, or until the output breaks: then nothing more is worth doing.
    fn write_answers(&self, mut output: impl Write) -> io::Result<()> {
        let mut batch = GREETING.to_vec();
        let mut large = None;
        loop {
            let written = write_out(&mut output, &batch, large.take());
            if written.is_err() {
                self.end();
                return written;
            }
            batch.clear();
            let mut tray = self.tray();
            while !tray.ended && tray.answers.is_empty() {
                tray = self.answers.wait(tray).unwrap_or_else(PoisonError::into_inner);
            }
            if tray.ended {
                return Ok(());
            }
            let was_full = tray.answers.bytes >= LATER_BACKLOG;
            large = tray.take_answers(&mut batch);
            drop(tray);
            if was_full {
                self.work.notify_all();
            }
        }
    }
}

impl Tray {
    /// Takes small answers into `batch`, up to the first large one, which is returned.
    fn take_answers(&mut self, batch: &mut Vec<u8>) -> Option<Buffer> {
        if let Some(number) = self.answers.ping.take() {
            let pong = Header { number, carries: Carries::Pong, length: 0 };
            batch.extend_from_slice(&pong.encode());
        }
        while batch.len() < BATCH {
            let answer = self.answers.pop()?;
            self.open -= 1;
            if answer.len() > SMALL {
                return Some(answer);
            }
            batch.extend_from_slice(&answer);
        }
        None
    }
}

impl Answers {
    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.later.is_empty() && self.ping.is_none()
    }

    fn pop(&mut self) -> Option<Buffer> {
        let answer = self.urgent.pop_front().or_else(|| self.later.pop_front())?;
        self.bytes -= answer.len();
        Some(answer)
    }
}

fn write_out(output: &mut impl Write, batch: &[u8], large: Option<Buffer>) -> io::Result<()> {
    output.write_all(batch)?;
    if let Some(large) = large {
        output.write_all(&large)?;
    }
    output.flush()
}

/// The part of a range that lies in an object of `length` bytes.
fn clipped(range: AskedRange, length: u64) -> AskedRange {
    let left = length.saturating_sub(range.offset).min(u64::from(range.length));
    AskedRange { length: left as u32, ..range }
}

/// Fills `frame`; false if the input ended before its first byte.
fn read_frame(input: &mut impl Read, frame: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < frame.len() {
        match input.read(&mut frame[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStore;
    use super::*;
    use crate::map::ObjectId;

    fn requests(count: u64) -> Vec<u8> {
        let range = AskedRange { object: ObjectId(0), offset: 0, length: 1 };
        let one = |number| Request { number, ask: Ask::Exact(range) }.encode();
        GREETING.into_iter().chain((0..count).flat_map(one)).collect()
    }

    #[test]
    fn no_more_requests_are_taken_than_may_be_open() {
        for (count, taken) in [(MAX_OPEN, true), (MAX_OPEN + 1, false)] {
            let desk = Desk::new(Arc::new(MemoryStore::default()), 1);
            let result = desk.take_requests(&requests(count as u64)[..]);
            assert_eq!(result.is_ok(), taken, "{count}: {result:?}");
        }
    }

    #[test]
    fn what_somebody_waits_for_goes_first_and_a_worker_is_left_for_it() {
        let range = AskedRange { object: ObjectId(0), offset: 0, length: 1 };
        let desk = Desk::new(Arc::new(MemoryStore::default()), 3);
        let asks = [Ask::UpTo(range), Ask::UpTo(range), Ask::UpTo(range), Ask::Exact(range)];
        let frames = asks.iter().zip(0..).map(|(ask, number)| Request { number, ask: *ask });
        let bytes: Vec<u8> =
            GREETING.into_iter().chain(frames.flat_map(|frame| frame.encode())).collect();
        desk.take_requests(&bytes[..]).unwrap();
        let taken = [(); 3].map(|()| desk.next_request().map(|request| request.number));
        assert_eq!(taken, [Some(3), Some(0), Some(1)]);
        let tray = desk.tray();
        assert_eq!((tray.busy_for_later, tray.later.len()), (2, 1), "the third worker waits");
    }
}
