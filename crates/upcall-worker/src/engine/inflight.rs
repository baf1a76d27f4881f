//! What a queue thread remembers of a request between its arrival and its end.

use std::collections::VecDeque;

use smallvec::SmallVec;
use upcall_block::{Op, Range, RequestFlags, Tag};
use upcall_chain::{Action, Chunks, Flight, Join, SlotIndex};
use upcall_ring::{ArenaSlice, Buffers};

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
        instance: u32,
        /// The filter host's name for it.
        id: u64,
        /// The arena for its data.
        arena: usize,
    },
}

/// The delivery that a request waits for, if it is with a filter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visit {
    pub(super) slot: SlotIndex,
    pub(super) delivery: Delivery,
    /// On its way up: the filter sees it for the second time.
    pub(super) up: bool,
    /// When it was delivered.
    pub(super) since_ns: u64,
    /// What the filter stored when it said that it holds the request.
    pub(super) held_cookie: Option<u64>,
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
    /// What each filter stored with its watch, by slot.
    pub(super) cookies: SmallVec<[u64; 8]>,
    pub(super) visit: Option<Visit>,
    /// The first action, while the request waits for room in the arena.
    pub(super) waiting: Option<Action>,
    /// When it arrived, and when it last went to the store.
    pub(super) arrived_ns: u64,
    pub(super) stored_ns: u64,
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
