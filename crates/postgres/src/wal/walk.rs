//! Walks the records of the WAL as PostgreSQL's replay does, and ends where replay would.
//!
//! Owns pages, records across pages and segments, checksums, and the question whether a record is the last
//! one. Leaves what is inside a record to [`super::records`]. Start at [`walk()`].
//!
//! The walk never ends before replay would: it refuses what `xlogreader.c` refuses and nothing else. Of
//! records that it does not decode it does not look at the inside, and reads on where PostgreSQL would find
//! them inconsistent despite their right checksum.
//!
//! Memory stays the same however long the WAL and its records are: records are hashed piece by piece, and
//! only the decoded kinds are kept, up to a limit.
//!
//! Sources: PostgreSQL's `xlogreader.c` (`XLogDecodeNextRecord`, `ReadPageInternal`), 12 to 18.

use std::convert::Infallible;
use std::{fmt, io};

use super::pages::PageHeader;
use super::records::{LONGEST_DECODED, RECORD_HEADER, RecordHeader};
use super::{BadRecord, ReadWal, Record, SEGMENT_HEAD, WalIdentity};
use crate::bytes::u32_at;
use crate::lsn::Lsn;

/// How much is read at a time; whole pages, and no more than the smallest segment.
const CHUNK: u64 = 128 << 10;

/// No record is longer: PostgreSQL holds each of them in one allocation (`MaxAllocSize`).
const LONGEST_RECORD: u32 = 0x3FFF_FFFF;

/// Where a walk ended, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkEnd {
    /// Where the first record that is not there would begin: right after the last record, aligned to 8; the
    /// page's start, if it would be the first one of a page.
    pub lsn: Lsn,
    /// Where the last record begins: what the server's log calls "redo done at". `None` if there was none.
    pub last: Option<Lsn>,
    /// Why the walk ended here.
    pub reason: EndReason,
}

/// Why there is no further record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The walk was asked to end here; there may be more.
    Asked,
    /// This segment is not there.
    NoSegment(Lsn),
    /// The page that begins here is not the one that should be there.
    Page(Lsn, &'static str),
    /// No record begins here, or it is damaged.
    Record(&'static str),
    /// The record's rest should be on this page, and is not: the server stopped while it wrote the record.
    Unfinished(Lsn),
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("the walk was asked to end here"),
            Self::NoSegment(start) => write!(f, "the segment that begins at {start} is not there"),
            Self::Page(page, why) => write!(f, "the page at {page} is not usable: {why}"),
            Self::Record(why) => write!(f, "no record begins here: {why}"),
            Self::Unfinished(page) => write!(f, "the record here has no rest at {page}"),
        }
    }
}

/// Why the WAL could not be walked.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The WAL could not be read.
    #[error("read the WAL at {at}")]
    Read {
        /// The first byte that was asked for.
        at: Lsn,
        /// What happened.
        source: io::Error,
    },
    /// A position where no record can begin.
    #[error("no WAL record can begin at {0}")]
    Start(Lsn),
    /// A tablespace or database record with a right checksum that PostgreSQL cannot have written.
    #[error(
        "the tablespace or database record at WAL position {lsn} is not PostgreSQL's: {source}"
    )]
    Record {
        /// Where the record begins.
        lsn: Lsn,
        /// What is wrong with it.
        source: BadRecord,
    },
}

impl WalkError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read { .. } => "check the WAL archive and its permissions",
            Self::Start(_) => "the backup's label or pg_control is damaged; choose another backup",
            Self::Record { .. } => {
                "somebody changed this WAL; choose another backup, or end recovery before this position"
            }
        }
    }
}

