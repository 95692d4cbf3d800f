//! Links that break, stall or fall silent: reads wait, and get the right bytes in the end.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pgthaw_source::map::ObjectId;
use pgthaw_source::store::{ObjectStore, RemoteOptions, RemoteStore};

use crate::support::*;

/// A short exchange of every kind of request.
fn exchange(store: &dyn ObjectStore, content: &[u8]) {
    assert_eq!(read(store, 0, 3, 10).unwrap(), content[3..13]);
    assert_eq!(store.length(ObjectId(0)).unwrap(), content.len() as u64);
    assert_eq!(read(store, 0, 13, 7).unwrap(), content[13..20], "with read-ahead behind it");
    assert_eq!(read(store, 0, 95, 10).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert_eq!(read(store, 9, 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_connection_may_be_cut_at_every_byte() {
    const ENOUGH: usize = 100_000;
    let store = memory(&[100]);
    let content = content(100, 1);
    let mut exchanges_cut = 0;
    for (name, cuts) in [("up", 0..8 + 7 * 32), ("down", 0..400)] {
        for place in cuts {
            let remote = remote(options());
            let (up, down) = if name == "up" { (place, ENOUGH) } else { (ENOUGH, place) };
            let end = connect(&remote, cut(serving(store.clone()), up, down));
            thread::scope(|scope| {
                let reading = scope.spawn(|| exchange(&remote, &content));
                until("the cut or the last answer", || {
                    reading.is_finished() || end.try_recv().is_ok()
                });
                exchanges_cut += u32::from(!reading.is_finished());
                connect(&remote, serving(store.clone()));
                reading.join().unwrap_or_else(|_| panic!("{name} {place}"));
            });
        }
    }
    assert!(exchanges_cut > 300, "only {exchanges_cut} exchanges were cut");
}

#[test]
fn reads_of_many_threads_survive_a_link_that_breaks_all_the_time() {
    let lengths = [3 * MIB, 3 * MIB + 777, 100];
    let store = memory(&lengths);
    let remote = remote(RemoteOptions { cache_bytes: MIB, ..options() });
    let done = AtomicBool::new(false);
    let connections = AtomicU64::new(0);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..6_u32)
            .map(|reader| {
                let (remote, object) = (&remote, reader % 2);
                scope.spawn(move || {
                    let content = content(lengths[object as usize], u64::from(object) + 1);
                    let step = [16 * KIB, 100_000, MIB + 1][reader as usize / 2];
                    for start in (0..content.len() as u64).step_by(step as usize) {
                        let length = step.min(content.len() as u64 - start);
                        let found = read(remote, object, start, length).unwrap();
                        let (from, to) = (start as usize, (start + length) as usize);
                        assert!(found == content[from..to], "{length} bytes at {start}");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let number = connections.fetch_add(1, Ordering::Relaxed);
                let down = 300_000 + (number as usize * 77_777) % 700_000;
                let end = connect(&remote, cut(serving(store.clone()), 100_000, down));
                while end.recv_timeout(Duration::from_millis(5)).is_err()
                    && !done.load(Ordering::Relaxed)
                {}
            }
        });
        let results: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    let connections = connections.into_inner();
    assert!(connections > 5, "the link broke only {connections} times");
}

#[test]
fn a_slow_object_holds_up_no_other() {
    let gated = Gated::new(memory(&[100, 4 * MIB, 100]), &[1]);
    let remote = connected(gated.clone(), options());
    thread::scope(|scope| {
        let slow = scope.spawn(|| read(&remote, 1, 5, 10));
        until("the slow read", || gated.waiting(1) == 1);
        for offset in [0, 50, 99] {
            assert_eq!(read(&remote, 0, offset, 1).unwrap(), [content(100, 1)[offset as usize]]);
        }
        assert_eq!(read(&remote, 2, 0, 100).unwrap(), content(100, 3));
        assert!(!slow.is_finished());
        gated.open();
        assert_eq!(slow.join().unwrap().unwrap(), content(4 * MIB, 2)[5..15]);
    });
}

#[test]
fn a_read_that_shares_bytes_with_one_that_fails_does_not_fail() {
    let gated = Gated::new(memory(&[100]), &[0]);
    let remote = connected(gated.clone(), options());
    thread::scope(|scope| {
        let too_far = scope.spawn(|| read(&remote, 0, 80, 30));
        until("the read that will fail", || gated.waiting(0) == 1);
        let inside = scope.spawn(|| read(&remote, 0, 85, 10));
        thread::sleep(Duration::from_millis(50)); // so that most likely it waits for the same answer
        gated.open();
        let err = too_far.join().unwrap().unwrap_err();
        assert_eq!(err.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(inside.join().unwrap().unwrap(), content(100, 1)[85..95]);
    });
}

#[test]
fn a_read_without_a_connection_waits_up_to_the_stall_limit() {
    let limit = Duration::from_millis(150);
    let remote = remote(RemoteOptions::new(limit));
    let started = Instant::now();
    let err = read(&remote, 0, 0, 10).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::TimedOut);
    assert!(started.elapsed() >= limit);
    let year = jiff::Timestamp::now().strftime("%Y-").to_string();
    let text = err.to_string();
    assert!(text.contains(&format!("could not be reached since {year}")), "{text}");
    assert_eq!(remote.length(ObjectId(0)).unwrap_err().kind(), ErrorKind::TimedOut);
    connect(&remote, serving(memory(&[10])));
    assert_eq!(read(&remote, 0, 0, 10).unwrap(), content(10, 1), "a later read is a new one");
    assert_eq!(remote.status().requests_sent, 1, "what was given up is not sent");
}

#[test]
fn a_read_without_an_answer_waits_up_to_the_stall_limit() {
    let gated = Gated::new(memory(&[10, 10]), &[0]);
    let remote = connected(gated.clone(), RemoteOptions::new(Duration::from_millis(150)));
    assert_eq!(read(&remote, 1, 0, 10).unwrap(), content(10, 2));
    let err = read(&remote, 0, 0, 10).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::TimedOut);
    assert!(err.to_string().contains("did not answer within 0.15 s"), "{err}");
    gated.open();
    for _ in 0..3 {
        // The late answer comes meanwhile, and harms nobody.
        assert_eq!(read(&remote, 0, 0, 10).unwrap(), content(10, 1));
        assert_eq!(read(&remote, 1, 3, 4).unwrap(), content(10, 2)[3..7]);
    }
    assert_eq!(remote.status().problem, None);
}

#[test]
fn an_abort_ends_all_reads() {
    let gated = Gated::new(memory(&[10, 10]), &[0]);
    let remote = connected(gated.clone(), options());
    assert_eq!(read(&remote, 1, 0, 10).unwrap(), content(10, 2));
    thread::scope(|scope| {
        let remote = &remote;
        let reads: Vec<_> = (0..3).map(|at| scope.spawn(move || read(remote, 0, at, 2))).collect();
        let length = scope.spawn(|| read(remote, 0, 0, 0));
        until("the reads", || gated.waiting(0) >= 1);
        remote.abort();
        for read in reads {
            let err = read.join().unwrap().unwrap_err();
            assert_eq!(err.kind(), ErrorKind::ConnectionAborted);
        }
        let _ = length.join().unwrap(); // either
    });
    for object in [0, 1] {
        assert_eq!(read(&remote, object, 0, 10).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
    let (here, mut there) = UnixStream::pair().unwrap();
    let err = remote.connect(here.try_clone().unwrap(), here, || {}).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionAborted);
    assert_eq!(there.read(&mut [0; 10]).unwrap(), 0, "a connection that comes too late is dropped");
    gated.open();
}

#[test]
fn a_new_connection_takes_the_old_ones_place() {
    let store = memory(&[10]);
    let gated = Gated::new(store.clone(), &[0]);
    let remote = remote(options());
    let end = connect(&remote, serving(gated.clone()));
    thread::scope(|scope| {
        let reading = scope.spawn(|| read(&remote, 0, 0, 10));
        until("the read", || gated.waiting(0) == 1);
        let second = connect(&remote, serving(store));
        end.recv_timeout(LONG).expect("the old connection ends");
        assert_eq!(reading.join().unwrap().unwrap(), content(10, 1));
        assert!(second.try_recv().is_err());
        gated.open();
    });
}

#[test]
fn changes_are_told() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let remote = RemoteStore::new(options(), move |status| {
        telling.lock().unwrap().push(status.clone());
    });
    assert!(!remote.status().connected);
    let made = remote.status().since;
    for connections in 1..=2 {
        let server = serving(memory(&[1000]));
        let closing = server.try_clone().unwrap();
        let end = connect(&remote, server);
        until("connected", || told.lock().unwrap().len() == 2 * connections - 1);
        assert!(remote.status().connected);
        read(&remote, 0, 400 * connections as u64, 50).unwrap();
        closing.shutdown(std::net::Shutdown::Both).unwrap();
        end.recv_timeout(LONG).unwrap();
        until("lost", || told.lock().unwrap().len() == 2 * connections);
    }
    let told = told.lock().unwrap();
    assert_eq!(
        told.iter().map(|status| status.connected).collect::<Vec<_>>(),
        [true, false, true, false]
    );
    assert!(told.iter().map(|status| status.since).is_sorted() && made <= told[0].since);
    assert!(told[1].problem.as_deref().unwrap().contains("closed the connection"));
    assert_eq!(told[3].bytes_received, 2 * (8 + 16 + 50));
    assert_eq!(told[3].requests_sent, 2);
}

fn impatient() -> RemoteOptions {
    let ping_every = Duration::from_millis(20);
    RemoteOptions { ping_every, silence_limit: Duration::from_millis(400), ..options() }
}

#[test]
fn a_silent_connection_counts_as_broken() {
    for greets in [true, false] {
        for listens in [true, false] {
            let remote = remote(impatient());
            let (here, mut there) = UnixStream::pair().unwrap();
            if greets {
                there.write_all(frame::GREETING).unwrap();
            }
            let mut ears = there.try_clone().unwrap();
            let listening = thread::spawn(move || {
                let mut heard = Vec::new();
                if listens {
                    ears.read_to_end(&mut heard).unwrap();
                }
                heard.len()
            });
            let end = connect(&remote, here);
            thread::scope(|scope| {
                let reading = scope.spawn(|| read(&remote, 0, 0, 10));
                end.recv_timeout(LONG).expect("the silence is noticed");
                let problem = remote.status().problem.unwrap();
                assert!(problem.contains("nothing came"), "{problem}");
                assert!(!remote.status().connected);
                let heard = listening.join().unwrap();
                assert!(!listens || heard > 8 + 32 * 3, "{heard} bytes: no pings");
                connect(&remote, serving(memory(&[10])));
                assert_eq!(reading.join().unwrap().unwrap(), content(10, 1));
            });
        }
    }
}

#[test]
fn a_slow_store_is_not_a_silent_connection() {
    let gated = Gated::new(memory(&[10]), &[0]);
    let remote = remote(impatient());
    let end = connect(&remote, serving(gated.clone()));
    thread::scope(|scope| {
        let reading = scope.spawn(|| read(&remote, 0, 0, 10));
        assert!(end.recv_timeout(3 * impatient().silence_limit).is_err(), "it was given up");
        assert!(remote.status().connected);
        gated.open();
        assert_eq!(reading.join().unwrap().unwrap(), content(10, 1));
    });
}

#[test]
fn a_dropped_store_ends_its_connection() {
    let remote = remote(options());
    let (here, mut there) = UnixStream::pair().unwrap();
    let end = connect(&remote, here);
    drop(remote);
    end.recv_timeout(LONG).unwrap();
    let mut rest = Vec::new();
    let _ = there.read_to_end(&mut rest).unwrap(); // returns: the other end is closed
    assert!(rest.is_empty() || rest == frame::GREETING);
}
