//! NBD clients that are slow, greedy, wrong or gone: each is bounded, and the others are
//! served.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Signal, getrlimit, setrlimit};
use upcall_tests::nbd::{RawNbd, nbdsh, succeed};
use upcall_tests::{Rng, Scratch, Server, rust_filter, upcall_program};

const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const PAYLOAD_LEN: u16 = 1 << 5;

const EINVAL: u32 = 22;
const ESHUTDOWN: u32 = 108;

struct Served {
    scratch: Scratch,
    socket: PathBuf,
    server: Server,
}

fn serve(words: &str, filters: &[&str]) -> Served {
    let scratch = Scratch::new();
    let socket = scratch.join("n.sock");
    let disk = format!("name=root,{words},nbd=unix:{}", socket.display());
    let server = Server::serve(&scratch, &[&disk], filters);
    Served { scratch, socket, server }
}

impl Served {
    fn uri(&self) -> String {
        format!("nbd+unix:///root?socket={}", self.socket.display())
    }

    /// Memory of the worker in KiB, with what it shares.
    fn memory_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.server.pid().as_raw_pid());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// A client that behaves is served, and soon.
    #[track_caller]
    fn expect_service(&self) {
        let start = Instant::now();
        nbdsh(
            &self.uri(),
            "
h.connect_uri(uri)
for i in range(50):
    h.pwrite(bytearray([i + 1]) * 4096, i * 4096)
    assert h.pread(4096, i * 4096) == bytearray([i + 1]) * 4096
h.shutdown()
",
        );
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

#[test]
fn crowds_of_idle_clients_and_half_messages_cost_little_and_disturb_nobody() {
    let served = serve("memory=64M", &[]);
    served.expect_service();
    let before = served.memory_kib();
    let idle: Vec<RawNbd> =
        (0..180).map(|_| RawNbd::ready(&served.socket, "root", &[STRUCTURED_REPLY])).collect();
    let mut half: Vec<RawNbd> = (0..20).map(|_| RawNbd::unix(&served.socket)).collect();
    for (number, client) in half.iter_mut().enumerate() {
        client.begin();
        client.write(&b"IHAVEOPT\0\0\0\x07\0\0\x10\0 and so on"[..number + 1]);
    }
    let mut amid = RawNbd::ready(&served.socket, "root", &[]);
    amid.command(0, WRITE, 1, 0, 1 << 20);
    amid.write(&[1; 100_000]);
    served.expect_service();
    let grown = served.memory_kib() - before;
    assert!(grown < 16 << 10, "{grown} KiB more");
    drop((idle, half, amid));
    served.expect_service();
    served.server.stop();
}

/// Where a thousand wait, one who works is served as if alone: no thread more, a descriptor for
/// each, and little memory.
#[test]
fn a_thousand_idle_clients_cost_a_descriptor_and_little_memory_each() {
    const IDLE: usize = 1000;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|maximum| maximum < 4096) {
        eprintln!("skipped: this takes 4096 descriptors, see ulimit -Hn");
        return;
    }
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    // The usual soft limit, and less: it raises that itself.
    let scratch = Scratch::new();
    let socket = scratch.join("n.sock");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -Sn 256; exec \"$@\"", "sh"]).arg(upcall_program());
    command.args(["serve", "--disk"]);
    let nbd = format!("nbd=unix:{},nbd-connections=1016", socket.display());
    command.arg(format!("name=root,memory=64M,{nbd}"));
    let server = Server::spawn(&scratch, command);
    let served = Served { scratch, socket, server };
    let pid = served.server.pid().as_raw_pid();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    served.expect_service();
    let before = (count("task"), count("fd"), served.memory_kib());
    let idle: Vec<RawNbd> = (0..IDLE).map(|_| RawNbd::ready(&served.socket, "root", &[])).collect();
    for _ in 0..3 {
        served.expect_service();
    }
    assert_eq!(count("task"), before.0, "threads");
    // The one that just left may still be there.
    assert!(count("fd") <= before.1 + IDLE + 4, "{} descriptors, {} before", count("fd"), before.1);
    let grown = served.memory_kib() - before.2;
    assert!(grown < 16 << 10, "{grown} KiB more");
    // Each of them is served, too, once it asks.
    for mut client in idle {
        client.command(0, WRITE_ZEROES, 7, 0, 4096);
        assert_eq!(client.simple(), (0, 7));
    }
    served.expect_service();
    served.server.stop();
}

