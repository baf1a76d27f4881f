//! What the guest is told about its disk: configuration space and feature bits.
//!
//! Checked when it is made; only the write cache setting and the capacity change later, and
//! the capacity only grows. Shared by all connections and queues of a disk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use upcall_block::{DATA_LENGTH_MAX, DiskInfo, LENGTH_MAX, Op, Range, RangeError};

use crate::channel::BackendChannel;
use crate::virtio::*;

/// Bytes of the configuration space that have a meaning; what follows reads as zero.
const SPACE_SIZE: usize = 60;
/// Where the write cache setting is in it.
const WCE_OFFSET: usize = 32;

/// Most bytes of one piece of data. With `SEGMENTS_MAX` it keeps requests of guests that
/// heed both below [`DATA_LENGTH_MAX`].
const SIZE_MAX: u32 = 32 << 10;
const SEGMENTS_MAX: u16 = 126;
const _: () = assert!(SIZE_MAX * SEGMENTS_MAX as u32 <= DATA_LENGTH_MAX);

/// Most descriptors of a ring that a frontend may ask for.
const QUEUE_SIZE_MAX: u16 = 1024;
const QUEUES_MAX: u16 = 64;

/// What can be chosen about the device. The default suits a guest with few CPUs.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// How many rings are offered, 1 to 64. QEMU asks for one per virtual CPU by default
    /// and does not start if fewer are offered.
    pub queues: u16,
    /// Most descriptors in a ring: a power of two, 4 to 1024. The hypervisor chooses the
    /// size, QEMU 128 by default.
    pub queue_size_max: u16,
    /// The serial number that the guest sees: 20 bytes at most.
    pub serial: String,
    /// Whether the disk begins with a write cache that the guest flushes. Without, every
    /// write is durable before it completes. The guest may change it.
    pub write_cache: bool,
}

impl Default for BlkOptions {
    fn default() -> BlkOptions {
        BlkOptions { queues: 1, queue_size_max: 256, serial: String::new(), write_cache: true }
    }
}

/// Why a disk cannot be offered so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum ConfigError {
    /// Choose 1 to 64.
    #[error("{queues} queues: must be 1 to {QUEUES_MAX}")]
    Queues { queues: u16 },
    /// Choose a power of two.
    #[error("queue size {size}: must be a power of two, 4 to {QUEUE_SIZE_MAX}")]
    QueueSize { size: u16 },
    /// Shorten it.
    #[error("serial number of {length} bytes: must be {ID_SIZE} at most")]
    Serial { length: usize },
    /// The store reports sizes that no guest could use: a fault of the store.
    #[error(
        "block size {block_size} (physical {physical_block_size}): not powers of two, 512 to 4096 and not smaller"
    )]
    BlockSize { block_size: u32, physical_block_size: u32 },
    /// The store's size is not made of whole blocks: a fault of the store.
    #[error("capacity {capacity} is not a multiple of the block size {block_size}")]
    Capacity { capacity: u64, block_size: u32 },
}

/// A disk as its guest sees it.
#[derive(Debug)]
pub struct BlkConfig {
    /// As it was at first: its capacity is below.
    info: DiskInfo,
    capacity: AtomicU64,
    queues: u16,
    queue_size_max: u16,
    serial: [u8; ID_SIZE],
    write_cache: AtomicBool,
    /// Ways to the frontends that are connected.
    channels: Mutex<Vec<Weak<BackendChannel>>>,
}

