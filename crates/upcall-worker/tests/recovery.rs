//! Filters die and hang at named points of their work, under `hold`: the guest sees no error,
//! and no wrong byte.
//!
//! Every campaign prints one line, `ledger: {...}`, with what it tried. `UPCALL_CAMPAIGN=N`
//! makes the random ones N times as long.

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use upcall_block::{Op, RequestFlags};
use upcall_worker::*;

/// Named as in doomed.c.
const POINTS: [(&str, u32); 17] = [
    ("start", 1),
    ("half", 2),
    ("changed", 3),
    ("held", 4),
    ("held-half", 5),
    ("held-changed", 6),
    ("answered", 7),
    ("issue-before", 8),
    ("issue-after", 9),
    ("issue-done", 10),
    ("done", 11),
    ("done-half", 12),
    ("done-changed", 13),
    ("done-held", 14),
    ("done-answered", 15),
    ("open", 16),
    ("load", 17),
];
const START: u32 = 1;
const FUA: RequestFlags = RequestFlags { fua: true, unmap: false, retry: false };
const PLAIN: RequestFlags = RequestFlags { fua: false, unmap: false, retry: false };
const OPS: [(Op, RequestFlags); 6] = [
    (Op::Read, PLAIN),
    (Op::Write, PLAIN),
    (Op::Flush, PLAIN),
    (Op::Write, FUA),
    (Op::Discard, PLAIN),
    (Op::WriteZeroes, PLAIN),
];
const KILL: u32 = 0;
const STOP: u32 = 1;
const SPIN: u32 = 2;
const BYTES: usize = 64 << 10;
const PLACES: usize = 3;

/// How often the random campaigns are repeated.
fn campaign() -> usize {
    std::env::var("UPCALL_CAMPAIGN").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn ledger(kind: &str, faults: usize, begun: Instant) {
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "ledger: {{\"kind\":\"{kind}\",\"seeds\":1,\"faults\":{faults},\"seconds\":{seconds:.1},\
         \"result\":\"ok\"}}"
    );
}

/// A disk behind three filters that die where they are told.
struct Rig {
    folder: Folder,
    log: Log,
    worker: Worker,
    disk: Driver,
    /// What the guest must find.
    model: Vec<u8>,
    random: u64,
}

impl Rig {
    fn new(name: &str, deadline_ms: u64) -> Rig {
        let folder = Folder::new(name);
        let log = Log::default();
        let chain = (0..PLACES).map(|place| {
            let trigger = folder.0.join(format!("trigger{place}"));
            std::fs::write(&trigger, [0; 32]).unwrap();
            let flags = [
                "-D_GNU_SOURCE".to_owned(),
                format!("-DNAME=\"doomed{place}\""),
                format!("-DTRIGGER=\"{}\"", trigger.display()),
            ];
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let built = folder.filter("crates/upcall-worker/tests/data/doomed.c", &flags);
            let kept = folder.0.join(format!("doomed{place}.so"));
            std::fs::rename(built, &kept).unwrap();
            SlotConfig { order: place as i32, deadline_ms: Some(deadline_ms), ..slot(&kept) }
        });
        let chain: Vec<SlotConfig> = chain.collect();
        // Deaths without end: quarantine is another test's.
        let recovery = RecoveryPolicy {
            failures_max: usize::MAX - 1,
            backoff_ms_min: 0,
            ..RecoveryPolicy::default()
        };
        let image = folder.0.join("disk.img");
        std::fs::File::create(&image).unwrap().set_len(BYTES as u64).unwrap();
        let disk = DiskConfig {
            store: StoreConfig::Raw { path: image, direct: false, engine: Engine::Auto },
            ..memory_disk("a", BYTES as u64, chain)
        };
        let config = WorkerConfig {
            disks: vec![disk],
            stats: None,
            drain_ms: 300,
            recovery,
            log: log.sink(),
        };
        let worker = Worker::start(config).unwrap_or_else(|error| panic!("{error}"));
        let disk = Driver::new(&worker, 0, 0);
        Rig { folder, log, worker, disk, model: vec![0; BYTES], random: 1 }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % end
    }

