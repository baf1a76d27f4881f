//! A client's packed rings.

use super::{Descriptor, NEXT, RawClient, Used, feature};

/// The first position: index 0, wrap counter 1.
pub(super) const START: u16 = 0x8000;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const EVENT_ENABLE: u16 = 0;
const EVENT_POSITION: u16 = 2;

/// An index and a wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position(u16, bool);

impl Position {
    fn bits(self) -> u16 {
        self.0 | u16::from(self.1) << 15
    }

    fn advance(self, count: usize, size: u16) -> Position {
        let index = self.0 + count as u16;
        if index < size { Position(index, self.1) } else { Position(index - size, !self.1) }
    }
}

/// Where a packed ring stands for its driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    available: Position,
    used: Position,
}

impl Default for Packed {
    fn default() -> Packed {
        Packed { available: Position(0, true), used: Position(0, true) }
    }
}

/// A descriptor as it stands in memory.
pub(super) fn bytes(descriptor: Descriptor, id: u16, flags: u16) -> [u8; Descriptor::BYTES] {
    let mut bytes = descriptor.bytes();
    bytes[12..14].copy_from_slice(&id.to_le_bytes());
    bytes[14..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

impl RawClient {
    pub(super) fn is_packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    /// A ring's base as the messages have it, of the 16 bits that say where it goes on.
    pub(super) fn whole_base(&self, base: u16) -> u32 {
        let used = if self.is_packed() { base } else { 0 };
        u32::from(used) << 16 | u32::from(base)
    }

    fn packed(&self, queue: usize) -> Packed {
        self.rings[queue].packed.expect("a packed ring")
    }

    /// Makes a chain available, its first descriptor last, and kicks if that is wanted.
    pub(super) fn submit_packed(&mut self, queue: usize, id: u16, chain: &[Descriptor]) {
        let start = self.packed(queue).available;
        let ring = &self.rings[queue];
        for (index, descriptor) in chain.iter().enumerate().rev() {
            let Position(at, wrap) = start.advance(index, ring.size);
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            let flags = descriptor.flags | next | if wrap { AVAIL } else { USED };
            let place = ring.descriptors + Descriptor::BYTES * usize::from(at);
            self.memory.write(place, &bytes(*descriptor, id, 0)[..14]);
            self.memory.store_u16(place + 14, flags);
        }
        let end = start.advance(chain.len(), ring.size);
        let wanted = match self.memory.load_u16(ring.used + 2) {
            EVENT_ENABLE => true,
            EVENT_POSITION => {
                let event = self.memory.load_u16(ring.used);
                (0..chain.len()).any(|index| start.advance(index, ring.size).bits() == event)
            }
            _ => false,
        };
        if let Some(packed) = &mut self.rings[queue].packed {
            packed.available = end;
        }
        if wanted {
            self.kick(queue);
        }
    }

    /// The next used descriptor, if there is one.
    pub(super) fn take_used_packed(&mut self, queue: usize) -> Option<Used> {
        let position = self.packed(queue).used;
        let Position(at, wrap) = position;
        let ring = &mut self.rings[queue];
        let place = ring.descriptors + Descriptor::BYTES * usize::from(at);
        let flags = self.memory.load_u16(place + 14) & (AVAIL | USED);
        if flags != if wrap { AVAIL | USED } else { 0 } {
            return None;
        }
        let bytes = self.memory.copy(place + 8, 6);
        let written = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let head = u16::from_le_bytes(bytes[4..].try_into().unwrap());
        let chain = ring.chains.remove(&head).expect("used, and not in flight");
        let next = position.advance(chain.len(), ring.size);
        ring.free.extend(chain);
        if let Some(packed) = &mut ring.packed {
            packed.used = next;
        }
        let events = self.features & feature::EVENT_IDX != 0;
        let (flags, event) = if events { (EVENT_POSITION, next.bits()) } else { (EVENT_ENABLE, 0) };
        let driver = self.rings[queue].avail;
        self.memory.store_u16(driver, event);
        self.memory.store_u16(driver + 2, flags);
        Some(Used { head, written })
    }
}
