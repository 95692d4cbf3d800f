//! Repositories with one thing broken, and exports that must refuse them.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgthaw_testkit::{Fixture, Leftovers, copy_tree, tree_hash};
use sha1::{Digest, Sha1};

use crate::support::{Pgthaw, text};

/// A copy of one of the fixture's backups that may be broken, and pgthaw to export it with.
pub struct Lab {
    pub pgthaw: Pgthaw,
    /// What `pgthaw` gets as REPO.
    pub repository: PathBuf,
    leftovers: Leftovers,
    /// Exports that were refused: each has a target of its own, since a failed session keeps its.
    refused: Cell<u32>,
}

impl Lab {
    /// With `original` copied; its directories may be written by us, and belong to whom they belonged.
    fn with(original: &Path) -> Self {
        let pgthaw = Pgthaw::new();
        let repository = pgthaw.scratch.join("repository");
        copy_tree(original, &repository);
        let leftovers = pgthaw.leftovers();
        Self { pgthaw, repository, leftovers, refused: Cell::new(0) }
    }

    /// The lz4 repository.
    pub fn lz4() -> Self {
        Self::with(&Fixture::get().lz4.path)
    }

    /// The uncompressed base backup with its WAL; its tablespace lies in it, so that it needs no manifest to prove a link.
    pub fn stream() -> Self {
        let lab = Self::with(&Fixture::get().stream.dir);
        for link in fs::read_dir(lab.repository.join("pg_tblspc")).unwrap().flatten() {
            fs::remove_file(link.path()).unwrap();
            copy_tree(&Fixture::get().stream.tablespace, &link.path());
        }
        lab
    }

    /// A path in the repository.
    pub fn path(&self, name: &str) -> PathBuf {
        self.repository.join(name)
    }

    /// The label of the full backup.
    pub fn full() -> String {
        Fixture::get().lz4.labels[0].clone()
    }

    /// A file of the repository whose name begins as `start` says.
    pub fn find(&self, directory: &str, start: &str) -> PathBuf {
        let mut entries = fs::read_dir(self.path(directory)).unwrap().flatten();
        let found = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(start));
        found.unwrap_or_else(|| panic!("no {start} in {directory}")).path()
    }

    /// Changes a text file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&str) -> String) {
        let path = self.path(name);
        let before = fs::read_to_string(&path).unwrap();
        let after = change(&before);
        assert_ne!(before, after, "{name} is unchanged");
        fs::write(path, after).unwrap();
    }

    /// Changes one of pgBackRest's info files and its copy as one who knows how they are signed.
    pub fn edit_signed(&self, name: &str, change: impl Fn(&str) -> String) {
        for name in [name.to_owned(), format!("{name}.copy")] {
            self.edit(&name, |text| signed(&change(text)));
        }
    }

    /// Exports `crm` into a new target, and wants it refused with `code` and all of `words` on stderr; returns what was said there.
    #[track_caller]
    pub fn refuses(&self, case: &str, code: i32, more: &[&str], words: &[&str]) -> String {
        self.refused.set(self.refused.get() + 1);
        let target = self.pgthaw.target(&format!("refused-{}", self.refused.get()));
        self.refuses_into(&target, case, code, more, words)
    }

    /// As [`Lab::refuses`], into `target`.
    #[track_caller]
    pub fn refuses_into(
        &self,
        target: &Path,
        case: &str,
        code: i32,
        more: &[&str],
        words: &[&str],
    ) -> String {
        let before = tree_hash(&self.repository);
        let databases =
            if more.contains(&"-d") || more.contains(&"--all") { &[][..] } else { &["crm"] };
        let mut arguments = self.pgthaw.export_arguments(&self.repository, databases, target);
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = self.pgthaw.refused(case, self.pgthaw.command(&arguments), code, words);
        assert!(!target.join("export.json").exists(), "{case}: there is an export.json");
        assert!(!target.join("crm").exists(), "{case}: a database was delivered");
        assert_eq!(tree_hash(&self.repository), before, "{case}: the repository was touched");
        assert_eq!(self.leftovers.check(), [""; 0], "{case}\n{}", self.pgthaw.logs());
        said
    }
}

