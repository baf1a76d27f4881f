//! Images of other formats: served as raw ones are, sound afterwards to a reader that no one
//! here wrote, and whole whatever happens to the daemon that reads them.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{
    Client, Driver, Filter, Io, Kind, Mix, Outcome, Scratch, Server, Workload, qemu_img, upcall,
    upcall_program,
};

const BYTES: u64 = 32 << 20;

/// Serves an image as the disk `root`, behind `chain`; through the page cache, if nothing else is
/// said: not every folder knows O_DIRECT.
fn serve(scratch: &Scratch, words: &str, chain: &[Filter]) -> Server {
    let cache = if words.contains("direct=") { "" } else { ",direct=off" };
    let disk = format!("name=root,socket={},queues=2{cache}{words}", scratch.text("d.sock"));
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

/// QEMU gives a cluster back that is zeroes, also while something is written to it.
#[test]
fn zeroes_beside_writes_to_the_same_cluster_cost_no_byte() {
    let scratch = Scratch::new();
    // Few clusters, so that requests meet in them.
    let image = Kind::QCOW2.create(&scratch, "disk", 512 << 10);
    let server = serve(&scratch, &Kind::QCOW2.words(&image), &[]);
    let mut driver = connect(&scratch);
    let mut workload = Workload::on(5, &mut driver);
    let mix = Mix { zeroes: 60, discards: 20, reads: 10, sectors_max: 256, ..Mix::default() };
    workload.run(&mut driver, &mix, 60_000);
    workload.read_back(&mut driver);
    drop(driver);
    server.stop();
    Kind::QCOW2.expect_sound(&image);
    workload.check_image(&Kind::QCOW2.to_raw(&scratch, &image));
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

/// Its daemon then has what no flush wrote, and is the only one who has.
#[test]
fn what_was_written_and_not_flushed_survives_the_worker() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    for round in 0..4u8 {
        let server = serve(&scratch, &Kind::QCOW2.words(&image), &[]);
        let mut driver = connect(&scratch);
        for old in 0..round {
            let at = u64::from(old) * (1 << 20);
            assert_eq!(driver.read(0, at, 65536), vec![old + 1; 65536], "round {round}");
        }
        driver.write(0, u64::from(round) * (1 << 20), &vec![round + 1; 65536]);
        let daemons = daemons(server.pid());
        assert_eq!(daemons.len(), 1);
        // Also without a moment for it to notice.
        drop(server);
        drop(driver);
        let deadline = Instant::now() + Duration::from_secs(20);
        let lives = |pid: &Pid| rustix::process::test_kill_process(*pid).is_ok();
        while daemons.iter().any(lives) {
            assert!(Instant::now() < deadline, "its daemon does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
    Kind::QCOW2.expect_sound(&image);
}

/// The next worker begins when the daemon of the dead one has written it.
#[test]
fn what_was_written_and_not_flushed_survives_a_worker_that_is_started_again() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let words = Kind::QCOW2.words(&image);
    let disk = format!("name=root,socket={},queues=2,direct=off{words}", scratch.text("d.sock"));
    let args = ["--restart", "--restart-pause-ms", "1", "--disk", disk.as_str()];
    let server = Server::start(&scratch, &args);
    let worker = || {
        let words = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let is_worker = |pid: &i32| words(pid).is_ok_and(|words| words.contains("--supervised"));
        server.children().into_iter().find(is_worker)
    };
    for round in 0..4u8 {
        let mut driver = connect(&scratch);
        for old in 0..round {
            let at = u64::from(old) * (1 << 20);
            assert_eq!(driver.read(0, at, 65536), vec![old + 1; 65536], "round {round}");
        }
        driver.write(0, u64::from(round) * (1 << 20), &vec![round + 1; 65536]);
        let old = worker().expect("a worker");
        kill_process(Pid::from_raw(old).unwrap(), Signal::KILL).unwrap();
        drop(driver);
        let deadline = Instant::now() + Duration::from_secs(30);
        while worker().is_none_or(|new| new == old) {
            assert!(Instant::now() < deadline, "no worker comes back");
            thread::sleep(Duration::from_millis(5));
        }
    }
    server.stop();
    Kind::QCOW2.expect_sound(&image);
}

/// A few kills; `UPCALL_KILLS` says how many.
#[test]
fn a_daemon_that_is_killed_again_and_again_costs_no_byte_and_no_error() {
    kill_again_and_again("direct=off");
}

/// Here the daemon reads and writes by native AIO, which it leaves to the kernel when it dies.
#[test]
fn nor_does_one_that_goes_past_the_page_cache() {
    let scratch = Scratch::new();
    let probe = scratch.join("probe");
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT;
    if rustix::fs::open(&probe, flags, Mode::RUSR | Mode::WUSR).is_err() {
        eprintln!("skipped: {} is in a folder without O_DIRECT", probe.display());
        return;
    }
    kill_again_and_again("direct=on");
}

fn kill_again_and_again(cache: &str) {
    let kills = std::env::var("UPCALL_KILLS").map_or(20, |text| text.parse().unwrap());
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let words = format!(",{cache}{}", Kind::QCOW2.words(&image));
    let server = serve(&scratch, &words, &[]);
    let mut driver = connect(&scratch);
    let mut workload = Workload::on(77, &mut driver);
    let began = Instant::now();
    let (over, rounds, pid) = (AtomicBool::new(false), AtomicU64::new(0), server.pid());
    thread::scope(|scope| {
        scope.spawn(|| {
            for nth in 0..kills {
                // Some while it starts, some when it has just got all again, others in the
                // midst of new work.
                let pause_ms = if nth % 4 == 0 { 37 * nth % 100 } else { 200 + 97 * nth % 300 };
                let work = if nth % 8 == 7 { 2 } else { 0 };
                let goal = rounds.load(Ordering::Relaxed) + work;
                let deadline = Instant::now() + Duration::from_secs(20);
                while rounds.load(Ordering::Relaxed) < goal || daemons(pid).is_empty() {
                    assert!(Instant::now() < deadline, "no daemon comes back");
                    thread::sleep(Duration::from_millis(5));
                }
                thread::sleep(Duration::from_millis(pause_ms));
                for pid in daemons(pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        // Every request is expected to succeed, every byte read to be right.
        while !over.load(Ordering::Relaxed) {
            workload.run(&mut driver, &Mix::default(), 40);
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    });
    workload.read_back(&mut driver);
    drop(driver);
    let log = server.stderr();
    server.stop();
    assert!(log.matches("signal 9").count() as u64 >= kills * 3 / 4, "{log}");
    assert!(log.matches("is started again").count() as u64 >= kills / 10, "{log}");
    Kind::QCOW2.expect_sound(&image);
    workload.check_image(&Kind::QCOW2.to_raw(&scratch, &image));
    let requests = 40 * rounds.load(Ordering::Relaxed);
    println!(
        "ledger: {{\"kind\":\"image-daemon-kill\",\"count\":{kills},\"faults\":{kills},\
         \"requests\":{requests},\"seconds\":{:.0},\"result\":\"ok\"}}",
        began.elapsed().as_secs_f64()
    );
}

/// What hangs and whose worker is dead holds the image no longer than a bound: 30 seconds.
#[test]
fn a_daemon_that_hangs_when_its_worker_dies_does_not_keep_the_image() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let words = Kind::QCOW2.words(&image);
    let disk = format!("name=root,socket={},queues=2,direct=off{words}", scratch.text("d.sock"));
    let args = ["--restart", "--restart-pause-ms", "1", "--disk", disk.as_str()];
    let server = Server::start(&scratch, &args);
    let worker = Pid::from_raw(server.children()[0]).unwrap();
    let mut driver = connect(&scratch);
    driver.write(0, 0, &[7; 65536]);
    assert_eq!(driver.run(0, Io::Flush), Outcome::Ok);
    let daemon = daemons(worker)[0];
    kill_process(daemon, Signal::STOP).unwrap();
    kill_process(worker, Signal::KILL).unwrap();
    drop(driver);
    let begun = Instant::now();
    while !server.stderr().contains("nobody served") {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", server.stderr());
        thread::sleep(Duration::from_millis(50));
    }
    assert!(rustix::process::test_kill_process(daemon).is_err(), "it lives on");
    assert_eq!(connect(&scratch).read(0, 0, 65536), [7; 65536]);
    server.stop();
    Kind::QCOW2.expect_sound(&image);
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

/// Runs `upcall serve` for an image under strace, reads the disk's start if it is served, and
/// gives that, what was said, and the system calls of this kind.
fn traced(scratch: &Scratch, words: &str, calls: &str) -> (Option<Vec<u8>>, String, String) {
    let (trace, log) = (scratch.join("trace"), scratch.join("log"));
    let _ = std::fs::remove_file(scratch.join("d.sock"));
    let disk = format!("name=root,socket={},direct=off{words}", scratch.text("d.sock"));
    let mut child = Command::new("strace")
        .args([
            "-D",
            "-f",
            "-qq",
            "--seccomp-bpf",
            "-e",
            &format!("trace={calls}"),
            "-o",
            trace.to_str().unwrap(),
        ])
        .arg(upcall_program())
        .args(["serve", "--disk", &disk])
        .stdin(Stdio::null())
        .stdout(File::create(&log).unwrap())
        .stderr(File::options().append(true).create(true).open(&log).unwrap())
        .spawn()
        .unwrap_or_else(|error| panic!("strace: {error} (scripts/deps installs it)"));
    let said = || std::fs::read_to_string(&log).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut content = None;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "neither served nor refused: {}", said());
        if content.is_none() && said().lines().any(|line| line == "ready") {
            let mut driver = connect(scratch);
            content = Some(driver.read(0, 0, 65536));
            if calls.contains("sync") {
                for nth in 0..FLUSHES as u64 {
                    driver.write(0, nth * 65536, &[7; 512]);
                    assert_eq!(driver.run(0, Io::Flush), Outcome::Ok);
                }
            }
            drop(driver);
            kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        }
        thread::sleep(Duration::from_millis(10));
    }
    // The tracer may be the last to write.
    thread::sleep(Duration::from_millis(100));
    (content, said(), std::fs::read_to_string(&trace).unwrap())
}

const FLUSHES: usize = 10;

/// QEMU 7.2 says that it has no cache to flush, and has one.
#[test]
fn a_flush_reaches_the_medium() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let (_, said, trace) = traced(&scratch, &Kind::QCOW2.words(&image), "fdatasync,fsync");
    assert!(trace.matches("sync(").count() >= FLUSHES, "{said}{trace}");
}

/// Whatever an image names: no other file is opened, nor anything of it read.
#[test]
fn a_hostile_image_opens_no_other_file() {
    let scratch = Scratch::new();
    let victim = scratch.join("victim");
    let secret = || std::fs::write(&victim, vec![b'S'; 1 << 20]).unwrap();
    secret();
    let (path, folder) = (victim.display().to_string(), scratch.path().display().to_string());
    let image = scratch.text("image");
    let json = format!(r#"json:{{"driver":"file","filename":"{path}"}}"#);
    let sparse = |descriptor: &str| {
        // A VMDK header without a size sends its reader to the descriptor behind it.
        let mut bytes = vec![0; 1024];
        bytes[..8].copy_from_slice(b"KDMV\x01\0\0\0");
        bytes[28] = 1;
        bytes[36] = 1;
        bytes.extend(descriptor.as_bytes());
        bytes.drain(512..1024);
        bytes.resize(4096, 0);
        bytes
    };
    let flat = |name: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=11111111\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\nRW 2048 FLAT \"{name}\" 0\n"
        )
    };
    std::os::unix::fs::symlink(&victim, scratch.join("link.vmdk")).unwrap();
    let qcow2 = format!(",file={image},format=qcow2");
    let vmdk = format!(",file={image},format=vmdk,extents={folder}");
    let raw = format!(",file={image},format=raw");
    let below = format!(",file={},format=qcow2,backing=raw:{image}", scratch.text("top"));
    let create = |args: &[&str]| drop(qemu_img(&[&["create", "-q"], args].concat()));
    let over =
        |backing: &str| create(&["-f", "qcow2", "-u", "-b", backing, "-F", "raw", &image, "1M"]);
    type Make<'a> = Box<dyn Fn() + 'a>;
    let cases: Vec<(&str, &str, Make)> = vec![
        ("a backing file", &qcow2, Box::new(|| over(&path))),
        ("a json: backing file", &qcow2, Box::new(|| over(&json))),
        (
            "a data file",
            &qcow2,
            Box::new(|| {
                let option = format!("data_file={path},data_file_raw=on");
                create(&["-f", "qcow2", "-o", &option, &image, "1M"]);
                secret();
            }),
        ),
        ("a raw image that is a qcow2", &raw, Box::new(|| over(&path))),
        (
            "a raw image below that is a qcow2",
            &below,
            Box::new(|| {
                over(&path);
                create(&["-f", "qcow2", &scratch.text("top"), "1M"]);
            }),
        ),
        ("an extent elsewhere", &vmdk, Box::new(|| std::fs::write(&image, flat(&path)).unwrap())),
        ("an extent above", &vmdk, Box::new(|| std::fs::write(&image, flat("../victim")).unwrap())),
        (
            "an extent by a link",
            &vmdk,
            Box::new(|| std::fs::write(&image, flat("link.vmdk")).unwrap()),
        ),
        (
            "an extent in an embedded text",
            &vmdk,
            Box::new(|| {
                std::fs::write(&image, sparse(&flat(&path))).unwrap();
            }),
        ),
        (
            "an extent by a protocol",
            &vmdk,
            Box::new(|| {
                std::fs::write(&image, sparse(&flat(&format!("file:{path}")))).unwrap();
            }),
        ),
    ];
    let mut tried = 0;
    for (what, words, make) in &cases {
        for name in ["image", "top"] {
            let _ = std::fs::remove_file(scratch.join(name));
        }
        make();
        for mode in ["", ",readonly=on"] {
            let words = format!("{words}{mode}");
            let (content, said, trace) = traced(&scratch, &words, "open,openat,openat2,creat");
            assert!(trace.contains("/image\""), "{what}: the trace shows nothing: {said}");
            for line in
                trace.lines().filter(|line| line.contains("victim") || line.contains("link.vmdk"))
            {
                tried += 1;
                assert!(line.contains("= -1 "), "{what}{mode}: {line}");
            }
            if let Some(content) = content {
                assert!(!content.contains(&b'S'), "{what}{mode}: its bytes were read");
            }
        }
    }
    assert!(tried >= 4, "nobody tried: {tried}");
    assert!(std::fs::read(&victim).unwrap() == vec![b'S'; 1 << 20]);
}

#[test]
fn what_is_missing_is_named_with_the_way_out() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let disk = format!("name=root,socket={}{}", scratch.text("d.sock"), Kind::QCOW2.words(&image));
    let output = Command::new(upcall_program())
        .args(["serve", "--disk", &disk])
        .env("PATH", scratch.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    for word in ["qemu-storage-daemon", "7.2", "Debian", "Fedora", "Arch"] {
        assert!(said.contains(word), "no {word}: {said}");
    }
    let refused = |words: &str, says: &str| {
        let disk = format!("name=root,socket={}{words}", scratch.text("d.sock"));
        let ended = upcall(&["serve", "--disk", &disk]);
        assert!(ended.code == Some(1) && ended.stderr.contains(says), "{words}: {}", ended.stderr);
    };
    let flat = Kind::WRITABLE[2].create(&scratch, "flat.vmdk", BYTES);
    refused(&format!(",file={},format=vmdk", flat.display()), "extents=FOLDER");
    refused(&format!(",file={},format=vdi", image.display()), "cannot be served as vdi");
    refused(&format!(",file={},format=vdi,backing=raw:x", image.display()), "only qcow2 and vmdk");
    refused(",file=/nowhere/a,format=qcow2", "no such file");
    assert_eq!(scratch.names(), ["disk", "flat-flat.vmdk", "flat.vmdk"], "something is left");
}

#[test]
fn images_are_made_converted_and_checked() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.text("a.qcow2"), scratch.text("b.vmdk"));
    upcall(&["image", "create", "--format", "qcow2", &a, "32M"]).expect_success();
    upcall(&["image", "check", "--format", "qcow2", &a]).expect_success();
    upcall(&["image", "convert", "--from", "qcow2", "--to", "vmdk", &a, &b]).expect_success();
    let info = upcall(&["image", "info", "--json", "--format", "vmdk", &b]);
    info.expect_success();
    assert!(info.stdout.contains("\"virtual-size\": 33554432"), "{}", info.stdout);
    // A damaged one: its refcounts are gone.
    let mut bytes = std::fs::read(&a).unwrap();
    bytes[65536..131072].fill(0);
    std::fs::write(&a, bytes).unwrap();
    let damaged = upcall(&["image", "check", "--format", "qcow2", &a]);
    assert!(damaged.code == Some(1) && damaged.stderr.contains("--repair"), "{damaged:?}");
}
