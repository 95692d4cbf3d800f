//! Opens one base backup: compares what lies there with what must, and chooses its WAL.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::directory::Directory;
use super::in_use;
use super::manifest::{BaseManifest, Listed};
use super::segments::Segments;
use super::tree::{self, Found, LeadingOut, Links, Tree};
use crate::digest::Hasher;
use crate::error::{Places, SourceError};
use crate::formats::history::{self, History};
use crate::formats::label;
use crate::formats::objects::{Expected, Objects, build_map, is_absent};
use crate::formats::presented::{self, EMPTY_DIRECTORIES};
use crate::formats::recovery::{self, Needed, cluster_path};
use crate::formats::relation::{check_sizes, relation_file};
use crate::formats::wal::{Segment, SegmentSize};
use crate::location::{Kind, Location};
use crate::map::{Codec, Content, MapFile};
use crate::repository::{Backup, BackupInfo, Tablespace, WalPresented, WalWanted};
use crate::store::Root;

/// The label's path in a mounted cluster.
const LABEL: &str = "data/backup_label";
/// Files that an error names before it says "and more".
const NAMED: usize = 5;

/// Opens a backup.
///
/// # Errors
/// See [`crate::Repository::open_backup`].
pub(crate) fn open(
    directory: Directory,
    location: &Location,
    info: BackupInfo,
    wanted: WalWanted,
) -> Result<Backup, SourceError> {
    let path = directory.root.path().to_path_buf();
    if location.atomic_snapshot && directory.label.is_some() {
        return Err(SourceError::SnapshotWithLabel { path });
    }
    if let Some(user) = in_use::user_of(&path, &[]) {
        return Err(SourceError::InUse(user));
    }
    // One that is not in a tablespace_map was made while the backup ran: its WAL makes it again.
    let mapped = originals(&directory)?;
    let existed = |oid: u32| mapped.as_ref().is_none_or(|mapped| mapped.contains_key(&oid));
    let links = Links {
        named: &location.tablespaces,
        has_files: &|oid| directory.has_files_of(oid) && existed(oid),
        leading_out: match directory.manifest {
            Some(_) => LeadingOut::Follow,
            None => LeadingOut::Refuse,
        },
        original: directory.original()?,
    };
    let (mut tree, mut objects) =
        tree::walk(Root::open(&path)?, &directory.version_directory(), &links)?;
    let parts: Vec<PathBuf> =
        tree.followed.values().map(|part| path.join("pg_tblspc").join(part)).collect();
    if let Some(user) = in_use::user_of(&path, &parts) {
        return Err(SourceError::InUse(user));
    }
    compare(&directory, &tree, location.atomic_snapshot)?;
    let mut files = map_files(&directory, &tree, &mut objects)?;

    let tablespaces = tablespaces(&directory, &tree)?;
    let mut notes = std::mem::take(&mut tree.notes);
    notes.extend(suspicions(&directory, &tablespaces));
    notes.extend(tree.wal_link.as_ref().map(|target| {
        format!(
            "the link `{}` leads out of the backup, to `{}`, and is not followed: name the directory with the backup's WAL with --wal-archive DIR",
            path.join("pg_wal").display(),
            target.display()
        )
    }));
    let archives = Segments::archives(&location.wal_archives, &mut objects)?;
    let unfollowed = tree.wal_link.is_some();
    let stand_in = unfollowed.then(|| Segments::archives(&location.wal_archives, &mut objects));
    let wal = Wal::new(&directory, &tree, archives, stand_in.transpose()?, wanted)?;
    let (wal_files, presented) = wal.files(&mut objects)?;
    files.extend(wal_files);
    if let Some(label) = &directory.label {
        if let Some((_, bytes)) = &label.given {
            files.retain(|file| file.path.as_str() != LABEL);
            files.push(recovery::inline(cluster_path(LABEL)?, bytes.clone(), label.modified));
        }
        files.push(recovery::recovery_signal()?);
    }

    let mut directories = std::mem::take(&mut tree.directories);
    for name in EMPTY_DIRECTORIES.into_iter().chain(["pg_wal/archive_status", "pg_tblspc"]) {
        directories.push(cluster_path(&format!("data/{name}"))?);
    }
    let damaged = |problem| SourceError::Damaged { path: path.clone(), problem };
    let map = build_map(directories, files).map_err(damaged)?;
    let roots_shown: Vec<(String, PathBuf)> = tablespaces
        .iter()
        .filter_map(|tablespace| {
            Some((format!("tablespace {}", tablespace.oid), tablespace.mapped.clone()?))
        })
        .collect();
    Ok(Backup {
        info,
        map,
        objects: objects.into_table(),
        system_identifier: Some(directory.control.system_identifier),
        catalog_version: Some(directory.control.catalog_version),
        databases: None,
        tablespaces,
        timeline: directory.timeline(),
        wal: presented,
        page_checksums: directory.control.page_checksums,
        damaged_files: Vec::new(),
        label: directory.label.map(|label| label.label),
        roots_shown,
        notes,
    })
}

