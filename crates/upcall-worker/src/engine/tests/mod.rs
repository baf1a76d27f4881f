//! The engine with filter hosts, a store and a guest that the test plays.

mod data;
mod ending;
mod lives;
mod model;
#[cfg(feature = "plant")]
mod plants;

use std::time::{Duration, Instant};

use super::sim::*;
use upcall_abi::filter::verdict;
use upcall_abi::ring::{Completion, SUBMISSION_HEAD_OFFSET, completion_kind, submission_kind};
use upcall_block::*;

use super::Command;

const PAGE: u32 = 4096;

#[test]
fn entries_that_found_a_full_ring_arrive_although_nobody_rings_for_the_room() {
    let (mut making, keeper) = Making::new(vec![observer()]);
    making.issues = vec![true];
    making.entries = 4;
    let mut world = World::new(making);
    for id in 0..12 {
        world.hosts[0].issue(id, 0, 0, PAGE, 0);
        world.settle();
    }
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.engine.flights.len(), 0);
    // What comes later does not overtake them when there is room.
    assert_eq!(world.hosts[0].take().map(|entry| entry.token), Some(0));
    world.hosts[0].issue(12, 7, 0, PAGE, 0);
    world.settle();
    let World { engine, mut hosts, commands, wake, .. } = world;
    let thread = std::thread::spawn(|| engine.run());
    // A filter that has nothing to say to the end of a request takes them one by one.
    let mut ended = Vec::new();
    let end = Instant::now() + Duration::from_secs(10);
    while ended.len() < 12 {
        std::thread::sleep(Duration::from_millis(2));
        ended.extend(hosts[0].take().map(|entry| entry.token));
        assert!(Instant::now() < end, "only {ended:?} arrived");
    }
    assert_eq!(ended, (1..=12).collect::<Vec<_>>());
    commands.send(Command::Quit).unwrap();
    wake.ring();
    thread.join().unwrap();
}

#[test]
fn what_the_loss_of_a_host_leads_to_is_shown_before_the_thread_sleeps() {
    let (mut making, _keeper) = Making::new(vec![blind(), observer()]);
    making.entries = 1;
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::WATCH);
    world.settle();
    world.submit(Op::Write, PAGE.into(), PAGE);
    let start = world.sent(0);
    // The second one finds the ring of the host below full. Later, and with nothing else to
    // do, its head is found to make no sense.
    world.hosts[0].answer(&start, verdict::WATCH);
    world.settle();
    world.hosts[1].memory.write(SUBMISSION_HEAD_OFFSET, &77u32.to_ne_bytes()).unwrap();
    assert!(world.hosts[0].channel.submissions.before_sleep());
    world.settle();
    assert!(world.gave_up(1));
    assert!(world.hosts[0].doorbell.clear(), "the sleeper is woken for what fails");
    for _ in 0..2 {
        let done = world.sent(0);
        assert_eq!((done.kind, done.status), (submission_kind::DONE, -5));
        world.hosts[0].answer_with(&done, verdict::PASS, -5, 0);
    }
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EIO); 2]);
    world.assert_empty();
}

#[test]
fn a_host_that_answers_and_never_takes_what_it_is_sent_is_given_up() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.entries = 1;
    let mut world = World::new(making);
    world.submit(Op::Flush, 0, 0);
    let first = world.sent(0);
    world.hosts[0].answer(&first, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    let mut token = first.token;
    for _ in 0..10_000 {
        world.submit(Op::Flush, 0, 0);
        world.settle();
        // It guesses the name of what it has not taken.
        token += 1 << 32;
        let mut guess = first;
        guess.token = token;
        if world.gave_up(0) {
            break;
        }
        world.hosts[0].answer_with(&guess, verdict::FAIL, -5, 0);
        world.settle();
    }
    assert!(world.gave_up(0), "its entries would fill our memory");
    world.settle();
    world.assert_empty();
}

/// A queue whose other side broke the protocol.
struct Broken;

impl RequestQueue for Broken {
    fn take(&mut self, _: usize, _: &mut Vec<Request>) -> Result<(), QueueError> {
        Err(QueueError { reason: "it is broken".into() })
    }

    fn complete(&mut self, _: Tag, _: Status) {}

