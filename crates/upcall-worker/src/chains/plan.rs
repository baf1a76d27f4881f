//! A change, checked against the chain that there is: what stays, what goes, what comes.
//!
//! New filters' hosts are started here, for only the filter itself says what it is; none of
//! their instances is opened, and dropping the plan ends them.

use std::collections::HashSet;
use std::sync::Arc;

use upcall_chain::{
    Chain, ChainError, Entry, Generation, OnFailure, Outline, Present, SlotSpec,
    default_deadline_ms,
};
use upcall_filterhost::{Description, FilterFile, Placement, params};

use super::request::{ChangeError, Edit};
use super::slots::{ChainSlot, NewSlot, Source, wire};
use super::{Core, DiskChain};
use crate::config::SlotConfig;
use crate::engine::MayStay;
use crate::hosts::HostId;
use crate::recipe::{GivenChannel, GivenInstance, Recipe};
use crate::start::{ArenaMemory, filter_log, is_slot_name, needs_arena, spec_of};

/// One disk's part of a change.
pub(super) struct DiskPlan {
    pub(super) disk: usize,
    pub(super) chain: Arc<Chain>,
    /// In the order of the next chain.
    pub(super) slots: Vec<Planned>,
    /// Places in the old chain of those that go, in their order; of those that are replaced, too.
    pub(super) leaving: Vec<usize>,
    /// For a disk that has no arena and needs one.
    pub(super) new_arena: Option<ArenaMemory>,
    pub(super) may_stay: MayStay,
    pub(super) outline: Outline,
}

/// A place in the next chain.
pub(super) enum Planned {
    /// The slot at this place of the old chain, under these terms.
    Stays(usize, Box<Terms>),
    New(Box<NewSlot>),
}

/// What may change of a slot whose filter stays.
pub(super) struct Terms {
    pub(super) config: SlotConfig,
    pub(super) spec: SlotSpec,
    pub(super) on_failure: OnFailure,
    pub(super) deadline_ms: u64,
}

/// A place in the chain that is wanted.
pub(super) enum Wanted {
    Stays { place: usize, config: SlotConfig },
    New { config: SlotConfig, source: Source, replaces: Option<usize>, state: Option<Vec<u8>> },
}

/// What is wanted if a disk's chain is edited so.
pub(super) fn wanted(disk: &DiskChain, edits: &[Edit]) -> Result<Vec<Wanted>, ChangeError> {
    let refused = |why: String| ChangeError::Refused { disk: disk.name.to_string(), why };
    let mut all: Vec<Option<Wanted>> = (0..disk.slots.len())
        .map(|place| Some(Wanted::Stays { place, config: disk.slots[place].config.clone() }))
        .collect();
    let open = |path: &std::path::Path| {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        FilterFile::open(&path).map_err(|error| refused(error.to_string()))
    };
    let mut edited = HashSet::new();
    for edit in edits {
        let place = match edit {
            Edit::Attach(config) => {
                let source = Source::File(open(&config.filter)?);
                let config = config.clone();
                all.push(Some(Wanted::New { config, source, replaces: None, state: None }));
                continue;
            }
            Edit::Detach { slot } | Edit::Replace { slot, .. } | Edit::Set { slot, .. } => {
                find(disk, slot)?
            }
        };
        if !edited.insert(place) {
            let name = &disk.slots[place].name;
            return Err(refused(format!("{name} is named twice: say all of it at once")));
        }
        let slot = &disk.slots[place];
        let mut config = slot.config.clone();
        all[place] = match edit {
            Edit::Attach(_) => unreachable!("it has no place yet"),
            Edit::Detach { .. } => None,
            Edit::Set { order, deadline_ms, on_failure, .. } => {
                config.order = order.unwrap_or(config.order);
                config.deadline_ms = deadline_ms.or(config.deadline_ms);
                config.on_failure = on_failure.or(config.on_failure);
                Some(Wanted::Stays { place, config })
            }
            Edit::Replace { filter, params, .. } => {
                if !slot.config.grants.is_empty() {
                    return Err(refused(format!(
                        "{} was granted another disk, and is not replaced while it is served: \
                         serve the disks anew",
                        slot.name
                    )));
                }
                for (name, value) in params {
                    config.params.retain(|(known, _)| known != name);
                    config.params.push((name.clone(), value.clone()));
                }
                let file = match filter {
                    Some(path) => {
                        config.filter = path.clone();
                        open(path)?
                    }
                    None => again(slot, disk)?,
                };
                let (sidecar, gaps) = (slot.sidecar.clone(), slot.gaps.clone());
                let source = Source::Slot { file, sidecar, gaps };
                Some(Wanted::New { config, source, replaces: Some(place), state: None })
            }
        };
    }
    Ok(all.into_iter().flatten().collect())
}

