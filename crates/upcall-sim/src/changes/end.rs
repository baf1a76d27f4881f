//! How a change ends: made, given up, tried, taken back, or lost with its worker.

use super::*;

impl Simulation {
    pub(super) fn end_change(&mut self, mut going: Going, end: ChangeEnd) -> bool {
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
    pub(super) fn forgive_passed(&mut self, going: &Going) {
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
    pub(super) fn try_on(&mut self, going: Going) -> bool {
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

    pub(super) fn end_trials(&mut self) {
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
