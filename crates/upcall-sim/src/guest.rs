//! The guest: drivers that fill rings in its memory with requests, and look at what comes
//! back.
//!
//! Always true: each head that the driver made available comes back at most once, with a
//! status and a length that fit the request; memory that the device does not own does not
//! change. What the data may be is for the history to say.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use upcall_block::Op;
use upcall_vhost::VirtQueue;
use upcall_vhost::mock::{
    Desc, Device, Driver, GuestDriver, InflightFile, Memory, PackedDriver, Used, header, segment,
};

use crate::random::Random;
use crate::spy::Taken;
use crate::stamp::{Bytes, Content, SECTOR, parse, stamp};

/// Most sectors of a request.
pub const SECTORS_MAX: usize = 16;
/// Descriptors that belong to a head.
const DESCRIPTORS: u16 = 4;
/// Most pieces of a request's data.
const PIECES_MAX: usize = 6;
/// Bytes around a request's data that nobody may write.
const MARGIN: usize = 64;
const POISON: u8 = 0xdd;
const UNFILLED: u8 = 0xee;
/// Before the device has written a status.
const NO_STATUS: u8 = 0xff;

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes {
        unmap: bool,
    },
    /// The serial number: answered without the chain.
    GetId,
    /// An operation that does not exist.
    Unknown,
    /// A write behind the end.
    PastEnd,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Discard => "discard",
            Kind::WriteZeroes { .. } => "write-zeroes",
            Kind::GetId => "get-id",
            Kind::Unknown => "unknown",
            Kind::PastEnd => "past-end",
        }
    }

    /// What it becomes, if it gets so far.
    pub fn op(self) -> Option<Op> {
        match self {
            Kind::Read => Some(Op::Read),
            Kind::Write => Some(Op::Write),
            Kind::Flush => Some(Op::Flush),
            Kind::Discard => Some(Op::Discard),
            Kind::WriteZeroes { .. } => Some(Op::WriteZeroes),
            Kind::GetId | Kind::Unknown | Kind::PastEnd => None,
        }
    }

    /// Whether it changes what the disk holds, if it succeeds.
    pub fn is_modification(self) -> bool {
        matches!(self, Kind::Write | Kind::Discard | Kind::WriteZeroes { .. })
    }
}

/// How a request ended, as its status byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Error,
    Unsupported,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique in the world.
    pub id: u64,
    pub kind: Kind,
    pub sectors: Range<usize>,
    /// By which ring of its disk it came.
    pub ring: usize,
    pub begun_ns: u64,
}

/// One that came back.
#[derive(Debug)]
pub struct Ended {
    pub request: Request,
    pub outcome: Outcome,
    /// Of a read that succeeded.
    pub contents: Vec<Content>,
}

/// A head, with memory of its own.
#[derive(Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
    busy: Option<Request>,
}

/// A driver, by the layout of its ring.
enum Layout {
    Split(Driver),
    Packed(PackedDriver),
}

/// How a ring is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub size: u16,
    pub packed: bool,
    pub event_idx: bool,
    /// Where the indices of a split ring begin.
    pub base: u16,
}

/// One ring of a guest's disk.
pub struct Ring {
    shape: Shape,
    layout: Layout,
    /// What the hypervisor keeps of the requests in flight, for the next worker.
    inflight: InflightFile,
    memory: Arc<Memory>,
    disk: u32,
    slots: Vec<Slot>,
    /// Sectors of the disk.
    capacity: usize,
    /// The last request that this life of the worker was handed out.
    last_taken: u64,
    /// Requests that any worker was.
    handed: BTreeSet<u64>,
    /// Those that workers of hosts were which the guest has left: no other worker may.
    elsewhere: BTreeSet<u64>,
    /// Where it goes on, if it was said elsewhere.
    place: Option<u16>,
}

const DATA: usize = SECTORS_MAX * SECTOR;

