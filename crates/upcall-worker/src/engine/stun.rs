//! Stunning a queue thread, and giving its disk another chain meanwhile.
//!
//! A stunned thread takes nothing more from the frontend. Once nothing is in flight it is
//! *still*: it looks at no ring and no store either, and obeys only whoever stunned it. What a
//! filter issues meanwhile stays in its ring until the disk goes on.
//!
//! Always true: a flight ends on the make-up on which it began, with one exception that
//! changes nothing for it: a request that waits for a filter whose host is dead may go on with
//! the instance that takes that filter's place, as after a restart, if the two chains are of
//! one shape.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use upcall_chain::{Action, Chain, OnFailure, SlotIndex};
use upcall_ring::Arena;

use super::inflight::{InFlight, Waiting};
use super::{Command, Engine, Link, Slot};
use crate::plant::is_planted;

/// Another make-up of a disk's chain, for one queue thread.
pub(crate) struct MakeUp {
    pub(crate) chain: Arc<Chain>,
    /// In the order of the chain.
    pub(crate) slots: Vec<NextSlot>,
    /// For a disk that had none yet; else empty.
    pub(crate) arenas: Vec<Arena>,
}

/// A place in the next make-up.
pub(crate) enum NextSlot {
    /// That of an instance that stays.
    Stays { instance: u32, on_failure: OnFailure, deadline_ns: u64, keeps_images: bool },
    /// That of a new instance, whose link is its own. It goes on with the counters and the
    /// record of gaps of the one that it `replaces`.
    New { slot: Box<Slot>, link: Box<Link>, replaces: Option<u32> },
}

/// What whoever stuns a thread allows.
#[derive(Clone, Debug, Default)]
pub(crate) struct MayStay {
    /// Requests may wait at these instances if their host is dead: another takes its place.
    pub(crate) replaced: Vec<u32>,
    /// Requests that wait at these, whose host is dead, go past them: they leave the chain.
    pub(crate) leaving: Vec<u32>,
}

/// How far a stun has come.
pub(super) enum Stun {
    /// What is in flight ends.
    Draining { may_stay: MayStay, reply: SyncSender<()> },
    /// Nothing happens. What others ask meanwhile is done later.
    Still { later: Vec<Command> },
}

/// Where a request is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    /// With an instance's filter, which may hold it.
    Filter {
        instance: u32,
        is_held: bool,
    },
    /// It waits for a filter that is gone.
    AwaitsFilter {
        instance: u32,
    },
    Store,
    /// It waits for room for its data.
    AwaitsRoom,
}

/// A request in flight, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FlightReport {
    pub(crate) op: upcall_block::Op,
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u32,
    pub(crate) whereabouts: Whereabouts,
    /// For how long it has been there.
    pub(crate) there_ns: u64,
    /// Since its arrival.
    pub(crate) age_ns: u64,
    /// A filter issued it.
    pub(crate) is_issued: bool,
}

impl Engine {
    pub(super) fn begin_stun(&mut self, may_stay: MayStay, reply: SyncSender<()>) {
        debug_assert!(self.stun.is_none(), "one change at a time");
        self.stun = Some(Stun::Draining { may_stay, reply });
    }

    pub(super) fn is_still(&self) -> bool {
        matches!(self.stun, Some(Stun::Still { .. }))
    }

    /// Carries a stun forward; true if it did something.
    pub(super) fn check_stun(&mut self) -> bool {
        let Some(Stun::Draining { may_stay, .. }) = &self.stun else { return false };
        let leaving: Vec<u32> =
            self.parked(&may_stay.leaving).into_iter().map(|(number, _)| number).collect();
        if !leaving.is_empty() {
            for number in leaving {
                // Recorded, where that is to be known: the change may yet be given up.
                let action = match is_planted("leave-unrecorded") {
                    true => self.pass_by(number),
                    false => self.skip(number),
                };
                if let Some(action) = action {
                    self.carry_out(number, action);
                }
            }
            return true;
        }
        let parked = self.parked(&may_stay.replaced).len();
        let waits = |flight: &InFlight| flight.waiting.is_some();
        let waiting = self.flights.iter().filter(|(_, flight)| waits(flight)).count();
        // Those that wait for room only wait for those that are parked.
        let may_wait = if parked > 0 { waiting } else { 0 };
        let is_quieting = self.parts.links.iter().any(|link| link.is_quieting);
        let is_busy = parked + may_wait < self.flights.len() || (parked > 0 && is_quieting);
        if is_busy && !is_planted("still-too-early") {
            return false;
        }
        if let Some(Stun::Draining { reply, .. }) =
            self.stun.replace(Stun::Still { later: Vec::new() })
        {
            // Whoever asked may have lost patience: then it says so.
            let _ = reply.send(());
        }
        true
    }

