//! A server's life: how it begins to listen, what a guest that comes and goes sees, and how
//! it ends.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use upcall_tests::{
    Client, Disk, Driver, Filter, Io, Mix, Outcome, RawClient, RawOptions, Reference, Rng, Scratch,
    Server, Workload, upcall_program,
};

const BYTES: u64 = 32 << 20;
const CHAIN: &[Filter] = &[Filter::Trace, Filter::Xor, Filter::Throttle];

/// Writes without pause until the server is gone, and gives the sectors whose writes had
/// completed.
fn write_until_the_end(driver: &mut Driver, until: Instant) -> Vec<u64> {
    let slots = driver.slots();
    let (mut next, mut ended) = (0, Vec::new());
    let mut current: Vec<Option<u64>> = vec![None; slots];
    while Instant::now() < until {
        for (slot, place) in current.iter_mut().enumerate() {
            if place.is_none() && next < BYTES / 512 {
                driver.put(0, slot, &stamped(next));
                driver.submit(0, slot, Io::Write { offset: next * 512, length: 512 }, &[512]);
                *place = Some(next);
                next += 1;
            }
        }
        for (slot, outcome) in driver.ended(0) {
            assert_eq!(outcome, Outcome::Ok, "no guest sees an error at the end");
            ended.extend(current[slot].take());
        }
        driver.wait(0, Duration::from_millis(1));
    }
    ended
}

fn stamped(sector: u64) -> Vec<u8> {
    (0..64u64).flat_map(|word| (sector * 64 + word + 1).to_le_bytes()).collect()
}

#[test]
fn term_and_interrupt_drain_and_end_in_order_under_load() {
    for (signal, chain) in [(Signal::TERM, CHAIN), (Signal::INT, CHAIN), (Signal::TERM, &[][..])] {
        let mut disk = Disk::serve(BYTES, 1, "", chain);
        let mut driver = Driver::usual(&disk.socket, 1);
        let pid = disk.server().pid();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            rustix::process::kill_process(pid, signal).unwrap();
        });
        let until = Instant::now() + Duration::from_millis(1500);
        let ended = write_until_the_end(&mut driver, until);
        killer.join().unwrap();
        disk.end().expect_success();
        assert!(!ended.is_empty(), "the load never ran");
        assert!(!disk.socket.exists(), "the socket is left behind");
        let image = std::fs::read(disk.plain_image()).unwrap();
        for sector in ended {
            let at = sector as usize * 512;
            assert!(image[at..at + 512] == stamped(sector), "sector {sector} is lost ({signal:?})");
        }
    }
}

#[test]
fn what_a_filter_holds_at_the_end_is_waited_for() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
    let fault = upcall_tests::rust_filter("fault");
    let disk = format!("name=root,file={},socket={}", image.display(), socket.display());
    let filter = format!("disk=root,file={},param.effect=delay,param.delay=700ms", fault.display());
    let server = Server::serve(&scratch, &[&disk], &[&filter]);
    let mut driver = Driver::usual(&socket, 1);
    for slot in 0..8 {
        driver.put(0, slot, &stamped(slot as u64));
        driver.submit(0, slot, Io::Write { offset: slot as u64 * 512, length: 512 }, &[512]);
    }
    // Long enough to be taken, too short to end.
    std::thread::sleep(Duration::from_millis(200));
    assert!(driver.ended(0).is_empty(), "nothing is held");
    server.signal(Signal::TERM);
    let ended = server.wait();
    ended.expect_success();
    let outcomes: Vec<Outcome> = driver.ended(0).into_iter().map(|(_, outcome)| outcome).collect();
    assert_eq!(outcomes, [Outcome::Ok; 8]);
    let image = std::fs::read(&image).unwrap();
    for sector in 0..8 {
        let at = sector as usize * 512;
        assert!(image[at..at + 512] == stamped(sector), "sector {sector} is lost");
    }
}

#[test]
fn no_process_and_no_file_outlives_the_server() {
    let mut disk = Disk::serve(BYTES, 2, "", CHAIN);
    let children = disk.server().children();
    assert_eq!(children.len(), 3, "one filter host for each isolated filter: {children:?}");
    disk.stop();
    for child in children {
        assert!(!Path::new(&format!("/proc/{child}")).exists(), "filter host {child} lives on");
    }
    // What the trace would have missed is kept beside the image.
    assert_eq!(disk.scratch.names(), ["disk.img", "disk.img.upcall", "serve.log", "trace.jsonl"]);
}

