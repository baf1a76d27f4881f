//! A virtqueue as a [`RequestQueue`].
//!
//! What is in flight is kept by slot in private memory: what is in flight is not taken
//! again, and each is completed once. If the frontend keeps an in-flight region for the
//! ring, what a worker before us left there comes first, in its order, marked as a retry. A guest that breaks the ring's rules loses
//! the queue: nothing more is taken, its error descriptor is signalled, and what was taken
//! before still completes.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use upcall_block::{Errno, Op, QueueError, Request, RequestFlags, RequestQueue, Status, Tag};
use upcall_ring::Doorbell;

use crate::chain::{Chain, ChainError, part};
use crate::config::BlkConfig;
use crate::dirty::Dirty;
use crate::inflight::RegionError;
use crate::memory::{GuestMemory, Place};
use crate::plant::{self, Bug};
use crate::request::{Body, NoStatus, Parsed, Parser};
use crate::ring::{Ring, RingError};
use crate::virtio::*;

/// What all queues of a connection share with the thread that serves it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: Arc<BlkConfig>,
    memory: Mutex<Arc<GuestMemory>>,
    /// Counts the tables of memory, so that a queue sees cheaply that there is a new one.
    memory_version: AtomicU64,
    /// Whether the guest knows how to flush. If not, every write is durable.
    flush_negotiated: AtomicBool,
    /// Where the frontend wants to know what we write.
    pub dirty: Dirty,
}

impl Shared {
    pub fn new(config: Arc<BlkConfig>) -> Arc<Shared> {
        Arc::new(Shared {
            config,
            memory: Mutex::default(),
            memory_version: AtomicU64::new(0),
            flush_negotiated: AtomicBool::new(false),
            dirty: Dirty::default(),
        })
    }

    /// The table and its version, or an older one with an older version.
    pub fn memory(&self) -> (u64, Arc<GuestMemory>) {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        (self.memory_version.load(Ordering::Relaxed), memory.clone())
    }

    /// Replaces the table. Queues see it when they next take requests.
    pub fn set_memory(&self, new: GuestMemory) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        *memory = Arc::new(new);
        // Release, so that who sees the version then sees the table (and locks for it).
        self.memory_version.fetch_add(1, Ordering::Release);
    }

    pub fn set_flush_negotiated(&self, on: bool) {
        self.flush_negotiated.store(on, Ordering::Relaxed);
    }

    /// Modifications are durable before they complete.
    fn write_through(&self) -> bool {
        !self.flush_negotiated.load(Ordering::Relaxed) || !self.config.write_cache()
    }
}

/// The descriptors by which the frontend is told of completions and of errors, and where it
/// logs the ring. It may change them while the ring runs.
#[derive(Debug)]
pub(crate) struct Signals {
    call: Mutex<Option<Signal>>,
    error: Mutex<Option<Signal>>,
    /// Under which guest-physical address the used ring is logged, if it is.
    log_address: AtomicU64,
}

/// No address: where it stands no ring could end.
const NOT_LOGGED: u64 = u64::MAX;

impl Default for Signals {
    fn default() -> Signals {
        let (call, error) = (Mutex::default(), Mutex::default());
        Signals { call, error, log_address: AtomicU64::new(NOT_LOGGED) }
    }
}

impl Signals {
    pub fn set_call(&self, fd: Option<OwnedFd>) {
        *self.call.lock().unwrap_or_else(PoisonError::into_inner) = fd.map(Signal::new);
    }

    pub fn set_error(&self, fd: Option<OwnedFd>) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = fd.map(Signal::new);
    }

    /// Logs the used ring under this guest-physical address from now on. Whoever runs may not
    /// have seen it yet.
    pub fn set_log_address(&self, address: Option<u64>) {
        self.log_address.store(address.unwrap_or(NOT_LOGGED), Ordering::SeqCst);
    }

    pub fn log_address(&self) -> Option<u64> {
        let address = self.log_address.load(Ordering::Relaxed);
        (address != NOT_LOGGED).then_some(address)
    }

    /// Interrupts the guest, whether it asked or not.
    pub fn ring_call(&self) {
        Signals::ring(&self.call);
    }

    fn ring(signal: &Mutex<Option<Signal>>) {
        if let Some(signal) = &*signal.lock().unwrap_or_else(PoisonError::into_inner) {
            signal.ring();
        }
    }
}

/// A descriptor of the frontend's. Ringing it must not block, whatever it is; and as it
/// may be blocking because the frontend waits on it, we do not change that.
#[derive(Debug)]
pub(crate) struct Signal {
    doorbell: Doorbell,
    may_block: bool,
}

impl Signal {
    pub fn new(fd: OwnedFd) -> Signal {
        let flags = rustix::fs::fcntl_getfl(&fd);
        let may_block = !flags.is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Signal { doorbell: Doorbell::from_fd(fd), may_block }
    }

    pub fn ring(&self) {
        if !self.may_block || self.has_room() {
            self.doorbell.ring();
        }
    }

    /// A full eventfd or pipe has been rung already.
    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.doorbell, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 1)
            && fds[0].revents().contains(PollFlags::OUT)
    }
}

