//! Only what is read is fetched and decoded, and nothing twice while it fits.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use pgthaw_source::map::{Codec, ObjectId};
use pgthaw_source::reader::{CHUNK, Coverage, Reader};
use pgthaw_source::store::{MemoryStore, ObjectStore};

use crate::support::{CODECS, Stored, content, reader};

const MIB: u64 = 1 << 20;

#[test]
fn the_first_pages_of_a_large_file_cost_little() {
    for codec in CODECS {
        let file = Stored::new(codec, content(12 << 20, 31));
        let ratio = file.encoded.len() as f64 / file.bytes.len() as f64;
        let (reader, store) = reader(&[file], 64 * MIB);
        let mut buf = [0; 8192];
        reader.read_at(0, 0, &mut buf).unwrap();
        let one_chunk = (CHUNK as f64 * ratio) as u64;
        assert!(
            store.bytes_read() <= 2 * one_chunk + 50_000,
            "{codec}: {} bytes for one page",
            store.bytes_read()
        );
        assert!(reader.statistics().decoded_bytes <= CHUNK);

        let offset = 3 * MIB;
        reader.read_at(0, offset, &mut buf).unwrap();
        let needed = (offset as f64 * ratio) as u64;
        let read = store.bytes_read();
        assert!(
            read <= needed + needed / 10 + 600_000,
            "{codec}: {read} bytes, {needed} are needed"
        );
        assert!(reader.statistics().decoded_bytes <= offset + CHUNK);
        assert_eq!(reader.statistics().stored_bytes_read, read, "{codec}: counted wrong");
        assert_eq!(reader.coverage(0), Coverage::Partly);
    }
}

#[test]
fn a_tiny_rest_is_decoded_for_its_digest() {
    let chunk = CHUNK as usize;
    for codec in [Codec::Gzip, Codec::Zlib, Codec::Lz4, Codec::Zstd] {
        let (reader, _) = reader(&[Stored::new(codec, content(4 * chunk - 100, 32))], MIB);
        reader.read_at(0, 0, &mut vec![0; 2 * chunk]).unwrap();
        assert_eq!(reader.coverage(0), Coverage::Partly, "{codec}");
        reader.read_at(0, 2 * CHUNK, &mut [0; 1]).unwrap();
        assert_eq!(reader.coverage(0), Coverage::WholeVerified, "{codec}: the last chunk");
    }
}

#[test]
fn a_small_cache_decodes_again_but_not_from_the_start() {
    let size = 8 << 20;
    for codec in [Codec::Gzip, Codec::Lz4, Codec::Zstd] {
        let file = Stored::new(codec, content(size, 33));
        let (reader, _) = reader(&[file], 4 * CHUNK);
        let mut buf = [0; 8192];
        // Two readers go through the file, one of them far behind the other.
        for step in 0..(size as u64 / 8192) {
            reader.read_at(0, step * 8192, &mut buf).unwrap();
            if step >= 512 {
                reader.read_at(0, (step - 512) * 8192, &mut buf).unwrap();
            }
        }
        let statistics = reader.statistics();
        assert!(statistics.decoded_bytes <= 2 * size as u64, "{codec}: {statistics:?}");
        assert_eq!(statistics.streams_opened, 2, "{codec}");
        assert!(statistics.decoded_again_bytes >= 3 * MIB, "{codec}: {statistics:?}");
    }
}

#[test]
fn many_files_in_turn_keep_their_cursors() {
    let files: Vec<Stored> =
        (0..20).map(|seed| Stored::new(Codec::Lz4, content(2 << 20, seed))).collect();
    let (reader, _) = reader(&files, 4 * MIB);
    let mut buf = [0; CHUNK as usize];
    for step in 0..2 * MIB / CHUNK {
        for file in 0..files.len() {
            reader.read_at(file, step * CHUNK, &mut buf).unwrap();
        }
    }
    let statistics = reader.statistics();
    assert_eq!(
        (statistics.streams_opened, statistics.decoded_again_bytes),
        (20, 0),
        "{statistics:?}"
    );
    assert_eq!(statistics.files_verified, 20);
}

