//! One base backup's own words about itself: version, `pg_control`, label and manifest.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::manifest::{self, BaseManifest, Problem};
use super::segments::Segments;
use super::tree::{self, LeadingOut, Links, incremental};
use crate::error::SourceError;
use crate::formats::control::{self, Control};
use crate::formats::label;
use crate::formats::objects::{Objects, is_absent};
use crate::formats::wal::{self, Segment, SegmentSize};
use crate::location::Location;
use crate::repository::{BackupInfo, BackupLabel, WalReach};
use crate::store::{Kind, Root};

/// A base backup's directory with what was read of it.
#[derive(Debug)]
pub(crate) struct Directory {
    /// The directory.
    pub root: Root,
    /// Major version.
    pub major: u32,
    /// Fields of `pg_control`.
    pub control: Control,
    /// Bytes of a WAL segment.
    pub wal_segment_size: SegmentSize,
    /// The label, its bytes and file time.
    pub label: Option<Label>,
    /// `backup_manifest`, and its file time.
    pub manifest: Option<(BaseManifest, i64)>,
}

/// A label.
#[derive(Debug)]
pub(crate) struct Label {
    /// What it says.
    pub label: BackupLabel,
    /// The file that `--backup-label` named, with its bytes.
    pub given: Option<(PathBuf, Vec<u8>)>,
    /// Last modification of its file.
    pub modified: i64,
}

impl Directory {
    /// Reads what a base backup says about itself.
    ///
    /// # Errors
    /// A part of it is damaged or of a kind that is not read.
    pub(crate) fn read(path: &Path, location: &Location) -> Result<Self, SourceError> {
        let root = Root::open(path)?;
        let damaged =
            |name: &str, problem: String| SourceError::Damaged { path: path.join(name), problem };
        let version = root.read("PG_VERSION", 64)?;
        let version = String::from_utf8_lossy(&version).trim().to_owned();
        let major = crate::formats::pgbackrest::major(&version).ok_or_else(|| {
            damaged("PG_VERSION", format!("`{version}` is no version of PostgreSQL"))
        })?;
        let control = root.read("global/pg_control", control::LIMIT)?;
        let control =
            control::parse(&control).map_err(|problem| damaged("global/pg_control", problem))?;
        let wal_segment_size = SegmentSize::new(control.wal_segment_size)
            .ok_or_else(|| damaged("global/pg_control", "its WAL segment size cannot be".into()))?;
        let label = read_label(&root, location.backup_label.as_deref())?;
        let manifest = match read_optional(&root, "backup_manifest", manifest::LIMIT)? {
            None => None,
            Some((bytes, modified)) => match manifest::parse(&bytes) {
                Ok(manifest) => Some((manifest, modified)),
                Err(Problem::Damaged(problem)) => return Err(damaged("backup_manifest", problem)),
                Err(Problem::Version(version)) => {
                    return Err(SourceError::Unsupported {
                        object: format!("`{}`", path.join("backup_manifest").display()),
                        what: format!("backup_manifest version {version}"),
                    });
                }
            },
        };
        if let Some((BaseManifest { system_identifier: Some(stated), .. }, _)) = &manifest
            && *stated != control.system_identifier
        {
            return Err(damaged(
                "backup_manifest",
                "its system identifier is not that of pg_control".into(),
            ));
        }
        Ok(Self { root, major, control, wal_segment_size, label, manifest })
    }

    /// The timeline to recover on: that on which the backup ended.
    pub(crate) fn timeline(&self) -> u32 {
        let range = self.manifest.as_ref().and_then(|(manifest, _)| manifest.last_range());
        let label = self.label.as_ref().map(|label| label.label.timeline);
        range.map(|range| range.timeline).or(label).unwrap_or(self.control.timeline)
    }

    /// Name of a tablespace's directory for this cluster (PostgreSQL source, `TABLESPACE_VERSION_DIRECTORY`).
    pub(crate) fn version_directory(&self) -> String {
        format!("PG_{}_{}", self.major, self.control.catalog_version)
    }

