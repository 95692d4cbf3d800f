//! A lower made of a pattern, and a mount that goes away with its test.

#![allow(dead_code)] // each test binary uses its part

pub mod fsx;
pub mod model;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use pgthaw_mountfs::{
    FileSystem, Lower, Owner, ServeOptions, Tree, mount_as_root, mounted_at, serve, unmount,
};

/// A lower whose bytes follow from file and offset.
#[derive(Clone, Default)]
pub struct Pattern {
    /// Every so many tries are answered at once; 0: all.
    pub answer_every: u64,
    pub gate: Arc<Gate>,
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
            .wait_timeout_while(state, std::time::Duration::from_secs(10), |state| {
                state.waiting < count
            })
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

/// A mount of root's, gone when dropped.
pub struct Mounted {
    pub fs: Arc<FileSystem>,
    directory: Option<tempfile::TempDir>,
    mountpoint: PathBuf,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl Mounted {
    pub fn new(lower: Pattern, plant: impl FnOnce(&mut Tree)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layer = directory.path().join("layer");
        Self::with_layer(directory, &layer, lower, plant)
    }

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
        let owner = Owner { uid: 0, gid: 0 };
        let fs = FileSystem::new(tree, Arc::new(lower), layer, owner, Box::new(|_| {})).unwrap();
        let fs = Arc::new(fs);
        let device = mount_as_root(&mountpoint).unwrap();
        let server = std::thread::spawn({
            let fs = fs.clone();
            move || serve(fs, device, ServeOptions::default())
        });
        Self { fs, directory: Some(directory), mountpoint, server: Some(server) }
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.fs.abort();
        let unmounted = unmount(&self.mountpoint, true);
        let gone = !mounted_at(&self.mountpoint).unwrap();
        if gone {
            let served = self.server.take().unwrap().join();
            drop(self.directory.take());
            if !std::thread::panicking() {
                served.unwrap().unwrap();
            }
        }
        if !std::thread::panicking() {
            unmounted.unwrap();
            assert!(gone, "{} is still mounted", self.mountpoint.display());
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
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !condition() {
        assert!(std::time::Instant::now() < limit, "not within ten seconds: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
