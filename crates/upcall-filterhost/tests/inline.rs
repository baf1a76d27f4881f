//! A trusted filter in this process, through the same table.

mod common;

use std::time::Duration;

use common::{Worker, filter};
use upcall_abi::filter::{op, verdict};
use upcall_abi::ring::{Submission, completion_kind, submission_kind};
use upcall_filterhost::Placement;

fn write_at(token: u64, data: u64) -> Submission {
    Submission {
        kind: submission_kind::START,
        op: op::WRITE,
        token,
        length: 4096,
        data,
        ..Submission::default()
    }
}

const CHANGER: [&str; 2] = ["-DSCRIBBLE", "-DCHANGES=UPCALL_OP_BIT(UPCALL_WRITE)"];

#[test]
fn an_inline_filter_answers_in_the_call_that_delivers() {
    let mut worker = Worker::serving(&filter(&CHANGER), Placement::Inline);
    assert!(worker.host.pidfd().is_none() && worker.host.process_id().is_none());
    let mut channel = worker.host.inline_channel(0).unwrap();
    worker.arena.write(4096, &[0x0f]).unwrap();
    let answer = channel.deliver(&write_at(9, 4096)).unwrap();
    assert_eq!((answer.kind, answer.code), (completion_kind::VERDICT, verdict::WATCH));
    assert_eq!((answer.token, answer.cookie), (9, 4096));
    assert_eq!(worker.arena.read_array(4096), Some([0xf0]));
    assert_eq!(worker.channel.completions.pop(), None, "the answer is not on the ring as well");
    assert_eq!(worker.counters.snapshot(), [("requests".to_owned(), 1)]);
    drop(channel);
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
    assert!(worker.lines.texts().contains(&"unloaded".to_owned()));
}

#[test]
fn there_is_one_inline_channel_for_an_id_and_only_when_it_is_served() {
    let mut worker = Worker::loaded(&filter(&[]), Placement::Inline).unwrap();
    assert!(worker.host.inline_channel(0).is_none(), "before START");
    worker.host.serve().unwrap();
    assert!(worker.host.inline_channel(1).is_none(), "never given");
    let _first = worker.host.inline_channel(0).unwrap();
    assert!(worker.host.inline_channel(0).is_none(), "taken");
    let mut isolated = Worker::serving(&filter(&[]), Placement::Isolated);
    assert!(isolated.host.inline_channel(0).is_none());
}

#[test]
fn a_host_cannot_quit_under_a_channel_and_a_channel_outlives_its_dropped_host() {
    let mut worker = Worker::serving(&filter(&[]), Placement::Inline);
    let mut channel = worker.host.inline_channel(0).unwrap();
    let counters = worker.counters.clone();
    worker.host.set_timeout(Duration::from_millis(100));
    let said = worker.host.quit().unwrap_err().to_string();
    assert!(said.contains("QUIT"), "{said}");
    assert_eq!(channel.deliver(&write_at(1, 0)).map(|answer| answer.token), Some(1));
    assert_eq!(counters.snapshot(), [("requests".to_owned(), 1)]);
}

#[test]
fn two_inline_filters_do_not_meet() {
    let mut changer = Worker::serving(&filter(&CHANGER), Placement::Inline);
    let mut observer = Worker::serving(&filter(&[]), Placement::Inline);
    let mut first = changer.host.inline_channel(0).unwrap();
    let mut second = observer.host.inline_channel(0).unwrap();
    for token in 0..10 {
        assert_eq!(first.deliver(&write_at(token, 0)).map(|answer| answer.token), Some(token));
    }
    assert!(second.deliver(&write_at(99, 0)).is_some());
    assert_eq!(changer.counters.snapshot()[0].1, 10);
    assert_eq!(observer.counters.snapshot()[0].1, 1);
    assert_eq!(observer.arena.read_array(0), Some([0]));
}

#[test]
fn a_refusal_is_the_same_inline() {
    let said = Worker::loaded(&filter(&["-DNO_SYMBOL"]), Placement::Inline).err().unwrap();
    assert!(said.to_string().contains("upcall_filter"), "{said}");
}

#[test]
fn a_dropped_inline_filter_is_unloaded_before_the_drop_returns() {
    let file = filter(&["-DSLOW_UNLOAD"]);
    let path = file.path().display().to_string();
    let is_mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&path);
    let worker = Worker::serving(&file, Placement::Inline);
    assert!(is_mapped());
    drop(worker);
    assert!(!is_mapped());
}
