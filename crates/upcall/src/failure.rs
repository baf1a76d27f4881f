//! Why a command failed, as it is told to the operator.

use std::fmt;
use std::io;

/// A message that names the thing and the way out; or that nobody reads our output any more.
#[derive(Debug)]
pub enum Failure {
    /// What went wrong.
    Said(String),
    /// Standard output is closed, as by `| head`: nothing went wrong.
    OutputClosed,
    /// A process of ours ended with this exit code, and has said why itself.
    AlreadySaid(u8),
}

impl Failure {
    /// A failure with this message.
    pub fn new(text: impl fmt::Display) -> Failure {
        Failure::Said(text.to_string())
    }

    /// What became of writing to standard output.
    pub fn of_output(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::new(format_args!("cannot write to standard output: {error}")),
        }
    }

    /// Whether it only means that nobody listens.
    pub fn is_closed_output(&self) -> bool {
        matches!(self, Failure::OutputClosed)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Said(text) => f.write_str(text),
            Failure::OutputClosed => f.write_str("standard output is closed"),
            Failure::AlreadySaid(code) => write!(f, "ended with exit code {code}"),
        }
    }
}
