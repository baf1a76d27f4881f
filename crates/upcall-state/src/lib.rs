//! The folder beside a disk, where the durable state of its filters is kept.
//!
//! `disk.img` has `disk.img.upcall/`, with `NAME-N.sidecar` for what instance N of filter NAME
//! keeps for itself, and `NAME-N.gaps` (see `upcall-gap`) for what it missed. Moved or copied
//! together with the image, they are found again; no path is written in them.
//!
//! When a guest moves to another host, the worker that it leaves writes the file `handover`
//! for the one that takes the disk up (see `handover.rs`), which removes it.
//!
//! Always true: one worker at a time holds a folder; no symbolic link is followed in it; what
//! is made in it has its name only once it is whole and durable, and is readable by nobody but
//! its owner, who is the image's; nothing in here is believed without a checksum.
//!
//! # The sidecar's file
//!
//! Two slots, at 0 and at 131072. The filter host writes them, one after the other, with a
//! sync after each; so one is always whole, and after each sync both hold the same. Numbers
//! are little-endian. A slot:
//!
//! | at | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `UPCALLSC` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | length of the state, at most 65536 |
//! | 16 | 8 | sequence number; of two whole slots the larger counts |
//! | 24 | 36 | zeroes |
//! | 60 | 4 | CRC-32C of bytes 0 to 59 and of the state |
//! | 64 | | the state |
//!
//! A new file has two whole slots with an empty state; so a file without a whole slot is
//! damaged, never empty. What we assume of the media: what was synced stays or is found
//! damaged, and of what was not synced any bytes may be there.

#![forbid(unsafe_code)]

mod error;
mod folder;
mod handover;
mod sidecar;

pub use error::StateError;
pub use folder::{Folder, folder_of, has_handover, name_of};
pub use handover::Handover;
pub use sidecar::{SIDECAR_MAX, State, parse, volatile};

/// What is read of a file `handover`, and how it is written: for fuzz targets.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn parse_handover(bytes: &[u8]) -> Option<Handover> {
    Handover::parse(bytes)
}

/// See [`parse_handover`].
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn handover_bytes(handover: &Handover) -> Vec<u8> {
    handover.bytes()
}
