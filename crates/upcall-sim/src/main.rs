//! Runs simulated worlds: a campaign of many seeds, or one seed again to see what it does.

use std::process::ExitCode;

use upcall_sim::{Campaign, Canary, Plant, Run, commit, find_plant, run_world};

const USAGE: &str = "\
Usage: upcall-sim [--seeds N] [--from S]     N worlds (100) from seed S (0)
       upcall-sim --seed S [--canary NAME] [--plant NAME]
                                             one world, with all that happens in it
       upcall-sim --plant NAME [--seeds N]   the first world that shows a planted bug

UPCALL_SEED=S is --seed S. The last line of a campaign begins with \"ledger:\".
The exit status is 1 if something is wrong.";

struct Arguments {
    first: u64,
    seeds: u64,
    seed: Option<u64>,
    canary: Option<Canary>,
    plant: Option<Plant>,
}

fn arguments() -> Result<Arguments, String> {
    let seed = std::env::var("UPCALL_SEED").ok().map(|seed| number(&seed)).transpose()?;
    let mut arguments = Arguments { first: 0, seeds: 100, seed, canary: None, plant: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--seeds" => arguments.seeds = number(&value()?)?,
            "--from" => arguments.first = number(&value()?)?,
            "--seed" => arguments.seed = Some(number(&value()?)?),
            "--canary" => {
                let name = value()?;
                let canary = Canary::ALL.into_iter().find(|canary| canary.name() == name);
                arguments.canary = Some(canary.ok_or(format!("no canary is called {name}"))?);
            }
            "--plant" => {
                let name = value()?;
                let plant = Plant::all().into_iter().find(|plant| plant.name() == name);
                arguments.plant = Some(plant.ok_or(format!("no plant is called {name}"))?);
            }
            _ => return Err(format!("unknown word {word}")),
        }
    }
    Ok(arguments)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is not a number"))
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(wrong) => {
            eprintln!("{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match (arguments.seed, arguments.plant) {
        (Some(seed), plant) => one(seed, Run { canary: arguments.canary, plant, prints: true }),
        (None, Some(plant)) => show(plant, &arguments),
        (None, None) => campaign(arguments),
    }
}

/// Succeeds if the bug shows.
fn show(plant: Plant, arguments: &Arguments) -> ExitCode {
    match find_plant(plant, arguments.first, arguments.seeds) {
        Some((seed, wrong)) => {
            println!("{}: seed {seed}: {wrong}", plant.name());
            ExitCode::SUCCESS
        }
        None => {
            println!("{}: not seen in {} worlds", plant.name(), arguments.seeds);
            ExitCode::FAILURE
        }
    }
}

fn one(seed: u64, run: Run) -> ExitCode {
    println!("seed {seed}, commit {}", commit());
    let outcome = run_world(seed, run);
    for (what, count) in outcome.coverage.iter() {
        println!("{count:>10}  {what}");
    }
    match outcome.wrong {
        None => ExitCode::SUCCESS,
        Some(wrong) => {
            println!("seed {seed}: {wrong}");
            ExitCode::FAILURE
        }
    }
}

fn campaign(arguments: Arguments) -> ExitCode {
    let Arguments { first, seeds, .. } = arguments;
    println!("{seeds} worlds from seed {first}, commit {}", commit());
    let report = Campaign { first, seeds }.run();
    for (what, count) in report.coverage.iter() {
        println!("{count:>10}  {what}");
    }
    for wrong in &report.wrong {
        println!("\n{wrong}\nreplay: cargo run --release -p upcall-sim -- --seed N\n");
    }
    println!("{}", report.ledger());
    if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
