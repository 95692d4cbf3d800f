//! The files of one round on the receiving side: what is there, and writing what comes.
//!
//! A file grows from its beginning, chunk by chunk. What the journal knows of it is either gone on from, or taken back
//! before anything of it is overwritten.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use super::journal::{Journal, NewChunk, Prefix};
use super::message::{OwnedPlace, SUMS_AT_ONCE, ToSource, Wanted};
use super::settle::{FileAt, Site, Task};
use crate::chunk::{CHUNK, ChunkSum, FileSum, chunks_of};
use crate::error::MoveError;
use crate::names::{NAME_MAX, file_name_for_database, is_plain};
use crate::target::TargetDirectory;

/// The journal of what lies beside the databases. No database's directory begins with a dot.
const TOP_LEVEL: &str = ".top-level";

/// Why a message could not be followed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The target failed: this round is over.
    Target(MoveError),
    /// The message makes no sense here: the peer is not what it seems, and the connection is over.
    Nonsense(&'static str),
}

impl From<MoveError> for Fault {
    fn from(err: MoveError) -> Self {
        Self::Target(err)
    }
}

/// The files of one round.
pub(super) struct Round {
    site: Arc<Site>,
    files: Vec<Arriving>,
}

struct Arriving {
    name: Arc<str>,
    /// Chunks that the source was told to be there.
    told: u64,
    /// Whether the journal says anything about the name.
    recorded: bool,
    state: State,
}

enum State {
    /// Nothing has come.
    Untouched,
    Open {
        handle: Arc<File>,
        prefix: Prefix,
        begins: Option<u64>,
    },
    Finished,
}

impl Round {
    /// Opens the place and tells what is there.
    pub(super) fn begin(
        target: &TargetDirectory,
        round: u32,
        place: &OwnedPlace,
        wanted: Vec<Wanted>,
        tell: &mut dyn FnMut(ToSource),
    ) -> Result<Self, Fault> {
        let mut names = HashSet::new();
        for Wanted { name, .. } in &wanted {
            let ours = matches!(place, OwnedPlace::TopLevel) && name.starts_with('.');
            if !is_plain(name) || name.len() > NAME_MAX || ours || !names.insert(name.as_str()) {
                return Err(Fault::Nonsense("a name that no file to be delivered can have"));
            }
        }
        let (directory, name) = match place {
            OwnedPlace::Database(name) => (target.database(name)?, file_name_for_database(name)),
            OwnedPlace::TopLevel => (target.staging().try_clone()?, TOP_LEVEL.into()),
        };
        let mut journal = Journal::open(target.staging(), &name)?;
        for Wanted { name, .. } in wanted.iter().filter(|wanted| wanted.fresh) {
            journal.cut(name, 0)?;
        }
        journal.write()?;

        let mut files = Vec::with_capacity(wanted.len());
        for (file, Wanted { name, .. }) in wanted.into_iter().enumerate() {
            let file = u32::try_from(file).map_err(|_| Fault::Nonsense("too many files"))?;
            let recorded = journal.knows(&name);
            let sums = match directory.find_inode(&name)? {
                Some((inode, length)) if recorded => journal.chunks(&name, inode, length),
                _ => Vec::new(),
            };
            for (piece, sums) in sums.chunks(SUMS_AT_ONCE).enumerate() {
                let first = (piece * SUMS_AT_ONCE) as u64;
                tell(ToSource::Has { round, file, first, sums: sums.to_vec() });
            }
            let told = sums.len() as u64;
            files.push(Arriving { name: name.into(), told, recorded, state: State::Untouched });
        }
        tell(ToSource::HasAll { round });
        Ok(Self { site: Arc::new(Site::new(round, directory, journal)), files })
    }

    /// Returns whether messages of this round are still wanted.
    pub(super) fn wants(&self, round: u32) -> bool {
        self.site.round == round && !self.site.has_failed()
    }