/// Compares the files that were found with the manifest, or, without one, with what sizes alone can tell.
fn compare(directory: &Directory, tree: &Tree, atomic: bool) -> Result<(), SourceError> {
    let path = directory.root.path();
    let Some((manifest, _)) = &directory.manifest else {
        let sizes = tree.files.iter().map(|file| (file.path.as_str(), file.size));
        let control = &directory.control;
        return check_sizes(sizes, control.block_size, control.relation_segment_size, atomic)
            .map_err(|(file, problem)| SourceError::Damaged {
                path: stored_path(tree, &file),
                problem,
            });
    };
    let found: BTreeMap<&str, &Found> =
        tree.files.iter().map(|file| (file.path.as_str(), file)).collect();
    for (file, listed) in
        manifest.files.iter().filter(|(file, _)| presented::shows_file(file.as_str()))
    {
        let Some(found) = found.get(file.as_str()) else {
            if file.as_str() == LABEL {
                stand_in(directory, listed)?;
                continue;
            }
            let inside = file.as_str().strip_prefix("data/").map(str::to_owned);
            let inside =
                inside.unwrap_or_else(|| file.as_str().replacen("tablespaces", "pg_tblspc", 1));
            return Err(SourceError::Missing {
                path: path.join(inside),
                for_what: "backup_manifest lists it".into(),
            });
        };
        if found.size != listed.size {
            return Err(SourceError::WrongSize {
                path: tree.root(found.root).path().join(&found.relative),
                found: found.size,
                expected: listed.size,
            });
        }
    }
    let mut extra: Vec<String> = tree
        .files
        .iter()
        .filter(|file| !manifest.files.contains_key(&file.path))
        .take(NAMED + 1)
        .map(|file| format!("`{}`", file.path.as_str()))
        .collect();
    if extra.is_empty() {
        return Ok(());
    }
    if extra.len() > NAMED {
        extra[NAMED] = "and more".into();
    }
    Err(SourceError::NotInManifest { backup: path.to_path_buf(), files: extra })
}

/// Compares the file that `--backup-label` named with what the manifest says of the label that is not there.
fn stand_in(directory: &Directory, listed: &Listed) -> Result<(), SourceError> {
    let Some((given, bytes)) = directory.label.as_ref().and_then(|label| label.given.as_ref())
    else {
        return Err(SourceError::LabelMissing { path: directory.root.path().join("backup_label") });
    };
    let differs =
        |what: &str| Err(SourceError::LabelDiffers { path: given.clone(), what: what.to_owned() });
    if bytes.len() as u64 != listed.size {
        return differs("size");
    }
    let Some(digest) = &listed.digest else { return Ok(()) };
    let hasher = Hasher::like(digest).map(|mut hasher| {
        hasher.update(bytes);
        hasher.finish()
    });
    if hasher.as_ref() == Some(digest) { Ok(()) } else { differs("checksum") }
}

