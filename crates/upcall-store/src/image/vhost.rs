//! The frontend's side of the vhost-user protocol, as far as one block device with one queue
//! needs it.
//!
//! Each message is answered or acknowledged before the next is sent, and each wait has an end.
//! An answer that is not the expected one is an error; it may bring no descriptors (the
//! kernel drops them: there is no room for them to arrive in).

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::image::ring::{BASE, ClientRing, QUEUE_SIZE};

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_CONFIG_WCE: u64 = 1 << 11;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const FEATURE_PROTOCOL: u64 = 1 << 30;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Bytes of the configuration of a block device that we look at.
const CONFIG_BYTES: usize = 60;
const WCE_OFFSET: u32 = 32;

/// What the device says of itself, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// Bytes; a multiple of 512, not 0.
    pub capacity: u64,
    pub is_read_only: bool,
    /// Most sectors of one write-zeroes; 0 if it has none.
    pub write_zeroes_max: u32,
}

/// The connection.
pub(crate) struct Client {
    socket: UnixStream,
}

impl Client {
    /// `timeout`: for each answer.
    pub fn new(socket: UnixStream, timeout: Duration) -> io::Result<Client> {
        socket.set_read_timeout(Some(timeout))?;
        socket.set_write_timeout(Some(timeout))?;
        Ok(Client { socket })
    }

