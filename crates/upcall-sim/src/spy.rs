//! A ring of production, and a note of what it hands out.
//!
//! Always true: what the ring does is what it does alone.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use upcall_block::{Op, QueueError, Request, RequestQueue, Status, Tag};
use upcall_vhost::{Stopped, VirtQueue};

use crate::medium::sectors;

/// A request that was handed out.
#[derive(Clone, Debug)]
pub struct Taken {
    pub op: Op,
    pub sectors: Range<usize>,
    /// It says that an earlier worker may have had it.
    pub retry: bool,
}

/// What was handed out and not looked at yet, in order.
pub type Notes = Arc<Mutex<Vec<Taken>>>;

/// See the module.
pub struct Spy {
    queue: VirtQueue,
    notes: Notes,
}

impl Spy {
    pub fn new(queue: VirtQueue, notes: Notes) -> Spy {
        Spy { queue, notes }
    }

    /// The ring is stopped; nothing is in flight.
    pub fn finish(self) -> Stopped {
        self.queue.finish()
    }
}

impl RequestQueue for Spy {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        let known = out.len();
        let result = self.queue.take(max, out);
        let taken = out[known..].iter().map(|request| Taken {
            op: request.op,
            sectors: sectors(request.range),
            retry: request.flags.retry,
        });
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).extend(taken);
        result
    }

    fn complete(&mut self, tag: Tag, status: Status) {
        self.queue.complete(tag, status);
    }

    fn publish(&mut self) {
        self.queue.publish();
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        self.queue.doorbell()
    }

    fn before_sleep(&mut self) -> bool {
        self.queue.before_sleep()
    }

    fn after_sleep(&mut self) {
        self.queue.after_sleep();
    }
}
