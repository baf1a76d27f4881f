//! Filter hosts, played: what each kind of filter does with what it is sent, where it may
//! die, and what it checks meanwhile.
//!
//! Always true: a played filter keeps the contract of `upcall/filter.h` as long as it
//! lives, unless the simulation told it to talk nonsense; so what comes out wrong is the
//! worker's fault. What it is sent is checked against the rules of the chain: no request
//! twice in one life unless it is marked, and what a dead instance had not answered comes
//! to the next one in the order in which the dead one got it.

mod role;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use upcall_abi::filter::{ISSUED_MAX, request_flag, verdict};
use upcall_abi::ring::{
    Completion, NO_DATA, SUBMISSION_HEAD_OFFSET, Submission, completion_kind, submission_kind,
};
use upcall_block::Op;
use upcall_chain::{OnFailure, Recovery, RecoveryPolicy};
use upcall_worker::sim::World;

use crate::coverage::Coverage;
use crate::gaps::Change;
use crate::guest::{Kind, Request, SECTORS_MAX};
use crate::random::Random;
use crate::stamp::{Bytes, Content, SECTOR, change, parse};
use crate::trace::Trace;
pub use role::{Role, Step};
use turn::Turn;

const ECANCELED: i32 = -125;
const EIO: i32 = -5;
/// Most entries that a filter writes in one turn.
const ENTRIES_OF_A_TURN: u32 = 3;
/// Room for the data of an issued request.
const ISSUE_ROOM: u64 = (SECTORS_MAX * SECTOR) as u64;
/// Sectors behind those of the guest, for filters that keep something on the disk.
pub const OWN_SECTORS: usize = 32;

/// What a filter knows of the disk that it is on: for its checks, and for where to write.
pub struct View<'a> {
    pub disk: u32,
    /// Sectors that the guest sees.
    pub guests: usize,
    /// Keys of the changers above it: what it sees is changed with them.
    pub keys_above: &'a [u64],
    /// Requests of the guest in flight.
    pub open: &'a BTreeMap<u64, Request>,
    /// Requests that filters of a dead worker have seen.
    pub seen_before: &'a BTreeSet<u64>,
    pub now_ns: u64,
}

/// What a filter acts with.
pub struct Tools<'a> {
    pub random: &'a mut Random,
    pub coverage: &'a mut Coverage,
    pub trace: &'a mut Trace,
    /// Answers are not held back.
    pub hurries: bool,
}

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acted {
    /// There was nothing to do.
    Idle,
    Busy,
    /// It reached the point at which it was to die.
    Died,
}

#[derive(Clone, Copy, Debug)]
enum Why {
    /// It takes its time.
    Slow,
    /// It waits for a request that it issued.
    Issued,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    entry: Submission,
    why: Why,
}

/// What a filter host knows of one of its places: one slot of one engine. Lost with it.
#[derive(Debug, Default)]
pub struct Desk {
    held: Vec<Held>,
    /// By the number of an issued request: what waits for it.
    issued: BTreeMap<u64, Submission>,
    /// By request: given with a watch, and what the request is.
    watching: BTreeMap<u32, (u64, Submission)>,
    /// Not answered, by request; for checks.
    open: BTreeMap<u32, Submission>,
    /// Which of them are what writes of the guest.
    writes: BTreeMap<u32, (u64, u64)>,
    /// Writes of the guest that came down, for checks.
    seen: BTreeSet<(u64, u64)>,
    /// Requests whose answer the dead instance owed, in the order in which it got them.
    owed: Vec<Submission>,
    /// How many of them have come again, or are gone.
    owed_at: usize,
    /// In the order in which they came.
    order: Vec<Submission>,
    /// Those that came to dead instances.
    earlier: BTreeSet<(u64, u64)>,
    /// Writes of the guest whose verdict it gave, in this life or an earlier one.
    answered: BTreeSet<(u64, u64)>,
}

/// A place of a filter: its host, by number, in one engine of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub engine: usize,
    pub host: usize,
}

/// What a cache knows of a sector.
#[derive(Debug, Default)]
struct Cached {
    bytes: Option<Bytes>,
    /// Counts what made it invalid.
    epoch: u64,
    /// Writes in flight.
    writes: u32,
}

/// A filter host: one process, on all disks that have its filter.
#[derive(Debug)]
pub struct Process {
    pub role: Role,
    pub places: Vec<Place>,
    /// What becomes of requests while it is gone.
    pub on_failure: OnFailure,
    /// Decides when it is started again.
    pub recovery: Recovery,
    /// So many attempts to start it fail.
    pub failing_starts: u32,
    /// So many entries of nonsense it has to write.
    pub nonsense: u32,
    /// It has written some, in this life.
    babbled: bool,
    /// It is new, and what it fails ends its trial.
    pub is_on_trial: bool,
    /// It fails what it gets.
    pub fails: bool,
    /// The key of a changer.
    pub key: u64,
    pub up: bool,
    /// It does nothing, and is not dead.
    pub hung: bool,
    /// Where it will die.
    pub doom: Option<Step>,
    /// What it saw of changes since somebody asked.
    pub changes: Vec<Change>,
    desks: Vec<Desk>,
    cache: BTreeMap<(u32, u64), Cached>,
    /// By place and request: epochs of a read's sectors when it came.
    reads: BTreeMap<(usize, u32), Vec<u64>>,
    next_issue: u64,
}

fn number(entry: &Submission) -> u32 {
    entry.token as u32
}

fn op_of(entry: &Submission) -> Op {
    Op::from_number(entry.op).expect("an operation")
}

fn sectors_of(entry: &Submission) -> Range<u64> {
    let first = entry.offset / SECTOR as u64;
    first..first + u64::from(entry.length) / SECTOR as u64
}

