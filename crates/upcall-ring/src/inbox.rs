//! Completions on their way from other threads to a queue's thread.
//!
//! Always true: what was pushed is taken exactly once, and a reader that went to sleep by
//! [`Inbox::before_sleep`] is woken by what is pushed later.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Doorbell;

/// Filled by any thread, emptied by one. Deliveries ring the doorbell only for a reader that
/// said that it sleeps; others who share the doorbell (a ring) may ring it at any time.
#[derive(Debug)]
pub struct Inbox<T> {
    done: Mutex<Vec<T>>,
    has_some: AtomicBool,
    is_asleep: AtomicBool,
    doorbell: Doorbell,
}

impl<T> Inbox<T> {
    /// An empty one.
    pub fn new() -> std::io::Result<Inbox<T>> {
        Ok(Inbox {
            done: Mutex::new(vec![]),
            has_some: AtomicBool::new(false),
            is_asleep: AtomicBool::new(false),
            doorbell: Doorbell::new()?,
        })
    }

    /// Any thread: delivers.
    pub fn push(&self, done: T) {
        self.lock().push(done);
        // Both sides write one flag, then read the other's (SeqCst): so either this thread
        // sees the sleeper or the sleeper sees the delivery.
        self.has_some.store(true, Ordering::SeqCst);
        if self.is_asleep.swap(false, Ordering::SeqCst) {
            self.doorbell.ring();
        }
    }

    /// The reader: takes everything. Costs one load if there is nothing.
    pub fn take(&self, out: &mut Vec<T>) {
        if self.has_some.load(Ordering::Acquire) {
            let mut done = self.lock();
            self.has_some.store(false, Ordering::Relaxed);
            out.append(&mut done);
        }
    }

    /// The reader is about to sleep; false if something is there. Takes back old rings first,
    /// so a ring that is seen later means something that came later.
    pub fn before_sleep(&self) -> bool {
        self.doorbell.clear();
        self.is_asleep.store(true, Ordering::SeqCst);
        !self.has_some.load(Ordering::SeqCst)
    }

    /// What becomes readable for a sleeping reader.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<T>> {
        self.done.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}
