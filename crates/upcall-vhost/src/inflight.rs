//! What a worker's successor needs: which requests are in flight, in shared memory.
//!
//! The frontend keeps a file of ours (GET_INFLIGHT_FD) over our death and hands it to whom
//! it connects to next (SET_INFLIGHT_FD). It holds a region for each ring, each on a
//! multiple of 64 bytes, laid out as the vhost-user specification has it for split and for
//! packed rings.
//!
//! Always true: what is read from a region is checked before it is used, as the file has
//! been in foreign hands; and a region is only ever written by the thread that serves its
//! ring, but for the write cache setting.
//!
//! That setting is ours alone. Nobody tells a new worker that the guest has switched its
//! write cache off and therefore flushes no more. So it stands in padding of the first
//! ring's region: [`WRITE_THROUGH`] or [`WRITE_BACK`] at byte 17 (split: padding of the first
//! descriptor's state) or 24 (packed: padding of the header). If a region was in use and
//! says neither, writes are durable before they complete.

mod packed;
mod split;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::SealFlags;
use upcall_ring::{Access, Mapping, memfd};

use crate::memory::Place;

pub(crate) use packed::{PackedTrack, Recovered, State};
pub(crate) use split::SplitTrack;

/// Each region begins at a multiple of it.
const ALIGNMENT: usize = 64;
/// `mmap` wants offsets in files to be multiples of it.
const PAGE_SIZE: u64 = 4096;

/// The version of a region that is in use; 0: it is not.
const VERSION: u16 = 1;
/// Where the version, and the count of descriptors behind it, are in both layouts.
const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;

const WRITE_THROUGH: u8 = 1;
const WRITE_BACK: u8 = 2;

/// Why a file for tracking was not accepted. The hypervisor's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum InflightError {
    /// Ask for as many rings as are offered, at most, and at least one.
    #[error("tracking of {queues} rings: must be 1 to {queues_max}")]
    Queues { queues: u16, queues_max: u16 },
    /// Ask for the size that the rings will have.
    #[error("tracking of rings of {size} entries: must be a power of two, {size_max} at most")]
    QueueSize { size: u16, size_max: u16 },
    /// Hand over what GET_INFLIGHT_FD gave.
    #[error("{told} bytes at {offset} for tracking, where {needed} at a whole page are needed")]
    Place { told: u64, offset: u64, needed: u64 },
    /// It could shrink under us. Hand over what GET_INFLIGHT_FD gave, which is sealed.
    #[error("the file for tracking can be made shorter")]
    Resizable,
    /// It was handed over for rings of the other kind, or smaller ones.
    #[error(
        "tracking was set up for {tracked} rings of {tracked_size}, not a {kind} one of {size}"
    )]
    Ring { tracked: &'static str, tracked_size: u16, kind: &'static str, size: u16 },
    /// It is not memory, or shorter than told; or there is no memory for a new one.
    #[error("cannot map the file for tracking")]
    Map(#[source] std::io::Error),
}

/// What is wrong with what a region says. Nothing can be taken again on its word; the ring
/// is of no use before the device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("the in-flight region has version {version}, features {features:#x}")]
    Version { version: u16, features: u64 },
    #[error("the in-flight region is for {count} descriptors, the ring has {size}")]
    Count { count: u16, size: u16 },
    #[error("the in-flight region marks descriptor {at} with {mark}")]
    Mark { at: u16, mark: u8 },
    #[error("the used index is {used}, the in-flight region's {tracked}, in a ring of {size}")]
    Batch { used: u16, tracked: u16, size: u16 },
    #[error("the in-flight region is not a list at descriptor {at} of {size}")]
    Link { at: u16, size: u16 },
    #[error("the in-flight region says position {index}, wrap counter {wrap}, in a ring of {size}")]
    Position { index: u16, wrap: u8, size: u16 },
    #[error("the in-flight region has buffer {id} in flight twice")]
    Twice { id: u16 },
}

/// The number of bytes of one ring's region.
fn region_bytes(packed: bool, queue_size: u16) -> usize {
    let entries = usize::from(queue_size);
    let bytes = if packed {
        packed::HEADER_BYTES + entries * packed::ENTRY_BYTES
    } else {
        split::HEADER_BYTES + entries * split::ENTRY_BYTES
    };
    bytes.next_multiple_of(ALIGNMENT)
}

/// What a file for tracking is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub queues: u16,
    pub queue_size: u16,
    pub packed: bool,
}

