//! One connection of a [`RemoteStore`](super::RemoteStore): its three threads, and what they do when it breaks.
//!
//! Owns sending, receiving and watching. Leaves what to send and what an answer means to [`super::state`].
//!
//! The sender writes what is to be asked for, the receiver takes answers, and the watcher sees to signs of life: it has
//! a ping sent every now and then, and declares the connection broken if nothing at all came for too long. Each is bound
//! to one generation, the number of its connection, and ends when that is no longer the current one.

use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::super::wire::{self, Ask, Carries, GREETING, Header, Request};
use super::promise::Failure;
use super::{HangUp, Locked, Shared, aborted};

/// The current connection, or what is known of the last one.
#[derive(Default)]
pub(super) struct Link {
    generation: u64,
    hang_up: Option<HangUp>,
    /// The other side's greeting has come.
    greeted: bool,
    /// When it was greeted or lost.
    since: Option<SystemTime>,
    /// Why the last connection ended.
    problem: Option<String>,
    pings_sent: u64,
    ping_due: bool,
}

impl Link {
    pub(super) fn is_connected(&self) -> bool {
        self.greeted
    }

    pub(super) fn since(&self) -> Option<SystemTime> {
        self.since
    }

    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    fn is(&self, generation: u64) -> bool {
        self.generation == generation && self.hang_up.is_some()
    }

    fn end(&mut self, problem: &str) -> Option<HangUp> {
        let hang_up = self.hang_up.take()?;
        if self.greeted {
            self.greeted = false;
            self.since = Some(SystemTime::now());
        }
        self.problem = Some(problem.to_owned());
        Some(hang_up)
    }
}

/// When something last came over a connection.
struct Heard {
    connected: Instant,
    milliseconds: AtomicU64,
}

