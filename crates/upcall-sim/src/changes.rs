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

impl Simulation {
    // ------------------------------------------------------------------- what is drawn

    /// A change begins, of one disk or of all at once.
    pub(crate) fn begin_change(&mut self) {
        if self.change.is_some() || self.gives_up() {
            return;
        }
        let disks: Vec<usize> = match self.random.one_in(2) {
            true => (0..self.disks.len()).collect(),
            false => vec![self.random.below(self.disks.len())],
        };
        let mut parts = Vec::new();
        for disk in disks {
            let wanted = self.draw(disk);
            parts.extend(self.part(disk, wanted));
        }
        let is_edited = |part: &Part| part.wanted != part.before;
        if !parts.iter().any(is_edited) {
            return self.forget_newcomers();
        }
        let mut going = Going::new(parts);
        if self.random.one_in(5) {
            use ChangeStep::*;
            going.fails_at = Some(self.random.pick(&[Prepare, Leave, Enter, Commit]));
        }
        let wants_trial = !self.random.one_in(4);
        let comes = going.parts.iter().any(|part| part.wanted.iter().any(|slot| slot.is_fresh));
        going.has_trial =
            wants_trial && comes && going.parts.iter().all(|part| part.outline.can_be_taken_back());
        self.coverage.count("chain change: begun");
        if going.parts.len() > 1 {
            self.coverage.count("chain change: of several disks");
        }
        for part in &going.parts {
            self.trace.add(
                self.now_ns,
                format_args!("disk {}: {:?} becomes {:?}", part.disk, part.before, part.wanted),
            );
        }
        self.change = Some(going);
    }

    /// What a disk's chain shall be.
    fn draw(&mut self, at: usize) -> Vec<Wanted> {
        let mut wanted = self.wanted_now(at);
        for _ in 0..self.random.range(1, 3) {
            let random = &mut self.random;
            let disk = &self.disks[at];
            let role_of = |id: SlotId| disk.slots.iter().find(|slot| slot.id == id).map(|s| s.role);
            if random.one_in(3) || wanted.is_empty() {
                let role = random.pick(&Role::ALL);
                // What changes data would make what is there unreadable; grants are given only
                // at the start.
                let is_there = disk.slots.iter().chain(&disk.left).any(|slot| slot.role == role);
                if is_there || matches!(role, Role::Changer | Role::Splitter) {
                    continue;
                }
                let policy = self.plan.policy_of(role);
                let slot = self.disks[at].new_slot(role, policy, 0);
                wanted.push(Wanted { id: slot.id, order: slot.order, is_fresh: true });
                self.disks[at].left.push(slot);
                continue;
            }
            // Two of one class, of which neither changes anything, change places.
            let mut alike = wanted
                .iter_mut()
                .filter(|slot| matches!(role_of(slot.id), Some(Role::Watcher | Role::Observer)));
            if let (Some(first), Some(second)) = (alike.next(), alike.next())
                && random.one_in(2)
            {
                first.order = second.order + 1;
                continue;
            }
            let place = random.below(wanted.len());
            let Some(role) = role_of(wanted[place].id) else { continue };
            match random.below(4) {
                0 if role != Role::Changer => drop(wanted.remove(place)),
                1 | 2 if matches!(role, Role::Watcher | Role::Observer) => {
                    wanted[place].order = random.below(4) as i32;
                }
                _ if role != Role::Splitter => wanted[place].is_fresh = true,
                _ => {}
            }
        }
        wanted
    }

    fn wanted_now(&self, at: usize) -> Vec<Wanted> {
        let slots = self.disks[at].slots.iter();
        slots.map(|slot| Wanted { id: slot.id, order: slot.order, is_fresh: false }).collect()
    }

