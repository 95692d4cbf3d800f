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
use crate::formats::wal::{self, Segment, SegmentSize, WalFile};
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
    /// Those that were asked for, by their eight digits.
    timelines: HashMap<String, Timeline>,
}

/// The segments of a timeline.
#[derive(Debug)]
struct Timeline {
    /// The first directory that was listed.
    from: String,
    /// Names of files, sorted.
    files: Vec<String>,
    /// Their numbers, each once, for a size of segments.
    numbers: Option<(SegmentSize, Vec<u64>)>,
}

impl Timeline {
    /// The highest last eight digits.
    fn highest(&self) -> u32 {
        let last = |name: &String| u32::from_str_radix(&name[16..24], 16).ok();
        self.files.iter().filter_map(last).max().unwrap_or_default()
    }

    fn numbers(&mut self, size: SegmentSize) -> &[u64] {
        if self.numbers.as_ref().is_none_or(|(known, _)| *known != size) {
            let number = |name: &String| Some(size.parse(&name[..24])?.number);
            let mut numbers: Vec<u64> = self.files.iter().filter_map(number).collect();
            numbers.dedup();
            self.numbers = Some((size, numbers));
        }
        self.numbers.as_ref().map_or(&[], |(_, numbers)| numbers)
    }

    /// The file of a segment.
    fn file(&self, segment: &str) -> Option<&str> {
        let at = self.files.partition_point(|name| name.as_str() < segment);
        self.files.get(at).filter(|name| name.starts_with(segment)).map(String::as_str)
    }
}