fn stored_path(tree: &Tree, path: &str) -> PathBuf {
    let found = tree.files.iter().find(|file| file.path.as_str() == path);
    found.map_or_else(|| path.into(), |found| tree.root(found.root).path().join(&found.relative))
}

fn map_files(
    directory: &Directory,
    tree: &Tree,
    objects: &mut Objects,
) -> Result<Vec<MapFile>, SourceError> {
    let manifest: Option<&BaseManifest> = directory.manifest.as_ref().map(|(manifest, _)| manifest);
    tree.files
        .iter()
        .map(|found| {
            let listed = manifest.and_then(|manifest| manifest.files.get(&found.path));
            let content = if found.size == 0 {
                Content::Inline(Vec::new())
            } else {
                let object = objects.add(
                    found.root,
                    found.relative.clone(),
                    Expected::Exactly(found.size),
                )?;
                Content::Stored { object, offset: 0, length: found.size, codec: Codec::None }
            };
            Ok(MapFile {
                path: found.path.clone(),
                size: found.size,
                modified: found.modified,
                content,
                digest: listed.and_then(|listed| listed.digest.clone()),
                page_checksums: directory.control.page_checksums
                    && relation_file(found.path.as_str()).is_some(),
            })
        })
        .collect()
}

/// The tablespaces, with their original locations where a `tablespace_map` tells them.
fn tablespaces(directory: &Directory, tree: &Tree) -> Result<Vec<Tablespace>, SourceError> {
    let originals = originals(directory)?.unwrap_or_default();
    for (oid, location) in &originals {
        if !tree.tablespaces.iter().any(|(found, _)| found == oid) {
            return Err(SourceError::Missing {
                path: directory.root.path().join(format!("pg_tblspc/{oid}")),
                for_what: format!("tablespace_map names this tablespace, at `{location}`"),
            });
        }
    }
    let tablespace = |(oid, link): &(u32, Option<PathBuf>)| {
        let link_text = link.as_ref().map(|link| link.to_string_lossy().into_owned());
        let location = originals.get(oid).cloned().or(link_text).unwrap_or_default();
        let mapped = tree.followed.get(oid).cloned();
        Tablespace { oid: *oid, name: None, location, mapped }
    };
    Ok(tree.tablespaces.iter().map(tablespace).collect())
}

/// The original locations by a `tablespace_map`, which a backup by the low-level functions or in tar format has.
fn originals(directory: &Directory) -> Result<Option<BTreeMap<u32, String>>, SourceError> {
    match directory.root.read("tablespace_map", label::LIMIT) {
        Ok(bytes) => Ok(Some(parse_tablespace_map(&bytes))),
        Err(err) if is_absent(&err) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// Reads `<oid> <location>` lines; a backslash makes the next byte part of the location (PostgreSQL source,
/// `read_tablespace_map`).
fn parse_tablespace_map(bytes: &[u8]) -> BTreeMap<u32, String> {
    let mut lines = vec![String::new()];
    let text = String::from_utf8_lossy(bytes);
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        let line = lines.len() - 1;
        match character {
            '\\' => lines[line].extend(characters.next()),
            '\n' => lines.push(String::new()),
            other => lines[line].push(other),
        }
    }
    let entry = |line: String| {
        let (oid, location) = line.split_once(' ')?;
        Some((oid.parse().ok()?, location.to_owned()))
    };
    lines.into_iter().filter_map(entry).collect()
}

/// What looks as if this were no backup, but the original.
fn suspicions(directory: &Directory, tablespaces: &[Tablespace]) -> Vec<String> {
    let mut notes = Vec::new();
    let path = directory.root.path().display();
    if directory.root.metadata("postmaster.pid").is_ok() {
        notes.push(format!(
            "`{path}` holds a postmaster.pid: if a server runs on this directory, it is no backup"
        ));
    }
    for tablespace in tablespaces {
        let from_map = directory.root.metadata("tablespace_map").is_ok();
        if from_map
            && tablespace
                .mapped
                .as_ref()
                .is_some_and(|mapped| mapped.as_os_str() == tablespace.location.as_str())
        {
            notes.push(format!(
                "tablespace {} leads to its original location `{}`: make sure that the backup's copy lies there",
                tablespace.oid, tablespace.location
            ));
        }
    }
    notes
}

/// The WAL of a base backup: its own and that of the archives.
struct Wal<'a> {
    directory: &'a Directory,
    tree: &'a Tree,
    own: Segments,
    archives: Segments,
    size: SegmentSize,
    wanted: WalWanted,
}

