//! Sizes, times and words as people read them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

pub use crate::escapes::{beginning, lines, one_line};
pub use crate::sizes::human_size as size;

/// Returns a time in `zone` with its offset, as PostgreSQL writes it: `2026-11-22 01:10:44+01`.
pub fn time(at: Timestamp, zone: &TimeZone) -> String {
    let text = at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S%:z").to_string();
    text.strip_suffix(":00").map(str::to_owned).unwrap_or(text)
}

/// Returns `seconds` since the epoch as a time; the number itself where no calendar reaches.
pub fn epoch(seconds: i64, zone: &TimeZone) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| format!("@{seconds}"), |at| time(at, zone))
}

/// Returns a length of time in whole seconds: `17 s`, `3 min 12 s`, `2 h 5 min`.
pub fn duration(length: Duration) -> String {
    let seconds = length.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, min, s) => format!("{min} min {s} s"),
        (h, min, _) => format!("{h} h {min} min"),
    }
}

/// Returns `count` of a thing: `1 database`, `2 databases`.
pub fn count(count: usize, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}

/// Returns `word` as a shell takes it for itself.
pub fn shell_word(word: &str) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || "_@%+=:,./-".contains(char);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_local_with_their_offset() {
        let at = Timestamp::from_second(1_795_306_244).unwrap();
        let india = TimeZone::fixed(jiff::tz::Offset::from_seconds(19_800).unwrap());
        assert_eq!(time(at, &TimeZone::fixed(jiff::tz::offset(1))), "2026-11-22 01:10:44+01");
        assert_eq!(time(at, &TimeZone::fixed(jiff::tz::offset(-5))), "2026-11-21 19:10:44-05");
        assert_eq!(time(at, &india), "2026-11-22 05:40:44+05:30");
        assert_eq!(epoch(i64::MAX, &india), "@9223372036854775807");
    }

    #[test]
    fn lengths_of_time() {
        for (seconds, want) in [(0, "0 s"), (59, "59 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
        {
            assert_eq!(duration(Duration::from_secs(seconds)), want);
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        let cases = [
            ("/srv/exports/monday", "/srv/exports/monday"),
            ("", "''"),
            ("my dump", "'my dump'"),
            ("it's", r"'it'\''s'"),
            ("$(rm)", "'$(rm)'"),
            ("größe", "'größe'"),
        ];
        for (word, want) in cases {
            assert_eq!(shell_word(word), want);
        }
    }
}