/// What a backup needs of its archive, as `backup.info` tells it.
#[derive(Debug)]
pub(crate) struct Needs<'a> {
    /// Name of the first segment.
    pub start: &'a str,
    /// Name of the last segment.
    pub stop: &'a str,
    /// Where the backup began.
    pub start_lsn: Option<u64>,
    /// Where it ended.
    pub stop_lsn: Option<u64>,
    /// It has them itself.
    pub own: bool,
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
        Ok(Self { root, path, directories, timelines: HashMap::new() })
    }

    /// Where it lies.
    pub(crate) fn places(&self) -> Places {
        let shown = format!("`{}`", self.root.path().join(&self.path).display());
        Places { shown, kind: location::Kind::PgBackRest }
    }

    /// Tells how far the WAL goes that follows a backup; none where that cannot be told. Only names are read.
    ///
    /// # Errors
    /// [`SourceError::MissingWal`] when a segment is missing that the backup itself needs; what the kernel says.
    pub(crate) fn reach(&mut self, needs: &Needs<'_>) -> Result<Option<WalReach>, SourceError> {
        if !is_segment_name(needs.start) || !is_segment_name(needs.stop) {
            return Ok(None);
        }
        let timeline = &needs.stop[..8];
        // A backup that began on another timeline needs more than is looked at here.
        let start = if needs.start.starts_with(timeline) { needs.start } else { needs.stop };
        self.list(timeline, &start[..16])?;
        let (path, places) = (&self.path, self.places());
        let Some(names) = self.timelines.get_mut(timeline) else { return Ok(None) };
        let lsns = needs.start_lsn.zip(Some(needs.start)).into_iter();
        let last_byte = needs.stop_lsn.map(|lsn| lsn.saturating_sub(1));
        let known: Vec<_> = lsns.chain(last_byte.zip(Some(needs.stop))).collect();
        let Some(size) = SegmentSize::fitting(&known, names.highest()) else { return Ok(None) };
        let number = |name| size.parse(name).map_or(0, |segment| segment.number);
        let (start, stop) = (number(start), number(needs.stop));
        let name = |number| {
            size.name(Segment {
                number,
                timeline: u32::from_str_radix(timeline, 16).unwrap_or_default(),
            })
        };
        let numbers = names.numbers(size);
        let followed = |from: u64| match numbers.binary_search(&from) {
            Ok(at) => Some(at + wal::run_length(numbers, at) - 1),
            Err(_) => None,
        };
        let last = if needs.own {
            followed(stop).or_else(|| followed(stop + 1))
        } else {
            let last = followed(start);
            let there = last.map(|last| numbers[last]);
            if there.is_none_or(|there| there < stop) {
                let segment = name(there.map_or(start, |there| there + 1));
                return Err(SourceError::MissingWal { segment, places });
            }
            last
        };
        let Some(last) = last else { return Ok(None) };
        let segment = name(numbers[last]);
        let gap = (last + 1 < numbers.len()).then(|| name(numbers[last] + 1));
        let Some(file) = names.file(&segment) else { return Ok(None) };
        match self.root.metadata(format!("{path}/{}/{file}", &segment[..16])) {
            Ok(entry) => Ok(Some(WalReach { segment, modified: entry.modified, gap })),
            Err(err) if is_absent(&err) => Ok(None), // it has just expired
            Err(err) => Err(err.into()),
        }
    }

    /// Lists the segments of a timeline from `directory` on, unless that is done.
    fn list(&mut self, timeline: &str, directory: &str) -> Result<(), SourceError> {
        if self.timelines.get(timeline).is_some_and(|known| known.from.as_str() <= directory) {
            return Ok(());
        }
        let mut files = Vec::new();
        for directory in self
            .directories
            .iter()
            .filter(|name| name.starts_with(timeline) && name.as_str() >= directory)
        {
            match self.root.names(format!("{}/{directory}", self.path)) {
                Ok(names) => files.extend(
                    names
                        .into_iter()
                        .filter_map(|name| name.into_string().ok())
                        .filter(|name| name.starts_with(directory) && parse_name(name).is_some()),
                ),
                Err(err) if is_absent(&err) => {}
                Err(err) => return Err(err.into()),
            }
        }
        let known = Timeline { from: directory.to_owned(), files, numbers: None };
        self.timelines.insert(timeline.to_owned(), known);
        Ok(())
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
        let reach = |archive: &mut Archive<'_>, start: &str, stop: &str, own| {
            let needs = Needs { start, stop, start_lsn: None, stop_lsn: None, own };
            archive.reach(&needs).map(|reach| reach.map(|reach| (reach.segment, reach.gap)))
        };
        let name = |number: u32| format!("0000000100000000{number:08X}");
        let next = "000000010000000100000000".to_owned();
        let last = Some((name(3), Some(name(4))));
        assert_eq!(reach(&mut archive, &name(2), &name(3), false).unwrap(), last, "a gap ends it");
        assert_eq!(reach(&mut archive, &name(1), &name(1), false).unwrap(), last);
        let to_next = Some((next.clone(), None));
        assert_eq!(reach(&mut archive, &name(0xFF), &name(0xFF), false).unwrap(), to_next);
        assert_eq!(reach(&mut archive, &name(0xFD), &name(0xFE), true).unwrap(), to_next);
        for (start, stop, missing) in [(3, 4, 4), (5, 5, 5), (0, 3, 0)] {
            let err = reach(&mut archive, &name(start), &name(stop), false).unwrap_err();
            let named = |segment: &String| *segment == name(missing);
            assert!(
                matches!(&err, SourceError::MissingWal { segment, .. } if named(segment)),
                "{err}"
            );
        }
        assert_eq!(reach(&mut archive, &name(3), &name(4), true).unwrap(), None, "it has its own");
        let other = "000000030000000000000001";
        assert!(reach(&mut archive, other, other, false).is_err());
        assert_eq!(reach(&mut archive, "x", "y", false).unwrap(), None);
        assert_eq!(archive.history(2).unwrap().as_deref(), Some(&b"x"[..]));
        assert_eq!(archive.history(3).unwrap(), None);

        put(format!("a/0000000100000000/000000010000000000000002-{SUM}.zst"));
        let twice = segments(&archive, 1, (2, 3)).unwrap_err();
        assert!(matches!(twice, SourceError::WalTwice { .. }), "{twice}");
        segments(&archive, 1, (3, 3)).unwrap();
        assert!(Archive::open(&root, "nothing".into()).unwrap().directories.is_empty());
    }
}
