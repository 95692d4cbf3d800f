//! `backup.manifest`: every file of a backup, and where its bytes lie (pgBackRest source, `src/info/manifest`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::info::{is_label, major};
use super::ini::{self, Entry, Problem};
use crate::formats::hex::unhex;
use crate::formats::relation::is_oid;
use crate::map::{ClusterPath, Codec};
use crate::repository::{DatabaseEntry, Tablespace};

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// The backup's own label.
    pub label: String,
    /// First WAL segment it needs; none for an offline backup.
    pub archive_start: Option<String>,
    /// Last WAL segment it needs; none for an offline backup.
    pub archive_stop: Option<String>,
    /// Files in bundles are compressed without frame (gz) or content checksum (lz4).
    pub bundle_raw: bool,
    /// Taken from a running server.
    pub online: bool,
    /// How its files are compressed.
    pub compression: Compression,
    /// `system_identifier` of the cluster.
    pub system_identifier: u64,
    /// Catalog version of the cluster.
    pub catalog_version: u32,
    /// The databases.
    pub databases: Vec<DatabaseEntry>,
    /// The tablespaces, by OID.
    pub tablespaces: Vec<Tablespace>,
    /// All directories.
    pub directories: Vec<ClusterPath>,
    /// All files.
    pub files: Vec<File>,
}

/// How files are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compression {
    /// The codec of a file that is stored on its own.
    pub codec: Codec,
    /// What is added to such a file's name.
    pub extension: &'static str,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    /// Its name in the manifest: `pg_data/…` or `pg_tblspc/<oid>/…`.
    pub name: String,
    /// Where it lies in the cluster.
    pub path: ClusterPath,
    /// Bytes of the original.
    pub size: u64,
    /// Last modification of the original.
    pub modified: i64,
    /// SHA-1 of the original; none for an empty file.
    pub sha1: Option<[u8; 20]>,
    /// The backup that holds it, if it is another one.
    pub reference: Option<String>,
    /// The bundle that holds it, and the first byte in it.
    pub bundle: Option<(u64, u64)>,
    /// Stored bytes.
    pub stored: u64,
    /// Page checksum errors were found when it was copied.
    pub damaged: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawFile<'a> {
    #[serde(default)]
    bim: u64,
    bni: Option<u64>,
    #[serde(default)]
    bno: u64,
    #[serde(borrow)]
    checksum: Option<&'a str>,
    checksum_page: Option<bool>,
    checksum_page_error: Option<IgnoredAny>,
    reference: Option<&'a str>,
    repo_size: Option<u64>,
    size: u64,
    timestamp: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawTarget {
    path: String,
    tablespace_id: Option<String>,
    tablespace_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawDatabase {
    db_id: u32,
}

/// Reads a manifest.
///
/// # Errors
/// [`Problem`].
pub(crate) fn parse(bytes: &[u8]) -> Result<Manifest, Problem> {
    let entries = ini::parse(bytes)?;
    // Only `[backup…]` sections are looked up by key; they come first and are short.
    let head: Vec<Entry<'_>> =
        entries.iter().filter(|entry| entry.section.starts_with("backup")).copied().collect();
    let compression = compression(&head)?;
    let version: String = needed(&head, "backup:db", "db-version")?;
    if major(&version).is_none() {
        return Err(Problem::Damaged(format!("its PostgreSQL version is `{version}`")));
    }
    let mut manifest = Manifest {
        label: needed(&head, "backup", "backup-label")?,
        archive_start: ini::find(&head, "backup", "backup-archive-start")?,
        archive_stop: ini::find(&head, "backup", "backup-archive-stop")?,
        bundle_raw: ini::find(&head, "backup", "backup-bundle-raw")?.unwrap_or(false),
        online: ini::find(&head, "backup:option", "option-online")?.unwrap_or(true),
        compression,
        system_identifier: needed(&head, "backup:db", "db-system-id")?,
        catalog_version: needed(&head, "backup:db", "db-catalog-version")?,
        databases: Vec::new(),
        tablespaces: Vec::new(),
        directories: Vec::new(),
        files: Vec::new(),
    };
    let mut tablespaces = BTreeMap::new();
    for entry in &entries {
        match entry.section {
            "backup:target" => tablespaces.extend(tablespace(entry)?),
            "db" => {
                let RawDatabase { db_id } = ini::value(entry)?;
                manifest.databases.push(DatabaseEntry { oid: db_id, name: entry.key.into() });
            }
            "target:path" if entry.key != "pg_tblspc" => {
                manifest.directories.push(cluster_path(entry.key)?)
            }
            "target:file" => manifest.files.push(file(entry, compression)?),
            _ => {}
        }
    }
    manifest.databases.sort_by_key(|database| database.oid);
    manifest.tablespaces = tablespaces.into_values().collect();
    let total = manifest.files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.size));
    if total.is_none_or(|total| total > i64::MAX as u64) {
        return Err(Problem::damaged("its files add up to more bytes than there can be"));
    }
    Ok(manifest)
}

