//! Between the threads that speak with clients and the worker's queue threads.
//!
//! A [`Line`] carries requests to one queue thread, which has its other end, [`NbdQueue`]. An
//! [`Inbox`] carries what has ended back to one client thread. Each side rings the other only
//! if it sleeps.
//!
//! Always true: what is submitted comes back exactly once, whatever becomes of the queue.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use upcall_block::{
    Errno, Extent, Op, QueueError, Range, Request, RequestFlags, RequestQueue, Status, Tag,
};
use upcall_ring::{Buffers, Doorbell};

/// Who waits for something: a job of a connection of a client thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Index of the client thread.
    pub thread: usize,
    /// Never used twice in a server.
    pub connection: u64,
    /// The connection's name for its job.
    pub job: usize,
}

/// What comes back to a client thread.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A request has ended.
    Ended(Status),
    /// What a disk consists of is known.
    Extents(std::io::Result<Vec<Extent>>),
}

/// A request on its way to the worker.
#[derive(Debug)]
pub(crate) struct Submission {
    pub op: Op,
    pub range: Range,
    pub flags: RequestFlags,
    pub data: Buffers,
    pub ticket: Ticket,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a client thread finds when it wakes.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub answers: Vec<(Ticket, Answer)>,
    pub sockets: Vec<OwnedFd>,
    /// Commands are refused from now on, and connections end once all is answered.
    pub ends: bool,
    /// Whoever had something in flight has it back; nobody is waited for any longer.
    pub hurries: bool,
}

impl News {
    fn is_none(&self) -> bool {
        self.answers.is_empty() && self.sockets.is_empty() && !self.ends && !self.hurries
    }
}

/// The way back; see the module.
#[derive(Debug)]
pub(crate) struct Inbox {
    news: Mutex<(News, bool)>,
    doorbell: Doorbell,
}

impl Inbox {
    pub fn new() -> std::io::Result<Inbox> {
        Ok(Inbox { news: Mutex::default(), doorbell: Doorbell::new()? })
    }

    /// Adds something, and wakes the thread if it sleeps.
    pub fn put(&self, add: impl FnOnce(&mut News)) {
        let mut guard = locked(&self.news);
        let (news, asleep) = &mut *guard;
        add(news);
        let rings = std::mem::take(asleep);
        drop(guard);
        if rings {
            self.doorbell.ring();
        }
    }

    /// All there is. Called by the thread itself.
    pub fn take(&self) -> News {
        std::mem::take(&mut locked(&self.news).0)
    }

    /// Says that the thread is about to sleep; false if there is something already.
    pub fn before_sleep(&self) -> bool {
        let (news, asleep) = &mut *locked(&self.news);
        *asleep = news.is_none();
        *asleep
    }

    /// Says that it is awake.
    pub fn after_sleep(&self) {
        locked(&self.news).1 = false;
        self.doorbell.clear();
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<Submission>,
    asleep: bool,
    closed: bool,
}

/// The way to one queue thread; see the module.
#[derive(Debug)]
pub(crate) struct Line {
    waiting: Mutex<Waiting>,
    doorbell: Doorbell,
}

impl Line {
    /// Sends a request. An error if the queue is gone: then it does not come back.
    pub fn submit(&self, submission: Submission) -> Result<(), Errno> {
        let mut waiting = locked(&self.waiting);
        if waiting.closed {
            return Err(Errno::ECANCELED);
        }
        waiting.requests.push_back(submission);
        let rings = std::mem::take(&mut waiting.asleep);
        drop(waiting);
        if rings {
            self.doorbell.ring();
        }
        Ok(())
    }
}

/// The worker's end of a line: requests of clients for one queue thread. Dropping it ends
/// what it has not handed out.
#[derive(Debug)]
pub struct NbdQueue {
    line: Arc<Line>,
    inboxes: Arc<[Inbox]>,
    /// By tag.
    in_flight: Vec<Option<Ticket>>,
    free: Vec<u32>,
    completed: Vec<(Ticket, Status)>,
}

impl NbdQueue {
    pub(crate) fn new(inboxes: Arc<[Inbox]>) -> std::io::Result<(NbdQueue, Arc<Line>)> {
        let line = Arc::new(Line { waiting: Mutex::default(), doorbell: Doorbell::new()? });
        let queue = NbdQueue {
            line: line.clone(),
            inboxes,
            in_flight: Vec::new(),
            free: Vec::new(),
            completed: Vec::new(),
        };
        Ok((queue, line))
    }

    fn tag(&mut self, ticket: Ticket) -> Tag {
        match self.free.pop() {
            Some(tag) => {
                self.in_flight[tag as usize] = Some(ticket);
                Tag(tag)
            }
            None => {
                self.in_flight.push(Some(ticket));
                Tag((self.in_flight.len() - 1) as u32)
            }
        }
    }
}

impl RequestQueue for NbdQueue {
    fn take(&mut self, max: usize, out: &mut Vec<Request>) -> Result<(), QueueError> {
        let line = self.line.clone();
        let mut waiting = locked(&line.waiting);
        let count = waiting.requests.len().min(max);
        for Submission { op, range, flags, data, ticket } in waiting.requests.drain(..count) {
            out.push(Request { tag: self.tag(ticket), op, range, flags, data });
        }
        Ok(())
    }

