//! What became of each request: waiting, flying, or done and not yet durable.
//!
//! The daemon that carries requests out may die at any moment, and with it what it had only
//! in memory: qcow2 tables, for one. So a completed write is *kept* (with its data) until a
//! flush that began after it has succeeded; a new daemon gets what was kept once more, then a
//! flush, and only then what was in flight, in the order of submission.
//!
//! Always true: each request is answered exactly once. A request that modifies never flies
//! beside another that it overlaps, so that carrying both out again, in order, ends in the same
//! bytes. Nothing is read before all that was kept is back. After a failed flush, or when
//! what was kept could not be written again, nothing that modifies ever succeeds.
//!
//! Pure: no clock, no memory of others, no system calls. `S` is the piece of memory that holds
//! a request's data.

use std::collections::{BTreeMap, VecDeque};

use upcall_block::{Errno, Op, Range, Status};

use crate::plant::is_planted;

/// The largest clusters that qcow2 has.
const CLUSTER_BYTES_MAX: u64 = 2 << 20;

/// A request, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    /// The caller's name for it; given back with its end.
    pub id: u64,
    pub op: Op,
    pub range: Range,
    /// Durable before it is answered.
    pub fua: bool,
    /// Its space may be given back.
    pub unmap: bool,
}

/// The name of something that flies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    /// A request, by its number in the order of submission.
    Request(u64),
    /// Something kept, carried out again.
    Again(usize),
    /// A flush that nobody asked for.
    OwnFlush,
}

/// What to carry out next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub key: Key,
    pub op: Op,
    pub range: Range,
    pub unmap: bool,
    /// The caller's name; `None` if nobody waits for it.
    pub id: Option<u64>,
}

/// What came of an event.
#[derive(Debug)]
pub(crate) struct Outcome<S> {
    /// Requests that have ended.
    pub ended: Vec<(u64, Status)>,
    /// Memory that is needed no more.
    pub freed: Vec<S>,
    /// What was answered as done cannot be written again. The daemon must be ended, and then
    /// [`Ledger::restart`] and [`Ledger::fail`] be called: until then it may use the memory.
    pub is_lost: bool,
}

impl<S> Default for Outcome<S> {
    fn default() -> Self {
        Outcome { ended: Vec::new(), freed: Vec::new(), is_lost: false }
    }
}

#[derive(Debug)]
struct Entry<S> {
    ask: Ask,
    memory: Option<S>,
    /// A flush: how many completions it covers.
    covers: u64,
}

#[derive(Debug)]
struct Kept<S> {
    ask: Ask,
    memory: Option<S>,
    /// Its number in the order of completion, from 0.
    number: u64,
    /// It is answered when it is durable.
    is_awaited: bool,
}

/// Where a new daemon's first work stands.
#[derive(Debug)]
struct Again {
    next: usize,
    flying: Vec<usize>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ledger<S> {
    next_number: u64,
    waiting: VecDeque<(u64, Entry<S>)>,
    flying: BTreeMap<u64, Entry<S>>,
    kept: Vec<Kept<S>>,
    /// Completions of modifications so far.
    completions: u64,
    wants_flush: bool,
    /// What the flush of our own that flies covers.
    own_flush: Option<u64>,
    again: Option<Again>,
    has_failed: bool,
}

impl<S> Ledger<S> {
    pub fn new() -> Ledger<S> {
        Ledger {
            next_number: 0,
            waiting: VecDeque::new(),
            flying: BTreeMap::new(),
            kept: Vec::new(),
            completions: 0,
            wants_flush: false,
            own_flush: None,
            again: None,
            has_failed: false,
        }
    }

    /// Whether nothing waits and nothing flies.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.flying.is_empty()
            && self.own_flush.is_none()
            && self.again.is_none()
    }

    /// Completed, and not known to be durable.
    pub fn kept_count(&self) -> usize {
        self.kept.len()
    }

    /// Whether nothing that modifies can succeed any more.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Takes a request. After a failure, one that modifies ends at once.
    pub fn push(&mut self, ask: Ask, out: &mut Outcome<S>) {
        if self.has_failed && (ask.op == Op::Flush || ask.op.is_modification()) {
            out.ended.push((ask.id, Err(Errno::EIO)));
            return;
        }
        self.waiting.push_back((self.next_number, Entry { ask, memory: None, covers: 0 }));
        self.next_number += 1;
    }

