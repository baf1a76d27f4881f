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

    /// The filter of `slot` answered, on either way.
    pub fn handle_verdict(&mut self, chain: &Chain, slot: SlotIndex, verdict: Verdict) -> Step {
        debug_assert_eq!(chain.generation(), self.generation, "a flight changed its chain");
        let goes_down = self.place == Place::Down(slot);
        if self.has_ended() {
            return Step::ignored(Violation::Ended);
        }
        if !self.is_waiting_on(slot) {
            return Step::ignored(Violation::NotAsked { slot });
        }
        if let Some(violation) = self.violation_of(chain, slot, verdict) {
            return Step { action: self.fail(Errno::EIO), violation: Some(violation) };
        }
        if verdict == Verdict::Hold {
            self.held = true;
            return Step::to(if self.cancelled { Action::Cancel { slot } } else { Action::Wait });
        }
        if goes_down && verdict == Verdict::Watch {
            self.watching.insert(slot);
        }
        if self.cancelled {
            return Step::to(self.go_up());
        }
        Step::to(match verdict {
            Verdict::Pass(_) | Verdict::Watch if goes_down => self.go_down(),
            Verdict::Pass(status) => self.go_up_with(status),
            Verdict::Fail(errno) => self.go_up_with(Err(errno)),
            Verdict::Done => self.go_up_with(Ok(())),
            Verdict::Watch | Verdict::Hold | Verdict::Nonsense => self.fail(Errno::EIO),
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

    /// The host of `slot` is gone, and no other takes its place. To be called for flights
    /// that wait on the slot, and later whenever an action names it. Changes nothing for a
    /// flight that does not wait on it.
    pub fn handle_lost(&mut self, slot: SlotIndex) -> Step {
        match self.place {
            Place::Ended => Step::ignored(Violation::Ended),
            _ if self.is_waiting_on(slot) => Step::to(self.fail(Errno::EIO)),
            _ => Step::to(Action::Wait),
        }
    }

    /// The host of `slot` is gone, and a new instance has taken its place: the action gives
    /// it what the old one had not answered, to be marked as a retry (rule 6). A cancelled
    /// request is not asked again, only told. Changes nothing for a flight that does not
    /// wait on the slot.
    pub fn handle_restart(&mut self, slot: SlotIndex) -> Step {
        let waits = self.is_waiting_on(slot);
        self.held &= !waits;
        Step::to(match self.place {
            Place::Ended => return Step::ignored(Violation::Ended),
            Place::Down(_) if waits && self.cancelled => self.go_up(),
            Place::Down(_) if waits => Action::Start { slot },
            Place::Up(_) if waits => Action::Done { slot, status: self.status },
            _ => Action::Wait,
        })
    }

    /// What the verdict of the slot that it waits on breaks. After a cancel a filter
    /// answers in its own way, and only what is no answer is a violation.
    fn violation_of(&self, chain: &Chain, slot: SlotIndex, verdict: Verdict) -> Option<Violation> {
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
