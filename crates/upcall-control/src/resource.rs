//! What goes over the socket. Units are at the end of names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use upcall_block::Op;
use upcall_stats::{HopSnapshot, OpCounts, bucket_floor_ns, bucket_of};
use upcall_worker as worker;
use utoipa::ToSchema;

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// Its process, as it knows itself: a namespace may give it another number.
    pub process: u32,
    /// Of Upcall.
    pub version: String,
}

/// A disk, its chain, and what passed each hop of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Whether this worker has it.
    pub state: DiskState,
    /// What the store is.
    pub store: String,
    #[allow(missing_docs)]
    pub capacity_bytes: u64,
    #[allow(missing_docs)]
    pub queues: u16,
    /// The number of the chain's make-up: each change makes it larger; each worker begins with 1.
    pub generation: u64,
    /// Its filters, from the guest to the store.
    pub chain: Vec<Slot>,
    /// The whole request, each filter, the store.
    pub hops: Vec<Hop>,
}

/// Whether a worker has a disk. Those that cannot move to another host it always has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// It has.
    Here,
    /// It has, and the guest is being migrated: its chain stays as it is.
    Leaving,
    /// The guest is elsewhere, or there is none: there is no chain, and nothing is counted.
    Waiting,
}

/// A filter's place on a disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Slot {
    /// Its name on this disk.
    pub name: String,
    /// The filter's own name.
    pub filter: String,
    #[allow(missing_docs)]
    pub version: String,
    #[allow(missing_docs)]
    pub vendor: String,
    /// Which part of the chain it belongs to.
    pub class: String,
    /// Its place within the class.
    pub order: i32,
    /// Its shared object.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Whether it decides what the disk holds.
    pub decides_data: bool,
    /// `hold`, `bypass`, `fail` or `detach`.
    pub on_failure: String,
    /// 0: none.
    pub deadline_ms: u64,
    /// As they were given.
    pub params: Vec<Param>,
}

/// A parameter of a filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Param {
    #[allow(missing_docs)]
    pub name: String,
    #[allow(missing_docs)]
    pub value: String,
}

/// What passed a hop since the worker's start, or since the filter came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Hop {
    /// `request`, the filter's name, or `store`.
    pub name: String,
    /// `request`, `filter` or `store`.
    pub kind: String,
    #[allow(missing_docs)]
    pub requests: u64,
    #[allow(missing_docs)]
    pub bytes: u64,
    #[allow(missing_docs)]
    pub errors: u64,
    /// The time that requests spent here, all together.
    pub time_ns: u64,
    /// The same by operation: those of which there were any.
    pub ops: Vec<OpCount>,
    /// Here now.
    pub in_flight: u64,
    /// Rules that the filter broke.
    pub violations: u64,
    /// Requests delivered again after a failure.
    pub retries: u64,
    /// Requests that went past the filter while it was gone.
    pub skipped: u64,
    /// `up`, `restarting`, `bypassed`, `quarantined` or `detached`.
    pub state: String,
    /// How often the filter failed.
    pub failures: u64,
    #[allow(missing_docs)]
    pub longest_stall_ns: u64,
    #[allow(missing_docs)]
    pub p50_ns: Option<u64>,
    #[allow(missing_docs)]
    pub p99_ns: Option<u64>,
    #[allow(missing_docs)]
    pub p999_ns: Option<u64>,
    /// How long requests were here: those buckets that are not empty.
    pub latency: Vec<Bucket>,
    /// The filter's own.
    pub counters: Vec<Counter>,
}

/// What passed of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OpCount {
    /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
    pub op: String,
    #[allow(missing_docs)]
    pub requests: u64,
    #[allow(missing_docs)]
    pub bytes: u64,
    #[allow(missing_docs)]
    pub errors: u64,
    #[allow(missing_docs)]
    pub time_ns: u64,
}

