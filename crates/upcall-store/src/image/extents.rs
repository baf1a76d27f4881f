//! What an image consists of: asked of its daemon, over an NBD export of the same disk that only
//! reads.
//!
//! Two things make the answer true. The daemon sees one disk through both exports, so that a
//! write that it completed is in what it says. And a daemon that took the place of another is
//! not asked before all is back that the other had completed and not made durable: a read on the
//! ordinary way ends only then.
//!
//! Always true: what is called a hole or zeroes reads as zeroes, and whoever cannot be asked is
//! said to have data. A daemon that does not answer is not asked again, so that the disk's other
//! questions do not wait for it in vain; one that answers that it cannot tell is.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use upcall_block::{Allocation, Extent};

use crate::image::nbd::{Asking, FLAG_HOLE, FLAG_ZERO, Stretch};

/// Most that is asked at once: a daemon looks through its tables for it.
const QUESTION_BYTES_MAX: u64 = 1 << 30;
/// How long a daemon may look.
const PATIENCE: Duration = Duration::from_secs(5);
/// Daemons in a row that are gone before they answer.
const ATTEMPTS_MAX: u32 = 3;

/// The way to ask whichever daemon serves the disk; see the module.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    /// How many daemons there have been.
    generation: u64,
    /// None: this one cannot be asked.
    asking: Option<Asking>,
    /// It has all that those before it had completed.
    is_settled: bool,
}

/// Why there is no answer.
enum Silence {
    /// It is gone; there may be another.
    Gone,
    /// It cannot be asked, or says what cannot be.
    Dumb,
}

impl Oracle {
    /// A new daemon was started, with this connection to it. It is asked for the export `name`.
    pub fn renew(&self, socket: UnixStream, name: &str) {
        let asking = Asking::new(socket, name).ok();
        let mut now = self.now();
        *now = Now { generation: now.generation + 1, asking, is_settled: false };
    }

    /// What a stretch of the disk is, as [`Store::extents`](upcall_block::Store::extents) says
    /// it. `read`: reads a little of the disk, on the ordinary way, and says whether that was
    /// answered, with an error or without.
    pub fn extents(
        &self,
        offset: u64,
        length: u64,
        block_size: u32,
        max: usize,
        read: impl Fn() -> bool,
    ) -> Vec<Extent> {
        let asked = length.min(QUESTION_BYTES_MAX);
        for _ in 0..ATTEMPTS_MAX {
            match self.ask(offset, asked as u32, &read) {
                Ok(stretches) => {
                    let found = translate(&stretches, asked, block_size, max);
                    if !found.is_empty() {
                        return found;
                    }
                    break;
                }
                Err(Silence::Gone) => {}
                Err(Silence::Dumb) => break,
            }
        }
        vec![Extent { length, allocation: Allocation::Data }]
    }

    fn ask(
        &self,
        offset: u64,
        length: u32,
        read: &impl Fn() -> bool,
    ) -> Result<Vec<Stretch>, Silence> {
        let before = {
            let now = self.now();
            (!now.is_settled).then_some(now.generation)
        };
        if let Some(generation) = before {
            if !read() {
                return Err(Silence::Dumb);
            }
            let mut now = self.now();
            // Otherwise the read may have been a daemon's that is gone.
            if now.generation != generation {
                return Err(Silence::Gone);
            }
            now.is_settled = true;
        }
        let mut now = self.now();
        if !now.is_settled {
            return Err(Silence::Gone);
        }
        let asking = now.asking.as_mut().ok_or(Silence::Dumb)?;
        asking.ask(offset, length, PATIENCE).map_err(|error| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            now.asking = None;
            if matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset) {
                // The next read ends when the next daemon has all.
                now.is_settled = false;
                Silence::Gone
            } else {
                Silence::Dumb
            }
        })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Extents of whole blocks, neighbours of one kind joined. A block that is partly data is data;
