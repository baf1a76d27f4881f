//! Chains change while a load runs: no request fails, no byte is wrong, and the chain is the
//! old or the new one.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use common::*;
use upcall_block::Op;
use upcall_worker::*;

const SOURCE: &str = "crates/upcall-worker/tests/data/changing.c";
const BYTES: usize = 256 << 10;

/// Filters of two versions.
struct Filters {
    folder: Folder,
    changer: [PathBuf; 2],
    watcher: [PathBuf; 2],
}

impl Filters {
    fn new(name: &str) -> Filters {
        let folder = Folder::new(name);
        let built = |flags: &[&str]| folder.filter(SOURCE, flags);
        let changer = [built(&["-DCHANGES"]), built(&["-DCHANGES", "-DVERSION=\"2\""])];
        let watcher = [built(&[]), built(&["-DVERSION=\"2\""])];
        Filters { folder, changer, watcher }
    }
}

fn bad(filter: &Path, how: &str) -> SlotConfig {
    SlotConfig { params: vec![("bad".into(), how.into())], ..slot(filter) }
}

/// A load on one disk, by a thread: each byte that is read is what was written last, and every
/// request succeeds.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<(u64, Driver)>,
}

impl Load {
    fn start(mut disk: Driver) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ends, counts) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            let mut rounds = 0u64;
            while !ends.load(Ordering::SeqCst) {
                round(&mut disk, rounds);
                rounds += 1;
                counts.fetch_add(64, Ordering::SeqCst);
            }
            (rounds, disk)
        });
        Load { stop, done, thread }
    }

    /// Waits until so many more requests are done.
    fn wait_for(&self, requests: u64) {
        let until = self.done.load(Ordering::SeqCst) + requests;
        wait_until("the load goes on", || {
            assert!(!self.thread.is_finished(), "the load has failed");
            self.done.load(Ordering::SeqCst) >= until
        });
    }

    fn end(self) -> (u64, Driver) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap_or_else(|_| panic!("the load saw an error or a wrong byte"))
    }
}

/// 32 writes at once, and 32 reads at once that see them.
fn round(disk: &mut Driver, number: u64) {
    const BLOCK: usize = 4096;
    let value = |block: usize| (number as usize * 7 + block * 3) as u8;
    for (op, expected) in [(Op::Write, true), (Op::Read, false)] {
        for block in 0..32 {
            let bytes = if expected { vec![value(block); BLOCK] } else { vec![0xee; BLOCK] };
            disk.fill(block * BLOCK, &bytes);
            disk.submit(op, (block * BLOCK) as u64, BLOCK as u32, block * BLOCK);
        }
        for _ in 0..32 {
            assert_eq!(disk.wait().1, Ok(()), "round {number} {op}");
        }
    }
    for block in 0..32 {
        assert_eq!(disk.peek(block * BLOCK, BLOCK), vec![value(block); BLOCK], "round {number}");
    }
}

/// A disk with a chain, under load.
struct Table {
    log: Log,
    worker: Worker,
    load: Load,
}

impl Table {
    fn new(chain: Vec<SlotConfig>) -> Table {
        let log = Log::default();
        let worker = start(vec![memory_disk("a", BYTES as u64, chain)], &log);
        let load = Load::start(Driver::new(&worker, 0, 0));
        load.wait_for(64);
        Table { log, worker, load }
    }

    fn change(&self, edits: Vec<Edit>) -> Result<Changed, ChangeError> {
        let mut change = ChainChange::of("a", edits);
        change.trial.ms = 200;
        let changed = self.worker.chains().change(&change);
        eprintln!("{changed:?}");
        self.load.wait_for(128);
        changed
    }

    fn names(&self) -> Vec<String> {
        self.worker.chains().chains()[0].slots.iter().map(|slot| slot.name.clone()).collect()
    }

    /// What filters logged of what happened to them.
    fn events(&self) -> Vec<String> {
        let lines = self.log.0.lock().unwrap().clone();
        let events = lines.iter().filter_map(|line| line.split_once("event "));
        events.map(|(_, event)| event.to_owned()).collect()
    }

    fn end(self) {
        let (rounds, disk) = self.load.end();
        assert!(rounds > 3);
        drop(disk);
        assert!(self.worker.stop_queue(0, 0).is_some());
        assert_eq!(self.worker.shutdown().failures, [""; 0]);
    }
}

