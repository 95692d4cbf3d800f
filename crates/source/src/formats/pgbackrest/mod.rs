//! pgBackRest repositories of format 5 on a local path.
//!
//! `backup.info` lists the finished backups, each one's `backup.manifest` its files, and the stanza's archive holds
//! the WAL. Encryption, block incremental backups and bz2 are refused by name.

mod archive;
mod files;
mod info;
mod ini;
mod manifest;

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

pub(crate) use self::info::major;

use self::archive::{Archive, Needs};
use self::info::{Archives, Listed};
use self::ini::Problem;
use self::manifest::Manifest;
use super::control::{self, Control};
use super::history::History;
use super::label;
use super::objects::{Objects, build_map, is_absent};
use super::presented::{self, EMPTY_DIRECTORIES};
use super::recovery::{self, Needed, cluster_path};
use super::relation::relation_file;
use super::wal::{Segment, SegmentSize, WalFile};
use crate::error::{Places, SourceError};
use crate::location;
use crate::map::MapFile;
use crate::repository::{Backup, BackupInfo, BackupLabel, WalPresented, WalWanted};
use crate::store::{Kind, Root};

/// Longest info file that is read, in bytes.
const INFO_LIMIT: u64 = 256 << 20;
/// Longest manifest that is read, in bytes: some 8 million files.
const MANIFEST_LIMIT: u64 = 2 << 30;
/// Bytes at a manifest's head that hold its options.
const HEAD: u64 = 64 << 10;

/// One stanza of a repository.
#[derive(Debug)]
pub(crate) struct PgBackRest {
    root: Root,
    stanza: String,
}

/// The archives that were looked into while backups are listed.
type KnownArchives<'a> = HashMap<String, Archive<'a>>;

