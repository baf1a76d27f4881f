//! Images of other formats: served as raw ones are, sound afterwards to a reader that no one
//! here wrote, and whole whatever happens to the daemon that reads them.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{
    Client, Driver, Filter, Io, Kind, Mix, Outcome, Scratch, Server, Workload, qemu_img, upcall,
};

const BYTES: u64 = 32 << 20;

/// Serves an image as the disk `root`, behind `chain`.
fn serve(scratch: &Scratch, words: &str, chain: &[Filter]) -> Server {
    let disk = format!("name=root,socket={},queues=2,direct=off{words}", scratch.text("d.sock"));
    let filters: Vec<String> =
        chain.iter().map(|filter| filter.argument("root", scratch)).collect();
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    Server::serve(scratch, &[&disk], &filters)
}

fn connect(scratch: &Scratch) -> Driver {
    Driver::usual(&scratch.join("d.sock"), 2)
}

/// The daemons that a process has started.
fn daemons(server: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.as_raw_pid())).unwrap();
    for task in tasks {
        // A thread may end meanwhile, and so may a child.
        let children = std::fs::read_to_string(task.unwrap().path().join("children"));
        for pid in children.unwrap_or_default().split_whitespace() {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.starts_with("qemu-storage") {
                found.extend(Pid::from_raw(pid.parse().unwrap()));
            }
        }
    }
    found
}

#[test]
fn every_writable_kind_is_served_and_sound_afterwards() {
    for (seed, kind) in (1..).zip(Kind::WRITABLE) {
        let scratch = Scratch::new();
        let image = kind.create(&scratch, "disk", BYTES);
        let server = serve(&scratch, &kind.words(&image), &[]);
        let mut driver = connect(&scratch);
        assert_eq!(driver.capacity(), BYTES, "{kind:?}");
        let mut workload = Workload::on(seed, &mut driver);
        // Only what can give space back offers discard.
        let discards = if kind == Kind::QCOW2 { 6 } else { 0 };
        workload.run(&mut driver, &Mix { discards, ..Mix::default() }, 400);
        workload.read_back(&mut driver);
        drop(driver);
        server.stop();
        kind.expect_sound(&image);
        workload.check_image(&kind.to_raw(&scratch, &image));
    }
}

#[test]
fn an_image_behind_filters_holds_what_they_made_of_it() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let chain = [Filter::Trace, Filter::Xor, Filter::Delay];
    let server = serve(&scratch, &Kind::QCOW2.words(&image), &chain);
    let mut driver = connect(&scratch);
    let mut workload = Workload::on(21, &mut driver);
    workload.run(&mut driver, &Mix::default(), 400);
    workload.read_back(&mut driver);
    drop(driver);
    server.stop();
    Kind::QCOW2.expect_sound(&image);
    let raw = Kind::QCOW2.to_raw(&scratch, &image);
    assert!(workload.compare_image(&raw).is_err(), "xor did nothing");
}

/// What was completed is not lost with the daemon that had not yet written its tables.
#[test]
fn what_was_written_and_not_flushed_survives_the_daemon() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let server = serve(&scratch, &Kind::QCOW2.words(&image), &[]);
    let mut driver = connect(&scratch);
    for round in 0..5u8 {
        let content = vec![round + 1; 65536];
        let at = u64::from(round) * (4 << 20);
        driver.write(0, at, &content);
        for pid in daemons(server.pid()) {
            kill_process(pid, Signal::KILL).unwrap();
        }
        assert_eq!(driver.read(1, at, 65536), content, "round {round}");
        // The first half again, over what may have been written already.
        driver.write(0, at, &content[..32768]);
    }
    drop(driver);
    server.stop();
    Kind::QCOW2.expect_sound(&image);
}

