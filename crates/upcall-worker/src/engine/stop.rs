//! Stopping a queue: nothing new is taken, what was taken ends, and the queue goes back. And
//! ending the thread: whatever is in flight ends.
//!
//! Both are patient first, then cancel what filters hold, then end what a filter has not
//! given back even so. Only the store is waited for without end: it writes to memory that
//! others would use.

use std::sync::mpsc::SyncSender;

use upcall_block::{Errno, RequestQueue};
use upcall_chain::DataAccess;

use super::Engine;
use super::inflight::{InFlight, Origin};
use crate::config::LogLevel;
use crate::plant::is_planted;

/// How long a filter may take to answer after a cancel.
const CANCEL_GRACE_NS: u64 = 2_000_000_000;
/// Requests that a filter host may owe an answer to although they have ended.
const ABANDONED_MAX: usize = 1024;

/// How long to wait, and for what.
pub(super) struct Patience {
    pub(super) until_ns: u64,
    /// It is for the answers to a cancel.
    cancelled: bool,
}

/// What follows when patience ends.
enum Due {
    Cancel,
    Abandon,
}

impl Patience {
    fn new(now_ns: u64, ms: u64) -> Patience {
        let until_ns = now_ns.saturating_add(ms.saturating_mul(1_000_000));
        Patience { until_ns, cancelled: false }
    }

    fn check(&mut self, now_ns: u64) -> Option<Due> {
        if now_ns < self.until_ns {
            return None;
        }
        self.until_ns = now_ns.saturating_add(CANCEL_GRACE_NS);
        let cancelled = std::mem::replace(&mut self.cancelled, true);
        Some(if cancelled { Due::Abandon } else { Due::Cancel })
    }
}

/// A stop under way.
pub(super) struct Stop {
    reply: SyncSender<Option<Box<dyn RequestQueue>>>,
    pub(super) patience: Patience,
}

/// A delivery that was given up, although its filter host lives.
pub(super) struct Abandoned {
    pub(super) link: usize,
    /// Its filter said later that it holds the request, and was told that it need not.
    pub(super) held: bool,
}

impl Engine {
    pub(super) fn begin_stop(
        &mut self,
        drain_ms: u64,
        reply: SyncSender<Option<Box<dyn RequestQueue>>>,
    ) {
        let patience = Patience::new(self.now_ns(), drain_ms);
        self.stop = Some(Stop { reply, patience });
    }

    pub(super) fn wind_down(&mut self, drain_ms: u64) {
        let now_ns = self.now_ns();
        self.ending.get_or_insert_with(|| Patience::new(now_ns, drain_ms));
    }

    /// Who is in order has nothing in flight by now.
    pub(super) fn begin_quit(&mut self) {
        self.quit = true;
        self.wind_down(0);
    }

    /// Carries a stop and the end forward; true if it did something.
    pub(super) fn check_stop(&mut self) -> bool {
        if (self.guest_requests == 0 || is_planted("stop-before-end"))
            && let Some(Stop { reply, .. }) = self.stop.take()
        {
            // Whoever asked may have given up waiting; then the queue ends here.
            let _ = reply.send(self.frontend.take());
            return true;
        }
        if self.stop.is_none() && self.ending.is_none() {
            return false;
        }
        let now_ns = self.now_ns();
        let stop = self.stop.as_mut().and_then(|stop| stop.patience.check(now_ns));
        let end = self.ending.as_mut().and_then(|patience| patience.check(now_ns));
        let Some(due) = end.as_ref().or(stop.as_ref()) else { return false };
        let flights = self.flights.iter();
        let chosen = flights.filter(|(_, flight)| end.is_some() || self.is_guests(flight));
        let chosen: Vec<u32> = chosen.map(|(number, _)| number).collect();
        match due {
            Due::Cancel => self.cancel_requests(&chosen),
            Due::Abandon => self.abandon_requests(&chosen),
        }
        true
    }

    fn is_guests(&self, flight: &InFlight) -> bool {
        match flight.origin {
            Origin::Guest(_) => true,
            Origin::Part(whole) => {
                matches!(self.wholes.get(whole).map(|whole| whole.origin), Some(Origin::Guest(_)))
            }
            Origin::Issued { .. } => false,
        }
    }

    fn cancel_requests(&mut self, chosen: &[u32]) {
        for &number in chosen {
            let Some(flight) = self.flights.get_mut(number) else { continue };
            if flight.waiting.take().is_some() {
                // It waits for room in an arena: nobody has it yet.
                self.forget_waiting(number);
                self.finish(number, Err(Errno::ECANCELED));
                continue;
            }
            let mut action = flight.flight.handle_cancel().action;
            if let Some(back) = self.leave_cancelled(number) {
                action = back;
            }
            self.carry_out(number, action);
        }
    }

    /// Ends requests whose filter has not even answered a cancel. Those in the store must
    /// be waited for.
    fn abandon_requests(&mut self, chosen: &[u32]) {
        let (mut count, now_ns) = (0, self.now_ns());
        for &number in chosen {
            let Some(flight) = self.flights.get(number) else { continue };
            let Some(visit) = flight.visit else { continue };
            if visit.since_ns.saturating_add(CANCEL_GRACE_NS) > now_ns {
                // It came there only after the cancel, and has the same time.
                continue;
            }
            count += 1;
            if !visit.with {
                // It waits for a filter that does not come back in time.
                self.fail_visit(number, visit.delivery);
                continue;
            }
            let link = self.slot(visit.slot).link;
            let chain = &self.parts.lanes[flight.lane].chain;
            let access = if visit.up {
                chain.data_on_way_up(flight.op, visit.slot)
            } else {
                chain.data_on_way_down(flight.op, visit.slot)
            };
            if flight.slice.is_some() && access == DataAccess::Change {
                // It may still write there, and others shall use the memory.
                self.give_up(link, "it answered neither a request nor its cancel", true);
                continue;
            }
            self.abandoned.insert(visit.delivery.token(), Abandoned { link, held: false });
            self.fail_visit(number, visit.delivery);
            if self.abandoned.values().filter(|late| late.link == link).count() > ABANDONED_MAX {
                self.give_up(link, "it owes too many answers", true);
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
