//! `upcall-bench [--quick] [--out FOLDER] [NAME...]`; `scripts/bench` builds and runs it.

use std::path::PathBuf;
use std::process::ExitCode;

use upcall_bench::filters::{programs, root};
use upcall_bench::floor::peer;
use upcall_bench::machine::Machine;
use upcall_bench::profile;
use upcall_bench::report::{self, Report};
use upcall_bench::{ALL, Bench};
use upcall_measure::measure::Effort;

const USAGE: &str = "usage: bench [--quick] [--out FOLDER] [NAME...]

Runs all benchmarks, or those named, and writes FOLDER/*.json, report.md and graphs.

  --quick       fewer and shorter rounds: a look, under three minutes
  --out FOLDER  where the results go [target/bench]
  --list        print the names of the benchmarks";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == peer::FLAG) {
        return code(peer::play(&args[1..]));
    }
    if args.first().is_some_and(|first| first == profile::FLAG) {
        return code(profile::play(&args[1..]));
    }
    match parse(&args) {
        Ok(Some(asked)) => code(run(&asked)),
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Asked {
    effort: Effort,
    out: PathBuf,
    benches: Vec<&'static Bench>,
}

fn parse(args: &[String]) -> Result<Option<Asked>, String> {
    let mut asked =
        Asked { effort: Effort::full(), out: root().join("target/bench"), benches: Vec::new() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => asked.effort = Effort::quick(),
            "--out" => asked.out = args.next().ok_or("--out wants a folder")?.into(),
            "--list" => {
                ALL.iter().for_each(|bench| println!("{:10} {}", bench.name, bench.about));
                return Ok(None);
            }
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(None);
            }
            name => {
                let found = ALL.iter().find(|bench| bench.name == name);
                asked
                    .benches
                    .push(found.ok_or_else(|| format!("no benchmark or option '{name}'"))?);
            }
        }
    }
    if asked.benches.is_empty() {
        asked.benches = ALL.iter().collect();
    }
    Ok(Some(asked))
}

fn run(asked: &Asked) -> Result<(), String> {
    let machine = Machine::look(&programs());
    let mut report =
        Report { machine, quick: asked.effort.quick, sections: vec![], failed: vec![] };
    for bench in &asked.benches {
        let start = std::time::Instant::now();
        eprint!("{:10} ", bench.name);
        // A server that does not start is reported by a panic of the tests' own code.
        let result = std::panic::catch_unwind(|| (bench.run)(&asked.effort));
        match result.unwrap_or_else(|_| Err("it panicked; see above".into())) {
            Ok(section) => {
                eprintln!("{:3} s", start.elapsed().as_secs());
                report.sections.push(section);
            }
            Err(error) => {
                eprintln!("failed: {error}");
                report.failed.push((bench.name.to_owned(), error));
            }
        }
        // What is there is kept, whatever becomes of the rest.
        report::write(&report, &asked.out)?;
    }
    eprintln!("{}", asked.out.join("report.md").display());
    if report.failed.is_empty() { Ok(()) } else { Err("not all benchmarks ran".into()) }
}
