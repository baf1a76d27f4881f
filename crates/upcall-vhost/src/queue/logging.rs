//! What we write is logged: each page of the guest's memory that is not as it was is marked.
//!
//! The guest's memory is compared before and after what the device does, page by page, under
//! random requests of every kind, on both kinds of rings, however requests end. Marks are for
//! pages of ours alone: none where nothing can have been written.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use upcall_block::{Errno, Op, Request, RequestQueue};

use crate::mock::*;
use crate::plant::{self, Bug};
use crate::virtio::*;

const CAPACITY: u64 = 1 << 20;
const MEMORY: usize = 4 << 20;
const PAGE: u64 = 4096;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }

    fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

/// A driver, its device, and the log.
struct World {
    random: Random,
    memory: Arc<Memory>,
    driver: Box<dyn GuestDriver>,
    device: Device,
    log: LogFile,
    disk: RamDisk,
    /// Where the device may have written.
    writable: BTreeSet<u64>,
    open: usize,
}

impl World {
    fn new(seed: u64, packed: bool) -> World {
        let memory = Arc::new(Memory::new(MEMORY));
        memory.allocate(PAGE as usize, 1);
        let event_idx = seed.is_multiple_of(2);
        let driver: Box<dyn GuestDriver> = match packed {
            true => Box::new(PackedDriver::new(memory.clone(), 64, event_idx)),
            false => Box::new(Driver::new(memory.clone(), 64, event_idx, seed as u16)),
        };
        let ring_end = memory.allocate(1, PAGE);
        let device = Device::with_capacity(CAPACITY, memory.table());
        let disk = RamDisk((0..CAPACITY).map(|i| (i % 251) as u8).collect());
        let writable = (GUEST_BASE..ring_end).step_by(PAGE as usize).collect();
        let log = LogFile::new(GUEST_BASE + MEMORY as u64);
        World { random: Random(seed), memory, driver, device, log, disk, writable, open: 0 }
    }

    /// Some bytes, often at a place of their own.
    fn place(&mut self, length: usize) -> u64 {
        let alignment = if self.random.chance(2) { PAGE } else { 1 };
        self.memory.allocate(length, alignment)
    }

    fn writable(&mut self, length: usize) -> Desc {
        let at = self.place(length);
        self.memory.write(at, &vec![0xee; length]);
        let pages = at / PAGE * PAGE..at + length as u64;
        self.writable.extend(pages.step_by(PAGE as usize));
        Desc::writable(at, length as u32)
    }

    fn submit(&mut self) {
        let sector = self.random.below(1900);
        let kind = [T_IN, T_IN, T_IN, T_OUT, T_FLUSH, T_GET_ID, T_WRITE_ZEROES, 77]
            [self.random.below(8) as usize];
        let at = self.place(HEADER_SIZE);
        self.memory.write(at, &header(kind, sector));
        let mut chain = vec![Desc::readable(at, HEADER_SIZE as u32)];
        match kind {
            T_IN => {
                for _ in 0..1 + self.random.below(3) {
                    let sectors = 1 + self.random.below(12) as usize;
                    chain.push(self.writable(512 * sectors));
                }
            }
            T_OUT => {
                let data = self.place(1024);
                self.memory.write(data, &[self.random.below(256) as u8; 1024]);
                chain.push(Desc::readable(data, 1024));
            }
            T_WRITE_ZEROES => {
                let data = self.place(16);
                self.memory.write(data, &segment(sector, 3, 0));
                chain.push(Desc::readable(data, 16));
            }
            T_GET_ID => chain.push(self.writable(20)),
            _ => {}
        }
        let status = self.writable(1);
        chain.push(status);
        let indirect = chain.len() > 3 || self.random.chance(3);
        self.driver.submit_parts(&chain, 0, status.address, indirect);
        self.open += 1;
    }

    /// Ends a request, well or badly; a read that fails may have read something.
    fn end(&mut self, queue: &mut crate::VirtQueue, request: Request) {
        let ends_well = !self.random.chance(4);
        if ends_well || request.op == Op::Read {
            self.disk.execute(&request).unwrap();
        }
        queue.complete(request.tag, if ends_well { Ok(()) } else { Err(Errno::EIO) });
    }

    fn start_log(&self) {
        self.device.log(Some((&self.log, self.driver.used())));
    }

    fn snapshot(&self) -> Vec<u8> {
        self.memory.read(GUEST_BASE, MEMORY)
    }

    /// Whether all that is not as it was in `before` is marked, and no more than can be.
    fn check(&self, before: &[u8], marked: &BTreeSet<u64>) -> Result<(), String> {
        let changed = changed_pages(&self.memory, before);
        if let Some(page) = changed.difference(marked).next() {
            return Err(format!("page {page:#x} was written and is not marked"));
        }
        if let Some(page) = marked.difference(&self.writable).next() {
            return Err(format!("page {page:#x} is marked, and nothing can have been written"));
        }
        Ok(())
    }

