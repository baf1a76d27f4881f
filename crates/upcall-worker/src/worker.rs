//! Putting a worker together, and taking it apart in the right order.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use upcall_abi::control::Disk as WireDisk;
use upcall_abi::filter::ISSUE_ARENA_SIZE;
use upcall_block::{DiskInfo, OpSet, RequestQueue, Store};
use upcall_chain::{Chain, ChainError, Class, DataAccess, Generation, SlotSpec};
use upcall_filterhost::params::{self, Checked};
use upcall_filterhost::{Counters, Description, FilterFile, HostProcess, OpenInstance};
use upcall_ring::channel::Channel;
use upcall_ring::{Access, Arena, Doorbell, Mapping, memfd, read_only_view};
use upcall_stats::{HopKind, HopSpec, Page};
use upcall_store::{MemoryStore, NullStore, RawOptions, RawStore};
use upcall_vhost::{BlkConfig, BlkOptions, Listener};

use crate::config::{
    DiskConfig, FrontendConfig, LogLevel, LogSink, Placement, SocketSource, StoreConfig,
    WorkerConfig,
};
use crate::engine::{Command, Engine, Lane, Link, Parts, Slot};
use crate::error::StartError;
use crate::frontend::Frontend;
use crate::hosts::{EngineHandle, HostId, ShownCounters, Supervisor, SupervisorOrders};

/// Entries of each ring of a channel.
const RING_ENTRIES: u32 = 1024;
/// Bytes of an arena for each queue: for requests of the frontend, and for those that
/// filters issue. Each holds the largest request (4 MiB) more than once.
const ARENA_GUEST: usize = 12 << 20;
const ARENA_ISSUED: usize = 8 << 20;
const ARENA_QUEUE: usize = ARENA_GUEST + ARENA_ISSUED;
const QUEUES_MAX: u16 = 64;

/// A running worker: serves its disks until it is shut down.
pub struct Worker {
    disks: Vec<ServedDisk>,
    supervisor: Supervisor,
    /// Instances by filter host, for closing.
    instances: Vec<Vec<u32>>,
    drain_ms: u64,
    log: LogSink,
    /// Removed with the worker.
    _page: Arc<Page>,
}

/// One disk of a running worker.
struct ServedDisk {
    name: Arc<str>,
    store: Arc<dyn Store>,
    info: DiskInfo,
    summary: String,
    chain: Vec<String>,
    engines: Vec<RunningEngine>,
    frontend: Option<Frontend>,
}

struct RunningEngine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

impl RunningEngine {
    /// Ends the thread, once nothing is in flight; false if it had died.
    fn quit(&mut self) -> bool {
        self.handle.send(Command::Quit);
        self.thread.take().is_none_or(|thread| thread.join().is_ok())
    }
}

impl Drop for RunningEngine {
    fn drop(&mut self) {
        self.quit();
    }
}

/// What is served, for people and for who starts QEMU.
#[derive(Clone, Debug)]
pub struct DiskSummary {
    /// The disk's name.
    pub name: String,
    /// What the guest is offered.
    pub info: DiskInfo,
    /// What the store is.
    pub store: String,
    /// Its filters, from the guest to the store.
    pub chain: Vec<String>,
    /// Queues.
    pub queues: u16,
    /// Where QEMU connects, if it is a path.
    pub socket: Option<PathBuf>,
}

/// How a worker ended.
#[derive(Debug, Default)]
pub struct ExitReport {
    /// What could not be done in good order; empty: everything is on the disks.
    pub failures: Vec<String>,
}

/// A filter host while the worker is being put together.
struct Starting {
    path: PathBuf,
    placement: Placement,
    process: HostProcess,
    description: Description,
    issue_arena: Option<Arc<Mapping>>,
    channels: u32,
    instances: Vec<u32>,
}

/// A slot while the worker is being put together.
struct StartingSlot {
    host: usize,
    instance: u32,
    params: Checked,
    grants: Vec<usize>,
}

