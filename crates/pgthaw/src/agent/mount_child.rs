//! The agent's line to the child that serves the mount.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child as Process, ChildStdin, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use pgthaw_session::observed::Failure;
use serde::Serialize;

use crate::internal::mount::{MountCommand, MountEvent, MountReport, MountTask};
use crate::internal::wal::WalTablespaces;
use crate::internal::{self, Child};
use crate::processes::MARKER_VARIABLE;

/// How long a mount may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a report, or a change of the tree, may take.
const REPORT_LIMIT: Duration = Duration::from_secs(60);

/// What a mount tells by itself.
#[derive(Debug)]
pub enum Told {
    /// Something that ends the attempt.
    Broken(Failure),
    /// Reads wait for the repository, and why; nothing once they do not.
    Waiting(Option<String>),
}

/// A running mount.
pub struct MountChild {
    process: Mutex<Process>,
    input: Mutex<ChildStdin>,
    answers: Mutex<mpsc::Receiver<MountEvent>>,
}

impl MountChild {
    /// Starts the child as user `ids` (when we are root), hands it the mounted `device` and the `map`, and waits until it
    /// answers. `tell` is called with every fault, with every change of the link to the repository, and when the child ends by itself.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(
        mut task: MountTask,
        device: OwnedFd,
        map: &[u8],
        ids: (u32, u32),
        marker: &str,
        log: &Path,
        tell: impl Fn(Told) + Send + 'static,
    ) -> Result<Self, Failure> {
        let failed = |err: io::Error| Failure::new(format!("start the mount's process: {err}"));
        let mut command = internal::command(Child::Mount);
        internal::run_as_ids(&mut command, ids.0, ids.1);
        let number = device.as_raw_fd();
        // SAFETY: one system call on a number; the descriptor stays open in this process until the child has started.
        unsafe {
            command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let log_file =
            std::fs::OpenOptions::new().create(true).append(true).open(log).map_err(failed)?;
        command
            .env(MARKER_VARIABLE, marker)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file);
        let mut process = command.spawn().map_err(failed)?;
        drop(device);
        let mut input = process.stdin.take().expect("piped");
        let output = process.stdout.take().expect("piped");
        (task.device, task.map_bytes) = (number, map.len() as u64);
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                match line.ok().and_then(|line| serde_json::from_str(&line).ok()) {
                    Some(MountEvent::Fault { message, hint }) => {
                        tell(Told::Broken(Failure { hint, ..Failure::new(message) }));
                    }
                    Some(MountEvent::Reachable { waiting }) => tell(Told::Waiting(waiting)),
                    Some(event) => drop(sender.send(event)), // nobody waits for it any more
                    None => break,
                }
            }
            tell(Told::Broken(
                Failure::new("the process that serves the mount has ended").passing(),
            ));
        });
        let told = send(&mut input, &task).and_then(|()| input.write_all(map));
        let child = Self {
            process: Mutex::new(process),
            input: Mutex::new(input),
            answers: Mutex::new(answers),
        };
        match (told, lock(&child.answers).recv_timeout(START_LIMIT)) {
            (Ok(()), Ok(MountEvent::Ready)) => {}
            _ => {
                child.kill();
                let said = std::fs::read_to_string(log).unwrap_or_default();
                return Err(Failure::new(format!("the mount did not start: {}", said.trim())));
            }
        }
        Ok(child)
    }

    /// What the mount has read so far.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn report(&self) -> Result<MountReport, Failure> {
        match self.ask(&MountCommand::Report, Some(REPORT_LIMIT))? {
            MountEvent::Report(report) => Ok(report),
            other => Err(Failure::new(format!("the mount answered {other:?}"))),
        }
    }

    /// Reads and verifies every file of `databases` whole; returns what is wrong.
    ///
    /// # Errors
    /// When the mount ends meanwhile.
    pub fn verify(&self, databases: Vec<u32>) -> Result<Vec<String>, Failure> {
        match self.ask(&MountCommand::Verify { databases }, None)? {
            MountEvent::Verified { wrong } => Ok(wrong),
            other => Err(Failure::new(format!("the mount answered {other:?}"))),
        }
    }

    /// Looks through the WAL that replay will read, up to the record that begins at `until` or to its end, for tablespaces.
    ///
    /// # Errors
    /// When the WAL cannot be read or makes no sense, or the mount ends meanwhile.
    pub fn tablespaces(&self, until: Option<String>) -> Result<WalTablespaces, Failure> {
        match self.ask(&MountCommand::Tablespaces { until }, None)? {
            MountEvent::Tablespaces { found } => {
                found.map_err(|err| Failure::new(format!("read the backup's WAL: {err}")))
            }
            other => Err(Failure::new(format!("the mount answered {other:?}"))),
        }
    }

    /// Looks for WAL after the record that begins at `after`; returns the first valid page of it.
    ///
    /// # Errors
    /// When the WAL cannot be read, or the mount ends meanwhile.
    pub fn later_wal(&self, after: &str) -> Result<Option<String>, Failure> {
        match self.ask(&MountCommand::LaterWal { after: after.into() }, None)? {
            MountEvent::LaterWal { page } => {
                page.map_err(|err| Failure::new(format!("read the backup's WAL: {err}")))
            }
            other => Err(Failure::new(format!("the mount answered {other:?}"))),
        }
    }

    /// Makes `directories` in the mount (such as `tablespaces/16385`, with those above), and allows links to tablespaces beside
    /// those of the map: for each OID where `pg_tblspc/OID` may lead. May be called again while the mount is in use.
    ///
    /// # Errors
    /// When a directory cannot be made, or the mount does not answer.
    pub fn provide(
        &self,
        directories: Vec<String>,
        links: Vec<(u32, Vec<u8>)>,
    ) -> Result<(), Failure> {
        match self.ask(&MountCommand::Provide { directories, links }, Some(REPORT_LIMIT))? {
            MountEvent::Provided { error: None } => Ok(()),
            MountEvent::Provided { error: Some(error) } => {
                Err(Failure::new(format!("prepare the mount for tablespaces: {error}")))
            }
            other => Err(Failure::new(format!("the mount answered {other:?}"))),
        }
    }

    /// Ends the child at once; the kernel then fails every request that still waits.
    pub fn kill(&self) {
        let mut process = lock(&self.process);
        let _ = process.kill(); // an error only means that it has ended
        let _ = process.wait();
    }

    fn ask(&self, command: &MountCommand, limit: Option<Duration>) -> Result<MountEvent, Failure> {
        let answers = lock(&self.answers);
        let gone = || Failure::new("the process that serves the mount has ended").passing();
        send(&mut lock(&self.input), command).map_err(|_| gone())?;
        match limit {
            Some(limit) => {
                answers.recv_timeout(limit).map_err(|_| Failure::new("the mount does not answer"))
            }
            None => answers.recv().map_err(|_| gone()),
        }
    }
}

fn send(input: &mut ChildStdin, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    input.write_all(&line)?;
    input.flush()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
