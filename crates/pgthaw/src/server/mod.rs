//! The server: mount service and recovery service of one account or of a team, behind a Unix socket.
//!
//! The command line always talks to a server. If none runs for this account, it starts one, which ends itself a few seconds
//! after it has nothing left to do. Both services live in this one process: a crash takes both, and the next server
//! (`pgthaw` starts one at its next command) takes the sessions up from their journals and finds their agents still at work.

pub mod agent_link;
mod api;
mod audit;
mod bundle;
pub mod callers;
mod kept;
mod log_lines;
pub mod mount_service;
mod mover;
mod reads;
mod recovery_service;
mod refusals;
mod session_worker;
pub mod sessions;
pub mod site;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;

use self::audit::Audit;
use self::callers::Callers;
use crate::admission::{Admission, Turns, raise_descriptor_limit};
use crate::cli::client::private_state_directory;
use crate::configuration::Configuration;
use crate::machine::Machines;
use crate::{http, offers};

/// How long a server that was started by a command stays without anything to do.
const IDLE: Duration = Duration::from_secs(3);

/// How long a server that ends waits for those who still listen to it.
const FOLLOWERS: Duration = Duration::from_millis(300);

/// Name of the socket in the state directory.
pub const SOCKET: &str = "server.sock";

/// Where a team's server listens unless it is told otherwise.
pub const TEAM_SOCKET: &str = "/run/pgthaw/server.sock";

/// Runs a server; with `until_idle` it is this account's alone, and ends itself when it has nothing left to do.
pub fn run(until_idle: bool, config: Option<&Path>) -> ExitCode {
    let _ = rustix::thread::set_name(c"pgthaw");
    raise_descriptor_limit();
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
        let configuration =
            Configuration::read(config).map_err(|err| io::Error::other(err.message))?;
        runtime.block_on(serve(&state, until_idle, configuration))
    });
    pgthaw_link::remove_if_unused();
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

/// Where a server that stays listens for others; nowhere when it is an ordinary account's own.
fn team_socket(configuration: &Configuration) -> Option<PathBuf> {
    let configured = configuration.service.socket.clone();
    // systemd's RuntimeDirectory=, see systemd.exec(5).
    let runtime = || Some(PathBuf::from(std::env::var_os("RUNTIME_DIRECTORY")?).join(SOCKET));
    let root = || rustix::process::geteuid().is_root().then(|| TEAM_SOCKET.into());
    configured.or_else(runtime).or_else(root)
}

/// Makes the directory of the team's socket, and those above it, where they are missing: everybody may pass, whatever the umask
/// says. One that is there is left as it is.
///
/// # Errors
/// What cannot be made, or a directory in which another account could put its own socket in the place of ours.
fn provide_socket_directory(directory: &Path) -> io::Result<()> {
    let mut missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.exists()).collect();
    while let Some(path) = missing.pop() {
        fs::create_dir(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    match pgthaw_mover::Trust::look(directory).map_err(io::Error::other)?.objection {
        Some((path, why)) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("`{}` {why}, who could exchange the socket", path.display()),
        )),
        None => Ok(()),
    }
}

async fn serve(state: &Path, until_idle: bool, configuration: Configuration) -> io::Result<()> {
    let configuration = Arc::new(configuration);
    let team = (!until_idle).then(|| team_socket(&configuration)).flatten();
    let audit = team.is_some().then(|| Audit::open(state)).transpose()?;
    let machines = Machines::new(configuration.carry(), &state.join("ssh-agents"))?;
    let service = recovery_service::RecoveryService::open(state, machines, audit)?;
    let activity = Arc::new(api::Activity::default());
    let callers = Arc::new(Callers::new(configuration.clone()));
    let own = (state.join(SOCKET), false);
    let sockets: Vec<(PathBuf, bool)> =
        [own].into_iter().chain(team.map(|socket| (socket, true))).collect();
    let mut listeners = Vec::new();
    for (path, team) in &sockets {
        let named =
            |err: io::Error| io::Error::new(err.kind(), format!("`{}`: {err}", path.display()));
        let bind = if *team { http::bind_for_everybody } else { http::bind };
        if let (true, Some(directory)) = (*team, path.parent()) {
            provide_socket_directory(directory).map_err(named)?;
            println!("pgthaw serve: listening on {}", path.display());
        }
        let offers = bind(&path.with_file_name(offers::SOCKET)).map_err(named)?;
        service.machines().offers().listen(offers);
        listeners.push((bind(path).map_err(named)?, *team));
    }
    service.clone().take_up_sessions();
    let end = {
        let (service, activity) = (service.clone(), activity.clone());
        async move { until_its_end(&service, &activity, until_idle).await }
    };
    let (ending, ends) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        end.await;
        let _ = ending.send(true);
    });
    let ended = |mut ends: tokio::sync::watch::Receiver<bool>| async move {
        let _ = ends.wait_for(|ends| *ends).await;
    };
    // Whoever follows a session that is at work keeps his connection open: he finds the next server.
    let cut = async {
        ended(ends.clone()).await;
        tokio::time::sleep(FOLLOWERS).await;
    };
    let (admission, turns) = (Admission::of_connections(), Arc::new(Turns::default()));
    let serving = listeners.into_iter().map(|(listener, team)| {
        let door = api::Door {
            configuration: configuration.clone(),
            callers: callers.clone(),
            turns: turns.clone(),
            team,
        };
        let router = api::router(service.clone(), activity.clone(), door);
        http::serve(listener, router, admission.clone(), ended(ends.clone()))
    });
    tokio::select! {
        _ = futures_util::future::join_all(serving) => {}
        () = cut => {}
    }
    for (path, _) in &sockets {
        let _ = fs::remove_file(path.with_file_name(offers::SOCKET));
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Waits until the server has to end: at a signal, or when it has had nothing to do for a while.
async fn until_its_end(
    service: &recovery_service::RecoveryService,
    activity: &api::Activity,
    until_idle: bool,
) {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_directory_is_made_or_judged_but_never_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let made = dir.path().join("a/b");
        provide_socket_directory(&made).unwrap();
        assert_eq!((mode(&made), mode(&dir.path().join("a"))), (0o755, 0o755));
        for (there, accepted) in [(0o700, true), (0o750, true), (0o1777, true), (0o777, false)] {
            set(&made, there);
            assert_eq!(provide_socket_directory(&made).is_ok(), accepted, "{there:o}");
            assert_eq!(mode(&made), there);
        }
    }
}
