//! One request's way to the kernel: which call comes next, and what its result means.
//!
//! A [`Job`] makes no system call. An engine asks it for the [`Next`] call, makes it, and
//! tells it the result by [`Job::record`], until it is [`Next::Done`]. Here alone is decided
//! what a short transfer means, when guest memory must be copied, how zeroes are made where
//! the file system has no way to, and that nothing is written after a failed flush.
//!
//! Durable writes (`fua`) are a write and then a sync by the store's flusher, not RWF_DSYNC:
//! such a write would take the kernel's once-only report of a failed write-back away from the
//! flush that is owed it (see [`Shared::sync`]).

use std::sync::atomic::Ordering;

use upcall_block::{Errno, Op, Status, StoreDone, StoreIo, StoreToken};

use crate::raw::aligned::AlignedMemory;
use crate::raw::shared::{Answer, Call, Shared, ZEROES_LENGTH};

/// Most pieces the kernel takes in one call.
const PIECES_MAX: usize = libc::UIO_MAXIOV as usize;
/// Most bytes that are copied for one call when guest memory does not fit.
const BOUNCE_LENGTH_MAX: usize = 1 << 20;
/// Most pieces of zeroes in one call: 4 MiB.
const ZERO_PIECES_MAX: usize = 64;
/// How often a call is made again in a row when it was interrupted.
const RETRIES_MAX: u32 = 1000;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The pieces of memory of a call, as the kernel wants to see them.
#[derive(Default)]
pub(crate) struct Pieces(pub Vec<libc::iovec>);

// SAFETY: addresses only; what they point to belongs to the job they were made for, and is
// memory that any thread may hand to the kernel.
unsafe impl Send for Pieces {}

/// A request on its way.
pub(crate) struct Job {
    io: StoreIo,
    /// Bytes that are over.
    done: usize,
    /// What the call in progress is to move, and how.
    step: Step,
    bounce: Option<AlignedMemory>,
    retries: u32,
    outcome: Option<Status>,
}

/// A call to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Fill the pieces from here.
    Read { offset: u64, length: usize },
    /// Write the pieces here.
    Write { offset: u64, length: usize },
    /// fallocate.
    Allocate { mode: i32, offset: u64, length: u64 },
}

/// What an engine does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Make this call; the pieces are filled in for it.
    Call(Step),
    /// Hand the token to the flusher, which completes it. The job is over.
    Flush(StoreToken),
    /// Report this. The job is over.
    Done(StoreDone),
}

impl Job {
    /// A request that has just come in.
    pub fn new(io: StoreIo, shared: &Shared) -> Job {
        let length = io.range.length() as usize;
        let outcome = if !shared.info.ops.contains(io.op) {
            let is_refused = shared.info.read_only && io.op.is_modification();
            Some(Err(if is_refused { Errno::EROFS } else { Errno::EOPNOTSUPP }))
        } else if io.op.has_data() && io.data.len() != length {
            Some(Err(Errno::EINVAL))
        } else if length == 0 {
            Some(Ok(()))
        } else {
            None
        };
        let step = Step::Read { offset: 0, length: 0 };
        Job { io, done: 0, step, bounce: None, retries: 0, outcome }
    }

    /// What to do now. For a call, `pieces` is filled; they stay valid while the job lives.
    pub fn next(&mut self, shared: &Shared, pieces: &mut Pieces) -> Next {
        loop {
            if let Some(next) = self.end(shared) {
                return next;
            }
            pieces.0.clear();
            self.step = match self.io.op {
                Op::Read | Op::Write => self.transfer(shared, pieces),
                Op::Discard | Op::WriteZeroes | Op::Flush => self.zeroing(shared, pieces),
            };
            match shared.ask(self.step.into()) {
                Answer::Make => return Next::Call(self.step),
                Answer::AtMost(length) => {
                    shorten(pieces, length);
                    return Next::Call(self.step);
                }
                Answer::Result(result) => self.record(shared, result),
            }
        }
    }

    /// How it ends, if it does.
    fn end(&self, shared: &Shared) -> Option<Next> {
        let token = self.io.token;
        let writes = self.io.op != Op::Read;
        let status = match self.outcome {
            Some(Ok(())) | None if writes && shared.has_failed() => Err(Errno::EIO),
            Some(Ok(())) if self.io.op == Op::Flush => return Some(Next::Flush(token)),
            Some(Ok(())) if writes && self.io.flags.fua => return Some(Next::Flush(token)),
            Some(status) => status,
            None => return None,
        };
        Some(Next::Done(StoreDone { token, status }))
    }

    fn offset(&self) -> u64 {
        self.io.range.offset() + self.done as u64
    }

    fn left(&self) -> usize {
        self.io.range.length() as usize - self.done
    }

