//! What the ring protocol is made of, so that loom can take its place: atomics by which the
//! sides agree, and plain words that the agreement keeps them from touching at once.
//!
//! [`Mapping`](crate::Mapping) does not use this: loom has no shared memory to model.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, Ordering, fence};

/// Words of the memory of a ring whose order is not theirs to give.
///
/// Two sides that follow the protocol never touch one at the same time. Loom checks exactly
/// that: to it they are cells, and an access that does not happen before or after every
/// other is an error. In production they are relaxed atomics, because the other side may be
/// an enemy, who then can make words old or new but not the program undefined.
macro_rules! plain {
    ($name:ident, $atomic:ident, $number:ident) => {
        #[cfg(not(loom))]
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub(crate) struct $name(std::sync::atomic::$atomic);

        #[cfg(not(loom))]
        impl $name {
            pub(crate) fn get(&self) -> $number {
                self.0.load(Ordering::Relaxed)
            }

            pub(crate) fn set(&self, value: $number) {
                self.0.store(value, Ordering::Relaxed);
            }
        }

        #[cfg(loom)]
        #[derive(Debug, Default)]
        pub(crate) struct $name(loom::cell::UnsafeCell<$number>);

        // SAFETY: loom stops the test at the first two accesses that could race.
        #[cfg(loom)]
        unsafe impl Sync for $name {}

        #[cfg(loom)]
        impl $name {
            pub(crate) fn get(&self) -> $number {
                // SAFETY: loom has checked that nobody writes meanwhile.
                self.0.with(|at| unsafe { *at })
            }

            pub(crate) fn set(&self, value: $number) {
                // SAFETY: loom has checked that nobody reads or writes meanwhile.
                self.0.with_mut(|at| unsafe { *at = value });
            }
        }
    };
}
plain!(PlainU32, AtomicU32, u32);
plain!(PlainU64, AtomicU64, u64);
