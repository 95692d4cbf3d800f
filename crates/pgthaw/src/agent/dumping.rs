//! The verbs `globals` and `dump`: what is saved, and how it gets into the target.
//!
//! While pg_dump runs, data files that it has finished are copied and verified; then they leave the dump's directory ([`super::pace`]
//! says why that matters), unless the dump is to be kept. Nothing of a database is final before its
//! pg_dump has exited with 0 and the mount has answered every read: only then its last files are delivered and it gets its
//! name by one rename.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use pgthaw_mover::{
    CopyFile, Directory, FinishedFiles, GLOBALS_SQL, MoveError, Place, Reuse, SumEntry, Target,
    file_name_for_database,
};
use pgthaw_postgres::dump::{Dump, DumpError, DumpEvent, DumpPlan};
use pgthaw_session::observed::{Failure, Progress};
use tokio::sync::watch;

use super::delivering::target;
use super::pace::Pace;
use super::{Agent, begin_once};
use crate::internal::mount::{CoverageCount, DamagedFile};
use crate::internal::source::with_causes;

/// How often a running pg_dump is looked at when no file is finished.
const LOOK: Duration = Duration::from_millis(100);
/// How long pg_dump waits for a lock: nobody else is there, so that one means something is wrong.
const LOCK_WAIT: Duration = Duration::from_secs(60);

/// Begins to save `globals.sql`.
pub fn begin_globals(agent: Arc<Agent>) -> Json<()> {
    let work = agent.clone();
    begin_once(&agent, |view| &mut view.globals, async move { globals(work).await })
}

async fn globals(agent: Arc<Agent>) -> Result<(), Failure> {
    let text = {
        let running = agent.running.lock().await;
        let running = running.as_ref().ok_or_else(|| Failure::new("the instance does not run"))?;
        running.globals(&agent).await?
    };
    let saved = tokio::task::spawn_blocking(move || {
        // It goes the way of every other file: through the dump directory, and verified on the target's disk.
        let directory = &agent.assignment.place.dump_directory;
        let path = directory.join(GLOBALS_SQL);
        save_new(&path, &text).map_err(|err| {
            dump_directory_failure(directory, &format!("write `{}`: {err}", path.display()))
        })?;
        let (source, target) = (open_source(directory)?, target(&agent)?);
        let file = CopyFile { name: GLOBALS_SQL, reuse: Reuse::Never };
        let mut progress = |_| go_on(&agent);
        let mut delivered = None;
        target
            .deliver(Place::TopLevel, &[file], &source, &mut progress, &mut |_, done| {
                delivered = Some(done);
            })
            .map_err(moving)?;
        let delivered = delivered.expect("success reports every file");
        remove_delivered(&agent, &source, GLOBALS_SQL);
        target
            .keep_sums(
                GLOBALS_SQL,
                &[SumEntry { path: GLOBALS_SQL.into(), sha256: delivered.sha256 }],
            )
            .map_err(moving)
    });
    saved
        .await
        .unwrap_or_else(|err| Err(Failure::new(format!("saving globals.sql ended early: {err}"))))
}

/// Begins to dump and deliver `database`.
pub fn begin(agent: Arc<Agent>, database: String) -> Json<()> {
    let mut begins = false;
    agent.database(&database, |view| {
        if view.dump == Progress::Absent {
            (view.dump, view.transfer) = (Progress::Running, Progress::Running);
            begins = true;
        }
    });
    if begins {
        tokio::spawn(async move {
            let delivered = dump_and_deliver(&agent, &database).await;
            if delivered.is_err() {
                // What is no use any more must not take the next database's room; what stays goes with the session.
                let _ = tokio::fs::remove_dir_all(dump_output(&agent, &database)).await;
            }
            agent.database(&database, |view| match delivered {
                Ok(bytes) => {
                    (view.bytes_dumped, view.bytes_delivered) = (bytes, bytes);
                    (view.dump, view.transfer) = (Progress::Done(()), Progress::Done(bytes));
                }
                Err(failure) => {
                    view.transfer = Progress::Failed(failure.clone());
                    if view.dump == Progress::Running {
                        view.dump = Progress::Failed(failure);
                    }
                }
            });
        });
    }
    Json(())
}

