//! A driver with a packed ring.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Desc, Device, GuestDriver, Memory, Submitted, USER_OFFSET, Used};
use crate::VirtQueue;
use crate::virtio::*;

/// A driver with one packed ring in a [`Memory`]. Its ids are not below the ring's size,
/// which no device may rely on.
#[derive(Debug)]
pub struct PackedDriver {
    memory: Arc<Memory>,
    size: u16,
    event_idx: bool,
    ring: u64,
    /// Where the event structures are: the driver's and the device's.
    driver: u64,
    device: u64,
    next_available: (u16, bool),
    next_used: (u16, bool),
    /// Where the request that was made available last begins.
    last: (u16, bool),
    next_id: u16,
    /// How many descriptors each request in flight has, by its id.
    counts: HashMap<u16, u16>,
    free: u16,
}

fn advance((index, wrap): (u16, bool), count: u16, size: u16) -> (u16, bool) {
    let index = index + count;
    if index < size { (index, wrap) } else { (index - size, !wrap) }
}

impl PackedDriver {
    /// A ring of `size` entries, empty.
    pub fn new(memory: Arc<Memory>, size: u16, event_idx: bool) -> PackedDriver {
        PackedDriver {
            size,
            event_idx,
            ring: memory.allocate(usize::from(size) * DESC_SIZE, 16),
            driver: memory.allocate(EVENT_SIZE as usize, 4),
            device: memory.allocate(EVENT_SIZE as usize, 4),
            next_available: (0, true),
            next_used: (0, true),
            last: (0, true),
            next_id: 0x8000,
            counts: HashMap::new(),
            free: size,
            memory,
        }
    }

    /// Empties the ring and begins anew, as before a device is started again.
    pub fn reset(&mut self) {
        (self.next_available, self.next_used, self.last) = ((0, true), (0, true), (0, true));
        self.counts.clear();
        self.free = self.size;
        self.memory.write(self.ring, &vec![0; usize::from(self.size) * DESC_SIZE]);
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether events are asked for by position.
    pub fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// Where the ring is: the hypervisor's addresses of the descriptors and of the event
    /// structures of driver and device.
    pub fn user_addresses(&self) -> [u64; 3] {
        [self.ring, self.driver, self.device].map(|at| at + USER_OFFSET)
    }

    /// Where descriptor `index` is, guest-physical.
    pub fn descriptor(&self, index: u16) -> u64 {
        self.ring + u64::from(index) * DESC_SIZE as u64
    }

    /// The next position to make available, as SET_VRING_BASE says it.
    pub fn position(&self) -> u16 {
        self.next_available.0 | u16::from(self.next_available.1) << 15
    }

    /// Asks to be signalled: always (0), never (1), or at a position (2).
    pub fn set_event(&self, flags: u16, position: u16) {
        self.memory.store(self.driver, position);
        self.memory.store(self.driver + 2, flags);
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants its doorbell rung for what was made available last.
    pub fn wants_doorbell(&self) -> bool {
        fence(Ordering::SeqCst);
        match self.memory.load(self.device + 2) {
            EVENT_ENABLE => true,
            EVENT_POSITION => {
                let (index, wrap) = self.last;
                self.memory.load(self.device) == index | u16::from(wrap) << 15
            }
            _ => false,
        }
    }

    fn put(&self, (index, wrap): (u16, bool), desc: Desc, id: u16) {
        let at = self.descriptor(index);
        let [address @ .., _, _, _, _] = desc.bytes(0);
        self.memory.write(at, &address);
        self.memory.write(at + 12, &id.to_le_bytes());
        let lap = if wrap { PACKED_AVAIL } else { PACKED_USED };
        self.memory.store(at + 14, desc.flags | lap);
    }

    /// Makes a chain available under `id`, its first descriptor last. There must be room.
    pub fn submit_chain(&mut self, id: u16, chain: &[Desc]) {
        let count = chain.len() as u16;
        let start = self.next_available;
        for (i, desc) in chain.iter().enumerate().rev() {
            let next = if i + 1 < chain.len() { DESC_NEXT } else { 0 };
            let desc = Desc { flags: desc.flags | next, ..*desc };
            self.put(advance(start, i as u16, self.size), desc, id);
        }
        self.last = start;
        self.next_available = advance(start, count, self.size);
        self.counts.insert(id, count);
    }

    fn submit_request(&mut self, chain: &[Desc], data: u64, status: u64) -> Submitted {
        let count = chain.len() as u16;
        assert!(count <= self.free, "a full ring");
        self.free -= count;
        let head = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.submit_chain(head, chain);
        Submitted { head, data, status }
    }

    /// A request of three descriptors, as of [`Driver`](super::Driver).
    pub fn submit(&mut self, kind: u32, sector: u64, out: &[u8], in_length: usize) -> Submitted {
        let (chain, data, status) = self.memory.request(kind, sector, out, in_length);
        self.submit_request(&chain, data, status)
    }

    /// Writes an indirect table somewhere; returns the descriptor for it.
    pub fn indirect(&self, chain: &[Desc]) -> Desc {
        let table = self.memory.allocate(chain.len() * DESC_SIZE, 16);
        for (i, desc) in chain.iter().enumerate() {
            let at = table + i as u64 * 16;
            let [address @ .., _, _, _, _] = desc.bytes(0);
            self.memory.write(at, &address);
            self.memory.write(at + 12, &[0; 2]);
            self.memory.write(at + 14, &desc.flags.to_le_bytes());
        }
        Desc::indirect(table, chain.len() as u32)
    }

    /// What the device has shown as used since the last call.
    pub fn reap(&mut self) -> Vec<Used> {
        let mut seen = Vec::new();
        loop {
            let (index, wrap) = self.next_used;
            let at = self.descriptor(index);
            let flags = self.memory.load(at + 14) & (PACKED_AVAIL | PACKED_USED);
            if flags != if wrap { PACKED_AVAIL | PACKED_USED } else { 0 } {
                return seen;
            }
            let bytes = self.memory.read(at + 8, 6);
            let id = u16::from_le_bytes([bytes[4], bytes[5]]);
            let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let Some(count) = self.counts.remove(&id) else {
                // Nonsense, or twice: who asked for it will see.
                seen.push(Used { head: u32::from(id), length });
                return seen;
            };
            self.free = (self.free + count).min(self.size);
            self.next_used = advance(self.next_used, count, self.size);
            seen.push(Used { head: u32::from(id), length });
        }
    }

    /// The status byte of a request.
    pub fn status(&self, submitted: &Submitted) -> u8 {
        self.memory.read(submitted.status, 1)[0]
    }
}

impl GuestDriver for PackedDriver {
    fn submit_parts(
        &mut self,
        chain: &[Desc],
        data: u64,
        status: u64,
        indirect: bool,
    ) -> Submitted {
        if indirect {
            let table = self.indirect(chain);
            return self.submit_request(&[table], data, status);
        }
        self.submit_request(chain, data, status)
    }

    fn submit_again(&mut self, submitted: &Submitted) {
        self.submit_chain(submitted.head, &[Desc::writable(submitted.status, 1)]);
    }

    fn reap(&mut self) -> Vec<Used> {
        PackedDriver::reap(self)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn used(&self) -> u64 {
        self.device
    }

    fn queue(&self, device: &Device) -> VirtQueue {
        // Where it began; a device that tracks what is in flight knows better.
        device.try_packed_queue(self, 0x8000, true).expect("a ring in memory")
    }

    fn move_to(&mut self, memory: &Arc<Memory>) {
        self.memory = memory.clone();
    }
}
