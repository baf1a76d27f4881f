//! The sidecar, from the filter's service to the bytes of its file.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use common::{Worker, compile, data, filter, has_m32};
use upcall_filterhost::{FilterFile, Placement, params};

/// Where slot 1 begins.
const SLOT: u64 = 131_072;

fn keeper(macros: &[&str]) -> FilterFile {
    let arguments: Vec<&str> = ["-shared", "-fPIC"].iter().chain(macros).copied().collect();
    FilterFile::open(compile(&data("sidecar.c"), &arguments)).unwrap()
}

/// Opens an instance on `file` in a host of its own, and gives what it logged.
fn open_on(filter: &FilterFile, file: &File, placement: Placement) -> Vec<String> {
    let mut worker = Worker::loaded(filter, placement).unwrap();
    assert!(worker.description.wants_sidecar());
    worker.sidecar = Some(OwnedFd::from(file.try_clone().unwrap()));
    let params = params::resolve(&worker.description, &[]).unwrap();
    worker.open(0, &params).unwrap();
    let said = worker.lines.texts();
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
    said
}

fn state(file: &File) -> (u64, Vec<u8>, bool) {
    let state = upcall_state::parse(file).unwrap().unwrap();
    (state.sequence, state.bytes, state.is_doubled)
}

fn grows(filter: &FilterFile, placement: Placement) {
    let file = upcall_state::volatile().unwrap();
    let said = open_on(filter, &file, placement);
    assert_eq!(said, ["found 0", "wrote 0 synced 0"]);
    assert_eq!(state(&file), (1, b"o".to_vec(), true), "in both slots");
    let said = open_on(filter, &file, placement);
    assert_eq!(said, ["found 1 o", "wrote 0 synced 0"]);
    assert_eq!(state(&file), (2, b"oo".to_vec(), true));
}

#[test]
fn a_state_is_found_by_the_next_host_and_by_the_offline_reader() {
    grows(&keeper(&[]), Placement::Isolated);
}

#[test]
fn an_inline_filter_has_a_sidecar_too() {
    grows(&keeper(&[]), Placement::Inline);
}

#[test]
fn a_32_bit_filter_has_a_sidecar_too() {
    assert!(has_m32(), "install gcc-multilib");
    grows(&keeper(&["-m32"]), Placement::Isolated);
}

#[test]
fn a_torn_slot_gives_the_other_state_and_is_mended_before_the_filter_reads() {
    let filter = keeper(&[]);
    let file = upcall_state::volatile().unwrap();
    open_on(&filter, &file, Placement::Isolated);
    for (round, at) in [0, SLOT].into_iter().enumerate() {
        // As a crash in the middle of writing a slot leaves it.
        file.write_all_at(b"torn", at + 62).unwrap();
        let length = round + 1;
        let said = open_on(&filter, &file, Placement::Isolated);
        assert_eq!(said[0], format!("found {length} {}", "o".repeat(length)));
        assert!(state(&file).2, "both whole again");
    }
}

#[test]
fn of_two_whole_slots_the_newer_counts_and_is_doubled() {
    let filter = keeper(&[]);
    let file = upcall_state::volatile().unwrap();
    open_on(&filter, &file, Placement::Isolated);
    // As a crash between the two syncs leaves it: one slot is of the sync before.
    let old = upcall_state::volatile().unwrap();
    let mut bytes = vec![0; 64];
    old.read_exact_at(&mut bytes, 0).unwrap();
    for at in [0, SLOT] {
        file.write_all_at(&bytes, at).unwrap();
        let found = &open_on(&filter, &file, Placement::Isolated)[0];
        assert!(found.starts_with("found ") && found.ends_with('o'), "{found}");
    }
}

#[test]
fn a_state_in_no_whole_slot_is_told_as_an_error_until_a_new_one_is_written() {
    let file = upcall_state::volatile().unwrap();
    let damage = || {
        file.write_all_at(b"x", 1).unwrap();
        file.write_all_at(b"x", SLOT + 1).unwrap();
    };
    damage();
    let said = open_on(&keeper(&[]), &file, Placement::Isolated);
    assert!(said[0].contains("neither of its slots is whole"), "{said:?}");
    assert_eq!(said[1], "found -5");
    file.set_len(0).unwrap();
    let said = open_on(&keeper(&[]), &file, Placement::Isolated);
    assert_eq!(said[1], "found -5", "an empty file is damaged, not an empty state");
    let said = open_on(&keeper(&["-DFILL"]), &file, Placement::Isolated);
    assert_eq!(said[1..], ["found -5", "wrote 0 synced 0"]);
    assert_eq!(state(&file).1, b"o");
}

#[test]
fn a_sync_that_fails_is_told_and_leaves_the_state_before() {
    let filter = keeper(&[]);
    let file = upcall_state::volatile().unwrap();
    open_on(&filter, &file, Placement::Isolated);
    let before = state(&file);
    let file = read_only_copy(&file);
    let said = open_on(&filter, &file, Placement::Isolated);
    assert_eq!(said[0], "found 1 o");
    assert!(said[1].starts_with("wrote 0 synced -"), "{said:?}");
    assert_eq!(state(&file), before);
}

/// The same memory through a descriptor that cannot write: EBADF.
fn read_only_copy(file: &File) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

#[test]
fn a_filter_that_did_not_ask_for_one_has_none() {
    let filter = keeper(&["-DFLAGS=0"]);
    let mut worker = Worker::loaded(&filter, Placement::Isolated).unwrap();
    assert!(!worker.description.wants_sidecar());
    let params = params::resolve(&worker.description, &[]).unwrap();
    worker.open(0, &params).unwrap();
    assert_eq!(worker.lines.texts(), ["found -95"]);
}

#[test]
fn a_filter_that_was_built_with_the_header_of_1_0_is_loaded_and_lives() {
    let header = data("abi-1.0/upcall/filter.h");
    let old = filter(&["-include", header.to_str().unwrap()]);
    let mut worker = Worker::serving(&old, Placement::Isolated);
    assert_eq!(worker.description.abi, 0x1_0000);
    assert!(!worker.description.wants_sidecar());
    worker.host.event(0, 2).unwrap();
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
    let texts = worker.lines.texts();
    assert_eq!(texts[texts.len() - 2..], ["closed", "unloaded"]);
}
