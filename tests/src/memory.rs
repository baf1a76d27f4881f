//! Memory that a client shares with the server it talks to: what would be guest RAM.
//!
//! All `unsafe` on shared memory of the tests is here. The other process may change the
//! memory at any time, so it is never borrowed: bytes are copied in and out, and ring
//! indices go through atomics.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const NAME: &CStr = c"upcall-test-guest";

/// A mapped memfd. Offsets out of its bounds are bugs of the test and panic.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    base: *mut u8,
    length: usize,
}

// SAFETY: the mapping belongs to no thread, and every access copies or is atomic.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; two threads of one test that copy to the same bytes at once get a mix,
// as with a device.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// `length` bytes of zeroes.
    pub fn new(length: usize) -> SharedMemory {
        SharedMemory::map(memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap(), length)
    }

    /// As [`new`](Self::new), of a size that nobody can change.
    pub fn sealed(length: usize) -> SharedMemory {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = SharedMemory::map(memfd_create(NAME, flags).unwrap(), length);
        fcntl_add_seals(&memory.fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        memory
    }

    fn map(fd: OwnedFd, length: usize) -> SharedMemory {
        ftruncate(&fd, length as u64).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .unwrap();
        SharedMemory { fd, base: base.cast(), length }
    }

    /// Its descriptor, for the other side.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where it is mapped here.
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length
    }

    /// The place of `length` bytes at `offset`.
    pub fn pointer(&self, offset: usize, length: usize) -> *mut u8 {
        let end = offset.checked_add(length).expect("offset overflows");
        assert!(end <= self.length, "{offset}+{length} is not in {} bytes", self.length);
        // SAFETY: offset <= length of the mapping, checked above.
        unsafe { self.base.add(offset) }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let target = self.pointer(offset, bytes.len());
        // SAFETY: the target lies in the mapping; `bytes` is ordinary memory of ours.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Copies from `offset` to `bytes`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.pointer(offset, bytes.len());
        // SAFETY: the source lies in the mapping; `bytes` is ordinary memory of ours.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// A copy of `length` bytes at `offset`.
    pub fn copy(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Reads a ring's index, after which what it announces can be read.
    pub fn load_u16(&self, offset: usize) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Acquire))
    }

    /// Writes a ring's index, after what it announces; what is read next is read after it.
    pub fn store_u16(&self, offset: usize, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Puts a byte in the place of another, at once.
    pub fn swap_u8(&self, offset: usize, value: u8) -> u8 {
        let place = self.pointer(offset, 1);
        // SAFETY: in the mapping; other processes use it as atomics, too.
        unsafe { AtomicU8::from_ptr(place) }.swap(value, Ordering::AcqRel)
    }

    fn atomic(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2), "unaligned index");
        let place = self.pointer(offset, 2).cast::<u16>();
        // SAFETY: in the mapping, aligned (mappings begin at pages), and accessed in no
        // other way while rings are live.
        unsafe { AtomicU16::from_ptr(place) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by new() with this length; no reference to it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.length) };
    }
}
