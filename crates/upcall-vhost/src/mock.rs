//! The other side, for tests: a guest's memory, a driver that fills rings in it, a
//! hypervisor that speaks vhost-user, and a host that serves queues from memory.
//!
//! The driver does what it is told, right or wrong: chains, indices and addresses can all
//! be set one by one. The three kinds of addresses (guest-physical, the hypervisor's, ours)
//! never coincide here, so that mixing them up is seen. Everything panics on errors.

mod packed;

use std::collections::{BTreeSet, VecDeque};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use upcall_block::{DiskInfo, Op, OpSet, Request, RequestQueue, Status};
use upcall_ring::{Access, Doorbell, Mapping, memfd};

use crate::dirty::DirtyLog;
use crate::inflight::{Extent, Inflight};
use crate::memory::RegionAddress;
use crate::queue::{Shared, Signals};
use crate::ring::{PackedRing, Position, Ring, RingAddress, SplitRing};
use crate::virtio::*;
pub use packed::PackedDriver;

use crate::{BlkConfig, BlkOptions, GuestMemory, QueueHost, Region, Stopped, VirtQueue};

/// The guest-physical address of the first byte of a [`Memory`], unless chosen.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// What to add to a guest-physical address for the hypervisor's.
pub const USER_OFFSET: u64 = 0x7f12_0000_0000;

/// A disk for tests.
pub fn disk_info(capacity: u64) -> DiskInfo {
    DiskInfo {
        capacity,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    }
}

/// A piece of a guest's memory.
#[derive(Debug)]
pub struct Memory {
    fd: OwnedFd,
    mapping: Arc<Mapping>,
    base: u64,
    /// What comes next is the guest's matter, wherever it is.
    next: Arc<AtomicU64>,
    /// Pages that the guest itself has written since somebody asked; none: nobody does.
    own: Mutex<Option<BTreeSet<u64>>>,
}

impl Memory {
    /// `length` bytes at [`GUEST_BASE`].
    pub fn new(length: usize) -> Memory {
        Memory::at(GUEST_BASE, length)
    }

    /// `length` bytes at guest-physical `base`.
    pub fn at(base: u64, length: usize) -> Memory {
        let fd = memfd("guest", length).expect("memfd");
        let mapping = Mapping::new(&fd, 0, length, Access::ReadWrite).expect("mapping");
        let (mapping, next) = (Arc::new(mapping), Arc::new(AtomicU64::new(base)));
        Memory { fd, mapping, base, next, own: Mutex::default() }
    }

    /// The memory to which a guest moves: as large, at the same address, and what is allocated
    /// in one is allocated in the other. All zeroes.
    pub fn twin(&self) -> Memory {
        Memory { next: self.next.clone(), ..Memory::at(self.base, self.mapping.len()) }
    }