#[test]
fn a_guest_that_comes_back_finds_its_disk() {
    let mut disk = Disk::serve(BYTES, 4, "", CHAIN);
    let mut driver = Driver::usual(&disk.socket, 4);
    let mut workload = Workload::on(Rng::seed(), &mut driver);
    drop(driver);
    for queues in [1, 4, 2, 4] {
        let mut driver = Driver::usual(&disk.socket, queues);
        workload.run(&mut driver, &Mix::default(), 300);
        // Gone without a word.
        drop(driver);
        let options = RawOptions { queues, ..RawOptions::default() };
        let mut client = RawClient::connect(&disk.socket, options).unwrap();
        workload.run(&mut client, &Mix::default(), 300);
        for queue in 0..queues {
            client.stop(queue).unwrap();
        }
    }
    workload.read_back(&mut Driver::usual(&disk.socket, 4));
    disk.stop();
    workload.check_image(&disk.plain_image());
}

#[test]
fn a_guest_that_goes_in_the_middle_of_its_requests_harms_nobody() {
    let mut disk = Disk::serve(BYTES, 2, "", CHAIN);
    for round in 0..20 {
        let mut driver = Driver::usual(&disk.socket, 2);
        for slot in 0..driver.slots() {
            driver.put(round % 2, slot, &[round as u8; 65536]);
            let io = Io::Write { offset: slot as u64 * 65536, length: 65536 };
            driver.submit(round % 2, slot, io, &[65536]);
        }
        drop(driver);
    }
    let mut driver = Driver::usual(&disk.socket, 2);
    driver.write(0, 0, &[0x77; 4096]);
    assert_eq!(driver.read(1, 0, 4096), [0x77; 4096]);
    drop(driver);
    disk.stop();
}

#[test]
fn a_second_guest_does_not_disturb_the_first() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let mut driver = Driver::usual(&disk.socket, 1);
    driver.write(0, 0, &[1; 512]);
    let second = std::os::unix::net::UnixStream::connect(&disk.socket);
    driver.write(0, 512, &[2; 512]);
    assert_eq!(driver.read(0, 0, 512), [1; 512]);
    drop((driver, second));
    // Either was served in its turn or refused; the next one is served in any case.
    let mut driver = Driver::usual(&disk.socket, 1);
    assert_eq!(driver.read(0, 512, 512), [2; 512]);
    drop(driver);
    disk.stop();
}

#[test]
fn the_disk_is_served_again_by_the_next_server() {
    let mut disk = Disk::serve(BYTES, 2, "", CHAIN);
    let mut driver = Driver::usual(&disk.socket, 2);
    let mut workload = Workload::on(Rng::seed(), &mut driver);
    workload.run(&mut driver, &Mix::default(), 500);
    drop(driver);
    disk.stop();
    disk.start(2, "");
    let mut driver = Driver::usual(&disk.socket, 2);
    workload.read_back(&mut driver);
    workload.run(&mut driver, &Mix::default(), 500);
    drop(driver);
    disk.stop();
    workload.check_image(&disk.plain_image());
}

