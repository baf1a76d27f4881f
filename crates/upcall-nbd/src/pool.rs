//! The memory of one connection for the data of its commands.
//!
//! It is the connection's own: a client that never reads its replies holds this much, and
//! takes nothing from another. Made at the first command with data, and given back when
//! the connection has been idle.

use std::io;
use std::sync::Arc;

use upcall_block::DATA_LENGTH_MAX;
use upcall_ring::{Access, Arena, ArenaSlice, Buffers, Mapping, memfd};

/// Bytes: two of the largest commands.
const SIZE: usize = 2 * DATA_LENGTH_MAX as usize;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pool(Option<Arena>);

impl Pool {
    /// Room for `length` bytes; none: only when something else was freed.
    pub fn allocate(&mut self, length: u32) -> io::Result<Option<ArenaSlice>> {
        let arena = match &mut self.0 {
            Some(arena) => arena,
            none => {
                let fd = memfd("upcall-nbd", SIZE)?;
                let mapping = Mapping::new(&fd, 0, SIZE, Access::ReadWrite)?;
                none.insert(Arena::new(Arc::new(mapping), 0, SIZE)?)
            }
        };
        Ok(arena.allocate(length))
    }

    /// The first `length` bytes of `slice`, which is from here.
    pub fn buffers(&self, slice: &ArenaSlice, length: u32) -> Buffers {
        match &self.0 {
            Some(arena) => arena.buffers(slice, length),
            None => unreachable!("there is a slice, so there is an arena"),
        }
    }

    /// Takes pages back.
    pub fn free(&mut self, slice: ArenaSlice) {
        if let Some(arena) = &mut self.0 {
            arena.free(slice);
        }
    }

    /// Whether it holds memory that nobody uses.
    pub fn is_idle(&self) -> bool {
        self.0.as_ref().is_some_and(|arena| arena.in_use_pages() == 0)
    }

    /// Gives its memory back, if nobody uses it.
    pub fn release(&mut self) {
        if self.is_idle() {
            self.0 = None;
        }
    }
}
