//! A direct way between the two machines, beside the one that always works.
//!
//! One side listens on a port for one connection and makes an [`Offer`]; it reaches the other side over SSH, which then
//! dials. TLS 1.3 with certificates made for the session and pinned on both sides, and a token that is good for one
//! connection. What comes out is a [`Connection`] like any other; `tls` has the pinning and the two halves, `meeting` what each
//! side does when it is asked to meet the other. Leaves to the one who asks which side listens, and at which address.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::names::hex;
use crate::remote::Connection;

mod meeting;
mod tls;

pub use meeting::{ACCEPT_LIMIT, Answer, ListenAt, Met, Order, lead, meet};

/// How long one client may take to show its certificate and its token, so that a stray one does not keep the right one out.
const GREETING: Duration = Duration::from_secs(5);
/// What the listening side answers to the right token.
const WELCOME: u8 = 1;

/// The SHA-256 of a certificate (DER).
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint([u8; 32]);

impl fmt::Debug for Fingerprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex(&self.0))
    }
}

/// A certificate with its key, made for one session and kept in memory only.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    /// Makes one.
    ///
    /// # Errors
    /// [`DirectError::Tls`] if the system gives no random numbers.
    pub fn new() -> Result<Self, DirectError> {
        let made = rcgen::generate_simple_self_signed([tls::NAME.to_owned()])
            .map_err(|err| DirectError::Tls { reason: err.to_string() })?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        Ok(Self { certificate: made.cert.der().clone(), key })
    }

    /// Returns what the other side pins.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint_of(&self.certificate)
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key().into()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Identity").field(&self.fingerprint()).finish()
    }
}

fn fingerprint_of(certificate: &CertificateDer<'_>) -> Fingerprint {
    Fingerprint(Sha256::digest(certificate).into())
}

/// What the other side needs to be let in once. It is a secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct Offer {
    /// Where the listener listens.
    pub port: u16,
    /// The listener's certificate.
    pub certificate: Fingerprint,
    token: [u8; 32],
}

impl Offer {
    /// Whether the port is one of those that were asked for, first and last (0 and 0: any): nobody lets himself be sent elsewhere.
    pub fn is_within(&self, ports: (u16, u16)) -> bool {
        ports == (0, 0) || (ports.0..=ports.1).contains(&self.port)
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, certificate, token: _ } = self;
        let mut shown = formatter.debug_struct("Offer");
        shown.field("port", port).field("certificate", certificate).finish_non_exhaustive()
    }
}

/// Why there is no direct connection.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// No port of the range can be listened on.
    #[error("listen on {address}, ports {} to {}", ports.start(), ports.end())]
    Listen {
        /// The address.
        address: IpAddr,
        /// The ports that were tried.
        ports: RangeInclusive<u16>,
        /// What the system said of the last one.
        source: io::Error,
    },
    /// Nobody connected in time.
    #[error("nobody connected to port {port} within {} s", waited.as_secs_f32())]
    NoClient {
        /// The port.
        port: u16,
        /// How long it was waited.
        waited: Duration,
    },
    /// Only others connected, and were refused; this was the last one.
    #[error("{peer} connected to port {port} and was refused: {refusal}")]
    Refused {
        /// The port.
        port: u16,
        /// Who it was.
        peer: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// No address could be connected to.
    #[error("connect to {}", list(attempts))]
    Connect {
        /// The addresses, each with what the system said.
        attempts: Vec<(SocketAddr, io::Error)>,
    },
    /// Something answered, but no connection came of it.
    #[error("{address} answered, but: {refusal}")]
    Answered {
        /// The address.
        address: SocketAddr,
        /// What happened.
        refusal: Refusal,
    },
    /// TLS cannot be used here.
    #[error("prepare TLS: {reason}")]
    Tls {
        /// In the library's words.
        reason: String,
    },
}

/// Why a peer was not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has another certificate than it should, or none.
    #[error("it does not have the pinned certificate")]
    WrongCertificate,
    /// It does not know the token.
    #[error("it does not know the token")]
    WrongToken,
    /// It does not speak TLS 1.3.
    #[error("it does not speak TLS 1.3: {0}")]
    NotTls(String),
    /// It refused us: it pins another certificate, expects another token, or has let another one in.
    #[error("it refused this side: {0}")]
    ByPeer(String),
    /// It was too slow.
    #[error("it took too long")]
    TooSlow,
    /// It went away.
    #[error("the connection broke: {0}")]
    Broken(String),
}

fn list(attempts: &[(SocketAddr, io::Error)]) -> String {
    let attempts: Vec<_> =
        attempts.iter().map(|(address, err)| format!("{address}: {err}")).collect();
    attempts.join(", ")
}

/// Waits for one connection.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    offer: Offer,
    accepting: tls::Accepting,
}

