//! One queue thread's link to one filter host: the channel, and what does not fit into it
//! just now.
//!
//! Always true: a channel serves one life of a host. What an earlier life wrote is in memory
//! that nobody looks at any more.

use std::collections::VecDeque;
use std::sync::Arc;

use upcall_abi::filter::ISSUED_MAX;
use upcall_abi::ring::{Completion, Submission};
use upcall_filterhost::InlineChannel;
use upcall_ring::channel::Channel;
use upcall_ring::{Doorbell, Mapping};

use crate::hosts::HostId;

/// Rules that a filter host may break before it is given up.
const VIOLATIONS_MAX: u32 = 16;

/// Counts the processes that were one filter host, one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Life(pub(crate) u32);

/// How a link's filter host is, as this thread knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    /// It is to be killed. What it still says counts, unless it says nonsense.
    Condemned {
        is_heard: bool,
    },
    /// It is dead; what it had said before is being heard.
    Draining,
    /// It is dead.
    Down {
        is_for_good: bool,
    },
}

/// The way to one life of a filter host.
pub(crate) struct Way {
    pub(crate) channel: Channel,
    /// Rung when the filter host sleeps.
    pub(crate) doorbell: Doorbell,
    /// Where data of issued requests is.
    pub(crate) issue_arena: Option<Arc<Mapping>>,
}

/// What became of a submission.
pub(super) enum Sent {
    /// It is on its way; an answer, if any, comes back by [`Link::receive`].
    Queued,
    /// An inline filter answered at once.
    Answered(Completion),
}

/// See the module. Used by one thread.
pub(crate) struct Link {
    pub(crate) host: HostId,
    pub(crate) name: Arc<str>,
    pub(crate) way: Way,
    pub(crate) life: Life,
    /// There for a filter that was placed in the worker, once it is served.
    pub(crate) inline: Option<InlineChannel>,
    backlog: VecDeque<Submission>,
    /// Since when entries wait for room and none has found any.
    stuck_since_ns: Option<u64>,
    /// Issued requests in flight, by instance.
    issued: Vec<(u32, usize)>,
    violations: u32,
    state: State,
    /// What the dead life had issued has not all ended yet, or that was not said yet.
    pub(super) is_quieting: bool,
}

impl Link {
    pub(crate) fn new(host: HostId, name: Arc<str>, way: Way) -> Link {
        Link {
            host,
            name,
            way,
            life: Life(0),
            inline: None,
            backlog: VecDeque::new(),
            stuck_since_ns: None,
            issued: Vec::new(),
            violations: 0,
            state: State::Up,
            is_quieting: false,
        }
    }

    /// Sends an entry now or, if the ring is full, when there is room; never blocks.
    pub(super) fn send(&mut self, submission: &Submission) -> Sent {
        if let Some(inline) = &mut self.inline {
            return match inline.deliver(submission) {
                Some(completion) => Sent::Answered(completion),
                None => Sent::Queued,
            };
        }
        if self.is_dead() {
            // Nobody takes it any more; the next life has another ring.
            return Sent::Queued;
        }
        if !self.backlog.is_empty() || self.way.channel.submissions.push(submission).is_err() {
            self.backlog.push_back(*submission);
        }
        Sent::Queued
    }

    /// The next entry of the filter host.
    pub(super) fn receive(&mut self) -> Option<Completion> {
        if self.is_heard() { self.way.channel.completions.pop() } else { None }
    }

    /// Sends what found no room before, and rings the doorbell if the other side sleeps.
    /// Once for a batch. False if the filter host's side of the ring makes no sense.
    pub(super) fn publish(&mut self, now_ns: u64) -> bool {
        if !self.is_up() || self.inline.is_some() {
            return true;
        }
        let mut sane = true;
        let waited = self.backlog.len();
        while let Some(submission) = self.backlog.front() {
            if self.way.channel.submissions.push(submission).is_err() {
                sane = self.way.channel.submissions.free().is_ok();
                break;
            }
            self.backlog.pop_front();
        }
        self.stuck_since_ns = match self.stuck_since_ns {
            _ if self.backlog.is_empty() => None,
            Some(since_ns) if self.backlog.len() == waited => Some(since_ns),
            _ => Some(now_ns),
        };
        self.way.channel.submissions.wake(&self.way.doorbell);
        sane
    }

    /// How long entries have waited for room without that any found some.
    pub(super) fn stuck_ns(&self, now_ns: u64) -> u64 {
        self.stuck_since_ns.map_or(0, |since_ns| now_ns.saturating_sub(since_ns))
    }

    /// Entries that wait for room in the ring. Nobody rings when there is some.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Counts a broken rule; true if that was one too many.
    pub(super) fn violation(&mut self) -> bool {
        self.violations += 1;
        self.violations >= VIOLATIONS_MAX
    }

    /// Counts a request that `instance` issued; false if it has too many already.
    pub(super) fn issue_begins(&mut self, instance: u32) -> bool {
        match self.issued.iter_mut().find(|(known, _)| *known == instance) {
            Some((_, count)) if *count >= ISSUED_MAX => false,
            Some((_, count)) => {
                *count += 1;
                true
            }
            None => {
                self.issued.push((instance, 1));
                true
            }
        }
    }

    /// One of them has ended.
    pub(super) fn issue_ends(&mut self, instance: u32) {
        if let Some((_, count)) = self.issued.iter_mut().find(|(known, _)| *known == instance) {
            *count = count.saturating_sub(1);
        }
    }

    /// Whether requests can be delivered.
    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Whether what the filter host says counts.
    pub(super) fn is_heard(&self) -> bool {
        match self.state {
            State::Up | State::Condemned { is_heard: true } => true,
            State::Draining => self.violations < VIOLATIONS_MAX,
            State::Condemned { is_heard: false } | State::Down { .. } => false,
        }
    }

    /// Whether the life is over, and whether another one will follow.
    pub(super) fn is_dead(&self) -> bool {
        matches!(self.state, State::Draining | State::Down { .. })
    }

    pub(super) fn is_gone_for_good(&self) -> bool {
        self.state == (State::Down { is_for_good: true })
    }

    /// Its host is to be killed, if it is not to be already.
    pub(super) fn condemn(&mut self, is_heard: bool) {
        if self.is_up() {
            self.state = State::Condemned { is_heard };
        }
    }

    /// The host is dead. What it had said before can still be heard, if it is to be; so
    /// many entries at most.
    pub(super) fn begin_drain(&mut self) -> u32 {
        let entries = if self.is_heard() { self.way.channel.submissions.entries() } else { 0 };
        self.state = State::Draining;
        self.backlog.clear();
        self.stuck_since_ns = None;
        entries
    }

    /// All that it had said has been heard.
    pub(super) fn end_drain(&mut self, is_for_good: bool) {
        self.state = State::Down { is_for_good };
        self.is_quieting = !is_for_good;
        self.backlog.clear();
        self.stuck_since_ns = None;
    }

    /// No slot has it any more: nothing is said to its host, and nothing heard.
    pub(super) fn retire(&mut self) {
        self.state = State::Down { is_for_good: true };
        self.backlog.clear();
        self.stuck_since_ns = None;
    }

    /// Another life has begun.
    pub(super) fn revive(&mut self, life: Life, way: Way) {
        self.way = way;
        self.life = life;
        self.backlog.clear();
        self.stuck_since_ns = None;
        self.issued.clear();
        self.violations = 0;
        self.state = State::Up;
        self.is_quieting = false;
    }
}
