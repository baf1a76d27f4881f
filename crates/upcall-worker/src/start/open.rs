//! Opening filter instances, and starting the threads that serve.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use upcall_abi::control::Disk as WireDisk;
use upcall_filterhost::{Counters, OpenInstance};

use super::connect::granted;
use super::{Starting, StartingDisk, system};
use crate::config::LogSink;
use crate::engine::{Engine, Lane, Parts};
use crate::error::StartError;
use crate::frontend::Frontend;
use crate::hosts::{EngineHandle, ShownCounters};
use crate::worker::{RunningEngine, ServedDisk};

/// Opens all instances: from here on files of parameters exist and filters' code runs.
pub(super) fn open_instances(
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
        let failed =
            |source| StartError::Filter { disk: disk.name.to_string(), source: Box::new(source) };
        for (place, slot) in disk.slots.iter().enumerate() {
            let process = &mut hosts[slot.host].process;
            if !std::mem::replace(&mut loaded[slot.host], true) {
                process.load().map_err(failed)?;
            }
            let params = slot.params.open().map_err(|source| StartError::Param {
                disk: disk.name.to_string(),
                source: Box::new(source),
            })?;
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
        host.process.serve().map_err(|source| StartError::Filter {
            disk: String::new(),
            source: Box::new(source),
        })?;
    }
    Ok(shown)
}

/// Starts a disk's queue threads; each opens its stores itself.
pub(super) fn start_engines(
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
        name: disk.name,
        store: disk.store,
        info,
        engines,
        frontend,
        nbd: None,
    })
}
