//! Where the data of requests is: guest memory, private copies, and what waits for room.

use upcall_abi::filter::verdict;
use upcall_abi::ring::{NO_DATA, submission_kind};
use upcall_block::*;
use upcall_chain::SlotSpec;
use upcall_ring::Buffers;

use super::{PAGE, SlotSpecs};
use crate::engine::sim::*;

#[test]
fn where_no_filter_asks_for_the_data_the_store_gets_the_guests_own_memory() {
    let (making, keeper) = Making::new(vec![blind()]);
    let mut world = World::new(making);
    for op in [Op::Write, Op::Read] {
        world.submit_at(op, 0, PAGE, 8192);
        let start = world.sent(0);
        assert_eq!(start.data, NO_DATA, "it did not ask");
        world.hosts[0].answer(&start, verdict::PASS);
        world.settle();
        let guests = Buffers::of(&world.guest, 8192, PAGE as usize, true).unwrap();
        let taken: Vec<_> = keeper.0.lock().unwrap().ios[0].data.addresses().collect();
        assert_eq!(taken, guests.addresses().collect::<Vec<_>>(), "{op}: no copy");
        keeper.complete(Ok(()));
        world.settle();
        assert_eq!(world.ended(), [Ok(())]);
    }
    world.assert_empty();
}

#[test]
fn where_a_filter_asks_for_the_data_the_store_gets_the_private_copy_that_the_filter_saw() {
    let (making, keeper) = Making::new(vec![observer()]);
    let mut world = World::new(making);
    world.guest.write(8192, &[7; PAGE as usize]).unwrap();
    world.submit_at(Op::Write, 0, PAGE, 8192);
    let start = world.sent(0);
    // Whatever the guest writes from now on, filter and store see the same.
    world.guest.write(8192, &[8; PAGE as usize]).unwrap();
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    let at = start.data as usize;
    let copy = Buffers::of(&world.arena, at, PAGE as usize, true).unwrap();
    let taken: Vec<_> = keeper.0.lock().unwrap().ios[0].data.addresses().collect();
    assert_eq!(taken, copy.addresses().collect::<Vec<_>>());
    let mut bytes = [0; PAGE as usize];
    copy.read(0, &mut bytes);
    assert_eq!(bytes, [7; PAGE as usize]);
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn requests_issued_for_issued_ones_never_wait_for_room_that_those_take_up() {
    // Each of two filters writes a copy of every write below itself before it lets the
    // write go on; the third one looks at all of them.
    let (mut making, keeper) = Making::new(vec![blind(), observer(), SlotSpecs::last()]);
    making.issues = vec![true, true, false];
    making.pages = 4;
    let mut world = World::new(making);
    for number in 0..12 {
        world.submit(Op::Write, number * u64::from(PAGE), PAGE);
    }
    let mut held: [Vec<(u64, upcall_abi::ring::Submission)>; 2] = Default::default();
    let mut ended = Vec::new();
    for turn in 0u64..1000 {
        world.settle();
        keeper.complete(Ok(()));
        for (host, held) in held.iter_mut().enumerate() {
            while let Some(entry) = world.hosts[host].take() {
                if entry.kind == submission_kind::START {
                    let id = turn << 32 | held.len() as u64;
                    world.hosts[host].hold(&entry);
                    world.hosts[host].issue(id, 0, entry.offset, entry.length, 0);
                    held.push((id, entry));
                } else if let Some(at) = held.iter().position(|(id, _)| *id == entry.token) {
                    let (_, start) = held.swap_remove(at);
                    world.hosts[host].answer(&start, verdict::PASS);
                }
            }
        }
        while let Some(entry) = world.hosts[2].take() {
            world.hosts[2].answer(&entry, verdict::PASS);
        }
        ended.extend(world.ended());
    }
    assert_eq!(ended, [Ok(()); 12]);
    world.assert_empty();
}

#[test]
fn parts_of_written_zeroes_do_not_ask_for_space_to_be_given_back() {
    let (making, keeper) = Making::new(vec![changer()]);
    let mut world = World::new(making);
    let flags = RequestFlags { fua: true, unmap: true, retry: false };
    world.submit_flags(Op::WriteZeroes, 0, PAGE, 0, flags);
    let start = world.sent(0);
    assert_eq!((start.op, start.flags), (Op::Write as u8, upcall_abi::filter::request_flag::FUA));
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    assert_eq!(
        keeper.0.lock().unwrap().ios[0].flags,
        RequestFlags { fua: true, ..RequestFlags::default() }
    );
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
}

#[test]
fn written_zeroes_have_few_parts_in_flight_and_none_begins_after_a_failure() {
    let (mut making, keeper) = Making::new(vec![changer()]);
    making.lanes[0].1.capacity = 16 << 20;
    making.pages = 1024;
    let mut world = World::new(making);
    world.submit(Op::WriteZeroes, 0, 8 << 20);
    let mut parts = Vec::new();
    world.settle();
    while let Some(start) = world.hosts[0].take() {
        parts.push((start.offset, start.length));
        world.hosts[0].answer(&start, verdict::PASS);
    }
    assert_eq!(parts, [0, 1, 2, 3].map(|part| (part * (256 << 10), 256 << 10)));
    world.settle();
    keeper.complete(Err(Errno::ENOSPC));
    world.settle();
    assert!(world.hosts[0].take().is_none());
    assert_eq!(world.ended(), [Err(Errno::ENOSPC)]);
    world.assert_empty();
}

#[test]
fn requests_that_wait_for_room_go_on_in_the_order_of_their_arrival() {
    let (mut making, keeper) = Making::new(vec![observer()]);
    making.pages = 4;
    let mut world = World::new(making);
    // The third would fit beside the first, and would keep the second waiting.
    for pages in [3, 2, 1, 1] {
        world.submit(Op::Write, 0, pages * PAGE);
    }
    let mut lengths = Vec::new();
    for _ in 0..4 {
        let start = world.sent(0);
        lengths.push(start.length / PAGE);
        if lengths.len() == 1 {
            assert!(world.hosts[0].take().is_none());
        }
        world.hosts[0].answer(&start, verdict::PASS);
        world.settle();
        keeper.complete(Ok(()));
    }
    assert_eq!(lengths, [3, 2, 1, 1]);
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 4]);
    world.assert_empty();
}

