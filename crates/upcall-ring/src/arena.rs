//! Hands out pages of shared memory, for the data of requests that filters see.
//!
//! An arena belongs to one thread. Its bookkeeping is private memory: what filters write to
//! the pages cannot touch it. It neither clears pages nor knows who can see them.

use std::io;
use std::sync::Arc;

use crate::pages::Pages;
use crate::{Buffers, Mapping};

/// Bytes of a page of an arena.
pub const PAGE_SIZE: usize = 4096;

/// Hands out the pages of a part of a mapping. One thread at a time; several arenas may
/// share a mapping if their parts do not overlap.
#[derive(Debug)]
pub struct Arena {
    mapping: Arc<Mapping>,
    offset: usize,
    pages: Pages,
}

/// Pages in a row that an [`Arena`] handed out. Owning it is owning the pages, so they
/// cannot be freed twice; dropping it instead of [`Arena::free`] loses them until the arena
/// ends.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "pages that are not freed are lost"]
pub struct ArenaSlice {
    offset: usize,
    length: u32,
}

impl ArenaSlice {
    /// Where the bytes begin: bytes from the start of the mapping, a multiple of the page
    /// size.
    pub fn offset(&self) -> u64 {
        self.offset as u64
    }

    /// Bytes, as asked for.
    pub fn length(&self) -> u32 {
        self.length
    }

    fn page_count(&self) -> u32 {
        page_count(self.length)
    }
}

/// At least one: no two slices are at the same place, even if they are empty.
fn page_count(length: u32) -> u32 {
    length.div_ceil(PAGE_SIZE as u32).max(1)
}

impl Arena {
    /// An arena over `length` bytes at `offset` of a writable mapping, both multiples of
    /// [`PAGE_SIZE`]; refused otherwise.
    pub fn new(mapping: Arc<Mapping>, offset: usize, length: usize) -> io::Result<Arena> {
        let whole = offset.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
        let count = u32::try_from(length / PAGE_SIZE);
        match (count, mapping.segment(offset, length, true)) {
            (Ok(count), Some(_)) if whole => {
                Ok(Arena { mapping, offset, pages: Pages::new(count) })
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{length} bytes at {offset} are not pages of a writable mapping of {} bytes",
                    mapping.len()
                ),
            )),
        }
    }

    /// Room for `length` bytes, in one piece. `None` if there is no such piece now.
    ///
    /// The bytes are what the last user left there.
    pub fn allocate(&mut self, length: u32) -> Option<ArenaSlice> {
        let first = self.pages.take(page_count(length))?;
        Some(ArenaSlice { offset: self.offset + first as usize * PAGE_SIZE, length })
    }

    /// Takes pages back. Panics if they are not from this arena (our own bug).
    pub fn free(&mut self, slice: ArenaSlice) {
        let first = slice.offset.checked_sub(self.offset).map(|bytes| bytes / PAGE_SIZE);
        let first = first.and_then(|first| u32::try_from(first).ok());
        self.pages
            .give_back(first.expect("a slice of another arena given back"), slice.page_count());
    }

    /// The first `length` bytes of a slice, writable. Panics if it is not that long or not
    /// from this arena (our own bug).
    ///
    /// They stay mapped as long as the buffers live, but stay this slice's only until it is
    /// freed.
    pub fn buffers(&self, slice: &ArenaSlice, length: u32) -> Buffers {
        assert!(length <= slice.length, "{length} bytes of a slice of {}", slice.length);
        Buffers::of(&self.mapping, slice.offset, length as usize, true)
            .expect("a slice is inside its arena's mapping")
    }

    /// Pages handed out and not yet freed.
    pub fn in_use_pages(&self) -> u32 {
        self.pages.in_use()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, memfd, read_only_view};

    fn mapping(pages: usize) -> Arc<Mapping> {
        let fd = memfd("test", pages * PAGE_SIZE).unwrap();
        Arc::new(Mapping::new(&fd, 0, pages * PAGE_SIZE, Access::ReadWrite).unwrap())
    }

    #[test]
    fn slices_are_whole_pages_inside_the_part_and_apart() {
        let mapping = mapping(8);
        let mut arena = Arena::new(mapping.clone(), 2 * PAGE_SIZE, 5 * PAGE_SIZE).unwrap();
        let one = arena.allocate(1).unwrap();
        let two = arena.allocate(PAGE_SIZE as u32 + 1).unwrap();
        let none = arena.allocate(0).unwrap();
        assert_eq!((one.offset(), one.length()), (2 * 4096, 1));
        assert_eq!((two.offset(), two.length()), (3 * 4096, 4097));
        assert_eq!((none.offset(), none.length()), (5 * 4096, 0));
        assert_eq!(arena.in_use_pages(), 4);
        assert_eq!(arena.allocate(2 * PAGE_SIZE as u32), None);
        assert_eq!(arena.allocate(u32::MAX), None);
        arena.free(two);
        assert_eq!(arena.in_use_pages(), 2);
        assert_eq!(arena.allocate(2 * PAGE_SIZE as u32).unwrap().offset(), 3 * 4096);
        arena.free(one);
        arena.free(none);
        assert_eq!(arena.in_use_pages(), 2);
    }

    #[test]
    fn the_buffers_of_a_slice_are_its_bytes_in_the_mapping() {
        let mapping = mapping(4);
        let mut arena = Arena::new(mapping.clone(), PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
        let slice = arena.allocate(600).unwrap();
        arena.buffers(&slice, 512).write(500, &[7; 12]);
        assert_eq!(mapping.read_array(slice.offset() as usize + 500), Some([7; 12]));
        assert_eq!(arena.buffers(&slice, 512).len(), 512);
        arena.free(slice);
    }

    #[test]
    fn a_part_that_is_not_writable_pages_of_the_mapping_is_refused() {
        let fd = memfd("test", 4 * PAGE_SIZE).unwrap();
        let view = read_only_view(&fd).unwrap();
        let view = Mapping::new(view, 0, 4 * PAGE_SIZE, Access::ReadOnly).unwrap();
        assert!(Arena::new(Arc::new(view), 0, PAGE_SIZE).is_err());
        for (offset, length) in
            [(0, 5 * 4096), (4096, 4 * 4096), (512, 4096), (0, 512), (usize::MAX - 4095, 4096)]
        {
            assert!(Arena::new(mapping(4), offset, length).is_err(), "{length} at {offset}");
        }
    }

    #[test]
    #[should_panic = "another arena"]
    fn a_slice_of_another_arena_is_not_taken_back() {
        let mapping = mapping(4);
        let mut low = Arena::new(mapping.clone(), 0, 2 * PAGE_SIZE).unwrap();
        let mut high = Arena::new(mapping, 2 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        low.free(high.allocate(4096).unwrap());
    }
}
