//! Which pages of a file lie in the write layer: a bitmap in chunks, so that a sparse or untouched
//! file costs little.

use std::ops::Range;

/// Bytes per page of the write layer.
///
/// The kernel writes its cache back in pages of this size, not in PostgreSQL's 8 KiB: with a larger
/// grain half a written-back block would need the other half from the backup before it could be
/// stored.
pub const PAGE: u64 = 4096;

const WORDS: usize = 16;
const CHUNK: u64 = WORDS as u64 * 64;

/// A set of page numbers.
#[derive(Debug, Default)]
pub(crate) struct PageSet {
    chunks: Vec<Option<Box<[u64; WORDS]>>>,
    count: u64,
}

impl PageSet {
    /// Returns how many pages are in the set.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Returns whether `page` is in the set.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let (chunk, word, bit) = place(page);
        matches!(self.chunks.get(chunk), Some(Some(words)) if words[word] & bit != 0)
    }

    /// Adds all pages of `range`.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        for page in range {
            let (chunk, word, bit) = place(page);
            if self.chunks.len() <= chunk {
                self.chunks.resize_with(chunk + 1, || None);
            }
            let words = self.chunks[chunk].get_or_insert_default();
            self.count += u64::from(words[word] & bit == 0);
            words[word] |= bit;
        }
    }

    /// Removes `first` and all pages after it.
    pub(crate) fn remove_from(&mut self, first: u64) {
        let (chunk, word, bit) = place(first);
        let kept = if word == 0 && bit == 1 { chunk } else { chunk + 1 };
        let gone = self.chunks.drain(kept.min(self.chunks.len())..);
        self.count -= gone.flatten().map(|words| ones(&words[..])).sum::<u64>();
        if let Some(Some(words)) = self.chunks.get_mut(chunk) {
            let before = ones(&words[..]);
            words[word] &= bit - 1;
            words[word + 1..].fill(0);
            self.count -= before - ones(&words[..]);
        }
    }

    /// Returns the end of the run of pages from `page` on that are, like it, all in or all not in
    /// the set; looks no further than `limit`.
    pub(crate) fn run_end(&self, page: u64, limit: u64) -> u64 {
        let inside = self.contains(page);
        (page + 1..limit).find(|&next| self.contains(next) != inside).unwrap_or(limit)
    }
}

fn place(page: u64) -> (usize, usize, u64) {
    ((page / CHUNK) as usize, (page % CHUNK / 64) as usize, 1 << (page % 64))
}

fn ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(steps in prop::collection::vec((any::<bool>(), 0..3000u64, 0..1500u64), 1..30)) {
            let (mut pages, mut model) = (PageSet::default(), BTreeSet::new());
            for (insert, first, length) in steps {
                if insert {
                    pages.insert(first..first + length);
                    model.extend(first..first + length);
                } else {
                    pages.remove_from(first);
                    model.retain(|&page| page < first);
                }
                prop_assert_eq!(pages.count(), model.len() as u64);
                for page in 0..4600 {
                    prop_assert_eq!(pages.contains(page), model.contains(&page), "page {}", page);
                }
                let end = pages.run_end(first, 5000);
                prop_assert!((first..end).all(|page| pages.contains(page) == pages.contains(first)));
                prop_assert!(end == 5000 || pages.contains(end) != pages.contains(first));
            }
        }
    }
}
