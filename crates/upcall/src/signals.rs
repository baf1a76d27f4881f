//! SIGTERM and SIGINT: the first asks for an orderly end, a second one ends us at once. SIGHUP:
//! look again at what is served.
//!
//! A handler instead of a blocked mask and a signalfd, because children inherit a blocked
//! mask, but never a handler.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::EventfdFlags;

/// The doorbell that the handler rings; -1 before there is one.
static DOORBELL: AtomicI32 = AtomicI32::new(-1);
/// The first signal that came; 0 for none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);
/// As [`DOORBELL`], for SIGHUP.
static HANGUP_DOORBELL: AtomicI32 = AtomicI32::new(-1);

/// Readable from the moment that the process was asked to end. There is one, for as long as
/// the process lives.
pub struct Shutdown {
    doorbell: OwnedFd,
}

impl Shutdown {
    /// Takes over SIGTERM and SIGINT of the process.
    pub fn watch() -> io::Result<Shutdown> {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        DOORBELL.store(doorbell.as_raw_fd(), Ordering::SeqCst);
        for signal in [libc::SIGTERM, libc::SIGINT] {
            install(signal)?;
        }
        Ok(Shutdown { doorbell })
    }

    /// Its name, once it came.
    pub fn cause(&self) -> &'static str {
        match CAUGHT.load(Ordering::SeqCst) {
            libc::SIGINT => "SIGINT",
            libc::SIGTERM => "SIGTERM",
            _ => "no signal",
        }
    }
}

impl AsFd for Shutdown {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

impl Drop for Shutdown {
    fn drop(&mut self) {
        // The handler stays, and must not ring a descriptor that is another's by then.
        DOORBELL.store(-1, Ordering::SeqCst);
    }
}

/// Readable when SIGHUP came. There is one, for as long as the process lives.
pub struct Hangup {
    doorbell: OwnedFd,
}

impl Hangup {
    /// Takes over SIGHUP of the process.
    pub fn watch() -> io::Result<Hangup> {
        let doorbell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        HANGUP_DOORBELL.store(doorbell.as_raw_fd(), Ordering::SeqCst);
        install(libc::SIGHUP)?;
        Ok(Hangup { doorbell })
    }

    /// Whether it came since the last call.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.doorbell, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Hangup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        HANGUP_DOORBELL.store(-1, Ordering::SeqCst);
    }
}

fn install(signal: i32) -> io::Result<()> {
    let handler: extern "C" fn(i32) = handle;
    // SAFETY: all-zero bytes are a valid sigaction: no flags, an empty mask; the handler is
    // set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: `action` is complete, and its handler makes async-signal-safe calls only.
    match unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn handle(signal: i32) {
    let doorbell = if signal == libc::SIGHUP {
        &HANGUP_DOORBELL
    } else if CAUGHT.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
        &DOORBELL
    } else {
        // SAFETY: async-signal-safe, and does not return.
        unsafe { libc::_exit(128 + signal) };
    };
    let one = 1u64.to_ne_bytes();
    // SAFETY: async-signal-safe; `one` is 8 readable bytes. It cannot block, and so cannot
    // fail: nobody else rings, and nobody rings 2^64 times. The interrupted code never sees its
    // errno, which is not set.
    unsafe { libc::write(doorbell.load(Ordering::SeqCst), one.as_ptr().cast(), one.len()) };
}
