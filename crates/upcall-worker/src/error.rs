//! Why a worker does not start.

use std::io;
use std::path::PathBuf;

use upcall_chain::{ChainError, PolicyError};
use upcall_filterhost::{FilterError, ParamError};
use upcall_nbd::{ExportError, TlsError};
use upcall_state::StateError;
use upcall_store::OpenError;
use upcall_vhost::{ConfigError, ListenError};

/// Why a worker does not start. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A disk that cannot move: serve it without --movable.
    #[error(
        "disk {disk}: only images and devices that are served over vhost-user alone can move to \
         another host: what is in memory, or with an NBD server, cannot"
    )]
    NotMovable {
        /// Which.
        disk: String,
    },
    /// Its guest comes from a host where its data went through other filters. Give it the same,
    /// by the same names and in the same order; or, if that is meant, remove the file `handover`
    /// from the folder of its state.
    #[error(
        "disk {disk}: where its guest comes from its chain was [{theirs}], here it would be \
         [{ours}]: give it the same filters by the same names"
    )]
    OtherChain {
        /// Which.
        disk: String,
        /// The names there.
        theirs: String,
        /// And here.
        ours: String,
    },
    /// There is nothing to serve. Name at least one disk.
    #[error("no disk to serve: name at least one")]
    NoDisks,
    /// Two disks have one name, and messages and grants could mean either.
    #[error("two disks are called {0:?}: give each disk a name of its own")]
    DuplicateDisk(String),
    /// A name that is empty, too long, or would not be readable in messages.
    #[error("{0:?} is no name for a disk: use 1 to 47 letters, digits, '-', '_' and '.'")]
    DiskName(String),
    /// A slot's name that cannot be that of its files, or that two slots have.
    #[error(
        "disk {disk}: {name:?} is no name for a filter's slot, or two have it: use 1 to 40 letters, digits and '-'"
    )]
    SlotName {
        /// Which disk.
        disk: String,
        /// As given.
        name: String,
    },
    /// Queues out of range.
    #[error("disk {disk}: {queues} queues are not possible: use 1 to 64")]
    Queues {
        /// Which disk.
        disk: String,
        /// How many were asked for.
        queues: u16,
    },
    /// The store cannot be opened.
    #[error("disk {disk}: {source}")]
    Store {
        /// Which disk.
        disk: String,
        /// Why.
        source: OpenError,
    },
    /// A store's thread cannot start.
    #[error("disk {disk}: cannot {what}: {source}")]
    System {
        /// Which disk.
        disk: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The device that was asked for is not possible.
    #[error("disk {disk}: {source}")]
    Device {
        /// Which disk.
        disk: String,
        /// Why.
        source: ConfigError,
    },
    /// The socket cannot be listened on.
    #[error("disk {disk}: {source}")]
    Listen {
        /// Which disk.
        disk: String,
        /// Why.
        source: ListenError,
    },
    /// A disk that a guest writes cannot be written by NBD clients as well. Let one of them
    /// only read.
    #[error(
        "disk {disk}: it cannot be written over vhost-user and over NBD at once: let NBD clients only read (nbd-readonly=on), or leave one out"
    )]
    SecondWriter {
        /// Which disk.
        disk: String,
    },
    /// The address for NBD cannot be listened on.
    #[error("disk {disk}: NBD: {source}")]
    NbdListen {
        /// Which disk.
        disk: String,
        /// Why.
        source: upcall_nbd::ListenError,
    },
    /// Disks of one NBD server want it to be different.
    #[error(
        "disk {disk}: other disks are served at the same NBD address with other TLS files or another limit of connections: say the same for all of them"
    )]
    NbdShared {
        /// Which disk.
        disk: String,
    },
    /// Two exports of one NBD server have the same name. Name one of them otherwise.
    #[error("disk {disk}: there is an export named {export:?} at its NBD address already")]
    NbdTwice {
        /// Which disk.
        disk: String,
        /// The name.
        export: String,
    },
    /// A name that an NBD export cannot have.
    #[error("disk {disk}: {source}")]
    NbdExport {
        /// Which disk.
        disk: String,
        /// Why.
        source: ExportError,
    },
    /// The certificates cannot be used.
    #[error("disk {disk}: NBD: {source}")]
    NbdTls {
        /// Which disk.
        disk: String,
        /// Why.
        source: TlsError,
    },
    /// A filter cannot be used.
    #[error("disk {disk}: {source}")]
    Filter {
        /// Which disk.
        disk: String,
        /// Why.
        source: Box<FilterError>,
    },
    /// A filter's parameters are wrong.
    #[error("disk {disk}: {source}")]
    Param {
        /// Which disk.
        disk: String,
        /// Why.
        source: Box<ParamError>,
    },
    /// The folder for the state of the disk's filters cannot be used.
    #[error("disk {disk}: the state of its filters: {source}")]
    State {
        /// Which disk.
        disk: String,
        /// Why.
        source: StateError,
    },
    /// A filter keeps a state, and there is no place for it.
    #[error(
        "disk {disk}: filter {filter} keeps a state, and a block device has no folder for it: \
         give the disk state=DIR"
    )]
    NoState {
        /// Which disk.
        disk: String,
        /// Which filter.
        filter: String,
    },
    /// The filters cannot stand together, or not above this store.
    #[error("disk {disk}: filter {filter}: {source}")]
    Chain {
        /// Which disk.
        disk: String,
        /// Which filter.
        filter: String,
        /// Why.
        source: ChainError,
    },
    /// A filter would be slipped past although it decides what the disk holds. Choose
    /// another policy for it.
    #[error("disk {disk}: filter {filter}: {source}")]
    Policy {
        /// Which disk.
        disk: String,
        /// Which filter.
        filter: String,
        /// Why not.
        source: PolicyError,
    },
    /// What a filter misses while it is bypassed cannot be recorded.
    #[error(
        "disk {disk}: filter {filter}: what it misses while it is bypassed cannot be recorded: {why}; make that possible, or use on-failure=hold for it"
    )]
    Gaps {
        /// Which disk.
        disk: String,
        /// Which filter.
        filter: String,
        /// Why not.
        why: String,
    },
    /// A filter is granted what cannot be granted.
    #[error("disk {disk}: filter {filter} cannot be granted disk {granted:?}: {why}")]
    Grant {
        /// Which disk.
        disk: String,
        /// Which filter.
        filter: String,
        /// Which disk it should get.
        granted: String,
        /// Why not.
        why: &'static str,
    },
    /// The page of counters cannot be made.
    #[error(
        "cannot make the page of counters {path}: {source}; name another place, or free some room there"
    )]
    Stats {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
