//! A worker dies before each of its stores, one after the other, and another takes over.
//!
//! The driver, its memory and the in-flight region stay, as they do for a guest whose worker
//! is killed. What must hold, wherever it died: each request completes exactly once to the
//! driver, with its status in place; what was in flight is handed out again exactly once,
//! before anything new, in the order in which it was taken, marked as a retry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use upcall_block::{Request, RequestQueue, Tag};

use crate::crash::{self, Crashed};
use crate::mock::*;
use crate::plant::{self, Bug};
use crate::virtio::*;

const CAPACITY: u64 = 1 << 20;

/// What is tried.
#[derive(Clone, Copy, Debug)]
struct Plan {
    packed: bool,
    ring: u16,
    /// Requests that are submitted at a time.
    batch: usize,
    /// Of all.
    total: usize,
    /// Each successor is stopped in good order before it takes anything, and started again.
    stopped: bool,
    /// Completions: the last taken first, or from the middle.
    rotation: usize,
}

/// A request as the driver knows it.
struct Asked {
    submitted: Submitted,
    completions: u32,
}

struct World {
    plan: Plan,
    memory: Arc<Memory>,
    driver: Box<dyn GuestDriver>,
    file: InflightFile,
    asked: Vec<Asked>,
    /// By head or id, while it is in flight for the driver.
    numbers: BTreeMap<u32, usize>,
    /// What any worker was handed out.
    handed: BTreeSet<usize>,
    /// What this worker was.
    offered: BTreeSet<usize>,
    /// What it has and did not complete.
    held: Vec<(usize, Tag)>,
    taken: Vec<Request>,
}

type Check = Result<(), String>;

