//! The page itself: the writer's and the reader's view.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use upcall_ring::{Access, Mapping};

use crate::histogram::{BUCKETS, Histogram, bucket_of};

const MAGIC: u64 = u64::from_le_bytes(*b"UPCLSTAT");
const VERSION: u32 = 2;
const DIRECTORY: usize = 4096;
const ENTRY: usize = 256;
const NAME: usize = 48;
const BLOCK: usize = 4096;
const HISTOGRAM: usize = 1024;
const NOW: usize = 64 * 6;
const VIOLATIONS: usize = NOW + 8;
const RETRIES: usize = NOW + 16;
const SKIPPED: usize = NOW + 24;
const KIND: usize = 96;
/// In a hop's entry of the directory: how its filter is.
const STANDING: usize = 128;
const FAILURES: usize = 136;
const LONGEST_STALL: usize = 144;
/// Its place among the hops of its disk.
const RANK: usize = 152;
const COUNTERS: usize = 63;
const COUNTERS_SIZE: usize = 4096;
/// More hops than this in a file that is read are refused.
const SANE: u64 = 4096;

/// What a hop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopKind {
    /// The whole way of a request, from the frontend and back.
    Request,
    /// One filter.
    Filter,
    /// The store.
    Store,
    /// Nothing: room for a filter that may come. Readers do not see it.
    Vacant,
}

impl HopKind {
    const fn number(self) -> u64 {
        match self {
            HopKind::Request => 0,
            HopKind::Filter => 1,
            HopKind::Store => 2,
            HopKind::Vacant => 3,
        }
    }

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            HopKind::Request => "request",
            HopKind::Filter => "filter",
            HopKind::Store => "store",
            HopKind::Vacant => "vacant",
        }
    }
}

/// How a filter stands, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It serves.
    #[default]
    Up,
    /// It failed and is being started again; its requests wait or fail.
    Restarting,
    /// It failed and is skipped until it is back.
    Bypassed,
    /// It failed too often and is tried at long intervals.
    Quarantined,
    /// It failed and has left the chain.
    Detached,
}

impl Standing {
    /// All of them.
    pub const ALL: [Standing; 5] = [
        Standing::Up,
        Standing::Restarting,
        Standing::Bypassed,
        Standing::Quarantined,
        Standing::Detached,
    ];

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Standing::Up => "up",
            Standing::Restarting => "restarting",
            Standing::Bypassed => "bypassed",
            Standing::Quarantined => "quarantined",
            Standing::Detached => "detached",
        }
    }
}

/// How a filter stands and stood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterHealth {
    /// Now.
    pub standing: Standing,
    /// How often it failed: died, hung, broke too many rules, or could not be started again.
    pub failures: u64,
    /// The longest time from a failure until it served again.
    pub longest_stall_ns: u64,
}

/// A hop to keep counters for.
#[derive(Clone, Debug)]
pub struct HopSpec {
    /// The disk's name; at most 47 bytes count.
    pub disk: String,
    /// The hop's name: the filter's, or what the store is.
    pub name: String,
    /// What it is.
    pub kind: HopKind,
    /// One block for each.
    pub queues: u16,
}

/// The writer's view. Dropping it removes the file, unless it was replaced by another one.
pub struct Page {
    mapping: Arc<Mapping>,
    hops: Vec<HopPlace>,
    /// Where its file is, and which file that is.
    file: Option<(PathBuf, FileId)>,
    /// The file itself, locked as long as the page is kept: see [`is_kept`].
    _lock: Option<File>,
}

/// Device and inode.
type FileId = (u64, u64);

struct HopPlace {
    blocks: usize,
    counters: usize,
    queues: u16,
}

