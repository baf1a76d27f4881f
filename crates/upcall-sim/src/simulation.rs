//! One world, from its seed to its end.
//!
//! A scheduler that draws from the seed lets guests, engines, filter hosts and media have
//! their turns in any order, on a clock that stands still meanwhile. First with faults, then
//! without: then everything must finish, and the disks must hold what the guests were told.
//!
//! Always true: nothing here decides what the product decides; the queue, the engine, the
//! flights, the rings and the arenas are those of production.

mod migration;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use upcall_block::{Op, RequestQueue};
use upcall_chain::{Failed, OnFailure};
use upcall_vhost::crash;
use upcall_vhost::mock::{Device, Memory};
use upcall_worker::sim::{Making, World};

use crate::changes::Going;
use crate::coverage::Coverage;
use crate::disk::{Disk, Excuse};
use crate::filters::{Acted, Place, Process, Role, Step, Tools, View};
use crate::guest::{Kind, Outcome, Request, SECTORS_MAX};
use crate::medium::{Canary, Medium, Weather};
use crate::plan::Plan;
use crate::random::Random;
use crate::spy::{Notes, Spy};
use crate::trace::Trace;
use migration::Migration;

/// Bytes of the guest's memory.
const MEMORY: usize = 8 << 20;
/// Virtual time after the last fault within which everything must have finished.
const PATIENCE_NS: u64 = 120_000_000_000;
/// Turns after the last fault, so that a world that runs in circles is noticed.
const TURNS_MAX: usize = 400_000;
/// Filters that a disk has room for beyond those at the start of a worker.
const SPARE_ROOMS: usize = 8;
pub(crate) const MS: u64 = 1_000_000;

/// An engine, and the ring that it serves.
pub(crate) struct Seat {
    pub(crate) world: World,
    device: Device,
    notes: Notes,
    pub(crate) disk: usize,
    ring: usize,
    /// A stop under way, and what follows it.
    stopping: Option<(Stopped, After)>,
}

/// Where a queue comes back that was stopped.
type Stopped = Receiver<Option<Box<dyn RequestQueue>>>;

/// What follows when a ring has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// The guest goes on with it as it is.
    Resume,
    /// The guest resets it, and does not look at what came back.
    Reset,
    /// The guest moves: nothing, once it is said where the ring stands.
    Move,
}

/// One world. See the module.
pub struct Simulation {
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) now_ns: u64,
    pub(crate) memory: Arc<Memory>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) processes: Vec<Process>,
    pub(crate) seats: Vec<Seat>,
    weather_until_ns: u64,
    next_request: u64,
    completed: u64,
    /// No faults any more.
    pub(crate) calm: bool,
    /// A change of chains on its way, or on trial.
    pub(crate) change: Option<Going>,
    /// Where filters were that have left.
    pub(crate) vacated: Vec<Place>,
    /// The worker dies after so many stores to memory that outlives it.
    death_in: Option<u64>,
    /// The guest is on its way to another host.
    pub(crate) migration: Option<Migration>,
    /// What a migration draws from: worlds without one are as if there were none.
    moves: Random,
    pub coverage: Coverage,
    pub trace: Trace,
}

impl Simulation {
    /// The world of a seed, in which nothing has happened yet.
    pub fn new(seed: u64, canary: Option<Canary>) -> Simulation {
        let mut random = Random::new(seed);
        let mut plan = Plan::new(&mut random);
        canary.iter().for_each(|canary| plan.suit(*canary));
        let mut moves = Random::new(!seed);
        plan.draw_migrations(&mut moves);
        let memory = Arc::new(Memory::new(MEMORY));
        let mut disks = Vec::new();
        let shared_key = random.number() | 1;
        for (number, disk) in plan.disks.iter().enumerate() {
            let keys = disk.roles.iter().map(|(role, _)| match (role, plan.shares_hosts) {
                (Role::Changer, true) => shared_key,
                (Role::Changer, false) => random.number() | 1,
                _ => 0,
            });
            let keys = keys.collect();
            disks.push(Disk::new(number as u32, disk, keys, &memory, &mut random));
        }
        let mut simulation = Simulation {
            plan,
            random,
            now_ns: 1,
            memory,
            disks,
            processes: Vec::new(),
            seats: Vec::new(),
            weather_until_ns: 0,
            next_request: 1,
            completed: 0,
            calm: false,
            change: None,
            vacated: Vec::new(),
            death_in: None,
            migration: None,
            moves,
            coverage: Coverage::default(),
            trace: Trace::default(),
        };
        simulation.start_worker();
        if let Some(canary) = canary {
            let occasion = simulation.random.below(30) as u32;
            simulation.disks[0].medium.set_canary(canary, occasion);
        }
        simulation
    }

