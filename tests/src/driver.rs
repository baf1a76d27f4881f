//! A well-behaved guest: the `virtio-driver` crate, which no one here wrote.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags, iovec,
};

use crate::client::{Client, Io, Outcome, SLOT_BYTES};
use crate::memory::SharedMemory;

/// A vhost-user-blk device, driven by `virtio-driver`. Splits its data as it is told.
pub struct Driver {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    // Last: the queues' and the device's memory outlives both.
    memory: SharedMemory,
    slots: usize,
}

impl Driver {
    /// Connects and starts `queues` queues of `queue_size` descriptors, with room for
    /// `slots` requests in flight in each. `features` are taken if they are offered.
    pub fn connect(
        path: &Path,
        queues: usize,
        queue_size: u16,
        slots: usize,
        features: VirtioFeatureFlags,
    ) -> io::Result<Driver> {
        let wanted =
            (VirtioFeatureFlags::VERSION_1 | features).bits() | VirtioBlkFeatureFlags::all().bits();
        let transport = VhostUser::new(path.to_str().unwrap(), wanted)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut rings = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, queue_size)?;
        for ring in &mut rings {
            ring.set_used_notif_enabled(true);
        }
        let memory = SharedMemory::new(queues * slots * SLOT_BYTES);
        let fd = memory.fd().as_raw_fd();
        transport.map_mem_region(memory.address() as usize, memory.len(), fd, 0)?;
        Ok(Driver { queues: rings, transport, memory, slots })
    }

    /// As [`connect`](Self::connect), with usual sizes and every ring feature.
    pub fn usual(path: &Path, queues: usize) -> Driver {
        let features = VirtioFeatureFlags::RING_EVENT_IDX | VirtioFeatureFlags::RING_INDIRECT_DESC;
        Driver::connect(path, queues, 256, 16, features).unwrap()
    }

    /// The device's configuration space, as it is now.
    pub fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().unwrap()
    }

    /// The features that were negotiated.
    pub fn features(&self) -> VirtioBlkFeatureFlags {
        VirtioBlkFeatureFlags::from_bits_truncate(self.transport.get_features())
    }

    /// Queues that the device offers.
    pub fn queues_max(&self) -> usize {
        self.transport.max_queues().unwrap_or(1)
    }

    fn place(&self, queue: usize, slot: usize) -> usize {
        assert!(slot < self.slots);
        (queue * self.slots + slot) * SLOT_BYTES
    }

    fn pieces(&self, queue: usize, slot: usize, length: u32, pieces: &[u32]) -> Vec<iovec> {
        assert_eq!(pieces.iter().sum::<u32>(), length);
        let mut at = self.place(queue, slot);
        let mut vector = Vec::new();
        for &piece in pieces {
            let base = self.memory.pointer(at, piece as usize);
            vector.push(iovec { iov_base: base.cast(), iov_len: piece as usize });
            at += piece as usize;
        }
        vector
    }
}

impl Client for Driver {
    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn capacity(&self) -> u64 {
        u64::from(self.config().capacity) * 512
    }

    fn put(&self, queue: usize, slot: usize, bytes: &[u8]) {
        assert!(bytes.len() <= SLOT_BYTES);
        self.memory.write(self.place(queue, slot), bytes);
    }

    fn get(&self, queue: usize, slot: usize, bytes: &mut [u8]) {
        assert!(bytes.len() <= SLOT_BYTES);
        self.memory.read(self.place(queue, slot), bytes);
    }

    fn submit(&mut self, queue: usize, slot: usize, io: Io, pieces: &[u32]) {
        let vector = match io {
            Io::Read { length, .. } | Io::Write { length, .. } => {
                self.pieces(queue, slot, length, pieces)
            }
            _ => Vec::new(),
        };
        let ring = &mut self.queues[queue];
        match io {
            Io::Read { offset, .. } => {
                // SAFETY: the pieces lie in `self.memory`, which lives longer than the ring;
                // nothing here borrows that memory.
                unsafe { ring.readv(offset, vector.as_ptr(), vector.len(), slot) }
            }
            Io::Write { offset, .. } => {
                // SAFETY: as above.
                unsafe { ring.writev(offset, vector.as_ptr(), vector.len(), slot) }
            }
            Io::Flush => ring.flush(slot),
            Io::Discard { offset, length } => ring.discard(offset, length, slot),
            Io::WriteZeroes { offset, length, unmap } => {
                ring.write_zeroes(offset, length, unmap, slot)
            }
        }
        .unwrap();
        if ring.avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().unwrap();
        }
    }

    fn ended(&mut self, queue: usize) -> Vec<(usize, Outcome)> {
        self.queues[queue]
            .completions()
            .map(|completion| {
                let outcome = match -completion.ret {
                    0 => Outcome::Ok,
                    libc::EIO => Outcome::IoError,
                    libc::ENOTSUP => Outcome::Unsupported,
                    _ => Outcome::Nonsense,
                };
                (completion.context, outcome)
            })
            .collect()
    }

    fn wait(&mut self, queue: usize, timeout: Duration) {
        if self.queues[queue].completions().has_next() {
            return;
        }
        let call = self.transport.get_completion_fd(queue);
        if is_readable(&*call, timeout) {
            let _ = call.read();
        }
    }
}

/// Waits until `fd` can be read, or the time is over.
pub fn is_readable(fd: impl std::os::fd::AsFd, timeout: Duration) -> bool {
    let timeout =
        Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
}
