//! What a seed makes: the disks, the chains, the load, and what will go wrong.
//!
//! Each world has a few kinds of faults and not the others, so that rare combinations are
//! not drowned by the ones that end everything.

use upcall_chain::{OnFailure, RecoveryPolicy};

use crate::filters::Role;
use crate::medium::Canary;
use crate::random::Random;

/// One disk.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// In the order of the chain; with what becomes of requests while it is gone.
    pub roles: Vec<(Role, OnFailure)>,
    pub rings: usize,
    pub ring_size: u16,
    pub packed: bool,
    pub event_idx: bool,
    /// Each write is durable when it completes.
    pub write_through: bool,
    /// Sectors that the guest sees.
    pub sectors: usize,
}

/// How often each kind of fault begins, per million steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub filter_death: u64,
    pub filter_hang: u64,
    pub filter_nonsense: u64,
    pub broken_ring: u64,
    pub guest_reset: u64,
    pub ring_stop: u64,
    pub slow_store: u64,
    pub failing_store: u64,
    pub power_cut: u64,
    /// At a store to shared memory, or between two turns.
    pub worker_death: u64,
    /// The guest begins to move to another host.
    pub migration: u64,
    /// Not a fault, but among them.
    pub chain_change: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Plan {
    pub disks: Vec<DiskPlan>,
    /// By role.
    policies: [OnFailure; Role::ALL.len()],
    /// One filter host for all disks that have the same filter.
    pub shares_hosts: bool,
    /// Steps with faults.
    pub steps: usize,
    /// Requests, in a thousand, that need not keep off those in flight.
    pub overlaps: u64,
    /// Entries of the rings to filter hosts, pages of an arena.
    pub entries: u32,
    pub pages: usize,
    /// How long a filter may have a request; 0: as long as it likes.
    pub deadline_ms: u64,
    pub recovery: RecoveryPolicy,
    pub faults: Faults,
}

impl Plan {
    pub fn new(random: &mut Random) -> Plan {
        // By role, for a host that is shared has one policy here.
        let policies = Role::ALL.map(|role| policy(role, random));
        let disks = (0..random.pick(&[1, 1, 1, 2])).map(|_| disk(random, &policies)).collect();
        let shares_hosts = random.one_in(2);
        let mut faults = Faults::default();
        let rate = |random: &mut Random, most: u64| match random.one_in(3) {
            true => random.range(most / 10, most),
            false => 0,
        };
        if !random.one_in(10) {
            faults.filter_death = rate(random, 20_000);
            faults.filter_hang = rate(random, 2_000);
            faults.filter_nonsense = rate(random, 2_000);
            faults.broken_ring = rate(random, 400);
            faults.guest_reset = rate(random, 800);
            faults.ring_stop = rate(random, 1200);
            faults.slow_store = rate(random, 1000);
            faults.failing_store = rate(random, 800);
            faults.power_cut = rate(random, 400);
            faults.worker_death = rate(random, 1500);
        }
        faults.chain_change = if random.one_in(2) { random.range(300, 4_000) } else { 0 };
        // A filter that hangs is only noticed by its deadline.
        let deadline_ms = match faults.filter_hang {
            0 => random.pick(&[0, 20, 1_000]),
            _ => random.pick(&[5, 20, 100]),
        };
        let recovery = RecoveryPolicy {
            backoff_ms_min: random.pick(&[1, 10]),
            failures_max: random.pick(&[2, 5, 1_000]),
            ..RecoveryPolicy::default()
        };
        Plan {
            deadline_ms,
            recovery,
            disks,
            policies,
            shares_hosts,
            steps: random.range(1_000, 8_000) as usize,
            overlaps: random.pick(&[0, 0, 100, 500, 1000]),
            entries: random.pick(&[4, 16, 64]),
            pages: random.pick(&[8, 16, 100]),
            faults,
        }
    }

    /// Whether and how often the guest moves.
    pub fn draw_migrations(&mut self, random: &mut Random) {
        if random.one_in(3) {
            self.faults.migration = random.range(200, 3000);
        }
    }

    /// What becomes of a filter's requests while it is gone, wherever it is.
    pub fn policy_of(&self, role: Role) -> OnFailure {
        self.policies[Role::ALL.iter().position(|other| *other == role).unwrap_or(0)]
    }

    /// Makes sure that what the canary does can matter.
    pub fn suit(&mut self, canary: Canary) {
        match canary {
            Canary::HideError => self.faults.failing_store = 1000,
            Canary::LieAboutFlush => {
                self.faults.power_cut = 1500;
                self.disks.iter_mut().for_each(|disk| disk.write_through = false);
            }
            _ => {}
        }
    }
}

fn policy(role: Role, random: &mut Random) -> OnFailure {
    let possible = |policy: &OnFailure| policy.check(&role.spec()).is_ok();
    let possible: Vec<OnFailure> = OnFailure::ALL.into_iter().filter(possible).collect();
    if random.one_in(2) { OnFailure::Hold } else { random.pick(&possible) }
}

fn disk(random: &mut Random, policies: &[OnFailure]) -> DiskPlan {
    let roles = match random.below(8) {
        0 => Vec::new(),
        1 => vec![random.pick(&Role::ALL)],
        _ => {
            let often = random.range(2, 5);
            Role::ALL.into_iter().filter(|_| random.one_in(often)).collect()
        }
    };
    let policy = |role: &Role| policies[Role::ALL.iter().position(|r| r == role).unwrap_or(0)];
    DiskPlan {
        roles: roles.into_iter().map(|role| (role, policy(&role))).collect(),
        rings: random.pick(&[1, 1, 2, 3]),
        ring_size: random.pick(&[16, 32, 64]),
        packed: random.one_in(2),
        event_idx: random.one_in(2),
        write_through: random.one_in(4),
        sectors: random.pick(&[32, 64, 256]),
    }
}
