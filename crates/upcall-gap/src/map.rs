//! What a filter missed, as it should be in the file; pure.
//!
//! A [`Map`] knows which granules are marked, which pages of the file do not say so yet, and
//! which marks were made while a clear is in progress. It reads and writes nothing.
//!
//! Always true: a granule that was marked stays marked until a clear that began after its last
//! mark finishes; and a page whose bits changed is dirty until [`Map::stored`] says that it
//! was made durable.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::{Bits, PAGE_WORDS, page_count, page_of_word};
use crate::span::{GRANULE, Span, granules};

/// A range of bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A clear in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClearId(u64);

/// See the module.
pub(crate) struct Map {
    capacity: u64,
    words: Vec<u64>,
    dirty: BTreeSet<u64>,
    clears: BTreeMap<u64, Clear>,
    next_clear: u64,
}

/// What is to be cleared, and what was marked again since.
struct Clear {
    span: Span,
    marked_again: BTreeMap<usize, u64>,
}

impl Map {
    /// Nothing marked.
    pub fn new(capacity: u64) -> Map {
        let words = vec![0; page_count(capacity) as usize * PAGE_WORDS];
        Map { capacity, words, dirty: BTreeSet::new(), clears: BTreeMap::new(), next_clear: 0 }
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// A page as the file has it; None: damaged, so all of it counts as marked, and the file
    /// shall say so.
    pub fn load(&mut self, page: u64, bits: Option<&Bits>) {
        let from = page as usize * PAGE_WORDS;
        let words = &mut self.words[from..from + PAGE_WORDS];
        match bits {
            Some(bits) => words.copy_from_slice(bits),
            None => {
                words.fill(u64::MAX);
                self.dirty.insert(page);
            }
        }
    }

    /// The disk has grown; what is new is not marked. Its pages are to be [`load`](Self::load)ed
    /// if the file had them already.
    pub fn grow(&mut self, capacity: u64) {
        if capacity > self.capacity {
            self.capacity = capacity;
            self.words.resize(page_count(capacity) as usize * PAGE_WORDS, 0);
        }
    }

    /// False: behind the disk's end, and nothing was marked.
    #[must_use]
    pub fn mark(&mut self, span: Span) -> bool {
        if span.end > granules(self.capacity) {
            return false;
        }
        for (word, mask) in span.words() {
            if self.words[word] & mask != mask {
                self.words[word] |= mask;
                self.dirty.insert(page_of_word(word));
            }
        }
        true
    }

    /// A mark is about to be reported: clears in progress must spare it.
    pub fn spare(&mut self, span: Span) {
        for clear in self.clears.values_mut() {
            let both =
                Span { first: span.first.max(clear.span.first), end: span.end.min(clear.span.end) };
            if both.first < both.end {
                for (word, mask) in both.words() {
                    *clear.marked_again.entry(word).or_default() |= mask;
                }
            }
        }
    }

    pub fn begin_clear(&mut self, span: Span) -> ClearId {
        let id = self.next_clear;
        self.next_clear += 1;
        self.clears.insert(id, Clear { span, marked_again: BTreeMap::new() });
        ClearId(id)
    }

    /// Clears what was not marked again.
    pub fn finish_clear(&mut self, id: ClearId) {
        let Some(clear) = self.clears.remove(&id.0) else { return };
        for (word, mask) in clear.span.words() {
            let mask = mask & !clear.marked_again.get(&word).copied().unwrap_or(0);
            if self.words[word] & mask != 0 {
                self.words[word] &= !mask;
                self.dirty.insert(page_of_word(word));
            }
        }
    }

    pub fn abandon_clear(&mut self, id: ClearId) {
        self.clears.remove(&id.0);
    }

    /// Pages that the file does not have as they are here, in order.
    pub fn dirty(&self) -> impl Iterator<Item = u64> {
        self.dirty.iter().copied()
    }

    /// All pages, for a file that has none.
    pub fn soil_all(&mut self) {
        self.dirty.extend(0..page_count(self.capacity));
    }

    /// These pages, as they are here, are durable. No mark and no finished clear may have come
    /// between taking their bits and this.
    pub fn stored(&mut self, pages: &[u64]) {
        pages.iter().for_each(|page| {
            self.dirty.remove(page);
        });
    }

    pub fn page(&self, page: u64) -> &Bits {
        let from = page as usize * PAGE_WORDS;
        (&self.words[from..from + PAGE_WORDS]).try_into().expect("a page has PAGE_WORDS words")
    }

    /// All words of bits, in order.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// What is marked, in order, joined, up to the disk's end.
    pub fn ranges(&self) -> Vec<Gap> {
        let mut ranges = Ranges::new(self.capacity);
        self.words.iter().for_each(|word| ranges.push_word(*word));
        ranges.finish()
    }
}

/// Joins the marks of words that come in order.
pub(crate) struct Ranges {
    capacity: u64,
    granule: u64,
    start: Option<u64>,
    found: Vec<Gap>,
}

impl Ranges {
    pub fn new(capacity: u64) -> Ranges {
        Ranges { capacity, granule: 0, start: None, found: vec![] }
    }

