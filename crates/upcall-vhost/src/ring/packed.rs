//! A packed virtqueue: one ring of descriptors that both sides write, and an event structure
//! of each side.
//!
//! A descriptor belongs to the driver or to the device by two bits of its flags, compared
//! with a wrap counter that turns over in each lap. The device copies a request's
//! descriptors when it takes it, as used ones may overwrite them while it is in flight. The
//! copies are in states, of which there are as many as descriptors; the slot of a request is
//! the first of its states.
//!
//! Memory order, each with its partner in the driver: the flags of a request's first
//! descriptor are loaded with acquire before the rest is read; the flags of a used one are
//! stored with release after the rest was written; and as for split rings, a full fence
//! stands between what one stores and the other's wish that one then loads.

use std::sync::atomic::{Ordering, fence};

use super::{RingAddress, RingError};
use crate::inflight::{PackedTrack, Recovered, RegionError, State};
use crate::memory::{GuestMemory, Place};
use crate::plant::{self, Bug};
use crate::virtio::*;

const LENGTH_AT: usize = 8;
const FLAGS_AT: usize = 14;

/// A descriptor of a packed ring, copied.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PackedDescriptor {
    pub address: u64,
    pub length: u32,
    pub id: u16,
    pub flags: u16,
}

impl PackedDescriptor {
    pub fn parse(bytes: [u8; DESC_SIZE]) -> PackedDescriptor {
        let [address @ .., l0, l1, l2, l3, i0, i1, f0, f1] = bytes;
        PackedDescriptor {
            address: u64::from_le_bytes(address),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    pub fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A place in the ring, and in which kind of lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// From 16 bits: the index, and above it the wrap counter. `None`: not in the ring.
    pub fn parse(bits: u16, size: u16) -> Option<Position> {
        let index = bits & 0x7fff;
        (index < size).then_some(Position { index, wrap: bits >> 15 != 0 })
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `count` descriptors further, which is a lap at the most.
    fn advance(self, count: u16, size: u16) -> Position {
        let index = self.index + count;
        if index < size {
            Position { index, ..self }
        } else {
            Position { index: index - size, wrap: !self.wrap }
        }
    }

    /// The two bits of a descriptor here that the driver made available.
    pub fn available_flags(self) -> u16 {
        if self.wrap { PACKED_AVAIL } else { PACKED_USED }
    }

    /// And of one that the device used.
    fn used_flags(self) -> u16 {
        if self.wrap { PACKED_AVAIL | PACKED_USED } else { 0 }
    }
}

/// The three parts, found in memory.
#[derive(Debug)]
struct Parts {
    descriptors: Place,
    driver: Place,
    device: Place,
    /// Where those that we write are, guest-physical: descriptors, device.
    written: [(u64, u64); 2],
}

impl Parts {
    fn find(memory: &GuestMemory, address: RingAddress, size: u16) -> Option<Parts> {
        let ring_bytes = u64::from(size) * DESC_SIZE as u64;
        let parts = Parts {
            written: [
                (memory.guest_address(address.descriptors, ring_bytes)?, ring_bytes),
                (memory.guest_address(address.used, EVENT_SIZE)?, EVENT_SIZE),
            ],
            descriptors: memory.user_range(address.descriptors, ring_bytes)?,
            driver: memory.user_range(address.available, EVENT_SIZE)?,
            device: memory.user_range(address.used, EVENT_SIZE)?,
        };
        // That the numbers are aligned is a matter of where they were mapped.
        parts.descriptors.mapping.atomic_u16(parts.descriptors.offset)?;
        parts.driver.mapping.atomic_u32(parts.driver.offset)?;
        parts.device.mapping.atomic_u32(parts.device.offset)?;
        Some(parts)
    }

    fn flags(&self, index: u16, ordering: Ordering) -> u16 {
        self.descriptors.load_u16(usize::from(index) * DESC_SIZE + FLAGS_AT, ordering)
    }
}

/// One virtqueue, from the device's side.
#[derive(Debug)]
pub(crate) struct PackedRing {
    parts: Parts,
    address: RingAddress,
    size: u16,
    event_idx: bool,
    next_available: Position,
    next_used: Position,
    /// Where the next used descriptor was to be when the driver was last signalled; `None`:
    /// signal in any case.
    signalled: Option<Position>,
    states: Vec<State>,
    /// The first free state, and how many there are. The list ends with `size`.
    free_head: u16,
    free_count: u16,
    /// The ids of all requests that were taken and are not shown as used.
    ids: Ids,
    /// What is used and not shown: slots and lengths.
    put: Vec<(u16, u32)>,
    track: Option<PackedTrack>,
}

/// A set of buffer ids, any of which a driver may choose.
#[derive(Debug)]
struct Ids(Box<[u64]>);

impl Ids {
    fn new() -> Ids {
        Ids(vec![0; 1024].into())
    }

    /// False if it was there already.
    fn insert(&mut self, id: u16) -> bool {
        let word = &mut self.0[usize::from(id / 64)];
        let bit = 1 << (id % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    fn remove(&mut self, id: u16) {
        self.0[usize::from(id / 64)] &= !(1 << (id % 64));
    }
}

impl PackedRing {
    /// The ring of `size` entries at `address` which goes on at `next`, nothing being in
    /// flight. `None` if it is not all in `memory`.
    pub fn new(
        memory: &GuestMemory,
        address: RingAddress,
        size: u16,
        next: Position,
        event_idx: bool,
    ) -> Option<PackedRing> {
        let state =
            |at| State { descriptor: PackedDescriptor::default(), next: at + 1, last: 0, num: 0 };
        Some(PackedRing {
            parts: Parts::find(memory, address, size)?,
            address,
            size,
            event_idx,
            next_available: next,
            next_used: next,
            signalled: None,
            states: (0..size).map(state).collect(),
            free_head: 0,
            free_count: size,
            ids: Ids::new(),
            put: Vec::new(),
            track: None,
        })
    }

    /// See [`Ring::track`](super::Ring::track). Where the ring goes on is then as the region
    /// says, if it was in use.
    pub fn track(&mut self, region: Place) -> Result<Vec<u16>, RegionError> {
        let flags = |index| self.parts.flags(index, Ordering::Acquire);
        let (track, found) = PackedTrack::open(region, self.size, self.next_used, flags)?;
        self.track = Some(track);
        let Some(Recovered { states, free_head, used, heads }) = found else {
            return Ok(Vec::new());
        };
        let mut in_flight = 0;
        for &head in &heads {
            let id = Self::id_in(&states, head);
            if !self.ids.insert(id) {
                return Err(RegionError::Twice { id });
            }
            in_flight += states[usize::from(head)].num;
        }
        (self.states, self.free_head, self.next_used) = (states, free_head, used);
        self.free_count = self.size - in_flight;
        self.next_available = used.advance(in_flight, self.size);
        if plant::is(Bug::ResumeFromAvailable) {
            return Ok(Vec::new());
        }
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

    /// Bits 0 to 15: where the next available descriptor is; 16 to 31: the next used one.
    pub fn position(&self) -> u32 {
        u32::from(self.next_used.bits()) << 16 | u32::from(self.next_available.bits())
    }

    /// How many requests are there, at the most: more than one cannot be seen at once.
    pub fn available(&self) -> u16 {
        let Position { index, .. } = self.next_available;
        let flags = self.parts.flags(index, Ordering::Acquire);
        let is_available =
            flags & (PACKED_AVAIL | PACKED_USED) == self.next_available.available_flags();
        if is_available { self.size } else { 0 }
    }

    /// Takes the next request, if there is one: copies its descriptors.
    pub fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.available() == 0 {
            return Ok(None);
        }
        let head = self.free_head;
        let (mut at, mut last, mut num) = (self.next_available, head, 0);
        let id = loop {
            if num == self.free_count {
                return Err(RingError::Overrun { size: self.size });
            }
            let place = usize::from(at.index) * DESC_SIZE;
            let bytes = self.parts.descriptors.read(place).ok_or(RingError::Gone)?;
            let descriptor = PackedDescriptor::parse(bytes);
            if num > 0 {
                last = self.states[usize::from(last)].next;
            }
            self.states[usize::from(last)].descriptor = descriptor;
            num += 1;
            at = at.advance(1, self.size);
            if !descriptor.is(DESC_NEXT) {
                break descriptor.id;
            }
        };
        if !self.ids.insert(id) && !plant::is(Bug::DuplicateHead) {
            return Err(RingError::InFlight { head: id });
        }
        let state = &mut self.states[usize::from(head)];
        (state.num, state.last) = (num, last);
        self.free_head = self.states[usize::from(last)].next;
        self.free_count -= num;
        self.next_available = at;
        if let Some(track) = &mut self.track {
            track.take(head, &self.states, self.free_head);
        }
        Ok(Some(head))
    }

    /// The descriptors of a request that was taken.
    pub fn descriptors(&self, slot: u16) -> impl Iterator<Item = PackedDescriptor> {
        let mut at = slot;
        (0..self.states[usize::from(slot)].num).map(move |_| {
            let State { descriptor, next, .. } = self.states[usize::from(at)];
            at = next;
            descriptor
        })
    }

    /// The id of the request at `head`: its last descriptor has it.
    fn id_in(states: &[State], head: u16) -> u16 {
        states[usize::from(states[usize::from(head)].last)].descriptor.id
    }

    /// Says that a request that was taken is used. The driver sees it after
    /// [`publish`](Self::publish).
    pub fn put_used(&mut self, slot: u16, length: u32) {
        self.put.push((slot, length));
    }

    pub fn has_unpublished(&self) -> bool {
        !self.put.is_empty()
    }

    /// Where we write, guest-physical.
    pub fn written(&self) -> [(u64, u64); 2] {
        self.parts.written
    }

    /// Shows the driver all that is used, one by one. Returns whether it wants to be
    /// signalled.
    pub fn publish(&mut self) -> bool {
        if self.put.is_empty() {
            return false;
        }
        let mut put = std::mem::take(&mut self.put);
        for (slot, length) in put.drain(..) {
            self.show(slot, length);
        }
        self.put = put;
        fence(Ordering::SeqCst);
        let wanted = self.wants_signal();
        self.signalled = Some(self.next_used);
        wanted
    }

    fn show(&mut self, slot: u16, length: u32) {
        let State { num, last, .. } = self.states[usize::from(slot)];
        let id = Self::id_in(&self.states, slot);
        let here = self.next_used;
        self.next_used = here.advance(num, self.size);
        self.states[usize::from(last)].next = self.free_head;
        if let Some(track) = &mut self.track {
            track.show(slot, last, self.free_head, self.next_used);
        }
        self.free_head = slot;
        self.free_count += num;
        self.ids.remove(id);
        let place = usize::from(here.index) * DESC_SIZE;
        let mut bytes = [0; 6];
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..].copy_from_slice(&id.to_le_bytes());
        self.parts.descriptors.write(place + LENGTH_AT, &bytes);
        let written = if length > 0 { DESC_WRITE } else { 0 };
        let flags = here.used_flags() | written;
        self.parts.descriptors.store_u16(place + FLAGS_AT, flags, Ordering::Release);
        if let Some(track) = &mut self.track {
            track.shown(slot);
        }
    }

    fn wants_signal(&self) -> bool {
        let event = self.parts.driver.load_u32(0);
        match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_POSITION if self.event_idx => {
                let Some(old) = self.signalled else { return true };
                let event = event as u16;
                // As indices that do not wrap within what was shown since.
                let size = self.size;
                let behind = |index: u16, wrap: bool| {
                    if wrap == self.next_used.wrap { index } else { index.wrapping_sub(size) }
                };
                let new = self.next_used.index;
                let old = behind(old.index, old.wrap);
                let event = behind(event & 0x7fff, event >> 15 != 0);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            _ => true,
        }
    }

    /// Asks the driver to ring the doorbell for its next request. Returns whether some came
    /// before it could see that, as [`available`](Self::available) does.
    pub fn ask_for_doorbell(&mut self) -> u16 {
        let event = if self.event_idx {
            u32::from(EVENT_POSITION) << 16 | u32::from(self.next_available.bits())
        } else {
            u32::from(EVENT_ENABLE) << 16
        };
        self.parts.device.store_u32(0, event);
        fence(Ordering::SeqCst);
        self.available()
    }

    /// Tells the driver that the doorbell need not be rung.
    pub fn decline_doorbell(&mut self) {
        self.parts.device.store_u32(0, u32::from(EVENT_DISABLE) << 16);
    }

    /// A planted bug: see [`Bug::StopDropsInFlight`].
    pub fn forget(&mut self) {
        let free = std::iter::successors(Some(self.free_head), |at| {
            self.states.get(usize::from(*at)).map(|state| state.next)
        });
        let free: Vec<u16> = free.collect();
        if let Some(track) = &mut self.track {
            track.forget((0..self.size).filter(|at| !free.contains(at)));
        }
    }
}
