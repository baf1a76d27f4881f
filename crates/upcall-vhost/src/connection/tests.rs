//! A hypervisor on the other end of a socket, which sends messages byte by byte as QEMU
//! does, or as nobody should.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use upcall_block::RequestQueue;
use upcall_ring::Doorbell;

use super::*;
use crate::BlkOptions;
use crate::memory::{GuestMemory, Region};
use crate::mock::*;
use crate::queue::{Stopped, VirtQueue};
use crate::virtio::*;

const CAPACITY: u64 = 1 << 20;
const NEED_REPLY: u32 = 8;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// The features that QEMU 7.2 accepts for SeaBIOS (here as a legacy driver, without
/// VERSION_1) and for Linux, as far as we offer them.
const SEABIOS: u64 = PROTOCOL_FEATURES | BLK_SIZE_MAX | BLK_SEG_MAX | BLK_BLK_SIZE;
const LINUX: u64 = SEABIOS
    | BLK_FLUSH
    | BLK_TOPOLOGY
    | BLK_CONFIG_WCE
    | BLK_DISCARD
    | BLK_WRITE_ZEROES
    | RING_INDIRECT_DESC
    | RING_EVENT_IDX
    | VERSION_1;

/// The hypervisor.
struct Client {
    stream: UnixStream,
    shutdown: Doorbell,
    config: Arc<BlkConfig>,
    calls: Arc<Mutex<Vec<String>>>,
    server: JoinHandle<Result<Ended, ConnectionError>>,
}

impl Client {
    fn new() -> Client {
        let options = BlkOptions { queues: 2, ..BlkOptions::default() };
        let config = BlkConfig::new(disk_info(CAPACITY), options).unwrap();
        let (stream, other) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (shutdown, config) = (Doorbell::new().unwrap(), Arc::new(config));
        let mut host = ThreadHost::new(CAPACITY as usize);
        let calls = host.calls.clone();
        let server = {
            let (shutdown, config) = (shutdown.clone(), config.clone());
            std::thread::spawn(move || serve_connection(other, config, &mut host, shutdown.as_fd()))
        };
        Client { stream, shutdown, config, calls, server }
    }

    fn send(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        send(&self.stream, &message(code, 1, body), fds).unwrap();
    }

    fn send_u64(&self, code: u32, value: u64) {
        self.send(code, &value.to_le_bytes(), &[]);
    }

    /// A ring's number and another one.
    fn send_state(&self, code: u32, index: u32, value: u32) {
        self.send(code, &[index.to_le_bytes(), value.to_le_bytes()].concat(), &[]);
    }

    fn send_fd(&self, code: u32, index: u64, fd: &Doorbell) {
        self.send(code, &index.to_le_bytes(), &[fd.as_fd()]);
    }

    fn receive(&self, code: u32) -> Vec<u8> {
        let mut header = [0; 12];
        (&self.stream).read_exact(&mut header).unwrap();
        let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        assert_eq!((number(0), number(4)), (code, 5), "a reply to this message");
        let mut body = vec![0; number(8) as usize];
        (&self.stream).read_exact(&mut body).unwrap();
        body
    }

    fn get_u64(&self, code: u32) -> u64 {
        self.send(code, &[], &[]);
        u64::from_le_bytes(self.receive(code).try_into().unwrap())
    }

    /// Sends with NEED_REPLY and says whether it was accepted.
    fn acknowledged(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        send(&self.stream, &message(code, 1 | NEED_REPLY, body), fds).unwrap();
        self.receive(code) == 0u64.to_le_bytes()
    }

    fn get_base(&self, index: u32) -> u32 {
        self.send_state(GET_VRING_BASE, index, 0);
        let body = self.receive(GET_VRING_BASE);
        u32::from_le_bytes(std::array::from_fn(|i| body[4 + i]))
    }

    fn get_config(&self, offset: u32, length: u32) -> Vec<u8> {
        let head = [offset, length, 0].map(u32::to_le_bytes).concat();
        self.send(GET_CONFIG, &[head.clone(), vec![0; length as usize]].concat(), &[]);
        let body = self.receive(GET_CONFIG);
        assert_eq!(body[..12], head);
        body[12..].to_vec()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) {
        let head = [offset, bytes.len() as u32, 0].map(u32::to_le_bytes).concat();
        self.send(SET_CONFIG, &[&head, bytes].concat(), &[]);
    }

    /// What QEMU says first.
    fn greet(&self) {
        assert_eq!(self.get_u64(GET_FEATURES) & LINUX, LINUX);
        let protocol = self.get_u64(GET_PROTOCOL_FEATURES);
        self.send_u64(SET_PROTOCOL_FEATURES, protocol);
        assert_eq!(self.get_u64(GET_QUEUE_NUM), 2);
        assert!(self.get_u64(GET_MAX_MEM_SLOTS) >= 32);
        self.send(SET_OWNER, &[], &[]);
        self.get_u64(GET_FEATURES);
    }

    fn add_memory(&self, memory: &Memory) {
        assert!(self.acknowledged(ADD_MEM_REG, &region_message(memory), &[memory.fd()]));
    }

    /// Describes a ring and starts it, as QEMU does.
    fn start_ring(&self, driver: &Driver, size: u32, base: u32, kick: &Doorbell) {
        self.send_state(SET_VRING_NUM, 0, size);
        self.send_state(SET_VRING_BASE, 0, base);
        self.send(SET_VRING_ADDR, &address_message(driver), &[]);
        self.send_fd(SET_VRING_KICK, 0, kick);
        self.send_state(SET_VRING_ENABLE, 0, 1);
    }

