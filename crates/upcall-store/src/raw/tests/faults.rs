//! What becomes of requests when the kernel refuses, stops short or is interrupted.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use upcall_block::Errno;

use super::*;

/// Each engine in each mode, on a fresh image of `bytes`, with a tap made by `tap`.
fn for_each(bytes: u64, tap: impl Fn() -> Tap, test: impl Fn(Disk)) {
    for engine in ENGINES {
        for direct in [true, false] {
            let dir = TempDir::new();
            let path = dir.image(bytes);
            let store = open_tapped(options(&path, engine, direct), tap());
            eprintln!("{}", store.describe());
            test(Disk::new(store));
        }
    }
}

#[test]
fn after_a_failed_flush_nothing_that_writes_succeeds_in_any_queue() {
    for engine in ENGINES {
        let dir = TempDir::new();
        let path = dir.image(1 << 20);
        let told = Arc::new(Mutex::new(Vec::new()));
        let ear = told.clone();
        let options = RawOptions {
            on_failure: Some(Arc::new(move |text: &str| ear.lock().unwrap().push(text.to_owned()))),
            ..options(&path, engine, true)
        };
        // The second sync fails, and only that: later ones would succeed if they were made.
        let count = AtomicU32::new(0);
        let store = open_tapped(
            options,
            Arc::new(move |call| match call {
                Call::Sync if count.fetch_add(1, Ordering::SeqCst) == 1 => {
                    Answer::Result(-libc::EIO)
                }
                _ => Answer::Make,
            }),
        );
        let mut other = store.open_queue().unwrap();
        let mut disk = Disk::new(store);
        assert_eq!(disk.write(0, &[1; 4096]), Ok(()));
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(disk.store.failure(), None);
        assert_eq!(disk.flush(), Err(Errno::EIO));

        for _ in 0..2 {
            assert_eq!(disk.flush(), Err(Errno::EIO));
            assert_eq!(disk.write(0, &[2; 4096]), Err(Errno::EIO));
            assert_eq!(disk.write_flagged(0, &[2; 4096], FUA), Err(Errno::EIO));
            assert_eq!(disk.run(Op::Discard, 0, 4096, PLAIN), Err(Errno::EIO));
            assert_eq!(disk.run(Op::WriteZeroes, 0, 4096, UNMAP), Err(Errno::EIO));
            assert_eq!(disk.store.sync(), Err(Errno::EIO));
            assert_eq!(disk.read(0, 4096), Ok(vec![1; 4096]), "reads go on");
            std::mem::swap(&mut disk.queue, &mut other);
        }
        let late = disk.store.open_queue().unwrap();
        disk.queue = late;
        assert_eq!(disk.flush(), Err(Errno::EIO), "a queue opened later");

        let failure = disk.store.failure().unwrap();
        assert!(failure.contains("flush failed") && failure.contains("image"), "{failure}");
        assert!(disk.store.describe().contains("FAILED"), "{}", disk.store.describe());
        assert_eq!(*told.lock().unwrap(), [failure], "told once");
        drop((disk, other));
        let mut again = Disk::new(RawStore::open(self::options(&path, engine, true)).unwrap());
        assert_eq!(again.flush(), Ok(()), "until it is opened anew");
    }
}

#[test]
fn a_durable_write_fails_and_poisons_the_store_if_its_sync_fails() {
    let tap = || -> Tap {
        Arc::new(|call| match call {
            Call::Sync => Answer::Result(-libc::ENOSPC),
            _ => Answer::Make,
        })
    };
    for_each(1 << 20, tap, |mut disk| {
        assert_eq!(disk.write(0, &[1; 4096]), Ok(()), "an ordinary write needs no sync");
        assert_eq!(disk.write_flagged(0, &[1; 4096], FUA), Err(Errno::EIO));
        assert!(disk.store.failure().is_some());
    });
}

