//! One queue thread's link to one filter host: the channel, and what does not fit into it
//! just now.

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
    /// The channel's number, as the filter host knows it.
    pub(crate) number: u32,
    pub(crate) channel: Channel,
    /// Rung when the filter host sleeps.
    pub(crate) doorbell: Doorbell,
    /// There for a filter that was placed in the worker, once it is served.
    pub(crate) inline: Option<InlineChannel>,
    /// Where data of issued requests is.
    pub(crate) issue_arena: Option<Arc<Mapping>>,
    backlog: VecDeque<Submission>,
    /// Issued requests in flight, by instance.
    issued: Vec<(u32, usize)>,
    violations: u32,
    /// The filter host is gone; nothing is sent or received any more.
    pub(crate) lost: bool,
}

impl Link {
    pub(crate) fn new(
        host: HostId,
        name: Arc<str>,
        number: u32,
        channel: Channel,
        doorbell: Doorbell,
        issue_arena: Option<Arc<Mapping>>,
    ) -> Link {
        Link {
            host,
            name,
            number,
            channel,
            doorbell,
            inline: None,
            issue_arena,
            backlog: VecDeque::new(),
            issued: Vec::new(),
            violations: 0,
            lost: false,
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
        if !self.backlog.is_empty() || self.channel.submissions.push(submission).is_err() {
            self.backlog.push_back(*submission);
        }
        Sent::Queued
    }

    /// The next entry of the filter host.
    pub(super) fn receive(&mut self) -> Option<Completion> {
        if self.lost { None } else { self.channel.completions.pop() }
    }

    /// Sends what found no room before, and rings the doorbell if the other side sleeps.
    /// Once for a batch. False if the filter host's side of the ring makes no sense.
    pub(super) fn publish(&mut self) -> bool {
        if self.lost || self.inline.is_some() {
            return true;
        }
        let mut sane = true;
        while let Some(submission) = self.backlog.front() {
            if self.channel.submissions.push(submission).is_err() {
                sane = self.channel.submissions.free().is_ok();
                break;
            }
            self.backlog.pop_front();
        }
        self.channel.submissions.wake(&self.doorbell);
        sane
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
            *count -= 1;
        }
    }

    /// The filter host is gone.
    pub(super) fn lose(&mut self) {
        self.lost = true;
        self.backlog.clear();
    }
}
