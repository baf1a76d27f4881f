//! Carrying a change out: each step as `upcall_chain::Change` says, and its undoing.
//!
//! While the disks stand still, the hosts of their filters are lent to us by the thread that
//! watches them, so that we can talk to them; one that dies of it is given back dead, and what
//! its policy says follows. The pause is only as long as filters take to open and close:
//! processes are started before it and ended after it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::{Duration, Instant};

use upcall_chain::{Change, ChangeEnd, ChangeStep, FailedAt};
use upcall_filterhost::{FilterError, HostProcess};

use super::plan::{self, DiskPlan, Planned, Wanted};
use super::request::*;
use super::slots::{ChainSlot, Source};
use super::{Core, DiskChain};
use crate::config::{LogLevel, SlotConfig};
use crate::engine::{Command, MakeUp, NextSlot, deadline_ns};
use crate::hosts::{EngineHandle, HostId};

/// How long a filter may take to acknowledge an event, and to open and close, while a disk
/// stands still.
const ACKNOWLEDGE: Duration = Duration::from_millis(1000);
/// What a filter host may take otherwise.
const USUAL: Duration = Duration::from_secs(10);
/// After how long threads that are still hear what they have put off, if others are not still.
const CATCH_UP: Duration = Duration::from_millis(20);
/// How often it is tried to put chains back as they were.
const TAKE_BACK_TRIES: u32 = 3;
/// How often a trial's requests are counted.
const TRIAL_LOOK: Duration = Duration::from_millis(5);

/// Events, as in `filter.h`.
const STUN: u32 = 1;
const UNSTUN: u32 = 2;
const ATTACH: u32 = 3;
const DETACH: u32 = 4;

/// Carries a change out, and takes it back if a new filter does not stand its trial. `show`:
/// makes readers see the chains as they are.
pub(super) fn change(
    core: &mut Core,
    change: &ChainChange,
    show: &dyn Fn(&Core),
) -> Result<Changed, ChangeError> {
    let before = Reserved::of(core);
    let planned = plan_all(core, change);
    let mut plans = match planned {
        Ok(plans) if !change.is_dry_run => plans,
        planned => {
            before.give_back(core);
            return planned.map(|plans| changed(core, &plans, 0, true));
        }
    };
    let has_trial = settle_trial(&mut plans);
    let (trial_ended, trial) = channel();
    let mut course = Course::new(core, plans, change.drain_ms);
    let done = course.run(Some(trial_ended));
    let (outcome, left) = (done, std::mem::take(&mut course.left));
    drop(course);
    let done = match outcome {
        Ok(done) => done,
        Err(error) => {
            before.give_back(core);
            return Err(error);
        }
    };
    show(core);
    let failed = done.stand_trial(core, change.trial, &trial);
    let unwritten = match (&failed, has_trial) {
        (None, true) => core.write_down_now().err(),
        _ => None,
    };
    // Writing may take as long as a slow disk does, and the trial goes on: what was written down
    // of one that fails meanwhile is overwritten when it is taken back.
    let failed = failed.or_else(|| trial.try_recv().ok());
    if failed.is_none() && unwritten.is_none() {
        end_trials(core, &done);
        return Ok(done.changed);
    }
    let mut back = take_back(core, &done, &left, change.drain_ms);
    // What failed may have been another process that died, and the guest waits.
    for _ in 1..TAKE_BACK_TRIES {
        if back.is_err() {
            back = take_back(core, &done, &left, change.drain_ms);
        }
    }
    show(core);
    end_trials(core, &done);
    let (host, why) = match (failed, unwritten) {
        (Some(failed), _) => failed,
        (None, why) => {
            let why = why.unwrap_or_default();
            return Err(ChangeError::RolledBack { at: FailedAt::Commit, why });
        }
    };
    let filter = done.trial.iter().find(|(id, ..)| *id == host);
    let filter = filter.map_or_else(String::new, |(_, name, ..)| name.clone());
    Err(match back {
        Ok(()) => ChangeError::TrialFailed { filter, why },
        Err(error) => ChangeError::Stuck { filter, why, then: error.to_string() },
    })
}

/// Whether there is a trial: not if a part of the change, on any of its disks, cannot be taken
/// back.
fn settle_trial(plans: &mut [DiskPlan]) -> bool {
    let can_be_taken_back = plans.iter().all(|plan| plan.outline.can_be_taken_back());
    let mut has_trial = false;
    for slot in plans.iter_mut().flat_map(|plan| &mut plan.slots) {
        if let Planned::New(new) = slot {
            new.is_on_trial &= can_be_taken_back;
            has_trial |= new.is_on_trial;
        }
    }
    has_trial
}

