//! A disk that another NBD server has (nbdkit, which no one here wrote), served to our clients:
//! what fails or is slow there, and nothing else, fails or is slow here.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use upcall_tests::nbd::{nbdsh, succeed};
use upcall_tests::{Client, Driver, Filter, Io, Mix, Outcome, Scratch, Server, Workload, upcall};

const BYTES: u64 = 32 << 20;

/// A running nbdkit. Ended when dropped.
struct Nbdkit(Child);

impl Nbdkit {
    /// On the socket `behind.sock`, with these filters, plugin and parameters.
    fn start(scratch: &Scratch, args: &[&str]) -> Nbdkit {
        let socket = scratch.text("behind.sock");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new("nbdkit")
            .args(["--foreground", "--exit-with-parent", "--unix", &socket])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("nbdkit: {error} (scripts/deps installs it)"));
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                let mut said = String::new();
                let _ = child.kill();
                child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
                panic!("nbdkit does not serve: {said}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Nbdkit(child)
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A disk whose every write and flush is a line in `log`, and whose flush is this script.
fn scripted(scratch: &Scratch, flush: &str) -> Nbdkit {
    let (image, log) = (scratch.image("image", BYTES), scratch.text("log"));
    std::fs::write(&log, "").unwrap();
    let dd = "count=$3 conv=notrunc status=none iflag=count_bytes,fullblock";
    let image = text(&image);
    Nbdkit::start(
        scratch,
        &[
            "eval",
            "get_size=echo 32M",
            "can_write=exit 0",
            "can_flush=exit 0",
            &format!("pread=dd if={image} skip=$4 {dd},skip_bytes"),
            &format!("pwrite=echo write >>{log}; dd of={image} seek=$4 oflag=seek_bytes {dd}"),
            &format!("flush=echo flush >>{log}; {flush}"),
        ],
    )
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn words(scratch: &Scratch) -> String {
    format!("name=root,remote=unix:{}", scratch.text("behind.sock"))
}

/// Serves what nbdkit has to NBD clients; gives the URI.
fn serve(scratch: &Scratch, filters: &[String]) -> (Server, String) {
    let disk = format!("{},nbd=unix:{}", words(scratch), scratch.text("nbd.sock"));
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let server = Server::serve(scratch, &[&disk], &filters);
    (server, format!("nbd+unix:///root?socket={}", scratch.text("nbd.sock")))
}

#[test]
fn a_disk_of_another_server_is_served_as_one_of_ours() {
    for filters in [vec![], vec![Filter::Trace, Filter::Throttle]] {
        let scratch = Scratch::new();
        let image = scratch.image("image", BYTES);
        let file = format!("file={}", text(&image));
        let nbdkit = Nbdkit::start(&scratch, &["file", &file]);
        let names: Vec<String> =
            filters.iter().map(|filter| filter.argument("root", &scratch)).collect();
        let disk = format!("{},socket={},queues=2", words(&scratch), scratch.text("d.sock"));
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let server = Server::serve(&scratch, &[&disk], &names);
        assert!(server.stdout().contains("raw image nbd+unix:///?socket="), "{}", server.stdout());
        let mut driver = Driver::usual(&scratch.join("d.sock"), 2);
        assert_eq!(driver.capacity(), BYTES);
        let mut workload = Workload::on(31, &mut driver);
        let mix = Mix { discards: 0, ..Mix::default() };
        workload.run(&mut driver, &mix, 200);
        // The next daemon gets a connection of its own.
        let is_daemon = |pid: &i32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("qemu-storage"))
        };
        let daemon = server.children().into_iter().find(is_daemon).expect("a daemon");
        kill_process(Pid::from_raw(daemon).unwrap(), Signal::KILL).unwrap();
        workload.run(&mut driver, &mix, 200);
        workload.read_back(&mut driver);
        drop(driver);
        server.stop();
        drop(nbdkit);
        workload.check_image(&image);
    }
}

#[test]
fn holes_of_a_disk_behind_are_holes() {
    let scratch = Scratch::new();
    let _nbdkit = Nbdkit::start(&scratch, &["data", "size=32M", "data=@0x400000 1*65536"]);
    let (server, uri) = serve(&scratch, &[]);
    let map: Value = serde_json::from_str(&succeed("nbdinfo", &["--map", "--json", &uri])).unwrap();
    let kinds: Vec<_> = map.as_array().unwrap().iter().map(|part| &part["type"]).collect();
    assert_eq!(kinds, [3, 0, 3], "{map}");
    server.stop();
}

/// Where it cannot be said what is a hole, everything is data: a client that copies it all is right.
#[test]
fn a_disk_behind_that_fails_to_tell_its_holes_is_all_data() {
    let scratch = Scratch::new();
    let trigger = scratch.text("fail-extents");
    let nbdkit = ["--filter=error", "data", "size=32M", "data=@0x400000 1*65536"];
    let file = format!("error-extents-file={trigger}");
    let fails = ["error-extents=EIO", "error-extents-rate=100%", &file];
    let _nbdkit = Nbdkit::start(&scratch, &[&nbdkit[..], &fails].concat());
    let (server, uri) = serve(&scratch, &[]);
    let kinds = || -> Vec<u64> {
        let map = succeed("nbdinfo", &["--map", "--json", &uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        map.as_array().unwrap().iter().map(|part| part["type"].as_u64().unwrap()).collect()
    };
    assert_eq!(kinds(), [3, 0, 3]);
    std::fs::write(&trigger, "").unwrap();
    assert_eq!(kinds(), [0]);
    let copy = scratch.text("copy");
    succeed("nbdcopy", &[&uri, &copy]);
    let copy = std::fs::read(&copy).unwrap();
    let is_data = |at: usize| (0x40_0000..0x40_0000 + 65536).contains(&at);
    assert!(copy.iter().enumerate().all(|(at, byte)| *byte == u8::from(is_data(at))));
    std::fs::remove_file(&trigger).unwrap();
    assert_eq!(kinds(), [3, 0, 3]);
    server.stop();
}

/// Each of nbdkit's errors can be turned on by itself. What is not turned on goes well.
#[test]
fn what_fails_behind_fails_for_the_client_that_asked_and_for_nothing_else() {
    let scratch = Scratch::new();
    let kinds = ["pread", "pwrite", "zero"];
    let parameters: Vec<String> = kinds
        .iter()
        .flat_map(|kind| {
            let trigger = scratch.text(&format!("fail-{kind}"));
            [format!("error-{kind}=ENOSPC"), format!("error-{kind}-rate=100%")]
                .into_iter()
                .chain([format!("error-{kind}-file={trigger}")])
        })
        .collect();
    let mut args = vec!["--filter=error", "memory", "32M"];
    args.extend(parameters.iter().map(String::as_str));
    let _nbdkit = Nbdkit::start(&scratch, &args);
    let (server, uri) = serve(&scratch, &[]);
    let folder = scratch.path().display();
    // The device between us has but one word for an error: EIO.
    nbdsh(
        &uri,
        &format!(
            "
import os
h.connect_uri(uri)
other = nbd.NBD()
other.connect_uri(uri)
calls = dict(
    pread=lambda h: h.pread(4096, 0),
    pwrite=lambda h: h.pwrite(bytearray(b'x' * 4096), 0),
    zero=lambda h: h.zero(4096, 65536),
    flush=lambda h: h.flush(),
)
def durable(h):
    h.pwrite(bytearray(b'y' * 4096), 8192, nbd.CMD_FLAG_FUA)
for kind in ['pread', 'pwrite', 'zero']:
    trigger = '{folder}/fail-' + kind
    for call in calls.values():
        call(h)
    open(trigger, 'w').close()
    for round in range(3):
        for client in [h, other]:
            for name, call in calls.items():
                if name == kind:
                    fails(errno.EIO, call, client)
                else:
                    call(client)
            if kind == 'pwrite':
                fails(errno.EIO, durable, client)
            else:
                durable(client)
    # Many at once, half of which fail.
    ended = []
    def note(error):
        ended.append(error)
        return 1
    for n in range(32):
        if n % 2:
            h.aio_pread(nbd.Buffer(4096), n * 4096, completion=lambda error: note(('pread', error.value)))
        else:
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), (64 + n) * 4096,
                         completion=lambda error: note(('pwrite', error.value)))
    while len(ended) < 32:
        h.poll(-1)
    for name, error in ended:
        assert error == (errno.EIO if name == kind else 0), (kind, name, error)
    os.unlink(trigger)
    for call in calls.values():
        call(h)
"
        ),
    );
    server.stop();
}

/// Requests that take long keep no other disk waiting, behind the same address and threads.
/// (Among those of one disk QEMU's NBD client may let a fast one wait for a slow one.)
#[test]
fn what_is_slow_behind_is_slow_for_its_own_disk_only() {
    let scratch = Scratch::new();
    let delays = ["--filter=delay", "memory", "32M", "rdelay=100ms", "wdelay=700ms"];
    let _nbdkit = Nbdkit::start(&scratch, &delays);
    let address = format!("nbd=unix:{}", scratch.text("nbd.sock"));
    let slow = format!("{},{address}", words(&scratch));
    let quick = format!("name=quick,memory=32M,{address}");
    let server = Server::serve(&scratch, &[&slow, &quick], &[]);
    let uri = format!("nbd+unix:///root?socket={}", scratch.text("nbd.sock"));
    nbdsh(
        &uri,
        "
h.connect_uri(uri)
other = nbd.NBD()
other.connect_uri(uri.replace('root', 'quick'))
ended = []
def note(error):
    ended.append(error.value)
    return 1
for n in range(8):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n + 1]) * 4096), n * 4096, completion=note)
reads = 0
while len(ended) < 8:
    h.poll(0)
    other.pwrite(bytearray([reads % 256]) * 4096, 1 << 20)
    assert other.pread(4096, 1 << 20) == bytearray([reads % 256]) * 4096
    reads += 1