/// so is one that is partly a hole and partly zeroes, which costs nothing but the knowledge.
fn translate(stretches: &[Stretch], length: u64, block_size: u32, max: usize) -> Vec<Extent> {
    let block = u64::from(block_size);
    let mut extents: Vec<Extent> = Vec::new();
    let (mut said, mut at) = (0, 0);
    for &(bytes, flags) in stretches {
        said = (said + u64::from(bytes)).min(length);
        let kind = kind(flags);
        // Data takes the block that it ends in; what reads as zeroes begins and ends with blocks.
        let end = match kind {
            Allocation::Data => said.next_multiple_of(block).min(length),
            _ => said / block * block,
        };
        push(&mut extents, &mut at, end, kind);
        if kind != Allocation::Data && end < said {
            push(&mut extents, &mut at, (end + block).min(length), Allocation::Data);
        }
        if extents.len() > max {
            break;
        }
    }
    extents.truncate(max);
    extents
}

/// From `at` to `end`, if that is anything.
fn push(extents: &mut Vec<Extent>, at: &mut u64, end: u64, allocation: Allocation) {
    if end <= *at {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.allocation == allocation => last.length += end - *at,
        _ => extents.push(Extent { length: end - *at, allocation }),
    }
    *at = end;
}

fn kind(flags: u32) -> Allocation {
    match (flags & FLAG_ZERO != 0, flags & FLAG_HOLE != 0) {
        // A hole that need not read as zeroes says nothing.
        (false, _) => Allocation::Data,
        (true, true) => Allocation::Hole,
        (true, false) => Allocation::Zero,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write;

    use super::*;
    use crate::image::nbd::tests::{answer, handshake};

    const DATA: u32 = 0;
    const HOLE: u32 = FLAG_HOLE | FLAG_ZERO;

    fn shown(extents: &[Extent]) -> Vec<(u64, char)> {
        let letter = |allocation| match allocation {
            Allocation::Data => 'd',
            Allocation::Zero => 'z',
            Allocation::Hole => 'h',
        };
        extents.iter().map(|extent| (extent.length, letter(extent.allocation))).collect()
    }

    #[test]
    fn flags_become_kinds_and_neighbours_of_a_kind_are_one() {
        let said = [(1024, DATA), (512, FLAG_HOLE), (512, FLAG_ZERO), (1024, HOLE), (512, HOLE)];
        let found = translate(&said, 1 << 20, 512, 100);
        assert_eq!(shown(&found), [(1536, 'd'), (512, 'z'), (1536, 'h')]);
        assert_eq!(shown(&translate(&said, 1 << 20, 512, 2)), [(1536, 'd'), (512, 'z')]);
        assert_eq!(shown(&translate(&said, 2048, 512, 9)), [(1536, 'd'), (512, 'z')]);
        assert_eq!(translate(&[], 512, 512, 9), []);
        assert_eq!(translate(&[(0, HOLE)], 512, 512, 9), []);
    }

    #[test]
    fn a_block_that_is_partly_data_is_data() {
        for (said, expected) in [
            (vec![(700, HOLE), (1348, DATA)], vec![(512, 'h'), (1536, 'd')]),
            (vec![(700, DATA), (1348, HOLE)], vec![(1024, 'd'), (1024, 'h')]),
            (vec![(100, HOLE), (100, DATA), (1848, HOLE)], vec![(512, 'd'), (1536, 'h')]),
            (vec![(700, HOLE), (1348, FLAG_ZERO)], vec![(512, 'h'), (512, 'd'), (1024, 'z')]),
            (vec![(u32::MAX, HOLE), (u32::MAX, DATA)], vec![(2048, 'h')]),
        ] {
            assert_eq!(shown(&translate(&said, 2048, 512, 9)), expected, "{said:?}");
        }
    }

    /// Random stretches: no block that has a byte of data is called anything else.
    #[test]
    fn whatever_is_said_no_data_is_called_zeroes() {
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            let said: Vec<Stretch> =
                (0..random(8)).map(|_| (random(2000) as u32, random(4) as u32)).collect();
            let (length, max) = (512 * (1 + random(16)), 1 + random(5) as usize);
            let flat = said.iter().flat_map(|(bytes, flags)| vec![kind(*flags); *bytes as usize]);
            let bytes: Vec<Allocation> = flat.take(length as usize).collect();
            let found = translate(&said, length, 512, max);
            assert!(found.len() <= max);
            let mut at = 0;
            for extent in found {
                assert!(extent.length > 0 && extent.length.is_multiple_of(512));
                let end = at + extent.length as usize;
                assert!(end as u64 <= length);
                if extent.allocation != Allocation::Data {
                    assert!(bytes[at..end].iter().all(|kind| *kind == extent.allocation));
                }
                at = end;
            }
        }
    }

    fn daemon(oracle: &Oracle) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        oracle.renew(ours, "disk");
        theirs
    }

    fn ready(oracle: &Oracle, kind: u32) -> UnixStream {
        let mut daemon = daemon(oracle);
        daemon.write_all(&handshake()).unwrap();
        daemon.write_all(&answer(1, 5, 1, &[7, 512, kind])).unwrap();
        daemon
    }

    #[test]
    fn a_daemon_is_asked_only_after_a_read_that_was_its_own() {
        let oracle = Oracle::default();
        let _old = ready(&oracle, DATA);
        let (reads, new) = (Cell::new(0), Cell::new(None));
        // The first daemon dies while it is read; what it would have said is not asked.
        let read = || {
            reads.set(reads.get() + 1);
            if reads.get() == 1 {
                new.set(Some(ready(&oracle, HOLE)));
            }
            true
        };
        assert_eq!(shown(&oracle.extents(0, 512, 512, 9, read)), [(512, 'h')]);
        assert_eq!(reads.get(), 2);
    }

    #[test]
    fn a_daemon_that_is_gone_is_followed_and_one_read_is_enough_for_each() {
        let oracle = Oracle::default();
        let mut first = ready(&oracle, HOLE);
        first.write_all(&answer(1, 5, 2, &[7, 512, DATA])).unwrap();
        let reads = Cell::new(0);
        let count = || {
            reads.set(reads.get() + 1);
            true
        };
        assert_eq!(shown(&oracle.extents(0, 512, 512, 9, count)), [(512, 'h')]);
        assert_eq!(shown(&oracle.extents(0, 512, 512, 9, count)), [(512, 'd')]);
        assert_eq!(reads.get(), 1);
        drop(first);
        let second = Cell::new(None);
        let next = || {
            count();
            if reads.get() == 2 {
                second.set(Some(ready(&oracle, FLAG_ZERO)));
            }
            true
        };
        assert_eq!(shown(&oracle.extents(0, 512, 512, 9, next)), [(512, 'z')]);
        assert_eq!(reads.get(), 3);
    }

    #[test]
    fn whoever_cannot_be_asked_has_data() {
        let oracle = Oracle::default();
        assert_eq!(shown(&oracle.extents(0, 4096, 512, 9, || true)), [(4096, 'd')]);
        let mut nonsense = daemon(&oracle);
        nonsense.write_all(&[0; 64]).unwrap();
        assert_eq!(shown(&oracle.extents(0, 4096, 512, 9, || true)), [(4096, 'd')]);
        let _unread = ready(&oracle, HOLE);
        assert_eq!(shown(&oracle.extents(0, 4096, 512, 9, || false)), [(4096, 'd')]);
        drop(daemon(&oracle));
        assert_eq!(shown(&oracle.extents(0, 4096, 512, 9, || true)), [(4096, 'd')]);
        let mut empty = daemon(&oracle);
        empty.write_all(&handshake()).unwrap();
        empty.write_all(&answer(1, 5, 1, &[7, 0, HOLE])).unwrap();
        assert_eq!(shown(&oracle.extents(0, 4096, 512, 9, || true)), [(4096, 'd')]);
    }
}
