//! What every client can do, so that one test runs with each of them.

use std::time::{Duration, Instant};

/// Most bytes of one request of a [`Client`].
pub const SLOT_BYTES: usize = 256 << 10;

/// A request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Io {
    Read { offset: u64, length: u32 },
    Write { offset: u64, length: u32 },
    Flush,
    Discard { offset: u64, length: u64 },
    WriteZeroes { offset: u64, length: u64, unmap: bool },
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Status 0.
    Ok,
    /// Status 1.
    IoError,
    /// Status 2.
    Unsupported,
    /// A status that does not exist.
    Nonsense,
}

/// A guest's driver with some queues, each with some slots: places for one request and its
/// data. A slot is free until submitted and free again when it was returned by `ended`.
pub trait Client {
    /// Queues set up.
    fn queues(&self) -> usize;
    /// Slots of each queue.
    fn slots(&self) -> usize;
    /// Bytes of the disk.
    fn capacity(&self) -> u64;
    /// Copies `bytes` to the slot's data, from its start.
    fn put(&self, queue: usize, slot: usize, bytes: &[u8]);
    /// Copies from the slot's data, from its start.
    fn get(&self, queue: usize, slot: usize, bytes: &mut [u8]);
    /// Submits a request, its data in pieces of these sizes, and tells the device.
    fn submit(&mut self, queue: usize, slot: usize, io: Io, pieces: &[u32]);
    /// Slots whose requests have ended since the last call; does not wait.
    fn ended(&mut self, queue: usize) -> Vec<(usize, Outcome)>;
    /// Waits until the device signals the queue, or the time is over.
    fn wait(&mut self, queue: usize, timeout: Duration);

    /// Runs one request on slot 0 and waits for its end.
    fn run(&mut self, queue: usize, io: Io) -> Outcome {
        let pieces = match io {
            Io::Read { length, .. } | Io::Write { length, .. } => vec![length],
            _ => Vec::new(),
        };
        self.submit(queue, 0, io, &pieces);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((slot, outcome)) = self.ended(queue).pop() {
                assert_eq!(slot, 0, "a request ended that nobody submitted");
                return outcome;
            }
            assert!(Instant::now() < deadline, "{io:?} on queue {queue} does not end");
            self.wait(queue, Duration::from_millis(500));
        }
    }

    /// Writes `bytes` at `offset` and expects success.
    fn write(&mut self, queue: usize, offset: u64, bytes: &[u8]) {
        self.put(queue, 0, bytes);
        let io = Io::Write { offset, length: bytes.len() as u32 };
        assert_eq!(self.run(queue, io), Outcome::Ok, "{io:?}");
    }

    /// Reads `length` bytes at `offset` and expects success.
    fn read(&mut self, queue: usize, offset: u64, length: usize) -> Vec<u8> {
        // What the device does not overwrite shall not look like a disk's zeroes.
        self.put(queue, 0, &vec![0xa5; length]);
        let io = Io::Read { offset, length: length as u32 };
        assert_eq!(self.run(queue, io), Outcome::Ok, "{io:?}");
        let mut bytes = vec![0; length];
        self.get(queue, 0, &mut bytes);
        bytes
    }
}
