//! Damage done to repositories that the real tools made: each is told, by the object it is in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pgthaw_source::repository::WalWanted;
use pgthaw_source::{Location, Repository, SourceError};

use crate::cluster::{Cluster, copy};
use crate::support::{open, reader, try_open};

/// A copy of a repository in which one thing is broken at a time.
struct Broken {
    original: PathBuf,
    path: PathBuf,
}

impl Broken {
    /// A fresh copy.
    fn new(original: PathBuf) -> Self {
        let path = original.with_extension("broken");
        if path.exists() {
            fs::remove_dir_all(&path).unwrap();
        }
        copy(&original, &path);
        Self { original, path }
    }

    fn again(&self) -> Self {
        Self::new(self.original.clone())
    }

    fn edit(&self, name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> &Self {
        let path = self.path.join(name);
        fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
        self
    }

    fn remove(&self, name: &str) -> &Self {
        fs::remove_file(self.path.join(name)).unwrap();
        self
    }

    fn error(&self, wal: WalWanted) -> SourceError {
        let opened = try_open(&self.path).and_then(|repository| repository.open_backup(None, wal));
        opened.map(|backup| backup.info.id).unwrap_err()
    }

    fn told(&self, parts: &[&str]) {
        let err = self.error(WalWanted::EndOfBackup);
        let text = err.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
        assert!(err.hint().is_some(), "{text}");
    }
}

fn cut(bytes: Vec<u8>) -> Vec<u8> {
    bytes[..bytes.len() * 2 / 3].to_vec()
}

fn flip(mut bytes: Vec<u8>) -> Vec<u8> {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bytes
}

/// Breaks copies of a bundled repository.
pub fn pgbackrest(cluster: &Cluster) {
    let original = cluster.path("repo2");
    let repository = open(&original);
    let newest = repository.backups().unwrap().pop().unwrap();
    let label = format!("backup/demo/{}", newest.id);
    let manifest = format!("{label}/backup.manifest");
    let copy_of = |name: &str| format!("{name}.copy");
    let broken = Broken::new(original.clone());

    // The copy stands in for a damaged file, never for an absent one.
    for name in [manifest.as_str(), "backup/demo/backup.info", "archive/demo/archive.info"] {
        for change in [cut, flip, |_| Vec::new()] {
            let broken = broken.again();
            broken.edit(name, change);
            let backup = open(&broken.path).open_backup(None, WalWanted::EndOfBackup).unwrap();
            assert!(
                backup.notes.iter().any(|note| note.contains(name) && note.contains("copy")),
                "{:?}",
                backup.notes
            );
            broken.edit(&copy_of(name), change).told(&["is damaged", name, "and so is its copy"]);
        }
        broken.again().remove(name).told(&[name, "missing"]);
    }
    let gone = broken.again();
    gone.remove(&manifest);
    let listed = open(&gone.path).backups().unwrap().pop().unwrap();
    assert!(listed.unusable.unwrap().contains("missing"));

    // Stored files: missing, short, of another size.
    let bundle = format!("{label}/bundle/1");
    broken.again().remove(&bundle).told(&[&bundle, "missing"]);
    broken.again().edit(&bundle, cut).told(&[&bundle, "bytes"]);
    let label_file = format!("{label}/pg_data/backup_label.lz4");
    broken.again().edit(&label_file, cut).told(&[&label_file, "bytes"]);
    broken.again().edit(&label_file, flip).told(&["backup_label", "cannot be read"]);
    let flipped = broken.again();
    flipped.edit(&bundle, flip);
    if let Ok(backup) = open(&flipped.path).open_backup(None, WalWanted::EndOfBackup) {
        let reader = reader(&backup);
        let bad =
            (0..reader.files().len()).filter(|index| reader.verify_whole(*index).is_err()).count();
        assert_eq!(bad, 1, "one flipped byte, one damaged file");
    }

    // WAL: missing, twice, a hole.
    let wal = |name: &str| {
        let directory = format!("archive/demo/15-1/{}", &name[..16]);
        let mut files = fs::read_dir(original.join(&directory))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        (
            directory.clone(),
            files.find(|file| file.starts_with(name) && file.contains('-')).unwrap(),
        )
    };
    let backup = repository.open_backup(None, WalWanted::Latest).unwrap();
    let needed = backup.wal.stop_segment.clone().unwrap();
    let (directory, file) = wal(&needed);
    let lacking = broken.again();
    lacking.remove(&format!("{directory}/{file}")).told(&[&needed, "missing", "15-1"]);
    let listed = open(&lacking.path).backups().unwrap().pop().unwrap();
    assert!(listed.unusable.unwrap().contains(&needed) && listed.archived_until.is_none());
    let twice = broken.again();
    let other = file.replacen('-', "-00", 1);
    let other = format!("{}{}", &other[..65], file.get(65..).unwrap_or_default());
    fs::copy(twice.path.join(&directory).join(&file), twice.path.join(&directory).join(&other))
        .unwrap();
    twice.told(&[&needed, "lies twice"]);
    let names: Vec<String> = backup
        .map
        .files
        .iter()
        .filter_map(|file| Some(file.path.as_str().strip_prefix("data/pg_wal/")?.to_owned()))
        .collect();
    let hole = &names[names.len() - 2];
    assert!(*hole > needed, "the test needs WAL behind the backup");
    let holed = broken.again();
    let (directory, file) = wal(hole);
    holed.remove(&format!("{directory}/{file}"));
    let err = holed.error(WalWanted::Latest);
    assert!(matches!(&err, SourceError::WalHole { segment, .. } if segment == hole), "{err}");
    let reach = open(&holed.path).backups().unwrap().pop().unwrap().archived_until.unwrap();
    assert!(reach.segment < *hole && reach.gap.as_ref() == Some(hole), "{reach:?}");
    open(&holed.path).open_backup(None, WalWanted::EndOfBackup).unwrap();
    let torn = broken.again();
    torn.edit(&format!("{directory}/{file}"), flip);
    let backup = open(&torn.path).open_backup(None, WalWanted::Latest).unwrap();
    let reader = reader(&backup);
    let index =
        reader.files().iter().position(|file| file.path.as_str().ends_with(hole.as_str())).unwrap();
    assert!(reader.read_whole(index).is_err(), "a flipped byte in a WAL segment");

    // Ids: unknown, unfinished; stanzas: unknown, several.
    let err = repository.open_backup(Some("20200101-000000F"), WalWanted::EndOfBackup).unwrap_err();
    assert!(matches!(&err, SourceError::UnknownBackup { known, .. } if known.len() == 2), "{err}");
    assert!(err.is_usage() && err.to_string().contains(&newest.id), "{err}");
    for id in ["..", "../..", "latest", ""] {
        let err = repository.open_backup(Some(id), WalWanted::EndOfBackup).unwrap_err();
        assert!(matches!(err, SourceError::UnknownBackup { .. }), "{id}: {err}");
    }
    let unfinished = broken.again();
    let directory = unfinished.path.join("backup/demo/20990101-000000F");
    fs::create_dir(&directory).unwrap();
    fs::copy(unfinished.path.join(&manifest), directory.join("backup.manifest.copy")).unwrap();
    let opened = open(&unfinished.path);
    assert_eq!(opened.backups().unwrap().len(), 2);
    let err = opened.open_backup(Some("20990101-000000F"), WalWanted::EndOfBackup).unwrap_err();
    assert!(matches!(err, SourceError::Unfinished { .. }) && err.is_usage(), "{err}");
    let several = broken.again();
    copy(&several.path.join("backup/demo"), &several.path.join("backup/other"));
    let err = try_open(&several.path).unwrap_err();
    assert!(
        matches!(&err, SourceError::SeveralStanzas { known, .. } if known.len() == 2)
            && err.is_usage(),
        "{err}"
    );
    let named = |stanza: &str| {
        let location = Location {
            path: several.path.clone(),
            stanza: Some(stanza.into()),
            ..Location::default()
        };
        Repository::open(&location)
    };
    assert_eq!(named("demo").unwrap().stanza(), Some("demo"));
    let err = named("third").unwrap_err();
    assert!(err.is_usage() && err.to_string().contains("demo, other"), "{err}");

    // Encryption, and links out of the tree.
    let encrypted = broken.again();
    encrypted.edit("backup/demo/backup.info", |_| b"Salted__12345678".to_vec());
    let err = open(&encrypted.path).backups().unwrap_err();
    assert!(err.to_string().contains("encrypted"), "{err}");
    let linked = broken.again();
    let outside = original.join(&bundle);
    fs::remove_file(linked.path.join(&bundle)).unwrap();
    std::os::unix::fs::symlink(outside, linked.path.join(&bundle)).unwrap();
    linked.told(&["leads out of the directory"]);
    fs::remove_dir_all(&linked.path).unwrap();
}

/// Breaks copies of a base backup.
pub fn basebackup(cluster: &Cluster, tablespace: u32) {
    let broken = Broken::new(cluster.path("base/streamed"));
    let relation = |path: &Path| {
        let names = fs::read_dir(path.join("base/1")).unwrap();
        let largest = names
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_none())
            .max_by_key(|path| fs::metadata(path).unwrap().len());
        format!("base/1/{}", largest.unwrap().file_name().unwrap().to_str().unwrap())
    };
    let file = relation(&broken.path);
    broken.again().remove(&file).told(&[&file, "missing", "backup_manifest"]);
    broken.again().edit(&file, cut).told(&[&file, "bytes"]);
    broken.again().edit("backup_manifest", cut).told(&["backup_manifest", "truncated"]);
    broken.again().edit("backup_manifest", flip).told(&["backup_manifest", "damaged"]);
    broken.again().edit("global/pg_control", |_| vec![0; 8192]).told(&["pg_control", "damaged"]);
    broken.again().edit("PG_VERSION", |_| b"x".to_vec()).told(&["PG_VERSION"]);
    broken
        .again()
        .edit("backup_label", |_| b"x".to_vec())
        .told(&["backup_label", "START WAL LOCATION"]);

