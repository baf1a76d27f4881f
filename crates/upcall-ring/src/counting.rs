//! How many bytes a thread has copied between shared and private memory: for tests that bound
//! it. Not in a program, unless it was built with the feature `counting`.

use std::cell::Cell;

thread_local! {
    static COPIED: Cell<u64> = const { Cell::new(0) };
}

pub(crate) fn count(bytes: usize) {
    COPIED.with(|sum| sum.set(sum.get() + bytes as u64));
}

/// Bytes that the calling thread has copied so far.
pub fn copied_bytes() -> u64 {
    COPIED.with(Cell::get)
}
