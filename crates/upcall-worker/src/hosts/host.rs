//! A host that is watched: where it is between its lives, and how that is shown.

use std::sync::Arc;

use upcall_chain::{Health, OnFailure, Recovery, RecoveryPolicy};
use upcall_filterhost::{Counters, HostProcess, Placement};
use upcall_stats::Standing;

use super::{TrialEnds, Watched};
use crate::engine::Life;
use crate::recipe::Recipe;
use crate::share::Share;

/// Where a host is between two lives.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    /// Somebody else talks to it. It was to be killed meanwhile, for this.
    Lent {
        condemned: Option<String>,
    },
    /// It was killed, for this, and is not dead yet.
    Dying {
        reason: String,
    },
    /// It is dead; so many queue threads still wait for what it had issued.
    Quieting {
        left: usize,
    },
    /// It waits for its time.
    Waiting,
    SettingUp,
    Gone,
}

pub(super) struct Host {
    pub(super) recipe: Arc<Recipe>,
    pub(super) process: Option<HostProcess>,
    pub(super) life: Life,
    pub(super) phase: Phase,
    pub(super) recovery: Recovery,
    /// Of the processor, in this life.
    pub(super) share: Share,
    /// What it counts, and what its earlier lives had counted; by instance.
    pub(super) counters: Vec<(Counters, Vec<(String, u64)>)>,
    pub(super) failures: u64,
    /// When it failed, if it does not serve.
    pub(super) failed_ns: u64,
    pub(super) longest_stall_ns: u64,
    /// It is on trial.
    pub(super) trial: Option<TrialEnds>,
    /// It is not to be started now.
    pub(super) is_aside: bool,
}

impl Host {
    pub(super) fn new(watched: Watched, policy: RecoveryPolicy) -> Host {
        let Watched { recipe, process, counters } = watched;
        let share = Share::new(recipe.channels.len());
        Host {
            recipe,
            process: Some(process),
            life: Life::default(),
            phase: Phase::Serving,
            recovery: Recovery::new(policy),
            share,
            counters: counters.into_iter().map(|counters| (counters, Vec::new())).collect(),
            failures: 0,
            failed_ns: 0,
            longest_stall_ns: 0,
            trial: None,
            is_aside: false,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.recipe.description.name
    }

    /// Whether somebody waits for it to come back. One within the worker cannot: its code
    /// is still there.
    pub(super) fn is_needed(&self) -> bool {
        self.recipe.placement == Placement::Isolated
            && self.recipe.instances.iter().any(|given| given.on_failure != OnFailure::Detach)
    }

    /// Whether it waits for its time to be started.
    pub(super) fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting && self.trial.is_none() && !self.is_aside
    }

    /// Its disks and what becomes of their requests, for people.
    pub(super) fn consequences(&self) -> String {
        let of = |given: &crate::recipe::GivenInstance| {
            let what = match given.on_failure {
                _ if self.recipe.placement == Placement::Inline => "requests that need it fail",
                OnFailure::Hold => "requests wait for it",
                OnFailure::Bypass => "requests go past it, and what it misses is recorded",
                OnFailure::Fail => "requests that need it fail",
                OnFailure::Detach => "it has left the chain, and does not come back",
            };
            format!("disk {}: {what}", given.disk)
        };
        self.recipe.instances.iter().map(of).collect::<Vec<_>>().join("; ")
    }

    pub(super) fn standing(&self, on_failure: OnFailure) -> Standing {
        match (matches!(self.phase, Phase::Serving | Phase::Lent { .. }), on_failure) {
            (true, _) => Standing::Up,
            (_, OnFailure::Detach) => Standing::Detached,
            _ if self.recovery.health() == Health::Quarantined => Standing::Quarantined,
            (_, OnFailure::Bypass) => Standing::Bypassed,
            _ => Standing::Restarting,
        }
    }
}
