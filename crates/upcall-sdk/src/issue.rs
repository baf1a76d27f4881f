//! Requests of the filter's own.
//!
//! Always true: an issued request's closure is called exactly once, or comes back in
//! [`Refused`]; its buffer belongs to the framework in between and to nobody else.

use std::ffi::c_void;
use std::mem::size_of;
use std::ptr::{self, NonNull};

use crate::table::guard;
use crate::{Errno, Instance, Op, data, sys};

/// Memory for the data of issued requests. Freed when dropped.
///
/// The worker maps it too, and touches it only while a request with it is in flight;
/// meanwhile it is not reachable from here. Its methods say `false` or `None` when the
/// instance is closed and the memory may be gone.
pub struct Buffer {
    instance: Instance,
    bytes: NonNull<u8>,
    length: u32,
}

// SAFETY: the memory is the buffer's alone; it may be used and freed from any thread.
unsafe impl Send for Buffer {}

/// A request to issue.
pub struct Issue {
    op: Op,
    flags: u16,
    offset: u64,
    length: u32,
    disk: u32,
    buffer: Option<Buffer>,
}

/// An issued request that has ended.
pub struct Issued {
    /// How.
    pub result: Result<(), Errno>,
    /// The buffer, with the data of a read.
    pub buffer: Option<Buffer>,
}

/// A request that could not be issued; `done` was not and will not be called.
pub struct Refused<D> {
    /// Why: `EAGAIN`: too many in flight, try again after one has ended. `EINVAL`: op,
    /// alignment, range or buffer is wrong. `ENODEV`: no such granted disk. `EPERM`: the
    /// filter did not declare `issues`. `ESHUTDOWN`: the instance is closing.
    pub errno: Errno,
    /// The request, as it was.
    pub issue: Issue,
    /// The closure, as it was.
    pub done: D,
}

impl<D: FnOnce(Issued)> Refused<D> {
    /// Calls `done`, as if the request had been issued and had failed.
    pub fn finish(self) {
        (self.done)(Issued { result: Err(self.errno), buffer: self.issue.buffer });
    }
}

impl Issue {
    /// Fills the buffer from the disk.
    pub fn read(offset: u64, buffer: Buffer) -> Issue {
        Issue { buffer: Some(buffer), ..Issue::new(Op::Read, offset, 0) }
    }

    /// Writes the buffer to the disk.
    pub fn write(offset: u64, buffer: Buffer) -> Issue {
        Issue { buffer: Some(buffer), ..Issue::new(Op::Write, offset, 0) }
    }

    /// Makes durable what has completed.
    pub fn flush() -> Issue {
        Issue::new(Op::Flush, 0, 0)
    }

    /// Discards `length` bytes.
    pub fn discard(offset: u64, length: u32) -> Issue {
        Issue::new(Op::Discard, offset, length)
    }

    /// Zeroes `length` bytes.
    pub fn write_zeroes(offset: u64, length: u32) -> Issue {
        Issue::new(Op::WriteZeroes, offset, length)
    }

    /// On granted disk `index`, counting from 1, not on the instance's own.
    #[must_use]
    pub fn on_disk(self, index: u32) -> Issue {
        Issue { disk: index, ..self }
    }

    /// Write, discard, write zeroes: durable before it completes.
    #[must_use]
    pub fn fua(self, fua: bool) -> Issue {
        self.flag(sys::REQ_FUA, fua)
    }

    /// Write zeroes: the range may be deallocated.
    #[must_use]
    pub fn unmap(self, unmap: bool) -> Issue {
        self.flag(sys::REQ_UNMAP, unmap)
    }

    /// What it is to do.
    pub fn op(&self) -> Op {
        self.op
    }

    fn new(op: Op, offset: u64, length: u32) -> Issue {
        Issue { op, flags: 0, offset, length, disk: 0, buffer: None }
    }

    fn flag(self, flag: u16, on: bool) -> Issue {
        let flags = if on { self.flags | flag } else { self.flags & !flag };
        Issue { flags, ..self }
    }

    fn length(&self) -> u32 {
        self.buffer.as_ref().map_or(self.length, |buffer| buffer.length)
    }
}

