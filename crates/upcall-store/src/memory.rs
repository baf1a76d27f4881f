//! Stores without a file: memory, and nothing at all. Both complete inside `submit`.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use upcall_block::{DiskInfo, Errno, Op, OpSet, Status, Store, StoreDone, StoreIo, StoreQueue};
use upcall_ring::{Access, Buffers, Mapping, memfd};

use crate::OpenError;

/// A disk in memory. It begins with zeroes and is gone with the store; durable means nothing
/// here, so flush does nothing and never fails.
#[derive(Debug)]
pub struct MemoryStore {
    info: DiskInfo,
    memory: Arc<Memory>,
}

/// A disk without content: reads give zeroes, writes are accepted and forgotten. For
/// measuring what is above it.
#[derive(Debug)]
pub struct NullStore {
    info: DiskInfo,
}

#[derive(Debug)]
struct Memory {
    fd: OwnedFd,
    mapping: Arc<Mapping>,
}

impl MemoryStore {
    /// A disk of `bytes`, a multiple of 512 and not 0. Memory is taken as it is written.
    pub fn new(bytes: u64) -> Result<MemoryStore, OpenError> {
        let info = info("memory", bytes)?;
        let failed = |source| OpenError::System {
            name: format!("memory of {bytes} bytes"),
            action: "get that much memory",
            source,
        };
        let length = usize::try_from(bytes).map_err(|error| failed(io::Error::other(error)))?;
        let fd = memfd("upcall-memory-store", length).map_err(failed)?;
        let mapping = Mapping::new(&fd, 0, length, Access::ReadWrite).map_err(failed)?;
        Ok(MemoryStore { info, memory: Arc::new(Memory { fd, mapping: Arc::new(mapping) }) })
    }
}

impl NullStore {
    /// A disk that says it has `bytes`, a multiple of 512 and not 0.
    pub fn new(bytes: u64) -> Result<NullStore, OpenError> {
        Ok(NullStore { info: info("null", bytes)? })
    }
}

impl Store for MemoryStore {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn describe(&self) -> String {
        format!("memory of {} bytes", self.info.capacity)
    }

    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        let memory = self.memory.clone();
        Ok(Box::new(InlineQueue {
            carry_out: move |io: &StoreIo| memory.carry_out(io),
            done: vec![],
        }))
    }

    fn sync(&self) -> Status {
        Ok(())
    }
}

impl Store for NullStore {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn describe(&self) -> String {
        format!("null of {} bytes", self.info.capacity)
    }

    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        let carry_out = |io: &StoreIo| {
            if io.op == Op::Read {
                io.data.zero();
            }
            Ok(())
        };
        Ok(Box::new(InlineQueue { carry_out, done: vec![] }))
    }

    fn sync(&self) -> Status {
        Ok(())
    }
}

impl Memory {
    fn carry_out(&self, io: &StoreIo) -> Status {
        let (offset, length) = (io.range.offset() as usize, io.range.length() as usize);
        if io.op == Op::Flush || length == 0 {
            return Ok(());
        }
        let here = Buffers::of(&self.mapping, offset, length, true).ok_or(Errno::EINVAL)?;
        match io.op {
            Op::Read | Op::Write if io.data.len() != length => return Err(Errno::EINVAL),
            Op::Read => here.copy_to(&io.data),
            Op::Write => io.data.copy_to(&here),
            Op::Discard => self.give_back(io),
            Op::WriteZeroes if io.flags.unmap => self.give_back(io),
            Op::WriteZeroes => here.zero(),
            Op::Flush => {}
        }
        Ok(())
    }

    /// Zeroes the range and gives its whole pages back to the system.
    fn give_back(&self, io: &StoreIo) {
        let (offset, length) = (io.range.offset(), u64::from(io.range.length()));
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.fd, mode, offset, length);
        if punched.is_err()
            && let Some(here) = Buffers::of(&self.mapping, offset as usize, length as usize, true)
        {
            here.zero();
        }
    }
}

fn info(name: &'static str, bytes: u64) -> Result<DiskInfo, OpenError> {
    if bytes == 0 || !bytes.is_multiple_of(512) {
        return Err(OpenError::MemorySize { name, bytes });
    }
    Ok(DiskInfo {
        capacity: bytes,
        block_size: 512,
        physical_block_size: 4096,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 4096,
    })
}

/// A queue whose requests are over before `submit` returns.
struct InlineQueue<F> {
    carry_out: F,
    done: Vec<StoreDone>,
}

impl<F: FnMut(&StoreIo) -> Status + Send> StoreQueue for InlineQueue<F> {
    fn submit(&mut self, io: StoreIo) {
        let status = (self.carry_out)(&io);
        self.done.push(StoreDone { token: io.token, status });
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        out.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn before_sleep(&mut self) -> bool {
        self.done.is_empty()
    }
}
