//! A TCP proxy inside a host, for what the kernel's links cannot do: delay (there is no `netem` everywhere).
//!
//! Two threads for each direction of a connection: one takes bytes and notes when they are due, the other hands
//! them on then, so that much can be under way. It runs in the test's process: its work counts as the test's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::host::Host;

/// Bytes taken at once.
const CHUNK: usize = 64 << 10;
/// Chunks under way in one direction of a connection: 64 MiB, more than a fast link holds in the longest delay.
const UNDER_WAY: usize = 1024;

/// What a proxy does to the bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProxyOptions {
    /// Time that each byte takes, one way.
    pub delay: Duration,
    /// Most bytes per second in each direction, all connections together.
    pub bytes_per_second: Option<u64>,
}

/// A proxy; it and all its connections end when it is dropped. After a reboot of its host a new one is needed.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    listener: TcpListener,
    line: Arc<Line>,
    acceptor: Option<JoinHandle<()>>,
}

/// What all connections of a proxy share.
#[derive(Debug)]
struct Line {
    options: ProxyOptions,
    state: Mutex<State>,
    mended: Condvar,
}

#[derive(Debug)]
struct State {
    cut: bool,
    ended: bool,
    /// When the line has sent all it was given, there and back.
    free_at: [Instant; 2],
    /// Both sides of every connection, to end it.
    streams: Vec<TcpStream>,
}

/// Bytes, and when they arrive.
type Due = (Instant, Vec<u8>);

impl Proxy {
    /// Listens on all of a host's addresses at `port` (0: any that is free) and hands on to `to`, as the host
    /// reaches it: `127.0.0.1:22` for its own sshd.
    pub fn start(host: &Host, port: u16, to: SocketAddr, options: ProxyOptions) -> Self {
        let namespace =
            File::open(format!("/proc/{}/ns/net", host.init())).expect("a running host");
        let now = Instant::now();
        let state = State { cut: false, ended: false, free_at: [now; 2], streams: Vec::new() };
        let line = Arc::new(Line { options, state: Mutex::new(state), mended: Condvar::new() });
        let (tell, told) = mpsc::channel();
        let shared = line.clone();
        // Its sockets, and those of the threads it starts, belong to the host's network.
        let acceptor = thread::spawn(move || {
            let kind = Some(LinkNameSpaceType::Network);
            let listener = move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
                .map_err(io::Error::from)
                .and_then(|()| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
                .and_then(|listener| Ok((listener.try_clone()?, listener)));
            let _ = match listener {
                Ok((copy, listener)) => {
                    let _ = tell.send(Ok(copy));
                    return accept(&listener, to, &shared);
                }
                Err(err) => tell.send(Err(err)),
            };
        });
        let listener = told.recv().expect("it tells");
        let listener =
            listener.unwrap_or_else(|err| panic!("port {port} of {}: {err}", host.name()));
        let address =
            SocketAddr::new(host.address().into(), listener.local_addr().expect("bound").port());
        Self { address, listener, line, acceptor: Some(acceptor) }
    }

    /// Returns where other hosts reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets nothing arrive any more; connections stay, and new ones are still accepted.
    pub fn cut(&self) {
        self.line.state().cut = true;
    }

    /// Undoes [`Proxy::cut`]: what waited arrives.
    pub fn mend(&self) {
        self.line.state().cut = false;
        self.line.mended.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.line.state();
        state.ended = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // an error only means that it ended by itself
        }
        drop(state);
        self.line.mended.notify_all();
        // On Linux this wakes the one that accepts.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Joins each connection with one to `to`, until the listener is shut down; then waits for the threads.
fn accept(listener: &TcpListener, to: SocketAddr, line: &Arc<Line>) {
    let mut threads = Vec::new();
    while let Ok((near, _)) = listener.accept() {
        // Whoever came sees the end at once if nobody is there.
        let Ok(far) = TcpStream::connect(to) else { continue };
        match join(&near, &far, line) {
            Ok(started) => threads.extend(started),
            Err(err) => eprintln!("proxy to {to}: {err}"),
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Starts the threads of one connection.
fn join(near: &TcpStream, far: &TcpStream, line: &Arc<Line>) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for (direction, from, to) in [(0, near, far), (1, far, near)] {
        from.set_nodelay(true)?;
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let mut state = line.state();
        if state.ended {
            return Ok(threads);
        }
        state.streams.push(from.try_clone()?);
        drop(state);
        let (send, receive) = mpsc::sync_channel(UNDER_WAY);
        let line = (line.clone(), line.clone());
        threads.push(thread::spawn(move || take(from, direction, &line.0, &send)));
        threads.push(thread::spawn(move || hand_on(to, &line.1, &receive)));
    }
    Ok(threads)
}

/// Takes bytes as fast as the line sends.
fn take(mut from: TcpStream, direction: usize, line: &Line, send: &SyncSender<Due>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let sent = line.send(direction, length);
        sleep_until(sent);
        if send.send((sent + line.options.delay, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

/// Hands bytes on when they are due and the line is whole, then the end.
fn hand_on(mut to: TcpStream, line: &Line, receive: &Receiver<Due>) {
    for (due, bytes) in receive {
        sleep_until(due);
        line.wait_while_cut();
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    line.wait_while_cut();
    let _ = to.shutdown(Shutdown::Write); // an error only means that it ended by itself
}

impl Line {
    /// Returns when so many bytes more have been sent.
    fn send(&self, direction: usize, length: usize) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.options.bytes_per_second else { return now };
        let mut state = self.state();
        let begin = state.free_at[direction].max(now);
        state.free_at[direction] = begin + Duration::from_secs_f64(length as f64 / rate as f64);
        state.free_at[direction]
    }

    fn wait_while_cut(&self) {
        let waits = |state: &mut State| state.cut && !state.ended;
        drop(self.mended.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sleep_until(time: Instant) {
    let wait = time.saturating_duration_since(Instant::now());
    if !wait.is_zero() {
        sleep(wait);
    }
}