fn plan_all(core: &mut Core, change: &ChainChange) -> Result<Vec<DiskPlan>, ChangeError> {
    let mut plans: Vec<DiskPlan> = Vec::new();
    for DiskChange { disk: name, edits } in &change.disks {
        let Some(number) = core.disks.iter().position(|disk| *disk.name == **name) else {
            let known: Vec<&str> = core.disks.iter().map(|disk| &*disk.name).collect();
            return Err(ChangeError::NoDisk { disk: name.clone(), known: known.join(", ") });
        };
        let disk = &core.disks[number];
        let refused =
            |why: &str| Err(ChangeError::Refused { disk: name.clone(), why: why.to_owned() });
        if disk.engines.is_empty() {
            return refused("it is there for filters that are granted it, and has no chain");
        }
        if plans.iter().any(|plan| plan.disk == number) {
            return refused("it is named twice: say all of it at once");
        }
        let wanted = plan::wanted(disk, edits)?;
        plans.push(plan::plan(core, number, wanted, change.trial.ms > 0)?);
    }
    Ok(plans)
}

/// What a plan takes of a disk's room, to be given back if nothing comes of it.
struct Reserved(Vec<(Vec<usize>, Option<Vec<bool>>)>);

impl Reserved {
    fn of(core: &Core) -> Reserved {
        let sections = |disk: &DiskChain| disk.arena.as_ref().map(|arena| arena.sections());
        Reserved(core.disks.iter().map(|disk| (disk.free_hops.clone(), sections(disk))).collect())
    }

    fn give_back(self, core: &mut Core) {
        for (disk, (hops, sections)) in core.disks.iter_mut().zip(self.0) {
            disk.free_hops = hops;
            if let (Some(arena), Some(sections)) = (&mut disk.arena, sections) {
                arena.set_sections(sections);
            }
        }
    }
}

/// What a change would make, or has made, of the chains.
fn changed(core: &Core, plans: &[DiskPlan], pause_us: u64, is_dry_run: bool) -> Changed {
    let of = |plan: &DiskPlan| {
        let disk = &core.disks[plan.disk];
        let after = plan.slots.iter().map(|slot| match slot {
            Planned::Stays(place, _) => disk.slots[*place].name.clone(),
            Planned::New(new) => new.slot.name.clone(),
        });
        DiskChanged {
            disk: disk.name.to_string(),
            generation: plan.chain.generation().0,
            before: disk.slot_names(),
            after: after.collect(),
        }
    };
    Changed { disks: plans.iter().map(of).collect(), pause_us, is_dry_run }
}

/// A slot that has left its chain, and what it saved.
struct Left {
    disk: usize,
    slot: ChainSlot,
    state: Option<Vec<u8>>,
}

/// A host on trial: its slot's name, disk, instance and hop.
type TrialOf = (HostId, String, usize, u32, usize);

/// A change that was made.
struct Done {
    changed: Changed,
    trial: Vec<TrialOf>,
    /// What each disk's chain was: names and terms, in the order of the configuration.
    before: Vec<(usize, Vec<SlotConfig>)>,
}

impl Done {
    /// Waits until the trial has ended; a host that failed in it, and why.
    fn stand_trial(
        &self,
        core: &Core,
        trial: Trial,
        ends: &Receiver<(HostId, String)>,
    ) -> Option<(HostId, String)> {
        let until = Instant::now() + Duration::from_millis(trial.ms);
        let hops = core.page.reader();
        // A hop goes on counting from what the filter before has passed.
        let passed = |hop: &usize| hops.requests(*hop);
        let before: Vec<u64> = self.trial.iter().map(|(.., hop)| passed(hop)).collect();
        let is_enough = |((.., hop), before): (&TrialOf, &u64)| {
            passed(hop).saturating_sub(*before) >= trial.requests
        };
        while !self.trial.is_empty() && Instant::now() < until {
            if let Ok(failed) = ends.recv_timeout(TRIAL_LOOK) {
                return Some(failed);
            }
            if self.trial.iter().zip(&before).all(is_enough) {
                break;
            }
        }
        ends.try_recv().ok()
    }
}

fn end_trials(core: &Core, done: &Done) {
    for (host, _, disk, instance, _) in &done.trial {
        core.keeper.end_trial(*host);
        for engine in &core.disks[*disk].engines {
            engine.send(Command::EndTrial { instance: *instance });
        }
    }
}

