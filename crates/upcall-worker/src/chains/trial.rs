//! The trial of new filters: whether they stand it.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::Core;
use super::request::*;
use crate::config::SlotConfig;
use crate::engine::Command;
use crate::hosts::HostId;

/// How often a trial's requests are counted.
const TRIAL_LOOK: Duration = Duration::from_millis(5);

/// A host on trial: its slot's name, disk, instance and hop.
pub(super) type TrialOf = (HostId, String, usize, u32, usize);

/// A change that was made.
pub(super) struct Done {
    pub(super) changed: Changed,
    pub(super) trial: Vec<TrialOf>,
    /// What each disk's chain was: names and terms, in the order of the configuration.
    pub(super) before: Vec<(usize, Vec<SlotConfig>)>,
}

impl Done {
    /// Waits until the trial has ended; a host that failed in it, and why.
    pub(super) fn stand_trial(
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

pub(super) fn end_trials(core: &Core, done: &Done) {
    for (host, _, disk, instance, _) in &done.trial {
        core.keeper.end_trial(*host);
        for engine in &core.disks[*disk].engines {
            engine.send(Command::EndTrial { instance: *instance });
        }
    }
}