    fn trigger(&self, place: usize) -> std::fs::File {
        let path: PathBuf = self.folder.0.join(format!("trigger{place}"));
        std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    /// The filter at a place fails at these points, one life after the other.
    fn doom(&self, place: usize, how: u32, op: Option<Op>, points: &[u32]) {
        let file = self.trigger(place);
        let mut words = [0u32; 8];
        (words[1], words[2]) = (how, op.map_or(0, |op| op as u32));
        words[3..3 + points.len()].copy_from_slice(points);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // The position last: from then on it counts.
        file.write_all_at(&bytes[4..], 4).unwrap();
        file.write_all_at(&bytes[..4], 0).unwrap();
    }

    /// How many of its points it has failed at.
    fn failed(&self, place: usize) -> u32 {
        let mut at = [0; 4];
        self.trigger(place).read_exact_at(&mut at, 0).unwrap();
        u32::from_ne_bytes(at)
    }

    /// One request of 4 KiB somewhere, to its end, which is good.
    fn run(&mut self, op: Op, flags: RequestFlags) {
        let offset = self.below((BYTES / 4096) as u64) as usize * 4096;
        let fill: Vec<u8> = (0..4096).map(|_| self.below(256) as u8).collect();
        let (offset, length) = if op == Op::Flush { (0, 0) } else { (offset, 4096) };
        self.disk.fill(0, if op == Op::Write { &fill } else { &[0xee; 4096] });
        let tag = self.disk.submit_flags(op, offset as u64, length as u32, 0, flags);
        let (ended, status) = self.disk.wait();
        assert_eq!((ended, status), (tag, Ok(())), "{op}: {:#?}", self.log.0.lock().unwrap());
        let range = offset..offset + length;
        match op {
            Op::Read => assert!(self.disk.peek(0, length) == self.model[range], "wrong bytes"),
            Op::Write => self.model[range].copy_from_slice(&fill),
            Op::Discard | Op::WriteZeroes => self.model[range].fill(0),
            Op::Flush => {}
        }
    }

    /// All of the disk is as it must be: for the guest, and in the image.
    fn check(&mut self) {
        assert!(self.disk.read(0, BYTES).unwrap() == self.model, "the guest reads wrong bytes");
        let stored = std::fs::read(self.folder.0.join("disk.img")).unwrap();
        let expected: Vec<u8> = self.model.iter().map(|byte| byte.wrapping_mul(27)).collect();
        assert!(stored == expected, "the image holds wrong bytes");
    }

    fn end(self) {
        assert!(self.worker.stop_queue(0, 0).is_some());
        assert!(self.worker.shutdown().failures.is_empty());
    }
}

#[test]
fn a_filter_killed_at_any_point_of_any_operation_at_any_place_is_a_pause() {
    let begun = Instant::now();
    let mut rig = Rig::new("table", 5_000);
    for _ in 0..32 {
        rig.run(Op::Write, PLAIN);
    }
    let mut faults = 0;
    for (name, point) in POINTS {
        for (op, flags) in OPS {
            for place in 0..PLACES {
                // A life dies in open or load only after another one died.
                let points: &[u32] = if point >= 16 { &[START, point] } else { &[point] };
                rig.doom(place, KILL, Some(op), points);
                rig.run(op, flags);
                let what = format!("{name}, {op} ({}), place {place}", flags.fua);
                // The answer may be there before its giver is dead.
                let end = Instant::now() + PATIENCE;
                while rig.failed(place) < points.len() as u32 {
                    assert!(Instant::now() < end, "never came there: {what}");
                    std::thread::sleep(Duration::from_micros(200));
                }
                rig.run(Op::Read, PLAIN);
                faults += points.len();
            }
        }
        rig.check();
    }
    ledger("filter kill -9 at each point x operation x place", faults, begun);
    rig.end();
}

#[test]
fn filters_killed_at_random_under_load_lose_and_change_nothing() {
    let begun = Instant::now();
    let kills = 40 * campaign();
    let mut rig = Rig::new("random", 5_000);
    let hosts: Vec<PathBuf> =
        (0..PLACES).map(|place| rig.folder.0.join(format!("doomed{place}.so"))).collect();
    let over = Arc::new(AtomicBool::new(false));
    let (ends, seed) = (over.clone(), 0x5eed);
    let killer = std::thread::spawn(move || {
        let (mut random, mut killed) = (seed, 0u64);
        while killed < kills as u64 {
            random = u64::wrapping_mul(random, 6_364_136_223_846_793_005).wrapping_add(1);
            std::thread::sleep(Duration::from_micros((random >> 33) % 20_000));
            let victim = &hosts[(random >> 20) as usize % PLACES];
            if let Some(pid) = host_of(victim) {
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                killed += u64::from(
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok(),
                );
            }
        }
        ends.store(true, Ordering::SeqCst);
    });
    let slots = BYTES / 4096;
    // Each slot of the disk has one request at a time: a write of a new byte, then a read.
    let mut busy = vec![None; slots];
    let mut tags = std::collections::HashMap::new();
    let mut round = 0u32;
    while !over.load(Ordering::SeqCst) || !tags.is_empty() {
        for (slot, busy) in busy.iter_mut().enumerate() {
            if busy.is_some() || over.load(Ordering::SeqCst) {
                continue;
            }
            round += 1;
            let at = slot * 4096;
            let op = if round.is_multiple_of(2) { Op::Write } else { Op::Read };
            let byte = round as u8 | 1;
            if op == Op::Write {
                rig.disk.fill(at, &[byte; 4096]);
            }
            let tag = rig.disk.submit(op, at as u64, 4096, at);
            *busy = Some((op, byte));
            tags.insert(tag.0, slot);
        }
        let Some((tag, status)) = rig.disk.wait_at_most(Duration::from_secs(20)) else {
            panic!("requests do not end: {:#?}", rig.log.0.lock().unwrap());
        };
        assert_eq!(status, Ok(()));
        let slot = tags.remove(&tag.0).expect("each request completes once");
        let at = slot * 4096;
        match busy[slot].take().unwrap() {
            (Op::Write, byte) => rig.model[at..at + 4096].fill(byte),
            _ => assert!(rig.disk.peek(at, 4096) == rig.model[at..at + 4096], "slot {slot}"),
        }
    }
    killer.join().unwrap();
    rig.check();
    ledger("filter kill -9 at random under load", kills, begun);
    rig.end();
}

/// The process of the filter host that runs `filter`, if there is one.
fn host_of(filter: &std::path::Path) -> Option<i32> {
    let own = std::process::id().to_string();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let is_ours = status.lines().any(|line| line == format!("PPid:\t{own}"));
        let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let names = args.get(1).is_some_and(|arg| *arg == filter.as_os_str().as_encoded_bytes());
        (is_ours && names).then_some(pid)
    })
}

