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

/// An opened store. Shared by the queue threads of a disk.
///
/// A flush that failed is never followed by a success: after it, writes, write-zeroes,
/// discards and flushes fail with EIO, in all queues, until the store is opened anew.
pub trait Store: Send + Sync {
    /// What the disk is. Does not change while the store is open.
    fn info(&self) -> &DiskInfo;

    /// For messages: what kind of store, and of what.
    fn describe(&self) -> String;

    /// A queue for one thread: the one that first polls it, and drops it.
    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>>;

    /// Makes everything durable that completed before; blocks. For an orderly end.
    fn sync(&self) -> Status;
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
