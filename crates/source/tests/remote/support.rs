//! Stores, servers and links for the tests: links that delay, that break after so many bytes, and peers made by hand.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pgthaw_source::map::ObjectId;
use pgthaw_source::store::{MemoryStore, ObjectStore, RemoteOptions, RemoteStore, serve};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;
/// Longer than any test should wait for anything.
pub const LONG: Duration = Duration::from_secs(60);

/// Bytes that differ from place to place and from seed to seed.
pub fn content(length: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let words = (0..length.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(length as usize).collect()
}

/// Objects 0, 1, … of these lengths.
pub fn memory(lengths: &[u64]) -> Arc<MemoryStore> {
    let objects = lengths.iter().enumerate();
    let made = objects
        .map(|(number, length)| (ObjectId(number as u32), content(*length, number as u64 + 1)));
    Arc::new(MemoryStore::new(made))
}

pub fn options() -> RemoteOptions {
    RemoteOptions::new(LONG)
}

pub fn remote(options: RemoteOptions) -> RemoteStore {
    RemoteStore::new(options, |_| {})
}

/// Serves a store; returns the other end.
pub fn serving(store: Arc<dyn ObjectStore>) -> UnixStream {
    let (here, there) = UnixStream::pair().unwrap();
    // It ends with whatever the test does to the link.
    thread::spawn(move || serve(store, there.try_clone().unwrap(), there, 4));
    here
}

/// Connects; the receiver gets a message when the connection has ended.
pub fn connect(remote: &RemoteStore, stream: UnixStream) -> mpsc::Receiver<()> {
    let (ended, end) = mpsc::channel();
    let closing = stream.try_clone().unwrap();
    let hang_up = move || {
        let _ = closing.shutdown(Shutdown::Both);
        let _ = ended.send(());
    };
    remote.connect(stream.try_clone().unwrap(), stream, hang_up).unwrap();
    end
}

pub fn connected(store: Arc<dyn ObjectStore>, options: RemoteOptions) -> RemoteStore {
    let remote = remote(options);
    connect(&remote, serving(store));
    remote
}

pub fn read(store: &dyn ObjectStore, object: u32, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xAA; length as usize];
    store.read_exact_at(ObjectId(object), offset, &mut buf).map(|()| buf)
}

/// Waits until something is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < LONG, "{what} never happened");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A link that lets so many bytes through and then breaks: `up` to the server, `down` from it.
pub fn cut(server: UnixStream, up: usize, down: usize) -> UnixStream {
    let (here, there) = UnixStream::pair().unwrap();
    for (limit, from, to) in [(up, &there, &server), (down, &server, &there)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            let mut left = limit;
            let mut buf = [0; 4096];
            while left > 0 {
                let most = left.min(buf.len());
                let count = from.read(&mut buf[..most]).unwrap_or(0);
                if count == 0 || to.write_all(&buf[..count]).is_err() {
                    break;
                }
                left -= count;
            }
            for end in [from, to] {
                let _ = end.shutdown(Shutdown::Both);
            }
        });
    }
    here
}

/// A link on which everything takes so long in each direction, however much it is.
pub fn delayed(server: UnixStream, delay: Duration) -> UnixStream {
    let (here, there) = UnixStream::pair().unwrap();
    for (from, to) in [(&there, &server), (&server, &there)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
        thread::spawn(move || {
            let mut buf = vec![0; 256 * 1024];
            while let Ok(count @ 1..) = from.read(&mut buf) {
                let due = Instant::now() + delay;
                sender.send((due, buf[..count].to_vec())).unwrap();
            }
        });
        thread::spawn(move || {
            for (due, bytes) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    here
}

/// A store with a gate before some objects: reads of those wait until it is opened.
pub struct Gated {
    store: Arc<MemoryStore>,
    closed: Mutex<BTreeMap<ObjectId, usize>>,
    opened: Condvar,
}

impl Gated {
    pub fn new(store: Arc<MemoryStore>, closed: &[u32]) -> Arc<Self> {
        let closed = closed.iter().map(|object| (ObjectId(*object), 0)).collect();
        Arc::new(Self { store, closed: Mutex::new(closed), opened: Condvar::new() })
    }

    /// Reads that wait now before an object's gate.
    pub fn waiting(&self, object: u32) -> usize {
        self.closed.lock().unwrap().get(&ObjectId(object)).copied().unwrap_or(0)
    }

    pub fn open(&self) {
        self.closed.lock().unwrap().clear();
        self.opened.notify_all();
    }
}

impl ObjectStore for Gated {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut closed = self.closed.lock().unwrap();
        if let Some(waiting) = closed.get_mut(&object) {
            *waiting += 1;
            closed = self.opened.wait_while(closed, |closed| closed.contains_key(&object)).unwrap();
        }
        drop(closed);
        self.store.read_exact_at(object, offset, buf)
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        self.store.length(object)
    }
}

/// Frames made by hand, as `wire.rs` describes them.
pub mod frame {
    pub const GREETING: &[u8; 8] = b"pgtread\x01";
    pub const EXACT: u8 = 1;
    pub const UP_TO: u8 = 2;
    pub const BYTES: u8 = 1;
    pub const LENGTH: u8 = 2;
    pub const PONG: u8 = 4;

    pub fn request(kind: u8, object: u32, number: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut frame = vec![kind, 0, 0, 0];
        frame.extend(object.to_le_bytes());
        frame.extend(number.to_le_bytes());
        frame.extend(offset.to_le_bytes());
        frame.extend(length.to_le_bytes());
        frame.extend([0; 4]);
        frame
    }

    pub fn answer(kind: u8, number: u64, length: u32, bytes: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind, 0, 0, 0];
        frame.extend(length.to_le_bytes());
        frame.extend(number.to_le_bytes());
        frame.extend(bytes);
        frame
    }
}
