//! From a head index to checked pieces of memory.
//!
//! A chain is read once, descriptor by descriptor, into private memory; afterwards the
//! guest's copy does not matter. What comes out: readable pieces, then writable ones, none
//! of them empty. Where they are in memory is not looked at here, nor what they hold.
//!
//! A packed ring has its descriptors one after the other, and so have its indirect tables;
//! the ring has copied them already.
//!
//! Bounded by construction: a ring of 256 gives 256 descriptors at the most, and one
//! indirect table `INDIRECT_LENGTH_MAX` more.

use crate::memory::GuestMemory;
use crate::ring::{Descriptor, PackedDescriptor, PackedRing, Ring, SplitRing};
use crate::virtio::*;

/// Most descriptors of an indirect table. Guests go beyond their ring's size (Linux takes
/// `seg_max` + 2); QEMU has the same bound.
const INDIRECT_LENGTH_MAX: usize = 1024;

/// What is wrong with a chain. The guest's fault, and nothing that can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("a chain goes on at descriptor {next} of a table of {size}")]
    NextRange { next: u16, size: usize },
    #[error("a chain has more descriptors than its table of {size}")]
    Loop { size: usize },
    #[error("an indirect descriptor that was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect descriptor in an indirect table")]
    IndirectNested,
    #[error("an indirect descriptor that also has a next one")]
    IndirectNext,
    #[error("an indirect table of {length} bytes")]
    IndirectLength { length: u32 },
    #[error("an indirect table outside the guest's memory, at {address:#x}")]
    IndirectOutside { address: u64 },
    #[error("readable memory after writable")]
    Order,
}

/// Guest-physical memory: not empty, not yet known to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
}

/// How an indirect table is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    /// Each descriptor names the next.
    Linked,
    /// One after the other.
    InOrder,
}

/// A chain. Reused from one to the next, so that reading one needs no allocation.
#[derive(Debug, Default)]
pub struct Chain {
    pieces: Vec<Piece>,
    /// How many of them are readable.
    readable: usize,
    table: Vec<u8>,
}

impl Chain {
    /// What the driver wrote for the device.
    pub fn readable(&self) -> &[Piece] {
        &self.pieces[..self.readable]
    }

    /// What the device is to fill.
    pub fn writable(&self) -> &[Piece] {
        &self.pieces[self.readable..]
    }

    /// Reads the chain of a request that was taken, in place of what was here.
    pub fn read(
        &mut self,
        ring: &Ring,
        memory: &GuestMemory,
        slot: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        self.pieces.clear();
        self.readable = 0;
        match ring {
            Ring::Split(ring) => self.read_split(ring, memory, slot, indirect),
            Ring::Packed(ring) => self.read_packed(ring, memory, slot, indirect),
        }
    }

    fn read_split(
        &mut self,
        ring: &SplitRing,
        memory: &GuestMemory,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        let size = usize::from(ring.size());
        let mut next = head;
        for _ in 0..size {
            let descriptor = ring.descriptor(next).ok_or(ChainError::NextRange { next, size })?;
            if descriptor.is(DESC_INDIRECT) {
                return self.read_indirect(memory, descriptor, indirect, Table::Linked);
            }
            self.add(descriptor)?;
            if !descriptor.is(DESC_NEXT) {
                return Ok(());
            }
            next = descriptor.next;
        }
        Err(ChainError::Loop { size })
    }

    fn read_packed(
        &mut self,
        ring: &PackedRing,
        memory: &GuestMemory,
        slot: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        for descriptor in ring.descriptors(slot) {
            let PackedDescriptor { address, length, flags, .. } = descriptor;
            let descriptor = Descriptor { address, length, flags, next: 0 };
            if descriptor.is(DESC_INDIRECT) {
                return self.read_indirect(memory, descriptor, indirect, Table::InOrder);
            }
            self.add(descriptor)?;
        }
        Ok(())
    }

    fn read_indirect(
        &mut self,
        memory: &GuestMemory,
        descriptor: Descriptor,
        negotiated: bool,
        kind: Table,
    ) -> Result<(), ChainError> {
        if !negotiated {
            return Err(ChainError::IndirectNotNegotiated);
        }
        if descriptor.is(DESC_NEXT) {
            return Err(ChainError::IndirectNext);
        }
        let Descriptor { address, length, .. } = descriptor;
        let size = length as usize / DESC_SIZE;
        if !(length as usize).is_multiple_of(DESC_SIZE)
            || !(1..=INDIRECT_LENGTH_MAX).contains(&size)
        {
            return Err(ChainError::IndirectLength { length });
        }
        let mut table = std::mem::take(&mut self.table);
        table.resize(length as usize, 0);
        let result = match memory.read(address, &mut table) {
            Some(()) if kind == Table::InOrder => self.walk_in_order(&table),
            Some(()) => self.walk(&table, size),
            None => Err(ChainError::IndirectOutside { address }),
        };
        self.table = table;
        result
    }

    /// Follows an indirect table, copied already, from its first descriptor.
    fn walk(&mut self, table: &[u8], size: usize) -> Result<(), ChainError> {
        let (table, _) = table.as_chunks::<DESC_SIZE>();
        let mut next = 0;
        for _ in 0..size {
            let bytes = table.get(usize::from(next)).ok_or(ChainError::NextRange { next, size })?;
            let descriptor = Descriptor::parse(*bytes);
            if descriptor.is(DESC_INDIRECT) {
                return Err(ChainError::IndirectNested);
            }
            self.add(descriptor)?;
            if !descriptor.is(DESC_NEXT) {
                return Ok(());
            }
            next = descriptor.next;
        }
        Err(ChainError::Loop { size })
    }

    /// Follows the indirect table of a packed ring: all of it, whatever else flags say.
    fn walk_in_order(&mut self, table: &[u8]) -> Result<(), ChainError> {
        let (table, _) = table.as_chunks::<DESC_SIZE>();
        table.iter().try_for_each(|bytes| {
            let PackedDescriptor { address, length, flags, .. } = PackedDescriptor::parse(*bytes);
            self.add(Descriptor { address, length, flags: flags & DESC_WRITE, next: 0 })
        })
    }

    fn add(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let Descriptor { address, length, .. } = descriptor;
        let writable = descriptor.is(DESC_WRITE);
        if !writable && self.readable < self.pieces.len() {
            return Err(ChainError::Order);
        }
        if length > 0 {
            self.pieces.push(Piece { address, length });
            if !writable {
                self.readable = self.pieces.len();
            }
        }
        Ok(())
    }
}

/// Bytes of all `pieces`. Cannot overflow: a chain has some thousand pieces.
pub fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length)).sum()
}

/// `pieces` from `skip` bytes on, `length` bytes of them.
pub fn part(pieces: &[Piece], skip: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut skip, mut left) = (skip, length);
    pieces.iter().filter_map(move |piece| {
        let here = skip.min(piece.length.into());
        skip -= here;
        let length = (u64::from(piece.length) - here).min(left);
        left -= length;
        // An address past all addresses is no memory; saturated, it is none either.
        (length > 0).then(|| (piece.address.saturating_add(here), length))
    })
}
