//! Which pages of an arena are in use: a bitmap, and nothing that knows of memory.
//!
//! Next-fit: the search for a run goes on where the last one ended and wraps once, so that
//! it rarely walks over what is in use. A search steps over whole words of 64 pages that are
//! in use or free, and over each hole in the words that are mixed.

/// Numbers of pages, from 0; each is in use or free.
#[derive(Debug)]
pub(crate) struct Pages {
    /// A bit per page, 1 for in use; the bits past `count` are never looked at.
    used: Vec<u64>,
    count: u32,
    in_use: u32,
    next: u32,
}

impl Pages {
    /// `count` free pages.
    pub(crate) fn new(count: u32) -> Pages {
        Pages { used: vec![0; count.div_ceil(64) as usize], count, in_use: 0, next: 0 }
    }

    pub(crate) fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Takes `count` (at least 1) free pages in a row: the number of the first one.
    pub(crate) fn take(&mut self, count: u32) -> Option<u32> {
        if count > self.count - self.in_use {
            return None;
        }
        // The second search may run into where the first one began: a run may lie across.
        let wrapped = self.next.saturating_add(count - 1).min(self.count);
        let first =
            self.find(self.next, self.count, count).or_else(|| self.find(0, wrapped, count))?;
        self.set(first, count, true);
        self.in_use += count;
        self.next = first + count;
        Some(first)
    }

    /// Gives pages back. They must be in use: anything else is our own bug, and panics.
    pub(crate) fn give_back(&mut self, first: u32, count: u32) {
        let end = first.checked_add(count).filter(|end| *end <= self.count);
        let end = end.expect("pages of another arena given back");
        assert!(self.run_end(first, end, true) == end, "free pages given back");
        self.set(first, count, false);
        self.in_use -= count;
    }

    /// The first run of `count` free pages from `at` on and before `end`.
    fn find(&self, mut at: u32, end: u32, count: u32) -> Option<u32> {
        loop {
            at = self.run_end(at, end, true);
            if end - at < count {
                return None;
            }
            let hole_end = self.run_end(at, at + count, false);
            if hole_end == at + count {
                return Some(at);
            }
            at = hole_end;
        }
    }

    /// The first page from `at` on and before `end` that is not `used`; `end` if all are.
    fn run_end(&self, mut at: u32, end: u32, used: bool) -> u32 {
        while at < end {
            let word = self.used[at as usize / 64];
            let differs = if used { !word } else { word } >> (at % 64);
            if differs != 0 {
                return (at + differs.trailing_zeros()).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn set(&mut self, first: u32, count: u32, used: bool) {
        let (mut at, end) = (first, first + count);
        while at < end {
            let in_word = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - in_word)) << (at % 64);
            let word = &mut self.used[at as usize / 64];
            *word = if used { *word | mask } else { *word & !mask };
            at += in_word;
        }
    }
}