/// Puts the chains back as they were: a change of its own.
fn take_back(
    core: &mut Core,
    done: &Done,
    left: &[Left],
    drain_ms: u64,
) -> Result<(), ChangeError> {
    let reserved = Reserved::of(core);
    let mut plans = Vec::new();
    for (number, before) in &done.before {
        let mut wanted = Vec::new();
        for config in before {
            let disk = &core.disks[*number];
            let name = config.name.as_deref().unwrap_or_default();
            let place = disk.slots.iter().position(|slot| slot.name == name);
            let gone = left.iter().find(|left| left.disk == *number && left.slot.name == name);
            wanted.push(match (place, gone) {
                (replaces, Some(Left { slot, state, .. })) => {
                    let file = plan::again(slot, disk)?;
                    let (sidecar, gaps) = (slot.sidecar.clone(), slot.gaps.clone());
                    let source = Source::Slot { file, sidecar, gaps };
                    Wanted::New { config: config.clone(), source, replaces, state: state.clone() }
                }
                (Some(place), None) => Wanted::Stays { place, config: config.clone() },
                (None, None) => unreachable!("a slot stays, or has left"),
            });
        }
        match plan::plan(core, *number, wanted, false) {
            Ok(plan) => plans.push(plan),
            Err(error) => {
                reserved.give_back(core);
                return Err(error);
            }
        }
    }
    let mut course = Course::new(core, plans, drain_ms);
    let result = course.run(None);
    drop(course);
    if result.is_err() {
        reserved.give_back(core);
    }
    result.map(drop)
}

/// A change on its way.
struct Course<'a> {
    core: &'a mut Core,
    plans: Vec<DiskPlan>,
    drain_ms: u64,
    /// Hosts that we talk to.
    lent: HashMap<HostId, HostProcess>,
    /// Dead hosts of slots that leave, which are not to be started meanwhile.
    aside: Vec<HostId>,
    /// Instances that were told of the stun.
    stunned: HashSet<u32>,
    /// What leaving slots saved, by disk and place; there once they are closed.
    closed: HashMap<(usize, usize), Option<Vec<u8>>>,
    /// By plan and queue: what queue threads take on.
    make_ups: Vec<Vec<MakeUp>>,
    left: Vec<Left>,
    /// To be ended when the disks go on.
    ending: Vec<HostProcess>,
    since: Option<Instant>,
    pause_us: u64,
    why: String,
}

