//! A random mix of what programs do to files, done to the mount and to a plain directory alike.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use rustix::fs::{Advice, FallocateFlags, RenameFlags};
use rustix::io::Errno;

use super::Random;

const NAMES: [&str; 7] =
    ["lower-0", "lower-1", "lower-2", "d/16384", "d/16384.1", "d/e/x", "000000010000000000000001"];
const LARGEST: u64 = 300_000;

/// Runs a mix of `steps` steps in a process of its own, to its end: who maps files of a mount that
/// he serves himself waits for himself. The test binary has an ignored test `mix_program` that
/// calls [`mix_program`].
pub fn run_mix(mount: &Path, plain: &Path, seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--ignored", "--exact", "mix_program", "--nocapture"]);
    program.env(MOUNT, mount).env(PLAIN, plain);
    program.env(SEED, seed.to_string()).env(STEPS, steps.to_string());
    let ended = program.status().unwrap();
    assert!(ended.success(), "seed {seed}: {ended}");
}

/// What the other process does.
pub fn mix_program() {
    let given = |name| std::env::var(name).expect("run by the other tests");
    let (mount, plain) = (given(MOUNT), given(PLAIN));
    let mut mix = Mix::new(Path::new(&mount), Path::new(&plain), given(SEED).parse().unwrap());
    mix.run(given(STEPS).parse().unwrap());
}

/// The seed given in `PGTHAW_SEED`, or another one each time.
pub fn seed() -> u64 {
    let given = std::env::var("PGTHAW_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64)
}

const MOUNT: &str = "PGTHAW_MIX_MOUNT";
const PLAIN: &str = "PGTHAW_MIX_PLAIN";
const SEED: &str = "PGTHAW_MIX_SEED";
const STEPS: &str = "PGTHAW_MIX_STEPS";

/// The mount and the plain directory, with what is open in both.
struct Mix<'a> {
    mount: &'a Path,
    plain: &'a Path,
    random: Random,
    open: Vec<(File, File)>,
    steps: BTreeMap<&'static str, u32>,
}

impl<'a> Mix<'a> {
    /// Both directories hold the same files and directories.
    fn new(mount: &'a Path, plain: &'a Path, seed: u64) -> Self {
        Self { mount, plain, random: Random(seed), open: Vec::new(), steps: BTreeMap::new() }
    }

    /// Does `count` random steps and compares everything at the end.
    fn run(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
        while let Some(pair) = self.open.pop() {
            self.compare_content(&pair);
        }
        compare_trees(self.mount, self.plain);
        println!("{:?}", self.steps);
    }

    fn step(&mut self) {
        let number = self.random.below(100);
        let (name, done): (_, fn(&mut Self) -> Option<()>) = match number {
            0..25 => ("read", Self::read),
            25..50 => ("write", Self::write),
            50..56 => ("truncate", Self::truncate),
            56..62 => ("fallocate", Self::fallocate),
            62..70 => ("map and write", Self::map_write),
            70..74 => ("map and read", Self::map_read),
            74..80 => ("open", Self::open),
            80..84 => ("close", Self::close),
            84..88 => ("rename", Self::rename),
            88..91 => ("unlink", Self::unlink),
            91..93 => ("link", Self::link),
            93..95 => ("sync", Self::sync),
            95..98 => ("forget the cache", Self::forget_cache),
            98..99 => ("replace by a written copy", Self::replace),
            _ => ("compare", Self::compare),
        };
        if done(self).is_some() {
            *self.steps.entry(name).or_default() += 1;
        }
    }

    fn pair(&mut self) -> Option<usize> {
        (!self.open.is_empty()).then(|| self.random.below(self.open.len()))
    }

