//! The driver's side of a split virtqueue, as a client of a vhost-user-blk device.
//!
//! The memory is ours (a sealed memfd) and the device writes to it at any time, so: what is
//! in flight is known from private memory alone, each entry of the used ring is copied once
//! and checked against it, and the first wrong one ends the use of the device.
//!
//! Always true: a slot is reported at most once for each time it was submitted.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use upcall_block::{Errno, Status};
use upcall_ring::{Access, Mapping, memfd};

/// Descriptors in the ring; a power of two.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Requests in the ring at a time: each takes a header, data and a status.
pub(crate) const SLOT_COUNT: usize = QUEUE_SIZE as usize / 3;

/// Where the device sees the memory: as guest and as user address. Any place will do, as long
/// as it is not 0.
pub(crate) const BASE: u64 = 1 << 32;

const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = DESCRIPTORS + 16 * QUEUE_SIZE as usize;
const USED: usize = 8192;
/// Of each slot: header (16), range of a write-zeroes (16), status (1).
const HEADERS: usize = 12288;
const HEADER_BYTES: usize = 64;
/// Where the data begins: a multiple of the page size.
const DATA: usize = 20480;
const _: () = assert!(AVAILABLE + 6 + 2 * QUEUE_SIZE as usize <= USED);
const _: () = assert!(USED + 6 + 8 * QUEUE_SIZE as usize <= HEADERS);
const _: () = assert!(HEADERS + HEADER_BYTES * SLOT_COUNT <= DATA);

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;
const STATUS_UNSET: u8 = 0xff;

/// What the device is asked to do; numbers of virtio-blk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Into `length` bytes at `at` of the memory.
    Read {
        sector: u64,
        at: u64,
        length: u32,
    },
    /// From there.
    Write {
        sector: u64,
        at: u64,
        length: u32,
    },
    Flush,
    WriteZeroes {
        sector: u64,
        sectors: u32,
        unmap: bool,
    },
}

/// What the device did that no device does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub String);

/// The queue and its memory.
pub(crate) struct ClientRing {
    fd: OwnedFd,
    memory: Arc<Mapping>,
    is_busy: [bool; SLOT_COUNT],
    busy_count: usize,
    available_index: u16,
    used_index: u16,
}

impl ClientRing {
    /// A queue, and `data_bytes` (a multiple of the page size) for data behind it.
    pub fn new(data_bytes: usize) -> io::Result<ClientRing> {
        let length = DATA + data_bytes;
        let fd = memfd("upcall-image-ring", length)?;
        let memory = Arc::new(Mapping::new(&fd, 0, length, Access::ReadWrite)?);
        Ok(ClientRing {
            fd,
            memory,
            is_busy: [false; SLOT_COUNT],
            busy_count: 0,
            available_index: 0,
            used_index: 0,
        })
    }

    /// The memory as a file, for the device.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Where the data begins, in bytes from the start of the memory.
    pub fn data_offset(&self) -> usize {
        DATA
    }

    /// Addresses of descriptors, available and used ring, as the device sees them.
    pub fn addresses(&self) -> [u64; 3] {
        [DESCRIPTORS, AVAILABLE, USED].map(|offset| BASE + offset as u64)
    }

    /// Begins anew, for a new device. The old one must be gone.
    pub fn reset(&mut self) {
        self.is_busy = [false; SLOT_COUNT];
        self.busy_count = 0;
        (self.available_index, self.used_index) = (0, 0);
        self.put(DESCRIPTORS, &[0; HEADERS - DESCRIPTORS]);
    }

    pub fn busy_count(&self) -> usize {
        self.busy_count
    }

    /// A slot that is free.
    pub fn free_slot(&self) -> Option<usize> {
        self.is_busy.iter().position(|busy| !busy)
    }

