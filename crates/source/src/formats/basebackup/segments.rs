//! WAL beside a base backup: in its `pg_wal`, and in directories named by `--wal-archive`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::codec::frames::Frames;
use crate::codec::lz4::Lz4;
use crate::error::SourceError;
use crate::formats::history;
use crate::formats::label::{is_segment_name, is_upper_hex};
use crate::formats::objects::{Objects, is_absent};
use crate::formats::wal::{Segment, SegmentSize, WalFile};
use crate::map::Codec;
use crate::store::{Entry, Kind, Root};

/// Longest history file that is read, in bytes, decoded.
const SMALL: u64 = history::LIMIT;

/// A file of interest: its name without the suffix of a compression, and where it lies.
#[derive(Debug, Clone)]
struct Stored {
    root: usize,
    path: String,
    suffix: &'static str,
    size: u64,
    modified: i64,
}

/// Directories with WAL; in case of doubt the first has the say.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    roots: Vec<(Root, u32)>,
    /// By name: segments, histories and backup histories.
    files: BTreeMap<String, Stored>,
}

/// Suffixes of compressed files; bz2 and xz are known in order to be refused.
const SUFFIXES: [&str; 6] = [".gz", ".lz4", ".zst", ".bz2", ".xz", ""];

impl Segments {
    /// Lists the archive directories `paths` and adds them to the objects' roots.
    ///
    /// # Errors
    /// One of them cannot be listed.
    pub(crate) fn archives(paths: &[PathBuf], objects: &mut Objects) -> Result<Self, SourceError> {
        let mut segments = Self::default();
        for path in paths {
            let root = Root::open(path)?;
            let number = objects.add_root(&root);
            let index = segments.roots.len();
            segments.list(&root, index, "", 2)?;
            segments.roots.push((root, number));
        }
        Ok(segments)
    }

    /// Lists `directory` of an opened root, which has number `number`; not what is below.
    ///
    /// # Errors
    /// It cannot be listed.
    pub(crate) fn directory(
        root: &Root,
        directory: &str,
        number: u32,
    ) -> Result<Self, SourceError> {
        let mut segments = Self::default();
        // Opened once more, for a root belongs to one owner.
        segments.list(root, 0, directory, 0)?;
        segments.roots.push((Root::open(root.path())?, number));
        Ok(segments)
    }

    fn list(
        &mut self,
        root: &Root,
        index: usize,
        directory: &str,
        depth: u32,
    ) -> Result<(), SourceError> {
        for entry in root.list(directory)? {
            let Some(name) = entry.name.to_str() else { continue };
            let path =
                if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") };
            match entry.kind {
                Kind::Directory
                    if depth > 0 && matches!(name.len(), 8 | 16) && is_upper_hex(name) =>
                {
                    self.list(root, index, &path, depth - 1)?;
                }
                Kind::File => self.add(name, path, index, &entry),
                Kind::Symlink | Kind::Directory | Kind::Other => {}
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str, path: String, root: usize, entry: &Entry) {
        let split = SUFFIXES.iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, *suffix)));
        let Some((stem, suffix)) = split.filter(|(stem, _)| is_of_interest(stem)) else { return };
        let stored = Stored { root, path, suffix, size: entry.size, modified: entry.modified };
        self.files.entry(stem.to_owned()).or_insert(stored);
    }

    /// Whether nothing was found.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The segments of a size.
    pub(crate) fn of_size(&self, size: SegmentSize) -> impl Iterator<Item = Segment> {
        self.files.keys().filter_map(move |name| size.parse(name))
    }

    /// Last modification of a segment's file, seconds since 1970-01-01 UTC.
    pub(crate) fn modified(&self, name: &str) -> Option<i64> {
        self.files.get(name).map(|stored| stored.modified)
    }

    /// The timelines whose histories are there.
    pub(crate) fn histories(&self) -> Vec<u32> {
        self.files.keys().filter_map(|name| history::parse_file_name(name)).collect()
    }

    /// Returns a segment, if it is there; how it is stored is told by its suffix, else by its first bytes.
    ///
    /// # Errors
    /// It is compressed in a way that is not read; it cannot be opened.
    pub(crate) fn segment(&self, name: &str) -> Result<Option<WalFile>, SourceError> {
        let Some((stored, root, number)) = self.find(name) else { return Ok(None) };
        let codec = codec(stored, root)?;
        Ok(Some(WalFile {
            root: number,
            path: stored.path.clone(),
            offset: 0,
            length: stored.size,
            codec,
            modified: stored.modified,
            digest: None,
        }))
    }

    /// Returns the decoded content of a small file, if it is there.
    ///
    /// # Errors
    /// It cannot be read or decoded.
    pub(crate) fn small(&self, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        let Some((stored, root, _)) = self.find(name) else { return Ok(None) };
        let bytes = match root.read(&stored.path, SMALL) {
            Ok(bytes) => bytes,
            Err(err) if is_absent(&err) => return Ok(None),
            Err(err) => return Err(err.into()),
        };
        let mut decoded = Vec::new();
        let result = match codec(stored, root)? {
            Codec::None => return Ok(Some(bytes)),
            Codec::Gzip => flate2::bufread::MultiGzDecoder::new(&bytes[..])
                .take(SMALL)
                .read_to_end(&mut decoded),
            Codec::Zlib => {
                flate2::bufread::ZlibDecoder::new(&bytes[..]).take(SMALL).read_to_end(&mut decoded)
            }
            Codec::Lz4 => {
                Frames::new(&bytes[..], Lz4::new()?).take(SMALL).read_to_end(&mut decoded)
            }
            Codec::Zstd => {
                zstd::Decoder::with_buffer(&bytes[..])?.take(SMALL).read_to_end(&mut decoded)
            }
        };
        match result {
            Ok(_) => Ok(Some(decoded)),
            Err(err) => Err(SourceError::Damaged {
                path: root.path().join(&stored.path),
                problem: err.to_string(),
            }),
        }
    }

    /// Where they lie, for people.
    pub(crate) fn places(&self) -> Vec<&Path> {
        self.roots.iter().map(|(root, _)| root.path()).collect()
    }

    fn find(&self, name: &str) -> Option<(&Stored, &Root, u32)> {
        let stored = self.files.get(name)?;
        let (root, number) = self.roots.get(stored.root)?;
        Some((stored, root, *number))
    }
}

