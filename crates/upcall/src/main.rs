//! The `upcall` command line. Each command is a module; [`cli`] defines what they take.
//!
//! Exit codes: 0 done, 1 something went wrong (said on standard error), 2 wrong usage.

mod cli;
mod failure;
mod output;
mod serve;
mod signals;
mod words;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_closed_output() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("upcall: error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Serve(args) => serve::run(args),
    }
}
