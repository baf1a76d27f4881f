//! One place in a chain: what its filter declared, and sets of such places.
//!
//! Always true: a [`SlotIndex`] is below [`SLOTS_MAX`], so a [`SlotSet`] is one word.

use std::fmt;

use upcall_block::{Op, OpSet};

use crate::Class;

/// Most slots of a chain.
pub const SLOTS_MAX: usize = 64;

/// A place in a chain; 0 is next to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotIndex(u8);

impl SlotIndex {
    /// The slot of an index below [`SLOTS_MAX`].
    pub const fn new(index: usize) -> Option<SlotIndex> {
        if index < SLOTS_MAX { Some(SlotIndex(index as u8)) } else { None }
    }

    /// As an index, below [`SLOTS_MAX`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for SlotIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of slots.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SlotSet(u64);

impl SlotSet {
    /// No slot.
    pub const EMPTY: SlotSet = SlotSet(0);
    /// Every slot there may be.
    pub const ALL: SlotSet = SlotSet(u64::MAX);

    /// Every slot below `slot`, nearer the store.
    pub const fn below(slot: SlotIndex) -> SlotSet {
        SlotSet(u64::MAX << slot.0 << 1)
    }

    /// Whether `slot` is in it.
    pub const fn contains(self, slot: SlotIndex) -> bool {
        self.0 & (1 << slot.0) != 0
    }

    /// Whether it is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many are in it.
    pub const fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Puts `slot` in.
    pub fn insert(&mut self, slot: SlotIndex) {
        self.0 |= 1 << slot.0;
    }

    /// What is in both.
    #[must_use]
    pub const fn intersection(self, other: SlotSet) -> SlotSet {
        SlotSet(self.0 & other.0)
    }

    /// Takes out the one nearest the guest.
    pub fn pop_first(&mut self) -> Option<SlotIndex> {
        let slot = SlotIndex::new(self.0.trailing_zeros() as usize)?;
        self.0 &= !(1 << slot.0);
        Some(slot)
    }

    /// Takes out the one nearest the store.
    pub fn pop_last(&mut self) -> Option<SlotIndex> {
        let slot = SlotIndex(self.0.checked_ilog2()? as u8);
        self.0 &= !(1 << slot.0);
        Some(slot)
    }

    /// Its slots, from the guest to the store.
    pub fn iter(mut self) -> impl Iterator<Item = SlotIndex> {
        std::iter::from_fn(move || self.pop_first())
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|slot| slot.0)).finish()
    }
}

/// What a filter may do with a request's data on one of the request's two ways. In
/// growing order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataAccess {
    /// It gets no data.
    None,
    /// It reads it.
    Observe,
    /// It reads and changes it.
    Change,
}

/// What a filter declared in its table (see `upcall/filter.h`), and the operator's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// Decides the place in the chain.
    pub class: Class,
    /// Decides the place inside the class: lower is nearer the guest.
    pub order: i32,
    /// It is asked for these.
    pub ops: OpSet,
    /// It gets the data of these.
    pub sees: OpSet,
    /// It gets the data of these and may change it.
    pub changes: OpSet,
    /// It may answer these itself.
    pub answers: OpSet,
}

/// Why a filter's declaration is refused. Its author must change the filter's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// `mask` names operations that `ops` does not. Add them to `ops`.
    NotHandled {
        /// `sees`, `changes` or `answers`.
        mask: &'static str,
        /// The operations too many.
        ops: OpSet,
    },
    /// `mask` is about data and names operations without any. Take them out of it.
    WithoutData {
        /// `sees` or `changes`.
        mask: &'static str,
        /// The operations too many.
        ops: OpSet,
    },
    /// It answers operations that change the disk, but is not asked for flushes, by which
    /// the guest asks for their durability (rule 4). Add flush to `ops`.
    AnswersWithoutFlush {
        /// What it answers.
        ops: OpSet,
    },
    /// It decides what is on the disk but is not asked for `op`, which would be slipped
    /// past it. Add it to `ops`; passing each one on is enough.
    BlindTo {
        /// Read or write.
        op: Op,
    },
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SpecError::NotHandled { mask, ops } => {
                write!(f, "`{mask}` names {ops}, which `ops` does not: add it to `ops`")
            }
            SpecError::WithoutData { mask, ops } => {
                write!(
                    f,
                    "`{mask}` names {ops}, which has no data: only read and write may be in it"
                )
            }
            SpecError::AnswersWithoutFlush { ops } => write!(
                f,
                "it answers {ops} but does not handle flush, so nobody would make that durable: \
                 add flush to `ops`"
            ),
            SpecError::BlindTo { op } => write!(
                f,
                "it changes data or answers requests but does not handle {op}, which would be \
                 slipped past it: add {op} to `ops`, and pass where there is nothing to do"
            ),
        }
    }
}

impl std::error::Error for SpecError {}

impl SlotSpec {
    /// Whether the declaration is one that a chain can be built with. The first error
    /// that is found.
    pub fn check(&self) -> Result<(), SpecError> {
        let masks = [("sees", self.sees), ("changes", self.changes), ("answers", self.answers)];
        for (mask, set) in masks {
            let ops = set.iter().filter(|op| !self.ops.contains(*op)).collect::<OpSet>();
            if !ops.is_empty() {
                return Err(SpecError::NotHandled { mask, ops });
            }
        }
        for (mask, set) in &masks[..2] {
            let ops = set.iter().filter(|op| !op.has_data()).collect::<OpSet>();
            if !ops.is_empty() {
                return Err(SpecError::WithoutData { mask, ops });
            }
        }
        let ops = self.answers.iter().filter(|op| op.is_modification()).collect::<OpSet>();
        if !ops.is_empty() && !self.ops.contains(Op::Flush) {
            return Err(SpecError::AnswersWithoutFlush { ops });
        }
        for op in [Op::Read, Op::Write] {
            if self.decides_data() && !self.ops.contains(op) {
                return Err(SpecError::BlindTo { op });
            }
        }
        Ok(())
    }

    /// Whether what the disk holds depends on it: it changes data or answers requests. No
    /// operation is slipped past it; see the crate's documentation.
    pub const fn decides_data(&self) -> bool {
        !self.changes.is_empty() || !self.answers.is_empty()
    }

    /// What it may do with the data of an `op` that goes down. Of a write as declared. Of
    /// a read nothing, as there is no data yet, unless it may answer: then it fills it in.
    pub const fn data_on_way_down(&self, op: Op) -> DataAccess {
        match op {
            Op::Write => self.declared_access(op),
            Op::Read if self.answers.contains(op) => DataAccess::Change,
            _ => DataAccess::None,
        }
    }

    /// What it may do with the data of an `op` that comes up. Of a read as declared, and
    /// everything if it may answer reads. Of a write nothing: the data is not there any
    /// more.
    pub const fn data_on_way_up(&self, op: Op) -> DataAccess {
        match op {
            Op::Read if self.answers.contains(op) => DataAccess::Change,
            Op::Read => self.declared_access(op),
            _ => DataAccess::None,
        }
    }

    /// What it may do with the disk's data pages: the most that any request allows.
    /// `Observe` means that they are mapped read-only, `None` that they are not mapped.
    pub fn arena_access(&self) -> DataAccess {
        let write = self.data_on_way_down(Op::Write);
        write.max(self.data_on_way_down(Op::Read)).max(self.data_on_way_up(Op::Read))
    }

    const fn declared_access(&self, op: Op) -> DataAccess {
        if self.changes.contains(op) {
            DataAccess::Change
        } else if self.sees.contains(op) {
            DataAccess::Observe
        } else {
            DataAccess::None
        }
    }
}
