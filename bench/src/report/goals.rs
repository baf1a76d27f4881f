//! What is to be reached, and whether this run did.
//!
//! Always true: a goal whose benchmark did not run says "not measured", never a guess.

use std::fmt::Write;

use super::Report;
use crate::measure::{Metric, Spread, Unit};
use crate::path::servers::Disk;
use crate::{changes, crowd, floor, guest, idle, migration, nbd, path, stalls, upcall};
use upcall_measure::text::{amount, times};

struct Goal {
    what: &'static str,
    goal: &'static str,
    reached: fn(&Report) -> Option<(String, bool)>,
}

/// The goals as a table.
pub fn table(report: &Report) -> String {
    let mut text = String::from("| what | goal | reached | |\n|---|---|---|---|\n");
    for Goal { what, goal, reached } in GOALS {
        // Writing to a String does not fail.
        let _ = match reached(report) {
            Some((figure, true)) => writeln!(text, "| {what} | {goal} | {figure} | reached |"),
            Some((figure, false)) => {
                writeln!(text, "| {what} | {goal} | {figure} | **not reached** |")
            }
            None => writeln!(text, "| {what} | {goal} | not measured | |"),
        };
    }
    text
}

const GOALS: &[Goal] = &[
    Goal {
        what: "up-call, one in flight, p50: a request with one filter less one without",
        goal: "≤ 2.5 × a cache line there and back",
        reached: |report| upcall_to_cache_line(report, "p50", 2.5),
    },
    Goal {
        what: "up-call, one in flight, p99",
        goal: "≤ 5 × a cache line there and back (its p50)",
        reached: |report| upcall_to_cache_line(report, "p99", 5.0),
    },
    Goal {
        what: "up-calls, 32 in flight",
        goal: "≥ 10 M/s on two cores",
        reached: |report| {
            let rate = |case, side: &str| {
                Some(metric(report, "upcall", case, side, "rate")?.spread().median)
            };
            let once = rate(upcall::MANY, upcall::ONE)?;
            let said = |calls| amount(calls, Unit::PerSecond);
            let mut all = format!("one for each request: writes {}", said(once));
            if let Some(bare) = rate(upcall::BARE, upcall::ONE) {
                all += &format!(", flushes, which have no memory, {}", said(bare));
            }
            let mut most = once;
            let watching = format!("{}{}", upcall::ONE, upcall::WATCHING);
            let together = format!("{}{}", upcall::chain_of(8), upcall::TOGETHER);
            for (side, each, text) in [
                (watching, 2.0, "two (a filter that watches)"),
                (together, 8.0, "eight (filters of one file)"),
            ] {
                let Some(calls) = rate(upcall::MANY, &side).map(|rate| each * rate) else {
                    continue;
                };
                all += &format!("; {text} {}", said(calls));
                most = most.max(calls);
            }
            Some((all, most >= 10e6))
        },
    },
    Goal {
        what: "null, no filter, client polling: reads a second, 32 in flight",
        goal: "≥ 3 × qemu-storage-daemon",
        reached: |report| to_peer(report, &null_read(32), 0, "rate", |ratio| ratio >= 3.0),
    },
    Goal {
        what: "null, no filter, client polling: latency of a read, 1 in flight",
        goal: "≤ a quarter of qemu-storage-daemon's",
        reached: |report| to_peer(report, &null_read(1), 0, "p50", |ratio| ratio <= 0.25),
    },
    Goal {
        what: "null, one filter: reads a second, 32 in flight",
        goal: "≥ 1.25 × qemu-storage-daemon without any",
        reached: |report| to_peer(report, &null_read(32), 1, "rate", |ratio| ratio >= 1.25),
    },
    Goal {
        what: "null, one filter, client polling: latency of a read, 1 in flight",
        goal: "≤ 5 µs",
        reached: |report| {
            let p50 = metric(report, "path", &null_read(1), &path::ours(1), "p50")?.spread().median;
            Some((amount(p50, Unit::Nanoseconds), p50 <= 5000.0))
        },
    },
    Goal {
        what: "raw O_DIRECT, one filter: rate of reads and writes, 1 and 32 in flight",
        goal: "≥ 1 × qemu-storage-daemon without any, each",
        reached: |report| raw_to_peer(report, "rate", |ratio| ratio >= 1.0),
    },
    Goal {
        what: "raw O_DIRECT, one filter: processor time for each request, of all but the client",
        goal: "≤ 1.25 × qemu-storage-daemon's without any, each",
        reached: |report| raw_to_peer(report, "cpu servers", |ratio| ratio <= 1.25),
    },
    Goal {
        what: "8 filters of one file, one in flight: their up-calls",
        goal: "≤ 8 × that of one",
        reached: |report| eight_to_one(report, upcall::TOGETHER),
    },
    Goal {
        what: "8 filters, a process each, one in flight: their up-calls",
        goal: "≤ 8 × that of one",
        reached: |report| eight_to_one(report, ""),
    },
    Goal {
        what: "an operation no filter asked for",
        goal: "costs nothing measurable: within the spread of none",
        reached: |report| {
            let side = format!("{}{}", upcall::ONE, upcall::ELSEWHERE);
            let theirs = metric(report, "upcall", upcall::MANY, upcall::NONE, "rate")?;
            let ours = metric(report, "upcall", upcall::MANY, &side, "rate")?;
            let ratio = Spread::of_ratios(ours, theirs)?;
            Some((
                format!("{} of the rate", times(ratio)),
                ratio.high >= 1.0 || ratio.median > 0.97,
            ))
        },
    },
    Goal {
        what: "all asleep, one filter: sleeps of worker and filter host for each request",
        goal: "≤ 1 for each crossing that slept (2 for the way there, 1 for the way back)",
        reached: |report| {
            let of = |who: &str| {
                let name = format!("sleeps {who}");
                Some(metric(report, "upcall", upcall::ASLEEP, upcall::ONE, &name)?.spread().median)
            };
            let sleeps = of(upcall_measure::load::ENGINE)? + of(upcall_measure::rig::HOSTS)?;
            Some((format!("{sleeps:.2}"), sleeps <= 3.1))
        },
    },
    Goal {
        what: "qcow2 behind us, no filter: reads and writes a second, 32 in flight",
        goal: "≥ 0.9 × qemu-storage-daemon directly, each",
        reached: |report| {
            let (mut figures, mut all) = (Vec::new(), true);
            for load in [path::READ, path::WRITE] {
                let case = path::case(Disk::Qcow2, load, 32);
                let (figure, reached) = to_peer(report, &case, 0, "rate", |ratio| ratio >= 0.9)?;
                figures.push(format!("{load}: {figure}"));
                all &= reached;
            }
            Some((figures.join("<br>"), all))
        },
    },
    Goal {
        what: "one filter over vhost-user against nbdkit with one over its socket: reads, 32 in flight",
        goal: "≥ 5 × the rate",
        reached: |report| {
            let of = |side| metric(report, "nbd", &nbd::case(true, 32), side, "rate");
            let ratio = Spread::of_ratios(of(nbd::VHOST)?, of(nbd::PEER)?)?;
            Some((format!("{} ×", times(ratio)), ratio.median >= 5.0))
        },
    },
    Goal {
        what: "idle disk with two filters: processor, worker, filter host",
        goal: "0 % of a core; ≤ 8 MiB and ≤ 2 MiB resident",
        reached: |report| {
            let of = |name: &str| {
                Some(metric(report, "idle", idle::AT_REST, idle::ONE, name)?.spread().median)
            };
            let (cores, worker, host) =
                (of("cores")?, of("worker resident")?, of("filter host resident")?);
            let figures = format!(
                "{:.2} %; {}, {}",
                100.0 * cores,
                amount(worker, Unit::Kibibytes),
                amount(host, Unit::Kibibytes)
            );
            Some((figures, cores < 0.0005 && worker <= 8192.0 && host <= 2048.0))
        },
    },
    Goal {
        what: "a worker without filters starts; each filter host more",
        goal: "≤ 20 ms each: 100 disks in 2 s, and a killed filter's stall",
        reached: |report| {
            let of = |side| metric(report, "idle", idle::START, side, "took");
            let (without, with) = (of(idle::NO_FILTER)?, of(idle::TWO_FILTERS)?);
            let (worker_ns, both_ns) =
                (without.spread().median, difference(with, without).spread().median);
            let figures = format!(
                "{}; {}",
                amount(worker_ns, Unit::Nanoseconds),
                amount((both_ns / 2.0).max(0.0), Unit::Nanoseconds)
            );
            Some((figures, worker_ns <= 20e6 && both_ns / 2.0 <= 20e6))
        },
    },
    Goal {
        what: "100 idle disks start",
        goal: "≤ 2 s",
        reached: |report| {
            let of =
                |side| Some(metric(report, "idle", idle::START, side, "took")?.spread().median);
            let disks_ns = of(idle::MANY_DISKS)?;
            let workers_ns = of(idle::MANY_WORKERS);
            let mut figures = format!("in one worker {}", amount(disks_ns, Unit::Nanoseconds));
            if let Some(ns) = workers_ns {
                figures += &format!(", in 100 workers {}", amount(ns, Unit::Nanoseconds));
            }
            Some((figures, disks_ns.max(workers_ns.unwrap_or(0.0)) <= 2e9))
        },
    },
    Goal {
        what: "stall when a filter is killed",
        goal: "p99 ≤ 20 ms, no error",
        reached: |report| stall(report, stalls::CRASH, 20e6),
    },
    Goal {
        what: "stall when a filter stands still",
        goal: "p99 ≤ its deadline + 20 ms, no error",
        reached: |report| stall(report, stalls::HANG, 20e6 + stalls::DEADLINE.as_nanos() as f64),
    },
    Goal {
        what: "stall when the worker is killed",
        goal: "p99 ≤ 1 s beyond the client's reconnect interval, no error",
        reached: |report| stall(report, stalls::WORKER, 1e9),
    },
    Goal {
        what: "p99 of a disk while a filter of its neighbour crashes again and again",
        goal: "≤ 2 × its normal",
        reached: |report| {
            let of = |side| metric(report, "stalls", stalls::NEIGHBOUR, side, "p99");
            let ratio = Spread::of_ratios(of(stalls::CRASH_LOOP)?, of(stalls::NORMAL)?)?;
            Some((format!("{} ×", times(ratio)), ratio.median <= 2.0))
        },
    },
    Goal {
        what: "a chain changes under load, 32 in flight: pause p99 of each kind of change",
        goal: "≤ 5 ms, no error",
        reached: pauses,
    },
    Goal {
        what: "a guest moves: how long it stands still, no filter and one",
        goal: "≤ 1.05 × qemu-storage-daemon without any, each",
        reached: downtimes,
    },
    Goal {
        what: "fio in an emulated guest, raw O_DIRECT, one filter: rate of reads and writes, 1 and 32 in flight",
        goal: "≥ 0.95 × qemu-storage-daemon without any, each",
        reached: guest_to_peer,
    },
    Goal {
        what: "an NBD client beside 1000 idle connections and 32 slow ones: p99 of a read",
        goal: "≤ 2 × alone, 1 and 32 in flight",
        reached: |report| {
            let (mut figures, mut all) = (Vec::new(), true);
            for depth in [1, 32] {
                let of = |side| metric(report, "crowd", &crowd::case(depth), side, "p99");
                let ratio = Spread::of_ratios(of(crowd::BOTH)?, of(crowd::ALONE)?)?;
                figures.push(format!("{depth}: {} ×", times(ratio)));
                all &= ratio.median <= 2.0;
            }
            Some((figures.join(", "), all))
        },
    },
];

