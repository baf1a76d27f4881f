//! One connection, from its start to its end.
//!
//! Waits for a whole message before the `vhost` crate reads it, and for room in the socket
//! before it answers, so that a frontend that stops halfway holds up nobody: `shutdown` is
//! heeded at any time, but for the time that a ring takes to stop.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use vhost::vhost_user::BackendReqHandler;

use crate::channel;
use crate::config::BlkConfig;
use crate::device::{Device, QueueHost, Refusal};

/// How long a frontend may take from the first byte of a message to its last.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often we look whether the rest of a message is there.
const MESSAGE_POLL: Duration = Duration::from_millis(1);
/// Bytes of a message before its body.
const MESSAGE_HEADER_SIZE: usize = 12;
/// Longest body; the `vhost` crate refuses others.
const MESSAGE_BODY_MAX: usize = 4096;
/// VHOST_USER_SET_LOG_FD, which the `vhost` crate does not know.
const SET_LOG_FD: u32 = 7;
/// In a header's flags: the version, that it is a reply, that one is wanted.
const FLAGS_VERSION: u32 = 1;
const FLAGS_REPLY: u32 = 4;
const FLAGS_NEED_REPLY: u32 = 8;
/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

/// How a connection ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The frontend closed it.
    PeerClosed,
    /// `shutdown` became readable.
    ShutDown,
}

/// How a connection ended otherwise. A frontend that reconnects may do better next time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The frontend asked for what it cannot have. Its configuration or ours must change.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The frontend does not speak the protocol as we understand it.
    #[error("protocol error: {0}")]
    Protocol(vhost::vhost_user::Error),
    /// Half a message came, and nothing more, or the connection ended there.
    #[error("the frontend stopped in the middle of a message")]
    Stalled,
    /// Answers that the frontend does not read fill the socket.
    #[error(
        "the frontend has read no answer for {} s",
        MESSAGE_TIMEOUT.as_secs()
    )]
    Unread,
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] std::io::Error),
}

impl From<Errno> for ConnectionError {
    fn from(errno: Errno) -> ConnectionError {
        ConnectionError::Socket(errno.into())
    }
}

/// Serves the disk `config` to the frontend behind `stream` until the connection ends or
/// `shutdown` becomes readable (it is not read). Queues are started and stopped through
/// `host`; none runs when this returns. Blocks: call it on a thread of its own.
pub fn serve_connection(
    stream: UnixStream,
    config: Arc<BlkConfig>,
    host: &mut dyn QueueHost,
    shutdown: BorrowedFd<'_>,
) -> Result<Ended, ConnectionError> {
    stream.set_nonblocking(false)?;
    let watched = stream.try_clone()?;
    #[expect(clippy::arc_with_non_send_sync, reason = "the handler takes nothing else")]
    let device = Arc::new(Mutex::new(Device::new(config, host)));
    let mut handler = BackendReqHandler::from_stream(stream, device.clone());

    // However this returns, the device is dropped, and that stops the queues.
    loop {
        if let Some(ended) = wait_for_message(&watched, shutdown)? {
            if ended == Ended::ShutDown {
                device.lock().unwrap_or_else(PoisonError::into_inner).shut_down();
            }
            return Ok(ended);
        }
        match next_request(&watched) {
            Some(SET_BACKEND_REQ_FD) => {
                let channel = channel::peek_descriptor(&watched);
                device.lock().unwrap_or_else(PoisonError::into_inner).offer_channel(channel);
            }
            Some(SET_LOG_FD) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                set_log_fd(&watched, &mut device)?;
                continue;
            }
            _ => {}
        }
        if let Err(error) = handler.handle_request() {
            let refusal = device.lock().unwrap_or_else(PoisonError::into_inner).take_refusal();
            return Err(refusal.map_or(ConnectionError::Protocol(error), ConnectionError::Refused));
        }
    }
}

