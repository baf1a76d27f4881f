//! A hypervisor that says what the input says: messages with any code, flags, body and
//! descriptors, well-formed just often enough to get somewhere.
//!
//! Always true, whatever the bytes: the connection ends, soon, without a panic; every
//! queue that was started is stopped; what was taken is completed; no descriptor leaks.
#![no_main]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use upcall_block::{Request, RequestQueue};
use upcall_ring::Doorbell;
use upcall_vhost::mock::{Memory, disk_info, message, send};
use upcall_vhost::{BlkConfig, BlkOptions, QueueHost, Stopped, VirtQueue, serve_connection};

const CAPACITY: u64 = 64 << 10;
const MEMORY_LENGTH: usize = 0x4000;
/// As much as a socket takes without anybody reading, here and in answers.
const BYTES_MAX: usize = 16 << 10;
const MESSAGES_MAX: usize = 32;

/// Descriptors to attach, made once.
struct Descriptors {
    memory: Memory,
    eventfd: Doorbell,
    socket: (UnixStream, UnixStream),
}

static DESCRIPTORS: LazyLock<Descriptors> = LazyLock::new(|| Descriptors {
    memory: Memory::at(0, MEMORY_LENGTH),
    eventfd: Doorbell::new().expect("eventfd"),
    socket: UnixStream::pair().expect("socket"),
});

/// Serves queues on the spot: at their start and at their end.
struct Host(Vec<VirtQueue>);

fn serve(queue: &mut VirtQueue) {
    let mut requests: Vec<Request> = Vec::new();
    let _ = queue.take(64, &mut requests);
    for request in requests {
        queue.complete(request.tag, Ok(()));
    }
    queue.publish();
}

impl QueueHost for Host {
    fn start(&mut self, index: u16, mut queue: VirtQueue) {
        assert!(self.0.iter().all(|other| other.index() != index), "started twice");
        serve(&mut queue);
        if queue.before_sleep() {
            queue.after_sleep();
        }
        self.0.push(queue);
    }

    fn stop(&mut self, index: u16) -> Stopped {
        let at = self.0.iter().position(|queue| queue.index() == index);
        let mut queue = self.0.remove(at.expect("stopped, but not started"));
        serve(&mut queue);
        queue.finish()
    }
}

fuzz_target!(|bytes: &[u8]| {
    run(bytes);
});

fn run(bytes: &[u8]) {
    let fds = &*DESCRIPTORS;
    fds.memory.write(0, &[0; MEMORY_LENGTH]);
    let (stream, other) = UnixStream::pair().expect("socket");
    other.set_nonblocking(true).expect("non-blocking");
    let mut input = bytes;
    let (mut sent, mut count) = (0, 0);
    while let Some((&how, rest)) = input.split_first() {
        input = rest;
        let Some((text, used)) = next_message(how, input) else { break };
        input = &input[used..];
        sent += text.len();
        // Raw bytes may be several.
        count += 1 + text.len() / 256;
        let attached: Vec<BorrowedFd<'_>> = match how >> 5 {
            0..=2 => vec![],
            3 => vec![fds.eventfd.as_fd()],
            4 => vec![fds.memory.fd()],
            5 => vec![fds.memory.fd(), fds.eventfd.as_fd()],
            6 => vec![fds.socket.0.as_fd()],
            _ => vec![fds.eventfd.as_fd(); 33],
        };
        if sent > BYTES_MAX || count > MESSAGES_MAX || send(&other, &text, &attached).is_err() {
            break;
        }
    }
    // No more is to come: what is there is handled, and then the connection ends.
    other.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let options = BlkOptions { queues: 3, queue_size_max: 16, ..BlkOptions::default() };
    let config = BlkConfig::new(disk_info(CAPACITY), options).expect("config");
    let mut host = Host(Vec::new());
    let never = Doorbell::new().expect("eventfd");
    assert!(never.as_fd().as_raw_fd() < 100, "descriptors leak");
    let start = Instant::now();
    let _ = serve_connection(stream, Arc::new(config), &mut host, never.as_fd());
    assert!(host.0.is_empty(), "queues left running");
    assert!(start.elapsed() < Duration::from_secs(4), "took {:?}", start.elapsed());
}

/// A message from the input: code and size of the body, then the body; some are given the
/// right form. Returns also how many bytes of the input it took.
fn next_message(how: u8, input: &[u8]) -> Option<(Vec<u8>, usize)> {
    if how & 0x1f == 0x1f {
        // Raw bytes, whatever they are.
        let (&length, rest) = input.split_first()?;
        let length = usize::from(length).min(rest.len());
        return Some((rest[..length].to_vec(), length + 1));
    }
    if how & 0x1e == 0x1c {
        // What the input would rarely hit upon: a file for tracking, or packed rings.
        let (&[kind, size], _) = input.split_first_chunk()?;
        let queues = u16::from(kind >> 4 & 3);
        let mut body = [0x2000u64, 0].map(u64::to_le_bytes).concat();
        body.extend([queues, 1 << (size % 6), 0, 0].map(u16::to_le_bytes).concat());
        let features = 1u64 << 34 | 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
        let flags = 1 | u32::from(how & 1) << 3;
        let text = match kind % 4 {
            0 => message(31, flags, &body),
            1 => message(32, flags, &body),
            2 => message(34, flags, &[]),
            _ => message(2, flags, &features.to_le_bytes()),
        };
        return Some((text, 2));
    }
    let (&[code, length], rest) = input.split_first_chunk()?;
    let length = usize::from(length % 80).min(rest.len());
    let mut flags = 1;
    if how & 1 != 0 {
        flags |= 8;
    }
    if how & 0x1e == 0x1e {
        flags = u32::from(how);
    }
    Some((message(u32::from(code % 48), flags, &rest[..length]), length + 2))
}