fn file_id(metadata: &std::fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

fn name_bytes(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let mut end = name.len().min(NAME - 1);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
    bytes
}

/// The text in a padded field, made fit for a terminal.
fn name_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]);
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl Page {
    /// Makes the page: as a file that is renamed to `path` when it is complete, so that no
    /// reader sees half a page; or, without a path, in memory only.
    pub fn create(path: Option<&Path>, specs: &[HopSpec]) -> io::Result<Page> {
        let mut at = (DIRECTORY + ENTRY * specs.len()).next_multiple_of(BLOCK);
        let mut hops = Vec::new();
        for spec in specs {
            let blocks = at;
            at += BLOCK * usize::from(spec.queues);
            let has_counters = matches!(spec.kind, HopKind::Filter | HopKind::Vacant);
            let counters = if has_counters { at } else { 0 };
            at += if has_counters { COUNTERS_SIZE } else { 0 };
            hops.push(HopPlace { blocks, counters, queues: spec.queues });
        }
        let (mapping, renamed, lock) = match path {
            None => (
                Mapping::new(upcall_ring::memfd("upcall-stats", at)?, 0, at, Access::ReadWrite)?,
                None,
                None,
            ),
            Some(path) => {
                let mut unfinished = path.as_os_str().to_owned();
                unfinished.push(format!(".{}", std::process::id()));
                let unfinished = PathBuf::from(unfinished);
                let _ = std::fs::remove_file(&unfinished);
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o644)
                    .open(&unfinished)?;
                // Room is taken now: a full disk is an error here, not a SIGBUS later.
                let made =
                    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, at as u64)
                        .map_err(io::Error::from)
                        .and_then(|()| Mapping::new(file.as_fd(), 0, at, Access::ReadWrite))
                        .and_then(|mapping| Ok((mapping, file_id(&file.metadata()?))));
                // Before anybody finds it. Where there are no locks, its process says it alone.
                let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
                match made {
                    Ok((mapping, id)) => {
                        (mapping, Some((unfinished, path.to_owned(), id)), Some(file))
                    }
                    Err(error) => {
                        let _ = std::fs::remove_file(&unfinished);
                        return Err(error);
                    }
                }
            }
        };
        let mut page = Page { mapping: Arc::new(mapping), hops, file: None, _lock: lock };
        page.put(0, &MAGIC.to_le_bytes());
        page.put(8, &VERSION.to_le_bytes());
        page.put(12, &std::process::id().to_le_bytes());
        page.put(16, &(specs.len() as u64).to_le_bytes());
        page.put(24, &(at as u64).to_le_bytes());
        for (index, (spec, place)) in specs.iter().zip(&page.hops).enumerate() {
            let entry = DIRECTORY + ENTRY * index;
            page.put(entry, &name_bytes(&spec.disk));
            page.put(entry + NAME, &name_bytes(&spec.name));
            page.put(entry + KIND, &spec.kind.number().to_le_bytes());
            page.put(entry + RANK, &(index as u64).to_le_bytes());
            page.put(entry + 104, &u64::from(spec.queues).to_le_bytes());
            page.put(entry + 112, &(place.blocks as u64).to_le_bytes());
            page.put(entry + 120, &(place.counters as u64).to_le_bytes());
        }
        if let Some((unfinished, path, id)) = renamed {
            if let Err(error) = std::fs::rename(&unfinished, &path) {
                let _ = std::fs::remove_file(&unfinished);
                return Err(error);
            }
            page.file = Some((path, id));
        }
        Ok(page)
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        let put = self.mapping.write(offset, bytes);
        assert!(put.is_some(), "the page was made with room for all of its fields");
    }

    /// The block of one queue at one hop, for the one thread that counts there. Panics if
    /// there is no such hop or queue.
    pub fn block(&self, hop: usize, queue: u16) -> Block {
        let place = &self.hops[hop];
        assert!(queue < place.queues);
        Block { mapping: self.mapping.clone(), start: place.blocks + BLOCK * usize::from(queue) }
    }

    /// Makes a hop that is vacant, or whose filter has left, that of another filter, which has
    /// counted nothing yet. Only while nobody counts there.
    pub fn begin_filter(&self, hop: usize, name: &str) {
        let (entry, place) = (DIRECTORY + ENTRY * hop, &self.hops[hop]);
        for queue in 0..usize::from(place.queues) {
            self.put(place.blocks + BLOCK * queue, &[0; BLOCK]);
        }
        self.put(place.counters, &[0; COUNTERS_SIZE]);
        self.show_health(hop, &FilterHealth::default());
        self.put(entry + NAME, &name_bytes(name));
        self.put(entry + KIND, &HopKind::Filter.number().to_le_bytes());
    }

    /// A hop's filter has left.
    pub fn end_filter(&self, hop: usize) {
        self.put(DIRECTORY + ENTRY * hop + KIND, &HopKind::Vacant.number().to_le_bytes());
    }

    /// Shows a hop at this place among those of its disk; smaller is nearer to the guest.
    pub fn rank(&self, hop: usize, rank: u64) {
        self.put(DIRECTORY + ENTRY * hop + RANK, &rank.to_le_bytes());
    }

    /// A reader of this page.
    pub fn reader(&self) -> PageReader {
        let (pid, hops) = (std::process::id(), self.hops.len() as u64);
        PageReader { mapping: self.mapping.clone(), pid, hops }
    }

    /// Shows how a filter is. One thread at a time.
    pub fn show_health(&self, hop: usize, health: &FilterHealth) {
        let entry = DIRECTORY + ENTRY * hop;
        let standing = Standing::ALL.iter().position(|standing| *standing == health.standing);
        let words = [
            (STANDING, standing.unwrap_or(0) as u64),
            (FAILURES, health.failures),
            (LONGEST_STALL, health.longest_stall_ns),
        ];
        for (at, word) in words {
            self.put(entry + at, &word.to_le_bytes());
        }
    }

    /// Shows a filter's counters: names and values, the first 63.
    pub fn show_counters(&self, hop: usize, counters: &[(String, u64)]) {
        let start = self.hops[hop].counters;
        if start == 0 {
            return;
        }
        for (index, (name, value)) in counters.iter().take(COUNTERS).enumerate() {
            self.put(start + 64 * index, &name_bytes(name));
            self.put(start + 64 * index + NAME, &value.to_le_bytes());
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // Another worker may have put its page there since; that one stays.
        if let Some((path, id)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|found| file_id(&found) == *id)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where one thread counts what passes one hop.
pub struct Block {
    mapping: Arc<Mapping>,
    start: usize,
}

impl Block {
    /// Its numbers: found and checked once for each call below.
    fn numbers(&self) -> &[AtomicU64; BLOCK / 8] {
        let numbers = self.mapping.atomics_u64(self.start, BLOCK / 8);
        match numbers.and_then(|numbers| numbers.try_into().ok()) {
            Some(numbers) => numbers,
            None => unreachable!("a block lies inside its page"),
        }
    }

    /// A request of operation number `op` arrives.
    pub fn enter(&self) {
        add(self.numbers(), NOW, 1);
    }

    /// It leaves, after `latency_ns`.
    pub fn leave(&self, op: u8, bytes: u64, latency_ns: u64, error: bool) {
        let numbers = self.numbers();
        let counts = counts_of(op);
        add(numbers, counts, 1);
        add(numbers, counts + 8, bytes);
        leave(numbers, op, latency_ns, error);
    }

    /// It leaves again, after it was here a second time on its way up: that is time, and an
    /// error perhaps, but no other request.
    pub fn leave_again(&self, op: u8, latency_ns: u64, error: bool) {
        leave(self.numbers(), op, latency_ns, error);
    }

    /// A request was delivered again, to a new instance.
    pub fn retry(&self) {
        add(self.numbers(), RETRIES, 1);
    }

    /// A request went past the filter, which is gone.
    pub fn skip(&self) {
        add(self.numbers(), SKIPPED, 1);
    }

    /// The hop broke a rule.
    pub fn violation(&self) {
        add(self.numbers(), VIOLATIONS, 1);
    }
}

/// Where what passed of an operation is counted.
fn counts_of(op: u8) -> usize {
    debug_assert!((1..=5).contains(&op));
    64 * usize::from(op.min(5))
}

fn leave(numbers: &[AtomicU64; BLOCK / 8], op: u8, latency_ns: u64, error: bool) {
    let counts = counts_of(op);
    add(numbers, NOW, u64::MAX);
    if error {
        add(numbers, counts + 16, 1);
    }
    add(numbers, counts + 24, latency_ns);
    add(numbers, HISTOGRAM + 8 * bucket_of(latency_ns), 1);
}

/// One thread is the only writer, so load and store need no locked instruction.
#[inline]
fn add(numbers: &[AtomicU64; BLOCK / 8], offset: usize, delta: u64) {
    let number = &numbers[offset / 8];
    number.store(number.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
}

/// Why a file cannot be watched.
#[derive(Debug)]
pub enum ReadError {
    /// It cannot be opened or mapped.
    Io(io::Error),
    /// It is not a page of counters.
    NotAPage(&'static str),
    /// It is one of another version of this program.
    OtherVersion,
}

impl std::fmt::Display for ReadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ReadError::Io(error) => error.fmt(f),
            ReadError::NotAPage(why) => f.write_str(why),
            ReadError::OtherVersion => {
                f.write_str("a page of another version: use the upcall that serves the disk")
            }
        }
    }
}

impl std::error::Error for ReadError {}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        ReadError::Io(error)
    }
}

