//! A reader serves the original bytes, whatever is read in whatever order by however many threads.

use std::thread;

use pgthaw_source::map::{ClusterPath, Codec, Content, MapFile};
use pgthaw_source::reader::{CHUNK, Coverage, ReadError, Reader};
use proptest::prelude::*;

use crate::support::{CODECS, Stored, content, pipe, reader, sha1_of};

/// Reads ranges and compares them with the original, by the cache too.
fn reads_right(reader: &Reader, file: usize, bytes: &[u8], offset: usize, length: usize) {
    let offset = offset.min(bytes.len());
    let length = length.min(bytes.len() - offset);
    let want = &bytes[offset..offset + length];
    let mut buf = vec![0xAA; length];
    if let Some(result) = reader.try_read_at(file, offset as u64, &mut buf) {
        result.unwrap();
        assert!(buf == want, "file {file}: wrong bytes at {offset} from the cache");
    }
    buf.fill(0x55);
    reader.read_at(file, offset as u64, &mut buf).unwrap();
    assert!(buf == want, "file {file}: wrong bytes at {offset}");
}

#[test]
fn serves_every_codec_page_by_page() {
    for codec in CODECS {
        for file in [Stored::new, Stored::verified_first] {
            let file = file(codec, content(700_001, 11));
            let bytes = file.bytes.clone();
            let (reader, _) = reader(&[file], 4 << 20);
            assert_eq!(reader.coverage(0), Coverage::Untouched);
            for offset in (0..bytes.len()).step_by(8192) {
                reads_right(&reader, 0, &bytes, offset, 8192);
            }
            assert_eq!(reader.coverage(0), Coverage::WholeVerified, "{codec}");
            assert_eq!(reader.statistics().files_verified, 1);
            assert_eq!(
                reader.statistics().decoded_again_bytes,
                0,
                "{codec}: everything fits into the cache"
            );
            assert!(reader.read_whole(0).unwrap() == bytes);
        }
    }
}

#[test]
fn real_lz4_with_linked_blocks_is_read_scattered() {
    let bytes = content(2_000_000, 12);
    let mut file = Stored::new(Codec::Lz4, bytes.clone());
    file.encoded = pipe("lz4", &["-c", "-B4", "-BD", "-1"], &bytes);
    let (reader, _) = reader(&[file], 256 << 10);
    for step in 0..200 {
        reads_right(&reader, 0, &bytes, step * 7_654_321 % bytes.len(), 20_000);
    }
    reader.verify_whole(0).unwrap();
}

#[test]
fn sizes_around_chunks() {
    let chunk = CHUNK as usize;
    for codec in CODECS {
        for size in [0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk] {
            for page_checksums in [true, false] {
                let file = Stored { page_checksums, ..Stored::new(codec, content(size, 13)) };
                let bytes = file.bytes.clone();
                let (reader, _) = reader(&[file], 1 << 20);
                reads_right(&reader, 0, &bytes, 0, size);
                reads_right(&reader, 0, &bytes, size, 0);
                reads_right(&reader, 0, &bytes, size / 2, 1);
                reader.verify_whole(0).unwrap();
                assert_eq!(reader.coverage(0), Coverage::WholeVerified, "{codec}, {size} bytes");
                assert!(reader.read_whole(0).unwrap() == bytes);
            }
        }
    }
}

#[test]
fn ranges_outside_a_file_are_errors() {
    for codec in CODECS {
        let (reader, _) = reader(&[Stored::new(codec, content(1000, 14))], 1 << 20);
        for (offset, length) in [(0, 1001), (1000, 1), (1001, 0), (u64::MAX, 1), (u64::MAX - 1, 4)]
        {
            let mut buf = vec![0; length];
            let err = reader.read_at(0, offset, &mut buf).unwrap_err();
            assert!(
                matches!(err, ReadError::OutOfRange { .. }),
                "{codec}: {offset}+{length}: {err}"
            );
            assert!(reader.try_read_at(0, offset, &mut buf).unwrap().is_err());
        }
        assert_eq!(reader.coverage(0), Coverage::Untouched);
        assert!(reader.damaged().is_empty());
    }
}