    fn part(&self, at: usize, wanted: Vec<Wanted>) -> Option<Part> {
        let disk = &self.disks[at];
        let spec_of = |wanted: &Wanted| {
            let mut slots = disk.slots.iter().chain(&disk.left);
            let slot = slots.find(|slot| slot.id == wanted.id).expect("a slot that is known");
            SlotSpec { order: wanted.order, ..slot.spec() }
        };
        let make =
            |generation, specs| Chain::new(Generation(generation), specs, &disk.medium.info());
        let was = make(1, disk.slots.iter().map(|slot| slot.spec()).collect()).ok()?;
        let chain = make(2, wanted.iter().map(spec_of).collect()).ok()?;
        let sorted: Vec<Wanted> =
            chain.slots().map(|(index, _)| wanted[chain.source_index(index)]).collect();
        let mut part = Part {
            disk: at,
            before: self.wanted_now(at),
            outline: Outline::new(&was, &chain, [], []),
            chain: Arc::new(chain),
            wanted: sorted,
            replaced: Vec::new(),
            leaving: Vec::new(),
        };
        let is_there = |id: SlotId| disk.slots.iter().any(|slot| slot.id == id);
        let present = disk.slots.iter().map(|slot| Present {
            spec: slot.spec(),
            has_successor: part.keeps(slot.id) || part.replaces(slot.id),
            leaves_for_good: slot.gaps.is_some() || slot.role == Role::Splitter,
        });
        let present: Vec<Present> = present.collect();
        let comes: Vec<SlotSpec> =
            part.wanted.iter().filter(|slot| !is_there(slot.id)).map(spec_of).collect();
        part.outline = Outline::new(&was, &part.chain, &present, &comes);
        for slot in &disk.slots {
            if part.replaces(slot.id) {
                if part.outline.may_await_successor() {
                    part.replaced.push(slot.instance);
                }
            } else if !part.keeps(slot.id) && Outline::may_go_past(&slot.spec()) {
                part.leaving.push(slot.instance);
            }
        }
        Some(part)
    }

    fn forget_newcomers(&mut self) {
        for disk in &mut self.disks {
            let written = &disk.written;
            disk.left.retain(|slot| written.iter().any(|(id, _)| *id == slot.id));
        }
    }

    // --------------------------------------------------------------------- the course

    /// Carries a change forward; whether something was done.
    pub(crate) fn carry_change(&mut self) -> bool {
        if self.change.is_none() || !self.calm && !self.random.one_in(3) {
            return false;
        }
        let Some(mut going) = self.change.take() else { return false };
        if going.trial_until_ns.is_some() {
            return self.try_on(going);
        }
        let step = going.change.poll_step();
        let fails = going.fails_at == Some(step);
        let done = match step {
            ChangeStep::Prepare => Some(!fails),
            ChangeStep::Stun => self.stun(&mut going),
            ChangeStep::Leave => Some(self.leave(&mut going) && !fails),
            ChangeStep::Enter => Some(!fails),
            ChangeStep::Commit => Some(!fails && self.commit(&going)),
            ChangeStep::Switch => self.switch(&mut going),
            ChangeStep::UndoEnter => Some(true),
            ChangeStep::UndoLeave => Some(true),
            ChangeStep::Resume => {
                going.closed.clear();
                for at in self.seats_of(&going) {
                    self.seats[at].world.unstun();
                }
                Some(true)
            }
            ChangeStep::CleanUp => Some(true),
            ChangeStep::End(end) => return self.end_change(going, end),
        };
        let Some(done) = done else {
            self.change = Some(going);
            return false;
        };
        self.note(format_args!("chain change: {step:?}: {done}"));
        going.change.handle_step(done);
        let may_die = matches!(step, ChangeStep::Enter | ChangeStep::Commit | ChangeStep::Switch);
        self.change = Some(going);
        if may_die && !self.calm && self.plan.faults.worker_death > 0 && self.random.one_in(8) {
            self.coverage.count(&format!("worker death: after {step:?} of a change"));
            self.lose_worker();
        }
        true
    }

    fn seats_of(&self, going: &Going) -> Vec<usize> {
        let is_part = |disk: usize| going.parts.iter().any(|part| part.disk == disk);
        (0..self.seats.len()).filter(|at| is_part(self.seats[*at].disk)).collect()
    }

