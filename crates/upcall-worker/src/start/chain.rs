//! The filter hosts that a disk's filters need, and its chain.

use std::path::Path;
use std::sync::Arc;

use upcall_block::{DiskInfo, OpSet};
use upcall_chain::{
    Chain, ChainError, Class, Generation, OnFailure, SlotSpec, default_deadline_ms,
};
use upcall_filterhost::{Description, FilterFile, params};

use super::state::StateFolder;
use super::{Starting, StartingSlot};
use crate::config::{DiskConfig, LogLevel, LogSink, Placement};
use crate::error::StartError;
use crate::recipe::Recipe;

/// Starts the filter hosts that a disk's filters need and puts its chain together.
pub(super) fn plan_chain(
    config: &DiskConfig,
    store: &DiskInfo,
    disks: &[(String, u16, bool)],
    hosts: &mut Vec<Starting>,
    next_instance: &mut u32,
    state: &mut StateFolder,
    log: &LogSink,
) -> Result<(Arc<Chain>, Vec<StartingSlot>), StartError> {
    let disk = &config.name;
    let mut slots = Vec::new();
    let mut specs = Vec::new();
    for name in config.chain.iter().filter_map(|slot| slot.name.as_ref()) {
        if !is_slot_name(name) || !state.take_name(name) {
            return Err(StartError::SlotName { disk: disk.clone(), name: name.clone() });
        }
    }
    for slot in &config.chain {
        let host = host_of(disk, &slot.filter, slot.placement, hosts, log)?;
        let recipe = &mut hosts[host].recipe;
        recipe.memory_bytes = recipe.memory_bytes.max(slot.memory_bytes);
        let description = &recipe.description;
        let params = params::check(description, &slot.params)
            .map_err(|source| StartError::Param { disk: disk.clone(), source: Box::new(source) })?;
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
        let spec = spec_of(description, slot.order);
        let on_failure = slot.on_failure.unwrap_or(OnFailure::default_for(&spec));
        on_failure.check(&spec).map_err(|source| StartError::Policy {
            disk: disk.clone(),
            filter: description.name.clone(),
            source,
        })?;
        let deadline_ms = slot.deadline_ms.unwrap_or(default_deadline_ms(spec.class));
        specs.push(spec);
        let state_name = match &slot.name {
            Some(name) => name.clone(),
            None => state.name_next(&description.name),
        };
        let sidecar = match description.wants_sidecar() {
            true => Some(state.sidecar(config, &description.name, &state_name, log)?),
            false => None,
        };
        slots.push(Some(StartingSlot {
            host,
            instance,
            params,
            grants,
            on_failure,
            is_policy_chosen: slot.on_failure.is_some(),
            deadline_ms,
            state_name,
            sidecar,
            gaps: None,
            arena: 0,
            config: slot.clone(),
        }));
    }
    let below = DiskInfo { read_only: store.read_only || config.read_only, ..store.clone() };
    let chain = Chain::new(Generation(1), specs, &below).map_err(|source| {
        let filter = match &source {
            ChainError::Spec { source_index, .. } => slots[*source_index]
                .as_ref()
                .map(|slot| hosts[slot.host].recipe.description.name.clone()),
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

/// Whether a slot can be called so: its files are, too.
pub(crate) fn is_slot_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (1..=40).contains(&name.len()) && name.chars().all(plain)
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
    path: &Path,
    placement: Placement,
    hosts: &mut Vec<Starting>,
    log: &LogSink,
) -> Result<usize, StartError> {
    let failed = |source| StartError::Filter { disk: disk.to_owned(), source: Box::new(source) };
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if let Some(known) =
        hosts.iter().position(|host| host.path == path && host.recipe.placement == placement)
    {
        return Ok(known);
    }
    let file = FilterFile::open(&path).map_err(failed)?;
    let (recipe, process) = Recipe::first(file, placement, filter_log(log)).map_err(failed)?;
    hosts.push(Starting { path, process, recipe });
    Ok(hosts.len() - 1)
}

pub(crate) fn filter_log(log: &LogSink) -> upcall_filterhost::LogSink {
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
pub(crate) fn spec_of(description: &Description, order: i32) -> SlotSpec {
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
