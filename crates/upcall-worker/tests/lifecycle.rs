//! How a worker starts, loses filter hosts, and ends: within bounds, leaving nothing behind,
//! and with every request completed once.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use upcall_block::{Errno, Op};
use upcall_store::testing::{Faults, FaultyStore};
use upcall_store::{MemoryStore, RawOptions, RawStore};
use upcall_worker::*;

const PROBE: &str = "crates/upcall-worker/tests/data/probe.c";

fn told(filter: &Path, mode: &str, value: u32) -> SlotConfig {
    let params = vec![("mode".into(), mode.into()), ("value".into(), value.to_string())];
    SlotConfig { params, ..slot(filter) }
}

/// The processes that have this filter loaded, with their maps. Not this one.
fn hosts_of(filter: &Path) -> Vec<(i32, String)> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let id: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).ok()?;
        (id != std::process::id() as i32 && maps.contains(filter.to_str()?)).then_some((id, maps))
    });
    processes.collect()
}

fn kill(id: i32) {
    let killed = std::process::Command::new("kill").args(["-9", &id.to_string()]).status();
    assert!(killed.unwrap().success());
}

#[test]
fn only_hosts_of_filters_that_ask_for_data_have_an_arena_mapped() {
    let folder = Folder::new("pages");
    let blind = folder.filter(PROBE, &[]);
    let observer = folder.filter(PROBE, &["-DSEES=6"]);
    let changer = folder.filter(PROBE, &["-DSEES=6", "-DCHANGES=6"]);
    let arena = |filter: &PathBuf| {
        let hosts = hosts_of(filter);
        assert_eq!(hosts.len(), 1, "{filter:?}");
        let line = hosts[0].1.lines().find(|line| line.contains("upcall-arena"));
        line.map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
    };
    let log = Log::default();
    let with_data = vec![slot(&blind), slot(&observer), slot(&changer)];
    let worker = start(vec![memory_disk("a", 1 << 20, with_data)], &log);
    assert_eq!(arena(&blind), None, "it asked for no data");
    assert_eq!(arena(&observer).as_deref(), Some("r--s"), "it may only look");
    assert_eq!(arena(&changer).as_deref(), Some("rw-s"));
    worker.shutdown();
    assert!(hosts_of(&blind).is_empty() && hosts_of(&changer).is_empty(), "all have ended");
}

#[test]
fn a_store_whose_flush_failed_fails_writes_and_flushes_from_then_on_but_not_reads() {
    let store: Arc<dyn upcall_block::Store> = Arc::new(FaultyStore::new(
        Arc::new(MemoryStore::new(1 << 20).unwrap()),
        Faults { failed_flush: Some(1), ..Faults::reordering(3) },
    ));
    let folder = Folder::new("flush");
    let watch = vec![told(&folder.filter(PROBE, &[]), "watch", 0)];
    let disk =
        DiskConfig { store: StoreConfig::Custom(store), queues: 2, ..memory_disk("a", 0, watch) };
    let worker = start(vec![disk], &Log::default());
    let (mut one, mut two) = (Driver::new(&worker, 0, 0), Driver::new(&worker, 0, 1));
    assert_eq!(one.write(0, &[1; 512]), Ok(()));
    assert_eq!(one.run(Op::Flush, 0, 0), Ok(()));
    assert_eq!(one.run(Op::Flush, 0, 0), Err(Errno::EIO));
    for disk in [&mut one, &mut two] {
        for _ in 0..3 {
            assert_eq!(disk.write(0, &[2; 512]), Err(Errno::EIO));
            assert_eq!(disk.run(Op::WriteZeroes, 0, 512), Err(Errno::EIO));
            assert_eq!(disk.run(Op::Flush, 0, 0), Err(Errno::EIO));
            assert_eq!(disk.read(0, 512).unwrap(), vec![1; 512]);
        }
    }
    let failures = worker.shutdown().failures;
    assert!(failures.len() == 1 && failures[0].contains("disk a"), "{failures:?}");
}

