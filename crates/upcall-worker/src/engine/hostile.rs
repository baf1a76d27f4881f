//! A queue thread against filter hosts that write whatever they like: the worker's side of
//! the filter ring, driven by bytes. Used by the fuzz target `filter_ring` and, with random
//! bytes, by a test.
//!
//! Whatever the bytes: nothing panics, every request of the guest completes exactly once when
//! the hosts are given up, and all memory comes back.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use upcall_abi::filter::{ISSUE_ARENA_SIZE, op};
use upcall_abi::ring::{Completion, NO_DATA, channel_size, completion_kind};
use upcall_block::{DiskInfo, Op, OpSet, Range, RequestFlags, Store};
use upcall_chain::{Chain, Class, Generation, OnFailure, SlotSpec};
use upcall_ring::channel::{Channel, HostChannel};
use upcall_ring::{Access, Arena, Buffers, Doorbell, Mapping, memfd};
use upcall_stats::{HopKind, HopSpec, Page};
use upcall_store::MemoryStore;

use super::{Clock, Command, Engine, Lane, Life, Link, Parts, Slot, Way};
use crate::direct::{DirectClient, direct_queue};
use crate::hosts::HostId;

const CAPACITY: u64 = 1 << 20;
const ARENA: usize = 256 << 10;
const ENTRIES: u32 = 16;

/// Takes bytes off an input; zeroes once it is used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }
}

/// The hostile side of one link.
struct Enemy {
    channel: HostChannel,
    memory: Mapping,
    /// Tokens of deliveries, the latest last.
    tokens: Vec<u64>,
}

impl Enemy {
    /// An entry that may be right, nearly right, or nonsense.
    fn entry(&mut self, bytes: &mut Bytes<'_>, instance: u32) -> Completion {
        while let Some(submission) = self.channel.submissions.pop() {
            self.tokens.push(submission.token);
            if self.tokens.len() > 64 {
                self.tokens.remove(0);
            }
        }
        let shape = bytes.byte();
        let index = usize::from(bytes.byte());
        let mut entry = Completion {
            kind: shape % 5,
            code: bytes.byte() % 8,
            flags: u16::from(bytes.byte() % 8),
            token: self.tokens.get(index % self.tokens.len().max(1)).copied().unwrap_or(7),
            offset: u64::from(bytes.byte()) * 512,
            length: u32::from(bytes.byte()) * 512,
            status: -i32::from(bytes.byte() % 40),
            data: u64::from(bytes.byte()) * 4096,
            cookie: 1,
            instance,
            disk: u32::from(bytes.byte() % 3),
            ..Completion::default()
        };
        if entry.kind == completion_kind::ISSUE && !matches!(entry.code, op::READ | op::WRITE) {
            entry.data = NO_DATA;
        }
        match shape >> 5 {
            1 => entry.token = bytes.word(),
            2 => entry.offset = bytes.word(),
            3 => entry.data = bytes.word(),
            4 => entry.instance = bytes.word() as u32,
            5 => entry.status = bytes.word() as i32,
            6 => entry.length = bytes.word() as u32,
            7 => {
                let words = std::array::from_fn(|_| bytes.word());
                entry = Completion::from_words(&words);
            }
            _ => {}
        }
        entry
    }
}

struct World {
    now_ns: Arc<AtomicU64>,
    engine: Engine,
    commands: Sender<Command>,
    client: DirectClient,
    enemies: Vec<Enemy>,
    guest: Arc<Mapping>,
    sent: u32,
    ended: Vec<bool>,
}

