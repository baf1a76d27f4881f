//! The ring protocol under every schedule and every memory order that loom can think of.
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p upcall-ring --release --test loom
//! ```
//!
//! (A target directory of its own saves rebuilding everything else.)
//!
//! What runs here is `upcall_ring::ring` itself; only its memory is loom's. The words of an
//! entry are cells to loom: two accesses to one that are not ordered by the protocol fail
//! the test, so an entry cannot be torn. A lost wake-up is a deadlock, which loom reports.
//! Not modelled: a peer that breaks the protocol (see the stress test), and other processes.
#![cfg(loom)]

use loom::sync::atomic::AtomicU32;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use upcall_abi::ring::{Completion, Submission};
use upcall_ring::ring::{Consumer, Entry, Full, Producer, RingMemory, Slot};

struct Memory {
    slots: Vec<Slot>,
    head: AtomicU32,
    sleeping: AtomicU32,
}

#[derive(Clone)]
struct Ring(Arc<Memory>);

impl RingMemory for Ring {
    fn entries(&self) -> u32 {
        self.0.slots.len() as u32
    }

    fn slot(&self, position: u32) -> &Slot {
        &self.0.slots[position as usize % self.0.slots.len()]
    }

    fn head(&self) -> &AtomicU32 {
        &self.0.head
    }

    fn sleeping(&self) -> &AtomicU32 {
        &self.0.sleeping
    }
}

fn ring<E: Entry>(entries: usize) -> (Producer<E, Ring>, Consumer<E, Ring>) {
    let memory = Ring(Arc::new(Memory {
        slots: std::iter::repeat_with(Slot::default).take(entries).collect(),
        head: AtomicU32::new(0),
        sleeping: AtomicU32::new(0),
    }));
    (Producer::new(memory.clone()), Consumer::new(memory))
}

/// An eventfd: rings that nobody waited for yet are not lost.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Bell {
        Bell(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn wait_and_clear(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// Runs `test` in every way that takes at most 4 preemptions (`LOOM_MAX_PREEMPTIONS` for
/// another number; each one more takes about four times as long).
fn model(test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(4));
    builder.check(test);
}

/// An entry that has `number` in every word.
fn words(number: u64) -> [u64; 8] {
    [number << 32, number, number, number, number, number, number, number]
}

fn submission(number: u64) -> Submission {
    Submission::from_words(&words(number))
}

fn check(entry: &impl Entry, number: u64) {
    let mut seen = entry.to_words();
    seen[0] &= !0xffff_ffff;
    assert_eq!(seen, words(number), "entry {number}");
}

fn push_waiting<E: Entry>(producer: &mut Producer<E, Ring>, entry: &E) {
    while producer.push(entry) == Err(Full) {
        thread::yield_now();
    }
}

/// What a consumer does that waits by polling and then sleeping.
fn pop_sleeping<E: Entry>(consumer: &mut Consumer<E, Ring>, bell: &Bell) -> E {
    loop {
        if let Some(entry) = consumer.pop() {
            return entry;
        }
        if consumer.before_sleep() {
            bell.wait_and_clear();
            consumer.after_sleep();
        }
    }
}

#[test]
fn entries_arrive_whole_and_in_order_through_a_ring_that_is_often_full() {
    for (entries, count) in [(1, 3), (2, 5)] {
        model(move || {
            let (mut producer, mut consumer) = ring(entries);
            let other = thread::spawn(move || {
                for number in 1..=count {
                    push_waiting(&mut producer, &submission(number));
                }
            });
            for number in 1..=count {
                let entry = loop {
                    match consumer.pop() {
                        Some(entry) => break entry,
                        None => thread::yield_now(),
                    }
                };
                check(&entry, number);
            }
            assert!(consumer.pop().is_none());
            other.join().unwrap();
        });
    }
}

#[test]
fn a_full_ring_overwrites_nothing_and_counts_what_is_free() {
    model(|| {
        let (mut producer, mut consumer) = ring(2);
        let other = thread::spawn(move || {
            let mut pushed = 0;
            for _ in 0..4 {
                let free = producer.free().unwrap();
                match producer.push(&submission(pushed + 1)) {
                    Ok(()) => pushed += 1,
                    Err(Full) => assert_eq!(free, 0),
                }
            }
            (producer, pushed)
        });
        let mut taken = 0;
        for _ in 0..2 {
            if let Some(entry) = consumer.pop() {
                taken += 1;
                check(&entry, taken);
            }
        }
        let (mut producer, pushed) = other.join().unwrap();
        assert!(pushed >= 2 && pushed <= taken + 2);
        assert_eq!(u64::from(producer.free().unwrap()), 2 - (pushed - taken));
        for number in taken + 1..=pushed {
            check(&consumer.pop().unwrap(), number);
        }
        assert!(consumer.pop().is_none());
    });
}

#[test]
fn a_consumer_that_sleeps_is_woken_for_every_batch() {
    for batches in [&[1, 1][..], &[2, 1]] {
        model(move || {
            let (mut producer, mut consumer) = ring(4);
            let bell = Bell::new();
            let theirs = bell.clone();
            let other = thread::spawn(move || {
                let mut number = 0;
                for batch in batches {
                    for _ in 0..*batch {
                        number += 1;
                        producer.push(&submission(number)).unwrap();
                    }
                    if producer.publish() {
                        theirs.ring();
                    }
                }
            });
            for number in 1..=batches.iter().sum() {
                check(&pop_sleeping(&mut consumer, &bell), number);
            }
            other.join().unwrap();
        });
    }
}

#[test]
fn two_sides_that_answer_each_other_and_sleep_both_get_on() {
    model(|| {
        let (mut submissions, mut host_submissions) = ring::<Submission>(1);
        let (mut host_completions, mut completions) = ring::<Completion>(1);
        let (to_host, to_worker) = (Bell::new(), Bell::new());
        let (host_bell, worker_bell) = (to_host.clone(), to_worker.clone());
        let host = thread::spawn(move || {
            for _ in 0..2 {
                let asked = pop_sleeping(&mut host_submissions, &host_bell);
                let answer = Completion::from_words(&asked.to_words());
                host_completions.push(&answer).unwrap();
                if host_completions.publish() {
                    worker_bell.ring();
                }
            }
        });
        for number in 1..=2 {
            submissions.push(&submission(number)).unwrap();
            if submissions.publish() {
                to_host.ring();
            }
            check(&pop_sleeping(&mut completions, &to_worker), number);
        }
        host.join().unwrap();
    });
}
