use std::collections::HashMap;

use upcall_block::{DiskInfo, OpSet};

use super::*;

/// Two to a cluster.
const BLOCK: u64 = CLUSTER_BYTES_MAX / 2;
const BLOCKS: u64 = 16;

fn range(block: u64, count: u64) -> Range {
    let disk = DiskInfo {
        capacity: BLOCKS * BLOCK,
        block_size: 512,
        physical_block_size: 512,
        read_only: false,
        ops: OpSet::ALL,
        discard_granularity: 512,
    };
    Range::new(block * BLOCK, count * BLOCK, &disk).unwrap()
}

fn ask(id: u64, op: Op, block: u64, count: u64) -> Ask {
    let range = if op == Op::Flush { Range::EMPTY } else { range(block, count) };
    Ask { id, op, range, fua: false, unmap: false }
}

/// A ledger whose memory is a number, and what came out of it.
#[derive(Default)]
struct Bench {
    ledger: Option<Ledger<u64>>,
    ended: Vec<(u64, Status)>,
    freed: Vec<u64>,
}

impl Bench {
    fn new() -> Bench {
        Bench { ledger: Some(Ledger::new()), ..Bench::default() }
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut Ledger<u64>, &mut Outcome<u64>) -> T) -> T {
        let mut out = Outcome::default();
        let result = act(self.ledger.as_mut().unwrap(), &mut out);
        self.ended.append(&mut out.ended);
        self.freed.append(&mut out.freed);
        result
    }

    fn push(&mut self, ask: Ask) {
        self.with(|ledger, out| ledger.push(ask, out));
    }

    /// Launches what comes next, its memory called by its id.
    fn launch(&mut self) -> Option<Next> {
        self.with(|ledger, _| {
            let next = ledger.next()?;
            let is_new = next.op.has_data() && ledger.memory(next.key).is_none();
            ledger.launch(&next, next.id.filter(|_| is_new));
            Some(next)
        })
    }

    fn complete(&mut self, next: Next, status: Status) {
        self.with(|ledger, out| ledger.complete(next.key, status, out));
    }

    /// Launches and completes everything there is; gives what it was.
    fn run(&mut self) -> Vec<(Key, Op)> {
        let mut done = Vec::new();
        while let Some(next) = self.launch() {
            self.complete(next, Ok(()));
            done.push((next.key, next.op));
        }
        done
    }

    fn restart(&mut self) {
        self.with(|ledger, _| ledger.restart());
    }
}

#[test]
fn a_write_is_answered_at_once_and_kept_until_a_flush() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 1));
    bench.run();
    assert_eq!((&bench.ended[..], &bench.freed[..]), (&[(1, Ok(()))][..], &[][..]));
    bench.push(ask(2, Op::Flush, 0, 0));
    bench.run();
    assert_eq!(bench.freed, [1]);
    assert_eq!(bench.ended, [(1, Ok(())), (2, Ok(()))]);
}

#[test]
fn a_flush_covers_only_what_was_completed_before_it_was_sent() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 1));
    bench.push(ask(2, Op::Flush, 0, 0));
    let (write, flush) = (bench.launch().unwrap(), bench.launch().unwrap());
    bench.complete(write, Ok(()));
    bench.complete(flush, Ok(()));
    assert_eq!(bench.freed, [] as [u64; 0], "the write may not be durable");
    bench.push(ask(3, Op::Flush, 0, 0));
    bench.run();
    assert_eq!(bench.freed, [1]);
}

#[test]
fn modifications_that_overlap_never_fly_together() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 4));
    bench.push(ask(2, Op::WriteZeroes, 3, 2));
    bench.push(ask(3, Op::Write, 8, 1));
    let first = bench.launch().unwrap();
    assert_eq!(bench.launch(), None, "blocks 3 are in flight; who is behind waits too");
    bench.complete(first, Ok(()));
    assert_eq!(bench.launch().unwrap().id, Some(2));
    assert_eq!(bench.launch().unwrap().id, Some(3));
}

/// QEMU gives a cluster back when nothing is left in it, also while a write to other bytes
/// of it is on its way: what was written is then gone, or lies in another's cluster.
#[test]
fn what_zeroes_never_flies_beside_a_write_to_the_same_cluster() {
    for (op, other) in [(Op::WriteZeroes, Op::Write), (Op::Write, Op::Discard)] {
        let mut bench = Bench::new();
        for (id, op, block) in [(1, op, 0), (2, other, 1), (3, Op::Write, 2)] {
            bench.push(ask(id, op, block, 1));
        }
        let first = bench.launch().unwrap();
        assert_eq!(bench.launch(), None, "{other:?} beside {op:?}");
        bench.complete(first, Ok(()));
        let second = bench.launch().unwrap();
        assert_eq!(bench.launch().unwrap().id, Some(3), "another cluster");
        bench.complete(second, Ok(()));
        // Nor when both are carried out again.
        bench.restart();
        let first = bench.launch().unwrap();
        assert_eq!((first.key, bench.launch()), (Key::Again(0), None), "{op:?}, then {other:?}");
    }
}

