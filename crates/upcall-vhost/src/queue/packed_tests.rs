//! A driver with a packed ring on one side, the queue on the other. What is not about the
//! ring's layout is tested with split rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use upcall_block::RequestQueue;

use crate::mock::*;
use crate::virtio::*;
use crate::{GuestMemory, QueueHost, VirtQueue};

const CAPACITY: u64 = 1 << 20;
const SIZE: u16 = 16;
/// The first position.
const START: u16 = 0x8000;

struct Pair {
    memory: Arc<Memory>,
    driver: PackedDriver,
    device: Device,
    queue: VirtQueue,
    disk: RamDisk,
}

fn pair(event_idx: bool) -> Pair {
    let memory = Arc::new(Memory::new(4 << 20));
    let driver = PackedDriver::new(memory.clone(), SIZE, event_idx);
    let device = Device::with_capacity(CAPACITY, memory.table());
    let queue = device.try_packed_queue(&driver, START, true).unwrap();
    Pair { memory, driver, device, queue, disk: RamDisk(vec![0; CAPACITY as usize]) }
}

impl Pair {
    fn run(&mut self, kind: u32, sector: u64, out: &[u8], in_length: usize) -> (u8, u32) {
        let submitted = self.driver.submit(kind, sector, out, in_length);
        assert_eq!(self.disk.serve(&mut self.queue), 1);
        let used = self.driver.reap();
        assert_eq!(used.len(), 1, "one completion");
        assert_eq!(used[0].head, u32::from(submitted.head));
        (self.driver.status(&submitted), used[0].length)
    }

    /// What was made available breaks the queue, once and for all.
    fn breaks(&mut self, reason: &str) {
        let mut requests = Vec::new();
        for _ in 0..2 {
            let error = self.queue.take(64, &mut requests).unwrap_err();
            assert!(error.reason.contains(reason), "{error}, expected {reason}");
            assert!(requests.is_empty());
        }
        assert!(self.device.error.clear(), "the error descriptor is signalled");
    }
}

#[test]
fn what_was_written_is_read_back_over_many_laps() {
    let mut pair = pair(false);
    for round in 0..40u64 {
        let data = [round as u8; 1024];
        assert_eq!(pair.run(T_OUT, round * 2, &data, 0), (S_OK, 1));
        let read = pair.driver.submit(T_IN, round * 2, &[], 1024);
        pair.disk.serve(&mut pair.queue);
        assert_eq!(pair.driver.reap()[0].length, 1025);
        assert_eq!(pair.memory.read(read.data, 1024), data);
    }
}

#[test]
fn requests_complete_out_of_order_although_used_descriptors_overwrite_others() {
    let mut pair = pair(false);
    let mut held = Vec::new();
    for round in 0..60u64 {
        let submitted = pair.driver.submit(T_OUT, round, &[round as u8; 512], 0);
        let mut taken = Vec::new();
        pair.queue.take(64, &mut taken).unwrap();
        assert_eq!(taken.len(), 1);
        held.push((submitted, taken.remove(0)));
        if held.len() == 4 {
            let (submitted, request) = held.remove([2, 0, 3, 1][round as usize % 4]);
            let status = pair.disk.execute(&request);
            pair.queue.complete(request.tag, status);
            assert!(pair.driver.reap().is_empty(), "not shown yet");
            pair.queue.publish();
            let used = pair.driver.reap();
            assert_eq!(used, [Used { head: submitted.head.into(), length: 1 }]);
        }
    }
}

#[test]
fn the_indirect_table_of_a_packed_ring_is_read_from_its_first_to_its_last() {
    let mut p = pair(false);
    let (chain, data, status) = p.memory.request(T_IN, 3, &[], 512);
    // Nothing but the direction counts there: these flags mean nothing, and lead nowhere.
    let chain: Vec<Desc> = chain
        .iter()
        .map(|desc| Desc { flags: desc.flags | DESC_INDIRECT | DESC_NEXT, ..*desc })
        .collect();
    let submitted = p.driver.submit_parts(&chain, data, status, true);
    p.disk.0[3 * 512..4 * 512].fill(0x5a);
    assert_eq!(p.disk.serve(&mut p.queue), 1);
    assert_eq!(p.driver.reap(), [Used { head: submitted.head.into(), length: 513 }]);
    assert_eq!(p.memory.read(data, 512), [0x5a; 512]);

    let table = p.driver.indirect(&chain);
    p.driver.submit_chain(7, &[table, Desc::writable(status, 1)]);
    p.breaks("that also has a next one");
    let mut p = pair(false);
    p.queue = p.device.try_packed_queue(&p.driver, START, false).unwrap();
    let table = p.driver.indirect(&chain);
    p.driver.submit_chain(7, &[table]);
    p.breaks("not negotiated");
}

