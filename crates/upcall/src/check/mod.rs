//! `upcall filter check`: a conformance kit for filters.
//!
//! The real filter runs in a real filter host, in the chain of a real worker, on a disk in
//! memory ([`mod@bench`]). Random requests ([`batch`], from a seed) go down several queues at
//! once ([`driver`]), and what comes back is compared with a model of the disk ([`model`]).
//!
//! A filter may fail requests: that is its right. It may not give wrong data for those that
//! succeed, keep a request for ever, break a rule of the ABI, crash, or leak.

mod batch;
mod bench;
mod driver;
mod host;
mod load;
mod model;
mod random;
mod report;
mod statics;

use std::path::Path;
use std::time::Duration;

use crate::cli::{CheckArgs, PlacementName};
use crate::failure::Failure;
use crate::info::describe;
use crate::output::print;
use bench::{Bench, Target};
use load::Load;
use random::Random;
use report::Report;

/// How often the filter is started and ended without requests.
const CYCLES: u32 = 3;

/// Runs all checks; an error if one failed.
pub fn run(args: CheckArgs) -> Result<(), Failure> {
    let seed = args.seed.unwrap_or_else(Random::fresh_seed);
    let target = Target {
        filter: args.file.clone(),
        params: args.params.clone(),
        placement: args.placement.into(),
        grants: args.grants,
        timeout: Duration::from_millis(args.timeout_ms),
    };
    let replay = replay(&args, seed);
    print(&format!("seed {seed}; to replay: {replay}\n"))?;
    let mut report = Report::new(replay);
    all(&target, &args, seed, &mut report)?;
    report.end()
}

/// All checks, in an order in which later ones make sense only if earlier ones passed.
fn all(target: &Target, args: &CheckArgs, seed: u64, report: &mut Report) -> Result<(), Failure> {
    let description = match describe(&args.file) {
        Ok(description) => description,
        Err(error) => return report.check("loads", Err(vec![error.to_string()])).map(drop),
    };
    report.check("table", statics::table(&description))?;
    report.check("parameters", statics::parameters(&description, &args.params))?;
    if !report.check("opens and closes", cycles(target))? {
        return Ok(());
    }
    let bench = match Bench::start(target) {
        Ok(bench) => bench,
        Err(error) => return report.check("opens", Err(vec![error])).map(drop),
    };
    let mut load = Load::new(&bench, seed);
    load.check_one_at_a_time(report)?;
    if load.may_go_on() {
        load.check_all_at_once(args.operations, args.seconds, report)?;
    }
    if load.may_go_on() {
        load.check_cancel(report)?;
    }
    if load.may_go_on() {
        load.check_read_back(report)?;
    }
    drop(load);
    report.check(
        "stays alive",
        bench.lost().map_or(Ok("it did not crash".into()), |how| Err(vec![how])),
    )?;
    report.check("keeps the rules", rules(&bench))?;
    let is_lost = bench.lost().is_some();
    let wrong = bench.end();
    if !is_lost {
        let ended = if wrong.is_empty() { Ok("its host ended with 0".into()) } else { Err(wrong) };
        report.check("ends in order", ended)?;
    }
    Ok(())
}

/// Starts and ends without a request in between.
fn cycles(target: &Target) -> Result<String, Vec<String>> {
    for cycle in 1..=CYCLES {
        let bench = Bench::start(target).map_err(|error| vec![error])?;
        if let Some(how) = bench.lost() {
            return Err(vec![how]);
        }
        let wrong = bench.end();
        if !wrong.is_empty() {
            return Err(wrong.into_iter().map(|what| format!("cycle {cycle}: {what}")).collect());
        }
    }
    Ok(format!("{CYCLES} times"))
}

/// Violations, and requests that are still somewhere though all have ended.
fn rules(bench: &Bench) -> Result<String, Vec<String>> {
    let violations = bench.filter_hop().map_or(0, |hop| hop.block.violations);
    let mut wrong = Vec::new();
    if violations > 0 {
        wrong.push(format!("it broke the rules of the ABI {violations} times:"));
        wrong.extend(bench.complaints().into_iter().take(3));
    }
    // What its host saw by itself, such as a second answer to one request.
    let seen: Vec<String> =
        bench.complaints().into_iter().filter(|line| line.contains(": the filter ")).collect();
    if !seen.is_empty() {
        wrong.push(format!("its host saw {} broken rules at least:", seen.len()));
        wrong.extend(seen.into_iter().take(3));
    }
    match bench.in_flight() {
        0 => {}
        left if bench.lost().is_none() => {
            wrong.push(format!("all requests have ended, but {left} are still counted"));
        }
        _ => {}
    }
    if wrong.is_empty() { Ok("no violations, nothing left in flight".into()) } else { Err(wrong) }
}

fn replay(args: &CheckArgs, seed: u64) -> String {
    let quoted = |text: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
        if text.chars().all(plain) {
            text.to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    let shown = |path: &Path| quoted(&path.display().to_string());
    let mut command = format!("upcall filter check {} --seed {seed}", shown(&args.file));
    match args.seconds {
        Some(seconds) => command += &format!(" --seconds {}", seconds.as_secs_f64()),
        None => command += &format!(" --operations {}", args.operations),
    }
    for (name, value) in &args.params {
        command += &format!(" --param {}", quoted(&format!("{name}={value}")));
    }
    if args.placement == PlacementName::Inline {
        command += " --placement inline";
    }
    if args.grants > 0 {
        command += &format!(" --grants {}", args.grants);
    }
    command
}