/// A slot's file, once more.
pub(super) fn again(slot: &ChainSlot, disk: &DiskChain) -> Result<FilterFile, ChangeError> {
    slot.recipe.file.try_clone().map_err(|error| ChangeError::Refused {
        disk: disk.name.to_string(),
        why: format!("the file of {} cannot be used again: {error}", slot.name),
    })
}

/// The place of a slot: by its name, or by its filter's.
fn find(disk: &DiskChain, name: &str) -> Result<usize, ChangeError> {
    if let Some(place) = disk.slots.iter().position(|slot| slot.name == name) {
        return Ok(place);
    }
    let is_it = |slot: &ChainSlot| slot.recipe.description.name == name;
    let mut places = (0..disk.slots.len()).filter(|place| is_it(&disk.slots[*place]));
    match (places.next(), places.next()) {
        (Some(place), None) => Ok(place),
        (found, _) => Err(ChangeError::NoSlot {
            disk: disk.name.to_string(),
            slot: name.to_owned(),
            is_ambiguous: found.is_some(),
            known: disk.known_slots(),
        }),
    }
}

/// Checks what is wanted of a disk. `has_trial`: new filters are tried first.
pub(super) fn plan(
    core: &mut Core,
    number: usize,
    wanted: Vec<Wanted>,
    has_trial: bool,
) -> Result<DiskPlan, ChangeError> {
    let mut names: HashSet<String> = HashSet::new();
    let kept = |wanted: &Wanted| match wanted {
        Wanted::Stays { place, .. } => Some(*place),
        Wanted::New { replaces, .. } => *replaces,
    };
    let disk = &core.disks[number];
    names.extend(wanted.iter().filter_map(kept).map(|place| disk.slots[place].name.clone()));
    names.extend(wanted.iter().filter_map(|wanted| match wanted {
        Wanted::New { config, .. } => config.name.clone(),
        Wanted::Stays { .. } => None,
    }));
    let stay: HashSet<usize> = wanted
        .iter()
        .filter_map(|wanted| match wanted {
            Wanted::Stays { place, .. } => Some(*place),
            Wanted::New { .. } => None,
        })
        .collect();
    let leaving: Vec<usize> = (0..disk.slots.len()).filter(|place| !stay.contains(place)).collect();
    let mut slots = Vec::new();
    let mut instances: HashSet<u32> =
        core.disks.iter().flat_map(|disk| disk.slots.iter().map(|slot| slot.instance)).collect();
    for wanted in wanted {
        slots.push(match wanted {
            Wanted::Stays { place, config } => {
                let slot = &core.disks[number].slots[place];
                let spec = SlotSpec { order: config.order, ..slot.spec.clone() };
                let terms = terms(&core.disks[number], &slot.recipe.description, spec, config)?;
                // A record of gaps is opened when the filter comes.
                let needs_gaps = terms.on_failure.records_gaps(&terms.spec);
                if needs_gaps && slot.gaps.is_none() && slot.on_failure != terms.on_failure {
                    let why = format!(
                        "{} keeps no record of what it would miss, so its on-failure cannot become \
                         {} while it is in the chain: detach it and attach it so",
                        slot.name, terms.on_failure
                    );
                    let disk = core.disks[number].name.to_string();
                    return Err(ChangeError::Refused { disk, why });
                }
                Planned::Stays(place, Box::new(terms))
            }
            Wanted::New { config, source, replaces, state } => {
                let instance = (0..).find(|instance| !instances.contains(instance)).unwrap_or(0);
                instances.insert(instance);
                let new = Newcomer { config, source, replaces, state, instance };
                Planned::New(Box::new(start(core, number, new, &mut names)?))
            }
        });
    }
    finish(core, number, slots, leaving, has_trial)
}

