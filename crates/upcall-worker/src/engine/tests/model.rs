//! Random requests through a chain of filters that watch, change, copy to a second disk and
//! hold, above stores that complete late and in any order, compared with a simple model. In
//! half of the worlds filter hosts die at every step of their work and others take their place:
//! the guest must not notice.

use std::collections::HashMap;
use std::sync::Arc;

use upcall_abi::filter::{request_flag::RETRY, verdict};
use upcall_abi::ring::{NO_DATA, Submission, submission_kind};
use upcall_block::*;
use upcall_chain::{Class, OnFailure, SlotSpec};
use upcall_ring::Buffers;
use upcall_store::MemoryStore;
use upcall_store::testing::{Faults, FaultyStore};

use crate::engine::sim::*;

const SECTOR: usize = 512;
const KEY: u8 = 0x5a;
/// The disk in zones; one request at a time in each, so that the model need not know an order.
const ZONE: u64 = 16 << 10;
const ZONES: u64 = CAPACITY / ZONE;
const WATCHER: usize = 0;
const CHANGER: usize = 1;
const COPIER: usize = 2;
const HOLDER: usize = 3;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

struct Pending {
    op: Op,
    first: usize,
    sectors: usize,
    zone: Option<u64>,
}

struct Play {
    world: World,
    random: Random,
    disk: Arc<MemoryStore>,
    copy: Arc<MemoryStore>,
    /// The byte that each sector is full of, as the guest sees it; None: nobody knows.
    model: Vec<Option<u8>>,
    /// Sectors that were written, and so must be the same in the copy.
    written: Vec<bool>,
    pending: HashMap<u32, Pending>,
    busy: Vec<bool>,
    /// What the copier holds, by the number of its copy.
    copying: HashMap<u64, Submission>,
    copies: u64,
    held: Vec<Submission>,
    cookies: HashMap<u64, u64>,
    completed: usize,
    lost: bool,
    /// Hosts die and come back.
    mortal: bool,
    down: [bool; 4],
    deaths: usize,
    may_fail: bool,
}

fn slot(class: Class, ops: OpSet, sees: OpSet, changes: OpSet) -> SlotSpec {
    SlotSpec { class, order: 0, ops, sees, changes, answers: OpSet::NONE }
}

impl Play {
    fn new(seed: u64) -> Play {
        let mut random = Random(seed);
        let errors_per_mille = if random.one_in(3) { 30 } else { 0 };
        let mortal = random.one_in(2);
        let mut lane = |store: &Arc<MemoryStore>| {
            let faults = Faults { errors_per_mille, ..Faults::reordering(random.below(1 << 60)) };
            let store = FaultyStore::new(store.clone(), faults);
            let info = store.info().clone();
            (store.open_queue().unwrap(), info)
        };
        let [disk, copy] = [(); 2].map(|()| Arc::new(MemoryStore::new(CAPACITY).unwrap()));
        let making = Making {
            specs: vec![
                slot(Class::Inspection, OpSet::ALL, OpSet::NONE, OpSet::NONE),
                slot(Class::Encryption, DATA, DATA, DATA),
                slot(Class::Cache, OpSet::ALL, DATA, OpSet::NONE),
                slot(Class::Qos, OpSet::ALL, OpSet::NONE, OpSet::NONE),
            ],
            issues: vec![false, false, true, false],
            lanes: vec![lane(&disk), lane(&copy)],
            entries: [4, 64][random.below(2) as usize],
            pages: [8, 100][random.below(2) as usize],
            plays_clock: true,
            spare_rooms: 0,
            on_failure: vec![if mortal { OnFailure::Hold } else { OnFailure::Fail }; 4],
            gaps: [(); 4].map(|()| None).into(),
            deadline_ms: 0,
            kills: true,
        };
        Play {
            world: World::new(making),
            random,
            disk,
            copy,
            model: vec![Some(KEY); CAPACITY as usize / SECTOR],
            written: vec![false; CAPACITY as usize / SECTOR],
            pending: HashMap::new(),
            busy: vec![false; ZONES as usize],
            copying: HashMap::new(),
            copies: 0,
            held: Vec::new(),
            cookies: HashMap::new(),
            completed: 0,
            lost: false,
            mortal,
            down: [false; 4],
            deaths: 0,
            may_fail: errors_per_mille > 0 || !mortal,
        }
    }

