//! One delivery on the sending side: what of each file is where, and going on after every interruption.
//!
//! What is known about a file stays in memory for as long as the delivery lasts, so that after a break only chunks that
//! were on their way are read and sent again.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::link::{Ended, Link};
use super::message::{ToSource, ToTarget, Wanted};
use super::remote_target::Counters;
use crate::chunk::{CHUNK, ChunkSum, FileSum, PIECE, Summing, chunks_of};
use crate::copy::{CopyFile, Delivered, Progress, Reuse};
use crate::delivery::Place;
use crate::directory::Directory;
use crate::error::MoveError;
use crate::names::{NAME_MAX, is_plain};
use crate::source::{Source, Stamp};

/// Most bytes that are on their way: sent, but not yet known to lie on the target's disk. 0.8 % of 4 GB, and six times what
/// 1 GB/s keeps on its way during a round trip of 5 ms.
pub(super) const WINDOW: u64 = 32 << 20;
/// What a message counts for at least: it takes room and work at the target however short it is.
const MESSAGE: u64 = 4096;
/// How often the caller is asked whether to go on while nothing moves.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// The fastest level of zstd that shrinks table data well; the lower ones are no faster.
const ZSTD_LEVEL: i32 = 1;

/// Connection to a target.
pub(super) type SourceLink = Link<ToTarget, ToSource>;

/// Why a step did not come to its end.
#[derive(Debug)]
pub(super) enum Stop {
    /// The connection ended: go on with another one.
    Link,
    /// The delivery is over.
    Failed(MoveError),
}

impl From<Ended> for Stop {
    fn from(Ended: Ended) -> Self {
        Self::Link
    }
}

impl From<MoveError> for Stop {
    fn from(err: MoveError) -> Self {
        Self::Failed(err)
    }
}

/// The caller's two functions.
pub(super) struct Caller<'a> {
    pub(super) progress: &'a mut Progress<'a>,
    pub(super) done: &'a mut dyn FnMut(usize, Delivered),
    /// Named when it stops.
    pub(super) directory: &'a Directory,
}

/// A delivery.
pub(super) struct Sending<'a> {
    place: Place<'a>,
    directory: &'a Directory,
    files: Vec<Outgoing<'a>>,
    packer: Option<Packer>,
    counters: &'a Counters,
}

/// One file, and how far it has come.
struct Outgoing<'a> {
    file: CopyFile<'a>,
    /// Its chunks as far as they were read, each with the SHA-256 up to its end.
    chunks: Vec<(ChunkSum, Sha256)>,
    /// What it was when it was first opened.
    stamp: Option<Stamp>,
    /// Its bytes, once it was read to its end.
    bytes: Option<u64>,
    /// Chunks that were ever sent; from 0 to this one.
    sent: u64,
    /// Whether anything was sent at all.
    was_sent: bool,
    /// Bytes that the caller was told.
    told: u64,
    delivered: bool,
}

/// A message on its way.
#[derive(Clone, Copy)]
struct OnItsWay {
    at: usize,
    /// The chunk's number; none for the end of a file.
    chunk: Option<u64>,
    cost: u64,
}

/// What one connection is used for.
struct Run<'a, 'b> {
    link: &'a SourceLink,
    round: u32,
    /// Index of each file that was announced, by its number in the round.
    announced: Vec<usize>,
    /// Checksums of the chunks that are at the target, by that number.
    there: Vec<Vec<ChunkSum>>,
    on_its_way: VecDeque<OnItsWay>,
    window: u64,
    caller: &'a mut Caller<'b>,
    /// When the target last secured something.
    moved: &'a mut Instant,
}

