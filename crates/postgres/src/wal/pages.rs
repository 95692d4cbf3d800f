//! WAL pages: whether a segment is what its name says, and how far its pages go.
//!
//! With [`check_segment_head`] a segment that is not what its name says is found before the start, and with
//! [`record_end`] and [`later_valid_page`] WAL behind the place where replay ended is found after it.
//! Records are not decoded here; see [`super::walk()`].
//!
//! Sources: PostgreSQL's `xlog_internal.h` (`XLogPageHeaderData`, `XLogLongPageHeaderData`), `xlogrecord.h`,
//! `xlogreader.c` (`XLogReaderValidatePageHeader`).

use std::io;

use super::{ReadWal, WalIdentity};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::lsn::{Lsn, Segment};
use crate::version::Major;

const SHORT_HEADER: u64 = 24;
const LONG_HEADER: u64 = 40;

/// How many bytes of a segment [`check_segment_head`] needs.
pub const SEGMENT_HEAD: usize = LONG_HEADER as usize;

fn header_size(page: u64, identity: &WalIdentity) -> u64 {
    if page.is_multiple_of(identity.segment_size.bytes()) { LONG_HEADER } else { SHORT_HEADER }
}

/// Why a segment is not the WAL its name promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// The file's name is no segment's.
    #[error("{0:?} is no name of a WAL segment of this cluster")]
    Name(String),
    /// The file is shorter than a page header.
    #[error("WAL segment {name} has {have} bytes only")]
    Short {
        /// The segment.
        name: String,
        /// How many bytes there were.
        have: usize,
    },
    /// Allocated, never written.
    #[error("WAL segment {0} begins with zeros: nothing was ever written to it")]
    Empty(String),
    /// Not WAL, or of another version.
    #[error("WAL segment {name} begins with {found:04X}, PostgreSQL {major} writes {wanted:04X}{}", other(*.found))]
    Magic {
        /// The segment.
        name: String,
        /// Its first two bytes.
        found: u16,
        /// What they should be.
        wanted: u16,
        /// The cluster's version.
        major: Major,
    },
    /// A first page without the long header.
    #[error("WAL segment {name} does not begin with a segment's header (flags {flags:04X})")]
    Flags {
        /// The segment.
        name: String,
        /// The page's flags.
        flags: u16,
    },
    /// WAL of another cluster.
    #[error("WAL segment {name} belongs to cluster {found}, the backup is of cluster {wanted}")]
    OtherCluster {
        /// The segment.
        name: String,
        /// The identifier in the segment.
        found: u64,
        /// The cluster's identifier.
        wanted: u64,
    },
    /// Segments or pages of another size.
    #[error("WAL segment {name} says {what} of {found} bytes, the cluster's have {wanted}")]
    Size {
        /// The segment.
        name: String,
        /// Segments or pages.
        what: &'static str,
        /// The size in the segment.
        found: u32,
        /// The cluster's size.
        wanted: u32,
    },
    /// Another segment's content: renamed for later use, or stored under a wrong name.
    #[error(
        "WAL segment {name} holds the WAL of {found} instead of {wanted}: it was recycled and never written again, or has a wrong name"
    )]
    Address {
        /// The segment.
        name: String,
        /// The position in the segment.
        found: Lsn,
        /// The position its name promises.
        wanted: Lsn,
    },
    /// A page of a timeline that cannot be in this segment.
    #[error("WAL segment {name} holds timeline {found}")]
    Timeline {
        /// The segment.
        name: String,
        /// The page's timeline.
        found: u32,
    },
}

fn other(magic: u16) -> String {
    Major::all()
        .find(|major| major.wal_magic() == magic)
        .map_or_else(String::new, |major| format!(" (it is WAL of PostgreSQL {major})"))
}

