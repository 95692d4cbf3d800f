//! WAL segments: their names, and which of those that are there belong to a recovery.
//!
//! A damaged or absent segment looks to PostgreSQL like the end of WAL, so what is presented is chosen here from
//! complete listings, and a hole is an error (pitfall 1.1 of the design).

use std::collections::BTreeMap;
use std::ops::Bound;

use super::history::History;
use super::label::is_segment_name;
use crate::map::{Codec, Digest};

/// Bytes of a WAL segment: a power of two from 1 MiB to 1 GiB (PostgreSQL manual, `initdb --wal-segsize`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentSize(u64);

/// One WAL segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Segment {
    /// How many segments of WAL come before it, on any timeline.
    pub number: u64,
    /// Its timeline.
    pub timeline: u32,
}

impl SegmentSize {
    /// Checks `bytes`.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes)).then_some(Self(bytes))
    }

    /// The size in bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }

    /// Returns the largest size that fits what is known where nobody says it: of each of `known` that the byte at an LSN lies
    /// in the segment of a name, and the `highest` last eight digits of any segment's name. A whole directory of segments
    /// tells the size exactly, and so does any LSN but those in the first of the segments that share their eight digits before.
    pub(crate) fn fitting(known: &[(u64, &str)], highest: u32) -> Option<Self> {
        let fits = |size: &Self| {
            u64::from(highest) < (1 << 32) / size.0
                && known.iter().all(|(lsn, name)| {
                    size.parse(name).is_some_and(|found| found.number == size.number_at(*lsn))
                })
        };
        (20..=30).rev().map(|shift| Self(1 << shift)).find(fits)
    }

    /// Number of the segment that holds the byte at `lsn`.
    pub(crate) fn number_at(self, lsn: u64) -> u64 {
        lsn / self.0
    }

    /// Number of the segment that holds the last byte before `lsn`: where WAL that ends at `lsn` ends.
    pub(crate) fn number_before(self, lsn: u64) -> u64 {
        lsn.saturating_sub(1) / self.0
    }

    /// Reads a segment's name; `None` if it is none, or cannot be one of this size.
    pub(crate) fn parse(self, name: &str) -> Option<Segment> {
        if !is_segment_name(name) {
            return None;
        }
        let part = |range: std::ops::Range<usize>| u32::from_str_radix(&name[range], 16).ok();
        let per_log = (1_u64 << 32) / self.0;
        let (timeline, log, within) = (part(0..8)?, part(8..16)?, part(16..24)?);
        (u64::from(within) < per_log)
            .then(|| Segment { number: u64::from(log) * per_log + u64::from(within), timeline })
    }

    /// The segment's name.
    pub(crate) fn name(self, segment: Segment) -> String {
        let per_log = (1_u64 << 32) / self.0;
        format!(
            "{:08X}{:08X}{:08X}",
            segment.timeline,
            segment.number / per_log,
            segment.number % per_log
        )
    }
}

/// Returns how many of `numbers`, which are sorted and differ, follow each other without a gap from index `at` on.
pub(crate) fn run_length(numbers: &[u64], at: usize) -> usize {
    let rest = numbers.get(at..).unwrap_or_default();
    let first = rest.first().copied().unwrap_or_default();
    rest.iter().zip(first..).take_while(|(number, want)| *number == want).count()
}

/// A stored WAL segment or history file that could be presented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WalFile {
    /// Index of the root it lies beneath.
    pub root: u32,
    /// Path beneath that root.
    pub path: String,
    /// First stored byte.
    pub offset: u64,
    /// Stored bytes.
    pub length: u64,
    /// How it is stored.
    pub codec: Codec,
    /// Last modification, seconds since 1970-01-01 UTC.
    pub modified: i64,
    /// What its decoded content must match, where that is known.
    pub digest: Option<Digest>,
}

/// How far the presented WAL goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// To this segment number.
    Through(u64),
    /// As far as there is any on the timeline, but at least to this number.
    LastThere {
        /// The number, where it is known.
        at_least: Option<u64>,
    },
}

