//! The direct way: who is let in, who is not, and what each side is told.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use pgthaw_mover::{
    Connection, CopyFile, DirectError, Directory, Heartbeat, Identity, Listener, Offer, Place,
    Refusal, RemoteOptions, RemoteTarget, Reuse, Target, TargetDirectory, dial, receive,
};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LIMIT: Duration = Duration::from_secs(20);
/// How long a listener waits that never gets the right client.
const SHORT: Duration = Duration::from_millis(400);

struct Pair {
    listening: Identity,
    dialing: Identity,
}

impl Pair {
    fn new() -> Self {
        Self { listening: Identity::new().unwrap(), dialing: Identity::new().unwrap() }
    }

    fn listen(&self) -> Listener {
        Listener::bind(HERE, 0..=0, &self.listening, self.dialing.fingerprint()).unwrap()
    }
}

/// The ends of both sides.
fn meet(
    pair: &Pair,
    deadline: Duration,
    client: impl FnOnce(&Pair, Offer) -> Result<Connection, DirectError> + Send,
) -> (Result<Connection, DirectError>, Result<Connection, DirectError>) {
    let listener = pair.listen();
    let offer = listener.offer().clone();
    thread::scope(|threads| {
        let accepting = threads.spawn(move || listener.accept(deadline));
        let dialed = client(pair, offer);
        (accepting.join().unwrap(), dialed)
    })
}

fn refusal(accepted: Result<Connection, DirectError>) -> Refusal {
    match accepted {
        Err(DirectError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    }
}

fn answered(dialed: Result<Connection, DirectError>) -> Refusal {
    match dialed {
        Err(DirectError::Answered { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dump_goes_the_direct_way() {
    let pair = Pair::new();
    let (accepted, dialed) =
        meet(&pair, LIMIT, |pair, offer| dial(&[HERE], &pair.dialing, &offer, LIMIT));
    let (accepted, dialed) = (accepted.unwrap(), dialed.unwrap());

    let dir = tempfile::tempdir().unwrap();
    let (dump, export) = (dir.path().join("dump"), dir.path().join("export"));
    fs::create_dir(&dump).unwrap();
    let names: Vec<String> = (0..50).map(|at| format!("{at}.dat")).collect();
    for (at, name) in names.iter().enumerate() {
        fs::write(dump.join(name), vec![at as u8; at * 100_000]).unwrap();
    }
    let path = export.clone();
    let receiver = thread::spawn(move || {
        let target = TargetDirectory::create(&path, "s").unwrap();
        receive(Ok(&target), accepted, Heartbeat::default())
    });
    let target = RemoteTarget::new(RemoteOptions::default(), |_| {});
    target.connect(dialed);
    let files: Vec<_> = names.iter().map(|name| CopyFile { name, reuse: Reuse::IfEqual }).collect();
    let source = Directory::open_source(&dump).unwrap();
    let mut progress = |_| ControlFlow::Continue(());
    target.deliver(Place::Database("crm"), &files, &source, &mut progress, &mut |_, _| {}).unwrap();
    drop(target);
    receiver.join().unwrap().unwrap();
    for name in &names {
        let staged = export.join(".pgthaw-s/crm").join(name);
        assert!(fs::read(staged).unwrap() == fs::read(dump.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_wrong_token_is_refused() {
    let pair = Pair::new();
    let other = pair.listen().offer().clone();
    let (accepted, dialed) = meet(&pair, SHORT, |pair, offer| {
        let mut wrong = other;
        wrong.port = offer.port;
        dial(&[HERE], &pair.dialing, &wrong, LIMIT)
    });
    assert_eq!(refusal(accepted), Refusal::WrongToken);
    assert!(matches!(answered(dialed), Refusal::ByPeer(_)));
}

#[test]
fn a_wrong_certificate_is_refused_on_either_side() {
    let pair = Pair::new();
    let stranger = Identity::new().unwrap();
    let (accepted, dialed) = meet(&pair, SHORT, |_, offer| dial(&[HERE], &stranger, &offer, LIMIT));
    assert_eq!(refusal(accepted), Refusal::WrongCertificate);
    let told = answered(dialed);
    assert!(matches!(told, Refusal::ByPeer(_)), "{told:?}");

    let (accepted, dialed) = meet(&pair, SHORT, |pair, offer| {
        let mut wrong = offer;
        wrong.certificate = stranger.fingerprint();
        dial(&[HERE], &pair.dialing, &wrong, LIMIT)
    });
    assert_eq!(answered(dialed), Refusal::WrongCertificate);
    let told = refusal(accepted);
    assert!(matches!(told, Refusal::ByPeer(_)), "{told:?}");
}

#[test]
fn nobody_in_time_is_told() {
    let listener = Pair::new().listen();
    let port = listener.offer().port;
    let begun = Instant::now();
    let error = listener.accept(SHORT).unwrap_err();
    assert!(begun.elapsed() >= SHORT);
    assert!(matches!(error, DirectError::NoClient { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("nobody connected to port {port} within 0.4 s"));
    assert!(TcpStream::connect((HERE, port)).is_err(), "the port is closed afterwards");
}

#[test]
fn a_plain_client_is_refused_and_does_not_keep_the_right_one_out() {
    let pair = Pair::new();
    let plain = |port| {
        let mut plain = TcpStream::connect((HERE, port)).unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let _ = plain.read_to_end(&mut answer); // reset or closed
    };
    let listener = pair.listen();
    let port = listener.offer().port;
    let accepting = thread::spawn(move || listener.accept(SHORT));
    plain(port);
    assert!(matches!(refusal(accepting.join().unwrap()), Refusal::NotTls(_)));

    // One that says nothing, one that is gone at once, one that speaks something else, then the right one.
    let (accepted, dialed) = meet(&pair, LIMIT, |pair, offer| {
        drop(TcpStream::connect((HERE, offer.port)).unwrap());
        plain(offer.port);
        let _silent = TcpStream::connect((HERE, offer.port)).unwrap();
        dial(&[HERE], &pair.dialing, &offer, LIMIT)
    });
    accepted.unwrap();
    dialed.unwrap();
}

#[test]
fn ports_that_cannot_be_had_or_reached_are_named() {
    let taken = TcpListener::bind((HERE, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let pair = Pair::new();
    let error =
        Listener::bind(HERE, port..=port, &pair.listening, pair.dialing.fingerprint()).unwrap_err();
    assert_eq!(error.to_string(), format!("listen on 127.0.0.1, ports {port} to {port}"));

    let offer = pair.listen().offer().clone(); // which nobody listens for any more
    let error = dial(&[HERE], &pair.dialing, &offer, LIMIT).unwrap_err();
    assert!(
        matches!(&error, DirectError::Connect { attempts } if attempts.len() == 1),
        "{error:?}"
    );
    let shown = format!("{offer:?} {:?}", pair.listening);
    assert!(!shown.contains("token:") && !shown.contains("key"), "{shown}");
}
