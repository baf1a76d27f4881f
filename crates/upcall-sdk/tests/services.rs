//! The services: issued requests, timers, watches, work, parameters, and their end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use upcall_sdk::testing::Host;
use upcall_sdk::{
    Errno, Event, Filter, Info, Instance, Issue, Issued, Level, OpSet, Param, Refused, Request,
    Timer, Verdict, Watch, warn,
};

/// Hands its instance to the test.
struct Plain {
    instance: Instance,
    timers: Mutex<Vec<Timer>>,
    watches: Mutex<Vec<Watch>>,
    /// Whether it was refused a timer and blocking work while it was dropped.
    refused_at_end: Arc<AtomicBool>,
}

impl Drop for Plain {
    fn drop(&mut self) {
        let timer = self.instance.timer(MS(1), None, || {}).err();
        let work = self.instance.run_blocking(|| {}).err();
        let is_refused = (timer, work) == (Some(Errno::ESHUTDOWN), Some(Errno::ESHUTDOWN));
        self.refused_at_end.store(is_refused, Ordering::Relaxed);
    }
}

impl Filter for Plain {
    const INFO: Info = Info { name: c"plain", ops: OpSet::ALL, issues: true, ..Info::NEW };
    const PARAMS: &'static [Param] = &[
        Param::size(c"size", c"", Some(c"4K"), 0, 1 << 20),
        Param::bool(c"flag", c"", Some(c"no")),
        Param::fraction(c"part", c"", Some(c"0.25")),
        Param::string(c"text", c"", Some(c"hello"), 0, 10),
        Param::file_read(c"file", c""),
    ];
    type Context = ();

    fn open(instance: Instance) -> Result<Self, Errno> {
        if instance.param_int(c"size") == 512 {
            return Err(Errno::EINVAL);
        }
        Ok(Plain {
            instance,
            timers: Mutex::default(),
            watches: Mutex::default(),
            refused_at_end: Arc::default(),
        })
    }

    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
        request.pass()
    }

    fn event(&self, event: Event) -> Result<(), Errno> {
        if event == Event::Stun { Err(Errno::EAGAIN) } else { Ok(()) }
    }
}

fn plain() -> (Host<Plain>, Instance) {
    let host = Host::<Plain>::builder().granted(2 << 20).open().unwrap();
    let instance = host.filter().instance.clone();
    (host, instance)
}

const MS: fn(u64) -> Duration = Duration::from_millis;

