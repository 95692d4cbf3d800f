//! Reads of the repository by another machine's mount: a connection for them alone, kept up for as long as the session needs it.
//!
//! ```text
//! repository ── internal reads ── ssh ── sshd ── (handed over by pgthaw attach) ── mount
//! ```
//! The child that reads runs as the repository's owner and holds the numbered objects of this one backup; nothing else can be
//! asked of it. Its pipes are ssh's own, so no byte passes through the server. When the connection breaks, reads wait over there, and
//! this makes the next one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use pgthaw_link::Purpose;

use super::kept::{Connected, Kept};
use crate::internal::{self, Child};
use crate::machine::Machine;

/// Keeps `machine`'s mount, which listens on `socket` there, connected with the objects that the file `objects` lists. They are read as
/// `owner` when we are root.
pub fn keep(machine: Arc<Machine>, socket: PathBuf, objects: PathBuf, owner: (u32, u32)) -> Kept {
    Kept::keep(move |connected| {
        let (machine, socket, objects) = (machine.clone(), socket.clone(), objects.clone());
        async move { connect(&machine, &socket, &objects, owner, &connected).await }
    })
}

/// Makes one connection and returns why it ended.
async fn connect(
    machine: &Machine,
    socket: &Path,
    objects: &Path,
    owner: (u32, u32),
    connected: &Connected,
) -> String {
    let mut line = match machine.open(&Purpose::Socket(socket.into())).await {
        Ok(line) => line,
        Err(err) => return err.to_string(),
    };
    let pipes = (line.output.into_owned_fd(), line.input.into_owned_fd());
    let started = match (pipes, File::open(objects)) {
        ((Ok(input), Ok(output)), Ok(objects)) => start_reader(input, output, &objects, owner),
        ((Err(err), _) | (_, Err(err)), _) | (_, Err(err)) => Err(err),
    };
    let mut reader = match started {
        Ok(reader) => reader,
        Err(err) => return format!("start the repository's reader: {err}"),
    };
    connected.yes();
    tokio::select! {
        () = line.carrier.wait() => {}
        _ = reader.wait() => {}
    }
    format!("the connection to {} is lost", machine.name())
}

fn start_reader(
    input: OwnedFd,
    output: OwnedFd,
    objects: &File,
    owner: (u32, u32),
) -> io::Result<tokio::process::Child> {
    let mut command = internal::command(Child::Reads);
    internal::run_as_ids(&mut command, owner.0, owner.1);
    let number = objects.as_raw_fd();
    // SAFETY: system calls on numbers; the file stays open in this process until the child has started.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            match libc::dup2(number, internal::reads::OBJECTS) {
                -1 => Err(io::Error::last_os_error()),
                same if same == number => {
                    libc::fcntl(same, libc::F_SETFD, 0); // the same number keeps its flag
                    Ok(())
                }
                _ => Ok(()),
            }
        });
    }
    command.stdin(Stdio::from(input)).stdout(Stdio::from(output)).stderr(Stdio::inherit());
    tokio::process::Command::from(command).kill_on_drop(true).spawn()
}