fn metric<'a>(
    report: &'a Report,
    section: &str,
    case: &str,
    side: &str,
    name: &str,
) -> Option<&'a Metric> {
    report.section(section)?.find(case, side)?.metric(name)
}

fn upcall_to_cache_line(report: &Report, quantile: &str, most: f64) -> Option<(String, bool)> {
    let with = metric(report, "upcall", upcall::ALONE, upcall::ONE, quantile)?;
    let without = metric(report, "upcall", upcall::ALONE, upcall::NONE, quantile)?;
    let line = metric(report, "floor", floor::CACHE_LINE, "-", "p50")?;
    let upcall = difference(with, without);
    let ratio = Spread::of_ratios(&upcall, line)?;
    let figures = format!(
        "{} ×: {} with, {} without, {} the line",
        times(ratio),
        amount(with.spread().median, Unit::Nanoseconds),
        amount(without.spread().median, Unit::Nanoseconds),
        amount(line.spread().median, Unit::Nanoseconds)
    );
    Some((figures, ratio.median <= most))
}

fn stall(report: &Report, case: &str, most_ns: f64) -> Option<(String, bool)> {
    let of = |name| Some(metric(report, "stalls", case, "1 filter", name)?.spread().median);
    let (p50, p99, max) = (of("stall p50")?, of("stall p99")?, of("stall max")?);
    let (deaths, errors) = (of("deaths")?, of("requests that failed")?);
    let [p50, p99_text, max] = [p50, p99, max].map(|ns| amount(ns, Unit::Nanoseconds));
    let figures =
        format!("p50 {p50}, p99 {p99_text}, max {max}; {deaths} deaths, {errors} requests failed");
    Some((figures, p99 <= most_ns && errors == 0.0))
}

