//! A filter's state, handed from one instance to the next.

mod common;

use common::{Worker, compile, data, has_m32};
use upcall_filterhost::{FilterError, FilterFile, Placement, params};

fn filter(macros: &[&str]) -> FilterFile {
    let arguments: Vec<&str> = ["-shared", "-fPIC"].iter().chain(macros).copied().collect();
    FilterFile::open(compile(&data("state.c"), &arguments)).unwrap()
}

fn open(filter: &FilterFile, placement: Placement) -> Worker {
    let mut worker = Worker::loaded(filter, placement).unwrap();
    assert!(worker.description.has_save_state && worker.description.has_load_state);
    let params = params::resolve(&worker.description, &[]).unwrap();
    worker.open(0, &params).unwrap();
    worker
}

fn end(mut worker: Worker) {
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
}

fn hands_over(filter: &FilterFile, placement: Placement) {
    let mut first = open(filter, placement);
    let saved = first.host.save_state(0).unwrap().unwrap();
    assert_eq!(saved, b"new");
    end(first);
    let mut second = open(filter, placement);
    second.host.load_state(0, &saved).unwrap();
    assert_eq!(second.host.save_state(0).unwrap().unwrap(), b"new!");
    end(second);
}

#[test]
fn a_state_goes_from_one_instance_to_the_next() {
    hands_over(&filter(&[]), Placement::Isolated);
    hands_over(&filter(&[]), Placement::Inline);
    assert!(has_m32(), "install gcc-multilib");
    hands_over(&filter(&["-m32"]), Placement::Isolated);
}

#[test]
fn a_filter_may_have_nothing_to_hand_over_or_refuse() {
    let mut nothing = open(&filter(&["-DNOTHING"]), Placement::Isolated);
    assert_eq!(nothing.host.save_state(0).unwrap(), None);
    end(nothing);
    let mut refuses = open(&filter(&["-DREFUSES"]), Placement::Isolated);
    let said = refuses.host.save_state(0).unwrap_err();
    assert!(matches!(said, FilterError::Refused { errno: 16, .. }), "{said}");
    let said = refuses.host.load_state(0, &[b'x'; 100]).unwrap_err();
    assert!(matches!(said, FilterError::Refused { errno: 22, .. }), "{said}");
    end(refuses);
}

#[test]
fn a_state_longer_than_there_is_room_is_no_state() {
    let mut lies = open(&filter(&["-DLIES"]), Placement::Isolated);
    let said = lies.host.save_state(0).unwrap_err();
    assert!(matches!(said, FilterError::Refused { .. }), "{said}");
    end(lies);
}
