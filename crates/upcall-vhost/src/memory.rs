//! Where the guest's memory is mapped in this process.
//!
//! A table is immutable: a change makes a new one, which queues pick up when they next
//! take requests. Requests in flight keep the mappings that they use.
//!
//! Guest-physical addresses stand in descriptors; the hypervisor's own virtual ("user")
//! addresses say where the rings are. Guest-physical regions never overlap. User addresses
//! may: a hypervisor may show one page at two places.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use upcall_ring::{Access, Buffers, Mapping};

use crate::crash;

/// Most regions of a table.
pub const MEMORY_SLOTS_MAX: usize = 256;

/// `mmap` wants offsets in files to be multiples of it.
const PAGE_SIZE: u64 = 4096;

/// Why memory was not accepted. The hypervisor's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum MemoryError {
    /// An address or offset plus the size is past the end of all addresses, or it is empty.
    #[error("no memory region: {0:x?}")]
    NotARegion(RegionAddress),
    /// It shares guest-physical addresses with another region.
    #[error("{new:x?} overlaps {old:x?}")]
    Overlap { new: RegionAddress, old: RegionAddress },
    /// There are [`MEMORY_SLOTS_MAX`] already.
    #[error("more than {MEMORY_SLOTS_MAX} memory regions")]
    TooMany,
    /// No region has exactly this address and size.
    #[error("no such memory region to remove: {0:x?}")]
    Unknown(RegionAddress),
    /// The file cannot be mapped: too short, or not memory.
    #[error("cannot map {address:x?}")]
    Map { address: RegionAddress, source: std::io::Error },
}

/// Where a region is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAddress {
    /// The first guest-physical address.
    pub guest: u64,
    /// The first address in the hypervisor's memory.
    pub user: u64,
    /// The size.
    pub length: u64,
}

/// A region, mapped.
#[derive(Clone)]
pub struct Region {
    address: RegionAddress,
    mapping: Arc<Mapping>,
    /// Where in `mapping` it begins.
    skip: usize,
}

impl Region {
    /// Maps the bytes of `file` from `file_offset` on. The file is as long as that already.
    pub fn map(
        address: RegionAddress,
        file: impl AsFd,
        file_offset: u64,
    ) -> Result<Region, MemoryError> {
        let RegionAddress { guest, user, length } = address;
        let skip = file_offset % PAGE_SIZE;
        let mapped_length = length.checked_add(skip);
        if length == 0
            || guest.checked_add(length).is_none()
            || user.checked_add(length).is_none()
            || mapped_length.is_none()
        {
            return Err(MemoryError::NotARegion(address));
        }
        let length =
            usize::try_from(length + skip).map_err(|_| MemoryError::NotARegion(address))?;
        let mapping = Mapping::new(file, file_offset - skip, length, Access::ReadWrite)
            .map_err(|source| MemoryError::Map { address, source })?;
        Ok(Region { address, mapping: Arc::new(mapping), skip: skip as usize })
    }

    /// Where it is.
    pub fn address(&self) -> RegionAddress {
        self.address
    }

    /// How far into it our own address `at` is. For tests, which check where requests point.
    #[cfg(any(test, feature = "mock"))]
    pub(crate) fn offset_of(&self, at: *const u8) -> Option<usize> {
        let whole = upcall_ring::Buffers::of(&self.mapping, self.skip, 1, false)?;
        let (start, _) = whole.addresses().next()?;
        let offset = (at as usize).checked_sub(start as usize)?;
        (offset < self.address.length as usize).then_some(offset)
    }

    /// What of `[at, at + length)` lies in it, if `at` does: offset in the mapping, bytes.
    fn guest_part(&self, at: u64, length: u64) -> Option<(usize, usize)> {
        let inside = at.checked_sub(self.address.guest)?;
        let left = self.address.length.checked_sub(inside).filter(|left| *left > 0)?;
        Some((self.skip + inside as usize, left.min(length) as usize))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x?}", self.address)
    }
}

/// A place in a writable mapping, which it keeps. Whoever found it made sure that all that
/// is loaded and stored is inside and aligned; numbers are little endian.
///
/// All stores of this crate to memory that outlives the process are here, in the order in
/// which they are written down: each after those before it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub mapping: Arc<Mapping>,
    pub offset: usize,
}

impl Place {
    pub fn load_u8(&self, at: usize) -> u8 {
        let byte = self.mapping.read_array::<1>(self.offset + at);
        debug_assert!(byte.is_some());
        byte.map_or(0, |[byte]| byte)
    }

    pub fn load_u16(&self, at: usize, ordering: Ordering) -> u16 {
        let number = self.mapping.atomic_u16(self.offset + at);
        debug_assert!(number.is_some());
        number.map_or(0, |number| u16::from_le(number.load(ordering)))
    }

    pub fn load_u32(&self, at: usize) -> u32 {
        let number = self.mapping.atomic_u32(self.offset + at);
        debug_assert!(number.is_some());
        number.map_or(0, |number| u32::from_le(number.load(Ordering::Relaxed)))
    }

    pub fn load_u64(&self, at: usize) -> u64 {
        let number = self.mapping.atomic_u64(self.offset + at);
        debug_assert!(number.is_some());
        number.map_or(0, |number| u64::from_le(number.load(Ordering::Relaxed)))
    }

