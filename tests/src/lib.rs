//! What the end-to-end tests share: the real programs as child processes, and clients that
//! talk to them as a VM would.
//!
//! - [`Server`] starts `upcall serve` and ends it; [`Reference`] does the same with
//!   qemu-storage-daemon, a peer no one here wrote, to prove the clients right.
//! - [`Driver`] is a well-behaved guest (the `virtio-driver` crate); [`RawClient`] can say
//!   anything at all, also what no sane guest says.
//! - [`Kind`] makes images of QEMU's formats and judges them with qemu-img.
//! - [`Top`] reads what `upcall top` says.
//! - [`Workload`] drives either with random requests from a seed and knows what every byte
//!   must be.
//!
//! Nothing here uses the code it tests: the crates of the worker are no dependencies.

mod build;
pub mod checks;
mod client;
mod driver;
mod fixture;
mod image;
mod load;
mod memory;
mod message;
pub mod nbd;
mod pattern;
mod raw;
mod reference;
mod rng;
mod scratch;
mod server;
mod top;
mod workload;

pub use build::{c_filter, root, rust_filter, upcall_program};
pub use client::{Client, Io, Outcome, SLOT_BYTES};
pub use driver::Driver;
pub use fixture::{CHAINS, Disk, Filter};
pub use image::{Kind, qemu_img};
pub use load::{Load, LoadCounts, LoadMix};
pub use memory::SharedMemory;
pub use message::{Connection, Message, request};
pub use pattern::Pattern;
pub use raw::{
    BlockConfig, Descriptor, Log, Part, RawClient, RawOptions, Used, feature, header, kind, range,
    status,
};
pub use reference::Reference;
pub use rng::Rng;
pub use scratch::Scratch;
pub use server::{Ended, Server, upcall};
pub use top::Top;
pub use workload::{Mix, Workload};