fn pauses(report: &Report) -> Option<(String, bool)> {
    let (mut figures, mut all, mut changes, mut errors) = (Vec::new(), true, 0.0, 0.0);
    for disk in [Disk::Null, Disk::Raw] {
        let mut errors_of_disk: f64 = 0.0;
        for kind in changes::KINDS {
            let row = report.section("changes")?.find(&changes::case(disk, 32), kind)?;
            let p99_ns = row.median("pause p99")?;
            let p99 = amount(p99_ns, Unit::Nanoseconds);
            figures.push(format!("{}, {kind}: {p99}", disk.word()));
            all &= p99_ns <= 5e6;
            changes += row.median("changes")?;
            // All kinds of a disk share their rounds.
            errors_of_disk = errors_of_disk.max(row.median("requests that failed")?);
        }
        errors += errors_of_disk;
    }
    figures.push(format!("{changes} changes, {errors} requests failed"));
    Some((figures.join("<br>"), all && errors == 0.0))
}

fn downtimes(report: &Report) -> Option<(String, bool)> {
    let (mut figures, mut all) = (Vec::new(), true);
    for name in [migration::DOWNTIME, migration::UNWRITTEN] {
        let of = |side: &str| metric(report, "migration", migration::MOVE, side, name);
        let theirs = of(path::PEER)?;
        for filters in [0, 1] {
            let ours = of(&path::ours(filters))?;
            let ratio = Spread::of_ratios(ours, theirs)?;
            let [ours, theirs] =
                [ours, theirs].map(|metric| amount(metric.spread().median, metric.unit));
            figures.push(format!("{name}, {filters}: {} ×: {ours}, theirs {theirs}", times(ratio)));
            all &= ratio.median <= 1.05;
        }
    }
    let lost = |side: &str| {
        let lost = metric(report, "migration", migration::MOVE, side, migration::LOST)?;
        Some(lost.samples.iter().sum::<f64>())
    };
    let (ours, theirs) = (lost(&path::ours(0))? + lost(&path::ours(1))?, lost(path::PEER)?);
    figures.push(format!("{}: {ours}, theirs {theirs}", migration::LOST));
    Some((figures.join("<br>"), all && ours == 0.0))
}

