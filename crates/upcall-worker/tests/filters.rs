//! A worker with filters in processes of their own: what they may do, what they may not,
//! and what becomes of the disk when they misbehave.

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use common::*;
use upcall_block::{Errno, Op, OpSet};
use upcall_worker::*;

const PROBE: &str = "crates/upcall-worker/tests/data/probe.c";
const READ_WRITE: &str = "6";
const ALL: &str = "62";

fn probe(folder: &Folder, flags: &[&str]) -> PathBuf {
    folder.filter(PROBE, flags)
}

/// Sees no data.
fn blind(folder: &Folder) -> PathBuf {
    probe(folder, &[])
}

fn observer(folder: &Folder) -> PathBuf {
    probe(folder, &["-DSEES=6"])
}

fn changer(folder: &Folder) -> PathBuf {
    probe(folder, &["-DSEES=6", "-DCHANGES=6"])
}

/// Whose requests fail while it is gone.
fn failing(slot: SlotConfig) -> SlotConfig {
    SlotConfig { on_failure: Some(OnFailure::Fail), ..slot }
}

fn told(filter: &Path, mode: &str, value: u32) -> SlotConfig {
    let params = vec![("mode".into(), mode.into()), ("value".into(), value.to_string())];
    SlotConfig { params, ..slot(filter) }
}

static NO_LOG: LazyLock<Log> = LazyLock::new(Log::default);

fn one(chain: Vec<SlotConfig>) -> (Worker, Driver) {
    let worker = start(vec![memory_disk("a", 1 << 20, chain)], &NO_LOG);
    let driver = Driver::new(&worker, 0, 0);
    (worker, driver)
}

