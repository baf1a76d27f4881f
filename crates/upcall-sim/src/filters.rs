//! Filter hosts, played: what each kind of filter does with what it is sent, where it may
//! die, and what it checks meanwhile.
//!
//! Always true: a played filter keeps the contract of `upcall/filter.h` as long as it
//! lives, unless the simulation told it to talk nonsense; so what comes out wrong is the
//! worker's fault. What it is sent is checked against the rules of the chain: no request
//! twice in one life unless it is marked, and what a dead instance had not answered comes
//! to the next one in the order in which the dead one got it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use upcall_abi::filter::{ISSUED_MAX, request_flag, verdict};
use upcall_abi::ring::{
    Completion, NO_DATA, SUBMISSION_HEAD_OFFSET, Submission, completion_kind, submission_kind,
};
use upcall_block::{Op, OpSet};
use upcall_chain::{Class, OnFailure, Recovery, RecoveryPolicy, SlotSpec};
use upcall_worker::sim::World;

use crate::coverage::Coverage;
use crate::gaps::Change;
use crate::guest::{Kind, Request, SECTORS_MAX};
use crate::random::Random;
use crate::stamp::{Bytes, Content, SECTOR, change, parse};
use crate::trace::Trace;

const ECANCELED: i32 = -125;
const EIO: i32 = -5;
/// Most entries that a filter writes in one turn.
const ENTRIES_OF_A_TURN: u32 = 3;
/// Room for the data of an issued request.
const ISSUE_ROOM: u64 = (SECTORS_MAX * SECTOR) as u64;
/// Sectors behind those of the guest, for filters that keep something on the disk.
pub const OWN_SECTORS: usize = 32;

/// What a filter does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Gets no data; watches.
    Watcher,
    /// Gets data, and sees whether it is right.
    Observer,
    /// Changes data, both ways.
    Changer,
    /// Writes to a second disk what goes to the first.
    Splitter,
    /// Notes writes in a place of its own on the disk, below itself, before they go on.
    Journal,
    /// Answers reads of what it has seen.
    Cache,
    /// Holds requests for a while.
    Holder,
    /// Gets data, next to the store.
    Recorder,
}

impl Role {
    /// In the order of a chain.
    pub const ALL: [Role; 8] = [
        Role::Watcher,
        Role::Observer,
        Role::Changer,
        Role::Splitter,
        Role::Journal,
        Role::Cache,
        Role::Holder,
        Role::Recorder,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Role::Watcher => "watcher",
            Role::Observer => "observer",
            Role::Changer => "changer",
            Role::Splitter => "splitter",
            Role::Journal => "journal",
            Role::Cache => "cache",
            Role::Holder => "holder",
            Role::Recorder => "recorder",
        }
    }

    /// What it declares.
    pub fn spec(self) -> SlotSpec {
        let data = OpSet::NONE.with(Op::Read).with(Op::Write);
        let (all, none) = (OpSet::ALL, OpSet::NONE);
        let (class, order, ops, sees, changes, answers) = match self {
            Role::Watcher => (Class::Inspection, 0, all, none, none, none),
            Role::Observer => (Class::Inspection, 1, all, data, none, none),
            Role::Changer => (Class::Encryption, 0, data, data, data, none),
            Role::Splitter => {
                let changing = all.without(Op::Read).without(Op::Flush);
                (Class::Replication, 0, changing, none.with(Op::Write), none, none)
            }
            Role::Journal => (Class::Replication, 1, none.with(Op::Write), none, none, none),
            Role::Cache => (Class::Cache, 0, all, data, none, none.with(Op::Read)),
            Role::Holder => (Class::Qos, 0, all, none, none, none),
            Role::Recorder => (Class::Capture, 0, all, data, none, none),
        };
        SlotSpec { class, order, ops, sees, changes, answers }
    }

    pub fn issues(self) -> bool {
        matches!(self, Role::Splitter | Role::Journal)
    }

    /// Where it can die.
    pub fn steps(self) -> &'static [Step] {
        use Step::*;
        match self {
            Role::Watcher => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Observer | Role::Recorder => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Changer => &[
                Idle,
                Taken,
                HalfChanged,
                Changed,
                Answered,
                Held,
                DoneTaken,
                DoneHalfChanged,
                DoneChanged,
                DoneAnswered,
            ],
            Role::Splitter | Role::Journal => &[Idle, Taken, Held, Issued, ResultTaken, Answered],
            Role::Cache => &[Idle, Taken, Answered, DoneTaken, DoneAnswered],
            Role::Holder => &[Idle, Taken, Held, Answered, CancelTaken, DoneTaken, DoneAnswered],
        }
    }
}

