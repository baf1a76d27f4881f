//! `upcall serve --movable`: a guest moves between two workers on one image, and back, and each
//! of them has the image only while the guest is there.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use upcall_tests::{
    Ended, Kind, Part, RawClient, RawOptions, Scratch, Server, c_filter, kind, root, status, upcall,
};

const BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// An image, and what two hosts make of it.
struct Shared {
    scratch: Scratch,
    image: PathBuf,
    /// What to say of it after `--disk`, with a comma before it.
    words: String,
    watcher: PathBuf,
}

/// A worker on a host of its own.
struct Host {
    server: Server,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Shared {
    /// A raw image.
    fn new() -> Shared {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", BYTES);
        let words = format!(",file={}", image.display());
        Shared::of(scratch, image, words)
    }

    fn of_kind(kind: Kind) -> Shared {
        let scratch = Scratch::new();
        let image = kind.create(&scratch, "disk.img", BYTES);
        let words = kind.words(&image);
        Shared::of(scratch, image, words)
    }

    fn of(scratch: Scratch, image: PathBuf, words: String) -> Shared {
        let watcher = scratch.join("watcher.so");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-O1", "-shared", "-fPIC", "-I"]);
        compiler.arg(root().join("sdk/c/include"));
        compiler.arg(root().join("crates/upcall-worker/tests/data/changing.c"));
        compiler.arg("-o").arg(&watcher);
        assert!(compiler.status().unwrap().success(), "{compiler:?}");
        Shared { scratch, image, words, watcher }
    }

    /// A worker behind a filter that saves its state and, if `changes`, one that changes data.
    fn serve(&self, changes: bool) -> Host {
        self.serve_with(changes, &[])
    }

    fn serve_with(&self, changes: bool, more: &[&str]) -> Host {
        let scratch = Scratch::new();
        let socket = scratch.join("d.sock");
        let disk =
            format!("name=root{},socket={},queues=1,direct=off", self.words, socket.display());
        let watcher = format!("disk=root,file={}", self.watcher.display());
        let xor = format!("disk=root,file={}", c_filter("xor", 64).display());
        let mut args = vec!["--movable", "--disk", &disk, "--filter", &watcher];
        if changes {
            args.extend(["--filter", &xor]);
        }
        args.extend(more);
        Host { server: Server::start(&scratch, &args), socket, _scratch: scratch }
    }

    fn handover(&self) -> PathBuf {
        self.scratch.join("disk.img.upcall/handover")
    }
}

impl Host {
    fn connect(&self) -> JoinHandle<RawClient> {
        let socket = self.socket.clone();
        std::thread::spawn(move || RawClient::connect(&socket, RawOptions::default()).unwrap())
    }

