//! The constants of `upcall/filter.h`.

/// Version of the public contract: `(major << 16) | minor`.
pub const ABI_VERSION: u32 = ABI_MAJOR << 16 | ABI_MINOR;
/// A filter with another major version is refused.
pub const ABI_MAJOR: u32 = 1;
/// A filter with a newer minor version is refused.
pub const ABI_MINOR: u32 = 3;

/// Operations, `UPCALL_READ` and so on.
pub mod op {
    /// Data from the disk.
    pub const READ: u8 = 1;
    /// Data to the disk.
    pub const WRITE: u8 = 2;
    /// Everything completed before is durable when it completes.
    pub const FLUSH: u8 = 3;
    /// The range reads as zeroes afterwards and may be deallocated.
    pub const DISCARD: u8 = 4;
    /// The range reads as zeroes afterwards.
    pub const WRITE_ZEROES: u8 = 5;
}

/// Verdicts, `UPCALL_PASS` and so on.
pub mod verdict {
    /// Go on; no call on completion.
    pub const PASS: u8 = 0;
    /// Go on, and call `io_done` on completion.
    pub const WATCH: u8 = 1;
    /// Answered by the filter: success.
    pub const DONE: u8 = 2;
    /// Answered by the filter: an error.
    pub const FAIL: u8 = 3;
    /// The answer comes later. Never on a ring: it is the absence of an entry.
    pub const HOLD: u8 = 4;
}

/// Flags of requests, `UPCALL_REQ_FUA` and so on.
pub mod request_flag {
    /// Write, discard, write zeroes: durable before it completes.
    pub const FUA: u16 = 1;
    /// Write zeroes: may deallocate.
    pub const UNMAP: u16 = 2;
    /// Delivered before, to an instance that is gone.
    pub const RETRY: u16 = 4;
}

/// Flags of a filter's table.
pub mod filter_flag {
    /// It issues requests of its own.
    pub const ISSUES: u32 = 1;
    /// It keeps a state of its own.
    pub const SIDECAR: u32 = 2;
    /// It asks what its disks consist of.
    pub const EXTENTS: u32 = 4;
}

/// The event `UPCALL_EVENT_MIGRATE_OUT`: the guest moves to another host.
pub const EVENT_MIGRATE_OUT: u32 = 5;
/// The event `UPCALL_EVENT_MIGRATE_IN`: it has come from one.
pub const EVENT_MIGRATE_IN: u32 = 6;

/// Most bytes of a state that one instance hands to the next.
pub const STATE_MAX: usize = 1 << 20;
/// Most bytes of a sidecar's state.
pub const SIDECAR_MAX: usize = 64 << 10;
/// Most bytes of a request without data (discard, write zeroes).
pub const LENGTH_MAX: u32 = 0x7fff_fe00;
/// Most bytes of a request with data (read, write).
pub const DATA_LENGTH_MAX: u32 = 4 << 20;
/// Most requests that one instance may have issued and not yet got back.
pub const ISSUED_MAX: usize = 256;
/// Size of a filter host's issue arena, bytes.
pub const ISSUE_ARENA_SIZE: u64 = 16 << 20;
