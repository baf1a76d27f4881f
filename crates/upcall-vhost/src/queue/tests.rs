//! A driver on one side, the queue on the other, and what passes between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use upcall_block::{DATA_LENGTH_MAX, DiskInfo, Errno, Op, OpSet, Request, RequestQueue, Tag};

use crate::memory::{GuestMemory, Region, RegionAddress};
use crate::mock::*;
use crate::virtio::*;
use crate::{BlkConfig, BlkOptions, QueueHost, VirtQueue};

const CAPACITY: u64 = 1 << 20;

struct Pair {
    memory: Arc<Memory>,
    driver: Driver,
    device: Device,
    queue: VirtQueue,
    disk: RamDisk,
}

fn pair_of(config: BlkConfig, event_idx: bool, base: u16) -> Pair {
    let memory = Arc::new(Memory::new(8 << 20));
    let driver = Driver::new(memory.clone(), 16, event_idx, base);
    let device = Device::new(config, memory.table());
    let queue = device.queue(&driver);
    Pair { memory, driver, device, queue, disk: RamDisk(vec![0; CAPACITY as usize]) }
}

fn pair() -> Pair {
    pair_with(disk_info(CAPACITY))
}

fn pair_with(info: DiskInfo) -> Pair {
    pair_of(BlkConfig::new(info, BlkOptions::default()).unwrap(), false, 0)
}

impl Pair {
    fn take(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        self.queue.take(64, &mut requests).unwrap();
        requests
    }

    /// Submits a request, has it carried out, and returns its status byte and used length.
    fn run(&mut self, kind: u32, sector: u64, out: &[u8], in_length: usize) -> (u8, u32) {
        let submitted = self.driver.submit(kind, sector, out, in_length);
        self.disk.serve(&mut self.queue);
        let used = self.driver.reap();
        assert_eq!(used.len(), 1, "one completion");
        assert_eq!(used[0].head, u32::from(submitted.head));
        (self.driver.status(&submitted), used[0].length)
    }

    /// A header in memory.
    fn header(&self, kind: u32, sector: u64) -> u64 {
        let at = self.memory.allocate(HEADER_SIZE, 1);
        self.memory.write(at, &header(kind, sector));
        at
    }

    /// Submits a chain with head 0 that must break the queue, which must leave the guest's
    /// memory alone and say so.
    fn breaks_on(mut self, chain: &[Desc], reason: &str) {
        self.driver.put_chain(0, chain);
        self.breaks_at_head(0, reason);
    }

    fn breaks_at_head(&mut self, head: u16, reason: &str) {
        self.driver.make_available(head);
        self.breaks(reason);
    }

    fn breaks(&mut self, reason: &str) {
        let before = self.memory.read(GUEST_BASE, 8 << 20);
        let mut requests = Vec::new();
        let error = self.queue.take(64, &mut requests).unwrap_err();
        assert!(error.reason.contains(reason), "{error}, expected {reason}");
        assert!(requests.is_empty());
        assert!(self.device.error.clear(), "the error descriptor is signalled");
        let again = self.queue.take(64, &mut requests).unwrap_err();
        assert_eq!(again.reason, error.reason);
        assert!(!self.device.error.clear(), "and only once");
        self.queue.publish();
        assert_eq!(self.memory.read(GUEST_BASE, 8 << 20), before, "nothing was written");
    }
}

#[test]
fn what_was_written_is_read_back() {
    let mut pair = pair();
    let data: Vec<u8> = (0..8192).map(|i| (i * 7) as u8).collect();
    assert_eq!(pair.run(T_OUT, 8, &data, 0), (S_OK, 1), "a write writes its status alone");
    assert_eq!(pair.disk.0[4096..12288], data);
    let read = pair.driver.submit(T_IN, 8, &[], 8192);
    pair.disk.serve(&mut pair.queue);
    assert_eq!(pair.driver.reap()[0].length, 8193);
    assert_eq!(pair.memory.read(read.data, 8192), data);
    assert_eq!(pair.driver.status(&read), S_OK);
}

#[test]
fn requests_point_straight_into_the_guests_memory() {
    let memory = Arc::new(Memory::new(1 << 20));
    let mut driver = Driver::new(memory.clone(), 16, false, 0);
    let region = memory.region();
    let device = Device::with_capacity(CAPACITY, GuestMemory::new([region.clone()]).unwrap());
    let mut queue = device.queue(&driver);
    let submitted = driver.submit(T_IN, 0, &[], 512);
    let mut requests = Vec::new();
    queue.take(1, &mut requests).unwrap();
    let (at, length) = requests[0].data.addresses().next().unwrap();
    let offset = Memory::offset_of(&region, at).unwrap();
    assert_eq!((offset as u64 + GUEST_BASE, length), (submitted.data, 512));
}