impl Instance {
    /// Issues a request. It enters the chain just below the instance, or a granted disk,
    /// and the filter never sees it as a request. `done` is called once, on a thread of
    /// the framework, and must not block. At most 256 may be in flight per instance.
    // The refusal carries everything back by value; it is rare, and boxing it would make
    // the caller unpack it.
    #[allow(clippy::result_large_err)]
    pub fn issue<D>(&self, issue: Issue, done: D) -> Result<(), Refused<D>>
    where
        D: FnOnce(Issued) + Send + 'static,
    {
        if issue.buffer.as_ref().is_some_and(|buffer| !buffer.instance.is_same(self)) {
            return Err(Refused { errno: Errno::EINVAL, issue, done });
        }
        let flight = Box::into_raw(Box::new(Flight { issue, done }));
        // SAFETY: just made; ours alone until the framework has it.
        let issue = unsafe { &(*flight).issue };
        let io = sys::Issue {
            size: size_of::<sys::Issue>() as u32,
            op: issue.op as u8,
            reserved0: 0,
            flags: issue.flags,
            offset: sys::U64(issue.offset),
            length: issue.length(),
            disk: issue.disk,
            data: issue.buffer.as_ref().map_or(ptr::null_mut(), |b| b.bytes.as_ptr().cast()),
            done: ended::<D>,
            arg: flight.cast(),
        };
        // SAFETY: `io` is complete; `arg` is what `ended::<D>` expects, once.
        let status = self.open_call(|services, raw| unsafe { (services.issue)(raw, &io) });
        match status.and_then(Errno::result) {
            Ok(()) => Ok(()),
            Err(errno) => {
                // SAFETY: refused, so `done` is not called and the box is still ours.
                let Flight { issue, done } = *unsafe { Box::from_raw(flight) };
                Err(Refused { errno, issue, done })
            }
        }
    }

    /// Memory for an issued request, aligned to 4096 bytes; its content is undefined. At
    /// most 4 MiB at once, and 16 MiB in all instances of the filter in one VM. None if
    /// there is none left just now.
    pub fn buffer(&self, length: u32) -> Option<Buffer> {
        let bytes = self.shared.call(|services, raw| {
            // SAFETY: the instance is open.
            unsafe { (services.buffer_alloc)(raw, length) }
        })?;
        Some(Buffer { instance: self.clone(), bytes: NonNull::new(bytes)?.cast(), length })
    }
}

impl Buffer {
    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // a buffer is never empty
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Copies `from` over what begins `at` bytes in; false if the instance is closed.
    ///
    /// # Panics
    ///
    /// If there are not `from.len()` bytes from there.
    pub fn copy_from(&mut self, at: usize, from: &[u8]) -> bool {
        self.check(at, from.len());
        // SAFETY: checked above; `from` is not shared memory.
        self.with_bytes(|bytes, _| unsafe { data::copy(from.as_ptr(), bytes.add(at), from.len()) })
            .is_some()
    }

    /// Copies what begins `at` bytes in to `to`; false if the instance is closed.
    ///
    /// # Panics
    ///
    /// If there are not `to.len()` bytes from there.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) -> bool {
        self.check(at, to.len());
        // SAFETY: checked above; `to` is not shared memory.
        self.with_bytes(|bytes, _| unsafe { data::copy(bytes.add(at), to.as_mut_ptr(), to.len()) })
            .is_some()
    }

    /// Runs `use_bytes` with the memory, which cannot go away meanwhile.
    pub(crate) fn with_bytes<R>(&self, use_bytes: impl FnOnce(*mut u8, usize) -> R) -> Option<R> {
        self.instance.shared.call(|_, _| use_bytes(self.bytes.as_ptr(), self.len()))
    }

    fn check(&self, at: usize, length: usize) {
        assert!(
            at <= self.len() && length <= self.len() - at,
            "{length} bytes at {at} are not in the {} bytes of the buffer",
            self.len()
        );
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.instance.shared.call(|services, raw| {
            // SAFETY: of `buffer_alloc` of this instance, freed once, not in flight: a
            // buffer in flight is in a `Flight`, which only `ended` takes apart.
            unsafe { (services.buffer_free)(raw, self.bytes.as_ptr().cast()) }
        });
    }
}

struct Flight<D> {
    issue: Issue,
    done: D,
}

unsafe extern "C" fn ended<D: FnOnce(Issued)>(arg: *mut c_void, status: i32) {
    guard("the end of an issued request", || {
        // SAFETY: the framework calls once with what `Instance::issue` gave it.
        let flight = unsafe { Box::from_raw(arg.cast::<Flight<D>>()) };
        let Flight { issue, done } = *flight;
        done(Issued { result: Errno::result(status), buffer: issue.buffer });
    });
}
