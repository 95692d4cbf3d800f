//! Names and sizes of relation files (PostgreSQL manual, "Database File Layout").

use std::collections::BTreeMap;

use crate::map::BackupMap;

/// A relation file's place: which fork of which relation, and which of its segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RelationFile<'a> {
    /// The directory it lies in.
    pub directory: &'a str,
    /// `<relfilenode>` or `<relfilenode>_<fork>`.
    pub fork: &'a str,
    /// 0 for the first segment, which has no number in its name.
    pub segment: u32,
}

/// Reads a path of the cluster as a relation file's; `None` for everything else.
pub(crate) fn relation_file(path: &str) -> Option<RelationFile<'_>> {
    let (directory, name) = path.rsplit_once('/')?;
    let parts: Vec<&str> = directory.split('/').collect();
    let holds_relations = match parts[..] {
        ["data", "global"] => true,
        ["data", "base", database] => is_oid(database),
        ["tablespaces", _, version, database] => version.starts_with("PG_") && is_oid(database),
        _ => false,
    };
    let (fork, segment) = match name.split_once('.') {
        None => (name, 0),
        Some((fork, text)) if is_oid(text) => {
            (fork, text.parse().ok().filter(|number| *number > 0)?)
        }
        Some(_) => return None,
    };
    let (node, kind) = fork.split_once('_').unwrap_or((fork, "fsm"));
    let known = is_oid(node) && matches!(kind, "fsm" | "vm" | "init");
    (holds_relations && known).then_some(RelationFile { directory, fork, segment })
}

/// Whether `text` can be an OID or a segment's number: decimal digits without a leading zero.
pub(crate) fn is_oid(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 10
        && !text.starts_with('0')
        && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns the bytes of each database by its OID: everything below `base/<oid>/` and, in tablespaces,
/// `PG_*/<oid>/`, from the sizes in the map. Shared relations and WAL belong to no database.
pub fn database_sizes(map: &BackupMap) -> BTreeMap<u32, u64> {
    let mut sizes = BTreeMap::new();
    for file in &map.files {
        let mut parts = file.path.as_str().split('/');
        let oid = match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("data"), Some("base"), Some(oid), Some(_), _) => oid,
            (Some("tablespaces"), Some(_), Some(version), Some(oid), Some(_))
                if version.starts_with("PG_") =>
            {
                oid
            }
            _ => continue,
        };
        if let Some(oid) =
            Some(oid).filter(|oid| is_oid(oid)).and_then(|oid| oid.parse::<u32>().ok())
        {
            let sum: &mut u64 = sizes.entry(oid).or_default();
            *sum = sum.saturating_add(file.size);
        }
    }
    sizes
}

/// Checks what file sizes alone tell about a copy without a manifest.
///
/// `files` holds path and size, sorted by path; sizes are in bytes. Every segment before a relation's last one in use
/// is full (`segment_size`, 1 GiB as PostgreSQL is built), segment numbers have no hole, and each size is whole pages
/// of `block_size`. Segments after the last one in use are there but empty (PostgreSQL source, `mdtruncate`).
/// With `atomic`, the last segment need not be whole pages: a snapshot may catch it while it grows.
///
/// # Errors
/// The first file that breaks a rule, with the rule.
pub(crate) fn check_sizes<'a>(
    files: impl Iterator<Item = (&'a str, u64)>,
    block_size: u64,
    segment_size: u64,
    atomic: bool,
) -> Result<(), (String, String)> {
    let mut forks: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (path, size) in files {
        if let Some(file) = relation_file(path) {
            forks.entry((file.directory, file.fork)).or_default().push((file.segment, size, path));
        }
    }
    for segments in forks.values_mut() {
        segments.sort_unstable();
        let last_used = segments.iter().rposition(|(_, size, _)| *size > 0).unwrap_or(0);
        for (index, (number, size, path)) in segments.iter().enumerate() {
            let bad = |problem: String| Err(((*path).to_owned(), problem));
            if *number as usize != index {
                return bad(format!("segment {index} of this relation is missing"));
            }
            if index < last_used && *size != segment_size {
                return bad(format!(
                    "it has {size} bytes, but a segment that others follow has {segment_size}"
                ));
            }
            if *size > segment_size {
                return bad(format!(
                    "it has {size} bytes, more than the {segment_size} of a segment"
                ));
            }
            if size % block_size != 0 && !(atomic && index == last_used) {
                return bad(format!("its {size} bytes are no whole pages of {block_size}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{ClusterPath, Content, MapFile};

    #[test]
    fn knows_relation_files() {
        let cases = [
            ("data/base/5/1259", Some(("1259", 0))),
            ("data/base/5/1259.3", Some(("1259", 3))),
            ("data/base/5/1259_vm.1", Some(("1259_vm", 1))),
            ("data/global/1262", Some(("1262", 0))),
            ("data/base/5/16384_init", Some(("16384_init", 0))),
            ("tablespaces/16384/PG_15_202209061/5/16400_fsm", Some(("16400_fsm", 0))),
            ("data/base/5/PG_VERSION", None),
            ("data/base/5/pg_filenode.map", None),
            ("data/base/5/1259.0", None),
            ("data/base/5/1259.x", None),
            ("data/base/5/1259_main", None),
            ("data/pg_xact/0000", None),
            ("data/global/pg_control", None),
            ("1259", None),
        ];
        for (path, want) in cases {
            let got = relation_file(path).map(|file| (file.fork, file.segment));
            assert_eq!(got, want, "{path}");
        }
    }

    #[test]
    fn sums_databases() {
        let file = |path: &str, size| MapFile {
            path: ClusterPath::new(path).unwrap(),
            size,
            modified: 0,
            content: Content::Inline(vec![]),
            digest: None,
            page_checksums: false,
        };
        let map = BackupMap {
            directories: vec![],
            files: vec![
                file("data/base/5/1259", 8192),
                file("data/base/5/1259_vm", 100),
                file("data/base/16385/1", 7),
                file("data/base/x/1", 9),
                file("data/global/1262", 11),
                file("tablespaces/1/PG_15_1/5/3", 1000),
                file("tablespaces/1/other/5/3", 1000),
            ],
        };
        assert_eq!(database_sizes(&map), BTreeMap::from([(5, 9292), (16385, 7)]));
    }

    #[test]
    fn sizes_without_a_manifest() {
        let full = 1 << 20;
        let file = "data/base/5/1";
        type Case<'a> = (&'a str, &'a [(&'a str, u64)], bool, Option<&'a str>);
        let cases: [Case; 9] = [
            ("one file", &[(file, 8192)], false, None),
            ("two segments", &[(file, full), ("data/base/5/1.1", 8192)], false, None),
            ("an empty relation", &[(file, 0)], false, None),
            (
                "truncated: empty segments stay",
                &[(file, 8192), ("data/base/5/1.1", 0), ("data/base/5/1.2", 0)],
                false,
                None,
            ),
            ("a hole", &[(file, full), ("data/base/5/1.2", 8192)], false, Some("data/base/5/1.2")),
            ("no first segment", &[("data/base/5/1.1", 8192)], false, Some("data/base/5/1.1")),
            (
                "a short one in the middle",
                &[(file, 8192), ("data/base/5/1.1", 8192)],
                false,
                Some(file),
            ),
            ("half a page", &[(file, 8191)], false, Some(file)),
            ("half a page of a snapshot", &[(file, 8191)], true, None),
        ];
        for (name, files, atomic, want) in cases {
            let got =
                check_sizes(files.iter().copied(), 8192, full, atomic).err().map(|(path, _)| path);
            assert_eq!(got.as_deref(), want, "{name}");
        }
    }
}
