//! The page of counters and latency histograms that a worker keeps and anyone may watch.
//!
//! A worker writes with relaxed atomics, one writer for each block, so that a request pays a
//! few nanoseconds and no lock. Readers map the file read-only and see numbers that are each
//! right but not all of one instant.
//!
//! ## Format (version 2; little-endian; all numbers 8-byte aligned)
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | magic `"UPCLSTAT"` |
//! | 8 | 4 | version, 2 |
//! | 12 | 4 | process id of the worker |
//! | 16 | 8 | how many hops, `H` |
//! | 24 | 8 | file size in bytes |
//! | 4096 | 256 × H | directory: one entry a hop |
//! | after it, at multiples of 4096 | | for each hop one block a queue, and its counters |
//!
//! A directory entry; the hops of a disk stand together, the whole request first:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 48 | disk name, padded with zeroes |
//! | 48 | 48 | hop name |
//! | 96 | 8 | kind: 0 the whole request, 1 a filter, 2 the store, 3 vacant: nothing there |
//! | 104 | 8 | queues |
//! | 112 | 8 | offset of the blocks |
//! | 120 | 8 | offset of the filter's counters; 0 for none |
//! | 128 | 8 | how the filter stands: place in [`Standing::ALL`] |
//! | 136 | 8 | how often it failed |
//! | 144 | 8 | its longest stall, ns |
//! | 152 | 8 | rank: hops of a disk are shown by it, from the guest to the store |
//! | 160 | 96 | 0 |
//!
//! A block is 4096 bytes of u64, for operation number `n` 1 to 5:
//!
//! | offset | what |
//! |---|---|
//! | 64 × n | requests that have left; then bytes, errors, time in ns |
//! | 64 × 6 | how many are there now; then violations, requests delivered again, requests that went past |
//! | 1024 | a histogram of 256 counts: see [`bucket_of`] |
//!
//! Counters are 63 entries of 64 bytes, as in `upcall-abi`'s `control`: name (48 bytes), value.
#![forbid(unsafe_code)]

mod block;
mod histogram;
mod hop;
mod layout;
mod page;
mod reader;

pub use block::Block;
pub use histogram::{BUCKETS, Histogram, bucket_floor_ns, bucket_of};
pub use hop::{FilterHealth, HopKind, HopSpec, Standing};
pub use page::{Page, is_kept};
pub use reader::{BlockSnapshot, HopSnapshot, OpCounts, PageReader, ReadError};
