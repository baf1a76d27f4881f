//! A shared mapping of a file, and how to touch it safely.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::buffers::Segment;

/// What a mapping may be used for. Writing to a read-only one is refused, not a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads only.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A file's bytes in this process's memory, shared with whoever else maps the file.
///
/// Every method checks its range and copies; `None` means that the range is not inside the
/// mapping (or not aligned, or not writable). Concurrent changes by other processes give
/// old, new or torn bytes, never undefined behaviour.
///
/// The file must not shrink while it is mapped (the kernel would deliver SIGBUS): seal what
/// is ours ([`memfd`]), and trust who sends the guest's memory for that alone.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
    access: Access,
}

// SAFETY: the mapping is only touched by volatile copies and atomics, which any thread may do.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a plain reference into the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` (a multiple of the page size). The file
    /// must be that long already.
    pub fn new(file: impl AsFd, offset: u64, length: usize, access: Access) -> io::Result<Mapping> {
        let size = rustix::fs::fstat(file.as_fd())?.st_size;
        let end = offset.checked_add(length as u64);
        if length == 0 || length > isize::MAX as usize || end.is_none_or(|end| end > size as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("cannot map {length} bytes at {offset} of a file of {size} bytes"),
            ));
        }
        let prot = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                prot,
                MapFlags::SHARED,
                file.as_fd(),
                offset,
            )?
        };
        let start =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned 0"))?;
        Ok(Mapping { start, length, access })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The address of `length` bytes at `offset`, if all of them are inside.
    fn at(&self, offset: usize, length: usize) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        if end > self.length {
            return None;
        }
        // SAFETY: `offset <= self.length` was just checked, so this stays in the mapping.
        Some(unsafe { self.start.as_ptr().add(offset) })
    }

    fn at_mut(&self, offset: usize, length: usize) -> Option<*mut u8> {
        if self.access == Access::ReadOnly {
            return None;
        }
        self.at(offset, length)
    }

    /// The address of `length` writable bytes at `offset`, for code in this crate that makes
    /// atomics of them and keeps the mapping.
    #[cfg(not(loom))]
    pub(crate) fn pointer(&self, offset: usize, length: usize) -> Option<NonNull<u8>> {
        self.at_mut(offset, length).and_then(NonNull::new)
    }

    fn at_aligned(&self, offset: usize, length: usize) -> Option<*mut u8> {
        self.at(offset, length).filter(|at| (*at as usize).is_multiple_of(length))
    }

    /// Copies bytes out of the mapping.
    #[must_use]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `at` checked the source; the target is ours alone.
        unsafe { copy(from, into.as_mut_ptr(), into.len()) };
        Some(())
    }

    /// Copies bytes into the mapping.
    #[must_use]
    pub fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        let into = self.at_mut(offset, from.len())?;
        // SAFETY: `at_mut` checked the target; the source is ours alone.
        unsafe { copy(from.as_ptr(), into, from.len()) };
        Some(())
    }

    /// Copies `N` bytes out of the mapping.
    #[must_use]
    pub fn read_array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes).map(|()| bytes)
    }

    /// The number at `offset`, as an atomic that other processes change too.
    pub fn atomic_u16(&self, offset: usize) -> Option<&AtomicU16> {
        let at = self.at_aligned(offset, 2)?;
        // SAFETY: in the mapping, aligned, lives as long as `self`; atomics may alias.
        Some(unsafe { AtomicU16::from_ptr(at.cast()) })
    }

    /// The number at `offset`, as an atomic that other processes change too.
    pub fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.at_aligned(offset, 4)?;
        // SAFETY: as in `atomic_u16`.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// The number at `offset`, as an atomic that other processes change too.
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.at_aligned(offset, 8)?;
        // SAFETY: as in `atomic_u16`.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// The `count` numbers from `offset`, as atomics that other processes change too.
    pub fn atomics_u64(&self, offset: usize, count: usize) -> Option<&[AtomicU64]> {
        let at = self.at_mut(offset, count.checked_mul(8)?)?;
        if !(at as usize).is_multiple_of(8) {
            return None;
        }
        // SAFETY: as in `atomic_u16`, for each of them; an atomic is as large as its number.
        Some(unsafe { std::slice::from_raw_parts(at.cast(), count) })
    }

    /// Stores a number; false if there is no room or no right to.
    #[must_use]
    pub fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) -> bool {
        match self.atomic_u16(offset) {
            Some(number) if self.access == Access::ReadWrite => {
                number.store(value, ordering);
                true
            }
            _ => false,
        }
    }

    /// A piece of the mapping to hand to the kernel. `writable`: the kernel shall fill it.
    pub fn segment(&self, offset: usize, length: usize, writable: bool) -> Option<Segment> {
        let at = if writable { self.at_mut(offset, length)? } else { self.at(offset, length)? };
        Some(Segment::new(NonNull::new(at)?, length))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this; nothing that refers to it outlives `self`
        // (segments are only used together with an Arc of their mapping, see Buffers).
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(result.is_ok());
    }
}