/// A disk while the worker is being put together.
struct StartingDisk {
    name: Arc<str>,
    config: DiskConfig,
    store: Arc<dyn Store>,
    listener: Option<Listener>,
    chain: Arc<Chain>,
    /// In the order of the chain.
    slots: Vec<StartingSlot>,
    arena: Option<Arc<Mapping>>,
    /// Index of its first hop in the page of counters: the request, then the slots, then
    /// the store.
    first_hop: usize,
}

impl Worker {
    /// Checks everything, starts everything, and serves. On an error nothing is left: no
    /// socket, no process, no page; files that a filter's parameters name are opened (and
    /// created) only after everything that can be checked without them is right.
    pub fn start(config: WorkerConfig) -> Result<Worker, StartError> {
        let WorkerConfig { disks, stats, drain_ms, log } = config;
        check_names(&disks)?;
        let stores =
            disks.iter().map(|disk| open_store(disk, &log)).collect::<Result<Vec<_>, _>>()?;
        let mut hosts: Vec<Starting> = Vec::new();
        let mut starting: Vec<StartingDisk> = Vec::new();
        let names: Vec<(String, u16, bool)> = disks
            .iter()
            .map(|disk| (disk.name.clone(), disk.queues, disk.chain.is_empty()))
            .collect();
        let (mut first_hop, mut next_instance) = (0, 0);
        for (mut config, store) in disks.into_iter().zip(stores) {
            let listener = listen(&mut config)?;
            let (chain, slots) =
                plan_chain(&config, &*store, &names, &mut hosts, &mut next_instance, &log)?;
            let hops = 2 + slots.len();
            let name = config.name.as_str().into();
            starting.push(StartingDisk {
                name,
                config,
                store,
                listener,
                chain,
                slots,
                arena: None,
                first_hop,
            });
            first_hop += hops;
        }
        let page = make_page(stats, &starting, &hosts)?;
        let orders =
            SupervisorOrders::new().map_err(|source| system("", "make a doorbell", source))?;
        let mut parts = Vec::new();
        for index in 0..starting.len() {
            give_arena(&mut starting[index], index as u32, &mut hosts)?;
            parts.push(connect_engines(&starting, index, &mut hosts, &page, &orders, &log)?);
        }
        let shown = open_instances(&starting, &mut hosts)?;
        for (_, parts) in parts.iter_mut().flatten() {
            for link in &mut parts.links {
                link.inline = hosts[link.host.0].process.inline_channel(link.number);
            }
        }
        let mut served = Vec::new();
        for (index, parts) in parts.into_iter().enumerate() {
            served.push(start_engines(&starting, index, parts)?);
        }
        let all: Vec<EngineHandle> =
            served.iter().flatten().map(|engine: &RunningEngine| engine.handle.clone()).collect();
        let instances = hosts.iter().map(|host| host.instances.clone()).collect();
        let filter_names: Vec<String> =
            hosts.iter().map(|host| host.description.name.clone()).collect();
        let processes = hosts.into_iter().map(|host| host.process).collect();
        let supervisor =
            Supervisor::start(processes, all, shown, page.clone(), log.clone(), orders)
                .map_err(|source| system("", "start a thread", source))?;
        let mut disks = Vec::new();
        for (disk, engines) in starting.into_iter().zip(served) {
            disks.push(serve(disk, engines, &filter_names, drain_ms, &log)?);
        }
        Ok(Worker { disks, supervisor, instances, drain_ms, log, _page: page })
    }

    /// What is served.
    pub fn disks(&self) -> Vec<DiskSummary> {
        let summary = |disk: &ServedDisk| DiskSummary {
            name: disk.name.to_string(),
            info: disk.info.clone(),
            store: disk.summary.clone(),
            chain: disk.chain.clone(),
            queues: disk.engines.len() as u16,
            socket: disk.frontend.as_ref().and_then(|frontend| frontend.socket().map(Into::into)),
        };
        self.disks.iter().map(summary).collect()
    }

    /// Serves a queue that is not one of a frontend of ours. For disks without a frontend:
    /// tools and tests. Panics if there is no such disk or queue.
    pub fn start_queue(&self, disk: usize, queue: u16, requests: Box<dyn RequestQueue>) {
        self.disks[disk].engines[usize::from(queue)].handle.send(Command::Start(requests));
    }

