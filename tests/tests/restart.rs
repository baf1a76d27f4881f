//! `upcall serve --restart`: a worker that dies is started again, whenever it dies, and what
//! it leaves behind is in nobody's way.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::{Client, Driver, Filter, Rng, Scratch, Server, upcall_program};

const BYTES: u64 = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A supervised disk.
struct Supervised {
    server: Option<Server>,
    scratch: Scratch,
    socket: PathBuf,
    image: PathBuf,
}

impl Supervised {
    fn start(chain: &[Filter], more: &[&str]) -> Supervised {
        let scratch = Scratch::new();
        let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
        let mut disk = Supervised { server: None, scratch, socket, image };
        disk.server = Some(disk.serve(chain, more));
        disk
    }

    fn serve(&self, chain: &[Filter], more: &[&str]) -> Server {
        let (image, socket) = (self.image.display(), self.socket.display());
        let mut args = vec!["--restart".to_owned(), "--disk".into()];
        args.push(format!("name=root,file={image},socket={socket},queues=2,direct=off"));
        for filter in chain {
            args.extend(["--filter".into(), filter.argument("root", &self.scratch)]);
        }
        args.extend(more.iter().map(|word| word.to_string()));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Server::start(&self.scratch, &args)
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    fn worker(&self) -> i32 {
        wait_for("a worker", || self.server().children().into_iter().find(|pid| is_worker(*pid)))
    }

    /// Kills the worker with `signal` and waits until another serves.
    fn kill(&self, signal: Signal) {
        let (worker, served) = (self.worker(), self.times_served());
        kill(worker, signal);
        wait_for("the next worker", || (self.times_served() > served).then_some(()));
        assert_ne!(self.worker(), worker);
    }

    /// How often a worker served anew.
    fn times_served(&self) -> usize {
        self.server().stderr().matches("serves; nobody served for").count()
    }

    fn stop(&mut self) {
        let ended = self.server.take().unwrap().terminate();
        ended.expect_success();
        assert_eq!(ended.stdout.matches("ready\n").count(), 1, "{}", ended.stdout);
    }
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[track_caller]
fn wait_for<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Children of a process, of all its threads.
fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return vec![] };
    let lists = tasks
        .flatten()
        .map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| {
            list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>()
        })
        .collect()
}

/// A worker that is or will be: what a dead worker leaves behind is a child, too, for a moment.
fn is_worker(pid: i32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"--restart")
}

/// A running filter host, and not a zombie or another process by now.
fn is_filter_host(pid: i32) -> bool {
    let name = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    name.starts_with(b"upcall-filterhost\0")
}

#[test]
fn a_killed_worker_is_started_again_behind_the_same_socket() {
    let mut disk = Supervised::start(&[], &[]);
    let mut driver = Driver::usual(&disk.socket, 2);
    driver.write(0, 4096, &[7; 4096]);
    let socket = std::fs::metadata(&disk.socket).unwrap();
    for signal in [Signal::KILL, Signal::TRAP, Signal::ABORT] {
        disk.kill(signal);
        let mut driver = Driver::usual(&disk.socket, 2);
        assert_eq!(driver.read(1, 4096, 4096), [7; 4096]);
    }
    use std::os::unix::fs::MetadataExt;
    assert_eq!(std::fs::metadata(&disk.socket).unwrap().ino(), socket.ino());
    let log = disk.server().stderr();
    for word in ["died (signal 9)", "died (signal 6", "started again at once", "nobody served for"]
    {
        assert!(log.contains(word), "{word:?} is not in {log}");
    }
    disk.stop();
    assert_eq!(disk.scratch.names(), ["disk.img", "serve.log"]);
}

#[test]
fn a_worker_killed_at_any_moment_of_its_start_leaves_nothing_in_the_way() {
    let chain = [Filter::Trace, Filter::Xor];
    let mut disk = Supervised::start(&chain, &["--restart-pause-ms", "1"]);
    let mut rng = Rng::new(Rng::seed());
    Driver::usual(&disk.socket, 2).write(0, 0, &[9; 4096]);
    let mut last = 0;
    for _ in 0..40 {
        let worker =
            wait_for("a new worker", || Some(disk.worker()).filter(|worker| *worker != last));
        std::thread::sleep(Duration::from_micros(rng.below(120_000)));
        kill(worker, Signal::KILL);
        last = worker;
    }
    wait_for("the next worker", || Some(disk.worker()).filter(|worker| *worker != last));
    // Who connects while it starts is served by it.
    let mut driver = Driver::usual(&disk.socket, 2);
    assert_eq!(driver.read(0, 0, 4096), [9; 4096]);
    drop(driver);
    assert!(disk.scratch.join("d.sock.stats").exists(), "the last worker's counters");
    disk.stop();
    // What the trace would have missed is kept beside the image.
    assert_eq!(disk.scratch.names(), ["disk.img", "disk.img.upcall", "serve.log", "trace.jsonl"]);
}

