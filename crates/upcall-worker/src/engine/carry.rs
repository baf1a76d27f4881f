//! Carrying out what flights ask for.

use upcall_abi::filter::request_flag;
use upcall_abi::ring::{NO_DATA, Submission, submission_kind};
use upcall_block::{Op, Range, RequestFlags, Status, StoreDone, StoreIo, StoreToken};
use upcall_chain::{Action, DataAccess, SlotIndex};

use super::Engine;
use super::images::{Image, Images};
use super::inflight::{Origin, Visit};
use super::link::Sent;
use super::message::Delivery;
use crate::plant::is_planted;

impl Engine {
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
    /// next if that is known already.
    fn deliver(&mut self, number: u32, slot: SlotIndex, up: Option<Status>) -> Option<Action> {
        self.serial = self.serial.wrapping_add(1).max(1);
        let delivery = Delivery { request: number, serial: self.serial };
        let now_ns = self.seen_ns;
        let flight = self.flights.get_mut(number)?;
        let place = &self.parts.slots[slot.index()];
        let (link, instance) = (place.link, place.instance);
        // One that was there before keeps its place among the others.
        let visit = flight.visit.get_or_insert_with(|| {
            place.stats.enter();
            self.order += 1;
            Visit::new(slot, up.is_some(), delivery, self.order, now_ns)
        });
        visit.delivery = delivery;
        if !self.parts.links[link].is_up() || place.detached {
            return self.go_without(number);
        }
        let again = visit.seen;
        (visit.with, visit.seen, visit.is_marking) = (true, true, false);
        visit.due_ns = now_ns.saturating_add(place.deadline_ns);
        self.due_at_ns = self.due_at_ns.min(visit.due_ns);
        if again {
            place.stats.retry();
        }
        let data = match flight.slice {
            Some(_) => self.prepare_data(number, slot, up.is_some(), again),
            None => NO_DATA,
        };
        let flight = self.flights.get(number)?;
        let is_retry = match up {
            None => again || flight.flags.retry,
            // Whoever gets it has no context of its own for it.
            Some(_) => flight.void.contains(slot),
        };
        let submission = Submission {
            kind: if up.is_none() { submission_kind::START } else { submission_kind::DONE },
            op: flight.op as u8,
            flags: raw_flags(RequestFlags { retry: is_retry, ..flight.flags }),
            token: delivery.token(),
            offset: flight.range.offset(),
            length: flight.range.length(),
            status: match up {
                Some(_) if is_retry && is_planted("error-into-success") => 0,
                up => raw_status(up.unwrap_or(Ok(()))),
            },
            data,
            cookie: if up.is_some() { flight.cookie(slot) } else { 0 },
            instance,
            ..Submission::default()
        };
        if is_retry && is_planted("retry-twice") {
            let _ = self.parts.links[link].send(&submission);
        }
        match self.parts.links[link].send(&submission) {
            Sent::Queued => None,
            Sent::Answered(entry) => self.answered(link, &entry).map(|(_, action)| action),
        }
    }

    /// Where the page is that a filter gets, if it gets one. It is as the filter's first
    /// instance got it: an image is kept of what may be changed, and put back `again`.
    fn prepare_data(&mut self, number: u32, slot: SlotIndex, up: bool, again: bool) -> u64 {
        let Some(flight) = self.flights.get(number) else { return NO_DATA };
        let arena = self.arena_of(flight.origin);
        let Some(flight) = self.flights.get_mut(number) else { return NO_DATA };
        let chain = &self.parts.lanes[flight.lane].chain;
        let access = match up {
            false => chain.data_on_way_down(flight.op, slot),
            true => chain.data_on_way_up(flight.op, slot),
        };
        let Some(slice) = &flight.slice else { return NO_DATA };
        if access == DataAccess::None {
            return NO_DATA;
        }
        // Who takes the place of one on trial finds what that has half changed, whatever its policy.
        let succeeds = again && !is_planted("successor-without-image");
        let keeps_images = self.parts.slots[slot.index()].keeps_images || succeeds;
        if access == DataAccess::Change && keeps_images {
            let page = self.parts.arenas[arena].buffers(slice, flight.range.length());
            if again && is_planted("retry-without-image") {
                // Whatever the dead instance left there.
            } else if again {
                Images::restore(&flight.image, &page);
            } else if flight.op == Op::Read && !up && !flight.touched {
                flight.image = Image::Zeroes;
            } else {
                flight.image = self.images.take(&page);
            }
        }
        flight.touched |= access == DataAccess::Change;
        slice.offset()
    }

