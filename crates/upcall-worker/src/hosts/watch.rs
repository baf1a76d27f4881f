//! The watch itself, over all hosts.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use upcall_chain::{Failed, RecoveryPolicy};
use upcall_filterhost::{HostProcess, Placement};
use upcall_ring::Doorbell;
use upcall_stats::{FilterHealth, Page};

use super::host::{Host, Phase};
use super::keeper::Order;
use super::{EngineHandle, HostId, HostNews};
use crate::config::{LogLevel, LogSink};
use crate::engine::{Clock, Command, Life};
use crate::error::StartError;
use crate::recipe::{Recipe, SetUp};
use crate::share::{Share, Weight};

/// How often counters are shown.
const COUNTERS_EVERY: Duration = Duration::from_millis(500);
const NS: u64 = 1_000_000_000;

pub(super) struct Watch {
    pub(super) hosts: BTreeMap<HostId, Host>,
    pub(super) engines: Vec<EngineHandle>,
    pub(super) page: Arc<Page>,
    pub(super) log: LogSink,
    pub(super) orders: Receiver<Order>,
    pub(super) sender: Sender<Order>,
    pub(super) wake: Doorbell,
    pub(super) clock: Clock,
    pub(super) policy: RecoveryPolicy,
}

impl Watch {
    /// Whether this life of a host is the one that there is.
    fn is_current(&self, host: HostId, life: Life) -> bool {
        self.hosts.get(&host).is_some_and(|host| host.life == life)
    }

