//! What a worker shall serve, in plain types. Where they come from (flags, a file) is
//! decided elsewhere; what is wrong with them is said by [`Worker::start`](crate::Worker).

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::chains::WriteDown;
use upcall_chain::{OnFailure, RecoveryPolicy};
pub use upcall_filterhost::Placement;
pub use upcall_nbd::TlsFiles;
pub use upcall_store::{
    Engine, ImageFormat, ImageOptions, ImageSource, Layer, NbdPlace, NbdServer,
};

/// All that one worker serves: the disks of one VM.
pub struct WorkerConfig {
    /// At least one; names are unique.
    pub disks: Vec<DiskConfig>,
    /// Where the page of counters goes; created, replaced if it is there, removed at the
    /// end. None: counters are kept but nobody can watch.
    pub stats: Option<PathBuf>,
    /// How long requests that a filter holds may take to end when a queue stops, before
    /// they are cancelled.
    pub drain_ms: u64,
    /// How patiently filters that fail are started again.
    pub recovery: RecoveryPolicy,
    /// Told of each chain change before it takes effect. None: a worker that follows this one
    /// begins with its configuration.
    pub write_down: Option<WriteDown>,
    /// Gets what an operator should know, one line at a time. Called from any thread, not
    /// on the path of a request.
    pub log: LogSink,
}

/// Stores that have failed for good: a flush that failed stays failed until an operator serves
/// the disk anew, also when the worker is another one by then.
#[derive(Clone, Default)]
pub struct StoreFailures {
    /// Those known from workers before this one, by disk: what was said.
    pub known: HashMap<String, String>,
    /// Told of the others (disk, what is said) before their guests are. From any thread; must
    /// not block.
    pub report: Option<ReportFailure>,
}

/// Gets a disk's name and what is said of its store.
pub type ReportFailure = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Where a worker's messages go.
pub type LogSink = Arc<dyn Fn(LogLevel, &str) + Send + Sync>;

/// How much a message matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something is broken; a disk or filter does not do its work.
    Error,
    /// Something is odd and was dealt with.
    Warn,
    /// Worth knowing.
    Info,
    /// For who writes a filter.
    Debug,
}

/// One disk.
pub struct DiskConfig {
    /// Its name in messages and grants: letters, digits, `-`, `_`, `.`; at most 47 bytes.
    pub name: String,
    /// Where its data is.
    pub store: StoreConfig,
    /// Refuse writes.
    pub read_only: bool,
    /// Queues, 1 to 64; each has a thread of its own. 0: the disk is only there for NBD
    /// clients, which have queues of their own, or for filters that are granted it; then it
    /// has neither a frontend nor a chain.
    pub queues: u16,
    /// Who is served. None: whoever holds the worker, by [`Worker::start_queue`](crate::Worker::start_queue).
    pub frontend: Option<FrontendConfig>,
    /// Whether NBD clients are served. With a frontend, only if they cannot write.
    pub nbd: Option<NbdConfig>,
    /// The folder where its filters' state is kept. None: `IMAGE.upcall` beside an image
    /// file; in memory, lost at the end, for a disk that is lost then too; and no place at all
    /// for a block device.
    pub state: Option<PathBuf>,
    /// Its filters, in any order: class and number decide.
    pub chain: Vec<SlotConfig>,
}

impl DiskConfig {
    /// Threads of the disk: those of its queues, then those of its NBD clients.
    pub(crate) fn threads(&self) -> u16 {
        self.queues.saturating_add(self.nbd.as_ref().map_or(0, |nbd| nbd.queues))
    }
}

