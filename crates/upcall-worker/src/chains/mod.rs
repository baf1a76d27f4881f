//! The chains of the disks of a running worker: shown, and changed under load.
//!
//! [`request`] says what may be asked; [`plan`] checks it against what there is; [`course`]
//! carries it out, step by step as `upcall_chain::Change` says; [`change`] is all of it, with the
//! [`trial`] of new filters.
//!
//! Always true: one change at a time; whoever only looks waits for no change; of one slot no
//! two instances are ever open at once.

mod change;
mod course;
mod plan;
pub(crate) mod request;
mod slots;
mod trial;

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use upcall_block::DiskInfo;
use upcall_chain::Chain;
use upcall_state::Handover;
use upcall_stats::{HopSnapshot, Page};
use upcall_vhost::BlkConfig;

use crate::config::{DiskConfig, LogSink, SlotConfig};
use crate::engine::{Command, Whereabouts};
use crate::extents::DiskExtents;
use crate::hosts::{EngineHandle, HostKeeper};
use crate::start::{ArenaMemory, StateFolder};
use request::*;
pub(crate) use slots::ChainSlot;

/// Writes down the chains that disks have from now on (names and filters), so that a worker
/// that follows this one begins with them: all of them or none. Says why not if it cannot.
pub type WriteDown = Arc<dyn Fn(&[(String, Vec<SlotConfig>)]) -> Result<(), String> + Send + Sync>;

/// How long a queue thread may take to say what it has in flight.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

/// The chains of a running worker. May be used from any thread, also when the worker has ended:
/// then nothing changes any more.
#[derive(Clone)]
pub struct Chains(Arc<Shared>);

struct Shared {
    /// None: the worker has ended.
    core: Mutex<Option<Core>>,
    /// What readers see.
    views: Mutex<Vec<ChainView>>,
    /// By disk, as the next.
    engines: Vec<Vec<EngineHandle>>,
    devices: Vec<Option<Arc<BlkConfig>>>,
    page: Mutex<Option<Arc<Page>>>,
}

/// What changes work on.
pub(crate) struct Core {
    pub(crate) disks: Vec<DiskChain>,
    pub(crate) keeper: HostKeeper,
    pub(crate) next_host: usize,
    pub(crate) page: Arc<Page>,
    pub(crate) log: LogSink,
    pub(crate) write_down: Option<WriteDown>,
    pub(crate) has_ended: bool,
}

impl Core {
    /// Writes the chains down as they are.
    pub(crate) fn write_down_now(&self) -> Result<(), String> {
        let Some(write_down) = &self.write_down else { return Ok(()) };
        let configs =
            |disk: &DiskChain| disk.slots.iter().map(|slot| slot.config.clone()).collect();
        let all: Vec<(String, Vec<SlotConfig>)> =
            self.disks.iter().map(|disk| (disk.name.to_string(), configs(disk))).collect();
        write_down(&all).map_err(|why| format!("the new chain cannot be written down: {why}"))
    }
}

/// One disk, as changes see it.
pub(crate) struct DiskChain {
    pub(crate) name: Arc<str>,
    pub(crate) number: u32,
    pub(crate) config: DiskConfig,
    /// What the store is, read-only if the disk is.
    pub(crate) store: DiskInfo,
    /// What whoever uses the disk was told.
    pub(crate) told: DiskInfo,
    /// The device, if there is one: it may have grown.
    pub(crate) device: Option<Arc<BlkConfig>>,
    /// Those of its queues, and the number of the first among all.
    pub(crate) engines: Vec<EngineHandle>,
    pub(crate) first_engine: usize,
    pub(crate) chain: Arc<Chain>,
    /// In the order of the chain.
    pub(crate) slots: Vec<ChainSlot>,
    pub(crate) arena: Option<ArenaMemory>,
    /// The page's hops that no slot has.
    pub(crate) free_hops: Vec<usize>,
    pub(crate) first_hop: usize,
    pub(crate) store_hop: usize,
    pub(crate) state: StateFolder,
    /// It is not known what a client was told of its holes.
    pub(crate) tells_extents: bool,
    /// What filters are told of them.
    pub(crate) extents: Arc<DiskExtents>,
}

impl DiskChain {
    /// The slots that there are, for who named another one.
    pub(crate) fn known_slots(&self) -> String {
        match self.slots.is_empty() {
            true => "none".to_owned(),
            false => self.slot_names().join(", "),
        }
    }

    /// Names of the slots, in their order.
    pub(crate) fn slot_names(&self) -> Vec<String> {
        self.slots.iter().map(|slot| slot.name.clone()).collect()
    }

    /// The store as large as the disk is by now.
    pub(crate) fn store_now(&self) -> DiskInfo {
        let capacity = self.device.as_ref().map_or(self.store.capacity, |device| device.capacity());
        DiskInfo { capacity, ..self.store.clone() }
    }

    fn view(&self) -> ChainView {
        ChainView {
            disk: self.name.to_string(),
            generation: self.chain.generation().0,
            slots: self.slots.iter().map(ChainSlot::view).collect(),
        }
    }
}