#[test]
fn flush_discard_and_write_zeroes_arrive_as_such() {
    let mut pair = pair();
    pair.driver.submit(T_FLUSH, 0, &[], 0);
    pair.driver.submit(T_DISCARD, 0, &segment(16, 8, 0), 0);
    pair.driver.submit(T_WRITE_ZEROES, 0, &segment(32, 4, SEGMENT_UNMAP), 0);
    pair.driver.submit(T_WRITE_ZEROES, 0, &segment(32, 4, 0), 0);
    let taken: Vec<_> = pair
        .take()
        .iter()
        .map(|r| (r.op, r.range.offset(), r.range.length(), r.flags.unmap, r.data.len()))
        .collect();
    assert_eq!(
        taken,
        [
            (Op::Flush, 0, 0, false, 0),
            (Op::Discard, 8192, 4096, false, 0),
            (Op::WriteZeroes, 16384, 2048, true, 0),
            (Op::WriteZeroes, 16384, 2048, false, 0),
        ]
    );
}

#[test]
fn errors_become_the_status_that_the_specification_names() {
    let mut pair = pair();
    let end = CAPACITY / SECTOR_SIZE;
    let ioerr = (S_IOERR, 1);
    let unsupported = (S_UNSUPP, 1);
    assert_eq!(pair.run(T_IN, end, &[], 512), ioerr, "past the end");
    assert_eq!(pair.run(T_OUT, end - 1, &[0; 1024], 0), ioerr, "over the end");
    assert_eq!(pair.run(T_IN, u64::MAX, &[], 512), ioerr, "far past the end");
    assert_eq!(pair.run(T_IN, u64::MAX / 512, &[], 512), ioerr, "offset near overflow");
    assert_eq!(pair.run(T_IN, 0, &[], 511), ioerr, "not whole sectors");
    assert_eq!(pair.run(99, 0, &[], 512), unsupported, "unknown type");
    assert_eq!(pair.run(T_IN | 0x8000_0000, 0, &[], 512), unsupported, "legacy barrier");
    assert_eq!(pair.run(T_DISCARD, 0, &segment(0, 8, 1), 0), unsupported, "discard with unmap");
    assert_eq!(pair.run(T_DISCARD, 0, &segment(0, 8, 2), 0), unsupported, "reserved flag");
    assert_eq!(pair.run(T_WRITE_ZEROES, 0, &segment(0, 8, 2), 0), unsupported, "reserved flag");
    let two = [segment(0, 8, 0), segment(8, 8, 0)].concat();
    assert_eq!(pair.run(T_DISCARD, 0, &two, 0), unsupported, "two segments where one is offered");
    assert_eq!(pair.run(T_DISCARD, 0, &two[..24], 0), ioerr, "one and a half");
    assert_eq!(pair.run(T_DISCARD, 0, &[], 0), ioerr, "no segment");
    assert_eq!(pair.run(T_DISCARD, 0, &segment(end, 8, 0), 0), ioerr, "discard past the end");
    assert_eq!(pair.run(T_WRITE_ZEROES, 0, &segment(0, u32::MAX, 0), 0), ioerr, "too long");
    assert_eq!(pair.run(T_DISCARD, 0, &segment(0, 0, 0), 0), (S_OK, 1), "nothing to discard");
    assert!(!pair.device.error.clear(), "none of this breaks the queue");
}

#[test]
fn a_read_only_disk_refuses_what_changes_it() {
    let mut pair = pair_with(DiskInfo { read_only: true, ..disk_info(CAPACITY) });
    assert_eq!(pair.run(T_OUT, 0, &[0; 512], 0), (S_IOERR, 1));
    assert_eq!(pair.run(T_DISCARD, 0, &segment(0, 8, 0), 0), (S_IOERR, 1));
    assert_eq!(pair.run(T_IN, 0, &[], 512), (S_OK, 513));
    let ops = OpSet::NONE.with(Op::Read).with(Op::Flush);
    let mut pair = pair_with(DiskInfo { read_only: true, ops, ..disk_info(CAPACITY) });
    assert_eq!(pair.run(T_OUT, 0, &[0; 512], 0), (S_IOERR, 1), "even if its store has no writes");
}

