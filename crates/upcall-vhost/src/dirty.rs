//! Which pages of the guest's memory we have written, for a frontend that copies them
//! elsewhere meanwhile (live migration).
//!
//! The log is shared memory of the frontend's: a bit for each page of 4 KiB, by guest-physical
//! address. A page is marked *after* it was written, so that the frontend, which clears marks
//! before it copies, never keeps an older copy. What a request wrote is marked before the
//! driver sees it as used, and the ring's own pages after; a ring that starts marks its pages at
//! once, because a worker before us may have died between the two.
//!
//! Always true: off, it costs a relaxed load of one flag for each request; switched on, nothing
//! is written unmarked once the frontend hears that it is on; replaced, nothing is marked in the
//! old log once it hears of that. The log is only ever or-ed into, inside what was mapped: where
//! it does not cover the guest's memory, it was refused.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use rustix::fs::SealFlags;
use upcall_ring::{Access, Mapping, barrier_everywhere};

use crate::queue::Signal;

/// Bytes of guest memory for each bit.
const LOG_PAGE: u64 = 4096;
/// Bytes of guest memory for each word of the log.
const WORD_COVERS: u64 = LOG_PAGE * 64;
/// `mmap` wants offsets in files to be multiples of it.
const MAP_PAGE: u64 = 4096;

/// Why a log was not accepted. The hypervisor's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are the facts that the message names")]
pub enum LogError {
    /// Whole words of 64 bits, at least one, in whole words of the file.
    #[error("a log of {size} bytes at {offset}: must be whole words of 8 bytes")]
    Place { size: u64, offset: u64 },
    /// It could shrink under us. Hand over a sealed file.
    #[error("the file of the log can be made shorter")]
    Resizable,
    /// It is not memory, or shorter than told.
    #[error("cannot map the log")]
    Map(#[source] std::io::Error),
    /// Some page that we may write has no bit. Make the log larger first, and then add memory.
    #[error("the log covers guest addresses up to {covered:#x}, {what} ends at {end:#x}")]
    Short { covered: u64, what: &'static str, end: u64 },
}

/// A log, mapped.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mapping: Mapping,
    /// Where in the mapping it begins, in bytes.
    skip: usize,
    words: u64,
}

impl DirtyLog {
    /// Maps `size` bytes of `file` from `offset` on.
    pub fn map(file: impl AsFd, offset: u64, size: u64) -> Result<DirtyLog, LogError> {
        let skip = offset % MAP_PAGE;
        let end = size.checked_add(skip).and_then(|end| usize::try_from(end).ok());
        let (Some(length), true) = (end, size > 0 && (size | offset).is_multiple_of(8)) else {
            return Err(LogError::Place { size, offset });
        };
        let seals =
            rustix::fs::fcntl_get_seals(&file).map_err(|errno| LogError::Map(errno.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(LogError::Resizable);
        }
        let mapping =
            Mapping::new(file, offset - skip, length, Access::ReadWrite).map_err(LogError::Map)?;
        Ok(DirtyLog { mapping, skip: skip as usize, words: size / 8 })
    }

    /// The first guest-physical address that it has no bit for.
    pub fn covers(&self) -> u64 {
        self.words.saturating_mul(WORD_COVERS)
    }

    /// Marks all pages of `length` bytes at `at`; those that it has no bit for are nobody's.
    fn mark(&self, at: u64, length: u64) {
        if length == 0 {
            return;
        }
        let last = at.saturating_add(length - 1) / LOG_PAGE;
        let mut page = at / LOG_PAGE;
        while page <= last && page / 64 < self.words {
            let word = page / 64;
            // The bits of this word from `page` to `last`.
            let end = last.min(word * 64 + 63);
            let count = end - page + 1;
            let bits = if count == 64 { u64::MAX } else { ((1 << count) - 1) << (page % 64) };
            let place = self.skip + word as usize * 8;
            let number = self.mapping.atomic_u64(place);
            debug_assert!(number.is_some());
            if let Some(number) = number {
                // Release: whoever takes the mark sees what was written before.
                number.fetch_or(bits.to_le(), Ordering::Release);
            }
            page = end + 1;
        }
    }
}

/// The log of a connection, if it has one, for all its queues.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    on: AtomicBool,
    told: RwLock<Told>,
}

/// What the frontend told us.
#[derive(Debug, Default)]
struct Told {
    log: Option<DirtyLog>,
    /// Rung when something was marked.
    signal: Option<Signal>,
}

impl Dirty {
    /// Whether what is written has to be marked.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// What the log covers, if there is one; see [`DirtyLog::covers`].
    pub fn covers(&self) -> Option<u64> {
        self.read(|told| told.log.as_ref().map(DirtyLog::covers))
    }

