//! What goes wrong: weather, deaths of filters and workers, guests that reset their rings; and who
//! starts again what died.

use super::*;

impl Simulation {
    pub(super) fn begin_faults(&mut self) {
        let faults = self.plan.faults;
        let happens = |random: &mut Random, rate: u64| random.number() % 1_000_000 < rate;
        if happens(&mut self.random, faults.filter_death) {
            self.doom_filter();
        }
        if happens(&mut self.random, faults.filter_hang) {
            self.trouble_filter("fault: filter hang");
        }
        if happens(&mut self.random, faults.filter_nonsense) {
            self.trouble_filter("fault: filter nonsense");
        }
        if happens(&mut self.random, faults.broken_ring) {
            self.trouble_filter("fault: broken ring");
        }
        if happens(&mut self.random, faults.ring_stop) {
            self.stop_ring(After::Resume);
        }
        if happens(&mut self.random, faults.guest_reset) {
            self.stop_ring(After::Reset);
        }
        if happens(&mut self.random, faults.slow_store) {
            let slower = self.random.pick(&[10, 100, 1000]);
            let until_ns = self.now_ns + self.random.range(1, 50) * MS;
            let delay_ns = (5_000 * slower, 80_000 * slower);
            self.set_weather(Weather { delay_ns, ..Weather::FINE }, until_ns);
            self.coverage.count("fault: slow store");
        }
        if happens(&mut self.random, faults.worker_death) && self.death_in.is_none() {
            self.coverage.count("fault: worker death");
            if self.random.one_in(4) {
                self.coverage.count("worker death: between turns");
                self.lose_worker();
            } else {
                self.death_in = Some(self.random.range(0, 40));
            }
        }
        if happens(&mut self.random, faults.chain_change) {
            self.begin_change();
        }
        if happens(&mut self.random, faults.power_cut) {
            self.cut_power();
        }
        if happens(&mut self.moves, faults.migration) {
            self.begin_migration();
        }
        if happens(&mut self.random, faults.failing_store) {
            let until_ns = self.now_ns + self.random.range(1, 20) * MS;
            let flush_errors = if self.random.one_in(4) { 300 } else { 0 };
            let (read_errors, write_errors) =
                (self.random.range(0, 300), self.random.range(0, 300));
            let weather = Weather { read_errors, write_errors, flush_errors, ..Weather::FINE };
            self.set_weather(weather, until_ns);
            self.coverage.count("fault: failing store");
        }
    }

    /// The worker dies with its filter hosts, and another one takes over what it left: the
    /// guest's memory, what the hypervisor keeps, the media.
    pub(crate) fn lose_worker(&mut self) {
        self.note(format_args!("the worker dies"));
        self.lose_change();
        // The next one may die soon, too.
        let soon = !self.calm && self.random.one_in(3);
        self.death_in = soon.then(|| self.random.range(0, 12));
        for process in &self.processes {
            for (place, Place { engine, .. }) in process.places.iter().enumerate() {
                let disk = &mut self.disks[self.seats[*engine].disk];
                disk.seen_before.extend(process.seen(place));
            }
        }
        // The media first: a process is dead when its requests are over.
        let now_ns = self.now_ns;
        for seat in &self.seats {
            // Its requests may have failed in the turn in which it was given up.
            let given_up = seat.world.given_up.lock().expect("lock");
            let disk = &mut self.disks[seat.disk];
            let mut places = given_up.iter().filter_map(|(host, _)| disk.place_of(*host));
            if places.any(|place| disk.slots[place].policy == OnFailure::Fail) {
                disk.excuse(now_ns, Excuse::Filter);
            }
        }
        self.disks.iter_mut().for_each(|disk| disk.lose_worker(now_ns));
        self.lose_source();
        self.seats.clear();
        self.start_worker();
        self.go_on_logging();
        if !self.calm && self.random.one_in(4) {
            self.stop_ring(After::Resume);
        }
    }

    /// The host loses its power: everything begins anew on what the media have kept.
    fn cut_power(&mut self) {
        self.note(format_args!("the power is cut"));
        self.coverage.count("fault: power cut");
        self.lose_change();
        self.death_in = None;
        self.forget_migration();
        self.seats.clear();
        for disk in &mut self.disks {
            disk.cut_power();
        }
        self.start_worker();
    }

    /// A filter host shall die at a point of its work.
    fn doom_filter(&mut self) {
        let alive: Vec<usize> = (0..self.processes.len())
            .filter(|at| self.processes[*at].up && self.processes[*at].doom.is_none())
            .collect();
        if alive.is_empty() {
            return;
        }
        let at = self.random.pick(&alive);
        let step = self.random.pick(self.processes[at].role.steps());
        self.processes[at].doom = Some(step);
        self.coverage.count("fault: filter death");
    }

    /// Another kind of trouble with a filter host.
    fn trouble_filter(&mut self, what: &str) {
        let alive: Vec<usize> = (0..self.processes.len())
            .filter(|at| self.processes[*at].up && !self.processes[*at].hung)
            .collect();
        if alive.is_empty() {
            return;
        }
        let at = self.random.pick(&alive);
        let process = &mut self.processes[at];
        match what {
            "fault: filter hang" => process.hung = true,
            "fault: filter nonsense" => process.nonsense = self.random.range(1, 30) as u32,
            _ => {
                let place = self.random.below(process.places.len());
                let engine = process.places[place].engine;
                process.break_ring(place, &mut self.seats[engine].world, &mut self.random);
                // What it takes from now on makes no sense either.
                process.hung = true;
            }
        }
        self.coverage.count(what);
        let role = self.processes[at].role.name();
        self.note(format_args!("the {role}: {what}"));
    }