    fn publish(&mut self) {}

    fn doorbell(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn before_sleep(&mut self) -> bool {
        true
    }

    fn after_sleep(&mut self) {}
}

#[test]
fn a_broken_queue_is_reported_once_and_again_when_another_one_breaks() {
    let mut world = World::new(Making::new(vec![]).0);
    world.settle();
    for round in 1..3 {
        world.engine.frontend = None;
        world.commands.send(Command::Start(Box::new(Broken))).unwrap();
        for _ in 0..20 {
            world.engine.turn();
        }
        assert_eq!(world.log.lock().unwrap().len(), round);
    }
}

struct SlotSpecs;

impl SlotSpecs {
    /// An observer below all others.
    fn last() -> upcall_chain::SlotSpec {
        upcall_chain::SlotSpec { class: upcall_chain::Class::Capture, ..observer() }
    }
}

#[test]
fn any_number_of_requests_that_wait_for_room_end_in_little_stack_when_their_filter_is_lost() {
    let small = std::thread::Builder::new().stack_size(128 << 10);
    let test = small.spawn(|| {
        let (mut making, _keeper) = Making::new(vec![blind(), SlotSpecs::last()]);
        making.issues = vec![true, false];
        making.entries = 512;
        making.pages = 1;
        let mut world = World::new(making);
        for id in 0..256 {
            world.hosts[0].issue(id, 0, 0, PAGE, 0);
        }
        world.settle();
        assert_eq!(world.engine.flights.len(), 256);
        world.lose_host(1);
        world.settle();
        let reports = std::iter::from_fn(|| world.hosts[0].take());
        assert_eq!(reports.filter(|entry| entry.status == -5).count(), 256);
        world.assert_empty();
    });
    test.unwrap().join().unwrap();
}

#[test]
fn the_statistics_are_empty_again_however_a_visit_ends() {
    let held_twice = |world: &mut World, start: &upcall_abi::ring::Submission| {
        world.hosts[0].hold(start);
        world.hosts[0].hold(start);
    };
    let hold_as_verdict = |world: &mut World, start: &upcall_abi::ring::Submission| {
        world.hosts[0].answer(start, verdict::HOLD);
    };
    let nonsense = |world: &mut World, start: &upcall_abi::ring::Submission| {
        world.hosts[0].answer(start, 99);
    };
    let lost = |world: &mut World, _: &upcall_abi::ring::Submission| {
        world.lose_host(0);
    };
    type End = dyn Fn(&mut World, &upcall_abi::ring::Submission);
    let ends: [(&End, u64); 4] =
        [(&held_twice, 1), (&hold_as_verdict, 1), (&nonsense, 1), (&lost, 0)];
    for (end, violations) in ends {
        let mut world = World::new(Making::new(vec![changer()]).0);
        world.submit(Op::Write, 0, PAGE);
        let start = world.sent(0);
        assert_eq!(world.hops()[1].block.now, 1);
        end(&mut world, &start);
        world.settle();
        assert_eq!(world.ended(), [Err(Errno::EIO)]);
        let hops = world.hops();
        assert_eq!((hops[0].block.total().errors, hops[0].block.total().requests), (1, 1));
        assert_eq!((hops[1].block.total().errors, hops[1].block.violations), (1, violations));
        // It was in the filter once, and not in the store.
        assert_eq!((hops[1].block.latency.total(), hops[2].block.latency.total()), (1, 0));
        world.assert_empty();
    }
    // Withheld, and refused for a read-only disk: they end before they begin.
    let (mut making, _) = Making::new(vec![changer()]);
    making.lanes[0].1.read_only = true;
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    world.submit(Op::Discard, 0, PAGE);
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EROFS); 2]);
    world.assert_empty();
    let mut world = World::new(Making::new(vec![changer()]).0);
    world.submit(Op::Discard, 0, PAGE);
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EOPNOTSUPP)]);
    world.assert_empty();
}

