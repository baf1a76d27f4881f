//! A filter that eats memory, descriptors, threads, the log or the processor: it is stopped at
//! its bound or by its deadline, and a disk with another filter in the same worker goes on.

mod common;

use std::time::{Duration, Instant};

use common::*;
use upcall_block::{Errno, Op};
use upcall_worker::*;

const PROBE: &str = "crates/upcall-worker/tests/data/probe.c";
const EATER: &str = "crates/upcall-worker/tests/data/eater.c";
const MEMORY_BYTES: u64 = 64 << 20;
/// How much the worker itself may grow: its two arenas and what is its own, and no more.
const GROWTH_MAX: u64 = 192 << 20;
/// For the other disk's requests, on a machine that is busy with the eater.
const GENEROUS: Duration = Duration::from_secs(15);

/// A disk that eats, and one that must not notice.
struct Table {
    worker: Worker,
    eats: Driver,
    other: Driver,
    log: Log,
    before_bytes: u64,
    folder: Folder,
}

impl Table {
    fn laid(mode: &str, more: SlotConfig) -> Table {
        let folder = Folder::new(&format!("bounds-{mode}"));
        let told = |filter, mode: &str, value: Option<&str>| SlotConfig {
            filter,
            params: std::iter::once(("mode".into(), mode.into()))
                .chain(value.map(|value| ("value".into(), value.into())))
                .collect(),
            ..slot("".as_ref())
        };
        let adds = folder.filter(PROBE, &["-DSEES=6", "-DCHANGES=6"]);
        let SlotConfig { filter, params, .. } = told(folder.filter(EATER, &[]), mode, None);
        let eats = SlotConfig { filter, params, ..more };
        let log = Log::default();
        let before_bytes = resident_bytes();
        let disks = vec![
            memory_disk("eats", 1 << 20, vec![eats]),
            memory_disk("other", 1 << 20, vec![told(adds, "add", Some("3"))]),
        ];
        let worker = start(disks, &log);
        let (eats, other) = (Driver::new(&worker, 0, 0), Driver::new(&worker, 1, 0));
        Table { worker, eats, other, log, before_bytes, folder }
    }

    /// The other disk does its work, rightly and in time, and the worker stays small.
    fn other_goes_on(&mut self) {
        let began = Instant::now();
        for round in 0..50u8 {
            assert_eq!(self.other.write(0, &[round; 4096]), Ok(()));
            assert_eq!(self.other.read(0, 4096).unwrap(), vec![round; 4096]);
        }
        assert!(began.elapsed() < GENEROUS, "it took {:?}", began.elapsed());
        let grown = resident_bytes().saturating_sub(self.before_bytes);
        assert!(grown < GROWTH_MAX, "the worker grew by {grown} bytes");
    }

    /// The eater's filter host.
    fn eater(&self) -> u32 {
        process_of(&self.folder.0.join("eater.so"))
    }

    fn cleared(self) {
        for disk in 0..2 {
            assert!(self.worker.stop_queue(disk, 0).is_some());
        }
        self.worker.shutdown();
    }
}

/// The filter host of a filter. It is started with its filter's path behind its name.
fn process_of(filter: &std::path::Path) -> u32 {
    let path = filter.display().to_string();
    let is_ours = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|words| String::from_utf8_lossy(&words).contains(&path))
    };
    let all = std::fs::read_dir("/proc").unwrap();
    let mut numbers = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    numbers.find(is_ours).expect("a filter host of it")
}