    pub(super) fn run(&mut self) {
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::News(HostNews::GiveUp { host, life, reason }) => {
                        if self.is_current(host, life) {
                            self.give_up(host, &reason);
                        }
                    }
                    Order::News(HostNews::Quiet { host, life }) => {
                        if self.is_current(host, life) {
                            self.hear_quiet(host);
                        }
                    }
                    Order::SetUp(host, result) => self.hear_set_up(host, *result),
                    Order::Lend(host, reply) => drop(reply.send(self.lend(host))),
                    Order::GiveBack(host, process) => self.take_back(host, *process),
                    Order::SetAside(host, reply) => drop(reply.send(self.set_aside(host))),
                    Order::Release(host) => {
                        if let Some(host) = self.hosts.get_mut(&host) {
                            host.is_aside = false;
                        }
                    }
                    Order::Adopt(id, watched, trial) => {
                        let host = Host { trial, ..Host::new(*watched, self.policy) };
                        self.hosts.insert(id, host);
                    }
                    Order::Amend(host, recipe) => self.amend(host, recipe),
                    Order::EndTrial(host) => {
                        if let Some(host) = self.hosts.get_mut(&host) {
                            host.trial = None;
                        }
                    }
                    Order::Forget(host, reply) => {
                        let process = self.hosts.remove(&host).and_then(|host| host.process);
                        // Nobody takes it: then it dies here.
                        let _ = reply.send(process);
                    }
                    Order::Return => {
                        self.show();
                        return;
                    }
                }
            }
            self.start_due();
            let ready = self.wait();
            self.wake.clear();
            for host in ready {
                self.look_at(host);
            }
            self.weigh();
            self.show();
        }
    }

    /// Waits for news; the hosts that have some.
    fn wait(&self) -> Vec<HostId> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let mut whose = Vec::new();
        for (index, host) in &self.hosts {
            let Some(process) = &host.process else { continue };
            // One that is to die has nothing more to say.
            if host.phase == Phase::Serving {
                fds.push(PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN));
                whose.push(*index);
            }
            if let Some(pidfd) = process.pidfd() {
                fds.push(PollFd::from_borrowed_fd(pidfd, PollFlags::IN));
                whose.push(*index);
            }
        }
        if poll(&mut fds, self.timeout().as_ref()).is_err() {
            return Vec::new();
        }
        let ready = fds[1..].iter().zip(whose).filter(|(fd, _)| !fd.revents().is_empty());
        let mut ready: Vec<HostId> = ready.map(|(_, host)| host).collect();
        ready.dedup();
        ready
    }

    fn timeout(&self) -> Option<Timespec> {
        let counted = self.hosts.values().any(|host| !host.counters.is_empty());
        let waiting = self.hosts.values().filter(|host| host.is_waiting());
        let start_ns = waiting.filter_map(|host| host.recovery.start_at_ns()).min();
        let left_ns = start_ns.map(|at_ns| at_ns.saturating_sub(self.clock.now_ns()));
        let counted_ns = counted.then_some(COUNTERS_EVERY.as_nanos() as u64);
        let least_ns = left_ns.into_iter().chain(counted_ns).min()?;
        Some(Timespec { tv_sec: (least_ns / NS) as i64, tv_nsec: (least_ns % NS) as _ })
    }

    /// A host has something to say, or has died.
    fn look_at(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let Some(process) = &mut host.process else { return };
        let complaint = match host.phase {
            Phase::Serving => process.service().err(),
            _ => None,
        };
        match (process.exit_description(), complaint) {
            (Some(how), _) => self.bury(id, &how),
            (None, Some(error)) => self.give_up(id, &error.to_string()),
            (None, None) => {}
        }
    }

    /// Kills a host. What follows, follows when it is dead.
    fn give_up(&mut self, id: HostId, reason: &str) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if let Phase::Lent { condemned } = &mut host.phase {
            condemned.get_or_insert_with(|| reason.to_owned());
            return;
        }
        let (Phase::Serving, Some(process)) = (&host.phase, &mut host.process) else { return };
        process.kill();
        host.phase = Phase::Dying { reason: reason.to_owned() };
        if host.recipe.placement == Placement::Inline {
            // It cannot be killed, nor can it come back.
            self.bury(id, reason);
        }
    }

    /// Lets somebody else talk to a host that serves.
    fn lend(&mut self, id: HostId) -> Option<HostProcess> {
        let host = self.hosts.get_mut(&id)?;
        if host.phase != Phase::Serving {
            return None;
        }
        host.phase = Phase::Lent { condemned: None };
        host.process.take()
    }

    fn set_aside(&mut self, id: HostId) -> bool {
        let Some(host) = self.hosts.get_mut(&id) else { return true };
        host.is_aside = matches!(host.phase, Phase::Quieting { .. } | Phase::Waiting | Phase::Gone);
        host.is_aside
    }

    fn take_back(&mut self, id: HostId, process: HostProcess) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let Phase::Lent { condemned } = std::mem::replace(&mut host.phase, Phase::Serving) else {
            return;
        };
        host.process = Some(process);
        match condemned {
            Some(reason) => self.give_up(id, &reason),
            None => self.look_at(id),
        }
    }

    /// A host that is lent has fewer instances than before.
    fn amend(&mut self, id: HostId, recipe: Arc<Recipe>) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let counters = std::mem::take(&mut host.counters);
        let counted = host.recipe.instance_numbers().into_iter().zip(counters);
        let stays = recipe.instance_numbers();
        host.counters =
            counted.filter(|(instance, _)| stays.contains(instance)).map(|(_, c)| c).collect();
        host.recipe = recipe;
    }

    /// A host is dead: the queue threads are told, and it is started again in time.
    fn bury(&mut self, id: HostId, how: &str) {
        let now_ns = self.clock.now_ns();
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let how = match std::mem::replace(&mut host.phase, Phase::Gone) {
            Phase::Dying { reason } => reason,
            _ => how.to_owned(),
        };
        if host.recipe.placement == Placement::Isolated {
            host.process = None;
        }
        host.failures += 1;
        host.failed_ns = now_ns;
        let is_needed = host.is_needed() || host.trial.is_some();
        let failed = host.recovery.handle_failure(now_ns, is_needed);
        let is_for_good = failed == Failed::Gone;
        let (life, mut left) = (host.life, 0);
        for given in &host.recipe.channels {
            let lost = Command::HostLost { host: id, life, is_for_good };
            left += usize::from(self.engines[given.engine].send(lost));
        }
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.phase = match (is_for_good, left) {
            (true, _) => Phase::Gone,
            (false, 0) => Phase::Waiting,
            (false, left) => Phase::Quieting { left },
        };
        if let Some(trial) = &host.trial {
            let _ = trial.send((id, how));
            return;
        }
        self.say_failed(id, &format!("is gone ({how})"), failed);
    }

    fn say_failed(&self, id: HostId, what: &str, failed: Failed) {
        let Some(host) = self.hosts.get(&id) else { return };
        let (name, then) = (host.name(), host.consequences());
        match failed {
            Failed::Restart { after_ms } => (self.log)(
                LogLevel::Warn,
                &format!("filter {name} {what}: it is started again in {after_ms} ms. {then}"),
            ),
            Failed::Alarm { after_ms } => (self.log)(
                LogLevel::Error,
                &format!(
                    "filter {name} {what}, for the {}th time, and is quarantined: it is tried \
                     every {} s. {then}. See what it logged, and replace it or take it out of \
                     the chain",
                    host.failures,
                    after_ms / 1000
                ),
            ),
            Failed::Gone => {
                (self.log)(LogLevel::Error, &format!("filter {name} {what}. {then}"));
            }
        }
    }

    /// A queue thread has ended what a dead host had issued.
    fn hear_quiet(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if let Phase::Quieting { left } = &mut host.phase {
            *left -= 1;
            if *left == 0 {
                host.phase = Phase::Waiting;
            }
        }
    }

    /// Has those hosts set up whose time has come.
    fn start_due(&mut self) {
        let now_ns = self.clock.now_ns();
        let ids: Vec<HostId> = self.hosts.keys().copied().collect();
        for id in ids {
            let Some(host) = self.hosts.get_mut(&id) else { continue };
            if !host.is_waiting() || !host.recovery.poll_start(now_ns) {
                continue;
            }
            host.phase = Phase::SettingUp;
            let (recipe, sender, wake) =
                (host.recipe.clone(), self.sender.clone(), self.wake.clone());
            let thread =
                std::thread::Builder::new().name("filter-restart".into()).spawn(move || {
                    // Nobody listens any more: then it is dropped here, and dies.
                    let _ = sender.send(Order::SetUp(id, Box::new(recipe.again())));
                    wake.ring();
                });
            if let Err(source) = thread {
                let error =
                    StartError::System { disk: String::new(), what: "start a thread", source };
                self.hear_set_up(id, Err(error));
            }
        }
    }

    /// A host serves again, or could not be set up.
    fn hear_set_up(&mut self, id: HostId, result: Result<(HostProcess, SetUp), StartError>) {
        let now_ns = self.clock.now_ns();
        // One that has left the chain is dropped here, and dies.
        let Some(host) = self.hosts.get_mut(&id) else { return };
        let (process, set_up) = match result {
            Ok(whole) => whole,
            Err(error) => {
                host.failures += 1;
                let failed = host.recovery.handle_failure(now_ns, host.is_needed());
                host.phase = Phase::Waiting;
                self.say_failed(id, &format!("cannot be started again ({error})"), failed);
                return;
            }
        };
        host.process = Some(process);
        host.life = Life(host.life.0 + 1);
        host.share = Share::new(host.recipe.channels.len());
        host.phase = Phase::Serving;
        host.recovery.handle_started();
        for ((counters, base), next) in host.counters.iter_mut().zip(set_up.counters) {
            let last = std::mem::replace(counters, next).snapshot();
            *base = added(std::mem::take(base), last);
        }
        let stall_ns = now_ns.saturating_sub(host.failed_ns);
        host.longest_stall_ns = host.longest_stall_ns.max(stall_ns);
        let life = host.life;
        for (given, way) in host.recipe.channels.iter().zip(set_up.ways) {
            let back = Command::HostBack { host: id, life, way: Box::new(way) };
            self.engines[given.engine].send(back);
        }
        (self.log)(
            LogLevel::Warn,
            &format!(
                "filter {} serves again, {} ms after it failed",
                host.name(),
                stall_ns / 1_000_000
            ),
        );
    }

    /// Has those give way that take more than their share of the processor.
    fn weigh(&mut self) {
        let now_ns = self.clock.now_ns();
        for host in self.hosts.values_mut().filter(|host| host.phase == Phase::Serving) {
            let Some(process) = &mut host.process else { continue };
            let Some(wanted_ns) = process.wanted_ns() else { continue };
            let Some(weight) = host.share.look(now_ns, wanted_ns) else { continue };
            let changed = process.give_way(weight == Weight::Low);
            let (name, cores) = (host.name(), host.share.cores());
            match (weight, changed) {
                (Weight::Low, Ok(())) => (self.log)(
                    LogLevel::Warn,
                    &format!(
                        "filter {name} wants more of the processor than one core for each of its \
                         {cores} queues: it gives way to everybody else until it does not. Its \
                         disks may become slow"
                    ),
                ),
                (Weight::Low, Err(error)) => (self.log)(
                    LogLevel::Warn,
                    &format!(
                        "filter {name} wants more of the processor than one core for each of its \
                         {cores} queues, and cannot be made to give way ({error})"
                    ),
                ),
                (Weight::Full, Ok(())) => {
                    (self.log)(LogLevel::Info, &format!("filter {name} keeps to its share again"));
                }
                // Not allowed without a privilege: it gives way until its next life.
                (Weight::Full, Err(_)) => {}
            }
        }
    }

    fn show(&self) {
        for host in self.hosts.values() {
            for (given, (counters, base)) in host.recipe.instances.iter().zip(&host.counters) {
                let counted = added(base.clone(), counters.snapshot());
                self.page.show_counters(given.hop, &counted);
                let health = FilterHealth {
                    standing: host.standing(given.on_failure),
                    failures: host.failures,
                    longest_stall_ns: host.longest_stall_ns,
                };
                self.page.show_health(given.hop, &health);
            }
        }
    }
}

/// Counts of two lives, by name.
fn added(mut base: Vec<(String, u64)>, more: Vec<(String, u64)>) -> Vec<(String, u64)> {
    for (name, count) in more {
        match base.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum = sum.wrapping_add(count),
            None => base.push((name, count)),
        }
    }
    base
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_lives_of_a_filter_counted_adds_up() {
        let counts = |all: &[(&str, u64)]| -> Vec<(String, u64)> {
            all.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        let sum = added(counts(&[("a", 1), ("b", 2)]), counts(&[("b", 5), ("c", 7)]));
        assert_eq!(sum, counts(&[("a", 1), ("b", 7), ("c", 7)]));
    }
}
