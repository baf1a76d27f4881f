//! Opening filter instances, and starting the threads that serve.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use upcall_abi::control::Disk as WireDisk;
use upcall_block::DiskInfo;

use super::connect::{StartingEngine, granted};
use super::{SPARE_HOPS, Starting, StartingDisk, StateFolder, system};
use crate::chains::{ChainSlot, DiskChain};
use crate::config::{DiskConfig, LogSink, SlotConfig};
use crate::engine::{Engine, Lane, Link};
use crate::error::StartError;
use crate::frontend::{Frontend, Served};
use crate::hosts::{EngineHandle, HostId, Watched};
use crate::recipe::{GivenInstance, Recipe};
use crate::worker::{RunningEngine, ServedDisk};

/// Writes down which instances each filter host is to open.
pub(super) fn plan_instances(
    disks: &[StartingDisk],
    states: &[StateFolder],
    hosts: &mut [Starting],
) {
    let wire = |disk: &StartingDisk| {
        let info = disk.chain.info();
        WireDisk {
            capacity: info.capacity,
            block_size: info.block_size,
            read_only: u32::from(info.read_only),
        }
    };
    for (number, (disk, state)) in disks.iter().zip(states).enumerate() {
        for (place, slot) in disk.slots.iter().enumerate() {
            let granted = slot.grants.iter().map(|granted| wire(&disks[*granted]));
            hosts[slot.host].recipe.instances.push(GivenInstance {
                instance: slot.instance,
                number: number as u32,
                disk: disk.name.clone(),
                disks: std::iter::once(wire(disk)).chain(granted).collect(),
                params: slot.params.clone(),
                hop: disk.first_hop + 1 + place,
                on_failure: slot.on_failure,
                sidecar: slot.sidecar.clone(),
                extents: std::iter::once(number)
                    .chain(slot.grants.iter().copied())
                    .map(|disk| disks[disk].extents.clone())
                    .collect(),
                arrival: state.handover().map(|handover| {
                    let saved = handover.states.iter().find(|(name, _)| *name == slot.state_name);
                    saved.map(|(_, state)| state.clone())
                }),
            });
        }
    }
}

/// Sets all filter hosts up and links the queue threads to them: from here on files of
/// parameters exist and filters' code runs.
pub(super) fn set_up_hosts(
    hosts: Vec<Starting>,
    engines: &mut [Vec<StartingEngine>],
) -> Result<Vec<Watched>, StartError> {
    let mut watched = Vec::new();
    let mut ways = Vec::new();
    for Starting { mut process, mut recipe, .. } in hosts {
        let set_up = recipe.set_up_first(&mut process)?;
        ways.push(set_up.ways.into_iter().map(Some).collect::<Vec<_>>());
        watched.push(Watched { recipe: Arc::new(recipe), process, counters: set_up.counters });
    }
    for engine in engines.iter_mut().flatten() {
        for (host, channel) in &engine.links {
            let way = ways[host.0].get_mut(*channel as usize).and_then(Option::take);
            let Some(way) = way else { unreachable!("a host has a way for each of its channels") };
            let Watched { recipe, process, .. } = &mut watched[host.0];
            let name = recipe.description.name.as_str().into();
            let mut link = Link::new(*host, name, way);
            link.inline = process.inline_channel(*channel);
            engine.parts.links.push(link);
        }
    }
    Ok(watched)
}

/// Starts a disk's queue threads; each opens its stores itself.
pub(super) fn start_engines(
    disks: &[StartingDisk],
    index: usize,
    starting: Vec<StartingEngine>,
) -> Result<Vec<RunningEngine>, StartError> {
    let disk = &disks[index];
    let mut engines = Vec::new();
    for (queue, engine) in starting.into_iter().enumerate() {
        let StartingEngine { handle, mut parts, .. } = engine;
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

/// Starts a disk's frontend; and what there is to know of it for chain changes, but for its
/// first queue thread's number among all.
pub(super) fn serve(
    disk: StartingDisk,
    number: usize,
    engines: Vec<RunningEngine>,
    state: StateFolder,
    recipes: &[Arc<Recipe>],
    drain_ms: u64,
    log: &LogSink,
) -> Result<(ServedDisk, DiskChain), StartError> {
    let info = disk.chain.info().clone();
    let queues = usize::from(disk.config.queues);
    let handles: Vec<EngineHandle> = engines.iter().map(|engine| engine.handle.clone()).collect();
    let mut device = None;
    let frontend = match disk.frontend {
        Some((listener, config)) => {
            let name = disk.name.clone();
            let config = Arc::new(config);
            device = Some(config.clone());
            let supply = Arc::new(Served(handles[..queues].to_vec()));
            let started = Frontend::start(name, listener, config, supply, drain_ms, log.clone());
            Some(started.map_err(|source| system(&disk.name, "start its frontend", source))?)
        }
        None => None,
    };
    let store = disk.store.info();
    let read_only = store.read_only || disk.config.read_only;
    let specs: Vec<_> = disk.chain.slots().map(|(_, spec)| spec.clone()).collect();
    let slots: Vec<ChainSlot> = disk
        .slots
        .into_iter()
        .zip(specs)
        .enumerate()
        .map(|(place, (slot, spec))| ChainSlot {
            host: HostId(slot.host),
            recipe: recipes[slot.host].clone(),
            instance: slot.instance,
            config: SlotConfig { name: Some(slot.state_name.clone()), ..slot.config },
            name: slot.state_name,
            spec,
            on_failure: slot.on_failure,
            deadline_ms: slot.deadline_ms,
            hop: disk.first_hop + 1 + place,
            arena: slot.arena,
            sidecar: slot.sidecar,
            gaps: slot.gaps.map(Arc::new),
        })
        .collect();
    let first_free = disk.first_hop + 1 + slots.len();
    let tells_extents =
        disk.config.nbd.is_some() && slots.iter().all(|slot| !slot.spec.decides_data());
    let chain = DiskChain {
        name: disk.name.clone(),
        number: number as u32,
        store: DiskInfo { read_only, ..store.clone() },
        told: info.clone(),
        device,
        engines: handles,
        first_engine: 0,
        chain: disk.chain,
        free_hops: (first_free..first_free + SPARE_HOPS).collect(),
        first_hop: disk.first_hop,
        store_hop: first_free + SPARE_HOPS,
        slots,
        arena: disk.arena,
        state,
        tells_extents,
        extents: disk.extents,
        config: DiskConfig { nbd: None, ..disk.config },
    };
    let served = ServedDisk {
        queues: if queues > 0 { queues as u16 } else { engines.len() as u16 },
        summary: disk.store.describe(),
        name: disk.name,
        store: disk.store,
        info,
        engines,
        frontend,
        nbd: None,
    };
    Ok((served, chain))
}