/// Puts the next chain together, and checks it as a whole.
fn finish(
    core: &mut Core,
    number: usize,
    slots: Vec<Planned>,
    leaving: Vec<usize>,
    has_trial: bool,
) -> Result<DiskPlan, ChangeError> {
    let disk = &core.disks[number];
    let refused = |why: String| ChangeError::Refused { disk: disk.name.to_string(), why };
    let spec = |slot: &Planned| match slot {
        Planned::Stays(_, terms) => terms.spec.clone(),
        Planned::New(new) => new.slot.spec.clone(),
    };
    let name = |slot: &Planned| match slot {
        Planned::Stays(place, _) => disk.slots[*place].name.clone(),
        Planned::New(new) => new.slot.name.clone(),
    };
    let specs: Vec<SlotSpec> = slots.iter().map(spec).collect();
    let generation = Generation(disk.chain.generation().0 + 1);
    let chain = Chain::new(generation, specs, &disk.store_now()).map_err(|error| {
        let which = match &error {
            ChainError::Spec { source_index, .. } => format!("{}: ", name(&slots[*source_index])),
            _ => String::new(),
        };
        refused(format!("{which}{error}"))
    })?;
    let mut all: Vec<Option<Planned>> = slots.into_iter().map(Some).collect();
    let mut slots: Vec<Planned> =
        chain.slots().filter_map(|(index, _)| all[chain.source_index(index)].take()).collect();
    // Rule 10.
    let lost: Vec<String> = upcall_block::Op::ALL
        .into_iter()
        .filter(|op| disk.told.ops.contains(*op) && !chain.info().ops.contains(*op))
        .map(|op| op.to_string())
        .collect();
    if !lost.is_empty() {
        return Err(refused(format!(
            "its guest was told that it can {}, which such a chain cannot offer: attach a filter \
             that handles it, or serve the disk anew",
            lost.join(" and ")
        )));
    }
    let news = || {
        slots.iter().filter_map(|slot| match slot {
            Planned::New(new) => Some(new),
            Planned::Stays(..) => None,
        })
    };
    if disk.tells_extents && news().any(|new| new.slot.spec.decides_data()) {
        return Err(refused(
            "its NBD clients are told which ranges hold data, which a filter that decides data \
             would make wrong: serve the disk anew with it"
                .into(),
        ));
    }
    let is_replaced = |place: usize| news().any(|new| new.replaces == Some(place));
    let present: Vec<Present> = disk
        .slots
        .iter()
        .enumerate()
        .map(|(place, slot)| Present {
            spec: slot.spec.clone(),
            has_successor: !leaving.contains(&place) || is_replaced(place),
            // Of its grants, and of what it misses while it is out of the chain.
            leaves_for_good: !slot.config.grants.is_empty() || slot.gaps.is_some(),
        })
        .collect();
    let comes = news().filter(|new| new.replaces.is_none()).map(|new| &new.slot.spec);
    let outline = Outline::new(&disk.chain, &chain, &present, comes);
    let mut may_stay = MayStay::default();
    for &place in &leaving {
        let slot = &disk.slots[place];
        match is_replaced(place) {
            true if outline.may_await_successor() => may_stay.replaced.push(slot.instance),
            false if Outline::may_go_past(&slot.spec) => may_stay.leaving.push(slot.instance),
            _ => {}
        }
    }
    let mut new_arena = None;
    if disk.arena.is_none() && needs_arena(&chain, Entry::Top) {
        let memory = ArenaMemory::new(disk.config.threads(), 0);
        new_arena = Some(memory.map_err(|error| refused(format!("no room for data: {error}")))?);
    }
    let name = disk.name.clone();
    let before: Vec<usize> = disk.slots.iter().map(|slot| slot.arena).collect();
    let arena = &mut core.disks[number].arena;
    for slot in &mut slots {
        let Planned::New(new) = slot else { continue };
        if let Some(memory) = new_arena.as_mut().or(arena.as_mut()) {
            let before = new.replaces.map_or(0, |place| before[place]);
            give_room(memory, number as u32, before, new)
                .map_err(|why| ChangeError::Refused { disk: name.to_string(), why })?;
        }
        new.is_on_trial = has_trial
            && outline.can_try(&new.slot.spec, new.replaces.is_some())
            && new.slot.config.placement == Placement::Isolated;
    }
    let chain = Arc::new(chain);
    Ok(DiskPlan { disk: number, chain, slots, leaving, new_arena, may_stay, outline })
}

