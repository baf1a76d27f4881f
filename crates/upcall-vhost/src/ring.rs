//! A guest's virtqueue, split or packed: its parts in shared memory, its indices, its
//! notifications, and where it keeps what is in flight for who comes after us.
//!
//! Knows nothing of what descriptors mean. The driver's indices are checked against ours,
//! which are in private memory and never read back.
//!
//! A request that was taken has a *slot* below the ring's size: its name until it is shown
//! as used. In a split ring that is its head.

mod packed;
mod split;

use crate::inflight::RegionError;
use crate::memory::{GuestMemory, Place};
use crate::virtio::*;

pub(crate) use packed::{PackedDescriptor, PackedRing, Position};
pub(crate) use split::SplitRing;

/// Where the parts are, in the hypervisor's addresses. Of a packed ring: the descriptors,
/// the driver's event structure, and the device's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddress {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// A descriptor, copied.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn parse(bytes: [u8; DESC_SIZE]) -> Descriptor {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    pub fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Bytes of the used ring of a split ring.
pub(crate) fn used_bytes(size: u16) -> u64 {
    6 + u64::from(size) * 8
}

/// What is wrong with a ring. The guest's fault; the ring is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailableJump { from: u16, to: u16, size: u16 },
    #[error("descriptor {head} of a ring of {size}")]
    HeadRange { head: u16, size: u16 },
    #[error("descriptor {head} made available while it is in flight")]
    InFlight { head: u16 },
    #[error("more descriptors made available than the ring of {size} has")]
    Overrun { size: u16 },
    #[error("the ring is no longer in the guest's memory")]
    Gone,
}

/// One virtqueue, from the device's side.
#[derive(Debug)]
pub(crate) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// Keeps what is in flight in `region`, too. Gives the slots of what a worker before us
    /// took and did not show as used, in that order: to be begun again before anything else.
    pub fn track(&mut self, region: Place) -> Result<Vec<u16>, RegionError> {
        match self {
            Ring::Split(ring) => ring.track(region),
            Ring::Packed(ring) => ring.track(region),
        }
    }

    /// Finds the parts again in another table.
    pub fn rebind(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        match self {
            Ring::Split(ring) => ring.rebind(memory),
            Ring::Packed(ring) => ring.rebind(memory),
        }
    }

    pub fn size(&self) -> u16 {
        match self {
            Ring::Split(ring) => ring.size(),
            Ring::Packed(ring) => ring.size(),
        }
    }

    /// Where it goes on, as GET_VRING_BASE says it.
    pub fn position(&self) -> u32 {
        match self {
            Ring::Split(ring) => ring.next_available().into(),
            Ring::Packed(ring) => ring.position(),
        }
    }

    /// How many requests are there at the most; 0: there is none.
    pub fn available(&self) -> Result<u16, RingError> {
        match self {
            Ring::Split(ring) => ring.available(),
            Ring::Packed(ring) => Ok(ring.available()),
        }
    }

    /// Takes the next request, and gives its slot; `None`: there is none after all. The
    /// caller has seen that `available` was not 0, and takes no more than it said.
    pub fn take(&mut self) -> Result<Option<u16>, RingError> {
        match self {
            Ring::Split(ring) => ring.take_head().map(Some),
            Ring::Packed(ring) => ring.take(),
        }
    }

    /// Says that a request is used. The driver sees it after [`publish`](Self::publish).
    pub fn put_used(&mut self, slot: u16, length: u32) {
        match self {
            Ring::Split(ring) => ring.put_used(slot, length),
            Ring::Packed(ring) => ring.put_used(slot, length),
        }
    }

    /// Whether something is used that the driver was not shown.
    pub fn has_unpublished(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.has_unpublished(),
            Ring::Packed(ring) => ring.has_unpublished(),
        }
    }

    /// The parts of it that we write, guest-physical. `told`: where the frontend says that the
    /// used ring is. Of a packed ring it tells one of two parts, and which is a matter of
    /// opinion: we know both.
    pub fn written(&self, told: u64) -> [(u64, u64); 2] {
        match self {
            Ring::Split(ring) => [(told, used_bytes(ring.size())), (0, 0)],
            Ring::Packed(ring) => ring.written(),
        }
    }

    /// Shows the driver all that is used. Returns whether it wants to be signalled.
    pub fn publish(&mut self) -> bool {
        match self {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    /// Asks the driver to ring the doorbell for its next request. Returns how many came
    /// before it could see that, at the most.
    pub fn ask_for_doorbell(&mut self) -> Result<u16, RingError> {
        match self {
            Ring::Split(ring) => ring.ask_for_doorbell(),
            Ring::Packed(ring) => Ok(ring.ask_for_doorbell()),
        }
    }

    /// Tells the driver that the doorbell need not be rung.
    pub fn decline_doorbell(&mut self) {
        match self {
            Ring::Split(ring) => ring.decline_doorbell(),
            Ring::Packed(ring) => ring.decline_doorbell(),
        }
    }

    /// A planted bug: see [`crate::plant::Bug::StopDropsInFlight`].
    pub fn forget(&mut self) {
        match self {
            Ring::Split(ring) => ring.forget(),
            Ring::Packed(ring) => ring.forget(),
        }
    }
}