impl PgBackRest {
    /// Whether `root` holds a pgBackRest repository.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn detect(root: &Root) -> Result<bool, SourceError> {
        Ok(!stanzas(root)?.is_empty())
    }

    /// Opens the stanza, which need not be named if it is the only one.
    ///
    /// # Errors
    /// No stanza, several, or not the one that was asked for.
    pub(crate) fn open(root: Root, stanza: Option<&str>) -> Result<Self, SourceError> {
        let mut known = stanzas(&root)?;
        let path = root.path().to_path_buf();
        let stanza = match stanza {
            Some(stanza) if known.iter().any(|known| known == stanza) => stanza.to_owned(),
            Some(stanza) => {
                return Err(SourceError::UnknownStanza { path, stanza: stanza.into(), known });
            }
            None if known.len() > 1 => return Err(SourceError::SeveralStanzas { path, known }),
            None => known.pop().ok_or_else(|| SourceError::NotARepository {
                path,
                found: "no `backup/<stanza>/backup.info` (pgBackRest)".into(),
            })?,
        };
        Ok(Self { root, stanza })
    }

    /// The stanza.
    pub(crate) fn stanza(&self) -> &str {
        &self.stanza
    }

    /// Lists the finished backups, oldest first.
    ///
    /// # Errors
    /// `backup.info` cannot be used.
    pub(crate) fn backups(&self) -> Result<Vec<BackupInfo>, SourceError> {
        let mut notes = Vec::new();
        let listed = self.listed(&mut notes)?;
        let archives = self.archives(&mut notes).unwrap_or_default(); // a list is of use without its WAL
        let mut known = KnownArchives::new();
        listed.iter().map(|listed| self.complete(listed, &archives, &mut known)).collect()
    }

    /// Opens one backup.
    ///
    /// # Errors
    /// See [`crate::Repository::open_backup`].
    pub(crate) fn open_backup(
        &self,
        id: Option<&str>,
        wal: WalWanted,
    ) -> Result<Backup, SourceError> {
        let mut notes = Vec::new();
        let listed = self.listed(&mut notes)?;
        let listed = self.choose(listed, id)?;
        let manifest = self.manifest(&listed, &mut notes)?;
        self.assemble(&listed, manifest, wal, notes)
    }

    /// See [`crate::Repository::identifying_files`].
    pub(crate) fn identifying_files(&self, id: &str) -> Vec<String> {
        let directory = self.in_backup(id);
        ["backup.manifest", "backup.manifest.copy"].map(|name| format!("{directory}/{name}")).into()
    }

    /// Finds the backup `id`, or the newest.
    fn choose(&self, mut listed: Vec<Listed>, id: Option<&str>) -> Result<Listed, SourceError> {
        let path = self.root.path().to_path_buf();
        let Some(id) = id else { return listed.pop().ok_or(SourceError::NoBackups { path }) };
        if let Some(at) = listed.iter().position(|listed| listed.info.id == id) {
            return Ok(listed.swap_remove(at));
        }
        let known = listed.into_iter().map(|listed| listed.info.id).collect();
        let id = id.to_owned();
        if info::is_label(&id) && self.root.metadata(self.in_backup(&id)).is_ok() {
            Err(SourceError::Unfinished { path, id, known })
        } else {
            Err(SourceError::UnknownBackup { path, id, known })
        }
    }

    fn assemble(
        &self,
        listed: &Listed,
        manifest: Manifest,
        wanted: WalWanted,
        mut notes: Vec<String>,
    ) -> Result<Backup, SourceError> {
        let manifest_path =
            self.root.path().join(self.in_backup(&manifest.label)).join("backup.manifest");
        let damaged =
            |problem: String| SourceError::Damaged { path: manifest_path.clone(), problem };
        let mut objects = Objects::default();
        let root_number = objects.add_root(&self.root);
        let mut files =
            files::convert(&manifest, &format!("backup/{}", self.stanza), &mut objects)?;
        objects.check(&[&self.root])?;

        let control = self.control(&files.shown, &objects, &damaged)?;
        if control.system_identifier != manifest.system_identifier {
            return Err(damaged("its system identifier is not that of pg_control".into()));
        }
        let size = SegmentSize::new(control.wal_segment_size)
            .ok_or_else(|| damaged("its WAL segment size cannot be".into()))?;
        for file in &mut files.shown {
            file.page_checksums =
                control.page_checksums && relation_file(file.path.as_str()).is_some();
        }
        let label = self.label(&files.shown, &objects, &manifest, &damaged)?;
        let source = WalSource { repository: self, listed, root_number, size, wanted };
        let wal = source.find(&manifest, &control, files.wal, &damaged, &mut notes)?;
        for (name, file) in &wal.files {
            files.shown.push(recovery::segment_file(&mut objects, name, size, file)?);
        }
        files.shown.extend(wal.histories);
        if label.is_some() {
            files.shown.push(recovery::recovery_signal()?);
        }

        let mut directories = manifest.directories;
        directories.retain(|directory| presented::shows_directory(directory.as_str()));
        let made = EMPTY_DIRECTORIES.into_iter().chain(["pg_wal/archive_status", "pg_tblspc"]);
        for name in made {
            directories.push(cluster_path(&format!("data/{name}"))?);
        }
        for tablespace in &manifest.tablespaces {
            directories.push(cluster_path(&format!("tablespaces/{}", tablespace.oid))?);
        }
        let map = build_map(directories, files.shown).map_err(&damaged)?;
        let archives = self.archives(&mut Vec::new()).unwrap_or_default();
        let info = self.complete(listed, &archives, &mut KnownArchives::new())?;
        Ok(Backup {
            info,
            map,
            objects: objects.into_table(),
            system_identifier: Some(manifest.system_identifier),
            catalog_version: Some(manifest.catalog_version),
            databases: Some(manifest.databases),
            tablespaces: manifest.tablespaces,
            label,
            timeline: wal.timeline,
            wal: wal.presented,
            page_checksums: control.page_checksums,
            damaged_files: files.damaged,
            roots_shown: Vec::new(),
            notes,
        })
    }

    fn control(
        &self,
        files: &[MapFile],
        objects: &Objects,
        damaged: &impl Fn(String) -> SourceError,
    ) -> Result<Control, SourceError> {
        let bytes = objects.read(files, control::PATH, control::LIMIT)?;
        let bytes = bytes.ok_or_else(|| damaged("it lists no global/pg_control".into()))?;
        control::parse(&bytes).map_err(|problem| damaged(format!("pg_control in it: {problem}")))
    }

    fn label(
        &self,
        files: &[MapFile],
        objects: &Objects,
        manifest: &Manifest,
        damaged: &impl Fn(String) -> SourceError,
    ) -> Result<Option<BackupLabel>, SourceError> {
        let Some(bytes) = objects.read(files, "data/backup_label", label::LIMIT)? else {
            return if manifest.online {
                Err(damaged(
                    "it lists no backup_label, but the backup was taken from a running server"
                        .into(),
                ))
            } else {
                Ok(None)
            };
        };
        let parsed = label::parse(&bytes)
            .map_err(|problem| damaged(format!("backup_label in it: {problem}")))?;
        if manifest.archive_start.as_ref().is_some_and(|start| *start != parsed.label.start_segment)
        {
            return Err(damaged("its first WAL segment is not that of backup_label".into()));
        }
        Ok(Some(parsed.label))
    }

    /// Fills in what `backup.info` does not say.
    fn complete<'a>(
        &'a self,
        listed: &Listed,
        archives: &Archives,
        known: &mut KnownArchives<'a>,
    ) -> Result<BackupInfo, SourceError> {
        let mut info = listed.info.clone();
        info.unusable = self.unusable(&info.id);
        let archive_id = info::archive_id(archives, listed.history_id, &listed.cluster);
        let (Some(archive_id), Some(start), Some(stop)) =
            (archive_id, &listed.archive_start, &listed.archive_stop)
        else {
            return Ok(info);
        };
        if !known.contains_key(&archive_id) {
            known.insert(archive_id.clone(), self.archive(&archive_id)?);
        }
        if let Some(archive) = known.get_mut(&archive_id) {
            let needs = Needs {
                start,
                stop,
                start_lsn: info.start_lsn,
                stop_lsn: info.stop_lsn,
                own: listed.archive_copy,
            };
            match archive.reach(&needs) {
                Ok(reach) => info.archived_until = reach,
                Err(err @ SourceError::MissingWal { .. }) => {
                    info.unusable = info.unusable.or(Some(err.to_string()));
                }
                Err(err) => return Err(err),
            }
        }
        Ok(info)
    }

    fn archive(&self, archive_id: &str) -> Result<Archive<'_>, SourceError> {
        Archive::open(&self.root, format!("archive/{}/{archive_id}", self.stanza))
    }

    /// Says why a backup cannot be opened, from the head of its manifest.
    fn unusable(&self, id: &str) -> Option<String> {
        let path = format!("{}/backup.manifest", self.in_backup(id));
        let file = match self.root.open_file(&path) {
            Ok(file) => file,
            Err(err) if is_absent(&err) => return Some("its backup.manifest is missing".into()),
            Err(err) => return Some(err.to_string()),
        };
        let mut head = Vec::new();
        if let Err(err) = file.take(HEAD).read_to_end(&mut head) {
            return Some(err.to_string());
        }
        let has_block_maps = || match self.root.read(&path, MANIFEST_LIMIT) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).contains("\"bim\":"),
            Err(_) => true,
        };
        manifest::unusable(&head, has_block_maps)
    }

    fn in_backup(&self, name: &str) -> String {
        format!("backup/{}/{name}", self.stanza)
    }

    fn listed(&self, notes: &mut Vec<String>) -> Result<Vec<Listed>, SourceError> {
        let path = self.in_backup("backup.info");
        Ok(load(&self.root, &path, INFO_LIMIT, notes, info::parse_backups)?.backups)
    }

    fn archives(&self, notes: &mut Vec<String>) -> Result<Archives, SourceError> {
        let path = format!("archive/{}/archive.info", self.stanza);
        load(&self.root, &path, INFO_LIMIT, notes, info::parse_archives)
    }

    fn manifest(&self, listed: &Listed, notes: &mut Vec<String>) -> Result<Manifest, SourceError> {
        let id = &listed.info.id;
        let path = format!("{}/backup.manifest", self.in_backup(id));
        load(&self.root, &path, MANIFEST_LIMIT, notes, |bytes| {
            let manifest = manifest::parse(bytes)?;
            if manifest.label != *id {
                return Err(Problem::damaged(format!("it belongs to backup `{}`", manifest.label)));
            }
            if manifest.system_identifier != listed.cluster.system_identifier {
                return Err(Problem::damaged(
                    "it belongs to another cluster than backup.info says",
                ));
            }
            Ok(manifest)
        })
    }
}

