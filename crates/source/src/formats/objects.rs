//! Collects the stored objects of a backup, checks them against what is there, and puts a map together.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::SourceError;
use crate::map::{BackupMap, ClusterPath, Content, MapFile, ObjectId, ObjectTable, StoredObject};
use crate::reader::Reader;
use crate::store::{Entry, Kind, LocalStore, Root};

/// Object numbers while a map is built; the same file gets the same number.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    table: ObjectTable,
    numbers: HashMap<(u32, String), ObjectId>,
    expected: Vec<Expected>,
}

/// What the backup says about an object's stored size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Exactly so many bytes.
    Exactly(u64),
    /// At least so many: several files lie in it.
    AtLeast(u64),
}

impl Objects {
    /// Adds a root; objects name it by the number returned.
    pub(crate) fn add_root(&mut self, root: &Root) -> u32 {
        self.table.roots.push(root.path().to_path_buf());
        u32::try_from(self.table.roots.len() - 1).unwrap_or(u32::MAX)
    }

    /// Returns the number of the object at `path` beneath `root`, of which `expected` bytes are needed.
    ///
    /// # Errors
    /// More than 2³² objects.
    pub(crate) fn add(
        &mut self,
        root: u32,
        path: String,
        expected: Expected,
    ) -> Result<ObjectId, SourceError> {
        if let Some(number) = self.numbers.get(&(root, path.clone())) {
            let known = &mut self.expected[number.0 as usize];
            *known = known.and(expected);
            return Ok(*number);
        }
        let number = u32::try_from(self.table.objects.len()).map(ObjectId).map_err(|_| {
            SourceError::Unsupported {
                object: path.clone(),
                what: "a backup with more than 4 billion files".into(),
            }
        })?;
        self.table.objects.push(StoredObject { root, path: path.clone() });
        self.expected.push(expected);
        self.numbers.insert((root, path), number);
        Ok(number)
    }

    /// Compares every object with what lies in the store: there, a regular file, as long as it must be. Only
    /// directories are listed, each once.
    ///
    /// # Errors
    /// The first object that is missing or has another size.
    pub(crate) fn check(&self, roots: &[&Root]) -> Result<(), SourceError> {
        let mut by_directory: BTreeMap<(u32, &str), Vec<(&str, Expected)>> = BTreeMap::new();
        for (object, expected) in self.table.objects.iter().zip(&self.expected) {
            let (directory, name) = object.path.rsplit_once('/').unwrap_or(("", &object.path));
            by_directory.entry((object.root, directory)).or_default().push((name, *expected));
        }
        for ((root, directory), objects) in by_directory {
            let Some(root) = roots.get(root as usize) else { continue };
            let listed = match root.list(directory) {
                Ok(listed) => listed,
                Err(err) if is_absent(&err) => Vec::new(),
                Err(err) => return Err(err.into()),
            };
            let listed: HashMap<_, &Entry> =
                listed.iter().filter_map(|entry| Some((entry.name.to_str()?, entry))).collect();
            for (name, expected) in objects {
                let path = root.path().join(directory).join(name);
                let missing = || SourceError::Missing {
                    path: path.clone(),
                    for_what: "the backup needs it".into(),
                };
                let mut found = (*listed.get(name).ok_or_else(missing)?).clone();
                if found.kind == Kind::Symlink {
                    // A repository may spread over file systems by links that stay beneath its root.
                    let file = root.open_file(format!("{directory}/{name}"))?;
                    found.size = file.metadata()?.len();
                } else if found.kind != Kind::File {
                    return Err(SourceError::Damaged {
                        path,
                        problem: "it is no regular file".into(),
                    });
                }
                expected.check(found.size).map_err(|expected| SourceError::WrongSize {
                    path,
                    found: found.size,
                    expected,
                })?;
            }
        }
        Ok(())
    }

    /// Reads one of `files` whole, verified; `None` if it is not among them.
    ///
    /// # Errors
    /// It is longer than `limit`, or cannot be read.
    pub(crate) fn read(
        &self,
        files: &[MapFile],
        path: &str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, SourceError> {
        let Some(file) = files.iter().find(|file| file.path.as_str() == path) else {
            return Ok(None);
        };
        let mut file = file.clone();
        let mut table = ObjectTable { roots: self.table.roots.clone(), objects: Vec::new() };
        let mut stored = PathBuf::from(path);
        if let Content::Stored { object, .. } = &mut file.content {
            let found = self.table.objects.get(object.0 as usize).cloned();
            stored = found.as_ref().map_or(stored, |found| found.path.clone().into());
            table.objects.extend(found);
            *object = ObjectId(0);
        }
        if file.size > limit {
            let problem = format!("`{path}` has {} bytes there, which it never has", file.size);
            return Err(SourceError::Damaged { path: stored, problem });
        }
        let reader = Reader::new(Arc::new(LocalStore::open(table)?), vec![file], 0);
        reader
            .read_whole(0)
            .map(Some)
            .map_err(|source| SourceError::Content { path: stored, source })
    }

    /// The table.
    pub(crate) fn into_table(self) -> ObjectTable {
        self.table
    }

    /// The table as it is now.
    pub(crate) fn table(&self) -> &ObjectTable {
        &self.table
    }
}

impl Expected {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::AtLeast(one), Self::AtLeast(two)) => Self::AtLeast(one.max(two)),
            (Self::Exactly(exact), _) | (_, Self::Exactly(exact)) => Self::Exactly(exact),
        }
    }

    fn check(self, found: u64) -> Result<(), u64> {
        match self {
            Self::Exactly(expected) if found != expected => Err(expected),
            Self::AtLeast(expected) if found < expected => Err(expected),
            Self::Exactly(_) | Self::AtLeast(_) => Ok(()),
        }
    }
}

