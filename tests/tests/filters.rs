//! What each shipped filter does to a real disk, seen by a guest and in the image.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use upcall_tests::{
    Client, Disk, Driver, Filter, Io, Mix, Outcome, Rng, Scratch, Server, Top, Workload, c_filter,
    rust_filter, upcall,
};

const BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

/// One disk named `root` in `scratch`, behind one filter with these words.
struct One {
    scratch: Scratch,
    image: PathBuf,
    server: Server,
    driver: Driver,
}

impl One {
    fn behind(filter: &Path, words: &str) -> One {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", BYTES);
        let disk = disk("root", &image, &scratch.join("disk.sock"));
        let filter = format!("disk=root,file={}{words}", filter.display());
        let server = Server::serve(&scratch, &[&disk], &[&filter]);
        let driver = Driver::usual(&scratch.join("disk.sock"), 1);
        One { scratch, image, server, driver }
    }

    fn stats(&self) -> PathBuf {
        self.scratch.join("disk.sock.stats")
    }

    /// Ends everything in order and gives what the image holds.
    #[track_caller]
    fn end(self) -> Vec<u8> {
        drop(self.driver);
        self.server.stop();
        std::fs::read(&self.image).unwrap()
    }
}

fn disk(name: &str, image: &Path, socket: &Path) -> String {
    format!("name={name},file={},socket={},direct=off", image.display(), socket.display())
}

fn write(offset: u64, length: u32) -> Io {
    Io::Write { offset, length }
}

// ------------------------------------------------------------------------ split

fn split(on_error: &str) -> String {
    let file = rust_filter("split");
    format!("disk=root,file={},grant=mirror,param.on_error={on_error}", file.display())
}

#[test]
fn split_keeps_the_second_disk_equal_byte_for_byte() {
    let scratch = Scratch::new();
    let (image, mirror) = (scratch.image("disk.img", BYTES), scratch.image("mirror.img", BYTES));
    // Stale data: what is zeroed on the first disk has to be zeroed on the second, too.
    std::fs::write(&mirror, vec![0xee; BYTES as usize]).unwrap();
    let root = disk("root", &image, &scratch.join("disk.sock")) + ",queues=4";
    let second = format!("name=mirror,file={},direct=off", mirror.display());
    let server = Server::serve(&scratch, &[&root, &second], &[&split("fail")]);
    let mut driver = Driver::usual(&scratch.join("disk.sock"), 4);
    let mut workload = Workload::on(Rng::seed(), &mut driver);
    workload.run(&mut driver, &Mix::default(), 3_000);
    workload.read_back(&mut driver);
    drop(driver);
    server.stop();
    workload.check_image(&image);
    workload.check_image(&mirror);
    assert!(!scratch.join("mirror.sock").exists(), "a granted disk is for the filter alone");
}

