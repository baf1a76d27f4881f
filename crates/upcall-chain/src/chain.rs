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
