//! A file system as simple as can be: what the real one must behave like.

use std::collections::BTreeMap;

use pgthaw_mountfs::{Kind, ROOT, RenameMode};
use rustix::io::Errno;

type Answer<T> = Result<T, Errno>;

/// Directories are maps, files are byte vectors.
#[derive(Debug)]
pub struct Model {
    pub nodes: BTreeMap<u64, Node>,
    /// The symbolic links that may be made: path and destination.
    provided: &'static [(&'static str, &'static str)],
    /// How many links were refused.
    pub refused: u64,
}

#[derive(Debug, Clone)]
pub enum Node {
    File(Vec<u8>),
    Directory(BTreeMap<String, u64>),
    Symlink(String),
}

impl Model {
    pub fn new(provided: &'static [(&'static str, &'static str)]) -> Self {
        let nodes = BTreeMap::from([(ROOT, Node::Directory(BTreeMap::new()))]);
        Self { nodes, provided, refused: 0 }
    }

    pub fn entries(&self, directory: u64) -> Answer<&BTreeMap<String, u64>> {
        match self.nodes.get(&directory) {
            Some(Node::Directory(entries)) => Ok(entries),
            Some(Node::File(_) | Node::Symlink(_)) => Err(Errno::NOTDIR),
            None => Err(Errno::NOENT),
        }
    }

    fn entries_mut(&mut self, directory: u64) -> Answer<&mut BTreeMap<String, u64>> {
        match self.nodes.get_mut(&directory) {
            Some(Node::Directory(entries)) => Ok(entries),
            Some(Node::File(_) | Node::Symlink(_)) => Err(Errno::NOTDIR),
            None => Err(Errno::NOENT),
        }
    }

    pub fn child(&self, parent: u64, name: &str) -> Answer<u64> {
        self.entries(parent)?.get(name).copied().ok_or(Errno::NOENT)
    }

    fn is_directory(&self, ino: u64) -> bool {
        matches!(self.nodes.get(&ino), Some(Node::Directory(_)))
    }

    /// Says what making `name` gives; `ino` is the number the real one chose.
    pub fn make(&mut self, parent: u64, name: &str, ino: Option<u64>, node: Node) -> Answer<()> {
        let entries = self.entries_mut(parent)?;
        if entries.contains_key(name) {
            return Err(Errno::EXIST);
        }
        if let Node::Symlink(destination) = &node {
            let path = self.path(parent, name);
            self.provided(&path, destination)?;
        }
        let entries = self.entries_mut(parent)?;
        let ino = ino.expect("the model makes what the real one refused");
        entries.insert(name.to_owned(), ino);
        assert!(self.nodes.insert(ino, node).is_none(), "number {ino} was used before");
        Ok(())
    }

    pub fn link(&mut self, ino: u64, parent: u64, name: &str) -> Answer<()> {
        if self.is_directory(ino) {
            return Err(Errno::PERM);
        }
        if self.links(ino) == 0 {
            return Err(Errno::NOENT);
        }
        let entries = self.entries_mut(parent)?;
        if entries.contains_key(name) {
            return Err(Errno::EXIST);
        }
        if matches!(self.nodes[&ino], Node::Symlink(_)) {
            return self.refuse();
        }
        self.entries_mut(parent)?.insert(name.to_owned(), ino);
        Ok(())
    }

    fn refuse(&mut self) -> Answer<()> {
        self.refused += 1;
        Err(Errno::PERM)
    }

    fn provided(&mut self, path: &str, destination: &str) -> Answer<()> {
        match self.provided.contains(&(path, destination)) {
            true => Ok(()),
            false => self.refuse(),
        }
    }

    /// The path of `name` in `parent`, below the root.
    fn path(&self, parent: u64, name: &str) -> String {
        let Some(above) = self.parent(parent) else { return name.to_owned() };
        let entries = self.entries(above).unwrap();
        let (own, _) = entries.iter().find(|(_, ino)| **ino == parent).unwrap();
        format!("{}/{name}", self.path(above, own))
    }

    /// Refuses to move links to where they may not be, and directories that hold any.
    fn may_move(&mut self, moved: u64, to: (u64, &str)) -> Answer<()> {
        match self.nodes[&moved].clone() {
            Node::File(_) => Ok(()),
            Node::Symlink(destination) => {
                let path = self.path(to.0, to.1);
                self.provided(&path, &destination)
            }
            Node::Directory(_) => match self.holds_link(moved) {
                true => self.refuse(),
                false => Ok(()),
            },
        }
    }

