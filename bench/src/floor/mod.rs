//! The floor: what the machine can do at best between two processes, however clever the
//! code. Goals of the up-call are multiples of it.
//!
//! Both sides look at memory without a pause between looks where they poll; each is bound to
//! a core. The cost of reading the clock is subtracted from each latency.

mod cache_line;
mod copy;
pub mod peer;
mod ring;
mod wake;

use std::time::{Duration, Instant};

use crate::clock::clock_ns;
use crate::histogram::Histogram;
use crate::measure::{Effort, Round, Section};
use crate::process;

/// The case that goals refer to.
pub const CACHE_LINE: &str = "cache line, there and back";

/// Runs all of them, in turn, round by round.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "floor",
        &[
            "Two processes, each bound to a core and polling without a pause, if not said otherwise.",
        ],
    );
    let cores = process::cores();
    let (own, other) = (cores[0], *cores.get(1).unwrap_or(&cores[0]));
    let _bound = Bound::to(own)?;
    let apart = if own == other { "one core for both" } else { "a core each, polling" };
    for _ in 0..effort.rounds {
        let clock_ns = clock_ns();
        section.row("reading the clock", "-", "").push(
            "p50",
            crate::measure::Unit::Nanoseconds,
            clock_ns as f64,
        );
        section.row(CACHE_LINE, "-", apart).push_round(&cache_line::run(other, effort.slice)?);
        for depth in [1, 32] {
            let case = format!("ring of 64-byte entries, {depth} in flight");
            section.row(&case, "-", apart).push_round(&ring::run(other, depth, effort.slice)?);
        }
        for (word, core) in [("the same core", own), ("another core", other)] {
            let how = format!("asleep, {word}");
            let futex = wake::futex(core, effort.slice)?;
            section.row("futex, there and back", &how, "each wait sleeps").push_round(&futex);
            let eventfd = wake::eventfd(core, effort.slice)?;
            section.row("eventfd, there and back", &how, "each wait sleeps").push_round(&eventfd);
        }
        for (word, bytes) in [("hot", 2 * copy::BLOCK), ("cold, of 64 MiB", 64 << 20)] {
            section
                .row("copy of 4 KiB", word, "one thread")
                .push_round(&copy::run(bytes, effort.slice)?);
        }
    }
    Ok(section)
}

/// Binds the calling thread to a core until it is dropped.
struct Bound(Vec<usize>);

impl Bound {
    fn to(core: usize) -> Result<Bound, String> {
        let before = process::cores();
        process::pin(None, &[core]).map_err(|error| format!("cannot bind to a core: {error}"))?;
        Ok(Bound(before))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = process::pin(None, &self.0);
    }
}

/// Calls `trip` again and again for `slice`, and times each call.
fn time_each(slice: Duration, mut trip: impl FnMut()) -> Round {
    let clock_ns = clock_ns();
    let mut latencies = Histogram::default();
    // What is cold at first (caches, the branch predictor, the other side) does not count.
    (0..100).for_each(|_| trip());
    let start = Instant::now();
    let mut last = start;
    while last - start < slice {
        trip();
        let now = Instant::now();
        latencies.record(((now - last).as_nanos() as u64).saturating_sub(clock_ns));
        last = now;
    }
    Round { requests: latencies.total(), elapsed: last - start, latencies, ..Round::default() }
}

/// Looks until `done`; lets others run when that takes very long, as when both sides share
/// a core.
#[inline]
fn poll_until(mut done: impl FnMut() -> bool) {
    let mut looks = 0u32;
    while !done() {
        looks += 1;
        if looks >= 20_000 {
            std::thread::yield_now();
        }
    }
}
