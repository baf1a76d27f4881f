//! Putting a worker together: everything is checked before anything is left behind.

mod chain;
mod connect;
mod gaps;
mod nbd;
mod open;
mod state;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use upcall_block::{DiskInfo, Store};
use upcall_chain::{Chain, OnFailure};
use upcall_filterhost::HostProcess;
use upcall_filterhost::params::Checked;
use upcall_gap::Gaps;
use upcall_stats::{HopKind, HopSpec, Page};
use upcall_store::{ImageOptions, ImageStore, MemoryStore, NullStore, RawOptions, RawStore};
use upcall_vhost::{BlkConfig, BlkOptions, Listener};

use crate::chains::{Chains, Core};
use crate::config::{
    DiskConfig, FrontendConfig, LogLevel, LogSink, SlotConfig, SocketSource, StoreConfig,
    StoreFailures, WorkerConfig,
};
use crate::error::StartError;
use crate::extents::DiskExtents;
use crate::hosts::{EngineHandle, Supervisor, SupervisorOrders};
use crate::recipe::Recipe;
use crate::worker::{RunningEngine, Worker};
use chain::plan_chain;
pub(crate) use chain::{filter_log, is_slot_name, spec_of};
pub(crate) use connect::{ArenaMemory, needs_arena};
use connect::{connect_engines, give_arena};
pub(crate) use gaps::Made;
use gaps::open_gaps;
use open::{plan_instances, serve, set_up_hosts, start_engines};
pub(crate) use state::StateFolder;

/// Most queues of a disk.
const QUEUES_MAX: u16 = 64;

/// Filters of a disk more than there are at the start, of which the page of counters can tell.
pub(crate) const SPARE_HOPS: usize = 8;

/// A filter host while the worker is being put together.
struct Starting {
    path: PathBuf,
    process: HostProcess,
    recipe: Recipe,
}

/// A slot while the worker is being put together.
struct StartingSlot {
    host: usize,
    instance: u32,
    params: Checked,
    grants: Vec<usize>,
    on_failure: OnFailure,
    /// The operator chose the policy.
    is_policy_chosen: bool,
    deadline_ms: u64,
    /// What its files are called.
    state_name: String,
    /// Its state, for each host that runs it.
    sidecar: Option<Arc<OwnedFd>>,
    /// Where what it misses is recorded.
    gaps: Option<Gaps>,
    /// Which arena is for the requests that it issues, if it needs one.
    arena: usize,
    /// As it was asked for.
    config: SlotConfig,
}

/// A disk while the worker is being put together.
struct StartingDisk {
    name: Arc<str>,
    config: DiskConfig,
    store: Arc<dyn Store>,
    frontend: Option<(Listener, BlkConfig)>,
    chain: Arc<Chain>,
    /// In the order of the chain.
    slots: Vec<StartingSlot>,
    arena: Option<ArenaMemory>,
    extents: Arc<DiskExtents>,
    /// Index of its first hop in the page of counters: the request, then the slots, then
    /// [room](SPARE_HOPS) for more of them, then the store.
    first_hop: usize,
}

