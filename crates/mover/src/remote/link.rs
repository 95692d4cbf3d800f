//! One living connection: threads that read, write and keep it alive, with queues between them and whoever works.
//!
//! Nobody who works ever waits in a read or write of the connection itself: queues have limits and can be closed. A link
//! ends once, with a reason; what has arrived before can still be taken.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::{Connection, Heartbeat};
use super::frame;
use super::queue::{Popped, Queue};
use super::throttle::Throttled;

/// Most messages that wait between two threads. With chunks of 1 MiB, what is queued stays well below the window.
const QUEUE: usize = 8;
/// Bytes that small frames are gathered into before they are written.
const BUFFER: usize = 128 << 10;
/// A head longer than this is handed over before the next frame is read.
const LONG_HEAD: usize = 1 << 20;
/// Buffers for chunks that are kept for the next ones.
const SPARE: usize = 2 * QUEUE;
/// Means that nobody is waiting in a read.
const NOT_READING: u64 = u64::MAX;

/// A message of the protocol, in one of its directions.
pub(super) trait Message: Serialize + Send + 'static {
    /// The sign of life.
    const PING: Self;

    /// Whether it is a sign of life.
    fn is_ping(&self) -> bool;
}

/// A connection at work; sends `S`, receives `R`.
pub(super) struct Link<S, R> {
    incoming: Queue<(R, Vec<u8>)>,
    outgoing: Queue<(S, Vec<u8>)>,
    ended: Mutex<Option<String>>,
    woken: Condvar,
    close: Arc<dyn Fn() + Send + Sync>,
    /// Whether bytes per second are limited.
    limited: bool,
    begun: Instant,
    /// Milliseconds after `begun` at which the read that is being waited for began.
    reading_since: AtomicU64,
    spare: Mutex<Vec<Vec<u8>>>,
}

/// The link has ended; [`Link::reason`] says why.
#[derive(Debug)]
pub(super) struct Ended;

impl<S: Message, R: Message + DeserializeOwned> Link<S, R> {
    /// Starts the threads of a connection. `at_end` is called once, when it has ended, with the reason.
    pub(super) fn start(
        connection: Connection,
        heartbeat: Heartbeat,
        bytes_per_second: Option<NonZeroU64>,
        at_end: impl FnOnce(String) + Send + 'static,
    ) -> Arc<Self> {
        let Connection { input, output, close } = connection;
        let link = Arc::new(Self {
            incoming: Queue::new(QUEUE),
            outgoing: Queue::new(QUEUE),
            ended: Mutex::new(None),
            woken: Condvar::new(),
            close,
            limited: bytes_per_second.is_some(),
            begun: Instant::now(),
            reading_since: AtomicU64::new(NOT_READING),
            spare: Mutex::new(Vec::new()),
        });
        let reading = link.clone();
        thread::spawn(move || reading.end(reading.read_all(input)));
        let writing = link.clone();
        thread::spawn(move || {
            let output = Throttled::new(output, bytes_per_second);
            match writing.write_all(output) {
                Ok(()) => writing.end("closed"),
                Err(err) => writing.end(tell(err)),
            }
        });
        let watching = link.clone();
        thread::spawn(move || {
            watching.watch(heartbeat);
            at_end(watching.reason().unwrap_or_default());
        });
        link
    }

    /// Sends a message with its body, waiting for room up to `limit`; `false` if there was none.
    pub(super) fn send(
        &self,
        outgoing: &mut Option<(S, Vec<u8>)>,
        limit: Duration,
    ) -> Result<bool, Ended> {
        let Some(message) = outgoing.take() else { return Ok(true) };
        match self.outgoing.push(message, limit) {
            Ok(()) => Ok(true),
            Err(_) if self.outgoing.is_closed() => Err(Ended),
            Err(message) => {
                *outgoing = Some(message);
                Ok(false)
            }
        }
    }

    /// Whether the network is the slower part: messages wait, or it may not be used for as much as it could take.
    pub(super) fn is_behind(&self) -> bool {
        self.limited || self.outgoing.piles_up()
    }

    /// Sends a message without a body, however long it takes until there is room.
    pub(super) fn tell(&self, message: S) -> Result<(), Ended> {
        self.outgoing.push((message, Vec::new()), Duration::MAX).map_err(|_| Ended)
    }

    /// Takes the next message, waiting up to `limit`; `None` if none came.
    pub(super) fn receive(&self, limit: Duration) -> Result<Option<(R, Vec<u8>)>, Ended> {
        match self.incoming.pop(limit) {
            Popped::Item(message) => Ok(Some(message)),
            Popped::Nothing => Ok(None),
            Popped::Closed => Err(Ended),
        }
    }