    /// Puts a command into a free slot and shows it to the device. Panics if the slot is not
    /// free (our own bug).
    pub fn submit(&mut self, slot: usize, command: Command) {
        assert!(!self.is_busy[slot], "slot {slot} is in use");
        self.is_busy[slot] = true;
        self.busy_count += 1;
        let header = HEADERS + slot * HEADER_BYTES;
        let (range, status) = (header + 16, header + 32);
        let (kind, sector, data) = match command {
            Command::Read { sector, at, length } => (0u32, sector, Some((at, length, true))),
            Command::Write { sector, at, length } => (1, sector, Some((at, length, false))),
            Command::Flush => (4, 0, None),
            Command::WriteZeroes { sector, sectors, unmap } => {
                self.put(range, &sector.to_le_bytes());
                self.put(range + 8, &sectors.to_le_bytes());
                self.put(range + 12, &u32::from(unmap).to_le_bytes());
                (13, 0, Some((range as u64, 16, false)))
            }
        };
        self.put(header, &kind.to_le_bytes());
        self.put(header + 4, &[0; 4]);
        self.put(header + 8, &sector.to_le_bytes());
        self.put(status, &[STATUS_UNSET]);
        let first = slot as u16 * 3;
        self.describe(first, header as u64, 16, NEXT, first + if data.is_some() { 1 } else { 2 });
        if let Some((at, length, fills)) = data {
            let flags = NEXT | if fills { DEVICE_WRITES } else { 0 };
            self.describe(first + 1, at, length, flags, first + 2);
        }
        self.describe(first + 2, status as u64, 1, DEVICE_WRITES, 0);
        let place = usize::from(self.available_index % QUEUE_SIZE);
        self.put(AVAILABLE + 4 + 2 * place, &first.to_le_bytes());
        self.available_index = self.available_index.wrapping_add(1);
        // Release: the device that sees the index sees everything above.
        let index = self.available_index.to_le();
        assert!(self.memory.store_u16(AVAILABLE + 2, index, Ordering::Release));
    }

    /// Whether the device wants to be told of what was submitted.
    pub fn wants_kick(&self) -> bool {
        // The index must be visible before the flag is read: the device does it the other
        // way round before it sleeps.
        fence(Ordering::SeqCst);
        let flags = self.memory.atomic_u16(USED).expect("the ring is in the memory");
        u16::from_le(flags.load(Ordering::Relaxed)) & NO_NOTIFY == 0
    }

    /// Takes what the device has completed. After a violation the device must not be used.
    pub fn reap(&mut self, out: &mut Vec<(usize, Status)>) -> Result<(), Violation> {
        let index = self.memory.atomic_u16(USED + 2).expect("the ring is in the memory");
        // Acquire: what the device wrote before the index is read after it.
        let index = u16::from_le(index.load(Ordering::Acquire));
        let count = index.wrapping_sub(self.used_index);
        if usize::from(count) > self.busy_count {
            return Err(Violation(format!(
                "says that {count} requests have ended, with {} in flight",
                self.busy_count
            )));
        }
        for _ in 0..count {
            let place = usize::from(self.used_index % QUEUE_SIZE);
            let bytes: [u8; 4] = self.get(USED + 4 + 8 * place);
            let first = u32::from_le_bytes(bytes);
            let slot = (first / 3) as usize;
            if !first.is_multiple_of(3) || !self.is_busy.get(slot).copied().unwrap_or(false) {
                return Err(Violation(format!(
                    "ends a request that is not in flight (descriptor {first})"
                )));
            }
            let [status] = self.get(HEADERS + slot * HEADER_BYTES + 32);
            let status = match status {
                0 => Ok(()),
                1 => Err(Errno::EIO),
                2 => Err(Errno::EOPNOTSUPP),
                other => {
                    return Err(Violation(format!("ends a request with the status {other}")));
                }
            };
            self.used_index = self.used_index.wrapping_add(1);
            self.is_busy[slot] = false;
            self.busy_count -= 1;
            out.push((slot, status));
        }
        Ok(())
    }

    /// Asks for a call when the next request has ended, as nobody looks from now on. False: some
    /// have, and no call is asked for.
    #[must_use = "sleep only if this is true"]
    pub fn before_sleep(&mut self) -> bool {
        self.put_available_flags(0);
        // The flag must be visible before the index is read: the device does it the other way
        // round before it leaves a call out.
        fence(Ordering::SeqCst);
        let index = self.memory.atomic_u16(USED + 2).expect("the ring is in the memory");
        if u16::from_le(index.load(Ordering::Relaxed)) == self.used_index {
            return true;
        }
        self.after_sleep();
        false
    }

    /// Somebody looks again: calls are not worth their while.
    pub fn after_sleep(&mut self) {
        self.put_available_flags(NO_INTERRUPT);
    }

    fn put_available_flags(&self, flags: u16) {
        assert!(self.memory.store_u16(AVAILABLE, flags.to_le(), Ordering::Relaxed));
    }

