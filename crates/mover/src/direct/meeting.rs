//! How the two sides come to their connection: whoever has a line to each of them asks them to meet.
//!
//! He says one JSON line, the side answers one or two; a side does what it is asked and decides nothing. Keys, token and
//! addresses come over these lines only.
//!
//! ```text
//! Introduce ─▶                  ◀─ Introduced (certificate)
//! Listen ────▶                  ◀─ Listening (offer), then Connected or Failed; or Failed at once
//! Dial (the other's offer) ─▶   ◀─ Connected or Failed
//! Direct or Relay ─▶            the next byte is the movers' own
//! ```
//! `Listen` and `Dial` may be asked again; what came of them before is dropped.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::{DirectError, Fingerprint, Identity, Listener, Offer, dial};
use crate::remote::Connection;

/// How long dialing may take: a firewall that drops packets must not cost much more.
const DIAL_LIMIT: Duration = Duration::from_secs(3);
/// How long the listener waits for it. Whoever asks both waits longer than this for an answer.
const ACCEPT_LIMIT: Duration = Duration::from_secs(4);
/// The next order comes within this, or nobody is left to give one.
const ORDER_LIMIT: Duration = Duration::from_secs(60);
/// Longest line, bytes.
const LINE_MAX: usize = 4096;

/// What a side is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Say which certificate you have.
    Introduce,
    /// Listen for the side with that certificate.
    Listen {
        /// On this address.
        address: IpAddr,
        /// On one of these ports, first and last.
        ports: (u16, u16),
        /// The certificate.
        peer: Fingerprint,
    },
    /// Connect to the side that listens.
    Dial {
        /// At this address.
        address: IpAddr,
        /// What it has answered.
        offer: Offer,
    },
    /// Use the direct connection.
    Direct,
    /// Use this line.
    Relay,
}

/// What it answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Its certificate.
    Introduced(Fingerprint),
    /// It listens.
    Listening(Offer),
    /// There is a direct connection.
    Connected,
    /// There is none, for this reason.
    Failed(String),
}

/// A connection that two sides have come to.
#[derive(Debug)]
pub struct Met {
    /// The connection.
    pub connection: Connection,
    /// The line's input, where the connection is another one: it ends when whoever asked for it is gone.
    pub line: Option<File>,
}

/// Does what it is asked over a line (`input`, `output`) until it is known which way the dump goes. `close` ends the line; it
/// is called with the end of either connection.
///
/// # Errors
/// When the line ends, or something else comes over it.
pub fn meet(
    mut input: File,
    mut output: File,
    close: impl Fn() + Send + Sync + 'static,
) -> io::Result<Met> {
    let identity = Identity::new().map_err(io::Error::other)?;
    let mut direct = None;
    loop {
        let order: Order = serde_json::from_slice(&read_line(&mut input)?)?;
        direct = match order {
            Order::Introduce => {
                say(&mut output, &Answer::Introduced(identity.fingerprint()))?;
                None
            }
            Order::Listen { address, ports: (first, last), peer } => {
                match Listener::bind(address, first..=last, &identity, peer) {
                    Ok(listener) => {
                        say(&mut output, &Answer::Listening(listener.offer().clone()))?;
                        tell(&mut output, listener.accept(ACCEPT_LIMIT))?
                    }
                    Err(err) => tell(&mut output, Err(err))?,
                }
            }
            Order::Dial { address, offer } => {
                tell(&mut output, dial(&[address], &identity, &offer, DIAL_LIMIT))?
            }
            Order::Relay => {
                let connection = Connection::new(input, output).closed_by(close);
                return Ok(Met { connection, line: None });
            }
            Order::Direct => {
                let missing = || io::Error::from(io::ErrorKind::NotConnected);
                let connection = direct.ok_or_else(missing)?.also_closing(close);
                return Ok(Met { connection, line: Some(input) });
            }
        };
    }
}

/// Tells what has come of an order.
fn tell(
    output: &mut File,
    connected: Result<Connection, DirectError>,
) -> io::Result<Option<Connection>> {
    match connected {
        Ok(connection) => say(output, &Answer::Connected).map(|()| Some(connection)),
        Err(err) => say(output, &Answer::Failed(with_causes(&err))).map(|()| None),
    }
}

fn with_causes(err: &DirectError) -> String {
    match std::error::Error::source(err) {
        Some(cause) => format!("{err}: {cause}"),
        None => err.to_string(),
    }
}

fn say(output: &mut File, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    output.write_all(&line)
}

/// Reads one line and not a byte more.
fn read_line(input: &mut File) -> io::Result<Vec<u8>> {
    let limit = Timespec::try_from(ORDER_LIMIT).map_err(io::Error::other)?;
    let mut line = Vec::new();
    while line.len() < LINE_MAX {
        if poll(&mut [PollFd::new(&*input, PollFlags::IN)], Some(&limit))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut byte = [0];
        match input.read(&mut byte)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if byte == *b"\n" => return Ok(line),
            _ => line.push(byte[0]),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"))
}
