//! The `upcall` command line. Each command is a module; [`cli`] defines what they take.
//!
//! Exit codes: 0 done, 1 something went wrong (said on standard error), 2 wrong usage.

mod bench;
mod check;
mod cli;
mod control;
mod failure;
mod image;
mod info;
mod manual;
mod new;
mod output;
mod running;
mod serve;
mod signals;
mod state;
mod top;
mod words;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command, FilterCommand};
use crate::failure::Failure;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_closed_output() => ExitCode::SUCCESS,
        Err(Failure::AlreadySaid(code)) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("upcall: error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Top(args) => top::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Show(args) => control::show(args),
        Command::Events(args) => control::events(args),
        Command::Metrics(args) => control::metrics(args),
        Command::Chain(command) => control::chain(command),
        Command::Sidecar(args) => state::sidecar(args),
        Command::Gaps(args) => state::gaps(args),
        Command::Filter(FilterCommand::Info(args)) => info::run(args),
        Command::Filter(FilterCommand::New(args)) => new::run(args),
        Command::Filter(FilterCommand::Check(args)) => check::run(args),
        Command::Image(command) => image::run(command),
        Command::Completions { shell } => manual::print_completions(shell),
        Command::Man { folder } => manual::write_pages(&folder),
    }
}
