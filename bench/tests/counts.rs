//! What a request costs, counted and not timed: allocations, copied bytes, system calls and
//! instructions of the queue thread in steady state. Holds on any machine, however busy.
//!
//! Each bound is what was counted when it was set. Who raises one says in the commit what it
//! is paid for; a test fails when a count grows by more than 5 % of the bound, and a bound of
//! nothing stays nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use upcall_bench::filters::{Data, Filters, Kind};
use upcall_block::{
    DiskInfo, Op, QueueError, Range, Request, RequestFlags, RequestQueue, Status, Tag,
};
use upcall_measure::process::Used;
use upcall_measure::rig::{self, Link};
use upcall_ring::{Access, Buffers, Doorbell, Mapping, memfd};
use upcall_tests::Scratch;
use upcall_worker::Placement;

// ------------------------------------------------------------------ counting

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

// SAFETY: every call is passed on as it is; the count is a thread's own number, which
// allocates nothing itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no counter any more; nothing here counts those.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Of one thread, so far or for some requests.
#[derive(Clone, Copy, Debug)]
struct Counts {
    requests: u64,
    allocations: u64,
    copied_bytes: u64,
    sleeps: u64,
}

impl Counts {
    fn now(requests: u64) -> Counts {
        Counts {
            requests,
            sleeps: Used::by_this_thread().sleeps,
            copied_bytes: upcall_ring::counting::copied_bytes(),
            allocations: ALLOCATIONS.with(Cell::get),
        }
    }

    fn since(self, before: Counts) -> Counts {
        Counts {
            requests: self.requests - before.requests,
            allocations: self.allocations - before.allocations,
            copied_bytes: self.copied_bytes - before.copied_bytes,
            sleeps: self.sleeps - before.sleeps,
        }
    }
}

/// A frontend's queue that sends `warm` requests and then those that count.
struct CountedQueue {
    depth: usize,
    op: Op,
    warm: u64,
    all: u64,
    range: Range,
    data: Buffers,
    doorbell: Doorbell,
    free: Vec<u32>,
    taken: u64,
    ended: u64,
    before: Option<Counts>,
    report: Sender<Counts>,
}

const LENGTH: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

impl CountedQueue {
    fn new(
        info: &DiskInfo,
        op: Op,
        depth: usize,
        counted: u64,
    ) -> (CountedQueue, Receiver<Counts>) {
        let fd = memfd("guest", LENGTH).unwrap();
        let memory = Arc::new(Mapping::new(&fd, 0, LENGTH, Access::ReadWrite).unwrap());
        let (report, counts) = channel();
        let warm = 2000;
        let queue = CountedQueue {
            depth,
            op,
            warm,
            all: warm + counted,
            range: Range::new(8192, LENGTH as u64, info).unwrap(),
            data: Buffers::of(&memory, 0, LENGTH, true).unwrap(),
            doorbell: Doorbell::new().unwrap(),
            free: (0..depth as u32).collect(),
            taken: 0,
            ended: 0,
            before: None,
            report,
        };
        (queue, counts)
    }

    fn can_take(&self) -> bool {
        !self.free.is_empty() && self.taken < self.all
    }
}

impl RequestQueue for CountedQueue {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        for _ in 0..max.min(self.depth) {
            if !self.can_take() {
                break;
            }
            let Some(tag) = self.free.pop() else { break };
            self.taken += 1;
            out.push(Request {
                tag: Tag(tag),
                op: self.op,
                range: self.range,
                flags: RequestFlags::default(),
                data: self.data.clone(),
            });
        }
        Ok(())
    }

    fn complete(&mut self, tag: Tag, status: Status) {
        assert_eq!(status, Ok(()));
        self.free.push(tag.0);
        self.ended += 1;
        if self.ended == self.warm {
            // Looking allocates: what counts is counted behind it.
            let looked = Counts::now(self.ended);
            self.before = Some(Counts { allocations: ALLOCATIONS.with(Cell::get), ..looked });
        } else if self.ended == self.all {
            let allocations = ALLOCATIONS.with(Cell::get);
            let counts = Counts { allocations, ..Counts::now(self.ended) };
            self.report.send(counts.since(self.before.unwrap())).unwrap();
        }
    }

    fn publish(&mut self) {}

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.doorbell.as_fd())
    }

    fn before_sleep(&mut self) -> bool {
        !self.can_take()
    }

    fn after_sleep(&mut self) {
        self.doorbell.clear();
    }
}

