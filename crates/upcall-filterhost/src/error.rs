//! Why a filter cannot be used.
//!
//! Every error names the filter and what to do next, on one line that is safe to print: text
//! that came from a filter or its host was cleaned when it arrived.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::text::clean_path;

/// Why a filter cannot be used, or can no longer be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// The file cannot be opened. Check the path and its permissions.
    #[error("filter {}: cannot open it: {source}", shown(path))]
    Open {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("filter {}: not a regular file; give the filter's .so", shown(path))]
    NotAFile {
        /// As given.
        path: PathBuf,
    },
    /// No ELF file, or not a shared object.
    #[error(
        "filter {}: not a shared object ({found}); build it with cc -shared -fPIC, or cargo's cdylib",
        shown(path)
    )]
    NotSharedObject {
        /// As given.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// Built for a processor that no filter host serves.
    #[error(
        "filter {}: built for another machine ({found}); filters are for x86-64 or i386",
        shown(path)
    )]
    WrongMachine {
        /// As given.
        path: PathBuf,
        /// What its header says.
        found: String,
    },
    /// The filter has 32 bits, and this program was built on a machine without `cc -m32`.
    #[error(
        "filter {}: it is a 32-bit filter, and Upcall was built without the 32-bit filter host; install gcc-multilib and rebuild",
        shown(path)
    )]
    No32BitHost {
        /// As given.
        path: PathBuf,
    },
    /// A 32-bit filter cannot be loaded into this 64-bit program.
    #[error("filter {}: a 32-bit filter cannot be placed inline; leave it isolated", shown(path))]
    InlineWidth {
        /// As given.
        path: PathBuf,
    },
    /// The system did not let us start a filter host, or talk to it.
    #[error("filter {filter}: cannot {step}: {source}")]
    System {
        /// Its name, or its path before it has said its name.
        filter: String,
        /// What was being done.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The filter host did not answer in time; it must be dropped (which kills it).
    #[error("filter {filter}: its host did not answer {step} within {} ms", after.as_millis())]
    Silent {
        /// Its name or path.
        filter: String,
        /// What was asked.
        step: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// The filter host is gone.
    #[error("filter {filter}: its host ended during {step}: {how}")]
    Ended {
        /// Its name or path.
        filter: String,
        /// What was being done.
        step: &'static str,
        /// Exit code or signal.
        how: String,
    },
    /// The filter host broke the rules of the control socket; it must be dropped.
    #[error("filter {filter}: its host broke the protocol during {step}: {what}")]
    Misbehaved {
        /// Its name or path.
        filter: String,
        /// What was being done.
        step: &'static str,
        /// What it did.
        what: String,
    },
    /// The filter, or its host on its behalf, said no.
    #[error("filter {filter}: {step} failed: {}", reason(*.errno, text))]
    Refused {
        /// Its name or path.
        filter: String,
        /// What was asked.
        step: &'static str,
        /// A positive errno of Linux.
        errno: i32,
        /// Its own words; may be empty.
        text: String,
    },
    /// The filter's table declares something that is not allowed; its author must change it.
    #[error("filter {filter}: its table is wrong: {what}")]
    Declaration {
        /// Its name or path.
        filter: String,
        /// What is wrong.
        what: String,
    },
    /// More than one message can carry; give shorter values or fewer files.
    #[error("filter {filter}: its parameters do not fit into one message ({what})")]
    TooLarge {
        /// Its name.
        filter: String,
        /// What is too much.
        what: String,
    },
}

fn shown(path: &Path) -> String {
    clean_path(path)
}

fn reason(errno: i32, text: &str) -> String {
    let system = io::Error::from_raw_os_error(errno);
    if text.is_empty() { system.to_string() } else { format!("{text} ({system})") }
}