    /// A worker begins: engines, filter hosts, devices on what is there. It may die over it
    /// as well.
    fn start_worker(&mut self) {
        loop {
            let before = crash::passed();
            if crash::catch(self.death_in.unwrap_or(u64::MAX), || self.set_up()).is_ok() {
                if let Some(left) = &mut self.death_in {
                    *left -= crash::passed() - before;
                }
                return;
            }
            self.coverage.count("worker death: while it starts");
            self.death_in = None;
            let now_ns = self.now_ns;
            self.disks.iter_mut().for_each(|disk| disk.lose_worker(now_ns));
        }
    }

    fn set_up(&mut self) {
        self.processes = Vec::new();
        self.seats = Vec::new();
        self.change = None;
        self.vacated.clear();
        for disk in &mut self.disks {
            disk.begin_life();
            for gaps in disk.slots.iter_mut().filter_map(|slot| slot.gaps.as_mut()) {
                gaps.lose_worker(&mut self.random);
            }
        }
        for at in 0..self.disks.len() {
            let hosts = self.hosts_of(at);
            for ring in 0..self.disks[at].rings.len() {
                let mut world = self.engine(at);
                world.pass(self.now_ns);
                let device = self.disks[at].device(world.info.ops, &self.memory);
                let engine = self.seats.len();
                for (host, process) in hosts.iter().enumerate() {
                    self.processes[*process].add_place(Place { engine, host });
                }
                let notes = Notes::default();
                self.seats.push(Seat { world, device, notes, disk: at, ring, stopping: None });
                self.log_writes(engine);
                let seat = &mut self.seats[engine];
                let queue = self.disks[at].rings[ring].open(&mut seat.device);
                self.disks[at].rings[ring].begin_life();
                serve(&mut seat.world, Spy::new(queue, seat.notes.clone()));
            }
        }
    }

    /// The filter hosts of a disk's slots; made where there is none to share.
    fn hosts_of(&mut self, at: usize) -> Vec<usize> {
        let disk = &self.disks[at];
        let mut hosts = Vec::new();
        for slot in &disk.slots {
            let known = self.processes.iter().position(|known| known.role == slot.role);
            hosts.push(match known.filter(|_| self.plan.shares_hosts) {
                Some(known) => known,
                None => {
                    let recovery = self.plan.recovery;
                    let process = Process::new(slot.role, slot.key, slot.policy, recovery);
                    self.processes.push(process);
                    self.processes.len() - 1
                }
            });
        }
        hosts
    }

    fn engine(&mut self, at: usize) -> World {
        let disk = &mut self.disks[at];
        let mut lanes = Vec::new();
        for medium in [Some(&disk.medium), disk.second.as_ref()].into_iter().flatten() {
            let (queue, _) = medium.open_queue();
            lanes.push((Box::new(queue) as Box<dyn upcall_block::StoreQueue>, medium.info()));
        }
        let (mut making, _) = Making::new(disk.slots.iter().map(|slot| slot.spec()).collect());
        making.issues = disk.slots.iter().map(|slot| slot.role.issues()).collect();
        making.on_failure = disk.slots.iter().map(|slot| slot.policy).collect();
        for (place, slot) in disk.slots.iter_mut().enumerate() {
            if let Some(gaps) = &mut slot.gaps {
                making.record_gaps(place, &gaps.way());
            }
        }
        making.spare_rooms = SPARE_ROOMS;
        making.deadline_ms = self.plan.deadline_ms;
        making.lanes = lanes;
        making.entries = self.plan.entries;
        making.pages = self.plan.pages;
        making.plays_clock = true;
        // Whom an engine gives up is killed here, in all engines at once.
        making.kills = false;
        World::new(making)
    }

    pub(crate) fn note(&mut self, what: std::fmt::Arguments) {
        self.trace.add(self.now_ns, what);
    }

    /// Runs to the end. Panics with what is wrong.
    pub fn run(&mut self) {
        let steps = self.plan.steps;
        for _ in 0..steps {
            self.step();
            self.begin_faults();
            if self.migration.is_some() && self.moves.one_in(4) {
                self.migrate();
            }
            self.start_due();
            self.carry_change();
        }
        self.calm_down();
        self.finish();
        self.check_end();
    }

    // -------------------------------------------------------------------- turns

