//! One world, from its seed to its end.
//!
//! A scheduler that draws from the seed lets guests, engines, filter hosts and media have
//! their turns in any order, on a clock that stands still meanwhile. First with faults, then
//! without: then everything must finish, and the disks must hold what the guests were told.
//!
//! Always true: nothing here decides what the product decides; the queue, the engine, the
//! flights, the rings and the arenas are those of production.

mod end;
mod faults;
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