#[test]
fn filter_hosts_of_a_dead_worker_are_gone_before_the_next_begins() {
    let disk = Supervised::start(&[Filter::Trace, Filter::Xor], &["--restart-pause-ms", "1"]);
    for round in 0..6 {
        let worker = disk.worker();
        let hosts =
            wait_for("filter hosts", || Some(children(worker)).filter(|all| all.len() == 2));
        assert!(hosts.iter().all(|host| is_filter_host(*host)));
        if round % 2 == 0 {
            // Stopped processes die all the same.
            hosts.iter().for_each(|host| kill(*host, Signal::STOP));
        }
        kill(worker, Signal::KILL);
        wait_for("the next worker", || {
            disk.server().children().into_iter().find(|pid| *pid != worker && !hosts.contains(pid))
        });
        assert!(!hosts.iter().any(|host| is_filter_host(*host)), "{hosts:?} live on");
        wait_for("service", || (disk.times_served() > round).then_some(()));
    }
}

#[test]
fn filter_hosts_die_with_a_worker_that_nobody_watches() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let main = format!("name=root,file={},socket={}", image.display(), scratch.text("d.sock"));
    let filter = Filter::Xor.argument("root", &scratch);
    let server = Server::start(&scratch, &["--disk", &main, "--filter", &filter]);
    let hosts = server.children();
    assert!(hosts.len() == 1 && is_filter_host(hosts[0]));
    server.signal(Signal::KILL);
    server.wait();
    wait_for("their end", || (!is_filter_host(hosts[0])).then_some(()));
}

#[test]
fn the_end_of_a_worker_in_order_is_the_programs_end() {
    // (whom to tell, how): in each case the code of an orderly end.
    for (supervisor, signal) in [(true, Signal::TERM), (true, Signal::INT), (false, Signal::TERM)] {
        let mut disk = Supervised::start(&[Filter::Xor], &[]);
        let mut driver = Driver::usual(&disk.socket, 1);
        driver.write(0, 0, &[3; 512]);
        let whom = if supervisor { disk.server().pid().as_raw_pid() } else { disk.worker() };
        kill(whom, signal);
        disk.server.take().unwrap().wait().expect_success();
        assert_eq!(disk.scratch.names(), ["disk.img", "serve.log"]);
    }
}

#[test]
fn a_ctrl_c_that_reaches_all_of_the_group_ends_in_order_too() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
    let mut command = Command::new(upcall_program());
    command.args(["serve", "--restart", "--disk"]);
    command.arg(format!("name=root,file={},socket={}", image.display(), socket.display()));
    command.process_group(0);
    let server = Server::spawn(&scratch, command);
    Driver::usual(&socket, 1).write(0, 0, &[3; 512]);
    rustix::process::kill_process_group(server.pid(), Signal::INT).unwrap();
    let ended = server.wait();
    ended.expect_success();
    // A second signal would have ended the worker at once.
    assert!(ended.stderr.contains("ending in order"), "{}", ended.stderr);
}

