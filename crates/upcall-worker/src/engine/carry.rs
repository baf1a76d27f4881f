//! Carrying out what flights ask for.

use smallvec::SmallVec;
use upcall_abi::filter::request_flag;
use upcall_abi::ring::{Completion, NO_DATA, Submission, submission_kind};
use upcall_block::{
    Errno, Op, Range, Request, RequestFlags, Status, StoreDone, StoreIo, StoreToken,
};
use upcall_chain::{Action, DataAccess, Entry, Flight, Route, SlotIndex, Verdict};
use upcall_ring::Buffers;

use super::inflight::{InFlight, Origin, Visit};
use super::link::Sent;
use super::message::{self, Delivery, Message};
use super::{Engine, Slot, now_ns};
use crate::config::LogLevel;

/// What a request is, when it begins.
pub(super) struct Begin {
    pub(super) op: Op,
    pub(super) range: Range,
    pub(super) flags: RequestFlags,
    pub(super) data: Buffers,
    pub(super) origin: Origin,
    pub(super) lane: usize,
    /// The slot below which it enters; None: at the top.
    pub(super) below: Option<SlotIndex>,
    pub(super) arrived_ns: u64,
}

impl Engine {
    pub(super) fn begin_guest(&mut self, request: Request) {
        self.parts.request_stats.enter();
        let begin = Begin {
            op: request.op,
            range: request.range,
            flags: request.flags,
            data: request.data,
            origin: Origin::Guest(request.tag),
            lane: 0,
            below: None,
            arrived_ns: now_ns(),
        };
        self.begin(begin);
    }

    /// Lets a request enter its chain.
    pub(super) fn begin(&mut self, begin: Begin) {
        let chain = &self.parts.lanes[begin.lane].chain;
        if begin.op.is_modification() && chain.info().read_only {
            self.end(begin.origin, begin.op, begin.range, begin.arrived_ns, Err(Errno::EROFS));
            return;
        }
        match chain.route(begin.op, begin.below.map_or(Entry::Top, Entry::Below)) {
            Route::Native => self.begin_flight(begin),
            Route::AsWrites => self.begin_whole(begin),
            Route::Withheld => {
                self.end(
                    begin.origin,
                    begin.op,
                    begin.range,
                    begin.arrived_ns,
                    Err(Errno::EOPNOTSUPP),
                );
            }
        }
    }

    pub(super) fn begin_flight(&mut self, begin: Begin) {
        let chain = &self.parts.lanes[begin.lane].chain;
        let entry = begin.below.map_or(Entry::Top, Entry::Below);
        let (flight, action) = Flight::new(chain, begin.op, entry);
        // A part has no data of its own: its zeroes are made in the arena.
        let is_part = matches!(begin.origin, Origin::Part(_));
        let needs_arena =
            begin.range.length() > 0 && (is_part || chain.needs_arena(begin.op, entry));
        let slots = chain.len();
        let number = self.flights.insert(InFlight {
            flight,
            lane: begin.lane,
            op: begin.op,
            range: begin.range,
            flags: begin.flags,
            origin: begin.origin,
            data: begin.data,
            slice: None,
            cookies: SmallVec::from_elem(0, slots),
            visit: None,
            waiting: None,
            arrived_ns: begin.arrived_ns,
            stored_ns: 0,
        });
        if !needs_arena {
            self.carry_out(number, action);
            return;
        }
        let arena = self.arena_of(begin.origin);
        if !self.waiting[arena].is_empty() || !self.make_private(number) {
            if let Some(flight) = self.flights.get_mut(number) {
                flight.waiting = Some(action);
            }
            self.waiting[arena].push_back(number);
            return;
        }
        self.carry_out(number, action);
    }

    fn arena_of(&self, origin: Origin) -> usize {
        match origin {
            Origin::Guest(_) => 0,
            Origin::Issued { .. } => 1,
            Origin::Part(whole) => match self.wholes.get(whole).map(|whole| whole.origin) {
                Some(Origin::Issued { .. }) => 1,
                _ => 0,
            },
        }
    }

