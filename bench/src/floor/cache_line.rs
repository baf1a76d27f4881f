//! One cache line to the other core and another one back: nothing between two processes is
//! faster.

use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use upcall_ring::Mapping;

use super::peer::{self, END, OURS, Peer, THEIRS};
use super::{poll_until, time_each};
use crate::measure::Round;

pub const KIND: &str = "cache-line";

pub fn run(core: usize, slice: Duration) -> Result<Round, String> {
    let (memory, fd) = peer::memory()?;
    let (Some(ours), Some(theirs)) = (memory.atomic_u32(OURS), memory.atomic_u32(THEIRS)) else {
        return Err("the shared memory is too small".into());
    };
    let _peer = Peer::start(KIND, core, &fd, None)?;
    let mut number = 0;
    let round = time_each(slice, || {
        number += 1;
        ours.store(number, Release);
        poll_until(|| theirs.load(Acquire) == number);
    });
    ours.store(END, Release);
    Ok(round)
}

pub fn play(memory: &Mapping) {
    let (Some(ours), Some(theirs)) = (memory.atomic_u32(OURS), memory.atomic_u32(THEIRS)) else {
        return;
    };
    let mut last = 0;
    loop {
        poll_until(|| ours.load(Acquire) != last);
        last = ours.load(Acquire);
        if last == END {
            return;
        }
        theirs.store(last, Release);
    }
}