#[test]
fn files_without_digest_are_read_to_their_end() {
    for codec in CODECS {
        for page_checksums in [true, false] {
            let file =
                Stored { digest: None, page_checksums, ..Stored::new(codec, content(300_000, 15)) };
            let bytes = file.bytes.clone();
            let (reader, _) = reader(&[file], 1 << 20);
            reads_right(&reader, 0, &bytes, 0, 100);
            let whole = codec != Codec::None && !page_checksums;
            let want = if whole { Coverage::WholeWithoutDigest } else { Coverage::Partly };
            assert_eq!(reader.coverage(0), want, "{codec}: only a frame's checksum can vouch");
            reader.verify_whole(0).unwrap();
            assert_eq!(reader.coverage(0), Coverage::WholeWithoutDigest, "{codec}");
        }
    }
}

#[test]
fn the_map_s_own_files_are_served_at_once() {
    let inline = |size, bytes: &[u8], digest| MapFile {
        path: ClusterPath::new("data/backup_label").unwrap(),
        size,
        modified: 0,
        content: Content::Inline(bytes.to_vec()),
        digest,
        page_checksums: false,
    };
    let store = std::sync::Arc::new(pgthaw_source::store::MemoryStore::default());
    let files = vec![
        inline(5, b"label", None),
        inline(5, b"label", Some(sha1_of(b"label"))),
        inline(5, b"label", Some(sha1_of(b"liebl"))),
        inline(6, b"label", None),
        inline(0, b"", None),
    ];
    let reader = Reader::new(store, files, 0);
    let mut buf = [0; 3];
    for file in 0..2 {
        assert_eq!(reader.coverage(file), Coverage::Untouched);
        reader.try_read_at(file, 1, &mut buf).unwrap().unwrap();
        assert_eq!(&buf, b"abe");
        assert_eq!(reader.read_whole(file).unwrap(), b"label");
    }
    assert_eq!(
        (reader.coverage(0), reader.coverage(1)),
        (Coverage::WholeWithoutDigest, Coverage::WholeVerified)
    );
    for file in 2..4 {
        assert!(reader.try_read_at(file, 1, &mut buf).unwrap().is_err());
        assert!(reader.read_at(file, 1, &mut buf).is_err());
        assert!(reader.read_whole(file).is_err());
        assert_eq!(reader.coverage(file), Coverage::Damaged);
    }
    assert_eq!(reader.read_whole(4).unwrap(), b"");
    assert_eq!(reader.statistics().files_damaged, 2);
}

#[test]
fn many_threads_read_many_files() {
    let files: Vec<Stored> = (0..10)
        .map(|number| {
            let codec = CODECS[number % 5];
            let bytes = content(150_000 + 90_000 * number, number as u64);
            if number < 5 {
                Stored::new(codec, bytes)
            } else {
                Stored::verified_first(codec, bytes)
            }
        })
        .collect();
    for cache_bytes in [0, 300_000, 64 << 20] {
        let (reader, _) = reader(&files, cache_bytes);
        thread::scope(|scope| {
            for thread in 0..4_usize {
                let (reader, files) = (&reader, &files);
                scope.spawn(move || {
                    for step in 0..150 {
                        let file = (thread + step * step) % files.len();
                        let bytes = &files[file].bytes;
                        let place = (step * 48_271 + thread * 977) * 131 % bytes.len();
                        reads_right(reader, file, bytes, place, 8192 << (step % 4));
                        if step % 10 == 0 {
                            reader.read_ahead(file);
                        }
                        if step % 50 == 0 {
                            reader.verify_whole(file).unwrap();
                        }
                    }
                });
            }
        });
        assert!(reader.damaged().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_reads_by_several_threads_are_right(
        codec in prop::sample::select(&CODECS[..]),
        size in 1_usize..1_500_000,
        seed: u64,
        page_checksums: bool,
        has_digest: bool,
        cache_bytes in prop::sample::select(&[0_u64, 70_000, 400_000, 32 << 20][..]),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..300_000, any::<bool>()), 1..60),
    ) {
        let mut file = Stored { page_checksums, ..Stored::new(codec, content(size, seed)) };
        file.digest = file.digest.filter(|_| has_digest);
        let bytes = file.bytes.clone();
        let (reader, _) = reader(&[file], cache_bytes);
        thread::scope(|scope| {
            for part in reads.chunks(reads.len().div_ceil(3)) {
                let (reader, bytes) = (&reader, &bytes);
                scope.spawn(move || {
                    for (place, length, ahead) in part {
                        reads_right(reader, 0, bytes, place.index(size), *length);
                        if *ahead {
                            reader.read_ahead(0);
                        }
                    }
                });
            }
        });
        prop_assert!(reader.damaged().is_empty());
        prop_assert!(reader.read_whole(0).unwrap() == bytes);
    }
}
