//! Where a queue thread's time comes from: the system, or whoever plays the world.

#[cfg(any(test, feature = "sim", feature = "fuzzing"))]
use std::sync::Arc;
#[cfg(any(test, feature = "sim", feature = "fuzzing"))]
use std::sync::atomic::{AtomicU64, Ordering};

use std::sync::LazyLock;
use std::time::Instant;

/// When this process first asked for the time.
static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A source of time. It never goes back.
#[derive(Clone, Debug, Default)]
pub(crate) enum Clock {
    /// CLOCK_MONOTONIC, by the way that bears valgrind: a test counts instructions.
    #[default]
    Monotonic,
    /// Stands still until it is moved, so that a world can be played again exactly.
    #[cfg(any(test, feature = "sim", feature = "fuzzing"))]
    Played(Arc<AtomicU64>),
}

impl Clock {
    /// Nanoseconds since some moment, the same one for all of a process.
    #[inline]
    pub(crate) fn now_ns(&self) -> u64 {
        match self {
            Clock::Monotonic => BEGINNING.elapsed().as_nanos() as u64,
            #[cfg(any(test, feature = "sim", feature = "fuzzing"))]
            Clock::Played(now_ns) => now_ns.load(Ordering::Relaxed),
        }
    }
}
