//! `upcall serve`: the disks of one VM, in the foreground.
//!
//! What is asked for comes as [`DiskSpec`]s, from flags ([`crate::words`]) or a file
//! ([`mod@file`]); [`plan`] makes a worker's configuration of them; [`offer`] says what is served
//! and how a hypervisor takes it. The worker runs in this process, or, with `--restart`, in a
//! child that a [`supervisor`] watches and starts anew.

mod chains;
mod file;
mod handover;
mod log;
mod offer;
mod pages;
mod plan;
mod sockets;
mod spec;
mod stale;
mod stats;
mod supervisor;
mod value;

pub use spec::{DiskSpec, FilterOnDisk};
pub use stats::{control_beside, runtime_folder};
pub use value::{Mode, Size};

/// A value as an operator writes it, for words that are arguments of their own.
pub fn value<T: value::Value>(text: &str) -> Result<T, String> {
    T::from_text(text)
}

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Pid, Resource};
use upcall_control::{Events, Server, Shown};
use upcall_worker::{
    Chains, ChainsNow, DiskSummary, ExitReport, LogLevel, MovableWorker, RecoveryPolicy,
    SocketSource, StoreFailures, Wake, Worker, WorkerConfig,
};

use self::handover::{Orders, ToSupervisor};
use self::plan::{Plan, Socket};
use crate::cli::ServeArgs;
use crate::failure::Failure;
use crate::output::print;
use crate::signals::{Hangup, Shutdown};

/// Serves until SIGTERM or SIGINT.
pub fn run(args: ServeArgs) -> Result<(), Failure> {
    // First of all, so that a signal during the start is not lost.
    let failed = |error| Failure::new(format_args!("cannot watch signals: {error}"));
    let (shutdown, hangup) = (Shutdown::watch().map_err(failed)?, Hangup::watch().map_err(failed)?);
    let events = Events::default();
    log::begin(&args, events.clone());
    if args.supervised {
        let (orders, supervisor) = handover::take()?;
        return serve(args, &shutdown, &hangup, Some((orders, supervisor)), events);
    }
    stale::clear(&runtime_folder(), &upcall_control::sink());
    if args.restart {
        return supervise(args, &shutdown, &hangup);
    }
    serve(args, &shutdown, &hangup, None, events)
}

/// All disks that are asked for. `config`: the text of the file at `args.config`.
fn disks(args: &ServeArgs, config: Option<&str>) -> Result<Vec<DiskSpec>, Failure> {
    let mut disks = match (&args.config, config) {
        (Some(path), Some(text)) => file::disks(path, text)?,
        _ => Vec::new(),
    };
    disks.extend(args.disk.iter().cloned());
    for filter in &args.filter {
        filter.clone().join(&mut disks)?;
    }
    Ok(disks)
}

fn read_config(args: &ServeArgs) -> Result<Option<String>, Failure> {
    args.config.as_deref().map(file::read).transpose()
}

