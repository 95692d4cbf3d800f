//! Which symbolic links the mount may hold.
//!
//! Whoever writes to the mount may be code of a backup, and a link leads out of it: a link may stand only at a path for
//! which a destination was provided, and lead only there. Paths and destinations are bytes, compared as they are.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

use rustix::io::Errno;

use crate::Ino;

/// At most so many characters of a name of others are shown.
const SHOWN: usize = 200;

/// The destinations that were provided, and the links that there are.
#[derive(Default)]
pub(crate) struct Links {
    provided: HashMap<Vec<u8>, BTreeSet<Vec<u8>>>,
    /// Every symbolic link that still has its number.
    pub(crate) numbers: BTreeSet<Ino>,
}

impl Links {
    /// Allows a link at `path`, below the root, to `destination`, beside those allowed there before.
    pub(crate) fn provide(&mut self, path: &[u8], destination: &[u8]) {
        self.provided.entry(path.to_vec()).or_default().insert(destination.to_vec());
    }

    /// Refuses a link that was not provided.
    pub(crate) fn check(
        &self,
        path: Vec<u8>,
        destination: &[u8],
    ) -> std::result::Result<(), Refusal> {
        match self.provided.get(&path) {
            Some(destinations) if destinations.contains(destination) => Ok(()),
            _ => Err(Refusal::link(path, destination)),
        }
    }
}

/// Why names were not changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// What was asked for cannot be done.
    Errno(Errno),
    /// It would put a symbolic link where it may not be.
    Link(RefusedLink),
}

/// A link that was not provided.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RefusedLink {
    /// Where it would be, below the root.
    pub(crate) path: Vec<u8>,
    /// Where it would lead.
    pub(crate) destination: Vec<u8>,
}

impl Refusal {
    pub(crate) fn link(path: Vec<u8>, destination: &[u8]) -> Self {
        Self::Link(RefusedLink { path, destination: destination.to_vec() })
    }

    /// Returns the error number alone.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Errno(errno) => *errno,
            Self::Link(_) => Errno::PERM,
        }
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// What changing names gives.
pub(crate) type Changed<T> = std::result::Result<T, Refusal>;

/// Returns a name that others chose for a message: what is not UTF-8 or cannot be printed is escaped, and a long name is
/// cut off.
pub(crate) fn shown(name: &[u8]) -> String {
    let mut text = String::new();
    let mut count = 0;
    for chunk in name.utf8_chunks() {
        for char in chunk.valid().chars() {
            if count == SHOWN {
                return text + "…";
            }
            count += 1;
            match char {
                '\'' | '"' => text.push(char),
                '`' => text.push_str("\\`"), // messages put names between these
                _ => text.extend(char.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            if count == SHOWN {
                return text + "…";
            }
            count += 1;
            let _ = write!(text, "\\x{byte:02x}"); // writing to a String cannot fail
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_leads_only_where_it_was_provided_to() {
        let mut links = Links::default();
        links.provide(b"data/pg_tblspc/16385", b"/srv/fast");
        links.provide(b"data/pg_tblspc/16385", b"/srv/other");
        links.provide(b"data/pg_tblspc/16386", b"/srv/slow");
        let cases: [(&[u8], &[u8], bool); 7] = [
            (b"data/pg_tblspc/16385", b"/srv/fast", true),
            (b"data/pg_tblspc/16385", b"/srv/other", true),
            (b"data/pg_tblspc/16385", b"/srv/slow", false),
            (b"data/pg_tblspc/16385", b"/srv/fast/", false),
            (b"data/pg_tblspc/16385", b"", false),
            (b"data/pg_tblspc/16387", b"/srv/fast", false),
            (b"pg_tblspc/16385", b"/srv/fast", false),
        ];
        for (path, destination, allowed) in cases {
            let want =
                if allowed { Ok(()) } else { Err(Refusal::link(path.to_vec(), destination)) };
            let (path, shown) = (path.to_vec(), shown(path));
            assert_eq!(links.check(path, destination), want, "{shown} to {destination:?}");
        }
    }

    #[test]
    fn names_of_others_are_harmless_in_messages() {
        let long = "x".repeat(300);
        let cases: [(&[u8], &str); 8] = [
            (b"data/base/1", "data/base/1"),
            ("größe 'x' \"y\"".as_bytes(), "größe 'x' \"y\""),
            (b"a\nb\x1b[31m\x7f", "a\\nb\\u{1b}[31m\\u{7f}"),
            (b"\xff/\xc3(", "\\xff/\\xc3("),
            ("\u{202e}gpj".as_bytes(), "\\u{202e}gpj"),
            (b"` and \\", "\\` and \\\\"),
            (b"", ""),
            (long.as_bytes(), &("x".repeat(200) + "…")),
        ];
        for (name, want) in cases {
            assert_eq!(shown(name), want);
        }
        assert_eq!(shown(&[0xff; 300]), "\\xff".repeat(200) + "…");
    }
}
