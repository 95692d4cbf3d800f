//! What is inside a WAL record: its header, its main data, and the records that concern tablespaces.
//!
//! A record is decoded after its checksum was found right; which of two records is damaged is not a question
//! any more. A tablespace or database record that cannot be decoded is an error ([`BadRecord`]): PostgreSQL
//! would give up at it, or read a location from memory that is not the record's.
//!
//! Sources: PostgreSQL's `xlogrecord.h`, `xlogreader.c` (`DecodeXLogRecord`), `rmgrlist.h`, `tablespace.h`,
//! `dbcommands_xlog.h`.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::lsn::Lsn;
use crate::version::Major;

/// How long a record's header is (`SizeOfXLogRecord`).
pub(super) const RECORD_HEADER: usize = 24;

/// The longest tablespace or database record that is decoded; PostgreSQL's own have at most some hundred bytes.
pub(super) const LONGEST_DECODED: usize = 64 << 10;

/// A record of a resource manager whose records are decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// `CREATE TABLESPACE`: replay makes a directory at `location` and links to it.
    TablespaceCreate {
        /// Where the record begins.
        lsn: Lsn,
        /// The tablespace.
        oid: u32,
        /// The path as the original server knew it, without NUL. Empty: in place, a directory in `pg_tblspc`.
        location: Vec<u8>,
    },
    /// `DROP TABLESPACE`: replay removes the link.
    TablespaceDrop {
        /// Where the record begins.
        lsn: Lsn,
        /// The tablespace.
        oid: u32,
    },
    /// A database's directory is made in a tablespace: by `CREATE DATABASE`, or by
    /// `ALTER DATABASE … SET TABLESPACE` in the new one.
    DatabaseCreate {
        /// Where the record begins.
        lsn: Lsn,
        /// The database.
        database: u32,
        /// The tablespace.
        tablespace: u32,
    },
    /// A database's directories are removed: by `DROP DATABASE`, or by `ALTER DATABASE … SET TABLESPACE` in
    /// the old tablespace.
    DatabaseDrop {
        /// Where the record begins.
        lsn: Lsn,
        /// The database.
        database: u32,
        /// The tablespaces in which it loses its directory.
        tablespaces: Vec<u32>,
    },
}

impl Record {
    /// Returns where the record begins.
    pub fn lsn(&self) -> Lsn {
        match self {
            Self::TablespaceCreate { lsn, .. }
            | Self::TablespaceDrop { lsn, .. }
            | Self::DatabaseCreate { lsn, .. }
            | Self::DatabaseDrop { lsn, .. } => *lsn,
        }
    }

    /// Decodes the record that begins at `lsn`, given its header and all bytes after it.
    pub(super) fn decode(
        lsn: Lsn,
        header: &RecordHeader,
        body: &[u8],
        major: Major,
    ) -> Result<Self, BadRecord> {
        let data = main_data(body, major).ok_or(BadRecord::Layout)?;
        let oid = |offset| u32_at(data, offset).ok_or(BadRecord::Short);
        let old = major.number() < 15;
        match (header.manager, header.kind()) {
            (manager::TABLESPACE, 0x00) => {
                let text = data.get(4..).ok_or(BadRecord::Short)?;
                let length = text.iter().position(|byte| *byte == 0);
                let location = text[..length.ok_or(BadRecord::NoEnd)?].to_vec();
                Ok(Self::TablespaceCreate { lsn, oid: oid(0)?, location })
            }
            (manager::TABLESPACE, 0x10) => Ok(Self::TablespaceDrop { lsn, oid: oid(0)? }),
            // 15 and later have two ways to create a database, with the same two numbers in front
            (manager::DATABASE, 0x00) => {
                Ok(Self::DatabaseCreate { lsn, database: oid(0)?, tablespace: oid(4)? })
            }
            (manager::DATABASE, 0x10) if !old => {
                Ok(Self::DatabaseCreate { lsn, database: oid(0)?, tablespace: oid(4)? })
            }
            // 12 writes a record per tablespace
            (manager::DATABASE, 0x10) if major.number() < 13 => {
                Ok(Self::DatabaseDrop { lsn, database: oid(0)?, tablespaces: vec![oid(4)?] })
            }
            (manager::DATABASE, kind) if kind == if old { 0x10 } else { 0x20 } => {
                let list = data.get(8..).ok_or(BadRecord::Short)?;
                let (numbers, _) = list.as_chunks::<4>();
                let count = usize::try_from(oid(4)?).map_err(|_| BadRecord::Short)?;
                let numbers = numbers.get(..count).ok_or(BadRecord::Short)?;
                let tablespaces = numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
                Ok(Self::DatabaseDrop { lsn, database: oid(0)?, tablespaces })
            }
            (_, kind) => Err(BadRecord::Kind(kind)),
        }
    }
}

