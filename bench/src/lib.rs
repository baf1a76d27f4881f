//! The benchmark: what an up-call and a whole disk cost, beside what users would pick
//! instead.
//!
//! Always true: sides that are compared run interleaved, in several rounds of one run, on
//! the same machine; a ratio is formed round by round, never between runs; and with each
//! figure stands how the sides waited and what processor time every process used.
//!
//! * What is measured: [`floor`] (what the machine can do), [`upcall`] (a filter alone),
//!   [`path`] (whole disks, beside qemu-storage-daemon), [`nbd`] (beside nbdkit), [`crowd`],
//!   [`idle`], [`stalls`], [`changes`] (pauses of chain changes), [`migration`], [`guest`],
//!   [`profile`] (where the time goes). Each is a [`Bench`].
//! * How: [`measure`] (rows of figures), [`histogram`], [`process`] (processor time, sleeps),
//!   [`machine`] (what it ran on), [`filters`] (what is put into chains).
//! * What comes out: [`report`].
//!
//! Nothing here is part of what is measured.
#![forbid(unsafe_code)]

pub mod changes;
pub mod crowd;
pub mod filters;
pub mod floor;
pub mod guest;
pub mod idle;
pub mod machine;
pub mod migration;
pub mod nbd;
pub mod path;
pub mod profile;
pub mod report;
pub mod stalls;
pub mod upcall;
mod vm;

use upcall_measure::{clock, histogram, measure, process};

use measure::{Effort, Section};

/// One benchmark: a name for the command line, and what runs it.
pub struct Bench {
    /// As it is given to `scripts/bench`.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// Runs it. An error says what is missing; the others still run.
    pub run: fn(&Effort) -> Result<Section, String>,
}

/// All benchmarks, in the order in which they run.
pub const ALL: &[Bench] = &[
    Bench { name: "floor", about: "what this machine can do at best", run: floor::run },
    Bench { name: "upcall", about: "a filter alone, without a client", run: upcall::run },
    Bench { name: "path", about: "whole disks, beside qemu-storage-daemon", run: path::run },
    Bench { name: "nbd", about: "NBD, beside nbdkit and qemu-nbd", run: nbd::run },
    Bench { name: "crowd", about: "an NBD client beside idle and slow ones", run: crowd::run },
    Bench { name: "idle", about: "disks at rest, and their start", run: idle::run },
    Bench { name: "stalls", about: "what a guest feels when something dies", run: stalls::run },
    Bench { name: "changes", about: "what a guest feels of chain changes", run: changes::run },
    Bench {
        name: "migration",
        about: "how long a guest that moves stands still",
        run: migration::run,
    },
    Bench { name: "guest", about: "fio in a real guest", run: guest::run },
    Bench { name: "profile", about: "where a request's time goes", run: profile::run },
];
