//! The way to a server: this account's own, which is started when none runs, or one that is named; and asking it.

use std::collections::VecDeque;
use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use pgthaw_link::Carry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::process::{Child, Command};

use crate::configuration::ServerName;
use crate::http::{self, Address, ClientError, EventStream};
use crate::machine::Machine;
use crate::wire::ApiError;

/// Name of the socket in the state directory.
const SOCKET: &str = "server.sock";
/// What a server that a command started says, in the state directory.
pub const SERVER_LOG: &str = "server.log";
/// A log longer than this (bytes) begins anew with the next server.
const LOG_MAX: u64 = 1 << 20;
/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a running server may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// How often a server that is there may break a connection off before that is an error: one that is ending does it once.
const BROKEN_MAX: u32 = 20;
/// Between two looks at a server that starts.
const POLL: Duration = Duration::from_millis(25);

/// What stands in no session's id.
const NOT_IN_IDS: AsciiSet = NON_ALPHANUMERIC.remove(b'-');

const OUR_VERSION: &str = env!("CARGO_PKG_VERSION");

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Api(error) => error,
            ClientError::NoLine(error) => error.into(),
            ClientError::NotListening(_) | ClientError::Broken { .. } => Self {
                message: format!("pgthaw's server: {error}"),
                hint: Some(
                    "sessions go on without their server; try again, and see `pgthaw sessions`"
                        .into(),
                ),
                usage: false,
            },
        }
    }
}

/// Where this account's server keeps its sessions, its socket and its log: `$XDG_STATE_HOME/pgthaw` or `~/.local/state/pgthaw`; as
/// root `/var/lib/pgthaw`, unless `$XDG_STATE_HOME` is a directory of root's.
pub fn state_directory() -> PathBuf {
    let root = rustix::process::geteuid().is_root();
    let from_environment =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state_home = from_environment("XDG_STATE_HOME");
    // Under `sudo -E` the variable names the user's own directory.
    let state_home = state_home
        .filter(|path| !root || std::fs::metadata(path).map_or(true, |meta| meta.uid() == 0));
    match state_home {
        Some(home) => home.join("pgthaw"),
        None if root => "/var/lib/pgthaw".into(),
        None => from_environment("HOME")
            .or_else(home_of_account)
            .unwrap_or_else(|| "/".into())
            .join(".local/state/pgthaw"),
    }
}

/// Makes the state directory where it is missing, for this account alone, and refuses one that others could have prepared: what
/// is written there (sockets, journals, logs) would go where they want.
///
/// # Errors
/// When it cannot be made, or is not this account's own.
pub fn private_state_directory() -> io::Result<PathBuf> {
    let state = state_directory();
    let named = |err: io::Error| {
        io::Error::new(err.kind(), format!("state directory `{}`: {err}", state.display()))
    };
    DirBuilder::new().recursive(true).mode(0o700).create(&state).map_err(named)?;
    refuse_shared(&state).map_err(named)?;
    Ok(state)
}

/// Refuses a directory that another account owns or may write, or may replace by another.
fn refuse_shared(state: &Path) -> io::Result<()> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned()));
    let own = rustix::process::geteuid().as_raw();
    let meta = std::fs::symlink_metadata(state)?;
    if !meta.is_dir() {
        return refused("it is no directory");
    }
    if meta.uid() != own {
        return refused("it belongs to another account");
    }
    if meta.mode() & 0o022 != 0 {
        return refused("other accounts may write there (chmod 700 mends it)");
    }
    let parent = std::fs::metadata(state.parent().unwrap_or(state))?;
    // A group of its own, as many systems give each account, may write there.
    let shared = parent.mode() & 0o002 != 0 && parent.mode() & 0o1000 == 0;
    if shared || (parent.uid() != own && parent.uid() != 0) {
        return refused("other accounts may replace it: its parent directory is theirs, too");
    }
    Ok(())
}

/// The home directory that the account database names: the sixth field of passwd(5).
fn home_of_account() -> Option<PathBuf> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let output = std::process::Command::new("getent").args(["passwd", &uid]).output().ok()?;
    let entry = String::from_utf8(output.stdout).ok()?;
    entry.trim_end().split(':').nth(5).map(PathBuf::from).filter(|home| home.is_absolute())
}

/// Which server.
#[derive(Debug, Clone)]
enum Way {
    /// This account's own, by its state directory.
    Own(PathBuf),
    /// Whoever listens on this socket.
    Socket(PathBuf),
    /// One on another machine.
    Ssh(Arc<Machine>),
}

/// A server that answered with our own version.
#[derive(Debug, Clone)]
pub struct Client {
    way: Way,
}

