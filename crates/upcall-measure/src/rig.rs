//! A worker in this process, with a chain, the null store and a [`LoadQueue`]: all that an
//! up-call needs.
//!
//! [`LoadQueue`]: crate::load::LoadQueue

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use upcall_worker::{
    DiskConfig, LogLevel, LogSink, Placement, RecoveryPolicy, SlotConfig, StoreConfig, Worker,
    WorkerConfig,
};

use crate::load::{Arrivals, Handle, Plan, load_queue};
use crate::measure::Round;
use crate::process;

/// The name that filter hosts have in rounds, all together.
pub const HOSTS: &str = "filter hosts";

const CAPACITY: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two requests, where everybody is to be asleep.
const PAUSE: Duration = Duration::from_millis(1);
const WARM_UP: Duration = Duration::from_millis(5);

/// A filter in a chain.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its shared object.
    pub filter: PathBuf,
    /// Its parameters: names and values.
    pub params: Vec<(String, String)>,
    /// Where it runs.
    pub placement: Placement,
}

impl Link {
    /// A filter in a process of its own, as it comes.
    pub fn to(filter: PathBuf) -> Link {
        Link { filter, params: Vec::new(), placement: Placement::Isolated }
    }
}

/// See the module.
pub struct Rig {
    worker: Option<Worker>,
    handle: Handle,
    hosts: Vec<(String, u32)>,
    log: Log,
}

/// Warnings and errors, kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn sink(&self) -> LogSink {
        let lines = self.0.clone();
        Arc::new(move |level, text| {
            if level <= LogLevel::Warn {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
            }
        })
    }

    fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).join("; ")
    }
}

impl Rig {
    /// Starts a worker with this chain. Its queue thread is bound to the first core there
    /// is, its filter hosts to the second.
    pub fn start(chain: &[Link]) -> Result<Rig, String> {
        let before: BTreeSet<u32> = process::children(std::process::id()).into_iter().collect();
        let log = Log::default();
        let worker = worker(chain, log.sink())?;
        let hosts: Vec<(String, u32)> = process::children(std::process::id())
            .into_iter()
            .filter(|pid| !before.contains(pid))
            .map(|pid| (HOSTS.to_owned(), pid))
            .collect();
        let cores = process::cores();
        if let Some(core) = cores.get(1) {
            for (_, pid) in &hosts {
                process::pin_process(*pid, &[*core]).map_err(|error| error.to_string())?;
            }
        }
        let info = worker.disks()[0].info.clone();
        let (queue, handle) =
            load_queue(info, cores.first().copied()).map_err(|error| error.to_string())?;
        worker.start_queue(0, 0, Box::new(queue));
        Ok(Rig { worker: Some(worker), handle, hosts, log })
    }

    /// Filter hosts that are processes.
    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// One round, after a little of the same that does not count.
    pub fn round(&self, plan: Plan) -> Result<Round, String> {
        self.play(Plan { slice: WARM_UP, ..plan })?;
        let (round, used) = process::while_watching(&self.hosts, || self.play(plan));
        let mut round = round?;
        round.used.extend(used);
        if round.errors > 0 {
            return Err(format!("{} requests failed: {}", round.errors, self.log.text()));
        }
        Ok(round)
    }

    fn play(&self, plan: Plan) -> Result<Round, String> {
        self.handle.begin(plan);
        if plan.arrivals == Arrivals::Rung {
            let end = std::time::Instant::now() + plan.slice;
            while std::time::Instant::now() < end {
                std::thread::sleep(PAUSE);
                self.handle.arrive();
            }
        }
        let ended = self.handle.end(plan.slice + PATIENCE);
        ended.ok_or_else(|| format!("a round does not end: {}", self.log.text()))
    }
}

/// A worker with one null disk of one queue, behind this chain.
pub fn worker(chain: &[Link], log: LogSink) -> Result<Worker, String> {
    let slot = |(order, link): (usize, &Link)| SlotConfig {
        name: None,
        filter: link.filter.clone(),
        order: order as i32,
        placement: link.placement,
        deadline_ms: None,
        on_failure: None,
        memory_bytes: None,
        params: link.params.clone(),
        grants: Vec::new(),
    };
    let disk = DiskConfig {
        name: "bench".into(),
        store: StoreConfig::Null { bytes: CAPACITY },
        read_only: false,
        queues: 1,
        frontend: None,
        nbd: None,
        state: None,
        chain: chain.iter().enumerate().map(slot).collect(),
    };
    let recovery = RecoveryPolicy::default();
    let config = WorkerConfig {
        disks: vec![disk],
        stats: None,
        drain_ms: 1000,
        recovery,
        write_down: None,
        log,
    };
    Worker::start(config).map_err(|error| error.to_string())
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            drop(worker.shutdown());
        }
    }
}