    /// The pages of which something is allocated, guest-physical.
    pub fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        (self.base..self.next.load(Ordering::Relaxed)).step_by(4096)
    }

    /// Notes from now on which pages the guest itself writes, as a hypervisor knows it from the
    /// processor; or no more.
    pub fn note_own(&self, on: bool) {
        *self.own.lock().expect("lock") = on.then(BTreeSet::new);
    }

    /// The pages that the guest itself has written since the last call.
    pub fn take_own(&self) -> BTreeSet<u64> {
        self.own.lock().expect("lock").as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn note(&self, at: u64, length: usize) {
        if let Some(own) = &mut *self.own.lock().expect("lock") {
            own.extend((at / 4096 * 4096..at + length as u64).step_by(4096));
        }
    }

    /// Where it is.
    pub fn address(&self) -> RegionAddress {
        let length = self.mapping.len() as u64;
        RegionAddress { guest: self.base, user: self.base + USER_OFFSET, length }
    }

    /// It, mapped once more, as the device does.
    pub fn region(&self) -> Region {
        Region::map(self.address(), &self.fd, 0).expect("region")
    }

    /// The table of it alone.
    pub fn table(&self) -> GuestMemory {
        GuestMemory::new([self.region()]).expect("table")
    }

    /// Its file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Fresh bytes at a multiple of `alignment`; never given back.
    pub fn allocate(&self, length: usize, alignment: u64) -> u64 {
        let at = self.next.load(Ordering::Relaxed).next_multiple_of(alignment);
        self.next.store(at + length as u64, Ordering::Relaxed);
        assert!(at + length as u64 <= self.base + self.address().length, "mock memory is full");
        at
    }

    /// Stores bytes at guest-physical `at`.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.note(at, bytes.len());
        self.mapping.write((at - self.base) as usize, bytes).expect("inside");
    }

    /// Loads bytes at guest-physical `at`.
    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mapping.read((at - self.base) as usize, &mut bytes).expect("inside");
        bytes
    }

    /// Stores a number at guest-physical `at`, after all that was stored before.
    pub fn store(&self, at: u64, value: u16) {
        self.note(at, 2);
        assert!(self.mapping.store_u16((at - self.base) as usize, value, Ordering::Release));
    }

    /// Loads a number at guest-physical `at`, before all that is loaded later.
    pub fn load(&self, at: u64) -> u16 {
        let number = self.mapping.atomic_u16((at - self.base) as usize).expect("inside");
        number.load(Ordering::Acquire)
    }

    /// Writes a request of three parts somewhere: the chain, where its data is, and where
    /// its status will be.
    pub fn request(
        &self,
        kind: u32,
        sector: u64,
        out: &[u8],
        in_length: usize,
    ) -> (Vec<Desc>, u64, u64) {
        let at = self.allocate(HEADER_SIZE, 1);
        self.write(at, &header(kind, sector));
        let data = self.allocate(out.len() + in_length, 1);
        self.write(data, out);
        self.write(data + out.len() as u64, &vec![0xee; in_length]);
        let status = self.allocate(1, 1);
        self.write(status, &[0xff]);
        let mut chain = vec![Desc::readable(at, HEADER_SIZE as u32)];
        if !out.is_empty() {
            chain.push(Desc::readable(data, out.len() as u32));
        }
        if in_length > 0 {
            chain.push(Desc::writable(data + out.len() as u64, in_length as u32));
        }
        chain.push(Desc::writable(status, 1));
        (chain, data, status)
    }

    /// Says whether this address in our process is one of its bytes, as mapped by
    /// `region`. For checks that requests point nowhere else.
    pub fn offset_of(region: &Region, at: *const u8) -> Option<usize> {
        region.offset_of(at)
    }
}

/// What to put into a descriptor; the flag for "next" is added where one follows.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Guest-physical.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// `VIRTQ_DESC_F_...`
    pub flags: u16,
}

impl Desc {
    /// Memory that the device reads.
    pub fn readable(address: u64, length: u32) -> Desc {
        Desc { address, length, flags: 0 }
    }

    /// Memory that the device fills.
    pub fn writable(address: u64, length: u32) -> Desc {
        Desc { address, length, flags: DESC_WRITE }
    }

    /// A table of `count` descriptors.
    pub fn indirect(address: u64, count: u32) -> Desc {
        Desc { address, length: count * DESC_SIZE as u32, flags: DESC_INDIRECT }
    }

    /// As in memory.
    pub fn bytes(self, next: u16) -> [u8; DESC_SIZE] {
        let mut bytes = [0; DESC_SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }
}

/// The bytes of a request before its data.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The data of a discard or write-zeroes.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT_SIZE as usize] {
    let mut bytes = [0; SEGMENT_SIZE as usize];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A request that the driver made available.
#[derive(Clone, Copy, Debug)]
pub struct Submitted {
    /// Its head, which is its tag.
    pub head: u16,
    /// Where its data is: what it wrote, or will read.
    pub data: u64,
    /// Where its status will be; 0xff until then.
    pub status: u64,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// A driver with one ring in a [`Memory`].
#[derive(Debug)]
pub struct Driver {
    memory: Arc<Memory>,
    size: u16,
    event_idx: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    free: VecDeque<u16>,
}

impl Driver {
    /// A ring of `size` entries, empty, with its indices at `base`.
    pub fn new(memory: Arc<Memory>, size: u16, event_idx: bool, base: u16) -> Driver {
        let entries = usize::from(size);
        let driver = Driver {
            size,
            event_idx,
            descriptors: memory.allocate(entries * DESC_SIZE, 16),
            available: memory.allocate(6 + entries * 2, 2),
            used: memory.allocate(6 + entries * 8, 4),
            next_available: base,
            next_used: base,
            free: (0..size).step_by(3).filter(|head| head + 3 <= size).collect(),
            memory,
        };
        driver.memory.store(driver.available + 2, base);
        driver.memory.store(driver.used + 2, base);
        driver
    }

