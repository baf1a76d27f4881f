//! A queue thread: owns each request of one queue of one disk from its arrival to its end.
//!
//! The loop ([`Engine::run`]) takes requests from the frontend, reaps verdicts from the
//! links and completions from the stores, and carries out what each flight asks next. What
//! happens next is decided in `upcall-chain`; here it is only done.
//!
//! Always true: a request taken from the frontend is completed there exactly once; nothing
//! that a filter host writes can make the thread panic, block or touch memory outside the
//! arenas; the thread sleeps only when everybody who may have work for it will wake it.

mod answer;
mod begin;
mod carry;
mod clock;
mod gaps;
#[cfg(any(test, feature = "fuzzing"))]
pub mod hostile;
mod images;
mod inflight;
mod issued;
mod link;
mod lives;
mod message;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(feature = "sim"), allow(dead_code))]
pub mod sim;
mod slab;
mod stop;
mod stun;
#[cfg(test)]
mod tests;
mod whole;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use upcall_abi::filter::ISSUED_MAX;
use upcall_block::{Request, RequestQueue, StoreDone, StoreQueue};
use upcall_chain::{Chain, OnFailure, SlotIndex};
use upcall_gap::MarkDone;
use upcall_ring::{Arena, Doorbell, Turn, Waiter};
use upcall_stats::Block;

pub(crate) use clock::Clock;
pub(crate) use gaps::MarkGaps;
pub(crate) use link::{Life, Link, Way};
pub(crate) use stun::{MakeUp, MayStay, NextSlot, ReportReply, Whereabouts, deadline_ns};

use crate::config::{LogLevel, LogSink};
use crate::hosts::{HostId, TellHosts};
use crate::plant::is_planted;
use images::Images;
use inflight::{InFlight, Waiting, Whole};
use slab::Slab;
use stop::{Abandoned, Patience, Stop};
use stun::Stun;

/// Requests taken from the frontend in one turn of the loop.
const BATCH: usize = 64;
/// Entries taken from a completion ring in one turn.
const REAP: usize = 256;
/// Entries that may always wait for room in a filter host's ring.
const BACKLOG_MIN: usize = 8192;
/// How soon a full ring is looked at again.
const ROOM_NS: u64 = 1_000_000;

/// What other threads ask of a queue thread; ring its doorbell after sending.
pub(crate) enum Command {
    /// Serve this queue.
    Start(Box<dyn RequestQueue>),
    /// Stop serving it: take nothing more, let what was taken end (what filters still hold
    /// after `drain_ms` is cancelled), and give it back.
    Stop { drain_ms: u64, reply: SyncSender<Option<Box<dyn RequestQueue>>> },
    /// This life of a filter host is over: its process is dead. `is_for_good`: no other one
    /// follows.
    HostLost { host: HostId, life: Life, is_for_good: bool },
    /// Another life of a filter host serves.
    HostBack { host: HostId, life: Life, way: Box<Way> },
    /// Take nothing more from the frontend, and say when nothing is in flight, but what may
    /// stay. From then on nothing happens until [`Command::Unstun`].
    Stun { may_stay: MayStay, reply: SyncSender<()> },
    /// Take on another make-up of the chain, and say so. Only for a thread that is still.
    Swap { make_up: Box<MakeUp>, reply: SyncSender<()> },
    /// Go on, or take the stun back if it is not complete.
    Unstun,
    /// An instance is on trial no longer.
    EndTrial { instance: u32 },
    /// Say what is in flight.
    Report { reply: ReportReply },
    /// Let whatever is in flight end; what filters still hold after `drain_ms` is cancelled.
    WindDown { drain_ms: u64 },
    /// Begin nothing more, and end the thread once nothing is in flight.
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
    /// The arena for the data of requests that its filter issues.
    pub(crate) arena: usize,
    /// What becomes of requests while its filter is gone.
    pub(crate) on_failure: OnFailure,
    /// How long its filter may have a request; `u64::MAX`: as long as it likes.
    pub(crate) deadline_ns: u64,
    /// Pages are to be put back before they are delivered again.
    pub(crate) keeps_images: bool,
    /// Records what it misses while it is bypassed, where that is to be known.
    pub(crate) gaps: Option<Box<dyn MarkGaps>>,
    /// Its filter has left the chain.
    pub(crate) detached: bool,
    /// Its filter is new: what it fails is not failed, but ends the trial, and waits for who
    /// takes its place.
    pub(crate) is_on_trial: bool,
    pub(crate) stats: Block,
}

