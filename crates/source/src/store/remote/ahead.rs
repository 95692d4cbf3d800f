//! Which bytes will be wanted next.
//!
//! Owns the streams: places where objects are read in sequence. Has no I/O; [`Streams::note`] says what to ask for.
//!
//! A window begins small and grows with what was read in sequence: a stream never has more bytes ahead than it read,
//! and a little. So it doubles with every round trip, and whatever the pattern, not much more than twice the bytes
//! that are read is fetched.

use std::ops::Range;

use super::super::wire::MAX_RANGE;
use crate::map::ObjectId;

/// Longest window: what a link of 10 Gbit/s holds in flight at a round trip of 5 ms, and some more.
const LONGEST_WINDOW: u64 = 8 * 1024 * 1024;
/// What a window has beyond the bytes read in sequence. A [`Reader`](crate::reader::Reader) that decodes a file asks for
/// 16 KiB, then always for twice as much: with this, its next fetch is just covered.
const WINDOW_START: u64 = 16 * 1024;
/// How far from its place a read may lie and still belong to a stream: several threads' reads come in any order.
const LONGEST_SLACK: u64 = 128 * 1024;
/// Streams that are remembered.
const MOST_STREAMS: usize = 128;

/// The places where objects are read in sequence, the most recently used first.
#[derive(Debug)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    /// Bytes that all windows together may hold.
    budget: u64,
    /// Bytes read so far.
    total: u64,
}

#[derive(Debug)]
struct Stream {
    object: ObjectId,
    /// Where the next read is expected.
    next: u64,
    /// Bytes read in sequence so far.
    run: u64,
    /// All bytes before were asked for.
    asked: u64,
    /// [`Streams::total`] when it was last read from.
    used: u64,
}

impl Streams {
    /// `budget`: bytes that all windows together may hold; half a cache, so that no window drives out another.
    pub(super) fn new(budget: u64) -> Self {
        Self { streams: Vec::new(), budget, total: 0 }
    }

    /// Notes that `range` of `object` is read; returns what to ask for because of that. `missed`: some of it was not
    /// there and not asked for.
    pub(super) fn note(
        &mut self,
        object: ObjectId,
        range: &Range<u64>,
        missed: bool,
    ) -> Option<Range<u64>> {
        let length = range.end - range.start;
        self.total = self.total.saturating_add(length);
        let own = |stream: &Stream| stream.object == object && stream.expects(range.start);
        let Some(place) = self.streams.iter().position(own) else {
            self.streams.truncate(MOST_STREAMS - 1);
            let end = range.end;
            let fresh = Stream { object, next: end, run: length, asked: end, used: self.total };
            self.streams.insert(0, fresh);
            return None;
        };
        self.streams[..=place].rotate_right(1);
        let stream = &mut self.streams[0];
        stream.used = self.total;
        let grown = range.end.saturating_sub(stream.next).min(length);
        if grown == 0 {
            return None; // read again
        }
        stream.run = stream.run.saturating_add(grown);
        stream.next = range.end;
        // What was asked for may be gone again: its connection broke, or the cache needed the room.
        stream.asked = if missed { range.end } else { stream.asked.max(range.end) };
        let run = stream.run;
        let window = self.window(run);
        let stream = &mut self.streams[0];
        let end = stream.next.saturating_add(window);
        // Asking for little each time would cost more requests than it saves waiting, and every batch of them wakes both ends.
        let worthwhile = (window / 2).clamp(1, u64::from(MAX_RANGE)).max(window / 8);
        if end.saturating_sub(stream.asked) < worthwhile {
            return None;
        }
        let wanted = stream.asked..end;
        stream.asked = end;
        Some(wanted)
    }

    /// Forgets where `object` is read in sequence: read-ahead begins anew, if at all.
    pub(super) fn forget(&mut self, object: ObjectId) {
        self.streams.retain(|stream| stream.object != object);
    }

    fn window(&self, run: u64) -> u64 {
        let recent = self.total.saturating_sub(self.budget);
        let active = self.streams.iter().filter(|stream| stream.used >= recent).count() as u64;
        (run.saturating_add(WINDOW_START)).min(LONGEST_WINDOW).min(self.budget / active.max(1))
    }
}

