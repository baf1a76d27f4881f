//! One world: a chain, requests in flight, and the events that befall them in random order.
//!
//! Here the promises are checked that hold whatever the reference says: see
//! [`World::check_promises`].

use std::num::NonZeroU32;

use upcall_block::{DiskInfo, Errno, Op, Range, Status};
use upcall_chain::{
    Action, Chain, Chunks, Entry, Flight, Generation, Join, Route, SlotSpec, Step, Verdict,
    Violation,
};

use crate::filters;
use crate::player::{Player, Stop, slot};
use crate::random::Random;
use crate::reference::{self, Seen};
use crate::script::{Event, Mood, Script};

/// How often what happened, over all worlds.
#[derive(Debug, Default)]
pub struct Tally {
    flights: u64,
    issued: u64,
    emulated: u64,
    withheld: u64,
    refused: u64,
    told: u64,
    cancels: u64,
    lost: u64,
    restarts: u64,
    violations: u64,
    strays: u64,
}

impl Tally {
    /// A test that plays nothing proves nothing.
    pub fn check_that_everything_happened(&self) {
        let counts = [
            ("flights", self.flights),
            ("requests of filters", self.issued),
            ("emulated requests", self.emulated),
            ("withheld operations", self.withheld),
            ("refused filters", self.refused),
            ("completions told to watchers", self.told),
            ("cancels told to holders", self.cancels),
            ("lost hosts", self.lost),
            ("restarted hosts", self.restarts),
            ("violations", self.violations),
            ("strays", self.strays),
        ];
        for (what, count) in counts {
            assert!(count >= 1000, "only {count} {what} in all worlds");
        }
    }
}

/// One request in parts, or in one.
struct Request {
    join: Join,
    /// The status of each part, as they ended.
    parts: Vec<Status>,
    parts_expected: usize,
    completed: Option<Status>,
}

struct World<'a> {
    random: Random,
    tally: &'a mut Tally,
    chain: Chain,
    store: DiskInfo,
    /// In the order of the chain.
    slots: Vec<SlotSpec>,
    mood: Mood,
    players: Vec<Player>,
    requests: Vec<Request>,
}

pub fn play(seed: u64, tally: &mut Tally) {
    let mut random = Random::new(seed);
    let count = random.below(9);
    let given: Vec<SlotSpec> = (0..count).map(|_| filters::random_spec(&mut random)).collect();
    let sound: Vec<SlotSpec> =
        given.iter().filter(|spec| reference::is_sound(spec)).cloned().collect();
    let store = filters::random_store(&mut random);
    for spec in &given {
        assert_eq!(spec.check().is_ok(), reference::is_sound(spec), "{spec:?}");
    }
    if sound.len() < given.len() {
        tally.refused += 1;
        Chain::new(Generation(seed), given, &store).expect_err("a filter that is not sound");
    }
    let chain = Chain::new(Generation(seed), sound.clone(), &store).expect("sound filters");
    let order = reference::order(&sound);
    let in_chain: Vec<usize> = chain.slots().map(|(slot, _)| chain.source_index(slot)).collect();
    assert_eq!(in_chain, order, "the order of the slots");
    let slots = order.into_iter().map(|source_index| sound[source_index].clone()).collect();

    let mood = Mood::random(&mut random);
    let (players, requests) = (Vec::new(), Vec::new());
    let mut world = World { random, tally, chain, store, slots, mood, players, requests };
    world.check_chain();
    for _ in 0..1 + world.random.below(6) {
        world.request(Entry::Top);
    }
    world.play_to_the_end();
}

fn first_below(entry: Entry) -> usize {
    match entry {
        Entry::Top => 0,
        Entry::Below(issuer) => issuer.index() + 1,
    }
}

