//! One request's walk through the filters.
//!
//! A [`Flight`] says what should happen next; it never does it. The queue worker feeds it
//! events (`handle_*`) and carries out the [`Action`] that each returns, at once, and that
//! alone. No clock, no syscalls, no locks, no allocation.
//!
//! Always true, whatever events come in whatever order:
//!
//! * A flight ends in exactly one [`Action::Complete`] (rule 1). After that every event is
//!   a [`Violation`] and changes nothing.
//! * It waits on one slot, or on the store, or has ended; so each filter sees a request at
//!   most once on the way down and once on the way up (rule 1).
//! * Filters that watch see the completion, nearest the store first; filters below one that
//!   answered or failed the request never see it (rule 2).
//!
//! **Cancel** (rule 7). From a cancel on, no filter is asked on the way down, answers decide
//! nothing but only free the request, and what goes up is ECANCELED, unless the request had
//! failed already or the store fails it. The store is not interrupted: a request that is
//! with it comes back first. A filter that holds the request is told, once for each hold; so
//! is one that holds it later. Filters that watch are told of the completion as always: it
//! is how they free their context. That includes one whose watch arrives after the cancel,
//! for the two may have crossed.
//!
//! **A lost host.** A request that waits on a filter whose host is gone, and gets no new
//! instance, fails with EIO, on the way up too, unless it had failed already: the filter
//! might have undone its change to a read's data, or have refused the success. A write that
//! fails so may be on the disk, as with any disk.
//!
//! **Violations.** A verdict that the filter may not give fails the request with EIO, and
//! comes with the action that follows. An answer to what was not asked changes nothing. So
//! the worker carries out the action in any case, and counts the violation if there is one.

use upcall_block::{Errno, Op, Status};

use crate::{Chain, Entry, Generation, Route, SlotIndex, SlotSet, Verdict, Violation};

/// What the worker does next for a flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the filter of a slot (`start_io`); its answer is a verdict.
    Start {
        /// Whom.
        slot: SlotIndex,
    },
    /// Tell the filter of a slot that the request completed (`io_done`); its answer is a
    /// verdict.
    Done {
        /// Whom.
        slot: SlotIndex,
        /// How it completed so far.
        status: Status,
    },
    /// Hand the request to the store; its completion is the next event.
    Store,
    /// Tell the filter of a slot that what it holds is no longer wanted (`cancel`). Its
    /// verdict is still to come.
    Cancel {
        /// Whom.
        slot: SlotIndex,
    },
    /// Complete the request to its issuer. The last action of every flight.
    Complete(Status),
    /// Nothing: an event is still to come, or the flight has ended.
    Wait,
}

/// What follows from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the action is the only way on for the request"]
pub struct Step {
    /// To be carried out in any case.
    pub action: Action,
    /// What was wrong with the event: to be counted.
    pub violation: Option<Violation>,
}

/// One request on its way through a chain. See the module for what always holds.
///
/// Belongs to one queue thread. It must be driven to its end, and with the chain it began
/// on: another one is a bug of the worker, and a panic in debug builds.
#[derive(Debug, PartialEq, Eq)]
pub struct Flight {
    generation: Generation,
    op: Op,
    place: Place,
    /// The slot at `place` holds the request.
    held: bool,
    cancelled: bool,
    /// Still to be asked on the way down.
    to_ask: SlotSet,
    /// To be told of the completion.
    watching: SlotSet,
    /// What goes up.
    status: Status,
}

/// Whose event is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Down(SlotIndex),
    Store,
    Up(SlotIndex),
    Ended,
}

impl Flight {
    /// A request that enters the chain, and the first thing to do for it.
    ///
    /// An operation whose route from `entry` is not [`Route::Native`] ends here, with
    /// EOPNOTSUPP: it is never slipped past a filter.
    pub fn new(chain: &Chain, op: Op, entry: Entry) -> (Flight, Action) {
        let mut flight = Flight {
            generation: chain.generation(),
            op,
            place: Place::Ended,
            held: false,
            cancelled: false,
            to_ask: chain.plan(op, entry),
            watching: SlotSet::EMPTY,
            status: Ok(()),
        };
        let action = match chain.route(op, entry) {
            Route::Native => flight.go_down(),
            Route::AsWrites | Route::Withheld => {
                flight.status = Err(Errno::EOPNOTSUPP);
                flight.go_up()
            }
        };
        (flight, action)
    }

