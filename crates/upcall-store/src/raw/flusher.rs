//! The one thread of a store that syncs, for all its queues.
//!
//! Whoever asks while a sync is running is served by the next one, together with all others
//! who asked meanwhile: with many queues that is one sync for many flushes. Why flushes must
//! not run side by side: see [`Shared::sync`].

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};

use upcall_block::{StoreDone, StoreToken};

use crate::raw::Inbox;
use crate::raw::shared::Shared;

/// Owns the thread, which ends with it.
pub(crate) struct Flusher {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    shared: Arc<Shared>,
    asked: Mutex<Asked>,
    wake: Condvar,
}

#[derive(Default)]
struct Asked {
    flushes: Vec<(StoreToken, Arc<Inbox>)>,
    stop: bool,
}

impl Flusher {
    pub fn new(shared: Arc<Shared>) -> io::Result<Flusher> {
        let state = Arc::new(State { shared, asked: Mutex::default(), wake: Condvar::new() });
        let of_thread = state.clone();
        let thread = Builder::new().name("store-flush".into()).spawn(move || of_thread.run())?;
        Ok(Flusher { state, thread: Some(thread) })
    }

    /// Any thread, never blocks for IO: a sync that begins after this completes `token`.
    pub fn flush(&self, token: StoreToken, inbox: &Arc<Inbox>) {
        self.state.lock().flushes.push((token, inbox.clone()));
        self.state.wake.notify_one();
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.state.lock().stop = true;
        self.state.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn run(&self) {
        while let Some(flushes) = self.next() {
            let status = self.shared.sync();
            for (token, inbox) in flushes {
                inbox.push(StoreDone { token, status });
            }
        }
    }

    /// All that were asked for; `None` when there will be no more.
    fn next(&self) -> Option<Vec<(StoreToken, Arc<Inbox>)>> {
        let is_idle = |asked: &mut Asked| asked.flushes.is_empty() && !asked.stop;
        let mut asked =
            self.wake.wait_while(self.lock(), is_idle).unwrap_or_else(|poison| poison.into_inner());
        let flushes = std::mem::take(&mut asked.flushes);
        if flushes.is_empty() { None } else { Some(flushes) }
    }
}
