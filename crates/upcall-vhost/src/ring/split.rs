//! A split virtqueue's three parts in shared memory, its indices and its notifications.
//!
//! Memory order, each with its partner in the driver: the available index is loaded with
//! acquire before the entries it covers are read; the used index is stored with release
//! after its entries were written; between storing one's own index (or wish to be woken)
//! and loading the other side's wish (or index) stands a full fence, so that at least one
//! of the two sees the other.

use std::sync::atomic::{Ordering, fence};

use super::{Descriptor, RingAddress, RingError, used_bytes};
use crate::inflight::{RegionError, SplitTrack};
use crate::memory::{GuestMemory, Place};
use crate::plant::{self, Bug};
use crate::virtio::*;

/// The three parts, found in memory.
#[derive(Debug)]
struct Parts {
    descriptors: Place,
    available: Place,
    used: Place,
}

impl Parts {
    fn find(memory: &GuestMemory, address: RingAddress, size: u16) -> Option<Parts> {
        let entries = u64::from(size);
        let parts = Parts {
            descriptors: memory.user_range(address.descriptors, entries * DESC_SIZE as u64)?,
            available: memory.user_range(address.available, 6 + entries * 2)?,
            used: memory.user_range(address.used, used_bytes(size))?,
        };
        // That the numbers are aligned is a matter of where they were mapped.
        parts.available.mapping.atomic_u16(parts.available.offset)?;
        parts.used.mapping.atomic_u32(parts.used.offset)?;
        Some(parts)
    }
}

/// One virtqueue, from the device's side.
#[derive(Debug)]
pub(crate) struct SplitRing {
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
    /// By head: taken, and not yet shown as used.
    taken: Vec<bool>,
    /// Heads of the used entries that the driver was not shown.
    put: Vec<u16>,
    track: Option<SplitTrack>,
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
            taken: vec![false; size.into()],
            put: Vec::new(),
            track: None,
        })
    }

    /// Keeps what is in flight in `region`, too, which was made for a ring of this size or
    /// larger. Gives the heads that a worker before us took and did not show as used, in
    /// that order: they are taken again, and the ring goes on behind them, whatever `base`
    /// said.
    pub fn track(&mut self, region: Place) -> Result<Vec<u16>, RegionError> {
        let (track, found) = SplitTrack::open(region, self.size, self.next_used)?;
        self.track = Some(track);
        let Some(heads) = found else { return Ok(Vec::new()) };
        if plant::is(Bug::ResumeFromAvailable) {
            self.next_available = self.parts.available.load_u16(2, Ordering::Acquire);
            return Ok(Vec::new());
        }
        for &head in &heads {
            self.taken[usize::from(head)] = true;
        }
        // Each entry of the available ring before it is in flight, or used.
        self.next_available = self.next_used.wrapping_add(heads.len() as u16);
        Ok(heads)
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
        let to = self.parts.available.load_u16(2, Ordering::Acquire);
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
        let head = self.parts.available.load_u16(4 + entry * 2, Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::HeadRange { head, size: self.size });
        }
        if self.taken[usize::from(head)] && !plant::is(Bug::DuplicateHead) {
            return Err(RingError::InFlight { head });
        }
        if let Some(track) = &mut self.track {
            track.take(head);
        }
        self.taken[usize::from(head)] = true;
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

    /// Fills the next used entry for a head that was taken. The driver sees it after [`publish`](Self::publish).
    pub fn put_used(&mut self, head: u16, length: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        bytes[4..].copy_from_slice(&length.to_le_bytes());
        self.parts.used.write(4 + entry * 8, &bytes);
        if let Some(track) = &mut self.track {
            track.put(head);
        }
        self.put.push(head);
        self.next_used = self.next_used.wrapping_add(1);
    }

    pub fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Shows the driver all used entries. Returns whether it wants to be signalled.
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        self.parts.used.store_u16(2, self.next_used, Ordering::Release);
        self.published = self.next_used;
        if let Some(track) = &mut self.track {
            track.published(&self.put, self.next_used);
        }
        for head in self.put.drain(..) {
            self.taken[usize::from(head)] = false;
        }
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event =
                self.parts.available.load_u16(4 + usize::from(self.size) * 2, Ordering::Relaxed);
            let new = self.next_used;
            self.signalled
                .is_none_or(|old| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            self.parts.available.load_u16(0, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
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
            self.parts.used.store_u16(at, self.next_available, Ordering::Relaxed);
        } else {
            self.parts.used.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.available()
    }

    /// Tells the driver that the doorbell need not be rung. With EVENT_IDX that is so by
    /// itself, as soon as the index asked for has gone by.
    pub fn decline_doorbell(&mut self) {
        if !self.event_idx {
            self.parts.used.store_u16(0, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// A planted bug: see [`Bug::StopDropsInFlight`].
    pub fn forget(&mut self) {
        let heads = (0..self.size).filter(|head| self.taken[usize::from(*head)]);
        if let Some(track) = &mut self.track {
            track.forget(heads);
        }
    }
}
