//! A filter host in this process, for a trusted filter.
//!
//! The same C code as in a process of its own: a thread runs its control loop on one end of
//! a socket pair, and the dialogue is the same. Only submissions take another way:
//! [`InlineChannel::deliver`] is a call of a function. Answers that come later arrive on the
//! channel's completion ring, as always.
//!
//! The C side asks that deliveries happen only between START and the end of the control
//! loop. The loop ends when the last copy of our end of its socket is closed, or by QUIT. So
//! every [`InlineChannel`] holds a copy, and QUIT is sent only when none is left.

use std::ffi::{c_char, c_int};
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use upcall_abi::ring::{Completion, Submission};

/// `struct upcall_host` of `c/inline.h`.
#[repr(C)]
struct Host {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn upcall_host_new(
        control_fd: c_int,
        filter_fd: c_int,
        filter_path: *const c_char,
        inline_mode: c_int,
    ) -> *mut Host;
    fn upcall_host_run(host: *mut Host) -> c_int;
    fn upcall_host_free(host: *mut Host);
    fn upcall_host_deliver(
        host: *mut Host,
        channel: u32,
        input: *const Submission,
        output: *mut Completion,
    ) -> c_int;
}

/// Owns the C host; freed with the last user.
#[derive(Debug)]
struct Raw(NonNull<Host>);

// SAFETY: inline.h lets any thread call the host, under the rules that `InlineChannel` keeps.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: nobody else refers to the host: this is the last reference, and the thread
        // that runs it holds one until the run has returned.
        unsafe { upcall_host_free(self.0.as_ptr()) };
    }
}

/// A host in this process: its thread, and how it ended.
#[derive(Debug)]
pub(crate) struct InlineHost {
    raw: Arc<Raw>,
    /// A copy of our end of the control socket; as long as it is open, the loop runs.
    keep: Option<Arc<OwnedFd>>,
    ended: Receiver<c_int>,
    channels_taken: Vec<u32>,
}

impl InlineHost {
    /// Starts the control loop on `theirs`; `ours` is a copy of the other end.
    pub(crate) fn start(theirs: OwnedFd, filter: OwnedFd, ours: OwnedFd) -> io::Result<InlineHost> {
        let (theirs, filter) = (theirs.into_raw_fd(), filter.into_raw_fd());
        // SAFETY: both descriptors are ours and become the host's; no path is given.
        let host = unsafe { upcall_host_new(theirs, filter, std::ptr::null(), 1) };
        let host = NonNull::new(host).ok_or(io::ErrorKind::OutOfMemory)?;
        let raw = Arc::new(Raw(host));
        let (say_ended, ended) = channel();
        let running = raw.clone();
        std::thread::Builder::new().name("filter-control".into()).spawn(move || {
            // SAFETY: the host is new, and this is the only call of run.
            let result = unsafe { upcall_host_run(running.0.as_ptr()) };
            drop(running);
            let _ = say_ended.send(result);
        })?;
        Ok(InlineHost { raw, keep: Some(Arc::new(ours)), ended, channels_taken: Vec::new() })
    }

    /// The caller has seen START succeed after it gave channel `id`. `None` if it is taken.
    pub(crate) fn channel(&mut self, id: u32) -> Option<InlineChannel> {
        if self.channels_taken.contains(&id) {
            return None;
        }
        let keep = self.keep.clone()?;
        self.channels_taken.push(id);
        Some(InlineChannel { raw: self.raw.clone(), id, _keep: keep })
    }

    /// Whether a channel is still held by somebody.
    pub(crate) fn is_in_use(&self) -> bool {
        self.keep.as_ref().is_some_and(|keep| Arc::strong_count(keep) > 1)
    }

    /// How the control loop ended; `None` while it runs.
    pub(crate) fn exit(&self) -> Option<String> {
        match self.ended.try_recv() {
            Err(TryRecvError::Empty) => None,
            Ok(result) => Some(describe(result)),
            Err(TryRecvError::Disconnected) => Some(describe(0)),
        }
    }

    /// As [`exit`](Self::exit), but gives it some time to end.
    pub(crate) fn exit_within(&self, patience: Duration) -> Option<String> {
        match self.ended.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => None,
            Ok(result) => Some(describe(result)),
            Err(RecvTimeoutError::Disconnected) => Some(describe(0)),
        }
    }
}

impl Drop for InlineHost {
    fn drop(&mut self) {
        if !self.is_in_use() {
            self.keep = None;
            // One that does not end is left behind, with its memory: it cannot be killed.
            let _ = self.exit_within(Duration::from_secs(1));
        }
    }
}

fn describe(result: c_int) -> String {
    match result {
        0 => IN_ORDER.into(),
        _ => "it ended while the filter still held requests, and stays in memory".into(),
    }
}

pub(crate) const IN_ORDER: &str = "its control loop has ended";

/// One channel of an inline filter host, for the queue thread that owns it.
#[derive(Debug)]
pub struct InlineChannel {
    raw: Arc<Raw>,
    id: u32,
    _keep: Arc<OwnedFd>,
}

impl InlineChannel {
    /// Delivers one submission to the filter, on this thread, and returns its verdict; or
    /// its HELD entry, if the verdict comes later on the completion ring; or nothing (a
    /// cancel, the end of an issued request, or a verdict that is on the ring already).
    ///
    /// What returns is to be checked as if it came off the ring. During the call entries may
    /// appear on this channel's completion ring for which no doorbell rings: look at it
    /// before sleeping. `submission.seq` does not count. Not to be called from within a
    /// callback of the filter.
    pub fn deliver(&mut self, submission: &Submission) -> Option<Completion> {
        let mut completion = Completion::default();
        // SAFETY: the host lives while `raw` does. START has succeeded before this channel
        // was made and the control loop cannot end while `_keep` is open, so the filter is
        // loaded and its instances are there. There is one `InlineChannel` for an id and
        // `&mut self` makes the calls one at a time. Both entries have the layout of the C
        // types (a test compares them), and live longer than the call.
        let result = unsafe {
            upcall_host_deliver(self.raw.0.as_ptr(), self.id, submission, &mut completion)
        };
        (result > 0).then_some(completion)
    }
}