impl Ring {
    pub fn new(memory: &Arc<Memory>, shape: Shape, disk: u32, capacity: usize) -> Ring {
        let slots = (0..shape.size / DESCRIPTORS).map(|_| {
            let data = memory.allocate(DATA + 2 * MARGIN, 64) + MARGIN as u64;
            memory.write(data - MARGIN as u64, &[POISON; DATA + 2 * MARGIN]);
            Slot {
                header: memory.allocate(32, 16),
                data,
                status: memory.allocate(1, 1),
                table: memory.allocate(16 * (PIECES_MAX + 2), 16),
                busy: None,
            }
        });
        Ring {
            shape,
            slots: slots.collect(),
            layout: Layout::new(memory, shape),
            inflight: InflightFile::new(shape.size, shape.packed),
            memory: memory.clone(),
            disk,
            capacity,
            last_taken: 0,
            handed: BTreeSet::new(),
            elsewhere: BTreeSet::new(),
            place: None,
        }
    }

    /// A worker begins.
    pub fn begin_life(&mut self) {
        self.last_taken = 0;
    }

    /// The worker was handed out a request. Within a life they come in the order in which
    /// they were submitted: first those that another worker had, which say so, and each once.
    pub fn check_taken(&mut self, taken: &Taken) {
        let same = |request: &&Request| {
            request.id > self.last_taken
                && !self.elsewhere.contains(&request.id)
                && request.kind.op() == Some(taken.op)
                && request.sectors == taken.sectors
        };
        let open = self.slots.iter().filter_map(|slot| slot.busy.as_ref()).filter(same);
        // One that a worker completed, and the guest has not looked at, is no candidate for
        // a request that nobody had.
        let candidates = open.map(|request| request.id);
        let id = candidates.filter(|id| taken.retry || !self.handed.contains(id)).min();
        let Some(id) = id else {
            panic!(
                "the ring hands out {taken:?} after request {}: twice, out of order, without \
                 saying that another worker had it, or never asked for",
                self.last_taken
            );
        };
        self.last_taken = id;
        self.handed.insert(id);
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        self.slots.iter().any(|slot| slot.busy.is_none())
    }

    /// Makes a request available. There must be room.
    pub fn submit(&mut self, request: Request, random: &mut Random) {
        let free: Vec<usize> =
            (0..self.slots.len()).filter(|at| self.slots[*at].busy.is_none()).collect();
        let at = free[random.below(free.len())];
        self.check_margins(at);
        let chain = self.prepare(at, &request, random);
        let direct = chain.len() <= usize::from(DESCRIPTORS) && !random.one_in(3);
        if direct {
            self.layout.submit(at, &chain);
        } else {
            let table = self.slots[at].table;
            for (number, desc) in chain.iter().enumerate() {
                let bytes = self.layout.indirect(*desc, number, number + 1 == chain.len());
                self.memory.write(table + number as u64 * 16, &bytes);
            }
            self.layout.submit(at, &[Desc::indirect(table, chain.len() as u32)]);
        }
        self.slots[at].busy = Some(request);
    }

    fn prepare(&self, at: usize, request: &Request, random: &mut Random) -> Vec<Desc> {
        let Slot { header: at_header, data, status, .. } = self.slots[at];
        let length = request.sectors.len() * SECTOR;
        let first = request.sectors.start as u64;
        let number = match request.kind {
            Kind::Read => 0,
            Kind::Write | Kind::PastEnd => 1,
            Kind::Flush => 4,
            Kind::GetId => 8,
            Kind::Discard => 11,
            Kind::WriteZeroes { .. } => 13,
            Kind::Unknown => 77,
        };
        let sector = match request.kind {
            Kind::Read | Kind::Write => first,
            Kind::PastEnd => self.capacity as u64,
            _ => 0,
        };
        self.memory.write(at_header, &header(number, sector));
        self.memory.write(status, &[NO_STATUS]);
        let mut chain = vec![Desc::readable(at_header, 16)];
        match request.kind {
            Kind::Read => {
                self.memory.write(data, &vec![UNFILLED; length]);
                let parts = pieces(data, length, random);
                chain.extend(parts.into_iter().map(|(at, length)| Desc::writable(at, length)));
            }
            Kind::Write => {
                for (number, sector) in request.sectors.clone().enumerate() {
                    let bytes = stamp(self.disk, sector as u32, request.id);
                    self.memory.write(data + (number * SECTOR) as u64, &bytes);
                }
                let parts = pieces(data, length, random);
                chain.extend(parts.into_iter().map(|(at, length)| Desc::readable(at, length)));
            }
            Kind::PastEnd => chain.push(Desc::readable(data, SECTOR as u32)),
            Kind::GetId => chain.push(Desc::writable(data, 20)),
            Kind::Discard | Kind::WriteZeroes { .. } => {
                let flags = u32::from(request.kind == Kind::WriteZeroes { unmap: true });
                let range = segment(first, request.sectors.len() as u32, flags);
                self.memory.write(at_header + 16, &range);
                chain.push(Desc::readable(at_header + 16, 16));
            }
            Kind::Flush | Kind::Unknown => {}
        }
        chain.push(Desc::writable(status, 1));
        chain
    }