#[test]
fn an_answer_counts_only_from_the_link_and_instance_that_was_asked() {
    let (making, keeper) = Making::new(vec![blind(), observer()]);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[1].answer(&start, verdict::FAIL);
    world.hosts[1].hold(&start);
    let entry = Completion {
        kind: completion_kind::VERDICT,
        code: verdict::PASS,
        token: start.token,
        instance: 1,
        ..Completion::default()
    };
    world.hosts[0].channel.completions.push(&entry).unwrap();
    world.settle();
    assert_eq!(world.hops()[1].block.violations, 1);
    assert_eq!(world.hops()[2].block.violations, 2);
    assert!(world.ended().is_empty() && keeper.0.lock().unwrap().ios.is_empty());
    // The same answer twice is one too many.
    world.hosts[0].answer(&start, verdict::PASS);
    world.hosts[0].answer(&start, verdict::PASS);
    let below = world.sent(1);
    assert_eq!(world.hops()[1].block.violations, 2);
    world.hosts[1].answer(&below, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn sixteen_broken_rules_end_a_host_and_fifteen_do_not() {
    let mut world = World::new(Making::new(vec![blind()]).0);
    for count in 1..=16 {
        assert!(!world.gave_up(0), "after {count}");
        world.hosts[0].say(Completion { kind: 77, ..Completion::default() });
        world.settle();
    }
    assert!(world.gave_up(0));
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EIO)], "never slipped past it");
    world.assert_empty();
}

#[test]
fn a_watcher_gets_its_own_cookie_back_and_the_status_from_below() {
    let (making, keeper) = Making::new(vec![blind(), observer()]);
    let mut world = World::new(making);
    world.submit(Op::Read, 0, PAGE);
    let first = world.sent(0);
    world.hosts[0].answer_with(&first, verdict::WATCH, 0, 111);
    let second = world.sent(1);
    world.hosts[1].answer_with(&second, verdict::WATCH, 0, 222);
    world.settle();
    keeper.complete(Err(Errno::ENOSPC));
    let up = world.sent(1);
    assert_eq!((up.kind, up.cookie, up.status), (submission_kind::DONE, 222, -28));
    world.hosts[1].answer_with(&up, verdict::PASS, -12, 0);
    let up = world.sent(0);
    assert_eq!((up.kind, up.cookie, up.status), (submission_kind::DONE, 111, -12));
    world.hosts[0].answer_with(&up, verdict::PASS, 0, 0);
    world.settle();
    assert_eq!(world.ended(), [Ok(())], "what a filter changes on the way up, those above see");
    world.assert_empty();
}

#[test]
fn a_filter_issues_only_what_it_may_and_only_so_much() {
    let (mut making, keeper) = Making::new(vec![blind(), observer()]);
    making.issues = vec![true, false];
    making.entries = 512;
    let mut world = World::new(making);
    let report = |world: &mut World| {
        let entry = world.sent(0);
        assert_eq!(entry.kind, submission_kind::ISSUED);
        (entry.token, entry.status)
    };
    world.hosts[0].issue(1, 1, 0, PAGE, 0);
    assert_eq!(report(&mut world), (1, -19), "no such disk");
    world.hosts[0].issue(2, 0, CAPACITY, PAGE, 0);
    assert_eq!(report(&mut world), (2, -22), "past the end");
    world.hosts[0].issue(3, 0, 0, PAGE, (16 << 20) - 4095);
    assert_eq!(report(&mut world), (3, -22), "data past the end of its arena");
    assert_eq!(world.hops()[1].block.violations, 0);
    world.hosts[1].issue(4, 0, 0, PAGE, 0);
    world.settle();
    assert_eq!(world.hops()[2].block.violations, 1, "it never said that it would");
    for id in 0..257 {
        world.hosts[0].issue(id, 0, 0, PAGE, 0);
    }
    assert_eq!(report(&mut world), (256, -11));
    assert_eq!(world.hops()[1].block.violations, 1);
    assert_eq!(world.engine.flights.len(), 256);
    // Its own requests enter below it. When it is lost, they finish, and nobody is told.
    world.lose_host(0);
    for _ in 0..10 {
        world.settle();
        while let Some(start) = world.hosts[1].take() {
            assert_eq!(start.kind, submission_kind::START);
            world.hosts[1].answer(&start, verdict::PASS);
        }
        world.settle();
        keeper.complete(Ok(()));
    }
    assert!(world.hosts[0].take().is_none());
    assert_eq!(world.hops()[3].block.total().requests, 256);
    world.assert_empty();
}
