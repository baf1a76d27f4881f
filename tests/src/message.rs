//! vhost-user messages, written from the protocol's text and able to say what it forbids.
//!
//! A message is a header of three u32 (request, flags, size of the payload), the payload,
//! and descriptors that travel beside it. All numbers are little-endian.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Requests of the frontend, by their numbers in the protocol.
#[allow(missing_docs)]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
const PAYLOAD_BYTES_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

/// One message as it arrived.
#[derive(Debug)]
pub struct Message {
    /// Which request it answers.
    pub request: u32,
    /// Header flags.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one u64.
    pub fn u64(&self) -> io::Result<u64> {
        let bytes = self.payload.as_slice().try_into().map_err(|_| bad("reply is not a u64"))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The frontend's end of a vhost-user connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Whether REPLY_ACK was negotiated: then [`command`](Self::command) waits for the ack.
    pub acks: bool,
}

impl Connection {
    /// Connects, once.
    pub fn open(path: &Path) -> io::Result<Connection> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection { stream, acks: false })
    }

    /// Whether the other side has ended it.
    pub fn is_cut(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Sends bytes as they are, with descriptors; they need not be a message.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(bad("too many descriptors"));
        }
        let sent =
            sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(bad("message was cut")) }
    }

    /// Sends a message with these header flags besides the version.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [request, VERSION | flags, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// The next message from the server. `UnexpectedEof` if it closed the connection.
    pub fn receive(&self) -> io::Result<Message> {
        let mut header = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC,
        )?
        .bytes;
        if received < HEADER_BYTES {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let size = word(8) as usize;
        if size > PAYLOAD_BYTES_MAX {
            return Err(bad("payload is too long"));
        }
        let mut payload = vec![0; size];
        (&self.stream).read_exact(&mut payload)?;
        Ok(Message { request: word(0), flags: word(4), payload, fds })
    }

    /// Sends a request that has a reply of its own, and waits for it.
    pub fn ask(&self, request: u32, payload: &[u8]) -> io::Result<Message> {
        self.ask_with(request, payload, &[])
    }

    /// As [`ask`](Self::ask), with descriptors.
    pub fn ask_with(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<Message> {
        self.send(request, 0, payload, fds)?;
        let reply = self.receive()?;
        if reply.request != request || reply.flags & REPLY == 0 {
            return Err(bad("not the reply to this request"));
        }
        Ok(reply)
    }

    /// Sends a request that has no reply of its own. If acks were negotiated, waits for the
    /// ack and makes a refusal an error.
    pub fn command(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if !self.acks {
            return self.send(request, 0, payload, fds);
        }
        self.send(request, NEED_REPLY, payload, fds)?;
        let reply = self.receive()?;
        if reply.request != request {
            return Err(bad("not the ack of this request"));
        }
        match reply.u64()? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("request {request} was refused ({code})"))),
        }
    }

    /// Whether the server closes the connection within the patience of a test.
    pub fn is_closed_by_server(&self) -> bool {
        let mut byte = [0];
        loop {
            match (&self.stream).read(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
