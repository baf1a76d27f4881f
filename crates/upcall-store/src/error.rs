//! Why a store could not be opened, in words for the operator.

use std::io;

/// Why a store could not be opened. The text names the image and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing there.
    #[error("{name}: no such file; create a raw image with: truncate -s 10G {name}")]
    Missing {
        /// The image.
        name: String,
    },
    /// The process may not open it.
    #[error(
        "{name}: permission denied for {access}; give this user that right, or pass an opened descriptor"
    )]
    Permission {
        /// The image.
        name: String,
        /// Reading, or reading and writing.
        access: &'static str,
    },
    /// A directory, socket, terminal, ...
    #[error("{name}: is {kind}; a disk needs a regular file or a block device")]
    NotADisk {
        /// The image.
        name: String,
        /// What it is instead.
        kind: &'static str,
    },
    /// No bytes.
    #[error("{name}: is empty; give it a size with: truncate -s 10G {name}")]
    Empty {
        /// The image.
        name: String,
    },
    /// Not a whole number of blocks.
    #[error(
        "{name}: its size of {bytes} bytes is not a multiple of {block_size}; \
         extend it to {} bytes with: truncate -s %{block_size} {name}",
        .bytes.next_multiple_of(u64::from(*.block_size))
    )]
    Size {
        /// The image.
        name: String,
        /// Its size.
        bytes: u64,
        /// What it should be a multiple of.
        block_size: u32,
    },
    /// A memory or null disk of a size that no disk can have.
    #[error("{name} disk of {bytes} bytes: the size must be a multiple of 512 bytes, and not 0")]
    MemorySize {
        /// Memory or null.
        name: &'static str,
        /// What was asked for.
        bytes: u64,
    },
    /// Somebody else uses it.
    #[error("{name}: in use by {holder}; {}", way_out(*.read_only))]
    Busy {
        /// The image.
        name: String,
        /// Who, as far as /proc tells.
        holder: String,
        /// Whether only reading was asked for.
        read_only: bool,
    },
    /// The file system has no O_DIRECT, or not at a block size a guest can have.
    #[error("{name}: no direct IO here ({reason}); open it buffered (direct = false)")]
    NoDirect {
        /// The image.
        name: String,
        /// What the kernel says.
        reason: String,
    },
    /// io_uring was demanded and is not to be had.
    #[error(
        "{name}: io_uring cannot be used ({source}); allow it (sysctl kernel.io_uring_disabled=0, \
         seccomp, container profile) or choose the engine auto or threads"
    )]
    NoIoUring {
        /// The image.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The descriptor was opened for less than was asked.
    #[error("{name}: the descriptor is open for {has}; open it for {wants}")]
    DescriptorMode {
        /// The image.
        name: String,
        /// What it is open for.
        has: &'static str,
        /// What is needed.
        wants: &'static str,
    },
    /// An image that its format's reader does not take, or that is asked for in a way that
    /// its format does not have.
    #[error("{name}: cannot be served as {format}: {reason}")]
    Image {
        /// The image.
        name: String,
        /// As what it was to be read.
        format: &'static str,
        /// What is wrong with it, and what to do if that is known.
        reason: String,
    },
    /// An image that consists of several files, and nobody said where they may be.
    #[error(
        "{name}: its data is in other files ({extents}); name the folder they are in, which is \
         to say that they may be opened: extents=FOLDER"
    )]
    Extents {
        /// The image.
        name: String,
        /// What it calls them.
        extents: String,
    },
    /// An extent that is a folder, a socket, a device, ...
    #[error("{name}: an extent of an image must be a regular file, and this is none")]
    Extent {
        /// The extent.
        name: String,
    },
    /// What reads formats is missing.
    #[error(
        "{name}: {format} images need {program}, version 7.2 or newer, which is not installed \
         (or not in PATH): apt-get install qemu-utils qemu-system-common (Debian, Ubuntu), \
         dnf install qemu-img (Fedora), pacman -S qemu-img (Arch)"
    )]
    NotInstalled {
        /// The image.
        name: String,
        /// Its format.
        format: &'static str,
        /// The program.
        program: String,
    },
    /// Anything else the system refuses.
    #[error("{name}: cannot {action}: {source}")]
    System {
        /// The image, or what the store is made of.
        name: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}

fn way_out(read_only: bool) -> &'static str {
    if read_only {
        "stop the writer first, or turn the image lock off if you are sure (lock = false)"
    } else {
        "a disk has one writer: stop the other user, or serve both read-only"
    }
}
