//! A client that can say anything: rings and messages by hand.
//!
//! What [`Client`] needs it does as the virtio specification says (split or packed rings,
//! with or without indirect descriptors and EVENT_IDX). Beside that it offers each step alone, so
//! that a test can write what no sane guest writes.
//!
//! Its memory is one memfd, shown to the device as two regions that lie far apart in guest
//! addresses and elsewhere again in the addresses rings are given in. Who mixes them up
//! fails at once.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::client::{Client, Io, Outcome, SLOT_BYTES};
use crate::driver::is_readable;
use crate::memory::SharedMemory;
use crate::message::{Connection, request};

mod logging;
mod packed;
mod reconnect;

pub use logging::Log;

/// Feature bits of virtio and of virtio-blk.
#[allow(missing_docs)]
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
}

/// Types of a virtio-blk request.
#[allow(missing_docs)]
pub mod kind {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes of a virtio-blk request; `NONE` is what the client puts there itself.
#[allow(missing_docs)]
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    pub const NONE: u8 = 0xee;
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const RINGS_GUEST: u64 = 0x4000_0000;
const DATA_GUEST: u64 = 0x12_3450_0000;

const RING_BYTES: usize = 64 << 10;
const SPARE_BYTES: usize = 32 << 20;
const SLOT_HEAD_BYTES: usize = 4096;
const HEADER_AT: usize = 0;
const RANGE_AT: usize = 64;
const STATUS_AT: usize = 128;
const TABLE_AT: usize = 1024;
const CONFIG_BYTES: usize = 60;

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct RawOptions {
    /// Queues to set up.
    pub queues: usize,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Requests in flight in each, as a [`Client`].
    pub slots: usize,
    /// Features to take if they are offered, beside VERSION_1.
    pub features: u64,
    /// As a [`Client`], put every request into an indirect table.
    pub indirect: bool,
}

impl Default for RawOptions {
    fn default() -> Self {
        let features = feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::RO
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ
            | feature::DISCARD
            | feature::WRITE_ZEROES
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX;
        RawOptions { queues: 1, queue_size: 128, slots: 8, features, indirect: false }
    }
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// Bit of `flags`: another follows.
    pub const NEXT: u16 = NEXT;
    /// Bit of `flags`: for the device to write.
    pub const WRITE: u16 = WRITE;
    /// Bit of `flags`: a table of descriptors.
    pub const INDIRECT: u16 = INDIRECT;
    /// Bytes of one in memory.
    pub const BYTES: usize = 16;

