//! Simulated worlds, as many as fit into a minute of an unoptimised build. The long
//! campaign is the program of this crate.

use std::process::Command;

use upcall_sim::{Campaign, Plant, Run, find_plant, run_world};

/// How many worlds: UPCALL_SIM_SEEDS, or 300.
fn seeds() -> u64 {
    match std::env::var("UPCALL_SIM_SEEDS") {
        Ok(seeds) => seeds.parse().expect("UPCALL_SIM_SEEDS is a number"),
        Err(_) => 300,
    }
}

#[test]
fn whatever_dies_fails_or_is_slow_data_is_right_and_every_request_ends_once() {
    if let Ok(seed) = std::env::var("UPCALL_SEED") {
        let number = seed.parse().expect("UPCALL_SEED is a number");
        let outcome = run_world(number, Run { prints: true, ..Run::default() });
        assert!(outcome.wrong.is_none(), "seed {seed}: {}", outcome.wrong.unwrap_or_default());
        return;
    }
    let report = Campaign { first: 0, seeds: seeds() }.run();
    println!("{}", report.ledger());
    assert!(report.wrong.is_empty(), "{}", report.wrong.join("\n\n"));
}

/// A world that found something stays as long as its seed makes it: a hung filter host that
/// has no request, but more to be told than its ring holds.
#[test]
fn a_host_that_hangs_without_a_request_holds_nobody_up() {
    let outcome = run_world(805_600_353, Run::default());
    assert!(outcome.wrong.is_none(), "{}", outcome.wrong.unwrap_or_default());
}

/// A dead filter was replaced while requests waited for it: what it was still to be told kept the
/// queue thread awake, once each millisecond, for ever.
#[test]
fn nobody_waits_for_room_in_the_ring_of_a_filter_that_has_left() {
    let outcome = run_world(910_001_187, Run::default());
    assert!(outcome.wrong.is_none(), "{}", outcome.wrong.unwrap_or_default());
}

#[test]
fn a_seed_does_the_same_whenever_it_is_run() {
    for seed in 1..10 {
        let [first, second] = [(); 2].map(|()| run_world(seed, Run::default()));
        assert_eq!(first.digest, second.digest, "seed {seed}");
        assert!(first.digest.0 > 100, "and it does something");
    }
}

#[test]
fn the_bugs_of_others_planted_again_are_seen() {
    for plant in Plant::all() {
        let name = plant.name();
        let found = find_plant(plant, 0, 400);
        let (seed, wrong) = found.unwrap_or_else(|| panic!("{name}: nobody noticed"));
        println!("{name}: seed {seed}: {}", wrong.lines().next().unwrap_or_default());
    }
}

/// These are planted by the environment, so each has a process of its own. Not here:
/// "verdict-of-the-dead" (the dead do not talk here); the worker's own tests see it.
#[test]
fn bugs_planted_in_the_worker_are_seen() {
    let names = [
        "bypass-before-mark",
        "bypass-without-mark",
        "end-in-flight",
        "error-into-success",
        "leave-unrecorded",
        "report-to-the-next",
        "retry-out-of-order",
        "retry-twice",
        "retry-without-image",
        "still-too-early",
        "stop-before-end",
        "successor-without-image",
        "swap-without-chain",
        "trial-shows-late-failure",
    ];
    for name in names {
        let output = Command::new(env!("CARGO_BIN_EXE_upcall-sim"))
            .args(["--seeds", "600"])
            .env("UPCALL_PLANT", name)
            .env_remove("UPCALL_SEED")
            .output()
            .expect("the simulator runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{name}: nobody noticed\n{text}");
        let seen = text.lines().find(|line| line.starts_with("seed "));
        let seen = seen.unwrap_or_else(|| panic!("{name}: no world failed\n{text}"));
        println!("{name}: {seen}");
    }
}
