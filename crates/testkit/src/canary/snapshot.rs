//! What a tree was like, entry by entry, and what is different later.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_128;

/// How closely a tree is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Contents, and all that the file system says.
    Whole,
    /// What the file system says. The time of the last change (`ctime`) tells of each write, too, and nobody can set it;
    /// for trees that are too large to be read in each test.
    Facts,
}

/// What may be different in an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allowed {
    /// Its times.
    Times,
    /// Everything, also of what is below it, and whether it is there.
    All,
}

/// A tree at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    root: PathBuf,
    look: Look,
    /// By path below the root; the root's own is empty.
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Kind and permissions.
    mode: u32,
    owner: (u32, u32),
    /// Bytes of a file; 0 of anything else.
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    None,
    Link(PathBuf),
    Hash(u128),
}

impl Snapshot {
    /// Looks at all below `root`, itself included. An absent root has no entries.
    ///
    /// # Panics
    /// If something cannot be read.
    pub fn of(root: &Path, look: Look) -> Self {
        let mut snapshot = Self { root: root.into(), look, entries: BTreeMap::new() };
        snapshot.add(Path::new("")).unwrap_or_else(|err| panic!("{}: {err}", root.display()));
        snapshot
    }

    /// Returns a line for each difference between now and then.
    pub fn differences(&self) -> Vec<String> {
        self.differences_at(&self.root, &[])
    }

    /// As [`Snapshot::differences`], of a tree that is reached by another path now, without what is `allowed` by path below
    /// the root.
    pub(super) fn differences_at(&self, root: &Path, allowed: &[(&str, Allowed)]) -> Vec<String> {
        let now = Self::of(root, self.look);
        let paths = self.entries.keys().chain(now.entries.keys());
        let mut paths: Vec<_> = paths.collect();
        paths.sort();
        paths.dedup();
        let mut found = Vec::new();
        for path in paths {
            let times = match allowance(path, allowed) {
                Some(Allowed::All) => continue,
                Some(Allowed::Times) => false,
                None => true,
            };
            let what = match (self.entries.get(path), now.entries.get(path)) {
                (Some(_), None) => vec!["is gone".to_owned()],
                (None, Some(_)) => vec!["is new".to_owned()],
                (Some(before), Some(after)) => before.differences(after, times),
                (None, None) => Vec::new(),
            };
            let path = below(root, path);
            found.extend(what.into_iter().map(|what| format!("{}: {what}", path.display())));
        }
        found
    }

    fn add(&mut self, path: &Path) -> io::Result<()> {
        let full =
            if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) };
        let found = match fs::symlink_metadata(&full) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        let content = match self.look {
            _ if found.is_symlink() => Content::Link(fs::read_link(&full)?),
            Look::Whole if found.is_file() => {
                Content::Hash(XxHash3_128::oneshot(&fs::read(&full)?))
            }
            _ => Content::None,
        };
        let entry = Entry {
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            size: if found.is_file() { found.len() } else { 0 },
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
            content,
        };
        self.entries.insert(path.into(), entry);
        if found.is_dir() {
            for entry in fs::read_dir(&full)? {
                self.add(&path.join(entry?.file_name()))?;
            }
        }
        Ok(())
    }
}

impl Entry {
    fn differences(&self, after: &Self, times: bool) -> Vec<String> {
        let mut found = Vec::new();
        if self.mode != after.mode {
            found.push(format!("mode {:o}, then {:o}", self.mode, after.mode));
        }
        if self.owner != after.owner {
            found.push(format!("owner {:?}, then {:?}", self.owner, after.owner));
        }
        if self.size != after.size {
            found.push(format!("{} bytes, then {}", self.size, after.size));
        }
        if self.content != after.content {
            found.push(match (&self.content, &after.content) {
                (Content::Link(before), Content::Link(after)) => {
                    format!("link to {}, then {}", before.display(), after.display())
                }
                _ => "other contents".into(),
            });
        }
        if times && self.modified != after.modified {
            found.push(format!("modified at {:?}, then {:?}", self.modified, after.modified));
        }
        if times && found.is_empty() && self.changed != after.changed {
            found.push("changed and changed back".into());
        }
        found
    }
}

/// Joins them; nothing below a link to a directory is the link itself, not what it leads to.
fn below(root: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { root.into() } else { root.join(path) }
}

/// Returns what is allowed for `path`: by its own name, or all of it by a directory's above it.
fn allowance(path: &Path, allowed: &[(&str, Allowed)]) -> Option<Allowed> {
    let found = allowed.iter().find(|(name, what)| {
        let name = Path::new(name);
        path == name || (*what == Allowed::All && path.starts_with(name))
    });
    found.map(|(_, what)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed() {
        let allowed = [("pg_wal", Allowed::All), ("global", Allowed::Times), ("", Allowed::Times)];
        let cases = [
            ("", Some(Allowed::Times)),
            ("pg_wal", Some(Allowed::All)),
            ("pg_wal/1", Some(Allowed::All)),
            ("pg_wal2", None),
            ("global", Some(Allowed::Times)),
            ("global/1262", None),
            ("base", None),
        ];
        for (path, want) in cases {
            assert_eq!(allowance(Path::new(path), &allowed), want, "{path}");
        }
    }
}
