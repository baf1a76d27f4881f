//! The filter before a disk in memory.

use std::time::Duration;

use upcall_sdk::testing::{Host, State, check_manual_page};
use upcall_sdk::{Errno, Op};

use super::Fault;

fn host(params: &[(&str, &str)]) -> Host<Fault> {
    let builder = Host::<Fault>::builder();
    params.iter().fold(builder, |builder, (name, value)| builder.param(name, value)).open().unwrap()
}

const BELOW: State = State::Below { watched: false };

#[test]
fn an_error_hits_the_chosen_operations_alone() {
    let mut host = host(&[("ops", "write,flush"), ("errno", "ENOSPC")]);
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
    let id = host.request(Op::Flush, 0, 0);
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
    for op in [Op::Read, Op::Discard, Op::WriteZeroes] {
        let id = host.request(op, 0, 512);
        assert_eq!(host.run(id), Ok(()));
    }
    assert_eq!(host.stored(0)[..512], [0; 512]);
    assert_eq!(host.counter("hits"), 2);
}

#[test]
fn an_error_hits_the_chosen_range_alone() {
    let mut host = host(&[("offset", "4K"), ("length", "4K")]);
    let ids = [0, 4096, 8192 - 512, 8192].map(|at| host.request(Op::Read, at, 512));
    let states = ids.map(|id| host.state(id));
    let failed = State::Ended(Err(Errno::EIO));
    assert_eq!(states, [BELOW, failed, failed, BELOW]);
    assert_eq!((host.run(ids[0]), host.run(ids[3])), (Ok(()), Ok(())));
}

#[test]
fn a_run_replays_from_its_seed() {
    let run = |seed: &str| {
        let mut host = host(&[("probability", "0.2"), ("seed", seed)]);
        (0..200)
            .map(|at| {
                let id = host.write(at % 50 * 512, &[1; 512]);
                host.run(id).is_err()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
    assert!((20..60).contains(&run("5").iter().filter(|hit| **hit).count()));
}

#[test]
fn a_delayed_request_goes_on_after_its_time() {
    let mut host = host(&[("effect", "delay"), ("delay", "20ms")]);
    let id = host.write(0, &[1; 512]);
    host.advance(Duration::from_millis(19));
    assert_eq!(host.state(id), State::Held);
    host.advance(Duration::from_millis(1));
    assert_eq!(host.state(id), BELOW);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0)[..512], [1; 512]);
    assert_eq!(host.timers(), 0);
}

#[test]
fn a_delayed_request_may_be_cancelled() {
    let mut host = host(&[("effect", "delay")]);
    let first = host.write(0, &[1; 512]);
    let second = host.write(0, &[2; 512]);
    host.cancel(first);
    assert_eq!(host.state(first), State::Ended(Err(Errno::ECANCELED)));
    assert_eq!(host.timers(), 1, "its timer is stopped");
    assert_eq!(host.run(second), Ok(()));
}

#[test]
fn a_lost_write_says_done_and_changes_nothing() {
    let mut host = host(&[("effect", "lose")]);
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.state(id), State::Ended(Ok(())));
    for (op, length) in [(Op::Flush, 0), (Op::Discard, 512), (Op::WriteZeroes, 512)] {
        let id = host.request(op, 0, length);
        assert_eq!(host.state(id), State::Ended(Ok(())));
    }
    assert_eq!(host.stored(0)[..512], [0; 512]);
    let id = host.request(Op::Read, 0, 512);
    assert_eq!(host.run(id), Ok(()), "a read cannot be lost");
    assert_eq!((host.counter("hits"), host.counter("spared")), (4, 1));
}

#[test]
fn a_torn_write_says_done_and_has_arrived_in_part() {
    let mut host = host(&[("effect", "tear")]);
    let id = host.write_fua(4096, &[1; 8 * 512]);
    assert_eq!(host.state(id), State::Held, "its part is being written");
    let io = host.issued().remove(0);
    assert!((io.op, io.offset, io.disk, io.fua) == (Op::Write, 4096, 0, true));
    assert!(io.length >= 512 && io.length < 8 * 512 && io.length.is_multiple_of(512));
    host.finish(io.id, Ok(()));
    assert_eq!(host.state(id), State::Ended(Ok(())));
    let (arrived, lost) = (4096 + io.length as usize, 4096 + 8 * 512);
    let stored = host.stored(0);
    assert!(stored[4096..arrived].iter().all(|byte| *byte == 1));
    assert!(stored[arrived..lost].iter().all(|byte| *byte == 0));
}

#[test]
fn a_torn_write_whose_part_fails_fails() {
    let mut host = host(&[("effect", "tear")]);
    let id = host.write(0, &[1; 1024]);
    let io = host.issued().remove(0);
    host.finish(io.id, Err(Errno::ENOSPC));
    assert_eq!(host.state(id), State::Ended(Err(Errno::ENOSPC)));
}

#[test]
fn what_cannot_be_torn_is_spared_whole() {
    let mut host = host(&[("effect", "tear")]);
    let id = host.write(0, &[1; 512]);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0)[..512], [1; 512]);
    host.limit_issued(0);
    let id = host.write(512, &[1; 1024]);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!(host.stored(0)[512..1536], [1; 1024]);
    host.limit_memory(0);
    let id = host.write(2048, &[1; 1024]);
    assert_eq!(host.run(id), Ok(()));
    assert_eq!((host.counter("hits"), host.counter("spared")), (0, 3));
}

#[test]
fn an_unknown_operation_is_refused_by_name() {
    let host = Host::<Fault>::builder().param("ops", "read,trim").open();
    assert_eq!(host.err(), Some(Errno::EINVAL));
}

#[test]
fn the_manual_page_tells_of_the_parameters() {
    check_manual_page::<Fault>(include_str!("../upcall-fault.7"));
}