    /// What it does. Never changes.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Which chain it belongs to. Never changes.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The slot whose answer it waits for.
    pub fn waiting_on(&self) -> Option<SlotIndex> {
        match self.place {
            Place::Down(slot) | Place::Up(slot) => Some(slot),
            Place::Store | Place::Ended => None,
        }
    }

    /// Whether it waits for the answer of `slot`.
    pub fn is_waiting_on(&self, slot: SlotIndex) -> bool {
        self.waiting_on() == Some(slot)
    }

    /// Whether the slot that it waits on holds it.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// Whether it has completed.
    pub fn has_ended(&self) -> bool {
        self.place == Place::Ended
    }

    /// The filter of `slot` answered what it was given last, on either way. An answer to an
    /// earlier delivery is not to be brought here: the worker tells deliveries apart.
    pub fn handle_verdict(&mut self, chain: &Chain, slot: SlotIndex, verdict: Verdict) -> Step {
        debug_assert_eq!(chain.generation(), self.generation, "a flight changed its chain");
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        if !self.is_waiting_on(slot) {
            return Step::ignored(Violation::NotAsked { slot });
        }
        if let Some(violation) = self.violation_of(chain, slot, verdict) {
            return Step { action: self.fail(Errno::EIO), violation: Some(violation) };
        }
        let goes_down = self.place == Place::Down(slot);
        if goes_down && verdict == Verdict::Watch {
            self.watching.insert(slot);
        }
        Step::to(match verdict {
            Verdict::Hold => self.hold(slot),
            _ if self.cancelled => self.go_up(),
            Verdict::Pass(_) | Verdict::Watch if goes_down => self.go_down(),
            Verdict::Pass(status) => self.go_up_with(status),
            Verdict::Done => self.go_up_with(Ok(())),
            Verdict::Fail(errno) => self.go_up_with(Err(errno)),
            // Violations, which have failed the request above.
            Verdict::Watch | Verdict::Nonsense => self.fail(Errno::EIO),
        })
    }

    /// The store completed the request.
    pub fn handle_store(&mut self, status: Status) -> Step {
        match self.place {
            // The status so far is a cancel's, which yields to what went wrong below.
            Place::Store => Step::to(self.go_up_with(status.and(self.status))),
            Place::Ended => Step::ignored(Violation::Ended),
            Place::Down(_) | Place::Up(_) => Step::ignored(Violation::NotWithStore),
        }
    }

    /// Nobody waits for the request any more (rule 7). It still ends by
    /// [`Action::Complete`]. A second cancel changes nothing.
    pub fn handle_cancel(&mut self) -> Step {
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        if self.cancelled {
            return Step::to(Action::Wait);
        }
        self.cancelled = true;
        self.status = self.status.and(Err(Errno::ECANCELED));
        Step::to(match self.waiting_on() {
            Some(slot) if self.held => Action::Cancel { slot },
            _ => Action::Wait,
        })
    }

    /// The host of `slot` is gone, or was killed because its deadline passed, and no other
    /// takes its place. To be called for flights that wait on the slot, and later whenever
    /// an action names it. Changes nothing for a flight that does not wait on it.
    pub fn handle_lost(&mut self, slot: SlotIndex) -> Step {
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        Step::to(if self.is_waiting_on(slot) { self.fail(Errno::EIO) } else { Action::Wait })
    }

    /// The host of `slot` is gone, and a new instance has taken its place: the action gives
    /// it what the old one had not answered, to be marked as a retry (rule 6). A cancelled
    /// request is not asked again, only told. Changes nothing for a flight that does not
    /// wait on the slot.
    pub fn handle_restart(&mut self, slot: SlotIndex) -> Step {
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        if !self.is_waiting_on(slot) {
            return Step::to(Action::Wait);
        }
        self.held = false;
        Step::to(match self.place {
            Place::Up(_) => Action::Done { slot, status: self.status },
            _ if self.cancelled => self.go_up(),
            _ => Action::Start { slot },
        })
    }

