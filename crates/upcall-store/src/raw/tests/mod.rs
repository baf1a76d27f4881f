//! Tests of the raw store on real files and devices, through each engine.

mod devices;
mod faults;
mod model;
mod nth;
mod opening;
mod waiting;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use upcall_block::{
    Op, Range, RequestFlags, Status, Store, StoreDone, StoreIo, StoreQueue, StoreToken,
};
use upcall_ring::{Access, Buffers, Mapping, memfd};

use super::shared::{Answer, Call, Shared, Tap};
use super::target::Target;
use super::{Engine, RawOptions, RawStore, sleep_on};

const ENGINES: [Engine; 2] = [Engine::IoUring, Engine::Threads];
const FUA: RequestFlags = RequestFlags { fua: true, unmap: false, retry: false };
const UNMAP: RequestFlags = RequestFlags { fua: false, unmap: true, retry: false };
const PLAIN: RequestFlags = RequestFlags { fua: false, unmap: false, retry: false };

/// A directory that goes with its content.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("upcall-store-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    /// A sparse file.
    fn image(&self, bytes: u64) -> PathBuf {
        let path = self.0.join("image");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn options(path: &Path, engine: Engine, direct: bool) -> RawOptions {
    RawOptions { engine, direct, ..RawOptions::new(path) }
}

/// A store whose calls a test sees and answers.
fn open_tapped(options: RawOptions, tap: Tap) -> RawStore {
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    let target = Target::of(&file, &options).unwrap();
    let mut shared = Shared::new(file, target, options.name(), options.on_failure.clone());
    shared.tap = Some(tap);
    RawStore::assemble(shared, options).unwrap()
}

/// Memory as a guest's.
fn memory(bytes: usize) -> Arc<Mapping> {
    let fd = memfd("guest", bytes).unwrap();
    Arc::new(Mapping::new(&fd, 0, bytes, Access::ReadWrite).unwrap())
}

fn bytes_of(buffers: &Buffers) -> Vec<u8> {
    let mut bytes = vec![0; buffers.len()];
    buffers.read(0, &mut bytes);
    bytes
}

/// A queue, and a way to run one request at a time through it.
struct Disk {
    store: Arc<RawStore>,
    queue: Box<dyn StoreQueue>,
}

impl Disk {
    fn new(store: RawStore) -> Disk {
        let queue = store.open_queue().unwrap();
        Disk { store: Arc::new(store), queue }
    }

    fn io(&self, token: u64, op: Op, offset: u64, length: u64, data: Buffers) -> StoreIo {
        let range = Range::new(offset, length, self.store.info()).unwrap();
        StoreIo { token: StoreToken(token), op, range, flags: PLAIN, data }
    }

    /// Sleeps until all is over.
    fn finish(&mut self) -> Vec<StoreDone> {
        let mut done = Vec::new();
        while self.queue.in_flight() > 0 {
            self.queue.poll(&mut done);
            if self.queue.in_flight() > 0 && self.queue.before_sleep() {
                sleep_on(self.queue.doorbell().unwrap());
            }
        }
        done
    }

    fn run(&mut self, op: Op, offset: u64, length: u64, flags: RequestFlags) -> Status {
        let io = StoreIo { flags, ..self.io(7, op, offset, length, Buffers::new()) };
        self.run_io(io)
    }

    fn run_io(&mut self, io: StoreIo) -> Status {
        let token = io.token;
        self.queue.submit(io);
        let done = self.finish();
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].token, token);
        done[0].status
    }

    fn flush(&mut self) -> Status {
        self.run(Op::Flush, 0, 0, PLAIN)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Status {
        self.write_flagged(offset, bytes, PLAIN)
    }

    fn write_flagged(&mut self, offset: u64, bytes: &[u8], flags: RequestFlags) -> Status {
        let memory = memory(bytes.len());
        let data = Buffers::of(&memory, 0, bytes.len(), true).unwrap();
        data.write(0, bytes);
        let io = self.io(8, Op::Write, offset, bytes.len() as u64, data);
        self.run_io(StoreIo { flags, ..io })
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, upcall_block::Errno> {
        let memory = memory(length);
        let data = Buffers::of(&memory, 0, length, true).unwrap();
        data.write(0, &vec![0xee; length]);
        let io = self.io(9, Op::Read, offset, length as u64, data.clone());
        self.run_io(io).map(|()| bytes_of(&data))
    }
}

/// Numbers from a printed seed. UPCALL_SEED replays.
struct Random(u64);

impl Random {
    fn new(test: &str) -> Random {
        let given = std::env::var("UPCALL_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = given.unwrap_or_else(now);
        eprintln!("{test}: UPCALL_SEED={seed}");
        Random(seed | 1)
    }

    /// Below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let start = self.below(usize::MAX >> 1);
        (0..length)
            .map(|at| (start.wrapping_add(at).wrapping_mul(0x9e37_79b1) >> 13) as u8)
            .collect()
    }
}