    /// What was called since the last time. The messages before must have been answered.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn end(self) -> Result<Ended, ConnectionError> {
        drop(self.stream);
        self.server.join().unwrap()
    }
}

fn region_message(memory: &Memory) -> Vec<u8> {
    let at = memory.address();
    [0, at.guest, at.length, at.user, 0].map(u64::to_le_bytes).concat()
}

fn address_message(driver: &Driver) -> Vec<u8> {
    let [descriptors, available, used] = driver.user_addresses();
    [0, descriptors, used, available, 0].map(u64::to_le_bytes).concat()
}

/// Waits for a completion the way a driver does: by its call descriptor.
fn completion(driver: &mut Driver, call: &Doorbell) -> Used {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let [used] = driver.reap()[..] {
            return used;
        }
        assert!(Instant::now() < deadline, "no completion");
        let _ = is_ready_within(call.as_fd(), Duration::from_millis(100));
        call.clear();
    }
}

fn doorbells() -> (Doorbell, Doorbell) {
    (Doorbell::new().unwrap(), Doorbell::new().unwrap())
}

#[test]
fn qemus_messages_in_qemus_order_are_served() {
    // As recorded from QEMU 7.2: SeaBIOS starts the disk and resets it, then Linux.
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.send_fd(SET_VRING_ERR, 0, &Doorbell::new().unwrap());
    let space = client.get_config(0, 57);
    assert_eq!(space[..8], (CAPACITY / 512).to_le_bytes());
    assert_eq!(space[32], 1, "there is a write cache, so the guest flushes");
    let memory = Arc::new(Memory::new(4 << 20));

    client.send_u64(SET_FEATURES, SEABIOS);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.send_u64(SET_FEATURES, SEABIOS);
    client.add_memory(&memory);
    let mut seabios = Driver::new(memory.clone(), 128, false, 0);
    client.start_ring(&seabios, 128, 0, &kick);
    let read = seabios.submit(T_IN, 0, &[], 512);
    kick.ring();
    assert_eq!(completion(&mut seabios, &call).length, 513);
    assert_eq!(memory.read(read.data, 512), [0; 512]);
    client.send_state(SET_VRING_ENABLE, 0, 0);
    assert_eq!(client.get_base(0), 1);
    assert_eq!(client.calls(), ["start 0", "stop 0"]);

    let mut linux = Driver::new(memory.clone(), 128, true, 0);
    for (base, sector) in [(0, 7), (1, 9)] {
        client.send_u64(SET_FEATURES, LINUX);
        client.send_fd(SET_VRING_CALL, 0, &call);
        client.start_ring(&linux, 128, base, &kick);
        let write = linux.submit(T_OUT, sector, &[0xab; 1024], 0);
        kick.ring();
        assert_eq!(completion(&mut linux, &call).length, 1);
        assert_eq!(linux.status(&write), S_OK);
        client.send_state(SET_VRING_ENABLE, 0, 0);
        assert_eq!(client.get_base(0), base + 1);
        assert_eq!(client.calls(), ["start 0", "stop 0"]);
    }
    let calls = client.calls.clone();
    assert_eq!(client.end().unwrap(), Ended::PeerClosed);
    assert_eq!(*calls.lock().unwrap(), ["disconnected"]);
}

#[test]
fn a_ring_runs_exactly_while_it_is_enabled_and_complete() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.send_fd(SET_VRING_KICK, 0, &kick);
    client.send_state(SET_VRING_NUM, 0, 16);
    client.get_u64(GET_FEATURES);
    assert!(client.calls().is_empty(), "no addresses yet");
    client.send(SET_VRING_ADDR, &address_message(&driver), &[]);
    client.get_u64(GET_FEATURES);
    assert_eq!(client.calls(), ["start 0"]);
    client.send(SET_VRING_ADDR, &address_message(&driver), &[]);
    client.get_u64(GET_FEATURES);
    assert!(client.calls().is_empty(), "the same addresses change nothing");

    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    client.send_state(SET_VRING_ENABLE, 0, 0);
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.get_u64(GET_FEATURES);
    assert_eq!(client.calls(), ["stop 0", "start 0"]);
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    assert_eq!(client.get_base(0), 2);
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.get_u64(GET_FEATURES);
    assert_eq!(client.calls(), ["stop 0"], "a stopped ring waits for a new kick descriptor");
    client.send_fd(SET_VRING_KICK, 0, &kick);
    client.get_u64(GET_FEATURES);
    assert_eq!(client.calls(), ["start 0"]);
    assert_eq!(client.end().unwrap(), Ended::PeerClosed);
}

