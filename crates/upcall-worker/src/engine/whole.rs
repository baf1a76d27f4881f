//! Requests that are done in parts: zeroes, written in pieces through a chain that would not
//! see a write-zeroes.

use std::num::NonZeroU32;

use upcall_block::{Errno, Op, RequestFlags, Status};
use upcall_chain::{Chunks, Join};
use upcall_ring::Buffers;

use super::Engine;
use super::begin::Begin;
use super::inflight::{Origin, Whole};

/// Bytes of a part.
const PART: NonZeroU32 = NonZeroU32::new(256 << 10).unwrap();
/// Parts of one request in flight at once: enough to keep a store busy, and few enough that
/// one large request leaves room for others.
const PARTS_AT_ONCE: usize = 4;

impl Engine {
    pub(super) fn begin_whole(&mut self, begin: Begin) {
        let chunks = Chunks::new(begin.range, PART);
        let Some(count) = NonZeroU32::new(chunks.len() as u32) else {
            self.end(begin.origin, begin.op, begin.range, begin.arrived_ns, Ok(()));
            return;
        };
        let number = self.wholes.insert(Whole {
            join: Join::new(count),
            chunks,
            parts: 0,
            beginning: false,
            op: begin.op,
            range: begin.range,
            // Writes give no space back.
            flags: RequestFlags { unmap: false, ..begin.flags },
            lane: begin.lane,
            origin: begin.origin,
            below: begin.below,
            arrived_ns: begin.arrived_ns,
        });
        self.begin_parts(number);
    }

    /// Begins as many parts as may be in flight. Parts may end within, and the whole with
    /// the last of them.
    fn begin_parts(&mut self, number: u32) {
        if self.wholes.get(number).is_some_and(|whole| self.is_orphaned(whole.origin)) {
            return self.end_parts(number);
        }
        while let Some(whole) = self.wholes.get_mut(number)
            && whole.parts < PARTS_AT_ONCE
            && let Some(range) = whole.chunks.next()
        {
            whole.parts += 1;
            whole.beginning = true;
            let part = Begin {
                op: Op::Write,
                range,
                flags: whole.flags,
                data: Buffers::new(),
                origin: Origin::Part(number),
                lane: whole.lane,
                below: whole.below,
                arrived_ns: whole.arrived_ns,
            };
            self.begin_flight(part);
        }
        if let Some(whole) = self.wholes.get_mut(number) {
            whole.beginning = false;
        }
    }

    /// Begins no more parts: nobody wants them.
    fn end_parts(&mut self, number: u32) {
        let Some(whole) = self.wholes.get_mut(number) else { return };
        let mut ended = None;
        while ended.is_none() && whole.chunks.next().is_some() {
            ended = whole.join.handle_part(Err(Errno::ECANCELED));
        }
        if let Some(status) = ended
            && let Some(whole) = self.wholes.remove(number)
        {
            self.end(whole.origin, whole.op, whole.range, whole.arrived_ns, status);
        }
    }

    pub(super) fn part_ended(&mut self, number: u32, status: Status) {
        let Some(whole) = self.wholes.get_mut(number) else { return };
        whole.parts -= 1;
        let mut ended = whole.join.handle_part(status);
        if ended.is_none() && whole.join.has_failed() {
            // The rest need not begin.
            while ended.is_none() && whole.chunks.next().is_some() {
                ended = whole.join.handle_part(status);
            }
        }
        match ended {
            None if whole.beginning => {}
            None => self.begin_parts(number),
            Some(status) => {
                if let Some(whole) = self.wholes.remove(number) {
                    self.end(whole.origin, whole.op, whole.range, whole.arrived_ns, status);
                }
            }
        }
    }
}