#[test]
fn who_is_too_slow_in_the_handshake_is_disconnected() {
    let served = serve("memory=1M", &[]);
    let start = Instant::now();
    let mut silent = RawNbd::unix(&served.socket);
    let mut slow = RawNbd::unix(&served.socket);
    slow.begin();
    let dripping = std::thread::spawn(move || {
        for byte in b"IHAVEOPT\0\0\0\x07\0\0\x10\0".iter().cycle() {
            if slow.try_write(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    silent.read_to_end();
    dripping.join().unwrap();
    let took = start.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(15)).contains(&took), "{took:?}");
    served.expect_service();
    served.server.stop();
}

#[test]
fn who_does_not_read_holds_its_own_memory_and_nobody_elses() {
    let served = serve("memory=64M", &[]);
    served.expect_service();
    let before = served.memory_kib();
    let mut greedy: Vec<RawNbd> =
        (0..4).map(|_| RawNbd::ready(&served.socket, "root", &[])).collect();
    for client in &mut greedy {
        client.read_often(100, 4 << 20);
    }
    served.expect_service();
    let grown = served.memory_kib() - before;
    // The disk itself is memory, and is read: 64 MiB at the most are its own.
    assert!(grown < (64 + 4 * 10) << 10, "{grown} KiB more");
    // Nothing was lost: whoever reads at last gets it all.
    let client = &mut greedy[0];
    for _ in 0..100 {
        assert_eq!(client.simple().0, 0);
        client.read(4 << 20);
    }
    drop(greedy);
    served.expect_service();
    served.server.stop();
}

#[test]
fn floods_giants_and_garbage_end_their_own_connection_only() {
    let served = serve("memory=64M", &[]);
    let (mut rng, before) = (Rng::new(11), served.memory_kib());
    // Options without end.
    let mut client = RawNbd::unix(&served.socket);
    client.begin();
    let flood = b"IHAVEOPT\0\0\0\x03\0\0\0\0".repeat(100_000);
    let _ = client.try_write(&flood);
    drop(client);
    // Options, payloads and commands that are too long.
    let mut client = RawNbd::unix(&served.socket);
    client.begin();
    client.write(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff");
    assert_eq!(client.read_to_end(), b"");
    let mut client = RawNbd::ready(&served.socket, "root", &[]);
    client.command(0, WRITE, 1, 0, !511);
    assert_eq!(client.read_to_end(), b"");
    let mut client = RawNbd::ready(&served.socket, "root", &[]);
    client.command(0, WRITE, 1, 0, 16 << 20);
    for _ in 0..16 {
        client.write(&[0; 1 << 20]);
    }
    assert_eq!(client.simple(), (EINVAL, 1), "after its payload");
    client.command(0, READ, 2, 0, u32::MAX);
    assert_eq!(client.simple(), (EINVAL, 2));
    client.command(0, READ, 3, u64::MAX, 512);
    assert_eq!(client.simple(), (EINVAL, 3));
    client.command(0xffff, 0xffff, 4, u64::MAX, u32::MAX);
    assert_eq!(client.simple(), (EINVAL, 4));
    client.command(0, READ, 5, 0, 512);
    assert_eq!(client.simple(), (0, 5));
    client.read(512);
    client.write(b"this is no command at all, but is long enough");
    assert_eq!(client.read_to_end(), b"");
    // Anything.
    for _ in 0..200 {
        let bytes: Vec<u8> = (0..rng.below(300)).map(|_| rng.next() as u8).collect();
        let mut client = match rng.below(2) {
            0 => RawNbd::unix(&served.socket),
            _ => RawNbd::ready(&served.socket, "root", &[STRUCTURED_REPLY]),
        };
        client.write(&bytes);
    }
    served.expect_service();
    let grown = served.memory_kib().saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB more");
    served.server.stop();
}

#[test]
fn there_are_only_so_many_connections_and_one_that_ends_makes_room() {
    let served = serve("memory=1M,nbd-connections=3", &[]);
    let mut clients: Vec<RawNbd> =
        (0..3).map(|_| RawNbd::ready(&served.socket, "root", &[])).collect();
    assert_eq!(RawNbd::unix(&served.socket).read_to_end(), b"", "one too many");
    let mut last = clients.pop().unwrap();
    last.command(0, DISC, 0, 0, 0);
    assert_eq!(last.read_to_end(), b"");
    served.expect_service();
    drop(clients);
    served.server.stop();
}

#[test]
fn clients_that_come_and_go_with_work_in_flight_leave_nothing() {
    let fault = rust_filter("fault");
    let slow = format!("disk=root,file={},param.effect=delay,param.delay=30ms", fault.display());
    let served = serve("memory=64M,nbd-connections=8", &[&slow]);
    let before = served.memory_kib();
    for round in 0..100u64 {
        let mut client = loop {
            // All places may be taken by those whose work is not done yet.
            let mut client = RawNbd::unix(&served.socket);
            if client.try_read(18).is_ok() {
                client.write(&3u32.to_be_bytes());
                break client;
            }
        };
        client.go("root");
        for cookie in 0..32 {
            client.command(0, READ, cookie, 0, 65536);
        }
        if round % 2 == 0 {
            client.command(0, WRITE, 99, 0, 65536);
        }
    }
    served.expect_service_slowly();
    let grown = served.memory_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more");
    served.server.stop();
}

impl Served {
    fn expect_service_slowly(&self) {
        nbdsh(
            &self.uri(),
            "
import time
for attempt in range(100):
    try:
        h.connect_uri(uri)
        break
    except nbd.Error:
        time.sleep(0.05)
        h = nbd.NBD()
h.pwrite(bytearray([7]) * 4096, 0)
assert h.pread(4096, 0) == bytearray([7]) * 4096
",
        );
    }
}

#[test]
fn extended_headers_carry_long_commands_and_long_answers() {
    // Larger than 32 bits can say.
    let served = serve("null=16G", &[]);
    let mut client = RawNbd::unix(&served.socket);
    client.begin();
    client.option(EXTENDED_HEADERS, &[]);
    assert_eq!(client.reply().0, 1);
    let query = b"\0\0\0\x04root\0\0\0\x01\0\0\0\x0fbase:allocation";
    client.option(SET_META_CONTEXT, query);
    assert_eq!(client.reply(), (4, b"\0\0\0\x01base:allocation".to_vec()));
    assert_eq!(client.reply().0, 1);
    client.go("root");
    let whole = 16u64 << 30;
    for (cookie, kind) in [(1, TRIM), (2, WRITE_ZEROES)] {
        client.extended(0, kind, cookie, 0, whole);
        let chunk = client.chunk();
        assert_eq!((chunk.flags, chunk.kind, chunk.cookie, chunk.offset), (1, 0, cookie, 0));
    }
    client.extended(0, BLOCK_STATUS, 3, 512, whole - 512);
    let chunk = client.chunk();
    assert_eq!((chunk.flags, chunk.kind, chunk.cookie, chunk.offset), (1, 6, 3, 512));
    let mut expected = b"\0\0\0\x01\0\0\0\x01".to_vec();
    expected.extend((whole - 512).to_be_bytes());
    expected.extend(3u64.to_be_bytes());
    assert_eq!(chunk.payload, expected);
    client.extended(PAYLOAD_LEN, WRITE, 4, 4096, 512);
    client.write(&[1; 512]);
    assert_eq!(client.chunk().kind, 0);
    client.extended(0, READ, 5, 4096, 512);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.payload.len()), (1, 8 + 512));
    assert_eq!(chunk.payload[..8], 4096u64.to_be_bytes());
    // A payload where there is none: refused after it.
    client.extended(PAYLOAD_LEN, READ, 6, 0, 512);
    client.write(&[1; 512]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.cookie), (0x8001, 6));
    assert_eq!(chunk.payload[..4], EINVAL.to_be_bytes());
    client.extended(0, READ, 7, whole, 512);
    assert_eq!(client.chunk().payload[..4], EINVAL.to_be_bytes());
    client.extended(0, DISC, 8, 0, 0);
    assert_eq!(client.read_to_end(), b"");
    served.server.stop();
}

