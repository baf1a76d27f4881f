//! While the disks stand still: filters that stay are told, and those that leave save their state
//! and close; or all that undone.

use upcall_filterhost::FilterError;

use super::{ACKNOWLEDGE, Course, DETACH, STUN, fail, load_state, tell};
use crate::chains::plan::Planned;
use crate::chains::slots::ChainSlot;
use crate::config::LogLevel;

impl Course<'_> {
    pub(super) fn leave(&mut self) -> Result<(), String> {
        for index in 0..self.plans.len() {
            self.borrow_hosts(index);
            self.tell_stunned(index)?;
            for place in self.plans[index].leaving.clone() {
                self.close(index, place)?;
            }
        }
        Ok(())
    }

    /// Has the hosts lent to us that there is something to say to.
    fn borrow_hosts(&mut self, index: usize) {
        let plan = &self.plans[index];
        for (place, slot) in self.core.disks[plan.disk].slots.iter().enumerate() {
            let is_needed = slot.recipe.description.has_event || plan.leaving.contains(&place);
            if is_needed
                && !self.lent.contains_key(&slot.host)
                && let Some(mut process) = self.core.keeper.lend(slot.host)
            {
                process.set_timeout(ACKNOWLEDGE);
                self.lent.insert(slot.host, process);
            }
        }
    }

    fn tell_stunned(&mut self, index: usize) -> Result<(), String> {
        for slot in &self.core.disks[self.plans[index].disk].slots {
            let Some(process) = self.lent.get_mut(&slot.host) else { continue };
            if !slot.recipe.description.has_event {
                continue;
            }
            self.stunned.insert(slot.instance);
            match process.event(slot.instance, STUN) {
                Ok(()) => {}
                Err(error @ FilterError::Refused { .. }) => {
                    return Err(format!("filter {} refuses to be stunned: {error}", slot.name));
                }
                Err(error) => fail(process, slot, &error, &self.core.log),
            }
        }
        Ok(())
    }

    /// Closes a slot's instance, and saves its state for who takes its place.
    fn close(&mut self, index: usize, place: usize) -> Result<(), String> {
        let plan = &self.plans[index];
        let disk = &self.core.disks[plan.disk];
        let slot = &disk.slots[place];
        let is_shared = self.is_shared(slot);
        let Some(process) = self.lent.get_mut(&slot.host) else {
            if is_shared {
                return Err(format!(
                    "filter {} is being started again, for other disks as well: try again when \
                     it serves",
                    slot.name
                ));
            }
            // It is dead, and stays so; requests may wait for who comes.
            if !self.core.keeper.set_aside(slot.host) {
                return Err(format!(
                    "filter {} is just being started again: try again when it serves",
                    slot.name
                ));
            }
            self.aside.push(slot.host);
            self.closed.insert((plan.disk, place), None);
            return Ok(());
        };
        let is_replaced = plan.slots.iter().any(|planned| match planned {
            Planned::New(new) => new.replaces == Some(place),
            Planned::Stays(..) => false,
        });
        let mut saved = None;
        if !is_replaced {
            tell(process, slot, DETACH, &self.core.log);
        }
        if is_replaced
            && process.exit_description().is_none()
            && slot.recipe.description.has_save_state
        {
            match process.save_state(slot.instance) {
                Ok(state) => saved = state,
                Err(error @ FilterError::Refused { .. }) => {
                    return Err(format!("filter {} does not save its state: {error}", slot.name));
                }
                Err(error) => fail(process, slot, &error, &self.core.log),
            }
        }
        if process.exit_description().is_none()
            && let Err(error) = process.close(slot.instance)
        {
            fail(process, slot, &error, &self.core.log);
        }
        self.closed.insert((plan.disk, place), saved);
        Ok(())
    }

    /// Whether a slot's host serves others that stay.
    fn is_shared(&self, slot: &ChainSlot) -> bool {
        let leaves = |number: usize, place: usize| {
            let mut plans = self.plans.iter();
            plans.any(|plan| plan.disk == number && plan.leaving.contains(&place))
        };
        self.core.disks.iter().enumerate().any(|(number, disk)| {
            let mut slots = disk.slots.iter().enumerate();
            slots.any(|(place, other)| other.host == slot.host && !leaves(number, place))
        })
    }

    pub(super) fn undo_leave(&mut self) {
        for ((disk, place), state) in std::mem::take(&mut self.closed) {
            let slot = &self.core.disks[disk].slots[place];
            let Some(process) = self.lent.get_mut(&slot.host) else { continue };
            if process.exit_description().is_some() {
                continue;
            }
            // It was told that it is stunned before it was closed; this is another instance.
            self.stunned.remove(&slot.instance);
            let given = slot.recipe.instances.iter().find(|given| given.instance == slot.instance);
            let Some(given) = given else { continue };
            let opened = slot.recipe.open(process, given).map_err(|error| error.to_string());
            let opened = opened.and_then(|_| load_state(process, slot, state.as_deref()));
            if let Err(error) = opened {
                // Its policy decides what follows; another process is started for it.
                (self.core.log)(
                    LogLevel::Error,
                    &format!("filter {} cannot be opened again: {error}", slot.name),
                );
                process.kill();
            }
        }
    }
}
