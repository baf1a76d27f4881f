//! The atomics of the ring protocol, so that loom can take their place.
//!
//! [`Mapping`](crate::Mapping) does not use them: loom has no shared memory to model.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
