//! Requests that filters issue: checked, sent into the chain below their issuer or to a
//! granted disk, and reported back.

use upcall_abi::ring::{NO_DATA, Submission, submission_kind};
use upcall_block::{Errno, Range, Status};
use upcall_chain::SlotIndex;
use upcall_ring::Buffers;

use super::Engine;
use super::begin::Begin;
use super::carry::raw_status;
use super::inflight::Origin;
use super::link::{Life, Sent};
use super::message::Issue;
use crate::plant::is_planted;

impl Engine {
    pub(super) fn handle_issue(&mut self, link: usize, instance: u32, issue: Issue) {
        let slots = self.parts.slots.iter().enumerate();
        let found =
            slots.into_iter().find(|(_, slot)| slot.link == link && slot.instance == instance);
        let Some((index, slot)) = found else {
            self.violation(link, "it issued a request for an instance that it does not have");
            return;
        };
        if !slot.issues {
            self.violation(link, "it issued a request without having said that it would");
            return;
        }
        if !self.parts.links[link].issue_begins(instance) {
            self.violation(link, "it issued more requests at once than it may");
            self.report_issued(link, instance, issue.id, Err(Errno::from_raw(11)));
            return;
        }
        let life = self.parts.links[link].life;
        if self.quit {
            self.issued_ended(link, life, instance, issue.id, Err(Errno::from_raw(108)));
            return;
        }
        match self.check_issue(link, index, &issue) {
            Ok(begin) => self.begin(begin),
            Err(errno) => self.issued_ended(link, life, instance, issue.id, Err(errno)),
        }
    }

    fn check_issue(&self, link: usize, slot: usize, issue: &Issue) -> Result<Begin, Errno> {
        const ENODEV: Errno = Errno::from_raw(19);
        // The n-th grant of a filter is some lane of the disk.
        let lane = match issue.disk {
            0 => 0,
            n => *self.parts.slots[slot].grants.get(n as usize - 1).ok_or(ENODEV)?,
        };
        let disk = self.parts.lanes[lane].chain.info();
        let range =
            Range::new(issue.offset, u64::from(issue.length), disk).map_err(|_| Errno::EINVAL)?;
        let mut data = Buffers::new();
        if let Some(offset) = issue.data {
            let arena = self.parts.links[link].way.issue_arena.as_ref().ok_or(Errno::EINVAL)?;
            let offset = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
            if !data.push(arena, offset, issue.length as usize, true) {
                return Err(Errno::EINVAL);
            }
        }
        Ok(Begin {
            op: issue.op,
            range,
            flags: issue.flags,
            data,
            origin: Origin::Issued {
                link,
                life: self.parts.links[link].life,
                instance: self.parts.slots[slot].instance,
                id: issue.id,
                arena: self.parts.slots[slot].arena,
            },
            lane,
            below: if lane == 0 { SlotIndex::new(slot) } else { None },
            arrived_ns: self.seen_ns,
        })
    }

    /// An issued request has ended. Its issuer is told, if it is still the one that issued it:
    /// to a new instance the name means nothing, or something else.
    pub(super) fn issued_ended(
        &mut self,
        link: usize,
        life: Life,
        instance: u32,
        id: u64,
        status: Status,
    ) {
        if self.parts.links[link].life == life || is_planted("report-to-the-next") {
            self.parts.links[link].issue_ends(instance);
            self.report_issued(link, instance, id, status);
        }
    }

    fn report_issued(&mut self, link: usize, instance: u32, id: u64, status: Status) {
        if !self.parts.links[link].is_up() {
            return;
        }
        let submission = Submission {
            kind: submission_kind::ISSUED,
            token: id,
            status: raw_status(status),
            data: NO_DATA,
            instance,
            ..Submission::default()
        };
        if let Sent::Answered(entry) = self.parts.links[link].send(&submission) {
            self.handle_entry(link, &entry);
        }
    }
}
