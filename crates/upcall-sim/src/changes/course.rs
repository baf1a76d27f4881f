//! A change on its way: each step as `upcall_chain::Change` says.

use super::*;

impl Simulation {
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

    pub(super) fn seats_of(&self, going: &Going) -> Vec<usize> {
        let is_part = |disk: usize| going.parts.iter().any(|part| part.disk == disk);
        (0..self.seats.len()).filter(|at| is_part(self.seats[*at].disk)).collect()
    }

    pub(super) fn stun(&mut self, going: &mut Going) -> Option<bool> {
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
    pub(super) fn leave(&mut self, going: &mut Going) -> bool {
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

    pub(super) fn process_of(&self, disk: usize, host: usize) -> Option<usize> {
        let is_it = |place: &Place| self.seats[place.engine].disk == disk && place.host == host;
        self.processes.iter().position(|process| process.places.iter().any(is_it))
    }

    /// Whether a process serves others that stay.
    pub(super) fn is_shared(&self, going: &Going, at: usize) -> bool {
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
    pub(super) fn commit(&mut self, going: &Going) -> bool {
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

    pub(super) fn switch(&mut self, going: &mut Going) -> Option<bool> {
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
    pub(super) fn name_newcomers(&mut self, part: &Part) {
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
    pub(super) fn next_of(&mut self, going: &Going, index: usize) -> Vec<Next> {
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
    pub(super) fn settle(&mut self, going: &Going, index: usize) {
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
    pub(super) fn trouble_newcomer(&mut self, process: &mut Process) {
        match self.random.below(6) {
            0 => process.doom = Some(self.random.pick(process.role.steps())),
            1 if self.plan.deadline_ms > 0 => process.hung = true,
            2 => process.fails = true,
            _ => {}
        }
    }

    /// A filter is gone from a place for good.
    pub(super) fn vacate(&mut self, place: Place) -> crate::filters::Desk {
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
}