/// Shows `each` tablespace and database record that a replay from `start` would replay, in order.
///
/// `start` is where a record begins, usually the redo location. `read` answers for the segments that replay
/// would choose: of each, the one of the latest timeline of the history that is there. A page of a timeline
/// that is not in the history ends replay but not the walk.
///
/// With `end` the walk stops after the first record that begins at or after it. That record counts because
/// PostgreSQL replays it too for an inclusive `recovery_target_lsn`.
///
/// # Errors
/// [`WalkError`] if the WAL cannot be read, and for a tablespace or database record that is not PostgreSQL's.
pub fn walk(
    read: ReadWal<'_>,
    identity: &WalIdentity,
    start: Lsn,
    end: Option<Lsn>,
    each: &mut dyn FnMut(Record),
) -> Result<WalkEnd, WalkError> {
    if !start.0.is_multiple_of(8) {
        return Err(WalkError::Start(start)); // all later positions are aligned if this one is
    }
    let mut walker = Walker { pages: Pages::new(read, identity), at: start.0, last: None };
    match walker.run(end, each) {
        Err(Stop::End(reason)) => Ok(WalkEnd { lsn: Lsn(walker.at), last: walker.last, reason }),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Why the walker goes no further.
enum Stop {
    End(EndReason),
    Failed(WalkError),
}

/// What the walker found at a position.
enum Found {
    /// A valid record, and the position after it.
    Record { start: Lsn, next: u64, decoded: Option<Record> },
    /// A record whose rest was never written: a server was stopped, started again, and wrote this page instead.
    Overwritten { page: u64 },
}

struct Walker<'a> {
    pages: Pages<'a>,
    /// Where the next record should begin.
    at: u64,
    /// Where the last one began.
    last: Option<Lsn>,
}

impl Walker<'_> {
    fn run(&mut self, end: Option<Lsn>, each: &mut dyn FnMut(Record)) -> Result<Infallible, Stop> {
        self.pages.check_segment_of(self.at)?;
        loop {
            match self.record()? {
                Found::Overwritten { page } => self.at = page,
                Found::Record { start, next, decoded } => {
                    (self.at, self.last) = (next, Some(start));
                    decoded.into_iter().for_each(&mut *each);
                    if end.is_some_and(|end| start >= end) {
                        return Err(Stop::End(EndReason::Asked));
                    }
                }
            }
        }
    }

    /// Reads the record that should begin at `self.at`.
    fn record(&mut self) -> Result<Found, Stop> {
        let identity = self.pages.identity;
        let page_size = u64::from(identity.page_size);
        let mut page = self.at - self.at % page_size;
        let (header, bytes) = self.pages.at(page)?;
        let offset = match usize::try_from(self.at - page).unwrap_or_default() {
            0 => header.size(),
            inside if inside < header.size() => return no_record("it is within a page's header"),
            offset => offset,
        };
        if offset == header.size() && header.continues_a_record() {
            return no_record("the page goes on with another record");
        }
        let start = Lsn(page + offset as u64);
        let rest = bytes.get(offset..).unwrap_or_default();
        let mut piece = Pieces::new(start, self.last, identity, u32_at(rest, 0))?;
        piece.add(&rest[..rest.len().min(piece.missing)])?;
        let mut next = start.0.checked_add(u64::from(piece.length));
        while piece.missing > 0 {
            page = page.checked_add(page_size).ok_or(TOO_FAR)?;
            let (header, bytes) = self.pages.at(page)?;
            if header.overwrites_a_record() {
                return Ok(Found::Overwritten { page });
            }
            if !header.continues_a_record() || header.remaining as usize != piece.missing {
                return Err(Stop::End(EndReason::Unfinished(Lsn(page))));
            }
            let rest = bytes.get(header.size()..).unwrap_or_default();
            let length = rest.len().min(piece.missing);
            piece.add(&rest[..length])?;
            next = page.checked_add((header.size() + length) as u64);
        }
        let next = next.and_then(|next| next.checked_next_multiple_of(8)).ok_or(TOO_FAR)?;
        let (header, decoded) = piece.finish()?;
        let next = match header.switches_segments() {
            true => next.checked_next_multiple_of(identity.segment_size.bytes()).ok_or(TOO_FAR)?,
            false => next,
        };
        Ok(Found::Record { start, next, decoded })
    }
}

const TOO_FAR: Stop = Stop::End(EndReason::Record("there are no further positions"));

fn no_record<T>(why: &'static str) -> Result<T, Stop> {
    Err(Stop::End(EndReason::Record(why)))
}

/// A record as it comes together from the pages it lies on.
struct Pieces<'a> {
    start: Lsn,
    /// Where the record before it begins.
    previous: Option<Lsn>,
    identity: &'a WalIdentity,
    /// Bytes of the whole record.
    length: u32,
    /// How many of them were not added yet.
    missing: usize,
    header: [u8; RECORD_HEADER],
    /// Bytes after the header: hashed, and kept for a record that will be decoded.
    checksum: u32,
    kept: Option<Vec<u8>>,
}

