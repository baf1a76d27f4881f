//! A filter of this SDK in the real filter host, in a process of its own: what the mock of
//! `testing` promises must be so there.
//!
//! The filter is the example `rounds`, which `cargo test` builds beside this test.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use upcall_abi::control::Disk;
use upcall_abi::filter::{ISSUE_ARENA_SIZE, op, verdict};
use upcall_abi::ring::{Completion, NO_DATA, Submission, completion_kind, submission_kind};
use upcall_filterhost::{Counters, FilterFile, HostProcess, OpenInstance, Placement, params};
use upcall_ring::channel::Channel;
use upcall_ring::{Access, Doorbell, Mapping, memfd, read_only_view};

const ARENA_SIZE: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
const DISK: Disk = Disk { capacity: 1 << 30, block_size: 512, read_only: 0 };

/// A worker with one disk, a granted one, and one queue.
struct Worker {
    host: HostProcess,
    channel: Channel,
    host_bell: Doorbell,
    arena: Mapping,
    issue_arena: Mapping,
    counters: Counters,
    log: Arc<Mutex<Vec<String>>>,
}

fn example() -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let path = deps.parent().unwrap().join("../examples/librounds.so");
    assert!(path.exists(), "{path:?} is missing: cargo build -p upcall-sdk --examples");
    path
}

impl Worker {
    fn serving() -> Worker {
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = log.clone();
        let sink = Arc::new(move |line: upcall_filterhost::LogLine| {
            lines.lock().unwrap().push(line.text);
        });
        let file = FilterFile::open(example()).unwrap();
        let mut host = HostProcess::start(&file, Placement::Isolated, sink).unwrap();
        let description = host.describe().unwrap();
        assert_eq!((description.name.as_str(), description.ops), ("rounds", 0b1_1110));
        assert!(description.issues() && !description.writes_data());

        let arena_fd = memfd("arena", ARENA_SIZE).unwrap();
        let arena = Mapping::new(&arena_fd, 0, ARENA_SIZE, Access::ReadWrite).unwrap();
        let view = read_only_view(&arena_fd).unwrap();
        host.arena(0, view.as_fd(), ARENA_SIZE as u64, false).unwrap();
        let issue_fd = memfd("issue", ISSUE_ARENA_SIZE as usize).unwrap();
        let issue_arena =
            Mapping::new(&issue_fd, 0, ISSUE_ARENA_SIZE as usize, Access::ReadWrite).unwrap();
        host.issue_arena(issue_fd.as_fd(), ISSUE_ARENA_SIZE).unwrap();
        let (channel, ring) = Channel::create(64).unwrap();
        let (host_bell, bell) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
        host.channel(0, 0, ring.as_fd(), host_bell.as_fd(), bell.as_fd()).unwrap();
        host.load().unwrap();
        let counters = Counters::new().unwrap();
        let params = params::resolve(&description, &[("delay".into(), "20ms".into())]).unwrap();
        let open = OpenInstance {
            instance: 0,
            arena: 0,
            disks: &[DISK, DISK],
            params: &params,
            counters: &counters,
            sidecar: None,
            extents: None,
        };
        host.open(&open).unwrap();
        host.serve().unwrap();
        Worker { host, channel, host_bell, arena, issue_arena, counters, log }
    }

    fn submit(&mut self, submission: Submission) {
        self.channel.submissions.push(&submission).unwrap();
        self.channel.submissions.wake(&self.host_bell);
    }