#[test]
fn operations_that_are_not_offered_are_unsupported() {
    let ops = OpSet::NONE.with(Op::Read).with(Op::Write);
    let mut pair = pair_with(DiskInfo { ops, ..disk_info(CAPACITY) });
    assert_eq!(pair.run(T_DISCARD, 0, &segment(0, 8, 0), 0), (S_UNSUPP, 1));
    assert_eq!(pair.run(T_WRITE_ZEROES, 0, &segment(0, 8, 0), 0), (S_UNSUPP, 1));
    assert_eq!(pair.run(T_FLUSH, 0, &[], 0), (S_UNSUPP, 1));
}

#[test]
fn requests_must_be_whole_blocks_of_a_disk_with_larger_ones() {
    let mut pair = pair_with(DiskInfo { block_size: 4096, ..disk_info(CAPACITY) });
    assert_eq!(pair.run(T_IN, 1, &[], 4096), (S_IOERR, 1));
    assert_eq!(pair.run(T_IN, 0, &[], 512), (S_IOERR, 1));
    assert_eq!(pair.run(T_IN, 8, &[], 4096), (S_OK, 4097));
}

#[test]
fn a_failed_read_claims_no_data() {
    // CVE-2024-8612: a length that covers what was not written.
    let mut pair = pair();
    let read = pair.driver.submit(T_IN, 0, &[], 4096);
    let tag = pair.take()[0].tag;
    pair.queue.complete(tag, Err(Errno::EIO));
    pair.queue.publish();
    assert_eq!(pair.driver.reap()[0].length, 1);
    assert_eq!(pair.driver.status(&read), S_IOERR);
    assert_eq!(pair.memory.read(read.data, 4096), [0xee; 4096]);
}

#[test]
fn an_operation_that_a_filter_cannot_do_is_unsupported_and_a_write_that_fails_an_error() {
    let mut pair = pair();
    let discard = pair.driver.submit(T_DISCARD, 0, &segment(0, 8, 0), 0);
    let write = pair.driver.submit(T_OUT, 0, &[0; 512], 0);
    for request in pair.take() {
        pair.queue.complete(request.tag, Err(Errno::EOPNOTSUPP));
    }
    assert_eq!(pair.driver.status(&discard), S_UNSUPP);
    assert_eq!(pair.driver.status(&write), S_IOERR);
}

#[test]
fn the_serial_number_is_answered_and_cut_to_the_room_there_is() {
    let options = BlkOptions { serial: "serial-0123456789abc".into(), ..BlkOptions::default() };
    let mut pair = pair_of(BlkConfig::new(disk_info(CAPACITY), options).unwrap(), false, 0);
    for (room, length) in [(20, 20), (7, 7), (32, 20), (0, 0)] {
        let id = pair.driver.submit(T_GET_ID, 0, &[], room);
        assert!(pair.take().is_empty(), "answered inside, and shown without help");
        assert_eq!(pair.driver.reap()[0].length, length as u32 + 1);
        assert_eq!(pair.memory.read(id.data, length), b"serial-0123456789abc"[..length]);
        assert_eq!(
            pair.memory.read(id.data + length as u64, room - length),
            vec![0xee; room - length]
        );
        assert_eq!(pair.driver.status(&id), S_OK);
    }
}

#[test]
fn reads_and_writes_of_nothing_end_at_once() {
    let mut pair = pair();
    assert_eq!(pair.run(T_IN, 0, &[], 0), (S_OK, 1));
    assert_eq!(pair.run(T_OUT, CAPACITY / 512, &[], 0), (S_OK, 1));
    assert_eq!(pair.run(T_OUT, CAPACITY / 512 + 1, &[], 0), (S_IOERR, 1));
}

#[test]
fn the_layout_of_a_request_is_free() {
    let mut pair = pair();
    pair.disk.0[..1024].fill(0x5a);
    // The header in three descriptors, one of them empty, data and status in two, the
    // status behind data.
    let at = pair.header(T_IN, 0);
    let target = pair.memory.allocate(1025, 1);
    pair.driver.submit_chain(
        0,
        &[
            Desc::readable(at, 5),
            Desc::readable(0xdead_beef_0000, 0),
            Desc::readable(at + 5, 11),
            Desc::writable(target, 100),
            Desc::writable(target + 100, 925),
        ],
    );
    pair.disk.serve(&mut pair.queue);
    assert_eq!(pair.driver.reap(), [Used { head: 0, length: 1025 }]);
    assert_eq!(pair.memory.read(target, 1025), [vec![0x5a; 1024], vec![S_OK]].concat());

    // Header and data of a write in one descriptor; the header's bytes are not written.
    let at = pair.memory.allocate(16 + 512, 1);
    pair.memory.write(at, &[&header(T_OUT, 1)[..], &[0x11; 512]].concat());
    pair.driver.submit_chain(0, &[Desc::readable(at, 528), Desc::writable(target, 1)]);
    pair.disk.serve(&mut pair.queue);
    assert_eq!(pair.driver.reap(), [Used { head: 0, length: 1 }]);
    assert_eq!(pair.disk.0[511..1025], [&[0x5a][..], &[0x11; 512], &[0]].concat());
}

