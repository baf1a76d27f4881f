//! A worker without filters: requests go straight to the store and back.

mod common;

use common::*;
use upcall_block::{Errno, Op};
use upcall_worker::*;

#[test]
fn what_was_written_is_read_until_it_is_zeroed() {
    let log = Log::default();
    let worker = start(vec![memory_disk("a", 1 << 20, Vec::new())], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    let bytes: Vec<u8> = (0..8192).map(|i| (i * 7) as u8).collect();
    assert_eq!(disk.write(4096, &bytes), Ok(()));
    assert_eq!(disk.run(Op::Flush, 0, 0), Ok(()));
    assert_eq!(disk.read(4096, 8192).unwrap(), bytes);
    assert_eq!(disk.run(Op::WriteZeroes, 4096, 4096), Ok(()));
    assert_eq!(disk.run(Op::Discard, 8192, 512), Ok(()));
    let now = disk.read(4096, 8192).unwrap();
    assert!(now[..4608].iter().all(|byte| *byte == 0));
    assert_eq!(now[4608..], bytes[4608..]);
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_queue_that_stops_ends_all_that_it_took() {
    let log = Log::default();
    let worker = start(vec![memory_disk("a", 1 << 20, Vec::new())], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    for i in 0..500 {
        disk.submit(Op::Write, i * 512, 512, 0);
    }
    assert!(worker.stop_queue(0, 0).is_some());
    let mut ended = 0;
    while disk.wait_at_most(std::time::Duration::ZERO).is_some() {
        ended += 1;
    }
    assert!(ended <= 500);
    // What was not taken is still there for whoever serves the queue next.
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_wrong_configuration_is_refused_by_name() {
    let log = Log::default();
    let refused = |disks: Vec<DiskConfig>| match try_start(disks, &log) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    assert!(refused(vec![]).contains("no disk"));
    let twice = vec![memory_disk("a", 512, vec![]), memory_disk("a", 512, vec![])];
    assert!(refused(twice).contains("two disks are called \"a\""));
    assert!(refused(vec![memory_disk("a/b", 512, vec![])]).contains("no name for a disk"));
    let odd = refused(vec![memory_disk("odd", 513, vec![])]);
    assert!(odd.contains("disk odd") && odd.contains("513"), "{odd}");
    let many = refused(vec![DiskConfig { queues: 65, ..memory_disk("q", 512, vec![]) }]);
    assert!(many.contains("65 queues"), "{many}");
    let missing = StoreConfig::Raw {
        path: "/nonexistent/disk.img".into(),
        direct: true,
        engine: Engine::Auto,
    };
    let missing = refused(vec![DiskConfig { store: missing, ..memory_disk("m", 512, vec![]) }]);
    assert!(missing.contains("/nonexistent/disk.img"), "{missing}");
    let filter =
        refused(vec![memory_disk("f", 512, vec![slot(std::path::Path::new("/nonexistent/f.so"))])]);
    assert!(filter.contains("disk f") && filter.contains("/nonexistent/f.so"), "{filter}");
}

#[test]
fn a_read_only_disk_says_so_above() {
    let log = Log::default();
    let disk = DiskConfig { read_only: true, ..memory_disk("a", 1 << 20, Vec::new()) };
    let worker = start(vec![disk], &log);
    assert!(worker.disks()[0].info.read_only);
    let mut disk = Driver::new(&worker, 0, 0);
    assert_eq!(disk.read(0, 512).unwrap(), vec![0; 512]);
    assert_eq!(disk.write(0, &[1; 512]), Err(Errno::EROFS));
    assert!(worker.stop_queue(0, 0).is_some());
    worker.shutdown();
}
