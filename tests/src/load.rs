//! A load that overlaps itself, and what every sector may hold under it.
//!
//! Unlike [`Workload`](crate::Workload), requests in flight may overlap, as a disk allows; so
//! there may be several right answers. A sector holds what some write put there that no
//! completed write has *replaced*: a write is replaced by one that was submitted after it had
//! completed, and that has completed itself. A read may see whatever was allowed when it was
//! submitted, or what was submitted until it completed. A server that dies and takes requests
//! in flight up again may do such a write twice, at any time until it completes, and no more.
//!
//! Every request must complete, once and without an error.

use std::path::Path;

use crate::client::{Client, Io, Outcome, SLOT_BYTES};
use crate::pattern::{Pattern, SECTOR};
use crate::rng::Rng;

/// How often each operation is chosen, in parts of the sum.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct LoadMix {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub zeroes: u64,
    /// Largest request, in sectors.
    pub sectors_max: u64,
    /// Requests begin in the first so many sectors (a small number makes them overlap) half of
    /// the time, else anywhere.
    pub hot_sectors: u64,
}

impl Default for LoadMix {
    fn default() -> Self {
        LoadMix {
            reads: 35,
            writes: 50,
            flushes: 5,
            discards: 5,
            zeroes: 5,
            sectors_max: 64,
            hot_sectors: 256,
        }
    }
}

/// What a load did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LoadCounts {
    pub submitted: u64,
    pub completed: u64,
    pub sectors_checked: u64,
}

/// Something that was, or is being, written to a sector. Times count events of the load.
#[derive(Clone, Copy, Debug)]
struct Written {
    stamp: u32,
    submitted: u64,
    /// u64::MAX: not yet.
    completed: u64,
}

/// A sector: what was written to it, but for what can be seen no more.
#[derive(Clone, Debug)]
struct Sector(Vec<Written>);

impl Sector {
    /// Whether a read that was submitted at `since` and completes now may see `written`.
    fn allows(&self, written: &Written, since: u64) -> bool {
        !self.0.iter().any(|by| by.submitted > written.completed && by.completed < since)
    }

    /// Whether a write is under way, or was at some time since `since`.
    fn is_busy(&self, since: u64) -> bool {
        self.0.iter().any(|written| written.completed >= since)
    }

    /// Forgets what nobody who looks since `since` can see.
    fn prune(&mut self, since: u64) {
        let keep: Vec<bool> = self.0.iter().map(|written| self.allows(written, since)).collect();
        let mut keep = keep.into_iter();
        self.0.retain(|_| keep.next() == Some(true));
    }
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    io: Io,
    sector: u64,
    sectors: u64,
    submitted: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Load {
    rng: Rng,
    seed: u64,
    pattern: Pattern,
    /// See [`Load::torn_zeroes_as`].
    torn_zeroes: Option<fn(u64) -> [u8; SECTOR]>,
    sectors: Vec<Sector>,
    /// By queue and slot.
    in_flight: Vec<Option<Flight>>,
    slots: usize,
    clock: u64,
    stamp: u32,
    counts: LoadCounts,
}

impl Load {
    /// For the client's disk, which is made to hold zeroes, with as many in flight as it can.
    pub fn on(seed: u64, client: &mut dyn Client) -> Load {
        eprintln!("load: UPCALL_SEED={seed}");
        let length = client.capacity();
        let zeroes = Io::WriteZeroes { offset: 0, length, unmap: false };
        assert_eq!(client.run(0, zeroes), Outcome::Ok, "{zeroes:?}");
        let sectors = length as usize / SECTOR;
        let zero = Written { stamp: 0, submitted: 0, completed: 0 };
        Load {
            rng: Rng::new(seed),
            seed,
            pattern: Pattern::new(seed),
            torn_zeroes: None,
            sectors: vec![Sector(vec![zero]); sectors],
            in_flight: vec![None; client.queues() * client.slots()],
            slots: client.slots(),
            clock: 1,
            stamp: 0,
            counts: LoadCounts::default(),
        }
    }

