//! Damaged stored bytes are errors that stay, and never wrong bytes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pgthaw_source::map::{Codec, Digest, ObjectId};
use pgthaw_source::reader::{CHUNK, Coverage, ReadError, Reader};
use pgthaw_source::store::{MemoryStore, ObjectStore};
use proptest::prelude::*;

use crate::support::{CODECS, Stored, content, reader};

#[test]
fn a_wrong_digest_fails_the_read_that_reaches_it_and_all_later_ones() {
    for codec in CODECS {
        let mut file = Stored::new(codec, content(1_000_000, 21));
        file.digest = Some(Digest::Sha1([0x11; 20]));
        let bytes = file.bytes.clone();
        let (reader, _) = reader(&[file], 1 << 20);
        let mut buf = vec![0; 200_000];
        for part in 0..3 {
            reader.read_at(0, part * 200_000, &mut buf).unwrap();
            assert!(
                buf == bytes[part as usize * 200_000..][..200_000],
                "pages vouch for themselves"
            );
        }
        assert_eq!(reader.coverage(0), Coverage::Partly);
        // In order, up to the end; for a compressed file a read near the end would do.
        let err = reader
            .read_at(0, 600_000, &mut buf)
            .and(reader.read_at(0, 800_000, &mut buf))
            .unwrap_err();
        let text = err.to_string();
        for part in ["data/base/1/0", "object 0", "SHA1 1111111111111111111111111111111111111111"] {
            assert!(text.contains(part), "{codec}: `{text}` does not name {part}");
        }
        assert!(matches!(err, ReadError::WrongDigest { found, .. } if found.starts_with("SHA1 ")));
        assert!(reader.read_at(0, 0, &mut buf).is_err(), "{codec}: a damaged file is still served");
        assert!(reader.try_read_at(0, 0, &mut buf).unwrap().is_err(), "{codec}");
        assert!(reader.read_whole(0).is_err() && reader.verify_whole(0).is_err());
        assert_eq!((reader.coverage(0), reader.damaged().len()), (Coverage::Damaged, 1));
        assert_eq!(reader.statistics().files_damaged, 1);
    }
}

#[test]
fn every_thread_that_verifies_a_damaged_file_learns_of_it() {
    for codec in CODECS {
        for page_checksums in [true, false] {
            let mut file = Stored { page_checksums, ..Stored::new(codec, content(400_000, 27)) };
            file.digest = Some(Digest::Sha1([0x11; 20]));
            for _ in 0..5 {
                let (reader, _) = reader(std::slice::from_ref(&file), 1 << 20);
                std::thread::scope(|scope| {
                    let threads = [(); 4].map(|()| scope.spawn(|| reader.verify_whole(0)));
                    for thread in threads {
                        assert!(thread.join().unwrap().is_err(), "{codec}");
                    }
                });
                assert_eq!(reader.statistics().files_damaged, 1);
            }
        }
    }
}

#[test]
fn every_kind_of_digest_is_compared() {
    use sha2::Digest as _;
    let bytes = content(200_000, 22);
    let digests = [
        Digest::Crc32c(crc32c::crc32c(&bytes)),
        Digest::Sha2(sha2::Sha224::digest(&bytes).to_vec()),
        Digest::Sha2(sha2::Sha256::digest(&bytes).to_vec()),
        Digest::Sha2(sha2::Sha384::digest(&bytes).to_vec()),
        Digest::Sha2(sha2::Sha512::digest(&bytes).to_vec()),
    ];
    for digest in digests {
        for good in [true, false] {
            let mut file = Stored::verified_first(Codec::Zstd, bytes.clone());
            file.digest = Some(match digest.clone() {
                Digest::Crc32c(crc) => Digest::Crc32c(crc ^ u32::from(!good)),
                Digest::Sha2(mut sha) => {
                    sha[0] ^= u8::from(!good);
                    Digest::Sha2(sha)
                }
                other => other,
            });
            let (reader, _) = reader(&[file], 1 << 20);
            assert_eq!(reader.read_at(0, 0, &mut [0; 10]).is_ok(), good, "{digest:?}");
        }
    }
    let odd =
        Stored { digest: Some(Digest::Sha2(vec![1, 2, 3])), ..Stored::new(Codec::None, bytes) };
    let (reader, _) = reader(&[odd], 1 << 20);
    assert!(reader.read_at(0, 0, &mut [0; 10]).unwrap_err().to_string().contains("no known kind"));
}

#[test]
fn a_map_that_lies_is_refused() {
    type Lie = fn(&mut Stored);
    let cases: [(&str, Codec, Lie); 4] = [
        ("fewer stored bytes than the size", Codec::None, |file| file.bytes.push(0)),
        ("a larger size", Codec::Lz4, |file| file.bytes.push(0)),
        ("a smaller size", Codec::Zstd, |file| file.bytes.truncate(99_999)),
        ("another codec", Codec::Gzip, |file| file.codec = Codec::Lz4),
    ];
    for (name, codec, lie) in cases {
        for page_checksums in [true, false] {
            let mut file =
                Stored { page_checksums, digest: None, ..Stored::new(codec, content(100_000, 23)) };
            lie(&mut file);
            let size = file.bytes.len();
            let (reader, _) = reader(&[file], 1 << 20);
            assert!(reader.read_at(0, 0, &mut vec![0; size]).is_err(), "{name}");
            assert_eq!(reader.coverage(0), Coverage::Damaged, "{name}");
        }
    }
}

