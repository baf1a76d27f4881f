//! The filter before two disks in memory.

use upcall_sdk::testing::{Host, IssuedIo, RequestId, State, check_manual_page};
use upcall_sdk::{Errno, Level, Op};

use super::Split;

const SIZE: u64 = 64 << 10;

fn host() -> Host<Split> {
    Host::<Split>::builder().disk(SIZE).granted(SIZE).open().unwrap()
}

fn host_that_ignores() -> Host<Split> {
    let builder = Host::<Split>::builder().disk(SIZE).granted(SIZE);
    builder.param("on_error", "ignore").open().unwrap()
}

fn finish_first(host: &mut Host<Split>, result: Result<(), Errno>) -> IssuedIo {
    let io = host.issued().remove(0);
    host.finish(io.id, result);
    io
}

const BELOW: State = State::Below { watched: true };

#[test]
fn a_write_goes_to_the_second_disk_first_and_then_to_the_first() {
    let mut host = host();
    let id = host.write_fua(512, &[7; 1024]);
    assert_eq!(host.state(id), State::Held);
    let io = finish_first(&mut host, Ok(()));
    assert_eq!((io.op, io.offset, io.length, io.disk), (Op::Write, 512, 1024, 1));
    assert!(io.fua, "as durable as the guest's");
    assert_eq!(host.stored(1)[512..1536], [7; 1024]);
    assert_eq!(host.stored(0)[512..1536], [0; 1024]);
    assert_eq!(host.state(id), BELOW);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0), host.stored(1));
    assert_eq!(host.counter("copied"), 1);
}

#[test]
fn every_change_is_copied_and_a_read_is_not_seen() {
    let mut host = host();
    for (op, length) in [(Op::Flush, 0), (Op::Discard, 512), (Op::WriteZeroes, 512)] {
        let id = host.request(op, 0, length);
        let io = finish_first(&mut host, Ok(()));
        assert_eq!((io.op, io.length, io.disk), (op, length, 1));
        assert_eq!(host.run(id), Ok(()));
    }
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.state(id), State::Below { watched: false });
    assert_eq!(host.run(id), Ok(()));
}

#[test]
fn a_flush_of_the_second_disk_that_fails_fails_the_flush() {
    let mut host = host();
    let id = host.request(Op::Flush, 0, 0);
    finish_first(&mut host, Err(Errno::EIO));
    assert_eq!(host.state(id), State::Ended(Err(Errno::EIO)));
}

#[test]
fn an_error_of_the_second_disk_keeps_the_write_from_the_first() {
    let mut host = host();
    let id = host.write(0, &[1; 512]);
    finish_first(&mut host, Err(Errno::ENOSPC));
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
    assert_eq!(host.stored(0)[..512], [0; 512]);
    assert_eq!(host.counter("copy_errors"), 1);
    let id = host.write(0, &[2; 512]);
    assert_eq!(host.run(id), Ok(()), "its range is free again");
}

#[test]
fn an_error_of_the_second_disk_is_ignored_if_so_asked_and_said_once() {
    let mut host = host_that_ignores();
    for _ in 0..2 {
        let id = host.write(0, &[1; 512]);
        finish_first(&mut host, Err(Errno::EIO));
        assert_eq!(host.run(id), Ok(()));
    }
    assert_eq!(host.counter("copy_errors"), 2);
    let warnings = host.log().iter().filter(|(level, _)| *level == Level::Warn).count();
    assert_eq!(warnings, 1);
}

#[test]
fn overlapping_writes_take_turns_until_both_disks_have_them() {
    let mut host = host();
    let first = host.write(0, &[1; 1024]);
    let second = host.write(512, &[2; 1024]);
    assert_eq!(host.issued().len(), 1, "the second waits for the first");
    finish_first(&mut host, Ok(()));
    assert!(host.issued().is_empty(), "it is not on the first disk yet");
    host.complete(first, Ok(()));
    assert_eq!(host.issued().len(), 1);
    assert_eq!(host.run(second), Ok(()));
    assert_eq!(host.stored(0), host.stored(1));
    assert_eq!(host.counter("waited"), 1);
}

#[test]
fn a_failed_write_lets_the_next_one_go() {
    let mut host = host();
    let first = host.write(0, &[1; 512]);
    let second = host.write(0, &[2; 512]);
    finish_first(&mut host, Ok(()));
    host.complete(first, Err(Errno::EIO));
    assert_eq!(host.state(first), State::Ended(Err(Errno::EIO)));
    assert_eq!(host.run(second), Ok(()));
    assert_eq!(host.stored(0)[..512], host.stored(1)[..512]);
}

#[test]
fn writes_beside_each_other_do_not_wait() {
    let mut host = host();
    let ids: Vec<_> = (0..4).map(|at| host.write(at * 512, &[1; 512])).collect();
    assert_eq!(host.issued().len(), 4);
    ids.into_iter().for_each(|id| assert_eq!(host.run(id), Ok(())));
}

