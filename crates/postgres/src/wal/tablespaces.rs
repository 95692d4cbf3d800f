//! Which links to tablespaces a replay will make, out of the records it will replay.
//!
//! Sources: PostgreSQL's `tablespace.c` (`tblspc_redo`, `create_tablespace_directories`), `pg_config_manual.h`.

use std::collections::BTreeMap;

use super::Record;
use crate::lsn::Lsn;

/// How many different links are kept; more only come from WAL that somebody made up.
const MOST_LINKS: usize = 10_000;

/// The longest path that PostgreSQL works with, with the NUL byte at its end (`MAXPGPATH`).
const LONGEST_PATH: usize = 1024;

/// The longest name in a directory that Linux allows (`NAME_MAX`).
const LONGEST_NAME: usize = 255;

/// A link `pg_tblspc/OID` to a location, as replay makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayedTablespace {
    /// The tablespace.
    pub oid: u32,
    /// Where the link leads. Empty: in place, a directory instead of a link.
    pub location: Vec<u8>,
    /// Where the record that first makes it begins.
    pub created: Lsn,
    /// Where the record that removes it, or leads it to another location, begins. `None` if it is still there
    /// at the end.
    pub dropped: Option<Lsn>,
}

/// More different links than any cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the WAL creates more than {MOST_LINKS} tablespaces")]
pub struct TooManyTablespaces;

/// The links that replay makes, collected record by record.
#[derive(Debug, Default)]
pub struct ReplayedTablespaces {
    links: BTreeMap<(u32, Vec<u8>), (Lsn, Option<Lsn>)>,
    /// Where each tablespace's link leads now.
    current: BTreeMap<u32, Vec<u8>>,
    too_many: bool,
}

impl ReplayedTablespaces {
    /// Takes the next record into account. Records must come in the order of the WAL.
    pub fn add(&mut self, record: Record) {
        match record {
            Record::TablespaceCreate { lsn, oid, location } => {
                let key = (oid, location);
                if self.links.len() >= MOST_LINKS && !self.links.contains_key(&key) {
                    self.too_many = true;
                    return;
                }
                self.end(oid, lsn);
                self.current.insert(oid, key.1.clone());
                self.links.entry(key).or_insert((lsn, None)).1 = None;
            }
            Record::TablespaceDrop { lsn, oid } => self.end(oid, lsn),
            // databases lie in directories below; replay makes those that it misses
            Record::DatabaseCreate { .. } | Record::DatabaseDrop { .. } => {}
        }
    }

    /// Returns every link once, ordered by tablespace and first record.
    ///
    /// A tablespace that was made again at its old location is one entry. One that exists at the end has
    /// exactly one entry whose `dropped` is `None`.
    ///
    /// # Errors
    /// [`TooManyTablespaces`] if there were too many to keep.
    pub fn finish(self) -> Result<Vec<ReplayedTablespace>, TooManyTablespaces> {
        if self.too_many {
            return Err(TooManyTablespaces);
        }
        let entry = |((oid, location), (created, dropped))| ReplayedTablespace {
            oid,
            location,
            created,
            dropped,
        };
        let mut links: Vec<ReplayedTablespace> = self.links.into_iter().map(entry).collect();
        links.sort_by_key(|link| (link.oid, link.created));
        Ok(links)
    }

    /// Notes that the tablespace's link, if it has one, is gone from here on.
    fn end(&mut self, oid: u32, lsn: Lsn) {
        let Some(location) = self.current.remove(&oid) else { return };
        if let Some((_, dropped)) = self.links.get_mut(&(oid, location)) {
            *dropped = Some(lsn);
        }
    }
}

/// Why a location cannot be that of a tablespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LocationObjection {
    /// Neither empty nor absolute.
    #[error("it is not an absolute path")]
    Relative,
    /// A NUL byte, which no path can hold.
    #[error("it holds a NUL byte")]
    Nul,
    /// Bytes that we could not tell of, nor find in what the server says.
    #[error("it is not UTF-8")]
    Encoding,
    /// A part that leads upwards.
    #[error("it contains `..`")]
    Upwards,
    /// The root directory.
    #[error("it is the root directory")]
    Root,
    /// A part that no directory can hold.
    #[error("a part of it is longer than {LONGEST_NAME} bytes")]
    LongName,
    /// Too long for PostgreSQL.
    #[error("it is longer than {} bytes", LONGEST_PATH - 1)]
    LongPath,
}

