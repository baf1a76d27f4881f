//! How a request begins: its way through the chain is chosen, and where filters look at its
//! data, it gets a private copy in an arena, or waits until there is room for one.

use upcall_block::{Errno, Op, Range, Request, RequestFlags};
use upcall_chain::{Entry, Flight, Route, SlotIndex};
use upcall_ring::Buffers;

use super::Engine;
use super::inflight::{InFlight, Origin};
use crate::plant::is_planted;

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
            arrived_ns: self.seen_ns,
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
        let origin = begin.origin;
        let number = self.flights.insert(InFlight::new(flight, begin));
        if !needs_arena {
            self.carry_out(number, action);
            return;
        }
        let arena = self.arena_of(origin);
        if !self.waiting[arena].requests.is_empty() || !self.make_private(number) {
            if let Some(flight) = self.flights.get_mut(number) {
                flight.waiting = Some(action);
            }
            self.waiting[arena].requests.push_back(number);
            return;
        }
        self.carry_out(number, action);
    }

    pub(super) fn arena_of(&self, origin: Origin) -> usize {
        match origin {
            Origin::Guest(_) => 0,
            Origin::Issued { arena, .. } => arena,
            Origin::Part(whole) => match self.wholes.get(whole).map(|whole| whole.origin) {
                Some(Origin::Issued { arena, .. }) => arena,
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
        let arena = &mut self.parts.arenas[arena];
        let Some(flight) = self.flights.get_mut(number) else { return true };
        let Some(slice) = arena.allocate(flight.range.length()) else { return false };
        let copy = arena.buffers(&slice, flight.range.length());
        match flight.op {
            Op::Write if !matches!(flight.origin, Origin::Part(_)) => flight.data.copy_to(&copy),
            _ if is_planted("uninitialised-page") => {}
            // Zeroes to write; or, for a read, nothing of an earlier request for a filter
            // that answers without filling the page.
            _ => copy.zero(),
        }
        flight.slice = Some(slice);
        true
    }

    /// Lets requests go on that waited for room.
    pub(super) fn retry_waiting(&mut self, arena: usize) {
        // Requests may end within, and make room: the loop sees it.
        if std::mem::replace(&mut self.waiting[arena].going_on, true) {
            return;
        }
        while let Some(number) = self.waiting[arena].requests.front().copied() {
            if !self.make_private(number) {
                break;
            }
            self.waiting[arena].requests.pop_front();
            if let Some(action) =
                self.flights.get_mut(number).and_then(|flight| flight.waiting.take())
            {
                self.carry_out(number, action);
            }
        }
        self.waiting[arena].going_on = false;
    }
}