impl Listener {
    /// Listens on the first free one of `ports` (`0..=0`: any) for the peer with that certificate.
    ///
    /// # Errors
    /// [`DirectError::Listen`] if none is free, [`DirectError::Tls`].
    pub fn bind(
        address: IpAddr,
        ports: RangeInclusive<u16>,
        identity: &Identity,
        peer: Fingerprint,
    ) -> Result<Self, DirectError> {
        let mut last = io::Error::from(io::ErrorKind::InvalidInput);
        for port in ports.clone() {
            let bound = TcpListener::bind((address, port)).and_then(|socket| {
                socket.set_nonblocking(true)?; // a client may be gone before it is accepted
                Ok((socket.local_addr()?.port(), socket))
            });
            match bound {
                Ok((port, socket)) => {
                    let offer =
                        Offer { port, certificate: identity.fingerprint(), token: tls::token()? };
                    let accepting = tls::Accepting::new(identity, peer)?;
                    return Ok(Self { socket, offer, accepting });
                }
                Err(err) => last = err,
            }
        }
        Err(DirectError::Listen { address, ports, source: last })
    }

    /// Returns what the other side needs.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Accepts the one connection that has the pinned certificate and shows the token, within `deadline`; all others are
    /// refused. The port is closed afterwards.
    ///
    /// # Errors
    /// [`DirectError::NoClient`], or [`DirectError::Refused`] if there were only wrong ones.
    pub fn accept(self, deadline: Duration) -> Result<Connection, DirectError> {
        let until = Instant::now() + deadline;
        let port = self.offer.port;
        let mut error = DirectError::NoClient { port, waited: deadline };
        while let Some((socket, peer)) = self.next_client(until) {
            match self.greet(socket, until.min(Instant::now() + GREETING)) {
                Ok(connection) => return Ok(connection),
                Err(refusal) => {
                    tracing::warn!("{peer} was refused on port {port}: {refusal}");
                    error = DirectError::Refused { port, peer, refusal };
                }
            }
        }
        Err(error)
    }

    fn next_client(&self, until: Instant) -> Option<(TcpStream, SocketAddr)> {
        loop {
            let left =
                until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            let left = Timespec::try_from(left).ok()?;
            let ready = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left));
            match ready.map_err(io::Error::from).and_then(|_| self.socket.accept()) {
                Ok((socket, peer)) => {
                    return socket.set_nonblocking(false).ok().map(|()| (socket, peer));
                }
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // It is gone already, or there are no descriptors: the next one may have more luck.
                Err(err) => {
                    tracing::warn!("accept on port {}: {err}", self.offer.port);
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn greet(&self, socket: TcpStream, until: Instant) -> Result<Connection, Refusal> {
        let mut stream = self.accepting.accept(socket, until)?;
        let mut token = [0; 32];
        stream.read_exact(&mut token).map_err(tls::refusal)?;
        // Every byte is looked at, however many are wrong.
        let different = token.iter().zip(&self.offer.token).fold(0, |sum, (a, b)| sum | (a ^ b));
        if different != 0 {
            stream.refuse();
            return Err(Refusal::WrongToken);
        }
        stream.write_all(&[WELCOME]).map_err(tls::refusal)?;
        stream.split().map_err(|err| Refusal::Broken(err.to_string()))
    }
}

/// Connects to the first of `addresses` where the listener that made `offer` answers; each address's port is the offer's.
///
/// # Errors
/// [`DirectError::Connect`] if nobody answers, [`DirectError::Answered`] if it is not the listener or lets nobody in.
pub fn dial(
    addresses: &[IpAddr],
    identity: &Identity,
    offer: &Offer,
    timeout: Duration,
) -> Result<Connection, DirectError> {
    let until = Instant::now() + timeout;
    let dialing = tls::Dialing::new(identity, offer.certificate)?;
    let (mut attempts, mut answered) = (Vec::new(), None);
    for (at, address) in addresses.iter().enumerate() {
        let address = SocketAddr::new(*address, offer.port);
        let left = until.saturating_duration_since(Instant::now());
        let others = u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        let share = (left / others).max(Duration::from_millis(1)); // an address that swallows packets must not use it all
        match TcpStream::connect_timeout(&address, share) {
            Err(err) => attempts.push((address, err)),
            Ok(socket) => match introduce(&dialing, socket, offer, until) {
                Ok(connection) => return Ok(connection),
                Err(refusal) => answered = Some(DirectError::Answered { address, refusal }),
            },
        }
    }
    Err(answered.unwrap_or(DirectError::Connect { attempts }))
}

fn introduce(
    dialing: &tls::Dialing,
    socket: TcpStream,
    offer: &Offer,
    until: Instant,
) -> Result<Connection, Refusal> {
    let mut stream = dialing.dial(socket, until)?;
    stream.write_all(&offer.token).map_err(tls::refusal)?;
    let mut welcome = [0];
    stream.read_exact(&mut welcome).map_err(tls::refusal)?;
    if welcome != [WELCOME] {
        return Err(Refusal::ByPeer("it did not say welcome".into()));
    }
    stream.split().map_err(|err| Refusal::Broken(err.to_string()))
}
