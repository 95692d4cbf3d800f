//! The syntax of pgBackRest's info files and manifests: sections of `key=JSON` lines, with a checksum over all of
//! them (pgBackRest source, `src/common/ini.c` and `src/info/info.c`).

use serde::de::{DeserializeOwned, IgnoredAny};
use sha1::{Digest, Sha1};

use crate::formats::hex::hex;

/// The only repository format that is read.
const FORMAT: u64 = 5;

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// The section it stands in.
    pub section: &'a str,
    /// Text before the `=`.
    pub key: &'a str,
    /// JSON after it.
    pub value: &'a str,
}

/// Why a file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Problem {
    /// It contradicts itself; a copy may stand in for it.
    Damaged(String),
    /// It is whole, but of a kind that is not read.
    Unsupported(String),
}

impl Problem {
    /// A damage.
    pub(crate) fn damaged(text: impl Into<String>) -> Self {
        Self::Damaged(text.into())
    }
}

/// Reads all lines of a file after its format and checksum were verified.
///
/// # Errors
/// [`Problem`].
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Entry<'_>>, Problem> {
    if bytes.is_empty() {
        return Err(Problem::damaged("it is empty"));
    }
    if bytes.starts_with(b"Salted__") {
        return Err(Problem::Unsupported("an encrypted repository (repo-cipher-type)".into()));
    }
    let text = std::str::from_utf8(bytes).map_err(|err| {
        Problem::damaged(format!("it is no text from byte {} on", err.valid_up_to()))
    })?;
    let entries = lines(text)?;
    let format =
        entries.iter().find(|entry| entry.section == "backrest" && entry.key == "backrest-format");
    match format.map(|entry| entry.value.parse::<u64>()) {
        Some(Ok(FORMAT)) => {}
        Some(Ok(other)) => {
            return Err(Problem::Unsupported(format!("pgBackRest's repository format {other}")));
        }
        Some(Err(_)) | None => return Err(Problem::damaged("it does not begin with its format")),
    }
    let last = entries.last().filter(|entry| is_checksum(entry));
    let stated: Option<String> = last.and_then(|entry| serde_json::from_str(entry.value).ok());
    let Some(stated) = stated else {
        return Err(Problem::damaged("it ends without its checksum, so it is truncated"));
    };
    let actual = checksum(&entries);
    if stated != actual {
        return Err(Problem::damaged(format!("its checksum is {actual}, but it says {stated}")));
    }
    if entries.iter().any(|entry| entry.section == "cipher") {
        return Err(Problem::Unsupported("an encrypted repository (repo-cipher-type)".into()));
    }
    Ok(entries)
}

/// Splits a text into its lines, without judging them further. A text that was cut off within a line is an error.
pub(crate) fn lines(text: &str) -> Result<Vec<Entry<'_>>, Problem> {
    let mut entries = Vec::new();
    let mut section = None;
    for (number, line) in text.split('\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let bad = |what: &str| Problem::damaged(format!("its line {} {what}", number + 1));
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = Some(name);
            continue;
        }
        let section = section.ok_or_else(|| bad("stands before any section"))?;
        let is_cut_off = || !text.ends_with('\n') && text.ends_with(line);
        let (key, value) = split(line).ok_or_else(|| {
            bad(if is_cut_off() {
                "is cut off: the file is truncated"
            } else {
                "is not `key=JSON`"
            })
        })?;
        entries.push(Entry { section, key, value });
    }
    Ok(entries)
}

/// Splits at the first `=` whose right side is JSON: keys may hold `=` themselves.
fn split(line: &str) -> Option<(&str, &str)> {
    let is_json = |text: &str| serde_json::from_str::<IgnoredAny>(text).is_ok();
    line.match_indices('=')
        .map(|(at, _)| (&line[..at], &line[at + 1..]))
        .find(|(_, value)| is_json(value))
}

fn is_checksum(entry: &Entry<'_>) -> bool {
    entry.section == "backrest" && entry.key == "backrest-checksum"
}

/// SHA-1 over the lines as one JSON object of objects, in the file's order, values byte for byte.
fn checksum(entries: &[Entry<'_>]) -> String {
    let mut hash = Sha1::new();
    let mut section = None;
    for entry in entries.iter().filter(|entry| !is_checksum(entry)) {
        if section == Some(entry.section) {
            hash.update(b",");
        } else {
            hash.update(if section.is_none() { &b"{"[..] } else { &b"},"[..] });
            hash.update(quoted(entry.section));
            hash.update(b":{");
            section = Some(entry.section);
        }
        hash.update(quoted(entry.key));
        hash.update(b":");
        hash.update(entry.value);
    }
    hash.update(if section.is_none() { &b"{}"[..] } else { &b"}}"[..] });
    hex(&hash.finalize())
}

/// A text as pgBackRest writes JSON strings (pgBackRest source, `jsonFromStrInternal`).
fn quoted(text: &str) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(text.len() + 2);
    quoted.push(b'"');
    for byte in text.bytes() {
        let escaped = match byte {
            b'"' | b'\\' => byte,
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0x08 => b'b',
            0x0C => b'f',
            _ => {
                quoted.push(byte);
                continue;
            }
        };
        quoted.extend([b'\\', escaped]);
    }
    quoted.push(b'"');
    quoted
}

