//! A queue thread's engine, the production one, whose filter hosts, stores, guest and clock
//! are played: by this crate's tests, and by whoever simulates a world (feature `sim`).
//!
//! Always true: nothing happens in the engine except within [`World::turn`], on the calling
//! thread; with a [played clock](Making::plays_clock) what happens depends on nothing but
//! what was called, so that a world from a seed can be played again exactly.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use upcall_abi::filter::ISSUE_ARENA_SIZE;
use upcall_abi::ring::{Completion, Submission, channel_size, completion_kind};
use upcall_block::*;
use upcall_chain::{Chain, Class, Generation, OnFailure, SlotSpec};
use upcall_gap::{Mark, MarkDone, MarkToken};
use upcall_ring::channel::{Channel, HostChannel};
use upcall_ring::{Access, Arena, Buffers, Doorbell, Mapping, memfd};
use upcall_stats::{HopKind, HopSnapshot, HopSpec, Page, PageReader};
use upcall_store::MemoryStore;

use super::{
    Clock, Command, Engine, Lane, Life, Link, MakeUp, MarkGaps, MayStay, NextSlot, Parts, Slot,
    Way, deadline_ns,
};
use crate::direct::{DirectClient, direct_queue};
use crate::hosts::{HostId, HostNews};

/// Bytes of a disk.
pub const CAPACITY: u64 = 1 << 20;
/// What has data.
pub const DATA: OpSet = OpSet::NONE.with(Op::Read).with(Op::Write);
/// Bytes of the guest's memory.
pub const GUEST_MEMORY: usize = 4 << 20;

fn spec(class: Class, ops: OpSet, sees: OpSet, changes: OpSet, answers: OpSet) -> SlotSpec {
    SlotSpec { class, order: 0, ops, sees, changes, answers }
}

/// Sees no data. First in the chain.
pub fn blind() -> SlotSpec {
    spec(Class::Inspection, OpSet::ALL, OpSet::NONE, OpSet::NONE, OpSet::NONE)
}

/// Changes reads and writes, and does not know the rest.
pub fn changer() -> SlotSpec {
    spec(Class::Encryption, DATA, DATA, DATA, OpSet::NONE)
}

/// Sees reads and writes.
pub fn observer() -> SlotSpec {
    spec(Class::Cache, OpSet::ALL, DATA, OpSet::NONE, OpSet::NONE)
}

/// What the store has got, and what it shall report.
#[derive(Default)]
pub struct Taken {
    /// Got, and not completed yet; in order.
    pub ios: Vec<StoreIo>,
    /// Reported at the next look.
    pub done: Vec<StoreDone>,
}

/// A store that keeps what it gets until the test completes it.
#[derive(Clone, Default)]
pub struct Keeper(pub Arc<Mutex<Taken>>);

impl StoreQueue for Keeper {
    fn submit(&mut self, io: StoreIo) {
        self.0.lock().unwrap().ios.push(io);
    }

    fn poll(&mut self, out: &mut Vec<StoreDone>) {
        out.append(&mut self.0.lock().unwrap().done);
    }

    fn in_flight(&self) -> usize {
        let taken = self.0.lock().unwrap();
        taken.ios.len() + taken.done.len()
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn before_sleep(&mut self) -> bool {
        self.0.lock().unwrap().done.is_empty()
    }
}

impl Keeper {
    /// Completes everything it has.
    pub fn complete(&self, status: Status) {
        let mut taken = self.0.lock().unwrap();
        let ios = std::mem::take(&mut taken.ios);
        taken.done.extend(ios.iter().map(|io| StoreDone { token: io.token, status }));
    }
}

/// Which sectors are marked, durably: it outlives the worker, and all queues share it.
#[derive(Clone, Default)]
pub struct Record(Arc<Mutex<BTreeSet<u64>>>);

impl Record {
    /// Whether this sector (of 512 bytes) is marked.
    pub fn has(&self, sector: u64) -> bool {
        self.0.lock().unwrap().contains(&sector)
    }

    fn covers(&self, range: Range) -> bool {
        sectors_of(range).all(|sector| self.has(sector))
    }