    /// A filter host dies. What follows is decided by the recovery of production.
    pub(crate) fn kill(&mut self, at: usize) {
        let process = &mut self.processes[at];
        for place in 0..process.places.len() {
            let Place { engine, host } = process.places[place];
            let seat = &mut self.seats[engine];
            process.die(place, &mut seat.world);
            seat.world.lose_host(host);
            if !process.is_on_trial {
                self.disks[seat.disk].lose_filter(process.role, process.on_failure);
            }
        }
        process.end();
        if self.random.one_in(8) && !self.calm {
            process.failing_starts = self.random.range(1, 3) as u32;
        }
        let failed = process
            .recovery
            .handle_failure(self.now_ns, process.is_needed() || process.is_on_trial);
        self.count_failure(at, failed);
    }

    fn count_failure(&mut self, at: usize, failed: Failed) {
        let process = &self.processes[at];
        let (role, policy) = (process.role.name(), process.on_failure);
        self.coverage.count(&format!("filter gone: {policy}"));
        if matches!(failed, Failed::Alarm { .. }) {
            self.coverage.count("seen: quarantine");
        }
        self.note(format_args!("the {role} ({policy}) is gone: {failed:?}"));
    }

    /// Filter hosts whose time has come are started again; whether one was.
    pub(super) fn start_due(&mut self) -> bool {
        let mut busy = false;
        for at in 0..self.processes.len() {
            if !self.is_startable(at) {
                continue;
            }
            let process = &mut self.processes[at];
            if !process.recovery.poll_start(self.now_ns) {
                continue;
            }
            busy = true;
            if process.failing_starts > 0 {
                process.failing_starts -= 1;
                let failed = process.recovery.handle_failure(self.now_ns, process.is_needed());
                self.coverage.count("fault: failing start");
                self.count_failure(at, failed);
                continue;
            }
            process.recovery.handle_started();
            process.up = true;
            let (role, policy) = (process.role, process.on_failure);
            for Place { engine, host } in process.places.clone() {
                let seat = &mut self.seats[engine];
                // All that the second disk has are copies, and those of the dead would come
                // after newer ones.
                let late = self.disks[seat.disk].second.as_ref().map_or(0, Medium::in_flight);
                assert!(
                    role != Role::Splitter || late == 0,
                    "the next splitter comes, and {late} writes of the dead one can come late"
                );
                seat.world.return_host(host);
                self.disks[seat.disk].return_filter(role, policy, self.now_ns);
            }
            self.coverage.count("seen: filter started again");
            self.note(format_args!("the {} is back", role.name()));
        }
        busy
    }

    /// Whether all engines have said that nothing of a dead host can come late.
    pub(super) fn is_quiet(&self, at: usize) -> bool {
        let mut places = self.processes[at].places.iter();
        places.all(|Place { engine, host }| self.seats[*engine].world.is_quiet(*host))
    }

    pub(super) fn is_startable(&self, at: usize) -> bool {
        let process = &self.processes[at];
        !process.up && !process.is_on_trial && self.is_quiet(at) && !self.is_changed(process)
    }

    /// Filter hosts that an engine wants killed are.
    pub(super) fn kill_given_up(&mut self, engine: usize) {
        let given_up: Vec<(usize, String)> =
            std::mem::take(&mut *self.seats[engine].world.given_up.lock().expect("lock"));
        for (host, why) in given_up {
            self.note(format_args!("engine {engine} gives up host {host}: {why}"));
            let place = Place { engine, host };
            let whose = self.processes.iter().position(|process| process.places.contains(&place));
            // It may have left the chain meanwhile.
            let Some(whose) = whose else { continue };
            if self.processes[whose].up {
                self.coverage.count("seen: filter given up");
                self.kill(whose);
            }
        }
    }

    /// A ring is stopped.
    fn stop_ring(&mut self, after: After) {
        let at = self.random.below(self.seats.len());
        let paused = self.is_paused();
        let seat = &mut self.seats[at];
        if paused || seat.stopping.is_some() {
            return;
        }
        let drain_ms = self.random.pick(&[0, 0, 5]);
        seat.stopping = Some((seat.world.stop(drain_ms), after));
        let name = if after == After::Reset { "fault: guest reset" } else { "fault: ring stop" };
        self.coverage.count(name);
        self.note(format_args!(
            "the ring of engine {at} is stopped ({drain_ms} ms), then {after:?}"
        ));
    }

    pub(super) fn go_on_after_stop(&mut self, at: usize) {
        let seat = &mut self.seats[at];
        let Some((stopped, after)) = &seat.stopping else { return };
        let after = *after;
        // What is cancelled meanwhile fails.
        self.disks[seat.disk].excuse(self.now_ns, Excuse::Stop { ring: seat.ring });
        let Ok(queue) = stopped.try_recv() else { return };
        seat.stopping = None;
        let queue: Box<dyn Any> = queue.expect("the queue that it was given");
        let queue = queue.downcast::<Spy>().expect("a ring");
        let stopped = queue.finish();
        if after == After::Move && stopped.left() == 0 {
            return self.note_place(at, stopped.next_available());
        }
        if after == After::Move {
            // Nobody but this host knows of it: it is done before it is said where the ring is.
            self.coverage.count("migration: ring with something left");
        }
        let disk = &mut self.disks[seat.disk];
        if after == After::Reset {
            for request in disk.rings[seat.ring].reset() {
                disk.forget(&request);
            }
        }
        // A ring that begins anew may be elsewhere.
        self.log_writes(at);
        let seat = &mut self.seats[at];
        let queue = self.disks[seat.disk].rings[seat.ring].open(&mut seat.device);
        seat.world.start(Box::new(Spy::new(queue, seat.notes.clone())));
        if after == After::Move {
            // It runs for a moment.
            seat.world.turn();
        }
        self.note(format_args!("the ring of engine {at} is started again"));
    }
}