fn is_retry(entry: &Submission) -> bool {
    entry.flags & request_flag::RETRY != 0
}

impl Process {
    pub fn new(role: Role, key: u64, on_failure: OnFailure, policy: RecoveryPolicy) -> Process {
        Process {
            role,
            on_failure,
            recovery: Recovery::new(policy),
            failing_starts: 0,
            nonsense: 0,
            babbled: false,
            is_on_trial: false,
            fails: false,
            places: Vec::new(),
            key,
            up: true,
            hung: false,
            doom: None,
            changes: Vec::new(),
            desks: Vec::new(),
            cache: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_issue: 0,
        }
    }

    pub fn add_place(&mut self, place: Place) {
        self.places.push(place);
        self.desks.push(Desk::default());
    }

    /// Its instances on a disk are closed: what they kept of it is not what the next ones find.
    pub fn close(&mut self, disk: u32) {
        self.cache.retain(|(other, _), _| *other != disk);
    }

    /// It is closed at a place, and what it knew there is with who takes that place.
    pub fn take_place(&mut self, place: Place) -> Desk {
        let at = self.places.iter().position(|other| *other == place).expect("a place of its");
        self.places.remove(at);
        self.reads = std::mem::take(&mut self.reads)
            .into_iter()
            .filter(|((other, _), _)| *other != at)
            .map(|((other, number), epochs)| ((other - usize::from(other > at), number), epochs))
            .collect();
        self.desks.remove(at)
    }

    /// It takes another one's place, with what the checks know of that.
    pub fn give_place(&mut self, place: Place, desk: Desk) {
        self.places.push(place);
        self.desks.push(desk);
    }

    /// All requests at a place have ended, and it knows of none. If another one takes its place,
    /// those that it watches may wait elsewhere.
    pub fn check_drained(&self, place: usize, is_replaced: bool) {
        let desk = &self.desks[place];
        let watches = !is_replaced && !desk.watching.is_empty();
        let is_drained = desk.held.is_empty() && desk.open.is_empty() && !watches;
        assert!(is_drained, "a {} leaves its disk with requests: {desk:?}", self.role.name());
    }

    /// Whether nothing is left with it.
    pub fn is_empty(&self) -> bool {
        let empty = |desk: &Desk| {
            desk.held.is_empty()
                && desk.issued.is_empty()
                && desk.open.is_empty()
                && desk.watching.is_empty()
        };
        self.desks.iter().all(empty)
    }

    /// It is dead. What it knew is lost; the checks remember what it owed, with what it had
    /// been sent and never took.
    pub fn die(&mut self, place: usize, world: &mut World) {
        let host = self.places[place].host;
        let desk = &mut self.desks[place];
        while let Some(entry) = world.hosts[host].take() {
            if matches!(entry.kind, submission_kind::START | submission_kind::DONE) {
                desk.order.push(entry);
                desk.open.insert(number(&entry), entry);
            }
        }
        let owed = desk.order.iter().filter(|entry| {
            desk.open.get(&number(entry)).is_some_and(|open| open.token == entry.token)
        });
        let owed = owed.copied().collect();
        // Whoever talked nonsense is not heard to the end.
        let answered = match self.babbled {
            true => BTreeSet::new(),
            false => std::mem::take(&mut desk.answered),
        };
        let mut earlier = std::mem::take(&mut desk.earlier);
        earlier.append(&mut desk.seen);
        *desk = Desk { owed, answered, earlier, ..Desk::default() };
    }

    /// Requests of the guest that it has seen at a place.
    pub fn seen(&self, place: usize) -> impl Iterator<Item = u64> {
        let desk = &self.desks[place];
        desk.seen.iter().chain(&desk.earlier).map(|(request, _)| *request)
    }

    /// It is dead, at all its places; see [`die`](Self::die).
    pub fn end(&mut self) {
        (self.up, self.hung, self.doom) = (false, false, None);
        (self.nonsense, self.babbled) = (0, false);
        self.cache.clear();
        self.reads.clear();
    }

    /// Whether somebody waits for it to come back.
    pub fn is_needed(&self) -> bool {
        self.on_failure != OnFailure::Detach
    }

    /// Its end of a ring says what cannot be.
    pub fn break_ring(&mut self, place: usize, world: &mut World, random: &mut Random) {
        self.babbled = true;
        let head = (random.number() as u32 | 0x8000_0000).to_le_bytes();
        let memory = &world.hosts[self.places[place].host].memory;
        memory.write(SUBMISSION_HEAD_OFFSET, &head).expect("in the ring");
    }

    /// A turn at one of its places.
    pub fn act(
        &mut self,
        place: usize,
        world: &mut World,
        view: &View,
        tools: &mut Tools,
    ) -> Acted {
        if !self.up || self.hung {
            return Acted::Idle;
        }
        if self.doom == Some(Step::Idle) {
            return Acted::Died;
        }
        let host = self.places[place].host;
        let free = world.hosts[host].channel.completions.free().expect("the worker is sane");
        if free < ENTRIES_OF_A_TURN {
            // It waits for room, as a real one does.
            return Acted::Idle;
        }
        let babbles = self.nonsense > 0;
        let mut turn = Turn { process: self, place, world, view, tools, died: false };
        let busy = if babbles { turn.babble() } else { turn.act() };
        match (turn.died, busy) {
            (true, _) => Acted::Died,
            (_, true) => Acted::Busy,
            _ => Acted::Idle,
        }
    }
}

impl Desk {
    /// Only deliveries that are open matter.
    fn forget_old(&mut self) {
        if self.order.len() > 4 * (self.open.len() + 64) {
            let open = &self.open;
            self.order.retain(|entry| {
                open.get(&number(entry)).is_some_and(|open| open.token == entry.token)
            });
        }
    }
}