    /// As it stands in memory.
    pub fn bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// A piece of a request.
#[derive(Clone, Debug)]
pub enum Part {
    /// For the device to read.
    Out(Vec<u8>),
    /// For the device to write: this many bytes.
    In(u32),
}

/// The configuration space of a virtio-blk device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BlockConfig {
    pub capacity_sectors: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub writeback: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
}

impl BlockConfig {
    fn parse(bytes: &[u8]) -> BlockConfig {
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        BlockConfig {
            capacity_sectors: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: bytes[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: bytes[56],
        }
    }
}

/// A ring and what is in flight in it. Places are offsets in the client's memory.
#[derive(Debug)]
struct Ring {
    size: u16,
    descriptors: usize,
    avail: usize,
    used: usize,
    avail_index: u16,
    used_index: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    slot_of: HashMap<u16, usize>,
    kick: OwnedFd,
    call: OwnedFd,
    /// Where it stands, if it is a packed ring; its event structures are where a split one
    /// has its available and used rings, its ids are taken from `free`.
    packed: Option<packed::Packed>,
}

/// A connection with memory and queues of its own.
#[derive(Debug)]
pub struct RawClient {
    connection: Connection,
    memory: SharedMemory,
    rings: Vec<Ring>,
    features: u64,
    options: RawOptions,
    spare_next: usize,
    inflight: Option<reconnect::Inflight>,
}

impl RawClient {
    /// Connects, negotiates, and starts the queues.
    pub fn connect(path: &Path, options: RawOptions) -> io::Result<RawClient> {
        let mut connection = Connection::open(path)?;
        connection.command(request::SET_OWNER, &[], &[])?;
        let offered = connection.ask(request::GET_FEATURES, &[])?.u64()?;
        let wanted = options.features | feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        let features = offered & wanted;
        let offered = connection.ask(request::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        let wanted = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG;
        if offered & wanted != wanted {
            return Err(io::Error::other("the server lacks MQ, REPLY_ACK or CONFIG"));
        }
        let wanted = wanted | offered & logging::LOG_SHMFD;
        connection.command(request::SET_PROTOCOL_FEATURES, &wanted.to_le_bytes(), &[])?;
        connection.acks = true;
        connection.command(request::SET_FEATURES, &features.to_le_bytes(), &[])?;

        let slots = options.queues * options.slots * (SLOT_HEAD_BYTES + SLOT_BYTES);
        let memory = SharedMemory::new(options.queues * RING_BYTES + slots + SPARE_BYTES);
        let rings = Vec::new();
        let (spare_next, inflight) = (0, None);
        let mut client =
            RawClient { connection, memory, rings, features, options, spare_next, inflight };
        client.send_memory_table()?;
        for queue in 0..options.queues {
            let ring = client.new_ring(queue)?;
            client.rings.push(ring);
            client.start(queue, client.device_index(queue))?;
        }
        Ok(client)
    }

    /// The features that were negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The messages' side, for requests of a test's own.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Tells the device (again) where the memory is.
    pub fn send_memory_table(&self) -> io::Result<()> {
        let split = self.options.queues * RING_BYTES;
        let mut payload = Vec::new();
        payload.extend_from_slice(&2u32.to_le_bytes());
        payload.extend_from_slice(&0u32.to_le_bytes());
        for (guest, offset, length) in
            [(RINGS_GUEST, 0, split), (DATA_GUEST, split, self.memory.len() - split)]
        {
            let user = self.memory.address() + offset as u64;
            for word in [guest, length as u64, user, offset as u64] {
                payload.extend_from_slice(&word.to_le_bytes());
            }
        }
        let fds = [self.memory.fd(), self.memory.fd()];
        self.connection.command(request::SET_MEM_TABLE, &payload, &fds)
    }

    fn new_ring(&self, queue: usize) -> io::Result<Ring> {
        let size = self.options.queue_size;
        let count = usize::from(size);
        let descriptors = queue * RING_BYTES;
        let avail = descriptors + Descriptor::BYTES * count;
        let used = (avail + 6 + 2 * count).next_multiple_of(4);
        assert!(used + 6 + 8 * count <= descriptors + RING_BYTES, "queue size too large");
        Ok(Ring {
            size,
            descriptors,
            avail,
            used,
            avail_index: 0,
            used_index: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            slot_of: HashMap::new(),
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            packed: self.is_packed().then(packed::Packed::default),
        })
    }

    /// Starts a queue, its next entry being `base`.
    pub fn start(&mut self, queue: usize, base: u16) -> io::Result<()> {
        let ring = &self.rings[queue];
        let index = queue as u32;
        self.vring_state(request::SET_VRING_NUM, index, u32::from(ring.size))?;
        self.vring_state(request::SET_VRING_BASE, index, self.whole_base(base))?;
        self.send_ring_address(queue, false)?;
        let index_bytes = u64::from(index).to_le_bytes();
        self.connection.command(request::SET_VRING_CALL, &index_bytes, &[ring.call.as_fd()])?;
        self.connection.command(request::SET_VRING_KICK, &index_bytes, &[ring.kick.as_fd()])?;
        self.vring_state(request::SET_VRING_ENABLE, index, 1)
    }

    /// Says where a queue's ring is, and whether what is written there is to be logged.
    fn send_ring_address(&self, queue: usize, logged: bool) -> io::Result<()> {
        let ring = &self.rings[queue];
        let user = |offset: usize| self.memory.address() + offset as u64;
        let mut payload = (queue as u32).to_le_bytes().to_vec();
        payload.extend_from_slice(&u32::from(logged).to_le_bytes());
        let log = self.guest(ring.used);
        for address in [user(ring.descriptors), user(ring.used), user(ring.avail), log] {
            payload.extend_from_slice(&address.to_le_bytes());
        }
        self.connection.command(request::SET_VRING_ADDR, &payload, &[])
    }

    /// Stops a queue; what was in flight has ended when this returns. Gives the index of
    /// the next entry that the device would take.
    pub fn stop(&mut self, queue: usize) -> io::Result<u16> {
        let mut payload = (queue as u32).to_le_bytes().to_vec();
        payload.extend_from_slice(&[0; 4]);
        let reply = self.connection.ask(request::GET_VRING_BASE, &payload)?;
        let base = reply.payload.get(4..8).ok_or(io::ErrorKind::InvalidData)?;
        Ok(u32::from_le_bytes(base.try_into().unwrap()) as u16)
    }

    /// Sends one of the requests that carry a queue's index and a number.
    pub fn vring_state(&self, request: u32, queue: u32, number: u32) -> io::Result<()> {
        let mut payload = queue.to_le_bytes().to_vec();
        payload.extend_from_slice(&number.to_le_bytes());
        self.connection.command(request, &payload, &[])
    }

    /// The device's configuration space, as it is now.
    pub fn config(&self) -> io::Result<BlockConfig> {
        let mut payload = Vec::new();
        for word in [0, CONFIG_BYTES as u32, 0] {
            payload.extend_from_slice(&word.to_le_bytes());
        }
        payload.extend_from_slice(&[0; CONFIG_BYTES]);
        let reply = self.connection.ask(request::GET_CONFIG, &payload)?;
        let bytes = reply.payload.get(12..12 + CONFIG_BYTES).ok_or(io::ErrorKind::InvalidData)?;
        Ok(BlockConfig::parse(bytes))
    }

    /// Writes bytes of the configuration space.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut payload = Vec::new();
        for word in [offset, bytes.len() as u32, 0] {
            payload.extend_from_slice(&word.to_le_bytes());
        }
        payload.extend_from_slice(bytes);
        self.connection.command(request::SET_CONFIG, &payload, &[])
    }

