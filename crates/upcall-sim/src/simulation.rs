//! One world, from its seed to its end.
//!
//! A scheduler that draws from the seed lets guests, engines, filter hosts and media have
//! their turns in any order, on a clock that stands still meanwhile. First with faults, then
//! without: then everything must finish, and the disks must hold what the guests were told.
//!
//! Always true: nothing here decides what the product decides; the queue, the engine, the
//! flights, the rings and the arenas are those of production.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use upcall_block::{Op, RequestQueue};
use upcall_vhost::VirtQueue;
use upcall_vhost::mock::{Device, Memory};
use upcall_worker::sim::{Making, World};

use crate::coverage::Coverage;
use crate::disk::{Disk, Excuse};
use crate::filters::{Acted, Place, Process, Role, Step, Tools, View};
use crate::guest::{Kind, Outcome, Request, SECTORS_MAX};
use crate::medium::{Canary, Weather};
use crate::plan::Plan;
use crate::random::Random;
use crate::trace::Trace;

/// Bytes of the guest's memory.
const MEMORY: usize = 8 << 20;
/// Virtual time after the last fault within which everything must have finished.
const PATIENCE_NS: u64 = 120_000_000_000;
/// Turns after the last fault, so that a world that runs in circles is noticed.
const TURNS_MAX: usize = 400_000;
const MS: u64 = 1_000_000;

/// An engine, and the ring that it serves.
struct Seat {
    world: World,
    disk: usize,
    ring: usize,
    /// A stop under way, and what follows it.
    stopping: Option<(Stopped, After)>,
    /// No queue is served.
    stopped: bool,
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
}

/// One world. See the module.
pub struct Simulation {
    plan: Plan,
    random: Random,
    now_ns: u64,
    memory: Arc<Memory>,
    disks: Vec<Disk>,
    devices: Vec<Device>,
    processes: Vec<Process>,
    seats: Vec<Seat>,
    weather_until_ns: u64,
    next_request: u64,
    completed: u64,
    /// No faults any more.
    calm: bool,
    pub coverage: Coverage,
    pub trace: Trace,
}