    fn send_cancel(&mut self, number: u32, slot: SlotIndex) {
        let Some(visit) = self.flights.get(number).and_then(|flight| flight.visit) else { return };
        if !visit.with {
            return;
        }
        let (link, instance) = (self.slot(slot).link, self.slot(slot).instance);
        self.cancel(link, instance, visit.delivery, visit.held_cookie.unwrap_or(0));
    }

    /// Tells a filter that what it holds is no longer wanted.
    pub(super) fn cancel(&mut self, link: usize, instance: u32, held: Delivery, cookie: u64) {
        let submission = Submission {
            kind: submission_kind::CANCEL,
            token: held.token(),
            data: NO_DATA,
            cookie,
            instance,
            ..Submission::default()
        };
        if let Sent::Answered(entry) = self.parts.links[link].send(&submission) {
            self.handle_entry(link, &entry);
        }
    }

    fn store(&mut self, number: u32) {
        let Some(flight) = self.flights.get(number) else { return };
        let page = flight.slice.as_ref().map(|slice| {
            let arena = &self.parts.arenas[self.arena_of(flight.origin)];
            arena.buffers(slice, flight.range.length())
        });
        let Some(flight) = self.flights.get_mut(number) else { return };
        // Nobody else looks at it: straight between its issuer and the store.
        let data = page.unwrap_or_else(|| std::mem::take(&mut flight.data));
        flight.stored_ns = self.seen_ns;
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
        let now_ns = self.seen_ns;
        let Some(flight) = self.flights.get_mut(number) else { return };
        let latency_ns = now_ns.saturating_sub(flight.stored_ns);
        let bytes = u64::from(flight.range.length());
        self.parts.store_stats.leave(flight.op as u8, bytes, latency_ns, done.status.is_err());
        let action = flight.flight.handle_store(done.status).action;
        self.carry_out(number, action);
    }

    /// The flight has ended: its memory goes back, and who waits for it is told.
    pub(super) fn finish(&mut self, number: u32, status: Status) {
        let Some(flight) = self.flights.get_mut(number) else { return };
        debug_assert!(flight.visit.is_none(), "a flight ends when nobody has it");
        // It is dropped where it is: moving it costs as much as all that is done here.
        let (origin, op, range, arrived_ns) =
            (flight.origin, flight.op, flight.range, flight.arrived_ns);
        debug_assert!(matches!(flight.image, Image::None), "an image goes with its visit");
        let Some(slice) = flight.slice.take() else {
            self.flights.discard(number);
            self.end(origin, op, range, arrived_ns, status);
            return;
        };
        let arena = self.arena_of(origin);
        let memory = &mut self.parts.arenas[arena];
        let is_filled = status.is_ok() || is_planted("failed-read-copied");
        if op == Op::Read
            && is_filled
            && let Some(flight) = self.flights.get(number)
        {
            memory.buffers(&slice, range.length()).copy_to(&flight.data);
        }
        memory.free(slice);
        self.flights.discard(number);
        self.end(origin, op, range, arrived_ns, status);
        self.retry_waiting(arena);
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
                let latency_ns = self.seen_ns.saturating_sub(arrived_ns);
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
            Origin::Issued { link, life, instance, id, .. } => {
                self.issued_ended(link, life, instance, id, status)
            }
        }
    }
}

/// As on the rings.
fn raw_flags(flags: RequestFlags) -> u16 {
    let fua = if flags.fua { request_flag::FUA } else { 0 };
    let unmap = if flags.unmap { request_flag::UNMAP } else { 0 };
    let retry = if flags.retry { request_flag::RETRY } else { 0 };
    fua | unmap | retry
}

/// 0 or a negative errno, as on the rings.
pub(super) fn raw_status(status: Status) -> i32 {
    status.map_or_else(|errno| -errno.raw(), |()| 0)
}