    /// The filter of `slot` is skipped: its host is gone, and its policy says so. On the way
    /// down the request goes on and the filter is not told of the completion; on the way up
    /// the status goes on as it is. After a cancel it goes up. Changes nothing for a flight
    /// that does not wait on the slot. Never for a filter that decides data: that is the
    /// worker's bug, and a panic in debug builds.
    pub fn handle_skip(&mut self, chain: &Chain, slot: SlotIndex) -> Step {
        debug_assert!(!chain.spec(slot).decides_data(), "skipped a filter that decides data");
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        if !self.is_waiting_on(slot) {
            return Step::to(Action::Wait);
        }
        Step::to(match self.place {
            Place::Down(_) if !self.cancelled => self.go_down(),
            _ => self.go_up(),
        })
    }

    /// The filter of some slot was replaced while the flight waited at it, and the disk has
    /// another chain since, of the [same shape](Chain::has_shape_of): the flight goes on with
    /// that one. Panics if the chains are not of one shape.
    pub fn handle_adoption(&mut self, from: &Chain, by: &Chain) {
        assert_eq!(from.generation(), self.generation, "a flight changed its chain");
        assert!(by.has_shape_of(from), "a flight is adopted only by a chain of the same shape");
        self.generation = by.generation();
    }

    /// Whether it is on its way up.
    pub fn goes_up(&self) -> bool {
        matches!(self.place, Place::Up(_) | Place::Ended)
    }

    /// What the verdict of the slot that it waits on breaks. After a cancel a filter
    /// answers in its own way, and only what is no answer is a violation.
    pub fn violation_of(
        &self,
        chain: &Chain,
        slot: SlotIndex,
        verdict: Verdict,
    ) -> Option<Violation> {
        let goes_down = self.place == Place::Down(slot);
        match verdict {
            Verdict::Nonsense => Some(Violation::Nonsense { slot }),
            Verdict::Hold if self.held => Some(Violation::HeldTwice { slot }),
            _ if self.cancelled => None,
            Verdict::Done if goes_down && !chain.spec(slot).answers.contains(self.op) => {
                Some(Violation::DoneNotDeclared { slot, op: self.op })
            }
            Verdict::Watch if !goes_down => Some(Violation::WatchOnWayUp { slot }),
            _ => None,
        }
    }

    fn hold(&mut self, slot: SlotIndex) -> Action {
        self.held = true;
        if self.cancelled { Action::Cancel { slot } } else { Action::Wait }
    }

    fn go_down(&mut self) -> Action {
        self.held = false;
        match self.to_ask.pop_first() {
            Some(slot) => {
                self.place = Place::Down(slot);
                Action::Start { slot }
            }
            None => {
                self.place = Place::Store;
                Action::Store
            }
        }
    }

    fn go_up(&mut self) -> Action {
        self.held = false;
        match self.watching.pop_last() {
            Some(slot) => {
                self.place = Place::Up(slot);
                Action::Done { slot, status: self.status }
            }
            None => {
                self.place = Place::Ended;
                Action::Complete(self.status)
            }
        }
    }

    fn go_up_with(&mut self, status: Status) -> Action {
        self.status = status;
        self.go_up()
    }

    /// Goes up with an error, unless there is one already.
    fn fail(&mut self, errno: Errno) -> Action {
        self.go_up_with(self.status.and(Err(errno)))
    }
}

impl Step {
    fn to(action: Action) -> Step {
        Step { action, violation: None }
    }

