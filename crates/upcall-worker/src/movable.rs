//! A worker whose guest may move to another host, or come from one.
//!
//! Its frontends are there all the time. The disks (stores, filters, queue threads) it has only
//! while its guest uses them: it gives them up, to whoever waits for them on the same images,
//! when the guest has left, and takes them up when a guest's rings start. So the source and the
//! target of a migration do the same, and a guest that comes back, as its migration failed, is
//! served again.
//!
//! Always true: the image's lock says who has a disk; what is given up is durable, and what
//! filters saved stands beside the image before the lock goes.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use upcall_block::DiskInfo;
use upcall_state::{Handover, StateError};
use upcall_store::OpenError;
use upcall_vhost::{BlkConfig, Listener};

use crate::chains::request::ChainView;
use crate::chains::{Chains, WriteDown};
use crate::config::{FrontendConfig, LogLevel, LogSink, SlotConfig, StoreFailures, WorkerConfig};
use crate::error::StartError;
use crate::frontend::{Frontend, Left, Supply};
use crate::hosts::EngineHandle;
use crate::start::{Looked, bind, device_of, look_at};
use crate::worker::{DiskSummary, ExitReport, Worker};

/// How long before it is tried again to take disks up, if not because another has them.
const RETRY: Duration = Duration::from_secs(1);
/// How often it is said that a guest waits for them.
const SAY_INTERVAL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// Makes the configuration once more, without frontends.
pub type Again = Box<dyn Fn() -> WorkerConfig + Send + Sync>;

/// See the module. Dropping it ends it, as dropping a [`Worker`] does.
pub struct MovableWorker {
    /// Dropped first: connections end, and then their disks are given up.
    frontends: Vec<Frontend>,
    seat: Arc<Seat>,
    summaries: Vec<DiskSummary>,
}

impl MovableWorker {
    /// Serves `config`, each disk of which is an image or device with a frontend and nothing
    /// else. `again` gives the same without the frontends. If other processes use images, waits
    /// for a guest before it waits for them; all else that is wrong is an error at once.
    pub fn start(
        mut config: WorkerConfig,
        again: Again,
        failures: &StoreFailures,
    ) -> Result<MovableWorker, StartError> {
        let mut listeners = Vec::new();
        for disk in &mut config.disks {
            match disk.frontend.take() {
                Some(mut frontend) if disk.store.can_move() && disk.nbd.is_none() => {
                    listeners.push((bind(&disk.name, &mut frontend)?, frontend, disk.queues));
                }
                _ => return Err(StartError::NotMovable { disk: disk.name.clone() }),
            }
        }
        let names: Vec<Arc<str>> =
            config.disks.iter().map(|disk| disk.name.as_str().into()).collect();
        let (log, drain_ms) = (config.log.clone(), config.drain_ms);
        let chains = Written::default();
        config.write_down = Some(chains.clone().instead_of(config.write_down.take()));
        let failures = Failures::new(failures);
        let (worker, looked) = match Worker::start_after(config, &failures.now()) {
            Ok(worker) => {
                let looked = worker.disks().into_iter().map(of_summary).collect();
                (Some(worker), looked)
            }
            Err(error) if is_busy(&error) => {
                let looked = look_at(&again())?;
                log(LogLevel::Info, &format!("{error}: waiting for a guest to come from there"));
                (None, looked)
            }
            Err(error) => return Err(error),
        };
        let seat = Arc::new(Seat {
            again,
            chains,
            failures,
            names: names.clone(),
            configs: OnceLock::new(),
            log: log.clone(),
            now: Mutex::default(),
            seated: Mutex::new(Seated { worker, users: BTreeSet::new(), moved: false }),
        });
        seat.begin(listeners, looked, drain_ms)
    }

    /// The disks and their chains, as they are whenever that is asked, from any thread.
    pub fn view(&self) -> MovableView {
        MovableView { seat: self.seat.clone(), summaries: self.summaries.clone() }
    }

