//! `backup.info` and `archive.info`: which backups there are, and which archive holds their WAL.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ini::{self, Problem};
use crate::formats::label::parse_lsn;
use crate::repository::{BackupInfo, BackupType};

/// A cluster as pgBackRest numbers them: `stanza-upgrade` begins a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// `system_identifier` of its `pg_control`.
    pub system_identifier: u64,
    /// `15`, `9.6`.
    pub version: String,
}

/// What `backup.info` lists.
#[derive(Debug, Clone)]
pub(crate) struct Backups {
    /// The finished backups, oldest first.
    pub backups: Vec<Listed>,
}

/// One finished backup.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    /// What the list shows of it.
    pub info: BackupInfo,
    /// Number of its cluster, for the choice of the archive.
    pub history_id: u64,
    /// Its cluster.
    pub cluster: Cluster,
    /// First WAL segment it needs; none for an offline backup.
    pub archive_start: Option<String>,
    /// Last WAL segment it needs; none for an offline backup.
    pub archive_stop: Option<String>,
    /// Those segments lie in the backup, too.
    pub archive_copy: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Current {
    backup_annotation: Option<BTreeMap<String, String>>,
    backup_archive_start: Option<String>,
    backup_archive_stop: Option<String>,
    #[serde(default)]
    backup_error: Option<bool>,
    backup_info_repo_size: Option<u64>,
    backup_info_size: u64,
    backup_lsn_start: Option<String>,
    backup_lsn_stop: Option<String>,
    backup_prior: Option<String>,
    backup_timestamp_start: i64,
    backup_timestamp_stop: i64,
    backup_type: String,
    db_id: u64,
    option_archive_copy: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BackupHistory {
    db_system_id: u64,
    db_version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ArchiveHistory {
    /// Here this key holds the system identifier (pgBackRest source, `src/info/infoPg.c`).
    db_id: u64,
    db_version: String,
}

/// Reads `backup.info`.
///
/// # Errors
/// [`Problem`].
pub(crate) fn parse_backups(bytes: &[u8]) -> Result<Backups, Problem> {
    let entries = ini::parse(bytes)?;
    let mut clusters = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.section == "db:history") {
        let history: BackupHistory = ini::value(entry)?;
        clusters.insert(
            history_id(entry.key)?,
            Cluster { system_identifier: history.db_system_id, version: history.db_version },
        );
    }
    let mut backups = Vec::new();
    for entry in entries.iter().filter(|entry| entry.section == "backup:current") {
        let current: Current = ini::value(entry)?;
        let bad = |what: String| Problem::Damaged(format!("backup `{}` {what}", entry.key));
        if !is_label(entry.key) {
            return Err(bad("has no valid label".into()));
        }
        let cluster = clusters
            .get(&current.db_id)
            .ok_or_else(|| bad("belongs to no known cluster".into()))?;
        let lsn = |text: &Option<String>| match text {
            Some(text) => {
                parse_lsn(text).map(Some).ok_or_else(|| bad(format!("has an LSN `{text}`")))
            }
            None => Ok(None),
        };
        let backup_type = match current.backup_type.as_str() {
            "full" => BackupType::Full,
            "diff" => BackupType::Differential,
            "incr" => BackupType::Incremental,
            other => return Err(bad(format!("has a type `{other}`"))),
        };
        let info = BackupInfo {
            id: entry.key.into(),
            backup_type,
            started_at: current.backup_timestamp_start,
            stopped_at: Some(current.backup_timestamp_stop),
            size: current.backup_info_size,
            stored_size: current.backup_info_repo_size,
            postgres_major: major(&cluster.version)
                .ok_or_else(|| bad("has no PostgreSQL version".into()))?,
            start_lsn: lsn(&current.backup_lsn_start)?,
            stop_lsn: lsn(&current.backup_lsn_stop)?,
            prior: current.backup_prior,
            damaged: current.backup_error.unwrap_or(false),
            annotations: current.backup_annotation.unwrap_or_default(),
            archived_until: None,
            unusable: None,
        };
        backups.push(Listed {
            info,
            history_id: current.db_id,
            cluster: cluster.clone(),
            archive_start: current.backup_archive_start,
            archive_stop: current.backup_archive_stop,
            archive_copy: current.option_archive_copy.unwrap_or(false),
        });
    }
    backups.sort_by(|left, right| {
        (left.info.stopped_at, &left.info.id).cmp(&(right.info.stopped_at, &right.info.id))
    });
    Ok(Backups { backups })
}

/// The clusters of `archive.info`, by number.
pub(crate) type Archives = BTreeMap<u64, Cluster>;

/// Reads `archive.info`.
///
/// # Errors
/// [`Problem`].
pub(crate) fn parse_archives(bytes: &[u8]) -> Result<Archives, Problem> {
    let entries = ini::parse(bytes)?;
    let history = entries.iter().filter(|entry| entry.section == "db:history");
    history
        .map(|entry| {
            let history: ArchiveHistory = ini::value(entry)?;
            let cluster = Cluster { system_identifier: history.db_id, version: history.db_version };
            if major(&cluster.version).is_none() {
                return Err(Problem::Damaged(format!(
                    "its cluster {} has no PostgreSQL version",
                    entry.key
                )));
            }
            Ok((history_id(entry.key)?, cluster))
        })
        .collect()
}

/// Returns the archive id (`15-1`) that holds the WAL of a backup of `cluster`: the one with the backup's own number
/// if it is the same cluster, else the newest of the same cluster.
pub(crate) fn archive_id(
    archives: &Archives,
    history_id: u64,
    cluster: &Cluster,
) -> Option<String> {
    let own = archives.get(&history_id).filter(|found| *found == cluster).map(|_| history_id);
    let newest = || archives.iter().rev().find(|(_, found)| *found == cluster).map(|(id, _)| *id);
    own.or_else(newest).map(|id| format!("{}-{id}", cluster.version))
}

fn history_id(key: &str) -> Result<u64, Problem> {
    key.parse().map_err(|_| Problem::Damaged(format!("`{key}` in [db:history] is no number")))
}

/// Major version in `15` or `9.6`; the text is checked, for it names directories.
pub(crate) fn major(version: &str) -> Option<u32> {
    let number = |text: &str| {
        (1..=3).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    let (major, minor) = version.split_once('.').unwrap_or((version, "0"));
    (number(major) && number(minor)).then(|| major.parse().ok()).flatten()
}

/// Whether `text` is a backup label: `YYYYMMDD-HHMMSSF`, or that, `_`, and `YYYYMMDD-HHMMSSD` or `…I`.
pub(crate) fn is_label(text: &str) -> bool {
    let stamp = |text: &str, kinds: &[u8]| {
        text.len() == 16
            && text.bytes().enumerate().all(|(at, byte)| match at {
                8 => byte == b'-',
                15 => kinds.contains(&byte),
                _ => byte.is_ascii_digit(),
            })
    };
    match text.split_once('_') {
        None => stamp(text, b"F"),
        Some((full, later)) => stamp(full, b"F") && stamp(later, b"DI"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ini::tests::sealed;
    use super::*;

    #[test]
    fn labels() {
        let good = [
            "20261122-101112F",
            "20261122-101112F_20261122-111213D",
            "20261122-101112F_20261122-111213I",
        ];
        assert!(good.into_iter().all(is_label));
        let bad = [
            "",
            "latest",
            "../20261122-101112F",
            "20261122-101112D",
            "20261122-101112F_",
            "20261122-101112F/x",
            "2026112a-101112F",
        ];
        for label in bad {
            assert!(!is_label(label), "{label}");
        }
    }

    #[test]
    fn versions() {
        assert_eq!((major("15"), major("9.6")), (Some(15), Some(9)));
        for version in ["", "../x", "15/..", "15.", "x", "1234"] {
            assert_eq!(major(version), None, "{version}");
        }
    }

    #[test]
    fn chooses_the_archive() {
        let cluster = |system_identifier, version: &str| Cluster {
            system_identifier,
            version: version.into(),
        };
        let archives = Archives::from([
            (1, cluster(7, "14")),
            (2, cluster(7, "15")),
            (3, cluster(8, "15")),
            (4, cluster(7, "15")),
        ]);
        let cases = [
            ("its own number", 2, cluster(7, "15"), Some("15-2")),
            ("another number: the newest", 9, cluster(7, "15"), Some("15-4")),
            ("its number is another cluster", 1, cluster(8, "15"), Some("15-3")),
            ("unknown", 1, cluster(9, "15"), None),
        ];
        for (name, id, cluster, want) in cases {
            assert_eq!(archive_id(&archives, id, &cluster).as_deref(), want, "{name}");
        }
    }

    #[test]
    fn lists_backups_oldest_first() {
        let line = |stop: u32, kind: &str, extra: &str| {
            format!(
                "{{\"backup-info-size\":10,\"backup-timestamp-start\":1,\"backup-timestamp-stop\":{stop},\"backup-type\":\"{kind}\",\"db-id\":1{extra}}}"
            )
        };
        let history = "[db:history]\n1={\"db-catalog-version\":1,\"db-control-version\":1300,\"db-system-id\":7,\"db-version\":\"15\"}\n";
        let text = format!(
            "[backup:current]\n20261122-101112F={}\n20261121-101112F={}\n\n{history}",
            line(20, "full", ",\"backup-error\":true,\"backup-lsn-stop\":\"0/200\""),
            line(10, "full", ",\"backup-error\":null,\"backup-annotation\":{\"a\":\"b\"}"),
        );
        let backups = parse_backups(sealed(&text).as_bytes()).unwrap().backups;
        assert_eq!(backups[0].info.id, "20261121-101112F");
        assert!(backups[1].info.damaged && !backups[0].info.damaged);
        assert_eq!(backups[1].info.stop_lsn, Some(0x200));
        assert_eq!(backups[0].info.annotations["a"], "b");
        assert_eq!(backups[0].cluster.system_identifier, 7);

        for (bad, want) in [
            (
                format!("[backup:current]\n../x={}\n\n{history}", line(1, "full", "")),
                "no valid label",
            ),
            (
                format!("[backup:current]\n20261122-101112F={}\n\n{history}", line(1, "odd", "")),
                "type",
            ),
            (
                format!("[backup:current]\n20261122-101112F={}\n", line(1, "full", "")),
                "no known cluster",
            ),
            (
                format!("[backup:current]\n20261122-101112F={{\"db-id\":1}}\n\n{history}"),
                "missing field",
            ),
        ] {
            let Problem::Damaged(got) = parse_backups(sealed(&bad).as_bytes()).unwrap_err() else {
                panic!()
            };
            assert!(got.contains(want), "{got}");
        }
    }
}