    /// Sets all indices to 0, as before a device is started again.
    pub fn reset(&mut self) {
        (self.next_available, self.next_used) = (0, 0);
        self.memory.store(self.available + 2, 0);
        self.memory.store(self.used + 2, 0);
    }

    /// Where the ring is: the hypervisor's addresses of descriptors, available, used.
    pub fn user_addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used].map(|at| at + USER_OFFSET)
    }

    /// Where its available index is, guest-physical.
    pub fn available_index(&self) -> u64 {
        self.available + 2
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Writes a descriptor.
    pub fn put_descriptor(&self, index: u16, desc: Desc, next: u16) {
        self.memory.write(self.descriptors + u64::from(index) * 16, &desc.bytes(next));
    }

    /// Writes a chain into descriptors `first`, `first + 1`, ...
    pub fn put_chain(&self, first: u16, chain: &[Desc]) {
        for (i, desc) in chain.iter().enumerate() {
            let index = (first + i as u16) % self.size;
            let next = if i + 1 < chain.len() { DESC_NEXT } else { 0 };
            let desc = Desc { flags: desc.flags | next, ..*desc };
            self.put_descriptor(index, desc, (index + 1) % self.size);
        }
    }

    /// Writes an indirect table somewhere; returns the descriptor for it.
    pub fn indirect(&self, chain: &[Desc]) -> Desc {
        let table = self.memory.allocate(chain.len() * DESC_SIZE, 16);
        for (i, desc) in chain.iter().enumerate() {
            let next = if i + 1 < chain.len() { DESC_NEXT } else { 0 };
            let desc = Desc { flags: desc.flags | next, ..*desc };
            self.memory.write(table + i as u64 * 16, &desc.bytes(i as u16 + 1));
        }
        Desc::indirect(table, chain.len() as u32)
    }

    /// Makes `head` available.
    pub fn make_available(&mut self, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        self.memory.store(self.available + 4 + entry * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Sets the available index, whatever was made available.
    pub fn set_available_index(&self, index: u16) {
        self.memory.store(self.available + 2, index);
    }

    /// Sets the flags of the available ring.
    pub fn set_available_flags(&self, flags: u16) {
        self.memory.store(self.available, flags);
    }

    /// Sets the index at which the driver wants a signal.
    pub fn set_used_event(&self, index: u16) {
        self.memory.store(self.available + 4 + u64::from(self.size) * 2, index);
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants its doorbell rung for what was made available last.
    pub fn wants_doorbell(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.load(self.used + 4 + u64::from(self.size) * 8);
            event == self.next_available.wrapping_sub(1)
        } else {
            self.memory.load(self.used) & USED_NO_NOTIFY == 0
        }
    }

    /// Makes a chain available whose head is `head`, at once.
    pub fn submit_chain(&mut self, head: u16, chain: &[Desc]) {
        self.put_chain(head, chain);
        self.make_available(head);
    }

    /// A request of three descriptors, as Linux makes them: header, data, status. `out`:
    /// data for the device; `in_length`: bytes for the device to fill, of 0xee.
    pub fn submit(&mut self, kind: u32, sector: u64, out: &[u8], in_length: usize) -> Submitted {
        let (chain, data, status) = self.memory.request(kind, sector, out, in_length);
        self.submit_request(&chain, data, status)
    }

    fn submit_request(&mut self, chain: &[Desc], data: u64, status: u64) -> Submitted {
        let head = self.free.pop_front().expect("a free descriptor");
        self.submit_chain(head, chain);
        Submitted { head, data, status }
    }

    /// The entries of the used ring since the last call.
    pub fn reap(&mut self) -> Vec<Used> {
        let mut seen = Vec::new();
        while self.memory.load(self.used + 2) != self.next_used {
            let entry = u64::from(self.next_used % self.size);
            let bytes = self.memory.read(self.used + 4 + entry * 8, 8);
            let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
            let used = Used { head: number(0), length: number(4) };
            self.next_used = self.next_used.wrapping_add(1);
            if !self.free.contains(&(used.head as u16)) && used.head.is_multiple_of(3) {
                self.free.push_back(used.head as u16);
            }
            seen.push(used);
        }
        seen
    }

    /// The status byte of a request.
    pub fn status(&self, submitted: &Submitted) -> u8 {
        self.memory.read(submitted.status, 1)[0]
    }
}

/// What a driver does, whatever the layout of its ring.
pub trait GuestDriver {
    /// Makes a request of a chain available that was written by [`Memory::request`], or its
    /// like, in one indirect descriptor or in as many as it has.
    fn submit_parts(&mut self, chain: &[Desc], data: u64, status: u64, indirect: bool)
    -> Submitted;

    /// Makes a request available once more, which no driver may do while it is in flight.
    fn submit_again(&mut self, submitted: &Submitted);

    /// What the device has shown as used since the last call.
    fn reap(&mut self) -> Vec<Used>;

    /// Its memory.
    fn memory(&self) -> &Memory;

    /// Where the device writes what is used, or its event structure: guest-physical.
    fn used(&self) -> u64;

    /// The queue on its ring, with indirect descriptors. A device that tracks what is in
    /// flight finds what was.
    fn queue(&self, device: &Device) -> VirtQueue;

    /// Goes on in another memory, which holds what this one held.
    fn move_to(&mut self, memory: &Arc<Memory>);
}

impl GuestDriver for Driver {
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
        self.make_available(submitted.head);
    }

    fn reap(&mut self) -> Vec<Used> {
        Driver::reap(self)
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn used(&self) -> u64 {
        self.used
    }

    fn queue(&self, device: &Device) -> VirtQueue {
        device.queue(self)
    }

    fn move_to(&mut self, memory: &Arc<Memory>) {
        self.memory = memory.clone();
    }
}

/// A file in which what is in flight is kept for one ring, as the hypervisor has it.
#[derive(Debug)]
pub struct InflightFile {
    extent: Extent,
    fd: OwnedFd,
    mapping: Mapping,
}

impl InflightFile {
    /// For a ring of `queue_size` entries; nothing is in flight.
    pub fn new(queue_size: u16, packed: bool) -> InflightFile {
        let extent = Extent { queues: 1, queue_size, packed };
        let fd = extent.make_file().expect("memfd");
        let mapping = Mapping::new(&fd, 0, extent.bytes(), Access::ReadWrite).expect("mapping");
        InflightFile { extent, fd, mapping }
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        self.mapping.len()
    }

    /// Stores bytes.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.mapping.write(at, bytes).expect("inside");
    }

    /// Loads bytes.
    pub fn read(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mapping.read(at, &mut bytes).expect("inside");
        bytes
    }

    fn map(&self) -> Inflight {
        let told = self.extent.bytes() as u64;
        Inflight::map(&self.fd, self.extent, 0, told).expect("what we made")
    }
}

/// A log of what the device writes, as the hypervisor has it.
#[derive(Debug)]
pub struct LogFile {
    fd: OwnedFd,
    mapping: Mapping,
}

impl LogFile {
    /// For guest-physical addresses up to `end`; nothing is marked.
    pub fn new(end: u64) -> LogFile {
        let words = end.div_ceil(4096 * 64) as usize;
        let fd = memfd("log", words * 8).expect("memfd");
        let mapping = Mapping::new(&fd, 0, words * 8, Access::ReadWrite).expect("mapping");
        LogFile { fd, mapping }
    }

    /// Its file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// The pages that were marked since the last call, by their guest-physical addresses.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for word in 0..self.mapping.len() / 8 {
            let number = self.mapping.atomic_u64(word * 8).expect("inside");
            let bits = u64::from_le(number.swap(0, Ordering::AcqRel));
            let marked = (0..64).filter(|bit| bits & 1 << bit != 0);
            pages.extend(marked.map(|bit| (word as u64 * 64 + bit) * 4096));
        }
        pages
    }
}

