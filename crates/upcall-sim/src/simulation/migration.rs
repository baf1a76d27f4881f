//! A guest that moves to another host while its disks are used: a hypervisor copies its memory,
//! page by page, by the log of what the device writes; then the guest stands still, its rings
//! stop, the rest is copied, and another worker goes on with the disks.
//!
//! Always true: when the source has said of each ring where it stands, the copy is the guest's
//! memory in every byte, and nobody writes the memory after that; the next worker begins when
//! no engine of the last one is left. A migration ends: at the target, or with the guest at the
//! source as before.

use std::collections::BTreeSet;
use std::sync::Arc;

use upcall_vhost::mock::{LogFile, Memory};

use super::{After, Simulation};

/// How many pages are copied at a time, at the most.
const PAGES_MAX: usize = 6;
const PAGE: usize = 4096;

/// See the module.
pub(crate) struct Migration {
    /// What the devices have written.
    log: LogFile,
    /// The guest's memory, on the other host.
    target: Memory,
    /// Pages that are to be copied, guest-physical.
    dirty: BTreeSet<u64>,
    phase: Phase,
}

enum Phase {
    /// The guest runs.
    Copying,
    /// It stands still, and its rings stop; by engine, where they stand.
    Stopping(Vec<Option<u16>>),
    /// Its rings stood there, and a change of chains that is on its way ends.
    Leaving(Vec<u16>),
    /// The source's engines end.
    Ending(Vec<u16>),
}

impl Migration {
    /// Whether the guest stands still.
    pub(crate) fn is_paused(&self) -> bool {
        !matches!(self.phase, Phase::Copying)
    }

    /// Takes note of what was written since the last time; how many pages the devices have.
    fn sync(&mut self, memory: &Memory) -> usize {
        let logged = self.log.take();
        let count = logged.len();
        self.dirty.extend(logged);
        self.dirty.extend(memory.take_own());
        count
    }

    fn copy(&mut self, memory: &Memory, page: u64) {
        self.dirty.remove(&page);
        self.target.write(page, &memory.read(page, PAGE));
    }

    /// That the copy is what it is a copy of.
    fn check(&self, memory: &Memory, when: &str) {
        for page in memory.pages() {
            let (here, there) = (memory.read(page, PAGE), self.target.read(page, PAGE));
            let differs = here.iter().zip(&there).position(|(here, there)| here != there);
            if let Some(at) = differs {
                panic!(
                    "{when}, byte {:#x} of the guest's memory is {:#x} at the source and {:#x} at \
                     the target: it was written and not logged, or too late",
                    page + at as u64,
                    here[at],
                    there[at]
                );
            }
        }
    }
}

impl Simulation {
    /// Whether the disks are about to be given up: no change of chains begins any more.
    pub(crate) fn gives_up(&self) -> bool {
        self.migration
            .as_ref()
            .is_some_and(|on| matches!(on.phase, Phase::Leaving(_) | Phase::Ending(_)))
    }

    /// Whether the guest stands still.
    pub(crate) fn is_paused(&self) -> bool {
        self.migration.as_ref().is_some_and(Migration::is_paused)
    }

    /// A migration begins, unless there is one.
    pub(super) fn begin_migration(&mut self) {
        if self.migration.is_some() {
            return;
        }
        self.memory.note_own(true);
        let base = self.memory.address();
        self.migration = Some(Migration {
            log: LogFile::new(base.guest + base.length),
            target: self.memory.twin(),
            dirty: self.memory.pages().collect(),
            phase: Phase::Copying,
        });
        (0..self.seats.len()).for_each(|at| self.log_writes(at));
        self.coverage.count("migration: begun");
        self.note(format_args!("a migration begins"));
    }

    /// What an engine's device writes is logged, if the guest migrates. Once its ring is
    /// where it stays.
    pub(super) fn log_writes(&mut self, at: usize) {
        if let Some(Migration { log, .. }) = &self.migration {
            let seat = &self.seats[at];
            seat.device.log(Some((log, self.disks[seat.disk].rings[seat.ring].used())));
        }
    }

    /// The migration has a turn; whether it did something.
    pub(super) fn migrate(&mut self) -> bool {
        let Some(Migration { phase, .. }) = &self.migration else { return false };
        match phase {
            // Time is to pass.
            Phase::Copying if self.calm && self.change.is_some() => return false,
            Phase::Copying => self.copy_some(),
            Phase::Stopping(places) => match places.iter().copied().collect() {
                Some(places) => self.end_copying(places),
                None => return self.stop_rings(),
            },
            Phase::Leaving(places) => {
                if self.change.is_some() {
                    return false;
                }
                let places = places.clone();
                self.migration.iter_mut().for_each(|on| on.phase = Phase::Ending(places.clone()));
                self.seats.iter_mut().for_each(|seat| seat.world.quit());
            }
            Phase::Ending(_) => {
                let dies = !self.calm && self.plan.faults.worker_death > 0;
                if dies && self.moves.one_in(8) {
                    self.lose_worker();
                    return true;
                }
                if !self.seats.iter().all(|seat| seat.world.has_ended()) {
                    return false;
                }
                self.give_up();
            }
        }
        true
    }

