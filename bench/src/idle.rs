//! Disks that do nothing: what they cost, and how soon they are there.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use upcall_tests::{Scratch, Server};

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Row, Section, Unit};
use crate::path::client::{Client, Load, Wait};
use crate::process::{self, Used};

/// The sides, for goals.
pub const ONE: &str = "1 worker, 1 disk, 2 filters";
/// See [`ONE`].
pub const MANY_DISKS: &str = "1 worker, 100 disks, 2 filters on each";
/// See [`ONE`].
pub const MANY_WORKERS: &str = "100 workers, 1 disk and 2 filters each";
/// The cases.
pub const AT_REST: &str = "at rest";
/// See [`AT_REST`].
pub const START: &str = "start";

/// Sides of [`START`].
pub const NO_FILTER: &str = "worker without filters";
/// See [`NO_FILTER`].
pub const TWO_FILTERS: &str = "worker and 2 filter hosts";

const CAPACITY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs them.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "idle",
        &[
            "Null disks with one queue each. At rest: some seconds after the last request. Memory is what is resident, what is shared with others (libraries, the program itself) included; private is what belongs to one process alone.",
            "Start: from the fork to the line `ready`.",
        ],
    );
    let filters = Filters::new(programs().join("bench-filters"))?;
    let chain = [filters.build(Kind::PLAIN, 0)?, filters.build(Kind::PLAIN, 1)?];
    start_times(&mut section, effort, &chain);
    one(&mut section, effort, &chain)?;
    many_disks(&mut section, effort, &chain);
    if !effort.quick {
        many_workers(&mut section, effort, &chain)?;
    }
    Ok(section)
}

/// `upcall serve` with `disks` null disks, once it is ready, and how long that took.
fn serve(scratch: &Scratch, disks: usize, chain: &[PathBuf]) -> (Server, Duration) {
    let mut command = Command::new(programs().join("upcall"));
    command.args(["serve", "--log-level=warn"]);
    for disk in 0..disks {
        let socket = scratch.join(&format!("{disk}.sock"));
        command.arg("--disk");
        command.arg(format!("name=d{disk},null={CAPACITY},socket={},queues=1", socket.display()));
        for filter in chain {
            command.arg("--filter").arg(format!("disk=d{disk},file={}", filter.display()));
        }
    }
    let start = Instant::now();
    let server = Server::spawn(scratch, command);
    (server, start.elapsed())
}

fn pid(server: &Server) -> u32 {
    server.pid().as_raw_pid() as u32
}

fn start_times(section: &mut Section, effort: &Effort, chain: &[PathBuf]) {
    for _ in 0..effort.rounds.max(5) {
        for (side, count) in [(NO_FILTER, 0), (TWO_FILTERS, 2)] {
            let scratch = Scratch::new();
            let took_ns = serve(&scratch, 1, &chain[..count]).1.as_nanos() as f64;
            section.row(START, side, "").push("took", Unit::Nanoseconds, took_ns);
        }
    }
}

fn one(section: &mut Section, effort: &Effort, chain: &[PathBuf]) -> Result<(), String> {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch, 1, chain);
    let socket = scratch.join("0.sock");
    let mut client =
        Client::connect(&socket, 1, CAPACITY).map_err(|error| format!("no connection: {error}"))?;
    let load = Load {
        depth: 32,
        length: 4096,
        reads: 50,
        wait: Wait::Sleep,
        slice: Duration::from_millis(50),
        queues: 1,
    };
    client.run(load, PATIENCE)?;
    let how = "a client is connected, and had sent requests before";
    rest(section.row(AT_REST, ONE, how), effort, &[pid(&server)]);
    Ok(())
}

fn many_disks(section: &mut Section, effort: &Effort, chain: &[PathBuf]) {
    let scratch = Scratch::new();
    let (server, took) = serve(&scratch, 100, chain);
    section.row(START, MANY_DISKS, "").push("took", Unit::Nanoseconds, took.as_nanos() as f64);
    rest(section.row(AT_REST, MANY_DISKS, "nobody is connected"), effort, &[pid(&server)]);
}

fn many_workers(section: &mut Section, effort: &Effort, chain: &[PathBuf]) -> Result<(), String> {
    let scratches: Vec<Scratch> = (0..100).map(|_| Scratch::new()).collect();
    let start = Instant::now();
    let servers: Result<Vec<Server>, String> = std::thread::scope(|scope| {
        let begin = |scratch| scope.spawn(move || serve(scratch, 1, chain).0);
        let threads: Vec<_> = scratches.iter().map(begin).collect();
        let wait = |thread: std::thread::ScopedJoinHandle<'_, Server>| {
            thread.join().map_err(|_| "a worker does not start".to_owned())
        };
        threads.into_iter().map(wait).collect()
    });
    let (servers, took) = (servers?, start.elapsed());
    let how = "all at once";
    section.row(START, MANY_WORKERS, how).push("took", Unit::Nanoseconds, took.as_nanos() as f64);
    let pids: Vec<u32> = servers.iter().map(pid).collect();
    rest(section.row(AT_REST, MANY_WORKERS, "nobody is connected"), effort, &pids);
    Ok(())
}

/// What workers and their filter hosts use while nothing happens: processor time of all, and
/// the memory of the largest of each kind.
fn rest(row: &mut Row, effort: &Effort, workers: &[u32]) {
    let hosts: Vec<u32> = workers.iter().flat_map(|pid| process::children(*pid)).collect();
    std::thread::sleep(Duration::from_millis(500));
    let all = || {
        let pids = workers.iter().chain(&hosts);
        pids.fold(Used::default(), |sum, pid| sum.and(Used::by_process(*pid)))
    };
    let (before, start) = (all(), Instant::now());
    std::thread::sleep(if effort.quick { Duration::from_secs(1) } else { Duration::from_secs(5) });
    let used = all().since(before);
    let seconds = start.elapsed().as_secs_f64();
    row.push("cores", Unit::Cores, used.cpu_ns as f64 / 1e9 / seconds);
    row.push("wake-ups a second", Unit::Count, used.sleeps as f64 / seconds);
    for (name, pids) in [("worker", workers), ("filter host", &hosts)] {
        let memory = pids.iter().filter_map(|pid| process::resident_kib(*pid)).max();
        let Some((resident, own)) = memory else { continue };
        row.push(&format!("{name} resident"), Unit::Kibibytes, resident as f64);
        row.push(&format!("{name} private"), Unit::Kibibytes, own as f64);
    }
}
