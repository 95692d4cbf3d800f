//! Random operations, compared step by step with an in-memory model, alone and from several
//! threads.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use pgthaw_mountfs::{Change, FaultKind, FileSystem, Kind, Owner, PAGE, ROOT, RenameMode, Tree};
use proptest::prelude::*;
use rustix::io::Errno;
use support::model::{self, Model, Node};
use support::{Pattern, Random};

const NAMES: [&str; 6] = ["1259", "2619", "16384", "16384.1", "pg_wal", "x"];
/// Sizes of the lower's files: empty, within a page, whole pages, a page and a bit.
const LOWER_SIZES: [u64; 5] = [0, 100, 2 * PAGE, PAGE + 1, 3 * 8192 + 5000];

/// Symbolic links that may be made below the top directory. One name is a directory in some runs and a link in others.
const PROVIDED: [(&str, &str); 5] = [
    ("x", DESTINATIONS[0]),
    ("x", DESTINATIONS[1]),
    ("16384", DESTINATIONS[0]),
    ("pg_wal/x", DESTINATIONS[0]),
    ("pg_wal/1259", DESTINATIONS[2]),
];
const DESTINATIONS: [&str; 4] = ["/provided", "/also/provided", "../x", "/elsewhere"];

/// One step; numbers are taken modulo what is there.
#[derive(Debug, Clone)]
enum Step {
    Create(u8, u8),
    Mkdir(u8, u8),
    Symlink(u8, u8, u8),
    /// Makes the link of that number in [`PROVIDED`], or changes something else about it.
    Provided(u8, u8),
    Unlink(u8, u8),
    Rmdir(u8, u8),
    Rename((u8, u8), (u8, u8), RenameMode),
    Link(u8, u8, u8),
    Write(u8, u32, u16),
    Truncate(u8, u32),
    Zero(u8, u32, u16, bool),
    Allocate(u8, u32, u16, bool),
    Read(u8, u32, u16),
    List(u8, u8),
    /// Forgets a file that has no name any more.
    Forget(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let number = any::<u8>;
    let offset =
        || prop_oneof![4 => 0u32..40_000, 1 => (0u32..10).prop_map(|page| page * PAGE as u32)];
    let length =
        || prop_oneof![4 => 0u16..20_000, 1 => Just(PAGE as u16), 1 => Just(8192), 1 => 0u16..3];
    let mode = prop_oneof![
        3 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        1 => Just(RenameMode::Exchange),
    ];
    prop_oneof![
        2 => (number(), number()).prop_map(|(parent, name)| Step::Create(parent, name)),
        1 => (number(), number()).prop_map(|(parent, name)| Step::Mkdir(parent, name)),
        1 => (number(), number(), number()).prop_map(|(parent, name, to)| Step::Symlink(parent, name, to)),
        2 => (number(), number()).prop_map(|(link, what)| Step::Provided(link, what)),
        2 => (number(), number()).prop_map(|(parent, name)| Step::Unlink(parent, name)),
        1 => (number(), number()).prop_map(|(parent, name)| Step::Rmdir(parent, name)),
        2 => ((number(), number()), (number(), number()), mode).prop_map(|(a, b, mode)| Step::Rename(a, b, mode)),
        1 => (number(), number(), number()).prop_map(|(file, parent, name)| Step::Link(file, parent, name)),
        8 => (number(), offset(), length()).prop_map(|(file, at, length)| Step::Write(file, at, length)),
        3 => (number(), offset()).prop_map(|(file, size)| Step::Truncate(file, size)),
        2 => (number(), offset(), length(), any::<bool>()).prop_map(|(f, at, l, grow)| Step::Zero(f, at, l, grow)),
        1 => (number(), offset(), length(), any::<bool>()).prop_map(|(f, at, l, grow)| Step::Allocate(f, at, l, grow)),
        6 => (number(), offset(), length()).prop_map(|(file, at, length)| Step::Read(file, at, length)),
        1 => (number(), number()).prop_map(|(directory, batch)| Step::List(directory, batch)),
        1 => number().prop_map(Step::Forget),
    ]
}

/// The file system and the model, side by side below one directory.
struct Pair {
    fs: Arc<FileSystem>,
    model: Model,
    /// Where this pair plays; the model calls it [`ROOT`].
    top: u64,
    /// All files with a reference, named or not.
    files: Vec<u64>,
    stamp: u8,
}

impl Pair {
    fn new(fs: Arc<FileSystem>, top: u64) -> Self {
        let mut pair = Self { fs, model: Model::new(&PROVIDED), top, files: Vec::new(), stamp: 0 };
        for (number, size) in LOWER_SIZES.into_iter().enumerate() {
            let name = lower_name(number);
            let ino = pair.fs.lookup(top, name.as_bytes()).unwrap().ino;
            let bytes = Pattern::default().bytes(number, 0, size as usize);
            pair.model.make(ROOT, &name, Some(ino), Node::File(bytes)).unwrap();
            pair.files.push(ino);
        }
        pair
    }