/// What is known of a taken request until it completes.
#[derive(Debug)]
struct InFlight {
    status: Place,
    op: Op,
    /// Bytes written to the guest's memory if it succeeds.
    data_written: u32,
}

/// Why a queue takes nothing more. The guest's fault.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    NoStatus(#[from] NoStatus),
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// A queue that has ended: proof that everything taken from it was completed. Only
/// [`VirtQueue::finish`] makes it.
#[derive(Debug)]
pub struct Stopped {
    position: u32,
    left: usize,
}

impl Stopped {
    /// Where the ring goes on when it is started again: its next entry. Of a packed ring, bit
    /// 15 is the wrap counter.
    pub fn next_available(&self) -> u16 {
        self.position as u16
    }

    /// The same, as GET_VRING_BASE says it. Of a packed ring, bits 16 to 31 are where the
    /// next used descriptor will be.
    pub(crate) fn position(&self) -> u32 {
        self.position
    }

    /// How many requests a worker before us took that nobody has taken again: they are in
    /// the in-flight region alone.
    pub fn left(&self) -> usize {
        self.left
    }
}

/// A running ring of a guest. Belongs to one thread at a time.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    ring: Ring,
    indirect: bool,
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    kick: Doorbell,
    memory: Arc<GuestMemory>,
    memory_version: u64,
    /// By slot.
    in_flight: Vec<Option<InFlight>>,
    /// By slot: what its request writes to the guest's memory, guest-physical, for the log.
    /// Kept always, as it may be switched on while a request is in flight.
    written: Vec<Vec<(u64, u64)>>,
    in_flight_count: u16,
    /// Slots of what a worker before us took, which come first.
    again: VecDeque<u16>,
    broken: Option<Broken>,
    chain: Chain,
}

impl VirtQueue {
    /// `region`: where to keep what is in flight, too. If it makes no sense, the queue is
    /// broken from its start.
    pub(crate) fn new(
        index: u16,
        mut ring: Ring,
        region: Option<Place>,
        indirect: bool,
        shared: Arc<Shared>,
        signals: Arc<Signals>,
        kick: Doorbell,
    ) -> VirtQueue {
        let (memory_version, memory) = shared.memory();
        let in_flight = (0..ring.size()).map(|_| None).collect();
        let written = (0..ring.size()).map(|_| Vec::new()).collect();
        let (again, broken) = match region.map(|region| ring.track(region)) {
            None => (Vec::new(), None),
            Some(Ok(again)) => (again, None),
            Some(Err(error)) => (Vec::new(), Some(Broken::Region(error))),
        };
        let mut queue = VirtQueue {
            index,
            ring,
            indirect,
            shared,
            signals,
            kick,
            memory,
            memory_version,
            in_flight,
            written,
            in_flight_count: 0,
            again: again.into(),
            broken,
            chain: Chain::default(),
        };
        if queue.broken.is_none() {
            queue.ring.decline_doorbell();
        } else {
            Signals::ring(&queue.signals.error);
        }
        // Also what a worker before us may have written and not marked.
        queue.log_ring();
        queue
    }

    /// The number of the ring in its device, from 0.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Requests taken and not yet completed.
    pub fn in_flight(&self) -> usize {
        self.in_flight_count.into()
    }

    /// Ends the queue's use: shows all completions, and leaves the ring so that it can be
    /// started again. Panics if a request is in flight, which would be lost. What a worker
    /// before us took and nobody took since stays in the in-flight region.
    pub fn finish(mut self) -> Stopped {
        assert_eq!(self.in_flight_count, 0, "queue {} ended with requests in flight", self.index);
        self.publish();
        if plant::is(Bug::StopDropsInFlight) {
            self.ring.forget();
        }
        if self.broken.is_none() {
            // What comes after us may sleep. An error here is seen by whoever goes on.
            let _ = self.ring.ask_for_doorbell();
            if !plant::is(Bug::UnloggedEnd) {
                self.log_ring();
            }
        }
        // Of a broken ring, nothing will ever be taken.
        let is_told = self.broken.is_none() && !plant::is(Bug::LeftForgotten);
        let left = if is_told { self.again.len() } else { 0 };
        Stopped { position: self.ring.position(), left }
    }

    fn break_with(&mut self, broken: Broken) -> QueueError {
        self.broken = Some(broken);
        Signals::ring(&self.signals.error);
        self.error(broken)
    }

    fn error(&self, broken: Broken) -> QueueError {
        QueueError { reason: format!("queue {}: {broken}", self.index) }
    }

    /// Looks whether the guest's memory has changed.
    fn follow_memory(&mut self) -> Result<(), Broken> {
        if self.shared.memory_version.load(Ordering::Acquire) == self.memory_version {
            return Ok(());
        }
        (self.memory_version, self.memory) = self.shared.memory();
        Ok(self.ring.rebind(&self.memory)?)
    }