    /// `None` if not all of it is inside.
    pub fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.mapping.read_array(self.offset + at)
    }

    pub fn store_u8(&self, at: usize, value: u8) {
        // A copy of one byte is no atomic: keep the stores around it where they are.
        compiler_fence(Ordering::SeqCst);
        self.write(at, &[value]);
        compiler_fence(Ordering::SeqCst);
    }

    pub fn store_u16(&self, at: usize, value: u16, ordering: Ordering) {
        crash::point();
        let stored = self.mapping.store_u16(self.offset + at, value.to_le(), ordering);
        debug_assert!(stored);
    }

    pub fn store_u32(&self, at: usize, value: u32) {
        crash::point();
        let number = self.mapping.atomic_u32(self.offset + at);
        debug_assert!(number.is_some());
        if let Some(number) = number {
            number.store(value.to_le(), Ordering::Release);
        }
    }

    pub fn store_u64(&self, at: usize, value: u64) {
        crash::point();
        let number = self.mapping.atomic_u64(self.offset + at);
        debug_assert!(number.is_some());
        if let Some(number) = number {
            number.store(value.to_le(), Ordering::Release);
        }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        crash::point();
        let written = self.mapping.write(self.offset + at, bytes);
        debug_assert!(written.is_some());
    }
}

/// All memory of a guest.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest-physical address.
    regions: Vec<Region>,
}

impl GuestMemory {
    /// The table of exactly these regions.
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Result<GuestMemory, MemoryError> {
        regions.into_iter().try_fold(GuestMemory::default(), |memory, region| memory.with(region))
    }

    /// How many regions.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// The table with one region more.
    pub fn with(&self, region: Region) -> Result<GuestMemory, MemoryError> {
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(MemoryError::TooMany);
        }
        let new = region.address;
        let overlaps = |old: &&Region| {
            let old = old.address;
            new.guest < old.guest + old.length && old.guest < new.guest + new.length
        };
        if let Some(old) = self.regions.iter().find(overlaps) {
            return Err(MemoryError::Overlap { new, old: old.address });
        }
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|old| old.address.guest < new.guest);
        regions.insert(at, region);
        Ok(GuestMemory { regions })
    }

    /// The table without the region that is exactly at `address`.
    pub fn without(&self, address: RegionAddress) -> Result<GuestMemory, MemoryError> {
        let mut regions = self.regions.clone();
        match regions.iter().position(|region| region.address == address) {
            Some(at) => {
                regions.remove(at);
                Ok(GuestMemory { regions })
            }
            None => Err(MemoryError::Unknown(address)),
        }
    }

    /// The mapped pieces of `length` bytes at guest-physical `at`, in order: all of them,
    /// or the last item is `None`.
    fn pieces(
        &self,
        at: u64,
        length: u64,
    ) -> impl Iterator<Item = Option<(&Region, usize, usize)>> {
        let (mut at, mut left) = (at, length);
        let mut index = self.regions.partition_point(|region| region.address.guest <= at);
        index = index.saturating_sub(1);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let piece = self.regions.get(index).and_then(|region| {
                let (offset, length) = region.guest_part(at, left)?;
                Some((region, offset, length))
            });
            match piece {
                Some((_, _, length)) => {
                    // At the end of a region `at` may be past all addresses only if
                    // nothing is left: regions end inside them.
                    at = at.saturating_add(length as u64);
                    left -= length as u64;
                    index += 1;
                }
                None => left = 0,
            }
            Some(piece)
        })
    }

    /// Adds `length` bytes at guest-physical `at` to `buffers`, across adjacent regions.
    /// False if not all of them are memory; `buffers` is then of no use.
    #[must_use]
    pub fn push(&self, at: u64, length: u64, writable: bool, buffers: &mut Buffers) -> bool {
        self.pieces(at, length).all(|piece| {
            piece.is_some_and(|(region, offset, length)| {
                buffers.push(&region.mapping, offset, length, writable)
            })
        })
    }

    /// Copies bytes at guest-physical `at` out, across adjacent regions; `None` if not all
    /// of them are memory.
    #[must_use]
    pub fn read(&self, at: u64, into: &mut [u8]) -> Option<()> {
        let mut done = 0;
        for piece in self.pieces(at, into.len() as u64) {
            let (region, offset, length) = piece?;
            region.mapping.read(offset, &mut into[done..done + length])?;
            done += length;
        }
        Some(())
    }

    /// The byte at guest-physical `at`.
    pub(crate) fn byte(&self, at: u64) -> Option<Place> {
        let (region, offset, _) = self.pieces(at, 1).next()??;
        Some(Place { mapping: region.mapping.clone(), offset })
    }

    /// `length` bytes at the hypervisor's address `at`, all in one region.
    pub(crate) fn user_range(&self, at: u64, length: u64) -> Option<Place> {
        let (region, inside) = self.user_region(at, length)?;
        let offset = region.skip + usize::try_from(inside).ok()?;
        Some(Place { mapping: region.mapping.clone(), offset })
    }

    /// The guest-physical address of the same, or one of them.
    pub(crate) fn guest_address(&self, at: u64, length: u64) -> Option<u64> {
        self.user_region(at, length).map(|(region, inside)| region.address.guest + inside)
    }

    /// A region that has all of these bytes, and how far into it they begin.
    fn user_region(&self, at: u64, length: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let inside = at.checked_sub(region.address.user)?;
            (inside.checked_add(length)? <= region.address.length).then_some((region, inside))
        })
    }

    /// The first guest-physical address behind all of it.
    pub(crate) fn end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.address.guest + region.address.length)
    }
}