    // ------------------------------------------------------------- memory

    /// A place for `length` bytes in the data region; taken from a circle of 32 MiB, so
    /// that it is overwritten by later ones some day.
    pub fn place(&mut self, length: usize) -> usize {
        assert!(length <= SPARE_BYTES);
        let aligned = self.spare_next.next_multiple_of(64);
        let start = if aligned + length > SPARE_BYTES { 0 } else { aligned };
        self.spare_next = start + length;
        self.memory.len() - SPARE_BYTES + start
    }

    /// The guest address of a place.
    pub fn guest(&self, offset: usize) -> u64 {
        let split = self.options.queues * RING_BYTES;
        match offset.checked_sub(split) {
            Some(offset) => DATA_GUEST + offset as u64,
            None => RINGS_GUEST + offset as u64,
        }
    }

    /// The guest address behind the last byte of memory.
    pub fn guest_end(&self) -> u64 {
        self.guest(self.memory.len() - 1) + 1
    }

    /// The memory itself.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    // -------------------------------------------------------------- rings

    /// Writes an entry of the queue's descriptor table.
    pub fn put_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = self.rings[queue].descriptors + Descriptor::BYTES * usize::from(index);
        self.memory.write(at, &descriptor.bytes());
    }

    /// Puts `head` into the available ring and shows it to the device, without a kick.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let at = ring.avail + 4 + 2 * usize::from(ring.avail_index % ring.size);
        self.memory.write(at, &head.to_le_bytes());
        ring.avail_index = ring.avail_index.wrapping_add(1);
        self.memory.store_u16(ring.avail + 2, ring.avail_index);
    }

    /// Sets the available ring's index to anything.
    pub fn set_avail_index(&mut self, queue: usize, index: u16) {
        let ring = &mut self.rings[queue];
        ring.avail_index = index;
        self.memory.store_u16(ring.avail + 2, index);
    }

