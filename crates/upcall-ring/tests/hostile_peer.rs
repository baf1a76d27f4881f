//! A peer that writes anything anywhere into the channel, all the time.
//!
//! Whatever it does, each call of the worker's side ends, takes or frees what one position
//! allows and no more, and writes nothing but slots and its words of the header.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use upcall_abi::ring::{self, Completion, RINGS_OFFSET, Submission, channel_size};
use upcall_ring::channel::Channel;
use upcall_ring::{Access, Doorbell, Mapping};

const ENTRIES: u32 = 8;
const ROUNDS: u32 = 2_000_000;

fn seed() -> u64 {
    let mut bytes = [0; 8];
    match std::env::var("UPCALL_SEED") {
        Ok(text) => return text.parse().expect("UPCALL_SEED"),
        Err(_) => std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap(),
    }
    u64::from_ne_bytes(bytes)
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// How far the worker got, for an enemy who knows what would be believed.
#[derive(Default)]
struct Progress {
    popped: AtomicU32,
    pushed: AtomicU32,
}

/// One act of the enemy: a word of the header, a `seq`, or anything at all, with a value
/// that is right, nearly right, or any. The numbers at the front too: nobody may read them
/// again.
fn attack(memory: &Mapping, progress: &Progress, state: &mut u64) {
    let (popped, pushed) = (&progress.popped, &progress.pushed);
    let completions = RINGS_OFFSET + ENTRIES as usize * ring::ENTRY_SIZE;
    let popped = popped.load(Ordering::Relaxed);
    let next = completions + (popped % ENTRIES) as usize * ring::ENTRY_SIZE;
    let (at, right) = match random(state) % 16 {
        0..5 => (next, popped.wrapping_add(1)),
        5..10 => (ring::SUBMISSION_HEAD_OFFSET, pushed.load(Ordering::Relaxed)),
        10 => (ring::SUBMISSION_SLEEPING_OFFSET, 1),
        11 => (ring::COMPLETION_SLEEPING_OFFSET, 0),
        12 => (ring::COMPLETION_HEAD_OFFSET, popped),
        13 => (ring::ENTRIES_OFFSET, ENTRIES),
        14 => (0, 0),
        _ => (RINGS_OFFSET + random(state) as usize % (channel_size(ENTRIES) - RINGS_OFFSET), 0),
    };
    let value = match random(state) % 8 {
        0..4 => right,
        4 => right.wrapping_add(random(state) as u32 % 10),
        5 => right.wrapping_sub(random(state) as u32 % 10),
        6 => 1 << (random(state) % 32),
        _ => random(state) as u32,
    };
    memory.atomic_u32(at & !3).expect("inside").store(value, Ordering::Relaxed);
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_peer_that_scribbles_over_the_channel_cannot_make_the_worker_panic_hang_or_stray() {
    let seed = seed();
    println!("UPCALL_SEED={seed}");
    let (mut channel, fd) = Channel::create(ENTRIES).unwrap();
    let memory = Mapping::new(&fd, 0, channel_size(ENTRIES), Access::ReadWrite).unwrap();
    let doorbell = Doorbell::new().unwrap();
    let progress = Progress::default();
    let stop = AtomicBool::new(false);
    let (mut popped, mut pushed, mut violations) = (0u64, 0u64, 0u64);
    std::thread::scope(|scope| {
        // Also when an assertion fails, so that the failure is told instead of a hang.
        let stopper = Stopper(&stop);
        scope.spawn(|| {
            let mut state = seed;
            while !stop.load(Ordering::Relaxed) {
                (0..100).for_each(|_| attack(&memory, &progress, &mut state));
                std::thread::yield_now();
            }
        });
        let mut state = !seed;
        for _ in 0..ROUNDS {
            // Here too, as the other thread may get little of a busy machine.
            (0..random(&mut state) % 4).for_each(|_| attack(&memory, &progress, &mut state));
            for _ in 0..ENTRIES {
                match channel.completions.pop() {
                    // What it says is the worker's to check; that it can be looked at is ours.
                    Some(Completion { seq, .. }) => {
                        popped += 1;
                        assert_eq!(seq, popped as u32, "one position at a time");
                        progress.popped.store(seq, Ordering::Relaxed);
                    }
                    None => break,
                }
            }
            match channel.submissions.free() {
                Ok(free) => assert!(free <= ENTRIES),
                Err(_) => violations += 1,
            }
            let entry = Submission { token: pushed, ..Submission::default() };
            pushed += u64::from(channel.submissions.push(&entry).is_ok());
            progress.pushed.store(pushed as u32, Ordering::Relaxed);
            channel.submissions.wake(&doorbell);
            if channel.completions.before_sleep() {
                channel.completions.after_sleep();
            }
        }
        drop(stopper);
    });
    println!("{ROUNDS} rounds, {popped} popped, {pushed} pushed, {violations} violations");
    assert!(popped.min(pushed).min(violations) > 10_000, "the enemy was too weak");
    let mut untouched = vec![0; RINGS_OFFSET - 320];
    memory.read(320, &mut untouched).unwrap();
    assert!(untouched.iter().all(|byte| *byte == 0), "written before the rings");
}