impl<'a> Sending<'a> {
    pub(super) fn new(
        place: Place<'a>,
        files: &[CopyFile<'a>],
        directory: &'a Directory,
        compress: bool,
        counters: &'a Counters,
    ) -> Result<Self, MoveError> {
        let packer = compress.then(Packer::new).transpose();
        let packer = packer.map_err(|err| MoveError::source("compress", directory.path(), err))?;
        let mut names = HashSet::new();
        for CopyFile { name, .. } in files {
            if !is_plain(name) || name.len() > NAME_MAX || !names.insert(*name) {
                let why =
                    io::Error::new(io::ErrorKind::InvalidInput, "not a plain name of its own");
                return Err(MoveError::source("open", &directory.join(name), why));
            }
        }
        let files = files.iter().map(|file| Outgoing::new(*file)).collect();
        Ok(Self { place, directory, files, packer, counters })
    }

    /// Sends what the target does not have, and waits until it has secured everything.
    pub(super) fn run(
        &mut self,
        link: &SourceLink,
        round: u32,
        caller: &mut Caller<'_>,
        moved: &mut Instant,
    ) -> Result<(), Stop> {
        let announced: Vec<usize> =
            (0..self.files.len()).filter(|at| !self.files[*at].delivered).collect();
        let wanted = announced.iter().map(|at| self.files[*at].wanted()).collect();
        let there = vec![Vec::new(); announced.len()];
        let on_its_way = VecDeque::new();
        let mut run = Run { link, round, announced, there, on_its_way, window: 0, caller, moved };
        run.send(ToTarget::Begin { round, place: self.place.into(), files: wanted }, Vec::new())?;
        while !self.wait(&mut run)? {} // for HasAll
        for number in 0..run.announced.len() {
            self.send_file(&mut run, number)?;
        }
        while !run.on_its_way.is_empty() {
            self.wait(&mut run)?;
        }
        Ok(())
    }

    fn send_file(&mut self, run: &mut Run<'_, '_>, number: usize) -> Result<(), Stop> {
        let (at, round) = (run.announced[number], run.round);
        let file = u32::try_from(number).unwrap_or(u32::MAX);
        let there = std::mem::take(&mut run.there[number]);
        let mut reader = Reader::go_on(&mut self.files[at], self.directory, &there)?;
        let mut same = true;
        self.secured(run, at, reader.bytes)?;
        loop {
            let mut data = run.link.buffer();
            let Some(sum) = reader.next(&mut self.files[at], &mut data)? else {
                run.link.give_back(data);
                break;
            };
            let (chunk, length) = (reader.number - 1, data.len() as u64);
            same &= there.get(usize::try_from(chunk).unwrap_or(usize::MAX)) == Some(&sum);
            if same {
                run.link.give_back(data);
                self.secured(run, at, reader.bytes)?;
                self.look(run)?;
                continue;
            }
            self.count(at, chunk, length);
            let (body, packed) = match &mut self.packer {
                // Otherwise the network is faster than compressing.
                Some(packer) if run.link.is_behind() => packer.pack(data, run.link),
                _ => (data, false),
            };
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            self.make_room(run)?;
            run.on_its_way(at, Some(chunk), body.len() as u64);
            run.send(ToTarget::Chunk { round, file, number: chunk, length, sum, packed }, body)?;
        }
        let (bytes, sum) = self.files[at].sum();
        self.make_room(run)?;
        run.on_its_way(at, None, 0);
        run.send(ToTarget::Finish { round, file, bytes, sum }, Vec::new())
    }

    /// Notes that a chunk is being sent.
    fn count(&mut self, at: usize, chunk: u64, bytes: u64) {
        let outgoing = &mut self.files[at];
        self.counters.sent(bytes, chunk < outgoing.sent);
        outgoing.sent = outgoing.sent.max(chunk + 1);
        outgoing.was_sent = true;
    }

    /// Waits until there is room in the window.
    fn make_room(&mut self, run: &mut Run<'_, '_>) -> Result<(), Stop> {
        self.look(run)?;
        while run.window >= WINDOW {
            self.wait(run)?;
        }
        Ok(())
    }

    /// Takes what has come meanwhile.
    fn look(&mut self, run: &mut Run<'_, '_>) -> Result<(), Stop> {
        while let Some((message, _)) = run.link.receive(Duration::ZERO)? {
            self.heard(run, message)?;
        }
        Ok(())
    }

    /// Waits for a message; returns whether it was the end of the list of what is there.
    fn wait(&mut self, run: &mut Run<'_, '_>) -> Result<bool, Stop> {
        match run.link.receive(LOOK)? {
            Some((message, _)) => self.heard(run, message),
            None => {
                run.caller.report(0)?;
                Ok(false)
            }
        }
    }

    fn heard(&mut self, run: &mut Run<'_, '_>, message: ToSource) -> Result<bool, Stop> {
        match message {
            ToSource::Has { round, file, first, sums } if round == run.round => {
                let there = run.there.get_mut(usize::try_from(file).unwrap_or(usize::MAX));
                let Some(there) = there.filter(|there| there.len() as u64 == first) else {
                    return Err(run.nonsense("it has chunks of no file"));
                };
                there.extend(sums);
                let at = run.announced[usize::try_from(file).unwrap_or(usize::MAX)];
                let most = self.files[at].most_chunks(self.directory)?;
                there.truncate(usize::try_from(most).unwrap_or(usize::MAX));
            }
            ToSource::HasAll { round } if round == run.round => {
                *run.moved = Instant::now();
                return Ok(true);
            }
            ToSource::Confirmed { round, file, chunks } if round == run.round => {
                let at = run.confirm(file, Some(chunks))?;
                let length = self.files[at].stamp.map_or(0, |stamp| stamp.length);
                self.secured(run, at, length.min(chunks.saturating_mul(CHUNK as u64)))?;
            }
            ToSource::Delivered { round, file } if round == run.round => {
                let at = run.confirm(file, None)?;
                let (bytes, sha256) = self.files[at].content();
                self.secured(run, at, bytes)?;
                let outgoing = &mut self.files[at];
                outgoing.delivered = true;
                outgoing.chunks = Vec::new();
                let reused = bytes > 0 && !outgoing.was_sent; // an empty file is made anew
                (run.caller.done)(at, Delivered { bytes, sha256, reused });
            }
            ToSource::Failed { round, error } if round == run.round => {
                return Err(Stop::Failed(error.into()));
            }
            _ => {} // of an earlier round
        }
        Ok(false)
    }

    /// The first `bytes` of a file are at the target.
    fn secured(&mut self, run: &mut Run<'_, '_>, at: usize, bytes: u64) -> Result<(), Stop> {
        *run.moved = Instant::now();
        let told = &mut self.files[at].told;
        let more = bytes.saturating_sub(*told);
        *told += more;
        if more > 0 {
            run.caller.report(more)?;
        }
        Ok(())
    }
}

impl Run<'_, '_> {
    fn send(&mut self, message: ToTarget, body: Vec<u8>) -> Result<(), Stop> {
        let mut outgoing = Some((message, body));
        while !self.link.send(&mut outgoing, LOOK)? {
            self.caller.report(0)?;
        }
        Ok(())
    }

