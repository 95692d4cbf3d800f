//! `backup_label` and `tablespace_map`: what a backup's start left in the data directory.
//!
//! [`BackupLabel::parse`] reads the first, [`tablespace_map`] the second. Neither is ever written.
//!
//! Sources: PostgreSQL's `xlogbackup.c` (`build_backup_content`), `xlogrecovery.c` (`read_backup_label`,
//! `read_tablespace_map`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;

/// The contents of `backup_label`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupLabel {
    /// Where replay begins.
    pub start: Lsn,
    /// The name of the segment that holds [`BackupLabel::start`].
    pub start_segment: String,
    /// Where the checkpoint record lies.
    pub checkpoint: Lsn,
    /// `streamed`; `pg_start_backup` for an exclusive backup of 14 and older.
    pub method: Option<String>,
    /// `primary` (`master` in older versions) or `standby`.
    pub from: Option<String>,
    /// When the backup began, in the server's words and zone.
    pub start_time: Option<String>,
    /// What the backup's maker called it.
    pub label: Option<String>,
    /// The timeline on which the backup began: the line itself, or else from the segment's name.
    pub timeline: u32,
    /// For an incremental backup (17 and later): where the backup before it began.
    pub incremental_from: Option<Lsn>,
}

/// A `backup_label` or `tablespace_map` that is not as PostgreSQL writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A line that must be there is missing or wrong.
    #[error("backup_label has no proper line \"{0}: …\"")]
    Line(&'static str),
    /// The file is longer than any real one.
    #[error("{0} is absurdly long")]
    TooLong(&'static str),
    /// A line of `tablespace_map` without a number and a path.
    #[error("tablespace_map has the line {0:?} instead of a number and a path")]
    MapLine(String),
}

impl LabelError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        "the file is damaged or from something else; choose another backup, or give the label that the backup's end returned with --backup-label FILE"
    }
}

impl BackupLabel {
    /// Reads the file's bytes. Unknown lines are passed over, as newer versions add some.
    ///
    /// # Errors
    /// [`LabelError`] if the lines that PostgreSQL needs are missing or wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, LabelError> {
        if bytes.len() > 1 << 20 {
            return Err(LabelError::TooLong("backup_label"));
        }
        let text = String::from_utf8_lossy(bytes);
        let line =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let start_line = || {
            let (lsn, segment) = line("START WAL LOCATION")?.split_once(" (file ")?;
            let segment = segment
                .strip_suffix(')')
                .filter(|name| name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit()))?;
            Some((lsn.parse::<Lsn>().ok()?, segment))
        };
        let (start, segment) = start_line().ok_or(LabelError::Line("START WAL LOCATION"))?;
        let lsn = |name: &'static str| {
            line(name).and_then(|lsn| lsn.parse::<Lsn>().ok()).ok_or(LabelError::Line(name))
        };
        let of_segment = || u32::from_str_radix(&segment[..8], 16).ok();
        let timeline = match line("START TIMELINE") {
            Some(number) => number.parse().ok(),
            None => of_segment(),
        };
        let incremental_from = match line("INCREMENTAL FROM LSN") {
            Some(_) => Some(lsn("INCREMENTAL FROM LSN")?),
            None => None,
        };
        Ok(Self {
            start,
            start_segment: segment.into(),
            checkpoint: lsn("CHECKPOINT LOCATION")?,
            method: line("BACKUP METHOD").map(String::from),
            from: line("BACKUP FROM").map(String::from),
            start_time: line("START TIME").map(String::from),
            label: line("LABEL").map(String::from),
            timeline: timeline
                .filter(|timeline| *timeline > 0 && of_segment() == Some(*timeline))
                .ok_or(LabelError::Line("START TIMELINE"))?,
            incremental_from,
        })
    }

    /// Returns whether the backup was taken from a standby: then its end is what `pg_control` says.
    pub fn from_standby(&self) -> bool {
        self.from.as_deref() == Some("standby")
    }
}

