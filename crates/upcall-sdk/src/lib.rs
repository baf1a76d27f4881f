//! Write Upcall filters in Rust.
//!
//! A filter implements [`Filter`] and is exported with [`export_filter!`] from a crate of
//! type `cdylib`. What it is built into is the same C table that a filter in C exports;
//! `upcall/filter.h` remains the contract, and this crate is a safe way to keep it.
//!
//! A whole filter, which hides a disk's first mebibyte from writes and counts reads that
//! failed:
//!
//! ```
//! use upcall_sdk::{Class, Completion, Counter, Errno, Filter, Info, Instance, Op, OpSet};
//! use upcall_sdk::{Param, Request, Verdict, export_filter, info};
//!
//! struct Fence {
//!     end: u64,
//!     failed_reads: Counter,
//! }
//!
//! impl Filter for Fence {
//!     const INFO: Info = Info {
//!         name: c"fence",
//!         version: c"1.0",
//!         vendor: c"Example",
//!         summary: c"Refuses writes to the start of a disk",
//!         class: Class::Inspection,
//!         ops: OpSet::of(&[Op::Read, Op::Write, Op::Discard, Op::WriteZeroes]),
//!         ..Info::NEW
//!     };
//!     const PARAMS: &'static [Param] =
//!         &[Param::size(c"end", c"Where writes begin.", Some(c"1M"), 0, i64::MAX)];
//!     type Context = ();
//!
//!     fn open(instance: Instance) -> Result<Self, Errno> {
//!         let end = instance.param_int(c"end") as u64;
//!         info!(instance, "the first {end} bytes are fenced off");
//!         Ok(Fence { end, failed_reads: instance.counter(c"failed_reads") })
//!     }
//!
//!     fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a> {
//!         match request.op() {
//!             Op::Read => request.watch(()),
//!             _ if request.offset() < self.end => request.fail(Errno::EROFS),
//!             _ => request.pass(),
//!         }
//!     }
//!
//!     fn io_done<'a>(&self, completion: Completion<'a, Self>) -> Verdict<'a> {
//!         if completion.status().is_err() {
//!             self.failed_reads.add(1);
//!         }
//!         completion.pass()
//!     }
//! }
//!
//! export_filter!(Fence);
//! # fn main() {}
//! ```
//!
//! **Threads.** Callbacks come from several threads at once, hence `Sync`. They must not
//! block: hold the request ([`Request::hold`]) and answer it later, from wherever.
//!
//! **Panics** in callbacks and closures are logged and end the filter's process; the
//! framework restarts it. They never unwind into the framework. A filter that is placed
//! inline in a worker takes the worker with it, as a crash in C would.
//!
//! **Tests.** With the feature `testing`, `testing::Host`
//! runs a filter in the test's own process, in virtual time and on disks in memory.

mod callback;
mod context;
mod data;
mod errno;
mod extents;
mod filter;
mod info;
mod instance;
mod issue;
mod op;
mod report;
mod request;
mod sidecar;
#[doc(hidden)]
pub mod sys;
mod table;
#[cfg(feature = "testing")]
pub mod testing;

pub use callback::{Timer, Watch};
pub use context::HoldId;
pub use data::{CHUNK, Data, DataMut};
pub use errno::Errno;
pub use extents::{Allocation, Extent};
pub use filter::{Event, Filter};
pub use info::{Class, Info, Param};
pub use instance::{Disk, Instance};
pub use issue::{Buffer, Issue, Issued, Refused};
pub use op::{Op, OpSet};
pub use report::{Counter, Level};
pub use request::{Completion, Held, HeldCompletion, Request, Verdict};
pub use sidecar::Sidecar;
pub use sys::STATE_MAX;
#[doc(hidden)]
pub use table::{Table, table};

/// The version of `upcall/filter.h` that this crate speaks: `(major << 16) | minor`.
pub const ABI_VERSION: u32 = sys::ABI_VERSION;