    fn submit(&mut self) {
        let op = [Op::Read, Op::Write, Op::Write, Op::WriteZeroes, Op::Flush]
            [self.random.below(5) as usize];
        if op == Op::Flush {
            let tag = self.world.submit(op, 0, 0);
            self.pending.insert(tag.0, Pending { op, first: 0, sectors: 0, zone: None });
            return;
        }
        let zone = self.random.below(ZONES);
        if std::mem::replace(&mut self.busy[zone as usize], true) {
            return;
        }
        let per_zone = ZONE / SECTOR as u64;
        let skip = self.random.below(per_zone);
        let sectors = 1 + self.random.below(per_zone - skip) as usize;
        let offset = zone * ZONE + skip * SECTOR as u64;
        let at = (zone * ZONE) as usize;
        let first = offset as usize / SECTOR;
        if op == Op::Write {
            for number in 0..sectors {
                let byte = self.random.below(256) as u8;
                self.world.guest.write(at + number * SECTOR, &[byte; SECTOR]).unwrap();
            }
        }
        let tag = self.world.submit_at(op, offset, (sectors * SECTOR) as u32, at);
        self.pending.insert(tag.0, Pending { op, first, sectors, zone: Some(zone) });
    }

    fn complete(&mut self, tag: Tag, status: Status) {
        let pending = self.pending.remove(&tag.0).expect("each request completes once");
        self.completed += 1;
        assert!(status.is_ok() || self.may_fail, "a death is no error: {status:?}");
        let Some(zone) = pending.zone else { return };
        self.busy[zone as usize] = false;
        for number in 0..pending.sectors {
            let sector = pending.first + number;
            let at = (zone * ZONE) as usize + number * SECTOR;
            let guest = self.world.guest.read_array::<SECTOR>(at).unwrap();
            match (pending.op, status) {
                (Op::Read, Ok(())) => {
                    if let Some(byte) = self.model[sector] {
                        assert_eq!(guest, [byte; SECTOR], "sector {sector}");
                    }
                }
                (Op::Read, Err(_)) => {}
                (_, Err(_)) => self.model[sector] = None,
                (op, Ok(())) => {
                    self.model[sector] = Some(if op == Op::Write { guest[0] } else { 0 });
                    self.written[sector] = true;
                }
            }
        }
    }

    fn flip(&self, entry: &Submission) {
        let data = Buffers::of(&self.world.arena, entry.data as usize, entry.length as usize, true);
        let mut bytes = vec![0; entry.length as usize];
        let data = data.expect("data in the arena");
        data.read(0, &mut bytes);
        bytes.iter_mut().for_each(|byte| *byte ^= KEY);
        data.write(0, &bytes);
    }

    /// One filter host takes an entry and acts on it.
    fn act(&mut self, host: usize) {
        if self.down[host] {
            return;
        }
        let Some(entry) = self.world.hosts[host].take() else { return };
        let dies = self.mortal && self.random.one_in(50);
        let when = self.random.below(3);
        if dies && when == 1 && host == CHANGER {
            // Half way through.
            let half = vec![self.random.below(256) as u8; entry.length as usize / 2];
            if entry.data != NO_DATA {
                self.world.arena.write(entry.data as usize, &half).unwrap();
            }
        }
        if !dies || when == 2 {
            self.work(host, entry);
        }
        if dies {
            self.die(host);
        }
    }

    /// A host dies; what it said just before is in its ring.
    fn die(&mut self, host: usize) {
        match host {
            WATCHER => self.cookies.clear(),
            COPIER => self.copying.clear(),
            HOLDER => self.held.clear(),
            _ => {}
        }
        self.down[host] = true;
        self.deaths += 1;
        self.world.lose_host(host);
    }

    fn work(&mut self, host: usize, entry: Submission) {
        let goes_down = entry.kind == submission_kind::START;
        let (pass, data) = (verdict::PASS, matches!(entry.op, 1 | 2));
        let hosts = &mut self.world.hosts;
        match host {
            WATCHER if goes_down => {
                let cookie = self.random.below(u64::MAX);
                self.cookies.insert(entry.token & 0xffff_ffff, cookie);
                hosts[host].answer_with(&entry, verdict::WATCH, 0, cookie);
            }
            WATCHER => {
                let cookie = self.cookies.remove(&(entry.token & 0xffff_ffff));
                if entry.flags & RETRY == 0 {
                    assert_eq!(cookie, Some(entry.cookie));
                } else {
                    assert_eq!(entry.cookie, 0, "that of an instance that is gone");
                }
                hosts[host].answer_with(&entry, pass, entry.status, 0);
            }
            CHANGER => {
                assert!(data, "it did not ask for anything else");
                let is_read = entry.op == Op::Read as u8;
                if goes_down != is_read && entry.status == 0 {
                    self.flip(&entry);
                }
                let verdict = if is_read && goes_down { verdict::WATCH } else { pass };
                self.world.hosts[host].answer_with(&entry, verdict, entry.status, 0);
            }
            COPIER if entry.kind == submission_kind::ISSUED => {
                let start = self.copying.remove(&entry.token).expect("a copy of ours");
                let verdict = if entry.status == 0 { pass } else { verdict::FAIL };
                hosts[host].answer_with(&start, verdict, entry.status, 0);
            }
            COPIER if entry.op == Op::Write as u8 => {
                let mut bytes = vec![0; entry.length as usize];
                self.world.arena.read(entry.data as usize, &mut bytes).unwrap();
                let id = self.copies;
                self.copies += 1;
                let at = id % 256 * ZONE;
                self.world.issue_arena.write(at as usize, &bytes).unwrap();
                hosts[host].hold(&entry);
                // To the second disk, at the same place.
                hosts[host].issue(id, 1, entry.offset, entry.length, at);
                self.copying.insert(id, entry);
            }
            HOLDER if self.random.one_in(2) => {
                hosts[host].hold(&entry);
                self.held.push(entry);
            }
            _ => hosts[host].answer_with(&entry, pass, entry.status, 0),
        }
    }

