//! What filter hosts say, checked against what is in flight, and told to the flights.

use upcall_abi::ring::Completion;
use upcall_chain::{Action, SlotIndex, Verdict};

use super::Engine;
use super::inflight::Visit;
use super::message::{self, Delivery, Message};
use crate::config::LogLevel;
use crate::plant::is_planted;

impl Engine {
    /// An entry of a filter host's completion ring.
    pub(super) fn handle_entry(&mut self, link: usize, entry: &Completion) {
        if let Some((number, action)) = self.answered(link, entry) {
            self.carry_out(number, action);
        }
    }

    /// Checks an entry against what is in flight; what it leads to, if it is a verdict.
    pub(super) fn answered(&mut self, link: usize, entry: &Completion) -> Option<(u32, Action)> {
        match message::parse(entry) {
            Ok(Message::Verdict { delivery, instance, verdict, cookie }) => {
                self.verdict(link, delivery, instance, verdict, cookie)
            }
            Ok(Message::Held { delivery, instance, cookie }) => {
                self.held(link, delivery, instance, cookie)
            }
            Ok(Message::Issue { instance, issue }) => {
                self.handle_issue(link, instance, issue);
                None
            }
            Err(malformed) => {
                self.violation(link, malformed.0);
                None
            }
        }
    }

    /// The visit that an entry speaks of, if it is one of this link and instance.
    fn visit_of(&mut self, link: usize, delivery: Delivery, instance: u32) -> Option<&mut Visit> {
        let slots = &self.parts.slots;
        let visit = self.flights.get_mut(delivery.request)?.visit.as_mut()?;
        let slot = &slots[visit.slot.index()];
        let is_last = visit.delivery == delivery || is_planted("verdict-of-the-dead");
        (visit.with && is_last && slot.link == link && slot.instance == instance).then_some(visit)
    }

    fn held(
        &mut self,
        link: usize,
        delivery: Delivery,
        instance: u32,
        cookie: u64,
    ) -> Option<(u32, Action)> {
        let Some(visit) = self.visit_of(link, delivery, instance) else {
            match self.abandoned.get_mut(&delivery.token()) {
                Some(late) if late.link == link && !late.held => {
                    late.held = true;
                    self.cancel(link, instance, delivery, cookie);
                }
                _ => self.violation(link, "it holds a request that it does not have"),
            }
            return None;
        };
        visit.held_cookie = Some(cookie);
        let slot = visit.slot;
        if self.fails_trial(link, delivery.request, slot, Verdict::Hold) {
            return None;
        }
        self.judge(link, delivery.request, slot, Verdict::Hold)
    }

    fn verdict(
        &mut self,
        link: usize,
        delivery: Delivery,
        instance: u32,
        verdict: Verdict,
        cookie: u64,
    ) -> Option<(u32, Action)> {
        let Some(visit) = self.visit_of(link, delivery, instance) else {
            if self.abandoned.get(&delivery.token()).is_some_and(|late| late.link == link) {
                self.abandoned.remove(&delivery.token());
            } else {
                self.violation(link, "it answered a request that it does not have");
            }
            return None;
        };
        let slot = visit.slot;
        // A hold has an entry of its own kind, and a context.
        let verdict = if verdict == Verdict::Hold { Verdict::Nonsense } else { verdict };
        let number = delivery.request;
        if self.fails_trial(link, number, slot, verdict) {
            return None;
        }
        let failed = matches!(verdict, Verdict::Fail(_) | Verdict::Nonsense);
        self.leave(number, failed)?;
        if verdict == Verdict::Watch {
            let flight = self.flights.get_mut(number)?;
            flight.keep_cookie(slot, cookie);
            flight.void.remove(slot);
        }
        self.judge(link, number, slot, verdict)
    }

    /// Whether a filter on trial says what would show the guest an error. Then its host is given
    /// up, and the request waits for who takes its place. What it says counts as little while it is
    /// to be killed, and what it said before its death, of which this thread may hear late.
    fn fails_trial(&mut self, link: usize, number: u32, slot: SlotIndex, verdict: Verdict) -> bool {
        if !self.slot(slot).is_on_trial {
            return false;
        }
        let Some(flight) = self.flights.get(number) else { return false };
        let chain = &self.parts.lanes[flight.lane].chain;
        let fails = !flight.flight.is_cancelled()
            && (matches!(verdict, Verdict::Fail(_))
                || flight.flight.violation_of(chain, slot, verdict).is_some());
        let is_first = self.parts.links[link].is_up();
        if fails && is_first {
            self.give_up(link, "it failed a request while it was on trial", false);
        }
        fails && (is_first || !is_planted("trial-shows-late-failure"))
    }

    /// Tells a flight what its filter said.
    fn judge(
        &mut self,
        link: usize,
        number: u32,
        slot: SlotIndex,
        verdict: Verdict,
    ) -> Option<(u32, Action)> {
        let flight = self.flights.get_mut(number)?;
        let chain = &self.parts.lanes[flight.lane].chain;
        let step = flight.flight.handle_verdict(chain, slot, verdict);
        // A hold that broke a rule ends the visit too.
        if !flight.flight.is_waiting_on(slot) {
            self.leave(number, true);
        }
        if let Some(violation) = step.violation {
            self.violation(link, &violation.to_string());
        }
        Some((number, step.action))
    }

    /// Counts a broken rule and says so; too many, and the filter host is given up.
    pub(super) fn violation(&mut self, link: usize, what: &str) {
        for slot in self.parts.slots.iter().filter(|slot| slot.link == link) {
            slot.stats.violation();
        }
        let name = self.parts.links[link].name.clone();
        self.log(LogLevel::Warn, &format!("filter {name} broke a rule: {what}"));
        if self.parts.links[link].violation() {
            self.give_up(link, "it broke too many rules", false);
        }
    }

    /// The filter that a request is with will not answer.
    pub(super) fn leave_lost(&mut self, number: u32) -> Option<Action> {
        let visit = self.leave(number, true)?;
        let flight = self.flights.get_mut(number)?;
        Some(flight.flight.handle_lost(visit.slot).action)
    }

    /// A visit has ended: it is counted, and what was kept for another delivery goes.
    pub(super) fn leave(&mut self, number: u32, failed: bool) -> Option<Visit> {
        let now_ns = self.seen_ns;
        let flight = self.flights.get_mut(number)?;
        let visit = flight.visit.take()?;
        self.images.drop(std::mem::take(&mut flight.image));
        let latency_ns = now_ns.saturating_sub(visit.since_ns);
        let stats = &self.parts.slots[visit.slot.index()].stats;
        if visit.up {
            stats.leave_again(flight.op as u8, latency_ns, failed);
        } else {
            let bytes = u64::from(flight.range.length());
            stats.leave(flight.op as u8, bytes, latency_ns, failed);
        }
        Some(visit)
    }

    /// Ends one visit without its answer, if it has not ended yet.
    pub(super) fn fail_visit(&mut self, number: u32, delivery: Delivery) {
        let visit = self.flights.get(number).and_then(|flight| flight.visit);
        if visit.is_some_and(|visit| visit.delivery == delivery)
            && let Some(action) = self.leave_lost(number)
        {
            self.carry_out(number, action);
        }
    }
}
