//! Random requests from a seed, and what every sector must hold after them.
//!
//! Requests in flight never overlap: their order would be nobody's promise. Everything
//! else is random: operation, place, size, queue, how the data is cut into pieces, and how
//! many are in flight.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::client::{Client, Io, Outcome, SLOT_BYTES};
use crate::pattern::{Pattern, SECTOR};
use crate::rng::Rng;

const PATIENCE: Duration = Duration::from_secs(30);
const PIECES_MAX: u64 = 6;

/// How often each operation is chosen, and how large requests are.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Mix {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub zeroes: u64,
    /// Largest read or write, in sectors.
    pub sectors_max: u64,
    /// Offsets and lengths are multiples of this many sectors.
    pub align_sectors: u64,
    /// Cut data at any byte, not only between sectors.
    pub odd_pieces: bool,
}

impl Default for Mix {
    fn default() -> Self {
        Mix {
            reads: 40,
            writes: 45,
            flushes: 3,
            discards: 6,
            zeroes: 6,
            sectors_max: (SLOT_BYTES / SECTOR) as u64,
            align_sectors: 1,
            odd_pieces: true,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    io: Io,
    stamp: u32,
    sector: u64,
    sectors: u64,
}

/// What a disk must hold, and the requests that make it so.
#[derive(Debug)]
pub struct Workload {
    rng: Rng,
    seed: u64,
    pattern: Pattern,
    stamps: Vec<u32>,
    busy: Vec<bool>,
    stamp: u32,
}

impl Workload {
    /// Makes the client's disk hold zeroes: what a new image holds is not zeroes to who
    /// reads it through a filter that changes data.
    pub fn on(seed: u64, client: &mut dyn Client) -> Workload {
        let length = client.capacity();
        let zeroes = Io::WriteZeroes { offset: 0, length, unmap: false };
        assert_eq!(client.run(0, zeroes), Outcome::Ok, "{zeroes:?}");
        Workload::new(seed, length)
    }

    /// A disk of `capacity` bytes that holds zeroes.
    pub fn new(seed: u64, capacity: u64) -> Workload {
        eprintln!("workload: UPCALL_SEED={seed}");
        let sectors = capacity as usize / SECTOR;
        Workload {
            rng: Rng::new(seed),
            seed,
            pattern: Pattern::new(seed),
            stamps: vec![0; sectors],
            busy: vec![false; sectors],
            stamp: 0,
        }
    }

    /// Runs `requests` requests and waits for the last one's end.
    pub fn run(&mut self, client: &mut dyn Client, mix: &Mix, requests: usize) {
        let places = client.queues() * client.slots();
        let mut in_flight: Vec<Option<InFlight>> = vec![None; places];
        let (mut begun, mut ended) = (0, 0);
        let mut progress = Instant::now();
        while ended < requests {
            for (place, current) in in_flight.iter_mut().enumerate() {
                // Now and then a slot stays empty: depth varies too.
                if current.is_none() && begun < requests && self.rng.below(8) != 0 {
                    let (queue, slot) = (place / client.slots(), place % client.slots());
                    if let Some(next) = self.begin(client, mix, queue, slot) {
                        *current = Some(next);
                        begun += 1;
                    }
                }
            }
            let before = ended;
            for queue in 0..client.queues() {
                for (slot, outcome) in client.ended(queue) {
                    let flight = in_flight[queue * client.slots() + slot]
                        .take()
                        .expect("a request ended twice");
                    self.end(client, queue, slot, flight, outcome);
                    ended += 1;
                }
            }
            if ended > before {
                progress = Instant::now();
            } else {
                let waiting = in_flight.iter().position(Option::is_some);
                if let Some(place) = waiting {
                    client.wait(place / client.slots(), Duration::from_millis(2));
                }
                assert!(
                    progress.elapsed() < PATIENCE,
                    "seed {}: nothing ends for {PATIENCE:?}; in flight: {:?}",
                    self.seed,
                    in_flight.iter().flatten().collect::<Vec<_>>()
                );
            }
        }
    }

    fn begin(
        &mut self,
        client: &mut dyn Client,
        mix: &Mix,
        queue: usize,
        slot: usize,
    ) -> Option<InFlight> {
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
        let (sector, sectors) = if flush { (0, 0) } else { self.range(mix)? };
        let (offset, length) = (sector * SECTOR as u64, (sectors * SECTOR as u64) as u32);
        let mut stamp = 0;
        let io = if read {
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
        let pieces = match io {
            Io::Read { .. } | Io::Write { .. } => self.pieces(mix, length),
            _ => Vec::new(),
        };
        self.mark(sector, sectors, true);
        client.submit(queue, slot, io, &pieces);
        Some(InFlight { io, stamp, sector, sectors })
    }

    fn end(
        &mut self,
        client: &mut dyn Client,
        queue: usize,
        slot: usize,
        flight: InFlight,
        outcome: Outcome,
    ) {
        let InFlight { io, stamp, sector, sectors } = flight;
        assert_eq!(outcome, Outcome::Ok, "seed {}: {io:?} on queue {queue}", self.seed);
        self.mark(sector, sectors, false);
        match io {
            Io::Read { length, .. } => {
                let mut bytes = vec![0; length as usize];
                client.get(queue, slot, &mut bytes);
                self.check(sector, &bytes, &format!("{io:?} on queue {queue}"));
            }
            Io::Flush => {}
            _ => self.stamps[sector as usize..(sector + sectors) as usize].fill(stamp),
        }
    }

    fn range(&mut self, mix: &Mix) -> Option<(u64, u64)> {
        let units = self.stamps.len() as u64 / mix.align_sectors;
        // Small ones are as likely as large ones.
        let bits = 64 - (mix.sectors_max / mix.align_sectors).leading_zeros() as u64;
        let limit = 1 << self.rng.below(bits);
        let length = (1 + self.rng.below(limit)).min(mix.sectors_max / mix.align_sectors);
        let start = self.rng.below(units - length + 1);
        let (sector, sectors) = (start * mix.align_sectors, length * mix.align_sectors);
        let busy = &self.busy[sector as usize..(sector + sectors) as usize];
        (!busy.contains(&true)).then_some((sector, sectors))
    }

    fn pieces(&mut self, mix: &Mix, length: u32) -> Vec<u32> {
        let unit = if mix.odd_pieces && self.rng.below(4) == 0 { 1 } else { SECTOR as u32 };
        let mut left = length / unit;
        let mut pieces = Vec::new();
        for _ in 1..=self.rng.below(PIECES_MAX) {
            if left > 1 {
                let piece = 1 + self.rng.below(u64::from(left - 1)) as u32;
                pieces.push(piece * unit);
                left -= piece;
            }
        }
        pieces.push(left * unit);
        pieces
    }

    fn mark(&mut self, sector: u64, sectors: u64, busy: bool) {
        self.busy[sector as usize..(sector + sectors) as usize].fill(busy);
    }

    fn compare(&self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        for (index, content) in bytes.chunks_exact(SECTOR).enumerate() {
            let sector = sector + index as u64;
            self.pattern.check(sector, self.stamps[sector as usize], content)?;
        }
        Ok(())
    }

    #[track_caller]
    fn check(&self, sector: u64, bytes: &[u8], what: &str) {
        if let Err(error) = self.compare(sector, bytes) {
            panic!("seed {}: {what}: {error}", self.seed);
        }
    }

    /// Reads the whole disk through the client, and checks every byte.
    #[track_caller]
    pub fn read_back(&self, client: &mut dyn Client) {
        self.compare_disk(client).unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
    }

    /// Reads the whole disk through the client; says which byte is the first wrong one.
    pub fn compare_disk(&self, client: &mut dyn Client) -> Result<(), String> {
        let mut sector = 0;
        while sector < self.stamps.len() {
            let sectors = (SLOT_BYTES / SECTOR).min(self.stamps.len() - sector);
            let bytes = client.read(0, (sector * SECTOR) as u64, sectors * SECTOR);
            self.compare(sector as u64, &bytes)?;
            sector += sectors;
        }
        Ok(())
    }

    /// Compares a raw image with what the disk must hold, byte for byte.
    #[track_caller]
    pub fn check_image(&self, path: &Path) {
        self.compare_image(path).unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
    }

    /// Compares a raw image with what the disk must hold; says which byte is the first
    /// wrong one.
    pub fn compare_image(&self, path: &Path) -> Result<(), String> {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        if bytes.len() != self.stamps.len() * SECTOR {
            return Err(format!("{} has {} bytes", path.display(), bytes.len()));
        }
        self.compare(0, &bytes).map_err(|error| format!("{}: {error}", path.display()))
    }
}
