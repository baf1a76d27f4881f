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

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u32) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ z >> 31) % u64::from(limit)) as u32
        }
    }

    /// The same promise, as slow as it is plain.
    struct Reference {
        used: Vec<bool>,
        next: usize,
    }

    impl Reference {
        fn take(&mut self, count: usize) -> Option<usize> {
            let all = self.used.len();
            let fits = |first: &usize| {
                first + count <= all && self.used[*first..first + count].iter().all(|used| !used)
            };
            let first = (self.next..all).chain(0..self.next).find(fits)?;
            self.used[first..first + count].fill(true);
            self.next = first + count;
            Some(first)
        }
    }

    /// One random world; sizes and the share of frees are drawn so that arenas are empty,
    /// full and full of holes.
    fn world(seed: u64) {
        let mut random = Random(seed);
        let count = 1 + random.below(300);
        let longest = count.min(1 + random.below(200));
        let frees = 1 + random.below(8);
        let mut pages = Pages::new(count);
        let mut reference = Reference { used: vec![false; count as usize], next: 0 };
        let mut taken = Vec::new();
        for step in 0..400 {
            let context = format!("seed {seed}, step {step}");
            if random.below(10) < frees && !taken.is_empty() {
                let (first, length) = taken.swap_remove(random.below(taken.len() as u32) as usize);
                pages.give_back(first, length);
                reference.used[first as usize..(first + length) as usize].fill(false);
            } else {
                let length = 1 + random.below(longest);
                let first = pages.take(length);
                let expected = reference.take(length as usize);
                assert_eq!(first.map(|first| first as usize), expected, "{context}");
                taken.extend(first.map(|first| (first, length)));
            }
            let used = reference.used.iter().filter(|used| **used).count();
            assert_eq!(pages.in_use() as usize, used, "{context}");
        }
    }

    #[test]
    fn random_takes_and_returns_agree_with_the_reference() {
        let seed = std::env::var("UPCALL_SEED").ok().map(|text| text.parse().expect("UPCALL_SEED"));
        match seed {
            Some(seed) => world(seed),
            None => (0..2000).for_each(world),
        }
    }

    #[test]
    fn runs_cross_words_and_the_whole_is_one_run() {
        let mut pages = Pages::new(200);
        assert_eq!(pages.take(201), None);
        assert_eq!(pages.take(200), Some(0));
        assert_eq!(pages.take(1), None);
        pages.give_back(60, 70);
        assert_eq!(pages.take(71), None);
        assert_eq!(pages.take(70), Some(60));
        assert_eq!(pages.in_use(), 200);
    }

    #[test]
    #[should_panic = "free pages given back"]
    fn pages_are_not_given_back_twice() {
        let mut pages = Pages::new(100);
        pages.take(70).unwrap();
        pages.give_back(60, 10);
        pages.give_back(50, 11);
    }
}