impl WalError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Name(_) | Self::OtherCluster { .. } | Self::Size { .. } | Self::Magic { .. } => {
                "check that the WAL archive is the one of this cluster (--wal-archive)"
            }
            Self::Short { .. } | Self::Flags { .. } => {
                "the segment is damaged; look for another copy of it, or end recovery before it"
            }
            Self::Empty(_) | Self::Address { .. } | Self::Timeline { .. } => {
                "the archive holds a segment that was not finished; look for another copy of it, or end recovery before it"
            }
        }
    }
}

/// Checks the first page of the segment called `name`, given its first [`SEGMENT_HEAD`] bytes or more.
///
/// # Errors
/// [`WalError`] if it is not the WAL its name promises.
pub fn check_segment_head(
    bytes: &[u8],
    name: &str,
    identity: &WalIdentity,
) -> Result<(), WalError> {
    let named = || name.to_string();
    let segment =
        Segment::parse(name, identity.segment_size).ok_or_else(|| WalError::Name(named()))?;
    let wanted = segment.start(identity.segment_size).ok_or_else(|| WalError::Name(named()))?;
    let short = || WalError::Short { name: named(), have: bytes.len() };
    let head = bytes.get(..SEGMENT_HEAD).ok_or_else(short)?;
    if head.iter().all(|byte| *byte == 0) {
        return Err(WalError::Empty(named()));
    }
    let page = PageHeader::read(head).ok_or_else(short)?;
    let (system, segment_size, page_size) =
        match (u64_at(head, 24), u32_at(head, 32), u32_at(head, 36)) {
            (Some(system), Some(segment_size), Some(page_size)) => {
                (system, segment_size, page_size)
            }
            _ => return Err(short()),
        };
    let wanted_segment_size = u32::from(identity.segment_size);
    let size = |what, found, wanted| Err(WalError::Size { name: named(), what, found, wanted });
    match () {
        () if page.magic != identity.major.wal_magic() => Err(WalError::Magic {
            name: named(),
            found: page.magic,
            wanted: identity.major.wal_magic(),
            major: identity.major,
        }),
        () if page.flags & PageHeader::LONG == 0 || !page.plausible_flags() => {
            Err(WalError::Flags { name: named(), flags: page.flags })
        }
        () if system != identity.system_identifier => Err(WalError::OtherCluster {
            name: named(),
            found: system,
            wanted: identity.system_identifier,
        }),
        () if segment_size != wanted_segment_size => {
            size("segments", segment_size, wanted_segment_size)
        }
        () if page_size != identity.page_size => size("pages", page_size, identity.page_size),
        () if page.address != wanted => {
            Err(WalError::Address { name: named(), found: page.address, wanted })
        }
        () if page.timeline == 0 || page.timeline > segment.timeline => {
            Err(WalError::Timeline { name: named(), found: page.timeline })
        }
        () => Ok(()),
    }
}

/// The header of every WAL page.
#[derive(Clone, Copy)]
pub(super) struct PageHeader {
    magic: u16,
    flags: u16,
    pub(super) timeline: u32,
    address: Lsn,
    /// How many bytes of a record that began before are still to come, on this page and after it.
    pub(super) remaining: u32,
}

