//! What should happen, in the plainest words: a request's walk as recursion, a chain's
//! properties as searches through the list of its filters. Slow, and without any of the
//! sets, places and flags of the real thing.

use upcall_block::{DiskInfo, Errno, Op, Status};
use upcall_chain::{Route, SlotSpec, Verdict};

use crate::script::{Event, Script};

/// Something that a request's life shows outside of the flight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Seen {
    Start(usize),
    Done(usize, Status),
    Store,
    Cancel(usize),
    Complete(Status),
    /// The slot said what it may not say.
    Violation(usize),
}

/// Whether a filter may join a chain, from the rules of `upcall/filter.h` and design.
pub fn is_sound(spec: &SlotSpec) -> bool {
    let asked = |op| spec.ops.contains(op);
    let touches = |op| spec.sees.contains(op) || spec.changes.contains(op);
    let decides = !spec.changes.is_empty() || !spec.answers.is_empty();
    let answers_changes =
        [Op::Write, Op::Discard, Op::WriteZeroes].into_iter().any(|op| spec.answers.contains(op));
    Op::ALL.into_iter().all(|op| asked(op) || !(touches(op) || spec.answers.contains(op)))
        && ![Op::Flush, Op::Discard, Op::WriteZeroes].into_iter().any(touches)
        && (!answers_changes || asked(Op::Flush))
        && (!decides || (asked(Op::Read) && asked(Op::Write)))
}

/// The filters as they stand in the chain: indices into the list given.
pub fn order(specs: &[SlotSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::new();
    for (new, spec) in specs.iter().enumerate() {
        let key = |spec: &SlotSpec| (spec.class as u32, spec.order);
        let place = order.iter().position(|old| key(&specs[*old]) > key(spec));
        order.insert(place.unwrap_or(order.len()), new);
    }
    order
}

/// How `op` gets through `slots`, in the order of the chain from an entry on.
pub fn route(slots: &[SlotSpec], op: Op, store: &DiskInfo) -> Route {
    let is_slipped_past = |spec: &SlotSpec| {
        !spec.ops.contains(op) && (!spec.changes.is_empty() || !spec.answers.is_empty())
    };
    if !store.ops.contains(op) {
        Route::Withheld
    } else if op == Op::Flush || !slots.iter().any(is_slipped_past) {
        Route::Native
    } else if op == Op::WriteZeroes && store.ops.contains(Op::Write) {
        Route::AsWrites
    } else {
        Route::Withheld
    }
}

/// Whether a filter of `slots` gets the data of `op`.
pub fn needs_arena(slots: &[SlotSpec], op: Op) -> bool {
    slots.iter().any(|spec| match op {
        Op::Read => [spec.sees, spec.changes, spec.answers].iter().any(|set| set.contains(op)),
        Op::Write => spec.sees.contains(op) || spec.changes.contains(op),
        Op::Flush | Op::Discard | Op::WriteZeroes => false,
    })
}

/// What a request shows in a chain of `slots`.
pub fn walk(slots: &[SlotSpec], script: &Script) -> Vec<Seen> {
    let mut walk = Walk { slots, script, cancelled: false, seen: Vec::new() };
    let status = walk.descend(script.first);
    walk.seen.push(Seen::Complete(status));
    walk.seen
}

struct Walk<'a> {
    slots: &'a [SlotSpec],
    script: &'a Script,
    cancelled: bool,
    seen: Vec<Seen>,
}

/// What came of a stop at a slot.
enum Outcome {
    Verdict(Verdict),
    /// It must not be asked any more, or said what it may not say.
    Broken,
}

const CANCELED: Status = Err(Errno::ECANCELED);
const BROKEN: Status = Err(Errno::EIO);

impl Walk<'_> {
    /// From above slot `index` to the store and back; the status that is seen above it.
    fn descend(&mut self, index: usize) -> Status {
        let Some(spec) = self.slots.get(index) else { return self.visit_store() };
        if !spec.ops.contains(self.script.op) {
            return self.descend(index + 1);
        }
        let outcome = self.visit(index, None);
        let watches = matches!(outcome, Outcome::Verdict(Verdict::Watch));
        let status = match outcome {
            _ if self.cancelled => CANCELED,
            Outcome::Verdict(Verdict::Pass(_) | Verdict::Watch) => self.descend(index + 1),
            Outcome::Verdict(Verdict::Fail(errno)) => Err(errno),
            Outcome::Verdict(Verdict::Done) => Ok(()),
            Outcome::Verdict(_) | Outcome::Broken => BROKEN,
        };
        if watches { self.ascend(index, status) } else { status }
    }

    /// Through a slot that watches, on the way up.
    fn ascend(&mut self, index: usize, status: Status) -> Status {
        let outcome = self.visit(index, Some(status));
        match outcome {
            _ if self.cancelled => status.and(CANCELED),
            Outcome::Verdict(Verdict::Pass(status)) => status,
            Outcome::Verdict(Verdict::Fail(errno)) => Err(errno),
            Outcome::Verdict(Verdict::Done) => Ok(()),
            Outcome::Verdict(_) | Outcome::Broken => status.and(BROKEN),
        }
    }

    fn visit_store(&mut self) -> Status {
        self.seen.push(Seen::Store);
        for event in &self.script.store {
            match event {
                Event::Cancel => self.cancelled = true,
                Event::Stores(status) if self.cancelled => return status.and(CANCELED),
                Event::Stores(status) => return *status,
                other => panic!("{other:?} at the store"),
            }
        }
        panic!("the store never completes")
    }

    /// A slot is asked (without a status) or told.
    fn visit(&mut self, index: usize, status: Option<Status>) -> Outcome {
        let events = if status.is_none() { &self.script.down } else { &self.script.up };
        self.deliver(index, status);
        let mut held = false;
        for event in &events[index] {
            match event {
                Event::Cancel if !self.cancelled => {
                    self.cancelled = true;
                    if held {
                        self.seen.push(Seen::Cancel(index));
                    }
                }
                Event::Cancel => {}
                Event::Says(Verdict::Hold) if !held => {
                    held = true;
                    if self.cancelled {
                        self.seen.push(Seen::Cancel(index));
                    }
                }
                Event::Says(verdict) if self.is_allowed(index, status.is_none(), *verdict) => {
                    return Outcome::Verdict(*verdict);
                }
                Event::Says(_) => {
                    self.seen.push(Seen::Violation(index));
                    return Outcome::Broken;
                }
                Event::Lost => return Outcome::Broken,
                Event::Restart if self.cancelled && status.is_none() => return Outcome::Broken,
                Event::Restart => {
                    held = false;
                    self.deliver(index, status);
                }
                Event::Stores(_) => panic!("the store's event at a slot"),
            }
        }
        panic!("slot {index} never answers")
    }

    fn deliver(&mut self, index: usize, status: Option<Status>) {
        self.seen.push(match status {
            None => Seen::Start(index),
            Some(status) if self.cancelled => Seen::Done(index, status.and(CANCELED)),
            Some(status) => Seen::Done(index, status),
        });
    }

    /// Whether a slot may say that, other than a first hold.
    fn is_allowed(&self, index: usize, down: bool, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Hold | Verdict::Nonsense => false,
            _ if self.cancelled => true,
            Verdict::Done => !down || self.slots[index].answers.contains(self.script.op),
            Verdict::Watch => down,
            Verdict::Pass(_) | Verdict::Fail(_) => true,
        }
    }
}