/// Whether nothing lies at the path.
pub(crate) fn is_absent(err: &std::io::Error) -> bool {
    matches!(err.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// Puts a map together: files sorted, every directory there with its parents, `data` first.
///
/// # Errors
/// The path that is there twice, or is a file and a directory at once.
pub(crate) fn build_map(
    directories: impl IntoIterator<Item = ClusterPath>,
    mut files: Vec<MapFile>,
) -> Result<BackupMap, String> {
    let mut all: BTreeMap<String, ()> = BTreeMap::from([("data".to_owned(), ())]);
    let mut add = |path: &str| {
        let mut path = path;
        while !all.contains_key(path) {
            all.insert(path.to_owned(), ());
            match path.rsplit_once('/') {
                Some((parent, _)) => path = parent,
                None => break,
            }
        }
    };
    for directory in directories {
        add(directory.as_str());
    }
    files.sort_by(|left, right| left.path.cmp(&right.path));
    for file in &files {
        match file.path.as_str().rsplit_once('/') {
            Some((parent, _)) => add(parent),
            None => return Err(format!("`{}` is no file of a cluster", file.path.as_str())),
        }
    }
    for pair in files.windows(2) {
        if pair[0].path == pair[1].path {
            return Err(format!("`{}` is listed twice", pair[0].path.as_str()));
        }
    }
    if let Some(file) = files.iter().find(|file| all.contains_key(file.path.as_str())) {
        return Err(format!("`{}` is a file and a directory", file.path.as_str()));
    }
    // Sorted by text a parent comes before what is in it, and `data` before `tablespaces`.
    let directories = all.into_keys().map(ClusterPath::new).collect::<Result<_, _>>();
    Ok(BackupMap { directories: directories.map_err(|err| err.to_string())?, files })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Content;

    fn file(path: &str) -> MapFile {
        MapFile {
            path: ClusterPath::new(path).unwrap(),
            size: 0,
            modified: 0,
            content: Content::Inline(vec![]),
            digest: None,
            page_checksums: false,
        }
    }

    #[test]
    fn a_map_is_sorted_and_whole() {
        let directories =
            ["tablespaces/7", "data/pg_wal"].map(|path| ClusterPath::new(path).unwrap());
        let map =
            build_map(directories, vec![file("data/base/5/2"), file("data/base/5/1")]).unwrap();
        let names: Vec<_> = map.directories.iter().map(ClusterPath::as_str).collect();
        assert_eq!(
            names,
            ["data", "data/base", "data/base/5", "data/pg_wal", "tablespaces", "tablespaces/7"]
        );
        assert_eq!(map.files[0].path.as_str(), "data/base/5/1");
    }

    #[test]
    fn a_map_contradicts_itself_never() {
        assert!(build_map([], vec![file("data/x"), file("data/x")]).unwrap_err().contains("twice"));
        assert!(
            build_map([], vec![file("data/x"), file("data/x/y")])
                .unwrap_err()
                .contains("and a directory")
        );
        assert!(build_map([], vec![file("top")]).is_err());
    }

    #[test]
    fn objects_are_compared_with_the_store() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/one"), b"12345").unwrap();
        let root = Root::open(dir.path()).unwrap();
        let check = |path: &str, expected: &[Expected]| {
            let mut objects = Objects::default();
            let number = objects.add_root(&root);
            for expected in expected {
                objects.add(number, path.into(), *expected).unwrap();
            }
            assert_eq!(objects.table().objects.len(), 1, "the same file has one number");
            objects.check(&[&root])
        };
        check("d/one", &[Expected::Exactly(5)]).unwrap();
        check("d/one", &[Expected::AtLeast(3), Expected::AtLeast(5), Expected::AtLeast(1)])
            .unwrap();
        assert!(matches!(
            check("d/one", &[Expected::AtLeast(6)]),
            Err(SourceError::WrongSize { found: 5, expected: 6, .. })
        ));
        assert!(matches!(
            check("d/one", &[Expected::Exactly(4)]),
            Err(SourceError::WrongSize { .. })
        ));
        assert!(matches!(
            check("d/two", &[Expected::AtLeast(0)]),
            Err(SourceError::Missing { .. })
        ));
        assert!(matches!(
            check("no/two", &[Expected::AtLeast(0)]),
            Err(SourceError::Missing { .. })
        ));
    }
}
