//! Stopping a queue: nothing new is taken, what was taken ends, and the queue goes back.

use std::sync::mpsc::SyncSender;

use upcall_block::{Errno, RequestQueue};

use super::inflight::Origin;
use super::{Engine, now_ns};
use crate::config::LogLevel;

/// How long a filter may take to answer after a cancel.
const CANCEL_GRACE_NS: u64 = 2_000_000_000;

/// A stop under way.
pub(super) struct Stop {
    reply: SyncSender<Option<Box<dyn RequestQueue>>>,
    /// When patience ends: first with requests that filters hold, then with filters that do
    /// not answer a cancel.
    pub(super) deadline_ns: u64,
    cancelled: bool,
}

impl Engine {
    pub(super) fn begin_stop(
        &mut self,
        drain_ms: u64,
        reply: SyncSender<Option<Box<dyn RequestQueue>>>,
    ) {
        let deadline_ns = now_ns().saturating_add(drain_ms.saturating_mul(1_000_000));
        self.stop = Some(Stop { reply, deadline_ns, cancelled: false });
    }

    /// Carries a stop forward; true if it did something.
    pub(super) fn check_stop(&mut self) -> bool {
        let Some(stop) = &mut self.stop else { return false };
        if self.guest_requests == 0 {
            let queue = self.frontend.take();
            if let Some(Stop { reply, .. }) = self.stop.take() {
                // Whoever asked may have given up waiting; then the queue ends here.
                let _ = reply.send(queue);
            }
            return true;
        }
        if now_ns() < stop.deadline_ns {
            return false;
        }
        if !stop.cancelled {
            stop.cancelled = true;
            stop.deadline_ns = now_ns().saturating_add(CANCEL_GRACE_NS);
            self.cancel_guest_requests();
        } else {
            stop.deadline_ns = now_ns().saturating_add(CANCEL_GRACE_NS);
            self.abandon_guest_requests();
        }
        true
    }

    fn guest_flights(&self) -> Vec<u32> {
        let is_guests = |origin: Origin| match origin {
            Origin::Guest(_) => true,
            Origin::Part(whole) => {
                matches!(self.wholes.get(whole).map(|whole| whole.origin), Some(Origin::Guest(_)))
            }
            Origin::Issued { .. } => false,
        };
        self.flights
            .iter()
            .filter(|(_, flight)| is_guests(flight.origin))
            .map(|(number, _)| number)
            .collect()
    }

    fn cancel_guest_requests(&mut self) {
        for number in self.guest_flights() {
            let Some(flight) = self.flights.get_mut(number) else { continue };
            if flight.waiting.take().is_some() {
                // It waits for room in the arena: nobody has it yet.
                self.waiting
                    .iter_mut()
                    .for_each(|waiting| waiting.retain(|other| *other != number));
                self.finish(number, Err(Errno::ECANCELED));
                continue;
            }
            let action = flight.flight.handle_cancel().action;
            self.carry_out(number, action);
        }
    }

    /// Ends the requests whose filter has not even answered a cancel. Those in the store
    /// must be waited for: the store writes to their memory.
    fn abandon_guest_requests(&mut self) {
        let mut count = 0;
        for number in self.guest_flights() {
            let Some(visit) = self.flights.get(number).and_then(|flight| flight.visit) else {
                continue;
            };
            self.abandoned.insert(visit.delivery.token());
            count += 1;
            if let Some(action) = self.leave_lost(number) {
                self.carry_out(number, action);
            }
        }
        if count > 0 {
            self.log(
                LogLevel::Error,
                &format!(
                    "{count} requests failed: a filter answered neither them nor their cancel"
                ),
            );
        }
    }
}
