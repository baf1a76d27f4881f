//! Filter hosts: how a worker starts them and talks to them.
//!
//! * [`FilterFile`]: a shared object, opened and looked at from outside.
//! * [`HostProcess`]: a filter host, and the dialogue on its control socket
//!   ([`upcall_abi::control`] is the contract).
//! * [`Bounds`]: what a filter host may use of the machine.
//! * [`Description`]: what the filter says about itself, checked.
//! * [`params`]: what the operator gave for it, checked, files opened.
//! * [`Counters`]: what the filter counts.
//!
//! The filter host itself is C, in `c/`; the build embeds it in this crate, for 64 bits and,
//! where the compiler can, for 32, so that one program needs no second file. Everything a
//! filter host says is hostile: bounded, checked, cleaned. Requests do not pass through
//! here; their rings are [`upcall_ring::channel`].

mod bounds;
mod counters;
mod description;
mod error;
mod file;
mod host;
mod inline;
mod launch;
pub mod params;
mod socket;
mod text;

pub use bounds::Bounds;
pub use counters::Counters;
pub use description::{CLASSES, Description};
pub use error::FilterError;
pub use file::{FilterFile, Width};
pub use host::{HostProcess, LogLevel, LogLine, LogSink, OpenInstance, Placement};
pub use inline::InlineChannel;
pub use params::{Param, ParamError, ParamType, ResolvedParams};
pub use text::clean;