/// What `requests` requests cost behind a chain of `filters` filters.
fn count(chain: (Kind, usize, Placement), op: Op, depth: usize, requests: u64) -> Counts {
    let (kind, filters, placement) = chain;
    // Of its own: what another test has loaded is not to be built anew under its feet.
    let scratch = Scratch::new();
    let folder = Filters::new(scratch.join("filters")).unwrap();
    let link = |number| Link { placement, ..Link::to(folder.build(kind, number).unwrap()) };
    let chain: Vec<Link> = (0..filters).map(link).collect();
    let worker = rig::worker(&chain, Arc::new(|_, text| panic!("{text}"))).unwrap();
    let (queue, counts) = CountedQueue::new(&worker.disks()[0].info, op, depth, requests);
    worker.start_queue(0, 0, Box::new(queue));
    let counts = counts.recv_timeout(PATIENCE).expect("requests end");
    let failures = worker.shutdown().failures;
    assert!(failures.is_empty(), "{failures:?}");
    counts
}

/// Fails if a count for each request is above its bound by more than 5 %.
#[track_caller]
fn expect_at_most(what: &str, count: u64, requests: u64, bound: f64) {
    let each = count as f64 / requests as f64;
    assert!(
        each <= bound * 1.05,
        "{each} {what} for each request; the bound is {bound} and 5 % of it"
    );
}

const REQUESTS: u64 = 5000;

// ------------------------------------------------------------------ promises

#[test]
fn a_request_without_filters_allocates_nothing_and_copies_nothing() {
    for op in [Op::Write, Op::Read] {
        let counts = count((Kind::PLAIN, 0, Placement::Isolated), op, 32, REQUESTS);
        expect_at_most("allocations", counts.allocations, REQUESTS, 0.0);
        expect_at_most("copied bytes", counts.copied_bytes, REQUESTS, 0.0);
    }
}

#[test]
fn a_chain_of_filters_that_see_no_data_copies_no_byte() {
    for placement in [Placement::Inline, Placement::Isolated] {
        for op in [Op::Write, Op::Read] {
            let counts = count((Kind::PLAIN, 3, placement), op, 8, REQUESTS);
            assert_eq!(counts.copied_bytes, 0, "{placement:?}, {op}");
        }
    }
}

#[test]
fn data_is_copied_once_for_the_chain_and_once_more_for_each_filter_that_may_change_it() {
    // Of what a filter may change, the worker keeps how it was before: for the next life of a
    // filter that dies while it has it.
    for (data, copies) in [(Data::Sees, 1.0), (Data::Changes, 3.0)] {
        for op in [Op::Write, Op::Read] {
            let chain = (Kind::with(data), 2, Placement::Isolated);
            let counts = count(chain, op, 8, REQUESTS);
            let bound = copies * LENGTH as f64;
            expect_at_most("copied bytes", counts.copied_bytes, REQUESTS, bound);
            // Fewer would mean that this counts nothing.
            let each = counts.copied_bytes as f64 / REQUESTS as f64;
            assert!(each >= bound * 0.95, "{data:?}, {op}: {each} copied bytes for each request");
        }
    }
}

#[test]
fn an_up_call_allocates_nothing_unless_the_thread_sleeps() {
    for (kind, op) in [(Kind::PLAIN, Op::Write), (Kind::with(Data::Changes), Op::Read)] {
        let counts = count((kind, 1, Placement::Isolated), op, 32, REQUESTS);
        // What a sleep looks at is put into a list. A sleep costs microseconds in any case.
        let awake = counts.allocations.saturating_sub(2 * counts.sleeps);
        // A slab that grows once more than it did in the warm-up is not steady yet.
        assert!(awake <= 8, "{counts:?}");
    }
    let counts = count((Kind::PLAIN, 1, Placement::Inline), Op::Write, 32, REQUESTS);
    expect_at_most("allocations", counts.allocations, REQUESTS, 0.0);
}

