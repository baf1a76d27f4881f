//! The io_uring engine: one ring per queue, used by the queue's thread alone.
//!
//! The ring is made disabled and enabled by the first thread that polls, which the kernel then
//! holds to be its only user; completions are worked off when that thread enters the kernel
//! (DEFER_TASKRUN), not in interrupts at arbitrary moments. A flag in shared memory says when
//! an entry is worth while, so polling an idle ring costs two loads.
//!
//! Never more calls are in the kernel than the ring has entries, so neither of its queues
//! overflows; the others wait in `backlog`. A slot holds a request and its iovecs from
//! submission to completion: the kernel may use both until then.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::types::Fixed;
use io_uring::{IoUring, Probe, opcode, squeue};
use upcall_block::{StoreDone, StoreIo, StoreQueue};

use crate::raw::Inbox;
use crate::raw::flusher::Flusher;
use crate::raw::job::{Job, Next, Pieces, Step};
use crate::raw::shared::Shared;
use crate::raw::sleep_on;

/// Calls in the kernel at a time, per queue.
const ENTRY_COUNT: u32 = 256;
/// While the device has at most `FEW` calls, so many are handed over at once: of three or more the
/// kernel lets the device begin none before it has taken them all, and it would idle meanwhile.
const BATCH: usize = 2;
const FEW: u32 = 32;
/// The store's file in the ring's table.
const FILE: Fixed = Fixed(0);

/// A queue with a ring of its own.
pub(crate) struct UringQueue {
    shared: Arc<Shared>,
    flusher: Arc<Flusher>,
    /// Completions of flushes. Its doorbell is the ring's too.
    inbox: Arc<Inbox>,
    ring: IoUring,
    is_enabled: bool,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slots that want a call.
    backlog: VecDeque<usize>,
    in_kernel: u32,
    in_flight: usize,
}

#[derive(Default)]
struct Slot {
    job: Option<Job>,
    pieces: Pieces,
}