#[test]
fn a_write_waits_for_a_discard_below_it() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Discard, 0, 8));
    bench.push(ask(2, Op::Write, 4, 1));
    let discard = bench.launch().unwrap();
    assert_eq!(bench.launch(), None, "the discard may still come, and would take it away");
    bench.complete(discard, Ok(()));
    assert_eq!(bench.launch().unwrap().id, Some(2));
}

#[test]
fn a_new_daemon_gets_what_was_kept_then_a_flush_then_what_flew_in_order() {
    let mut bench = Bench::new();
    for (id, block) in [(1, 0), (2, 0), (3, 5)] {
        bench.push(ask(id, Op::Write, block, 1));
        bench.run();
    }
    for (id, block) in [(4, 0), (5, 1), (6, 2)] {
        bench.push(ask(id, Op::Write, block, 1));
    }
    bench.push(ask(7, Op::Read, 0, 1));
    let flying: Vec<Next> = (0..4).map(|_| bench.launch().unwrap()).collect();
    bench.complete(flying[1], Ok(()));
    bench.restart();
    // 2 overlaps 1 and waits for it.
    let first = bench.launch().unwrap();
    assert_eq!(first.key, Key::Again(0));
    assert_eq!(bench.launch(), None);
    bench.complete(first, Ok(()));
    let rest: Vec<(Key, Op)> = bench.run();
    let expected = [
        (Key::Again(1), Op::Write),
        (Key::Again(2), Op::Write),
        (Key::Again(3), Op::Write),
        (Key::OwnFlush, Op::Flush),
        (Key::Request(3), Op::Write),
        (Key::Request(5), Op::Write),
        (Key::Request(6), Op::Read),
    ];
    assert_eq!(rest, expected);
    let ids: Vec<u64> = bench.ended.iter().map(|end| end.0).collect();
    assert_eq!(ids, [1, 2, 3, 5, 4, 6, 7], "each once");
}

#[test]
fn a_durable_write_is_answered_after_a_flush_of_its_own() {
    let mut bench = Bench::new();
    bench.push(Ask { fua: true, ..ask(1, Op::Write, 0, 1) });
    let write = bench.launch().unwrap();
    bench.complete(write, Ok(()));
    assert!(bench.ended.is_empty());
    // The daemon dies before the flush: it is written again, and still not answered.
    bench.restart();
    let again = bench.launch().unwrap();
    bench.complete(again, Ok(()));
    assert!(bench.ended.is_empty());
    assert_eq!(bench.run(), [(Key::OwnFlush, Op::Flush)]);
    assert_eq!(bench.ended, [(1, Ok(()))]);
}

#[test]
fn after_a_failed_flush_nothing_that_modifies_succeeds_and_reads_do() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 1));
    bench.run();
    bench.push(ask(2, Op::Flush, 0, 0));
    bench.push(ask(3, Op::Write, 1, 1));
    bench.push(ask(4, Op::Flush, 0, 0));
    let flush = bench.launch().unwrap();
    let write = bench.launch().unwrap();
    bench.complete(flush, Err(Errno::EIO));
    bench.complete(write, Ok(()));
    bench.push(ask(5, Op::Discard, 1, 1));
    bench.push(ask(6, Op::Read, 1, 1));
    bench.run();
    let eio = Err(Errno::EIO);
    let mut ended = bench.ended.clone();
    ended.sort_by_key(|end| end.0);
    assert_eq!(ended, [(1, Ok(())), (2, eio), (3, eio), (4, eio), (5, eio), (6, Ok(()))]);
}

#[test]
fn a_flush_beside_one_that_fails_fails_too() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Flush, 0, 0));
    bench.push(ask(2, Op::Flush, 0, 0));
    let (first, second) = (bench.launch().unwrap(), bench.launch().unwrap());
    bench.complete(first, Err(Errno::EIO));
    bench.complete(second, Ok(()));
    assert_eq!(bench.ended, [(1, Err(Errno::EIO)), (2, Err(Errno::EIO))]);
}

#[test]
fn what_cannot_be_written_again_is_lost_and_said_so() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 1));
    bench.run();
    bench.restart();
    let again = bench.launch().unwrap();
    let lost = bench.with(|ledger, out| {
        ledger.complete(again.key, Err(Errno::EIO), out);
        out.is_lost
    });
    assert!(lost && bench.freed.is_empty(), "its memory may still be in use");
    bench.restart();
    bench.with(|ledger, out| ledger.fail(out));
    assert_eq!(bench.freed, [1]);
    bench.push(ask(2, Op::Write, 0, 1));
    assert_eq!(bench.ended.last(), Some(&(2, Err(Errno::EIO))));
}

