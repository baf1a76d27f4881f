//! A command under way: which requests it becomes, one after the other.
//!
//! A command longer than a request may be goes in parts, so that a client that trims a
//! terabyte neither needs a longer request nor has more than one in flight for it.

use upcall_block::{DiskInfo, Errno, Op, Range, RequestFlags, Status};
use upcall_ring::ArenaSlice;

use crate::commands::{Command, Kind};

/// Longest part of a trim or write-zeroes, in bytes.
const PART_MAX: u64 = 1 << 30;
/// Longest part of a cache command: it is read, and the data forgotten.
pub(crate) const CACHE_PART_MAX: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct Job {
    pub command: Command,
    /// Memory for its data.
    pub slice: Option<ArenaSlice>,
    /// Bytes for which there was a request.
    begun: u64,
    flushed: bool,
}

/// A request that a command becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub op: Op,
    pub range: Range,
    pub flags: RequestFlags,
}

/// How many bytes of memory a command needs; 0: none.
pub(crate) fn memory(command: &Command) -> u32 {
    match command.kind {
        // Checked: not longer than a request with data may be.
        Kind::Read | Kind::Write { .. } => command.length as u32,
        Kind::Cache => command.length.min(CACHE_PART_MAX) as u32,
        _ => 0,
    }
}

impl Job {
    /// `slice`: as many bytes as [`memory`] says.
    pub fn new(command: Command, slice: Option<ArenaSlice>) -> Job {
        Job { command, slice, begun: 0, flushed: false }
    }

    /// The next request; none: there is nothing more to do. `write_through`: whatever is
    /// changed is durable before it ends.
    pub fn next_part(&mut self, disk: &DiskInfo, write_through: bool) -> Option<Part> {
        let Command { kind, offset, length, .. } = self.command;
        let none = RequestFlags::default();
        let durable = |fua: bool| RequestFlags { fua: fua || write_through, ..none };
        let (op, flags, part_max) = match kind {
            Kind::Flush => {
                let first = !std::mem::replace(&mut self.flushed, true);
                return first.then_some(Part { op: Op::Flush, range: Range::EMPTY, flags: none });
            }
            Kind::BlockStatus { .. } => return None,
            Kind::Read => (Op::Read, none, length),
            Kind::Write { fua } => (Op::Write, durable(fua), length),
            Kind::Cache => (Op::Read, none, CACHE_PART_MAX),
            Kind::Trim { fua } => (Op::Discard, durable(fua), PART_MAX),
            Kind::WriteZeroes { fua, no_hole } => {
                let flags = RequestFlags { unmap: !no_hole, ..durable(fua) };
                (Op::WriteZeroes, flags, PART_MAX)
            }
        };
        let here = (length - self.begun).min(part_max);
        // Both are whole blocks, as `begun` is; a length of 0 ends here.
        let range = Range::new(offset + self.begun, here, disk).ok().filter(|_| here > 0)?;
        self.begun += here;
        Some(Part { op, range, flags })
    }

    /// A request of it has ended; the command's own end, if that is it.
    pub fn handle_ended(&mut self, status: Status) -> Option<Result<(), Errno>> {
        match status {
            Err(errno) => Some(Err(errno)),
            Ok(()) if self.begun < self.command.length => None,
            Ok(()) => Some(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::OpSet;

    use super::*;

    fn disk() -> DiskInfo {
        DiskInfo {
            capacity: 1 << 40,
            block_size: 512,
            physical_block_size: 4096,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 4096,
        }
    }

    fn job(kind: Kind, offset: u64, length: u64) -> Job {
        Job::new(Command { kind, cookie: 1, offset, length }, None)
    }

    #[test]
    fn a_long_command_goes_in_parts_that_cover_it_once() {
        let length = (5 << 30) + 512;
        let mut job = job(Kind::WriteZeroes { fua: false, no_hole: true }, 1024, length);
        let mut at = 1024;
        loop {
            let part = job.next_part(&disk(), true).unwrap();
            assert_eq!((part.op, part.range.offset()), (Op::WriteZeroes, at));
            assert!(part.flags.fua && !part.flags.unmap);
            at += u64::from(part.range.length());
            if let Some(status) = job.handle_ended(Ok(())) {
                assert_eq!(status, Ok(()));
                break;
            }
        }
        assert_eq!(at, 1024 + length);
        assert_eq!(job.next_part(&disk(), true), None);
    }

    #[test]
    fn the_first_failure_ends_it() {
        let mut job = job(Kind::Trim { fua: false }, 0, 4 << 30);
        let part = job.next_part(&disk(), false).unwrap();
        assert!(!part.flags.fua);
        assert_eq!(job.handle_ended(Err(Errno::ENOSPC)), Some(Err(Errno::ENOSPC)));
    }

    #[test]
    fn one_request_does_where_one_is_enough() {
        let mut flush = job(Kind::Flush, 0, 0);
        assert_eq!(flush.next_part(&disk(), false).unwrap().op, Op::Flush);
        assert_eq!(flush.handle_ended(Ok(())), Some(Ok(())));
        assert_eq!(flush.next_part(&disk(), false), None);
        let mut write = job(Kind::Write { fua: true }, 512, 4096);
        assert!(write.next_part(&disk(), false).unwrap().flags.fua);
        assert_eq!(write.handle_ended(Ok(())), Some(Ok(())));
        assert_eq!(job(Kind::Read, 512, 0).next_part(&disk(), false), None, "nothing to read");
        let cache = Command { kind: Kind::Cache, cookie: 0, offset: 0, length: 1 << 40 };
        assert_eq!(memory(&cache), 1 << 20);
    }
}
