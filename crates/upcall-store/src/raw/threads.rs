//! The engine for where io_uring is forbidden: a few threads per queue that make the calls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};

use upcall_block::{StoreDone, StoreIo, StoreQueue};

use crate::raw::Inbox;
use crate::raw::flusher::Flusher;
use crate::raw::job::{Job, Next, Pieces, Step};
use crate::raw::shared::Shared;
use crate::raw::sleep_on;

/// Calls in progress at a time, per queue.
const THREAD_COUNT: usize = 4;

/// A queue that hands its requests to threads.
pub(crate) struct ThreadsQueue {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    /// Submitted, not handed over yet.
    batch: Vec<Job>,
    in_flight: usize,
}

struct Pool {
    shared: Arc<Shared>,
    flusher: Arc<Flusher>,
    inbox: Arc<Inbox>,
    work: Mutex<Work>,
    wake: Condvar,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    stop: bool,
}

impl ThreadsQueue {
    pub fn new(shared: Arc<Shared>, flusher: Arc<Flusher>) -> io::Result<ThreadsQueue> {
        let pool = Arc::new(Pool {
            shared,
            flusher,
            inbox: Arc::new(Inbox::new()?),
            work: Mutex::default(),
            wake: Condvar::new(),
        });
        let mut queue = ThreadsQueue { pool, threads: vec![], batch: vec![], in_flight: 0 };
        for _ in 0..THREAD_COUNT {
            let pool = queue.pool.clone();
            let builder = Builder::new().name("store-io".into());
            queue.threads.push(builder.spawn(move || pool.run())?);
        }
        Ok(queue)
    }

    fn hand_over(&mut self) {
        let count = self.batch.len();
        if count == 0 {
            return;
        }
        self.pool.lock().jobs.extend(self.batch.drain(..));
        for _ in 0..count.min(THREAD_COUNT) {
            self.pool.wake.notify_one();
        }
    }
}

impl StoreQueue for ThreadsQueue {
    fn submit(&mut self, io: StoreIo) {
        self.in_flight += 1;
        self.batch.push(Job::new(io, &self.pool.shared));
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        self.hand_over();
        let before = out.len();
        self.pool.inbox.take(out);
        self.in_flight -= out.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pool.inbox.doorbell())
    }

    fn before_sleep(&mut self) -> bool {
        self.hand_over();
        self.pool.inbox.before_sleep()
    }
}

impl Drop for ThreadsQueue {
    fn drop(&mut self) {
        let mut out = Vec::new();
        while self.in_flight > 0 {
            self.poll(&mut out);
            if self.in_flight > 0 && self.before_sleep() {
                sleep_on(self.pool.inbox.doorbell());
            }
        }
        self.pool.lock().stop = true;
        self.pool.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn run(&self) {
        let mut pieces = Pieces::default();
        while let Some(mut job) = self.next() {
            loop {
                match job.next(&self.shared, &mut pieces) {
                    Next::Call(step) => {
                        let result = make(&self.shared, step, &pieces);
                        job.record(&self.shared, result);
                    }
                    Next::Flush(token) => break self.flusher.flush(token, &self.inbox),
                    Next::Done(done) => {
                        // The guest's memory is let go before the guest can hear of it.
                        drop(job);
                        break self.inbox.push(done);
                    }
                }
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let is_idle = |work: &mut Work| work.jobs.is_empty() && !work.stop;
        let mut work =
            self.wake.wait_while(self.lock(), is_idle).unwrap_or_else(|poison| poison.into_inner());
        work.jobs.pop_front()
    }
}

/// Makes a call; its result as io_uring would give it.
fn make(shared: &Shared, step: Step, pieces: &Pieces) -> i32 {
    let fd = shared.file.as_raw_fd();
    let (list, count) = (pieces.0.as_ptr(), pieces.0.len() as libc::c_int);
    let result = match step {
        // SAFETY: `pieces` were made for this step by a job that the caller holds until this
        // returns, and with it the memory they point to; the kernel bears any address.
        Step::Read { offset, .. } => unsafe { libc::preadv64(fd, list, count, offset as i64) },
        // SAFETY: as above; the kernel only reads.
        Step::Write { offset, .. } => unsafe { libc::pwritev64(fd, list, count, offset as i64) },
        Step::Allocate { mode, offset, length } => {
            // SAFETY: no memory is involved.
            unsafe { libc::fallocate64(fd, mode, offset as i64, length as i64) as isize }
        }
    };
    if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        // At most MAX_RW_COUNT, which is below 2 GiB.
        result as i32
    }
}