    fn holds_link(&self, ino: u64) -> bool {
        match &self.nodes[&ino] {
            Node::File(_) => false,
            Node::Symlink(_) => true,
            Node::Directory(entries) => entries.values().any(|ino| self.holds_link(*ino)),
        }
    }

    pub fn links(&self, ino: u64) -> usize {
        let entries = self.nodes.values().filter_map(|node| match node {
            Node::Directory(entries) => Some(entries.values()),
            Node::File(_) | Node::Symlink(_) => None,
        });
        entries.flatten().filter(|named| **named == ino).count()
    }

    /// Returns the directory that holds `ino`.
    pub fn parent(&self, ino: u64) -> Option<u64> {
        let holds = |node: &Node| matches!(node, Node::Directory(entries) if entries.values().any(|named| *named == ino));
        self.nodes.iter().find(|(_, node)| holds(node)).map(|(parent, _)| *parent)
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Answer<()> {
        let ino = self.child(parent, name)?;
        if self.is_directory(ino) {
            return Err(Errno::ISDIR);
        }
        self.entries_mut(parent)?.remove(name);
        self.forget_link(ino);
        Ok(())
    }

    /// A link has one name only, and no references.
    fn forget_link(&mut self, ino: u64) {
        if matches!(self.nodes.get(&ino), Some(Node::Symlink(_))) {
            self.nodes.remove(&ino);
        }
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Answer<()> {
        let ino = self.child(parent, name)?;
        if !self.entries(ino)?.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.entries_mut(parent)?.remove(name);
        self.nodes.remove(&ino);
        Ok(())
    }

    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str), mode: RenameMode) -> Answer<()> {
        let moved = self.child(from.0, from.1)?;
        let there = self.entries(to.0)?.get(to.1).copied();
        match (mode, there) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EXIST),
            (RenameMode::Exchange, None) => return Err(Errno::NOENT),
            (_, Some(there)) if there == moved => return Ok(()),
            _ => {}
        }
        if self.holds(moved, to.0) {
            return Err(Errno::INVAL);
        }
        match (mode, there) {
            (RenameMode::Exchange, Some(there)) => {
                if self.holds(there, from.0) {
                    return Err(Errno::INVAL);
                }
                self.may_move(moved, to)?;
                self.may_move(there, from)?;
                self.entries_mut(from.0)?.insert(from.1.to_owned(), there);
            }
            (_, Some(there)) => {
                match (self.is_directory(there), self.is_directory(moved)) {
                    (true, true) if !self.entries(there)?.is_empty() => {
                        return Err(Errno::NOTEMPTY);
                    }
                    (true, false) => return Err(Errno::ISDIR),
                    (false, true) => return Err(Errno::NOTDIR),
                    (true, true) | (false, false) => {}
                }
                self.may_move(moved, to)?;
                if self.is_directory(there) {
                    self.nodes.remove(&there);
                }
                self.forget_link(there);
                self.entries_mut(from.0)?.remove(from.1);
            }
            (_, None) => {
                self.may_move(moved, to)?;
                self.entries_mut(from.0)?.remove(from.1);
            }
        }
        self.entries_mut(to.0)?.insert(to.1.to_owned(), moved);
        Ok(())
    }

    /// Whether `directory` is `top` or lies below it.
    fn holds(&self, top: u64, directory: u64) -> bool {
        let below =
            |entries: &BTreeMap<_, u64>| entries.values().any(|at| self.holds(*at, directory));
        top == directory
            || matches!(self.nodes.get(&top), Some(Node::Directory(entries)) if below(entries))
    }

    pub fn file(&mut self, ino: u64) -> &mut Vec<u8> {
        match self.nodes.get_mut(&ino) {
            Some(Node::File(bytes)) => bytes,
            other => panic!("{ino} is no file but {other:?}"),
        }
    }
}

/// Stores `bytes` at `offset`.
pub fn write(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if !bytes.is_empty() {
        file.resize(file.len().max(offset + bytes.len()), 0);
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// Makes `length` bytes zeros, growing the file or not.
pub fn zero(file: &mut Vec<u8>, offset: usize, length: usize, grow: bool) {
    if grow {
        file.resize(file.len().max(offset + length), 0);
    }
    let end = (offset + length).min(file.len());
    if offset < end {
        file[offset..end].fill(0);
    }
}

/// Returns what a read gives.
pub fn read(file: &[u8], offset: usize, length: usize) -> &[u8] {
    let end = (offset + length).min(file.len());
    file.get(offset..end).unwrap_or_default()
}

pub fn kind(node: &Node) -> Kind {
    match node {
        Node::File(_) => Kind::File,
        Node::Directory(_) => Kind::Directory,
        Node::Symlink(_) => Kind::Symlink,
    }
}
