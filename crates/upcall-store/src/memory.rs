//! Stores without a file: memory, and nothing at all. Both complete inside `submit`.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use upcall_block::{
    Allocation, DiskInfo, Errno, Extent, Op, OpSet, Status, Store, StoreDone, StoreIo, StoreQueue,
};
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

    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<Extent>> {
        crate::raw::find_extents(&self.memory.fd, &self.info, offset, length, max)
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

    fn extents(&self, _offset: u64, length: u64, _max: usize) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { length, allocation: Allocation::Hole }])
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use upcall_block::{Range, RequestFlags, StoreToken};

    use super::*;

    fn run(store: &dyn Store, op: Op, at: u64, length: u64, data: Buffers, unmap: bool) {
        let mut queue = store.open_queue().unwrap();
        let range = Range::new(at, length, store.info()).unwrap();
        let flags = RequestFlags { unmap, ..RequestFlags::default() };
        queue.submit(StoreIo { token: StoreToken(3), op, range, flags, data });
        assert_eq!((queue.in_flight(), queue.before_sleep()), (1, false));
        let mut done = Vec::new();
        queue.poll(&mut done);
        assert_eq!(done, [StoreDone { token: StoreToken(3), status: Ok(()) }]);
        assert_eq!((queue.in_flight(), queue.before_sleep()), (0, true));
    }

    /// Reads into memory that held something else before.
    fn read(store: &dyn Store, at: u64, length: usize) -> Vec<u8> {
        let data = filled(length, 0xee);
        run(store, Op::Read, at, length as u64, data.clone(), false);
        let mut bytes = vec![0; length];
        data.read(0, &mut bytes);
        bytes
    }

    fn filled(length: usize, byte: u8) -> Buffers {
        let fd = memfd("guest", length).unwrap();
        let memory = Arc::new(Mapping::new(&fd, 0, length, Access::ReadWrite).unwrap());
        let data = Buffers::of(&memory, 0, length, true).unwrap();
        data.write(0, &vec![byte; length]);
        data
    }

    #[test]
    fn memory_keeps_what_is_written_until_it_is_zeroed() {
        let store = MemoryStore::new(1 << 20).unwrap();
        assert_eq!(read(&store, 0, 4096), [0; 4096]);
        run(&store, Op::Write, 512, 65536, filled(65536, 5), false);
        run(&store, Op::Flush, 0, 0, Buffers::new(), false);
        run(&store, Op::Discard, 1024, 16384, Buffers::new(), false);
        run(&store, Op::WriteZeroes, 20480, 512, Buffers::new(), false);
        run(&store, Op::WriteZeroes, 24576, 512, Buffers::new(), true);
        let mut expected = vec![0; 1 << 20];
        expected[512..512 + 65536].fill(5);
        expected[1024..1024 + 16384].fill(0);
        expected[20480..20992].fill(0);
        expected[24576..25088].fill(0);
        assert!(read(&store, 0, 1 << 20) == expected);
        assert_eq!(store.sync(), Ok(()));
    }

    #[test]
    fn discarded_memory_goes_back_to_the_system() {
        let store = MemoryStore::new(1 << 20).unwrap();
        let file = std::fs::File::from(store.memory.fd.try_clone().unwrap());
        let blocks = || file.metadata().unwrap().blocks();
        assert_eq!(blocks(), 0);
        run(&store, Op::Write, 0, 1 << 20, filled(1 << 20, 5), false);
        assert_eq!(blocks(), 2048);
        run(&store, Op::Discard, 0, 1 << 19, Buffers::new(), false);
        assert_eq!(blocks(), 1024);
    }

    #[test]
    fn null_reads_zeroes_whatever_was_written() {
        let store = NullStore::new(1 << 20).unwrap();
        run(&store, Op::Write, 0, 4096, filled(4096, 5), false);
        assert_eq!(read(&store, 0, 4096), [0; 4096]);
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        for bytes in [0, 1, 513] {
            let text = MemoryStore::new(bytes).expect_err("no size").to_string();
            assert!(text.contains(&format!("memory disk of {bytes} bytes")), "{text}");
            assert!(NullStore::new(bytes).is_err());
        }
        assert!(MemoryStore::new(1 << 62).is_err(), "more than there is");
    }
}
