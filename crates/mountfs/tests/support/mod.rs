//! A lower made of a pattern, and a mount that goes away with its test.

#![allow(dead_code)] // each test binary uses its part

pub mod fsx;
pub mod model;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgthaw_mountfs::{
    Fault, FileSystem, Lower, Owner, ServeOptions, Tree, mount_as_root, mount_as_user, mounted_at,
    serve, unmount,
};

/// A lower whose bytes follow from file and offset.
#[derive(Clone, Default)]
pub struct Pattern {
    /// Every so many tries are answered at once; 0: all.
    pub answer_every: u64,
    pub gate: Arc<Gate>,
    pub trouble: Trouble,
}

/// What is wrong with a lower: the file, the first bad byte, and how it shows.
#[derive(Clone, Copy, Default)]
pub enum Trouble {
    #[default]
    None,
    Fails(usize, u64),
    Panics(usize),
}

/// Lets reads of the lower through, or not.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    waiting: usize,
    tries: u64,
}

impl Gate {
    pub fn set_shut(&self, shut: bool) {
        self.state.lock().unwrap().shut = shut;
        self.changed.notify_all();
    }

    /// How often the lower was asked.
    pub fn tries(&self) -> u64 {
        let state = self.state.lock().unwrap();
        state.tries + state.waiting as u64
    }

    pub fn wait_until_waiting(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (_state, result) = self
            .changed
            .wait_timeout_while(state, Duration::from_secs(10), |state| state.waiting < count)
            .unwrap();
        assert!(!result.timed_out(), "nobody waits for the lower");
    }
}

impl Pattern {
    pub fn bytes(&self, file: usize, offset: u64, length: usize) -> Vec<u8> {
        (offset..offset + length as u64).map(|at| pattern(file, at)).collect()
    }
}

fn pattern(file: usize, at: u64) -> u8 {
    let mixed = (at / 16 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(file as u64 * 77);
    (mixed >> (at % 8 * 7)) as u8 | 1 // never zero: a zero is a byte that got lost
}

impl Lower for Pattern {
    fn try_read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        match self.trouble {
            Trouble::Fails(bad, from) if file == bad && offset + buf.len() as u64 > from => {
                return Some(Err(io::Error::other("checksum differs")));
            }
            Trouble::Panics(bad) if file == bad => return None,
            _ => {}
        }
        let mut state = self.gate.state.lock().unwrap();
        state.tries += 1;
        let late = self.answer_every != 0 && !state.tries.is_multiple_of(self.answer_every);
        if state.shut || late {
            return None;
        }
        drop(state);
        buf.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = pattern(file, at));
        Some(Ok(()))
    }

    fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if let Trouble::Panics(bad) = self.trouble {
            assert_ne!(file, bad, "a fault of the lower");
        }
        let mut state = self.gate.state.lock().unwrap();
        state.waiting += 1;
        self.gate.changed.notify_all();
        while state.shut {
            state = self.gate.changed.wait(state).unwrap();
        }
        state.waiting -= 1;
        drop(state);
        buf.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = pattern(file, at));
        Ok(())
    }
}

/// How long a test may use its mount.
const LONGEST_TEST: Duration = Duration::from_secs(60);

/// A mount, gone when dropped: root's for all, an ordinary user's for himself.
pub struct Mounted {
    pub fs: Arc<FileSystem>,
    /// What `on_fault` was told.
    pub told: Arc<Mutex<Vec<Fault>>>,
    mountpoint: PathBuf,
    server: Option<JoinHandle<io::Result<()>>>,
    directory: Option<tempfile::TempDir>,
    /// Ends the watch over the test's time.
    _watch: mpsc::Sender<()>,
}

impl Mounted {
    /// Mounts a tree with the write layer in the mount's own temporary directory.
    pub fn new(lower: Pattern, plant: impl FnOnce(&mut Tree)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layer = directory.path().join("layer");
        Self::with_layer(directory, &layer, lower, plant)
    }

    /// Mounts a tree with the write layer in `layer`.
    pub fn with_layer(
        directory: tempfile::TempDir,
        layer: &Path,
        lower: Pattern,
        plant: impl FnOnce(&mut Tree),
    ) -> Self {
        let mountpoint = directory.path().join("mount");
        std::fs::create_dir(&mountpoint).unwrap();
        let mut tree = Tree::new();
        plant(&mut tree);
        let user = rustix::process::geteuid();
        let owner = Owner { uid: user.as_raw(), gid: rustix::process::getegid().as_raw() };
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = told.clone();
        let on_fault = Box::new(move |fault: &Fault| tell.lock().unwrap().push(fault.clone()));
        let fs = Arc::new(FileSystem::new(tree, Arc::new(lower), layer, owner, on_fault).unwrap());
        let mounted =
            if user.is_root() { mount_as_root(&mountpoint) } else { mount_as_user(&mountpoint) };
        let device = mounted.unwrap();
        let server = std::thread::spawn({
            let fs = fs.clone();
            move || serve(fs, device, ServeOptions::default())
        });
        let (watch, over) = mpsc::channel();
        let watched = fs.clone();
        std::thread::spawn(move || {
            // A test that waits for its own mount cannot even be killed. (Nor may it map files of
            // it: unmapping waits for the server, which then waits for the process's own memory
            // lock.)
            if over.recv_timeout(LONGEST_TEST) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the test takes too long: its mount answers EIO from now on");
                watched.abort();
            }
        });
        let (server, directory) = (Some(server), Some(directory));
        Self { fs, told, mountpoint, server, directory, _watch: watch }
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.fs.abort();
        let unmounted = unmount(&self.mountpoint, true);
        let gone = !mounted_at(&self.mountpoint).unwrap_or(true);
        match self.directory.take() {
            Some(directory) if !gone => drop(directory.keep()), // never remove files through a mount
            directory => drop(directory),
        }
        if !std::thread::panicking() {
            unmounted.unwrap();
            assert!(gone, "{} is still mounted", self.mountpoint.display());
            self.server.take().unwrap().join().unwrap().unwrap();
        }
    }
}

/// A small file system in memory: a disk that gets full. Gone when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn new(path: &Path, bytes: usize) -> Self {
        std::fs::create_dir(path).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("pgthaw-test", path, "tmpfs", flags, options.as_c_str()).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
    }
}

/// Random numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Waits until `condition` holds, for ten seconds at most.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < limit, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
