//! Where each byte of a file comes from: pure decisions, no I/O.
//!
//! A byte is in the layer if its page is; else it comes from the lower if it lies below
//! `lower_limit`; else it is zero. `lower_limit` starts as the lower's size and only sinks
//! (truncating a file and extending it again gives zeros), and a page below it never leaves the
//! layer unless `lower_limit` sinks below the page. So bytes once read from the lower stay right
//! for whatever is still to come from there: nobody needs a lock while the lower is read.

use std::ops::Range;

use crate::pages::{PAGE, PageSet};

/// Largest size of a file in the mount, in bytes (4 TiB; PostgreSQL's largest file is a segment of
/// 1 GiB by default).
pub const MAX_FILE_SIZE: u64 = 1 << 42;

/// Size and origin of a file's bytes. Always `lower_limit <= size <= MAX_FILE_SIZE`.
#[derive(Debug, Default)]
pub(crate) struct Content {
    size: u64,
    lower_limit: u64,
    pages: PageSet,
    /// Pages for which the layer has space, whether or not they are in it.
    reserved: PageSet,
}

/// Where a range of bytes comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Layer,
    Lower,
    Zeros,
}

impl Content {
    /// Returns the content of an unchanged lower file.
    pub(crate) fn of_lower(size: u64) -> Self {
        Self { size, lower_limit: size, ..Self::default() }
    }

    /// Returns the file's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the bytes held by the layer, whole pages.
    pub(crate) fn layer_bytes(&self) -> u64 {
        self.pages.count() * PAGE
    }

