//! A frontend that always has a request ready: the engine's own thread makes them, so that
//! what is measured is the engine, the ring and the filter host, and no client.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use upcall_block::{
    DiskInfo, Op, QueueError, Range, Request, RequestFlags, RequestQueue, Status, Tag,
};
use upcall_ring::{Access, Buffers, Doorbell, Mapping, memfd};

use crate::clock::clock_ns;
use crate::measure::Round;
use crate::process::{self, Used};

/// The name that the engine's thread has in rounds.
pub const ENGINE: &str = "worker";

/// Places for data: requests in flight at most.
pub const DEPTH_MAX: usize = 256;

/// What to do for one round.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Requests in flight, at most [`DEPTH_MAX`].
    pub depth: usize,
    /// What they are.
    pub op: Op,
    /// Bytes of each, at most 64 KiB.
    pub length: u32,
    /// When a request comes: at once when there is room, or only when [`Handle::arrive`]
    /// says so, and then its latency counts from there.
    pub arrivals: Arrivals,
    /// How long it goes on.
    pub slice: Duration,
}

/// See [`Plan::arrivals`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrivals {
    /// At once.
    Always,
    /// When somebody outside says so.
    Rung,
}

/// Bytes of the largest request.
const LENGTH_MAX: usize = 64 << 10;

/// The end that is given to the worker.
pub struct LoadQueue {
    plans: Receiver<Plan>,
    rounds: Sender<Round>,
    doorbell: Doorbell,
    arrived_ns: Arc<AtomicU64>,
    epoch: Instant,
    core: Option<usize>,
    info: DiskInfo,
    memory: Arc<Mapping>,
    running: Option<Running>,
}

/// The other end.
pub struct Handle {
    plans: Sender<Plan>,
    rounds: Receiver<Round>,
    doorbell: Doorbell,
    arrived_ns: Arc<AtomicU64>,
    epoch: Instant,
}

struct Running {
    plan: Plan,
    /// Of [`Plan::length`], with its data, one for each place.
    templates: Vec<(Range, Buffers)>,
    free: Vec<u32>,
    /// When each was taken, in nanoseconds of the epoch; 0: it is not timed.
    since_ns: Vec<u64>,
    taken: u64,
    start_ns: u64,
    round: Round,
    before: Used,
    ending: bool,
}

/// Where many are in flight, one in this many is timed: reading the clock for each would be
/// a part of what is measured.
const TIMED_ONE_IN: u64 = 61;

/// Makes both ends, for a disk; the engine's thread is bound to `core`.
pub fn load_queue(info: DiskInfo, core: Option<usize>) -> std::io::Result<(LoadQueue, Handle)> {
    let (plan_sender, plans) = channel();
    let (rounds, round_receiver) = channel();
    let doorbell = Doorbell::new()?;
    let fd = memfd("upcall-bench-load", DEPTH_MAX * LENGTH_MAX)?;
    let memory = Mapping::new(&fd, 0, DEPTH_MAX * LENGTH_MAX, Access::ReadWrite)?;
    let arrived_ns = Arc::new(AtomicU64::new(0));
    let epoch = Instant::now();
    let queue = LoadQueue {
        plans,
        rounds,
        doorbell: doorbell.clone(),
        arrived_ns: arrived_ns.clone(),
        epoch,
        core,
        info,
        memory: Arc::new(memory),
        running: None,
    };
    let handle = Handle { plans: plan_sender, rounds: round_receiver, doorbell, arrived_ns, epoch };
    Ok((queue, handle))
}

impl Handle {
    /// Begins a round.
    pub fn begin(&self, plan: Plan) {
        let _ = self.plans.send(plan);
        self.doorbell.ring();
    }

    /// Has one request come now.
    pub fn arrive(&self) {
        self.arrived_ns.store(self.epoch.elapsed().as_nanos() as u64, Ordering::Release);
        self.doorbell.ring();
    }

    /// The round, once it is over. None if it is not within `patience`.
    pub fn end(&self, patience: Duration) -> Option<Round> {
        let end = Instant::now() + patience;
        loop {
            if let Ok(round) = self.rounds.recv_timeout(Duration::from_millis(20)) {
                return Some(round);
            }
            // A queue that waits for arrivals looks at the time only when one comes.
            self.doorbell.ring();
            if Instant::now() > end {
                return None;
            }
        }
    }
}

