//! What a client is told of an export.

use upcall_block::{DATA_LENGTH_MAX, DiskInfo, Op};

use crate::wire::{TEXT_MAX, flag};

/// A disk as clients see it.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    name: String,
    description: String,
    disk: DiskInfo,
    fast_zero: bool,
}

/// Why there is no such export.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// Give it a shorter name.
    #[error("the name of an NBD export has at most {TEXT_MAX} bytes, this one has {length}")]
    NameTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Clients could not ask for it.
    #[error("the name of an NBD export has no control characters: {name:?}")]
    Name {
        /// The name.
        name: String,
    },
}

impl ExportInfo {
    /// A disk by this name. `disk.read_only` makes the export so, however the disk is
    /// otherwise. `fast_zero`: write-zeroes that may leave holes cost less than writes would.
    pub fn new(
        name: String,
        description: String,
        disk: DiskInfo,
        fast_zero: bool,
    ) -> Result<ExportInfo, ExportError> {
        if name.len() > TEXT_MAX {
            return Err(ExportError::NameTooLong { length: name.len() });
        }
        if name.chars().any(char::is_control) {
            return Err(ExportError::Name { name });
        }
        let description = description.chars().take(TEXT_MAX / 4).collect();
        Ok(ExportInfo { name, description, disk, fast_zero })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The disk.
    pub fn disk(&self) -> &DiskInfo {
        &self.disk
    }

    /// Whether a client may do `op`.
    pub fn offers(&self, op: Op) -> bool {
        self.disk.ops.contains(op) && !(self.disk.read_only && op.is_modification())
    }

    /// Whether a write-zeroes that must be fast can be.
    pub fn zeroes_fast(&self) -> bool {
        self.fast_zero && self.offers(Op::WriteZeroes)
    }

    /// Whether a client may ask for durability with a command. Without flush there is none.
    pub fn offers_fua(&self) -> bool {
        self.offers(Op::Flush)
    }

    /// The transmission flags. `chunked`: replies are structured or extended.
    ///
    /// A flush on one connection covers what completed on all others: there is one chain
    /// and one store behind all of them.
    pub(crate) fn flags(&self, chunked: bool) -> u16 {
        let when = |yes: bool, flag: u16| if yes { flag } else { 0 };
        flag::HAS_FLAGS
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE
            | when(self.disk.read_only, flag::READ_ONLY)
            | when(self.offers(Op::Flush), flag::SEND_FLUSH)
            | when(self.offers_fua() && !self.disk.read_only, flag::SEND_FUA)
            | when(self.offers(Op::Discard), flag::SEND_TRIM)
            | when(self.offers(Op::WriteZeroes), flag::SEND_WRITE_ZEROES)
            | when(self.offers(Op::WriteZeroes), flag::SEND_FAST_ZERO)
            | when(chunked, flag::SEND_DF)
    }

    /// Smallest, best and largest size of a request with data, in bytes.
    pub(crate) fn block_sizes(&self) -> [u32; 3] {
        let smallest = self.disk.block_size;
        let best = self.disk.physical_block_size.max(4096).next_power_of_two();
        [smallest, best.min(DATA_LENGTH_MAX), DATA_LENGTH_MAX]
    }
}