/// See [`Worker::start`].
pub(crate) fn start(config: WorkerConfig, failures: &StoreFailures) -> Result<Worker, StartError> {
    let WorkerConfig { mut disks, stats, drain_ms, recovery, log, write_down } = config;
    check_names(&disks)?;
    let stores =
        disks.iter().map(|disk| open_store(disk, &log, failures)).collect::<Result<Vec<_>, _>>()?;
    let nbd_servers = nbd::listen(&mut disks)?;
    let mut hosts: Vec<Starting> = Vec::new();
    let mut starting: Vec<StartingDisk> = Vec::new();
    let names: Vec<(String, u16, bool)> = disks
        .iter()
        .map(|disk| (disk.name.clone(), disk.threads(), disk.chain.is_empty()))
        .collect();
    let (mut first_hop, mut next_instance) = (0, 0);
    let mut states = Vec::new();
    for (mut config, mut store) in disks.into_iter().zip(stores) {
        let listener = listen(&mut config)?;
        let mut state = StateFolder::default();
        state.look_for_handover(&config, &log)?;
        if let Some(text) = state.handover().and_then(|handover| handover.failed.clone())
            && !failures.known.contains_key(&config.name)
        {
            // It failed for good on the host that its guest comes from.
            failures.report.iter().for_each(|report| report(&config.name, &text));
            let mut failures = failures.clone();
            failures.known.insert(config.name.clone(), text);
            drop(store);
            store = open_store(&config, &log, &failures)?;
        }
        let (chain, slots) = plan_chain(
            &config,
            store.info(),
            &names,
            &mut hosts,
            &mut next_instance,
            &mut state,
            &log,
        )?;
        let names_of = |slots: &[StartingSlot]| -> Vec<String> {
            slots.iter().map(|slot| slot.state_name.clone()).collect()
        };
        if let Some(handover) = state.handover()
            && handover.chain != names_of(&slots)
        {
            let (disk, theirs, ours) =
                (config.name.clone(), handover.chain.join(", "), names_of(&slots).join(", "));
            return Err(StartError::OtherChain { disk, theirs, ours });
        }
        states.push(state);
        let frontend = match (listener, config.frontend.take()) {
            (Some(listener), Some(frontend)) => {
                Some((listener, device(&config, &frontend, &chain)?))
            }
            _ => None,
        };
        let hops = 2 + slots.len() + SPARE_HOPS;
        let decides = chain.slots().map(|(_, spec)| spec.decides_data());
        let decides = slots.iter().map(|slot| slot.instance).zip(decides);
        let extents = DiskExtents::new(&store, decides);
        let name = config.name.as_str().into();
        starting.push(StartingDisk {
            name,
            config,
            store,
            frontend,
            chain,
            slots,
            arena: None,
            extents,
            first_hop,
        });
        first_hop += hops;
    }
    let nbd_exports = nbd::exports(&nbd_servers, &starting)?;
    let page = make_page(stats, &starting, &hosts)?;
    let orders = SupervisorOrders::new().map_err(|source| system("", "make a doorbell", source))?;
    let mut made = Made::default();
    let mut engines = Vec::new();
    let mut first = 0;
    for index in 0..starting.len() {
        open_gaps(&mut starting[index], &hosts, &mut states[index], &mut made, &log)?;
        give_arena(&mut starting[index], index as u32, &mut hosts)?;
        let own = connect_engines(&starting, index, first, &mut hosts, &page, &orders, &log)?;
        first += own.len();
        engines.push(own);
    }
    plan_instances(&starting, &states, &mut hosts);
    let watched = set_up_hosts(hosts, &mut engines)?;
    let recipes: Vec<Arc<Recipe>> = watched.iter().map(|host| host.recipe.clone()).collect();
    let mut served = Vec::new();
    for (index, engines) in engines.into_iter().enumerate() {
        served.push(start_engines(&starting, index, engines)?);
    }
    let all: Vec<EngineHandle> =
        served.iter().flatten().map(|engine: &RunningEngine| engine.handle.clone()).collect();
    let supervisor = Supervisor::start(watched, all, recovery, page.clone(), log.clone(), orders)
        .map_err(|source| system("", "start a thread", source))?;
    let (mut disks, mut chains) = (Vec::new(), Vec::new());
    let mut first_engine = 0;
    for ((number, disk), (engines, state)) in
        starting.into_iter().enumerate().zip(served.into_iter().zip(states))
    {
        let count = engines.len();
        let (served, mut chain) = serve(disk, number, engines, state, &recipes, drain_ms, &log)?;
        chain.first_engine = first_engine;
        first_engine += count;
        disks.push(served);
        chains.push(chain);
    }
    let nbd = nbd::serve(nbd_servers, nbd_exports, &mut disks, &log)?;
    for disk in &chains {
        if let Err(error) = disk.state.end_handover() {
            log(LogLevel::Error, &format!("disk {}: {error}", disk.name));
        }
    }
    made.keep();
    let chains = Chains::new(Core {
        disks: chains,
        keeper: supervisor.keeper(),
        next_host: recipes.len(),
        page,
        log: log.clone(),
        write_down,
        has_ended: false,
    });
    Ok(Worker { disks, nbd, supervisor, drain_ms, log, chains })
}

/// What the disks of a worker would be, without taking anything that another process may have:
/// the disk as its guest sees it, what its store is, and its filters.
pub(crate) fn look_at(config: &WorkerConfig) -> Result<Vec<Looked>, StartError> {
    check_names(&config.disks)?;
    let names: Vec<(String, u16, bool)> = config
        .disks
        .iter()
        .map(|disk| (disk.name.clone(), disk.threads(), disk.chain.is_empty()))
        .collect();
    let mut next_instance = 0;
    let look = |disk: &DiskConfig| {
        let failed = |source| StartError::Store { disk: disk.name.clone(), source };
        let (store, text) = match &disk.store {
            StoreConfig::Raw { path, direct, engine } => {
                let mut options = RawOptions::new(path);
                options.read_only = disk.read_only;
                (options.direct, options.engine) = (*direct, *engine);
                options.lock = false;
                let store = RawStore::open(options).map_err(failed)?;
                (store.info().clone(), store.describe())
            }
            StoreConfig::Image(options) if disk.store.can_move() => {
                let options = ImageOptions { read_only: disk.read_only, ..(**options).clone() };
                ImageStore::look(&options).map_err(failed)?
            }
            _ => return Err(StartError::NotMovable { disk: disk.name.clone() }),
        };
        let mut hosts = Vec::new();
        let mut state = StateFolder::trial();
        let (chain, slots) = plan_chain(
            disk,
            &store,
            &names,
            &mut hosts,
            &mut next_instance,
            &mut state,
            &config.log,
        )?;
        let name = |slot: &StartingSlot| hosts[slot.host].recipe.description.name.clone();
        let filters = slots.iter().map(name).collect();
        Ok(Looked { info: chain.info().clone(), store: text, filters })
    };
    config.disks.iter().map(look).collect()
}