/// Copies between shared and private memory.
///
/// # Safety
/// `from` and `into` are valid for `length` bytes and do not overlap. One of them may be
/// changed by another process meanwhile: then the bytes copied are old, new or torn.
pub(crate) unsafe fn copy(from: *const u8, into: *mut u8, length: usize) {
    #[cfg(feature = "counting")]
    crate::counting::count(length);
    // The compiler could only misuse a race that it can see, between threads of this
    // process; it sees none, and a memmove is one opaque call to it. As vm-memory does for
    // long copies. Values are checked by the caller after the copy, never in place.
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from, into, length) }
}

/// Makes an anonymous shared file of `length` bytes that nobody can resize.
pub fn memfd(name: &str, length: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, length as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// A second descriptor of a memfd that cannot be mapped for writing.
pub fn read_only_view(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))?.into())
}

/// Keeps what `Segment`s point to mapped.
pub(crate) type Keep = Arc<dyn std::any::Any + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_access_is_inside_or_refused() {
        let fd = memfd("test", 8192).unwrap();
        let map = Mapping::new(&fd, 0, 8192, Access::ReadWrite).unwrap();
        assert!(map.write(8190, &[1, 2]).is_some());
        assert!(map.write(8191, &[1, 2]).is_none());
        assert!(map.read(usize::MAX, &mut [0; 2]).is_none());
        assert_eq!(map.read_array::<2>(8190), Some([1, 2]));
        assert!(map.atomic_u32(8190).is_none());
        assert!(map.atomic_u32(8188).is_some());
        assert!(map.atomic_u32(2).is_none(), "not aligned");
        assert!(map.atomics_u64(8184, 1).is_some());
        for (offset, count) in [(8184, 2), (8192, 1), (4, 1), (0, usize::MAX)] {
            assert!(map.atomics_u64(offset, count).is_none(), "{count} at {offset}");
        }
        assert!(map.segment(4096, 4097, false).is_none());
        assert!(Mapping::new(&fd, 4096, 8192, Access::ReadWrite).is_err(), "longer than the file");
    }

    #[test]
    fn a_read_only_view_cannot_be_mapped_for_writing() {
        let fd = memfd("test", 4096).unwrap();
        let view = read_only_view(&fd).unwrap();
        assert!(Mapping::new(&view, 0, 4096, Access::ReadWrite).is_err());
        let map = Mapping::new(&view, 0, 4096, Access::ReadOnly).unwrap();
        assert!(map.write(0, &[1]).is_none());
        assert!(map.segment(0, 16, true).is_none());
    }

    #[test]
    fn a_memfd_keeps_its_size() {
        let fd = memfd("test", 4096).unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert!(rustix::fs::ftruncate(&fd, 8192).is_err());
    }
}
