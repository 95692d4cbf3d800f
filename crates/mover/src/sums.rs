//! `SHA256SUMS` as `sha256sum -c` reads it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::MoveError;
use crate::names::{hex, is_plain};

/// One line of a `SHA256SUMS`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SumEntry {
    /// Path relative to the target directory, `/` between its parts.
    pub path: String,
    /// Checksum of the whole file.
    pub sha256: [u8; 32],
}

/// Returns the listing, sorted by path.
///
/// A path with a backslash, line feed or carriage return is escaped and its line begins with a backslash
/// (coreutils manual, "md5sum invocation").
pub fn format_sha256sums(entries: &[SumEntry]) -> String {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort();
    let mut text = String::new();
    for SumEntry { path, sha256 } in sorted {
        let escaped = path.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        if escaped != *path {
            text.push('\\');
        }
        text.push_str(&format!("{}  {escaped}\n", hex(sha256)));
    }
    text
}

/// Reads a listing back; `path` is only for the error.
///
/// # Errors
/// [`MoveError::BadListing`] for a line that is not ours, and for a path that is not relative and plain
/// (it could otherwise name something outside of the target directory).
pub fn parse_sha256sums(path: &Path, text: &str) -> Result<Vec<SumEntry>, MoveError> {
    let bad = |line, reason: &'static str| {
        let reason = reason.into();
        MoveError::BadListing { path: path.into(), line, reason }
    };
    let mut entries = Vec::new();
    for (at, line) in text.split_terminator('\n').enumerate() {
        let (escaped, rest) = match line.strip_prefix('\\') {
            Some(rest) => (true, rest),
            None => (false, line),
        };
        let (hash, name) =
            rest.split_once("  ").ok_or_else(|| bad(at + 1, "not `checksum  path`"))?;
        let sha256 = unhex(hash).ok_or_else(|| bad(at + 1, "not a SHA-256"))?;
        let name = if escaped { unescape(name) } else { Some(name.into()) };
        let name = name.ok_or_else(|| bad(at + 1, "unknown escape in the path"))?;
        if !name.split('/').all(is_plain) {
            return Err(bad(at + 1, "the path is not a plain relative one"));
        }
        entries.push(SumEntry { path: name, sha256 });
    }
    Ok(entries)
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut hash = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(hash)
}

fn unescape(name: &str) -> Option<String> {
    let mut plain = String::with_capacity(name.len());
    let mut chars = name.chars();
    while let Some(char) = chars.next() {
        plain.push(match char {
            '\\' => match chars.next()? {
                '\\' => '\\',
                'n' => '\n',
                'r' => '\r',
                _ => return None,
            },
            other => other,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn sha256sum_accepts_the_listing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("we ird\\n\"db\"")).unwrap();
        let mut entries = Vec::new();
        for (path, content) in [
            ("globals.sql", "CREATE ROLE x;\n"),
            ("we ird\\n\"db\"/toc.dat", "toc"),
            ("we ird\\n\"db\"/3001.dat.gz", ""),
            ("line\nbreak", "content"),
            ("ends in a space ", "content"),
        ] {
            fs::write(dir.path().join(path), content).unwrap();
            entries.push(SumEntry { path: path.into(), sha256: Sha256::digest(content).into() });
        }
        let listing = dir.path().join("SHA256SUMS");
        let check = || {
            let mut command = Command::new("sha256sum");
            command
                .args(["--check", "--strict", "SHA256SUMS"])
                .current_dir(dir.path())
                .output()
                .unwrap()
        };
        fs::write(&listing, format_sha256sums(&entries)).unwrap();
        let output = check();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), entries.len());

        fs::write(dir.path().join("globals.sql"), "CREATE ROLE y;\n").unwrap();
        assert!(!check().status.success(), "a changed file is noticed");
    }

    #[test]
    fn refuses_paths_that_lead_out() {
        let hash = "0".repeat(64);
        for path in ["/etc/passwd", "../x", "a/../../x", "a//b", "", "a/.", "a\0b"] {
            let error =
                parse_sha256sums(Path::new("SHA256SUMS"), &format!("{hash}  ok\n{hash}  {path}\n"));
            assert!(
                matches!(error, Err(MoveError::BadListing { line: 2, .. })),
                "{path:?}: {error:?}"
            );
        }
        for text in [
            "x  y",
            &format!("{hash} y"),
            &format!("{}g  y", &hash[1..]),
            &format!("\\{hash}  a\\q"),
        ] {
            assert!(parse_sha256sums(Path::new("SHA256SUMS"), text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn reads_back_what_it_wrote(mut entries in prop::collection::vec(("[a-z\\\\\n\r é]{1,9}(/[a-z\\\\\n\r]{1,9})?", any::<[u8; 32]>()), 0..20)) {
            entries.sort();
            let entries: Vec<_> = entries.into_iter().map(|(path, sha256)| SumEntry { path, sha256 }).collect();
            let text = format_sha256sums(&entries);
            prop_assert_eq!(parse_sha256sums(Path::new("SHA256SUMS"), &text).unwrap(), entries);
        }

        #[test]
        fn never_panics(text in "[\\\\0-9a-f \n/.é]{0,200}") {
            let _ = parse_sha256sums(Path::new("SHA256SUMS"), &text);
        }
    }
}