impl Heard {
    fn note(&self) {
        self.milliseconds.store(self.connected.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// For how long nothing came.
    fn silence(&self) -> Duration {
        let last = Duration::from_millis(self.milliseconds.load(Ordering::Relaxed));
        self.connected.elapsed().saturating_sub(last)
    }
}

/// Starts to use a connection; the current one, if any, ends.
pub(super) fn start(
    shared: &Arc<Shared>,
    input: Box<dyn Read + Send>,
    output: Box<dyn Write + Send>,
    hang_up: HangUp,
) -> io::Result<()> {
    let (generation, replaced) = {
        let mut locked = shared.lock();
        if locked.aborted {
            drop(locked);
            hang_up();
            return Err(aborted());
        }
        let replaced = locked.end_link("a new connection took its place");
        let link = &mut locked.link;
        link.generation += 1;
        link.hang_up = Some(hang_up);
        link.pings_sent = 0;
        link.ping_due = false;
        (link.generation, replaced)
    };
    shared.after_end(replaced);
    let heard = Heard { connected: Instant::now(), milliseconds: AtomicU64::new(0) };
    let heard = Arc::new(heard);
    let (sender, receiver, watcher) = (Arc::clone(shared), Arc::clone(shared), Arc::clone(shared));
    let watched = Arc::clone(&heard);
    spawn("repository-send", move || sender.ends(generation, send(&sender, generation, output)))
        .and_then(|()| {
            spawn("repository-receive", move || {
                receiver.ends(generation, receive(&receiver, generation, input, &heard));
            })
        })
        .and_then(|()| {
            spawn("repository-watch", move || {
                watcher.ends(generation, watch(&watcher, generation, &watched));
            })
        })
        .inspect_err(|_| end_current(shared, "a thread could not be started"))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Ends the current connection, if there is one.
pub(super) fn end_current(shared: &Shared, problem: &str) {
    let generation = shared.lock().link.generation;
    shared.lost(generation, problem);
}

impl Shared {
    /// One of a connection's threads ends: the connection does, too.
    fn ends(&self, generation: u64, result: io::Result<()>) {
        match result {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                self.lost(generation, "the other side closed the connection");
            }
            Err(err) => self.lost(generation, &err.to_string()),
        }
    }

    fn lost(&self, generation: u64, problem: &str) {
        let hang_up = {
            let mut locked = self.lock();
            if locked.link.is(generation) { locked.end_link(problem) } else { None }
        };
        self.after_end(hang_up);
    }

    /// Ends the threads of a connection that is no longer the current one; called without the lock.
    fn after_end(&self, hang_up: Option<HangUp>) {
        if let Some(hang_up) = hang_up {
            self.to_send.notify_all();
            self.to_watch.notify_all();
            hang_up();
            self.tell();
        }
    }
}

impl Locked {
    /// Ends the current connection, if there is one; returns what is to be called without the lock.
    fn end_link(&mut self, problem: &str) -> Option<HangUp> {
        let hang_up = self.link.end(problem)?;
        self.state.connection_lost();
        Some(hang_up)
    }
}

/// Writes requests until the connection is no longer the current one.
fn send(shared: &Shared, generation: u64, mut output: Box<dyn Write + Send>) -> io::Result<()> {
    let mut batch = GREETING.to_vec();
    loop {
        output.write_all(&batch)?;
        output.flush()?;
        batch.clear();
        let mut locked = shared.lock();
        loop {
            if !locked.link.is(generation) {
                return Ok(());
            }
            if std::mem::take(&mut locked.link.ping_due) {
                locked.link.pings_sent += 1;
                let ping = Request { number: locked.link.pings_sent, ask: Ask::Ping };
                batch.extend_from_slice(&ping.encode());
            }
            let count = locked.state.take_unsent(&mut batch);
            shared.requests_sent.fetch_add(count, Ordering::Relaxed);
            if !batch.is_empty() {
                break;
            }
            locked = shared.wait_to_send(locked);
        }
    }
}

/// Takes answers until the connection breaks or is no longer the current one.
fn receive(
    shared: &Shared,
    generation: u64,
    input: Box<dyn Read + Send>,
    heard: &Heard,
) -> io::Result<()> {
    // Large answers are read past its small buffer, straight to where they stay.
    let mut input = BufReader::with_capacity(8 * 1024, Counted { input, shared, heard });
    let mut greeting = [0; GREETING.len()];
    input.read_exact(&mut greeting)?;
    wire::check_greeting(greeting)?;
    {
        let mut locked = shared.lock();
        if !locked.link.is(generation) {
            return Ok(());
        }
        locked.link.greeted = true;
        locked.link.since = Some(SystemTime::now());
        locked.link.problem = None;
    }
    shared.tell();
    let mut frame = [0; Header::SIZE];
    loop {
        input.read_exact(&mut frame)?;
        let header = Header::decode(&frame)?;
        if !take_answer(shared, generation, header, &mut input)? {
            return Ok(());
        }
    }
}

/// Takes one answer; false if the connection is no longer the current one.
fn take_answer(
    shared: &Shared,
    generation: u64,
    header: Header,
    input: &mut impl Read,
) -> io::Result<bool> {
    let Header { number, carries, length } = header;
    // Its length is checked before there is memory for it.
    if carries == Carries::Bytes {
        let locked = shared.lock();
        if !locked.link.is(generation) {
            return Ok(false);
        }
        locked.state.expect_bytes(number, length)?;
    }
    let mut bytes = shared.buffers.take(length as usize);
    input.read_exact(&mut bytes)?;

    let mut locked = shared.lock();
    if !locked.link.is(generation) {
        return Ok(false);
    }
    match carries {
        Carries::Bytes => {
            let forgotten = locked.state.bytes_arrived(number, bytes)?;
            shared.send_if_any(&locked);
            drop(locked);
            drop(forgotten);
        }
        Carries::Length => {
            let mut length = [0; 8];
            length.copy_from_slice(&bytes);
            locked.state.length_arrived(number, u64::from_le_bytes(length))?;
            shared.send_if_any(&locked);
        }
        Carries::Error(kind) => {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            locked.state.error_arrived(number, Failure { kind, text })?;
            shared.send_if_any(&locked);
        }
        Carries::Pong if number == 0 || number > locked.link.pings_sent => {
            return Err(wire::broken(format!("an answer to ping {number}, which was not sent")));
        }
        Carries::Pong => {}
    }
    Ok(true)
}

/// Has pings sent, and breaks the connection when nothing comes any more.
fn watch(shared: &Shared, generation: u64, heard: &Heard) -> io::Result<()> {
    let (every, limit) = (shared.options.ping_every, shared.options.silence_limit);
    let mut next_ping = every;
    let mut locked = shared.lock();
    loop {
        if !locked.link.is(generation) {
            return Ok(());
        }
        let silence = heard.silence();
        if silence >= limit {
            let text = format!("nothing came from the other side for {} s", limit.as_secs_f32());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let age = heard.connected.elapsed();
        if age >= next_ping {
            next_ping = age + every;
            locked.link.ping_due = true;
            shared.to_send.notify_all();
        }
        let pause = (next_ping - age).min(limit - silence);
        locked = shared.wait_to_watch(locked, pause);
    }
}

/// Counts what comes, also in the middle of an answer: a slow link is not a silent one.
struct Counted<'a> {
    input: Box<dyn Read + Send>,
    shared: &'a Shared,
    heard: &'a Heard,
}

impl Read for Counted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buf)?;
        self.shared.bytes_received.fetch_add(count as u64, Ordering::Relaxed);
        self.heard.note();
        Ok(count)
    }
}
