//! The chain in thousands of random worlds, against a simple reference.
//!
//! A world is a chain of random filters with several requests in flight, the guest's and the
//! filters' own. What each filter, the store and the guest will do is written down
//! beforehand as a [`script`]; the [`world`] plays it, the events of all flights mixed at
//! random; the [`reference`] reads the same script as plain recursion. Both must see the
//! same, and what was seen must obey the rules of the chain whatever the reference says.
//!
//! A world is made of one number, its seed. A failure prints it, and
//!
//! ```text
//! UPCALL_SEED=<seed> cargo test -p upcall-chain --test model
//! ```
//!
//! plays that world alone. Each run plays the same 10,000 worlds and 10,000 that no run has
//! seen before.

mod filters;
mod player;
mod random;
mod reference;
mod script;
mod world;

use std::time::{SystemTime, UNIX_EPOCH};

use world::Tally;

/// Names the seed if the world that it guards panics.
struct PrintSeed(u64);

impl Drop for PrintSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the world of seed {0} went wrong; to play it again:", self.0);
            eprintln!("UPCALL_SEED={} cargo test -p upcall-chain --test model", self.0);
        }
    }
}

fn play(seed: u64, tally: &mut Tally) {
    let _print_seed = PrintSeed(seed);
    world::play(seed, tally);
}

#[test]
fn every_flight_of_every_world_walks_as_the_reference_says_and_ends_once() {
    let mut tally = Tally::default();
    if let Ok(seed) = std::env::var("UPCALL_SEED") {
        let seed = seed.parse().expect("UPCALL_SEED is a number");
        play(seed, &mut tally);
        return eprintln!("the world of seed {seed} is in order: {tally:?}");
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    let fresh = clock.as_nanos() as u64;
    println!("seeds 0 to 9999 and {fresh} to {}", fresh + 9999);
    for seed in (0..10_000).chain(fresh..fresh + 10_000) {
        play(seed, &mut tally);
    }
    println!("{tally:?}");
    tally.check_that_everything_happened();
}
