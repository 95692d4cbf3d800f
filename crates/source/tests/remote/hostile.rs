//! Peers that break the protocol, in both directions: the connection ends, and no byte is wrong.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pgthaw_source::store::{ObjectStore, serve};
use proptest::prelude::*;

use crate::support::frame::*;
use crate::support::*;

/// Lets `store` be asked by somebody who sends `bytes` and then waits; returns how serving ended, and what was answered.
fn asked(store: Arc<dyn ObjectStore>, bytes: &[u8]) -> (io::Result<()>, Vec<u8>) {
    let (mut here, there) = UnixStream::pair().unwrap();
    let serving = thread::spawn(move || {
        let result = serve(store, there.try_clone().unwrap(), &there, 2);
        let _ = there.shutdown(Shutdown::Both);
        result
    });
    let _ = here.write_all(bytes); // it may hang up before all is sent
    here.shutdown(Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    let _ = here.read_to_end(&mut answers);
    (serving.join().expect("no panic"), answers)
}

fn greeted(frames: &[&[u8]]) -> Vec<u8> {
    [GREETING as &[u8]].into_iter().chain(frames.iter().copied()).flatten().copied().collect()
}

#[test]
fn bad_requests_end_the_connection() {
    let mut odd = request(EXACT, 0, 1, 0, 10);
    odd[2] = 1;
    let cases = [
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec(), ErrorKind::InvalidData),
        ("another version", b"pgtread\x02".to_vec(), ErrorKind::InvalidData),
        ("an unknown kind", greeted(&[&request(9, 0, 1, 0, 10)]), ErrorKind::InvalidData),
        ("too long a range", greeted(&[&request(EXACT, 0, 1, 0, 1 << 20)]), ErrorKind::InvalidData),
        ("all of memory", greeted(&[&request(UP_TO, 0, 1, 0, u32::MAX)]), ErrorKind::InvalidData),
        ("bytes that mean nothing", greeted(&[&odd]), ErrorKind::InvalidData),
        ("half a greeting", GREETING[..5].to_vec(), ErrorKind::UnexpectedEof),
        ("half a request", greeted(&[&request(EXACT, 0, 1, 0, 10)[..9]]), ErrorKind::UnexpectedEof),
    ];
    for (name, bytes, kind) in cases {
        let (ended, answers) = asked(memory(&[100]), &bytes);
        assert_eq!(ended.expect_err(name).kind(), kind, "{name}");
        assert!(GREETING.starts_with(&answers) || answers == GREETING, "{name}: {answers:?}");
    }
    let (ended, _) = asked(memory(&[100]), GREETING);
    ended.expect("somebody who only greets and leaves does no harm");
}

#[test]
fn impossible_ranges_are_errors_of_that_read() {
    let store = memory(&[100]);
    let (mut here, there) = UnixStream::pair().unwrap();
    thread::spawn(move || serve(store, there.try_clone().unwrap(), there, 2));
    let frames = [
        request(EXACT, 0, 1, u64::MAX, 10),
        request(EXACT, u32::MAX, 2, 0, 10),
        request(UP_TO, 0, 3, u64::MAX, 256 * 1024),
        request(UP_TO, 0, 4, 90, 256 * 1024),
        request(EXACT, 0, 5, 90, 0),
    ];
    here.write_all(GREETING).unwrap();
    here.read_exact(&mut [0; 8]).unwrap();
    let mut answers = Vec::new();
    for frame in frames {
        here.write_all(&frame).unwrap();
        let mut header = [0; 16];
        here.read_exact(&mut header).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize];
        here.read_exact(&mut bytes).unwrap();
        answers.push((header[0], header[2], bytes));
    }
    let kinds: Vec<_> = answers.iter().map(|(kind, error, _)| (*kind, *error)).collect();
    assert_eq!(kinds, [(3, 3), (3, 1), (BYTES, 0), (BYTES, 0), (BYTES, 0)]);
    assert!(answers[2].2.is_empty() && answers[4].2.is_empty());
    assert_eq!(answers[3].2, content(100, 1)[90..]);
}

#[test]
fn who_asks_and_does_not_listen_costs_little() {
    let store = memory(&[8 * MIB]);
    let (mut here, there) = UnixStream::pair().unwrap();
    let served = store.clone();
    let serving = thread::spawn(move || serve(served, there.try_clone().unwrap(), there, 4));
    here.write_all(GREETING).unwrap();
    for number in 0..500 {
        here.write_all(&request(1 + (number % 2) as u8, 0, number, 0, 256 * 1024)).unwrap();
        here.write_all(&request(4, 0, number, 0, 0)).unwrap();
    }
    until("the first reads", || store.bytes_read() >= MIB);
    let mut before = 0;
    until("a standstill", || {
        let unchanged = before == store.bytes_read();
        before = store.bytes_read();
        thread::sleep(Duration::from_millis(50));
        unchanged
    });
    assert!(store.bytes_read() <= 4 * MIB, "{} bytes are held", store.bytes_read());
    here.shutdown(Shutdown::Both).unwrap();
    let _ = serving.join().unwrap(); // returns, with an error or without
}

