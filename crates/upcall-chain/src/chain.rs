//! The make-up of a disk's chain: who stands where, who is asked for what, what the guest
//! is offered.
//!
//! A [`Chain`] never changes. Another make-up is another chain with another
//! [`Generation`], and a flight ends on the chain on which it began.
//!
//! Always true: slots are in the order of their classes and, inside a class, of their
//! numbers; every slot's declaration passed [`SlotSpec::check`].

use std::fmt;

use upcall_block::{DiskInfo, Op};

use crate::slot::SLOTS_MAX;
use crate::{DataAccess, SlotIndex, SlotSet, SlotSpec, SpecError};

/// The number of a chain's make-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Where a request enters a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Above all slots: it comes from the guest, or from a filter of another disk to which
    /// this one was granted.
    Top,
    /// Below the slot of the filter that issued it, which never sees it (rule 5).
    Below(SlotIndex),
}

impl Entry {
    /// The slots below it.
    pub const fn slots_below(self) -> SlotSet {
        match self {
            Entry::Top => SlotSet::ALL,
            Entry::Below(slot) => SlotSet::below(slot),
        }
    }
}

/// How an operation gets through a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// As it is: one flight.
    Native,
    /// Write-zeroes only: as writes of zeroes, each of which is a flight from the same
    /// entry; see [`Chunks`](crate::Chunks) and [`Join`](crate::Join). The wish to give
    /// back space is lost.
    AsWrites,
    /// Not at all: it is not offered, and fails with EOPNOTSUPP if it comes nevertheless.
    Withheld,
}

/// Why there is no chain of these filters. The operator must leave some out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// More filters than [`SLOTS_MAX`].
    TooManySlots {
        /// How many.
        count: usize,
    },
    /// The declaration of one is refused.
    Spec {
        /// Its place in the list that was given.
        source_index: usize,
        /// Why.
        error: SpecError,
    },
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChainError::TooManySlots { count } => {
                write!(f, "{count} filters on one disk: at most {SLOTS_MAX} are possible")
            }
            ChainError::Spec { source_index, error } => {
                write!(f, "filter number {}: {error}", source_index + 1)
            }
        }
    }
}

impl std::error::Error for ChainError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ChainError::TooManySlots { .. } => None,
            ChainError::Spec { error, .. } => Some(error),
        }
    }
}

/// The ordered filters of one disk. Shared by the disk's queue threads; never changes.
#[derive(Clone, Debug)]
pub struct Chain {
    generation: Generation,
    slots: Vec<Slot>,
    store: DiskInfo,
    info: DiskInfo,
    per_op: [PerOp; Op::ALL.len()],
}

#[derive(Clone, Debug)]
struct Slot {
    spec: SlotSpec,
    source_index: usize,
}

/// What is asked of the specs for every request, worked out once.
#[derive(Clone, Copy, Debug, Default)]
struct PerOp {
    /// They handle the operation.
    asked: SlotSet,
    /// They decide data and do not handle it.
    blind: SlotSet,
    /// They get its data, on either way.
    with_data: SlotSet,
}

impl Chain {
    /// The chain of `specs`, one for each filter in any order, above a store. Filters of
    /// the same class and number stay in the order given.
    pub fn new(
        generation: Generation,
        specs: Vec<SlotSpec>,
        store: &DiskInfo,
    ) -> Result<Chain, ChainError> {
        if specs.len() > SLOTS_MAX {
            return Err(ChainError::TooManySlots { count: specs.len() });
        }
        for (source_index, spec) in specs.iter().enumerate() {
            spec.check().map_err(|error| ChainError::Spec { source_index, error })?;
        }
        let mut slots: Vec<Slot> = specs
            .into_iter()
            .enumerate()
            .map(|(source_index, spec)| Slot { spec, source_index })
            .collect();
        slots.sort_by_key(|slot| (slot.spec.class, slot.spec.order));

        let per_op = Op::ALL.map(|op| PerOp::new(op, &slots));
        let mut chain =
            Chain { generation, slots, store: store.clone(), info: store.clone(), per_op };
        let offered = |op: &Op| chain.route(*op, Entry::Top) != Route::Withheld;
        chain.info.ops = Op::ALL.into_iter().filter(offered).collect();
        Ok(chain)
    }

    /// Whether this chain asks the same filters, as they declared themselves, for the same in the
    /// same order: a request may then go on with either.
    pub fn has_shape_of(&self, other: &Chain) -> bool {
        let specs =
            |chain: &Chain| chain.slots.iter().map(|slot| slot.spec.clone()).collect::<Vec<_>>();
        specs(self) == specs(other) && self.store.ops == other.store.ops
    }

    /// Which make-up this is.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether requests go straight to the store.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Its slots, from the guest to the store.
    pub fn slots(&self) -> impl Iterator<Item = (SlotIndex, &SlotSpec)> {
        self.slots.iter().enumerate().filter_map(|(i, slot)| Some((SlotIndex::new(i)?, &slot.spec)))
    }

