//! Writes WAL for tests as PostgreSQL does: pages, records across them, checksums.

use std::io;

use super::WalIdentity;
use super::records::RECORD_HEADER;
use crate::lsn::{Lsn, SegmentSize};
use crate::version::Major;

/// What test WAL is: of PostgreSQL 15, in segments of 1 MiB.
pub(super) fn identity() -> WalIdentity {
    WalIdentity {
        major: Major::try_from(15).unwrap(),
        system_identifier: 77,
        segment_size: SegmentSize::try_from(SEGMENT as u32).unwrap(),
        page_size: 8192,
    }
}

pub(super) const SEGMENT: u64 = 1 << 20;
pub(super) const PAGE: u64 = 8192;

/// Where test WAL begins: at a segment's start.
pub(super) const BASE: u64 = 3 * SEGMENT;

/// Returns a record's body that holds nothing but this main data.
pub(super) fn main_data(data: &[u8]) -> Vec<u8> {
    match u8::try_from(data.len()) {
        Ok(0) => Vec::new(),
        Ok(length) => [&[255, length], data].concat(),
        Err(_) => [&[254][..], &u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat(),
    }
}

/// WAL from [`BASE`] on.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    /// Where the last record begins.
    pub(super) last: u64,
    pub(super) timeline: u32,
}

impl Writer {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), last: 0, timeline: 1 }
    }

    /// Where the next byte goes.
    pub(super) fn at(&self) -> u64 {
        BASE + self.bytes.len() as u64
    }

    /// Writes a page's header, if a page begins here.
    pub(super) fn page(&mut self, flags: u16, remaining: u32) {
        let at = self.at();
        if !at.is_multiple_of(PAGE) {
            return;
        }
        let long = at.is_multiple_of(SEGMENT);
        let identity = identity();
        self.bytes.extend(identity.major.wal_magic().to_le_bytes());
        self.bytes.extend((flags | if long { 2 } else { 0 }).to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(at.to_le_bytes());
        self.bytes.extend(u64::from(remaining).to_le_bytes());
        if long {
            self.bytes.extend(identity.system_identifier.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// Writes a record; returns where it begins.
    pub(super) fn record(&mut self, manager: u8, info: u8, body: &[u8]) -> Lsn {
        self.record_of_page(0, manager, info, body)
    }

    /// Writes a record; a page that it begins gets these flags.
    pub(super) fn record_of_page(&mut self, flags: u16, manager: u8, info: u8, body: &[u8]) -> Lsn {
        self.page(flags, 0);
        let start = self.at();
        let mut record = u32::try_from(RECORD_HEADER + body.len()).unwrap().to_le_bytes().to_vec();
        record.extend([0; 4]); // transaction
        record.extend(self.last.to_le_bytes());
        record.extend([info, manager, 0, 0]);
        let checksum = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(checksum.to_le_bytes());
        record.extend(body);
        let mut left = record.as_slice();
        while !left.is_empty() {
            self.page(1, u32::try_from(left.len()).unwrap());
            let room = PAGE - self.at() % PAGE;
            let (now, later) = left.split_at(left.len().min(room as usize));
            self.bytes.extend(now);
            left = later;
        }
        self.align(8);
        self.last = start;
        Lsn(start)
    }

    /// Fills up so that this many bytes are left on the page.
    pub(super) fn leave(&mut self, left: u64) {
        self.page(0, 0);
        let room = PAGE - self.at() % PAGE - left;
        let header = RECORD_HEADER as u64;
        assert!(room >= header + 2, "{room} bytes are no room for a record");
        self.record(10, 0, &vec![7; (room - header) as usize]);
        assert_eq!(self.at() % PAGE, (PAGE - left) % PAGE);
    }

    /// Ends the segment.
    pub(super) fn switch(&mut self) -> Lsn {
        let start = self.record(0, 0x40, &[]);
        let end = self.at().next_multiple_of(SEGMENT);
        while self.at() < end {
            self.page(0, 0);
            self.bytes.push(0);
            self.align(PAGE);
        }
        start
    }

    pub(super) fn create_tablespace(&mut self, oid: u32, location: &[u8]) -> Lsn {
        let data = [&oid.to_le_bytes(), location, b"\0"].concat();
        self.record(5, 0x00, &main_data(&data))
    }

    /// Adds zeros.
    pub(super) fn align(&mut self, to: u64) {
        self.bytes.resize((self.at().next_multiple_of(to) - BASE) as usize, 0);
    }

    /// Returns its reader. What was not written is zeros to the segment's end; later segments are not there.
    pub(super) fn reader(&self) -> impl FnMut(Lsn, &mut [u8]) -> io::Result<bool> + '_ {
        let end = self.at().next_multiple_of(SEGMENT);
        move |at, buffer| {
            let last = at.0 + buffer.len() as u64 - 1;
            assert_eq!(at.0 / SEGMENT, last / SEGMENT, "a range never leaves its segment");
            if at.0 < BASE || last >= end {
                return Ok(false);
            }
            let written = self.bytes.get((at.0 - BASE) as usize..).unwrap_or_default();
            let (there, rest) = buffer.split_at_mut(written.len().min(buffer.len()));
            there.copy_from_slice(&written[..there.len()]);
            rest.fill(0);
            Ok(true)
        }
    }
}
