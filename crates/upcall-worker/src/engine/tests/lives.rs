//! Filter hosts die, hang and come back: rule 6, and what policies make of it.

use upcall_abi::filter::{request_flag::RETRY, verdict};
use upcall_abi::ring::{Submission, submission_kind};
use upcall_block::*;
use upcall_chain::{OnFailure, SlotSpec};

use super::PAGE;
use crate::engine::sim::*;

const MS: u64 = 1_000_000;

/// A world whose filters all have this policy.
fn world(specs: Vec<SlotSpec>, policy: OnFailure) -> (World, Keeper) {
    let (mut making, keeper) = Making::new(specs);
    making.on_failure.iter_mut().for_each(|of| *of = policy);
    making.issues.iter_mut().for_each(|issues| *issues = true);
    making.plays_clock = true;
    (World::new(making), keeper)
}

/// Another host takes a lost one's place.
fn come_back(world: &mut World, host: usize) {
    world.settle();
    assert!(world.is_quiet(host), "nothing that the last one issued is under way");
    world.return_host(host);
    world.settle();
}

fn all_sent(world: &mut World, host: usize) -> Vec<Submission> {
    world.settle();
    std::iter::from_fn(|| world.hosts[host].take()).collect()
}

fn page_of(world: &World, entry: &Submission) -> [u8; PAGE as usize] {
    world.arena.read_array(entry.data as usize).unwrap()
}

fn scribble(world: &World, entry: &Submission, byte: u8, length: usize) {
    world.arena.write(entry.data as usize, &vec![byte; length]).unwrap();
}

#[test]
fn what_had_no_verdict_is_delivered_again_marked_and_in_the_order_of_its_submission() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    for number in 0..6 {
        world.submit(Op::Write, number * 4096, PAGE);
    }
    let first = all_sent(&mut world, 0);
    assert!(first.iter().all(|entry| entry.flags & RETRY == 0));
    world.hosts[0].hold(&first[4]);
    world.hosts[0].answer(&first[1], verdict::PASS);
    world.settle();
    // This one is in the ring when its host dies: said is said.
    world.hosts[0].answer(&first[3], verdict::PASS);
    world.lose_host(0);
    world.settle();
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 2);
    assert!(world.ended().is_empty(), "the guest sees a pause");
    for _ in 0..2 {
        come_back(&mut world, 0);
        let again = all_sent(&mut world, 0);
        let offsets: Vec<u64> = again.iter().map(|entry| entry.offset / 4096).collect();
        assert_eq!(offsets, [0, 2, 4, 5]);
        assert!(again.iter().all(|entry| entry.flags & RETRY != 0));
        assert!(again.iter().all(|entry| first.iter().all(|old| old.token != entry.token)));
        // Held and half answered, it dies again: the order stays what it was.
        world.hosts[0].hold(&again[0]);
        world.settle();
        world.lose_host(0);
        world.settle();
    }
    come_back(&mut world, 0);
    for entry in all_sent(&mut world, 0) {
        world.hosts[0].answer(&entry, verdict::PASS);
    }
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 6]);
    world.assert_empty();
    assert_eq!(world.hops()[1].block.retries, 12);
}

#[test]
fn a_request_that_came_while_its_filter_was_gone_is_no_retry() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    world.lose_host(0);
    world.settle();
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    come_back(&mut world, 0);
    let start = world.sent(0);
    assert_eq!((start.kind, start.flags), (submission_kind::START, 0));
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn a_new_instance_sees_completions_marked_and_without_the_context_of_the_old_one() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    // One is in the store when the host dies, one has been delivered as done.
    for number in 0..2 {
        world.submit(Op::Write, number * 4096, PAGE);
        let start = world.sent(0);
        world.hosts[0].answer_with(&start, verdict::WATCH, 0, 77);
        world.settle();
    }
    let token = keeper.0.lock().unwrap().ios.remove(0).token;
    keeper.0.lock().unwrap().done.push(StoreDone { token, status: Ok(()) });
    let done = world.sent(0);
    assert_eq!((done.kind, done.cookie, done.flags), (submission_kind::DONE, 77, 0));
    world.lose_host(0);
    world.settle();
    keeper.complete(Err(Errno::ENOSPC));
    world.settle();
    assert!(world.ended().is_empty());
    come_back(&mut world, 0);
    let again = all_sent(&mut world, 0);
    let said: Vec<_> =
        again.iter().map(|entry| (entry.kind, entry.flags, entry.cookie, entry.status)).collect();
    let done = submission_kind::DONE;
    assert_eq!(said, [(done, RETRY, 0, 0), (done, RETRY, 0, -28)]);
    for entry in &again {
        world.hosts[0].answer_with(entry, verdict::PASS, entry.status, 0);
    }
    world.settle();
    assert_eq!(world.ended(), [Ok(()), Err(Errno::ENOSPC)]);
    // What the new instance watches has its own context.
    world.submit(Op::Flush, 0, 0);
    let start = world.sent(0);
    world.hosts[0].answer_with(&start, verdict::WATCH, 0, 78);
    world.settle();
    keeper.complete(Ok(()));
    let done = world.sent(0);
    assert_eq!((done.cookie, done.flags), (78, 0));
    world.hosts[0].answer(&done, verdict::PASS);
    world.settle();
    world.assert_empty();
}