    /// Stops serving such a queue and gives it back; waits for what it took to end, and
    /// cancels what filters still hold after the worker's `drain_ms`.
    pub fn stop_queue(&self, disk: usize, queue: u16) -> Option<Box<dyn RequestQueue>> {
        stop_queue(&self.disks[disk].engines[usize::from(queue)].handle, self.drain_ms)
    }

    /// Waits until `shutdown` is readable.
    pub fn wait(&self, shutdown: BorrowedFd<'_>) {
        let mut fds = [PollFd::from_borrowed_fd(shutdown, PollFlags::IN)];
        while !matches!(poll(&mut fds, None), Ok(1..)) {}
    }

    /// Ends in good order: frontends, requests, filter instances, stores, filter hosts.
    pub fn shutdown(self) -> ExitReport {
        let mut report = ExitReport::default();
        let mut disks = self.disks;
        for disk in &mut disks {
            if let Some(frontend) = disk.frontend.take() {
                frontend.stop();
            }
        }
        // Instances close while the queue threads still run: what they have issued must end.
        let mut hosts = self.supervisor.stop();
        for (host, instances) in hosts.iter_mut().zip(&self.instances) {
            for instance in instances {
                if host.exit_description().is_none()
                    && let Err(error) = host.close(*instance)
                {
                    (self.log)(LogLevel::Warn, &error.to_string());
                }
            }
        }
        for disk in disks {
            for mut engine in disk.engines {
                if !engine.quit() {
                    report
                        .failures
                        .push(format!("disk {}: a queue thread ended by a bug of ours", disk.name));
                }
            }
            if let Err(errno) = disk.store.sync() {
                report.failures.push(format!(
                    "disk {}: the last writes may not be on {} ({errno}): check the device and the guest's file systems",
                    disk.name, disk.summary
                ));
            }
        }
        for mut host in hosts {
            if host.exit_description().is_none()
                && let Err(error) = host.quit()
            {
                (self.log)(LogLevel::Warn, &error.to_string());
            }
        }
        report
    }
}

/// Stops a queue thread's queue, from another thread.
pub(crate) fn stop_queue(engine: &EngineHandle, drain_ms: u64) -> Option<Box<dyn RequestQueue>> {
    let (reply, stopped) = sync_channel(1);
    engine.send(Command::Stop { drain_ms, reply });
    stopped.recv().ok().flatten()
}

fn system(disk: &str, what: &'static str, source: impl Into<std::io::Error>) -> StartError {
    StartError::System { disk: disk.to_owned(), what, source: source.into() }
}

fn check_names(disks: &[DiskConfig]) -> Result<(), StartError> {
    if disks.is_empty() {
        return Err(StartError::NoDisks);
    }
    let mut seen = HashSet::new();
    for disk in disks {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if disk.name.is_empty() || disk.name.len() > 47 || !disk.name.chars().all(plain) {
            return Err(StartError::DiskName(disk.name.clone()));
        }
        if !seen.insert(&disk.name) {
            return Err(StartError::DuplicateDisk(disk.name.clone()));
        }
        let least = u16::from(disk.frontend.is_some() || !disk.chain.is_empty());
        if disk.queues < least || disk.queues > QUEUES_MAX {
            return Err(StartError::Queues { disk: disk.name.clone(), queues: disk.queues });
        }
    }
    Ok(())
}

fn open_store(disk: &DiskConfig, log: &LogSink) -> Result<Arc<dyn Store>, StartError> {
    let failed = |source| StartError::Store { disk: disk.name.clone(), source };
    Ok(match &disk.store {
        StoreConfig::Raw { path, direct, engine } => {
            let (log, name) = (log.clone(), disk.name.clone());
            let mut options = RawOptions::new(path);
            options.read_only = disk.read_only;
            options.direct = *direct;
            options.engine = *engine;
            options.on_failure = Some(Arc::new(move |text: &str| {
                log(LogLevel::Error, &format!("disk {name}: {text}"))
            }));
            Arc::new(RawStore::open(options).map_err(failed)?)
        }
        StoreConfig::Memory { bytes } => Arc::new(MemoryStore::new(*bytes).map_err(failed)?),
        StoreConfig::Null { bytes } => Arc::new(NullStore::new(*bytes).map_err(failed)?),
    })
}