impl World<'_> {
    /// Routes, plans and data of every operation from every entry.
    fn check_chain(&mut self) {
        let entries = (0..self.slots.len()).map(|index| Entry::Below(slot(index)));
        for entry in entries.chain([Entry::Top]) {
            let below = &self.slots[first_below(entry)..];
            for op in Op::ALL {
                let route = reference::route(below, op, &self.store);
                assert_eq!(self.chain.route(op, entry), route, "{op} from {entry:?}");
                let needs_arena = reference::needs_arena(below, op);
                assert_eq!(self.chain.needs_arena(op, entry), needs_arena, "{op} from {entry:?}");
                let plan: Vec<_> = self.chain.plan(op, entry).iter().collect();
                let asked = |index: &usize| self.slots[*index].ops.contains(op);
                let asked = (first_below(entry)..self.slots.len()).filter(asked);
                assert_eq!(plan, asked.map(slot).collect::<Vec<_>>(), "{op} from {entry:?}");
                if entry == Entry::Top {
                    let offered = self.chain.info().ops.contains(op);
                    assert_eq!(offered, route != Route::Withheld, "{op} offered");
                }
            }
        }
        let info = DiskInfo { ops: self.store.ops, ..self.chain.info().clone() };
        assert_eq!(info, self.store, "the chain narrows operations alone");
    }

    /// A request of the guest or of a filter begins, in as many flights as its route takes.
    fn request(&mut self, entry: Entry) {
        let op = self.random.pick(&Op::ALL);
        let (op, parts) = match self.chain.route(op, entry) {
            Route::Native => (op, 1),
            Route::AsWrites => {
                self.tally.emulated += 1;
                self.check_withheld(op, entry);
                let length = 512 * (1 + self.random.number() % 64);
                let range = Range::new(0, length, &self.store).expect("a range of the disk");
                (Op::Write, Chunks::new(range, NonZeroU32::new(8192).expect("not 0")).count())
            }
            Route::Withheld => return self.check_withheld(op, entry),
        };
        let count = u32::try_from(parts).ok().and_then(NonZeroU32::new).expect("a few parts");
        let request = self.requests.len();
        self.requests.push(Request {
            join: Join::new(count),
            parts: Vec::new(),
            parts_expected: parts,
            completed: None,
        });
        for _ in 0..parts {
            let (first, slots) = (first_below(entry), self.slots.len());
            let script = Script::random(&mut self.random, op, first, slots, self.mood);
            self.players.push(Player::new(&self.chain, entry, script, request));
        }
    }

    /// A flight that would slip an operation past a filter reaches nobody.
    fn check_withheld(&mut self, op: Op, entry: Entry) {
        self.tally.withheld += 1;
        let (mut flight, action) = Flight::new(&self.chain, op, entry);
        assert_eq!(action, Action::Complete(Err(Errno::EOPNOTSUPP)), "{op} from {entry:?}");
        assert_eq!(flight.handle_store(Ok(())), ignored(Violation::Ended));
    }

    fn play_to_the_end(&mut self) {
        loop {
            let flying = |player: &(usize, &Player)| player.1.stop != Stop::Ended;
            let flying: Vec<usize> =
                self.players.iter().enumerate().filter(flying).map(|(number, _)| number).collect();
            if flying.is_empty() {
                break;
            }
            let number = self.random.pick(&flying);
            if self.random.percent(10) {
                self.stray(number);
            } else {
                self.step(number);
            }
        }
        for request in &self.requests {
            assert_eq!(request.parts.len(), request.parts_expected, "each part ends");
            let first_error = request.parts.iter().find(|status| status.is_err());
            let expected = first_error.copied().unwrap_or(Ok(()));
            assert_eq!(request.completed, Some(expected), "of {:?}", request.parts);
        }
    }

    /// The next event of a flight; now and then the filter that has it issues a request.
    fn step(&mut self, number: usize) {
        if let Some(issuer) = self.players[number].is_at()
            && self.players.len() < 16
            && self.random.percent(10)
        {
            self.tally.issued += 1;
            self.request(Entry::Below(issuer));
        }
        let event = self.players[number].play(&self.chain);
        match event {
            Event::Lost => self.tally.lost += 1,
            Event::Restart => self.tally.restarts += 1,
            _ => {}
        }
        if self.players[number].stop == Stop::Ended {
            self.end(number);
        }
    }

    /// An event that does not belong: it changes nothing, whatever it is.
    fn stray(&mut self, number: usize) {
        self.tally.strays += 1;
        let verdict = self.random.pick(&[
            Verdict::Pass(Ok(())),
            Verdict::Watch,
            Verdict::Hold,
            Verdict::Done,
        ]);
        let other = slot(self.random.below(64));
        let player = &mut self.players[number];
        let before = format!("{:?}", player.flight);
        if !player.flight.is_waiting_on(other) {
            let step = player.flight.handle_verdict(&self.chain, other, verdict);
            assert_eq!(step, ignored(Violation::NotAsked { slot: other }));
            for step in [player.flight.handle_lost(other), player.flight.handle_restart(other)] {
                assert_eq!(step, Step { action: Action::Wait, violation: None });
            }
        }
        if player.stop != Stop::Store {
            let step = player.flight.handle_store(Ok(()));
            assert_eq!(step, ignored(Violation::NotWithStore));
        }
        assert_eq!(format!("{:?}", player.flight), before);
    }

    fn end(&mut self, number: usize) {
        self.tally.flights += 1;
        let player = &mut self.players[number];
        let expected = reference::walk(&self.slots, &player.script);
        assert_eq!(player.seen, expected, "through {:#?} by {:#?}", self.slots, player.script);
        let Some(Seen::Complete(status)) = player.seen.last().copied() else {
            panic!("an end without completion")
        };
        let before = format!("{:?}", player.flight);
        let any = slot(self.random.below(64));
        for step in [
            player.flight.handle_verdict(&self.chain, any, Verdict::Pass(Ok(()))),
            player.flight.handle_store(Ok(())),
            player.flight.handle_cancel(),
            player.flight.handle_lost(any),
            player.flight.handle_restart(any),
        ] {
            assert_eq!(step, ignored(Violation::Ended));
        }
        assert_eq!(format!("{:?}", player.flight), before, "nothing changes after the end");

        for seen in &player.seen {
            match seen {
                Seen::Done(..) => self.tally.told += 1,
                Seen::Cancel(_) => self.tally.cancels += 1,
                Seen::Violation(_) => self.tally.violations += 1,
                _ => {}
            }
        }
        let request = &mut self.requests[player.request];
        request.parts.push(status);
        if let Some(status) = request.join.handle_part(status) {
            assert_eq!(request.completed.replace(status), None, "a request completes once");
        }
        self.check_promises(number);
    }

    /// Rules 1, 2 and 5, read off what was seen.
    fn check_promises(&self, number: usize) {
        let player = &self.players[number];
        let seen = &player.seen;
        let place = |wanted: fn(&Seen) -> bool| seen.iter().position(wanted);
        let start = |seen: &Seen| if let Seen::Start(index) = seen { Some(*index) } else { None };
        let done = |seen: &Seen| if let Seen::Done(index, _) = seen { Some(*index) } else { None };
        let mut asked: Vec<usize> = seen.iter().filter_map(start).collect();
        let mut told: Vec<usize> = seen.iter().filter_map(done).collect();
        if player.restarts() {
            // A new instance may be asked again what the old one did not answer (rule 6).
            asked.dedup();
            told.dedup();
        }
        assert!(asked.is_sorted_by(|a, b| a < b), "down the chain, each once: {seen:?}");
        assert!(told.is_sorted_by(|a, b| a > b), "up the chain, each once: {seen:?}");
        assert!(
            asked.iter().all(|index| *index >= player.script.first),
            "not the issuer: {seen:?}"
        );
        assert!(told.iter().all(|index| asked.contains(index)), "told without asked: {seen:?}");
        let place_of = |index: &usize| (self.slots[*index].class as u32, self.slots[*index].order);
        assert!(asked.is_sorted_by_key(place_of), "by class and number: {seen:?}");

        let first_up = place(|seen| matches!(seen, Seen::Done(..) | Seen::Complete(_)));
        let last_down = seen.iter().rposition(|seen| matches!(seen, Seen::Start(_) | Seen::Store));
        assert!(last_down < first_up, "down after up: {seen:?}");
        let stores = seen.iter().filter(|seen| **seen == Seen::Store).count();
        assert!(stores <= 1, "the store gets it once: {seen:?}");
        if let Some(place) = place(|seen| *seen == Seen::Store) {
            assert_eq!(last_down, Some(place), "the store comes last: {seen:?}");
        }
        let completions = seen.iter().filter(|seen| matches!(seen, Seen::Complete(_))).count();
        assert_eq!(completions, 1, "it ends once: {seen:?}");
    }
}

fn ignored(violation: Violation) -> Step {
    Step { action: Action::Wait, violation: Some(violation) }
}
