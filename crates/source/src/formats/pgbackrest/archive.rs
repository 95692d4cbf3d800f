//! The WAL archive of a stanza: found by listing, for each name ends in a checksum (pgBackRest source,
//! `src/command/archive/common.c`).

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::manifest::compression_of_extension;
use crate::error::{Places, SourceError};
use crate::formats::hex::unhex;
use crate::formats::history::{self, History};
use crate::formats::label::{is_segment_name, is_upper_hex};
use crate::formats::objects::is_absent;
use crate::formats::wal::{Segment, SegmentSize, WalFile};
use crate::location;
use crate::map::Digest;
use crate::repository::WalReach;
use crate::store::{Kind, Root};

/// One archive id of a stanza.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    root: &'a Root,
    /// `archive/<stanza>/<archive id>`.
    path: String,
    /// Its directories: 16 hexadecimal digits, a timeline and the upper half of the LSN; sorted.
    directories: Vec<String>,
    /// The last segment of each timeline that was asked for.
    reaches: HashMap<String, Option<WalReach>>,
}

/// An archived segment's name, split.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name<'a> {
    segment: &'a str,
    sha1: [u8; 20],
    extension: &'a str,
}

impl<'a> Archive<'a> {
    /// Lists the archive's directories; an archive that is not there holds nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn open(root: &'a Root, path: String) -> Result<Self, SourceError> {
        let is_directory = |name: &str| name.len() == 16 && is_upper_hex(name);
        let directories = list(root, &path)?
            .into_iter()
            .filter(|(name, entry)| entry.kind == Kind::Directory && is_directory(name))
            .map(|(name, _)| name)
            .collect();
        Ok(Self { root, path, directories, reaches: HashMap::new() })
    }

    /// Where it lies.
    pub(crate) fn places(&self) -> Places {
        let shown = format!("`{}`", self.root.path().join(&self.path).display());
        Places { shown, kind: location::Kind::PgBackRest }
    }

    /// Returns the last whole segment of `timeline` (8 hexadecimal digits).
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn reach(&mut self, timeline: &str) -> Result<Option<WalReach>, SourceError> {
        if let Some(known) = self.reaches.get(timeline) {
            return Ok(known.clone());
        }
        let mut found = None;
        for directory in
            self.directories.iter().rev().filter(|directory| directory.starts_with(timeline))
        {
            found = list(self.root, &format!("{}/{directory}", self.path))?.iter().rev().find_map(
                |(name, entry)| {
                    let name = parse_name(name).filter(|_| entry.kind == Kind::File)?;
                    Some(WalReach { segment: name.segment.to_owned(), modified: entry.modified })
                },
            );
            if found.is_some() {
                break;
            }
        }
        self.reaches.insert(timeline.to_owned(), found.clone());
        Ok(found)
    }

    /// Returns the segments numbered `first` to `last` on the timelines of `history`.
    ///
    /// # Errors
    /// Two files for one segment; a compression that is not read; what the kernel says.
    pub(crate) fn segments(
        &self,
        history: &History,
        size: SegmentSize,
        (first, last): (u64, u64),
        root_number: u32,
    ) -> Result<BTreeMap<Segment, WalFile>, SourceError> {
        let mut found: BTreeMap<Segment, WalFile> = BTreeMap::new();
        let log_of = |number: u64| number / (size.number_at(1 << 32));
        for directory in &self.directories {
            let half = |text: &str| u32::from_str_radix(text, 16).unwrap_or(0);
            let (timeline, log) = (half(&directory[..8]), u64::from(half(&directory[8..])));
            if !history.contains(timeline) || log < log_of(first) || log > log_of(last) {
                continue;
            }
            let path = format!("{}/{directory}", self.path);
            for (name, entry) in list(self.root, &path)? {
                let Some(parsed) = parse_name(&name).filter(|_| entry.kind == Kind::File) else {
                    continue;
                };
                let Some(segment) = size.parse(parsed.segment) else { continue };
                if segment.number < first || segment.number > last {
                    continue;
                }
                let codec =
                    compression_of_extension(parsed.extension).map(|compression| compression.codec);
                let Some(codec) = codec else {
                    return Err(SourceError::Unsupported {
                        object: format!("WAL segment {}", parsed.segment),
                        what: format!("compression method {}", parsed.extension),
                    });
                };
                let file = WalFile {
                    root: root_number,
                    path: format!("{path}/{name}"),
                    offset: 0,
                    length: entry.size,
                    codec,
                    modified: entry.modified,
                    digest: Some(Digest::Sha1(parsed.sha1)),
                };
                if let Some(other) = found.insert(segment, file) {
                    return Err(SourceError::WalTwice {
                        segment: parsed.segment.to_owned(),
                        path: self.root.path().join(&path),
                        first: other.path.rsplit('/').next().unwrap_or_default().to_owned(),
                        second: name.clone(),
                    });
                }
            }
        }
        Ok(found)
    }

    /// Returns a timeline's history file, if it is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn history(&self, timeline: u32) -> Result<Option<Vec<u8>>, SourceError> {
        let path = format!("{}/{}", self.path, history::file_name(timeline));
        match self.root.read(path, history::LIMIT) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(err) if is_absent(&err) => Ok(None),
            Err(err) => Err(err.into()),
        }
    }
}