fn listen(config: &mut DiskConfig) -> Result<Option<Listener>, StartError> {
    let Some(frontend) = &mut config.frontend else { return Ok(None) };
    let socket = std::mem::replace(&mut frontend.socket, SocketSource::Path(PathBuf::new(), None));
    let listener = match socket {
        SocketSource::Path(path, mode) => Listener::bind(&path, mode),
        SocketSource::Fd(fd) => Listener::adopt(fd),
    };
    listener.map(Some).map_err(|source| StartError::Listen { disk: config.name.clone(), source })
}

/// Starts the filter hosts that a disk's filters need and puts its chain together.
fn plan_chain(
    config: &DiskConfig,
    store: &dyn Store,
    disks: &[(String, u16, bool)],
    hosts: &mut Vec<Starting>,
    next_instance: &mut u32,
    log: &LogSink,
) -> Result<(Arc<Chain>, Vec<StartingSlot>), StartError> {
    let disk = &config.name;
    let mut slots = Vec::new();
    let mut specs = Vec::new();
    for slot in &config.chain {
        let host = host_of(disk, &slot.filter, slot.placement, hosts, log)?;
        let Starting { description, instances, .. } = &mut hosts[host];
        let params = params::check(description, &slot.params)
            .map_err(|source| StartError::Param { disk: disk.clone(), source })?;
        let grants = slot
            .grants
            .iter()
            .map(|granted| {
                grant(granted, disk, disks).map_err(|why| StartError::Grant {
                    disk: disk.clone(),
                    filter: description.name.clone(),
                    granted: granted.clone(),
                    why,
                })
            })
            .collect::<Result<_, _>>()?;
        // Numbered through the worker, so that an entry that names a foreign instance never fits.
        let instance = *next_instance;
        *next_instance += 1;
        instances.push(instance);
        specs.push(spec_of(description, slot.order));
        slots.push(Some(StartingSlot { host, instance, params, grants }));
    }
    let read_only =
        DiskInfo { read_only: store.info().read_only || config.read_only, ..store.info().clone() };
    let chain = Chain::new(Generation(1), specs, &read_only).map_err(|source| {
        let filter = match &source {
            ChainError::Spec { source_index, .. } => {
                slots[*source_index].as_ref().map(|slot| hosts[slot.host].description.name.clone())
            }
            _ => None,
        };
        StartError::Chain {
            disk: disk.clone(),
            filter: filter.unwrap_or_else(|| "chain".into()),
            source,
        }
    })?;
    let ordered =
        chain.slots().filter_map(|(index, _)| slots[chain.source_index(index)].take()).collect();
    Ok((Arc::new(chain), ordered))
}

/// The disk that a name grants.
fn grant(name: &str, to: &str, disks: &[(String, u16, bool)]) -> Result<usize, &'static str> {
    let Some(index) = disks.iter().position(|(known, ..)| known == name) else {
        return Err("there is no such disk");
    };
    if name == to {
        return Err("a filter reaches its own disk without a grant");
    }
    if disks[index].1 != 0 || !disks[index].2 {
        return Err(
            "it is served to a guest or has filters of its own; grant a disk that is there for this alone",
        );
    }
    Ok(index)
}

fn host_of(
    disk: &str,
    path: &std::path::Path,
    placement: Placement,
    hosts: &mut Vec<Starting>,
    log: &LogSink,
) -> Result<usize, StartError> {
    let failed = |source| StartError::Filter { disk: disk.to_owned(), source };
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if let Some(known) =
        hosts.iter().position(|host| host.path == path && host.placement == placement)
    {
        return Ok(known);
    }
    let file = FilterFile::open(&path).map_err(failed)?;
    let mut process = HostProcess::start(&file, placement, filter_log(log)).map_err(failed)?;
    let description = process.describe().map_err(failed)?;
    let issue_arena = None;
    hosts.push(Starting {
        path,
        placement,
        process,
        description,
        issue_arena,
        channels: 0,
        instances: Vec::new(),
    });
    Ok(hosts.len() - 1)
}

