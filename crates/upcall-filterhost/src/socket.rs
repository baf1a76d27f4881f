//! One end of a control socket: whole messages, out and in.
//!
//! What comes in is hostile: a message that is too short, too long, of another wire version,
//! or that brings descriptors is an error (the kernel drops the descriptors: there is no
//! room for them to arrive in). Nothing here waits past its deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use upcall_abi::WIRE_VERSION;
use upcall_abi::control::{DESCRIPTORS_MAX, Header, MESSAGE_MAX};

pub(crate) const HEADER_SIZE: usize = size_of::<Header>();

/// Both ends of a new control socket, closed on exec.
pub(crate) fn pair() -> io::Result<(ControlSocket, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok((ControlSocket { fd: ours, buffer: vec![0; MESSAGE_MAX].into() }, theirs))
}

pub(crate) struct ControlSocket {
    fd: OwnedFd,
    buffer: Box<[u8]>,
}

/// What there was to receive.
pub(crate) enum Received<'a> {
    Message(Header, &'a [u8]),
    /// Nothing yet.
    Nothing,
    /// The other end is closed (or sent an empty packet, which looks the same).
    End,
    /// A message against the rules.
    Violation(String),
}

impl ControlSocket {
    /// Sends one message. `WouldBlock` if the other side does not read: it never has more
    /// than one message to read, so this means that it is out of order.
    pub(crate) fn send(
        &self,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        let header = to_bytes(header);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if HEADER_SIZE + payload.len() > MESSAGE_MAX
            || fds.len() > DESCRIPTORS_MAX
            || (!fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)))
        {
            return Err(Errno::MSGSIZE);
        }
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        retry(|| rustix::net::sendmsg(&self.fd, &parts, &mut control, flags)).map(|_| ())
    }

    /// Takes the next message, if there is one.
    pub(crate) fn receive(&mut self) -> io::Result<Received<'_>> {
        let received = retry(|| {
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let mut control = RecvAncillaryBuffer::default();
            rustix::net::recvmsg(&self.fd, &mut parts, &mut control, RecvFlags::DONTWAIT)
        });
        let message = match received {
            Ok(message) => message,
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::End),
            Err(error) => return Err(error.into()),
        };
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Ok(Received::Violation("sent descriptors".into()));
        }
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Ok(Received::Violation(format!("sent more than {MESSAGE_MAX} bytes")));
        }
        if message.bytes == 0 {
            return Ok(Received::End);
        }
        let Some((header, payload)) = self.buffer[..message.bytes].split_at_checked(HEADER_SIZE)
        else {
            return Ok(Received::Violation(format!("sent a message of {} bytes", message.bytes)));
        };
        let header = from_bytes(header);
        if header.version != WIRE_VERSION {
            let version = header.version;
            return Ok(Received::Violation(format!(
                "speaks wire version {version}, not {WIRE_VERSION}"
            )));
        }
        Ok(Received::Message(header, payload))
    }

    /// Waits until there is something to receive, `also` is readable, or `deadline`.
    pub(crate) fn wait(&self, also: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<()> {
        wait_readable(&[Some(self.fd.as_fd()), also], deadline)
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of `fds` is readable or closed, or until `deadline`.
pub(crate) fn wait_readable(fds: &[Option<BorrowedFd<'_>>], deadline: Instant) -> io::Result<()> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    match rustix::event::poll(&mut polled, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

fn to_bytes(header: Header) -> [u8; HEADER_SIZE] {
    let words = [header.kind, header.version, header.id, header.value];
    let mut bytes = [0; HEADER_SIZE];
    for (word, into) in words.iter().zip(bytes.chunks_exact_mut(4)) {
        into.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn from_bytes(bytes: &[u8]) -> Header {
    let mut words = bytes.chunks_exact(4).map(|word| {
        let mut four = [0; 4];
        four.copy_from_slice(word);
        u32::from_le_bytes(four)
    });
    let mut next = || words.next().unwrap_or(0);
    Header { kind: next(), version: next(), id: next(), value: next() }
}
