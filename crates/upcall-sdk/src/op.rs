//! Operations and sets of them.

/// What a request wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Data from the disk.
    Read = 1,
    /// Data to the disk.
    Write = 2,
    /// Everything that completed before is durable when it completes.
    Flush = 3,
    /// The range reads as zeroes afterwards; its space may be given back.
    Discard = 4,
    /// The range reads as zeroes afterwards.
    WriteZeroes = 5,
}

impl Op {
    /// All operations, in the order of their numbers.
    pub const ALL: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];

    /// The operation of a number of the C header.
    pub const fn from_number(number: u8) -> Option<Op> {
        match number {
            1 => Some(Op::Read),
            2 => Some(Op::Write),
            3 => Some(Op::Flush),
            4 => Some(Op::Discard),
            5 => Some(Op::WriteZeroes),
            _ => None,
        }
    }

    /// Whether it carries data: read and write.
    pub const fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }

    /// Whether it changes what is on the disk.
    pub const fn is_modification(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }

    /// The name in messages and parameters.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write-zeroes",
        }
    }
}

/// A set of operations, as a mask of the C header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpSet(u32);

impl OpSet {
    /// No operation.
    pub const NONE: OpSet = OpSet(0);
    /// Every operation.
    pub const ALL: OpSet = OpSet::of(&Op::ALL);
    /// Read and write: those that carry data.
    pub const DATA: OpSet = OpSet::of(&[Op::Read, Op::Write]);

    /// The set of these operations.
    pub const fn of(ops: &[Op]) -> OpSet {
        let mut mask = 0;
        let mut index = 0;
        while index < ops.len() {
            mask |= 1 << ops[index] as u32;
            index += 1;
        }
        OpSet(mask)
    }

    /// The set and `op`.
    #[must_use]
    pub const fn with(self, op: Op) -> OpSet {
        OpSet(self.0 | 1 << op as u32)
    }

    /// Whether `op` is in it.
    pub const fn contains(self, op: Op) -> bool {
        self.0 & (1 << op as u32) != 0
    }

    /// Whether all of `other` is in it.
    pub const fn contains_all(self, other: OpSet) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in either.
    #[must_use]
    pub const fn union(self, other: OpSet) -> OpSet {
        OpSet(self.0 | other.0)
    }

    /// The mask of the C header.
    pub const fn mask(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_masks_agree() {
        for op in Op::ALL {
            assert_eq!(Op::from_number(op as u8), Some(op));
            assert_eq!(OpSet::of(&[op]).mask(), 1 << op as u32);
            assert!(OpSet::ALL.contains(op));
        }
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(6), None);
        assert_eq!(OpSet::ALL.mask(), 0b11_1110);
        assert!(!OpSet::DATA.contains_all(OpSet::ALL));
    }
}
