//! Known bugs of others, to be planted here again: proof that our tests would see them.
//!
//! Only in tests, and behind the feature `plant`, which no product is built with. A bug is
//! chosen per thread by [`set`], or for the whole process by `UPCALL_PLANT=<name>`.

/// A bug, by its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The in-flight mark of slot 0 is cleared at start (SPDK #3766).
    InflightSlot0,
    /// After a restart the ring goes on behind all that is available (Cloud Hypervisor
    /// #8592): what was in flight is skipped.
    ResumeFromAvailable,
    /// A head that is in flight is taken again (CVE-2026-45782).
    DuplicateHead,
    /// What is in flight when a ring stops is forgotten (SPDK #3553).
    StopDropsInFlight,
    /// What was in flight is taken again in the order of its slots.
    RetryOrder,
    /// The last batch, shown to the driver but still marked, is not recovered.
    LastBatch,
    /// What is read into the guest's memory is not logged.
    UnloggedData,
    /// Status bytes are not logged (libvhost-user's users had to learn to count them).
    UnloggedStatus,
    /// The used ring is not logged.
    UnloggedRing,
    /// What a ring writes when it stops is not logged.
    UnloggedEnd,
    /// What a request writes is logged when it is taken, not when it is written.
    LoggedBefore,
    /// A ring that stops does not tell what a dead worker had begun and nobody ended.
    LeftForgotten,
}

#[cfg(any(test, feature = "plant"))]
impl Bug {
    /// Those of what is in flight.
    pub const ALL: [Bug; 6] = [
        Bug::InflightSlot0,
        Bug::ResumeFromAvailable,
        Bug::DuplicateHead,
        Bug::StopDropsInFlight,
        Bug::RetryOrder,
        Bug::LastBatch,
    ];
    /// Those of the log of what is written.
    pub const UNLOGGED: [Bug; 3] = [Bug::UnloggedData, Bug::UnloggedStatus, Bug::UnloggedRing];
    /// Those that show when a guest moves whose worker dies, or at its very end.
    pub const MOVED: [Bug; 3] = [Bug::UnloggedEnd, Bug::LoggedBefore, Bug::LeftForgotten];

    /// As in `UPCALL_PLANT`.
    pub const fn name(self) -> &'static str {
        match self {
            Bug::InflightSlot0 => "inflight-slot0",
            Bug::ResumeFromAvailable => "resume-from-available",
            Bug::DuplicateHead => "duplicate-head",
            Bug::StopDropsInFlight => "stop-drops-in-flight",
            Bug::RetryOrder => "retry-order",
            Bug::LastBatch => "last-batch",
            Bug::UnloggedData => "unlogged-data",
            Bug::UnloggedStatus => "unlogged-status",
            Bug::UnloggedRing => "unlogged-ring",
            Bug::UnloggedEnd => "unlogged-end",
            Bug::LoggedBefore => "logged-before",
            Bug::LeftForgotten => "left-forgotten",
        }
    }
}

/// Whether `bug` is planted. Never, in a product.
#[inline(always)]
pub(crate) fn is(bug: Bug) -> bool {
    #[cfg(any(test, feature = "plant"))]
    return planted::get() == Some(bug);
    #[cfg(not(any(test, feature = "plant")))]
    {
        let _ = bug;
        false
    }
}

#[cfg(any(test, feature = "plant"))]
pub use planted::set;

#[cfg(any(test, feature = "plant"))]
mod planted {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = Cell::new(
            std::env::var("UPCALL_PLANT")
                .ok()
                .and_then(|name| {
                    let all = Bug::ALL.into_iter().chain(Bug::UNLOGGED).chain(Bug::MOVED);
                    all.into_iter().find(|bug| bug.name() == name)
                }),
        );
    }

    pub(super) fn get() -> Option<Bug> {
        PLANTED.get()
    }

    /// Plants a bug in this thread, or pulls it out.
    pub fn set(bug: Option<Bug>) {
        PLANTED.set(bug);
    }
}
