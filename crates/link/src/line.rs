//! A line to another machine: one ssh process, with calls over it or raw bytes.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

use crate::far_side::{PING_INTERVAL, PING_LIMIT};
use crate::greeting::{
    Greeting, GreetingError, PROTOCOL, Purpose, Welcome, parse, read_line, write_line,
};
use crate::host::Host;
use crate::program::{self, MISSING, NOT_KEPT};
use crate::ssh;

/// How long connecting may take, the program's way over included.
const CONNECT_LIMIT: Duration = Duration::from_secs(120);
/// As much of what ssh says on its standard error is kept, bytes.
const STDERR_LIMIT: usize = 16 << 10;
/// Lines of a login shell that may come before the welcome.
const BANNER_LINES: usize = 200;

/// Whether the program may be brought to a machine that does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carry {
    /// Where it is missing.
    IfMissing,
    /// Never: it must be installed.
    Never,
}

/// Why there is no line to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineError {
    /// The machine.
    pub host: String,
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Whether it may pass by itself: the machine or the network is away for a while.
    pub passes: bool,
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.host, self.message)
    }
}

impl std::error::Error for LineError {}

/// What keeps a connection up.
#[derive(Debug)]
pub enum Carrier {
    /// An ssh process, or `pgthaw attach` itself; dropping it ends it.
    Process(Child),
    /// Whoever offered the connection, until it lets go of this or we do.
    Offered(UnixStream),
}

impl Carrier {
    /// Waits until the connection has ended.
    pub async fn wait(&mut self) {
        match self {
            Self::Process(child) => {
                let _ = child.wait().await; // however it ended
            }
            Self::Offered(holder) => while let Ok(1..) = holder.read(&mut [0; 64]).await {},
        }
    }
}

/// A connection whose greetings are over. Dropping it ends it.
#[derive(Debug)]
pub struct OpenLine {
    /// What keeps it up.
    pub carrier: Carrier,
    /// To the far side.
    pub input: ChildStdin,
    /// From the far side.
    pub output: ChildStdout,
    /// Who is there.
    pub welcome: Welcome,
}

/// Calls to another machine. Clones share the connection, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Line {
    welcome: Arc<Welcome>,
    sender: http2::SendRequest<Full<Bytes>>,
    _carrier: Arc<Carrier>,
}

impl Line {
    /// Makes a line of an open connection for calls to the machine called `host`.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn over(host: &str, open: OpenLine) -> Result<Self, LineError> {
        let OpenLine { carrier, input, output, welcome } = open;
        let shaken = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_LIMIT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(tokio::io::join(output, input)))
            .await;
        let (sender, connection) = shaken.map_err(|err| LineError {
            host: host.to_owned(),
            message: format!("no call goes through: {err}"),
            hint: None,
            passes: true,
        })?;
        tokio::spawn(async move {
            let _ = connection.await; // whoever calls is told what goes wrong
        });
        Ok(Self { welcome: Arc::new(welcome), sender, _carrier: Arc::new(carrier) })
    }

    /// What the far side said of itself.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Calls; dropping the future or the answer cancels the call over there.
    ///
    /// # Errors
    /// What broke the connection.
    pub async fn call(&self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        self.sender.clone().send_request(request).await
    }
}

/// Opens a connection to `host` for `purpose`, up to the greetings; with `agent` by that ssh-agent's keys.
///
/// # Errors
/// [`LineError`].
pub(crate) async fn open(
    host: &Host,
    carry: Carry,
    agent: Option<&Path>,
    purpose: &Purpose,
) -> Result<OpenLine, LineError> {
    let opening = attempt(host, carry, agent, purpose);
    match tokio::time::timeout(CONNECT_LIMIT, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(LineError {
            host: host.to_string(),
            message: format!("no greeting within {} s", CONNECT_LIMIT.as_secs()),
            hint: Some("check that `ssh` to this host ends up in a working shell".into()),
            passes: true,
        }),
    }
}

