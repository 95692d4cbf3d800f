//! The server: mount service and recovery service of one account, behind a Unix socket.
//!
//! The command line always talks to a server. If none runs for this account, it starts one, which ends itself a few seconds
//! after it has nothing left to do. Both services live in this one process: a crash takes both, and the next server
//! (`pgthaw` starts one at its next command) takes the sessions up from their journals and finds their agents still at work.

pub mod agent_link;
mod api;
mod bundle;
mod kept;
pub mod mount_service;
mod mover;
mod reads;
mod recovery_service;
pub mod sessions;
pub mod site;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::cli::client::private_state_directory;
use crate::http;

/// How long a server that was started by a command stays without anything to do.
const IDLE: Duration = Duration::from_secs(3);

/// How long a server that ends waits for those who still listen to it.
const FOLLOWERS: Duration = Duration::from_millis(300);

/// Name of the socket in the state directory.
pub const SOCKET: &str = "server.sock";

/// Runs a server; with `until_idle` it ends itself when it has nothing left to do.
pub fn run(until_idle: bool) -> ExitCode {
    let _ = rustix::thread::set_name(c"pgthaw");
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let served = private_state_directory().and_then(|state| {
        let Some(_lock) = lock(&state)? else {
            if until_idle {
                return Ok(()); // another command was faster
            }
            return Err(io::Error::other(format!(
                "a server of this account already runs on `{}`",
                state.display()
            )));
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(serve(&state, until_idle))
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("pgthaw: error: server: {err}");
            ExitCode::FAILURE
        }
    }
}

/// Makes this process the account's only server; returns nothing when there is one.
fn lock(state: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(state.join("server.lock"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

async fn serve(state: &Path, until_idle: bool) -> io::Result<()> {
    let service = recovery_service::RecoveryService::open(state)?;
    let activity = Arc::new(api::Activity::default());
    let listener = http::bind(&state.join(SOCKET))?;
    service.clone().take_up_sessions();
    let router = api::router(service.clone(), activity.clone());
    let end = async move {
        let mut idle = Duration::ZERO;
        let tick = Duration::from_millis(500);
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
        loop {
            let terminated = async {
                match &mut terminate {
                    Some(signal) => signal.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = tokio::time::sleep(tick) => {}
                _ = terminated => return, // the sessions' agents go on; the next server takes them up
                _ = tokio::signal::ctrl_c(), if !until_idle => return,
            }
            let busy = activity.busy() || service.has_active_sessions();
            idle = if busy { Duration::ZERO } else { idle + tick };
            if until_idle && idle >= IDLE {
                return;
            }
        }
    };
    let (ending, mut ends) = tokio::sync::watch::channel(false);
    let end = async move {
        end.await;
        let _ = ending.send(true);
    };
    // Whoever follows a session that is at work keeps his connection open: he finds the next server.
    let cut = async {
        let _ = ends.wait_for(|ends| *ends).await;
        tokio::time::sleep(FOLLOWERS).await;
    };
    tokio::select! {
        served = http::serve(listener, router, end) => served?,
        () = cut => {}
    }
    let _ = fs::remove_file(state.join(SOCKET));
    Ok(())
}
