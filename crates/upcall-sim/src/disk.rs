//! One simulated disk: its media, what its guest asked of it, and whether the answers are
//! right.
//!
//! Always true: an error that reaches the guest has a reason that the simulation knows, and
//! an error that the medium gave reaches somebody who asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use upcall_block::{DiskInfo, Op, OpSet, Range};
use upcall_chain::{OnFailure, SlotSpec};
use upcall_vhost::mock::{Device, Memory};
use upcall_vhost::{BlkConfig, BlkOptions};

use crate::filters::{OWN_SECTORS, Role};
use crate::gaps::{Change, Gaps, Seen};
use crate::guest::{Ended, Kind, Outcome, Request, Ring, Shape};
use crate::history::History;
use crate::medium::{Failed, Medium, sectors};
use crate::plan::DiskPlan;
use crate::random::Random;
use crate::stamp::{Bytes, Content, SECTOR, change, parse};

/// Why requests may fail.
#[derive(Clone, Copy, Debug)]
pub enum Excuse {
    /// The medium failed.
    Medium(Failed),
    /// The medium of the second disk did.
    Second(Failed),
    /// Its ring was stopped, and what filters held was cancelled.
    Stop {
        /// Which one of the disk's.
        ring: usize,
    },
    /// A filter was gone whose policy lets requests fail.
    Filter,
    /// What a bypassed filter misses could not be recorded.
    Mark,
}

/// A slot, unique on its disk, also after it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// A place in a disk's chain. It outlives the worker, and each filter that is replaced.
pub struct Slot {
    pub id: SlotId,
    pub role: Role,
    /// Its place among its class, as it was asked for.
    pub order: i32,
    pub policy: OnFailure,
    /// The key of its filter, 0 for one that changes nothing.
    pub key: u64,
    /// Its host's number in each of the disk's engines.
    pub host: usize,
    pub instance: u32,
    /// Of the filter that comes with a change on its way.
    pub next_instance: u32,
    pub room: usize,
    /// The record of what it misses, where there is one.
    pub gaps: Option<Gaps>,
    /// Which changes its filters saw.
    seen: Seen,
    /// When it came into the chain.
    since: u64,
    /// It is about to leave: if it is dead, requests go past it.
    pub is_leaving: bool,
    /// It was about to leave, and missed what had begun before it stayed.
    forgives: bool,
}

impl Slot {
    pub fn spec(&self) -> SlotSpec {
        SlotSpec { order: self.order, ..self.role.spec() }
    }
}

/// See the module.
pub struct Disk {
    pub number: u32,
    /// The chain that its queues have.
    pub slots: Vec<Slot>,
    /// The chain that the next worker begins with, if this one dies.
    pub written: Vec<(SlotId, i32)>,
    /// Slots that have left the chain, and may come back.
    pub left: Vec<Slot>,
    next_slot: u32,
    pub medium: Medium,
    /// What a splitter writes to.
    pub second: Option<Medium>,
    pub rings: Vec<Ring>,
    pub write_through: bool,
    pub guests: usize,
    pub history: History,
    /// Requests in flight.
    pub open: BTreeMap<u64, Request>,
    /// When, and what.
    excuses: Vec<(u64, Excuse)>,
    /// Errors of the medium, and who may have caused them.
    suspects: Vec<BTreeSet<u64>>,
    /// Filters that are gone and whose policy lets requests fail.
    failing_filters: usize,
    /// Sectors whose copy may differ.
    copy_unsure: Vec<bool>,
    /// Requests that filters of a dead worker have seen.
    pub seen_before: BTreeSet<u64>,
    /// Counts what happens, for what was before what.
    moment: u64,
    /// By request: when it began.
    begun: BTreeMap<u64, u64>,
    /// Sectors of completed changes that a bypassed filter missed, and that were recorded.
    pub missed: u64,
}

fn info(sectors: usize) -> DiskInfo {
    DiskInfo {
        capacity: (sectors * SECTOR) as u64,
        block_size: SECTOR as u32,
        physical_block_size: SECTOR as u32,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: SECTOR as u32,
    }
}

/// Zeroes as they are behind changers with these keys.
fn fresh(sector: usize, keys: &[u64]) -> Bytes {
    let mut bytes = [0; SECTOR];
    for key in keys {
        change(&mut bytes, *key, sector as u32);
    }
    bytes
}

/// The keys that change something.
fn real(keys: &[u64]) -> Vec<u64> {
    keys.iter().copied().filter(|key| *key != 0).collect()
}