    /// For a disk behind a filter that leaves sectors of zeroes alone and changes all others,
    /// as xor does: of a sector that is torn between zeroes and something else it changes the
    /// zeroes, too, into what `key` gives for the sector.
    #[must_use]
    pub fn torn_zeroes_as(self, key: fn(u64) -> [u8; SECTOR]) -> Load {
        Load { torn_zeroes: Some(key), ..self }
    }

    /// What it did so far.
    pub fn counts(&self) -> LoadCounts {
        self.counts
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// What is in flight, for a message.
    pub fn stuck(&self) -> Vec<String> {
        let place =
            |index: usize| format!("queue {} slot {}", index / self.slots, index % self.slots);
        let flights = self.in_flight.iter().enumerate();
        flights
            .filter_map(|(at, flight)| Some(format!("{}: {:?}", place(at), flight.as_ref()?.io)))
            .collect()
    }

    /// Submits to free slots, some of them.
    pub fn submit(&mut self, client: &mut dyn Client, mix: &LoadMix) {
        for place in 0..self.in_flight.len() {
            // Now and then a slot stays empty: depth varies too.
            if self.in_flight[place].is_none() && self.rng.below(8) != 0 {
                let (queue, slot) = (place / self.slots, place % self.slots);
                self.in_flight[place] = Some(self.begin(client, mix, queue, slot));
            }
        }
    }

    /// Takes what has ended, and checks it; how many there were.
    #[track_caller]
    pub fn reap(&mut self, client: &mut dyn Client) -> usize {
        let before = self.counts.completed;
        for queue in 0..client.queues() {
            for (slot, outcome) in client.ended(queue) {
                let flight = self.in_flight[queue * self.slots + slot].take();
                let flight = flight.unwrap_or_else(|| {
                    panic!("seed {}: queue {queue}: a request ended twice", self.seed)
                });
                assert_eq!(outcome, Outcome::Ok, "seed {}: {:?} on {queue}", self.seed, flight.io);
                self.end(client, queue, slot, flight);
            }
        }
        (self.counts.completed - before) as usize
    }

    fn begin(
        &mut self,
        client: &mut dyn Client,
        mix: &LoadMix,
        queue: usize,
        slot: usize,
    ) -> Flight {
        let total = mix.reads + mix.writes + mix.flushes + mix.discards + mix.zeroes;
        let mut choice = self.rng.below(total);
        // After the one hit, `choice` has wrapped and hits nothing more.
        let mut chosen = |weight: u64| {
            let hit = choice < weight;
            choice = choice.wrapping_sub(weight);
            hit
        };
        let (read, write, flush) = (chosen(mix.reads), chosen(mix.writes), chosen(mix.flushes));
        let discard = chosen(mix.discards);
        let (sector, sectors) = if flush { (0, 0) } else { self.range(mix) };
        let (offset, length) = (sector * SECTOR as u64, (sectors * SECTOR as u64) as u32);
        let mut stamp = 0;
        let io = if read {
            // What the device does not overwrite must not look right.
            client.put(queue, slot, &vec![0xa5; length as usize]);
            Io::Read { offset, length }
        } else if write {
            self.stamp += 1;
            stamp = self.stamp;
            let mut bytes = vec![0; length as usize];
            self.pattern.fill(sector, stamp, &mut bytes);
            client.put(queue, slot, &bytes);
            Io::Write { offset, length }
        } else if flush {
            Io::Flush
        } else if discard {
            Io::Discard { offset, length: u64::from(length) }
        } else {
            Io::WriteZeroes { offset, length: u64::from(length), unmap: self.rng.below(2) == 0 }
        };
        self.clock += 1;
        let submitted = self.clock;
        if !matches!(io, Io::Read { .. } | Io::Flush) {
            let since = self.oldest(submitted);
            for at in sector..sector + sectors {
                let sector = &mut self.sectors[at as usize];
                sector.prune(since);
                sector.0.push(Written { stamp, submitted, completed: u64::MAX });
            }
        }
        let pieces = self.pieces(&io);
        client.submit(queue, slot, io, &pieces);
        self.counts.submitted += 1;
        Flight { io, sector, sectors, submitted }
    }

    #[track_caller]
    fn end(&mut self, client: &mut dyn Client, queue: usize, slot: usize, flight: Flight) {
        let Flight { io, sector, sectors, submitted } = flight;
        self.clock += 1;
        let now = self.clock;
        self.counts.completed += 1;
        match io {
            Io::Flush => {}
            Io::Read { length, .. } => {
                let mut bytes = vec![0; length as usize];
                client.get(queue, slot, &mut bytes);
                self.check(sector, &bytes, submitted, &format!("{io:?} on queue {queue}"));
            }
            _ => {
                for at in sector..sector + sectors {
                    let all = &mut self.sectors[at as usize].0;
                    let ours = all.iter_mut().find(|written| written.submitted == submitted);
                    ours.expect("kept while it is in flight").completed = now;
                }
            }
        }
    }

    /// When the oldest request in flight was submitted.
    fn oldest(&self, now: u64) -> u64 {
        self.in_flight.iter().flatten().map(|flight| flight.submitted).min().unwrap_or(now)
    }

    #[track_caller]
    fn check(&mut self, first: u64, bytes: &[u8], since: u64, what: &str) {
        for (index, content) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = first + index as u64;
            let sector = &self.sectors[at as usize];
            let is = |written: &Written| self.pattern.check(at, written.stamp, content).is_ok();
            let right = sector.0.iter().any(|written| sector.allows(written, since) && is(written));
            // Nobody promises that a read sees all or nothing of a write that is under way.
            let torn =
                || since != u64::MAX && sector.is_busy(since) && self.is_mix(at, content, since);
            assert!(
                right || torn(),
                "seed {}: {what}: sector {at} holds {}; allowed since {since}: {:?}",
                self.seed,
                match sector.0.iter().find(|written| is(written)) {
                    Some(stale) => format!("what was replaced: {stale:?}"),
                    None => self.name(at, content),
                },
                sector.0
            );
            self.counts.sectors_checked += 1;
        }
    }