    /// Asks for a flush of our own, so that what is kept becomes less.
    pub fn want_flush(&mut self) {
        self.wants_flush = self.own_flush.is_none() && !self.has_failed && !self.kept.is_empty();
    }

    /// What can be carried out now; it stays so until [`launch`](Self::launch).
    pub fn next(&self) -> Option<Next> {
        if let Some(again) = &self.again {
            return self.next_again(again);
        }
        if self.wants_flush {
            return Some(OWN_FLUSH);
        }
        let (number, Entry { ask, .. }) = self.waiting.front()?;
        let Ask { id, op, range, unmap, .. } = *ask;
        if self.flying.values().any(|other| conflicts(&other.ask, ask)) {
            return None;
        }
        Some(Next { key: Key::Request(*number), op, range, unmap, id: Some(id) })
    }

    fn next_again(&self, again: &Again) -> Option<Next> {
        let Some(kept) = self.kept.get(again.next) else {
            // All of it is back before the flush that makes it durable.
            let is_over = again.flying.is_empty() && self.own_flush.is_none();
            return is_over.then_some(OWN_FLUSH);
        };
        let Ask { op, range, unmap, .. } = kept.ask;
        let blocked = again.flying.iter().any(|index| conflicts(&self.kept[*index].ask, &kept.ask));
        (!blocked).then_some(Next { key: Key::Again(again.next), op, range, unmap, id: None })
    }

    /// What [`next`](Self::next) said is on its way. `memory`: where a request's data is; of
    /// something that is carried out again it is known.
    pub fn launch(&mut self, next: &Next, memory: Option<S>) {
        match next.key {
            Key::OwnFlush => {
                self.wants_flush = false;
                self.own_flush = Some(self.completions);
            }
            Key::Again(index) => {
                if let Some(again) = &mut self.again {
                    again.flying.push(index);
                    again.next = index + 1;
                }
            }
            Key::Request(_) => {
                if let Some((number, mut entry)) = self.waiting.pop_front() {
                    // What a lost daemon had been given keeps its data.
                    entry.memory = memory.or(entry.memory);
                    entry.covers = self.completions;
                    self.flying.insert(number, entry);
                }
            }
        }
    }

    /// The data of something that waits or flies.
    pub fn memory(&self, key: Key) -> Option<&S> {
        match key {
            Key::OwnFlush => None,
            Key::Again(index) => self.kept.get(index)?.memory.as_ref(),
            Key::Request(number) => {
                let waiting = || self.waiting.iter().find(|entry| entry.0 == number);
                let entry = self.flying.get(&number).or_else(|| Some(&waiting()?.1));
                entry?.memory.as_ref()
            }
        }
    }

    /// Which request flies under this name.
    pub fn flying(&self, key: Key) -> Option<Ask> {
        let Key::Request(number) = key else { return None };
        self.flying.get(&number).map(|entry| entry.ask)
    }

    /// Something that flew has ended. Panics if nothing flies under this name (our own bug).
    pub fn complete(&mut self, key: Key, status: Status, out: &mut Outcome<S>) {
        match key {
            Key::OwnFlush => {
                let covers = self.own_flush.take().expect("no flush of our own flies");
                if status.is_ok() && self.again.take().is_some() {
                    // Completions of the time before: all of them are durable now.
                    self.release(u64::MAX, out);
                } else {
                    self.flushed(covers, status, out);
                }
            }
            Key::Again(index) => {
                let again = self.again.as_mut().expect("nothing is carried out again");
                again.flying.retain(|other| *other != index);
                out.is_lost |= status.is_err();
            }
            Key::Request(number) => {
                let entry = self.flying.remove(&number).expect("no such request flies");
                self.complete_request(entry, status, out);
            }
        }
    }

