//! What all queues of a raw store share: the file, and what was learnt about it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::io::Errno as Raw;
use upcall_block::{DiskInfo, Errno, Status};

use crate::raw::OnFailure;
use crate::raw::aligned::AlignedMemory;
use crate::raw::lock;
use crate::raw::target::{Alignment, Target};

/// Bytes of the block of zeroes that write-zeroes falls back to.
pub(crate) const ZEROES_LENGTH: usize = 64 << 10;

/// The file and what was learnt about it.
pub(crate) struct Shared {
    pub file: File,
    pub info: DiskInfo,
    pub alignment: Alignment,
    /// For messages.
    pub name: String,
    /// The image lock is ours alone, and is given up with the store.
    pub unlocks: bool,
    /// The file system punches no holes.
    pub no_punch: AtomicBool,
    /// The file system has no fallocate for zeroes.
    pub no_zero_range: AtomicBool,
    zeroes: OnceLock<AlignedMemory>,
    /// Held across fdatasync: see [`sync`](Self::sync).
    syncing: Mutex<()>,
    has_failed: AtomicBool,
    failure: OnceLock<String>,
    on_failure: Option<OnFailure>,
    #[cfg(test)]
    pub tap: Option<Tap>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.unlocks {
            lock::release(&self.file);
        }
    }
}

/// A call that is about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read { offset: u64, length: usize },
    Write { offset: u64, length: usize },
    Allocate { mode: i32, offset: u64, length: u64 },
    Sync,
}

/// What a test wants to become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "outside of tests every call is made"))]
pub(crate) enum Answer {
    /// It is made.
    Make,
    /// It is not made; this is its result, as the kernel would give it.
    Result(i32),
    /// It is made, and moves at most so many bytes.
    AtMost(usize),
}

/// A test's hand between us and the kernel.
#[cfg(test)]
pub(crate) type Tap = std::sync::Arc<dyn Fn(Call) -> Answer + Send + Sync>;

impl Shared {
    pub fn new(file: File, target: Target, name: String, on_failure: Option<OnFailure>) -> Shared {
        Shared {
            file,
            info: target.info,
            alignment: target.alignment,
            name,
            unlocks: false,
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            zeroes: OnceLock::new(),
            syncing: Mutex::new(()),
            has_failed: AtomicBool::new(false),
            failure: OnceLock::new(),
            on_failure,
            #[cfg(test)]
            tap: None,
        }
    }

    /// What shall become of a call; outside of tests it is always made.
    pub fn ask(&self, call: Call) -> Answer {
        #[cfg(test)]
        if let Some(tap) = &self.tap {
            return tap(call);
        }
        let _ = call;
        Answer::Make
    }

    /// A block of zeroes to write from.
    pub fn zeroes(&self) -> &[u8] {
        self.zeroes.get_or_init(|| AlignedMemory::new(ZEROES_LENGTH, 4096)).bytes()
    }

    /// A flush has failed already, before it was opened.
    pub fn begin_failed(&mut self, failure: String) {
        self.failure = failure.into();
        self.has_failed = true.into();
    }

    /// Whether a flush has failed.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// What the failed flush said.
    pub fn failure(&self) -> Option<String> {
        if self.has_failed() { self.failure.get().cloned() } else { None }
    }

    /// Makes everything durable that completed before; blocks.
    ///
    /// One at a time: the kernel tells of a failed write-back once per open file, so of two
    /// syncs side by side one would fail and the other succeed, although neither made
    /// anything durable. Here the second finds the store failed.
    pub fn sync(&self) -> Status {
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(|poison| poison.into_inner());
        if self.has_failed() {
            return Err(Errno::EIO);
        }
        if self.info.read_only {
            return Ok(());
        }
        match self.fdatasync() {
            Ok(()) => Ok(()),
            Err(error) => {
                self.fail(error);
                Err(Errno::EIO)
            }
        }
    }

    fn fdatasync(&self) -> Result<(), Raw> {
        loop {
            let result = match self.ask(Call::Sync) {
                Answer::Result(result) if result < 0 => Err(Raw::from_raw_os_error(-result)),
                Answer::Result(_) => Ok(()),
                Answer::Make | Answer::AtMost(_) => rustix::fs::fdatasync(self.file.as_fd()),
            };
            if result != Err(Raw::INTR) {
                return result;
            }
        }
    }

    fn fail(&self, error: Raw) {
        let text = format!(
            "{}: a flush failed ({error}); what was written before may be lost, so everything \
             that writes is refused from now on; check the storage, then open the disk anew",
            self.name
        );
        // Once: only `sync` comes here, one at a time and never again after this.
        let text = self.failure.get_or_init(|| text);
        // Before a guest can see it: if we die in between, who comes after us knows it.
        if let Some(on_failure) = &self.on_failure {
            on_failure(text);
        }
        self.has_failed.store(true, Ordering::Release);
    }
}