impl PageHeader {
    /// `XLP_FIRST_IS_CONTRECORD`: the page begins within a record.
    const CONTRECORD: u16 = 0x0001;
    /// `XLP_LONG_HEADER`
    const LONG: u16 = 0x0002;
    /// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: the record before was given up, and a new one begins here.
    const OVERWRITE_CONTRECORD: u16 = 0x0008;

    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            magic: u16_at(bytes, 0)?,
            flags: u16_at(bytes, 2)?,
            timeline: u32_at(bytes, 4)?,
            address: Lsn(u64_at(bytes, 8)?),
            remaining: u32_at(bytes, 16)?,
        })
    }

    /// Returns how many bytes of the page it takes.
    pub(super) fn size(&self) -> usize {
        let size = if self.flags & Self::LONG != 0 { LONG_HEADER } else { SHORT_HEADER };
        size as usize
    }

    /// Returns whether the page begins with the rest of a record.
    pub(super) fn continues_a_record(&self) -> bool {
        self.flags & Self::CONTRECORD != 0
    }

    /// Returns whether the page begins with a record that replaces the rest of the one before.
    pub(super) fn overwrites_a_record(&self) -> bool {
        self.flags & Self::OVERWRITE_CONTRECORD != 0
    }

    /// Returns why PostgreSQL would not read on at the page `bytes`, which should be the one at `address`.
    ///
    /// `timeline` is that of the page before; timelines never go back. This is
    /// `XLogReaderValidatePageHeader`, no stricter and no laxer: unlike [`Self::is_at`] it accepts a long
    /// header on any page.
    pub(super) fn objection(
        &self,
        bytes: &[u8],
        address: Lsn,
        timeline: u32,
        identity: &WalIdentity,
    ) -> Option<&'static str> {
        let long = self.flags & Self::LONG != 0;
        let of_cluster = u64_at(bytes, 24) == Some(identity.system_identifier);
        let sizes = (u32_at(bytes, 32), u32_at(bytes, 36));
        match () {
            () if self.magic == 0 => Some("nothing was written to it"),
            () if self.magic != identity.major.wal_magic() => {
                Some("it holds no WAL of this version")
            }
            () if !self.plausible_flags() => Some("its header has unknown flags"),
            () if long && identity.system_identifier != 0 && !of_cluster => {
                Some("it belongs to another cluster")
            }
            () if long
                && sizes != (Some(u32::from(identity.segment_size)), Some(identity.page_size)) =>
            {
                Some("its segments or pages have another size")
            }
            () if !long && address.0.is_multiple_of(identity.segment_size.bytes()) => {
                Some("it does not begin with a segment's header")
            }
            () if self.address != address => Some("it holds other WAL: it was not written again"),
            () if self.timeline < timeline => {
                Some("it is of an earlier timeline than the page before")
            }
            () => None,
        }
    }

    /// Returns whether only known flags are set (`XLP_ALL_FLAGS`).
    fn plausible_flags(&self) -> bool {
        self.flags & !0x000F == 0
    }

    /// Returns whether this is the page of `identity`'s WAL at `address`, of `timeline` or one before it.
    fn is_at(&self, address: Lsn, timeline: u32, identity: &WalIdentity) -> bool {
        let first = address.0.is_multiple_of(identity.segment_size.bytes());
        self.magic == identity.major.wal_magic()
            && self.plausible_flags()
            && (self.flags & Self::LONG != 0) == first
            && self.address == address
            && (1..=timeline).contains(&self.timeline)
    }
}

/// Returns the first page from `after` on, and before `until`, that is valid WAL of exactly this timeline.
///
/// `after` is the end of the last record replayed ([`record_end`]), `until` the end of the last segment that
/// is there. A page found says that replay ended before the WAL did: something between is missing or
/// damaged. After a crash it may also be a page that the operating system wrote before an earlier one; it
/// then lies within the last 16 MiB, and nothing in it was ever reported as committed with
/// `synchronous_commit=on`. Segments that are not there are skipped.
///
/// # Errors
/// If the WAL cannot be read.
pub fn later_valid_page(
    read: ReadWal<'_>,
    identity: &WalIdentity,
    timeline: u32,
    after: Lsn,
    until: Lsn,
) -> io::Result<Option<Lsn>> {
    let mut found = None;
    scan(read, identity, after, until, &mut |address, page| {
        let later = page.is_some_and(|page| {
            page.timeline == timeline && page.is_at(address, timeline, identity)
        });
        found = later.then_some(address);
        !later
    })?;
    Ok(found)
}