#[test]
fn giving_up_ends_everything() {
    let mut bench = Bench::new();
    bench.push(ask(1, Op::Write, 0, 1));
    bench.run();
    bench.push(ask(2, Op::Read, 0, 1));
    bench.push(ask(3, Op::Write, 0, 1));
    bench.launch();
    bench.restart();
    bench.with(|ledger, out| ledger.give_up(out));
    bench.ended.sort_by_key(|end| end.0);
    assert_eq!(bench.ended[1..], [(2, Err(Errno::EIO)), (3, Err(Errno::EIO))]);
    let mut freed = bench.freed.clone();
    freed.sort();
    assert_eq!(freed, [1, 2], "3 had none yet");
    assert!(bench.ledger.unwrap().is_idle());
}

/// A daemon that carries requests out at any time after they were sent and may die at any
/// time; each block then has one of the values it had since the last flush.
struct World {
    rng: u64,
    now: [u64; BLOCKS as usize],
    may_be: Vec<Vec<u64>>,
    flying: Vec<(Next, u64)>,
}

impl World {
    fn below(&mut self, limit: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.rng >> 33) % limit
    }

    fn apply(&mut self, next: &Next, value: u64) {
        for block in blocks(next.range) {
            self.now[block] = value;
            self.may_be[block].push(value);
        }
    }

    fn die(&mut self) {
        // What was sent may have been carried out, in any order.
        while !self.flying.is_empty() {
            let index = self.below(self.flying.len() as u64) as usize;
            let (next, value) = self.flying.swap_remove(index);
            if next.op.is_modification() && self.below(2) == 0 {
                self.apply(&next, value);
            }
        }
        for block in 0..BLOCKS as usize {
            let choice = self.below(self.may_be[block].len() as u64) as usize;
            self.now[block] = self.may_be[block][choice];
        }
        // What is there now is what the next one finds; of the past nothing comes back.
        self.may_be = self.now.iter().map(|value| vec![*value]).collect();
    }
}

fn blocks(range: Range) -> std::ops::Range<usize> {
    let first = (range.offset() / BLOCK) as usize;
    first..first + (range.length() as u64 / BLOCK) as usize
}

#[test]
fn whenever_a_daemon_dies_reads_give_what_was_written_last() {
    for seed in 0..300 {
        let mut world = World {
            rng: seed,
            now: [0; BLOCKS as usize],
            may_be: vec![vec![0]; BLOCKS as usize],
            flying: vec![],
        };
        let mut bench = Bench::new();
        // What each block holds for who keeps to the rules; None: being written.
        let mut expected = [Some(0u64); BLOCKS as usize];
        let mut asked: HashMap<u64, Ask> = HashMap::new();
        let mut next_id = 1;
        let mut answered = 0;
        for _ in 0..400 {
            match world.below(20) {
                0 => {
                    world.die();
                    bench.restart();
                }
                1..8 if asked.len() < 8 => {
                    let (first, count) = (world.below(BLOCKS - 3), 1 + world.below(3));
                    let op = match world.below(8) {
                        0..3 => Op::Read,
                        3 => Op::Flush,
                        4 => Op::WriteZeroes,
                        _ => Op::Write,
                    };
                    let new = Ask { fua: world.below(6) == 0, ..ask(next_id, op, first, count) };
                    let is_busy = asked.values().any(|other| {
                        let (a, b) = (blocks(other.range), blocks(new.range));
                        a.start < b.end && b.start < a.end
                    });
                    if is_busy && op != Op::Flush {
                        continue;
                    }
                    if op.is_modification() {
                        blocks(new.range).for_each(|block| expected[block] = None);
                    }
                    asked.insert(next_id, new);
                    bench.push(new);
                    next_id += 1;
                }
                8..14 => {
                    if let Some(next) = bench.launch() {
                        let memory = bench.ledger.as_ref().unwrap().memory(next.key).copied();
                        world.flying.push((next, memory.unwrap_or(0)));
                    }
                }
                _ if !world.flying.is_empty() => {
                    let index = world.below(world.flying.len() as u64) as usize;
                    let (next, value) = world.flying.swap_remove(index);
                    match next.op {
                        Op::Flush => {
                            world.may_be = world.now.iter().map(|value| vec![*value]).collect();
                        }
                        Op::Read => {
                            for block in blocks(next.range) {
                                let expected = expected[block].unwrap();
                                assert_eq!(world.now[block], expected, "seed {seed}: {block}");
                            }
                        }
                        _ => world.apply(&next, value),
                    }
                    bench.complete(next, Ok(()));
                }
                _ => {}
            }
            for (id, status) in bench.ended.drain(..) {
                assert_eq!(status, Ok(()), "seed {seed}");
                let ask = asked.remove(&id).expect("answered once");
                answered += 1;
                if !ask.op.is_modification() {
                    continue;
                }
                let value = if ask.op == Op::Write { id } else { 0 };
                for block in blocks(ask.range) {
                    expected[block] = Some(value);
                    assert!(!ask.fua || world.may_be[block] == [value], "seed {seed}: not durable");
                }
            }
        }
        assert!(answered > 20, "seed {seed} proved nothing");
    }
}