    /// What is served. Of disks that another process has, what they are expected to be.
    pub fn disks(&self) -> Vec<DiskSummary> {
        let mut disks = self.summaries.clone();
        if self.seat.now().chains.is_none() {
            disks.iter_mut().for_each(|disk| disk.store += "; another process uses it: waiting");
        }
        disks
    }

    /// As [`Worker::look_again`], for disks without filters that are in use here.
    pub fn look_again(&self) {
        let seated = self.seat.lock();
        let (Some(worker), Some(configs)) = (&seated.worker, self.seat.configs.get()) else {
            return;
        };
        for (number, (disk, config)) in worker.disks.iter().zip(configs).enumerate() {
            let now = disk.store.measure().unwrap_or(0);
            if !worker.chains.has_filters(number) && config.grow(now) {
                self.seat.say(&disk.name, LogLevel::Info, "has grown; its guest is told");
            }
        }
    }

    /// Ends in good order.
    pub fn shutdown(mut self) -> ExitReport {
        self.frontends.iter().for_each(Frontend::end);
        self.frontends.clear();
        let worker = self.seat.lock().worker.take();
        worker.map_or_else(ExitReport::default, Worker::shutdown)
    }
}

/// What a worker that can move has now.
#[derive(Clone)]
pub enum ChainsNow {
    /// The disks, for good or as long as their guest stays.
    Here(Chains),
    /// As `Here`, and their guest's memory is being copied to another host: soon they may be there.
    Leaving(Chains),
    /// Nothing: their guest is elsewhere, or there is none.
    Waiting,
}

/// A [`MovableWorker`], for who looks at it and changes its chains.
#[derive(Clone)]
pub struct MovableView {
    seat: Arc<Seat>,
    summaries: Vec<DiskSummary>,
}

impl MovableView {
    /// What is served, as large as it is by now.
    pub fn disks(&self) -> Vec<DiskSummary> {
        let configs = self.seat.configs.get().map_or(&[][..], Vec::as_slice);
        let mut disks = self.summaries.clone();
        for (disk, config) in disks.iter_mut().zip(configs) {
            disk.info.capacity = config.capacity();
        }
        disks
    }

    /// The chains. Never waits for disks that are taken up or given up meanwhile.
    pub fn chains(&self) -> ChainsNow {
        let now = self.seat.now();
        match &now.chains {
            None => ChainsNow::Waiting,
            Some(chains) if now.moving.is_empty() => ChainsNow::Here(chains.clone()),
            Some(chains) => ChainsNow::Leaving(chains.clone()),
        }
    }
}

fn is_busy(error: &StartError) -> bool {
    matches!(
        error,
        StartError::Store { source: OpenError::Busy { .. }, .. }
            | StartError::State { source: StateError::Busy { .. }, .. }
    )
}

fn of_summary(disk: DiskSummary) -> Looked {
    Looked { info: disk.info, store: disk.store, filters: disk.chain }
}

/// The chains that disks were given while they were here, by the disks' names: a guest that
/// comes back finds them again.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<HashMap<String, Vec<SlotConfig>>>>);

impl Written {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<SlotConfig>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what is written down elsewhere.
    fn instead_of(self, elsewhere: Option<WriteDown>) -> WriteDown {
        Arc::new(move |chains| {
            elsewhere.iter().try_for_each(|write_down| write_down(chains))?;
            self.lock().extend(chains.iter().cloned());
            Ok(())
        })
    }

    fn put_into(&self, config: &mut WorkerConfig) {
        let written = self.lock();
        for disk in &mut config.disks {
            if let Some(chain) = written.get(&disk.name) {
                disk.chain = chain.clone();
            }
        }
    }
}

/// What is known of stores that failed for good, and grows.
struct Failures {
    known: Arc<Mutex<HashMap<String, String>>>,
    report: Option<crate::config::ReportFailure>,
}

impl Failures {
    fn new(given: &StoreFailures) -> Failures {
        let known = Arc::new(Mutex::new(given.known.clone()));
        Failures { known, report: given.report.clone() }
    }

