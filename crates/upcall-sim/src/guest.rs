//! The guest: drivers that fill rings in its memory with requests, and look at what comes
//! back.
//!
//! Always true: each head that the driver made available comes back at most once, with a
//! status and a length that fit the request; memory that the device does not own does not
//! change. What the data may be is for the history to say.

use std::ops::Range;
use std::sync::Arc;

use upcall_vhost::VirtQueue;
use upcall_vhost::mock::{Desc, Device, Driver, Memory, header, segment};

use crate::random::Random;
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

/// One ring of a guest's disk.
pub struct Ring {
    pub driver: Driver,
    memory: Arc<Memory>,
    disk: u32,
    slots: Vec<Slot>,
    /// Sectors of the disk.
    capacity: usize,
}

const DATA: usize = SECTORS_MAX * SECTOR;

impl Ring {
    pub fn new(
        memory: &Arc<Memory>,
        size: u16,
        event_idx: bool,
        base: u16,
        disk: u32,
        capacity: usize,
    ) -> Ring {
        let driver = Driver::new(memory.clone(), size, event_idx, base);
        let slots = (0..size / DESCRIPTORS).map(|_| {
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
        Ring { slots: slots.collect(), driver, memory: memory.clone(), disk, capacity }
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
        let head = at as u16 * DESCRIPTORS;
        self.check_margins(at);
        let chain = self.prepare(at, &request, random);
        let direct = chain.len() <= usize::from(DESCRIPTORS) && !random.one_in(3);
        if direct {
            self.driver.submit_chain(head, &chain);
        } else {
            let table = self.slots[at].table;
            for (number, desc) in chain.iter().enumerate() {
                let next = if number + 1 < chain.len() { 1 } else { 0 };
                let bytes = Desc { flags: desc.flags | next, ..*desc }.bytes(number as u16 + 1);
                self.memory.write(table + number as u64 * 16, &bytes);
            }
            self.driver.submit_chain(head, &[Desc::indirect(table, chain.len() as u32)]);
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
        let used = self.driver.reap();
        used.into_iter().map(|used| self.end(used.head, used.length)).collect()
    }

    fn end(&mut self, head: u32, length: u32) -> Ended {
        let at = (head / u32::from(DESCRIPTORS)) as usize;
        let known = head.is_multiple_of(u32::from(DESCRIPTORS)) && at < self.slots.len();
        assert!(known, "head {head} came back, which was never made available");
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
        self.driver.reset();
        forgotten
    }

    /// The device's end of the ring.
    pub fn open(&self, device: &Device) -> VirtQueue {
        device.queue(&self.driver)
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