/// Many overlapping changes, their steps in random order: the disks end up the same.
#[test]
fn the_disks_are_equal_whatever_the_order() {
    for seed in 1..=100_u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % below as u64) as usize
        };
        let mut host = host();
        host.limit_memory(4096);
        host.limit_issued(3);
        let mut open: Vec<RequestId> = Vec::new();
        for step in 0..150 {
            let (offset, length) = (next(8) as u64 * 512, 512 * (1 + next(4)));
            open.push(match next(8) {
                0 => host.request(Op::WriteZeroes, offset, length as u32),
                1 => host.request(Op::Discard, offset, length as u32),
                2 => host.request(Op::Flush, 0, 0),
                _ => host.write(offset, &vec![1 + step as u8; length]),
            });
            for _ in 0..next(5) {
                step_one(&mut host, &mut open, &mut next);
            }
        }
        while !open.is_empty() {
            step_one(&mut host, &mut open, &mut next);
        }
        assert_eq!(host.stored(0), host.stored(1), "seed {seed}");
        host.advance_to_next(); // the last starved one's timer
        assert_eq!((host.buffers(), host.timers()), (0, 0), "seed {seed}");
    }
}

/// One thing happens: a copy ends, a request below ends, one is cancelled, or time passes.
fn step_one(
    host: &mut Host<Split>,
    open: &mut Vec<RequestId>,
    next: &mut impl FnMut(usize) -> usize,
) {
    let issued = host.issued();
    let below: Vec<_> =
        open.iter().copied().filter(|id| matches!(host.state(*id), State::Below { .. })).collect();
    match next(4) {
        0 if !issued.is_empty() => host.finish(issued[next(issued.len())].id, Ok(())),
        1 if !below.is_empty() => host.complete(below[next(below.len())], Ok(())),
        2 if issued.is_empty() && below.is_empty() => drop(host.advance_to_next()),
        _ => {}
    }
    open.retain(|id| !matches!(host.state(*id), State::Ended(_)));
}

#[test]
fn without_memory_a_write_waits_for_some() {
    let mut host = host();
    host.limit_memory(512);
    let first = host.write(0, &[1; 512]);
    let second = host.write(512, &[2; 512]);
    let flush = host.request(Op::Flush, 0, 0);
    assert_eq!(host.issued().len(), 1);
    assert_eq!(host.run(first), Ok(()));
    assert_eq!(host.run(second), Ok(()));
    assert_eq!(host.run(flush), Ok(()));
    host.advance_to_next();
    assert_eq!(host.timers(), 0);
}

#[test]
fn memory_that_others_gave_back_is_found_by_the_timer() {
    let mut host = host();
    host.limit_memory(0);
    let id = host.write(0, &[1; 512]);
    host.advance_to_next();
    assert_eq!(host.state(id), State::Held);
    host.limit_memory(4096);
    host.advance_to_next();
    assert_eq!(host.run(id), Ok(()));
}

#[test]
fn too_many_copies_wait_for_one_to_end() {
    let mut host = host();
    host.limit_issued(1);
    let ids: Vec<_> = (0..5).map(|at| host.write(at * 512, &[1; 512])).collect();
    assert_eq!(host.issued().len(), 1);
    ids.into_iter().for_each(|id| assert_eq!(host.run(id), Ok(())));
    assert_eq!(host.counter("copied"), 5);
    assert!(host.now().is_zero(), "each began when another ended, not by the timer");
    host.advance_to_next();
}

#[test]
fn a_second_disk_that_cannot_discard_is_zeroed() {
    let mut host = host();
    host.store(1, 0, &[9; 512]);
    let id = host.request_fua(Op::Discard, 0, 512);
    assert!(finish_first(&mut host, Err(Errno::EOPNOTSUPP)).fua);
    let io = finish_first(&mut host, Ok(()));
    assert_eq!((io.op, io.disk, io.fua), (Op::WriteZeroes, 1, true));
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(1)[..512], [0; 512]);
}

#[test]
fn a_cancelled_request_frees_its_place_wherever_it_is() {
    let mut host = host();
    let copying = host.write(0, &[1; 512]);
    let waiting = host.write(0, &[2; 512]);
    let behind = host.write(0, &[3; 512]);
    host.cancel(waiting);
    assert_eq!(host.state(waiting), State::Ended(Err(Errno::ECANCELED)));
    host.cancel(copying);
    assert_eq!(host.state(copying), State::Held, "its copy is in flight");
    assert_eq!(host.run(copying), Err(Errno::ECANCELED));
    assert_eq!(host.run(behind), Ok(()));

    host.limit_memory(0);
    let starved = host.write(0, &[4; 512]);
    let behind = host.write(0, &[5; 512]);
    host.cancel(starved);
    assert_eq!(host.state(starved), State::Ended(Err(Errno::ECANCELED)));
    host.limit_memory(4096);
    assert_eq!(host.run(behind), Ok(()));
    host.advance_to_next();
}

#[test]
fn a_second_disk_that_does_not_fit_is_refused() {
    let refused = |builder: upcall_sdk::testing::Builder<Split>| builder.open().err();
    assert_eq!(refused(Host::builder().disk(SIZE)), Some(Errno::ENODEV));
    assert_eq!(refused(Host::builder().disk(SIZE).granted(SIZE - 512)), Some(Errno::ENOSPC));
    assert_eq!(refused(Host::builder().disk(SIZE).granted(SIZE * 2)), None);
}

#[test]
fn the_manual_page_tells_of_the_parameters() {
    check_manual_page::<Split>(include_str!("../upcall-split.7"));
}
