//! The receiving half: follows the messages of one connection and works in the target directory of this machine.
//!
//! It keeps nothing that matters in memory: it may be killed at any instruction, and another one goes on from what is on
//! disk. A peer that makes no sense ends the connection and reaches nothing outside of the staging directory.

use std::thread;
use std::time::Duration;

use super::arriving::{Fault, Round};
use super::connection::{Connection, Heartbeat};
use super::frame::FrameError;
use super::link::{Ended, Link};
use super::message::{Answer, Call, MAGIC, ToSource, ToTarget, VERSION};
use super::settle::{Tasks, settle};
use crate::chunk::{CHUNK, ChunkSum};
use crate::error::MoveError;
use crate::target::TargetDirectory;

/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why [`receive`] ended before its peer wanted.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection broke, or the peer fell silent.
    #[error("the connection to the source was lost: {reason}")]
    Lost {
        /// In which way.
        reason: String,
    },
    /// The peer is no mover of this version, or does not follow the protocol.
    #[error("the source does not follow the protocol: {reason}")]
    Nonsense {
        /// What it did.
        reason: String,
    },
    /// The target could not be opened, which the peer was told.
    #[error("the target cannot be worked in")]
    Refused(#[source] MoveError),
}

/// Serves one connection until it ends: the receiving half of [`crate::RemoteTarget`]. What has arrived by then is synced,
/// verified and written down before this returns.
///
/// `target` is the opened target directory; where it could not be opened, its error is told to the other side.
///
/// # Errors
/// [`ReceiveError`], unless the other side closed the connection.
pub fn receive(
    target: Result<&TargetDirectory, MoveError>,
    connection: Connection,
    heartbeat: Heartbeat,
) -> Result<(), ReceiveError> {
    let link = Link::start(connection, heartbeat, None, |_| {});
    greeted(&link, heartbeat)?;
    let target = match target {
        Ok(target) => target,
        Err(err) => {
            let _ = link.tell(ToSource::Refused((&err).into())); // it is told to our caller, too
            link.finish(LAST_WORDS);
            return Err(ReceiveError::Refused(err));
        }
    };
    let _ = link.tell(ToSource::Hello { magic: MAGIC, version: VERSION }); // the first read tells of a lost connection
    let tasks = Tasks::new();
    let said = thread::scope(|threads| {
        let settler = threads.spawn(|| settle(&tasks, &|message| drop(link.tell(message))));
        let mut receiver =
            Receiver { target, link: &link, tasks: &tasks, round: None, unpacked: Vec::new() };
        let said = receiver.follow();
        tasks.close();
        drop(settler.join()); // a panic there is passed on by the scope
        said
    });
    match said {
        Err(reason) => {
            link.end(reason);
            Err(ReceiveError::Nonsense { reason: reason.into() })
        }
        Ok(()) => match link.reason() {
            Some(reason) if reason != FrameError::Closed.to_string() => {
                Err(ReceiveError::Lost { reason })
            }
            _ => Ok(()),
        },
    }
}

type TargetLink = Link<ToSource, ToTarget>;

fn greeted(link: &TargetLink, heartbeat: Heartbeat) -> Result<(), ReceiveError> {
    let nonsense = |reason: String| {
        link.end(&*reason);
        Err(ReceiveError::Nonsense { reason })
    };
    match link.receive(heartbeat.silent) {
        Ok(Some((ToTarget::Hello { magic: MAGIC, version: VERSION }, _))) => Ok(()),
        Ok(Some((ToTarget::Hello { magic: MAGIC, version }, _))) => {
            nonsense(format!("it speaks version {version}, this mover speaks version {VERSION}"))
        }
        Ok(Some(_)) => nonsense("it did not greet".into()),
        Ok(None) => nonsense("it did not greet in time".into()),
        Err(Ended) => {
            Err(ReceiveError::Lost { reason: link.reason().unwrap_or_else(|| "closed".into()) })
        }
    }
}

struct Receiver<'a> {
    target: &'a TargetDirectory,
    link: &'a TargetLink,
    tasks: &'a Tasks,
    round: Option<Round>,
    unpacked: Vec<u8>,
}