#[test]
fn what_is_allocated_on_a_thread_is_counted_there() {
    let before = ALLOCATIONS.with(Cell::get);
    let boxes: Vec<Box<u64>> = (0..10).map(Box::new).collect();
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 11);
    drop(boxes);
}

#[test]
fn a_request_through_an_inline_filter_makes_no_system_call() {
    let calls = |requests: u64| -> BTreeMap<String, i64> {
        let summary = std::env::temp_dir().join(format!("upcall-calls-{}", std::process::id()));
        let output = Command::new("strace")
            .args(["-f", "-c", "-U", "calls,name", "-o"])
            .arg(&summary)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "requests_to_be_watched", "--ignored"])
            .env("UPCALL_REQUESTS", requests.to_string())
            .output()
            .expect("strace (scripts/deps installs it)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = std::fs::read_to_string(&summary).unwrap();
        let _ = std::fs::remove_file(&summary);
        let call = |line: &str| {
            let (calls, name) = line.trim().split_once(' ')?;
            Some((name.trim().to_owned(), calls.parse().ok()?))
        };
        text.lines().filter_map(call).filter(|(name, _)| name != "total").collect()
    };
    let (few, many) = (calls(1000), calls(101_000));
    assert!(few.contains_key("mmap"), "the summary was not understood: {few:?}");
    let more: i64 = many.iter().map(|(name, calls)| calls - few.get(name).unwrap_or(&0)).sum();
    // Starting and ending is never quite the same twice, least of all on a busy machine: one for
    // each hundred is none.
    assert!(more < 1000, "100,000 more requests made {more} more calls: {few:?} {many:?}");
}

/// Instructions of the queue thread for a request, as this test is compiled: for debugging,
/// hardly optimised. The filter runs in the thread, so that nobody waits and looks meanwhile;
/// its host's code is that of one with a process of its own.
#[test]
fn a_request_and_an_up_call_take_no_more_instructions_than_they_did() {
    let count = |filters: usize, requests: u64| -> u64 {
        let out = std::env::temp_dir().join(format!("upcall-callgrind-{}", std::process::id()));
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--fair-sched=yes"])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "requests_to_be_watched", "--ignored"])
            .env("UPCALL_REQUESTS", requests.to_string())
            .env("UPCALL_FILTERS", filters.to_string())
            .output()
            .expect("valgrind (scripts/deps installs it)");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let _ = std::fs::remove_file(&out);
        let collected = said.lines().find_map(|line| line.split_once("Collected : "));
        collected.expect("callgrind says how many").1.trim().parse().unwrap()
    };
    // Many, as start and end, with threads that wait for each other, differ by a million or two.
    let each = |filters| (count(filters, 201_000) - count(filters, 1000)) as f64 / 200_000.0;
    let (without, with) = (each(0), each(1));
    println!("{without} instructions for a request, {} more for an up-call", with - without);
    for (what, instructions, bound) in [
        ("a request", without, REQUEST_INSTRUCTIONS),
        ("an up-call", with - without, UP_CALL_INSTRUCTIONS),
    ] {
        assert!(
            instructions <= bound * 1.05,
            "{instructions} instructions for {what}; the bound is {bound} and 5 % of it"
        );
        // Far fewer would mean that this counts something else.
        assert!(instructions > bound / 2.0, "{instructions} instructions for {what}");
    }
}

const REQUEST_INSTRUCTIONS: f64 = 1880.0;
const UP_CALL_INSTRUCTIONS: f64 = 1265.0;

#[test]
#[ignore = "run by another test, under strace or valgrind"]
fn requests_to_be_watched() {
    let Ok(requests) = std::env::var("UPCALL_REQUESTS") else { return };
    let filters = std::env::var("UPCALL_FILTERS").map_or(1, |count| count.parse().unwrap());
    let chain = (Kind::PLAIN, filters, Placement::Inline);
    count(chain, Op::Write, 32, requests.parse().unwrap());
}
