//! What the tests share: compiling C, and a worker's side of a filter host.
#![allow(dead_code)] // each test file uses its part

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use upcall_abi::control::Disk;
use upcall_abi::ring::{Completion, Submission};
use upcall_filterhost::{
    Counters, Description, FilterError, FilterFile, HostProcess, LogLine, LogSink, OpenInstance,
    Placement, ResolvedParams, params,
};
use upcall_ring::channel::Channel;
use upcall_ring::{Access, Doorbell, Mapping, memfd, read_only_view};

pub const ARENA_SIZE: usize = 1 << 20;

/// The folder of this crate's tests, and that of the public header.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub fn has_m32() -> bool {
    try_compile(&data("nothing.c"), &["-m32", "-shared", "-fPIC"]).is_some()
}

/// Compiles `source` with `arguments`, into a file of its own.
pub fn compile(source: &Path, arguments: &[&str]) -> PathBuf {
    try_compile(source, arguments).expect("the C compiler failed, see above")
}

fn try_compile(source: &Path, arguments: &[&str]) -> Option<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let output =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}", std::process::id()));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiler = std::env::var_os("CC").unwrap_or("cc".into());
    let status = Command::new(compiler)
        .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"])
        .arg("-I")
        .arg(root.join("../../sdk/c/include"))
        .arg("-I")
        .arg(root.join("c"))
        .args(arguments)
        .arg(source)
        .arg("-o")
        .arg(&output)
        .status()
        .expect("no C compiler");
    status.success().then_some(output)
}

/// Compiles the test filter with `macros`, as `-DDIE_IN_LOAD`, and opens it.
pub fn filter(macros: &[&str]) -> FilterFile {
    let arguments: Vec<&str> = ["-shared", "-fPIC"].iter().chain(macros).copied().collect();
    FilterFile::open(compile(&data("filter.c"), &arguments)).unwrap()
}

/// Collects what filters log.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<LogLine>>>);

impl Lines {
    pub fn sink(&self) -> LogSink {
        let lines = self.0.clone();
        Arc::new(move |line| lines.lock().unwrap().push(line))
    }

    pub fn texts(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().map(|line| line.text.clone()).collect()
    }

    pub fn all(&self) -> Vec<LogLine> {
        self.0.lock().unwrap().clone()
    }
}

pub fn start(file: &FilterFile, placement: Placement) -> (HostProcess, Lines) {
    let lines = Lines::default();
    (HostProcess::start(file, placement, lines.sink()).unwrap(), lines)
}

/// A worker with one disk and one queue.
pub struct Worker {
    pub host: HostProcess,
    pub lines: Lines,
    pub description: Description,
    pub channel: Channel,
    pub bell: Doorbell,
    pub host_bell: Doorbell,
    pub arena: Mapping,
    pub counters: Counters,
    /// Given at the next OPEN.
    pub sidecar: Option<OwnedFd>,
    ring: OwnedFd,
    arena_fd: OwnedFd,
}

pub const DISK: Disk = Disk { capacity: 1 << 30, block_size: 512, read_only: 0 };

impl Worker {
    /// Up to and without OPEN.
    pub fn loaded(file: &FilterFile, placement: Placement) -> Result<Worker, FilterError> {
        let (mut host, lines) = start(file, placement);
        let description = host.describe()?;
        let arena_fd = memfd("arena", ARENA_SIZE).unwrap();
        let arena = Mapping::new(&arena_fd, 0, ARENA_SIZE, Access::ReadWrite).unwrap();
        if description.writes_data() {
            host.arena(0, arena_fd.as_fd(), ARENA_SIZE as u64, true)?;
        } else {
            let view = read_only_view(&arena_fd).unwrap();
            host.arena(0, view.as_fd(), ARENA_SIZE as u64, false)?;
        }
        let (channel, ring) = Channel::create(64).unwrap();
        let (host_bell, bell) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
        host.channel(0, 0, ring.as_fd(), host_bell.as_fd(), bell.as_fd())?;
        host.load()?;
        let counters = Counters::new().unwrap();
        Ok(Worker {
            host,
            lines,
            description,
            channel,
            bell,
            host_bell,
            arena,
            counters,
            sidecar: None,
            ring,
            arena_fd,
        })
    }

    pub fn open(&mut self, instance: u32, params: &ResolvedParams) -> Result<(), FilterError> {
        let counters = self.counters.clone();
        self.host.open(&OpenInstance {
            instance,
            arena: 0,
            disks: &[DISK],
            params,
            counters: &counters,
            sidecar: self.sidecar.as_ref().map(|file| file.as_fd()),
            extents: None,
        })
    }

    /// Up to START, with one instance and no parameters given.
    pub fn serving(file: &FilterFile, placement: Placement) -> Worker {
        let mut worker = Worker::loaded(file, placement).unwrap();
        let params = params::resolve(&worker.description, &[]).unwrap();
        worker.open(0, &params).unwrap();
        worker.host.serve().unwrap();
        worker
    }

    pub fn submit(&mut self, submission: &Submission) {
        self.channel.submissions.push(submission).unwrap();
        self.channel.submissions.wake(&self.host_bell);
    }

    /// The next completion, `None` if none comes within `patience`.
    pub fn completion(&mut self, patience: Duration) -> Option<Completion> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(completion) = self.channel.completions.pop() {
                return Some(completion);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
