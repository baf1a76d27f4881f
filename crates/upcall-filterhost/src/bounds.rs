//! What a filter host may use of the machine.
//!
//! Always true: a filter host runs under these bounds before it hears of its filter, and once
//! [`impose`] was called it can no longer raise them (it gives up what it would need for that:
//! `confine.c`). What it
//! wants beyond them fails in the filter host, with ENOMEM, EAGAIN or EMFILE, and nowhere else.
//!
//! The bounds are resource limits of the kernel. RLIMIT_DATA counts private writable memory,
//! so it bounds the heap and the stacks of threads, and leaves out arenas and rings, which are
//! shared. RLIMIT_NPROC is not used: it counts all processes of a user, and not root's.

use std::io;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use upcall_abi::control::DESCRIPTORS_MAX;

/// What a filter host may use. What it is given itself comes on top, so that a filter has as
/// much on a disk with many queues as on one with few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Private memory of the filter: heap, and the stacks of threads that it starts.
    pub memory_bytes: u64,
    /// How many channels it is given.
    pub channels: usize,
    /// How many arenas it is given.
    pub arenas: usize,
    /// How many instances it is given.
    pub instances: usize,
}

impl Bounds {
    /// Memory of a filter that nothing else was said for.
    pub const MEMORY_BYTES: u64 = 256 << 20;
    /// Descriptors of a filter, beyond those that it is given.
    pub const DESCRIPTORS: u64 = 256;

    fn data_bytes(&self) -> u64 {
        let threads = OWN_THREADS.saturating_add(self.channels as u64);
        self.memory_bytes.saturating_add(threads.saturating_mul(STACK_BYTES))
    }

    fn descriptors(&self) -> u64 {
        let given = 3 * self.channels + self.arenas + DESCRIPTORS_MAX * self.instances;
        Bounds::DESCRIPTORS + given as u64
    }
}

impl Default for Bounds {
    /// For a filter host that was not given anything yet.
    fn default() -> Bounds {
        Bounds { memory_bytes: Bounds::MEMORY_BYTES, channels: 0, arenas: 0, instances: 0 }
    }
}

/// The stack of a thread, if it does not ask for another one: as main.c says.
const STACK_BYTES: u64 = 8 << 20;
/// Threads of the filter host itself: for blocking work (8), timers, and one to spare.
const OWN_THREADS: u64 = 10;
const LOCKED_BYTES: u64 = 64 << 10;

/// Bounds our child `pid`, which has just begun. The bounds that depend on what it will be
/// given can still be raised, by [`impose`].
pub(crate) fn begin(pid: Pid) -> io::Result<()> {
    // That of stacks it sets itself, see main.c.
    for (resource, most) in [(Resource::Core, 0), (Resource::Memlock, LOCKED_BYTES)] {
        prlimit(Some(pid), resource, fixed(resource, most))?;
    }
    for (resource, most) in of(&Bounds::default()) {
        let maximum = getrlimit(resource).maximum;
        prlimit(Some(pid), resource, Rlimit { maximum, ..fixed(resource, most) })?;
    }
    Ok(())
}

/// Sets the bounds of our child `pid` for good.
pub(crate) fn impose(pid: Pid, bounds: &Bounds) -> io::Result<()> {
    for (resource, most) in of(bounds) {
        prlimit(Some(pid), resource, fixed(resource, most))?;
    }
    Ok(())
}

fn of(bounds: &Bounds) -> [(Resource, u64); 2] {
    [(Resource::Data, bounds.data_bytes()), (Resource::Nofile, bounds.descriptors())]
}

/// At most `most`, and no more than we may hand on ourselves.
fn fixed(resource: Resource, most: u64) -> Rlimit {
    let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    Rlimit { current: Some(most), maximum: Some(most) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_is_given_does_not_count_against_its_filter() {
        let bare = Bounds::default();
        let busy = Bounds { channels: 64, arenas: 2, instances: 3, ..bare };
        assert_eq!(busy.data_bytes() - bare.data_bytes(), 64 * STACK_BYTES);
        assert_eq!(busy.descriptors() - bare.descriptors(), 3 * 64 + 2 + 3 * 32);
        let all = Bounds { memory_bytes: u64::MAX, ..busy };
        assert_eq!(all.data_bytes(), u64::MAX);
    }
}