impl Chains {
    pub(crate) fn new(core: Core) -> Chains {
        let views = core.disks.iter().map(DiskChain::view).collect();
        let engines = core.disks.iter().map(|disk| disk.engines.clone()).collect();
        let page = Mutex::new(Some(core.page.clone()));
        let devices = core.disks.iter().map(|disk| disk.device.clone()).collect();
        Chains(Arc::new(Shared {
            core: Mutex::new(Some(core)),
            views: Mutex::new(views),
            engines,
            devices,
            page,
        }))
    }

    /// Changes chains, and waits until that has ended: also for the new filters' trial. What
    /// the guest does meanwhile waits as long as [`Changed::pause_us`] says.
    pub fn change(&self, change: &ChainChange) -> Result<Changed, ChangeError> {
        let mut core = match self.0.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::WouldBlock) => return Err(ChangeError::Busy),
            Err(TryLockError::Poisoned(_)) => return Err(ChangeError::Ending),
        };
        let Some(core) = core.as_mut().filter(|core| !core.has_ended) else {
            return Err(ChangeError::Ending);
        };
        change::change(core, change, &|core| self.show(core))
    }

    fn show(&self, core: &Core) {
        *self.views() = core.disks.iter().map(DiskChain::view).collect();
    }

    fn views(&self) -> std::sync::MutexGuard<'_, Vec<ChainView>> {
        self.0.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chains as they are, in the order of the disks.
    pub fn chains(&self) -> Vec<ChainView> {
        self.views().clone()
    }

    /// All hops as they stand now, with their counters and latencies: the disks one after the
    /// other, and of each the hops from the guest to the store.
    pub fn hops(&self) -> Vec<HopSnapshot> {
        let page = self.0.page.lock().unwrap_or_else(PoisonError::into_inner);
        page.as_ref().map_or_else(Vec::new, |page| page.reader().snapshot())
    }

    /// What is in flight on a disk now, the oldest first of each queue. Empty if there is no
    /// such disk.
    pub fn in_flight(&self, disk: usize) -> Vec<InFlightView> {
        let Some(engines) = self.0.engines.get(disk) else { return Vec::new() };
        let asked: Vec<_> = engines
            .iter()
            .map(|engine| {
                let (reply, told) = sync_channel(1);
                engine.send(Command::Report { reply });
                told
            })
            .collect();
        let name_of = |number: u32| {
            let views = self.views();
            let mut slots = views.iter().flat_map(|view| &view.slots);
            let slot = slots.find(|slot| slot.instance == number);
            slot.map_or_else(|| format!("#{number}"), |slot| slot.name.clone())
        };
        let mut all = Vec::new();
        for (queue, told) in asked.into_iter().enumerate() {
            for flight in told.recv_timeout(REPORT_PATIENCE).unwrap_or_default() {
                let place = match flight.whereabouts {
                    Whereabouts::Filter { instance, is_held } => {
                        Place::Filter { slot: name_of(instance), is_held }
                    }
                    Whereabouts::AwaitsFilter { instance } => {
                        Place::AwaitsFilter { slot: name_of(instance) }
                    }
                    Whereabouts::Store => Place::Store,
                    Whereabouts::AwaitsRoom => Place::AwaitsRoom,
                };
                all.push(InFlightView {
                    queue: queue as u16,
                    op: flight.op.to_string(),
                    offset_bytes: flight.offset_bytes,
                    length_bytes: flight.length_bytes,
                    place,
                    there_us: flight.there_ns / 1000,
                    age_us: flight.age_ns / 1000,
                    is_issued: flight.is_issued,
                });
            }
        }
        all
    }

    /// How large a disk is by now, if it has a guest, who may have seen it grow.
    pub fn capacity_bytes(&self, disk: usize) -> Option<u64> {
        self.0.devices.get(disk)?.as_ref().map(|device| device.capacity())
    }

    /// Whether a disk has filters.
    pub(crate) fn has_filters(&self, disk: usize) -> bool {
        self.views().get(disk).is_some_and(|view| !view.slots.is_empty())
    }

    /// On which disk an instance is, and what its state is called.
    pub(crate) fn place_of(&self, instance: u32) -> Option<(usize, String)> {
        let core = self.0.core.lock().unwrap_or_else(PoisonError::into_inner);
        let disks = core.iter().flat_map(|core| core.disks.iter().enumerate());
        let mut slots =
            disks.flat_map(|(number, disk)| disk.slots.iter().map(move |slot| (number, slot)));
        let (number, slot) = slots.find(|(_, slot)| slot.instance == instance)?;
        Some((number, slot.name.clone()))
    }

    /// Hands a disk over to the worker that takes it up next; durable when this returns.
    pub(crate) fn hand_over(&self, disk: usize, handover: &Handover) -> Result<(), String> {
        let mut core = self.0.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.as_mut().map_or(Ok(()), |core| core.disks[disk].state.hand_over(handover))
    }

    /// What the worker before handed over of a disk.
    pub(crate) fn handover(&self, disk: usize) -> Option<Handover> {
        let core = self.0.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.as_ref()?.disks.get(disk)?.state.handover().cloned()
    }

    /// Lets a change that is on its way end, and no other one begin.
    pub(crate) fn end(&self) {
        if let Some(core) = &mut *self.0.core.lock().unwrap_or_else(PoisonError::into_inner) {
            core.has_ended = true;
        }
    }

    /// Gives back what it holds of the disks: the locks of their filters' state, the page. The
    /// queue threads have ended.
    pub(crate) fn release(&self) {
        *self.0.core.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.0.page.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