    /// Verifies a chunk's checksum and writes it.
    pub(super) fn chunk(
        &mut self,
        file: u32,
        number: u64,
        data: &[u8],
        sum: ChunkSum,
    ) -> Result<Task, Fault> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if data.is_empty() || data.len() > CHUNK {
            return Err(Fault::Nonsense("a chunk of a wrong length"));
        }
        let arriving = arriving(&mut self.files, file)?;
        if matches!(arriving.state, State::Untouched) {
            arriving.open(&self.site, number)?;
        }
        let State::Open { handle, prefix, begins } = &mut arriving.state else {
            return Err(Fault::Nonsense("a chunk of a file that is finished"));
        };
        if number != prefix.chunks.len() as u64 || prefix.bytes != number * CHUNK as u64 {
            return Err(Fault::Nonsense("a chunk that does not follow the last one"));
        }
        if ChunkSum::of(data) != sum {
            return Err(Fault::Nonsense("a chunk arrived damaged"));
        }
        handle
            .write_all_at(data, prefix.bytes)
            .map_err(|err| self.site.directory.error("write", &arriving.name, err))?;
        prefix.bytes += u64::from(length);
        prefix.chunks.push(sum);
        let chunk = NewChunk { number, length, sum };
        let begins = begins.take();
        let file = file_at(&self.site, file, &arriving.name, handle);
        Ok(Task::Chunk { file, chunk, begins })
    }

    /// Compares a file with its source; `None` if it is another one, which is to be forgotten then.
    pub(super) fn finish(
        &mut self,
        file: u32,
        bytes: u64,
        sum: FileSum,
    ) -> Result<Option<Task>, Fault> {
        let arriving = arriving(&mut self.files, file)?;
        if matches!(arriving.state, State::Untouched) {
            arriving.open(&self.site, chunks_of(bytes))?;
        }
        let state = std::mem::replace(&mut arriving.state, State::Finished);
        let State::Open { handle, prefix, .. } = state else {
            return Err(Fault::Nonsense("a file that was finished before"));
        };
        let same = prefix.bytes == bytes && FileSum::of(&prefix.chunks) == sum;
        let file = file_at(&self.site, file, &arriving.name, &handle);
        Ok(same.then_some(Task::Finish { file }))
    }

    /// Forgets all that is known of a file, and returns the error to tell. No task may be left.
    pub(super) fn forget(&mut self, file: u32) -> Result<MoveError, Fault> {
        let arriving = arriving(&mut self.files, file)?;
        let mut journal = self.site.journal();
        journal.cut(&arriving.name, 0)?;
        journal.write()?;
        Ok(MoveError::ArrivedChanged { path: self.site.directory.join(&arriving.name) })
    }
}

fn arriving(files: &mut [Arriving], file: u32) -> Result<&mut Arriving, Fault> {
    let at = usize::try_from(file).unwrap_or(usize::MAX);
    files.get_mut(at).ok_or(Fault::Nonsense("a file that was not announced"))
}

fn file_at(site: &Arc<Site>, number: u32, name: &Arc<str>, handle: &Arc<File>) -> FileAt {
    FileAt { site: site.clone(), number, name: name.clone(), handle: handle.clone() }
}

impl Arriving {
    /// Opens the file to go on after its first `keep` chunks; what lies behind them is taken back.
    fn open(&mut self, site: &Site, keep: u64) -> Result<(), Fault> {
        if keep > self.told {
            return Err(Fault::Nonsense("a chunk that does not follow what is there"));
        }
        if self.recorded {
            let mut journal = site.journal();
            journal.cut(&self.name, keep)?;
            journal.write()?;
        }
        self.state = match keep {
            0 => self.create(site)?,
            _ => self.go_on(site, keep)?,
        };
        Ok(())
    }

    fn create(&self, site: &Site) -> Result<State, MoveError> {
        let directory = &site.directory;
        // Refuses what is no file, such as a directory or a link.
        if directory.find_file(&self.name)?.is_some() {
            directory.remove_file(&self.name)?;
        }
        let handle = directory.create_file(&self.name)?;
        let found = handle.metadata().map_err(|err| directory.error("stat", &self.name, err))?;
        let (prefix, begins) = (Prefix::default(), Some(found.ino()));
        Ok(State::Open { handle: Arc::new(handle), prefix, begins })
    }

    fn go_on(&self, site: &Site, keep: u64) -> Result<State, MoveError> {
        let directory = &site.directory;
        let prefix = site.journal().prefix(&self.name, keep);
        let missing = || MoveError::Missing { path: directory.join(&self.name) };
        let handle = directory.open_for_update(&self.name)?.ok_or_else(missing)?;
        // A killed mover may have written more than it could write down.
        handle.set_len(prefix.bytes).map_err(|err| directory.error("truncate", &self.name, err))?;
        Ok(State::Open { handle: Arc::new(handle), prefix, begins: None })
    }
}