    let extra = broken.again();
    fs::write(extra.path.join("base/1/99999"), b"").unwrap();
    extra.told(&["data/base/1/99999", "does not list"]);
    let linked = broken.again();
    std::os::unix::fs::symlink("/etc/passwd", linked.path.join("base/passwd")).unwrap();
    linked.told(&["/etc/passwd", "leads out"]);
    let dead = broken.again();
    let link = dead.path.join(format!("pg_tblspc/{tablespace}"));
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", &link).unwrap();
    dead.told(&["/nowhere/at/all", &format!("pg_tblspc/{tablespace}")]);
    let incremental = broken.again();
    fs::write(incremental.path.join("base/1/INCREMENTAL.1259"), b"").unwrap();
    incremental.told(&["INCREMENTAL", "is not read yet"]);
    let label = broken.again();
    label.edit("backup_label", |bytes| [&bytes[..], b"INCREMENTAL FROM LSN: 0/2000028\n"].concat());
    label.told(&["INCREMENTAL", "is not read yet"]);
    let listed = open(&label.path).backups().unwrap().remove(0);
    assert!(listed.unusable.unwrap().contains("incremental"));

    // Without a manifest sizes are judged alone, and a missing segment of WAL is named.
    let bare = broken.again();
    bare.remove("backup_manifest");
    bare.told(&["nothing proves", &format!("pg_tblspc/{tablespace}")]);
    let link = bare.path.join(format!("pg_tblspc/{tablespace}"));
    let space = fs::canonicalize(&link).unwrap();
    fs::remove_file(&link).unwrap();
    copy(&space, &link);
    let opened = open(&bare.path).open_backup(None, WalWanted::EndOfBackup).unwrap();
    let segment = opened.wal.first.unwrap();
    fs::write(bare.path.join(format!("{file}.2")), b"").unwrap();
    bare.told(&[&format!("{file}.2"), "segment 1"]);
    bare.remove(&format!("{file}.2"));
    bare.edit(&file, |bytes| bytes[1..].to_vec()).told(&[&file, "whole pages"]);
    let dry = broken.again();
    dry.remove(&format!("pg_wal/{segment}")).told(&[&segment, "missing", "pg_wal"]);
    let short = broken.again();
    short.edit(&format!("pg_wal/{segment}"), cut).told(&[&segment, "damaged"]);

    // A directory that may not be entered.
    let closed = broken.again();
    fs::set_permissions(&closed.path, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read_dir(&closed.path).is_err() {
        closed.told(&["Permission denied"]);
    }
    fs::set_permissions(&closed.path, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_dir_all(&closed.path).unwrap();
}
