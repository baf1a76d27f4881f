//! A queue of this process: requests come from a [`DirectClient`] instead of a guest. For
//! tools that drive a chain themselves, and for tests.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use upcall_block::{Op, QueueError, Range, Request, RequestFlags, RequestQueue, Status, Tag};
use upcall_ring::{Buffers, Doorbell};

/// The worker's end; give it to [`Worker::start_queue`](crate::Worker::start_queue).
pub struct DirectQueue {
    requests: Receiver<Request>,
    completions: Sender<(Tag, Status)>,
    /// Completed and not shown yet.
    unpublished: Vec<(Tag, Status)>,
    doorbell: Doorbell,
    /// Taken out while looking whether there is something.
    early: Option<Request>,
}

/// The other end. Several requests may be in flight; they end in any order.
pub struct DirectClient {
    requests: Sender<Request>,
    completions: Receiver<(Tag, Status)>,
    doorbell: Doorbell,
    next_tag: u32,
}

/// Makes both ends.
pub fn direct_queue() -> std::io::Result<(DirectQueue, DirectClient)> {
    let (request_sender, requests) = channel();
    let (completions, completion_receiver) = channel();
    let doorbell = Doorbell::new()?;
    let queue = DirectQueue {
        requests,
        completions,
        unpublished: Vec::new(),
        doorbell: doorbell.clone(),
        early: None,
    };
    let client = DirectClient {
        requests: request_sender,
        completions: completion_receiver,
        doorbell,
        next_tag: 0,
    };
    Ok((queue, client))
}

impl DirectClient {
    /// Sends a request; `data` as [`Request::data`] says. Returns the tag that its
    /// completion will have.
    pub fn submit(&mut self, op: Op, range: Range, flags: RequestFlags, data: Buffers) -> Tag {
        let tag = Tag(self.next_tag);
        self.next_tag = self.next_tag.wrapping_add(1);
        // A worker that is gone completes nothing: `wait` says so.
        let _ = self.requests.send(Request { tag, op, range, flags, data });
        self.doorbell.ring();
        tag
    }

    /// The next completion; `None` if there is none in time or the queue is gone.
    pub fn wait(&mut self, timeout: Duration) -> Option<(Tag, Status)> {
        self.completions.recv_timeout(timeout).ok()
    }
}

impl RequestQueue for DirectQueue {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        out.extend(self.early.take().into_iter().chain(self.requests.try_iter()).take(max));
        Ok(())
    }

    fn complete(&mut self, tag: Tag, status: Status) {
        self.unpublished.push((tag, status));
    }

    fn publish(&mut self) {
        for completion in self.unpublished.drain(..) {
            // A client that is gone waits for nothing.
            let _ = self.completions.send(completion);
        }
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.doorbell.as_fd())
    }

    fn before_sleep(&mut self) -> bool {
        if self.early.is_none() {
            self.early = self.requests.try_recv().ok();
        }
        self.early.is_none()
    }

    fn after_sleep(&mut self) {
        self.doorbell.clear();
    }
}