/// Gives a new filter the disk's data pages, as far as it may see them, and room for the data of
/// what it issues: `before`, if the one that it replaces had some.
fn give_room(
    memory: &mut ArenaMemory,
    number: u32,
    before: usize,
    new: &mut NewSlot,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("no room for data: {error}");
    if new.recipe.description.issues() {
        let section = if before > 0 { Some(before) } else { memory.take_section() };
        new.slot.arena = section.ok_or(
            "there is no room for another filter that issues requests of its own: serve the disk \
             anew with it",
        )?;
    }
    let disk = &new.recipe.instances[0].disk;
    let given = memory.give(new.slot.spec.arena_access(), number, disk).map_err(failed)?;
    let mut recipe = new.recipe.without(u32::MAX).map_err(failed)?;
    recipe.arenas.extend(given);
    new.recipe = Arc::new(recipe);
    new.slot.recipe = new.recipe.clone();
    Ok(())
}

fn terms(
    disk: &DiskChain,
    description: &Description,
    spec: SlotSpec,
    config: SlotConfig,
) -> Result<Terms, ChangeError> {
    let refused = |why: String| ChangeError::Refused { disk: disk.name.to_string(), why };
    let on_failure = config.on_failure.unwrap_or(OnFailure::default_for(&spec));
    on_failure
        .check(&spec)
        .map_err(|error| refused(format!("filter {}: {error}", description.name)))?;
    let deadline_ms = config.deadline_ms.unwrap_or(default_deadline_ms(spec.class));
    Ok(Terms { config, spec, on_failure, deadline_ms })
}

/// A filter that is wanted.
struct Newcomer {
    config: SlotConfig,
    source: Source,
    replaces: Option<usize>,
    state: Option<Vec<u8>>,
    instance: u32,
}

