//! The `throttle` filter: limits a disk's operations and bytes per second, with bursts.
//!
//! All queues of the disk share one pair of buckets. What may not pass yet is held in the
//! order of its arrival, and released by a timer. Flushes pass free: they carry no data,
//! and holding them would lengthen what the guest must wait for to be safe.
//!
//! Here requests meet time; what follows from that is decided in `limiter` and `bucket`,
//! which know neither.
#![deny(unsafe_code)]

mod bucket;
mod limiter;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use upcall_sdk::{
    Class, Counter, Errno, Filter, Held, HoldId, Info, Instance, Op, OpSet, Param, Request, Timer,
    Verdict, error, export_filter,
};

use crate::bucket::Bucket;
use crate::limiter::{Cost, Limiter};

/// One disk's limits.
struct Throttle {
    shared: Arc<Shared>,
}

struct Shared {
    instance: Instance,
    queue: Mutex<Queue>,
    held: Counter,
    released: Counter,
    cancelled: Counter,
    late: Counter,
}

struct Queue {
    limiter: Limiter<Held<Throttle>>,
    /// There is one while something waits.
    timer: Option<Timer>,
}

impl Filter for Throttle {
    const INFO: Info = Info {
        name: c"throttle",
        version: c"0.1.0",
        vendor: c"Upcall",
        summary: c"Limits a disk's operations and bytes per second",
        class: Class::Qos,
        ops: OpSet::of(&[Op::Read, Op::Write, Op::Discard, Op::WriteZeroes]),
        ..Info::NEW
    };

    const PARAMS: &'static [Param] = &[
        Param::int(c"iops", c"Operations per second; 0: no limit.", Some(c"0"), 0, i64::MAX),
        Param::int(
            c"iops_burst",
            c"Operations at once after a pause; 0: a tenth of a second's.",
            Some(c"0"),
            0,
            i64::MAX,
        ),
        Param::size(
            c"bytes_per_second",
            c"Bytes read and written per second; 0: no limit.",
            Some(c"0"),
            0,
            i64::MAX,
        ),
        Param::size(
            c"bytes_burst",
            c"Bytes at once after a pause; 0: a tenth of a second's.",
            Some(c"0"),
            0,
            i64::MAX,
        ),
    ];

    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        let now_ns = nanoseconds(instance.now());
        let value = |name| u64::try_from(instance.param_int(name)).unwrap_or(0);
        let limiter = Limiter::new(
            Bucket::new(value(c"iops"), value(c"iops_burst"), now_ns),
            Bucket::new(value(c"bytes_per_second"), value(c"bytes_burst"), now_ns),
        );
        let shared = Shared {
            queue: Mutex::new(Queue { limiter, timer: None }),
            held: instance.counter(c"held"),
            released: instance.counter(c"released"),
            cancelled: instance.counter(c"cancelled"),
            late: instance.counter(c"late"),
            instance,
        };
        Ok(Throttle { shared: Arc::new(shared) })
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        let cost = cost(request.op(), request.length());
        let now_ns = nanoseconds(self.shared.instance.now());
        let mut queue = self.shared.queue();
        if queue.limiter.admit(now_ns, cost) {
            return request.pass();
        }
        let (held, verdict) = request.hold();
        queue.limiter.wait(cost, held);
        if queue.timer.is_none() {
            queue.timer = start_timer(&self.shared, &queue.limiter);
        }
        let stranded = if queue.timer.is_none() { queue.limiter.remove(|_| true) } else { None };
        drop(queue);
        // Without a timer nothing would ever release it: rather too fast than never.
        match stranded {
            Some(held) => held.pass(),
            None => self.shared.held.add(1),
        }
        verdict
    }

    fn cancel(&self, hold: HoldId) {
        let removed = self.shared.queue().limiter.remove(|held| held.id() == hold);
        if let Some(held) = removed {
            held.fail(Errno::ECANCELED);
            self.shared.cancelled.add(1);
        }
    }
}

export_filter!(Throttle);

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A timer for the first in the queue. None, after saying so, if there can be none.
fn start_timer(shared: &Arc<Shared>, limiter: &Limiter<Held<Throttle>>) -> Option<Timer> {
    // A millisecond is what timers can do; more is released at once then.
    let delay = Duration::from_nanos(limiter.wait_ns()?).max(Duration::from_millis(1));
    let weak = Arc::downgrade(shared);
    match shared.instance.timer(delay, None, move || release(&weak)) {
        Ok(timer) => Some(timer),
        Err(errno) => {
            error!(shared.instance, "no timer, so a request passes unthrottled: {errno}");
            None
        }
    }
}

/// Lets go what may go, and sets the next timer. Runs in the timer that it replaces.
fn release(shared: &Weak<Shared>) {
    let Some(shared) = shared.upgrade() else { return };
    let now_ns = nanoseconds(shared.instance.now());
    let mut queue = shared.queue();
    let mut released = queue.limiter.release(now_ns);
    shared.late.add(queue.limiter.take_late());
    let next = start_timer(&shared, &queue.limiter);
    if next.is_none() {
        // Nothing waits any more; or there is no timer, and nothing may go on waiting.
        while let Some(held) = queue.limiter.remove(|_| true) {
            released.push(held);
        }
    }
    let last = std::mem::replace(&mut queue.timer, next);
    drop(queue);
    drop(last); // not under the lock; this very timer, so it does not wait for itself
    shared.released.add(released.len() as u64);
    released.into_iter().for_each(Held::pass);
}

/// Reads and writes cost their bytes. Discards and zeroes move none; they cost an
/// operation like all others.
fn cost(op: Op, length: u32) -> Cost {
    Cost { bytes: if op.has_data() { length.into() } else { 0 } }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
