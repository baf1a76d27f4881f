//! The reader's view.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use upcall_ring::{Access, Mapping};

use crate::histogram::{BUCKETS, Histogram};
use crate::hop::{FilterHealth, HopKind, Standing};
use crate::layout::*;

/// More hops than this in a file that is read are refused.
const SANE: u64 = 4096;

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

/// The reader's view. The file is not trusted: a bad one gives errors or odd numbers.
pub struct PageReader {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) pid: u32,
    pub(crate) hops: u64,
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
        let blocks = self.number(entry + BLOCKS) as usize;
        // No more than there is room for: a number that is not ours costs no time.
        let queues = self.number(entry + QUEUES).min((self.mapping.len() / BLOCK) as u64);
        for queue in 0..queues as usize {
            self.add_block(blocks.saturating_add(BLOCK * queue), &mut block);
        }
        let counters = self.number(entry + COUNTERS_AT) as usize;
        HopSnapshot {
            disk: self.name(entry),
            name: self.name(entry + NAME),
            kind: HopKind::of_number(self.number(entry + KIND)),
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
