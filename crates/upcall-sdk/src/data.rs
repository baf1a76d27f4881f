//! The data of a request.
//!
//! The pages lie in memory that other processes map too: the worker, which does not touch
//! them while the filter owns the request, and the hosts of other data-changing filters
//! of the same disk, which should not, but could. A Rust slice promises the compiler that
//! nobody else writes; another vendor's filter must not be able to break that promise in
//! this one. So safe code gets no slice of the shared pages: it copies out, copies in, or
//! changes the data in place with [`DataMut::update`], 4096 bytes at a time on a private copy that
//! stays in the first-level cache. Whoever knows better takes the pointer.

use std::marker::PhantomData;

use crate::Buffer;

/// Bytes that [`Data::scan`] and [`DataMut::update`] show at once.
pub const CHUNK: usize = 4096;

/// A request's data, to read.
#[derive(Clone, Copy)]
pub struct Data<'r> {
    bytes: *const u8,
    length: usize,
    _request: PhantomData<&'r ()>,
}

/// A request's data, to read and to change.
pub struct DataMut<'r> {
    bytes: *mut u8,
    length: usize,
    _request: PhantomData<&'r mut ()>,
}

impl<'r> Data<'r> {
    /// # Safety
    ///
    /// `bytes` is readable for `length` bytes as long as `'r` lasts.
    pub(crate) unsafe fn new(bytes: *const u8, length: usize) -> Data<'r> {
        Data { bytes, length, _request: PhantomData }
    }

    /// Bytes; the request's length.
    #[allow(clippy::len_without_is_empty)] // data is never empty
    pub fn len(&self) -> usize {
        self.length
    }

    /// The pages themselves, for those who accept that others might write to them.
    pub fn as_ptr(&self) -> *const u8 {
        self.bytes
    }

    /// Copies what begins `at` bytes in to `to`.
    ///
    /// # Panics
    ///
    /// If there are not `to.len()` bytes from there.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        self.check(at, to.len());
        // SAFETY: the range was checked against the length that `new` vouches for; `to`
        // is private memory and cannot overlap.
        unsafe { copy(self.bytes.add(at), to.as_mut_ptr(), to.len()) }
    }

    /// Copies the first `to.len()` bytes to a buffer of [`crate::Instance::buffer`]; false
    /// if the instance is closed.
    ///
    /// # Panics
    ///
    /// If the data is shorter than the buffer.
    pub fn copy_to_buffer(&self, to: &mut Buffer) -> bool {
        self.check(0, to.len());
        // SAFETY: the buffer gives a pointer to `len` writable bytes of its own, which
        // are never a request's data.
        to.with_bytes(|bytes, length| unsafe { copy(self.bytes, bytes, length) }).is_some()
    }

    /// A private copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.length];
        self.copy_to(0, &mut copy);
        copy
    }

    /// Calls `look` with the offset and a copy of each piece of [`CHUNK`] bytes; the last
    /// may be shorter.
    pub fn scan(&self, mut look: impl FnMut(usize, &[u8])) {
        let mut chunk = [0; CHUNK];
        for at in (0..self.length).step_by(CHUNK) {
            let piece = &mut chunk[..CHUNK.min(self.length - at)];
            self.copy_to(at, piece);
            look(at, piece);
        }
    }

    fn check(&self, at: usize, length: usize) {
        assert!(
            at <= self.length && length <= self.length - at,
            "{length} bytes at {at} are not in the {} bytes of the request",
            self.length
        );
    }
}

impl<'r> DataMut<'r> {
    /// # Safety
    ///
    /// `bytes` is readable and writable for `length` bytes as long as `'r` lasts.
    pub(crate) unsafe fn new(bytes: *mut u8, length: usize) -> DataMut<'r> {
        DataMut { bytes, length, _request: PhantomData }
    }

    /// The same data, to read.
    pub fn as_data(&self) -> Data<'_> {
        // SAFETY: `new` vouches for more.
        unsafe { Data::new(self.bytes, self.length) }
    }

    /// Bytes; the request's length.
    #[allow(clippy::len_without_is_empty)] // data is never empty
    pub fn len(&self) -> usize {
        self.length
    }

    /// The pages themselves, for those who accept that others might write to them.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes
    }

    /// Copies `from` over what begins `at` bytes in.
    ///
    /// # Panics
    ///
    /// If there are not `from.len()` bytes from there.
    pub fn copy_from(&mut self, at: usize, from: &[u8]) {
        self.as_data().check(at, from.len());
        // SAFETY: the range was checked against the length that `new` vouches for; `from`
        // is private memory and cannot overlap.
        unsafe { copy(from.as_ptr(), self.bytes.add(at), from.len()) }
    }

    /// Calls `change` with the offset and a copy of each piece of [`CHUNK`] bytes (the
    /// last may be shorter), and puts back what `change` made of it.
    pub fn update(&mut self, mut change: impl FnMut(usize, &mut [u8])) {
        let mut chunk = [0; CHUNK];
        for at in (0..self.length).step_by(CHUNK) {
            let piece = &mut chunk[..CHUNK.min(self.length - at)];
            self.as_data().copy_to(at, piece);
            change(at, piece);
            self.copy_from(at, piece);
        }
    }
}

/// A copy to or from shared pages. Not inlined, so that the compiler cannot reason from
/// the private side back to the shared one and read it a second time.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`], except that another process may write to the
/// shared side meanwhile: the copy is then a mixture, and that is all.
#[inline(never)]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's duty.
    unsafe { std::ptr::copy_nonoverlapping(from, to, length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn update_visits_every_byte_once() {
        let mut bytes: Vec<u8> = (0..CHUNK as u32 * 2 + 512).map(|n| n as u8).collect();
        let expected: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x5a).collect();
        // SAFETY: the vector outlives the view and is not touched meanwhile.
        let mut data = unsafe { DataMut::new(bytes.as_mut_ptr(), bytes.len()) };
        let mut seen = Vec::new();
        data.update(|at, piece| {
            seen.push((at, piece.len()));
            piece.iter_mut().for_each(|byte| *byte ^= 0x5a);
        });
        assert_eq!(seen, [(0, 4096), (4096, 4096), (8192, 512)]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_copy_beyond_the_data_panics() {
        let bytes = [7_u8; 512];
        // SAFETY: the array outlives the view.
        let data = unsafe { Data::new(bytes.as_ptr(), bytes.len()) };
        let mut to = [0; 8];
        data.copy_to(504, &mut to);
        assert_eq!(to, [7; 8]);
        for at in [505, 513, usize::MAX] {
            let copied = std::panic::catch_unwind(|| data.copy_to(at, &mut [0; 8]));
            assert!(copied.is_err(), "copied from {at}");
        }
    }
}
