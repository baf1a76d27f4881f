//! Sleeping, waking, dropping, and what is left behind.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;

/// Whether the queue's doorbell becomes readable within a time.
fn is_rung_within(queue: &dyn StoreQueue, limit: Duration) -> bool {
    let doorbell = queue.doorbell().unwrap();
    let mut doorbell = [PollFd::from_borrowed_fd(doorbell, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    rustix::event::poll(&mut doorbell, Some(&limit)).unwrap() == 1
}

#[test]
fn a_sleeping_thread_is_woken_by_each_completion() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(16 << 20);
        let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
        disk.write(0, &vec![1; 16 << 20]).unwrap();
        let memory = memory(64 << 10);
        let (mut sleep_count, mut done) = (0, Vec::new());
        for at in 0..300 {
            let data = Buffers::of(&memory, 0, 64 << 10, true).unwrap();
            let io = disk.io(1, Op::Read, at % 256 * (64 << 10), 64 << 10, data);
            disk.queue.submit(io);
            disk.queue.poll(&mut done);
            while disk.queue.in_flight() > 0 {
                if disk.queue.before_sleep() {
                    sleep_count += 1;
                    let woken = is_rung_within(&*disk.queue, Duration::from_secs(10));
                    assert!(woken, "{engine:?}: slept through its completion");
                }
                disk.queue.poll(&mut done);
            }
        }
        assert_eq!(done.len(), 300);
        assert!(sleep_count > 100, "{engine:?}: slept only {sleep_count} times");
    }
}

#[test]
fn a_sleeping_thread_is_woken_by_a_flush() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        let slow: Tap = Arc::new(|call| {
            if call == Call::Sync {
                std::thread::sleep(Duration::from_millis(50));
            }
            Answer::Make
        });
        let mut disk = Disk::new(open_tapped(options(&path, engine, true), slow));
        let io = disk.io(1, Op::Flush, 0, 0, Buffers::new());
        disk.queue.submit(io);
        let mut done = Vec::new();
        disk.queue.poll(&mut done);
        assert!(disk.queue.before_sleep());
        assert!(is_rung_within(&*disk.queue, Duration::from_secs(10)));
        disk.queue.poll(&mut done);
        assert_eq!(done, [StoreDone { token: StoreToken(1), status: Ok(()) }]);
    }
}

#[test]
fn sleeping_hands_over_what_was_submitted_and_an_idle_queue_sleeps_on() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
        for _ in 0..20 {
            disk.write(0, &[1; 4096]).unwrap();
        }
        // Nothing old may wake it: the rings of those writes are taken back.
        assert!(disk.queue.before_sleep());
        assert!(!is_rung_within(&*disk.queue, Duration::from_millis(50)), "{engine:?}");

        // The worker polls until nothing is left to hand over, then sleeps.
        let io = disk.io(5, Op::Flush, 0, 0, Buffers::new());
        disk.queue.submit(io);
        let (mut done, start) = (Vec::new(), Instant::now());
        while done.is_empty() {
            if disk.queue.before_sleep() {
                assert!(is_rung_within(&*disk.queue, Duration::from_secs(10)));
            }
            disk.queue.poll(&mut done);
        }
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn with_more_requests_than_fit_the_ring_a_thread_still_sleeps() {
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    let mut disk = Disk::new(RawStore::open(options(&path, Engine::IoUring, true)).unwrap());
    let mut sleep_count = 0;
    // A kernel that is quicker than this thread leaves it no time to sleep: then once more.
    for _ in 0..100 {
        if sleep_count > 0 {
            return;
        }
        // The kernel takes these at once and carries them out one after the other.
        for token in 0..600 {
            let io = disk.io(token, Op::WriteZeroes, 0, 1 << 20, Buffers::new());
            disk.queue.submit(io);
        }
        let mut done = Vec::new();
        while disk.queue.in_flight() > 0 {
            disk.queue.poll(&mut done);
            if disk.queue.in_flight() > 0 && disk.queue.before_sleep() {
                sleep_count += u32::from(disk.queue.in_flight() > 300);
                assert!(is_rung_within(&*disk.queue, Duration::from_secs(10)));
            }
        }
        assert_eq!(done.len(), 600);
    }
    panic!("never slept while more than 300 were in flight");
}

