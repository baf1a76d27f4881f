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

/// Where a filter dies: a name, and what doomed.c calls it.
type Point = (&'static str, u32);

/// Points of the filter's own code, in its callbacks and after its answers.
const OF_FILTER: [Point; 15] = [
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
];
/// Points of the filter host's: what it was doing, and for what.
const OF_HOST: [Point; 23] = [
    ("start not taken", host(READY, 1)),
    ("start taken", host(TAKEN, 1)),
    ("verdict not in the ring", host(DECIDED, 1)),
    ("half of a verdict in the ring", host(PUTTING, 1)),
    ("verdict in the ring, worker not woken", host(PUT, 1)),
    ("start's place given back", host(RELEASED, 1)),
    ("done not taken", host(READY, 2)),
    ("done taken", host(TAKEN, 2)),
    ("done's verdict not in the ring", host(DECIDED, 2)),
    ("half of done's verdict in the ring", host(PUTTING, 2)),
    ("done's verdict in the ring", host(PUT, 2)),
    ("done's place given back", host(RELEASED, 2)),
    ("half of a hold in the ring", host(PUTTING, 3)),
    ("hold in the ring", host(PUT, 3)),
    ("half of an answer in the ring", host(PUTTING, 4)),
    ("answer in the ring", host(PUT, 4)),
    ("half of a request of its own in the ring", host(PUTTING, 5)),
    ("request of its own in the ring", host(PUT, 5)),
    ("end of its own request not taken", host(READY, 6)),
    ("end of its own request taken", host(TAKEN, 6)),
    ("end of its own request told", host(DECIDED, 6)),
    ("half of done's answer in the ring", host(PUTTING, 8)),
    ("done's answer in the ring", host(PUT, 8)),
];
/// Points of the beginning of a life.
const OF_LIFE: [Point; 7] = [
    ("arena", host(7, 0)),
    ("channel", host(8, 0)),
    ("load", 17),
    ("loaded", host(9, 0)),
    ("open", 16),
    ("opened", host(10, 0)),
    ("serving", host(11, 0)),
];
/// Points of its end in order.
const OF_END: [Point; 5] = [
    ("closing", host(12, 0)),
    ("close", 18),
    ("closed", host(13, 0)),
    ("quitting", host(14, 0)),
    ("unload", 19),
];
/// Points at which a request that it holds is cancelled.
const OF_CANCEL: [Point; 4] = [
    ("cancel not taken", host(READY, 7)),
    ("cancel taken", host(TAKEN, 7)),
    ("cancel", 20),
    ("cancelled", 21),
];
const READY: u32 = 1;
const TAKEN: u32 = 2;
const DECIDED: u32 = 3;
const PUTTING: u32 = 4;
const PUT: u32 = 5;
const RELEASED: u32 = 6;

const fn host(point: u32, phase: u32) -> u32 {
    100 + 20 * point + phase
}

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
    /// Always there, but while one follows another.
    worker: Option<Worker>,
    disk: Driver,
    /// What the guest must find.
    model: Vec<u8>,
    random: u64,
}

impl Rig {
    fn new(name: &str, deadline_ms: u64, drain_ms: u64) -> Rig {
        let folder = Folder::new(name);
        for place in 0..PLACES {
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
            std::fs::rename(built, kept).unwrap();
        }
        let image = folder.0.join("disk.img");
        std::fs::File::create(image).unwrap().set_len(BYTES as u64).unwrap();
        let log = Log::default();
        let worker = Rig::serve(&folder, &log, deadline_ms, drain_ms);
        let disk = Driver::new(&worker, 0, 0);
        Rig { folder, log, worker: Some(worker), disk, model: vec![0; BYTES], random: 1 }
    }

