//! A worker in this process, and a disk to drive without a guest.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use upcall_block::{Errno, Op, Range, RequestFlags, Status};
use upcall_ring::{Access, Buffers, Mapping, memfd};
use upcall_worker::*;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// A worker's log, kept.
#[derive(Clone, Default)]
pub struct Log(pub Arc<Mutex<Vec<String>>>);

impl Log {
    pub fn sink(&self) -> LogSink {
        let lines = self.0.clone();
        Arc::new(move |_, text| lines.lock().unwrap().push(text.to_owned()))
    }

    pub fn contains(&self, part: &str) -> bool {
        self.0.lock().unwrap().iter().any(|line| line.contains(part))
    }

    /// Waits until a line with this in it was logged.
    pub fn wait_for(&self, part: &str) {
        let end = std::time::Instant::now() + PATIENCE;
        while !self.contains(part) {
            assert!(
                std::time::Instant::now() < end,
                "no line with {part:?} in {:#?}",
                self.0.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub fn memory_disk(name: &str, bytes: u64, chain: Vec<SlotConfig>) -> DiskConfig {
    DiskConfig {
        name: name.into(),
        store: StoreConfig::Memory { bytes },
        read_only: false,
        queues: 1,
        frontend: None,
        nbd: None,
        state: None,
        chain,
    }
}

pub fn slot(filter: &std::path::Path) -> SlotConfig {
    SlotConfig {
        name: None,
        filter: filter.to_owned(),
        order: 0,
        placement: Placement::Isolated,
        deadline_ms: None,
        on_failure: None,
        memory_bytes: None,
        params: Vec::new(),
        grants: Vec::new(),
    }
}

pub fn start(disks: Vec<DiskConfig>, log: &Log) -> Worker {
    try_start(disks, log).unwrap_or_else(|error| panic!("{error}"))
}

pub fn try_start(disks: Vec<DiskConfig>, log: &Log) -> Result<Worker, StartError> {
    Worker::start(config(disks, log))
}

pub fn config(disks: Vec<DiskConfig>, log: &Log) -> WorkerConfig {
    WorkerConfig {
        disks,
        stats: None,
        drain_ms: 300,
        recovery: RecoveryPolicy::default(),
        write_down: None,
        log: log.sink(),
    }
}

/// Waits until something is so; `what` is said if it never is.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(std::time::Instant::now() < end, "it was never so: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One queue of a disk, driven from the test.
pub struct Driver {
    client: DirectClient,
    info: upcall_block::DiskInfo,
    memory: Arc<Mapping>,
}

/// Bytes of the driver's memory, from which requests take their data.
pub const MEMORY: usize = 8 << 20;

impl Driver {
    pub fn new(worker: &Worker, disk: usize, queue: u16) -> Driver {
        let (requests, client) = direct_queue().unwrap();
        worker.start_queue(disk, queue, Box::new(requests));
        let memory = memfd("driver", MEMORY).unwrap();
        Driver {
            client,
            info: worker.disks()[disk].info.clone(),
            memory: Arc::new(Mapping::new(&memory, 0, MEMORY, Access::ReadWrite).unwrap()),
        }
    }

    pub fn range(&self, offset: u64, length: u32) -> Range {
        Range::new(offset, length.into(), &self.info).unwrap()
    }

    /// Sends a request whose data is at `at` of the driver's memory.
    pub fn submit(&mut self, op: Op, offset: u64, length: u32, at: usize) -> upcall_block::Tag {
        self.submit_flags(op, offset, length, at, RequestFlags::default())
    }

    /// The same with flags.
    pub fn submit_flags(
        &mut self,
        op: Op,
        offset: u64,
        length: u32,
        at: usize,
        flags: RequestFlags,
    ) -> upcall_block::Tag {
        let data = if op.has_data() {
            Buffers::of(&self.memory, at, length as usize, true).unwrap()
        } else {
            Buffers::new()
        };
        self.client.submit(op, self.range(offset, length), flags, data)
    }

    pub fn wait(&mut self) -> (upcall_block::Tag, Status) {
        self.client.wait(PATIENCE).expect("a completion in time")
    }

    pub fn wait_at_most(&mut self, timeout: Duration) -> Option<(upcall_block::Tag, Status)> {
        self.client.wait(timeout)
    }

    /// One request, from its start to its end.
    pub fn run(&mut self, op: Op, offset: u64, length: u32) -> Status {
        let tag = self.submit(op, offset, length, 0);
        let (ended, status) = self.wait();
        assert_eq!(ended, tag);
        status
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Status {
        self.memory.write(0, bytes).unwrap();
        self.run(Op::Write, offset, bytes.len() as u32)
    }

    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        self.memory.write(0, &vec![0xee; length]).unwrap();
        self.run(Op::Read, offset, length as u32)?;
        let mut bytes = vec![0; length];
        self.memory.read(0, &mut bytes).unwrap();
        Ok(bytes)
    }

    pub fn fill(&self, at: usize, bytes: &[u8]) {
        self.memory.write(at, bytes).unwrap();
    }

    pub fn peek(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }
}

/// A folder that goes away.
pub struct Folder(pub PathBuf);

impl Folder {
    /// No other has it, also if two tests choose one name.
    pub fn new(name: &str) -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (own, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("upcall-{name}-{own}-{number}"));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// Builds a filter of `tests/data/NAME.c`, or of another source below the workspace.
    pub fn filter(&self, source: &str, flags: &[&str]) -> PathBuf {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let name = source.rsplit('/').next().unwrap().trim_end_matches(".c");
        let told = flags.concat().replace(['/', '"'], "_");
        let target = self.0.join(format!("{name}{told}.so"));
        let built = Command::new("cc")
            .args([
                "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread",
            ])
            .args(flags)
            .arg(format!("-I{root}/sdk/c/include"))
            .arg("-o")
            .arg(&target)
            .arg(format!("{root}/{source}"))
            .status()
            .unwrap();
        assert!(built.success(), "{source} does not build");
        target
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