fn attach(config: SlotConfig) -> Edit {
    Edit::Attach(config)
}

fn detach(slot: &str) -> Edit {
    Edit::Detach { slot: slot.into() }
}

fn replace(slot: &str, filter: &Path) -> Edit {
    Edit::Replace { slot: slot.into(), filter: Some(filter.into()), params: Vec::new() }
}

fn set_params(slot: &str, name: &str, value: &str) -> Edit {
    let params = vec![(name.to_owned(), value.to_owned())];
    Edit::Replace { slot: slot.into(), filter: None, params }
}

#[test]
fn filters_come_and_go_under_load_and_hear_of_it_in_order() {
    let filters = Filters::new("come");
    let table = Table::new(vec![]);
    let changed = table.change(vec![attach(slot(&filters.watcher[0]))]).unwrap();
    assert_eq!(changed.disks[0].after, ["watcher-0"]);
    assert_eq!((changed.disks[0].generation, changed.disks[0].before.len()), (2, 0));
    table.change(vec![attach(slot(&filters.watcher[1]))]).unwrap();
    assert_eq!(table.names(), ["watcher-0", "watcher-1"]);
    table.change(vec![detach("watcher-0")]).unwrap();
    assert_eq!(table.names(), ["watcher-1"]);
    table.change(vec![detach("watcher")]).unwrap();
    assert_eq!(table.names(), [""; 0]);
    let hops = table.worker.chains().hops();
    assert_eq!(hops.len(), 2, "only the request and the store are left");
    assert_eq!(
        table.events(),
        [
            "open 1", "attach", // the first one
            "stun", "open 2", "attach", "unstun", // the second
            "stun", "stun", "detach", "close 1", "unstun", // the first one leaves
            "stun", "detach", "close 2", // and the second
        ]
    );
    table.end();
}