/// Where a disk's data is.
pub enum StoreConfig {
    /// A raw image file or block device.
    Raw {
        /// The file or device.
        path: PathBuf,
        /// O_DIRECT: the host's page cache is not used.
        direct: bool,
        /// How it is read and written.
        engine: Engine,
    },
    /// An image of another format, or what another NBD server has. Whether it is read-only is the disk's to say, and who is
    /// told of its daemon is the worker's.
    Image(Box<ImageOptions>),
    /// Memory of the worker, lost at its end.
    Memory {
        /// Size; a multiple of 512.
        bytes: u64,
    },
    /// A store that is open already. For tests.
    #[doc(hidden)]
    Custom(Arc<dyn upcall_block::Store>),
    /// Reads zeroes, forgets writes.
    Null {
        /// Size; a multiple of 512.
        bytes: u64,
    },
}

impl StoreConfig {
    /// Whether it can be given up to another worker, on another host, that has the same image:
    /// only where a lock says who has it.
    pub(crate) fn can_move(&self) -> bool {
        match self {
            StoreConfig::Raw { .. } => true,
            StoreConfig::Image(options) => options.file().is_some(),
            _ => false,
        }
    }
}

/// A vhost-user-blk device.
pub struct FrontendConfig {
    /// Where QEMU connects.
    pub socket: SocketSource,
    /// Largest ring a guest may set up; a power of two, 2 to 1024.
    pub queue_size: u16,
    /// What the guest's get-id says; at most 20 bytes.
    pub serial: String,
    /// Whether the device starts with its write cache on (writes are durable after a
    /// flush) or off (each write is durable when it completes).
    pub write_cache: bool,
}

/// An NBD export. Disks with the same address are exports of one server.
pub struct NbdConfig {
    /// Where clients connect.
    pub address: NbdAddress,
    /// The export's name, unique at its address.
    pub export: String,
    /// Clients cannot write, however the disk is otherwise.
    pub read_only: bool,
    /// Queues, 1 to 64; each has a thread of its own. Connections spread over them.
    pub queues: u16,
    /// As [`FrontendConfig::write_cache`].
    pub write_cache: bool,
    /// TLS; the same for all disks of the address, as is the next.
    pub tls: Option<NbdTls>,
    /// Most connections at a time.
    pub connections: usize,
}

/// TLS of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTls {
    /// Its certificates.
    pub files: TlsFiles,
    /// Clients must use it.
    pub required: bool,
}

/// Where NBD clients connect.
pub enum NbdAddress {
    /// A socket to be made at this path, with this mode if given.
    Unix(PathBuf, Option<u32>),
    /// HOST:PORT.
    Tcp(String),
    /// A socket that was inherited and listens already, and its number.
    Fd(i32, OwnedFd),
}

/// A listening socket.
pub enum SocketSource {
    /// To be made at this path, with this mode if given.
    Path(PathBuf, Option<u32>),
    /// Inherited, and listening already.
    Fd(OwnedFd),
}

/// A filter on a disk.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotConfig {
    /// What it is called on its disk, in commands and for its state: letters, digits and `-`.
    /// None: its own name, with a number behind if it is not the first.
    pub name: Option<String>,
    /// Its shared object.
    pub filter: PathBuf,
    /// Its place among filters of the same class; smaller is nearer to the guest.
    pub order: i32,
    /// In a process of its own, or (trusted) in the worker.
    pub placement: Placement,
    /// How long it may have a request, on either way, before it counts as hung and is
    /// killed; 0: as long as it likes. None: what is usual for its class. A filter in the
    /// worker cannot be killed, and has no deadline.
    pub deadline_ms: Option<u64>,
    /// What becomes of requests while it is gone. None: what is usual for its class. A
    /// filter in the worker is not started again: what needs it then fails.
    pub on_failure: Option<OnFailure>,
    /// Private memory of its filter host, which all disks with this filter share: the most
    /// that one of them says counts. None: 256 MiB. A filter in the worker has no bound.
    pub memory_bytes: Option<u64>,
    /// Parameters, as the operator wrote them.
    pub params: Vec<(String, String)>,
    /// Names of disks it may issue requests to, in the order it will number them, from 1.
    pub grants: Vec<String>,
}
