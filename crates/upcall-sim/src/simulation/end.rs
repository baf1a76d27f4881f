//! The end of a world: no more faults, everything finishes, and is looked at.

use super::*;

impl Simulation {
    /// No more faults: what is broken is mended.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        self.death_in = None;
        self.set_weather(Weather::FINE, u64::MAX);
        for at in 0..self.processes.len() {
            let process = &mut self.processes[at];
            (process.doom, process.failing_starts, process.nonsense) = (None, 0, 0);
            // Without a deadline nobody else would.
            if process.hung && self.plan.deadline_ms == 0 {
                self.kill(at);
            }
        }
        self.note(format_args!("no more faults"));
    }

    /// Everything has its turn until nothing is left to do.
    pub(super) fn finish(&mut self) {
        let until_ns = self.now_ns + PATIENCE_NS;
        for _ in 0..TURNS_MAX {
            let mut busy = self.start_due() | self.carry_change() | self.migrate();
            for seat in 0..self.seats.len() {
                busy |= self.turn(seat);
            }
            for process in 0..self.processes.len() {
                for place in 0..self.processes[process].places.len() {
                    busy |= self.act(process, place);
                }
            }
            for disk in 0..self.disks.len() {
                busy |= self.serve_media(disk);
            }
            for seat in 0..self.seats.len() {
                busy |= !self.is_paused() && self.reap(seat);
            }
            if busy {
                continue;
            }
            match self.next_event_ns() {
                Some(at_ns) if at_ns <= until_ns => self.pass(at_ns.saturating_sub(self.now_ns)),
                Some(_) => {
                    let engines: Vec<_> =
                        self.seats.iter().map(|seat| seat.world.wakes_in_ns()).collect();
                    panic!(
                        "not finished after {} s of virtual time: engines wake in {engines:?} ns, a \
                         change is due at {:?}",
                        PATIENCE_NS / 1_000 / MS,
                        self.change_due_ns()
                    )
                }
                None => {
                    assert!(self.migration.is_none(), "a migration never ends");
                    return;
                }
            }
        }
        panic!("not finished after {TURNS_MAX} turns: it runs in circles");
    }

    /// When something happens although nobody does anything.
    fn next_event_ns(&self) -> Option<u64> {
        let media = self.disks.iter().flat_map(|disk| [Some(&disk.medium), disk.second.as_ref()]);
        let media = media.flatten().filter_map(|medium| medium.next_due_ns());
        let engines = self.seats.iter().filter(|seat| !seat.world.has_ended());
        let engines = engines.filter_map(|seat| seat.world.wakes_in_ns());
        let engines = engines.map(|ns| self.now_ns + ns.max(1));
        let starts = (0..self.processes.len())
            .filter(|at| self.is_startable(*at))
            .filter_map(|at| self.processes[at].recovery.start_at_ns());
        media.chain(engines).chain(starts).chain(self.change_due_ns()).min()
    }

    pub(super) fn check_end(&mut self) {
        assert!(self.change.is_none(), "a change of chains never ends");
        self.check_vacated();
        for disk in &self.disks {
            let left: Vec<&Request> = disk.open.values().collect();
            assert!(left.is_empty(), "disk {}: requests never end: {left:?}", disk.number);
            disk.rings.iter().for_each(|ring| ring.check_memory());
            disk.check_content().unwrap_or_else(|wrong| panic!("{wrong}"));
            disk.check_unmet().unwrap_or_else(|wrong| panic!("{wrong}"));
            self.coverage.add("checked: sectors missed and recorded", disk.missed);
        }
        for seat in 0..self.seats.len() {
            assert_eq!(self.seats[seat].world.in_flight(), 0, "engine {seat} has requests");
            self.seats[seat].world.assert_empty();
        }
        for process in self.processes.iter().filter(|process| !process.hung) {
            let (role, name) = (process.role, process.role.name());
            assert!(process.up || !process.is_needed(), "the {name} never came back");
            assert!(process.is_empty(), "the {name} was left with something: {role:?}");
        }
        for at in 0..self.disks.len() {
            let checked = self.disks[at].check_copy().unwrap_or_else(|wrong| panic!("{wrong}"));
            self.coverage.add("checked: sectors of a copy", checked);
        }
        self.coverage.add("requests completed", self.completed);
        self.coverage.add("virtual ms", self.now_ns / MS);
        let roles: BTreeMap<&str, u64> = self.disks.iter().flat_map(|disk| &disk.slots).fold(
            BTreeMap::new(),
            |mut roles, slot| {
                *roles.entry(slot.role.name()).or_default() += 1;
                roles
            },
        );
        for (role, count) in roles {
            self.coverage.add(&format!("chain: {role}"), count);
        }
    }
}
