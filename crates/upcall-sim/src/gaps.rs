//! What bypassed filters miss, recorded on a played medium: a mark takes its time, may fail,
//! and one that is under way when the worker dies is made or not.
//!
//! Always true: a mark that somebody was told of is there for ever, whatever dies.

use upcall_worker::sim::{GapKeeper, Record};

use crate::random::Random;

/// The record of one slot of a disk: what is durable, and the queues that mark there.
#[derive(Default)]
pub struct Gaps {
    record: Record,
    ways: Vec<GapKeeper>,
}

impl Gaps {
    /// The way of another queue of this worker's life.
    pub fn way(&mut self) -> GapKeeper {
        let way = GapKeeper::of(&self.record);
        self.ways.push(way.clone());
        way
    }

    /// Makes one of the marks that were asked for, or fails to; None if there is none.
    pub fn act(&mut self, random: &mut Random, fails: bool) -> Option<bool> {
        let asking: Vec<usize> =
            (0..self.ways.len()).filter(|way| self.ways[*way].asked() > 0).collect();
        if asking.is_empty() {
            return None;
        }
        let way = &self.ways[random.pick(&asking)];
        let status = if fails { Err(upcall_block::Errno::EIO) } else { Ok(()) };
        way.make_one(random.below(way.asked()), status);
        Some(!fails)
    }

    /// The worker is dead. What it had asked for is made or not, and nobody is told.
    pub fn lose_worker(&mut self, random: &mut Random) {
        for way in self.ways.drain(..) {
            while way.asked() > 0 {
                let status = if random.one_in(2) { Ok(()) } else { Err(upcall_block::Errno::EIO) };
                way.make_one(0, status);
            }
        }
    }

    /// Whether it is known that the filter may have missed a sector.
    pub fn has(&self, sector: usize) -> bool {
        self.record.has(sector as u64)
    }
}

/// Which changes a filter has seen, by sector: when it last did. For checks; not lost when it
/// dies, for what it then does with what it saw is its own matter.
#[derive(Default)]
pub struct Seen {
    /// Came to it.
    met: Vec<u64>,
    /// It has let go of for good, with a verdict that the worker had.
    ended: Vec<u64>,
}

impl Seen {
    /// Of a disk with so many sectors.
    pub fn new(sectors: usize) -> Seen {
        Seen { met: vec![0; sectors], ended: vec![0; sectors] }
    }

    pub fn note(&mut self, change: &Change, moment: u64) {
        let into = if change.ended { &mut self.ended } else { &mut self.met };
        for sector in change.sectors.clone() {
            if let Some(last) = into.get_mut(sector as usize) {
                *last = moment;
            }
        }
    }

    pub fn met_since(&self, sector: usize, moment: u64) -> bool {
        self.met[sector] > moment
    }

    pub fn ended_since(&self, sector: usize, moment: u64) -> bool {
        self.ended[sector] > moment
    }
}

/// A change of the disk that a filter was asked about.
#[derive(Clone, Debug)]
pub struct Change {
    pub host: usize,
    pub sectors: std::ops::Range<u64>,
    /// It has let go of it; otherwise, it has just got it.
    pub ended: bool,
}