#[test]
fn read_ahead_follows_sequential_reads_only() {
    let bytes = content(8 << 20, 34);
    for codec in [Codec::Gzip, Codec::Lz4, Codec::Zstd] {
        let (sequential, _) = reader(&[Stored::new(codec, bytes.clone())], 64 * MIB);
        let mut buf = vec![0; 128 << 10];
        let (mut waited, mut woken) = (0, 0);
        for step in 0..64_u64 {
            let offset = step * buf.len() as u64;
            match sequential.try_read_at(0, offset, &mut buf) {
                Some(result) => result.unwrap(),
                None => {
                    waited += 1;
                    sequential.read_at(0, offset, &mut buf).unwrap();
                }
            }
            assert!(buf == bytes[offset as usize..][..buf.len()]);
            let decoded = sequential.statistics().decoded_bytes;
            assert!(
                decoded <= 2 * (offset + buf.len() as u64) + CHUNK,
                "{codec}: decoded {decoded} at {offset}"
            );
            if sequential.wants_ahead(0) {
                woken += 1;
                sequential.read_ahead(0);
            }
        }
        assert!(waited < 16, "{codec}: {waited} of 64 sequential reads waited");
        assert!((8..=24).contains(&woken), "{codec}: decoded ahead {woken} times");
        assert!(!sequential.wants_ahead(0), "{codec}: nothing is left");
        assert_eq!(sequential.statistics().decoded_again_bytes, 0, "{codec}");

        let (scattered, _) = reader(&[Stored::new(codec, bytes.clone())], 64 * MIB);
        for step in 0..6_u64 {
            scattered.read_at(0, step * MIB, &mut [0; 8192]).unwrap();
            assert!(!scattered.wants_ahead(0), "{codec}");
            scattered.read_ahead(0);
        }
        assert!(scattered.statistics().decoded_bytes <= 5 * MIB + CHUNK, "{codec}");
    }
}

#[test]
fn several_threads_decode_a_chunk_once() {
    let file = Stored::new(Codec::Gzip, content(4 << 20, 35));
    let bytes = file.bytes.clone();
    let (reader, _) = reader(&[file], 64 * MIB);
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                barrier.wait();
                let mut buf = vec![0; 128 << 10];
                for offset in (0..bytes.len()).step_by(buf.len()) {
                    reader.read_at(0, offset as u64, &mut buf).unwrap();
                    assert!(buf == bytes[offset..offset + buf.len()]);
                }
            });
        }
    });
    let statistics = reader.statistics();
    assert_eq!(
        (statistics.decoded_bytes, statistics.decoded_again_bytes),
        (4 * MIB, 0),
        "{statistics:?}"
    );
}

#[test]
fn a_large_file_that_must_be_verified_does_not_fill_the_cache() {
    for codec in CODECS {
        let small = Stored::new(Codec::Gzip, content(100_000, 36));
        let large = Stored::verified_first(codec, content(4 << 20, 37));
        let bytes = large.bytes.clone();
        let (reader, _) = reader(&[small, large], MIB);
        let mut buf = [0; 8192];
        reader.read_at(0, 0, &mut buf).unwrap();
        assert!(reader.try_read_at(1, 0, &mut buf).is_none(), "{codec}: not verified yet");
        reader.read_at(1, 2 * MIB, &mut buf).unwrap();
        assert!(buf == bytes[2 << 20..][..8192], "{codec}");
        assert_eq!(reader.coverage(1), Coverage::WholeVerified, "{codec}");
        assert!(
            reader.try_read_at(0, 0, &mut buf).is_some(),
            "{codec}: the small file is still there"
        );
    }
}

/// A store that stands still on one object.
struct Stalled {
    store: MemoryStore,
    stalled: AtomicBool,
    arrived: mpsc::SyncSender<()>,
}

impl ObjectStore for Stalled {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if object == ObjectId(0) {
            let _ = self.arrived.try_send(());
            while self.stalled.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.store.read_exact_at(object, offset, buf)
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        self.store.length(object)
    }
}

