//! Names, directories and links: who is called what, and how long a number lives. Memory work only.
//!
//! A number lives while a name or the kernel's memory (lookups not yet forgotten) refers to it; the
//! kernel keeps its reference while a file is open or mapped, so unlinked open files need nothing
//! more.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::io::Errno;

use crate::file::{Facts, File};
use crate::links::{Changed, Links, Refusal, shown};
use crate::{Ino, ROOT, Result};

/// A name in a directory: not empty, no `/`, no NUL, not `.` or `..`.
pub(crate) type Name = Arc<[u8]>;

const LONGEST_NAME: usize = 255;
/// Cookies 1 and 2 are `.` and `..`.
const FIRST_COOKIE: u64 = 3;

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// What `stat` shows, besides the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// The number.
    pub ino: Ino,
    /// What it is.
    pub kind: Kind,
    /// Bytes; for a link the length of its target.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// How many names it has.
    pub links: u32,
    /// When the content changed.
    pub mtime: SystemTime,
    /// When content or attributes changed.
    pub ctime: SystemTime,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: Arc<[u8]>,
    /// What it names.
    pub ino: Ino,
    /// What that is.
    pub kind: Kind,
    /// Where to go on after this entry; never used twice in a directory.
    pub cookie: u64,
}

pub(crate) struct Node {
    /// References the kernel holds.
    lookups: AtomicU64,
    links: u32,
    /// One of its names; kept when it loses the last one, for messages.
    place: (Ino, Name),
    pub(crate) body: Body,
}

pub(crate) enum Body {
    File(Arc<File>),
    Directory(Box<Directory>),
    Symlink { target: Arc<[u8]>, facts: Facts },
}

impl Body {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::File(_) => Kind::File,
            Self::Directory(_) => Kind::Directory,
            Self::Symlink { .. } => Kind::Symlink,
        }
    }
}

/// A directory's entries, by name and in the order they came.
pub(crate) struct Directory {
    parent: Ino,
    entries: HashMap<Name, (Ino, u64)>,
    order: BTreeMap<u64, Name>,
    next_cookie: u64,
    pub(crate) facts: Facts,
}

impl Directory {
    fn new(parent: Ino, facts: Facts) -> Box<Self> {
        let (entries, order) = Default::default();
        Box::new(Self { parent, entries, order, next_cookie: FIRST_COOKIE, facts })
    }

    /// Puts `ino` under `name` and returns what was there; the entry keeps its place in the order.
    fn put(&mut self, name: &Name, ino: Ino) -> Option<Ino> {
        self.changed();
        if let Some((there, _)) = self.entries.get_mut(name) {
            return Some(std::mem::replace(there, ino));
        }
        self.entries.insert(name.clone(), (ino, self.next_cookie));
        self.order.insert(self.next_cookie, name.clone());
        self.next_cookie += 1;
        None
    }

    fn remove(&mut self, name: &[u8]) {
        if let Some((_, cookie)) = self.entries.remove(name) {
            self.order.remove(&cookie);
        }
        self.changed();
    }

    fn changed(&mut self) {
        let now = SystemTime::now();
        (self.facts.mtime, self.facts.ctime) = (now, now);
    }
}

/// How a rename treats a name that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameMode {
    /// It is replaced.
    Replace,
    /// It is an error (`RENAME_NOREPLACE`).
    NoReplace,
    /// It gets the other name (`RENAME_EXCHANGE`).
    Exchange,
}

/// Attributes, or what it takes to get them once the names are not locked any more.
pub(crate) enum Found {
    Known(Attributes),
    File { ino: Ino, links: u32, file: Arc<File> },
}

impl Found {
    /// Returns the attributes; waits for the file's lock, so the names must not be locked.
    pub(crate) fn attributes(self) -> Attributes {
        match self {
            Self::Known(attributes) => attributes,
            Self::File { ino, links, file } => {
                let (size, facts) = file.stat();
                known(ino, Kind::File, size, links, facts)
            }
        }
    }
}

fn known(ino: Ino, kind: Kind, size: u64, links: u32, facts: Facts) -> Attributes {
    Attributes { ino, kind, size, mode: facts.mode, links, mtime: facts.mtime, ctime: facts.ctime }
}

/// All numbers of the mount.
pub(crate) struct Names {
    nodes: HashMap<Ino, Node>,
    next: Ino,
    pub(crate) links: Links,
}

