//! TLS 1.3 between two pinned certificates, and its two halves that can be used at the same time.
//!
//! rustls keeps one state for both directions. It is locked only while records are encrypted or decrypted, never during a
//! read or write of the socket, so that a half that waits does not hold up the other.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    Error, ServerConfig, ServerConnection, SignatureScheme, version::TLS13,
};

use super::{DirectError, Fingerprint, Identity, Refusal, fingerprint_of};
use crate::remote::Connection;

/// The name in every certificate; nobody relies on it.
pub(super) const NAME: &str = "pgthaw";
/// Bytes that are read from the socket at once, and about as many that are written to it.
const PIECE: usize = 256 << 10;
/// Bytes that are encrypted at once. rustls allocates each record and gives all of them back at once: were they 128 KiB or more,
/// malloc would give their memory back to the kernel each time (`M_TRIM_THRESHOLD`, mallopt(3)), for a quarter of what sending takes.
const ENCRYPTED_AT_ONCE: usize = 64 << 10;

/// What one side of every connection needs.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

/// Returns a token that nobody can guess.
pub(super) fn token() -> Result<[u8; 32], DirectError> {
    let mut token = [0; 32];
    let filled = provider().secure_random.fill(&mut token);
    filled.map_err(|_| DirectError::Tls { reason: "no random numbers".into() })?;
    Ok(token)
}

/// Accepts connections of one peer.
#[derive(Debug)]
pub(super) struct Accepting(Arc<ServerConfig>);

impl Accepting {
    pub(super) fn new(identity: &Identity, peer: Fingerprint) -> Result<Self, DirectError> {
        let pinned = Pinned::new(peer);
        let mut config = ServerConfig::builder_with_provider(pinned.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .and_then(|builder| {
                builder
                    .with_client_cert_verifier(Arc::new(pinned))
                    .with_single_cert(vec![identity.certificate.clone()], identity.key())
            })
            .map_err(|err| DirectError::Tls { reason: err.to_string() })?;
        config.send_tls13_tickets = 0; // nobody comes back
        Ok(Self(Arc::new(config)))
    }

    pub(super) fn accept(&self, socket: TcpStream, until: Instant) -> Result<Greeting, Refusal> {
        let tls = ServerConnection::new(self.0.clone()).map_err(refusal_of)?;
        Greeting::shake_hands(tls.into(), socket, until)
    }
}

/// Connects to one peer.
#[derive(Debug)]
pub(super) struct Dialing(Arc<ClientConfig>);

impl Dialing {
    pub(super) fn new(identity: &Identity, peer: Fingerprint) -> Result<Self, DirectError> {
        let pinned = Pinned::new(peer);
        let mut config = ClientConfig::builder_with_provider(pinned.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .and_then(|builder| {
                builder
                    .dangerous() // the certificate itself is pinned
                    .with_custom_certificate_verifier(Arc::new(pinned))
                    .with_client_auth_cert(vec![identity.certificate.clone()], identity.key())
            })
            .map_err(|err| DirectError::Tls { reason: err.to_string() })?;
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    pub(super) fn dial(&self, socket: TcpStream, until: Instant) -> Result<Greeting, Refusal> {
        let name = ServerName::try_from(NAME).map_err(|err| Refusal::Broken(err.to_string()))?;
        let tls = ClientConnection::new(self.0.clone(), name).map_err(refusal_of)?;
        Greeting::shake_hands(tls.into(), socket, until)
    }
}

/// Accepts one certificate and no other, whatever it says.
#[derive(Debug)]
struct Pinned {
    peer: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn new(peer: Fingerprint) -> Self {
        Self { peer, provider: provider() }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        match fingerprint_of(certificate) == self.peer {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Never asked for: TLS 1.2 is not compiled in.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken".into()))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

fn refusal_of(err: Error) -> Refusal {
    match err {
        Error::InvalidCertificate(_) | Error::NoCertificatesPresented => Refusal::WrongCertificate,
        Error::AlertReceived(alert) => Refusal::ByPeer(format!("{alert:?}")),
        other => Refusal::NotTls(other.to_string()),
    }
}

/// Why a read or write before the welcome failed.
pub(super) fn refusal(err: io::Error) -> Refusal {
    if let Some(tls) = err.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        return refusal_of(tls.clone());
    }
    match err.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Refusal::TooSlow,
        io::ErrorKind::UnexpectedEof => Refusal::ByPeer("it closed the connection".into()),
        _ => Refusal::Broken(err.to_string()),
    }
}

/// A connection whose peer has shown its certificate, but not yet the token or the welcome.
pub(super) struct Greeting {
    tls: rustls::Connection,
    socket: Timed,
}

impl fmt::Debug for Greeting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Greeting").finish_non_exhaustive()
    }
}

impl Greeting {
    fn shake_hands(
        mut tls: rustls::Connection,
        socket: TcpStream,
        until: Instant,
    ) -> Result<Self, Refusal> {
        let _ = socket.set_nodelay(true); // it is only faster
        let mut socket = Timed { socket, until };
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).map_err(refusal)?;
        }
        Ok(Self { tls, socket })
    }