/// Runs the worker in this process.
fn serve(
    args: ServeArgs,
    shutdown: &Shutdown,
    hangup: &Hangup,
    supervised: Option<(Orders, ToSupervisor)>,
    events: Events,
) -> Result<(), Failure> {
    allow_descriptors();
    let mut failures = StoreFailures::default();
    let mut write_down = None;
    let (plan, stats, supervisor, specs) = match supervised {
        None => {
            let disks = disks(&args, read_config(&args)?.as_deref())?;
            let sockets = plan::sockets(&disks)?;
            let plan = plan::make(disks.clone(), sockets)?;
            let stats = place_stats(&args, &plan, rustix::process::getpid())?;
            (plan, stats, None, disks)
        }
        Some((orders, supervisor)) => {
            let disks = disks(&args, orders.config.as_deref())?;
            let mut sockets: Vec<Socket> = disks.iter().map(|_| None).collect();
            for (place, fd) in orders.sockets {
                let path = sockets::bound_path(&fd);
                if let Some(socket) = sockets.get_mut(place) {
                    *socket = Some((SocketSource::Fd(fd), path));
                }
            }
            let mut plan = plan::make(disks.clone(), sockets)?;
            if let Some(text) = &orders.chains {
                chains::restore(&mut plan.disks, text)?;
            }
            write_down = Some(chains::at(supervisor));
            let owner = rustix::process::getppid().unwrap_or(Pid::INIT);
            let stats = place_stats(&args, &plan, owner)?;
            failures.known = orders.failed;
            failures.report = Some(Arc::new(move |disk, text| supervisor.say_failed(disk, text)));
            (plan, stats, Some(supervisor), disks)
        }
    };
    let log = upcall_control::sink();
    let whole = {
        let (stats, drain_ms, log) = (stats.clone(), args.drain_ms, log.clone());
        move |disks| WorkerConfig {
            disks,
            stats: Some(stats.clone()),
            drain_ms,
            recovery: RecoveryPolicy::default(),
            write_down: write_down.clone(),
            log: log.clone(),
        }
    };
    let config = whole(plan.disks);
    let worker = if args.movable {
        let again = move || whole(plan::without_frontends(&specs));
        MovableWorker::start(config, Box::new(again), &failures).map(Serving::Movable)
    } else {
        Worker::start_after(config, &failures).map(Serving::Here)
    };
    let worker = worker.map_err(Failure::new)?;
    let control = args.control.clone().unwrap_or_else(|| stats::control_beside(&stats));
    let served = Server::start(&control, args.control_mode.0, worker.shown(), events);
    let control_server = match served {
        Ok(server) => Some(server),
        // The disks count more than who would look at them; but what was asked for by name is
        // given, or nothing is.
        Err(error) if args.control.is_none() => {
            log(LogLevel::Warn, &error.to_string());
            None
        }
        Err(error) => {
            let _ = worker.shutdown();
            return Err(Failure::new(error));
        }
    };
    let shown = control_server.as_ref().map(|_| control.as_path());
    let mut offer = offer::describe(&worker.disks(), &plan.places, &stats, shown);
    offer.push_str("ready\n");
    match supervisor {
        Some(supervisor) => supervisor.say_serving(&offer),
        // Who does not read what is offered is served all the same.
        None => drop(print(&offer)),
    }
    pages::give_back();
    while upcall_worker::wait(shutdown.as_fd(), hangup.as_fd()) == Wake::News {
        if hangup.take() {
            worker.look_again();
        }
    }
    log(LogLevel::Info, &format!("{}: ending in order", shutdown.cause()));
    drop(control_server);
    let report = worker.shutdown();
    if report.failures.is_empty() { Ok(()) } else { Err(Failure::new(report.failures.join("; "))) }
}

/// What is served, as large as it is by now.
fn disks_now(disks: Vec<DiskSummary>, chains: Chains) -> impl Fn() -> Vec<DiskSummary> {
    move || {
        let mut disks = disks.clone();
        for (number, disk) in disks.iter_mut().enumerate() {
            disk.info.capacity = chains.capacity_bytes(number).unwrap_or(disk.info.capacity);
        }
        disks
    }
}

/// As many descriptors as we may have. The usual soft limit is there for programs that use
/// select(2); each NBD connection takes a few.
fn allow_descriptors() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With fewer it works, too: who cannot be let in waits.
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

/// A worker, wherever its guest is.
enum Serving {
    Here(Worker),
    Movable(MovableWorker),
}

impl Serving {
    fn disks(&self) -> Vec<DiskSummary> {
        match self {
            Serving::Here(worker) => worker.disks(),
            Serving::Movable(worker) => worker.disks(),
        }
    }

    /// What the control socket shows.
    fn shown(&self) -> Shown {
        match self {
            Serving::Here(worker) => {
                let chains = worker.chains();
                let disks = Box::new(disks_now(worker.disks(), chains.clone()));
                Shown { disks, chains: Box::new(move || ChainsNow::Here(chains.clone())) }
            }
            Serving::Movable(worker) => {
                let (disks, chains) = (worker.view(), worker.view());
                let disks = Box::new(move || disks.disks());
                Shown { disks, chains: Box::new(move || chains.chains()) }
            }
        }
    }

    fn look_again(&self) {
        match self {
            Serving::Here(worker) => worker.look_again(),
            Serving::Movable(worker) => worker.look_again(),
        }
    }

    fn shutdown(self) -> ExitReport {
        match self {
            Serving::Here(worker) => worker.shutdown(),
            Serving::Movable(worker) => worker.shutdown(),
        }
    }
}

fn place_stats(args: &ServeArgs, plan: &Plan, owner: Pid) -> Result<PathBuf, Failure> {
    stats::place(args.stats.clone(), &plan.places, owner)
}

/// Watches a worker in a process of its own.
fn supervise(args: ServeArgs, shutdown: &Shutdown, hangup: &Hangup) -> Result<(), Failure> {
    let config = read_config(&args)?;
    let disks = disks(&args, config.as_deref())?;
    let sockets = plan::sockets(&disks)?;
    supervisor::run(&args, shutdown, hangup, sockets, config)
}