    fn take_some(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), Broken> {
        self.follow_memory()?;
        let room = out.len().saturating_add(max);
        while out.len() < room
            && let Some(slot) = self.again.pop_front()
        {
            self.begin(slot, true, out)?;
        }
        let mut available = self.ring.available()?;
        while available > 0 && out.len() < room {
            available -= 1;
            let Some(slot) = self.ring.take()? else { break };
            self.begin(slot, false, out)?;
        }
        Ok(())
    }

    /// Reads a chain that was taken, now or by a worker before us, into `out`, or answers it
    /// at once.
    fn begin(&mut self, slot: u16, retry: bool, out: &mut Vec<Request>) -> Result<(), Broken> {
        self.chain.read(&self.ring, &self.memory, slot, self.indirect)?;
        let parser = Parser {
            config: &self.shared.config,
            memory: &self.memory,
            write_through: self.shared.write_through(),
        };
        let Parsed { status, body } = parser.parse(&self.chain)?;
        let data_written = match &body {
            Body::Answer { written, .. } => (*written).into(),
            Body::Request { op: Op::Read, range, .. } => u64::from(range.length()),
            Body::Request { .. } => 0,
        };
        self.note_written(slot, data_written);
        match body {
            Body::Answer { status: code, written } => {
                self.put(slot, &status, code, written);
            }
            Body::Request { op, range, flags, data } => {
                let data_written = if op == Op::Read { range.length() } else { 0 };
                let flight = InFlight { status, op, data_written };
                self.in_flight[usize::from(slot)] = Some(flight);
                self.in_flight_count += 1;
                let flags = RequestFlags { retry, ..flags };
                out.push(Request { tag: Tag(slot.into()), op, range, flags, data });
            }
        }
        Ok(())
    }

    /// Notes where the chain that was just read has room for `data` bytes and its status.
    fn note_written(&mut self, slot: u16, data: u64) {
        let written = &mut self.written[usize::from(slot)];
        written.clear();
        let writable = self.chain.writable();
        if !plant::is(Bug::UnloggedData) {
            written.extend(part(writable, 0, data));
        }
        let last = writable.last().filter(|_| !plant::is(Bug::UnloggedStatus));
        written.extend(last.map(|piece| (piece.address + u64::from(piece.length) - 1, 1)));
        if plant::is(Bug::LoggedBefore) {
            self.shared.dirty.mark(std::mem::take(written));
        }
    }

    /// Writes the status, then the used entry that counts it and the data before it.
    fn put(&mut self, slot: u16, status: &Place, code: u8, written: u32) {
        status.store_u8(0, code);
        // The data, too, however it ended: some of it may be there.
        let dirty = &self.shared.dirty;
        if dirty.is_on() {
            dirty.mark(self.written[usize::from(slot)].iter().copied());
        }
        self.ring.put_used(slot, written + 1);
    }

    /// Marks the parts of the ring that we write, all of them: they are a few pages.
    fn log_ring(&self) {
        let dirty = &self.shared.dirty;
        if dirty.is_on() && !plant::is(Bug::UnloggedRing) {
            if let Some(told) = self.signals.log_address() {
                dirty.mark(self.ring.written(told));
            }
            dirty.signal();
        }
    }
}

/// The status byte that says how a request ended.
fn status_byte(op: Op, status: Status) -> u8 {
    match status {
        Ok(()) => S_OK,
        Err(Errno::EOPNOTSUPP) if !op.has_data() => S_UNSUPP,
        Err(_) => S_IOERR,
    }
}

impl RequestQueue for VirtQueue {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        if let Some(broken) = self.broken {
            return Err(self.error(broken));
        }
        let result = self.take_some(max, out);
        // What was answered at once may be all that the guest waits for.
        self.publish();
        result.map_err(|broken| self.break_with(broken))
    }

    /// Panics if `tag` is not in flight.
    fn complete(&mut self, tag: Tag, status: Status) {
        let flight = self.in_flight.get_mut(tag.0 as usize).and_then(Option::take);
        let Some(InFlight { status: place, op, data_written }) = flight else {
            panic!("queue {}: completion of {tag:?}, which is not in flight", self.index);
        };
        self.in_flight_count -= 1;
        let written = if status.is_ok() { data_written } else { 0 };
        self.put(tag.0 as u16, &place, status_byte(op, status), written);
    }

    fn publish(&mut self) {
        if !self.ring.has_unpublished() {
            return;
        }
        let wanted = self.ring.publish();
        self.log_ring();
        if wanted {
            self.signals.ring_call();
        }
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.kick.as_fd())
    }

    fn before_sleep(&mut self) -> bool {
        if self.broken.is_some() {
            return true;
        }
        // An error counts as an arrival: the next `take` reports it.
        if !self.again.is_empty() {
            return false;
        }
        let arrived = self.ring.ask_for_doorbell();
        self.log_ring();
        arrived.is_ok_and(|count| count == 0)
    }

    fn after_sleep(&mut self) {
        self.kick.clear();
        if self.broken.is_none() {
            self.ring.decline_doorbell();
            self.log_ring();
        }
    }
}

#[cfg(test)]
mod logging;
#[cfg(test)]
mod packed_tests;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod tests;