#[test]
fn an_object_that_is_too_short_is_damaged() {
    for codec in CODECS {
        let file = Stored::new(codec, content(300_000, 24));
        let (good, _) = reader(std::slice::from_ref(&file), 1 << 20);
        let short = [vec![0xEE; 100], file.encoded[..file.encoded.len() - 1000].to_vec()].concat();
        let store = Arc::new(MemoryStore::new([(ObjectId(0), short)]));
        let reader = Reader::new(store, good.files().to_vec(), 1 << 20);
        let err = reader.verify_whole(0).unwrap_err();
        assert!(
            matches!(&err, ReadError::Damaged { reason, .. } if reason.contains("ends before")),
            "{codec}: {err}"
        );
    }
}

/// A store that can be away, or hold other bytes than before.
struct Moody {
    good: MemoryStore,
    other: MemoryStore,
    away: AtomicBool,
    changed: AtomicBool,
    reads: AtomicUsize,
}

impl ObjectStore for Moody {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.away.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "`/backups/1`: away"));
        }
        let store = if self.changed.load(Ordering::Relaxed) { &self.other } else { &self.good };
        store.read_exact_at(object, offset, buf)
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        self.good.length(object)
    }
}

/// Returns a reader of one file of which, after a change of mood, the part from `offset` on has other bytes.
fn moody(file: &Stored, other: &Stored, cache_bytes: u64) -> (Reader, Arc<Moody>) {
    let object = |file: &Stored| {
        MemoryStore::new([(ObjectId(0), [&[0xEE; 100][..], &file.encoded].concat())])
    };
    let store = Arc::new(Moody {
        good: object(file),
        other: object(other),
        away: AtomicBool::new(false),
        changed: AtomicBool::new(false),
        reads: AtomicUsize::new(0),
    });
    let (plain, _) = reader(std::slice::from_ref(file), 0);
    (Reader::new(store.clone(), plain.files().to_vec(), cache_bytes), store)
}

#[test]
fn a_store_that_was_away_is_read_again() {
    for codec in CODECS {
        for page_checksums in [true, false] {
            let file = Stored { page_checksums, ..Stored::new(codec, content(1_000_000, 25)) };
            let (reader, store) = moody(&file, &file, 1 << 20);
            let mut buf = vec![0; 100_000];
            store.away.store(true, Ordering::Relaxed);
            let err = reader.read_at(0, 0, &mut buf).unwrap_err();
            assert!(
                matches!(&err, ReadError::Stored { source, .. } if source.kind() == io::ErrorKind::TimedOut),
                "{err}"
            );
            store.away.store(false, Ordering::Relaxed);
            for part in 0..10_u64 {
                reader.read_at(0, part * 100_000, &mut buf).unwrap();
                assert!(buf == file.bytes[part as usize * 100_000..][..100_000], "{codec}");
                store.away.store(true, Ordering::Relaxed);
                let _ = reader.verify_whole(0); // fails somewhere in the middle
                store.away.store(false, Ordering::Relaxed);
            }
            assert_eq!(reader.coverage(0), Coverage::WholeVerified, "{codec}");
        }
    }
}

#[test]
fn bytes_that_change_while_they_are_read_are_found() {
    let bytes = content(1_000_000, 26);
    let mut other_bytes = bytes.clone();
    other_bytes[600_000] ^= 1;
    for codec in CODECS {
        let file = Stored::verified_first(codec, bytes.clone());
        let mut other = Stored::verified_first(codec, other_bytes.clone());
        other.encoded.resize(file.encoded.len(), 0); // the map knows the first one's length
        let (reader, store) = moody(&file, &other, 0); // nothing is kept: all is decoded again
        let mut buf = vec![0; 50_000];
        reader.read_at(0, 580_000, &mut buf).unwrap();
        assert!(buf == bytes[580_000..630_000]);
        reader.read_at(0, 900_000, &mut buf).unwrap(); // the cursor is behind the change
        store.changed.store(true, Ordering::Relaxed);
        let err = reader.read_at(0, 580_000, &mut buf).unwrap_err();
        let chunk = 600_000 / CHUNK * CHUNK;
        assert!(
            matches!(err, ReadError::Changed { offset, .. } if offset == chunk),
            "{codec}: {err}"
        );
        assert_eq!(reader.coverage(0), Coverage::Damaged);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn flipped_bytes_are_never_served_of_a_file_verified_first(
        codec in prop::sample::select(&CODECS[..]),
        size in 1_usize..400_000,
        seed: u64,
        flip in (any::<prop::sample::Index>(), 1_u8..),
        cache_bytes in prop::sample::select(&[0_u64, 200_000, 8 << 20][..]),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 1_usize..100_000), 1..8),
    ) {
        let mut file = Stored::verified_first(codec, content(size, seed));
        let place = flip.0.index(file.encoded.len());
        file.encoded[place] ^= flip.1;
        let bytes = file.bytes.clone();
        let (reader, _) = reader(&[file], cache_bytes);
        for (place, length) in reads {
            let offset = place.index(size);
            let mut buf = vec![0; length.min(size - offset)];
            // Some bytes of a frame mean nothing (a gzip header's time): then the content is still right.
            match reader.read_at(0, offset as u64, &mut buf) {
                Ok(()) => prop_assert!(buf == bytes[offset..offset + buf.len()]),
                Err(_) => prop_assert_eq!(reader.coverage(0), Coverage::Damaged),
            }
        }
    }
}