/// Connects to a peer that greets, waits for the first request and answers with these bytes.
fn answered(bytes: &[u8]) -> String {
    let remote = remote(options());
    let (here, mut there) = UnixStream::pair().unwrap();
    let end = connect(&remote, here);
    let problem = thread::scope(|scope| {
        let reading = scope.spawn(|| read(&remote, 0, 5, 10));
        there.write_all(GREETING).unwrap();
        there.read_exact(&mut [0; 8 + 32]).unwrap();
        there.write_all(bytes).unwrap();
        there.shutdown(Shutdown::Write).unwrap();
        end.recv_timeout(LONG).expect("the connection ends");
        let problem = remote.status().problem.unwrap_or_default();
        connect(&remote, serving(memory(&[100])));
        assert_eq!(reading.join().unwrap().unwrap(), content(100, 1)[5..15], "{problem}");
        problem
    });
    assert!(remote.status().bytes_received < 100_000);
    problem
}

#[test]
fn bad_answers_end_the_connection_and_the_read_goes_on() {
    let ten = [7; 10];
    let cases = [
        ("an unknown request", answer(BYTES, 77, 10, &ten), "not open"),
        ("request 0", answer(BYTES, 0, 10, &ten), "not open"),
        ("too few bytes", answer(BYTES, 1, 9, &ten[..9]), "not asked for"),
        ("no bytes", answer(BYTES, 1, 0, &[]), "not asked for"),
        ("too many bytes", answer(BYTES, 1, 11, &[7; 11]), "not asked for"),
        ("bytes without end", answer(BYTES, 1, u32::MAX, &[7; 500]), "4294967295 bytes"),
        ("a length instead", answer(LENGTH, 1, 8, &[7; 8]), "instead of a range"),
        ("an unknown kind", answer(9, 1, 10, &ten), "unknown kind 9"),
        ("a pong nobody asked for", answer(PONG, 5, 0, &[]), "ping 5"),
        ("a text without end", answer(3, 1, 1 << 30, &[65; 500]), "1073741824 bytes"),
        ("half an answer", answer(BYTES, 1, 10, &ten[..4]), "closed the connection"),
        ("an error without a request", answer(3, 2, 10, &ten), "not open"),
    ];
    for (name, bytes, problem) in cases {
        let found = answered(&bytes);
        assert!(found.contains(problem), "{name}: {found}");
    }
}

#[test]
fn a_second_answer_ends_the_connection() {
    let remote = remote(options());
    let (here, mut there) = UnixStream::pair().unwrap();
    let end = connect(&remote, here);
    there.write_all(&greeted(&[])).unwrap();
    thread::scope(|scope| {
        let reading = scope.spawn(|| read(&remote, 0, 5, 3));
        there.read_exact(&mut [0; 8 + 32]).unwrap();
        let once = answer(BYTES, 1, 3, b"abc");
        there.write_all(&[once.clone(), once].concat()).unwrap();
        assert_eq!(reading.join().unwrap().unwrap(), b"abc");
    });
    end.recv_timeout(LONG).expect("the connection ends");
}

#[test]
fn a_peer_of_another_kind_is_named() {
    let (mut here, there) = UnixStream::pair().unwrap();
    let remote = remote(options());
    let end = connect(&remote, there);
    here.write_all(b"SSH-2.0-OpenSSH_9.6\r\n").unwrap();
    end.recv_timeout(LONG).unwrap();
    let status = remote.status();
    assert!(!status.connected && status.problem.unwrap().contains("does not greet"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_survived_by_the_server(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let (ended, _) = asked(memory(&[100]), &greeted(&[&bytes]));
        if bytes.len() >= 32 {
            prop_assert!(ended.is_err() || bytes[0] <= 4);
        }
    }

    #[test]
    fn any_bytes_are_survived_by_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        answered(&bytes);
    }

    #[test]
    fn a_damaged_answer_is_survived_by_the_reader(place in 0..14_usize, byte: u8) {
        // Only headers: bytes on the way are the transport's to protect.
        let mut bytes = answer(BYTES, 1, 11, &[7; 11]);
        bytes[place] = byte;
        if bytes[..16] != answer(BYTES, 1, 10, &[])[..16] && bytes[0] != 3 {
            answered(&bytes);
        }
    }
}
