//! The page of counters and latency histograms that a worker keeps and anyone may watch.
//!
//! A worker writes with relaxed atomics, one writer for each block, so that a request pays a
//! few nanoseconds and no lock. Readers map the file read-only and see numbers that are each
//! right but not all of one instant.
//!
//! ## Format (version 1; little-endian; all numbers 8-byte aligned)
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | magic `"UPCLSTAT"` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | process id of the worker |
//! | 16 | 8 | how many hops, `H` |
//! | 24 | 8 | file size in bytes |
//! | 4096 | 256 × H | directory: one entry a hop |
//! | after it, at multiples of 4096 | | for each hop one block a queue, and its counters |
//!
//! Directory entry: disk name (48 bytes, padded with zeroes), hop name (48), kind (u64: 0 the
//! whole request, 1 a filter, 2 the store), queues (u64), offset of the blocks (u64), offset
//! of the filter's counters (u64, 0 for none), rest 0. Hops of a disk stand together, from the
//! guest to the store.
//!
//! A block is 4096 bytes: for operation number `n` (1 to 5) requests at `64 × n`, bytes at
//! `+8`, errors at `+16`, time in ns at `+24`; how many are there now at `64 × 6`; violations
//! at `+8`, requests delivered again at `+16`, requests that went past at `+24`; then at 1024 a histogram of 256 counts: see [`bucket_of`].
//!
//! Counters are 63 entries of 64 bytes, as in `upcall-abi`'s `control`: name (48 bytes), value.
#![forbid(unsafe_code)]

mod histogram;
mod page;

pub use histogram::{BUCKETS, Histogram, bucket_floor_ns, bucket_of};
pub use page::{
    Block, BlockSnapshot, FilterHealth, HopKind, HopSnapshot, HopSpec, OpCounts, Page, PageReader,
    ReadError, Standing, is_kept,
};
