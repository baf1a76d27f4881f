//! The conformance kit finds wrong filters, says the right thing of each, and lets right
//! ones pass.

mod common;

use common::{Ended, Folder, upcall};

const SOURCE: &str = "crates/upcall/tests/data/wrong.c";

fn check(filter: &str, more: &[&str]) -> Ended {
    let mut args = vec!["filter", "check", filter, "--seed", "1"];
    if !more.contains(&"--timeout-ms") {
        args.extend(["--timeout-ms", "1500"]);
    }
    args.extend(more);
    upcall(&args)
}

/// Expects that the filter that breaks rule `wrong` fails the check `name`, and that the
/// report says `says` and how to replay it.
#[track_caller]
fn finds(wrong: &str, name: &str, says: &str) {
    let folder = Folder::new(wrong);
    let filter = folder.filter("wrong", SOURCE, &[&format!("-DWRONG={wrong}")]);
    let ended = check(&filter, &[]);
    assert_eq!(ended.code, Some(1), "{wrong}: {ended:#?}");
    let failed = format!("FAIL  {name}\n");
    assert!(ended.stdout.contains(&failed), "{wrong} does not fail {name:?}:\n{}", ended.stdout);
    assert!(ended.stdout.contains(says), "{wrong} does not say {says:?}:\n{}", ended.stdout);
    let replay = format!("replay: upcall filter check {filter} --seed 1 --operations 20000");
    assert!(ended.stdout.contains(&replay), "{}", ended.stdout);
    assert!(ended.stderr.contains("checks failed"), "{}", ended.stderr);
}

#[test]
fn a_hold_that_is_never_answered_is_found() {
    finds("NEVER_ANSWERS", "one at a time", "requests were never answered");
}

#[test]
fn data_that_is_changed_one_way_only_is_found() {
    finds("ONE_WAY", "one at a time", "which was written, a read gave");
}

#[test]
fn a_second_answer_is_found() {
    finds("ANSWERS_TWICE", "keeps the rules", "answered a request that it does not hold");
}

#[test]
fn a_leak_of_memory_is_found() {
    finds("LEAKS_MEMORY", "leaks", "bytes a request");
}

#[test]
fn a_leak_of_descriptors_is_found() {
    finds("LEAKS_DESCRIPTORS", "leaks", "more descriptors");
}

#[test]
fn a_crash_is_found() {
    finds("CRASHES_ON_FLUSH", "stays alive", "SIGSEGV");
}

#[test]
fn a_lost_write_is_found() {
    finds("LOSES_WRITES", "all at once", "which was written, a read gave");
}

#[test]
fn a_verdict_that_was_not_declared_is_found() {
    finds("WRONG_VERDICT", "keeps the rules", "not in its `answers`");
}

#[test]
fn a_crash_at_the_end_is_found() {
    finds("ENDS_BADLY", "opens and closes", "SIGABRT");
}

#[test]
fn memory_shared_by_threads_is_found() {
    finds("RACES", "all at once", "which was written, a read gave");
}

#[test]
fn a_discard_that_leaves_the_data_is_found() {
    finds("IGNORES_DISCARD", "one at a time", "zeroed or discarded, a read gave");
}

#[test]
fn a_cancel_that_is_not_answered_is_found() {
    finds("IGNORES_CANCEL", "stops", "answered neither them nor their cancel");
}

#[test]
fn right_filters_pass() {
    let folder = Folder::new("right");
    let trace = folder.text("trace.jsonl");
    let cases = [
        (SOURCE, "-DWRONG=NOTHING", vec![]),
        ("filters/xor/xor.c", "-DNDEBUG", vec![]),
        ("filters/trace/trace.c", "-DNDEBUG", vec!["--param".into(), format!("file={trace}")]),
    ];
    for (source, flag, params) in cases {
        let filter = folder.filter("right", source, &[flag]);
        let mut more = vec!["--operations", "5000"];
        more.extend(params.iter().map(String::as_str));
        let ended = check(&filter, &more);
        assert_eq!(ended.code, Some(0), "{source}: {ended:#?}");
        assert!(ended.stdout.ends_with("checks passed\n"), "{}", ended.stdout);
        assert!(ended.stdout.contains("ok    leaks"), "{}", ended.stdout);
    }
}

#[test]
fn a_filter_may_fail_requests() {
    let folder = Folder::new("fails");
    let filter = folder.filter("fails", SOURCE, &["-DWRONG=FAILS_SOME"]);
    let ended = check(&filter, &["--operations", "5000"]);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ended.stdout.contains("write: No space left on device"), "{}", ended.stdout);
}

#[test]
fn a_filter_may_be_checked_inline_and_with_granted_disks() {
    let folder = Folder::new("inline");
    let filter = folder.filter("right", SOURCE, &["-DWRONG=NOTHING"]);
    let more = ["--operations", "2000", "--placement", "inline", "--grants", "1"];
    let ended = check(&filter, &more);
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ended.stdout.contains(" --placement inline --grants 1\n"), "{}", ended.stdout);
}

#[test]
fn the_same_seed_sends_the_same_requests() {
    let folder = Folder::new("seed");
    let filter = folder.filter("loses", SOURCE, &["-DWRONG=IGNORES_DISCARD"]);
    let first_finding = || {
        let said = check(&filter, &["--operations", "1000"]).stdout;
        let line = said.lines().find(|line| line.contains("a read gave")).map(str::to_owned);
        line.expect("a finding")
    };
    assert_eq!(first_finding(), first_finding());
}

/// One in Rust, which holds requests, and is cancelled while it does.
#[test]
fn the_throttle_passes_and_is_cancelled() {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_upcall"));
    let target = program.parent().and_then(std::path::Path::parent).unwrap();
    let built = std::process::Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "upcall-filter-throttle", "--target-dir"])
        .arg(target)
        .status()
        .unwrap();
    assert!(built.success());
    let filter = target.join("debug/libupcall_throttle.so");
    let filter = filter.to_str().unwrap();
    let limit = ["--param", "iops=60", "--param", "iops_burst=8", "--operations", "100"];
    let ended = check(filter, &[&limit[..], &["--timeout-ms", "10000"]].concat());
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let stops = ended.stdout.lines().find(|line| line.starts_with("ok    stops")).unwrap();
    assert!(!stops.contains("which 0 were"), "nothing was cancelled: {stops}");
}

#[test]
fn what_is_no_filter_fails_the_first_check() {
    let folder = Folder::new("nofilter");
    let file = folder.text("text.so");
    std::fs::write(&file, "text").unwrap();
    let ended = check(&file, &[]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stdout.contains("FAIL  loads\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("text.so"), "{}", ended.stdout);
}

#[test]
fn a_wrong_parameter_fails_and_is_named() {
    let folder = Folder::new("param");
    let filter = folder.filter("right", SOURCE, &["-DWRONG=NOTHING"]);
    let ended = check(&filter, &["--param", "colour=blue"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stdout.contains("FAIL  parameters\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("colour"), "{}", ended.stdout);
}
