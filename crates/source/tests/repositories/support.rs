//! Opens repositories and compares what is read with what lies on a disk.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgthaw_source::map::MapFile;
use pgthaw_source::reader::Reader;
use pgthaw_source::repository::{Backup, Repository};
use pgthaw_source::store::LocalStore;
use pgthaw_source::{Location, SourceError};

/// Opens the repository at `path`.
pub fn open(path: &Path) -> Repository {
    try_open(path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

/// Opens the repository at `path`.
pub fn try_open(path: &Path) -> Result<Repository, SourceError> {
    Repository::open(&Location { path: path.into(), ..Location::default() })
}

/// A reader of a backup's files, after the backup went through the text form it takes between processes.
pub fn reader(backup: &Backup) -> Reader {
    let text = serde_json::to_string(backup).unwrap();
    let carried: Backup = serde_json::from_str(&text).unwrap();
    assert_eq!(carried, *backup);
    Reader::new(Arc::new(LocalStore::open(carried.objects).unwrap()), carried.map.files, 1 << 20)
}

/// The file at a path of the cluster.
pub fn latest<'a>(backup: &'a Backup, path: &str) -> &'a MapFile {
    backup
        .map
        .files
        .iter()
        .find(|file| file.path.as_str() == path)
        .unwrap_or_else(|| panic!("{path}"))
}

/// Compares a backup, byte for byte, with a directory that its tool restored. What is not shown on purpose is listed
/// here once more.
pub fn compare_with_restored(backup: &Backup, data: &Path, tablespaces: &[(u32, PathBuf)]) {
    let reader = reader(backup);
    let mut wanted = Vec::new();
    walk(data, "data", &mut wanted);
    for (oid, path) in tablespaces {
        walk(path, &format!("tablespaces/{oid}"), &mut wanted);
    }
    let hidden = |path: &str| {
        let top = [
            "postgresql.auto.conf",
            "tablespace_map",
            "recovery.signal",
            "backup_manifest",
            "standby.signal",
        ];
        let empty =
            ["pg_wal/", "pg_replslot/", "pg_stat_tmp/", "pg_subtrans/", "pg_notify/", "pg_tblspc/"];
        path.strip_prefix("data/").is_some_and(|name| {
            top.contains(&name)
                || (empty.iter().any(|directory| name.starts_with(directory))
                    && name != "pg_wal/archive_status")
        })
    };
    let mut files = BTreeSet::new();
    let mut directories =
        BTreeSet::from(["data", "data/pg_wal/archive_status", "tablespaces"].map(str::to_owned));
    for (cluster, path) in wanted.into_iter().filter(|(cluster, _)| !hidden(cluster)) {
        if path.is_dir() {
            directories.insert(cluster);
            continue;
        }
        let index = reader.files().iter().position(|file| file.path.as_str() == cluster);
        let index = index.unwrap_or_else(|| panic!("{cluster} is not in the map"));
        let want = fs::read(&path).unwrap();
        assert!(reader.read_whole(index).unwrap() == want, "{cluster} differs");
        assert_eq!(reader.files()[index].size, want.len() as u64);
        files.insert(cluster);
    }
    directories.extend(tablespaces.iter().map(|(oid, _)| format!("tablespaces/{oid}")));
    let shown: BTreeSet<String> =
        backup.map.files.iter().map(|file| file.path.as_str().to_owned()).collect();
    let added: Vec<_> = shown
        .difference(&files)
        .filter(|path| !path.starts_with("data/pg_wal/") && *path != "data/recovery.signal")
        .collect();
    assert!(added.is_empty(), "not restored, but shown: {added:?}");
    assert!(shown.contains("data/recovery.signal") == backup.label.is_some());
    let shown: Vec<_> = backup.map.directories.iter().map(|path| path.as_str()).collect();
    assert_eq!(shown, directories.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Compares the WAL that is shown with the segments in an archive of plain files.
pub fn compare_wal(backup: &Backup, plain: &Path) {
    let reader = reader(backup);
    let mut names = Vec::new();
    for (index, file) in reader.files().iter().enumerate() {
        let Some(name) = file.path.as_str().strip_prefix("data/pg_wal/") else { continue };
        assert!(
            reader.read_whole(index).unwrap() == fs::read(plain.join(name)).unwrap(),
            "{name} differs"
        );
        if !name.ends_with(".history") {
            names.push(name.to_owned());
        }
    }
    assert_eq!(names.first(), backup.wal.first.as_ref());
    assert_eq!(names.last(), backup.wal.last.as_ref());
}

/// Every file and directory below `path`, by its path in the cluster.
fn walk(path: &Path, cluster: &str, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let cluster = format!("{cluster}/{}", entry.file_name().to_str().unwrap());
        found.push((cluster.clone(), entry.path()));
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), &cluster, found);
        }
    }
}