/// Whether a worker keeps the page at `path`, wherever that worker runs: also in a namespace where
/// its process has another number. A page whose worker has ended is nobody's.
pub fn is_kept(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// The reader's view. The file is not trusted: a bad one gives errors or odd numbers.
pub struct PageReader {
    mapping: Arc<Mapping>,
    pid: u32,
    hops: u64,
}

/// What passed, by operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Requests that have left the hop.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// The time they spent here, all together.
    pub time_ns: u64,
}

/// What a block holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSnapshot {
    /// By operation number; 0 is unused.
    pub ops: [OpCounts; 6],
    /// Requests here now.
    pub now: u64,
    /// Rules broken.
    pub violations: u64,
    /// Requests delivered again after a failure.
    pub retries: u64,
    /// Requests that went past the filter while it was gone.
    pub skipped: u64,
    /// Of all operations.
    pub latency: Histogram,
}

impl BlockSnapshot {
    /// All operations together.
    pub fn total(&self) -> OpCounts {
        self.ops.iter().fold(OpCounts::default(), |sum, op| OpCounts {
            requests: sum.requests.wrapping_add(op.requests),
            bytes: sum.bytes.wrapping_add(op.bytes),
            errors: sum.errors.wrapping_add(op.errors),
            time_ns: sum.time_ns.wrapping_add(op.time_ns),
        })
    }

