//! A wake-up between threads or processes: an eventfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::EventfdFlags;
use rustix::io::Errno;

/// An eventfd that one side rings and the other waits for. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<OwnedFd>);

impl Doorbell {
    /// A new one, not rung; non-blocking, closed on exec.
    pub fn new() -> io::Result<Doorbell> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Doorbell(Arc::new(fd)))
    }

    /// One that somebody else made.
    pub fn from_fd(fd: OwnedFd) -> Doorbell {
        Doorbell(Arc::new(fd))
    }

    /// Wakes the other side, now or when it next waits. Errors cannot matter: a full
    /// counter means that it is rung already.
    pub fn ring(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Takes back all rings so far; says whether there were any.
    pub fn clear(&self) -> bool {
        loop {
            match rustix::io::read(&*self.0, &mut [0; 8]) {
                Err(Errno::INTR) => {}
                result => return result.is_ok(),
            }
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
