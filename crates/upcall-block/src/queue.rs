//! Where requests come from.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;

use upcall_ring::Buffers;

use crate::{Op, Range, Status};

/// A frontend's name for one of its requests, given back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

/// What else a request asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestFlags {
    /// Write, write zeroes, discard: durable before it completes.
    pub fua: bool,
    /// Write zeroes: the space may be given back.
    pub unmap: bool,
    /// It may have been carried out before, wholly or in part: it was taken by a worker
    /// that died before it ended.
    pub retry: bool,
}

/// One request of a guest or client. Its range is checked against the disk; its
/// operation is one that the disk offers.
#[derive(Debug)]
pub struct Request {
    /// The frontend's name for it.
    pub tag: Tag,
    /// What to do.
    pub op: Op,
    /// Where. Empty for a flush.
    pub range: Range,
    /// What else.
    pub flags: RequestFlags,
    /// Read: memory to fill; write: memory to take the data from; exactly
    /// `range.length()` bytes. Else empty. Hostile: may change at any time.
    pub data: Buffers,
}

/// A queue that can serve no more: its other side broke the protocol or is gone.
#[derive(Debug)]
pub struct QueueError {
    /// What happened, for people.
    pub reason: String,
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for QueueError {}

/// One queue of a frontend, driven by one thread of the worker. `Any`, so that who gave it to
/// the worker as a trait object can have it back as what it is.
pub trait RequestQueue: Send + Any {
    /// Appends requests that have arrived, `max` at the most. Requests that end without
    /// the worker (malformed, get-id) are completed inside. After an error the queue
    /// takes nothing more, but what it handed out is still completed.
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError>;

    /// Ends a request: exactly once for each that was taken. Not seen by the other side
    /// before [`publish`](Self::publish).
    fn complete(&mut self, tag: Tag, status: Status);

    /// Shows completions to the other side, and wakes it if it wants to be woken. Called
    /// once for a batch; cheap when there is nothing new.
    fn publish(&mut self);

    /// What becomes readable when a request arrives while the queue is asleep.
    fn doorbell(&self) -> Option<BorrowedFd<'_>>;

    /// Says that the thread is about to sleep, so that arrivals ring the doorbell.
    /// Returns false if requests are there already: then do not sleep.
    fn before_sleep(&mut self) -> bool;

    /// Says that the thread is awake and polls. Also empties the doorbell.
    fn after_sleep(&mut self);
}