    /// What came since an earlier snapshot; `now` is the later one's.
    #[must_use]
    pub fn since(&self, earlier: &BlockSnapshot) -> BlockSnapshot {
        let mut since = self.clone();
        for (mine, theirs) in since.ops.iter_mut().zip(&earlier.ops) {
            mine.requests = mine.requests.wrapping_sub(theirs.requests);
            mine.bytes = mine.bytes.wrapping_sub(theirs.bytes);
            mine.errors = mine.errors.wrapping_sub(theirs.errors);
            mine.time_ns = mine.time_ns.wrapping_sub(theirs.time_ns);
        }
        since.violations = since.violations.wrapping_sub(earlier.violations);
        since.retries = since.retries.wrapping_sub(earlier.retries);
        since.skipped = since.skipped.wrapping_sub(earlier.skipped);
        since.latency = since.latency.since(&earlier.latency);
        since
    }
}

/// A hop of a disk, its queues added up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HopSnapshot {
    /// The disk's name.
    pub disk: String,
    /// The hop's name.
    pub name: String,
    /// What it is.
    pub kind: HopKind,
    /// What passed.
    pub block: BlockSnapshot,
    /// How the filter is.
    pub health: FilterHealth,
    /// The filter's own counters.
    pub counters: Vec<(String, u64)>,
}

