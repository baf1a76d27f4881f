//! Arenas and channels: what queue threads and filter hosts share.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

use upcall_block::Op;
use upcall_chain::{Chain, DataAccess, Entry, OnFailure, Route};
use upcall_ring::{Access, Arena, Doorbell, Mapping, memfd, read_only_view};
use upcall_stats::Page;

use super::{Starting, StartingDisk, system};
use crate::config::{LogSink, Placement};
use crate::engine::{Clock, Parts, Slot};
use crate::error::StartError;
use crate::hosts::{EngineHandle, HostId, SupervisorOrders};
use crate::recipe::{GivenArena, GivenChannel};

/// Bytes of an arena for each queue: for requests of the frontend, and for those that one
/// filter issues. Each holds the largest request (4 MiB) more than once.
const ARENA_GUEST: usize = 12 << 20;
const ARENA_ISSUED: usize = 8 << 20;

/// The memory of a disk's arenas: for each queue, that for requests of the frontend, then
/// those for requests that filters issue.
pub(super) struct ArenaMemory {
    mapping: Arc<Mapping>,
    /// By slot: which of the latter is its filter's, if it needs one; from 1.
    issuers: Vec<Option<usize>>,
    queue_bytes: usize,
}

impl ArenaMemory {
    fn of_queue(&self, queue: u16) -> io::Result<Vec<Arena>> {
        let start = self.queue_bytes * usize::from(queue);
        let issued = (start + ARENA_GUEST..start + self.queue_bytes).step_by(ARENA_ISSUED);
        std::iter::once((start, ARENA_GUEST))
            .chain(issued.map(|at| (at, ARENA_ISSUED)))
            .map(|(at, size)| Arena::new(self.mapping.clone(), at, size))
            .collect()
    }
}

/// Whether requests that enter a chain there may need an arena: some filter looks at their
/// data, or zeroes have to be written for one that decides data.
fn needs_arena(chain: &Chain, entry: Entry) -> bool {
    let needs = |op| chain.needs_arena(op, entry) || chain.route(op, entry) == Route::AsWrites;
    Op::ALL.into_iter().any(needs)
}

/// Makes the arenas of a disk whose filters want data, and gives them to their hosts: for
/// writing only to those that may change data there, and not at all to those that see none.
pub(super) fn give_arena(
    disk: &mut StartingDisk,
    number: u32,
    hosts: &mut [Starting],
) -> Result<(), StartError> {
    let accesses: Vec<(usize, DataAccess)> = disk
        .chain
        .slots()
        .map(|(index, spec)| (disk.slots[index.index()].host, spec.arena_access()))
        .collect();
    if !needs_arena(&disk.chain, Entry::Top) {
        return Ok(());
    }
    let mut issuing = 0;
    let issuers = disk.chain.slots().map(|(index, _)| {
        let issues = hosts[disk.slots[index.index()].host].recipe.description.issues();
        (issues && needs_arena(&disk.chain, Entry::Below(index))).then(|| {
            issuing += 1;
            issuing
        })
    });
    let issuers: Vec<Option<usize>> = issuers.collect();
    let queue_bytes = ARENA_GUEST + ARENA_ISSUED * issuing;
    let size = queue_bytes * usize::from(disk.config.threads());
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
            Some(DataAccess::Change) => (&fd, true),
            Some(DataAccess::Observe) => (&view, false),
            _ => continue,
        };
        hosts[*host].recipe.arenas.push(GivenArena {
            number,
            disk: disk.name.clone(),
            fd: fd.try_clone().map_err(failed)?,
            size: size as u64,
            writable,
        });
    }
    let mapping = Arc::new(Mapping::new(&fd, 0, size, Access::ReadWrite).map_err(failed)?);
    disk.arena = Some(ArenaMemory { mapping, issuers, queue_bytes });
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
                arena: disk.arena.as_ref().and_then(|arena| arena.issuers[place]).unwrap_or(0),
                on_failure: slot.on_failure,
                deadline_ns: match slot.deadline_ms {
                    0 => u64::MAX,
                    _ if is_inline => u64::MAX,
                    ms => ms.saturating_mul(1_000_000),
                },
                keeps_images: changes && !is_inline && slot.on_failure == OnFailure::Hold,
                gaps: match &slot.gaps {
                    Some(gaps) => Some(Box::new(gaps.marker().map_err(failed)?)),
                    None => None,
                },
                detached: false,
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
            store_stats: page.block(disk.first_hop + 1 + disk.slots.len(), queue),
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