    /// With EVENT_IDX: asks to be signalled when the used index has passed `index`.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let ring = &self.rings[queue];
        assert!(ring.packed.is_none(), "only split rings have it");
        self.memory.store_u16(ring.avail + 4 + 2 * usize::from(ring.size), index);
    }

    /// The index of the used ring that this side has read up to.
    pub fn used_index(&self, queue: usize) -> u16 {
        self.rings[queue].used_index
    }

    /// The index that the device's used ring has reached. A packed ring does not say: its
    /// first position, which is as much as QEMU knows of it when the device has died.
    pub fn device_index(&self, queue: usize) -> u16 {
        if self.rings[queue].packed.is_some() {
            return packed::START;
        }
        self.memory.load_u16(self.rings[queue].used + 2)
    }

    /// Tells the device to look, whatever it asked for.
    pub fn kick(&self, queue: usize) {
        rustix::io::write(&self.rings[queue].kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Whether the device signalled since the last time this was asked.
    pub fn was_called(&self, queue: usize) -> bool {
        rustix::io::read(&self.rings[queue].call, &mut [0; 8][..]).is_ok()
    }

    fn kick_if_wanted(&self, queue: usize, before: u16) {
        let ring = &self.rings[queue];
        let wanted = if self.features & feature::EVENT_IDX != 0 {
            let event = self.memory.load_u16(ring.used + 4 + 8 * usize::from(ring.size));
            let now = ring.avail_index;
            now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            self.memory.load_u16(ring.used) & 1 == 0
        };
        if wanted {
            self.kick(queue);
        }
    }

    /// Chains descriptors (their `next` and NEXT are set here) and publishes them, in the
    /// queue's table or in an indirect one at `table`. Gives the head.
    pub fn submit_chain(
        &mut self,
        queue: usize,
        mut chain: Vec<Descriptor>,
        table: Option<usize>,
    ) -> u16 {
        if let Some(table) = table {
            let last = chain.len() - 1;
            for (index, descriptor) in chain.iter_mut().enumerate() {
                descriptor.next = if index < last { index as u16 + 1 } else { 0 };
                descriptor.flags |= if index < last { NEXT } else { 0 };
                let bytes = if self.is_packed() {
                    packed::bytes(*descriptor, 0, descriptor.flags & WRITE)
                } else {
                    descriptor.bytes()
                };
                self.memory.write(table + Descriptor::BYTES * index, &bytes);
            }
            let length = (Descriptor::BYTES * chain.len()) as u32;
            let address = self.guest(table);
            chain = vec![Descriptor { address, length, flags: INDIRECT, next: 0 }];
        }
        let ring = &mut self.rings[queue];
        assert!(ring.free.len() >= chain.len(), "the test uses more descriptors than there are");
        let indexes: Vec<u16> = chain.iter().map(|_| ring.free.pop().unwrap()).collect();
        let before = ring.avail_index;
        ring.chains.insert(indexes[0], indexes.clone());
        if self.is_packed() {
            self.submit_packed(queue, indexes[0], &chain);
            return indexes[0];
        }
        for (position, descriptor) in chain.iter().enumerate() {
            let mut descriptor = *descriptor;
            if let Some(&next) = indexes.get(position + 1) {
                descriptor.next = next;
                descriptor.flags |= NEXT;
            }
            self.put_descriptor(queue, indexes[position], descriptor);
        }
        self.publish(queue, indexes[0]);
        self.kick_if_wanted(queue, before);
        indexes[0]
    }

    /// The next used entry, if there is one.
    pub fn take_used(&mut self, queue: usize) -> Option<Used> {
        if self.is_packed() {
            return self.take_used_packed(queue);
        }
        let ring = &mut self.rings[queue];
        if self.memory.load_u16(ring.used + 2) == ring.used_index {
            return None;
        }
        let at = ring.used + 4 + 8 * usize::from(ring.used_index % ring.size);
        let entry = self.memory.copy(at, 8);
        let head = u32::from_le_bytes(entry[..4].try_into().unwrap());
        let written = u32::from_le_bytes(entry[4..].try_into().unwrap());
        ring.used_index = ring.used_index.wrapping_add(1);
        let head = u16::try_from(head).expect("used entry names no descriptor");
        if let Some(chain) = ring.chains.remove(&head) {
            ring.free.extend(chain);
        }
        self.set_used_event(queue, self.rings[queue].used_index);
        Some(Used { head, written })
    }

    /// Waits for the next used entry.
    pub fn wait_used(&mut self, queue: usize, timeout: Duration) -> Option<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take_used(queue) {
                return Some(used);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            // Not for ever: a device that forgets to signal is found by other tests.
            is_readable(&self.rings[queue].call, left.min(Duration::from_millis(100)));
            self.was_called(queue);
        }
    }

    /// Sends a request of these parts, direct or indirect, and waits for its end. Gives
    /// what the device wrote, one vector for each [`Part::In`], and the bytes it says it
    /// wrote; None if the request does not end in time.
    pub fn exchange(
        &mut self,
        queue: usize,
        parts: &[Part],
        indirect: bool,
        timeout: Duration,
    ) -> Option<(Vec<Vec<u8>>, u32)> {
        let mut chain = Vec::new();
        let mut answers = Vec::new();
        for part in parts {
            let (length, flags) = match part {
                Part::Out(bytes) => (bytes.len(), 0),
                Part::In(length) => (*length as usize, WRITE),
            };
            let place = self.place(length);
            match part {
                Part::Out(bytes) => self.memory.write(place, bytes),
                Part::In(_) => {
                    self.memory.write(place, &vec![status::NONE; length]);
                    answers.push((place, length));
                }
            }
            let address = self.guest(place);
            chain.push(Descriptor { address, length: length as u32, flags, next: 0 });
        }
        let table = indirect.then(|| self.place(Descriptor::BYTES * chain.len()));
        let head = self.submit_chain(queue, chain, table);
        let used = self.wait_used(queue, timeout)?;
        assert_eq!(used.head, head, "another request ended");
        let answers = answers.iter().map(|&(at, length)| self.memory.copy(at, length)).collect();
        Some((answers, used.written))
    }

    /// A request with a proper header and status byte around `parts`; gives the status and
    /// the data that the device wrote. Panics if it does not end.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        parts: &[Part],
    ) -> (u8, Vec<u8>) {
        let mut all = vec![Part::Out(header(kind, sector))];
        all.extend_from_slice(parts);
        all.push(Part::In(1));
        let (mut answers, _) = self
            .exchange(queue, &all, false, Duration::from_secs(20))
            .unwrap_or_else(|| panic!("request of type {kind} at {sector} does not end"));
        let status = answers.pop().unwrap()[0];
        (status, answers.concat())
    }

    fn slot_head(&self, queue: usize, slot: usize) -> usize {
        assert!(slot < self.options.slots);
        let index = queue * self.options.slots + slot;
        self.options.queues * RING_BYTES + index * (SLOT_HEAD_BYTES + SLOT_BYTES)
    }
}