/// Finds the WAL of one backup.
struct WalSource<'a> {
    repository: &'a PgBackRest,
    listed: &'a Listed,
    root_number: u32,
    size: SegmentSize,
    wanted: WalWanted,
}

/// The WAL of one backup.
struct Wal {
    files: Vec<(String, WalFile)>,
    histories: Vec<MapFile>,
    timeline: u32,
    presented: WalPresented,
}

impl WalSource<'_> {
    fn find(
        &self,
        manifest: &Manifest,
        control: &Control,
        own: BTreeMap<String, WalFile>,
        damaged: &impl Fn(String) -> SourceError,
        notes: &mut Vec<String>,
    ) -> Result<Wal, SourceError> {
        let size = self.size;
        let own: BTreeMap<Segment, WalFile> =
            own.into_iter().filter_map(|(name, file)| Some((size.parse(&name)?, file))).collect();
        if !manifest.online {
            return Ok(self.offline(control, own));
        }
        let segment = |name: &Option<String>| name.as_ref().and_then(|name| size.parse(name));
        let (Some(start), Some(stop)) =
            (segment(&manifest.archive_start), segment(&manifest.archive_stop))
        else {
            return Err(damaged("it does not say which WAL segments the backup needs".into()));
        };
        if stop.number < start.number || stop.timeline < start.timeline {
            return Err(damaged("its last WAL segment comes before its first".into()));
        }
        let timeline = stop.timeline;
        let covered = timeline == 1
            && (start.number..=stop.number)
                .all(|number| own.contains_key(&Segment { number, timeline }));
        if covered && self.wanted == WalWanted::EndOfBackup {
            let shown = "the backup's own pg_wal".into();
            let places = Places { shown, kind: location::Kind::PgBackRest };
            let (files, presented) = self.choose(&History::only(1), start, stop, &places, own)?;
            return Ok(Wal { files, histories: Vec::new(), timeline, presented });
        }
        let archives = self.repository.archives(notes)?;
        let archive_id = info::archive_id(&archives, self.listed.history_id, &self.listed.cluster);
        let archive_id = archive_id.ok_or_else(|| SourceError::Missing {
            path: self.repository.root.path().join("archive").join(&self.repository.stanza),
            for_what: "archive.info knows no archive of the backup's cluster".into(),
        })?;
        let archive = self.repository.archive(&archive_id)?;
        let places = archive.places();
        let history =
            recovery::read_history(timeline, &places, |timeline| archive.history(timeline))?;
        let last = if self.wanted == WalWanted::EndOfBackup { stop.number } else { u64::MAX };
        let mut there = archive.segments(&history, size, (start.number, last), self.root_number)?;
        for (segment, file) in own {
            there.entry(segment).or_insert(file);
        }
        let histories =
            recovery::history_files(&history, timeline, |timeline| archive.history(timeline))?;
        let (files, presented) = self.choose(&history, start, stop, &places, there)?;
        Ok(Wal { files, histories, timeline, presented })
    }

    fn choose(
        &self,
        history: &History,
        start: Segment,
        stop: Segment,
        places: &Places,
        mut there: BTreeMap<Segment, WalFile>,
    ) -> Result<(Vec<(String, WalFile)>, WalPresented), SourceError> {
        let needed = Needed {
            history,
            size: self.size,
            start: start.number,
            stop: Some(stop.number),
            wanted: self.wanted,
            places,
        };
        let chosen = recovery::choose(&there, &needed)?;
        let presented = recovery::presented(&chosen, &needed);
        let files = chosen
            .iter()
            .filter_map(|segment| Some((self.size.name(*segment), there.remove(segment)?)));
        Ok((files.collect(), presented))
    }

    /// An offline backup holds the WAL that its server left behind, from the last checkpoint on.
    fn offline(&self, control: &Control, own: BTreeMap<Segment, WalFile>) -> Wal {
        let first = self.size.number_at(control.redo_lsn);
        let files: Vec<_> = own
            .into_iter()
            .filter(|(segment, _)| segment.number >= first)
            .map(|(segment, file)| (self.size.name(segment), file))
            .collect();
        let presented = WalPresented {
            first: files.first().map(|(name, _)| name.clone()),
            last: files.last().map(|(name, _)| name.clone()),
            segment_size: self.size.bytes(),
            stop_segment: None,
            expected_last: None,
        };
        Wal { files, histories: Vec::new(), timeline: control.timeline, presented }
    }
}

