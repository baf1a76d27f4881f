//! The region of a split ring, as the vhost-user specification has it:
//!
//! | byte | what |
//! |---|---|
//! | 0 | features: 0 (8 bytes) |
//! | 8 | version: 1; 0 if not in use (2) |
//! | 10 | how many descriptors (2) |
//! | 12 | head of the list of the last batch (2) |
//! | 14 | the used ring's index, once the batch is accounted for (2) |
//! | 16 + 16·i | descriptor i, if it is a head: 1 if in flight (1), padding (5), next of the batch (2), counter (8) |
//!
//! Always true: whatever store is the last of a worker, what [`SplitTrack::open`] then finds
//! in flight is exactly what was taken and is not in the part of the used ring that the
//! driver can see.

use std::sync::atomic::Ordering;

use super::{COUNT_AT, RegionError, VERSION, VERSION_AT, is_in_use, mark};
use crate::memory::Place;
use crate::plant::{self, Bug};

pub(super) const HEADER_BYTES: usize = 16;
pub(super) const ENTRY_BYTES: usize = 16;
/// Padding of the first descriptor's state.
pub(super) const SPARE_AT: usize = 17;

const BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Where a descriptor's state is.
fn entry(head: u16) -> usize {
    HEADER_BYTES + usize::from(head) * ENTRY_BYTES
}

/// The region of a running ring. All heads are below the ring's size.
#[derive(Debug)]
pub(crate) struct SplitTrack {
    region: Place,
    /// The next request's.
    counter: u64,
    batch_head: u16,
}

impl SplitTrack {
    /// Begins to track a ring of `size` whose used index is `used`. Also gives the heads that
    /// are in flight, in the order in which they were taken; `None` if nobody tracked before.
    pub fn open(
        region: Place,
        size: u16,
        used: u16,
    ) -> Result<(SplitTrack, Option<Vec<u16>>), RegionError> {
        let mut track = SplitTrack { region, counter: 0, batch_head: 0 };
        if is_in_use(&track.region, size)? {
            let heads = track.recover(size, used)?;
            return Ok((track, Some(heads)));
        }
        for head in 0..size {
            track.region.store_u8(entry(head), 0);
        }
        track.region.store_u64(0, 0);
        track.region.store_u16(COUNT_AT, size, Ordering::Release);
        track.region.store_u16(BATCH_AT, 0, Ordering::Release);
        track.region.store_u16(USED_AT, used, Ordering::Release);
        track.region.store_u16(VERSION_AT, VERSION, Ordering::Release);
        Ok((track, None))
    }

    fn recover(&mut self, size: u16, used: u16) -> Result<Vec<u16>, RegionError> {
        let marks = (0..size).map(|head| mark(&self.region, head, entry(head)));
        let mut marks = marks.collect::<Result<Vec<bool>, _>>()?;
        let tracked = self.region.load_u16(USED_AT, Ordering::Relaxed);
        self.batch_head = self.region.load_u16(BATCH_AT, Ordering::Relaxed);
        if self.batch_head >= size {
            return Err(RegionError::Link { at: self.batch_head, size });
        }
        // With nothing in flight, a ring may have begun anew.
        if marks.contains(&true) && !plant::is(Bug::LastBatch) {
            let batch = used.wrapping_sub(tracked);
            if batch > size {
                return Err(RegionError::Batch { used, tracked, size });
            }
            let mut at = self.batch_head;
            for _ in 0..batch {
                let Some(mark) = marks.get_mut(usize::from(at)) else {
                    return Err(RegionError::Link { at, size });
                };
                *mark = false;
                self.region.store_u8(entry(at), 0);
                at = self.region.load_u16(entry(at) + NEXT_AT, Ordering::Relaxed);
            }
        }
        if plant::is(Bug::InflightSlot0) {
            marks[0] = false;
        }
        self.region.store_u16(USED_AT, used, Ordering::Release);
        let marked = (0..size).filter(|head| marks[usize::from(*head)]);
        let mut heads: Vec<(u64, u16)> =
            marked.map(|head| (self.region.load_u64(entry(head) + COUNTER_AT), head)).collect();
        if !plant::is(Bug::RetryOrder) {
            heads.sort_unstable();
        }
        self.counter = heads.iter().map(|(counter, _)| counter.wrapping_add(1)).max().unwrap_or(0);
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// `head` is taken: before anybody learns of it.
    pub fn take(&mut self, head: u16) {
        self.region.store_u64(entry(head) + COUNTER_AT, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.store_u8(entry(head), 1);
    }

    /// The used entry of `head` is written, but not shown.
    pub fn put(&mut self, head: u16) {
        self.region.store_u16(entry(head) + NEXT_AT, self.batch_head, Ordering::Release);
        self.region.store_u16(BATCH_AT, head, Ordering::Release);
        self.batch_head = head;
    }

    /// Those of `heads`, all that were put since the last time, are shown: the used index
    /// is `used`.
    pub fn published(&mut self, heads: &[u16], used: u16) {
        for &head in heads {
            self.region.store_u8(entry(head), 0);
        }
        self.region.store_u16(USED_AT, used, Ordering::Release);
    }

    /// A planted bug: see [`Bug::StopDropsInFlight`].
    pub fn forget(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            self.region.store_u8(entry(head), 0);
        }
    }
}
