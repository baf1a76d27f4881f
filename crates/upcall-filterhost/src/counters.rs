//! The counters of one filter instance: a page that the filter host writes and we read.
//!
//! The page is hostile: names are cleaned, numbers are whatever they are. It costs the
//! filter no call to count, and us no message to look.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use upcall_abi::control::{COUNTERS, COUNTERS_SIZE};
use upcall_ring::{Access, Mapping, memfd};

use crate::text::clean;

const ENTRY_SIZE: usize = 64;
const NAME_SIZE: usize = 48;
const _: () = assert!(COUNTERS * ENTRY_SIZE <= COUNTERS_SIZE);

/// The counters page of one instance. Cheap to clone; any thread may look.
#[derive(Clone, Debug)]
pub struct Counters {
    fd: Arc<OwnedFd>,
    page: Arc<Mapping>,
}

impl Counters {
    /// An empty page, to be given to [`open`](crate::HostProcess::open).
    pub fn new() -> io::Result<Counters> {
        let fd = memfd("upcall-counters", COUNTERS_SIZE)?;
        let page = Mapping::new(&fd, 0, COUNTERS_SIZE, Access::ReadOnly)?;
        Ok(Counters { fd: Arc::new(fd), page: Arc::new(page) })
    }

    /// Names and values of the counters that the filter has named so far, in that order.
    pub fn snapshot(&self) -> Vec<(String, u64)> {
        (0..COUNTERS).map_while(|index| self.counter(index)).collect()
    }

    fn counter(&self, index: usize) -> Option<(String, u64)> {
        let entry = self.page.read_array::<ENTRY_SIZE>(index * ENTRY_SIZE)?;
        let name = entry[..NAME_SIZE].split(|byte| *byte == 0).next()?;
        if name.is_empty() {
            return None;
        }
        let value: [u8; 8] = entry[NAME_SIZE..NAME_SIZE + 8].try_into().ok()?;
        Some((clean(name, NAME_SIZE), u64::from_le_bytes(value)))
    }
}

impl AsFd for Counters {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(counters: &Counters, index: usize, name: &[u8], value: u64) {
        let page = Mapping::new(counters, 0, COUNTERS_SIZE, Access::ReadWrite).unwrap();
        page.write(index * ENTRY_SIZE, name).unwrap();
        page.write(index * ENTRY_SIZE + NAME_SIZE, &value.to_le_bytes()).unwrap();
    }

    #[test]
    fn counters_show_in_the_order_in_which_they_were_named() {
        let counters = Counters::new().unwrap();
        assert_eq!(counters.snapshot(), []);
        write(&counters, 0, b"hits", 7);
        write(&counters, 1, b"misses", u64::MAX);
        assert_eq!(counters.snapshot(), [("hits".into(), 7), ("misses".into(), u64::MAX)]);
    }

    #[test]
    fn a_hostile_page_gives_clean_names_and_ends() {
        let counters = Counters::new().unwrap();
        for index in 0..COUNTERS {
            write(&counters, index, &[0x1b; NAME_SIZE], 1);
        }
        let seen = counters.snapshot();
        assert_eq!(seen.len(), COUNTERS);
        assert!(seen.iter().all(|(name, _)| name.chars().all(|char| !char.is_control())));
    }
}