/// Runs pg_dump and delivers what it saves; returns the bytes delivered.
async fn dump_and_deliver(agent: &Arc<Agent>, database: &str) -> Result<u64, Failure> {
    if let Some(bytes) = blocking(agent, database, delivered_before).await? {
        return Ok(bytes);
    }
    let (plan, oid) = dump_plan(agent, database).await?;
    let output = plan.output.clone();
    let finished = FinishedFiles::watch(&output).map_err(moving)?;
    let events = (agent.clone(), database.to_owned());
    let dump = Dump::start(&plan, move |event| tell(&events.0, &events.1, event));
    let mut dump = dump.map_err(|err| Failure::new(with_causes(&err)))?;
    let (ended, has_ended) = watch::channel(false);
    let (work, name, from) = (agent.clone(), database.to_owned(), output.clone());
    let mut mover = tokio::task::spawn_blocking(move || {
        copy_finished(&work, &name, &from, finished, &has_ended)
    });
    let mut gone = agent.gone.subscribe();
    let mut pace = Pace::default();
    let early = loop {
        tokio::select! {
            end = dump.wait() => break Ok(end),
            copied = &mut mover => break Err(copied),
            () = async { drop(gone.wait_for(|gone| *gone).await) } => {
                let _ = dump.stop().await; // dropping it ends it, too
                return Err(Failure::new("stopped"));
            }
            free = pace.look(&agent.dump_room) => {
                if let Some(told) = pace.keep(&agent.dump_room, free, &dump) {
                    agent.tell(format!("{database}: {told}"));
                }
            }
        }
    };
    let (end, copied) = match early {
        Ok(end) => {
            let _ = ended.send(true); // a mover that failed meanwhile tells so
            (end, mover.await)
        }
        Err(copied) => (dump.stop().await, copied), // the mover never ends before pg_dump unless it failed
    };
    let (finished, mut files) =
        copied.unwrap_or_else(|err| Err(Failure::new(format!("delivering ended early: {err}"))))?;
    refuse_bad_end(agent, &output, end)?;
    agent.database(database, |view| view.dump = Progress::Done(()));
    blocking(agent, database, move |agent, database| {
        let rest = finished.rest().map_err(moving)?;
        let mover = Mover::open(agent, database, &output)?;
        let delivering = agent.dump_room.delivering();
        mover.copy(&rest, &mut files)?;
        drop(delivering);
        let verified = verify(agent, oid)?;
        refuse_faults(agent, &[oid])?;
        mover.publish(&files, verified)?;
        if !agent.assignment.request.keep_dump {
            std::fs::remove_dir_all(&output)
                .map_err(|err| Failure::new(format!("remove `{}`: {err}", output.display())))?;
        }
        Ok(files.iter().map(|file| file.bytes).sum())
    })
    .await
}

/// Writes a file that must be new: pg_dump works in that directory, on input that may be hostile, and what it might have left under
/// this name is not followed.
fn save_new(path: &Path, text: &str) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Runs `work` where it may wait for disks.
async fn blocking<T: Send + 'static>(
    agent: &Arc<Agent>,
    database: &str,
    work: impl FnOnce(&Arc<Agent>, &str) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let (agent, database) = (agent.clone(), database.to_owned());
    let done = tokio::task::spawn_blocking(move || work(&agent, &database)).await;
    done.unwrap_or_else(|err| Err(Failure::new(format!("delivering ended early: {err}"))))
}

/// How to dump `database`, and its OID.
async fn dump_plan(agent: &Agent, database: &str) -> Result<(DumpPlan, u32), Failure> {
    let running = agent.running.lock().await;
    let running = running.as_ref().ok_or_else(|| Failure::new("the instance does not run"))?;
    let known = running
        .databases
        .get(database)
        .ok_or_else(|| Failure::new(format!("`{database}` is not among the selected databases")))?;
    let request = &agent.assignment.request;
    let plan = DumpPlan {
        binaries: running.binaries.clone(),
        endpoint: running.endpoint.clone(),
        database: database.to_owned(),
        output: dump_output(agent, database),
        jobs: request.jobs,
        compress: request.compress.clone(),
        encoding: Some(known.encoding.clone()),
        arguments: request.pg_dump_arguments.clone(),
        os_user: super::recovering::os_user_of(agent),
        lock_wait_timeout: LOCK_WAIT,
        marker: agent.assignment.place.marker.clone(),
        confinement: agent.confinement.clone(),
    };
    Ok((plan, known.oid))
}

