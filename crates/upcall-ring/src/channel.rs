//! The two rings between a worker and a filter host, in one memfd.
//!
//! The layout is that of [`upcall_abi::ring`], the protocol that of [`crate::ring`]. The
//! worker makes a channel with [`Channel::create`] and passes the memfd on; a filter host
//! that is written in Rust (tests, mostly) opens it with [`HostChannel::open`].
//!
//! Always true: after the header was read once, nothing in the memory decides about an
//! address. A channel serves one life of one filter host: a new host gets a new one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use upcall_abi::WIRE_VERSION;
use upcall_abi::ring::{
    COMPLETION_HEAD_OFFSET, COMPLETION_SLEEPING_OFFSET, Completion, ENTRIES_MAX, ENTRIES_OFFSET,
    ENTRY_SIZE, MAGIC, RINGS_OFFSET, SUBMISSION_HEAD_OFFSET, SUBMISSION_SLEEPING_OFFSET,
    Submission, channel_size,
};

pub use crate::ring::{Full, Violation};
use crate::ring::{RingMemory, Slot};
use crate::sync::AtomicU32;
use crate::{Access, Doorbell, Mapping, memfd, ring};

/// The end of a channel's ring that entries are put into; see [`ring::Producer`].
pub type Producer<E> = ring::Producer<E, MappedRing>;
/// The end of a channel's ring that entries are taken from; see [`ring::Consumer`].
pub type Consumer<E> = ring::Consumer<E, MappedRing>;

const VERSION_OFFSET: usize = 8;

/// The worker's ends of a channel. They can be moved out and used apart.
#[derive(Debug)]
pub struct Channel {
    /// To the filter host.
    pub submissions: Producer<Submission>,
    /// From the filter host.
    pub completions: Consumer<Completion>,
}

impl Channel {
    /// Makes a channel with two rings of `entries` entries (a power of two, at most
    /// [`ENTRIES_MAX`]), and the sealed memfd for the filter host. The channel does not
    /// need the memfd any more.
    pub fn create(entries: u32) -> io::Result<(Channel, OwnedFd)> {
        check_entries(entries)?;
        let fd = memfd("upcall-channel", channel_size(entries))?;
        let mapping = Mapping::new(&fd, 0, channel_size(entries), Access::ReadWrite)?;
        let header = [
            (0, &MAGIC.to_ne_bytes()[..]),
            (VERSION_OFFSET, &WIRE_VERSION.to_ne_bytes()),
            (ENTRIES_OFFSET, &entries.to_ne_bytes()),
        ];
        for (offset, bytes) in header {
            mapping.write(offset, bytes).ok_or_else(outside)?;
        }
        let (submissions, completions) = MappedRing::both(mapping, entries)?;
        let channel = Channel {
            submissions: Producer::new(submissions),
            completions: Consumer::new(completions),
        };
        Ok((channel, fd))
    }
}

/// The filter host's ends of a channel.
#[derive(Debug)]
pub struct HostChannel {
    /// From the worker.
    pub submissions: Consumer<Submission>,
    /// To the worker.
    pub completions: Producer<Completion>,
}

impl HostChannel {
    /// Opens a channel that a worker made and nobody has used yet. Refuses what is no
    /// channel, or one of another version.
    pub fn open(fd: impl AsFd) -> io::Result<HostChannel> {
        let header = Mapping::new(&fd, 0, RINGS_OFFSET, Access::ReadOnly)?;
        let number = |offset| header.read_array(offset).map(u32::from_ne_bytes).ok_or_else(outside);
        if header.read_array(0).map(u64::from_ne_bytes) != Some(MAGIC) {
            return Err(invalid("not a channel: the magic number is missing"));
        }
        let version = number(VERSION_OFFSET)?;
        if version != WIRE_VERSION {
            let text = format!("the channel has version {version}, we speak {WIRE_VERSION}");
            return Err(invalid(text));
        }
        let entries = number(ENTRIES_OFFSET)?;
        check_entries(entries)?;
        let mapping = Mapping::new(&fd, 0, channel_size(entries), Access::ReadWrite)?;
        let (submissions, completions) = MappedRing::both(mapping, entries)?;
        Ok(HostChannel {
            submissions: Consumer::new(submissions),
            completions: Producer::new(completions),
        })
    }
}

impl<E: ring::Entry> Producer<E> {
    /// Ends a batch of pushes, and rings if the consumer sleeps. Costs nothing if nothing
    /// was pushed since the last call.
    pub fn wake(&mut self, doorbell: &Doorbell) {
        if self.publish() {
            doorbell.ring();
        }
    }
}

fn check_entries(entries: u32) -> io::Result<()> {
    if entries.is_power_of_two() && entries <= ENTRIES_MAX {
        return Ok(());
    }
    let text = format!("a ring has 1 to {ENTRIES_MAX} entries, a power of two, not {entries}");
    Err(invalid(text))
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

fn outside() -> io::Error {
    invalid("outside the channel's mapping")
}

/// One ring of a channel, and what keeps it mapped.
#[derive(Debug)]
pub struct MappedRing {
    slots: NonNull<Slot>,
    entries: u32,
    head: NonNull<AtomicU32>,
    sleeping: NonNull<AtomicU32>,
    _mapping: Arc<Mapping>,
}

// SAFETY: the pointers lead to atomics in a mapping that lives as long as this.
unsafe impl Send for MappedRing {}

const _: () = assert!(size_of::<Slot>() == ENTRY_SIZE && align_of::<Slot>() == 8);

impl MappedRing {
    /// The submission ring and the completion ring. `entries` was checked.
    fn both(mapping: Mapping, entries: u32) -> io::Result<(MappedRing, MappedRing)> {
        let mapping = Arc::new(mapping);
        let ring = |slots, head, sleeping| {
            let at = |offset, length| mapping.pointer(offset, length).ok_or_else(outside);
            Ok::<_, io::Error>(MappedRing {
                slots: at(slots, entries as usize * ENTRY_SIZE)?.cast(),
                entries,
                head: at(head, 4)?.cast(),
                sleeping: at(sleeping, 4)?.cast(),
                _mapping: mapping.clone(),
            })
        };
        let second = RINGS_OFFSET + entries as usize * ENTRY_SIZE;
        Ok((
            ring(RINGS_OFFSET, SUBMISSION_HEAD_OFFSET, SUBMISSION_SLEEPING_OFFSET)?,
            ring(second, COMPLETION_HEAD_OFFSET, COMPLETION_SLEEPING_OFFSET)?,
        ))
    }
}

impl RingMemory for MappedRing {
    fn entries(&self) -> u32 {
        self.entries
    }

    fn slot(&self, position: u32) -> &Slot {
        let index = (position & (self.entries - 1)) as usize;
        // SAFETY: `both` got `entries` slots inside the mapping, at a multiple of 64 bytes
        // of a page, and `index < entries`. The mapping lives as long as `self`. A slot is
        // all atomics, which other processes may change.
        unsafe { self.slots.add(index).as_ref() }
    }

    fn head(&self) -> &AtomicU32 {
        // SAFETY: `both` got these 4 bytes, aligned, inside the mapping; the rest as above.
        unsafe { self.head.as_ref() }
    }

    fn sleeping(&self) -> &AtomicU32 {
        // SAFETY: as in `head`.
        unsafe { self.sleeping.as_ref() }
    }
}