impl Client {
    /// Finds the server that `name` means; without a name this account's own, which is started where none runs.
    ///
    /// # Errors
    /// When none can be started or reached, or one of another version runs.
    pub async fn connect(name: Option<&ServerName>, carry: Carry) -> Result<Self, ApiError> {
        let way = match name {
            None => Way::Own(private_state_directory().map_err(|err| ApiError {
                message: err.to_string(),
                hint: Some(
                    "pgthaw keeps its sessions there; $XDG_STATE_HOME names another place".into(),
                ),
                usage: false,
            })?),
            Some(ServerName::Socket(socket)) => Way::Socket(socket.clone()),
            Some(ServerName::Ssh(host)) => {
                Way::Ssh(Arc::new(Machine::new(host.clone(), carry, None)))
            }
        };
        let client = Self { way };
        client.ensure_server().await?;
        Ok(client)
    }

    /// The server of another state directory.
    #[cfg(test)]
    pub fn at(state: PathBuf) -> Self {
        Self { way: Way::Own(state) }
    }

    /// Asks with `GET`.
    ///
    /// # Errors
    /// What the server says, or that it is gone.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.request("GET", path, None::<()>).await
    }

    /// Asks with `POST`.
    ///
    /// # Errors
    /// What the server says, or that it is gone.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        self.request("POST", path, Some(body)).await
    }

    /// As [`Client::post`], for what may be asked twice: a server that ends before it has answered is followed by the next.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub async fn post_repeatable<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let answer = http::request(&self.address(), "POST", path, Some(body)).await;
        if !matches!(answer, Err(ClientError::Broken { .. } | ClientError::NotListening(_))) {
            return Ok(answer?);
        }
        self.ensure_server().await?;
        self.post(path, body).await
    }

    /// Opens the events of a session.
    ///
    /// # Errors
    /// [`ClientError`]: a follower goes on after a broken connection.
    pub async fn events(&self, id: &str) -> Result<EventStream, ClientError> {
        http::stream(&self.address(), &session_path(id, "/events")).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<impl Serialize>,
    ) -> Result<T, ApiError> {
        let answer = http::request(&self.address(), method, path, body.as_ref()).await;
        if !matches!(answer, Err(ClientError::NotListening(_))) {
            return Ok(answer?);
        }
        self.ensure_server().await?; // it had just ended itself; nothing was sent
        Ok(http::request(&self.address(), method, path, body).await?)
    }

    /// Where it listens.
    pub fn address(&self) -> Address {
        match &self.way {
            Way::Own(state) => Address::Socket(state.join(SOCKET)),
            Way::Socket(socket) => Address::Socket(socket.clone()),
            Way::Ssh(machine) => Address::Far(machine.clone(), None),
        }
    }

    /// Whether it is another account's or another machine's: then this machine is a target only by connections that we make.
    pub fn is_elsewhere(&self) -> bool {
        !matches!(self.way, Way::Own(_))
    }

    /// Returns once a server of our version answers; starts one when none listens.
    ///
    /// # Errors
    /// When none can be started, or one of another version runs.
    pub async fn ensure_server(&self) -> Result<(), ApiError> {
        let deadline = Instant::now() + START_LIMIT;
        let mut started: Option<Child> = None;
        let mut broken = 0;
        loop {
            let trouble = match self.version().await {
                Ok(version) if version == OUR_VERSION => return Ok(()),
                Ok(version) => return Err(other_version(&version)),
                Err(ClientError::Api(error)) => return Err(error),
                Err(error @ ClientError::Broken { .. }) if broken < BROKEN_MAX => {
                    broken += 1;
                    error
                }
                Err(error @ (ClientError::Broken { .. } | ClientError::NoLine(_))) => {
                    return Err(error.into());
                }
                Err(error @ ClientError::NotListening(_)) => {
                    let Way::Own(state) = &self.way else { return Err(self.nobody(&error)) };
                    let ended = match &mut started {
                        None => true,
                        Some(child) => match child.try_wait() {
                            Ok(None) => false,
                            Ok(Some(status)) if status.success() => true, // another server was there, and may be ending
                            Ok(Some(_)) | Err(_) => return Err(not_started(state, "it ended")),
                        },
                    };
                    if ended {
                        started = Some(start(state)?);
                    }
                    error
                }
            };
            if Instant::now() > deadline {
                let limit = START_LIMIT.as_secs();
                let why = format!("it does not answer after {limit} s ({trouble})");
                return Err(match &self.way {
                    Way::Own(state) => not_started(state, &why),
                    Way::Socket(_) | Way::Ssh(_) => {
                        ApiError::broken(format!("pgthaw's server: {why}"))
                    }
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn version(&self) -> Result<String, ClientError> {
        #[derive(serde::Deserialize)]
        struct Answer {
            version: String,
        }
        let address = self.address();
        let asked = http::request::<Answer>(&address, "GET", "/v1/version", None::<()>);
        match tokio::time::timeout(VERSION_LIMIT, asked).await {
            Ok(answer) => answer.map(|answer| answer.version),
            Err(_) => Err(ClientError::Broken {
                address: address.to_string(),
                reason: "the server does not answer".into(),
            }),
        }
    }

    /// Nobody listens there, and nobody can be started.
    fn nobody(&self, error: &ClientError) -> ApiError {
        ApiError {
            message: format!("there is no pgthaw server: {error}"),
            hint: Some("`pgthaw serve` runs one there; without $PGTHAW_SERVER and `server` in the configuration this account's own is used".into()),
            usage: false,
        }
    }
}

/// Starts a server that neither our terminal nor our end can reach.
fn start(state: &Path) -> Result<Child, ApiError> {
    let failed = |what: String, err: io::Error| ApiError {
        message: format!("{what}: {err}"),
        hint: Some("pgthaw keeps its sessions there ($XDG_STATE_HOME names another place)".into()),
        usage: false,
    };
    let log = state.join(SERVER_LOG);
    let mut append = OpenOptions::new();
    append.create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let errors = append.open(&log).and_then(|file| {
        if file.metadata()?.len() > LOG_MAX {
            file.set_len(0)?;
        }
        Ok(file)
    });
    let errors = errors.map_err(|err| failed(format!("write `{}`", log.display()), err))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("pgthaw").args(["serve", "--until-idle"]).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
    // SAFETY: between fork and exec only async-signal-safe system calls are made.
    unsafe { command.pre_exec(leave_terminal) };
    command.spawn().map_err(|err| failed("start pgthaw's server".into(), err))
}

fn not_started(state: &Path, why: &str) -> ApiError {
    let log = state.join(SERVER_LOG);
    let said = last_lines(&log, 5);
    ApiError {
        message: format!(
            "pgthaw's server did not start: {why}{}",
            said.map_or_else(String::new, |said| format!("\n{said}"))
        ),
        hint: Some(format!("see `{}`", log.display())),
        usage: false,
    }
}

/// Path of a session in the server's API; an id that no session can have stays harmless.
pub fn session_path(id: &str, rest: &str) -> String {
    let id = utf8_percent_encode(id, &NOT_IN_IDS);
    format!("/v1/sessions/{id}{rest}")
}

/// Gives the server a session of its own, and nothing of our caller's open files: it would hold locks and pipes for as long as it lives.
fn leave_terminal() -> io::Result<()> {
    rustix::process::setsid()?;
    // SAFETY: the call takes numbers only and changes flags of descriptors. Kernels before 5.11 refuse it, which is no harm.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Ok(())
}

fn other_version(version: &str) -> ApiError {
    ApiError {
        message: format!(
            "this is pgthaw {OUR_VERSION}, but the server of this account that runs is pgthaw {version}"
        ),
        hint: Some(
            "it ends itself soon after its last session has ended; until then use that version"
                .into(),
        ),
        usage: false,
    }
}

fn last_lines(log: &Path, count: usize) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut last = VecDeque::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if last.len() == count {
            last.pop_front();
        }
        last.push_back(line);
    }
    (!last.is_empty()).then(|| last.into_iter().collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_one_part_of_a_path() {
        assert_eq!(
            session_path("20261122-101112-kqvd", "/log"),
            "/v1/sessions/20261122-101112-kqvd/log"
        );
        assert_eq!(session_path("../x?y", ""), "/v1/sessions/%2E%2E%2Fx%3Fy");
    }

    #[test]
    fn a_state_directory_is_this_accounts_own() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let home = tempfile::tempdir().unwrap();
        let (state, link) = (home.path().join("pgthaw"), home.path().join("link"));
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        std::fs::create_dir(&state).unwrap();
        mode(&state, 0o700);
        refuse_shared(&state).unwrap();
        mode(&state, 0o777);
        assert!(refuse_shared(&state).unwrap_err().to_string().contains("may write there"));
        mode(&state, 0o700);
        symlink(&state, &link).unwrap();
        assert!(refuse_shared(&link).unwrap_err().to_string().contains("no directory"));
        mode(home.path(), 0o777);
        assert!(refuse_shared(&state).unwrap_err().to_string().contains("may replace it"));
        mode(home.path(), 0o1777);
        refuse_shared(&state).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&state, Some(65534), None).unwrap();
            assert!(refuse_shared(&state).unwrap_err().to_string().contains("another account"));
        }
    }

    #[test]
    fn the_end_of_a_log_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        assert_eq!(last_lines(&log, 2), None);
        std::fs::write(&log, "\n\n").unwrap();
        assert_eq!(last_lines(&log, 2), None);
        std::fs::write(&log, "one\ntwo\n\nthree\n").unwrap();
        assert_eq!(last_lines(&log, 2).as_deref(), Some("two\nthree"));
    }
}
