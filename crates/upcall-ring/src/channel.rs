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

#[cfg(test)]
mod tests {
    use super::*;

    fn submission() -> Submission {
        Submission {
            seq: 0,
            kind: 0x11,
            op: 0x22,
            flags: 0x3344,
            token: 0x0807_0605_0403_0201,
            offset: 0x1817_1615_1413_1211,
            length: 0x2423_2221,
            status: -2,
            data: 0x3837_3635_3433_3231,
            cookie: 0x4847_4645_4443_4241,
            instance: 0x5453_5251,
            disk: 0x6463_6261,
            reserved: 0,
        }
    }

    fn view(fd: &OwnedFd, entries: u32) -> Mapping {
        Mapping::new(fd, 0, channel_size(entries), Access::ReadWrite).unwrap()
    }

    #[test]
    fn bytes_are_where_the_layout_says() {
        let (mut channel, fd) = Channel::create(8).unwrap();
        let mut host = HostChannel::open(&fd).unwrap();
        let bytes = view(&fd, 8);
        let number = |at| u32::from_ne_bytes(bytes.read_array(at).unwrap());
        assert_eq!(bytes.read_array(0), Some(*b"UPCLRING"));
        assert_eq!((number(8), number(12)), (WIRE_VERSION, 8));

        assert!(host.submissions.before_sleep());
        assert_eq!((number(64), number(128)), (1, 0));
        assert!(channel.completions.before_sleep());
        assert_eq!(number(128), 1);

        channel.submissions.push(&submission()).unwrap();
        let mut expected = [0; 64];
        expected[..4].copy_from_slice(&1u32.to_ne_bytes());
        expected[4..8].copy_from_slice(&[0x11, 0x22, 0x44, 0x33]);
        for (at, start) in [(8, 1), (16, 0x11), (32, 0x31), (40, 0x41)] {
            for i in 0..8 {
                expected[at + i] = start + i as u8;
            }
        }
        for (at, start) in [(24, 0x21), (48, 0x51), (52, 0x61)] {
            for i in 0..4 {
                expected[at + i] = start + i as u8;
            }
        }
        expected[28..32].copy_from_slice(&(-2i32).to_ne_bytes());
        assert_eq!(bytes.read_array(4096), Some(expected));
        assert_eq!(host.submissions.pop(), Some(Submission { seq: 1, ..submission() }));
        assert_eq!((number(192), number(256)), (1, 0));

        let completion = Completion { token: 7, code: 3, ..Completion::default() };
        host.completions.push(&completion).unwrap();
        let second = 4096 + 8 * 64;
        assert_eq!((number(second), number(second + 8)), (1, 7));
        assert_eq!(channel.completions.pop(), Some(Completion { seq: 1, ..completion }));
        assert_eq!((number(192), number(256)), (1, 1));
    }

    #[test]
    fn laps_through_one_ring_leave_the_other_and_the_header_alone() {
        let (mut channel, fd) = Channel::create(4).unwrap();
        let mut host = HostChannel::open(&fd).unwrap();
        let completion = |token| Completion { token, ..Completion::default() };
        (0..4).for_each(|token| host.completions.push(&completion(token)).unwrap());
        for _ in 0..20 {
            channel.submissions.push(&submission()).unwrap();
            assert!(host.submissions.pop().is_some());
        }
        for token in 0..4 {
            assert_eq!(channel.completions.pop().map(|entry| entry.token), Some(token));
        }
        for token in 0..20 {
            host.completions.push(&completion(token)).unwrap();
            assert_eq!(channel.completions.pop().map(|entry| entry.token), Some(token));
        }
        assert_eq!(host.submissions.pop(), None);
        let mut unused = [0; 4096 - 320];
        view(&fd, 4).read(320, &mut unused).unwrap();
        assert_eq!(unused, [0; 4096 - 320]);
    }

    #[test]
    fn the_bell_is_rung_only_for_a_sleeper() {
        let (mut channel, fd) = Channel::create(1).unwrap();
        let mut host = HostChannel::open(&fd).unwrap();
        let doorbell = Doorbell::new().unwrap();
        channel.submissions.push(&submission()).unwrap();
        channel.submissions.wake(&doorbell);
        assert!(!doorbell.clear());
        assert!(host.submissions.pop().is_some());
        assert!(host.submissions.before_sleep());
        channel.submissions.push(&submission()).unwrap();
        channel.submissions.wake(&doorbell);
        assert!(doorbell.clear());
    }

    #[test]
    fn a_ring_is_a_power_of_two_up_to_the_most() {
        for entries in [0, 3, 4095, 8192, 1 << 31, u32::MAX] {
            assert!(Channel::create(entries).is_err(), "{entries}");
        }
        for entries in [1, 4096] {
            let (channel, fd) = Channel::create(entries).unwrap();
            assert_eq!(channel.submissions.entries(), entries);
            assert_eq!(HostChannel::open(fd).unwrap().submissions.entries(), entries);
        }
    }

    #[test]
    fn what_is_no_channel_is_refused() {
        for (at, value, named) in [
            (0, 0u32, "magic"),
            (4, 7, "magic"),
            (8, WIRE_VERSION + 1, "version"),
            (12, 0, "power of two"),
            (12, 24, "power of two"),
            (12, 8192, "power of two"),
            (12, 32, "cannot map"),
        ] {
            let (_channel, fd) = Channel::create(16).unwrap();
            assert!(view(&fd, 16).write(at, &value.to_ne_bytes()).is_some());
            let error = HostChannel::open(&fd).unwrap_err().to_string();
            assert!(error.contains(named), "{value} at {at}: {error}");
        }
        assert!(HostChannel::open(memfd("short", 64).unwrap()).is_err());
    }
}
