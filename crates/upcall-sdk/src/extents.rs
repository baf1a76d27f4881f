//! What a disk consists of, as its store knows it.

use crate::{Errno, Instance, sys};

/// What a stretch of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Anything.
    Data,
    /// Takes space and reads as zeroes.
    Zero,
    /// Takes no space and reads as zeroes.
    Hole,
}

/// A stretch of a disk that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; whole blocks, not 0.
    pub length: u64,
    /// What it is.
    pub allocation: Allocation,
}

impl Instance {
    /// What `length` bytes from `offset` on of a disk are, below the instance (disk 0), or of a
    /// granted disk (from 1): at least one extent and `max` at the most (1024), in a row from
    /// `offset` on; ask again for what they leave out. For a filter whose
    /// [`Info`](crate::Info) says `extents`.
    ///
    /// Data where nobody knows, and where a filter below decides data. A change of the chain can
    /// make it wrong: ask again after [`Event::Unstun`](crate::Event::Unstun). Blocks: call it from
    /// `open`, from blocking work or a thread of your own; elsewhere it is [`Errno`] EDEADLK.
    pub fn extents(
        &self,
        disk: u32,
        offset: u64,
        length: u64,
        max: usize,
    ) -> Result<Vec<Extent>, Errno> {
        let mut entries = vec![sys::Extent::default(); max.min(sys::EXTENTS_MAX)];
        let count = self.open_call(|services, raw| {
            let (at, max) = (entries.as_mut_ptr(), entries.len() as u32);
            // SAFETY: the instance is open; there is room for `max` entries.
            unsafe { (services.extents)(raw, disk, offset, length, at, max) }
        })?;
        let count = usize::try_from(count).map_err(|_| Errno::from_raw(-count))?;
        let extent = |entry: &sys::Extent| {
            let allocation = match entry.kind {
                sys::EXTENT_ZERO => Allocation::Zero,
                sys::EXTENT_HOLE => Allocation::Hole,
                _ => Allocation::Data,
            };
            Extent { length: entry.length.0, allocation }
        };
        Ok(entries.iter().take(count).map(extent).collect())
    }
}