    /// From its return on, marks are made in `log` alone.
    pub fn set_log(&self, log: Option<DirtyLog>) {
        self.told.write().unwrap_or_else(PoisonError::into_inner).log = log;
    }

    /// What to ring when something was marked.
    pub fn set_signal(&self, fd: Option<OwnedFd>) {
        self.told.write().unwrap_or_else(PoisonError::into_inner).signal = fd.map(Signal::new);
    }

    /// Switches it on or off. False: it is switched, but who runs may not have seen it yet, and
    /// has to be stopped for a moment.
    #[must_use]
    pub fn set_on(&self, on: bool) -> bool {
        if self.on.swap(on, Ordering::SeqCst) == on {
            return true;
        }
        seen_everywhere()
    }

    /// Marks what was written: address and length of each piece, guest-physical.
    pub fn mark(&self, written: impl IntoIterator<Item = (u64, u64)>) {
        self.read(|told| {
            if let Some(log) = &told.log {
                written.into_iter().for_each(|(at, length)| log.mark(at, length));
            }
        });
    }

    /// Says that something was marked, to who wants to hear it.
    pub fn signal(&self) {
        self.read(|told| told.signal.iter().for_each(Signal::ring));
    }

    fn read<T>(&self, look: impl FnOnce(&Told) -> T) -> T {
        look(&self.told.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Waits until every thread sees what was stored before. A thread that looked earlier, and saw
/// what was there then, has shown all that it had written when it looked.
#[must_use]
pub(crate) fn seen_everywhere() -> bool {
    barrier_everywhere().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use upcall_ring::memfd;

    fn marked(log: &DirtyLog) -> Vec<u64> {
        let is_marked = |page: &u64| {
            let byte = log.mapping.read_array::<1>(log.skip + (*page / 8) as usize).unwrap()[0];
            byte & 1 << (page % 8) != 0
        };
        (0..log.words * 64).filter(is_marked).collect()
    }

    fn log(words: u64) -> DirtyLog {
        let fd = memfd("log", 4096 * 2).unwrap();
        DirtyLog::map(&fd, 0, words * 8).unwrap()
    }

    #[test]
    fn every_page_that_is_touched_is_marked_and_no_other() {
        for (at, length, pages) in [
            (0, 1, 0..1),
            (4095, 1, 0..1),
            (4095, 2, 0..2),
            (63 * 4096, 4097, 63..65),
            (10 * 4096 + 1, 200 * 4096, 10..211),
            (64 * 4096, 64 * 4096, 64..128),
            (5, 0, 0..0),
        ] {
            let log = log(4);
            log.mark(at, length);
            assert_eq!(marked(&log), pages.collect::<Vec<_>>(), "{length} bytes at {at}");
        }
    }

    #[test]
    fn what_has_no_bit_is_left_alone() {
        for (at, length) in
            [(128 * 4096, 1), (u64::MAX, 1), (u64::MAX - 5, 100), (127 << 12, u64::MAX)]
        {
            let log = log(2);
            log.mark(at, length);
            assert!(marked(&log).iter().all(|page| *page == 127 && at == 127 << 12));
            // What follows the log in its file stays as it is.
            assert_eq!(log.mapping.len(), 16);
        }
    }

    #[test]
    fn a_log_may_begin_within_a_page_of_its_file_and_must_be_whole_words() {
        let fd = memfd("log", 8192).unwrap();
        let log = DirtyLog::map(&fd, 4096 + 64, 16).unwrap();
        log.mark(65 * 4096, 1);
        assert_eq!(marked(&log), [65]);
        let whole = Mapping::new(&fd, 0, 8192, Access::ReadOnly).unwrap();
        assert_eq!(whole.read_array::<1>(4096 + 64 + 8), Some([2]));
        for (offset, size) in [(0, 0), (4, 8), (0, 12), (8, u64::MAX - 7), (u64::MAX - 7, 8)] {
            let refused = DirtyLog::map(&fd, offset, size).unwrap_err();
            let is_place = matches!(refused, LogError::Place { .. } | LogError::Map(_));
            assert!(is_place, "{refused}");
        }
        assert!(matches!(DirtyLog::map(&fd, 4096, 8192), Err(LogError::Map(_))), "past the end");
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("log", flags).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert!(matches!(DirtyLog::map(&fd, 0, 8), Err(LogError::Resizable)));
    }
}