impl<'a> Pieces<'a> {
    /// `length` is the record's first number, which always lies on its first page.
    fn new(
        start: Lsn,
        previous: Option<Lsn>,
        identity: &'a WalIdentity,
        length: Option<u32>,
    ) -> Result<Self, Stop> {
        let length = match length {
            None => return no_record("it is at a page's end"),
            Some(0) => return no_record("its length is 0, as where nothing was written"),
            Some(length) if (length as usize) < RECORD_HEADER => {
                return no_record("its length is less than a header's");
            }
            Some(length) if length > LONGEST_RECORD => {
                return no_record("its length is more than PostgreSQL reads");
            }
            Some(length) => length,
        };
        let (missing, header) = (length as usize, [0; RECORD_HEADER]);
        Ok(Self { start, previous, identity, length, missing, header, checksum: 0, kept: None })
    }

    /// Adds the bytes of the next page; looks at the header as soon as all of it is there.
    fn add(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        let before = self.length as usize - self.missing;
        self.missing -= bytes.len();
        let of_header = bytes.len().min(RECORD_HEADER.saturating_sub(before));
        let (of_header, body) = bytes.split_at(of_header);
        if !of_header.is_empty() {
            self.header[before..before + of_header.len()].copy_from_slice(of_header);
            if before + of_header.len() == RECORD_HEADER {
                self.check_header()?;
            }
        }
        self.checksum = crc32c::crc32c_append(self.checksum, body);
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(body);
        }
        Ok(())
    }

    fn check_header(&mut self) -> Result<(), Stop> {
        let header = self.read_header()?;
        if let Some(why) = header.objection(self.start, self.previous, self.identity.major) {
            return no_record(why);
        }
        if header.is_decoded() && self.length as usize <= LONGEST_DECODED {
            self.kept = Some(Vec::new());
        }
        Ok(())
    }

    fn read_header(&self) -> Result<RecordHeader, Stop> {
        RecordHeader::read(&self.header).map_or_else(|| no_record("it has no header"), Ok)
    }

    /// Checks the record, of which nothing is missing any more, and decodes it if it is of such a kind.
    fn finish(self) -> Result<(RecordHeader, Option<Record>), Stop> {
        let header = self.read_header()?;
        // the header comes last, without the checksum itself
        let checksum = crc32c::crc32c_append(self.checksum, &self.header[..RecordHeader::CHECKED]);
        if checksum != header.checksum {
            return no_record("its checksum is wrong");
        }
        if !header.is_decoded() {
            return Ok((header, None));
        }
        let bad = |source| Stop::Failed(WalkError::Record { lsn: self.start, source });
        let kept = self.kept.as_ref().ok_or_else(|| bad(BadRecord::Long(self.length)))?;
        let record = Record::decode(self.start, &header, kept, self.identity.major).map_err(bad)?;
        Ok((header, Some(record)))
    }
}

/// Pages of the WAL, each one checked when it is first looked at.
struct Pages<'a> {
    read: ReadWal<'a>,
    identity: &'a WalIdentity,
    chunk: Vec<u8>,
    /// Where the chunk begins; `None` if it holds nothing.
    chunk_start: Option<u64>,
    /// The page that was looked at last.
    current: Option<(u64, PageHeader)>,
    /// Its timeline.
    timeline: u32,
}

impl<'a> Pages<'a> {
    fn new(read: ReadWal<'a>, identity: &'a WalIdentity) -> Self {
        Self { read, identity, chunk: Vec::new(), chunk_start: None, current: None, timeline: 0 }
    }

    /// Checks the first page of the segment in which the walk begins, as PostgreSQL does.
    fn check_segment_of(&mut self, at: u64) -> Result<(), Stop> {
        let start = at - at % self.identity.segment_size.bytes();
        let mut head = [0; SEGMENT_HEAD];
        self.fill(start, &mut head)?;
        self.timeline = self.check(start, &head)?.timeline;
        Ok(())
    }

    /// Returns the page at this position, and its header.
    fn at(&mut self, page: u64) -> Result<(PageHeader, &[u8]), Stop> {
        let page_size = self.identity.page_size as usize;
        let chunk_start = page - page % self.identity.segment_size.bytes() % CHUNK;
        if self.chunk_start != Some(chunk_start) {
            self.chunk_start = None;
            let mut chunk = std::mem::take(&mut self.chunk);
            chunk.resize(CHUNK as usize, 0);
            self.fill(chunk_start, &mut chunk)?;
            (self.chunk, self.chunk_start) = (chunk, Some(chunk_start));
        }
        let offset = usize::try_from(page - chunk_start).unwrap_or_default();
        let header = match self.current {
            Some((current, header)) if current == page => header,
            _ => {
                let header = self.check(page, &self.chunk[offset..])?;
                (self.current, self.timeline) = (Some((page, header)), header.timeline);
                header
            }
        };
        Ok((header, &self.chunk[offset..offset + page_size]))
    }