    /// Waits until it has said something `times` times.
    #[track_caller]
    fn hear(&self, what: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.server.stderr().matches(what).count() < times {
            assert!(
                Instant::now() < deadline,
                "not {times} times {what:?}:\n{}",
                self.server.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn write(client: &mut RawClient, sector: u64, byte: u8) {
    let (code, _) = client.request(0, kind::WRITE, sector, &[Part::Out(vec![byte; 512])]);
    assert_eq!(code, status::OK);
}

fn read(client: &mut RawClient, sector: u64) -> Vec<u8> {
    let (code, bytes) = client.request(0, kind::READ, sector, &[Part::In(512)]);
    assert_eq!(code, status::OK);
    bytes
}

/// As a hypervisor does when a migration comes to its end.
fn leave(client: &mut RawClient) {
    client.start_logging().unwrap();
    client.stop(0).unwrap();
}

fn start_again(mut client: RawClient) -> JoinHandle<RawClient> {
    std::thread::spawn(move || {
        let base = client.device_index(0);
        client.stop_logging().unwrap();
        client.start(0, base).unwrap();
        client
    })
}

#[test]
fn a_guest_moves_to_another_worker_and_back_with_what_filters_saved() {
    move_there_and_back(&Shared::new());
}

#[test]
fn a_guest_on_an_image_of_any_kind_moves_there_and_back() {
    for kind in Kind::WRITABLE {
        println!("{kind:?}");
        let shared = Shared::of_kind(kind);
        move_there_and_back(&shared);
        kind.expect_sound(&shared.image);
    }
}

fn move_there_and_back(shared: &Shared) {
    let (here, there) = (shared.serve(true), shared.serve(true));
    assert!(there.server.stdout().contains("another process uses it: waiting"));
    let mut source = here.connect().join().unwrap();
    write(&mut source, 1, 1);
    // The guest gives its write cache up, and need not say so again.
    source.set_config(32, &[0]).unwrap();

    let target = there.connect();
    std::thread::sleep(Duration::from_millis(300));
    write(&mut source, 2, 2);
    assert!(!target.is_finished(), "two workers serve one image at once");
    leave(&mut source);
    here.hear("given up", 1);
    let mut target = target.join().unwrap();
    assert_eq!((read(&mut target, 1), read(&mut target, 2)), (vec![1; 512], vec![2; 512]));
    assert_eq!(target.config().unwrap().writeback, 0);
    here.hear("event migrate-out", 1);
    there.hear("event load 1 seen 2", 1);
    there.hear("event migrate-in", 1);
    assert!(!shared.handover().exists(), "taken up, and handed over once");

    write(&mut target, 3, 3);
    let again = start_again(source);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!again.is_finished(), "two workers serve one image at once");
    leave(&mut target);
    let mut source = again.join().unwrap();
    assert_eq!(read(&mut source, 3), vec![3; 512]);
    here.hear("event load 1 seen 5", 1);
    drop((source, target));
    here.server.stop();
    there.server.stop();
}

#[test]
fn a_migration_that_fails_at_its_end_goes_on_where_it_began() {
    fail_at_the_end(&Shared::new());
}

#[test]
fn so_does_one_of_a_guest_on_an_image() {
    let shared = Shared::of_kind(Kind::QCOW2);
    fail_at_the_end(&shared);
    Kind::QCOW2.expect_sound(&shared.image);
}

fn fail_at_the_end(shared: &Shared) {
    let here = shared.serve(true);
    let mut source = here.connect().join().unwrap();
    write(&mut source, 7, 7);
    leave(&mut source);
    here.hear("given up", 1);
    assert!(shared.handover().exists());
    let mut source = start_again(source).join().unwrap();
    assert_eq!(read(&mut source, 7), vec![7; 512]);
    here.hear("event load 1 seen 1", 1);
    here.hear("event migrate-in", 1);
    assert!(!shared.handover().exists());
    // A pause is no migration.
    let base = source.stop(0).unwrap();
    source.start(0, base).unwrap();
    assert_eq!(read(&mut source, 7), vec![7; 512]);
    assert_eq!(here.server.stderr().matches("given up").count(), 1);
    // And when nobody is connected any more, the image is free for whoever comes.
    drop(source);
    here.hear("given up", 2);
    let there = shared.serve(true);
    assert!(!there.server.stdout().contains("waiting"), "{}", there.server.stdout());
    let mut next = there.connect().join().unwrap();
    assert_eq!(read(&mut next, 7), vec![7; 512]);
    drop(next);
    there.server.stop();
    here.server.stop();
}

#[test]
fn a_worker_with_another_chain_does_not_take_the_disk_up() {
    let shared = Shared::new();
    let (here, there) = (shared.serve(true), shared.serve(false));
    let mut source = here.connect().join().unwrap();
    write(&mut source, 5, 5);
    let target = there.connect();
    leave(&mut source);
    there.hear("give it the same filters", 1);
    assert!(!target.is_finished());
    let mut source = start_again(source).join().unwrap();
    assert_eq!(read(&mut source, 5), vec![5; 512]);
    drop(source);
    here.server.stop();
    drop(there);
    let _ = target.join();
}

#[test]
fn a_worker_that_dies_while_its_guest_is_there_has_the_disk_again_when_it_is_back() {
    die_and_come_back(&Shared::new());
}

#[test]
fn so_has_one_whose_disk_is_an_image() {
    let shared = Shared::of_kind(Kind::QCOW2);
    die_and_come_back(&shared);
    Kind::QCOW2.expect_sound(&shared.image);
}

/// What was completed is there behind the move, whenever the one that alone had it dies.
#[test]
fn the_program_that_reads_an_image_may_die_while_its_guest_leaves() {
    let shared = Shared::of_kind(Kind::QCOW2);
    let (here, there) = (shared.serve(true), shared.serve(true));
    let mut source = here.connect().join().unwrap();
    for round in 0..5 {
        (0..32).for_each(|sector| write(&mut source, sector, round));
        let daemons = here.server.children().into_iter().filter(|child| {
            let name = std::fs::read_to_string(format!("/proc/{child}/comm"));
            // The kernel keeps 15 bytes of a name.
            name.is_ok_and(|name| name.starts_with("qemu-storage-da"))
        });
        let daemons: Vec<i32> = daemons.collect();
        assert_eq!(daemons.len(), 1, "one for its image, and none of those before");
        let target = there.connect();
        let daemon = rustix::process::Pid::from_raw(daemons[0]).unwrap();
        rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
        leave(&mut source);
        let mut target = target.join().unwrap();
        (0..32).for_each(|sector| assert_eq!(read(&mut target, sector), vec![round; 512]));
        let again = start_again(source);
        leave(&mut target);
        source = again.join().unwrap();
    }
    drop(source);
    here.server.stop();
    there.server.stop();
    Kind::QCOW2.expect_sound(&shared.image);
}

fn die_and_come_back(shared: &Shared) {
    let here = shared.serve_with(true, &["--restart", "--restart-pause-ms", "100"]);
    let there = shared.serve(true);
    let mut guest = RawClient::connect_tracked(&here.socket, RawOptions::default()).unwrap();
    for round in 0..3 {
        write(&mut guest, 9, round);
        for worker in here.server.children() {
            let worker = rustix::process::Pid::from_raw(worker).unwrap();
            rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
        }
        guest.reconnect(&here.socket);
        assert_eq!(read(&mut guest, 9), vec![round; 512]);
    }
    assert!(!there.server.stderr().contains("taken up"), "nobody is there who wants it");
    drop(guest);
    here.server.stop();
    there.server.stop();
}

#[test]
fn readers_share_an_image_whose_filters_have_a_folder() {
    let shared = Shared::new();
    std::fs::DirBuilder::new().mode(0o700).create(shared.scratch.join("disk.img.upcall")).unwrap();
    let readers = [Scratch::new(), Scratch::new()].map(|scratch| {
        let disk = format!(
            "name=root,file={},socket={},readonly=on,direct=off",
            shared.image.display(),
            scratch.join("d.sock").display()
        );
        (Server::start(&scratch, &["--disk", &disk]), scratch)
    });
    readers.into_iter().for_each(|(server, _scratch)| server.stop());
}

#[test]
fn what_cannot_move_is_refused() {
    let scratch = Scratch::new();
    let disk = format!("name=m,memory=1M,socket={}", scratch.join("m.sock").display());
    let ended = upcall_tests::upcall(&["serve", "--movable", "--disk", &disk]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("only images and devices"), "{}", ended.stderr);
}

/// A worker with a control socket at `control`.
fn controlled(shared: &Shared, control: &str) -> Host {
    shared.serve_with(true, &["--control", control])
}

/// What is shown of the disk there.
fn shown(control: &str) -> Value {
    let ended = upcall(&["show", "--json", "--control", control]);
    ended.expect_success();
    serde_json::from_str(&ended.stdout).unwrap()
}

/// The names of its slots.
fn chain(control: &str) -> Vec<String> {
    let shown = shown(control);
    let slots = shown["chain"].as_array().unwrap().iter();
    slots.map(|slot| slot["name"].as_str().unwrap().to_owned()).collect()
}

/// Waits until the disk is so there.
#[track_caller]
fn expect_state(control: &str, state: &str) {
    let deadline = Instant::now() + PATIENCE;
    while shown(control)["state"] != state {
        assert!(Instant::now() < deadline, "not {state}: {}", shown(control));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn attach_trace(control: &str) -> Ended {
    let trace = c_filter("trace", 64);
    upcall(&["chain", "attach", "root", trace.to_str().unwrap(), "--control", control])
}

#[track_caller]
fn expect_refused(ended: &Ended, why: &str) {
    assert!(ended.code != Some(0) && ended.stderr.contains(why), "{ended:?}");
}

#[test]
fn chains_are_changed_where_the_guest_is_and_not_while_it_leaves() {
    let shared = Shared::new();
    let (at_here, at_there) = (shared.scratch.text("here"), shared.scratch.text("there"));
    let (here, there) = (controlled(&shared, &at_here), controlled(&shared, &at_there));
    let mut source = here.connect().join().unwrap();
    write(&mut source, 1, 1);
    let as_begun = chain(&at_here);
    assert_eq!((shown(&at_here)["state"].as_str(), as_begun.len()), (Some("here"), 2));
    assert_eq!((shown(&at_there)["state"].as_str(), chain(&at_there).len()), (Some("waiting"), 0));
    expect_refused(&attach_trace(&at_there), "not on this host");

    attach_trace(&at_here).expect_success();
    assert_eq!(chain(&at_here).len(), 3);
    upcall(&["chain", "detach", "root", "trace-0", "--control", &at_here]).expect_success();
    source.start_logging().unwrap();
    expect_state(&at_here, "leaving");
    expect_refused(&attach_trace(&at_here), "being migrated");
    assert_eq!(chain(&at_here), as_begun);
    // It stays after all, and is then here as before.
    source.stop_logging().unwrap();
    expect_state(&at_here, "here");
    attach_trace(&at_here).expect_success();
    upcall(&["chain", "detach", "root", "trace-0", "--control", &at_here]).expect_success();

    let target = there.connect();
    leave(&mut source);
    let mut target = target.join().unwrap();
    assert_eq!(read(&mut target, 1), vec![1; 512]);
    expect_state(&at_there, "here");
    expect_state(&at_here, "waiting");
    expect_refused(&attach_trace(&at_here), "not on this host");
    assert_eq!(chain(&at_there), as_begun);

    // Where it is it gets another chain, without which nobody takes it up.
    attach_trace(&at_there).expect_success();
    let changed = chain(&at_there);
    let again = start_again(source);
    leave(&mut target);
    here.hear("give it the same filters", 1);
    assert!(!again.is_finished());
    expect_state(&at_here, "waiting");
    let mut target = start_again(target).join().unwrap();
    assert_eq!((read(&mut target, 1), chain(&at_there)), (vec![1; 512], changed));
    drop(target);
    there.server.stop();
    drop(here);
    let _ = again.join();
}

#[test]
fn a_guest_that_leaves_by_its_end_is_no_longer_leaving() {
    let shared = Shared::new();
    let control = shared.scratch.text("control");
    let here = controlled(&shared, &control);
    let mut guest = here.connect().join().unwrap();
    guest.start_logging().unwrap();
    expect_state(&control, "leaving");
    drop(guest);
    here.hear("given up", 1);
    let guest = here.connect().join().unwrap();
    expect_state(&control, "here");
    attach_trace(&control).expect_success();
    drop(guest);
    here.server.stop();
}