#[test]
fn a_filter_host_that_is_killed_at_any_moment_is_a_pause_for_its_disk_and_nothing_for_others() {
    let folder = Folder::new("sigkill");
    let (changer, other) =
        (folder.filter(PROBE, &["-DSEES=6", "-DCHANGES=6"]), folder.filter(PROBE, &[]));
    let mut random: u64 = 0x1234_5678;
    for round in 0..30 {
        let log = Log::default();
        let chain = vec![told(&other, "watch", 0), told(&changer, "add", 7)];
        let disks = vec![
            memory_disk("a", 1 << 20, chain),
            memory_disk("b", 1 << 20, vec![told(&other, "watch", 0)]),
        ];
        let worker = start(disks, &log);
        let (mut a, mut b) = (Driver::new(&worker, 0, 0), Driver::new(&worker, 1, 0));
        let victim = hosts_of(&changer)[0].0;
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let moment = Duration::from_micros((random >> 33) % 4000);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(moment);
            kill(victim);
        });
        let mut ended = std::collections::HashMap::new();
        let mut sent = Vec::new();
        for number in 0..400u64 {
            let op = if number % 2 == 0 { Op::Write } else { Op::Read };
            sent.push(a.submit(op, number % 200 * 4096, 4096, (number % 200 * 4096) as usize));
            if number % 8 == 0 {
                assert_eq!(b.write(0, &[round; 4096]), Ok(()));
                assert_eq!(b.read(0, 4096).unwrap(), vec![round; 4096]);
            }
        }
        for _ in &sent {
            let (tag, status) = a.wait();
            assert_eq!(status, Ok(()), "round {round}");
            assert!(ended.insert(tag.0, status).is_none(), "round {round}: {tag:?} ended twice");
        }
        killer.join().unwrap();
        log.wait_for("is gone");
        assert_eq!(ended.len(), sent.len());
        assert_eq!(a.wait_at_most(Duration::ZERO), None);
        assert_eq!(a.write(0, &[1; 512]), Ok(()));
        assert_eq!(a.read(0, 512).unwrap(), vec![1; 512], "never slipped past it");
        assert_eq!(a.run(Op::Flush, 0, 0), Ok(()));
        assert_eq!(b.write(4096, &[1; 512]), Ok(()));
        assert!(worker.shutdown().failures.is_empty());
    }
}

#[test]
fn a_shutdown_ends_queues_whose_requests_are_held_and_loses_nothing_that_was_acknowledged() {
    let folder = Folder::new("shutdown");
    let image = folder.0.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let blind = folder.filter(PROBE, &[]);
    let held = |name: &str, value| DiskConfig {
        queues: 3,
        ..memory_disk(name, 1 << 20, vec![told(&blind, "hold", value)])
    };
    let raw = DiskConfig {
        store: StoreConfig::Raw { path: image.clone(), direct: false, engine: Engine::Auto },
        queues: 3,
        ..held("raw", 50)
    };
    let worker = start(vec![held("a", 0), held("b", 0), raw], &Log::default());
    let mut drivers: Vec<Driver> = (0..3)
        .flat_map(|disk| (0..3).map(move |queue| (disk, queue)))
        .map(|(disk, queue)| Driver::new(&worker, disk, queue))
        .collect();
    for (number, driver) in drivers.iter_mut().enumerate() {
        for i in 0..20u64 {
            let at = (number as u64 % 3 * 20 + i) * 4096;
            driver.fill(i as usize * 4096, &[1 + number as u8; 4096]);
            driver.submit(Op::Write, at, 4096, i as usize * 4096);
        }
    }
    // They are taken from the queues, and held.
    std::thread::sleep(Duration::from_millis(20));
    let begun = Instant::now();
    assert!(worker.shutdown().failures.is_empty());
    assert!(begun.elapsed() < Duration::from_secs(2), "in parallel: {:?}", begun.elapsed());
    let bytes = std::fs::read(&image).unwrap();
    for (number, driver) in drivers.iter_mut().enumerate() {
        let mut statuses = Vec::new();
        while let Some((tag, status)) = driver.wait_at_most(Duration::ZERO) {
            if number >= 6 && status.is_ok() {
                let at = (number % 3 * 20 + tag.0 as usize) * 4096;
                assert!(bytes[at..at + 4096].iter().all(|byte| *byte == 1 + number as u8));
            }
            statuses.push(status);
        }
        // Those that end by themselves within the patience do; the others are cancelled.
        let expected = if number >= 6 { Ok(()) } else { Err(Errno::ECANCELED) };
        assert_eq!(statuses, vec![expected; 20], "driver {number}");
    }
}

