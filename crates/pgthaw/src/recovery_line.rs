//! The first line of every export: where it recovers to against what there is.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use pgthaw_session::RecoveryChoice;

use crate::wire::BackupFacts;

/// Returns the line, such as `backup 20261122-011000F, ended 01:10:44+01; WAL archived up to 02:58:31+01; recovering to the
/// end of the backup, --target-latest for newest`.
pub fn recovery_line(facts: &BackupFacts, recovery: RecoveryChoice) -> String {
    let backup = &facts.backup;
    let zone = TimeZone::system();
    let ended =
        backup.stopped_at.map_or_else(String::new, |at| format!(", ended {}", local(at, &zone)));
    let archived = backup.archived_until.as_ref();
    let archived = archived.map_or_else(String::new, |reach| {
        format!("; WAL archived up to {}", local(reach.modified, &zone))
    });
    let to = match (recovery, facts.start.archive_recovery) {
        (_, false) => "starting it as it is",
        (RecoveryChoice::EndOfBackup, true) if archived.is_empty() => {
            "recovering to the end of the backup"
        }
        (RecoveryChoice::EndOfBackup, true) => {
            "recovering to the end of the backup, --target-latest for newest"
        }
        (RecoveryChoice::Latest, true) => "recovering to the end of the archived WAL",
    };
    format!("backup {}{ended}{archived}; {to}", backup.id)
}

/// `seconds` since the epoch as local time with its offset: `2026-11-22 01:10:44+01`.
fn local(seconds: i64, zone: &TimeZone) -> String {
    match Timestamp::from_second(seconds) {
        Ok(at) => {
            let text = at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S%:z").to_string();
            text.strip_suffix(":00").map(str::to_owned).unwrap_or(text)
        }
        Err(_) => format!("@{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_local_with_a_short_offset() {
        let berlin = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(local(1_795_306_244, &berlin), "2026-11-22 01:10:44+01");
        assert_eq!(local(0, &TimeZone::UTC), "1970-01-01 00:00:00+00");
    }
}