#[test]
fn chains_that_no_sane_driver_makes_break_the_queue() {
    // All descriptors lead on, round and round.
    let mut p = pair(false);
    for index in 0..SIZE {
        let at = p.driver.descriptor(index);
        p.memory.write(at, &Desc::readable(GUEST_BASE, 16).bytes(0));
        p.memory.store(at + 14, DESC_NEXT | PACKED_AVAIL);
    }
    p.breaks("more descriptors made available than the ring of 16 has");

    let mut p = pair(false);
    let at = p.memory.allocate(16, 1);
    p.driver.submit_chain(0, &[Desc::writable(at, 1), Desc::readable(at, 16)]);
    p.breaks("readable memory after writable");

    let mut p = pair(false);
    p.driver.submit_chain(0, &[Desc::readable(at, 16)]);
    p.breaks("without room for its status");

    // What is taken already fills the ring; a descriptor is made available once more.
    let mut p = pair(false);
    let status = p.memory.allocate(1, 1);
    let at = p.memory.allocate(16, 1);
    p.memory.write(at, &header(T_FLUSH, 0));
    let chain = [Desc::readable(at, 16), Desc::writable(status, 1)];
    (0..8).for_each(|id| p.driver.submit_chain(id, &chain));
    let mut taken = Vec::new();
    p.queue.take(64, &mut taken).unwrap();
    assert_eq!(taken.len(), 8);
    p.driver.submit_chain(100, &chain);
    p.breaks("more descriptors made available");
    for request in taken {
        p.queue.complete(request.tag, Ok(()));
    }
    p.queue.publish();
    assert_eq!(p.queue.in_flight(), 0, "what was taken before completes");
}

#[test]
fn the_drivers_event_structure_decides_about_signals() {
    let mut p = pair(true);
    p.driver.set_event(EVENT_DISABLE, 0);
    p.run(T_FLUSH, 0, &[], 0);
    assert!(!p.device.call.clear(), "declined");
    p.driver.set_event(EVENT_ENABLE, 0);
    p.run(T_FLUSH, 0, &[], 0);
    assert!(p.device.call.clear());
    // Two descriptors each: the next one is at 4. Of a whole lap, one signal, at each place.
    for lap in 0..6u16 {
        let target = (4 + 2 * lap) % SIZE;
        let start = p.driver.position();
        let wrap = if target >= start & 0x7fff { start & 0x8000 } else { !start & 0x8000 };
        p.driver.set_event(EVENT_POSITION, target | wrap);
        let mut signals = Vec::new();
        for _ in 0..8 {
            let at = p.driver.position() & 0x7fff;
            p.run(T_FLUSH, 0, &[], 0);
            if p.device.call.clear() {
                signals.push(at);
            }
        }
        assert_eq!(signals, [target], "lap {lap}");
    }
}

#[test]
fn a_queue_that_sleeps_is_woken_and_one_that_polls_is_not() {
    for event_idx in [false, true] {
        let mut p = pair(event_idx);
        for _ in 0..20 {
            p.run(T_FLUSH, 0, &[], 0);
            assert!(!p.driver.wants_doorbell(), "awake");
            assert!(p.queue.before_sleep(), "nothing there");
            p.driver.submit(T_FLUSH, 0, &[], 0);
            assert!(p.driver.wants_doorbell(), "asleep");
            assert!(!p.queue.before_sleep(), "what arrived is seen");
            p.queue.after_sleep();
            assert_eq!(p.disk.serve(&mut p.queue), 1);
            p.driver.reap();
        }
    }
}

