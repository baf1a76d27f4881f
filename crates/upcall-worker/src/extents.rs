//! Answers to filters that ask what their disks consist of.
//!
//! Asking a store may block, so each instance that asks has a thread of its own here. It ends when
//! the other end of its socket is closed: the instance was closed, or its host is dead.
//!
//! Always true: what is called a hole or zeroes reads as zeroes for who asks: where a filter below
//! decides data, or it is not known what is below, all is data.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use upcall_abi::control::Disk as WireDisk;
use upcall_abi::extents::{EXTENT_SIZE, EXTENTS_MAX, QUESTION_SIZE};
use upcall_block::{Allocation, Extent, Store};

/// What there is to ask of one disk. Keeps no store open.
pub(crate) struct DiskExtents {
    store: Weak<dyn Store>,
    /// The chain: its instances, and whether each decides data.
    slots: Mutex<Vec<(u32, bool)>>,
}

impl DiskExtents {
    pub(crate) fn new(
        store: &Arc<dyn Store>,
        slots: impl Iterator<Item = (u32, bool)>,
    ) -> Arc<DiskExtents> {
        let slots = Mutex::new(slots.collect());
        Arc::new(DiskExtents { store: Arc::downgrade(store), slots })
    }

    /// The chain is another one. To be called before requests go through it.
    pub(crate) fn rechain(&self, slots: impl Iterator<Item = (u32, bool)>) {
        *self.slots.lock().unwrap_or_else(PoisonError::into_inner) = slots.collect();
    }

    /// Whether an instance reads what the store has.
    fn is_as_stored_below(&self, instance: u32) -> bool {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let place = slots.iter().position(|(known, _)| *known == instance);
        place.is_some_and(|place| slots[place + 1..].iter().all(|(_, decides)| !decides))
    }
}

/// A thread that answers an instance; the end of the socket that is the instance's.
pub(crate) fn serve(
    instance: u32,
    extents: &[Arc<DiskExtents>],
    disks: &[WireDisk],
) -> io::Result<OwnedFd> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let all: Vec<_> = extents.iter().cloned().zip(disks.iter().copied()).collect();
    std::thread::Builder::new().name(format!("extents-{instance}")).spawn(move || {
        // One byte more: a question that is too long is seen to be.
        let mut bytes = [0; QUESTION_SIZE + 1];
        loop {
            let length = match rustix::io::read(&ours, &mut bytes) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(length) => length,
                Err(_) => return,
            };
            let Some(question) = Question::parse(&bytes[..length]) else { return };
            let answer = to_bytes(question.number, &find(instance, &all, &question));
            if rustix::net::send(&ours, &answer, SendFlags::NOSIGNAL).is_err() {
                return;
            }
        }
    })?;
    Ok(theirs)
}

#[derive(Debug, PartialEq)]
struct Question {
    number: u64,
    offset: u64,
    length: u64,
    disk: u32,
    max: u32,
}

impl Question {
    /// None: something else, or the end.
    fn parse(bytes: &[u8]) -> Option<Question> {
        let bytes: &[u8; QUESTION_SIZE] = bytes.try_into().ok()?;
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (number, offset, length) = (long(0), long(8), long(16));
        Some(Question { number, offset, length, disk: short(24), max: short(28) })
    }
}

/// Nothing where nobody knows, or nothing can be asked so.
fn find(instance: u32, all: &[(Arc<DiskExtents>, WireDisk)], question: &Question) -> Vec<Extent> {
    let &Question { offset, length, disk, max, .. } = question;
    let Some((extents, info)) = all.get(disk as usize) else { return Vec::new() };
    let is_whole = (offset | length).is_multiple_of(u64::from(info.block_size));
    let is_inside = offset.checked_add(length).is_some_and(|end| end <= info.capacity);
    if length == 0 || !is_whole || !is_inside || disk == 0 && !extents.is_as_stored_below(instance)
    {
        return Vec::new();
    }
    let Some(store) = extents.store.upgrade() else { return Vec::new() };
    let max = (max as usize).min(EXTENTS_MAX);
    let found = store.extents(offset, length, max.max(1)).unwrap_or_default();
    found.into_iter().take(max).collect()
}

fn to_bytes(number: u64, extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + extents.len() * EXTENT_SIZE);
    bytes.extend(number.to_le_bytes());
    bytes.extend((extents.len() as u64).to_le_bytes());
    for extent in extents {
        let kind: u64 = match extent.allocation {
            Allocation::Data => 0,
            Allocation::Zero => 1,
            Allocation::Hole => 2,
        };
        bytes.extend(extent.length.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
    }
    bytes
}