    /// Says goodbye to a peer that is not let in.
    pub(super) fn refuse(&mut self) {
        self.tls.send_close_notify();
        let _ = self.tls.complete_io(&mut self.socket); // it is only polite
    }

    /// Takes both halves into use.
    pub(super) fn split(mut self) -> io::Result<Connection> {
        let socket = self.socket.socket;
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        self.tls.set_buffer_limit(None); // bounded by the pieces that are written
        let tls = Arc::new(Mutex::new(self.tls));
        let closer = socket.try_clone()?;
        let reading = Reading {
            tls: tls.clone(),
            socket: socket.try_clone()?,
            records: vec![0; PIECE],
            unused: 0..0,
            ended: false,
        };
        let writing =
            Writing { tls, socket, records: Vec::with_capacity(PIECE + 2 * ENCRYPTED_AT_ONCE) };
        let connection = Connection::new(reading, writing);
        Ok(connection.closed_by(move || drop(closer.shutdown(Shutdown::Both))))
    }
}

impl Read for Greeting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    self.tls.complete_io(&mut self.socket)?;
                }
                read => return read,
            }
        }
    }
}

impl Write for Greeting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.tls.writer().write(bytes)?;
        self.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

/// A socket whose reads and writes all end at one moment.
struct Timed {
    socket: TcpStream,
    until: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<std::time::Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Shared = Arc<Mutex<rustls::Connection>>;

fn lock(tls: &Shared) -> MutexGuard<'_, rustls::Connection> {
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The half that receives.
struct Reading {
    tls: Shared,
    socket: TcpStream,
    /// Records as they came; those that are not decrypted yet are at `unused`.
    records: Vec<u8>,
    unused: std::ops::Range<usize>,
    ended: bool,
}

impl Reading {
    /// Decrypts what is there into `buffer`; `None` if the socket must be read first.
    fn decrypt(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut tls = lock(&self.tls);
        let mut filled = 0;
        loop {
            match tls.reader().read(&mut buffer[filled..]) {
                Ok(0) => return Ok(Some(filled)), // the buffer is full, or the peer has said goodbye
                Ok(count) => filled += count,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    if self.unused.is_empty() && !self.ended {
                        return Ok((filled > 0).then_some(filled));
                    }
                    self.unused.start += tls.read_tls(&mut &self.records[self.unused.clone()])?;
                    tls.process_new_packets()
                        .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))?;
                }
                Err(_) if filled > 0 => return Ok(Some(filled)),
                Err(err) => return Err(err),
            }
        }
    }
}

impl Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(count) = self.decrypt(buffer)? {
                return Ok(count);
            }
            let count = self.socket.read(&mut self.records)?;
            self.unused = 0..count;
            self.ended = count == 0;
        }
    }
}

/// The half that sends. Dropping it says goodbye.
struct Writing {
    tls: Shared,
    socket: TcpStream,
    records: Vec<u8>,
}

impl Writing {
    /// Takes the records that are ready. Nobody else does, so that they stay in order.
    fn take_records(records: &mut Vec<u8>, tls: &mut rustls::Connection) -> io::Result<()> {
        while tls.wants_write() {
            tls.write_tls(records)?;
        }
        Ok(())
    }

    /// Writes the records that are ready.
    fn write_records(&mut self) -> io::Result<()> {
        Self::take_records(&mut self.records, &mut lock(&self.tls))?;
        let written = self.socket.write_all(&self.records);
        self.records.clear();
        written
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut count = 0;
        while count < bytes.len() && self.records.len() < PIECE {
            let next = &bytes[count..bytes.len().min(count + ENCRYPTED_AT_ONCE)];
            let mut tls = lock(&self.tls);
            count += tls.writer().write(next)?;
            Self::take_records(&mut self.records, &mut tls)?;
        }
        self.write_records()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_records()
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        lock(&self.tls).send_close_notify();
        let _ = self.write_records(); // the peer may be gone
    }
}
