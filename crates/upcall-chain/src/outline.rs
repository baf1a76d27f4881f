//! What a change of a chain means for requests in flight, and whether it can be taken back.
//!
//! An [`Outline`] is one disk's part of a change, as a matter of declarations alone: it knows no
//! process, no file and no request.
//!
//! Always true: a request waits through a change only for a filter that is replaced by one which
//! declares the same; a filter is tried only if what it stands for can be put back as it was.

use crate::chain::Chain;
use crate::slot::SlotSpec;

/// A slot that there is now.
#[derive(Clone, Debug)]
pub struct Present {
    /// What its filter declares.
    pub spec: SlotSpec,
    /// Another one takes its place, or it stays; otherwise it leaves the chain.
    pub has_successor: bool,
    /// Once it has left, it cannot come back as it was: it was given something that is given only
    /// when a disk begins to be served, or it must know of all that it missed.
    pub leaves_for_good: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Outline {
    same_shape: bool,
    is_final: bool,
}

impl Outline {
    /// The part of a disk that has `chain` now, of these slots, and shall have `next`. `comes`:
    /// filters that come without taking another one's place.
    pub fn new<'a>(
        chain: &Chain,
        next: &Chain,
        now: impl IntoIterator<Item = &'a Present>,
        comes: impl IntoIterator<Item = &'a SlotSpec>,
    ) -> Outline {
        // What was written through a filter that decides data, or past it, cannot be read as it
        // was before.
        let goes = now
            .into_iter()
            .any(|slot| !slot.has_successor && (slot.spec.decides_data() || slot.leaves_for_good));
        let comes = comes.into_iter().any(SlotSpec::decides_data);
        Outline { same_shape: next.has_shape_of(chain), is_final: goes || comes }
    }

    /// Whether requests that wait for a dead filter wait on for the one that takes its place.
    pub fn may_await_successor(&self) -> bool {
        self.same_shape
    }

    /// Whether requests that wait for a dead filter which leaves, and has no successor, go past
    /// it.
    pub fn may_go_past(spec: &SlotSpec) -> bool {
        !spec.decides_data()
    }

    /// Whether a change of which this is a part can be taken back once requests have gone through
    /// the new chains. If not, nothing in it is tried.
    pub fn can_be_taken_back(&self) -> bool {
        !self.is_final
    }

    /// Whether a new filter may be tried: one that is replaced by another kind cannot hand its
    /// requests back.
    pub fn can_try(&self, spec: &SlotSpec, replaces: bool) -> bool {
        if replaces { self.same_shape } else { !spec.decides_data() }
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::{DiskInfo, Op, OpSet};

    use super::*;
    use crate::{Class, Generation};

    const DATA: OpSet = OpSet::NONE.with(Op::Read).with(Op::Write);

    fn spec(class: Class, changes: OpSet) -> SlotSpec {
        SlotSpec { class, order: 0, ops: OpSet::ALL, sees: DATA, changes, answers: OpSet::NONE }
    }

    fn watcher() -> SlotSpec {
        spec(Class::Inspection, OpSet::NONE)
    }

    fn changer() -> SlotSpec {
        spec(Class::Encryption, DATA)
    }

    fn chain(specs: &[SlotSpec]) -> Chain {
        let info = DiskInfo {
            capacity: 1 << 20,
            block_size: 512,
            physical_block_size: 512,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 512,
        };
        Chain::new(Generation(1), specs.to_vec(), &info).unwrap()
    }

    fn present(spec: SlotSpec, has_successor: bool) -> Present {
        Present { spec, has_successor, leaves_for_good: false }
    }

    #[test]
    fn what_is_replaced_by_its_like_keeps_its_requests_and_is_tried() {
        let chain = chain(&[changer()]);
        let outline = Outline::new(&chain, &chain, &[present(changer(), true)], []);
        assert!(outline.may_await_successor() && outline.can_be_taken_back());
        assert!(outline.can_try(&changer(), true));
    }

    #[test]
    fn what_decides_data_comes_and_goes_for_good_and_nobody_is_tried_beside_it() {
        let (with, without) = (chain(&[watcher(), changer()]), chain(&[watcher()]));
        let goes = [present(watcher(), true), present(changer(), false)];
        assert!(!Outline::new(&with, &without, &goes, []).can_be_taken_back());
        let comes = Outline::new(&without, &with, &goes[..1], [&changer()]);
        assert!(!comes.can_be_taken_back() && !comes.may_await_successor());
        assert!(!comes.can_try(&changer(), false) && comes.can_try(&watcher(), false));
        assert!(!Outline::may_go_past(&changer()) && Outline::may_go_past(&watcher()));
    }

    #[test]
    fn what_cannot_come_back_as_it_was_makes_a_change_final() {
        let (with, without) = (chain(&[watcher()]), chain(&[]));
        for leaves_for_good in [false, true] {
            let slot = Present { leaves_for_good, ..present(watcher(), false) };
            let outline = Outline::new(&with, &without, [&slot], []);
            assert_eq!(outline.can_be_taken_back(), !leaves_for_good);
            let stays = Present { has_successor: true, ..slot };
            assert!(Outline::new(&with, &with, [&stays], []).can_be_taken_back());
        }
    }
}