/// `UPCALL_KILLS` for a campaign.
#[test]
fn a_daemon_that_is_killed_again_and_again_costs_no_byte_and_no_error() {
    let kills = std::env::var("UPCALL_KILLS").map_or(20, |text| text.parse().unwrap());
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let server = serve(&scratch, &Kind::QCOW2.words(&image), &[]);
    let mut driver = connect(&scratch);
    let mut workload = Workload::on(77, &mut driver);
    let (over, pid) = (AtomicBool::new(false), server.pid());
    thread::scope(|scope| {
        scope.spawn(|| {
            for nth in 0..kills {
                // Some while it starts, most in the midst of work.
                let pause_ms = if nth % 4 == 0 { 37 * nth % 100 } else { 200 + 97 * nth % 300 };
                thread::sleep(Duration::from_millis(pause_ms));
                let deadline = Instant::now() + Duration::from_secs(20);
                while daemons(pid).is_empty() {
                    assert!(Instant::now() < deadline, "no daemon comes back");
                    thread::sleep(Duration::from_millis(5));
                }
                for pid in daemons(pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        // Every request is expected to succeed, every byte read to be right.
        while !over.load(Ordering::Relaxed) {
            workload.run(&mut driver, &Mix::default(), 100);
        }
    });
    workload.read_back(&mut driver);
    drop(driver);
    let log = server.stderr();
    server.stop();
    assert!(log.matches("signal 9").count() as u64 >= kills * 3 / 4, "{log}");
    assert!(log.matches("is started again").count() as u64 >= kills / 4, "{log}");
    Kind::QCOW2.expect_sound(&image);
    workload.check_image(&Kind::QCOW2.to_raw(&scratch, &image));
}

#[test]
fn images_below_are_those_that_were_named_and_are_not_written() {
    let scratch = Scratch::new();
    let base = scratch.image("base.raw", BYTES);
    std::fs::write(&base, vec![0xb5; BYTES as usize]).unwrap();
    let mid = Kind::QCOW2.create(&scratch, "mid", BYTES);
    let top = Kind::QCOW2.create(&scratch, "top", BYTES);
    let words = format!(
        "{},backing=qcow2:{},backing=raw:{}",
        Kind::QCOW2.words(&top),
        mid.display(),
        base.display()
    );
    let server = serve(&scratch, &words, &[]);
    let mut driver = connect(&scratch);
    assert_eq!(driver.read(0, 1 << 20, 4096), vec![0xb5; 4096]);
    driver.write(0, 1 << 20, &[1; 512]);
    let zeroes = Io::Discard { offset: 2 << 20, length: 1 << 20 };
    assert_eq!(driver.run(0, zeroes), Outcome::Ok);
    assert_eq!(driver.read(0, 2 << 20, 65536), vec![0; 65536], "a discard reads as zeroes");
    assert_eq!(driver.read(0, (1 << 20) + 512, 3584), vec![0xb5; 3584]);
    drop(driver);
    server.stop();
    assert!(std::fs::read(&base).unwrap() == vec![0xb5; BYTES as usize]);
    let empty = qemu_img(&["map", "-f", "qcow2", "--output=json", mid.to_str().unwrap()]);
    assert!(!empty.contains("\"data\": true"), "{empty}");
}

#[test]
fn a_read_only_image_is_read_and_not_written() {
    let scratch = Scratch::new();
    let raw = scratch.image("content", BYTES);
    let content: Vec<u8> = (0..BYTES).map(|at| (at / 4096 % 251) as u8).collect();
    std::fs::write(&raw, &content).unwrap();
    let image = scratch.join("disk");
    // The one kind that can only be read.
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    let option = "subformat=streamOptimized";
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", option, from, to]);
    let before = std::fs::read(&image).unwrap();
    let words = format!(",file={to},format=vmdk,readonly=on");
    let server = serve(&scratch, &words, &[]);
    let mut driver = connect(&scratch);
    assert!(driver.read(0, 5 << 20, 65536) == content[5 << 20..(5 << 20) + 65536]);
    driver.put(0, 0, &[1; 512]);
    let write = Io::Write { offset: 0, length: 512 };
    assert_eq!(driver.run(0, write), Outcome::IoError);
    drop(driver);
    server.stop();
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn an_image_has_one_writer() {
    let scratch = Scratch::new();
    for kind in [Kind::QCOW2, Kind::WRITABLE[2]] {
        let image = kind.create(&scratch, &format!("disk.{}", kind.format), BYTES);
        let server = serve(&scratch, &kind.words(&image), &[]);
        let disk = format!("name=second,socket={}{}", scratch.text("e.sock"), kind.words(&image));
        let ended = upcall(&["serve", "--disk", &disk]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("in use by process"), "{}", ended.stderr);
        let flat = scratch.join("disk-flat.vmdk");
        if kind.has_extents {
            let disk =
                format!("name=raw,socket={},file={}", scratch.text("e.sock"), flat.display());
            let ended = upcall(&["serve", "--disk", &disk]);
            assert!(ended.stderr.contains("in use by"), "an extent as raw: {}", ended.stderr);
        }
        let writer = Command::new("qemu-io")
            .args(["-f", kind.format, "-c", "write 0 512", image.to_str().unwrap()])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&writer.stderr).into_owned();
        assert!(!writer.status.success() && said.contains("lock"), "qemu is no writer: {said}");
        server.stop();
    }
}