    fn name(&mut self) -> &'static str {
        NAMES[self.random.below(NAMES.len())]
    }

    fn paths(&mut self) -> [std::path::PathBuf; 2] {
        let name = self.name();
        [self.mount.join(name), self.plain.join(name)]
    }

    /// A range that often begins or ends at a page or block, or at the end of the file.
    fn range(&mut self, index: usize) -> (u64, usize) {
        let size = self.open[index].1.metadata().unwrap().len();
        let offset = match self.random.below(5) {
            0 => self.random.below(LARGEST as usize / 8192) as u64 * 8192,
            1 => self.random.below(LARGEST as usize / 4096) as u64 * 4096,
            2 => size,
            _ => self.random.below(LARGEST as usize) as u64,
        };
        let length = match self.random.below(4) {
            0 => 8192,
            1 => 4096,
            2 => self.random.below(100) + 1,
            _ => self.random.below(40_000) + 1,
        };
        (offset, length)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let stamp = self.random.next();
        (0..length).map(|at| (stamp >> (at % 7 * 8)) as u8 | 1).collect()
    }

    fn read(&mut self) -> Option<()> {
        let index = self.pair()?;
        let (offset, length) = self.range(index);
        let read = |file: &File| {
            let mut buf = vec![0; length];
            let count = file.read_at(&mut buf, offset).unwrap();
            buf.truncate(count);
            buf
        };
        let (mount, plain) = &self.open[index];
        assert!(read(mount) == read(plain), "{length} bytes at {offset} differ");
        Some(())
    }

    fn write(&mut self) -> Option<()> {
        let index = self.pair()?;
        let (offset, length) = self.range(index);
        let bytes = self.bytes(length);
        self.both(index, |file| file.write_all_at(&bytes, offset).unwrap());
        Some(())
    }

    fn both(&self, index: usize, work: impl Fn(&File)) {
        work(&self.open[index].0);
        work(&self.open[index].1);
    }

    fn truncate(&mut self) -> Option<()> {
        let index = self.pair()?;
        let (size, _) = self.range(index);
        self.both(index, |file| file.set_len(size).unwrap());
        Some(())
    }

    fn fallocate(&mut self) -> Option<()> {
        let index = self.pair()?;
        let (offset, length) = self.range(index);
        let modes = [
            FallocateFlags::empty(),
            FallocateFlags::KEEP_SIZE,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            FallocateFlags::ZERO_RANGE,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            FallocateFlags::COLLAPSE_RANGE,
        ];
        let mode = modes[self.random.below(modes.len())];
        if mode == FallocateFlags::COLLAPSE_RANGE {
            let refused = rustix::fs::fallocate(&self.open[index].0, mode, 0, 4096);
            assert_eq!(refused, Err(Errno::OPNOTSUPP));
        } else {
            self.both(index, |file| {
                rustix::fs::fallocate(file, mode, offset, length as u64).unwrap()
            });
        }
        Some(())
    }

    fn map_write(&mut self) -> Option<()> {
        let index = self.pair()?;
        let size = self.open[index].1.metadata().unwrap().len() as usize;
        if size == 0 {
            return None;
        }
        let offset = self.random.below(size);
        let length = (self.random.below(20_000) + 1).min(size - offset);
        let bytes = self.bytes(length);
        let keep_mapped = self.random.below(2) == 0;
        self.both(index, |file| {
            let map = Map::new(file, size);
            map.write(offset, &bytes);
            if keep_mapped {
                let mut seen = vec![0; length];
                file.read_exact_at(&mut seen, offset as u64).unwrap();
                assert!(seen == bytes, "what is written to a map is read from the file");
            }
        });
        Some(())
    }

    fn map_read(&mut self) -> Option<()> {
        let index = self.pair()?;
        let size = self.open[index].1.metadata().unwrap().len() as usize;
        if size > 0 {
            let (mount, plain) = &self.open[index];
            assert!(Map::new(mount, size).read() == Map::new(plain, size).read(), "maps differ");
        }
        Some(())
    }

    fn open(&mut self) -> Option<()> {
        let [mount, plain] = self.paths();
        let write_only = self.random.below(4) == 0;
        let mut options = File::options();
        options.write(true).create(self.random.below(2) == 0).truncate(self.random.below(12) == 0);
        let open = |path: &Path| match options.open(path) {
            // Written through a descriptor that cannot read, then read through one that can.
            Ok(file) if write_only => {
                file.write_all_at(b"written only", 4095).unwrap();
                File::options().read(true).write(true).open(path)
            }
            Ok(_) => File::options().read(true).write(true).open(path),
            Err(err) => Err(err),
        };
        match (open(&mount), open(&plain)) {
            (Ok(mount), Ok(plain)) => self.open.push((mount, plain)),
            (mount, plain) => assert_same_error(mount.map(drop), plain.map(drop)),
        }
        if self.open.len() > 6 { self.close() } else { Some(()) }
    }

    fn close(&mut self) -> Option<()> {
        let index = self.pair()?;
        let pair = self.open.swap_remove(index);
        self.compare_content(&pair);
        Some(())
    }

    fn rename(&mut self) -> Option<()> {
        let ([from_mount, from_plain], [to_mount, to_plain]) = (self.paths(), self.paths());
        let flags = [
            RenameFlags::empty(),
            RenameFlags::empty(),
            RenameFlags::NOREPLACE,
            RenameFlags::EXCHANGE,
        ];
        let flags = flags[self.random.below(flags.len())];
        let rename = |from: &Path, to: &Path| {
            Ok(rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags)?)
        };
        assert_same_error(rename(&from_mount, &to_mount), rename(&from_plain, &to_plain));
        Some(())
    }

    fn unlink(&mut self) -> Option<()> {
        let [mount, plain] = self.paths();
        assert_same_error(fs::remove_file(mount), fs::remove_file(plain));
        Some(())
    }

    fn link(&mut self) -> Option<()> {
        let ([from_mount, from_plain], [to_mount, to_plain]) = (self.paths(), self.paths());
        assert_same_error(fs::hard_link(from_mount, to_mount), fs::hard_link(from_plain, to_plain));
        Some(())
    }

    fn sync(&mut self) -> Option<()> {
        let index = self.pair()?;
        self.open[index].0.sync_all().unwrap();
        Some(())
    }

    /// Makes the kernel write back and drop its pages, so that reads come to us again.
    fn forget_cache(&mut self) -> Option<()> {
        let index = self.pair()?;
        let file = &self.open[index].0;
        file.sync_all().unwrap();
        rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
        Some(())
    }

    /// Writes a new file and renames it over another, as PostgreSQL does with its control files.
    fn replace(&mut self) -> Option<()> {
        let length = self.random.below(30_000);
        let bytes = self.bytes(length);
        for path in self.paths() {
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, &bytes).unwrap();
            fs::rename(&temporary, &path).unwrap();
        }
        Some(())
    }

    fn compare(&mut self) -> Option<()> {
        compare_trees(self.mount, self.plain);
        Some(())
    }

    fn compare_content(&self, (mount, plain): &(File, File)) {
        let whole = |file: &File| {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize + 10];
            let count = file.read_at(&mut bytes, 0).unwrap();
            bytes.truncate(count);
            bytes
        };
        assert!(whole(mount) == whole(plain), "an open file differs");
    }
}

