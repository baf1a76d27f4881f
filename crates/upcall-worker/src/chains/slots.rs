//! Slots of a running chain, and those that are to come into one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use upcall_block::DiskInfo;
use upcall_chain::{DataAccess, OnFailure, SlotSpec};
use upcall_filterhost::{Counters, FilterFile, HostProcess, Placement};
use upcall_gap::Gaps;
use upcall_stats::Page;

use super::request::SlotView;
use crate::config::SlotConfig;
use crate::engine::{Link, NextSlot, Slot, Way, deadline_ns};
use crate::hosts::{HostId, Watched};
use crate::recipe::Recipe;

/// A slot of a running chain.
pub(crate) struct ChainSlot {
    pub(crate) host: HostId,
    pub(crate) recipe: Arc<Recipe>,
    pub(crate) instance: u32,
    /// As asked for, and with its name.
    pub(crate) config: SlotConfig,
    /// Unique on its disk; also what its files are called.
    pub(crate) name: String,
    pub(crate) spec: SlotSpec,
    pub(crate) on_failure: OnFailure,
    pub(crate) deadline_ms: u64,
    pub(crate) hop: usize,
    pub(crate) arena: usize,
    pub(crate) sidecar: Option<Arc<OwnedFd>>,
    /// Must outlive the queue threads' marks there.
    pub(crate) gaps: Option<Arc<Gaps>>,
}

impl ChainSlot {
    pub(crate) fn view(&self) -> SlotView {
        let description = &self.recipe.description;
        SlotView {
            name: self.name.clone(),
            filter: description.name.clone(),
            version: description.version.clone(),
            vendor: description.vendor.clone(),
            class: description.class_name().to_owned(),
            on_failure: self.on_failure,
            deadline_ms: self.deadline_ms,
            config: self.config.clone(),
            decides_data: self.spec.decides_data(),
            instance: self.instance,
        }
    }

    pub(crate) fn keeps_images(&self) -> bool {
        keeps_images(&self.spec, self.config.placement, self.on_failure, false)
    }
}

fn keeps_images(spec: &SlotSpec, placement: Placement, policy: OnFailure, trial: bool) -> bool {
    spec.arena_access() == DataAccess::Change
        && placement == Placement::Isolated
        && (policy == OnFailure::Hold || trial)
}

/// A slot whose filter was started for a change and is not in the chain yet.
pub(super) struct NewSlot {
    pub(super) host: HostId,
    pub(super) recipe: Arc<Recipe>,
    /// Until it is handed to the watch.
    pub(super) process: Option<HostProcess>,
    /// By queue, when it is prepared.
    pub(super) ways: Vec<Way>,
    /// When it is open.
    pub(super) counters: Vec<Counters>,
    /// The place of the slot that it replaces in the old chain.
    pub(super) replaces: Option<usize>,
    /// What the one before saved.
    pub(super) state: Option<Vec<u8>>,
    pub(super) slot: ChainSlot,
    pub(super) is_on_trial: bool,
}

impl NewSlot {
    /// What the queue thread `queue` is given. Once for each.
    pub(super) fn next_slot(
        &mut self,
        queue: usize,
        page: &Page,
        replaces: Option<(u32, bool)>,
    ) -> std::io::Result<NextSlot> {
        let slot = &self.slot;
        let is_inline = slot.config.placement == Placement::Inline;
        let description = &self.recipe.description;
        let has_gaps_already = replaces.is_some_and(|(_, has_gaps)| has_gaps);
        let gaps = match &slot.gaps {
            Some(gaps) if !has_gaps_already => Some(Box::new(gaps.marker()?) as _),
            _ => None,
        };
        let name = description.name.as_str().into();
        let mut link = Link::new(self.host, name, self.ways.remove(0));
        link.inline = self.process.as_mut().and_then(|host| host.inline_channel(queue as u32));
        let next = Slot {
            link: 0,
            instance: slot.instance,
            issues: description.issues(),
            grants: Vec::new(),
            arena: slot.arena,
            on_failure: slot.on_failure,
            deadline_ns: deadline_ns(slot.deadline_ms, is_inline),
            keeps_images: keeps_images(
                &slot.spec,
                slot.config.placement,
                slot.on_failure,
                self.is_on_trial,
            ),
            gaps,
            detached: false,
            is_on_trial: self.is_on_trial,
            stats: page.block(slot.hop, queue as u16),
        };
        let replaces = replaces.map(|(instance, _)| instance);
        Ok(NextSlot::New { slot: Box::new(next), link: Box::new(link), replaces })
    }

    /// What the watch is given.
    pub(super) fn watched(&mut self) -> Option<Watched> {
        let process = self.process.take()?;
        let (recipe, counters) = (self.recipe.clone(), std::mem::take(&mut self.counters));
        Some(Watched { recipe, process, counters })
    }
}

/// What a disk is, as filters are told.
pub(super) fn wire(info: &DiskInfo) -> upcall_abi::control::Disk {
    upcall_abi::control::Disk {
        capacity: info.capacity,
        block_size: info.block_size,
        read_only: u32::from(info.read_only),
    }
}

/// Where the filter of a new slot comes from.
pub(super) enum Source {
    /// Its shared object, opened.
    File(FilterFile),
    /// That of a slot that is or was in a chain, with what it kept.
    Slot { file: FilterFile, sidecar: Option<Arc<OwnedFd>>, gaps: Option<Arc<Gaps>> },
}
