//! `backup_manifest`: what `pg_basebackup` knows of the files it copied (PostgreSQL manual, "Backup Manifest Format").

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::formats::hex::{hex, unhex};
use crate::formats::label::parse_lsn;
use crate::formats::relation::is_oid;
use crate::map::{ClusterPath, Digest};

/// Longest manifest that is read, in bytes: some 10 million files.
pub(crate) const LIMIT: u64 = 2 << 30;

/// A manifest whose checksum was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BaseManifest {
    /// The files by their path in the mounted cluster.
    pub files: BTreeMap<ClusterPath, Listed>,
    /// The WAL the backup needs.
    pub wal_ranges: Vec<WalRange>,
    /// The cluster's system identifier, from version 2 on.
    pub system_identifier: Option<u64>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Bytes.
    pub size: u64,
    /// What its content must match; none with `--manifest-checksums=NONE`.
    pub digest: Option<Digest>,
}

/// WAL of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WalRange {
    /// The timeline.
    pub timeline: u32,
    /// Where the backup begins, or the timeline.
    pub start_lsn: u64,
    /// Where the backup ends, or the timeline was left.
    pub end_lsn: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Raw<'a> {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    #[serde(borrow)]
    files: Vec<RawFile<'a>>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<RawRange>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawFile<'a> {
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<&'a str>,
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<&'a str>,
    checksum: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRange {
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start_lsn: String,
    #[serde(rename = "End-LSN")]
    end_lsn: String,
}

/// Reads a manifest after its checksum was verified.
///
/// # Errors
/// [`Problem`].
pub(crate) fn parse(bytes: &[u8]) -> Result<BaseManifest, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|_| Problem::damaged("it is no UTF-8"))?;
    // The last line holds the checksum over everything before it.
    let body = text.strip_suffix('\n').unwrap_or(text).rfind('\n').map(|end| &text[..=end]);
    let raw: Raw<'_> = match serde_json::from_str(text) {
        Ok(raw) => raw,
        Err(err) if err.is_eof() => {
            return Err(Problem::Damaged(format!("it is truncated ({err})")));
        }
        Err(err) => return Err(Problem::Damaged(err.to_string())),
    };
    if !matches!(raw.version, 1 | 2) {
        return Err(Problem::Version(raw.version));
    }
    let actual = hex(&Sha256::digest(body.unwrap_or_default()));
    if actual != raw.checksum {
        return Err(Problem::Damaged(format!(
            "its checksum is {actual}, but it says {}",
            raw.checksum
        )));
    }
    let mut files = BTreeMap::new();
    let mut total = 0_u64;
    for file in raw.files {
        let (path, listed) = listed(&file)?;
        total = total.saturating_add(listed.size);
        if total > i64::MAX as u64 {
            return Err(Problem::damaged("its files add up to more bytes than there can be"));
        }
        if files.contains_key(&path) {
            return Err(Problem::Damaged(format!("it lists `{}` twice", path.as_str())));
        }
        files.insert(path, listed);
    }
    let wal_ranges = raw.wal_ranges.iter().map(|range| {
        let lsns = parse_lsn(&range.start_lsn).zip(parse_lsn(&range.end_lsn));
        let (start_lsn, end_lsn) =
            lsns.ok_or_else(|| Problem::damaged("its WAL ranges cannot be read"))?;
        if range.timeline == 0 || end_lsn < start_lsn {
            return Err(Problem::damaged("its WAL ranges end before they begin"));
        }
        Ok(WalRange { timeline: range.timeline, start_lsn, end_lsn })
    });
    Ok(BaseManifest {
        files,
        wal_ranges: wal_ranges.collect::<Result<_, _>>()?,
        system_identifier: raw.system_identifier,
    })
}

/// Why a manifest cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Problem {
    /// It contradicts itself.
    Damaged(String),
    /// Its version is not read.
    Version(u32),
}

impl Problem {
    fn damaged(text: &str) -> Self {
        Self::Damaged(text.into())
    }
}

impl BaseManifest {
    /// The range on which the backup ended: that of the newest timeline.
    pub(crate) fn last_range(&self) -> Option<WalRange> {
        self.wal_ranges.iter().copied().max_by_key(|range| (range.timeline, range.end_lsn))
    }

    /// Bytes of all files.
    pub(crate) fn size(&self) -> u64 {
        self.files.values().map(|file| file.size).sum()
    }
}

fn listed(file: &RawFile<'_>) -> Result<(ClusterPath, Listed), Problem> {
    let name = match (&file.path, file.encoded_path) {
        (Some(path), None) => path.clone(),
        (None, Some(encoded)) => unhex(encoded)
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| Problem::Damaged(format!("its encoded path `{encoded}` is no UTF-8")))?,
        _ => return Err(Problem::damaged("a file in it has no path, or two")),
    };
    let digest = match (file.algorithm, file.checksum) {
        (None, None) => None,
        (Some(algorithm), Some(checksum)) => {
            Some(digest(algorithm, checksum).ok_or_else(|| {
                Problem::Damaged(format!("`{name}` has a checksum `{algorithm} {checksum}`"))
            })?)
        }
        _ => return Err(Problem::Damaged(format!("`{name}` has half a checksum"))),
    };
    let path = cluster_path(&name)
        .ok_or_else(|| Problem::Damaged(format!("`{name}` is no path inside a backup")))?;
    Ok((path, Listed { size: file.size, digest }))
}

/// Where a file of the backup's directory lies in the mounted cluster.
pub(crate) fn cluster_path(name: &str) -> Option<ClusterPath> {
    let path = match name.strip_prefix("pg_tblspc/") {
        Some(rest) if is_oid(rest.split('/').next()?) => format!("tablespaces/{rest}"),
        _ => format!("data/{name}"),
    };
    ClusterPath::new(path).ok()
}