#[test]
fn a_ring_that_is_not_enabled_does_not_run() {
    let client = Client::new();
    let (kick, _call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let driver = Driver::new(memory.clone(), 16, true, 0);
    client.send_state(SET_VRING_NUM, 0, 16);
    client.send(SET_VRING_ADDR, &address_message(&driver), &[]);
    client.send_fd(SET_VRING_KICK, 0, &kick);
    client.get_u64(GET_FEATURES);
    assert!(client.calls().is_empty());
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.get_u64(GET_FEATURES);
    assert_eq!(client.calls(), ["start 0"]);
}

#[test]
fn without_protocol_features_a_ring_starts_at_its_kick_descriptor() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.send_u64(SET_FEATURES, VERSION_1 | BLK_FLUSH);
    let memory = Arc::new(Memory::new(1 << 20));
    let table = [&1u64.to_le_bytes()[..], &region_message(&memory)[8..]].concat();
    client.send(SET_MEM_TABLE, &table, &[memory.fd()]);
    let mut driver = Driver::new(memory.clone(), 16, false, 0);
    client.send_state(SET_VRING_NUM, 0, 16);
    client.send_state(SET_VRING_BASE, 0, 0);
    client.send(SET_VRING_ADDR, &address_message(&driver), &[]);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.send_fd(SET_VRING_KICK, 0, &kick);
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    assert_eq!(client.get_base(0), 1);
}

#[test]
fn a_new_call_descriptor_is_rung_for_what_was_told_to_the_one_before() {
    let client = Client::new();
    let (kick, masked) = doorbells();
    let call = Doorbell::new().unwrap();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    // As QEMU starts a disk: the ring runs before its interrupt is connected.
    client.send_fd(SET_VRING_CALL, 0, &masked);
    client.start_ring(&driver, 16, 0, &kick);
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &masked);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.get_u64(GET_FEATURES);
    assert!(call.clear(), "the guest would wait for ever");
}

#[test]
fn memory_comes_and_goes_while_a_ring_runs() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    let more = Memory::at(0x10_0000, 1 << 20);
    client.add_memory(&memory);
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.start_ring(&driver, 16, 0, &kick);
    client.add_memory(&more);
    more.write(0x10_0000, &header(T_FLUSH, 0));
    let chain = [Desc::readable(0x10_0000, 16), Desc::writable(0x10_0100, 1)];
    let (_, status) = (more.write(0x10_0100, &[0xff]), 0x10_0100);
    driver.submit_chain(0, &chain);
    kick.ring();
    completion(&mut driver, &call);
    assert_eq!(more.read(status, 1), [S_OK]);
    assert!(client.acknowledged(REM_MEM_REG, &region_message(&more), &[]));
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    assert!(!client.acknowledged(REM_MEM_REG, &region_message(&more), &[]), "it is gone");
    assert!(matches!(client.end(), Err(ConnectionError::Refused(Refusal::Memory(_)))));
}

#[test]
fn a_broken_ring_signals_its_error_descriptor_and_stops_in_order() {
    let client = Client::new();
    let (kick, call) = doorbells();
    let error = Doorbell::new().unwrap();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.send_fd(SET_VRING_ERR, 0, &error);
    client.start_ring(&driver, 16, 0, &kick);
    driver.make_available(77);
    kick.ring();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !error.clear() {
        assert!(Instant::now() < deadline, "not signalled");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.get_base(0), 0);
    assert_eq!(client.end().unwrap(), Ended::PeerClosed);
}

#[test]
fn the_guest_switches_the_write_cache_if_it_negotiated_that() {
    let client = Client::new();
    client.greet();
    client.send_u64(SET_FEATURES, SEABIOS);
    client.set_config(32, &[0]);
    assert_eq!(client.get_config(32, 1), [1], "not negotiated");
    client.send_u64(SET_FEATURES, LINUX);
    client.set_config(32, &[0]);
    assert_eq!(client.get_config(32, 1), [0]);
    assert!(!client.config.write_cache());
    client.set_config(32, &[1]);
    assert_eq!(client.get_config(0, 57)[32], 1);
    client.set_config(0, &[1]);
    assert!(matches!(
        client.server.join().unwrap(),
        Err(ConnectionError::Refused(Refusal::ConfigWrite { offset: 0, length: 1 }))
    ));
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let client = Client::new();
    client.greet();
    let space = client.get_config(0, 60);
    let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| space[at + i]));
    assert_eq!(u32_at(8), 32 << 10, "size_max");
    assert_eq!(u32_at(12), 126, "seg_max");
    assert_eq!((u16_at(16), space[18], space[19]), (2, 16, 63), "geometry");
    assert_eq!(u32_at(20), 512, "blk_size");
    assert_eq!((space[24], space[25], u16_at(26), u32_at(28)), (3, 0, 8, 0), "topology");
    assert_eq!(u16_at(34), 2, "num_queues");
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (0x3f_ffff, 1, 8), "discard");
    assert_eq!((u32_at(48), u32_at(52), space[56]), (0x3f_ffff, 1, 1), "write zeroes");
    assert_eq!(client.get_config(56, 200)[1..], [0; 199], "what is not there is zero");
}

#[test]
fn what_is_not_offered_is_refused() {
    type Say = fn(&Client);
    let cases: [(&str, Say); 9] = [
        ("features", |c| c.send_u64(SET_FEATURES, 1 << 27)),
        ("features", |c| c.send_u64(SET_PROTOCOL_FEATURES, 1 << 16)),
        ("ring 2 of 2", |c| c.send_state(SET_VRING_NUM, 2, 16)),
        ("ring 4294967295 of 2", |c| c.send_state(GET_VRING_BASE, u32::MAX, 0)),
        ("257 entries", |c| c.send_state(SET_VRING_NUM, 0, 257)),
        ("512 entries", |c| c.send_state(SET_VRING_NUM, 0, 512)),
        ("65536 entries", |c| c.send_state(SET_VRING_NUM, 0, 1 << 16)),
        ("position 65536", |c| c.send_state(SET_VRING_BASE, 0, 1 << 16)),
        ("without a kick", |c| c.send_u64(SET_VRING_KICK, 0x100)),
    ];
    for (reason, say) in cases {
        let client = Client::new();
        client.greet();
        say(&client);
        let error = client.server.join().unwrap().unwrap_err().to_string();
        assert!(error.starts_with("refused: ") && error.contains(reason), "{error}");
    }
}

