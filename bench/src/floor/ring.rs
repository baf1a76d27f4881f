//! An entry of 64 bytes through the product's own ring and one back, with nothing done to
//! it: what an up-call is without flight, filter and account.

use std::fs::File;
use std::time::{Duration, Instant};

use upcall_abi::ring::{Completion, Submission};
use upcall_ring::channel::{Channel, HostChannel};

use super::peer::Peer;
use super::{poll_until, time_each};
use crate::measure::Round;

pub const KIND: &str = "ring";

const ENTRIES: u32 = 256;
/// The kind of a submission that ends the peer.
const LAST: u8 = 0xff;

pub fn run(core: usize, depth: u64, slice: Duration) -> Result<Round, String> {
    let (mut channel, fd) = Channel::create(ENTRIES).map_err(|error| error.to_string())?;
    let peer = Peer::start(KIND, core, &fd, None)?;
    let mut token = 0;
    let mut push = |channel: &mut Channel| {
        token += 1;
        let entry = Submission { token, ..Submission::default() };
        poll_until(|| channel.submissions.push(&entry).is_ok());
    };
    let round = if depth == 1 {
        time_each(slice, || {
            push(&mut channel);
            poll_until(|| channel.completions.pop().is_some());
        })
    } else {
        (0..depth).for_each(|_| push(&mut channel));
        // The peer is there when the first comes back.
        poll_until(|| channel.completions.is_ready());
        let start = Instant::now();
        let mut requests = 0;
        while start.elapsed() < slice {
            for _ in 0..1000 {
                poll_until(|| channel.completions.pop().is_some());
                push(&mut channel);
            }
            requests += 1000;
        }
        let elapsed = start.elapsed();
        (0..depth).for_each(|_| poll_until(|| channel.completions.pop().is_some()));
        Round { requests, elapsed, ..Round::default() }
    };
    let last = Submission { kind: LAST, ..Submission::default() };
    poll_until(|| channel.submissions.push(&last).is_ok());
    drop(peer);
    Ok(round)
}

pub fn play(file: &File) -> Result<(), String> {
    let mut channel = HostChannel::open(file).map_err(|error| error.to_string())?;
    loop {
        let mut entry = None;
        poll_until(|| {
            entry = channel.submissions.pop();
            entry.is_some()
        });
        let Some(Submission { kind, token, .. }) = entry else { continue };
        if kind == LAST {
            return Ok(());
        }
        let answer = Completion { token, ..Completion::default() };
        poll_until(|| channel.completions.push(&answer).is_ok());
    }
}
