//! A raw image: a regular file or block device whose bytes are the disk's bytes.
//!
//! [`RawStore::open`] finds out everything that can go wrong before a guest runs: size,
//! alignment, lock, engine. What happens to one request afterwards is decided in [`job`];
//! the two engines ([`uring`], [`threads`]) only carry it out. Flushes of all queues go
//! through one [`flusher`], which alone decides that a store has failed.

mod aligned;
mod extents;
mod flusher;
mod job;
pub(crate) mod lock;
mod shared;
mod target;
#[cfg(test)]
mod tests;
mod threads;
mod uring;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FileType;
use upcall_block::{DiskInfo, Extent, Status, Store, StoreQueue};

use crate::OpenError;
pub(crate) use crate::raw::extents::find as find_extents;
use crate::raw::flusher::Flusher;
use crate::raw::shared::Shared;
use crate::raw::target::Target;
use crate::raw::threads::ThreadsQueue;
use crate::raw::uring::UringQueue;

/// Where completions of a queue arrive from other threads.
pub(crate) type Inbox = upcall_ring::Inbox<upcall_block::StoreDone>;

/// Called once, with what happened, when a store's flush fails; from any thread. It must not
/// block for long and not call the store's `sync`. See [`RawStore::failure`].
pub type OnFailure = Arc<dyn Fn(&str) + Send + Sync>;

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or threads where it is forbidden.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// A few threads per queue, with pread and pwrite.
    Threads,
}

/// How to open a raw image.
#[derive(Clone)]
pub struct RawOptions {
    /// The image; with [`RawStore::from_file`] only a name for messages.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// O_DIRECT: no second cache in the host, and what a flush costs is known. Needs a file
    /// system that can do it.
    pub direct: bool,
    /// How requests reach the kernel.
    pub engine: Engine,
    /// Refuse an image that somebody else uses (QEMU's image locks are understood), and keep
    /// others out while it is open. Off: nothing protects the image from a second writer.
    pub lock: bool,
    /// Told when the store fails for good, before anybody else learns of it.
    pub on_failure: Option<OnFailure>,
    /// It has failed for good already, under whoever served it before: what was said then. The
    /// kernel tells of a lost write only once, so opening an image anew would hide it.
    pub failed: Option<String>,
}

impl RawOptions {
    /// For writing, direct, engine [`Auto`](Engine::Auto), locked.
    pub fn new(path: impl Into<PathBuf>) -> RawOptions {
        RawOptions {
            path: path.into(),
            read_only: false,
            direct: true,
            engine: Engine::Auto,
            lock: true,
            on_failure: None,
            failed: None,
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

impl fmt::Debug for RawOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawOptions")
            .field("path", &self.path)
            .field("read_only", &self.read_only)
            .field("direct", &self.direct)
            .field("engine", &self.engine)
            .field("lock", &self.lock)
            .finish_non_exhaustive()
    }
}

/// An opened raw image.
pub struct RawStore {
    shared: Arc<Shared>,
    flusher: Arc<Flusher>,
    options: RawOptions,
    /// Why threads do the work although io_uring would have been better.
    no_uring: Mutex<Option<String>>,
}

impl RawStore {
    /// Opens the image at `options.path`. If it is in use, waits up to a second for it: the
    /// kernel may still be cleaning up after a process that has just ended.
    pub fn open(options: RawOptions) -> Result<RawStore, OpenError> {
        let (file, _) = open_file(&options.path, options.read_only, options.lock)?;
        let mut shared = RawStore::prepare(file, &options)?;
        shared.unlocks = options.lock;
        RawStore::assemble(shared, options)
    }

    /// Uses an image that somebody else opened. The open file description is taken over:
    /// its O_DIRECT, O_APPEND and O_NONBLOCK flags are set as this store needs them, and the
    /// image lock is taken on it (which succeeds if whoever passed it holds the lock through
    /// it).
    pub fn from_file(file: File, options: RawOptions) -> Result<RawStore, OpenError> {
        let shared = RawStore::prepare(file, &options)?;
        RawStore::assemble(shared, options)
    }

    fn prepare(file: File, options: &RawOptions) -> Result<Shared, OpenError> {
        let name = options.name();
        let target = Target::of(&file, options)?;
        if options.lock {
            let system = |source| OpenError::System {
                name: name.clone(),
                action: "lock it (a file system without locks can be used with lock = false)",
                source,
            };
            if !lock::take(&file, options.read_only).map_err(system)? {
                let holder = lock::holder(&file);
                return Err(OpenError::Busy { name, holder, read_only: options.read_only });
            }
        }
        let mut shared = Shared::new(file, target, name, options.on_failure.clone());
        if let Some(failed) = &options.failed {
            shared.begin_failed(failed.clone());
        }
        Ok(shared)
    }

