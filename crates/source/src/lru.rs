//! A map that forgets what was not used for longest.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Values by key, each with a weight; the sum of weights stays within a limit (except that the newest value always
/// stays).
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    entries: HashMap<K, Slot<V>>,
    by_age: BTreeMap<u64, K>,
    now: u64,
    weight: u64,
    limit: u64,
}

#[derive(Debug)]
struct Slot<V> {
    value: V,
    weight: u64,
    used: u64,
}

impl<K: Hash + Eq + Clone, V: Clone> Lru<K, V> {
    pub(crate) fn new(limit: u64) -> Self {
        Self { entries: HashMap::new(), by_age: BTreeMap::new(), now: 0, weight: 0, limit }
    }

    /// Returns a value and makes it the most recently used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        let slot = self.entries.get_mut(key)?;
        if let Some(key) = self.by_age.remove(&slot.used) {
            self.now += 1;
            slot.used = self.now;
            self.by_age.insert(self.now, key);
        }
        Some(slot.value.clone())
    }

    /// Returns a value, whose age stays what it is.
    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|slot| &mut slot.value)
    }

    /// Keeps a value as the most recently used and forgets the oldest ones beyond the limit.
    pub(crate) fn insert(&mut self, key: K, value: V, weight: u64) {
        self.remove(&key);
        self.now += 1;
        self.weight += weight;
        self.by_age.insert(self.now, key.clone());
        self.entries.insert(key, Slot { value, weight, used: self.now });
        while self.weight > self.limit && self.entries.len() > 1 {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            self.remove(&oldest);
        }
    }

    /// Forgets a value.
    pub(crate) fn remove(&mut self, key: &K) {
        if let Some(slot) = self.entries.remove(key) {
            self.weight -= slot.weight;
            self.by_age.remove(&slot.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_what_was_not_used_for_longest() {
        let mut lru = Lru::new(3);
        for key in ["a", "b", "c"] {
            lru.insert(key, key.len(), 1);
        }
        assert_eq!(lru.get(&"a"), Some(1));
        lru.insert("d", 1, 1);
        assert_eq!((lru.get(&"a"), lru.get(&"b"), lru.get(&"c")), (Some(1), None, Some(1)));
        *lru.get_mut(&"c").unwrap() = 3;
        *lru.get_mut(&"d").unwrap() = 3;
        assert!(lru.get_mut(&"b").is_none() && lru.get(&"c") == Some(3));
        lru.insert("e", 1, 1);
        assert_eq!(lru.get(&"d"), None, "to change a value is not to use it");
        lru.insert("big", 9, 10);
        assert_eq!(
            (lru.get(&"big"), lru.get(&"a"), lru.weight),
            (Some(9), None, 10),
            "the newest stays"
        );
        lru.insert("big", 9, 1);
        assert_eq!(lru.weight, 1, "a value put twice counts once");
        lru.remove(&"big");
        assert_eq!((lru.weight, lru.entries.len(), lru.by_age.len()), (0, 0, 0));
    }
}
