//! The first words on a connection: one JSON line each way, before anything else.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Number of this protocol; another one is not understood.
pub const PROTOCOL: u32 = 1;
/// Longest line, bytes. What stands before the greeting (a banner of the login shell) counts, too.
const LINE_LIMIT: usize = 64 << 10;

/// What the far side says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`PROTOCOL`].
    pub pgthaw: u32,
    /// Its version.
    pub version: String,
    /// Hash of its program: equal only for the same build.
    pub build: String,
    /// The machine's own name.
    pub host: String,
    /// The account.
    pub user: String,
    /// Its number.
    pub uid: u32,
    /// Its home directory, where relative paths begin.
    pub home: PathBuf,
    /// What a restricted connection (`--only`) may be used for; nothing without a restriction.
    pub only: Option<String>,
    /// The address of that machine at which ssh has reached it; none where ssh was not needed.
    pub address: Option<IpAddr>,
}

/// What the near side wants the connection for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROTOCOL`].
    pub pgthaw: u32,
    /// What follows.
    pub purpose: Purpose,
}

/// What a connection is used for after the greetings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// HTTP/2 calls.
    Calls,
    /// Raw bytes for whoever listens on this Unix socket: it gets the connection's own descriptors.
    Socket(PathBuf),
    /// The connection itself is offered to the server there: it may use it as if it had reached the near side by ssh.
    Offer(String),
    /// Raw bytes for the receiving half of a data mover.
    Receive {
        /// The session.
        session: String,
        /// The target directory.
        directory: PathBuf,
        /// Whether an earlier export there is replaced.
        replace: bool,
    },
    /// Only to find out whether the data movers of two machines can meet.
    Meet,
}

/// Why the other side is not understood.
#[derive(Debug, thiserror::Error)]
pub enum GreetingError {
    /// The connection ended or failed before a whole line came.
    #[error("the connection ended before a greeting came{}", after(.0))]
    Ended(String),
    /// Something else than a greeting.
    #[error("instead of a greeting came `{0}`")]
    Other(String),
    /// The kernel says so.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

fn after(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(" (but: {said})") }
}

/// Reads one line and not a byte more.
///
/// # Errors
/// [`GreetingError`].
pub async fn read_line(input: &mut (impl AsyncRead + Unpin)) -> Result<String, GreetingError> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        let text = || String::from_utf8_lossy(&line).trim().to_owned();
        match input.read(&mut byte).await? {
            0 => return Err(GreetingError::Ended(text())),
            _ if byte[0] == b'\n' => return Ok(text()),
            _ if line.len() == LINE_LIMIT => return Err(GreetingError::Other(text())),
            _ => line.push(byte[0]),
        }
    }
}

/// Sends one line.
///
/// # Errors
/// The write's.
pub async fn write_line(
    output: &mut (impl AsyncWrite + Unpin),
    message: &(impl Serialize + Sync),
) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    output.write_all(&line).await?;
    output.flush().await
}

/// Reads a line that is `T` as JSON.
pub(crate) fn parse<T: DeserializeOwned>(line: &str) -> Result<T, GreetingError> {
    let shown = || line.chars().take(200).collect();
    serde_json::from_str(line).map_err(|_| GreetingError::Other(shown()))
}
