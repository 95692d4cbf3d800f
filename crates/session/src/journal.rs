//! The journal: one append-only file per session, a checksum per record, synced before anything depends on it.
//!
//! A record is one line: eight hex digits of the CRC-32 of the rest, a space, the record as JSON. Who works on a session holds
//! a lock on its journal. A torn last record (one without its newline: the append was never acknowledged) is dropped and told;
//! any other bad one refuses the session, because what followed from it can no longer be known.
//!
//! [`Journal`] is written against a [`JournalFile`], so that tests can lose what was not synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::FlockOperation;

use crate::session::{Entry, Record};

/// Name of the journal in a session's directory.
pub const FILE_NAME: &str = "journal";

/// The file that a journal is kept in. What was appended may be lost, in part too, when the machine crashes, until
/// [`JournalFile::sync`] has returned.
pub trait JournalFile {
    /// Takes the lock that only one process has; returns whether it was free. It ends with the process.
    fn lock(&self) -> io::Result<bool>;
    /// Everything that is in the file.
    fn read(&mut self) -> io::Result<Vec<u8>>;
    /// Writes behind everything that is in the file.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Cuts the file to so many bytes.
    fn cut(&mut self, length: u64) -> io::Result<()>;
    /// Returns once everything is on disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that was opened for reading and appending.
impl JournalFile for File {
    fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(self, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.rewind()?;
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A journal that this process may append to.
#[derive(Debug)]
pub struct Journal<F = File> {
    path: PathBuf,
    file: F,
}

/// What a journal holds.
#[derive(Debug, Default)]
pub struct Contents {
    /// Its records, oldest first.
    pub records: Vec<Record>,
    /// A torn record at the end was dropped: its length in bytes.
    pub torn: Option<usize>,
    /// Bytes of the valid records.
    valid: u64,
}

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("journal `{path}`")]
    Io {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process works on the session.
    #[error("another process works on the session of journal `{path}`")]
    Owned {
        /// The journal.
        path: PathBuf,
    },
    /// A record in the middle cannot be read.
    #[error("journal `{path}`, line {line}: {why}")]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
}

impl Journal {
    /// Makes the journal of a new session in `directory` (made too, 0700) and locks it.
    ///
    /// # Errors
    /// [`JournalError::Io`], also when there is one already.
    pub fn create(directory: &Path) -> Result<Self, JournalError> {
        let path = directory.join(FILE_NAME);
        let fail = |source| JournalError::Io { path: path.clone(), source };
        fs::DirBuilder::new().mode(0o700).create(directory).map_err(fail)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create_new(true).mode(0o600).open(&path);
        let (journal, _) = Self::take(&path, file.map_err(fail)?)?;
        for directory in [directory, directory.parent().unwrap_or(directory)] {
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(fail)?;
        }
        Ok(journal)
    }

    /// Opens and locks the journal in `directory`, and reads it. A torn last record is cut off.
    ///
    /// # Errors
    /// [`JournalError::Owned`] when another process holds it, [`JournalError::Damaged`] for a bad record that is not the last.
    pub fn open(directory: &Path) -> Result<(Self, Contents), JournalError> {
        let path = directory.join(FILE_NAME);
        let file = OpenOptions::new().read(true).append(true).open(&path);
        let fail = |source| JournalError::Io { path: path.clone(), source };
        Self::take(&path, file.map_err(fail)?)
    }
}

impl<F: JournalFile> Journal<F> {
    /// Locks and reads the journal in `file`, which messages call `path`; what was read is on disk. A torn last record is cut off.
    ///
    /// # Errors
    /// [`JournalError::Owned`] when another process holds it, [`JournalError::Damaged`] for a bad record that is not the last.
    pub fn take(path: &Path, mut file: F) -> Result<(Self, Contents), JournalError> {
        let fail = |source| JournalError::Io { path: path.into(), source };
        if !file.lock().map_err(fail)? {
            return Err(JournalError::Owned { path: path.into() });
        }
        let contents = parse(path, &file.read().map_err(fail)?)?;
        if contents.torn.is_some() {
            file.cut(contents.valid).map_err(fail)?;
        }
        file.sync().map_err(fail)?; // what its last owner wrote is relied on from now on
        Ok((Self { path: path.into(), file }, contents))
    }