    fn real(&self, ino: u64) -> u64 {
        if ino == ROOT { self.top } else { ino }
    }

    fn directory(&self, number: u8) -> u64 {
        let directories =
            self.model.nodes.iter().filter(|(_, node)| matches!(node, Node::Directory(_)));
        let all: Vec<u64> = directories.map(|(ino, _)| *ino).collect();
        all[number as usize % all.len()]
    }

    fn name(&self, number: u8) -> String {
        let all = NAMES.len() + LOWER_SIZES.len();
        let number = number as usize % all;
        NAMES
            .get(number)
            .map_or_else(|| lower_name(number - NAMES.len()), |name| (*name).to_owned())
    }

    fn file(&self, number: u8) -> Option<u64> {
        (!self.files.is_empty()).then(|| self.files[number as usize % self.files.len()])
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Create(parent, name) => self.make(parent, name, Node::File(Vec::new())),
            Step::Mkdir(parent, name) => {
                self.make(parent, name, Node::Directory(Default::default()))
            }
            Step::Symlink(parent, name, to) => {
                let destination = DESTINATIONS[to as usize % DESTINATIONS.len()].to_owned();
                self.make(parent, name, Node::Symlink(destination));
            }
            Step::Provided(number, what) => self.provided(number, what),
            Step::Unlink(parent, name) => {
                let (parent, name) = (self.directory(parent), self.name(name));
                let result = self.fs.unlink(self.real(parent), name.as_bytes());
                assert_eq!(result, self.model.unlink(parent, &name));
            }
            Step::Rmdir(parent, name) => {
                let (parent, name) = (self.directory(parent), self.name(name));
                let result = self.fs.rmdir(self.real(parent), name.as_bytes());
                assert_eq!(result, self.model.rmdir(parent, &name));
            }
            Step::Rename((from, from_name), (to, to_name), mode) => {
                let (from, from_name) = (self.directory(from), self.name(from_name));
                let (to, to_name) = (self.directory(to), self.name(to_name));
                let real =
                    ((self.real(from), from_name.as_bytes()), (self.real(to), to_name.as_bytes()));
                let result = self.fs.rename(real.0, real.1, mode);
                assert_eq!(result, self.model.rename((from, &from_name), (to, &to_name), mode));
            }
            Step::Link(file, parent, name) => {
                let Some(ino) = self.file(file) else { return };
                let (parent, name) = (self.directory(parent), self.name(name));
                let result = self.fs.link(ino, self.real(parent), name.as_bytes());
                assert_eq!(
                    result.map(|attributes| attributes.ino),
                    self.model.link(ino, parent, &name).map(|()| ino)
                );
                if result.is_ok() {
                    self.fs.forget(ino, 1);
                }
            }
            Step::Forget(number) => {
                let Some(ino) = self.file(number) else { return };
                if self.model.links(ino) == 0 {
                    self.files.retain(|file| *file != ino);
                    self.model.nodes.remove(&ino);
                    self.fs.forget(ino, 1);
                    assert_eq!(self.fs.getattr(ino), Err(Errno::NOENT), "a forgotten file is gone");
                }
            }
            Step::List(directory, batch) => {
                self.list(self.directory(directory), usize::from(batch % 5) + 1)
            }
            Step::Write(file, ..)
            | Step::Truncate(file, ..)
            | Step::Zero(file, ..)
            | Step::Allocate(file, ..)
            | Step::Read(file, ..) => {
                if let Some(ino) = self.file(file) {
                    self.on_content(ino, step);
                }
            }
        }
    }