/// Reads a line's value.
///
/// # Errors
/// The line, and what is wrong with its value.
pub(crate) fn value<T: DeserializeOwned>(entry: &Entry<'_>) -> Result<T, Problem> {
    serde_json::from_str(entry.value)
        .map_err(|err| Problem::damaged(format!("`{}` in [{}]: {err}", entry.key, entry.section)))
}

/// Reads the value of `key` in `section`, if it is there.
///
/// # Errors
/// As [`value`].
pub(crate) fn find<T: DeserializeOwned>(
    entries: &[Entry<'_>],
    section: &str,
    key: &str,
) -> Result<Option<T>, Problem> {
    entries.iter().find(|entry| entry.section == section && entry.key == key).map(value).transpose()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Adds pgBackRest's head and checksum to `body`.
    pub(crate) fn sealed(body: &str) -> String {
        let text = format!("[backrest]\nbackrest-format=5\nbackrest-version=\"2.45\"\n\n{body}");
        let sum = checksum(&lines(&text).unwrap());
        format!("{text}\n[backrest]\nbackrest-checksum=\"{sum}\"\n")
    }

    /// `archive.info` as pgBackRest 2.45 wrote it.
    const REAL: &str = "[backrest]\nbackrest-format=5\nbackrest-version=\"2.45\"\n\n[db]\ndb-id=1\n\
        db-system-id=7711139811189162683\ndb-version=\"15\"\n\n[db:history]\n\
        1={\"db-id\":7711139811189162683,\"db-version\":\"15\"}\n\n[backrest]\n\
        backrest-checksum=\"11693150a416c484d868aa50c254a94114b10114\"\n";

    #[test]
    fn reads_a_real_one() {
        let entries = parse(REAL.as_bytes()).unwrap();
        assert_eq!(
            find::<u64>(&entries, "db", "db-system-id").unwrap(),
            Some(7_711_139_811_189_162_683)
        );
        assert_eq!(find::<u64>(&entries, "db", "nothing").unwrap(), None);
        assert!(find::<u64>(&entries, "db", "db-version").is_err());
    }

    #[test]
    fn refuses_what_is_damaged_or_foreign() {
        let cases = [
            ("empty", String::new(), "empty"),
            (
                "cut at a line",
                REAL[..REAL.find("[backrest]\nbackrest-check").unwrap()].into(),
                "truncated",
            ),
            ("cut within a line", REAL[..120].into(), "truncated"),
            ("cut within a value", REAL[..170].into(), "truncated"),
            (
                "a changed digit",
                REAL.replace("7711139811189162683", "7711139811189162684"),
                "checksum",
            ),
            ("not text", "\u{1}\u{2}".into(), "before any section"),
            ("other format", REAL.replace("format=5", "format=6"), "format 6"),
            ("encrypted", "Salted__\u{1}".into(), "encrypted"),
            ("cipher inside", sealed("[cipher]\ncipher-pass=\"x\"\n"), "encrypted"),
        ];
        for (name, text, want) in cases {
            let (Problem::Damaged(got) | Problem::Unsupported(got)) =
                parse(text.as_bytes()).unwrap_err();
            assert!(got.contains(want), "{name}: {got}");
        }
        assert!(parse(&[b'[', 0xFF, b']']).is_err());
    }

    #[test]
    fn a_key_may_hold_an_equals_sign() {
        assert_eq!(split("pg_data/a=b={\"x\":\"=\"}"), Some(("pg_data/a=b", "{\"x\":\"=\"}")));
        assert_eq!(split("a=b"), None);
        assert_eq!(split("a=1=2"), Some(("a=1", "2")));
    }

    proptest! {
        #[test]
        fn any_text_is_told_not_trusted(text in "(\\[[a-z]*\\]\n|[a-z=]*=[0-9\"{}:a]*\n|.*\n){0,12}") {
            let _ = parse(text.as_bytes());
            let _ = lines(&text);
        }

        #[test]
        fn any_change_is_noticed(at in 0_usize..290, to in any::<u8>()) {
            let mut bytes = REAL.as_bytes().to_vec();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != to && bytes[at] != b'\n' && to != b'\n');
            bytes[at] = to;
            if let Ok(entries) = parse(&bytes) {
                // pgBackRest's version is covered like all else; only the checksum's own place could differ
                prop_assert!(entries.is_empty(), "changed byte {} went unnoticed", at);
            }
        }
    }
}
