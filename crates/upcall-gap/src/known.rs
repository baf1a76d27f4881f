//! Which granules are known to be marked durably: read by queue threads without a lock.
//!
//! Always true: a bit is set here only after the file says so durably, and is taken away
//! before a clear begins to rely on it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::span::Span;

/// Words of the first chunk; each further one has twice as many as the one before.
const FIRST_WORDS: usize = 1 << 10;
/// Enough for any capacity.
const CHUNKS: usize = 40;

/// A bitmap that grows under its readers: chunks are added and never moved.
pub(crate) struct Known {
    chunks: [OnceLock<Box<[AtomicU64]>>; CHUNKS],
}

impl Known {
    pub fn new() -> Known {
        Known { chunks: [const { OnceLock::new() }; CHUNKS] }
    }

    /// Whether all of it is known. Any thread; no lock, no system call.
    pub fn contains(&self, span: Span) -> bool {
        // Acquire: who sees a mark also sees what made it durable.
        span.words().all(|(word, mask)| {
            self.word(word).is_some_and(|bits| bits.load(Ordering::Acquire) & mask == mask)
        })
    }

    /// It has become durable.
    pub fn insert(&self, span: Span) {
        for (word, mask) in span.words() {
            self.make_word(word).fetch_or(mask, Ordering::Release);
        }
    }

    /// All bits of a word at once.
    pub fn insert_word(&self, word: usize, bits: u64) {
        if bits != 0 {
            self.make_word(word).fetch_or(bits, Ordering::Release);
        }
    }

    /// It must be asked for again.
    pub fn remove(&self, span: Span) {
        // Release is enough: that a queue thread has seen the removal is known only from what
        // the remover and that thread say to each other afterwards.
        for (word, mask) in span.words() {
            if let Some(bits) = self.word(word) {
                bits.fetch_and(!mask, Ordering::Release);
            }
        }
    }

    fn word(&self, word: usize) -> Option<&AtomicU64> {
        let (chunk, index) = place(word);
        self.chunks[chunk].get()?.get(index)
    }

    fn make_word(&self, word: usize) -> &AtomicU64 {
        let (chunk, index) = place(word);
        let make = || (0..FIRST_WORDS << chunk).map(|_| AtomicU64::new(0)).collect();
        &self.chunks[chunk].get_or_init(make)[index]
    }
}

/// The chunk of a word, and its place in there: chunk `c` begins with word
/// `FIRST_WORDS * (2^c - 1)`.
fn place(word: usize) -> (usize, usize) {
    let shifted = word + FIRST_WORDS;
    let chunk = (shifted.ilog2() - FIRST_WORDS.ilog2()) as usize;
    (chunk, shifted - (FIRST_WORDS << chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_has_a_place_of_its_own() {
        let mut expected = (0, 0);
        for word in 0..100_000 {
            assert_eq!(place(word), expected);
            expected.1 += 1;
            if expected.1 == FIRST_WORDS << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn a_span_is_known_when_all_of_it_is() {
        let known = Known::new();
        let span = Span { first: 65_530, end: 65_700 };
        assert!(!known.contains(span));
        known.insert(span);
        assert!(known.contains(span));
        assert!(!known.contains(Span { first: 65_529, end: 65_531 }));
        known.remove(Span { first: 65_600, end: 65_601 });
        assert!(!known.contains(span));
        assert!(known.contains(Span { first: 65_601, end: 65_700 }));
    }
}
