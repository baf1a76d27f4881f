//! Memory that other processes write at the same time, and how to wait for them.
//!
//! * [`Mapping`]: a shared mapping of a file, touched only through bounds-checked copies and
//!   atomics, so that its users need no unsafe code.
//! * [`Buffers`]: pieces of such memory, for the kernel to read and write, with what keeps
//!   them mapped.
//! * [`Arena`]: hands out the pages of a mapping.
//! * [`ring`]: how entries cross shared memory; [`channel`]: the two rings between a worker
//!   and a filter host.
//! * [`Doorbell`]: an eventfd. [`Inbox`]: completions for a thread that may sleep. [`Waiter`]: when to poll, to yield, to sleep.
//!
//! Rules of the game: whatever is read here may have been written by an enemy and may
//! change between two reads. Nothing in this crate keeps a reference into shared memory
//! (atomics excepted), everything is copied out before it is looked at, and every index is
//! checked against sizes that this process knows. What a request means is not known here.

mod arena;
mod barrier;
mod buffers;
// Under loom the ring's atomics are not those of shared memory.
#[cfg(not(loom))]
pub mod channel;
#[cfg(feature = "counting")]
pub mod counting;
mod doorbell;
mod inbox;
mod mapping;
mod pages;
pub mod ring;
mod sync;
mod wait;

pub use arena::{Arena, ArenaSlice, PAGE_SIZE};
pub use barrier::barrier_everywhere;
pub use buffers::{Buffers, Segment};
pub use doorbell::Doorbell;
pub use inbox::Inbox;
pub use mapping::{Access, Mapping, memfd, read_only_view};
pub use wait::{Turn, WaitLimits, Waiter};
