//! The up-call alone: a queue thread and a real filter host, a core each, with requests made
//! in the queue thread itself and a store that does nothing.
//!
//! A figure is that of a whole request: into the engine, through the chain, to the store and
//! out. What an up-call costs is the difference to the same without a filter.

use upcall_block::Op;
use upcall_worker::Placement;

use crate::filters::{Data, Filters, Kind, programs};
use crate::measure::{Effort, Section};
use upcall_measure::load::{Arrivals, Plan};
use upcall_measure::rig::{Link, Rig};

/// The side without filters.
pub const NONE: &str = "no filter";
/// The side that goals refer to.
pub const ONE: &str = "1 filter";

/// What follows [`ONE`] in the side whose filter asks for none of the requests there are.
pub const ELSEWHERE: &str = ", asks for discard only";

/// What follows [`ONE`] in the side whose filter sees each request on its way up, too: two
/// up-calls.
pub const WATCHING: &str = ", watching";

/// What follows [`chain_of`] in sides whose filters are instances of one file: one filter host
/// serves them all.
pub const TOGETHER: &str = " of one file";

/// The cases that goals refer to.
pub const ALONE: &str = "write 4k, 1 in flight";
/// See [`ALONE`].
pub const MANY: &str = "write 4k, 32 in flight";
/// See [`ALONE`].
pub const BARE: &str = "flush, 32 in flight";
/// See [`ALONE`].
pub const ASLEEP: &str = "write 4k, one each millisecond";

/// The side of a chain of `count` filters that see no data.
pub fn chain_of(count: usize) -> String {
    match count {
        0 => NONE.into(),
        1 => ONE.into(),
        _ => format!("{count} filters"),
    }
}

/// A chain, and the requests that are sent through it.
struct Side {
    name: String,
    /// Or why it cannot be built here: for 32 bits, perhaps.
    chain: Result<Vec<Link>, String>,
    loads: Vec<Load>,
}

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    op: Op,
    depth: usize,
    arrivals: Arrivals,
}

const LOAD_ALONE: Load = Load { name: ALONE, op: Op::Write, depth: 1, arrivals: Arrivals::Always };
const LOAD_MANY: Load = Load { name: MANY, depth: 32, ..LOAD_ALONE };
const LOAD_ASLEEP: Load = Load { name: ASLEEP, arrivals: Arrivals::Rung, ..LOAD_ALONE };
/// Of no range and no memory.
const FLUSH_MANY: Load = Load { name: BARE, op: Op::Flush, ..LOAD_MANY };
const READ_ALONE: Load = Load { name: "read 4k, 1 in flight", op: Op::Read, ..LOAD_ALONE };
const READ_MANY: Load = Load { name: "read 4k, 32 in flight", op: Op::Read, ..LOAD_MANY };

/// Runs all sides, in turn, round by round.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "upcall",
        &[
            "Queue thread on the first core, all filter hosts on the second; both poll, yield and sleep as they do in use. Null store. Requests are made in the queue thread; a figure is that of a whole request through engine, chain and store.",
            "Filters see no data unless it is said; each is a process of its own unless it is said.",
        ],
    );
    let mut rigs = Vec::new();
    for side in sides(effort)? {
        match side.chain.as_ref().map_err(Clone::clone).and_then(|chain| Rig::start(chain)) {
            Ok(rig) => rigs.push((side, rig)),
            Err(error) => section.about.push(format!("{}: not measured: {error}", side.name)),
        }
    }
    for _ in 0..effort.rounds {
        for (side, rig) in &rigs {
            for load in &side.loads {
                let plan = Plan {
                    depth: load.depth,
                    op: load.op,
                    length: 4096,
                    arrivals: load.arrivals,
                    slice: effort.slice,
                };
                let how = how(rig, load);
                let round = rig.round(plan).map_err(|error| format!("{}: {error}", side.name))?;
                section.row(load.name, &side.name, &how).push_round(&round);
            }
        }
    }
    Ok(section)
}

fn how(rig: &Rig, load: &Load) -> String {
    let places = match rig.hosts() {
        0 => "one thread, one core".to_owned(),
        1 => "a core each".to_owned(),
        count => format!("{count} filter hosts share a core"),
    };
    match load.arrivals {
        Arrivals::Always => places,
        Arrivals::Rung => format!("{places}; all asleep when a request comes"),
    }
}

fn sides(effort: &Effort) -> Result<Vec<Side>, String> {
    let filters = Filters::new(programs().join("bench-filters"))?;
    let both = [LOAD_ALONE, LOAD_MANY];
    let writes_and_reads = [LOAD_ALONE, LOAD_MANY, READ_ALONE, READ_MANY];
    let mut sides = Vec::new();
    let lengths: &[usize] = if effort.quick { &[0, 1, 2, 8] } else { &[0, 1, 2, 3, 4, 5, 6, 7, 8] };
    for &count in lengths {
        let chain = (0..count).map(|number| Ok(Link::to(filters.build(Kind::PLAIN, number)?)));
        let mut loads = both.to_vec();
        if count <= 1 {
            loads.extend([LOAD_ASLEEP, READ_ALONE, READ_MANY, FLUSH_MANY]);
        }
        sides.push(Side { name: chain_of(count), chain: chain.collect(), loads });
    }
    for count in [2, 8] {
        let chain = (0..count).map(|_| Ok(Link::to(filters.build(Kind::PLAIN, 0)?)));
        let (name, chain) = (format!("{}{TOGETHER}", chain_of(count)), chain.collect());
        sides.push(Side { name, chain, loads: both.to_vec() });
    }
    let mut one = |name: &str, link: Result<Link, String>, loads: &[Load]| {
        let chain = link.map(|link| vec![link]);
        sides.push(Side { name: format!("1 filter{name}"), chain, loads: loads.into() });
    };
    let link = |kind| filters.build(kind, 0).map(Link::to);
    let plain = |mode: &str| {
        link(Kind::PLAIN).map(|link| Link { params: vec![("mode".into(), mode.into())], ..link })
    };
    one(WATCHING, plain("watch"), &both);
    one(", sees data", link(Kind::with(Data::Sees)), &writes_and_reads);
    one(", changes data", link(Kind::with(Data::Changes)), &writes_and_reads);
    one(ELSEWHERE, link(Kind::with(Data::Elsewhere)), &both);
    one(", holds; a polling thread of its own answers", plain("hold"), &both);
    one(", holds; a sleeping thread answers", plain("blocking"), &both);
    one(" in Rust", Ok(Link::to(programs().join("libupcall_bench_filter.so"))), &both);
    let inline = link(Kind::PLAIN).map(|link| Link { placement: Placement::Inline, ..link });
    one(", inline", inline, &both);
    one(", 32 bits", link(Kind { width: 32, ..Kind::PLAIN }), &both);
    Ok(sides)
}