fn filter_log(log: &LogSink) -> upcall_filterhost::LogSink {
    let log = log.clone();
    Arc::new(move |line: upcall_filterhost::LogLine| {
        let level = match line.level {
            upcall_filterhost::LogLevel::Error => LogLevel::Error,
            upcall_filterhost::LogLevel::Warn => LogLevel::Warn,
            upcall_filterhost::LogLevel::Info => LogLevel::Info,
            upcall_filterhost::LogLevel::Debug => LogLevel::Debug,
        };
        log(level, &format!("filter {}: {}", line.filter, line.text));
    })
}

/// What the chain has to know of a filter. The description was checked when it came.
fn spec_of(description: &Description, order: i32) -> SlotSpec {
    let set = |mask| OpSet::from_mask(mask).unwrap_or(OpSet::NONE);
    SlotSpec {
        class: Class::from_number(description.class).unwrap_or(Class::Inspection),
        order,
        ops: set(description.ops),
        sees: set(description.sees),
        changes: set(description.changes),
        answers: set(description.answers),
    }
}

fn make_page(
    path: Option<PathBuf>,
    disks: &[StartingDisk],
    hosts: &[Starting],
) -> Result<Arc<Page>, StartError> {
    let mut specs = Vec::new();
    for disk in disks {
        let hop = |name: String, kind| HopSpec {
            disk: disk.name.to_string(),
            name,
            kind,
            queues: disk.config.queues,
        };
        specs.push(hop("request".into(), HopKind::Request));
        specs.extend(
            disk.slots
                .iter()
                .map(|slot| hop(hosts[slot.host].description.name.clone(), HopKind::Filter)),
        );
        specs.push(hop("store".into(), HopKind::Store));
    }
    Page::create(path.as_deref(), &specs)
        .map(Arc::new)
        .map_err(|source| StartError::Stats { path: path.unwrap_or_default(), source })
}

/// Makes the arena of a disk whose filters want data, and gives it to their hosts: for
/// writing only to those that may change data there.
fn give_arena(
    disk: &mut StartingDisk,
    number: u32,
    hosts: &mut [Starting],
) -> Result<(), StartError> {
    let accesses: Vec<(usize, DataAccess)> = disk
        .chain
        .slots()
        .map(|(index, spec)| (disk.slots[index.index()].host, spec.arena_access()))
        .collect();
    // Zeroes that are written for a chain need room too, even if no filter looks at them.
    if disk.slots.is_empty() {
        return Ok(());
    }
    let size = ARENA_QUEUE * usize::from(disk.config.queues);
    let failed = |source| system(&disk.name, "make an arena", source);
    let fd = memfd("upcall-arena", size).map_err(failed)?;
    let view = read_only_view(&fd).map_err(failed)?;
    let mut given = HashSet::new();
    for (host, _) in &accesses {
        if !given.insert(*host) {
            continue;
        }
        let most =
            accesses.iter().filter(|(other, _)| other == host).map(|(_, access)| *access).max();
        let (fd, writable) = match most {
            Some(DataAccess::Change) => (fd.as_fd(), true),
            Some(DataAccess::Observe) => (view.as_fd(), false),
            _ => continue,
        };
        hosts[*host]
            .process
            .arena(number, fd, size as u64, writable)
            .map_err(|source| StartError::Filter { disk: disk.name.to_string(), source })?;
    }
    disk.arena = Some(Arc::new(Mapping::new(&fd, 0, size, Access::ReadWrite).map_err(failed)?));
    Ok(())
}

