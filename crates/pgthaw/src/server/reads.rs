//! Reads of the repository by another machine's mount: a connection for them alone, kept up for as long as the session needs it.
//!
//! ```text
//! repository ── internal reads ── ssh ── sshd ── (handed over by pgthaw attach) ── mount
//!                             └────────── or directly, TLS ───────────────────────┘
//! ```
//! The child that reads runs as the repository's owner and holds the numbered objects of this one backup; nothing else can be
//! asked of it. Its pipes are ssh's own, so no byte passes through the server. Over them it asks the mount to listen, and
//! connects to it where a firewall lets it. Either connection ends with ssh's: then reads wait over there, and this makes the next one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use pgthaw_link::{OpenLine, Purpose};
use pgthaw_mover::{ListenAt, lead};
use pgthaw_session::TakenWay;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::watch;

use super::kept::{Connected, Kept};
use super::site::Site;
use crate::internal::reads::{self, ReadsTask};
use crate::internal::{self, Child};
use crate::machine::Machine;
use crate::wire::CheckReport;

/// What is read, and by whom.
#[derive(Debug, Clone)]
pub struct ReadObjects {
    /// The machine whose mount reads.
    pub machine: Arc<Machine>,
    /// The socket on which it takes connections there.
    pub socket: PathBuf,
    /// The file that lists the objects it may read.
    pub objects: PathBuf,
    /// As whom they are read here, when we are root: user id, group id.
    pub owner: (u32, u32),
    /// The ports over there that may be used for a direct connection; none: never directly.
    pub ports: Option<(u16, u16)>,
}

/// The kept connection of a mount with the objects it reads.
#[derive(Debug)]
pub struct Reads {
    /// Whether there is one now.
    pub kept: Kept,
    way: watch::Receiver<Option<TakenWay>>,
}

impl Reads {
    /// Keeps the mount connected with the objects.
    pub fn keep(objects: ReadObjects) -> Self {
        let (tell, way) = watch::channel(None);
        let kept = Kept::keep(move |connected| {
            let (objects, tell) = (objects.clone(), tell.clone());
            async move { connect(&objects, &connected, &tell).await }
        });
        Self { kept, way }
    }

    /// The way that was taken last.
    pub fn way(&self) -> Option<TakenWay> {
        self.way.borrow().clone()
    }
}

/// Makes one connection and returns why it ended.
async fn connect(
    objects: &ReadObjects,
    connected: &Connected,
    tell: &watch::Sender<Option<TakenWay>>,
) -> String {
    let ReadObjects { machine, socket, objects, owner, ports } = objects;
    let mut line = match machine.open(&Purpose::Socket(socket.into())).await {
        Ok(line) => line,
        Err(err) => return err.to_string(),
    };
    let task =
        ReadsTask { machine: machine.name().to_owned(), listen_at: listen_at(&line, *ports) };
    let pipes = (line.output.into_owned_fd(), line.input.into_owned_fd());
    let started = match (pipes, File::open(objects)) {
        ((Ok(input), Ok(output)), Ok(objects)) => {
            start_reader(&task, input, output, &objects, *owner)
        }
        ((Err(err), _) | (_, Err(err)), _) | (_, Err(err)) => Err(err),
    };
    let mut reader = match started {
        Ok(reader) => reader,
        Err(err) => return format!("start the repository's reader: {err}"),
    };
    let said = reader.stderr.take().map(BufReader::new);
    let listening = async {
        let mut lines = said?.lines();
        while let Some(line) = lines.next_line().await.ok()? {
            match serde_json::from_str(&line) {
                Ok(way) => {
                    tell.send_replace(Some(way));
                    connected.yes();
                }
                Err(_) => eprintln!("{line}"),
            }
        }
        Some(())
    };
    tokio::select! {
        () = line.carrier.wait() => {}
        _ = listening => {} // the reader has ended
    }
    format!("the connection to {} is lost", machine.name())
}

/// Finds out which way `staging` would read, where it is another machine.
pub async fn try_out(staging: &Site, ports: Option<(u16, u16)>, report: &mut CheckReport) {
    let Some(machine) = staging.machine() else { return };
    let found = async {
        let line = machine.open(&Purpose::Meet).await.map_err(|err| err.to_string())?;
        let listen_at = listen_at(&line, ports);
        let pipes = (line.output.into_owned_fd(), line.input.into_owned_fd());
        let (Ok(input), Ok(output)) = pipes else { return Err("no descriptors left".to_owned()) };
        let led = move || lead(input.into(), output.into(), listen_at, || {}).map(|(_, port)| port);
        let led = tokio::task::spawn_blocking(led).await.map_err(|err| err.to_string())?;
        led.map_err(|err| err.to_string())
    };
    let passed = |way: TakenWay| format!("the repository will be read {}", way.text);
    match found.await {
        Ok(port) if port.is_ok() || ports.is_none() => {
            report.passed.push(passed(reads::taken(machine.name(), port)));
        }
        Ok(port) => {
            let (first, last) = ports.unwrap_or_default();
            let remedy = format!(
                "to spare both machines work, let this machine connect to ports {first} to {last} of {}",
                machine.name()
            );
            report.warning(passed(reads::taken(machine.name(), port)), Some(remedy));
        }
        Err(why) => report.warning(
            format!("whether {} can read directly is not known: {why}", machine.name()),
            None,
        ),
    }
}

/// Where the mount may listen for a direct connection, or why it may not.
fn listen_at(line: &OpenLine, ports: Option<(u16, u16)>) -> Result<ListenAt, String> {
    let ports = ports.ok_or("direct connections are switched off")?;
    let address = line.welcome.address.ok_or("ssh does not tell its address")?;
    Ok(ListenAt { address, ports })
}

fn start_reader(
    task: &ReadsTask,
    input: OwnedFd,
    output: OwnedFd,
    objects: &File,
    owner: (u32, u32),
) -> io::Result<tokio::process::Child> {
    let mut command = internal::command(Child::Reads);
    command.arg(serde_json::to_string(task)?);
    internal::run_as_ids(&mut command, owner.0, owner.1);
    let number = objects.as_raw_fd();
    // SAFETY: system calls on numbers; the file stays open in this process until the child has started.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            match libc::dup2(number, reads::OBJECTS) {
                -1 => Err(io::Error::last_os_error()),
                same if same == number => {
                    libc::fcntl(same, libc::F_SETFD, 0); // the same number keeps its flag
                    Ok(())
                }
                _ => Ok(()),
            }
        });
    }
    command.stdin(Stdio::from(input)).stdout(Stdio::from(output)).stderr(Stdio::piped());
    tokio::process::Command::from(command).kill_on_drop(true).spawn()
}
