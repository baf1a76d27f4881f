//! Sizes: of a disk, of a request, and the check that one fits the other.

use crate::OpSet;

/// Most bytes of a request with data (read, write).
pub const DATA_LENGTH_MAX: u32 = 4 << 20;
/// Most bytes of any request.
pub const LENGTH_MAX: u32 = 0x7fff_fe00;

/// What a disk is, as the side above sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Bytes; a multiple of 512.
    pub capacity: u64,
    /// Logical block size in bytes: offsets and lengths are multiples of it. A power of
    /// two, 512 to 4096.
    pub block_size: u32,
    /// Physical block size in bytes, at least `block_size`: what a write should be a
    /// multiple of to be fast.
    pub physical_block_size: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// The operations it can do.
    pub ops: OpSet,
    /// Alignment in bytes at which discards have an effect.
    pub discard_granularity: u32,
}

/// A range of bytes of a disk, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    offset: u64,
    length: u32,
}

/// Why a range is not one of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// It does not begin and end at blocks.
    Unaligned,
    /// It ends behind the disk's end.
    PastEnd,
    /// It is longer than [`LENGTH_MAX`].
    TooLong,
}

impl Range {
    /// The empty range of a flush.
    pub const EMPTY: Range = Range { offset: 0, length: 0 };

    /// Checks `offset` and `length`, both in bytes, against a disk.
    pub fn new(offset: u64, length: u64, disk: &DiskInfo) -> Result<Range, RangeError> {
        let block = u64::from(disk.block_size);
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(RangeError::Unaligned);
        }
        if length > u64::from(LENGTH_MAX) {
            return Err(RangeError::TooLong);
        }
        match offset.checked_add(length) {
            Some(end) if end <= disk.capacity => Ok(Range { offset, length: length as u32 }),
            _ => Err(RangeError::PastEnd),
        }
    }

    /// Bytes from the start of the disk.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub const fn length(self) -> u32 {
        self.length
    }

    /// The part of it that begins `skip` bytes in and is at most `length` bytes long.
    #[must_use]
    pub fn part(self, skip: u32, length: u32) -> Range {
        let skip = skip.min(self.length);
        Range { offset: self.offset + u64::from(skip), length: length.min(self.length - skip) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_lies_in_the_disk_or_is_refused() {
        let disk = DiskInfo {
            capacity: 1 << 20,
            block_size: 512,
            physical_block_size: 4096,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 4096,
        };
        assert!(Range::new(0, 1 << 20, &disk).is_ok());
        assert_eq!(Range::new(512, 1 << 20, &disk), Err(RangeError::PastEnd));
        assert_eq!(Range::new(u64::MAX - 511, 512, &disk), Err(RangeError::PastEnd));
        assert_eq!(Range::new(1, 512, &disk), Err(RangeError::Unaligned));
        assert_eq!(Range::new(0, 513, &disk), Err(RangeError::Unaligned));
        assert_eq!(Range::new(0, 1 << 31, &disk), Err(RangeError::TooLong));
        let range = Range::new(512, 4096, &disk).unwrap();
        assert_eq!(
            (range.part(1024, 8192).offset(), range.part(1024, 8192).length()),
            (1536, 3072)
        );
        assert_eq!(range.part(5000, 1).length(), 0);
    }
}
