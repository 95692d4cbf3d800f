//! Positions in the WAL, and the names of the segments that hold them.
//!
//! Sources: PostgreSQL's `xlogdefs.h` and `xlog_internal.h` (`XLogFileName`, `IsValidWalSegSize`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A position in the WAL: a byte offset from the start of the cluster's life.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Lsn(pub u64);

/// A text that is no [`Lsn`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no WAL position; write it as 1A/2B3C4D5E")]
pub struct BadLsn(String);

impl Lsn {
    /// The position that PostgreSQL uses for "none".
    pub const INVALID: Self = Self(0);

    /// Returns the position, or `None` if it stands for "none".
    pub fn valid(self) -> Option<Self> {
        (self != Self::INVALID).then_some(self)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = BadLsn;

    /// Accepts what any version prints: `%X/%X` and `%X/%08X`, in either case.
    fn from_str(text: &str) -> Result<Self, BadLsn> {
        let half = |part: &str| {
            let plain =
                (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        let parse = || {
            let (high, low) = text.split_once('/')?;
            Some(Self(half(high)? << 32 | half(low)?))
        };
        parse().ok_or_else(|| BadLsn(text.chars().take(40).collect()))
    }
}

/// The size of a cluster's WAL segments in bytes: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

/// A number that is no size of WAL segments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes is no size of WAL segments: it must be a power of two from 1 MiB to 1 GiB")]
pub struct BadSegmentSize(u32);

impl SegmentSize {
    /// What `initdb` uses unless told otherwise: 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        self.0.into()
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = BadSegmentSize;

    fn try_from(bytes: u32) -> Result<Self, BadSegmentSize> {
        let good = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        if good { Ok(Self(bytes)) } else { Err(BadSegmentSize(bytes)) }
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> Self {
        size.0
    }
}

/// One WAL segment: which timeline, and which part of the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Segment {
    /// The timeline in its name; the WAL in its first pages may belong to an earlier one.
    pub timeline: u32,
    /// Its number: its first position divided by the segments' size.
    pub number: u64,
}

impl Segment {
    /// Returns the segment of `timeline` that holds the byte at `lsn`.
    pub fn at(timeline: u32, lsn: Lsn, size: SegmentSize) -> Self {
        Self { timeline, number: lsn.0 / size.bytes() }
    }

    /// Returns the segment that holds the last byte *before* `lsn`: where a backup's or a recovery's end lies.
    pub fn before(timeline: u32, lsn: Lsn, size: SegmentSize) -> Self {
        Self { timeline, number: lsn.0.saturating_sub(1) / size.bytes() }
    }

    /// Reads a segment's name: 24 upper-case hexadecimal digits, nothing behind them.
    ///
    /// `None` for other names, and for one that segments of this size cannot have.
    pub fn parse(name: &str, size: SegmentSize) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if name.len() != 24 || !name.bytes().all(plain) {
            return None;
        }
        let part = |range| u32::from_str_radix(&name[range], 16).ok();
        let (timeline, high, low) = (part(0..8)?, part(8..16)?, part(16..24)?);
        let per_high = (1 << 32) / size.bytes();
        (u64::from(low) < per_high)
            .then(|| Self { timeline, number: u64::from(high) * per_high + u64::from(low) })
    }

    /// Returns its name, as in `pg_wal`.
    pub fn name(self, size: SegmentSize) -> String {
        let per_high = (1 << 32) / size.bytes();
        format!("{:08X}{:08X}{:08X}", self.timeline, self.number / per_high, self.number % per_high)
    }

    /// Returns the position of its first byte; `None` if there is no such position.
    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        self.number.checked_mul(size.bytes()).map(Lsn)
    }

    /// Returns the next segment of the same timeline.
    pub fn next(self) -> Self {
        Self { number: self.number.saturating_add(1), ..self }
    }
}

/// Returns the name of the segment of `timeline` that holds the byte at `lsn`.
pub fn segment_name(timeline: u32, lsn: Lsn, size: SegmentSize) -> String {
    Segment::at(timeline, lsn, size).name(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_positions() {
        let cases = [
            ("0/0", Some(0)),
            ("0/2000028", Some(0x200_0028)),
            ("1A/0B3C4D5E", Some(0x1A_0B3C_4D5E)),
            ("ffffffff/FFFFFFFF", Some(u64::MAX)),
            ("", None),
            ("0", None),
            ("/0", None),
            ("0/", None),
            ("0/+1", None),
            ("0/123456789", None),
            ("0/0/0", None),
            (" 0/0", None),
        ];
        for (text, want) in cases {
            assert_eq!(text.parse::<Lsn>().ok().map(|lsn| lsn.0), want, "{text:?}");
        }
    }

    #[test]
    fn names_segments() {
        let size = |mib: u32| SegmentSize::try_from(mib << 20).unwrap();
        let cases = [
            (1, 0x0200_0028, 16, "000000010000000000000002"),
            (1, 0x1_FF00_0000, 16, "0000000100000001000000FF"),
            (0x1F, 0x1_0000_0000, 16, "0000001F0000000100000000"),
            (3, 0x1_0000_0000, 1024, "000000030000000100000000"),
            (3, 0xFFF0_0000, 1, "000000030000000000000FFF"),
        ];
        for (timeline, lsn, mib, want) in cases {
            assert_eq!(segment_name(timeline, Lsn(lsn), size(mib)), want);
            let parsed = Segment::parse(want, size(mib)).unwrap();
            assert_eq!(parsed, Segment::at(timeline, Lsn(lsn), size(mib)), "{want}");
        }
        for bad in [
            "",
            "00000001000000000000000",
            "00000001000000000000000g",
            "00000001000000000000000a",
            "000000010000000000000002.gz",
            "000000010000000000000100",
        ] {
            assert_eq!(Segment::parse(bad, SegmentSize::DEFAULT), None, "{bad}");
        }
    }

    #[test]
    fn an_end_on_a_boundary_belongs_to_the_segment_before() {
        let boundary = Lsn(2 * SegmentSize::DEFAULT.bytes());
        assert_eq!(Segment::before(1, boundary, SegmentSize::DEFAULT).number, 1);
        assert_eq!(Segment::at(1, boundary, SegmentSize::DEFAULT).number, 2);
        assert_eq!(Segment::before(1, Lsn(boundary.0 + 1), SegmentSize::DEFAULT).number, 2);
    }

    #[test]
    fn segment_sizes_are_powers_of_two_in_range() {
        for (bytes, good) in [
            (0, false),
            (1 << 19, false),
            (1 << 20, true),
            (3 << 20, false),
            (1 << 30, true),
            (1 << 31, false),
        ] {
            assert_eq!(SegmentSize::try_from(bytes).is_ok(), good, "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn positions_and_names_survive_a_round_trip(lsn: u64, timeline: u32, shift in 20_u32..=30) {
            prop_assert_eq!(Lsn(lsn).to_string().parse::<Lsn>().unwrap(), Lsn(lsn));
            let size = SegmentSize::try_from(1 << shift).unwrap();
            let segment = Segment::at(timeline, Lsn(lsn), size);
            prop_assert_eq!(Segment::parse(&segment.name(size), size), Some(segment));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = text.parse::<Lsn>();
            let _ = Segment::parse(&text, SegmentSize::DEFAULT);
            let _ = Major::from_version_file(&text);
        }
    }

    use crate::version::Major;
}
