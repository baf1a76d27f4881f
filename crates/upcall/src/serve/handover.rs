//! What a supervisor hands down to a worker, and what the worker says back, over a socket that
//! is the worker's standard input.
//!
//! Down: the listening sockets of the disks, the configuration file as it was read once, and
//! the end of the orders. Up: what is served, and that it is. Descriptors that travel over a
//! socket arrive closed on exec, so no filter host ever inherits one.
//!
//! Always true: packets are whole or are not there; the supervisor never waits for a worker to
//! read (what does not fit is an error); a worker that gets half of its orders does not start.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::Signal;

use crate::failure::Failure;

/// Descriptors in one packet; the kernel takes 253.
const DESCRIPTORS_MAX: usize = 128;
/// Bytes of a packet: well below what a socket holds.
const PACKET_MAX: usize = 32 << 10;

/// Bytes of a text that travels in a descriptor.
const TEXT_MAX: u64 = 16 << 20;

/// The first byte of a packet.
mod kind {
    /// Down: sockets of the disks whose numbers follow, as text, one a line.
    pub const SOCKETS: u8 = b's';
    /// Down: the configuration file, in a descriptor.
    pub const CONFIG: u8 = b'c';
    /// Down: the store of a disk has failed for good under an earlier worker. Up: it has just
    /// failed. The disk's name, a line's end, and what was said.
    pub const FAILED: u8 = b'f';
    /// The chains of all disks, in a descriptor. Up: they are these from now on. Down: they are
    /// these, whatever the configuration says.
    pub const CHAINS: u8 = b'h';
    /// Down: that was all.
    pub const BEGIN: u8 = b'b';
    /// Up: a piece of what is served, as text.
    pub const TEXT: u8 = b't';
    /// Up: it is served.
    pub const SERVING: u8 = b'r';
}

/// All that a supervised worker is given beside its arguments.
#[derive(Debug, Default)]
pub struct Orders {
    /// The sockets of disks, by the disk's place among all disks.
    pub sockets: Vec<(usize, OwnedFd)>,
    /// The configuration file, as it was when the supervisor started.
    pub config: Option<String>,
    /// Disks whose stores failed for good under an earlier worker, and what was said.
    pub failed: HashMap<String, String>,
    /// The chains that an earlier worker had.
    pub chains: Option<String>,
}

// ------------------------------------------------------------------ the supervisor's side

/// The supervisor's end.
#[derive(Debug)]
pub struct ToWorker(OwnedFd);

/// What a worker said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// A piece of what is served; it may end inside a character.
    Text(Vec<u8>),
    Serving,
    /// A disk's store has failed for good: its name, and what is said.
    Failed(String, String),
    /// The chains that the disks have from now on.
    Chains(String),
    /// Nothing now.
    Nothing,
}

/// A new pair: ours, and the worker's standard input.
pub fn pair() -> io::Result<(ToWorker, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok((ToWorker(ours), theirs))
}

impl ToWorker {
    /// Hands everything down. An error (it has died, or is out of order) shows in its end.
    pub fn hand_down(
        &self,
        sockets: &[(usize, BorrowedFd<'_>)],
        config: Option<&str>,
        failed: &HashMap<String, String>,
        chains: Option<&str>,
    ) -> io::Result<()> {
        let now = SendFlags::DONTWAIT;
        for some in sockets.chunks(DESCRIPTORS_MAX) {
            let places: Vec<String> = some.iter().map(|(place, _)| place.to_string()).collect();
            let fds: Vec<BorrowedFd<'_>> = some.iter().map(|(_, fd)| *fd).collect();
            send(self.0.as_fd(), kind::SOCKETS, places.join("\n").as_bytes(), &fds, now)?;
        }
        if let Some(text) = config {
            send(self.0.as_fd(), kind::CONFIG, b"", &[in_memory(text)?.as_fd()], now)?;
        }
        for (disk, text) in failed {
            send(self.0.as_fd(), kind::FAILED, &failure_bytes(disk, text), &[], now)?;
        }
        if let Some(text) = chains {
            send(self.0.as_fd(), kind::CHAINS, b"", &[in_memory(text)?.as_fd()], now)?;
        }
        send(self.0.as_fd(), kind::BEGIN, b"", &[], now)
    }

    /// What the worker said next. What makes no sense is as if it had said nothing: it is our
    /// own program, and its end is seen elsewhere.
    pub fn hear(&self) -> Said {
        match receive(self.0.as_fd(), RecvFlags::DONTWAIT) {
            Ok(Some((kind::TEXT, text, _))) => Said::Text(text),
            Ok(Some((kind::SERVING, ..))) => Said::Serving,
            Ok(Some((kind::CHAINS, _, fds))) => match text_of(fds) {
                Ok(text) => Said::Chains(text),
                Err(_) => Said::Nothing,
            },
            Ok(Some((kind::FAILED, bytes, _))) => match failure_of(&bytes) {
                Some((disk, text)) => Said::Failed(disk, text),
                None => Said::Nothing,
            },
            _ => Said::Nothing,
        }
    }
}

impl AsFd for ToWorker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What is in the descriptors of a packet, which are sealed.
fn text_of(fds: Vec<OwnedFd>) -> io::Result<String> {
    let mut text = String::new();
    for fd in fds {
        std::fs::File::from(fd).take(TEXT_MAX).read_to_string(&mut text)?;
    }
    Ok(text)
}

/// A sealed file of memory: a packet would be too small for some configurations.
fn in_memory(text: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("upcall-config", flags)?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, rest))?;
        rest = &rest[written..];
    }
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