/// A part of a histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bucket {
    /// All requests in it took less.
    pub below_ns: u64,
    #[allow(missing_docs)]
    pub requests: u64,
}

/// A counter of a filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counter {
    #[allow(missing_docs)]
    pub name: String,
    #[allow(missing_docs)]
    pub value: u64,
}

/// A request that is in flight now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InFlight {
    #[allow(missing_docs)]
    pub queue: u16,
    /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
    pub op: String,
    #[allow(missing_docs)]
    pub offset_bytes: u64,
    #[allow(missing_docs)]
    pub length_bytes: u32,
    /// `filter` (which has it), `held` (a filter holds it), `awaits-filter` (which is gone),
    /// `store`, or `awaits-room` (for its data).
    pub place: String,
    /// The filter's slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// For how long it has been there.
    pub there_us: u64,
    /// Since it arrived.
    pub age_us: u64,
    /// A filter issued it, not the guest.
    pub is_issued: bool,
}

/// A change of chains: all disks that it names change, or none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Each disk once.
    pub disks: Vec<DiskChange>,
    /// Check, say what would be, and change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// How long what is in flight may take to end (2000).
    pub drain_ms: Option<u64>,
    /// How long new filters are on trial (1000); 0: there is no trial.
    pub trial_ms: Option<u64>,
    /// How many requests end the trial (1000).
    pub trial_requests: Option<u64>,
}

/// What becomes of one disk's chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskChange {
    /// The disk's name.
    pub disk: String,
    /// Carried out together. Each slot is named once.
    pub edits: Vec<Edit>,
}

/// One edit of a chain. A slot is named as the chain shows it, or by its filter if that is there
/// once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "edit", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Edit {
    /// Another filter.
    Attach {
        /// Its shared object.
        #[schema(value_type = String)]
        file: PathBuf,
        /// What it is called on this disk (its own name and a number).
        name: Option<String>,
        /// Its place within its class (0).
        order: Option<i32>,
        /// In the worker instead of a process of its own.
        #[serde(default)]
        inline: bool,
        /// 0: none. (What is usual for its class.)
        deadline_ms: Option<u64>,
        /// `hold`, `bypass`, `fail` or `detach`. (What is usual for its class.)
        on_failure: Option<String>,
        /// Private memory of its process.
        memory_bytes: Option<u64>,
        /// Parameters.
        #[serde(default)]
        params: Vec<Param>,
    },
    /// A filter leaves.
    Detach {
        /// Which slot.
        slot: String,
    },
    /// Another instance takes a filter's place, and its state.
    Replace {
        /// Which slot.
        slot: String,
        /// Another shared object. (The same file, as it was opened.)
        #[schema(value_type = Option<String>)]
        file: Option<PathBuf>,
        /// Parameters that change.
        #[serde(default)]
        params: Vec<Param>,
    },
    /// A slot's place or policy.
    Set {
        /// Which slot.
        slot: String,
        /// Its place within its class.
        order: Option<i32>,
        /// 0: none.
        deadline_ms: Option<u64>,
        /// `hold`, `bypass`, `fail` or `detach`.
        on_failure: Option<String>,
    },
}

/// What a change did, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Changed {
    /// In the order of the request.
    pub disks: Vec<DiskChanged>,
    /// How long the disks stood still.
    pub pause_us: u64,
    /// Nothing was changed.
    pub dry_run: bool,
}

/// What a change did to one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskChanged {
    #[allow(missing_docs)]
    pub disk: String,
    #[allow(missing_docs)]
    pub generation: u64,
    /// The slots, from the guest to the store.
    pub before: Vec<String>,
    #[allow(missing_docs)]
    pub after: Vec<String>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts the worker's events; one that is missing was dropped.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `error`, `warning`, `info` or `debug`.
    pub level: String,
    #[allow(missing_docs)]
    pub text: String,
}

// -------------------------------------------------------------- from and to the worker's own

