//! `pgthaw attach --stdio`: this machine's end of a line that another machine's server has opened through ssh.
//!
//! It says who it is, hears what the connection is for, and serves it until it ends:
//!
//! | purpose | file | what happens |
//! |---------|------|---------------|
//! | calls   | [`calls`] | HTTP/2: what [`crate::server::site`] asks of this machine; requests for a session's agent are passed on |
//! | receive | here | the receiving half of a data mover works in the target directory |
//! | socket  | [`handing`] | the connection itself is handed to whoever listens on a socket of the session |
//! | offer   | [`handing`] | the connection itself is handed to the server here, which may use it to reach the near side |
//! | meet    | here | a data mover's half tries whether it can connect to the other one |
//!
//! Nothing of a session depends on this process: agents are detached from it.

mod calls;
pub mod handing;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use pgthaw_link::{
    GreetingError, PROTOCOL, Purpose, Welcome, own_build, remove_if_unused, serve_calls,
    welcome_and_greet,
};
use pgthaw_mover::{Heartbeat, Met, MoveError, TargetDirectory, meet, receive};
use tokio::net::unix::pipe;

use crate::agent::delivering::{self, NotOpened};
use crate::offers;
use handing::hand_over;

/// What a restricted connection may be used for (`--only`, in `authorized_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Only {
    /// Mounting, starting and dumping.
    Staging,
    /// Receiving exports.
    Target,
    /// Asking the server of this machine.
    Server,
}

impl Only {
    fn name(self) -> &'static str {
        match self {
            Self::Staging => "staging",
            Self::Target => "target",
            Self::Server => "server",
        }
    }
}

/// What a connection may be used for: everything, or one role, and as a target one directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restriction {
    /// The role.
    pub only: Option<Only>,
    /// The directory at or below which exports are received, and nothing else is looked at, made or removed.
    pub directory: Option<PathBuf>,
}

impl Restriction {
    /// What `--only ROLE [DIR]` says.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(words: &[String]) -> Result<Self, String> {
        let (role, directory) = match words {
            [] => return Ok(Self::default()),
            [role] => (role, None),
            [role, directory, ..] => (role, Some(PathBuf::from(directory))),
        };
        let only = <Only as clap::ValueEnum>::from_str(role, false)
            .map_err(|_| format!("--only: `{role}` is none of staging, target and server"))?;
        if let Some(directory) = &directory {
            if only != Only::Target {
                return Err("--only: a directory is for the role target".into());
            }
            if !is_plain_path(directory) {
                return Err(format!("--only: `{}` is no whole path", directory.display()));
            }
        }
        Ok(Self { only: Some(only), directory })
    }

    /// Nothing but receiving the export of `target`.
    pub fn to_target(target: &Path) -> Self {
        Self { only: Some(Only::Target), directory: Some(target.into()) }
    }

    /// Whether exports may be received in `directory`.
    fn allows_directory(&self, directory: &Path) -> bool {
        let Some(top) = &self.directory else { return true };
        is_plain_path(directory) && directory.starts_with(top)
    }
}

/// Whether a path is absolute and leads only downwards.
fn is_plain_path(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != Component::ParentDir)
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
pub fn run(restriction: Restriction) -> ExitCode {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let served = runtime.map(|runtime| {
        let served = runtime.block_on(async {
            let (input, output) = standard_streams()?;
            serve(restriction, input, output, || {}).await
        });
        runtime.shutdown_background();
        served
    });
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

/// Serves one connection until it ends; calls `greeted` once the near side has said what it wants.
///
/// # Errors
/// What broke the connection, or that it may not be used for what was asked.
pub async fn serve(
    restriction: Restriction,
    mut input: pipe::Receiver,
    mut output: pipe::Sender,
    greeted: impl FnOnce(),
) -> Result<(), GreetingError> {
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
        only: restriction.only.map(|only| only.name().to_owned()),
        address: std::env::var("SSH_CONNECTION").ok().and_then(|ends| own_address(&ends)),
    };
    // Unbuffered: whoever gets the connection after the greetings must get every byte of it.
    let greeting = welcome_and_greet(&mut input, &mut output, &welcome).await?;
    greeted();
    match greeting.purpose {
        Purpose::Calls => {
            serve_calls(input, output, calls::router(&restriction)).await?;
            Ok(())
        }
        purpose if !allowed(&restriction, &purpose) => refused(),
        Purpose::Socket(path) => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            on_a_thread(move || hand_over(&path, "", input, output)).await
        }
        Purpose::Offer(caller) => {
            let socket =
                calls::server_socket().await.map_err(|err| io::Error::other(err.message))?;
            let socket = socket.with_file_name(offers::SOCKET);
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            on_a_thread(move || hand_over(&socket, &caller, input, output)).await
        }
        Purpose::Receive { session, directory, replace } => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            on_a_thread(move || receive_export(&session, &directory, replace, input, output)).await
        }
        Purpose::Meet => {
            let (input, output) = (input.into_blocking_fd()?, output.into_blocking_fd()?);
            on_a_thread(move || meet(input.into(), output.into(), || {}).map(drop)).await
        }
    }
}