    /// Gives a request its private copy in the arena; false if there is no room now.
    fn make_private(&mut self, number: u32) -> bool {
        let Some(origin) = self.flights.get(number).map(|flight| flight.origin) else {
            return true;
        };
        let arena = self.arena_of(origin);
        let (Some(arenas), Some(flight)) = (&mut self.parts.arenas, self.flights.get_mut(number))
        else {
            unreachable!("a chain that needs an arena was started with one");
        };
        let Some(slice) = arenas[arena].allocate(flight.range.length()) else { return false };
        let copy = arenas[arena].buffers(&slice, flight.range.length());
        match flight.op {
            Op::Write if !matches!(flight.origin, Origin::Part(_)) => flight.data.copy_to(&copy),
            // Zeroes to write; or, for a read, nothing of an earlier request for a filter
            // that answers without filling the page.
            _ => copy.zero(),
        }
        flight.slice = Some(slice);
        true
    }

    /// Lets requests go on that waited for room.
    fn retry_waiting(&mut self, arena: usize) {
        while let Some(number) = self.waiting[arena].front().copied() {
            if !self.make_private(number) {
                return;
            }
            self.waiting[arena].pop_front();
            if let Some(action) =
                self.flights.get_mut(number).and_then(|flight| flight.waiting.take())
            {
                self.carry_out(number, action);
            }
        }
    }

    /// Does what a flight asks, and what it asks next, until it waits for somebody.
    pub(super) fn carry_out(&mut self, number: u32, mut action: Action) {
        loop {
            let next = match action {
                Action::Start { slot } => self.deliver(number, slot, None),
                Action::Done { slot, status } => self.deliver(number, slot, Some(status)),
                Action::Store => {
                    self.store(number);
                    None
                }
                Action::Cancel { slot } => {
                    self.send_cancel(number, slot);
                    None
                }
                Action::Complete(status) => {
                    self.finish(number, status);
                    None
                }
                Action::Wait => None,
            };
            match next {
                Some(next) => action = next,
                None => return,
            }
        }
    }

    /// Hands a request to a filter: on its way down, or up with a status. Returns what is
    /// next if the answer is there already.
    fn deliver(&mut self, number: u32, slot: SlotIndex, up: Option<Status>) -> Option<Action> {
        self.serial = self.serial.wrapping_add(1).max(1);
        let delivery = Delivery { request: number, serial: self.serial };
        let flight = self.flights.get_mut(number)?;
        let lane = &self.parts.lanes[flight.lane];
        let Slot { link, instance, stats, .. } = &self.parts.slots[slot.index()];
        let (link, instance) = (*link, *instance);
        stats.enter();
        flight.visit =
            Some(Visit { slot, delivery, up: up.is_some(), since_ns: now_ns(), held_cookie: None });
        if self.parts.links[link].lost {
            return self.leave_lost(number);
        }
        let access = match up {
            None => lane.chain.data_on_way_down(flight.op, slot),
            Some(_) => lane.chain.data_on_way_up(flight.op, slot),
        };
        let data = match &flight.slice {
            Some(slice) if access != DataAccess::None => slice.offset(),
            _ => NO_DATA,
        };
        let submission = Submission {
            kind: if up.is_none() { submission_kind::START } else { submission_kind::DONE },
            op: flight.op as u8,
            flags: raw_flags(flight.flags),
            token: delivery.token(),
            offset: flight.range.offset(),
            length: flight.range.length(),
            status: raw_status(up.unwrap_or(Ok(()))),
            data,
            cookie: if up.is_some() { flight.cookies[slot.index()] } else { 0 },
            instance,
            ..Submission::default()
        };
        match self.parts.links[link].send(&submission) {
            Sent::Queued => None,
            Sent::Answered(entry) => self.answered(link, &entry).map(|(_, action)| action),
        }
    }

    /// An entry of a filter host's completion ring.
    pub(super) fn handle_entry(&mut self, link: usize, entry: &Completion) {
        if let Some((number, action)) = self.answered(link, entry) {
            self.carry_out(number, action);
        }
    }