#[test]
fn a_shutdown_ends_although_a_filter_gives_an_issued_request_never_back() {
    let folder = Folder::new("stuck");
    let copies = folder.filter(PROBE, &["-DSEES=6", "-DFLAGS=1"]);
    let blind = folder.filter(PROBE, &[]);
    let chain = vec![
        SlotConfig { order: 1, ..told(&copies, "copy", 0) },
        SlotConfig { order: 2, ..told(&blind, "stubborn", 0) },
    ];
    let worker = start(vec![memory_disk("a", 1 << 20, chain)], &Log::default());
    let mut disk = Driver::new(&worker, 0, 0);
    disk.submit(Op::Write, 0, 512, 0);
    assert_eq!(disk.wait_at_most(Duration::from_millis(100)), None);
    let begun = Instant::now();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        worker.shutdown();
        let _ = done.send(());
    });
    assert!(ended.recv_timeout(Duration::from_secs(20)).is_ok(), "it never ends");
    assert!(disk.wait().1.is_err(), "after {:?}", begun.elapsed());
    assert!(hosts_of(&blind).is_empty() && hosts_of(&copies).is_empty());
}

#[test]
fn a_worker_that_is_dropped_ends_too() {
    let folder = Folder::new("dropped");
    let blind = folder.filter(PROBE, &[]);
    let worker =
        start(vec![memory_disk("a", 1 << 20, vec![told(&blind, "hold", 0)])], &Log::default());
    let mut disk = Driver::new(&worker, 0, 0);
    disk.submit(Op::Write, 0, 512, 0);
    assert_eq!(disk.wait_at_most(Duration::from_millis(50)), None);
    assert_eq!(hosts_of(&blind).len(), 1);
    drop(worker);
    assert!(hosts_of(&blind).is_empty(), "no process stays behind");
}

#[test]
fn a_wrong_device_is_refused_before_filters_run_and_leaves_no_socket_and_no_process() {
    let folder = Folder::new("nothing");
    let blind = folder.filter(PROBE, &[]);
    let socket = folder.0.join("socket");
    let disk = |serial: &str, chain| DiskConfig {
        frontend: Some(FrontendConfig {
            socket: SocketSource::Path(socket.clone(), None),
            queue_size: 128,
            serial: serial.into(),
            write_cache: true,
        }),
        ..memory_disk("a", 1 << 20, chain)
    };
    let refused = |disks| match try_start(disks, &Log::default()) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    // Told to refuse to open, which is only found out when its code runs.
    let long = refused(vec![disk("much longer than twenty", vec![told(&blind, "refuse", 0)])]);
    assert!(long.contains("disk a") && long.contains("20 at most"), "{long}");
    assert!(!socket.exists() && hosts_of(&blind).is_empty());
    let open = refused(vec![disk("short", vec![told(&blind, "refuse", 0)])]);
    assert!(open.contains("probe"), "{open}");
    assert!(!socket.exists() && hosts_of(&blind).is_empty());
    // The second disk is wrong: the first leaves nothing either.
    let none = DiskConfig { queues: 0, ..memory_disk("b", 1 << 20, vec![slot(&blind)]) };
    assert!(refused(vec![disk("short", vec![]), none]).contains("0 queues"));
    assert!(!socket.exists());
    let worker = start(vec![disk("short", vec![slot(&blind)])], &Log::default());
    assert!(socket.exists());
    drop(worker);
    assert!(!socket.exists() && hosts_of(&blind).is_empty());
}

