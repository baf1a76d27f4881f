//! Two processes pass entries both ways through a real memfd and sleep on real eventfds.
//!
//! The other process is this test binary again. It answers each submission with a
//! completion that is made from its words; both sides check every word they take.
//! `UPCALL_STRESS_ENTRIES` sets how many entries go each way; `UPCALL_SEED` is the seed.

use std::fmt::Debug;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;

use upcall_abi::ring::{Completion, Submission};
use upcall_ring::channel::{Channel, Consumer, HostChannel, Producer};
use upcall_ring::ring::Entry;
use upcall_ring::{Doorbell, Turn, Waiter};

const ENTRIES: u32 = 64;
/// Longer than any pause below, far longer than any wake-up takes.
const LOST: Duration = Duration::from_secs(20);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Mostly goes on; rarely computes, sleeps or yields, so that the other side finds this
    /// one slow, fast, away, and coming back at any moment. (Yields are the rarest: on a busy
    /// machine each takes milliseconds.)
    fn pause(&mut self) {
        match self.next() % 4096 {
            0..8 => std::thread::sleep(Duration::from_micros(self.next() % 200)),
            8 => std::thread::yield_now(),
            64..128 => (0..self.next() % 2000).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
    }
}

/// The entry number `number` of a direction: every word differs from every other entry's.
fn entry<E: Entry>(number: u64, direction: u64) -> E {
    let mut random = Random(number << 1 | direction);
    E::from_words(&std::array::from_fn(|_| random.next()))
}

fn check<E: Entry + Debug>(seen: &E, number: u64, direction: u64) {
    let (mut words, mut expected) = (seen.to_words(), entry::<E>(number, direction).to_words());
    assert_eq!(words[0] as u32, (number as u32).wrapping_add(1), "seq of entry {number}");
    words[0] >>= 32;
    expected[0] >>= 32;
    assert_eq!(words, expected, "entry {number}");
}

/// One side: a producer, a consumer, and the bells of both.
struct Side<Out, In> {
    producer: Producer<Out>,
    consumer: Consumer<In>,
    theirs: Doorbell,
    ours: Doorbell,
    random: Random,
    waiter: Waiter,
    start: Instant,
    sleeps: u64,
}

impl<Out: Entry, In: Entry + Debug> Side<Out, In> {
    fn new(
        (producer, consumer): (Producer<Out>, Consumer<In>),
        (theirs, ours): (Doorbell, Doorbell),
        seed: u64,
    ) -> Self {
        let (random, waiter) = (Random(seed), Waiter::default());
        let start = Instant::now();
        Side { producer, consumer, theirs, ours, random, waiter, start, sleeps: 0 }
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Ends a round: looks again at once, yields or sleeps.
    fn wait(&mut self, found_work: bool) {
        match self.waiter.turn(found_work, self.now_ns()) {
            Turn::Poll => {}
            Turn::Yield => {
                let before = self.now_ns();
                std::thread::yield_now();
                self.waiter.yielded(self.now_ns() - before);
            }
            Turn::Sleep => self.sleep(),
        }
    }

    fn sleep(&mut self) {
        if !self.consumer.before_sleep() {
            return;
        }
        self.sleeps += 1;
        let timeout = Timespec { tv_sec: LOST.as_secs() as i64, tv_nsec: 0 };
        let mut polled = [PollFd::new(&self.ours, PollFlags::IN)];
        let woken = rustix::event::poll(&mut polled, Some(&timeout)).unwrap();
        self.consumer.after_sleep();
        assert!(woken == 1, "not woken; entries waiting: {}", self.consumer.is_ready());
        self.ours.clear();
    }
}

/// Sends `count` submissions and takes as many completions.
fn ask(side: &mut Side<Submission, Completion>, count: u64) {
    let (mut sent, mut taken) = (0, 0);
    while taken < count {
        let before = sent + taken;
        // No more than fit the completion ring: the other side never finds it full for ever.
        let batch = side.random.next() % u64::from(ENTRIES) + 1;
        for _ in 0..batch {
            if sent == count || sent - taken == u64::from(ENTRIES) {
                break;
            }
            if side.producer.push(&entry(sent, 0)).is_err() {
                side.producer.free().unwrap();
                break;
            }
            side.random.pause();
            sent += 1;
        }
        side.producer.wake(&side.theirs);
        for _ in 0..side.random.next() % u64::from(ENTRIES) + 1 {
            let Some(seen) = side.consumer.pop() else { break };
            check(&seen, taken, 1);
            side.random.pause();
            taken += 1;
        }
        side.wait(sent + taken > before);
    }
}

/// Takes `count` submissions and answers each.
fn answer(side: &mut Side<Completion, Submission>, count: u64) {
    let mut taken = 0;
    while taken < count {
        let before = taken;
        for _ in 0..side.random.next() % u64::from(ENTRIES) + 1 {
            let Some(seen) = side.consumer.pop() else { break };
            check(&seen, taken, 0);
            side.producer.push(&entry(taken, 1)).expect("the worker has room for every answer");
            side.random.pause();
            taken += 1;
        }
        side.producer.wake(&side.theirs);
        side.wait(taken > before);
    }
}

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect(name))
}

/// What the other process runs; nothing in a usual test run.
#[test]
fn the_other_process() {
    let Some(count) = number_from_environment("UPCALL_STRESS_PEER") else { return };
    // SAFETY: the parent passed these descriptors on, and nobody else here uses them.
    let fd =
        |name| unsafe { OwnedFd::from_raw_fd(number_from_environment(name).expect(name) as i32) };
    let channel = HostChannel::open(fd("UPCALL_STRESS_CHANNEL")).unwrap();
    let bells = (
        Doorbell::from_fd(fd("UPCALL_STRESS_THEIRS")),
        Doorbell::from_fd(fd("UPCALL_STRESS_OURS")),
    );
    let seed = number_from_environment("UPCALL_SEED").expect("the parent's seed");
    let ends = (channel.completions, channel.submissions);
    let mut side = Side::new(ends, bells, !seed);
    answer(&mut side, count);
    eprintln!("the other process slept {} times", side.sleeps);
}

#[test]
fn millions_of_entries_cross_two_processes_whole_in_order_and_never_oversleep() {
    let count = number_from_environment("UPCALL_STRESS_ENTRIES").unwrap_or(2_000_000);
    let seed = number_from_environment("UPCALL_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("UPCALL_SEED={seed}");
    let (channel, fd) = Channel::create(ENTRIES).unwrap();
    let (to_peer, to_us) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "the_other_process", "--nocapture"])
        .env("UPCALL_STRESS_PEER", count.to_string())
        .env("UPCALL_SEED", seed.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for (name, fd) in [
        ("UPCALL_STRESS_CHANNEL", fd.as_fd()),
        ("UPCALL_STRESS_THEIRS", to_us.as_fd()),
        ("UPCALL_STRESS_OURS", to_peer.as_fd()),
    ] {
        rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
        command.env(name, fd.as_raw_fd().to_string());
    }
    let mut peer = command.spawn().unwrap();
    let ends = (channel.submissions, channel.completions);
    let mut side = Side::new(ends, (to_peer, to_us), seed);
    let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ask(&mut side, count)));
    if asked.is_err() {
        peer.kill().unwrap();
    }
    let status = peer.wait().unwrap();
    let mut said = String::new();
    peer.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    println!("{} sleeps here; {said}", side.sleeps);
    assert!(asked.is_ok() && status.success(), "UPCALL_SEED={seed}: {status}: {said}");
    assert!(side.sleeps > 0, "a stress of sleeping without a sleep proves nothing");
}
