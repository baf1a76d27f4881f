//! A flight with its script, in the worker's stead: feeds it the script's events, goes where
//! its actions lead, and writes down what they show.

use std::collections::VecDeque;

use upcall_chain::{Action, Chain, Entry, Flight, SlotIndex, Step};

use crate::reference::Seen;
use crate::script::{Event, Script};

pub fn slot(index: usize) -> SlotIndex {
    SlotIndex::new(index).expect("a slot")
}

pub struct Player {
    pub flight: Flight,
    pub script: Script,
    pub stop: Stop,
    /// Left of the script of `stop`.
    events: VecDeque<Event>,
    pub seen: Vec<Seen>,
    pub request: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stop {
    Down(usize),
    Store,
    Up(usize),
    Ended,
}

impl Player {
    /// Begins a flight, and does the first thing for it. It enters above slot `script.first`.
    pub fn new(chain: &Chain, entry: Entry, script: Script, request: usize) -> Player {
        let (flight, action) = Flight::new(chain, script.op, entry);
        let (stop, events, seen) = (Stop::Ended, VecDeque::new(), Vec::new());
        let mut player = Player { flight, script, stop, events, seen, request };
        player.take(Step { action, violation: None });
        player
    }

    /// The slot whose filter has the request.
    pub fn is_at(&self) -> Option<SlotIndex> {
        match self.stop {
            Stop::Down(index) | Stop::Up(index) => Some(slot(index)),
            Stop::Store | Stop::Ended => None,
        }
    }

    /// Plays the next event.
    pub fn play(&mut self, chain: &Chain) -> Event {
        let event = self.events.pop_front().expect("the last event moves a flight on");
        let here = self.is_at();
        let flight = &mut self.flight;
        let step = match (event, here) {
            (Event::Says(verdict), Some(slot)) => flight.handle_verdict(chain, slot, verdict),
            (Event::Lost, Some(slot)) => flight.handle_lost(slot),
            (Event::Restart, Some(slot)) => flight.handle_restart(slot),
            (Event::Stores(status), None) => flight.handle_store(status),
            (Event::Cancel, _) => flight.handle_cancel(),
            (event, here) => panic!("{event:?} at {here:?}"),
        };
        self.take(step);
        event
    }

    /// Writes down what a step shows, and goes where it leads.
    fn take(&mut self, step: Step) {
        if let Some(violation) = step.violation {
            let slot = self.is_at().unwrap_or_else(|| panic!("{violation:?} by nobody"));
            self.seen.push(Seen::Violation(slot.index()));
        }
        let before = self.stop;
        match step.action {
            Action::Start { slot } => {
                self.seen.push(Seen::Start(slot.index()));
                self.stop = Stop::Down(slot.index());
            }
            Action::Done { slot, status } => {
                self.seen.push(Seen::Done(slot.index(), status));
                self.stop = Stop::Up(slot.index());
            }
            Action::Store => {
                self.seen.push(Seen::Store);
                self.stop = Stop::Store;
            }
            Action::Complete(status) => {
                self.seen.push(Seen::Complete(status));
                self.stop = Stop::Ended;
            }
            Action::Cancel { slot } => self.seen.push(Seen::Cancel(slot.index())),
            Action::Wait => {}
        }
        assert_eq!(self.flight.waiting_on(), self.is_at(), "it waits where it was sent");
        assert_eq!(self.flight.has_ended(), self.stop == Stop::Ended);
        if self.stop != before {
            // Else it waits, or a new instance was given the same again.
            let events: &[Event] = match self.stop {
                Stop::Down(index) => &self.script.down[index],
                Stop::Up(index) => &self.script.up[index],
                Stop::Store => &self.script.store,
                Stop::Ended => &[],
            };
            self.events = events.iter().copied().collect();
        }
    }

    /// Whether a host may have been restarted while it had the request.
    pub fn restarts(&self) -> bool {
        let stops = self.script.down.iter().chain(&self.script.up);
        stops.flatten().any(|event| *event == Event::Restart)
    }
}
