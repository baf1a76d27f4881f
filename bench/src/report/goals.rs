//! What is to be reached, and whether this run did.
//!
//! Always true: a goal whose benchmark did not run says "not measured", never a guess.

use std::fmt::Write;

use super::Report;
use super::page::{amount, times};
use crate::measure::{Metric, Spread, Unit};
use crate::{floor, upcall};

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
            let rate = metric(report, "upcall", upcall::MANY, upcall::ONE, "rate")?.spread().median;
            Some((amount(rate, Unit::PerSecond), rate >= 10e6))
        },
    },
    Goal {
        what: "8 filters, one in flight: their up-calls",
        goal: "≤ 8 × that of one",
        reached: |report| {
            let p50 = |side: &str| metric(report, "upcall", upcall::ALONE, side, "p50");
            let none = p50(upcall::NONE)?;
            let one = difference(p50(upcall::ONE)?, none);
            let eight = difference(p50(&upcall::chain_of(8))?, none);
            let ratio = Spread::of_ratios(&eight, &one)?;
            Some((format!("{} ×", times(ratio)), ratio.median <= 8.0))
        },
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
            let sleeps = of(upcall::load::ENGINE)? + of(upcall::rig::HOSTS)?;
            Some((format!("{sleeps:.2}"), sleeps <= 3.1))
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

/// Of two figures, round by round.
fn difference(with: &Metric, without: &Metric) -> Metric {
    let pairs = with.samples.iter().zip(&without.samples);
    Metric { samples: pairs.map(|(with, without)| with - without).collect(), ..with.clone() }
}