#[test]
fn a_page_that_was_half_changed_is_delivered_again_as_it_was() {
    let (mut world, keeper) = world(vec![changer()], OnFailure::Hold);
    world.guest.write(0, &[7; PAGE as usize]).unwrap();
    world.submit(Op::Write, 0, PAGE);
    for _ in 0..3 {
        let start = world.sent(0);
        assert_eq!(page_of(&world, &start), [7; PAGE as usize]);
        scribble(&world, &start, 9, 1000);
        // The guest may write what it likes to its memory meanwhile.
        world.guest.write(0, &[1; PAGE as usize]).unwrap();
        world.lose_host(0);
        come_back(&mut world, 0);
    }
    let start = world.sent(0);
    scribble(&world, &start, 5, PAGE as usize);
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    let mut stored = [0; PAGE as usize];
    keeper.0.lock().unwrap().ios[0].data.read(0, &mut stored);
    assert_eq!(stored, [5; PAGE as usize]);
    keeper.complete(Ok(()));
    world.settle();
    // And a read on its way up.
    world.submit(Op::Read, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::WATCH);
    world.settle();
    keeper.0.lock().unwrap().ios[0].data.write(0, &[4; PAGE as usize]);
    keeper.complete(Ok(()));
    let done = world.sent(0);
    scribble(&world, &done, 9, 3000);
    world.lose_host(0);
    come_back(&mut world, 0);
    let done = world.sent(0);
    assert_eq!(page_of(&world, &done), [4; PAGE as usize]);
    world.hosts[0].answer(&done, verdict::PASS);
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 2]);
    world.assert_empty();
}

#[test]
fn a_read_that_was_half_answered_is_delivered_again_with_an_empty_page() {
    let mut answers = observer();
    answers.answers = OpSet::NONE.with(Op::Read);
    let (mut world, _keeper) = world(vec![answers], OnFailure::Hold);
    world.submit(Op::Read, 0, PAGE);
    let start = world.sent(0);
    scribble(&world, &start, 9, 100);
    world.lose_host(0);
    come_back(&mut world, 0);
    let start = world.sent(0);
    assert_eq!(page_of(&world, &start), [0; PAGE as usize]);
    world.hosts[0].answer(&start, verdict::DONE);
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    assert_eq!(world.guest.read_array(0), Some([0; PAGE as usize]));
    world.assert_empty();
}

#[test]
fn what_a_dead_host_had_issued_ends_before_the_next_one_comes_and_is_not_reported_to_it() {
    let (mut world, keeper) = world(vec![observer()], OnFailure::Hold);
    world.hosts[0].issue(5, 0, 0, PAGE, 0);
    world.settle();
    // Said before its death, and not heard yet.
    world.hosts[0].issue(6, 0, 4096, PAGE, 0);
    world.lose_host(0);
    world.settle();
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 2);
    assert!(!world.is_quiet(0), "it could come late, over what the next one writes");
    keeper.complete(Ok(()));
    come_back(&mut world, 0);
    world.hosts[0].issue(5, 0, 8192, PAGE, 0);
    world.settle();
    assert!(world.hosts[0].take().is_none(), "the first five is nobody's any more");
    keeper.complete(Ok(()));
    let ended = world.sent(0);
    assert_eq!((ended.kind, ended.token), (submission_kind::ISSUED, 5));
    world.assert_empty();
}

