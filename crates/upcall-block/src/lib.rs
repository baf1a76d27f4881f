//! What a block request is, and the borders at which requests enter and leave a worker.
//!
//! A [`Request`] comes from a [`RequestQueue`] (a queue of a frontend) and ends there, by
//! [`RequestQueue::complete`], exactly once. On the other side a [`StoreQueue`] carries
//! requests out. No threads, no IO, no unsafe here.
#![forbid(unsafe_code)]

mod limits;
mod op;
mod queue;
mod status;
mod store;

pub use limits::{DATA_LENGTH_MAX, DiskInfo, LENGTH_MAX, Range, RangeError};
pub use op::{Op, OpSet};
pub use queue::{QueueError, Request, RequestFlags, RequestQueue, Tag};
pub use status::{Errno, Status};
pub use store::{Allocation, Extent, Store, StoreDone, StoreIo, StoreQueue, StoreToken};
