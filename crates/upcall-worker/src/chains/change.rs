//! A change from its plan to its end: it is carried out, a new filter stands its trial, and if it
//! does not, the chains are put back by a change of their own.
//!
//! Always true: what a plan has taken of a disk's room is given back if nothing comes of it; what
//! is written down in the end is what the chains are.

use std::sync::mpsc::channel;

use upcall_chain::FailedAt;

use super::course::{Course, Left, changed};
use super::plan::{self, DiskPlan, Planned, Wanted};
use super::request::*;
use super::slots::Source;
use super::trial::{Done, end_trials};
use super::{Core, DiskChain};

/// How often it is tried to put chains back as they were.
const TAKE_BACK_TRIES: u32 = 3;

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
