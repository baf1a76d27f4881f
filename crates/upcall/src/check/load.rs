//! Checks that send requests. The disk is divided into a part for each queue; in every phase
//! each queue works on another part, so that what one wrote another reads.

use std::time::{Duration, Instant};

use upcall_block::{Errno, Op};

use super::batch::{self, MEMORY, Planned};
use super::bench::{Bench, CAPACITY, QUEUES};
use super::driver::{Driver, Tally};
use super::host::{self, Usage};
use super::model::Part;
use super::random::Random;
use super::report::Report;
use crate::failure::Failure;

/// Requests of the check that sends one at a time.
const ONE_AT_A_TIME: u64 = 200;
/// Phases of the check under load; more than enough to tell growth from warming up.
const PHASES: u64 = 5;
/// Requests in each phase, when a time is given.
const PHASE_REQUESTS: u64 = 4_000;
/// How often queues are stopped with requests in flight.
const STOPS: u64 = 5;
/// Time for the worker to take what was sent: some filters hold it then.
const BEFORE_STOP: Duration = Duration::from_millis(2);

/// The state of the disk between checks.
pub struct Load<'a> {
    bench: &'a Bench,
    parts: Vec<Part>,
    random: Random,
    is_stuck: bool,
}

impl<'a> Load<'a> {
    pub fn new(bench: &'a Bench, seed: u64) -> Load<'a> {
        let length = CAPACITY / u64::from(QUEUES);
        let parts = (0..u64::from(QUEUES)).map(|index| Part::new(index * length, length)).collect();
        Load { bench, parts, random: Random::new(seed, 0), is_stuck: false }
    }

    /// Whether there is still a filter to check.
    pub fn may_go_on(&self) -> bool {
        !self.is_stuck && self.bench.lost().is_none()
    }

    /// One request after the other.
    pub fn check_one_at_a_time(&mut self, report: &mut Report) -> Result<(), Failure> {
        let tally = self.on_all_queues(ONE_AT_A_TIME / u64::from(QUEUES), 1);
        report.check("one at a time", verdict(&tally)).map(drop)
    }

    /// Batches on all queues at once, and what the filter host uses meanwhile.
    pub fn check_all_at_once(
        &mut self,
        operations: u64,
        seconds: Option<Duration>,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let end = seconds.map(|seconds| Instant::now() + seconds);
        let each = if end.is_some() { PHASE_REQUESTS } else { operations.div_ceil(PHASES) };
        let mut tally = Tally::default();
        let mut usage: Vec<Usage> = Vec::new();
        for phase in 0.. {
            let is_over = match end {
                Some(end) => phase >= PHASES && Instant::now() >= end,
                None => phase >= PHASES,
            };
            if is_over || !self.may_go_on() {
                break;
            }
            tally.join(self.on_all_queues(each.div_ceil(QUEUES.into()), batch::BATCH_MAX));
            usage.extend(self.bench.usage());
        }
        report.check("all at once", verdict(&tally))?;
        if self.may_go_on() && usage.len() >= PHASES as usize {
            report.check("leaks", leaks(&usage, each))?;
        }
        Ok(())
    }

    /// Queues stop with requests in flight: all of them end, and the disk is still right.
    pub fn check_cancel(&mut self, report: &mut Report) -> Result<(), Failure> {
        let mut tally = Tally::default();
        let mut wrong = Vec::new();
        for _ in 0..STOPS {
            match self.stop_in_flight(&mut tally) {
                Ok(()) => {}
                Err(error) => wrong.push(error),
            }
        }
        let neither = "answered neither them nor their cancel";
        wrong.extend(
            self.bench.complaints().into_iter().filter(|line| line.contains(neither)).take(1),
        );
        wrong.extend(verdict(&tally).err().into_iter().flatten());
        let cancelled: u64 = tally
            .failed
            .iter()
            .filter(|((_, errno), _)| *errno == Errno::ECANCELED.raw())
            .map(|(_, count)| count)
            .sum();
        let found = format!("{} requests, of which {cancelled} were cancelled", tally.requests);
        report.check("stops", if wrong.is_empty() { Ok(found) } else { Err(wrong) }).map(drop)
    }

    fn stop_in_flight(&mut self, tally: &mut Tally) -> Result<(), String> {
        let ops = self.bench.info.ops;
        let mut sent = Vec::new();
        for (queue, part) in (0..QUEUES).zip(&self.parts) {
            let mut driver = self.bench.start_queue(queue)?;
            let batch = batch::next(part, ops, batch::BATCH_MAX, &mut self.random);
            let waiting = driver.send(&batch);
            sent.push((driver, batch, waiting));
        }
        std::thread::sleep(BEFORE_STOP);
        (0..QUEUES).for_each(|queue| self.bench.stop_queue(queue));
        for ((mut driver, batch, waiting), part) in sent.into_iter().zip(&mut self.parts) {
            driver.finish_stopped(&batch, waiting, part, tally);
        }
        Ok(())
    }

    /// Everything that is known, read back.
    pub fn check_read_back(&mut self, report: &mut Report) -> Result<(), Failure> {
        let mut tally = Tally::default();
        let read = self.read_all(&mut tally);
        let found = read.map_err(|error| vec![error]).and_then(|()| verdict(&tally));
        report.check("read back", found).map(drop)
    }

    fn read_all(&mut self, tally: &mut Tally) -> Result<(), String> {
        const PIECE: u32 = 1 << 20;
        let mut driver = self.bench.start_queue(0)?;
        for part in &mut self.parts {
            let end = part.offset() + part.length();
            let mut offset = part.offset();
            while offset < end && !tally.is_stuck() {
                let read = |index: usize| Planned {
                    op: Op::Read,
                    offset: offset + (index * PIECE as usize) as u64,
                    length: PIECE,
                    fua: false,
                    unmap: false,
                    at: index * PIECE as usize,
                    stamp: 0,
                };
                let batch: Vec<Planned> = (0..MEMORY / PIECE as usize)
                    .map(read)
                    .filter(|read| read.offset < end)
                    .collect();
                driver.run(&batch, part, tally);
                offset += MEMORY as u64;
            }
        }
        self.bench.stop_queue(0);
        self.is_stuck = tally.is_stuck();
        Ok(())
    }

    /// `requests` on each queue at the same time, in batches of at most `depth`.
    fn on_all_queues(&mut self, requests: u64, depth: usize) -> Tally {
        self.parts.rotate_left(1);
        let bench = self.bench;
        let seed = self.random.next();
        let mut tally = Tally::default();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..QUEUES)
                .zip(&mut self.parts)
                .map(|(queue, part)| {
                    scope.spawn(move || {
                        let mut random = Random::new(seed, u64::from(queue) + 1);
                        on_queue(bench, queue, part, requests, depth, &mut random)
                    })
                })
                .collect();
            for thread in threads {
                match thread.join() {
                    Ok(of_queue) => tally.join(of_queue),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
        self.is_stuck = tally.is_stuck();
        tally
    }
}

fn on_queue(
    bench: &Bench,
    queue: u16,
    part: &mut Part,
    requests: u64,
    depth: usize,
    random: &mut Random,
) -> Tally {
    let mut tally = Tally::default();
    let mut driver: Driver = match bench.start_queue(queue) {
        Ok(driver) => driver,
        Err(error) => {
            tally.unanswered.add(|| error);
            return tally;
        }
    };
    while tally.requests < requests && !tally.is_stuck() && bench.lost().is_none() {
        let left = (requests - tally.requests).min(depth as u64) as usize;
        let batch = batch::next(part, bench.info.ops, left, random);
        driver.run(&batch, part, &mut tally);
    }
    bench.stop_queue(queue);
    tally
}

/// What a tally says of the filter. Failed requests are told, and are no fault.
fn verdict(tally: &Tally) -> Result<String, Vec<String>> {
    let mut wrong = Vec::new();
    for (findings, what) in [
        (&tally.wrong_data, "reads gave wrong data"),
        (&tally.unanswered, "requests were never answered"),
        (&tally.unasked, "requests ended more than once"),
    ] {
        if findings.count > 0 {
            wrong.push(format!("{} {what}:", findings.count));
            wrong.extend(findings.first.iter().map(|text| format!("  {text}")));
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let failures = match tally.failures() {
        none if none.is_empty() => "none failed".to_owned(),
        failures => format!("failed: {failures}"),
    };
    Ok(format!("{} requests, {failures}", tally.requests))
}

/// Whether memory or descriptors of the filter host grow with each phase of `requests`.
fn leaks(usage: &[Usage], requests: u64) -> Result<String, Vec<String>> {
    // Less than 16 bytes a request cannot be told from noise.
    let slack_kib = (requests * 16 / 1024).max(128);
    let memory: Vec<u64> = usage.iter().map(|usage| usage.memory_kib).collect();
    let descriptors: Vec<u64> = usage.iter().map(|usage| usage.descriptors).collect();
    let mut wrong = Vec::new();
    let phases = usage.len() - 1;
    if let Some(kib) = host::growth(&memory, slack_kib) {
        let bytes = kib * 1024 / (requests * phases as u64).max(1);
        wrong.push(format!(
            "its memory grew by {kib} KiB in {phases} phases of {requests} requests: \
             about {bytes} bytes a request"
        ));
    }
    if let Some(count) = host::growth(&descriptors, 0) {
        wrong.push(format!("{count} more descriptors are open after {phases} phases"));
    }
    let last = usage.last().map_or(0, |usage| usage.memory_kib);
    let found = format!("{last} KiB, {} descriptors at the end", descriptors[phases]);
    if wrong.is_empty() { Ok(found) } else { Err(wrong) }
}