// ---------------------------------------------------------------------- the worker's side

/// The worker's end: its standard input.
#[derive(Clone, Copy, Debug)]
pub struct ToSupervisor(());

/// Takes what the supervisor hands down, and makes this process end in order (by SIGTERM) when
/// the supervisor dies. First of all it makes any panic the end of the process: who is
/// supervised is started anew, and that is better than a disk that is served no more.
pub fn take() -> Result<(Orders, ToSupervisor), Failure> {
    let failed = |error: io::Error| {
        Failure::new(format_args!(
            "--supervised is how --restart starts a worker, and cannot be used alone: {error}"
        ))
    };
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
    let stdin = io::stdin();
    let orders = receive_orders(stdin.as_fd()).map_err(failed)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|errno| failed(errno.into()))?;
    // It may have died before we asked to be told.
    let mut fds = [PollFd::new(&stdin, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).map_err(|errno| failed(errno.into()))?;
    if fds[0].revents().contains(PollFlags::HUP) {
        return Err(Failure::new("the supervisor has died"));
    }
    Ok((orders, ToSupervisor(())))
}

fn receive_orders(socket: BorrowedFd<'_>) -> io::Result<Orders> {
    let mut orders = Orders::default();
    loop {
        let Some((kind, bytes, fds)) = receive(socket, RecvFlags::empty())? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        match (kind, fds.len()) {
            (kind::SOCKETS, count) => {
                let text = String::from_utf8(bytes).map_err(io::Error::other)?;
                let places: Result<Vec<usize>, _> = text.split('\n').map(str::parse).collect();
                let places = places.map_err(io::Error::other)?;
                if places.len() != count {
                    return Err(io::Error::other("not a socket for each disk"));
                }
                orders.sockets.extend(places.into_iter().zip(fds));
            }
            (kind::CONFIG, 1) => orders.config = Some(text_of(fds)?),
            (kind::CHAINS, 1) => orders.chains = Some(text_of(fds)?),
            (kind::FAILED, 0) => {
                let failure = failure_of(&bytes).ok_or_else(|| io::Error::other("no failure"))?;
                orders.failed.extend([failure]);
            }
            (kind::BEGIN, 0) => return Ok(orders),
            _ => return Err(io::Error::other("unknown orders")),
        }
    }
}

impl ToSupervisor {
    /// Says that a disk's store has failed for good. Does not block.
    pub fn say_failed(self, disk: &str, text: &str) {
        let (stdin, now) = (io::stdin(), SendFlags::DONTWAIT);
        let _ = send(stdin.as_fd(), kind::FAILED, &failure_bytes(disk, text), &[], now);
    }

    /// Says which chains the disks have from now on. When it returns, they are written down: the
    /// supervisor finds it also if this process dies at once. Does not block.
    pub fn say_chains(self, text: &str) -> io::Result<()> {
        if text.len() as u64 > TEXT_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let (stdin, memory) = (io::stdin(), in_memory(text)?);
        send(stdin.as_fd(), kind::CHAINS, b"", &[memory.as_fd()], SendFlags::DONTWAIT)
    }

