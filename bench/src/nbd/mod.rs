//! NBD: ours beside nbdkit and qemu-nbd, with and without a filter, and our own vhost-user
//! disk with one filter beside them all.

pub mod client;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use upcall_tests::{Scratch, Server};

use crate::filters::{Filters, Kind, programs};
use crate::measure::{Effort, Round, Section};
use crate::path::client::Client as VhostClient;
use crate::path::client::{self as vhost, Wait};
use crate::path::servers::{self, CAPACITY, Disk, HOSTS, SERVER};
use crate::process::{self, wait_for_file};
use client::{Client, Load};

/// The side that others are compared to.
pub const PEER: &str = "nbdkit, 1 filter";
/// Ours, over vhost-user.
pub const VHOST: &str = "upcall over vhost-user, 1 filter";

const EXPORT: &str = "disk";
const PATIENCE: Duration = Duration::from_secs(20);

/// A case's name.
pub fn case(reads: bool, depth: usize) -> String {
    format!("null, {} 4k, {depth} in flight", if reads { "read" } else { "write" })
}

/// Who serves: a process to be ended, and a client of it.
struct Side {
    name: &'static str,
    _program: Program,
    watched: Vec<(String, u32)>,
    client: Driver,
}

enum Program {
    Upcall { _server: Server },
    Vhost { _serving: servers::Serving },
    Peer(Child),
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Program::Peer(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

enum Driver {
    Nbd(Client),
    Vhost(VhostClient),
}

impl Driver {
    fn run(&mut self, load: Load) -> Result<Round, String> {
        match self {
            Driver::Nbd(client) => client.run(load).map_err(|error| error.to_string()),
            Driver::Vhost(client) => {
                let load = vhost::Load {
                    depth: load.depth,
                    length: load.length,
                    reads: if load.reads { 100 } else { 0 },
                    wait: Wait::Sleep,
                    slice: load.slice,
                    queues: 1,
                };
                client.run(load, PATIENCE)
            }
        }
    }
}

/// Runs all sides in turn, round by round.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "nbd",
        &[
            "One client with one connection on a Unix socket, that sleeps until a reply is there; over vhost-user it sleeps until it is called. Null disks: nbdkit's plugin null, qemu-nbd's null-co with read-zeroes=on. nbdkit's filter is nofilter, which does nothing; ours does nothing either, in a process of its own.",
        ],
    );
    section.reference = Some(PEER.into());
    let scratch = Scratch::new();
    let filters = Filters::new(programs().join("bench-filters"))?;
    let mut sides = Vec::new();
    let starts: [(&'static str, Start); 7] = [
        (PEER, |place| nbdkit(place, &["--filter=nofilter"])),
        ("nbdkit", |place| nbdkit(place, &[])),
        ("qemu-nbd", qemu_nbd),
        ("upcall", |place| ours(place, 0)),
        ("upcall, 1 filter", |place| ours(place, 1)),
        ("upcall, 4 filters", |place| ours(place, 4)),
        (VHOST, over_vhost),
    ];
    for (number, (name, start)) in starts.into_iter().enumerate() {
        match start(&Place { scratch: &scratch, filters: &filters, number }) {
            Ok((program, watched, client)) => {
                sides.push(Side { name, _program: program, watched, client });
            }
            Err(error) => section.about.push(format!("{name}: not measured: {error}")),
        }
    }
    for round in 0..effort.rounds {
        for (reads, depth) in [(true, 1), (true, 32), (false, 32)] {
            let count = sides.len();
            for turn in 0..count {
                let side = &mut sides[(turn + round) % count];
                let load = Load { depth, length: 4096, reads, slice: effort.slice };
                let failed = |error| format!("{}: {error}", side.name);
                side.client.run(Load { slice: load.slice / 10, ..load }).map_err(failed)?;
                let client = &mut side.client;
                let (result, used) = process::while_watching(&side.watched, || client.run(load));
                let mut result = result.map_err(failed)?;
                if result.errors > 0 {
                    return Err(failed(format!("{} requests failed", result.errors)));
                }
                result.used.extend(used);
                let how = format!("client sleeps; {} processes", side.watched.len() + 1);
                section.row(&case(reads, depth), side.name, &how).push_round(&result);
            }
        }
    }
    Ok(section)
}

struct Place<'a> {
    scratch: &'a Scratch,
    filters: &'a Filters,
    number: usize,
}

impl Place<'_> {
    fn socket(&self) -> PathBuf {
        self.scratch.join(&format!("nbd{}.sock", self.number))
    }

    fn chain(&self, count: usize) -> Result<Vec<PathBuf>, String> {
        (0..count).map(|number| self.filters.build(Kind::PLAIN, number)).collect()
    }
}

type Started = (Program, Vec<(String, u32)>, Driver);
type Start = fn(&Place<'_>) -> Result<Started, String>;

fn connect(place: &Place<'_>) -> Result<Driver, String> {
    wait_for_file(&place.socket(), PATIENCE)?;
    let client = Client::connect(&place.socket(), EXPORT);
    client.map(Driver::Nbd).map_err(|error| format!("cannot connect: {error}"))
}

fn peer(place: &Place<'_>, mut command: Command) -> Result<Started, String> {
    let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = child.map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    let watched = vec![(SERVER.to_owned(), child.id())];
    let program = Program::Peer(child);
    Ok((program, watched, connect(place)?))
}

fn nbdkit(place: &Place<'_>, filters: &[&str]) -> Result<Started, String> {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exportname", EXPORT]).arg("--unix").arg(place.socket());
    command.args(filters).arg("null").arg(format!("size={CAPACITY}"));
    peer(place, command)
}

fn qemu_nbd(place: &Place<'_>) -> Result<Started, String> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--export-name", EXPORT, "--socket"]).arg(place.socket());
    command.arg("--image-opts").arg(format!("driver=null-co,size={CAPACITY},read-zeroes=on"));
    peer(place, command)
}

fn ours(place: &Place<'_>, filters: usize) -> Result<Started, String> {
    let help = Command::new(programs().join("upcall")).args(["serve", "--help"]).output();
    let help = help.map_err(|error| format!("no upcall program: {error}"))?;
    if !String::from_utf8_lossy(&help.stdout).contains("nbd=") {
        return Err("this upcall serve knows no nbd=".into());
    }
    let mut command = Command::new(programs().join("upcall"));
    command.args(["serve", "--log-level=warn", "--disk"]);
    let socket = place.socket();
    command.arg(format!("name={EXPORT},null={CAPACITY},nbd=unix:{},queues=1", socket.display()));
    for filter in place.chain(filters)? {
        command.arg("--filter").arg(format!("disk={EXPORT},file={}", filter.display()));
    }
    let server = Server::spawn(place.scratch, command);
    let pid = server.pid().as_raw_pid() as u32;
    let hosts = process::children(pid).into_iter().map(|pid| (HOSTS.to_owned(), pid));
    let watched = std::iter::once((SERVER.to_owned(), pid)).chain(hosts).collect();
    Ok((Program::Upcall { _server: server }, watched, connect(place)?))
}

fn over_vhost(place: &Place<'_>) -> Result<Started, String> {
    let serving = servers::upcall(place.scratch, "vhost", Disk::Null, 1, &place.chain(1)?)?;
    let client = VhostClient::connect(&serving.socket, 1, CAPACITY)
        .map_err(|error| format!("cannot connect: {error}"))?;
    let watched = serving.watched.clone();
    Ok((Program::Vhost { _serving: serving }, watched, Driver::Vhost(client)))
}
