//! The sending half: a target on another machine, reached over whatever connection there is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::connection::{Connection, Heartbeat};
use super::link::Link;
use super::message::{Answer, Call, MAGIC, ToSource, ToTarget, VERSION};
use super::sending::{Caller, LOOK, Sending, SourceLink, Stop};
use crate::copy::{CopyFile, Delivered, Progress};
use crate::delivery::{Place, Target};
use crate::directory::Directory;
use crate::error::MoveError;
use crate::sums::SumEntry;

/// How long what is queued may take when a target is dropped.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a [`RemoteTarget`] uses its connections.
#[derive(Debug, Clone, Copy)]
pub struct RemoteOptions {
    /// How long a call waits for a connection while nothing moves, before it fails with [`MoveError::Unreachable`].
    pub stall_limit: Duration,
    /// How a silent receiver is noticed.
    pub heartbeat: Heartbeat,
    /// Most bytes per second that are written to a connection.
    pub bytes_per_second: Option<std::num::NonZeroU64>,
    /// Whether chunks may be compressed on the wire (zstd, level 1): for dumps that were made without compression. It is done
    /// where the network is the slower part, that is where chunks wait to be sent, and always below a limit.
    pub compress: bool,
}

impl Default for RemoteOptions {
    /// Waits ten minutes; no limit, no compression.
    fn default() -> Self {
        Self {
            stall_limit: Duration::from_secs(600),
            heartbeat: Heartbeat::default(),
            bytes_per_second: None,
            compress: false,
        }
    }
}

/// What can be seen of a [`RemoteTarget`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteStatus {
    /// Whether the receiving half can be reached.
    pub connected: bool,
    /// Since when it can, or cannot.
    pub since: Timestamp,
    /// Why the last connection ended, while there is none.
    pub reason: Option<String>,
    /// Bytes of files that were sent, before compression; those sent again included.
    pub bytes_sent: u64,
    /// Bytes of files that were sent before, over a connection that broke.
    pub bytes_resent: u64,
}

/// The target directory on another machine, where [`crate::receive`] runs: the sending half.
///
/// Calls are made one after the other. While there is no connection they wait; over the next one they go on with what the
/// other machine's disk holds, whether the same receiver serves it or a new one.
pub struct RemoteTarget {
    shared: Arc<Shared>,
    options: RemoteOptions,
    /// The last round; locked by whoever makes a call.
    turn: Mutex<u32>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    counters: Counters,
    on_change: Box<dyn Fn(&RemoteStatus) + Send + Sync>,
}

struct State {
    link: Option<Arc<SourceLink>>,
    /// Counts connections.
    latest: u64,
    since: Timestamp,
    reason: String,
    /// The target cannot be worked in.
    refused: Option<MoveError>,
    aborted: bool,
}

/// Bytes of files on the wire.
#[derive(Debug, Default)]
pub(super) struct Counters {
    sent: AtomicU64,
    resent: AtomicU64,
}

impl Counters {
    pub(super) fn sent(&self, bytes: u64, again: bool) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if again {
            self.resent.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

impl RemoteTarget {
    /// Makes a target that has no connection yet. `on_change` is called, on any thread, when a connection begins or ends, and when
    /// a call has waited for one as long as a heartbeat takes.
    pub fn new(
        options: RemoteOptions,
        on_change: impl Fn(&RemoteStatus) + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            link: None,
            latest: 0,
            since: Timestamp::now(),
            reason: "not yet connected".into(),
            refused: None,
            aborted: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            counters: Counters::default(),
            on_change: Box::new(on_change),
        };
        Self { shared: Arc::new(shared), options, turn: Mutex::new(0) }
    }

    /// Takes a connection to [`crate::receive`]; one that is in use is ended. Returns at once.
    pub fn connect(&self, connection: Connection) {
        let (latest, before) = {
            let mut state = self.shared.lock();
            if state.aborted {
                return (connection.close)();
            }
            state.latest += 1;
            state.refused = None;
            (state.latest, state.link.clone())
        };
        if let Some(before) = before {
            before.end("another connection took its place");
        }
        let shared = self.shared.clone();
        let link = Link::start(
            connection,
            self.options.heartbeat,
            self.options.bytes_per_second,
            move |reason| shared.lost(latest, reason),
        );
        let (shared, patience) = (self.shared.clone(), self.options.heartbeat.silent);
        thread::spawn(move || shared.greet(latest, &link, patience));
    }

    /// Lets every call fail with [`MoveError::Aborted`], those to come too, and ends the connection.
    pub fn abort(&self) {
        let link = {
            let mut state = self.shared.lock();
            state.aborted = true;
            state.link.clone()
        };
        self.shared.changed.notify_all();
        if let Some(link) = link {
            link.end("delivery was ended");
        }
    }

    /// Returns what can be seen now.
    pub fn status(&self) -> RemoteStatus {
        self.shared.status()
    }

    /// Works over one connection after the other until it comes to an end.
    fn work<W: Work>(&self, work: &mut W) -> Result<W::Output, MoveError> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut moved = Instant::now();
        loop {
            let link = self.link(work, moved)?;
            *turn = turn.wrapping_add(1);
            match work.run(&link, *turn, &mut moved) {
                Ok(output) => return Ok(output),
                Err(Stop::Failed(err)) => return Err(err),
                // One that breaks at once, again and again, is no better than none.
                Err(Stop::Link) if link.age() > self.options.heartbeat.silent => {
                    moved = Instant::now();
                }
                Err(Stop::Link) => {}
            }
        }
    }