/// Returns where the unbroken run of valid pages that begins at `from` ends, at most `until`.
///
/// Pages of earlier timelines count: a timeline's first segment begins with a copy of its parent's. If the
/// page at `from` is not valid the answer is `from`, rounded up to a page.
///
/// # Errors
/// If the WAL cannot be read.
pub fn valid_pages_end(
    read: ReadWal<'_>,
    identity: &WalIdentity,
    timeline: u32,
    from: Lsn,
    until: Lsn,
) -> io::Result<Lsn> {
    let page_size = u64::from(identity.page_size);
    let mut end = Lsn(from.0.checked_next_multiple_of(page_size).unwrap_or(from.0));
    scan(read, identity, from, until, &mut |address, page| {
        let valid = page.is_some_and(|page| page.is_at(address, timeline, identity));
        if valid {
            end = Lsn(address.0.saturating_add(page_size));
        }
        valid
    })?;
    Ok(end)
}

/// Shows every page's header from `from` on, rounded up to a page, until `visit` says false; `None` for pages of missing segments.
fn scan(
    read: ReadWal<'_>,
    identity: &WalIdentity,
    from: Lsn,
    until: Lsn,
    visit: &mut dyn FnMut(Lsn, Option<PageHeader>) -> bool,
) -> io::Result<()> {
    const CHUNK: u64 = 256 << 10;
    let page_size = u64::from(identity.page_size);
    let segment_size = identity.segment_size.bytes();
    let mut buffer = Vec::new();
    let Some(mut at) = from.0.checked_next_multiple_of(page_size) else { return Ok(()) };
    while at < until.0 {
        let rest_of_segment = segment_size - at % segment_size;
        let length = CHUNK.min(rest_of_segment);
        buffer.resize(usize::try_from(length).unwrap_or_default(), 0);
        let present = read(Lsn(at), &mut buffer)?;
        for (page, bytes) in (at..)
            .step_by(identity.page_size as usize)
            .zip(buffer.chunks(identity.page_size as usize))
        {
            let header = present.then(|| PageHeader::read(bytes)).flatten();
            if page >= until.0 || !visit(Lsn(page), header) {
                return Ok(());
            }
        }
        let Some(next) = at.checked_add(length) else { return Ok(()) };
        at = next;
    }
    Ok(())
}

