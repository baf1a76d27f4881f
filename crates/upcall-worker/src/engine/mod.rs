//! A queue thread: owns each request of one queue of one disk from its arrival to its end.
//!
//! The loop ([`Engine::run`]) takes requests from the frontend, reaps verdicts from the
//! links and completions from the stores, and carries out what each flight asks next. What
//! happens next is decided in `upcall-chain`; here it is only done.
//!
//! Always true: a request taken from the frontend is completed there exactly once; nothing
//! that a filter host writes can make the thread panic, block or touch memory outside the
//! arenas; the thread sleeps only when everybody who may have work for it will wake it.

mod carry;
#[cfg(any(test, feature = "fuzzing"))]
pub mod hostile;
mod inflight;
mod issued;
mod link;
mod message;
mod slab;
mod stop;
mod whole;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, Timespec, clock_gettime};
use upcall_block::{Request, RequestQueue, StoreDone, StoreQueue};
use upcall_chain::{Chain, SlotIndex};
use upcall_ring::{Arena, Doorbell, Turn, Waiter};
use upcall_stats::Block;

pub(crate) use link::Link;

use crate::config::{LogLevel, LogSink};
use crate::hosts::{GiveUp, HostId};
use inflight::{InFlight, Whole};
use slab::Slab;
use stop::Stop;

/// Requests taken from the frontend in one turn of the loop.
const BATCH: usize = 64;
/// Entries taken from a completion ring in one turn.
const REAP: usize = 256;

/// What other threads ask of a queue thread; ring its doorbell after sending.
pub(crate) enum Command {
    /// Serve this queue.
    Start(Box<dyn RequestQueue>),
    /// Stop serving it: take nothing more, let what was taken end (what filters still hold
    /// after `drain_ms` is cancelled), and give it back.
    Stop { drain_ms: u64, reply: SyncSender<Option<Box<dyn RequestQueue>>> },
    /// This filter host is gone.
    HostLost(HostId),
    /// End the thread, once nothing is in flight.
    Quit,
}

/// A disk's chain and its store, as one thread uses them.
pub(crate) struct Lane {
    pub(crate) chain: Arc<Chain>,
    pub(crate) store: Box<dyn StoreQueue>,
}

/// A place in the own disk's chain, as one thread uses it.
pub(crate) struct Slot {
    /// Index of the link to its filter host.
    pub(crate) link: usize,
    pub(crate) instance: u32,
    /// Whether its filter may issue requests.
    pub(crate) issues: bool,
    /// The lanes of the disks it was granted, in its order.
    pub(crate) grants: Vec<usize>,
    pub(crate) stats: Block,
}

/// All that a queue thread is made of.
pub(crate) struct Parts {
    pub(crate) disk: Arc<str>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Doorbell,
    /// The own disk, then the granted ones.
    pub(crate) lanes: Vec<Lane>,
    /// In the order of the chain.
    pub(crate) slots: Vec<Slot>,
    pub(crate) links: Vec<Link>,
    /// For requests of the frontend, and for those that filters issue: two, so that the
    /// former cannot use up what the latter need to let them end.
    pub(crate) arenas: Option<[Arena; 2]>,
    pub(crate) request_stats: Block,
    pub(crate) store_stats: Block,
    pub(crate) log: LogSink,
    /// Asks for a filter host to be killed; it will be reported lost in time.
    pub(crate) give_up: GiveUp,
}

/// See the module.
pub(crate) struct Engine {
    parts: Parts,
    frontend: Option<Box<dyn RequestQueue>>,
    stop: Option<Stop>,
    quit: bool,
    flights: Slab<InFlight>,
    wholes: Slab<Whole>,
    /// Requests that wait for room in an arena, by arena, in the order of their arrival.
    waiting: [VecDeque<u32>; 2],
    /// Requests of the frontend that have not ended.
    guest_requests: usize,
    serial: u32,
    /// Deliveries of requests that ended without their answer, which may still come.
    abandoned: HashSet<u64>,
    taken: Vec<Request>,
    stored: Vec<StoreDone>,
    waiter: Waiter,
}

