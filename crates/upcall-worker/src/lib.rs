//! The worker: the disks of one VM, served.
//!
//! It joins what other crates do: frontends hand requests to queue threads
//! (`engine`), which walk them through the chain's filters and the stores. One thread for
//! each queue owns a request from its arrival to its completion; one thread for each
//! frontend speaks its protocol; one watches the filter hosts (`hosts`).
//!
//! Control-plane logic (where a configuration comes from, how it is shown) is not here.
#![forbid(unsafe_code)]

mod chains;
mod config;
mod direct;
mod engine;
mod error;
mod extents;
mod frontend;
mod grow;
mod hosts;
mod movable;
mod plant;
mod recipe;
mod share;
mod start;
mod worker;

pub use chains::request::{
    ChainChange, ChainView, ChangeError, Changed, DiskChange, DiskChanged, Edit, InFlightView,
    Place, SlotView, Trial,
};
pub use chains::{Chains, WriteDown};
pub use config::{
    DiskConfig, Engine, FrontendConfig, ImageFormat, ImageOptions, ImageSource, Layer, LogLevel,
    LogSink, NbdAddress, NbdConfig, NbdPlace, NbdServer, NbdTls, Placement, ReportFailure,
    SlotConfig, SocketSource, StoreConfig, StoreFailures, TlsFiles, WorkerConfig,
};
pub use direct::{DirectClient, DirectQueue, direct_queue};
pub use error::StartError;
pub use movable::{Again, ChainsNow, MovableView, MovableWorker};
pub use upcall_chain::{FailedAt, OnFailure, RecoveryPolicy};
pub use worker::{DiskSummary, ExitReport, Wake, Worker, wait};

#[cfg(feature = "sim")]
#[doc(hidden)]
pub use engine::sim;

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub use engine::hostile::play as play_hostile_hosts;