#[test]
fn a_short_header_is_an_error_of_the_request() {
    let mut pair = pair();
    let at = pair.header(T_IN, 0);
    let target = pair.memory.allocate(513, 1);
    pair.driver.submit_chain(0, &[Desc::readable(at, 15), Desc::writable(target, 513)]);
    pair.driver.submit_chain(3, &[Desc::writable(target, 1)]);
    assert!(pair.take().is_empty());
    assert_eq!(pair.driver.reap(), [Used { head: 0, length: 1 }, Used { head: 3, length: 1 }]);
    assert_eq!(pair.memory.read(target + 512, 1), [S_IOERR]);
    assert_eq!(pair.memory.read(target, 1), [S_IOERR]);
}

#[test]
fn data_outside_the_guests_memory_is_an_error_of_the_request() {
    let mut pair = pair();
    let at = pair.header(T_IN, 0);
    let status = pair.memory.allocate(1, 1);
    let end = GUEST_BASE + (8 << 20);
    for address in [0, end, end - 511, u64::MAX, u64::MAX - 511, GUEST_BASE - 1] {
        pair.memory.write(status, &[0xff]);
        let chain =
            [Desc::readable(at, 16), Desc::writable(address, 512), Desc::writable(status, 1)];
        pair.driver.submit_chain(0, &chain);
        assert!(pair.take().is_empty(), "{address:#x}");
        assert_eq!(pair.driver.reap(), [Used { head: 0, length: 1 }]);
        assert_eq!(pair.memory.read(status, 1), [S_IOERR]);
    }
    // The same for the header.
    pair.driver.submit_chain(0, &[Desc::readable(end - 8, 16), Desc::writable(status, 1)]);
    assert!(pair.take().is_empty());
    assert_eq!(pair.driver.reap().len(), 1);
}

#[test]
fn more_data_than_a_request_may_have_is_an_error() {
    let mut pair = pair_with(disk_info(64 << 20));
    let (at, status) = (pair.header(T_IN, 0), pair.memory.allocate(1, 1));
    let half = DATA_LENGTH_MAX / 2;
    let target = GUEST_BASE + (1 << 20);
    let mut chain = vec![
        Desc::readable(at, 16),
        Desc::writable(target, half),
        Desc::writable(target, half),
        Desc::writable(status, 1),
    ];
    pair.driver.submit_chain(0, &chain);
    let taken = pair.take();
    assert_eq!(taken[0].range.length(), DATA_LENGTH_MAX, "the largest there is");
    pair.queue.complete(taken[0].tag, Ok(()));
    pair.queue.publish();
    chain.insert(2, Desc::writable(target, 512));
    pair.driver.submit_chain(0, &chain);
    assert!(pair.take().is_empty());
    pair.queue.publish();
    assert_eq!(pair.driver.reap().last().unwrap().length, 1);
    assert_eq!(pair.memory.read(status, 1), [S_IOERR]);
}

#[test]
fn indirect_descriptors_are_followed() {
    let mut pair = pair();
    pair.disk.0[..512].fill(0x77);
    let (at, target) = (pair.header(T_IN, 0), pair.memory.allocate(513, 1));
    let table = pair.driver.indirect(&[Desc::readable(at, 16), Desc::writable(target, 513)]);
    pair.driver.submit_chain(4, &[table]);
    pair.disk.serve(&mut pair.queue);
    assert_eq!(pair.driver.reap(), [Used { head: 4, length: 513 }]);
    assert_eq!(pair.memory.read(target, 512), [0x77; 512]);
    // A direct descriptor, then the table; its write flag means nothing.
    let rest = pair.driver.indirect(&[Desc::writable(target, 513)]);
    let rest = Desc { flags: rest.flags | DESC_WRITE, ..rest };
    pair.driver.submit_chain(2, &[Desc::readable(at, 16), rest]);
    pair.disk.serve(&mut pair.queue);
    assert_eq!(pair.driver.reap(), [Used { head: 2, length: 513 }]);
}

