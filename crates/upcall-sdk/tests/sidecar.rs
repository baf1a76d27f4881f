//! The sidecar as a filter's author uses it, in the test host.
#![cfg(feature = "testing")]

use upcall_sdk::testing::Host;
use upcall_sdk::{Errno, Filter, Info, Instance, Op, OpSet, Request, Sidecar, Verdict};

/// Counts how often it was opened.
struct Starts(Instance);

impl Filter for Starts {
    const INFO: Info =
        Info { name: c"starts", ops: OpSet::of(&[Op::Read]), sidecar: true, ..Info::NEW };
    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        let mut starts = instance.sidecar().read()?;
        starts.push(b'x');
        instance.sidecar().write(&starts)?;
        instance.sidecar().sync()?;
        Ok(Starts(instance))
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        request.pass()
    }
}

/// Says that it keeps none.
struct None(Instance);

impl Filter for None {
    const INFO: Info = Info { name: c"none", ops: OpSet::of(&[Op::Read]), ..Info::NEW };
    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        Ok(None(instance))
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        request.pass()
    }
}

#[test]
fn a_state_is_found_again_by_the_next_instance() {
    let first = Host::<Starts>::builder().open().unwrap();
    assert_eq!(first.sidecar(), b"x");
    let second = Host::<Starts>::builder().sidecar(Ok(&first.sidecar())).open().unwrap();
    assert_eq!(second.sidecar(), b"xx");
}

#[test]
fn only_what_was_synced_is_durable() {
    let mut host = Host::<Starts>::builder().open().unwrap();
    let instance = host.filter().0.clone();
    instance.sidecar().write(b"new").unwrap();
    assert_eq!(host.sidecar(), b"x");
    assert_eq!(instance.sidecar().read().unwrap(), b"new");
    host.fail_sidecar_sync(Some(Errno::ENOSPC));
    assert_eq!(instance.sidecar().sync(), Err(Errno::ENOSPC));
    assert_eq!(host.sidecar(), b"x");
    host.fail_sidecar_sync(Option::None);
    instance.sidecar().sync().unwrap();
    assert_eq!(host.sidecar(), b"new");
}

#[test]
fn a_state_is_at_most_64_kib_and_a_damaged_one_is_told() {
    let host = Host::<Starts>::builder().open().unwrap();
    let sidecar = &host.filter().0;
    assert_eq!(sidecar.sidecar().write(&vec![0; Sidecar::MAX + 1]), Err(Errno::E2BIG));
    sidecar.sidecar().write(&vec![7; Sidecar::MAX]).unwrap();
    assert_eq!(sidecar.sidecar().read().unwrap(), vec![7; Sidecar::MAX]);
    let damaged = Host::<Starts>::builder().sidecar(Err(Errno::EIO)).open();
    assert_eq!(damaged.err(), Some(Errno::EIO));
}

#[test]
fn a_filter_that_did_not_ask_for_one_has_none() {
    let host = Host::<None>::builder().open().unwrap();
    let instance = &host.filter().0;
    assert_eq!(instance.sidecar().read(), Err(Errno::EOPNOTSUPP));
    assert_eq!(instance.sidecar().sync(), Err(Errno::EOPNOTSUPP));
}
