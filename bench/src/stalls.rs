//! What a guest feels when something dies: the longest request around it.
//!
//! Always true: each death happens to a server of its own that was just started, so that no
//! back-off of an earlier death counts; and a request that fails is counted, not hidden.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{Scratch, Server};

use crate::filters::{Filters, Kind, programs};
use crate::histogram::Histogram;
use crate::measure::{Effort, Row, Section, Unit};
use crate::path::client::{Client, Load, Wait};
use crate::process;

/// The cases.
pub const CRASH: &str = "filter killed (kill -9), on-failure=hold";
/// See [`CRASH`].
pub const HANG: &str = "filter stands still (SIGSTOP), on-failure=hold";
/// See [`CRASH`].
pub const WORKER: &str = "worker killed (kill -9), --restart";
/// See [`CRASH`].
pub const NEIGHBOUR: &str = "another disk of the same worker";
/// Its sides.
pub const NORMAL: &str = "normal";
/// See [`NORMAL`].
pub const CRASH_LOOP: &str = "while a filter of its neighbour dies again and again";

/// The deadline of the filter that stands still.
pub const DEADLINE: Duration = Duration::from_millis(200);

const CAPACITY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(15);
/// When it happens, and how long requests go on after it.
const BEFORE: Duration = Duration::from_millis(50);
const AFTER: Duration = Duration::from_millis(150);

/// Runs all that this build of `upcall serve` has words for.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "stalls",
        &[
            "A client keeps 4 requests of 4 KiB in flight on a null disk, polling and yielding, while something dies; the stall is the longest request. Each death is of a server just started. The client reconnects at once: QEMU's reconnect interval comes on top.",
        ],
    );
    let words = help()?;
    let deaths = if effort.quick { 4 } else { 100 };
    let can = |needed: &[&str]| match needed.iter().find(|word| !words.contains(**word)) {
        None => Ok(()),
        Some(word) => Err(format!("this upcall serve knows no {word}")),
    };
    let filters = Filters::new(programs().join("bench-filters"))?;
    let measures: [(&str, &[&str], Measure); 4] = [
        (CRASH, &["on-failure="], crash),
        (HANG, &["on-failure=", "deadline-ms="], hang),
        (WORKER, &["--restart"], worker),
        (NEIGHBOUR, &["on-failure="], neighbour),
    ];
    for (name, needed, measure) in measures {
        let result = can(needed).and_then(|()| measure(&mut section, &filters, deaths));
        if let Err(error) = result {
            section.about.push(format!("{name}: not measured: {error}"));
        }
    }
    Ok(section)
}

type Measure = fn(&mut Section, &Filters, usize) -> Result<(), String>;