    /// What the filter of a slot declared. Panics if the chain has no such slot.
    pub fn spec(&self, slot: SlotIndex) -> &SlotSpec {
        &self.slots[slot.index()].spec
    }

    /// The place that the filter of a slot had in the list given to [`new`](Self::new).
    /// Panics if the chain has no such slot.
    pub fn source_index(&self, slot: SlotIndex) -> usize {
        self.slots[slot.index()].source_index
    }

    /// What the guest is offered: the store, without the operations that the chain
    /// withholds (rule 10).
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// How an operation that enters at `entry` gets to the store without being slipped
    /// past a filter below that decides data. What the store cannot do is withheld.
    pub fn route(&self, op: Op, entry: Entry) -> Route {
        let blind = self.per_op(op).blind.intersection(entry.slots_below());
        match op {
            _ if !self.store.ops.contains(op) => Route::Withheld,
            _ if blind.is_empty() => Route::Native,
            // Each blind filter handles writes: its declaration was checked.
            Op::WriteZeroes if self.store.ops.contains(Op::Write) => Route::AsWrites,
            _ => Route::Withheld,
        }
    }

    /// The slots that are asked for an operation that enters at `entry`. Where there are
    /// none, a request costs no up-call.
    pub fn plan(&self, op: Op, entry: Entry) -> SlotSet {
        self.per_op(op).asked.intersection(entry.slots_below())
    }

    /// Whether any slot that an operation passes from `entry` on gets its data, so that the
    /// data must lie in the arena. Otherwise it goes straight between issuer and store.
    pub fn needs_arena(&self, op: Op, entry: Entry) -> bool {
        !self.per_op(op).with_data.intersection(entry.slots_below()).is_empty()
    }

    /// [`SlotSpec::data_on_way_down`] of a slot (rule 3).
    pub fn data_on_way_down(&self, op: Op, slot: SlotIndex) -> DataAccess {
        self.spec(slot).data_on_way_down(op)
    }

    /// [`SlotSpec::data_on_way_up`] of a slot (rule 3).
    pub fn data_on_way_up(&self, op: Op, slot: SlotIndex) -> DataAccess {
        self.spec(slot).data_on_way_up(op)
    }

    fn per_op(&self, op: Op) -> &PerOp {
        &self.per_op[op as usize - 1]
    }
}

