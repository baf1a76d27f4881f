//! Arenas and channels: what queue threads and filter hosts share.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;

use upcall_block::Op;
use upcall_chain::{Chain, DataAccess, Entry, OnFailure, Route};
use upcall_ring::{Access, Arena, Doorbell, Mapping, memfd, read_only_view};
use upcall_stats::Page;

use super::{SPARE_HOPS, Starting, StartingDisk, StartingSlot, system};
use crate::config::{LogSink, Placement};
use crate::engine::{Clock, Parts, Slot, deadline_ns};
use crate::error::StartError;
use crate::hosts::{EngineHandle, HostId, SupervisorOrders};
use crate::recipe::{GivenArena, GivenChannel};

/// Bytes of an arena for each queue: for requests of the frontend, and for those that one
/// filter issues. Each holds the largest request (4 MiB) more than once.
const ARENA_GUEST: usize = 12 << 20;
const ARENA_ISSUED: usize = 8 << 20;

/// Filters that may yet be attached and issue requests of their own, for which there is room.
/// It costs addresses, and memory only where it is used.
const ARENA_SPARE: usize = 2;
/// With more queues than this a 32-bit filter would run out of addresses.
const SPARE_QUEUES_MAX: u16 = 8;

/// The memory of a disk's arenas: for each queue, that for requests of the frontend, then
/// those for requests that filters issue.
pub(crate) struct ArenaMemory {
    fd: OwnedFd,
    /// Cannot be mapped for writing.
    view: OwnedFd,
    size: usize,
    mapping: Arc<Mapping>,
    /// By section for issued requests: whether some instance has it.
    taken: Vec<bool>,
    queue_bytes: usize,
}

impl ArenaMemory {
    /// For a disk with so many queue threads and `issuing` filters that issue requests.
    pub(crate) fn new(threads: u16, issuing: usize) -> io::Result<ArenaMemory> {
        let spare = if threads <= SPARE_QUEUES_MAX { ARENA_SPARE } else { 0 };
        let sections = issuing + spare;
        let queue_bytes = ARENA_GUEST + ARENA_ISSUED * sections;
        let size = queue_bytes * usize::from(threads);
        let fd = memfd("upcall-arena", size)?;
        let view = read_only_view(&fd)?;
        let mapping = Arc::new(Mapping::new(&fd, 0, size, Access::ReadWrite)?);
        let taken = vec![false; sections];
        Ok(ArenaMemory { fd, view, size, mapping, taken, queue_bytes })
    }

    /// The arenas of a queue thread.
    pub(crate) fn of_queue(&self, queue: u16) -> io::Result<Vec<Arena>> {
        let start = self.queue_bytes * usize::from(queue);
        let issued = (start + ARENA_GUEST..start + self.queue_bytes).step_by(ARENA_ISSUED);
        std::iter::once((start, ARENA_GUEST))
            .chain(issued.map(|at| (at, ARENA_ISSUED)))
            .map(|(at, size)| Arena::new(self.mapping.clone(), at, size))
            .collect()
    }

    /// Takes a section for requests that one instance issues: which of a queue's arenas it is.
    pub(crate) fn take_section(&mut self) -> Option<usize> {
        let section = self.taken.iter().position(|taken| !taken)?;
        self.taken[section] = true;
        Some(section + 1)
    }

    /// Which sections are taken, to be [put back](Self::set_sections) if nothing comes of it.
    pub(crate) fn sections(&self) -> Vec<bool> {
        self.taken.clone()
    }

    /// See [`sections`](Self::sections).
    pub(crate) fn set_sections(&mut self, taken: Vec<bool>) {
        self.taken = taken;
    }

    /// Its instance has closed.
    pub(crate) fn give_back_section(&mut self, arena: usize) {
        if let Some(taken) = arena.checked_sub(1).and_then(|section| self.taken.get_mut(section)) {
            *taken = false;
        }
    }

    /// For a filter host whose filter does no more than `access`: for writing only if it may
    /// change data, and not at all if it sees none.
    pub(crate) fn give(
        &self,
        access: DataAccess,
        number: u32,
        disk: &Arc<str>,
    ) -> io::Result<Option<GivenArena>> {
        let (fd, writable) = match access {
            DataAccess::Change => (&self.fd, true),
            DataAccess::Observe => (&self.view, false),
            DataAccess::None => return Ok(None),
        };
        let (fd, size, disk) = (fd.try_clone()?, self.size as u64, disk.clone());
        Ok(Some(GivenArena { number, disk, fd, size, writable }))
    }
}

/// Whether requests that enter a chain there may need an arena: some filter looks at their
/// data, or zeroes have to be written for one that decides data.
pub(crate) fn needs_arena(chain: &Chain, entry: Entry) -> bool {
    let needs = |op| chain.needs_arena(op, entry) || chain.route(op, entry) == Route::AsWrites;
    Op::ALL.into_iter().any(needs)
}