    fn add(&self, range: Range) {
        self.0.lock().unwrap().extend(sectors_of(range));
    }
}

fn sectors_of(range: Range) -> std::ops::Range<u64> {
    range.offset() / 512..(range.offset() + u64::from(range.length())).div_ceil(512)
}

/// Records gaps for one queue, when the test says so.
#[derive(Clone, Default)]
pub struct GapKeeper(pub Arc<Mutex<KeptGaps>>);

/// What a [`GapKeeper`] was asked for.
#[derive(Default)]
pub struct KeptGaps {
    /// Marks that were asked for and not made.
    pub asked: Vec<(MarkToken, Range)>,
    /// Reported at the next look.
    pub done: Vec<MarkDone>,
    /// Offsets of ranges that were marked, in that order.
    pub made: Vec<u64>,
    /// All that is marked.
    pub record: Record,
}

impl GapKeeper {
    /// For a queue whose marks go to this record.
    pub fn of(record: &Record) -> GapKeeper {
        let kept = KeptGaps { record: record.clone(), ..KeptGaps::default() };
        GapKeeper(Arc::new(Mutex::new(kept)))
    }

    /// How many marks were asked for and are not made.
    pub fn asked(&self) -> usize {
        self.0.lock().unwrap().asked.len()
    }

    /// Makes one of them, or fails to.
    pub fn make_one(&self, index: usize, status: Status) {
        let mut kept = self.0.lock().unwrap();
        let (token, range) = kept.asked.remove(index);
        if status.is_ok() {
            kept.made.push(range.offset());
            kept.record.add(range);
        }
        kept.done.push(MarkDone { token, status });
    }

    /// Makes all marks that were asked for, or fails to.
    pub fn make(&self, status: Status) {
        while self.asked() > 0 {
            self.make_one(0, status);
        }
    }
}

impl MarkGaps for GapKeeper {
    fn mark(&mut self, token: MarkToken, range: Range) -> Mark {
        let mut kept = self.0.lock().unwrap();
        if kept.record.covers(range) {
            return Mark::Already;
        }
        kept.asked.push((token, range));
        Mark::Queued
    }

    fn poll(&mut self, out: &mut Vec<MarkDone>) {
        out.append(&mut self.0.lock().unwrap().done);
    }

    fn in_flight(&self) -> usize {
        let kept = self.0.lock().unwrap();
        kept.asked.len() + kept.done.len()
    }

    fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn before_sleep(&mut self) -> bool {
        self.0.lock().unwrap().done.is_empty()
    }
}

/// A filter host, played by the test.
pub struct Host {
    /// Its ends of the rings.
    pub channel: HostChannel,
    /// The memory of the rings, for who writes nonsense there.
    pub memory: Mapping,
    /// Rung for it.
    pub doorbell: Doorbell,
    worker: Doorbell,
    /// Its only instance.
    pub instance: u32,
}

impl Host {
    /// Takes what it is sent next.
    pub fn take(&mut self) -> Option<Submission> {
        self.channel.submissions.pop()
    }

    /// Writes an entry, for its instance. Panics if there is no room.
    pub fn say(&mut self, entry: Completion) {
        let entry = Completion { instance: self.instance, ..entry };
        self.channel.completions.push(&entry).expect("room in the ring");
        self.channel.completions.wake(&self.worker);
    }

    /// A verdict with status 0.
    pub fn answer(&mut self, to: &Submission, verdict: u8) {
        self.answer_with(to, verdict, 0, 0);
    }

    /// A verdict.
    pub fn answer_with(&mut self, to: &Submission, verdict: u8, status: i32, cookie: u64) {
        let kind = completion_kind::VERDICT;
        let (token, code) = (to.token, verdict);
        self.say(Completion { kind, code, token, status, cookie, ..Completion::default() });
    }

    /// Says that it holds what it was sent.
    pub fn hold(&mut self, to: &Submission) {
        let (kind, token) = (completion_kind::HELD, to.token);
        self.say(Completion { kind, token, cookie: 9, ..Completion::default() });
    }

