//! Ranges of granules, and the words of a bitmap that they touch.

/// Bytes of one granule: what one bit stands for.
pub const GRANULE: u64 = 64 << 10;

/// The granules `first..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub first: u64,
    pub end: u64,
}

impl Span {
    /// Every granule that has a byte in common with the range.
    pub fn touched(offset: u64, length: u64) -> Span {
        if length == 0 {
            return Span { first: 0, end: 0 };
        }
        Span { first: offset / GRANULE, end: offset.saturating_add(length).div_ceil(GRANULE) }
    }

    /// The granules that lie wholly in the range; the disk's last one may be a part of one.
    pub fn covered(offset: u64, length: u64, capacity: u64) -> Span {
        let end = offset.saturating_add(length);
        let end = if end >= capacity { granules(capacity) } else { end / GRANULE };
        let first = offset.div_ceil(GRANULE);
        Span { first, end: end.max(first) }
    }

    /// The words of a bitmap that it touches, each with the bits that are of it.
    pub fn words(self) -> impl Iterator<Item = (usize, u64)> {
        (self.first / 64..self.end.div_ceil(64)).map(move |word| {
            let low = self.first.saturating_sub(word * 64);
            let high = (self.end - word * 64).min(64);
            // Both shifts are below 64: low < 64 and 1 <= high <= 64.
            (word as usize, (u64::MAX << low) & (u64::MAX >> (64 - high)))
        })
    }
}

/// How many granules a disk has.
pub(crate) fn granules(capacity: u64) -> u64 {
    capacity.div_ceil(GRANULE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_exactly_the_bits_of_the_span() {
        for first in 0..140 {
            for end in first..200 {
                let mut bits = vec![];
                for (word, mask) in (Span { first, end }).words() {
                    bits.extend(
                        (0..64).filter(|bit| mask >> bit & 1 == 1).map(|b| word as u64 * 64 + b),
                    );
                }
                assert_eq!(bits, (first..end).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_touched_granule_is_marked_and_only_a_whole_one_is_cleared() {
        assert_eq!(Span::touched(GRANULE - 1, 2), Span { first: 0, end: 2 });
        assert_eq!(Span::touched(GRANULE, 0), Span { first: 0, end: 0 });
        let covered = |offset, length| Span::covered(offset, length, 3 * GRANULE - 512);
        assert_eq!(covered(0, 2 * GRANULE - 1), Span { first: 0, end: 1 });
        assert_eq!(covered(1, 2 * GRANULE - 1), Span { first: 1, end: 2 });
        assert_eq!(covered(0, 3 * GRANULE - 512), Span { first: 0, end: 3 }, "the short last one");
        assert_eq!(covered(1, 5), Span { first: 1, end: 1 });
    }
}