impl Stream {
    fn expects(&self, offset: u64) -> bool {
        offset.abs_diff(self.next) <= self.run.min(LONGEST_SLACK)
            // A short stream has no room for disorder: two reads far apart are no sequence.
            && (offset >= self.next || self.run > u64::from(MAX_RANGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;
    const OBJECT: ObjectId = ObjectId(3);

    /// Reads in sequence from 0; returns how far it was asked for after each read.
    fn sequence(streams: &mut Streams, lengths: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let (mut next, mut asked) = (0, 0);
        let mut after = Vec::new();
        for length in lengths {
            let range = next..next + length;
            let missed = range.end > asked;
            asked = asked.max(range.end);
            if let Some(ahead) = streams.note(OBJECT, &range, missed) {
                assert_eq!(ahead.start, asked, "neither a hole nor twice");
                asked = ahead.end;
            }
            next = range.end;
            after.push(asked);
        }
        after
    }

    #[test]
    fn a_decoded_files_next_fetch_is_always_asked_for() {
        let fetches = [16, 32, 64, 128, 256, 256, 256].map(|length| length * KIB);
        let asked = sequence(&mut Streams::new(32 * MIB), fetches);
        let mut end = 16 * KIB;
        for (place, fetch) in fetches.iter().enumerate().skip(1) {
            end += fetch;
            let next = fetches.get(place + 1).unwrap_or(fetch);
            assert!(asked[place] >= end + next, "after fetch {place}: {asked:?}");
        }
    }

    #[test]
    fn the_window_doubles_and_has_a_limit() {
        let asked = sequence(&mut Streams::new(32 * MIB), [16 * KIB; 4096]);
        assert_eq!(asked[0], 16 * KIB, "one read is no sequence");
        for (place, asked) in asked.iter().enumerate().skip(1) {
            let end = (place as u64 + 1) * 16 * KIB;
            let most = 2 * end + WINDOW_START;
            assert!((end + end / 4..=most).contains(asked) || end > 4 * MIB, "{end}: {asked}");
            assert!(*asked <= end + LONGEST_WINDOW);
            assert!(*asked >= end + 4 * MIB || end < 8 * MIB, "{end}: {asked}");
        }
        let requests = asked.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(requests < 350, "{requests} times something was asked for");
    }

    #[test]
    fn scattered_reads_are_no_sequence() {
        let mut streams = Streams::new(32 * MIB);
        let mut ahead = 0;
        for step in 0..4096_u64 {
            let start = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (4096 * 8 * KIB);
            let wanted = streams.note(OBJECT, &(start..start + 8 * KIB), true);
            ahead += wanted.map_or(0, |range| range.end - range.start);
        }
        assert!(ahead <= 4096 * 8 * KIB / 5, "{ahead} bytes ahead");
    }

    #[test]
    fn streams_of_one_object_and_of_several_are_told_apart() {
        let mut streams = Streams::new(32 * MIB);
        let places = [(0, 0), (0, 5 * MIB), (0, 10 * MIB), (1, 0), (2, 7 * MIB)];
        let mut ahead = [0; 5];
        for step in 0..64 {
            for (number, (object, start)) in places.iter().enumerate() {
                let start = start + step * 16 * KIB;
                let range = start..start + 16 * KIB;
                if let Some(wanted) = streams.note(ObjectId(*object), &range, false) {
                    ahead[number] = wanted.end - range.start;
                }
            }
        }
        assert!(ahead.iter().all(|ahead| *ahead > 512 * KIB), "{ahead:?}");
    }

    #[test]
    fn disorder_and_repeats_are_no_growth() {
        let mut streams = Streams::new(32 * MIB);
        let range = 0..16 * KIB;
        assert_eq!(streams.note(OBJECT, &range, true), None);
        assert_eq!(streams.note(OBJECT, &range, false), None, "the same again");
        assert_eq!(streams.note(OBJECT, &range, false), None);
        let mut streams = Streams::new(32 * MIB);
        let mut farthest = 0;
        for pair in 0..32_u64 {
            for place in [2 * pair + 1, 2 * pair] {
                let range = place * 128 * KIB..(place + 1) * 128 * KIB;
                let wanted = streams.note(OBJECT, &range, false);
                farthest = farthest.max(wanted.map_or(0, |range| range.end));
            }
        }
        assert!(farthest > 10 * MIB, "swapped reads are a sequence: {farthest}");
    }

    #[test]
    fn all_windows_together_stay_within_the_budget() {
        let mut streams = Streams::new(4 * MIB);
        let mut ahead = [0; 16];
        for step in 0..512 {
            for (object, ahead) in ahead.iter_mut().enumerate() {
                let range = step * 16 * KIB..(step + 1) * 16 * KIB;
                let wanted = streams.note(ObjectId(object as u32), &range, false);
                *ahead = wanted.map_or(*ahead, |wanted| wanted.end).max(range.end);
                assert!(*ahead - range.end <= 4 * MIB);
            }
        }
        let end = 512 * 16 * KIB;
        let sum: u64 = ahead.iter().map(|ahead| ahead - end).sum();
        assert!((2 * MIB..=4 * MIB).contains(&sum), "{sum}");
    }

    #[test]
    fn what_was_lost_is_asked_for_again() {
        let mut streams = Streams::new(32 * MIB);
        let asked = *sequence(&mut streams, [16 * KIB; 64]).last().unwrap();
        let next = MIB..MIB + 16 * KIB;
        assert!(asked > next.end);
        let wanted = streams.note(OBJECT, &next, true).expect("the window again");
        assert_eq!(wanted.start, next.end);
        assert!(wanted.end >= asked);
        streams.forget(OBJECT);
        assert_eq!(streams.note(OBJECT, &(next.end..next.end + 16 * KIB), true), None);
    }
}