/// Why WAL cannot be presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gap {
    /// This segment is needed, and not there.
    Missing(Segment),
    /// `missing` is not there, but `later` is.
    Hole {
        /// The first that is not there.
        missing: Segment,
        /// The last that is.
        later: Segment,
    },
}

/// Chooses the segments that a recovery from segment `start` needs, in order.
///
/// # Errors
/// The first segment that is missing.
pub(crate) fn choose<T>(
    there: &BTreeMap<Segment, T>,
    history: &History,
    size: SegmentSize,
    start: u64,
    reach: Reach,
) -> Result<Vec<Segment>, Gap> {
    let find = |number: u64| {
        let mut timelines =
            history.timelines_of(number, size).map(|timeline| Segment { number, timeline });
        let newest = timelines.clone().next();
        let found = timelines.find(|segment| there.contains_key(segment));
        found.ok_or(newest.unwrap_or(Segment { number, timeline: 0 }))
    };
    let mut chosen = Vec::new();
    let (needed, open_end) = match reach {
        Reach::Through(number) => (number, false),
        Reach::LastThere { at_least } => (at_least.unwrap_or(start).max(start), true),
    };
    let mut number = start;
    let first_missing = loop {
        match find(number) {
            Ok(segment) => chosen.push(segment),
            Err(missing) if number <= needed => return Err(Gap::Missing(missing)),
            Err(missing) => break missing,
        }
        if !open_end && number >= needed {
            return Ok(chosen);
        }
        number += 1;
    };
    let behind = (Bound::Excluded(Segment { number, timeline: u32::MAX }), Bound::Unbounded);
    let later = there.range(behind).rev().map(|(segment, _)| *segment).find(|segment| {
        history.timelines_of(segment.number, size).next() == Some(segment.timeline)
    });
    match later {
        Some(later) => Err(Gap::Hole { missing: first_missing, later }),
        None => Ok(chosen),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize(16 << 20);

    fn segment(number: u64, timeline: u32) -> Segment {
        Segment { number, timeline }
    }

    #[test]
    fn a_size_is_found_by_what_must_fit() {
        let name = |last: u32| format!("0000000100000000{last:08X}");
        let cases = [
            ("an LSN tells it", &[(0x62D_EF78, 6)][..], 6, Some(16 << 20)),
            ("one of the first segment does not", &[(0x28, 0)], 0x3F, Some(64 << 20)),
            ("a whole directory does", &[], 0xFF, Some(16 << 20)),
            ("the largest will do for a few", &[], 3, Some(1 << 30)),
            ("what cannot be", &[(0x62D_EF78, 7)], 7, None),
            ("a name beyond all sizes", &[], 4096, None),
        ];
        for (title, known, highest, want) in cases {
            let names: Vec<_> = known.iter().map(|(lsn, last)| (*lsn, name(*last))).collect();
            let known: Vec<_> = names.iter().map(|(lsn, name)| (*lsn, name.as_str())).collect();
            let got = SegmentSize::fitting(&known, highest).map(SegmentSize::bytes);
            assert_eq!(got, want, "{title}");
        }
    }

    #[test]
    fn runs_end_at_gaps() {
        let numbers = [3, 4, 5, 7, 8];
        let lengths = [0, 1, 2, 3, 4, 5].map(|at| run_length(&numbers, at));
        assert_eq!(lengths, [3, 2, 1, 2, 1, 0]);
    }

    #[test]
    fn names() {
        assert_eq!(SIZE.name(segment(10, 1)), "00000001000000000000000A");
        assert_eq!(SIZE.parse("0000000200000001000000FF"), Some(segment(511, 2)));
        for name in
            ["000000020000000100000100", "00000001000000000000000a", "0000000100000000000000", ""]
        {
            assert_eq!(SIZE.parse(name), None, "{name}");
        }
        assert_eq!(SIZE.number_before(0x200_0000), 1);
        assert_eq!(SIZE.number_before(0x200_0001), 2);
        assert_eq!(SIZE.number_at(0x200_0000), 2);
    }

    #[test]
    fn chooses_what_recovery_needs() {
        let switched = History::parse(2, b"1\t0/5000098\tx\n").unwrap();
        let one = History::only(1);
        let latest = Reach::LastThere { at_least: None };
        type Numbers<'a> = &'a [(u64, u32)];
        type Case<'a> = (&'a str, &'a History, Numbers<'a>, Reach, Result<Numbers<'a>, Gap>);
        let cases: [Case; 10] = [
            (
                "to the end of the backup",
                &one,
                &[(2, 1), (3, 1), (4, 1), (5, 1)],
                Reach::Through(4),
                Ok(&[(3, 1), (4, 1)]),
            ),
            ("all there is", &one, &[(2, 1), (3, 1), (4, 1)], latest, Ok(&[(3, 1), (4, 1)])),
            (
                "one in the middle missing",
                &one,
                &[(3, 1), (5, 1)],
                Reach::Through(5),
                Err(Gap::Missing(segment(4, 1))),
            ),
            ("the first missing", &one, &[(4, 1)], latest, Err(Gap::Missing(segment(3, 1)))),
            (
                "a hole",
                &one,
                &[(3, 1), (5, 1), (6, 1)],
                latest,
                Err(Gap::Hole { missing: segment(4, 1), later: segment(6, 1) }),
            ),
            (
                "shorter than the backup",
                &one,
                &[(3, 1)],
                Reach::LastThere { at_least: Some(4) },
                Err(Gap::Missing(segment(4, 1))),
            ),
            (
                "over a switch",
                &switched,
                &[(3, 1), (4, 1), (5, 1), (5, 2), (6, 1), (6, 2)],
                latest,
                Ok(&[(3, 1), (4, 1), (5, 2), (6, 2)]),
            ),
            ("another branch is no hole", &one, &[(3, 1), (4, 2), (5, 2)], latest, Ok(&[(3, 1)])),
            (
                "the abandoned end of an ancestor is no hole",
                &switched,
                &[(3, 1), (4, 1), (5, 2), (8, 1)],
                latest,
                Ok(&[(3, 1), (4, 1), (5, 2)]),
            ),
            (
                "an ancestor's segment stands in at the switch",
                &switched,
                &[(3, 1), (4, 1), (5, 1)],
                Reach::Through(5),
                Ok(&[(3, 1), (4, 1), (5, 1)]),
            ),
        ];
        for (name, history, there, reach, want) in cases {
            let there =
                there.iter().map(|(number, timeline)| (segment(*number, *timeline), ())).collect();
            let want = want.map(|want| {
                want.iter().map(|(number, timeline)| segment(*number, *timeline)).collect()
            });
            assert_eq!(choose(&there, history, SIZE, 3, reach), want, "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_is_chosen_has_no_hole(numbers in proptest::collection::btree_set(0_u64..40, 0..40), start in 0_u64..40) {
            let there = numbers.iter().map(|number| (segment(*number, 1), ())).collect();
            match choose(&there, &History::only(1), SIZE, start, Reach::LastThere { at_least: None }) {
                Ok(chosen) => {
                    let want: Vec<u64> = (start..=*numbers.last().unwrap()).collect();
                    prop_assert_eq!(chosen.iter().map(|segment| segment.number).collect::<Vec<_>>(), want);
                }
                Err(Gap::Missing(missing)) => prop_assert!(missing.number == start && !numbers.contains(&start)),
                Err(Gap::Hole { missing, later }) => {
                    prop_assert!(!numbers.contains(&missing.number) && numbers.last() == Some(&later.number));
                }
            }
        }

        #[test]
        fn a_name_survives(number in 0_u64..1 << 40, timeline: u32, power in 20_u32..31) {
            let size = SegmentSize::new(1 << power).unwrap();
            let number = number % (1 << (64 - power));
            prop_assert_eq!(size.parse(&size.name(segment(number, timeline))), Some(segment(number, timeline)));
        }
    }
}
