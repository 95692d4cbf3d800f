//! Ranges of stored bytes that are here or on their way.
//!
//! Owns which bytes of which object there are, and which have to go when the room is used up. Leaves asking for them to
//! [`super::state`]. Ranges never overlap: what is here or on its way is not asked for again.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::Arc;

use super::promise::{Outcome, Promise};
use crate::buffers::Buffer;
use crate::map::ObjectId;

/// What a range costs besides its bytes, about.
const OVERHEAD: u64 = 256;

/// A range that was asked for.
#[derive(Debug)]
pub(super) struct Extent {
    pub(super) object: ObjectId,
    pub(super) start: u64,
    /// Bytes asked for; may be more than there are if `ahead`.
    pub(super) length: u32,
    /// Nobody waited for it when it was asked for.
    pub(super) ahead: bool,
    /// The request's number.
    pub(super) number: u64,
    pub(super) bytes: Promise<Buffer>,
}

/// All ranges that are here or on their way, and not much more than a limit of bytes.
#[derive(Debug)]
pub(super) struct Extents {
    by_place: BTreeMap<(ObjectId, u64), Slot>,
    by_age: BTreeMap<u64, (ObjectId, u64)>,
    now: u64,
    memory: u64,
    limit: u64,
}

#[derive(Debug)]
struct Slot {
    extent: Arc<Extent>,
    memory: u64,
    used: u64,
}

impl Extent {
    /// The first byte behind it, as far as is known.
    pub(super) fn end(&self) -> u64 {
        let length = match self.bytes.outcome() {
            Some(Outcome::Done(bytes)) => bytes.len() as u64,
            _ => u64::from(self.length),
        };
        self.start + length
    }
}

impl Extents {
    pub(super) fn new(limit: u64) -> Self {
        Self { by_place: BTreeMap::new(), by_age: BTreeMap::new(), now: 0, memory: 0, limit }
    }

    /// Returns the range that holds byte `at` of `object`, and makes it the most recently used.
    pub(super) fn at(&mut self, object: ObjectId, at: u64) -> Option<Arc<Extent>> {
        let places = (object, 0)..=(object, at);
        let (place, slot) = self.by_place.range_mut(places).next_back()?;
        if at >= slot.extent.end() {
            return None;
        }
        if slot.used != self.now {
            self.by_age.remove(&slot.used);
            self.now += 1;
            slot.used = self.now;
            self.by_age.insert(self.now, *place);
        }
        Some(Arc::clone(&slot.extent))
    }