#[test]
fn an_end_answers_what_was_asked_and_then_disconnects_who_holds_on() {
    let fault = rust_filter("fault");
    let slow = format!("disk=root,file={},param.effect=delay,param.delay=700ms", fault.display());
    let served = serve("memory=1M", &[&slow]);
    let mut working = RawNbd::ready(&served.socket, "root", &[]);
    let mut idle = RawNbd::ready(&served.socket, "root", &[]);
    let mut in_handshake = RawNbd::unix(&served.socket);
    in_handshake.begin();
    working.command(0, READ, 1, 0, 512);
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    served.server.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(200));
    working.command(0, READ, 2, 0, 512);
    assert_eq!(working.simple(), (ESHUTDOWN, 2), "it begins nothing more");
    assert_eq!(working.simple(), (0, 1), "what was asked before is done");
    working.read(512);
    assert_eq!(working.read_to_end(), b"");
    assert_eq!(idle.read_to_end(), b"");
    in_handshake.read_to_end();
    // They hold their sockets all the while.
    served.server.wait().expect_success();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(!served.socket.exists(), "the socket is left behind");
    drop((working, idle, in_handshake, served.scratch));
}

#[test]
fn an_end_does_not_wait_for_who_never_reads() {
    let served = serve("memory=64M", &[]);
    let mut greedy = RawNbd::ready(&served.socket, "root", &[]);
    greedy.read_often(200, 4 << 20);
    let start = Instant::now();
    served.server.stop();
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    drop(greedy);
}

#[test]
fn qemu_img_works_beside_all_of_that() {
    let served = serve("memory=64M", &[]);
    let mut rude = RawNbd::ready(&served.socket, "root", &[]);
    rude.command(0, WRITE, 1, 0, 4 << 20);
    succeed("qemu-img", &["bench", "-c", "500", "-f", "raw", &served.uri()]);
    drop(rude);
    served.server.stop();
}