    /// Issues a write.
    pub fn issue(&mut self, id: u64, disk: u32, offset: u64, length: u32, data: u64) {
        self.say(Completion {
            kind: completion_kind::ISSUE,
            code: Op::Write as u8,
            token: id,
            offset,
            length,
            data,
            disk,
            ..Completion::default()
        });
    }
}

/// What a world is made of.
pub struct Making {
    /// The filters, in the order of the chain.
    pub specs: Vec<SlotSpec>,
    /// By slot: whether its filter issues requests.
    pub issues: Vec<bool>,
    /// By slot: what becomes of requests while its filter is gone.
    pub on_failure: Vec<OnFailure>,
    /// By slot: records what it misses while it is bypassed.
    pub(crate) gaps: Vec<Option<Box<dyn MarkGaps>>>,
    /// How long a filter may have a request; 0: as long as it likes.
    pub deadline_ms: u64,
    /// Filter hosts that the engine gives up die at once; otherwise when the test says so.
    pub kills: bool,
    /// The stores of the own disk and of those that each filter is granted.
    pub lanes: Vec<(Box<dyn StoreQueue>, DiskInfo)>,
    /// Entries of a ring.
    pub entries: u32,
    /// Pages of an arena.
    pub pages: usize,
    /// Time stands still until [`World::pass`]; otherwise it is the system's.
    pub plays_clock: bool,
    /// Room for so many filters more than there are at first.
    pub spare_rooms: usize,
}

/// A place in the chain that a disk is given while it is served.
pub enum Next {
    /// That of an instance that stays.
    Stays {
        /// Its number.
        instance: u32,
        /// What becomes of requests while it is gone.
        on_failure: OnFailure,
    },
    /// That of a new one, whose host is the next in [`World::hosts`].
    Comes(Newcomer),
}

/// A filter that comes into a chain.
pub struct Newcomer {
    /// Its number, unique in the chain.
    pub instance: u32,
    /// Whether it issues requests.
    pub issues: bool,
    /// What becomes of requests while it is gone.
    pub on_failure: OnFailure,
    /// Where it is recorded what it misses; not if it takes over another one's record.
    pub gaps: Option<GapKeeper>,
    /// The instance whose place it takes.
    pub replaces: Option<u32>,
    /// From 1; nobody else's. Who takes another one's place has its room.
    pub room: usize,
    /// What it fails is not shown, but ends its trial.
    pub is_on_trial: bool,
}

impl Making {
    /// What a slot misses while it is bypassed is recorded there.
    pub fn record_gaps(&mut self, slot: usize, keeper: &GapKeeper) {
        self.gaps[slot] = Some(Box::new(keeper.clone()));
    }