/// Makes the arenas of a disk whose filters want data, and gives them to their hosts.
pub(super) fn give_arena(
    disk: &mut StartingDisk,
    number: u32,
    hosts: &mut [Starting],
) -> Result<(), StartError> {
    if !needs_arena(&disk.chain, Entry::Top) {
        return Ok(());
    }
    let issues = |slot: &StartingSlot| hosts[slot.host].recipe.description.issues();
    let issuing = disk.slots.iter().filter(|slot| issues(slot)).count();
    let name = disk.name.clone();
    let failed = |source| system(&name, "make an arena", source);
    let mut memory = ArenaMemory::new(disk.config.threads(), issuing).map_err(failed)?;
    for slot in disk.slots.iter_mut().filter(|slot| issues(slot)) {
        slot.arena = memory.take_section().unwrap_or(0);
    }
    let mut most: HashMap<usize, DataAccess> = HashMap::new();
    for ((_, spec), slot) in disk.chain.slots().zip(&disk.slots) {
        let access = most.entry(slot.host).or_insert(DataAccess::None);
        *access = spec.arena_access().max(*access);
    }
    for (host, access) in most {
        let given = memory.give(access, number, &name).map_err(failed)?;
        hosts[host].recipe.arenas.extend(given);
    }
    disk.arena = Some(memory);
    Ok(())
}

/// A queue thread before it runs: without its stores, which it opens itself, and the links to
/// filter hosts, which are not set up yet.
pub(super) struct StartingEngine {
    pub(super) handle: EngineHandle,
    pub(super) parts: Parts,
    /// In the order in which its slots count its links; and the channels' numbers.
    pub(super) links: Vec<(HostId, u32)>,
}

/// Everything that is there for a disk's queue threads before the filter hosts are set up.
/// `first` is the number of the first of them in the worker.
pub(super) fn connect_engines(
    disks: &[StartingDisk],
    index: usize,
    first: usize,
    hosts: &mut [Starting],
    page: &Arc<Page>,
    orders: &SupervisorOrders,
    log: &LogSink,
) -> Result<Vec<StartingEngine>, StartError> {
    let disk = &disks[index];
    let mut engines = Vec::new();
    for queue in 0..disk.config.threads() {
        let failed = |source| system(&disk.name, "make a doorbell", source);
        let (commands, receiver) = channel();
        let wake = Doorbell::new().map_err(failed)?;
        let mut links: Vec<(HostId, u32)> = Vec::new();
        let mut slots = Vec::new();
        for (place, slot) in disk.slots.iter().enumerate() {
            let host = HostId(slot.host);
            let recipe = &mut hosts[slot.host].recipe;
            let link = match links.iter().position(|(known, _)| *known == host) {
                Some(link) => link,
                None => {
                    links.push((host, recipe.channels.len() as u32));
                    recipe.channels.push(GivenChannel {
                        number: index as u32,
                        disk: disk.name.clone(),
                        engine: first + engines.len(),
                        wake: wake.clone(),
                    });
                    links.len() - 1
                }
            };
            let is_inline = recipe.placement == Placement::Inline;
            let changes = disk
                .chain
                .slots()
                .nth(place)
                .is_some_and(|(_, spec)| spec.arena_access() == DataAccess::Change);
            slots.push(Slot {
                link,
                instance: slot.instance,
                issues: recipe.description.issues(),
                grants: slot.grants.iter().map(|granted| lane_of(disk, *granted)).collect(),
                // One that needs none never asks.
                arena: slot.arena,
                on_failure: slot.on_failure,
                deadline_ns: deadline_ns(slot.deadline_ms, is_inline),
                keeps_images: changes && !is_inline && slot.on_failure == OnFailure::Hold,
                gaps: match &slot.gaps {
                    Some(gaps) => Some(Box::new(gaps.marker().map_err(failed)?)),
                    None => None,
                },
                detached: false,
                is_on_trial: false,
                stats: page.block(disk.first_hop + 1 + place, queue),
            });
        }
        let arenas = match &disk.arena {
            None => Vec::new(),
            Some(memory) => memory.of_queue(queue).map_err(failed)?,
        };
        let parts = Parts {
            disk: disk.name.clone(),
            clock: Clock::default(),
            commands: receiver,
            wake: wake.clone(),
            lanes: Vec::new(),
            slots,
            links: Vec::new(),
            arenas,
            request_stats: page.block(disk.first_hop, queue),
            store_stats: page.block(disk.first_hop + 1 + disk.slots.len() + SPARE_HOPS, queue),
            log: log.clone(),
            tell: orders.tell(),
        };
        engines.push(StartingEngine { handle: EngineHandle { commands, wake }, parts, links });
    }
    Ok(engines)
}

/// The disks that a disk's filters were granted, each once: lanes 1 and up.
pub(super) fn granted(disk: &StartingDisk) -> Vec<usize> {
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
