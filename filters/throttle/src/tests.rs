//! The filter in virtual time.

use std::time::Duration;

use upcall_sdk::testing::{Host, RequestId, State, check_manual_page};
use upcall_sdk::{Errno, Op};

use super::Throttle;

const MS: fn(u64) -> Duration = Duration::from_millis;

fn host(params: &[(&str, &str)]) -> Host<Throttle> {
    let builder = Host::<Throttle>::builder();
    params.iter().fold(builder, |builder, (name, value)| builder.param(name, value)).open().unwrap()
}

/// Keeps `depth` reads of `length` bytes waiting for `seconds`; how many went through in the
/// last `seconds - 1` of them.
fn steady_reads(host: &mut Host<Throttle>, depth: usize, length: u32, seconds: u64) -> u64 {
    let mut waiting: Vec<RequestId> = Vec::new();
    let mut done = 0;
    for step in 0..seconds * 1000 {
        loop {
            let mut is_any = false;
            waiting.retain(|id| {
                let passes = host.state(*id) != State::Held;
                if passes {
                    assert_eq!(host.run(*id), Ok(()));
                    done += u64::from(step >= 1000);
                    is_any = true;
                }
                !passes
            });
            while waiting.len() < depth {
                waiting.push(host.request(Op::Read, 0, length));
            }
            if !is_any && waiting.iter().all(|id| host.state(*id) == State::Held) {
                break;
            }
        }
        host.advance(MS(1));
    }
    waiting.iter().for_each(|id| assert_eq!(host.run(*id), Ok(())));
    done
}

#[test]
fn without_limits_nothing_is_held() {
    let mut host = host(&[]);
    for _ in 0..1000 {
        let id = host.request(Op::Read, 0, 512);
        assert_eq!(host.state(id), State::Below { watched: false });
    }
    assert_eq!((host.counter("held"), host.timers()), (0, 0));
}

#[test]
fn the_rate_of_operations_is_kept() {
    for (iops, expected) in [("50", 150), ("1000", 3000), ("7000", 21_000)] {
        let mut host = host(&[("iops", iops), ("iops_burst", "1")]);
        let done = steady_reads(&mut host, 8, 512, 4);
        // 8 in flight and a timer of a millisecond let no more than 8000 a second through.
        assert!(done.abs_diff(expected) <= expected / 50, "{done} instead of {expected}");
        assert_eq!(host.counter("held"), host.counter("released"));
    }
}

#[test]
fn the_rate_of_bytes_is_kept() {
    let mut host = host(&[("bytes_per_second", "10M"), ("bytes_burst", "64K")]);
    let done = steady_reads(&mut host, 8, 65536, 4) * 65536;
    let expected = 3 * (10 << 20);
    assert!(done.abs_diff(expected) <= expected / 50, "{done} bytes instead of {expected}");
}

#[test]
fn a_burst_goes_at_once() {
    let mut host = host(&[("iops", "100"), ("iops_burst", "20")]);
    let ids: Vec<_> = (0..30).map(|_| host.request(Op::Read, 0, 512)).collect();
    let passed = ids.iter().filter(|id| host.state(**id) != State::Held).count();
    assert_eq!(passed, 20);
    ids.into_iter().for_each(|id| assert_eq!(host.run(id), Ok(())));
    assert_eq!(host.now(), MS(100), "the other ten at 100 a second");
}

#[test]
fn what_is_held_leaves_in_order() {
    let mut host = host(&[("iops", "100"), ("iops_burst", "1")]);
    let ids: Vec<_> = (0..5).map(|_| host.request(Op::Read, 0, 512)).collect();
    for (index, id) in ids.iter().enumerate().skip(1) {
        assert_eq!(host.state(*id), State::Held);
        host.advance(MS(10));
        assert_eq!(host.state(*id), State::Below { watched: false }, "request {index}");
        assert!(ids[index + 1..].iter().all(|id| host.state(*id) == State::Held));
    }
    ids.into_iter().for_each(|id| assert_eq!(host.run(id), Ok(())));
}

#[test]
fn a_flush_passes_while_others_wait() {
    let mut host = host(&[("iops", "1")]);
    let first = host.request(Op::Read, 0, 512);
    let second = host.request(Op::Read, 0, 512);
    let flush = host.request(Op::Flush, 0, 0);
    assert_eq!(host.state(second), State::Held);
    assert_eq!(host.state(flush), State::Below { watched: false });
    for id in [flush, first, second] {
        assert_eq!(host.run(id), Ok(()));
    }
}

#[test]
fn a_discard_costs_an_operation_and_no_bytes() {
    let mut host = host(&[("bytes_per_second", "512"), ("bytes_burst", "512")]);
    for _ in 0..100 {
        let id = host.request(Op::Discard, 0, 1 << 20);
        assert_eq!(host.run(id), Ok(()));
    }
    assert_eq!(host.counter("held"), 0);
}

#[test]
fn a_request_larger_than_the_burst_is_not_held_for_ever() {
    let mut host = host(&[("bytes_per_second", "64K"), ("bytes_burst", "4K")]);
    let first = host.request(Op::Read, 0, 512 << 10);
    let second = host.request(Op::Read, 0, 4096);
    assert_eq!(host.run(first), Ok(()));
    assert_eq!(host.run(second), Ok(()));
    assert_eq!(host.now(), MS(8000), "512 KiB were to be paid for");
}

#[test]
fn what_is_cancelled_leaves_the_queue() {
    let mut host = host(&[("iops", "10"), ("iops_burst", "1")]);
    let ids: Vec<_> = (0..4).map(|_| host.request(Op::Read, 0, 512)).collect();
    host.cancel(ids[2]);
    assert_eq!(host.state(ids[2]), State::Ended(Err(Errno::ECANCELED)));
    assert_eq!(host.counter("cancelled"), 1);
    host.advance(MS(200));
    for id in [ids[0], ids[1], ids[3]] {
        assert_eq!(host.run(id), Ok(()));
    }
    assert_eq!(host.now(), MS(200), "the cancelled one cost nothing");
}

#[test]
fn an_idle_disk_has_no_timer() {
    let mut host = host(&[("iops", "10"), ("iops_burst", "1")]);
    let first = host.request(Op::Read, 0, 512);
    let second = host.request(Op::Read, 0, 512);
    assert_eq!(host.timers(), 1);
    assert_eq!(host.run(first), Ok(()));
    assert_eq!(host.run(second), Ok(()));
    assert_eq!(host.timers(), 0);
}

#[test]
fn the_manual_page_tells_of_the_parameters() {
    check_manual_page::<Throttle>(include_str!("../upcall-throttle.7"));
}