impl LoadQueue {
    fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn begin(&mut self, plan: Plan) {
        if let Some(core) = self.core.take() {
            // Where it may not be bound it runs anywhere, and figures show it.
            let _ = process::pin(None, &[core]);
        }
        let blocks = self.info.capacity / u64::from(plan.length);
        let template = |place: usize| {
            let offset = (place as u64 * 7919 % blocks) * u64::from(plan.length);
            let range = Range::new(offset, plan.length.into(), &self.info).ok()?;
            let at = place * LENGTH_MAX;
            Some((range, Buffers::of(&self.memory, at, plan.length as usize, true)?))
        };
        let templates = (0..plan.depth.min(DEPTH_MAX)).map_while(template).collect::<Vec<_>>();
        let places = templates.len();
        self.running = Some(Running {
            plan,
            templates,
            free: (0..places as u32).rev().collect(),
            since_ns: vec![0; places],
            taken: 0,
            start_ns: self.now_ns(),
            round: Round::default(),
            before: Used::by_this_thread(),
            ending: false,
        });
    }

    fn may_take(&self) -> bool {
        let Some(running) = &self.running else { return false };
        let arrived = match running.plan.arrivals {
            Arrivals::Always => true,
            Arrivals::Rung => self.arrived_ns.load(Ordering::Acquire) != 0,
        };
        !running.ending && arrived && !running.free.is_empty()
    }

    fn end_if_over(&mut self) {
        let now_ns = self.now_ns();
        let Some(running) = &mut self.running else { return };
        if running.free.len() < running.templates.len() || !running.ending {
            return;
        }
        let mut round = std::mem::take(&mut running.round);
        round.elapsed = Duration::from_nanos(now_ns - running.start_ns);
        round.used = vec![(ENGINE.into(), Used::by_this_thread().since(running.before))];
        self.running = None;
        let _ = self.rounds.send(round);
    }
}

impl RequestQueue for LoadQueue {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        if self.running.is_none() {
            match self.plans.try_recv() {
                Ok(plan) => self.begin(plan),
                Err(_) => return Ok(()),
            }
        }
        let may_take = self.may_take();
        let now_ns = self.now_ns();
        let Some(running) = &mut self.running else { return Ok(()) };
        if now_ns - running.start_ns > running.plan.slice.as_nanos() as u64 {
            running.ending = true;
            self.end_if_over();
            return Ok(());
        }
        if !may_take {
            return Ok(());
        }
        let (mut count, mut since_ns) = (max, now_ns);
        if running.plan.arrivals == Arrivals::Rung {
            since_ns = self.arrived_ns.swap(0, Ordering::AcqRel);
            count = 1;
        }
        for _ in 0..count {
            let Some(place) = running.free.pop() else { break };
            let (range, data) = &running.templates[place as usize];
            let timed = running.plan.depth == 1 || running.taken.is_multiple_of(TIMED_ONE_IN);
            running.since_ns[place as usize] = if timed { since_ns } else { 0 };
            running.taken += 1;
            let op = running.plan.op;
            let data = if op.has_data() { data.clone() } else { Buffers::new() };
            let range = if op == Op::Flush { Range::EMPTY } else { *range };
            let (tag, flags) = (Tag(place), RequestFlags::default());
            out.push(Request { tag, op, range, flags, data });
        }
        Ok(())
    }

    fn complete(&mut self, tag: Tag, status: Status) {
        let epoch = self.epoch;
        let Some(running) = &mut self.running else { return };
        running.round.requests += 1;
        running.round.errors += u64::from(status.is_err());
        let since_ns = running.since_ns[tag.0 as usize];
        if since_ns != 0 {
            let now_ns = epoch.elapsed().as_nanos() as u64;
            running.round.latencies.record((now_ns - since_ns).saturating_sub(clock_ns()));
        }
        running.free.push(tag.0);
    }

    fn publish(&mut self) {
        if self.running.as_ref().is_some_and(|running| running.ending) {
            self.end_if_over();
        }
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.doorbell.as_fd())
    }

    fn before_sleep(&mut self) -> bool {
        !self.may_take()
    }

    fn after_sleep(&mut self) {
        self.doorbell.clear();
    }
}