    /// Says what is served, and that it is. Nobody to hear it is no failure of the disks.
    pub fn say_serving(self, text: &str) {
        let stdin = io::stdin();
        for piece in text.as_bytes().chunks(PACKET_MAX - 1) {
            let _ = send(stdin.as_fd(), kind::TEXT, piece, &[], SendFlags::empty());
        }
        let _ = send(stdin.as_fd(), kind::SERVING, b"", &[], SendFlags::empty());
    }
}

// ---------------------------------------------------------------------------- the packets

fn failure_bytes(disk: &str, text: &str) -> Vec<u8> {
    let mut bytes = format!("{disk}\n{text}").into_bytes();
    bytes.truncate(PACKET_MAX - 1);
    bytes
}

fn failure_of(bytes: &[u8]) -> Option<(String, String)> {
    let text = String::from_utf8_lossy(bytes);
    let (disk, text) = text.split_once('\n')?;
    Some((disk.to_owned(), text.to_owned()))
}

fn send(
    socket: BorrowedFd<'_>,
    kind: u8,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE.into());
    }
    let head = [kind];
    let parts = [IoSlice::new(&head), IoSlice::new(bytes)];
    let flags = flags | SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut control, flags))?;
    Ok(())
}

/// A packet: its kind, its bytes, its descriptors. None: the other side has ended.
type Packet = (u8, Vec<u8>, Vec<OwnedFd>);

fn receive(socket: BorrowedFd<'_>, flags: RecvFlags) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            result => break result?,
        }
    };
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Errno::MSGSIZE.into());
    }
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    bytes.truncate(message.bytes);
    if bytes.is_empty() {
        return Ok(None);
    }
    let kind = bytes.remove(0);
    Ok(Some((kind, bytes, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_down_arrives_whole_and_in_its_place() {
        let (ours, theirs) = pair().unwrap();
        let files: Vec<OwnedFd> = (0..300).map(|n| in_memory(&n.to_string()).unwrap()).collect();
        let sockets: Vec<_> = files.iter().enumerate().map(|(n, fd)| (n * 2, fd.as_fd())).collect();
        let config = "x".repeat(1 << 20);
        let failed = HashMap::from([("a".to_owned(), "lost:\nall".to_owned())]);
        ours.hand_down(&sockets, Some(&config), &failed, Some("[]")).unwrap();
        let orders = receive_orders(theirs.as_fd()).unwrap();
        assert_eq!(orders.failed, failed);
        assert_eq!(orders.chains.as_deref(), Some("[]"));
        assert_eq!(orders.config, Some(config));
        assert_eq!(orders.sockets.len(), 300);
        for (number, (place, fd)) in orders.sockets.into_iter().enumerate() {
            assert_eq!(place, number * 2);
            let flags = rustix::io::fcntl_getfd(&fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "filter hosts would inherit it");
            let mut text = String::new();
            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
            assert_eq!(text, number.to_string());
        }
    }

    #[test]
    fn half_of_the_orders_are_no_orders() {
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), kind::SOCKETS, b"0\n1", &[theirs.as_fd()], SendFlags::empty()).unwrap();
        assert!(receive_orders(theirs.as_fd()).is_err(), "one socket for two disks");
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), kind::SOCKETS, b"0", &[theirs.as_fd()], SendFlags::empty()).unwrap();
        drop(ours);
        assert!(receive_orders(theirs.as_fd()).is_err(), "the supervisor died meanwhile");
    }

    #[test]
    fn what_a_worker_says_arrives_in_pieces_and_is_known_to_be_all() {
        let (ours, theirs) = pair().unwrap();
        assert_eq!(ours.hear(), Said::Nothing);
        send(theirs.as_fd(), kind::TEXT, b"disk root: ", &[], SendFlags::empty()).unwrap();
        send(theirs.as_fd(), kind::SERVING, b"", &[], SendFlags::empty()).unwrap();
        let failure = failure_bytes("root", "x");
        send(theirs.as_fd(), kind::FAILED, &failure, &[], SendFlags::empty()).unwrap();
        assert_eq!(ours.hear(), Said::Text(b"disk root: ".into()));
        assert_eq!(ours.hear(), Said::Serving);
        assert_eq!(ours.hear(), Said::Failed("root".into(), "x".into()));
        drop(theirs);
        assert_eq!(ours.hear(), Said::Nothing);
    }
}