#[test]
fn a_filter_is_replaced_under_load_and_its_state_goes_on() {
    let filters = Filters::new("replace");
    let table = Table::new(vec![slot(&filters.changer[0])]);
    for round in 0..6 {
        let version = &filters.changer[(round + 1) % 2];
        let changed = table.change(vec![replace("changer", version)]).unwrap();
        assert_eq!(changed.disks[0].after, ["changer-0"]);
    }
    table.change(vec![set_params("changer-0", "bad", "nothing")]).unwrap();
    // What the instances counted of the requests, one after the other, misses none of them.
    let events = table.events();
    let loads: Vec<u64> = events
        .iter()
        .filter_map(|event| event.strip_prefix("load "))
        .map(|event| event.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(loads.len(), 7, "{events:?}");
    assert!(loads.is_sorted_by(|a, b| a < b), "{loads:?}");
    let closes = events.iter().filter(|event| event.starts_with("close")).count();
    assert_eq!(closes, 7);
    for pair in events.windows(2).filter(|pair| pair[0].starts_with("close")) {
        assert!(pair[1].starts_with("open"), "no two instances at once: {events:?}");
    }
    let (rounds, disk) = table.load.end();
    drop(disk);
    let hops = table.worker.chains().hops();
    assert_eq!(hops[1].counters.iter().find(|(name, _)| name == "seen").map(|_| ()), Some(()));
    assert_eq!(hops[1].block.total().requests, rounds * 64, "the hop counts all instances");
    assert!(table.worker.stop_queue(0, 0).is_some());
    table.worker.shutdown();
}

#[test]
fn a_new_filter_that_is_bad_in_any_way_leaves_everything_as_it_was() {
    let filters = Filters::new("bad");
    let table = Table::new(vec![slot(&filters.changer[0]), slot(&filters.watcher[0])]);
    let names = table.names();
    for how in ["refuse-open", "die-open", "hang-open", "refuse-attach"] {
        let said = table.change(vec![attach(bad(&filters.watcher[1], how))]).unwrap_err();
        assert!(
            matches!(said, ChangeError::RolledBack { at: FailedAt::Enter, .. }),
            "{how}: {said}"
        );
        assert_eq!(table.names(), names, "{how}");
    }
    for how in ["refuse-open", "die-open", "hang-open", "refuse-state"] {
        let said = table.change(vec![set_params("changer", "bad", how)]).unwrap_err();
        assert!(
            matches!(said, ChangeError::RolledBack { at: FailedAt::Enter, .. }),
            "{how}: {said}"
        );
        assert_eq!(table.names(), names, "{how}");
    }
    assert_eq!(table.worker.chains().chains()[0].generation, 1);
    table.end();
}

#[test]
fn a_new_filter_that_fails_in_its_trial_is_taken_back_and_its_requests_go_on_with_the_old_one() {
    let filters = Filters::new("trial");
    let table = Table::new(vec![
        SlotConfig { deadline_ms: Some(100), ..slot(&filters.changer[0]) },
        slot(&filters.watcher[0]),
    ]);
    let names = table.names();
    for how in ["die", "die-later", "die-done", "hang", "fail", "nonsense"] {
        let said = table.change(vec![set_params("changer", "bad", how)]).unwrap_err();
        assert!(matches!(said, ChangeError::TrialFailed { .. }), "{how}: {said}");
        assert_eq!(table.names(), names, "{how}");
        eprintln!("{how}: {said}");
        let new = SlotConfig { deadline_ms: Some(100), ..bad(&filters.watcher[1], how) };
        let said = table.change(vec![attach(new)]).unwrap_err();
        assert!(matches!(said, ChangeError::TrialFailed { .. }), "{how}: {said}");
        assert_eq!(table.names(), names, "{how}");
    }
    table.end();
}

#[test]
fn order_and_policies_change_under_load_without_a_new_instance() {
    let filters = Filters::new("order");
    let two = [0, 1].map(|order| SlotConfig { order, ..slot(&filters.watcher[0]) });
    let table = Table::new(two.into());
    assert_eq!(table.names(), ["watcher-0", "watcher-1"]);
    let set = |slot: &str, order, on_failure| Edit::Set {
        slot: slot.into(),
        order,
        deadline_ms: Some(777),
        on_failure,
    };
    table.change(vec![set("watcher-0", Some(5), Some(OnFailure::Fail))]).unwrap();
    assert_eq!(table.names(), ["watcher-1", "watcher-0"]);
    let view = &table.worker.chains().chains()[0].slots[1];
    assert_eq!((view.deadline_ms, view.on_failure), (777, OnFailure::Fail));
    assert!(!table.events().iter().any(|event| event.starts_with("close")));
    table.end();
}

#[test]
fn what_cannot_be_is_refused_before_anything_happens() {
    let filters = Filters::new("refused");
    let table = Table::new(vec![slot(&filters.watcher[0])]);
    let missing = filters.folder.0.join("none.so");
    for (edits, says) in [
        (vec![detach("nobody")], "is no slot of its chain; its slots are: watcher-0"),
        (vec![attach(slot(&missing))], "none.so"),
        (vec![attach(slot(Path::new("/bin/true")))], "true"),
        (vec![set_params("watcher", "colour", "red")], "colour"),
        (vec![replace("watcher", &filters.changer[0])], "cannot take the place of filter watcher"),
        (vec![detach("watcher"), detach("watcher-0")], "named twice"),
        (vec![attach(slot(&filters.changer[0]))], "discard"),
        (
            vec![attach(SlotConfig { grants: vec!["b".into()], ..slot(&filters.watcher[0]) })],
            "granted",
        ),
        (
            vec![attach(SlotConfig { name: Some("../x".into()), ..slot(&filters.watcher[0]) })],
            "no name",
        ),
    ] {
        let said = table.change(edits.clone()).unwrap_err();
        assert!(matches!(said, ChangeError::Refused { .. } | ChangeError::NoSlot { .. }), "{said}");
        assert!(said.to_string().contains(says), "{edits:?}: {said}");
    }
    let dry = ChainChange {
        is_dry_run: true,
        ..ChainChange::of("a", vec![attach(slot(&filters.watcher[1]))])
    };
    let would = table.worker.chains().change(&dry).unwrap();
    assert_eq!(would.disks[0].after, ["watcher-0", "watcher-1"]);
    assert!(would.is_dry_run && table.names() == ["watcher-0"]);
    let generation = table.worker.chains().chains()[0].generation;
    assert_eq!(generation, 1);
    table.end();
}

#[test]
fn filters_that_stay_and_do_not_acknowledge_fall_under_their_policy_or_refuse() {
    let filters = Filters::new("ack");
    let table = Table::new(vec![
        bad(&filters.changer[0], "refuse-stun"),
        bad(&filters.watcher[0], "hang-stun"),
    ]);
    let new = || vec![attach(slot(&filters.watcher[1]))];
    let said = table.change(new()).unwrap_err();
    assert!(matches!(said, ChangeError::RolledBack { at: FailedAt::Leave, .. }), "{said}");
    // The one that hangs is killed, and started again; the one that refuses goes on.
    table.log.wait_for("serves again");
    table.change(vec![set_params("changer", "bad", "no")]).unwrap_err();
    table.end();
}

#[test]
fn two_disks_change_together_or_not_at_all() {
    let filters = Filters::new("two");
    let disk = |name| memory_disk(name, BYTES as u64, vec![slot(&filters.changer[0])]);
    let worker = start(vec![disk("a"), disk("b")], &Log::default());
    let loads: Vec<Load> =
        (0..2).map(|index| Load::start(Driver::new(&worker, index, 0))).collect();
    let both = |edits: [Vec<Edit>; 2]| {
        let [a, b] = edits;
        let mut change = ChainChange::of("a", a);
        change.disks.push(DiskChange { disk: "b".into(), edits: b });
        change.trial.ms = 200;
        loads.iter().for_each(|load| load.wait_for(64));
        let changed = worker.chains().change(&change);
        loads.iter().for_each(|load| load.wait_for(64));
        changed
    };
    let upgrade = || vec![replace("changer", &filters.changer[1])];
    both([upgrade(), upgrade()]).unwrap();
    let generations = || {
        let chains = worker.chains().chains();
        [0, 1].map(|disk| (chains[disk].slots[0].version.clone(), chains[disk].generation))
    };
    assert_eq!(generations(), [("2".to_owned(), 2), ("2".to_owned(), 2)]);
    let bad = || vec![set_params("changer", "bad", "refuse-open")];
    assert!(both([upgrade(), bad()]).is_err());
    assert!(both([bad(), upgrade()]).is_err());
    let dies = || vec![set_params("changer", "bad", "die")];
    let said = both([upgrade(), dies()]).unwrap_err();
    assert!(matches!(said, ChangeError::TrialFailed { .. }), "{said}");
    assert_eq!(generations(), [("2".to_owned(), 4), ("2".to_owned(), 4)], "changed and back");
    for load in loads {
        load.end();
    }
    worker.stop_queue(0, 0);
    worker.stop_queue(1, 0);
    worker.shutdown();
}

#[test]
fn a_filter_that_is_dead_for_good_is_replaced_while_requests_wait_for_it() {
    let filters = Filters::new("dead");
    let log = Log::default();
    let dies = bad(&filters.changer[0], "die");
    let worker = start(vec![memory_disk("a", BYTES as u64, vec![dies])], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    disk.fill(0, &[5; 4096]);
    let tag = disk.submit(Op::Write, 0, 4096, 0);
    log.wait_for("quarantined");
    let waiting = worker.chains().in_flight(0);
    assert_eq!(waiting.len(), 1);
    assert_eq!(waiting[0].place, Place::AwaitsFilter { slot: "changer-0".into() });
    worker
        .chains()
        .change(&ChainChange::of("a", vec![set_params("changer", "bad", "no")]))
        .unwrap();
    assert_eq!(disk.wait(), (tag, Ok(())));
    assert_eq!(disk.read(0, 4096).unwrap(), [5; 4096]);
    worker.stop_queue(0, 0);
    worker.shutdown();
}

/// Who waits for its time to be started again is not, while who takes its place opens.
#[test]
fn of_a_slot_whose_filter_is_dead_no_two_instances_are_ever_open() {
    let filters = Filters::new("two");
    let log = Log::default();
    let dies = bad(&filters.changer[0], "die");
    let worker = start(vec![memory_disk("a", BYTES as u64, vec![dies])], &log);
    let mut disk = Driver::new(&worker, 0, 0);
    disk.fill(0, &[5; 4096]);
    let tag = disk.submit(Op::Write, 0, 4096, 0);
    // It is started again 10, 20, 40 and 80 ms after its deaths.
    let opened =
        |log: &Log| log.0.lock().unwrap().iter().filter(|l| l.contains("event open ")).count();
    wait_until("it is started again", || opened(&log) >= 4);
    let change = ChainChange::of("a", vec![set_params("changer", "bad", "slow-open")]);
    // One that is just being started is waited for, by whoever asked.
    wait_until("it is replaced", || match worker.chains().change(&change) {
        Ok(_) => true,
        Err(error) => {
            assert!(error.to_string().contains("just being started"), "{error}");
            false
        }
    });
    assert_eq!(disk.wait(), (tag, Ok(())));
    let lines = log.0.lock().unwrap().clone();
    let opening = lines.iter().position(|line| line.contains("event opening 1")).unwrap();
    let after = lines[opening..].iter().filter(|line| line.contains("event open 1")).count();
    assert_eq!(after, 1, "{lines:#?}");
    worker.stop_queue(0, 0);
    worker.shutdown();
}

#[test]
fn a_chain_is_written_down_before_it_takes_effect_and_not_changed_if_it_cannot_be() {
    use std::sync::Mutex;
    let filters = Filters::new("written");
    let written: Arc<Mutex<Vec<Vec<String>>>> = Arc::default();
    let refuses = Arc::new(AtomicBool::new(false));
    let (notes, fails) = (written.clone(), refuses.clone());
    let write_down: WriteDown = Arc::new(move |chains: &[(String, Vec<SlotConfig>)]| {
        if fails.load(Ordering::SeqCst) {
            return Err("no paper".into());
        }
        let names = chains[0].1.iter().map(|slot| slot.name.clone().unwrap()).collect();
        notes.lock().unwrap().push(names);
        Ok(())
    });
    let disks = vec![memory_disk("a", BYTES as u64, vec![slot(&filters.watcher[0])])];
    let config = WorkerConfig { write_down: Some(write_down), ..config(disks, &Log::default()) };
    let worker = Worker::start(config).unwrap();
    let load = Load::start(Driver::new(&worker, 0, 0));
    let change = |edits| worker.chains().change(&ChainChange::of("a", edits));
    change(vec![attach(slot(&filters.watcher[1]))]).unwrap();
    change(vec![detach("watcher-0")]).unwrap();
    refuses.store(true, Ordering::SeqCst);
    let said = change(vec![detach("watcher-1")]).unwrap_err();
    assert!(matches!(said, ChangeError::RolledBack { at: FailedAt::Commit, .. }), "{said}");
    assert_eq!(*written.lock().unwrap(), [vec!["watcher-0", "watcher-1"], vec!["watcher-1"]]);
    load.end();
    worker.stop_queue(0, 0);
    worker.shutdown();
}

/// A slow disk may keep both the guest's requests and what is written down.
#[test]
fn a_filter_that_fails_while_its_chain_is_written_down_is_taken_back() {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;
    let filters = Filters::new("late");
    let written: Arc<Mutex<Vec<usize>>> = Arc::default();
    let (notes, (writing, is_writing), (go_on, may_go_on)) =
        (written.clone(), channel(), channel());
    let (writing, may_go_on) = (Mutex::new(writing), Mutex::new(may_go_on));
    let write_down: WriteDown = Arc::new(move |chains: &[(String, Vec<SlotConfig>)]| {
        let mut written = notes.lock().unwrap();
        written.push(chains[0].1.len());
        if written.len() == 1 {
            writing.lock().unwrap().send(()).unwrap();
            may_go_on.lock().unwrap().recv().unwrap();
        }
        Ok(())
    });
    let disks = vec![memory_disk("a", BYTES as u64, vec![])];
    let config = WorkerConfig { write_down: Some(write_down), ..config(disks, &Log::default()) };
    let worker = Worker::start(config).unwrap();
    let mut disk = Driver::new(&worker, 0, 0);
    let mut change = ChainChange::of("a", vec![attach(bad(&filters.watcher[0], "fail"))]);
    change.trial.ms = 1;
    let said = std::thread::scope(|scope| {
        let changing = scope.spawn(|| worker.chains().change(&change));
        is_writing.recv_timeout(PATIENCE).unwrap();
        let tag = disk.submit(Op::Write, 0, 4096, 0);
        let has_failed = || worker.chains().hops().iter().any(|hop| hop.health.failures > 0);
        wait_until("it fails", has_failed);
        go_on.send(()).unwrap();
        assert_eq!(disk.wait(), (tag, Ok(())), "the guest sees nothing of it");
        changing.join().unwrap().unwrap_err()
    });
    assert!(matches!(said, ChangeError::TrialFailed { .. }), "{said}");
    assert_eq!(*written.lock().unwrap(), [1, 0], "the old chain is written over the new one");
    worker.stop_queue(0, 0);
    worker.shutdown();
}
