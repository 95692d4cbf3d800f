//! What tests build once and keep between their runs.
//!
//! Tests run in processes of their own, so what they share lies on disk: below `PGTHAW_TEST_CACHE` (default
//! `/var/tmp`), rebuilt when what it is made from changes. Nobody may write into it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::server::postgres_programs;
use crate::user::{User, run};

/// One kept thing: its name, and all that decides what it looks like.
pub(crate) struct Kept {
    /// Begins the name of its directory.
    pub name: &'static str,
    /// The sources it is made from.
    pub made_from: &'static [&'static str],
}

impl Kept {
    /// Returns what `build` returned when it filled the directory, building it first where there is none yet.
    pub fn get<T: Serialize + DeserializeOwned>(&self, build: impl FnOnce(&Path) -> T) -> T {
        let (cache, prefix) = (cache(), self.prefix());
        let lock = File::create(cache.join(format!("{prefix}lock"))).expect("lock of a kept thing");
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).expect("lock of a kept thing");
        if let Some(there) = self.there() {
            return there;
        }
        for entry in fs::read_dir(&cache).expect("the cache's directory").flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            if name.starts_with(&prefix) && entry.path().is_dir() {
                fs::remove_dir_all(entry.path()).expect("an old one can be removed");
            }
        }
        let dir = self.dir();
        fs::create_dir(&dir).expect("directory of a kept thing");
        let built = build(&dir);
        let text = serde_json::to_vec_pretty(&built).expect("plain data");
        fs::write(self.done(), text).expect("mark of a kept thing");
        built
    }

    /// Returns the same if it has been built.
    pub fn there<T: DeserializeOwned>(&self) -> Option<T> {
        let text = fs::read(self.done()).ok()?;
        Some(serde_json::from_slice(&text).expect("written by `get`"))
    }

    fn prefix(&self) -> String {
        format!("{}-{}-", self.name, User::current().uid)
    }

    fn dir(&self) -> PathBuf {
        cache().join(format!("{}{}", self.prefix(), self.key()))
    }

    fn done(&self) -> PathBuf {
        self.dir().join("kept.json")
    }

    /// Returns a name for what it is made from, the programs included.
    fn key(&self) -> String {
        let mut hash = Sha256::new();
        for part in self.made_from {
            hash.update(part);
        }
        hash.update(
            run(Command::new(postgres_programs().join("postgres")).arg("--version")).stdout,
        );
        hash.update(run(Command::new("pgbackrest").arg("version")).stdout);
        hash.finalize()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn cache() -> PathBuf {
    std::env::var_os("PGTHAW_TEST_CACHE").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}
