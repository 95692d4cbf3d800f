//! `pgthaw attach --stdio`: this machine's end of a line that another machine's server has opened through ssh.
//!
//! It says who it is, hears what the connection is for, and serves it until it ends:
//!
//! | purpose | file | what happens |
//! |---------|------|---------------|
//! | calls   | [`calls`] | HTTP/2: what [`crate::server::site`] asks of this machine; requests for a session's agent are passed on |
//! | receive | here | the receiving half of a data mover works in the target directory |
//! | socket  | [`handing`] | the connection itself is handed to whoever listens on a socket of the session |
//! | meet    | here | a data mover's half tries whether it can connect to the other one |
//!
//! Nothing of a session depends on this process: agents are detached from it.

mod calls;
pub mod handing;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;

use pgthaw_link::{
    GreetingError, PROTOCOL, Purpose, Welcome, own_build, remove_if_unused, serve_calls,
    welcome_and_greet,
};
use pgthaw_mover::{Heartbeat, Met, MoveError, meet, receive};
use tokio::net::unix::pipe;

use crate::agent::delivering;
use handing::hand_over;

/// What a restricted connection may be used for (`--only`, in `authorized_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Only {
    /// Mounting, starting and dumping.
    Staging,
    /// Receiving exports.
    Target,
}

impl Only {
    fn name(self) -> &'static str {
        match self {
            Self::Staging => "staging",
            Self::Target => "target",
        }
    }
}

/// Prints the hash of this program: whether it is the same build is what the other machine wants to know.
pub fn print_build() -> ExitCode {
    match own_build() {
        Ok(build) => {
            println!("{build}");
            ExitCode::SUCCESS
        }
        Err(err) => failed(&err),
    }
}

/// Serves the connection on standard input and output.
pub fn run(only: Option<Only>) -> ExitCode {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let served = runtime.map(|runtime| runtime.block_on(serve(only)));
    remove_if_unused();
    match served {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(err)) => failed(&err),
        Err(err) => failed(&err),
    }
}

fn failed(err: &dyn std::error::Error) -> ExitCode {
    eprintln!("pgthaw attach: {err}");
    ExitCode::FAILURE
}

async fn serve(only: Option<Only>) -> Result<(), GreetingError> {
    let system = rustix::system::uname();
    let uid = rustix::process::geteuid().as_raw();
    let user = pgthaw_postgres::os_user::OsUser::look_up(&uid.to_string());
    let welcome = Welcome {
        pgthaw: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        build: own_build()?,
        host: system.nodename().to_string_lossy().into_owned(),
        home: user.as_ref().map_or_else(|_| "/".into(), |user| user.home.clone()),
        user: user.map_or_else(|_| uid.to_string(), |user| user.name),
        uid,
        only: only.map(|only| only.name().to_owned()),
        address: std::env::var("SSH_CONNECTION").ok().and_then(|ends| own_address(&ends)),
    };
    // Unbuffered: whoever gets the connection after the greetings must get every byte of it.
    let (mut input, mut output) = standard_streams()?;
    let greeting = welcome_and_greet(&mut input, &mut output, &welcome).await?;
    match greeting.purpose {
        Purpose::Calls => {
            serve_calls(input, output, calls::router(only)).await?;
            Ok(())
        }
        Purpose::Socket(_) if only == Some(Only::Target) => refused(),
        Purpose::Receive { .. } if only == Some(Only::Staging) => refused(),
        Purpose::Socket(path) => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            let handed = tokio::task::spawn_blocking(move || hand_over(&path, input, output)).await;
            handed.map_err(io::Error::other)??;
            Ok(())
        }
        Purpose::Receive { session, directory, replace } => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            let received = tokio::task::spawn_blocking(move || {
                receive_export(&session, &directory, replace, input, output)
            });
            received.await.map_err(io::Error::other)??;
            Ok(())
        }
        Purpose::Meet => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            let met = tokio::task::spawn_blocking(move || meet(input.into(), output.into(), || {}));
            met.await.map_err(io::Error::other)??;
            Ok(())
        }
    }
}

/// This machine's address in `SSH_CONNECTION`, which sshd sets: client's address and port, server's address and port.
fn own_address(ends: &str) -> Option<IpAddr> {
    ends.split(' ').nth(2)?.parse().ok()
}

/// Runs the receiving half of a data mover: it keeps nothing in memory that matters, and ends with its connection.
fn receive_export(
    session: &str,
    directory: &std::path::Path,
    replace: bool,
    input: OwnedFd,
    output: OwnedFd,
) -> io::Result<()> {
    let Met { connection, line } = meet(File::from(input), File::from(output), || {})?;
    if let Some(line) = line {
        connection.end_with(line); // whoever undoes the export must not wait for a staging server that is away
    }
    let opened = delivering::open(directory, session, replace);
    let target = match &opened {
        Ok(target) => Ok(target),
        Err(failure) => Err(MoveError::Refused { reason: failure.to_string() }),
    };
    receive(target, connection, Heartbeat::default()).map_err(io::Error::other)
}

fn refused() -> Result<(), GreetingError> {
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "this connection may not be used for that")
        .into())
}

/// Takes standard input and output over, so that no child gets them. They are pipes or sockets: sshd uses either.
fn standard_streams() -> io::Result<(pipe::Receiver, pipe::Sender)> {
    let nothing = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    let take = |number: i32| -> io::Result<OwnedFd> {
        // SAFETY: the descriptors 0 and 1 are open for as long as this process lives.
        let stream = unsafe { BorrowedFd::borrow_raw(number) };
        let taken = rustix::io::fcntl_dupfd_cloexec(stream, 3)?;
        rustix::io::ioctl_fionbio(&taken, true)?;
        Ok(taken)
    };
    let (input, output) = (take(0)?, take(1)?);
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    let input = pipe::Receiver::from_owned_fd_unchecked(input)?;
    Ok((input, pipe::Sender::from_owned_fd_unchecked(output)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sshd_tells_at_which_address_it_was_reached() {
        let cases = [
            ("10.77.0.1 50514 10.77.0.2 22", Some("10.77.0.2")),
            ("2001:db8::1 50514 2001:db8::2 22", Some("2001:db8::2")),
            ("fe80::1%eth0 50514 fe80::2%eth0 22", None),
            ("UNKNOWN 65535 UNKNOWN 65535", None),
            ("", None),
        ];
        for (ends, want) in cases {
            assert_eq!(own_address(ends), want.map(|address| address.parse().unwrap()), "{ends}");
        }
    }
}
