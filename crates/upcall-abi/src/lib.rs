//! What both ends of an up-call agree on, as plain types.
//!
//! * [`ring`]: the entries of the rings between a worker and a filter host, and the
//!   layout of the memfd that holds them.
//! * [`control`]: the messages on the socket between them.
//! * [`filter`]: the constants of the public C header, `sdk/c/include/upcall/filter.h`.
//!
//! Rings and control messages are private and versioned by [`WIRE_VERSION`]: both ends
//! are ours and ship together. The C header is public and versioned by
//! [`filter::ABI_VERSION`]. The C side of all of this is
//! `crates/upcall-filterhost/c/wire.h`; a test compares both, at 32 and 64 bits.
//!
//! No syscalls, no allocation, no unsafe.
#![forbid(unsafe_code)]
#![no_std]

pub mod control;
pub mod extents;
pub mod filter;
pub mod ring;

/// Version of the rings and of the control socket together. A filter host that speaks
/// another one is refused at its first message.
pub const WIRE_VERSION: u32 = 1;
