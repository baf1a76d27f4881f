//! Filters that keep a state: it is found again by the next worker, with the disk.

mod common;

use std::path::Path;

use common::*;
use upcall_state::{Folder as StateFolder, State};
use upcall_worker::*;

const KEEPER: &str = "crates/upcall-filterhost/tests/data/sidecar.c";

fn raw(image: &Path, chain: Vec<SlotConfig>) -> DiskConfig {
    let store = StoreConfig::Raw { path: image.to_owned(), direct: false, engine: Engine::Threads };
    DiskConfig { store, ..memory_disk("a", 0, chain) }
}

fn image(folder: &Folder, name: &str) -> std::path::PathBuf {
    let path = folder.0.join(name);
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    path
}

fn state(folder: &Path, name: &str) -> State {
    let folder = StateFolder::open_offline(folder).unwrap();
    folder.read_sidecar(name).unwrap().expect("there is one").expect("it is whole")
}

/// A worker's whole life, in which the byte is written to the disk.
fn write_once(disk: DiskConfig, byte: u8) {
    let worker = start(vec![disk], &Log::default());
    let mut driver = Driver::new(&worker, 0, 0);
    driver.write(0, &[byte; 512]).unwrap();
    assert!(worker.stop_queue(0, 0).is_some());
    assert!(worker.shutdown().failures.is_empty());
}

#[test]
fn a_state_outlives_the_worker_and_moves_with_the_image() {
    let folder = Folder::new("state-moves");
    let keeper = folder.filter(KEEPER, &[]);
    let a = image(&folder, "a.img");
    write_once(raw(&a, vec![slot(&keeper)]), b'1');
    write_once(raw(&a, vec![slot(&keeper)]), b'2');
    let kept = folder.0.join("a.img.upcall");
    assert_eq!(state(&kept, "keeper-0").bytes, b"o1o2");
    // To another place.
    let elsewhere = folder.0.join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::rename(&a, elsewhere.join("b.img")).unwrap();
    std::fs::rename(&kept, elsewhere.join("b.img.upcall")).unwrap();
    write_once(raw(&elsewhere.join("b.img"), vec![slot(&keeper)]), b'3');
    assert_eq!(state(&elsewhere.join("b.img.upcall"), "keeper-0").bytes, b"o1o2o3");
}

#[test]
fn what_is_answered_as_durable_is_found_after_the_worker_was_dropped_without_a_word() {
    let folder = Folder::new("state-dropped");
    let keeper = folder.filter(KEEPER, &[]);
    let a = image(&folder, "a.img");
    let worker = start(vec![raw(&a, vec![slot(&keeper)])], &Log::default());
    let mut driver = Driver::new(&worker, 0, 0);
    driver.write(0, &[b'x'; 512]).unwrap();
    drop(driver);
    drop(worker);
    assert_eq!(state(&folder.0.join("a.img.upcall"), "keeper-0").bytes, b"ox");
}

#[test]
fn instances_of_one_filter_have_states_of_their_own_whatever_their_order() {
    let folder = Folder::new("state-two");
    let keeper = folder.filter(KEEPER, &[]);
    let a = image(&folder, "a.img");
    let ordered = |order| SlotConfig { order, ..slot(&keeper) };
    let end = |chain| start(vec![raw(&a, chain)], &Log::default()).shutdown();
    end(vec![ordered(1)]);
    end(vec![ordered(5), ordered(2)]);
    end(vec![ordered(1), ordered(3)]);
    let kept = folder.0.join("a.img.upcall");
    assert_eq!(state(&kept, "keeper-0").bytes, b"ooo");
    assert_eq!(state(&kept, "keeper-1").bytes, b"oo");
}

#[test]
fn two_workers_never_share_a_state() {
    let folder = Folder::new("state-shared");
    let keeper = folder.filter(KEEPER, &[]);
    let (a, b) = (image(&folder, "a.img"), image(&folder, "b.img"));
    let place = Some(folder.0.join("kept"));
    let disk =
        |image: &Path| DiskConfig { state: place.clone(), ..raw(image, vec![slot(&keeper)]) };
    let worker = start(vec![disk(&a)], &Log::default());
    let Err(error) = try_start(vec![disk(&b)], &Log::default()) else { panic!("it started") };
    let said = error.to_string();
    assert!(said.contains("kept: in use by another process"), "{said}");
    worker.shutdown();
    start(vec![disk(&b)], &Log::default()).shutdown();
    assert_eq!(state(&folder.0.join("kept"), "keeper-0").bytes, b"oo");
}

#[test]
fn a_disk_in_memory_keeps_state_in_memory_and_says_so_unless_it_has_a_folder() {
    let folder = Folder::new("state-memory");
    let keeper = folder.filter(KEEPER, &[]);
    let log = Log::default();
    let disk = || memory_disk("a", 1 << 20, vec![slot(&keeper)]);
    start(vec![disk()], &log).shutdown();
    assert!(log.contains("the state of filter keeper is in memory"));
    let place = Some(folder.0.join("kept"));
    start(vec![DiskConfig { state: place, ..disk() }], &log).shutdown();
    assert_eq!(state(&folder.0.join("kept"), "keeper-0").bytes, b"o");
}

#[test]
fn a_filter_that_keeps_nothing_and_is_never_bypassed_leaves_no_folder() {
    let folder = Folder::new("state-none");
    let keeper = folder.filter(KEEPER, &["-DFLAGS=0"]);
    let a = image(&folder, "a.img");
    let held = SlotConfig { on_failure: Some(OnFailure::Hold), ..slot(&keeper) };
    start(vec![raw(&a, vec![held])], &Log::default()).shutdown();
    assert!(!folder.0.join("a.img.upcall").exists());
}
