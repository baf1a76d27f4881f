//! The simulated medium: where data of the simulated disks is, and all that can go wrong
//! with it.
//!
//! Fault model. Requests complete late and in any order; those in flight together take
//! effect in any order, sector by sector, and a sector is old or new, never torn. Reads,
//! writes and flushes fail (EIO, ENOSPC), wholly or after a part. What was written is
//! durable after a flush that was submitted later, or with FUA; at a power cut each sector
//! is what is durable or anything written later. A flush that failed stays failed until the
//! medium is opened anew, and what it should have saved may be lost for good even so. When
//! a worker dies, each of its requests is done, partly done, or not done.
//!
//! Always true: nothing happens here but in calls of the simulation, on its clock and from
//! its seed.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use upcall_block::{DiskInfo, Errno, Op, Range, Status, StoreDone, StoreIo, StoreQueue};

use crate::random::Random;
use crate::stamp::{Bytes, SECTOR};

/// How the medium behaves for a while.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// How long a request takes.
    pub delay_ns: (u64, u64),
    /// So many reads, writes, flushes in a thousand fail.
    pub read_errors: u64,
    pub write_errors: u64,
    pub flush_errors: u64,
}

impl Weather {
    pub const FINE: Weather =
        Weather { delay_ns: (5_000, 80_000), read_errors: 0, write_errors: 0, flush_errors: 0 };
}

/// A fault that a checker must notice: proof that it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Canary {
    /// A bit of a written sector is another.
    FlipBit,
    /// A write is reported done, and was not.
    LoseWrite,
    /// A write goes to the neighbouring sector.
    Misdirect,
    /// A completion is never told.
    SwallowCompletion,
    /// Flushes are reported done, and were not.
    LieAboutFlush,
    /// A failed request is reported done.
    HideError,
}

impl Canary {
    pub const ALL: [Canary; 6] = [
        Canary::FlipBit,
        Canary::LoseWrite,
        Canary::Misdirect,
        Canary::SwallowCompletion,
        Canary::LieAboutFlush,
        Canary::HideError,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Canary::FlipBit => "flip-bit",
            Canary::LoseWrite => "lose-write",
            Canary::Misdirect => "misdirect",
            Canary::SwallowCompletion => "swallow-completion",
            Canary::LieAboutFlush => "lie-about-flush",
            Canary::HideError => "hide-error",
        }
    }
}

/// An error that the medium gave.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    pub op: Op,
    pub range: Range,
}

struct Pending {
    queue: usize,
    io: StoreIo,
    due_ns: u64,
    /// What had been written when it was submitted.
    version: u64,
    /// Sectors done.
    done: usize,
}

struct State {
    info: DiskInfo,
    random: Random,
    now_ns: u64,
    weather: Weather,
    current: Vec<Bytes>,
    durable: Vec<Bytes>,
    /// By sector: what was written since `durable`, with versions, in order.
    unflushed: BTreeMap<usize, Vec<(u64, Bytes)>>,
    version: u64,
    /// A flush failed since it was opened.
    failed: bool,
    pending: Vec<Pending>,
    /// By queue.
    done: Vec<VecDeque<StoreDone>>,
    failures: Vec<Failed>,
    /// What, and after how many occasions.
    canary: Option<(Canary, u32)>,
    /// Sectors that the guest sees; canaries sing only there.
    guests: usize,
    canary_sang: bool,
}

/// A medium. Clones are the same one.
#[derive(Clone)]
pub struct Medium(Arc<Mutex<State>>);