impl Names {
    /// Makes the root directory and nothing else.
    pub(crate) fn new(facts: Facts) -> Self {
        let root = Node {
            lookups: AtomicU64::new(1),
            links: 2,
            place: (ROOT, Arc::from([])),
            body: Body::Directory(Directory::new(ROOT, facts)),
        };
        Self { nodes: HashMap::from([(ROOT, root)]), next: ROOT + 1, links: Links::default() }
    }

    pub(crate) fn node(&self, ino: Ino) -> Result<&Node> {
        self.nodes.get(&ino).ok_or(Errno::NOENT)
    }

    pub(crate) fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(Errno::NOENT)
    }

    fn directory(&self, ino: Ino) -> Result<&Directory> {
        match &self.node(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn directory_mut(&mut self, ino: Ino) -> Result<&mut Directory> {
        match &mut self.node_mut(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// Returns what `name` in `parent` is.
    pub(crate) fn child(&self, parent: Ino, name: &[u8]) -> Result<Ino> {
        if name.len() > LONGEST_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        self.directory(parent)?.entries.get(name).map(|(ino, _)| *ino).ok_or(Errno::NOENT)
    }

    /// Returns the regular file with number `ino`.
    pub(crate) fn file(&self, ino: Ino) -> Result<Arc<File>> {
        match &self.node(ino)?.body {
            Body::File(file) => Ok(file.clone()),
            Body::Directory(_) => Err(Errno::ISDIR),
            Body::Symlink { .. } => Err(Errno::INVAL),
        }
    }

    /// Finds the attributes of `ino` and counts `references` to it that the kernel will forget
    /// later.
    pub(crate) fn find(&self, ino: Ino, references: u64) -> Result<Found> {
        let node = self.node(ino)?;
        node.lookups.fetch_add(references, Ordering::Relaxed);
        Ok(match &node.body {
            Body::File(file) => Found::File { ino, links: node.links, file: file.clone() },
            Body::Directory(directory) => {
                Found::Known(known(ino, Kind::Directory, 4096, node.links, directory.facts))
            }
            Body::Symlink { target, facts } => {
                Found::Known(known(ino, Kind::Symlink, target.len() as u64, node.links, *facts))
            }
        })
    }

    /// Takes back `references`; returns whether the number is now unused and
    /// [`Names::remove_unused`] is due.
    pub(crate) fn forget(&self, ino: Ino, references: u64) -> bool {
        let Ok(node) = self.node(ino) else { return false };
        let less = |held: u64| Some(held.saturating_sub(references));
        let held =
            node.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).unwrap_or(0);
        held <= references && node.links == 0
    }

    /// Takes out `ino` if no name and no reference is left; the caller drops it without the lock.
    pub(crate) fn remove_unused(&mut self, ino: Ino) -> Option<Node> {
        let node = self.nodes.get(&ino)?;
        if node.links > 0 || node.lookups.load(Ordering::Relaxed) > 0 {
            return None;
        }
        self.links.numbers.remove(&ino);
        self.nodes.remove(&ino)
    }

    /// Makes `name` in `parent`; `body` gets the new number.
    pub(crate) fn make(
        &mut self,
        parent: Ino,
        name: &[u8],
        body: impl FnOnce(Ino) -> Body,
    ) -> Result<Ino> {
        let name = checked(name)?;
        match self.child(parent, &name) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
            Ok(_) => return Err(Errno::EXIST),
        }
        self.living(parent)?;
        let ino = self.next;
        self.next += 1;
        let body = body(ino);
        let directory = body.kind() == Kind::Directory;
        if body.kind() == Kind::Symlink {
            self.links.numbers.insert(ino);
        }
        let node =
            Node { lookups: AtomicU64::new(0), links: 1, place: (parent, name.clone()), body };
        self.nodes.insert(ino, node);
        self.directory_mut(parent)?.put(&name, ino);
        if directory {
            self.node_mut(ino)?.links = 2;
            self.node_mut(parent)?.links += 1;
        }
        Ok(ino)
    }

    /// Makes an empty directory.
    pub(crate) fn make_directory(&mut self, parent: Ino, name: &[u8], facts: Facts) -> Result<Ino> {
        self.make(parent, name, |_| Body::Directory(Directory::new(parent, facts)))
    }

    /// Makes a symbolic link to `target`, if that was provided for it.
    pub(crate) fn make_symlink(
        &mut self,
        parent: Ino,
        name: &[u8],
        target: &[u8],
        facts: Facts,
    ) -> Changed<Ino> {
        match self.child(parent, name) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Err(Errno::EXIST.into()),
        }
        self.living(parent)?;
        self.links.check(self.path_in(parent, name), target)?;
        let target = Arc::from(target);
        Ok(self.make(parent, name, |_| Body::Symlink { target, facts })?)
    }

    /// Returns the directory at `path`, made with its parents as far as it is absent, and the names that were made.
    pub(crate) fn make_directories(
        &mut self,
        path: &[u8],
        facts: Facts,
    ) -> Result<Vec<(Ino, Name)>> {
        let parts: Vec<Name> =
            path.split(|byte| *byte == b'/').map(checked).collect::<Result<_>>()?;
        let (mut at, mut made) = (ROOT, Vec::new());
        for name in parts {
            at = match self.child(at, &name) {
                Err(Errno::NOENT) => {
                    made.push((at, name.clone()));
                    self.make_directory(at, &name, facts)?
                }
                there => there?,
            };
        }
        self.directory(at)?;
        Ok(made)
    }

    /// Gives `ino` one more name. A symbolic link has only one.
    pub(crate) fn link(&mut self, ino: Ino, parent: Ino, name: &[u8]) -> Changed<()> {
        let name = checked(name)?;
        let node = self.node(ino)?;
        match node.body.kind() {
            Kind::Directory => return Err(Errno::PERM.into()),
            _ if node.links == 0 => return Err(Errno::NOENT.into()),
            _ => {}
        }
        self.living(parent)?;
        if self.child(parent, &name).is_ok() {
            return Err(Errno::EXIST.into());
        }
        if let Body::Symlink { target, .. } = &self.node(ino)?.body {
            return Err(Refusal::link(self.path_in(parent, &name), target));
        }
        self.directory_mut(parent)?.put(&name, ino);
        let node = self.node_mut(ino)?;
        node.links += 1;
        node.place = (parent, name);
        Ok(())
    }

    /// Removes a name that is no directory; returns what it named.
    pub(crate) fn unlink(&mut self, parent: Ino, name: &[u8]) -> Result<Ino> {
        let ino = self.child(parent, name)?;
        if self.node(ino)?.body.kind() == Kind::Directory {
            return Err(Errno::ISDIR);
        }
        self.directory_mut(parent)?.remove(name);
        self.node_mut(ino)?.links -= 1;
        Ok(ino)
    }

    /// Removes an empty directory; returns its number.
    pub(crate) fn remove_directory(&mut self, parent: Ino, name: &[u8]) -> Result<Ino> {
        let ino = self.child(parent, name)?;
        if !self.directory(ino)?.entries.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.directory_mut(parent)?.remove(name);
        self.node_mut(parent)?.links -= 1;
        self.node_mut(ino)?.links = 0;
        Ok(ino)
    }

    /// Renames; returns what lost its name.
    pub(crate) fn rename(
        &mut self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
    ) -> Changed<Option<Ino>> {
        let (from_name, to_name) = (checked(from.1)?, checked(to.1)?);
        let moved = self.child(from.0, &from_name)?;
        self.living(to.0)?;
        let there = match self.child(to.0, &to_name) {
            Ok(ino) => Some(ino),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno.into()),
        };
        match (mode, there) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EXIST.into()),
            (RenameMode::Exchange, None) => return Err(Errno::NOENT.into()),
            (_, Some(there)) if there == moved => return Ok(None),
            _ => {}
        }
        self.not_below(to.0, moved)?;
        match there {
            Some(there) if mode == RenameMode::Exchange => {
                self.not_below(from.0, there)?;
                self.may_move_links(moved, to.0, &to_name)?;
                self.may_move_links(there, from.0, &from_name)?;
                self.directory_mut(from.0)?.put(&from_name, there);
                self.directory_mut(to.0)?.put(&to_name, moved);
                self.moved(there, to.0, from.0, from_name)?;
                self.moved(moved, from.0, to.0, to_name)?;
                Ok(None)
            }
            there => {
                if let Some(there) = there {
                    self.replaceable(there, self.node(moved)?.body.kind())?;
                }
                self.may_move_links(moved, to.0, &to_name)?;
                self.directory_mut(from.0)?.remove(&from_name);
                self.directory_mut(to.0)?.put(&to_name, moved);
                if let Some(there) = there {
                    let directory = self.node(there)?.body.kind() == Kind::Directory;
                    let links = &mut self.node_mut(there)?.links;
                    *links = if directory { 0 } else { *links - 1 };
                    self.node_mut(to.0)?.links -= u32::from(directory);
                }
                self.moved(moved, from.0, to.0, to_name)?;
                Ok(there)
            }
        }
    }

    /// Refuses to rename a link to a path for which its destination was not provided, and a directory with links below it.
    fn may_move_links(&self, moved: Ino, to: Ino, name: &[u8]) -> Changed<()> {
        match &self.node(moved)?.body {
            Body::File(_) => Ok(()),
            Body::Symlink { target, .. } => self.links.check(self.path_in(to, name), target),
            Body::Directory(_) => {
                for &link in &self.links.numbers {
                    let node = self.node(link)?;
                    if let Body::Symlink { target, .. } = &node.body
                        && node.links > 0
                        && self.not_below(node.place.0, moved).is_err()
                    {
                        let mut path = self.path_in(to, name);
                        let (old, full) = (self.raw_path(moved), self.raw_path(link));
                        path.extend(full.get(old.len()..).unwrap_or_default());
                        return Err(Refusal::link(path, target));
                    }
                }
                Ok(())
            }
        }
    }

    /// Refuses to replace `there` by something of another sort, or a directory that is not empty.
    fn replaceable(&self, there: Ino, by: Kind) -> Result<()> {
        match (&self.node(there)?.body, by) {
            (Body::Directory(directory), Kind::Directory) if directory.entries.is_empty() => Ok(()),
            (Body::Directory(_), Kind::Directory) => Err(Errno::NOTEMPTY),
            (Body::Directory(_), _) => Err(Errno::ISDIR),
            (_, Kind::Directory) => Err(Errno::NOTDIR),
            _ => Ok(()),
        }
    }

    /// Notes that `ino` is now called `name` in `to`, and that it was in `from` before.
    fn moved(&mut self, ino: Ino, from: Ino, to: Ino, name: Name) -> Result<()> {
        let node = self.node_mut(ino)?;
        node.place = (to, name);
        if let Body::Directory(directory) = &mut node.body {
            directory.parent = to;
            self.node_mut(from)?.links -= 1;
            self.node_mut(to)?.links += 1;
        }
        Ok(())
    }

    /// Refuses to move `moved` to `directory` if that lies in it.
    fn not_below(&self, directory: Ino, moved: Ino) -> Result<()> {
        let mut at = directory;
        while at != ROOT {
            if at == moved {
                return Err(Errno::INVAL);
            }
            at = self.directory(at)?.parent;
        }
        if moved == ROOT { Err(Errno::INVAL) } else { Ok(()) }
    }

    /// Refuses a directory that was removed: nothing can be made in it any more.
    fn living(&self, directory: Ino) -> Result<()> {
        self.directory(directory)?;
        if self.node(directory)?.links == 0 { Err(Errno::NOENT) } else { Ok(()) }
    }

    /// Returns up to `limit` entries of a directory after `cookie` (0 at first), with `.` and `..`.
    ///
    /// Entries that are there from the first call to the last come exactly once.
    pub(crate) fn list(&self, ino: Ino, cookie: u64, limit: usize) -> Result<Vec<Listed>> {
        let directory = self.directory(ino)?;
        let own = [(1, &b"."[..], ino), (2, b"..", directory.parent)];
        let own = own.into_iter().filter(|(own, ..)| *own > cookie).map(|(cookie, name, ino)| {
            Ok(Listed { name: Arc::from(name), ino, kind: Kind::Directory, cookie })
        });
        let entries = directory.order.range((Bound::Excluded(cookie), Bound::Unbounded)).map(
            |(cookie, name)| {
                let (ino, _) = *directory.entries.get(name).ok_or(Errno::IO)?;
                Ok(Listed {
                    name: name.clone(),
                    ino,
                    kind: self.node(ino)?.body.kind(),
                    cookie: *cookie,
                })
            },
        );
        own.chain(entries).take(limit).collect()
    }

    /// Returns the path of `ino` below the root, as it is or was last called, for messages.
    pub(crate) fn path(&self, ino: Ino) -> String {
        let path = shown(&self.raw_path(ino));
        match self.nodes.get(&ino) {
            Some(node) if node.links == 0 => format!("{path} (deleted)"),
            Some(_) => path,
            None => format!("number {ino}"),
        }
    }

    /// Returns the path of `name` in `parent`, below the root.
    fn path_in(&self, parent: Ino, name: &[u8]) -> Vec<u8> {
        let mut path = self.raw_path(parent);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name);
        path
    }

    fn raw_path(&self, ino: Ino) -> Vec<u8> {
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut at = ino;
        while at != ROOT
            && let Some(node) = self.nodes.get(&at)
        {
            parts.push(&node.place.1);
            at = node.place.0;
        }
        parts.reverse();
        parts.join(&b'/')
    }
}

pub(crate) fn checked(name: &[u8]) -> Result<Name> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > LONGEST_NAME => Err(Errno::NAMETOOLONG),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Errno::INVAL),
        _ => Ok(Arc::from(name)),
    }
}
