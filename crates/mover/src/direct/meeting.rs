//! How the two sides come to their connection: whoever has a line to each of them asks them to meet.
//!
//! He says one JSON line, the side answers one or two; a side does what it is asked and decides nothing. Keys, token and
//! addresses come over these lines only. He may be the other side himself ([`lead`]).
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
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::{DirectError, Fingerprint, Identity, Listener, Offer, dial};
use crate::remote::Connection;

/// How long dialing may take: a firewall that drops packets must not cost much more.
const DIAL_LIMIT: Duration = Duration::from_secs(3);
/// How much longer the listener waits for it.
const ACCEPT_MARGIN: Duration = Duration::from_secs(1);
/// How long the listener waits for a side that dials when it is asked to. Whoever asks both waits longer than this for an answer.
pub const ACCEPT_LIMIT: Duration = DIAL_LIMIT.saturating_add(ACCEPT_MARGIN);
/// A side that leads knows how long a question takes over the line; dialing is a few round trips, and may take this many of them.
const DIAL_ROUND_TRIPS: u32 = 10;
/// But never less than this.
const LEAST_DIAL_LIMIT: Duration = Duration::from_millis(500);
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
        /// For this long.
        limit: Duration,
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
    /// One end of the line, where the connection is another one: its input, which ends when whoever asked for it is gone; of a side
    /// that leads its output, whose end tells the other side just that.
    pub line: Option<File>,
}

/// Where the other side may listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenAt {
    /// On this address.
    pub address: IpAddr,
    /// On one of these ports, first and last.
    pub ports: (u16, u16),
}

/// Asks the other side of a line, which does [`meet`], to listen, and connects to it: directly where that is possible, else over the
/// line. Returns with it the port, or why it is the line.
///
/// # Errors
/// When the line ends, or something else comes over it.
pub fn lead(
    mut input: File,
    mut output: File,
    listen_at: Result<ListenAt, String>,
    close: impl Fn() + Send + Sync + 'static,
) -> io::Result<(Met, Result<u16, String>)> {
    let led = match listen_at {
        Ok(listen_at) => ask_and_dial(&mut input, &mut output, listen_at)?,
        Err(why) => Err(why),
    };
    match led {
        Ok((connection, port)) => {
            say(&mut output, &Order::Direct)?;
            let met = Met { connection: connection.also_closing(close), line: Some(output) };
            Ok((met, Ok(port)))
        }
        Err(why) => {
            say(&mut output, &Order::Relay)?;
            let connection = Connection::new(input, output).closed_by(close);
            Ok((Met { connection, line: None }, Err(why)))
        }
    }
}

/// Returns a direct connection to the other side and its port, or why there is none.
fn ask_and_dial(
    input: &mut File,
    output: &mut File,
    ListenAt { address, ports }: ListenAt,
) -> io::Result<Result<(Connection, u16), String>> {
    let identity = Identity::new().map_err(io::Error::other)?;
    let asked = Instant::now();
    say(output, &Order::Introduce)?;
    let Answer::Introduced(_) = hear(input)? else { return Err(nonsense()) };
    let limit = (asked.elapsed() * DIAL_ROUND_TRIPS).clamp(LEAST_DIAL_LIMIT, DIAL_LIMIT);
    let peer = identity.fingerprint();
    say(output, &Order::Listen { address, ports, peer, limit: limit + ACCEPT_MARGIN / 2 })?;
    let offer = match hear(input)? {
        Answer::Listening(offer) if offer.is_within(ports) => offer,
        Answer::Failed(why) => return Ok(Err(why)),
        _ => return Err(nonsense()),
    };
    let port = offer.port;
    let dialed = dial(&[address], &identity, &offer, limit);
    // What the dialer says tells more: the listener only waited.
    Ok(match (dialed, hear(input)?) {
        (Ok(connection), Answer::Connected) => Ok((connection, port)),
        (Err(err), Answer::Connected | Answer::Failed(_)) => Err(with_causes(&err)),
        (Ok(_), Answer::Failed(why)) => Err(why),
        _ => return Err(nonsense()),
    })
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
            Order::Listen { address, ports: (first, last), peer, limit } => {
                match Listener::bind(address, first..=last, &identity, peer) {
                    Ok(listener) => {
                        say(&mut output, &Answer::Listening(listener.offer().clone()))?;
                        tell(&mut output, listener.accept(limit))?
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

fn hear(input: &mut File) -> io::Result<Answer> {
    Ok(serde_json::from_slice(&read_line(input)?)?)
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the other side answers another question")
}

fn say(output: &mut File, words: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(words)?;
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
