//! The region of a packed ring, as the vhost-user specification has it:
//!
//! | byte | what |
//! |---|---|
//! | 0 | features: 0 (8 bytes) |
//! | 8 | version: 1; 0 if not in use (2) |
//! | 10 | how many descriptors (2) |
//! | 12 | first of the free list: now, and as of the last thing that was finished (2 + 2) |
//! | 16 | position of the next used descriptor: now, and then (2 + 2) |
//! | 20 | its wrap counter: now, and then (1 + 1) |
//! | 22 | padding (10) |
//! | 32 + 32·i | state i: 1 if the head of a request in flight (1), padding (1), next (2), last (2) and count (2) of the list, counter (8), id (2), flags (2), length (4), address (8) |
//!
//! A state is free, or keeps a descriptor's copy: the driver's is overwritten by used ones
//! while others are still in flight. Numbers that change together are stored together.
//! Each used descriptor is a batch of its own: of a batch that was written, but not shown
//! when the worker died, the later ones would be found by the driver, out of their time.
//!
//! Always true: whatever store is the last of a worker, what [`PackedTrack::open`] then finds
//! in flight is exactly what was taken and is not shown as used.

use std::sync::atomic::Ordering;

use super::{COUNT_AT, RegionError, VERSION, VERSION_AT, is_in_use, mark};
use crate::memory::Place;
use crate::plant::{self, Bug};
use crate::ring::{PackedDescriptor, Position};
use crate::virtio::*;

pub(super) const HEADER_BYTES: usize = 32;
pub(super) const ENTRY_BYTES: usize = 32;
/// Padding of the header.
pub(super) const SPARE_AT: usize = 24;

const FREE_AT: usize = 12;
const USED_AT: usize = 16;
const NEXT_AT: usize = 2;
const LAST_AT: usize = 4;
const NUM_AT: usize = 6;
const COUNTER_AT: usize = 8;
const COPY_AT: usize = 16;

fn entry(at: u16) -> usize {
    HEADER_BYTES + usize::from(at) * ENTRY_BYTES
}

/// The state of a descriptor: free, or part of a request in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub descriptor: PackedDescriptor,
    /// The next of the same list.
    pub next: u16,
    /// Only of a head: the last of its list, and how many there are.
    pub last: u16,
    pub num: u16,
}

/// What was found in a region that had been in use.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub states: Vec<State>,
    pub free_head: u16,
    pub used: Position,
    /// Heads, in the order in which they were taken.
    pub heads: Vec<u16>,
}

/// The two positions of the header, stored as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    now: Position,
    finished: Position,
}

/// The region of a running ring. All indices are below the ring's size.
#[derive(Debug)]
pub(crate) struct PackedTrack {
    region: Place,
    counter: u64,
    used: Used,
}

impl PackedTrack {
    /// Begins to track a ring of `size` whose next used descriptor is at `used`. `flags`
    /// gives a descriptor's flags as they are now. Also gives what was found; `None` if
    /// nobody tracked before: then state i is free and followed by i + 1.
    pub fn open(
        region: Place,
        size: u16,
        used: Position,
        flags: impl Fn(u16) -> u16,
    ) -> Result<(PackedTrack, Option<Recovered>), RegionError> {
        let used = Used { now: used, finished: used };
        let mut track = PackedTrack { region, counter: 0, used };
        if is_in_use(&track.region, size)? {
            let recovered = track.recover(size, flags)?;
            return Ok((track, Some(recovered)));
        }
        for at in 0..size {
            track.region.store_u8(entry(at), 0);
            track.region.store_u16(entry(at) + NEXT_AT, at + 1, Ordering::Release);
        }
        track.region.store_u64(0, 0);
        track.region.store_u16(COUNT_AT, size, Ordering::Release);
        track.store_free(0, 0);
        track.store_used();
        track.region.store_u16(VERSION_AT, VERSION, Ordering::Release);
        Ok((track, None))
    }

    fn recover(&mut self, size: u16, flags: impl Fn(u16) -> u16) -> Result<Recovered, RegionError> {
        let free = self.region.load_u32(FREE_AT);
        let (mut free, finished_free) = (free as u16, (free >> 16) as u16);
        let mut used = self.load_used(size)?;
        // A descriptor that still looks available was not shown. One that the driver has
        // used again since does not: it is a lap further.
        let shown = used.now != used.finished
            && flags(used.finished.index) & (PACKED_AVAIL | PACKED_USED)
                != used.finished.available_flags();
        if shown && !plant::is(Bug::LastBatch) {
            used.finished = used.now;
        } else {
            free = finished_free;
            used.now = used.finished;
        }
        self.used = used;
        self.store_free(free, free);
        self.store_used();
        let (states, heads) = self.read_states(size, free)?;
        Ok(Recovered { states, free_head: free, used: used.now, heads })
    }

    fn load_used(&self, size: u16) -> Result<Used, RegionError> {
        let bytes = self.region.load_u64(USED_AT).to_le_bytes();
        let [n0, n1, f0, f1, now_wrap, finished_wrap, ..] = bytes;
        let position = |index, wrap| match wrap {
            0 | 1 if index < size => Ok(Position { index, wrap: wrap == 1 }),
            _ => Err(RegionError::Position { index, wrap, size }),
        };
        Ok(Used {
            now: position(u16::from_le_bytes([n0, n1]), now_wrap)?,
            finished: position(u16::from_le_bytes([f0, f1]), finished_wrap)?,
        })
    }