impl Disk {
    pub(crate) fn new(
        summary: &worker::DiskSummary,
        state: DiskState,
        chain: &worker::ChainView,
        hops: &[HopSnapshot],
    ) -> Disk {
        let own = hops.iter().filter(|hop| hop.disk == summary.name);
        Disk {
            state,
            generation: chain.generation,
            chain: chain.slots.iter().map(Slot::new).collect(),
            hops: own.map(Hop::new).collect(),
            ..Disk::waiting(summary)
        }
    }

    pub(crate) fn waiting(summary: &worker::DiskSummary) -> Disk {
        Disk {
            name: summary.name.clone(),
            state: DiskState::Waiting,
            store: summary.store.clone(),
            capacity_bytes: summary.info.capacity,
            queues: summary.queues,
            generation: 0,
            chain: Vec::new(),
            hops: Vec::new(),
        }
    }
}

impl Slot {
    fn new(view: &worker::SlotView) -> Slot {
        let param =
            |(name, value): &(String, String)| Param { name: name.clone(), value: value.clone() };
        Slot {
            name: view.name.clone(),
            filter: view.filter.clone(),
            version: view.version.clone(),
            vendor: view.vendor.clone(),
            class: view.class.clone(),
            order: view.config.order,
            file: view.config.filter.clone(),
            decides_data: view.decides_data,
            on_failure: view.on_failure.to_string(),
            deadline_ms: view.deadline_ms,
            params: view.config.params.iter().map(param).collect(),
        }
    }
}

impl Hop {
    pub(crate) fn new(hop: &HopSnapshot) -> Hop {
        let (block, total) = (&hop.block, hop.block.total());
        let buckets = block.latency.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        Hop {
            name: hop.name.clone(),
            kind: hop.kind.name().to_owned(),
            requests: total.requests,
            bytes: total.bytes,
            errors: total.errors,
            time_ns: total.time_ns,
            ops: Op::ALL
                .into_iter()
                .map(|op| (op, &block.ops[op as usize]))
                .filter(|(_, counts)| **counts != OpCounts::default())
                .map(|(op, counts)| OpCount::new(op, counts))
                .collect(),
            in_flight: block.now,
            violations: block.violations,
            retries: block.retries,
            skipped: block.skipped,
            state: hop.health.standing.name().to_owned(),
            failures: hop.health.failures,
            longest_stall_ns: hop.health.longest_stall_ns,
            p50_ns: block.latency.quantile_ns(0.5),
            p99_ns: block.latency.quantile_ns(0.99),
            p999_ns: block.latency.quantile_ns(0.999),
            latency: buckets
                .map(|(bucket, count)| Bucket {
                    below_ns: match bucket < bucket_of(u64::MAX) {
                        true => bucket_floor_ns(bucket + 1),
                        false => u64::MAX,
                    },
                    requests: *count,
                })
                .collect(),
            counters: hop
                .counters
                .iter()
                .map(|(name, value)| Counter { name: name.clone(), value: *value })
                .collect(),
        }
    }
}

impl OpCount {
    fn new(op: Op, counts: &OpCounts) -> OpCount {
        let OpCounts { requests, bytes, errors, time_ns } = *counts;
        OpCount { op: op.name().to_owned(), requests, bytes, errors, time_ns }
    }
}

impl InFlight {
    pub(crate) fn new(view: &worker::InFlightView) -> InFlight {
        let (place, slot) = match &view.place {
            worker::Place::Filter { slot, is_held: true } => ("held", Some(slot)),
            worker::Place::Filter { slot, is_held: false } => ("filter", Some(slot)),
            worker::Place::AwaitsFilter { slot } => ("awaits-filter", Some(slot)),
            worker::Place::Store => ("store", None),
            worker::Place::AwaitsRoom => ("awaits-room", None),
        };
        InFlight {
            queue: view.queue,
            op: view.op.clone(),
            offset_bytes: view.offset_bytes,
            length_bytes: view.length_bytes,
            place: place.to_owned(),
            slot: slot.cloned(),
            there_us: view.there_us,
            age_us: view.age_us,
            is_issued: view.is_issued,
        }
    }
}

