//! Where data ends up.

use std::io;
use std::os::fd::BorrowedFd;

use upcall_ring::Buffers;

use crate::{DiskInfo, Op, Range, RequestFlags, Status};

/// The worker's name for a request in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreToken(pub u64);

/// One request to a store.
#[derive(Debug)]
pub struct StoreIo {
    /// Given back with the completion.
    pub token: StoreToken,
    /// What to do.
    pub op: Op,
    /// Where; checked against [`Store::info`]. Empty for a flush.
    pub range: Range,
    /// What else.
    pub flags: RequestFlags,
    /// Read: memory to fill; write: memory to take the data from; exactly
    /// `range.length()` bytes. Else empty. The store keeps it until the completion.
    pub data: Buffers,
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreDone {
    /// Whose.
    pub token: StoreToken,
    /// A short read or write is an error, unless it was finished inside the store.
    pub status: Status,
}

/// What a stretch of a disk is, as far as its store knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Anything.
    Data,
    /// Takes space and reads as zeroes.
    Zero,
    /// Takes no space and reads as zeroes.
    Hole,
}

/// A stretch of a disk that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not 0, a multiple of the disk's block size.
    pub length: u64,
    /// What it is.
    pub allocation: Allocation,
}

/// An opened store. Shared by the queue threads of a disk.
///
/// A flush that failed is never followed by a success: after it, writes, write-zeroes,
/// discards and flushes fail with EIO, in all queues, until the store is opened anew.
pub trait Store: Send + Sync {
    /// What the disk is, as it was opened. Does not change while the store is open.
    fn info(&self) -> &DiskInfo;

    /// Looks again how large it is, in bytes: somebody may have made it larger or smaller. A
    /// multiple of the block size; where the size of a store never changes, that of
    /// [`info`](Self::info). Requests up to there can be made, whatever `info` says. The error
    /// Unsupported says why nobody looks, and what to do.
    fn measure(&self) -> io::Result<u64> {
        Ok(self.info().capacity)
    }

    /// For messages: what kind of store, and of what.
    fn describe(&self) -> String;

    /// A queue for one thread: the one that first polls it, and drops it.
    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>>;

    /// Makes everything durable that completed before; blocks. For an orderly end.
    fn sync(&self) -> Status;

    /// What the `length` bytes from `offset` on are: extents in a row that begin at `offset`.
    /// At least one and `max` at the most, and not more than `length` bytes; all that is left
    /// unsaid is for another call. The range is whole blocks of the disk, and not empty.
    /// May block, so it is not for queue threads.
    ///
    /// Writes that have completed are seen; of those in flight nothing is promised. A store
    /// that knows nothing says data.
    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<Extent>> {
        let _ = (offset, max);
        Ok(vec![Extent { length, allocation: Allocation::Data }])
    }
}

/// One thread's way to a store. Completions come in any order. Requests that overlap and
/// are in flight together take effect in any order.
///
/// Dropping a queue waits for what is in flight, so that no memory is written later.
pub trait StoreQueue: Send {
    /// Takes a request. Never blocks and never refuses: a store that has no room queues.
    fn submit(&mut self, io: StoreIo);

    /// Hands what was submitted to the kernel, once for a batch, and appends completions.
    fn poll(&mut self, out: &mut Vec<StoreDone>);

    /// Requests submitted and not yet reported by `poll`.
    fn in_flight(&self) -> usize;

    /// What becomes readable when a completion is there, for a thread that sleeps. None:
    /// everything completes in the next `poll`.
    fn doorbell(&self) -> Option<BorrowedFd<'_>>;

    /// Says that the thread is about to sleep. Returns false if completions are there
    /// already.
    fn before_sleep(&mut self) -> bool;
}
