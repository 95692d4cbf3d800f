//! The direct way: who is let in, who is not, and what each side is told.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pgthaw_mover::{
    ACCEPT_LIMIT, Answer, Connection, CopyFile, DirectError, Directory, Fingerprint, Heartbeat,
    Identity, ListenAt, Listener, Met, Offer, Order, Place, Refusal, RemoteOptions, RemoteTarget,
    Reuse, Target, TargetDirectory, dial, lead, meet as meet_as_asked, receive,
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

/// A side that does what it is asked, and the line to it.
struct Side {
    line: BufReader<UnixStream>,
    met: JoinHandle<io::Result<Met>>,
}

impl Side {
    fn new() -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        let (input, output) = (far.try_clone().unwrap(), far);
        let [input, output] = [input, output].map(|end| File::from(OwnedFd::from(end)));
        let closer = near.try_clone().unwrap();
        let close = move || drop(closer.shutdown(std::net::Shutdown::Both));
        let met = thread::spawn(move || meet_as_asked(input, output, close));
        Self { line: BufReader::new(near), met }
    }

    fn order(&mut self, order: &Order) {
        let line = serde_json::to_string(order).unwrap();
        writeln!(self.line.get_mut(), "{line}").unwrap();
    }

    fn answer(&mut self) -> Answer {
        let mut line = String::new();
        self.line.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|err| panic!("{err}: {line}"))
    }

    fn introduce(&mut self) -> Fingerprint {
        self.order(&Order::Introduce);
        match self.answer() {
            Answer::Introduced(certificate) => certificate,
            other => panic!("{other:?}"),
        }
    }

    fn listen(&mut self, peer: Fingerprint) -> Offer {
        self.order(&Order::Listen { address: HERE, ports: (0, 0), peer, limit: ACCEPT_LIMIT });
        match self.answer() {
            Answer::Listening(offer) => offer,
            other => panic!("{other:?}"),
        }
    }

    fn met(self) -> io::Result<Met> {
        self.met.join().unwrap()
    }
}

/// A note gets from the one end to the other.
fn assert_connected(sending: Connection, receiving: Connection) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("export");
    let receiver = thread::spawn(move || {
        let target = TargetDirectory::create(&path, "s").unwrap();
        receive(Ok(&target), receiving, Heartbeat::default())
    });
    let target = RemoteTarget::new(RemoteOptions::default(), |_| {});
    target.connect(sending);
    target.keep_note("crm", "it works").unwrap();
    drop(target);
    receiver.join().unwrap().unwrap();
}

#[test]
fn two_sides_meet_as_they_are_asked() {
    let mut sides = [Side::new(), Side::new()];
    let certificates = sides.each_mut().map(Side::introduce);
    // Nobody listens there any more.
    let stale = Pair::new().listen().offer().clone();
    sides[0].order(&Order::Dial { address: HERE, offer: stale });
    let answer = sides[0].answer();
    assert!(matches!(&answer, Answer::Failed(why) if why.contains("connect to 127.0.0.1")));
    // Of two connections, the other way round, the later one is used.
    for listener in [0, 1] {
        let dialer = 1 - listener;
        let offer = sides[listener].listen(certificates[dialer]);
        sides[dialer].order(&Order::Dial { address: HERE, offer: offer.clone() });
        let answers = sides.each_mut().map(Side::answer);
        assert!(matches!(answers, [Answer::Connected, Answer::Connected]), "{answers:?}");
        assert!(TcpStream::connect((HERE, offer.port)).is_err(), "the port is closed");
    }
    sides.iter_mut().for_each(|side| side.order(&Order::Direct));
    let lines = sides.each_ref().map(|side| side.line.get_ref().try_clone().unwrap());
    let [one, other] = sides.map(|side| side.met().unwrap());
    assert!(one.line.is_some() && other.line.is_some());
    // The end of its line ends a connection that is told to end with it.
    other.connection.end_with(other.line.unwrap());
    assert_connected(one.connection, other.connection);
    drop(lines);
}

#[test]
fn a_connection_may_end_with_its_line() {
    let mut sides = [Side::new(), Side::new()];
    let certificates = sides.each_mut().map(Side::introduce);
    let offer = sides[0].listen(certificates[1]);
    sides[1].order(&Order::Dial { address: HERE, offer });
    sides.iter_mut().for_each(|side| assert!(matches!(side.answer(), Answer::Connected)));
    sides.iter_mut().for_each(|side| side.order(&Order::Direct));
    let line = sides[1].line.get_ref().try_clone().unwrap();
    let [_one, other] = sides.map(|side| side.met().unwrap());
    other.connection.end_with(other.line.unwrap());
    let dir = tempfile::tempdir().unwrap();
    let target = TargetDirectory::create(dir.path(), "s").unwrap();
    thread::scope(|threads| {
        let receiver =
            threads.spawn(|| receive(Ok(&target), other.connection, Heartbeat::default()));
        line.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(receiver.join().unwrap().is_err());
    });
}