#[test]
fn a_chain_without_room_for_a_status_breaks_the_queue() {
    let p = pair();
    let at = p.header(T_OUT, 0);
    p.breaks_on(&[Desc::readable(at, 16)], "status");
    let p = pair();
    let at = p.header(T_OUT, 0);
    p.breaks_on(&[Desc::readable(at, 16), Desc::writable(at, 0)], "status");
    let p = pair();
    let at = p.header(T_OUT, 0);
    p.breaks_on(&[Desc::readable(at, 16), Desc::writable(0, 1)], "status");
    let p = pair();
    let at = p.header(T_IN, 0);
    p.breaks_on(&[Desc::readable(at, 16), Desc::writable(u64::MAX, 2)], "status");
}

#[test]
fn malformed_chains_break_the_queue() {
    let at = GUEST_BASE + (1 << 20);
    let (read, write) = (Desc::readable(at, 16), Desc::writable(at + 64, 1));
    pair().breaks_on(&[write, read], "readable memory after writable");

    let mut p = pair();
    p.driver.put_descriptor(0, Desc { flags: DESC_NEXT, ..read }, 16);
    p.breaks_at_head(0, "goes on at descriptor 16");

    let mut p = pair();
    p.driver.put_descriptor(0, Desc { flags: DESC_NEXT, ..read }, 0);
    p.breaks_at_head(0, "more descriptors than its table");

    let p = pair();
    let table = p.driver.indirect(&[read, write]);
    p.breaks_on(&[Desc { flags: DESC_INDIRECT | DESC_NEXT, ..table }], "also has a next");
    let p = pair();
    let inner = p.driver.indirect(&[read, write]);
    let outer = p.driver.indirect(&[inner]);
    p.breaks_on(&[outer], "in an indirect table");
    for length in [0, 15, 17, 1025 * 16, u32::MAX] {
        let p = pair();
        let table = p.driver.indirect(&[read, write]);
        p.breaks_on(&[Desc { length, ..table }], "indirect table of");
    }
    let p = pair();
    p.breaks_on(&[Desc::indirect(GUEST_BASE + (8 << 20) - 16, 2)], "outside the guest's memory");
    let p = pair();
    let table = p.driver.indirect(&[read, write]);
    p.memory.write(table.address + 14, &[2, 0]);
    p.breaks_on(&[table], "goes on at descriptor 2");
    let p = pair();
    let table = p.driver.indirect(&[read, Desc { flags: DESC_NEXT, ..write }]);
    p.memory.write(table.address + 16 + 14, &[1, 0]);
    p.breaks_on(&[table], "more descriptors than its table");
}

#[test]
fn an_indirect_table_that_was_not_negotiated_breaks_the_queue() {
    let mut p = pair();
    p.queue = p.device.try_queue(&p.driver, false).unwrap();
    let table = p.driver.indirect(&[Desc::writable(GUEST_BASE, 1)]);
    p.breaks_on(&[table], "not negotiated");
}

#[test]
fn a_head_outside_the_ring_breaks_the_queue() {
    pair().breaks_at_head(16, "descriptor 16");
    pair().breaks_at_head(u16::MAX, "descriptor 65535");
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    for index in [17, 0x8000, u16::MAX] {
        let mut p = pair();
        p.driver.set_available_index(index);
        p.breaks("available index jumped");
    }
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    assert_eq!(p.take().len(), 1);
    p.driver.set_available_index(0);
    p.breaks("available index jumped");
}

#[test]
fn a_head_in_flight_is_not_taken_again() {
    // CVE-2026-45782.
    let mut p = pair();
    let read = p.driver.submit(T_IN, 0, &[], 512);
    let taken = p.take();
    p.breaks_at_head(read.head, "while it is in flight");
    // What was taken before still completes, once.
    p.queue.complete(taken[0].tag, Ok(()));
    p.queue.publish();
    assert_eq!(p.driver.reap(), [Used { head: read.head.into(), length: 513 }]);
    assert_eq!(p.driver.status(&read), S_OK);
    assert_eq!(p.queue.in_flight(), 0);
}

#[test]
fn requests_before_the_bad_one_are_handed_out() {
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    p.driver.make_available(16);
    let mut requests = Vec::new();
    assert!(p.queue.take(64, &mut requests).is_err());
    assert_eq!(requests.len(), 1);
    p.queue.complete(requests[0].tag, Ok(()));
    p.queue.publish();
    assert_eq!(p.driver.reap().len(), 1);
}

#[test]
#[should_panic(expected = "not in flight")]
fn completing_twice_is_our_own_bug() {
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    let tag = p.take()[0].tag;
    p.queue.complete(tag, Ok(()));
    p.queue.complete(tag, Ok(()));
}