    fn check(&self, page: u64, bytes: &[u8]) -> Result<PageHeader, Stop> {
        let unusable = |why| Stop::End(EndReason::Page(Lsn(page), why));
        let header = PageHeader::read(bytes).ok_or_else(|| unusable("it is too short"))?;
        match header.objection(bytes, Lsn(page), self.timeline, self.identity) {
            Some(why) => Err(unusable(why)),
            None => Ok(header),
        }
    }

    fn fill(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let segment = Lsn(at - at % self.identity.segment_size.bytes());
        match (self.read)(Lsn(at), bytes) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Stop::End(EndReason::NoSegment(segment))),
            Err(source) => Err(Stop::Failed(WalkError::Read { at: Lsn(at), source })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::{BASE, PAGE, SEGMENT, Writer, identity, main_data};
    use super::*;
    use proptest::prelude::*;

    /// A resource manager whose records are not decoded, and another one.
    const HEAP: u8 = 10;
    const TABLESPACE: u8 = 5;

    fn walk_from(wal: &Writer, start: u64, end: Option<Lsn>) -> (Vec<Record>, WalkEnd) {
        let mut records = Vec::new();
        let mut read = wal.reader();
        let end = walk(&mut read, &identity(), Lsn(start), end, &mut |record| records.push(record));
        (records, end.unwrap())
    }

    fn locations(records: &[Record]) -> Vec<String> {
        let location = |record: &Record| match record {
            Record::TablespaceCreate { location, .. } => location.clone(),
            other => panic!("{other:?}"),
        };
        records.iter().map(|record| String::from_utf8(location(record)).unwrap()).collect()
    }

    /// Asserts that the walk shows exactly these locations and ends right behind what was written.
    fn all_walked(wal: &Writer, want: &[&str]) -> EndReason {
        let (records, end) = walk_from(wal, BASE, None);
        assert_eq!(locations(&records), want);
        assert_eq!((end.lsn, end.last), (Lsn(wal.at()), Some(Lsn(wal.last))), "{}", end.reason);
        end.reason
    }

    #[test]
    fn records_are_followed_over_pages_and_segments() {
        // bytes that the record before leaves on its page, segment or not
        for left in [8, 16, 24, 32, 40, 48, 0] {
            let mut wal = Writer::new();
            wal.leave(left);
            wal.create_tablespace(1, b"/srv/the/first/of/them");
            while wal.at() < BASE + SEGMENT - PAGE {
                wal.record(HEAP, 0x20, &[1; 1000]);
            }
            wal.leave(left);
            wal.create_tablespace(2, b"/srv/the/second/of/them");
            let reason = all_walked(&wal, &["/srv/the/first/of/them", "/srv/the/second/of/them"]);
            assert!(reason.to_string().contains("nothing was written"), "{left}: {reason}");
        }
    }

    #[test]
    fn long_records_are_followed_over_whole_segments() {
        let mut wal = Writer::new();
        wal.record(HEAP, 0, &vec![3; 3 * SEGMENT as usize]);
        wal.create_tablespace(1, b"/a");
        all_walked(&wal, &["/a"]);
        // a tablespace record as long as is decoded, over several pages
        let mut wal = Writer::new();
        let location = vec![b'x'; LONGEST_DECODED - RECORD_HEADER - 5 - 4 - 1];
        wal.create_tablespace(1, &location);
        all_walked(&wal, &[std::str::from_utf8(&location).unwrap()]);
    }

    #[test]
    fn the_walk_may_begin_anywhere_a_record_does() {
        let mut wal = Writer::new();
        wal.leave(0);
        let first = wal.create_tablespace(1, b"/first");
        wal.leave(24);
        let second = wal.create_tablespace(2, b"/second");
        let page = first.0 - first.0 % PAGE;
        for (start, want) in [
            (BASE, &["/first", "/second"][..]),
            (first.0, &["/first", "/second"]),
            (page, &["/first", "/second"]),
            (second.0, &["/second"]),
        ] {
            let (records, end) = walk_from(&wal, start, None);
            assert_eq!(locations(&records), want);
            assert_eq!(end.lsn, Lsn(wal.at()));
        }
        let within = walk_from(&wal, page + 8, None).1;
        assert_eq!(within.reason, EndReason::Record("it is within a page's header"));
        assert_eq!((within.lsn, within.last), (Lsn(page + 8), None));
        let continued = walk_from(&wal, second.0 - second.0 % PAGE + PAGE, None).1;
        assert_eq!(continued.reason, EndReason::Record("the page goes on with another record"));
        let mut read = wal.reader();
        let unaligned = walk(&mut read, &identity(), Lsn(BASE + 44), None, &mut |_| {});
        assert!(matches!(unaligned, Err(WalkError::Start(Lsn(at))) if at == BASE + 44));
    }

    #[test]
    fn the_rest_of_a_switched_segment_is_not_looked_at() {
        for left in [8, 24, 100 * 8] {
            let mut wal = Writer::new();
            wal.create_tablespace(1, b"/first");
            wal.leave(left);
            let switch = wal.switch();
            let second = wal.create_tablespace(2, b"/second");
            assert_eq!(second.0, BASE + SEGMENT + 40);
            // what is left of earlier use behind it is no matter
            let behind = (switch.0 - BASE + PAGE + 100) as usize;
            wal.bytes[behind..behind + 5000].fill(0xEE);
            all_walked(&wal, &["/first", "/second"]);
        }
        // a record that fills the segment, and a switch right at the next one's beginning
        let mut wal = Writer::new();
        wal.record(HEAP, 0, &vec![1; (SEGMENT - 40 - 24 - 127 * 24) as usize]);
        assert_eq!(wal.at(), BASE + SEGMENT);
        wal.switch();
        wal.create_tablespace(1, b"/a");
        all_walked(&wal, &["/a"]);
        // nothing comes after the switch
        let mut wal = Writer::new();
        wal.switch();
        let end = walk_from(&wal, BASE, None).1;
        let want = Lsn(BASE + SEGMENT);
        assert_eq!((end.lsn, end.reason), (want, EndReason::NoSegment(want)));
    }

    #[test]
    fn a_record_that_was_never_finished_ends_the_walk_or_is_overwritten() {
        for left in [8, 16, 24, 64] {
            let mut wal = Writer::new();
            wal.create_tablespace(1, b"/first");
            wal.leave(left);
            let (before, torn) = (wal.last, wal.at());
            wal.create_tablespace(7, &[b'x'; 9000]);
            let page = torn.next_multiple_of(PAGE);
            for lost in [page, page + PAGE] {
                let mut wal = wal.clone();
                wal.bytes.truncate((lost - BASE) as usize);
                let (records, end) = walk_from(&wal, BASE, None);
                assert_eq!(locations(&records), ["/first"]);
                assert_eq!((end.lsn, end.last), (Lsn(torn), Some(Lsn(before))));
                assert!(matches!(end.reason, EndReason::Page(Lsn(at), _) if at == lost));
                // a page that goes on with something else
                let mut other = wal.clone();
                other.page(0, 0);
                other.align(PAGE);
                let end = walk_from(&other, BASE, None).1;
                assert_eq!((end.lsn, end.reason), (Lsn(torn), EndReason::Unfinished(Lsn(lost))));
                let mut other = wal.clone();
                other.page(1, 9000 - 1);
                other.align(PAGE);
                let end = walk_from(&other, BASE, None).1;
                assert_eq!((end.lsn, end.reason), (Lsn(torn), EndReason::Unfinished(Lsn(lost))));
                // what PostgreSQL writes when it starts again: XLOG_OVERWRITE_CONTRECORD, on the lost page
                wal.last = before;
                wal.record_of_page(8, 0, 0xD0, &main_data(&torn.to_le_bytes()));
                wal.create_tablespace(2, b"/second");
                all_walked(&wal, &["/first", "/second"]);
            }
        }
    }

    #[test]
    fn the_first_invalid_record_is_the_end() {
        let mut wal = Writer::new();
        wal.create_tablespace(1, b"/first");
        let at = wal.create_tablespace(2, b"/second");
        wal.leave(24);
        wal.create_tablespace(3, b"/third");
        let page = (at.0 - BASE).next_multiple_of(PAGE) as usize;
        let record = (at.0 - BASE) as usize;
        type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
        let at_record =
            |offset: usize, value: u8| move |bytes: &mut Vec<u8>| bytes[record + offset] = value;
        let at_page =
            |offset: usize, value: u8| move |bytes: &mut Vec<u8>| bytes[page + offset] = value;
        let zeros = |bytes: &mut Vec<u8>| bytes[page..].fill(0);
        let cases: [(_, Change<'_>, _); 14] = [
            ("a flipped bit", &at_record(30, 0xFF), "checksum is wrong"),
            ("another checksum", &at_record(20, 0xFF), "checksum is wrong"),
            ("a length of nothing", &at_record(0, 0), "nothing was written"),
            ("a short length", &at_record(0, 23), "less than a header"),
            ("an endless length", &at_record(3, 0x40), "more than PostgreSQL reads"),
            ("a longer length", &at_record(2, 1), "has no rest"),
            ("another one before it", &at_record(8, 1), "does not follow"),
            ("no resource manager", &at_record(17, 22), "resource manager is unknown"),
            ("a page of another version", &at_page(0, 0x0D), "no WAL of this version"),
            ("a page that was never written", &zeros, "nothing was written to it"),
            ("a page with unknown flags", &at_page(3, 1), "unknown flags"),
            ("a page of another place", &at_page(9, 0), "not written again"),
            ("a page of an earlier timeline", &at_page(4, 0), "earlier timeline"),
            ("a page without a rest", &at_page(2, 0), "has no rest"),
        ];
        for (name, change, want) in cases {
            let mut damaged = wal.clone();
            change(&mut damaged.bytes);
            let (records, end) = walk_from(&damaged, BASE, None);
            let of_page = name.contains("page");
            assert_eq!(
                locations(&records),
                ["/first", "/second"][..1 + usize::from(of_page)],
                "{name}"
            );
            let text = end.reason.to_string();
            assert!(text.contains(want), "{name}: {text}");
            if !of_page {
                assert_eq!(end.lsn, at, "{name}");
            }
        }
        let garbage = |wal: &mut Writer| wal.bytes.extend((0..3000).map(|n| (n % 251) as u8 | 1));
        let mut noisy = wal.clone();
        garbage(&mut noisy);
        let end = walk_from(&noisy, BASE, None).1;
        assert_eq!((end.lsn, end.last), (Lsn(wal.at()), Some(Lsn(wal.last))), "{}", end.reason);
    }

    #[test]
    fn old_records_behind_the_end_do_not_count() {
        // the same WAL was written twice, the second time not as far: as after a crash and a new start
        let mut old = Writer::new();
        old.create_tablespace(1, b"/first");
        let mut wal = old.clone();
        let torn = wal.at();
        old.record(HEAP, 0, &[1; 8]);
        old.create_tablespace(2, b"/old");
        wal.record(HEAP, 0, &[2; 24]);
        let end = wal.bytes.len();
        old.bytes.splice(..end, wal.bytes[..end].iter().copied());
        assert_ne!(torn, wal.at());
        let (records, walked) = walk_from(&old, BASE, None);
        assert_eq!(locations(&records), ["/first"]);
        assert_eq!(walked.last, Some(Lsn(torn)));
    }

    #[test]
    fn timelines_may_rise_but_not_fall() {
        let mut wal = Writer::new();
        wal.create_tablespace(1, b"/first");
        wal.timeline = 3;
        wal.leave(24);
        wal.create_tablespace(2, b"/second");
        all_walked(&wal, &["/first", "/second"]);
        wal.timeline = 2;
        let before = wal.at();
        wal.leave(0);
        let fallen = wal.at();
        wal.create_tablespace(3, b"/third");
        let end = walk_from(&wal, BASE, None).1;
        assert!(before < fallen);
        let want =
            EndReason::Page(Lsn(fallen), "it is of an earlier timeline than the page before");
        assert_eq!((end.lsn, end.reason), (Lsn(fallen), want));
    }

    #[test]
    fn a_segment_is_judged_by_its_first_page_too() {
        let mut wal = Writer::new();
        wal.leave(0);
        let start = wal.create_tablespace(1, b"/a");
        for (offset, want) in
            [(24, "another cluster"), (34, "another size"), (2, "segment's header")]
        {
            let mut other = wal.clone();
            other.bytes[offset] = 0;
            let (records, end) = walk_from(&other, start.0, None);
            assert_eq!((records.len(), end.lsn, end.last), (0, start, None));
            assert!(end.reason.to_string().contains(want), "{}", end.reason);
        }
        let missing = walk_from(&wal, start.0 + SEGMENT, None).1;
        assert_eq!(missing.reason, EndReason::NoSegment(Lsn(BASE + SEGMENT)));
    }

    #[test]
    fn an_asked_end_includes_the_record_that_begins_there() {
        let mut wal = Writer::new();
        let lsns: Vec<Lsn> =
            (1..=4).map(|oid| wal.create_tablespace(oid, format!("/{oid}").as_bytes())).collect();
        let cases = [
            ("at a record", lsns[1], 2, EndReason::Asked),
            (
                "within a record: the next one is the first that is not before",
                Lsn(lsns[1].0 + 8),
                3,
                EndReason::Asked,
            ),
            ("before the start", Lsn(8), 1, EndReason::Asked),
        ];
        for (name, end, count, reason) in cases {
            let (records, walked) = walk_from(&wal, BASE, Some(end));
            assert_eq!((records.len(), walked.reason), (count, reason), "{name}");
            assert_eq!(walked.last, Some(lsns[count - 1]), "{name}");
            assert_eq!(walked.lsn, lsns[count], "{name}");
        }
        let beyond = walk_from(&wal, BASE, Some(Lsn(wal.at())));
        assert_eq!(beyond.0.len(), 4);
        assert_ne!(beyond.1.reason, EndReason::Asked);
    }

    #[test]
    fn records_that_postgresql_cannot_have_written_are_errors() {
        let fault = |wal: &Writer| {
            let error =
                walk(&mut wal.reader(), &identity(), Lsn(BASE), None, &mut |_| {}).unwrap_err();
            match error {
                WalkError::Record { lsn, source } => (lsn.0, source),
                other => panic!("{other}"),
            }
        };
        let mut wal = Writer::new();
        let lsn = wal.record(TABLESPACE, 0, &main_data(b"\x01\0\0\0/no/end"));
        assert_eq!(fault(&wal), (lsn.0, BadRecord::NoEnd));
        let mut wal = Writer::new();
        let lsn = wal.record(TABLESPACE, 0, &[40, 1, 2, 3]);
        assert_eq!(fault(&wal), (lsn.0, BadRecord::Layout));
        let mut wal = Writer::new();
        let lsn = wal.create_tablespace(1, &[b'x'; LONGEST_DECODED]);
        let length = (LONGEST_DECODED + RECORD_HEADER + 5 + 4 + 1) as u32;
        assert_eq!(fault(&wal), (lsn.0, BadRecord::Long(length)));
        // with a wrong checksum it is only the end
        wal.bytes[(lsn.0 - BASE) as usize + 20] ^= 1;
        assert_eq!(walk_from(&wal, BASE, None).1.lsn, Lsn(BASE));
        // other records may hold what they like
        let mut wal = Writer::new();
        wal.record(HEAP, 0, &[40, 1, 2, 3]);
        wal.create_tablespace(1, b"/a");
        all_walked(&wal, &["/a"]);
    }

    #[test]
    fn errors_of_reading_are_errors_not_ends() {
        let mut wal = Writer::new();
        wal.record(HEAP, 0, &vec![1; 300 << 10]);
        for fails_at in [0, 128 << 10, 256 << 10] {
            let mut inner = wal.reader();
            let mut read = |at: Lsn, buffer: &mut [u8]| match at.0 - BASE {
                offset if offset >= fails_at => Err(io::Error::other("the archive is gone")),
                _ => inner(at, buffer),
            };
            let error = walk(&mut read, &identity(), Lsn(BASE), None, &mut |_| {}).unwrap_err();
            assert!(
                matches!(&error, WalkError::Read { at, .. } if at.0 == BASE + fails_at),
                "{error}"
            );
            assert!(!error.hint().is_empty());
        }
    }

    #[test]
    fn a_segment_is_read_in_few_calls() {
        let mut wal = Writer::new();
        while wal.at() < BASE + 2 * SEGMENT {
            wal.record(HEAP, 0, &[1; 100]);
        }
        let mut calls = 0;
        let mut inner = wal.reader();
        let mut read = |at: Lsn, buffer: &mut [u8]| {
            calls += 1;
            inner(at, buffer)
        };
        walk(&mut read, &identity(), Lsn(BASE), None, &mut |_| {}).unwrap();
        assert_eq!(calls, 1 + 2 * SEGMENT / CHUNK + 1, "the first page, the chunks, the end");
    }

    /// Some of everything, over two segments.
    fn mixed() -> Writer {
        let mut wal = Writer::new();
        wal.create_tablespace(1, b"/first");
        wal.record(HEAP, 0, &vec![1; 40_000]);
        wal.record(4, 0x20, &main_data(&[5, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]));
        wal.leave(16);
        wal.create_tablespace(2, b"/second");
        wal.switch();
        wal.record(4, 0x10, &main_data(&[5, 0, 0, 0, 1, 0, 0, 0]));
        wal.record(TABLESPACE, 0x10, &main_data(&[2, 0, 0, 0]));
        wal.record(HEAP, 0, &[1; 20_000]);
        wal
    }

    /// Walks whatever it is, and asserts that it ends after few reads and that records come in order.
    fn ends(wal: &Writer, start: u64) -> Result<(), TestCaseError> {
        let mut calls = 0;
        let mut inner = wal.reader();
        let mut read = |at: Lsn, buffer: &mut [u8]| {
            calls += 1;
            inner(at, buffer)
        };
        let mut last = Lsn(0);
        let mut in_order = true;
        let end = walk(&mut read, &identity(), Lsn(start), None, &mut |record| {
            in_order &= last < record.lsn();
            last = record.lsn();
        });
        prop_assert!(in_order);
        prop_assert!(
            calls <= 2 + wal.bytes.len() as u64 / CHUNK + SEGMENT / CHUNK,
            "{calls} calls"
        );
        if let Ok(end) = end {
            prop_assert!(end.last.is_none_or(|last| last < end.lsn));
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn changed_wal_never_panics_and_always_ends(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            near in proptest::collection::vec((0_usize..9000, any::<u8>()), 0..4),
            from in 0_u64..80_000,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut wal = mixed();
            for (index, value) in changes {
                let length = wal.bytes.len();
                wal.bytes[index.index(length)] = value;
            }
            for (index, value) in near {
                wal.bytes[index] = value;
            }
            wal.bytes.truncate(cut.index(wal.bytes.len() * 2) + 1);
            ends(&wal, BASE)?;
            ends(&wal, BASE + from * 8)?;
        }

        #[test]
        fn records_with_right_checksums_never_panic(
            records in proptest::collection::vec(
                (prop_oneof![Just(0_u8), 4_u8..=5, any::<u8>()], any::<u8>(), proptest::collection::vec(any::<u8>(), 0..300), 0_u16..16),
                1..80,
            ),
        ) {
            let mut wal = Writer::new();
            for (manager, info, body, flags) in records {
                wal.record_of_page(flags, manager, info, &body);
            }
            ends(&wal, BASE)?;
        }

        #[test]
        fn no_position_overflows(start: u64, near in 0_u64..40_000, noise in proptest::collection::vec(any::<u8>(), 64)) {
            for start in [start & !7, (u64::MAX - near) & !7] {
                let mut read = |at: Lsn, buffer: &mut [u8]| {
                    for page in buffer.chunks_mut(PAGE as usize) {
                        let length = page.len().min(noise.len());
                        page[..length].copy_from_slice(&noise[..length]);
                    }
                    // pages that look right
                    for (index, page) in buffer.chunks_mut(PAGE as usize).enumerate() {
                        let address = at.0 + index as u64 * PAGE;
                        page[..2].copy_from_slice(&identity().major.wal_magic().to_le_bytes());
                        let long = address.is_multiple_of(SEGMENT);
                        page[2..4].copy_from_slice(&[u8::from(long) * 2, 0]);
                        page[8..16].copy_from_slice(&address.to_le_bytes());
                        page[4..8].fill(1);
                        if long {
                            page[24..32].copy_from_slice(&77_u64.to_le_bytes());
                            page[32..36].copy_from_slice(&(SEGMENT as u32).to_le_bytes());
                            page[36..40].copy_from_slice(&(PAGE as u32).to_le_bytes());
                        }
                    }
                    Ok(true)
                };
                let _ = walk(&mut read, &identity(), Lsn(start), None, &mut |_| {});
            }
        }
    }
}
