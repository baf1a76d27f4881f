//! Who runs the queues.

use crate::queue::{Stopped, VirtQueue};

/// Who runs the queues: the worker. All calls come from the thread that is in
/// [`serve_connection`](crate::serve_connection).
pub trait QueueHost {
    /// Rings are about to start, and none ran: may they? Blocks while another connection's
    /// rings run: two guests must not use a disk at once, and of one that reconnects the old
    /// connection must have ended. False: they never may, as the connection is about to end.
    fn claim(&mut self) -> bool {
        true
    }

    /// No ring runs any more, and the frontend knows: another connection's may start. Also
    /// called without a [`claim`](Self::claim).
    fn release(&mut self) {}

    /// A ring starts: serve it, on a thread of its own, from now on. Also when it broke:
    /// keep it until [`stop`](Self::stop).
    fn start(&mut self, index: u16, queue: VirtQueue);

    /// The ring `index`, which was started, stops. Blocks until everything that was taken
    /// from it is completed, and [finishes](VirtQueue::finish) it. The guest's memory may
    /// be gone for good once this returns, but for what the frontend still shares.
    fn stop(&mut self, index: u16) -> Stopped;

    /// What is written to the guest's memory is logged from now on, or no more: the frontend
    /// copies it elsewhere, as when a guest migrates.
    fn logging(&mut self, on: bool) {
        let _ = on;
    }

    /// The frontend is gone; the queues that run are stopped next. Nobody waits for answers
    /// any more: what is held up may be cancelled. Not called when we end the connection:
    /// then the guest still waits, and what was taken should end well.
    fn disconnected(&mut self) {}

    /// The guest has reset the device, and the frontend is still there; the queues that run
    /// are stopped next. As in [`disconnected`](Self::disconnected), nobody waits for
    /// answers.
    fn reset(&mut self) {
        self.disconnected();
    }
}