#[test]
#[should_panic(expected = "not in flight")]
fn completing_what_was_never_taken_is_our_own_bug() {
    pair().queue.complete(Tag(1 << 20), Ok(()));
}

#[test]
fn no_more_is_taken_than_asked_for() {
    let mut p = pair();
    for _ in 0..5 {
        p.driver.submit(T_FLUSH, 0, &[], 0);
    }
    let mut requests = Vec::new();
    p.queue.take(2, &mut requests).unwrap();
    assert_eq!(requests.len(), 2);
    p.queue.take(2, &mut requests).unwrap();
    p.queue.take(0, &mut requests).unwrap();
    assert_eq!(requests.len(), 4);
}

#[test]
fn indices_wrap() {
    let config = BlkConfig::new(disk_info(CAPACITY), BlkOptions::default()).unwrap();
    let mut p = pair_of(config, true, 0xfff0);
    p.driver.set_used_event(0xfff0);
    for i in 0..40 {
        // One by one, each signalled because the driver asks for it.
        p.driver.set_used_event(0xfff0u16.wrapping_add(i));
        assert_eq!(p.run(T_FLUSH, 0, &[], 0), (S_OK, 1));
        assert!(p.device.call.clear(), "completion {i} is signalled");
    }
    assert_eq!(p.queue.finish().next_available(), 0xfff0u16.wrapping_add(40));
}

#[test]
fn the_event_index_decides_about_signals() {
    let config = BlkConfig::new(disk_info(CAPACITY), BlkOptions::default()).unwrap();
    let mut p = pair_of(config, true, 0);
    assert_eq!(p.run(T_FLUSH, 0, &[], 0), (S_OK, 1));
    assert!(p.device.call.clear(), "the first in any case");
    p.driver.set_used_event(3);
    for i in 1..6 {
        p.run(T_FLUSH, 0, &[], 0);
        assert_eq!(p.device.call.clear(), i == 3, "completion {i}");
    }
    // A batch that goes over the event index is signalled once.
    p.driver.set_used_event(7);
    for _ in 0..3 {
        p.driver.submit(T_FLUSH, 0, &[], 0);
    }
    assert_eq!(p.disk.serve(&mut p.queue), 3);
    assert!(p.device.call.clear());
    p.queue.publish();
    assert!(!p.device.call.clear(), "nothing new, no signal");
}

#[test]
fn a_driver_without_event_index_declines_signals_by_a_flag() {
    let mut p = pair();
    p.driver.set_available_flags(AVAIL_NO_INTERRUPT);
    p.run(T_FLUSH, 0, &[], 0);
    assert!(!p.device.call.clear());
    p.driver.set_available_flags(0);
    p.run(T_FLUSH, 0, &[], 0);
    assert!(p.device.call.clear());
    p.queue.publish();
    assert!(!p.device.call.clear(), "nothing new, no signal");
}

#[test]
fn completions_are_not_seen_before_they_are_published() {
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    let tag = p.take()[0].tag;
    p.queue.complete(tag, Ok(()));
    assert!(p.driver.reap().is_empty());
    assert!(!p.device.call.clear());
    p.queue.publish();
    assert_eq!(p.driver.reap().len(), 1);
}

#[test]
fn a_queue_that_sleeps_is_woken_and_one_that_polls_is_not() {
    for event_idx in [false, true] {
        let config = BlkConfig::new(disk_info(CAPACITY), BlkOptions::default()).unwrap();
        let mut p = pair_of(config, event_idx, 0);
        assert_eq!(p.run(T_FLUSH, 0, &[], 0), (S_OK, 1));
        p.run(T_FLUSH, 0, &[], 0);
        assert!(!p.driver.wants_doorbell(), "awake");
        assert!(p.queue.before_sleep(), "nothing there");
        p.driver.submit(T_FLUSH, 0, &[], 0);
        assert!(p.driver.wants_doorbell(), "asleep");
        p.device.kick.ring();
        p.queue.after_sleep();
        assert!(!p.device.kick.clear(), "the doorbell was emptied");
        assert!(!p.queue.before_sleep(), "what arrived is seen");
        p.queue.after_sleep();
        assert_eq!(p.disk.serve(&mut p.queue), 1);
        p.driver.submit(T_FLUSH, 0, &[], 0);
        p.disk.serve(&mut p.queue);
        p.driver.submit(T_FLUSH, 0, &[], 0);
        assert!(!p.driver.wants_doorbell(), "awake again");
    }
}