# Did they wait for what is slow, there would not be more than eight.
assert reads > 20, reads
assert ended == [0] * 8, ended
h.flush()
for n in range(8):
    assert h.pread(4096, n * 4096) == bytearray([n + 1]) * 4096
",
    );
    server.stop();
}

/// What a client was told is durable is so behind us: a flush came after it, whoever asked.
#[test]
fn a_flush_and_a_durable_write_are_a_flush_behind_us_and_a_plain_write_is_none() {
    for (options, plain) in [("", false), (",write-cache=off", true)] {
        let scratch = Scratch::new();
        let _nbdkit = scripted(&scratch, "true");
        let disk = format!("{},nbd=unix:{}{options}", words(&scratch), scratch.text("nbd.sock"));
        let server = Server::serve(&scratch, &[&disk], &[]);
        let uri = format!("nbd+unix:///root?socket={}", scratch.text("nbd.sock"));
        let log = scratch.text("log");
        nbdsh(
            &uri,
            &format!(
                "
def seen():
    return open('{log}').read().split()
h.connect_uri(uri)
other = nbd.NBD()
other.connect_uri(uri)
assert h.can_multi_conn()
def does(call, flushed, written=True):
    before = len(seen())
    call()
    new = seen()[before:]
    assert ('write' in new) == written, new
    assert ('flush' in new) == flushed, new
    assert not flushed or new[-1] == 'flush', new
plain, durable = bytearray(b'p' * 4096), bytearray(b'd' * 4096)
for round in range(3):
    does(lambda: h.pwrite(plain, 0), {plain})
    does(lambda: h.pwrite(durable, 8192, nbd.CMD_FLAG_FUA), True)
    does(lambda: h.zero(4096, 65536), {plain})
    does(lambda: h.zero(4096, 65536, nbd.CMD_FLAG_FUA), True)
    # What one connection wrote, another makes durable.
    does(lambda: h.pwrite(plain, 4096), {plain})
    does(lambda: other.flush(), True, written=False)
",
                plain = if plain { "True" } else { "False" }
            ),
        );
        server.stop();
    }
}