    pub fn push_word(&mut self, word: u64) {
        let is_uniform = if self.start.is_some() { word == u64::MAX } else { word == 0 };
        if is_uniform {
            self.granule += 64;
            return;
        }
        for bit in 0..64 {
            match (word >> bit & 1 == 1, self.start) {
                (true, None) => self.start = Some(self.granule),
                (false, Some(_)) => self.end_gap(),
                _ => {}
            }
            self.granule += 1;
        }
    }

    /// What was not pushed counts as marked from here on.
    pub fn push_rest_marked(&mut self) {
        if self.granule < granules(self.capacity) {
            self.start.get_or_insert(self.granule);
            self.granule = granules(self.capacity);
        }
    }

    pub fn finish(mut self) -> Vec<Gap> {
        self.end_gap();
        self.found
    }

    fn end_gap(&mut self) {
        let Some(start) = self.start.take() else { return };
        let offset = start * GRANULE;
        let end = (self.granule * GRANULE).min(self.capacity);
        if offset < end {
            self.found.push(Gap { offset, length: end - offset });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(first: u64, count: u64) -> Gap {
        Gap { offset: first * GRANULE, length: count * GRANULE }
    }

    #[test]
    fn ranges_are_joined_and_end_with_the_disk() {
        let mut map = Map::new(200 * GRANULE - 512);
        for (first, end) in [(0, 1), (63, 65), (65, 70), (100, 164), (199, 200)] {
            assert!(map.mark(Span { first, end }));
        }
        let last = Gap { offset: 199 * GRANULE, length: GRANULE - 512 };
        assert_eq!(map.ranges(), [gap(0, 1), gap(63, 7), gap(100, 64), last]);
    }

    #[test]
    fn a_mark_behind_the_end_is_refused_and_a_grown_disk_takes_it() {
        let mut map = Map::new(GRANULE);
        assert!(!map.mark(Span { first: 0, end: 2 }));
        assert_eq!(map.ranges(), []);
        map.grow(5000 * GRANULE);
        assert!(map.mark(Span { first: 4999, end: 5000 }));
        assert_eq!(map.ranges(), [gap(4999, 1)]);
    }

    #[test]
    fn marks_made_while_a_clear_is_in_progress_survive_it() {
        let mut map = Map::new(10 * GRANULE);
        assert!(map.mark(Span { first: 0, end: 10 }));
        let clear = map.begin_clear(Span { first: 2, end: 8 });
        assert!(map.mark(Span { first: 7, end: 9 }));
        map.spare(Span { first: 7, end: 9 });
        map.finish_clear(clear);
        assert_eq!(map.ranges(), [gap(0, 2), gap(7, 3)]);
    }

    #[test]
    fn an_abandoned_clear_clears_nothing_and_two_clears_do_not_disturb_each_other() {
        let mut map = Map::new(4 * GRANULE);
        assert!(map.mark(Span { first: 0, end: 4 }));
        let one = map.begin_clear(Span { first: 0, end: 4 });
        map.spare(Span { first: 1, end: 2 });
        let two = map.begin_clear(Span { first: 0, end: 2 });
        map.abandon_clear(one);
        map.finish_clear(one);
        assert_eq!(map.ranges(), [gap(0, 4)]);
        map.finish_clear(two);
        assert_eq!(map.ranges(), [gap(2, 2)]);
    }

    #[test]
    fn only_pages_whose_bits_changed_are_dirty_until_stored() {
        let mut map = Map::new(10_000 * GRANULE);
        assert!(map.mark(Span { first: 4031, end: 4033 }));
        assert_eq!(map.dirty().collect::<Vec<_>>(), [0, 1]);
        map.stored(&[0, 1]);
        assert!(map.mark(Span { first: 4031, end: 4033 }));
        assert_eq!(map.dirty().count(), 0, "marked already");
        assert!(map.mark(Span { first: 9999, end: 10_000 }));
        assert_eq!(map.dirty().collect::<Vec<_>>(), [2]);
    }
}