    /// Waits for a connection.
    fn link<W: Work>(&self, work: &mut W, moved: Instant) -> Result<Arc<SourceLink>, MoveError> {
        let begun = Instant::now();
        let mut told = false;
        loop {
            {
                let mut state = self.shared.lock();
                if state.aborted {
                    return Err(MoveError::Aborted);
                }
                if let Some(refused) = state.refused.take() {
                    return Err(refused);
                }
                match &state.link {
                    Some(link) if link.reason().is_none() => return Ok(link.clone()),
                    _ => {}
                }
                if moved.elapsed() >= self.options.stall_limit {
                    let (since, reason) = (state.since, state.reason.clone());
                    return Err(MoveError::Unreachable { since, reason });
                }
                drop(self.shared.changed.wait_timeout(state, LOOK));
            }
            // The end of a connection was told; that there never was one matters only now.
            if !told && begun.elapsed() > self.options.heartbeat.every {
                told = true;
                self.shared.tell_change();
            }
            work.look()?;
        }
    }

    fn call(&self, call: Call) -> Result<Answer, MoveError> {
        self.work(&mut Calling(call))
    }
}

impl Drop for RemoteTarget {
    fn drop(&mut self) {
        let link = self.shared.lock().link.clone();
        if let Some(link) = link {
            link.finish(LAST_WORDS);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> RemoteStatus {
        let state = self.lock();
        let connected = state.link.is_some();
        RemoteStatus {
            connected,
            since: state.since,
            reason: (!connected).then(|| state.reason.clone()),
            bytes_sent: self.counters.sent.load(Ordering::Relaxed),
            bytes_resent: self.counters.resent.load(Ordering::Relaxed),
        }
    }

    fn tell_change(&self) {
        self.changed.notify_all();
        (self.on_change)(&self.status());
    }

    /// Greets and waits to be greeted; from then on the connection can be used.
    fn greet(&self, number: u64, link: &Arc<SourceLink>, patience: Duration) {
        let _ = link.tell(ToTarget::Hello { magic: MAGIC, version: VERSION }); // the read tells of a lost connection
        match link.receive(patience) {
            Ok(Some((ToSource::Hello { magic: MAGIC, version: VERSION }, _))) => {
                {
                    let mut state = self.lock();
                    if state.aborted || state.latest != number || link.reason().is_some() {
                        drop(state);
                        return link.end("it came too late");
                    }
                    state.link = Some(link.clone());
                    state.since = Timestamp::now();
                }
                self.tell_change();
                // It may have ended before it was known.
                if let Some(reason) = link.reason() {
                    self.lost(number, reason);
                }
            }
            Ok(Some((ToSource::Refused(error), _))) => {
                let error = MoveError::from(error);
                link.end(error.to_string());
                // The receiver before this one may not have noticed yet that it is alone.
                if !matches!(error, MoveError::InUse { .. }) {
                    self.lock().refused = Some(error);
                    self.changed.notify_all();
                }
            }
            Ok(Some((ToSource::Hello { version, .. }, _))) => link.end(format!(
                "the mover at the target speaks version {version}, this one version {VERSION}"
            )),
            Ok(Some(_)) => link.end("the mover at the target did not greet"),
            Ok(None) => link.end("the mover at the target did not greet in time"),
            Err(_) => {}
        }
    }

    /// Connection `number` has ended.
    fn lost(&self, number: u64, reason: String) {
        {
            let mut state = self.lock();
            if state.latest != number {
                return;
            }
            state.reason = reason;
            if state.link.take().is_some() {
                state.since = Timestamp::now();
            }
        }
        self.tell_change();
    }
}

/// What is done over connections.
trait Work {
    type Output;

    /// Does it, or goes on with it, over one connection; `moved` is set whenever something is secured.
    fn run(
        &mut self,
        link: &SourceLink,
        round: u32,
        moved: &mut Instant,
    ) -> Result<Self::Output, Stop>;

    /// Asks whether to wait on.
    fn look(&mut self) -> Result<(), MoveError>;
}

struct Calling(Call);

impl Work for Calling {
    type Output = Answer;

    fn run(&mut self, link: &SourceLink, round: u32, _: &mut Instant) -> Result<Answer, Stop> {
        link.tell(ToTarget::Call { round, call: self.0.clone() })?;
        loop {
            if let Some((ToSource::Answer { round: of, answer }, _)) =
                link.receive(Duration::MAX)?
                && of == round
            {
                return answer.map_err(|err| Stop::Failed(err.into()));
            } // anything else is of an earlier round
        }
    }

    fn look(&mut self) -> Result<(), MoveError> {
        Ok(())
    }
}

struct Delivering<'a, 'b> {
    sending: Sending<'a>,
    caller: Caller<'b>,
}

impl Work for Delivering<'_, '_> {
    type Output = ();

    fn run(&mut self, link: &SourceLink, round: u32, moved: &mut Instant) -> Result<(), Stop> {
        self.sending.run(link, round, &mut self.caller, moved)
    }

    fn look(&mut self) -> Result<(), MoveError> {
        self.caller.report(0)
    }
}

/// Takes an answer apart; an answer to another question means that the target is no mover of ours.
macro_rules! expect_answer {
    ($answer:expr, $pattern:pat => $value:expr) => {
        match $answer? {
            $pattern => Ok($value),
            _ => Err(MoveError::Refused { reason: "it answered another question".into() }),
        }
    };
}

impl Target for RemoteTarget {
    fn deliver(
        &self,
        place: Place<'_>,
        files: &[CopyFile<'_>],
        source: &Directory,
        progress: &mut Progress<'_>,
        done: &mut dyn FnMut(usize, Delivered),
    ) -> Result<(), MoveError> {
        if files.is_empty() {
            return Ok(());
        }
        let counters = &self.shared.counters;
        let sending = Sending::new(place, files, source, self.options.compress, counters)?;
        let caller = Caller { progress, done, directory: source };
        self.work(&mut Delivering { sending, caller })
    }

    fn keep_sums(&self, name: &str, sums: &[SumEntry]) -> Result<(), MoveError> {
        let call = Call::KeepSums { name: name.into(), sums: sums.into() };
        expect_answer!(self.call(call), Answer::Done => ())
    }

    fn kept_sums(&self, name: &str) -> Result<Option<Vec<SumEntry>>, MoveError> {
        expect_answer!(self.call(Call::KeptSums { name: name.into() }), Answer::Sums(sums) => sums)
    }

    fn keep_note(&self, name: &str, note: &str) -> Result<(), MoveError> {
        let call = Call::KeepNote { name: name.into(), note: note.into() };
        expect_answer!(self.call(call), Answer::Done => ())
    }

    fn kept_note(&self, name: &str) -> Result<Option<String>, MoveError> {
        expect_answer!(self.call(Call::KeptNote { name: name.into() }), Answer::Note(note) => note)
    }

    fn publish_database(&self, database: &str, files: &[&str]) -> Result<String, MoveError> {
        let files = files.iter().map(|file| (*file).to_owned()).collect();
        let call = Call::PublishDatabase { database: database.into(), files };
        expect_answer!(self.call(call), Answer::Name(name) => name)
    }

    fn published_before(&self, database: &str) -> Result<Option<u64>, MoveError> {
        let call = Call::PublishedBefore { database: database.into() };
        expect_answer!(self.call(call), Answer::Bytes(bytes) => bytes)
    }

    fn publish_file(&self, name: &str) -> Result<(), MoveError> {
        expect_answer!(self.call(Call::PublishFile { name: name.into() }), Answer::Done => ())
    }

    fn remove_replaced(&self) -> Result<(), MoveError> {
        expect_answer!(self.call(Call::RemoveReplaced), Answer::Done => ())
    }

    fn write_sha256sums(&self, entries: &[SumEntry]) -> Result<(), MoveError> {
        let call = Call::WriteSha256sums { sums: entries.into() };
        expect_answer!(self.call(call), Answer::Done => ())
    }

    fn write_export_json(&self, json: &[u8]) -> Result<(), MoveError> {
        expect_answer!(self.call(Call::WriteExportJson { json: json.into() }), Answer::Done => ())
    }

    fn export_bytes(&self, sums: &[SumEntry]) -> Result<u64, MoveError> {
        let call = Call::ExportBytes { sums: sums.into() };
        expect_answer!(self.call(call), Answer::Bytes(Some(bytes)) => bytes)
    }

    fn remove_staging(&self) -> Result<(), MoveError> {
        expect_answer!(self.call(Call::RemoveStaging), Answer::Done => ())
    }
}