/// Why a record with a right checksum cannot be what PostgreSQL writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// Its parts do not add up to its length.
    #[error("its parts do not add up to its length")]
    Layout,
    /// Its data is shorter than its kind's.
    #[error("its data is too short")]
    Short,
    /// A location without the NUL byte that ends it.
    #[error("its location has no end")]
    NoEnd,
    /// A kind that this version does not have.
    #[error("its kind {0:02X} does not exist in this version")]
    Kind(u8),
    /// Longer than any that PostgreSQL writes.
    #[error("its {0} bytes are more than PostgreSQL writes")]
    Long(u32),
}

/// Numbers of resource managers (`rmgrlist.h`).
mod manager {
    pub(super) const XLOG: u8 = 0;
    pub(super) const DATABASE: u8 = 4;
    pub(super) const TABLESPACE: u8 = 5;
    /// The last one of PostgreSQL's own, 12 to 18 (`RM_LOGICALMSG_ID`).
    pub(super) const LAST: u8 = 21;
    /// The first one that an extension may register, from 15 on (`RM_MIN_CUSTOM_ID`).
    pub(super) const FIRST_CUSTOM: u8 = 128;
}

/// The fixed part in front of every record (`XLogRecord`).
#[derive(Clone, Copy)]
pub(super) struct RecordHeader {
    previous: Lsn,
    info: u8,
    manager: u8,
    pub(super) checksum: u32,
}

impl RecordHeader {
    /// The header's part that the checksum covers, after the record's other bytes.
    pub(super) const CHECKED: usize = 20;

    pub(super) fn read(bytes: &[u8; RECORD_HEADER]) -> Option<Self> {
        Some(Self {
            previous: Lsn(u64_at(bytes, 8)?),
            info: bytes[16],
            manager: bytes[17],
            checksum: u32_at(bytes, 20)?,
        })
    }

    /// Returns why PostgreSQL would not read the record that begins at `start` (`ValidXLogRecordHeader`).
    ///
    /// `previous` is the record before it; `None` if it is the first one that is read.
    pub(super) fn objection(
        &self,
        start: Lsn,
        previous: Option<Lsn>,
        major: Major,
    ) -> Option<&'static str> {
        let custom = major.number() >= 15 && self.manager >= manager::FIRST_CUSTOM;
        let linked = match previous {
            Some(previous) => self.previous == previous,
            None => self.previous < start,
        };
        match () {
            () if self.manager > manager::LAST && !custom => {
                Some("its resource manager is unknown")
            }
            () if !linked => Some("it does not follow the record before it"),
            () => None,
        }
    }

    /// Returns whether [`Record::decode`] knows records of its kind.
    pub(super) fn is_decoded(&self) -> bool {
        matches!(self.manager, manager::DATABASE | manager::TABLESPACE)
    }

    /// Returns whether the rest of its segment is unused (`XLOG_SWITCH`).
    pub(super) fn switches_segments(&self) -> bool {
        self.manager == manager::XLOG && self.kind() == 0x40
    }

    /// Returns the bits of `xl_info` that belong to the resource manager.
    fn kind(&self) -> u8 {
        self.info & 0xF0
    }
}

/// Returns the record's main data, given all bytes after its header.
///
/// In front are the headers of the parts, then the parts in the same order; main data is the last one.
/// `None` if the parts do not add up to the record.
fn main_data(body: &[u8], major: Major) -> Option<&[u8]> {
    const DATA_SHORT: u8 = 255;
    const DATA_LONG: u8 = 254;
    const ORIGIN: u8 = 253;
    const TOPLEVEL_XID: u8 = 252;
    const LAST_BLOCK: u8 = 32;

    let mut headers = Fields { bytes: body, at: 0 };
    let mut parts = 0_usize;
    let mut main = 0;
    while body.len().checked_sub(headers.at)? > parts {
        match headers.u8()? {
            // by convention main data is the last part
            DATA_SHORT => {
                main = usize::from(headers.u8()?);
                break;
            }
            DATA_LONG => {
                main = usize::try_from(headers.u32()?).ok()?;
                break;
            }
            ORIGIN => headers.skip(2)?,
            TOPLEVEL_XID => headers.skip(4)?,
            0..=LAST_BLOCK => parts = parts.checked_add(headers.block(major)?)?,
            _ => return None,
        }
    }
    let whole = headers.at.checked_add(parts)?.checked_add(main)?;
    (whole == body.len()).then(|| &body[body.len() - main..])
}

