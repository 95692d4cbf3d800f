//! The name of a database's directory in the target.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// The roles and tablespaces of the cluster, beside the databases.
pub const GLOBALS_SQL: &str = "globals.sql";
/// The checksums of every delivered file but itself and [`EXPORT_JSON`].
pub const SHA256SUMS: &str = "SHA256SUMS";
/// What was exported and how; its presence means that the export is complete.
pub const EXPORT_JSON: &str = "export.json";

/// Longest file name that Linux file systems take, in bytes (`NAME_MAX`, limits.h).
pub(crate) const NAME_MAX: usize = 255;

/// Returns the file name for a database: the name itself where it is safe, else percent-encoded.
///
/// Encoded are `%`, `/`, control characters, a leading `.` or `-`, and the first character of a name that an
/// export uses for something else. Different databases never share a name. What would be longer than a
/// file name may be (a server built with a large `NAMEDATALEN`) is cut and ends in `%~` and a SHA-256.
pub fn file_name_for_database(database: &str) -> String {
    let taken = [GLOBALS_SQL, SHA256SUMS, EXPORT_JSON, "lost+found"].contains(&database);
    let mut name = String::with_capacity(database.len());
    for (at, char) in database.chars().enumerate() {
        let first = at == 0 && (taken || matches!(char, '.' | '-'));
        if first || matches!(char, '%' | '/') || char.is_control() {
            for byte in char.encode_utf8(&mut [0; 4]).bytes() {
                let _ = write!(name, "%{byte:02X}"); // writing to a String cannot fail
            }
        } else {
            name.push(char);
        }
    }
    if name.len() <= NAME_MAX {
        return name;
    }
    let hash = hex(&Sha256::digest(database).into());
    let cut = (0..=NAME_MAX - 2 - hash.len()).rev().find(|at| name.is_char_boundary(*at));
    name.truncate(cut.unwrap_or(0));
    name + "%~" + &hash
}

/// Returns a SHA-256 in the lower-case hexadecimal of `sha256sum`.
pub(crate) fn hex(hash: &[u8; 32]) -> String {
    hash.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

/// Returns whether `name` is one plain part of a path.
pub(crate) fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_databases() {
        let long = "x".repeat(400);
        let cases = [
            ("plain", "crm", "crm"),
            ("spaces, quotes and letters stay", "we ird\"Müller", "we ird\"Müller"),
            ("slash", "a/b", "a%2Fb"),
            ("percent", "100%", "100%25"),
            ("hidden", ".ssh", "%2Essh"),
            ("this directory", ".", "%2E"),
            ("parent directory", "..", "%2E."),
            ("an option of rm", "-rf", "%2Drf"),
            ("ours", "globals.sql", "%67lobals.sql"),
            ("ours", "SHA256SUMS", "%53HA256SUMS"),
            ("ours", "export.json", "%65xport.json"),
            ("line break", "a\nb", "a%0Ab"),
            ("a control character of two bytes", "a\u{85}b", "a%C2%85b"),
        ];
        for (what, database, want) in cases {
            assert_eq!(file_name_for_database(database), want, "{what}");
        }
        assert_eq!(file_name_for_database(&long).len(), 255);
        assert_ne!(file_name_for_database(&long), file_name_for_database(&format!("{long}x")));
    }

    /// Turns an encoded name back; `None` for what [`file_name_for_database`] never writes.
    fn decode(name: &str) -> Option<String> {
        let mut bytes = Vec::new();
        let mut rest = name.as_bytes();
        while let [first, tail @ ..] = rest {
            if *first == b'%' {
                let pair = std::str::from_utf8(tail.get(..2)?).ok()?;
                bytes.push(u8::from_str_radix(pair, 16).ok()?);
                rest = &tail[2..];
            } else {
                bytes.push(*first);
                rest = tail;
            }
        }
        String::from_utf8(bytes).ok()
    }

    proptest! {
        #[test]
        fn every_name_is_safe_and_can_be_told_from_any_other(database in "(\\PC|[-./%\\x00-\\x1f]){1,63}") {
            let name = file_name_for_database(&database);
            prop_assert!(is_plain(&name) && name.len() <= NAME_MAX && !name.starts_with(['.', '-']), "{name:?}");
            prop_assert!(!name.chars().any(char::is_control), "{name:?}");
            if !name.contains("%~") {
                prop_assert_eq!(decode(&name), Some(database)); // what can be decoded is injective
            }
        }
    }
}
