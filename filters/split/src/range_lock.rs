//! Who may change which range of the disks now. No threads, no requests: only ranges.
//!
//! Always true: of two ranges that overlap, the one that came first is granted first, and the
//! other only when that has been released. Ranges that do not overlap never wait for each
//! other. Whatever was handed in comes out once.

use std::collections::VecDeque;
use std::ops::Range;

/// A granted range, to be released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// All ranges that are granted or wait, in the order of their arrival. As many as there are
/// requests in flight: few enough to look through.
pub struct RangeLock<T> {
    entries: VecDeque<Entry<T>>,
    next: u64,
}

struct Entry<T> {
    ticket: Ticket,
    range: Range<u64>,
    /// What waits for the range; none once it is granted.
    waiting: Option<T>,
}

impl<T> RangeLock<T> {
    /// Nothing is granted.
    pub fn new() -> RangeLock<T> {
        RangeLock { entries: VecDeque::new(), next: 0 }
    }

    /// Asks for `range`, in bytes. Gives `item` back with its ticket if it is granted at
    /// once; else it waits.
    pub fn acquire(&mut self, range: Range<u64>, item: T) -> Option<(Ticket, T)> {
        let ticket = Ticket(self.next);
        self.next += 1;
        let is_free = self.entries.iter().all(|entry| !overlap(&entry.range, &range));
        let (waiting, granted) =
            if is_free { (None, Some((ticket, item))) } else { (Some(item), None) };
        self.entries.push_back(Entry { ticket, range, waiting });
        granted
    }

    /// Gives a granted range back. What may go now comes out, in the order of arrival.
    pub fn release(&mut self, ticket: Ticket) -> Vec<(Ticket, T)> {
        self.entries.retain(|entry| entry.ticket != ticket);
        self.grant()
    }

    /// Takes out what waits and is no longer wanted; and what may go now because of that.
    pub fn remove(&mut self, is_meant: impl Fn(&T) -> bool) -> Option<(T, Vec<(Ticket, T)>)> {
        let index =
            self.entries.iter().position(|entry| entry.waiting.as_ref().is_some_and(&is_meant))?;
        let item = self.entries.remove(index)?.waiting?;
        Some((item, self.grant()))
    }

    fn grant(&mut self) -> Vec<(Ticket, T)> {
        let mut granted = Vec::new();
        for index in 0..self.entries.len() {
            let range = &self.entries[index].range;
            let is_free =
                self.entries.iter().take(index).all(|earlier| !overlap(&earlier.range, range));
            if is_free {
                let entry = &mut self.entries[index];
                granted.extend(entry.waiting.take().map(|item| (entry.ticket, item)));
            }
        }
        granted
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(granted: Vec<(Ticket, u32)>) -> Vec<u32> {
        granted.into_iter().map(|(_, item)| item).collect()
    }

    #[test]
    fn ranges_that_only_touch_do_not_wait() {
        let mut lock = RangeLock::new();
        assert!(lock.acquire(0..512, 1).is_some());
        assert!(lock.acquire(512..1024, 2).is_some());
        assert!(lock.acquire(511..513, 3).is_none());
    }

    #[test]
    fn overlapping_ranges_are_granted_in_the_order_of_arrival() {
        let mut lock = RangeLock::new();
        let (first, _) = lock.acquire(0..100, 1).unwrap();
        assert!(lock.acquire(50..150, 2).is_none());
        assert!(lock.acquire(0..200, 3).is_none());
        let second = lock.release(first);
        assert_eq!(second[0].1, 2, "3 overlaps 2, which came first");
        assert_eq!(second.len(), 1);
        assert_eq!(items(lock.release(second[0].0)), [3]);
    }

    #[test]
    fn one_that_waits_holds_up_those_behind_it() {
        let mut lock = RangeLock::new();
        let (first, _) = lock.acquire(0..100, 1).unwrap();
        assert!(lock.acquire(0..200, 2).is_none());
        assert!(lock.acquire(150..200, 3).is_none(), "free now, but 2 came first");
        let second = lock.release(first);
        assert_eq!(items(second), [2]);
    }

    #[test]
    fn one_release_may_grant_several() {
        let mut lock = RangeLock::new();
        let (first, _) = lock.acquire(0..100, 1).unwrap();
        assert!(lock.acquire(0..50, 2).is_none());
        assert!(lock.acquire(50..100, 3).is_none());
        assert_eq!(items(lock.release(first)), [2, 3]);
    }

    #[test]
    fn what_is_removed_lets_those_behind_it_go() {
        let mut lock = RangeLock::new();
        let (first, _) = lock.acquire(0..100, 1).unwrap();
        assert!(lock.acquire(0..200, 2).is_none());
        assert!(lock.acquire(150..200, 3).is_none());
        let (removed, granted) = lock.remove(|item| *item == 2).unwrap();
        assert_eq!((removed, items(granted)), (2, vec![3]));
        assert!(lock.remove(|item| *item == 1).is_none(), "1 is granted and does not wait");
        assert!(lock.release(first).is_empty());
    }

    #[test]
    fn random_ranges_never_overlap_while_granted_and_all_come_out() {
        for seed in 1..200_u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut next = |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            let mut lock = RangeLock::new();
            let mut granted: Vec<(Ticket, (u64, Range<u64>))> = Vec::new();
            let mut out = 0;
            for number in 0..100 {
                let start = next(20);
                let range = start..start + 1 + next(5);
                granted.extend(lock.acquire(range.clone(), (number, range)));
                while next(3) == 0 && !granted.is_empty() {
                    let index = next(granted.len() as u64) as usize;
                    out += 1;
                    granted.extend(lock.release(granted[index].0));
                    granted.remove(index);
                }
                for (index, (_, (_, one))) in granted.iter().enumerate() {
                    let is_alone = granted[..index].iter().all(|(_, (_, o))| !overlap(o, one));
                    assert!(is_alone, "seed {seed}: {granted:?}");
                }
            }
            while let Some((ticket, _)) = granted.pop() {
                out += 1;
                granted.extend(lock.release(ticket));
            }
            assert_eq!(out, 100, "seed {seed}");
            assert!(lock.entries.is_empty());
        }
    }
}
