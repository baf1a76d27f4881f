//! Requests that are done in parts: a write-zeroes that is done with writes, a discard of
//! several segments.

use std::iter::FusedIterator;
use std::num::NonZeroU32;

use upcall_block::{Range, Status};

/// Counts the parts of one request, which end in any order, and says how it ended as a
/// whole: as its first failure, or in success.
#[derive(Debug, PartialEq, Eq)]
pub struct Join {
    left: u32,
    status: Status,
}

impl Join {
    /// A request of so many parts.
    pub const fn new(parts: NonZeroU32) -> Join {
        Join { left: parts.get(), status: Ok(()) }
    }

    /// A part ended. The status of the whole when it was the last one; that is said once.
    ///
    /// A part that will not be started, because another one has failed, counts as ended
    /// with any error.
    pub fn handle_part(&mut self, status: Status) -> Option<Status> {
        debug_assert!(self.left > 0, "more parts ended than there are");
        self.left = self.left.checked_sub(1)?;
        self.status = self.status.and(status);
        (self.left == 0).then_some(self.status)
    }

    /// Whether a part has failed, so that the others need not be started.
    pub const fn has_failed(&self) -> bool {
        self.status.is_err()
    }
}

/// A range in parts of at most a given length, from its start to its end. Together they
/// are the range. An empty range has no parts.
#[derive(Clone, Debug)]
pub struct Chunks {
    range: Range,
    /// Bytes handed out.
    done: u32,
    length_max: NonZeroU32,
}

impl Chunks {
    /// The parts of `range`, each `length_max` bytes but the last, which may be shorter. To
    /// keep parts aligned, `length_max` is a multiple of the block size.
    pub const fn new(range: Range, length_max: NonZeroU32) -> Chunks {
        Chunks { range, done: 0, length_max }
    }
}

impl Iterator for Chunks {
    type Item = Range;

    fn next(&mut self) -> Option<Range> {
        let part = self.range.part(self.done, self.length_max.get());
        self.done += part.length();
        (part.length() > 0).then_some(part)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = (self.range.length() - self.done).div_ceil(self.length_max.get()) as usize;
        (count, Some(count))
    }
}

impl ExactSizeIterator for Chunks {}
impl FusedIterator for Chunks {}

#[cfg(test)]
mod tests {
    use upcall_block::Errno;

    use super::*;
    use crate::examples::disk;

    fn number(number: u32) -> NonZeroU32 {
        NonZeroU32::new(number).unwrap()
    }

    fn chunks(length: u64, length_max: u32) -> Vec<(u64, u32)> {
        let range = Range::new(1 << 20, length, &disk()).unwrap();
        let chunks = Chunks::new(range, number(length_max));
        let count = chunks.len();
        let parts: Vec<_> = chunks.map(|part| (part.offset(), part.length())).collect();
        assert_eq!(parts.len(), count, "the announced length");
        parts
    }

    #[test]
    fn a_request_in_parts_completes_once_when_all_have_ended() {
        let mut join = Join::new(number(3));
        assert_eq!(join.handle_part(Ok(())), None);
        assert_eq!(join.handle_part(Ok(())), None);
        assert_eq!(join.handle_part(Ok(())), Some(Ok(())));
    }

    #[test]
    fn the_first_failure_of_a_part_is_that_of_the_whole() {
        let mut join = Join::new(number(3));
        assert_eq!(join.handle_part(Ok(())), None);
        assert!(!join.has_failed());
        assert_eq!(join.handle_part(Err(Errno::ENOSPC)), None);
        assert!(join.has_failed());
        assert_eq!(join.handle_part(Err(Errno::EIO)), Some(Err(Errno::ENOSPC)));
    }

    #[test]
    #[cfg_attr(debug_assertions, should_panic = "more parts ended than there are")]
    fn a_part_too_many_completes_nothing() {
        let mut join = Join::new(number(1));
        assert_eq!(join.handle_part(Ok(())), Some(Ok(())));
        assert_eq!(join.handle_part(Ok(())), None);
    }

    #[test]
    fn chunks_are_the_range_from_start_to_end() {
        assert_eq!(
            chunks(10 << 10, 4096),
            [(1 << 20, 4096), ((1 << 20) + 4096, 4096), ((1 << 20) + 8192, 2048)]
        );
        assert_eq!(chunks(8192, 4096), [(1 << 20, 4096), ((1 << 20) + 4096, 4096)]);
        assert_eq!(chunks(512, u32::MAX), [(1 << 20, 512)]);
        assert_eq!(chunks(0, 4096), []);
        assert_eq!(chunks(0x7fff_fe00, 4 << 20).len(), 512, "the longest request there is");
    }
}
