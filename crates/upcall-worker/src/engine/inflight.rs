//! What a queue thread remembers of a request between its arrival and its end.

use std::collections::VecDeque;

use smallvec::SmallVec;
use upcall_block::{Op, Range, RequestFlags, Tag};
use upcall_chain::{Action, Chunks, Flight, Join, SlotIndex, SlotSet};
use upcall_ring::{ArenaSlice, Buffers};

use super::begin::Begin;
use super::images::Image;
use super::link::Life;
use super::message::Delivery;

/// Who waits for a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// The frontend's queue.
    Guest(Tag),
    /// Another request, of which this is a part.
    Part(u32),
    /// A filter that issued it.
    Issued {
        /// The link its filter host is reached by.
        link: usize,
        /// Which life of the filter host issued it: no other is told of its end.
        life: Life,
        instance: u32,
        /// The filter host's name for it.
        id: u64,
        /// The arena for its data.
        arena: usize,
    },
}

/// A request's stay at a slot: the filter's instance has it, or it waits for one to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visit {
    pub(super) slot: SlotIndex,
    pub(super) delivery: Delivery,
    /// On its way up: the filter sees it for the second time.
    pub(super) up: bool,
    /// A living instance has it.
    pub(super) with: bool,
    /// Some instance has had it: whoever gets it next gets it again.
    pub(super) seen: bool,
    /// It goes past the slot when what the slot misses is recorded.
    pub(super) is_marking: bool,
    /// Its place among all stays, in which they are delivered again.
    pub(super) order: u64,
    /// When it came.
    pub(super) since_ns: u64,
    /// When the instance that has it must have answered.
    pub(super) due_ns: u64,
    /// What the filter stored when it said that it holds the request.
    pub(super) held_cookie: Option<u64>,
}

impl Visit {
    pub(super) fn new(
        slot: SlotIndex,
        up: bool,
        delivery: Delivery,
        order: u64,
        now_ns: u64,
    ) -> Visit {
        Visit {
            slot,
            delivery,
            up,
            with: false,
            seen: false,
            is_marking: false,
            order,
            since_ns: now_ns,
            due_ns: u64::MAX,
            held_cookie: None,
        }
    }
}

/// One request on its walk.
pub(super) struct InFlight {
    pub(super) flight: Flight,
    /// Whose chain and store: 0 the own disk, n the n-th granted one.
    pub(super) lane: usize,
    pub(super) op: Op,
    pub(super) range: Range,
    pub(super) flags: RequestFlags,
    pub(super) origin: Origin,
    /// The memory of whoever issued it. Filters never see it.
    pub(super) data: Buffers,
    /// The private copy that filters see, where one of them asked for the data.
    pub(super) slice: Option<ArenaSlice>,
    /// What filters stored with their watches, by slot, as far as the last that did.
    cookies: SmallVec<[u64; 8]>,
    /// The slots whose cookies are those of instances that are gone.
    pub(super) void: SlotSet,
    pub(super) visit: Option<Visit>,
    /// What the page held when the visit's filter first got it.
    pub(super) image: Image,
    /// A filter that may change the page has had it.
    pub(super) touched: bool,
    /// The first action, while the request waits for room in the arena.
    pub(super) waiting: Option<Action>,
    /// When it arrived, and when it last went to the store.
    pub(super) arrived_ns: u64,
    pub(super) stored_ns: u64,
}

impl InFlight {
    /// A request at its beginning, on its `flight`.
    pub(super) fn new(flight: Flight, begin: Begin) -> InFlight {
        InFlight {
            flight,
            lane: begin.lane,
            op: begin.op,
            range: begin.range,
            flags: begin.flags,
            origin: begin.origin,
            data: begin.data,
            slice: None,
            cookies: SmallVec::new(),
            void: SlotSet::EMPTY,
            visit: None,
            image: Image::None,
            touched: false,
            waiting: None,
            arrived_ns: begin.arrived_ns,
            stored_ns: 0,
        }
    }

    /// What the filter at `slot` stored with its watch; 0: nothing.
    pub(super) fn cookie(&self, slot: SlotIndex) -> u64 {
        self.cookies.get(slot.index()).copied().unwrap_or(0)
    }

    /// The filter at `slot` watches, and has stored this.
    pub(super) fn keep_cookie(&mut self, slot: SlotIndex, cookie: u64) {
        if self.cookies.len() <= slot.index() {
            self.cookies.resize(slot.index() + 1, 0);
        }
        self.cookies[slot.index()] = cookie;
    }

    /// What the filter at `slot` stored means nothing to who is there now.
    pub(super) fn void_cookie(&mut self, slot: SlotIndex) {
        if let Some(cookie) = self.cookies.get_mut(slot.index()) {
            *cookie = 0;
        }
        self.void.insert(slot);
    }
}

/// Requests that wait for room in one arena, in the order of their arrival.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) requests: VecDeque<u32>,
    /// They are being let go on: who makes room meanwhile need not do it too.
    pub(super) going_on: bool,
}

/// A request that was split: zeroes written in pieces.
pub(super) struct Whole {
    pub(super) join: Join,
    pub(super) op: Op,
    pub(super) range: Range,
    pub(super) flags: RequestFlags,
    pub(super) lane: usize,
    pub(super) origin: Origin,
    /// Where the parts enter the chain.
    pub(super) below: Option<SlotIndex>,
    /// What has not been given to parts yet.
    pub(super) chunks: Chunks,
    /// Parts in flight.
    pub(super) parts: usize,
    /// Parts are being begun: one that ends meanwhile need not begin the next.
    pub(super) beginning: bool,
    pub(super) arrived_ns: u64,
}