    /// The data directory of the original server, by the command line that it wrote down at its start (PostgreSQL source,
    /// `CreateOptsFile`: every word but the first is quoted); none for a backup that left that file out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn original(&self) -> Result<Option<PathBuf>, SourceError> {
        let Some((bytes, _)) = read_optional(&self.root, "postmaster.opts", 64 << 10)? else {
            return Ok(None);
        };
        Ok(original_in(&String::from_utf8_lossy(&bytes)))
    }

    /// Whether the backup holds files of a tablespace; without a manifest nothing tells.
    pub(crate) fn has_files_of(&self, oid: u32) -> bool {
        let start = format!("tablespaces/{oid}/");
        self.manifest.as_ref().is_none_or(|(manifest, _)| {
            manifest.files.keys().any(|file| file.as_str().starts_with(&start))
        })
    }

    /// Fills in an entry of the list.
    ///
    /// # Errors
    /// The directory or an archive cannot be listed.
    pub(crate) fn describe(
        &self,
        info: &mut BackupInfo,
        location: &Location,
    ) -> Result<(), SourceError> {
        info.postgres_major = self.major;
        let control_modified = self.root.metadata("global/pg_control")?.modified;
        let label = self.label.as_ref();
        info.started_at = label.map_or(control_modified, |label| {
            label.label.start_time.as_deref().and_then(utc_time).unwrap_or(label.modified)
        });
        info.start_lsn = label.map(|label| label.label.start_lsn);
        let archives = Segments::archives(&location.wal_archives, &mut Objects::default())?;
        match &self.manifest {
            Some((manifest, modified)) => {
                info.stopped_at = Some(*modified);
                info.size = manifest.size();
                info.stop_lsn = manifest.last_range().map(|range| range.end_lsn);
            }
            None => info.stopped_at = Some(control_modified),
        }
        let wal = match self.root.metadata("pg_wal") {
            Ok(entry) if entry.kind == Kind::Directory => {
                Some(Segments::directory(&self.root, "pg_wal", 0)?)
            }
            Ok(_) | Err(_) => None,
        };
        info.archived_until = self.reach(info, &[archives, wal.unwrap_or_default()]);
        if self.manifest.is_none() {
            let root = Root::open(self.root.path())?;
            let links = Links {
                named: &location.tablespaces,
                has_files: &|_| true,
                leading_out: LeadingOut::Skip,
                original: self.original()?,
            };
            let (tree, _) = tree::walk(root, &self.version_directory(), &links)?;
            info.size = tree.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.size));
        }
        Ok(())
    }
}

impl Directory {
    /// Tells how far the WAL goes that follows the backup without a gap.
    fn reach(&self, info: &BackupInfo, places: &[Segments]) -> Option<WalReach> {
        let (timeline, size) = (self.timeline(), self.wal_segment_size);
        let stop = info.stop_lsn.map(|lsn| size.number_before(lsn));
        let start = size.number_at(info.start_lsn.unwrap_or(self.control.redo_lsn));
        let segments = places.iter().flat_map(|place| place.of_size(size));
        let numbers: BTreeSet<u64> = segments
            .filter(|segment| segment.timeline == timeline)
            .map(|segment| segment.number)
            .collect();
        let numbers: Vec<u64> = numbers.into_iter().collect();
        let at = numbers.binary_search(&stop.unwrap_or(start)).ok()?;
        let last = at + wal::run_length(&numbers, at) - 1;
        let name = |number| size.name(Segment { number, timeline });
        let segment = name(numbers[last]);
        let gap = (last + 1 < numbers.len()).then(|| name(numbers[last] + 1));
        let modified = places.iter().find_map(|place| place.modified(&segment))?;
        Some(WalReach { segment, modified, gap })
    }
}

fn original_in(options: &str) -> Option<PathBuf> {
    let mut words = options.split('"').skip(1).step_by(2);
    while let Some(word) = words.next() {
        let directory = match word {
            "-D" => words.next()?,
            word => word
                .strip_prefix("-D")
                .or_else(|| word.strip_prefix("--data_directory="))
                .unwrap_or_default(),
        };
        if directory.starts_with('/') {
            return Some(directory.into());
        }
    }
    None
}

