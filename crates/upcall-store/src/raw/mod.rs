//! A raw image: a regular file or block device whose bytes are the disk's bytes.
//!
//! [`RawStore::open`] finds out everything that can go wrong before a guest runs: size,
//! alignment, lock, engine. What happens to one request afterwards is decided in [`job`];
//! the two engines ([`uring`], [`threads`]) only carry it out. Flushes of all queues go
//! through one [`flusher`], which alone decides that a store has failed.

mod lock;
mod target;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use upcall_block::{DiskInfo, Status, Store, StoreQueue};

use crate::OpenError;

/// Called once, with what happened, when a store's flush fails; from any thread, and it must
/// not block for long. See [`RawStore::failure`].
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
    /// Told when the store fails for good.
    pub on_failure: Option<OnFailure>,
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
        }
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
    info: DiskInfo,
}

impl RawStore {
    /// Opens the image at `options.path`.
    pub fn open(options: RawOptions) -> Result<RawStore, OpenError> {
        not_yet(options)
    }

    /// Uses an image that somebody else opened. The open file description is taken over:
    /// its O_DIRECT and O_APPEND flags are set as this store needs them, and the image lock
    /// is taken on it (which succeeds if whoever passed it holds the lock through it).
    pub fn from_file(file: File, options: RawOptions) -> Result<RawStore, OpenError> {
        let _ = file;
        not_yet(options)
    }

    /// Since when the store refuses everything that writes: what the failed flush said.
    /// None while all is well.
    pub fn failure(&self) -> Option<String> {
        None
    }
}
fn not_yet(_options: RawOptions) -> Result<RawStore, OpenError> {
    Err(OpenError::System {
        name: "".into(),
        action: "open",
        source: io::ErrorKind::Unsupported.into(),
    })
}
impl Store for RawStore {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn describe(&self) -> String {
        String::new()
    }
    fn open_queue(&self) -> io::Result<Box<dyn StoreQueue>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn sync(&self) -> Status {
        Ok(())
    }
}
