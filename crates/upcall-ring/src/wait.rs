//! When a thread that found nothing to do looks again, lets others run, or sleeps.
//!
//! A [`Waiter`] only decides; its thread looks, yields and sleeps. No clock, no system
//! calls.
//!
//! Two things are learnt while it runs. *How long is it worth looking?* A look that finds
//! something saves a sleep of tens of microseconds; one that does not costs the processor
//! that time. So the budget follows the waits: it stays a bit above what they take while
//! looking finds their end, grows while sleeps are so short that looking might have, and
//! goes to nothing when they are not. *Is somebody else in need of this core?* A yield that
//! does not return at once says so. Then every look is followed by a yield, because what we
//! wait for may be waiting for our core: that is ten times faster than any spinning. If
//! yields return at once, a look is followed by the next look, and a yield now and then
//! finds out whether it is still so.
//!
//! Always true: a wait that finds nothing leads to sleep within
//! [`WaitLimits::budget_max_ns`], and an idle thread soon sleeps without looking at all.

/// What a thread does before it looks for work again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing: look at once (a spin-loop hint is fine).
    Poll,
    /// `sched_yield`, and tell [`Waiter::yielded`] how long it took.
    Yield,
    /// Block until a doorbell rings (after asking every ring's `before_sleep`).
    Sleep,
}

/// The figures a [`Waiter`] works with, in nanoseconds where not said otherwise.
///
/// The defaults are tuned for small hosts: the worker's threads, filter hosts and the
/// guest's processors share a few cores, sleeping and waking across cores takes about
/// 35 µs, a switch between threads on one core about 1 µs. For a host with a core to spare
/// for each thread, a larger `budget_max_ns` buys latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitLimits {
    /// Longest time to look before sleeping; the most an idle wait can burn.
    pub budget_max_ns: u64,
    /// Budget of a new waiter, and the first step when the budget grows from 0.
    pub budget_step_ns: u64,
    /// A sleep that ended within this (waking included) might have been spared by looking
    /// longer; a longer one means that the thread is idle.
    pub short_sleep_ns: u64,
    /// A yield that took at least this let somebody else run.
    pub slow_yield_ns: u64,
    /// How many yields after a slow one every look is followed by a yield; and how many
    /// looks there are between two yields when no yield is slow.
    pub patience: u32,
    /// After this many short sleeps in a row, in spite of the growing budget, looking is
    /// given up.
    pub misses_max: u32,
    /// Looking is tried again after this many short sleeps in a row.
    pub misses_forgotten: u32,
}

impl Default for WaitLimits {
    fn default() -> Self {
        WaitLimits {
            budget_max_ns: 50_000,
            budget_step_ns: 5_000,
            short_sleep_ns: 150_000,
            slow_yield_ns: 1_000,
            patience: 16,
            misses_max: 8,
            misses_forgotten: 128,
        }
    }
}

/// Decides how one thread waits. See the module.
///
/// ```
/// # use std::time::Instant;
/// # use upcall_ring::{Turn, Waiter};
/// # let start = Instant::now();
/// # let now_ns = || start.elapsed().as_nanos() as u64;
/// # let (mut looks, mut awake) = (0, true);
/// # let mut found_work = || { looks += 1; looks < 3 };
/// let mut waiter = Waiter::default();
/// # while awake {
/// match waiter.turn(found_work(), now_ns()) {
///     Turn::Poll => {}
///     Turn::Yield => {
///         let before = now_ns();
///         std::thread::yield_now();
///         waiter.yielded(now_ns() - before);
///     }
///     Turn::Sleep => { /* before_sleep, block, clear the doorbell, after_sleep */
/// #       awake = false;
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Waiter {
    limits: WaitLimits,
    budget_ns: u64,
    /// The wait that is going on, if the last look found nothing.
    wait: Option<Wait>,
    /// Short sleeps in a row.
    misses: u32,
    /// While not 0, cores are short: every look is followed by a yield.
    crowded: u32,
    polls_left: u32,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    since_ns: u64,
    slept: bool,
}

impl Default for Waiter {
    fn default() -> Self {
        Waiter::new(WaitLimits::default())
    }
}

impl Waiter {
    /// A waiter that knows nothing yet: it takes cores to be short.
    pub fn new(limits: WaitLimits) -> Waiter {
        Waiter {
            limits,
            budget_ns: limits.budget_step_ns.min(limits.budget_max_ns),
            wait: None,
            misses: 0,
            crowded: limits.patience,
            polls_left: 0,
        }
    }

    /// What to do next. `found_work`: the look just made found something to do (and it is
    /// done). `now_ns`: a clock that does not go back, read after that look.
    pub fn turn(&mut self, found_work: bool, now_ns: u64) -> Turn {
        if found_work {
            if let Some(wait) = self.wait.take() {
                self.learn(wait, now_ns.saturating_sub(wait.since_ns));
            }
            return Turn::Poll;
        }
        let wait = self.wait.get_or_insert(Wait { since_ns: now_ns, slept: false });
        if wait.slept || now_ns.saturating_sub(wait.since_ns) >= self.budget_ns {
            wait.slept = true;
            return Turn::Sleep;
        }
        if self.crowded == 0 && self.polls_left > 0 {
            self.polls_left -= 1;
            return Turn::Poll;
        }
        self.polls_left = self.limits.patience;
        Turn::Yield
    }

    /// How long the yield that [`turn`](Self::turn) asked for took.
    pub fn yielded(&mut self, took_ns: u64) {
        self.crowded = if took_ns >= self.limits.slow_yield_ns {
            self.limits.patience
        } else {
            self.crowded.saturating_sub(1)
        };
    }

    /// How long a wait that began now would look before it sleeps, in nanoseconds.
    pub fn budget_ns(&self) -> u64 {
        self.budget_ns
    }

    /// A wait ended after `took_ns`.
    fn learn(&mut self, wait: Wait, took_ns: u64) {
        let limits = &self.limits;
        if !wait.slept {
            self.misses = 0;
            // Twice the wait, as waits vary; slowly, as one short wait proves little.
            let wanted = (2 * took_ns).clamp(limits.budget_step_ns, limits.budget_max_ns);
            self.budget_ns = (15 * self.budget_ns + wanted) / 16;
        } else if took_ns > limits.short_sleep_ns {
            self.misses = 0;
            let half = self.budget_ns / 2;
            self.budget_ns = if half < limits.budget_step_ns / 4 { 0 } else { half };
        } else {
            self.misses += 1;
            let grown = (2 * self.budget_ns).max(limits.budget_step_ns);
            self.budget_ns =
                if self.misses < limits.misses_max { grown.min(limits.budget_max_ns) } else { 0 };
            if self.misses >= limits.misses_forgotten {
                self.misses = 0;
            }
        }
    }
}
