//! Read-ahead: few round trips where objects are read in sequence, few bytes where they are not.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pgthaw_source::map::ObjectId;
use pgthaw_source::store::{MemoryStore, ObjectStore, RemoteOptions};
use proptest::prelude::*;

use crate::support::*;

const STEP: u64 = 16 * KIB;

#[test]
fn sequential_reads_hardly_wait_for_round_trips() {
    let size = 32 * MIB;
    let store = memory(&[size, size]);
    let remote = remote(options());
    connect(&remote, delayed(serving(store), Duration::from_micros(2500)));
    // One at a time: backwards, so that nothing is read ahead.
    let singles = 20;
    let started = Instant::now();
    for number in 1..=singles {
        read(&remote, 1, size - number * MIB, STEP).unwrap();
    }
    let single = started.elapsed() / singles as u32;
    assert!(single >= Duration::from_millis(5), "{single:?}: the link does not delay");
    let before = remote.status();
    assert!(before.bytes_received < (singles + 4) * STEP, "{before:?}");

    let content = content(size, 1);
    let started = Instant::now();
    for start in (0..size).step_by(STEP as usize) {
        let found = read(&remote, 0, start, STEP).unwrap();
        assert!(found == content[start as usize..(start + STEP) as usize], "at {start}");
    }
    let took = started.elapsed();
    let round_trips = took.as_secs_f64() / single.as_secs_f64();
    let reads = size / STEP;
    assert!(round_trips < reads as f64 / 20.0, "{round_trips} round trips for {reads} reads");
    let after = remote.status();
    let requests = after.requests_sent - before.requests_sent;
    assert!(requests <= 200, "{requests} requests");
    let fetched = after.bytes_received - before.bytes_received;
    assert!(fetched <= size + 16 * requests + 4096, "{fetched} bytes for {size}");
}

#[test]
fn scattered_reads_fetch_little_more_than_is_asked_for() {
    let size = 32 * MIB;
    let store = memory(&[size]);
    let content = content(size, 1);
    let remote = connected(store, options());
    let mut place = 1_u64;
    let reads = 500;
    for _ in 0..reads {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let start = (place >> 20) % (size / 8192) * 8192;
        let found = read(&remote, 0, start, 8192).unwrap();
        assert!(found == content[start as usize..start as usize + 8192]);
    }
    let (fetched, wanted) = (remote.status().bytes_received, reads * 8192);
    assert!(fetched <= wanted + wanted / 4, "{fetched} bytes for {wanted}");
}

/// What a `Reader` asks for when it decodes the first so many stored bytes of a file.
fn decode(store: &dyn ObjectStore, object: u32, start: u64, length: u64) -> u64 {
    let (mut done, mut fetch) = (0, STEP);
    while done < length {
        read(store, object, start + done, fetch.min(length - done)).unwrap();
        done += fetch.min(length - done);
        fetch = (2 * fetch).min(256 * KIB);
    }
    length
}

#[test]
fn files_of_a_bundle_and_parts_of_large_files_cost_at_most_twice_their_bytes() {
    let remote = connected(memory(&[20 * MIB, 40 * MIB, 40 * MIB]), options());
    let mut wanted = 0;
    for number in 0..100_u64 {
        let start = number * 7919 % 100 * 200 * KIB;
        wanted += decode(&remote, 0, start, (number * 37 % 120 + 1) * KIB);
    }
    for object in [1, 2] {
        wanted += decode(&remote, object, 0, MIB * u64::from(object));
    }
    let fetched = remote.status().bytes_received;
    assert!(fetched <= 2 * wanted, "{fetched} bytes for {wanted}");
}

#[test]
fn interleaved_sequences_are_each_read_ahead() {
    let size = 4 * MIB;
    let remote = connected(memory(&[3 * size, size, size]), options());
    let places = [(0, 0), (0, size), (0, 2 * size), (1, 0), (2, 0)];
    let contents = [content(3 * size, 1), content(size, 2), content(size, 3)];
    for step in 0..size / STEP {
        for (object, start) in places {
            let start = start + step * STEP;
            let found = read(&remote, object, start, STEP).unwrap();
            let (from, to) = (start as usize, (start + STEP) as usize);
            assert!(found == contents[object as usize][from..to], "object {object} at {start}");
        }
    }
    let status = remote.status();
    assert!(status.requests_sent < 5 * 50, "{} requests", status.requests_sent);
    assert!(status.bytes_received <= 5 * size + 16 * KIB, "{} bytes", status.bytes_received);
}

