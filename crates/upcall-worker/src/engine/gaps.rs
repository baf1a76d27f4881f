//! What a filter misses while it is bypassed is recorded before it is missed.
//!
//! Always true: a request that changes the disk goes past a slot that records gaps only when
//! its range is marked, durably; one whose mark fails, fails.

use std::os::fd::BorrowedFd;

use upcall_block::Range;
use upcall_chain::Action;
use upcall_gap::{Mark, MarkDone, MarkToken, Marker};

use super::Engine;
use super::message::Delivery;
use crate::config::LogLevel;
use crate::plant::is_planted;

/// Records for one queue thread what one slot missed; as [`Marker`], which it is except where
/// the world is played.
pub(crate) trait MarkGaps: Send {
    fn mark(&mut self, token: MarkToken, range: Range) -> Mark;
    fn poll(&mut self, out: &mut Vec<MarkDone>);
    fn in_flight(&self) -> usize;
    fn doorbell(&self) -> Option<BorrowedFd<'_>>;
    fn before_sleep(&mut self) -> bool;
}

impl MarkGaps for Marker {
    fn mark(&mut self, token: MarkToken, range: Range) -> Mark {
        Marker::mark(self, token, range)
    }

    fn poll(&mut self, out: &mut Vec<MarkDone>) {
        Marker::poll(self, out);
    }

    fn in_flight(&self) -> usize {
        Marker::in_flight(self)
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(Marker::doorbell(self))
    }

    fn before_sleep(&mut self) -> bool {
        Marker::before_sleep(self)
    }
}

impl Engine {
    /// Whether a request may go past the slot that it is at: what the slot misses is
    /// recorded, or there is nothing to record. If not yet, it goes on when it is.
    pub(super) fn is_recorded(&mut self, number: u32) -> bool {
        let Some(flight) = self.flights.get_mut(number) else { return true };
        let Some(visit) = &mut flight.visit else { return true };
        let slot = &mut self.parts.slots[visit.slot.index()];
        // One that turns back here changes nothing.
        let turns_back = flight.flight.is_cancelled() && !visit.up;
        if !flight.op.is_modification() || slot.detached || turns_back {
            return true;
        }
        let Some(gaps) = &mut slot.gaps else { return true };
        if is_planted("bypass-without-mark") {
            return true;
        }
        match gaps.mark(MarkToken(visit.delivery.token()), flight.range) {
            Mark::Already => true,
            Mark::Queued if is_planted("bypass-before-mark") => true,
            Mark::Queued => {
                visit.is_marking = true;
                false
            }
        }
    }

    /// Lets requests go on whose marks are made.
    pub(super) fn reap_marks(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.marked);
        for slot in &mut self.parts.slots {
            if let Some(gaps) = slot.gaps.as_mut().filter(|gaps| gaps.in_flight() > 0) {
                gaps.poll(&mut done);
            }
        }
        let busy = !done.is_empty();
        for mark in done.drain(..) {
            if let Some((number, action)) = self.marked(mark) {
                self.carry_out(number, action);
            }
        }
        self.marked = done;
        busy
    }

    fn marked(&mut self, mark: MarkDone) -> Option<(u32, Action)> {
        let delivery = Delivery::from_token(mark.token.0);
        let number = delivery.request;
        // Its filter may have come back and have it by now: then it is asked after all.
        let visit = self.flights.get(number)?.visit?;
        if visit.delivery != delivery || !visit.is_marking {
            return None;
        }
        match mark.status {
            Ok(()) => Some((number, self.pass_by(number)?)),
            Err(errno) => {
                let link = self.slot(visit.slot).link;
                let name = self.parts.links[link].name.clone();
                self.log(
                    LogLevel::Error,
                    &format!(
                        "a change fails: that filter {name}, which is bypassed, misses it cannot be \
                         recorded ({errno}); make room where its .gaps file is"
                    ),
                );
                Some((number, self.leave_lost(number)?))
            }
        }
    }
}