#[test]
fn a_ring_outside_memory_is_refused_when_it_should_start() {
    let client = Client::new();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let driver = Driver::new(Arc::new(Memory::new(1 << 20)), 16, true, 0);
    client.start_ring(&driver, 16, 0, &Doorbell::new().unwrap());
    assert!(matches!(
        client.server.join().unwrap(),
        Err(ConnectionError::Refused(Refusal::RingAddress { index: 0, .. }))
    ));
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let memory = Memory::new(1 << 20);
    let at = memory.address();
    let too_long = [0, at.guest, at.length + 1, at.user, 0];
    let behind = [0, at.guest, 4096, at.user, 1 << 20];
    for region in [too_long, behind] {
        let client = Client::new();
        client.greet();
        let body = region.map(u64::to_le_bytes).concat();
        assert!(!client.acknowledged(ADD_MEM_REG, &body, &[memory.fd()]));
        assert!(matches!(client.end(), Err(ConnectionError::Refused(Refusal::Memory(_)))));
    }
    let client = Client::new();
    client.greet();
    client.add_memory(&memory);
    let other = Memory::at(at.guest + at.length - 1, 4096);
    assert!(!client.acknowledged(ADD_MEM_REG, &region_message(&other), &[other.fd()]));
    let error = client.end().unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
}