    /// Whether each byte is one of a write that is allowed.
    fn is_mix(&self, at: u64, content: &[u8], since: u64) -> bool {
        let sector = &self.sectors[at as usize];
        let allowed = sector.0.iter().filter(|written| sector.allows(written, since));
        let zeroes = allowed.clone().find(|written| written.stamp == 0);
        let torn_zeroes = zeroes.and(self.torn_zeroes).map(|key| key(at));
        let all: Vec<[u8; SECTOR]> = allowed
            .map(|written| {
                let mut bytes = [0; SECTOR];
                self.pattern.fill(at, written.stamp, &mut bytes);
                bytes
            })
            .chain(torn_zeroes)
            .collect();
        content.iter().enumerate().all(|(index, byte)| all.iter().any(|one| one[index] == *byte))
    }

    /// What a wrong sector holds, if it is a write's.
    fn name(&self, at: u64, content: &[u8]) -> String {
        let of_stamp = |stamp| self.pattern.check(at, stamp, content).is_ok();
        match (0..=self.stamp).find(|stamp| of_stamp(*stamp)) {
            Some(stamp) => format!("the old stamp {stamp}"),
            None => format!("nobody's bytes: {:02x?}...", &content[..16]),
        }
    }

    fn range(&mut self, mix: &LoadMix) -> (u64, u64) {
        let bits = 64 - mix.sectors_max.leading_zeros() as u64;
        // Small ones are as likely as large ones.
        let limit = 1 << self.rng.below(bits);
        let length = (1 + self.rng.below(limit)).min(mix.sectors_max);
        let all = self.sectors.len() as u64;
        let places = if self.rng.below(2) == 0 { mix.hot_sectors.min(all) } else { all };
        (self.rng.below(places).min(all - length), length)
    }