#[test]
fn large_zeroes_through_an_inline_filter_that_answers_at_once_need_little_stack() {
    let folder = Folder::new("deep");
    let cache =
        folder.filter(PROBE, &["-DSEES=6", "-DCHANGES=6", "-DANSWERS=4", "-DOPS=14", "-DCLASS=5"]);
    let chain = vec![SlotConfig { placement: Placement::Inline, ..told(&cache, "done-writes", 0) }];
    let disk =
        DiskConfig { store: StoreConfig::Null { bytes: 2 << 30 }, ..memory_disk("a", 0, chain) };
    let worker = start(vec![disk], &Log::default());
    let mut disk = Driver::new(&worker, 0, 0);
    assert_eq!(disk.run(Op::WriteZeroes, 0, 1 << 30), Ok(()));
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn what_was_written_is_in_the_image_when_the_worker_has_ended() {
    let folder = Folder::new("image");
    let image = folder.0.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let adds = folder.filter(PROBE, &["-DSEES=6", "-DCHANGES=6"]);
    let raw = StoreConfig::Raw { path: image.clone(), direct: false, engine: Engine::Auto };
    let disk = DiskConfig { store: raw, ..memory_disk("a", 0, vec![told(&adds, "add", 5)]) };
    let worker = start(vec![disk], &Log::default());
    let mut driver = Driver::new(&worker, 0, 0);
    assert_eq!(driver.write(4096, &[1; 4096]), Ok(()));
    assert!(worker.shutdown().failures.is_empty());
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 6));
    assert!(RawStore::open(RawOptions::new(&image)).is_ok(), "and nobody has it any more");
}

#[test]
fn only_a_disk_that_is_there_for_that_alone_can_be_granted() {
    let folder = Folder::new("grants");
    let copies = folder.filter(PROBE, &["-DSEES=6", "-DFLAGS=1"]);
    let granted = |name: &str, other: DiskConfig| {
        let slot = SlotConfig { grants: vec![name.into()], ..slot(&copies) };
        let disks = vec![memory_disk("a", 1 << 20, vec![slot]), other];
        try_start(disks, &Log::default()).map(drop).map_err(|error| error.to_string())
    };
    let other = || DiskConfig { queues: 0, ..memory_disk("b", 1 << 20, vec![]) };
    assert_eq!(granted("b", other()), Ok(()));
    let served = granted("b", memory_disk("b", 1 << 20, vec![])).unwrap_err();
    assert!(served.contains("\"b\"") && served.contains("served to a guest"), "{served}");
    let own = granted("a", other()).unwrap_err();
    assert!(own.contains("its own disk"), "{own}");
}

#[test]
fn a_filter_host_that_breaks_too_many_rules_is_killed() {
    let folder = Folder::new("rules");
    let blind = folder.filter(PROBE, &[]);
    let log = Log::default();
    let chain =
        vec![SlotConfig { on_failure: Some(OnFailure::Fail), ..told(&blind, "nonsense", 0) }];
    let worker = start(vec![memory_disk("a", 1 << 20, chain)], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    let first = hosts_of(&blind)[0].0;
    for _ in 0..20 {
        assert_eq!(disk.write(0, &[1; 512]), Err(Errno::EIO));
    }
    log.wait_for("it broke too many rules");
    wait_until("it is killed", || hosts_of(&blind).iter().all(|(host, _)| *host != first));
    assert!(worker.shutdown().failures.is_empty());
}