    fn on_its_way(&mut self, at: usize, chunk: Option<u64>, bytes: u64) {
        let cost = bytes.max(MESSAGE);
        self.window += cost;
        self.on_its_way.push_back(OnItsWay { at, chunk, cost });
    }

    /// Notes that the first `chunks` chunks of a file, or all of it, have arrived; returns the file's index.
    fn confirm(&mut self, file: u32, chunks: Option<u64>) -> Result<usize, Stop> {
        let at = self.announced.get(usize::try_from(file).unwrap_or(usize::MAX)).copied();
        let Some(at) = at else { return Err(self.nonsense("it confirmed no file")) };
        let mut finished = false;
        while let Some(first) = self.on_its_way.front().copied().filter(|first| first.at == at) {
            match (first.chunk, chunks) {
                (Some(number), Some(chunks)) if number >= chunks => break,
                (None, Some(_)) => break,
                (number, _) => finished = number.is_none(),
            }
            self.window -= first.cost;
            self.on_its_way.pop_front();
        }
        if chunks.is_none() && !finished {
            return Err(self.nonsense("it delivered what was not sent"));
        }
        Ok(at)
    }

    fn nonsense(&self, what: &str) -> Stop {
        self.link.end(format!("the target does not follow the protocol: {what}"));
        Stop::Link
    }
}

impl Caller<'_> {
    pub(super) fn report(&mut self, bytes: u64) -> Result<(), MoveError> {
        match (self.progress)(bytes) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                Err(MoveError::Stopped { path: self.directory.path().into() })
            }
        }
    }
}

impl<'a> Outgoing<'a> {
    fn new(file: CopyFile<'a>) -> Self {
        Self {
            file,
            chunks: Vec::new(),
            stamp: None,
            bytes: None,
            sent: 0,
            was_sent: false,
            told: 0,
            delivered: false,
        }
    }

    /// How the file is announced: what an earlier attempt left of a file of one attempt only is not used, what this one
    /// has sent is.
    fn wanted(&self) -> Wanted {
        let fresh = self.file.reuse == Reuse::Never && self.chunks.is_empty();
        Wanted { name: self.file.name.into(), fresh }
    }

    /// How many chunks of it the target can have, at most.
    fn most_chunks(&mut self, directory: &Directory) -> Result<u64, MoveError> {
        let stamp = match self.stamp {
            Some(stamp) => stamp,
            None => *self.stamp.insert(Source::open(directory, self.file.name)?.stamp()),
        };
        Ok(chunks_of(stamp.length))
    }