    fn pieces(&mut self, io: &Io) -> Vec<u32> {
        let (Io::Read { length, .. } | Io::Write { length, .. }) = *io else { return Vec::new() };
        debug_assert!(length as usize <= SLOT_BYTES);
        let first = SECTOR as u32 * self.rng.below(u64::from(length / SECTOR as u32)) as u32;
        if first == 0 { vec![length] } else { vec![first, length - first] }
    }

    /// Reads the whole disk through the client, which has nothing in flight: each sector must
    /// hold what is allowed now.
    #[track_caller]
    pub fn read_back(&mut self, client: &mut dyn Client) {
        assert_eq!(self.in_flight(), 0, "something is in flight");
        let mut at = 0;
        while at < self.sectors.len() {
            let sectors = (SLOT_BYTES / SECTOR).min(self.sectors.len() - at);
            let bytes = client.read(0, (at * SECTOR) as u64, sectors * SECTOR);
            self.check(at as u64, &bytes, u64::MAX, "reading back");
            at += sectors;
        }
    }

    /// Likewise for a raw image.
    #[track_caller]
    pub fn check_image(&mut self, path: &Path) {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(bytes.len(), self.sectors.len() * SECTOR, "{}", path.display());
        self.check(0, &bytes, u64::MAX, &path.display().to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(stamp: u32, submitted: u64, completed: u64) -> Written {
        Written { stamp, submitted, completed }
    }

    fn allowed(all: &[Written], since: u64) -> Vec<u32> {
        let sector = Sector(all.to_vec());
        let allowed = sector.0.iter().filter(|written| sector.allows(written, since));
        allowed.map(|written| written.stamp).collect()
    }

    #[test]
    fn of_writes_one_after_the_other_the_last_counts() {
        let all = [written(0, 0, 0), written(1, 2, 4), written(2, 6, 8)];
        assert_eq!(allowed(&all, 9), [2]);
        assert_eq!(allowed(&all, 7), [1, 2], "a read submitted before the last had completed");
        assert_eq!(allowed(&all, 3), [0, 1, 2]);
    }

    #[test]
    fn of_writes_in_flight_together_each_may_be_the_last() {
        let all = [written(0, 0, 0), written(1, 2, 8), written(2, 4, 6)];
        assert_eq!(allowed(&all, 9), [1, 2]);
        let open = [written(1, 2, u64::MAX), written(2, 4, 6)];
        assert_eq!(allowed(&open, 9), [1, 2], "it may be done at any time until it completes");
    }

    #[test]
    fn a_sector_torn_between_zeroes_and_a_write_is_what_a_filter_makes_of_it() {
        let sectors = vec![Sector(vec![written(0, 0, 0), written(1, 2, 4), written(0, 6, 8)])];
        let load = |torn_zeroes| Load {
            rng: Rng::new(1),
            seed: 1,
            pattern: Pattern::new(1),
            torn_zeroes,
            sectors: sectors.clone(),
            in_flight: Vec::new(),
            slots: 0,
            clock: 9,
            stamp: 1,
            counts: LoadCounts::default(),
        };
        let (plain, changed) = (load(None), load(Some(|_| [0x5a; SECTOR])));
        let mut torn = [0x5a; SECTOR];
        plain.pattern.fill(0, 1, &mut torn);
        torn[100..].fill(0x5a);
        assert!(changed.is_mix(0, &torn, 7) && !plain.is_mix(0, &torn, 7));
        torn[100..].fill(0);
        assert!(plain.is_mix(0, &torn, 7));
        torn[511] = 0x77;
        assert!(!changed.is_mix(0, &torn, 7), "a byte that nobody writes");
    }

    #[test]
    fn what_can_be_seen_no_more_is_forgotten() {
        let mut sector = Sector(vec![written(0, 0, 0), written(1, 2, 4), written(2, 6, 8)]);
        sector.prune(5);
        assert_eq!(sector.0.len(), 2, "the first was replaced for who looks since 5");
        sector.prune(9);
        assert_eq!(sector.0.len(), 1);
    }
}