    fn step(&mut self) {
        match self.random.below(16) {
            0..=2 => self.submit(),
            3..=6 => {
                let seat = self.random.below(self.seats.len());
                self.turn(seat);
            }
            7 => {
                let seat = self.random.below(self.seats.len());
                if !self.is_paused() {
                    self.reap(seat);
                }
            }
            8..=11 if !self.processes.is_empty() => {
                let process = self.random.below(self.processes.len());
                let places = self.processes[process].places.len();
                let place = self.random.below(places);
                self.act(process, place);
            }
            12..=13 => {
                let disk = self.random.below(self.disks.len());
                self.serve_media(disk);
            }
            _ => {
                let most = self.random.pick(&[1_000, 20_000, 200_000]);
                let ns = self.random.range(0, most);
                self.pass(ns);
            }
        }
    }

    fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
        for seat in &mut self.seats {
            seat.world.pass(ns);
        }
        for disk in &self.disks {
            for medium in [Some(&disk.medium), disk.second.as_ref()].into_iter().flatten() {
                medium.set_now(self.now_ns);
            }
        }
        if !self.calm && self.now_ns >= self.weather_until_ns {
            self.set_weather(Weather::FINE, u64::MAX);
        }
    }

    fn set_weather(&mut self, weather: Weather, until_ns: u64) {
        self.weather_until_ns = until_ns;
        for disk in &self.disks {
            for medium in [Some(&disk.medium), disk.second.as_ref()].into_iter().flatten() {
                medium.set_weather(weather);
            }
        }
    }

    fn submit(&mut self) {
        let at = self.random.below(self.seats.len());
        let (seat, random) = (&mut self.seats[at], &mut self.random);
        let disk = &mut self.disks[seat.disk];
        let paused = self.migration.as_ref().is_some_and(Migration::is_paused);
        if paused || seat.stopping.is_some() || !disk.rings[seat.ring].has_room() {
            return;
        }
        let kind = match random.below(40) {
            0..=12 => Kind::Read,
            13..=27 => Kind::Write,
            28..=31 => Kind::Flush,
            32..=34 if seat.world.info.ops.contains(Op::Discard) => Kind::Discard,
            32..=36 => Kind::WriteZeroes { unmap: random.one_in(2) },
            37 => Kind::GetId,
            38 => Kind::PastEnd,
            _ => Kind::Unknown,
        };
        let length = match random.below(4) {
            0 => 1 + random.below(SECTORS_MAX),
            _ => 1 + random.below(4),
        };
        let first = match random.one_in(2) {
            // A few sectors are wanted by everybody.
            true => random.below(16),
            false => random.below(disk.guests - length + 1),
        };
        let sectors = match kind {
            Kind::Read | Kind::Write | Kind::Discard | Kind::WriteZeroes { .. } => {
                first..first + length
            }
            _ => 0..0,
        };
        if !random.per_mille(self.plan.overlaps) && !disk.is_quiet(&sectors) {
            return;
        }
        let request = Request {
            id: self.next_request,
            kind,
            sectors,
            ring: seat.ring,
            begun_ns: self.now_ns,
        };
        self.next_request += 1;
        self.coverage.count(&format!("request: {}", kind.name()));
        disk.begin(&request);
        disk.rings[seat.ring].submit(request.clone(), random);
        let (disk, ring) = (seat.disk, seat.ring);
        self.note(format_args!("disk {disk} ring {ring}: the guest submits {request:?}"));
    }

    /// A turn of an engine; whether it did something. The worker may die within.
    fn turn(&mut self, at: usize) -> bool {
        if self.seats[at].world.has_ended() {
            return false;
        }
        let before = crash::passed();
        let after = self.death_in.unwrap_or(u64::MAX);
        let turn = crash::catch(after, || {
            let busy = self.seats[at].world.turn();
            if busy {
                self.note(format_args!("engine {at} has a turn"));
            }
            self.look_at_taken(at);
            self.go_on_after_stop(at);
            busy
        });
        let Ok(busy) = turn else {
            self.look_at_taken(at);
            self.coverage.count("worker death: at a store to shared memory");
            self.lose_worker();
            return true;
        };
        if let Some(left) = &mut self.death_in {
            *left -= crash::passed() - before;
        }
        let broken = self.seats[at]
            .world
            .log
            .lock()
            .expect("lock")
            .iter()
            .any(|line| line.contains("queue is broken"));
        assert!(!broken, "engine {at}: {:?}", self.seats[at].world.log.lock());
        self.kill_given_up(at);
        busy
    }

    /// Checks what a ring has handed out.
    fn look_at_taken(&mut self, at: usize) {
        let Seat { notes, disk, ring, .. } = &self.seats[at];
        let taken = std::mem::take(&mut *notes.lock().expect("lock"));
        let (disk, ring) = (*disk, *ring);
        for taken in taken {
            if taken.retry {
                self.coverage.count("seen: request of a dead worker");
            }
            self.disks[disk].rings[ring].check_taken(&taken);
        }
    }

    /// The guest looks at what came back; whether there was something.
    pub(crate) fn reap(&mut self, at: usize) -> bool {
        let Seat { disk, ring, .. } = self.seats[at];
        let all = self.disks[disk].rings[ring].reap();
        let busy = !all.is_empty();
        for ended in all {
            let (request, outcome) = (&ended.request, ended.outcome);
            self.trace.add(
                self.now_ns,
                format_args!("disk {disk} ring {ring}: {} ends with {outcome:?}", request.id),
            );
            self.completed += 1;
            if outcome == Outcome::Error && request.kind != Kind::PastEnd {
                self.coverage.count("seen: error at the guest");
            }
            if let Err(wrong) = self.disks[disk].end(&ended) {
                panic!("disk {disk}: {wrong}");
            }
        }
        busy
    }

    /// A filter host has a turn at one of its places; whether it did something.
    fn act(&mut self, process: usize, place: usize) -> bool {
        let Place { engine, host } = self.processes[process].places[place];
        let seat = &mut self.seats[engine];
        let disk = &self.disks[seat.disk];
        let keys_above = disk.keys_above(disk.place_of(host).expect("a slot of the chain"));
        let view = View {
            disk: disk.number,
            guests: disk.guests,
            keys_above: &keys_above,
            open: &disk.open,
            seen_before: &disk.seen_before,
            now_ns: self.now_ns,
        };
        let mut tools = Tools {
            random: &mut self.random,
            coverage: &mut self.coverage,
            trace: &mut self.trace,
            hurries: self.calm,
        };
        let acted = self.processes[process].act(place, &mut seat.world, &view, &mut tools);
        let at = seat.disk;
        for change in std::mem::take(&mut self.processes[process].changes) {
            self.disks[at].note_change(&change);
        }
        match acted {
            Acted::Idle => false,
            Acted::Busy => true,
            Acted::Died => {
                let step = self.processes[process].doom;
                let role = self.processes[process].role.name();
                self.coverage
                    .count(&format!("filter death: {role} {:?}", step.unwrap_or(Step::Idle)));
                self.kill(process);
                true
            }
        }
    }

    fn serve_media(&mut self, at: usize) -> bool {
        let disk = &mut self.disks[at];
        let first = disk.medium.act().is_some();
        let second = disk.second.as_ref().is_some_and(|second| second.act().is_some());
        for failed in disk.note_failures(self.now_ns) {
            self.coverage.count(&format!("store error: {}", failed.op));
            self.trace.add(self.now_ns, format_args!("disk {at}: the medium fails {failed:?}"));
        }
        self.serve_gaps(at) || first || second
    }

    /// One of the marks that were asked for is made, or fails.
    fn serve_gaps(&mut self, at: usize) -> bool {
        // It is slower than a medium: what comes too early is to show.
        if !self.calm && !self.random.one_in(4) {
            return false;
        }
        let may_fail = !self.calm && self.plan.faults.failing_store > 0;
        let fails = may_fail && self.random.one_in(20);
        let disk = &mut self.disks[at];
        let mut gaps = disk.slots.iter_mut().filter_map(|slot| slot.gaps.as_mut());
        match gaps.find_map(|gaps| gaps.act(&mut self.random, fails)) {
            None => return false,
            Some(true) => self.coverage.count("seen: gap marked"),
            Some(false) => {
                disk.excuse(self.now_ns, Excuse::Mark);
                self.coverage.count("fault: gap not marked");
            }
        }
        true
    }

    // ------------------------------------------------------------------- faults

    fn begin_faults(&mut self) {
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
    fn start_due(&mut self) -> bool {
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
    fn is_quiet(&self, at: usize) -> bool {
        let mut places = self.processes[at].places.iter();
        places.all(|Place { engine, host }| self.seats[*engine].world.is_quiet(*host))
    }

    fn is_startable(&self, at: usize) -> bool {
        let process = &self.processes[at];
        !process.up && !process.is_on_trial && self.is_quiet(at) && !self.is_changed(process)
    }

    /// Filter hosts that an engine wants killed are.
    fn kill_given_up(&mut self, engine: usize) {
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

    fn go_on_after_stop(&mut self, at: usize) {
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

    // --------------------------------------------------------------------- end

    /// No more faults: what is broken is mended.
    fn calm_down(&mut self) {
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
    fn finish(&mut self) {
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

    fn check_end(&mut self) {
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

    /// Whether a canary has sung.
    pub fn canary_sang(&self) -> bool {
        self.disks[0].medium.canary_sang()
    }
}

/// Lets an engine serve a ring instead of the queue that it was made with.
fn serve(world: &mut World, queue: Spy) {
    let stopped = world.stop(0);
    while stopped.try_recv().is_err() {
        world.turn();
    }
    world.start(Box::new(queue));
}