impl Pgthaw {
    /// Runs a command that must end with `code` and say all of `words` on stderr; returns what it said there.
    #[track_caller]
    pub fn refused(&self, case: &str, mut command: Command, code: i32, words: &[&str]) -> String {
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        let all = words.iter().all(|word| said.contains(word));
        assert!(
            output.status.code() == Some(code) && all && !said.contains("panicked"),
            "{case}: wanted {code} and {words:?}, got {}: {said}\n{}",
            output.status,
            self.logs()
        );
        assert_eq!(text(&output.stdout), "", "{case}");
        said
    }
}

/// Flips one bit of the byte at `position` (from the end if negative, in the middle if none).
pub fn flip(path: &Path, position: Option<usize>) {
    let mut bytes = fs::read(path).unwrap();
    let at = position.unwrap_or(bytes.len() / 2);
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// Keeps two thirds of a file.
pub fn cut(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() * 2 / 3]).unwrap();
}

/// The path in the data directory of the file that holds the rows of `crm.message`, which no traffic changes.
pub fn messages() -> String {
    let data = &Fixture::get().stream.dir;
    let is_it = |path: &Path| {
        fs::read(path)
            .is_ok_and(|bytes| bytes.windows(19).any(|window| window == b"The quick brown fox"))
    };
    let databases = fs::read_dir(data.join("base")).unwrap().flatten();
    let mut files = databases.flat_map(|database| fs::read_dir(database.path()).unwrap().flatten());
    let found = files.find(|file| is_it(&file.path())).expect("the rows of crm.message");
    found.path().strip_prefix(data).unwrap().to_str().unwrap().to_owned()
}

/// The path in the data directory of a user's index in the database that [`messages`] lies in: no dump reads it.
pub fn index_beside_messages() -> String {
    const MAGIC: [u8; 4] = 0x05_3162_u32.to_le_bytes(); // BTREE_MAGIC, nbtree.h, after the page's header
    let data = &Fixture::get().stream.dir;
    let database = messages().rsplit_once('/').expect("a path").0.to_owned();
    let is_it = |path: &Path| {
        fs::read(path).is_ok_and(|bytes| bytes.len() >= 3 * 8192 && bytes[24..28] == MAGIC)
    };
    let is_users = |name: &str| name.parse::<u32>().is_ok_and(|number| number >= 16384);
    let mut names: Vec<_> = fs::read_dir(data.join(&database))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    let found =
        names.into_iter().find(|name| is_users(name) && is_it(&data.join(&database).join(name)));
    format!("{database}/{}", found.expect("an index"))
}

/// pgBackRest's text with the checksum that belongs to it (pgBackRest source, `src/info/info.c`): SHA-1 over all lines but that
/// one as one JSON object of objects.
fn signed(text: &str) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let is_json = |value: &str| serde_json::from_str::<serde_json::Value>(value).is_ok();
    let mut sections: Vec<(&str, Vec<String>)> = Vec::new();
    let without = |line: &&str| !line.is_empty() && !line.starts_with("backrest-checksum=");
    for line in text.lines().filter(without) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(name) => sections.push((name, Vec::new())),
            None => {
                let mut equals = line.match_indices('=');
                let (at, _) = equals.find(|(at, _)| is_json(&line[at + 1..])).expect("key=JSON");
                let pair = format!("{}:{}", quoted(&line[..at]), &line[at + 1..]);
                sections.last_mut().expect("a section").1.push(pair);
            }
        }
    }
    let objects = sections.iter().filter(|(_, pairs)| !pairs.is_empty());
    let objects: Vec<String> =
        objects.map(|(name, pairs)| format!("{}:{{{}}}", quoted(name), pairs.join(","))).collect();
    // The last section is the first one again: the checksum stands alone in it.
    let digest = Sha1::digest(format!("{{{}}}", objects.join(",")));
    let sum: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let (before, _) = text.rsplit_once("backrest-checksum=").expect("signed by pgBackRest");
    format!("{before}backrest-checksum=\"{sum}\"\n")
}