impl UringQueue {
    pub fn new(shared: Arc<Shared>, flusher: Arc<Flusher>) -> io::Result<UringQueue> {
        let ring = setup()?;
        let inbox = Arc::new(Inbox::new()?);
        let submitter = ring.submitter();
        let mut known = Probe::new();
        submitter.register_probe(&mut known)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.into_iter().all(|code| known.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        submitter.register_files(&[shared.file.as_raw_fd()])?;
        submitter.register_eventfd(inbox.doorbell().as_raw_fd())?;
        Ok(UringQueue {
            shared,
            flusher,
            inbox,
            ring,
            is_enabled: false,
            slots: vec![],
            free: vec![],
            backlog: VecDeque::new(),
            in_kernel: 0,
            in_flight: 0,
        })
    }

    /// Hands what waits to the kernel, as far as there is room, and lets it work off completions.
    /// What needs no call (or no further one) is completed here.
    fn hand_over(&mut self, out: &mut Vec<StoreDone>) -> io::Result<()> {
        while self.in_kernel < ENTRY_COUNT
            && let Some(index) = self.backlog.pop_front()
        {
            let slot = &mut self.slots[index];
            let Some(job) = &mut slot.job else { continue };
            match job.next(&self.shared, &mut slot.pieces) {
                Next::Call(step) => {
                    let entry = entry(step, &slot.pieces).user_data(index as u64);
                    // SAFETY: the file is registered. The memory is the job's and the iovecs
                    // are the slot's; neither is touched or freed before the completion with
                    // this index is reaped, and dropping the queue waits for that.
                    let pushed = unsafe { self.ring.submission().push(&entry) };
                    assert!(pushed.is_ok(), "the ring has an entry for each call in the kernel");
                    self.in_kernel += 1;
                    if self.in_kernel <= FEW && self.ring.submission().len() >= BATCH {
                        self.enter()?;
                    }
                }
                Next::Flush(token) => {
                    self.release(index);
                    self.flusher.flush(token, &self.inbox);
                }
                Next::Done(done) => {
                    self.release(index);
                    out.push(done);
                }
            }
        }
        self.enter()
    }

    fn release(&mut self, index: usize) {
        self.slots[index].job = None;
        self.free.push(index);
    }

    /// Hands new entries to the kernel and lets it work off completions, if there is either.
    fn enter(&mut self) -> io::Result<()> {
        if !self.wants_enter() {
            return Ok(());
        }
        if !self.is_enabled {
            // From here on the kernel takes this thread for the ring's only user.
            self.ring.submitter().register_enable_rings()?;
            self.is_enabled = true;
        }
        match self.ring.submit() {
            Ok(_) => Ok(()),
            // Whatever was not taken stays in the ring for the next time.
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn wants_enter(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Takes completions out of the ring; jobs that are not over go back to the backlog.
    fn reap(&mut self) {
        let mut completions = self.ring.completion();
        completions.sync();
        for completion in &mut completions {
            let index = completion.user_data() as usize;
            self.in_kernel -= 1;
            if let Some(job) = &mut self.slots[index].job {
                job.record(&self.shared, completion.result());
                self.backlog.push_back(index);
            }
        }
    }

    /// One round. Fails only if the ring cannot be used from this thread.
    fn turn(&mut self, out: &mut Vec<StoreDone>) -> io::Result<()> {
        let before = out.len();
        self.inbox.take(out);
        let mut entered = self.hand_over(out);
        self.reap();
        if !self.backlog.is_empty() {
            entered = entered.and(self.hand_over(out));
        }
        self.in_flight -= out.len() - before;
        entered
    }
}

impl StoreQueue for UringQueue {
    fn submit(&mut self, io: StoreIo) {
        self.in_flight += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[index].job = Some(Job::new(io, &self.shared));
        self.backlog.push_back(index);
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        let result = self.turn(out);
        assert!(
            result.is_ok(),
            "a store queue belongs to the thread that polled it first: {result:?}"
        );
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.inbox.doorbell())
    }

    fn before_sleep(&mut self) -> bool {
        // Old rings are taken back first; then a completion is either seen here or rings.
        let is_quiet = self.inbox.before_sleep();
        let can_hand_over = !self.backlog.is_empty() && self.in_kernel < ENTRY_COUNT;
        is_quiet && !can_hand_over && !self.wants_enter() && self.ring.completion().is_empty()
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        let mut out = Vec::new();
        while self.in_flight > 0 {
            if self.turn(&mut out).is_err() {
                // Not the ring's thread. If that has ended, its calls ended with it and were
                // reaped just now. Otherwise nobody here can wait for them: the kernel may
                // write this memory at any time, so it is never freed, nor the image unlocked.
                if self.in_kernel > 0 {
                    std::mem::forget((std::mem::take(&mut self.slots), self.shared.clone()));
                }
                return;
            }
            if self.in_flight > 0 && self.before_sleep() {
                sleep_on(self.inbox.doorbell());
            }
        }
        // Otherwise the kernel holds the file, and its lock, until it has taken the ring down
        // in the background: tens of milliseconds.
        let _ = self.ring.submitter().unregister_files();
    }
}

/// A ring with the best settings this kernel knows, not enabled yet.
fn setup() -> io::Result<IoUring> {
    let mut best = IoUring::builder();
    best.setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all();
    let mut good = IoUring::builder();
    good.setup_r_disabled().setup_coop_taskrun().setup_taskrun_flag();
    let mut plain = IoUring::builder();
    plain.setup_r_disabled();
    let is_unknown = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    match best.build(ENTRY_COUNT) {
        Err(error) if is_unknown(&error) => match good.build(ENTRY_COUNT) {
            Err(error) if is_unknown(&error) => plain.build(ENTRY_COUNT),
            result => result,
        },
        result => result,
    }
}

/// Errors of an entry after which the next one may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}

fn entry(step: Step, pieces: &Pieces) -> squeue::Entry {
    let pieces = &pieces.0;
    let (list, count) = (pieces.as_ptr(), pieces.len() as u32);
    // One piece needs no list, and is at most a request long: below 2 GiB.
    let single = match pieces[..] {
        [piece] => Some((piece.iov_base.cast::<u8>(), piece.iov_len as u32)),
        _ => None,
    };
    match (step, single) {
        (Step::Read { offset, .. }, Some((address, length))) => {
            opcode::Read::new(FILE, address, length).offset(offset).build()
        }
        (Step::Read { offset, .. }, None) => {
            opcode::Readv::new(FILE, list, count).offset(offset).build()
        }
        (Step::Write { offset, .. }, Some((address, length))) => {
            opcode::Write::new(FILE, address, length).offset(offset).build()
        }
        (Step::Write { offset, .. }, None) => {
            opcode::Writev::new(FILE, list, count).offset(offset).build()
        }
        (Step::Allocate { mode, offset, length }, _) => {
            opcode::Fallocate::new(FILE, length).offset(offset).mode(mode).build()
        }
    }
}