/// Entries of a directory that have names in UTF-8; none if it is not there.
fn list(root: &Root, path: &str) -> io::Result<Vec<(String, crate::store::Entry)>> {
    match root.list(path) {
        Ok(entries) => Ok(entries
            .into_iter()
            .filter_map(|entry| Some((entry.name.to_str()?.to_owned(), entry)))
            .collect()),
        Err(err) if is_absent(&err) => Ok(Vec::new()),
        Err(err) => Err(err),
    }
}

/// Splits `<segment>-<sha1>[.<extension>]`. A partial segment and a file that is just being written are none.
fn parse_name(name: &str) -> Option<Name<'_>> {
    let (segment, rest) = name.split_once('-').filter(|(segment, _)| is_segment_name(segment))?;
    let (sha1, extension) = match rest.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (rest, ""),
    };
    let sha1 = unhex(sha1)?.try_into().ok()?;
    let known = matches!(extension, "" | "gz" | "lz4" | "zst" | "bz2");
    known.then_some(Name { segment, sha1, extension })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: &str = "f78d70f36c1fbcadeda8b93f56f471765e57dc59";
    const SIZE: u64 = 16 << 20;

    #[test]
    fn names() {
        let segment = "000000010000000000000005";
        for extension in ["", ".gz", ".lz4", ".zst", ".bz2"] {
            let name = format!("{segment}-{SUM}{extension}");
            assert_eq!(
                parse_name(&name).unwrap().extension,
                extension.trim_start_matches('.'),
                "{name}"
            );
        }
        let bad = [
            format!("{segment}.partial-{SUM}.gz"),
            format!("{segment}-{SUM}.gz.pgbackrest.tmp"),
            format!("{segment}-{SUM}."),
            format!("{segment}-{}", &SUM[1..]),
            format!("{segment}.00000028.backup"),
            segment.to_owned(),
        ];
        for name in bad {
            assert_eq!(parse_name(&name), None, "{name}");
        }
    }

    #[test]
    fn lists_segments() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: String| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"x").unwrap();
        };
        for number in [1, 2, 3, 0xFF] {
            put(format!("a/0000000100000000/0000000100000000{number:08X}-{SUM}.gz"));
        }
        put(format!("a/0000000100000001/000000010000000100000000-{SUM}"));
        put(format!("a/0000000100000001/000000010000000100000001.partial-{SUM}"));
        put(format!("a/0000000200000001/000000020000000100000000-{SUM}.bz2"));
        put("a/00000002.history".into());
        let root = Root::open(dir.path()).unwrap();
        let mut archive = Archive::open(&root, "a".into()).unwrap();
        let size = SegmentSize::new(SIZE).unwrap();
        let segments = |archive: &Archive<'_>, timeline, range| {
            let found = archive.segments(&History::only(timeline), size, range, 0)?;
            Ok::<_, SourceError>(found.keys().map(|segment| segment.number).collect::<Vec<_>>())
        };
        assert_eq!(segments(&archive, 1, (2, 3)).unwrap(), [2, 3]);
        assert_eq!(segments(&archive, 1, (3, u64::MAX)).unwrap(), [3, 255, 256]);
        assert!(matches!(
            segments(&archive, 2, (0, u64::MAX)),
            Err(SourceError::Unsupported { .. })
        ));
        assert_eq!(archive.reach("00000001").unwrap().unwrap().segment, "000000010000000100000000");
        assert!(archive.reach("00000003").unwrap().is_none());
        assert_eq!(archive.history(2).unwrap().as_deref(), Some(&b"x"[..]));
        assert_eq!(archive.history(3).unwrap(), None);

        put(format!("a/0000000100000000/000000010000000000000002-{SUM}.zst"));
        let twice = segments(&archive, 1, (2, 3)).unwrap_err();
        assert!(matches!(twice, SourceError::WalTwice { .. }), "{twice}");
        segments(&archive, 1, (3, 3)).unwrap();
        assert!(Archive::open(&root, "nothing".into()).unwrap().directories.is_empty());
    }
}