    fn stun(&mut self, going: &mut Going) -> Option<bool> {
        if !going.is_asked && going.waiting.is_empty() {
            let ms = self.random.pick(&[2, 20, 2_000, 2_000]);
            going.drain_until_ns = self.now_ns + ms * MS;
            for Part { disk, leaving, .. } in &going.parts {
                for slot in &mut self.disks[*disk].slots {
                    slot.is_leaving = leaving.contains(&slot.instance);
                }
            }
            for at in self.seats_of(going) {
                let seat = &mut self.seats[at];
                let part = going.parts.iter().find(|part| part.disk == seat.disk);
                let Some(Part { replaced, leaving, .. }) = part else { continue };
                going.waiting.push(seat.world.stun(replaced, leaving));
            }
            going.is_asked = true;
            return None;
        }
        if going.has_answers() {
            return Some(true);
        }
        let is_late = self.now_ns >= going.drain_until_ns;
        if is_late {
            going.waiting.clear();
            going.is_asked = false;
        }
        is_late.then_some(false)
    }

    /// The filters are told, and those that leave are closed.
    fn leave(&mut self, going: &mut Going) -> bool {
        // What has completed has completed with the chain as it was.
        for at in self.seats_of(going) {
            self.reap(at);
        }
        for part in &going.parts {
            let disk = part.disk;
            let hosts = self.disks[disk].slots.iter();
            let hosts: Vec<(usize, bool, bool)> = hosts
                .map(|slot| (slot.host, !part.keeps(slot.id), part.replaces(slot.id)))
                .collect();
            for (host, leaves, is_replaced) in hosts {
                let Some(at) = self.process_of(disk, host) else { continue };
                if self.processes[at].hung {
                    self.coverage.count("chain change: a filter hangs over it");
                    self.kill(at);
                }
                if !leaves {
                    continue;
                }
                let process = &self.processes[at];
                if !process.up && self.is_shared(going, at) {
                    return false;
                }
                if process.up {
                    let place_of = |(place, at): (usize, &Place)| {
                        (self.seats[at.engine].disk == disk && at.host == host).then_some(place)
                    };
                    let places = process.places.iter().enumerate().filter_map(place_of);
                    places.for_each(|place| process.check_drained(place, is_replaced));
                } else {
                    self.coverage.count("chain change: a dead filter leaves");
                }
                self.processes[at].close(self.disks[disk].number);
                going.closed.push((disk, host));
            }
        }
        true
    }

    fn process_of(&self, disk: usize, host: usize) -> Option<usize> {
        let is_it = |place: &Place| self.seats[place.engine].disk == disk && place.host == host;
        self.processes.iter().position(|process| process.places.iter().any(is_it))
    }

    /// Whether a process serves others that stay.
    fn is_shared(&self, going: &Going, at: usize) -> bool {
        self.processes[at].places.iter().any(|place| {
            let number = self.seats[place.engine].disk;
            let slot = self.disks[number].slots.iter().find(|slot| slot.host == place.host);
            let part = going.parts.iter().find(|part| part.disk == number);
            match (slot, part) {
                (Some(slot), Some(part)) => part.keeps(slot.id),
                _ => true,
            }
        })
    }

    /// Whether a filter of this process is closed, and is not to be started again.
    pub(crate) fn is_changed(&self, process: &Process) -> bool {
        let Some(going) = &self.change else { return false };
        process
            .places
            .iter()
            .any(|place| going.closed.contains(&(self.seats[place.engine].disk, place.host)))
    }

    /// Writes down what the chains will be, unless new filters are to be tried first.
    fn commit(&mut self, going: &Going) -> bool {
        if going.has_trial {
            return true;
        }
        for at in 0..self.disks.len() {
            let part = going.parts.iter().find(|part| part.disk == at);
            let now = self.wanted_now(at);
            let written = part.map_or(&now, |part| &part.wanted);
            self.disks[at].written = written.iter().map(|slot| (slot.id, slot.order)).collect();
        }
        true
    }