impl Change {
    /// As the worker takes it; an error says what makes no sense.
    pub(crate) fn to_worker(&self) -> Result<worker::ChainChange, String> {
        let usual = worker::Trial::default();
        let disks = self.disks.iter().map(|disk| {
            let edits = disk.edits.iter().map(Edit::to_worker).collect::<Result<_, String>>()?;
            Ok(worker::DiskChange { disk: disk.disk.clone(), edits })
        });
        if self.disks.is_empty() {
            return Err("no disk is named".into());
        }
        Ok(worker::ChainChange {
            disks: disks.collect::<Result<_, String>>()?,
            is_dry_run: self.dry_run,
            drain_ms: self.drain_ms.unwrap_or(worker::ChainChange::DRAIN_MS).min(60_000),
            trial: worker::Trial {
                ms: self.trial_ms.unwrap_or(usual.ms).min(600_000),
                requests: self.trial_requests.unwrap_or(usual.requests),
            },
        })
    }
}

impl Edit {
    fn to_worker(&self) -> Result<worker::Edit, String> {
        let policy = |text: &Option<String>| text.as_deref().map(policy).transpose();
        let pairs = |params: &[Param]| -> Vec<(String, String)> {
            params.iter().map(|param| (param.name.clone(), param.value.clone())).collect()
        };
        Ok(match self {
            Edit::Attach {
                file,
                name,
                order,
                inline,
                deadline_ms,
                on_failure,
                memory_bytes,
                params,
            } => worker::Edit::Attach(worker::SlotConfig {
                name: name.clone(),
                filter: absolute(file)?,
                order: order.unwrap_or(0),
                placement: match inline {
                    true => worker::Placement::Inline,
                    false => worker::Placement::Isolated,
                },
                deadline_ms: *deadline_ms,
                on_failure: policy(on_failure)?,
                memory_bytes: *memory_bytes,
                params: pairs(params),
                grants: Vec::new(),
            }),
            Edit::Detach { slot } => worker::Edit::Detach { slot: slot.clone() },
            Edit::Replace { slot, file, params } => worker::Edit::Replace {
                slot: slot.clone(),
                filter: file.as_deref().map(absolute).transpose()?,
                params: pairs(params),
            },
            Edit::Set { slot, order, deadline_ms, on_failure } => worker::Edit::Set {
                slot: slot.clone(),
                order: *order,
                deadline_ms: *deadline_ms,
                on_failure: policy(on_failure)?,
            },
        })
    }
}

/// The worker's folder is not that of whoever asks.
fn absolute(file: &Path) -> Result<PathBuf, String> {
    match file.is_absolute() {
        true => Ok(file.to_owned()),
        false => Err(format!("{}: give the whole path of a filter", file.display())),
    }
}

fn policy(text: &str) -> Result<worker::OnFailure, String> {
    let all = [
        worker::OnFailure::Hold,
        worker::OnFailure::Bypass,
        worker::OnFailure::Fail,
        worker::OnFailure::Detach,
    ];
    let found = all.into_iter().find(|policy| policy.name() == text);
    found.ok_or_else(|| format!("on_failure {text:?} is none of hold, bypass, fail and detach"))
}

impl Changed {
    pub(crate) fn new(changed: &worker::Changed) -> Changed {
        let disk = |disk: &worker::DiskChanged| DiskChanged {
            disk: disk.disk.clone(),
            generation: disk.generation,
            before: disk.before.clone(),
            after: disk.after.clone(),
        };
        Changed {
            disks: changed.disks.iter().map(disk).collect(),
            pause_us: changed.pause_us,
            dry_run: changed.is_dry_run,
        }
    }
}