/// All that a queue thread is made of.
pub(crate) struct Parts {
    pub(crate) disk: Arc<str>,
    pub(crate) clock: Clock,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Doorbell,
    /// The own disk, then the granted ones.
    pub(crate) lanes: Vec<Lane>,
    /// In the order of the chain.
    pub(crate) slots: Vec<Slot>,
    pub(crate) links: Vec<Link>,
    /// For requests of the frontend, then for those that filters issue: one for each slot
    /// that needs it ([`Slot::arena`]). A request waits only for those that were issued
    /// below it, so none waits for room that it takes up itself. Empty if no filter looks
    /// at data.
    pub(crate) arenas: Vec<Arena>,
    pub(crate) request_stats: Block,
    pub(crate) store_stats: Block,
    pub(crate) log: LogSink,
    /// Tells the thread that watches the filter hosts. One that it is to kill will be
    /// reported lost in time.
    pub(crate) tell: TellHosts,
}

/// See the module.
pub(crate) struct Engine {
    parts: Parts,
    frontend: Option<Box<dyn RequestQueue>>,
    stop: Option<Stop>,
    stun: Option<Stun>,
    ending: Option<Patience>,
    quit: bool,
    /// The frontend's queue can serve no more, and that was said.
    broken: bool,
    flights: Slab<InFlight>,
    wholes: Slab<Whole>,
    /// By arena; there is one for requests of the frontend in any case.
    waiting: Vec<Waiting>,
    /// Requests of the frontend that have not ended.
    guest_requests: usize,
    serial: u32,
    /// Stays at slots so far.
    order: u64,
    /// No delivery is overdue before.
    due_at_ns: u64,
    /// The clock when this turn of the loop began, or when stores had answered in it: the time of
    /// all that happens then.
    seen_ns: u64,
    images: Images,
    /// Deliveries of requests that ended without their answer, which may still come.
    abandoned: HashMap<u64, Abandoned>,
    taken: Vec<Request>,
    stored: Vec<StoreDone>,
    marked: Vec<MarkDone>,
    waiter: Waiter,
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Engine {
        let waiting = parts.arenas.len().max(1);
        Engine {
            parts,
            frontend: None,
            stop: None,
            stun: None,
            ending: None,
            quit: false,
            broken: false,
            flights: Slab::new(),
            wholes: Slab::new(),
            waiting: std::iter::repeat_with(Waiting::default).take(waiting).collect(),
            guest_requests: 0,
            serial: 0,
            order: 0,
            due_at_ns: u64::MAX,
            seen_ns: 0,
            images: Images::default(),
            abandoned: HashMap::new(),
            taken: Vec::with_capacity(BATCH),
            stored: Vec::with_capacity(BATCH),
            marked: Vec::new(),
            waiter: Waiter::default(),
        }
    }

    /// Serves until told to quit.
    pub(crate) fn run(mut self) {
        self.seen_ns = self.now_ns();
        loop {
            let busy = self.look();
            if self.has_ended() {
                return;
            }
            self.seen_ns = self.now_ns();
            match self.waiter.turn(busy, self.seen_ns) {
                Turn::Poll => std::hint::spin_loop(),
                Turn::Yield => self.yield_core(),
                Turn::Sleep => {
                    self.sleep();
                    self.seen_ns = self.now_ns();
                }
            }
        }
    }

