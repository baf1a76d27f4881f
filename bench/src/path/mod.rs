//! Whole disks: a client as a guest's driver is, against `upcall serve` with chains of
//! several lengths and against qemu-storage-daemon without any.

pub mod client;
pub mod servers;

use std::time::Duration;

use upcall_tests::Scratch;

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Section};
use crate::process;
use client::{Client, Load, Wait};
use servers::{CAPACITY, Disk, Serving};

/// The side that others are compared to.
pub const PEER: &str = "qemu-storage-daemon";

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Our side with a chain of `count` filters.
pub fn ours(count: usize) -> String {
    match count {
        1 => "upcall, 1 filter".into(),
        _ => format!("upcall, {count} filters"),
    }
}

/// A case's name.
pub fn case(disk: Disk, load: &str, depth: usize) -> String {
    format!("{}, {load}, {depth} in flight", disk.word())
}

/// What a client does, but for the time it takes.
struct Case {
    word: String,
    reads: u8,
    length: u32,
    depth: usize,
    queues: usize,
    wait: Wait,
}

/// The loads that goals refer to.
pub const READ: &str = "read 4k";
/// See [`READ`].
pub const WRITE: &str = "write 4k";

/// What depth is swept over.
pub const DEPTHS: [usize; 4] = [1, 4, 32, 128];

fn cases(effort: &Effort, disk: Disk) -> Vec<Case> {
    let case = |word: &str, reads, length, depth| Case {
        word: word.into(),
        reads,
        length,
        depth,
        queues: 1,
        wait: Wait::Poll,
    };
    if disk == Disk::Qcow2 {
        let depths = [1, 32].into_iter();
        let both = |depth| [case(READ, 100, 4096, depth), case(WRITE, 0, 4096, depth)];
        return depths.flat_map(both).collect();
    }
    let mut cases = Vec::new();
    for depth in DEPTHS {
        cases.push(case(READ, 100, 4096, depth));
        if !effort.quick || depth == 1 || depth == 32 {
            cases.push(case(WRITE, 0, 4096, depth));
        }
    }
    for depth in [1, 32] {
        let sleeping = case("read 4k, client sleeps", 100, 4096, depth);
        cases.push(Case { wait: Wait::Sleep, ..sleeping });
    }
    if effort.quick {
        return cases;
    }
    cases.push(case("7 of 10 read, 4k", 70, 4096, 32));
    for (word, length) in [("64k", 64 << 10), ("1M", 1 << 20)] {
        cases.push(case(&format!("read {word}"), 100, length, 32));
        cases.push(case(&format!("write {word}"), 0, length, 32));
    }
    cases.push(Case { queues: 2, ..case("read 4k, 2 queues", 100, 4096, 32) });
    cases
}

/// Runs all cases on all sides: in each round each case, in each case each side in turn.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "path",
        &[
            "One client process drives each server in turn; nothing is bound to a core: client, server and filter hosts share those there are. Where it polls, the client yields now and then, and between all looks while others run meanwhile; where it sleeps, it waits for the device's call at once. Each queue has a thread in the client, and data is one piece.",
            "upcall: as it comes, 2 queues with a thread each; filters see no data and pass everything, each in a process of its own. qemu-storage-daemon: one iothread for the disk, aio=io_uring; null is null-co with read-zeroes=on, so that both fill what is read. qcow2: an image that is allocated throughout; ours is read by a confined qemu-storage-daemon behind the worker, whose processor time counts.",
        ],
    );
    section.reference = Some(PEER.into());
    let filters = Filters::new(programs().join("bench-filters"))?;
    for disk in [Disk::Null, Disk::Raw, Disk::Qcow2] {
        let scratch = Scratch::new();
        let mut sides = start(&scratch, disk, &filters)?;
        for round in 0..effort.rounds {
            for case in cases(effort, disk) {
                // Each side comes first as often as the others.
                let count = sides.len();
                for turn in 0..count {
                    let (name, serving, client) = &mut sides[(turn + round) % count];
                    let name_of_case = self::case(disk, &case.word, case.depth);
                    let load = Load {
                        depth: case.depth,
                        length: case.length,
                        reads: case.reads,
                        wait: case.wait,
                        slice: effort.slice,
                        queues: case.queues,
                    };
                    measure(&mut section, &name_of_case, name, serving, client, load)?;
                }
            }
        }
    }
    Ok(section)
}

fn measure(
    section: &mut Section,
    case: &str,
    side: &str,
    serving: &Serving,
    client: &mut Client,
    load: Load,
) -> Result<(), String> {
    let failed = |error| format!("{side}: {case}: {error}");
    client.run(Load { slice: load.slice / 10, ..load }, PATIENCE).map_err(failed)?;
    let (round, used) = process::while_watching(&serving.watched, || client.run(load, PATIENCE));
    let mut round = round.map_err(failed)?;
    if round.errors > 0 {
        return Err(failed(format!("{} of {} requests failed", round.errors, round.requests)));
    }
    round.used.extend(used);
    let processes = serving.watched.len() + 1;
    let how = match load.wait {
        Wait::Poll => format!("client polls and yields; {processes} processes"),
        Wait::Sleep => format!("client sleeps; {processes} processes"),
    };
    section.row(case, side, &how).push_round(&round);
    Ok(())
}

type Side = (String, Serving, Client);

fn start(scratch: &Scratch, disk: Disk, filters: &Filters) -> Result<Vec<Side>, String> {
    const QUEUES: usize = 2;
    let mut servings = Vec::new();
    let lengths: &[usize] = if disk == Disk::Qcow2 { &[0, 1] } else { &[0, 1, 4] };
    for &count in lengths {
        let chain: Result<Vec<_>, String> =
            (0..count).map(|number| filters.build(Kind::PLAIN, number)).collect();
        let name = format!("chain{count}");
        servings.push((ours(count), servers::upcall(scratch, &name, disk, QUEUES, &chain?)?));
    }
    let peer = servers::qemu_storage_daemon(scratch, "peer", disk, QUEUES)?;
    servings.push((PEER.to_owned(), peer));
    let connect = |(name, serving): (String, Serving)| {
        let client = Client::connect(&serving.socket, QUEUES, CAPACITY)
            .map_err(|error| format!("{name}: cannot connect: {error}"))?;
        Ok((name, serving, client))
    };
    servings.into_iter().map(connect).collect()
}
