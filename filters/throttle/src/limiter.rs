//! Two buckets and a queue before them. No clock, no threads, no requests: only what they cost.
//!
//! Always true: what waits leaves in the order in which it came; nothing passes while
//! something waits; every item that was handed in comes out once, within [`WAIT_NS_MAX`] if
//! [`release`](Limiter::release) is called when [`wait_ns`](Limiter::wait_ns) says.

use std::collections::VecDeque;

use crate::bucket::Bucket;

/// The longest wait. A filter that holds a request for longer than its deadline (30 s for this
/// class, unless told otherwise) counts as one that hangs, and is killed: so a limit that is
/// too low for what a guest has in flight is exceeded instead.
pub const WAIT_NS_MAX: u64 = 20_000_000_000;

/// What a request costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Of data moved.
    pub bytes: u64,
}

/// Limits operations and bytes per second.
pub struct Limiter<T> {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    waiting: VecDeque<Waiting<T>>,
    now_ns: u64,
    late: u64,
}

struct Waiting<T> {
    cost: Cost,
    since_ns: u64,
    item: T,
}

impl<T> Limiter<T> {
    /// Without a bucket there is no limit of that kind.
    pub fn new(operations: Option<Bucket>, bytes: Option<Bucket>) -> Limiter<T> {
        Limiter { operations, bytes, waiting: VecDeque::new(), now_ns: 0, late: 0 }
    }

    /// Whether a request may pass now; it is paid for then. Else hold it, and
    /// [`wait`](Self::wait).
    pub fn admit(&mut self, now_ns: u64, cost: Cost) -> bool {
        self.fill(now_ns);
        self.waiting.is_empty() && self.pay(cost)
    }

    /// Puts what was not admitted at the end of the queue.
    pub fn wait(&mut self, cost: Cost, item: T) {
        self.waiting.push_back(Waiting { cost, since_ns: self.now_ns, item });
    }

    /// Takes out what may go now, in order.
    pub fn release(&mut self, now_ns: u64) -> Vec<T> {
        self.fill(now_ns);
        let mut released = Vec::new();
        while let Some(Waiting { cost, since_ns, .. }) = self.waiting.front() {
            let is_late = now_ns.saturating_sub(*since_ns) >= WAIT_NS_MAX;
            if !self.pay(*cost) {
                if !is_late {
                    break;
                }
                self.late += 1;
            }
            released.extend(self.waiting.pop_front().map(|waiting| waiting.item));
        }
        released
    }

    /// How many were released since the last call although there was nothing to pay with.
    pub fn take_late(&mut self) -> u64 {
        std::mem::take(&mut self.late)
    }

    /// Nanoseconds until something may go, counted from the time of the last call; none if
    /// nothing waits.
    pub fn wait_ns(&self) -> Option<u64> {
        let Waiting { cost, since_ns, .. } = self.waiting.front()?;
        let operations = self.operations.as_ref().map_or(0, |bucket| bucket.wait_ns(1));
        let bytes = self.bytes.as_ref().map_or(0, |bucket| bucket.wait_ns(cost.bytes));
        let longest_ns = (since_ns + WAIT_NS_MAX).saturating_sub(self.now_ns);
        Some(operations.max(bytes).min(longest_ns))
    }

    /// Takes out what is no longer wanted; it costs nothing.
    pub fn remove(&mut self, is_meant: impl Fn(&T) -> bool) -> Option<T> {
        let index = self.waiting.iter().position(|waiting| is_meant(&waiting.item))?;
        self.waiting.remove(index).map(|waiting| waiting.item)
    }

    fn fill(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        let waiting = !self.waiting.is_empty();
        for bucket in self.operations.iter_mut().chain(&mut self.bytes) {
            bucket.fill(now_ns, waiting);
        }
    }

    /// Pays from both buckets, or from none.
    fn pay(&mut self, cost: Cost) -> bool {
        let allows = |bucket: &Option<Bucket>, cost| bucket.as_ref().is_none_or(|b| b.allows(cost));
        if !allows(&self.operations, 1) || !allows(&self.bytes, cost.bytes) {
            return false;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(cost.bytes);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn cost(bytes: u64) -> Cost {
        Cost { bytes }
    }

    fn limiter(operations: u64, bytes: u64) -> Limiter<u32> {
        Limiter::new(Bucket::new(operations, 1, 0), Bucket::new(bytes, 4096, 0))
    }

    #[test]
    fn nothing_passes_what_waits() {
        let mut limiter = limiter(0, 4096);
        assert!(limiter.admit(0, cost(4096)));
        assert!(!limiter.admit(0, cost(4096)));
        limiter.wait(cost(4096), 1);
        assert!(!limiter.admit(500 * MS, cost(512)), "there are tokens, but 1 came first");
        limiter.wait(cost(512), 2);
        assert_eq!(limiter.release(500 * MS), []);
        assert_eq!(limiter.release(1000 * MS), [1]);
        assert_eq!(limiter.release(1125 * MS), [2]);
    }

    #[test]
    fn both_limits_hold() {
        let mut limiter = limiter(10, 4096);
        assert!(limiter.admit(0, cost(4096)));
        limiter.wait(cost(4096), 1);
        assert_eq!(limiter.wait_ns(), Some(1000 * MS), "bytes are scarcer");
        assert_eq!(limiter.release(1000 * MS), [1]);
        assert!(!limiter.admit(1000 * MS, cost(4096)));
        limiter.wait(cost(0), 2);
        assert_eq!(limiter.wait_ns(), Some(0), "one operation is left of the wait");
    }

    #[test]
    fn what_is_refused_by_one_bucket_costs_the_other_nothing() {
        let mut limiter = limiter(1, 1 << 20);
        assert!(limiter.admit(0, cost(0)));
        for _ in 0..100 {
            assert!(!limiter.admit(0, cost(4096)));
        }
        assert!(limiter.admit(1000 * MS, cost(4096)));
    }

    #[test]
    fn nothing_waits_longer_than_a_filter_may_hold_it() {
        let mut limiter = limiter(1, 0);
        assert!(limiter.admit(0, cost(0)));
        for item in 0..64 {
            assert!(!limiter.admit(0, cost(0)));
            limiter.wait(cost(0), item);
        }
        let (mut now_ns, mut released) = (0, Vec::new());
        while let Some(wait_ns) = limiter.wait_ns() {
            now_ns += wait_ns.max(MS);
            released.extend(limiter.release(now_ns));
            assert!(now_ns <= WAIT_NS_MAX);
        }
        assert_eq!(released, (0..64).collect::<Vec<_>>(), "all, in order");
        assert_eq!((limiter.take_late(), limiter.take_late()), (44, 0));
    }

    #[test]
    fn what_is_removed_costs_nothing() {
        let mut limiter = limiter(1, 0);
        assert!(limiter.admit(0, cost(0)));
        limiter.wait(cost(0), 1);
        limiter.wait(cost(0), 2);
        assert_eq!(limiter.remove(|item| *item == 1), Some(1));
        assert_eq!(limiter.remove(|item| *item == 1), None);
        assert_eq!(limiter.release(1000 * MS), [2]);
        assert_eq!(limiter.wait_ns(), None);
    }
}