    /// Copies all states, each of which is free or part of one request. Gives also the heads
    /// of those, in order.
    fn read_states(&mut self, size: u16, free: u16) -> Result<(Vec<State>, Vec<u16>), RegionError> {
        let states: Vec<State> = (0..size).map(|at| self.load_state(at)).collect();
        let mut seen = vec![false; states.len()];
        let mut see = |at: u16| match seen.get_mut(usize::from(at)) {
            Some(seen) if !*seen => {
                *seen = true;
                Ok(())
            }
            _ => Err(RegionError::Link { at, size }),
        };
        let mut at = free;
        while at != size {
            see(at)?;
            // A request that was being taken, or was being shown.
            self.region.store_u8(entry(at), 0);
            at = states[usize::from(at)].next;
        }
        let mut heads = Vec::new();
        for head in 0..size {
            if !mark(&self.region, head, entry(head))? {
                continue;
            }
            let State { num, last, .. } = states[usize::from(head)];
            let mut at = head;
            for i in 0..num.max(1) {
                see(at)?;
                if i + 1 < num {
                    at = states[usize::from(at)].next;
                } else if num == 0 || at != last {
                    return Err(RegionError::Link { at, size });
                }
            }
            heads.push((self.region.load_u64(entry(head) + COUNTER_AT), head));
        }
        if let Some(lost) = seen.iter().position(|seen| !seen) {
            return Err(RegionError::Link { at: lost as u16, size });
        }
        if plant::is(Bug::InflightSlot0) {
            heads.retain(|(_, head)| *head != 0);
        }
        if !plant::is(Bug::RetryOrder) {
            heads.sort_unstable();
        }
        self.counter = heads.iter().map(|(counter, _)| counter.wrapping_add(1)).max().unwrap_or(0);
        Ok((states, heads.into_iter().map(|(_, head)| head).collect()))
    }

    fn load_state(&self, at: u16) -> State {
        let number = |offset| self.region.load_u16(entry(at) + offset, Ordering::Relaxed);
        let bytes = self.region.read::<16>(entry(at) + COPY_AT).unwrap_or_default();
        let [i0, i1, f0, f1, l0, l1, l2, l3, address @ ..] = bytes;
        let descriptor = PackedDescriptor {
            address: u64::from_le_bytes(address),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
        };
        State { descriptor, next: number(NEXT_AT), last: number(LAST_AT), num: number(NUM_AT) }
    }

    /// The list at `head` of `states`, the first of the free ones, is a request that is
    /// taken: before anybody learns of it. `free` is then the first free one.
    pub fn take(&mut self, head: u16, states: &[State], free: u16) {
        let State { num, last, .. } = states[usize::from(head)];
        let mut at = head;
        for _ in 0..num {
            let State { descriptor, next, .. } = states[usize::from(at)];
            let mut copy = [0; 16];
            copy[..2].copy_from_slice(&descriptor.id.to_le_bytes());
            copy[2..4].copy_from_slice(&descriptor.flags.to_le_bytes());
            copy[4..8].copy_from_slice(&descriptor.length.to_le_bytes());
            copy[8..].copy_from_slice(&descriptor.address.to_le_bytes());
            self.region.write(entry(at) + COPY_AT, &copy);
            at = next;
        }
        self.region.store_u16(entry(head) + LAST_AT, last, Ordering::Release);
        self.region.store_u16(entry(head) + NUM_AT, num, Ordering::Release);
        self.region.store_u64(entry(head) + COUNTER_AT, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.store_u8(entry(head), 1);
        // Until here it is in the free list, and so is not in flight whatever its mark.
        self.store_free(free, free);
    }

    /// The request at `head`, whose list ends at `last`, will be shown as used: `free` was
    /// the first free state, `used` is where the next used descriptor will be.
    pub fn show(&mut self, head: u16, last: u16, free: u16, used: Position) {
        self.region.store_u16(entry(last) + NEXT_AT, free, Ordering::Release);
        self.region.store_u16(FREE_AT, head, Ordering::Release);
        self.used.now = used;
        self.store_used();
    }

    /// It is shown.
    pub fn shown(&mut self, head: u16) {
        self.region.store_u8(entry(head), 0);
        self.store_free(head, head);
        self.used.finished = self.used.now;
        self.store_used();
    }

    /// A planted bug: see [`Bug::StopDropsInFlight`].
    pub fn forget(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.region.store_u8(entry(head), 0);
        }
    }

    fn store_free(&self, now: u16, finished: u16) {
        self.region.store_u32(FREE_AT, u32::from(finished) << 16 | u32::from(now));
    }

    fn store_used(&self) {
        let Used { now, finished } = self.used;
        let [n0, n1] = now.index.to_le_bytes();
        let [f0, f1] = finished.index.to_le_bytes();
        let wraps = [u8::from(now.wrap), u8::from(finished.wrap)];
        let bytes = [n0, n1, f0, f1, wraps[0], wraps[1], 0, 0];
        self.region.store_u64(USED_AT, u64::from_le_bytes(bytes));
    }
}