fn assert_same_error(mount: std::io::Result<()>, plain: std::io::Result<()>) {
    let code = |result: std::io::Result<()>| result.err().map(|err| err.raw_os_error());
    assert_eq!(code(mount), code(plain));
}

/// Compares names, kinds, sizes, link counts and contents below two directories.
pub fn compare_trees(mount: &Path, plain: &Path) {
    let names = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(mount), names(plain), "{}", mount.display());
    for name in names(plain) {
        let (mount, plain) = (mount.join(&name), plain.join(&name));
        let (found, want) =
            (fs::symlink_metadata(&mount).unwrap(), fs::symlink_metadata(&plain).unwrap());
        assert_eq!(found.file_type(), want.file_type(), "{}", mount.display());
        if want.is_dir() {
            assert_eq!(found.nlink(), want.nlink(), "{}", mount.display());
            compare_trees(&mount, &plain);
        } else {
            assert_eq!(
                (found.len(), found.nlink()),
                (want.len(), want.nlink()),
                "{}",
                mount.display()
            );
            let read = |path: &Path| {
                let mut bytes = Vec::new();
                File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
                bytes
            };
            assert!(read(&mount) == read(&plain), "{} differs", mount.display());
        }
    }
}

/// A shared map of a whole file.
struct Map {
    start: *mut libc::c_void,
    length: usize,
}

impl Map {
    fn new(file: &File, length: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new map at an address of the kernel's choice; the file outlives the call, and
        // nobody shortens it while the map lives.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { start, length }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length);
        // SAFETY: inside the map, as just checked; `bytes` is not part of it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.start.cast::<u8>().add(offset),
                bytes.len(),
            )
        }
    }

    fn read(&self) -> Vec<u8> {
        // SAFETY: the map is readable and nobody writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), self.length) }.to_vec()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used no more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}