    /// Panics if `tag` is not in flight.
    fn complete(&mut self, tag: Tag, status: Status) {
        let ticket = self.in_flight.get_mut(tag.0 as usize).and_then(Option::take);
        let Some(ticket) = ticket else {
            panic!("completion of {tag:?}, which is not in flight");
        };
        self.free.push(tag.0);
        self.completed.push((ticket, status));
    }

    fn publish(&mut self) {
        if self.completed.is_empty() {
            return;
        }
        for (thread, inbox) in self.inboxes.iter().enumerate() {
            if self.completed.iter().any(|(ticket, _)| ticket.thread == thread) {
                let ended = self.completed.iter().filter(|(ticket, _)| ticket.thread == thread);
                let answers = ended.map(|(ticket, status)| (*ticket, Answer::Ended(*status)));
                inbox.put(|news| news.answers.extend(answers));
            }
        }
        self.completed.clear();
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.line.doorbell.as_fd())
    }

    fn before_sleep(&mut self) -> bool {
        let mut waiting = locked(&self.line.waiting);
        waiting.asleep = waiting.requests.is_empty();
        waiting.asleep
    }

    fn after_sleep(&mut self) {
        locked(&self.line.waiting).asleep = false;
        self.line.doorbell.clear();
    }
}

impl Drop for NbdQueue {
    fn drop(&mut self) {
        let left = {
            let mut waiting = locked(&self.line.waiting);
            waiting.closed = true;
            std::mem::take(&mut waiting.requests)
        };
        self.completed.extend(left.iter().map(|left| (left.ticket, Err(Errno::ECANCELED))));
        // A queue thread that panics leaves these; nobody carries them out.
        let lost = self.in_flight.iter_mut().filter_map(Option::take);
        self.completed.extend(lost.map(|ticket| (ticket, Err(Errno::EIO))));
        self.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submission(job: usize, thread: usize) -> Submission {
        Submission {
            op: Op::Flush,
            range: Range::EMPTY,
            flags: RequestFlags::default(),
            data: Buffers::new(),
            ticket: Ticket { thread, connection: 1, job },
        }
    }

    fn ended(inbox: &Inbox) -> Vec<(usize, bool)> {
        let answers = inbox.take().answers.into_iter();
        answers
            .map(|(ticket, answer)| match answer {
                Answer::Ended(status) => (ticket.job, status.is_ok()),
                Answer::Extents(_) => panic!("nobody asked for extents"),
            })
            .collect()
    }

    fn pair() -> (NbdQueue, Arc<Line>, Arc<[Inbox]>) {
        let inboxes: Arc<[Inbox]> = Arc::new([Inbox::new().unwrap(), Inbox::new().unwrap()]);
        let (queue, line) = NbdQueue::new(inboxes.clone()).unwrap();
        (queue, line, inboxes)
    }

    #[test]
    fn what_is_submitted_comes_back_once_to_who_waits_for_it() {
        let (mut queue, line, inboxes) = pair();
        for (job, thread) in [(7, 0), (8, 1), (9, 0)] {
            line.submit(submission(job, thread)).unwrap();
        }
        let mut taken = Vec::new();
        queue.take(2, &mut taken).unwrap();
        assert_eq!(taken.len(), 2);
        queue.take(10, &mut taken).unwrap();
        for request in taken.drain(..).rev() {
            queue.complete(request.tag, Ok(()));
        }
        assert!(inboxes[0].take().answers.is_empty(), "not before it is published");
        queue.publish();
        queue.publish();
        assert_eq!(ended(&inboxes[0]), [(9, true), (7, true)]);
        assert_eq!(ended(&inboxes[1]), [(8, true)]);
    }

    #[test]
    fn a_queue_that_is_dropped_gives_back_what_it_has_and_takes_nothing_more() {
        let (mut queue, line, inboxes) = pair();
        line.submit(submission(1, 0)).unwrap();
        let mut taken = Vec::new();
        queue.take(1, &mut taken).unwrap();
        line.submit(submission(2, 1)).unwrap();
        drop(queue);
        assert_eq!(ended(&inboxes[0]), [(1, false)]);
        assert_eq!(ended(&inboxes[1]), [(2, false)]);
        assert!(line.submit(submission(3, 0)).is_err());
    }

    #[test]
    fn who_sleeps_is_rung_and_who_finds_work_does_not_sleep() {
        let (mut queue, line, inboxes) = pair();
        line.submit(submission(1, 0)).unwrap();
        assert!(!line.doorbell.clear(), "it polls");
        assert!(!queue.before_sleep());
        let mut taken = Vec::new();
        queue.take(1, &mut taken).unwrap();
        assert!(queue.before_sleep());
        line.submit(submission(2, 0)).unwrap();
        assert!(line.doorbell.clear());
        queue.after_sleep();
        assert!(inboxes[0].before_sleep());
        queue.complete(taken[0].tag, Ok(()));
        queue.publish();
        assert!(inboxes[0].doorbell.clear());
        assert!(!inboxes[0].before_sleep());
        queue.take(1, &mut taken).unwrap();
        queue.complete(taken[1].tag, Ok(()));
    }
}
