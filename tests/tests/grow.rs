//! Disks that grow while they are served: SIGHUP makes the server look again, and the guest is
//! told, again after each start of the device.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use upcall_tests::nbd::{fail, succeed};
use upcall_tests::{
    Client, Disk, Filter, Io, Kind, Outcome, RawClient, RawOptions, Scratch, Server,
};

const BYTES: u64 = 32 << 20;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body, no answer wanted.
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// A client that can be told something, and where it is told.
fn connect(socket: &Path) -> (RawClient, UnixStream) {
    let mut client = RawClient::connect(socket, RawOptions::default()).unwrap();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let connection = client.connection();
    connection.command(SET_PROTOCOL_FEATURES, &PROTOCOL.to_le_bytes(), &[]).unwrap();
    connection.command(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (client, ours)
}

#[track_caller]
fn expect_told(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, CONFIG_CHANGE);
}

#[track_caller]
fn expect_nothing(channel: &mut UnixStream) {
    channel.set_nonblocking(true).unwrap();
    assert!(channel.read(&mut [0; 1]).is_err());
    channel.set_nonblocking(false).unwrap();
}

fn set_length(image: &Path, bytes: u64) {
    std::fs::File::options().write(true).open(image).unwrap().set_len(bytes).unwrap();
}

#[track_caller]
fn wait_for_log(server: &Server, word: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !server.stderr().contains(word) {
        assert!(Instant::now() < deadline, "{word:?} is not in {}", server.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_that_grows_is_told_to_its_guest_and_served_to_its_new_end() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let (mut client, mut channel) = connect(&disk.socket);
    let behind = Io::Write { offset: BYTES, length: 512 };
    client.write(0, BYTES - 512, &[1; 512]);
    assert_eq!(client.run(0, behind), Outcome::IoError);
    disk.server().signal(Signal::HUP);
    set_length(&disk.image, BYTES * 2);
    disk.server().signal(Signal::HUP);
    expect_told(&mut channel);
    assert_eq!(client.config().unwrap().capacity_sectors, BYTES * 2 / 512);
    client.write(0, BYTES * 2 - 4096, &[2; 4096]);
    assert_eq!(client.read(0, BYTES - 512, 512), [1; 512]);
    assert_eq!(client.run(0, Io::Write { offset: BYTES * 2, length: 512 }), Outcome::IoError);
    // Not a whole sector: what is whole counts.
    set_length(&disk.image, BYTES * 3 + 511);
    disk.server().signal(Signal::HUP);
    expect_told(&mut channel);
    assert_eq!(client.config().unwrap().capacity_sectors, BYTES * 3 / 512);
    drop(client);
    disk.stop();
}

#[test]
fn a_guest_is_told_again_whenever_its_device_starts() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let (mut client, mut channel) = connect(&disk.socket);
    // Grown before anybody listened, or while the device was stopped: told at the next start.
    for times in 2..5 {
        expect_nothing(&mut channel);
        let base = client.stop(0).unwrap();
        set_length(&disk.image, BYTES * times);
        disk.server().signal(Signal::HUP);
        expect_told(&mut channel);
        client.start(0, base).unwrap();
        expect_told(&mut channel);
        assert_eq!(client.config().unwrap().capacity_sectors, BYTES * times / 512);
        client.write(0, BYTES * times - 512, &[3; 512]);
    }
    // A guest that comes later sees the size at once.
    drop(client);
    let (client, _channel) = connect(&disk.socket);
    assert_eq!(client.capacity(), BYTES * 4);
    drop(client);
    disk.stop();
}

#[test]
fn a_disk_never_shrinks_and_says_so() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let (mut client, mut channel) = connect(&disk.socket);
    set_length(&disk.image, BYTES / 2);
    disk.server().signal(Signal::HUP);
    wait_for_log(disk.server(), "has shrunk to 16777216 bytes");
    expect_nothing(&mut channel);
    assert_eq!(client.config().unwrap().capacity_sectors, BYTES / 512);
    assert_eq!(client.run(0, Io::Read { offset: BYTES - 512, length: 512 }), Outcome::IoError);
    set_length(&disk.image, BYTES);
    assert_eq!(client.read(0, BYTES - 512, 512), [0; 512]);
    drop(client);
    disk.stop();
}

#[test]
fn a_disk_whose_filters_know_its_size_stays_and_says_so() {
    let mut disk = Disk::serve(BYTES, 1, "", &[Filter::Xor]);
    let (client, mut channel) = connect(&disk.socket);
    set_length(&disk.image, BYTES * 2);
    disk.server().signal(Signal::HUP);
    wait_for_log(disk.server(), "its filters were told a size");
    expect_nothing(&mut channel);
    assert_eq!(client.config().unwrap().capacity_sectors, BYTES / 512);
    drop(client);
    disk.stop();
    disk.start(1, "");
    assert_eq!(connect(&disk.socket).0.capacity(), BYTES * 2, "served anew, it has all of it");
    disk.stop();
}

