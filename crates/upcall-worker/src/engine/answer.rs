//! What filter hosts say, checked against what is in flight, and told to the flights.

use upcall_abi::ring::Completion;
use upcall_block::Op;
use upcall_chain::{Action, SlotIndex, Verdict};

use super::inflight::Visit;
use super::message::{self, Delivery, Message};
use super::{Engine, Slot};
use crate::config::LogLevel;

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
        (visit.delivery == delivery && slot.link == link && slot.instance == instance)
            .then_some(visit)
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
        let Some(visit) = self.visit_of(link, delivery, instance).copied() else {
            if self.abandoned.get(&delivery.token()).is_some_and(|late| late.link == link) {
                self.abandoned.remove(&delivery.token());
            } else {
                self.violation(link, "it answered a request that it does not have");
            }
            return None;
        };
        // A hold has an entry of its own kind, and a context.
        let verdict = if verdict == Verdict::Hold { Verdict::Nonsense } else { verdict };
        let number = delivery.request;
        let flight = self.flights.get_mut(number)?;
        flight.visit = None;
        if verdict == Verdict::Watch {
            flight.cookies[visit.slot.index()] = cookie;
        }
        let (op, bytes) = (flight.op, flight.range.length());
        let failed = matches!(verdict, Verdict::Fail(_) | Verdict::Nonsense);
        self.count_visit(&visit, op, bytes, failed);
        self.judge(link, number, visit.slot, verdict)
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
        let left = !flight.flight.is_waiting_on(slot);
        let (op, bytes) = (flight.op, flight.range.length());
        // A hold that broke a rule ends the visit too.
        if let Some(visit) = if left { flight.visit.take() } else { None } {
            self.count_visit(&visit, op, bytes, true);
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
            self.give_up(link, "it broke too many rules");
        }
    }

    /// The filter that a request is with will not answer.
    pub(super) fn leave_lost(&mut self, number: u32) -> Option<Action> {
        let flight = self.flights.get_mut(number)?;
        let visit = flight.visit.take()?;
        let action = flight.flight.handle_lost(visit.slot).action;
        let (op, bytes) = (flight.op, flight.range.length());
        self.count_visit(&visit, op, bytes, true);
        Some(action)
    }

    /// Counts a visit that has ended.
    fn count_visit(&self, visit: &Visit, op: Op, bytes: u32, failed: bool) {
        let latency_ns = self.now_ns().saturating_sub(visit.since_ns);
        let stats = &self.slot(visit.slot).stats;
        if visit.up {
            stats.leave_again(op as u8, latency_ns, failed);
        } else {
            stats.leave(op as u8, u64::from(bytes), latency_ns, failed);
        }
    }

    /// Ends the visits to some slots without their answers.
    pub(super) fn fail_visits(&mut self, which: impl Fn(&Slot) -> bool) {
        let slots = &self.parts.slots;
        let visits = self
            .flights
            .iter()
            .filter_map(|(number, flight)| Some((number, flight.visit.as_ref()?)));
        let lost: Vec<(u32, Delivery)> = visits
            .filter(|(_, visit)| which(&slots[visit.slot.index()]))
            .map(|(number, visit)| (number, visit.delivery))
            .collect();
        for (number, delivery) in lost {
            self.fail_visit(number, delivery);
        }
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