    /// Checks an entry against what is in flight; what it leads to, if it is a verdict.
    fn answered(&mut self, link: usize, entry: &Completion) -> Option<(u32, Action)> {
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

    /// Whether an entry speaks of a request whose answer is not waited for any more.
    fn is_late(&self, delivery: Delivery) -> bool {
        self.abandoned.contains(&delivery.token())
    }

    fn held(
        &mut self,
        link: usize,
        delivery: Delivery,
        instance: u32,
        cookie: u64,
    ) -> Option<(u32, Action)> {
        let Some(visit) = self.visit_of(link, delivery, instance) else {
            if !self.is_late(delivery) {
                self.violation(link, "it holds a request that it does not have");
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
            if !self.abandoned.remove(&delivery.token()) {
                self.violation(link, "it answered a request that it does not have");
            }
            return None;
        };
        if verdict == Verdict::Hold {
            self.violation(link, "it said hold without a context");
            return None;
        }
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
        if !flight.flight.is_waiting_on(slot) {
            flight.visit = None;
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
        let latency_ns = now_ns().saturating_sub(visit.since_ns);
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
        let lost: Vec<u32> = visits
            .filter(|(_, visit)| which(&slots[visit.slot.index()]))
            .map(|(number, _)| number)
            .collect();
        for number in lost {
            if let Some(action) = self.leave_lost(number) {
                self.carry_out(number, action);
            }
        }
    }

    fn send_cancel(&mut self, number: u32, slot: SlotIndex) {
        let Some(visit) = self.flights.get(number).and_then(|flight| flight.visit) else { return };
        let (link, instance) = (self.slot(slot).link, self.slot(slot).instance);
        let submission = Submission {
            kind: submission_kind::CANCEL,
            token: visit.delivery.token(),
            data: NO_DATA,
            cookie: visit.held_cookie.unwrap_or(0),
            instance,
            ..Submission::default()
        };
        if let Sent::Answered(entry) = self.parts.links[link].send(&submission) {
            self.handle_entry(link, &entry);
        }
    }

    fn store(&mut self, number: u32) {
        let Some(flight) = self.flights.get_mut(number) else { return };
        let data = match (&flight.slice, &self.parts.arenas) {
            (Some(slice), Some(arenas)) => arenas[0].buffers(slice, flight.range.length()),
            // Nobody else looks at it: straight between its issuer and the store.
            _ => std::mem::take(&mut flight.data),
        };
        flight.stored_ns = now_ns();
        self.parts.store_stats.enter();
        self.parts.lanes[flight.lane].store.submit(StoreIo {
            token: StoreToken(u64::from(number)),
            op: flight.op,
            range: flight.range,
            flags: flight.flags,
            data,
        });
    }

    pub(super) fn handle_stored(&mut self, done: StoreDone) {
        let number = done.token.0 as u32;
        let Some(flight) = self.flights.get_mut(number) else { return };
        let latency_ns = now_ns().saturating_sub(flight.stored_ns);
        let bytes = u64::from(flight.range.length());
        self.parts.store_stats.leave(flight.op as u8, bytes, latency_ns, done.status.is_err());
        let action = flight.flight.handle_store(done.status).action;
        self.carry_out(number, action);
    }

    /// The flight has ended: its memory goes back, and who waits for it is told.
    pub(super) fn finish(&mut self, number: u32, status: Status) {
        let Some(mut flight) = self.flights.remove(number) else { return };
        let arena = self.arena_of(flight.origin);
        debug_assert!(flight.visit.is_none(), "a flight ends when nobody has it");
        if let (Some(slice), Some(arenas)) = (flight.slice.take(), &mut self.parts.arenas) {
            if flight.op == Op::Read && status.is_ok() {
                arenas[arena].buffers(&slice, flight.range.length()).copy_to(&flight.data);
            }
            arenas[arena].free(slice);
            self.end(flight.origin, flight.op, flight.range, flight.arrived_ns, status);
            self.retry_waiting(arena);
            return;
        }
        self.end(flight.origin, flight.op, flight.range, flight.arrived_ns, status);
    }

    /// Tells who waits for a request how it ended.
    pub(super) fn end(
        &mut self,
        origin: Origin,
        op: Op,
        range: Range,
        arrived_ns: u64,
        status: Status,
    ) {
        match origin {
            Origin::Guest(tag) => {
                self.guest_requests -= 1;
                let latency_ns = now_ns().saturating_sub(arrived_ns);
                self.parts.request_stats.leave(
                    op as u8,
                    u64::from(range.length()),
                    latency_ns,
                    status.is_err(),
                );
                if let Some(queue) = &mut self.frontend {
                    queue.complete(tag, status);
                }
            }
            Origin::Part(whole) => self.part_ended(whole, status),
            Origin::Issued { link, instance, id, .. } => {
                self.issued_ended(link, instance, id, status)
            }
        }
    }
}

/// As on the rings.
fn raw_flags(flags: RequestFlags) -> u16 {
    let fua = if flags.fua { request_flag::FUA } else { 0 };
    let unmap = if flags.unmap { request_flag::UNMAP } else { 0 };
    fua | unmap
}

/// 0 or a negative errno, as on the rings.
pub(super) fn raw_status(status: Status) -> i32 {
    status.map_or_else(|errno| -errno.raw(), |()| 0)
}