    fn check_margins(&self, at: usize) {
        let data = self.slots[at].data;
        for start in [data - MARGIN as u64, data + DATA as u64] {
            let bytes = self.memory.read(start, MARGIN);
            assert!(bytes.iter().all(|byte| *byte == POISON), "written beside a request's data");
        }
    }

    /// What came back since the last call.
    pub fn reap(&mut self) -> Vec<Ended> {
        let used = self.layout.reap();
        used.into_iter().map(|used| self.end(used.head, used.length)).collect()
    }

    fn end(&mut self, head: u32, length: u32) -> Ended {
        let at = self.layout.slot(head);
        let Some(at) = at.filter(|at| *at < self.slots.len()) else {
            panic!("head {head} came back, which was never made available");
        };
        let Some(request) = self.slots[at].busy.take() else {
            panic!("head {head} came back although nothing is in flight there: completed twice");
        };
        let Slot { data, status, .. } = self.slots[at];
        let outcome = match self.memory.read(status, 1)[0] {
            0 => Outcome::Ok,
            1 => Outcome::Error,
            2 => Outcome::Unsupported,
            other => panic!("{request:?} came back with status {other}"),
        };
        let filled = match (request.kind, outcome) {
            (Kind::Read, Outcome::Ok) => request.sectors.len() * SECTOR,
            (Kind::GetId, Outcome::Ok) => 20,
            _ => 0,
        };
        assert_eq!(length as usize, filled + 1, "used length of {request:?}, {outcome:?}");
        let contents = match (request.kind, outcome) {
            (Kind::Read, Outcome::Ok) => (0..request.sectors.len())
                .map(|number| {
                    let bytes = self.memory.read(data + (number * SECTOR) as u64, SECTOR);
                    parse(&Bytes::try_from(bytes).expect("a sector"))
                })
                .collect(),
            _ => Vec::new(),
        };
        self.poison(at);
        Ended { request, outcome, contents }
    }

    /// The memory is the guest's again: nobody may write it.
    fn poison(&self, at: usize) {
        self.memory.write(self.slots[at].data, &[POISON; DATA]);
    }

    /// Nobody wrote the memory of requests that are not in flight.
    pub fn check_memory(&self) {
        for (at, slot) in self.slots.iter().enumerate() {
            self.check_margins(at);
            if slot.busy.is_none() {
                let bytes = self.memory.read(slot.data, DATA);
                let clean = bytes.iter().all(|byte| *byte == POISON);
                assert!(clean, "memory of a completed request was written");
            }
        }
    }

    /// Forgets all requests: the guest has reset the device. The ring begins anew.
    pub fn reset(&mut self) -> Vec<Request> {
        let forgotten: Vec<Request> =
            self.slots.iter_mut().filter_map(|slot| slot.busy.take()).collect();
        for at in 0..self.slots.len() {
            self.poison(at);
        }
        self.inflight = InflightFile::new(self.shape.size, self.shape.packed);
        self.place = None;
        match &mut self.layout {
            Layout::Split(driver) => driver.reset(),
            layout => *layout = Layout::new(&self.memory, self.shape),
        }
        forgotten
    }