/// See [`look_at`].
pub(crate) struct Looked {
    pub(crate) info: DiskInfo,
    pub(crate) store: String,
    pub(crate) filters: Vec<String>,
}

fn device(
    disk: &DiskConfig,
    frontend: &FrontendConfig,
    chain: &Chain,
) -> Result<BlkConfig, StartError> {
    device_of(&disk.name, disk.queues, frontend, chain.info().clone())
}

/// The disk `info` as its guest sees it.
pub(crate) fn device_of(
    disk: &str,
    queues: u16,
    frontend: &FrontendConfig,
    info: DiskInfo,
) -> Result<BlkConfig, StartError> {
    let &FrontendConfig { queue_size, write_cache, .. } = frontend;
    let serial = frontend.serial.clone();
    let options = BlkOptions { queues, queue_size_max: queue_size, serial, write_cache };
    BlkConfig::new(info, options)
        .map_err(|source| StartError::Device { disk: disk.to_owned(), source })
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
            queues: disk.config.threads(),
        };
        specs.push(hop("request".into(), HopKind::Request));
        specs.extend(
            disk.slots
                .iter()
                .map(|slot| hop(hosts[slot.host].recipe.description.name.clone(), HopKind::Filter)),
        );
        specs.extend((0..SPARE_HOPS).map(|_| hop(String::new(), HopKind::Vacant)));
        specs.push(hop("store".into(), HopKind::Store));
    }
    Page::create(path.as_deref(), &specs)
        .map(Arc::new)
        .map_err(|source| StartError::Stats { path: path.unwrap_or_default(), source })
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
        let alone = disk.nbd.is_none() && !disk.chain.is_empty();
        let least = u16::from(disk.frontend.is_some() || alone);
        let nbd_queues = disk.nbd.as_ref().map_or(1, |nbd| nbd.queues);
        if disk.queues < least || nbd_queues == 0 || disk.threads() > QUEUES_MAX {
            let queues = disk.threads();
            return Err(StartError::Queues { disk: disk.name.clone(), queues });
        }
    }
    Ok(())
}

fn open_store(
    disk: &DiskConfig,
    log: &LogSink,
    failures: &StoreFailures,
) -> Result<Arc<dyn Store>, StartError> {
    let failed = |source| StartError::Store { disk: disk.name.clone(), source };
    Ok(match &disk.store {
        StoreConfig::Raw { path, direct, engine } => {
            let mut options = RawOptions::new(path);
            options.read_only = disk.read_only;
            options.direct = *direct;
            options.engine = *engine;
            options.failed = known_failure(disk, log, failures);
            options.on_failure = Some(on_failure(disk, log, failures));
            Arc::new(RawStore::open(options).map_err(failed)?)
        }
        StoreConfig::Image(options) => {
            let mut options = (**options).clone();
            options.read_only = disk.read_only;
            let (its_log, name) = (log.clone(), disk.name.clone());
            options.on_restart = Some(Arc::new(move |text: &str| {
                its_log(LogLevel::Warn, &format!("disk {name}: {text}"));
            }));
            options.failed = known_failure(disk, log, failures);
            options.on_failure = Some(on_failure(disk, log, failures));
            Arc::new(ImageStore::open(options).map_err(failed)?)
        }
        StoreConfig::Custom(store) => store.clone(),
        StoreConfig::Memory { bytes } => Arc::new(MemoryStore::new(*bytes).map_err(failed)?),
        StoreConfig::Null { bytes } => Arc::new(NullStore::new(*bytes).map_err(failed)?),
    })
}

/// What is known of a store that failed for good under an earlier worker; it is said again.
fn known_failure(disk: &DiskConfig, log: &LogSink, failures: &StoreFailures) -> Option<String> {
    let text = failures.known.get(&disk.name)?;
    log(LogLevel::Error, &format!("disk {}: still refuses writes: {text}", disk.name));
    Some(text.clone())
}

/// Who is told when a store fails for good.
fn on_failure(
    disk: &DiskConfig,
    log: &LogSink,
    failures: &StoreFailures,
) -> upcall_store::OnFailure {
    let (log, name, report) = (log.clone(), disk.name.clone(), failures.report.clone());
    Arc::new(move |text: &str| {
        if let Some(report) = &report {
            report(&name, text);
        }
        log(LogLevel::Error, &format!("disk {name}: {text}"));
    })
}

fn listen(config: &mut DiskConfig) -> Result<Option<Listener>, StartError> {
    let frontend = config.frontend.as_mut();
    frontend.map(|frontend| bind(&config.name, frontend)).transpose()
}

/// Listens where a frontend says; takes the socket out of it.
pub(crate) fn bind(disk: &str, frontend: &mut FrontendConfig) -> Result<Listener, StartError> {
    let socket = std::mem::replace(&mut frontend.socket, SocketSource::Path(PathBuf::new(), None));
    let listener = match socket {
        SocketSource::Path(path, mode) => Listener::bind(&path, mode),
        SocketSource::Fd(fd) => Listener::adopt(fd),
    };
    listener.map_err(|source| StartError::Listen { disk: disk.to_owned(), source })
}
