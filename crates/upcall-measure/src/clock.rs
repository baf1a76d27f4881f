//! What looking at the clock costs, which is subtracted from what it measures.

use std::sync::OnceLock;
use std::time::Instant;

use crate::histogram::Histogram;

/// What reading the clock costs, in nanoseconds.
pub fn clock_ns() -> u64 {
    static COST: OnceLock<u64> = OnceLock::new();
    *COST.get_or_init(|| {
        let mut costs = Histogram::default();
        let mut last = Instant::now();
        for _ in 0..20_000 {
            let now = Instant::now();
            costs.record((now - last).as_nanos() as u64);
            last = now;
        }
        costs.quantile_ns(0.5)
    })
}