impl PerOp {
    fn new(op: Op, slots: &[Slot]) -> PerOp {
        let mut per_op = PerOp::default();
        for (slot, Slot { spec, .. }) in (0..).map_while(SlotIndex::new).zip(slots) {
            if spec.ops.contains(op) {
                per_op.asked.insert(slot);
            } else if spec.decides_data() && op != Op::Flush {
                per_op.blind.insert(slot);
            }
            if spec.data_on_way_down(op).max(spec.data_on_way_up(op)) != DataAccess::None {
                per_op.with_data.insert(slot);
            }
        }
        per_op
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::OpSet;

    use super::*;
    use crate::Class;
    use crate::examples::*;

    #[test]
    fn slots_are_in_the_order_of_class_then_number_then_as_given() {
        let spec = |class, order| SlotSpec { class, order, ..observer(OpSet::ALL) };
        let chain = chain([
            spec(Class::Qos, -5),
            spec(Class::Inspection, 7),
            spec(Class::Cache, 1),
            spec(Class::Inspection, -7),
            spec(Class::Cache, 1),
        ]);
        let order: Vec<_> = chain.slots().map(|(slot, _)| chain.source_index(slot)).collect();
        assert_eq!(order, [3, 1, 2, 4, 0]);
        assert_eq!(chain.spec(slot(4)).class, Class::Qos);
    }

    #[test]
    fn a_chain_without_filters_offers_the_store_as_it_is() {
        let chain = chain([]);
        assert_eq!(chain.info(), &disk());
        assert!(chain.is_empty());
        for op in Op::ALL {
            assert_eq!(chain.route(op, Entry::Top), Route::Native);
            assert!(chain.plan(op, Entry::Top).is_empty());
        }
    }

    #[test]
    fn an_operation_nobody_asked_for_has_an_empty_plan() {
        let chain = chain([observer(ops([Op::Write])), observer(ops([Op::Read, Op::Write]))]);
        assert_eq!(
            chain.plan(Op::Write, Entry::Top).iter().collect::<Vec<_>>(),
            [slot(0), slot(1)]
        );
        assert_eq!(chain.plan(Op::Read, Entry::Top).iter().collect::<Vec<_>>(), [slot(1)]);
        assert!(chain.plan(Op::Flush, Entry::Top).is_empty());
    }

    #[test]
    fn write_zeroes_becomes_writes_for_a_changer_without_it() {
        let chain = chain([observer(OpSet::ALL), changer()]);
        assert_eq!(chain.route(Op::WriteZeroes, Entry::Top), Route::AsWrites);
        assert!(chain.info().ops.contains(Op::WriteZeroes), "the guest need not know");
    }

    #[test]
    fn write_zeroes_stays_itself_for_a_changer_that_handles_it() {
        let mut spec = changer();
        spec.ops = spec.ops.with(Op::WriteZeroes);
        assert_eq!(chain([spec]).route(Op::WriteZeroes, Entry::Top), Route::Native);
    }

    #[test]
    fn discard_is_withheld_by_a_changer_without_it() {
        let chain = chain([changer()]);
        assert_eq!(chain.route(Op::Discard, Entry::Top), Route::Withheld);
        assert_eq!(chain.info().ops, OpSet::ALL.without(Op::Discard));
        assert_eq!(DiskInfo { ops: OpSet::ALL, ..chain.info().clone() }, disk(), "and no more");
    }

    #[test]
    fn who_answers_decides_data_as_who_changes_it_does() {
        let spec = SlotSpec { answers: ops([Op::Read]), ..observer(ops([Op::Read, Op::Write])) };
        let chain = chain([spec]);
        assert_eq!(chain.route(Op::Discard, Entry::Top), Route::Withheld);
        assert_eq!(chain.route(Op::WriteZeroes, Entry::Top), Route::AsWrites);
    }

    #[test]
    fn flush_passes_a_changer_by() {
        assert_eq!(chain([changer()]).route(Op::Flush, Entry::Top), Route::Native);
    }

    #[test]
    fn an_observer_withholds_nothing() {
        let sees = SlotSpec { sees: ops([Op::Write]), ..observer(ops([Op::Write])) };
        assert_eq!(chain([sees]).info(), &disk());
    }

    #[test]
    fn what_the_store_cannot_do_is_not_offered() {
        let store = DiskInfo { ops: ops([Op::Read, Op::Write, Op::Flush]), ..disk() };
        let chain = Chain::new(Generation(1), vec![changer()], &store).unwrap();
        assert_eq!(chain.info(), &store);
        assert_eq!(chain.route(Op::WriteZeroes, Entry::Top), Route::Withheld);
        let store = DiskInfo { ops: ops([Op::Read, Op::WriteZeroes]), ..disk() };
        let chain = Chain::new(Generation(1), vec![changer()], &store).unwrap();
        assert_eq!(chain.info().ops, ops([Op::Read]), "zeroes could not be written");
    }

    #[test]
    fn below_an_issuer_only_those_below_count() {
        let chain = chain([observer(OpSet::ALL), changer(), answerer()]);
        assert_eq!(chain.route(Op::Discard, Entry::Below(slot(0))), Route::Withheld);
        assert_eq!(chain.route(Op::Discard, Entry::Below(slot(1))), Route::Native);
        assert_eq!(chain.route(Op::WriteZeroes, Entry::Below(slot(0))), Route::AsWrites);
        assert_eq!(chain.route(Op::WriteZeroes, Entry::Below(slot(1))), Route::Native);
        let plan = chain.plan(Op::Read, Entry::Below(slot(1)));
        assert_eq!(plan.iter().collect::<Vec<_>>(), [slot(2)], "never the issuer itself");
        assert!(chain.plan(Op::Read, Entry::Below(slot(2))).is_empty());
    }

    #[test]
    fn the_arena_is_needed_where_somebody_below_gets_the_data() {
        let sees_writes = SlotSpec { sees: ops([Op::Write]), ..observer(OpSet::ALL) };
        let chain = chain([observer(OpSet::ALL), sees_writes]);
        assert!(chain.needs_arena(Op::Write, Entry::Top));
        assert!(chain.needs_arena(Op::Write, Entry::Below(slot(0))));
        assert!(!chain.needs_arena(Op::Write, Entry::Below(slot(1))));
        assert!(!chain.needs_arena(Op::Read, Entry::Top));
        assert_eq!(chain.data_on_way_down(Op::Write, slot(1)), DataAccess::Observe);
        assert_eq!(chain.data_on_way_up(Op::Write, slot(1)), DataAccess::None);
    }

    #[test]
    fn a_refused_filter_is_named_by_its_place_in_the_list() {
        let bad = SlotSpec { sees: OpSet::ALL, ..observer(OpSet::ALL) };
        let list = vec![changer(), bad];
        let error = Chain::new(Generation(1), list, &disk()).unwrap_err();
        assert!(matches!(error, ChainError::Spec { source_index: 1, .. }), "{error:?}");
        assert!(error.to_string().starts_with("filter number 2: `sees` names"), "{error}");
    }

    #[test]
    fn a_chain_has_64_slots_at_most() {
        let specs = |count| vec![observer(OpSet::ALL); count];
        let chain = Chain::new(Generation(1), specs(64), &disk()).unwrap();
        assert_eq!(chain.plan(Op::Read, Entry::Top), SlotSet::ALL);
        let error = Chain::new(Generation(1), specs(65), &disk()).unwrap_err();
        assert_eq!(error, ChainError::TooManySlots { count: 65 });
    }
}
