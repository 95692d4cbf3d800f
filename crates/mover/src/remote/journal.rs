//! The journal of received chunks: what of a place's files is known to lie on the target's disk.
//!
//! One append-only file per place below `.chunks` in the staging directory. A record is written after the data it speaks
//! of was synced and read back; each has its own checksum, and reading stops at the first that does not fit (a torn tail
//! is dropped: its chunks are sent again). A file is known by its inode, so that a record never vouches for another file
//! that got the same name, and a record that takes chunks back is synced before they are overwritten.
//!
//! ```text
//! payload length, u16 LE | CRC-32C of the payload, u32 LE | payload: a Record (postcard)
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::chunk::{CHUNK, ChunkSum};
use crate::directory::Directory;
use crate::error::MoveError;

/// Where the journals lie in the staging directory. No database's directory begins with a dot.
const CHUNKS: &str = ".chunks";
/// Longest payload in bytes: a file's name and some numbers.
const PAYLOAD_MAX: usize = 1024;
const PREAMBLE: usize = 6;

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// A new, empty file; what was known under its name no longer counts. Files are numbered as they are recorded.
    File { name: String, inode: u64 },
    /// The next chunk of a file.
    Chunk { file: u32, number: u64, length: u32, sum: ChunkSum },
    /// Only the first `keep` chunks of a file still count.
    Cut { file: u32, keep: u64 },
}

/// A chunk to be recorded.
#[derive(Debug)]
pub(super) struct NewChunk {
    pub(super) number: u64,
    pub(super) length: u32,
    pub(super) sum: ChunkSum,
}

/// The journal of one place.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    directory: Directory,
    name: String,
    /// Bytes of it, those of `unwritten` included.
    end: u64,
    unwritten: Vec<u8>,
    known: HashMap<String, Known>,
    names: Vec<String>,
}

/// What is known of one file.
#[derive(Debug)]
struct Known {
    number: u32,
    inode: u64,
    bytes: u64,
    chunks: Vec<ChunkSum>,
}

/// What is known of a file: its first bytes, which are there.
#[derive(Debug, Default)]
pub(super) struct Prefix {
    pub(super) chunks: Vec<ChunkSum>,
    pub(super) bytes: u64,
}

impl Journal {
    /// Opens the journal `name`, or begins it.
    ///
    /// # Errors
    /// As the file system says.
    pub(super) fn open(staging: &Directory, name: &str) -> Result<Self, MoveError> {
        let (directory, made) = staging.ensure_directory(CHUNKS)?;
        let (file, new) = match directory.open_for_update(name)? {
            Some(file) => (file, false),
            None => (directory.create_file(name)?, true),
        };
        if new {
            directory.sync()?;
        }
        if made {
            staging.sync()?;
        }
        let mut journal = Self {
            file,
            directory,
            name: name.into(),
            end: 0,
            unwritten: Vec::new(),
            known: HashMap::new(),
            names: Vec::new(),
        };
        journal.load().map_err(|err| journal.error("read", err))?;
        Ok(journal)
    }

    /// Returns the checksums of the chunks of the file `name` that are on disk, if it still is the file `inode` with at
    /// least `length` bytes.
    pub(super) fn chunks(&self, name: &str, inode: u64, length: u64) -> Vec<ChunkSum> {
        match self.known.get(name) {
            Some(known) if known.inode == inode && known.bytes <= length => known.chunks.clone(),
            _ => Vec::new(),
        }
    }

