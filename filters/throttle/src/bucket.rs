//! A token bucket, as arithmetic. No clock: time comes in as nanoseconds and never goes back.
//!
//! Tokens flow in at a constant rate up to a capacity, and a request takes some out. One
//! that costs more than the capacity goes when the bucket is full, and leaves a debt, so
//! that nothing is ever too large to pass and the rate holds all the same.
//!
//! While something waits, the bucket may rise above its capacity, by a tenth of a second's
//! tokens: a timer that comes a little late must not lower the rate.

const NS_PER_S: i128 = 1_000_000_000;
/// How long a late timer's tokens are kept.
const LATE_NS: i128 = NS_PER_S / 10;

/// A bucket. The level is kept in billionths of a token, so that one nanosecond at one
/// token per second counts.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: i128,
    capacity: i128,
    level: i128,
    filled_ns: u64,
}

impl Bucket {
    /// A full bucket of `rate` tokens per second and room for `burst`; 0 for `burst` means
    /// a tenth of a second's. At least one token has room.
    ///
    /// None if `rate` is 0: no limit.
    pub fn new(rate: u64, burst: u64, now_ns: u64) -> Option<Bucket> {
        if rate == 0 {
            return None;
        }
        let burst = if burst == 0 { rate / 10 } else { burst };
        let capacity = i128::from(burst.max(1)) * NS_PER_S;
        Some(Bucket { rate: rate.into(), capacity, level: capacity, filled_ns: now_ns })
    }

    /// Lets tokens flow in up to `now_ns`. `waiting` says whether something has waited for
    /// them since the last time.
    pub fn fill(&mut self, now_ns: u64, waiting: bool) {
        let elapsed = i128::from(now_ns.saturating_sub(self.filled_ns));
        let late = if waiting { self.rate * LATE_NS } else { 0 };
        // Never lowers the level: what came in late was rightly earned.
        let most = self.level.max(self.capacity + late);
        self.level = self.level.saturating_add(elapsed.saturating_mul(self.rate)).min(most);
        self.filled_ns = self.filled_ns.max(now_ns);
    }

    /// Whether a request of `cost` may go now.
    pub fn allows(&self, cost: u64) -> bool {
        self.missing(cost) <= 0
    }

    /// Takes `cost` tokens out; maybe more than there are.
    pub fn take(&mut self, cost: u64) {
        self.level -= i128::from(cost) * NS_PER_S;
    }

    /// Nanoseconds until a request of `cost` may go.
    pub fn wait_ns(&self, cost: u64) -> u64 {
        let missing = self.missing(cost).max(0);
        u64::try_from((missing + self.rate - 1) / self.rate).unwrap_or(u64::MAX)
    }

    fn missing(&self, cost: u64) -> i128 {
        (i128::from(cost) * NS_PER_S).min(self.capacity) - self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const S: u64 = 1000 * MS;

    #[test]
    fn no_rate_is_no_limit() {
        assert!(Bucket::new(0, 100, 0).is_none());
    }

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate_holds() {
        let mut bucket = Bucket::new(100, 5, 0).unwrap();
        for _ in 0..5 {
            assert!(bucket.allows(1));
            bucket.take(1);
        }
        assert!(!bucket.allows(1));
        assert_eq!(bucket.wait_ns(1), 10 * MS);
        bucket.fill(10 * MS - 1, true);
        assert_eq!((bucket.allows(1), bucket.wait_ns(1)), (false, 1));
        bucket.fill(10 * MS, true);
        assert!(bucket.allows(1));
    }

    #[test]
    fn an_idle_bucket_holds_no_more_than_its_burst() {
        let mut bucket = Bucket::new(100, 5, 0).unwrap();
        bucket.fill(3600 * S, false);
        bucket.take(5);
        assert!(!bucket.allows(1));
    }

    #[test]
    fn a_request_larger_than_the_burst_goes_and_is_paid_for() {
        let mut bucket = Bucket::new(1000, 100, 0).unwrap();
        assert!(bucket.allows(5000), "the bucket is full");
        bucket.take(5000);
        assert_eq!(bucket.wait_ns(1), 4901 * MS, "4900 of debt, and one");
        assert_eq!(bucket.wait_ns(5000), 5 * S, "full again");
    }

    #[test]
    fn tokens_of_a_late_timer_are_kept_while_something_waits() {
        let mut bucket = Bucket::new(1000, 1, 0).unwrap();
        bucket.take(1);
        bucket.fill(20 * MS, true);
        bucket.take(20);
        assert!(!bucket.allows(1));
        bucket.fill(10 * S, true);
        bucket.take(101);
        assert!(!bucket.allows(1), "but not for ever: the burst and a tenth of a second's");
    }

    #[test]
    fn an_unset_burst_is_a_tenth_of_a_second_and_at_least_one() {
        let mut bucket = Bucket::new(1000, 0, 0).unwrap();
        bucket.take(100);
        assert!(!bucket.allows(1));
        assert!(Bucket::new(1, 0, 0).unwrap().allows(1));
    }

    #[test]
    fn the_largest_rate_does_not_overflow() {
        let mut bucket = Bucket::new(u64::MAX, u64::MAX, 0).unwrap();
        bucket.take(u64::MAX);
        bucket.fill(u64::MAX, true);
        assert!(bucket.allows(u64::MAX));
        let mut slow = Bucket::new(1, 1, 0).unwrap();
        slow.take(u64::MAX);
        assert_eq!(slow.wait_ns(1), u64::MAX, "a wait beyond all bounds is the longest");
    }

    #[test]
    fn time_that_goes_back_brings_nothing() {
        let mut bucket = Bucket::new(1000, 1, S).unwrap();
        bucket.take(1);
        bucket.fill(0, true);
        bucket.fill(S, true);
        assert!(!bucket.allows(1));
    }
}