fn needed<T: serde::de::DeserializeOwned>(
    entries: &[Entry<'_>],
    section: &str,
    key: &str,
) -> Result<T, Problem> {
    ini::find(entries, section, key)?
        .ok_or_else(|| Problem::Damaged(format!("`{key}` in [{section}] is missing")))
}

/// How files are compressed, from the sections at the head of a manifest.
///
/// # Errors
/// A method that is not read, by its name.
pub(crate) fn compression(head: &[Entry<'_>]) -> Result<Compression, Problem> {
    let method: Option<String> = ini::find(head, "backup:option", "option-compress-type")?;
    let method = match method {
        Some(method) => method,
        None => {
            let legacy = ini::find(head, "backup:option", "option-compress")?.unwrap_or(false);
            if legacy { "gz" } else { "none" }.to_owned()
        }
    };
    compression_of_extension(if method == "none" { "" } else { &method })
        .ok_or_else(|| Problem::Unsupported(format!("compression method {method}")))
}

/// The compression whose files end in `.<extension>`, or in nothing.
pub(crate) fn compression_of_extension(extension: &str) -> Option<Compression> {
    let (codec, extension) = match extension {
        "" => (Codec::None, ""),
        "gz" => (Codec::Gzip, ".gz"),
        "lz4" => (Codec::Lz4, ".lz4"),
        "zst" => (Codec::Zstd, ".zst"),
        _ => return None,
    };
    Some(Compression { codec, extension })
}

fn tablespace(entry: &Entry<'_>) -> Result<Option<(u32, Tablespace)>, Problem> {
    let Some(oid) = entry.key.strip_prefix("pg_tblspc/") else { return Ok(None) };
    let target: RawTarget = ini::value(entry)?;
    let same = target.tablespace_id.as_deref().is_none_or(|id| id == oid);
    let oid = oid.parse().ok().filter(|_| is_oid(oid) && same);
    let oid = oid.ok_or_else(|| Problem::Damaged(format!("`{}` is no tablespace", entry.key)))?;
    Ok(Some((
        oid,
        Tablespace { oid, name: target.tablespace_name, location: target.path, mapped: None },
    )))
}

fn cluster_path(name: &str) -> Result<ClusterPath, Problem> {
    let bad = || Problem::Damaged(format!("`{name}` is no path inside a backup"));
    let (top, rest) = name.split_once('/').unwrap_or((name, ""));
    let path = match top {
        "pg_data" if rest.is_empty() && top == name => "data".to_owned(),
        "pg_data" => format!("data/{rest}"),
        "pg_tblspc" if is_oid(rest.split('/').next().unwrap_or("")) => {
            format!("tablespaces/{rest}")
        }
        _ => return Err(bad()),
    };
    ClusterPath::new(path).map_err(|_| bad())
}

fn file(entry: &Entry<'_>, compression: Compression) -> Result<File, Problem> {
    let name = entry.key;
    let bad = |what: String| Problem::Damaged(format!("`{name}` in [target:file] {what}"));
    let raw: RawFile<'_> = serde_json::from_str(entry.value).map_err(|err| bad(err.to_string()))?;
    if raw.bim > 0 {
        return Err(Problem::Unsupported("a block incremental backup (repo-block)".into()));
    }
    let stored = raw.repo_size.unwrap_or(raw.size);
    if stored.checked_add(raw.bno).is_none_or(|end| end > i64::MAX as u64)
        || raw.size > i64::MAX as u64
    {
        return Err(bad(format!(
            "has an impossible size: {} bytes, {stored} of them stored",
            raw.size
        )));
    }
    if compression.codec == Codec::None && raw.size != stored {
        return Err(bad(format!(
            "is not compressed, but {stored} bytes are stored of its {}",
            raw.size
        )));
    }
    if raw.size > most_decoded(compression.codec, stored) {
        return Err(bad(format!("cannot have {} bytes when {stored} are stored", raw.size)));
    }
    let sha1 = match raw.checksum {
        Some(text) => {
            let bytes = unhex(text).and_then(|bytes| bytes.try_into().ok());
            Some(bytes.ok_or_else(|| bad(format!("has a checksum `{text}`")))?)
        }
        None if raw.size == 0 => None,
        None => return Err(bad("has no checksum".into())),
    };
    if let Some(label) = raw.reference.filter(|label| !is_label(label)) {
        return Err(bad(format!("lies in a backup `{label}`, which is no label")));
    }
    let path = cluster_path(name)?;
    if !path.as_str().contains('/') {
        return Err(bad("is a directory".into()));
    }
    Ok(File {
        name: name.into(),
        path,
        size: raw.size,
        modified: raw.timestamp,
        sha1,
        reference: raw.reference.map(str::to_owned),
        bundle: raw.bni.map(|number| (number, raw.bno)),
        stored,
        damaged: raw.checksum_page == Some(false) || raw.checksum_page_error.is_some(),
    })
}

/// Bytes that `stored` bytes decode to at most.
///
/// Deflate yields at most 258 bytes for 2 bits (zlib's manual: 1032:1), LZ4 255 bytes for one more length byte, and a
/// Zstandard block of 128 KiB takes at least 4 bytes (RFC 8878, RLE block).
fn most_decoded(codec: Codec, stored: u64) -> u64 {
    let ratio = match codec {
        Codec::None => 1,
        Codec::Lz4 => 256,
        Codec::Gzip | Codec::Zlib => 1033,
        Codec::Zstd => 32 * 1024,
    };
    stored.saturating_mul(ratio)
}

/// Says from the first bytes of a manifest whether the backup cannot be read; the list shows it without reading
/// whole manifests. `None`: nothing speaks against it.
///
/// `has_block_maps` looks for a file in blocks in the whole manifest; it is asked only if there may be one.
pub(crate) fn unusable(head: &[u8], has_block_maps: impl FnOnce() -> bool) -> Option<String> {
    if head.starts_with(b"Salted__") {
        return Some("encrypted (repo-cipher-type)".into());
    }
    let text = String::from_utf8_lossy(head);
    let text = text.split("[target:file]").next().unwrap_or_default();
    let whole_lines = text.rfind('\n').map_or("", |end| &text[..end]);
    let Ok(entries) = ini::lines(whole_lines) else {
        return Some("its backup.manifest is damaged".into());
    };
    if let Err(Problem::Unsupported(what) | Problem::Damaged(what)) = compression(&entries) {
        return Some(format!("{what} is not read yet"));
    }
    let blocks = ini::find(&entries, "backup", "backup-block-incr").ok().flatten().unwrap_or(false);
    (blocks && has_block_maps()).then(|| "block incremental (repo-block) is not read yet".into())
}

#[cfg(test)]
mod tests {
    use super::super::ini::tests::sealed;
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "[backup]\nbackup-archive-start=\"000000010000000000000002\"\n\
        backup-archive-stop=\"000000010000000000000002\"\nbackup-bundle=true\nbackup-label=\"20261122-232049F\"\n\n\
        [backup:db]\ndb-catalog-version=202209061\ndb-control-version=1300\ndb-id=1\ndb-system-id=7\n\
        db-version=\"15\"\n\n[backup:option]\noption-compress=true\noption-compress-type=\"lz4\"\noption-online=true\n\n\
        [backup:target]\npg_data={\"path\":\"/pg\",\"type\":\"path\"}\n\
        pg_tblspc/16384={\"path\":\"/ts\",\"tablespace-id\":\"16384\",\"tablespace-name\":\"t1\",\"type\":\"link\"}\n\n\
        [db]\ncrm={\"db-id\":16385,\"db-last-system-id\":4}\npostgres={\"db-id\":5,\"db-last-system-id\":4}\n\n";
    const SUM: &str = "587b596f04f7db9c2cad3d6b87dd2b3a05de4f35";

    fn with_file(name: &str, json: &str) -> Result<Manifest, Problem> {
        parse(sealed(&format!("{HEAD}[target:file]\n{name}={json}\n")).as_bytes())
    }

    #[test]
    fn reads_files_and_directories() {
        let json = format!(
            "{{\"bni\":3,\"bno\":100,\"checksum\":\"{SUM}\",\"checksum-page\":false,\"reference\":\"20261121-000000F\",\"repo-size\":80,\"size\":8192,\"timestamp\":17}}"
        );
        let manifest = with_file("pg_tblspc/16384/PG_15_202209061/5/1", &json).unwrap();
        assert_eq!(manifest.compression.codec, Codec::Lz4);
        assert_eq!(manifest.databases[0], DatabaseEntry { oid: 5, name: "postgres".into() });
        assert_eq!(
            (manifest.tablespaces[0].oid, manifest.tablespaces[0].location.as_str()),
            (16384, "/ts")
        );
        let file = &manifest.files[0];
        assert_eq!(file.path.as_str(), "tablespaces/16384/PG_15_202209061/5/1");
        assert_eq!(
            (file.bundle, file.stored, file.size, file.modified),
            (Some((3, 100)), 80, 8192, 17)
        );
        assert_eq!(file.reference.as_deref(), Some("20261121-000000F"));
        assert!(file.damaged);
        let empty =
            with_file("pg_data/base/5/2", "{\"checksum-page\":true,\"size\":0,\"timestamp\":1}")
                .unwrap();
        assert!(empty.files[0].sha1.is_none() && !empty.files[0].damaged);
    }

    #[test]
    fn refuses_bad_lines() {
        let good = format!("\"checksum\":\"{SUM}\",\"size\":5,\"timestamp\":1");
        let cases = [
            ("traversal", "pg_data/../x", format!("{{{good}}}"), "no path"),
            ("absolute", "/etc/passwd", format!("{{{good}}}"), "no path"),
            ("an empty part", "pg_data//x", format!("{{{good}}}"), "no path"),
            ("no name", "pg_data/", format!("{{{good}}}"), "no path"),
            ("a tablespace that is none", "pg_tblspc/../x", format!("{{{good}}}"), "no path"),
            ("another top", "pg_other/x", format!("{{{good}}}"), "no path"),
            ("negative", "pg_data/x", "{\"size\":-1,\"timestamp\":1}".into(), "-1"),
            (
                "too large a number",
                "pg_data/x",
                "{\"size\":99999999999999999999,\"timestamp\":1}".into(),
                "[target:file]",
            ),
            (
                "overflow",
                "pg_data/x",
                format!("{{\"bno\":18446744073709551615,{good}}}"),
                "impossible",
            ),
            (
                "more than can be decoded",
                "pg_data/x",
                format!(
                    "{{\"checksum\":\"{SUM}\",\"repo-size\":10,\"size\":1000000,\"timestamp\":1}}"
                ),
                "when 10 are stored",
            ),
            ("no checksum", "pg_data/x", "{\"size\":1,\"timestamp\":1}".into(), "no checksum"),
            (
                "bad checksum",
                "pg_data/x",
                "{\"checksum\":\"zz\",\"size\":1,\"timestamp\":1}".into(),
                "checksum `zz`",
            ),
            (
                "bad reference",
                "pg_data/x",
                format!("{{\"reference\":\"../../etc\",{good}}}"),
                "no label",
            ),
            ("blocks", "pg_data/x", format!("{{\"bi\":1,\"bim\":10,{good}}}"), "block incremental"),
        ];
        for (name, path, json, want) in cases {
            let (Problem::Damaged(got) | Problem::Unsupported(got)) =
                with_file(path, &json).unwrap_err();
            assert!(got.contains(want), "{name}: {got}");
        }
        let bz2 = sealed(&HEAD.replace("\"lz4\"", "\"bz2\""));
        assert_eq!(
            parse(bz2.as_bytes()).unwrap_err(),
            Problem::Unsupported("compression method bz2".into())
        );
        let large = format!(
            "{{\"checksum\":\"{SUM}\",\"repo-size\":9000000000000000000,\"size\":9000000000000000000,\"timestamp\":1}}"
        );
        let two = sealed(&format!("{HEAD}[target:file]\npg_data/a={large}\npg_data/b={large}\n"));
        assert!(
            matches!(parse(two.as_bytes()), Err(Problem::Damaged(text)) if text.contains("add up"))
        );
    }

    #[test]
    fn the_head_tells_what_is_not_read() {
        let block =
            HEAD.replace("backup-bundle=true", "backup-block-incr=true\nbackup-bundle=true");
        let cases = [
            ("readable", HEAD.to_owned(), false, None),
            ("cut within a line", HEAD[..HEAD.len() - 5].to_owned(), false, None),
            ("bz2", HEAD.replace("\"lz4\"", "\"bz2\""), false, Some("bz2")),
            ("blocks", block.clone(), true, Some("block incremental")),
            ("blocks allowed, none used", block, false, None),
            ("encrypted", "Salted__".into(), false, Some("encrypted")),
        ];
        for (name, head, maps, want) in cases {
            let got = unusable(head.as_bytes(), || maps);
            assert_eq!(got.is_some(), want.is_some(), "{name}");
            assert!(got.unwrap_or_default().contains(want.unwrap_or_default()), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_file_line_is_told_not_trusted(name in "(pg_data|pg_tblspc)(/[a-z0-9.]{0,5}){0,4}", size: i64, stored: u64, bno: u64) {
            let json = format!("{{\"bni\":1,\"bno\":{bno},\"checksum\":\"{SUM}\",\"repo-size\":{stored},\"size\":{size},\"timestamp\":1}}");
            if let Ok(manifest) = with_file(&name, &json) {
                let file = &manifest.files[0];
                prop_assert!(file.path.as_str().starts_with("data/") || file.path.as_str().starts_with("tablespaces/"));
                prop_assert!(file.size <= file.stored.saturating_mul(256) && bno.checked_add(file.stored).is_some());
            }
        }
    }
}
