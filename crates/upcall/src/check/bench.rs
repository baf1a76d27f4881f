//! The filter under check on a disk in memory: a worker, its log, its page of counters.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use upcall_block::DiskInfo;
use upcall_stats::{HopSnapshot, PageReader};
use upcall_worker::{
    DiskConfig, LogLevel, LogSink, OnFailure, Placement, RecoveryPolicy, SlotConfig, StoreConfig,
    Worker, WorkerConfig,
};

use super::driver::Driver;
use super::host::{self, Usage};

/// Queues of the disk.
pub const QUEUES: u16 = 4;
/// Bytes of the disk.
pub const CAPACITY: u64 = 64 << 20;
/// How long held requests may take when a queue stops, before they are cancelled.
const DRAIN_MS: u64 = 200;

/// What is checked.
#[derive(Clone, Debug)]
pub struct Target {
    pub filter: PathBuf,
    pub params: Vec<(String, String)>,
    pub placement: Placement,
    pub grants: u16,
    pub timeout: Duration,
}

/// A running worker with the filter.
pub struct Bench {
    worker: Worker,
    pub info: DiskInfo,
    page: PageReader,
    log: Log,
    host: Option<PathBuf>,
    timeout: Duration,
    _folder: Folder,
}

/// What an operator would be told, kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn sink(&self) -> LogSink {
        let log = self.clone();
        Arc::new(move |level, text| {
            if level <= LogLevel::Warn {
                log.lines().push(text.to_owned());
            }
        })
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bench {
    /// Starts it; the error is the worker's own.
    pub fn start(target: &Target) -> Result<Bench, String> {
        let folder = Folder::new()?;
        let stats = folder.0.join("stats");
        let log = Log::default();
        let config = WorkerConfig {
            disks: disks(target),
            stats: Some(stats.clone()),
            drain_ms: DRAIN_MS,
            recovery: RecoveryPolicy::default(),
            write_down: None,
            log: log.sink(),
        };
        let worker = Worker::start(config).map_err(|error| error.to_string())?;
        let page = PageReader::open(&stats).map_err(|error| error.to_string())?;
        let Some(disk) = worker.disks().into_iter().next() else {
            unreachable!("it serves what it was given")
        };
        let host = host::find();
        let timeout = target.timeout;
        Ok(Bench { worker, info: disk.info, page, log, host, timeout, _folder: folder })
    }

    /// Begins to use a queue.
    pub fn start_queue(&self, queue: u16) -> Result<Driver, String> {
        let (driver, requests) =
            Driver::new(&self.info, self.timeout).map_err(|error| error.to_string())?;
        self.worker.start_queue(0, queue, Box::new(requests));
        Ok(driver)
    }

    /// Ends the use of a queue: what is in flight ends, or is cancelled.
    pub fn stop_queue(&self, queue: u16) {
        drop(self.worker.stop_queue(0, queue));
    }

    /// What the filter host uses, if it is a process and there.
    pub fn usage(&self) -> Option<Usage> {
        self.host.as_deref().and_then(host::usage)
    }

    /// How the filter host was lost, if it was.
    pub fn lost(&self) -> Option<String> {
        self.log.lines().iter().find(|line| line.contains(" is gone (")).cloned()
    }

    /// Warnings and errors so far.
    pub fn complaints(&self) -> Vec<String> {
        self.log.lines().clone()
    }

    /// What passed the filter.
    pub fn filter_hop(&self) -> Option<HopSnapshot> {
        let is_filter = |hop: &HopSnapshot| hop.kind == upcall_stats::HopKind::Filter;
        self.page.snapshot().into_iter().find(is_filter)
    }

    /// Requests that are anywhere on the disk now.
    pub fn in_flight(&self) -> u64 {
        self.page.snapshot().iter().map(|hop| hop.block.now).sum()
    }

    /// Ends in order: what went wrong at the end.
    pub fn end(self) -> Vec<String> {
        let before = self.log.lines().len();
        let mut wrong = self.worker.shutdown().failures;
        let lines = self.log.lines();
        // Lines of the filter itself are its own business.
        wrong.extend(lines[before..].iter().filter(|line| line.contains("its host")).cloned());
        wrong
    }
}

fn disks(target: &Target) -> Vec<DiskConfig> {
    let memory = |name: String, queues, chain| DiskConfig {
        name,
        store: StoreConfig::Memory { bytes: CAPACITY },
        read_only: false,
        queues,
        frontend: None,
        nbd: None,
        state: None,
        chain,
    };
    let granted: Vec<String> =
        (1..=target.grants).map(|number| format!("granted{number}")).collect();
    let slot = SlotConfig {
        name: None,
        filter: target.filter.clone(),
        order: 0,
        placement: target.placement,
        // A check has its own patience, and what fails here must be seen.
        deadline_ms: Some(0),
        on_failure: Some(OnFailure::Fail),
        memory_bytes: None,
        params: target.params.clone(),
        grants: granted.clone(),
    };
    std::iter::once(memory("check".into(), QUEUES, vec![slot]))
        .chain(granted.into_iter().map(|name| memory(name, 0, Vec::new())))
        .collect()
}

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder, String> {
        for number in 0..100 {
            let path: &Path = &std::env::temp_dir();
            let path = path.join(format!("upcall-check-{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Folder(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(format!("cannot make {}: {error}", path.display())),
            }
        }
        Err("cannot make a folder for temporary files".into())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