    /// Makes a link that may be made, or gives it a second name.
    fn provided(&mut self, number: u8, what: u8) {
        let (path, destination) = PROVIDED[number as usize % PROVIDED.len()];
        let (parent, name) = match path.split_once('/') {
            None => (ROOT, path),
            Some((parent, name)) => match self.model.child(ROOT, parent) {
                Ok(ino) => (ino, name),
                Err(_) => return,
            },
        };
        match (self.model.child(parent, name), what % 3) {
            (Ok(ino), 0) => {
                let (to, to_name) = (self.directory(what), self.name(number));
                let result = self.fs.link(ino, self.real(to), to_name.as_bytes());
                assert_eq!(result.map(drop), self.model.link(ino, to, &to_name));
                if result.is_ok() {
                    self.fs.forget(ino, 1);
                }
            }
            (Ok(_), 1) => {
                let result = self.fs.unlink(self.real(parent), name.as_bytes());
                assert_eq!(result, self.model.unlink(parent, name));
            }
            _ => self.make_in(parent, name, Node::Symlink(destination.to_owned())),
        }
    }

    fn make(&mut self, parent: u8, name: u8, node: Node) {
        self.make_in(self.directory(parent), &self.name(name), node);
    }

    fn make_in(&mut self, parent: u64, name: &str, node: Node) {
        let real = self.real(parent);
        let result = match &node {
            Node::File(_) => self.fs.create(real, name.as_bytes(), 0o600),
            Node::Directory(_) => self.fs.mkdir(real, name.as_bytes(), 0o700),
            Node::Symlink(to) => self.fs.symlink(real, name.as_bytes(), to.as_bytes()),
        };
        let ino = result.as_ref().ok().map(|attributes| attributes.ino);
        let kind = model::kind(&node);
        assert_eq!(result.map(drop), self.model.make(parent, name, ino, node));
        match (ino, kind) {
            (Some(ino), Kind::File) => self.files.push(ino),
            (Some(ino), Kind::Symlink) => self.fs.forget(ino, 1),
            _ => {}
        }
    }

    fn on_content(&mut self, ino: u64, step: &Step) {
        self.stamp = self.stamp.wrapping_add(1);
        let file = self.model.file(ino);
        match *step {
            Step::Write(_, offset, length) => {
                let bytes = vec![self.stamp; length.into()];
                write(&self.fs, ino, offset.into(), &bytes).unwrap();
                model::write(file, offset as usize, &bytes);
            }
            Step::Truncate(_, size) => {
                let change = Change { size: Some(size.into()), ..Change::default() };
                self.fs.setattr(ino, change).unwrap();
                file.resize(size as usize, 0);
            }
            Step::Zero(_, offset, length, grow) => {
                wait(|reply| self.fs.zero(ino, offset.into(), length.into(), grow, reply)).unwrap();
                model::zero(file, offset as usize, length.into(), grow);
            }
            Step::Allocate(_, offset, length, grow) => {
                self.fs.allocate(ino, offset.into(), length.into(), grow).unwrap();
                if grow {
                    file.resize(file.len().max(offset as usize + usize::from(length)), 0);
                }
            }
            Step::Read(_, offset, length) => {
                let found = read(&self.fs, ino, offset.into(), length.into()).unwrap();
                assert!(
                    found == model::read(file, offset as usize, length.into()),
                    "{ino}: {step:?}"
                );
            }
            _ => unreachable!("not about content"),
        }
        assert_eq!(self.fs.getattr(ino).unwrap().size, file.len() as u64, "{ino}: {step:?}");
    }