#[test]
fn what_a_dead_host_had_issued_does_not_wait_for_filters_that_are_gone() {
    let (mut world, keeper) = world(vec![observer(), blind()], OnFailure::Hold);
    world.hosts[0].issue(1, 0, 0, PAGE, 0);
    let below = world.sent(1);
    world.hosts[1].hold(&below);
    world.settle();
    world.lose_host(0);
    world.settle();
    assert!(!world.is_quiet(0), "the filter below may still let it go on");
    world.lose_host(1);
    world.settle();
    assert!(world.is_quiet(0) && world.is_quiet(1));
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 0);
    world.return_host(1);
    world.return_host(0);
    assert!(all_sent(&mut world, 0).is_empty() && all_sent(&mut world, 1).is_empty());
    world.assert_empty();
}

#[test]
fn a_request_that_is_cancelled_while_its_filter_is_gone_is_not_asked_again_but_told() {
    let (mut world, keeper) = world(vec![blind(), observer()], OnFailure::Hold);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer_with(&start, verdict::WATCH, 0, 3);
    let start = world.sent(1);
    world.hosts[1].hold(&start);
    world.settle();
    world.lose_host(1);
    world.settle();
    let stopped = world.stop(0);
    world.settle();
    let done = world.sent(0);
    assert_eq!((done.kind, done.status), (submission_kind::DONE, -125));
    world.hosts[0].answer_with(&done, verdict::PASS, -125, 0);
    world.settle();
    assert!(stopped.try_recv().is_ok_and(|queue| queue.is_some()));
    assert_eq!(world.ended(), [Err(Errno::ECANCELED)]);
    come_back(&mut world, 1);
    assert!(world.hosts[1].take().is_none());
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 0);
    world.assert_empty();
}

#[test]
fn a_queue_stops_although_a_filter_that_was_to_see_a_completion_does_not_come_back() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::WATCH);
    world.settle();
    world.lose_host(0);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    let stopped = world.stop(0);
    for _ in 0..10 {
        world.pass(500 * MS);
        world.settle();
    }
    assert!(stopped.try_recv().is_ok_and(|queue| queue.is_some()));
    assert!(world.ended()[0].is_err());
    world.assert_empty();
}

#[test]
fn nothing_is_delivered_again_before_a_host_that_was_given_up_is_dead() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.on_failure = vec![OnFailure::Hold];
    (making.deadline_ms, making.plays_clock, making.kills) = (50, true, false);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    world.submit(Op::Write, 4096, PAGE);
    let [first, second] = all_sent(&mut world, 0)[..] else { panic!("two submissions") };
    world.pass(60 * MS);
    world.settle();
    assert!(world.gave_up(0) && !world.is_quiet(0));
    // It was only slow, and says so before the kill reaches it.
    world.hosts[0].answer(&first, verdict::PASS);
    world.settle();
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 1);
    // What comes now waits.
    world.submit(Op::Write, 8192, PAGE);
    world.settle();
    assert!(world.hosts[0].take().is_none());
    world.lose_host(0);
    come_back(&mut world, 0);
    let again = all_sent(&mut world, 0);
    assert_eq!(again.iter().map(|entry| entry.offset).collect::<Vec<_>>(), [4096, 8192]);
    assert_eq!([again[0].flags, again[1].flags], [RETRY, 0]);
    assert_ne!(again[0].token, second.token);
    again.iter().for_each(|entry| world.hosts[0].answer(entry, verdict::PASS));
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 3]);
    world.assert_empty();
}

#[test]
fn a_filter_that_is_late_is_given_up_whether_it_holds_or_not_and_sleepers_wake_for_it() {
    for (holds, up) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut making, keeper) = Making::new(vec![blind()]);
        (making.deadline_ms, making.plays_clock) = (50, true);
        let mut world = World::new(making);
        assert_eq!(world.wakes_in_ns(), None, "an idle disk costs nothing");
        world.submit(Op::Write, 0, PAGE);
        let mut entry = world.sent(0);
        world.pass(49 * MS);
        if up {
            world.hosts[0].answer(&entry, verdict::WATCH);
            world.settle();
            keeper.complete(Ok(()));
            entry = world.sent(0);
            world.pass(49 * MS);
        }
        if holds {
            world.hosts[0].hold(&entry);
        }
        world.settle();
        assert!(!world.gave_up(0), "holds: {holds}, up: {up}");
        assert!(world.wakes_in_ns().is_some_and(|ns| ns <= MS));
        world.pass(MS);
        world.settle();
        assert!(world.gave_up(0), "holds: {holds}, up: {up}");
        assert_eq!(world.ended(), [Err(Errno::EIO)], "its policy is to fail");
        assert_eq!(world.wakes_in_ns(), None);
        world.assert_empty();
    }
}