#[test]
fn parameters_arrive() {
    let (mut file, end) = UnixStream::pair().unwrap();
    let host = Host::<Plain>::builder().param("flag", "on").file("file", end).open().unwrap();
    let instance = &host.filter().instance;
    assert_eq!(instance.param_int(c"size"), 4096);
    assert_eq!(instance.param_int(c"flag"), 1);
    assert_eq!(instance.param_fraction(c"part"), Some(0.25));
    assert_eq!(instance.param_string(c"text").as_deref(), Some("hello"));
    assert_eq!(instance.param_string(c"unknown"), None);
    assert!(instance.param_fd(c"text").is_none());
    let fd = instance.param_fd(c"file").unwrap();
    UnixStream::from(fd).write_all(b"x").unwrap();
    let mut byte = [0];
    file.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
#[should_panic(expected = "cannot be")]
fn a_wrong_parameter_does_not_reach_the_filter() {
    let _ = Host::<Plain>::builder().param("size", "2M").open();
}

#[test]
fn open_may_refuse() {
    let refused = Host::<Plain>::builder().param("size", "512").open();
    assert_eq!(refused.err(), Some(Errno::EINVAL));
}

#[test]
fn an_event_may_be_refused() {
    let (mut host, _) = plain();
    assert_eq!(host.event(Event::Stun), Err(Errno::EAGAIN));
    assert_eq!(host.event(Event::Unstun), Ok(()));
}

#[test]
fn disks_are_described() {
    let (_host, instance) = plain();
    assert_eq!((instance.disk().capacity, instance.disk().block_size), (1 << 20, 512));
    assert_eq!(instance.granted_disk(1).unwrap().capacity, 2 << 20);
    assert!(instance.granted_disk(2).is_none());
}

#[test]
fn an_issued_write_and_read_go_through_a_buffer() {
    let (mut host, instance) = plain();
    let mut buffer = instance.buffer(1024).unwrap();
    assert!(buffer.copy_from(0, &[1; 512]) && buffer.copy_from(512, &[2; 512]));
    let back = Arc::new(Mutex::new(None));
    let slot = back.clone();
    let done = move |issued: Issued| *slot.lock().unwrap() = Some(issued);
    assert!(instance.issue(Issue::write(4096, buffer).on_disk(1).fua(true), done).is_ok());
    assert!(back.lock().unwrap().is_none(), "nothing ends by itself");
    let io = host.issued().remove(0);
    assert_eq!((io.offset, io.length, io.disk, io.fua), (4096, 1024, 1, true));
    host.finish(io.id, Ok(()));
    assert_eq!(host.stored(1)[4096..4608], [1; 512]);

    let issued = back.lock().unwrap().take().unwrap();
    assert_eq!(issued.result, Ok(()));
    let slot = back.clone();
    let done = move |issued: Issued| *slot.lock().unwrap() = Some(issued);
    assert!(instance.issue(Issue::read(4608, issued.buffer.unwrap()).on_disk(1), done).is_ok());
    host.settle();
    let mut bytes = [0; 512];
    let issued = back.lock().unwrap().take().unwrap();
    assert!(issued.buffer.unwrap().copy_to(0, &mut bytes));
    assert_eq!(bytes, [2; 512]);
    assert_eq!(host.buffers(), 0);
}

#[test]
fn a_refused_issue_gives_everything_back() {
    let (mut host, instance) = plain();
    host.limit_issued(1);
    let never = |_: Issued| panic!("done was called for a refused request");
    assert!(instance.issue(Issue::flush(), |_| {}).is_ok());
    let buffer = instance.buffer(512).unwrap();
    let Err(Refused { errno, issue, .. }) = instance.issue(Issue::write(0, buffer), never) else {
        panic!("a request too many was taken");
    };
    assert_eq!(errno, Errno::EAGAIN);
    host.settle();
    assert!(instance.issue(issue, |_| {}).is_ok());
    host.settle();
    let unaligned = instance.issue(Issue::discard(1, 512), never).err().unwrap();
    assert_eq!(unaligned.errno, Errno::EINVAL);
    let unknown = instance.issue(Issue::flush().on_disk(7), never).err().unwrap();
    assert_eq!(unknown.errno, Errno::ENODEV);
}

#[test]
fn memory_ends_and_comes_back() {
    let (mut host, instance) = plain();
    host.limit_memory(1024);
    let first = instance.buffer(1024).unwrap();
    assert!(instance.buffer(512).is_none());
    drop(first);
    assert!(instance.buffer(512).is_some());
}

#[test]
fn a_timer_fires_after_its_delay_and_then_every_period() {
    let (mut host, instance) = plain();
    let fired = Arc::new(AtomicU32::new(0));
    let count = fired.clone();
    let run = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let timer = instance.timer(MS(10), Some(MS(5)), run).unwrap();
    host.advance(MS(9));
    assert_eq!(fired.load(Ordering::Relaxed), 0);
    host.advance(MS(11));
    assert_eq!(fired.load(Ordering::Relaxed), 3, "at 10, 15 and 20 ms");
    drop(timer);
    host.advance(MS(100));
    assert_eq!(fired.load(Ordering::Relaxed), 3);
    assert_eq!(Arc::strong_count(&fired), 1, "the closure is freed");
}

#[test]
fn part_of_a_millisecond_is_waited_in_full() {
    let (mut host, instance) = plain();
    let fired = Arc::new(AtomicBool::new(false));
    let flag = fired.clone();
    let run = move || flag.store(true, Ordering::Relaxed);
    let _timer = instance.timer(Duration::from_micros(1500), None, run).unwrap();
    host.advance(MS(1));
    assert!(!fired.load(Ordering::Relaxed));
    host.advance(MS(1));
    assert!(fired.load(Ordering::Relaxed));
}

#[test]
fn a_timer_may_stop_itself() {
    let (mut host, instance) = plain();
    let fired = Arc::new(AtomicU32::new(0));
    let slot: Arc<Mutex<Option<Timer>>> = Arc::default();
    let (count, own) = (fired.clone(), slot.clone());
    let timer = instance.timer(MS(1), Some(MS(1)), move || {
        let own = own.lock().unwrap().take();
        drop(own);
        count.fetch_add(1, Ordering::Relaxed); // what the closure owns is still there
    });
    *slot.lock().unwrap() = Some(timer.unwrap());
    host.advance(MS(10));
    assert_eq!(fired.load(Ordering::Relaxed), 1);
    assert_eq!(Arc::strong_count(&fired), 1, "the closure is freed");
}

#[test]
fn a_watch_runs_while_its_descriptor_is_ready() {
    let (mut host, instance) = plain();
    let (mut near, far) = UnixStream::pair().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let bytes = seen.clone();
    let watch = instance.watch(far, libc::POLLIN, move |mut far: &UnixStream, revents| {
        let mut byte = [0];
        assert!(far.read(&mut byte).is_ok());
        bytes.lock().unwrap().push((byte[0], revents));
    });
    assert!(!host.poll_watches());
    near.write_all(b"a").unwrap();
    assert!(host.poll_watches());
    assert_eq!(*seen.lock().unwrap(), [(b'a', libc::POLLIN)]);
    drop(watch);
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "the watch has closed its end");
}