/// A point in a filter host's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Between two entries.
    Idle,
    /// A request was taken, and nothing is done yet.
    Taken,
    /// Some of its data is changed.
    HalfChanged,
    /// All of it is, and it is not answered.
    Changed,
    /// It is answered, and nobody was woken.
    Answered,
    /// It is held.
    Held,
    /// A request of its own was issued.
    Issued,
    /// How that ended was taken.
    ResultTaken,
    /// A cancel was taken.
    CancelTaken,
    /// A completion was taken.
    DoneTaken,
    DoneHalfChanged,
    DoneChanged,
    DoneAnswered,
}

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

/// One turn of a process at a place.
struct Turn<'a, 'b> {
    process: &'a mut Process,
    place: usize,
    world: &'a mut World,
    view: &'a View<'a>,
    tools: &'a mut Tools<'b>,
    died: bool,
}

impl Turn<'_, '_> {
    fn desk(&mut self) -> &mut Desk {
        &mut self.process.desks[self.place]
    }

    fn host(&self) -> usize {
        self.process.places[self.place].host
    }

    /// Whether it dies here.
    fn reaches(&mut self, step: Step) -> bool {
        self.died |= self.process.doom == Some(step);
        self.died
    }

    fn note(&mut self, what: std::fmt::Arguments) {
        let Turn { process, place, view, tools, .. } = self;
        let Place { engine, host } = process.places[*place];
        let name = process.role.name();
        tools
            .trace
            .add(view.now_ns, format_args!("  {name} (engine {engine}, host {host}) {what}"));
    }

    fn act(&mut self) -> bool {
        let held = self.desk().held.len();
        if held > 0 && (self.tools.hurries || self.tools.random.one_in(3)) {
            let at = self.tools.random.below(held);
            if matches!(self.desk().held[at].why, Why::Slow) {
                let Held { entry, .. } = self.desk().held.swap_remove(at);
                self.note(format_args!("answers {:#x}, which it held", entry.token));
                self.go_on(&entry);
                return true;
            }
        }
        let host = self.host();
        let Some(entry) = self.world.hosts[host].take() else { return false };
        match entry.kind {
            submission_kind::START => self.start(&entry),
            submission_kind::DONE => self.done(&entry),
            submission_kind::CANCEL => self.cancelled(&entry),
            submission_kind::ISSUED => self.result(&entry),
            kind => panic!("a submission of kind {kind}"),
        }
        true
    }

    /// Writes what no filter host of ours would write.
    fn babble(&mut self) -> bool {
        self.process.nonsense -= 1;
        self.process.babbled = true;
        let host = self.host();
        let random = &mut self.tools.random;
        // A delivery that there never was: serials do not come so far.
        let token = random.number() | 1 << 63;
        let mut entry = Completion { token, cookie: random.number(), ..Completion::default() };
        entry.kind = random.pick(&[
            completion_kind::VERDICT,
            completion_kind::HELD,
            completion_kind::ISSUE,
            0,
            77,
        ]);
        entry.code = random.number() as u8;
        entry.status = random.number() as i32;
        if entry.kind == completion_kind::ISSUE {
            // Too long, whoever it is from.
            (entry.offset, entry.length) = (random.number(), u32::MAX);
        }
        self.world.hosts[host].say(entry);
        self.note(format_args!("says nonsense"));
        true
    }

    // ------------------------------------------------------------------ checks

    /// Rules of the chain that every delivery keeps.
    fn check(&mut self, entry: &Submission) {
        let desk = self.desk();
        let again = desk.open.insert(number(entry), *entry);
        assert!(again.is_none(), "{entry:?} is delivered and {again:?} is not answered");
        desk.order.push(*entry);
        if is_retry(entry) {
            let same = |owed: &Submission| {
                (owed.kind, number(owed), owed.op) == (entry.kind, number(entry), entry.op)
                    && (owed.offset, owed.length) == (entry.offset, entry.length)
            };
            if let Some(at) = desk.owed.iter().position(same) {
                assert!(at >= desk.owed_at, "{entry:?} comes again after one that had come later");
                desk.owed_at = at + 1;
                self.tools.coverage.count("seen: delivered again");
            }
        }
        self.desk().forget_old();
    }