#[test]
fn a_filter_that_answers_in_time_is_never_given_up_however_long_it_works() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    (making.deadline_ms, making.plays_clock) = (50, true);
    let mut world = World::new(making);
    for _ in 0..20 {
        world.submit(Op::Flush, 0, 0);
        let start = world.sent(0);
        world.pass(40 * MS);
        world.hosts[0].answer(&start, verdict::PASS);
        world.settle();
        keeper.complete(Ok(()));
        world.settle();
    }
    assert_eq!(world.ended(), [Ok(()); 20]);
    assert!(!world.gave_up(0));
}

#[test]
fn a_bypassed_filter_is_skipped_on_both_ways_and_asked_again_when_it_is_back() {
    for policy in [OnFailure::Bypass, OnFailure::Detach] {
        let (mut world, keeper) = world(vec![blind(), blind()], policy);
        for number in 0..2 {
            world.submit(Op::Write, number * 4096, PAGE);
            let start = world.sent(0);
            world.hosts[0].answer(&start, verdict::PASS);
        }
        let starts = all_sent(&mut world, 1);
        world.hosts[1].answer_with(&starts[0], verdict::WATCH, 0, 9);
        world.settle();
        // The one watches the first and has the second.
        world.lose_host(1);
        world.settle();
        assert_eq!(keeper.0.lock().unwrap().ios.len(), 2, "the second goes on without it");
        keeper.complete(Ok(()));
        world.settle();
        assert_eq!(world.ended(), [Ok(()); 2]);
        world.submit(Op::Write, 0, PAGE);
        let start = world.sent(0);
        world.hosts[0].answer(&start, verdict::PASS);
        world.settle();
        keeper.complete(Ok(()));
        world.settle();
        assert_eq!(world.ended(), [Ok(())]);
        assert_eq!(world.hops()[2].block.skipped, 3);
        come_back(&mut world, 1);
        world.submit(Op::Write, 0, PAGE);
        let start = world.sent(0);
        world.hosts[0].answer(&start, verdict::PASS);
        world.settle();
        let asked = world.hosts[1].take();
        assert_eq!(asked.is_some(), policy == OnFailure::Bypass, "{policy}");
        if let Some(start) = asked {
            world.hosts[1].answer(&start, verdict::PASS);
            world.settle();
        }
        keeper.complete(Ok(()));
        world.settle();
        world.assert_empty();
    }
}

#[test]
fn under_fail_requests_fail_until_the_filter_is_back() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Fail);
    world.submit(Op::Write, 0, PAGE);
    let _ = world.sent(0);
    world.lose_host(0);
    world.settle();
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EIO); 2]);
    come_back(&mut world, 0);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    assert_eq!(start.flags & RETRY, 0);
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn nonsense_in_the_last_words_of_a_host_is_heard_only_so_far() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    for _ in 0..20 {
        let kind = 77;
        world.hosts[0].say(upcall_abi::ring::Completion { kind, ..Default::default() });
    }
    world.hosts[0].answer(&start, verdict::PASS);
    world.lose_host(0);
    world.settle();
    assert_eq!(keeper.0.lock().unwrap().ios.len(), 0, "behind so much nonsense nothing counts");
    come_back(&mut world, 0);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn what_a_bypassed_filter_misses_is_recorded_before_it_goes_on_and_what_it_saw_is_not() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.on_failure = vec![OnFailure::Bypass];
    let gaps = GapKeeper::default();
    making.record_gaps(0, &gaps);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    world.submit(Op::Write, 4096, PAGE);
    let [first, _second] = all_sent(&mut world, 0)[..] else { panic!("two submissions") };
    world.hosts[0].answer(&first, verdict::PASS);
    world.lose_host(0);
    world.settle();
    // A read and a flush change nothing; a discard and zeroes do.
    world.submit(Op::Read, 8192, PAGE);
    world.submit(Op::Flush, 0, 0);
    world.submit(Op::Discard, 12288, PAGE);
    world.submit(Op::WriteZeroes, 16384, PAGE);
    world.settle();
    let stored = |keeper: &Keeper| -> Vec<u64> {
        keeper.0.lock().unwrap().ios.iter().map(|io| io.range.offset()).collect()
    };
    assert_eq!(stored(&keeper), [0, 8192, 0], "what changes the disk waits for its mark");
    gaps.make(Ok(()));
    world.settle();
    assert_eq!(gaps.0.lock().unwrap().made, [4096, 12288, 16384]);
    assert_eq!(stored(&keeper).len(), 6);
    // Again at the same place: it is marked already.
    world.submit(Op::Write, 4096, PAGE);
    world.settle();
    assert_eq!(stored(&keeper).len(), 7);
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(()); 7]);
    world.assert_empty();
}