    /// Ends it; only the first reason counts.
    pub(super) fn end(&self, reason: impl Into<String>) {
        self.lock_end().get_or_insert_with(|| reason.into());
        self.woken.notify_all();
        self.incoming.close();
        self.outgoing.close();
        (self.close)();
    }

    /// Ends it after what is queued was written, which may take up to `limit`.
    pub(super) fn finish(&self, limit: Duration) {
        self.outgoing.close(); // the writing thread ends it when nothing is left
        let ended = self.woken.wait_timeout_while(self.lock_end(), limit, |end| end.is_none());
        drop(ended);
        self.end("closed");
    }

    /// Returns why it has ended, if it has.
    pub(super) fn reason(&self) -> Option<String> {
        self.lock_end().clone()
    }

    /// Returns how long ago it began.
    pub(super) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Returns an empty buffer for a chunk, or one whose content no longer matters.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.lock_spare().pop().unwrap_or_default()
    }

    /// Gives a buffer back for the next chunk.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.lock_spare();
        if buffer.capacity() > 0 && spare.len() < SPARE {
            spare.push(buffer);
        }
    }

    /// Reads until the connection ends, and returns why it has.
    fn read_all(&self, input: Box<dyn Read + Send>) -> String {
        let mut input = BufReader::with_capacity(BUFFER, Watched { input, link: self });
        loop {
            let frame = match frame::read::<R>(&mut input, || self.buffer()) {
                Ok(frame) => frame,
                Err(err) => return tell(err),
            };
            if frame.message.is_ping() {
                continue;
            }
            if self.incoming.push((frame.message, frame.body), Duration::MAX).is_err() {
                return "closed".into();
            }
            if frame.head > LONG_HEAD {
                self.incoming.wait_empty();
            }
        }
    }

    /// Writes what is queued until the queue is closed.
    fn write_all(&self, output: impl Write) -> Result<(), frame::FrameError> {
        let mut output = BufWriter::with_capacity(BUFFER, output);
        loop {
            if self.outgoing.is_empty() {
                output.flush()?;
            }
            match self.outgoing.pop(Duration::MAX) {
                Popped::Item(_) if self.reason().is_some() => return Ok(()), // what is queued is lost
                Popped::Item((message, body)) => {
                    frame::write(&mut output, &frame::encode(&message)?, &body)?;
                    self.give_back(body);
                }
                Popped::Nothing => {}
                Popped::Closed => return Ok(output.flush()?),
            }
        }
    }

    /// Sends signs of life and waits for the peer's, until the link ends.
    fn watch(&self, heartbeat: Heartbeat) {
        // An eighth: late by that much at most.
        let look = heartbeat.every.min(heartbeat.silent / 8);
        let mut told = Instant::now();
        loop {
            let ended = self.woken.wait_timeout_while(self.lock_end(), look, |end| end.is_none());
            if ended.map_or_else(|poisoned| poisoned.into_inner().0, |(end, _)| end).is_some() {
                return;
            }
            if told.elapsed() >= heartbeat.every && self.outgoing.is_empty() {
                let _ = self.outgoing.push((S::PING, Vec::new()), Duration::ZERO);
                told = Instant::now();
            }
            let since = self.reading_since.load(Ordering::Acquire);
            if since != NOT_READING {
                let silent = self.age().saturating_sub(Duration::from_millis(since));
                if silent > heartbeat.silent {
                    self.end(format!("nothing came for {} s", heartbeat.silent.as_secs_f32()));
                }
            }
        }
    }

    fn lock_end(&self) -> MutexGuard<'_, Option<String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_spare(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes when a read begins, so that a silent peer can be told from a busy reader.
struct Watched<'a, S, R> {
    input: Box<dyn Read + Send>,
    link: &'a Link<S, R>,
}

impl<S, R> Read for Watched<'_, S, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = u64::try_from(self.link.begun.elapsed().as_millis()).unwrap_or(NOT_READING);
        self.link.reading_since.store(now, Ordering::Release);
        let read = self.input.read(buffer);
        self.link.reading_since.store(NOT_READING, Ordering::Release);
        read
    }
}

/// An error with its cause, in one line.
fn tell(err: frame::FrameError) -> String {
    match &err {
        frame::FrameError::Io(cause) => format!("{err}: {cause}"),
        _ => err.to_string(),
    }
}