impl Medium {
    /// A medium with these sectors, all durable; the first `guests` are seen by the guest.
    pub fn new(info: DiskInfo, sectors: Vec<Bytes>, guests: usize, random: Random) -> Medium {
        assert_eq!(info.capacity, (sectors.len() * SECTOR) as u64);
        Medium(Arc::new(Mutex::new(State {
            info,
            random,
            now_ns: 0,
            weather: Weather::FINE,
            durable: sectors.clone(),
            current: sectors,
            unflushed: BTreeMap::new(),
            version: 0,
            failed: false,
            pending: Vec::new(),
            done: Vec::new(),
            failures: Vec::new(),
            canary: None,
            guests,
            canary_sang: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A crash point may have unwound through a queue's call: nothing here is half done.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn info(&self) -> DiskInfo {
        self.lock().info.clone()
    }

    pub fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Misbehaves in this way, once, at the n-th occasion.
    pub fn set_canary(&self, canary: Canary, occasion: u32) {
        self.lock().canary = Some((canary, occasion));
    }

    pub fn canary_sang(&self) -> bool {
        self.lock().canary_sang
    }

    /// A way to it for one engine; its number.
    pub fn open_queue(&self) -> (MediumQueue, usize) {
        let mut state = self.lock();
        let queue = state.done.len();
        state.done.push(VecDeque::new());
        (MediumQueue { medium: self.clone(), queue }, queue)
    }

    pub fn set_now(&self, now_ns: u64) {
        self.lock().now_ns = now_ns;
    }

    /// When the next request is due.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.lock().pending.iter().map(|pending| pending.due_ns).min()
    }

    /// Carries one due request a bit further. The queue that has a completion by that.
    pub fn act(&self) -> Option<usize> {
        self.lock().act()
    }

    /// The errors it gave since the last call.
    pub fn take_failures(&self) -> Vec<Failed> {
        std::mem::take(&mut self.lock().failures)
    }

    /// The worker is dead: its requests are done, or not, and it is opened anew. Whether a
    /// flush had failed.
    pub fn lose_worker(&self) -> bool {
        let mut state = self.lock();
        let failed = state.failed;
        state.lose_worker();
        failed
    }

    /// The worker gives it up in good order: nothing is in flight, and what is written becomes
    /// durable, unless that fails now, or a flush has before; whether it did. That it has failed
    /// is told to whoever takes it up.
    pub fn hand_over(&self) -> bool {
        let mut state = self.lock();
        assert!(state.pending.is_empty(), "a worker ended with requests in a medium");
        let chance = state.weather.flush_errors;
        if !state.failed && state.random.per_mille(chance) {
            state.lose_flush();
        }
        if !state.failed {
            let version = state.version;
            state.flush(version);
        }
        !state.failed
    }

    /// The power goes: only what is durable is certain.
    pub fn cut_power(&self) {
        self.lock().cut_power();
    }

    /// Requests that it has, and has not completed.
    pub fn in_flight(&self) -> usize {
        self.lock().pending.len()
    }

    /// What a sector holds.
    pub fn sector(&self, sector: usize) -> Bytes {
        self.lock().current[sector]
    }
}

impl State {
    fn act(&mut self) -> Option<usize> {
        let now_ns = self.now_ns;
        let due: Vec<usize> =
            (0..self.pending.len()).filter(|at| self.pending[*at].due_ns <= now_ns).collect();
        if due.is_empty() {
            return None;
        }
        let at = due[self.random.below(due.len())];
        let left = sectors(self.pending[at].io.range).len() - self.pending[at].done;
        if left > 1 && self.random.one_in(3) {
            let some = 1 + self.random.below(left - 1);
            self.advance(at, some);
            return None;
        }
        let mut pending = self.pending.remove(at);
        let status = self.finish(&mut pending);
        if self.sings(Canary::SwallowCompletion, &pending.io) {
            return None;
        }
        let done = StoreDone { token: pending.io.token, status };
        self.done[pending.queue].push_back(done);
        Some(pending.queue)
    }

    /// Whether the canary does this now.
    fn sings(&mut self, canary: Canary, io: &StoreIo) -> bool {
        let Some((kind, left)) = &mut self.canary else { return false };
        let guests = sectors(io.range).end <= self.guests;
        if *kind != canary || !guests {
            return false;
        }
        if *left > 0 {
            *left -= 1;
            return false;
        }
        self.canary_sang = true;
        // A flush that lies once is covered by the next; a medium that lies always lies.
        if canary != Canary::LieAboutFlush {
            self.canary = None;
        }
        true
    }

    fn finish(&mut self, pending: &mut Pending) -> Status {
        let op = pending.io.op;
        if self.failed && op != Op::Read {
            return self.fail(pending, Errno::EIO);
        }
        let weather = self.weather;
        let chance = match op {
            Op::Read => weather.read_errors,
            Op::Flush => weather.flush_errors,
            Op::Write | Op::Discard | Op::WriteZeroes => weather.write_errors,
        };
        if self.random.per_mille(chance) {
            if op == Op::Flush {
                self.lose_flush();
            } else {
                // A short one: some of it is done.
                let left = sectors(pending.io.range).len() - pending.done;
                let some = self.random.below(left + 1);
                self.carry_out(pending, some);
            }
            let full = op.is_modification() && self.random.one_in(3);
            let errno = if full { Errno::ENOSPC } else { Errno::EIO };
            return self.fail(pending, errno);
        }
        if op == Op::Flush {
            if !self.sings(Canary::LieAboutFlush, &pending.io) {
                self.flush(pending.version);
            }
            return Ok(());
        }
        let left = sectors(pending.io.range).len() - pending.done;
        self.carry_out(pending, left);
        Ok(())
    }

    fn fail(&mut self, pending: &Pending, errno: Errno) -> Status {
        let (op, range) = (pending.io.op, pending.io.range);
        self.failures.push(Failed { op, range });
        if op != Op::Flush && self.sings(Canary::HideError, &pending.io) {
            return Ok(());
        }
        Err(errno)
    }

    fn advance(&mut self, at: usize, some: usize) {
        if self.failed && self.pending[at].io.op != Op::Read {
            return;
        }
        let mut pending = self.pending.remove(at);
        self.carry_out(&mut pending, some);
        self.pending.insert(at, pending);
    }

    /// Does the next `some` sectors of a request.
    fn carry_out(&mut self, pending: &mut Pending, some: usize) {
        let all = sectors(pending.io.range);
        for number in pending.done..pending.done + some {
            let sector = all.start + number;
            let mut bytes = [0; SECTOR];
            match pending.io.op {
                Op::Read => {
                    pending.io.data.write(number * SECTOR, &self.current[sector]);
                    continue;
                }
                Op::Write => pending.io.data.read(number * SECTOR, &mut bytes),
                Op::Discard | Op::WriteZeroes => {}
                Op::Flush => continue,
            }
            if self.sings(Canary::LoseWrite, &pending.io) {
                continue;
            }
            if self.sings(Canary::FlipBit, &pending.io) {
                bytes[self.random.below(SECTOR)] ^= 1;
            }
            let at = match self.sings(Canary::Misdirect, &pending.io) {
                true => (sector + 1) % self.guests,
                false => sector,
            };
            self.put(at, bytes, pending.io.flags.fua);
        }
        pending.done += some;
    }

    fn put(&mut self, sector: usize, bytes: Bytes, durable: bool) {
        self.version += 1;
        self.current[sector] = bytes;
        if durable {
            self.durable[sector] = bytes;
            self.unflushed.remove(&sector);
        } else {
            self.unflushed.entry(sector).or_default().push((self.version, bytes));
        }
    }

    /// Makes what was written up to `version` durable, and nothing else.
    fn flush(&mut self, version: u64) {
        let durable = &mut self.durable;
        self.unflushed.retain(|sector, written| {
            let upto = written.partition_point(|(when, _)| *when <= version);
            if let Some((_, bytes)) = written.drain(..upto).next_back() {
                durable[*sector] = bytes;
            }
            !written.is_empty()
        });
    }

    /// A flush fails: some of what it should have saved will never be saved.
    fn lose_flush(&mut self) {
        self.failed = true;
        let random = &mut self.random;
        self.unflushed.retain(|_, _| random.one_in(2));
    }

    fn lose_worker(&mut self) {
        while !self.pending.is_empty() {
            let at = self.random.below(self.pending.len());
            let mut pending = self.pending.remove(at);
            let left = sectors(pending.io.range).len() - pending.done;
            let some = match self.random.below(3) {
                0 => 0,
                1 => left,
                _ => self.random.below(left + 1),
            };
            if !self.failed || pending.io.op == Op::Read {
                self.carry_out(&mut pending, some);
            }
        }
        self.done.iter_mut().for_each(VecDeque::clear);
        self.failed = false;
    }

    fn cut_power(&mut self) {
        self.lose_worker();
        let unflushed = std::mem::take(&mut self.unflushed);
        self.current.clone_from(&self.durable);
        for (sector, written) in unflushed {
            let chosen = self.random.below(written.len() + 1);
            if chosen > 0 {
                self.current[sector] = written[chosen - 1].1;
            }
        }
        self.durable.clone_from(&self.current);
    }
}

/// The sectors of a range.
pub fn sectors(range: Range) -> std::ops::Range<usize> {
    let first = range.offset() as usize / SECTOR;
    first..first + range.length() as usize / SECTOR
}

/// One engine's way to a medium.
pub struct MediumQueue {
    medium: Medium,
    queue: usize,
}

impl StoreQueue for MediumQueue {
    fn submit(&mut self, io: StoreIo) {
        let mut state = self.medium.lock();
        assert!(
            sectors(io.range).end <= state.current.len(),
            "the store is given {:?}, which it does not have",
            io.range
        );
        let (least, most) = state.weather.delay_ns;
        let due_ns = state.now_ns + state.random.range(least, most);
        let version = state.version;
        state.pending.push(Pending { queue: self.queue, io, due_ns, version, done: 0 });
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        out.extend(self.medium.lock().done[self.queue].drain(..));
    }

    fn in_flight(&self) -> usize {
        let state = self.medium.lock();
        let pending = state.pending.iter().filter(|pending| pending.queue == self.queue).count();
        pending + state.done[self.queue].len()
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn before_sleep(&mut self) -> bool {
        self.medium.lock().done[self.queue].is_empty()
    }
}

#[cfg(test)]
mod tests {
    use upcall_block::{OpSet, RequestFlags, StoreToken};

    use super::*;

    fn medium(seed: u64) -> (Medium, MediumQueue) {
        let info = DiskInfo {
            capacity: 8 * SECTOR as u64,
            block_size: 512,
            physical_block_size: 512,
            read_only: false,
            ops: OpSet::ALL,
            discard_granularity: 512,
        };
        let medium = Medium::new(info, vec![[0; SECTOR]; 8], 8, Random::new(seed));
        let queue = medium.open_queue().0;
        (medium, queue)
    }

    fn buffers(byte: u8) -> upcall_ring::Buffers {
        let fd = upcall_ring::memfd("test", 4096).unwrap();
        let access = upcall_ring::Access::ReadWrite;
        let mapping = Arc::new(upcall_ring::Mapping::new(&fd, 0, 4096, access).unwrap());
        mapping.write(0, &[byte; 4096]).unwrap();
        upcall_ring::Buffers::of(&mapping, 0, 4096, true).unwrap()
    }

    fn submit(medium: &Medium, queue: &mut MediumQueue, op: Op, byte: u8) {
        let range = match op {
            Op::Flush => Range::EMPTY,
            _ => Range::new(0, 8 * SECTOR as u64, &medium.info()).unwrap(),
        };
        let data = buffers(byte);
        let data = if op.has_data() { data } else { upcall_ring::Buffers::new() };
        queue.submit(StoreIo {
            token: StoreToken(0),
            op,
            range,
            flags: RequestFlags::default(),
            data,
        });
    }

    fn run(medium: &Medium, queue: &mut MediumQueue, op: Op, byte: u8) -> Status {
        submit(medium, queue, op, byte);
        medium.set_now(medium.next_due_ns().unwrap());
        while medium.act().is_none() {}
        let mut done = Vec::new();
        queue.poll(&mut done);
        done[0].status
    }

    #[test]
    fn a_power_cut_takes_what_was_not_flushed_and_nothing_else() {
        let mut lost = 0;
        for seed in 0..50 {
            let (medium, mut queue) = medium(seed);
            run(&medium, &mut queue, Op::Write, 1).unwrap();
            run(&medium, &mut queue, Op::Flush, 0).unwrap();
            run(&medium, &mut queue, Op::Write, 2).unwrap();
            medium.cut_power();
            for sector in 0..8 {
                let byte = medium.sector(sector)[0];
                assert!(byte == 1 || byte == 2, "{byte}");
                lost += u32::from(byte == 1);
            }
        }
        assert!(lost > 50, "and it does take some");
    }

    #[test]
    fn a_failed_flush_stays_failed_until_the_medium_is_opened_anew() {
        let (medium, mut queue) = medium(1);
        medium.set_weather(Weather { flush_errors: 1000, ..Weather::FINE });
        assert!(run(&medium, &mut queue, Op::Flush, 0).is_err());
        medium.set_weather(Weather::FINE);
        for op in [Op::Flush, Op::Write, Op::Discard] {
            assert!(run(&medium, &mut queue, op, 1).is_err());
        }
        assert!(run(&medium, &mut queue, Op::Read, 0).is_ok());
        assert_eq!(medium.take_failures().len(), 4);
        medium.lose_worker();
        assert!(run(&medium, &mut queue, Op::Flush, 0).is_ok());
    }

    #[test]
    fn when_a_worker_dies_each_of_its_sectors_is_old_or_new() {
        let (mut old, mut new) = (0, 0);
        for seed in 0..50 {
            let (medium, mut queue) = medium(seed);
            submit(&medium, &mut queue, Op::Write, 1);
            medium.lose_worker();
            assert_eq!(queue.in_flight(), 0);
            for sector in 0..8 {
                let bytes = medium.sector(sector);
                assert!(bytes == [0; SECTOR] || bytes == [1; SECTOR]);
                if bytes[0] == 0 { old += 1 } else { new += 1 }
            }
        }
        assert!(old > 50 && new > 50, "{old} {new}");
    }
}
