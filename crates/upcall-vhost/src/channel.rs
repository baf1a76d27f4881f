//! The backend channel: a socket on which we may say something unasked. One thing is said:
//! the configuration space has changed, read it again.
//!
//! No acknowledgement is asked for, although the protocol has one: QEMU reads the
//! configuration, over the connection that we serve, before it would acknowledge, so whoever
//! waited for it would wait for themselves.
//!
//! Always true: nothing here blocks, and nothing that arrives on the channel is read. A
//! frontend that does not read it is told no more once it is full; it has enough to read then.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags,
};

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// The version in a header's flags.
const VERSION: u32 = 1;

/// One frontend's channel, once it gave one.
#[derive(Debug, Default)]
pub(crate) struct BackendChannel(Mutex<Option<OwnedFd>>);

impl BackendChannel {
    /// From now on, `fd` is the channel.
    pub fn set(&self, fd: OwnedFd) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
    }

    /// Says that the configuration space may have changed. Nothing happens without a channel.
    pub fn say_config_change(&self) {
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(channel) = &*channel else { return };
        let mut message = [0; 12];
        message[..4].copy_from_slice(&CONFIG_CHANGE.to_le_bytes());
        message[4..8].copy_from_slice(&VERSION.to_le_bytes());
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let nothing = &mut SendAncillaryBuffer::default();
        // Full or closed: the frontend's business. It is told again when the device starts.
        let _ = rustix::net::sendmsg(channel, &[IoSlice::new(&message)], nothing, flags);
    }
}

/// A copy of the descriptor that travels with the next message, if there is exactly one. The
/// message stays where it is: the `vhost` crate reads it, checks it, and keeps its own
/// descriptor to itself.
pub(crate) fn peek_descriptor(stream: &UnixStream) -> Option<OwnedFd> {
    receive(stream, &mut [0], RecvFlags::PEEK)
}

/// Takes the next bytes out of the socket, for a message that the `vhost` crate does not know,
/// and gives the descriptor that came with them, if there is exactly one. They are there.
pub(crate) fn take(stream: &UnixStream, into: &mut [u8]) -> Option<OwnedFd> {
    receive(stream, into, RecvFlags::empty())
}

fn receive(stream: &UnixStream, into: &mut [u8], flags: RecvFlags) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(into)], &mut control, flags).ok()?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if fds.len() == 1 { fds.pop() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_is_said_is_a_message_without_a_body_that_wants_no_answer() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::default();
        channel.say_config_change();
        channel.set(ours.into());
        channel.say_config_change();
        drop(channel);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_frontend_that_does_not_read_holds_up_nobody() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::default();
        channel.set(ours.into());
        (0..100_000).for_each(|_| channel.say_config_change());
        drop(theirs);
        channel.say_config_change();
    }
}