/// Whether a connection restricted to `only` may be used for this; calls are restricted one by one.
fn allowed(restriction: &Restriction, purpose: &Purpose) -> bool {
    match (restriction.only, purpose) {
        (None, _) | (_, Purpose::Calls) => true,
        (Some(Only::Staging), Purpose::Socket(_)) => true,
        (Some(Only::Target), Purpose::Receive { directory, .. }) => {
            restriction.allows_directory(directory)
        }
        (Some(Only::Staging | Only::Target), Purpose::Meet) => true,
        (Some(Only::Server), Purpose::Offer(_)) => true,
        (Some(_), _) => false,
    }
}

/// Does what blocks on a thread that nobody has to wait for when this process ends.
async fn on_a_thread(
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), GreetingError> {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || done.send(work()));
    result.await.map_err(io::Error::other)??;
    Ok(())
}

/// This machine's address in `SSH_CONNECTION`, which sshd sets: client's address and port, server's address and port.
fn own_address(ends: &str) -> Option<IpAddr> {
    ends.split(' ').nth(2)?.parse().ok()
}

/// Runs the receiving half of a data mover: it keeps nothing in memory that matters, and ends with its connection.
fn receive_export(
    session: &str,
    directory: &Path,
    replace: bool,
    input: OwnedFd,
    output: OwnedFd,
) -> io::Result<()> {
    let Met { connection, line } = meet(File::from(input), File::from(output), || {})?;
    if let Some(line) = line {
        connection.end_with(line); // whoever undoes the export must not wait for a staging server that is away
    }
    let opened = open_target(directory, session, replace);
    let target = match opened {
        Ok(ref target) => Ok(target),
        Err(err) => Err(err),
    };
    receive(target, connection, Heartbeat::default()).map_err(io::Error::other)
}

/// Opens the target. The class of an error is kept: a lock that the receiver of a broken connection still holds is waited for.
fn open_target(
    directory: &Path,
    session: &str,
    replace: bool,
) -> Result<TargetDirectory, MoveError> {
    delivering::open(directory, session, replace).map_err(|err| match err {
        NotOpened::Moving(err) => err,
        NotOpened::Taken(failure) => MoveError::Refused { reason: failure.to_string() },
    })
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
    fn a_lock_that_is_held_is_told_from_a_target_that_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("export");
        let first = open_target(&path, "s", false).unwrap();
        let again = open_target(&path, "s", false);
        assert!(matches!(again, Err(MoveError::InUse { .. })), "it is waited for: {again:?}");
        drop(first);
        open_target(&path, "s", false).unwrap();
        std::fs::write(path.join("strange"), "").unwrap();
        let taken = open_target(&path, "s", false);
        assert!(matches!(taken, Err(MoveError::Refused { .. })), "{taken:?}");
    }

    #[test]
    fn a_connection_may_be_kept_to_one_directory() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let kept = Restriction::parse(&words("target /srv/exports")).unwrap();
        let receive = |directory: &str| {
            let directory = PathBuf::from(directory);
            allowed(&kept, &Purpose::Receive { session: "s".into(), directory, replace: false })
        };
        assert!(receive("/srv/exports") && receive("/srv/exports/monday/"));
        for other in ["/srv", "/srv/exports2", "/srv/exports/../x", "srv/exports", "/etc"] {
            assert!(!receive(other), "{other}");
        }
        assert!(!allowed(&kept, &Purpose::Socket("/x".into())));
        for bad in ["target x", "staging /srv", "targets", "target /srv/../etc"] {
            assert!(Restriction::parse(&words(bad)).is_err(), "{bad}");
        }
    }

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