impl Extent {
    /// Checks what a frontend asks for.
    pub fn new(
        (queues, queues_max): (u16, u16),
        (size, size_max): (u16, u16),
        packed: bool,
    ) -> Result<Extent, InflightError> {
        if !(1..=queues_max).contains(&queues) {
            return Err(InflightError::Queues { queues, queues_max });
        }
        if !size.is_power_of_two() || size > size_max {
            return Err(InflightError::QueueSize { size, size_max });
        }
        Ok(Extent { queues, queue_size: size, packed })
    }

    /// Bytes of all regions.
    pub fn bytes(self) -> usize {
        usize::from(self.queues) * region_bytes(self.packed, self.queue_size)
    }

    /// A file for them that nobody can resize, with nothing in flight.
    pub fn make_file(self) -> Result<OwnedFd, InflightError> {
        memfd("upcall-inflight", self.bytes()).map_err(InflightError::Map)
    }
}

/// A file for tracking, mapped.
#[derive(Clone, Debug)]
pub(crate) struct Inflight {
    extent: Extent,
    mapping: Arc<Mapping>,
}

impl Inflight {
    /// Maps what a frontend handed over: `told` bytes at `offset` of `file`.
    pub fn map(
        file: impl AsFd,
        extent: Extent,
        offset: u64,
        told: u64,
    ) -> Result<Inflight, InflightError> {
        let needed = extent.bytes() as u64;
        if told < needed || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(InflightError::Place { told, offset, needed });
        }
        let seals =
            rustix::fs::fcntl_get_seals(&file).map_err(|errno| InflightError::Map(errno.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(InflightError::Resizable);
        }
        let mapping = Mapping::new(file, offset, extent.bytes(), Access::ReadWrite)
            .map_err(InflightError::Map)?;
        Ok(Inflight { extent, mapping: Arc::new(mapping) })
    }

    /// The region of ring `index`, if there is one; an error if it is for another ring.
    pub fn region(
        &self,
        index: u16,
        size: u16,
        packed: bool,
    ) -> Result<Option<Place>, InflightError> {
        let Extent { queues, queue_size, packed: tracked_packed } = self.extent;
        if packed != tracked_packed || size > queue_size {
            let name = |packed| if packed { "packed" } else { "split" };
            let (tracked, kind) = (name(tracked_packed), name(packed));
            return Err(InflightError::Ring { tracked, tracked_size: queue_size, kind, size });
        }
        Ok((index < queues).then(|| self.place(index)))
    }

    /// Whether somebody has tracked a ring in `region`.
    pub fn is_used(region: &Place) -> bool {
        region.load_u16(VERSION_AT, Ordering::Relaxed) != 0
    }

    fn place(&self, index: u16) -> Place {
        let offset = usize::from(index) * region_bytes(self.extent.packed, self.extent.queue_size);
        Place { mapping: self.mapping.clone(), offset }
    }

    /// Forgets all that was in flight. No ring runs.
    pub fn clear(&self) {
        for index in 0..self.extent.queues {
            self.place(index).store_u16(VERSION_AT, 0, Ordering::Release);
        }
    }

    fn write_cache_at(&self) -> usize {
        if self.extent.packed { packed::SPARE_AT } else { split::SPARE_AT }
    }

    /// What the guest has made of its write cache; `None`: nothing is known of a guest.
    pub fn write_cache(&self) -> Option<bool> {
        let first = self.place(0);
        match first.load_u8(self.write_cache_at()) {
            WRITE_BACK => Some(true),
            WRITE_THROUGH => Some(false),
            _ if !Self::is_used(&first) => None,
            _ => Some(false),
        }
    }

    /// Keeps the setting for who comes after us.
    pub fn set_write_cache(&self, on: bool) {
        let setting = if on { WRITE_BACK } else { WRITE_THROUGH };
        self.place(0).store_u8(self.write_cache_at(), setting);
    }
}

/// Looks at the head of a region: false if it is not in use.
fn is_in_use(region: &Place, size: u16) -> Result<bool, RegionError> {
    let version = region.load_u16(VERSION_AT, Ordering::Relaxed);
    if version == 0 {
        return Ok(false);
    }
    let features = region.load_u64(0);
    if version != VERSION || features != 0 {
        return Err(RegionError::Version { version, features });
    }
    let count = region.load_u16(COUNT_AT, Ordering::Relaxed);
    if count != size {
        return Err(RegionError::Count { count, size });
    }
    Ok(true)
}

/// A mark as it stands in a region.
fn mark(region: &Place, at: u16, offset: usize) -> Result<bool, RegionError> {
    match region.load_u8(offset) {
        0 => Ok(false),
        1 => Ok(true),
        mark => Err(RegionError::Mark { at, mark }),
    }
}

#[cfg(test)]
mod tests;