    /// Becomes readable (or is closed) when the device is gone: it never speaks first.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Everything from the first message to a queue that runs.
    pub fn start(
        &mut self,
        ring: &ClientRing,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> io::Result<Device> {
        let features = self.get_u64(1)?;
        let needed = FEATURE_PROTOCOL | FEATURE_VERSION_1 | FEATURE_FLUSH;
        if features & needed != needed {
            return Err(odd(format!("offers the features {features:#x} only")));
        }
        let protocol = self.get_u64(15)?;
        let wanted = PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG;
        if protocol & wanted != wanted {
            return Err(odd(format!("offers the protocol features {protocol:#x} only")));
        }
        // Before this there are no acknowledgements.
        self.send(16, 0, &wanted.to_le_bytes(), &[])?;
        self.set(3, &[], &[])?;
        let device = parse(&self.get_config()?, features)?;
        let known = needed | FEATURE_READ_ONLY | FEATURE_CONFIG_WCE | FEATURE_WRITE_ZEROES;
        let taken = features & known;
        self.set(2, &taken.to_le_bytes(), &[])?;
        if taken & FEATURE_CONFIG_WCE != 0 && !device.is_read_only {
            // We flush when something is to be durable.
            self.set_config(WCE_OFFSET, &[1])?;
        }
        let length = ring.memory().len() as u64;
        let mut table = Vec::new();
        table.extend(1u32.to_le_bytes());
        table.extend([0; 4]);
        // Guest address, length, user address, offset in the file.
        [BASE, length, BASE, 0].iter().for_each(|number| table.extend(number.to_le_bytes()));
        self.set(5, &table, &[ring.fd()])?;
        self.set(8, &queue(u32::from(QUEUE_SIZE)), &[])?;
        self.set(10, &queue(0), &[])?;
        let [descriptors, available, used] = ring.addresses();
        let mut addresses = vec![0; 8];
        [descriptors, used, available, 0]
            .iter()
            .for_each(|number: &u64| addresses.extend(number.to_le_bytes()));
        self.set(9, &addresses, &[])?;
        self.set(13, &0u64.to_le_bytes(), &[call])?;
        self.set(12, &0u64.to_le_bytes(), &[kick])?;
        self.set(18, &queue(1), &[])?;
        Ok(device)
    }

    fn get_u64(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, 0, &[], &[])?;
        let mut bytes = [0; 8];
        self.receive(request, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn get_config(&mut self) -> io::Result<[u8; CONFIG_BYTES]> {
        let mut message = config_header(0, CONFIG_BYTES as u32);
        message.resize(12 + CONFIG_BYTES, 0);
        self.send(24, 0, &message, &[])?;
        let mut answer = [0; 12 + CONFIG_BYTES];
        self.receive(24, &mut answer)?;
        let mut config = [0; CONFIG_BYTES];
        config.copy_from_slice(&answer[12..]);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut message = config_header(offset, bytes.len() as u32);
        message.extend(bytes);
        self.set(25, &message, &[])
    }

    /// Sends, and waits until it was taken.
    fn set(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(request, NEED_REPLY, payload, fds)?;
        let mut bytes = [0; 8];
        self.receive(request, &mut bytes)?;
        match u64::from_le_bytes(bytes) {
            0 => Ok(()),
            code => Err(odd(format!("refuses message {request} with {code}"))),
        }
    }

    fn send(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(12 + payload.len());
        for number in [request, VERSION | flags, payload.len() as u32] {
            message.extend(number.to_le_bytes());
        }
        message.extend(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = [IoSlice::new(&message)];
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)
        })?;
        // An empty socket buffer takes a few hundred bytes at once.
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self, request: u32, payload: &mut [u8]) -> io::Result<()> {
        let mut header = [0; 12];
        self.read(&mut header)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        let (answered, flags, length) = (word(0), word(4), word(8));
        if answered != request || flags & !NEED_REPLY != VERSION | REPLY {
            return Err(odd(format!("answers {answered} (flags {flags:#x}) to {request}")));
        }
        if length as usize != payload.len() {
            return Err(odd(format!("answers {length} bytes to message {request}")));
        }
        self.read(payload)
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.socket.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}

fn odd(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Queue 0 and a number.
fn queue(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn config_header(offset: u32, length: u32) -> Vec<u8> {
    [offset, length, 0].iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn parse(config: &[u8; CONFIG_BYTES], features: u64) -> io::Result<Device> {
    let mut sectors = [0; 8];
    sectors.copy_from_slice(&config[..8]);
    let mut zeroes = [0; 4];
    zeroes.copy_from_slice(&config[48..52]);
    let capacity = match u64::from_le_bytes(sectors).checked_mul(512) {
        Some(bytes) if bytes > 0 && bytes <= i64::MAX as u64 => bytes,
        _ => return Err(odd("has no size that a disk can have".into())),
    };
    let can_zero = features & FEATURE_WRITE_ZEROES != 0;
    Ok(Device {
        capacity,
        is_read_only: features & FEATURE_READ_ONLY != 0,
        write_zeroes_max: if can_zero { u32::from_le_bytes(zeroes) } else { 0 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A device that answers with `bytes`, whatever it is told, and closes.
    fn told(bytes: &[u8]) -> io::Result<Device> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        let ring = ClientRing::new(4096).unwrap();
        let mut client = Client::new(ours, Duration::from_millis(50)).unwrap();
        let result = client.start(&ring, ring.fd(), ring.fd());
        drop(theirs);
        result
    }

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [request, flags, payload.len() as u32]
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn a_device_that_talks_nonsense_is_refused_and_never_waited_for_for_ever() {
        let features = (FEATURE_PROTOCOL | FEATURE_VERSION_1 | FEATURE_FLUSH).to_le_bytes();
        for (answer, says) in [
            (message(1, 5, &[0; 8]), "features 0x0"),
            (message(2, 5, &features), "answers 2"),
            (message(1, 1, &features), "flags 0x1"),
            (message(1, 5, &[0; 9]), "9 bytes"),
            ([message(1, 5, &features), message(15, 5, &[0; 8])].concat(), "protocol features"),
            (vec![], "timed out"),
            (vec![1, 0, 0], "timed out"),
        ] {
            let said = told(&answer).unwrap_err().to_string();
            assert!(said.contains(says), "{answer:?}: {said} does not say {says}");
        }
    }

    #[test]
    fn a_size_that_no_disk_has_is_refused() {
        let mut config = [0; CONFIG_BYTES];
        assert!(parse(&config, 0).is_err());
        config[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse(&config, 0).is_err());
        config[..8].copy_from_slice(&8u64.to_le_bytes());
        config[48] = 16;
        let device = Device { capacity: 4096, is_read_only: true, write_zeroes_max: 0 };
        assert_eq!(parse(&config, FEATURE_READ_ONLY).unwrap(), device);
        assert_eq!(parse(&config, FEATURE_WRITE_ZEROES).unwrap().write_zeroes_max, 16);
    }
}