    /// The data of a request as the guest sees it.
    fn plain(&self, entry: &Submission) -> Vec<Bytes> {
        let sectors = sectors_of(entry);
        let read = |sector: u64| {
            let at = entry.data as usize + (sector - sectors.start) as usize * SECTOR;
            let mut bytes = self.world.arena.read_array(at).expect("data in the arena");
            for key in self.view.keys_above {
                change(&mut bytes, *key, sector as u32);
            }
            bytes
        };
        sectors.clone().map(read).collect()
    }

    /// The data of a write is what the guest wrote, whole; and it comes once.
    fn check_write(&mut self, entry: &Submission) {
        if op_of(entry) != Op::Write || entry.data == NO_DATA {
            return;
        }
        let first = sectors_of(entry).start;
        if first >= self.view.guests as u64 {
            return;
        }
        for (number, bytes) in self.plain(entry).iter().enumerate() {
            let sector = first + number as u64;
            let content = parse(bytes);
            let covers = |request: &Request| request.sectors.contains(&(sector as usize));
            let good = match content {
                Content::Stamp { disk, sector: at, request } => {
                    let open = self.view.open.get(&request);
                    let whose = (disk, u64::from(at)) == (self.view.disk, sector);
                    whose && open.is_some_and(covers)
                }
                Content::Zero => self.view.open.values().any(|request| {
                    matches!(request.kind, Kind::WriteZeroes { .. }) && covers(request)
                }),
                Content::Garbage => false,
            };
            assert!(
                good,
                "a {} is given {content:?} as sector {sector} of {entry:?}, which nobody in \
                 flight writes there",
                self.process.role.name()
            );
        }
        if let Content::Stamp { request, .. } = parse(&self.plain(entry)[0]) {
            let answered = self.desk().answered.contains(&(request, entry.offset));
            assert!(
                !answered,
                "a {} gets request {request} again, which it had answered: {entry:?}",
                self.process.role.name()
            );
            self.desk().writes.insert(number(entry), (request, entry.offset));
            let new = self.desk().seen.insert((request, entry.offset));
            let new = new
                && !self.view.seen_before.contains(&request)
                && !self.desk().earlier.contains(&(request, entry.offset));
            assert!(
                new || is_retry(entry),
                "a {} sees request {request} twice, unmarked: {entry:?}",
                self.process.role.name()
            );
        }
    }

    // ----------------------------------------------------------------- answers

    /// It has got or let go of a request that changes the disk.
    fn note_change(&mut self, entry: &Submission, ended: bool) {
        if op_of(entry).is_modification() {
            let (host, sectors) = (self.host(), sectors_of(entry));
            self.process.changes.push(Change { host, sectors, ended });
        }
    }

    fn answer(&mut self, to: &Submission, code: u8, status: i32, cookie: u64) {
        self.note(format_args!("answers {:#x} with verdict {code}, status {status}", to.token));
        if to.kind == submission_kind::DONE || code == verdict::PASS {
            self.note_change(to, true);
        }
        self.desk().open.remove(&number(to));
        if let Some(write) = self.desk().writes.remove(&number(to)) {
            self.desk().answered.insert(write);
        }
        let host = self.host();
        self.world.hosts[host].answer_with(to, code, status, cookie);
    }

    fn hold(&mut self, entry: &Submission, why: Why) {
        self.note(format_args!("holds {:#x}", entry.token));
        let host = self.host();
        self.world.hosts[host].hold(entry);
        self.desk().held.push(Held { entry: *entry, why });
    }

    /// Passes a request on, and watches it.
    fn watch(&mut self, entry: &Submission) {
        let cookie = self.tools.random.number();
        let old = self.desk().watching.insert(number(entry), (cookie, *entry));
        assert!(old.is_none(), "{entry:?} comes down, and {old:?} has not come up");
        self.answer(entry, verdict::WATCH, 0, cookie);
    }

    // -------------------------------------------------------------- a way down

    fn start(&mut self, entry: &Submission) {
        self.note(format_args!("takes {entry:?}"));
        self.check(entry);
        self.check_write(entry);
        self.note_change(entry, false);
        if self.process.fails {
            // Its trial ends with that, and nobody hears it, unless the trial has just been stood.
            self.process.babbled = true;
            return self.answer(entry, verdict::FAIL, EIO, 0);
        }
        if self.reaches(Step::Taken) {
            return;
        }
        let slow = !self.tools.hurries
            && match self.process.role {
                Role::Holder => self.tools.random.one_in(2),
                Role::Changer => self.tools.random.one_in(6),
                _ => false,
            };
        if slow {
            self.hold(entry, Why::Slow);
            self.reaches(Step::Held);
            return;
        }
        self.go_on(entry);
    }

