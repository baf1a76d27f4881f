//! One queue of the disk under check: sends batches, waits for each request to end exactly
//! once, and compares what was read with the model.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use upcall_block::{DiskInfo, Errno, Op, Range, RequestFlags, Status, Tag};
use upcall_ring::{Access, Buffers, Mapping, memfd};
use upcall_worker::{DirectClient, DirectQueue, direct_queue};

use super::batch::{MEMORY, Planned};
use super::model::{Part, fill};

/// Most findings of a kind that are kept.
const FINDINGS: usize = 3;

/// What came of requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub requests: u64,
    /// Failed requests, by operation and errno.
    pub failed: BTreeMap<(&'static str, i32), u64>,
    /// Reads that gave wrong data.
    pub wrong_data: Findings,
    /// Requests that did not end in time.
    pub unanswered: Findings,
    /// Completions that nobody waited for.
    pub unasked: Findings,
}

/// Things that were found: how many, and the first of them.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    pub count: u64,
    pub first: Vec<String>,
}

impl Findings {
    pub fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < FINDINGS {
            self.first.push(text());
        }
    }

    fn join(&mut self, other: Findings) {
        self.count += other.count;
        let room = FINDINGS.saturating_sub(self.first.len());
        self.first.extend(other.first.into_iter().take(room));
    }
}

impl Tally {
    /// Both together.
    pub fn join(&mut self, other: Tally) {
        self.requests += other.requests;
        for (what, count) in other.failed {
            *self.failed.entry(what).or_default() += count;
        }
        self.wrong_data.join(other.wrong_data);
        self.unanswered.join(other.unanswered);
        self.unasked.join(other.unasked);
    }

    /// Whether it makes no sense to go on: something hangs.
    pub fn is_stuck(&self) -> bool {
        self.unanswered.count > 0
    }

    /// Failed requests, for people.
    pub fn failures(&self) -> String {
        let show = |((op, errno), count): (&(&'static str, i32), &u64)| {
            format!("{count} {op}: {}", std::io::Error::from_raw_os_error(*errno))
        };
        self.failed.iter().map(show).collect::<Vec<_>>().join(", ")
    }
}

/// One queue.
pub struct Driver {
    client: DirectClient,
    memory: Arc<Mapping>,
    info: DiskInfo,
    timeout: Duration,
}

impl Driver {
    /// The driver and the end that goes to the worker.
    pub fn new(info: &DiskInfo, timeout: Duration) -> std::io::Result<(Driver, DirectQueue)> {
        let (queue, client) = direct_queue()?;
        let fd = memfd("upcall-check", MEMORY)?;
        let memory = Arc::new(Mapping::new(fd, 0, MEMORY, Access::ReadWrite)?);
        Ok((Driver { client, memory, info: info.clone(), timeout }, queue))
    }

    /// Runs a batch to its end and updates the model.
    pub fn run(&mut self, batch: &[Planned], part: &mut Part, tally: &mut Tally) {
        let waiting = self.send(batch);
        self.finish(batch, waiting, part, tally);
    }

    /// Sends a batch.
    pub fn send(&mut self, batch: &[Planned]) -> HashMap<Tag, usize> {
        let mut waiting = HashMap::new();
        for (index, planned) in batch.iter().enumerate() {
            // In the disk and in memory: who plans sees to it.
            let Ok(range) = Range::new(planned.offset, planned.length.into(), &self.info) else {
                unreachable!("{planned:?} is not on the disk");
            };
            let flags = RequestFlags { fua: planned.fua, unmap: planned.unmap, retry: false };
            let data = self.prepare(planned);
            waiting.insert(self.client.submit(planned.op, range, flags, data), index);
        }
        waiting
    }

    /// Waits for the end of a batch, or until the patience is over.
    pub fn finish(
        &mut self,
        batch: &[Planned],
        mut waiting: HashMap<Tag, usize>,
        part: &mut Part,
        tally: &mut Tally,
    ) {
        let deadline = Instant::now() + self.timeout;
        while !waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some((tag, status)) = self.client.wait(left) else { break };
            match waiting.remove(&tag) {
                Some(index) => self.handle_end(&batch[index], status, part, tally),
                None => tally.unasked.add(|| format!("{tag:?} ended twice or was never sent")),
            }
        }
        for index in waiting.into_values() {
            let Planned { op, offset, length, stamp, .. } = batch[index];
            let after = self.timeout.as_millis();
            tally.unanswered.add(|| {
                format!("a {op} of {length} bytes at {offset} did not end within {after} ms")
            });
            tally.requests += 1;
            part.handle_end(op, offset, length, stamp, false);
        }
    }

    /// As [`finish`](Self::finish) for a queue that was stopped: what it took has ended by now,
    /// and what it did not take any more never will, which is no fault. At least what it
    /// changed is unknown then.
    pub fn finish_stopped(
        &mut self,
        batch: &[Planned],
        mut waiting: HashMap<Tag, usize>,
        part: &mut Part,
        tally: &mut Tally,
    ) {
        while let Some((tag, status)) = self.client.wait(Duration::ZERO) {
            match waiting.remove(&tag) {
                Some(index) => self.handle_end(&batch[index], status, part, tally),
                None => tally.unasked.add(|| format!("{tag:?} ended twice or was never sent")),
            }
        }
        for index in waiting.into_values() {
            let Planned { op, offset, length, stamp, .. } = batch[index];
            part.handle_end(op, offset, length, stamp, false);
        }
    }

    fn prepare(&self, planned: &Planned) -> Buffers {
        let length = planned.length as usize;
        let mut bytes = vec![0xee; length];
        match planned.op {
            Op::Write => fill(&mut bytes, planned.offset, planned.stamp),
            Op::Read => {}
            Op::Flush | Op::Discard | Op::WriteZeroes => return Buffers::new(),
        }
        let written = self.memory.write(planned.at, &bytes);
        let buffers = Buffers::of(&self.memory, planned.at, length, true);
        match (written, buffers) {
            (Some(()), Some(buffers)) => buffers,
            _ => unreachable!("{planned:?} is not in memory"),
        }
    }

    fn handle_end(&self, planned: &Planned, status: Status, part: &mut Part, tally: &mut Tally) {
        let Planned { op, offset, length, stamp, at, .. } = *planned;
        tally.requests += 1;
        if let Err(errno) = status {
            let errno: Errno = errno;
            *tally.failed.entry((op.name(), errno.raw())).or_default() += 1;
        } else if op == Op::Read {
            let mut bytes = vec![0; length as usize];
            let read = self.memory.read(at, &mut bytes);
            debug_assert!(read.is_some());
            if let Err(wrong) = part.compare(offset, &bytes) {
                tally.wrong_data.add(|| wrong);
            }
        }
        part.handle_end(op, offset, length, stamp, status.is_ok());
    }
}