    fn assemble(shared: Shared, options: RawOptions) -> Result<RawStore, OpenError> {
        let name = options.name();
        let shared = Arc::new(shared);
        let flusher = Flusher::new(shared.clone()).map_err(|source| OpenError::System {
            name: name.clone(),
            action: "start a thread for it",
            source,
        })?;
        let store =
            RawStore { shared, flusher: Arc::new(flusher), options, no_uring: Mutex::new(None) };
        if store.options.engine == Engine::Threads {
            return Ok(store);
        }
        // A queue on trial, so that the operator hears now what a guest would feel later.
        match store.uring_queue() {
            Err(source) if store.options.engine == Engine::IoUring => {
                return Err(OpenError::NoIoUring { name, source });
            }
            Err(error) => store.go_without_uring(&error),
            Ok(_) => {}
        }
        Ok(store)
    }

    /// Since when the store refuses everything that writes: what the failed flush said.
    /// None while all is well.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure()
    }

    fn uring_queue(&self) -> io::Result<UringQueue> {
        UringQueue::new(self.shared.clone(), self.flusher.clone())
    }

    fn threads_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        Ok(Box::new(ThreadsQueue::new(self.shared.clone(), self.flusher.clone())?))
    }

    fn go_without_uring(&self, error: &io::Error) {
        *self.lock_no_uring() = Some(error.to_string());
    }

    fn lock_no_uring(&self) -> MutexGuard<'_, Option<String>> {
        self.no_uring.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Store for RawStore {
    fn info(&self) -> &DiskInfo {
        &self.shared.info
    }

    /// Rounded down to whole blocks.
    fn measure(&self) -> io::Result<u64> {
        let bytes = target::size(&self.shared.file)?;
        Ok(bytes - bytes % u64::from(self.shared.info.block_size))
    }

    /// Path, size, mode, engine, and what is wrong with it if something is.
    fn describe(&self) -> String {
        let (info, options) = (&self.shared.info, &self.options);
        let mut text = format!(
            "raw image {} of {} bytes, {}, {}",
            self.shared.name,
            info.capacity,
            if info.read_only { "read-only" } else { "read-write" },
            if options.direct { "direct" } else { "buffered" },
        );
        match (options.engine, &*self.lock_no_uring()) {
            (Engine::Threads, _) => text.push_str(", threads"),
            (_, None) => text.push_str(", io_uring"),
            (_, Some(why)) => text.push_str(&format!(", threads (no io_uring: {why})")),
        }
        if !options.lock {
            text.push_str(", not locked");
        }
        if let Some(failure) = self.failure() {
            text.push_str(&format!("; FAILED: {failure}"));
        }
        text
    }

    /// With [`Engine::Auto`], threads serve the queue if io_uring has become forbidden since
    /// the store was opened.
    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        if self.options.engine == Engine::Threads || self.lock_no_uring().is_some() {
            return self.threads_queue();
        }
        match self.uring_queue() {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) if self.options.engine == Engine::IoUring => Err(error),
            Err(error) => {
                self.go_without_uring(&error);
                self.threads_queue()
            }
        }
    }

    fn sync(&self) -> Status {
        self.shared.sync()
    }

    /// As the file system knows it; a device says data.
    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<Extent>> {
        extents::find(&self.shared.file, &self.shared.info, offset, length, max)
    }
}

impl fmt::Debug for RawStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

/// Opens a regular file or a block device. `is_claimed`: a device that is written to must not be
/// in use by the system.
pub(crate) fn open_file(
    path: &Path,
    read_only: bool,
    is_claimed: bool,
) -> Result<(File, FileType), OpenError> {
    let refused = |error| not_opened(path, read_only, error);
    // Looked at before it is opened: opening a pipe may block, a tape may move.
    let stat = rustix::fs::stat(path).map_err(|error| refused(error.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if let Some(kind) = target::not_a_disk(kind) {
        return Err(OpenError::NotADisk { name: path.display().to_string(), kind });
    }
    // On a device, O_EXCL keeps out of mounted ones.
    let is_exclusive = kind == FileType::BlockDevice && is_claimed && !read_only;
    let flags = libc::O_NONBLOCK | if is_exclusive { libc::O_EXCL } else { 0 };
    let open = || File::options().read(true).write(!read_only).custom_flags(flags).open(path);
    let is_busy = |file: &io::Result<File>| matches!(file, Err(error) if error.raw_os_error() == Some(libc::EBUSY));
    let file = lock::with_grace(open, is_busy).map_err(refused)?;
    Ok((file, kind))
}

/// What is to be said of an image that cannot be opened.
pub(crate) fn not_opened(path: &Path, read_only: bool, error: io::Error) -> OpenError {
    let name = path.display().to_string();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { name },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenError::Permission {
            name,
            access: if read_only { "reading" } else { "reading and writing" },
        },
        Some(libc::EBUSY) => OpenError::Busy {
            name,
            holder: "the system (mounted, or part of another device)".to_owned(),
            read_only,
        },
        _ => OpenError::System { name, action: "open it", source: error },
    }
}

/// Waits until a doorbell is rung, for a signal, or for a tenth of a second: closing a queue
/// shall not depend on a wake-up.
pub(crate) fn sleep_on(doorbell: BorrowedFd<'_>) {
    let mut doorbell = [PollFd::from_borrowed_fd(doorbell, PollFlags::IN)];
    let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let _ = rustix::event::poll(&mut doorbell, Some(&limit));
}