    fn known(&self) -> HashMap<String, String> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn now(&self) -> StoreFailures {
        let (known, report) = (self.known.clone(), self.report.clone());
        let report = move |disk: &str, text: &str| {
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(disk.to_owned(), text.to_owned());
            drop(known);
            report.iter().for_each(|report| report(disk, text));
        };
        StoreFailures { known: self.known(), report: Some(Arc::new(report)) }
    }
}

/// The disks, had or not.
struct Seat {
    again: Again,
    /// Chains as they are by now.
    chains: Written,
    failures: Failures,
    names: Vec<Arc<str>>,
    /// By disk, as guests were told.
    configs: OnceLock<Vec<Arc<BlkConfig>>>,
    log: LogSink,
    now: Mutex<Now>,
    seated: Mutex<Seated>,
}

/// What a [`MovableView`] sees. Locked for moments only, and behind `seated`.
#[derive(Default)]
struct Now {
    /// Those of the seated worker.
    chains: Option<Chains>,
    /// Disks whose guest's memory is being copied elsewhere.
    moving: BTreeSet<usize>,
}

struct Seated {
    worker: Option<Worker>,
    /// Disks whose rings run.
    users: BTreeSet<usize>,
    /// One of the disks was left for another host; the others follow.
    moved: bool,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, Seated> {
        self.seated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, disk: &str, level: LogLevel, text: &str) {
        (self.log)(level, &format!("disk {disk}: {text}"));
    }

    fn begin(
        self: Arc<Seat>,
        listeners: Vec<(Listener, FrontendConfig, u16)>,
        looked: Vec<Looked>,
        drain_ms: u64,
    ) -> Result<MovableWorker, StartError> {
        let mut configs = Vec::new();
        for ((name, (_, frontend, queues)), looked) in
            self.names.iter().zip(&listeners).zip(&looked)
        {
            configs.push(Arc::new(device_of(name, *queues, frontend, looked.info.clone())?));
        }
        if let Some(worker) = &self.lock().worker {
            take_settings(worker, &configs);
            self.now().chains = Some(worker.chains());
        }
        let _ = self.configs.set(configs.clone());
        let (mut frontends, mut summaries) = (Vec::new(), Vec::new());
        for (disk, ((listener, _, queues), looked)) in listeners.into_iter().zip(looked).enumerate()
        {
            let name = self.names[disk].clone();
            summaries.push(DiskSummary {
                name: name.to_string(),
                info: looked.info,
                store: looked.store,
                chain: looked.filters,
                queues,
                nbd: None,
                socket: listener.path().map(Into::into),
            });
            let supply = Arc::new(Place { seat: self.clone(), disk });
            let (config, log) = (configs[disk].clone(), self.log.clone());
            let started = Frontend::start(name.clone(), listener, config, supply, drain_ms, log);
            frontends.push(started.map_err(|source| StartError::System {
                disk: name.to_string(),
                what: "start its frontend",
                source,
            })?);
        }
        Ok(MovableWorker { frontends, seat: self, summaries })
    }

    /// Takes the disks up.
    fn take_up(&self) -> Result<Worker, Refused> {
        let mut config = (self.again)();
        self.chains.put_into(&mut config);
        config.write_down = Some(self.chains.clone().instead_of(config.write_down.take()));
        let worker = Worker::start_after(config, &self.failures.now());
        let worker = worker
            .map_err(|error| Refused { is_busy: is_busy(&error), text: error.to_string() })?;
        let configs = self.configs.get().map_or(&[][..], Vec::as_slice);
        let fits = worker.disks.iter().zip(configs).find_map(|(disk, config)| {
            let why = misfit(config, &disk.info)?;
            Some(format!("disk {}: {why}; its guest was told otherwise", disk.name))
        });
        if let Some(text) = fits {
            worker.shutdown();
            return Err(Refused { is_busy: false, text });
        }
        take_settings(&worker, configs);
        self.now().chains = Some(worker.chains());
        self.names.iter().for_each(|name| self.say(name, LogLevel::Info, "taken up"));
        Ok(worker)
    }

