//! `upcall bench`: what filters cost on this machine, without a guest or a client in the way.

use std::time::Duration;

use upcall_block::Op;
use upcall_measure::load::{Arrivals, Plan};
use upcall_measure::measure::{Metric, Section, Spread, Unit};
use upcall_measure::rig::{Link, Rig};
use upcall_measure::text::{amount, figure};

use crate::cli::BenchArgs;
use crate::failure::Failure;
use crate::output::print;

/// The side without filters, and the one with them.
const WITHOUT: &str = "without filters";
const WITH: &str = "with the filters";
const LENGTH: u32 = 4096;
const ROUNDS: u32 = 7;
/// What is measured: operation and requests in flight.
const LOADS: [(Op, usize); 4] = [(Op::Write, 1), (Op::Write, 32), (Op::Read, 1), (Op::Read, 32)];

/// Measures both sides in turn, and prints them beside each other.
pub fn run(args: BenchArgs) -> Result<(), Failure> {
    let placement = args.placement.into();
    let link = |filter| Link { filter, params: args.params.clone(), placement };
    let chain: Vec<Link> = args.filters.into_iter().map(link).collect();
    let sides = [(WITHOUT, Vec::new()), (WITH, chain)];
    let mut rigs = Vec::new();
    for (name, chain) in &sides {
        rigs.push((*name, Rig::start(chain).map_err(Failure::new)?));
    }
    let hosts = rigs.iter().map(|(_, rig)| rig.hosts()).max().unwrap_or(0);
    let how = match hosts {
        0 => "everything in one thread".to_owned(),
        1 => "queue thread and filter host, each bound to a core if there are two".to_owned(),
        _ => format!("queue thread on one core, {hosts} filter hosts on another"),
    };
    let mut section = Section::new("bench", &[]);
    section.reference = Some(WITHOUT.into());
    section.about = vec![
        format!("A disk that does nothing, requests of 4 KiB, {ROUNDS} rounds, sides in turn."),
        format!("{how}; who waits looks, then yields, then sleeps."),
    ];
    let slice = args.seconds / (ROUNDS * (LOADS.len() * rigs.len()) as u32);
    for _ in 0..ROUNDS {
        for (op, depth) in LOADS {
            for (side, rig) in &rigs {
                let round = rig.round(plan(op, depth, slice)).map_err(Failure::new)?;
                section.row(&case(op, depth), side, &how).push_round(&round);
            }
        }
    }
    if args.json {
        let json = serde_json::to_string(&section).map_err(Failure::new)?;
        return print(&format!("{json}\n"));
    }
    print(&text(&section))
}

fn plan(op: Op, depth: usize, slice: Duration) -> Plan {
    Plan { depth, op, length: LENGTH, arrivals: Arrivals::Always, slice }
}

fn case(op: Op, depth: usize) -> String {
    format!("{op}, {depth} in flight")
}

/// The figures, and how the filters change them.
fn text(section: &Section) -> String {
    let mut text = section.about.join("\n") + "\n";
    text += "Medians, in brackets the smallest and the largest of the rounds.\n";
    for (op, depth) in LOADS {
        let case = case(op, depth);
        let [Some(without), Some(with)] = [WITHOUT, WITH].map(|side| section.find(&case, side))
        else {
            continue;
        };
        text += &format!("\n{case:<24}{WITHOUT:<36}{WITH:<36}their cost\n");
        let names = [
            ("p50", "p50"),
            ("p99", "p99"),
            ("rate", "rate"),
            ("cpu servers", "processor, a request"),
        ];
        for (name, word) in names {
            if let (Some(without), Some(with)) = (without.metric(name), with.metric(name)) {
                let [left, right] = [without, with].map(figure);
                text += &format!("  {word:<22}{left:<36}{right:<36}{}\n", cost(without, with));
            }
        }
    }
    text
}

/// What is added, round by round; or, of a rate, what is left of it.
fn cost(without: &Metric, with: &Metric) -> String {
    match without.unit {
        Unit::PerSecond => match Spread::of_ratios(with, without) {
            Some(ratio) => format!("{:.0} % of it are left", ratio.median * 100.0),
            None => "-".into(),
        },
        unit => {
            let pairs = with.samples.iter().zip(&without.samples);
            let more = Spread::of(&pairs.map(|(with, without)| with - without).collect::<Vec<_>>());
            format!(
                "{}{}",
                if more.median < 0.0 { "-" } else { "" },
                amount(more.median.abs(), unit)
            )
        }
    }
}
