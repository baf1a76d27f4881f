//! A lean vhost-user-blk client: a guest's driver without a guest, that polls, yields or
//! sleeps while it waits.
//!
//! As Linux does it: each request is one indirect descriptor (header, data in one piece,
//! status), EVENT_IDX says when to kick and when to be called. Tables are written once; for
//! each request only the header and the available ring are.
//!
//! Always true: the same client, with the same settings, drives each side that is compared.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use upcall_ring::WaitLimits;
use upcall_tests::{Connection, SharedMemory, feature, kind, request};

use crate::measure::{CLIENT, Round};
use crate::process::Used;

/// Descriptors of a ring; each is one request.
const RING_SIZE: u16 = 128;
/// Requests in flight at most, in one queue.
pub const DEPTH_MAX: usize = RING_SIZE as usize;
/// Bytes of data of all requests in flight in one queue.
pub const DATA_BYTES: usize = 32 << 20;

const RING_BYTES: usize = 16 << 10;
const SLOT_BYTES: usize = 128;
const HEADS_BYTES: usize = DEPTH_MAX * SLOT_BYTES;
const QUEUE_BYTES: usize = RING_BYTES + HEADS_BYTES + DATA_BYTES;
/// Where in its slot a request has its indirect table, header and status.
const TABLE_AT: usize = 0;
const HEADER_AT: usize = 64;
const STATUS_AT: usize = 96;

const DESCRIPTORS_AT: usize = 0;
const AVAIL_AT: usize = 4096;
const USED_AT: usize = 8192;

/// Where the memory is for the device: not where it is for anybody else.
const GUEST: u64 = 0x1_0000_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Features of the protocol: several queues, acknowledged messages, configuration.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;
/// The device tells what it has in flight.
const PROTOCOL_INFLIGHT: u64 = 1 << 12;

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// How a client waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It looks again and again, and yields: now and then while it has its core for itself, and
    /// between all looks while others want it. A guest that polls, on a host with few cores.
    Poll,
    /// It sleeps at once until it is called: a guest with interrupts.
    Sleep,
}

/// What a client does for one round.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in flight in each queue.
    pub depth: usize,
    /// Bytes of each.
    pub length: u32,
    /// Of 100 requests, how many are reads.
    pub reads: u8,
    /// How it waits.
    pub wait: Wait,
    /// How long it goes on, if [`Link::stop`] does not end it earlier.
    pub slice: Duration,
    /// How many queues to use.
    pub queues: usize,
}

/// A time of at least [`GAP_LEAST`] in which nothing came back.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// The completion before it, or the round's start.
    pub from: Instant,
    /// The completion that ended it.
    pub to: Instant,
}

/// What a slow yield is, and for how many more looks it counts: as for the threads of a worker.
const LIMITS: WaitLimits = WaitLimits::SMALL_HOST;

/// Gaps that are shorter are not kept.
pub const GAP_LEAST: Duration = Duration::from_micros(20);

/// A connection with queues of its own. One thread drives each queue.
pub struct Client {
    link: Link,
    queues: Vec<Queue>,
}

/// The connection, which can be made anew while the queues' threads run.
pub struct Link {
    path: PathBuf,
    connection: Connection,
    memory: Arc<SharedMemory>,
    places: Vec<Arc<Place>>,
    /// What the device asked us to keep: what it had in flight, for the next device.
    inflight: Option<Inflight>,
    /// The round is to end.
    stop: Arc<AtomicBool>,
}

struct Inflight {
    fd: OwnedFd,
    /// Size, offset, queues and queue size, as in the message that brought it.
    words: Vec<u8>,
}

/// Where a queue is, and its bells.
struct Place {
    base: usize,
    kick: OwnedFd,
    call: OwnedFd,
}

/// One queue, as its thread has it.
struct Queue {
    memory: Arc<SharedMemory>,
    place: Arc<Place>,
    base: usize,
    avail_index: u16,
    used_index: u16,
    capacity: u64,
    random: u64,
    /// Empty polls in a row.
    looks: u32,
    /// While not 0, others want the core: so many more looks with a yield each.
    crowded: u32,
    /// Of the last round.
    gaps: Vec<Gap>,
}

