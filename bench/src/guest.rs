//! fio in a real guest: whether what the lean client shows is there for a guest too.
//!
//! The guest is emulated, and its kernel and the emulation cost far more than any disk server:
//! figures are for a look at what is far off, and no goal but that nothing is.

use std::time::Duration;

use serde_json::Value;

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Section, Unit};
use crate::path::servers::{self, Disk, Serving};
use crate::path::{PEER, ours};
use crate::vm::Vm;
use upcall_tests::Scratch;

/// What fio does.
pub const LOADS: [&str; 2] = ["randread", "randwrite"];
/// How many requests it has in flight.
pub const DEPTHS: [usize; 2] = [1, 32];

const PATIENCE: Duration = Duration::from_secs(90);

/// A case's name.
pub fn case(load: &str, depth: usize) -> String {
    format!("raw O_DIRECT, fio {load} 4k, {depth} in flight")
}

/// Boots one guest with a disk of each side, and has its fio take them in turn.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "guest",
        &[
            "One emulated guest (QEMU, TCG, 2 processors, Linux), with a disk of each side; fio with libaio and direct=1 takes them in turn, a second each, in each round in another order. Emulated processors and disk servers share the cores.",
        ],
    );
    section.reference = Some(PEER.into());
    let scratch = Scratch::new();
    let sides = start(&scratch)?;
    let disks = sides.iter().flat_map(|(_, serving)| {
        let socket = format!("{},num-queues=1", serving.socket.display());
        ["--disk".to_owned(), socket]
    });
    let with = ["--with".to_owned(), "fio".into()];
    let vm = Vm::start(&scratch.join("vm"), &disks.chain(with).collect::<Vec<_>>())?;
    vm.wait()?;
    for round in 0..if effort.quick { 1 } else { 5 } {
        let said = vm.run(&script(sides.len(), round), PATIENCE)?;
        read(&mut section, &sides, &said)?;
    }
    Ok(section)
}

fn start(scratch: &Scratch) -> Result<Vec<(String, Serving)>, String> {
    let filter = Filters::new(programs().join("bench-filters"))?.build(Kind::PLAIN, 0)?;
    Ok(vec![
        (ours(0), servers::upcall(scratch, "none", Disk::Raw, 1, &[])?),
        (ours(1), servers::upcall(scratch, "one", Disk::Raw, 1, &[filter])?),
        (PEER.to_owned(), servers::qemu_storage_daemon(scratch, "peer", Disk::Raw, 1)?),
    ])
}

/// Jobs that wait for each other; a job's name says its side, load and depth.
fn script(sides: usize, round: usize) -> String {
    let mut jobs = String::from(
        "[global]\nioengine=libaio\ndirect=1\nbs=4k\nsize=200M\ntime_based\nruntime=1\nramp_time=100ms\nstonewall\n",
    );
    for load in LOADS {
        for depth in DEPTHS {
            for turn in 0..sides {
                let side = (turn + round) % sides;
                // A disk's letter says its place on QEMU's command line.
                let disk = (b'a' + side as u8) as char;
                jobs += &format!(
                    "[{side} {load} {depth}]\nfilename=/dev/vd{disk}\nrw={load}\niodepth={depth}\n"
                );
            }
        }
    }
    format!("cat >/tmp/jobs <<'END'\n{jobs}END\nfio --output-format=json /tmp/jobs 2>&1\n")
}

fn read(section: &mut Section, sides: &[(String, Serving)], said: &str) -> Result<(), String> {
    // fio may say something else first.
    let json = said.find('{').map(|start| &said[start..]).unwrap_or_default();
    let nonsense = |what: &str| format!("fio: {what}: {said}");
    let json: Value = serde_json::from_str(json).map_err(|_| nonsense("no JSON"))?;
    for job in json["jobs"].as_array().ok_or_else(|| nonsense("no jobs"))? {
        let name = job["jobname"].as_str().unwrap_or_default();
        let parts: Vec<&str> = name.split(' ').collect();
        let [side, load, depth] = parts[..] else { return Err(nonsense("a strange job")) };
        let number = |text: &str| text.parse::<usize>().map_err(|_| nonsense("a strange job"));
        let (side, _) = sides.get(number(side)?).ok_or_else(|| nonsense("a strange side"))?;
        if job["error"] != 0 {
            return Err(nonsense("a request failed"));
        }
        let way = &job[load.trim_start_matches("rand")];
        let figure = |value: &Value| value.as_f64().ok_or_else(|| nonsense("a figure is missing"));
        let row = section.row(&case(load, number(depth)?), side, "in the guest");
        row.push("rate", Unit::PerSecond, figure(&way["iops"])?);
        for (name, quantile) in [("p50", "50.000000"), ("p99", "99.000000")] {
            row.push(name, Unit::Nanoseconds, figure(&way["clat_ns"]["percentile"][quantile])?);
        }
    }
    Ok(())
}