/// [`Slot::since`] of a slot whose filter is not open yet.
const NOT_YET: u64 = u64::MAX;

impl Disk {
    pub fn new(
        number: u32,
        plan: &DiskPlan,
        keys: Vec<u64>,
        memory: &Arc<Memory>,
        random: &mut Random,
    ) -> Disk {
        let guests = plan.sectors;
        let all = guests + OWN_SECTORS;
        let mut medium = |keys: &[u64]| {
            let sectors = (0..all).map(|sector| fresh(sector, keys)).collect();
            Medium::new(info(all), sectors, guests, random.fork())
        };
        let splitter = plan.roles.iter().position(|(role, _)| *role == Role::Splitter);
        let second = splitter.map(|slot| medium(&real(&keys[..slot])));
        let medium = medium(&real(&keys));
        let ring = |_| {
            let shape = Shape {
                size: plan.ring_size,
                packed: plan.packed,
                event_idx: plan.event_idx,
                base: random.pick(&[0, 7, 65_530]),
            };
            Ring::new(memory, shape, number, guests)
        };
        let mut disk = Disk {
            number,
            slots: Vec::new(),
            written: Vec::new(),
            left: Vec::new(),
            next_slot: 0,
            medium,
            second,
            rings: (0..plan.rings).map(ring).collect(),
            write_through: plan.write_through,
            guests,
            history: History::new(guests),
            open: BTreeMap::new(),
            excuses: Vec::new(),
            suspects: Vec::new(),
            failing_filters: 0,
            copy_unsure: vec![false; guests],
            seen_before: BTreeSet::new(),
            moment: 0,
            begun: BTreeMap::new(),
            missed: 0,
        };
        for ((role, policy), key) in plan.roles.iter().zip(keys) {
            let slot = disk.new_slot(*role, *policy, key);
            disk.slots.push(slot);
        }
        disk.write_down();
        disk
    }

    /// A slot that is in no chain yet.
    pub fn new_slot(&mut self, role: Role, policy: OnFailure, key: u64) -> Slot {
        let id = SlotId(self.next_slot);
        self.next_slot += 1;
        Slot {
            id,
            role,
            order: role.spec().order,
            policy,
            key,
            host: 0,
            instance: 0,
            next_instance: 0,
            room: 0,
            gaps: policy.records_gaps(&role.spec()).then(Gaps::default),
            seen: Seen::new(self.guests),
            since: NOT_YET,
            is_leaving: false,
            forgives: false,
        }
    }

    /// What the queues have is what the next worker begins with.
    pub fn write_down(&mut self) {
        self.written = self.slots.iter().map(|slot| (slot.id, slot.order)).collect();
    }

    /// Whether the next worker would begin with another chain.
    pub fn has_unwritten(&self) -> bool {
        let now = self.slots.iter().map(|slot| (slot.id, slot.order));
        !now.eq(self.written.iter().copied())
    }

    /// A worker begins, with the chain that is written down.
    pub fn begin_life(&mut self) {
        self.moment += 1;
        if self.slots.iter().any(|slot| slot.is_leaving && slot.role == Role::Splitter) {
            // What waited for a dead one may have gone past it.
            self.copy_unsure.fill(true);
        }
        // They were told that they leave, and that was not to be; or they are new.
        let left = self.left.iter_mut().filter(|slot| slot.gaps.is_none());
        let leaving = self.slots.iter_mut().filter(|slot| slot.is_leaving);
        left.chain(leaving).for_each(|slot| slot.since = self.moment);
        let mut all: Vec<Slot> = self.slots.drain(..).chain(self.left.drain(..)).collect();
        let place = |id: SlotId| self.written.iter().position(|(other, _)| *other == id);
        all.retain(|slot| place(slot.id).is_some());
        all.sort_by_key(|slot| place(slot.id));
        for (number, slot) in all.iter_mut().enumerate() {
            (slot.host, slot.instance, slot.room) = (number, number as u32, number + 1);
            slot.order = self.written[number].1;
            slot.forgives |= std::mem::take(&mut slot.is_leaving);
            // New, and its change was written down when the worker died.
            if slot.since == NOT_YET {
                slot.since = self.moment;
            }
        }
        self.slots = all;
    }