/// The stanzas: directories below `backup` that hold a `backup.info`, or what is left of one.
fn stanzas(root: &Root) -> Result<Vec<String>, SourceError> {
    let entries = match root.list("backup") {
        Ok(entries) => entries,
        Err(err) if is_absent(&err) => return Ok(Vec::new()),
        Err(err) => return Err(err.into()),
    };
    let mut stanzas = Vec::new();
    for entry in
        entries.iter().filter(|entry| matches!(entry.kind, Kind::Directory | Kind::Symlink))
    {
        let Some(name) = entry.name.to_str() else { continue };
        for file in ["backup.info", "backup.info.copy"] {
            match root.metadata(format!("backup/{name}/{file}")) {
                Ok(_) => {
                    stanzas.push(name.to_owned());
                    break;
                }
                Err(err) if is_absent(&err) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }
    Ok(stanzas)
}

/// Reads a file; its `.copy` stands in for a damaged one, never for one that is not there.
fn load<T>(
    root: &Root,
    path: &str,
    limit: u64,
    notes: &mut Vec<String>,
    parse: impl Fn(&[u8]) -> Result<T, Problem>,
) -> Result<T, SourceError> {
    let full = root.path().join(path);
    let unsupported =
        |what| SourceError::Unsupported { object: format!("`{}`", full.display()), what };
    let problem = match root.read(path, limit) {
        Ok(bytes) => match parse(&bytes) {
            Ok(parsed) => return Ok(parsed),
            Err(Problem::Unsupported(what)) => return Err(unsupported(what)),
            Err(Problem::Damaged(problem)) => problem,
        },
        Err(err) if is_absent(&err) => {
            return Err(SourceError::Missing { path: full, for_what: String::new() });
        }
        Err(err) if err.kind() == std::io::ErrorKind::PermissionDenied => return Err(err.into()),
        Err(err) => err.to_string(),
    };
    let copy_path = format!("{path}.copy");
    let copy = root.path().join(&copy_path);
    let copy_problem = match root.read(&copy_path, limit) {
        Ok(bytes) => match parse(&bytes) {
            Ok(parsed) => {
                notes.push(format!(
                    "`{}` is damaged ({problem}); its copy was read instead",
                    full.display()
                ));
                return Ok(parsed);
            }
            Err(Problem::Unsupported(what)) => return Err(unsupported(what)),
            Err(Problem::Damaged(problem)) => problem,
        },
        Err(err) => err.to_string(),
    };
    Err(SourceError::BothDamaged { path: full, problem, copy, copy_problem })
}