/// Everything for a disk's queue threads except their stores, which they open themselves.
fn connect_engines(
    disks: &[StartingDisk],
    index: usize,
    hosts: &mut [Starting],
    page: &Arc<Page>,
    orders: &SupervisorOrders,
    log: &LogSink,
) -> Result<Vec<(EngineHandle, Parts)>, StartError> {
    let disk = &disks[index];
    let mut engines = Vec::new();
    for queue in 0..disk.config.queues {
        let failed = |source| system(&disk.name, "make a channel", source);
        let (commands, receiver) = channel();
        let wake = Doorbell::new().map_err(failed)?;
        let mut links: Vec<Link> = Vec::new();
        let mut slots = Vec::new();
        for (place, slot) in disk.slots.iter().enumerate() {
            let host = HostId(slot.host);
            let link = match links.iter().position(|link| link.host == host) {
                Some(link) => link,
                None => {
                    links.push(connect(&disk.name, index, host, &mut hosts[slot.host], &wake)?);
                    links.len() - 1
                }
            };
            slots.push(Slot {
                link,
                instance: slot.instance,
                issues: hosts[slot.host].description.issues(),
                grants: slot.grants.iter().map(|granted| lane_of(disk, *granted)).collect(),
                stats: page.block(disk.first_hop + 1 + place, queue),
            });
        }
        let start = ARENA_QUEUE * usize::from(queue);
        let arenas = match &disk.arena {
            None => None,
            Some(mapping) => Some([
                Arena::new(mapping.clone(), start, ARENA_GUEST).map_err(failed)?,
                Arena::new(mapping.clone(), start + ARENA_GUEST, ARENA_ISSUED).map_err(failed)?,
            ]),
        };
        let parts = Parts {
            disk: disk.name.clone(),
            commands: receiver,
            wake: wake.clone(),
            lanes: Vec::new(),
            slots,
            links,
            arenas,
            request_stats: page.block(disk.first_hop, queue),
            store_stats: page.block(disk.first_hop + 1 + disk.slots.len(), queue),
            log: log.clone(),
            give_up: orders.give_up(),
        };
        engines.push((EngineHandle { commands, wake }, parts));
    }
    Ok(engines)
}

/// The disks that a disk's filters were granted, each once: lanes 1 and up.
fn granted(disk: &StartingDisk) -> Vec<usize> {
    let mut all = Vec::new();
    for granted in disk.slots.iter().flat_map(|slot| &slot.grants) {
        if !all.contains(granted) {
            all.push(*granted);
        }
    }
    all
}

fn lane_of(disk: &StartingDisk, granted_disk: usize) -> usize {
    1 + granted(disk).iter().position(|known| *known == granted_disk).unwrap_or(0)
}

fn connect(
    disk: &str,
    number: usize,
    id: HostId,
    host: &mut Starting,
    wake: &Doorbell,
) -> Result<Link, StartError> {
    let failed = |source| system(disk, "make a channel", source);
    let filter_failed = |source| StartError::Filter { disk: disk.to_owned(), source };
    if host.description.issues() && host.issue_arena.is_none() {
        let fd = memfd("upcall-issue-arena", ISSUE_ARENA_SIZE as usize).map_err(failed)?;
        host.process.issue_arena(fd.as_fd(), ISSUE_ARENA_SIZE).map_err(filter_failed)?;
        let mapping =
            Mapping::new(&fd, 0, ISSUE_ARENA_SIZE as usize, Access::ReadWrite).map_err(failed)?;
        host.issue_arena = Some(Arc::new(mapping));
    }
    let (ring, fd) = Channel::create(RING_ENTRIES).map_err(failed)?;
    let doorbell = Doorbell::new().map_err(failed)?;
    let channel = host.channels;
    host.channels += 1;
    host.process
        .channel(channel, number as u32, fd.as_fd(), doorbell.as_fd(), wake.as_fd())
        .map_err(filter_failed)?;
    let name = host.description.name.as_str().into();
    Ok(Link::new(id, name, channel, ring, doorbell, host.issue_arena.clone()))
}

