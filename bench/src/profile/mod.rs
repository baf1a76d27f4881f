//! Where a request and an up-call spend their time: what stands in the way of goals that are
//! not reached.
//!
//! Two ways, as neither sees all. callgrind counts instructions, the same in each run, but of
//! one process: the filter runs in the queue thread there. perf samples the clock of worker and
//! filter hosts as they are, the kernel with them; its figures are rough.
//!
//! Always true: a tool that is not there, or not allowed, is named, and the other's figures are
//! there all the same.

mod callgrind;
mod perf;

use std::time::Duration;

use upcall_block::Op;
use upcall_measure::load::{Arrivals, Plan};
use upcall_measure::rig::{Link, Rig};
use upcall_worker::Placement;

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Section};

pub use callgrind::{FLAG, play};

/// Runs both.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "profile",
        &[
            "Instructions: self is what a function executes itself, without what it calls, and all with it; for a request with 32 in flight, counted by callgrind in two runs of different length, whose difference has no start in it. The filter is placed inline: the code of its filter host is in it, rings and waiting are not. LoadQueue is the benchmark's.",
            "Time: what perf's samples of the processor clock say, for a request. Up-calls alone: queue thread and filter hosts bound to a core each. Whole disks: client, worker and filter host share the cores. In a virtual machine a sample comes late: what is just behind expensive instructions pays for them, and the kernel's part counts where it lets interrupts in again.",
        ],
    );
    for (name, measure) in [("callgrind", callgrind::run as Measure), ("perf", perf::run)] {
        if let Err(error) = measure(&mut section, effort) {
            section.about.push(format!("{name}: not measured: {error}"));
        }
    }
    Ok(section)
}

type Measure = fn(&mut Section, &Effort) -> Result<(), String>;

/// Functions that are shown of each profile.
const SHOWN: usize = 15;

/// A chain of filters that see no data.
fn rig(filters: usize, placement: Placement) -> Result<Rig, String> {
    let built = Filters::new(programs().join("bench-filters"))?;
    let link = |number| Ok(Link { placement, ..Link::to(built.build(Kind::PLAIN, number)?) });
    let chain: Result<Vec<Link>, String> = (0..filters).map(link).collect();
    Rig::start(&chain?)
}

fn plan(depth: usize, slice: Duration) -> Plan {
    Plan { depth, op: Op::Write, length: 4096, arrivals: Arrivals::Always, slice }
}

/// A function's name without what only a compiler needs: where its type's code stands.
fn short(name: &str) -> String {
    let name = name.trim();
    // "a::b::<impl a::b::Engine>::begin" is Engine's `begin`.
    let Some((_, rest)) = name.split_once("<impl ") else { return name.to_owned() };
    let Some((kind, function)) = rest.rsplit_once(">::") else { return name.to_owned() };
    let kind = kind.rsplit_once(" for ").map_or(kind, |(_, kind)| kind);
    format!("{kind}::{function}")
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn a_methods_name_is_that_of_its_type() {
        let long = "w::engine::begin::<impl w::engine::Engine>::begin_flight";
        assert_eq!(short(long), "w::engine::Engine::begin_flight");
        assert_eq!(short("a::<impl core::fmt::Debug for a::B>::fmt"), "a::B::fmt");
        assert_eq!(short("uh_deliver"), "uh_deliver");
    }
}
