//! A manifest's files as files of a map.

use std::collections::BTreeMap;

use super::manifest::{File, Manifest};
use crate::error::SourceError;
use crate::formats::label::is_segment_name;
use crate::formats::objects::{Expected, Objects};
use crate::formats::presented;
use crate::formats::recovery::inline;
use crate::formats::wal::WalFile;
use crate::map::{ClusterPath, Codec, Content, Digest, MapFile};

/// The files of a backup.
#[derive(Debug)]
pub(crate) struct Files {
    /// What the mounted cluster shows; WAL is not among them.
    pub shown: Vec<MapFile>,
    /// WAL segments that the backup itself holds (`archive-copy`, or an offline backup), by name.
    pub wal: BTreeMap<String, WalFile>,
    /// Shown files with page checksum errors.
    pub damaged: Vec<ClusterPath>,
}

/// Turns the manifest's files into files of a map. `directory` is the stanza's, `backup/<stanza>`; objects lie
/// beneath root 0.
///
/// # Errors
/// Too many files.
pub(crate) fn convert(
    manifest: &Manifest,
    directory: &str,
    objects: &mut Objects,
) -> Result<Files, SourceError> {
    let mut files = Files { shown: Vec::new(), wal: BTreeMap::new(), damaged: Vec::new() };
    for file in &manifest.files {
        let segment =
            file.path.as_str().strip_prefix("data/pg_wal/").filter(|name| is_segment_name(name));
        if segment.is_none() && !presented::shows_file(file.path.as_str()) {
            continue;
        }
        if file.size == 0 {
            files.shown.push(inline(file.path.clone(), Vec::new(), file.modified));
            continue;
        }
        let place = place(manifest, directory, file);
        if let Some(name) = segment {
            files.wal.insert(
                name.to_owned(),
                WalFile {
                    root: 0,
                    path: place.path,
                    offset: place.offset,
                    length: file.stored,
                    codec: place.codec,
                    modified: file.modified,
                    digest: file.sha1.map(Digest::Sha1),
                },
            );
            continue;
        }
        if file.damaged {
            files.damaged.push(file.path.clone());
        }
        let object = objects.add(0, place.path, place.expected)?;
        files.shown.push(MapFile {
            path: file.path.clone(),
            size: file.size,
            modified: file.modified,
            content: Content::Stored {
                object,
                offset: place.offset,
                length: file.stored,
                codec: place.codec,
            },
            digest: file.sha1.map(Digest::Sha1),
            page_checksums: false, // known when pg_control was read
        });
    }
    Ok(files)
}

struct Place {
    path: String,
    offset: u64,
    codec: Codec,
    expected: Expected,
}

/// Where a file's bytes lie (pgBackRest source, `backupFileRepoPath`).
fn place(manifest: &Manifest, directory: &str, file: &File) -> Place {
    let label = file.reference.as_ref().unwrap_or(&manifest.label);
    let compression = manifest.compression;
    match file.bundle {
        Some((number, offset)) => Place {
            path: format!("{directory}/{label}/bundle/{number}"),
            offset,
            codec: match compression.codec {
                Codec::Gzip if manifest.bundle_raw => Codec::Zlib,
                codec => codec,
            },
            expected: Expected::AtLeast(offset.saturating_add(file.stored)),
        },
        None => Place {
            path: format!("{directory}/{label}/{}{}", file.name, compression.extension),
            offset: 0,
            codec: compression.codec,
            expected: Expected::Exactly(file.stored),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::Compression;
    use super::*;

    #[test]
    fn finds_each_files_place() {
        let file = |name: &str, path: &str, reference: Option<&str>, bundle| File {
            name: name.into(),
            path: ClusterPath::new(path).unwrap(),
            size: 100,
            modified: 1,
            sha1: Some([1; 20]),
            reference: reference.map(str::to_owned),
            bundle,
            stored: 50,
            damaged: bundle.is_some(),
        };
        let base = "20261121-000000F";
        let mut manifest = Manifest {
            label: "20261121-000000F_20261122-000000I".into(),
            archive_start: None,
            archive_stop: None,
            bundle_raw: true,
            online: true,
            compression: Compression { codec: Codec::Gzip, extension: ".gz" },
            system_identifier: 1,
            catalog_version: 1,
            databases: vec![],
            tablespaces: vec![],
            directories: vec![],
            files: vec![
                file("pg_data/base/5/1", "data/base/5/1", None, None),
                file("pg_data/base/5/2", "data/base/5/2", Some(base), None),
                file("pg_data/base/5/3", "data/base/5/3", Some(base), Some((4, 7))),
                file("pg_data/postmaster.pid", "data/postmaster.pid", None, None),
                file(
                    "pg_data/pg_wal/000000010000000000000002",
                    "data/pg_wal/000000010000000000000002",
                    None,
                    None,
                ),
            ],
        };
        let convert = |manifest: &Manifest| {
            let mut objects = Objects::default();
            let files = convert(manifest, "backup/demo", &mut objects).unwrap();
            let shown: Vec<_> = files
                .shown
                .iter()
                .map(|file| {
                    let Content::Stored { object, offset, codec, .. } = file.content else {
                        panic!()
                    };
                    (objects.table().objects[object.0 as usize].path.clone(), offset, codec)
                })
                .collect();
            (files, shown)
        };
        let (files, shown) = convert(&manifest);
        assert_eq!(
            shown,
            [
                (format!("backup/demo/{}/pg_data/base/5/1.gz", manifest.label), 0, Codec::Gzip),
                (format!("backup/demo/{base}/pg_data/base/5/2.gz"), 0, Codec::Gzip),
                (format!("backup/demo/{base}/bundle/4"), 7, Codec::Zlib),
            ]
        );
        assert_eq!(files.wal.keys().collect::<Vec<_>>(), ["000000010000000000000002"]);
        assert_eq!(files.damaged, [ClusterPath::new("data/base/5/3").unwrap()]);

        manifest.bundle_raw = false;
        assert_eq!(
            convert(&manifest).1[2].2,
            Codec::Gzip,
            "older repositories have whole frames in bundles"
        );
    }
}