fn guest_to_peer(report: &Report) -> Option<(String, bool)> {
    let (mut figures, mut all) = (Vec::new(), true);
    for load in guest::LOADS {
        for depth in guest::DEPTHS {
            let of = |side: &str| metric(report, "guest", &guest::case(load, depth), side, "rate");
            let ratio = Spread::of_ratios(of(&path::ours(1))?, of(path::PEER)?)?;
            figures.push(format!("{load}, {depth}: {} ×", times(ratio)));
            all &= ratio.median >= 0.95;
        }
    }
    Some((figures.join("<br>"), all))
}

fn null_read(depth: usize) -> String {
    path::case(Disk::Null, path::READ, depth)
}

/// A figure of ours, with a chain of `filters`, to that of the peer.
fn to_peer(
    report: &Report,
    case: &str,
    filters: usize,
    name: &str,
    is_reached: fn(f64) -> bool,
) -> Option<(String, bool)> {
    let ours = metric(report, "path", case, &path::ours(filters), name)?;
    let theirs = metric(report, "path", case, path::PEER, name)?;
    let ratio = Spread::of_ratios(ours, theirs)?;
    let figures = format!(
        "{} ×: {}, theirs {}",
        times(ratio),
        amount(ours.spread().median, ours.unit),
        amount(theirs.spread().median, theirs.unit)
    );
    Some((figures, is_reached(ratio.median)))
}

/// What the up-calls of 8 filters take to those of one. `which`: what follows the side's name.
fn eight_to_one(report: &Report, which: &str) -> Option<(String, bool)> {
    let p50 = |side: &str| metric(report, "upcall", upcall::ALONE, side, "p50");
    let none = p50(upcall::NONE)?;
    let one = difference(p50(upcall::ONE)?, none);
    let eight = difference(p50(&format!("{}{which}", upcall::chain_of(8)))?, none);
    let ratio = Spread::of_ratios(&eight, &one)?;
    Some((format!("{} ×", times(ratio)), ratio.median <= 8.0))
}

fn raw_to_peer(report: &Report, name: &str, is_reached: fn(f64) -> bool) -> Option<(String, bool)> {
    let (mut figures, mut all) = (Vec::new(), true);
    for load in [path::READ, path::WRITE] {
        for depth in [1, 32] {
            let case = path::case(Disk::Raw, load, depth);
            let (figure, reached) = to_peer(report, &case, 1, name, is_reached)?;
            figures.push(format!("{load}, {depth}: {figure}"));
            all &= reached;
        }
    }
    Some((figures.join("<br>"), all))
}

/// Of two figures, round by round.
fn difference(with: &Metric, without: &Metric) -> Metric {
    let pairs = with.samples.iter().zip(&without.samples);
    Metric { samples: pairs.map(|(with, without)| with - without).collect(), ..with.clone() }
}
