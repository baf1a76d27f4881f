//! An NBD server's life: where it listens, whom else it serves, how it dies and comes back.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::nbd::{RawNbd, fail, nbdsh, succeed};
use upcall_tests::{
    Client, Driver, Io, Outcome, Scratch, Server, qemu_img, rust_filter, upcall, upcall_program,
};

const WRITE: u16 = 1;
const READ: u16 = 0;

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///root?socket={}", socket.display())
}

#[test]
fn after_kill_9_clients_see_the_end_and_go_on_with_the_next_worker() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", 8 << 20), scratch.join("n.sock"));
    let disk =
        format!("name=root,file={},direct=off,nbd=unix:{}", image.display(), socket.display());
    let mut stamp = 0u8;
    for _ in 0..5 {
        let server = Server::serve(&scratch, &[&disk], &[]);
        let mut client = RawNbd::ready(&socket, "root", &[]);
        // What the last one was told is done is still there.
        client.command(0, READ, 1, 4096, 4096);
        assert_eq!(client.simple(), (0, 1));
        assert_eq!(client.read(4096), vec![stamp; 4096]);
        stamp += 1;
        client.command(1, WRITE, 2, 4096, 4096);
        client.write(&[stamp; 4096]);
        assert_eq!(client.simple(), (0, 2), "durable");
        for cookie in 10..30 {
            client.command(0, READ, cookie, 0, 1 << 20);
        }
        server.signal(Signal::KILL);
        // Some may have been answered; then the end, clean or reset.
        client.read_to_end();
        assert_eq!(server.wait().signal, Some(9));
        assert!(socket.exists(), "a dead worker cannot remove it");
    }
}

#[test]
fn with_restart_clients_come_again_by_themselves() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", 8 << 20), scratch.join("n.sock"));
    let disk =
        format!("name=root,file={},direct=off,nbd=unix:{}", image.display(), socket.display());
    let server = Server::start(&scratch, &["--restart", "--disk", &disk]);
    let children = server.children();
    nbdsh(
        &uri(&socket),
        &format!(
            "
import os, signal, time
h.connect_uri(uri)
h.pwrite(bytearray([5]) * 4096, 8192, nbd.CMD_FLAG_FUA)
for child in {children:?}:
    os.kill(child, signal.SIGKILL)
try:
    while True:
        h.pread(4096, 8192)
except nbd.Error:
    pass
for attempt in range(200):
    h = nbd.NBD()
    try:
        h.connect_uri(uri)
        break
    except nbd.Error:
        time.sleep(0.05)
assert h.pread(4096, 8192) == bytearray([5]) * 4096
h.shutdown()
"
        ),
    );
    server.stop();
}