    fn copy_some(&mut self) {
        let (memory, moves) = (self.memory.clone(), &mut self.moves);
        let Some(on) = &mut self.migration else { return };
        if moves.one_in(4) {
            on.sync(&memory);
        }
        for _ in 0..1 + moves.below(PAGES_MAX) {
            if on.dirty.is_empty() {
                break;
            }
            let page = on.dirty.iter().nth(moves.below(on.dirty.len())).copied();
            page.into_iter().for_each(|page| on.copy(&memory, page));
        }
        if !self.calm && !moves.one_in(60) {
            return;
        }
        if moves.one_in(4) {
            self.end_migration("migration: cancelled");
        } else {
            self.stop_guest();
        }
    }

    /// The guest stays where it is: nothing is logged any more.
    fn end_migration(&mut self, how: &str) {
        self.migration = None;
        self.memory.note_own(false);
        self.seats.iter().for_each(|seat| seat.device.log(None));
        self.coverage.count(how);
        self.note(format_args!("{how}"));
    }

    /// The guest stands still, and its rings stop.
    fn stop_guest(&mut self) {
        self.note(format_args!("the guest stands still"));
        let places = vec![None; self.seats.len()];
        self.migration.iter_mut().for_each(|on| on.phase = Phase::Stopping(places.clone()));
        self.stop_rings();
    }

    /// Rings that are served are stopped; whether there was one. Of those that a dead worker
    /// left something in it is the second time: they ran for a moment, to end that.
    fn stop_rings(&mut self) -> bool {
        let Some(Migration { phase: Phase::Stopping(places), .. }) = &self.migration else {
            return false;
        };
        let served = |at: &usize| places[*at].is_none() && self.seats[*at].stopping.is_none();
        let served: Vec<usize> = (0..places.len()).filter(served).collect();
        for at in &served {
            let drain_ms = self.moves.pick(&[0, 5, 100]);
            let stopped = self.seats[*at].world.stop(drain_ms);
            self.seats[*at].stopping = Some((stopped, After::Move));
        }
        !served.is_empty()
    }

    /// A ring has stopped for the move, and stands there.
    pub(super) fn note_place(&mut self, at: usize, place: u16) {
        if let Some(Migration { phase: Phase::Stopping(places), .. }) = &mut self.migration {
            places[at] = Some(place);
        }
        self.note(format_args!("the ring of engine {at} stands at {place:#x}"));
    }

    /// All rings stand still: the rest is copied, and the source gives the disks up.
    fn end_copying(&mut self, places: Vec<u16>) {
        if self.change.is_some() {
            self.coverage.count("migration: amid a change of chains");
        }
        if self.change.is_some() || self.disks.iter().any(|disk| disk.has_unwritten()) {
            // What has completed has completed with the chain as it was.
            for at in 0..self.seats.len() {
                self.reap(at);
            }
        }
        let Some(on) = &mut self.migration else { return };
        let late = on.sync(&self.memory);
        self.coverage.add("migration: pages logged late", late as u64);
        while let Some(page) = on.dirty.first().copied() {
            on.copy(&self.memory, page);
        }
        on.check(&self.memory, "when all rings had stopped");
        on.phase = Phase::Leaving(places);
        self.note(format_args!("the rest of the memory is copied"));
    }

    /// No engine is left: the disks are anybody's.
    fn give_up(&mut self) {
        for at in 0..self.seats.len() {
            self.seats[at].world.assert_empty();
        }
        let (now_ns, id) = (self.now_ns, self.next_request);
        self.next_request += 1;
        self.seats.clear();
        self.disks.iter_mut().for_each(|disk| disk.hand_over(now_ns, id));
        self.arrive();
        self.start_worker();
    }

    /// The source has given the disks up, or has died over it: the guest goes on at the
    /// target, or, if that fails now, at the source.
    fn arrive(&mut self) {
        let Some(on) = self.migration.take() else { return };
        on.check(&self.memory, "when the source had ended");
        let (Phase::Leaving(places) | Phase::Ending(places)) = on.phase else {
            unreachable!("all rings stand still")
        };
        self.memory.note_own(false);
        if self.moves.one_in(4) {
            self.coverage.count("migration: failed at its end");
            return self.note(format_args!("the guest goes on at the source"));
        }
        self.memory = Arc::new(on.target);
        let rings = self.disks.iter_mut().flat_map(|disk| &mut disk.rings);
        rings.zip(places).for_each(|(ring, place)| ring.move_to(&self.memory, place));
        self.coverage.count("migration: finished");
        self.note(format_args!("the guest goes on at the target"));
    }

    /// The worker is dead. While the memory is copied, the next one logs on; later the source's
    /// hypervisor does not learn where a ring stands, and lets the guest go on there.
    pub(super) fn lose_source(&mut self) {
        let Some(Migration { phase, .. }) = &self.migration else { return };
        match phase {
            Phase::Copying => self.coverage.count("migration: worker death while logging"),
            Phase::Stopping(_) => self.end_migration("migration: worker death while rings stop"),
            Phase::Leaving(_) | Phase::Ending(_) => {
                self.coverage.count("migration: worker death after rings stopped");
                self.arrive();
            }
        }
    }

    /// Another worker has begun. Perhaps the guest stands still before it has had a turn.
    pub(super) fn go_on_logging(&mut self) {
        let is_copying = self.migration.is_some() && !self.is_paused();
        if is_copying && !self.calm && self.moves.one_in(3) {
            self.stop_guest();
        }
    }

    /// The host is gone, and with it what it copied.
    pub(super) fn forget_migration(&mut self) {
        self.migration = None;
        self.memory.note_own(false);
    }
}
