//! A request's walk through the filters of a disk, as pure state machines.
//!
//! A [`Chain`] is the make-up of one disk's chain: which filter stands where, who is asked
//! for what, and what the guest is offered. A [`Flight`] is one request on its way through
//! a chain; it says what happens next and never does it. A [`Join`] puts the parts of a
//! request together that had to be cut. [`OnFailure`] and [`Recovery`] say what becomes of
//! requests, and of the filter host, when one fails. No syscalls, no clock, no locks, no unsafe.
//!
//! # Who upholds the rules of the chain
//!
//! The rules are those of the design, section "The rules of the chain".
//!
//! | rule | upheld by |
//! |---|---|
//! | 1 once down, once up, one completion | [`Flight`] |
//! | 2 watchers, nearest the store first | [`Flight`] |
//! | 3 who sees which data | [`SlotSpec::data_on_way_down`] and [`SlotSpec::data_on_way_up`] say it; the worker keeps the copies |
//! | 4 flush | nothing here waits: see below |
//! | 5 requests of a filter's own | [`Entry::Below`]; draining them is the worker's |
//! | 6 a new instance gets what the old one had | [`Flight::handle_restart`]; the order is the worker's |
//! | 7 hold and cancel | [`Flight`] |
//! | 8 zeroes read as zeroes | [`Chain::route`] |
//! | 9 events between requests | the worker |
//! | 10 capabilities only narrow | [`Chain::info`] |
//!
//! **Flush (rule 4).** A flush promises the durability of what had *completed* before it
//! was submitted, never of what is in flight beside it; so it needs to wait for no other
//! flight, and walks down like any request. A write that completed was completed by the
//! store, whose own flush then covers it, or answered by a filter: and [`SlotSpec::check`]
//! refuses a filter that answers writes and does not handle flushes.
//!
//! # What a filter that decides data must handle
//!
//! A filter with `changes` or `answers` *decides data* ([`SlotSpec::decides_data`]): what
//! the disk holds is what comes out above it. An operation that such a filter does not
//! handle is never slipped past it:
//!
//! * **read, write**: without them there is no disk to offer, and a filter that changes
//!   writes but lets reads by would hand its own work to the guest undone. So a filter that
//!   decides data and does not handle both is refused ([`SpecError::BlindTo`]). Handling
//!   costs its author one line: pass.
//! * **write-zeroes**: done with writes of zeroes through the whole chain
//!   ([`Route::AsWrites`]), which each such filter handles.
//! * **discard**: withheld. Zeroes could be written instead, but a guest discards a whole
//!   disk when it makes a file system: that would fill a thin image.
//! * **flush**: passes by. It carries no data and changes none; only a filter that
//!   *answers* what changes the disk owes durability, and must handle flush.
//!
//! A filter that does handle write-zeroes or discard sees to it itself that the range
//! reads as zeroes above it (rule 8), as it does for what a read gives after a write.
#![forbid(unsafe_code)]

mod chain;
mod change;
mod class;
#[cfg(test)]
mod examples;
mod flight;
mod outline;
mod policy;
mod recovery;
mod slot;
mod split;
mod verdict;

pub use chain::{Chain, ChainError, Entry, Generation, Route};
pub use change::{Change, ChangeEnd, ChangeStep, FailedAt};
pub use class::Class;
pub use flight::{Action, Flight, Step};
pub use outline::{Outline, Present};
pub use policy::{OnFailure, PolicyError, default_deadline_ms};
pub use recovery::{Failed, Health, Recovery, RecoveryPolicy};
pub use slot::{DataAccess, SLOTS_MAX, SlotIndex, SlotSet, SlotSpec, SpecError};
pub use split::{Chunks, Join};
pub use verdict::{Verdict, Violation};