/// Reads numbers one after another, with bounds.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Fields<'_> {
    fn skip(&mut self, count: usize) -> Option<()> {
        let at = self.at.checked_add(count).filter(|at| *at <= self.bytes.len())?;
        self.at = at;
        Some(())
    }

    fn u8(&mut self) -> Option<u8> {
        let at = self.at;
        self.skip(1)?;
        self.bytes.get(at).copied()
    }

    fn u16(&mut self) -> Option<u16> {
        let at = self.at;
        self.skip(2)?;
        u16_at(self.bytes, at)
    }

    fn u32(&mut self) -> Option<u32> {
        let at = self.at;
        self.skip(4)?;
        u32_at(self.bytes, at)
    }

    /// Reads a block reference's header behind its number; returns the length of its image and data.
    fn block(&mut self, major: Major) -> Option<usize> {
        const HAS_IMAGE: u8 = 0x10;
        const SAME_RELATION: u8 = 0x80;
        const HAS_HOLE: u8 = 0x01;
        // 15 has several ways to compress, and moved the bits
        let compressed = if major.number() < 15 { 0x02 } else { 0x04 | 0x08 | 0x10 };

        let flags = self.u8()?;
        let data = usize::from(self.u16()?);
        let mut image = 0;
        if flags & HAS_IMAGE != 0 {
            image = usize::from(self.u16()?);
            self.skip(2)?; // where the hole begins
            let info = self.u8()?;
            if info & compressed != 0 && info & HAS_HOLE != 0 {
                self.skip(2)?; // how long the hole is
            }
        }
        if flags & SAME_RELATION == 0 {
            self.skip(12)?; // tablespace, database, file
        }
        self.skip(4)?; // the block's number
        Some(data + image)
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer;
    use super::*;
    use proptest::prelude::*;

    fn major(number: u32) -> Major {
        Major::try_from(number).unwrap()
    }

    fn decode(manager: u8, info: u8, body: &[u8], number: u32) -> Result<Record, BadRecord> {
        let header = RecordHeader { previous: Lsn(0), info, manager, checksum: 0 };
        Record::decode(Lsn(8), &header, body, major(number))
    }

    fn numbers(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn location(oid: u32, text: &[u8]) -> Vec<u8> {
        [&oid.to_le_bytes(), text].concat()
    }

    #[test]
    fn decodes_each_versions_records() {
        const LSN: Lsn = Lsn(8);
        let created = |location: &[u8]| {
            Ok(Record::TablespaceCreate { lsn: LSN, oid: 16384, location: location.into() })
        };
        let made = Ok(Record::DatabaseCreate { lsn: LSN, database: 5, tablespace: 1663 });
        let dropped = |tablespaces: &[u32]| {
            Ok(Record::DatabaseDrop { lsn: LSN, database: 5, tablespaces: tablespaces.into() })
        };
        let gone = Ok(Record::TablespaceDrop { lsn: LSN, oid: 16384 });
        let (database, tablespace) = (manager::DATABASE, manager::TABLESPACE);
        let long = [b'x'; 300].as_slice();
        let cases: [(_, _, _, &[u32], _, Result<Record, BadRecord>); 21] = [
            ("create", tablespace, 0x00, &[12, 15, 18], location(16384, b"/t\0"), created(b"/t")),
            (
                "long",
                tablespace,
                0x00,
                &[15],
                location(16384, &[long, b"\0"].concat()),
                created(long),
            ),
            ("in place", tablespace, 0x00, &[15], location(16384, b"\0"), created(b"")),
            ("rest", tablespace, 0x00, &[15], location(16384, b"/t\0/u\0"), created(b"/t")),
            ("flag bits", tablespace, 0x01, &[15], location(16384, b"/t\0"), created(b"/t")),
            ("no end", tablespace, 0x00, &[15], location(16384, b"/t"), Err(BadRecord::NoEnd)),
            ("no text", tablespace, 0x00, &[15], numbers(&[16384]), Err(BadRecord::NoEnd)),
            ("no number", tablespace, 0x00, &[15], vec![1, 2, 3], Err(BadRecord::Short)),
            ("drop", tablespace, 0x10, &[12, 15, 18], numbers(&[16384]), gone),
            ("unknown", tablespace, 0x20, &[12, 18], numbers(&[1]), Err(BadRecord::Kind(0x20))),
            ("copy", database, 0x00, &[12, 14, 15, 18], numbers(&[5, 1663, 1, 1663]), made.clone()),
            ("logged", database, 0x10, &[15, 18], numbers(&[5, 1663]), made),
            ("half", database, 0x00, &[15], numbers(&[5]), Err(BadRecord::Short)),
            ("drop, one", database, 0x10, &[12], numbers(&[5, 1663]), dropped(&[1663])),
            ("drop, old", database, 0x10, &[13, 14], numbers(&[5, 2, 7, 8]), dropped(&[7, 8])),
            ("drop, new", database, 0x20, &[15, 18], numbers(&[5, 2, 7, 8]), dropped(&[7, 8])),
            ("drop, none", database, 0x20, &[15], numbers(&[5, 0]), dropped(&[])),
            ("fewer", database, 0x20, &[15], numbers(&[5, 3, 7, 8]), Err(BadRecord::Short)),
            ("negative", database, 0x20, &[15], numbers(&[5, !0, 7]), Err(BadRecord::Short)),
            ("new in old", database, 0x20, &[13, 14], numbers(&[5, 0]), Err(BadRecord::Kind(0x20))),
            ("unknown", database, 0x30, &[12, 18], numbers(&[5, 0]), Err(BadRecord::Kind(0x30))),
        ];
        for (name, manager, info, majors, data, want) in cases {
            for number in majors {
                let got = decode(manager, info, &writer::main_data(&data), *number);
                assert_eq!(got, want, "{name}, {number}");
            }
        }
    }

    #[test]
    fn finds_main_data_behind_blocks() {
        // a block reference: number, flags, length of data, then what the flags say
        let relation = [7; 12];
        let block = [0; 4];
        let image = |info: u8, length: u16| {
            [&length.to_le_bytes()[..], &[9, 0], &[info], if info & 1 != 0 { &[4, 0] } else { &[] }]
                .concat()
        };
        let main = |length: u8| [255, length];
        let plain = [&[0, 0x20, 3, 0][..], &relation, &block, &main(2), b"abcMN"].concat();
        let same =
            [&[0, 0x20, 1, 0][..], &relation, &block, &[1, 0xA0, 2, 0], &block, &main(2), b"abbMN"]
                .concat();
        let compressed = |info: u8| {
            let head = [&[0, 0x10, 0, 0][..], &image(info, 3), &relation, &block].concat();
            [&head[..], &main(2), b"iiiMN"].concat()
        };
        let origin = [&[253, 1, 0, 252, 1, 2, 3, 4][..], &main(2), b"MN"].concat();
        let long = [&[254, 2, 0, 0, 0][..], b"MN"].concat();
        let cases: [(_, _, &[u32], Option<&[u8]>); 12] = [
            ("nothing else", [&main(2)[..], b"MN"].concat(), &[12, 18], Some(b"MN")),
            ("long form", long, &[12, 18], Some(b"MN")),
            ("origin and transaction", origin, &[14, 18], Some(b"MN")),
            ("a block with data", plain, &[12, 18], Some(b"MN")),
            ("two of one relation", same, &[12, 18], Some(b"MN")),
            ("compressed, with a hole, 14", compressed(0x03), &[12, 14], Some(b"MN")),
            ("compressed, with a hole, 15", compressed(0x05), &[15, 18], Some(b"MN")),
            ("by LZ4", compressed(0x09), &[15, 18], Some(b"MN")),
            ("15's bits in 14", compressed(0x05), &[14], None),
            ("nothing", vec![], &[12, 18], Some(b"")),
            ("longer than the record", vec![254, 255, 255, 255, 255, 1], &[15], None),
            ("an unknown part", vec![40, 1, 1, 1], &[15], None),
        ];
        for (name, body, majors, want) in cases {
            for number in majors {
                assert_eq!(main_data(&body, major(*number)), want, "{name}, {number}");
            }
        }
    }

    #[test]
    fn only_known_resource_managers_are_read() {
        let cases =
            [(0, 12, true), (21, 18, true), (22, 18, false), (128, 14, false), (128, 15, true)];
        for (manager, number, good) in cases {
            let header = RecordHeader { previous: Lsn(8), info: 0, manager, checksum: 0 };
            let objection = header.objection(Lsn(40), Some(Lsn(8)), major(number));
            assert_eq!(objection.is_none(), good, "{manager} in {number}");
        }
    }

    proptest! {
        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200), manager in 4_u8..=5, info: u8, number in 12_u32..=18) {
            let _ = decode(manager, info, &body, number);
            let _ = decode(manager, info, &writer::main_data(&body), number);
        }
    }
}
