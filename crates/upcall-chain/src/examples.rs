//! Disks, declarations and chains for the tests beside the code.

use upcall_block::{DiskInfo, Op, OpSet};

use crate::{Chain, Class, Generation, SlotIndex, SlotSpec};

pub fn ops<const N: usize>(ops: [Op; N]) -> OpSet {
    ops.into_iter().collect()
}

pub fn slot(index: usize) -> SlotIndex {
    SlotIndex::new(index).unwrap()
}

/// A disk of 8 GiB that can do everything.
pub fn disk() -> DiskInfo {
    DiskInfo {
        capacity: 8 << 30,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    }
}

/// Asked for `ops`, without their data.
pub fn observer(ops: OpSet) -> SlotSpec {
    SlotSpec {
        class: Class::Inspection,
        order: 0,
        ops,
        sees: OpSet::NONE,
        changes: OpSet::NONE,
        answers: OpSet::NONE,
    }
}

/// Changes what it reads and writes, and handles nothing else.
pub fn changer() -> SlotSpec {
    let data = ops([Op::Read, Op::Write]);
    SlotSpec { class: Class::Encryption, changes: data, ..observer(data) }
}

/// May answer anything, and gets the data of reads alone.
pub fn answerer() -> SlotSpec {
    SlotSpec { class: Class::Cache, answers: OpSet::ALL, ..observer(OpSet::ALL) }
}

pub fn chain<const N: usize>(specs: [SlotSpec; N]) -> Chain {
    Chain::new(Generation(1), specs.to_vec(), &disk()).unwrap()
}