impl Receiver<'_> {
    /// Follows messages until the connection has ended; fails with what makes no sense in them.
    fn follow(&mut self) -> Result<(), &'static str> {
        loop {
            let (message, body) = match self.link.receive(Duration::MAX) {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                Err(Ended) => return Ok(()),
            };
            let round = match message {
                ToTarget::Hello { .. } => return Err("it greeted twice"),
                ToTarget::Ping => continue,
                ToTarget::Begin { round, .. }
                | ToTarget::Chunk { round, .. }
                | ToTarget::Finish { round, .. }
                | ToTarget::Call { round, .. } => round,
            };
            let followed = match message {
                ToTarget::Hello { .. } | ToTarget::Ping => Ok(()),
                ToTarget::Begin { place, files, .. } => {
                    self.settled();
                    let mut tell = |message| drop(self.link.tell(message));
                    Round::begin(self.target, round, &place, files, &mut tell)
                        .map(|begun| self.round = Some(begun))
                }
                ToTarget::Call { call, .. } => {
                    self.settled();
                    let answer = answer(self.target, call).map_err(|err| (&err).into());
                    let _ = self.link.tell(ToSource::Answer { round, answer });
                    Ok(())
                }
                ToTarget::Chunk { file, number, length, sum, packed, .. } => {
                    self.chunk(round, (file, number, sum), length, packed.then_some(()), &body)
                }
                ToTarget::Finish { file, bytes, sha256, .. } => {
                    self.finish(round, file, bytes, sha256)
                }
            };
            self.link.give_back(body);
            match followed {
                Ok(()) => {}
                Err(Fault::Nonsense(reason)) => return Err(reason),
                Err(Fault::Target(err)) => {
                    self.round = None; // what still comes of it is ignored; what has come is made sure of
                    let _ = self.link.tell(ToSource::Failed { round, error: (&err).into() });
                }
            }
        }
    }

    /// Waits until everything that has come is made sure of, and leaves the round.
    fn settled(&mut self) {
        self.tasks.drain();
        self.round = None;
    }

    fn chunk(
        &mut self,
        round: u32,
        (file, number, sum): (u32, u64, ChunkSum),
        length: u32,
        packed: Option<()>,
        body: &[u8],
    ) -> Result<(), Fault> {
        let Some(current) = self.round.as_mut().filter(|current| current.wants(round)) else {
            return Ok(());
        };
        let data = match packed {
            None => body,
            Some(()) => unpack(body, &mut self.unpacked)?,
        };
        if data.len() != length as usize || ChunkSum::of(data) != sum {
            return Err(Fault::Nonsense("a chunk arrived damaged"));
        }
        let task = current.chunk(file, number, data, sum)?;
        self.tasks.add(task);
        Ok(())
    }

    fn finish(&mut self, round: u32, file: u32, bytes: u64, sha256: [u8; 32]) -> Result<(), Fault> {
        let Some(current) = self.round.as_mut().filter(|current| current.wants(round)) else {
            return Ok(());
        };
        match current.finish(file, bytes, sha256)? {
            Some(task) => {
                self.tasks.add(task);
                Ok(())
            }
            None => {
                self.tasks.drain();
                Err(Fault::Target(current.forget(file)?))
            }
        }
    }
}

/// Decompresses a chunk into `buffer`, never beyond a chunk's length.
fn unpack<'a>(body: &[u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], Fault> {
    buffer.resize(CHUNK, 0);
    let length = zstd::bulk::decompress_to_buffer(body, &mut buffer[..])
        .map_err(|_| Fault::Nonsense("a chunk cannot be decompressed"))?;
    Ok(&buffer[..length])
}

fn answer(target: &TargetDirectory, call: Call) -> Result<Answer, MoveError> {
    let done = |()| Answer::Done;
    match call {
        Call::KeepSums { name, sums } => target.keep_sums(&name, &sums).map(done),
        Call::KeptSums { name } => target.kept_sums(&name).map(Answer::Sums),
        Call::KeepNote { name, note } => target.keep_note(&name, &note).map(done),
        Call::KeptNote { name } => target.kept_note(&name).map(Answer::Note),
        Call::PublishDatabase { database, files } => {
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            target.publish_database(&database, &files).map(Answer::Name)
        }
        Call::PublishedBefore { database } => target.published_before(&database).map(Answer::Bytes),
        Call::PublishFile { name } => target.publish_file(&name).map(done),
        Call::RemoveReplaced => target.remove_replaced().map(done),
        Call::WriteSha256sums { sums } => target.write_sha256sums(&sums).map(done),
        Call::WriteExportJson { json } => target.write_export_json(&json).map(done),
        Call::ExportBytes { sums } => target.export_bytes(&sums).map(Some).map(Answer::Bytes),
        Call::RemoveStaging => target.remove_staging().map(done),
    }
}