    /// The guest is on another host from now on, whose memory this is; its ring stood at `place`
    /// when it left, and nothing was in flight.
    pub fn move_to(&mut self, memory: &Arc<Memory>, place: u16) {
        self.memory = memory.clone();
        self.layout.driver().move_to(memory);
        self.inflight = InflightFile::new(self.shape.size, self.shape.packed);
        self.elsewhere.append(&mut self.handed);
        self.place = Some(place);
    }

    /// Where the device says what is used, guest-physical.
    pub fn used(&self) -> u64 {
        match &self.layout {
            Layout::Split(driver) => driver.used(),
            Layout::Packed(driver) => driver.used(),
        }
    }

    /// The device's end of the ring, for a worker that finds what the last one left.
    pub fn open(&mut self, device: &mut Device) -> VirtQueue {
        device.track(&self.inflight);
        let queue = match (&self.layout, self.place) {
            (Layout::Split(driver), Some(place)) => device.try_queue_at(driver, place, true),
            (Layout::Split(driver), None) => device.try_queue(driver, true),
            // What is in flight says it better, if anything was.
            (Layout::Packed(driver), place) => {
                device.try_packed_queue(driver, place.unwrap_or(0x8000), true)
            }
        };
        if !self.shape.packed {
            // Whoever comes after this worker looks at the ring.
            self.place = None;
        }
        queue.expect("a ring in memory")
    }
}

impl Layout {
    fn new(memory: &Arc<Memory>, shape: Shape) -> Layout {
        let Shape { size, packed, event_idx, base } = shape;
        match packed {
            true => {
                // Its descriptors end with a page, and where the device says when it wants to be
                // woken begins the next one: a log that forgets either is seen.
                let here = memory.allocate(0, 16);
                let end = here + u64::from(size) * 16;
                memory.allocate((end.next_multiple_of(4096) - end) as usize, 16);
                Layout::Packed(PackedDriver::new(memory.clone(), size, event_idx))
            }
            false => Layout::Split(Driver::new(memory.clone(), size, event_idx, base)),
        }
    }

    fn driver(&mut self) -> &mut dyn GuestDriver {
        match self {
            Layout::Split(driver) => driver,
            Layout::Packed(driver) => driver,
        }
    }

    fn submit(&mut self, slot: usize, chain: &[Desc]) {
        match self {
            Layout::Split(driver) => driver.submit_chain(slot as u16 * DESCRIPTORS, chain),
            Layout::Packed(driver) => driver.submit_chain(slot as u16, chain),
        }
    }

    fn reap(&mut self) -> Vec<Used> {
        match self {
            Layout::Split(driver) => driver.reap(),
            Layout::Packed(driver) => driver.reap(),
        }
    }

    /// The slot of a head that came back.
    fn slot(&self, head: u32) -> Option<usize> {
        let per_slot = match self {
            Layout::Split(_) => u32::from(DESCRIPTORS),
            Layout::Packed(_) => 1,
        };
        head.is_multiple_of(per_slot).then_some((head / per_slot) as usize)
    }

    /// An entry of an indirect table.
    fn indirect(&self, desc: Desc, number: usize, is_last: bool) -> [u8; 16] {
        match self {
            Layout::Split(_) => {
                let next = u16::from(!is_last);
                Desc { flags: desc.flags | next, ..desc }.bytes(number as u16 + 1)
            }
            Layout::Packed(_) => {
                // Address and length alike; then an id that says nothing, and the flags.
                let mut bytes = desc.bytes(0);
                bytes[12..14].fill(0);
                bytes[14..].copy_from_slice(&desc.flags.to_le_bytes());
                bytes
            }
        }
    }
}

/// A piece of memory cut at random.
fn pieces(data: u64, length: usize, random: &mut Random) -> Vec<(u64, u32)> {
    let count = if random.one_in(2) { 1 } else { 1 + random.below(PIECES_MAX) };
    let mut cuts: Vec<usize> = (1..count).map(|_| 1 + random.below(length - 1)).collect();
    cuts.extend([0, length]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|cut| (data + cut[0] as u64, (cut[1] - cut[0]) as u32)).collect()
}
