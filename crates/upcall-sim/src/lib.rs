//! A simulated world around the production state machines: guests, filters, stores, workers
//! and their deaths, on a clock that is played, from one seed.
//!
//! | module | its one idea |
//! |---|---|
//! | `plan` | what a seed makes: disks, chains, load, faults |
//! | `simulation` | the scheduler: who has a turn, and when |
//! | `simulation::faults` | what goes wrong, and who starts again what died |
//! | `simulation::end` | no more faults; everything finishes, and is looked at |
//! | `simulation::migration` | the guest moves to another host, whose memory is compared |
//! | `guest` | drivers that fill rings, and look at what comes back |
//! | `changes` | chains that change meanwhile, as production's machines say |
//! | `spy` | what a ring hands out, noted |
//! | `filters` | filter hosts, played |
//! | `filters::role` | the kinds of filters, and the points at which they die |
//! | `filters::turn` | what a filter host does in a turn, and what it checks |
//! | `gaps` | what bypassed filters miss: the record, and the truth that it is held against |
//! | `medium` | where data ends up, with its fault model |
//! | `stamp` | sectors that say whose they are |
//! | `history` | what a disk may hold, judged from what its guest saw |
//! | `disk` | one disk: media, guest and history together |
//! | `plants` | known bugs, planted again, that worlds must show |
//! | `campaign` | many worlds, canaries, determinism, coverage, the ledger |
//!
//! Always true: a world depends on its seed and on the code alone, so a seed and a commit
//! replay a failure exactly; the rings, the arenas, the engine, the flights and the in-flight
//! tracking that run here are the ones of production.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "nobody builds on it; the modules say what is what")]

mod campaign;
mod changes;
mod coverage;
mod disk;
mod filters;
mod gaps;
mod guest;
mod history;
mod medium;
mod plan;
mod plants;
mod random;
mod simulation;
mod spy;
mod stamp;
mod trace;

pub use campaign::{Campaign, Outcome, Report, Run, commit, find_plant, run_world};
pub use coverage::Coverage;
pub use medium::Canary;
pub use plants::Plant;
