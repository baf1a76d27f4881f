//! Random requests: batches that are in flight together. In a batch, requests that overlap
//! all read, so that the result of each follows from what came before.

use upcall_block::{Op, OpSet};

use super::model::{BLOCK, Part};
use super::random::Random;

/// Bytes of memory for the data of a batch.
pub const MEMORY: usize = 8 << 20;
/// Most requests of a batch.
pub const BATCH_MAX: usize = 32;

/// A request to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    pub op: Op,
    pub offset: u64,
    pub length: u32,
    pub fua: bool,
    pub unmap: bool,
    /// Where in memory its data is; for reads and writes.
    pub at: usize,
    /// Of a write: what its data follows from. Neither 0 nor all ones.
    pub stamp: u64,
}

/// The next batch on this part of the disk: at most `max` requests.
pub fn next(part: &Part, ops: OpSet, max: usize, random: &mut Random) -> Vec<Planned> {
    let wanted = 1 + random.below(max.clamp(1, BATCH_MAX) as u64) as usize;
    let mut batch: Vec<Planned> = Vec::new();
    let mut memory = 0;
    for _ in 0..4 * wanted {
        if batch.len() == wanted {
            break;
        }
        let planned = one(part, ops, memory, random);
        let data = if planned.op.has_data() { planned.length as usize } else { 0 };
        if memory + data <= MEMORY && !batch.iter().any(|other| clash(other, &planned)) {
            memory += data;
            batch.push(planned);
        }
    }
    batch
}

fn one(part: &Part, ops: OpSet, at: usize, random: &mut Random) -> Planned {
    let op = loop {
        let op = match random.below(100) {
            0..43 => Op::Read,
            43..86 => Op::Write,
            86..90 => Op::Flush,
            90..95 => Op::Discard,
            _ => Op::WriteZeroes,
        };
        if ops.contains(op) {
            break op;
        }
    };
    let (mut offset, mut length) = (0, 0);
    if op != Op::Flush {
        let most = if op.has_data() { 4 << 20 } else { 8 << 20 };
        length = blocks(random).min(most / BLOCK as u64).min(part.length() / BLOCK as u64);
        let places = part.length() / BLOCK as u64 - length + 1;
        offset = part.offset() + random.below(places) * BLOCK as u64;
    }
    Planned {
        op,
        offset,
        length: (length * BLOCK as u64) as u32,
        fua: op == Op::Write && random.once_in(8),
        unmap: op == Op::WriteZeroes && random.once_in(2),
        at,
        stamp: 1 + random.next() % (u64::MAX - 2),
    }
}

/// A length: mostly short, now and then very long, often of whole pages.
fn blocks(random: &mut Random) -> u64 {
    match random.below(1000) {
        0..400 => 1 + random.below(8),
        400..700 => 8 * (1 + random.below(8)),
        700..900 => 1 + random.below(128),
        900..997 => 1 + random.below(512),
        _ => 8192 + random.below(8193),
    }
}

fn clash(one: &Planned, other: &Planned) -> bool {
    let end = |planned: &Planned| planned.offset + u64::from(planned.length);
    (one.op.is_modification() || other.op.is_modification())
        && one.offset < end(other)
        && other.offset < end(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_follow_from_the_seed_and_lie_in_their_part_and_memory() {
        let part = Part::new(16 << 20, 16 << 20);
        let batches = || {
            let mut random = Random::new(7, 1);
            (0..200).map(|_| next(&part, OpSet::ALL, 32, &mut random)).collect::<Vec<_>>()
        };
        let all = batches();
        assert_eq!(all, batches());
        let mut seen = OpSet::NONE;
        for batch in &all {
            assert!((1..=BATCH_MAX).contains(&batch.len()));
            for (index, planned) in batch.iter().enumerate() {
                seen = seen.with(planned.op);
                let end = planned.offset + u64::from(planned.length);
                assert!(planned.op == Op::Flush || planned.offset >= 16 << 20);
                assert!(end <= 32 << 20);
                assert!(!planned.op.has_data() || planned.at + planned.length as usize <= MEMORY);
                assert!(!batch[..index].iter().any(|other| clash(other, planned)));
            }
        }
        assert_eq!(seen, OpSet::ALL);
    }

    #[test]
    fn what_the_disk_does_not_offer_is_not_asked() {
        let part = Part::new(0, 1 << 20);
        let ops = OpSet::NONE.with(Op::Read).with(Op::Write);
        let mut random = Random::new(1, 1);
        for _ in 0..100 {
            assert!(next(&part, ops, 8, &mut random).iter().all(|planned| planned.op.has_data()));
        }
    }
}