/// The pages of `memory` that are not as they were in `before`, guest-physical.
pub fn changed_pages(memory: &Memory, before: &[u8]) -> BTreeSet<u64> {
    let base = memory.address().guest;
    let now = memory.read(base, before.len());
    let pairs = now.chunks(4096).zip(before.chunks(4096)).zip((base..).step_by(4096));
    pairs.filter(|((now, before), _)| now != before).map(|(_, at)| at).collect()
}

/// A device without a socket: makes queues of rings directly.
#[derive(Debug)]
pub struct Device {
    inflight: Option<Inflight>,
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    /// Rung by the device when requests have completed.
    pub call: Doorbell,
    /// Rung by the device when the ring broke.
    pub error: Doorbell,
    /// To be rung by the driver.
    pub kick: Doorbell,
}

impl Device {
    /// The device of `config` in `memory`, whose driver negotiated flushes.
    pub fn new(config: BlkConfig, memory: GuestMemory) -> Device {
        let shared = Shared::new(Arc::new(config));
        shared.set_memory(memory);
        shared.set_flush_negotiated(true);
        let signals = Arc::new(Signals::default());
        let [call, error, kick] = std::array::from_fn(|_| Doorbell::new().expect("eventfd"));
        let fd = |doorbell: &Doorbell| doorbell.as_fd().try_clone_to_owned().expect("dup");
        signals.set_call(Some(fd(&call)));
        signals.set_error(Some(fd(&error)));
        Device { inflight: None, shared, signals, call, error, kick }
    }

