//! A client that is copied elsewhere, as by a live migration: the server has to say which pages
//! it writes.

use std::collections::BTreeSet;
use std::io;

use super::RawClient;
use crate::memory::SharedMemory;
use crate::message::request;

/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_PROTOCOL_F_LOG_SHMFD.
pub(super) const LOG_SHMFD: u64 = 1 << 1;
const PAGE: u64 = 4096;

/// The log: a bit for each page of guest memory.
#[derive(Debug)]
pub struct Log(SharedMemory);

impl Log {
    /// The pages marked since the last call, by their guest addresses.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for at in 0..self.0.len() {
            let byte = self.0.swap_u8(at, 0);
            let marked = (0..8).filter(|bit| byte & 1 << bit != 0);
            pages.extend(marked.map(|bit| (at as u64 * 8 + bit) * PAGE));
        }
        pages
    }
}

impl RawClient {
    /// Asks that what is written be logged, in the order in which QEMU does.
    pub fn start_logging(&mut self) -> io::Result<Log> {
        let bytes = self.guest_end().div_ceil(PAGE * 64) * 8;
        let log = SharedMemory::sealed(bytes as usize);
        let payload = [bytes, 0].map(u64::to_le_bytes).concat();
        self.connection.ask_with(request::SET_LOG_BASE, &payload, &[log.fd()])?;
        self.connection.command(
            request::SET_FEATURES,
            &(self.features | LOG_ALL).to_le_bytes(),
            &[],
        )?;
        for queue in 0..self.rings.len() {
            self.send_ring_address(queue, true)?;
        }
        Ok(Log(log))
    }

    /// Ends that.
    pub fn stop_logging(&mut self) -> io::Result<()> {
        self.connection.command(request::SET_FEATURES, &self.features.to_le_bytes(), &[])?;
        (0..self.rings.len()).try_for_each(|queue| self.send_ring_address(queue, false))
    }

    /// The pages that are not as they were in `before`, by their guest addresses.
    pub fn changed_pages(&self, before: &[u8]) -> BTreeSet<u64> {
        let now = self.memory.copy(0, before.len());
        let pages = now.chunks(PAGE as usize).zip(before.chunks(PAGE as usize)).enumerate();
        let changed = pages.filter(|(_, (now, before))| now != before);
        changed.map(|(page, _)| self.guest(page * PAGE as usize)).collect()
    }
}
