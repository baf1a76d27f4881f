//! The lives of filter hosts: what becomes of requests when a host dies, while it is gone, and
//! when another one has taken its place (rules 5 and 6).
//!
//! Always true: what a host said before it died counts, and nothing that is said in its name
//! afterwards; a request is delivered to a new instance only when the old one is dead, and
//! what the old one had issued has ended, so that nothing of it comes late; requests come to
//! the new instance in the order in which they came to the slot.

use upcall_block::Errno;
use upcall_chain::{Action, OnFailure, SlotIndex};

use super::Engine;
use super::inflight::Origin;
use super::link::{Life, Way};
use crate::config::LogLevel;
use crate::hosts::{HostId, HostNews};
use crate::plant::is_planted;

impl Engine {
    /// Has a filter host killed. Requests that are with it wait for its death. `is_heard`:
    /// what it says until then still counts.
    pub(super) fn give_up(&mut self, link: usize, reason: &str, is_heard: bool) {
        let link = &mut self.parts.links[link];
        if link.is_dead() {
            return;
        }
        link.condemn(is_heard);
        let (host, life) = (link.host, link.life);
        let news = HostNews::GiveUp { host, life, reason: reason.to_owned() };
        if !(self.parts.tell)(news) {
            // Everything ends, and nobody watches the hosts any more.
            self.lose(host, life, true);
        }
    }

    /// A life of a filter host is over: the process is dead. `is_for_good`: no other follows.
    pub(super) fn lose(&mut self, host: HostId, life: Life, is_for_good: bool) {
        let mut links = self.parts.links.iter();
        let Some(link) = links.position(|link| link.host == host && link.life == life) else {
            // Its slots have left the chain, and nothing of it is here.
            if !is_for_good {
                (self.parts.tell)(HostNews::Quiet { host, life });
            }
            return;
        };
        if self.parts.links[link].is_dead() {
            return;
        }
        self.drain(link);
        self.parts.links[link].end_drain(is_for_good);
        self.abandoned.retain(|_, late| late.link != link);
        for slot in self.parts.slots.iter_mut().filter(|slot| slot.link == link) {
            slot.detached |= slot.on_failure == OnFailure::Detach && !slot.is_on_trial;
        }
        self.forget_contexts(link);
        for number in self.visitors(link) {
            let action = self.go_without(number);
            self.carry_out(number, action.unwrap_or(Action::Wait));
        }
        self.end_orphans();
    }

    /// Hears what a dead host said while it lived.
    fn drain(&mut self, link: usize) {
        // A ring that somebody else still writes to ends too.
        for _ in 0..self.parts.links[link].begin_drain() {
            let Some(entry) = self.parts.links[link].receive() else { break };
            self.handle_entry(link, &entry);
        }
    }

    /// What the dead instances stored with their watches means nothing to the next ones.
    fn forget_contexts(&mut self, link: usize) {
        let slots = self.parts.slots.iter().enumerate();
        let lost: Vec<SlotIndex> = slots
            .filter(|(_, slot)| slot.link == link)
            .filter_map(|(index, _)| SlotIndex::new(index))
            .collect();
        for (_, flight) in self.flights.iter_mut().filter(|(_, flight)| flight.lane == 0) {
            for slot in &lost {
                flight.void_cookie(*slot);
            }
        }
    }

    /// The requests that are at the slots of a link, in the order in which they came there.
    pub(super) fn visitors(&self, link: usize) -> Vec<u32> {
        let mut visitors: Vec<(u64, u32)> = self
            .flights
            .iter()
            .filter_map(|(number, flight)| Some((number, flight.visit.as_ref()?)))
            .filter(|(_, visit)| self.slot(visit.slot).link == link)
            .map(|(number, visit)| (visit.order, number))
            .collect();
        visitors.sort_unstable();
        if is_planted("retry-out-of-order") {
            visitors.reverse();
        }
        visitors.into_iter().map(|(_, number)| number).collect()
    }

    /// A request is at a slot whose filter is not there: what the slot's policy makes of it.
    /// Returns what is next, unless it waits.
    pub(super) fn go_without(&mut self, number: u32) -> Option<Action> {
        let flight = self.flights.get_mut(number)?;
        let visit = flight.visit.as_mut()?;
        let slot = &self.parts.slots[visit.slot.index()];
        let link = &self.parts.links[slot.link];
        if visit.with && !link.is_dead() {
            // It is with one that is about to be killed, and waits for its death.
            return None;
        }
        (visit.with, visit.held_cookie) = (false, None);
        let policy = match slot.on_failure {
            _ if slot.is_on_trial => OnFailure::Hold,
            _ if slot.detached => OnFailure::Detach,
            _ if link.is_gone_for_good() => OnFailure::Fail,
            policy => policy,
        };
        match policy {
            OnFailure::Hold => {
                let is_over = flight.flight.is_cancelled() || self.is_orphan(number);
                if is_over { self.leave_cancelled(number) } else { None }
            }
            OnFailure::Fail => self.leave_lost(number),
            OnFailure::Bypass | OnFailure::Detach => self.skip(number),
        }
    }

    /// A request that nobody wants any more, at a slot whose filter is not there, turns
    /// back. One that is on its way up waits: the next instance is told of it.
    pub(super) fn leave_cancelled(&mut self, number: u32) -> Option<Action> {
        let flight = self.flights.get_mut(number)?;
        let visit = flight.visit.filter(|visit| !visit.with && !visit.up)?;
        let _ = flight.flight.handle_cancel();
        let action = flight.flight.handle_restart(visit.slot).action;
        self.leave(number, true);
        Some(action)
    }