    /// Whether it was told to quit, and has nothing in flight any more.
    fn has_ended(&self) -> bool {
        let is_done = self.flights.len() == 0 || is_planted("end-in-flight");
        self.quit && is_done && !self.is_still()
    }

    /// A turn of the loop, begun now.
    #[cfg(any(test, feature = "sim", feature = "fuzzing"))]
    fn turn(&mut self) -> bool {
        self.seen_ns = self.now_ns();
        self.look()
    }

    /// Looks everywhere for work once, and does it; says whether there was some.
    fn look(&mut self) -> bool {
        let mut busy = self.obey();
        if self.is_still() {
            return busy;
        }
        busy |= self.take_requests();
        busy |= self.reap_links();
        busy |= self.reap_stores();
        busy |= self.reap_marks();
        busy |= self.check_deadlines();
        busy |= self.check_quiet();
        busy |= self.publish();
        busy |= self.check_stop();
        busy | self.check_stun()
    }

    /// Nanoseconds of the clock that everything here is measured with. Reading it costs as
    /// much as a tenth of a request: what happens in one turn has the time of its beginning
    /// ([`Engine::seen_ns`]).
    fn now_ns(&self) -> u64 {
        self.parts.clock.now_ns()
    }

    fn yield_core(&mut self) {
        rustix::thread::sched_yield();
        let after_ns = self.now_ns();
        self.waiter.yielded(after_ns.saturating_sub(self.seen_ns));
        self.seen_ns = after_ns;
    }

    fn log(&self, level: LogLevel, text: &str) {
        (self.parts.log)(level, &format!("disk {}: {text}", self.parts.disk));
    }

    fn obey(&mut self) -> bool {
        let mut busy = false;
        loop {
            match self.parts.commands.try_recv() {
                Ok(command) => {
                    if let Some(command) = self.put_off(command) {
                        self.obey_one(command);
                    }
                }
                Err(TryRecvError::Empty) => return busy,
                Err(TryRecvError::Disconnected) => {
                    self.end_stun();
                    self.begin_quit();
                    return busy;
                }
            }
            busy = true;
        }
    }

    fn obey_one(&mut self, command: Command) {
        match command {
            Command::Start(queue) => {
                debug_assert!(self.frontend.is_none());
                self.frontend = Some(queue);
                self.broken = false;
            }
            Command::Stop { drain_ms, reply } => self.begin_stop(drain_ms, reply),
            Command::HostLost { host, life, is_for_good } => self.lose(host, life, is_for_good),
            Command::HostBack { host, life, way } => self.revive(host, life, *way),
            Command::Stun { may_stay, reply } => self.begin_stun(may_stay, reply),
            Command::Swap { make_up, reply } => {
                self.swap(*make_up);
                let _ = reply.send(());
            }
            Command::Unstun => self.end_stun(),
            Command::EndTrial { instance } => self.end_trial(instance),
            Command::Report { reply } => drop(reply.send(self.report())),
            Command::WindDown { drain_ms } => self.wind_down(drain_ms),
            Command::Quit => self.begin_quit(),
        }
    }

    /// Whether requests are taken from the frontend.
    fn listens(&self) -> bool {
        let ending = self.stop.is_some() || self.quit || self.stun.is_some();
        // What waits for room would only wait behind itself: leave the rest in the ring.
        !ending && !self.broken && self.waiting[0].requests.is_empty()
    }