impl World {
    fn new() -> World {
        let now_ns = Arc::new(AtomicU64::new(1));
        let store = MemoryStore::new(CAPACITY).expect("memory");
        let lane =
            |chain| Lane { chain: Arc::new(chain), store: store.open_queue().expect("a queue") };
        let all = OpSet::ALL;
        let data = OpSet::NONE.with(Op::Read).with(Op::Write);
        let changer = SlotSpec {
            class: Class::Encryption,
            order: 0,
            ops: data,
            sees: data,
            changes: data,
            answers: OpSet::NONE,
        };
        let issuer = SlotSpec {
            class: Class::Cache,
            order: 0,
            ops: all,
            sees: data,
            changes: data,
            answers: all,
        };
        let info: &DiskInfo = store.info();
        let chain = Chain::new(Generation(1), vec![changer, issuer], info).expect("a chain");
        let bare = Chain::new(Generation(1), vec![], info).expect("a chain");
        let hop = |kind| HopSpec { disk: "d".into(), name: "h".into(), kind, queues: 1 };
        let page = Page::create(
            None,
            &[HopKind::Request, HopKind::Filter, HopKind::Filter, HopKind::Store].map(hop),
        )
        .expect("a page");
        let mapping = |size| {
            let fd = memfd("hostile", size).expect("memory");
            Arc::new(Mapping::new(&fd, 0, size, Access::ReadWrite).expect("a mapping"))
        };
        let arena = mapping(2 * ARENA);
        let issue_arena = mapping(ISSUE_ARENA_SIZE as usize);
        let (mut links, mut enemies) = (Vec::new(), Vec::new());
        for host in 0..2 {
            let (channel, fd) = Channel::create(ENTRIES).expect("a channel");
            let memory = Mapping::new(fd.as_fd(), 0, channel_size(ENTRIES), Access::ReadWrite)
                .expect("a mapping");
            enemies.push(Enemy {
                channel: HostChannel::open(&fd).expect("a channel"),
                memory,
                tokens: Vec::new(),
            });
            let arena = (host == 1).then(|| issue_arena.clone());
            let doorbell = Doorbell::new().expect("a doorbell");
            let way = Way { channel, doorbell, issue_arena: arena };
            links.push(Link::new(HostId(host), "f".into(), way));
        }
        let slot = |index: usize| Slot {
            link: index,
            instance: index as u32,
            issues: index == 1,
            grants: if index == 1 { vec![1] } else { vec![] },
            arena: index,
            on_failure: [OnFailure::Hold, OnFailure::Fail][index],
            deadline_ns: u64::MAX,
            keeps_images: true,
            gaps: None,
            detached: false,
            is_on_trial: false,
            stats: page.block(1 + index, 0),
        };
        let (commands, receiver) = channel();
        let (queue, client) = direct_queue().expect("a queue");
        let parts = Parts {
            disk: "d".into(),
            clock: Clock::Played(now_ns.clone()),
            commands: receiver,
            wake: Doorbell::new().expect("a doorbell"),
            lanes: vec![lane(chain), lane(bare)],
            slots: vec![slot(0), slot(1)],
            links,
            arenas: [0, ARENA]
                .map(|start| Arena::new(arena.clone(), start, ARENA).expect("an arena"))
                .into(),
            request_stats: page.block(0, 0),
            store_stats: page.block(3, 0),
            log: Arc::new(|_, _| {}),
            tell: Arc::new(|_| true),
        };
        let _ = commands.send(Command::Start(Box::new(queue)));
        World {
            now_ns,
            engine: Engine::new(parts),
            commands,
            client,
            enemies,
            guest: mapping(64 << 10),
            sent: 0,
            ended: Vec::new(),
        }
    }

    fn submit(&mut self, bytes: &mut Bytes<'_>) {
        let op = Op::ALL[usize::from(bytes.byte() % 5)];
        let length = if op == Op::Flush { 0 } else { 512 * (1 + u32::from(bytes.byte() % 128)) };
        let info = self.engine.parts.lanes[0].chain.info();
        let offset = if op == Op::Flush { 0 } else { u64::from(bytes.byte()) * 512 };
        let Ok(range) = Range::new(offset, length.into(), info) else { return };
        let data = if op.has_data() {
            Buffers::of(&self.guest, 0, length as usize, true).expect("room")
        } else {
            Buffers::new()
        };
        self.client.submit(op, range, RequestFlags::default(), data);
        self.sent += 1;
        self.ended.push(false);
    }

    fn turn(&mut self) {
        self.engine.turn();
        while let Some((tag, _)) = self.client.wait(Duration::ZERO) {
            let ended = &mut self.ended[tag.0 as usize];
            assert!(!std::mem::replace(ended, true), "request {} completed twice", tag.0);
        }
    }