#[test]
fn split_is_refused_a_second_disk_that_is_too_small() {
    let scratch = Scratch::new();
    let (image, mirror) =
        (scratch.image("disk.img", BYTES), scratch.image("mirror.img", BYTES / 2));
    let root = disk("root", &image, &scratch.join("disk.sock"));
    let second = format!("name=mirror,file={},direct=off", mirror.display());
    let filter = split("fail");
    let ended = upcall(&["serve", "--disk", &root, "--disk", &second, "--filter", &filter]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    for word in ["root", "split", "the second disk has 16777216 bytes and needs 33554432"] {
        assert!(ended.stderr.contains(word), "no {word:?} in:\n{}", ended.stderr);
    }
    assert_eq!(scratch.names(), ["disk.img", "mirror.img"]);
}

// ------------------------------------------------------------------------ fault

#[test]
fn fault_fails_the_operations_in_its_range_and_no_others() {
    let words = ",param.effect=error,param.ops=write discard,param.offset=1M,param.length=64K"
        .replace(' ', ",,");
    let mut one = One::behind(&rust_filter("fault"), &words);
    let outside = [write(0, 4096), write(MIB - 4096, 4096), write(MIB + 65536, 4096)];
    let touching = [write(MIB, 512), write(MIB - 4096, 8192), write(MIB + 65024, 4096)];
    one.driver.put(0, 0, &[0x11; 8192]);
    for io in outside {
        assert_eq!(one.driver.run(0, io), Outcome::Ok, "{io:?}");
    }
    for io in touching {
        assert_eq!(one.driver.run(0, io), Outcome::IoError, "{io:?}");
    }
    let discard = Io::Discard { offset: MIB, length: 4096 };
    assert_eq!(one.driver.run(0, discard), Outcome::IoError);
    // Operations that were not chosen.
    assert_eq!(one.driver.read(0, MIB, 4096), [0; 4096]);
    let zeroes = Io::WriteZeroes { offset: MIB, length: 4096, unmap: false };
    assert_eq!(one.driver.run(0, zeroes), Outcome::Ok);
    assert_eq!(one.driver.run(0, Io::Flush), Outcome::Ok);
    Top::wait(&one.stats(), "hits", |top| top.counter("root", "fault", "hits") == Some(4));
    let image = one.end();
    let at = |offset: u64, length: usize| &image[offset as usize..][..length];
    assert_eq!(at(MIB - 4096, 4096), [0x11; 4096]);
    assert_eq!(at(MIB, 65536), [0; 65536], "what failed reached the image");
    assert_eq!(at(MIB + 65536, 4096), [0x11; 4096]);
}

#[test]
fn fault_loses_writes_that_the_guest_believes_done() {
    let words = ",param.effect=lose,param.ops=write,param.offset=1M,param.length=1M";
    let mut one = One::behind(&rust_filter("fault"), words);
    one.driver.write(0, MIB, &[0x22; 65536]);
    one.driver.write(0, 3 * MIB, &[0x33; 65536]);
    assert_eq!(one.driver.run(0, Io::Flush), Outcome::Ok);
    assert_eq!(one.driver.read(0, MIB, 65536), [0; 65536]);
    let image = one.end();
    assert_eq!(image[MIB as usize..][..65536], [0; 65536]);
    assert_eq!(image[3 * MIB as usize..][..65536], [0x33; 65536]);
}

#[test]
fn fault_tears_writes_between_two_blocks() {
    let words = ",param.effect=tear,param.ops=write,param.seed=5";
    let mut one = One::behind(&rust_filter("fault"), words);
    for index in 0..16 {
        one.driver.write(0, index * MIB, &[0x44; 65536]);
    }
    let image = one.end();
    let mut lengths = BTreeSet::new();
    for index in 0..16 {
        let written = &image[(index * MIB) as usize..][..65536];
        let length = written.iter().position(|&byte| byte == 0).expect("nothing is torn off");
        assert!(length >= 512 && length % 512 == 0, "write {index}: {length} bytes arrived");
        assert!(written[length..].iter().all(|&byte| byte == 0), "write {index} has a hole");
        lengths.insert(length);
    }
    assert!(lengths.len() > 4, "not by chance: {lengths:?}");
}

// --------------------------------------------------------------------- throttle

#[test]
fn throttle_lets_requests_go_at_its_rate_and_counts_them() {
    let mut one = One::behind(&rust_filter("throttle"), ",param.iops=200,param.iops_burst=10");
    let began = Instant::now();
    let (mut begun, mut ended) = (0, 0);
    let mut free: Vec<usize> = (0..one.driver.slots()).collect();
    while ended < 110 {
        while let Some(slot) = if begun < 110 { free.pop() } else { None } {
            one.driver.submit(0, slot, Io::Read { offset: 0, length: 512 }, &[512]);
            begun += 1;
        }
        for (slot, outcome) in one.driver.ended(0) {
            assert_eq!(outcome, Outcome::Ok);
            free.push(slot);
            ended += 1;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{ended} of 110 ended");
        one.driver.wait(0, Duration::from_millis(5));
    }
    // 10 at once, and 100 more at 200 a second.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(450), "110 requests in {took:?}");
    Top::wait(&one.stats(), "what was held, released", |top| {
        let counter = |name| top.counter("root", "throttle", name);
        // The burst is not held.
        matches!(counter("held"), Some(80..=100))
            && counter("released") == counter("held")
            && counter("cancelled") == Some(0)
    });
    one.end();
}

// ------------------------------------------------------------------------ trace

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
    lines.unwrap_or_else(|error| panic!("{error} in:\n{text}"))
}

#[test]
fn trace_writes_a_line_for_every_request() {
    let scratch = Scratch::new();
    let words = format!(",param.file={}", scratch.text("trace.jsonl"));
    let mut one = One::behind(&c_filter("trace", 64), &words);
    let mut expected = Vec::new();
    for index in 0..50 {
        let offset = index * 65536;
        let ios = [
            ("write", offset, 4096, write(offset, 4096)),
            ("read", offset, 8192, Io::Read { offset, length: 8192 }),
            ("flush", 0, 0, Io::Flush),
            ("discard", offset, 4096, Io::Discard { offset, length: 4096 }),
            ("write_zeroes", offset, 512, Io::WriteZeroes { offset, length: 512, unmap: true }),
        ];
        for (op, offset, length, io) in ios {
            assert_eq!(one.driver.run(0, io), Outcome::Ok, "{io:?}");
            expected.push((op, offset, length));
        }
    }
    one.end();
    let lines = lines(&scratch.join("trace.jsonl"));
    let seen: Vec<(&str, u64, u64)> = lines
        .iter()
        .map(|line| {
            let number = |key: &str| line[key].as_u64().unwrap_or_else(|| panic!("{key}: {line}"));
            assert_eq!(line["status"], 0, "{line}");
            assert!(number("ns") > 0 && number("start_ns") > 0, "{line}");
            (line["op"].as_str().unwrap(), number("offset"), number("length"))
        })
        .collect();
    assert!(seen == expected, "{seen:?}\nis not\n{expected:?}");
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line["seq"], index, "{line}");
        assert_eq!(line["unmap"] == true, line["op"] == "write_zeroes", "{line}");
    }
}

#[test]
fn trace_misses_no_request_of_several_queues_under_load() {
    let mut disk = Disk::serve(BYTES, 4, "", &[Filter::Trace]);
    let mut driver = Driver::usual(&disk.socket, 4);
    Workload::new(Rng::seed(), BYTES).run(&mut driver, &Mix::default(), 5_000);
    drop(driver);
    disk.stop();
    let lines = lines(&disk.scratch.join("trace.jsonl"));
    let numbers: BTreeSet<u64> = lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect();
    assert_eq!((lines.len(), numbers.len()), (5_000, 5_000));
    assert_eq!((numbers.first(), numbers.last()), (Some(&0), Some(&4_999)));
    let threads: BTreeSet<u64> =
        lines.iter().map(|line| line["thread"].as_u64().unwrap()).collect();
    assert_eq!(threads.len(), 4, "one for each queue: {threads:?}");
}