/// A flush that failed stays failed, whatever the server behind says later, and whoever serves.
#[test]
fn a_flush_that_fails_behind_stays_failed_although_the_worker_dies() {
    let scratch = Scratch::new();
    let trigger = scratch.text("fail-flush");
    let flush = format!("if [ -e {trigger} ]; then echo EIO >&2; exit 1; fi");
    let _nbdkit = scripted(&scratch, &flush);
    let socket = scratch.text("d.sock");
    let disk = format!("{},socket={socket}", words(&scratch));
    let server = Server::start(&scratch, &["--restart", "--disk", &disk]);
    let mut driver = Driver::usual(socket.as_ref(), 1);
    driver.write(0, 0, &[9; 4096]);
    assert_eq!(driver.run(0, Io::Flush), Outcome::Ok);
    driver.write(0, 0, &[8; 4096]);
    std::fs::write(&trigger, "").unwrap();
    assert_eq!(driver.run(0, Io::Flush), Outcome::IoError);
    std::fs::remove_file(&trigger).unwrap();
    assert_eq!(driver.run(0, Io::Flush), Outcome::IoError);
    drop(driver);
    server.expect_writes_stay_refused(socket.as_ref());
    server.terminate();
}

#[test]
fn a_server_behind_that_is_not_there_or_goes_away_is_named_and_costs_errors_only() {
    let scratch = Scratch::new();
    let disk = format!("{},nbd=unix:{}", words(&scratch), scratch.text("nbd.sock"));
    let said = upcall(&["serve", "--disk", &disk]);
    assert_eq!(said.code, Some(1), "{said:#?}");
    assert!(said.stderr.contains("behind.sock"), "{said:#?}");
    let nbdkit = Nbdkit::start(&scratch, &["memory", "32M"]);
    let (server, uri) = serve(&scratch, &[]);
    nbdsh(&uri, "h.connect_uri(uri)\nh.pwrite(bytearray(4096), 0)\nh.flush()");
    drop(nbdkit);
    nbdsh(
        &uri,
        "
h.connect_uri(uri)
fails(errno.EIO, h.pread, 4096, 0)
fails(errno.EIO, h.pwrite, bytearray(4096), 0)
fails(errno.EIO, h.pread, 4096, 0)
",
    );
    server.terminate();
}