    fn run(seed: u64, packed: bool) -> Result<usize, String> {
        let mut world = World::new(seed, packed);
        // Taken before there is a log, ended with it.
        for _ in 0..4 {
            world.submit();
        }
        let mut queue = world.driver.queue(&world.device);
        let mut taken = Vec::new();
        queue.take(4, &mut taken).map_err(|error| error.to_string())?;
        world.start_log();
        let mut marks = 0;
        for round in 0..20 {
            while world.open < 8 && round < 16 {
                world.submit();
            }
            let before = world.snapshot();
            match world.random.below(6) {
                0 => {
                    // Stopped, and started again, as when the device is.
                    for request in taken.drain(..) {
                        world.end(&mut queue, request);
                    }
                    queue.finish();
                    queue = world.driver.queue(&world.device);
                }
                1 => {
                    queue.before_sleep();
                    queue.after_sleep();
                }
                _ => {
                    let count = world.random.below(5) as usize;
                    queue.take(count, &mut taken).map_err(|error| error.to_string())?;
                    for _ in 0..world.random.below(1 + taken.len() as u64) {
                        let at = world.random.below(taken.len() as u64) as usize;
                        let request = taken.swap_remove(at);
                        world.end(&mut queue, request);
                    }
                }
            }
            queue.publish();
            let marked = world.log.take();
            marks += marked.len();
            world
                .check(&before, &marked)
                .map_err(|error| format!("seed {seed}, packed {packed}, round {round}: {error}"))?;
            world.open -= world.driver.reap().len();
        }
        for request in taken {
            world.end(&mut queue, request);
        }
        queue.finish();
        Ok(marks)
    }
}

fn campaign() -> Result<usize, String> {
    let mut marks = 0;
    for seed in 0..12 {
        for packed in [false, true] {
            marks += World::run(seed, packed)?;
        }
    }
    Ok(marks)
}

#[test]
fn every_page_that_is_written_is_marked_and_only_such() {
    let marks = campaign().unwrap();
    assert!(marks > 800, "only {marks} marks");
}

#[test]
fn a_page_that_were_forgotten_would_be_seen() {
    for bug in Bug::UNLOGGED {
        plant::set(Some(bug));
        let result = campaign();
        plant::set(None);
        let error = result.expect_err(bug.name());
        assert!(error.contains("is not marked"), "{}: {error}", bug.name());
    }
}

#[test]
fn a_ring_that_starts_marks_what_a_worker_before_us_may_have_left_unmarked() {
    for packed in [false, true] {
        let world = World::new(1, packed);
        world.start_log();
        let queue = world.driver.queue(&world.device);
        let marked = world.log.take();
        assert!(marked.contains(&(world.driver.used() / PAGE * PAGE)), "packed {packed}");
        queue.finish();
    }
}

#[test]
fn switched_on_under_load_it_misses_nothing_and_a_new_log_takes_over_at_once() {
    let mut misses = 0;
    for round in 0..60 {
        let mut world = World::new(round, round % 3 == 0);
        let mut queue = world.driver.queue(&world.device);
        for _ in 0..12 {
            world.submit();
        }
        let disk = std::mem::replace(&mut world.disk, RamDisk(Vec::new()));
        let (stop, begun) = (AtomicBool::new(false), AtomicBool::new(false));
        let second = LogFile::new(GUEST_BASE + MEMORY as u64);
        std::thread::scope(|scope| {
            let (stop, begun) = (&stop, &begun);
            let server = scope.spawn(move || {
                let mut disk = disk;
                let mut requests = Vec::new();
                let deadline = Instant::now() + Duration::from_secs(10);
                while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
                    begun.store(true, Ordering::Relaxed);
                    queue.take(1, &mut requests).unwrap();
                    for request in requests.drain(..) {
                        disk.execute(&request).unwrap();
                        queue.complete(request.tag, Ok(()));
                    }
                    queue.publish();
                }
                queue.finish();
            });
            while !begun.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            world.start_log();
            let before = world.snapshot();
            let mut marked = if round % 2 == 0 { world.log.take() } else { BTreeSet::new() };
            // A frontend that makes its log larger: what the old one has is fetched once the new
            // one is in use.
            world.device.log(Some((&second, world.driver.used())));
            marked.extend(world.log.take());
            while world.open > 0 && !server.is_finished() {
                world.open -= world.driver.reap().len();
            }
            stop.store(true, Ordering::Relaxed);
            server.join().unwrap();
            assert!(world.log.take().is_empty(), "marked in a log that was replaced");
            marked.extend(second.take());
            world.check(&before, &marked).unwrap();
            misses += usize::from(changed_pages(&world.memory, &before).is_empty());
        });
    }
    assert!(misses < 60, "nothing was ever written after the log was switched on");
}