    fn list(&self, directory: u64, batch: usize) {
        let (mut cookie, mut found) = (0, Vec::new());
        loop {
            let entries = self.fs.list(self.real(directory), cookie, batch).unwrap();
            found.extend(
                entries
                    .iter()
                    .map(|entry| (String::from_utf8_lossy(&entry.name).into_owned(), entry.ino)),
            );
            match entries.last() {
                Some(last) => cookie = last.cookie,
                None => break,
            }
        }
        assert_eq!((&found[0].0[..], &found[1].0[..]), (".", ".."));
        assert_eq!(found[0].1, self.real(directory));
        if let Some(parent) = self.model.parent(directory) {
            assert_eq!(found[1].1, self.real(parent));
        }
        let mut found = found.split_off(2);
        found.sort();
        let want: Vec<_> = self.model.entries(directory).unwrap().clone().into_iter().collect();
        assert_eq!(found, want);
    }

    /// Compares everything.
    fn check(&mut self) {
        for (ino, node) in self.model.nodes.clone() {
            let attributes = self.fs.getattr(self.real(ino)).unwrap();
            match node {
                Node::File(bytes) => {
                    assert_eq!(attributes.links as usize, self.model.links(ino));
                    let found = read(&self.fs, ino, 0, bytes.len() + 100).unwrap();
                    assert!(found == bytes, "content of {ino}");
                }
                Node::Directory(entries) => {
                    let below = entries
                        .values()
                        .filter(|ino| matches!(self.model.nodes[ino], Node::Directory(_)));
                    assert_eq!(attributes.links as usize, 2 + below.count());
                    self.list(ino, 3);
                }
                Node::Symlink(destination) => {
                    assert_eq!(attributes.links, 1);
                    assert_eq!(&self.fs.readlink(ino).unwrap()[..], destination.as_bytes());
                }
            }
        }
    }
}

fn lower_name(number: usize) -> String {
    format!("lower-{number}")
}