#[test]
fn a_stalled_file_does_not_block_others_nor_the_cache() {
    let files = [
        Stored::new(Codec::Lz4, content(1 << 20, 38)),
        Stored::new(Codec::Lz4, content(1 << 20, 39)),
    ];
    let objects = files.iter().enumerate();
    let objects = objects
        .map(|(number, file)| (ObjectId(number as u32), [&[0; 100], &file.encoded[..]].concat()));
    let (arrived, arrives) = mpsc::sync_channel(1);
    let store = Arc::new(Stalled {
        store: MemoryStore::new(objects),
        stalled: AtomicBool::new(false),
        arrived,
    });
    let (plain, _) = reader(&files, 0);
    let reader = Reader::new(store.clone(), plain.files().to_vec(), 64 * MIB);
    let mut buf = [0; 8192];
    reader.read_at(0, 0, &mut buf).unwrap();
    arrives.recv().unwrap();
    store.stalled.store(true, Ordering::Relaxed);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| reader.read_at(0, 1_000_000, &mut [0; 8192]));
        arrives.recv_timeout(Duration::from_secs(20)).unwrap();
        reader.read_at(1, 500_000, &mut buf).unwrap();
        reader.try_read_at(0, 8192, &mut buf).unwrap().unwrap();
        assert!(reader.try_read_at(0, 900_000, &mut buf).is_none());
        reader.read_at(0, 8192, &mut buf).unwrap();
        reader.read_ahead(0);
        assert!(!waiting.is_finished());
        store.stalled.store(false, Ordering::Relaxed);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn uncompressed_reads_that_come_out_of_order_still_reach_the_digest() {
    let size = 4 << 20;
    let (sequential, store) = reader(&[Stored::new(Codec::None, content(size, 40))], 0);
    let mut buf = vec![0; 128 << 10];
    for pair in (0..size as u64).step_by(256 << 10).skip(1) {
        sequential.read_at(0, pair - (256 << 10), &mut buf).unwrap(); // two parts, the second one first
        sequential.read_at(0, pair + (128 << 10), &mut buf).unwrap();
        sequential.read_at(0, pair - (128 << 10), &mut buf).unwrap();
        sequential.read_at(0, pair, &mut buf).unwrap();
    }
    assert_eq!(sequential.coverage(0), Coverage::WholeVerified);
    assert!(store.bytes_read() < 4 * size as u64);

    let (scattered, store) = reader(&[Stored::new(Codec::None, content(size, 40))], 0);
    for step in 1..100 {
        scattered.read_at(0, (step * 5 % 97) * 40_000, &mut [0; 8192]).unwrap();
    }
    assert_eq!(scattered.coverage(0), Coverage::Partly);
    assert!(
        store.bytes_read() < 100 * 8192 + MIB,
        "scattered reads cost {} bytes",
        store.bytes_read()
    );
}

#[test]
fn a_large_file_read_in_order_does_not_fill_the_cache() {
    const READ: usize = 256 << 10;
    let (small, large) = (content(4 << 20, 38), content(12 << 20, 39));
    let files = [small.clone(), large.clone()].map(|bytes| Stored::new(Codec::Lz4, bytes));
    let (reader, _) = reader(&files, 32 * MIB);
    let decoded = || reader.statistics().decoded_bytes;
    let read = |file: usize, offset: usize, length: usize| {
        let mut buf = vec![0; length];
        reader.read_at(file, offset as u64, &mut buf).unwrap();
        let expected = [&small, &large][file];
        assert!(buf == expected[offset..offset + length], "{file} at {offset}");
    };
    (0..small.len()).step_by(READ).for_each(|offset| read(0, offset, READ));
    (0..large.len()).step_by(READ).for_each(|offset| read(1, offset, READ));
    let once = decoded();
    assert_eq!(once, (small.len() + large.len()) as u64);
    (0..small.len()).step_by(READ).for_each(|offset| read(0, offset, READ));
    read(1, large.len() - 3 * READ, 3 * READ);
    assert_eq!(decoded(), once, "a small file and what was read last stay");
    read(1, large.len() / 2, READ);
    assert!(decoded() > once, "what was passed is gone");
}

#[test]
fn pages_that_a_read_in_order_leaves_out_stay_decoded() {
    let size = 12 << 20;
    let (reader, _) = reader(&[Stored::new(Codec::Lz4, content(size, 40))], 32 * MIB);
    let page = 8192;
    let mut buf = vec![0; CHUNK as usize - page];
    for chunk in 0..size as u64 / CHUNK {
        reader.read_at(0, chunk * CHUNK, &mut buf).unwrap();
    }
    let once = reader.statistics().decoded_bytes;
    for chunk in 0..size as u64 / CHUNK {
        reader.read_at(0, (chunk + 1) * CHUNK - page as u64, &mut buf[..page]).unwrap();
    }
    assert_eq!(reader.statistics().decoded_bytes, once);
}
