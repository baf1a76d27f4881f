//! `upcall serve`: one worker in the foreground.
//!
//! What is asked for comes as [`DiskSpec`]s, from flags ([`crate::words`]) or a file
//! ([`mod@file`]); [`plan`] makes a worker's configuration of them; [`offer`] says what is served
//! and how a hypervisor takes it.

mod file;
mod log;
mod offer;
mod plan;
mod sockets;
mod spec;
mod stats;
mod value;

pub use spec::{DiskSpec, FilterOnDisk};
pub use stats::runtime_folder;

use std::os::fd::AsFd;

use upcall_worker::{LogLevel, Worker, WorkerConfig};

use crate::cli::ServeArgs;
use crate::failure::Failure;
use crate::output::print;
use crate::signals::Shutdown;

/// Serves until SIGTERM or SIGINT.
pub fn run(args: ServeArgs) -> Result<(), Failure> {
    // First of all, so that a signal during the start is not lost.
    let shutdown = Shutdown::watch()
        .map_err(|error| Failure::new(format_args!("cannot watch signals: {error}")))?;
    let mut disks = match &args.config {
        Some(path) => file::read(path)?,
        None => Vec::new(),
    };
    disks.extend(args.disk);
    for filter in args.filter {
        filter.join(&mut disks)?;
    }
    let plan = plan::make(disks)?;
    let stats = stats::place(args.stats, &plan.places)?;
    let log = log::sink(args.log_level);
    let config = WorkerConfig {
        disks: plan.disks,
        stats: Some(stats.clone()),
        drain_ms: args.drain_ms,
        log: log.clone(),
    };
    let worker = Worker::start(config).map_err(Failure::new)?;
    // Who does not read what is offered is served all the same.
    let _ = print(&offer::describe(&worker.disks(), &plan.places, &stats));
    let _ = print("ready\n");
    worker.wait(shutdown.as_fd());
    log(LogLevel::Info, &format!("{}: ending in order", shutdown.cause()));
    let report = worker.shutdown();
    if report.failures.is_empty() { Ok(()) } else { Err(Failure::new(report.failures.join("; "))) }
}