    fn switch(&mut self, going: &mut Going) -> Option<bool> {
        if !going.is_asked && going.waiting.is_empty() {
            for index in 0..going.parts.len() {
                self.name_newcomers(&going.parts[index]);
                for at in 0..self.seats.len() {
                    if self.seats[at].disk == going.parts[index].disk {
                        let next = self.next_of(going, index);
                        let chain = &going.parts[index].chain;
                        going.waiting.push(self.seats[at].world.swap(chain, next));
                    }
                }
            }
            going.is_asked = true;
            return None;
        }
        if !going.has_answers() {
            return None;
        }
        for index in 0..going.parts.len() {
            self.settle(going, index);
        }
        Some(true)
    }

    /// Gives the slots that come, or get another filter, their instances and rooms.
    fn name_newcomers(&mut self, part: &Part) {
        let disk = &mut self.disks[part.disk];
        let slots = disk.slots.iter();
        let mut taken: Vec<(u32, usize)> = slots.map(|slot| (slot.instance, slot.room)).collect();
        for wanted in part.wanted.iter().filter(|wanted| wanted.is_fresh) {
            let instance = (0..).find(|number| taken.iter().all(|(other, _)| other != number));
            let free = (1..).find(|room| taken.iter().all(|(_, other)| other != room));
            let there = disk.slots.iter_mut().find(|slot| slot.id == wanted.id);
            let is_there = there.is_some();
            let Some(slot) = there.or(disk.left.iter_mut().find(|slot| slot.id == wanted.id))
            else {
                unreachable!("a newcomer is kept");
            };
            slot.next_instance = instance.unwrap_or(0);
            if !is_there {
                slot.room = free.unwrap_or(1);
            }
            taken.push((slot.next_instance, slot.room));
        }
    }

    /// What an engine of a part's disk is given.
    fn next_of(&mut self, going: &Going, index: usize) -> Vec<Next> {
        let part = &going.parts[index];
        let disk = &mut self.disks[part.disk];
        let mut all = Vec::new();
        for (place, wanted) in part.wanted.iter().enumerate() {
            let there = disk.slots.iter_mut().position(|slot| slot.id == wanted.id);
            let slot = match there {
                Some(at) => &mut disk.slots[at],
                None => {
                    let left = disk.left.iter_mut().find(|slot| slot.id == wanted.id);
                    left.expect("a newcomer is kept")
                }
            };
            if !wanted.is_fresh {
                all.push(Next::Stays { instance: slot.instance, on_failure: slot.policy });
                continue;
            }
            let index = upcall_chain::SlotIndex::new(place).expect("a place of the chain");
            let can_try = part.outline.can_try(part.chain.spec(index), there.is_some());
            // Who takes another one's place goes on with its record.
            let gaps = slot.gaps.as_mut().filter(|_| there.is_none());
            all.push(Next::Comes(Newcomer {
                instance: slot.next_instance,
                issues: slot.role.issues(),
                on_failure: slot.policy,
                gaps: gaps.map(|gaps| gaps.way()),
                replaces: there.is_some().then_some(slot.instance),
                room: slot.room,
                is_on_trial: going.has_trial && can_try,
            }));
        }
        all
    }