impl Client {
    /// Connects and starts `queues` queues. `capacity`: bytes of the disk to use.
    pub fn connect(path: &Path, queues: usize, capacity: u64) -> io::Result<Client> {
        let memory = Arc::new(SharedMemory::new(queues * QUEUE_BYTES));
        let place = |number| Place::new(&memory, number).map(Arc::new);
        let places = (0..queues).map(place).collect::<io::Result<Vec<_>>>()?;
        let connection = Connection::open(path)?;
        let (path, stop) = (path.to_owned(), Arc::default());
        let mut link = Link { path, connection, memory, places, inflight: None, stop };
        link.greet()?;
        let queue = |(number, place): (usize, &Arc<Place>)| Queue {
            memory: link.memory.clone(),
            place: place.clone(),
            base: place.base,
            avail_index: 0,
            used_index: 0,
            capacity,
            random: 0x9e37_79b9_7f4a_7c15 + number as u64,
            looks: 0,
            crowded: 0,
            gaps: Vec::new(),
        };
        let queues = link.places.iter().enumerate().map(queue).collect();
        Ok(Client { link, queues })
    }

    /// Runs a load on its queues, each in a thread of its own. `patience`: how long a request
    /// may take before the round fails.
    pub fn run(&mut self, load: Load, patience: Duration) -> Result<Round, String> {
        self.run_while(load, patience, |_| ()).map(|(round, ())| round)
    }

    /// As [`run`](Self::run), with something else done meanwhile.
    pub fn run_while<T>(
        &mut self,
        load: Load,
        patience: Duration,
        meanwhile: impl FnOnce(&mut Link) -> T,
    ) -> Result<(Round, T), String> {
        let Client { link, queues } = self;
        link.stop.store(false, Ordering::Relaxed);
        let stop = link.stop.clone();
        let (rounds, result) = std::thread::scope(|scope| {
            let stop = &*stop;
            let run = |queue| scope.spawn(move || Queue::run(queue, load, patience, stop));
            let threads: Vec<_> = queues.iter_mut().take(load.queues).map(run).collect();
            let result = meanwhile(link);
            let ended = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err("a client thread panicked".into()))
            };
            let rounds: Vec<Result<Round, String>> = threads.into_iter().map(ended).collect();
            (rounds, result)
        });
        let mut sum = Round::default();
        let mut client = Used::default();
        for round in rounds {
            let round = round?;
            sum.requests += round.requests;
            sum.errors += round.errors;
            sum.elapsed = sum.elapsed.max(round.elapsed);
            sum.latencies.add(&round.latencies);
            client = round.used.iter().fold(client, |sum, (_, used)| sum.and(*used));
        }
        sum.used = vec![(CLIENT.into(), client)];
        Ok((sum, result))
    }

    /// The gaps of the last round in its first queue, in their order.
    pub fn gaps(&self) -> &[Gap] {
        self.queues.first().map_or(&[], |queue| &queue.gaps)
    }
}

impl Link {
    /// Has the round end now: nothing more is sent, and what is in flight comes back.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether the device keeps track of what is in flight, so that another can go on.
    pub fn outlives_the_device(&self) -> bool {
        self.inflight.is_some()
    }