#[test]
fn no_wake_up_is_lost() {
    // Both sides sleep whenever they have nothing to do, and are woken only if they asked.
    for event_idx in [false, true] {
        let config = BlkConfig::new(disk_info(CAPACITY), BlkOptions::default()).unwrap();
        let Pair { mut driver, device, queue, .. } = pair_of(config, event_idx, 0);
        let mut host = ThreadHost::new(CAPACITY as usize);
        host.start(0, queue);
        for round in 0..2000u16 {
            driver.set_used_event(round);
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
        assert_eq!(host.stop(0).next_available(), 2000);
    }
}

#[test]
fn a_broken_queue_sleeps() {
    let mut p = pair();
    p.driver.set_available_index(100);
    assert!(!p.queue.before_sleep(), "the error is there to be taken");
    p.breaks("jumped");
    assert!(p.queue.before_sleep());
}

#[test]
fn without_a_write_cache_every_write_is_durable() {
    let mut p = pair();
    let submit = |p: &mut Pair| {
        p.driver.submit(T_OUT, 0, &[0; 512], 0);
        p.driver.submit(T_WRITE_ZEROES, 0, &segment(0, 8, 0), 0);
        p.driver.submit(T_IN, 0, &[], 512);
        let taken = p.take();
        taken.iter().for_each(|request| p.queue.complete(request.tag, Ok(())));
        p.queue.publish();
        p.driver.reap();
        taken.iter().map(|request| request.flags.fua).collect::<Vec<_>>()
    };
    assert_eq!(submit(&mut p), [false, false, false]);
    p.device.config().set_write_cache(false);
    assert_eq!(submit(&mut p), [true, true, false], "while the queue runs");
    p.device.config().set_write_cache(true);
    p.device.set_flush_negotiated(false);
    assert_eq!(submit(&mut p), [true, true, false], "a driver that never flushes");
}

#[test]
fn requests_in_flight_outlive_the_memory_table() {
    let low = Memory::at(0x10_0000, 1 << 20);
    let mut p = pair();
    let both = GuestMemory::new([p.memory.region(), low.region()]).unwrap();
    p.device.set_memory(both);
    low.write(0x10_0000, &header(T_IN, 0));
    p.disk.0[..512].fill(0x99);
    let chain = [Desc::readable(0x10_0000, 16), Desc::writable(0x10_1000, 513)];
    p.driver.submit_chain(0, &chain);
    let taken = p.take();
    assert_eq!(taken.len(), 1, "a new region is used by a running queue");
    p.device.set_memory(p.memory.table());
    p.driver.submit_chain(4, &chain);
    let mut later = Vec::new();
    let error = p.queue.take(64, &mut later).unwrap_err();
    assert!(error.reason.contains("status"), "the region is gone: {error}");
    let status = p.disk.execute(&taken[0]);
    p.queue.complete(taken[0].tag, status);
    p.queue.publish();
    assert_eq!(p.driver.reap(), [Used { head: 0, length: 513 }]);
    assert_eq!(low.read(0x10_1000, 513), [vec![0x99; 512], vec![S_OK]].concat());
}

#[test]
fn a_ring_whose_memory_is_taken_away_breaks() {
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    let taken = p.take();
    p.device.set_memory(GuestMemory::default());
    p.breaks("no longer in the guest's memory");
    p.queue.complete(taken[0].tag, Ok(()));
    p.queue.publish();
    assert_eq!(p.driver.reap().len(), 1);
}

#[test]
fn data_may_lie_across_regions_that_adjoin_and_not_across_a_gap() {
    let mut p = pair();
    let end = GUEST_BASE + (8 << 20);
    let next = Memory::at(end, 4096);
    p.device.set_memory(GuestMemory::new([next.region(), p.memory.region()]).unwrap());
    p.disk.0[..1024].copy_from_slice(&(0..1024).map(|i| i as u8).collect::<Vec<_>>());
    let at = p.header(T_IN, 0);
    let status = p.memory.allocate(1, 1);
    let chain =
        [Desc::readable(at, 16), Desc::writable(end - 300, 1024), Desc::writable(status, 1)];
    p.driver.submit_chain(0, &chain);
    assert_eq!(p.disk.serve(&mut p.queue), 1);
    assert_eq!(p.memory.read(end - 300, 300), p.disk.0[..300]);
    assert_eq!(next.read(end, 724), p.disk.0[300..1024]);

    let far = Memory::at(end + 4096, 4096);
    p.device.set_memory(GuestMemory::new([far.region(), p.memory.region()]).unwrap());
    p.driver.submit_chain(0, &chain);
    assert_eq!(p.disk.serve(&mut p.queue), 0, "CVE-2018-1059");
    assert_eq!(p.memory.read(status, 1), [S_IOERR]);
}

#[test]
fn a_ring_goes_on_where_it_stopped() {
    let mut p = pair();
    p.run(T_FLUSH, 0, &[], 0);
    let Pair { mut driver, device, queue, mut disk, .. } = p;
    assert!(!driver.wants_doorbell());
    assert_eq!(queue.finish().next_available(), 1);
    assert!(driver.wants_doorbell(), "a stopped queue declines nothing");
    let mut queue = device.queue(&driver);
    driver.submit(T_FLUSH, 0, &[], 0);
    assert_eq!(disk.serve(&mut queue), 1);
    assert_eq!(driver.reap().len(), 1);
}

#[test]
#[should_panic(expected = "with requests in flight")]
fn a_queue_with_requests_in_flight_cannot_finish() {
    let mut p = pair();
    p.driver.submit(T_FLUSH, 0, &[], 0);
    p.take();
    p.queue.finish();
}

#[test]
fn a_ring_outside_memory_or_not_aligned_is_no_ring() {
    let memory = Arc::new(Memory::new(1 << 20));
    let driver = Driver::new(memory.clone(), 16, false, 0);
    let device = Device::with_capacity(CAPACITY, GuestMemory::default());
    assert!(device.try_queue(&driver, true).is_none());
    // Aligned in the hypervisor's addresses, but not where it is mapped.
    let RegionAddress { guest, user, length } = memory.address();
    let address = RegionAddress { guest, user, length: length - 1 };
    let region = Region::map(address, memory.fd(), 1).unwrap();
    device.set_memory(GuestMemory::new([region]).unwrap());
    assert!(device.try_queue(&driver, true).is_none());
    device.set_memory(memory.table());
    assert!(device.try_queue(&driver, true).is_some());
}

#[test]
fn a_guest_that_rewrites_everything_meanwhile_breaks_nothing_of_ours() {
    // A second thread flips descriptors, indices and headers while the queue takes and
    // completes (CVE-2015-8550, CVE-2020-14375). What is handed out must be consistent,
    // whatever was read.
    let memory = Arc::new(Memory::new(1 << 20));
    let region = memory.region();
    let stop = Arc::new(AtomicBool::new(false));
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    let ring_end = memory.allocate(0, 1);
    let flipper = {
        let (memory, stop) = (memory.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut seed = 0x9e37_79b9_7f4a_7c15u64;
            while !stop.load(Ordering::Relaxed) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let at = GUEST_BASE + seed % (ring_end - GUEST_BASE + 64) / 2 * 2;
                memory.store(at, (seed >> 40) as u16 & 0x013f);
            }
        })
    };
    let (mut shown, mut taken, mut broken) = (0, 0, 0);
    let start = Instant::now();
    let (enough, chains) = match std::env::var_os("UPCALL_CAMPAIGN") {
        Some(_) => (Duration::from_secs(15), 5_000_000),
        None => (Duration::from_millis(1500), 0),
    };
    while start.elapsed() < enough || shown < chains || taken == 0 || broken == 0 {
        assert!(start.elapsed() < 20 * enough, "{shown} shown, {taken} taken, {broken} broken");
        driver.reset();
        let device = Device::with_capacity(CAPACITY, GuestMemory::new([region.clone()]).unwrap());
        let mut queue = device.queue(&driver);
        let header_at = ring_end;
        memory.write(header_at, &header(T_IN, 1));
        for round in 0..16 {
            let chain = [Desc::readable(header_at, 16), Desc::writable(GUEST_BASE + 65536, 513)];
            driver.submit_chain(round % 8 * 2, &chain);
            shown += 1;
            let mut requests = Vec::new();
            let result = queue.take(16, &mut requests);
            for request in &requests {
                taken += 1;
                let length: usize = request.data.addresses().map(|(_, length)| length).sum();
                assert_eq!(
                    length,
                    request.range.length() as usize * usize::from(request.op.has_data())
                );
                for (at, length) in request.data.addresses() {
                    let offset = Memory::offset_of(&region, at).expect("inside");
                    assert!(offset + length <= 1 << 20);
                }
                queue.complete(request.tag, Ok(()));
            }
            queue.publish();
            if result.is_err() {
                broken += 1;
                break;
            }
        }
        queue.finish();
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    println!(
        "ledger: {{\"kind\":\"hostile-guest\",\"faults\":{shown},\"seconds\":{},\"result\":\"ok\"}}",
        start.elapsed().as_secs()
    );
}