    /// The requests that wait at these instances for a host that is dead.
    fn parked(&self, instances: &[u32]) -> Vec<(u32, SlotIndex)> {
        let parked = self.flights.iter().filter_map(|(number, flight)| {
            let visit = flight.visit.filter(|visit| !visit.with && !visit.is_marking)?;
            let slot = self.slot(visit.slot);
            let is_dead = self.parts.links[slot.link].is_dead();
            (is_dead && instances.contains(&slot.instance)).then_some((number, visit.slot))
        });
        parked.collect()
    }

    /// Goes on: with the make-up that there is now.
    pub(super) fn end_stun(&mut self) {
        if let Some(Stun::Still { later }) = self.stun.take() {
            later.into_iter().for_each(|command| self.obey_one(command));
        }
    }

    /// Puts off what is not to be done while the thread is still; gives back what is.
    pub(super) fn put_off(&mut self, command: Command) -> Option<Command> {
        match (&mut self.stun, command) {
            (
                Some(Stun::Still { .. }),
                command @ (Command::Swap { .. } | Command::Unstun | Command::Report { .. }),
            ) => Some(command),
            (Some(Stun::Still { later }), command) => {
                later.push(command);
                None
            }
            (_, command) => Some(command),
        }
    }

    /// An instance has proven itself, or nobody else can take its place: its policy counts.
    pub(super) fn end_trial(&mut self, instance: u32) {
        let Some(place) = self.parts.slots.iter().position(|slot| slot.instance == instance) else {
            return;
        };
        let slot = &mut self.parts.slots[place];
        slot.is_on_trial = false;
        let link = slot.link;
        if self.parts.links[link].is_dead() {
            for number in self.visitors(link) {
                let action = self.go_without(number);
                self.carry_out(number, action.unwrap_or(Action::Wait));
            }
        }
    }

    /// Takes on another make-up. Only while still.
    pub(super) fn swap(&mut self, make_up: MakeUp) {
        assert!(self.is_still(), "a make-up changes while nothing is in flight");
        let MakeUp { chain, slots, arenas } = make_up;
        if !arenas.is_empty() {
            assert!(self.parts.arenas.is_empty(), "a disk's arenas stay");
            self.waiting.resize_with(arenas.len(), Waiting::default);
            self.parts.arenas = arenas;
        }
        let was = match is_planted("swap-without-chain") {
            true => self.parts.lanes[0].chain.clone(),
            false => std::mem::replace(&mut self.parts.lanes[0].chain, chain.clone()),
        };
        let mut old: Vec<Option<Slot>> =
            std::mem::take(&mut self.parts.slots).into_iter().map(Some).collect();
        let mut take = |instance: u32| {
            let is_it =
                |slot: &&mut Option<Slot>| slot.as_ref().is_some_and(|s| s.instance == instance);
            old.iter_mut().find(is_it).and_then(Option::take)
        };
        let mut replaced = Vec::new();
        for next in slots {
            let slot = match next {
                NextSlot::Stays { instance, on_failure, deadline_ns, keeps_images } => {
                    let Some(slot) = take(instance) else { unreachable!("it was there") };
                    Slot { on_failure, deadline_ns, keeps_images, ..slot }
                }
                NextSlot::New { mut slot, link, replaces } => {
                    if let Some(before) = replaces.and_then(&mut take) {
                        slot.stats = before.stats;
                        slot.gaps = slot.gaps.or(before.gaps);
                        replaced.extend(SlotIndex::new(self.parts.slots.len()));
                    }
                    slot.link = self.parts.links.len();
                    self.parts.links.push(*link);
                    *slot
                }
            };
            self.parts.slots.push(slot);
        }
        if self.flights.len() == 0 {
            self.forget_links();
        } else {
            self.retire_links();
            self.adopt(&was, &chain, &replaced);
        }
    }