    /// Connects to the next device after one has died, as QEMU does, and hands it what was in
    /// flight; tries again at once until it is there.
    pub fn reconnect(&mut self, patience: Duration) -> Result<(), String> {
        let end = Instant::now() + patience;
        loop {
            let connected = Connection::open(&self.path).and_then(|connection| {
                self.connection = connection;
                self.greet()
            });
            match connected {
                Ok(()) => break,
                Err(error) if Instant::now() > end => return Err(format!("no device: {error}")),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        for place in &self.places {
            // What was made available while nobody looked.
            let _ = rustix::io::write(&place.kick, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    /// All messages from the first to the last queue's start.
    fn greet(&mut self) -> io::Result<()> {
        let connection = &mut self.connection;
        connection.command(request::SET_OWNER, &[], &[])?;
        let offered = connection.ask(request::GET_FEATURES, &[])?.u64()?;
        let features = feature::VERSION_1
            | feature::PROTOCOL_FEATURES
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | (offered & (feature::MQ | feature::FLUSH));
        if offered & features != features {
            return Err(io::Error::other("the server lacks a feature that Linux uses"));
        }
        let offered = connection.ask(request::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        let protocol = PROTOCOL | offered & PROTOCOL_INFLIGHT;
        connection.command(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
        connection.acks = true;
        connection.command(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        if protocol & PROTOCOL_INFLIGHT != 0 {
            self.exchange_inflight()?;
        }
        let mut table = [1u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
        for word in [GUEST, self.memory.len() as u64, self.memory.address(), 0] {
            table.extend_from_slice(&word.to_le_bytes());
        }
        self.connection.command(request::SET_MEM_TABLE, &table, &[self.memory.fd()])?;
        (0..self.places.len()).try_for_each(|number| self.start(number))
    }

    fn exchange_inflight(&mut self) -> io::Result<()> {
        let queues = self.places.len() as u16;
        if self.inflight.is_none() {
            let asked =
                [&[0; 16][..], &queues.to_le_bytes(), &RING_SIZE.to_le_bytes(), &[0; 4]].concat();
            let mut reply = self.connection.ask(GET_INFLIGHT_FD, &asked)?;
            let fd = reply.fds.pop().ok_or_else(|| io::Error::other("no memory for in-flight"))?;
            self.inflight = Some(Inflight { fd, words: reply.payload });
        }
        match &self.inflight {
            Some(kept) => self.connection.command(SET_INFLIGHT_FD, &kept.words, &[kept.fd.as_fd()]),
            None => Ok(()),
        }
    }

    /// Starts a queue where the used ring is.
    fn start(&self, number: usize) -> io::Result<()> {
        let Link { connection, memory, .. } = self;
        let place = &self.places[number];
        let index = number as u32;
        let state = |request, value: u32| {
            let payload = [index.to_le_bytes(), value.to_le_bytes()].concat();
            connection.command(request, &payload, &[])
        };
        state(request::SET_VRING_NUM, RING_SIZE.into())?;
        state(request::SET_VRING_BASE, memory.load_u16(place.base + USED_AT + 2).into())?;
        let mut payload = [index.to_le_bytes(), [0; 4]].concat();
        for at in [DESCRIPTORS_AT, USED_AT, AVAIL_AT] {
            let address = memory.address() + (place.base + at) as u64;
            payload.extend_from_slice(&address.to_le_bytes());
        }
        payload.extend_from_slice(&[0; 8]);
        connection.command(request::SET_VRING_ADDR, &payload, &[])?;
        let number = u64::from(index).to_le_bytes();
        connection.command(request::SET_VRING_CALL, &number, &[place.call.as_fd()])?;
        connection.command(request::SET_VRING_KICK, &number, &[place.kick.as_fd()])?;
        state(request::SET_VRING_ENABLE, 1)
    }
}

impl Place {
    fn new(memory: &SharedMemory, number: usize) -> io::Result<Place> {
        let base = number * QUEUE_BYTES;
        // Nobody shall pay for first touches of memory while it is measured.
        memory.write(base, &vec![1; QUEUE_BYTES]);
        memory.write(base, &vec![0; RING_BYTES + HEADS_BYTES]);
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Place { base, kick: bell()?, call: bell()? })
    }
}

impl Queue {
    fn run(
        queue: &mut Queue,
        load: Load,
        patience: Duration,
        stop: &AtomicBool,
    ) -> Result<Round, String> {
        let depth = load.depth.min(DEPTH_MAX).min(DATA_BYTES / load.length as usize);
        let before = Used::by_this_thread();
        let mut free: Vec<u16> = (0..depth as u16).rev().collect();
        let mut since = vec![Instant::now(); depth];
        let mut is_read = vec![None; depth];
        let mut round = Round::default();
        let start = Instant::now();
        let (mut now, mut last) = (start, start);
        queue.gaps.clear();
        loop {
            let over = now - start >= load.slice || stop.load(Ordering::Relaxed);
            if over && free.len() == depth {
                break;
            }
            if !over && !free.is_empty() {
                let first = queue.avail_index;
                while let Some(slot) = free.pop() {
                    let read = queue.next_random() % 100 < u64::from(load.reads);
                    if is_read[usize::from(slot)] != Some(read) {
                        queue.put_tables(slot, load.length, read);
                        is_read[usize::from(slot)] = Some(read);
                    }
                    queue.submit(slot, load.length, read);
                    since[usize::from(slot)] = now;
                }
                queue.publish(first);
            }
            let ended = queue.ended();
            if ended == 0 {
                queue.wait(load.wait);
                // Reading the clock in each look would be most of a look.
                if queue.looks % 64 == 63 || load.wait == Wait::Sleep {
                    now = Instant::now();
                    if now - start > load.slice + patience {
                        return Err(format!("requests do not end within {patience:?}"));
                    }
                }
                continue;
            }
            queue.looks = 0;
            now = Instant::now();
            if now - last >= GAP_LEAST {
                queue.gaps.push(Gap { from: last, to: now });
            }
            last = now;
            for _ in 0..ended {
                let (slot, status) = queue.take_used().ok_or("the used ring is nonsense")?;
                round.errors += u64::from(status != 0);
                round.latencies.record((now - since[usize::from(slot)]).as_nanos() as u64);
                free.push(slot);
            }
            round.requests += u64::from(ended);
        }
        round.elapsed = now - start;
        round.used = vec![(CLIENT.into(), Used::by_this_thread().since(before))];
        Ok(round)
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64*: good enough to choose blocks, and a few instructions.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn slot_at(&self, slot: u16) -> usize {
        self.base + RING_BYTES + usize::from(slot) * SLOT_BYTES
    }

    /// Writes what stays the same for all requests of a slot.
    fn put_tables(&self, slot: u16, length: u32, read: bool) {
        let guest = |at: usize| GUEST + at as u64;
        let head = self.slot_at(slot);
        let data = self.base + RING_BYTES + HEADS_BYTES + usize::from(slot) * length as usize;
        let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            bytes
        };
        let for_device = if read { WRITE } else { 0 };
        let table = [
            descriptor(guest(head + HEADER_AT), 16, NEXT, 1),
            descriptor(guest(data), length, for_device | NEXT, 2),
            descriptor(guest(head + STATUS_AT), 1, WRITE, 0),
        ];
        self.memory.write(head + TABLE_AT, &table.concat());
        let at = self.base + DESCRIPTORS_AT + 16 * usize::from(slot);
        self.memory.write(at, &descriptor(guest(head + TABLE_AT), 48, INDIRECT, 0));
    }

    fn submit(&mut self, slot: u16, length: u32, read: bool) {
        let blocks = self.capacity / u64::from(length);
        let sector = self.next_random() % blocks * u64::from(length / 512);
        let mut header = [0; 16];
        let kind = if read { kind::READ } else { kind::WRITE };
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let head = self.slot_at(slot);
        self.memory.write(head + HEADER_AT, &header);
        self.memory.write(head + STATUS_AT, &[0xee]);
        let entry = self.base + AVAIL_AT + 4 + 2 * usize::from(self.avail_index % RING_SIZE);
        self.memory.write(entry, &slot.to_le_bytes());
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Shows what was submitted since the index was `first`; kicks if the device asked to be.
    fn publish(&self, first: u16) {
        self.memory.store_u16(self.base + AVAIL_AT + 2, self.avail_index);
        let event_at = self.base + USED_AT + 4 + 8 * usize::from(RING_SIZE);
        let event = self.memory.load_u16(event_at);
        let new = self.avail_index;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(first) {
            let _ = rustix::io::write(&self.place.kick, &1u64.to_ne_bytes());
        }
    }

    fn ended(&self) -> u16 {
        self.memory.load_u16(self.base + USED_AT + 2).wrapping_sub(self.used_index)
    }

    fn take_used(&mut self) -> Option<(u16, u8)> {
        let at = self.base + USED_AT + 4 + 8 * usize::from(self.used_index % RING_SIZE);
        let mut id = [0; 4];
        self.memory.read(at, &mut id);
        self.used_index = self.used_index.wrapping_add(1);
        let slot = u16::try_from(u32::from_le_bytes(id)).ok().filter(|slot| *slot < RING_SIZE)?;
        let mut status = [0];
        self.memory.read(self.slot_at(slot) + STATUS_AT, &mut status);
        Some((slot, status[0]))
    }

    fn wait(&mut self, wait: Wait) {
        self.looks = self.looks.wrapping_add(1);
        match wait {
            Wait::Poll if self.crowded > 0 || self.looks.is_multiple_of(64) => {
                let before = Instant::now();
                rustix::thread::sched_yield();
                let others_ran = before.elapsed().as_nanos() >= LIMITS.slow_yield_ns.into();
                self.crowded =
                    if others_ran { LIMITS.patience } else { self.crowded.saturating_sub(1) };
            }
            Wait::Poll => std::hint::spin_loop(),
            Wait::Sleep => self.sleep(),
        }
    }

    fn sleep(&self) {
        let event_at = self.base + AVAIL_AT + 4 + 2 * usize::from(RING_SIZE);
        self.memory.store_u16(event_at, self.used_index);
        fence(Ordering::SeqCst);
        if self.ended() > 0 {
            return;
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let _ = poll(&mut [PollFd::new(&self.place.call, PollFlags::IN)], Some(&timeout));
        let _ = rustix::io::read(&self.place.call, &mut [0u8; 8]);
    }
}
