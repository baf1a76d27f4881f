//! Stops, cancels, and the end of the thread.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use upcall_abi::filter::verdict;
use upcall_abi::ring::submission_kind;
use upcall_block::*;

use super::{Command, PAGE};
use crate::engine::sim::*;

type Stopped = Receiver<Option<Box<dyn RequestQueue>>>;

fn stop(world: &mut World, drain_ms: u64) -> Stopped {
    let (reply, stopped) = sync_channel(1);
    world.commands.send(Command::Stop { drain_ms, reply }).unwrap();
    world.settle();
    stopped
}

/// Turns until the queue is back; how long that took.
fn wait(world: &mut World, stopped: &Stopped) -> Duration {
    let begun = Instant::now();
    loop {
        world.settle();
        if let Ok(queue) = stopped.try_recv() {
            assert!(queue.is_some());
            return begun.elapsed();
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "it never stops");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_queue_stops_when_what_it_took_has_ended_and_takes_nothing_more() {
    let (making, keeper) = Making::new(vec![]);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    let stopped = stop(&mut world, 0);
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    assert!(stopped.try_recv().is_err(), "the store still has the guest's memory");
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 1);
    keeper.complete(Ok(()));
    wait(&mut world, &stopped);
    // It is with the store: a cancel that comes too late takes nothing back, but says so.
    assert_eq!(world.ended().len(), 1);
    world.assert_empty();
}

#[test]
fn patience_lasts_as_long_as_was_said_before_a_cancel() {
    let (making, keeper) = Making::new(vec![blind()]);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].hold(&start);
    let stopped = stop(&mut world, 60_000);
    sleep(Duration::from_millis(50));
    world.settle();
    assert!(world.hosts[0].take().is_none(), "no cancel yet");
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    wait(&mut world, &stopped);
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn a_cancel_carries_the_context_of_the_hold_and_is_answered_once() {
    let mut world = World::new(Making::new(vec![blind()]).0);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].hold(&start);
    world.settle();
    let stopped = stop(&mut world, 0);
    let cancel = world.sent(0);
    assert_eq!(
        (cancel.kind, cancel.token, cancel.cookie),
        (submission_kind::CANCEL, start.token, 9)
    );
    world.hosts[0].answer(&start, verdict::PASS);
    wait(&mut world, &stopped);
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)]);
    assert_eq!(world.hops()[1].block.violations, 0);
    world.assert_empty();
}

#[test]
fn requests_and_parts_that_wait_for_room_are_cancelled_at_once() {
    let (mut making, _keeper) = Making::new(vec![changer()]);
    making.pages = 64;
    let mut world = World::new(making);
    world.submit(Op::WriteZeroes, 0, 1 << 20);
    world.submit(Op::Write, 0, 2 * PAGE);
    let start = world.sent(0);
    assert_eq!(world.engine.flights.len(), 5, "one part, three that wait, and a write that does");
    let stopped = stop(&mut world, 0);
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)], "the write");
    world.hosts[0].answer(&start, verdict::PASS);
    wait(&mut world, &stopped);
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)], "the zeroes");
    world.assert_empty();
}

#[test]
fn a_filter_that_owes_an_answer_is_told_that_nobody_waits_when_it_holds_late() {
    let mut world = World::new(Making::new(vec![blind()]).0);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    let stopped = stop(&mut world, 0);
    let took = wait(&mut world, &stopped);
    assert!((1..5).contains(&took.as_secs()), "after its grace: {took:?}");
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)]);
    assert!(!world.gave_up(0), "it cannot harm anybody");
    world.assert_empty();
    world.hosts[0].hold(&start);
    let cancel = world.sent(0);
    assert_eq!((cancel.kind, cancel.token), (submission_kind::CANCEL, start.token));
    assert_eq!(world.hops()[1].block.violations, 0, "late is no violation");
    world.hosts[0].hold(&start);
    world.settle();
    assert_eq!(world.hops()[1].block.violations, 1, "twice is");
    assert!(world.hosts[0].take().is_none());
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    assert_eq!(world.hops()[1].block.violations, 1);
    assert!(world.engine.abandoned.is_empty());
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    assert_eq!(world.hops()[1].block.violations, 2);
}

#[test]
fn a_host_that_is_lost_owes_nothing_any_more() {
    let mut world = World::new(Making::new(vec![blind(), observer()]).0);
    world.submit(Op::Flush, 0, 0);
    let _start = world.sent(0);
    let stopped = stop(&mut world, 0);
    wait(&mut world, &stopped);
    world.lose_host(1);
    world.settle();
    assert_eq!(world.engine.abandoned.len(), 1);
    world.lose_host(0);
    world.settle();
    assert!(world.engine.abandoned.is_empty());
    world.assert_empty();
}

#[test]
fn memory_that_a_silent_filter_may_still_write_to_is_not_used_again_while_it_lives() {
    let mut world = World::new(Making::new(vec![changer()]).0);
    world.submit(Op::Write, 0, PAGE);
    let _start = world.sent(0);
    let stopped = stop(&mut world, 0);
    wait(&mut world, &stopped);
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)]);
    assert!(world.gave_up(0));
    world.assert_empty();
}

#[test]
fn a_filter_that_was_asked_after_the_cancel_has_its_own_time_to_answer() {
    let mut world = World::new(Making::new(vec![blind(), observer()]).0);
    world.submit(Op::Write, 0, PAGE);
    let first = world.sent(0);
    world.hosts[0].answer_with(&first, verdict::WATCH, 0, 1);
    let second = world.sent(1);
    let stopped = stop(&mut world, 0);
    sleep(Duration::from_millis(1900));
    world.settle();
    // Just in time: now the first is told, and it too may take a moment.
    world.hosts[1].answer(&second, verdict::PASS);
    let up = world.sent(0);
    assert_eq!(up.kind, submission_kind::DONE);
    sleep(Duration::from_millis(300));
    world.settle();
    assert!(stopped.try_recv().is_err(), "it is not given up after 0.3 s");
    world.hosts[0].answer_with(&up, verdict::PASS, -125, 0);
    wait(&mut world, &stopped);
    assert!(world.engine.abandoned.is_empty());
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)]);
    world.assert_empty();
}

#[test]
fn the_thread_ends_although_a_filter_never_gives_an_issued_request_back() {
    let (mut making, _keeper) = Making::new(vec![blind(), observer()]);
    making.issues = vec![true, false];
    let mut world = World::new(making);
    world.hosts[0].issue(1, 0, 0, PAGE, 0);
    let start = world.sent(1);
    world.hosts[1].hold(&start);
    world.settle();
    world.commands.send(Command::Quit).unwrap();
    world.settle();
    assert_eq!(world.sent(1).kind, submission_kind::CANCEL);
    world.hosts[0].issue(2, 0, 0, PAGE, 0);
    let refused = world.sent(0);
    assert_eq!((refused.token, refused.status), (2, -108), "nothing new begins");
    let World { engine, wake: _wake, .. } = world;
    let begun = Instant::now();
    engine.run();
    assert!(begun.elapsed() < Duration::from_secs(6));
}
