//! Numbers of the virtio and vhost-user specifications, by the specifications' names.

/// Feature bits of every device.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
pub const RING_EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const RING_PACKED: u64 = 1 << 34;
/// vhost's own feature bits: what is written is logged; and, vhost-user's, there are protocol
/// features to negotiate.
pub const LOG_ALL: u64 = 1 << 26;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Feature bits of block devices.
pub const BLK_SIZE_MAX: u64 = 1 << 1;
pub const BLK_SEG_MAX: u64 = 1 << 2;
pub const BLK_GEOMETRY: u64 = 1 << 4;
pub const BLK_RO: u64 = 1 << 5;
pub const BLK_BLK_SIZE: u64 = 1 << 6;
pub const BLK_FLUSH: u64 = 1 << 9;
pub const BLK_TOPOLOGY: u64 = 1 << 10;
pub const BLK_CONFIG_WCE: u64 = 1 << 11;
pub const BLK_MQ: u64 = 1 << 12;
pub const BLK_DISCARD: u64 = 1 << 13;
pub const BLK_WRITE_ZEROES: u64 = 1 << 14;

/// Request types.
pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// Status bytes.
pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;

/// The unit of positions and capacities, whatever the block size.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of `struct virtio_blk_req` before the data.
pub const HEADER_SIZE: usize = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
pub const SEGMENT_SIZE: u64 = 16;
/// Its one flag: the space may be given back.
pub const SEGMENT_UNMAP: u32 = 1;
/// Bytes of a serial number.
pub const ID_SIZE: usize = 20;

/// Descriptor flags.
pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub const DESC_SIZE: usize = 16;

/// Flags of the available and the used ring.
pub const AVAIL_NO_INTERRUPT: u16 = 1;
pub const USED_NO_NOTIFY: u16 = 1;

/// More descriptor flags of packed rings: which lap of which side a descriptor belongs to.
pub const PACKED_AVAIL: u16 = 1 << 7;
pub const PACKED_USED: u16 = 1 << 15;

/// Flags of the event structures of packed rings.
pub const EVENT_ENABLE: u16 = 0;
pub const EVENT_DISABLE: u16 = 1;
pub const EVENT_POSITION: u16 = 2;
/// Bytes of an event structure.
pub const EVENT_SIZE: u64 = 4;
