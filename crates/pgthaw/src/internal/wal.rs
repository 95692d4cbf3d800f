//! The WAL of a mounted backup, read as it was stored: what replay will do, and whether it went as far as it could.

use std::collections::BTreeMap;
use std::io;

use pgthaw_postgres::control::ControlFile;
use pgthaw_postgres::label::BackupLabel;
use pgthaw_postgres::lsn::{Lsn, Segment, segment_name};
use pgthaw_postgres::wal::{self, ReplayedTablespaces, WalIdentity, record_end};
use pgthaw_source::reader::Reader;
use serde::{Deserialize, Serialize};

use super::source::with_causes;

/// The tablespaces that replay makes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalTablespaces {
    /// Each link that replay makes: the tablespace, where it leads, and whether it is still there at the end.
    pub links: Vec<WalTablespace>,
    /// Bytes of WAL that were looked through.
    pub bytes: u64,
}

/// A tablespace that replay makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalTablespace {
    /// Its OID.
    pub oid: u32,
    /// Where it lay on the original server, as bytes; empty for one in the data directory itself.
    pub location: Vec<u8>,
    /// It is there at the end of the WAL.
    pub remains: bool,
}

/// The WAL that is presented to PostgreSQL.
pub struct BackupWal<'a> {
    reader: &'a Reader,
    identity: WalIdentity,
    /// Where replay begins.
    start: Lsn,
    timeline: u32,
    /// The timeline and its ancestors, newest first.
    timelines: Vec<u32>,
    /// The file of each segment in `pg_wal`.
    segments: BTreeMap<String, usize>,
}

impl<'a> BackupWal<'a> {
    /// Finds the WAL in the backup's map.
    ///
    /// # Errors
    /// A file that is missing or cannot be read.
    pub fn open(reader: &'a Reader, timeline: u32) -> Result<Self, String> {
        let control = read_whole(reader, "data/global/pg_control")?
            .ok_or("`global/pg_control` is not in the backup")?;
        let control = ControlFile::parse(&control).map_err(|err| with_causes(&err))?;
        let start = match read_whole(reader, "data/backup_label")? {
            Some(label) => BackupLabel::parse(&label).map_err(|err| with_causes(&err))?.start,
            None => control.redo,
        };
        let history = read_whole(reader, &format!("data/pg_wal/{timeline:08X}.history"))?;
        let mut timelines = history.map_or_else(Vec::new, |history| ancestors(&history));
        timelines.push(timeline);
        timelines.reverse();
        let wal = reader.files().iter().enumerate().filter_map(|(number, file)| {
            Some((file.path.as_str().strip_prefix("data/pg_wal/")?.to_owned(), number))
        });
        let identity = WalIdentity::of(&control).map_err(|err| with_causes(&err))?;
        Ok(Self { reader, identity, start, timeline, timelines, segments: wal.collect() })
    }

    /// Reads WAL as replay does: each segment from the newest timeline that has it. `false` if none has.
    fn read(&self, at: Lsn, buf: &mut [u8]) -> io::Result<bool> {
        let size = self.identity.segment_size;
        let names = self.timelines.iter().map(|timeline| segment_name(*timeline, at, size));
        let Some(number) = names.into_iter().find_map(|name| self.segments.get(&name)) else {
            return Ok(false);
        };
        let read = self.reader.read_at(*number, at.0 % size.bytes(), buf);
        read.map(|()| true).map_err(|err| io::Error::other(with_causes(&err)))
    }

    /// Returns the tablespaces that replay makes, up to the record that begins at `until` or to the end of the WAL.
    ///
    /// # Errors
    /// WAL that cannot be read, or holds a record that PostgreSQL never writes.
    pub fn tablespaces(&mut self, until: Option<&str>) -> Result<WalTablespaces, String> {
        let until = until.map(str::parse::<Lsn>).transpose().map_err(|err| err.to_string())?;
        let mut links = ReplayedTablespaces::default();
        let mut read = |at: Lsn, buf: &mut [u8]| self.read(at, buf);
        let walked = wal::walk(&mut read, &self.identity, self.start, until, &mut |record| {
            links.add(record);
        });
        let end = walked.map_err(|err| with_causes(&err))?.lsn;
        let links = links.finish().map_err(|err| err.to_string())?;
        let links = links.into_iter().map(|link| WalTablespace {
            oid: link.oid,
            location: link.location,
            remains: link.dropped.is_none(),
        });
        Ok(WalTablespaces { links: links.collect(), bytes: end.0.saturating_sub(self.start.0) })
    }

    /// Finds the first valid page of WAL after the record that begins at `after`, as `X/X`.
    ///
    /// # Errors
    /// WAL that cannot be read.
    pub fn later_page(&mut self, after: &str) -> Result<Option<String>, String> {
        let start: Lsn = after.parse().map_err(|err| format!("{err}"))?;
        let size = self.identity.segment_size;
        let ends =
            self.segments.keys().filter_map(|name| Segment::parse(name, size)?.next().start(size));
        let end = ends.max().unwrap_or(Lsn(0));
        let own = Self { timelines: vec![self.timeline], segments: self.segments.clone(), ..*self };
        let mut read = |at: Lsn, buf: &mut [u8]| own.read(at, buf);
        let failed = |err: io::Error| err.to_string();
        let Some(record_end) = record_end(&mut read, &self.identity, start).map_err(failed)? else {
            return Ok(None);
        };
        let page = wal::later_valid_page(&mut read, &self.identity, self.timeline, record_end, end);
        Ok(page.map_err(failed)?.map(|lsn| lsn.to_string()))
    }
}

/// Reads a file of the backup whole; none if there is no such file.
fn read_whole(reader: &Reader, path: &str) -> Result<Option<Vec<u8>>, String> {
    let Some(file) = reader.files().iter().position(|file| file.path.as_str() == path) else {
        return Ok(None);
    };
    reader.read_whole(file).map(Some).map_err(|err| with_causes(&err))
}

/// Reads the ancestors of a timeline out of its history file, oldest first (PostgreSQL manual, "Timelines"). The file was
/// checked when the backup was opened.
fn ancestors(history: &[u8]) -> Vec<u32> {
    let text = String::from_utf8_lossy(history);
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ancestors_are_the_first_words_of_a_history() {
        let text = b"1\t0/3000000\tno recovery target specified\n\n# a comment\n2\t0/5000000\tbefore 2000\n";
        assert_eq!(ancestors(text), [1, 2]);
        assert_eq!(ancestors(b""), [0; 0]);
    }
}
