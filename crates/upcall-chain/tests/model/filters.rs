//! What random filters and stores declare.

use upcall_block::{DiskInfo, Op, OpSet};
use upcall_chain::{Class, SlotSpec};

use crate::random::Random;

/// A random declaration; mostly sound, not always.
pub fn random_spec(random: &mut Random) -> SlotSpec {
    let subset = |random: &mut Random, of: OpSet, chance| {
        of.iter().filter(|_| random.percent(chance)).collect::<OpSet>()
    };
    let data = OpSet::NONE.with(Op::Read).with(Op::Write);
    let mut ops = subset(random, OpSet::ALL, 75);
    let decides = random.percent(50);
    if decides && !random.percent(2) {
        ops = ops.union(data);
    }
    let mut answers = if decides { subset(random, ops, 40) } else { OpSet::NONE };
    if !ops.contains(Op::Flush) && !random.percent(2) {
        answers = answers.intersection(OpSet::NONE.with(Op::Read));
    }
    let touched = if random.percent(2) { OpSet::ALL } else { ops.intersection(data) };
    SlotSpec {
        class: random.pick(&Class::ALL),
        order: random.pick(&[i32::MIN, -1, 0, 0, 1, i32::MAX]),
        sees: subset(random, touched, 40),
        changes: if decides { subset(random, touched, 40) } else { OpSet::NONE },
        answers,
        ops,
    }
}

/// A store that can do everything, or everything but one.
pub fn random_store(random: &mut Random) -> DiskInfo {
    let less = OpSet::ALL.without(random.pick(&Op::ALL));
    DiskInfo {
        capacity: 1 << 30,
        block_size: 512,
        physical_block_size: 4096,
        read_only: random.percent(10),
        ops: if random.percent(20) { less } else { OpSet::ALL },
        discard_granularity: 4096,
    }
}