#[test]
fn several_disks_of_one_worker_are_apart() {
    let scratch = Scratch::new();
    let mut args = Vec::new();
    for index in 0..4 {
        let image = scratch.image(&format!("{index}.img"), BYTES);
        let socket = scratch.text(&format!("{index}.sock"));
        let main = format!("name=disk{index},file={},socket={socket},queues=2", image.display());
        args.extend(["--disk".to_owned(), main]);
    }
    for (disk, filter) in [("disk1", Filter::Trace), ("disk2", Filter::Throttle)] {
        args.extend(["--filter".to_owned(), filter.argument(disk, &scratch)]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let server = Server::start(&scratch, &args);
    let seed = Rng::seed();
    let threads: Vec<_> = (0..4u64)
        .map(|index| {
            let socket = scratch.join(&format!("{index}.sock"));
            std::thread::spawn(move || {
                let mut driver = Driver::usual(&socket, 2);
                let mut workload = Workload::new(seed + index, BYTES);
                workload.run(&mut driver, &Mix::default(), 1_000);
                workload.read_back(&mut driver);
                workload
            })
        })
        .collect();
    let workloads: Vec<Workload> =
        threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    server.stop();
    for (index, workload) in workloads.iter().enumerate() {
        workload.check_image(&scratch.join(&format!("{index}.img")));
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let socket = scratch.join("d.sock");
    // A listener that is dropped leaves its file.
    drop(UnixListener::bind(&socket).unwrap());
    let disk =
        |image: &Path| format!("name=d,file={},socket={}", image.display(), socket.display());
    let server = Server::start(&scratch, &["--disk", &disk(&image)]);
    Driver::usual(&socket, 1).write(0, 0, &[4; 512]);

    let second = scratch.image("second.img", BYTES);
    let ended = upcall_tests::upcall(&["serve", "--disk", &disk(&second)]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("d.sock"), "{}", ended.stderr);
    assert_eq!(Driver::usual(&socket, 1).read(0, 0, 512), [4; 512], "the first serves on");
    server.stop();

    // A socket of another program is alive, too.
    let reference = Reference::start(&scratch, &second, 1);
    let disk = format!("name=d,file={},socket={}", image.display(), reference.socket().display());
    let ended = upcall_tests::upcall(&["serve", "--disk", &disk]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert_eq!(Driver::usual(reference.socket(), 1).capacity(), BYTES);
}

/// Starts a server that inherits `listener` as descriptor `number`.
fn serve_inherited(
    scratch: &Scratch,
    listener: &UnixListener,
    number: i32,
    args: &[&str],
    environment: &[(&str, &str)],
) -> Server {
    let mut command = Command::new("/bin/sh");
    // systemd sets LISTEN_PID to the process that it starts: a shell can do that too.
    let script = "if [ -n \"$LISTEN_FDS\" ]; then export LISTEN_PID=$$; fi; exec \"$@\"";
    command.args(["-c", script, "sh"]).arg(upcall_program()).arg("serve").args(args);
    command.envs(environment.iter().copied());
    let inherited = listener.as_raw_fd();
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are
    // async-signal-safe; the listener outlives the spawn.
    unsafe {
        command.pre_exec(move || {
            // dup2 of a descriptor onto itself does nothing: it would still close at exec.
            let done = if inherited == number {
                libc::fcntl(number, libc::F_SETFD, 0)
            } else {
                libc::dup2(inherited, number)
            };
            if done == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    Server::spawn(scratch, command)
}

#[test]
fn a_listening_socket_may_be_inherited() {
    let systemd: &[(&str, &str)] = &[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "root")];
    for (number, source, environment) in [(3, "fd=3", &[][..]), (7, "fd=7", &[]), (3, "", systemd)]
    {
        let scratch = Scratch::new();
        let image = scratch.image("disk.img", BYTES);
        let path = scratch.join("inherited.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut disk = format!("name=root,file={}", image.display());
        if !source.is_empty() {
            disk = format!("{disk},{source}");
        }
        let args = ["--disk", disk.as_str()];
        let server = serve_inherited(&scratch, &listener, number, &args, environment);
        let mut driver = Driver::usual(&path, 1);
        driver.write(0, 0, &[8; 4096]);
        assert_eq!(driver.read(0, 0, 4096), [8; 4096]);
        drop(driver);
        server.stop();
        assert!(path.exists(), "the socket is who made it's to remove");
    }
}

#[test]
fn an_idle_server_uses_no_processor_time() {
    let disk = Disk::serve(BYTES, 4, "", CHAIN);
    let mut driver = Driver::usual(&disk.socket, 4);
    driver.write(0, 0, &[1; 512]);
    std::thread::sleep(Duration::from_millis(300));
    let pid = disk.server().pid().as_raw_pid();
    let all: Vec<i32> = [pid].into_iter().chain(disk.server().children()).collect();
    let before: u64 = all.iter().map(|&pid| ticks(pid)).sum();
    std::thread::sleep(Duration::from_secs(2));
    let after: u64 = all.iter().map(|&pid| ticks(pid)).sum();
    // 100 ticks a second.
    assert!(after - before <= 4, "{} ticks in 2 idle seconds", after - before);
}

fn ticks(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_error_on_the_way_reaches_the_guest_and_nobody_else() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let socket = scratch.join("d.sock");
    let fault = upcall_tests::rust_filter("fault");
    let server = Server::start(
        &scratch,
        &[
            "--disk",
            &format!("name=root,file={},socket={}", image.display(), socket.display()),
            "--filter",
            &format!("disk=root,file={},param.effect=error,param.ops=write", fault.display()),
        ],
    );
    let mut driver = Driver::usual(&socket, 1);
    let write = Io::Write { offset: 0, length: 512 };
    assert_eq!(driver.run(0, write), Outcome::IoError);
    assert_eq!(driver.read(0, 0, 512), [0; 512]);
    drop(driver);
    server.stop();
}
