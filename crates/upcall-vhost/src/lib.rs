//! The vhost-user-blk frontend: a guest's virtqueues become requests.
//!
//! The path of a request: [`serve_connection`] speaks the vhost-user protocol with the
//! hypervisor and hands a [`VirtQueue`] to the [`QueueHost`] (the worker) whenever a ring
//! starts. The worker's thread calls [`take`](upcall_block::RequestQueue::take) (ring →
//! chain → request) and [`complete`](upcall_block::RequestQueue::complete). Data moves
//! straight between guest memory and whoever serves the request.
//!
//! | module | its one idea |
//! |---|---|
//! | `config` | what the guest is told: configuration space, features |
//! | `memory` | where the guest's memory is mapped |
//! | `ring` | a split or packed virtqueue's parts, their indices and notifications |
//! | `inflight` | what is in flight, kept for the worker that comes after us |
//! | `dirty` | which pages of the guest's memory we have written, while it is copied elsewhere |
//! | `chain` | from a head index to checked pieces of memory |
//! | `request` | from pieces of memory to a block request |
//! | `queue` | the above, as a [`RequestQueue`](upcall_block::RequestQueue) |
//! | `channel` | what we may say to the frontend unasked: its configuration changed |
//! | `device` | the protocol's state: features, memory, which rings run |
//! | `connection` | one connection from its start to its end |
//! | `listener`, `activation` | where connections come from |
//! | `crash`, `plant` | for tests: where a worker may die, and bugs that tests must see |
//!
//! Always true: nothing of the guest or the hypervisor is believed. Each number is copied
//! once into private memory, checked, and not read again. What is in flight is known from
//! private memory alone. A guest that breaks the rules loses the queue it broke them on;
//! a hypervisor that does loses its connection.
#![forbid(unsafe_code)]

pub mod activation;
mod chain;
mod channel;
mod config;
mod connection;
#[cfg_attr(not(any(test, feature = "mock")), allow(dead_code))]
pub mod crash;
mod device;
mod dirty;
mod inflight;
mod listener;
mod memory;
#[cfg_attr(not(any(test, feature = "plant")), allow(dead_code))]
pub mod plant;
mod queue;
mod request;
mod ring;
mod virtio;

#[cfg(any(test, feature = "mock"))]
pub mod mock;

pub use config::{BlkConfig, BlkOptions, ConfigError};
pub use connection::{ConnectionError, Ended, serve_connection};
pub use device::{QueueHost, Refusal};
pub use dirty::LogError;
pub use inflight::InflightError;
pub use listener::{ListenError, Listener};
pub use memory::{GuestMemory, MEMORY_SLOTS_MAX, MemoryError, Region};
pub use queue::{Stopped, VirtQueue};