#[test]
fn a_line_that_makes_no_sense_is_no_connection() {
    let mut early = Side::new();
    early.order(&Order::Direct);
    assert_eq!(early.met().unwrap_err().kind(), io::ErrorKind::NotConnected);
    for said in [&b""[..], b"GET / HTTP/1.1\n", b"{\"introduce\"", &[b'x'; 5000]] {
        let mut side = Side::new();
        let line = side.line.get_mut();
        let _ = line.write_all(said); // it may have ended before it has heard all
        let _ = line.shutdown(std::net::Shutdown::Write);
        assert!(side.met().is_err(), "{said:?}");
    }
    let mut relayed = Side::new();
    relayed.order(&Order::Relay);
    let line = relayed.line.get_ref().try_clone().unwrap();
    let met = relayed.met().unwrap();
    assert!(met.line.is_none());
    assert_connected(met.connection, Connection::of_unix(line).unwrap());
}

/// What a side that leads has come to with one that does what it is asked.
fn led(listen_at: Result<ListenAt, String>) -> (Met, Met, Result<u16, String>) {
    let Side { line, met } = Side::new();
    let closer = line.into_inner();
    let line = File::from(OwnedFd::from(closer.try_clone().unwrap()));
    let close = move || drop(closer.shutdown(std::net::Shutdown::Both));
    let (leading, port) = lead(line.try_clone().unwrap(), line, listen_at, close).unwrap();
    (leading, met.join().unwrap().unwrap(), port)
}

#[test]
fn a_side_that_leads_connects_directly() {
    let (leading, asked, port) = led(Ok(ListenAt { address: HERE, ports: (0, 0) }));
    assert!(TcpStream::connect((HERE, port.unwrap())).is_err(), "the port is closed");
    assert!(leading.line.is_some() && asked.line.is_some());
    assert_connected(leading.connection, asked.connection);
}

#[test]
fn a_side_that_leads_uses_the_line_where_it_cannot_connect() {
    let taken = TcpListener::bind((HERE, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let strange = "192.0.2.1".parse().unwrap(); // TEST-NET-1 (RFC 5737): no address of this machine
    let cases = [
        (Err("not wanted".to_owned()), "not wanted"),
        (Ok(ListenAt { address: HERE, ports: (port, port) }), "in use"),
        (Ok(ListenAt { address: strange, ports: (0, 0) }), "listen on 192.0.2.1"),
    ];
    for (listen_at, reason) in cases {
        let (leading, asked, port) = led(listen_at);
        let why = port.unwrap_err();
        assert!(why.contains(reason), "{why}");
        assert!(leading.line.is_none() && asked.line.is_none());
        assert_connected(leading.connection, asked.connection);
    }
}

#[test]
fn a_side_that_leads_is_not_deceived() {
    let offer = Pair::new().listen().offer().clone(); // nobody listens there any more
    let certificate = offer.certificate;
    let introduced = Answer::Introduced(certificate);
    let failed = Answer::Failed("nobody came".into());
    let (any, one) = ((0, 0), (offer.port, offer.port));
    let other = if offer.port == 1 { (2, 2) } else { (1, offer.port - 1) };
    let listening = Answer::Listening(offer);
    let cases = [
        (any, vec![], None),
        (any, vec![Answer::Connected], None),
        (any, vec![introduced.clone(), Answer::Connected], None),
        (any, vec![introduced.clone(), listening.clone(), introduced.clone()], None),
        (other, vec![introduced.clone(), listening.clone(), failed.clone()], None),
        (one, vec![introduced, listening, failed], Some("connect to 127.0.0.1")),
    ];
    for (ports, answers, reason) in cases {
        let (near, far) = UnixStream::pair().unwrap();
        for answer in &answers {
            writeln!(&far, "{}", serde_json::to_string(answer).unwrap()).unwrap();
        }
        far.shutdown(std::net::Shutdown::Write).unwrap();
        let line = File::from(OwnedFd::from(near));
        let listen_at = ListenAt { address: HERE, ports };
        match (lead(line.try_clone().unwrap(), line, Ok(listen_at), || {}), reason) {
            (Ok((_, Err(why))), Some(reason)) => assert!(why.contains(reason), "{why}"),
            (Err(_), None) => {}
            (other, _) => panic!("{answers:?}: {other:?}"),
        }
    }
}