    /// A disk of `capacity` bytes with all operations, in `memory`.
    pub fn with_capacity(capacity: u64, memory: GuestMemory) -> Device {
        let config = BlkConfig::new(disk_info(capacity), BlkOptions::default()).expect("config");
        Device::new(config, memory)
    }

    /// What the guest is told.
    pub fn config(&self) -> &BlkConfig {
        &self.shared.config
    }

    /// Keeps what is in flight in `file` from now on, in rings that start.
    pub fn track(&mut self, file: &InflightFile) {
        self.inflight = Some(file.map());
    }

    /// Logs what is written from now on, the ring at guest-physical `used`. None: no more.
    pub fn log(&self, log: Option<(&LogFile, u64)>) {
        let dirty = &self.shared.dirty;
        if let Some((file, used)) = log {
            let log = DirtyLog::map(&file.fd, 0, file.length()).expect("what we made");
            dirty.set_log(Some(log));
            self.signals.set_log_address(Some(used));
        }
        assert!(dirty.set_on(log.is_some()), "a kernel with membarrier");
    }

    /// Replaces the guest's memory under the running queues.
    pub fn set_memory(&self, memory: GuestMemory) {
        self.shared.set_memory(memory);
    }

    /// Whether the driver knows how to flush.
    pub fn set_flush_negotiated(&self, on: bool) {
        self.shared.set_flush_negotiated(on);
    }

    /// The queue on the driver's ring, from where the ring stands; `None` if the ring is not
    /// in memory.
    pub fn try_queue(&self, driver: &Driver, indirect: bool) -> Option<VirtQueue> {
        self.try_queue_at(driver, driver.memory.load(driver.used + 2), indirect)
    }

    /// The queue on the driver's ring, from `base` on; `None` if the ring is not in memory.
    pub fn try_queue_at(&self, driver: &Driver, base: u16, indirect: bool) -> Option<VirtQueue> {
        let [descriptors, available, used] = driver.user_addresses();
        let address = RingAddress { descriptors, available, used };
        let (_, memory) = self.shared.memory();
        let ring = SplitRing::new(&memory, address, driver.size, base, driver.event_idx)?;
        Some(self.make_queue(Ring::Split(ring), indirect))
    }

    /// The queue on the driver's packed ring, which goes on at `position` (the index, and
    /// above it in bit 15 the wrap counter); `None` if the ring is not in memory.
    pub fn try_packed_queue(
        &self,
        driver: &PackedDriver,
        position: u16,
        indirect: bool,
    ) -> Option<VirtQueue> {
        let [descriptors, available, used] = driver.user_addresses();
        let address = RingAddress { descriptors, available, used };
        let (_, memory) = self.shared.memory();
        let position = Position::parse(position, driver.size())?;
        let (size, event_idx) = (driver.size(), driver.event_idx());
        let ring = PackedRing::new(&memory, address, size, position, event_idx)?;
        Some(self.make_queue(Ring::Packed(ring), indirect))
    }