    fn give_up(&self, worker: Worker) {
        self.now().chains = None;
        // A change that is on its way ends first: handed over is the chain that it leaves.
        worker.chains.end();
        let known = self.failures.known();
        let configs = self.configs.get().map_or(&[][..], Vec::as_slice);
        let chains = worker.chains.chains();
        let of_disk = |((name, config), chain): ((&Arc<str>, &Arc<BlkConfig>), &ChainView)| {
            let chain = chain.slots.iter().map(|slot| slot.name.clone()).collect();
            let failed = known.get(&**name).cloned();
            Handover { write_cache: config.write_cache(), failed, chain, states: Vec::new() }
        };
        let disks = self.names.iter().zip(configs).zip(&chains);
        let report = worker.hand_over(disks.map(of_disk).collect());
        report.failures.iter().for_each(|text| (self.log)(LogLevel::Error, text));
        let text = "given up: its guest has left; whoever serves it next may take it up";
        self.names.iter().for_each(|name| self.say(name, LogLevel::Info, text));
    }
}

/// Why disks were not taken up.
struct Refused {
    is_busy: bool,
    text: String,
}

/// What a guest has chosen on another host, or here before.
fn take_settings(worker: &Worker, configs: &[Arc<BlkConfig>]) {
    for (disk, config) in configs.iter().enumerate() {
        if let Some(handover) = worker.chains.handover(disk) {
            config.set_write_cache(handover.write_cache);
        }
    }
}

/// Why a guest that was told `config` cannot use a disk that is `now`; a larger one it can.
fn misfit(config: &BlkConfig, now: &DiskInfo) -> Option<String> {
    let told = config.info();
    if now.capacity < config.capacity() {
        return Some(format!("it has {} bytes, not {}", now.capacity, config.capacity()));
    }
    let of = |info: &DiskInfo| (info.block_size, info.read_only, info.ops);
    if of(told) != of(now) {
        return Some(format!("it is {now:?}, not {told:?}"));
    }
    config.grow(now.capacity);
    None
}

/// A disk of a seat.
struct Place {
    seat: Arc<Seat>,
    disk: usize,
}

impl Place {
    fn try_take(&self) -> Result<Vec<EngineHandle>, Refused> {
        let mut seated = self.seat.lock();
        let worker = match seated.worker.take() {
            Some(worker) => worker,
            None => self.seat.take_up()?,
        };
        let engines = worker.disks[self.disk].engines.iter();
        let handles = engines.map(|engine| engine.handle.clone()).collect();
        seated.worker = Some(worker);
        seated.users.insert(self.disk);
        Ok(handles)
    }
}

impl Supply for Place {
    fn take(&self, is_over: &mut dyn FnMut() -> bool) -> Option<Vec<EngineHandle>> {
        let mut said: Option<Instant> = None;
        loop {
            let refused = match self.try_take() {
                Ok(handles) => return Some(handles),
                Err(refused) => refused,
            };
            if said.is_none_or(|said| said.elapsed() > SAY_INTERVAL) {
                said = Some(Instant::now());
                let level = if refused.is_busy { LogLevel::Warn } else { LogLevel::Error };
                let text = format!("its guest waits, as it cannot be taken up: {}", refused.text);
                self.seat.say(&self.seat.names[self.disk], level, &text);
            }
            let pause_until = Instant::now() + if refused.is_busy { PAUSE } else { RETRY };
            loop {
                if is_over() {
                    return None;
                }
                if Instant::now() >= pause_until {
                    break;
                }
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn moving(&self, on: bool) {
        let mut now = self.seat.now();
        match on {
            true => now.moving.insert(self.disk),
            false => now.moving.remove(&self.disk),
        };
    }

    fn leave(&self, left: Left) {
        let mut seated = self.seat.lock();
        seated.users.remove(&self.disk);
        seated.moved |= left == Left::Moved;
        if seated.users.is_empty() && (seated.moved || left == Left::Gone) {
            seated.moved = false;
            if let Some(worker) = seated.worker.take() {
                self.seat.give_up(worker);
            }
        }
    }
}