/// Whether a name without suffix is that of a segment, a timeline's or a backup's history.
fn is_of_interest(name: &str) -> bool {
    let is_backup_history = || {
        let parts: Vec<&str> = name.split('.').collect();
        matches!(parts[..], [segment, offset, "backup"]
            if is_segment_name(segment) && offset.len() == 8 && is_upper_hex(offset))
    };
    is_segment_name(name) || history::parse_file_name(name).is_some() || is_backup_history()
}

fn codec(stored: &Stored, root: &Root) -> Result<Codec, SourceError> {
    let refused = |what: &str| {
        let object = format!("`{}`", root.path().join(&stored.path).display());
        Err(SourceError::Unsupported { object, what: format!("compression method {what}") })
    };
    match stored.suffix {
        ".gz" => return Ok(Codec::Gzip),
        ".lz4" => return Ok(Codec::Lz4),
        ".zst" => return Ok(Codec::Zstd),
        ".bz2" => return refused("bz2"),
        ".xz" => return refused("xz"),
        _ => {}
    }
    let mut magic = Vec::new();
    root.open_file(&stored.path)?.take(6).read_to_end(&mut magic)?;
    match magic[..] {
        [0x1F, 0x8B, 0x08, ..] => Ok(Codec::Gzip),
        [0x04, 0x22, 0x4D, 0x18, ..] => Ok(Codec::Lz4),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Ok(Codec::Zstd),
        [b'B', b'Z', b'h', ..] => refused("bz2"),
        [0xFD, b'7', b'z', b'X', b'Z', 0] => refused("xz"),
        _ => Ok(Codec::None),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const SIZE: u64 = 16 << 20;

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn finds_segments_however_they_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, bytes: &[u8]| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        let name = |number: u32| format!("0000000100000000{number:08X}");
        put(&name(1), b"\x10\xD1\x06\x00plain");
        put(&format!("{}.gz", name(2)), b"");
        put(&format!("{}.lz4", name(3)), b"");
        put(&format!("0000000100000000/{}.zst", name(4)), b"");
        put(&format!("00000001/00000000/{}", name(5)), &gz(b"x"));
        put(&name(6), b"\x28\xB5\x2F\xFD..");
        put(&name(7), b"\x04\x22\x4D\x18..");
        put(&format!("{}.bz2", name(8)), b"");
        put(&name(9), b"BZh9..");
        put(&name(10), b"\xFD7zXZ\0");
        put(&format!("{}.partial", name(11)), b"");
        put(&format!("{}.partial.gz", name(12)), b"");
        put(&format!("else/{}", name(13)), b"");
        put("00000002.history.gz", &gz(b"1\t0/5\tx\n"));
        put("000000010000000000000002.00000028.backup", b"backup");
        let mut objects = Objects::default();
        let segments = Segments::archives(&[dir.path().into()], &mut objects).unwrap();
        let size = SegmentSize::new(SIZE).unwrap();
        let numbers: Vec<_> = segments.of_size(size).map(|segment| segment.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        let codecs = [
            Codec::None,
            Codec::Gzip,
            Codec::Lz4,
            Codec::Zstd,
            Codec::Gzip,
            Codec::Zstd,
            Codec::Lz4,
        ];
        for (number, codec) in (1..).zip(codecs) {
            assert_eq!(segments.segment(&name(number)).unwrap().unwrap().codec, codec, "{number}");
        }
        for number in 8..=10 {
            assert!(
                matches!(segments.segment(&name(number)), Err(SourceError::Unsupported { .. })),
                "{number}"
            );
        }
        assert!(segments.segment(&name(99)).unwrap().is_none());
        assert_eq!(segments.histories(), [2]);
        assert_eq!(
            segments.small("00000002.history").unwrap().as_deref(),
            Some(&b"1\t0/5\tx\n"[..])
        );
        assert!(segments.small("000000010000000000000002.00000028.backup").unwrap().is_some());
        assert!(segments.modified(&name(10)).is_some() && segments.modified(&name(99)).is_none());

        let root = Root::open(dir.path()).unwrap();
        let flat = Segments::directory(&root, "", 0).unwrap();
        assert!(flat.segment(&name(4)).unwrap().is_none(), "pg_wal has no directories of segments");
        assert!(Segments::archives(&[dir.path().join("nothing")], &mut objects).is_err());
    }
}