    /// Length and checksum for the way, of a file that was read to its end.
    fn sum(&self) -> (u64, FileSum) {
        let chunks: Vec<ChunkSum> = self.chunks.iter().map(|(sum, _)| *sum).collect();
        (self.bytes.unwrap_or(0), FileSum::of(&chunks))
    }

    /// Length and SHA-256, of a file that was read to its end.
    fn content(&self) -> (u64, [u8; 32]) {
        let sha = self.chunks.last().map_or_else(Sha256::new, |(_, sha)| sha.clone());
        (self.bytes.unwrap_or(0), sha.finalize().into())
    }
}

/// Reads a file from some chunk on.
struct Reader {
    /// None where nothing is left to read.
    source: Option<Source>,
    /// The next chunk.
    number: u64,
    /// Bytes before it.
    bytes: u64,
    sha: Sha256,
}

impl Reader {
    /// Begins after the chunks that were read before and are at the target.
    fn go_on(
        outgoing: &mut Outgoing<'_>,
        directory: &Directory,
        there: &[ChunkSum],
    ) -> Result<Self, MoveError> {
        let equal = outgoing.chunks.iter().zip(there).take_while(|(own, sum)| own.0 == **sum);
        let number = equal.count();
        let sha = match number.checked_sub(1).and_then(|last| outgoing.chunks.get(last)) {
            Some((_, sha)) => sha.clone(),
            None => Sha256::new(),
        };
        if let (Some(bytes), true) = (outgoing.bytes, number == outgoing.chunks.len()) {
            return Ok(Self { source: None, number: number as u64, bytes, sha });
        }
        let source = Source::open(directory, outgoing.file.name)?;
        if *outgoing.stamp.get_or_insert(source.stamp()) != source.stamp() {
            return Err(source.changed());
        }
        let bytes = source.length().min((number * CHUNK) as u64);
        Ok(Self { source: Some(source), number: number as u64, bytes, sha })
    }

    /// Reads the next chunk into `data` and returns its checksum; `None` at the end of a file that has not changed.
    fn next(
        &mut self,
        outgoing: &mut Outgoing<'_>,
        data: &mut Vec<u8>,
    ) -> Result<Option<ChunkSum>, MoveError> {
        let Some(source) = &self.source else { return Ok(None) };
        if self.bytes >= source.length() {
            source.unchanged(self.bytes)?;
            outgoing.bytes = Some(self.bytes);
            return Ok(None);
        }
        let length =
            usize::try_from(source.length() - self.bytes).map_or(CHUNK, |left| left.min(CHUNK));
        data.resize(length, 0);
        let before = outgoing.chunks.get(usize::try_from(self.number).unwrap_or(usize::MAX));
        let mut summing = Summing::new();
        let mut offset = self.bytes;
        for piece in data.chunks_mut(PIECE) {
            if source.read_at(piece, offset)? < piece.len() {
                return Err(source.changed());
            }
            if before.is_none() {
                self.sha.update(&*piece);
            }
            summing.update(piece);
            offset += piece.len() as u64;
        }
        let sum = summing.sum();
        match before {
            Some((before, _)) if *before != sum => return Err(source.changed()),
            Some((_, sha)) => self.sha = sha.clone(),
            None => outgoing.chunks.push((sum, self.sha.clone())),
        }
        self.number += 1;
        self.bytes += length as u64;
        Ok(Some(sum))
    }
}

/// Compresses chunks that become smaller by at least an eighth.
struct Packer(zstd::bulk::Compressor<'static>);

impl Packer {
    fn new() -> io::Result<Self> {
        zstd::bulk::Compressor::new(ZSTD_LEVEL).map(Self)
    }

    /// Returns what to send for `data`, and whether it is compressed.
    fn pack(&mut self, data: Vec<u8>, link: &SourceLink) -> (Vec<u8>, bool) {
        let mut packed = link.buffer();
        packed.resize(data.len(), 0);
        match self.0.compress_to_buffer(&data, &mut packed[..]) {
            Ok(length) if length <= data.len() - data.len() / 8 => {
                packed.truncate(length);
                link.give_back(data);
                (packed, true)
            }
            _ => {
                link.give_back(packed); // not worth the work on the other side
                (data, false)
            }
        }
    }
}