#[test]
fn a_change_whose_gap_cannot_be_recorded_fails_and_says_what_to_do() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.on_failure = vec![OnFailure::Bypass];
    let gaps = GapKeeper::default();
    making.record_gaps(0, &gaps);
    let mut world = World::new(making);
    world.lose_host(0);
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    gaps.make(Err(Errno::ENOSPC));
    world.settle();
    assert_eq!(world.ended(), [Err(Errno::EIO)]);
    assert!(keeper.0.lock().unwrap().ios.is_empty());
    assert!(world.log.lock().unwrap()[0].contains("make room"), "{:?}", world.log);
    world.assert_empty();
}

#[test]
fn a_completion_that_a_bypassed_filter_was_to_see_is_recorded_before_the_guest_sees_it() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.on_failure = vec![OnFailure::Bypass];
    let gaps = GapKeeper::default();
    making.record_gaps(0, &gaps);
    let mut world = World::new(making);
    world.submit(Op::Write, 0, PAGE);
    let start = world.sent(0);
    world.hosts[0].answer(&start, verdict::WATCH);
    world.settle();
    world.lose_host(0);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert!(world.ended().is_empty());
    gaps.make(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn a_filter_that_is_back_before_its_gap_is_recorded_is_asked() {
    let (mut making, keeper) = Making::new(vec![blind()]);
    making.on_failure = vec![OnFailure::Bypass];
    let gaps = GapKeeper::default();
    making.record_gaps(0, &gaps);
    let mut world = World::new(making);
    world.lose_host(0);
    world.submit(Op::Write, 0, PAGE);
    world.settle();
    come_back(&mut world, 0);
    gaps.make(Ok(()));
    let start = world.sent(0);
    assert!(keeper.0.lock().unwrap().ios.is_empty(), "it is the filter's now");
    world.hosts[0].answer(&start, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn an_answer_to_what_an_earlier_life_was_asked_is_none() {
    let (mut world, keeper) = world(vec![blind()], OnFailure::Hold);
    world.submit(Op::Write, 0, PAGE);
    let old = world.sent(0);
    world.lose_host(0);
    come_back(&mut world, 0);
    let new = world.sent(0);
    world.hosts[0].answer(&old, verdict::PASS);
    world.settle();
    assert!(keeper.0.lock().unwrap().ios.is_empty());
    assert_eq!(world.hops()[1].block.violations, 1);
    world.hosts[0].answer(&new, verdict::PASS);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    assert_eq!(world.ended(), [Ok(())]);
    world.assert_empty();
}

#[test]
fn an_issued_request_that_outlives_its_issuer_is_reported_to_nobody() {
    let (mut world, keeper) = world(vec![observer(), blind()], OnFailure::Hold);
    world.hosts[0].issue(5, 0, 0, PAGE, 0);
    let below = world.sent(1);
    world.hosts[1].answer(&below, verdict::WATCH);
    world.settle();
    world.lose_host(1);
    world.settle();
    keeper.complete(Ok(()));
    world.settle();
    // It waits for the filter below, which is to be told of it; that does no harm any more.
    world.lose_host(0);
    come_back(&mut world, 0);
    come_back(&mut world, 1);
    let done = world.sent(1);
    assert_eq!((done.kind, done.flags), (submission_kind::DONE, RETRY));
    world.hosts[1].answer(&done, verdict::PASS);
    world.settle();
    assert!(world.hosts[0].take().is_none());
    world.assert_empty();
}
