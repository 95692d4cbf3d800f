//! `backup_label`: where recovery of a backup begins (PostgreSQL source, `xlogbackup.c` and `read_backup_label`).

use crate::repository::BackupLabel;

/// Longest `backup_label` that is read, in bytes; real ones have about 300.
pub(crate) const LIMIT: u64 = 64 * 1024;

/// What `backup_label` says, and whether it belongs to an incremental backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// The label.
    pub label: BackupLabel,
    /// It has `INCREMENTAL FROM …` lines: the files are not whole.
    pub incremental: bool,
}

/// Reads a `backup_label`.
///
/// # Errors
/// What is missing in it or malformed.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    // The label text is in the database's encoding; everything else is ASCII.
    let text = String::from_utf8_lossy(bytes);
    let line = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        lines.next().map(str::to_owned)
    };
    let start = line("START WAL LOCATION").ok_or("it has no line START WAL LOCATION")?;
    let (start_lsn, segment) = start
        .strip_suffix(')')
        .and_then(|start| start.split_once(" (file "))
        .and_then(|(lsn, segment)| Some((parse_lsn(lsn)?, segment)))
        .ok_or_else(|| format!("its start location `{start}` cannot be read"))?;
    let segment_timeline =
        is_segment_name(segment).then(|| u32::from_str_radix(&segment[..8], 16).ok()).flatten();
    let segment_timeline =
        segment_timeline.ok_or_else(|| format!("`{segment}` in it is no WAL segment"))?;
    let checkpoint = line("CHECKPOINT LOCATION").ok_or("it has no line CHECKPOINT LOCATION")?;
    let checkpoint_lsn = parse_lsn(&checkpoint)
        .ok_or_else(|| format!("its checkpoint location `{checkpoint}` cannot be read"))?;
    if let Some(timeline) = line("START TIMELINE")
        && timeline.trim().parse() != Ok(segment_timeline)
    {
        return Err(format!("its start timeline {timeline} is not that of segment {segment}"));
    }
    let label = BackupLabel {
        start_lsn,
        start_segment: segment.to_owned(),
        checkpoint_lsn,
        timeline: segment_timeline,
        method: line("BACKUP METHOD"),
        from: line("BACKUP FROM"),
        start_time: line("START TIME"),
        label: line("LABEL"),
    };
    Ok(Parsed {
        label,
        incremental: text.lines().any(|line| line.starts_with("INCREMENTAL FROM ")),
    })
}

/// Reads an LSN as PostgreSQL prints it: two hexadecimal halves, `16/B374D848`.
pub(crate) fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let half = |part: &str| {
        let fits =
            (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        fits.then(|| u64::from_str_radix(part, 16).ok()).flatten()
    };
    Some(half(high)? << 32 | half(low)?)
}

/// Whether `name` is that of a WAL segment: 24 upper-case hexadecimal digits.
pub(crate) fn is_segment_name(name: &str) -> bool {
    name.len() == 24 && is_upper_hex(name)
}

/// Whether `text` is all upper-case hexadecimal digits.
pub(crate) fn is_upper_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

/// Reads the end of a backup from its history file in the archive (`<segment>.<offset>.backup`).
pub(crate) fn parse_stop(bytes: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(bytes);
    let stop = text.lines().find_map(|line| line.strip_prefix("STOP WAL LOCATION: "))?;
    parse_lsn(stop.split(' ').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REAL: &str = "START WAL LOCATION: 0/A000028 (file 00000001000000000000000A)\n\
        CHECKPOINT LOCATION: 0/A000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-22 23:21:01 UTC\nLABEL: pg_basebackup base backup\nSTART TIMELINE: 1\n";

    #[test]
    fn reads_a_real_one() {
        let parsed = parse(REAL.as_bytes()).unwrap();
        assert!(!parsed.incremental);
        let label = parsed.label;
        assert_eq!(
            (label.start_lsn, label.checkpoint_lsn, label.timeline),
            (0xA00_0028, 0xA00_0060, 1)
        );
        assert_eq!(label.start_segment, "00000001000000000000000A");
        assert_eq!(label.label.as_deref(), Some("pg_basebackup base backup"));
        assert_eq!(label.start_time.as_deref(), Some("2026-11-22 23:21:01 UTC"));
    }

    #[test]
    fn tells_what_is_wrong() {
        let incremental =
            format!("{REAL}INCREMENTAL FROM LSN: 0/2000028\nINCREMENTAL FROM TLI: 1\n");
        assert!(parse(incremental.as_bytes()).unwrap().incremental);
        let cases = [
            ("empty", String::new(), "START WAL LOCATION"),
            ("no checkpoint", REAL.replace("CHECKPOINT LOCATION", "X"), "CHECKPOINT LOCATION"),
            ("bad location", REAL.replace("0/A000028 (", "0-A000028 ("), "cannot be read"),
            ("bad segment", REAL.replace("00000001000000000000000A", "0A"), "no WAL segment"),
            ("other timeline", REAL.replace("TIMELINE: 1", "TIMELINE: 2"), "start timeline"),
        ];
        for (name, text, want) in cases {
            let problem = parse(text.as_bytes()).unwrap_err();
            assert!(problem.contains(want), "{name}: {problem}");
        }
    }

    #[test]
    fn reads_the_stop_of_a_history_file() {
        let text = b"START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
            STOP WAL LOCATION: 0/2000100 (file 000000010000000000000002)\n";
        assert_eq!(parse_stop(text), Some(0x200_0100));
        assert_eq!(parse_stop(b"START WAL LOCATION: 0/1 (file x)\n"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_not_trusted(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn an_lsn_survives_printing(lsn: u64) {
            prop_assert_eq!(parse_lsn(&format!("{:X}/{:08X}", lsn >> 32, lsn & 0xFFFF_FFFF)), Some(lsn));
            prop_assert_eq!(parse_lsn(&format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)), Some(lsn));
        }
    }
}