/// Reads the label in the directory, or the file that stands in for it.
fn read_label(root: &Root, given: Option<&Path>) -> Result<Option<Label>, SourceError> {
    let own = read_optional(root, "backup_label", label::LIMIT)?;
    let (path, bytes, modified, given) = match (own, given) {
        (own, Some(path)) => {
            let bytes = read_given(path)?;
            if own.is_some_and(|(own, _)| own != bytes) {
                return Err(SourceError::LabelGivenTwice { path: root.path().to_path_buf() });
            }
            let modified = root.metadata("global/pg_control")?.modified;
            (path.to_path_buf(), bytes.clone(), modified, Some((path.to_path_buf(), bytes)))
        }
        (Some((bytes, modified)), None) => {
            (root.path().join("backup_label"), bytes, modified, None)
        }
        (None, None) => return Ok(None),
    };
    let parsed = label::parse(&bytes)
        .map_err(|problem| SourceError::Damaged { path: path.clone(), problem })?;
    if parsed.incremental {
        return Err(incremental(root.path()));
    }
    Ok(Some(Label { label: parsed.label, given, modified }))
}

fn read_given(path: &Path) -> Result<Vec<u8>, SourceError> {
    let failed = |err: std::io::Error| {
        std::io::Error::new(err.kind(), format!("--backup-label `{}`: {err}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(SourceError::Damaged {
            path: path.to_path_buf(),
            problem: "it is no regular file".into(),
        });
    }
    let mut bytes = Vec::new();
    file.take(label::LIMIT).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn read_optional(
    root: &Root,
    name: &str,
    limit: u64,
) -> Result<Option<(Vec<u8>, i64)>, SourceError> {
    match root.metadata(name) {
        Ok(entry) => Ok(Some((root.read(name, limit)?, entry.modified))),
        Err(err) if is_absent(&err) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// Reads `2026-11-22 23:21:01 UTC`. Other zones are abbreviations, which name no zone for certain.
fn utc_time(text: &str) -> Option<i64> {
    let time = text.strip_suffix(" UTC").or_else(|| text.strip_suffix(" GMT"))?;
    let time = jiff::civil::DateTime::strptime("%Y-%m-%d %H:%M:%S", time).ok()?;
    Some(jiff::tz::TimeZone::UTC.to_timestamp(time).ok()?.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A base backup without a manifest: its tablespace lies elsewhere, and WAL in an archive.
    fn sample(at: &Path) -> Location {
        let (data, space, archive) = (at.join("data"), at.join("space"), at.join("archive"));
        for directory in [
            data.join("global"),
            data.join("pg_wal"),
            data.join("pg_tblspc"),
            space.join("PG_15_202209061"),
            archive.clone(),
        ] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        std::fs::write(data.join("global/pg_control"), control::tests::sample(true)).unwrap();
        std::fs::write(space.join("PG_15_202209061/file"), [0; 1000]).unwrap();
        std::os::unix::fs::symlink(&space, data.join("pg_tblspc/16389")).unwrap();
        for number in [2, 3, 5] {
            std::fs::write(archive.join(format!("00000001000000000000000{number}")), "").unwrap();
        }
        let tablespaces = [(16389, Some(space))].into();
        Location { path: data, wal_archives: vec![archive], tablespaces, ..Location::default() }
    }

    #[test]
    fn the_original_directory_is_told_by_its_servers_command_line() {
        let cases = [
            ("/usr/lib/postgresql/15/bin/postgres \"-D\" \"/srv/my data\"\n", Some("/srv/my data")),
            ("postgres \"-c\" \"x=-D\" \"-D/srv/a\"\n", Some("/srv/a")),
            ("postgres \"-D\" \"relative\"\n", None),
            ("postgres\n", None),
        ];
        for (text, want) in cases {
            assert_eq!(original_in(text), want.map(PathBuf::from), "{text}");
        }
    }

    #[test]
    fn a_listed_backup_has_its_tablespaces_whatever_archives_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let location = sample(dir.path());
        let repository = crate::Repository::open(&location).unwrap();
        let info = repository.backups().unwrap().remove(0);
        assert_eq!((info.unusable, info.size), (None, 3 + 8192 + 1000));
        let reach = info.archived_until.unwrap();
        assert_eq!(reach.segment, "000000010000000000000003", "recovery gets no further");
        assert_eq!(reach.gap.as_deref(), Some("000000010000000000000004"));
    }

    #[test]
    fn times() {
        assert_eq!(utc_time("2026-11-22 23:21:01 UTC"), Some(1_795_389_661));
        assert_eq!(utc_time("1970-01-01 00:00:10 GMT"), Some(10));
        for text in ["2026-11-22 23:21:01 CET", "2026-11-22 23:21:01", "x UTC", ""] {
            assert_eq!(utc_time(text), None, "{text}");
        }
    }
}