    fn make_queue(&self, ring: Ring, indirect: bool) -> VirtQueue {
        let (packed, size) = (matches!(ring, Ring::Packed(_)), ring.size());
        let region = self
            .inflight
            .as_ref()
            .and_then(|inflight| inflight.region(0, size, packed).expect("a file for such a ring"));
        let (shared, signals) = (self.shared.clone(), self.signals.clone());
        VirtQueue::new(0, ring, region, indirect, shared, signals, self.kick.clone())
    }

    /// The queue on the driver's ring, with indirect descriptors.
    pub fn queue(&self, driver: &Driver) -> VirtQueue {
        self.try_queue(driver, true).expect("a ring in memory")
    }
}

/// Carries out requests on bytes in memory.
#[derive(Debug)]
pub struct RamDisk(pub Vec<u8>);

impl RamDisk {
    /// Carries out one request.
    pub fn execute(&mut self, request: &Request) -> Status {
        let start = request.range.offset() as usize;
        let bytes = &mut self.0[start..start + request.range.length() as usize];
        match request.op {
            Op::Read => request.data.write(0, bytes),
            Op::Write => request.data.read(0, bytes),
            Op::Flush => {}
            Op::Discard | Op::WriteZeroes => bytes.fill(0),
        }
        Ok(())
    }

    /// Takes, carries out, completes and publishes what has arrived; returns how many.
    pub fn serve(&mut self, queue: &mut VirtQueue) -> usize {
        let mut requests = Vec::new();
        // After an error what came before it is still to be completed.
        let _ = queue.take(usize::MAX, &mut requests);
        for request in &requests {
            let status = self.execute(request);
            queue.complete(request.tag, status);
        }
        queue.publish();
        requests.len()
    }
}

/// A worker in small: serves each queue on a thread, all from one [`RamDisk`].
#[derive(Debug)]
pub struct ThreadHost {
    disk: Arc<Mutex<RamDisk>>,
    running: Vec<(u16, Doorbell, JoinHandle<Stopped>)>,
    /// What was called, for tests.
    pub calls: Arc<Mutex<Vec<String>>>,
}

impl ThreadHost {
    /// Serves a disk of `capacity` zeroes.
    pub fn new(capacity: usize) -> ThreadHost {
        let disk = Arc::new(Mutex::new(RamDisk(vec![0; capacity])));
        ThreadHost { disk, running: Vec::new(), calls: Arc::default() }
    }

    fn note(&self, call: String) {
        self.calls.lock().expect("lock").push(call);
    }
}

impl QueueHost for ThreadHost {
    fn start(&mut self, index: u16, mut queue: VirtQueue) {
        self.note(format!("start {index}"));
        let (disk, stop) = (self.disk.clone(), Doorbell::new().expect("eventfd"));
        let stopped = stop.clone();
        let serve = move || {
            let stopping = || {
                let mut fds = [PollFd::new(&stopped, PollFlags::IN)];
                poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
            };
            while !stopping() {
                if disk.lock().expect("lock").serve(&mut queue) > 0 || !queue.before_sleep() {
                    continue;
                }
                let doorbell = queue.doorbell().expect("doorbell");
                let mut fds = [
                    PollFd::from_borrowed_fd(doorbell, PollFlags::IN),
                    PollFd::new(&stopped, PollFlags::IN),
                ];
                let _ = poll(&mut fds, None);
                queue.after_sleep();
            }
            queue.finish()
        };
        self.running.push((index, stop, std::thread::spawn(serve)));
    }

    fn stop(&mut self, index: u16) -> Stopped {
        self.note(format!("stop {index}"));
        let at = self.running.iter().position(|(i, ..)| *i == index).expect("a running queue");
        let (_, stop, thread) = self.running.remove(at);
        stop.ring();
        thread.join().expect("the queue's thread")
    }

    fn disconnected(&mut self) {
        self.note("disconnected".into());
    }
}

/// Sends bytes with descriptors over a Unix socket, as a hypervisor does.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "too many descriptors");
    }
    let flags = SendFlags::NOSIGNAL;
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags).map(|_| ())
}

/// The bytes of a vhost-user message.
pub fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [code, flags, body.len() as u32] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}
