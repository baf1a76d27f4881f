//! A split virtqueue's three parts in shared memory, its indices and its notifications.
//!
//! Knows nothing of what descriptors mean. The driver's indices are checked against ours,
//! which are in private memory and never read back.
//!
//! Memory order, each with its partner in the driver: the available index is loaded with
//! acquire before the entries it covers are read; the used index is stored with release
//! after its entries were written; between storing one's own index (or wish to be woken)
//! and loading the other side's wish (or index) stands a full fence, so that at least one
//! of the two sees the other.

use std::sync::atomic::{Ordering, fence};

use crate::memory::{GuestMemory, Place};
use crate::virtio::*;

/// Where the parts are, in the hypervisor's addresses.
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

/// What is wrong with a ring. The guest's fault; the ring is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailableJump { from: u16, to: u16, size: u16 },
    #[error("descriptor {head} of a ring of {size}")]
    HeadRange { head: u16, size: u16 },
    #[error("the ring is no longer in the guest's memory")]
    Gone,
}

/// The three parts, found in memory.
#[derive(Debug)]
struct Parts {
    descriptors: Place,
    available: Place,
    used: Place,
}

impl Parts {
    fn find(memory: &GuestMemory, address: RingAddress, size: u16) -> Option<Parts> {
        let size = u64::from(size);
        let parts = Parts {
            descriptors: memory.user_range(address.descriptors, size * DESC_SIZE as u64)?,
            available: memory.user_range(address.available, 6 + size * 2)?,
            used: memory.user_range(address.used, 6 + size * 8)?,
        };
        // That the numbers are aligned is a matter of where they were mapped.
        parts.available.mapping.atomic_u16(parts.available.offset)?;
        parts.used.mapping.atomic_u32(parts.used.offset)?;
        Some(parts)
    }
}

/// One virtqueue, from the device's side.
#[derive(Debug)]
pub struct SplitRing {
    parts: Parts,
    address: RingAddress,
    size: u16,
    event_idx: bool,
    /// The next entry of the available ring to take.
    next_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index that the driver was shown.
    published: u16,
    /// What it was when the driver was last signalled; `None`: signal in any case.
    signalled: Option<u16>,
}

impl SplitRing {
    /// The ring of `size` entries (a power of two) at `address`, with `base` as the next
    /// available entry. `None` if it is not all in `memory`.
    pub fn new(
        memory: &GuestMemory,
        address: RingAddress,
        size: u16,
        base: u16,
        event_idx: bool,
    ) -> Option<SplitRing> {
        debug_assert!(size.is_power_of_two());
        let parts = Parts::find(memory, address, size)?;
        let used = &parts.used;
        let next_used =
            u16::from_le(used.mapping.atomic_u16(used.offset + 2)?.load(Ordering::Acquire));
        Some(SplitRing {
            parts,
            address,
            size,
            event_idx,
            next_available: base,
            next_used,
            published: next_used,
            signalled: None,
        })
    }

    /// Finds the parts again in another table.
    pub fn rebind(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        self.parts = Parts::find(memory, self.address, self.size).ok_or(RingError::Gone)?;
        Ok(())
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// How many entries the driver has made available.
    pub fn available(&self) -> Result<u16, RingError> {
        let to = load(&self.parts.available, 2, Ordering::Acquire);
        let count = to.wrapping_sub(self.next_available);
        if count > self.size {
            let (from, size) = (self.next_available, self.size);
            return Err(RingError::AvailableJump { from, to, size });
        }
        Ok(count)
    }

    /// Takes the next available entry: the caller has seen that there is one. The head
    /// that it returns is below the ring's size.
    pub fn take_head(&mut self) -> Result<u16, RingError> {
        let entry = usize::from(self.next_available & (self.size - 1));
        let head = load(&self.parts.available, 4 + entry * 2, Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::HeadRange { head, size: self.size });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// The descriptor `index`, if the table has it.
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let table = &self.parts.descriptors;
        let bytes = table.mapping.read_array(table.offset + usize::from(index) * DESC_SIZE)?;
        Some(Descriptor::parse(bytes))
    }

    /// Fills the next used entry. The driver sees it after [`publish`](Self::publish).
    pub fn put_used(&mut self, head: u16, length: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        bytes[4..].copy_from_slice(&length.to_le_bytes());
        let used = &self.parts.used;
        // `Parts::find` made sure of the range.
        let written = used.mapping.write(used.offset + 4 + entry * 8, &bytes);
        debug_assert!(written.is_some());
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all used entries. Returns whether it wants to be signalled.
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        store(&self.parts.used, 2, self.next_used, Ordering::Release);
        self.published = self.next_used;
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event =
                load(&self.parts.available, 4 + usize::from(self.size) * 2, Ordering::Relaxed);
            let new = self.next_used;
            self.signalled
                .is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            load(&self.parts.available, 0, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        };
        // Written for each publication, as the drivers' window is from index to index.
        self.signalled = Some(self.next_used);
        wanted
    }

    /// Asks the driver to ring the doorbell for its next entry. Returns how many came
    /// before it could see that.
    pub fn ask_for_doorbell(&mut self) -> Result<u16, RingError> {
        if self.event_idx {
            let at = 4 + usize::from(self.size) * 8;
            store(&self.parts.used, at, self.next_available, Ordering::Relaxed);
        } else {
            store(&self.parts.used, 0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.available()
    }

    /// Tells the driver that the doorbell need not be rung. With EVENT_IDX that is so by
    /// itself, as soon as the index asked for has gone by.
    pub fn decline_doorbell(&mut self) {
        if !self.event_idx {
            store(&self.parts.used, 0, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }
}

/// A little-endian number of a part; `Parts::find` made sure that it is there.
fn load(part: &Place, offset: usize, ordering: Ordering) -> u16 {
    let number = part.mapping.atomic_u16(part.offset + offset);
    debug_assert!(number.is_some());
    number.map_or(0, |number| u16::from_le(number.load(ordering)))
}

fn store(part: &Place, offset: usize, value: u16, ordering: Ordering) {
    let stored = part.mapping.store_u16(part.offset + offset, value.to_le(), ordering);
    debug_assert!(stored);
}
