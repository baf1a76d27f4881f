//! Opening filter instances, and starting the threads that serve.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use upcall_abi::control::Disk as WireDisk;

use super::connect::{StartingEngine, granted};
use super::{Starting, StartingDisk, system};
use crate::config::LogSink;
use crate::engine::{Engine, Lane, Link};
use crate::error::StartError;
use crate::frontend::Frontend;
use crate::hosts::{EngineHandle, Watched};
use crate::recipe::GivenInstance;
use crate::worker::{RunningEngine, ServedDisk};

/// Writes down which instances each filter host is to open.
pub(super) fn plan_instances(disks: &[StartingDisk], hosts: &mut [Starting]) {
    let wire = |disk: &StartingDisk| {
        let info = disk.chain.info();
        WireDisk {
            capacity: info.capacity,
            block_size: info.block_size,
            read_only: u32::from(info.read_only),
        }
    };
    for (number, disk) in disks.iter().enumerate() {
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
    for Starting { mut process, recipe, .. } in hosts {
        let set_up = recipe.set_up(&mut process)?;
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

pub(super) fn serve(
    disk: StartingDisk,
    engines: Vec<RunningEngine>,
    filter_names: &[String],
    drain_ms: u64,
    log: &LogSink,
) -> Result<ServedDisk, StartError> {
    let info = disk.chain.info().clone();
    let queues = usize::from(disk.config.queues);
    let handles: Vec<EngineHandle> =
        engines[..queues].iter().map(|engine| engine.handle.clone()).collect();
    let frontend = match disk.frontend {
        Some((listener, device)) => {
            let name = disk.name.clone();
            let started =
                Frontend::start(name, listener, Arc::new(device), handles, drain_ms, log.clone());
            Some(started.map_err(|source| system(&disk.name, "start its frontend", source))?)
        }
        None => None,
    };
    Ok(ServedDisk {
        queues: if disk.config.queues > 0 { disk.config.queues } else { engines.len() as u16 },
        summary: disk.store.describe(),
        chain: disk.slots.iter().map(|slot| filter_names[slot.host].clone()).collect(),
        _gaps: disk.slots.into_iter().filter_map(|slot| slot.gaps).collect(),
        name: disk.name,
        store: disk.store,
        info,
        engines,
        frontend,
        nbd: None,
    })
}
