//! What a chain change, and others, ask of the thread that watches.

use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};

use upcall_filterhost::HostProcess;
use upcall_ring::Doorbell;

use super::{HostId, HostNews, Watched};
use crate::error::StartError;
use crate::recipe::{Recipe, SetUp};

/// What the thread that watches is told.
pub(super) enum Order {
    News(HostNews),
    SetUp(HostId, Box<Result<(HostProcess, SetUp), StartError>>),
    SetAside(HostId, SyncSender<bool>),
    Release(HostId),
    Lend(HostId, SyncSender<Option<HostProcess>>),
    GiveBack(HostId, Box<HostProcess>),
    Adopt(HostId, Box<Watched>, Option<TrialEnds>),
    Amend(HostId, Arc<Recipe>),
    EndTrial(HostId),
    Forget(HostId, SyncSender<Option<HostProcess>>),
    Return,
}

/// Told when a host that is on trial has failed, and why.
pub(crate) type TrialEnds = Sender<(HostId, String)>;

/// What a chain change asks of the thread that watches. From any thread.
#[derive(Clone)]
pub(crate) struct HostKeeper {
    pub(super) orders: Sender<Order>,
    pub(super) wake: Doorbell,
}

impl HostKeeper {
    /// Takes a host away from the watch, to talk to it. None if it does not serve just now.
    /// It is to be [given back](Self::give_back): until then its death is not seen.
    pub(crate) fn lend(&self, host: HostId) -> Option<HostProcess> {
        let (reply, lent) = sync_channel(1);
        self.order(Order::Lend(host, reply));
        lent.recv().ok().flatten()
    }

    /// Gives a host back, which may have died or been killed meanwhile.
    pub(crate) fn give_back(&self, host: HostId, process: HostProcess) {
        self.order(Order::GiveBack(host, Box::new(process)));
    }

    /// Starts a host no more that does not serve, until it is [released](Self::release): another
    /// filter takes its slot's place, and of one slot no two instances are ever open. False if
    /// a process of it is there: it is being started just now, or is not dead yet.
    pub(crate) fn set_aside(&self, host: HostId) -> bool {
        let (reply, is_done) = sync_channel(1);
        self.order(Order::SetAside(host, reply));
        is_done.recv().unwrap_or(true)
    }

    /// A host that was set aside is started again in time, unless it is forgotten.
    pub(crate) fn release(&self, host: HostId) {
        self.order(Order::Release(host));
    }

    /// Watches another host from now on. One on trial is not started again when it fails;
    /// `trial` is told instead.
    pub(crate) fn adopt(&self, host: HostId, watched: Watched, trial: Option<TrialEnds>) {
        self.order(Order::Adopt(host, Box::new(watched), trial));
    }

    /// A host, which is lent, has another recipe from now on: some instances are closed.
    pub(crate) fn amend(&self, host: HostId, recipe: Arc<Recipe>) {
        self.order(Order::Amend(host, recipe));
    }

    /// A host is on trial no longer: it is started again when it fails or has failed.
    pub(crate) fn end_trial(&self, host: HostId) {
        self.order(Order::EndTrial(host));
    }

    /// Watches a host no longer, and gives it back if it is there. It is not started again.
    pub(crate) fn forget(&self, host: HostId) -> Option<HostProcess> {
        let (reply, forgotten) = sync_channel(1);
        self.order(Order::Forget(host, reply));
        forgotten.recv().ok().flatten()
    }

    fn order(&self, order: Order) {
        // Nobody watches any more: everything ends.
        let _ = self.orders.send(order);
        self.wake.ring();
    }
}
