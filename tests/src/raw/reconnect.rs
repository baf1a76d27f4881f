//! A client whose server may die: it keeps its memory, its rings and the in-flight region, and
//! takes up the next connection where the last one ended, as QEMU does.
//!
//! QEMU says as the base of a ring what its used index is, whatever was taken beyond it. Only
//! the in-flight region tells the server what is missing.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{RawClient, RawOptions, protocol};
use crate::message::{Connection, request};

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const INFLIGHT_SHMFD: u64 = 1 << 12;
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// The in-flight region that the server gave, and what it said about it.
#[derive(Debug)]
pub(super) struct Inflight {
    fd: OwnedFd,
    /// The payload of the message.
    description: Vec<u8>,
}

impl RawClient {
    /// As [`connect`](Self::connect), with in-flight tracking.
    pub fn connect_tracked(path: &Path, options: RawOptions) -> io::Result<RawClient> {
        let mut client = RawClient::connect(path, options)?;
        client.try_reconnect(path)?;
        Ok(client)
    }

    /// Connects again, to the same server or the next one. Tries until it succeeds: a server
    /// may die while it is spoken to. Panics if that takes too long.
    #[track_caller]
    pub fn reconnect(&mut self, path: &Path) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.try_reconnect(path) {
            assert!(Instant::now() < deadline, "no server for {PATIENCE:?}: {error}");
            std::thread::sleep(PAUSE);
        }
    }

    /// As [`reconnect`](Self::reconnect), if the server has gone, as QEMU does; true if it had.
    #[track_caller]
    pub fn reconnect_if_cut(&mut self, path: &Path) -> bool {
        let is_cut = self.connection.is_cut();
        if is_cut {
            self.reconnect(path);
        }
        is_cut
    }

    fn try_reconnect(&mut self, path: &Path) -> io::Result<()> {
        // Queues start only once the old connection is gone.
        self.connection = Connection::open(path)?;
        let connection = &mut self.connection;
        connection.command(request::SET_OWNER, &[], &[])?;
        connection.ask(request::GET_FEATURES, &[])?;
        let offered = connection.ask(request::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        let wanted = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | INFLIGHT_SHMFD;
        if offered & wanted != wanted {
            return Err(io::Error::other("the server lacks INFLIGHT_SHMFD"));
        }
        connection.command(request::SET_PROTOCOL_FEATURES, &wanted.to_le_bytes(), &[])?;
        connection.acks = true;
        connection.command(request::SET_FEATURES, &self.features.to_le_bytes(), &[])?;
        self.send_memory_table()?;
        if self.inflight.is_none() {
            self.inflight = Some(self.get_inflight()?);
        }
        let Inflight { fd, description } = self.inflight.as_ref().expect("just got");
        self.connection.command(SET_INFLIGHT_FD, description, &[fd.as_fd()])?;
        for queue in 0..self.rings.len() {
            self.start(queue, self.device_index(queue))?;
            // As QEMU does: what is available already is looked at.
            self.kick(queue);
        }
        Ok(())
    }

    fn get_inflight(&self) -> io::Result<Inflight> {
        let mut payload = vec![0; 16];
        payload.extend_from_slice(&(self.rings.len() as u16).to_le_bytes());
        payload.extend_from_slice(&self.options.queue_size.to_le_bytes());
        // The struct is not packed on the wire, and ends with padding.
        payload.extend_from_slice(&[0; 4]);
        let mut reply = self.connection.ask(GET_INFLIGHT_FD, &payload)?;
        let fd = reply.fds.pop().ok_or_else(|| io::Error::other("no in-flight descriptor"))?;
        Ok(Inflight { fd, description: reply.payload })
    }
}