    /// A worker for the image and the filters of a folder.
    fn serve(folder: &Folder, log: &Log, deadline_ms: u64, drain_ms: u64) -> Worker {
        let chain = (0..PLACES).map(|place| SlotConfig {
            order: place as i32,
            deadline_ms: Some(deadline_ms),
            ..slot(&folder.0.join(format!("doomed{place}.so")))
        });
        // Deaths without end: quarantine is another test's.
        let recovery = RecoveryPolicy {
            failures_max: usize::MAX - 1,
            backoff_ms_min: 0,
            ..RecoveryPolicy::default()
        };
        let path = folder.0.join("disk.img");
        let disk = DiskConfig {
            store: StoreConfig::Raw { path, direct: false, engine: Engine::Auto },
            ..memory_disk("a", BYTES as u64, chain.collect())
        };
        let config = WorkerConfig {
            disks: vec![disk],
            stats: None,
            drain_ms,
            recovery,
            write_down: None,
            log: log.sink(),
        };
        Worker::start(config).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The worker ends in good order, and the next one serves.
    fn restart(&mut self, deadline_ms: u64, drain_ms: u64) {
        self.stop_queue();
        // The next one can begin only when the first has ended: it holds locks.
        assert!(self.worker.take().unwrap().shutdown().failures.is_empty());
        let worker = Rig::serve(&self.folder, &self.log, deadline_ms, drain_ms);
        self.disk = Driver::new(&worker, 0, 0);
        self.worker = Some(worker);
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

    fn word(&self, place: usize, index: u64) -> u32 {
        let mut word = [0; 4];
        self.trigger(place).read_exact_at(&mut word, 4 * index).unwrap();
        u32::from_ne_bytes(word)
    }

    /// How many of its points it has failed at.
    fn failed(&self, place: usize) -> u32 {
        self.word(place, 0)
    }

    /// Of the requests that are to be cancelled, how many it has.
    fn holds(&self, place: usize) -> u32 {
        self.word(place, 7)
    }

    /// Waits until it has failed so often: an answer may be there before its giver is dead.
    fn wait_failed(&self, place: usize, times: usize, what: &dyn Fn() -> String) {
        assert!(self.fails_within(PATIENCE, place, times), "never came there: {}", what());
    }

    fn fails_within(&self, patience: Duration, place: usize, times: usize) -> bool {
        let end = Instant::now() + patience;
        while self.failed(place) < times as u32 {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
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

    /// What was taken from the queue has ended by then.
    fn stop_queue(&self) {
        assert!(self.worker.as_ref().unwrap().stop_queue(0, 0).is_some());
    }

    fn end(self) {
        self.stop_queue();
        assert!(self.worker.unwrap().shutdown().failures.is_empty());
    }
}

#[test]
fn a_filter_killed_at_any_point_of_any_operation_at_any_place_is_a_pause() {
    let begun = Instant::now();
    let mut rig = Rig::new("table", 5_000, 300);
    for _ in 0..32 {
        rig.run(Op::Write, PLAIN);
    }
    // A life dies in its beginning only after another one died.
    let work = OF_FILTER.iter().chain(&OF_HOST).map(|(name, point)| (*name, vec![*point]));
    let lives = OF_LIFE.iter().map(|(name, point)| (*name, vec![START, *point]));
    let (mut cases, mut faults) = (0, 0);
    for (name, points) in work.chain(lives) {
        for (op, flags) in OPS {
            for place in 0..PLACES {
                rig.doom(place, KILL, Some(op), &points);
                // Its other thread may answer before the hold is said, and then there is none.
                let came_there = (0..20).any(|_| {
                    rig.run(op, flags);
                    rig.fails_within(Duration::from_millis(500), place, points.len())
                });
                let what = format!("{name}, {op} ({}), place {place}", flags.fua);
                assert!(came_there, "never came there: {what}");
                rig.run(Op::Read, PLAIN);
                cases += 1;
                faults += points.len();
            }
        }
        rig.check();
    }
    assert_eq!(cases, (OF_FILTER.len() + OF_HOST.len() + OF_LIFE.len()) * OPS.len() * PLACES);
    ledger("filter kill -9 at each point x operation x place", faults, begun);
    rig.end();
}

#[test]
fn a_filter_killed_while_a_request_that_it_holds_is_cancelled_ends_that_request_and_no_other() {
    let begun = Instant::now();
    let mut rig = Rig::new("cancel", 5_000, 5);
    let mut faults = 0;
    for (name, point) in OF_CANCEL {
        for (op, flags) in OPS {
            for place in 0..PLACES {
                let what = format!("{name}, {op}, place {place}");
                rig.doom(place, KILL, Some(op), &[point]);
                let length = if op == Op::Flush { 0 } else { 4096 };
                let tag = rig.disk.submit_flags(op, 0, length, 0, flags);
                while rig.holds(place) == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
                // The queue is stopped: what filters hold is cancelled after a while.
                rig.stop_queue();
                let (ended, status) = rig.disk.wait();
                assert_eq!(ended, tag, "{what}");
                assert!(status.is_err(), "{what}: it was held on its way down, and cancelled");
                rig.wait_failed(place, 1, &|| what.clone());
                rig.disk = Driver::new(rig.worker.as_ref().unwrap(), 0, 0);
                rig.run(Op::Write, PLAIN);
                faults += 1;
            }
        }
        rig.check();
    }
    ledger("filter kill -9 at each point of a cancel x operation x place", faults, begun);
    rig.end();
}

#[test]
fn a_filter_killed_while_its_worker_ends_costs_nothing_and_the_next_worker_serves() {
    let begun = Instant::now();
    let mut rig = Rig::new("closing", 5_000, 300);
    let mut faults = 0;
    for (name, point) in OF_END {
        for place in 0..PLACES {
            rig.run(Op::Write, PLAIN);
            rig.doom(place, KILL, None, &[point]);
            rig.restart(5_000, 300);
            rig.wait_failed(place, 1, &|| format!("{name}, place {place}"));
            rig.check();
            faults += 1;
        }
    }
    ledger("filter kill -9 at each point of its end x place", faults, begun);
    rig.end();
}

#[test]
fn filters_killed_at_random_under_load_lose_and_change_nothing() {
    let begun = Instant::now();
    let kills = 40 * campaign();
    let mut rig = Rig::new("random", 5_000, 300);
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
    let mut rig = Rig::new("hang", DEADLINE_MS, 300);
    let mut faults = 0;
    for round in 0..6 * campaign() {
        for how in [STOP, SPIN] {
            let place = round % PLACES;
            let at = rig.below((OF_FILTER.len() + OF_HOST.len()) as u64) as usize;
            let (name, point) = *OF_FILTER.iter().chain(&OF_HOST).nth(at).unwrap();
            let (op, flags) = OPS[rig.below(6) as usize];
            // What the guest waits for may be said by then, and the filter hang after it.
            let answered = [7, 15].contains(&point)
                || [1, 2, 4, 6, 8].map(|phase| host(PUT, phase)).contains(&point)
                || [1, 2].map(|phase| host(RELEASED, phase)).contains(&point)
                || point == host(DECIDED, 6);
            rig.doom(place, how, Some(op), &[point]);
            let since = Instant::now();
            rig.run(op, flags);
            let (took, what) = (since.elapsed(), format!("{name}, {op}, place {place}"));
            // The deadline begins with the queue thread's turn: if that lost its core meanwhile,
            // before the guest's request came.
            assert!(answered || took >= Duration::from_millis(DEADLINE_MS / 2), "{what}: {took:?}");
            rig.run(Op::Write, PLAIN);
            assert_eq!(rig.failed(place), 1, "{what}");
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
        write_down: None,
        log: log.sink(),
    };
    let worker = Worker::start(config).unwrap();
    let mut disk = Driver::new(&worker, 0, 0);
    disk.submit(Op::Write, 0, 512, 0);
    log.wait_for("is quarantined");
    assert_eq!(disk.wait_at_most(Duration::from_millis(300)), None, "no error, only latency");
    let page = upcall_stats::PageReader::open(&stats).unwrap();
    wait_until("it is tried again", || page.snapshot()[1].health.failures >= 6);
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