fn digest(algorithm: &str, checksum: &str) -> Option<Digest> {
    let bytes = unhex(checksum)?;
    let length = match algorithm {
        // PostgreSQL writes the checksum's bytes as they lie in memory, on x86 and ARM the lowest first.
        "CRC32C" => return Some(Digest::Crc32c(u32::from_le_bytes(bytes.try_into().ok()?))),
        "SHA224" => 28,
        "SHA256" => 32,
        "SHA384" => 48,
        "SHA512" => 64,
        _ => return None,
    };
    (bytes.len() == length).then_some(Digest::Sha2(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(version: u32, files: &str, ranges: &str) -> String {
        let body = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n\"Files\": [\n{files}\n],\n\"WAL-Ranges\": [\n{ranges}\n],\n"
        );
        let sum = hex(&Sha256::digest(&body));
        format!("{body}\"Manifest-Checksum\": \"{sum}\"}}\n")
    }

    const RANGE: &str =
        "{ \"Timeline\": 1, \"Start-LSN\": \"0/A000028\", \"End-LSN\": \"0/A000100\" }";

    fn file(rest: &str) -> String {
        format!("{{ {rest}, \"Last-Modified\": \"2026-11-22 23:20:49 GMT\" }}")
    }

    #[test]
    fn reads_files_and_ranges() {
        let files = [
            file(
                "\"Path\": \"base/5/1\", \"Size\": 8192, \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"0644b2b4\"",
            ),
            file("\"Encoded-Path\": \"70675f74626c7370632f372f78\", \"Size\": 0"),
            file(&format!(
                "\"Path\": \"a\", \"Size\": 1, \"Checksum-Algorithm\": \"SHA256\", \"Checksum\": \"{}\"",
                "ab".repeat(32)
            )),
        ];
        let other = "{ \"Timeline\": 2, \"Start-LSN\": \"0/A000100\", \"End-LSN\": \"0/B000000\" }";
        let text = sealed(1, &files.join(",\n"), &format!("{other}, {RANGE}"));
        let manifest = parse(text.as_bytes()).unwrap();
        let at = |path: &str| manifest.files[&ClusterPath::new(path).unwrap()].clone();
        assert_eq!(
            at("data/base/5/1"),
            Listed { size: 8192, digest: Some(Digest::Crc32c(0xB4B2_4406)) }
        );
        assert_eq!(at("tablespaces/7/x").digest, None);
        assert_eq!(at("data/a").digest, Some(Digest::Sha2(vec![0xAB; 32])));
        assert_eq!(manifest.last_range().unwrap().end_lsn, 0xB00_0000);
        assert_eq!(manifest.size(), 8193);
        let second = sealed(2, "", RANGE).replace(": 2,\n", ": 2,\n\"System-Identifier\": 77,\n");
        assert!(parse(second.as_bytes()).is_err(), "the checksum covers what was added");
    }

    #[test]
    fn refuses_what_is_damaged_or_foreign() {
        let good = file("\"Path\": \"a\", \"Size\": 1");
        let whole = sealed(1, &good, RANGE);
        let cases = [
            ("empty", String::new(), "truncated"),
            ("cut", whole[..whole.len() - 40].into(), "truncated"),
            ("changed", whole.replace("\"Size\": 1", "\"Size\": 2"), "checksum"),
            ("traversal", sealed(1, &file("\"Path\": \"../a\", \"Size\": 1"), RANGE), "no path"),
            ("absolute", sealed(1, &file("\"Path\": \"/a\", \"Size\": 1"), RANGE), "no path"),
            (
                "encoded traversal",
                sealed(1, &file("\"Encoded-Path\": \"2e2e2f61\", \"Size\": 1"), RANGE),
                "no path",
            ),
            (
                "encoded nonsense",
                sealed(1, &file("\"Encoded-Path\": \"ff\", \"Size\": 1"), RANGE),
                "no UTF-8",
            ),
            ("twice", sealed(1, &format!("{good},{good}"), RANGE), "twice"),
            ("negative", sealed(1, &file("\"Path\": \"a\", \"Size\": -1"), RANGE), "-1"),
            (
                "unknown digest",
                sealed(
                    1,
                    &file(
                        "\"Path\": \"a\", \"Size\": 1, \"Checksum-Algorithm\": \"MD5\", \"Checksum\": \"00\"",
                    ),
                    RANGE,
                ),
                "MD5",
            ),
            (
                "bad range",
                sealed(1, &good, &RANGE.replace("0/A000100", "0/1")),
                "before they begin",
            ),
            (
                "too much",
                sealed(
                    1,
                    &format!(
                        "{},{}",
                        file("\"Path\": \"a\", \"Size\": 9000000000000000000"),
                        file("\"Path\": \"b\", \"Size\": 9000000000000000000")
                    ),
                    RANGE,
                ),
                "add up",
            ),
        ];
        for (name, text, want) in cases {
            match parse(text.as_bytes()) {
                Err(Problem::Damaged(got)) => assert!(got.contains(want), "{name}: {got}"),
                other => panic!("{name}: {other:?}"),
            }
        }
        assert_eq!(parse(sealed(3, &good, RANGE).as_bytes()), Err(Problem::Version(3)));
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(at in 0_usize..300, to in b' '..b'~') {
            let mut bytes = sealed(1, &file("\"Path\": \"a\", \"Size\": 1"), RANGE).into_bytes();
            let at = at % (bytes.len() - 2);
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            prop_assert!(parse(&bytes).is_err(), "changed byte {} went unnoticed", at);
        }
    }
}