    /// The queues have the new chain: so has the disk.
    fn settle(&mut self, going: &Going, index: usize) {
        let part = &going.parts[index];
        let at = part.disk;
        let engines: Vec<usize> =
            (0..self.seats.len()).filter(|engine| self.seats[*engine].disk == at).collect();
        let comes = part.wanted.iter().filter(|wanted| wanted.is_fresh).count();
        let mut next_host = self.seats[engines[0]].world.hosts.len() - comes;
        let mut old = std::mem::take(&mut self.disks[at].slots);
        for (place, wanted) in part.wanted.iter().enumerate() {
            let there = old.iter().position(|slot| slot.id == wanted.id);
            let left = self.disks[at].left.iter().position(|slot| slot.id == wanted.id);
            let mut slot = match (there, left) {
                (Some(there), _) => old.remove(there),
                (None, Some(left)) => self.disks[at].left.remove(left),
                (None, None) => unreachable!("a newcomer is kept"),
            };
            slot.order = wanted.order;
            if !wanted.is_fresh {
                self.disks[at].slots.push(slot);
                continue;
            }
            let mut process = Process::new(slot.role, slot.key, slot.policy, self.plan.recovery);
            let index = upcall_chain::SlotIndex::new(place).expect("a place of the chain");
            let can_try = part.outline.can_try(part.chain.spec(index), there.is_some());
            process.is_on_trial = going.has_trial && can_try;
            if process.is_on_trial && !self.calm {
                self.trouble_newcomer(&mut process);
            }
            let was = slot.host;
            slot.host = next_host;
            slot.instance = slot.next_instance;
            next_host += 1;
            let host = slot.host;
            self.disks[at].slots.push(slot);
            for engine in &engines {
                let new = Place { engine: *engine, host };
                match there {
                    Some(_) => {
                        let desk = self.vacate(Place { engine: *engine, host: was });
                        process.give_place(new, desk);
                        self.coverage.count("chain change: replaced");
                    }
                    None => {
                        process.add_place(new);
                        self.coverage.count("chain change: attached");
                    }
                }
            }
            if there.is_none() {
                let place = self.disks[at].slots.len() - 1;
                self.disks[at].begin_slot(place);
            }
            self.processes.push(process);
        }
        for slot in old {
            for engine in &engines {
                drop(self.vacate(Place { engine: *engine, host: slot.host }));
                self.coverage.count("chain change: detached");
            }
            self.disks[at].left.push(slot);
        }
        let order = |all: &[Wanted]| -> Vec<SlotId> {
            let stays = all.iter().filter(|slot| part.keeps(slot.id));
            stays.map(|slot| slot.id).collect()
        };
        let stays_before: Vec<SlotId> = order(&part.before);
        if stays_before != order(&part.wanted) {
            self.coverage.count("chain change: reordered");
        }
    }

    /// A new filter that does not stand its trial.
    fn trouble_newcomer(&mut self, process: &mut Process) {
        match self.random.below(6) {
            0 => process.doom = Some(self.random.pick(process.role.steps())),
            1 if self.plan.deadline_ms > 0 => process.hung = true,
            2 => process.fails = true,
            _ => {}
        }
    }

    /// A filter is gone from a place for good.
    fn vacate(&mut self, place: Place) -> crate::filters::Desk {
        let is_its = |process: &Process| process.places.contains(&place);
        let at = self.processes.iter().position(is_its).expect("a filter at each place");
        let seat = &mut self.seats[place.engine];
        let process = &mut self.processes[at];
        if process.up {
            let number = process.places.iter().position(|other| *other == place);
            process.die(number.expect("its place"), &mut seat.world);
        } else if !process.is_on_trial {
            let (role, policy) = (process.role, process.on_failure);
            self.disks[seat.disk].return_filter(role, policy, self.now_ns);
        }
        // What was sent to a dead one before that was known is nobody's.
        while seat.world.hosts[place.host].take().is_some() {}
        let desk = process.take_place(place);
        if process.places.is_empty() {
            self.processes.remove(at);
        }
        self.vacated.push(place);
        desk
    }

    /// Who has left is sent nothing.
    pub(crate) fn check_vacated(&mut self) {
        for Place { engine, host } in std::mem::take(&mut self.vacated) {
            let Some(seat) = self.seats.get_mut(engine) else { continue };
            while let Some(entry) = seat.world.hosts[host].take() {
                let is_request =
                    matches!(entry.kind, submission_kind::START | submission_kind::DONE);
                assert!(!is_request, "host {host} has left, and is sent {entry:?}");
            }
        }
    }

    // ------------------------------------------------------------------ how it ends

