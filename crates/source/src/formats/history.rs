//! Timeline histories: which timelines led to one, and where each was left (PostgreSQL manual, "Timelines").

use super::label::parse_lsn;
use super::wal::SegmentSize;

/// Longest history file that is read, in bytes.
pub(crate) const LIMIT: u64 = 1 << 20;

/// A timeline with its ancestors, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct History {
    /// Timeline and the LSN it begins at (0 for the oldest known).
    entries: Vec<(u32, u64)>,
}

impl History {
    /// A timeline that has no ancestors, or none that are known.
    pub(crate) fn only(timeline: u32) -> Self {
        Self { entries: vec![(timeline, 0)] }
    }

    /// Reads `<timeline>.history`: a line per ancestor, oldest first, with its number and where it was left.
    ///
    /// # Errors
    /// The line that cannot be read or is out of order.
    pub(crate) fn parse(timeline: u32, bytes: &[u8]) -> Result<Self, String> {
        let text = String::from_utf8_lossy(bytes); // the reason in a line may be in any encoding
        let mut entries = Vec::new();
        let mut begin = 0;
        for line in
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let mut words = line.split_whitespace();
            let ancestor = words.next().and_then(|word| word.parse::<u32>().ok());
            let left_at = words.next().and_then(parse_lsn);
            let (Some(ancestor), Some(left_at)) = (ancestor, left_at) else {
                return Err(format!("its line `{line}` cannot be read"));
            };
            let newer =
                entries.last().is_none_or(|(last, _)| *last < ancestor) && ancestor < timeline;
            if !newer || left_at < begin {
                return Err(format!("its line `{line}` is out of order"));
            }
            entries.push((ancestor, begin));
            begin = left_at;
        }
        entries.push((timeline, begin));
        entries.reverse();
        Ok(Self { entries })
    }

    /// The ancestors' numbers, newest first.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = u32> {
        self.entries.iter().skip(1).map(|(timeline, _)| *timeline)
    }

    /// Whether `timeline` is this one or an ancestor.
    pub(crate) fn contains(&self, timeline: u32) -> bool {
        self.entries.iter().any(|(known, _)| *known == timeline)
    }

    /// The timelines on which PostgreSQL looks for segment `number`, in its order: the newest that has begun by
    /// then first (PostgreSQL source, `XLogFileReadAnyTLI`).
    pub(crate) fn timelines_of(
        &self,
        number: u64,
        size: SegmentSize,
    ) -> impl Iterator<Item = u32> + Clone {
        self.entries
            .iter()
            .filter(move |(_, begin)| size.number_at(*begin) <= number)
            .map(|(timeline, _)| *timeline)
    }
}

/// Name of a timeline's history file.
pub(crate) fn file_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

/// Reads the name of a history file.
pub(crate) fn parse_file_name(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".history").filter(|digits| digits.len() == 8)?;
    super::label::is_upper_hex(digits).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 16 << 20;

    #[test]
    fn finds_the_timeline_of_a_segment() {
        let size = SegmentSize::new(SIZE).unwrap();
        let text =
            b"1\t0/5000098\tno recovery target specified\n\n2\t0/7000000\tbefore 2026-01-01\n";
        let history = History::parse(3, text).unwrap();
        assert_eq!(history.ancestors().collect::<Vec<_>>(), [2, 1]);
        let cases: [(_, _, &[u32]); 5] = [
            ("before any switch", 4, &[1]),
            ("the segment of the first switch", 5, &[2, 1]),
            ("between", 6, &[2, 1]),
            ("the switch at a segment's first byte", 7, &[3, 2, 1]),
            ("after all", 100, &[3, 2, 1]),
        ];
        for (name, number, want) in cases {
            assert_eq!(history.timelines_of(number, size).collect::<Vec<_>>(), want, "{name}");
        }
    }

    #[test]
    fn refuses_disorder() {
        for text in ["x", "1", "1 0-5", "2\t0/5\n1\t0/6", "1\t0/6\n2\t0/5", "3\t0/5"] {
            assert!(History::parse(3, text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(History::parse(2, b"# a comment\n").unwrap(), History::only(2));
    }

    #[test]
    fn file_names() {
        assert_eq!(parse_file_name(&file_name(0x1F)), Some(0x1F));
        for name in ["0000001f.history", "2.history", "00000002.histor", "000000020.history"] {
            assert_eq!(parse_file_name(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_not_trusted(bytes in proptest::collection::vec(any::<u8>(), 0..200), timeline: u32) {
            let _ = History::parse(timeline, &bytes);
        }
    }
}
