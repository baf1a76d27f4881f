//! Whom a fault hits, and how. Pure: the same seed, number, operation and offset decide the same,
//! so that a run whose requests come in the same order has the same faults again.

use upcall_sdk::{Op, OpSet};

/// Which requests may be hit.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Of these operations.
    pub ops: OpSet,
    /// That touch a byte from here ...
    pub start: u64,
    /// ... to before here. A flush touches all.
    pub end: u64,
    /// How many of them: 0 none, 1 all.
    pub probability: f64,
    /// Which of them.
    pub seed: u64,
}

/// One request, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// Its number: how many the instance was given before it.
    pub number: u64,
    /// What it does.
    pub op: Op,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Target {
    /// Whether the fault hits it.
    pub fn hits(&self, subject: Subject) -> bool {
        self.ops.contains(subject.op) && self.touches(subject) && self.draw(subject)
    }

    /// How many bytes of a torn write arrive: whole blocks, at least one and not all. None for
    /// a write of one block, which cannot be torn.
    pub fn torn_length(&self, subject: Subject, block_size: u32) -> Option<u32> {
        let blocks = subject.length / block_size.max(1);
        if blocks < 2 {
            return None;
        }
        let random = self.random(subject, 1);
        let arriving = 1 + (random % u64::from(blocks - 1)) as u32;
        Some(arriving * block_size)
    }

    fn touches(&self, subject: Subject) -> bool {
        let end = subject.offset.saturating_add(subject.length.into());
        subject.op == Op::Flush || (subject.offset < self.end && self.start < end)
    }

    fn draw(&self, subject: Subject) -> bool {
        // 53 bits: as many as a fraction has, so that 0 is never and 1 is always.
        let fraction = (self.random(subject, 0) >> 11) as f64 / (1_u64 << 53) as f64;
        fraction < self.probability
    }

    fn random(&self, subject: Subject, purpose: u64) -> u64 {
        [subject.number, subject.op as u64, subject.offset, purpose]
            .into_iter()
            .fold(self.seed, |state, word| mix(state ^ word))
    }
}

/// The parameter `ops`: names with commas between them.
pub fn parse_ops(text: &str) -> Result<OpSet, String> {
    let mut ops = OpSet::NONE;
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let op = Op::ALL.into_iter().find(|op| op.name() == name);
        ops = ops.with(op.ok_or_else(|| name.to_owned())?);
    }
    Ok(ops)
}

/// One step of splitmix64: every bit of the result depends on every bit of `value`.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(probability: f64) -> Target {
        Target { ops: OpSet::ALL, start: 0, end: u64::MAX, probability, seed: 1 }
    }

    fn write(number: u64, offset: u64, length: u32) -> Subject {
        Subject { number, op: Op::Write, offset, length }
    }

    fn hits(target: &Target) -> Vec<bool> {
        (0..1000).map(|n| target.hits(write(n, n * 512, 512))).collect()
    }

    #[test]
    fn the_same_seed_decides_the_same() {
        let one = hits(&target(0.3));
        assert_eq!(one, hits(&target(0.3)));
        assert_ne!(one, hits(&Target { seed: 2, ..target(0.3) }));
        let count = one.iter().filter(|hit| **hit).count();
        assert!((250..350).contains(&count), "{count} of 1000 at 0.3");
    }

    /// Computed by another program, so that a seed of last year's report still means the same.
    #[test]
    fn a_seed_means_the_same_for_ever() {
        let hit: Vec<_> = (0..40).filter(|n| target(0.1).hits(write(*n, 4096, 512))).collect();
        assert_eq!(hit, [2, 7, 10, 20, 22, 27, 28, 32, 39]);
        assert_eq!(target(1.0).torn_length(write(7, 4096, 65536), 512), Some(33280));
    }

    #[test]
    fn never_is_never_and_always_is_always() {
        assert!(!hits(&target(0.0)).contains(&true));
        assert!(!hits(&target(1.0)).contains(&false));
    }

    #[test]
    fn number_operation_and_offset_all_matter() {
        let target = target(0.5);
        let differs = |change: fn(u64) -> Subject| {
            (0..64).any(|n| target.hits(change(n)) != target.hits(write(0, 0, 512)))
        };
        assert!(differs(|n| write(n, 0, 512)));
        assert!(differs(|n| write(0, n * 512, 512)));
        let other = |n| Subject { op: Op::Read, ..write(n, 0, 512) };
        assert!((0..64).any(|n| target.hits(other(n)) != target.hits(write(n, 0, 512))));
    }

    #[test]
    fn only_what_touches_the_range_is_hit() {
        let target = Target { start: 1024, end: 2048, ..target(1.0) };
        assert!(!target.hits(write(0, 0, 1024)));
        assert!(target.hits(write(0, 0, 1536)));
        assert!(target.hits(write(0, 1536, 4096)));
        assert!(!target.hits(write(0, 2048, 512)));
        assert!(target.hits(Subject { op: Op::Flush, ..write(0, 0, 0) }));
        assert!(target.hits(write(0, u64::MAX - 511, 512)) == (target.end == u64::MAX));
    }

    #[test]
    fn a_torn_write_lacks_something_and_has_something() {
        let target = target(1.0);
        let mut lengths: Vec<_> =
            (0..1000).filter_map(|n| target.torn_length(write(n, 0, 8 * 512), 512)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        assert_eq!(lengths, [512, 1024, 1536, 2048, 2560, 3072, 3584]);
        assert_eq!(target.torn_length(write(0, 0, 512), 512), None);
    }

    #[test]
    fn ops_are_named_with_commas() {
        assert_eq!(parse_ops("read, write-zeroes"), Ok(OpSet::of(&[Op::Read, Op::WriteZeroes])));
        assert_eq!(parse_ops(""), Ok(OpSet::NONE));
        assert_eq!(parse_ops("read,trim"), Err("trim".to_owned()));
    }
}