#[test]
fn an_inherited_socket_is_served_whatever_its_number() {
    let scratch = Scratch::new();
    let socket = scratch.join("inherited.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let fd = listener.as_raw_fd();
    let mut command = Command::new(upcall_program());
    command.args(["serve", "--disk", "name=root,memory=1M,nbd=fd:9"]);
    // SAFETY: dup2 may be called between fork and exec; 9 is nobody's here.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 9) {
            9 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let server = Server::spawn(&scratch, command);
    assert!(server.stdout().contains("nbd+unix:///root?socket="), "{}", server.stdout());
    assert_eq!(succeed("nbdinfo", &["--size", &uri(&socket)]), "1048576\n");
    server.stop();
    assert!(socket.exists(), "who made it removes it");
    let ended = upcall(&["serve", "--disk", "name=root,memory=1M,nbd=fd:0"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("inherited descriptor"), "{}", ended.stderr);
}

/// Starts a server as systemd does that hands over these sockets by these names.
fn activated(scratch: &Scratch, sockets: &[(&str, &UnixListener)], args: &[&str]) -> Server {
    let mut command = Command::new("/bin/sh");
    // LISTEN_PID is the process that is started: a shell can say so.
    command.args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"]);
    command.arg(upcall_program()).arg("serve").args(args);
    command.env("LISTEN_FDS", sockets.len().to_string());
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    command.env("LISTEN_FDNAMES", names.join(":"));
    // Out of the way of the numbers that are to be set; closed on exec.
    let copies: Vec<i32> = sockets
        .iter()
        // SAFETY: a plain system call on an open descriptor.
        .map(|(_, socket)| unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) })
        .collect();
    assert!(copies.iter().all(|fd| *fd >= 100));
    let inherited = copies.clone();
    // SAFETY: dup2 may be called between fork and exec; it reads what the closure owns.
    unsafe {
        command.pre_exec(move || {
            for (number, fd) in (3..).zip(&inherited) {
                if libc::dup2(*fd, number) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let server = Server::spawn(scratch, command);
    for fd in copies {
        // SAFETY: it is ours, and nobody else knows it.
        unsafe { libc::close(fd) };
    }
    server
}

#[test]
fn systemds_sockets_are_taken_by_name_and_outlive_who_is_started_with_them() {
    for restart in [&[][..], &["--restart", "--restart-pause-ms", "1"]] {
        let scratch = Scratch::new();
        let (guest, nbd) = (scratch.join("guest.sock"), scratch.join("nbd.sock"));
        let (guests, nbds) = (UnixListener::bind(&guest), UnixListener::bind(&nbd));
        let (guests, nbds) = (guests.unwrap(), nbds.unwrap());
        let mut sockets = [("backup", &nbds), ("vm", &guests)];
        if !restart.is_empty() {
            // In either order: nothing but the names can tell.
            sockets.reverse();
        }
        let image = scratch.image("disk.img", 8 << 20);
        let root = format!("name=vm,file={},direct=off,queues=1", image.display());
        let mut args = vec!["--disk", &root];
        args.extend(["--disk", "name=a,memory=1M,nbd=systemd:backup"]);
        args.extend(["--disk", "name=b,memory=2M,nbd=systemd:backup"]);
        args.extend(restart);
        let server = activated(&scratch, &sockets, &args);
        let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", nbd.display());
        assert!(server.stdout().contains(&uri("a")), "{}", server.stdout());
        Driver::usual(&guest, 1).put(0, 0, &[1; 4096]);
        for (export, size) in [("a", "1048576\n"), ("b", "2097152\n")] {
            assert_eq!(succeed("nbdinfo", &["--size", &uri(export)]), size);
        }
        if !restart.is_empty() {
            kill_process(Pid::from_raw(server.children()[0]).unwrap(), Signal::KILL).unwrap();
            // The socket is there all the time: who comes now waits for the next worker.
            assert_eq!(succeed("nbdinfo", &["--size", &uri("b")]), "2097152\n");
        }
        // A client that holds its socket is told, and the end does not wait for it.
        let mut held = RawNbd::ready(&nbd, "a", &[]);
        let begun = Instant::now();
        server.stop();
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert_eq!(held.read_to_end(), b"");
        assert!(nbd.exists() && guest.exists(), "who made them removes them");
        // As systemd does: who comes while nobody serves waits for who is started next.
        let waiting = {
            let uri = uri("a");
            std::thread::spawn(move || succeed("nbdinfo", &["--size", &uri]))
        };
        let server = activated(&scratch, &sockets, &args);
        assert_eq!(waiting.join().unwrap(), "1048576\n");
        server.stop();
    }
}

#[test]
fn a_socket_that_systemd_did_not_hand_over_is_named() {
    let ended = upcall(&["serve", "--disk", "name=root,memory=1M,nbd=systemd:backup"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("FileDescriptorName=backup"), "{}", ended.stderr);
}

/// In order: nobody new is let in, what was asked is answered, the disk is flushed, and then
/// the image is free.
#[test]
fn at_the_end_what_was_asked_is_answered_and_durable_before_the_image_is_let_go() {
    let scratch = Scratch::new();
    let image = scratch.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "8M"]);
    let nbd = scratch.join("nbd.sock");
    let slow = rust_filter("fault");
    let disk = format!(
        "name=root,file={},format=qcow2,direct=off,nbd=unix:{}",
        image.display(),
        nbd.display()
    );
    let filter = format!("disk=root,file={},param.effect=delay,param.delay=300ms", slow.display());
    let server = Server::serve(&scratch, &[&disk], &[&filter]);
    let mut client = RawNbd::ready(&nbd, "root", &[]);
    for cookie in 0..8u64 {
        client.command(0, WRITE, cookie, cookie * 65536, 65536);
        client.write(&[cookie as u8 + 1; 65536]);
    }
    // They have come in, and are not done.
    std::thread::sleep(Duration::from_millis(100));
    server.signal(Signal::TERM);
    let mut answered: Vec<u64> = (0..8)
        .map(|_| {
            let (error, cookie) = client.simple();
            assert_eq!(error, 0, "command {cookie}");
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..8).collect::<Vec<_>>());
    server.wait().expect_success();
    let raw = scratch.join("raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let bytes = std::fs::read(&raw).unwrap();
    for number in 0..8 {
        let part = &bytes[number * 65536..][..65536];
        assert!(part.iter().all(|byte| *byte == number as u8 + 1), "write {number} is lost");
    }
}

#[test]
fn tcp_is_served_and_a_port_in_use_is_named() {
    let scratch = Scratch::new();
    let server = Server::serve(&scratch, &["name=root,memory=1M,nbd=127.0.0.1:0"], &[]);
    let line = server.stdout().lines().find_map(|line| line.trim().strip_prefix("nbd: ")).unwrap();
    assert_eq!(succeed("nbdinfo", &["--size", line]), "1048576\n");
    let address = line["nbd://".len()..].split('/').next().unwrap();
    let ended = upcall(&["serve", "--disk", &format!("name=root,memory=1M,nbd={address}")]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains(address), "{}", ended.stderr);
    server.stop();
}

#[test]
fn beside_a_guest_nbd_clients_only_read() {
    let scratch = Scratch::new();
    let (guest, nbd) = (scratch.join("d.sock"), scratch.join("n.sock"));
    let image = scratch.image("disk.img", 8 << 20);
    let disk = format!(
        "name=root,file={},direct=off,socket={},queues=2,nbd=unix:{}",
        image.display(),
        guest.display(),
        nbd.display()
    );
    let refused = upcall(&["serve", "--disk", &disk]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("nbd-readonly=on"), "{}", refused.stderr);
    assert!(!guest.exists() && !nbd.exists(), "nothing is left");
    let server = Server::serve(&scratch, &[&(disk + ",nbd-readonly=on")], &[]);
    let mut driver = Driver::usual(&guest, 2);
    driver.put(1, 0, &[9; 4096]);
    let outcome = driver.run(1, Io::Write { offset: 4096, length: 4096 });
    assert_eq!(outcome, Outcome::Ok);
    nbdsh(
        &uri(&nbd),
        "
h.connect_uri(uri)
assert h.is_read_only()
assert h.pread(4096, 4096) == bytearray([9]) * 4096
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, bytearray(512), 0)
",
    );
    drop(driver);
    server.stop();
}

#[test]
fn disks_at_one_address_agree_on_it_and_have_names_of_their_own() {
    let scratch = Scratch::new();
    let socket = scratch.text("n.sock");
    let disk = |rest: &str| format!("{rest},memory=1M,nbd=unix:{socket}");
    let (a, b) = (disk("name=a,nbd-export=x"), disk("name=b,nbd-export=x"));
    let ended = upcall(&["serve", "--disk", &a, "--disk", &b]);
    assert!(ended.code == Some(1) && ended.stderr.contains("\"x\""), "{ended:#?}");
    let b = disk("name=b,nbd-connections=5");
    let ended = upcall(&["serve", "--disk", &a, "--disk", &b]);
    assert!(ended.code == Some(1) && ended.stderr.contains("the same NBD address"), "{ended:#?}");
    assert!(!Path::new(&socket).exists(), "nothing is left");
    fail("nbdinfo", &["--size", &format!("nbd+unix:///x?socket={socket}")]);
}

#[test]
fn two_disks_of_a_file_say_the_same_as_flags() {
    let scratch = Scratch::new();
    let config = scratch.text("vm.toml");
    let socket = scratch.text("n.sock");
    let text = format!(
        "[[disk]]\nname = \"a\"\nmemory = \"1M\"\nnbd = \"unix:{socket}\"\nnbd-readonly = true\n\
         nbd-connections = 7\n[[disk]]\nname = \"b\"\nmemory = \"2M\"\nnbd = \"unix:{socket}\"\n\
         nbd-connections = 7\n"
    );
    std::fs::write(&config, text).unwrap();
    let server = Server::start(&scratch, &["--config", &config]);
    let size = |name: &str| {
        succeed("nbdinfo", &["--size", &format!("nbd+unix:///{name}?socket={socket}")])
    };
    assert_eq!([size("a"), size("b")], ["1048576\n", "2097152\n"]);
    server.stop();
}