/// Reads and verifies every file of the database whole, where that was asked for; returns what vouches for its files.
fn verify(agent: &Agent, oid: u32) -> Result<CoverageCount, Failure> {
    let mount = agent.mount()?;
    if agent.assignment.request.verify_source {
        let wrong = mount.verify(vec![oid])?;
        if let Some(first) = wrong.first() {
            let count = wrong.len();
            let what = if count == 1 { "file of the backup is" } else { "files of the backup are" };
            return Err(Failure::new(format!("{count} {what} damaged: {first}")).hint(
                "export from another backup, and have the repository checked by its own tool",
            ));
        }
    }
    let report = mount.report()?;
    let own = report.coverage.iter().find(|(database, _)| *database == oid);
    Ok(own.map(|(_, count)| *count).unwrap_or_default())
}

/// Where pg_dump saves `database`.
fn dump_output(agent: &Agent, database: &str) -> PathBuf {
    agent.assignment.place.dump_directory.join(file_name_for_database(database))
}

fn tell(agent: &Agent, database: &str, event: DumpEvent) {
    match event {
        DumpEvent::TableBegun { .. } => agent.database(database, |view| view.tables_done += 1),
        DumpEvent::Message { text } => agent.tell(format!("{database}: {text}")),
        DumpEvent::ItemFinished { .. } | DumpEvent::Note { .. } => {}
    }
}

/// Makes room once the target has verified a file. One that cannot be removed goes with the session.
fn remove_delivered(agent: &Agent, source: &Directory, name: &str) {
    if !agent.assignment.request.keep_dump
        && let Err(err) = source.remove_source_file(name)
    {
        eprintln!("{}", with_causes(&err));
    }
}

/// Copies finished files until pg_dump has ended.
fn copy_finished(
    agent: &Arc<Agent>,
    database: &str,
    output: &Path,
    mut finished: FinishedFiles,
    has_ended: &watch::Receiver<bool>,
) -> Result<(FinishedFiles, Vec<DeliveredFile>), Failure> {
    let mut files = Vec::new();
    let mut mover = None;
    let mut delivering = None;
    loop {
        let ended = *has_ended.borrow();
        let wait = !ended && delivering.is_none();
        let names = finished.next(if wait { LOOK } else { Duration::ZERO }).map_err(moving)?;
        if !names.is_empty() {
            delivering.get_or_insert_with(|| agent.dump_room.delivering());
            let mover = match &mover {
                Some(mover) => mover,
                None => mover.insert(Mover::open(agent, database, output)?),
            };
            mover.copy(&names, &mut files)?;
        } else if ended || *agent.gone.borrow() {
            return Ok((finished, files));
        } else {
            delivering = None;
        }
    }
}

/// Whether delivery goes on.
fn go_on(agent: &Agent) -> ControlFlow<()> {
    match *agent.gone.borrow() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// A file in the target.
struct DeliveredFile {
    name: String,
    bytes: u64,
    sha256: [u8; 32],
}

/// Copies one database's files into the target.
struct Mover<'a> {
    agent: &'a Arc<Agent>,
    database: &'a str,
    source: Directory,
    target: Arc<dyn Target>,
}

impl<'a> Mover<'a> {
    fn open(agent: &'a Arc<Agent>, database: &'a str, output: &Path) -> Result<Self, Failure> {
        Ok(Self { agent, database, source: open_source(output)?, target: target(agent)? })
    }

    fn copy(&self, names: &[String], files: &mut Vec<DeliveredFile>) -> Result<(), Failure> {
        // toc.dat holds the time of its dump: an earlier attempt's never fits.
        let reuse = |name: &str| if name == "toc.dat" { Reuse::Never } else { Reuse::IfEqual };
        let wanted: Vec<CopyFile> =
            names.iter().map(|name| CopyFile { name, reuse: reuse(name) }).collect();
        let mut progress = |_| go_on(self.agent);
        let mut done = |at: usize, file: pgthaw_mover::Delivered| {
            remove_delivered(self.agent, &self.source, &names[at]);
            files.push(DeliveredFile {
                name: names[at].clone(),
                bytes: file.bytes,
                sha256: file.sha256,
            });
            self.agent.database(self.database, |view| {
                view.bytes_delivered += file.bytes;
                view.bytes_dumped = view.bytes_dumped.max(view.bytes_delivered);
            });
        };
        let place = Place::Database(self.database);
        self.target.deliver(place, &wanted, &self.source, &mut progress, &mut done).map_err(moving)
    }

