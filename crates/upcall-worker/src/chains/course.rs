//! Carrying a change out: each step as `upcall_chain::Change` says, and its undoing.
//!
//! While the disks stand still, the hosts of their filters are lent to us by the thread that
//! watches them, so that we can talk to them; one that dies of it is given back dead, and what
//! its policy says follows. The pause is only as long as filters take to open and close:
//! processes are started before it and ended after it.

mod enter;
mod leave;
mod switch;

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use upcall_chain::{Change, ChangeEnd, ChangeStep};
use upcall_filterhost::{FilterError, HostProcess};

use super::Core;
use super::plan::{DiskPlan, Planned};
use super::request::*;
use super::slots::ChainSlot;
use super::trial::Done;
use crate::config::{LogLevel, LogSink};
use crate::engine::{Command, MakeUp};
use crate::hosts::{EngineHandle, HostId, TrialEnds};

/// How long a filter may take to acknowledge an event, and to open and close, while a disk
/// stands still.
const ACKNOWLEDGE: Duration = Duration::from_millis(1000);
/// What a filter host may take otherwise.
const USUAL: Duration = Duration::from_secs(10);
/// After how long threads that are still hear what they have put off, if others are not still.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Events, as in `filter.h`.
const STUN: u32 = 1;
const UNSTUN: u32 = 2;
const ATTACH: u32 = 3;
const DETACH: u32 = 4;

/// A slot that has left its chain, and what it saved.
pub(super) struct Left {
    pub(super) disk: usize,
    pub(super) slot: ChainSlot,
    pub(super) state: Option<Vec<u8>>,
}

/// A change on its way.
pub(super) struct Course<'a> {
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
    pub(super) left: Vec<Left>,
    /// To be ended when the disks go on.
    ending: Vec<HostProcess>,
    since: Option<Instant>,
    pause_us: u64,
    why: String,
}

impl Course<'_> {
    pub(super) fn new(core: &mut Core, plans: Vec<DiskPlan>, drain_ms: u64) -> Course<'_> {
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

    pub(super) fn run(&mut self, trial: Option<TrialEnds>) -> Result<Done, ChangeError> {
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
}

/// What a change would make, or has made, of the chains.
pub(super) fn changed(core: &Core, plans: &[DiskPlan], pause_us: u64, is_dry_run: bool) -> Changed {
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

/// Asks a queue thread to be still; hears when it is.
fn begin_stun(plan: &DiskPlan, engine: &EngineHandle) -> Receiver<()> {
    let (reply, still) = sync_channel(1);
    engine.send(Command::Stun { may_stay: plan.may_stay.clone(), reply });
    still
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
fn tell(process: &mut HostProcess, slot: &ChainSlot, event: u32, log: &LogSink) {
    if slot.recipe.description.has_event
        && process.exit_description().is_none()
        && let Err(error) = process.event(slot.instance, event)
        && !matches!(error, FilterError::Refused { .. })
    {
        fail(process, slot, &error, log);
    }
}

/// A filter that does not acknowledge in time falls under its failure policy.
fn fail(process: &mut HostProcess, slot: &ChainSlot, error: &FilterError, log: &LogSink) {
    log(LogLevel::Warn, &format!("filter {} fails during a chain change: {error}", slot.name));
    process.kill();
}

/// Ends a host that has no instance any more.
fn end(mut process: HostProcess, log: &LogSink) {
    process.set_timeout(ACKNOWLEDGE);
    if process.exit_description().is_none()
        && let Err(error) = process.quit()
    {
        log(LogLevel::Warn, &error.to_string());
    }
}