fn end(worker: Worker) {
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_changer_changes_both_ways_and_only_what_is_below_it_sees_it() {
    let folder = Folder::new("changer");
    let (adds, looks) = (changer(&folder), observer(&folder));
    let below = SlotConfig { order: 9, ..told(&looks, "peek", 0) };
    let (worker, mut disk) = one(vec![below, SlotConfig { order: 1, ..told(&adds, "add", 5) }]);
    assert_eq!(worker.disks()[0].chain.len(), 2);
    // The observer below fails the write with what it sees: what the guest wrote, plus 5.
    assert_eq!(disk.write(0, &[2; 4096]), Err(Errno::from_raw(7)));
    assert_eq!(disk.write(0, &[251; 4096]), Ok(()), "251 + 5 is 0");
    assert_eq!(disk.read(0, 4096).unwrap(), vec![251; 4096]);
    assert_eq!(disk.peek(0, 1), [251]);
    end(worker);
}

#[test]
fn the_guests_own_memory_is_never_changed_by_a_filter() {
    let folder = Folder::new("private");
    let (worker, mut disk) = one(vec![told(&changer(&folder), "add", 1)]);
    assert_eq!(disk.write(0, &[9; 4096]), Ok(()));
    assert_eq!(disk.peek(0, 4096), vec![9; 4096]);
    end(worker);
}

#[test]
fn a_verdict_decides_what_becomes_of_a_request() {
    let folder = Folder::new("verdicts");
    let blind = blind(&folder);
    for (mode, value, expected) in [
        ("pass", 0, Ok(())),
        ("watch", 0, Ok(())),
        ("fail", 28, Err(Errno::ENOSPC)),
        ("hold", 30, Ok(())),
        ("blocking", 0, Ok(())),
        ("nonsense", 0, Err(Errno::EIO)),
        ("done", 0, Err(Errno::EIO)), // it did not say that it answers
    ] {
        let (worker, mut disk) = one(vec![told(&blind, mode, value)]);
        for op in Op::ALL {
            let length = if op == Op::Flush { 0 } else { 4096 };
            assert_eq!(disk.run(op, 0, length), expected, "{mode} {op}");
        }
        end(worker);
    }
}

#[test]
fn an_answer_of_a_filter_reaches_the_guest_and_not_the_store() {
    let folder = Folder::new("answers");
    let answers = probe(&folder, &["-DSEES=6", "-DCHANGES=6", "-DANSWERS=62"]);
    let (worker, mut disk) = one(vec![told(&answers, "fill", 0x5a)]);
    assert_eq!(disk.write(0, &[1; 4096]), Ok(()));
    assert_eq!(disk.read(0, 4096).unwrap(), vec![0x5a; 4096]);
    end(worker);
    let (worker, mut disk) = one(vec![told(&answers, "done", 0)]);
    assert_eq!(disk.write(0, &[1; 4096]), Ok(()));
    // It answers reads without filling them: the guest sees zeroes, not an earlier request.
    assert_eq!(disk.read(0, 4096).unwrap(), vec![0; 4096]);
    end(worker);
}

#[test]
fn many_requests_in_flight_all_end_with_their_own_data() {
    let folder = Folder::new("many");
    let (worker, mut disk) = one(vec![
        told(&changer(&folder), "add", 3),
        told(&blind(&folder), "hold", 1),
        told(&blind(&folder), "watch", 0),
    ]);
    for round in 0..4u8 {
        for i in 0..250usize {
            disk.fill(i * 4096, &[i as u8 ^ round; 4096]);
            disk.submit(Op::Write, (i * 4096) as u64, 4096, i * 4096);
        }
        for _ in 0..250 {
            assert_eq!(disk.wait().1, Ok(()));
        }
        for i in 0..250usize {
            disk.submit(Op::Read, (i * 4096) as u64, 4096, i * 4096 + 4096 * 256);
        }
        for _ in 0..250 {
            assert_eq!(disk.wait().1, Ok(()));
        }
        for i in 0..250usize {
            assert_eq!(disk.peek(i * 4096 + 4096 * 256, 4096), vec![i as u8 ^ round; 4096]);
        }
    }
    end(worker);
}

#[test]
fn more_data_than_the_arena_holds_waits_and_arrives() {
    let folder = Folder::new("arena");
    let worker =
        start(vec![memory_disk("a", 64 << 20, vec![told(&changer(&folder), "add", 1)])], &NO_LOG);
    let mut disk = Driver::new(&worker, 0, 0);
    disk.fill(0, &vec![7; 4 << 20]);
    for i in 0..16u64 {
        disk.submit(Op::Write, i << 22, 4 << 20, 0);
    }
    for _ in 0..16 {
        assert_eq!(disk.wait().1, Ok(()));
    }
    assert_eq!(disk.read(63 << 20, 1 << 20).unwrap(), vec![7; 1 << 20]);
    end(worker);
}

#[test]
fn zeroes_are_written_through_a_changer_that_does_not_know_write_zeroes() {
    let folder = Folder::new("zeroes");
    let narrow = probe(&folder, &["-DSEES=6", "-DCHANGES=6", &format!("-DOPS={READ_WRITE}")]);
    let worker = start(vec![memory_disk("a", 4 << 20, vec![told(&narrow, "add", 5)])], &NO_LOG);
    let info = worker.disks()[0].info.clone();
    assert!(info.ops.contains(Op::WriteZeroes) && !info.ops.contains(Op::Discard), "{}", info.ops);
    let mut disk = Driver::new(&worker, 0, 0);
    assert_eq!(disk.write(0, &vec![9; 3 << 20]), Ok(()));
    assert_eq!(disk.run(Op::WriteZeroes, 512, (2 << 20) + 512), Ok(()));
    let now = disk.read(0, 3 << 20).unwrap();
    assert!(now[..512].iter().all(|byte| *byte == 9));
    assert!(now[512..(2 << 20) + 1024].iter().all(|byte| *byte == 0));
    assert!(now[(2 << 20) + 1024..].iter().all(|byte| *byte == 9));
    assert_eq!(disk.run(Op::Discard, 0, 512), Err(Errno::EOPNOTSUPP), "never slipped past it");
    end(worker);
}

#[test]
fn an_operation_that_nobody_asked_for_skips_the_ring() {
    let folder = Folder::new("skips");
    let only_writes = probe(&folder, &["-DOPS=4"]);
    let stats = folder.0.join("stats");
    let config = WorkerConfig {
        disks: vec![memory_disk("a", 1 << 20, vec![told(&only_writes, "watch", 0)])],
        stats: Some(stats.clone()),
        drain_ms: 100,
        recovery: RecoveryPolicy::default(),
        write_down: None,
        log: NO_LOG.sink(),
    };
    let worker = Worker::start(config).unwrap();
    let mut disk = Driver::new(&worker, 0, 0);
    assert_eq!(disk.write(0, &[1; 512]), Ok(()));
    for _ in 0..10 {
        disk.read(0, 512).unwrap();
    }
    let hops = upcall_stats::PageReader::open(&stats).unwrap().snapshot();
    let requests: Vec<u64> = hops.iter().map(|hop| hop.block.total().requests).collect();
    // The request, the filter, the store.
    assert_eq!(requests, [11, 1, 11]);
    assert_eq!(hops[1].block.latency.total(), 2, "the write's way down, and its way up");
    end(worker);
    assert!(!stats.exists());
}

#[test]
fn an_observer_that_writes_dies_and_harms_nothing_else() {
    let folder = Folder::new("scribble");
    let log = Log::default();
    let disks = vec![
        memory_disk("a", 1 << 20, vec![failing(told(&observer(&folder), "scribble", 0))]),
        memory_disk("b", 1 << 20, vec![told(&blind(&folder), "watch", 0)]),
    ];
    let worker = start(disks, &log);
    let (mut a, mut b) = (Driver::new(&worker, 0, 0), Driver::new(&worker, 1, 0));
    assert_eq!(a.read(0, 4096).unwrap(), vec![0; 4096], "it may look");
    assert_eq!(a.write(0, &[7; 4096]), Err(Errno::EIO));
    assert_eq!(a.peek(0, 4096), vec![7; 4096], "what the guest wrote is as it was");
    log.wait_for("is gone");
    assert!(log.contains("signal 11") || log.contains("SIGSEGV"), "{:#?}", log.0.lock().unwrap());
    assert_eq!(b.write(0, &[1; 4096]), Ok(()));
    assert_eq!(b.read(0, 4096).unwrap(), vec![1; 4096]);
    assert_eq!(a.write(0, &[1; 4096]), Err(Errno::EIO), "it dies of it again, or is not back");
    assert!(worker.stop_queue(0, 0).is_some() && worker.stop_queue(1, 0).is_some());
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn under_fail_a_filter_that_dies_fails_what_it_had_and_the_worker_lives() {
    let folder = Folder::new("crash");
    let log = Log::default();
    let worker = start(
        vec![memory_disk("a", 1 << 20, vec![failing(told(&blind(&folder), "crash", 0))])],
        &log,
    );
    let mut disk = Driver::new(&worker, 0, 0);
    for i in 0..50 {
        disk.submit(Op::Write, i * 512, 512, 0);
    }
    for _ in 0..50 {
        assert_eq!(disk.wait().1, Err(Errno::EIO));
    }
    log.wait_for("is gone");
    end(worker);
}

#[test]
fn held_requests_are_cancelled_when_their_queue_stops() {
    let folder = Folder::new("cancel");
    let (worker, mut disk) = one(vec![told(&blind(&folder), "hold", 0)]);
    for i in 0..20 {
        disk.submit(Op::Write, i * 512, 512, 0);
    }
    assert_eq!(disk.wait_at_most(Duration::from_millis(200)), None, "it holds them for ever");
    assert!(worker.stop_queue(0, 0).is_some());
    for _ in 0..20 {
        assert_eq!(disk.wait().1, Err(Errno::ECANCELED));
    }
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_filter_that_does_not_even_answer_a_cancel_is_not_waited_for_longer_than_its_grace() {
    let folder = Folder::new("stubborn");
    let log = Log::default();
    let worker =
        start(vec![memory_disk("a", 1 << 20, vec![told(&blind(&folder), "stubborn", 0)])], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    disk.submit(Op::Write, 0, 512, 0);
    assert_eq!(disk.wait_at_most(Duration::from_millis(200)), None);
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(disk.wait().1.is_err());
    log.wait_for("neither them nor their cancel");
    worker.shutdown();
}

#[test]
fn a_filter_writes_to_the_disk_that_it_was_granted_and_to_no_other() {
    let folder = Folder::new("grant");
    let copies = probe(&folder, &["-DSEES=6", "-DFLAGS=1"]);
    let mirror = folder.0.join("mirror.img");
    std::fs::File::create(&mirror).unwrap().set_len(1 << 20).unwrap();
    let mirror_disk = || DiskConfig {
        store: StoreConfig::Raw { path: mirror.clone(), direct: false, engine: Engine::Auto },
        queues: 0,
        ..memory_disk("mirror", 0, Vec::new())
    };
    let granted = SlotConfig { grants: vec!["mirror".into()], ..told(&copies, "copy", 1) };
    let worker = start(vec![memory_disk("a", 1 << 20, vec![granted]), mirror_disk()], &NO_LOG);
    let mut disk = Driver::new(&worker, 0, 0);
    let bytes: Vec<u8> = (0..65536).map(|i| (i / 3) as u8).collect();
    assert_eq!(disk.write(4096, &bytes), Ok(()));
    assert_eq!(disk.read(4096, 65536).unwrap(), bytes);
    end(worker);
    assert_eq!(std::fs::read(&mirror).unwrap()[4096..4096 + 65536], bytes);
    // Without the grant, or for a second one, there is no such disk.
    for (value, grants) in [(1, vec![]), (2, vec!["mirror".into()])] {
        let slot = SlotConfig { grants, ..told(&copies, "copy", value) };
        let worker = start(vec![memory_disk("a", 1 << 20, vec![slot]), mirror_disk()], &NO_LOG);
        let mut disk = Driver::new(&worker, 0, 0);
        assert_eq!(disk.write(0, &[1; 512]), Err(Errno::from_raw(19)));
        end(worker);
    }
}

#[test]
fn a_request_of_a_filters_own_enters_below_it() {
    let folder = Folder::new("below");
    let copies = probe(&folder, &["-DSEES=6", "-DFLAGS=1"]);
    // Above: adds 1. Then the filter that writes a copy to its own disk, below itself; the
    // copy and the original both pass the one below, which adds 2.
    let adds = changer(&folder);
    let chain = vec![
        SlotConfig { order: 1, ..told(&adds, "add", 1) },
        SlotConfig { order: 2, ..told(&copies, "copy", 0) },
        SlotConfig { order: 3, ..told(&adds, "add", 2) },
    ];
    let (worker, mut disk) = one(chain);
    assert_eq!(disk.write(0, &[10; 4096]), Ok(()));
    assert_eq!(disk.read(0, 4096).unwrap(), vec![10; 4096]);
    end(worker);
}

#[test]
fn what_a_filter_cannot_have_is_refused_before_it_is_served() {
    let folder = Folder::new("refused");
    let refused =
        |chain: Vec<SlotConfig>| match try_start(vec![memory_disk("a", 1 << 20, chain)], &NO_LOG) {
            Ok(_) => panic!("it started"),
            Err(error) => error.to_string(),
        };
    let blind = blind(&folder);
    let unknown =
        refused(vec![SlotConfig { params: vec![("moed".into(), "x".into())], ..slot(&blind) }]);
    assert!(unknown.contains("moed") && unknown.contains("mode"), "{unknown}");
    let range = refused(vec![told(&blind, "pass", 100_001)]);
    assert!(range.contains("value") && range.contains("100000"), "{range}");
    let grant = refused(vec![SlotConfig { grants: vec!["b".into()], ..slot(&blind) }]);
    assert!(grant.contains("no such disk"), "{grant}");
    let open = refused(vec![told(&blind, "refuse", 0)]);
    assert!(open.contains("disk a") && open.contains("probe"), "{open}");
    let no_flush = probe(&folder, &["-DOPS=6", "-DANSWERS=4", "-DCHANGES=6"]);
    let rule = refused(vec![slot(&no_flush)]);
    assert!(rule.contains("flush"), "{rule}");
    let half = probe(&folder, &["-DOPS=4", "-DCHANGES=4"]);
    let rule = refused(vec![slot(&half)]);
    assert!(rule.contains("read"), "{rule}");
}

#[test]
fn a_32_bit_filter_serves_a_64_bit_worker() {
    let folder = Folder::new("narrow");
    let narrow = probe(&folder, &["-m32", "-DSEES=6", "-DCHANGES=6", &format!("-DOPS={ALL}")]);
    let (worker, mut disk) = one(vec![told(&narrow, "add", 77)]);
    let bytes: Vec<u8> =
        (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(disk.write(0, &bytes), Ok(()));
    assert_eq!(disk.read(0, 1 << 20).unwrap(), bytes);
    end(worker);
}

#[test]
fn an_inline_filter_does_what_an_isolated_one_does() {
    let folder = Folder::new("inline");
    let inline = |slot: SlotConfig| SlotConfig { placement: Placement::Inline, ..slot };
    let changer = changer(&folder);
    let blind = blind(&folder);
    let chain = vec![
        inline(SlotConfig { order: 1, ..told(&changer, "add", 3) }),
        inline(SlotConfig { order: 2, ..told(&blind, "hold", 1) }),
        SlotConfig { order: 3, ..told(&blind, "watch", 0) },
    ];
    let (worker, mut disk) = one(chain);
    let bytes: Vec<u8> = (0..65536).map(|i| (i / 7) as u8).collect();
    assert_eq!(disk.write(0, &bytes), Ok(()));
    assert_eq!(disk.read(0, 65536).unwrap(), bytes);
    end(worker);
}

#[test]
fn several_queues_and_disks_share_one_filter_host() {
    let folder = Folder::new("shared");
    let adds = changer(&folder);
    let disk = |name: &str, add| DiskConfig {
        queues: 4,
        ..memory_disk(name, 1 << 20, vec![told(&adds, "add", add)])
    };
    let worker = start(vec![disk("a", 1), disk("b", 2)], &NO_LOG);
    std::thread::scope(|scope| {
        for number in 0..2 {
            for queue in 0..4u16 {
                let mut driver = Driver::new(&worker, number, queue);
                scope.spawn(move || {
                    let at = u64::from(queue) << 16;
                    for round in 0..50u8 {
                        assert_eq!(driver.write(at, &[round; 8192]), Ok(()));
                        assert_eq!(driver.read(at, 8192).unwrap(), vec![round; 8192]);
                    }
                });
            }
        }
    });
    for (disk, queue) in (0..2).flat_map(|disk| (0..4).map(move |queue| (disk, queue))) {
        assert!(worker.stop_queue(disk, queue).is_some());
    }
    let offered = worker.disks()[0].info.ops;
    assert_eq!(offered, OpSet::ALL);
    assert!(worker.shutdown().failures.is_empty());
}
