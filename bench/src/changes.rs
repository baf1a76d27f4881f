//! What a guest feels while a chain changes: the longest time in which nothing came back.
//!
//! Always true: every change goes through the control socket of a real worker; the client's
//! load runs before, during and after it; and a request that fails is counted, not hidden.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use upcall_control::Client as Control;
use upcall_control::resource::{Change, DiskChange, Edit, Param};
use upcall_tests::{Scratch, Server};

use crate::filters::{Filters, Kind, programs};
use crate::histogram::Histogram;
use crate::measure::{Effort, Row, Section, Unit};
use crate::path::client::{Client, Gap, Load, Wait};
use crate::path::servers::{CAPACITY, Disk, image};

/// The kinds of change, in the order in which they are made, again and again.
pub const KINDS: [&str; 5] = ["attach", "reorder", "replace", "change of parameters", "detach"];

/// A case's name.
pub fn case(disk: Disk, depth: usize) -> String {
    format!("{}, 7 of 10 read, 4k, {depth} in flight", disk.word())
}

const DISK: &str = "disk";
/// What the filter that comes and goes is called.
const SLOT: &str = "visitor";
const TRIAL_REQUESTS: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(15);
/// Of load before a change.
const BEFORE: Duration = Duration::from_millis(5);
/// What belongs to a change after its answer: the old filter's process ends.
const AFTER: Duration = Duration::from_millis(5);

/// Runs all cases.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "changes",
        &[
            "A client with random reads and writes of 4 KiB, polling and yielding, on a disk with one filter, while a second filter comes, changes places with the first, is replaced by another version of itself, gets another parameter, and goes: each by a request to the worker's control socket, and each waits for the end of the trial, as the command line does. A trial ends after 100 requests instead of the usual 1000: what it lasts is no part of the pause, but of the command. Client, worker, filter hosts and the asking thread share the cores.",
            "A gap is a time between two completions. A change's gap is the longest that touches the time from the request to 5 ms after its answer. A normal gap is the longest that touches a time of the same length behind that, without a change. The pause is a change's gap less the median of the normal gaps of the same kind, at least 0. What the worker says is how long it says that the disk stood still.",
        ],
    );
    let repetitions = if effort.quick { 5 } else { 100 };
    let filters = Filters::new(programs().join("bench-filters"))?;
    for disk in [Disk::Null, Disk::Raw] {
        for depth in [1, 32] {
            measure(&mut section, &filters, disk, depth, repetitions)?;
        }
    }
    Ok(section)
}

fn measure(
    section: &mut Section,
    filters: &Filters,
    disk: Disk,
    depth: usize,
    repetitions: usize,
) -> Result<(), String> {
    let scratch = Scratch::new();
    let server = serve(&scratch, filters, disk)?;
    let failed = |error: String| format!("{}: {error}: {}", disk.word(), server.stderr());
    let control = Control::new(&scratch.join("control")).map_err(|error| error.to_string())?;
    let client = Client::connect(&scratch.join("disk.sock"), 1, CAPACITY);
    let mut client = client.map_err(|error| failed(format!("no connection: {error}")))?;
    let edits = edits(filters)?;
    let load =
        Load { depth, length: 4096, reads: 70, wait: Wait::Poll, slice: PATIENCE * 4, queues: 1 };
    let mut felt: Vec<Felt> = KINDS.iter().map(|_| Felt::default()).collect();
    for _ in 0..repetitions {
        let (round, made) = client.run_while(load, PATIENCE, |link| {
            let made: Result<Vec<Made>, String> =
                edits.iter().map(|edit| change(&control, edit)).collect();
            link.stop();
            made
        })?;
        let made = made.map_err(failed)?;
        for (felt, made) in felt.iter_mut().zip(made) {
            felt.count(client.gaps(), &made, round.errors);
        }
    }
    for (kind, felt) in KINDS.iter().zip(&felt) {
        felt.show(section.row(&case(disk, depth), kind, "client polls and yields"));
    }
    Ok(())
}

fn serve(scratch: &Scratch, filters: &Filters, disk: Disk) -> Result<Server, String> {
    let what = match disk {
        Disk::Null => format!("null={CAPACITY}"),
        Disk::Raw | Disk::Qcow2 => format!("file={}", image(scratch, DISK)?.display()),
    };
    let mut command = Command::new(programs().join("upcall"));
    command.args(["serve", "--log-level=error", "--control"]).arg(scratch.join("control"));
    let socket = scratch.join("disk.sock");
    command.arg("--disk").arg(format!("name={DISK},{what},socket={},queues=1", socket.display()));
    let first = filters.build(Kind::PLAIN, 0)?;
    command.arg("--filter").arg(format!("disk={DISK},file={}", first.display()));
    Ok(Server::spawn(scratch, command))
}

