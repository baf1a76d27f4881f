//! Chains that change while all else goes on: what is drawn, and the shell around production's
//! machines for it.
//!
//! What a change may do is decided by `upcall_chain::Outline`, its course by
//! `upcall_chain::Change`; queues are stunned and given other chains by the engine of production.
//! Played here is what `upcall-worker` does with processes: filters are closed and opened, told,
//! tried, and what must be durable is written down.
//!
//! Always true: nobody leaves with a request, and who has left is sent nothing; of one slot no two
//! filters are open; a worker that dies is followed by one with the chains that are written down,
//! all of a change or none.

mod course;
mod draw;
mod end;

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use upcall_abi::ring::submission_kind;
use upcall_chain::{
    Chain, Change, ChangeEnd, ChangeStep, FailedAt, Generation, Outline, Present, SlotSpec,
};
use upcall_worker::sim::{Newcomer, Next};

use crate::disk::SlotId;
use crate::filters::{Place, Process, Role};
use crate::simulation::{MS, Simulation};

/// A place in a chain that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    id: SlotId,
    order: i32,
    /// With a new filter, also if the slot is there.
    is_fresh: bool,
}

/// One disk's part of a change.
struct Part {
    disk: usize,
    /// In the order of the next chain.
    wanted: Vec<Wanted>,
    chain: Arc<Chain>,
    outline: Outline,
    /// Instances for whose successors requests may wait, and those that requests may go past.
    replaced: Vec<u32>,
    leaving: Vec<u32>,
    /// What the chain was.
    before: Vec<Wanted>,
}

impl Part {
    fn keeps(&self, id: SlotId) -> bool {
        self.wanted.iter().any(|wanted| wanted.id == id && !wanted.is_fresh)
    }

    fn replaces(&self, id: SlotId) -> bool {
        self.wanted.iter().any(|wanted| wanted.id == id && wanted.is_fresh)
    }
}

/// A change on its way, or on trial.
pub struct Going {
    change: Change,
    parts: Vec<Part>,
    /// Engines that have not answered.
    waiting: Vec<Receiver<()>>,
    /// The step was begun, and others have to answer.
    is_asked: bool,
    drain_until_ns: u64,
    /// What is drawn to fail, if it comes to it.
    fails_at: Option<ChangeStep>,
    has_trial: bool,
    is_taking_back: bool,
    /// Hosts whose filters are closed, by disk.
    closed: Vec<(usize, usize)>,
    trial_until_ns: Option<u64>,
}

impl Going {
    fn new(parts: Vec<Part>) -> Going {
        Going {
            change: Change::new(),
            parts,
            waiting: Vec::new(),
            is_asked: false,
            drain_until_ns: 0,
            fails_at: None,
            has_trial: false,
            is_taking_back: false,
            closed: Vec::new(),
            trial_until_ns: None,
        }
    }

    /// Whether all who were asked have answered.
    fn has_answers(&mut self) -> bool {
        self.waiting.retain(|answer| answer.try_recv().is_err());
        self.is_asked = !self.waiting.is_empty();
        !self.is_asked
    }
}

fn name(at: FailedAt) -> &'static str {
    match at {
        FailedAt::Prepare => "prepare",
        FailedAt::Stun => "stun",
        FailedAt::Leave => "leave",
        FailedAt::Enter => "enter",
        FailedAt::Commit => "commit",
    }
}