impl World {
    fn new(plan: Plan) -> World {
        let memory = Arc::new(Memory::new(256 << 10));
        let event_idx = plan.batch.is_multiple_of(2);
        let driver: Box<dyn GuestDriver> = if plan.packed {
            Box::new(PackedDriver::new(memory.clone(), plan.ring, event_idx))
        } else {
            Box::new(Driver::new(memory.clone(), plan.ring, event_idx, 0xfffd))
        };
        World {
            plan,
            driver,
            memory,
            file: InflightFile::new(plan.ring, plan.packed),
            asked: Vec::new(),
            numbers: BTreeMap::new(),
            handed: BTreeSet::new(),
            offered: BTreeSet::new(),
            held: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// The next request; its number is its sector.
    fn submit(&mut self) {
        let number = self.asked.len();
        let sector = number as u64;
        let (kind, out, in_length): (_, &[u8], _) = match number % 4 {
            0 => (T_OUT, &[7; 512], 0),
            1 => (T_IN, &[], 512),
            2 => (T_GET_ID, &[], 20),
            _ => (T_WRITE_ZEROES, &segment(sector, 1, 0), 0),
        };
        let (chain, data, status) = self.memory.request(kind, sector, out, in_length);
        let indirect = number % 3 == 1 && self.plan.ring > 3;
        let submitted = self.driver.submit_parts(&chain, data, status, indirect);
        self.numbers.insert(submitted.head.into(), number);
        self.asked.push(Asked { submitted, completions: 0 });
    }

    /// Looks at what the device has shown as used.
    fn reap(&mut self) -> Check {
        for Used { head, .. } in self.driver.reap() {
            let Some(number) = self.numbers.remove(&head) else {
                return Err(format!("used {head:#x}, which is not in flight"));
            };
            let asked = &mut self.asked[number];
            asked.completions += 1;
            let status = self.memory.read(asked.submitted.status, 1)[0];
            if status != S_OK {
                return Err(format!("request {number} is used and has status {status:#x}"));
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.asked.len() == self.plan.total && self.numbers.is_empty()
    }

    /// Checks what was just handed out.
    fn look_at_taken(&mut self) -> Check {
        let (mut fresh, mut unknown) = (None, 0);
        for request in std::mem::take(&mut self.taken) {
            let number = (request.range.offset() / 512) as usize;
            let open = self.numbers.values().any(|open| *open == number);
            if !open {
                return Err(format!("request {number} is handed out, and is over"));
            }
            let last = self.offered.last().copied();
            if !self.offered.insert(number) {
                return Err(format!("request {number} is handed out twice"));
            }
            if last.is_some_and(|last| last > number) {
                return Err(format!("request {number} is handed out after {last:?}"));
            }
            let known = self.handed.contains(&number);
            if known && !request.flags.retry {
                return Err(format!("request {number} is handed out again and does not say so"));
            }
            if request.flags.retry {
                if let Some(fresh) = fresh {
                    return Err(format!("request {number} is a retry, after {fresh}, a new one"));
                }
                unknown += u32::from(!known);
            } else {
                fresh = Some(number);
            }
            self.held.push((number, request.tag));
        }
        if unknown > 1 {
            return Err(format!("{unknown} retries of what nobody had"));
        }
        Ok(())
    }

    /// One worker's life, up to the end of the world or its own.
    fn live(&mut self) -> Check {
        let mut device = Device::with_capacity(CAPACITY, self.memory.table());
        device.track(&self.file);
        let mut queue = self.driver.queue(&device);
        if self.plan.stopped && !self.handed.is_empty() {
            queue.finish();
            queue = self.driver.queue(&device);
        }
        while !self.is_done() {
            // A ring that holds one request has room only when that has ended.
            let full = self.plan.ring == 3 && !self.numbers.is_empty();
            let batch = if full { 0 } else { self.plan.batch };
            for _ in 0..batch.min(self.plan.total - self.asked.len()) {
                self.submit();
            }
            let more = self.asked.len() < self.plan.total;
            queue.take(64, &mut self.taken).map_err(|error| error.to_string())?;
            self.look_at_taken()?;
            if self.held.is_empty() && (full || !more) {
                // What is left was answered at once.
                self.reap()?;
                if !self.numbers.is_empty() {
                    return Err("requests were lost".into());
                }
                continue;
            }
            // All but the oldest, out of order, until there is nothing more to come.
            let count = self.held.len() - usize::from(more && self.held.len() > 1);
            for _ in 0..count {
                let at = (self.held.len() - 1).saturating_sub(self.plan.rotation);
                let (_, tag) = self.held.remove(at);
                queue.complete(tag, Ok(()));
            }
            queue.publish();
            self.reap()?;
        }
        queue.finish();
        Ok(())
    }

    /// Dies before the given store of each life, and lives on to the end after that. Says
    /// whether the last of these deaths took place.
    fn run(plan: Plan, deaths: &[u64]) -> Result<bool, String> {
        let mut world = World::new(plan);
        let mut died = true;
        for death in deaths {
            died = match crash::catch(*death, || world.live()) {
                Ok(result) => {
                    result?;
                    false
                }
                Err(Crashed) => true,
            };
            world.bury();
            world.reap()?;
        }
        if died {
            world.live()?;
        }
        world.bury();
        for (number, asked) in world.asked.iter().enumerate() {
            if asked.completions != 1 {
                return Err(format!("request {number} completed {} times", asked.completions));
            }
        }
        Ok(died)
    }

    /// What a dead worker knew is gone, but we know what it had.
    fn bury(&mut self) {
        self.held.clear();
        let taken = std::mem::take(&mut self.taken);
        let numbers = taken.iter().map(|request| (request.range.offset() / 512) as usize);
        self.handed.extend(numbers);
        self.handed.append(&mut self.offered);
    }
}

/// Dies before every store; returns before how many.
fn die_everywhere(plan: Plan) -> Result<u64, String> {
    for death in 0.. {
        let died = World::run(plan, &[death])
            .map_err(|error| format!("{plan:?}, died before store {death}: {error}"))?;
        if !died {
            return Ok(death);
        }
    }
    unreachable!("a life has an end");
}

/// Dies before every store, and its successor before every store of its own.
fn die_twice_everywhere(plan: Plan) -> Result<u64, String> {
    let mut count = 0;
    for first in 0.. {
        for second in 0.. {
            count += 1;
            let died = World::run(plan, &[first, second]).map_err(|error| {
                format!("{plan:?}, died before stores {first} and then {second}: {error}")
            })?;
            if !died {
                break;
            }
        }
        if !World::run(plan, &[first])? {
            return Ok(count);
        }
    }
    unreachable!("a life has an end");
}

fn once_everywhere() -> Result<u64, String> {
    let mut count = 0;
    for packed in [false, true] {
        for batch in 1..=4 {
            for (stopped, rotation) in [(false, 0), (true, 1), (false, 2)] {
                let total = 3 * batch + 4;
                count +=
                    die_everywhere(Plan { packed, ring: 32, batch, total, stopped, rotation })?;
            }
        }
    }
    // Each request takes up the whole ring: the position is always the same, the lap never.
    let plan = Plan { packed: true, ring: 3, batch: 1, total: 5, stopped: false, rotation: 0 };
    count += die_everywhere(plan)?;
    Ok(count)
}

/// A driver that makes available what is in flight is refused.
fn duplicates_are_refused() -> Check {
    for packed in [false, true] {
        let plan = Plan { packed, ring: 32, batch: 1, total: 1, stopped: false, rotation: 0 };
        let mut world = World::new(plan);
        let mut device = Device::with_capacity(CAPACITY, world.memory.table());
        device.track(&world.file);
        let mut queue = world.driver.queue(&device);
        world.submit();
        queue.take(64, &mut world.taken).map_err(|error| error.to_string())?;
        world.driver.submit_again(&world.asked[0].submitted);
        match queue.take(64, &mut world.taken) {
            Err(error) if error.reason.contains("while it is in flight") => {}
            other => return Err(format!("packed {packed}: {other:?}")),
        }
    }
    Ok(())
}

#[test]
fn wherever_a_worker_dies_each_request_completes_exactly_once() {
    let count = once_everywhere().unwrap();
    assert!(count > 1500, "only {count} deaths");
    println!("{count} deaths");
}

#[test]
fn wherever_its_successor_dies_too_each_request_completes_exactly_once() {
    for packed in [false, true] {
        let plan = Plan { packed, ring: 32, batch: 2, total: 5, stopped: false, rotation: 1 };
        let count = die_twice_everywhere(plan).unwrap();
        assert!(count > 500, "only {count} pairs of deaths");
        println!("{count} pairs of deaths, packed {packed}");
    }
}

#[test]
fn what_is_in_flight_and_offered_again_is_refused() {
    duplicates_are_refused().unwrap();
}

#[test]
fn the_bugs_of_others_would_be_seen() {
    for bug in Bug::ALL {
        plant::set(Some(bug));
        // A planted bug may also run into one of our own assertions.
        let result = std::panic::catch_unwind(|| {
            once_everywhere().map(|_| ()).and_then(|()| duplicates_are_refused())
        });
        plant::set(None);
        match result {
            Ok(Ok(())) => panic!("{}: nobody noticed", bug.name()),
            Ok(Err(error)) => println!("{}: {error}", bug.name()),
            Err(_) => println!("{}: an assertion", bug.name()),
        }
    }
    once_everywhere().and_then(|_| duplicates_are_refused()).unwrap();
}
