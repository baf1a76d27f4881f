//! What breaks, breaks alone: a disk whose flush failed, a filter that is killed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{
    Client, Driver, Filter, Io, Mix, Outcome, RawClient, RawOptions, Rng, Scratch, Server, Workload,
};

const BYTES: u64 = 32 << 20;

fn run(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().unwrap();
    assert!(output.status.success(), "{command} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A block device of 8 MiB over a file system with room for one: writes go to the page
/// cache, and cannot be made durable. Undone when dropped, in the order of the fields.
struct FullDevice {
    device: PathBuf,
    mount: PathBuf,
}

impl FullDevice {
    /// None where it cannot be made and UPCALL_TEST_NO_LOOP=1 says that this is known.
    fn new(scratch: &Scratch) -> Option<FullDevice> {
        let is_root = rustix::process::geteuid().is_root();
        if !is_root || !Path::new("/dev/loop-control").exists() {
            assert!(
                std::env::var_os("UPCALL_TEST_NO_LOOP").is_some(),
                "needs root and loop devices; UPCALL_TEST_NO_LOOP=1 goes without this test"
            );
            eprintln!("SKIPPED: no loop devices here");
            return None;
        }
        let mount = scratch.join("mount");
        std::fs::create_dir(&mount).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", mount.to_str().unwrap()]);
        let mut full = FullDevice { device: PathBuf::new(), mount };
        let file = full.mount.join("image");
        std::fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
        full.device = run("losetup", &["--find", "--show", file.to_str().unwrap()]).into();
        Some(full)
    }
}

impl Drop for FullDevice {
    fn drop(&mut self) {
        if !self.device.as_os_str().is_empty() {
            let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        }
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
    }
}

#[test]
fn a_disk_whose_flush_failed_stays_failed_for_writes_and_says_so() {
    for engine in ["io_uring", "threads"] {
        let scratch = Scratch::new();
        let Some(full) = FullDevice::new(&scratch) else { return };
        let (socket, other) = (scratch.text("d.sock"), scratch.text("e.sock"));
        let device = full.device.display();
        let disk =
            format!("name=root,file={device},socket={socket},direct=off,engine={engine},queues=2");
        let sound = format!("name=sound,memory=32M,socket={other}");
        let server = Server::serve(&scratch, &[&disk, &sound], &[]);
        let mut driver = Driver::usual(socket.as_ref(), 2);
        for index in 0..16 {
            driver.write(0, index << 18, &[9; 256 << 10]);
        }
        for queue in [0, 1, 0] {
            // The kernel tells once: that it stays failed is Upcall's own memory.
            assert_eq!(driver.run(queue, Io::Flush), Outcome::IoError, "queue {queue}");
        }
        let zeroes = Io::WriteZeroes { offset: 0, length: 4096, unmap: false };
        let writes = [Io::Write { offset: 0, length: 512 }, zeroes];
        for io in writes {
            for queue in [0, 1] {
                assert_eq!(driver.run(queue, io), Outcome::IoError, "{io:?} on queue {queue}");
            }
        }
        drop(driver);
        // A guest that comes back is not told that all is well.
        let mut client = RawClient::connect(socket.as_ref(), RawOptions::default()).unwrap();
        assert_eq!(client.run(0, writes[0]), Outcome::IoError);
        assert_eq!(client.run(0, Io::Flush), Outcome::IoError);
        drop(client);
        let log = server.stderr();
        assert!(log.contains(&device.to_string()) && log.contains("a flush failed"), "{log}");

        let mut driver = Driver::usual(other.as_ref(), 1);
        driver.write(0, 0, &[1; 4096]);
        assert_eq!(driver.run(0, Io::Flush), Outcome::Ok, "the other disk");
        drop(driver);
        // It ends in bounds, and does not say that all is durable.
        let ended = server.terminate();
        assert_eq!(ended.signal, None, "{ended:#?}");
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        drop(full);
    }
}

#[test]
fn a_flush_that_failed_stays_failed_although_the_worker_dies() {
    let scratch = Scratch::new();
    let Some(full) = FullDevice::new(&scratch) else { return };
    let socket = scratch.text("d.sock");
    let disk = format!("name=root,file={},socket={socket},direct=off", full.device.display());
    let server = Server::start(&scratch, &["--restart", "--disk", &disk]);
    let mut driver = Driver::usual(socket.as_ref(), 1);
    for index in 0..16 {
        driver.write(0, index << 18, &[9; 256 << 10]);
    }
    assert_eq!(driver.run(0, Io::Flush), Outcome::IoError);
    drop(driver);
    server.expect_writes_stay_refused(socket.as_ref());
    server.terminate();
    drop(full);
}

#[test]
fn without_a_write_cache_a_write_that_is_not_durable_is_an_error() {
    let scratch = Scratch::new();
    let Some(full) = FullDevice::new(&scratch) else { return };
    let disk = |socket: &str, cache: &str| {
        let (device, socket) = (full.device.display(), scratch.text(socket));
        format!("name=root,file={device},socket={socket},direct=off,write-cache={cache}")
    };
    let write = Io::Write { offset: 0, length: 256 << 10 };
    // As much as the storage has room for, and no byte more, is durable when it is said so.
    let server = Server::serve(&scratch, &[&disk("off.sock", "off")], &[]);
    let mut driver = Driver::usual(&scratch.join("off.sock"), 1);
    assert_eq!(driver.config().writeback, 0);
    driver.put(0, 0, &[1; 256 << 10]);
    assert_eq!(driver.run(0, write), Outcome::Ok);
    let outcomes: Vec<Outcome> = (1..16)
        .map(|index| driver.run(0, Io::Write { offset: index << 18, length: 256 << 10 }))
        .collect();
    assert!(outcomes.contains(&Outcome::IoError), "{outcomes:?}");
    let failed = outcomes.iter().position(|&outcome| outcome == Outcome::IoError).unwrap();
    assert!(outcomes[failed..].iter().all(|&outcome| outcome == Outcome::IoError), "{outcomes:?}");
    drop(driver);
    server.terminate();
}

/// Drives disk `root` until the filter is killed and then some. Every request succeeds.
fn drive(socket: &Path, killed: &AtomicBool) {
    let mut driver = Driver::usual(socket, 1);
    let mut after = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut busy = vec![false; driver.slots()];
    while after < 200 {
        assert!(Instant::now() < deadline, "requests do not end: {after} did");
        // Requests that begin after the kill, not those that it overtakes.
        let is_after = killed.load(Ordering::SeqCst);
        for (slot, busy) in busy.iter_mut().enumerate() {
            if !*busy {
                let offset = slot as u64 * 65536;
                driver.submit(0, slot, Io::Write { offset, length: 4096 }, &[4096]);
                *busy = true;
            }
        }
        for (slot, outcome) in driver.ended(0) {
            busy[slot] = false;
            assert_eq!(outcome, Outcome::Ok);
            after += usize::from(is_after);
        }
        driver.wait(0, Duration::from_millis(1));
    }
}

#[test]
fn a_filter_that_is_killed_is_a_pause_for_its_disk_and_nothing_for_another() {
    for filter in [Filter::Xor, Filter::Trace, Filter::Delay] {
        let scratch = Scratch::new();
        let disks = ["root", "other"].map(|name| {
            let image = scratch.image(&format!("{name}.img"), BYTES);
            let socket = scratch.text(&format!("{name}.sock"));
            format!("name={name},file={},socket={socket},direct=off", image.display())
        });
        let filter = filter.argument("root", &scratch);
        let server = Server::serve(&scratch, &[&disks[0], &disks[1]], &[&filter]);
        let hosts = server.children();
        assert_eq!(hosts.len(), 1, "{hosts:?}");

        let killed = AtomicBool::new(false);
        let other = scratch.join("other.sock");
        let workload = std::thread::scope(|scope| {
            let load = scope.spawn(|| drive(&scratch.join("root.sock"), &killed));
            let other = scope.spawn(|| {
                let mut driver = Driver::usual(&other, 1);
                let mut workload = Workload::new(Rng::seed(), BYTES);
                workload.run(&mut driver, &Mix::default(), 4_000);
                workload.read_back(&mut driver);
                workload
            });
            std::thread::sleep(Duration::from_millis(300));
            kill_process(Pid::from_raw(hosts[0]).unwrap(), Signal::KILL).unwrap();
            killed.store(true, Ordering::SeqCst);
            load.join().unwrap();
            other.join().unwrap()
        });
        let until = Instant::now() + Duration::from_secs(30);
        while !server.stderr().contains("serves again") {
            assert!(Instant::now() < until, "{filter}: {}", server.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
        let log = server.stderr();
        assert!(log.contains("root"), "who died is not said: {log}");

        // The worker lives on, and both disks take new guests.
        let mut driver = Driver::usual(&scratch.join("root.sock"), 1);
        assert_eq!(driver.run(0, Io::Write { offset: 0, length: 512 }), Outcome::Ok);
        drop(driver);
        Driver::usual(&other, 1).read(0, 0, 512);
        server.stop();
        assert!(!other.exists(), "the socket is left behind");
        workload.check_image(&scratch.join("other.img"));
    }
}
