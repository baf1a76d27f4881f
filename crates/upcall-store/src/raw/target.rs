//! What an opened image is: kind, size, and what its IO must be aligned to.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, FallocateFlags, FileType, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno as Raw;
use upcall_block::{DiskInfo, Op, OpSet};

use crate::OpenError;
use crate::raw::{RawOptions, aligned::AlignedMemory};

/// Whole blocks a guest can have; what needs more cannot be offered directly.
const BLOCK_SIZE_MAX: u32 = 4096;

/// What the kernel wants a transfer to be aligned to, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses in memory.
    pub memory: usize,
    /// Of offsets and of the length of each piece.
    pub length: usize,
}

impl Alignment {
    /// Of buffered IO.
    pub const NONE: Alignment = Alignment { memory: 1, length: 1 };
}

/// What is known of an image when it is open.
#[derive(Debug)]
pub(crate) struct Target {
    /// As the side above sees it.
    pub info: DiskInfo,
    /// What transfers must keep to.
    pub alignment: Alignment,
}

/// The kind of a file that cannot be a disk, if it is one.
pub(crate) fn not_a_disk(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::RegularFile | FileType::BlockDevice => None,
        FileType::Directory => Some("a directory"),
        FileType::CharacterDevice => Some("a character device"),
        FileType::Fifo => Some("a pipe"),
        FileType::Socket => Some("a socket"),
        _ => Some("something else"),
    }
}

impl Target {
    /// Looks at `file`, and sets its flags to what `options` ask for.
    pub fn of(file: &File, options: &RawOptions) -> Result<Target, OpenError> {
        let name = options.name();
        let system = |action| {
            let name = name.clone();
            move |source: Raw| OpenError::System { name, action, source: source.into() }
        };
        let stat = rustix::fs::fstat(file).map_err(system("look at it"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if let Some(kind) = not_a_disk(kind) {
            return Err(OpenError::NotADisk { name, kind });
        }
        set_flags(file, options)?;
        let is_device = kind == FileType::BlockDevice;
        let capacity = size(file).map_err(system("find out its size"))?;
        if capacity == 0 {
            return Err(OpenError::Empty { name });
        }
        if !capacity.is_multiple_of(512) {
            return Err(OpenError::Size { name, bytes: capacity, block_size: 512 });
        }

        let device_block = if is_device {
            rustix::fs::ioctl_blksszget(file).map_err(system("find out its block size"))?
        } else {
            512
        };
        let alignment = if options.direct {
            direct_alignment(file, is_device.then_some(device_block))
                .map_err(|reason| OpenError::NoDirect { name: name.clone(), reason })?
        } else {
            Alignment::NONE
        };
        let block_size = device_block.max(alignment.length as u32);
        if block_size > BLOCK_SIZE_MAX {
            let reason = format!("it needs blocks of {block_size} bytes");
            return Err(OpenError::NoDirect { name, reason });
        }
        if !capacity.is_multiple_of(u64::from(block_size)) {
            return Err(OpenError::Size { name, bytes: capacity, block_size });
        }
        let physical = if is_device {
            rustix::fs::ioctl_blkpbszget(file).map_err(system("find out its block size"))?
        } else {
            (stat.st_blksize as u32).min(BLOCK_SIZE_MAX)
        };
        let physical_block_size =
            if physical.is_power_of_two() { physical.max(block_size) } else { block_size };
        let info = DiskInfo {
            capacity,
            block_size,
            physical_block_size,
            read_only: options.read_only,
            ops: ops(file, is_device, options.read_only),
            discard_granularity: physical_block_size,
        };
        Ok(Target { info, alignment })
    }
}

/// Bytes of a regular file or a block device, now.
pub(crate) fn size(file: &File) -> Result<u64, Raw> {
    // For both kinds: reads and writes say their place themselves.
    rustix::fs::seek(file, SeekFrom::End(0))
}

/// O_DIRECT as asked, and neither O_APPEND (writes would go to the end) nor O_NONBLOCK.
fn set_flags(file: &File, options: &RawOptions) -> Result<(), OpenError> {
    let name = options.name();
    let system = |action, source: Raw| {
        let name = options.name();
        OpenError::System { name, action, source: source.into() }
    };
    let flags = rustix::fs::fcntl_getfl(file).map_err(|error| system("read its flags", error))?;
    let access = flags & OFlags::ACCMODE;
    if access == OFlags::WRONLY {
        return Err(OpenError::DescriptorMode { name, has: "writing only", wants: "reading too" });
    }
    if access == OFlags::RDONLY && !options.read_only {
        let wants = "reading and writing, or serve it read-only";
        return Err(OpenError::DescriptorMode { name, has: "reading only", wants });
    }
    let mut wanted = flags - OFlags::APPEND - OFlags::NONBLOCK - OFlags::DIRECT;
    if options.direct {
        wanted |= OFlags::DIRECT;
    }
    match rustix::fs::fcntl_setfl(file, wanted) {
        Ok(()) => Ok(()),
        Err(Raw::INVAL) if options.direct => {
            let reason = "the file system refuses O_DIRECT".to_owned();
            Err(OpenError::NoDirect { name, reason })
        }
        Err(error) => Err(system("set its flags", error)),
    }
}

/// What O_DIRECT wants: as statx says (Linux 6.1), or the logical block of a device, or what
/// the first read shows.
fn direct_alignment(file: &File, device_block: Option<u32>) -> Result<Alignment, String> {
    if let Ok(stat) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        return from_statx(stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    }
    if let Some(block) = device_block {
        return Ok(Alignment { memory: block as usize, length: block as usize });
    }
    for block in [512, 4096] {
        let mut memory = AlignedMemory::new(block, 4096);
        match rustix::io::pread(file, &mut memory.bytes_mut()[..block], 0) {
            Ok(_) => return Ok(Alignment { memory: block, length: block }),
            Err(Raw::INVAL) => {}
            Err(error) => return Err(io::Error::from(error).to_string()),
        }
    }
    Err("reads of 512 and of 4096 bytes are both refused".to_owned())
}

fn from_statx(memory: u32, offset: u32) -> Result<Alignment, String> {
    if memory == 0 || offset == 0 {
        return Err("the file system says that this file cannot".to_owned());
    }
    if !memory.is_power_of_two() || !offset.is_power_of_two() {
        return Err(format!("odd alignments: memory {memory}, offset {offset}"));
    }
    Ok(Alignment { memory: memory as usize, length: offset as usize })
}

/// What can be offered. Discard is not, if a hole punched behind the end of a file (which
/// changes nothing) is refused; a device refuses that for another reason, so it is believed
/// until the first discard shows otherwise.
fn ops(file: &File, is_device: bool, read_only: bool) -> OpSet {
    let reading = OpSet::NONE.with(Op::Read).with(Op::Flush);
    if read_only {
        return reading;
    }
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let behind_the_end = (i64::MAX as u64 / 2) & !0xffff;
    let can_discard = is_device
        || !matches!(
            rustix::fs::fallocate(file, mode, behind_the_end, 4096),
            Err(Raw::OPNOTSUPP | Raw::NOSYS)
        );
    let writing = reading.with(Op::Write).with(Op::WriteZeroes);
    if can_discard { writing.with(Op::Discard) } else { writing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_names_no_alignment_has_no_direct_io() {
        assert!(from_statx(0, 0).is_err());
        assert!(from_statx(4, 0).is_err());
        assert!(from_statx(4, 768).is_err());
        assert_eq!(from_statx(4, 512), Ok(Alignment { memory: 4, length: 512 }));
    }
}