fn wait(ask: impl FnOnce(Box<dyn FnOnce(Result<(), Errno>) + Send>)) -> Result<(), Errno> {
    let (sender, receiver) = mpsc::channel();
    ask(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv().unwrap()
}

fn write(fs: &FileSystem, ino: u64, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    wait(|reply| fs.write(ino, offset, bytes, reply))
}

fn read(fs: &FileSystem, ino: u64, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let (sender, receiver) = mpsc::channel();
    fs.read(ino, offset, length, move |result| sender.send(result.map(<[u8]>::to_vec)).unwrap());
    receiver.recv().unwrap()
}

/// A file system with `tops` directories that hold the lower's files; its layer directory lives as
/// long.
struct Made {
    fs: Arc<FileSystem>,
    directory: tempfile::TempDir,
}

impl Made {
    fn new(tops: usize, answer_every: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut tree = Tree::new();
        for top in 0..tops {
            tree.directory(format!("{top}"), 0).unwrap();
            for (number, size) in LOWER_SIZES.into_iter().enumerate() {
                tree.file(format!("{top}/{}", lower_name(number)), number, size, 0).unwrap();
            }
        }
        let lower = Pattern { answer_every, ..Pattern::default() };
        let owner = Owner { uid: 0, gid: 0 };
        let layer = directory.path().join("layer");
        let fs = FileSystem::new(
            tree,
            Arc::new(lower),
            &layer,
            owner,
            Box::new(|fault| assert_eq!(fault.kind, FaultKind::Link, "{fault:?}")),
        );
        let fs = Arc::new(fs.unwrap());
        for top in 0..tops {
            for (path, destination) in PROVIDED {
                fs.provide_link(&format!("{top}/{path}"), destination.as_bytes()).unwrap();
            }
        }
        fs.start_workers(2).unwrap();
        Self { fs, directory }
    }

    fn pair(&self, top: usize) -> Pair {
        let ino = self.fs.lookup(ROOT, format!("{top}").as_bytes()).unwrap().ino;
        Pair::new(self.fs.clone(), ino)
    }

    fn layer_files(&self) -> usize {
        let entries = std::fs::read_dir(self.directory.path().join("layer")).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name() != "lock").count()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.fs.abort(); // ends the workers
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn behaves_like_the_model(steps in prop::collection::vec(step(), 1..120), answer_every in 0u64..4) {
        let made = Made::new(1, answer_every);
        let mut pair = made.pair(0);
        for step in &steps {
            pair.run(step);
        }
        pair.check();
        prop_assert_eq!(made.fs.fault_count(), pair.model.refused);
        // Whatever has neither name nor reference leaves nothing in the layer.
        let files: Vec<_> = pair.model.nodes.iter().filter(|(_, node)| matches!(node, Node::File(_))).collect();
        prop_assert!(made.layer_files() <= files.len());
        for ino in pair.files.drain(..) {
            pair.fs.forget(ino, 1);
        }
        let named = pair.model.nodes.keys().filter(|ino| pair.model.links(**ino) > 0).count();
        prop_assert!(made.layer_files() <= named);
    }

    #[test]
    fn threads_on_their_own_files_do_not_disturb_each_other(
        steps in prop::collection::vec(prop::collection::vec(step(), 60..61), 3..4),
    ) {
        let made = Made::new(steps.len(), 2);
        let refused = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for (top, steps) in steps.iter().enumerate() {
                let (mut pair, refused) = (made.pair(top), &refused);
                scope.spawn(move || {
                    steps.iter().for_each(|step| pair.run(step));
                    pair.check();
                    refused.fetch_add(pair.model.refused, Ordering::SeqCst);
                });
            }
        });
        prop_assert_eq!(made.fs.fault_count(), refused.into_inner());
    }
}

/// Each operation takes effect at one instant: a read that covers a write sees all of it or
/// nothing, and never an older write of the same writer after a newer one.
#[test]
fn operations_on_a_shared_file_are_atomic() {
    const RANGE: std::ops::Range<u64> = 3000..3000 + 5 * PAGE;
    const WRITERS: u8 = 3;
    let made = Made::new(1, 3);
    let top = made.fs.lookup(ROOT, b"0").unwrap().ino;
    let ino = made.fs.lookup(top, lower_name(4).as_bytes()).unwrap().ino;
    let length = (RANGE.end - RANGE.start) as usize;
    write(&made.fs, ino, RANGE.start, &vec![0; length]).unwrap();
    let started = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (fs, started) = (&made.fs, &started);
            scope.spawn(move || {
                for round in 0..60u8 {
                    started.fetch_add(1, Ordering::SeqCst);
                    write(fs, ino, RANGE.start, &vec![round * WRITERS + writer + 1; length])
                        .unwrap();
                    if round % 16 == 7 {
                        // Truncating at the range's end never shows in it.
                        let change = Change { size: Some(RANGE.end), ..Change::default() };
                        fs.setattr(ino, change).unwrap();
                    }
                }
            });
        }
        for _ in 0..2 {
            let (fs, started) = (&made.fs, &started);
            scope.spawn(move || {
                let mut newest = [0; WRITERS as usize];
                while started.load(Ordering::SeqCst) < 60 * u64::from(WRITERS) {
                    let bytes = read(fs, ino, RANGE.start, length).unwrap();
                    assert_eq!(bytes.len(), length);
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn read");
                    if bytes[0] > 0 {
                        let (writer, round) =
                            ((bytes[0] - 1) % WRITERS, (bytes[0] - 1) / WRITERS + 1);
                        let newest = &mut newest[usize::from(writer)];
                        // A writer's older round may show again only if another's write does not
                        // lie between; the last write wins, so a round never goes back.
                        assert!(round >= *newest, "round {round} of {writer} after {newest}");
                        *newest = round;
                    }
                }
            });
        }
    });
    assert_eq!(read(&made.fs, ino, 0, 3000).unwrap(), Pattern::default().bytes(4, 0, 3000));
}