/// The header of a virtio-blk request.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range as discard and write-zeroes take it.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sectors.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes
}

impl Client for RawClient {
    fn queues(&self) -> usize {
        self.rings.len()
    }

    fn slots(&self) -> usize {
        self.options.slots
    }

    fn capacity(&self) -> u64 {
        self.config().unwrap().capacity_sectors * 512
    }

    fn put(&self, queue: usize, slot: usize, bytes: &[u8]) {
        assert!(bytes.len() <= SLOT_BYTES);
        self.memory.write(self.slot_head(queue, slot) + SLOT_HEAD_BYTES, bytes);
    }

    fn get(&self, queue: usize, slot: usize, bytes: &mut [u8]) {
        assert!(bytes.len() <= SLOT_BYTES);
        self.memory.read(self.slot_head(queue, slot) + SLOT_HEAD_BYTES, bytes);
    }

    fn submit(&mut self, queue: usize, slot: usize, io: Io, pieces: &[u32]) {
        let head = self.slot_head(queue, slot);
        let (kind, sector, data_flags) = match io {
            Io::Read { offset, .. } => (kind::READ, offset / 512, WRITE),
            Io::Write { offset, .. } => (kind::WRITE, offset / 512, 0),
            Io::Flush => (kind::FLUSH, 0, 0),
            Io::Discard { .. } => (kind::DISCARD, 0, 0),
            Io::WriteZeroes { .. } => (kind::WRITE_ZEROES, 0, 0),
        };
        let descriptor = |at: usize, length: u32, flags: u16| Descriptor {
            address: self.guest(at),
            length,
            flags,
            next: 0,
        };
        self.memory.write(head + HEADER_AT, &header(kind, sector));
        let mut chain = vec![descriptor(head + HEADER_AT, 16, 0)];
        let ranged = match io {
            Io::Discard { offset, length } => Some((offset, length, 0)),
            Io::WriteZeroes { offset, length, unmap } => Some((offset, length, u32::from(unmap))),
            _ => None,
        };
        if let Some((offset, length, flags)) = ranged {
            let bytes = range(offset / 512, (length / 512) as u32, flags);
            self.memory.write(head + RANGE_AT, &bytes);
            chain.push(descriptor(head + RANGE_AT, 16, 0));
        }
        let mut at = head + SLOT_HEAD_BYTES;
        for &piece in pieces {
            chain.push(descriptor(at, piece, data_flags));
            at += piece as usize;
        }
        self.memory.write(head + STATUS_AT, &[status::NONE]);
        chain.push(descriptor(head + STATUS_AT, 1, WRITE));
        let table = self.options.indirect.then_some(head + TABLE_AT);
        let first = self.submit_chain(queue, chain, table);
        self.rings[queue].slot_of.insert(first, slot);
    }

    fn ended(&mut self, queue: usize) -> Vec<(usize, Outcome)> {
        let mut ended = Vec::new();
        while let Some(used) = self.take_used(queue) {
            let slot = self.rings[queue].slot_of.remove(&used.head).expect("used, never submitted");
            let mut byte = [0];
            self.memory.read(self.slot_head(queue, slot) + STATUS_AT, &mut byte);
            let outcome = match byte[0] {
                status::OK => Outcome::Ok,
                status::IOERR => Outcome::IoError,
                status::UNSUPP => Outcome::Unsupported,
                _ => Outcome::Nonsense,
            };
            ended.push((slot, outcome));
        }
        ended
    }

    fn wait(&mut self, queue: usize, timeout: Duration) {
        let ring = &self.rings[queue];
        if self.memory.load_u16(ring.used + 2) != ring.used_index {
            return;
        }
        is_readable(&ring.call, timeout);
        self.was_called(queue);
    }
}