    fn complete_request(&mut self, entry: Entry<S>, status: Status, out: &mut Outcome<S>) {
        let Entry { ask, memory, covers } = entry;
        if ask.op == Op::Flush {
            // Which may already have been failed, by another flush.
            let status = if self.has_failed { Err(Errno::EIO) } else { status };
            out.ended.push((ask.id, status));
            return self.flushed(covers, status, out);
        }
        if !ask.op.is_modification() || status.is_err() || self.has_failed {
            let refused = ask.op.is_modification() && self.has_failed;
            out.ended.push((ask.id, if refused { Err(Errno::EIO) } else { status }));
            out.freed.extend(memory);
            return;
        }
        let number = self.completions;
        self.completions += 1;
        self.kept.push(Kept { ask, memory, number, is_awaited: ask.fua });
        if ask.fua {
            self.want_flush();
        } else {
            out.ended.push((ask.id, Ok(())));
        }
    }

    fn flushed(&mut self, covers: u64, status: Status, out: &mut Outcome<S>) {
        match status {
            Ok(()) => self.release(covers, out),
            Err(_) => self.fail(out),
        }
        // What came while a flush flew still waits for one.
        if self.kept.iter().any(|kept| kept.is_awaited) {
            self.want_flush();
        }
    }

    /// Completions before number `covers` are durable.
    fn release(&mut self, covers: u64, out: &mut Outcome<S>) {
        let all = std::mem::take(&mut self.kept);
        for kept in all {
            if kept.number >= covers {
                self.kept.push(kept);
                continue;
            }
            if kept.is_awaited {
                out.ended.push((kept.ask.id, Ok(())));
            }
            out.freed.extend(kept.memory);
        }
    }

    /// From here on nothing that modifies succeeds. What is kept is given up; nothing of it may
    /// fly.
    pub fn fail(&mut self, out: &mut Outcome<S>) {
        self.has_failed = true;
        self.wants_flush = false;
        for kept in std::mem::take(&mut self.kept) {
            if kept.is_awaited {
                out.ended.push((kept.ask.id, Err(Errno::EIO)));
            }
            out.freed.extend(kept.memory);
        }
        self.again = None;
        self.end_waiting(|op| op == Op::Flush || op.is_modification(), out);
    }

    /// Ends everything, reads too, with an error: there will be no daemon any more. Only when
    /// nothing flies, as after [`restart`](Self::restart).
    pub fn give_up(&mut self, out: &mut Outcome<S>) {
        self.fail(out);
        self.end_waiting(|_| true, out);
    }

    fn end_waiting(&mut self, which: impl Fn(Op) -> bool, out: &mut Outcome<S>) {
        let all = std::mem::take(&mut self.waiting);
        for (number, entry) in all {
            if which(entry.ask.op) {
                out.ended.push((entry.ask.id, Err(Errno::EIO)));
                out.freed.extend(entry.memory);
            } else {
                self.waiting.push_back((number, entry));
            }
        }
    }

    /// The daemon is gone, and with it everything that flew: it waits again, in the order of
    /// submission, behind what was kept.
    pub fn restart(&mut self) {
        while let Some((number, entry)) = self.flying.pop_last() {
            self.waiting.push_front((number, entry));
        }
        self.own_flush = None;
        self.wants_flush = false;
        self.again =
            if self.kept.is_empty() { None } else { Some(Again { next: 0, flying: vec![] }) };
    }
}

const OWN_FLUSH: Next =
    Next { key: Key::OwnFlush, op: Op::Flush, range: Range::EMPTY, unmap: false, id: None };

/// Whether `ask` must wait for `other`, which flies: both modify, and overlap. What zeroes
/// takes all of each cluster that it touches: QEMU gives a cluster back when one request
/// has zeroed what was left in it, also while another still writes to other bytes of it.
fn conflicts(other: &Ask, ask: &Ask) -> bool {
    if !other.op.is_modification() || !ask.op.is_modification() {
        return false;
    }
    if other.op == Op::Discard && is_planted("write-against-discard") {
        return false;
    }
    let is_write = |ask: &Ask| ask.op == Op::Write;
    let unit = if is_write(other) && is_write(ask) { 1 } else { CLUSTER_BYTES_MAX };
    let first = |range: Range| range.offset() / unit;
    let end = |range: Range| (range.offset() + u64::from(range.length())).div_ceil(unit);
    first(other.range) < end(ask.range) && first(ask.range) < end(other.range)
}

#[cfg(test)]
mod tests;