#[test]
fn shutdown_ends_a_connection_and_stops_its_queues() {
    let client = Client::new();
    let (kick, _call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let driver = Driver::new(memory.clone(), 16, true, 0);
    client.start_ring(&driver, 16, 0, &kick);
    client.get_u64(GET_FEATURES);
    client.shutdown.ring();
    assert_eq!(client.server.join().unwrap().unwrap(), Ended::ShutDown);
    assert_eq!(
        *client.calls.lock().unwrap(),
        ["start 0", "stop 0"],
        "the guest still waits for what was taken"
    );
}

#[test]
fn half_a_message_holds_up_nobody() {
    for part in [&message(GET_FEATURES, 1, &[])[..5], &message(SET_FEATURES, 1, &[0; 8])[..15]] {
        let mut client = Client::new();
        client.stream.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        client.shutdown.ring();
        assert_eq!(client.server.join().unwrap().unwrap(), Ended::ShutDown);

        let mut client = Client::new();
        client.stream.write_all(part).unwrap();
        assert!(matches!(client.end(), Err(ConnectionError::Stalled)));
    }
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let mut client = Client::new();
    client.greet();
    for byte in message(SET_FEATURES, 1 | NEED_REPLY, &LINUX.to_le_bytes()) {
        client.stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.receive(SET_FEATURES), 0u64.to_le_bytes());
}

#[test]
fn a_frontend_that_reads_no_answers_holds_up_nobody() {
    let client = Client::new();
    client.stream.set_nonblocking(true).unwrap();
    let ask = message(GET_FEATURES, 1, &[]);
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut idle = 0;
    while idle < 50 && Instant::now() < deadline {
        match send(&client.stream, &ask, &[]) {
            Ok(()) => idle = 0,
            Err(_) => {
                idle += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    client.shutdown.ring();
    assert_eq!(client.server.join().unwrap().unwrap(), Ended::ShutDown);
}

#[test]
fn nonsense_ends_the_connection() {
    let oversized = [7u32.to_le_bytes(), 1u32.to_le_bytes(), 0xffff_ffffu32.to_le_bytes()].concat();
    let unknown = message(200, 1, &[]);
    let reply = message(GET_FEATURES, 5, &[]);
    let early = message(GET_CONFIG, 1, &[0; 16]);
    for bytes in [oversized, unknown, reply, early] {
        let mut client = Client::new();
        client.stream.write_all(&bytes).unwrap();
        assert!(matches!(client.server.join().unwrap(), Err(ConnectionError::Protocol(_))));
    }
}

#[test]
fn a_queue_host_gets_its_queues_back_whatever_ends_the_connection() {
    /// Hands out nothing and counts.
    struct Counting(Vec<VirtQueue>, u32);
    impl QueueHost for Counting {
        fn start(&mut self, _index: u16, queue: VirtQueue) {
            self.0.push(queue);
        }
        fn stop(&mut self, index: u16) -> Stopped {
            self.1 += 1;
            let at = self.0.iter().position(|queue| queue.index() == index).unwrap();
            self.0.remove(at).finish()
        }
    }
    let memory = Arc::new(Memory::new(1 << 20));
    let driver = Driver::new(memory.clone(), 16, true, 0);
    let (stream, other) = UnixStream::pair().unwrap();
    let config = BlkConfig::new(disk_info(CAPACITY), BlkOptions::default()).unwrap();
    let say = |code, body: &[u8], fds: &[BorrowedFd<'_>]| {
        send(&stream, &message(code, 1, body), fds).unwrap();
    };
    let kick = Doorbell::new().unwrap();
    say(SET_FEATURES, &VERSION_1.to_le_bytes(), &[]);
    let table = [&1u64.to_le_bytes()[..], &region_message(&memory)[8..]].concat();
    say(SET_MEM_TABLE, &table, &[memory.fd()]);
    say(SET_VRING_NUM, &[0u32.to_le_bytes(), 16u32.to_le_bytes()].concat(), &[]);
    say(SET_VRING_ADDR, &address_message(&driver), &[]);
    say(SET_VRING_KICK, &0u64.to_le_bytes(), &[kick.as_fd()]);
    say(250, &[], &[]);
    let mut host = Counting(Vec::new(), 0);
    let shutdown = Doorbell::new().unwrap();
    let result = serve_connection(other, Arc::new(config), &mut host, shutdown.as_fd());
    assert!(matches!(result, Err(ConnectionError::Protocol(_))));
    assert_eq!((host.0.len(), host.1), (0, 1));
}

#[test]
fn regions_are_translated_and_removed_exactly() {
    let memory = Memory::new(1 << 20);
    let table = memory.table();
    let mut at = memory.address();
    assert!(table.without(at).is_ok_and(|table| table.region_count() == 0));
    at.length -= 1;
    assert!(table.without(at).is_err());
    let full = (0..crate::MEMORY_SLOTS_MAX as u64).map(|i| {
        let mut address = memory.address();
        (address.guest, address.length) = (i << 20, 4096);
        Region::map(address, memory.fd(), 0).unwrap()
    });
    let full = GuestMemory::new(full).unwrap();
    assert!(full.with(memory.region()).is_err(), "no room");
}

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const RESET_DEVICE: u32 = 34;

/// The description of a file for tracking.
fn inflight_message(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut body = [bytes, offset].map(u64::to_le_bytes).concat();
    body.extend([queues, size, 0, 0].map(u16::to_le_bytes).concat());
    body
}

impl Client {
    /// A client whose server keeps its hands off what it is handed: nothing ever completes.
    fn held() -> Client {
        let mut client = Client::new();
        let options = BlkOptions { queues: 2, ..BlkOptions::default() };
        let config = Arc::new(BlkConfig::new(disk_info(CAPACITY), options).unwrap());
        let (stream, other) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let shutdown = client.shutdown.clone();
        client.config = config.clone();
        client.stream = stream;
        client.server = std::thread::spawn(move || {
            serve_connection(other, config, &mut Leaving(Vec::new()), shutdown.as_fd())
        });
        client
    }

    /// Asks for a file for tracking: its length, and the file.
    fn get_inflight(&self, queues: u16, size: u16) -> (u64, OwnedFd) {
        self.send(GET_INFLIGHT_FD, &inflight_message(0, 0, queues, size), &[]);
        let mut bytes = [0; 12 + 24];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::WAITALL).unwrap();
        let fds = control.drain().flat_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let [fd] = <[OwnedFd; 1]>::try_from(fds.collect::<Vec<_>>()).expect("one descriptor");
        assert_eq!(bytes[12 + 8..12 + 16], [0; 8], "from its start");
        (u64::from_le_bytes(std::array::from_fn(|i| bytes[12 + i])), fd)
    }

    /// Hands the file over.
    fn set_inflight(&self, (bytes, fd): &(u64, OwnedFd), queues: u16, size: u16) -> bool {
        let body = inflight_message(*bytes, 0, queues, size);
        self.acknowledged(SET_INFLIGHT_FD, &body, &[fd.as_fd()])
    }
}

/// Takes what there is, completes every second of it, and then behaves as a worker that is
/// killed: what it holds is gone when its queue is.
struct Leaving(Vec<VirtQueue>);

impl QueueHost for Leaving {
    fn start(&mut self, _index: u16, mut queue: VirtQueue) {
        let mut taken = Vec::new();
        queue.take(64, &mut taken).unwrap();
        for request in taken.iter().skip(1).step_by(2) {
            queue.complete(request.tag, Ok(()));
        }
        queue.publish();
        self.0.push(queue);
    }

    fn stop(&mut self, _index: u16) -> Stopped {
        panic!("killed");
    }
}

const PACKED: u64 = LINUX | RING_PACKED;

#[test]
fn what_a_lost_worker_left_in_flight_is_served_first_by_the_next() {
    for packed in [false, true] {
        let memory = Arc::new(Memory::new(1 << 20));
        let (kick, call) = doorbells();
        let mut split_driver = Driver::new(memory.clone(), 16, true, 0);
        let mut packed_driver = PackedDriver::new(memory.clone(), 16, true);
        let address = if packed {
            let [descriptors, driver, device] = packed_driver.user_addresses();
            [0, descriptors, device, driver, 0].map(u64::to_le_bytes).concat()
        } else {
            address_message(&split_driver)
        };
        let mut driver: &mut dyn GuestDriver =
            if packed { &mut packed_driver } else { &mut split_driver };
        let features = if packed { PACKED } else { LINUX };
        let mut submitted: Vec<u32> = Vec::new();
        let mut submit = |driver: &mut &mut dyn GuestDriver, sector| {
            let (chain, data, status) = memory.request(T_OUT, sector, &[1; 512], 0);
            submitted.push(driver.submit_parts(&chain, data, status, false).head.into());
        };
        let start = |client: &Client, base| {
            client.greet();
            client.send_u64(SET_FEATURES, features);
            client.add_memory(&memory);
            client.send_state(SET_VRING_NUM, 0, 16);
            client.send_state(SET_VRING_BASE, 0, base);
            client.send(SET_VRING_ADDR, &address, &[]);
            client.send_fd(SET_VRING_CALL, 0, &call);
        };
        for sector in 0..4 {
            submit(&mut driver, sector);
        }

        let first = Client::held();
        start(&first, if packed { 0x8000_8000 } else { 0 });
        let file = first.get_inflight(2, 16);
        assert!(first.set_inflight(&file, 2, 16));
        first.send_fd(SET_VRING_KICK, 0, &kick);
        first.send_state(SET_VRING_ENABLE, 0, 1);
        first.get_u64(GET_FEATURES);
        assert_eq!(driver.reap().len(), 2, "every second one");
        drop(first.stream);
        assert!(first.server.join().is_err(), "killed");

        // The frontend knows only what is used, if that; the region knows better.
        submit(&mut driver, 4);
        let second = Client::new();
        start(&second, if packed { 0x8000_8000 } else { 2 });
        assert!(second.set_inflight(&file, 2, 16));
        second.send_fd(SET_VRING_KICK, 0, &kick);
        second.send_state(SET_VRING_ENABLE, 0, 1);
        let base = second.get_base(0);
        let mut ended: Vec<u32> = driver.reap().iter().map(|used| used.head).collect();
        let all = if packed { 15 } else { 5 };
        if base & 0x7fff != all {
            // It was stopped before it had seen the last, which is not in flight.
            second.send_fd(SET_VRING_KICK, 0, &kick);
            kick.ring();
            let deadline = Instant::now() + Duration::from_secs(10);
            while ended.len() < 3 {
                assert!(Instant::now() < deadline, "no completion");
                ended.extend(driver.reap().iter().map(|used| used.head));
            }
        }
        assert_eq!(ended, [submitted[0], submitted[2], submitted[4]], "packed {packed}");
        assert_eq!(second.end().unwrap(), Ended::PeerClosed);
    }
}

#[test]
fn a_file_for_tracking_that_is_not_as_it_should_be_is_refused() {
    type Say = fn(&Client, u64, BorrowedFd<'_>);
    let cases: [(&str, Say); 6] = [
        ("3 rings", |c, _, _| c.send(GET_INFLIGHT_FD, &inflight_message(0, 0, 3, 16), &[])),
        ("rings of 17", |c, _, _| c.send(GET_INFLIGHT_FD, &inflight_message(0, 0, 1, 17), &[])),
        ("65535 rings", |c, bytes, fd| {
            c.send(SET_INFLIGHT_FD, &inflight_message(bytes, 0, u16::MAX, 16), &[fd]);
        }),
        ("for tracking", |c, bytes, fd| {
            c.send(SET_INFLIGHT_FD, &inflight_message(bytes - 1, 0, 2, 16), &[fd]);
        }),
        ("cannot map", |c, _, fd| {
            c.send(SET_INFLIGHT_FD, &inflight_message(1 << 20, 0, 2, 256), &[fd]);
        }),
        ("at 64", |c, bytes, fd| {
            c.send(SET_INFLIGHT_FD, &inflight_message(bytes, 64, 1, 16), &[fd]);
        }),
    ];
    for (reason, say) in cases {
        let client = Client::new();
        client.greet();
        client.send_u64(SET_FEATURES, LINUX);
        let (bytes, fd) = client.get_inflight(2, 16);
        say(&client, bytes, fd.as_fd());
        let error = client.server.join().unwrap().unwrap_err().to_string();
        assert!(error.starts_with("refused: ") && error.contains(reason), "{error}");
    }
    // Handed over for split rings; then the guest takes packed ones.
    let client = Client::new();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let file = client.get_inflight(2, 16);
    assert!(client.set_inflight(&file, 2, 16));
    client.send_u64(SET_FEATURES, PACKED);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let driver = Driver::new(memory, 16, true, 0);
    client.start_ring(&driver, 16, 0x8000_8000, &Doorbell::new().unwrap());
    let error = client.server.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("set up for split rings"), "{error}");
}

#[test]
fn asking_for_many_files_for_tracking_keeps_none_of_them() {
    // CVE-2020-10726.
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let client = Client::new();
    client.greet();
    client.get_inflight(2, 256);
    let before = open();
    for _ in 0..500 {
        client.get_inflight(2, 256);
    }
    // Other tests of this process open and close some, too.
    assert!(open() < before + 200, "{before} descriptors, then {}", open());
}

#[test]
fn a_reset_stops_the_rings_and_forgets_what_was_in_flight() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let file = client.get_inflight(1, 16);
    assert!(client.set_inflight(&file, 1, 16));
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.start_ring(&driver, 16, 0, &kick);
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    assert!(client.acknowledged(RESET_DEVICE, &[], &[]));
    assert_eq!(client.calls(), ["start 0", "disconnected", "stop 0"]);
    let mapping =
        upcall_ring::Mapping::new(&file.1, 0, file.0 as usize, upcall_ring::Access::ReadWrite)
            .unwrap();
    assert_eq!(mapping.read_array::<2>(8), Some([0, 0]), "the region is not in use");
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.get_u64(GET_FEATURES);
    assert!(client.calls().is_empty(), "nothing is known of the ring");
    // The connection goes on, as from its start.
    driver.reset();
    client.send_u64(SET_FEATURES, LINUX);
    client.send_fd(SET_VRING_CALL, 0, &call);
    client.start_ring(&driver, 16, 0, &kick);
    driver.submit(T_FLUSH, 0, &[], 0);
    kick.ring();
    completion(&mut driver, &call);
    assert_eq!(client.get_base(0), 1);
}

#[test]
fn the_guests_write_cache_setting_is_known_to_the_next_worker() {
    let memory = Arc::new(Memory::new(1 << 20));
    let first = Client::new();
    first.greet();
    first.send_u64(SET_FEATURES, LINUX);
    let file = first.get_inflight(1, 16);
    assert!(first.set_inflight(&file, 1, 16));
    assert_eq!(first.get_config(32, 1), [1]);
    first.set_config(32, &[0]);
    assert_eq!(first.get_config(32, 1), [0]);
    first.add_memory(&memory);
    first.end().unwrap();
    let second = Client::new();
    second.greet();
    second.send_u64(SET_FEATURES, LINUX);
    assert_eq!(second.get_config(32, 1), [1], "a new worker");
    assert!(second.set_inflight(&file, 1, 16));
    assert_eq!(second.get_config(32, 1), [0], "the guest flushes nothing");
    second.end().unwrap();
}

#[test]
fn a_packed_ring_is_served_and_says_where_it_stands() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, PACKED);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let mut driver = PackedDriver::new(memory.clone(), 8, true);
    let [descriptors, drivers, devices] = driver.user_addresses();
    let address = [0, descriptors, devices, drivers, 0].map(u64::to_le_bytes).concat();
    let mut base = 0x8000_8000;
    for round in 0..5u64 {
        client.send_state(SET_VRING_NUM, 0, 8);
        client.send_state(SET_VRING_BASE, 0, base);
        client.send(SET_VRING_ADDR, &address, &[]);
        client.send_fd(SET_VRING_CALL, 0, &call);
        client.send_fd(SET_VRING_KICK, 0, &kick);
        client.send_state(SET_VRING_ENABLE, 0, 1);
        let written = driver.submit(T_OUT, round, &[round as u8; 512], 0);
        kick.ring();
        let deadline = Instant::now() + Duration::from_secs(10);
        while driver.reap().is_empty() {
            assert!(Instant::now() < deadline, "no completion");
        }
        assert_eq!(driver.status(&written), S_OK);
        client.send_state(SET_VRING_ENABLE, 0, 0);
        base = client.get_base(0);
        let position = u32::from(driver.position());
        assert_eq!(base, position << 16 | position, "round {round}");
    }
    assert_eq!(base, 7 << 16 | 7, "15 descriptors in a ring of 8: almost two laps");
}