    fn step(&mut self, submits: bool) {
        let host = self.random.below(40) as usize;
        if host < 4 && self.down[host] && self.world.is_quiet(host) {
            self.world.return_host(host);
            self.down[host] = false;
        }
        match self.random.below(8) {
            0 | 1 if submits => self.submit(),
            2..=5 => {
                let host = self.random.below(4) as usize;
                self.act(host);
            }
            6 if !self.held.is_empty() => {
                let at = self.random.below(self.held.len() as u64) as usize;
                let entry = self.held.swap_remove(at);
                self.world.hosts[HOLDER].answer(&entry, verdict::PASS);
            }
            _ => {
                self.world.engine.turn();
                while let Some((tag, status)) = self.world.client.wait(std::time::Duration::ZERO) {
                    self.complete(tag, status);
                }
            }
        }
        // There is always room for an entry to answer with.
        self.world.engine.turn();
    }

    fn lose(&mut self) {
        let host = self.random.below(4) as usize;
        self.lost = true;
        if host == HOLDER {
            self.held.clear();
        }
        self.world.lose_host(host);
        self.world.engine.turn();
        while self.world.hosts[host].take().is_some() {}
    }

    fn run(mut self) -> usize {
        let loses = (!self.mortal && self.random.one_in(2)).then(|| self.random.below(3000));
        for step in 0..3000 {
            self.step(true);
            if loses == Some(step) {
                self.lose();
            }
        }
        self.mortal = false;
        for _ in 0..200_000 {
            if self.pending.is_empty() && self.copying.is_empty() && self.down == [false; 4] {
                break;
            }
            if self.lost && self.pending.is_empty() {
                break;
            }
            self.step(false);
        }
        assert!(self.pending.is_empty(), "{} requests never end", self.pending.len());
        assert!(self.completed > 100);
        // Copies whose issuer is gone end all the same.
        for _ in 0..1000 {
            self.world.engine.turn();
        }
        self.world.assert_empty();
        assert_eq!(self.world.given_up.lock().unwrap().len(), 0);
        assert!(self.world.log.lock().unwrap().is_empty(), "{:?}", self.world.log);
        let content = |store: &MemoryStore| {
            let fd = upcall_ring::memfd("content", CAPACITY as usize).unwrap();
            let access = upcall_ring::Access::ReadWrite;
            let memory =
                Arc::new(upcall_ring::Mapping::new(&fd, 0, CAPACITY as usize, access).unwrap());
            let mut queue = store.open_queue().unwrap();
            queue.submit(StoreIo {
                token: StoreToken(0),
                op: Op::Read,
                range: Range::new(0, CAPACITY, store.info()).unwrap(),
                flags: RequestFlags::default(),
                data: Buffers::of(&memory, 0, CAPACITY as usize, true).unwrap(),
            });
            queue.poll(&mut Vec::new());
            memory
        };
        let (disk, copy) = (content(&self.disk), content(&self.copy));
        for (sector, known) in self.model.iter().enumerate() {
            let Some(byte) = known else { continue };
            let at = sector * SECTOR;
            assert_eq!(disk.read_array(at), Some([byte ^ KEY; SECTOR]), "sector {sector}");
            if self.written[sector] {
                assert_eq!(copy.read_array(at), Some([byte ^ KEY; SECTOR]), "copy of {sector}");
            }
        }
        self.deaths
    }
}

#[test]
fn whatever_the_guest_the_filters_and_the_stores_do_data_is_as_in_the_model() {
    let seeds = match std::env::var("UPCALL_SEED") {
        Ok(seed) => vec![seed.parse().expect("UPCALL_SEED is a number")],
        Err(_) => (0..150).collect::<Vec<u64>>(),
    };
    let (count, mut deaths, begun) = (seeds.len(), 0, std::time::Instant::now());
    for seed in seeds {
        match std::panic::catch_unwind(|| Play::new(seed).run()) {
            Ok(died) => deaths += died,
            Err(_) => panic!("failed with UPCALL_SEED={seed}"),
        }
    }
    assert!(count == 1 || deaths > count, "only {deaths} deaths");
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "ledger: {{\"kind\":\"engine model, hosts die and come back\",\"seeds\":{count},\
         \"faults\":{deaths},\"seconds\":{seconds:.1},\"result\":\"ok\"}}"
    );
}