    /// Returns where the bytes of `range` come from, in order, cut off at the end of the file.
    pub(crate) fn sources(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Source)> {
        let end = range.end.min(self.size);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let run = self.pages.run_end(at / PAGE, end.div_ceil(PAGE)) * PAGE;
            let (stop, source) = if self.pages.contains(at / PAGE) {
                (run, Source::Layer)
            } else if at < self.lower_limit {
                (run.min(self.lower_limit), Source::Lower)
            } else {
                (run, Source::Zeros)
            };
            let part = at..stop.min(end);
            at = part.end;
            Some((part, source))
        })
    }

    /// Returns the bytes before and after `range` in its first and last page that must be brought
    /// up from the lower before `range` may be stored; either may be empty.
    pub(crate) fn copy_up(&self, range: &Range<u64>) -> [Range<u64>; 2] {
        if range.is_empty() {
            return [0..0, 0..0];
        }
        let head = range.start - range.start % PAGE;
        let last = (range.end - 1) / PAGE;
        let needed = |page: u64, bytes: Range<u64>| {
            let end = bytes.end.min(self.lower_limit);
            if self.pages.contains(page) || end <= bytes.start { 0..0 } else { bytes.start..end }
        };
        [needed(head / PAGE, head..range.start), needed(last, range.end..(last + 1) * PAGE)]
    }

    /// Returns the bytes of the pages that `range` touches and for which the layer has no space yet.
    pub(crate) fn new_bytes(&self, range: &Range<u64>) -> u64 {
        let has_space = |page: &u64| self.pages.contains(*page) || self.reserved.contains(*page);
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        let new = pages.filter(|page| !range.is_empty() && !has_space(page));
        new.count() as u64 * PAGE
    }

    /// Notes that the layer now has space for all pages that `range` touches.
    pub(crate) fn reserved(&mut self, range: &Range<u64>) {
        self.reserved.insert(range.start / PAGE..range.end.div_ceil(PAGE));
    }

    /// Notes that the layer now holds all pages that `range` touches, and that the file reaches to
    /// its end.
    pub(crate) fn stored(&mut self, range: &Range<u64>) {
        if !range.is_empty() {
            self.pages.insert(range.start / PAGE..range.end.div_ceil(PAGE));
            self.size = self.size.max(range.end);
        }
    }

    /// Notes that the file reaches at least to `size`; new bytes are zeros.
    pub(crate) fn grown_to(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    /// Notes a new size; bytes beyond it are gone for good.
    pub(crate) fn truncated(&mut self, size: u64) {
        self.size = size;
        self.lower_limit = self.lower_limit.min(size);
        self.pages.remove_from(size.div_ceil(PAGE));
        self.reserved.remove_from(size.div_ceil(PAGE));
    }

    /// Returns where storing stops to be necessary for zeros: from here on a page not in the layer
    /// is zero anyway.
    pub(crate) fn zeros_from(&self) -> u64 {
        self.lower_limit.div_ceil(PAGE) * PAGE
    }

    /// Returns where the lower's bytes end.
    pub(crate) fn lower_limit(&self) -> u64 {
        self.lower_limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(lower: u64, stored: Range<u64>) -> Content {
        let mut content = Content::of_lower(lower);
        content.stored(&stored);
        content
    }

    #[test]
    fn names_the_source_of_each_byte() {
        use Source::{Layer, Lower, Zeros};
        let page = PAGE;
        let cases = [
            ("untouched", content(5000, 0..0), 0..9000, vec![(0..5000, Lower)]),
            ("beyond the end", content(5000, 0..0), 6000..9000, vec![]),
            (
                "a page in the middle",
                content(3 * page, page..2 * page),
                10..3 * page,
                vec![(10..page, Lower), (page..2 * page, Layer), (2 * page..3 * page, Lower)],
            ),
            (
                "a hole after the lower's end",
                content(100, 2 * page..2 * page + 1),
                0..9000,
                vec![(0..100, Lower), (100..2 * page, Zeros), (2 * page..2 * page + 1, Layer)],
            ),
        ];
        for (name, content, range, want) in cases {
            assert_eq!(content.sources(range).collect::<Vec<_>>(), want, "{name}");
        }
    }

    #[test]
    fn truncated_bytes_do_not_come_back() {
        let mut content = content(3 * PAGE, PAGE..2 * PAGE);
        content.truncated(100);
        content.grown_to(3 * PAGE);
        let sources: Vec<_> = content.sources(0..3 * PAGE).collect();
        assert_eq!(sources, [(0..100, Source::Lower), (100..3 * PAGE, Source::Zeros)]);
        assert_eq!(content.layer_bytes(), 0);
    }

    #[test]
    fn brings_up_only_what_a_write_leaves_of_its_pages() {
        let cases = [
            ("whole pages need nothing", content(9 * PAGE, 0..0), PAGE..3 * PAGE, [0..0, 0..0]),
            ("inside one page", content(9 * PAGE, 0..0), 10..20, [0..10, 20..PAGE]),
            ("across two", content(9 * PAGE, 0..0), 10..PAGE + 1, [0..10, PAGE + 1..2 * PAGE]),
            ("the page is there already", content(9 * PAGE, 0..1), 10..20, [0..0, 0..0]),
            ("up to the lower's end only", content(50, 0..0), 10..20, [0..10, 20..50]),
            ("appending at a page", content(PAGE, 0..0), PAGE..PAGE + 9, [0..0, 0..0]),
            ("appending inside a page", content(50, 0..0), 50..60, [0..50, 0..0]),
            ("nothing", content(50, 0..0), 10..10, [0..0, 0..0]),
            ("the file's last bytes", content(50, 0..0), 0..50, [0..0, 0..0]),
        ];
        for (name, content, range, want) in cases {
            assert_eq!(content.copy_up(&range), want, "{name}");
        }
    }

    #[test]
    fn only_pages_without_space_need_any() {
        let mut content = content(9 * PAGE, PAGE..3 * PAGE);
        content.reserved(&(11 * PAGE..12 * PAGE));
        let cases = [
            ("nothing", 5..5, 0),
            ("stored", PAGE + 1..3 * PAGE, 0),
            ("a byte", 0..1, 1),
            ("before, in and after", PAGE - 1..3 * PAGE + 1, 2),
            ("beyond the end", 20 * PAGE..22 * PAGE, 2),
            ("reserved", 10 * PAGE..13 * PAGE, 2),
        ];
        for (name, range, pages) in cases {
            assert_eq!(content.new_bytes(&range), pages * PAGE, "{name}");
        }
        content.truncated(11 * PAGE);
        assert_eq!(content.new_bytes(&(0..13 * PAGE)), 11 * PAGE, "truncating gives space back");
    }
}