impl PageReader {
    /// Opens a page.
    pub fn open(path: &Path) -> Result<PageReader, ReadError> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        if length < 2 * DIRECTORY as u64 || length > 1 << 30 {
            return Err(ReadError::NotAPage(
                "not a page of counters of an upcall worker (wrong size)",
            ));
        }
        let mapping = Mapping::new(&file, 0, length as usize, Access::ReadOnly)?;
        let mut reader = PageReader { mapping: Arc::new(mapping), pid: 0, hops: 0 };
        if reader.number(0) != MAGIC {
            return Err(ReadError::NotAPage(
                "not a page of counters of an upcall worker (wrong magic)",
            ));
        }
        let word = reader.number(8);
        if word as u32 != VERSION {
            return Err(ReadError::OtherVersion);
        }
        reader.pid = (word >> 32) as u32;
        reader.hops = reader.number(16);
        if reader.hops > SANE {
            return Err(ReadError::NotAPage("a damaged page of counters (too many hops)"));
        }
        Ok(reader)
    }

    /// The process that writes the page.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn number(&self, offset: usize) -> u64 {
        self.mapping.read_array::<8>(offset).map_or(0, u64::from_le_bytes)
    }

    fn name(&self, offset: usize) -> String {
        self.mapping.read_array::<NAME>(offset).map_or_else(String::new, |bytes| name_text(&bytes))
    }

    /// How many requests have left a hop, by its number in the page.
    pub fn requests(&self, hop: usize) -> u64 {
        self.hop(DIRECTORY + ENTRY * hop).block.total().requests
    }

    /// All hops as they stand now: the disks one after the other, and of each the hops from the
    /// guest to the store.
    pub fn snapshot(&self) -> Vec<HopSnapshot> {
        let mut hops = Vec::new();
        let mut disk = 0;
        for index in 0..self.hops as usize {
            let entry = DIRECTORY + ENTRY * index;
            let hop = self.hop(entry);
            disk += usize::from(hop.kind == HopKind::Request);
            if hop.kind != HopKind::Vacant {
                hops.push(((disk, self.number(entry + RANK)), hop));
            }
        }
        hops.sort_by_key(|(place, _)| *place);
        hops.into_iter().map(|(_, hop)| hop).collect()
    }

    fn hop(&self, entry: usize) -> HopSnapshot {
        let mut block = BlockSnapshot::default();
        let blocks = self.number(entry + 112) as usize;
        // No more than there is room for: a number that is not ours costs no time.
        let queues = self.number(entry + 104).min((self.mapping.len() / BLOCK) as u64);
        for queue in 0..queues as usize {
            self.add_block(blocks.saturating_add(BLOCK * queue), &mut block);
        }
        let counters = self.number(entry + 120) as usize;
        HopSnapshot {
            disk: self.name(entry),
            name: self.name(entry + NAME),
            kind: match self.number(entry + KIND) {
                0 => HopKind::Request,
                1 => HopKind::Filter,
                3 => HopKind::Vacant,
                _ => HopKind::Store,
            },
            block,
            health: FilterHealth {
                standing: Standing::ALL
                    .get(self.number(entry + STANDING) as usize)
                    .copied()
                    .unwrap_or_default(),
                failures: self.number(entry + FAILURES),
                longest_stall_ns: self.number(entry + LONGEST_STALL),
            },
            counters: if counters == 0 { Vec::new() } else { self.counters(counters) },
        }
    }

    fn add_block(&self, start: usize, sum: &mut BlockSnapshot) {
        let number = |offset: usize| self.number(start.saturating_add(offset));
        for (op, counts) in sum.ops.iter_mut().enumerate() {
            counts.requests = counts.requests.wrapping_add(number(64 * op));
            counts.bytes = counts.bytes.wrapping_add(number(64 * op + 8));
            counts.errors = counts.errors.wrapping_add(number(64 * op + 16));
            counts.time_ns = counts.time_ns.wrapping_add(number(64 * op + 24));
        }
        sum.now = sum.now.wrapping_add(number(NOW));
        sum.violations = sum.violations.wrapping_add(number(VIOLATIONS));
        sum.retries = sum.retries.wrapping_add(number(RETRIES));
        sum.skipped = sum.skipped.wrapping_add(number(SKIPPED));
        for bucket in 0..BUCKETS {
            let count = number(HISTOGRAM + 8 * bucket);
            sum.latency.counts[bucket] = sum.latency.counts[bucket].wrapping_add(count);
        }
    }

    fn counters(&self, start: usize) -> Vec<(String, u64)> {
        (0..COUNTERS)
            .map(|index| start.saturating_add(64 * index))
            .map(|at| (self.name(at), self.number(at.saturating_add(NAME))))
            .take_while(|(name, _)| !name.is_empty())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<HopSpec> {
        [("request", HopKind::Request), ("xor", HopKind::Filter), ("raw file", HopKind::Store)]
            .map(|(name, kind)| HopSpec { disk: "root".into(), name: name.into(), kind, queues: 3 })
            .into()
    }

    #[test]
    fn a_reader_sees_the_sum_of_all_queues() {
        let path = std::env::temp_dir().join(format!("upcall-stats-test-{}", std::process::id()));
        let page = Page::create(Some(&path), &specs()).unwrap();
        let (a, b) = (page.block(1, 0), page.block(1, 2));
        a.enter();
        a.leave(2, 4096, 700, false);
        b.enter();
        b.leave(1, 512, 900, true);
        b.enter();
        b.violation();
        page.show_counters(1, &[("sectors".into(), 9)]);
        let reader = PageReader::open(&path).unwrap();
        assert_eq!(reader.pid(), std::process::id());
        let hops = reader.snapshot();
        assert_eq!(hops.len(), 3);
        assert_eq!(
            (hops[1].disk.as_str(), hops[1].name.as_str(), hops[1].kind),
            ("root", "xor", HopKind::Filter)
        );
        let block = &hops[1].block;
        assert_eq!(block.ops[2], OpCounts { requests: 1, bytes: 4096, errors: 0, time_ns: 700 });
        assert_eq!(block.ops[1], OpCounts { requests: 1, bytes: 512, errors: 1, time_ns: 900 });
        assert_eq!((block.now, block.violations, block.latency.total()), (1, 1, 2));
        assert_eq!(hops[1].counters, [("sectors".to_string(), 9)]);
        assert_eq!(hops[0].block, BlockSnapshot::default());
        drop(page);
        assert!(!path.exists(), "the file goes with the worker");
    }

    #[test]
    fn a_filter_that_comes_begins_at_nothing_where_its_rank_says_and_one_that_leaves_is_gone() {
        let mut specs = specs();
        let vacant = HopSpec { name: String::new(), kind: HopKind::Vacant, ..specs[1].clone() };
        specs.insert(2, vacant);
        let page = Page::create(None, &specs).unwrap();
        let names = || -> Vec<String> {
            page.reader().snapshot().into_iter().map(|hop| hop.name).collect()
        };
        assert_eq!(names(), ["request", "xor", "raw file"]);
        page.block(2, 1).enter();
        page.show_counters(2, &[("old".into(), 1)]);
        page.begin_filter(2, "trace");
        page.rank(2, 1);
        page.rank(1, 2);
        page.rank(3, 3);
        assert_eq!(names(), ["request", "trace", "xor", "raw file"]);
        let hop = &page.reader().snapshot()[1];
        assert_eq!((hop.block.now, hop.counters.len()), (0, 0));
        page.end_filter(1);
        assert_eq!(names(), ["request", "trace", "raw file"]);
    }

    #[test]
    fn a_page_that_was_replaced_leaves_the_one_that_replaced_it() {
        let path = std::env::temp_dir().join(format!("upcall-stats-two-{}", std::process::id()));
        let first = Page::create(Some(&path), &specs()).unwrap();
        let second = Page::create(Some(&path), &specs()).unwrap();
        first.block(0, 0).enter();
        second.block(0, 0).enter();
        second.block(0, 0).enter();
        drop(first);
        assert_eq!(PageReader::open(&path).unwrap().snapshot()[0].block.now, 2);
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn nothing_is_left_of_a_page_that_cannot_be_made() {
        let folder = std::env::temp_dir().join(format!("upcall-stats-none-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("page")).unwrap();
        assert!(Page::create(Some(&folder.join("page")), &specs()).is_err(), "a folder is there");
        assert!(Page::create(Some(&folder.join("none/page")), &specs()).is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_came_since_is_the_difference_and_now_is_now() {
        let path = std::env::temp_dir().join(format!("upcall-stats-since-{}", std::process::id()));
        let page = Page::create(Some(&path), &specs()).unwrap();
        let block = page.block(2, 1);
        let snapshot = || PageReader::open(&path).unwrap().snapshot()[2].block.clone();
        block.enter();
        block.leave(3, 0, 10, true);
        let earlier = snapshot();
        block.enter();
        block.enter();
        block.leave(3, 0, 20, false);
        block.violation();
        let since = snapshot().since(&earlier);
        let passed = OpCounts { requests: 1, bytes: 0, errors: 0, time_ns: 20 };
        assert_eq!((since.ops[3], since.total(), since.now), (passed, passed, 1));
        assert_eq!((since.violations, since.latency.total()), (1, 1));
        // A second visit of the same request is time, and no request.
        block.leave_again(3, 5, true);
        let again = snapshot().since(&earlier);
        let counted = OpCounts { requests: 1, bytes: 0, errors: 1, time_ns: 25 };
        assert_eq!((again.total(), again.now), (counted, 0));
    }

    #[test]
    fn names_are_cut_at_a_character_and_made_fit_for_a_terminal() {
        assert_eq!(name_text(&name_bytes(&"é".repeat(40))), "é".repeat(23));
        assert_eq!(name_text(b"a\x1b[31m\0rest"), "a\u{fffd}[31m");
    }

    #[test]
    fn a_file_that_is_no_page_is_refused() {
        let path = std::env::temp_dir().join(format!("upcall-stats-bad-{}", std::process::id()));
        std::fs::write(&path, b"short").unwrap();
        assert!(matches!(PageReader::open(&path), Err(ReadError::NotAPage(_))));
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(matches!(PageReader::open(&path), Err(ReadError::NotAPage(_))));
        let mut bytes = vec![0; 8192];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 2;
        bytes[16] = 9; // hops whose entries point anywhere
        bytes[4096..8192].fill(0xff);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(
            PageReader::open(&path).unwrap().snapshot().len(),
            9,
            "odd numbers, but no harm"
        );
        std::fs::remove_file(&path).unwrap();
    }
}