    fn end_change(&mut self, mut going: Going, end: ChangeEnd) -> bool {
        match end {
            ChangeEnd::Unchanged(at) => {
                self.coverage.count(&format!("chain change: given up at {}", name(at)));
                self.forgive_passed(&going);
                if going.is_taking_back {
                    self.coverage.count("chain change: stuck");
                    self.end_trials();
                }
            }
            ChangeEnd::Changed if going.has_trial => {
                let ms = self.random.pick(&[1, 20, 200]);
                going.trial_until_ns = Some(self.now_ns + ms * MS);
                self.change = Some(going);
                return true;
            }
            ChangeEnd::Changed if going.is_taking_back => {
                self.coverage.count("chain change: taken back");
                self.end_trials();
            }
            ChangeEnd::Changed => self.coverage.count("chain change: made"),
        }
        self.forget_newcomers();
        true
    }

    /// Requests may have gone past a dead filter that was about to leave, and stays now.
    fn forgive_passed(&mut self, going: &Going) {
        for part in &going.parts {
            for place in 0..self.disks[part.disk].slots.len() {
                let slot = &self.disks[part.disk].slots[place];
                if slot.is_leaving {
                    self.disks[part.disk].forgive(place);
                }
            }
        }
    }

    /// A trial goes on, is stood, or has failed.
    fn try_on(&mut self, going: Going) -> bool {
        let on_trial = || self.processes.iter().filter(|process| process.is_on_trial);
        let has_failed = on_trial().any(|process| !process.up);
        let is_over = going.trial_until_ns.is_some_and(|until_ns| self.now_ns >= until_ns);
        if !has_failed && !is_over {
            self.change = Some(going);
            return false;
        }
        let is_written = !has_failed && (self.calm || !self.random.one_in(10));
        if is_written {
            self.coverage.count("chain change: trial stood");
            self.disks.iter_mut().for_each(|disk| disk.write_down());
            self.end_trials();
            self.forget_newcomers();
            return true;
        }
        let what = if has_failed { "trial failed" } else { "not written down" };
        self.coverage.count(&format!("chain change: {what}"));
        self.note(format_args!("chain change: {what}"));
        let mut parts = Vec::new();
        for part in &going.parts {
            let was_fresh = |id| part.wanted.iter().any(|slot| slot.id == id && slot.is_fresh);
            let is_there = |id| part.wanted.iter().any(|slot| slot.id == id);
            let wanted = part.before.iter().map(|before| Wanted {
                is_fresh: was_fresh(before.id) || !is_there(before.id),
                ..*before
            });
            parts.push(self.part(part.disk, wanted.collect()).expect("what it was"));
        }
        self.change = Some(Going { is_taking_back: true, ..Going::new(parts) });
        true
    }

    fn end_trials(&mut self) {
        for at in 0..self.processes.len() {
            if !std::mem::take(&mut self.processes[at].is_on_trial) {
                continue;
            }
            let process = &mut self.processes[at];
            let fails = std::mem::take(&mut process.fails);
            for Place { engine, host } in process.places.clone() {
                let seat = &mut self.seats[engine];
                let disk = &mut self.disks[seat.disk];
                if let Some(place) = disk.place_of(host) {
                    seat.world.end_trial(disk.slots[place].instance);
                }
                if !process.up {
                    disk.lose_filter(process.role, process.on_failure);
                } else if fails {
                    disk.excuse(self.now_ns, crate::disk::Excuse::Filter);
                }
            }
        }
    }

    /// The worker dies: what had completed has completed with the chain that there was.
    pub(crate) fn lose_change(&mut self) {
        if let Some(going) = self.change.take() {
            let what = if going.trial_until_ns.is_some() { "on trial" } else { "on its way" };
            self.coverage.count(&format!("worker death: with a change {what}"));
        }
        for at in 0..self.seats.len() {
            let disk = &self.disks[self.seats[at].disk];
            if disk.has_unwritten() {
                self.reap(at);
            }
        }
        self.check_vacated();
    }

    /// When a change has to be looked at although nobody does anything.
    pub(crate) fn change_due_ns(&self) -> Option<u64> {
        let going = self.change.as_ref()?;
        going.trial_until_ns.or(going.is_asked.then_some(going.drain_until_ns))
    }
}