#[test]
fn a_configuration_that_cannot_be_served_ends_the_program_at_once() {
    let scratch = Scratch::new();
    let socket = scratch.text("d.sock");
    let disk = format!("name=root,file={},socket={socket}", scratch.text("missing.img"));
    let ended = upcall_tests::upcall(&["serve", "--restart", "--disk", &disk]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert_eq!(ended.stderr.matches("upcall: error").count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("missing.img"), "{}", ended.stderr);
    assert!(ended.stdout.is_empty());
    assert_eq!(scratch.names(), [""; 0]);
    let ended = upcall_tests::upcall(&["serve", "--restart", "--disk", "name=root"]);
    assert_eq!(ended.code, Some(2), "{ended:#?}");
    let ended = upcall_tests::upcall(&["serve", "--supervised", "--disk", "name=r,null=1M"]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("--restart"), "{}", ended.stderr);
}

#[test]
fn a_worker_that_has_served_is_tried_again_until_what_is_in_its_way_is_gone() {
    let mut disk = Supervised::start(&[], &["--restart-pause-ms", "1000"]);
    Driver::usual(&disk.socket, 1).write(0, 0, &[5; 512]);
    let away = disk.scratch.join("away.img");
    std::fs::rename(&disk.image, &away).unwrap();
    kill(disk.worker(), Signal::KILL);
    wait_for("a pause", || disk.server().stderr().contains("again in 1000 ms").then_some(()));
    // Who connects meanwhile is not left waiting: a hypervisor would wait with its guest.
    let mut stream = UnixStream::connect(&disk.socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let begun = Instant::now();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    wait_for("many deaths", || disk.server().stderr().contains("died in a row").then_some(()));
    std::fs::rename(&away, &disk.image).unwrap();
    wait_for("service", || (disk.times_served() == 1).then_some(()));
    assert_eq!(Driver::usual(&disk.socket, 1).read(0, 0, 512), [5; 512]);
    disk.stop();
}

#[test]
fn an_end_while_no_worker_runs_is_told_from_an_orderly_one() {
    let mut disk = Supervised::start(&[], &["--restart-pause-ms", "60000"]);
    std::fs::rename(&disk.image, disk.scratch.join("away.img")).unwrap();
    kill(disk.worker(), Signal::KILL);
    wait_for("a pause", || disk.server().stderr().contains("again in 60000 ms").then_some(()));
    let ended = disk.server.take().unwrap().terminate();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("while the worker was dead"), "{}", ended.stderr);
    assert_eq!(disk.scratch.names(), ["away.img", "serve.log"]);
}

#[test]
fn a_worker_ends_in_order_when_its_supervisor_dies_and_the_next_one_serves() {
    let mut disk = Supervised::start(&[Filter::Xor], &[]);
    for round in 0..4u8 {
        let mut driver = Driver::usual(&disk.socket, 1);
        driver.write(0, 512 * u64::from(round), &[round; 512]);
        let (worker, server) = (disk.worker(), disk.server.take().unwrap());
        server.signal(Signal::KILL);
        server.wait();
        if round % 2 == 0 {
            wait_for("its end", || (!Path::new(&format!("/proc/{worker}")).exists()).then_some(()));
            let log = std::fs::read_to_string(disk.scratch.join("serve.log")).unwrap();
            assert!(log.contains("SIGTERM: ending in order"), "{log}");
        }
        // Or at once: it waits for the other's worker.
        disk.server = Some(disk.serve(&[Filter::Xor], &[]));
    }
    let mut driver = Driver::usual(&disk.socket, 1);
    for round in 0..4u8 {
        assert_eq!(driver.read(0, 512 * u64::from(round), 512), [round; 512]);
    }
    drop(driver);
    disk.stop();
    assert_eq!(disk.scratch.names(), ["disk.img", "serve.log"]);
}

#[test]
fn the_configuration_file_is_read_once() {
    let scratch = Scratch::new();
    let (image, socket, file) =
        (scratch.image("disk.img", BYTES), scratch.join("d.sock"), scratch.join("vm.toml"));
    let text = format!(
        "[[disk]]\nname = \"root\"\nfile = {image:?}\nsocket = {socket:?}\ndirect = false\n"
    );
    std::fs::write(&file, text).unwrap();
    let server = Server::start(&scratch, &["--restart", "--config", file.to_str().unwrap()]);
    let mut disk = Supervised { server: Some(server), scratch, socket, image };
    std::fs::write(&file, "half of a new conf").unwrap();
    disk.kill(Signal::KILL);
    Driver::usual(&disk.socket, 1).write(0, 0, &[1; 512]);
    disk.stop();
}

#[test]
fn a_listening_socket_may_be_inherited_and_outlives_workers() {
    let systemd: &[(&str, &str)] = &[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "root")];
    for (source, environment) in [(",fd=3", &[][..]), ("", systemd)] {
        let scratch = Scratch::new();
        let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("inherited.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = Command::new("/bin/sh");
        let script = "if [ -n \"$LISTEN_FDS\" ]; then export LISTEN_PID=$$; fi; exec \"$@\"";
        command.args(["-c", script, "sh"]).arg(upcall_program()).args(["serve", "--restart"]);
        command.arg("--disk").arg(format!("name=root,file={},direct=off{source}", image.display()));
        command.envs(environment.iter().copied());
        let inherited = listener.as_raw_fd();
        // SAFETY: between fork and exec only dup2 and fcntl are called, which are
        // async-signal-safe; the listener outlives the spawn.
        unsafe {
            command.pre_exec(move || {
                let done = if inherited == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0)
                } else {
                    libc::dup2(inherited, 3)
                };
                if done == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let server = Server::spawn(&scratch, command);
        drop(listener);
        let mut disk = Supervised { server: Some(server), scratch, socket, image };
        for round in 0..3u8 {
            Driver::usual(&disk.socket, 1).write(0, 0, &[round; 512]);
            disk.kill(Signal::KILL);
            assert_eq!(Driver::usual(&disk.socket, 1).read(0, 0, 512), [round; 512]);
        }
        disk.stop();
        assert!(disk.socket.exists(), "the socket is who made it's to remove");
    }
}