#[test]
fn a_packed_rings_position_must_be_one() {
    for (base, reason) in
        [(0x8008_8008, "position 2148040712"), (0x8000_8003, "with requests in flight")]
    {
        let client = Client::new();
        client.greet();
        client.send_u64(SET_FEATURES, PACKED);
        let memory = Arc::new(Memory::new(1 << 20));
        client.add_memory(&memory);
        let driver = Driver::new(memory, 8, true, 0);
        client.start_ring(&driver, 8, base, &Doorbell::new().unwrap());
        let error = client.server.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_frontend_that_never_reads_its_answers_loses_its_connection() {
    let client = Client::new();
    client.stream.set_nonblocking(true).unwrap();
    let ask = message(GET_FEATURES, 1, &[]);
    let start = Instant::now();
    while !client.server.is_finished() {
        assert!(start.elapsed() < 4 * MESSAGE_TIMEOUT, "it is waited for");
        if send(&client.stream, &ask, &[]).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let error = client.server.join().unwrap().unwrap_err();
    assert!(matches!(error, ConnectionError::Unread), "{error}");
    assert!(error.to_string().contains("read no answer for 5 s"), "{error}");
}

#[test]
fn what_a_lost_worker_left_ends_before_the_frontend_hears_where_the_ring_stands() {
    /// Whose thread gets around to taking requests only when it is started a third time.
    struct Slow(ThreadHost, u32, Option<VirtQueue>);
    impl QueueHost for Slow {
        fn start(&mut self, index: u16, queue: VirtQueue) {
            self.1 += 1;
            if self.1 < 3 {
                self.2 = Some(queue);
            } else {
                self.0.start(index, queue);
            }
        }
        fn stop(&mut self, index: u16) -> Stopped {
            match self.2.take() {
                Some(queue) => queue.finish(),
                None => self.0.stop(index),
            }
        }
    }
    let memory = Arc::new(Memory::new(1 << 20));
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    let (kick, call) = doorbells();
    let start = |client: &Client| {
        client.greet();
        client.send_u64(SET_FEATURES, LINUX);
        client.add_memory(&memory);
        client.send_fd(SET_VRING_CALL, 0, &call);
    };
    for sector in 0..4 {
        driver.submit(T_OUT, sector, &[1; 512], 0);
    }
    let first = Client::held();
    start(&first);
    let file = first.get_inflight(1, 16);
    assert!(first.set_inflight(&file, 1, 16));
    first.start_ring(&driver, 16, 0, &kick);
    first.get_u64(GET_FEATURES);
    drop(first.stream);
    assert!(first.server.join().is_err(), "killed");
    assert_eq!(driver.reap().len(), 2);

    let mut second = Client::new();
    let (stream, other) = UnixStream::pair().unwrap();
    let (config, shutdown) = (second.config.clone(), second.shutdown.clone());
    second.stream = stream;
    let mut host = Slow(ThreadHost::new(CAPACITY as usize), 0, None);
    second.server =
        std::thread::spawn(move || serve_connection(other, config, &mut host, shutdown.as_fd()));
    start(&second);
    assert!(second.set_inflight(&file, 1, 16));
    second.start_ring(&driver, 16, 2, &kick);
    second.send_state(SET_VRING_ENABLE, 0, 0);
    assert_eq!(second.get_base(0), 4);
    assert_eq!(driver.reap().len(), 2, "all have ended");
}

/// SET_LOG_BASE, which is always answered.
fn set_log(client: &Client, log: &LogFile) {
    let body = [log.length(), 0].map(u64::to_le_bytes).concat();
    client.send(SET_LOG_BASE, &body, &[log.fd()]);
    client.receive(SET_LOG_BASE);
}

/// SET_VRING_ADDR as QEMU sends it while it logs.
fn logged_address_message(driver: &Driver) -> Vec<u8> {
    let [descriptors, available, used] = driver.user_addresses();
    let flags_and_index = 1u64 << 32;
    [flags_and_index, descriptors, used, available, used - USER_OFFSET]
        .map(u64::to_le_bytes)
        .concat()
}

#[test]
fn logging_comes_and_goes_while_a_ring_runs() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX);
    client.send_fd(SET_VRING_CALL, 0, &call);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let mut driver = Driver::new(memory.clone(), 16, true, 0);
    client.start_ring(&driver, 16, 0, &kick);
    let round = |driver: &mut Driver| {
        let read = driver.submit(T_IN, 0, &[], 4096);
        let before = memory.read(GUEST_BASE, 1 << 20);
        kick.ring();
        completion(driver, &call);
        (changed_pages(&memory, &before), read)
    };
    let log = LogFile::new(GUEST_BASE + (1 << 20));
    let said = Doorbell::new().unwrap();
    round(&mut driver);
    assert!(log.take().is_empty());

    set_log(&client, &log);
    send(&client.stream, &message(SET_LOG_FD, 1 | NEED_REPLY, &[]), &[said.as_fd()]).unwrap();
    assert_eq!(client.receive(SET_LOG_FD), [0; 8]);
    assert!(client.acknowledged(SET_FEATURES, &(LINUX | LOG_ALL).to_le_bytes(), &[]));
    assert!(client.acknowledged(SET_VRING_ADDR, &logged_address_message(&driver), &[]));
    log.take();
    let (changed, read) = round(&mut driver);
    // The device may still be going to sleep, which marks its ring.
    client.send_state(SET_VRING_ENABLE, 0, 0);
    client.send_state(SET_VRING_ENABLE, 0, 1);
    client.get_u64(GET_FEATURES);
    let marked = log.take();
    assert!(changed.is_subset(&marked), "{changed:x?} and {marked:x?}");
    assert!(marked.contains(&(read.status / 4096 * 4096)));
    assert!(said.clear(), "the frontend is told that there are marks");
    assert_eq!(client.calls(), ["start 0", "stop 0", "start 0"], "only our own stop");

    assert!(client.acknowledged(SET_FEATURES, &LINUX.to_le_bytes(), &[]));
    assert!(client.acknowledged(SET_VRING_ADDR, &address_message(&driver), &[]));
    log.take();
    round(&mut driver);
    client.get_base(0);
    assert!(log.take().is_empty(), "off is off");
    assert_eq!(client.calls(), ["stop 0"]);
    assert_eq!(client.end().unwrap(), Ended::PeerClosed);
}

#[test]
fn a_ring_that_is_to_be_logged_waits_for_its_log() {
    let client = Client::new();
    let (kick, call) = doorbells();
    client.greet();
    client.send_u64(SET_FEATURES, LINUX | LOG_ALL);
    client.send_fd(SET_VRING_CALL, 0, &call);
    let memory = Arc::new(Memory::new(1 << 20));
    client.add_memory(&memory);
    let driver = Driver::new(memory.clone(), 16, true, 0);
    client.start_ring(&driver, 16, 0, &kick);
    client.send(SET_VRING_ADDR, &logged_address_message(&driver), &[]);
    client.get_u64(GET_FEATURES);
    assert!(client.calls().is_empty());
    let log = LogFile::new(GUEST_BASE + (1 << 20));
    set_log(&client, &log);
    assert_eq!(client.calls(), ["start 0"]);
    // Its used ring and what stands beside it.
    assert_eq!(log.take().len(), 1);
    assert_eq!(client.end().unwrap(), Ended::PeerClosed);
}

#[test]
fn a_log_that_does_not_cover_the_memory_or_could_shrink_is_refused() {
    let refused = |short: bool| {
        let client = Client::new();
        client.greet();
        client.send_u64(SET_FEATURES, LINUX);
        client.add_memory(&Memory::new(1 << 20));
        let log = LogFile::new(if short { GUEST_BASE } else { GUEST_BASE + (1 << 20) });
        let body = [log.length(), 0].map(u64::to_le_bytes).concat();
        let unsealed = std::fs::File::from(
            rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap(),
        );
        unsealed.set_len(log.length()).unwrap();
        let fd = if short { log.fd() } else { unsealed.as_fd() };
        client.send(SET_LOG_BASE, &body, &[fd]);
        client.end().unwrap_err().to_string()
    };
    let error = refused(true);
    assert!(error.contains("covers guest addresses up to 0x40000000"), "{error}");
    let error = refused(false);
    assert!(error.contains("can be made shorter"), "{error}");
}
