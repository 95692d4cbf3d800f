//! Codecs decode what the real commands write, exactly, and refuse everything else.

use std::io::{self, BufReader, Read};

use crate::support::{CODECS, content, encode, pipe};
use pgthaw_source::codec::{DecodeError, Decoder};
use pgthaw_source::map::Codec;
use proptest::prelude::*;

/// Decodes in pieces of `piece` bytes, from a source that hands out `fetch` bytes at a time.
fn decode(
    codec: Codec,
    encoded: &[u8],
    size: usize,
    fetch: usize,
    piece: usize,
) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder::new(codec, BufReader::with_capacity(fetch, encoded), size as u64)?;
    let (mut bytes, mut buf) = (Vec::new(), vec![0; piece]);
    loop {
        match decoder.fill(&mut buf)? {
            0 => break,
            count => bytes.extend_from_slice(&buf[..count]),
        }
    }
    decoder.finish()?;
    assert!(decoder.memory() < 256 << 20);
    Ok(bytes)
}

#[test]
fn decodes_what_real_commands_write() {
    let bytes = content(1_200_000, 7);
    let cases: [(&str, Codec, &str, &[&str]); 11] = [
        ("gzip", Codec::Gzip, "gzip", &["-6"]),
        ("gzip, fast", Codec::Gzip, "gzip", &["-1"]),
        ("lz4, linked 64 KiB blocks as pgBackRest", Codec::Lz4, "lz4", &["-B4", "-BD", "-1"]),
        ("lz4, linked 4 MiB blocks", Codec::Lz4, "lz4", &["-B7", "-BD"]),
        ("lz4, linked 256 KiB blocks, high compression", Codec::Lz4, "lz4", &["-B5", "-BD", "-9"]),
        ("lz4, independent blocks with checksums", Codec::Lz4, "lz4", &["-B6", "-BX", "-BI"]),
        ("lz4, no checksum of the content", Codec::Lz4, "lz4", &["--no-frame-crc", "-BD"]),
        ("zstd", Codec::Zstd, "zstd", &["-3"]),
        ("zstd without checksum", Codec::Zstd, "zstd", &["--no-check", "-1"]),
        ("zstd, slow", Codec::Zstd, "zstd", &["-19"]),
        ("zstd, 128 MiB window", Codec::Zstd, "zstd", &["-1", "--long=27"]),
    ];
    for (name, codec, program, arguments) in cases {
        let encoded = pipe(program, &[arguments, &["-c"]].concat(), &bytes);
        for (fetch, piece) in [(64 << 10, 64 << 10), (1000, 77_777)] {
            let decoded = decode(codec, &encoded, bytes.len(), fetch, piece)
                .unwrap_or_else(|err| panic!("{name}: {err}"));
            assert!(decoded == bytes, "{name}: decoded to other bytes");
        }
    }
}

#[test]
fn only_the_checksum_of_the_content_is_left_out_and_only_for_whoever_asks() {
    let bytes = content(300_000, 7);
    let decode = |encoded: &[u8], without: bool| {
        let decoder = Decoder::new(Codec::Lz4, encoded, bytes.len() as u64).unwrap();
        let mut decoder = if without { decoder.without_content_checksum() } else { decoder };
        let mut decoded = vec![0; bytes.len()];
        decoder.fill(&mut decoded).and_then(|_| decoder.finish()).map(|()| decoded)
    };
    let damaged = |result| matches!(result, Err(DecodeError::Damaged { .. }));

    let mut encoded = pipe("lz4", &["-c", "-B4", "-BD"], &bytes);
    *encoded.last_mut().unwrap() ^= 1;
    assert!(damaged(decode(&encoded, false)));
    assert_eq!(decode(&encoded, true).unwrap(), bytes);

    // Seven bytes of header, four of the first block's length: what follows has a checksum of its own.
    let mut encoded = pipe("lz4", &["-c", "-B4", "-BD", "-BX", "--no-frame-crc"], &bytes);
    let length = u32::from_le_bytes(encoded[7..11].try_into().unwrap()) & 0x7fff_ffff;
    assert_eq!(decode(&encoded, true).unwrap(), bytes);
    encoded[11 + length as usize] ^= 1;
    assert!(damaged(decode(&encoded, true)));
}

#[test]
fn several_frames_are_one_file() {
    let parts = [content(100_000, 1), content(1, 2), content(70_000, 3)];
    for codec in [Codec::Gzip, Codec::Lz4, Codec::Zstd] {
        let encoded = parts.iter().flat_map(|part| encode(codec, part)).collect::<Vec<u8>>();
        assert!(decode(codec, &encoded, 170_001, 5000, 4096).unwrap() == parts.concat(), "{codec}");
    }
}