#[test]
fn a_supervisor_passes_it_on_and_the_next_worker_has_the_new_size() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.image("disk.img", BYTES), scratch.join("d.sock"));
    let main = format!("name=root,file={},socket={},direct=off", image.display(), socket.display());
    let server = Server::start(&scratch, &["--restart", "--disk", &main]);
    let (client, mut channel) = connect(&socket);
    set_length(&image, BYTES * 2);
    server.signal(Signal::HUP);
    expect_told(&mut channel);
    assert_eq!(client.config().unwrap().capacity_sectors, BYTES * 2 / 512);
    set_length(&image, BYTES * 3);
    // One that comes while no worker runs is not lost, and kills no worker.
    kill_process(Pid::from_raw(server.children()[0]).unwrap(), Signal::KILL).unwrap();
    (0..20).for_each(|_| server.signal(Signal::HUP));
    wait_for_log(&server, "serves; nobody served for");
    assert_eq!(connect(&socket).0.capacity(), BYTES * 3);
    assert_eq!(server.stderr().matches("died").count(), 1, "{}", server.stderr());
    drop(client);
    server.stop();
}

#[test]
fn hostile_channels_harm_nobody() {
    let mut disk = Disk::serve(BYTES, 1, "", &[]);
    let (mut client, channel) = connect(&disk.socket);
    // Nobody reads it, while the device starts again and again; then it is closed.
    for _ in 0..2000 {
        client.vring_state(18, 0, 0).unwrap();
        client.vring_state(18, 0, 1).unwrap();
    }
    drop(channel);
    for _ in 0..3 {
        client.vring_state(18, 0, 0).unwrap();
        client.vring_state(18, 0, 1).unwrap();
    }
    // Given again and again: the last one counts, and none is kept.
    let pid = disk.server().pid().as_raw_pid();
    let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = open();
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    for _ in 0..200 {
        client.connection().command(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]).unwrap();
    }
    assert!(open() <= before + 1, "{} descriptors, then {}", before, open());
    client.vring_state(18, 0, 0).unwrap();
    client.vring_state(18, 0, 1).unwrap();
    expect_told(&mut ours);
    client.write(0, 0, &[1; 512]);
    // Something that is no socket ends the connection, and nothing else.
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(client.connection().command(SET_BACKEND_REQ_FD, &[], &[file.as_fd()]).is_err());
    drop(client);
    assert_eq!(connect(&disk.socket).0.read(0, 0, 512), [1; 512]);
    disk.stop();
}

/// An image's size is its daemon's: it says so, and what to do.
#[test]
fn an_image_does_not_grow_while_it_is_served_and_says_what_to_do() {
    let scratch = Scratch::new();
    let image = Kind::QCOW2.create(&scratch, "disk", BYTES);
    let nbd = scratch.text("nbd.sock");
    let disk = format!("name=root,direct=off,nbd=unix:{nbd}{}", Kind::QCOW2.words(&image));
    let uri = format!("nbd+unix:///root?socket={nbd}");
    let server = Server::serve(&scratch, &[&disk], &[]);
    server.signal(Signal::HUP);
    wait_for_log(&server, "disk root: it stays as it was: qcow2 images do not grow");
    assert!(server.stderr().contains("qemu-img resize"), "{}", server.stderr());
    // It is locked as long as it is served.
    let resize = ["resize", "-f", "qcow2", image.to_str().unwrap(), "64M"];
    fail("qemu-img", &resize);
    assert_eq!(succeed("nbdinfo", &["--size", &uri]), format!("{BYTES}\n"));
    server.stop();
    succeed("qemu-img", &resize);
    let server = Server::serve(&scratch, &[&disk], &[]);
    assert_eq!(succeed("nbdinfo", &["--size", &uri]), format!("{}\n", 64 << 20));
    server.stop();
}

/// NBD has no way to tell a client.
#[test]
fn a_disk_of_nbd_clients_alone_stays_as_it_was_and_says_so() {
    let scratch = Scratch::new();
    let image = scratch.image("disk.img", BYTES);
    let nbd = scratch.text("nbd.sock");
    let disk = format!("name=root,file={},direct=off,nbd=unix:{nbd}", image.display());
    let uri = format!("nbd+unix:///root?socket={nbd}");
    let server = Server::serve(&scratch, &[&disk], &[]);
    set_length(&image, 2 * BYTES);
    server.signal(Signal::HUP);
    wait_for_log(&server, "who uses it was told a size, and cannot be told another");
    assert_eq!(succeed("nbdinfo", &["--size", &uri]), format!("{BYTES}\n"));
    server.stop();
    let server = Server::serve(&scratch, &[&disk], &[]);
    assert_eq!(succeed("nbdinfo", &["--size", &uri]), format!("{}\n", 2 * BYTES));
    server.stop();
}