    fn ignored(violation: Violation) -> Step {
        Step { action: Action::Wait, violation: Some(violation) }
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::OpSet;

    use super::*;
    use crate::SlotSpec;
    use crate::examples::*;

    const CANCELED: Status = Err(Errno::ECANCELED);
    const EIO: Status = Err(Errno::EIO);
    const NO_SPACE: Status = Err(Errno::ENOSPC);
    const PASS: Verdict = Verdict::Pass(Ok(()));

    fn start(index: usize) -> Action {
        Action::Start { slot: slot(index) }
    }

    fn done(index: usize, status: Status) -> Action {
        Action::Done { slot: slot(index), status }
    }

    fn cancel(index: usize) -> Action {
        Action::Cancel { slot: slot(index) }
    }

    /// A flight with its chain, for shorter tests.
    struct Walk {
        chain: Chain,
        flight: Flight,
        first: Action,
    }

    impl Walk {
        fn new<const N: usize>(op: Op, specs: [SlotSpec; N]) -> Walk {
            let chain = chain(specs);
            let (flight, first) = Flight::new(&chain, op, Entry::Top);
            Walk { chain, flight, first }
        }

        /// A write through slots that watch; so many have answered already.
        fn watched<const N: usize>(answered: usize) -> Walk {
            let mut walk = Walk::new(Op::Write, [(); N].map(|()| observer(OpSet::ALL)));
            for index in 0..answered {
                let _ = walk.says(index, Verdict::Watch);
            }
            walk
        }

        /// What follows from a verdict that is no violation.
        fn says(&mut self, index: usize, verdict: Verdict) -> Action {
            let step = self.flight.handle_verdict(&self.chain, slot(index), verdict);
            assert_eq!(step.violation, None, "{index} says {verdict:?}");
            step.action
        }

        fn breaks(&mut self, index: usize, verdict: Verdict) -> (Action, Violation) {
            let step = self.flight.handle_verdict(&self.chain, slot(index), verdict);
            (step.action, step.violation.expect("a violation"))
        }
    }

    #[test]
    fn a_request_walks_down_to_the_store_and_completes() {
        let mut walk = Walk::watched::<2>(0);
        assert_eq!(walk.first, start(0));
        assert_eq!(walk.says(0, PASS), start(1));
        assert!(walk.flight.is_waiting_on(slot(1)) && !walk.flight.is_waiting_on(slot(0)));
        assert_eq!(walk.says(1, PASS), Action::Store);
        assert_eq!(walk.flight.waiting_on(), None);
        assert_eq!(walk.flight.handle_store(Ok(())).action, Action::Complete(Ok(())));
        assert!(walk.flight.has_ended());
    }

    #[test]
    fn a_request_nobody_asked_for_goes_straight_to_the_store() {
        assert_eq!(Walk::new(Op::Read, [observer(ops([Op::Write]))]).first, Action::Store);
        assert_eq!(Walk::new(Op::Read, []).first, Action::Store);
    }

    #[test]
    fn an_operation_that_is_not_offered_reaches_nobody() {
        let unsupported = Action::Complete(Err(Errno::EOPNOTSUPP));
        assert_eq!(Walk::new(Op::Discard, [changer()]).first, unsupported);
        assert_eq!(
            Walk::new(Op::WriteZeroes, [observer(OpSet::ALL), changer()]).first,
            unsupported
        );
    }

    #[test]
    fn watchers_see_the_completion_nearest_the_store_first() {
        let mut walk = Walk::watched::<3>(1);
        assert_eq!(walk.says(1, PASS), start(2));
        assert_eq!(walk.says(2, Verdict::Watch), Action::Store);
        assert_eq!(walk.flight.handle_store(NO_SPACE).action, done(2, NO_SPACE));
        assert_eq!(walk.says(2, Verdict::Pass(NO_SPACE)), done(0, NO_SPACE));
        assert_eq!(walk.says(0, Verdict::Pass(NO_SPACE)), Action::Complete(NO_SPACE));
    }

    #[test]
    fn a_status_changed_on_the_way_up_is_what_those_above_see() {
        let mut walk = Walk::watched::<4>(4);
        assert_eq!(walk.flight.handle_store(NO_SPACE).action, done(3, NO_SPACE));
        assert_eq!(walk.says(3, Verdict::Done), done(2, Ok(())));
        assert_eq!(walk.says(2, Verdict::Fail(Errno::EROFS)), done(1, Err(Errno::EROFS)));
        assert_eq!(walk.says(1, Verdict::Pass(EIO)), done(0, EIO));
        assert_eq!(walk.says(0, PASS), Action::Complete(Ok(())));
    }

    #[test]
    fn who_answers_does_not_see_its_own_completion_and_those_below_see_nothing() {
        for (verdict, status) in [(Verdict::Done, Ok(())), (Verdict::Fail(Errno::ENOSPC), NO_SPACE)]
        {
            let mut walk = Walk::new(Op::Read, [observer(OpSet::ALL), answerer(), answerer()]);
            assert_eq!(walk.says(0, Verdict::Watch), start(1));
            assert_eq!(walk.says(1, verdict), done(0, status));
            assert_eq!(walk.says(0, Verdict::Pass(status)), Action::Complete(status));
        }
    }

    #[test]
    fn the_status_of_a_pass_on_the_way_down_says_nothing() {
        let mut walk = Walk::watched::<1>(0);
        assert_eq!(walk.says(0, Verdict::Pass(EIO)), Action::Store);
        assert_eq!(walk.flight.handle_store(Ok(())).action, Action::Complete(Ok(())));
    }

    #[test]
    fn a_held_request_waits_for_one_more_answer_on_either_way() {
        let mut walk = Walk::watched::<1>(0);
        assert_eq!(walk.says(0, Verdict::Hold), Action::Wait);
        assert!(walk.flight.is_held());
        assert_eq!(walk.says(0, Verdict::Watch), Action::Store);
        assert!(!walk.flight.is_held());
        assert_eq!(walk.flight.handle_store(Ok(())).action, done(0, Ok(())));
        assert_eq!(walk.says(0, Verdict::Hold), Action::Wait);
        assert_eq!(walk.says(0, PASS), Action::Complete(Ok(())));
    }

    #[test]
    fn what_a_filter_issues_enters_below_it() {
        let chain = chain([observer(OpSet::ALL), observer(OpSet::ALL), observer(OpSet::ALL)]);
        let (_, first) = Flight::new(&chain, Op::Write, Entry::Below(slot(1)));
        assert_eq!(first, start(2));
        let (_, first) = Flight::new(&chain, Op::Write, Entry::Below(slot(2)));
        assert_eq!(first, Action::Store);
    }

    #[test]
    fn done_for_an_undeclared_operation_fails_the_request() {
        let mut walk = Walk::watched::<2>(1);
        let violation = Violation::DoneNotDeclared { slot: slot(1), op: Op::Write };
        assert_eq!(walk.breaks(1, Verdict::Done), (done(0, EIO), violation));
        assert_eq!(walk.says(0, Verdict::Pass(EIO)), Action::Complete(EIO));
    }

    #[test]
    fn watch_on_the_way_up_fails_the_request() {
        let mut walk = Walk::watched::<1>(1);
        let _ = walk.flight.handle_store(Ok(()));
        let violation = Violation::WatchOnWayUp { slot: slot(0) };
        assert_eq!(walk.breaks(0, Verdict::Watch), (Action::Complete(EIO), violation));
    }

    #[test]
    fn a_second_hold_fails_the_request() {
        let mut walk = Walk::watched::<1>(0);
        let _ = walk.says(0, Verdict::Hold);
        let violation = Violation::HeldTwice { slot: slot(0) };
        assert_eq!(walk.breaks(0, Verdict::Hold), (Action::Complete(EIO), violation));
    }

    #[test]
    fn nonsense_fails_the_request_and_keeps_the_error_it_had() {
        let mut walk = Walk::watched::<1>(1);
        let _ = walk.flight.handle_store(NO_SPACE);
        let violation = Violation::Nonsense { slot: slot(0) };
        assert_eq!(walk.breaks(0, Verdict::Nonsense), (Action::Complete(NO_SPACE), violation));
    }

    #[test]
    fn an_answer_to_what_was_not_asked_changes_nothing() {
        let mut walk = Walk::watched::<3>(1);
        for index in [0, 2, 63] {
            let before = format!("{:?}", walk.flight);
            let violation = Violation::NotAsked { slot: slot(index) };
            assert_eq!(walk.breaks(index, Verdict::Done), (Action::Wait, violation));
            assert_eq!(format!("{:?}", walk.flight), before);
        }
        let step = walk.flight.handle_store(Ok(()));
        assert_eq!(step, Step::ignored(Violation::NotWithStore));
        assert_eq!(walk.says(1, PASS), start(2));
    }

    #[test]
    fn after_its_end_a_flight_bears_nothing() {
        let mut walk = Walk::watched::<1>(0);
        assert_eq!(walk.says(0, Verdict::Fail(Errno::EIO)), Action::Complete(EIO));
        let ended = Step::ignored(Violation::Ended);
        assert_eq!(walk.flight.handle_verdict(&walk.chain, slot(0), PASS), ended);
        assert_eq!(walk.flight.handle_store(Ok(())), ended);
        assert_eq!(walk.flight.handle_cancel(), ended);
        assert_eq!(walk.flight.handle_lost(slot(0)), ended);
        assert_eq!(walk.flight.handle_restart(slot(0)), ended);
    }

    #[test]
    fn who_holds_a_cancelled_request_is_told_once_and_its_answer_only_frees_it() {
        let mut walk = Walk::new(Op::Write, [observer(OpSet::ALL), answerer(), answerer()]);
        let _ = walk.says(0, Verdict::Watch);
        let _ = walk.says(1, Verdict::Hold);
        assert_eq!(walk.flight.handle_cancel().action, cancel(1));
        assert_eq!(walk.flight.handle_cancel().action, Action::Wait);
        assert_eq!(walk.says(1, Verdict::Done), done(0, CANCELED), "though it says done");
        assert_eq!(walk.says(0, PASS), Action::Complete(CANCELED), "though it says success");
    }

    #[test]
    fn a_cancelled_request_goes_no_further_down() {
        let mut walk = Walk::watched::<3>(1);
        assert_eq!(walk.flight.handle_cancel().action, Action::Wait, "an answer is on its way");
        assert_eq!(walk.says(1, PASS), done(0, CANCELED));
    }

    #[test]
    fn who_holds_after_the_cancel_is_told_then() {
        let mut walk = Walk::watched::<1>(1);
        let _ = walk.flight.handle_cancel();
        assert_eq!(walk.flight.handle_store(Ok(())).action, done(0, CANCELED));
        assert_eq!(walk.says(0, Verdict::Hold), cancel(0));
        assert_eq!(walk.says(0, PASS), Action::Complete(CANCELED));
    }

    #[test]
    fn a_watch_that_crossed_the_cancel_is_honoured() {
        let mut walk = Walk::watched::<2>(0);
        let _ = walk.says(0, Verdict::Hold);
        assert_eq!(walk.flight.handle_cancel().action, cancel(0));
        assert_eq!(walk.says(0, Verdict::Watch), done(0, CANCELED));
        assert_eq!(walk.says(0, Verdict::Pass(CANCELED)), Action::Complete(CANCELED));
    }

    #[test]
    fn a_cancelled_request_with_the_store_comes_back_first() {
        for (from_store, status) in [(Ok(()), CANCELED), (NO_SPACE, NO_SPACE)] {
            let mut walk = Walk::watched::<1>(1);
            assert_eq!(walk.flight.handle_cancel().action, Action::Wait);
            assert_eq!(walk.flight.handle_store(from_store).action, done(0, status));
            assert_eq!(walk.says(0, PASS), Action::Complete(status));
        }
    }

    #[test]
    fn a_cancel_on_the_way_up_keeps_an_error_and_takes_a_success_away() {
        for (from_store, status) in [(Ok(()), CANCELED), (NO_SPACE, NO_SPACE)] {
            let mut walk = Walk::watched::<2>(2);
            let _ = walk.flight.handle_store(from_store);
            let _ = walk.says(1, Verdict::Hold);
            assert_eq!(walk.flight.handle_cancel().action, cancel(1));
            assert_eq!(walk.says(1, Verdict::Done), done(0, status));
        }
    }

    #[test]
    fn after_a_cancel_only_what_is_no_answer_is_a_violation() {
        let mut walk = Walk::watched::<1>(0);
        let _ = walk.flight.handle_cancel();
        assert_eq!(walk.says(0, Verdict::Done), Action::Complete(CANCELED));
        let mut walk = Walk::watched::<1>(0);
        let _ = walk.flight.handle_cancel();
        let violation = Violation::Nonsense { slot: slot(0) };
        assert_eq!(walk.breaks(0, Verdict::Nonsense), (Action::Complete(CANCELED), violation));
    }

    #[test]
    fn a_request_that_waits_on_a_lost_host_fails_on_either_way() {
        let mut walk = Walk::watched::<2>(1);
        let _ = walk.says(1, Verdict::Hold);
        assert_eq!(walk.flight.handle_lost(slot(1)).action, done(0, EIO), "down, held");
        assert_eq!(walk.flight.handle_lost(slot(0)).action, Action::Complete(EIO));

        let mut walk = Walk::watched::<1>(1);
        let _ = walk.flight.handle_store(Ok(()));
        assert_eq!(walk.flight.handle_lost(slot(0)).action, Action::Complete(EIO), "up, success");

        let mut walk = Walk::watched::<1>(1);
        let _ = walk.flight.handle_store(NO_SPACE);
        let end = Action::Complete(NO_SPACE);
        assert_eq!(walk.flight.handle_lost(slot(0)).action, end, "up, failed already");
    }

    #[test]
    fn a_lost_host_that_has_answered_matters_when_its_turn_comes() {
        let mut walk = Walk::watched::<2>(1);
        assert_eq!(walk.flight.handle_lost(slot(0)).action, Action::Wait);
        let _ = walk.says(1, PASS);
        assert_eq!(walk.flight.handle_store(Ok(())).action, done(0, Ok(())));
        assert_eq!(walk.flight.handle_lost(slot(0)).action, Action::Complete(EIO));
    }

    #[test]
    fn a_new_instance_gets_what_the_old_one_had_not_answered() {
        let mut walk = Walk::watched::<2>(0);
        let _ = walk.says(0, Verdict::Hold);
        assert_eq!(walk.flight.handle_restart(slot(1)).action, Action::Wait, "not its request");
        assert!(walk.flight.is_held());
        assert_eq!(walk.flight.handle_restart(slot(0)).action, start(0));
        assert_eq!(walk.says(0, Verdict::Hold), Action::Wait, "its first hold");
        assert_eq!(walk.says(0, Verdict::Watch), start(1));
        let _ = walk.says(1, PASS);
        let _ = walk.flight.handle_store(NO_SPACE);
        assert_eq!(walk.flight.handle_restart(slot(0)).action, done(0, NO_SPACE));
    }

    #[test]
    fn a_new_instance_is_not_asked_about_a_cancelled_request_but_told() {
        let mut walk = Walk::watched::<2>(1);
        let _ = walk.flight.handle_cancel();
        assert_eq!(walk.flight.handle_restart(slot(1)).action, done(0, CANCELED));
        assert_eq!(walk.flight.handle_restart(slot(0)).action, done(0, CANCELED));
    }

    #[test]
    fn a_skipped_filter_is_asked_on_neither_way_and_changes_nothing() {
        let mut walk = Walk::watched::<3>(1);
        let skip = |walk: &mut Walk, index| walk.flight.handle_skip(&walk.chain, slot(index));
        assert_eq!(skip(&mut walk, 0).action, Action::Wait, "it does not wait on that one");
        assert_eq!(skip(&mut walk, 1).action, start(2));
        assert_eq!(walk.says(2, Verdict::Watch), Action::Store);
        assert_eq!(walk.flight.handle_store(NO_SPACE).action, done(2, NO_SPACE));
        assert!(walk.flight.goes_up());
        assert_eq!(skip(&mut walk, 2).action, done(0, NO_SPACE), "and never slot 1");
        assert_eq!(skip(&mut walk, 0).action, Action::Complete(NO_SPACE));
    }

    #[test]
    fn a_skipped_request_that_was_cancelled_goes_up() {
        let mut walk = Walk::watched::<2>(1);
        let _ = walk.flight.handle_cancel();
        let step = walk.flight.handle_skip(&walk.chain, slot(1));
        assert_eq!(step.action, done(0, CANCELED));
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic = "a flight changed its chain"]
    fn a_flight_stays_with_its_chain() {
        let mut walk = Walk::watched::<1>(0);
        let other = Chain::new(Generation(2), vec![observer(OpSet::ALL)], &disk()).unwrap();
        let _ = walk.flight.handle_verdict(&other, slot(0), PASS);
    }

    #[test]
    fn a_flight_is_smaller_than_a_cache_line() {
        assert!(size_of::<Flight>() <= 48, "{}", size_of::<Flight>());
    }
}