    /// Gives the database its name in the target; where an earlier export is replaced, that waits for the seal.
    fn publish(&self, files: &[DeliveredFile], verified: CoverageCount) -> Result<(), Failure> {
        let directory = file_name_for_database(self.database);
        let path = |file: &DeliveredFile| format!("{directory}/{}", file.name);
        let sums: Vec<_> =
            files.iter().map(|file| SumEntry { path: path(file), sha256: file.sha256 }).collect();
        let note = serde_json::to_string(&verified).expect("it is plain data");
        self.target.keep_note(&directory, &note).map_err(moving)?;
        self.target.keep_sums(&directory, &sums).map_err(moving)?;
        if self.agent.assignment.request.replace {
            return Ok(());
        }
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        self.target.publish_database(self.database, &names).map(drop).map_err(moving)
    }
}

/// Returns the bytes of `database` if an earlier attempt gave it its name and died before it could say so.
fn delivered_before(agent: &Arc<Agent>, database: &str) -> Result<Option<u64>, Failure> {
    match agent.assignment.request.replace {
        true => Ok(None), // nothing has its name before the seal
        false => target(agent)?.published_before(database).map_err(moving),
    }
}

/// Whatever pg_dump's exit code: a mount that could not answer a request makes what was dumped worthless, and so does a damaged
/// file of these databases (by OID) or of the shared catalogs, even if no read has met the damage.
pub fn refuse_faults(agent: &Agent, databases: &[u32]) -> Result<(), Failure> {
    let report = agent.mount()?.report()?;
    if let Some(failure) = agent.view.borrow().broken.clone() {
        return Err(failure);
    }
    if report.faults > 0 {
        let faults = report.faults;
        return Err(Failure::new(format!("the mount could not answer {faults} requests")));
    }
    let concerns =
        |damage: &&DamagedFile| damage.database == 0 || databases.contains(&damage.database);
    match report.damaged.iter().find(concerns) {
        None => Ok(()),
        Some(damage) => Err(Failure::new(&damage.message)
            .hint("export from another backup, and have the repository checked by its own tool")),
    }
}

fn refuse_bad_end(
    agent: &Agent,
    output: &Path,
    end: Result<pgthaw_postgres::dump::DumpEnd, DumpError>,
) -> Result<(), Failure> {
    let (reason, said, killed) = match end {
        Ok(end) if end.status.success() => return Ok(()),
        Ok(end) => {
            let killed = end.status.signal() == Some(libc::SIGKILL);
            (end.reason(), end.messages.join("\n"), killed)
        }
        Err(err) => (with_causes(&err), String::new(), false),
    };
    if let Some(failure) = agent.view.borrow().broken.clone() {
        return Err(failure); // pg_dump only met its consequence
    }
    // What PostgreSQL says of a page whose checksum is wrong (bufmgr.c, bufpage.c).
    if said.contains("invalid page in block") {
        return Err(Failure::new(reason).hint(
            "the backup holds a damaged page: let its own tool verify it, export from another backup, or leave the table's data out with --exclude-table-data",
        ));
    }
    let full = FULL.iter().find(|sign| said.contains(**sign) && !reason.contains(**sign));
    let reason = full.map_or(reason.clone(), |sign| format!("{reason}: {sign}"));
    let failure = dump_directory_failure(output.parent().unwrap_or(output), &reason);
    // What pg_dump says of a worker that somebody killed (parallel.c).
    let passes = killed || said.contains("a worker process died unexpectedly");
    Err(Failure { passes: passes && full.is_none(), ..failure })
}

/// What the system says of a full disk.
const FULL: [&str; 2] = ["No space left on device", "Disk quota exceeded"];

/// A failure while the dump was saved in `directory`, which may be full.
fn dump_directory_failure(directory: &Path, message: &str) -> Failure {
    if FULL.iter().any(|sign| message.contains(sign)) {
        return Failure::new(format!(
            "the dump's directory `{}` is full: {message}",
            directory.display()
        ))
        .hint("make room there and retry, or cancel and export again with another --dump-dir");
    }
    Failure::new(message)
}

fn open_source(directory: &Path) -> Result<Directory, Failure> {
    Directory::open_source(directory).map_err(moving)
}

/// A mover's error for people.
pub fn moving(err: MoveError) -> Failure {
    Failure {
        hint: err.hint().map(Into::into),
        at_target: err.is_target(),
        ..Failure::new(with_causes(&err))
    }
}
