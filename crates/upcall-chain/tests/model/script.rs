//! What a world's filters, store and guest will do with one request, written down before
//! it starts.
//!
//! Each stop of a flight (a slot on the way down, the store, a slot on the way up) has a
//! list of events, fed in order until the flight moves on; what is left is dropped. The
//! last event of a list moves it on in any case.

use upcall_block::{Errno, Op, Status};
use upcall_chain::Verdict;

use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// The filter says this.
    Says(Verdict),
    /// The store completes; only at the store.
    Stores(Status),
    /// The guest wants it no more.
    Cancel,
    /// The filter's host is gone for good.
    Lost,
    /// The filter's host is gone, and a new one there.
    Restart,
}

/// A request, and the events of its stops.
#[derive(Clone, Debug)]
pub struct Script {
    pub op: Op,
    /// The first slot below the entry.
    pub first: usize,
    pub down: Vec<Vec<Event>>,
    pub store: Vec<Event>,
    pub up: Vec<Vec<Event>>,
}

/// How wild a request's life is.
#[derive(Clone, Copy)]
pub struct Mood {
    pub holds: u64,
    pub cancels: u64,
    pub deaths: u64,
    pub errors: u64,
    pub nonsense: u64,
}

impl Mood {
    pub fn random(random: &mut Random) -> Mood {
        let mut chance = |most| if random.percent(40) { 0 } else { random.number() % most };
        Mood {
            holds: chance(80),
            cancels: chance(15),
            deaths: chance(15),
            errors: chance(40),
            nonsense: chance(10),
        }
    }
}

impl Script {
    pub fn random(random: &mut Random, op: Op, first: usize, slots: usize, mood: Mood) -> Script {
        let down = (0..slots).map(|_| at_slot(random, mood, true)).collect();
        let up = (0..slots).map(|_| at_slot(random, mood, false)).collect();
        let mut store = Vec::new();
        while random.percent(mood.cancels) {
            store.push(Event::Cancel);
        }
        store.push(Event::Stores(status(random, mood)));
        Script { op, first, down, store, up }
    }
}

fn at_slot(random: &mut Random, mood: Mood, down: bool) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        if random.percent(mood.cancels) {
            events.push(Event::Cancel);
        } else if random.percent(mood.holds / 2) {
            events.push(Event::Says(Verdict::Hold));
        } else if random.percent(mood.deaths / 2) {
            events.push(Event::Restart);
        } else {
            break;
        }
    }
    // A hold that is not the first of its kind is a violation; mostly there is one at most.
    let holds_twice = random.percent(mood.nonsense);
    let mut held = false;
    events.retain(|event| match event {
        Event::Says(Verdict::Hold) => !std::mem::replace(&mut held, true) || holds_twice,
        Event::Restart => {
            held = false;
            true
        }
        _ => true,
    });
    events.push(if random.percent(mood.deaths / 2) {
        Event::Lost
    } else {
        Event::Says(verdict(random, mood, down))
    });
    events
}

fn verdict(random: &mut Random, mood: Mood, down: bool) -> Verdict {
    let any_status = status(random, mood);
    if random.percent(mood.nonsense) {
        return random.pick(&[Verdict::Nonsense, Verdict::Watch, Verdict::Done]);
    }
    if random.percent(mood.errors / 2) {
        return Verdict::Fail(error(random));
    }
    match random.below(10) {
        0 => Verdict::Done,
        1..=3 => Verdict::Pass(any_status),
        _ if down => Verdict::Watch,
        _ => Verdict::Pass(any_status),
    }
}

fn status(random: &mut Random, mood: Mood) -> Status {
    if random.percent(mood.errors) { Err(error(random)) } else { Ok(()) }
}

fn error(random: &mut Random) -> Errno {
    random.pick(&[Errno::EIO, Errno::ENOSPC, Errno::EROFS, Errno::EINVAL])
}