/// Starts the host of a new filter, asks what it is, and checks everything about it.
fn start(
    core: &mut Core,
    number: usize,
    new: Newcomer,
    names: &mut HashSet<String>,
) -> Result<NewSlot, ChangeError> {
    let Newcomer { mut config, source, replaces, state, instance } = new;
    let host = HostId(core.next_host);
    core.next_host += 1;
    let log = core.log.clone();
    let disk = &mut core.disks[number];
    let name = disk.name.clone();
    let refused = |why: String| ChangeError::Refused { disk: name.to_string(), why };
    if !config.grants.is_empty() {
        return Err(refused(
            "a filter is granted other disks only when they begin to be served: serve them anew"
                .into(),
        ));
    }
    let (file, kept_sidecar, kept_gaps) = match source {
        Source::File(file) => (file, None, None),
        Source::Slot { file, sidecar, gaps } => (file, sidecar, gaps),
    };
    let (mut recipe, process) = Recipe::first(file, config.placement, filter_log(&log))
        .map_err(|error| refused(error.to_string()))?;
    if let Some(before) = replaces.map(|place| &disk.slots[place].recipe.description.name)
        && *before != recipe.description.name
    {
        return Err(refused(format!(
            "filter {} cannot take the place of filter {before}, which is another one: detach that, \
             and attach this",
            recipe.description.name
        )));
    }
    recipe.memory_bytes = config.memory_bytes;
    let description = &recipe.description;
    let slot_name = match replaces.map(|place| disk.slots[place].name.clone()) {
        Some(name) => name,
        None => match config.name.take() {
            Some(name) if disk.slots.iter().any(|slot| slot.name == name) => {
                return Err(refused(format!("there is a slot {name} already")));
            }
            Some(name) if !is_slot_name(&name) => {
                return Err(refused(format!(
                    "{name:?} is no name for a slot: use 1 to 40 letters, digits and '-'"
                )));
            }
            Some(name) => name,
            None => (0..)
                .map(|number| upcall_state::name_of(&description.name, number))
                .find(|name| names.insert(name.clone()))
                .unwrap_or_default(),
        },
    };
    config.name = Some(slot_name.clone());
    let checked = params::check(description, &config.params)
        .map_err(|error| refused(format!("filter {}: {error}", description.name)))?;
    let spec = spec_of(description, config.order);
    let Terms { config, spec, mut on_failure, deadline_ms } =
        terms(disk, description, spec, config)?;
    let sidecar = match kept_sidecar {
        None if description.wants_sidecar() => {
            let made = disk.state.sidecar(&disk.config, &description.name, &slot_name, &log);
            Some(made.map_err(|error| refused(error.to_string()))?)
        }
        kept => kept.filter(|_| description.wants_sidecar()),
    };
    let mut gaps = kept_gaps;
    if gaps.is_none() && !disk.store.read_only && on_failure.records_gaps(&spec) {
        let capacity = disk.store_now().capacity;
        let mut made = crate::start::Made::default();
        match disk.state.gaps(&disk.config, &slot_name, capacity, &mut made) {
            Ok(opened) => gaps = opened.map(|(gaps, _)| Arc::new(gaps)),
            Err(why) if config.on_failure.is_some() => {
                return Err(refused(format!(
                    "what filter {} would miss cannot be recorded ({why})",
                    description.name
                )));
            }
            Err(_) => on_failure = OnFailure::Hold,
        }
        made.keep();
    }
    let hop = match replaces {
        Some(place) => disk.slots[place].hop,
        None => *disk.free_hops.last().ok_or_else(|| {
            refused("no more filters can be shown: detach one, or serve the disk anew".into())
        })?,
    };
    recipe.channels = (0..disk.engines.len())
        .map(|queue| GivenChannel {
            number: disk.number,
            disk: name.clone(),
            engine: disk.first_engine + queue,
            wake: disk.engines[queue].wake.clone(),
        })
        .collect();
    recipe.instances.push(GivenInstance {
        instance,
        number: disk.number,
        disk: name.clone(),
        disks: vec![wire(&disk.store_now())],
        params: checked,
        hop,
        on_failure,
        sidecar: sidecar.clone(),
        extents: vec![disk.extents.clone()],
        arrival: None,
    });
    if replaces.is_none() {
        disk.free_hops.pop();
    }
    let recipe = Arc::new(recipe);
    let slot = ChainSlot {
        host,
        recipe: recipe.clone(),
        instance,
        config,
        name: slot_name,
        spec,
        on_failure,
        deadline_ms,
        hop,
        arena: 0,
        sidecar,
        gaps,
    };
    Ok(NewSlot {
        host,
        recipe,
        process: Some(process),
        ways: Vec::new(),
        counters: Vec::new(),
        replaces,
        state,
        slot,
        is_on_trial: false,
    })
}
