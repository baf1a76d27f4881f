//! What a filter's author writes.

use crate::{Completion, Errno, HoldId, Info, Instance, Param, Request, Verdict};

/// One filter on one disk. Its callbacks are called from several threads at once and must
/// not block. Dropping it closes it: when that happens no request is with the filter, and
/// those that it issued have ended.
pub trait Filter: Send + Sync + Sized + 'static {
    /// What the filter is.
    const INFO: Info;

    /// What the operator may set.
    const PARAMS: &'static [Param] = &[];

    /// What goes with a watched request, from `watch` to `io_done`. `()` if nothing.
    type Context: Send + 'static;

    /// Begins an instance. On an error the disk is not served; say why with
    /// [`error!`](crate::error!).
    fn open(instance: Instance) -> Result<Self, Errno>;

    /// A request on its way down.
    fn start_io<'a>(&self, request: Request<'a, Self>) -> Verdict<'a>;

    /// A watched request on its way up.
    fn io_done<'a>(&self, completion: Completion<'a, Self>) -> Verdict<'a> {
        completion.pass()
    }

    /// A request that the filter holds is no longer wanted: the guest was reset. Find it by
    /// [`Held::id`](crate::Held::id) and answer it soon, in any way: the answer only frees it.
    /// If it is not held any more, or another thread is about to answer it, there is
    /// nothing to do.
    fn cancel(&self, hold: HoldId) {
        let _ = hold;
    }

    /// Something happens to the disk. An error refuses it.
    fn event(&self, event: Event) -> Result<(), Errno> {
        let _ = event;
        Ok(())
    }

    /// What the instance keeps in memory and hands to the one that takes its place, when the
    /// filter is replaced while the disk is in use; at most
    /// [`STATE_MAX`](crate::STATE_MAX) bytes. No request is with the filter; if the replacement
    /// is given up, the same state comes back to another instance of this filter. None: there
    /// is nothing to hand over. An error: the filter is not replaced now.
    fn save_state(&self) -> Result<Option<Vec<u8>>, Errno> {
        Ok(None)
    }

    /// Takes over what an instance of this filter, of any version, handed over. Called after
    /// [`open`](Self::open) and before the first request, and not where there is nothing to take
    /// over. An error: the replacement is given up.
    fn load_state(&self, state: &[u8]) -> Result<(), Errno> {
        let _ = state;
        Ok(())
    }
}

/// Something that happens to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// No requests from here on, until [`Event::Unstun`].
    Stun,
    /// Requests come again.
    Unstun,
    /// The instance joins the chain of a disk that is in use.
    Attach,
    /// It leaves the chain, and nobody takes its place.
    Detach,
    /// The disk's guest moves to another host; what `save_state` gives next goes with it.
    MigrateOut,
    /// The guest has come from another host, or back from there.
    MigrateIn,
}