    /// Returns the parts of `range` of which nothing is here or on its way.
    pub(super) fn gaps(&self, object: ObjectId, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        let before = self.by_place.range((object, 0)..=(object, at)).next_back();
        let behind = (Bound::Excluded((object, at)), Bound::Excluded((object, range.end)));
        let behind = if at < range.end { Some(self.by_place.range(behind)) } else { None };
        for (_, slot) in before.into_iter().chain(behind.into_iter().flatten()) {
            if at < slot.extent.start {
                gaps.push(at..slot.extent.start);
            }
            at = at.max(slot.extent.end());
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Takes up a range that was asked for; it must lie in a gap.
    pub(super) fn insert(&mut self, extent: Arc<Extent>) {
        self.now += 1;
        let place = (extent.object, extent.start);
        let memory = u64::from(extent.length) + OVERHEAD;
        self.memory += memory;
        self.by_age.insert(self.now, place);
        self.by_place.insert(place, Slot { extent, memory, used: self.now });
    }

    /// Counts what a range really holds, now that its bytes are here, and forgets the oldest ones beyond the limit.
    pub(super) fn arrived(&mut self, extent: &Extent, memory: u64) -> Vec<Arc<Extent>> {
        let slot = self.by_place.get_mut(&(extent.object, extent.start));
        if let Some(slot) = slot.filter(|slot| slot.extent.number == extent.number) {
            self.memory = self.memory - slot.memory + memory + OVERHEAD;
            slot.memory = memory + OVERHEAD;
        }
        self.shrink()
    }

    /// Forgets a range, if it was not forgotten before.
    pub(super) fn remove(&mut self, extent: &Extent) {
        let place = (extent.object, extent.start);
        if self.by_place.get(&place).is_some_and(|slot| slot.extent.number == extent.number)
            && let Some(slot) = self.by_place.remove(&place)
        {
            self.by_age.remove(&slot.used);
            self.memory -= slot.memory;
        }
    }

    /// Forgets the oldest ranges beyond the limit, except those on their way; returns them, to be dropped without the lock.
    fn shrink(&mut self) -> Vec<Arc<Extent>> {
        let mut gone = Vec::new();
        let mut on_their_way = Vec::new();
        while self.memory > self.limit {
            let Some((used, place)) = self.by_age.pop_first() else { break };
            match self.by_place.get(&place) {
                Some(slot) if slot.extent.bytes.outcome().is_none() => {
                    on_their_way.push((used, place));
                }
                Some(slot) => {
                    self.memory -= slot.memory;
                    gone.extend(self.by_place.remove(&place).map(|slot| slot.extent));
                }
                None => {}
            }
        }
        self.by_age.extend(on_their_way);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    const OBJECT: ObjectId = ObjectId(1);

    fn extent(object: ObjectId, start: u64, length: u32) -> Arc<Extent> {
        let bytes = Promise::new();
        Arc::new(Extent { object, start, length, ahead: false, number: 0, bytes })
    }

    fn arrive(extents: &mut Extents, extent: &Extent, length: usize) -> usize {
        let bytes = Buffers::of(256 << 10).take(length);
        let memory = bytes.memory();
        extent.bytes.settle(Outcome::Done(bytes));
        extents.arrived(extent, memory).len()
    }

    #[test]
    fn gaps_are_what_is_neither_here_nor_on_its_way() {
        let mut extents = Extents::new(1 << 20);
        for (object, start, length) in [(1, 10, 10), (1, 30, 10), (0, 0, 100), (2, 0, 100)] {
            extents.insert(extent(ObjectId(object), start, length));
        }
        let cases: [(_, &[(u64, u64)]); 7] = [
            (0..50, &[(0, 10), (20, 30), (40, 50)]),
            (10..20, &[]),
            (12..18, &[]),
            (15..35, &[(20, 30)]),
            (20..30, &[(20, 30)]),
            (40..41, &[(40, 41)]),
            (15..15, &[]),
        ];
        for (range, want) in cases {
            let gaps = extents.gaps(OBJECT, range.clone());
            let gaps: Vec<_> = gaps.iter().map(|gap| (gap.start, gap.end)).collect();
            assert_eq!(gaps, want, "{range:?}");
        }
        let found = |extents: &mut Extents, at| extents.at(OBJECT, at).map(|extent| extent.start);
        let starts = [9, 10, 19, 20, 39, 40].map(|at| found(&mut extents, at));
        assert_eq!(starts, [None, Some(10), Some(10), None, Some(30), None]);
    }

    #[test]
    fn an_answer_that_is_short_leaves_a_gap() {
        let mut extents = Extents::new(1 << 20);
        let short = extent(OBJECT, 10, 10);
        extents.insert(Arc::clone(&short));
        arrive(&mut extents, &short, 4);
        assert!(extents.at(OBJECT, 13).is_some() && extents.at(OBJECT, 14).is_none());
        assert_eq!(extents.gaps(OBJECT, 0..20), [0..10, 14..20]);
    }

    #[test]
    fn the_oldest_go_but_not_what_is_on_its_way() {
        let each = 1000 + OVERHEAD;
        let mut extents = Extents::new(3 * each);
        let all: Vec<_> = (0..5).map(|place| extent(OBJECT, place * 1000, 1000)).collect();
        for extent in &all {
            extents.insert(Arc::clone(extent));
        }
        assert_eq!(arrive(&mut extents, &all[1], 1000), 1, "the only one that is here");
        assert_eq!(arrive(&mut extents, &all[2], 1000), 1);
        assert_eq!(arrive(&mut extents, &all[3], 1000), 0);
        extents.insert(extent(OBJECT, 1000, 500));
        assert!(extents.at(OBJECT, 3000).is_some());
        assert_eq!(arrive(&mut extents, &all[0], 1000), 1);
        assert!(extents.at(OBJECT, 0).is_none(), "the one longest not used goes first");
        for extent in &all {
            extents.remove(extent);
        }
        extents.remove(&extent(OBJECT, 1000, 500));
        assert_eq!((extents.memory, extents.by_age.len(), extents.by_place.len()), (0, 0, 0));
    }
}