#[test]
fn sizes_are_exact() {
    let bytes = content(200_000, 4);
    for codec in CODECS {
        let encoded = encode(codec, &bytes);
        let shorter = decode(codec, &encoded, 199_999, 8192, 8192).unwrap_err();
        assert!(matches!(shorter, DecodeError::TooLong { size: 199_999 }), "{codec}: {shorter}");
        let longer = decode(codec, &encoded, 200_001, 8192, 8192).unwrap_err();
        assert!(
            matches!(longer, DecodeError::TooShort { decoded: 200_000, .. }),
            "{codec}: {longer}"
        );
        for garbage in [&b"x"[..], b"garbage that is longer than a frame's header and a bit more"] {
            let trailing = [&encoded, garbage].concat();
            assert!(
                decode(codec, &trailing, 200_000, 8192, 8192).is_err(),
                "{codec}: garbage is accepted"
            );
        }
        let empty = encode(codec, &[]);
        assert_eq!(decode(codec, &empty, 0, 8192, 8192).unwrap(), b"", "{codec}: an empty file");
        assert!(
            codec == Codec::None || decode(codec, &[], 0, 8192, 8192).is_err(),
            "{codec}: not even a frame"
        );
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = content(3000, 5);
    for codec in CODECS {
        let encoded = encode(codec, &bytes);
        for length in 0..encoded.len() {
            decode(codec, &encoded[..length], bytes.len(), 512, 700)
                .expect_err(&format!("{codec}: {length} bytes are enough"));
        }
    }
}

#[test]
fn absurd_frames_are_refused() {
    let bytes = content(1000, 6);
    let dir = tempfile::tempdir().unwrap();
    let dictionary = dir.path().join("dictionary");
    std::fs::write(&dictionary, content(5000, 8)).unwrap();
    let window = pipe("zstd", &["-1", "-c", "--long=30", "--ultra"], &content(1 << 20, 9));
    assert!(decode(Codec::Zstd, &window, 1 << 20, 8192, 8192).is_err(), "a window of 1 GiB");
    let with_dictionary = pipe("lz4", &["-c", "-D", dictionary.to_str().unwrap()], &bytes);
    // The command does not note that there is one; the frame can.
    let mut noted = vec![0x04, 0x22, 0x4D, 0x18, 0x61, 0x40, 1, 2, 3, 4, 0];
    noted.extend_from_slice(&with_dictionary[7..]);
    for checksum in 0..=255 {
        noted[10] = checksum;
        assert!(decode(Codec::Lz4, &noted, 1000, 8192, 8192).is_err(), "a dictionary");
    }
    let legacy = pipe("lz4", &["-c", "-l"], &bytes);
    assert!(decode(Codec::Lz4, &legacy, 1000, 8192, 8192).is_err(), "a frame without an end");
    for codec in [Codec::Gzip, Codec::Zlib, Codec::Lz4, Codec::Zstd] {
        assert!(decode(codec, &bytes, 1000, 8192, 8192).is_err(), "{codec}: no frame at all");
    }
}

/// Fails after its bytes, with an error that decoders could take for an end.
struct Failing<'a>(&'a [u8], io::ErrorKind);

impl Read for Failing<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf)? {
            0 => Err(io::Error::new(self.1, "the store is away")),
            count => Ok(count),
        }
    }
}

#[test]
fn a_store_that_fails_is_no_damage() {
    let bytes = content(300_000, 10);
    for codec in CODECS {
        let encoded = encode(codec, &bytes);
        for kind in
            [io::ErrorKind::TimedOut, io::ErrorKind::UnexpectedEof, io::ErrorKind::WouldBlock]
        {
            for length in [0, 1, 5, encoded.len() / 2, encoded.len() - 1, encoded.len()] {
                let failing = BufReader::new(Failing(&encoded[..length], kind));
                let mut decoder = Decoder::new(codec, failing, bytes.len() as u64).unwrap();
                let mut buf = vec![0; bytes.len()];
                let err = decoder.fill(&mut buf).and_then(|_| decoder.finish()).unwrap_err();
                assert!(
                    matches!(&err, DecodeError::Stored(err) if err.kind() == kind),
                    "{codec}, {length}: {err}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn decodes_what_it_encodes(codec in prop::sample::select(&CODECS[..]), size in 0_usize..400_000, seed: u64,
                               fetch in 1_usize..100_000, piece in 1_usize..200_000) {
        let bytes = content(size, seed);
        let decoded = decode(codec, &encode(codec, &bytes), size, fetch, piece).unwrap();
        prop_assert!(decoded == bytes);
    }

    #[test]
    fn changed_bytes_never_panic(codec in prop::sample::select(&CODECS[..]), size in 1_usize..200_000, seed: u64,
                                 changes in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..5)) {
        let mut encoded = encode(codec, &content(size, seed));
        for (place, change) in changes {
            let place = place.index(encoded.len());
            encoded[place] ^= change;
        }
        let _ = decode(codec, &encoded, size, 4096, 65_536);
        if let Ok(decoder) = Decoder::new(codec, &encoded[..], size as u64) {
            let mut decoder = decoder.without_content_checksum();
            let _ = decoder.fill(&mut vec![0; size]).and_then(|_| decoder.finish());
        }
    }
}