    /// Does with a request what the filter is there for, and answers.
    fn go_on(&mut self, entry: &Submission) {
        if entry.kind == submission_kind::DONE {
            return self.finish(entry);
        }
        let op = op_of(entry);
        match self.process.role {
            Role::Changer if op == Op::Write => {
                if !self.change(entry, Step::HalfChanged, Step::Changed) {
                    return;
                }
                self.answer(entry, verdict::PASS, 0, 0);
            }
            Role::Changer => self.watch(entry),
            Role::Splitter | Role::Journal => return self.issue(entry),
            Role::Cache => self.look_up(entry),
            _ if self.tools.random.one_in(2) => self.watch(entry),
            _ => self.answer(entry, verdict::PASS, 0, 0),
        }
        self.reaches(Step::Answered);
    }

    /// Changes the data; false if it died over that.
    fn change(&mut self, entry: &Submission, half: Step, whole: Step) -> bool {
        let sectors = sectors_of(entry);
        let dies_at = match self.process.doom == Some(half) {
            true => Some(sectors.start + self.tools.random.below(sectors.clone().count()) as u64),
            false => None,
        };
        for sector in sectors.clone() {
            let at = entry.data as usize + (sector - sectors.start) as usize * SECTOR;
            let mut bytes: Bytes = self.world.arena.read_array(at).expect("data in the arena");
            change(&mut bytes, self.process.key, sector as u32);
            let mut length = SECTOR;
            if dies_at == Some(sector) {
                length = self.tools.random.below(SECTOR + 1);
            }
            self.world.arena.write(at, &bytes[..length]).expect("data in the arena");
            if dies_at == Some(sector) {
                self.reaches(half);
                return false;
            }
        }
        !self.reaches(whole)
    }

    fn issue(&mut self, entry: &Submission) {
        assert!(self.desk().issued.len() < ISSUED_MAX, "more requests than the guest has");
        self.hold(entry, Why::Issued);
        if self.reaches(Step::Held) {
            return;
        }
        let id = self.process.next_issue;
        self.process.next_issue += 1;
        let has_data = op_of(entry) == Op::Write;
        let host = self.host();
        let splits = self.process.role == Role::Splitter;
        // All filters of an engine have one arena for this here: each has a part.
        let part = u64::from(splits) * ISSUED_MAX as u64;
        let at = (part + id % ISSUED_MAX as u64) * ISSUE_ROOM;
        let (disk, offset, length) = match splits {
            true => (1, entry.offset, entry.length),
            false => {
                let own = self.view.guests as u64 + id % OWN_SECTORS as u64;
                (0, own * SECTOR as u64, SECTOR as u32)
            }
        };
        if has_data {
            let mut bytes = vec![id as u8; length as usize];
            if splits {
                self.world.arena.read(entry.data as usize, &mut bytes).expect("data");
            }
            self.world.issue_arena.write(at as usize, &bytes).expect("room");
        }
        self.desk().issued.insert(id, *entry);
        self.world.hosts[host].say(Completion {
            kind: completion_kind::ISSUE,
            code: entry.op,
            token: id,
            offset,
            length,
            data: if has_data { at } else { NO_DATA },
            disk,
            ..Completion::default()
        });
        self.reaches(Step::Issued);
    }

    /// A request that it issued has ended.
    fn result(&mut self, entry: &Submission) {
        let waiting = self.desk().issued.remove(&entry.token);
        let Some(waiting) = waiting else {
            panic!("{entry:?} is told of a request that was not issued in this life");
        };
        self.note(format_args!("is told that {} ended with {}", entry.token, entry.status));
        if self.reaches(Step::ResultTaken) {
            return;
        }
        let held = &mut self.desk().held;
        let Some(at) = held.iter().position(|held| held.entry.token == waiting.token) else {
            // It was cancelled, and answered then.
            return;
        };
        held.swap_remove(at);
        match entry.status {
            0 => self.answer(&waiting, verdict::PASS, 0, 0),
            status => self.answer(&waiting, verdict::FAIL, status, 0),
        }
        self.reaches(Step::Answered);
    }