/// Reads `tablespace_map`: each tablespace's number and where it was, byte for byte.
///
/// # Errors
/// [`LabelError`] for a line that is no number and path.
pub fn tablespace_map(bytes: &[u8]) -> Result<Vec<(u32, PathBuf)>, LabelError> {
    if bytes.len() > 64 << 20 {
        return Err(LabelError::TooLong("tablespace_map"));
    }
    let mut lines = vec![Vec::new()];
    let mut bytes = bytes.iter().copied();
    while let Some(byte) = bytes.next() {
        match (byte, lines.last_mut()) {
            (b'\n' | b'\r', _) => lines.push(Vec::new()),
            (b'\\', Some(line)) => line.extend(bytes.next()), // an escaped line end or backslash
            (byte, Some(line)) => line.push(byte),
            (_, None) => {}
        }
    }
    let entry = |line: Vec<u8>| {
        let parse = || {
            let space = line.iter().position(|byte| *byte == b' ')?;
            let oid = std::str::from_utf8(&line[..space]).ok()?.parse().ok()?;
            let path = line[space + 1..].to_vec();
            (!path.is_empty()).then(|| (oid, PathBuf::from(OsString::from_vec(path))))
        };
        parse().ok_or_else(|| {
            LabelError::MapLine(String::from_utf8_lossy(&line).chars().take(80).collect())
        })
    };
    lines.into_iter().filter(|line| !line.is_empty()).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000030000000000000002)\nCHECKPOINT LOCATION: 0/02000060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-22 01:10:44 CET\nLABEL: pg_basebackup: base\nSTART TIMELINE: 3\n";

    #[test]
    fn reads_a_label() {
        let label = BackupLabel::parse(LABEL.as_bytes()).unwrap();
        assert_eq!(
            (label.start, label.checkpoint, label.timeline),
            (Lsn(0x200_0028), Lsn(0x200_0060), 3)
        );
        assert_eq!(label.start_segment, "000000030000000000000002");
        assert_eq!(label.label.as_deref(), Some("pg_basebackup: base"));
        assert_eq!((label.from_standby(), label.incremental_from), (false, None));
        let standby = BackupLabel::parse(LABEL.replace("primary", "standby").as_bytes()).unwrap();
        assert!(standby.from_standby());
        let old = BackupLabel::parse(LABEL.replace("START TIMELINE: 3\n", "").as_bytes()).unwrap();
        assert_eq!(old.timeline, 3, "from the segment's name");
        let incremental =
            format!("{LABEL}INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 3\n");
        assert_eq!(
            BackupLabel::parse(incremental.as_bytes()).unwrap().incremental_from,
            Some(Lsn(0x100_0028))
        );
    }

    #[test]
    fn refuses_other_labels() {
        let change = |from: &str, to: &str| LABEL.replace(from, to);
        let cases = [
            ("empty", String::new(), "START WAL LOCATION"),
            ("no position", change("0/2000028", "here"), "START WAL LOCATION"),
            (
                "no segment",
                change("000000030000000000000002", "../../etc/passwd00000000"),
                "START WAL LOCATION",
            ),
            (
                "no checkpoint",
                change("CHECKPOINT LOCATION: 0/02000060\n", ""),
                "CHECKPOINT LOCATION",
            ),
            ("two timelines", change("TIMELINE: 3", "TIMELINE: 4"), "START TIMELINE"),
            ("no timeline", change("TIMELINE: 3", "TIMELINE: x"), "START TIMELINE"),
            (
                "half incremental",
                change("START TIMELINE", "INCREMENTAL FROM LSN: x\nSTART TIMELINE"),
                "INCREMENTAL FROM LSN",
            ),
        ];
        for (name, text, want) in cases {
            let error = BackupLabel::parse(text.as_bytes()).unwrap_err();
            assert!(
                error.to_string().contains(want) && !error.hint().contains("remov"),
                "{name}: {error}"
            );
        }
        assert_eq!(
            BackupLabel::parse(&vec![b'x'; 2 << 20]),
            Err(LabelError::TooLong("backup_label"))
        );
    }

    #[test]
    fn reads_a_tablespace_map() {
        let map = |text: &str| {
            tablespace_map(text.as_bytes()).map(|rows| {
                rows.into_iter()
                    .map(|(oid, path)| (oid, path.display().to_string()))
                    .collect::<Vec<_>>()
            })
        };
        let row = |oid, path: &str| (oid, path.to_string());
        assert_eq!(map(""), Ok(vec![]));
        assert_eq!(
            map("16385 /srv/ts one\n16386 /b\n"),
            Ok(vec![row(16385, "/srv/ts one"), row(16386, "/b")])
        );
        assert_eq!(map("16385 /a\\\nb\\\\c\n"), Ok(vec![row(16385, "/a\nb\\c")]));
        for bad in ["/srv", "x /srv", "16385", "16385 ", "-1 /a", "99999999999 /a"] {
            assert!(map(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0_usize..200, byte: u8) {
            let _ = BackupLabel::parse(&bytes);
            let _ = tablespace_map(&bytes);
            let mut label = LABEL.as_bytes().to_vec();
            label[at] = byte;
            let _ = BackupLabel::parse(&label);
        }
    }
}
