//! While the disks stand still: new filters open and take over state, and what queue threads take
//! on is made; or that undone.

use super::{ACKNOWLEDGE, ATTACH, Course, USUAL, load_state};
use crate::chains::plan::Planned;
use crate::engine::{MakeUp, NextSlot, deadline_ns};

impl Course<'_> {
    pub(super) fn enter(&mut self) -> Result<(), String> {
        let page = self.core.page.clone();
        for plan in &mut self.plans {
            let disk = &self.core.disks[plan.disk];
            for slot in &mut plan.slots {
                let Planned::New(new) = slot else { continue };
                let closed = new.replaces.and_then(|place| self.closed.get(&(plan.disk, place)));
                let state = new.state.clone().or_else(|| closed.cloned().flatten());
                let Some(process) = &mut new.process else { continue };
                process.set_timeout(ACKNOWLEDGE);
                for given in &new.recipe.instances {
                    let counters = new.recipe.open(process, given);
                    new.counters.push(counters.map_err(|error| error.to_string())?);
                }
                load_state(process, &new.slot, state.as_deref())?;
                process.serve().map_err(|error| error.to_string())?;
                if new.recipe.description.has_event && new.replaces.is_none() {
                    process.event(new.slot.instance, ATTACH).map_err(|error| error.to_string())?;
                }
                process.set_timeout(USUAL);
            }
            let mut make_ups = Vec::new();
            for queue in 0..disk.engines.len() {
                let failed = |error: std::io::Error| format!("disk {}: {error}", disk.name);
                let mut slots = Vec::new();
                for slot in &mut plan.slots {
                    slots.push(match slot {
                        Planned::Stays(place, terms) => NextSlot::Stays {
                            instance: disk.slots[*place].instance,
                            on_failure: terms.on_failure,
                            deadline_ns: deadline_ns(
                                terms.deadline_ms,
                                terms.config.placement == upcall_filterhost::Placement::Inline,
                            ),
                            keeps_images: disk.slots[*place].keeps_images(),
                        },
                        Planned::New(new) => {
                            let before = new.replaces.map(|place| &disk.slots[place]);
                            let before = before.map(|slot| (slot.instance, slot.gaps.is_some()));
                            new.next_slot(queue, &page, before).map_err(failed)?
                        }
                    });
                }
                let arenas = match &plan.new_arena {
                    Some(memory) => memory.of_queue(queue as u16).map_err(failed)?,
                    None => Vec::new(),
                };
                make_ups.push(MakeUp { chain: plan.chain.clone(), slots, arenas });
            }
            self.make_ups.push(make_ups);
        }
        Ok(())
    }

    /// Closes what was opened; the processes die with the plan.
    pub(super) fn undo_enter(&mut self) {
        self.make_ups.clear();
        for plan in &mut self.plans {
            for slot in &mut plan.slots {
                let Planned::New(new) = slot else { continue };
                let Some(mut process) = new.process.take() else { continue };
                process.set_timeout(ACKNOWLEDGE);
                if process.exit_description().is_none() {
                    let _ = process.close(new.slot.instance);
                }
                // Before another instance of its slot is opened, it is dead.
                drop(process);
            }
        }
    }
}
