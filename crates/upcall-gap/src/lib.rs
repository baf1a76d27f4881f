//! Which ranges of a disk were changed while a filter was bypassed.
//!
//! Whoever sends a change past a filter first asks a [`Marker`] to mark its range, and submits
//! the change only once the mark is made. So whatever dies and whenever, the file names at
//! least everything that the filter missed, and a replica or cache can be repaired from it.
//!
//! Always true: a mark that was reported as made is found again after any crash, unless a
//! clear that began after it finished; a mark that could not be made durable is reported as
//! failed, and its change must then not be submitted. Errors of any kind lead to too many marks,
//! never to too few.
//!
//! # The file
//!
//! All numbers are little-endian. A granule is 64 KiB of the disk.
//!
//! | at | bytes | what |
//! | --- | --- | --- |
//! | 0 | 512 | header |
//! | 4096 | 512 | the same header again |
//! | 8192 + 512 n | 512 | page n, for granules 4032 n to 4032 n + 4031; no page is missing |
//!
//! Header:
//!
//! | at | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `UPCALLGP` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | bytes of a granule: 65536 |
//! | 16 | 8 | the largest capacity in bytes that the disk had |
//! | 24 | 16 | id of the file: random |
//! | 40 | 468 | zeroes |
//! | 508 | 4 | CRC-32C of bytes 0 to 507 |
//!
//! Page n:
//!
//! | at | bytes | what |
//! | --- | --- | --- |
//! | 0 | 504 | 63 words of 64 bits; bit i of word w: granule 4032 n + 64 w + i is marked |
//! | 504 | 4 | zeroes |
//! | 508 | 4 | CRC-32C of the id, n as 8 bytes, and bytes 0 to 507 |
//!
//! A page that is torn, rotten, misplaced, missing or unreadable counts as wholly marked; if
//! both headers are damaged everything does. What we assume of the media: what was synced
//! stays, or is found damaged; of what was not synced any bytes may be there, in any order. A
//! file that somebody deletes takes its marks along: that is not seen.

#![forbid(unsafe_code)]

#[cfg(test)]
mod crashes;
mod error;
mod file;
mod format;
mod gaps;
mod known;
mod lock;
mod map;
mod medium;
mod offline;
mod span;
mod syncer;

pub use error::GapError;
pub use file::Damage;
pub use gaps::{Clearing, Gaps, Mark, MarkDone, MarkToken, Marker};
pub use map::Gap;
pub use offline::{Report, read};
pub use span::GRANULE;
