//! Counting, by the one thread that owns a block.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use upcall_ring::Mapping;

use crate::histogram::bucket_of;
use crate::layout::*;

/// Where one thread counts what passes one hop.
pub struct Block {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) start: usize,
}

impl Block {
    /// Its numbers: found and checked once for each call below.
    fn numbers(&self) -> &[AtomicU64; BLOCK / 8] {
        let numbers = self.mapping.atomics_u64(self.start, BLOCK / 8);
        match numbers.and_then(|numbers| numbers.try_into().ok()) {
            Some(numbers) => numbers,
            None => unreachable!("a block lies inside its page"),
        }
    }

    /// A request of operation number `op` arrives.
    pub fn enter(&self) {
        add(self.numbers(), NOW, 1);
    }

    /// It leaves, after `latency_ns`.
    pub fn leave(&self, op: u8, bytes: u64, latency_ns: u64, error: bool) {
        let numbers = self.numbers();
        let counts = counts_of(op);
        add(numbers, counts, 1);
        add(numbers, counts + 8, bytes);
        leave(numbers, op, latency_ns, error);
    }

    /// It leaves again, after it was here a second time on its way up: that is time, and an
    /// error perhaps, but no other request.
    pub fn leave_again(&self, op: u8, latency_ns: u64, error: bool) {
        leave(self.numbers(), op, latency_ns, error);
    }

    /// A request was delivered again, to a new instance.
    pub fn retry(&self) {
        add(self.numbers(), RETRIES, 1);
    }

    /// A request went past the filter, which is gone.
    pub fn skip(&self) {
        add(self.numbers(), SKIPPED, 1);
    }

    /// The hop broke a rule.
    pub fn violation(&self) {
        add(self.numbers(), VIOLATIONS, 1);
    }
}

/// Where what passed of an operation is counted.
fn counts_of(op: u8) -> usize {
    debug_assert!((1..=5).contains(&op));
    64 * usize::from(op.min(5))
}

fn leave(numbers: &[AtomicU64; BLOCK / 8], op: u8, latency_ns: u64, error: bool) {
    let counts = counts_of(op);
    add(numbers, NOW, u64::MAX);
    if error {
        add(numbers, counts + 16, 1);
    }
    add(numbers, counts + 24, latency_ns);
    add(numbers, HISTOGRAM + 8 * bucket_of(latency_ns), 1);
}

/// One thread is the only writer, so load and store need no locked instruction.
#[inline]
fn add(numbers: &[AtomicU64; BLOCK / 8], offset: usize, delta: u64) {
    let number = &numbers[offset / 8];
    number.store(number.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
}
