//! Objects that are files beneath directories of this machine.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ObjectStore, Root, root::named, too_short};
use crate::lru::Lru;
use crate::map::{ObjectId, ObjectTable, StoredObject};

/// Descriptors kept open: enough for what PostgreSQL has in use, well below the usual limit of 1024 per process.
const OPEN_FILES: u64 = 256;

/// Objects in files of this machine; each is opened when it is first read, beneath its root.
#[derive(Debug)]
pub struct LocalStore {
    roots: Vec<Root>,
    objects: Vec<StoredObject>,
    open: Mutex<Lru<ObjectId, Arc<File>>>,
}

impl LocalStore {
    /// Opens the table's roots; the objects are opened when they are read.
    ///
    /// # Errors
    /// As [`Root::open`]; `InvalidData` for an object whose root is not in the table.
    pub fn open(table: ObjectTable) -> io::Result<Self> {
        let roots =
            table.roots.iter().map(|path| Root::open(path)).collect::<io::Result<Vec<Root>>>()?;
        if let Some(object) =
            table.objects.iter().find(|object| object.root as usize >= roots.len())
        {
            let text = format!(
                "`{}` lies beneath root {}, which is not in the table",
                object.path, object.root
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { roots, objects: table.objects, open: Mutex::new(Lru::new(OPEN_FILES)) })
    }

    fn find(&self, object: ObjectId) -> io::Result<(&Root, &str)> {
        let unknown =
            || io::Error::new(io::ErrorKind::NotFound, format!("object {} is not known", object.0));
        let stored = self.objects.get(object.0 as usize).ok_or_else(unknown)?;
        let root = self.roots.get(stored.root as usize).ok_or_else(unknown)?;
        Ok((root, &stored.path))
    }

    fn file(&self, object: ObjectId) -> io::Result<Arc<File>> {
        let lock = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = lock().get(&object) {
            return Ok(file);
        }
        let (root, path) = self.find(object)?;
        let file = Arc::new(root.open_file(path)?); // opened without the lock: storage may be slow
        lock().insert(object, Arc::clone(&file), 1);
        Ok(file)
    }
}

impl ObjectStore for LocalStore {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file(object)?.read_exact_at(buf, offset).or_else(|err| {
            let (root, path) = self.find(object)?;
            let full = root.path().join(path);
            Err(match err.kind() {
                io::ErrorKind::UnexpectedEof => {
                    too_short(&format!("`{}`", full.display()), offset, buf.len())
                }
                _ => named(&full, err),
            })
        })
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        Ok(self.file(object)?.metadata()?.len())
    }
}