#[test]
fn flushes_side_by_side_never_run_two_syncs_at_once_and_all_fail_with_the_first() {
    let is_running = Arc::new(AtomicBool::new(false));
    let has_overlapped = Arc::new(AtomicBool::new(false));
    let tap = || -> Tap {
        let (is_running, has_overlapped) = (is_running.clone(), has_overlapped.clone());
        let has_failed = AtomicBool::new(false);
        Arc::new(move |call| {
            if call != Call::Sync {
                return Answer::Make;
            }
            if is_running.swap(true, Ordering::SeqCst) {
                has_overlapped.store(true, Ordering::SeqCst);
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            is_running.store(false, Ordering::SeqCst);
            // As the kernel does: the failure is told once.
            Answer::Result(if has_failed.swap(true, Ordering::SeqCst) { 0 } else { -libc::EIO })
        })
    };
    for_each(1 << 20, tap, |mut disk| {
        let mut other = disk.store.open_queue().unwrap();
        for token in 0..3 {
            let io = disk.io(token, Op::Flush, 0, 0, Buffers::new());
            disk.queue.submit(io);
            disk.queue.poll(&mut vec![]);
            let io = disk.io(token, Op::Flush, 0, 0, Buffers::new());
            other.submit(io);
            other.poll(&mut vec![]);
        }
        let direct = disk.store.sync();
        let mut done = disk.finish();
        disk.queue = other;
        done.extend(disk.finish());
        assert_eq!(done.len(), 6);
        assert!(done.iter().all(|done| done.status == Err(Errno::EIO)), "{done:?}");
        assert_eq!(direct, Err(Errno::EIO));
        assert!(!has_overlapped.load(Ordering::SeqCst), "two syncs at once");
    });
}

#[test]
fn a_flush_and_a_durable_write_make_a_sync_and_a_plain_write_makes_none() {
    let count = Arc::new(AtomicU32::new(0));
    let tap = || -> Tap {
        let count = count.clone();
        count.store(0, Ordering::SeqCst);
        Arc::new(move |call| {
            count.fetch_add(u32::from(call == Call::Sync), Ordering::SeqCst);
            Answer::Make
        })
    };
    let syncs = || count.load(Ordering::SeqCst);
    for_each(1 << 20, tap, |mut disk| {
        disk.write(0, &[1; 512]).unwrap();
        disk.run(Op::WriteZeroes, 0, 4096, PLAIN).unwrap();
        assert_eq!(syncs(), 0);
        disk.flush().unwrap();
        assert_eq!(syncs(), 1);
        disk.write_flagged(0, &[1; 512], FUA).unwrap();
        assert_eq!(syncs(), 2);
        disk.run(Op::WriteZeroes, 0, 4096, FUA).unwrap();
        assert_eq!(syncs(), 3);
        disk.store.sync().unwrap();
        assert_eq!(syncs(), 4);
    });
}

#[test]
fn short_transfers_are_finished() {
    // Each call moves a different part, blocks and odd bytes.
    let tap = || -> Tap {
        let count = AtomicU32::new(0);
        Arc::new(move |call| match call {
            Call::Read { length, .. } | Call::Write { length, .. } if length > 8192 => {
                let count = count.fetch_add(1, Ordering::SeqCst) as usize;
                Answer::AtMost([4096, 512, 8192 + 1024][count % 3])
            }
            _ => Answer::Make,
        })
    };
    for_each(1 << 20, tap, |mut disk| {
        let bytes = Random::new("short").bytes(128 << 10);
        assert_eq!(disk.write(4096, &bytes), Ok(()));
        assert!(disk.read(4096, bytes.len()).unwrap() == bytes);
        // Through memory that must be copied, too.
        let memory = memory(256 << 10);
        let data = Buffers::of(&memory, 3, bytes.len(), true).unwrap();
        let io = disk.io(1, Op::Read, 4096, bytes.len() as u64, data.clone());
        assert_eq!(disk.run_io(io), Ok(()));
        assert!(bytes_of(&data) == bytes);
        data.write(0, &[9; 1000]);
        let io = disk.io(1, Op::Write, 512, bytes.len() as u64, data.clone());
        assert_eq!(disk.run_io(io), Ok(()));
        assert!(disk.read(512, bytes.len()).unwrap() == bytes_of(&data));
    });
}

#[test]
fn interrupted_calls_are_made_again_and_errors_come_through() {
    let tap = || -> Tap {
        let count = AtomicU32::new(0);
        Arc::new(move |call| match (call, count.fetch_add(1, Ordering::SeqCst) % 4) {
            _ if count.load(Ordering::SeqCst) > 100_000 => Answer::Make,
            (Call::Read { offset: 8192, .. }, _) => Answer::Result(-libc::EREMOTEIO),
            (Call::Write { offset: 8192, .. }, _) => Answer::Result(-libc::ENOSPC),
            (Call::Allocate { offset: 8192, .. }, _) => Answer::Result(-libc::EPERM),
            (Call::Write { offset: 16384, .. }, _) => Answer::Result(0),
            (Call::Read { offset: 16384, .. }, _) => Answer::Result(-libc::EAGAIN),
            (_, 0) => Answer::Result(-libc::EINTR),
            (_, 1) => Answer::Result(-libc::EAGAIN),
            _ => Answer::Make,
        })
    };
    for_each(1 << 20, tap, |mut disk| {
        for _ in 0..4 {
            assert_eq!(disk.write(0, &[3; 4096]), Ok(()));
            assert_eq!(disk.read(0, 4096), Ok(vec![3; 4096]));
            assert_eq!(disk.run(Op::Discard, 4096, 4096, PLAIN), Ok(()));
            assert_eq!(disk.flush(), Ok(()));
        }
        assert_eq!(disk.read(8192, 4096), Err(Errno::from_raw(libc::EREMOTEIO)));
        assert_eq!(disk.write(8192, &[1; 512]), Err(Errno::ENOSPC));
        let refused = disk.run(Op::WriteZeroes, 8192, 512, PLAIN);
        assert_eq!(refused, Err(Errno::from_raw(libc::EPERM)));
        assert_eq!(disk.write(16384, &[1; 512]), Err(Errno::EIO), "a write of no bytes");
        let endless = disk.read(16384, 512);
        assert_eq!(endless, Err(Errno::from_raw(libc::EAGAIN)), "not tried for ever");
        assert_eq!(disk.store.failure(), None, "none of this is a failed flush");
    });
}

#[test]
fn a_read_behind_the_end_of_a_shrunk_file_is_an_error() {
    for engine in ENGINES {
        for direct in [true, false] {
            let dir = TempDir::new();
            let path = dir.image(64 << 10);
            let mut disk = Disk::new(RawStore::open(options(&path, engine, direct)).unwrap());
            disk.write(0, &[5; 64 << 10]).unwrap();
            for length in [32 << 10, (32 << 10) + 100] {
                File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
                assert_eq!(disk.read(0, 4096), Ok(vec![5; 4096]));
                assert_eq!(disk.read(60 << 10, 4096), Err(Errno::EIO));
                assert_eq!(disk.read(28 << 10, 8192), Err(Errno::EIO), "half of it is gone");
            }
        }
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_other_way_and_it_is_asked_once() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let tap = || -> Tap {
        let calls = calls.clone();
        calls.lock().unwrap().clear();
        Arc::new(move |call| match call {
            Call::Allocate { mode, .. } => {
                calls.lock().unwrap().push(mode);
                Answer::Result(-libc::EOPNOTSUPP)
            }
            _ => Answer::Make,
        })
    };
    for_each(16 << 20, tap, |mut disk| {
        let bytes = Random::new("zeroes").bytes(9 << 20);
        disk.write(0, &bytes).unwrap();
        assert_eq!(disk.run(Op::Discard, 4096, 5 << 20, PLAIN), Ok(()));
        assert_eq!(disk.run(Op::WriteZeroes, 6 << 20, 512, UNMAP), Ok(()));
        assert_eq!(disk.run(Op::WriteZeroes, 7 << 20, 66048, PLAIN), Ok(()));
        let mut expected = bytes;
        expected[4096..4096 + (5 << 20)].fill(0);
        expected[6 << 20..][..512].fill(0);
        expected[7 << 20..][..66048].fill(0);
        assert!(disk.read(0, 9 << 20).unwrap() == expected);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(*calls.lock().unwrap(), [punch, zero]);
    });
}

#[test]
fn discard_and_unmap_punch_holes_and_plain_write_zeroes_keeps_the_space() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let tap = || -> Tap {
        let calls = calls.clone();
        calls.lock().unwrap().clear();
        Arc::new(move |call| {
            if let Call::Allocate { mode, .. } = call {
                calls.lock().unwrap().push(mode & !libc::FALLOC_FL_KEEP_SIZE);
            }
            Answer::Make
        })
    };
    for_each(16 << 20, tap, |mut disk| {
        use std::os::unix::fs::MetadataExt;
        let bytes = vec![7; 4 << 20];
        disk.write(0, &bytes).unwrap();
        disk.flush().unwrap();
        let path = disk.store.options.path.clone();
        let blocks = || std::fs::metadata(&path).unwrap().blocks();
        let full = blocks();
        disk.run(Op::WriteZeroes, 0, 1 << 20, PLAIN).unwrap();
        disk.flush().unwrap();
        assert_eq!(blocks(), full, "plain zeroes keep their space");
        disk.run(Op::Discard, 1 << 20, 1 << 20, PLAIN).unwrap();
        disk.flush().unwrap();
        assert_eq!(blocks(), full - 2048);
        disk.run(Op::WriteZeroes, 2 << 20, 1 << 20, UNMAP).unwrap();
        disk.flush().unwrap();
        assert_eq!(blocks(), full - 4096);
        let mut expected = bytes;
        expected[..3 << 20].fill(0);
        assert!(disk.read(0, 4 << 20).unwrap() == expected);
        let punch = libc::FALLOC_FL_PUNCH_HOLE;
        assert_eq!(*calls.lock().unwrap(), [libc::FALLOC_FL_ZERO_RANGE, punch, punch]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 16 << 20);
    });
}