#[test]
fn a_filter_that_hangs_is_killed_after_its_deadline_and_the_guest_sees_a_pause() {
    const DEADLINE_MS: u64 = 100;
    let begun = Instant::now();
    let mut rig = Rig::new("hang", DEADLINE_MS);
    let mut faults = 0;
    for round in 0..6 * campaign() {
        for how in [STOP, SPIN] {
            let place = round % PLACES;
            let (_, point) = POINTS[rig.below(15) as usize];
            let (op, flags) = OPS[rig.below(6) as usize];
            let answered = point == 7 || point == 15;
            rig.doom(place, how, Some(op), &[point]);
            let since = Instant::now();
            rig.run(op, flags);
            if !answered {
                assert!(since.elapsed() >= Duration::from_millis(DEADLINE_MS));
            }
            rig.run(Op::Write, PLAIN);
            assert_eq!(rig.failed(place), 1);
            faults += 1;
        }
    }
    rig.check();
    ledger("filter hang", faults, begun);
    rig.end();
}

#[test]
fn a_filter_that_fails_again_and_again_is_quarantined_with_one_alarm_and_comes_back() {
    let folder = Folder::new("quarantine");
    let log = Log::default();
    let crash = folder.filter("crates/upcall-worker/tests/data/probe.c", &[]);
    let params = vec![("mode".into(), "crash".into())];
    let holds = SlotConfig { on_failure: Some(OnFailure::Hold), params, ..slot(&crash) };
    let recovery = RecoveryPolicy {
        failures_max: 3,
        backoff_ms_min: 1,
        quarantine_ms: 50,
        ..RecoveryPolicy::default()
    };
    let stats = folder.0.join("stats");
    let config = WorkerConfig {
        disks: vec![memory_disk("a", 1 << 20, vec![holds])],
        stats: Some(stats.clone()),
        drain_ms: 100,
        recovery,
        log: log.sink(),
    };
    let worker = Worker::start(config).unwrap();
    let mut disk = Driver::new(&worker, 0, 0);
    disk.submit(Op::Write, 0, 512, 0);
    log.wait_for("is quarantined");
    assert_eq!(disk.wait_at_most(Duration::from_millis(300)), None, "no error, only latency");
    let page = upcall_stats::PageReader::open(&stats).unwrap();
    let end = Instant::now() + PATIENCE;
    while page.snapshot()[1].health.failures < 6 {
        assert!(Instant::now() < end, "it is not tried again");
        std::thread::sleep(Duration::from_millis(10));
    }
    let alarms =
        log.0.lock().unwrap().iter().filter(|line| line.contains("is quarantined")).count();
    assert_eq!(alarms, 1);
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(disk.wait().1.is_err());
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_bypassed_filters_gaps_are_beside_the_image_and_the_guest_sees_no_error() {
    let folder = Folder::new("bypass");
    let log = Log::default();
    let image = folder.0.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let crash = folder.filter("crates/upcall-worker/tests/data/probe.c", &[]);
    let params = vec![("mode".into(), "crash".into())];
    let disk = DiskConfig {
        store: StoreConfig::Raw { path: image.clone(), direct: false, engine: Engine::Auto },
        ..memory_disk("a", 1 << 20, vec![SlotConfig { params, ..slot(&crash) }])
    };
    let worker = start(vec![disk], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    assert_eq!(disk.write(0, &[7; 4096]), Ok(()));
    assert_eq!(disk.write(512 << 10, &[8; 4096]), Ok(()));
    assert_eq!(disk.read(0, 4096).unwrap(), vec![7; 4096]);
    log.wait_for("requests go past it");
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(worker.shutdown().failures.is_empty());
    let kept = std::fs::File::open(folder.0.join("disk.img.upcall")).unwrap();
    let report =
        upcall_gap::read(std::os::fd::AsFd::as_fd(&kept), "probe-0.gaps").unwrap().unwrap();
    let missed: Vec<u64> = report.gaps.iter().map(|gap| gap.offset).collect();
    assert_eq!(missed, [0, 512 << 10]);
}

#[test]
fn who_decides_data_cannot_be_bypassed_and_is_told_what_to_choose() {
    let folder = Folder::new("refused");
    let changes =
        folder.filter("crates/upcall-worker/tests/data/probe.c", &["-DSEES=6", "-DCHANGES=6"]);
    for policy in [OnFailure::Bypass, OnFailure::Detach] {
        let slot = SlotConfig { on_failure: Some(policy), ..slot(&changes) };
        let refused = try_start(vec![memory_disk("a", 1 << 20, vec![slot])], &Log::default());
        let Err(error) = refused else { panic!("it started") };
        assert!(error.to_string().contains("use on-failure=hold"), "{error}");
    }
}