/// As long as it likes, and whoever needs it fails while it is gone.
fn patient() -> SlotConfig {
    SlotConfig {
        memory_bytes: Some(MEMORY_BYTES),
        deadline_ms: Some(0),
        on_failure: Some(OnFailure::Fail),
        ..slot("".as_ref())
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// What a filter that eats without end is told, and that it is the only one who is.
fn is_stopped_with(mode: &str, errno: Errno) {
    let mut table = Table::laid(mode, patient());
    assert_eq!(table.eats.run(Op::Read, 0, 4096), Err(errno), "{mode}");
    table.other_goes_on();
    // It is full, and still answers.
    assert_eq!(table.eats.run(Op::Read, 0, 4096), Err(errno), "{mode}");
    table.other_goes_on();
    table.cleared();
}

#[test]
fn a_filter_that_eats_memory_is_told_that_there_is_none() {
    is_stopped_with("memory", Errno::from_raw(12)); // ENOMEM
}

#[test]
fn a_filter_that_eats_descriptors_is_told_that_there_are_none() {
    is_stopped_with("descriptors", Errno::from_raw(24)); // EMFILE
}

#[test]
fn a_filter_that_eats_threads_is_told_that_there_are_none() {
    is_stopped_with("threads", Errno::from_raw(11)); // EAGAIN
}

#[test]
fn a_filter_that_dies_of_its_bound_is_its_own_disks_failure() {
    let mut table = Table::laid("die", patient());
    for _ in 0..3 {
        assert_eq!(table.eats.run(Op::Read, 0, 4096), Err(Errno::EIO));
        table.other_goes_on();
    }
    table.log.wait_for("SIGABRT");
    table.cleared();
}

#[test]
fn a_filter_that_floods_the_log_does_not_stop_its_disk_or_another() {
    let mut table = Table::laid("log", patient());
    let began = Instant::now();
    assert_eq!(table.eats.run(Op::Read, 0, 4096), Ok(()));
    std::thread::sleep(Duration::from_secs(1));
    table.other_goes_on();
    // A hundred a second, and how many were dropped; a second may have begun just before.
    let lines = table.log.0.lock().unwrap().len();
    let lines_max = 101 * (2 + began.elapsed().as_secs() as usize) + 10;
    assert!(lines <= lines_max, "{lines} lines in {:?}", began.elapsed());
    table.cleared();
}

#[test]
fn a_filter_that_spins_falls_to_its_deadline_and_others_go_on_meanwhile() {
    let mut table = Table::laid("spin", SlotConfig { deadline_ms: Some(1000), ..patient() });
    table.eats.submit(Op::Read, 0, 4096, 0);
    table.other_goes_on();
    assert_eq!(table.eats.wait().1, Err(Errno::EIO));
    table.other_goes_on();
    table.cleared();
}

#[test]
fn a_filter_that_takes_more_than_its_share_of_the_processor_gives_way() {
    let mut table = Table::laid("crowd", patient());
    let eater = table.eater();
    let own = niceness(std::process::id())[0];
    assert!(niceness(eater).iter().all(|nice| *nice == own));
    assert_eq!(table.eats.run(Op::Read, 0, 4096), Ok(()));
    table.log.wait_for("filter eater wants more of the processor");
    let threads = niceness(eater);
    assert!(threads.len() > 24 && threads.iter().all(|nice| *nice == 19), "{threads:?}");
    // Threads of other tests come and go meanwhile.
    let ours = niceness(std::process::id());
    assert!(ours.iter().all(|nice| *nice == own), "nobody else does: {ours:?}");
    table.other_goes_on();
    assert_eq!(table.eats.run(Op::Write, 0, 4096), Ok(()), "it has the rest");
    assert!(!table.log.contains("filter probe wants more"));
    table.cleared();
}

/// Of each thread of a process.
fn niceness(pid: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let nice = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let after_name = stat.rsplit_once(") ")?.1;
        after_name.split(' ').nth(16)?.parse().ok()
    });
    nice.collect()
}

#[test]
fn a_filter_cannot_raise_its_bounds_even_as_root() {
    is_stopped_with("raise", Errno::from_raw(1)); // EPERM
}

#[test]
fn a_filter_leaves_no_process_behind_that_could_write_to_what_the_next_one_has() {
    is_stopped_with("fork", Errno::from_raw(1)); // EPERM
    is_stopped_with("execute", Errno::from_raw(1));
}

#[test]
fn a_filter_neither_reaches_into_other_processes_nor_leaves_its_group() {
    is_stopped_with("reach", Errno::from_raw(1)); // EPERM
}

#[test]
fn a_filter_host_has_no_capability_that_lifts_a_bound_and_gains_none() {
    let table = Table::laid("nothing", patient());
    let status = std::fs::read_to_string(format!("/proc/{}/status", table.eater())).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    // About files and low ports: chown, DAC, fowner, fsetid, net-bind-service.
    let kept = 0b1_1111 & !(1 << 5) | 1 << 10;
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(of(set) & !kept, 0, "{set}");
    }
    if rustix::process::geteuid().is_root() {
        assert_eq!(of("CapBnd:") & !kept, 0);
    }
    assert_eq!((of("NoNewPrivs:"), of("Seccomp:")), (1, 2));
    table.cleared();
}

#[test]
fn the_bounds_of_a_filter_host_are_hard_ones() {
    let table = Table::laid("nothing", patient());
    let pid = table.eater();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let of = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[0], words[1], "{name}: soft and hard");
        words[0].parse::<u64>().unwrap()
    };
    // The threads of the filter host itself, and one for the only queue, come on top.
    assert_eq!(of("Max data size"), MEMORY_BYTES + 11 * (8 << 20));
    assert!((256..512).contains(&of("Max open files")));
    assert_eq!(of("Max core file size"), 0);
    assert_eq!(of("Max locked memory"), 64 << 10);
    assert_eq!(of("Max stack size"), 8 << 20);
    table.cleared();
}