async fn attempt(
    host: &Host,
    carry: Carry,
    agent: Option<&Path>,
    purpose: &Purpose,
) -> Result<OpenLine, LineError> {
    let local = |what: &str, err: io::Error| LineError {
        host: host.to_string(),
        message: format!("{what}: {err}"),
        hint: (err.kind() == io::ErrorKind::NotFound)
            .then(|| "install OpenSSH's client (package openssh-client)".into()),
        passes: false,
    };
    let build = program::own_build().map_err(|err| local("read pgthaw's own program", err))?;
    let size = match carry {
        Carry::Never => None,
        Carry::IfMissing => {
            let own = program::open_own().and_then(|file| file.metadata());
            Some(own.map_err(|err| local("read pgthaw's own program", err))?.len())
        }
    };
    let script = program::script(&build, size);
    let ciphers = faster_ciphers(host).await;
    let mut command = Command::from(ssh::command(host, &script, ciphers.as_deref(), agent));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|err| local("start ssh", err))?;
    let (Some(mut input), Some(mut output), Some(errors)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        unreachable!("all three were asked for")
    };
    let said = listen(errors);
    let welcome = match welcome(host, &build, size, &mut input, &mut output).await {
        Ok(welcome) => welcome,
        Err(Unwelcome::Error(error)) => return Err(error),
        Err(Unwelcome::Ended(reason)) => {
            let status = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
            let _ = tokio::time::timeout(Duration::from_secs(1), said.listener).await; // a child of ssh may hold the pipe
            let stderr = said.text.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let ssh_failed = matches!(status, Ok(Ok(status)) if status.code() == Some(255));
            return Err(no_line(host, ssh_failed, &stderr, &reason));
        }
    };
    let greeting = Greeting { pgthaw: PROTOCOL, purpose: purpose.clone() };
    write_line(&mut input, &greeting).await.map_err(|err| LineError {
        passes: true,
        ..local("say what the connection is for", err)
    })?;
    Ok(OpenLine { carrier: Carrier::Process(child), input, output, welcome })
}

/// Asks ssh which ciphers it may use, for an order that costs less; none where it has nothing to say.
async fn faster_ciphers(host: &Host) -> Option<String> {
    if !ssh::has_aes() {
        return None;
    }
    let mut command = Command::from(ssh::configuration(host));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let listing = command.output().await.ok()?;
    ssh::faster_ciphers(&String::from_utf8_lossy(&listing.stdout))
}

/// Why no welcome came.
enum Unwelcome {
    /// The connection ended; ssh may say why.
    Ended(String),
    /// The far side says why.
    Error(LineError),
}

/// Hears who is there; brings the program where it is missing.
async fn welcome(
    host: &Host,
    build: &str,
    size: Option<u64>,
    input: &mut ChildStdin,
    output: &mut ChildStdout,
) -> Result<Welcome, Unwelcome> {
    let failed = |message: String, hint: String| {
        Unwelcome::Error(LineError {
            host: host.to_string(),
            message,
            hint: Some(hint),
            passes: false,
        })
    };
    let mut not_carried = None;
    for _ in 0..BANNER_LINES {
        let line = match read_line(output).await {
            Ok(line) => line,
            Err(err) => {
                return Err(Unwelcome::Ended(not_carried.unwrap_or_else(|| err.to_string())));
            }
        };
        if let Some(machine) = line.strip_prefix(MISSING) {
            let machine = machine.trim();
            let ours = std::env::consts::ARCH;
            if machine.split_once(' ') != Some(("Linux", ours)) {
                return Err(failed(
                    format!("this pgthaw is built for Linux on {ours}, and that is {machine}"),
                    format!("name a machine with Linux on {ours}: all run the same build"),
                ));
            }
            if size.is_none() {
                return Err(failed(
                    "this build of pgthaw is not installed there".into(),
                    "install this build there, or let it be carried over (agent = \"carried\" in the configuration)".into(),
                ));
            }
            // Where it breaks off, the far side still says why.
            let carried = carry(input).await;
            not_carried = carried.err().map(|err| format!("bring pgthaw there: {err}"));
        } else if let Some(why) = line.strip_prefix(NOT_KEPT) {
            return Err(failed(
                format!("pgthaw can be run from no directory there:{}", why.trim_end_matches(';')),
                "install pgthaw there, or name an account with a home directory that may execute and has room".into(),
            ));
        } else if let Ok(welcome) = parse::<Welcome>(&line) {
            if welcome.pgthaw != PROTOCOL || welcome.build != build {
                return Err(failed(
                    format!(
                        "pgthaw {} there (build {}) is another build than this one ({}, build {build})",
                        welcome.version,
                        welcome.build,
                        env!("CARGO_PKG_VERSION")
                    ),
                    "install the same build on both machines".into(),
                ));
            }
            return Ok(welcome);
        }
        // Anything else is what a login shell's start-up files print.
    }
    Err(failed(
        "the login shell prints without end instead of starting pgthaw".into(),
        "let its start-up files print nothing for a shell without a terminal".into(),
    ))
}