#[test]
fn dropping_a_queue_waits_until_everything_is_over() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(64 << 20);
        let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
        let memory = memory((64 << 20) + 1);
        for at in 0..64u64 {
            // Every other one goes through memory of the queue's own.
            let shift = at as usize & 1;
            let data = Buffers::of(&memory, ((at as usize) << 20) + shift, 1 << 20, true).unwrap();
            if shift == 0 {
                data.write(0, &vec![at as u8 + 1; 1 << 20]);
            }
            let data = if shift == 1 {
                let own = self::memory((1 << 20) + 1);
                let data = Buffers::of(&own, 1, 1 << 20, true).unwrap();
                data.write(0, &vec![at as u8 + 1; 1 << 20]);
                data
            } else {
                data
            };
            let io = disk.io(at, Op::Write, at << 20, 1 << 20, data);
            disk.queue.submit(io);
        }
        disk.queue.poll(&mut vec![]);
        drop(disk);
        assert_eq!(Arc::strong_count(&memory), 1, "somebody still holds guest memory");
        let file = std::fs::read(&path).unwrap();
        for (at, piece) in file.chunks(1 << 20).enumerate() {
            assert!(piece.iter().all(|byte| *byte == at as u8 + 1), "{engine:?} {at}");
        }
    }
}

#[test]
fn a_queue_outlives_its_thread_and_its_store() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(8 << 20);
        let memory = memory(8 << 20);
        let options = options(&path, engine, true);
        let own = memory.clone();
        let thread = std::thread::spawn(move || {
            let mut disk = Disk::new(RawStore::open(options).unwrap());
            for at in 0..8 {
                let data = Buffers::of(&own, (at as usize) << 20, 1 << 20, true).unwrap();
                let io = disk.io(at, Op::Read, at << 20, 1 << 20, data);
                disk.queue.submit(io);
            }
            disk.queue.poll(&mut vec![]);
            disk.queue
        });
        let queue = thread.join().unwrap();
        drop(queue);
        assert_eq!(Arc::strong_count(&memory), 1, "{engine:?}");
    }
}

#[test]
fn two_threads_work_on_one_store_at_once() {
    for engine in ENGINES {
        for direct in [true, false] {
            let dir = TempDir::new();
            let path = dir.image(8 << 20);
            let store = RawStore::open(options(&path, engine, direct)).unwrap();
            let store = &Arc::new(store);
            std::thread::scope(|scope| {
                for half in 0..2u64 {
                    scope.spawn(move || {
                        let mut random = Random::new("two threads");
                        let queue = store.open_queue().unwrap();
                        let mut disk = Disk { store: store.clone(), queue };
                        let mut model = vec![0; 4 << 20];
                        for round in 0..100 {
                            let at = random.below(960) * 4096;
                            let length = 512 * (1 + random.below(256));
                            let bytes = random.bytes(length);
                            let flags = if round % 10 == 0 { FUA } else { PLAIN };
                            let offset = (half << 22) + at as u64;
                            disk.write_flagged(offset, &bytes, flags).unwrap();
                            model[at..at + bytes.len()].copy_from_slice(&bytes);
                        }
                        assert_eq!(disk.flush(), Ok(()));
                        assert!(disk.read(half << 22, 4 << 20).unwrap() == model);
                    });
                }
            });
        }
    }
}

/// Runs itself again in a process of its own, where no other test opens anything.
#[test]
fn no_descriptor_and_no_thread_is_left_behind() {
    const INSIDE: &str = "UPCALL_TEST_ALONE";
    if std::env::var_os(INSIDE).is_none() {
        let name = "raw::tests::waiting::no_descriptor_and_no_thread_is_left_behind";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let before = (count("fd"), count("task"));
    let dir = TempDir::new();
    let path = dir.image(1 << 20);
    for engine in ENGINES {
        for _ in 0..20 {
            let mut disk = Disk::new(RawStore::open(options(&path, engine, true)).unwrap());
            let other = disk.store.open_queue().unwrap();
            disk.write_flagged(0, &[1; 4096], FUA).unwrap();
            drop(other);
        }
    }
    assert_eq!(count("fd"), before.0);
    // The kernel's own helpers of a ring end some time after it.
    let start = Instant::now();
    while count("task") > before.1 && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(count("task"), before.1);
}