    /// The next transfer: from or to the guest's memory if the kernel takes it as it is.
    fn transfer(&mut self, shared: &Shared, pieces: &mut Pieces) -> Step {
        let memory = shared.alignment.memory - 1;
        let (mut length, mut is_aligned) = (0, true);
        let mut skip = self.done;
        for (address, piece) in self.io.data.addresses() {
            let here = skip.min(piece);
            skip -= here;
            if here == piece {
                continue;
            }
            if pieces.0.len() == PIECES_MAX {
                break;
            }
            let (address, piece) = (address.wrapping_add(here), piece - here);
            is_aligned &=
                address as usize & memory == 0 && piece & (shared.alignment.length - 1) == 0;
            pieces.0.push(libc::iovec { iov_base: address.cast(), iov_len: piece });
            length += piece;
        }
        if !is_aligned {
            length = self.bounce(shared, pieces);
        } else {
            self.bounce = None;
        }
        let offset = self.offset();
        if self.io.op == Op::Read {
            Step::Read { offset, length }
        } else {
            Step::Write { offset, length }
        }
    }

    /// The next transfer through memory of ours; returns its length.
    fn bounce(&mut self, shared: &Shared, pieces: &mut Pieces) -> usize {
        let length = self.left().min(BOUNCE_LENGTH_MAX);
        let bounce = self.bounce.get_or_insert_with(|| {
            AlignedMemory::new(length, shared.alignment.memory.max(shared.alignment.length))
        });
        let bytes = &mut bounce.bytes_mut()[..length];
        if self.io.op == Op::Write {
            self.io.data.read(self.done, bytes);
        }
        pieces.0.clear();
        pieces.0.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: length });
        length
    }

    /// The next call that makes zeroes, by the best way this file system is not known to lack.
    fn zeroing(&mut self, shared: &Shared, pieces: &mut Pieces) -> Step {
        let gives_back = self.io.op == Op::Discard || self.io.flags.unmap;
        let (offset, length) = (self.offset(), self.left() as u64);
        if gives_back && !shared.no_punch.load(Ordering::Relaxed) {
            return Step::Allocate { mode: PUNCH, offset, length };
        }
        if !shared.no_zero_range.load(Ordering::Relaxed) {
            return Step::Allocate { mode: ZERO, offset, length };
        }
        let mut length = 0;
        while length < self.left() && pieces.0.len() < ZERO_PIECES_MAX {
            let piece = ZEROES_LENGTH.min(self.left() - length);
            let address = shared.zeroes().as_ptr().cast_mut().cast();
            pieces.0.push(libc::iovec { iov_base: address, iov_len: piece });
            length += piece;
        }
        Step::Write { offset, length }
    }

    /// The result of the call: bytes, or a negative errno.
    pub fn record(&mut self, shared: &Shared, result: i32) {
        let error = result.wrapping_neg();
        match (self.step, result) {
            (_, ..0) if matches!(error, libc::EINTR | libc::EAGAIN) => {
                self.retries += 1;
                if self.retries > RETRIES_MAX {
                    self.outcome = Some(Err(Errno::from_raw(error)));
                }
                return;
            }
            (Step::Allocate { mode, .. }, ..0)
                if matches!(error, libc::EOPNOTSUPP | libc::ENOSYS) =>
            {
                let lacks = if mode == PUNCH { &shared.no_punch } else { &shared.no_zero_range };
                lacks.store(true, Ordering::Relaxed);
            }
            (_, ..0) => self.outcome = Some(Err(Errno::from_raw(error))),
            (Step::Allocate { .. }, _) => self.outcome = Some(Ok(())),
            (Step::Read { length, .. } | Step::Write { length, .. }, moved) => {
                self.moved(shared, length, moved as usize);
            }
        }
        self.retries = 0;
    }

    /// Some bytes were moved. Direct IO goes on at a whole block: 5000 bytes of 8192 with
    /// blocks of 512 are taken as 4608. No progress is the end of the file, which is an error:
    /// the disk was longer when it was opened.
    fn moved(&mut self, shared: &Shared, length: usize, moved: usize) {
        let mut moved = moved.min(length);
        if moved < length {
            moved &= !(shared.alignment.length - 1);
        }
        if moved == 0 {
            self.outcome = Some(Err(Errno::EIO));
            return;
        }
        if self.io.op == Op::Read
            && let Some(bounce) = &self.bounce
        {
            self.io.data.write(self.done, &bounce.bytes()[..moved]);
        }
        self.done += moved;
        if self.left() == 0 {
            self.outcome = Some(Ok(()));
        }
    }
}

/// Cuts the pieces to `length` bytes in all.
fn shorten(pieces: &mut Pieces, mut length: usize) {
    for piece in &mut pieces.0 {
        piece.iov_len = piece.iov_len.min(length);
        length -= piece.iov_len;
    }
    pieces.0.retain(|piece| piece.iov_len > 0);
}

impl From<Step> for Call {
    fn from(step: Step) -> Call {
        match step {
            Step::Read { offset, length } => Call::Read { offset, length },
            Step::Write { offset, length } => Call::Write { offset, length },
            Step::Allocate { mode, offset, length } => Call::Allocate { mode, offset, length },
        }
    }
}
