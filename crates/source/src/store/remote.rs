//! Objects of a repository on another machine, read over a connection that may break.
//!
//! Owns the promise that a read waits for a connection instead of failing, and its limits. Leaves making connections to
//! whoever calls [`RemoteStore::connect`]; the other end is [`super::serve`].
//!
//! All of it stands behind one lock: [`state`] knows what is asked for and what is here, [`connection`] runs the threads
//! of the current connection, [`ahead`] sees sequences in what is read. Start at [`RemoteStore::read_exact_at`].

mod ahead;
mod connection;
mod extents;
mod promise;
mod state;

use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{ObjectStore, too_short, wire};
use crate::buffers::Buffers;
use crate::map::ObjectId;
use connection::Link;
use extents::Extent;
use promise::{Outcome, Promise};
use state::State;

/// Bytes of a long read that are asked for at once; the rest comes as read-ahead, so that others are not held up.
const STEP: u64 = 1024 * 1024;
/// Longest time that is waited before looking around.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Limits of a [`RemoteStore`].
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// A read that waited this long without an answer fails.
    pub stall_limit: Duration,
    /// Bytes of memory for stored bytes: what was read, and what will be.
    pub cache_bytes: u64,
    /// Time between signs of life that are asked for.
    pub ping_every: Duration,
    /// A connection over which nothing came for this long counts as broken; several times `ping_every`.
    pub silence_limit: Duration,
}

impl RemoteOptions {
    /// The defaults with this stall limit: 64 MiB of cache, a ping every 5 s, broken after 20 s of silence.
    pub fn new(stall_limit: Duration) -> Self {
        Self {
            stall_limit,
            cache_bytes: 64 * 1024 * 1024,
            ping_every: Duration::from_secs(5),
            silence_limit: Duration::from_secs(20),
        }
    }
}

/// How the link to a repository does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkStatus {
    /// The other side can be reached, as far as is known.
    pub connected: bool,
    /// Since when that is so.
    pub since: SystemTime,
    /// Why the last connection ended, unless there is a new one.
    pub problem: Option<String>,
    /// Bytes received so far, over all connections.
    pub bytes_received: u64,
    /// Requests sent so far, over all connections; one that was sent again counts again.
    pub requests_sent: u64,
}

/// Ends a connection's blocked reads and writes.
type HangUp = Box<dyn FnOnce() + Send>;
/// Is told when the link's state changes.
type OnChange = Box<dyn Fn(&LinkStatus) + Send + Sync>;

/// Stored bytes of one backup on another machine.
///
/// Reads wait while there is no connection; what has no answer when one breaks is asked for again on the next one.
/// Objects that are read in sequence are read ahead.
pub struct RemoteStore {
    shared: Arc<Shared>,
}

/// What a store and its connections' threads have in common.
struct Shared {
    options: RemoteOptions,
    made: SystemTime,
    locked: Mutex<Locked>,
    /// There is something to send, or the connection is another one.
    to_send: Condvar,
    /// The connection is another one.
    to_watch: Condvar,
    buffers: Arc<Buffers>,
    bytes_received: AtomicU64,
    requests_sent: AtomicU64,
    on_change: OnChange,
}

struct Locked {
    state: State,
    link: Link,
    aborted: bool,
    /// What `on_change` was told last, and whether a thread is telling it now.
    told: (bool, Option<SystemTime>),
    telling: bool,
}

impl RemoteStore {
    /// Returns a store without a connection; nothing can be read before [`RemoteStore::connect`].
    ///
    /// `on_change` is called when a connection is made or lost, by one thread at a time; short-lived states may be left
    /// out. It should return soon; it may call the store, but must not read from it.
    pub fn new(
        options: RemoteOptions,
        on_change: impl Fn(&LinkStatus) + Send + Sync + 'static,
    ) -> Self {
        let state = State::new(options.cache_bytes);
        let locked = Locked {
            state,
            link: Link::default(),
            aborted: false,
            told: (false, None),
            telling: false,
        };
        let shared = Shared {
            options,
            made: SystemTime::now(),
            locked: Mutex::new(locked),
            to_send: Condvar::new(),
            to_watch: Condvar::new(),
            buffers: Buffers::of(wire::MAX_ANSWER),
            bytes_received: AtomicU64::new(0),
            requests_sent: AtomicU64::new(0),
            on_change: Box::new(on_change),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Uses a connection to a [`serve`](super::serve) from now on: its `input` and `output`, the two ends of pipes or
    /// the two directions of a socket. The connection before, if any, ends; what it left without an answer is asked for
    /// on this one.
    ///
    /// `hang_up` is called once, when the connection ends for whatever reason. It must make blocked reads of `input` and
    /// writes to `output` return, from another thread: shut the socket down, or end the process behind the pipes. Both
    /// are then dropped.
    ///
    /// # Errors
    /// `ConnectionAborted` after [`RemoteStore::abort`]; else as the kernel says if no thread can be started. A
    /// connection that does not work is no error here: reads wait for the next one.
    pub fn connect(
        &self,
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        hang_up: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        connection::start(&self.shared, Box::new(input), Box::new(output), Box::new(hang_up))
    }

    /// Ends the connection; all reads, those that wait and later ones, fail with `ConnectionAborted`.
    pub fn abort(&self) {
        {
            let mut locked = self.shared.lock();
            locked.aborted = true;
            locked.state.wake_all();
        }
        connection::end_current(&self.shared, "reading was given up");
    }

    /// Returns how the link does.
    pub fn status(&self) -> LinkStatus {
        self.shared.status(&self.shared.lock())
    }

    /// Returns what holds `range`, in order, once it is asked for.
    fn cover(&self, object: ObjectId, range: Range<u64>) -> io::Result<Vec<Arc<Extent>>> {
        let mut locked = self.shared.lock();
        if locked.aborted {
            return Err(aborted());
        }
        let extents = locked.state.cover(object, range);
        self.shared.send_if_any(&locked);
        Ok(extents)
    }

    /// Fills a part of `buf`, which begins at `offset`, from what holds it; returns how much is filled.
    fn fill(&self, extents: &[Arc<Extent>], offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        let end = offset + buf.len() as u64;
        for extent in extents {
            let bytes = match self.wait(&extent.bytes, extent.number)? {
                Outcome::Done(bytes) => bytes,
                // What failed may be a byte that only another thread's read wanted.
                Outcome::Failed(_) if extent.start < offset || extent.end() > end => break,
                Outcome::Failed(failure) => return Err(failure.into()),
                Outcome::Withdrawn => break,
            };
            let skip = (offset + filled as u64 - extent.start) as usize;
            let Some(found) = bytes.get(skip..) else { break };
            let count = found.len().min(buf.len() - filled);
            buf[filled..filled + count].copy_from_slice(&found[..count]);
            filled += count;
            if bytes.len() < extent.length as usize {
                break; // the object ends here, or so it seemed: the next request will tell
            }
        }
        Ok(filled)
    }

    /// Waits for a request's outcome, no longer than the stall limit.
    fn wait<'p, T>(&self, promise: &'p Promise<T>, number: u64) -> io::Result<&'p Outcome<T>> {
        if let Some(outcome) = promise.outcome() {
            return Ok(outcome);
        }
        let started = Instant::now();
        let mut locked = self.shared.lock();
        loop {
            if locked.aborted {
                return Err(aborted());
            }
            if let Some(outcome) = promise.outcome() {
                return Ok(outcome);
            }
            let left = self.shared.options.stall_limit.checked_sub(started.elapsed());
            let Some(left) = left.filter(|left| !left.is_zero()) else {
                locked.state.give_up(number);
                return Err(self.shared.stalled(&locked));
            };
            locked = promise.wait(locked, left.min(LONGEST_WAIT));
        }
    }
}

