//! Where data ends up: raw files and block devices, images of other formats, memory, nothing.
//!
//! * [`RawStore`]: an image whose bytes are the disk's bytes, on io_uring or on a few threads.
//! * [`ImageStore`]: qcow2, VMDK and others, read by a confined qemu-storage-daemon; so is what
//!   another NBD server has.
//! * [`MemoryStore`]: memory that is gone when the store is. [`NullStore`]: reads zeroes.
//!
//! Formats are never probed: a file is raw because the operator said so, and a guest that
//! writes the header of a format into its disk gains nothing by it.
//!
//! Always true of a [`RawStore`]: what a guest's memory looks like never makes an operation
//! wrong (pieces the kernel would refuse go through memory of ours); a short transfer is
//! finished or fails; memory in flight belongs to the queue until the kernel is done with it;
//! and after a failed flush nothing that writes ever succeeds again.

mod error;
mod image;
mod memory;
mod plant;
mod raw;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use error::OpenError;
pub use image::{ImageFormat, ImageOptions, ImageSource, ImageStore, Layer, NbdPlace, NbdServer};
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub use image::{rewrite_descriptor, vmdk_content_id};
pub use memory::{MemoryStore, NullStore};
pub use raw::{Engine, OnFailure, RawOptions, RawStore};
