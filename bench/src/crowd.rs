//! An NBD client beside a crowd: a thousand connections that do nothing, and some whose
//! messages come byte by byte. What the crowd costs the one who works.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Resource;
use upcall_tests::nbd::RawNbd;
use upcall_tests::{Scratch, Server};

use crate::filters::programs;
use crate::measure::{Effort, Section};
use crate::nbd::client::{Client, Load};
use crate::path::servers::{CAPACITY, SERVER};
use crate::process;

/// The sides.
pub const ALONE: &str = "alone";
/// See [`ALONE`].
pub const IDLE: &str = "beside 1000 idle connections";
/// See [`ALONE`].
pub const SLOW: &str = "beside 32 clients that send a byte at a time";
/// See [`ALONE`].
pub const BOTH: &str = "beside both";

const EXPORT: &str = "disk";
const CONNECTIONS: usize = 1000;
const SLOW_CLIENTS: usize = 32;
/// Between two bytes of each slow client.
const PAUSE: Duration = Duration::from_millis(5);
const WRITE: u16 = 1;
/// Descriptors of ours and, as it is inherited, of the server's.
const DESCRIPTORS: u64 = 4096;

/// A case's name.
pub fn case(depth: usize) -> String {
    format!("null, read 4k, {depth} in flight")
}

/// A server of its own for each side, so that they can take turns.
struct Side {
    name: &'static str,
    idle: Vec<RawNbd>,
    slow: Vec<RawNbd>,
    client: Client,
    server: Server,
    _scratch: Scratch,
}

impl Side {
    fn start(name: &'static str, idle: usize, slow: usize) -> Result<Side, String> {
        let scratch = Scratch::new();
        let socket = scratch.join("nbd.sock");
        let connections = CONNECTIONS + SLOW_CLIENTS + 8;
        let disk = format!(
            "name={EXPORT},null={CAPACITY},nbd=unix:{},queues=1,nbd-connections={connections}",
            socket.display()
        );
        let mut command = std::process::Command::new(programs().join("upcall"));
        command.args(["serve", "--log-level=warn", "--disk", &disk]);
        let server = Server::spawn(&scratch, command);
        let idle = (0..idle).map(|_| ready(&socket)).collect();
        let slow = (0..slow).map(|number| slow_client(&socket, number)).collect();
        let client = Client::connect(&socket, EXPORT).map_err(|error| error.to_string())?;
        Ok(Side { name, idle, slow, client, server, _scratch: scratch })
    }
}

/// A client that has said which export it wants, and says no more.
fn ready(socket: &Path) -> RawNbd {
    RawNbd::ready(socket, EXPORT, &[])
}

/// One that is in the midst of a message: half of them of the handshake, half of a write.
fn slow_client(socket: &Path, number: usize) -> RawNbd {
    if number.is_multiple_of(2) {
        let mut client = RawNbd::unix(socket);
        client.begin();
        // An option whose data is to come.
        client.write(b"IHAVEOPT\0\0\0\x07\0\0\x10\0");
        client
    } else {
        let mut client = ready(socket);
        client.command(0, WRITE, 1, 0, 1 << 20);
        client
    }
}

/// Runs the sides in turn, round by round.
pub fn run(effort: &Effort) -> Result<Section, String> {
    let mut section = Section::new(
        "crowd",
        &[
            "One NBD client that works, on a null disk with one queue, and so one thread that serves all clients. Idle connections have been through the handshake. Slow clients are in the midst of an option or of a write and send a byte each 5 ms; the server ends those of the handshake after 10 s.",
        ],
    );
    section.reference = Some(ALONE.into());
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|maximum| maximum < DESCRIPTORS) {
        return Err(format!("it takes {DESCRIPTORS} descriptors; see ulimit -Hn"));
    }
    let most = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(Resource::Nofile, most).map_err(|error| error.to_string())?;
    let mut sides = Vec::new();
    for (name, idle, slow) in [
        (ALONE, 0, 0),
        (IDLE, CONNECTIONS, 0),
        (SLOW, 0, SLOW_CLIENTS),
        (BOTH, CONNECTIONS, SLOW_CLIENTS),
    ] {
        sides.push(Side::start(name, idle, slow)?);
    }
    for round in 0..effort.rounds {
        for depth in [1, 32] {
            let count = sides.len();
            for turn in 0..count {
                let side = &mut sides[(turn + round) % count];
                let load = Load { depth, length: 4096, reads: true, slice: effort.slice };
                measure(&mut section, side, load)?;
            }
        }
    }
    Ok(section)
}

fn measure(section: &mut Section, side: &mut Side, load: Load) -> Result<(), String> {
    let name = side.name;
    let failed = |error: std::io::Error| format!("{name}: {error}");
    let Side { client, slow, server, idle, .. } = side;
    let watched = [(SERVER.to_owned(), server.pid().as_raw_pid() as u32)];
    let is_over = AtomicBool::new(false);
    let (result, used) = std::thread::scope(|scope| {
        // Bytes of slow clients; one that the server has ended by now sends no more.
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                slow.iter_mut().for_each(|client| drop(client.try_write(&[0])));
                std::thread::sleep(PAUSE);
            }
        });
        let result = client.run(Load { slice: load.slice / 10, ..load });
        let result = result.map(|_| process::while_watching(&watched, || client.run(load)));
        is_over.store(true, Ordering::Relaxed);
        result
    })
    .map_err(failed)?;
    let mut result = result.map_err(failed)?;
    result.used.extend(used);
    let how = format!("{} idle and {} slow connections", idle.len(), slow.len());
    section.row(&case(load.depth), name, &how).push_round(&result);
    Ok(())
}