    fn finish(mut self) {
        let (reply, stopped) = sync_channel(1);
        for host in 0..2 {
            let (host, life) = (HostId(host), Life::default());
            let _ = self.commands.send(Command::HostLost { host, life, is_for_good: false });
        }
        self.turn();
        let _ = self.commands.send(Command::Stop { drain_ms: 0, reply });
        for _ in 0..10_000 {
            // What a host held that does not come back is waited for, for a while.
            self.now_ns.fetch_add(1_000_000, Ordering::Relaxed);
            self.turn();
            if self.engine.flights.len() == 0 && self.engine.frontend.is_none() {
                break;
            }
        }
        assert!(stopped.try_recv().is_ok_and(|queue| queue.is_some()), "the queue comes back");
        let late = self.ended.iter().filter(|ended| !**ended).count();
        // What the queue had not been asked for yet is still in it, and nowhere else.
        assert_eq!(self.engine.guest_requests, 0);
        assert!(late == 0 || self.engine.frontend.is_none());
        assert_eq!(
            (self.engine.flights.len(), self.engine.wholes.len()),
            (0, 0),
            "nothing is left in flight"
        );
        let pages = self.engine.parts.arenas.iter().map(Arena::in_use_pages).sum::<u32>();
        assert_eq!(pages, 0, "all memory came back");
    }
}

/// Plays one world. Panics if a promise is broken. Returns how many entries and stray bytes
/// the hosts wrote.
pub fn play(input: &[u8]) -> u64 {
    let mut world = World::new();
    let mut bytes = Bytes(input);
    let mut written = 0;
    while !bytes.0.is_empty() {
        match bytes.byte() % 8 {
            0 | 1 => world.submit(&mut bytes),
            2..=4 => {
                let index = usize::from(bytes.byte() % 2);
                let instance = index as u32;
                let entry = world.enemies[index].entry(&mut bytes, instance);
                // A full ring is drained by the next turn.
                let pushed = world.enemies[index].channel.completions.push(&entry);
                written += u64::from(pushed.is_ok());
            }
            5 => {
                // Any byte of the channel, the worker's own words included.
                let index = usize::from(bytes.byte() % 2);
                let at = bytes.word() as usize % channel_size(ENTRIES);
                let _ = world.enemies[index].memory.write(at, &[bytes.byte()]);
                written += 1;
            }
            _ => world.turn(),
        }
    }
    world.turn();
    world.finish();
    written
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use upcall_abi::filter;

    use super::*;

    /// Messages to be survived; a campaign sets UPCALL_CAMPAIGN for the larger number.
    const MESSAGES: u64 = 200_000;
    const MESSAGES_CAMPAIGN: u64 = 5_000_000;

    /// splitmix64
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Another thread had it killed first, and this one hears of its death before it has read
    /// what it had said.
    #[test]
    fn what_a_filter_on_trial_said_before_it_died_is_not_shown_to_the_guest() {
        for code in [filter::verdict::FAIL, 77] {
            let mut world = World::new();
            world.engine.parts.slots[0].is_on_trial = true;
            world.submit(&mut Bytes(&[])); // a read
            world.turn();
            let delivered = world.enemies[0].channel.submissions.pop().expect("a delivery");
            let said = Completion {
                kind: completion_kind::VERDICT,
                code,
                token: delivered.token,
                status: -5,
                ..Completion::default()
            };
            world.enemies[0].channel.completions.push(&said).expect("room");
            world.engine.lose(HostId(0), Life::default(), false);
            world.turn();
            assert_eq!(world.ended, [false], "it waits for who takes the filter's place");
            assert_eq!(world.engine.flights.len(), 1);
            world.finish();
        }
    }

    #[test]
    fn whatever_filter_hosts_write_every_request_ends_once_and_all_memory_comes_back() {
        let given = std::env::var("UPCALL_SEED").ok();
        let given = given.map(|seed| seed.parse().expect("UPCALL_SEED is a number"));
        let campaign = std::env::var_os("UPCALL_CAMPAIGN").is_some();
        let enough = if campaign { MESSAGES_CAMPAIGN } else { MESSAGES };
        let (start, mut seeds, mut messages) = (Instant::now(), 0u64, 0);
        while messages < enough {
            let seed = given.unwrap_or(seeds);
            let mut state = seed;
            let length = random(&mut state) % 2000;
            let input: Vec<u8> = (0..length).map(|_| random(&mut state) as u8).collect();
            match std::panic::catch_unwind(|| super::play(&input)) {
                Ok(written) => messages += written,
                Err(_) => panic!("failed with UPCALL_SEED={seed}"),
            }
            seeds += 1;
            if given.is_some() {
                return;
            }
        }
        println!(
            "ledger: {{\"kind\":\"hostile-filter-host\",\"seeds\":{seeds},\"faults\":{messages},\"seconds\":{},\"result\":\"ok\"}}",
            start.elapsed().as_secs()
        );
    }
}