impl BlkConfig {
    /// The disk `info`, offered as `options` say.
    pub fn new(info: DiskInfo, options: BlkOptions) -> Result<BlkConfig, ConfigError> {
        let BlkOptions { queues, queue_size_max, serial, write_cache } = options;
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(ConfigError::Queues { queues });
        }
        if !(4..=QUEUE_SIZE_MAX).contains(&queue_size_max) || !queue_size_max.is_power_of_two() {
            return Err(ConfigError::QueueSize { size: queue_size_max });
        }
        if serial.len() > ID_SIZE {
            return Err(ConfigError::Serial { length: serial.len() });
        }
        let DiskInfo { block_size, physical_block_size, capacity, .. } = info;
        if !block_size.is_power_of_two()
            || !(512..=4096).contains(&block_size)
            || !physical_block_size.is_power_of_two()
            || physical_block_size < block_size
        {
            return Err(ConfigError::BlockSize { block_size, physical_block_size });
        }
        if capacity % u64::from(block_size) != 0 {
            return Err(ConfigError::Capacity { capacity, block_size });
        }
        let mut id = [0; ID_SIZE];
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        let write_cache = AtomicBool::new(write_cache);
        Ok(BlkConfig {
            capacity: capacity.into(),
            info,
            queues,
            queue_size_max,
            serial: id,
            write_cache,
            channels: Mutex::default(),
        })
    }

    /// The disk, as it was at first: its capacity may be [larger](Self::capacity) by now.
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// Bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// The disk has `capacity` bytes from now on, and can do requests up to there already;
    /// whoever is connected is told. Whole blocks; false if it is not more than before: then
    /// nothing changes. From any thread; does not block.
    pub fn grow(&self, capacity: u64) -> bool {
        assert!(capacity.is_multiple_of(self.info.block_size.into()), "whole blocks");
        if self.capacity.fetch_max(capacity, Ordering::AcqRel) >= capacity {
            return false;
        }
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.iter().filter_map(Weak::upgrade).for_each(|channel| channel.say_config_change());
        true
    }

    /// Tells `channel` of changes for as long as it lives.
    pub(crate) fn add_channel(&self, channel: &Arc<BackendChannel>) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.strong_count() > 0);
        channels.push(Arc::downgrade(channel));
    }

    /// Checks a range of bytes against the disk as it is now.
    pub(crate) fn range(&self, offset: u64, length: u64) -> Result<Range, RangeError> {
        Range::new(offset, length, &DiskInfo { capacity: self.capacity(), ..self.info.clone() })
    }

    /// How many rings are offered.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Most descriptors of a ring.
    pub fn queue_size_max(&self) -> u16 {
        self.queue_size_max
    }

    /// The serial number, padded with zeroes.
    pub(crate) fn serial(&self) -> [u8; ID_SIZE] {
        self.serial
    }

    /// Whether the guest was told that it must flush.
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Relaxed)
    }

    /// As the guest wishes. Running queues heed it from their next request on. It outlives
    /// a connection: QEMU does not say it again when it reconnects.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
    }

    /// The virtio features offered.
    pub(crate) fn features(&self) -> u64 {
        let mut features = BLK_SIZE_MAX
            | BLK_SEG_MAX
            | BLK_GEOMETRY
            | BLK_BLK_SIZE
            | BLK_TOPOLOGY
            | BLK_MQ
            | RING_INDIRECT_DESC
            | RING_EVENT_IDX
            | RING_PACKED
            | PROTOCOL_FEATURES
            | LOG_ALL
            | VERSION_1;
        let ops = self.info.ops;
        if ops.contains(Op::Flush) {
            features |= BLK_FLUSH | BLK_CONFIG_WCE;
        }
        if self.info.read_only {
            return features | BLK_RO;
        }
        if ops.contains(Op::Discard) {
            features |= BLK_DISCARD;
        }
        if ops.contains(Op::WriteZeroes) {
            features |= BLK_WRITE_ZEROES;
        }
        features
    }

    /// Most bytes of a discard or write-zeroes: whole blocks.
    fn range_max(&self) -> u32 {
        LENGTH_MAX & !(self.info.block_size - 1)
    }

    /// `length` bytes of the configuration space from `offset` on.
    pub(crate) fn read_space(&self, offset: u32, length: u32) -> Vec<u8> {
        let space = self.space();
        let byte = |at: u64| usize::try_from(at).ok().and_then(|at| space.get(at)).copied();
        (0..u64::from(length)).map(|at| byte(u64::from(offset) + at).unwrap_or(0)).collect()
    }

    /// Whether these bytes are the write cache setting and nothing else.
    pub(crate) fn is_write_cache(offset: u32, length: usize) -> bool {
        offset as usize == WCE_OFFSET && length == 1
    }

    /// `struct virtio_blk_config`, little endian.
    fn space(&self) -> [u8; SPACE_SIZE] {
        let DiskInfo { block_size, physical_block_size, .. } = self.info;
        let sectors = self.capacity() / SECTOR_SIZE;
        let (heads, track) = (16u8, 63u8);
        let cylinders = (sectors / (u64::from(heads) * u64::from(track))).min(16383) as u16;
        let segments = SEGMENTS_MAX.min(self.queue_size_max - 2);
        let physical_blocks = physical_block_size / block_size;
        let range_sectors = self.range_max() / SECTOR_SIZE as u32;
        let discard_alignment =
            (self.info.discard_granularity.max(block_size)) / SECTOR_SIZE as u32;

        let mut space = [0; SPACE_SIZE];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &u32::from(segments).to_le_bytes());
        put(16, &cylinders.to_le_bytes());
        put(18, &[heads, track]);
        put(20, &block_size.to_le_bytes());
        put(24, &[physical_blocks.trailing_zeros() as u8, 0]);
        put(26, &(physical_blocks.min(u16::MAX.into()) as u16).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(WCE_OFFSET, &[self.write_cache().into(), 0]);
        put(34, &self.queues.to_le_bytes());
        put(36, &range_sectors.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &discard_alignment.to_le_bytes());
        put(48, &range_sectors.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upcall_block::OpSet;

    fn config(capacity: u64) -> BlkConfig {
        let info = DiskInfo {
            capacity,
            block_size: 512,
            physical_block_size: 4096,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 4096,
        };
        BlkConfig::new(info, BlkOptions::default()).unwrap()
    }

    #[test]
    fn a_disk_grows_in_what_is_told_and_in_what_is_served_and_never_shrinks() {
        let config = config(1 << 20);
        let told = |config: &BlkConfig| config.read_space(0, 8);
        assert_eq!(config.range(1 << 20, 512), Err(RangeError::PastEnd));
        assert!(config.grow(2 << 20));
        assert_eq!(told(&config), 4096u64.to_le_bytes());
        assert!(config.range((2 << 20) - 512, 512).is_ok());
        assert_eq!(config.range(2 << 20, 512), Err(RangeError::PastEnd));
        for capacity in [2 << 20, 1 << 20, 0] {
            assert!(!config.grow(capacity));
            assert_eq!(config.capacity(), 2 << 20);
        }
    }

    #[test]
    fn channels_of_frontends_that_are_gone_are_forgotten() {
        let config = config(1 << 20);
        for _ in 0..1000 {
            config.add_channel(&Arc::new(BackendChannel::default()));
        }
        assert_eq!(config.channels.lock().unwrap().len(), 1);
    }
}
