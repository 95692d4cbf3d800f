//! Files for tests: random but compressible content, encoded by the libraries or by the real commands.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use pgthaw_source::map::{ClusterPath, Codec, Content, Digest, MapFile, ObjectId};
use pgthaw_source::reader::Reader;
use pgthaw_source::store::MemoryStore;
use sha1::Digest as _;

/// All codecs.
pub const CODECS: [Codec; 5] = [Codec::None, Codec::Gzip, Codec::Zlib, Codec::Lz4, Codec::Zstd];

/// Returns `size` bytes that look a bit like pages: runs, repeats at a distance, and noise. The same for the same seed.
pub fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes: Vec<u8> = Vec::with_capacity(size + 512);
    while bytes.len() < size {
        let length = (next() % 200 + 1) as usize;
        match next() % 4 {
            0 => bytes.resize(bytes.len() + length, next() as u8),
            1 if bytes.len() > 70_000 => {
                let from = bytes.len() - (next() % 65_000) as usize - 4_000;
                bytes.extend_from_within(from..from + length);
            }
            _ => bytes.extend((0..length / 8 + 1).flat_map(|_| next().to_le_bytes())),
        }
    }
    bytes.truncate(size);
    bytes
}

/// Encodes by the library.
pub fn encode(codec: Codec, bytes: &[u8]) -> Vec<u8> {
    match codec {
        Codec::None => bytes.to_vec(),
        Codec::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Codec::Zlib => {
            let mut encoder =
                flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Codec::Lz4 => {
            // As pgBackRest writes them: 64 KiB blocks, linked, with a checksum of the content.
            let info = lz4_flex::frame::FrameInfo::new()
                .block_size(lz4_flex::frame::BlockSize::Max64KB)
                .block_mode(lz4_flex::frame::BlockMode::Linked)
                .content_checksum(true);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Codec::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// Runs `program`, feeds it `input` and returns its output.
pub fn pipe(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program} {arguments:?}");
    output.stdout
}

/// A file to be put into a store.
pub struct Stored {
    pub bytes: Vec<u8>,
    pub encoded: Vec<u8>,
    pub codec: Codec,
    pub digest: Option<Digest>,
    pub page_checksums: bool,
}

impl Stored {
    /// A file as a pgBackRest backup of a cluster with page checksums has it.
    pub fn new(codec: Codec, bytes: Vec<u8>) -> Self {
        let encoded = encode(codec, &bytes);
        Self { digest: Some(sha1_of(&bytes)), bytes, encoded, codec, page_checksums: true }
    }

    /// The same, but it must be verified before its first byte is served.
    pub fn verified_first(codec: Codec, bytes: Vec<u8>) -> Self {
        Self { page_checksums: false, ..Self::new(codec, bytes) }
    }
}

/// The digest pgBackRest keeps.
pub fn sha1_of(bytes: &[u8]) -> Digest {
    Digest::Sha1(sha1::Sha1::digest(bytes).into())
}

/// Returns a reader of `files`, and the store below it. Object `n` holds file `n` between other bytes.
pub fn reader(files: &[Stored], cache_bytes: u64) -> (Reader, Arc<MemoryStore>) {
    const BEFORE: usize = 100;
    let surrounded = |stored: &Stored| [&[0xEE; BEFORE][..], &stored.encoded, &[0xDD; 50]].concat();
    let objects =
        files.iter().enumerate().map(|(number, file)| (ObjectId(number as u32), surrounded(file)));
    let store = Arc::new(MemoryStore::new(objects));
    let map = files.iter().enumerate().map(|(number, file)| MapFile {
        path: ClusterPath::new(format!("data/base/1/{number}")).unwrap(),
        size: file.bytes.len() as u64,
        modified: 0,
        content: Content::Stored {
            object: ObjectId(number as u32),
            offset: BEFORE as u64,
            length: file.encoded.len() as u64,
            codec: file.codec,
        },
        digest: file.digest.clone(),
        page_checksums: file.page_checksums,
    });
    (Reader::new(store.clone(), map.collect(), cache_bytes), store)
}