    /// The filter that a request is at is skipped, when what it misses is recorded.
    pub(super) fn skip(&mut self, number: u32) -> Option<Action> {
        if self.is_recorded(number) { self.pass_by(number) } else { None }
    }

    /// A request goes past the slot that it is at.
    pub(super) fn pass_by(&mut self, number: u32) -> Option<Action> {
        let flight = self.flights.get_mut(number)?;
        let visit = flight.visit?;
        let chain = &self.parts.lanes[flight.lane].chain;
        let action = flight.flight.handle_skip(chain, visit.slot).action;
        self.slot(visit.slot).stats.skip();
        self.leave(number, false);
        Some(action)
    }

    /// Another life of a filter host serves: it gets what the last one had not answered.
    pub(super) fn revive(&mut self, host: HostId, life: Life, way: Way) {
        let Some(link) = self.parts.links.iter().position(|link| link.host == host) else {
            return;
        };
        self.parts.links[link].revive(life, way);
        self.go_on_with(link);
    }

    /// Whether a request was issued by a filter whose host has died since.
    pub(super) fn is_orphan(&self, number: u32) -> bool {
        let origin = self.flights.get(number).map(|flight| flight.origin);
        origin.is_some_and(|origin| self.is_orphaned(origin))
    }

    pub(super) fn is_orphaned(&self, origin: Origin) -> bool {
        match origin {
            Origin::Guest(_) => false,
            Origin::Part(whole) => {
                let whole = self.wholes.get(whole).map(|whole| whole.origin);
                whole.is_some_and(|origin| self.is_orphaned(origin))
            }
            Origin::Issued { link, life, .. } => {
                let link = &self.parts.links[link];
                link.life != life || link.is_dead()
            }
        }
    }

    /// What dead hosts had issued and waits for a filter that is not there ends: nobody wants
    /// it, and it would hold up the next instance. The rest finishes.
    fn end_orphans(&mut self) {
        let numbers: Vec<u32> = self.flights.iter().map(|(number, _)| number).collect();
        for number in numbers {
            if self.is_orphan(number)
                && let Some(action) = self.leave_cancelled(number)
            {
                self.carry_out(number, action);
            }
        }
    }

    /// It waits for room in an arena no longer.
    pub(super) fn forget_waiting(&mut self, number: u32) {
        for waiting in &mut self.waiting {
            waiting.requests.retain(|other| *other != number);
        }
    }

    /// Says of hosts that have died when nothing that they had issued can reach a store any
    /// more; true if it did something.
    pub(super) fn check_quiet(&mut self) -> bool {
        let mut busy = false;
        for link in 0..self.parts.links.len() {
            if !self.parts.links[link].is_quieting {
                continue;
            }
            let unquiet: Vec<u32> = self.unquiet(link).collect();
            let waits = |number: &u32| {
                self.flights.get(*number).is_some_and(|flight| flight.waiting.is_some())
            };
            if unquiet.is_empty() {
                let link = &mut self.parts.links[link];
                link.is_quieting = false;
                let (host, life) = (link.host, link.life);
                (self.parts.tell)(HostNews::Quiet { host, life });
                busy = true;
            } else if unquiet.iter().all(waits) {
                // They wait for room that only the next instance would give back.
                self.end_waiting(&unquiet);
                busy = true;
            }
        }
        busy
    }

    /// What the filters of a link issued, without what can do no more: on its way up it
    /// waits for a filter that is not there.
    fn unquiet(&self, link: usize) -> impl Iterator<Item = u32> {
        let issued = move |origin| match origin {
            Origin::Issued { link: by, .. } => by == link,
            _ => false,
        };
        let flights = self.flights.iter().filter(move |(_, flight)| match flight.origin {
            Origin::Part(whole) => self.wholes.get(whole).is_some_and(|whole| issued(whole.origin)),
            origin => issued(origin),
        });
        flights
            .filter(|(_, flight)| !flight.visit.is_some_and(|visit| visit.up && !visit.with))
            .map(|(number, _)| number)
    }

    fn end_waiting(&mut self, numbers: &[u32]) {
        for number in numbers {
            let waiting = self.flights.get_mut(*number).and_then(|flight| flight.waiting.take());
            if waiting.is_some() {
                self.forget_waiting(*number);
                self.finish(*number, Err(Errno::ECANCELED));
            }
        }
    }

    /// Gives up the hosts that have not answered in time.
    pub(super) fn check_deadlines(&mut self) -> bool {
        if self.seen_ns < self.due_at_ns {
            return false;
        }
        self.due_at_ns = u64::MAX;
        let mut late = Vec::new();
        for (number, flight) in self.flights.iter() {
            let Some(visit) = flight.visit.filter(|visit| visit.with) else { continue };
            let link = self.slot(visit.slot).link;
            if !self.parts.links[link].is_up() {
                continue;
            }
            if visit.due_ns > self.seen_ns {
                self.due_at_ns = self.due_at_ns.min(visit.due_ns);
            } else if !late.iter().any(|(other, _)| *other == link) {
                late.push((link, number));
            }
        }
        for (link, number) in &late {
            let Some(flight) = self.flights.get(*number) else { continue };
            let Some(visit) = flight.visit else { continue };
            let reason = format!(
                "it has not answered a {} of {} bytes at {} within {} ms{}",
                flight.op,
                flight.range.length(),
                flight.range.offset(),
                self.slot(visit.slot).deadline_ns / 1_000_000,
                if flight.flight.is_held() { ", and holds it" } else { "" },
            );
            self.log(LogLevel::Warn, &format!("filter {} hangs: {reason}", self.name_of(*link)));
            self.give_up(*link, &reason, true);
        }
        !late.is_empty()
    }

    fn name_of(&self, link: usize) -> &str {
        &self.parts.links[link].name
    }
}
