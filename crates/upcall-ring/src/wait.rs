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
//! wait for may be waiting for our core: that is ten times faster than any spinning. (Unless
//! somebody else took the core and computes: then a yield lasts for milliseconds, and
//! sleeping is better.) But a yield takes as long as two switches; what another core says within
//! a fraction of that is waited for first, as long as enough waits end so. If yields return at once, a look is followed by the next look. Then only
//! a wait that has lasted longer than another core takes to answer has a yield now and then, to
//! find out whether it is still so: whoever is answered sooner does not keep from running what
//! it waits for, and a system call in the middle would make so short a wait a longer one.
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
    /// When no yield is slow, a wait shorter than this has none.
    pub undisturbed_ns: u64,
    /// While others want the core, a wait is without yields for so long, if that has paid.
    pub brief_ns: u64,
    /// After this many short sleeps in a row, in spite of the growing budget, looking is
    /// given up.
    pub misses_max: u32,
    /// Looking is tried again after this many short sleeps in a row.
    pub misses_forgotten: u32,
}

impl WaitLimits {
    /// The default, tuned for small hosts: the worker's threads, filter hosts and the
    /// guest's processors share a few cores; a sleep and a wake-up across cores takes about
    /// 35 µs, a switch between threads on one core about 1 µs. A host with a core to spare
    /// for each thread gains latency by a larger `budget_max_ns`.
    pub const SMALL_HOST: WaitLimits = WaitLimits {
        budget_max_ns: 50_000,
        budget_step_ns: 5_000,
        short_sleep_ns: 150_000,
        slow_yield_ns: 1_000,
        patience: 16,
        undisturbed_ns: 2_000,
        brief_ns: 700,
        misses_max: 8,
        misses_forgotten: 128,
    };
}