    /// The next completion that is not HELD; the cookie of the last HELD.
    fn completion(&mut self) -> Option<(Completion, u64)> {
        let deadline = Instant::now() + PATIENCE;
        let mut cookie = 0;
        while Instant::now() < deadline {
            match self.channel.completions.pop() {
                Some(held) if held.kind == completion_kind::HELD => cookie = held.cookie,
                Some(completion) => return Some((completion, cookie)),
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        None
    }

    /// The cookie of a request that the filter goes on holding.
    fn held(&mut self) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(held) = self.channel.completions.pop() {
                assert_eq!(held.kind, completion_kind::HELD);
                return held.cookie;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        panic!("the request is not held");
    }
}

fn start(op: u8, token: u64, length: u32, data: u64) -> Submission {
    Submission {
        kind: submission_kind::START,
        op,
        token,
        offset: 8192,
        length,
        data,
        ..Submission::default()
    }
}

#[test]
fn a_write_is_copied_from_the_arena_and_its_context_comes_back() {
    let mut worker = Worker::serving();
    worker.arena.write(4096, &[0x5a; 512]).unwrap();
    worker.submit(start(op::WRITE, 7, 512, 4096));
    let (issue, _) = worker.completion().expect("no issued request");
    assert_eq!((issue.kind, issue.code, issue.disk), (completion_kind::ISSUE, op::WRITE, 1));
    assert_eq!((issue.offset, issue.length), (8192, 512));
    let mut copy = [0; 512];
    worker.issue_arena.read(issue.data as usize, &mut copy).unwrap();
    assert_eq!(copy, [0x5a; 512]);

    let ended = submission_kind::ISSUED;
    worker.submit(Submission { kind: ended, token: issue.token, ..Submission::default() });
    let (watch, _) = worker.completion().expect("no verdict");
    assert_eq!((watch.kind, watch.code), (completion_kind::VERDICT, verdict::WATCH));
    assert_eq!(watch.token, 7);
    let done = Submission {
        kind: submission_kind::DONE,
        cookie: watch.cookie,
        ..start(op::WRITE, 8, 512, NO_DATA)
    };
    worker.submit(done);
    let (up, _) = worker.completion().expect("no verdict");
    assert_eq!((up.token, up.code, up.status), (8, verdict::PASS, 0));
    assert_eq!(worker.counters.snapshot(), [("completed".to_owned(), 1)]);
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
    assert_eq!(*worker.log.lock().unwrap(), ["a disk of 1073741824 bytes"]);
}

#[test]
fn a_read_is_held_for_its_time_and_let_go_by_the_timer() {
    let mut worker = Worker::serving();
    let begin = Instant::now();
    worker.submit(start(op::READ, 9, 512, NO_DATA));
    let (pass, _) = worker.completion().expect("no verdict");
    assert_eq!((pass.token, pass.code), (9, verdict::PASS));
    assert!(begin.elapsed() >= Duration::from_millis(19), "{:?}", begin.elapsed());
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
}

#[test]
fn a_cancel_finds_what_is_held() {
    let mut worker = Worker::serving();
    worker.submit(start(op::FLUSH, 10, 0, NO_DATA));
    let cookie = worker.held();
    let cancel =
        Submission { kind: submission_kind::CANCEL, cookie, ..start(op::FLUSH, 10, 0, NO_DATA) };
    worker.submit(cancel);
    let (fail, _) = worker.completion().expect("no verdict");
    assert_eq!((fail.token, fail.code, fail.status), (10, verdict::FAIL, -125));
    worker.submit(cancel); // too late, and without effect
    worker.submit(start(op::READ, 11, 512, NO_DATA));
    assert_eq!(worker.completion().expect("no verdict").0.token, 11);
    worker.host.close(0).unwrap();
    worker.host.quit().unwrap();
}

#[test]
fn a_panic_ends_the_filter_host_and_is_logged() {
    let mut worker = Worker::serving();
    worker.submit(start(op::DISCARD, 12, 512, NO_DATA));
    let deadline = Instant::now() + PATIENCE;
    let exit = loop {
        let _ = worker.host.service();
        if let Some(exit) = worker.host.exit_description() {
            break exit;
        }
        assert!(Instant::now() < deadline, "the filter host lives on");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(exit.contains("signal 6") || exit.contains("ABRT"), "{exit}");
    let _ = worker.host.service();
    let log = worker.log.lock().unwrap();
    let line = "panic in start_io: a discard, as the test asked";
    assert!(log.iter().any(|text| text == line), "{log:?}");
}
