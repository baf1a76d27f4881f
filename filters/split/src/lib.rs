//! The `split` filter: every change of a disk goes to a second disk as well.
//!
//! A write, discard or write-zeroes is held, its copy is issued to granted disk 1, and when
//! that has succeeded the request goes on down, watched. So what the guest was told is
//! written is on both disks, and the first disk never has what the second lacks.
//!
//! **Order.** Overlapping changes in flight may end in any order, but not in one order here
//! and in another there: the disks would differ for good. So each change has its range for
//! itself (module `range_lock`) from before its copy is issued until the first disk has completed
//! it; overlapping ones wait their turn. A flush has no range: what completed before it
//! has completed on both disks.
//!
//! **Room.** A copy needs memory, and a place among the instance's issued requests. One that
//! finds none waits in `starved`, and is tried again when a copy ends, and by a timer,
//! because the memory is shared with other instances.
#![deny(unsafe_code)]

mod copy;
mod range_lock;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use upcall_sdk::{
    Class, Completion, Counter, Errno, Filter, Held, HoldId, Info, Instance, Issue, Issued, Op,
    OpSet, Param, Request, Timer, Verdict, error, export_filter, warn,
};

use crate::range_lock::{RangeLock, Ticket};

/// How long to wait for memory before trying again.
const STARVED_FOR: Duration = Duration::from_millis(5);

/// One disk and its copy.
struct Split {
    shared: Arc<Shared>,
}

struct Shared {
    instance: Instance,
    /// The guest sees an error of the second disk; else only the operator does.
    is_strict: bool,
    has_warned: AtomicBool,
    state: Mutex<State>,
    copied: Counter,
    copy_errors: Counter,
    waited: Counter,
}

struct State {
    ranges: RangeLock<Held<Split>>,
    starved: VecDeque<Turn>,
    /// There is one while something starves.
    timer: Option<Timer>,
}

/// A request whose copy may be issued.
struct Turn {
    /// Its range; a flush has none.
    ticket: Option<Ticket>,
    held: Held<Split>,
}

impl Filter for Split {
    const INFO: Info = Info {
        name: c"split",
        version: c"0.1.0",
        vendor: c"Upcall",
        summary: c"Sends every change of a disk to a second disk as well",
        class: Class::Replication,
        ops: OpSet::of(&[Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes]),
        sees: OpSet::of(&[Op::Write]),
        issues: true,
        ..Info::NEW
    };

    const PARAMS: &'static [Param] = &[Param::choice(
        c"on_error",
        c"What an error of the second disk does: fail the request, or be counted and ignored.",
        Some(c"fail"),
        c"fail|ignore",
    )];

    type Context = Ticket;

    fn open(instance: Instance) -> Result<Self, Errno> {
        check_second_disk(&instance)?;
        let is_strict = instance.param_string(c"on_error").as_deref() != Some("ignore");
        let state = State { ranges: RangeLock::new(), starved: VecDeque::new(), timer: None };
        let shared = Shared {
            is_strict,
            has_warned: AtomicBool::new(false),
            state: Mutex::new(state),
            copied: instance.counter(c"copied"),
            copy_errors: instance.counter(c"copy_errors"),
            waited: instance.counter(c"waited"),
            instance,
        };
        Ok(Split { shared: Arc::new(shared) })
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        let (held, verdict) = request.hold();
        if held.op() == Op::Flush {
            copy_one(&self.shared, Turn { ticket: None, held });
            return verdict;
        }
        let range = held.offset()..held.offset() + u64::from(held.length());
        let granted = self.shared.state().ranges.acquire(range, held);
        match granted {
            Some((ticket, held)) => copy_one(&self.shared, Turn { ticket: Some(ticket), held }),
            None => self.shared.waited.add(1),
        }
        verdict
    }

    fn io_done<'a>(&self, mut completion: Completion<'a, Self>) -> Verdict<'a> {
        // None: an instance that is gone held the range, and it went with it.
        if let Some(ticket) = completion.take_context() {
            release(&self.shared, ticket);
        }
        completion.pass()
    }

    fn cancel(&self, hold: HoldId) {
        let mut state = self.shared.state();
        if let Some((held, granted)) = state.ranges.remove(|held| held.id() == hold) {
            drop(state);
            held.fail(Errno::ECANCELED);
            copy_all(&self.shared, granted);
            return;
        }
        let starved = state.starved.iter().position(|turn| turn.held.id() == hold);
        let starved = starved.and_then(|index| state.starved.remove(index));
        drop(state);
        // Anything else has its copy in flight, and is answered when that ends.
        if let Some(Turn { ticket, held }) = starved {
            held.fail(Errno::ECANCELED);
            ticket.into_iter().for_each(|ticket| release(&self.shared, ticket));
        }
    }
}