fn help() -> Result<String, String> {
    let output = Command::new(programs().join("upcall")).args(["serve", "--help"]).output();
    let output = output.map_err(|error| format!("no upcall program: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn load(slice: Duration) -> Load {
    Load { depth: 4, length: 4096, reads: 50, wait: Wait::Poll, slice, queues: 1 }
}

fn serve(scratch: &Scratch, args: &[String]) -> Server {
    let mut command = Command::new(programs().join("upcall"));
    command.args(["serve", "--log-level=error"]).args(args);
    Server::spawn(scratch, command)
}

fn disk(scratch: &Scratch, name: &str) -> [String; 2] {
    let socket = scratch.join(&format!("{name}.sock"));
    let words = format!("name={name},null={CAPACITY},socket={},queues=1", socket.display());
    ["--disk".into(), words]
}

fn filter(disk: &str, file: &Path, words: &str) -> [String; 2] {
    ["--filter".into(), format!("disk={disk},file={}{words}", file.display())]
}

fn connect(scratch: &Scratch, name: &str) -> Result<Client, String> {
    let socket = scratch.join(&format!("{name}.sock"));
    Client::connect(&socket, 1, CAPACITY).map_err(|error| format!("no connection: {error}"))
}

fn signal(pid: u32, signal: Signal) -> Result<(), String> {
    let pid = Pid::from_raw(pid as i32).ok_or("no process")?;
    kill_process(pid, signal).map_err(|error| format!("cannot signal a process: {error}"))
}

/// The stalls of many deaths.
#[derive(Default)]
struct Stalls {
    longest: Histogram,
    errors: u64,
}

impl Stalls {
    fn show(&self, row: &mut Row) {
        for (name, quantile) in [("stall p50", 0.5), ("stall p99", 0.99)] {
            row.push(name, Unit::Nanoseconds, self.longest.quantile_ns(quantile) as f64);
        }
        row.push("stall max", Unit::Nanoseconds, self.longest.max_ns() as f64);
        row.push("deaths", Unit::Count, self.longest.total() as f64);
        row.push("requests that failed", Unit::Count, self.errors as f64);
    }
}

fn crash(section: &mut Section, filters: &Filters, deaths: usize) -> Result<(), String> {
    filter_dies(section, CRASH, filters, deaths, Signal::KILL, "")
}

fn hang(section: &mut Section, filters: &Filters, deaths: usize) -> Result<(), String> {
    let words = format!(",deadline-ms={}", DEADLINE.as_millis());
    filter_dies(section, HANG, filters, deaths.div_ceil(2), Signal::STOP, &words)
}

fn filter_dies(
    section: &mut Section,
    case: &str,
    filters: &Filters,
    deaths: usize,
    how: Signal,
    words: &str,
) -> Result<(), String> {
    let file = filters.build(Kind::PLAIN, 0)?;
    let mut stalls = Stalls::default();
    for _ in 0..deaths {
        let scratch = Scratch::new();
        let words = format!(",on-failure=hold{words}");
        let args = [disk(&scratch, "a"), filter("a", &file, &words)].concat();
        let server = serve(&scratch, &args);
        let hosts = process::children(server.pid().as_raw_pid() as u32);
        let mut client = connect(&scratch, "a")?;
        let (round, died) = client.run_while(load(BEFORE + AFTER), PATIENCE, |_| {
            std::thread::sleep(BEFORE);
            hosts.iter().try_for_each(|pid| signal(*pid, how))
        })?;
        died?;
        stalls.longest.record(round.latencies.max_ns());
        stalls.errors += round.errors;
    }
    stalls.show(section.row(case, "1 filter", "client, worker and filter host share the cores"));
    Ok(())
}

fn worker(section: &mut Section, filters: &Filters, deaths: usize) -> Result<(), String> {
    let file = filters.build(Kind::PLAIN, 0)?;
    let mut stalls = Stalls::default();
    for _ in 0..deaths.div_ceil(2) {
        let scratch = Scratch::new();
        let args = [disk(&scratch, "a"), filter("a", &file, "")].concat();
        let server = serve(&scratch, &[args, vec!["--restart".into()]].concat());
        let mut client = connect(&scratch, "a")?;
        let (round, died) = client.run_while(load(BEFORE + AFTER), PATIENCE, |link| {
            if !link.outlives_the_device() {
                return Err("the device does not say what it has in flight".to_owned());
            }
            std::thread::sleep(BEFORE);
            signal(worker_of(&server)?, Signal::KILL)?;
            link.reconnect(PATIENCE)
        })?;
        died?;
        stalls.longest.record(round.latencies.max_ns());
        stalls.errors += round.errors;
    }
    stalls.show(section.row(WORKER, "1 filter", "the client reconnects at once"));
    Ok(())
}

/// The worker that a supervisor has started.
fn worker_of(supervisor: &Server) -> Result<u32, String> {
    let is_worker = |pid: &u32| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        command.is_ok_and(|command| command.contains("--supervised"))
    };
    let children = process::children(supervisor.pid().as_raw_pid() as u32);
    children.into_iter().find(is_worker).ok_or_else(|| "the supervisor has no worker".into())
}

/// The disk `b` is measured, while a filter of the disk `a` dies as soon as it is there.
fn neighbour(section: &mut Section, filters: &Filters, deaths: usize) -> Result<(), String> {
    let slice = Duration::from_millis(if deaths < 10 { 300 } else { 2000 });
    let (ours, theirs) = (filters.build(Kind::PLAIN, 0)?, filters.build(Kind::PLAIN, 1)?);
    for _ in 0..3 {
        let scratch = Scratch::new();
        let args = [
            disk(&scratch, "a"),
            filter("a", &theirs, ",on-failure=hold"),
            disk(&scratch, "b"),
            filter("b", &ours, ",on-failure=hold"),
        ];
        let server = serve(&scratch, &args.concat());
        let pid = server.pid().as_raw_pid() as u32;
        let mut client = connect(&scratch, "b")?;
        client.run(load(slice / 10), PATIENCE)?;
        // Whose filter host a process is shows only when it dies: the first two began in
        // the order of the disks.
        let first = process::children(pid);
        let kept = first.get(1).copied().ok_or("no second filter host")?;
        // Looking for victims takes a part of a core. So does looking without killing: what is
        // compared is the deaths, not the hunt.
        let (normal, _) = client.run_while(load(slice), PATIENCE, |_| {
            watch(pid, slice, |victim| first.contains(&victim))
        })?;
        let (during, killed) = client
            .run_while(load(slice), PATIENCE, |_| watch(pid, slice, |victim| victim == kept))?;
        let row = section.row(NEIGHBOUR, NORMAL, "4 requests in flight");
        row.push_latencies(&normal.latencies);
        let row = section.row(NEIGHBOUR, CRASH_LOOP, "killed each time it is back, within 1 ms");
        row.push_latencies(&during.latencies);
        row.push("deaths", Unit::Count, killed as f64);
        row.push("requests that failed", Unit::Count, during.errors as f64);
    }
    Ok(())
}

/// Kills every child of a worker that is not spared, as soon as it is there; how many.
fn watch(worker: u32, slice: Duration, is_spared: impl Fn(u32) -> bool) -> usize {
    let end = Instant::now() + slice;
    let mut killed = 0;
    while Instant::now() < end {
        for victim in process::children(worker).into_iter().filter(|pid| !is_spared(*pid)) {
            killed += usize::from(signal(victim, Signal::KILL).is_ok());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    killed
}