#[test]
fn no_wake_up_is_lost() {
    for event_idx in [false, true] {
        let Pair { mut driver, device, queue, .. } = pair(event_idx);
        let mut host = ThreadHost::new(CAPACITY as usize);
        host.start(0, queue);
        for round in 0..1000 {
            let flags = if event_idx { EVENT_POSITION } else { EVENT_ENABLE };
            driver.set_event(flags, driver.position());
            driver.submit(T_FLUSH, 0, &[], 0);
            if driver.wants_doorbell() {
                device.kick.ring();
            }
            while driver.reap().is_empty() {
                let mut fds = [PollFd::new(&device.call, PollFlags::IN)];
                let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
                assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "round {round}");
                device.call.clear();
            }
        }
        assert_eq!(host.stop(0).next_available(), driver.position());
    }
}

#[test]
fn a_packed_ring_outside_memory_or_not_aligned_is_no_ring() {
    let memory = Arc::new(Memory::new(1 << 20));
    let driver = PackedDriver::new(memory.clone(), SIZE, false);
    let device = Device::with_capacity(CAPACITY, GuestMemory::default());
    assert!(device.try_packed_queue(&driver, START, true).is_none());
    device.set_memory(memory.table());
    assert!(device.try_packed_queue(&driver, START | SIZE, true).is_none(), "no such position");
    let mut queue = device.try_packed_queue(&driver, START, true).unwrap();
    device.set_memory(GuestMemory::default());
    let error = queue.take(1, &mut Vec::new()).unwrap_err();
    assert!(error.reason.contains("no longer in the guest"), "{error}");
}

#[test]
fn a_guest_that_rewrites_everything_meanwhile_breaks_nothing_of_ours() {
    // As for split rings, with the in-flight region rewritten between workers.
    let memory = Arc::new(Memory::new(1 << 20));
    let region = memory.region();
    let stop = Arc::new(AtomicBool::new(false));
    let mut driver = PackedDriver::new(memory.clone(), SIZE, true);
    let ring = driver.descriptor(0);
    let ring_end = memory.allocate(0, 1);
    let flipper = {
        let (memory, stop) = (memory.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut seed = 0x9e37_79b9_7f4a_7c15u64;
            while !stop.load(Ordering::Relaxed) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let at = ring + seed % (ring_end - ring) / 2 * 2;
                memory.store(at, (seed >> 40) as u16 & 0x81bf);
            }
        })
    };
    let file = InflightFile::new(SIZE, true);
    let (mut taken, mut broken, mut seed) = (0, 0, 7usize);
    let start = Instant::now();
    let enough = Duration::from_millis(1000);
    while start.elapsed() < enough || taken == 0 || broken == 0 {
        assert!(start.elapsed() < 20 * enough, "{taken} taken, {broken} broken");
        let mut device =
            Device::with_capacity(CAPACITY, GuestMemory::new([region.clone()]).unwrap());
        device.track(&file);
        if file.read(8, 2) == [0, 0] {
            driver.reset();
        }
        let mut queue = device.try_packed_queue(&driver, START, true).unwrap();
        memory.write(ring_end, &header(T_IN, 1));
        let chain = [Desc::readable(ring_end, 16), Desc::writable(GUEST_BASE + 65536, 513)];
        for id in 0..16 {
            driver.submit_chain(id, &chain);
            let mut requests = Vec::new();
            let result = queue.take(16, &mut requests);
            for request in &requests {
                taken += 1;
                for (at, length) in request.data.addresses() {
                    let offset = Memory::offset_of(&region, at).expect("inside");
                    assert!(offset + length <= 1 << 20);
                }
                if !request.tag.0.is_multiple_of(3) {
                    queue.complete(request.tag, Ok(()));
                }
            }
            queue.publish();
            if result.is_err() {
                broken += 1;
                break;
            }
        }
        // It dies; what it left is bent a little, or forgotten.
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let at = (seed >> 20) % file.length();
        match seed >> 60 {
            0..4 => file.write(8, &[0, 0]),
            4..8 => file.write(at, &[(seed >> 52) as u8 & 0x1f]),
            _ => {}
        }
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
}