/// Sends this process's own program.
async fn carry(input: &mut ChildStdin) -> io::Result<()> {
    let mut program = program::open_own()?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = program.read(&mut buffer)?;
        if count == 0 {
            return input.flush().await;
        }
        input.write_all(&buffer[..count]).await?;
    }
}

fn no_line(host: &Host, ssh_failed: bool, stderr: &str, reason: &str) -> LineError {
    let (said, hint) = ssh::explain(stderr);
    // The error itself begins with the host's name.
    let said = said.strip_prefix(&format!("{}: ", host.destination())).unwrap_or(&said).to_owned();
    let message = match (ssh_failed, stderr.trim().is_empty()) {
        (true, _) => said,
        (false, true) => reason.to_owned(),
        (false, false) => format!("{reason}: {said}"),
    };
    let passes = [
        "timed out",
        "No route",
        "unreachable",
        "refused",
        "closed by",
        "Connection reset",
        "lost",
        "kex_exchange",
    ]
    .iter()
    .any(|words| message.contains(words));
    LineError { host: host.to_string(), message, hint: hint.map(str::to_owned), passes }
}

/// What ssh says on its standard error.
struct Said {
    text: Arc<Mutex<String>>,
    listener: JoinHandle<()>,
}

/// Collects what ssh says, and keeps its pipe empty for as long as it runs.
fn listen(mut errors: ChildStderr) -> Said {
    let text = Arc::new(Mutex::new(String::new()));
    let kept = text.clone();
    let listener = tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = errors.read(&mut buffer).await {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < STDERR_LIMIT {
                kept.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        }
    });
    Said { text, listener }
}

impl OpenLine {
    /// Opens a connection to this very program on this machine, for raw bytes.
    ///
    /// # Errors
    /// When it cannot be started or says something else.
    pub async fn here(purpose: &Purpose) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("pgthaw").args(["attach", "--stdio"]).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let (Some(mut input), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both were asked for")
        };
        let line = read_line(&mut output).await.map_err(io::Error::other)?;
        let welcome = parse(&line).map_err(io::Error::other)?;
        write_line(&mut input, &Greeting { pgthaw: PROTOCOL, purpose: purpose.clone() }).await?;
        Ok(Self { carrier: Carrier::Process(child), input, output, welcome })
    }

    /// Takes a connection that somebody offers, whose far side begins with its welcome as `pgthaw attach` does.
    ///
    /// # Errors
    /// When it says something else, or speaks another version of the protocol.
    pub async fn offered(
        from: &str,
        input: OwnedFd,
        output: OwnedFd,
        holder: UnixStream,
        purpose: &Purpose,
    ) -> Result<Self, LineError> {
        let failed = |message: String| LineError {
            host: from.to_owned(),
            message,
            hint: None,
            passes: true,
        };
        let pipes = || -> io::Result<(ChildStdin, ChildStdout)> {
            let output = ChildStdin::from_std(std::process::ChildStdin::from(output))?;
            Ok((output, ChildStdout::from_std(std::process::ChildStdout::from(input))?))
        };
        let (mut input, mut output) = pipes().map_err(|err| failed(err.to_string()))?;
        let greeted = async {
            let line = read_line(&mut output).await?;
            let welcome: Welcome = parse(&line)?;
            let greeting = Greeting { pgthaw: PROTOCOL, purpose: purpose.clone() };
            write_line(&mut input, &greeting).await?;
            Ok::<_, GreetingError>(welcome)
        };
        let welcome = match tokio::time::timeout(CONNECT_LIMIT, greeted).await {
            Ok(Ok(welcome)) if welcome.pgthaw == PROTOCOL => welcome,
            Ok(Ok(welcome)) => {
                return Err(failed(format!("pgthaw {} there is another version", welcome.version)));
            }
            Ok(Err(err)) => return Err(failed(err.to_string())),
            Err(_) => return Err(failed("no greeting came".into())),
        };
        Ok(Self { carrier: Carrier::Offered(holder), input, output, welcome })
    }

    /// Opens a connection to `host`; with `agent`, the socket of an ssh-agent, by that one's keys.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn open(
        host: &Host,
        carry: Carry,
        agent: Option<&Path>,
        purpose: &Purpose,
    ) -> Result<Self, LineError> {
        open(host, carry, agent, purpose).await
    }
}
