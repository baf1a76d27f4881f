//! How often which time was seen: buckets that grow with the value, as HdrHistogram's.
//!
//! Always true: a value read back differs from the one recorded by less than 1/64; counting
//! takes no allocation, so that it can stand inside what is measured.

/// Buckets of one power of two: the error of a value is below one in this many.
const STEPS: usize = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Values up to 2^40 ns, about 18 minutes; what is longer counts as that.
const POWERS: usize = 40;

/// Times in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; POWERS * STEPS].into(), total: 0, max: 0 }
    }
}

impl Histogram {
    /// Counts one time.
    #[inline]
    pub fn record(&mut self, ns: u64) {
        self.counts[index(ns)] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// Times counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest, exactly.
    pub fn max_ns(&self) -> u64 {
        self.max
    }

    /// The time that a share `quantile` (0 to 1) of those counted does not exceed; 0 if
    /// there are none.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        let wanted = (quantile * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return middle(index).min(self.max);
            }
        }
        self.max
    }

    /// Adds what another has counted.
    pub fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.total, self.max) = (0, 0);
    }
}

/// Below 2 * STEPS each value has a bucket of its own; above, each power of two has STEPS.
fn index(ns: u64) -> usize {
    let power = (63 - (ns | 1).leading_zeros()).saturating_sub(STEP_BITS);
    let at = power as usize * STEPS + (ns >> power) as usize;
    at.min(POWERS * STEPS - 1)
}

fn middle(index: usize) -> u64 {
    if index < 2 * STEPS {
        return index as u64;
    }
    let power = index / STEPS - 1;
    let low = ((index - power * STEPS) as u64) << power;
    low + (1 << power) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_back_within_one_in_64() {
        let mut value = 1u64;
        while value < 1 << 38 {
            for near in [value - 1, value, value + value / 3] {
                let mut histogram = Histogram::default();
                histogram.record(near);
                histogram.record(u64::MAX >> 10);
                let read = histogram.quantile_ns(0.5);
                assert!(read.abs_diff(near) * 64 <= near, "{near} is read as {read}");
            }
            value *= 2;
        }
    }

    #[test]
    fn quantiles_count_from_the_shortest() {
        let mut histogram = Histogram::default();
        (1..=100).for_each(|ns| histogram.record(ns));
        assert_eq!(histogram.quantile_ns(0.5), 50);
        assert_eq!(histogram.quantile_ns(0.99), 99);
        assert_eq!(histogram.quantile_ns(1.0), 100);
        assert_eq!((histogram.total(), histogram.max_ns()), (100, 100));
        let mut both = Histogram::default();
        both.record(1_000_000);
        both.add(&histogram);
        assert_eq!((both.total(), both.max_ns(), both.quantile_ns(0.5)), (101, 1_000_000, 51));
    }

    #[test]
    fn the_empty_one_gives_nothing_and_no_value_is_too_large() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_ns(0.99), 0);
        histogram.record(u64::MAX);
        assert_eq!(histogram.max_ns(), u64::MAX);
    }
}
