//! Where a test lets the worker die: before any store to memory that outlives it.
//!
//! Each store to a guest's ring, to a status byte or to an in-flight region passes
//! `point`. A test that arms the countdown of its thread sees the store not happen and the
//! thread unwind, as if it had been killed there; what was stored before stays. Without the
//! feature `mock` there is nothing here, and nothing is compiled into the stores.

#[cfg(any(test, feature = "mock"))]
pub use armed::{Crashed, catch, passed};

/// A store is about to happen.
#[inline(always)]
pub(crate) fn point() {
    #[cfg(any(test, feature = "mock"))]
    armed::point();
}

#[cfg(any(test, feature = "mock"))]
mod armed {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// Stores that still happen; none: all of them.
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
        static PASSED: Cell<u64> = const { Cell::new(0) };
    }

    /// The armed countdown ended: the worker died there.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Crashed;

    pub fn point() {
        match LEFT.get() {
            Some(0) => {
                // Once: who unwinds may store something on its way.
                LEFT.set(None);
                resume_unwind(Box::new(Crashed));
            }
            left => LEFT.set(left.map(|left| left - 1)),
        }
        PASSED.set(PASSED.get() + 1);
    }

    /// Runs `work`, which dies on this thread before its store number `after` (from 0).
    /// Whatever `work` borrowed is then as a killed process leaves it: of use is only what
    /// lies in shared memory. Other panics go on.
    pub fn catch<T>(after: u64, work: impl FnOnce() -> T) -> Result<T, Crashed> {
        LEFT.set(Some(after));
        let result = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        result.map_err(|payload| match payload.downcast::<Crashed>() {
            Ok(crashed) => *crashed,
            Err(other) => resume_unwind(other),
        })
    }

    /// Stores that this thread has made so far.
    pub fn passed() -> u64 {
        PASSED.get()
    }
}
