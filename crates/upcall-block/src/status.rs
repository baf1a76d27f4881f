//! How a request ended.

use std::fmt;

/// A positive errno value of Linux, 1 to 4095.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

impl Errno {
    /// Input/output error.
    pub const EIO: Errno = Errno(5);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(22);
    /// No space left on the device.
    pub const ENOSPC: Errno = Errno(28);
    /// Read-only.
    pub const EROFS: Errno = Errno(30);
    /// Operation not supported.
    pub const EOPNOTSUPP: Errno = Errno(95);
    /// Cancelled: nobody waits for the request any more.
    pub const ECANCELED: Errno = Errno(125);

    /// The errno of a positive number as `std::io::Error::raw_os_error` gives it; anything
    /// that is none becomes EIO.
    pub const fn from_raw(raw: i32) -> Errno {
        if raw >= 1 && raw <= 4095 { Errno(raw as u16) } else { Errno::EIO }
    }

    /// As a positive number.
    pub const fn raw(self) -> i32 {
        self.0 as i32
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.raw()).fmt(f)
    }
}

/// How a request ended: in success or with an errno.
pub type Status = Result<(), Errno>;
