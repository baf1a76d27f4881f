//! A medium that crashes, and the promise checked on it: a mark that was reported is found
//! again, whatever bytes of what was not synced survive; exhaustively for small traces, and
//! from seeds for large ones.

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use upcall_ring::Inbox;

use crate::file::{GapFile, read_pages};
use crate::map::{ClearId, Map};
use crate::medium::Medium;
use crate::span::{GRANULE, Span};
use crate::syncer::{Asked, Mark, Shared, Syncer};
use crate::{MarkDone, MarkToken};

/// Five pages, the last a part of one.
const GRANULES: u64 = 17_000;
const CAPACITY: u64 = GRANULES * GRANULE;
const ID: [u8; 16] = [9; 16];

/// What is durable, and what was written since the last sync, in order.
#[derive(Clone, Default)]
struct Disk {
    durable: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Calls (writes and syncs) until one fails.
    fails_in: Option<u32>,
}

/// The medium, shared with the test that looks at it.
#[derive(Clone, Default)]
struct Simulated(Arc<Mutex<Disk>>);

impl Disk {
    fn apply(bytes: &mut Vec<u8>, at: u64, data: &[u8]) {
        let end = at as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at as usize..end].copy_from_slice(data);
    }

    fn count_call(&mut self) -> io::Result<()> {
        match &mut self.fails_in {
            Some(0) => {
                self.fails_in = None;
                Err(io::Error::from_raw_os_error(28))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What is left after a crash, if of unsynced write `i` the parts survive that
    /// `survives(i, byte)` says.
    fn crashed(&self, mut survives: impl FnMut(usize, usize) -> bool) -> Simulated {
        let mut durable = self.durable.clone();
        for (index, (at, data)) in self.unsynced.iter().enumerate() {
            for (byte, value) in data.iter().enumerate() {
                if survives(index, byte) {
                    Disk::apply(&mut durable, at + byte as u64, &[*value]);
                }
            }
        }
        Simulated(Arc::new(Mutex::new(Disk { durable, ..Disk::default() })))
    }
}

impl Medium for Simulated {
    fn read_at(&mut self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let disk = self.0.lock().unwrap();
        let mut now = disk.durable.clone();
        disk.unsynced.iter().for_each(|(at, data)| Disk::apply(&mut now, *at, data));
        let from = (at as usize).min(now.len());
        let length = bytes.len().min(now.len() - from);
        bytes[..length].copy_from_slice(&now[from..from + length]);
        Ok(length)
    }

    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.count_call()?;
        disk.unsynced.push((at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if let Err(error) = disk.count_call() {
            // The worst a kernel does: it forgets what it could not write.
            disk.unsynced.clear();
            return Err(error);
        }
        for (at, data) in std::mem::take(&mut disk.unsynced) {
            Disk::apply(&mut disk.durable, at, &data);
        }
        Ok(())
    }
}

/// A gap file with its syncer, driven by hand, and what must be found after a crash.
struct World {
    disk: Simulated,
    syncer: Syncer<Simulated>,
    inbox: Arc<Inbox<MarkDone>>,
    /// Reported as marked, and not cleared since.
    promised: BTreeSet<u64>,
    /// Ever asked to be marked, and not cleared durably since.
    allowed: BTreeSet<u64>,
}

impl World {
    fn new() -> World {
        let disk = Simulated::default();
        let (file, map) = GapFile::create(disk.clone(), ID, CAPACITY).ok().unwrap();
        World::on(disk, file, map)
    }

    fn on(disk: Simulated, file: GapFile<Simulated>, map: Map) -> World {
        let syncer = Syncer { shared: Arc::new(Shared::new(map)), file };
        let inbox = Arc::new(Inbox::new().unwrap());
        let (promised, allowed) = Default::default();
        World { disk, syncer, inbox, promised, allowed }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.syncer.shared
    }

    /// One round; what was reported as made becomes a promise. Whether it was made.
    fn round(&mut self, marks: &[Span], clears: &[(ClearId, Span)]) -> bool {
        let mut asked = Asked::default();
        for (index, span) in marks.iter().enumerate() {
            self.allowed.extend(span.first..span.end);
            let (token, inbox) = (MarkToken(index as u64), self.inbox.clone());
            asked.marks.push(Mark { span: *span, token, inbox });
        }
        let mut answers = vec![];
        for (id, span) in clears {
            // From now on nothing in it is promised, but for what is marked again.
            (span.first..span.end).for_each(|granule| {
                self.promised.remove(&granule);
            });
            let (answer, answered) = mpsc::channel();
            asked.clears.push((*id, answer));
            answers.push(answered);
        }
        self.syncer.carry_out(asked);
        let mut is_made = true;
        let mut done = vec![];
        self.inbox.take(&mut done);
        assert_eq!(done.len(), marks.len(), "each mark ends once");
        for MarkDone { token, status } in done {
            let span = marks[token.0 as usize];
            is_made &= status.is_ok();
            if status.is_ok() {
                assert!(self.shared().known.contains(span));
                self.promised.extend(span.first..span.end);
            }
        }
        answers.iter().for_each(|answer| drop(answer.try_recv().unwrap()));
        is_made
    }

    /// Whatever survives, what is promised is found.
    fn check(&self, survives: impl FnMut(usize, usize) -> bool, is_torn: bool) {
        let after = self.disk.0.lock().unwrap().crashed(survives);
        let (_, map, damage) = GapFile::open(after, [1; 16], CAPACITY).ok().unwrap();
        let found = granules_of(&map);
        let lost: Vec<_> = self.promised.difference(&found).collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
        if !is_torn {
            assert!(!damage.is_some());
            let invented: Vec<_> = found.difference(&self.allowed).collect();
            assert!(invented.is_empty(), "never marked: {invented:?}");
        }
    }
}

fn granules_of(map: &Map) -> BTreeSet<u64> {
    let ranges = map.ranges().into_iter();
    ranges.flat_map(|gap| gap.offset / GRANULE..(gap.offset + gap.length) / GRANULE).collect()
}

/// A medium that stops at its `n`th call and keeps what was unsynced, as a crash there would.
struct Snapshots(Simulated, Arc<Mutex<Vec<Disk>>>);

impl Medium for Snapshots {
    fn read_at(&mut self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        self.0.read_at(bytes, at)
    }
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.0.write_at(bytes, at)?;
        self.1.lock().unwrap().push(self.0.0.lock().unwrap().clone());
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync()?;
        self.1.lock().unwrap().push(self.0.0.lock().unwrap().clone());
        Ok(())
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Where a write is torn in the exhaustive test: how many bytes of it survive, from the front
/// (positive) or from the back.
const TEARS: [i64; 16] =
    [0, 1, 8, 9, 256, 508, 511, 512, 700, 1 << 20, -1, -4, -8, -256, -511, -700];

fn survives_tear(tear: i64, byte: usize, length: usize) -> bool {
    if tear >= 0 { (byte as i64) < tear } else { byte as i64 >= length as i64 + tear }
}

#[test]
fn no_reported_mark_is_lost_in_any_crash_with_any_tearing_of_small_traces() {
    // Each trace: rounds of marks; each span is on pages of its own.
    let spans = [
        Span { first: 0, end: 1 },
        Span { first: 3, end: 70 },
        Span { first: 4031, end: 4033 },
        Span { first: 16_990, end: 17_000 },
        Span { first: 8100, end: 8101 },
    ];
    let mut crashes = 0u64;
    for one in spans {
        for two in spans {
            for three in spans {
                let taken = Arc::new(Mutex::new(vec![]));
                let disk = Simulated::default();
                let medium = Snapshots(disk, taken.clone());
                let (file, map) = GapFile::create(medium, ID, CAPACITY).ok().unwrap();
                let shared = Arc::new(Shared::new(map));
                let mut syncer = Syncer { shared, file };
                let inbox = Arc::new(Inbox::new().unwrap());
                let mut promised = BTreeSet::new();
                for marks in [vec![one], vec![two, three]] {
                    taken.lock().unwrap().clear();
                    let mut asked = Asked::default();
                    for span in &marks {
                        let (token, inbox) = (MarkToken(0), inbox.clone());
                        asked.marks.push(Mark { span: *span, token, inbox });
                    }
                    syncer.carry_out(asked);
                    for disk in taken.lock().unwrap().iter() {
                        crashes += crash_in_every_way(disk, &promised);
                    }
                    let mut done = vec![];
                    inbox.take(&mut done);
                    assert!(done.len() == marks.len() && done.iter().all(|d| d.status.is_ok()));
                    marks.iter().for_each(|span| promised.extend(span.first..span.end));
                }
                let end = taken.lock().unwrap().last().cloned();
                if let Some(disk) = end {
                    crash_in_every_way(&disk, &promised);
                }
            }
        }
    }
    println!("{crashes} crashes");
    assert!(crashes > 5_000);
}

/// Every combination of tears of the unsynced writes.
fn crash_in_every_way(disk: &Disk, promised: &BTreeSet<u64>) -> u64 {
    let writes = disk.unsynced.len() as u32;
    let ways = (TEARS.len() as u64).pow(writes);
    for way in 0..ways {
        let tear = |index: usize| {
            TEARS[(way / (TEARS.len() as u64).pow(index as u32)) as usize % TEARS.len()]
        };
        let after = disk
            .crashed(|index, byte| survives_tear(tear(index), byte, disk.unsynced[index].1.len()));
        let (_, map, _) = GapFile::open(after, [1; 16], CAPACITY).ok().unwrap();
        let is_found = |granule: u64| map.words()[granule as usize / 64] >> (granule % 64) & 1 == 1;
        assert!(promised.iter().all(|granule| is_found(*granule)), "way {way}");
    }
    ways
}

#[test]
fn long_random_traces_with_clears_errors_and_crashes_lose_no_reported_mark() {
    for seed in 1..=60u64 {
        println!("seed {seed}");
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut world = World::new();
        let mut clears: Vec<(ClearId, Span, BTreeSet<u64>)> = vec![];
        for _ in 0..40 {
            let span = |rng: &mut Rng| {
                let first = rng.below(GRANULES);
                let longest = if rng.below(4) == 0 { 5000 } else { 4 };
                let length = 1 + rng.below(longest);
                Span { first, end: (first + length).min(GRANULES) }
            };
            if rng.below(3) == 0 {
                let span = span(&mut rng);
                clears.push((world.shared().begin_clear(span), span, BTreeSet::new()));
            }
            let marks: Vec<_> = (0..rng.below(4)).map(|_| span(&mut rng)).collect();
            let finish = if !clears.is_empty() && rng.below(3) == 0 {
                let index = rng.below(clears.len() as u64) as usize;
                Some(clears.remove(index))
            } else {
                None
            };
            if rng.below(5) == 0 {
                world.disk.0.lock().unwrap().fails_in = Some(rng.below(3) as u32);
            }
            // What was promised again since the clear began must outlive it.
            let kept = finish.as_ref().map(|(_, _, again)| again.clone()).unwrap_or_default();
            if let Some((_, span, _)) = &finish {
                // It takes what other clears would spare.
                for (_, _, again) in &mut clears {
                    again.retain(|mark| {
                        kept.contains(mark) || !(span.first..span.end).contains(mark)
                    });
                }
            }
            let finish: Vec<_> = finish.iter().map(|(id, span, _)| (*id, *span)).collect();
            let is_made = world.round(&marks, &finish);
            world.promised.extend(kept);
            if is_made {
                for (_, span, again) in &mut clears {
                    let asked = marks.iter().flat_map(|mark| mark.first..mark.end);
                    again.extend(asked.filter(|granule| (span.first..span.end).contains(granule)));
                }
            }
            world.disk.0.lock().unwrap().fails_in = None;
            let mut coin = Rng(rng.below(u64::MAX) | 1);
            // Pages survive whole or not at all, or in pieces.
            let whole: Vec<bool> = (0..64).map(|_| coin.below(2) == 0).collect();
            world.check(|index, _| whole[index % 64], false);
            world.check(|_, byte| (byte / 64 + whole[byte % 64] as usize).is_multiple_of(2), true);
        }
    }
}

#[test]
fn a_mark_whose_write_or_sync_fails_is_reported_so_and_is_asked_for_again() {
    for fails_in in 0..2 {
        let mut world = World::new();
        let span = Span { first: 5, end: 6 };
        world.disk.0.lock().unwrap().fails_in = Some(fails_in);
        world.round(&[span], &[]);
        assert!(world.promised.is_empty(), "it was reported as failed");
        assert!(!world.shared().known.contains(span), "known only when durable");
        world.round(&[span], &[]);
        assert_eq!(world.promised.len(), 1);
        world.check(|_, _| false, false);
    }
}

#[test]
fn a_rotten_page_counts_as_wholly_marked_and_the_others_as_they_are() {
    let mut world = World::new();
    world.round(&[Span { first: 4032, end: 4033 }], &[]);
    world.disk.0.lock().unwrap().durable[8192 + 17] ^= 4;
    let after = world.disk.0.lock().unwrap().crashed(|_, _| false);
    let (_, map, damage) = GapFile::open(after.clone(), [1; 16], CAPACITY).ok().unwrap();
    assert_eq!((damage.headers, damage.pages), (false, 1));
    assert_eq!(granules_of(&map), (0..4033).collect());
    let (_, map, damage) = GapFile::open(after, [1; 16], CAPACITY).ok().unwrap();
    assert!(!damage.is_some(), "it was written down");
    assert_eq!(granules_of(&map), (0..4033).collect());
}

#[test]
fn one_damaged_header_matters_nothing_and_two_mark_everything() {
    let mut world = World::new();
    world.round(&[Span { first: 1, end: 2 }], &[]);
    let rot = |at: &[usize]| {
        let after = world.disk.0.lock().unwrap().crashed(|_, _| false);
        at.iter().for_each(|at| after.0.lock().unwrap().durable[*at] ^= 1);
        GapFile::open(after, [1; 16], CAPACITY).ok().unwrap()
    };
    for at in [0, 4096] {
        let (_, map, damage) = rot(&[at]);
        assert_eq!((granules_of(&map), damage.is_some()), (BTreeSet::from([1]), false));
    }
    let (_, map, damage) = rot(&[0, 4096]);
    assert!(damage.headers);
    assert_eq!(granules_of(&map).len() as u64, GRANULES);
}

#[test]
fn a_file_cut_off_counts_as_marked_from_there() {
    let mut world = World::new();
    world.round(&[], &[]);
    let after = world.disk.0.lock().unwrap().crashed(|_, _| false);
    after.0.lock().unwrap().durable.truncate(8192 + 512 + 511);
    let (_, map, damage) = GapFile::open(after, [1; 16], CAPACITY).ok().unwrap();
    assert_eq!(damage.pages, 4);
    assert_eq!(granules_of(&map), (4032..GRANULES).collect());
}

#[test]
fn a_crash_while_the_file_is_repaired_or_grows_loses_nothing() {
    let mut world = World::new();
    world.round(&[Span { first: 1, end: 9 }], &[]);
    let before = world.disk.0.lock().unwrap().crashed(|_, _| false);
    before.0.lock().unwrap().durable[8192 + 512] ^= 1;
    let taken = Arc::new(Mutex::new(vec![]));
    let medium = Snapshots(before, taken.clone());
    let (_, map, _) = GapFile::open(medium, [1; 16], 3 * CAPACITY).ok().unwrap();
    let all = granules_of(&map);
    assert_eq!(all, (1..9).chain(4032..8064).collect());
    let mut rng = Rng(77);
    for disk in taken.lock().unwrap().iter() {
        for _ in 0..200 {
            let cut = rng.below(512) as usize;
            let mode = rng.below(4);
            let after = disk.crashed(|_, byte| match mode {
                0 => false,
                1 => true,
                2 => byte % 512 < cut,
                _ => byte % 512 >= cut,
            });
            let (_, map, _) = GapFile::open(after, [2; 16], CAPACITY).ok().unwrap();
            assert!(all.is_subset(&granules_of(&map)));
        }
    }
}

#[test]
fn marks_of_a_disk_that_shrank_are_there_again_when_it_grows() {
    let mut world = World::new();
    world.round(&[Span { first: 8500, end: 8501 }], &[]);
    let (file, map, _) = GapFile::open(world.disk.clone(), ID, 100 * GRANULE).ok().unwrap();
    assert!(granules_of(&map).is_empty());
    let (mut file, mut map) = (file, map);
    file.grow(&mut map, CAPACITY).unwrap();
    assert_eq!(granules_of(&map), BTreeSet::from([8500]));
    file.grow(&mut map, 2 * CAPACITY).unwrap();
    let mut seen = 0;
    read_pages(&mut world.disk, &ID, 0..9, |_, bits| seen += u64::from(bits.is_some()));
    assert_eq!(seen, 9);
    assert_eq!(granules_of(&map), BTreeSet::from([8500]));
}