#[test]
fn blocking_work_runs_once_and_before_close_returns() {
    let (host, instance) = plain();
    let runs = Arc::new(AtomicU32::new(0));
    let count = runs.clone();
    let work = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    instance.run_blocking(work).unwrap();
    assert_eq!(runs.load(Ordering::Relaxed), 0);
    drop(host);
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

#[test]
fn counters_and_log_lines_arrive() {
    let (host, instance) = plain();
    let counter = instance.counter(c"things");
    counter.add(2);
    instance.counter(c"things").add(3);
    assert_eq!(host.counter("things"), 5);
    warn!(instance, "{} of {}\0", 1, 2);
    assert_eq!(host.log(), [(Level::Warn, "1 of 2?".to_owned())]);
}

#[test]
fn after_close_nothing_reaches_the_framework() {
    let (host, instance) = plain();
    let counter = instance.counter(c"late");
    drop(host);
    counter.add(1);
    warn!(instance, "late");
    assert_eq!(instance.param_int(c"size"), 0);
    assert_eq!(instance.param_string(c"text"), None);
    assert!(instance.granted_disk(1).is_none());
    assert!(instance.buffer(512).is_none());
    assert_eq!(instance.timer(MS(1), None, || {}).err(), Some(Errno::ESHUTDOWN));
    assert_eq!(instance.run_blocking(|| {}).err(), Some(Errno::ESHUTDOWN));
    let refused = instance.issue(Issue::flush(), |_| {}).err().unwrap();
    assert_eq!(refused.errno, Errno::ESHUTDOWN);
    assert_eq!(instance.disk().capacity, 1 << 20, "what it was when it was opened");
}

#[test]
fn close_stops_what_the_filter_left_running() {
    let (host, instance) = plain();
    let alive = Arc::new(());
    let (in_timer, in_watch) = (alive.clone(), alive.clone());
    let timer = instance.timer(MS(1), Some(MS(1)), move || drop(in_timer.clone())).unwrap();
    let (_near, far) = UnixStream::pair().unwrap();
    let watch = instance.watch(far, libc::POLLIN, move |_, _| drop(in_watch.clone())).unwrap();
    drop(host); // asserts that the framework was told to stop them
    assert_eq!(Arc::strong_count(&alive), 1, "the closures are freed");
    drop((timer, watch)); // and not stopped twice
}

#[test]
fn nothing_new_begins_while_the_filter_is_dropped() {
    let (host, _) = plain();
    let refused = host.filter().refused_at_end.clone();
    drop(host);
    assert!(refused.load(Ordering::Relaxed));
}

#[test]
fn timers_kept_in_the_filter_end_with_it() {
    let (host, instance) = plain();
    let timer = instance.timer(MS(1), None, || {}).unwrap();
    host.filter().timers.lock().unwrap().push(timer);
    let (_near, far) = UnixStream::pair().unwrap();
    let watch = instance.watch(far, libc::POLLIN, |_, _| {}).unwrap();
    host.filter().watches.lock().unwrap().push(watch);
    drop(host);
}

/// Runs itself again as a process of its own, which must die.
#[test]
fn a_panic_ends_the_process_and_not_the_framework() {
    if std::env::var_os("PANIC_HERE").is_some() {
        let (mut host, instance) = plain();
        let _timer = instance.timer(MS(1), None, || panic!("of a timer")).unwrap();
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            host.advance(MS(1));
        }));
        println!("the panic came through: {}", unwound.is_err());
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["a_panic_ends_the_process_and_not_the_framework", "--exact", "--nocapture"])
        .env("PANIC_HERE", "1")
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && !out.contains("came through"), "{out}{err}");
    assert!(err.contains("panic in a timer: of a timer"), "{err}");
}
