//! Latencies in 256 buckets: exact to a quarter of a power of two.

/// Number of buckets.
pub const BUCKETS: usize = 256;

/// The bucket of a latency: 0 to 3 ns have one each; above, each power of two has four. With
/// 64-bit nanoseconds the last used bucket is 251.
pub fn bucket_of(latency_ns: u64) -> usize {
    if latency_ns < 4 {
        return latency_ns as usize;
    }
    let power = latency_ns.ilog2() as usize;
    4 * (power - 1) + (latency_ns >> (power - 2) & 3) as usize
}

/// The least latency that falls into a bucket, in ns.
pub fn bucket_floor_ns(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let power = bucket / 4 + 1;
    (4 + bucket as u64 % 4) << (power - 2)
}

/// Counts by latency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// One count a bucket.
    pub counts: [u64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: [0; BUCKETS] }
    }
}

impl Histogram {
    /// Adds another one.
    pub fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.wrapping_add(*theirs);
        }
    }

    /// What came since an earlier one.
    #[must_use]
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let mut since = self.clone();
        for (mine, theirs) in since.counts.iter_mut().zip(&earlier.counts) {
            *mine = mine.wrapping_sub(*theirs);
        }
        since
    }

    /// How many latencies it holds.
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// The latency in ns that `fraction` (0 to 1) of all stay below, as the floor of its
    /// bucket: up to a fifth too small. None when empty.
    pub fn quantile_ns(&self, fraction: f64) -> Option<u64> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        let rank = ((total as f64 * fraction).ceil() as u64).clamp(1, total);
        let mut seen = 0u64;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                return Some(bucket_floor_ns(bucket));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_lies_between_the_floors_of_its_bucket_and_the_next() {
        for latency in (0..5000)
            .chain((12..64).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1]))
        {
            let bucket = bucket_of(latency);
            assert!(bucket_floor_ns(bucket) <= latency, "{latency}");
            assert!(bucket == 251 || latency < bucket_floor_ns(bucket + 1), "{latency}");
        }
        assert_eq!(bucket_of(u64::MAX), 251);
    }

    #[test]
    fn quantiles_are_those_of_what_was_put_in() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_ns(0.5), None);
        for latency in [100, 200, 300, 400, 5000] {
            histogram.counts[bucket_of(latency)] += 1;
        }
        assert_eq!(histogram.total(), 5);
        assert_eq!(histogram.quantile_ns(0.5), Some(bucket_floor_ns(bucket_of(300))));
        assert_eq!(histogram.quantile_ns(0.99), Some(bucket_floor_ns(bucket_of(5000))));
        let later = histogram.clone();
        assert_eq!(later.since(&histogram).total(), 0);
    }
}
