//! An NBD server's life: where it listens, whom else it serves, how it dies and comes back.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use upcall_tests::nbd::{RawNbd, fail, nbdsh, succeed};
use upcall_tests::{Client, Driver, Io, Outcome, Scratch, Server, upcall, upcall_program};

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