/// One edit of each kind, which together leave the chain as it was.
fn edits(filters: &Filters) -> Result<[Edit; KINDS.len()], String> {
    let version = |version| -> Result<_, String> {
        let path = filters.build_version(Kind::PLAIN, 1, version)?;
        path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))
    };
    let slot = || SLOT.to_owned();
    let replace = |file: Option<&Path>, params| Edit::Replace {
        slot: slot(),
        file: file.map(Path::to_owned),
        params,
    };
    Ok([
        Edit::Attach {
            file: version(1)?,
            name: Some(slot()),
            order: Some(1),
            inline: false,
            deadline_ms: None,
            on_failure: None,
            memory_bytes: None,
            params: Vec::new(),
        },
        Edit::Set { slot: slot(), order: Some(-1), deadline_ms: None, on_failure: None },
        replace(Some(&version(2)?), Vec::new()),
        replace(None, vec![Param { name: "mode".into(), value: "watch".into() }]),
        Edit::Detach { slot: slot() },
    ])
}

/// A change that was made.
struct Made {
    asked: Instant,
    answered: Instant,
    pause_us: u64,
}

/// Makes a change under load, and leaves as much time behind it as it took itself.
fn change(control: &Control, edit: &Edit) -> Result<Made, String> {
    let change = Change {
        disks: vec![DiskChange { disk: DISK.into(), edits: vec![edit.clone()] }],
        dry_run: false,
        drain_ms: None,
        trial_ms: None,
        trial_requests: Some(TRIAL_REQUESTS),
    };
    std::thread::sleep(BEFORE);
    let asked = Instant::now();
    let changed = control.change(&change).map_err(|error| error.to_string())?;
    let answered = Instant::now();
    std::thread::sleep(2 * AFTER + (answered - asked));
    Ok(Made { asked, answered, pause_us: changed.pause_us })
}

/// What a client felt of all changes of a kind.
#[derive(Default)]
struct Felt {
    gaps_ns: Vec<u64>,
    normal: Histogram,
    said: Histogram,
    took: Histogram,
    errors: u64,
}

impl Felt {
    /// `errors`: of the round that it was made in.
    fn count(&mut self, gaps: &[Gap], made: &Made, errors: u64) {
        let end = made.answered + AFTER;
        self.gaps_ns.push(longest_ns(gaps, made.asked, end));
        self.normal.record(longest_ns(gaps, end, end + (end - made.asked)));
        self.said.record(made.pause_us * 1000);
        self.took.record((made.answered - made.asked).as_nanos() as u64);
        self.errors += errors;
    }

    fn show(&self, row: &mut Row) {
        let normal_ns = self.normal.quantile_ns(0.5);
        let mut pauses = Histogram::default();
        self.gaps_ns.iter().for_each(|ns| pauses.record(ns.saturating_sub(normal_ns)));
        let mut push = |name: &str, ns| row.push(name, Unit::Nanoseconds, ns as f64);
        push("pause p50", pauses.quantile_ns(0.5));
        push("pause p99", pauses.quantile_ns(0.99));
        push("pause max", pauses.max_ns());
        push("normal gap p50", normal_ns);
        push("normal gap p99", self.normal.quantile_ns(0.99));
        push("the worker says p50", self.said.quantile_ns(0.5));
        push("the worker says p99", self.said.quantile_ns(0.99));
        push("command p50", self.took.quantile_ns(0.5));
        push("command p99", self.took.quantile_ns(0.99));
        row.push("changes", Unit::Count, self.gaps_ns.len() as f64);
        row.push("requests that failed", Unit::Count, self.errors as f64);
    }
}

/// The longest gap that touches the time between two moments; 0 if all were too short to be
/// kept.
fn longest_ns(gaps: &[Gap], from: Instant, to: Instant) -> u64 {
    let touching = gaps.iter().filter(|gap| gap.to > from && gap.from < to);
    touching.map(|gap| (gap.to - gap.from).as_nanos() as u64).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_whole_where_it_touches_a_change_and_less_what_is_normal() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let gap = |from, to| Gap { from: at(from), to: at(to) };
        // One reaches into the change from before it, one is far behind it.
        let gaps = [gap(0, 900), gap(2_000, 2_100), gap(7_000, 7_300)];
        let made = Made { asked: at(800), answered: at(1_000), pause_us: 700 };
        let mut felt = Felt::default();
        felt.count(&gaps, &made, 0);
        assert_eq!(felt.gaps_ns, [900_000]);
        assert_eq!(felt.normal.max_ns(), 300_000);
        let mut section = Section::new("changes", &[]);
        felt.show(section.row("case", "attach", ""));
        let row = section.find("case", "attach").unwrap();
        let pause = row.median("pause p50").unwrap();
        assert!((pause - 600_000.0).abs() < 600_000.0 / 32.0, "{pause}");
        assert_eq!(row.median("requests that failed"), Some(0.0));
    }
}