impl Default for WaitLimits {
    fn default() -> Self {
        WaitLimits::SMALL_HOST
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
    /// While not 0, a wait begins without yields though cores are short: what those that ended so
    /// have saved, less what the others cost.
    credit: u32,
    /// Waits since there was any.
    unpaid: u32,
}

/// For how many waits of [`WaitLimits::brief_ns`] a yield that was spared pays, and how many may
/// be saved up.
const CREDIT: u32 = 3;
const CREDIT_MAX: u32 = 16;
/// Without credit, one wait in so many tries again.
const TRY_ONE_IN: u32 = 64;

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
            credit: CREDIT,
            unpaid: 0,
        }
    }

    /// What to do next. `found_work`: the look just made found something to do (and it is
    /// done). `now_ns`: a clock that does not go back, read after that look.
    pub fn turn(&mut self, found_work: bool, now_ns: u64) -> Turn {
        if found_work {
            if let Some(wait) = self.wait.take() {
                if self.crowded > 0 {
                    self.weigh(now_ns.saturating_sub(wait.since_ns));
                }
                self.learn(wait, now_ns.saturating_sub(wait.since_ns));
            }
            return Turn::Poll;
        }
        let wait = self.wait.get_or_insert(Wait { since_ns: now_ns, slept: false });
        let waited_ns = now_ns.saturating_sub(wait.since_ns);
        if waited_ns >= self.budget_ns {
            wait.slept = true;
            return Turn::Sleep;
        }
        if self.crowded > 0 && self.credit > 0 && waited_ns < self.limits.brief_ns {
            return Turn::Poll;
        }
        if self.crowded == 0 {
            if waited_ns < self.limits.undisturbed_ns {
                return Turn::Poll;
            }
            if self.polls_left > 0 {
                self.polls_left -= 1;
                return Turn::Poll;
            }
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

    /// A wait while cores are short ended after `took_ns`: was it worth waiting without yields?
    fn weigh(&mut self, took_ns: u64) {
        if self.credit == 0 {
            self.unpaid += 1;
            if self.unpaid == TRY_ONE_IN {
                (self.credit, self.unpaid) = (1, 0);
            }
        } else if took_ns < self.limits.brief_ns {
            self.credit = (self.credit + CREDIT).min(CREDIT_MAX);
        } else {
            self.credit -= 1;
        }
    }

    /// A wait ended after `took_ns`.
    fn learn(&mut self, wait: Wait, took_ns: u64) {
        let limits = &self.limits;
        if !wait.slept && took_ns > limits.budget_max_ns {
            // A yield gave the core to somebody who keeps it for long. Who sleeps instead
            // gets the core back when woken.
            self.misses = limits.misses_max;
            self.budget_ns = 0;
        } else if !wait.slept {
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

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: WaitLimits = WaitLimits::SMALL_HOST;
    const POLL_NS: u64 = 50;
    const WAKE_NS: u64 = 35_000;

    /// A thread with a clock of its own, that counts what it does.
    struct World {
        waiter: Waiter,
        now_ns: u64,
        yield_ns: u64,
        polls: u64,
        yields: u64,
        sleeps: u64,
        /// Time spent looking in vain.
        burnt_ns: u64,
    }

    impl World {
        fn new(yield_ns: u64) -> World {
            let waiter = Waiter::new(LIMITS);
            World { waiter, now_ns: 1, yield_ns, polls: 0, yields: 0, sleeps: 0, burnt_ns: 0 }
        }

        /// Waits for work that comes in `after_ns`, finds it, and returns how late.
        fn wait(&mut self, after_ns: u64) -> u64 {
            let due_ns = self.now_ns + after_ns;
            loop {
                let turn = self.waiter.turn(self.now_ns >= due_ns, self.now_ns);
                if self.now_ns >= due_ns {
                    assert_eq!(turn, Turn::Poll, "after work comes another look");
                    return self.now_ns - due_ns;
                }
                let before_ns = self.now_ns;
                self.now_ns += POLL_NS;
                match turn {
                    Turn::Poll => self.polls += 1,
                    Turn::Yield => {
                        self.yields += 1;
                        self.now_ns += self.yield_ns;
                        self.waiter.yielded(self.yield_ns);
                    }
                    Turn::Sleep => {
                        self.sleeps += 1;
                        self.now_ns = due_ns.max(self.now_ns) + WAKE_NS;
                        continue;
                    }
                }
                self.burnt_ns += self.now_ns - before_ns;
            }
        }

        fn waits(&mut self, count: usize, after_ns: u64) {
            for _ in 0..count {
                self.wait(after_ns);
            }
        }
    }

    #[test]
    fn short_waits_are_met_by_looking_with_a_budget_not_far_above_them() {
        let mut world = World::new(200);
        world.waits(1000, 1_000);
        assert_eq!(world.sleeps, 0);
        assert_eq!(world.waiter.budget_ns(), LIMITS.budget_step_ns);
        world.waits(1000, 4_000);
        assert_eq!(world.sleeps, 0);
        assert!((7_500..10_000).contains(&world.waiter.budget_ns()));
    }

    #[test]
    fn the_budget_grows_until_waits_of_thirty_microseconds_need_no_sleep() {
        let mut world = World::new(200);
        world.waits(20, 30_000);
        assert!(world.sleeps < 5, "{}", world.sleeps);
        world.sleeps = 0;
        world.waits(1000, 30_000);
        assert_eq!(world.sleeps, 0);
    }

    #[test]
    fn an_idle_thread_soon_sleeps_without_looking() {
        let mut world = World::new(200);
        world.waits(100, 20_000);
        assert!(world.waiter.budget_ns() > 20_000);
        world.waits(6, 10_000_000);
        assert_eq!(world.waiter.budget_ns(), 0);
        (world.burnt_ns, world.sleeps) = (0, 0);
        world.waits(1000, 10_000_000);
        assert_eq!((world.burnt_ns, world.sleeps), (0, 1000));
    }

    #[test]
    fn no_wait_burns_more_than_the_largest_budget_and_one_look() {
        let mut world = World::new(900);
        for after_ns in [1_000, 45_000, 60_000, 100_000, 1_000_000, 20_000, 49_000, 55_000] {
            for _ in 0..50 {
                world.burnt_ns = 0;
                world.wait(after_ns);
                assert!(world.burnt_ns < LIMITS.budget_max_ns + world.yield_ns + POLL_NS);
            }
        }
    }

    #[test]
    fn waits_just_too_long_for_any_budget_burn_little() {
        let mut world = World::new(200);
        let start_ns = world.now_ns;
        world.waits(5000, 80_000);
        let share = world.burnt_ns as f64 / (world.now_ns - start_ns) as f64;
        assert!(share < 0.03, "{share}");
        world.waits(LIMITS.misses_forgotten as usize + 1, 10_000);
        world.sleeps = 0;
        world.waits(100, 10_000);
        assert_eq!(world.sleeps, 0, "it comes back to looking when that is worth it");
    }

    #[test]
    fn where_yields_take_long_every_look_is_followed_by_one() {
        let mut world = World::new(3_000);
        world.waits(100, 10_000);
        (world.polls, world.yields) = (0, 0);
        world.waits(1000, 10_000);
        // Whether it would pay to wait a moment first is tried now and then.
        assert!((1..world.yields / 10).contains(&world.polls), "{} {}", world.polls, world.yields);
    }

    #[test]
    fn where_yields_take_long_what_another_core_says_at_once_is_waited_for_without() {
        let mut world = World::new(2_300);
        let limits = WaitLimits { budget_step_ns: 50_000, ..LIMITS };
        world.waiter = Waiter::new(limits);
        for _ in 0..100 {
            // The one is answered by who needs this core, the other by another core.
            world.waits(1, 2_500);
            world.yields = 0;
            world.waits(1, 300);
            assert_eq!(world.yields, 0);
        }
    }

    #[test]
    fn where_yields_return_at_once_looks_are_many_and_yields_few_but_never_none() {
        let mut world = World::new(150);
        world.waits(100, 4_000);
        (world.polls, world.yields) = (0, 0);
        world.waits(1000, 4_000);
        assert!(world.polls > 10 * world.yields, "{} {}", world.polls, world.yields);
        assert!(world.yields > 500);
        world.yield_ns = 3_000;
        world.waits(20, 4_000);
        world.polls = 0;
        world.waits(10, 4_000);
        assert_eq!(world.polls, 0, "somebody needs the core now");
    }

    #[test]
    fn a_wait_as_short_as_an_answer_from_another_core_has_no_yield_in_it() {
        let mut world = World::new(150);
        world.waits(100, 500);
        (world.polls, world.yields) = (0, 0);
        world.waits(1000, 500);
        assert_eq!((world.yields, world.sleeps), (0, 0));
        assert!(world.polls >= 10_000, "{}", world.polls);
    }

    #[test]
    fn where_a_yield_gives_the_core_away_for_milliseconds_the_thread_sleeps_instead() {
        let mut world = World::new(3_000_000);
        world.waits(10, 4_000);
        (world.yields, world.sleeps) = (0, 0);
        world.waits(1000, 4_000);
        assert!(world.yields < 20 && world.sleeps > 980, "{} {}", world.yields, world.sleeps);
    }

    #[test]
    fn a_wait_goes_on_sleeping_when_a_wake_brings_no_work() {
        let mut waiter = Waiter::new(LIMITS);
        assert_eq!(waiter.turn(false, 0), Turn::Poll);
        assert_eq!(waiter.turn(false, LIMITS.brief_ns), Turn::Yield);
        assert_eq!(waiter.turn(false, LIMITS.budget_step_ns), Turn::Sleep);
        assert_eq!(waiter.turn(false, LIMITS.budget_step_ns + 1), Turn::Sleep);
        assert_eq!(waiter.turn(true, 60_000), Turn::Poll);
        assert_ne!(waiter.turn(false, 70_000), Turn::Sleep);
    }
}