    /// The place of a host's slot.
    pub fn place_of(&self, host: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.host == host)
    }

    /// A dead filter was about to leave, and requests may have gone past it; it stays.
    pub fn forgive(&mut self, place: usize) {
        if self.slots[place].role == Role::Splitter {
            self.copy_unsure.fill(true);
        }
        self.begin_slot(place);
        let slot = &mut self.slots[place];
        (slot.is_leaving, slot.forgives) = (false, true);
    }

    /// A slot has met nothing of what was before.
    pub fn begin_slot(&mut self, place: usize) {
        self.moment += 1;
        self.slots[place].since = self.moment;
    }

    /// The device of a worker's life; `ops` is what the chain offers.
    pub fn device(&self, ops: OpSet, memory: &Memory) -> Device {
        let info = DiskInfo { ops, ..info(self.guests) };
        let options = BlkOptions { write_cache: !self.write_through, ..BlkOptions::default() };
        let config = BlkConfig::new(info, options).expect("a disk that can be offered");
        Device::new(config, memory.table())
    }

    pub fn keys_above(&self, slot: usize) -> Vec<u64> {
        real(&self.slots[..slot].iter().map(|slot| slot.key).collect::<Vec<_>>())
    }

    /// Whether nothing in flight overlaps.
    pub fn is_quiet(&self, sectors: &std::ops::Range<usize>) -> bool {
        let overlaps =
            |open: &std::ops::Range<usize>| open.start < sectors.end && sectors.start < open.end;
        !self.open.values().any(|open| overlaps(&open.sectors))
    }

    /// A filter has got a change, or has let go of it.
    pub fn note_change(&mut self, change: &Change) {
        self.moment += 1;
        if let Some(place) = self.place_of(change.host) {
            self.slots[place].seen.note(change, self.moment);
        }
    }

    /// Slots whose filters see such changes: without exception, or are to be told, one day, what
    /// they missed.
    fn seeing(&self, op: Op) -> impl Iterator<Item = &Slot> {
        let sees = move |slot: &&Slot| {
            (slot.gaps.is_some() || slot.policy == OnFailure::Hold && !slot.is_leaving)
                && slot.spec().ops.contains(op)
        };
        self.slots.iter().filter(sees)
    }

    /// The guest hears that its change is made: each filter that is waited for has had it to its
    /// end; each one that may be bypassed, too, or it is marked as missed.
    fn check_missed(&mut self, request: &Request) -> Result<(), String> {
        let op = request.kind.op().expect("a change");
        let begun = self.begun[&request.id];
        let mut missed = 0;
        for slot in self.seeing(op) {
            for sector in request.sectors.clone() {
                let had = self.slots_had(slot, sector, begun);
                if !had && !slot.gaps.as_ref().is_some_and(|gaps| gaps.has(sector)) {
                    return Err(format!(
                        "the {} has missed sector {sector} of {request:?}, which is complete, and \
                         it is not recorded",
                        slot.role.name()
                    ));
                }
                missed += u64::from(!had);
            }
        }
        self.missed += missed;
        Ok(())
    }

    fn slots_had(&self, slot: &Slot, sector: usize, begun: u64) -> bool {
        slot.seen.ended_since(sector, begun) || slot.forgives && begun < slot.since
    }

    /// At the end: no filter that may be bypassed has not even met what is on the disk, unless
    /// that is recorded; also where the guest was never told.
    pub fn check_unmet(&self) -> Result<(), String> {
        for sector in 0..self.guests {
            let Content::Stamp { request, .. } = self.content(sector) else { continue };
            let Some(begun) = self.begun.get(&request) else { continue };
            for slot in self.seeing(Op::Write).filter(|slot| slot.since <= *begun) {
                let is_marked = slot.gaps.as_ref().is_some_and(|gaps| gaps.has(sector));
                if !slot.seen.met_since(sector, *begun) && !is_marked {
                    return Err(format!(
                        "disk {}: the {} has never met request {request}, which is what sector \
                         {sector} holds, and it is not recorded",
                        self.number,
                        slot.role.name()
                    ));
                }
            }
        }
        Ok(())
    }

    /// What the guest would read of a sector.
    fn content(&self, sector: usize) -> Content {
        let mut bytes = self.medium.sector(sector);
        self.keys_above(self.slots.len())
            .iter()
            .for_each(|key| change(&mut bytes, *key, sector as u32));
        parse(&bytes)
    }

    /// The guest asks for something.
    pub fn begin(&mut self, request: &Request) {
        self.moment += 1;
        self.begun.insert(request.id, self.moment);
        let (id, range) = (request.id, request.sectors.clone());
        let disk = self.number;
        if request.kind.is_modification() {
            let busy = |sector: usize| {
                self.open
                    .values()
                    .any(|open| open.kind.is_modification() && open.sectors.contains(&sector))
            };
            for sector in range.clone() {
                if busy(sector) {
                    self.copy_unsure[sector] = true;
                }
            }
        }
        match request.kind {
            Kind::Read => self.history.begin_read(id, range),
            Kind::Write => self.history.begin_write(id, range, |sector| Content::Stamp {
                disk,
                sector: sector as u32,
                request: id,
            }),
            Kind::Discard | Kind::WriteZeroes { .. } => {
                self.history.begin_write(id, range, |_| Content::Zero);
            }
            Kind::Flush => self.history.begin_flush(id),
            Kind::GetId | Kind::Unknown | Kind::PastEnd => {}
        }
        self.open.insert(id, request.clone());
    }

    /// It is told how that ended.
    pub fn end(&mut self, ended: &Ended) -> Result<(), String> {
        let Ended { request, outcome, contents } = ended;
        let id = request.id;
        self.open.remove(&id).expect("a request that was begun");
        let ok = *outcome == Outcome::Ok;
        match request.kind {
            Kind::Read => self.history.end_read(id, ok.then_some(contents))?,
            Kind::Flush => self.history.end_flush(id, ok),
            Kind::GetId | Kind::Unknown | Kind::PastEnd => {
                let due = match request.kind {
                    Kind::GetId => Outcome::Ok,
                    Kind::Unknown => Outcome::Unsupported,
                    _ => Outcome::Error,
                };
                return match *outcome == due {
                    true => Ok(()),
                    false => Err(format!("{request:?} ended with {outcome:?}")),
                };
            }
            _ => {
                self.history.end_write(id, ok, self.write_through);
                match ok {
                    true => self.check_missed(request)?,
                    false => self.doubt_copy(request),
                }
            }
        }
        match outcome {
            Outcome::Ok => self.clear_of_suspicion(id),
            Outcome::Error if self.is_excused(request) => {
                self.suspects.retain(|suspects| !suspects.contains(&id));
                Ok(())
            }
            _ => Err(format!("{request:?} ended with {outcome:?}, and nothing was wrong")),
        }
    }

    /// The guest will not be told how a request ended.
    pub fn forget(&mut self, request: &Request) {
        self.open.remove(&request.id);
        self.history.forget(request.id);
        self.suspects.retain(|suspects| !suspects.contains(&request.id));
        if request.kind.is_modification() {
            self.doubt_copy(request);
        }
    }

    fn doubt_copy(&mut self, request: &Request) {
        for sector in request.sectors.clone() {
            self.copy_unsure[sector] = true;
        }
    }

    /// Errors that the media gave since the last call.
    pub fn note_failures(&mut self, now_ns: u64) -> Vec<Failed> {
        let failures = self.medium.take_failures();
        for failed in &failures {
            self.excuses.push((now_ns, Excuse::Medium(*failed)));
            let asked = self.open.values().filter(|open| matches(open, failed, true));
            let suspects: BTreeSet<u64> = asked.map(|open| open.id).collect();
            if !suspects.is_empty() {
                self.suspects.push(suspects);
            }
        }
        if let Some(second) = &self.second {
            for failed in second.take_failures() {
                self.excuses.push((now_ns, Excuse::Second(failed)));
            }
        }
        failures
    }

    /// Errors of requests that are in flight now have a reason.
    pub fn excuse(&mut self, now_ns: u64, excuse: Excuse) {
        self.excuses.push((now_ns, excuse));
    }

    fn is_excused(&self, request: &Request) -> bool {
        if self.failing_filters > 0 {
            return true;
        }
        let since = self.excuses.iter().filter(|(when_ns, _)| *when_ns >= request.begun_ns);
        since.into_iter().any(|(_, excuse)| match excuse {
            // A journal's own write may have failed.
            Excuse::Medium(failed) => {
                matches(request, failed, false)
                    || sectors(failed.range).start >= self.guests && request.kind.is_modification()
            }
            Excuse::Second(failed) => matches(request, failed, false),
            Excuse::Stop { ring } => *ring == request.ring,
            Excuse::Filter => true,
            Excuse::Mark => request.kind.is_modification(),
        })
    }

    /// A request that succeeded cannot be the one that the medium failed for.
    fn clear_of_suspicion(&mut self, id: u64) -> Result<(), String> {
        for suspects in &mut self.suspects {
            if suspects.remove(&id) && suspects.is_empty() {
                return Err(format!(
                    "the medium failed, and everybody who may have asked (last {id}) was told of \
                     success"
                ));
            }
        }
        self.suspects.retain(|suspects| !suspects.is_empty());
        Ok(())
    }

    /// Nothing is in flight: the disk holds what the guest was told.
    pub fn check_content(&self) -> Result<(), String> {
        for sector in 0..self.guests {
            self.history
                .check(sector, self.content(sector))
                .map_err(|wrong| format!("disk {}: {wrong}", self.number))?;
        }
        Ok(())
    }

    /// Nothing is in flight and no splitter was ever skipped: the second disk is a copy.
    pub fn check_copy(&self) -> Result<u64, String> {
        let (Some(second), Some(slot)) =
            (&self.second, self.slots.iter().position(|slot| slot.role == Role::Splitter))
        else {
            return Ok(0);
        };
        let mut checked = 0;
        for sector in (0..self.guests).filter(|sector| !self.copy_unsure[*sector]) {
            let Some(content) = self.history.only(sector) else { continue };
            let mut bytes = second.sector(sector);
            for key in self.keys_above(slot) {
                change(&mut bytes, key, sector as u32);
            }
            let copy = parse(&bytes);
            if copy != content {
                return Err(format!(
                    "disk {}: sector {sector} is {content:?}, and its copy {copy:?}",
                    self.number
                ));
            }
            checked += 1;
        }
        Ok(checked)
    }

    /// A filter at a place of the disk is gone, and what becomes of requests.
    pub fn lose_filter(&mut self, role: Role, on_failure: OnFailure) {
        if on_failure == OnFailure::Fail {
            self.failing_filters += 1;
        }
        if role == Role::Splitter && on_failure != OnFailure::Hold {
            self.copy_unsure.fill(true);
        }
    }

    /// It is back.
    pub fn return_filter(&mut self, role: Role, on_failure: OnFailure, now_ns: u64) {
        if on_failure == OnFailure::Fail {
            self.failing_filters -= 1;
            self.excuse(now_ns, Excuse::Filter);
        }
        if role == Role::Splitter && on_failure != OnFailure::Hold {
            // What went past it may still be under way.
            self.copy_unsure.fill(true);
        }
    }

    /// The worker is dead: the next one asks the media anew.
    pub fn lose_worker(&mut self, now_ns: u64) {
        if self.failing_filters > 0 {
            // Requests may have failed, and the guest has not looked yet.
            self.excuse(now_ns, Excuse::Filter);
        }
        self.failing_filters = 0;
        if self.medium.lose_worker() {
            // That a flush has failed was known to the dead worker alone.
            self.history.doubt();
        }
        if let Some(second) = &self.second {
            second.lose_worker();
        }
        self.suspects.clear();
    }

    /// The worker has ended in good order, and given the disk up: what the guest was told is
    /// durable, as after a flush, and the next one begins with the chain as it is. `id`: a request's that is nobody's.
    pub fn hand_over(&mut self, now_ns: u64, id: u64) {
        self.write_down();
        if self.failing_filters > 0 {
            self.excuse(now_ns, Excuse::Filter);
        }
        self.failing_filters = 0;
        self.history.begin_flush(id);
        let synced = self.medium.hand_over();
        self.history.end_flush(id, synced);
        if let Some(second) = &self.second {
            second.hand_over();
        }
    }

    /// The power is cut: worker and guest are gone, and what was not flushed may be.
    pub fn cut_power(&mut self) {
        self.medium.cut_power();
        if let Some(second) = &self.second {
            second.cut_power();
        }
        // Only now: what the media wrote came from the guest's memory.
        for ring in 0..self.rings.len() {
            for request in self.rings[ring].reset() {
                self.forget(&request);
            }
        }
        self.history.cut_power();
        self.copy_unsure.fill(true);
        self.suspects.clear();
        self.excuses.clear();
        self.failing_filters = 0;
    }
}

/// Whether an error of the medium may be one for this request.
fn matches(request: &Request, failed: &Failed, covers: bool) -> bool {
    if request.kind == Kind::Flush || failed.op == Op::Flush {
        return request.kind == Kind::Flush && failed.op == Op::Flush;
    }
    let range: Range = failed.range;
    let (asked, failed_at) = (&request.sectors, sectors(range));
    let place = match covers {
        true => asked.start <= failed_at.start && failed_at.end <= asked.end,
        false => asked.start < failed_at.end && failed_at.start < asked.end,
    };
    place
        && request.kind.is_modification() == failed.op.is_modification()
        && (request.kind == Kind::Read) == (failed.op == Op::Read)
}
