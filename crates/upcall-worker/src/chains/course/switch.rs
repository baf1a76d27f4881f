//! The new chains are written down, become those of the disks, and what has left them ends.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use super::{Course, Done, Left, changed};
use crate::chains::plan::Planned;
use crate::chains::slots::ChainSlot;
use crate::config::{LogLevel, SlotConfig};
use crate::engine::Command;
use crate::hosts::TrialEnds;

impl Course<'_> {
    pub(super) fn commit(&mut self) -> Result<(), String> {
        let Some(write_down) = self.core.write_down.clone() else { return Ok(()) };
        let slots = self.plans.iter().flat_map(|plan| &plan.slots);
        let mut slots = slots.filter(|slot| matches!(slot, Planned::New(new) if new.is_on_trial));
        if slots.next().is_some() {
            // When they have stood it. A worker that dies before is followed by one with what
            // has proven itself.
            return Ok(());
        }
        let all: Vec<(String, Vec<SlotConfig>)> = self
            .core
            .disks
            .iter()
            .enumerate()
            .map(|(number, disk)| {
                let plan = self.plans.iter().find(|plan| plan.disk == number);
                let configs = match plan {
                    Some(plan) => plan.slots.iter().map(config_of).collect(),
                    None => disk.slots.iter().map(|slot| slot.config.clone()).collect(),
                };
                (disk.name.to_string(), configs)
            })
            .collect();
        write_down(&all).map_err(|why| format!("the new chain cannot be written down: {why}"))
    }

    /// From here on the new chains are those of the disks.
    pub(super) fn switch(&mut self, trial: Option<&TrialEnds>) -> Done {
        let changed = changed(self.core, &self.plans, 0, false);
        let mut done = Done { changed, trial: Vec::new(), before: Vec::new() };
        let make_ups = std::mem::take(&mut self.make_ups);
        for index in 0..self.plans.len() {
            let number = self.plans[index].disk;
            let before = self.core.disks[number].slots.iter().map(|slot| slot.config.clone());
            done.before.push((number, before.collect()));
            self.adopt_hosts(index, trial, &mut done);
        }
        for (plan, make_ups) in self.plans.iter().zip(make_ups) {
            let mut replies = Vec::new();
            let engines = &self.core.disks[plan.disk].engines;
            for (engine, make_up) in engines.iter().zip(make_ups) {
                let (reply, switched) = sync_channel(1);
                engine.send(Command::Swap { make_up: Box::new(make_up), reply });
                replies.push(switched);
            }
            // A thread that has ended serves nobody.
            for switched in replies {
                let _ = switched.recv();
            }
        }
        for index in 0..self.plans.len() {
            self.settle(index);
        }
        done
    }

    /// Hands the new hosts to the watch, and shows their filters.
    fn adopt_hosts(&mut self, index: usize, trial: Option<&TrialEnds>, done: &mut Done) {
        let plan = &mut self.plans[index];
        for slot in &mut plan.slots {
            let Planned::New(new) = slot else { continue };
            let Some(watched) = new.watched() else { continue };
            let ends = trial.filter(|_| new.is_on_trial).cloned();
            if new.is_on_trial {
                let name = new.slot.name.clone();
                done.trial.push((new.host, name, plan.disk, new.slot.instance, new.slot.hop));
            }
            if new.replaces.is_none() {
                self.core.page.begin_filter(new.slot.hop, &new.recipe.description.name);
            }
            self.core.keeper.adopt(new.host, watched, ends);
        }
    }

    /// Writes down what a disk's chain is now, and ends what has left it.
    fn settle(&mut self, index: usize) {
        let plan = &mut self.plans[index];
        let number = plan.disk;
        let disk = &mut self.core.disks[number];
        disk.chain = plan.chain.clone();
        disk.arena = disk.arena.take().or(plan.new_arena.take());
        let mut old: Vec<Option<ChainSlot>> =
            std::mem::take(&mut disk.slots).into_iter().map(Some).collect();
        let mut replaced = HashSet::new();
        for slot in std::mem::take(&mut plan.slots) {
            disk.slots.push(match slot {
                Planned::Stays(place, terms) => {
                    let Some(slot) = old[place].take() else { unreachable!("it stays once") };
                    ChainSlot {
                        config: terms.config,
                        spec: terms.spec,
                        on_failure: terms.on_failure,
                        deadline_ms: terms.deadline_ms,
                        ..slot
                    }
                }
                Planned::New(new) => {
                    replaced.extend(new.replaces);
                    new.slot
                }
            });
        }
        disk.extents
            .rechain(disk.slots.iter().map(|slot| (slot.instance, slot.spec.decides_data())));
        let ranks = disk.slots.iter().map(|slot| slot.hop).chain([disk.store_hop]);
        for (rank, hop) in ranks.enumerate() {
            self.core.page.rank(hop, (disk.first_hop + 1 + rank) as u64);
        }
        for (place, slot) in old.into_iter().enumerate() {
            let Some(slot) = slot else { continue };
            if !replaced.contains(&place) {
                self.core.page.end_filter(slot.hop);
                self.core.disks[number].free_hops.push(slot.hop);
                if let Some(arena) = &mut self.core.disks[number].arena {
                    arena.give_back_section(slot.arena);
                }
            }
            let state = self.closed.remove(&(number, place)).flatten();
            self.dismiss(&slot);
            self.left.push(Left { disk: number, slot, state });
        }
    }

    /// A slot's instance has closed: its host ends, unless it has others.
    fn dismiss(&mut self, slot: &ChainSlot) {
        let recipes = self.core.disks.iter_mut().flat_map(|disk| &mut disk.slots);
        let others: Vec<&mut ChainSlot> = recipes.filter(|other| other.host == slot.host).collect();
        if others.is_empty() {
            let lent = self.lent.remove(&slot.host);
            self.ending.extend(lent.into_iter().chain(self.core.keeper.forget(slot.host)));
            return;
        }
        // Slots of other disks that leave with the same change go on being in the recipe until
        // it is their turn.
        let current = others[0].recipe.clone();
        match current.without(slot.instance) {
            Ok(recipe) => {
                let recipe = Arc::new(recipe);
                for other in others {
                    other.recipe = recipe.clone();
                }
                self.core.keeper.amend(slot.host, recipe);
            }
            Err(error) => (self.core.log)(
                LogLevel::Error,
                &format!(
                    "filter {} has left the chain, but its host would open it again: {error}",
                    slot.name
                ),
            ),
        }
    }
}

fn config_of(slot: &Planned) -> SlotConfig {
    match slot {
        Planned::Stays(_, terms) => terms.config.clone(),
        Planned::New(new) => new.slot.config.clone(),
    }
}
