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

    /// Takes `slot` out.
    pub fn remove(&mut self, slot: SlotIndex) {
        self.0 &= !(1 << slot.0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::*;

    #[test]
    fn a_filter_gets_and_answers_only_what_it_is_asked() {
        let reads = ops([Op::Read]);
        let good = observer(reads);
        assert_eq!(good.check(), Ok(()));
        let more = ops([Op::Read, Op::Write]);
        let writes = ops([Op::Write]);
        let refused = |mask| Err(SpecError::NotHandled { mask, ops: writes });
        assert_eq!(SlotSpec { sees: more, ..good.clone() }.check(), refused("sees"));
        assert_eq!(SlotSpec { changes: more, ..good.clone() }.check(), refused("changes"));
        assert_eq!(SlotSpec { answers: more, ..good }.check(), refused("answers"));
    }

    #[test]
    fn only_reads_and_writes_have_data_to_see_or_change() {
        let all = observer(OpSet::ALL);
        let discards = ops([Op::Read, Op::Discard]);
        let refused = |mask| Err(SpecError::WithoutData { mask, ops: ops([Op::Discard]) });
        assert_eq!(SlotSpec { sees: discards, ..all.clone() }.check(), refused("sees"));
        assert_eq!(SlotSpec { changes: discards, ..all }.check(), refused("changes"));
    }

    #[test]
    fn who_answers_what_changes_the_disk_handles_flush() {
        for op in [Op::Write, Op::Discard, Op::WriteZeroes] {
            let answered = ops([op]);
            let spec = SlotSpec { answers: answered, ..observer(OpSet::ALL.without(Op::Flush)) };
            assert_eq!(spec.check(), Err(SpecError::AnswersWithoutFlush { ops: answered }));
            assert_eq!(SlotSpec { answers: answered, ..observer(OpSet::ALL) }.check(), Ok(()));
        }
        let reads = SlotSpec { answers: ops([Op::Read]), ..observer(ops([Op::Read, Op::Write])) };
        assert_eq!(reads.check(), Ok(()), "who answers reads alone owes no durability");
    }

    #[test]
    fn who_decides_data_handles_reads_and_writes() {
        for op in [Op::Read, Op::Write] {
            let one = ops([op]);
            let blind_to = if op == Op::Read { Op::Write } else { Op::Read };
            let refused = Err(SpecError::BlindTo { op: blind_to });
            assert_eq!(SlotSpec { changes: one, ..observer(one) }.check(), refused);
            let answers = SlotSpec { answers: one, ..observer(one.with(Op::Flush)) };
            assert_eq!(answers.check(), refused);
            assert_eq!(SlotSpec { sees: one, ..observer(one) }.check(), Ok(()));
        }
        assert_eq!(changer().check(), Ok(()));
    }

    #[test]
    fn what_is_refused_says_what_to_do() {
        let blind = SpecError::BlindTo { op: Op::Read }.to_string();
        assert!(blind.contains("add read to `ops`"), "{blind}");
        let flush = SpecError::AnswersWithoutFlush { ops: ops([Op::Write]) }.to_string();
        assert!(flush.contains("answers write") && flush.contains("add flush to `ops`"), "{flush}");
        let missing = SpecError::NotHandled { mask: "sees", ops: ops([Op::Write]) }.to_string();
        assert!(missing.contains("`sees` names write") && missing.contains("add"), "{missing}");
        let dataless = SpecError::WithoutData { mask: "sees", ops: ops([Op::Flush]) }.to_string();
        assert!(dataless.contains("flush") && dataless.contains("only read and write"));
    }

    #[test]
    fn data_is_there_for_writes_on_the_way_down_and_for_reads_on_the_way_up() {
        use DataAccess::{Change, None, Observe};
        let table = |spec: &SlotSpec| {
            Op::ALL.map(|op| (spec.data_on_way_down(op), spec.data_on_way_up(op)))
        };
        let nothing = (None, None);
        let seer = SlotSpec { sees: ops([Op::Read, Op::Write]), ..observer(OpSet::ALL) };
        assert_eq!(table(&seer), [(None, Observe), (Observe, None), nothing, nothing, nothing]);
        assert_eq!(table(&changer()), [(None, Change), (Change, None), nothing, nothing, nothing]);
        assert_eq!(table(&observer(OpSet::ALL)), [nothing; 5]);
        assert_eq!(
            table(&answerer()),
            [(Change, Change), nothing, nothing, nothing, nothing],
            "who answers reads fills them in; who answers writes has not asked for their data"
        );
    }

    #[test]
    fn pages_are_mapped_for_the_most_that_any_request_allows() {
        let sees_reads = SlotSpec { sees: ops([Op::Read]), ..observer(OpSet::ALL) };
        assert_eq!(observer(OpSet::ALL).arena_access(), DataAccess::None);
        assert_eq!(sees_reads.arena_access(), DataAccess::Observe);
        assert_eq!(
            SlotSpec { changes: ops([Op::Write]), ..sees_reads }.arena_access(),
            DataAccess::Change
        );
        assert_eq!(answerer().arena_access(), DataAccess::Change);
    }

    #[test]
    fn a_set_of_slots_gives_them_back_from_either_end() {
        let mut set = SlotSet::EMPTY;
        for index in [63, 0, 7] {
            set.insert(slot(index));
        }
        assert_eq!((set.count(), set.contains(slot(7)), set.contains(slot(8))), (3, true, false));
        assert_eq!(set.iter().map(SlotIndex::index).collect::<Vec<_>>(), [0, 7, 63]);
        assert_eq!(set.pop_last(), Some(slot(63)));
        assert_eq!(set.pop_first(), Some(slot(0)));
        assert_eq!((set.pop_first(), set.pop_first(), set.pop_last()), (Some(slot(7)), None, None));
        assert_eq!(SlotSet::below(slot(62)).iter().collect::<Vec<_>>(), [slot(63)]);
        assert!(SlotSet::below(slot(63)).is_empty());
        assert_eq!(SlotIndex::new(64), None);
    }
}
