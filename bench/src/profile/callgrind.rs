//! Instructions by function, of this program started again under callgrind.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use upcall_tests::Scratch;
use upcall_worker::Placement;

use super::{SHOWN, plan, rig, short};
use crate::measure::{Effort, Section, Unit};

/// The first argument of a program that is to be profiled.
pub const FLAG: &str = "--play";

const DEPTH: usize = 32;
const CASE: &str = "instructions for a request, 32 in flight";

/// Is what is profiled: filters in the chain, and for how many milliseconds; both follow
/// [`FLAG`]. Prints how many requests there were.
pub fn play(args: &[String]) -> Result<(), String> {
    let numbers: Option<Vec<u64>> = args.iter().map(|text| text.parse().ok()).collect();
    let Some([filters, ms]) = numbers.as_deref() else {
        return Err(format!("{FLAG} needs a number of filters and of milliseconds"));
    };
    let rig = rig(*filters as usize, Placement::Inline)?;
    println!("{}", rig.round(plan(DEPTH, Duration::from_millis(*ms)))?.requests);
    Ok(())
}

/// Counts with and without a filter.
pub fn run(section: &mut Section, effort: &Effort) -> Result<(), String> {
    let ms = if effort.quick { [200, 700] } else { [500, 3000] };
    let without = Profile::of(0, ms)?;
    let with = Profile::of(1, ms)?;
    let mut functions: Vec<(&String, &Costs)> = with.functions.iter().collect();
    functions.sort_by(|(_, one), (_, other)| other.own.total_cmp(&one.own));
    let mut row = |name: &str, none: Costs, one: Costs| {
        let row = section.row(CASE, name, "");
        row.push("no filter: self", Unit::Count, none.own);
        row.push("1 filter: self", Unit::Count, one.own);
        row.push("1 filter: all", Unit::Count, one.all);
        row.push("1 filter: all, % of a request", Unit::Count, 100.0 * one.all / with.total);
    };
    let total = |profile: &Profile| Costs { own: profile.total, all: profile.total };
    row("a request", total(&without), total(&with));
    for (name, costs) in functions.into_iter().take(SHOWN) {
        row(&short(name), without.functions.get(name).copied().unwrap_or_default(), *costs);
    }
    Ok(())
}

/// Instructions of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Costs {
    own: f64,
    /// With those of what it calls.
    all: f64,
}

/// What one request executes.
struct Profile {
    total: f64,
    functions: HashMap<String, Costs>,
}

impl Profile {
    /// The difference between a short and a longer run, for each request that it has more.
    fn of(filters: usize, ms: [u64; 2]) -> Result<Profile, String> {
        let scratch = Scratch::new();
        let [less, more] = ms.map(|ms| count(&scratch, filters, ms));
        let (less, more) = (less?, more?);
        let requests = more.requests - less.requests;
        if requests <= 0.0 {
            return Err("the longer run had no more requests than the shorter one".into());
        }
        let each = |name: &str, pick: fn(&Costs) -> f64| {
            let of = |count: &Count| count.functions.get(name).map_or(0.0, pick);
            // What waits is never quite the same twice.
            ((of(&more) - of(&less)) / requests).max(0.0)
        };
        let costs = |name: &String| {
            let costs = Costs { own: each(name, |c| c.own), all: each(name, |c| c.all) };
            (name.clone(), costs)
        };
        let functions = more.functions.keys().map(costs).collect();
        Ok(Profile { total: (more.total - less.total) / requests, functions })
    }
}

/// What one run executed.
#[derive(Default)]
struct Count {
    requests: f64,
    total: f64,
    functions: HashMap<String, Costs>,
}

fn count(scratch: &Scratch, filters: usize, ms: u64) -> Result<Count, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let out = scratch.join(&format!("{filters}-{ms}"));
    let played = said(
        Command::new("valgrind")
            .args(["--tool=callgrind", "--fair-sched=yes", "--quiet"])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(own)
            .args([FLAG, &filters.to_string(), &ms.to_string()]),
    )?;
    let requests = played.trim().parse().map_err(|_| format!("what was played said: {played}"))?;
    let mut count = Count { requests, ..Count::default() };
    for line in annotate(&out, "no")?.lines().filter_map(line) {
        match line {
            (cost, None) => count.total = cost,
            (cost, Some(name)) => count.functions.entry(name).or_default().own += cost,
        }
    }
    for line in annotate(&out, "yes")?.lines().filter_map(line) {
        if let (cost, Some(name)) = line {
            count.functions.entry(name).or_default().all += cost;
        }
    }
    Ok(count)
}

fn annotate(out: &Path, inclusive: &str) -> Result<String, String> {
    let mut command = Command::new("callgrind_annotate");
    command.args(["--threshold=100", "--auto=no", &format!("--inclusive={inclusive}")]);
    said(command.arg(out))
}

fn said(command: &mut Command) -> Result<String, String> {
    let output = command.output();
    let output = output.map_err(|error| format!("{command:?} (Debian: valgrind): {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line of callgrind_annotate: instructions, and the function's name if it is not the total.
fn line(text: &str) -> Option<(f64, Option<String>)> {
    let (number, rest) = text.trim_start().split_once(" (")?;
    let cost = number.replace(',', "").parse().ok()?;
    let (_, name) = rest.split_once(")  ")?;
    if name.trim() == "PROGRAM TOTALS" {
        return Some((cost, None));
    }
    // "file:function [object]"; a piece of one function may stand in several files.
    let function = name.split_once(':')?.1;
    let function = function.rsplit_once(" [/").map_or(function, |(function, _)| function);
    Some((cost, Some(function.trim().to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_a_function_wherever_its_pieces_stand() {
        let total = line("352,145,291 (100.0%)  PROGRAM TOTALS");
        assert_eq!(total, Some((352_145_291.0, None)));
        for text in [
            "9,180,000 ( 2.61%)  /x/answer.rs:w::<impl w::Engine>::leave [/x/upcall-bench]",
            "9,180,000 ( 2.61%)  /rustc/abc/mem/mod.rs:w::<impl w::Engine>::leave",
        ] {
            let name = "w::<impl w::Engine>::leave".to_owned();
            assert_eq!(line(text), Some((9_180_000.0, Some(name))));
        }
        assert_eq!(line("Events recorded:  Ir"), None);
    }
}