/// Many threads rename, link and remove in the same directories: names stay consistent, nothing is
/// left behind.
#[test]
fn threads_on_the_same_names_keep_them_consistent() {
    let made = Made::new(1, 0);
    let top = made.fs.lookup(ROOT, b"0").unwrap().ino;
    for directory in [b"a", b"b"] {
        made.fs.mkdir(top, directory, 0o700).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let fs = &made.fs;
            scope.spawn(move || {
                let mut random = Random(thread);
                let directories = [b"a", b"b"].map(|name| fs.lookup(top, name).unwrap().ino);
                for _ in 0..3000 {
                    let mut place = || {
                        (directories[random.below(2)], NAMES[random.below(NAMES.len())].as_bytes())
                    };
                    let (from, to) = (place(), place());
                    match random.below(5) {
                        0 => drop(fs.create(from.0, from.1, 0o600).map(|made| {
                            write(fs, made.ino, 5, b"some bytes").unwrap();
                            fs.forget(made.ino, 1);
                        })),
                        1 => drop(fs.unlink(from.0, from.1)),
                        2 => drop(fs.rename(from, to, RenameMode::Replace)),
                        3 => drop(fs.rename(from, to, RenameMode::Exchange)),
                        _ => drop(fs.lookup(from.0, from.1).map(|found| {
                            if fs.link(found.ino, to.0, to.1).is_ok() {
                                fs.forget(found.ino, 1);
                            }
                            let _ = read(fs, found.ino, 0, 100).unwrap();
                            fs.forget(found.ino, 1);
                        })),
                    }
                }
            });
        }
    });
    let mut links = std::collections::HashMap::new();
    for directory in [b"a", b"b"] {
        let ino = made.fs.lookup(top, directory).unwrap().ino;
        for entry in made.fs.list(ino, 0, 100).unwrap().into_iter().skip(2) {
            *links.entry(entry.ino).or_insert(0) += 1;
            let looked_up = made.fs.lookup(ino, &entry.name).unwrap();
            assert_eq!(looked_up.ino, entry.ino);
        }
    }
    for (ino, count) in &links {
        assert_eq!(made.fs.getattr(*ino).unwrap().links, *count);
    }
    assert!(made.layer_files() <= links.len(), "no layer file without a name");
    assert_eq!(made.fs.fault_count(), 0);
}

/// A cluster of many small databases is no reason to be large.
#[test]
fn a_hundred_thousand_files_cost_little_memory() {
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    let mut tree = Tree::new();
    for file in 0..100_000 {
        tree.file(format!("base/{}/{file}", file / 300), file, 8192, 0).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let owner = Owner { uid: 0, gid: 0 };
    let layer = directory.path().join("layer");
    let lower = Arc::new(Pattern::default());
    let fs = FileSystem::new(tree, lower, &layer, owner, Box::new(|_| {})).unwrap();
    let base = fs.lookup(ROOT, b"base").unwrap().ino;
    assert_eq!(fs.list(base, 0, 1000).unwrap().len(), 334 + 2);
    let used = resident().saturating_sub(before);
    assert!((10_000_000..80_000_000).contains(&used), "{used} bytes");
    println!("{} bytes per file", used / 100_000);
}
