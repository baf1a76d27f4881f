//! A store that behaves badly within its rights, for the tests of who uses stores.
//!
//! It may: complete late and in any order, fail requests, fail a flush for good. It never
//! loses, repeats or corrupts anything: what it reports as done, the store below has done, and
//! a request it fails never reached the store below. All from a seed; what differs between two
//! runs with one seed is only what the threads around it do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use upcall_block::{DiskInfo, Errno, Op, Status, Store, StoreDone, StoreIo, StoreQueue};
use upcall_ring::Doorbell;

/// How a [`FaultyStore`] behaves.
#[derive(Clone, Debug)]
pub struct Faults {
    /// What all chance comes from.
    pub seed: u64,
    /// A completion is reported by the next poll, or up to so many polls later.
    pub delay_polls_max: u32,
    /// Of 1000 requests (no flushes), so many fail with `errno`.
    pub errors_per_mille: u32,
    /// What they fail with.
    pub errno: Errno,
    /// The flush with this number, counted from 0 over all queues, fails, and from then on
    /// everything that writes.
    pub failed_flush: Option<u32>,
}

impl Faults {
    /// Late and out of order, without errors.
    pub fn reordering(seed: u64) -> Faults {
        Faults {
            seed,
            delay_polls_max: 8,
            errors_per_mille: 0,
            errno: Errno::EIO,
            failed_flush: None,
        }
    }
}

/// A store with faults above a store without.
pub struct FaultyStore {
    below: Arc<dyn Store>,
    state: Arc<State>,
}

struct State {
    faults: Faults,
    queue_count: AtomicU64,
    flush_count: AtomicU32,
    error_count: AtomicU64,
    has_failed: AtomicBool,
}

struct FaultyQueue {
    below: Box<dyn StoreQueue>,
    state: Arc<State>,
    /// For a store below without one; never rung.
    doorbell: Doorbell,
    random: u64,
    /// Completions, each with the polls it still has to wait.
    held: Vec<(u32, StoreDone)>,
}

impl FaultyStore {
    /// Puts faults above a store.
    pub fn new(below: Arc<dyn Store>, faults: Faults) -> FaultyStore {
        let state = State {
            faults,
            queue_count: AtomicU64::new(0),
            flush_count: AtomicU32::new(0),
            error_count: AtomicU64::new(0),
            has_failed: AtomicBool::new(false),
        };
        FaultyStore { below, state: Arc::new(state) }
    }

    /// Requests that failed by chance so far, not counting those after a failed flush.
    pub fn error_count(&self) -> u64 {
        self.state.error_count.load(Ordering::Relaxed)
    }
}

impl Store for FaultyStore {
    fn info(&self) -> &DiskInfo {
        self.below.info()
    }

    fn describe(&self) -> String {
        format!("{}, with {:?}", self.below.describe(), self.state.faults)
    }

    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        let number = self.state.queue_count.fetch_add(1, Ordering::Relaxed);
        let seed = self.state.faults.seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Ok(Box::new(FaultyQueue {
            below: self.below.open_queue()?,
            state: self.state.clone(),
            doorbell: Doorbell::new()?,
            random: seed.max(1),
            held: vec![],
        }))
    }

    fn sync(&self) -> Status {
        if self.state.has_failed.load(Ordering::SeqCst) {
            return Err(Errno::EIO);
        }
        self.below.sync()
    }
}

impl FaultyQueue {
    /// Below `end`.
    fn random(&mut self, end: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32 % end
    }

    fn hold(&mut self, done: StoreDone) {
        let polls = self.random(self.state.faults.delay_polls_max + 1);
        self.held.push((polls, done));
    }

    /// What the request fails with, if it does.
    fn fault(&mut self, io: &StoreIo) -> Option<Errno> {
        let state = self.state.clone();
        if io.op == Op::Flush {
            let number = state.flush_count.fetch_add(1, Ordering::SeqCst);
            if state.faults.failed_flush == Some(number) {
                state.has_failed.store(true, Ordering::SeqCst);
            }
        }
        if io.op != Op::Read && state.has_failed.load(Ordering::SeqCst) {
            return Some(Errno::EIO);
        }
        let is_unlucky = io.op != Op::Flush && self.random(1000) < state.faults.errors_per_mille;
        is_unlucky.then(|| {
            state.error_count.fetch_add(1, Ordering::Relaxed);
            state.faults.errno
        })
    }
}

impl StoreQueue for FaultyQueue {
    fn submit(&mut self, io: StoreIo) {
        match self.fault(&io) {
            Some(errno) => self.hold(StoreDone { token: io.token, status: Err(errno) }),
            None => self.below.submit(io),
        }
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        let mut done = Vec::new();
        self.below.poll(&mut done);
        for done in done {
            self.hold(done);
        }
        let first = out.len();
        self.held.retain_mut(|(polls, done)| {
            if *polls == 0 {
                out.push(*done);
                return false;
            }
            *polls -= 1;
            true
        });
        for last in (first + 1..out.len()).rev() {
            let other = first + self.random((last - first + 1) as u32) as usize;
            out.swap(last, other);
        }
    }

    fn in_flight(&self) -> usize {
        self.below.in_flight() + self.held.len()
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        self.below.doorbell().or_else(|| Some(self.doorbell.as_fd()))
    }

    /// Never while a completion is held back: those are counted in polls.
    fn before_sleep(&mut self) -> bool {
        self.held.is_empty() && self.below.before_sleep()
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::{Range, RequestFlags, StoreToken};
    use upcall_ring::Buffers;

    use super::*;
    use crate::NullStore;

    /// What becomes of 200 writes and, as the 101st request, a flush.
    fn run(faults: Faults) -> (Vec<StoreDone>, u64) {
        let store = FaultyStore::new(Arc::new(NullStore::new(1 << 20).unwrap()), faults);
        let mut queue = store.open_queue().unwrap();
        let mut out = Vec::new();
        for token in 0..200 {
            let op = if token == 100 { Op::Flush } else { Op::Discard };
            let length = if op == Op::Flush { 0 } else { 4096 };
            let range = Range::new(0, length, store.info()).unwrap();
            let flags = RequestFlags::default();
            let token = StoreToken(token);
            queue.submit(StoreIo { token, op, range, flags, data: Buffers::new() });
        }
        while queue.in_flight() > 0 {
            assert!(!queue.before_sleep());
            queue.poll(&mut out);
        }
        assert!(queue.before_sleep());
        (out, store.error_count())
    }

    #[test]
    fn everything_completes_once_out_of_order_and_the_same_way_again() {
        let (done, errors) = run(Faults::reordering(7));
        assert_eq!(errors, 0);
        assert!(done.iter().all(|done| done.status == Ok(())));
        let order: Vec<_> = done.iter().map(|done| done.token.0).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..200));
        assert_ne!(sorted, order);
        assert_eq!(run(Faults::reordering(7)).0, done);
        assert_ne!(run(Faults::reordering(8)).0, done);
    }

    #[test]
    fn errors_come_at_their_rate_and_after_a_failed_flush_always() {
        let (done, errors) = run(Faults {
            errors_per_mille: 100,
            errno: Errno::ENOSPC,
            failed_flush: Some(0),
            ..Faults::reordering(7)
        });
        assert!((2..30).contains(&errors), "{errors} of 100");
        for done in &done {
            let late = done.token.0 >= 100;
            assert_eq!(late, done.status == Err(Errno::EIO), "{done:?}");
        }
        let unlucky = done.iter().filter(|done| done.status == Err(Errno::ENOSPC)).count();
        assert_eq!(unlucky as u64, errors);
    }
}