export_filter!(Split);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The second disk must be able to take whatever the first can.
fn check_second_disk(instance: &Instance) -> Result<(), Errno> {
    let first = instance.disk();
    let Some(second) = instance.granted_disk(copy::SECOND_DISK) else {
        error!(instance, "split needs a second disk, and none was granted");
        return Err(Errno::ENODEV);
    };
    if second.capacity < first.capacity {
        let (has, needs) = (second.capacity, first.capacity);
        error!(instance, "the second disk has {has} bytes and needs {needs}");
        return Err(Errno::ENOSPC);
    }
    if !first.block_size.is_multiple_of(second.block_size.max(1)) {
        let (has, needs) = (second.block_size, first.block_size);
        error!(instance, "the second disk has blocks of {has} bytes, which do not fit {needs}");
        return Err(Errno::EINVAL);
    }
    if second.read_only && !first.read_only {
        error!(instance, "the second disk is read-only");
        return Err(Errno::EROFS);
    }
    Ok(())
}

fn copy_all(shared: &Arc<Shared>, granted: Vec<(Ticket, Held<Split>)>) {
    for (ticket, held) in granted {
        copy_one(shared, Turn { ticket: Some(ticket), held });
    }
}

/// Issues the copy of a request whose turn it is; behind those that starve, if any do.
fn copy_one(shared: &Arc<Shared>, turn: Turn) {
    shared.state().starved.push_back(turn);
    feed(shared);
}

/// Issues copies in order until one finds no room.
fn feed(shared: &Arc<Shared>) {
    loop {
        let Some(turn) = shared.state().starved.pop_front() else { return };
        let Some(issue) = copy::of(&turn.held, &shared.instance) else {
            return starve(shared, turn);
        };
        if !issue_copy(shared, issue, turn) {
            return;
        }
    }
}

/// False if there was no room, and the turn is with the starved again.
fn issue_copy(shared: &Arc<Shared>, issue: Issue, turn: Turn) -> bool {
    let op = issue.op();
    let own = shared.clone();
    let issued = shared.instance.issue(issue, move |issued: Issued| {
        let result = issued.result;
        drop(issued); // its memory may be what others starve for
        handle_copied(&own, op, result, turn);
    });
    let Err(refused) = issued else { return true };
    let has_room = refused.errno != Errno::EAGAIN;
    refused.finish();
    has_room
}

/// A copy has ended.
fn handle_copied(shared: &Arc<Shared>, op: Op, result: Result<(), Errno>, turn: Turn) {
    match result {
        Err(Errno::EAGAIN) => return starve(shared, turn),
        Err(Errno::EOPNOTSUPP) if op == Op::Discard => {
            let zeroes = copy::zeroes_for(&turn.held);
            issue_copy(shared, zeroes, turn);
            return;
        }
        Ok(()) => {
            shared.copied.add(1);
            go_on(turn);
        }
        Err(errno) => {
            shared.copy_errors.add(1);
            if shared.is_strict {
                give_up(shared, turn, errno);
            } else {
                if !shared.has_warned.swap(true, Ordering::Relaxed) {
                    warn!(
                        shared.instance,
                        "the second disk is not a copy any more: {op:?}: {errno}"
                    );
                }
                go_on(turn);
            }
        }
    }
    feed(shared);
}

/// The first disk's turn.
fn go_on(turn: Turn) {
    match turn.ticket {
        Some(ticket) => turn.held.watch(ticket),
        None => turn.held.pass(),
    }
}

/// The first disk does not get it.
fn give_up(shared: &Arc<Shared>, turn: Turn, errno: Errno) {
    turn.held.fail(errno);
    turn.ticket.into_iter().for_each(|ticket| release(shared, ticket));
}

fn release(shared: &Arc<Shared>, ticket: Ticket) {
    let granted = shared.state().ranges.release(ticket);
    copy_all(shared, granted);
}

/// Puts a turn that found no room before all others, to be tried again later.
fn starve(shared: &Arc<Shared>, turn: Turn) {
    let mut state = shared.state();
    state.starved.push_front(turn);
    if state.timer.is_some() {
        return;
    }
    let weak = Arc::downgrade(shared);
    match shared.instance.timer(STARVED_FOR, None, move || feed_later(&weak)) {
        Ok(timer) => state.timer = Some(timer),
        Err(errno) => {
            // Nothing might ever try it again.
            let turn = state.starved.pop_front();
            drop(state);
            turn.into_iter().for_each(|turn| give_up(shared, turn, errno));
        }
    }
}

/// Runs in the timer, which it takes away first, so that `feed` may start another.
fn feed_later(shared: &Weak<Shared>) {
    let Some(shared) = shared.upgrade() else { return };
    let timer = shared.state().timer.take();
    drop(timer);
    feed(&shared);
}

#[cfg(test)]
mod tests;