/// Returns why no directory can be made at the location of a tablespace; `None` if one can, and for one in place.
///
/// The path may still contain `.` and empty parts, and any characters but NUL.
pub fn location_objection(location: &[u8]) -> Option<LocationObjection> {
    let parts = || location.split(|byte| *byte == b'/');
    match () {
        () if location.is_empty() => None,
        () if location.contains(&0) => Some(LocationObjection::Nul),
        () if std::str::from_utf8(location).is_err() => Some(LocationObjection::Encoding),
        () if location[0] != b'/' => Some(LocationObjection::Relative),
        () if location.len() >= LONGEST_PATH => Some(LocationObjection::LongPath),
        () if parts().any(|part| part == b"..") => Some(LocationObjection::Upwards),
        () if parts().any(|part| part.len() > LONGEST_NAME) => Some(LocationObjection::LongName),
        () if parts().all(|part| matches!(part, b"" | b".")) => Some(LocationObjection::Root),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    enum Step {
        Create(u32, &'static str),
        Drop(u32),
    }

    /// A tablespace's number, location, and the positions of its first record and of the one that ended it.
    type Link<T> = (u32, T, u64, Option<u64>);

    fn replay(steps: &[Step]) -> Vec<Link<String>> {
        let mut replayed = ReplayedTablespaces::default();
        for (step, lsn) in steps.iter().zip((8..).step_by(8).map(Lsn)) {
            replayed.add(match *step {
                Step::Create(oid, location) => {
                    Record::TablespaceCreate { lsn, oid, location: location.into() }
                }
                Step::Drop(oid) => Record::TablespaceDrop { lsn, oid },
            });
        }
        let links = replayed.finish().unwrap().into_iter();
        links
            .map(|link| {
                let location = String::from_utf8(link.location).unwrap();
                (link.oid, location, link.created.0, link.dropped.map(|lsn| lsn.0))
            })
            .collect()
    }

    #[test]
    fn every_link_is_known_with_what_becomes_of_it() {
        use Step::{Create, Drop};
        let cases: [(_, &[Step], &[Link<&str>]); 8] = [
            ("nothing", &[], &[]),
            ("one", &[Create(1, "/a")], &[(1, "/a", 8, None)]),
            ("dropped", &[Create(1, "/a"), Drop(1)], &[(1, "/a", 8, Some(16))]),
            ("made before the start", &[Drop(1)], &[]),
            (
                "again at its place, as another tablespace",
                &[Create(1, "/a"), Drop(1), Create(2, "/a")],
                &[(1, "/a", 8, Some(16)), (2, "/a", 24, None)],
            ),
            ("the same again", &[Create(1, "/a"), Drop(1), Create(1, "/a")], &[(1, "/a", 8, None)]),
            (
                "led elsewhere and back",
                &[Create(1, "/b"), Create(1, "/a"), Create(1, "/b")],
                &[(1, "/b", 8, None), (1, "/a", 16, Some(24))],
            ),
            ("in place", &[Create(1, "")], &[(1, "", 8, None)]),
        ];
        for (name, steps, want) in cases {
            let want: Vec<_> =
                want.iter().map(|(o, l, c, d)| (*o, l.to_string(), *c, *d)).collect();
            assert_eq!(replay(steps), want, "{name}");
        }
    }

    #[test]
    fn wal_full_of_tablespaces_takes_no_memory() {
        let mut replayed = ReplayedTablespaces::default();
        for oid in 0..MOST_LINKS as u32 {
            replayed.add(Record::TablespaceCreate { lsn: Lsn(8), oid, location: b"/a".into() });
        }
        let again = Record::TablespaceCreate { lsn: Lsn(16), oid: 7, location: b"/a".into() };
        replayed.add(again);
        assert!(!replayed.too_many, "the same link again is not another one");
        replayed.add(Record::TablespaceCreate { lsn: Lsn(24), oid: 7, location: b"/b".into() });
        assert_eq!(replayed.links.len(), MOST_LINKS);
        assert_eq!(replayed.finish(), Err(TooManyTablespaces));
    }

    #[test]
    fn locations_are_absolute_and_of_linuxs_length() {
        use LocationObjection as O;
        let name = "x".repeat(LONGEST_NAME);
        let long = format!("/{name}/{name}/{name}/{}", "x".repeat(LONGEST_NAME - 1));
        assert_eq!(long.len(), LONGEST_PATH - 1);
        let cases = [
            ("", None),
            ("/a", None),
            ("/srv//pg/./data/", None),
            ("/a/..b/c..", None),
            (&format!("/{name}"), None),
            (&long, None),
            (&format!("{long}x"), Some(O::LongPath)),
            (&format!("/{name}x"), Some(O::LongName)),
            ("a", Some(O::Relative)),
            ("pg_tblspc/16384", Some(O::Relative)),
            ("/a\0b", Some(O::Nul)),
            ("/a/../b", Some(O::Upwards)),
            ("/..", Some(O::Upwards)),
            ("/", Some(O::Root)),
            ("//./", Some(O::Root)),
        ];
        for (location, want) in cases {
            assert_eq!(location_objection(location.as_bytes()), want, "{location:?}");
        }
        assert_eq!(location_objection(b"/srv/\xE4\xFF"), Some(LocationObjection::Encoding));
    }
}