#[test]
fn a_read_that_a_filter_answers_without_filling_it_shows_nothing_of_earlier_requests() {
    let answers = SlotSpec { answers: OpSet::NONE.with(Op::Read), ..observer() };
    let (mut making, keeper) = Making::new(vec![answers]);
    making.pages = 1;
    let mut world = World::new(making);
    // Somebody else's secret goes through the same page.
    world.guest.write(8192, &[7; PAGE as usize]).unwrap();
    world.submit_at(Op::Write, 0, PAGE, 8192);
    let secret = world.sent(0);
    world.hosts[0].answer(&secret, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    world.submit(Op::Read, 65536, PAGE);
    let read = world.sent(0);
    assert_eq!(read.data, secret.data, "the page is used again");
    world.hosts[0].answer(&read, verdict::DONE);
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 2]);
    assert_eq!(world.guest.read_array(0), Some([0; PAGE as usize]));
    world.assert_empty();
}

#[test]
fn a_read_that_fails_leaves_the_guests_memory_as_it_was() {
    let (making, keeper) = Making::new(vec![changer()]);
    let mut world = World::new(making);
    world.guest.write(0, &[7; PAGE as usize]).unwrap();
    world.submit(Op::Read, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    // Whatever the store and filters left in the private copy.
    world.arena.write(0, &[8; 64 * PAGE as usize]).unwrap();
    keeper.complete(Err(Errno::EIO));
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EIO)]);
    assert_eq!(world.guest.read_array(0), Some([7; PAGE as usize]));
    world.assert_empty();
}

#[test]
fn a_filter_is_told_that_a_request_may_have_been_carried_out_before() {
    let (making, _keeper) = Making::new(vec![observer()]);
    let mut world = World::new(making);
    let flags = RequestFlags { retry: true, ..RequestFlags::default() };
    world.submit_flags(Op::Write, 0, PAGE, 0, flags);
    let start = world.sent(0);
    assert_eq!(start.flags, upcall_abi::filter::request_flag::RETRY);
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
}
