//! The WAL part of a map, the same for every format: segments and histories below `data/pg_wal`.

use std::collections::BTreeMap;

use super::history::{self, History};
use super::objects::{Expected, Objects};
use super::wal::{self, Gap, Reach, Segment, SegmentSize, WalFile};
use crate::error::{Places, SourceError};
use crate::map::{ClusterPath, Codec, Content, MapFile};
use crate::repository::{WalPresented, WalWanted};

/// What a recovery needs.
#[derive(Debug)]
pub(crate) struct Needed<'a> {
    /// The timeline to recover on, with its ancestors.
    pub history: &'a History,
    /// Bytes of a segment.
    pub size: SegmentSize,
    /// Number of the segment it begins in.
    pub start: u64,
    /// Number of the segment in which the backup ends, where that is known.
    pub stop: Option<u64>,
    /// How far it shall go.
    pub wanted: WalWanted,
    /// Where segments were looked for.
    pub places: &'a Places,
}

impl Needed<'_> {
    fn reach(&self) -> Reach {
        match (self.wanted, self.stop) {
            (WalWanted::EndOfBackup, Some(stop)) => Reach::Through(stop),
            (WalWanted::EndOfBackup, None) | (WalWanted::Latest, _) => {
                Reach::LastThere { at_least: self.stop }
            }
        }
    }
}

/// Chooses the segments of a recovery from those that are there.
///
/// # Errors
/// The segment that is missing.
pub(crate) fn choose<T>(
    there: &BTreeMap<Segment, T>,
    needed: &Needed<'_>,
) -> Result<Vec<Segment>, SourceError> {
    let name = |segment| needed.size.name(segment);
    let places = needed.places.clone();
    wal::choose(there, needed.history, needed.size, needed.start, needed.reach()).map_err(|gap| {
        match gap {
            Gap::Missing(segment) => SourceError::MissingWal { segment: name(segment), places },
            Gap::Hole { missing, later } => {
                SourceError::WalHole { segment: name(missing), later: name(later), places }
            }
        }
    })
}

/// Tells what is presented.
pub(crate) fn presented(chosen: &[Segment], needed: &Needed<'_>) -> WalPresented {
    let name = |segment: Option<&Segment>| segment.map(|segment| needed.size.name(*segment));
    let stop = needed.stop.and_then(|stop| chosen.iter().find(|segment| segment.number == stop));
    WalPresented {
        first: name(chosen.first()),
        last: name(chosen.last()),
        segment_size: needed.size.bytes(),
        stop_segment: name(stop),
        expected_last: name(chosen.last()).filter(|_| needed.wanted == WalWanted::Latest),
    }
}

/// Returns a segment as a file of the map.
///
/// # Errors
/// An uncompressed segment that is not whole; an impossible name.
pub(crate) fn segment_file(
    objects: &mut Objects,
    name: &str,
    size: SegmentSize,
    file: &WalFile,
) -> Result<MapFile, SourceError> {
    if file.codec == Codec::None && file.length != size.bytes() {
        let root = objects.table().roots.get(file.root as usize).cloned().unwrap_or_default();
        let path = root.join(&file.path);
        let problem =
            format!("a WAL segment has {} bytes, but it has {}", size.bytes(), file.length);
        return Err(SourceError::Damaged { path, problem });
    }
    let end = file.offset.saturating_add(file.length);
    let object = objects.add(file.root, file.path.clone(), Expected::AtLeast(end))?;
    Ok(MapFile {
        path: wal_path(name)?,
        size: size.bytes(),
        modified: file.modified,
        content: Content::Stored {
            object,
            offset: file.offset,
            length: file.length,
            codec: file.codec,
        },
        digest: file.digest.clone(),
        page_checksums: false,
    })
}

/// Returns the history files of a timeline and its ancestors as files of the map.
///
/// # Errors
/// As `read`.
pub(crate) fn history_files(
    history: &History,
    timeline: u32,
    mut read: impl FnMut(u32) -> Result<Option<Vec<u8>>, SourceError>,
) -> Result<Vec<MapFile>, SourceError> {
    let mut files = Vec::new();
    for timeline in
        std::iter::once(timeline).chain(history.ancestors()).filter(|timeline| *timeline > 1)
    {
        if let Some(bytes) = read(timeline)? {
            files.push(inline(wal_path(&history::file_name(timeline))?, bytes, 0));
        }
    }
    Ok(files)
}

/// Reads a timeline's history. Timeline 1 has none; any other needs it.
///
/// # Errors
/// It is missing or malformed.
pub(crate) fn read_history(
    timeline: u32,
    places: &Places,
    mut read: impl FnMut(u32) -> Result<Option<Vec<u8>>, SourceError>,
) -> Result<History, SourceError> {
    if timeline == 1 {
        return Ok(History::only(1));
    }
    let name = history::file_name(timeline);
    let Some(bytes) = read(timeline)? else {
        return Err(SourceError::MissingHistory { name, places: places.clone() });
    };
    History::parse(timeline, &bytes)
        .map_err(|problem| SourceError::Damaged { path: name.into(), problem })
}

/// The file that makes PostgreSQL recover from an archive; presented to every backup with a label.
pub(crate) fn recovery_signal() -> Result<MapFile, SourceError> {
    Ok(inline(cluster_path("data/recovery.signal")?, Vec::new(), 0))
}

/// A file that the map itself carries.
pub(crate) fn inline(path: ClusterPath, bytes: Vec<u8>, modified: i64) -> MapFile {
    MapFile {
        path,
        size: bytes.len() as u64,
        modified,
        content: Content::Inline(bytes),
        digest: None,
        page_checksums: false,
    }
}

/// A path that must be one inside a cluster.
///
/// # Errors
/// [`SourceError::Damaged`] when it is not.
pub(crate) fn cluster_path(text: &str) -> Result<ClusterPath, SourceError> {
    ClusterPath::new(text)
        .map_err(|err| SourceError::Damaged { path: text.into(), problem: err.to_string() })
}

fn wal_path(name: &str) -> Result<ClusterPath, SourceError> {
    cluster_path(&format!("data/pg_wal/{name}"))
}