    /// Drops the links that no slot has any more. Only when nothing is in flight.
    fn forget_links(&mut self) {
        let mut links: Vec<Option<Link>> =
            std::mem::take(&mut self.parts.links).into_iter().map(Some).collect();
        let mut places = vec![None; links.len()];
        for slot in &mut self.parts.slots {
            if let Some(link) = links[slot.link].take() {
                places[slot.link] = Some(self.parts.links.len());
                self.parts.links.push(link);
            }
            slot.link = places[slot.link].unwrap_or_default();
        }
        self.abandoned.retain(|_, late| match places[late.link] {
            Some(place) => {
                late.link = place;
                true
            }
            None => false,
        });
        // A host that died and whose slots have gone is waited for no longer.
        for link in links.into_iter().flatten().filter(|link| link.is_quieting) {
            let (host, life) = (link.host, link.life);
            (self.parts.tell)(crate::hosts::HostNews::Quiet { host, life });
        }
    }

    /// Links that no slot has stay where they are while requests may name them. Nobody is behind
    /// them: a thread that waited for room in such a ring would never sleep long again.
    fn retire_links(&mut self) {
        for (index, link) in self.parts.links.iter_mut().enumerate() {
            if !self.parts.slots.iter().any(|slot| slot.link == index) {
                link.retire();
            }
        }
    }

    /// Lets the requests that are parked go on with the instances that are there now.
    fn adopt(&mut self, was: &Chain, chain: &Chain, replaced: &[SlotIndex]) {
        for (_, flight) in self.flights.iter_mut().filter(|(_, flight)| flight.lane == 0) {
            flight.flight.handle_adoption(was, chain);
            for slot in replaced {
                flight.void_cookie(*slot);
            }
        }
        for slot in replaced {
            let link = self.slot(*slot).link;
            self.go_on_with(link);
        }
    }

    /// What is in flight here, the oldest first.
    pub(super) fn report(&self) -> Vec<FlightReport> {
        let now_ns = self.now_ns();
        let mut all: Vec<FlightReport> = self
            .flights
            .iter()
            .map(|(_, flight)| {
                let (whereabouts, since_ns) = self.whereabouts(flight);
                FlightReport {
                    op: flight.op,
                    offset_bytes: flight.range.offset(),
                    length_bytes: flight.range.length(),
                    whereabouts,
                    there_ns: now_ns.saturating_sub(since_ns),
                    age_ns: now_ns.saturating_sub(flight.arrived_ns),
                    is_issued: matches!(flight.origin, super::inflight::Origin::Issued { .. }),
                }
            })
            .collect();
        all.sort_by_key(|flight| std::cmp::Reverse(flight.age_ns));
        all
    }

    fn whereabouts(&self, flight: &InFlight) -> (Whereabouts, u64) {
        match flight.visit {
            _ if flight.waiting.is_some() => (Whereabouts::AwaitsRoom, flight.arrived_ns),
            None => (Whereabouts::Store, flight.stored_ns),
            Some(visit) => {
                let instance = self.slot(visit.slot).instance;
                let whereabouts = match visit.with {
                    true => Whereabouts::Filter { instance, is_held: flight.flight.is_held() },
                    false => Whereabouts::AwaitsFilter { instance },
                };
                (whereabouts, visit.since_ns)
            }
        }
    }

    /// Hands the requests that wait at a link's slots to the instances that are there.
    pub(super) fn go_on_with(&mut self, link: usize) {
        for number in self.visitors(link) {
            let Some(flight) = self.flights.get_mut(number) else { continue };
            let Some(visit) = flight.visit.filter(|visit| !visit.with) else { continue };
            let action = flight.flight.handle_restart(visit.slot).action;
            if !flight.flight.is_waiting_on(visit.slot) {
                self.leave(number, true);
            }
            self.carry_out(number, action);
        }
    }
}

/// A slot's deadline as queue threads count it.
pub(crate) fn deadline_ns(deadline_ms: u64, is_inline: bool) -> u64 {
    match deadline_ms {
        0 => u64::MAX,
        _ if is_inline => u64::MAX,
        ms => ms.saturating_mul(1_000_000),
    }
}

/// Reports of several threads are asked for at once.
pub(crate) type ReportReply = SyncSender<Vec<FlightReport>>;