#[test]
fn nothing_is_read_ahead_behind_an_objects_end() {
    for known in [true, false] {
        let size = MIB + 12_345;
        let remote = connected(memory(&[size]), options());
        if known {
            assert_eq!(remote.length(ObjectId(0)).unwrap(), size);
        }
        for start in (0..size).step_by(STEP as usize) {
            read(&remote, 0, start, STEP.min(size - start)).unwrap();
        }
        let err = read(&remote, 0, size - 10, 20).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::UnexpectedEof);
        assert!(err.to_string().contains("object 0"), "the other end's words: {err}");
        assert_eq!(
            read(&remote, 0, size - 10, 10).unwrap(),
            content(size, 1)[size as usize - 10..]
        );
        assert!(remote.status().bytes_received < size + 4096);
    }
}

#[test]
fn what_is_here_is_not_fetched_again() {
    let size = 2 * MIB;
    let remote = connected(memory(&[size]), options());
    remote.length(ObjectId(0)).unwrap(); // so that nothing behind the end is asked for, whenever the end is met
    let all = |length: u64| {
        for start in (0..size).step_by(length as usize) {
            read(&remote, 0, start, length.min(size - start)).unwrap();
        }
        remote.status().bytes_received
    };
    let once = all(STEP);
    assert_eq!(once, all(STEP));
    assert_eq!(once, all(100_000));
    assert_eq!(once, all(size));
}

/// A store with a part that cannot be read.
struct BadPlace(Arc<MemoryStore>, std::ops::Range<u64>);

impl ObjectStore for BadPlace {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset < self.1.end && offset + buf.len() as u64 > self.1.start {
            return Err(io::Error::other("the disk has a hole"));
        }
        self.0.read_exact_at(object, offset, buf)
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        self.0.length(object)
    }
}

#[test]
fn an_error_fails_the_reads_that_meet_it_and_no_other() {
    let size = 4 * MIB;
    let bad = 2 * MIB + 100..2 * MIB + 200;
    let remote = connected(Arc::new(BadPlace(memory(&[size]), bad.clone())), options());
    let content = content(size, 1);
    for round in 0..2 {
        for start in (0..size).step_by(STEP as usize) {
            let end = start + STEP;
            match read(&remote, 0, start, STEP) {
                Ok(found) => assert!(found == content[start as usize..end as usize]),
                Err(err) => {
                    assert!(start < bad.end && end > bad.start, "round {round}: {err} at {start}");
                    assert_eq!(err.to_string(), "the disk has a hole");
                }
            }
        }
        let err = read(&remote, 0, 2 * MIB, STEP).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Other);
    }
}

#[test]
fn a_lost_connections_read_ahead_is_asked_for_again() {
    let size = 8 * MIB;
    let store = memory(&[size]);
    let content = content(size, 1);
    let remote = remote(options());
    let mut end = connect(&remote, serving(store.clone()));
    for start in (0..size).step_by(STEP as usize) {
        if start % MIB == 0 && start > 0 {
            let next = connect(&remote, serving(store.clone()));
            end.recv_timeout(LONG).unwrap();
            end = next;
        }
        let found = read(&remote, 0, start, STEP).unwrap();
        assert!(found == content[start as usize..(start + STEP) as usize], "at {start}");
    }
    let requests = remote.status().requests_sent;
    assert!(requests < 400, "{requests} requests: it does not recover");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The store behind the link is the model.
    #[test]
    fn reads_are_what_the_other_end_holds(
        cache in prop::sample::select(vec![0, 64 * KIB, MIB, 64 * MIB]),
        reads in prop::collection::vec(
            (0..4_u32, 0..900 * KIB, prop::sample::select(vec![1, 100, 8192, 16_384, 300_000]), 1..9_u64),
            1..40,
        ),
    ) {
        let store = memory(&[800 * KIB, 256 * KIB, 1]);
        let remote = connected(store.clone(), RemoteOptions { cache_bytes: cache, ..options() });
        thread::scope(|scope| {
            for part in reads.chunks(reads.len().div_ceil(3)) {
                let (remote, store) = (&remote, &store);
                scope.spawn(move || {
                    for (object, offset, length, count) in part {
                        for number in 0..*count {
                            let offset = offset + number * length;
                            let found = read(remote, *object, offset, *length);
                            match (found, read(&**store, *object, offset, *length)) {
                                (Ok(found), Ok(held)) => assert!(found == held),
                                (found, held) => assert_eq!(
                                    found.unwrap_err().kind(),
                                    held.unwrap_err().kind()
                                ),
                            }
                        }
                    }
                });
            }
        });
    }
}
