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
use crate::chunk::{CHUNK, ChunkSum, FileSum};
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
                ToTarget::Finish { file, bytes, sum, .. } => self.finish(round, file, bytes, sum),
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
        if data.len() != length as usize {
            return Err(Fault::Nonsense("a chunk arrived damaged"));
        }
        let task = current.chunk(file, number, data, sum)?;
        self.tasks.add(task);
        Ok(())
    }

    fn finish(&mut self, round: u32, file: u32, bytes: u64, sum: FileSum) -> Result<(), Fault> {
        let Some(current) = self.round.as_mut().filter(|current| current.wants(round)) else {
            return Ok(());
        };
        match current.finish(file, bytes, sum)? {
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufReader, Write};
    use std::os::unix::net::UnixStream;

    use super::super::frame;
    use super::super::message::{OwnedPlace, Wanted};
    use super::*;

    const ROUND: u32 = 7;

    /// A message with its body.
    type Sent<'a> = (ToTarget, &'a [u8]);

    /// Sends these messages to a receiver, hears it to its end or until it has said `last`, and returns what it said and
    /// how it ended.
    fn hear(
        target: &TargetDirectory,
        messages: &[Sent],
        last: fn(&ToSource) -> bool,
    ) -> (Vec<ToSource>, Result<(), ReceiveError>) {
        let (near, far) = UnixStream::pair().unwrap();
        thread::scope(|threads| {
            let receiver = threads.spawn(|| {
                let heartbeat = Heartbeat::default();
                receive(Ok(target), Connection::of_unix(far).unwrap(), heartbeat)
            });
            let writing = near.try_clone().unwrap();
            threads.spawn(move || {
                for (message, body) in messages {
                    let head = frame::encode(message).unwrap();
                    if frame::write(&mut &writing, &head, body).is_err() {
                        return; // it has ended already
                    }
                }
            });
            let mut said = Vec::new();
            let mut reader = BufReader::new(&near);
            while let Ok(frame) = frame::read::<ToSource>(&mut reader, Vec::new) {
                said.push(frame.message);
                if said.last().is_some_and(last) {
                    near.shutdown(std::net::Shutdown::Write).unwrap();
                }
            }
            (said, receiver.join().unwrap())
        })
    }

    fn hello() -> Sent<'static> {
        (ToTarget::Hello { magic: MAGIC, version: VERSION }, b"")
    }

    fn begin(names: &[&str]) -> Sent<'static> {
        let files = names.iter().map(|name| Wanted { name: (*name).into(), fresh: false });
        let place = OwnedPlace::Database("crm".into());
        (ToTarget::Begin { round: ROUND, place, files: files.collect() }, b"")
    }

    fn chunk(file: u32, number: u64, data: &[u8]) -> Sent<'_> {
        let (length, sum) = (u32::try_from(data.len()).unwrap(), ChunkSum::of(data));
        (ToTarget::Chunk { round: ROUND, file, number, length, sum, packed: false }, data)
    }

    fn finish(file: u32, content: &[u8]) -> Sent<'static> {
        let chunks: Vec<_> = content.chunks(CHUNK).map(ChunkSum::of).collect();
        let (bytes, sum) = (content.len() as u64, FileSum::of(&chunks));
        (ToTarget::Finish { round: ROUND, file, bytes, sum }, b"")
    }

    fn lab() -> (tempfile::TempDir, TargetDirectory) {
        let dir = tempfile::tempdir().unwrap();
        let target = TargetDirectory::create(&dir.path().join("export"), "s").unwrap();
        (dir, target)
    }

    #[test]
    fn a_peer_that_makes_no_sense_ends_the_connection() {
        let sum = ChunkSum::of(b"other");
        let damaged =
            ToTarget::Chunk { round: ROUND, file: 0, number: 0, length: 4, sum, packed: false };
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let (sum, length) = (ChunkSum::of(b""), u32::MAX);
        let packed =
            ToTarget::Chunk { round: ROUND, file: 0, number: 0, length, sum, packed: true };
        let top_level = Wanted { name: ".sums".into(), fresh: true };
        let hidden =
            ToTarget::Begin { round: ROUND, place: OwnedPlace::TopLevel, files: vec![top_level] };
        let long = "x".repeat(256);
        let cases: Vec<(&str, Vec<Sent>)> = vec![
            ("no greeting", vec![begin(&["f"])]),
            ("another program", vec![(ToTarget::Hello { magic: *b"another!", version: 1 }, b"")]),
            (
                "another version",
                vec![(ToTarget::Hello { magic: MAGIC, version: VERSION + 1 }, b"")],
            ),
            ("two greetings", vec![hello(), hello()]),
            ("a name that leads out", vec![hello(), begin(&["../f"])]),
            ("a parent", vec![hello(), begin(&[".."])]),
            ("no name", vec![hello(), begin(&[""])]),
            ("a long name", vec![hello(), begin(&[&long])]),
            ("a name with a zero byte", vec![hello(), begin(&["a\0b"])]),
            ("one name twice", vec![hello(), begin(&["f", "f"])]),
            ("our own file", vec![hello(), (hidden, b"")]),
            ("a file that was not announced", vec![hello(), begin(&["f"]), chunk(1, 0, b"x")]),
            ("the end of one", vec![hello(), begin(&["f"]), finish(u32::MAX, b"")]),
            ("a chunk too early", vec![hello(), begin(&["f"]), chunk(0, 1, b"x")]),
            (
                "a chunk at the end of the world",
                vec![hello(), begin(&["f"]), chunk(0, u64::MAX, b"x")],
            ),
            (
                "a chunk after a short one",
                vec![hello(), begin(&["f"]), chunk(0, 0, b"x"), chunk(0, 1, b"x")],
            ),
            ("an empty chunk", vec![hello(), begin(&["f"]), chunk(0, 0, b"")]),
            ("a damaged chunk", vec![hello(), begin(&["f"]), (damaged, b"data")]),
            ("a bomb", vec![hello(), begin(&["f"]), (packed, &bomb)]),
            ("more than there is", vec![hello(), begin(&["f"]), finish(0, b"x")]),
            ("a second end", vec![hello(), begin(&["f"]), finish(0, b""), finish(0, b"")]),
        ];
        for (what, messages) in cases {
            let (dir, target) = lab();
            let (_, end) = hear(&target, &messages, |_| false);
            assert!(matches!(end, Err(ReceiveError::Nonsense { .. })), "{what}: {end:?}");
            let around: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
            assert_eq!(around.len(), 1, "{what}: {around:?}");
            assert_eq!(fs::read_dir(dir.path().join("export")).unwrap().count(), 1, "{what}");
        }
    }

    #[test]
    fn bytes_that_are_no_frames_end_the_connection() {
        for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 100], &[0; 100]] {
            let (_dir, target) = lab();
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(bytes).unwrap();
            let connection = Connection::of_unix(far).unwrap();
            let end = receive(Ok(&target), connection, Heartbeat::default());
            assert!(matches!(&end, Err(ReceiveError::Lost { .. })), "{end:?}");
        }
    }

    #[test]
    fn what_differs_from_its_source_is_not_delivered_and_forgotten() {
        let (dir, target) = lab();
        let content = vec![1; 3 * CHUNK / 2];
        let chunks = [chunk(0, 0, &content[..CHUNK]), chunk(0, 1, &content[CHUNK..])];
        let [first, second] = chunks;
        let wrong = vec![2; content.len()];
        let (said, end) =
            hear(&target, &[hello(), begin(&["f"]), first, second, finish(0, &wrong)], |said| {
                matches!(said, ToSource::Failed { .. })
            });
        let failed = said.into_iter().find_map(|said| match said {
            ToSource::Failed { error, .. } => Some(MoveError::from(error)),
            ToSource::Delivered { .. } => panic!("it was delivered"),
            _ => None,
        });
        let path = dir.path().join("export/.pgthaw-s/crm/f");
        assert!(matches!(failed, Some(MoveError::ArrivedChanged { path: of }) if of == path));
        assert!(end.is_ok(), "{end:?}");

        let (said, _) = hear(&target, &[hello(), begin(&["f"])], |said| {
            matches!(said, ToSource::HasAll { .. })
        });
        assert!(
            matches!(said[..], [ToSource::Hello { .. }, ToSource::HasAll { round: ROUND }]),
            "{said:?}"
        );
    }

    #[test]
    fn messages_of_an_earlier_round_are_ignored() {
        let (_dir, target) = lab();
        let late = ToTarget::Finish { round: ROUND - 1, file: 9, bytes: 9, sum: FileSum::of(&[]) };
        let (said, end) =
            hear(&target, &[hello(), begin(&["f"]), (late, b""), finish(0, b"")], |said| {
                matches!(said, ToSource::Delivered { .. })
            });
        assert!(end.is_ok(), "{end:?}");
        assert!(
            matches!(said.last(), Some(ToSource::Delivered { round: ROUND, file: 0 })),
            "{said:?}"
        );
    }
}
