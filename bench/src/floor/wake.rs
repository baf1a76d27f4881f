//! Two sleepers who wake each other: what it costs when somebody really slept.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::thread::futex;
use upcall_ring::Mapping;

use super::peer::{self, END, OURS, Peer, THEIRS};
use super::time_each;
use crate::measure::Round;

pub const FUTEX: &str = "futex";
pub const EVENTFD: &str = "eventfd";

/// Not private: the words are in shared memory.
const SHARED: futex::Flags = futex::Flags::empty();

pub fn futex(core: usize, slice: Duration) -> Result<Round, String> {
    let (memory, fd) = peer::memory()?;
    let (Some(ours), Some(theirs)) = (memory.atomic_u32(OURS), memory.atomic_u32(THEIRS)) else {
        return Err("the shared memory is too small".into());
    };
    let _peer = Peer::start(FUTEX, core, &fd, None)?;
    let mut number = 0;
    let round = time_each(slice, || {
        number += 1;
        set(ours, number);
        wait_until_not(theirs, number - 1);
    });
    set(ours, END);
    Ok(round)
}

pub fn play_futex(memory: &Mapping) {
    let (Some(ours), Some(theirs)) = (memory.atomic_u32(OURS), memory.atomic_u32(THEIRS)) else {
        return;
    };
    let mut last = 0;
    loop {
        wait_until_not(ours, last);
        last = ours.load(Acquire);
        if last == END {
            return;
        }
        set(theirs, last);
    }
}

fn set(word: &AtomicU32, value: u32) {
    word.store(value, Release);
    let _ = futex::wake(word, SHARED, 1);
}

fn wait_until_not(word: &AtomicU32, value: u32) {
    while word.load(Acquire) == value {
        let _ = futex::wait(word, SHARED, value, None);
    }
}

pub fn eventfd(core: usize, slice: Duration) -> Result<Round, String> {
    let bell = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| e.to_string());
    let (there, back) = (bell()?, bell()?);
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| error.to_string());
    let (memory, fd) = peer::memory()?;
    let _peer = Peer::start(EVENTFD, core, &fd, Some((copy(&there)?, copy(&back)?)))?;
    let round = time_each(slice, || {
        ring(&there);
        wait(&back);
    });
    if let Some(ours) = memory.atomic_u32(OURS) {
        ours.store(END, Release);
    }
    ring(&there);
    Ok(round)
}

pub fn play_eventfd(memory: &Mapping) {
    let Some(ours) = memory.atomic_u32(OURS) else { return };
    let (there, back) = (std::io::stdin(), std::io::stdout());
    loop {
        wait(&there);
        if ours.load(Acquire) == END {
            return;
        }
        ring(&back);
    }
}

fn ring(bell: impl AsFd) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn wait(bell: impl AsFd) {
    let _ = rustix::io::read(bell, &mut [0u8; 8]);
}