    /// Returns whether anything is recorded under `name`.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.known.get(name).is_some_and(|known| !known.chunks.is_empty())
    }

    /// Returns the first `keep` chunks of `name`, or as many as there are, to go on from.
    pub(super) fn prefix(&self, name: &str, keep: u64) -> Prefix {
        let Some(known) = self.known.get(name) else { return Prefix::default() };
        match usize::try_from(keep).ok().and_then(|keep| known.chunks.get(..keep)) {
            Some(kept) if kept.len() < known.chunks.len() => {
                Prefix { chunks: kept.to_vec(), bytes: (kept.len() * CHUNK) as u64 }
            }
            _ => Prefix { chunks: known.chunks.clone(), bytes: known.bytes },
        }
    }

    /// Notes a new, empty file, to be written with the next [`Journal::write`]. A [`Journal::cut`] to 0 was synced before
    /// the one of its name was removed.
    pub(super) fn file(&mut self, name: &str, inode: u64) -> Result<(), MoveError> {
        self.append(Record::File { name: name.into(), inode })
    }

    /// Notes that only the first `keep` chunks of `name` still count; durable after the next [`Journal::write`].
    pub(super) fn cut(&mut self, name: &str, keep: u64) -> Result<(), MoveError> {
        match self.known.get(name) {
            Some(known) if (known.chunks.len() as u64) > keep => {
                let file = known.number;
                self.append(Record::Cut { file, keep })
            }
            _ => Ok(()),
        }
    }

    /// Notes a chunk that is on disk; durable after the next [`Journal::write`].
    pub(super) fn chunk(&mut self, name: &str, chunk: &NewChunk) -> Result<(), MoveError> {
        let NewChunk { number, length, sum } = *chunk;
        match self.known.get(name) {
            Some(known) => {
                let file = known.number;
                self.append(Record::Chunk { file, number, length, sum })
            }
            None => Err(self.error("write", io::Error::other("a chunk of an unknown file"))),
        }
    }

    /// Writes what was noted, durably.
    ///
    /// # Errors
    /// As the file system says. What was noted is forgotten then.
    pub(super) fn write(&mut self) -> Result<(), MoveError> {
        let bytes = std::mem::take(&mut self.unwritten);
        let begin = self.end - bytes.len() as u64;
        let written = self.file.write_all_at(&bytes, begin).and_then(|()| self.file.sync_data());
        written.map_err(|err| {
            let _ = self.reload(); // what could not be written is not known either
            self.error("write", err)
        })
    }

    fn reload(&mut self) -> io::Result<()> {
        self.known.clear();
        self.names.clear();
        self.load()
    }

    /// Reads all records that fit and drops what comes after them.
    fn load(&mut self) -> io::Result<()> {
        self.end = 0;
        self.unwritten.clear();
        let mut reader = BufReader::with_capacity(256 << 10, self.file.try_clone()?);
        reader.seek(SeekFrom::Start(0))?;
        while let Some((record, length)) = read_record(&mut reader)? {
            if !self.apply(record) {
                break;
            }
            self.end += length;
        }
        let length = self.file.metadata()?.len();
        if length > self.end {
            let lost = length - self.end;
            tracing::warn!(
                "the last {lost} bytes of the journal of chunks `{}` are torn",
                self.name
            );
            self.file.set_len(self.end)?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn append(&mut self, record: Record) -> Result<(), MoveError> {
        let bytes = encode(&record).map_err(|err| self.error("write", err))?;
        if !self.apply(record) {
            return Err(self.error("write", io::Error::other("a record that makes no sense")));
        }
        self.unwritten.extend_from_slice(&bytes);
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Takes a record into account; `false` if it contradicts those before it.
    fn apply(&mut self, record: Record) -> bool {
        match record {
            Record::File { name, inode } => {
                let Ok(number) = u32::try_from(self.names.len()) else { return false };
                self.names.push(name.clone());
                self.known.insert(name, Known { number, inode, bytes: 0, chunks: Vec::new() });
                true
            }
            Record::Chunk { file, number, length, sum } => {
                let Some(known) = self.current(file) else { return false };
                let follows = number == known.chunks.len() as u64
                    && known.bytes == number * CHUNK as u64
                    && (1..=CHUNK).contains(&(length as usize));
                if follows {
                    known.bytes += u64::from(length);
                    known.chunks.push(sum);
                }
                follows
            }
            Record::Cut { file, keep } => {
                let Some(known) = self.current(file) else { return false };
                let Ok(kept) = usize::try_from(keep) else { return false };
                if kept < known.chunks.len() {
                    known.chunks.truncate(kept);
                    known.bytes = keep * CHUNK as u64;
                }
                true
            }
        }
    }

    /// The file of that number, unless another has got its name since.
    fn current(&mut self, number: u32) -> Option<&mut Known> {
        let name = self.names.get(usize::try_from(number).ok()?)?;
        self.known.get_mut(name).filter(|known| known.number == number)
    }

    fn error(&self, action: &'static str, err: impl Into<io::Error>) -> MoveError {
        self.directory.error(action, &self.name, err)
    }
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let payload = postcard::to_stdvec(record).map_err(io::Error::other)?;
    let length =
        u16::try_from(payload.len()).ok().filter(|length| usize::from(*length) <= PAYLOAD_MAX);
    let length = length.ok_or_else(|| io::Error::other("a record that is too long"))?;
    let mut bytes = Vec::with_capacity(PREAMBLE + payload.len());
    bytes.write_all(&length.to_le_bytes())?;
    bytes.write_all(&crc32c::crc32c(&payload).to_le_bytes())?;
    bytes.write_all(&payload)?;
    Ok(bytes)
}

/// Reads one record and returns it with its length; `None` at the end, and for one that does not fit.
fn read_record(reader: &mut impl Read) -> io::Result<Option<(Record, u64)>> {
    let mut preamble = [0; PREAMBLE];
    let mut payload = [0; PAYLOAD_MAX];
    if !filled(reader, &mut preamble)? {
        return Ok(None);
    }
    let [low, high, sum @ ..] = preamble;
    let length = usize::from(u16::from_le_bytes([low, high]));
    let Some(payload) = payload.get_mut(..length) else { return Ok(None) };
    if !filled(reader, payload)? || crc32c::crc32c(payload) != u32::from_le_bytes(sum) {
        return Ok(None);
    }
    let record = postcard::from_bytes(payload).ok();
    Ok(record.map(|record| (record, (PREAMBLE + length) as u64)))
}

fn filled(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(err) => Err(err),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const INODE: u64 = 7;

    fn chunk(number: u64, content: &[u8]) -> NewChunk {
        let length = u32::try_from(content.len()).unwrap();
        NewChunk { number, length, sum: ChunkSum::of(content) }
    }

    /// A journal of the file `f` with two whole chunks and a short one.
    fn journal(staging: &Directory) -> (Journal, Vec<ChunkSum>, Vec<u8>) {
        let mut journal = Journal::open(staging, "crm").unwrap();
        let content: Vec<u8> = (0..2 * CHUNK + 9).map(|at| (at % 251) as u8).collect();
        let mut sums = Vec::new();
        journal.file("f", INODE).unwrap();
        for (number, part) in content.chunks(CHUNK).enumerate() {
            let chunk = chunk(number as u64, part);
            sums.push(chunk.sum);
            journal.chunk("f", &chunk).unwrap();
        }
        journal.write().unwrap();
        (journal, sums, content)
    }

    #[test]
    fn goes_on_from_any_chunk() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Directory::open(dir.path()).unwrap();
        let (written, sums, content) = journal(&staging);
        let read = Journal::open(&staging, "crm").unwrap();
        for journal in [written, read] {
            let length = content.len() as u64;
            assert_eq!(journal.chunks("f", INODE, length), sums);
            assert!(journal.chunks("f", INODE, length - 1).is_empty(), "the file is shorter");
            assert!(journal.chunks("f", INODE + 1, length).is_empty(), "another file");
            assert!(journal.chunks("g", INODE, length).is_empty());
            for keep in [0, 1, 2, 3, 9] {
                let prefix = journal.prefix("f", keep);
                let bytes = content.len().min(keep as usize * CHUNK);
                assert_eq!(prefix.chunks, sums[..3.min(keep as usize)]);
                assert_eq!(prefix.bytes, bytes as u64);
            }
        }
    }

    #[test]
    fn a_torn_tail_is_dropped_wherever_it_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Directory::open(dir.path()).unwrap();
        let (_, sums, _) = journal(&staging);
        let path = dir.path().join(".chunks/crm");
        let whole = fs::read(&path).unwrap();
        let mut seen = Vec::new();
        for length in 0..=whole.len() {
            for flip in [false, true] {
                let mut torn = whole[..length].to_vec();
                if let (true, Some(last)) = (flip, torn.last_mut()) {
                    *last ^= 1;
                }
                fs::write(&path, torn).unwrap();
                let mut journal = Journal::open(&staging, "crm").unwrap();
                let found = journal.chunks("f", INODE, u64::MAX);
                assert_eq!(found, sums[..found.len()]);
                seen.push(found.len());
                // It goes on from there.
                journal.file("g", INODE).unwrap();
                journal.write().unwrap();
                let journal = Journal::open(&staging, "crm").unwrap();
                assert_eq!(journal.chunks("f", INODE, u64::MAX), found);
            }
        }
        seen.dedup();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3]);
    }

    #[test]
    fn what_was_taken_back_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Directory::open(dir.path()).unwrap();
        let (mut written, sums, _) = journal(&staging);
        written.cut("f", 1).unwrap();
        written.write().unwrap();
        drop(written);
        let mut read = Journal::open(&staging, "crm").unwrap();
        assert_eq!(read.chunks("f", INODE, u64::MAX), sums[..1]);
        assert!(read.chunk("f", &chunk(2, b"x")).is_err(), "a gap");
        read.file("f", INODE + 1).unwrap();
        assert!(!read.knows("f") && read.chunks("f", INODE, u64::MAX).is_empty());
    }
}
