//! Where a queue thread's time comes from: the system, or whoever plays the world.

#[cfg(any(test, feature = "sim", feature = "fuzzing"))]
use std::sync::Arc;
#[cfg(any(test, feature = "sim", feature = "fuzzing"))]
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, Timespec, clock_gettime};

/// A source of time. It never goes back.
#[derive(Clone, Debug, Default)]
pub(crate) enum Clock {
    /// CLOCK_MONOTONIC.
    #[default]
    Monotonic,
    /// Stands still until it is moved, so that a world can be played again exactly.
    #[cfg(any(test, feature = "sim", feature = "fuzzing"))]
    Played(Arc<AtomicU64>),
}

impl Clock {
    /// Nanoseconds since some moment.
    #[inline]
    pub(crate) fn now_ns(&self) -> u64 {
        match self {
            Clock::Monotonic => {
                let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Monotonic);
                tv_sec as u64 * 1_000_000_000 + tv_nsec as u64
            }
            #[cfg(any(test, feature = "sim", feature = "fuzzing"))]
            Clock::Played(now_ns) => now_ns.load(Ordering::Relaxed),
        }
    }
}
