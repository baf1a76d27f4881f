//! What may be asked of the chains of running disks, and what comes back.

use std::path::PathBuf;

use upcall_chain::{FailedAt, OnFailure};

use crate::config::SlotConfig;

/// A change of the chains of one or several disks: all of them change, or none.
#[derive(Clone, Debug)]
pub struct ChainChange {
    /// Each disk once.
    pub disks: Vec<DiskChange>,
    /// Check everything that can be checked beside the running chain, and change nothing.
    pub is_dry_run: bool,
    /// How long what is in flight may take to end, before the change is given up.
    pub drain_ms: u64,
    /// How long new filters are on trial.
    pub trial: Trial,
}

/// A filter that fails while it is on trial is taken back, and what was there before goes on
/// with its requests. It ends with whichever comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// So long; 0: there is none.
    pub ms: u64,
    /// So many requests have passed the filter.
    pub requests: u64,
}

impl Default for Trial {
    fn default() -> Trial {
        Trial { ms: 1000, requests: 1000 }
    }
}

impl ChainChange {
    /// How long a disk may stand still while what is in flight ends, unless told otherwise.
    pub const DRAIN_MS: u64 = 2000;

    /// A change of one disk, with the usual bounds.
    pub fn of(disk: impl Into<String>, edits: Vec<Edit>) -> ChainChange {
        ChainChange {
            disks: vec![DiskChange { disk: disk.into(), edits }],
            is_dry_run: false,
            drain_ms: ChainChange::DRAIN_MS,
            trial: Trial::default(),
        }
    }
}

/// What becomes of one disk's chain.
#[derive(Clone, Debug)]
pub struct DiskChange {
    /// The disk's name.
    pub disk: String,
    /// One after the other, carried out together.
    pub edits: Vec<Edit>,
}

/// One edit of a chain. A slot is named as the chain shows it (`xor-0`), or by its filter's name
/// if the disk has that filter once.
#[derive(Clone, Debug, PartialEq)]
pub enum Edit {
    /// Another filter. Its class and number decide its place.
    Attach(SlotConfig),
    /// It leaves the chain.
    Detach {
        /// Which slot.
        slot: String,
    },
    /// Another instance takes its place, and its state if both can save and load it: another
    /// file, or the same with other parameters.
    Replace {
        /// Which slot.
        slot: String,
        /// The shared object; None: the same file, as it was opened.
        filter: Option<PathBuf>,
        /// Parameters that change; those not named stay as they are.
        params: Vec<(String, String)>,
    },
    /// Its place among filters of its class, or what becomes of requests when it fails.
    Set {
        /// Which slot.
        slot: String,
        /// As [`SlotConfig::order`].
        order: Option<i32>,
        /// As [`SlotConfig::deadline_ms`].
        deadline_ms: Option<u64>,
        /// As [`SlotConfig::on_failure`].
        on_failure: Option<OnFailure>,
    },
}

/// What a change did, or would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// In the order of the request.
    pub disks: Vec<DiskChanged>,
    /// How long the disks stood still.
    pub pause_us: u64,
    /// Nothing was changed.
    pub is_dry_run: bool,
}

/// What a change did to one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskChanged {
    /// Its name.
    pub disk: String,
    /// Its generation from now on.
    pub generation: u64,
    /// Names of the slots, from the guest to the store.
    pub before: Vec<String>,
    /// Now.
    pub after: Vec<String>,
}

/// Why chains did not change. They are as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// Another change is on its way. Try again when it has ended.
    #[error("another change of this worker's chains is on its way: try again when it has ended")]
    Busy,
    /// The worker ends.
    #[error("the worker is ending")]
    Ending,
    /// There is no such disk.
    #[error("there is no disk {disk:?}; the disks are: {known}")]
    NoDisk {
        /// As asked for.
        disk: String,
        /// Those that there are.
        known: String,
    },
    /// There is no such slot, or several could be meant.
    #[error("disk {disk}: {slot:?} is {}; its slots are: {known}", if *.is_ambiguous { "more than one slot" } else { "no slot of its chain" })]
    NoSlot {
        /// The disk.
        disk: String,
        /// As asked for.
        slot: String,
        /// Several filters have that name.
        is_ambiguous: bool,
        /// Those that there are.
        known: String,
    },
    /// The chain that was asked for is not possible, or not while the disk is served.
    #[error("disk {disk}: {why}")]
    Refused {
        /// The disk.
        disk: String,
        /// Why, and what to do.
        why: String,
    },
    /// A step could not be carried out, and everything is as before.
    #[error("the chain is as it was: {why}")]
    RolledBack {
        /// How far the change had come.
        at: FailedAt,
        /// What happened, to which disk or filter.
        why: String,
    },
    /// The change was made and taken back, because a new filter failed while it was on trial.
    #[error("the chain is as it was before: filter {filter} failed while it was on trial ({why})")]
    TrialFailed {
        /// The filter's slot.
        filter: String,
        /// How it failed.
        why: String,
    },
    /// A new filter failed while it was on trial, and the change could not be taken back.
    #[error(
        "the chain has changed, but filter {filter} failed while it was on trial ({why}), and the \
         change cannot be taken back ({then}): its on-failure policy counts; replace or detach it"
    )]
    Stuck {
        /// The filter's slot.
        filter: String,
        /// How it failed.
        why: String,
        /// Why it cannot be taken back.
        then: String,
    },
}

/// A disk's chain, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct ChainView {
    /// The disk's name.
    pub disk: String,
    /// The number of this make-up.
    pub generation: u64,
    /// From the guest to the store.
    pub slots: Vec<SlotView>,
}

/// A slot, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotView {
    /// Its name on this disk.
    pub name: String,
    /// The filter's own name, version and vendor.
    pub filter: String,
    #[allow(missing_docs)]
    pub version: String,
    #[allow(missing_docs)]
    pub vendor: String,
    /// Its class.
    pub class: String,
    /// What becomes of requests when it fails.
    pub on_failure: OnFailure,
    /// 0: none.
    pub deadline_ms: u64,
    /// As it was asked for, and with its name: what begins the same chain anew.
    pub config: SlotConfig,
    /// Whether it decides what the disk holds.
    pub decides_data: bool,
    pub(crate) instance: u32,
}

/// A request in flight, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlightView {
    /// The queue thread that has it.
    pub queue: u16,
    /// What it does: read, write, ...
    pub op: String,
    #[allow(missing_docs)]
    pub offset_bytes: u64,
    #[allow(missing_docs)]
    pub length_bytes: u32,
    /// Where it is.
    pub place: Place,
    /// For how long it has been there.
    pub there_us: u64,
    /// Since it arrived.
    pub age_us: u64,
    /// A filter issued it, not the guest.
    pub is_issued: bool,
}

/// Where a request in flight is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// With this slot's filter.
    Filter {
        /// The slot's name.
        slot: String,
        /// The filter holds it.
        is_held: bool,
    },
    /// It waits for this slot's filter, which is gone.
    AwaitsFilter {
        /// The slot's name.
        slot: String,
    },
    /// With the store.
    Store,
    /// It waits for room for its data in the arena.
    AwaitsRoom,
}
