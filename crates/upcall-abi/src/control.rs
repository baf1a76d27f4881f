//! Messages on the control socket between a worker and a filter host.
//!
//! The socket is a Unix `SOCK_SEQPACKET` pair; one packet is one message of at most
//! [`MESSAGE_MAX`] bytes: a [`Header`] of 16 bytes, then `payload`. Descriptors travel with
//! the packet (SCM_RIGHTS) in the order given. Each message of the worker is answered by
//! exactly one message, in order, except QUIT; LOG messages may come in between.
//!
//! The filter host finds its end of the socket as descriptor 3 and the filter's shared
//! object as descriptor 4.
//!
//! | kind | from | payload | descriptors | answer |
//! |---|---|---|---|---|
//! | DESCRIBE | worker | – | – | DESCRIPTION: JSON; or RESULT: why the filter cannot be used |
//! | ARENA | worker | u64 size, u32 writable, u32 0; `id` = disk | the arena | RESULT |
//! | ISSUE_ARENA | worker | u64 size | the issue arena | RESULT |
//! | CHANNEL | worker | `id` = channel number, counting from 0; `value` = disk whose queue it serves | ring memfd, doorbell of the filter host, doorbell of the worker | RESULT |
//! | LOAD | worker | – | – | RESULT of the filter's `load` |
//! | OPEN | worker | [`Open`], its disks, its parameters; `id` = instance | counters memfd, the sidecar and the socket for [extents](crate::extents) if there are such, then files of parameters | RESULT of the filter's `open` |
//! | START | worker | – | – | RESULT; from then on the channels are served |
//! | EVENT | worker | u32 event; `id` = instance | – | RESULT of the filter's `event` |
//! | CLOSE | worker | `id` = instance | – | RESULT, when `close` has returned |
//! | SAVE_STATE | worker | `id` = instance | memory for the state, of STATE_MAX bytes | RESULT of the filter's `save_state`; `value` = its length |
//! | LOAD_STATE | worker | `id` = instance, `value` = length | the state | RESULT of the filter's `load_state` |
//! | QUIT | worker | – | – | none: the filter host unloads and ends |
//! | DESCRIPTION | host | JSON text, see below | – | |
//! | RESULT | host | text for people, may be empty; `id` = 0 or a negative errno as u32; `value` = 0, or as said above | – | |
//! | LOG | host | text; `id` = instance or u32::MAX; `value` = level | – | |
//!
//! The worker says ARENA, ISSUE_ARENA, CHANNEL, LOAD, OPEN in this order, then START. Later,
//! it may OPEN and CLOSE instances, and add ARENAs and CHANNELs (served after another START).
//! Numbers of disks and channels are below 1024, those of instances below 4096.
//!
//! **OPEN** carries, after [`Open`], for the own disk and each granted one a [`Disk`], then
//! `parameters` parameters: u16 length of name, u16 length of value, u32 descriptor (index
//! into the files of parameters, or u32::MAX), name, value; not padded, not terminated. All
//! declared parameters are there, defaults included, except absent files.
//!
//! **DESCRIPTION**: `{"wire":1,"abi":65536,"width":64,"name":"xor","version":"…","vendor":"…",
//! "summary":"…","class":3,"flags":0,"ops":6,"sees":6,"changes":6,"answers":0,"functions":
//! ["io_done","cancel","event","save_state","load_state"],"params":[{"name":"…","type":1,"doc":"…","default":"…"|null,
//! "choices":"…"|null,"min":0,"max":9}]}`
//!
//! **Counters memfd**: [`COUNTERS`] entries of 64 bytes: name (48 bytes, padded with
//! zeroes), u64 value, u64 reserved.

/// Most bytes of a message.
pub const MESSAGE_MAX: usize = 64 << 10;
/// Most descriptors of a message.
pub const DESCRIPTORS_MAX: usize = 32;
/// Descriptor number of the control socket in the filter host.
pub const SOCKET_FD: i32 = 3;
/// Descriptor number of the filter's shared object in the filter host.
pub const FILTER_FD: i32 = 4;
/// Counters of an instance.
pub const COUNTERS: usize = 63;
/// Bytes of the counters memfd.
pub const COUNTERS_SIZE: usize = 4096;

/// [`Open::files`]: the instance's sidecar is there.
pub const OPEN_SIDECAR: u32 = 1;
/// [`Open::files`]: a socket on which it asks for extents is there.
pub const OPEN_EXTENTS: u32 = 2;

/// Kinds of messages.
pub mod kind {
    #![allow(missing_docs)] // the table above says it
    pub const DESCRIBE: u32 = 1;
    pub const ARENA: u32 = 2;
    pub const ISSUE_ARENA: u32 = 3;
    pub const CHANNEL: u32 = 4;
    pub const LOAD: u32 = 5;
    pub const OPEN: u32 = 6;
    pub const START: u32 = 7;
    pub const EVENT: u32 = 8;
    pub const CLOSE: u32 = 9;
    pub const QUIT: u32 = 10;
    pub const SAVE_STATE: u32 = 11;
    pub const LOAD_STATE: u32 = 12;
    pub const DESCRIPTION: u32 = 101;
    pub const RESULT: u32 = 102;
    pub const LOG: u32 = 103;
}

/// The first 16 bytes of every message.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`kind`].
    pub kind: u32,
    /// [`crate::WIRE_VERSION`].
    pub version: u32,
    /// As the table says.
    pub id: u32,
    /// As the table says.
    pub value: u32,
}

/// OPEN: the first 16 bytes of the payload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Number of the disk whose arena the instance uses.
    pub arena: u32,
    /// How many [`Disk`]s follow: 1 + granted disks.
    pub disks: u32,
    /// How many parameters follow them.
    pub parameters: u32,
    /// Which of these are there: [`OPEN_SIDECAR`], [`OPEN_EXTENTS`].
    pub files: u32,
}

/// OPEN: one disk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// Bytes.
    pub capacity: u64,
    /// Bytes.
    pub block_size: u32,
    /// 0 or 1.
    pub read_only: u32,
}

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<Header>() == 16 && size_of::<Open>() == 16 && size_of::<Disk>() == 16);
};
