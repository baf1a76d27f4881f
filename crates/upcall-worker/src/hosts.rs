//! The filter hosts of a worker, watched by one thread: it passes on what they log, shows
//! what they count, notices their death, and kills those that are given up.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use upcall_filterhost::{Counters, HostProcess};
use upcall_ring::Doorbell;
use upcall_stats::Page;

use crate::config::{LogLevel, LogSink};
use crate::engine::Command;

/// A filter host of this worker: its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostId(pub(crate) usize);

/// Has a filter host killed; says why.
pub(crate) type GiveUp = Arc<dyn Fn(HostId, &str) + Send + Sync>;

/// How often counters are shown.
const COUNTERS_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// A way to send commands to a queue thread and wake it.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    pub(crate) commands: Sender<Command>,
    pub(crate) wake: Doorbell,
}

impl EngineHandle {
    /// Sends a command; nothing happens if the thread has ended.
    pub(crate) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.wake.ring();
    }
}

/// What a filter counts, and where it is shown.
pub(crate) struct ShownCounters {
    pub(crate) hop: usize,
    pub(crate) counters: Counters,
}

enum Order {
    GiveUp(HostId, String),
    Return,
}

/// The thread that watches; see the module.
pub(crate) struct Supervisor {
    orders: Sender<Order>,
    wake: Doorbell,
    thread: Option<JoinHandle<Vec<HostProcess>>>,
}

impl Supervisor {
    pub(crate) fn start(
        hosts: Vec<HostProcess>,
        engines: Vec<EngineHandle>,
        shown: Vec<ShownCounters>,
        page: Arc<Page>,
        log: LogSink,
        orders: SupervisorOrders,
    ) -> std::io::Result<Supervisor> {
        let SupervisorOrders { sender, receiver, wake } = orders;
        let lost = vec![false; hosts.len()];
        let mut watch =
            Watch { hosts, lost, engines, shown, page, log, orders: receiver, wake: wake.clone() };
        let thread = std::thread::Builder::new().name("upcall-hosts".into()).spawn(move || {
            watch.run();
            watch.hosts
        })?;
        Ok(Supervisor { orders: sender, wake, thread: Some(thread) })
    }

    /// Ends the watch and gives the filter hosts back. Those that were lost are dead.
    pub(crate) fn stop(mut self) -> Vec<HostProcess> {
        self.end()
    }

    fn end(&mut self) -> Vec<HostProcess> {
        let _ = self.orders.send(Order::Return);
        self.wake.ring();
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

/// Dropping it ends the filter hosts.
impl Drop for Supervisor {
    fn drop(&mut self) {
        drop(self.end());
    }
}

/// Where orders to a supervisor go, made before it so that queue threads can have it.
pub(crate) struct SupervisorOrders {
    sender: Sender<Order>,
    receiver: Receiver<Order>,
    wake: Doorbell,
}

impl SupervisorOrders {
    pub(crate) fn new() -> std::io::Result<SupervisorOrders> {
        let (sender, receiver) = channel();
        Ok(SupervisorOrders { sender, receiver, wake: Doorbell::new()? })
    }

    /// What a queue thread calls to have a filter host killed.
    pub(crate) fn give_up(&self) -> GiveUp {
        let (sender, wake) = (self.sender.clone(), self.wake.clone());
        Arc::new(move |host, reason| {
            let _ = sender.send(Order::GiveUp(host, reason.to_owned()));
            wake.ring();
        })
    }
}

struct Watch {
    hosts: Vec<HostProcess>,
    lost: Vec<bool>,
    engines: Vec<EngineHandle>,
    shown: Vec<ShownCounters>,
    page: Arc<Page>,
    log: LogSink,
    orders: Receiver<Order>,
    wake: Doorbell,
}

impl Watch {
    fn run(&mut self) {
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::GiveUp(host, reason) => self.give_up(host, &reason),
                    Order::Return => {
                        self.show_counters();
                        return;
                    }
                }
            }
            let ready = self.wait();
            self.wake.clear();
            for host in ready {
                if let Err(error) = self.hosts[host].service() {
                    self.give_up(HostId(host), &error.to_string());
                } else if let Some(how) = self.hosts[host].exit_description() {
                    self.give_up(HostId(host), &how);
                }
            }
            self.show_counters();
        }
    }

    /// Waits for news; the hosts that have some.
    fn wait(&self) -> Vec<usize> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let mut whose = Vec::new();
        for (index, host) in self.hosts.iter().enumerate().filter(|(index, _)| !self.lost[*index]) {
            fds.push(PollFd::from_borrowed_fd(host.as_fd(), PollFlags::IN));
            whose.push(index);
            if let Some(pidfd) = host.pidfd() {
                fds.push(PollFd::from_borrowed_fd(pidfd, PollFlags::IN));
                whose.push(index);
            }
        }
        let timeout = if self.shown.is_empty() { None } else { Some(COUNTERS_EVERY) };
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return Vec::new();
        }
        let ready = fds[1..].iter().zip(whose).filter(|(fd, _)| !fd.revents().is_empty());
        let mut ready: Vec<usize> = ready.map(|(_, host)| host).collect();
        ready.dedup();
        ready
    }

    fn give_up(&mut self, host: HostId, reason: &str) {
        if std::mem::replace(&mut self.lost[host.0], true) {
            return;
        }
        let process = &mut self.hosts[host.0];
        process.kill();
        let name = process.name().to_owned();
        (self.log)(
            LogLevel::Error,
            &format!(
                "filter {name} is gone ({reason}): requests that need it fail until the disk is served anew"
            ),
        );
        for engine in &self.engines {
            engine.send(Command::HostLost(host));
        }
    }

    fn show_counters(&self) {
        for shown in &self.shown {
            self.page.show_counters(shown.hop, &shown.counters.snapshot());
        }
    }
}
