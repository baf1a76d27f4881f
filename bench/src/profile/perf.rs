//! Time by function, of worker and filter hosts as they run.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::Scratch;
use upcall_worker::Placement;

use super::{SHOWN, plan, rig, short};
use crate::filters::{Filters, Kind, programs};
use crate::measure::{CLIENT, Effort, Round, Section, Unit};
use crate::path::client::{Client, Load, Wait};
use crate::path::servers::{self, CAPACITY, Disk};
use crate::{path, process, upcall};

/// What the name of a filter host's program has in it, which is a file without a path.
const HOST_PROGRAM: &str = "upcall-filterhost";
/// Samples a second of each thread that runs; no divisor of the timer's ticks.
const RATE: u64 = 4999;
/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Until perf has found all threads.
const ATTACH: Duration = Duration::from_millis(300);

/// Up-calls alone that are profiled: filters, and requests in flight.
const UPCALLS: [(usize, usize); 3] = [(1, 32), (1, 1), (8, 1)];
/// Whole null disks with a client that polls: filters, requests in flight, reads of 100.
const DISKS: [(usize, usize, u8); 4] = [(0, 32, 100), (0, 32, 0), (1, 32, 100), (1, 1, 100)];

/// Who is who, by the names of threads.
const WHO: [(&str, &str); 3] =
    [("q0-bench", "queue thread"), ("upcall-channel", "filter hosts"), ("upcall-bench", CLIENT)];

/// Takes samples in all cases.
pub fn run(section: &mut Section, effort: &Effort) -> Result<(), String> {
    let slice = Duration::from_millis(if effort.quick { 500 } else { 2000 });
    for (filters, depth) in UPCALLS {
        let rig = rig(filters, Placement::Isolated)?;
        let (own, round) = (std::process::id(), || rig.round(plan(depth, slice)));
        let hosts = process::children(own);
        let (samples, requests) = sample(&[&[own][..], &hosts].concat(), round)?;
        let case = format!("time, {}, {depth} in flight", upcall::chain_of(filters));
        show(section, &case, &samples, requests);
    }
    for (filters, depth, reads) in DISKS {
        let scratch = Scratch::new();
        let built = Filters::new(programs().join("bench-filters"))?;
        let chain: Result<Vec<_>, String> =
            (0..filters).map(|number| built.build(Kind::PLAIN, number)).collect();
        let serving = servers::upcall(&scratch, "bench", Disk::Null, 1, &chain?)?;
        let mut client =
            Client::connect(&serving.socket, 1, CAPACITY).map_err(|e| e.to_string())?;
        let load = Load { depth, length: 4096, reads, wait: Wait::Poll, slice, queues: 1 };
        let pids = serving.watched.iter().map(|(_, pid)| *pid).chain([std::process::id()]);
        let round = || client.run(load, PATIENCE);
        let (samples, requests) = sample(&pids.collect::<Vec<u32>>(), round)?;
        let word = if reads > 0 { path::READ } else { path::WRITE };
        let case = path::case(Disk::Null, word, depth);
        show(section, &format!("time, {case}, {}", path::ours(filters)), &samples, requests);
    }
    Ok(())
}

/// Samples of one function.
#[derive(Debug, PartialEq)]
struct Sample {
    count: u64,
    thread: String,
    function: String,
    in_kernel: bool,
}

fn show(section: &mut Section, case: &str, samples: &[Sample], requests: u64) {
    let all: u64 = samples.iter().map(|sample| sample.count).sum();
    let mut sums: Vec<(String, u64)> = Vec::new();
    for (thread, who) in WHO {
        for (in_kernel, where_) in [(false, "own code"), (true, "kernel")] {
            let is_it = |s: &&Sample| s.thread == thread && s.in_kernel == in_kernel;
            let count = samples.iter().filter(is_it).map(|sample| sample.count).sum();
            sums.push((format!("{who}: {where_}"), count));
        }
    }
    let mut functions: HashMap<String, u64> = HashMap::new();
    for sample in samples {
        let known = WHO.iter().find(|(thread, _)| *thread == sample.thread);
        let Some((_, who)) = known else { continue };
        let kernel = if sample.in_kernel { " (kernel)" } else { "" };
        let name = format!("{who}: {}{kernel}", sample.function);
        *functions.entry(name).or_default() += sample.count;
    }
    let mut functions: Vec<(String, u64)> = functions.into_iter().collect();
    functions.sort_by(|one, other| (other.1, &one.0).cmp(&(one.1, &other.0)));
    for (name, count) in sums.into_iter().chain(functions.into_iter().take(SHOWN)) {
        let row = section.row(case, &name, "");
        let ns = count as f64 * 1e9 / RATE as f64 / requests.max(1) as f64;
        row.push("for a request", Unit::Nanoseconds, ns);
        row.push("% of all", Unit::Count, 100.0 * count as f64 / all.max(1) as f64);
    }
}