    /// Appends `entry`, on disk when this returns.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the entry may then be there in part, which the next reader drops.
    pub fn append(&mut self, at: Timestamp, entry: Entry) -> Result<Record, JournalError> {
        let record = Record { at, entry };
        let line = line_of(&record);
        let written = self.file.append(line.as_bytes()).and_then(|()| self.file.sync());
        written.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        Ok(record)
    }
}

/// Reads the journal in `directory` without owning it.
///
/// # Errors
/// [`JournalError::Io`] and [`JournalError::Damaged`].
pub fn read(directory: &Path) -> Result<Contents, JournalError> {
    let path = directory.join(FILE_NAME);
    let bytes =
        fs::read(&path).map_err(|source| JournalError::Io { path: path.clone(), source })?;
    parse(&path, &bytes)
}

fn line_of(record: &Record) -> String {
    let json = serde_json::to_string(record).expect("a record has no key that JSON cannot hold");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Contents, JournalError> {
    let mut contents = Contents::default();
    for (number, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        match parse_line(line) {
            Ok(record) => {
                contents.records.push(record);
                contents.valid += line.len() as u64;
            }
            Err(_) if !line.ends_with(b"\n") => contents.torn = Some(line.len()),
            Err(why) => {
                return Err(JournalError::Damaged { path: path.into(), line: number + 1, why });
            }
        }
    }
    Ok(contents)
}

fn parse_line(line: &[u8]) -> Result<Record, String> {
    let line = line.strip_suffix(b"\n").ok_or("the record has no end")?;
    let (sum, json) = line.split_at_checked(9).ok_or("the record is too short")?;
    let sum = sum.strip_suffix(b" ").and_then(|sum| std::str::from_utf8(sum).ok());
    let sum = sum.and_then(|sum| u32::from_str_radix(sum, 16).ok());
    if sum != Some(crc32fast::hash(json)) {
        return Err("its checksum is wrong".into());
    }
    serde_json::from_slice(json).map_err(|err| format!("it is not understood: {err}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> Entry {
        Entry::Message(text.into())
    }

    fn journal_with(directory: &Path, texts: &[&str]) -> Vec<u8> {
        let mut journal = Journal::create(directory).unwrap();
        for text in texts {
            journal.append(Timestamp::UNIX_EPOCH, message(text)).unwrap();
        }
        fs::read(directory.join(FILE_NAME)).unwrap()
    }

    #[test]
    fn a_journal_cut_anywhere_loses_only_its_last_record() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("s");
        let bytes = journal_with(&directory, &["one", "two", "three"]);
        for length in 0..bytes.len() {
            fs::write(directory.join(FILE_NAME), &bytes[..length]).unwrap();
            let whole = bytes[..length].iter().filter(|&&byte| byte == b'\n').count();
            let (mut journal, contents) = Journal::open(&directory).unwrap();
            assert_eq!(contents.records.len(), whole, "cut at {length}");
            journal.append(Timestamp::UNIX_EPOCH, message("after")).unwrap();
            let again = read(&directory).unwrap();
            assert_eq!(
                (again.records.len(), again.torn),
                (whole + 1, None),
                "cut at {length}, then appended"
            );
        }
    }

    #[test]
    fn a_flipped_byte_refuses_the_session() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("s");
        let bytes = journal_with(&directory, &["one", "two", "three"]);
        for position in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[position] ^= 0x04;
            fs::write(directory.join(FILE_NAME), &flipped).unwrap();
            match read(&directory) {
                Ok(contents) => {
                    assert_eq!(position, bytes.len() - 1, "a flip went unnoticed");
                    assert!(contents.torn.is_some(), "the last record without its newline is torn");
                }
                Err(err) => {
                    assert!(matches!(err, JournalError::Damaged { .. }), "{position}: {err}")
                }
            }
        }
    }

    #[test]
    fn a_journal_has_one_owner() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("s");
        let owner = Journal::create(&directory).unwrap();
        assert!(matches!(Journal::open(&directory), Err(JournalError::Owned { .. })));
        drop(owner);
        Journal::open(&directory).unwrap();
    }
}