    /// A chain over a store that the test completes.
    pub fn new(specs: Vec<SlotSpec>) -> (Making, Keeper) {
        let keeper = Keeper::default();
        let making = Making {
            issues: vec![false; specs.len()],
            on_failure: vec![OnFailure::Fail; specs.len()],
            gaps: specs.iter().map(|_| None).collect(),
            deadline_ms: 0,
            kills: true,
            specs,
            lanes: vec![(Box::new(keeper.clone()), info())],
            entries: 64,
            pages: 64,
            plays_clock: false,
            spare_rooms: 0,
        };
        (making, keeper)
    }
}

/// A disk of [`CAPACITY`] bytes that can everything.
pub fn info() -> DiskInfo {
    MemoryStore::new(CAPACITY).unwrap().info().clone()
}

fn mapping(size: usize) -> Arc<Mapping> {
    let fd = memfd("world", size).unwrap();
    Arc::new(Mapping::new(&fd, 0, size, Access::ReadWrite).unwrap())
}

/// One life of a played host, and the engine's way to it.
fn a_life(instance: u32, entries: u32, wake: &Doorbell, issue_arena: &Arc<Mapping>) -> (Host, Way) {
    let (channel, fd) = Channel::create(entries).unwrap();
    let doorbell = Doorbell::new().unwrap();
    let size = channel_size(entries);
    let host = Host {
        channel: HostChannel::open(&fd).unwrap(),
        memory: Mapping::new(fd.as_fd(), 0, size, Access::ReadWrite).unwrap(),
        doorbell: doorbell.clone(),
        worker: wake.clone(),
        instance,
    };
    (host, Way { channel, doorbell, issue_arena: Some(issue_arena.clone()) })
}

/// See the module.
pub struct World {
    pub(super) engine: Engine,
    pub(super) commands: Sender<Command>,
    /// Rung for the engine.
    pub wake: Doorbell,
    now_ns: Arc<AtomicU64>,
    /// The guest.
    pub client: DirectClient,
    /// In the order of the chain; after those, in the order in which they came.
    pub hosts: Vec<Host>,
    /// The guest's memory.
    pub guest: Arc<Mapping>,
    /// The data that filters see.
    pub arena: Arc<Mapping>,
    /// The data of what filters issue.
    pub issue_arena: Arc<Mapping>,
    /// What an operator was told.
    pub log: Arc<Mutex<Vec<String>>>,
    /// Hosts that the engine wants killed, by slot, and why.
    pub given_up: Arc<Mutex<Vec<(usize, String)>>>,
    /// Slots of which the engine said that nothing which their dead hosts had issued can
    /// come late; each is taken out when its next host comes.
    pub quiet: Arc<Mutex<Vec<usize>>>,
    /// By slot: which life of its host is the latest.
    lives: Vec<u32>,
    kills: bool,
    killed: usize,
    entries: u32,
    /// What the guest is offered.
    pub info: DiskInfo,
    page: Page,
    page_path: PathBuf,
    deadline_ns: u64,
}

impl World {
    /// A world in which nothing has happened yet.
    pub fn new(mut making: Making) -> World {
        let now_ns = Arc::new(AtomicU64::new(1));
        let clock = match making.plays_clock {
            true => Clock::Played(now_ns.clone()),
            false => Clock::Monotonic,
        };
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = making.specs.len();
        let rooms = count + making.spare_rooms;
        let arena_bytes = making.pages * 4096;
        let arena = mapping(arena_bytes * (1 + rooms));
        let issue_arena = mapping(ISSUE_ARENA_SIZE as usize);
        let page_path = std::env::temp_dir().join(format!(
            "upcall-world-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ));
        let hop = |kind| HopSpec { disk: "d".into(), name: "h".into(), kind, queues: 1 };
        let mut kinds = vec![HopKind::Filter; rooms + 2];
        (kinds[0], kinds[rooms + 1]) = (HopKind::Request, HopKind::Store);
        let page = Page::create(Some(&page_path), &kinds.into_iter().map(hop).collect::<Vec<_>>())
            .unwrap();
        let wake = Doorbell::new().unwrap();
        let (mut links, mut hosts, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let granted = making.lanes.len() - 1;
        for index in 0..count {
            let (host, way) = a_life(index as u32, making.entries, &wake, &issue_arena);
            hosts.push(host);
            links.push(Link::new(HostId(index), format!("f{index}").as_str().into(), way));
            slots.push(Slot {
                link: index,
                instance: index as u32,
                issues: making.issues[index],
                grants: (1..=granted).collect(),
                arena: 1 + index,
                on_failure: making.on_failure[index],
                deadline_ns: deadline_ns(making.deadline_ms, false),
                keeps_images: making.on_failure[index] == OnFailure::Hold,
                gaps: making.gaps[index].take(),
                detached: false,
                is_on_trial: false,
                stats: page.block(1 + index, 0),
            });
        }
        let mut specs = Some(making.specs);
        let info = making.lanes[0].1.clone();
        let lanes = making.lanes.into_iter().map(|(store, info)| {
            let specs = specs.take().unwrap_or_default();
            Lane { chain: Arc::new(Chain::new(Generation(1), specs, &info).unwrap()), store }
        });
        let (commands, receiver) = channel();
        let (queue, client) = direct_queue().unwrap();
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let given_up: Arc<Mutex<Vec<(usize, String)>>> = Arc::default();
        let quiet: Arc<Mutex<Vec<usize>>> = Arc::default();
        let (log_sink, given_up_sink) = (log.clone(), given_up.clone());
        let quiet_sink = quiet.clone();
        let parts = Parts {
            disk: "d".into(),
            clock,
            commands: receiver,
            wake: wake.clone(),
            lanes: lanes.collect(),
            slots,
            links,
            arenas: (0..=rooms)
                .map(|at| Arena::new(arena.clone(), at * arena_bytes, arena_bytes).unwrap())
                .collect(),
            request_stats: page.block(0, 0),
            store_stats: page.block(rooms + 1, 0),
            log: Arc::new(move |_, text| log_sink.lock().unwrap().push(text.to_owned())),
            tell: Arc::new(move |news| {
                match news {
                    HostNews::GiveUp { host, reason, .. } => {
                        given_up_sink.lock().unwrap().push((host.0, reason));
                    }
                    HostNews::Quiet { host, .. } => quiet_sink.lock().unwrap().push(host.0),
                }
                true
            }),
        };
        commands.send(Command::Start(Box::new(queue))).unwrap();
        let info = DiskInfo { ops: parts.lanes[0].chain.info().ops, ..info };
        World {
            engine: Engine::new(parts),
            commands,
            wake,
            now_ns,
            client,
            hosts,
            guest: mapping(GUEST_MEMORY),
            arena,
            issue_arena,
            log,
            given_up,
            quiet,
            lives: vec![0; count],
            kills: making.kills,
            killed: 0,
            entries: making.entries,
            info,
            page,
            deadline_ns: deadline_ns(making.deadline_ms, false),
            page_path,
        }
    }

    /// A request whose data is at `at` of the guest's memory.
    pub fn submit_at(&mut self, op: Op, offset: u64, length: u32, at: usize) -> Tag {
        self.submit_flags(op, offset, length, at, RequestFlags::default())
    }

    /// The same with flags.
    pub fn submit_flags(
        &mut self,
        op: Op,
        offset: u64,
        length: u32,
        at: usize,
        flags: RequestFlags,
    ) -> Tag {
        let range = Range::new(offset, length.into(), &self.info).unwrap();
        let data = if op.has_data() {
            Buffers::of(&self.guest, at, length as usize, true).unwrap()
        } else {
            Buffers::new()
        };
        self.client.submit(op, range, flags, data)
    }

    /// A request whose data is at the start of the guest's memory.
    pub fn submit(&mut self, op: Op, offset: u64, length: u32) -> Tag {
        self.submit_at(op, offset, length, 0)
    }

    /// One turn of the engine's loop; whether there was something to do.
    pub fn turn(&mut self) -> bool {
        let mut busy = self.engine.turn();
        while self.kills && self.killed < self.given_up.lock().unwrap().len() {
            let host = self.given_up.lock().unwrap()[self.killed].0;
            self.killed += 1;
            self.lose_host(host);
            busy = true;
        }
        busy
    }

    /// Turns until there is nothing to do.
    pub fn settle(&mut self) {
        while self.turn() {}
    }

    /// Lets time pass, if it is played.
    pub fn pass(&mut self, ns: u64) {
        self.now_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// In how many nanoseconds the engine must have a turn although nobody wakes it.
    pub fn wakes_in_ns(&self) -> Option<u64> {
        if self.engine.is_still() { None } else { self.engine.sleep_ns_max() }
    }

    /// The filter host of a slot has died. What it said before counts; what it says from
    /// now on, nobody hears.
    pub fn lose_host(&mut self, host: usize) {
        let life = Life(self.lives[host]);
        let is_for_good = false;
        self.command(Command::HostLost { host: HostId(host), life, is_for_good });
    }

    /// Another host serves a slot whose last one was lost; only when the slot is
    /// [quiet](Self::quiet).
    pub fn return_host(&mut self, host: usize) {
        let instance = self.hosts[host].instance;
        let (played, way) = a_life(instance, self.entries, &self.wake, &self.issue_arena);
        self.hosts[host] = played;
        self.lives[host] += 1;
        self.quiet.lock().unwrap().retain(|other| *other != host);
        let (life, way) = (Life(self.lives[host]), Box::new(way));
        self.command(Command::HostBack { host: HostId(host), life, way });
    }

    /// Whether the next host of a slot may come.
    pub fn is_quiet(&self, host: usize) -> bool {
        self.quiet.lock().unwrap().contains(&host)
    }

    /// The guest stops its queue: what was taken ends, what filters hold after `drain_ms` is
    /// cancelled. The answer comes when all has ended.
    pub fn stop(&mut self, drain_ms: u64) -> Receiver<Option<Box<dyn RequestQueue>>> {
        let (reply, stopped) = sync_channel(1);
        self.command(Command::Stop { drain_ms, reply });
        stopped
    }

    /// Serves a queue, after the last one was stopped.
    pub fn start(&mut self, queue: Box<dyn RequestQueue>) {
        self.command(Command::Start(queue));
    }

    /// The engine begins nothing more, and ends once nothing is in flight.
    pub fn quit(&mut self) {
        self.command(Command::Quit);
    }

    /// Whether it has ended: its thread would not be there any more.
    pub fn has_ended(&self) -> bool {
        self.engine.has_ended()
    }

    /// Takes nothing more, and says when nothing is in flight but what waits for the dead hosts of
    /// instances that are `replaced`. What waits for those of instances that leave goes past them.
    pub fn stun(&mut self, replaced: &[u32], leaving: &[u32]) -> Receiver<()> {
        let (reply, still) = sync_channel(1);
        let may_stay = MayStay { replaced: replaced.to_vec(), leaving: leaving.to_vec() };
        self.command(Command::Stun { may_stay, reply });
        still
    }

    /// Gives it another chain, once it has said that it is still; says when it has it. The hosts
    /// of instances that come are there at once.
    pub fn swap(&mut self, chain: &Arc<Chain>, next: Vec<Next>) -> Receiver<()> {
        let slots = next.into_iter().map(|next| match next {
            Next::Stays { instance, on_failure } => NextSlot::Stays {
                instance,
                on_failure,
                deadline_ns: self.deadline_ns,
                keeps_images: on_failure == OnFailure::Hold,
            },
            Next::Comes(new) => self.next_slot(new),
        });
        let make_up = MakeUp { chain: chain.clone(), slots: slots.collect(), arenas: Vec::new() };
        let (reply, switched) = sync_channel(1);
        self.command(Command::Swap { make_up: Box::new(make_up), reply });
        switched
    }

    fn next_slot(&mut self, new: Newcomer) -> NextSlot {
        let (host, way) = a_life(new.instance, self.entries, &self.wake, &self.issue_arena);
        let number = self.hosts.len();
        self.hosts.push(host);
        self.lives.push(0);
        let slot = Slot {
            link: 0,
            instance: new.instance,
            issues: new.issues,
            grants: Vec::new(),
            arena: new.room,
            on_failure: new.on_failure,
            deadline_ns: self.deadline_ns,
            keeps_images: new.on_failure == OnFailure::Hold || new.is_on_trial,
            gaps: new.gaps.map(|gaps| Box::new(gaps) as _),
            detached: false,
            is_on_trial: new.is_on_trial,
            stats: self.page.block(new.room, 0),
        };
        let link = Link::new(HostId(number), format!("f{number}").as_str().into(), way);
        NextSlot::New { slot: Box::new(slot), link: Box::new(link), replaces: new.replaces }
    }

    /// Goes on, after [`stun`](Self::stun).
    pub fn unstun(&mut self) {
        self.command(Command::Unstun);
    }

    /// An instance is on trial no longer.
    pub fn end_trial(&mut self, instance: u32) {
        self.command(Command::EndTrial { instance });
    }

    fn command(&mut self, command: Command) {
        self.commands.send(command).expect("the engine lives");
    }

    /// Requests on their walk, parts and issued ones included.
    pub fn in_flight(&self) -> usize {
        self.engine.flights.len() + self.engine.wholes.len()
    }

    /// How requests of the guest ended since the last look.
    pub fn ended(&mut self) -> Vec<Status> {
        std::iter::from_fn(|| self.client.wait(Duration::ZERO)).map(|(_, status)| status).collect()
    }

    /// What the filter host of a slot is sent next; it must be there.
    pub fn sent(&mut self, host: usize) -> Submission {
        self.settle();
        self.hosts[host].take().expect("a submission")
    }

    /// What was counted: the requests, the filters, the store.
    pub fn hops(&self) -> Vec<HopSnapshot> {
        PageReader::open(&self.page_path).unwrap().snapshot()
    }

    /// Nothing is left: not in flight, not in memory, not in the statistics.
    pub fn assert_empty(&mut self) {
        self.settle();
        assert_eq!((self.engine.flights.len(), self.engine.wholes.len()), (0, 0));
        let pages = self.engine.parts.arenas.iter().map(Arena::in_use_pages).sum::<u32>();
        assert_eq!(pages, 0, "all memory came back");
        let now: Vec<u64> = self.hops().iter().map(|hop| hop.block.now).collect();
        assert_eq!(now, vec![0; now.len()], "nobody is anywhere");
    }

    /// Whether the engine wants the host of a slot killed.
    pub fn gave_up(&self, host: usize) -> bool {
        self.given_up.lock().unwrap().iter().any(|(given, _)| *given == host)
    }
}