/// Samples of these processes during a round, and how many requests it had. Filter hosts are
/// among the processes, or there are none.
fn sample(
    pids: &[u32],
    round: impl FnOnce() -> Result<Round, String>,
) -> Result<(Vec<Sample>, u64), String> {
    let scratch = Scratch::new();
    let symbols = Symbols::of(&scratch, pids)?;
    let data = scratch.join("perf.data");
    let perf = Recording::start(&data, pids)?;
    let requests = round()?.requests;
    perf.end()?;
    let mut command = Command::new("perf");
    command.args(["report", "--stdio", "--no-children", "-n", "-t", ";", "-i"]).arg(&data);
    let output = command.args(["--sort", "comm,dso,sym"]).output().map_err(missing)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let samples: Vec<Sample> = text.lines().filter_map(|text| line(text, &symbols)).collect();
    if samples.is_empty() {
        return Err(format!("no samples: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok((samples, requests))
}

fn missing(error: std::io::Error) -> String {
    format!("perf (Debian: linux-perf): {error}")
}

/// A perf that records until it is told to end.
struct Recording(Child);

impl Recording {
    fn start(data: &Path, pids: &[u32]) -> Result<Recording, String> {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut command = Command::new("perf");
        command.args(["record", "-e", "cpu-clock", "-F", &RATE.to_string()]);
        command.args(["-p", &pids.join(","), "-o"]).arg(data);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().map_err(missing)?;
        std::thread::sleep(ATTACH);
        Ok(Recording(child))
    }

    fn end(self) -> Result<(), String> {
        // One that has ended already says below why.
        let _ = kill_process(Pid::from_child(&self.0), Signal::INT);
        let output = self.0.wait_with_output().map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("Captured and wrote") { Ok(()) } else { Err(said.trim().to_owned()) }
    }
}

/// A line of perf's report: share, samples, thread, object, function.
fn line(text: &str, symbols: &Symbols) -> Option<Sample> {
    let mut fields = text.splitn(5, ';').map(str::trim);
    let _share = fields.next().filter(|share| share.ends_with('%'))?;
    let count = fields.next()?.parse().ok()?;
    let (thread, object, symbol) = (fields.next()?, fields.next()?, fields.next()?);
    let in_kernel = symbol.starts_with("[k]");
    let symbol = symbol.get(4..)?.trim();
    // A filter host's program is a file without a name: perf cannot look into it.
    let of_host = object.contains(HOST_PROGRAM).then(|| symbols.find(symbol)).flatten();
    let function = of_host.map_or_else(|| short(symbol), str::to_owned);
    Some(Sample { count, thread: thread.to_owned(), function, in_kernel })
}

/// The functions of the filter host's program, by where they begin.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Of the first process that is a filter host; none, if none is.
    fn of(scratch: &Scratch, pids: &[u32]) -> Result<Symbols, String> {
        let program_of = |pid: &u32| std::fs::read_link(format!("/proc/{pid}/exe"));
        let is_host = |pid: &&u32| {
            program_of(pid).is_ok_and(|path| path.to_string_lossy().contains(HOST_PROGRAM))
        };
        let Some(host) = pids.iter().find(is_host) else { return Ok(Symbols(Vec::new())) };
        let program = scratch.join("filter-host");
        std::fs::copy(format!("/proc/{host}/exe"), &program)
            .map_err(|error| format!("a filter host's program: {error}"))?;
        let output = Command::new("nm").args(["--defined-only", "-n"]).arg(&program).output();
        let output = output.map_err(|error| format!("nm (Debian: binutils): {error}"))?;
        Ok(Symbols::read(&String::from_utf8_lossy(&output.stdout)))
    }

    fn read(listing: &str) -> Symbols {
        let symbol = |line: &str| {
            let mut words = line.split(' ');
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let is_code = matches!(words.next()?, "t" | "T");
            is_code.then(|| Some((address, words.next()?.to_owned())))?
        };
        Symbols(listing.lines().filter_map(symbol).collect())
    }

    fn find(&self, address: &str) -> Option<&str> {
        let address = u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?;
        let next = self.0.partition_point(|(begin, _)| *begin <= address);
        Some(&self.0.get(next.checked_sub(1)?)?.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_in_the_filter_host_is_in_the_function_that_begins_before_it() {
        let symbols = Symbols::read(
            "0000000000003200 T uh_deliver\n0000000000003300 t look\n0000000000003380 r table\n",
        );
        let text = " 10.62% ; 101        ;upcall-channel ;memfd:upcall-filterhost (deleted);[.] 0x000000000000330d";
        let sample = line(text, &symbols).unwrap();
        assert_eq!((sample.count, sample.function.as_str()), (101, "look"));
        assert!(!sample.in_kernel);
        let text = " 8.41%  ; 80         ;upcall-channel ;[kernel.kallsyms]                ;[k] __schedule";
        let sample = line(text, &symbols).unwrap();
        assert_eq!((sample.function.as_str(), sample.in_kernel), ("__schedule", true));
        assert_eq!(line("# Samples: 5K of event 'cpu-clock'", &symbols), None);
        assert_eq!(symbols.find("0x31ff"), None);
    }
}