impl Course<'_> {
    fn new(core: &mut Core, plans: Vec<DiskPlan>, drain_ms: u64) -> Course<'_> {
        Course {
            core,
            plans,
            drain_ms,
            lent: HashMap::new(),
            aside: Vec::new(),
            stunned: HashSet::new(),
            closed: HashMap::new(),
            make_ups: Vec::new(),
            left: Vec::new(),
            ending: Vec::new(),
            since: None,
            pause_us: 0,
            why: String::new(),
        }
    }

    fn run(&mut self, trial: Option<crate::hosts::TrialEnds>) -> Result<Done, ChangeError> {
        let mut change = Change::new();
        let mut done = None;
        loop {
            let result = match change.poll_step() {
                ChangeStep::Prepare => self.prepare(),
                ChangeStep::Stun => self.stun(),
                ChangeStep::Leave => self.leave(),
                ChangeStep::Enter => self.enter(),
                ChangeStep::Commit => self.commit(),
                ChangeStep::Switch => {
                    done = Some(self.switch(trial.as_ref()));
                    Ok(())
                }
                ChangeStep::UndoEnter => {
                    self.undo_enter();
                    Ok(())
                }
                ChangeStep::UndoLeave => {
                    self.undo_leave();
                    Ok(())
                }
                ChangeStep::Resume => {
                    self.resume();
                    Ok(())
                }
                ChangeStep::CleanUp => {
                    self.clean_up();
                    Ok(())
                }
                ChangeStep::End(ChangeEnd::Changed) => {
                    let Some(mut done) = done else { unreachable!("it was switched") };
                    done.changed.pause_us = self.pause_us;
                    return Ok(done);
                }
                ChangeStep::End(ChangeEnd::Unchanged(at)) => {
                    let why = std::mem::take(&mut self.why);
                    return Err(ChangeError::RolledBack { at, why });
                }
            };
            if let Err(why) = &result {
                self.why.clone_from(why);
            }
            change.handle_step(result.is_ok());
        }
    }

    // ------------------------------------------------------------------ beside the disks

    fn prepare(&mut self) -> Result<(), String> {
        for plan in &mut self.plans {
            for slot in &mut plan.slots {
                let Planned::New(new) = slot else { continue };
                let Some(process) = &mut new.process else { continue };
                new.ways = new.recipe.prepare(process).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn clean_up(&mut self) {
        for process in self.ending.drain(..) {
            end(process, &self.core.log);
        }
        // What was started in vain dies with the plans.
        self.plans.clear();
    }

    // ------------------------------------------------------------------ stun and resume

    fn stun(&mut self) -> Result<(), String> {
        self.since = Some(Instant::now());
        let until = Instant::now() + Duration::from_millis(self.drain_ms);
        let disks = self.plans.iter().map(|plan| (plan, &self.core.disks[plan.disk]));
        let mut threads: Vec<_> = disks
            .flat_map(|(plan, disk)| disk.engines.iter().map(move |engine| (plan, disk, engine)))
            .map(|(plan, disk, engine)| (plan, disk, engine, Some(begin_stun(plan, engine))))
            .collect();
        let mut patience = CATCH_UP;
        loop {
            let next = until.min(Instant::now() + patience);
            for (.., still) in &mut threads {
                let left = next.saturating_duration_since(Instant::now());
                if still.as_ref().is_some_and(|still| still.recv_timeout(left).is_ok()) {
                    *still = None;
                }
            }
            let Some((_, disk, ..)) = threads.iter().find(|(.., still)| still.is_some()) else {
                return Ok(());
            };
            if Instant::now() >= until {
                return Err(format!(
                    "disk {}: what was in flight did not end within {} ms; see where it \
                     waits (upcall show), and allow more time, or mend that first",
                    disk.name, self.drain_ms
                ));
            }
            // A filter may have died meanwhile. It is started again only when all threads know,
            // and those that are still know nothing: requests on others would wait in vain.
            for (plan, _, engine, still) in &mut threads {
                if still.is_none() {
                    engine.send(Command::Unstun);
                    *still = Some(begin_stun(plan, engine));
                }
            }
            // Ever longer, so that slow disks, too, are still at one time.
            patience *= 2;
        }
    }

    /// Tells the filters that were told of the stun and are still there, and lets all go on.
    fn resume(&mut self) {
        for plan in &self.plans {
            for slot in &self.core.disks[plan.disk].slots {
                if self.stunned.contains(&slot.instance)
                    && let Some(process) = self.lent.get_mut(&slot.host)
                {
                    tell(process, slot, UNSTUN, &self.core.log);
                }
            }
        }
        for (host, mut process) in self.lent.drain() {
            process.set_timeout(USUAL);
            self.core.keeper.give_back(host, process);
        }
        for host in self.aside.drain(..) {
            self.core.keeper.release(host);
        }
        for plan in &self.plans {
            for engine in &self.core.disks[plan.disk].engines {
                engine.send(Command::Unstun);
            }
        }
        self.pause_us = self.since.map_or(0, |since| since.elapsed().as_micros() as u64);
    }

    // ------------------------------------------------------------------ while they stand still

    fn leave(&mut self) -> Result<(), String> {
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

    fn undo_leave(&mut self) {
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

    fn enter(&mut self) -> Result<(), String> {
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
    fn undo_enter(&mut self) {
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

    fn commit(&mut self) -> Result<(), String> {
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
    fn switch(&mut self, trial: Option<&crate::hosts::TrialEnds>) -> Done {
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
    fn adopt_hosts(
        &mut self,
        index: usize,
        trial: Option<&crate::hosts::TrialEnds>,
        done: &mut Done,
    ) {
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

/// Asks a queue thread to be still; hears when it is.
fn begin_stun(plan: &DiskPlan, engine: &EngineHandle) -> Receiver<()> {
    let (reply, still) = sync_channel(1);
    engine.send(Command::Stun { may_stay: plan.may_stay.clone(), reply });
    still
}

fn config_of(slot: &Planned) -> SlotConfig {
    match slot {
        Planned::Stays(_, terms) => terms.config.clone(),
        Planned::New(new) => new.slot.config.clone(),
    }
}

/// Hands an instance the state of the one before, if both know how.
fn load_state(
    process: &mut HostProcess,
    slot: &ChainSlot,
    state: Option<&[u8]>,
) -> Result<(), String> {
    match state {
        Some(state) if slot.recipe.description.has_load_state => process
            .load_state(slot.instance, state)
            .map_err(|error| format!("filter {} does not take over the state: {error}", slot.name)),
        _ => Ok(()),
    }
}

/// Delivers an event to which there is no "no".
fn tell(process: &mut HostProcess, slot: &ChainSlot, event: u32, log: &crate::config::LogSink) {
    if slot.recipe.description.has_event
        && process.exit_description().is_none()
        && let Err(error) = process.event(slot.instance, event)
        && !matches!(error, FilterError::Refused { .. })
    {
        fail(process, slot, &error, log);
    }
}

/// A filter that does not acknowledge in time falls under its failure policy.
fn fail(
    process: &mut HostProcess,
    slot: &ChainSlot,
    error: &FilterError,
    log: &crate::config::LogSink,
) {
    log(LogLevel::Warn, &format!("filter {} fails during a chain change: {error}", slot.name));
    process.kill();
}

/// Ends a host that has no instance any more.
fn end(mut process: HostProcess, log: &crate::config::LogSink) {
    process.set_timeout(ACKNOWLEDGE);
    if process.exit_description().is_none()
        && let Err(error) = process.quit()
    {
        log(LogLevel::Warn, &error.to_string());
    }
}
