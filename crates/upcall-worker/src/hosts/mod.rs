//! The filter hosts of a worker, watched by one thread: it passes on what they log, shows
//! what they count, notices their death, kills those that are given up, and has those that
//! died started again.
//!
//! When and how often is decided by [`upcall_chain::Recovery`]; setting a host up, which runs the
//! filter's code and may take long, is done on a thread of its own, so that one filter that is slow
//! to start keeps nobody else waiting.
//!
//! Always true: a life of a host begins to be set up only when the process of the last one is
//! dead, and every queue thread has said that nothing which it had issued can come late.

mod host;
mod keeper;
mod watch;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use upcall_chain::RecoveryPolicy;
use upcall_filterhost::{Counters, HostProcess};
use upcall_ring::Doorbell;
use upcall_stats::Page;

use crate::config::LogSink;
use crate::engine::{Clock, Command, Life};
use crate::recipe::Recipe;
use host::Host;
use keeper::Order;
pub(crate) use keeper::{HostKeeper, TrialEnds};
use watch::Watch;

/// A filter host of this worker: its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostId(pub(crate) usize);

/// What queue threads tell the thread that watches.
pub(crate) enum HostNews {
    /// Kill this life of a filter host.
    GiveUp { host: HostId, life: Life, reason: String },
    /// Nothing that this life had issued, which is dead, can reach a store any more from here.
    Quiet { host: HostId, life: Life },
}

/// Tells the thread that watches; false if it has ended.
pub(crate) type TellHosts = Arc<dyn Fn(HostNews) -> bool + Send + Sync>;

/// A way to send commands to a queue thread and wake it.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    pub(crate) commands: Sender<Command>,
    pub(crate) wake: Doorbell,
}

impl EngineHandle {
    /// Sends a command; false, and nothing happens, if the thread has ended.
    pub(crate) fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        self.wake.ring();
        sent
    }
}

/// A filter host that serves, to be watched.
pub(crate) struct Watched {
    pub(crate) recipe: Arc<Recipe>,
    pub(crate) process: HostProcess,
    /// By instance.
    pub(crate) counters: Vec<Counters>,
}

/// A host that is watched no longer, and the numbers of its instances.
pub(crate) type Stopped = (HostProcess, Vec<u32>);

/// The thread that watches; see the module.
pub(crate) struct Supervisor {
    orders: Sender<Order>,
    wake: Doorbell,
    thread: Option<JoinHandle<Vec<Stopped>>>,
}

impl Supervisor {
    pub(crate) fn start(
        hosts: Vec<Watched>,
        engines: Vec<EngineHandle>,
        policy: RecoveryPolicy,
        page: Arc<Page>,
        log: LogSink,
        orders: SupervisorOrders,
    ) -> std::io::Result<Supervisor> {
        let SupervisorOrders { sender, receiver, wake } = orders;
        let hosts = hosts.into_iter().enumerate();
        let hosts = hosts.map(|(id, host)| (HostId(id), Host::new(host, policy))).collect();
        let mut watch = Watch {
            hosts,
            engines,
            page,
            log,
            orders: receiver,
            sender: sender.clone(),
            wake: wake.clone(),
            clock: Clock::default(),
            policy,
        };
        let thread = std::thread::Builder::new().name("upcall-hosts".into()).spawn(move || {
            watch.run();
            let hosts = watch.hosts.into_values();
            hosts.filter_map(|host| Some((host.process?, host.recipe.instance_numbers()))).collect()
        })?;
        Ok(Supervisor { orders: sender, wake, thread: Some(thread) })
    }

    /// Ends the watch and gives the filter hosts back that are there, with the numbers of their
    /// instances.
    pub(crate) fn stop(mut self) -> Vec<Stopped> {
        self.end()
    }

    /// For chain changes.
    pub(crate) fn keeper(&self) -> HostKeeper {
        HostKeeper { orders: self.orders.clone(), wake: self.wake.clone() }
    }

    fn end(&mut self) -> Vec<Stopped> {
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

    /// What a queue thread tells its news by.
    pub(crate) fn tell(&self) -> TellHosts {
        let (sender, wake) = (self.sender.clone(), self.wake.clone());
        Arc::new(move |news| {
            let is_told = sender.send(Order::News(news)).is_ok();
            wake.ring();
            is_told
        })
    }
}