impl<'a> Wal<'a> {
    fn new(
        directory: &'a Directory,
        tree: &'a Tree,
        archives: Segments,
        stand_in: Option<Segments>,
        wanted: WalWanted,
    ) -> Result<Self, SourceError> {
        let own = match &tree.wal {
            Some((number, relative)) => Segments::directory(tree.root(*number), relative, *number)?,
            None => Segments::default(),
        };
        // What the user named stands in for a `pg_wal` that is not followed: crash recovery of a snapshot reads it, too.
        let own = stand_in.unwrap_or(own);
        Ok(Self { directory, tree, own, archives, size: directory.wal_segment_size, wanted })
    }

    /// For the newest WAL the archive goes first: the last segment that `pg_basebackup -X stream` left in `pg_wal`
    /// ends where the backup ended. The end of the backup needs nothing that is not in `pg_wal`.
    fn order(&self) -> [&Segments; 2] {
        match self.wanted {
            WalWanted::EndOfBackup => [&self.own, &self.archives],
            WalWanted::Latest => [&self.archives, &self.own],
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        for segments in self.order() {
            if let Some(bytes) = segments.small(name)? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    fn read_history(&self, timeline: u32) -> Result<Option<Vec<u8>>, SourceError> {
        self.read(&history::file_name(timeline))
    }

    fn places(&self) -> Places {
        let places = self.own.places().into_iter().chain(self.archives.places());
        let own = self.tree.wal.is_some().then(|| self.directory.root.path().join("pg_wal"));
        let shown = places.map(|place| match &own {
            Some(own) if place == self.directory.root.path() => format!("`{}`", own.display()),
            _ => format!("`{}`", place.display()),
        });
        let mut shown: Vec<String> = shown.collect();
        shown.dedup();
        let shown = if shown.is_empty() { "the backup".into() } else { shown.join(" and ") };
        Places { shown, kind: Kind::BaseBackup }
    }

    fn files(&self, objects: &mut Objects) -> Result<(Vec<MapFile>, WalPresented), SourceError> {
        match &self.directory.label {
            Some(_) => self.with_label(objects),
            None => self.without_label(objects),
        }
    }

    fn with_label(
        &self,
        objects: &mut Objects,
    ) -> Result<(Vec<MapFile>, WalPresented), SourceError> {
        let timeline = self.directory.timeline();
        let places = self.places();
        let history =
            recovery::read_history(timeline, &places, |timeline| self.read_history(timeline))?;
        let needed = Needed {
            history: &history,
            size: self.size,
            start: self.start(),
            stop: self.stop()?,
            wanted: self.wanted,
            places: &places,
        };
        let there: BTreeMap<Segment, ()> = self
            .own
            .of_size(self.size)
            .chain(self.archives.of_size(self.size))
            .map(|segment| (segment, ()))
            .collect();
        let chosen = recovery::choose(&there, &needed)?;
        let presented = recovery::presented(&chosen, &needed);
        let mut files = self.segment_files(&chosen, objects)?;
        files.extend(recovery::history_files(&history, timeline, |timeline| {
            self.read_history(timeline)
        })?);
        Ok((files, presented))
    }

    /// Without a label `pg_wal` is shown as it was captured, from the last checkpoint on: crash recovery reads it as
    /// the original server would have. Archived segments are added when the newest WAL is wanted.
    fn without_label(
        &self,
        objects: &mut Objects,
    ) -> Result<(Vec<MapFile>, WalPresented), SourceError> {
        let first = self.size.number_at(self.directory.control.redo_lsn);
        let timeline = self.directory.timeline();
        let mut chosen: Vec<Segment> =
            self.own.of_size(self.size).filter(|segment| segment.number >= first).collect();
        let mut expected_last = None;
        let mut histories = self.own.histories();
        if self.wanted == WalWanted::Latest && !self.archives.is_empty() {
            let places = self.places();
            let history = match self.read_history(timeline)? {
                Some(_) => recovery::read_history(timeline, &places, |timeline| {
                    self.read_history(timeline)
                })?,
                None => History::only(timeline),
            };
            let archived: BTreeMap<Segment, ()> =
                self.archives.of_size(self.size).map(|segment| (segment, ())).collect();
            let own: BTreeMap<Segment, ()> = chosen.iter().map(|segment| (*segment, ())).collect();
            let last = archived
                .keys()
                .rfind(|segment| segment.timeline == timeline && segment.number >= first)
                .copied();
            if let Some(last) = last {
                let needed = Needed {
                    history: &history,
                    size: self.size,
                    start: first,
                    stop: Some(last.number),
                    wanted: WalWanted::EndOfBackup,
                    places: &places,
                };
                chosen
                    .extend(recovery::choose(&archived.into_iter().chain(own).collect(), &needed)?);
                expected_last = Some(self.size.name(last));
            }
            histories.extend(std::iter::once(timeline).chain(history.ancestors()));
        }
        chosen.sort_unstable();
        chosen.dedup();
        histories.sort_unstable();
        histories.dedup();
        let mut files = self.segment_files(&chosen, objects)?;
        for timeline in histories {
            if let Some(bytes) = self.read_history(timeline)? {
                let path = cluster_path(&format!("data/pg_wal/{}", history::file_name(timeline)))?;
                files.push(recovery::inline(path, bytes, 0));
            }
        }
        let name = |segment: Option<&Segment>| segment.map(|segment| self.size.name(*segment));
        let presented = WalPresented {
            first: name(chosen.first()),
            last: name(chosen.last()),
            segment_size: self.size.bytes(),
            stop_segment: None,
            expected_last,
        };
        Ok((files, presented))
    }

    fn segment_files(
        &self,
        chosen: &[Segment],
        objects: &mut Objects,
    ) -> Result<Vec<MapFile>, SourceError> {
        let mut files = Vec::new();
        for segment in chosen {
            let name = self.size.name(*segment);
            let [first, second] = self.order();
            let found = match first.segment(&name)? {
                Some(found) => Some(found),
                None => second.segment(&name)?,
            };
            let found = found.ok_or_else(|| SourceError::MissingWal {
                segment: name.clone(),
                places: self.places(),
            })?;
            files.push(recovery::segment_file(objects, &name, self.size, &found)?);
        }
        Ok(files)
    }

    /// Number of the segment that recovery begins in.
    fn start(&self) -> u64 {
        let label = self.directory.label.as_ref();
        self.size
            .number_at(label.map_or(self.directory.control.redo_lsn, |label| label.label.start_lsn))
    }

    /// Number of the segment in which the backup ends: from its manifest, else from its history file in the archive.
    fn stop(&self) -> Result<Option<u64>, SourceError> {
        let range =
            self.directory.manifest.as_ref().and_then(|(manifest, _)| manifest.last_range());
        if let Some(range) = range {
            return Ok(Some(self.size.number_before(range.end_lsn)));
        }
        let Some(label) = &self.directory.label else { return Ok(None) };
        let offset = label.label.start_lsn % self.size.bytes();
        let name = format!("{}.{offset:08X}.backup", label.label.start_segment);
        let stop = self.read(&name)?.and_then(|bytes| label::parse_stop(&bytes));
        Ok(stop.map(|stop| self.size.number_before(stop)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_tablespace_maps() {
        let map = parse_tablespace_map(b"16384 /srv/ts one\n16385 /a\\\nb\\\\c\nnonsense\n");
        assert_eq!(
            map,
            BTreeMap::from([(16384, "/srv/ts one".into()), (16385, "/a\nb\\c".into())])
        );
    }
}