    fn cancelled(&mut self, entry: &Submission) {
        self.note(format_args!("is to let go of {:#x}", entry.token));
        self.tools.coverage.count("seen: cancel of a held request");
        if self.reaches(Step::CancelTaken) {
            return;
        }
        let held = &mut self.desk().held;
        // If it is not there, the answer and the cancel have crossed.
        if let Some(at) = held.iter().position(|held| held.entry.token == entry.token) {
            let Held { entry, .. } = held.swap_remove(at);
            match entry.kind {
                submission_kind::DONE => self.finish(&entry),
                _ => self.answer(&entry, verdict::FAIL, ECANCELED, 0),
            }
        }
    }

    // ---------------------------------------------------------------- a way up

    fn done(&mut self, entry: &Submission) {
        self.note(format_args!("is told of the end of {entry:?}"));
        self.check(entry);
        match self.desk().watching.get(&number(entry)).copied() {
            Some((cookie, _)) => {
                assert_eq!(entry.cookie, cookie, "the context of {entry:?}");
            }
            None => {
                assert!(is_retry(entry), "{entry:?} comes up, and is not watched in this life");
                assert_eq!(entry.cookie, 0, "the context of a dead instance in {entry:?}");
            }
        }
        if self.reaches(Step::DoneTaken) {
            return;
        }
        let slow = !self.tools.hurries
            && match self.process.role {
                Role::Holder => self.tools.random.one_in(3),
                Role::Changer => self.tools.random.one_in(6),
                _ => false,
            };
        if slow {
            return self.hold(entry, Why::Slow);
        }
        self.finish(entry);
    }

    fn finish(&mut self, entry: &Submission) {
        let op = op_of(entry);
        let changes = self.process.role == Role::Changer && op == Op::Read;
        if changes && entry.status == 0 {
            let lives = self.change(entry, Step::DoneHalfChanged, Step::DoneChanged);
            if !lives {
                return;
            }
        }
        if self.process.role == Role::Cache {
            self.learn(entry);
        }
        self.desk().watching.remove(&number(entry));
        self.answer(entry, verdict::PASS, entry.status, 0);
        self.reaches(Step::DoneAnswered);
    }

    // ------------------------------------------------------------------- cache

    fn invalidate(&mut self, entry: &Submission, begins: bool) {
        for sector in sectors_of(entry) {
            let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
            (cached.bytes, cached.epoch) = (None, cached.epoch + 1);
            match begins {
                true => cached.writes += 1,
                false => cached.writes -= 1,
            }
        }
    }

    fn look_up(&mut self, entry: &Submission) {
        match op_of(entry) {
            op if op.is_modification() => self.invalidate(entry, true),
            Op::Read => {
                let sectors: Vec<u64> = sectors_of(entry).collect();
                let disk = self.view.disk;
                let cache = &mut self.process.cache;
                let known: Option<Vec<Bytes>> = sectors
                    .iter()
                    .map(|sector| {
                        let cached = cache.get(&(disk, *sector))?;
                        cached.bytes.filter(|_| cached.writes == 0)
                    })
                    .collect();
                if let Some(known) = known {
                    for (number, bytes) in known.iter().enumerate() {
                        let at = entry.data as usize + number * SECTOR;
                        self.world.arena.write(at, bytes).expect("data in the arena");
                    }
                    self.tools.coverage.count("seen: read answered by a filter");
                    return self.answer(entry, verdict::DONE, 0, 0);
                }
                let epochs = sectors
                    .iter()
                    .map(|sector| cache.entry((disk, *sector)).or_default().epoch)
                    .collect();
                self.process.reads.insert((self.place, number(entry)), epochs);
            }
            _ => {}
        }
        self.watch(entry);
    }

    fn learn(&mut self, entry: &Submission) {
        let known = self.desk().watching.contains_key(&number(entry));
        match op_of(entry) {
            op if op.is_modification() && known => self.invalidate(entry, false),
            op if op.is_modification() => {
                // It came down to an instance that is dead.
                for sector in sectors_of(entry) {
                    let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
                    (cached.bytes, cached.epoch) = (None, cached.epoch + 1);
                }
            }
            Op::Read => {
                let epochs = self.process.reads.remove(&(self.place, number(entry)));
                let Some(epochs) = epochs.filter(|_| known && entry.status == 0) else { return };
                for (sector, epoch) in sectors_of(entry).zip(epochs) {
                    let at = entry.data as usize + (sector * SECTOR as u64 - entry.offset) as usize;
                    let bytes = self.world.arena.read_array(at).expect("data in the arena");
                    let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
                    if cached.epoch == epoch && cached.writes == 0 {
                        cached.bytes = Some(bytes);
                    }
                }
            }
            _ => {}
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