    fn take_requests(&mut self) -> bool {
        if !self.listens() {
            return false;
        }
        let Some(queue) = &mut self.frontend else { return false };
        let mut taken = std::mem::take(&mut self.taken);
        if let Err(error) = queue.take(BATCH, &mut taken) {
            self.broken = true;
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
        if busy {
            // Some stores answer within the turn in which they are asked.
            self.seen_ns = self.now_ns();
        }
        for done in stored.drain(..) {
            self.handle_stored(done);
        }
        self.stored = stored;
        busy
    }

    /// Shows the others what this turn has done: once for all of it. True if that led to
    /// more, which is not shown yet.
    fn publish(&mut self) -> bool {
        // A filter host answers only what it has taken, so no more than this waits for one
        // that takes anything.
        let backlog_max =
            BACKLOG_MIN + 2 * self.flights.len() + ISSUED_MAX * self.parts.slots.len();
        let mut busy = false;
        for link in 0..self.parts.links.len() {
            let sane = self.parts.links[link].publish(self.seen_ns);
            if !sane {
                self.give_up(link, "its ring makes no sense", false);
            } else if self.parts.links[link].backlog() > backlog_max {
                self.give_up(link, "it answers, and does not take what it is sent", false);
            } else if self.is_stuck(link) {
                // Perhaps it has no request that could be overdue.
                self.give_up(link, "it hangs: it takes nothing of what it is sent", true);
            } else {
                continue;
            }
            busy = true;
        }
        if let Some(queue) = &mut self.frontend {
            queue.publish();
        }
        busy
    }

    /// Whether a filter host has taken nothing of what waits for it for longer than it may
    /// have a request.
    fn is_stuck(&self, link: usize) -> bool {
        let stuck_ns = self.parts.links[link].stuck_ns(self.seen_ns);
        let slots = self.parts.slots.iter().filter(|slot| slot.link == link);
        stuck_ns > 0 && slots.map(|slot| slot.deadline_ns).min().is_some_and(|most| stuck_ns > most)
    }

    fn slot(&self, slot: SlotIndex) -> &Slot {
        &self.parts.slots[slot.index()]
    }

    /// How long it may sleep although nobody wakes it.
    fn sleep_ns_max(&self) -> Option<u64> {
        let patience =
            self.stop.as_ref().map(|stop| &stop.patience).into_iter().chain(&self.ending);
        let until_ns = patience.map(|patience| patience.until_ns).min();
        let due_at_ns = (self.due_at_ns != u64::MAX).then_some(self.due_at_ns);
        let until_ns = until_ns.into_iter().chain(due_at_ns).min();
        let ends = until_ns.map(|until_ns| until_ns.saturating_sub(self.now_ns()));
        // A filter host does not say when there is room in its ring again.
        let waits = self.parts.links.iter().any(|link| link.backlog() > 0);
        ends.into_iter().chain(waits.then_some(ROOM_NS)).min()
    }

    /// Sleeps until somebody has work for this thread, or a stop is overdue.
    fn sleep(&mut self) {
        if self.is_still() {
            let _ = poll(&mut [PollFd::new(&self.parts.wake, PollFlags::IN)], None);
            self.parts.wake.clear();
            return;
        }
        let mut ready = true;
        for link in &mut self.parts.links {
            ready &= !link.is_heard() || link.way.channel.completions.before_sleep();
        }
        for lane in &mut self.parts.lanes {
            ready &= lane.store.before_sleep();
        }
        for gaps in self.parts.slots.iter_mut().filter_map(|slot| slot.gaps.as_mut()) {
            ready &= gaps.before_sleep();
        }
        let listens = self.listens();
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
            let gaps = self.parts.slots.iter().filter_map(|slot| slot.gaps.as_ref());
            fds.extend(
                gaps.filter(|gaps| gaps.in_flight() > 0)
                    .filter_map(|gaps| gaps.doorbell())
                    .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            );
            if listens {
                let kick = self.frontend.as_ref().and_then(|queue| queue.doorbell());
                fds.extend(kick.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            }
            let timeout = self.sleep_ns_max().map(|left| Timespec {
                tv_sec: (left / 1_000_000_000) as i64,
                tv_nsec: (left % 1_000_000_000) as _,
            });
            // An error (EINTR) is a wake-up like any other: the loop looks at everything.
            let _ = poll(&mut fds, timeout.as_ref());
        }
        self.parts.wake.clear();
        for link in &mut self.parts.links {
            link.way.channel.completions.after_sleep();
        }
        if let Some(queue) = &mut self.frontend
            && listens
        {
            queue.after_sleep();
        }
    }
}
