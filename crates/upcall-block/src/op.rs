//! Operations and sets of them.

use std::fmt;

/// What a request wants done. The numbers are those of `upcall/filter.h`.
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

    /// The operation of a number of `upcall/filter.h`.
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

    /// The name in messages, flags and files.
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

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of operations; bit `1 << number`, as in `upcall/filter.h`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct OpSet(u32);

impl OpSet {
    /// No operation.
    pub const NONE: OpSet = OpSet(0);
    /// Every operation.
    pub const ALL: OpSet = OpSet(0b11_1110);

    /// The set of a mask; bits that name no operation make it `None`.
    pub const fn from_mask(mask: u32) -> Option<OpSet> {
        if mask & !Self::ALL.0 == 0 { Some(OpSet(mask)) } else { None }
    }

    /// The mask, as in `upcall/filter.h`.
    pub const fn mask(self) -> u32 {
        self.0
    }

    /// Whether `op` is in it.
    pub const fn contains(self, op: Op) -> bool {
        self.0 & (1 << op as u32) != 0
    }

    /// The set and `op`.
    #[must_use]
    pub const fn with(self, op: Op) -> OpSet {
        OpSet(self.0 | 1 << op as u32)
    }

    /// The set without `op`.
    #[must_use]
    pub const fn without(self, op: Op) -> OpSet {
        OpSet(self.0 & !(1 << op as u32))
    }

    /// What is in either.
    #[must_use]
    pub const fn union(self, other: OpSet) -> OpSet {
        OpSet(self.0 | other.0)
    }

    /// What is in both.
    #[must_use]
    pub const fn intersection(self, other: OpSet) -> OpSet {
        OpSet(self.0 & other.0)
    }

    /// Whether all of `other` is in it.
    pub const fn contains_all(self, other: OpSet) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether it is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its operations.
    pub fn iter(self) -> impl Iterator<Item = Op> {
        Op::ALL.into_iter().filter(move |op| self.contains(*op))
    }
}

impl FromIterator<Op> for OpSet {
    fn from_iter<I: IntoIterator<Item = Op>>(ops: I) -> OpSet {
        ops.into_iter().fold(OpSet::NONE, OpSet::with)
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(Op::name).collect();
        if names.is_empty() { f.write_str("none") } else { f.write_str(&names.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_masks_agree() {
        for op in Op::ALL {
            assert_eq!(Op::from_number(op as u8), Some(op));
            assert!(OpSet::ALL.contains(op));
            assert_eq!(OpSet::NONE.with(op).mask(), 1 << op as u32);
            assert!(!OpSet::ALL.without(op).contains(op));
        }
        assert_eq!(Op::from_number(0), None);
        assert_eq!(OpSet::from_mask(1), None, "bit 0 names no operation");
        assert_eq!(OpSet::from_mask(1 << 6), None);
    }
}