impl ObjectStore for RemoteStore {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() {
            return self.length(object).map(drop); // an unknown object is an error even so
        }
        if offset.checked_add(buf.len() as u64).is_none() {
            return Err(too_short(&format!("object {}", object.0), offset, buf.len()));
        }
        let mut filled = 0;
        while filled < buf.len() {
            let start = offset + filled as u64;
            let left = &mut buf[filled..];
            let end = start + (left.len() as u64).min(STEP);
            let extents = self.cover(object, start..end)?;
            filled += self.fill(&extents, start, left)?;
        }
        Ok(())
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        loop {
            let (number, promise) = {
                let mut locked = self.shared.lock();
                if locked.aborted {
                    return Err(aborted());
                }
                let asked = locked.state.ask_length(object);
                self.shared.send_if_any(&locked);
                asked
            };
            match self.wait(&promise, number)? {
                Outcome::Done(length) => return Ok(*length),
                Outcome::Failed(failure) => return Err(failure.into()),
                Outcome::Withdrawn => {}
            }
        }
    }
}

impl Drop for RemoteStore {
    /// Ends the connection and its threads.
    fn drop(&mut self) {
        self.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_if_any(&self, locked: &Locked) {
        if locked.state.has_unsent() {
            self.to_send.notify_all();
        }
    }

    fn wait_to_send<'a>(&self, locked: MutexGuard<'a, Locked>) -> MutexGuard<'a, Locked> {
        self.to_send.wait(locked).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_to_watch<'a>(
        &self,
        locked: MutexGuard<'a, Locked>,
        pause: Duration,
    ) -> MutexGuard<'a, Locked> {
        self.to_watch.wait_timeout(locked, pause).unwrap_or_else(PoisonError::into_inner).0
    }

    fn status(&self, locked: &Locked) -> LinkStatus {
        LinkStatus {
            connected: locked.link.is_connected(),
            since: locked.link.since().unwrap_or(self.made),
            problem: locked.link.problem().map(str::to_owned),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            requests_sent: self.requests_sent.load(Ordering::Relaxed),
        }
    }

    /// Tells `on_change` of the newest state, if it was not told of it. Called without the lock.
    fn tell(&self) {
        let mut locked = self.lock();
        if locked.telling {
            return; // that thread looks again
        }
        loop {
            let now = (locked.link.is_connected(), locked.link.since());
            if locked.told == now {
                return;
            }
            locked.told = now;
            locked.telling = true;
            let status = self.status(&locked);
            drop(locked);
            (self.on_change)(&status);
            locked = self.lock();
            locked.telling = false;
        }
    }

    /// The error of a read that waited too long.
    fn stalled(&self, locked: &Locked) -> io::Error {
        let limit = self.options.stall_limit.as_secs_f32();
        let status = self.status(locked);
        let text = if status.connected {
            format!("the repository is connected, but did not answer within {limit} s")
        } else {
            let since = jiff::Timestamp::try_from(status.since).unwrap_or_default();
            let since = since.strftime("%Y-%m-%d %H:%M:%S UTC");
            let problem = status.problem.map_or_else(String::new, |problem| format!(": {problem}"));
            format!("the repository could not be reached since {since}{problem}")
        };
        io::Error::new(ErrorKind::TimedOut, text)
    }
}

fn aborted() -> io::Error {
    io::Error::new(ErrorKind::ConnectionAborted, "reading from the repository was given up")
}
