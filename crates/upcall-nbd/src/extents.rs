//! Asking a disk what it consists of. That may block, so a thread of its own does it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use upcall_block::Extent;

use crate::queue::{Answer, Inbox, Ticket};

/// What a disk consists of from an offset on, as
/// [`Store::extents`](upcall_block::Store::extents) says it.
#[derive(Clone)]
pub struct Extents(Arc<Find>);

type Find = dyn Fn(u64, u64, usize) -> io::Result<Vec<Extent>> + Send + Sync;

impl Extents {
    /// By this function, which may block, and is called by one thread.
    pub fn new(
        find: impl Fn(u64, u64, usize) -> io::Result<Vec<Extent>> + Send + Sync + 'static,
    ) -> Extents {
        Extents(Arc::new(find))
    }
}

impl fmt::Debug for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Extents")
    }
}

/// A question, and who asks.
#[derive(Debug)]
pub(crate) struct Question {
    pub extents: Extents,
    pub offset: u64,
    pub length: u64,
    pub max: usize,
    pub ticket: Ticket,
}

/// Answers until nobody can ask any more.
pub(crate) fn answer_all(questions: &Receiver<Question>, inboxes: &[Inbox]) {
    for Question { extents, offset, length, max, ticket } in questions {
        let found = (extents.0)(offset, length, max).map(|found| bounded(found, length, max));
        let answer = Answer::Extents(found);
        inboxes[ticket.thread].put(|news| news.answers.push((ticket, answer)));
    }
}

/// Not more than was asked for, whatever the store says.
fn bounded(found: Vec<Extent>, length: u64, max: usize) -> Vec<Extent> {
    let mut left = length;
    let mut kept: Vec<Extent> = Vec::new();
    for extent in found.into_iter().take(max) {
        let length = extent.length.min(left);
        if length == 0 {
            break;
        }
        left -= length;
        kept.push(Extent { length, ..extent });
    }
    kept
}