impl Simulation {
    /// The world of a seed, in which nothing has happened yet.
    pub fn new(seed: u64, canary: Option<Canary>) -> Simulation {
        let mut random = Random::new(seed);
        let mut plan = Plan::new(&mut random);
        canary.iter().for_each(|canary| plan.suit(*canary));
        let memory = Arc::new(Memory::new(MEMORY));
        let mut processes: Vec<Process> = Vec::new();
        let mut disks = Vec::new();
        for (number, disk) in plan.disks.iter().enumerate() {
            let keys = disk.roles.iter().map(|role| {
                let shared = plan.shares_hosts;
                let known = processes.iter().find(|known| shared && known.role == *role);
                match (role, known) {
                    (_, Some(known)) => known.key,
                    (Role::Changer, None) => {
                        processes.push(Process::new(*role, random.number() | 1));
                        processes[processes.len() - 1].key
                    }
                    (_, None) => {
                        processes.push(Process::new(*role, 0));
                        0
                    }
                }
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
            devices: Vec::new(),
            processes: Vec::new(),
            seats: Vec::new(),
            weather_until_ns: 0,
            next_request: 1,
            completed: 0,
            calm: false,
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

    /// A worker begins: engines, filter hosts, devices on what is there.
    fn start_worker(&mut self) {
        self.processes = Vec::new();
        self.seats = Vec::new();
        self.devices = Vec::new();
        for at in 0..self.disks.len() {
            let hosts = self.hosts_of(at);
            for ring in 0..self.disks[at].rings.len() {
                let mut world = self.engine(at);
                world.pass(self.now_ns);
                if ring == 0 {
                    let device = self.disks[at].device(world.info.ops, &self.memory);
                    self.devices.push(device);
                }
                let queue = self.disks[at].rings[ring].open(&self.devices[at]);
                serve(&mut world, queue);
                let engine = self.seats.len();
                for (slot, host) in hosts.iter().enumerate() {
                    self.processes[*host].add_place(Place { engine, slot });
                }
                self.seats.push(Seat { world, disk: at, ring, stopping: None, stopped: false });
            }
        }
    }

    /// The filter hosts of a disk's slots; made where there is none to share.
    fn hosts_of(&mut self, at: usize) -> Vec<usize> {
        let disk = &self.disks[at];
        let mut hosts = Vec::new();
        for (role, key) in disk.roles.iter().zip(&disk.keys) {
            let known = self.processes.iter().position(|known| known.role == *role);
            hosts.push(match known.filter(|_| self.plan.shares_hosts) {
                Some(known) => known,
                None => {
                    self.processes.push(Process::new(*role, *key));
                    self.processes.len() - 1
                }
            });
        }
        hosts
    }

    fn engine(&self, at: usize) -> World {
        let disk = &self.disks[at];
        let mut lanes = Vec::new();
        for medium in [Some(&disk.medium), disk.second.as_ref()].into_iter().flatten() {
            let (queue, _) = medium.open_queue();
            lanes.push((Box::new(queue) as Box<dyn upcall_block::StoreQueue>, medium.info()));
        }
        let (mut making, _) = Making::new(disk.roles.iter().map(|role| role.spec()).collect());
        making.issues = disk.roles.iter().map(|role| role.issues()).collect();
        making.lanes = lanes;
        making.entries = self.plan.entries;
        making.pages = self.plan.pages;
        making.plays_clock = true;
        // Whom an engine gives up is killed here, in all engines at once.
        making.kills = false;
        World::new(making)
    }

    fn note(&mut self, what: std::fmt::Arguments) {
        self.trace.add(self.now_ns, what);
    }

    /// Runs to the end. Panics with what is wrong.
    pub fn run(&mut self) {
        let steps = self.plan.steps;
        for _ in 0..steps {
            self.step();
            self.begin_faults();
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
                self.reap(seat);
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
        if seat.stopped || seat.stopping.is_some() || !disk.rings[seat.ring].has_room() {
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
        let request = Request { id: self.next_request, kind, sectors, begun_ns: self.now_ns };
        self.next_request += 1;
        self.coverage.count(&format!("request: {}", kind.name()));
        disk.begin(&request);
        disk.rings[seat.ring].submit(request.clone(), random);
        let (disk, ring) = (seat.disk, seat.ring);
        self.note(format_args!("disk {disk} ring {ring}: the guest submits {request:?}"));
    }

    /// A turn of an engine; whether it did something.
    fn turn(&mut self, at: usize) -> bool {
        let busy = self.seats[at].world.turn();
        if busy {
            self.note(format_args!("engine {at} has a turn"));
        }
        self.kill_given_up(at);
        self.go_on_after_stop(at);
        busy
    }

    /// The guest looks at what came back; whether there was something.
    fn reap(&mut self, at: usize) -> bool {
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
        let Place { engine, slot } = self.processes[process].places[place];
        let seat = &mut self.seats[engine];
        let disk = &self.disks[seat.disk];
        let keys_above = disk.keys_above(slot);
        let view = View {
            disk: disk.number,
            guests: disk.guests,
            keys_above: &keys_above,
            open: &disk.open,
            now_ns: self.now_ns,
        };
        let mut tools = Tools {
            random: &mut self.random,
            coverage: &mut self.coverage,
            trace: &mut self.trace,
            hurries: self.calm,
        };
        match self.processes[process].act(place, &mut seat.world, &view, &mut tools) {
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
        first || second
    }

    // ------------------------------------------------------------------- faults

    fn begin_faults(&mut self) {
        let faults = self.plan.faults;
        let happens = |random: &mut Random, rate: u64| random.number() % 1_000_000 < rate;
        if happens(&mut self.random, faults.filter_death) {
            self.doom_filter();
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
        if happens(&mut self.random, faults.power_cut) {
            self.cut_power();
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

    /// The host loses its power: everything begins anew on what the media have kept.
    fn cut_power(&mut self) {
        self.note(format_args!("the power is cut"));
        self.coverage.count("fault: power cut");
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

    /// A filter host dies.
    fn kill(&mut self, at: usize) {
        let process = &mut self.processes[at];
        self.trace.add(self.now_ns, format_args!("the {} dies", process.role.name()));
        process.end();
        for place in 0..process.places.len() {
            let Place { engine, slot } = process.places[place];
            let seat = &mut self.seats[engine];
            process.die(place, &mut seat.world);
            seat.world.lose_host(slot);
            self.disks[seat.disk].excuse(u64::MAX, Excuse::Any);
        }
    }

    /// Filter hosts that an engine wants killed are.
    fn kill_given_up(&mut self, engine: usize) {
        let given_up: Vec<(usize, String)> =
            std::mem::take(&mut *self.seats[engine].world.given_up.lock().expect("lock"));
        for (slot, why) in given_up {
            self.note(format_args!("engine {engine} gives up the host of slot {slot}: {why}"));
            let place = Place { engine, slot };
            let whose = self.processes.iter().position(|process| process.places.contains(&place));
            self.kill(whose.expect("a filter host at each slot"));
        }
    }

    /// A ring is stopped.
    fn stop_ring(&mut self, after: After) {
        let at = self.random.below(self.seats.len());
        let seat = &mut self.seats[at];
        if seat.stopping.is_some() || seat.stopped {
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
        self.disks[seat.disk].excuse(self.now_ns, Excuse::Any);
        let Ok(queue) = stopped.try_recv() else { return };
        seat.stopping = None;
        let queue: Box<dyn Any> = queue.expect("the queue that it was given");
        let queue = queue.downcast::<VirtQueue>().expect("a ring");
        queue.finish();
        let disk = &mut self.disks[seat.disk];
        if after == After::Reset {
            for request in disk.rings[seat.ring].reset() {
                disk.forget(&request);
            }
        }
        let queue = disk.rings[seat.ring].open(&self.devices[seat.disk]);
        seat.world.start(Box::new(queue));
        self.note(format_args!("the ring of engine {at} is started again"));
    }

    // --------------------------------------------------------------------- end

    /// No more faults: what is broken is mended.
    fn calm_down(&mut self) {
        self.calm = true;
        self.set_weather(Weather::FINE, u64::MAX);
        for process in &mut self.processes {
            process.doom = None;
            process.hung = false;
        }
        self.note(format_args!("no more faults"));
    }

    /// Everything has its turn until nothing is left to do.
    fn finish(&mut self) {
        let until_ns = self.now_ns + PATIENCE_NS;
        for _ in 0..TURNS_MAX {
            let mut busy = false;
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
                busy |= self.reap(seat);
            }
            if busy {
                continue;
            }
            match self.next_event_ns() {
                Some(at_ns) if at_ns <= until_ns => self.pass(at_ns.saturating_sub(self.now_ns)),
                Some(_) => {
                    panic!("not finished after {} s of virtual time", PATIENCE_NS / 1_000 / MS)
                }
                None => return,
            }
        }
        panic!("not finished after {TURNS_MAX} turns: it runs in circles");
    }

    /// When something happens although nobody does anything.
    fn next_event_ns(&self) -> Option<u64> {
        let media = self.disks.iter().flat_map(|disk| [Some(&disk.medium), disk.second.as_ref()]);
        let media = media.flatten().filter_map(|medium| medium.next_due_ns());
        let engines = self.seats.iter().filter_map(|seat| seat.world.wakes_in_ns());
        let engines = engines.map(|ns| self.now_ns + ns.max(1));
        media.chain(engines).min()
    }

    fn check_end(&mut self) {
        for disk in &self.disks {
            let left: Vec<&Request> = disk.open.values().collect();
            assert!(left.is_empty(), "disk {}: requests never end: {left:?}", disk.number);
            disk.rings.iter().for_each(|ring| ring.check_memory());
            disk.check_content().unwrap_or_else(|wrong| panic!("{wrong}"));
        }
        for seat in 0..self.seats.len() {
            assert_eq!(self.seats[seat].world.in_flight(), 0, "engine {seat} has requests");
            self.seats[seat].world.assert_empty();
        }
        let all_up = self.processes.iter().all(|process| process.up);
        for process in self.processes.iter().filter(|process| process.up) {
            assert!(process.is_empty(), "the {} was left with something", process.role.name());
        }
        if all_up {
            for at in 0..self.disks.len() {
                let checked = self.disks[at].check_copy().unwrap_or_else(|wrong| panic!("{wrong}"));
                self.coverage.add("checked: sectors of a copy", checked);
            }
        }
        self.coverage.add("requests completed", self.completed);
        self.coverage.add("virtual ms", self.now_ns / MS);
        let roles: BTreeMap<&str, u64> = self.disks.iter().flat_map(|disk| &disk.roles).fold(
            BTreeMap::new(),
            |mut roles, role| {
                *roles.entry(role.name()).or_default() += 1;
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
fn serve(world: &mut World, queue: VirtQueue) {
    let stopped = world.stop(0);
    while stopped.try_recv().is_err() {
        world.turn();
    }
    world.start(Box::new(queue));
}