/// CLOCK_MONOTONIC in ns.
pub(crate) fn now_ns() -> u64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Monotonic);
    tv_sec as u64 * 1_000_000_000 + tv_nsec as u64
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Engine {
        Engine {
            parts,
            frontend: None,
            stop: None,
            quit: false,
            flights: Slab::new(),
            wholes: Slab::new(),
            waiting: [VecDeque::new(), VecDeque::new()],
            guest_requests: 0,
            serial: 0,
            abandoned: HashSet::new(),
            taken: Vec::with_capacity(BATCH),
            stored: Vec::with_capacity(BATCH),
            waiter: Waiter::default(),
        }
    }

    /// Serves until told to quit.
    pub(crate) fn run(mut self) {
        loop {
            let busy = self.turn();
            if self.quit && self.flights.len() == 0 {
                return;
            }
            match self.waiter.turn(busy, now_ns()) {
                Turn::Poll => std::hint::spin_loop(),
                Turn::Yield => self.yield_core(),
                Turn::Sleep => self.sleep(),
            }
        }
    }

    /// Looks everywhere for work once, and does it; says whether there was some.
    fn turn(&mut self) -> bool {
        let mut busy = self.obey();
        busy |= self.take_requests();
        busy |= self.reap_links();
        busy |= self.reap_stores();
        self.publish();
        busy | self.check_stop()
    }

    fn yield_core(&mut self) {
        let before = now_ns();
        rustix::thread::sched_yield();
        self.waiter.yielded(now_ns() - before);
    }

    fn log(&self, level: LogLevel, text: &str) {
        (self.parts.log)(level, &format!("disk {}: {text}", self.parts.disk));
    }

    fn obey(&mut self) -> bool {
        let mut busy = false;
        loop {
            match self.parts.commands.try_recv() {
                Ok(Command::Start(queue)) => {
                    debug_assert!(self.frontend.is_none());
                    self.frontend = Some(queue);
                }
                Ok(Command::Stop { drain_ms, reply }) => self.begin_stop(drain_ms, reply),
                Ok(Command::HostLost(host)) => self.lose(host),
                Ok(Command::Quit) => self.quit = true,
                Err(TryRecvError::Empty) => return busy,
                Err(TryRecvError::Disconnected) => {
                    self.quit = true;
                    return busy;
                }
            }
            busy = true;
        }
    }

    fn take_requests(&mut self) -> bool {
        let Some(queue) = &mut self.frontend else { return false };
        // What waits for room would only wait behind itself: leave the rest in the ring.
        if self.stop.is_some() || !self.waiting[0].is_empty() {
            return false;
        }
        let mut taken = std::mem::take(&mut self.taken);
        if let Err(error) = queue.take(BATCH, &mut taken) {
            self.log(
                LogLevel::Error,
                &format!("a queue is broken: {error}; the guest must reset the device"),
            );
        }
        let busy = !taken.is_empty();
        for request in taken.drain(..) {
            self.guest_requests += 1;
            self.begin_guest(request);
        }
        self.taken = taken;
        busy
    }

    fn reap_links(&mut self) -> bool {
        let mut busy = false;
        for link in 0..self.parts.links.len() {
            // At most a batch: a host that never stops writing does not keep us from the rest.
            for _ in 0..REAP {
                let Some(entry) = self.parts.links[link].receive() else { break };
                busy = true;
                self.handle_entry(link, &entry);
            }
        }
        busy
    }

    fn reap_stores(&mut self) -> bool {
        let mut stored = std::mem::take(&mut self.stored);
        for lane in &mut self.parts.lanes {
            lane.store.poll(&mut stored);
        }
        let busy = !stored.is_empty();
        for done in stored.drain(..) {
            self.handle_stored(done);
        }
        self.stored = stored;
        busy
    }

    /// Shows the others what this turn has done: once for all of it.
    fn publish(&mut self) {
        for link in 0..self.parts.links.len() {
            if !self.parts.links[link].publish() {
                self.give_up(link, "its ring makes no sense");
            }
        }
        if let Some(queue) = &mut self.frontend {
            queue.publish();
        }
    }

    /// Gives a filter host up: it is killed, and what was with it fails.
    fn give_up(&mut self, link: usize, reason: &str) {
        let link = &mut self.parts.links[link];
        if !link.lost {
            let host = link.host;
            (self.parts.give_up)(host, reason);
            self.lose(host);
        }
    }

    fn lose(&mut self, host: HostId) {
        for link in 0..self.parts.links.len() {
            if self.parts.links[link].host == host && !self.parts.links[link].lost {
                self.parts.links[link].lose();
                self.fail_visits(|slot| slot.link == link);
            }
        }
    }

    fn slot(&self, slot: SlotIndex) -> &Slot {
        &self.parts.slots[slot.index()]
    }

    /// Sleeps until somebody has work for this thread, or a stop is overdue.
    fn sleep(&mut self) {
        let mut ready = true;
        for link in &mut self.parts.links {
            ready &= link.lost || link.channel.completions.before_sleep();
        }
        for lane in &mut self.parts.lanes {
            ready &= lane.store.before_sleep();
        }
        let listens = self.stop.is_none() && self.waiting[0].is_empty();
        if let Some(queue) = &mut self.frontend
            && listens
        {
            ready &= queue.before_sleep();
        }
        if ready {
            let mut fds = vec![PollFd::new(&self.parts.wake, PollFlags::IN)];
            let stores = self.parts.lanes.iter().filter(|lane| lane.store.in_flight() > 0);
            fds.extend(
                stores
                    .filter_map(|lane| lane.store.doorbell())
                    .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            );
            if listens {
                let kick = self.frontend.as_ref().and_then(|queue| queue.doorbell());
                fds.extend(kick.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            }
            let timeout = self.stop.as_ref().map(|stop| {
                let left = stop.deadline_ns.saturating_sub(now_ns());
                Timespec {
                    tv_sec: (left / 1_000_000_000) as i64,
                    tv_nsec: (left % 1_000_000_000) as _,
                }
            });
            // An error (EINTR) is a wake-up like any other: the loop looks at everything.
            let _ = poll(&mut fds, timeout.as_ref());
        }
        self.parts.wake.clear();
        for link in &mut self.parts.links {
            link.channel.completions.after_sleep();
        }
        if let Some(queue) = &mut self.frontend
            && listens
        {
            queue.after_sleep();
        }
    }
}
