//! The one thread of a gap file that writes it, for all queue threads.
//!
//! It takes all marks that were asked for since it last looked, and makes them durable by one
//! write of each changed page and one sync.
//!
//! Always true: a mark is [`Known`] and reported as made only after the sync that made it
//! durable; when writing or syncing fails it is reported as failed, and is tried again as if
//! it were new when it is next asked for.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use upcall_block::{Errno, Status};
use upcall_ring::Inbox;

use crate::file::{Damage, GapFile};
use crate::known::Known;
use crate::map::{ClearId, Map};
use crate::medium::Medium;
use crate::span::Span;
use crate::{MarkDone, MarkToken};

/// What the syncer and those who ask it have in common.
pub(crate) struct Shared {
    pub known: Known,
    /// Never taken by queue threads; held across IO only while the disk grows.
    map: Mutex<Map>,
    asked: Mutex<Asked>,
    wake: Condvar,
}

/// What is to be done in the next round.
#[derive(Default)]
pub(crate) struct Asked {
    pub marks: Vec<Mark>,
    pub clears: Vec<(ClearId, Sender<io::Result<()>>)>,
    pub grow: Vec<(u64, Sender<io::Result<Damage>>)>,
    pub stop: bool,
}

pub(crate) struct Mark {
    pub span: Span,
    pub token: MarkToken,
    pub inbox: Arc<Inbox<MarkDone>>,
}

impl Asked {
    fn is_empty(&self) -> bool {
        self.marks.is_empty() && self.clears.is_empty() && self.grow.is_empty()
    }
}

impl Shared {
    /// What is in the file, durably, is `map`.
    pub fn new(map: Map) -> Shared {
        let known = Known::new();
        for (word, bits) in map.words().iter().enumerate() {
            known.insert_word(word, *bits);
        }
        Shared { known, map: Mutex::new(map), asked: Mutex::default(), wake: Condvar::new() }
    }

    pub fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Adds to what is asked for; false if the syncer has ended.
    pub fn ask(&self, add: impl FnOnce(&mut Asked)) -> bool {
        let mut asked = self.lock_asked();
        if asked.stop {
            return false;
        }
        add(&mut asked);
        drop(asked);
        self.wake.notify_one();
        true
    }

    /// The syncer ends after what was asked for so far.
    pub fn stop(&self) {
        self.lock_asked().stop = true;
        self.wake.notify_one();
    }

    pub fn begin_clear(&self, span: Span) -> ClearId {
        let mut map = self.map();
        let id = map.begin_clear(span);
        self.known.remove(span);
        id
    }

    fn lock_asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Waits; None when there will be no more.
    fn next(&self) -> Option<Asked> {
        let is_idle = |asked: &mut Asked| asked.is_empty() && !asked.stop;
        let mut asked = self
            .wake
            .wait_while(self.lock_asked(), is_idle)
            .unwrap_or_else(|poison| poison.into_inner());
        let batch = Asked {
            marks: std::mem::take(&mut asked.marks),
            clears: std::mem::take(&mut asked.clears),
            grow: std::mem::take(&mut asked.grow),
            stop: false,
        };
        if batch.is_empty() { None } else { Some(batch) }
    }
}

/// Owns the file.
pub(crate) struct Syncer<M> {
    pub shared: Arc<Shared>,
    pub file: GapFile<M>,
}

impl<M: Medium> Syncer<M> {
    /// Until [`Shared::stop`].
    pub fn run(mut self) {
        while let Some(batch) = self.shared.next() {
            self.carry_out(batch);
        }
    }

    /// One round: everything in `batch`, with one sync for all marks and clears.
    pub fn carry_out(&mut self, batch: Asked) {
        for (capacity, answer) in batch.grow {
            // Whoever does not wait for the answer any more does not need it.
            let _ = answer.send(self.grow(capacity));
        }
        let shared = self.shared.clone();
        let mut map = shared.map();
        // Clears first: a mark that waited beside one was not reported yet, and wins.
        batch.clears.iter().for_each(|(id, _)| map.finish_clear(*id));
        let (marks, misfits): (Vec<_>, Vec<_>) =
            batch.marks.into_iter().partition(|mark| map.mark(mark.span));
        let pages: Vec<_> = map.dirty().collect();
        let encoded = self.file.encode(&map, &pages);
        drop(map);

        let result =
            if pages.is_empty() { Ok(()) } else { self.file.write_encoded(&pages, &encoded) };

        if result.is_ok() {
            // Under the lock, so that a clear begins either before this and is told, or after
            // this and takes what is known away.
            let mut map = shared.map();
            map.stored(&pages);
            for mark in &marks {
                map.spare(mark.span);
                shared.known.insert(mark.span);
            }
        }
        let status = result.as_ref().map(|_| ()).map_err(errno);
        marks.into_iter().for_each(|mark| mark.report(status));
        misfits.into_iter().for_each(|mark| mark.report(Err(Errno::EINVAL)));
        for (_, answer) in batch.clears {
            let _ = answer.send(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(io::Error::from_raw_os_error(errno(error).raw())),
            });
        }
    }

    fn grow(&mut self, capacity: u64) -> io::Result<Damage> {
        let shared = self.shared.clone();
        let mut map = shared.map();
        if capacity <= map.capacity() {
            return Ok(Damage::default());
        }
        self.file.grow(&mut map, capacity)
    }
}

impl Mark {
    pub fn report(self, status: Status) {
        self.inbox.push(MarkDone { token: self.token, status });
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