/// Opens all instances: from here on files of parameters exist and filters' code runs.
fn open_instances(
    disks: &[StartingDisk],
    hosts: &mut [Starting],
) -> Result<Vec<ShownCounters>, StartError> {
    let wire = |disk: &StartingDisk| {
        let info = disk.chain.info();
        WireDisk {
            capacity: info.capacity,
            block_size: info.block_size,
            read_only: u32::from(info.read_only),
        }
    };
    let mut loaded = vec![false; hosts.len()];
    let mut shown = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let failed = |source| StartError::Filter { disk: disk.name.to_string(), source };
        for (place, slot) in disk.slots.iter().enumerate() {
            let process = &mut hosts[slot.host].process;
            if !std::mem::replace(&mut loaded[slot.host], true) {
                process.load().map_err(failed)?;
            }
            let params = slot
                .params
                .open()
                .map_err(|source| StartError::Param { disk: disk.name.to_string(), source })?;
            let counters =
                Counters::new().map_err(|source| system(&disk.name, "make counters", source))?;
            let all: Vec<WireDisk> = std::iter::once(wire(disk))
                .chain(slot.grants.iter().map(|granted| wire(&disks[*granted])))
                .collect();
            process
                .open(&OpenInstance {
                    instance: slot.instance,
                    arena: number as u32,
                    disks: &all,
                    params: &params,
                    counters: &counters,
                })
                .map_err(failed)?;
            shown.push(ShownCounters { hop: disk.first_hop + 1 + place, counters });
        }
    }
    for host in hosts {
        host.process
            .serve()
            .map_err(|source| StartError::Filter { disk: String::new(), source })?;
    }
    Ok(shown)
}

/// Starts a disk's queue threads; each opens its stores itself.
fn start_engines(
    disks: &[StartingDisk],
    index: usize,
    parts: Vec<(EngineHandle, Parts)>,
) -> Result<Vec<RunningEngine>, StartError> {
    let disk = &disks[index];
    let mut engines = Vec::new();
    for (queue, (handle, mut parts)) in parts.into_iter().enumerate() {
        let lanes: Vec<_> = std::iter::once(index)
            .chain(granted(disk))
            .map(|lane| (disks[lane].chain.clone(), disks[lane].store.clone()))
            .collect();
        let (ready, started) = sync_channel(1);
        let thread =
            std::thread::Builder::new().name(format!("q{queue}-{}", disk.name)).spawn(move || {
                let opened: Result<Vec<Lane>, std::io::Error> = lanes
                    .into_iter()
                    .map(|(chain, store)| Ok(Lane { chain, store: store.open_queue()? }))
                    .collect();
                match opened {
                    Err(error) => drop(ready.send(Err(error))),
                    Ok(lanes) => {
                        parts.lanes = lanes;
                        drop(ready.send(Ok(())));
                        Engine::new(parts).run();
                    }
                }
            });
        let thread = thread.map_err(|source| system(&disk.name, "start a queue thread", source))?;
        match started.recv() {
            Ok(Ok(())) => engines.push(RunningEngine { handle, thread: Some(thread) }),
            Ok(Err(source)) => {
                return Err(system(&disk.name, "open its store in a queue thread", source));
            }
            Err(_) => {
                return Err(system(
                    &disk.name,
                    "start a queue thread",
                    std::io::Error::other("it ended at once"),
                ));
            }
        }
    }
    Ok(engines)
}

fn serve(
    disk: StartingDisk,
    engines: Vec<RunningEngine>,
    filter_names: &[String],
    drain_ms: u64,
    log: &LogSink,
) -> Result<ServedDisk, StartError> {
    let info = disk.chain.info().clone();
    let handles: Vec<EngineHandle> = engines.iter().map(|engine| engine.handle.clone()).collect();
    let frontend = match (disk.config.frontend, disk.listener) {
        (Some(FrontendConfig { queue_size, serial, write_cache, .. }), Some(listener)) => {
            let options = BlkOptions {
                queues: disk.config.queues,
                queue_size_max: queue_size,
                serial,
                write_cache,
            };
            let blk = BlkConfig::new(info.clone(), options)
                .map_err(|source| StartError::Device { disk: disk.name.to_string(), source })?;
            let started = Frontend::start(
                disk.name.clone(),
                listener,
                Arc::new(blk),
                handles,
                drain_ms,
                log.clone(),
            );
            Some(started.map_err(|source| system(&disk.name, "start its frontend", source))?)
        }
        _ => None,
    };
    Ok(ServedDisk {
        summary: disk.store.describe(),
        chain: disk.slots.iter().map(|slot| filter_names[slot.host].clone()).collect(),
        name: disk.name,
        store: disk.store,
        info,
        engines,
        frontend,
    })
}