    fn describe(&self, number: u16, at: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(BASE + at).to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(DESCRIPTORS + usize::from(number) * 16, &bytes);
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        self.memory.write(offset, bytes).expect("the ring is in the memory");
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.memory.read_array(offset).expect("the ring is in the memory")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> ClientRing {
        ClientRing::new(4096).unwrap()
    }

    #[test]
    fn a_call_is_asked_for_by_who_sleeps_and_nobody_sleeps_over_what_has_ended() {
        let mut ring = ring();
        let wants_call = |ring: &ClientRing| ring.get::<2>(AVAILABLE) == [0, 0];
        ring.submit(0, Command::Flush);
        assert!(ring.before_sleep());
        assert!(wants_call(&ring));
        ring.after_sleep();
        assert!(!wants_call(&ring));
        answer(&ring, 0, 0, 0);
        assert!(!ring.before_sleep());
        assert!(!wants_call(&ring), "it is awake");
        ring.reap(&mut Vec::new()).unwrap();
        assert!(ring.before_sleep());
        ring.after_sleep();
        ring.reset();
        assert!(wants_call(&ring), "another device, until somebody has slept");
    }

    /// What a device does: ends the request of `slot`.
    fn answer(ring: &ClientRing, nth: u16, descriptor: u32, status: u8) {
        let slot = descriptor as usize / 3;
        if slot < SLOT_COUNT {
            ring.put(HEADERS + slot * HEADER_BYTES + 32, &[status]);
        }
        let place = usize::from(nth % QUEUE_SIZE);
        ring.put(USED + 4 + 8 * place, &descriptor.to_le_bytes());
        ring.put(USED + 2, &nth.wrapping_add(1).to_le_bytes());
    }

    fn reap(ring: &mut ClientRing) -> Result<Vec<(usize, Status)>, String> {
        let mut out = Vec::new();
        ring.reap(&mut out).map(|()| out).map_err(|violation| violation.0)
    }

    #[test]
    fn requests_end_in_the_order_of_the_device_and_once() {
        let mut ring = ring();
        for slot in 0..3 {
            ring.submit(slot, Command::Flush);
        }
        answer(&ring, 0, 6, 0);
        answer(&ring, 1, 0, 1);
        assert_eq!(reap(&mut ring), Ok(vec![(2, Ok(())), (0, Err(Errno::EIO))]));
        assert_eq!(reap(&mut ring), Ok(vec![]));
        assert_eq!((ring.busy_count(), ring.free_slot()), (1, Some(0)));
        answer(&ring, 2, 3, 2);
        assert_eq!(reap(&mut ring), Ok(vec![(1, Err(Errno::EOPNOTSUPP))]));
    }

    #[test]
    fn a_ring_goes_round_its_indices() {
        let mut ring = ring();
        for nth in 0..=u16::MAX {
            let slot = usize::from(nth) % SLOT_COUNT;
            ring.submit(slot, Command::Flush);
            answer(&ring, nth, slot as u32 * 3, 0);
            assert_eq!(reap(&mut ring), Ok(vec![(slot, Ok(()))]));
        }
    }

    #[test]
    fn garbage_in_the_used_ring_is_a_violation() {
        type Garbage = fn(&ClientRing);
        let garbage: [(&str, Garbage); 6] = [
            ("not in flight", |ring| answer(ring, 0, 3, 0)),
            ("not in flight", |ring| answer(ring, 0, 1, 0)),
            ("not in flight", |ring| answer(ring, 0, u32::MAX, 0)),
            ("not in flight", |ring| answer(ring, 0, 3 * SLOT_COUNT as u32, 0)),
            ("status 255", |ring| answer(ring, 0, 0, STATUS_UNSET)),
            ("65535 requests have ended", |ring| ring.put(USED + 2, &[0xff, 0xff])),
        ];
        for (says, garble) in garbage {
            let mut ring = ring();
            ring.submit(0, Command::Flush);
            garble(&ring);
            let said = reap(&mut ring).unwrap_err();
            assert!(said.contains(says), "{said} does not say {says}");
        }
    }

    #[test]
    fn a_request_that_is_ended_twice_is_a_violation() {
        let mut ring = ring();
        ring.submit(0, Command::Flush);
        ring.submit(1, Command::Flush);
        answer(&ring, 0, 0, 0);
        answer(&ring, 1, 0, 0);
        assert!(reap(&mut ring).is_err());
    }

    #[test]
    fn noise_in_shared_memory_never_panics() {
        let mut seed = 1u64;
        for _ in 0..200 {
            let mut ring = ring();
            for slot in 0..SLOT_COUNT {
                ring.submit(slot, Command::Write { sector: 0, at: DATA as u64, length: 512 });
            }
            for offset in (USED..DATA).step_by(2) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ring.put(offset, &((seed >> 33) as u16 % 300).to_le_bytes());
            }
            let _ = reap(&mut ring);
        }
    }
}
