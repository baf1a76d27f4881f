//! Pieces of shared memory, for the kernel or for a copy.

use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::mapping::{Keep, Mapping, copy};

/// A piece of a [`Mapping`]. Only [`Buffers`] can do something with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a segment is an address; using it needs a `Buffers`, whose rules allow any thread.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    pub(crate) fn new(start: NonNull<u8>, length: usize) -> Segment {
        Segment { start, length }
    }
}

/// The memory of one request: pieces, and what keeps them mapped as long as this lives.
///
/// Everything is bytes that others may change at any time: reading gives old, new or torn
/// bytes.
#[derive(Clone, Default)]
pub struct Buffers {
    segments: SmallVec<[Segment; 4]>,
    length: usize,
    keep: SmallVec<[Keep; 1]>,
}

impl Buffers {
    /// No memory.
    pub fn new() -> Buffers {
        Buffers::default()
    }

    /// Adds `length` bytes at `offset` of `mapping`. `writable`: they shall be filled. False,
    /// and nothing added, if the mapping has no such bytes or may not be written.
    #[must_use]
    pub fn push(
        &mut self,
        mapping: &Arc<Mapping>,
        offset: usize,
        length: usize,
        writable: bool,
    ) -> bool {
        let Some(segment) = mapping.segment(offset, length, writable) else {
            return false;
        };
        let is_it = |known: &Keep| std::ptr::addr_eq(Arc::as_ptr(known), Arc::as_ptr(mapping));
        if !self.keep.iter().any(is_it) {
            self.keep.push(mapping.clone());
        }
        self.segments.push(segment);
        self.length += length;
        true
    }

    /// Memory that is one piece of a mapping; `None` as in [`push`](Self::push).
    pub fn of(
        mapping: &Arc<Mapping>,
        offset: usize,
        length: usize,
        writable: bool,
    ) -> Option<Buffers> {
        let mut buffers = Buffers::new();
        buffers.push(mapping, offset, length, writable).then_some(buffers)
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many pieces.
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Address and length of each piece, for a system call. The memory stays mapped as long
    /// as this `Buffers` (or a clone) lives; nobody may make a Rust reference of an address.
    pub fn addresses(&self) -> impl ExactSizeIterator<Item = (*mut u8, usize)> {
        self.segments.iter().map(|segment| (segment.start.as_ptr(), segment.length))
    }

    /// Whether addresses and lengths of all pieces are multiples of `alignment` bytes.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.addresses().all(|(at, length)| (at as usize | length).is_multiple_of(alignment))
    }

    /// The part that begins `skip` bytes in and is at most `length` bytes long.
    #[must_use]
    pub fn part(&self, skip: usize, length: usize) -> Buffers {
        let mut part = Buffers { keep: self.keep.clone(), ..Buffers::default() };
        let (mut skip, mut left) = (skip, length);
        for segment in &self.segments {
            let here = skip.min(segment.length);
            skip -= here;
            let length = (segment.length - here).min(left);
            if length > 0 {
                // SAFETY: `here <= segment.length`, so the address is in the segment.
                let start = unsafe { segment.start.add(here) };
                part.segments.push(Segment { start, length });
                part.length += length;
                left -= length;
            }
        }
        part
    }

    /// Copies all bytes to `target`, which must have the same length. Panics otherwise (our
    /// own bug: lengths were checked when the request was made).
    pub fn copy_to(&self, target: &Buffers) {
        assert_eq!(self.length, target.length, "copy between requests of different length");
        let (mut sources, mut targets) = (self.addresses(), target.addresses());
        let (mut source, mut target) = (sources.next(), targets.next());
        while let (Some((from, from_length)), Some((into, into_length))) = (source, target) {
            let length = from_length.min(into_length);
            // SAFETY: both pieces are mapped while `self` and `target` live, and `length` is
            // within both; `copy` bears concurrent changes (and overlap, as memmove).
            unsafe { copy(from, into, length) };
            let rest = |at: *mut u8, left: usize, next: &mut dyn Iterator<Item = _>| {
                if left > length {
                    // SAFETY: `length` bytes of the piece are used up; the rest follows.
                    Some((unsafe { at.add(length) }, left - length))
                } else {
                    next.next()
                }
            };
            source = rest(from, from_length, &mut sources);
            target = rest(into, into_length, &mut targets);
        }
    }

    /// Copies bytes from `skip` on out; panics if they are not all there.
    pub fn read(&self, skip: usize, into: &mut [u8]) {
        assert!(skip + into.len() <= self.length);
        let mut done = 0;
        for (at, length) in self.part(skip, into.len()).addresses() {
            // SAFETY: the piece is mapped while `self` lives; `done + length <= into.len()`.
            unsafe { copy(at, into[done..].as_mut_ptr(), length) };
            done += length;
        }
    }

    /// Copies bytes in from `skip` on; panics if there is no room. The pieces must have
    /// been pushed as writable.
    pub fn write(&self, skip: usize, from: &[u8]) {
        assert!(skip + from.len() <= self.length);
        let mut done = 0;
        for (at, length) in self.part(skip, from.len()).addresses() {
            // SAFETY: as in `read`.
            unsafe { copy(from[done..].as_ptr(), at, length) };
            done += length;
        }
    }

    /// Fills everything with zeroes. The pieces must have been pushed as writable.
    pub fn zero(&self) {
        for (at, length) in self.addresses() {
            // SAFETY: the piece is mapped while `self` lives.
            unsafe { std::ptr::write_bytes(at, 0, length) };
        }
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes in {} pieces", self.length, self.segments.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, memfd};

    fn mapping() -> Arc<Mapping> {
        let fd = memfd("test", 4096).unwrap();
        Arc::new(Mapping::new(&fd, 0, 4096, Access::ReadWrite).unwrap())
    }

    #[test]
    fn a_copy_crosses_pieces_of_different_length() {
        let (a, b) = (mapping(), mapping());
        let text: Vec<u8> = (0..100).collect();
        a.write(10, &text).unwrap();
        let mut source = Buffers::new();
        assert!(source.push(&a, 10, 33, false) && source.push(&a, 43, 67, false));
        let mut target = Buffers::new();
        assert!(
            target.push(&b, 500, 1, true)
                && target.push(&b, 1000, 60, true)
                && target.push(&b, 0, 39, true)
        );
        source.copy_to(&target);
        let mut seen = vec![0; 100];
        target.read(0, &mut seen);
        assert_eq!(seen, text);
        target.part(20, 50).read(5, &mut seen[..10]);
        assert_eq!(seen[..10], text[25..35]);
        target.zero();
        assert_eq!(b.read_array::<1>(500), Some([0]));
    }

    #[test]
    fn pieces_outside_the_mapping_are_refused() {
        let a = mapping();
        let mut buffers = Buffers::new();
        assert!(!buffers.push(&a, 4000, 97, false));
        assert!(buffers.is_empty());
        assert_eq!(buffers.segment_count(), 0);
    }

    #[test]
    fn memory_stays_mapped_as_long_as_its_buffers() {
        let a = mapping();
        let buffers = Buffers::of(&a, 0, 16, true).unwrap();
        drop(a);
        buffers.write(0, &[7; 16]);
        let mut seen = [0; 16];
        buffers.read(0, &mut seen);
        assert_eq!(seen, [7; 16]);
    }
}