/// Waits until a message can be read, and answered, without blocking. `Some`: there will
/// be none.
fn wait_for_message(
    stream: &UnixStream,
    shutdown: BorrowedFd<'_>,
) -> Result<Option<Ended>, ConnectionError> {
    if wait_until(stream, PollFlags::IN, shutdown, None)? == Waited::ShutDown {
        return Ok(Some(Ended::ShutDown));
    }
    let deadline = Instant::now() + MESSAGE_TIMEOUT;
    loop {
        match look_for_message(stream)? {
            Seen::Whole => break,
            Seen::End => return Ok(Some(Ended::PeerClosed)),
            Seen::Part if hung_up(stream)? || Instant::now() >= deadline => {
                return Err(ConnectionError::Stalled);
            }
            Seen::Part if is_ready_within(shutdown, MESSAGE_POLL)? => {
                return Ok(Some(Ended::ShutDown));
            }
            Seen::Part => {}
        }
    }
    match wait_until(stream, PollFlags::OUT, shutdown, Some(MESSAGE_TIMEOUT))? {
        Waited::Ready => Ok(None),
        Waited::ShutDown => Ok(Some(Ended::ShutDown)),
        Waited::TimedOut => Err(ConnectionError::Unread),
    }
}

/// What is in the socket.
enum Seen {
    Whole,
    Part,
    End,
}

fn look_for_message(stream: &UnixStream) -> Result<Seen, ConnectionError> {
    let mut header = [0; MESSAGE_HEADER_SIZE];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let length = match rustix::net::recv(stream, &mut header, flags) {
        Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(Seen::End),
        Ok((length, _)) => length,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Seen::Part),
        Err(errno) => return Err(errno.into()),
    };
    if length < MESSAGE_HEADER_SIZE {
        return Ok(Seen::Part);
    }
    let [.., b0, b1, b2, b3] = header;
    let body = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
    if body > MESSAGE_BODY_MAX {
        // Refused when it is read.
        return Ok(Seen::Whole);
    }
    let there = rustix::io::ioctl_fionread(stream)?;
    let whole = there >= (MESSAGE_HEADER_SIZE + body) as u64;
    Ok(if whole { Seen::Whole } else { Seen::Part })
}

/// Which message is next, once one is there.
fn next_request(stream: &UnixStream) -> Option<u32> {
    let mut request = [0; 4];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (length, _) = rustix::net::recv(stream, &mut request, flags).ok()?;
    (length == request.len()).then(|| u32::from_le_bytes(request))
}

/// Handles SET_LOG_FD, all of which is in the socket.
fn set_log_fd(stream: &UnixStream, device: &mut Device<'_>) -> Result<(), ConnectionError> {
    let mut header = [0; MESSAGE_HEADER_SIZE];
    let fd = channel::take(stream, &mut header);
    let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let (flags, length) = (number(4), number(8) as usize);
    if length > MESSAGE_BODY_MAX {
        return Err(ConnectionError::Protocol(vhost::vhost_user::Error::InvalidMessage));
    }
    // Some send an empty body, some a number that says nothing.
    if length > 0 {
        let _ = channel::take(stream, &mut vec![0; length]);
    }
    if device.set_log_signal(fd) && flags & FLAGS_NEED_REPLY != 0 {
        let head = [SET_LOG_FD, FLAGS_VERSION | FLAGS_REPLY, 8].map(u32::to_le_bytes).concat();
        let reply = [head, vec![0; 8]].concat();
        rustix::net::send(stream, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    }
    Ok(())
}

fn hung_up(stream: &UnixStream) -> Result<bool, ConnectionError> {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll_again(&mut fds, Some(&now))?;
    Ok(fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR))
}

/// What came first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waited {
    Ready,
    ShutDown,
    TimedOut,
}

/// Waits until `stream` is ready for `flags` or has ended.
fn wait_until(
    stream: &UnixStream,
    flags: PollFlags,
    shutdown: BorrowedFd<'_>,
    timeout: Option<Duration>,
) -> Result<Waited, ConnectionError> {
    let mut fds = [PollFd::new(stream, flags), PollFd::from_borrowed_fd(shutdown, PollFlags::IN)];
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: timeout.subsec_nanos().into(),
    });
    poll_again(&mut fds, timeout.as_ref())?;
    Ok(if !fds[1].revents().is_empty() {
        Waited::ShutDown
    } else if !fds[0].revents().is_empty() {
        Waited::Ready
    } else {
        Waited::TimedOut
    })
}

fn is_ready_within(fd: BorrowedFd<'_>, timeout: Duration) -> Result<bool, ConnectionError> {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
    poll_again(&mut fds, Some(&timeout))?;
    Ok(!fds[0].revents().is_empty())
}

fn poll_again(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> Result<(), ConnectionError> {
    loop {
        match poll(fds, timeout) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(|_| ())?),
        }
    }
}

#[cfg(test)]
mod tests;