/// Returns the position right after the record that begins at `start`, as PostgreSQL counts it (aligned to 8).
///
/// The server's log names the *beginning* of the last record it replayed ("redo done at"). `None` if no
/// record can begin there.
///
/// # Errors
/// If the WAL cannot be read.
pub fn record_end(
    read: ReadWal<'_>,
    identity: &WalIdentity,
    start: Lsn,
) -> io::Result<Option<Lsn>> {
    const RECORD_HEADER: u64 = 24;
    let page_size = u64::from(identity.page_size);
    let page = start.0 - start.0 % page_size;
    if !start.0.is_multiple_of(8) || start.0 - page < header_size(page, identity) {
        return Ok(None);
    }
    let mut length = [0; 4];
    if !read(start, &mut length)? {
        return Ok(None);
    }
    let mut left = u64::from(u32::from_le_bytes(length));
    if left < RECORD_HEADER {
        return Ok(None);
    }
    let mut at = start.0;
    loop {
        let room = page_size - at % page_size;
        if left <= room {
            return Ok((at + left).checked_next_multiple_of(8).map(Lsn));
        }
        left -= room;
        let Some(next) = at.checked_add(room) else { return Ok(None) };
        let Some(next) = next.checked_add(header_size(next, identity)) else { return Ok(None) };
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lsn::SegmentSize;
    use proptest::prelude::*;

    fn identity() -> WalIdentity {
        let major = Major::try_from(15).unwrap();
        WalIdentity {
            major,
            system_identifier: 77,
            segment_size: SegmentSize::try_from(1 << 20).unwrap(),
            page_size: 8192,
        }
    }

    fn header(address: u64, timeline: u32) -> Vec<u8> {
        let long = address.is_multiple_of(1 << 20);
        let mut bytes = Vec::new();
        bytes.extend(0xD110_u16.to_le_bytes());
        bytes.extend(u16::from(long).wrapping_mul(2).to_le_bytes());
        bytes.extend(timeline.to_le_bytes());
        bytes.extend(address.to_le_bytes());
        bytes.extend([0; 8]);
        if long {
            bytes.extend(77_u64.to_le_bytes());
            bytes.extend((1_u32 << 20).to_le_bytes());
            bytes.extend(8192_u32.to_le_bytes());
        }
        bytes
    }

    /// WAL with these pages (address, timeline); its segments 1 and 3 exist, 2 is missing.
    fn read_pages(pages: &[(u64, u32)]) -> impl FnMut(Lsn, &mut [u8]) -> io::Result<bool> {
        move |at, buffer| {
            buffer.fill(0);
            for (address, timeline) in pages {
                let bytes = header(*address, *timeline);
                let Some(offset) = address.checked_sub(at.0).map(|offset| offset as usize) else {
                    continue;
                };
                if offset < buffer.len() {
                    let end = buffer.len().min(offset + bytes.len());
                    buffer[offset..end].copy_from_slice(&bytes[..end - offset]);
                }
            }
            Ok(at.0 >> 20 != 2)
        }
    }

    #[test]
    fn checks_a_segments_head() {
        const NAME: &str = "000000020000000000000003";
        let good = header(3 << 20, 2);
        let change = |offset: usize, bytes: &[u8]| {
            let mut head = good.clone();
            head[offset..offset + bytes.len()].copy_from_slice(bytes);
            head
        };
        let cases = [
            ("good", good.clone(), NAME, None),
            ("of an earlier timeline", change(4, &[1]), NAME, None),
            (
                "no name",
                good.clone(),
                "000000020000000000000003.partial",
                Some("no name of a WAL segment"),
            ),
            ("short", good[..39].to_vec(), NAME, Some("has 39 bytes only")),
            ("never written", vec![0; 40], NAME, Some("begins with zeros")),
            ("another major", change(0, &[0x16]), NAME, Some("it is WAL of PostgreSQL 17")),
            (
                "no WAL",
                change(0, &[1, 2]),
                NAME,
                Some("begins with 0201, PostgreSQL 15 writes D110"),
            ),
            (
                "a page from the middle",
                change(2, &[0]),
                NAME,
                Some("does not begin with a segment's header"),
            ),
            ("unknown flags", change(2, &[0x12]), NAME, Some("flags 0012")),
            (
                "another cluster",
                change(24, &[78]),
                NAME,
                Some("belongs to cluster 78, the backup is of cluster 77"),
            ),
            ("other segments", change(34, &[0, 1]), NAME, Some("says segments of 16777216 bytes")),
            ("other pages", change(37, &[0x40]), NAME, Some("says pages of 16384 bytes")),
            (
                "recycled",
                header(1 << 20, 2),
                NAME,
                Some("holds the WAL of 0/100000 instead of 0/300000"),
            ),
            ("a later timeline", change(4, &[3]), NAME, Some("holds timeline 3")),
            ("no timeline", change(4, &[0]), NAME, Some("holds timeline 0")),
        ];
        for (case, bytes, name, want) in cases {
            let error = check_segment_head(&bytes, name, &identity()).err();
            let text = error.as_ref().map(ToString::to_string);
            match (text, want) {
                (None, None) => {}
                (Some(text), Some(want)) if text.contains(want) => {
                    assert!(!error.unwrap().hint().is_empty())
                }
                (text, want) => panic!("{case}: {text:?} instead of {want:?}"),
            }
        }
    }

    #[test]
    fn finds_wal_behind_the_end() {
        const START: u64 = 1 << 20;
        let run = [(START, 2), (START + 8192, 2), (START + 16384, 2)];
        let with = |more: (u64, u32)| run.into_iter().chain([more]).collect::<Vec<_>>();
        let far = (3 << 20) + 8192;
        let cases = [
            ("nothing behind", run.to_vec(), None),
            ("behind a gap", with((START + 40960, 2)), Some(START + 40960)),
            ("in a later segment, one missing between", with((far, 2)), Some(far)),
            ("of another timeline", with((START + 40960, 1)), None),
            ("beyond what is there", with((9 << 20, 2)), None),
        ];
        for (name, pages, want) in cases {
            let found = later_valid_page(
                &mut read_pages(&pages),
                &identity(),
                2,
                Lsn(START + 16500),
                Lsn(4 << 20),
            )
            .unwrap();
            assert_eq!(found, want.map(Lsn), "{name}");
            let end =
                valid_pages_end(&mut read_pages(&pages), &identity(), 2, Lsn(START), Lsn(4 << 20))
                    .unwrap();
            assert_eq!(end, Lsn(START + 24576), "{name}");
        }
        let on_boundary = later_valid_page(
            &mut read_pages(&run),
            &identity(),
            2,
            Lsn(START + 16384),
            Lsn(4 << 20),
        )
        .unwrap();
        assert_eq!(on_boundary, Some(Lsn(START + 16384)), "the page that begins at the end itself");
        let nothing = valid_pages_end(
            &mut read_pages(&run),
            &identity(),
            2,
            Lsn(START + 90_000),
            Lsn(4 << 20),
        )
        .unwrap();
        assert_eq!(nothing, Lsn(START + 90_112), "no page is valid");
    }

    #[test]
    fn finds_a_records_end_over_pages() {
        const START: u64 = 1 << 20;
        let end = |start: u64, length: u32| {
            let mut read = |_: Lsn, buffer: &mut [u8]| {
                buffer.copy_from_slice(&length.to_le_bytes());
                Ok(true)
            };
            record_end(&mut read, &identity(), Lsn(start)).unwrap().map(|lsn| lsn.0)
        };
        let cases = [
            ("within its page, aligned", START + 40, 50, Some(START + 96)),
            ("to the page's end", START + 40, 8152, Some(START + 8192)),
            ("one byte over", START + 40, 8153, Some(START + 8192 + 24 + 8)),
            ("over two pages", START + 40, 8152 + 8168 + 8, Some(START + 16384 + 24 + 8)),
            ("into the next segment", 2 * START - 8, 48, Some(2 * START + 40 + 40)),
            ("in a page's header", START + 32, 50, None),
            ("not aligned", START + 44, 50, None),
            ("no record", START + 40, 0, None),
        ];
        for (name, start, length, want) in cases {
            assert_eq!(end(start, length), want, "{name}");
        }
        assert_eq!(
            record_end(&mut |_, _| Ok(false), &identity(), Lsn(START + 40)).unwrap(),
            None,
            "no such segment"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(noise in proptest::collection::vec(any::<u8>(), 0..60), start: u64, length: u32) {
            let _ = check_segment_head(&noise, "000000020000000000000003", &identity());
            let mut read = |_: Lsn, buffer: &mut [u8]| {
                for (index, byte) in buffer.iter_mut().enumerate() {
                    *byte = noise.get(index).copied().unwrap_or(length.to_le_bytes()[index % 4]);
                }
                Ok(true)
            };
            let start = Lsn(start & !7);
            // a record of 16 MiB walks over enough pages
            let mut short = |at: Lsn, buffer: &mut [u8]| read(at, buffer).inspect(|_| if buffer.len() == 4 { buffer[3] = 0 });
            let _ = record_end(&mut short, &identity(), start);
            let until = Lsn(start.0.saturating_add(400 << 10));
            let _ = later_valid_page(&mut read, &identity(), 1, start, until);
            let _ = valid_pages_end(&mut read, &identity(), 1, start, until);
        }
    }
}
